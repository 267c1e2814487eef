"""Statistics of each timestep's batch, and what normalising by them sends back."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from plif_jax.dtypes import wide
from plif_jax.mapped import mean_over_devices


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def normalize(eps, axis_name, x, scale, bias):
    """x [T, B, ..., C] normalised by its statistics [T, 1, ..., C], and these, which send back no gradient.

    scale and bias are [1, ..., C].

    The gradient in closed form (Ioffe and Szegedy, 2015), for g = dL/dy, x^ = (x - mean) / sqrt(var + eps) and means
    over what shares a statistic,

        dL/dx = (g - mean(g) - x^ mean(g x^)) scale / sqrt(var + eps)

    reads x and g twice; differentiated line by line it would read them five times.
    """
    return _forward(eps, axis_name, x, scale, bias)[0]


def _forward(eps, axis_name, x, scale, bias):
    mean, var = statistics(x, axis_name)
    inverse = lax.rsqrt(var + eps)
    y = (wide(x) - mean) * (scale * inverse) + bias
    return (y, mean, var), (x, scale, bias, mean, inverse)


def statistics(x, axis_name):
    """Mean and biased variance [T, 1, ..., C] of each timestep of x [T, B, ..., C]."""

    def in_two_passes(x):
        mean = _mean(wide(x))
        return mean, _mean(jnp.square(wide(x) - mean))

    def in_one_pass(x):
        # About a value near the mean, that of a part of the first sample: E[x^2] - mean^2 would cancel in float32.
        near = _mean(wide(x[:, :1, *[slice(None, None, 4)] * (x.ndim - 3)]))
        first, second = _mean(wide(x) - near), _mean(jnp.square(wide(x) - near))
        return near + first, jnp.maximum(second - jnp.square(first), 0)

    mean_here, var_here = lax.platform_dependent(x, cuda=in_one_pass, default=in_two_passes)
    mean = mean_over_devices(mean_here, axis_name)
    return mean, mean_over_devices(var_here + jnp.square(mean_here - mean), axis_name)


def _mean(x):
    """Mean [T, 1, ..., C] over all axes but the first and the last of x [T, B, ..., C]."""
    samples, within = (1,)[: x.ndim - 2], tuple(range(2, x.ndim - 1))

    def by_sample(x):  # of two means over the same array XLA then makes one pass, whatever its size
        return x.mean(within, keepdims=True).mean(samples, keepdims=True)

    def at_once(x):
        return x.mean(samples + within, keepdims=True)

    return lax.platform_dependent(x, cuda=by_sample, default=at_once)


def _backward(eps, axis_name, residuals, cotangents):
    return normalize_gradient(axis_name, *residuals, cotangents[0])


def normalize_gradient(axis_name, x, scale, bias, mean, inverse, g):
    """(x_bar, scale_bar, bias_bar) of what x is normalised to, from its gradient g; see `normalize`."""
    if 0 in x.shape:  # the means are those of nothing
        return tuple(a * 0 for a in (x, scale, bias))
    centred, g = wide(x) - mean, wide(g)
    mean_g, mean_gx = _mean(g), _mean(g * centred) * inverse
    count = math.prod(x.shape[1:-1])
    scale_bar, bias_bar = (count * s.sum(0, keepdims=True) for s in (mean_gx, mean_g))
    mean_g, mean_gx = (mean_over_devices(s, axis_name) for s in (mean_g, mean_gx))
    x_bar = (g - mean_g - centred * (inverse * mean_gx)) * (scale * inverse)
    return tuple(bar.astype(a.dtype) for bar, a in ((x_bar, x), (scale_bar, scale), (bias_bar, bias)))


normalize.defvjp(_forward, _backward)
