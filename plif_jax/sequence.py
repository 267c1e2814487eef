"""A neuron's steps over time, forward and backward: a scan, or on NVIDIA GPUs a kernel each way.

The gradient is written by hand around the whole sequence: it keeps the currents alone and runs the membranes again.
"""

import contextlib
from contextvars import ContextVar
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.custom_derivatives import SymbolicZero

from plif_jax.dtypes import wide
from plif_jax.mapped import vary_alike

# Unrolled steps fuse into few passes over memory, but longer sequences take too long to compile. Unrolling a part of
# the steps, `unroll` below T, is slower than none: each part's inputs are copied.
MAX_UNROLL = 32
# Where no gradient needs the membranes, XLA's plan of an unrolled sequence for a CPU keeps none: each timestep runs all
# those before it again, T^2 / 2 in all.
MAX_UNROLL_FORWARD = 10
# XLA for a CPU writes the results of up to this many timesteps straight into the stacked array, of more each into an
# array of its own, which is then copied.
MAX_STACK = 8


def _scan(step, carry, xs, T, forward_only=False, **kwargs):
    most = MAX_UNROLL_FORWARD if forward_only else MAX_UNROLL
    if most < T:
        return lax.scan(step, carry, xs, T, **kwargs)
    if T <= MAX_STACK:
        return lax.scan(step, carry, xs, T, unroll=max(T, 1), **kwargs)
    # Unrolled too, in groups: stacks of stacks. Where these are more than MAX_STACK, say of a prime T, nothing is won.
    size = next(n for n in range(MAX_STACK, 0, -1) if T % n == 0)
    groups = jax.tree.map(lambda x: x.reshape(T // size, size, *x.shape[1:]), xs)
    carry, ys = lax.scan(
        lambda carry, xs: lax.scan(step, carry, xs, size, unroll=size, **kwargs),
        carry,
        groups,
        T // size,
        unroll=T // size,
        **kwargs,
    )
    return carry, jax.tree.map(lambda y: y.reshape(T, *y.shape[2:]), ys)


_scanning = ContextVar("scanning", default=False)


@contextlib.contextmanager
def scanned():
    """What is traced within it scans on a GPU too: for programs that are to run elsewhere, and for comparison."""
    token = _scanning.set(True)
    try:
        yield
    finally:
        _scanning.reset(token)


def gpu_kernels():
    """The module of a GPU's kernels; None without a GPU that Triton knows, or once JAX has dropped Pallas' Triton."""
    if _scanning.get() or jax.default_backend() != "gpu":
        return None
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    if not capability[:1].isdecimal() or float(capability) < 8:  # before Ampere, or not NVIDIA's
        return None
    try:
        from plif_jax import neuron_kernel
    except ImportError:
        return None
    return neuron_kernel


def at_rest(v_reset):
    """The potential at rest: v_reset, or 0 with soft reset."""
    return 0.0 if v_reset is None else v_reset


def _step(graphdef, other):
    return lambda params, v, x: nnx.merge(graphdef, params, other).step(v, x)


def fits(graphdef, kernels, T, params, other, v, x):
    """Whether a sequence runs as a GPU's kernels."""
    return kernels is not None and kernels.fits(_step(graphdef, other), T, params, v, x)


def sequence(graphdef, kernels, T, params, other, v, x, affine=None, forward_only=False):
    """The membranes after currents x [T, ...], or x [1, ...] for T timesteps, and the spikes; v is None at rest.

    With `affine`, (mean, gain, bias), the currents are (x - mean) gain + bias. `forward_only`: no gradient follows.
    """
    net, step = nnx.merge(graphdef, params, other), _step(graphdef, other)

    def scan(params, v, x, affine):
        x = currents(x, affine)
        begin, (rows, current) = _rest(net, x) if v is None else v, _rows(x, T)
        return _scan(lambda v, row: step(params, v, current(row)), begin, rows, T, forward_only)

    def kernel(params, v, x, affine):
        v = at_rest(net.v_reset) if v is None else v
        return kernels.last(step, T, params, v, x, affine), kernels.spikes(step, T, params, v, x, affine)

    if not fits(graphdef, kernels, T, params, other, v, x):
        return scan(params, v, x, affine)
    return lax.platform_dependent(params, v, x, affine, cuda=kernel, default=scan)


def sequence_gradient(graphdef, kernels, T, params, other, v, x, v_bar, s_bar, affine=None):
    """(params_bar, v_bar, x_bar) of `sequence`, from the gradients of its results, which may be symbolic zeros.

    x_bar is that of the currents, also where `affine` makes them.
    """
    net, step = nnx.merge(graphdef, params, other), _step(graphdef, other)
    v_bar = None if isinstance(v_bar, SymbolicZero) else v_bar
    s_bar = instantiated(s_bar, x)

    def scan(params, v, x, affine, v_bar, s_bar):
        x = currents(x, affine)
        begin = _rest(net, x) if v is None else v
        v_bar = jnp.zeros_like(begin) if v_bar is None else v_bar
        rows, current = _rows(x, T)
        _, v_before = _scan(lambda v, row: (step(params, v, current(row))[0], v), begin, rows, T)

        def backward_step(carry, inputs):
            v_bar, *totals = carry
            v, row, s_bar = inputs
            step_params_bar, v_bar, x_bar = jax.vjp(step, params, v, current(row))[1]((v_bar, s_bar))
            terms = (step_params_bar, x_bar if rows is None else None)
            return (v_bar, *jax.tree.map(jnp.add, totals, list(terms))), None if rows is None else x_bar

        total = None if rows is not None else jnp.zeros_like(x[0], begin.dtype)
        # Sums never below float32: in bfloat16 they stop growing after some hundred timesteps.
        sums = jax.tree.map(lambda p: jnp.zeros_like(wide(p)), params)
        carry = (v_bar, sums, total)
        (v_bar, sums, total), x_bar = _scan(backward_step, carry, (v_before, rows, s_bar), T, reverse=True)
        params_bar = jax.tree.map(lambda sum, p: sum.astype(p.dtype), sums, params)
        return params_bar, None if v is None else v_bar, total[None].astype(x.dtype) if rows is None else x_bar

    def kernel(params, v, x, affine, v_bar, s_bar):
        v = at_rest(net.v_reset) if v is None else v
        return kernels.gradient(step, T, params, v, x, v_bar, s_bar, affine)

    compute = _kernel_once(kernel, scan) if fits(graphdef, kernels, T, params, other, v, x) else scan
    return compute(params, v, x, affine, v_bar, s_bar)


def currents(x, affine):
    """The currents that `sequence` takes of x."""
    if affine is None:
        return x
    mean, gain, bias = affine
    return ((x.astype(mean.dtype) - mean) * gain + bias).astype(x.dtype)


def instantiated(bars, x):
    """Gradients in numbers, varying as x does: zeros where they are symbolic ones."""

    def zeros(aval):
        sharding = aval.sharding if any(aval.sharding.spec) else None
        return vary_alike(jnp.zeros(aval.shape, aval.dtype, out_sharding=sharding), x)[0]

    return jax.tree.map(lambda bar: zeros(bar.aval) if isinstance(bar, SymbolicZero) else bar, bars)


def _rest(neuron, x):
    return vary_alike(neuron.rest(x), x)[0]


def _rows(x, T):
    """(xs of a scan over T timesteps, function from one of xs to the current): nothing is scanned where one stays."""
    return (x, lambda row: row) if len(x) == T else (None, lambda row: x[0])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _sequence(forward_only, graphdef, kernels, T, *primals):
    return sequence(graphdef, kernels, T, *primals, forward_only=forward_only)


def _sequence_forward(_, graphdef, kernels, T, *primals):
    primals = jax.tree.map(lambda primal: primal.value, primals)
    # Only the input is kept: recomputing the membrane costs less than writing and reading it back.
    return _sequence(False, graphdef, kernels, T, *primals), primals


def _sequence_backward(_, graphdef, kernels, T, residuals, cotangents):
    *to_current, affine = residuals
    params_bar, v_bar, g = sequence_gradient(graphdef, kernels, T, *to_current, *cotangents, affine)
    return params_bar, None, v_bar, *jax.vjp(currents, to_current[-1], affine)[1](g)


# With symbolic zeros: a membrane that nobody uses afterwards sends back no gradient to read.
_sequence.defvjp(_sequence_forward, _sequence_backward, symbolic_zeros=True)


def _kernel_once(kernel, scan):
    """On NVIDIA GPUs a kernel, which JAX cannot differentiate, with the gradient of the scan that it equals."""

    @jax.custom_vjp
    def compute(*arguments):
        return lax.platform_dependent(*arguments, cuda=kernel, default=scan)

    def forward(*arguments):
        return compute(*arguments), arguments

    def backward(arguments, bars):
        return jax.vjp(scan, *arguments)[1](bars)

    compute.defvjp(forward, backward)
    return compute


# Compiled: called outside jit, for instance one timestep at a time, it is traced once and not at every call.
run = jax.jit(partial(_sequence, True), static_argnums=(0, 1, 2))
