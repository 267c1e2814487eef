"""Layers that know about time: sequences [T, B, ...] in, sequences out.

Convolutions and linear layers need no time of their own: they see T * B as one batch, as `flax.nnx.Conv` and
`flax.nnx.Linear` do for any leading axes. What is here differs from its usual form because of time, because spikes
tie, or because the paper's program initialises as PyTorch does.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from plif_jax.batch_statistics import normalize
from plif_jax.convolution import conv3x3, suits_rows, suits_winograd
from plif_jax.dtypes import is_whole, wide
from plif_jax.errors import UserError
from plif_jax.mapped import vary_alike

_uniform_fan_in = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_default_init(key, shape, *arguments, **named):
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for convolutions and linear layers."""
    # The same numbers as for the kernel's own shape, but XLA takes a third of a second to compile those of four axes.
    flat = (math.prod(shape[:-1]), shape[-1]) if len(shape) > 2 else shape
    return _uniform_fan_in(key, flat, *arguments, **named).reshape(shape)


class BatchNorm(nnx.Module):
    """Batch normalisation of each timestep by its own statistics.

        y[t] = (x[t] - mean[t]) / sqrt(var[t] + eps) * scale + bias,   mean, var (biased) over all axes of x[t] but C
        running = (1 - momentum) running + momentum statistics[t],     once per timestep, in order; var unbiased

    This is what a PyTorch BatchNorm2d called once per timestep does (Ioffe and Szegedy, 2015), all timesteps at once.
    In evaluation mode (`use_running_average`) the running statistics normalise.

    Args:
      num_features: C, the size of the last axis.
      momentum: weight of the newest timestep in the running statistics, as in PyTorch; `nnx.BatchNorm`'s is 1 minus it.
      eps: added to the variance, so that a channel that never changes is not divided by 0.
      axis_name: mapped axis over whose devices the batch is spread; statistics are those of the whole batch.
      dtype: of the result; statistics are computed in float32 or better.
    """

    def __init__(self, num_features, *, momentum=0.1, eps=1e-5, axis_name=None, dtype=None):
        self.scale = nnx.Param(jnp.ones(num_features, float))
        self.bias = nnx.Param(jnp.zeros(num_features, float))
        self.mean = nnx.BatchStat(jnp.zeros(num_features, float))
        self.var = nnx.BatchStat(jnp.ones(num_features, float))
        self.momentum, self.eps, self.axis_name, self.dtype = momentum, eps, axis_name, dtype
        self.use_running_average = False

    def __call__(self, x_TBC):
        """Normalises x [T, B, ..., C]; in training mode also moves the running statistics T times.

        Raises:
          UserError: x has another number of channels.
        """
        x_TBC = _floating(x_TBC)
        _check_channels(x_TBC, self.scale[...].size)
        along_C = (1,) * (x_TBC.ndim - 1) + (-1,)
        scale, bias = self.scale[...].reshape(along_C), self.bias[...].reshape(along_C)
        if self.use_running_average:
            mean, var = wide(self.mean[...]).reshape(along_C), wide(self.var[...]).reshape(along_C)
            y = (wide(x_TBC) - mean) * (scale * lax.rsqrt(var + self.eps)) + bias
        else:
            y, mean, var = normalize(self.eps, self.axis_name, *vary_alike(x_TBC, scale, bias))
            self.track(x_TBC, mean, var)
        return y.astype(self.dtype or x_TBC.dtype)

    def track(self, x_TBC, mean, var):
        """Moves the running statistics by those [T, 1, ..., C] of the timesteps of x."""
        if 0 in x_TBC.shape:  # of no values there are no statistics
            return
        count = math.prod(x_TBC.shape[1:-1]) * (1 if self.axis_name is None else lax.axis_size(self.axis_name))
        self._move(self.mean, mean)
        # One value per channel has no unbiased variance; PyTorch refuses it, the biased one is finite.
        self._move(self.var, var * (count / max(count - 1, 1)))

    def _move(self, running, new):
        """T exponential moving averages in one sum: (1 - m)^T r + sum over t of m (1 - m)^(T-1-t) new[t]."""
        new_TC = new.reshape(len(new), -1)
        T = len(new)
        keep, before = 1 - self.momentum, wide(running[...])
        weights_T = self.momentum * keep ** jnp.arange(T - 1, -1, -1, dtype=before.dtype)
        # In full precision: GPUs and TPUs would round the statistics before they multiply.
        moved = keep**T * before + jnp.matmul(weights_T, new_TC, precision=lax.Precision.HIGHEST)
        running[...] = moved.astype(running[...].dtype)

    def set_view(self, use_running_average: bool | None = None):
        """For `nnx.view`: whether running statistics normalise, as in evaluation."""
        if use_running_average is not None:
            self.use_running_average = use_running_average


def _floating(x):
    """Whole numbers, as frames may be kept, as floating-point ones."""
    return x.astype(jnp.result_type(x, float))


def _check_channels(x, C):
    if x.shape[-1] != C:
        raise UserError(f"x of shape {x.shape} has {x.shape[-1]} channels, its last axis; this takes {C}")


class _InPieces:
    """A layer that, in evaluation on a CPU, always works on the same number of rows or images at a time.

    The order of summation depends on that number. With it fixed (zeros fill up the last piece) a sequence in chunks
    gives exactly what one call gives. Run parallel streams as one batch: under `jax.vmap` each is filled up by itself.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.use_running_average = False  # named as in `BatchNorm`: what Flax switches for evaluation

    def _in_pieces(self, base, x, feature_axes, size):
        """`base`'s result for x [T, B, features ...], in evaluation on a CPU `size` of the T B at a time."""
        if not self.use_running_average or not isinstance(math.prod(x.shape[:-feature_axes]), int):
            return base.__call__(self, x)  # exported for any B, they cannot be counted
        return _by_pieces(base, feature_axes, size, *nnx.split(self), x)

    def set_view(self, use_running_average: bool | None = None):
        """For `nnx.view`: evaluation mode, named as in `BatchNorm`."""
        if use_running_average is not None:
            self.use_running_average = use_running_average


@partial(jax.jit, static_argnums=(0, 1, 2, 3))  # called outside jit it is traced once and not at every call
def _by_pieces(base, feature_axes, size, graphdef, state, x):
    layer = partial(base.__call__, nnx.merge(graphdef, state))
    leading, features = x.shape[:-feature_axes], x.shape[-feature_axes:]
    count = math.prod(leading)

    def by_pieces(x):
        filled = jnp.pad(x.reshape(count, *features), [(0, -count % size)] + [(0, 0)] * feature_axes)
        y = lax.map(layer, filled.reshape(-1, size, *features))
        return y.reshape(-1, *y.shape[2:])[:count].reshape(*leading, *y.shape[2:])

    return lax.platform_dependent(x, cpu=by_pieces, default=layer)


class Linear(_InPieces, nnx.Linear):
    """`flax.nnx.Linear` over sequences [T, B, features], which in evaluation on a CPU takes `ROWS` rows at a time.

    Initial weights are Flax's; `networks.linear` has PyTorch's.
    """

    ROWS = 32  # more make live inference slower, fewer read the kernel more often

    def __call__(self, x_TBF):
        """x [T, B, in] to [T, B, out]."""
        return self._in_pieces(nnx.Linear, x_TBF, 1, self.ROWS)


class Conv(_InPieces, nnx.Conv):
    """`flax.nnx.Conv` over sequences [T, B, H, W, C], which in evaluation on a CPU goes image by image.

    Initial weights are Flax's; `Conv3x3` has PyTorch's.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name in ("strides", "padding", "kernel_dilation", "input_dilation"):  # Flax takes lists, `jax.jit` does not
            setattr(self, name, _as_tuples(getattr(self, name)))

    def __call__(self, x_TBHWC):
        """x [T, B, H, W, C] to [T, B, H', W', features]."""
        return self._in_pieces(nnx.Conv, x_TBHWC, len(self.kernel_size) + 1, 1)


class Conv3x3(Conv):
    """3x3 convolution without bias, padding 1, by `convolution.conv3x3`; initialised as PyTorch does."""

    def __init__(self, in_features, features, *, dtype=None, param_dtype=float, rngs):
        super().__init__(
            in_features,
            features,
            (3, 3),
            padding=1,
            use_bias=False,
            kernel_init=torch_default_init,
            conv_general_dilated=_conv3x3,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, x_TBHWC):
        """x [T, B, H, W, C] to [T, B, H, W, features]. Raises a UserError where x has another number of channels."""
        H, W, C = x_TBHWC.shape[-3:]
        _check_channels(x_TBHWC, self.in_features)
        maps = (H, W, C), self.out_features, self.dtype or x_TBHWC.dtype
        # Winograd's products of 64 rows or more gave the same bits for any number of images, smaller ones did not; of
        # bfloat16, in the CPU's units, all did.
        together = (suits_winograd(*maps) and -(-H // 2) * -(-W // 2) >= 64) or suits_rows(*maps)
        return nnx.Conv.__call__(self, x_TBHWC) if together else super().__call__(x_TBHWC)


CONVOLUTIONS, LINEARS = (nnx.Conv, Conv, Conv3x3), (nnx.Linear, Linear)


def computes_as(layer, *kinds):
    """Whether a layer is of one of these kinds without a call of its own, which might do anything."""
    return isinstance(layer, kinds) and type(layer).__call__ in [kind.__call__ for kind in kinds]


def _as_tuples(setting):
    """A setting with tuples for its lists."""
    return tuple(map(_as_tuples, setting)) if isinstance(setting, list | tuple) else setting


def _conv3x3(x, kernel, *args, **kwargs):
    """What `nnx.Conv` asks of its convolution; strides, padding and layout are always these."""
    return conv3x3(x, kernel)


def dropout_key(rngs, B):
    """A typed key, or keys [B], from what a caller gives: such keys, `jax.random.PRNGKey`s, nnx.Rngs or a stream.

    Raises:
      UserError: it is none of these, or not one key and not one for each sample.
    """
    if rngs is None:
        raise UserError(
            "dropout in training mode needs a key: call net(x, rngs=jax.random.key(0)) to train, net.eval() to "
            "evaluate, or switch it off alone with net.set_attributes(deterministic=True)"
        )
    if isinstance(rngs, nnx.RngStream):
        return rngs()
    if isinstance(rngs, nnx.Rngs):
        if not {"dropout", "default"} & set(rngs):
            raise UserError(f"rngs has the streams {', '.join(rngs)}; give nnx.Rngs(0), or nnx.Rngs(dropout=0)")
        return rngs.dropout()
    try:
        keys = rngs if _is_key(rngs) else jax.random.wrap_key_data(rngs)
    except (TypeError, ValueError, AttributeError):  # what JAX says to anything else
        shape = f", shape {np.shape(rngs)}" if isinstance(rngs, jax.Array | np.ndarray) else ""
        raise UserError(
            f"rngs is of type {type(rngs).__name__}{shape}; give jax.random.key(0), a key per sample, or nnx.Rngs(0)"
        ) from None
    if keys.shape not in ((), (B,)):
        raise UserError(f"rngs are keys {list(keys.shape)} for {B} samples; give one key, or one for each sample")
    return keys


def _is_key(rngs):
    return jnp.issubdtype(rngs.dtype, jax.dtypes.prng_key)


class Dropout(nnx.Module):
    """Dropout whose mask is drawn once per sample and held for all T timesteps; kept values are scaled by 1/(1-rate).

    The paper's program does so: a unit is absent for the whole presentation, not flickering. The model keeps no RNG
    state: training passes a key at the call, either one, or one per sample [B] - then the masks do not depend on how
    the batch is spread over devices (of JAX's generators that holds for threefry, the usual one).

    Args:
      rate: share of the units that are dropped, 0 to 1.

    Raises:
      UserError: rate is no such share.
    """

    def __init__(self, rate):
        if not isinstance(rate, int | float | np.number | jax.Array) or not 0 <= rate <= 1:
            raise UserError(f"a dropout rate of {rate!r}; give the share of units to drop, 0 to 1")
        self.rate = rate
        self.deterministic = False

    @property
    def drops(self):
        """Whether it does anything, and needs a key for it."""
        return not self.deterministic and self.rate > 0

    def __call__(self, x_TBF, rngs=None):
        """Masks x [T, B, ...]; rngs is a key, keys [B], or nnx.Rngs. Identity in evaluation mode or at rate 0.

        Raises:
          UserError: no key in training mode, no such key, or not one for each sample.
        """
        if not self.drops:
            return x_TBF
        B = x_TBF.shape[1]
        keys = dropout_key(rngs, B)
        if self.rate == 1:
            return jnp.zeros_like(x_TBF)
        keys_B = keys if keys.ndim else jax.random.split(keys, B)
        keep_BF = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, x_TBF.shape[2:]))(keys_B)
        return jnp.where(keep_BF[None], x_TBF / (1 - self.rate), 0)

    def set_view(self, deterministic: bool | None = None):
        """For `nnx.view`: whether the dropout is off."""
        if deterministic is not None:
            self.deterministic = deterministic


def _windows(x):
    """The four values of every 2x2 window of x [..., H, W, C] with even H and W, row-major."""
    *leading, H, W, C = x.shape
    # Not x[..., i::2, j::2, :]: at such slices of N-MNIST's network in bfloat16 the compiler for TPUs ends the program.
    x = x.reshape(*leading, H // 2, 2, W // 2, 2, C)
    return [x[..., i, :, j, :] for i in (0, 1) for j in (0, 1)]


def _even(x):
    """x [..., H, W, C] without an odd last row or column."""
    if x.ndim < 3:
        raise UserError(f"x of shape {x.shape}; pooling takes maps [..., H, W, C]")
    H, W = x.shape[-3] // 2 * 2, x.shape[-2] // 2 * 2
    return x[..., :H, :W, :]


@partial(jax.jit, inline=True)  # a call outside jit is one program
def max_pool(x):
    """2x2 max pooling of x [..., H, W, C] to [..., H // 2, W // 2, C], an odd last row or column dropped.

    The gradient goes to the first maximum of a window, row-major, as in PyTorch. Spikes tie constantly: `jnp.max` would
    share the gradient among all of them, which trains another network.

    Raises:
      UserError: x has fewer than three axes.
    """
    return _max_pool(_even(x))


@jax.custom_vjp
def _max_pool(x):
    a, b, c, d = _windows(x)
    return jnp.maximum(jnp.maximum(a, b), jnp.maximum(c, d))


def _max_pool_forward(x):
    top, *others = _windows(x)
    first = jnp.zeros(top.shape, jnp.uint8)
    for i, value in enumerate(others, 1):
        larger = (value > top) | jnp.isnan(value)
        top, first = jnp.where(larger, value, top), jnp.where(larger, jnp.uint8(i), first)
    # Kept, and not made again from x: of all that the gradient needs a byte for every window is the least.
    return top, lax.optimization_barrier(first)


def _max_pool_backward(first, g):
    *leading, H, W, C = g.shape
    first, g = (array.reshape(*leading, H, 1, W, 1, C) for array in (first, g))
    place = jnp.arange(4, dtype=jnp.uint8).reshape(*[1] * len(leading), 1, 2, 1, 2, 1)  # in a window, row-major
    return (jnp.where(first == place, g, 0).reshape(*leading, 2 * H, 2 * W, C),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


@partial(jax.jit, inline=True)
def avg_pool(x):
    """2x2 average pooling of x [..., H, W, C] to [..., H // 2, W // 2, C], an odd last row or column dropped.

    Raises:
      UserError: x has fewer than three axes.
    """
    a, b, c, d = _windows(_floating(_even(x)))
    return (a + b + c + d) / 4


def vote(spikes_TBN, classes):
    """Averages each class's group of adjacent output neurons: [T, B, N] to [T, B, classes].

    Raises:
      UserError: spikes are not [T, B, N], or N is no multiple of classes.
    """
    return _groups(spikes_TBN, classes).mean(-1)


def firing_rates(spikes_TBN, classes):
    """Share of timesteps and of its group's neurons in which each class fired: [T, B, N] to [B, classes].

    The votes' mean over time, but whole spikes are summed before one division: classes with as many spikes have the
    same rate to the bit, whatever the batch, the devices and the precision, and `argmax` takes the first of them.

    Raises:
      UserError: as `vote`.
    """
    groups = _groups(spikes_TBN, classes)
    return groups.sum((0, 3)) / (groups.shape[0] * groups.shape[3])


def _groups(spikes_TBN, classes):
    if spikes_TBN.ndim != 3:
        raise UserError(f"spikes of shape {spikes_TBN.shape}; give [T, B, N]")
    T, B, N = spikes_TBN.shape
    if not is_whole(classes) or N % classes:
        raise UserError(f"{N} outputs for {classes!r} classes; give as many for each class")
    return wide(spikes_TBN.reshape(T, B, classes, N // classes))
