"""SpikingJelly's side of the benchmark does the work that ours does; where it is installed."""

import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from bench import jax_work, suites
from bench.recordings import recording
from plif_jax import neurons
from plif_jax.data import frames
from plif_jax.networks import NETWORKS


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
