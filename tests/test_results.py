"""The results page: made of what was kept, and of nothing else."""

import dataclasses
import json
import os
import signal
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from programs import wait_for

import results
from plif_jax.config import Config
from plif_jax.errors import UserError
from plif_jax.training import signals

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
    with pytest.raises(UserError, match="-log_dir_prefix: each row has a folder of its own; -logs says where"):
        results.run("digits", ["-log_dir_prefix", "x"], str(tmp_path), 0)
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


def test_damaged_figures_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "KEPT", tmp_path)
    (tmp_path / "digits.json").write_text('{"epochs": 1')
    with pytest.raises(
        UserError, match=r"digits\.json is damaged; take it from git, or delete it and run digits again"
    ):
        results.page()


def test_a_run_that_takes_a_rows_place_removes_what_was_said_of_the_one_before(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "KEPT", tmp_path)
    note = tmp_path / "digits.md"
    results._replace("digits", {"epochs": 1})
    note.write_text("it took an hour")
    results._replace("digits", {"epochs": 1})
    assert note.exists() and not capsys.readouterr().out
    results._replace("digits", {"epochs": 2})
    assert not note.exists()
    assert "digits.md spoke of the run before and is gone" in capsys.readouterr().out
    assert json.loads((tmp_path / "digits.json").read_text()) == {"epochs": 2}


@pytest.mark.parametrize("given", [["digits", "-minutes", "nan"], ["digits", "-minutes", "0"], ["-seed=3"]])
def test_what_would_run_nothing_is_refused(given, monkeypatch):
    monkeypatch.setattr(results, "write_page", lambda: pytest.fail("written"))
    monkeypatch.setattr(results, "run", lambda *_: pytest.fail("run"))
    with pytest.raises(UserError, match=r"-minutes \S+: give a number of minutes above 0|-seed=3 is for a run"):
        results.main(given)


def test_each_row_has_its_share_of_the_time(monkeypatch):
    now, shares = 100.0, {}

    def run(name, more, logs, deadline):
        nonlocal now
        shares[name] = deadline - now
        now += 10 if name == "digits" else shares[name]

    monkeypatch.setattr(results.time, "monotonic", lambda: now)
    monkeypatch.setattr(results, "run", run)
    results.main(["digits", "mnist", "cifar10", "-minutes", "1"])
    assert shares == {"digits": 20, "mnist": 25, "cifar10": 25}


PROGRAM = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(__file__).parent
assert os.getsid(0) == os.getpid(), "Ctrl-C in a terminal would reach it too"
def stop(*_):
    time.sleep(1)  # it saves
    (folder / "told").touch()
    sys.exit(2 if (folder / "terminal closed").exists() else 143)
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


@pytest.fixture
def hang_up():
    """Sets what SIGHUP does, which the tests may have been started to ignore, and sets it back."""
    before = signal.getsignal(signal.SIGHUP)
    yield partial(signal.signal, signal.SIGHUP)
    signal.signal(signal.SIGHUP, before)


def test_under_nohup_a_closed_terminal_stops_nothing(hang_up):
    hang_up(signal.SIG_IGN)
    with results._recording() as told:
        os.kill(os.getpid(), signal.SIGHUP)
    assert not told


@pytest.mark.parametrize("early, signum", [(False, signal.SIGTERM), (True, signal.SIGTERM), (False, signal.SIGHUP)])
def test_a_signal_stops_the_row_too(row, tmp_path, monkeypatch, hang_up, early, signum):
    """Early: it comes while the row's program is being started. SIGHUP: the terminal is closed."""
    start = results.subprocess.Popen
    hang_up(signal.SIG_DFL)
    if signum == signal.SIGHUP:
        (row / "terminal closed").touch()

    def start_and_tell(*args, **kwargs):
        program = start(*args, **kwargs)
        wait_for((row / "ready").exists)
        if early:
            for _ in range(2):  # the second must not end this program before the row is told
                os.kill(os.getpid(), signum)
        else:
            threading.Timer(0.7, os.kill, (os.getpid(), signum)).start()
        return program

    monkeypatch.setattr(results.subprocess, "Popen", start_and_tell)
    with pytest.raises(signals.Interrupted) as stopped:
        results.run("a row", [], str(tmp_path), float("inf"))
    assert stopped.value.code == 128 + signum
    assert (row / "told").exists()


def test_a_row_whose_time_is_up_before_it_listens_has_not_failed(row, tmp_path, capsys):
    results.run("a row", [], str(tmp_path), 0)
    assert "no epoch is done yet" in capsys.readouterr().out


@pytest.fixture
def ablation_runs(tmp_path, monkeypatch):
    """The runs of a small ablation, of which two are done; its own table is an old one, of fewer."""
    monkeypatch.setattr(results, "KEPT", tmp_path / "kept")
    results.KEPT.mkdir()
    logs = tmp_path / "logs"
    runs = results.ablation.asked(
        ["-datasets", "Digits", "-seeds", "1", "-max_epoch", "3", "-log_dir_prefix", str(logs)]
    )
    for configs in list(runs.values())[:2]:
        finish(configs[0])
    (logs / "ablation.md").write_text("an old table")
    return runs


def finish(run):
    """Leaves what a run leaves that is done."""
    hardware = {"devices": ["0 cpu"], "machine": "two cores", "versions": {"jax": "1"}}
    figures = {"epochs": 3, "best": {"test_accuracy": 0.5}, "last": {"test_accuracy": 0.4}, "finished": True}
    result = {"settings": dataclasses.asdict(run), "seconds": 90.0, **figures, **hardware}
    result["samples"] = {"train": 60000, "test": 10000}
    run.run_dir.mkdir(parents=True)
    (run.run_dir / "result.json").write_text(json.dumps(result))
    (run.run_dir / "metrics.jsonl").write_text("")


def test_of_an_ablation_the_table_of_the_runs_that_are_done_is_kept(ablation_runs):
    results.keep_ablation(ablation_runs)
    kept = json.loads((results.KEPT / "ablation.json").read_text())
    section = results._section("ablation", "what", kept, {})
    assert "| Digits | PLIF, tau0 = 16 | - | 50.00 | 40.00 | 1 | 3 |" in section and "an old table" not in section
    assert "2 runs, 3 minutes in all: cpu x 1; two cores; JAX 1." in section
    assert f"python experiments/{' '.join(results.ROWS['ablation'][:2])}\n" in section
    assert (results.KEPT / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_of_fewer_runs_replaces_none_of_more(ablation_runs, capsys):
    path = results.KEPT / "ablation.json"
    for kept, said in ((3, "a table of 3 runs is kept, this had 2"), (2, "")):
        path.write_text(json.dumps({"runs": kept}))
        results.keep_ablation(ablation_runs)
        assert said in capsys.readouterr().out
        assert ("table" in json.loads(path.read_text())) == (not said)


def test_an_ablation_of_which_nothing_is_done_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "KEPT", tmp_path)
    flags = ["-datasets", "Digits", "-log_dir_prefix", str(tmp_path / "logs")]
    results.keep_ablation(results.ablation.asked(flags))
    assert capsys.readouterr().out == "ablation: no run is done yet\n" and not list(tmp_path.iterdir())


def test_the_row_of_the_ablation_names_its_runs(tmp_path, monkeypatch):
    """What is kept is asked for with the command's own flags."""
    kept = []
    monkeypatch.setattr(results, "keep_ablation", kept.append)
    monkeypatch.setattr(results, "write_page", lambda: None)
    monkeypatch.setattr(results.data, "load", lambda settings: None)
    results.run("ablation", [], str(tmp_path), 0)
    (runs,) = kept
    assert [run.seed for run in runs["Digits", "LIF, tau = 2"]] == [2020, 2021, 2022]
    assert runs["Digits", "LIF, tau = 2"][0].run_dir.parent == tmp_path / "ablation" / "seed_2020"


@pytest.fixture
def keep_digits(tmp_path, monkeypatch):
    """Keeps the figures of a made-up run of seven epochs, and returns them as kept."""
    monkeypatch.setattr(results, "KEPT", tmp_path / "kept")
    config = Config(dataset_name="Digits", log_dir_prefix=str(tmp_path))
    config.run_dir.mkdir(parents=True)
    points = [{"tag": "test_accuracy", "step": epoch, "value": epoch / 10, "time": 0.0} for epoch in range(7)]
    (config.run_dir / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    figures = dict.fromkeys(results.FIGURES, 1) | {"samples": {"train": 4}, "epochs": 7, "best": {"test_accuracy": 0.6}}

    def keep(**more):
        (config.run_dir / "result.json").write_text(json.dumps(figures | more))
        results.keep("digits", config)
        return json.loads((results.KEPT / "digits.json").read_text())

    return keep


def test_after_an_epoch_is_the_curve_s_point_before(keep_digits):
    assert keep_digits()["after"] == {"1": 0.0, "5": 0.4}


def test_a_run_of_as_many_epochs_takes_a_row_s_place(keep_digits):
    keep_digits(seconds=1)
    assert keep_digits(seconds=2)["seconds"] == 2


def test_damaged_figures_are_named_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "KEPT", tmp_path)
    monkeypatch.setattr(results.subprocess, "Popen", lambda *_, **__: pytest.fail("trained"))
    (tmp_path / "digits.json").write_text("{")
    with pytest.raises(UserError, match=r"digits\.json is damaged"):
        results.run("digits", [], str(tmp_path), float("inf"))
