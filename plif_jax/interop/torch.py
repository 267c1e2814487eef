"""Weights of the paper authors' networks, by their names and in their layouts.

PyTorch keeps convolutions as OIHW and linear layers as out x in, and flattens feature maps channel first; here they
are HWIO, in x out, and channel last. PyTorch itself is not needed for this module.
"""

from collections.abc import Mapping
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from plif_jax.dtypes import is_real
from plif_jax.errors import UserError, first_line
from plif_jax.layers import BatchNorm
from plif_jax.networks import Flatten
from plif_jax.neurons import Neuron
from plif_jax.spiking_net import check_net


def _same(array):
    return array


def values_to_torch(values, flat_shape):
    """What each neuron of maps [..., H, W, C], or of these flattened, has as its own, channel first."""
    if flat_shape is not None and values.shape[-1:] == (prod(flat_shape),):
        return values_to_torch(values.reshape(*values.shape[:-1], *flat_shape), None).reshape(values.shape)
    if values.ndim < 3:
        return values
    *others, H, W, C = range(values.ndim)
    return values.transpose(*others, C, H, W)


def values_from_torch(values, flat_shape):
    """Undoes `values_to_torch`."""
    if flat_shape is not None and values.shape[-1:] == (prod(flat_shape),):
        H, W, C = flat_shape
        return values_from_torch(values.reshape(*values.shape[:-1], C, H, W), None).reshape(values.shape)
    if values.ndim < 3:
        return values
    *others, C, H, W = range(values.ndim)
    return values.transpose(*others, H, W, C)


def conv_to_torch(kernel):
    """HWIO to OIHW."""
    return kernel.transpose(3, 2, 0, 1)


def conv_from_torch(weight):
    """OIHW to HWIO."""
    return weight.transpose(2, 3, 1, 0)


def linear_to_torch(kernel, flat_shape):
    """(in, out) to (out, in); where the inputs are flattened (H, W, C), also puts them channel first."""
    return values_to_torch(kernel.T, flat_shape)


def linear_from_torch(weight, flat_shape):
    """(out, in) to (in, out); undoes `linear_to_torch`."""
    return values_from_torch(weight, flat_shape).T


def _entries(net):
    """Yields (name in the authors' program, variable here, array to their layout, array to ours), in their order."""
    check_net(net)
    flat_shape = None
    for name, layer in net.named_layers().items():
        known = list(_entries_of(name, layer, flat_shape))
        refuse_others(name, layer, [variable for _, variable, *_ in known])
        yield from known
        if isinstance(layer, Flatten | nnx.Linear):
            flat_shape = layer.shape if isinstance(layer, Flatten) else None


def _entries_of(name, layer, flat_shape):
    """Yields what `_entries` does, of one layer; flat_shape is (H, W, C) of the maps that were flattened before it."""
    values = [partial(moved, flat_shape=flat_shape) for moved in (values_to_torch, values_from_torch)]
    if isinstance(layer, nnx.Conv):
        yield f"{name}.weight", layer.kernel, conv_to_torch, conv_from_torch
        yield from _bias(name, layer)
    elif isinstance(layer, BatchNorm):
        yield f"{name}.weight", layer.scale, *values
        yield f"{name}.bias", layer.bias, *values
        yield f"{name}.running_mean", layer.mean, *values
        yield f"{name}.running_var", layer.var, *values
    elif isinstance(layer, Neuron):
        for path, variable in _parameters(layer):
            yield f"{name}.{path}", variable, *values
    elif isinstance(layer, nnx.Linear):
        there = partial(linear_to_torch, flat_shape=flat_shape)
        back = partial(linear_from_torch, flat_shape=flat_shape)
        yield f"{name}.weight", layer.kernel, there, back
        yield from _bias(name, layer)


def refuse_others(name, layer, known):
    """Refuses a layer with weights or running statistics besides the known variables: they would be lost."""
    known = {id(variable) for variable in known}
    for path, node in nnx.iter_graph(layer):
        if isinstance(node, nnx.Param | nnx.BatchStat) and id(node) not in known:
            kind = f"{type(layer).__module__.partition('.')[0]}'s {type(layer).__name__}"
            raise UserError(f"{name} is {kind}, whose {'.'.join(map(str, path))} has no place in what is written here")


def _bias(name, layer):
    """The entry of a layer's bias, if it has one."""
    if layer.bias is not None:
        yield f"{name}.bias", layer.bias, _same, _same


def _parameters(neuron):
    """(name, variable) of a neuron's parameters: w, surrogate_function.alpha, and whatever a custom one learns."""
    found = [(path, node) for path, node in nnx.iter_graph(neuron) if isinstance(node, nnx.Param)]
    for path, variable in sorted(found, key=lambda entry: (len(entry[0]), entry[0])):
        first, *rest = path
        yield ".".join(["surrogate_function" if first == "surrogate" else first, *map(str, rest)]), variable


def _counter_names(names):
    """BatchNorm2d also counts its calls; neither program reads the count."""
    return [name.replace("running_var", "num_batches_tracked") for name in names if name.endswith("running_var")]


def _weights(name, array):
    """An array of real numbers as NumPy's."""
    if np.ma.is_masked(array):
        raise UserError(f"{name} is masked in places; give an array that holds all its numbers")
    try:
        array = np.asarray(array)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; PyTorch's tensors that want a gradient
        raise UserError(f"{name} is no array that NumPy takes: {first_line(error)}") from None
    if array.dtype.kind != "b" and not is_real(array.dtype):
        raise UserError(f"{name} holds {array.dtype}; weights are real numbers")
    return array


def _some(names):
    """The first ten of many names; a file may have any number."""
    return ", ".join(map(str, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def state_dict(net):
    """The network's weights and running statistics as {name in the authors' program: NumPy array}.

    Raises:
      UserError: no `SpikingNet`; a layer has other weights than a convolution, linear layer, batch norm or neuron of
        ours.
    """
    arrays = {}
    for name, variable, to_torch, _ in _entries(net):
        arrays[name] = np.array(to_torch(np.asarray(variable[...])), order="C")  # a copy, which may be changed
        for counter in _counter_names([name]):
            arrays[counter] = np.zeros((), np.int64)
    return arrays


def load_state_dict(net, arrays):
    """Sets the network's weights and running statistics, in place, from {name in the authors' program: array}.

    Raises:
      UserError: a name is missing or unknown, a shape differs, what is given are no real numbers or larger than the
        network's type holds, or as `state_dict`; nothing is changed then.
    """
    if not isinstance(arrays, Mapping):
        raise UserError(f"weights are a {type(arrays).__name__}; give a mapping from names to arrays")
    entries = list(_entries(net))
    names = [name for name, *_ in entries]
    missing = [name for name in names if name not in arrays]
    known = {*names, *_counter_names(names)}
    unknown = [name for name in arrays if name not in known]
    if missing or unknown:
        parts = [f"missing: {_some(missing)}"] * bool(missing) + [f"unknown: {_some(unknown)}"] * bool(unknown)
        raise UserError(f"these weights are not of this {type(net).__name__}; {'; '.join(parts)}")
    values = []
    for name, variable, to_torch, from_torch in entries:
        array = _weights(name, arrays[name])
        expected = jax.eval_shape(to_torch, variable[...]).shape
        if array.shape != expected:
            raise UserError(f"{name} has shape {array.shape}; this {type(net).__name__} takes {expected}")
        given = from_torch(array)
        # A copy: on a CPU `asarray` may borrow the caller's memory, in which a PyTorch network trains on.
        with np.errstate(over="ignore"):  # said here
            value = jnp.array(given, variable[...].dtype)
        if (np.isinf(np.asarray(value)) & np.isfinite(given)).any():
            raise UserError(f"{name} holds numbers beyond the largest of {value.dtype}")
        values.append(value)
    for (_, variable, *_), value in zip(entries, values, strict=True):
        variable[...] = value
