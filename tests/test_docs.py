from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_module_is_in_the_api():
    documented = {
        line.removeprefix("::: ")
        for page in (ROOT / "docs" / "api").glob("*.md")
        for line in page.read_text().splitlines()
        if line.startswith("::: ")
    }
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "plif_jax").rglob("*.py")
        if not path.name.startswith("__")
    }
    assert modules <= documented
