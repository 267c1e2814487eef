import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest

import ablation
from plif_jax.errors import UserError


def finish(config, best=0.9, epochs=None, samples=None):
    """Leaves what a finished run leaves."""
    epochs = epochs or config.max_epoch
    config.run_dir.mkdir(parents=True, exist_ok=True)
    points = [{"tag": "test_accuracy", "step": e, "value": best, "time": 0.0} for e in range(epochs)]
    points += [{"tag": "w0", "step": 5 * (e + 1), "value": 0.1 * e, "time": 0.0} for e in range(epochs)]
    (config.run_dir / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    result = {
        "epochs": epochs,
        "best": {"test_accuracy": best},
        "last": {"test_accuracy": best - 0.1},
        "settings": dataclasses.asdict(config),
        "samples": samples or {"train": 60000, "test": 10000},
    }
    (config.run_dir / "result.json").write_text(json.dumps(result))


@pytest.fixture
def flags(tmp_path):
    return ["-max_epoch", "3", "-log_dir_prefix", str(tmp_path / "logs")]


def test_the_plan_is_the_papers_five_settings(flags):
    runs = ablation.plan(["MNIST", "NMNIST"], [1, 2, 1], flags)
    assert len(runs) == 10 and {len(configs) for configs in runs.values()} == {2}
    chosen = {
        (c.use_plif, c.init_tau, c.use_max_pool) for (d, _), configs in runs.items() for c in configs if d == "MNIST"
    }
    assert chosen == {(p, tau, True) for p in (True, False) for tau in (2.0, 16.0)} | {(True, 2.0, False)}
    configs = [c for configs in runs.values() for c in configs]
    assert all(c.detach_reset and c.max_epoch == 3 for c in configs)
    assert len({c.run_dir for c in configs}) == 20
    assert {c.T for c in runs["NMNIST", "PLIF, tau0 = 2"]} == {10}


def test_what_sets_the_runs_apart_from_the_published_is_said(flags):
    assert ablation.notes(ablation.plan(["MNIST"], [1], [])) == []
    runs = ablation.plan(["MNIST", "NMNIST"], [1], [*flags, "-train_samples", "100", "-val_ratio", "0.15"])
    differing = ["train_samples is 100, theirs None", "max_epoch is 3, theirs 1024"]
    assert ablation.notes(runs) == [
        *(f"note: MNIST: {difference}" for difference in differing),
        *(f"note: NMNIST: {difference}" for difference in ["T is 10, theirs 20", *differing]),
    ]


@pytest.mark.parametrize("flag", ["-init_tau", "--use_plif", "-seed=3", "-seed"])
def test_what_the_ablation_sets_is_refused(flags, flag):
    with pytest.raises(UserError, match=r"the ablation sets it; choose with -datasets and -seeds"):
        ablation.main(["-datasets", "MNIST", *flags, flag, "3"])


def test_a_part_of_the_data_is_told_as_what_sets_runs_apart(flags):
    runs = ablation.plan(["MNIST"], [1, 2], flags)
    for run in runs["MNIST", "LIF, tau = 2"]:
        finish(run, samples={"train": 850, "val": 150, "test": 10000})
    assert "note: MNIST: of 60000 samples for training ours had 1000" in ablation.notes(runs)


def test_only_runs_with_these_settings_and_epochs_are_done(flags):
    run = ablation.plan(["MNIST"], [1], flags)["MNIST", "LIF, tau = 2"][0]
    assert ablation.finished(run) is None
    finish(run)
    assert ablation.finished(run)["epochs"] == 3
    assert ablation.finished(dataclasses.replace(run, max_epoch=4)) is None
    assert ablation.finished(dataclasses.replace(run, train_samples=9)) is None
    assert ablation.finished(dataclasses.replace(run, data_root="elsewhere"))
    path = run.run_dir / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"best": None}))  # -eval_every was more than -max_epoch
    assert ablation.finished(run) is None


def test_what_is_missing_is_trained_and_the_table_shows_it(flags, monkeypatch, capsys, tmp_path):
    runs = ablation.plan(["MNIST"], [1, 2], flags)
    for run in runs["MNIST", "PLIF, tau0 = 2"]:
        finish(run, best=0.9 + 0.01 * run.seed)
    trained = []
    monkeypatch.setattr(ablation, "train", lambda run: (trained.append(run), finish(run)))
    monkeypatch.setattr(ablation.data, "load", lambda run: None)
    ablation.main(["-datasets", "MNIST", "-seeds", "1", "2", *flags])
    assert len(trained) == 8 and not any(run.use_plif and run.init_tau == 2 and run.use_max_pool for run in trained)
    printed = capsys.readouterr().out
    assert "| MNIST | PLIF, tau0 = 2 | 99.72 | 91.50 ± 0.71 | 81.50 ± 0.71 | 2 | 3 |" in printed
    assert "| MNIST | LIF, tau = 16 | 99.49 | 90.00 ± 0.00 | 80.00 ± 0.00 | 2 | 3 |" in printed
    assert "\n\nnote: MNIST: max_epoch is 3, theirs 1024\n" in printed
    assert (tmp_path / "logs" / "ablation.md").read_text() in printed
    assert (tmp_path / "logs" / "ablation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"settings": 1}'])
def test_a_damaged_result_is_none(flags, content):
    (config,) = ablation.plan(["MNIST"], [1], flags)["MNIST", "LIF, tau = 2"]
    finish(config, 0.5)
    assert ablation.finished(config)
    (config.run_dir / "result.json").write_text(content)
    assert ablation.finished(config) is None


def test_a_failing_run_still_leaves_the_table(flags, monkeypatch, capsys):
    def fail(run):
        raise UserError("no data")

    monkeypatch.setattr(ablation, "train", fail)
    monkeypatch.setattr(ablation.data, "load", lambda run: None)
    with pytest.raises(UserError, match="no data"):
        ablation.main(["-datasets", "CIFAR10", *flags, "-val_ratio", "0.15"])
    printed = capsys.readouterr().out
    assert "| CIFAR10 | PLIF, tau0 = 2 | 92.58 | - | - | 0 | - |" in printed
    assert "| CIFAR10 | LIF, tau = 2 | - | - | - | 0 | - |" in printed


def test_a_table_of_nothing_replaces_none(flags, monkeypatch, tmp_path):
    def refuse(run):
        raise UserError("no data")

    monkeypatch.setattr(ablation.data, "load", refuse)
    logs = tmp_path / "logs"
    for there in ({}, {"ablation.md": "a table"}):
        for name, text in there.items():
            logs.mkdir()
            (logs / name).write_text(text)
        with pytest.raises(UserError, match="no data"):
            ablation.main(["-datasets", "MNIST", *flags])
        assert {path.name: path.read_text() for path in logs.glob("*")} == there


def test_a_folder_that_cannot_be_written_hides_no_refusal(flags, monkeypatch, tmp_path):
    def refuse(run):
        raise UserError("no data")

    monkeypatch.setattr(ablation.data, "load", refuse)
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(UserError, match="no data"):
        ablation.main(["-datasets", "MNIST", *flags])


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("during", ["the loading of data", "the training"])
def test_a_signal_that_training_does_not_hear_still_leaves_the_table(flags, monkeypatch, tmp_path, asked, during):
    runs = ablation.plan(["MNIST"], [1], flags)
    finish(runs["MNIST", "LIF, tau = 2"][0])

    def tell(run):
        os.kill(os.getpid(), asked)

    monkeypatch.setattr(ablation.data, "load", tell if during == "the loading of data" else lambda run: None)
    monkeypatch.setattr(ablation, "train", tell)
    before = signal.getsignal(signal.SIGTERM)
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # by a shell that starts the tests with &
    try:
        with pytest.raises(SystemExit if asked == signal.SIGTERM else KeyboardInterrupt) as ended:
            ablation.main(["-datasets", "MNIST", "-seeds", "1", *flags])
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert asked == signal.SIGINT or ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert "| MNIST | LIF, tau = 2 | 99.69 | 90.00 | 80.00 | 1 | 3 |" in (tmp_path / "logs/ablation.md").read_text()
    assert (tmp_path / "logs/ablation.png").exists()


def test_a_second_sigterm_does_not_end_the_writing(flags, monkeypatch, tmp_path):
    def tell(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    finish(ablation.plan(["MNIST"], [2020], flags)["MNIST", "LIF, tau = 2"][0])
    monkeypatch.setattr(ablation.data, "load", tell)
    monkeypatch.setattr(ablation, "draw", tell)
    with pytest.raises(SystemExit):
        ablation.main(["-datasets", "MNIST", *flags])
    assert (tmp_path / "logs/ablation.md").exists()


def test_data_that_are_not_there_are_missed_before_anything_is_trained(flags, monkeypatch, tmp_path):
    monkeypatch.setattr(ablation, "train", lambda run: pytest.fail("trained"))
    with pytest.raises(UserError, match="nowhere is not a folder"):
        ablation.main(["-datasets", "Digits", "NMNIST", *flags, "-data_root", "nowhere", "-cache_dir", str(tmp_path)])


def test_the_mean_of_seeds_reaches_as_far_as_all_of_them(flags):
    runs = ablation.plan(["MNIST"], [1, 2], flags)["MNIST", "LIF, tau = 2"]
    for run, epochs, best in zip(runs, (3, 5), (0.8, 0.9), strict=True):
        finish(run, best, epochs)
    assert ablation.mean_metrics(runs)["test_accuracy"] == [(epoch, pytest.approx(0.85)) for epoch in range(3)]


def test_the_settings_of_another_data_set_are_refused(flags):
    config = Path(__file__).parents[1] / "configs/nmnist.py"
    with pytest.raises(UserError, match="-config is for NMNIST, -datasets names MNIST; give the one or the other"):
        ablation.plan(["MNIST"], [1], ["-config", str(config), *flags])


def test_a_note_is_of_the_data_set_that_it_is_about(flags):
    runs = ablation.plan(["MNIST", "FashionMNIST"], [1], flags)
    finish(runs["MNIST", "LIF, tau = 2"][0], samples={"train": 1000, "test": 10000})
    notes = ablation.notes(runs)
    told = "of 60000 samples for training ours had 1000"
    assert f"note: MNIST: {told}" in notes and f"note: FashionMNIST: {told}" not in notes
