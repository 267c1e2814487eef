"""The benchmark: its arithmetic, and its processes in miniature; SpikingJelly only where it is installed."""

import contextlib
import json
import math
import os
import re
import signal
import sys
import weakref
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import jax
import numpy as np
import pytest
from flax import nnx

from plif_jax import cli, neurons
from plif_jax.data import frames
from plif_jax.errors import UserError
from plif_jax.networks import NETWORKS

sys.path.append(str(Path(__file__).parents[1] / "experiments"))

import benchmark
from bench import jax_work, limits, ratios, report, suites
from bench.fitting import fitting
from bench.peers import Peer, PeerError, in_turn
from bench.recordings import recording

PERFORMANCE = Path(__file__).parents[1] / "docs" / "performance.md"


class Clock:
    """A peer that takes the seconds it is told."""

    def __init__(self, seconds, order):
        self.seconds, self.order = iter(seconds), order

    def run(self):
        self.order.append(self)
        return next(self.seconds)


def test_peers_run_in_turn():
    order = []
    a, b = Clock([1, 2, 3], order), Clock([4, 5, 6], order)
    assert in_turn({"a": a, "b": b}, rounds=3, limit=60) == ({"a": [1, 2, 3], "b": [4, 5, 6]}, {})
    assert order == [a, b, a, b, a, b]


def test_no_round_starts_after_the_limit():
    assert in_turn({"a": Clock([1, 2], [])}, rounds=2, limit=0) == ({"a": [1]}, {})


def test_a_peer_that_dies_leaves_the_others_their_rounds(monkeypatch):
    def dies():
        yield 1
        raise PeerError("no memory")

    names = ("ours", "copy", "peer")
    for dead in names:
        said = []
        bench = suites.Bench("python", "python", 2, 60, False, [], said.append)
        peers = {name: Clock(dies() if name == dead else [2, 3], []) for name in names}
        for peer in peers.values():
            peer.facts = {}
        seconds, facts = bench.in_turn("case", peers)
        assert seconds == {name: [2, 3] for name in names if name != dead} and seconds.keys() == facts.keys()
        assert bench.rows == said == [{"case": "case", "against": dead, "reason": "no memory"}]


@pytest.mark.parametrize(
    ("dead", "pairs"),
    [
        ("ours", [["ours", "product", "a"]]),
        ("product", [["ours", "product", "a"], ["ours", "b"]]),
        ("a", [["ours", "product", "a"], ["ours", "product", "b"]]),
    ],
)
def test_a_peer_that_died_is_not_asked_again_by_the_next_pair(dead, pairs):
    asked = []

    def in_turn(case, peers):
        asked.append(list(peers))
        left = {name: peer for name, peer in peers.items() if name != dead}
        return left, left

    started = contextlib.contextmanager(lambda case, peers: iter([peers]))
    bench = SimpleNamespace(gpu=True, started=started, in_turn=in_turn)
    list(suites._measured(bench, "case", {"ours": 0, "product": 0}, {"a": 1, "b": 2}, False))
    assert asked == pairs


def test_ratio_cancels_a_load_that_both_felt():
    # The load came in the middle of the second round; the medians alone would say 24 / 1.
    assert ratios.ratio([3, 24, 24], [1, 1, 8]) == 3


@pytest.mark.parametrize(
    ("gpu", "alone", "together"),
    [
        (False, False, [["ours", "a", "b"]]),
        (True, False, [["ours", "a"], ["ours", "b"]]),
        (True, True, [["ours"], ["a"], ["b"]]),
    ],
)
def test_peers_share_a_gpu_by_twos_and_no_memory_that_one_fills(gpu, alone, together):
    asked = []

    def in_turn(case, peers):
        asked.append(list(peers))
        return dict(peers), dict(peers)

    started = contextlib.contextmanager(lambda case, peers: iter([peers]))
    bench = SimpleNamespace(gpu=gpu, started=started, in_turn=in_turn, measure=in_turn)
    measured = list(suites._measured(bench, "case", {"ours": 0}, {"a": 1, "b": 2}, alone))
    assert asked == together
    assert {name for seconds, _ in measured for name in seconds} == {"ours", "a", "b"}
    assert all("ours" in seconds for seconds, _ in measured)


def test_the_share_of_the_matrix_rate_is_of_work_done():
    told = []
    bench = SimpleNamespace(tell=told.append)
    # 2 calls of 5 samples, 400 operations in 4 s; the product makes 1000 in 2 s: a fifth of its rate.
    seconds = {"ours": [4.0, 4.0], "matrix product": [2.0, 2.0]}
    facts = {"ours": {"flops": 400, "samples": 10}, "matrix product": {"flops": 1000}}
    suites._tell_share(bench, "case", seconds, facts, ratios.Target(0.45))
    (row,) = told
    assert row["ratio"] == pytest.approx(0.2) and row["met"] is False
    assert row["ours_s"] == 0.4 and row["theirs_s"] == pytest.approx(0.08)
    assert row["flops_per_s_ours"] == pytest.approx(100) and row["flops_per_s_matrix_product"] == pytest.approx(500)


def test_a_row_names_ratio_and_target():
    seconds = {"ours": [2.0, 2.0], "copy": [1.0, 1.0], "peer": [5.0, 5.0]}
    faster = ratios.row("case", seconds, "ours", "peer", target=ratios.Target(3))
    assert (faster["ratio"], faster["target"], faster["met"]) == (2.5, ">= 3", False)
    limit = ratios.row("case", seconds, "ours", "copy", slower=False, target=ratios.Target(2.5, at_most=True))
    assert (limit["ratio"], limit["target"], limit["met"]) == (2, "<= 2.5", True)
    assert "MISSED" in report.line(faster) and "MISSED" not in report.line(limit)


def test_spread_is_zero_on_a_quiet_machine_and_grows():
    assert ratios.spread([1.0]) == ratios.spread([2.0, 2.0, 2.0]) == 0
    assert ratios.spread([1, 2, 3, 4, 5]) == 0.5


@pytest.mark.parametrize(
    ("name", "counted_by_hand"),
    [
        ("MNIST", 28 * 28 * 9 * 128 + 8 * (14 * 14 * 9 * 128 * 128 + 6272 * 2048 + 2048 * 100)),
        ("NMNIST", 10 * (34**2 * 9 * 2 * 128 + 17**2 * 9 * 128 * 128 + 8192 * 2048 + 2048 * 100)),
    ],
)
def test_multiply_adds(name, counted_by_hand):
    assert limits.multiply_adds(suites.network(name)) == counted_by_hand


@pytest.mark.parametrize(
    ("name", "counted_by_hand"),
    [
        ("MNIST", 4 * 28 * 28 * 9 * 128 + 6 * 8 * (14 * 14 * 9 * 128 * 128 + 6272 * 2048 + 2048 * 100)),
        ("NMNIST", 10 * (4 * 34**2 * 9 * 2 * 128 + 6 * (17**2 * 9 * 128 * 128 + 8192 * 2048 + 2048 * 100))),
    ],
)
def test_training_takes_both_gradients_but_that_of_the_data(name, counted_by_hand):
    assert limits.training_operations(suites.network(name)) == counted_by_hand


def test_the_traffic_that_the_documentation_tells_is_what_is_counted():
    limits_told = PERFORMANCE.read_text().split("## ")[1]
    told = re.findall(r"^\| ([^,|]+).*, T \d+ \| ([\d.]+)[^|]* \| (\d+)", limits_told, re.M)
    assert len(told) == 5
    for name, gflop, megabytes in told:
        network = suites.network(name.replace("-", "").replace(" ", ""))
        assert f"{limits.traffic(network, 16) / 16 / 1e6:.0f}" == megabytes
        assert float(gflop) == pytest.approx(limits.training_operations(network) / 1e9, rel=0.01)


@pytest.mark.parametrize(
    ("flag", "given", "said"),
    [
        ("-networks", "MNIST,Mnist", "there is no 'Mnist'; give any of MNIST,FashionMNIST"),
        ("-batch_sizes", "16,many", "'16,many': give whole numbers from 1 with commas"),
        ("-timesteps", "largest", "'largest': give whole numbers from 1 with commas"),
        ("--timesteps", "4,0", "'4,0': give whole numbers from 1"),
        ("--rounds", "0", "'0': give whole numbers from 1"),
        ("-batch_sizes", "largest", "-batch_sizes largest: only a GPU says when its memory is full"),
        ("-peer_python", "/no/python", "-peer_python /no/python: there is no such program"),
        ("-out", "/dev/null/out", "-out /dev/null/out cannot be written: Not a directory"),
    ],
)
def test_a_mistake_is_told_in_a_line(flag, given, said):
    with pytest.raises(UserError, match=said):
        benchmark.main(["train", flag, given])


def test_a_backend_that_does_not_start_says_why(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "abacus")
    with pytest.raises(UserError, match=r"JAX does not start with JAX_PLATFORMS=abacus: .*abacus"):
        benchmark.main(["neuron"])


def test_a_peer_that_cannot_be_built_says_why():
    peer = Peer(sys.executable, "jax_work", {"kind": "nothing"})
    with contextlib.closing(peer), pytest.raises(PeerError, match=r"^KeyError: 'nothing'$"):
        peer.ready()


def test_an_error_within_a_compiled_program_is_told_and_not_what_jax_says_after_it():
    spec = {"kind": "copy", "T": 2, "N": 3, "calls": "many"}
    peer = Peer(sys.executable, "jax_work", spec)
    with contextlib.closing(peer), pytest.raises(PeerError, match=r"^TypeError: .*many"):
        peer.ready()


PEER = """#!{python}
import os, sys, types
from bench import worker
ready = []
def run():
    if ready:
        {ending}
sys.modules["bench.own"] = types.SimpleNamespace(build=lambda spec: (run, lambda: ready.append(1) or {{}}))
worker.main("own", {{"warmup": 1}})
"""


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        (r"raise ValueError('first\nsecond')", "^ValueError: first$"),
        ("raise ValueError", "^ValueError$"),
        (r"os.write(1, b'farewell\n'); os._exit(3)", "^farewell$"),
        ("os._exit(3)", "^ended with status 3$"),
    ],
)
def test_a_peer_that_fails_or_dies_at_work_says_why(tmp_path, ending, said):
    program = tmp_path / "peer"
    program.write_text(PEER.format(python=sys.executable, ending=ending))
    program.chmod(0o755)
    with contextlib.closing(Peer(str(program), "own", {})) as peer:
        peer.ready()
        with pytest.raises(PeerError, match=said):
            peer.run()


class Started:
    """A peer that starts and gets ready, and says so in `order`."""

    order: ClassVar = []

    def __init__(self, name):
        self.name = name
        self.order.append(f"{name} starts")

    def ready(self):
        self.order.append(f"{self.name} is ready")

    def close(self):
        pass


@pytest.mark.parametrize(
    ("gpu", "order"),
    [
        (True, ["a starts", "a is ready", "b starts", "b is ready"]),
        (False, ["a starts", "b starts", "a is ready", "b is ready"]),
    ],
)
def test_on_a_gpu_nobody_starts_while_another_compiles(monkeypatch, gpu, order):
    monkeypatch.setattr(suites, "Peer", Started)
    monkeypatch.setattr(Started, "order", [])
    bench = suites.Bench("python", "python", 1, 1, gpu, [], print)
    with bench.started("case", {"a": "a", "b": "b"}) as running:
        assert list(running) == ["a", "b"] and Started.order == order


@pytest.mark.parametrize("gpu", [True, False])
def test_both_sides_have_the_same_kind_of_device(gpu):
    bench = suites.Bench("python", "python", 1, 1, gpu, ["auto"], print)
    ((*_, spec, environment),) = bench.spikingjelly({"kind": "neuron"}).values()
    assert spec == {"kind": "neuron", "gpu": gpu}
    assert environment == ({"SJ_PLIF_CUDA_IMPLEMENTATION": "auto"} if gpu else {"CUDA_VISIBLE_DEVICES": ""})


def test_for_the_largest_batch_ours_has_the_whole_memory(monkeypatch):
    asked = {}
    monkeypatch.setattr(
        suites, "_measured", lambda bench, case, ours, theirs, alone: asked.update({case: (ours, theirs)}) or []
    )
    bench = suites.Bench("python", "python", 1, 1, True, ["auto"], print)
    suites.train(bench, names=["MNIST"], batches=[16, "largest"], precisions=["float32"], modes=["multi-step"])
    (few, _), (many, theirs) = asked.values()
    assert few["ours"][-1] == {} and many["ours"][-1]["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"
    assert not any(name.startswith("XLA") for peer in theirs.values() for name in peer[-1])


def test_the_largest_batch_is_built_once_what_did_not_fit_is_freed():
    class Array:
        pass

    built, left = [], []

    def make(batch):
        assert not [array for array in left if array()]
        array = Array()
        left.append(weakref.ref(array))
        built.append(batch)

        def run():
            if batch > 64:
                raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {array}")
            return array

        return run

    run, batch = fitting(make, "largest", jax_work._is_full)
    assert (batch, built) == (64, [32, 64, 128, 64]) and isinstance(run(), Array)
    del run
    assert fitting(make, 16, jax_work._is_full)[1] == 16

    def fail(batch):
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")

    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
        fitting(fail, "largest", jax_work._is_full)


def test_memory_tells_how_it_grows_with_T(monkeypatch):
    peaks = {4: {"ours": 10.0, "theirs": 20.0}, 8: {"ours": 12.0}, 32: {"ours": 40.0, "theirs": 120.0}}
    monkeypatch.setattr(suites, "_peaks", lambda bench, name, T, target: peaks[T])
    bench = suites.Bench("python", "python", 1, 1, False, [], lambda row: None)
    suites.memory(bench, names=["MNIST"], Ts=[8, 4, 32])
    (grown,) = bench.rows
    assert grown["case"] == "memory MNIST T=32 over T=4" and grown["ratio"] == pytest.approx(4 / 6)
    assert "4.00 x     6.00 x    0.67" in report.line(grown)
    suites.memory(bench, names=["MNIST"], Ts=[4])
    suites.memory(bench, names=["MNIST"], Ts=[4, 8])  # of which theirs could not run one
    assert len(bench.rows) == 1


def test_devices_and_versions_are_said_once():
    facts = {"device": "cpu", "threads": 2, "versions": {"jax": "1", "numpy": "2"}}
    peers = {"a": facts, "b": dict(facts), "c": facts | {"device": "a GPU", "versions": {"torch": "3"}}}
    assert report.ran_on(peers) == ["a GPU, 2 CPU threads: torch 3", "cpu, 2 CPU threads: jax 1, numpy 2"]


@pytest.mark.parametrize(
    ("backend", "batches", "precisions"),
    [("gpu", [16, "largest"], ["float32", "bfloat16"]), ("cpu", [16], ["float32"])],
)
def test_a_gpu_is_measured_with_more_batches_and_precisions(tmp_path, monkeypatch, backend, batches, precisions):
    found = SimpleNamespace(returncode=0, stdout=backend)
    monkeypatch.setattr(benchmark.subprocess, "run", lambda *_, **__: found)
    asked = {}
    monkeypatch.setattr(suites, "train", lambda bench, **what: asked.update(what))
    benchmark.main(["train", "-out", str(tmp_path)])
    assert (list(asked["batches"]), list(asked["precisions"])) == (batches, precisions)
    benchmark.main(["train", "-batch_sizes", "8", "-precisions", "bfloat16", "-out", str(tmp_path)])
    assert (asked["batches"], asked["precisions"]) == ([8], ["bfloat16"])


def test_what_was_measured_before_sigterm_is_written(tmp_path, monkeypatch):
    def measure(bench, **_):
        bench.tell(ratios.missing("case", "peer", "no reason"))
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(suites, "neuron", measure)
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["neuron", "-out", str(tmp_path)])
    assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    assert json.loads((tmp_path / "benchmark.json").read_text())["rows"][0]["reason"] == "no reason"


def test_an_epoch_runs_where_the_batch_does_not_divide_among_the_devices(monkeypatch):
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:3])
    network = suites.network("Digits") | {"T": 2, "channels": 2, "number_layer": 1}
    spec = {"kind": "epoch", "network": network, "precision": "float32", "data_root": None, "bare": True}
    run, _ = jax_work.build(spec | {"train_samples": 32, "test_samples": 20})
    run.close()


@pytest.mark.parametrize(
    ("kind", "more", "found"),
    [
        ("train", {"batch": 8}, {"samples": 16}),
        ("infer", {"batch": 8}, {"samples": 16}),
        ("memory", {"batch": 8}, {}),
        ("matmul", {"size": 32}, {"flops": 2 * 2 * 32**3}),
        ("epoch", {"bare": False}, {"samples": 32}),
        ("epoch", {"bare": True}, {"samples": 32}),
    ],
)
def test_our_side_of_each_comparison_runs(kind, more, found, monkeypatch):
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: None)  # it is for whole processes
    small = suites.network("Digits") | {"T": 2, "channels": 2, "number_layer": 1}
    spec = {"kind": kind, "network": small, "precision": "float32", "calls": 2, "data_root": None}
    run, facts = jax_work.build(spec | {"train_samples": 32, "test_samples": 20} | more)
    for _ in range(2):
        run()
    assert callable(facts) or found.items() <= facts.items()
    if kind == "memory":
        assert facts().keys() >= {"peak_bytes", "planned_bytes"} and facts()["planned_bytes"] > 10_000
    if kind == "epoch":
        run.close()


def test_only_the_modes_asked_for_are_measured(monkeypatch):
    asked = []
    monkeypatch.setattr(suites, "_measured", lambda bench, case, ours, theirs, alone: asked.extend(theirs) or [])
    bench = suites.Bench("python", "python", 1, 1, False, [], print)
    suites.train(bench, names=["Digits"], batches=[2], precisions=["float32"], modes=["single-step"])
    assert asked == ["SpikingJelly single-step"]


def test_each_call_of_a_neuron_takes_the_gradient_of_the_one_before():
    spec = {"T": 2, "N": 3, "calls": 4}
    x, g = jax_work._currents(spec)
    ones, last = jax_work._chained(spec, lambda x, g: (x + 1, 2 * g))()
    np.testing.assert_array_equal(ones, x + 1)
    np.testing.assert_array_equal(last, 16 * g)


def _run(tmp_path, *argv):
    rows = benchmark.main([*argv, "-rounds", "2", "-out", str(tmp_path)])
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert written["rows"] == rows and written["machine"]["cores"] >= 1
    assert (tmp_path / "benchmark.png").stat().st_size > 5000
    return {row["against"]: row for row in rows}


def test_neuron_and_frames_in_miniature(tmp_path, monkeypatch):
    rows = _run(tmp_path, "neuron", "-neurons", "64", "-timesteps", "4")
    assert math.isfinite(rows["copy"]["ratio"]) and rows["copy"]["bytes_per_s"] > 0
    tiny = ("tiny", 3, {"events": 300, "height": 5, "width": 7})
    monkeypatch.setattr(benchmark, "RECORDINGS", (tiny,))
    # One repeat suffices to see that it runs.
    monkeypatch.setattr(suites, "FRAMES_EVENTS", 300)
    rows |= _run(tmp_path, "frames")
    assert rows["tonic ToFrame"]["ratio"] > 0
    if find_spec("spikingjelly") is None:
        assert "No module named" in rows["SpikingJelly"]["reason"]
    else:
        assert rows["SpikingJelly"]["ratio"] > 0


@pytest.fixture(scope="module")
def torch_work():
    """SpikingJelly's side, where it is installed."""
    pytest.importorskip("spikingjelly")
    from bench import torch_work

    return torch_work


@pytest.mark.parametrize("mode", ["m", "s"])
@pytest.mark.parametrize("name", NETWORKS)
def test_their_network_is_ours(torch_work, name, mode):
    """Each parameter has as many elements, and what goes in and comes out is the same."""
    import torch

    told = suites.network(name) | {"T": 2}
    with torch.no_grad():
        theirs = torch_work.Network(**told, mode=mode).eval()
        H, W, C = told["shape"]
        x = torch.rand((2, C, H, W) if theirs.still is not None else (2, 2, C, H, W))
        assert theirs(x).shape == (2, told["classes"])
    settings = {key: told[key] for key in ("T", "channels", "number_layer") if told[key] is not None}
    ours = nnx.eval_shape(lambda: NETWORKS[name](rngs=nnx.Rngs(0), **settings))
    sizes = sorted(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(ours, nnx.Param)))
    assert sizes == sorted(parameter.numel() for parameter in theirs.parameters())


def test_their_neuron_spikes_as_ours(torch_work):
    import torch

    x, _ = jax_work._currents({"T": 8, "N": 1000})
    theirs = torch_work._plif("m")(torch.from_numpy(np.array(x))).detach().numpy()
    np.testing.assert_array_equal(theirs, neurons.PLIF()(x))
    assert 0.1 < theirs.mean() < 0.9


def test_their_frames_are_ours(torch_work):
    from spikingjelly.datasets import utils

    events = recording(events=3000, height=5, width=7)
    columns = {name: np.ascontiguousarray(events[name]) for name in ("t", "x", "y", "p")}
    theirs = utils.integrate_events_by_fixed_frames_number(columns, "number", 4, 5, 7)
    np.testing.assert_array_equal(theirs.transpose(0, 2, 3, 1), frames.integrate(events, 5, 7, 4))


@pytest.mark.parametrize("mode", ["m", "s"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["train", "infer", "memory"])
def test_their_side_of_each_comparison_runs(torch_work, kind, precision, mode):
    network = suites.network("Digits") | {"T": 2, "channels": 2, "number_layer": 1}
    spec = {"kind": kind, "network": network, "precision": precision, "mode": mode, "batch": 4, "calls": 2}
    run, facts = torch_work.build(spec | {"gpu": torch_work.DEVICE.type == "cuda"})
    run()
    assert facts()["peak_bytes"] >= 0 if kind == "memory" else facts["samples"] == 8


def test_their_side_has_a_gpu_where_ours_has(torch_work, monkeypatch):
    import torch

    assert torch.backends.cudnn.benchmark
    monkeypatch.setattr(torch_work, "DEVICE", torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"^PyTorch finds no GPU, JAX has one$"):
        torch_work.build({"kind": "neuron", "T": 2, "N": 3, "calls": 1, "gpu": True})


def test_on_a_gpu_their_neurons_keep_their_kernels_in_bfloat16(torch_work, monkeypatch):
    import torch

    asked = []

    def prepare(net, device, wanted):
        asked.append((device.type, wanted.mode, wanted.neuron_storage))
        return SimpleNamespace(model=net, autocast_context=lambda: "theirs")

    monkeypatch.setattr(torch_work.precision, "prepare_model_for_precision", prepare)
    for device, mode, kept in (("cuda", "m", True), ("cuda", "s", False), ("cpu", "m", False)):
        monkeypatch.setattr(torch_work, "DEVICE", torch.device(device))
        _, context = torch_work._in_precision("net", {"precision": "bfloat16", "mode": mode})
        assert (context == "theirs") == kept
    assert asked == [("cuda", "bf16", "bf16")]
