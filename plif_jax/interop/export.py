"""A trained network as one compiled function in a file, which runs without plif_jax.

    export.save(net, "mnist.jax")

and then, wherever JAX is (and flatbuffers: `pip install flatbuffers`), nothing else:

    import jax
    rates = jax.export.deserialize(open("mnist.jax", "rb").read()).call(x)

The file holds the weights and StableHLO, lowered for CPU, CUDA and TPU alike, which JAX keeps readable for at least six
months of releases.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from plif_jax import files, sequence
from plif_jax.dtypes import is_whole
from plif_jax.errors import UserError
from plif_jax.interop.fold import fold
from plif_jax.spiking_net import check_net

PLATFORMS = ("cpu", "cuda", "tpu")


def to_exported(net, batch_size=None):
    """The network in evaluation mode as a `jax.export.Exported` from x to firing rates, batch norm folded.

    Its `call(x)` gives the rates [B, classes] that `net(x)` gives, up to the rounding of the folded weights; in a type
    shorter than float32, such as bfloat16, that would change many, so there batch norm stays as it is. A network
    with a static part takes images [B, H, W, C], the others frames [T, B, H, W, C], in float32 (float64 under
    `jax_enable_x64`); T is the network's own.

    Args:
      net: a `SpikingNet`; it is left as it is.
      batch_size: B; None leaves it open, and the function takes any.

    Raises:
      UserError: no `SpikingNet`; batch_size is no whole number from 1.
    """
    check_net(net)
    if batch_size is not None and not (is_whole(batch_size) and batch_size < 2**31):
        raise UserError(f"batch_size is {batch_size!r}; give a whole number from 1 to 2**31 - 1, or nothing for any")
    if net.dtype is None or jnp.finfo(net.dtype).bits >= 32:
        evaluated = fold(net)
    else:
        evaluated = nnx.clone(net)
        evaluated.eval()
    graphdef, state = nnx.split(evaluated)
    B = jax.export.symbolic_shape("batch")[0] if batch_size is None else batch_size
    shape = (B, *net.shape) if net.static_conv else (net.T, B, *net.shape)
    x = jax.ShapeDtypeStruct(shape, jnp.result_type(float))
    with sequence.scanned():  # a GPU's kernels are not for other versions of JAX
        return jax.export.export(jax.jit(lambda x: nnx.merge(graphdef, state)(x)), platforms=PLATFORMS)(x)


def save(net, path, batch_size=None):
    """Writes the network's exported function to a file, and returns it.

    Arguments are those of `to_exported`.

    Raises:
      UserError: as `to_exported`, or flatbuffers is not installed.
    """
    exported = to_exported(net, batch_size)
    try:
        content = exported.serialize()
    except ImportError:
        raise UserError("writing a function needs the package flatbuffers: pip install flatbuffers") from None
    files.write(path, content)
    return exported
