"""Layers of one's own that are derived from those here, or used twice: what is written of a network computes the same.

Where a form cannot hold what such a layer does, it says so.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plif_jax import layers, networks
from plif_jax.analysis import operations
from plif_jax.errors import UserError
from plif_jax.interop import export
from plif_jax.interop.fold import fold

SHAPE, CLASSES, T, B = (6, 6, 2), 3, 4, 5


class Halved(layers.BatchNorm):
    def __call__(self, x):
        return 0.5 * super().__call__(x)


class Rectified(layers.Conv3x3):
    def __call__(self, x):
        return jax.nn.relu(super().__call__(x))


class Standardised(nnx.Linear):
    def __call__(self, x):
        kernel = self.kernel[...]
        return x @ (kernel - kernel.mean(0, keepdims=True))


class Scaled(layers.Dropout):
    def __call__(self, x, rngs=None):
        return 0.5 * x if self.deterministic else super().__call__(x, rngs)


class Summed(networks.Pool):
    def __call__(self, x):
        return 4 * super().__call__(x)


class Reversed(networks.Flatten):
    def __call__(self, x):
        return super().__call__(x)[..., ::-1]


class Renamed(layers.Conv3x3):
    """Computes what its base does."""


def same(layer):
    """A builder of a layer that keeps the shape."""
    return lambda net, shape, rngs: (layer(shape, rngs), shape)


def masked(shape, rngs):
    mask = jnp.ones((3, 3, 4, 4)).at[0].set(0)
    return layers.Conv(4, 4, (3, 3), padding=1, use_bias=False, mask=mask, rngs=rngs)


def halving(net, shape, rngs):
    return Summed(False), (shape[0] // 2, shape[1] // 2, shape[2])


def reversing(net, shape, rngs):
    return Reversed(shape), (math.prod(shape),)


def twice():
    """A convolution that stands in the table twice, before two batch norms."""
    made = []

    def build(shape, rngs):
        made.append(made[0] if made else layers.Conv3x3(4, 4, rngs=rngs))
        return made[0]

    return [same(build), networks.norm, networks.neuron, same(build), networks.norm, networks.neuron]


norm = same(lambda shape, rngs: Halved(shape[-1]))
TABLES = {
    "used twice": twice,
    "batch norm": lambda: [networks.conv(4), norm, networks.neuron],
    "convolution": lambda: [same(lambda s, rngs: Rectified(4, 4, rngs=rngs)), networks.norm, networks.neuron],
    "dropout": lambda: [same(lambda s, rngs: Scaled(0.5))],
    "pooling": lambda: [halving],
    "masked": lambda: [same(masked), networks.norm, networks.neuron],
    "as its base": lambda: [same(lambda s, rngs: Renamed(4, 4, rngs=rngs)), networks.norm, networks.neuron],
    "flatten": lambda: [],
    "after a neuron": lambda: [networks.norm, networks.neuron],
    "linear": lambda: [same(lambda s, rngs: Standardised(4, 4, rngs=rngs)), networks.norm, networks.neuron],
}
HELD_BY_NIR = ("used twice", "masked", "as its base")


def network(name):
    """A network with some of one's own between the usual layers, busy, whose statistics have moved."""
    table = {
        "static_conv": [],
        "conv": [networks.conv(4), networks.norm, networks.neuron, *TABLES[name]()],
        "fc": [networks.flatten, networks.linear(8 * CLASSES), networks.norm, networks.neuron],
    }
    if name == "flatten":
        table["fc"][0] = reversing
    net = networks.SpikingNet(table, SHAPE, CLASSES, T=T, rngs=nnx.Rngs(0))
    for _, node in nnx.iter_graph(net):
        if isinstance(node, layers.BatchNorm):
            C = node.mean[...].size
            node.mean[...], node.var[...] = jnp.linspace(-0.2, 0.2, C), jnp.linspace(0.1, 0.2, C)
            node.bias[...] = jnp.linspace(0.5, 1.8, C)
    return net


def frames():
    return jnp.asarray(np.random.default_rng(0).poisson(0.7, (T, B, *SHAPE)), jnp.float32)


@pytest.mark.parametrize("name", TABLES)
def test_what_is_written_of_it_computes_the_same(name, tmp_path):
    net, x = network(name), frames()
    net.eval()
    rates = net(x)
    assert 0.05 < rates.mean() < 0.95 and rates.std() > 0.02
    np.testing.assert_allclose(fold(net)(x), rates, atol=1e-6)
    np.testing.assert_allclose(export.to_exported(net).call(x), rates, atol=1e-6)
    nir = pytest.importorskip("nir")
    from plif_jax.interop.nir import from_nir, to_nir

    if name in HELD_BY_NIR:
        nir.write(tmp_path / "net.nir", to_nir(net))
        np.testing.assert_allclose(from_nir(nir.read(tmp_path / "net.nir"))(x), rates, atol=1e-6)
    else:
        with pytest.raises(UserError, match=r"is a [HRS][a-z]+, which NIR|into which"):
            to_nir(net)


@pytest.mark.parametrize("name", ["convolution", "linear", "batch norm"])
def test_operations_of_what_it_does_are_not_guessed(name):
    with pytest.raises(UserError, match="whose operations nobody here can count"):
        operations.count(network(name), frames())
    reached = 4 * 4 * (4 * 4 + 16 * 6 + 16 * 9)  # 9 outputs of an inner pixel, 6 at an edge, 4 at a corner
    assert operations.count(network("as its base"), frames())["conv.3"].dense == reached
