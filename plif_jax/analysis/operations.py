"""What an inference costs: synaptic operations from real spikes, against the same network without spikes.

A spike that enters a convolution or linear layer adds a weight to every neuron it reaches: one accumulate for each.
How many it reaches, its fan-out, is counted exactly; at the border of a convolution it is smaller. A value that is
not a whole number (a pixel, an average of spikes) needs a multiply-accumulate for each instead.

Batch normalisation is not counted, for it folds into the weights; nor are the neurons' own updates and moving data,
which depend on the hardware.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from plif_jax.analysis.recording import evaluate
from plif_jax.errors import UserError
from plif_jax.layers import CONVOLUTIONS, LINEARS, BatchNorm, computes_as
from plif_jax.neurons import Neuron
from plif_jax.spiking_net import check_net

# Energy of one operation in picojoules, 45 nm CMOS, 32-bit floating point: an addition 0.9, a multiplication 3.7
# (Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014).
ACCUMULATE_PJ = 0.9
MULTIPLY_ACCUMULATE_PJ = 4.6

COUNTED = (*CONVOLUTIONS, *LINEARS)


@dataclass(frozen=True)
class LayerOperations:
    """Operations of one convolution or linear layer for each sample of a batch, all timesteps together."""

    accumulates: np.ndarray  # [B] int64, one per spike and neuron it reaches; an event frame's value n counts n times
    multiply_accumulates: np.ndarray  # [B] int64, one per analog value and neuron it reaches
    dense: int  # multiply-accumulates of one pass of the layer in a network without spikes


def count(net, x) -> dict[str, LayerOperations]:
    """Counts the operations of an inference, in evaluation mode, from rest.

    Args:
      net: a `SpikingNet`.
      x: images [B, H, W, C]: what sees them is analog and computed once, whatever T is; or frames [T, B, H, W, C].
        Values count as layers take them: in a bfloat16 network, rounded to bfloat16.

    Returns:
      {layer name: LayerOperations} in the order of the layers.

    Raises:
      UserError: no `SpikingNet`; a layer with weights is none of convolution, linear layer, batch norm and neuron; x is
        empty.
    """
    check_net(net)
    for name, layer in net.named_layers().items():
        known = isinstance(layer, Neuron) or computes_as(layer, *COUNTED, nnx.BatchNorm, BatchNorm)
        if not known and any(isinstance(node, nnx.Param) for _, node in nnx.iter_graph(layer)):
            raise UserError(f"{name} is a {type(layer).__name__}, whose operations nobody here can count")
    if 0 in np.shape(x):
        raise UserError(f"x of shape {np.shape(x)} holds nothing to count; give at least one sample and one timestep")
    graphdef, state = nnx.split(net)
    shapes = {}

    def note_shape(name, layer, entering, leaving):
        if computes_as(layer, *COUNTED):
            shapes[name] = entering.shape[2:]

    jax.eval_shape(partial(evaluate, observe=note_shape), graphdef, state, x)
    layers = net.named_layers()
    fan_outs = {name: fan_out(layers[name], shape) for name, shape in shapes.items()}
    # A common factor, the number of output channels, is taken out: what is left to sum fits 32 bits.
    units = {name: int(np.gcd.reduce(reach, axis=None)) for name, reach in fan_outs.items()}
    reduced = {name: (reach // units[name]).astype(np.int32) for name, reach in fan_outs.items()}
    counted = jax.device_get(_count(graphdef, state, x, reduced))
    operations = {}
    for name, reach in fan_outs.items():
        accumulates, multiplies = (units[name] * counts.astype(np.int64).sum(0) for counts in counted[name])
        operations[name] = LayerOperations(accumulates, multiplies, int(reach.sum()))
    return operations


def fan_out(layer, shape) -> np.ndarray:
    """How many output values each input value of a layer reaches, [*shape] int64, for an input of `shape`.

    It is the layer's transpose, all weights 1, applied to ones: so strides, padding and groups are all respected.
    """
    graphdef, weights = nnx.split(layer)
    # Made on the host: XLA would compute what follows from constants while it compiles.
    ones = jax.tree.map(lambda weight: np.ones(weight.shape, np.float32), weights)
    return np.rint(np.asarray(_reached(graphdef, shape, ones), np.float64)).astype(np.int64)


@partial(jax.jit, static_argnums=(0, 1))
def _reached(graphdef, shape, ones):
    layer = nnx.merge(graphdef, ones)
    layer.dtype = jnp.float32  # counts are whole, which bfloat16 would round
    y, transpose = jax.vjp(layer, jnp.zeros((1, *shape), jnp.float32))
    return transpose(jnp.ones_like(y))[0][0]


@partial(jax.jit, static_argnums=0)
def _count(graphdef, state, x, reach):
    counts = {}

    def observe(name, layer, entering, leaving):
        if name not in reach:
            return
        # Every pixel of a still image takes part, a black one too: its layer is dense.
        whole = (entering == jnp.round(entering)) & (not name.startswith("static_conv") or x.ndim == 5)
        spikes = jnp.where(whole, jnp.abs(entering), 0).astype(jnp.int32)
        analog = (~whole).astype(jnp.int32)
        counts[name] = tuple(
            jnp.sum(a * reach[name][None, None], axis=tuple(range(2, a.ndim))) for a in (spikes, analog)
        )

    evaluate(graphdef, state, x, observe)
    return counts


def energy(
    operations: Mapping[str, LayerOperations],
    accumulate_pj: float = ACCUMULATE_PJ,
    multiply_accumulate_pj: float = MULTIPLY_ACCUMULATE_PJ,
) -> tuple[np.ndarray, float]:
    """Estimated energy in joules of an inference [B], and of one pass of the same network without spikes.

    E = accumulates * accumulate_pj + multiply_accumulates * multiply_accumulate_pj, the usual estimate for arithmetic
    alone; the defaults are for 45 nm (Horowitz, ISSCC 2014).
    """
    layers = operations.values()
    spiking = sum(
        layer.accumulates * accumulate_pj + layer.multiply_accumulates * multiply_accumulate_pj for layer in layers
    )
    return spiking * 1e-12, sum(layer.dense for layer in layers) * multiply_accumulate_pj * 1e-12


def table(
    operations: Mapping[str, LayerOperations],
    accumulate_pj: float = ACCUMULATE_PJ,
    multiply_accumulate_pj: float = MULTIPLY_ACCUMULATE_PJ,
) -> str:
    """The counts as lines of text, in millions per sample (mean over the batch), with the energy below, of `energy`."""
    lines = [f"{'layer':<14}{'accumulates':>14}{'multiply-acc.':>15}{'without spikes':>16}   (millions per sample)"]
    totals = np.zeros(3)
    for name, layer in operations.items():
        row = np.array([layer.accumulates.mean(), layer.multiply_accumulates.mean(), layer.dense]) / 1e6
        totals += row
        lines.append(f"{name:<14}{row[0]:>14.3f}{row[1]:>15.3f}{row[2]:>16.3f}")
    lines.append(f"{'all':<14}{totals[0]:>14.3f}{totals[1]:>15.3f}{totals[2]:>16.3f}")
    spiking, dense = energy(operations, accumulate_pj, multiply_accumulate_pj)
    usual = (accumulate_pj, multiply_accumulate_pj) == (ACCUMULATE_PJ, MULTIPLY_ACCUMULATE_PJ)
    lines.append(
        f"energy {1e6 * np.mean(spiking):.2f} uJ against {1e6 * dense:.2f} uJ for one pass without spikes "
        f"({accumulate_pj} pJ an accumulate, {multiply_accumulate_pj} pJ a multiply-accumulate"
        f"{', for 45 nm: Horowitz, ISSCC 2014' if usual else ''})"
    )
    return "\n".join(lines)
