import json
import tempfile
from pathlib import Path

import jax
import matplotlib
import pytest

# One worker: 5 reads the run that 3 has trained.
pytestmark = [pytest.mark.xdist_group("notebooks"), pytest.mark.usefixtures("optimized")]
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def code_cells(path):
    """The code cells of a notebook, as (number, cell)."""
    cells = json.loads(path.read_text())["cells"]
    return [(number, cell) for number, cell in enumerate(cells, 1) if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all notebooks: what one has trained another finds."""
    return tmp_path_factory.mktemp("notebooks")


def test_there_are_five():
    assert [path.stem[0] for path in NOTEBOOKS] == list("12345")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, folder, monkeypatch, rolled):
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    matplotlib.use("Agg")
    names = {"__name__": path.stem}
    with jax.numpy_rank_promotion("allow"):  # as wherever a notebook is opened
        for number, cell in code_cells(path):
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_its_outputs(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for _, cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for _, cell in cells for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_a_network_is_trained_in_twenty_lines():
    (training,) = [cell for _, cell in code_cells(NOTEBOOKS[1]) if "value_and_grad" in "".join(cell["source"])]
    assert sum(bool(line.strip()) for line in training["source"]) <= 20
