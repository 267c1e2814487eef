"""The paper's networks, each told as a table of layers, and the builders that tables are made of."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from plif_jax import neurons, surrogate
from plif_jax.catalog import DATASETS
from plif_jax.convolution import dot_general
from plif_jax.dtypes import is_whole
from plif_jax.errors import UserError
from plif_jax.layers import (
    BatchNorm,
    Conv3x3,
    Dropout,
    Linear,
    avg_pool,
    max_pool,
    torch_default_init,
)
from plif_jax.spiking_net import SpikingNet, vector


class Pool(nnx.Module):
    """2x2 pooling, by maximum or average."""

    def __init__(self, use_max: bool):
        self.use_max = use_max

    def __call__(self, x):
        """Halves height and width of x [..., H, W, C]."""
        return max_pool(x) if self.use_max else avg_pool(x)


class Flatten(nnx.Module):
    """Feature maps [T, B, H, W, C] of a known shape (H, W, C) to vectors [T, B, H * W * C]."""

    def __init__(self, shape: tuple[int, int, int]):
        self.shape = shape

    def __call__(self, x):
        """Joins the last three axes."""
        return x.reshape(*x.shape[:-3], math.prod(self.shape))


# Builders. `net` brings the settings, `shape` is (H, W, C) or (features,).


def conv(features):
    """3x3 convolution, padding 1, without bias.

    Raises:
      UserError: features is not a whole number from 1; what reaches the layer is no map (H, W, C).
    """

    _check_features("conv", features)

    def build(net, shape, rngs):
        *size, C = maps("a convolution", shape)
        return Conv3x3(C, features, dtype=net.dtype, rngs=rngs), (*size, features)

    return build


def _check_features(builder, features):
    if not is_whole(features):
        raise UserError(f"{builder}({features!r}): a layer has a whole number of features, 1 or more")


def _uniform(bound, key, shape, dtype):
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def linear(features=None, use_bias=False):
    """Linear layer; a quarter of its inputs wide where `features` is not given.

    Raises:
      UserError: features is not a whole number from 1, or none are left; what reaches the layer is no vector.
    """

    if features is not None:
        _check_features("linear", features)

    def build(net, shape, rngs):
        n_in = vector("a linear layer", shape)
        n_out = n_in // 4 if features is None else features
        if n_out == 0:
            raise UserError(f"{n_in} values reach the first linear layer, 4 at least are needed: give more channels")
        layer = Linear(
            n_in,
            n_out,
            use_bias=use_bias,
            kernel_init=torch_default_init,
            bias_init=partial(_uniform, n_in**-0.5),
            dot_general=dot_general,
            dtype=net.dtype,
            param_dtype=float,
            rngs=rngs,
        )
        return layer, (n_out,)

    return build


def maps(taker, shape):
    """(H, W, C) of what reaches a layer that takes maps.

    Raises:
      UserError: it is no map.
    """
    if len(shape) != 3:
        raise UserError(f"{taker} takes maps (H, W, C), but values of shape {shape} reach it: maps end at flatten")
    return shape


def norm(net, shape, rngs):
    """Batch normalisation per timestep."""
    return BatchNorm(shape[-1], dtype=net.dtype), shape


def neuron(net, shape, rngs):
    """PLIF, or LIF with tau = init_tau.

    w and alpha are float32 whatever the rest is: the paper's program declares them so, and under float64 the rounding
    of sigmoid(w) decides which neurons at the threshold fire.
    """
    atan = surrogate.ATan(learnable=net.alpha_learnable, param_dtype=jnp.float32)
    if net.use_plif:
        layer = neurons.PLIF(net.init_tau, param_dtype=jnp.float32, detach_reset=net.detach_reset, surrogate=atan)
    else:
        layer = neurons.LIF(net.init_tau, detach_reset=net.detach_reset, surrogate=atan)
    return layer, shape


def pool(net, shape, rngs):
    """2x2 pooling, by maximum or average as the network is set.

    Raises:
      UserError: what reaches the layer is no map, or one too small to be halved.
    """
    H, W, C = maps("pooling", shape)
    if min(H, W) < 2:
        raise UserError(f"a {H}x{W} feature map cannot be halved again: give a smaller number_layer")
    return Pool(net.use_max_pool), (H // 2, W // 2, C)


def flatten(net, shape, rngs):
    """Feature maps to one vector.

    Raises:
      UserError: what reaches the layer is no map.
    """
    H, W, C = maps("flatten", shape)
    return Flatten(shape), (H * W * C,)


def dropout(net, shape, rngs):
    """Dropout 0.5, the mask held over time."""
    return Dropout(0.5), shape


def mnist_table():
    """MNIST and Fashion-MNIST (Fang et al., 2021, Table 6)."""
    return {
        "static_conv": [conv(128), norm],
        "conv": [neuron, pool, conv(128), norm, neuron, pool],
        "fc": [flatten, dropout, linear(2048), neuron, dropout, linear(100), neuron],
    }


def cifar10_table():
    """CIFAR-10 (Fang et al., 2021, Table 6), without that table's second dropout, as in the paper's program."""
    block = [conv(256), norm, neuron]
    return {
        "static_conv": [conv(256), norm],
        "conv": [neuron, *block, *block, pool, *block, *block, *block, pool],
        "fc": [flatten, dropout, linear(2048), neuron, linear(100), neuron],
    }


def event_table(channels, number_layer, classes):
    """N-MNIST, CIFAR10-DVS, DVS128 Gesture (Fang et al., 2021, Table 6); nothing is static.

    The hidden layer is a quarter of its inputs, as in the paper's program; for CIFAR10-DVS Table 6 has 512, not 2048.
    """
    return {
        "static_conv": [],
        "conv": [conv(channels), norm, neuron, pool] * number_layer,
        "fc": [flatten, dropout, linear(), neuron, dropout, linear(10 * classes), neuron],
    }


class MNISTNet(SpikingNet):
    """conv 1-128, norm once; then each timestep P, pool, conv 128-128, norm, P, pool, and the linear layers.

    These are dropout, linear 6272-2048, P, dropout, linear 2048-100, P, where P is a layer of neurons.
    """

    def __init__(self, T=DATASETS["MNIST"].T, **settings):
        super().__init__(mnist_table(), DATASETS["MNIST"].shape, DATASETS["MNIST"].classes, T=T, **settings)


class FashionMNISTNet(MNISTNet):
    """The MNIST network, for Fashion-MNIST."""


class CIFAR10Net(SpikingNet):
    """conv 3-256, norm once; then each timestep P, 2 x [conv, norm, P], pool, 3 x [conv, norm, P], pool, linear layers.

    The convolutions are 256-256, the linear layers dropout, linear 16384-2048, P, linear 2048-100, P; P is a layer of
    neurons.
    """

    def __init__(self, T=DATASETS["CIFAR10"].T, **settings):
        super().__init__(cifar10_table(), DATASETS["CIFAR10"].shape, DATASETS["CIFAR10"].classes, T=T, **settings)


class EventNet(SpikingNet):
    """number_layer x [conv, norm, P, pool], then the linear layers; subclasses name the data set, hence the sensor.

    These are dropout, linear to a quarter, P, dropout, linear to ten for each class, P, where P is a layer of neurons.

    Args:
      T: the paper's if None. Frames bring their own number; T says what `interop.export` and `interop.nir` write.
      channels: width of every convolution; 128 in the paper.
      number_layer: number of convolutions, each halving the sensor.
      (others as in `SpikingNet`)

    Raises:
      UserError: as `SpikingNet`; or channels or number_layer is not a whole number from 1.
    """

    dataset: str

    def __init__(self, T=None, *, channels=None, number_layer=None, **settings):
        facts = DATASETS[self.dataset]
        channels = facts.channels if channels is None else channels
        number_layer = facts.number_layer if number_layer is None else number_layer
        if not is_whole(channels) or not is_whole(number_layer):
            raise UserError(f"channels is {channels} and number_layer {number_layer}; both are whole numbers from 1")
        table = event_table(channels, number_layer, facts.classes)
        super().__init__(table, facts.shape, facts.classes, T=facts.T if T is None else T, **settings)


class NMNISTNet(EventNet):
    """The paper's N-MNIST network: 34x34, two convolutions."""

    dataset = "NMNIST"


class CIFAR10DVSNet(EventNet):
    """The paper's CIFAR10-DVS network: 128x128, four convolutions."""

    dataset = "CIFAR10DVS"


class DVS128GestureNet(EventNet):
    """The paper's DVS128 Gesture network: 128x128, five convolutions, 11 classes."""

    dataset = "DVS128Gesture"


class ASLDVSNet(EventNet):
    """A network for ASL-DVS, 180x240, 24 classes. Ours: the paper's authors left theirs a stub."""

    dataset = "ASLDVS"


NETWORKS = {
    "MNIST": MNISTNet,
    "FashionMNIST": FashionMNISTNet,
    "CIFAR10": CIFAR10Net,
    "NMNIST": NMNISTNet,
    "CIFAR10DVS": CIFAR10DVSNet,
    "DVS128Gesture": DVS128GestureNet,
    "ASLDVS": ASLDVSNet,
    "Digits": NMNISTNet,
}
