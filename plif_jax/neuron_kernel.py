"""A neuron's sequence as one GPU kernel forward and one backward: membranes stay in registers.

Each current is read once, each spike or gradient written once; XLA alone makes a kernel for every timestep and carries
the membranes through memory. A step fits if it is elementwise arithmetic in float32 with scalar parameters: those of
all neurons here do, with every surrogate but an `Erf` whose alpha is learned. Within a kernel each neuron has a copy of
each parameter, which makes the parameters' gradients elementwise too; those of the copies are summed at the end.

A step is (params, v, x) -> (v, s). A membrane is an array [...], or one number where all are alike. With `affine`, that
is tables (mean [T or 1, ..., C], gain [T or 1, ..., C], bias [..., C]), the currents are (x - mean) gain + bias, which
are never written: batch normalisation before a neuron costs no pass over memory of its own.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.extend.core import Literal

# Threads of a block, and how many numbers of one array each may hold: more would not stay in its registers.
THREADS, HELD = 128, 32

CALLS = {"jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
# They change no number of a block: `pmap` and `shard_map` put some of them in, to place gradients.
IDENTITIES = {"copy", "copy_p", "stop_gradient", "reshape", "reshard", "pvary", "pcast"}
ARITHMETIC = {
    *("add", "add_any", "sub", "mul", "div", "neg", "abs", "sign", "max", "min", "square", "sqrt", "rsqrt"),
    *("integer_pow", "pow", "exp", "exp2", "expm1", "log", "log1p", "logistic", "tanh", "sin", "cos", "is_finite"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "not", "select_n"),
    *("convert_element_type", "broadcast_in_dim"),
}


def fits(step, T, params, v, x):
    """Whether a step can run as a kernel on currents x [T or 1, ...] from membranes v, None at rest."""
    if x.ndim < 2 or not 0 < T <= HELD or x.dtype not in (jnp.float32, jnp.bfloat16):
        return False
    if not 0 < x[0].size < 2**31 - 4 * THREADS:  # places in a row are counted in 32 bits, beyond its end too
        return False
    if v is not None and (v.shape != x.shape[1:] or v.dtype != jnp.float32):
        return False
    if any(leaf.shape or leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(params)):
        return False
    try:
        of_blocks = [(_step(step, T, params, x, n), _gradient(step, T, params, x, n)) for n in (1, 2)]
    except Exception:  # whatever a step makes of one neuron after the other in place of its own shape
        return False
    # What depends on the shape it sees is not elementwise either.
    if [_signature(jaxpr) for jaxpr in of_blocks[0]] != [_signature(jaxpr) for jaxpr in of_blocks[1]]:
        return False
    forward, backward = of_blocks[0]
    types = [(aval.shape, aval.dtype) for aval in forward.out_avals]
    block = (_block(T),)
    return types == [(block, jnp.float32), (block, x.dtype)] and all(map(_elementwise, (forward, backward)))


def spikes(step, T, params, v, x, affine=None):
    """s [T, ...] in answer to currents x [T or 1, ...] from the membranes v."""
    forward, rows = _step(step, T, params, x), len(x)

    def kernel(params, v, x, s):
        for t, current in enumerate(_loaded(x, rows, T)):
            v, s[t] = _evaluate(forward, *params, v, current)

    (s,), _ = _call(kernel, T, params, v, affine, [x], [(T, x.dtype)])
    return s.reshape(T, *x.shape[1:])


def last(step, T, params, v, x, affine=None):
    """The membranes [...] after T timesteps of currents x [T or 1, ...]."""
    forward, rows = _step(step, T, params, x), len(x)

    def kernel(params, v, x, after):
        for current in _loaded(x, rows, T):
            v, _ = _evaluate(forward, *params, v, current)
        after[0] = v

    (v,), _ = _call(kernel, T, params, v, affine, [x], [(1, jnp.float32)])
    return v.reshape(x.shape[1:])


def gradient(step, T, params, v, x, v_bar, s_bar, affine=None):
    """(params_bar, v_bar, x_bar) of a sequence, from the gradients of its last membranes, None for 0, and its spikes.

    v_bar of membranes that are a number is None; x_bar is that of the currents, also where `affine` makes them.
    """
    forward, backward, rows = _step(step, T, params, x), _gradient(step, T, params, x), len(x)
    stored = jnp.ndim(v) > 0  # else at rest, a number

    def kernel(params, v, x, s_bar, *others):
        *v_bar, x_bar, before_bar = others if stored else (*others, None)
        currents, bars, before = _loaded(x, rows, T), _loaded(s_bar, T, T), []
        for current in currents:
            before.append(v)
            v, _ = _evaluate(forward, *params, v, current)
        bar = v_bar[0][0] if v_bar else jnp.zeros_like(v)
        totals, of_current = [jnp.zeros_like(v) for _ in params], jnp.zeros_like(v)
        for t in reversed(range(T)):
            *terms, bar, term = _evaluate(backward, *params, before[t], currents[t], bar, bars[t])
            totals = [total + term for total, term in zip(totals, terms, strict=True)]
            of_current = of_current + term if rows < T else term
            if t < rows:
                x_bar[t] = of_current
        if stored:
            before_bar[0] = bar
        # Beyond the last neuron a current is 0, where a derivative may be infinite.
        return [jnp.where(s_bar.inside, total, 0).sum() for total in totals]

    arrays = [x, s_bar] + ([] if v_bar is None else [v_bar])
    results = [(rows, x.dtype)] + [(1, jnp.float32)] * stored
    # A block has read all of its gradients before it writes the first: x_bar takes the place of s_bar.
    places = {1: 0} if rows == T else {}
    leaves, structure = jax.tree.flatten(params)
    (x_bar, *v_bar), totals = _call(kernel, T, params, v, affine, arrays, results, len(leaves), places)
    params_bar = jax.tree.unflatten(structure, totals)
    return params_bar, v_bar[0].reshape(x.shape[1:]) if stored else None, x_bar.reshape(x.shape)


def _loaded(array, rows, T):
    """A block's values for T timesteps, asked for together: a store between two loads would keep the second waiting."""
    loaded = [array[row] for row in range(rows)]
    return loaded if rows == T else loaded * T


class _Rows:
    """What a block of neurons sees of an array [rows, N]."""

    def __init__(self, ref, N, block):
        self.ref, self.block = ref, block
        self.first = pl.program_id(0) * block
        self.inside = self.first + jnp.arange(block, dtype=jnp.int32) < N

    def _mine(self, row):
        return self.ref.at[jnp.int32(row), pl.ds(self.first, self.block)]

    def __getitem__(self, row):
        return plgpu.load(self._mine(row), mask=self.inside, other=0)

    def __setitem__(self, row, values):
        plgpu.store(self._mine(row), values.astype(self.ref.dtype), mask=self.inside)


class _Normalized:
    """`_Rows` of x as currents: (x - mean) gain + bias, by tables with a value, or one for every row, per channel."""

    def __init__(self, rows, C, mean, gain, bias):
        self.rows, self.C, self.mean, self.gain, self.bias = rows, C, mean, gain, bias
        # Not `%`, which also minds signs: Triton would not see that channels follow one another, and load them singly.
        self.channel = lax.rem(rows.first + jnp.arange(rows.block, dtype=jnp.int32), jnp.int32(C))

    def _of(self, table, row):
        return plgpu.load(table.at[self.channel + (row * self.C if table.shape[0] > self.C else 0)])

    def __getitem__(self, row):
        x = self.rows[row]
        wide = (x.astype(jnp.float32) - self._of(self.mean, row)) * self._of(self.gain, row) + self._of(self.bias, 0)
        return wide.astype(x.dtype)


def _call(kernel, T, params, v, affine, arrays, results, sums=0, places=()):
    """Runs a kernel on blocks of neurons: its results, (rows, dtype) each, and the `sums` numbers that it returns.

    A kernel takes the parameters' values, a block's membranes, and its `_Rows` of the arrays, of which the first is x,
    and of the results.
    `places` says of which array a result may take the place, {index of the array: index of the result}.
    """
    scalars, x = jax.tree.leaves(params), arrays[0]
    N, block = x[0].size, _block(T)
    blocks = pl.cdiv(N, block)
    tables, C = [table.reshape(-1).astype(jnp.float32) for table in affine or ()], x.shape[-1]
    # A number for all membranes is part of the program: nothing is read for it.
    before = len(scalars) + len(tables) + (1 if jnp.ndim(v) else 0)
    arrays = [array.reshape(-1, N) for array in ([v] if jnp.ndim(v) else []) + arrays]

    def on_block(*refs):
        values = [jnp.full(block, ref[0]) for ref in refs[: len(scalars)]]
        partial_sums = refs[len(refs) - sums :]
        rows = [_Rows(ref, N, block) for ref in refs[len(scalars) + len(tables) : len(refs) - sums]]
        membranes = rows.pop(0)[0] if jnp.ndim(v) else jnp.full(block, v, jnp.float32)
        if tables:
            rows[0] = _Normalized(rows[0], C, *refs[len(scalars) : len(scalars) + len(tables)])
        for ref, total in zip(partial_sums, kernel(values, membranes, *rows) or (), strict=True):
            ref[pl.program_id(0)] = total

    # `jax.shard_map` asks along which of its axes a result differs: as x does.
    shape_of = partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(x).manual_axis_type)
    shapes = [shape_of((count, N), dtype) for count, dtype in results]
    shapes += [shape_of((blocks,), jnp.float32)] * sums
    call = pl.pallas_call(
        on_block,
        shapes,
        grid=(blocks,),
        input_output_aliases={before + array: result for array, result in dict(places).items()},
        compiler_params=plgpu.CompilerParams(num_warps=THREADS // 32),
    )
    found = call(*[scalar.reshape(1) for scalar in scalars], *tables, *arrays)
    return found[: len(results)], [partial_sum.sum() for partial_sum in found[len(results) :]]


def _step(step, T, params, x, blocks=1):
    """The jaxpr of a step on a block of neurons."""
    return jax.make_jaxpr(step)(*_types(T, params, x, blocks))


def _gradient(step, T, params, x, blocks=1):
    """The jaxpr of its gradient: (params, v, x, v_bar, s_bar) -> (params_bar, v_bar, x_bar)."""

    def gradient(params, v, x, v_bar, s_bar):
        return jax.vjp(step, params, v, x)[1]((v_bar, s_bar))

    params, v, x = _types(T, params, x, blocks)
    return jax.make_jaxpr(gradient)(params, v, x, v, x)


def _types(T, params, x, blocks):
    """What the parameters, v and a timestep of x are to so many blocks."""
    n = (blocks * _block(T),)
    v, x = jax.ShapeDtypeStruct(n, jnp.float32), jax.ShapeDtypeStruct(n, x.dtype)
    return jax.tree.map(lambda _: v, params), v, x


def _block(T):
    """Neurons in a block: a power of two for each thread."""
    return THREADS << min(2, (HELD // T).bit_length() - 1)


def _signature(closed):
    """A jaxpr's primitives and literals in order, those inside its calls included."""
    found = []
    for eqn in closed.jaxpr.eqns:
        found += [eqn.primitive.name, *(str(var.val) for var in eqn.invars if isinstance(var, Literal))]
        found += [] if eqn.primitive.name not in CALLS else _signature(_inner(eqn))
    return found


def _elementwise(closed):
    """Whether a jaxpr computes each neuron's numbers from that neuron's alone, those inside its calls included."""

    def fitting(eqn):
        name, types = eqn.primitive.name, [var.aval for var in (*eqn.invars, *eqn.outvars)]
        if name in CALLS:
            return _elementwise(_inner(eqn))
        if name in IDENTITIES:
            return len({aval.shape for aval in types}) == 1
        if name == "convert_element_type":
            return True
        # Of other types Triton has not all operations.
        others = ("bool", "int32") if name not in ("max", "min") else ()
        return name in ARITHMETIC and {aval.dtype.name for aval in types} <= {"float32", *others}

    return not closed.consts and all(map(fitting, closed.jaxpr.eqns))


def _inner(eqn):
    """The jaxpr that an equation calls."""
    return eqn.params["call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"]


def _evaluate(closed, *args):
    """Binds a jaxpr's primitives anew, those inside its calls too: Triton's lowering knows no custom gradients."""
    values = dict(zip(closed.jaxpr.invars, args, strict=True))

    def value(var):
        return np.asarray(var.val, var.aval.dtype)[()] if isinstance(var, Literal) else values[var]

    for eqn in closed.jaxpr.eqns:
        given = list(map(value, eqn.invars))
        if eqn.primitive.name in CALLS:
            results = _evaluate(_inner(eqn), *given)
        elif eqn.primitive.name in IDENTITIES:
            results = given
        elif any(isinstance(one, jax.core.Tracer) for one in given) or eqn.outvars[0].aval.shape:
            results = eqn.primitive.bind(*given, **eqn.params)
            results = results if eqn.primitive.multiple_results else [results]
        else:  # of numbers alone: a number, which a kernel may hold
            with jax.ensure_compile_time_eval():
                results = [np.asarray(eqn.primitive.bind(*given, **eqn.params))[()]]
        values |= zip(eqn.outvars, results, strict=True)
    return list(map(value, closed.jaxpr.outvars))
