"""A neuron after batch normalisation: on a GPU one kernel each way, and the normalised currents are never written."""

from functools import partial

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero

from plif_jax import layers
from plif_jax.batch_statistics import normalize_gradient, statistics
from plif_jax.mapped import vary_alike
from plif_jax.neurons import Neuron
from plif_jax.sequence import fits, instantiated, run, sequence, sequence_gradient


def unroll(norm, neuron, v, x, **timesteps):
    """`neuron.unroll(v, norm(x), **timesteps)`, where these are nothing or T."""
    ours = type(norm) is layers.BatchNorm and type(neuron).unroll is Neuron.unroll
    # A custom `rest` may read the currents, which are never written here.
    known = v is not None or type(neuron).rest is Neuron.rest
    if not (ours and known) or norm.dtype not in (None, x.dtype):
        return neuron.unroll(v, norm(x), **timesteps)
    graphdef, kernels, T, *primals = neuron._prepared(v, x, timesteps.get("T"))
    if not fits(graphdef, kernels, T, *primals):
        return neuron.unroll(v, norm(x), **timesteps)
    scale, bias, mean, var = (
        variable[...].reshape((1,) * (x.ndim - 1) + (-1,)) for variable in (norm.scale, norm.bias, norm.mean, norm.var)
    )
    if norm.use_running_average:
        affine = mean, scale * lax.rsqrt(var + norm.eps), bias
        return run(graphdef, kernels, T, *vary_alike(*primals, affine))
    primals = vary_alike(*primals, scale, bias)
    v, spikes, mean, var = _run(norm.eps, norm.axis_name, graphdef, kernels, T, *primals)
    norm.track(x, *lax.stop_gradient((mean, var)))
    return v, spikes


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _unroll(eps, axis_name, graphdef, kernels, T, params, other, v, x, scale, bias):
    """Membranes and spikes of `sequence` on x normalised, and the statistics [T, 1, ..., C] of x."""
    mean, var = statistics(x, axis_name)
    affine = mean, scale * lax.rsqrt(var + eps), bias
    return *sequence(graphdef, kernels, T, params, other, v, x, affine), mean, var


def _forward(eps, axis_name, graphdef, kernels, T, *primals):
    params, other, v, x, scale, bias = jax.tree.map(lambda primal: primal.value, primals)
    found = _unroll(eps, axis_name, graphdef, kernels, T, params, other, v, x, scale, bias)
    mean, var = found[2:]
    return found, (params, other, v, x, scale, bias, mean, lax.rsqrt(var + eps))


def _backward(eps, axis_name, graphdef, kernels, T, residuals, cotangents):
    params, other, v, x, scale, bias, mean, inverse = residuals
    *of_sequence, of_mean, of_var = cotangents
    affine = mean, scale * inverse, bias
    params_bar, v_bar, g = sequence_gradient(graphdef, kernels, T, params, other, v, x, *of_sequence, affine)
    x_bar, scale_bar, bias_bar = normalize_gradient(axis_name, x, scale, bias, mean, inverse, g)
    if not (isinstance(of_mean, SymbolicZero) and isinstance(of_var, SymbolicZero)):  # in a gradient's gradient
        _, pull = jax.vjp(lambda x: statistics(x, axis_name), x)
        x_bar += pull(tuple(instantiated([of_mean, of_var], x)))[0]
    return params_bar, None, v_bar, x_bar, scale_bar, bias_bar


# With symbolic zeros: a membrane that nobody uses afterwards sends back no gradient to read.
_unroll.defvjp(_forward, _backward, symbolic_zeros=True)


# Compiled, as `sequence.run` is.
_run = jax.jit(_unroll, static_argnums=(0, 1, 2, 3, 4))
