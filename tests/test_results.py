"""The results page: made of what was kept, and of nothing else."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_committed_page_is_what_the_kept_figures_give():
    program = runpy.run_path(str(ROOT / "experiments" / "results.py"))
    assert (ROOT / "RESULTS.md").read_text() == program["page"]()
    for name in program["ROWS"]:
        assert ((ROOT / "docs/results" / f"{name}.json").exists()) == (
            f"{name}.png" in (ROOT / "RESULTS.md").read_text()
        )
