"""A network reduced to what inference computes: no batch norm, no dropout."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from plif_jax.layers import CONVOLUTIONS, LINEARS, BatchNorm, Dropout, computes_as


def fold(net):
    """A copy of `net` for inference: batch norm folded into the layer before it, dropout left out.

        W' = W g,   b' = (b - mean) g + shift,   g = gain / sqrt(var + eps)   with the running mean and var

    The copy computes what `net` computes in evaluation mode up to rounding; `net` is left as it is. Layers keep their
    order, not their numbers: without the batch norm `conv.2` may be `conv.1`. A batch norm after something other than
    a convolution or a linear layer stays, and so does a custom layer, whatever it is derived from.
    """
    folded, kept = nnx.clone(net), folded_layers(net)
    for part in folded.PARTS:
        setattr(folded, part, nnx.List([layer for name, layer in kept.items() if name.split(".")[0] == part]))
    return folded


def folded_layers(net):
    """The layers that `fold` leaves, as {name in `net`: layer}."""
    copy = nnx.clone(net)
    copy.eval()
    kept = {}
    for name, layer in copy.named_layers().items():
        before = next(reversed(kept), None)
        if before and computes_as(layer, BatchNorm) and computes_as(kept[before], *CONVOLUTIONS, *LINEARS):
            kept[before] = _absorbing(kept[before], layer)
        elif not computes_as(layer, Dropout):
            kept[name] = layer
    return kept


def _absorbing(layer, norm):
    """A layer with a batch norm in its weights, in float64: folding happens once, its rounding stays for good."""
    scale, shift, mean, var = (np.asarray(v[...], np.float64) for v in (norm.scale, norm.bias, norm.mean, norm.var))
    gain = scale / np.sqrt(var + norm.eps)
    kernel = np.asarray(layer.kernel[...], np.float64)
    bias = 0.0 if layer.bias is None else np.asarray(layer.bias[...], np.float64)
    dtype = layer.kernel[...].dtype
    layer = nnx.clone(layer)  # it may stand elsewhere too, before another batch norm or none
    layer.kernel = nnx.Param(jnp.asarray(kernel * gain, dtype))
    layer.bias = nnx.Param(jnp.asarray((bias - mean) * gain + shift, dtype))
    layer.use_bias = True
    return layer
