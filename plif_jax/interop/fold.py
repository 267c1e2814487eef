"""A network reduced to what inference computes: no batch norm, no dropout."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from plif_jax.errors import UserError
from plif_jax.layers import BatchNorm, Dropout


def fold(net):
    """A copy of `net` for inference: batch norm folded into the layer before it, dropout left out.

        W' = W g,   b' = (b - mean) g + shift,   g = gain / sqrt(var + eps)   with the running mean and var

    The copy computes what `net` computes in evaluation mode up to rounding; `net` is left as it is. Layers keep their
    order, not their numbers: without the batch norm `conv.2` may be `conv.1`.

    Raises:
      UserError: a batch norm follows something other than a convolution or a linear layer.
    """
    folded = nnx.clone(net)
    folded.eval()
    last = None
    for part in folded.PARTS:
        layers = []
        for layer in getattr(folded, part):
            if isinstance(layer, BatchNorm):
                _absorb(last, layer)
            elif not isinstance(layer, Dropout):
                layers.append(last := layer)
        setattr(folded, part, nnx.List(layers))
    return folded


def _absorb(layer, norm):
    """Puts a batch norm into the weights before it, in float64: folding happens once, its rounding stays for good."""
    if not isinstance(layer, nnx.Conv | nnx.Linear):
        before = "nothing" if layer is None else type(layer).__name__
        raise UserError(f"batch norm after {before} cannot be folded; it can after a convolution or a linear layer")
    scale, shift, mean, var = (np.asarray(v[...], np.float64) for v in (norm.scale, norm.bias, norm.mean, norm.var))
    gain = scale / np.sqrt(var + norm.eps)
    kernel = np.asarray(layer.kernel[...], np.float64)
    bias = 0.0 if layer.bias is None else np.asarray(layer.bias[...], np.float64)
    dtype = layer.kernel[...].dtype
    layer.kernel = nnx.Param(jnp.asarray(kernel * gain, dtype))
    layer.bias = nnx.Param(jnp.asarray((bias - mean) * gain + shift, dtype))
    layer.use_bias = True
