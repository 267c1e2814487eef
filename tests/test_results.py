"""The results page: made of what was kept, and of nothing else."""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from programs import wait_for

from plif_jax.errors import UserError
from plif_jax.training import signals

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
    kept = json.dumps({"epochs": 12, "samples": {"train": 4}})
    (tmp_path / "digits.json").write_text(kept)
    run = SimpleNamespace(run_dir=tmp_path)
    for samples, said in (
        (4, "a run of 12 epochs is kept, this had 2"),
        (9, "a run on {'train': 4} samples is kept, this had {'train': 9}"),
    ):
        other = {"epochs": 2 if samples == 4 else 99, "samples": {"train": samples}, "best": {}}
        (tmp_path / "result.json").write_text(json.dumps(other))
        results.keep("digits", run)
        assert said in capsys.readouterr().out
        assert (tmp_path / "digits.json").read_text() == kept


PROGRAM = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(__file__).parent
assert os.getsid(0) == os.getpid(), "Ctrl-C in a terminal would reach it too"
def stop(*_):
    time.sleep(1)  # it saves
    (folder / "told").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
(folder / "ready").touch()
time.sleep(60)
"""


@pytest.fixture
def row(tmp_path, monkeypatch):
    """A row whose program trains nothing; and its folder."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results.data, "load", lambda settings: None)
    monkeypatch.setattr(results, "write_page", lambda: None)
    monkeypatch.setitem(results.ROWS, "a row", ("program.py", f"-config {ROOT / 'configs/digits.py'}", "a row"))
    return tmp_path / "experiments"


@pytest.mark.parametrize("early", [False, True])
def test_a_signal_stops_the_row_too(row, tmp_path, monkeypatch, early):
    """Early: it comes while the row's program is being started."""
    start = results.subprocess.Popen

    def start_and_tell(*args, **kwargs):
        program = start(*args, **kwargs)
        wait_for((row / "ready").exists)
        if early:
            for _ in range(2):  # the second must not end this program before the row is told
                os.kill(os.getpid(), signal.SIGTERM)
        else:
            threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return program

    monkeypatch.setattr(results.subprocess, "Popen", start_and_tell)
    with pytest.raises(signals.Interrupted):
        results.run("a row", [], str(tmp_path), float("inf"))
    assert (row / "told").exists()


def test_a_row_whose_time_is_up_before_it_listens_has_not_failed(row, tmp_path, capsys):
    results.run("a row", [], str(tmp_path), 0)
    assert "no epoch is done yet" in capsys.readouterr().out


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
