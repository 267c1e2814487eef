"""What MkDocs does besides: the README and the pages beside it are pages of the site too."""

from pathlib import Path

from mkdocs.structure.files import File

PAGES = {"README.md": "start.md", "CONTRIBUTING.md": "contributing.md", "RESULTS.md": "results.md"}


def on_files(files, config):
    """Adds them to those of docs/."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(Path(config.config_file_path).parent / name).read_text()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links name places in the repository, so that they are right when read there too; in the site all lie in docs/."""
    for name, place in PAGES.items():
        markdown = markdown.replace(f"](../{name})", f"]({place})").replace(f"]({name})", f"]({place})")
    return markdown.replace("](docs/", "](")
