"""What a run does at the end of an epoch, at its middle, and after it was stopped there."""

import dataclasses
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from runs import pretend_epoch

from plif_jax.errors import UserError
from plif_jax.training import loop, report, signals
from plif_jax.training.logs import read_metrics

pytestmark = pytest.mark.xdist_group("training")  # with the tests that share `whole`


def test_a_package_that_one_of_two_places_lacks_is_told():
    here = {"devices": ["cpu:0 cpu"], "machine": "x86_64, 2 cores", "versions": {"jax": "1"}}
    there = here | {"versions": {"jax": "1", "tonic": "2"}}
    assert report.differences(here, there) == ["tonic 2, was none"]
    assert report.differences(there, here) == ["tonic none, was 2"]


@pytest.mark.parametrize("end", [MemoryError, signals.Interrupted])
def test_an_epoch_that_ended_early_and_went_on_has_the_figures_of_all_its_steps(whole, tmp_path, monkeypatch, end):
    config, account = dataclasses.replace(whole[0], log_dir_prefix=str(tmp_path)), loop.Run._account

    def ending(run, first, *arguments):
        if first == 8 and end is MemoryError:
            raise end
        if first == 7 and end is signals.Interrupted:
            os.kill(os.getpid(), signal.SIGTERM)
        return account(run, first, *arguments)

    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", 0 if end is MemoryError else 600)
    with monkeypatch.context() as early, pytest.raises(end):
        early.setattr(loop.Run, "_account", ending)
        loop.train(config, say=None)
    assert loop.train(config, say=None)["last"] == whole[1]["last"]


def test_after_a_save_the_clock_of_the_next_begins_anew(monkeypatch):
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: 700.0))
    checkpoints = SimpleNamespace(save=lambda *_: None)
    run = SimpleNamespace(progress={}, started=0.0, saved=0.0, main=False, state=None, checkpoints=checkpoints)
    loop.Run._save(run, -1.0)
    assert run.saved == 700 and run.progress["seconds"] == 700


def test_a_step_that_fails_in_a_later_epoch_is_told(settings, tmp_path, monkeypatch):
    account = loop.Run._account

    def failing(run, first, size, metrics, index):
        metrics |= {"healthy": np.arange(first, first + size) != 7}
        return account(run, first, size, metrics, index)

    monkeypatch.setattr(loop.Run, "_account", failing)
    with pytest.raises(UserError, match=r"^epoch 2, step 7: the loss is not finite"):
        loop.train(settings(log_dir_prefix=str(tmp_path), steps_per_call=5), say=None)


def test_lost_weights_are_not_saved_in_mid_epoch_either(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", -1)
    config = settings(log_dir_prefix=str(tmp_path), learning_rate=1e38, batch_size=40)
    with pytest.raises(UserError, match="after the update is not finite"):
        loop.train(config, say=None)
    assert not list(config.checkpoint_dir.glob("[0-9]*"))


def test_every_second_epoch_is_tested_and_the_last(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Run, "train_epoch", lambda run, epoch: pretend_epoch(run))
    monkeypatch.setattr(loop.Run, "accuracy", lambda run, name: 0.5)
    config = settings(log_dir_prefix=str(tmp_path), eval_every=2, max_epoch=5)
    assert loop.train(config, say=None)["last"]["epoch"] == 5
    assert [step for step, _ in read_metrics(config.run_dir)["test_accuracy"]] == [1, 3, 4]


def test_a_run_that_is_to_stop_compiles_no_other_program(settings, tmp_path, monkeypatch):
    account, said = loop.Run._account, []

    def signalled(run, first, *arguments):
        if first == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return account(run, first, *arguments)

    monkeypatch.setattr(loop.Run, "_account", signalled)
    with pytest.raises(signals.Interrupted):
        loop.train(settings(log_dir_prefix=str(tmp_path), steps_per_call=2), say=said.append)
    assert "SIGTERM at step 4; saved" in said[-1]


@pytest.mark.parametrize("val_ratio, letter, chosen", [(None, "A", "test"), (0.15, "B", "validation")])
def test_a_result_says_which_accuracy_it_is(settings, tmp_path, monkeypatch, val_ratio, letter, chosen):
    monkeypatch.setattr(loop.Run, "train_epoch", lambda run, epoch: pretend_epoch(run))
    monkeypatch.setattr(loop.Run, "accuracy", lambda run, name: 0.5)
    config, said = settings(log_dir_prefix=str(tmp_path), train_samples=80, val_ratio=val_ratio, max_epoch=1), []
    assert loop.train(config, say=said.append)["protocol"] == f"accuracy-{letter}"
    assert any(line.endswith(f"in epoch 1, chosen by {chosen} accuracy") for line in said)
