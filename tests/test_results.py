"""The results page: made of what was kept, and of nothing else."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from plif_jax.errors import UserError

sys.path.append(str(Path(__file__).parents[1] / "experiments"))

import results

ROOT = Path(__file__).parents[1]


def test_the_committed_page_is_what_the_kept_figures_give():
    assert (ROOT / "RESULTS.md").read_text() == results.page()
    for name in results.ROWS:
        assert ((ROOT / "docs/results" / f"{name}.json").exists()) == (
            f"{name}.png" in (ROOT / "RESULTS.md").read_text()
        )


def test_a_row_is_run_with_its_own_settings_or_not_at_all(tmp_path):
    """Its command is printed beside the figures."""
    for flag in ("batch_size", "max_epoch"):
        with pytest.raises(UserError, match=f"-{flag} would make another run than the row digits"):
            results.run("digits", [f"-{flag}", "8"], str(tmp_path), 0)
    with pytest.raises(UserError, match=r"unknown argument -minuts; did you mean -minutes\?"):
        results.main(["-minuts", "8"])


def test_more_epochs_are_kept_rather_than_fewer(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "KEPT", tmp_path)
    (tmp_path / "digits.json").write_text('{"epochs": 12}')
    run = SimpleNamespace(run_dir=tmp_path)
    (tmp_path / "result.json").write_text('{"epochs": 2, "best": {}}')
    results.keep("digits", run)
    assert capsys.readouterr().out == "digits: 12 epochs are kept from another run, these 2 do not replace them\n"
    assert (tmp_path / "digits.json").read_text() == '{"epochs": 12}'


def test_of_an_ablation_the_table_is_kept_and_the_runs_that_are_done(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "KEPT", tmp_path / "kept")
    results.KEPT.mkdir()
    hardware = {"devices": ["0 cpu"], "machine": "two cores", "versions": {"jax": "1"}}
    for seed, finished in ((1, True), (2, True), (3, False)):
        run = tmp_path / "logs" / f"seed_{seed}" / "a run"
        run.mkdir(parents=True)
        (run / "result.json").write_text(json.dumps({"finished": finished, "seconds": 90.0, **hardware}))
    (tmp_path / "logs" / "ablation.md").write_text("| the table |\n")
    (tmp_path / "logs" / "ablation.png").write_bytes(b"the picture")
    results.keep("ablation", SimpleNamespace(log_dir_prefix=str(tmp_path / "logs")))
    kept = json.loads((results.KEPT / "ablation.json").read_text())
    section = results._section("ablation", "what", kept, {})
    assert "| the table |" in section and "2 runs, 3 minutes in all: cpu x 1; two cores; JAX 1." in section
    assert f"python experiments/{' '.join(results.ROWS['ablation'][:2])}\n" in section
    assert (results.KEPT / "ablation.png").read_bytes() == b"the picture"
