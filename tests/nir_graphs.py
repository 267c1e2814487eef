"""NIR graphs of small networks, and a plain interpreter of NIR's equations."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plif_jax import networks, neurons
from plif_jax.layers import BatchNorm

nir = pytest.importorskip("nir")

B, T, SHAPE, CLASSES = 3, 6, (9, 8, 2), 5


def static_table():
    conv, norm, neuron = networks.conv(4), networks.norm, networks.neuron
    return {
        "static_conv": [conv, norm],
        "conv": [neuron, networks.pool, conv, norm, neuron, networks.pool],
        "fc": [networks.flatten, networks.dropout, networks.linear(20), neuron, networks.linear(10 * CLASSES), neuron],
    }


def trained(static=True, seed=0, **settings):
    """A small network in evaluation mode, as after training: busy neurons, unlike taus, batch norm that does a lot."""
    table = static_table() if static else networks.event_table(4, 2, CLASSES)
    net = networks.SpikingNet(table, SHAPE, CLASSES, T=T, rngs=nnx.Rngs(seed), **settings)
    net.eval()
    random = np.random.default_rng(seed)
    for layer in net.named_layers().values():
        if isinstance(layer, BatchNorm):
            C = layer.scale.shape
            layer.scale[...], layer.bias[...] = random.uniform(1, 3, C), random.uniform(0, 1, C)
            layer.mean[...], layer.var[...] = random.normal(size=C), random.uniform(0.5, 2, C)
        elif isinstance(layer, nnx.Linear):
            layer.kernel[...] *= 6
        elif isinstance(layer, neurons.PLIF):
            layer.w[...] = random.normal()
    return net


def some_input(static=True, seed=1):
    shape = (B, *SHAPE) if static else (T, B, *SHAPE)
    return jnp.asarray(np.random.default_rng(seed).poisson(0.7, shape), float)


def spikes_of(net, x):
    """The spikes [T, B, ...] of every neuron layer, in order, and the votes."""
    graphdef, state = nnx.split(net)

    @jax.jit
    def run(state, x):
        spikes = []

        def keep(name, layer, entering, leaving):
            if isinstance(layer, neurons.Neuron):
                spikes.append(leaving)

        _, votes = nnx.merge(graphdef, state).unroll(None, x, observe=keep)
        return spikes, votes

    return jax.tree.map(np.asarray, run(state, x))


def interpret(graph, x_TBCHW):
    """What NIR's text says: every node once per timestep, neurons by one Euler step of their equation, in float64.

    Returns the outputs of all nodes, {name: [T, B, ...]}.
    """
    dt, after = graph.metadata["dt"], dict(graph.edges)
    state, outputs = {}, {}
    for x in np.asarray(x_TBCHW, np.float64):
        name = "input"
        while (name := after[name]) != "output":
            node = graph.nodes[name]
            if isinstance(node, nir.Conv2d):
                x = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in node.padding)])
                windows = np.lib.stride_tricks.sliding_window_view(x, node.weight.shape[2:], (2, 3))
                x = np.einsum("bchwij,ocij->bohw", windows, node.weight.astype(float)) + node.bias[:, None, None]
            elif isinstance(node, nir.AvgPool2d):
                H, W = (size // 2 * 2 for size in x.shape[2:])
                x = x[:, :, :H, :W].reshape(*x.shape[:2], H // 2, 2, W // 2, 2).mean((3, 5))
            elif isinstance(node, nir.Flatten):
                x = x.reshape(len(x), -1)
            elif isinstance(node, nir.Linear | nir.Affine):
                x = x @ node.weight.T.astype(float) + getattr(node, "bias", 0)
            elif isinstance(node, nir.LIF):
                v = state.get(name, node.v_reset)
                v = v + dt / node.tau * (node.v_leak - v + node.r * x)
                x = (v > node.v_threshold).astype(float)
                state[name] = np.where(x > 0, node.v_reset, v)
            elif isinstance(node, nir.IF):
                v = state.get(name, node.v_reset) + dt * node.r * x
                x = (v > node.v_threshold).astype(float)
                state[name] = np.where(x > 0, node.v_reset, v)
            outputs.setdefault(name, []).append(x)
    return {name: np.stack(values) for name, values in outputs.items()}


def as_frames(x):
    """Input [T, B, C, H, W] for other simulators; a still image is shown at every step."""
    x = np.asarray(x, np.float32)
    return np.moveaxis(x if x.ndim == 5 else np.broadcast_to(x, (T, *x.shape)), -1, 2)


def assert_same_spikes(ours, theirs):
    """Ours channels-last, theirs channels-first, layer by layer; and neither silent nor always on."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert 0.02 < a.mean() < 0.98
        np.testing.assert_array_equal(a, np.moveaxis(b, 2, -1) if a.ndim == 5 else b)


def chain(*named, metadata=None):
    names = [name for name, _ in named]
    return nir.NIRGraph(dict(named), list(pairwise(names)), metadata=metadata or {})


def lif(N, tau=3e-4, r=1.0, v_leak=0.0, v_threshold=1.0, v_reset=0.0):
    return nir.LIF(*(np.broadcast_to(a, N).astype(float) for a in (tau, r, v_leak, v_threshold, v_reset)))
