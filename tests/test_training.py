"""Training as a whole program, at small size: what it writes, stopping and continuing, devices, refusals."""

import dataclasses
import fcntl
import json
import os
import shutil
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import arrays, assert_same_run, pretend_epoch, tensorboard

from plif_jax import data
from plif_jax.data import batches
from plif_jax.errors import UserError
from plif_jax.training import checkpoint, loop, report, signals, state, step
from plif_jax.training.logs import read_metrics

pytestmark = pytest.mark.xdist_group("training")  # one worker: most begin from one run, `whole`


def test_a_run_writes_what_it_found(whole):
    config, result = whole
    folder = config.run_dir
    assert {path.name for path in folder.iterdir()} > {"config.json", "result.json", "summary.png", "metrics.jsonl"}
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["epochs"] == 2 and result["samples"] == {"train": 40, "test": 20}
    assert result["settings"]["init_tau"] == 2.0 and result["versions"]["jax"] == jax.__version__
    assert set(result["tau_before"].values()) == {2.0} and set(result["tau"].values()) != {2.0}

    metrics = read_metrics(folder)
    assert set(metrics) == {"train_accuracy", "train_loss", "test_accuracy", "w0", "w1", "w2"}
    assert [at for at, _ in metrics["train_loss"]] == [0]  # every 256 steps, and there are 10
    assert [at for at, _ in metrics["test_accuracy"]] == [0, 1]  # at the epoch
    assert [at for at, _ in metrics["w0"]] == [5, 10]  # after each epoch, at the step
    assert metrics["test_accuracy"][-1][1] == result["last"]["test_accuracy"]
    tau = 1 + np.exp(-metrics["w0"][-1][1])
    np.testing.assert_allclose(tau, result["tau"]["conv.2"], rtol=1e-6)
    assert {tag: [at for at, _ in points] for tag, points in tensorboard(folder).items()} == {
        tag: [at for at, _ in points] for tag, points in metrics.items()
    }


def test_a_data_set_of_ones_own_is_trained_on(settings, tmp_path):
    config = settings(log_dir_prefix=str(tmp_path), max_epoch=1, train_samples=None, test_samples=None)
    whole, halves = data.load(config), (slice(0, 40, 2), slice(1, 40, 2))
    fold = [dataclasses.replace(whole.test, x=whole.test.x[half], y=whole.test.y[half]) for half in halves]
    one, two = (dataclasses.replace(whole, train=fold[i], test=fold[1 - i]) for i in (0, 1))
    assert loop.train(config, say=None, dataset=one)["samples"] == {"train": 20, "test": 20}
    with pytest.raises(UserError, match="holds a run on other data: the samples of train are others; the samples of"):
        loop.train(config, say=None, dataset=two)


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(report, "PACKAGES", ("jax", "no-such-package"))
    assert report._versions() == {"jax": jax.__version__}


def copied(config, folder):
    """The same run once more, in another folder."""
    shutil.copytree(config.log_dir_prefix, folder, dirs_exist_ok=True)
    return dataclasses.replace(config, log_dir_prefix=str(folder))


def test_a_finished_run_says_so_and_a_larger_max_epoch_is_the_uninterrupted_run(settings, whole, tmp_path, monkeypatch):
    config, said = settings(log_dir_prefix=str(tmp_path)), []
    short = dataclasses.replace(config, max_epoch=1)
    result = loop.train(short, say=lambda line: None)
    (config.run_dir / "result.json").unlink()
    with monkeypatch.context() as elsewhere:  # whose figures these are not
        elsewhere.setattr(report.os, "cpu_count", lambda: 1024)
        assert loop.train(short, say=said.append) == result
    assert any("finished already: 1 epochs are done; a larger -max_epoch trains on" in line for line in said)
    assert json.loads((config.run_dir / "result.json").read_text()) == result and result["finished"]
    monkeypatch.setattr(report.os, "cpu_count", lambda: 1024)
    assert loop.train(config, say=said.append)["machine"].endswith("1024 cores")
    (line,) = [line for line in said if line.startswith("elsewhere than before")]
    assert "cores, was " in line and "1024" in line
    assert_same_run(config, whole[0])


def test_a_setting_without_effect_is_told(settings, tmp_path):
    said = []
    loop.train(settings(log_dir_prefix=str(tmp_path), max_epoch=1, cifar10dvs_split="tebn"), say=said.append)
    assert "-cifar10dvs_split tebn has no effect: Digits does not use it" in said


def test_a_run_may_be_silent(settings, tmp_path, capfd):
    loop.train(settings(log_dir_prefix=str(tmp_path), max_epoch=1), say=None)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_in_mid_epoch_and_the_run_continues(settings, whole, tmp_path, signum):
    config, said = settings(log_dir_prefix=str(tmp_path)), []

    def say(line):
        said.append(line)
        if line.startswith("epoch    1"):
            os.kill(os.getpid(), signum)

    with pytest.raises(signals.Interrupted) as interrupted:
        loop.train(config, say=say)
    assert interrupted.value.code == 128 + signum
    assert "saved: the same command continues" in said[-1]
    assert "step 10" not in said[-1] and "step 5" not in said[-1]  # in the middle of epoch 2
    loop.train(config, say=lambda line: None)
    assert_same_run(config, whole[0])


def test_several_steps_in_one_call_are_the_same_training(settings, whole, tmp_path):
    config = settings(log_dir_prefix=str(tmp_path), steps_per_call=2)
    loop.train(config, say=lambda line: None)
    for (name, mine), theirs in zip(arrays(config).items(), arrays(whole[0]).values(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5, err_msg=name)
    assert len(read_metrics(config.run_dir)["train_loss"]) == 1


def test_a_long_epoch_is_saved_in_its_middle(whole, tmp_path, monkeypatch):
    """What dies in step 9 of 10 goes on from step 8."""
    config = dataclasses.replace(whole[0], log_dir_prefix=str(tmp_path))
    account = loop.Run._account

    def die(run, first, *arguments):
        if first == 8:
            raise MemoryError
        return account(run, first, *arguments)

    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", 0)
    with monkeypatch.context() as dying, pytest.raises(MemoryError):
        dying.setattr(loop.Run, "_account", die)
        loop.train(config, say=lambda line: None)
    said = []
    loop.train(config, say=said.append)
    assert "continuing after epoch 1, step 8" in said
    assert_same_run(config, whole[0])


def test_a_run_goes_on_with_other_steps_per_call_where_it_was_stopped(monkeypatch):
    for steps, K in [(5, 1), (5, 2), (6, 3), (7, 32)]:
        monkeypatch.setattr(loop, "steps_per_call", lambda config, chosen, K=K: K)
        run = SimpleNamespace(config=SimpleNamespace(steps_per_call=K), devices=None, steps_per_epoch=steps)
        whole = np.cumsum(loop.Run.call_sizes(run, 0))
        for done in range(steps + 1):
            ends = done + np.cumsum(loop.Run.call_sizes(run, done))
            assert ends.tolist() == [end for end in whole if end > done]


@pytest.mark.parametrize(
    "steps, platform, sizes",
    [(3750, "gpu", {30}), (3125, "gpu", {25}), (73, "gpu", {32, 1}), (5, "gpu", {1}), (73, "cpu", {1})],
)
def test_calls_are_alike_where_the_steps_can_be_cut_so(settings, steps, platform, sizes):
    device = SimpleNamespace(platform=platform)
    run = SimpleNamespace(config=settings(), devices=[device], steps_per_epoch=steps)
    found = loop.Run.call_sizes(run, 0)
    assert set(found) == sizes and sum(found) == steps


def test_bfloat16_trains_float32_weights(settings, tmp_path):
    """The whole program, its neurons firing from the start."""
    config = settings(precision="bfloat16", max_epoch=1, init_tau=1.1, log_dir_prefix=str(tmp_path))
    loop.train(config, say=lambda line: None)
    _, net = checkpoint.load_network(config.run_dir)
    before, after = (net.conv[0].kernel[...] for net in (state.network(config), net))
    assert after.dtype == jnp.float32 and (after != before).all()


@pytest.mark.parametrize("K", [1, 32])
def test_every_256th_step_is_logged(K):
    logged, index = [], np.zeros((608, 8), int)
    run = SimpleNamespace(main=True, logs=SimpleNamespace(add=lambda *point: logged.append(point)))
    for first in range(600, 600 + 608, K):
        at = np.arange(first, first + K)
        metrics = {"loss": at / 10, "accuracy": at / 1000, "healthy": np.ones(K, bool), "asked": 0}
        sums = loop.Run._account(run, first, K, metrics, index)
        np.testing.assert_allclose(sums, [at.sum() / 10, at.sum() / 1000])
    expected = [("train_accuracy", 0.768, 768), ("train_loss", 76.8, 768)]
    assert logged == [*expected, ("train_accuracy", 1.024, 1024), ("train_loss", 102.4, 1024)]


@pytest.mark.parametrize("val_ratio, chosen_by", [(None, "test_accuracy"), (0.15, "val_accuracy")])
def test_of_equal_epochs_the_later_is_best(settings, tmp_path, monkeypatch, val_ratio, chosen_by):
    config = settings(log_dir_prefix=str(tmp_path), max_epoch=4, train_samples=80, val_ratio=val_ratio)
    scores = {"test": iter([0.5, 0.7, 0.6, 0.1]), "val": iter([0.2, 0.9, 0.9, 0.3])}
    monkeypatch.setattr(loop.Run, "train_epoch", lambda run, epoch: pretend_epoch(run))
    monkeypatch.setattr(loop.Run, "accuracy", lambda run, name: next(scores[name]))
    result = loop.train(config, say=lambda line: None)
    expected = {"test_accuracy": (2, 0.7), "val_accuracy": (3, 0.6)}[chosen_by]
    assert (result["best"]["epoch"], result["best"]["test_accuracy"]) == expected
    assert result["last"]["epoch"] == 4 and result["last"]["test_accuracy"] == 0.1
    assert ("val_accuracy" in read_metrics(config.run_dir)) == (val_ratio is not None)
    kept = sorted(int(path.name) for path in config.checkpoint_dir.glob("[0-9]*"))
    steps = result["samples"]["train"] // 8
    assert {expected[0] * steps, 3 * steps, 4 * steps} <= set(kept)  # the best and the last two


def test_the_accuracy_of_validation_is_of_the_part_held_back(settings, tmp_path):
    """Every sample of it once, as it is stored."""
    learning = {"init_tau": 1.1, "learning_rate": 0.02, "channels": 4, "max_epoch": 3}
    config = settings(log_dir_prefix=str(tmp_path), train_samples=100, val_ratio=0.15, **learning)
    said = []
    result = loop.train(config, say=said.append)
    assert f"(best val {result['best']['val_accuracy']:.2%})" in "".join(said)
    dataset = data.load(config, progress=False)
    part = batches.partition(config, dataset)["val"]
    _, net = checkpoint.load_network(config.run_dir)
    x, y = dataset.train.x[part.index], dataset.train.y[part.index]
    right = net(step.frames_for(config, jnp.asarray(x))).argmax(-1) == y
    assert 0.2 < right.mean() < 1  # of other samples it would be another
    assert len(y) == result["samples"]["val"] and result["best"]["val_accuracy"] == pytest.approx(right.mean())


def test_a_signal_in_an_evaluation_is_answered_there_and_the_run_continues(settings, whole, tmp_path, monkeypatch):
    config, count, calls = settings(log_dir_prefix=str(tmp_path)), loop.evaluation_calls, []

    def signalled(*given):
        calls.append(given)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return count(*given)

    monkeypatch.setattr(loop, "evaluation_calls", signalled)
    said = []
    with pytest.raises(signals.Interrupted):
        loop.train(config, say=said.append)
    assert "SIGTERM at step 5; saved" in said[-1]
    loop.train(config, say=lambda line: None)
    assert_same_run(config, whole[0])


def test_the_rate_of_training_leaves_out_the_call_that_compiles(settings, tmp_path, monkeypatch):
    """And is that of the whole run, not of what was trained last."""
    clock = iter(np.arange(0.0, 1e6))
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(clock), time=loop.time.time))
    config = settings(log_dir_prefix=str(tmp_path), max_epoch=1)
    loop.train(config, say=lambda line: None)
    progress = json.loads(next(config.checkpoint_dir.glob("5/record/*")).read_text())["progress"]
    assert progress["steps_timed"] == 4
    result = loop.train(dataclasses.replace(config, max_epoch=2), say=lambda line: None)
    progress = json.loads(next(config.checkpoint_dir.glob("10/record/*")).read_text())["progress"]
    assert progress["steps_timed"] == 8  # each program compiles
    assert result["samples_per_second"] == pytest.approx(8 * 8 / progress["seconds_timed"])
    monkeypatch.setattr(report.os, "cpu_count", lambda: 1024)
    loop.train(dataclasses.replace(config, max_epoch=3), say=lambda line: None)
    progress = json.loads(next(config.checkpoint_dir.glob("15/record/*")).read_text())["progress"]
    assert progress["steps_timed"] == 4  # of the other machine these alone


def test_each_number_of_steps_per_call_compiles(settings, tmp_path):
    config = settings(log_dir_prefix=str(tmp_path), steps_per_call=2)
    loop.train(config, say=lambda line: None)
    progress = [
        json.loads(next(config.checkpoint_dir.glob(f"{step}/record/*")).read_text())["progress"] for step in (5, 10)
    ]
    assert [p["steps_timed"] for p in progress] == [2, 7]  # of 2, 2 and 1 the first 2 and the 1 compile


@pytest.mark.parametrize(
    "batch_size, what",
    [
        (8, r"step \d+: the (output|gradient) of \S+"),
        (40, r"step 0: the norm of the weights of \S+\.\d after the update"),
    ],
)
def test_a_run_that_diverges_stops_before_anything_is_saved(settings, tmp_path, batch_size, what):
    """Also in the last step of an epoch, whose weights no other step would look at."""
    config = settings(log_dir_prefix=str(tmp_path), learning_rate=1e38, batch_size=batch_size)
    with pytest.raises(UserError, match=f"epoch 1, {what} is not finite"):
        loop.train(config, say=lambda line: None)
    assert not list(config.checkpoint_dir.glob("[0-9]*")) and "test_accuracy" not in read_metrics(config.run_dir)


def test_other_settings_are_refused_by_name(settings, whole):
    """And of them alone: how far to train, how often to test and how to dispatch may change."""
    other = dataclasses.replace(whole[0], batch_size=4, seed=1, max_epoch=3, eval_every=2, steps_per_call=1)
    with pytest.raises(UserError, match=r"settings: batch_size was 8, is 4; seed was 2020, is 1\. Give"):
        loop.train(other, say=lambda line: None)


def test_a_run_that_cannot_begin_leaves_nothing(settings, tmp_path):
    config = settings(log_dir_prefix=str(tmp_path), val_ratio=0.15, train_samples=20)
    with pytest.raises(UserError, match=r"has no sample for val: give -train_samples 70 or more, or a larger"):
        loop.train(config, say=lambda line: None)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_told_before_the_data_are_prepared(settings, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(loop.data, "load", lambda *_, **__: pytest.fail("the data were loaded"))
    with pytest.raises(UserError, match=r"-log_dir_prefix .*file/logs cannot be written: Not a directory"):
        loop.train(settings(log_dir_prefix=str(tmp_path / "file" / "logs")), say=lambda line: None)


def test_what_is_learned_is_told_and_nothing_else(settings, tmp_path):
    said, learned = [], {}
    for lif in (False, True):
        config = settings(use_plif=not lif, alpha_learnable=not lif, log_dir_prefix=str(tmp_path), max_epoch=1)
        said.append([])
        learned[lif] = loop.train(config, say=said[-1].append)["alpha"]
    assert "of these are used: 40 train, 20 test" in said[0]
    assert list(learned[False]) == ["conv.2", "fc.3", "fc.6"] and learned[True] == {}
    for name, alpha in learned[False].items():
        assert f"  alpha  {name:<8} {alpha:.3f}" in said[0]
    assert sum("tau  " in line or "  tau " in line for line in said[0]) == 4  # of the epoch, and of each layer
    assert not any("  tau " in line or "  alpha " in line for line in said[1])


def test_other_data_are_refused(whole, monkeypatch):
    """-data_root may change, what is found there may not."""
    config, dataset = whole[0], data.load(whole[0], progress=False)
    train = dataclasses.replace(dataset.train, x=dataset.train.x[::-1])
    test = dataclasses.replace(dataset.test, x=dataset.test.x[:19], y=dataset.test.y[:19])
    monkeypatch.setattr(loop.data, "load", lambda *_, **__: dataclasses.replace(dataset, train=train, test=test))
    with pytest.raises(UserError, match="other data: the samples of train are others; test has 19 samples, had 20"):
        loop.train(config, say=lambda line: None)


def test_a_run_that_was_never_tested_says_so(settings, tmp_path, monkeypatch, capsys):
    """Stopped before the first evaluation, and then given a -max_epoch that it has passed."""

    def two_epochs(run, epoch):
        if epoch == 2:
            raise signals.Interrupted(signal.SIGTERM)
        return pretend_epoch(run)

    monkeypatch.setattr(loop.Run, "train_epoch", two_epochs)
    config, said = settings(log_dir_prefix=str(tmp_path), eval_every=5, max_epoch=10), []
    with pytest.raises(signals.Interrupted):
        loop.train(config, say=lambda line: None)
    assert loop.train(dataclasses.replace(config, max_epoch=1), say=said.append)["best"] is None
    assert any("no epoch was tested: 2 are done, -eval_every is 5" in line for line in said)
    checkpoint.load_network(config.run_dir)
    assert "no checkpoint that is left was tested, so none is the best" in capsys.readouterr().out


def test_a_signal_while_the_last_checkpoint_is_written_waits_for_it(settings, tmp_path, monkeypatch):
    leave = checkpoint.Checkpoints.__exit__

    def leave_asked_to_stop(checkpoints, *error):
        os.kill(os.getpid(), signal.SIGINT)
        return leave(checkpoints, *error)

    monkeypatch.setattr(checkpoint.Checkpoints, "__exit__", leave_asked_to_stop)
    monkeypatch.setattr(loop.Run, "train_epoch", lambda run, epoch: pretend_epoch(run))
    config = settings(log_dir_prefix=str(tmp_path), eval_every=5, max_epoch=1)
    monkeypatch.setattr(loop.Run, "accuracy", lambda run, name: 0.5)
    assert loop.train(config, say=lambda line: None)["finished"]
    assert (config.checkpoint_dir / "5").exists()


def test_a_second_program_in_the_same_folder_stops(settings, tmp_path):
    config = settings(log_dir_prefix=str(tmp_path))
    config.checkpoint_dir.mkdir(parents=True)
    with (config.checkpoint_dir / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another program is training in"):
            loop.train(config, say=lambda line: None)


@pytest.mark.parametrize("damage", ["truncated", "emptied", "flipped", "record"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(whole, tmp_path, damage):
    config, said = copied(whole[0], tmp_path), []
    latest = config.checkpoint_dir / "10"
    files = [p for p in latest.rglob("*") if p.is_file() and p.stat().st_size > 1000 and "record" not in p.parts]
    if damage == "record":
        files = [latest / "record" / "metadata"]
    for path in files:
        raw = path.read_bytes()
        middle = len(raw) // 2
        path.write_bytes(
            {"truncated": raw[:middle], "emptied": b"", "record": raw[:middle]}.get(
                damage, raw[:middle] + bytes([raw[middle] ^ 16]) + raw[middle + 1 :]
            )
        )
    loop.train(config, say=said.append)
    assert any("checkpoint of step 10 is damaged" in line and "using that of step 5" in line for line in said)
    assert any("continuing after epoch 1, step 5" in line for line in said)
    assert_same_run(config, whole[0])


def test_without_any_checkpoint_a_run_begins_anew_and_keeps_the_old_curves(whole, tmp_path):
    config, said = copied(whole[0], tmp_path), []
    curves = (config.run_dir / "metrics.jsonl").read_bytes()
    for step_dir in config.checkpoint_dir.glob("[0-9]*"):
        (step_dir / "record" / "metadata").write_bytes(b"")
    loop.train(config, say=said.append)
    assert any("holds no other checkpoint: the training begins anew" in line for line in said)
    assert any("the curves of the run before are kept in" in line for line in said)
    assert (config.run_dir / "metrics_1.jsonl").read_bytes() == curves
    assert_same_run(config, whole[0])
