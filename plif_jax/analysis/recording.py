"""What the neurons of a network did: currents, membranes, spikes and firing rates of every spiking layer.

A recording watches a `SpikingNet` from outside, layer by layer. The network stays as it is and pays nothing when nobody
looks; membranes are computed again from the currents, and kept of the chosen neurons only.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from plif_jax.dtypes import is_whole, wide
from plif_jax.errors import UserError
from plif_jax.neurons import Neuron
from plif_jax.spiking_net import check_net


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerRecord:
    """One spiking layer during T timesteps and B samples.

    `...` is the layer's own shape, (H, W, C) or (features,); where neurons were chosen it is (n,). Potentials and
    currents are in units of the paper's, in which the threshold is 1.
    """

    currents: jax.Array  # x [T, B, ...], the input of the neurons
    # The next two are None where neurons have several states, the first also where their `step` is their own.
    charges: jax.Array | None  # h [T, B, ...], after charging and before the reset: it fires where h >= threshold
    membranes: jax.Array | None  # v [T, B, ...], after the reset: what the next timestep starts from
    spikes: jax.Array  # s [T, B, ...], 0 or 1
    firing_rate: jax.Array  # [T, B], share of all neurons of the layer that fired
    neuron_rate: jax.Array  # layer's own shape, share of all timesteps and samples in which each neuron fired


def record(net, x, neurons=None, *, batch_size=None):
    """Runs a network in evaluation mode on x from rest, and returns what its spiking layers did.

    Compiled, it keeps of a large batch only what was chosen: with `neurons=0` the firing rates alone.

    Args:
      net: a `SpikingNet`; neither its mode nor its weights and statistics change.
      x: images [B, H, W, C] or frames [T, B, H, W, C].
      neurons: which neurons' currents, membranes and spikes to return: all (None), a number of them spread evenly over
        each layer, or {layer name: indices into the layer's flattened shape}, layers not named giving rates only.
      batch_size: samples at a time, to bound memory; the whole batch if None.

    Returns:
      Firing rates of the classes [B, classes], and {layer name: LayerRecord} in the order of the layers.

    Raises:
      UserError: no `SpikingNet`, a layer that does not exist, an index beyond its neurons, no such choice or
        batch_size, or an empty x.
    """
    check_net(net)
    if batch_size is not None and not is_whole(batch_size):
        raise UserError(f"batch_size is {batch_size}; give 1 or more samples at a time, or nothing for all")
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    if not x.size:
        raise UserError(f"x of shape {x.shape} holds nothing to record; give at least one sample and one timestep")
    graphdef, state = nnx.split(net)
    before = (slice(None),) * (x.ndim - 4)  # time, in frames
    size = x.shape[len(before)]
    chosen = _chosen(net, jax.ShapeDtypeStruct(x.shape, x.dtype), neurons)
    parts = []
    for start in range(0, size, batch_size or size):
        # Sliced where it is: of an array on the host no more than a part goes to the device.
        part = x[(*before, slice(start, start + (batch_size or size)))]
        parts.append(_record(graphdef, state, part, chosen))
    rates, layers = parts[0] if len(parts) == 1 else _joined(parts)
    return rates, {name: layers[name] for name in chosen}  # jit sorts by name: conv.10 before conv.2


def _chosen(net, x, neurons):
    """{layer: flat indices [n], or None for all}, checked against the layers' shapes."""
    sizes = {}

    def observe(name, layer, entering, leaving):
        if name in names:
            sizes[name] = int(np.prod(leaving.shape[2:]))

    names = net.named_neurons()
    jax.eval_shape(partial(evaluate, observe=observe), *nnx.split(net), x)
    if neurons is None:
        return dict.fromkeys(sizes)
    if is_whole(neurons, 0):
        return {name: np.linspace(0, n - 1, min(neurons, n)).astype(int) for name, n in sizes.items()}
    if not isinstance(neurons, Mapping):
        raise UserError(f"neurons is {neurons}; give how many, or {{layer: indices}} for some of {', '.join(sizes)}")
    if unknown := neurons.keys() - sizes.keys():
        raise UserError(f"no spiking layer {min(unknown, key=str)}; this network's are {', '.join(sizes)}")
    chosen = {name: _indices(name, neurons.get(name, ())) for name in sizes}
    for name, index in chosen.items():
        if (beyond := index[(index < 0) | (index >= sizes[name])]).size:
            raise UserError(f"neuron {beyond[0]} of {name}: it has {sizes[name]} neurons, counted from 0")
    return chosen


def _indices(name, given):
    """A layer's chosen neurons as indices [n]."""
    try:
        indices = np.asarray(given)
        if indices.ndim == 1 and (not indices.size or indices.dtype.kind in "iu"):
            return indices.astype(int)
    except ValueError:  # lists of several lengths
        pass
    raise UserError(f"neurons of {name} are {given}; give a list of whole numbers, counted from 0")


def evaluate(graphdef, state, x, observe):
    """Firing rates [B, classes] of a split network in evaluation mode, watched by `observe`; pure."""
    net = nnx.merge(graphdef, state)
    net.eval()
    return net(x, observe=observe)


@partial(jax.jit, static_argnums=0)
def _record(graphdef, state, x, chosen):
    records = {}

    def observe(name, layer, entering, leaving):
        if name in chosen:
            records[name] = _layer_record(layer, entering, leaving, chosen[name])

    return evaluate(graphdef, state, x, observe), records


def _layer_record(neuron, currents, spikes, index):
    T, B = spikes.shape[:2]
    counted = wide(spikes)
    firing_rate = counted.reshape(T, B, -1).mean(-1)
    neuron_rate = counted.mean((0, 1))

    def of_chosen(a):
        axes_before = a.ndim - (currents.ndim - 2)
        return a if index is None else a.reshape(*a.shape[:axes_before], -1)[..., index]

    if neuron.rest(currents).shape != currents.shape[1:]:
        return LayerRecord(of_chosen(currents), None, None, of_chosen(spikes), firing_rate, neuron_rate)
    if index is not None and not index.size:  # nothing to scan for
        nothing = jnp.zeros((T, B, 0), currents.dtype)
        charges = nothing if type(neuron).step is Neuron.step else None
        return LayerRecord(nothing, charges, nothing, nothing, firing_rate, neuron_rate)
    # All neurons charge, for a custom neuron may have parameters for each; what is kept is what was chosen.
    charges, membranes, _ = charge_fire_reset(neuron, currents, of_chosen)
    return LayerRecord(of_chosen(currents), charges, membranes, of_chosen(spikes), firing_rate, neuron_rate)


def charge_fire_reset(neuron, x, of_chosen=lambda a: a):
    """h before firing, v after the reset, and spikes s, all [T, ...], of neurons at rest for currents x [T, ...].

    h is None where the neurons' `step` is their own, which need not charge as their `charge` does.

    Raises:
      UserError: a neuron has several states.
    """
    charges = type(neuron).step is Neuron.step

    def step(v, x):
        h = neuron.charge(v, x.astype(v.dtype)) if charges else None
        v, s = neuron.step(v, x)
        return v, jax.tree.map(of_chosen, (h, v, s))

    rest = neuron.rest(x)
    if rest.shape != x.shape[1:]:
        raise UserError(
            f"{type(neuron).__name__} has states {rest.shape} for neurons {x.shape[1:]}; one each is recorded"
        )
    return jax.lax.scan(step, rest, x)[1]


@jax.jit
def _joined(parts):
    """The records of consecutive parts of a batch, as one."""
    rates, layers = zip(*parts, strict=True)
    share = [len(r) / sum(map(len, rates)) for r in rates]
    joined = {}
    for name in layers[0]:
        records = [layer[name] for layer in layers]
        along_batch = {
            field: jnp.concatenate([getattr(r, field) for r in records], axis=1)
            for field in ("currents", "charges", "membranes", "spikes", "firing_rate")
            if getattr(records[0], field) is not None
        }
        neuron_rate = sum(w * r.neuron_rate for w, r in zip(share, records, strict=True))
        joined[name] = dataclasses.replace(records[0], **along_batch, neuron_rate=neuron_rate)
    return jnp.concatenate(rates), joined
