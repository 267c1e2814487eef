"""The benchmark: its arithmetic, and its processes in miniature; SpikingJelly only where it is installed."""

import contextlib
import json
import math
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from plif_jax import cli
from plif_jax.errors import UserError

sys.path.append(str(Path(__file__).parents[1] / "experiments"))

import benchmark
from bench import jax_work, limits, ratios, report, suites
from bench.peers import Peer, PeerError, in_turn

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
    assert in_turn({"a": a, "b": b}, rounds=3, limit=60) == {"a": [1, 2, 3], "b": [4, 5, 6]}
    assert order == [a, b, a, b, a, b]


def test_no_round_starts_after_the_limit():
    assert in_turn({"a": Clock([1, 2], [])}, rounds=2, limit=0) == {"a": [1]}


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


def test_the_traffic_that_the_documentation_tells_is_what_is_counted():
    limits_told = PERFORMANCE.read_text().split("## ")[1]
    told = re.findall(r"^\| ([^,|]+).*, T \d+ \| ([\d.]+)[^|]* \| (\d+)", limits_told, re.M)
    assert len(told) == 5
    for name, gflop, megabytes in told:
        network = suites.network(name.replace("-", "").replace(" ", ""))
        assert f"{limits.traffic(network, 16) / 16 / 1e6:.0f}" == megabytes
        assert float(gflop) == pytest.approx(6 * limits.multiply_adds(network) / 1e9, rel=0.02)


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
    for asked in (peer.ready, peer.run):  # and when it is asked to run all the same
        with pytest.raises(PeerError, match="KeyError: 'nothing'"):
            asked()
    peer.close()


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
    assert found.items() <= facts.items()
    assert kind != "memory" or facts["peak_bytes"] > 10_000
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
