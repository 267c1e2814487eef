"""The benchmark's peers: how they start, take turns, share a device, and end."""

import contextlib
import sys
import weakref
from types import SimpleNamespace
from typing import ClassVar

import jax
import pytest

from bench import suites
from bench.fitting import fitting
from bench.peers import Peer, PeerError, in_turn


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

    run, batch, why = fitting(make, "largest")
    assert (batch, built) == (64, [32, 64, 128, 64]) and isinstance(run(), Array)
    assert why.startswith("JaxRuntimeError: RESOURCE_EXHAUSTED")
    del run
    assert fitting(make, 16)[1:] == (16, None)

    def fail(batch):
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")

    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
        fitting(fail, "largest")


@pytest.mark.parametrize(
    ("kind", "backends", "found"),
    [
        ("neuron", None, ["torch", "cuda", "triton"]),
        ("train", None, ["auto"]),
        ("train", ["torch"], ["torch"]),
        ("neuron", ["auto"], ["auto"]),
    ],
)
def test_of_spikingjellys_neurons_a_network_takes_the_best_unless_told(kind, backends, found):
    bench = suites.Bench("python", "python", 1, 1, True, backends, print)
    assert list(bench.spikingjelly({"kind": kind})) == [f"SpikingJelly {name}" for name in found]


def test_the_batches_that_fit_are_told(monkeypatch):
    facts = {name: {"samples": 8 * n, "batch": n, "flops": 1} for name, n in (("ours", 64), ("SpikingJelly m", 32))}
    seconds = {"ours": [1.0], "SpikingJelly m": [1.0]}
    monkeypatch.setattr(suites, "_measured", lambda *_, **__: [(seconds, facts)])
    bench = suites.Bench("python", "python", 1, 1, True, None, lambda line: None)
    suites.train(bench, names=["MNIST"], batches=["largest"], precisions=["float32"], modes=["multi-step"])
    (told,) = bench.rows
    assert told["case"] == "train MNIST batch=64 / 32 float32" and told["ratio"] == 2 and told["target"] is None


def test_an_epoch_and_its_bare_steps_share_what_one_of_them_compiled(monkeypatch):
    asked = {}
    bench = suites.Bench("python", "python", 1, 1, False, [], print)
    monkeypatch.setattr(bench, "measure", lambda case, peers: (asked.update(peers) or {}, {}))
    suites.pipeline(bench, name="Digits", data_root=None, train_samples=2, test_samples=2)
    (_, _, as_run, one), (_, _, bare, other) = asked.values()
    assert one == other and "JAX_COMPILATION_CACHE_DIR" in one
    assert (as_run.pop("bare"), bare.pop("bare")) == (False, True) and as_run == bare
