"""A run that is killed at any moment and started again is the run that never was; and how it ends when asked."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from programs import SETTINGS, saved, started, wait_for
from runs import assert_same_run

from plif_jax.config import Config
from plif_jax.errors import UserError
from plif_jax.training import loop, signals

pytestmark = pytest.mark.xdist_group("kills")  # one worker: all compare with one run that nothing interrupts


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """For what programs say, and for logs where they do not matter."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def whole(shared):
    """The settings of a run that nothing interrupted."""
    settings = SETTINGS | {"log_dir_prefix": str(shared / "logs"), "max_epoch": 8}
    config = Config(**settings, device="cpu:0")
    with started(config, folder=shared) as program:
        assert program.end() == 0, program.said()
    return config


def survive(config, folder, kills, chance):
    """Starts the run again and again and kills it, at moments drawn by `chance`; says what it was doing each time."""
    doing = []
    while True:
        with started(config, folder=folder) as program:
            begun, already, at = len(program.said()), saved(config), time.time()
            if len(doing) == kills:
                assert program.end() == 0, program.said()
                return doing
            conditions = {
                "starting": lambda: True,
                "training": partial(_has_saved_more, config, already),
                "writing": partial(_is_writing, config, at),
            }
            aim = chance.choice(list(conditions))
            wait_for(partial(_holds_or_ended, conditions[aim], program))
            time.sleep(chance.uniform(0, {"starting": 5, "training": 0.5, "writing": 0.05}[aim]))
            ended = program.process.poll()
            assert ended in (None, 0), program.said()
            program.kill()
            program.process.wait()
            doing.append(_moment(config, program.said()[begun:], at, ended))


def _has_saved_more(config, already):
    return len(set(saved(config)) - set(already)) > 0


def _is_writing(config, since):
    """Whether there is an unfinished checkpoint younger than `since`."""
    for path in config.checkpoint_dir.glob("*tmp*"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime > since:
                return True
    return False


def _holds_or_ended(condition, program):
    return condition() or program.process.poll() is not None


def _moment(config, said, since, ended):
    """What a program was doing when it was killed, as far as its folder tells."""
    if ended == 0:
        return "finished"
    if _is_writing(config, since):
        return "writing a checkpoint"
    if "epoch" in said:
        return "training or evaluating"
    return "compiling" if "Digits train" in said else "importing or preparing data"


def test_killed_three_times(whole, shared, tmp_path):
    """The cache is empty too, so that the first kill may come in the preparation of the data."""
    settings = {"log_dir_prefix": str(tmp_path / "logs"), "cache_dir": str(tmp_path / "cache")}
    config = Config(**vars(whole) | settings)
    survive(config, shared, 3, random.Random(3))
    assert_same_run(config, whole)


@pytest.mark.faults
def test_killed_many_times(whole, shared, tmp_path, capsys):
    runs, doing, chance = 0, [], random.Random(7)
    while len(doing) < 36:
        settings = {"log_dir_prefix": str(tmp_path / f"logs{runs}"), "cache_dir": str(tmp_path / f"cache{runs}")}
        config = Config(**vars(whole) | settings)
        doing += survive(config, shared, 6, chance)
        assert_same_run(config, whole)
        runs += 1
    with capsys.disabled():
        tally = {moment: doing.count(moment) for moment in sorted(set(doing))}
        print(f"\n{len(doing)} kills in {runs} runs, each the same to the bit: {tally}")


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_answered_by_saving_and_its_exit_status(whole, shared, tmp_path, signum, code):
    config = Config(**vars(whole) | {"log_dir_prefix": str(tmp_path), "max_epoch": 10_000})
    with started(config, folder=shared) as program:
        wait_for(lambda: 5 in saved(config))
        program.process.send_signal(signum)
        assert program.end() == code
    assert f"stopped by {signum.name} at step {max(saved(config))}; saved: the same command continues" in program.said()


def test_a_second_signal_ends_a_busy_program_at_once_unless_it_is_the_same_wish():
    """Busy as in a long compilation: in one call, from which the interpreter does not return to its handlers."""
    script = """
import hashlib
from plif_jax.training import signals
with signals.listening():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""
    with subprocess.Popen(
        [os.sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    ) as program:
        try:
            program.stdout.readline()
            for _ in range(2):  # as from `timeout`, which signals its child and then the group
                program.send_signal(signal.SIGINT)
                time.sleep(0.2)
            assert program.poll() is None
            time.sleep(signals.SAME_WISH_SECONDS)
            program.send_signal(signal.SIGINT)
            assert program.wait(20) == 130
        finally:
            program.kill()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 32 MB."""
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", tmp_path], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a small disk needs root")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.mark.parametrize(
    "room, says",
    [(0, "No space left on device"), (200_000, "a checkpoint could not be written .* is of step")],
)
def test_a_full_disk_keeps_the_last_checkpoint(whole, small_disk, room, says):
    """With room for nothing, and with room for the curves alone."""
    config, ballast = Config(**vars(whole) | {"log_dir_prefix": str(small_disk)}), small_disk / "ballast"

    def say(line):
        if line.startswith("epoch    3"):
            with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
                while True:
                    file.write(bytes(4096))
            os.truncate(ballast, ballast.stat().st_size - room)

    with pytest.raises(UserError, match=says) as refused:
        loop.train(config, say=say)
    assert "\n" not in str(refused.value)
    assert max(saved(config)) >= 10
    ballast.unlink()
    said = []
    loop.train(config, say=said.append)
    assert any(line.startswith("continuing after epoch") for line in said)
    assert_same_run(config, whole)


def test_who_was_told_of_signals_before_a_run_is_told_again_after_it():
    arrivals, arriving = os.pipe()
    os.set_blocking(arriving, False)
    before = signal.set_wakeup_fd(arriving)
    with signals.listening():
        pass
    assert signal.set_wakeup_fd(before) == arriving
    os.close(arrivals), os.close(arriving)


def test_a_second_signal_does_not_end_the_writing_of_what_is_finished():
    written = []
    with pytest.raises(SystemExit), signals.ending():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            written.append(1)
    assert written


def test_a_wish_is_the_same_for_a_second_after_it_was_first_told(monkeypatch):
    moments = iter([10.0, 10.0, 10.9, 10.9, 11.1, 11.1])
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: next(moments)))
    monkeypatch.setattr(signals.os, "_exit", sys.exit)
    arrivals, arriving = os.pipe()
    os.write(arriving, bytes([signal.SIGTERM] * 3))
    os.close(arriving)
    with pytest.raises(SystemExit):
        signals.Stop()._watch(arrivals)
    os.close(arrivals)
