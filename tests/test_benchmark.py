"""The benchmark: its arithmetic, its command line, our side of each comparison, and the whole in miniature."""

import json
import math
import os
import re
import signal
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import benchmark
from bench import jax_work, limits, ratios, report, suites
from plif_jax import cli
from plif_jax.errors import UserError

PERFORMANCE = Path(__file__).parents[1] / "docs" / "performance.md"


def test_ratio_cancels_a_load_that_both_felt():
    # The load came in the middle of the second round; the medians alone would say 24 / 1.
    assert ratios.ratio([3, 24, 24], [1, 1, 8]) == 3


def test_the_share_of_the_matrix_rate_is_of_work_done():
    told = []
    bench = SimpleNamespace(tell=told.append)
    # 2 calls of 5 samples, 400 operations in 4 s; the product makes 1000 in 2 s: a fifth of its rate.
    seconds = {"ours": [4.0, 4.0], "matrix product": [2.0, 2.0]}
    facts = {"ours": {"flops": 400, "samples": 10, "batch": 5}, "matrix product": {"flops": 1000}}
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
    (axes,) = report.chart([faster, limit], {"cpu": "a CPU", "cores": 2}, {}).axes
    bars = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]
    np.testing.assert_allclose(bars, [(1, faster["ratio"]), (1, limit["ratio"])])
    assert axes.get_xlim()[0] < 1 and axes.get_xlim()[1] > 3


@pytest.mark.parametrize(
    "found, target, said",
    [(0.5012, ratios.Target(0.5, at_most=True), "0.501"), (1.9996, ratios.Target(2), "1.9996"), (2, None, "2.00")],
)
def test_a_ratio_is_told_on_its_side_of_the_target(found, target, said):
    seconds = {"ours": [1.0], "peer": [found]}
    assert f" {said} " in report.line(ratios.row("case", seconds, "ours", "peer", target=target))


@pytest.mark.parametrize(
    "why, said",
    [
        ("JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory", False),
        ("JaxRuntimeError: INTERNAL: cuDNN", True),
        (None, False),
    ],
)
def test_what_else_than_memory_bounds_a_batch_is_told(why, said):
    told = []
    seconds = {"ours": [1.0], "SpikingJelly multi-step": [2.0]}
    facts = {name: {"samples": 32, "batch": 32, "larger": None} for name in seconds}
    facts["ours"]["larger"] = why
    suites._tell_rates(SimpleNamespace(tell=told.append), "train batch=largest", seconds, facts, {})
    assert report.line(told[0]).endswith(f"not memory, but ours: {why}") is said


def test_spread_is_zero_on_a_quiet_machine_and_grows():
    assert ratios.spread([1.0]) == ratios.spread([2.0, 2.0, 2.0]) == 0
    assert ratios.spread([1, 2, 3, 4, 5]) == pytest.approx(1 / 3)
    assert ratios.spread([1, 3]) == 0.25


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


def test_an_accelerator_that_jax_goes_on_without_is_told_why(monkeypatch, tmp_path, capsys):
    told = "Traceback (most recent call last):\nRuntimeError: Unable to load cuPTI.\nAssertionError\n"
    failed = SimpleNamespace(returncode=1, stdout="", stderr=told)
    monkeypatch.setattr(benchmark.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match=r"JAX does not start .*: RuntimeError: Unable to load cuPTI\."):
        benchmark.main(["neuron"])
    failed.returncode, failed.stdout = 0, "cpu\n"
    monkeypatch.setattr(benchmark.suites, "neuron", lambda *_, **__: None)
    benchmark.main(["neuron", "-out", str(tmp_path)])
    assert "JAX could not start all it found: RuntimeError: Unable to load cuPTI.\n" in capsys.readouterr().out


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
    found = SimpleNamespace(returncode=0, stdout=backend, stderr="")
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
