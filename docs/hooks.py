"""What MkDocs does besides: RESULTS.md, which lies beside the README, is a page of the site too."""

from pathlib import Path

from mkdocs.structure.files import File


def on_files(files, config):
    """Adds the page; its pictures lie in docs/results, where the site has them as results/."""
    text = (Path(config.config_file_path).parent / "RESULTS.md").read_text()
    files.append(File.generated(config, "results.md", content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Pages name it by its place in the repository, so that they are right when read there too."""
    return markdown.replace("](../RESULTS.md)", "](results.md)")
