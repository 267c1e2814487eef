"""Several processes as one run: two programs of two virtual devices each, against one of four."""

import re
import signal
import time
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from programs import SETTINGS, as_processes, saved, started, wait_for
from runs import arrays, assert_same_run, tensorboard

from plif_jax.config import Config
from plif_jax.errors import UserError
from plif_jax.training import devices, distributed, loop
from plif_jax.training.logs import read_metrics


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """For what programs say."""
    return tmp_path_factory.mktemp("shared")


def joined(monkeypatch, environment=None, platforms="cpu", error=None, **flags):
    """What `join` asks of JAX in an environment, None where it does not; and what it says."""
    asked, said = [], []

    def initialize(**settings):
        asked.append({name: value for name, value in settings.items() if "timeout" not in name})
        if error is not None:
            raise error

    runtime = SimpleNamespace(initialize=initialize, is_initialized=lambda: False)
    jax_here = SimpleNamespace(distributed=runtime, config=SimpleNamespace(jax_platforms=platforms), devices=list)
    monkeypatch.setattr(distributed, "jax", jax_here)
    monkeypatch.setattr(distributed.os, "environ", environment or {})
    distributed.join(Config(dataset_name="Digits", **flags), said.append)
    return (asked or [None])[0], said


def test_processes_are_found_by_flags_slurm_and_tpu_pods(monkeypatch):
    find = partial(joined, monkeypatch)
    flags = {"coordinator": "host:9876", "num_processes": 2, "process_id": 1}
    assert find(**flags) == ({"coordinator_address": "host:9876", "num_processes": 2, "process_id": 1}, [])
    assert find() == (None, [])
    srun = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}
    assert find(srun) == ({}, [])
    assert find({"SLURM_NTASKS": "4"}) == (None, [])  # in the shell of salloc or sbatch
    assert find(srun | {"SLURM_STEP_NUM_TASKS": "1"}) == (None, [])
    # Google's TPU machines say nothing in the environment: JAX asks the metadata server.
    assert find(platforms="tpu,cpu") == ({}, [])
    assert find({"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu,cpu") == ({}, [])
    assert find({"TPU_WORKER_HOSTNAMES": "a,b"}, "cpu") == (None, [])
    assert find({"TPU_WORKER_HOSTNAMES": "localhost"}, "tpu,cpu") == (None, [])
    assert find({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, "tpu,cpu") == ({}, [])


def test_a_single_tpu_host_trains_alone(monkeypatch):
    find = partial(joined, monkeypatch, None, "tpu,cpu")
    for error in (ValueError("coordinator_address should be defined."), ConnectionError("metadata.google.internal")):
        _, said = find(error)
        assert "JAX finds no other hosts of this TPU" in said[0]
    assert find(RuntimeError("must be called before any JAX calls that")) == ({}, [])
    with pytest.raises(UserError, match="did not find each other: DEADLINE_EXCEEDED"):
        find(RuntimeError("DEADLINE_EXCEEDED"))
    with pytest.raises(UserError, match="no device starts, or another process is gone: Unable to initialize backend"):
        find(RuntimeError("Unable to initialize backend 'bogus'"))
    with pytest.raises(
        UserError, match=r"Failed to start RPC server \(is the port of -coordinator taken\? give another\)"
    ):
        find(RuntimeError("UNKNOWN: Failed to start RPC server"))


def test_devices_that_do_not_start_are_told_as_for_one_process(monkeypatch):
    def fail():
        raise AssertionError

    monkeypatch.setattr(devices.jax, "devices", fail)
    with pytest.raises(UserError, match="JAX finds no device of JAX_PLATFORMS="):
        joined(monkeypatch, None, "tpu,cpu", AssertionError())


def test_processes_of_unequally_many_devices_are_told_before_they_meet(monkeypatch):
    three = [SimpleNamespace(process_index=index) for index in (0, 0, 1)]
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed.jax, "devices", lambda: three)
    with pytest.raises(UserError, match="process 0 has 2 devices, process 1 has 1; give each as many"):
        distributed.agree({"-T": 4})


@pytest.mark.parametrize(
    "flags, says",
    [
        ({"coordinator": "localhost"}, "-coordinator localhost: give host:port"),
        ({"coordinator": "localhost:"}, "-coordinator localhost:: give host:port"),
        ({"coordinator": "localhost:99999"}, "-coordinator localhost:99999: give host:port"),
        ({"process_id": 2}, "-process_id 2: give 0 to 1"),
        ({"process_id": None, "num_processes": None}, "-num_processes and -process_id missing"),
    ],
)
def test_wrong_flags_of_processes_are_refused(monkeypatch, flags, says):
    with pytest.raises(UserError, match=says):
        joined(monkeypatch, **{"coordinator": "localhost:9876", "num_processes": 2, "process_id": 0} | flags)


@pytest.fixture
def settings():
    return SETTINGS | {"max_epoch": 2}


def run_together(config, folder):
    """One run of two processes, to its end."""
    with started(*as_processes(config), folder=folder, devices=2) as programs:
        codes = [program.end() for program in programs]
    assert codes == [0, 0], programs[0].said() + programs[1].said()
    return programs


def assert_close(config, reference, tolerance):
    ours = arrays(config)
    for name, array in arrays(reference).items():
        # w is float32, as in the paper's program: its last bit may differ.
        bound = tolerance if array.dtype == np.float64 else 2e-6
        np.testing.assert_allclose(ours[name], array, rtol=bound, atol=bound, err_msg=name)
    for curves in (read_metrics, tensorboard):
        mine, theirs = curves(config.run_dir), curves(reference.run_dir)
        assert mine.keys() == theirs.keys()
        for tag in theirs:
            np.testing.assert_allclose(mine[tag], theirs[tag], rtol=1e-5, err_msg=tag)


def test_two_processes_are_one_run_and_one_process_continues_it(settings, shared, tmp_path):
    """In float64, where only the order of sums differs: the same, across saving and restoring on other processes."""
    settings |= {"precision": "float64"}
    config = Config(**settings | {"log_dir_prefix": str(tmp_path / "two"), "max_epoch": 1})
    silent = run_together(config, shared)[1]
    assert "epoch" not in silent.said() and "Digits train" not in silent.said()  # process 0 alone speaks
    assert len(list(config.run_dir.glob("events.out.tfevents.*"))) == 1
    assert saved(config) == [5]

    whole, continued = (Config(**settings | {"log_dir_prefix": str(tmp_path / name)}) for name in ("one", "two"))
    with jax.enable_x64(True):
        loop.train(whole, say=lambda line: None)  # on four devices
        said = []
        loop.train(continued, say=said.append)
        assert "continuing after epoch 1, step 5" in said
        assert_close(continued, whole, 1e-10)


def test_processes_with_other_settings_are_refused_before_they_train(settings, shared, tmp_path):
    """They would train apart, or wait for each other without end."""
    first, second = as_processes(Config(**settings | {"log_dir_prefix": str(tmp_path)}))
    second = Config(**vars(second) | {"learning_rate": 0.01, "max_epoch": 3, "data_root": str(tmp_path)})
    with started(first, second, folder=shared, devices=2) as programs:
        codes = [program.end(within=120) for program in programs]
    # Who is second may only see that the first is gone.
    assert 2 in codes and 0 not in codes
    said = programs[codes.index(2)].said()
    assert re.search(r"the processes differ: -learning_rate 0.0[12], -max_epoch [23] here", said)
    assert not first.run_dir.exists()


@pytest.mark.faults
def test_two_processes_continue_what_one_began(settings, shared, tmp_path):
    """One device began; in float32 a sum in another order would turn a spike, and all that follows it."""
    settings |= {"precision": "float64"}
    whole, two = (Config(**settings | {"log_dir_prefix": str(tmp_path / name)}) for name in ("one", "two"))
    with jax.enable_x64(True):
        loop.train(whole, say=lambda line: None)
        loop.train(Config(**vars(two) | {"max_epoch": 1, "device": "cpu:0"}), say=lambda line: None)
        first = run_together(two, shared)[0]
        assert "continuing after epoch 1, step 5" in first.said()
        assert_close(two, whole, 1e-10)


@pytest.fixture(scope="module")
def together(shared, tmp_path_factory):
    """An uninterrupted run of two processes."""
    logs = str(tmp_path_factory.mktemp("together"))
    config = Config(**SETTINGS | {"log_dir_prefix": logs, "max_epoch": 12})
    run_together(config, shared)
    return config


@pytest.mark.faults
@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_peer_ends_the_other_and_the_run_continues(together, shared, tmp_path, victim):
    config = Config(**vars(together) | {"log_dir_prefix": str(tmp_path)})
    endless = Config(**vars(config) | {"max_epoch": 10_000})
    with started(*as_processes(endless), folder=tmp_path, devices=2) as programs:
        wait_for(lambda: 10 in saved(config))
        programs[victim].kill()
        died = time.monotonic()
        survivor = programs[1 - victim]
        assert survivor.end(within=60) != 0
        print(f"process {1 - victim} ended {time.monotonic() - died:.0f} s after process {victim} was killed")
    # Of whichever part of JAX noticed first; Gloo may find that what the dead one left half sent is of another size.
    assert re.search("another task died|failed|Connection|gloo::", survivor.said()), survivor.said()
    assert max(saved(config)) < 60
    run_together(config, shared)
    assert_same_run(config, together)


@pytest.mark.faults
@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_to_one_stops_both(together, shared, tmp_path, asked):
    config = Config(**vars(together) | {"log_dir_prefix": str(tmp_path)})
    endless = Config(**vars(config) | {"max_epoch": 10_000})
    with started(*as_processes(endless), folder=shared, devices=2) as programs:
        wait_for(lambda: 5 in saved(config))
        programs[asked].process.send_signal(signal.SIGTERM)
        assert [program.end() for program in programs] == [143, 143]
    assert "stopped by SIGTERM at step" in programs[0].said()
    assert max(saved(config)) < 60
    run_together(config, shared)
    assert_same_run(config, together)


@pytest.mark.faults
def test_a_damaged_checkpoint_is_passed_over_by_both(together, shared, tmp_path):
    config = Config(**vars(together) | {"log_dir_prefix": str(tmp_path)})
    run_together(Config(**vars(config) | {"max_epoch": 3}), shared)
    for path in (config.checkpoint_dir / "15" / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            raw = bytearray(path.read_bytes())
            raw[len(raw) // 2] ^= 16
            path.write_bytes(raw)
    said = run_together(config, shared)[0].said()
    assert "checkpoint of step 15 is damaged" in said and "continuing after epoch 2, step 10" in said
    assert_same_run(config, together)


@pytest.mark.faults
def test_a_mistake_ends_both_at_once(settings, tmp_path):
    config = Config(**settings | {"log_dir_prefix": str(tmp_path), "batch_size": 6})
    with started(*as_processes(config), folder=tmp_path, devices=2) as programs:
        codes = [program.end(within=120) for program in programs]
    # Who is second may only see that the first is gone.
    assert 2 in codes and 0 not in codes
    said = programs[codes.index(2)].said()
    assert "-batch_size 6 does not divide among 4 devices; give 4 or 8" in said and "Traceback" not in said


@pytest.mark.parametrize("error", [RuntimeError("must be called before any JAX calls that"), ValueError("no address")])
def test_tasks_of_srun_that_do_not_meet_are_not_trained_alone(monkeypatch, error):
    srun = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}
    with pytest.raises(UserError, match=f"^the processes did not find each other: {error}"):
        joined(monkeypatch, srun, error=error)


def test_where_data_lie_may_differ_between_hosts(monkeypatch):
    def told(facts):
        raise UserError(" ".join(facts))

    monkeypatch.setattr(loop.distributed, "agree", told)
    with pytest.raises(UserError) as asked:
        loop.train(Config(dataset_name="Digits"), say=None)
    names = str(asked.value).split()
    assert "-T" in names and not {"-coordinator", "-process_id", "-data_root", "-cache_dir"} & set(names)
