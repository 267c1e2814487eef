"""What the documentation lists, and what a notebook finds."""

import subprocess
import sys
from pathlib import Path

import pytest

import plif_jax

ROOT = Path(__file__).parents[1]


def test_the_modules_of_notebooks_need_no_import_of_their_own():
    program = "import plif_jax; plif_jax.neurons.PLIF(), plif_jax.surrogate.ATan, plif_jax.networks, plif_jax.layers"
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(AttributeError, match="module 'plif_jax' has no attribute 'neuron'"):
        plif_jax.neuron  # noqa: B018


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
