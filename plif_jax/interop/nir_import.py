"""A network from a NIR graph; `plif_jax.interop.nir` says what becomes of what."""

import math

import jax.numpy as jnp
import nir
import numpy as np
from flax import nnx

from plif_jax import neurons
from plif_jax.errors import UserError
from plif_jax.interop.nir_export import channels_first, pair, shape_after, vote_weight
from plif_jax.interop.torch import conv_from_torch, linear_from_torch
from plif_jax.layers import Conv, Linear
from plif_jax.networks import Flatten, Pool
from plif_jax.spiking_net import SpikingNet


def from_nir(graph, *, dt=None, T=None):
    """The `SpikingNet` of a `nir.NIRGraph` that is a chain of layers; with no batch norm and no dropout.

    Layers before the first neuron become the static part: where there are any, the network takes still images and
    frames alike. A vector enters as an image of one pixel. LIF becomes LIF, IF becomes IF; an input gain r goes into
    the weights before the neuron. A last linear node that averages groups of neurons becomes the vote; without one,
    each output is a class of its own.

    Args:
      graph: Conv2d, AvgPool2d of 2x2, Flatten, Linear, Affine, LIF and IF nodes, one after the other.
      dt: seconds per timestep; None: as the graph's metadata has it.
      T: timesteps for which a still image is shown; None: likewise.

    Raises:
      UserError: the graph is no chain, lacks dt or T, or holds something these networks cannot express.
    """
    dt, T = (_from_metadata(graph, *setting) for setting in (("dt", dt), ("T", T)))
    if not (dt > 0 and T >= 1):
        raise UserError(f"dt is {dt} and T {T}; give dt in seconds above 0, and T of 1 or more")
    chain = _chain(graph)
    shape = tuple(int(size) for size in chain.pop(0)[1].output_type["output"])
    layers = []  # (layer, shape after it)
    if len(shape) == 1:
        layers.append((Flatten((1, 1, *shape)), shape))
        input_shape = (1, 1, *shape)
    elif len(shape) == 3:
        input_shape = shape = (*shape[1:], shape[0])
    else:
        raise UserError(f"the graph's input has shape {shape}; it is a vector (N,) or an image (C, H, W)")
    classes = _popped_vote(chain)
    flattened = None
    for name, node in chain:
        for field in ("weight", "bias", "r", "tau", "v_threshold", "v_leak", "v_reset"):
            values = getattr(node, field, None)
            if values is not None and not np.isfinite(values).all():
                raise UserError(f"{field} of {name} is not finite everywhere; mend the graph")
        if isinstance(node, nir.Flatten):
            if len(shape) == 3:
                flattened = shape
                layers.append((Flatten(shape), (int(np.prod(shape)),)))
        elif isinstance(node, nir.LIF | nir.IF) and _counts_any_spike(layers, node, dt):
            layers[-1] = (Pool(use_max=True), shape)
        elif isinstance(node, nir.LIF | nir.IF):
            layers.append((_neuron_from_nir(name, node, dt, layers), shape))
        elif isinstance(node, nir.Linear | nir.Affine):
            layers.append((_linear_from_nir(node, flattened), (node.weight.shape[0],)))
            flattened = None
        elif isinstance(node, nir.Conv2d | nir.AvgPool2d):
            layer = _conv_from_nir(name, node) if isinstance(node, nir.Conv2d) else _pool_from_nir(name, node)
            layers.append((layer, shape_after(layer, shape)))
        else:
            raise UserError(
                f"{name} is a {type(node).__name__}; Conv2d, AvgPool2d, Flatten, Linear, Affine, LIF and IF can be read"
            )
        shape = layers[-1][1]
    if len(shape) != 1:
        raise UserError(f"the graph's output has shape {channels_first(shape)}; it must be a vector of classes")
    if flattened is not None and 1 not in (flattened[-1], math.prod(flattened[:-1])):
        maps = channels_first(flattened)
        raise UserError(
            f"the graph flattens maps {maps} into its outputs, which have another order here; end in a Linear"
        )
    # The table's layers are there: nothing is drawn.
    return SpikingNet(_table(layers), input_shape, classes or shape[0], T=T, use_plif=False, rngs=nnx.Rngs(0))


def _from_metadata(graph, name, given):
    if given is None and name not in graph.metadata:
        raise UserError(f"the graph's metadata has no {name}; give {name} to from_nir")
    # Read from a file, it is a NumPy scalar.
    return np.asarray(graph.metadata[name]).item() if given is None else given


def _chain(graph):
    """The graph's nodes as [(name, node)] from the input on, without the output."""
    after = dict(graph.edges)
    names = [name for name, node in graph.nodes.items() if isinstance(node, nir.Input)][:1]
    while names and names[-1] in after and len(names) < len(graph.nodes):
        names.append(after[names[-1]])
    whole = sorted(names) == sorted(graph.nodes) and len(graph.edges) == len(names) - 1
    if not whole or not isinstance(graph.nodes[names[-1]], nir.Output):
        raise UserError("the graph is not one chain from input to output; branches and loops cannot be read")
    return [(name, graph.nodes[name]) for name in names[:-1]]


def _popped_vote(chain):
    """Takes the vote off the chain's end and says how many classes it has; None where there is none."""
    if len(chain) < 2 or not isinstance(chain[-1][1], nir.Linear) or not isinstance(chain[-2][1], nir.LIF | nir.IF):
        return None
    last = chain[-1][1]
    classes, neurons_out = last.weight.shape
    if neurons_out % classes or not np.array_equal(last.weight, vote_weight(classes, neurons_out)):
        return None
    chain.pop()
    return classes


def _table(layers):
    """Parts from layers: what comes before the first neuron, the feature maps, and from the flattening on."""
    kinds = [Flatten if isinstance(layer, Flatten) else isinstance(layer, neurons.Neuron) for layer, _ in layers]
    if True not in kinds:
        raise UserError("the graph has no neurons")
    first = kinds.index(True)
    flat = kinds.index(Flatten) if Flatten in kinds[first:] else first
    built = [lambda net, shape, rngs, built=pair: built for pair in layers]
    return {"static_conv": built[:first], "conv": built[first:flat], "fc": built[flat:]}


def _uniform(name, node, field):
    values = np.unique(getattr(node, field))
    if values.size != 1:
        raise UserError(f"{field} differs between the neurons of {name}; here the neurons of a layer share it")
    return float(values[0])


def _gain(node, dt):
    """By how much a unit of current moves a membrane at 0 in one timestep."""
    return np.min(node.r * dt if isinstance(node, nir.IF) else node.r * dt / node.tau)


def _counts_any_spike(layers, node, dt):
    """Whether an average-pooled window of spikes makes this neuron fire exactly where it holds one: max pooling."""
    if len(layers) < 2 or not isinstance(layers[-1][0], Pool) or layers[-1][0].use_max:
        return False
    before = layers[-2][0]
    spikes = isinstance(before, neurons.Neuron) or (isinstance(before, Pool) and before.use_max)
    forgets = not np.any(node.v_reset) and not (isinstance(node, nir.LIF) and np.any(node.v_leak))
    return spikes and forgets and np.all(node.v_threshold > 0) and np.max(node.v_threshold) < _gain(node, dt) / 4


def _neuron_from_nir(name, node, dt, layers):
    """The neuron of a node; where the node scales its input, the weights before it are scaled instead."""
    v_threshold, v_reset, r = (_uniform(name, node, field) for field in ("v_threshold", "v_reset", "r"))
    if isinstance(node, nir.IF):
        gain, neuron = r * dt, neurons.IF(v_threshold, v_reset)
    else:
        v_leak = _uniform(name, node, "v_leak")
        if v_leak != v_reset:
            raise UserError(f"{name} leaks to {v_leak} and resets to {v_reset}; here both are the same")
        gain, tau = r, _uniform(name, node, "tau")
        if not tau > dt:
            raise UserError(
                f"{name} has tau {tau:g} s at dt {dt:g} s; tau is above one timestep here: give a smaller dt"
            )
        neuron = neurons.LIF(tau / dt, v_threshold=v_threshold, v_reset=v_reset)
    if not np.isclose(gain, 1, rtol=1e-6):
        layer = layers[-1][0] if layers else None
        if not isinstance(layer, nnx.Conv | nnx.Linear):
            raise UserError(f"{name} scales its input by {gain:g}, and there are no weights before it to hold that")
        layer.kernel[...] *= gain
        if layer.bias is not None:
            layer.bias[...] *= gain
    return neuron


def _filled(layer, kernel, bias):
    layer.kernel[...] = jnp.array(kernel, float)  # a copy: on a CPU `asarray` may borrow the caller's memory
    if bias is not None:
        layer.bias[...] = jnp.array(bias, float)
    return layer


def _empty(use_bias):
    """Settings of a layer whose weights come later."""
    zeros = nnx.initializers.zeros
    return {"use_bias": use_bias, "kernel_init": zeros, "param_dtype": float, "rngs": nnx.Rngs(0)}


def _conv_from_nir(name, node):
    if node.groups != 1:
        raise UserError(f"{name} is a convolution in {node.groups} groups; one group can be read")
    features, inputs, *kernel_size = node.weight.shape
    padding = node.padding.upper() if isinstance(node.padding, str) else pair(node.padding)
    layer = Conv(
        inputs,
        features,
        tuple(kernel_size),
        strides=pair(node.stride),
        padding=padding,
        kernel_dilation=pair(node.dilation),
        **_empty(use_bias=True),
    )
    return _filled(layer, conv_from_torch(node.weight), node.bias)


def _linear_from_nir(node, flattened):
    kernel = linear_from_torch(node.weight, flattened)
    bias = node.bias if isinstance(node, nir.Affine) else None
    layer = Linear(kernel.shape[0], kernel.shape[1], **_empty(use_bias=bias is not None))
    return _filled(layer, kernel, bias)


def _pool_from_nir(name, node):
    if (pair(node.kernel_size), pair(node.stride), pair(node.padding)) != ((2, 2), (2, 2), (0, 0)):
        raise UserError(f"{name} pools {pair(node.kernel_size)} by {pair(node.stride)}; 2x2 by 2 can be read")
    return Pool(use_max=False)
