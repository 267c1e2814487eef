"""What a network costs at the least: multiplications and memory traffic, from its table of layers."""

from math import prod

import jax
import jax.numpy as jnp
from flax import nnx

from plif_jax.networks import NETWORKS, Pool
from plif_jax.neurons import Neuron


def _observed(network, batch=1):
    """(layer, shape entering, shape leaving) of every layer of a network {"name", "T", "channels", "number_layer"}."""
    settings = {key: network[key] for key in ("T", "channels", "number_layer") if network[key] is not None}
    net = nnx.eval_shape(lambda: NETWORKS[network["name"]](rngs=nnx.Rngs(0), **settings))
    net.eval()
    graphdef, weights = nnx.split(net)
    seen = []

    def forward(weights, x):
        net = nnx.merge(graphdef, weights)
        return net(
            x, observe=lambda name, layer, entering, leaving: seen.append((layer, entering.shape, leaving.shape))
        )

    still = len(net.static_conv) > 0
    shape = (batch, *net.shape) if still else (net.T, batch, *net.shape)
    jax.eval_shape(forward, weights, jax.ShapeDtypeStruct(shape, jnp.float32))
    return seen


def _multiply_adds(network):
    """Multiply-adds of one sample's forward pass, convolution by convolution and linear layer by linear layer."""
    return [
        prod(leaving) * entering[-1] * (9 if isinstance(layer, nnx.Conv) else 1)
        for layer, entering, leaving in _observed(network)
        if isinstance(layer, nnx.Conv | nnx.Linear)
    ]


def multiply_adds(network):
    """Multiply-adds of one sample's forward pass; convolutions and linear layers only, the static part once."""
    return sum(_multiply_adds(network))


def training_operations(network):
    """Operations of one sample's training step: the forward pass, and as many for each of a layer's two gradients.

    But the first layer's input is data, whose gradient nobody computes.
    """
    return 6 * multiply_adds(network) - 2 * _multiply_adds(network)[0]


def traffic(network, batch):
    """Bytes, in float32, that a training step of `batch` samples moves if each layer fuses into one pass.

    Forward, what enters a layer is read and what leaves it written; backward, the input is read again, the gradient
    that comes read and the one that goes written. A parameter is read twice, its gradient written and read, and Adam
    reads and writes it and its two moments.
    """
    values, parameters = 0, 0
    for layer, entering, leaving in _observed(network, batch):
        if isinstance(layer, nnx.Conv | nnx.Linear):
            parameters += layer.kernel[...].size
        if isinstance(layer, Neuron | nnx.Conv | nnx.Linear | Pool):
            values += 3 * prod(entering) + 2 * prod(leaving)
    return 4 * (values + 10 * parameters)
