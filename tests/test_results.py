"""The results page: made of what was kept, and of nothing else."""

import runpy
from pathlib import Path

import pytest

from plif_jax.errors import UserError

ROOT = Path(__file__).parents[1]


def test_the_committed_page_is_what_the_kept_figures_give():
    program = runpy.run_path(str(ROOT / "experiments" / "results.py"))
    assert (ROOT / "RESULTS.md").read_text() == program["page"]()
    for name in program["ROWS"]:
        assert ((ROOT / "docs/results" / f"{name}.json").exists()) == (
            f"{name}.png" in (ROOT / "RESULTS.md").read_text()
        )


def test_a_row_is_run_with_its_own_settings_or_not_at_all(tmp_path):
    """Its command is printed beside the figures."""
    program = runpy.run_path(str(ROOT / "experiments" / "results.py"))
    with pytest.raises(UserError, match="-batch_size would make another run than the row digits"):
        program["run"]("digits", ["-batch_size", "8"], str(tmp_path), 0)
