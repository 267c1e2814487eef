"""A trained network as a NIR graph; `plif_jax.interop.nir` says what becomes of what."""

from collections import Counter
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import nir
import numpy as np
from flax import nnx

from plif_jax import neurons
from plif_jax.errors import UserError
from plif_jax.interop.fold import folded_layers
from plif_jax.interop.torch import conv_to_torch, linear_to_torch, refuse_others
from plif_jax.layers import CONVOLUTIONS, LINEARS, BatchNorm, computes_as
from plif_jax.networks import Flatten, Pool
from plif_jax.spiking_net import check_net

# SpikingJelly's and snnTorch's default step in seconds; snnTorch takes no other.
DT = 1e-4


def to_nir(net, dt=DT):
    """The network in evaluation mode as a `nir.NIRGraph`.

    Args:
      net: a `SpikingNet`; it is left as it is.
      dt: seconds that a timestep stands for; the simulator that reads the graph must step by the same.

    Raises:
      UserError: no `SpikingNet`; a layer that NIR cannot express, see `plif_jax.interop.nir`.
    """
    check_net(net)
    if not dt > 0:
        raise UserError(f"dt is {dt}; a timestep takes more than 0 seconds, {DT} for most simulators")
    nodes = {"input": nir.Input({"input": np.array(channels_first(net.shape))})}
    shape, flattened, fed_spikes = tuple(net.shape), None, False
    so_far = Counter()
    for called, layer in folded_layers(net).items():
        part = called.split(".")[0]
        name = f"{part}_{so_far[part]}"  # numbered as `fold` does; a dot would be a submodule in PyTorch
        so_far[part] += 1
        if computes_as(layer, *CONVOLUTIONS, *LINEARS):
            refuse_others(called, layer, (layer.kernel, layer.bias))
        if isinstance(layer, neurons.Neuron):
            nodes[name] = _neuron_to_nir(called, layer, partial(_of_each, shape, flattened), dt)
        elif computes_as(layer, *CONVOLUTIONS):
            nodes[name] = _conv_to_nir(called, layer, shape)
        elif computes_as(layer, *LINEARS):
            if len(shape) == 3:
                raise UserError(
                    f"{called} is a linear layer over the channels of maps; NIR's take vectors: flatten first"
                )
            nodes[name] = _linear_to_nir(layer, flattened)
            flattened = None
        elif computes_as(layer, Flatten):
            # Counted from the end: some simulators count the batch axis, others do not.
            nodes[name] = nir.Flatten({"input": np.array(channels_first(shape))}, start_dim=-3, end_dim=-1)
            flattened = shape
        elif computes_as(layer, Pool):
            nodes[name] = nir.AvgPool2d(*(np.array(pair) for pair in ((2, 2), (2, 2), (0, 0))))
            if layer.use_max:
                if not fed_spikes:
                    raise UserError(f"{called} takes the maximum of values that are not spikes; NIR has no max pooling")
                nodes[f"{name}_any"] = _any_spike(partial(_of_each, shape_after(layer, shape), None), dt)
        elif computes_as(layer, BatchNorm):
            raise UserError(f"{called} is a batch norm after no convolution or linear layer, into which it would fold")
        else:
            raise UserError(f"{called} is a {type(layer).__name__}, which NIR has no node for")
        # Where any of four spikes counts, so does any of sixteen; an average is no longer a spike.
        fed_spikes = isinstance(layer, neurons.Neuron) or (fed_spikes and isinstance(layer, Pool) and layer.use_max)
        shape = shape_after(layer, shape)
    nodes["vote"] = nir.Linear(np.ascontiguousarray(linear_to_torch(vote_weight(net.classes, shape[0]).T, flattened)))
    nodes["output"] = nir.Output({"output": np.array([net.classes])})
    names = list(nodes)
    return nir.NIRGraph(nodes, list(pairwise(names)), metadata={"dt": dt, "T": net.T})


def channels_first(shape):
    """(H, W, C) to (C, H, W); a vector's shape as it is."""
    return (shape[-1], *shape[:-1])


def shape_after(layer, shape):
    """The shape that a layer makes of `shape`, both without T and B."""
    x = jax.ShapeDtypeStruct((1, 1, *shape), jnp.float32)
    return jax.eval_shape(layer, x).shape[2:]


def vote_weight(classes, neurons_out):
    """Weight [classes, neurons_out] that averages each class's group of adjacent neurons."""
    group = neurons_out // classes
    return np.kron(np.eye(classes, dtype=np.float32), np.full((1, group), 1 / group, np.float32))


def _any_spike(of_each, dt):
    """A neuron that any spike in a window fires: one in four averages to 1/4, which tau = 2 dt halves to h = 1/8."""
    return _lif(of_each, tau=2 * dt, v_threshold=1 / 16, v_reset=0.0)


def _of_each(shape, flattened, setting):
    """A setting of neurons [H, W, C] or [N], one number or as their membranes broadcast it, as NIR lays them out.

    [N] that are flattened maps (H, W, C) lie channel first there.
    """
    setting = setting[...] if isinstance(setting, nnx.Variable) else setting
    maps = np.broadcast_to(np.asarray(setting), (1, *shape)).reshape(flattened or shape)
    return np.ascontiguousarray(np.moveaxis(maps, -1, 0)).reshape(channels_first(shape))


def _lif(of_each, tau, v_threshold, v_reset):
    # float64: a time constant in float32 would come back as another.
    tau, r, v_threshold, v_reset = map(of_each, (tau, 1.0, v_threshold, v_reset))
    return nir.LIF(tau=tau, r=r, v_leak=v_reset, v_threshold=v_threshold, v_reset=v_reset)


def _neuron_to_nir(name, neuron, of_each, dt):
    if neuron.v_reset is None:
        raise UserError(f"{name} has a soft reset, which NIR cannot express; its neurons reset to a fixed potential")
    if type(neuron) is neurons.PLIF:
        # Not 1 / neuron.tau: rounded twice, k would come back as another.
        return _lif(of_each, dt / np.asarray(neuron.k, float), neuron.v_threshold, neuron.v_reset)
    if type(neuron) is neurons.LIF:
        return _lif(of_each, dt * neuron.tau, neuron.v_threshold, neuron.v_reset)
    if type(neuron) is neurons.IF:
        r, v_threshold, v_reset = map(of_each, (1 / dt, neuron.v_threshold, neuron.v_reset))
        return nir.IF(r=r, v_threshold=v_threshold, v_reset=v_reset)
    raise UserError(f"{name} is a {type(neuron).__name__}; NIR has IF and LIF neurons, which PLIF becomes too")


def pair(setting):
    """A setting for height and width, given as one number or two, as two."""
    return tuple(np.broadcast_to(setting, 2).tolist())


def _conv_to_nir(name, conv, shape):
    if conv.feature_group_count != 1:
        raise UserError(f"{name} is a convolution in {conv.feature_group_count} groups; NIR's readers take one group")
    if pair(conv.input_dilation) != (1, 1):
        raise UserError(f"{name} dilates its input by {conv.input_dilation}, which NIR cannot express")
    padding, stride = conv.padding, pair(conv.strides)
    if isinstance(padding, str):
        # PyTorch, whose meaning NIR's words have, knows "same" for stride 1 only.
        expressible, padding = padding == "VALID" or (padding == "SAME" and stride == (1, 1)), padding.lower()
    else:
        # As `nnx.Conv` takes it: one number, or for height and width each a number or a pair.
        sides = [pair(side) for side in (pair(padding) if isinstance(padding, int) else padding)]
        expressible, padding = all(before == after for before, after in sides), [before for before, _ in sides]
    if not expressible:
        raise UserError(f"{name} pads by {conv.padding}; NIR has zero padding, the same before and after")
    kernel = np.asarray(conv.kernel[...] if conv.mask is None else conv.kernel[...] * conv.mask)
    return nir.Conv2d(
        input_shape=shape[:2],
        weight=np.ascontiguousarray(conv_to_torch(kernel)),
        stride=stride,
        padding=padding if isinstance(padding, str) else pair(padding),
        dilation=pair(conv.kernel_dilation),
        groups=1,
        bias=np.zeros(kernel.shape[-1], kernel.dtype) if conv.bias is None else np.asarray(conv.bias[...]),
    )


def _linear_to_nir(linear, flattened):
    weight = np.ascontiguousarray(linear_to_torch(np.asarray(linear.kernel[...]), flattened))
    return nir.Linear(weight) if linear.bias is None else nir.Affine(weight, np.asarray(linear.bias[...]))
