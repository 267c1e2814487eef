"""Integrate-and-fire neurons: one pure step, scanned over time.

Every neuron does three things per timestep (Fang et al., 2021, Eqs. 2 to 4; the soft reset is SpikingJelly's):

    charge  h[t] = f(v[t-1], x[t])
    fire    s[t] = H(h[t] - v_threshold)
    reset   v[t] = h[t] (1 - s[t]) + v_reset s[t]     hard, or
            v[t] = h[t] - v_threshold s[t]            soft (v_reset=None)

A neuron of your own is a subclass with a `charge` of its own; it gets the fast gradient below for free.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from plif_jax import surrogate as surrogates
from plif_jax.dtypes import at_least_float32, is_floating, is_real, is_whole, wide
from plif_jax.errors import UserError
from plif_jax.mapped import vary_alike
from plif_jax.sequence import at_rest, gpu_kernels, run

_POTENTIALS = int | float | np.generic | np.ndarray | jax.Array | nnx.Variable


class Neuron(nnx.Module):
    """A layer of spiking neurons; subclasses say how the membrane charges.

    Args:
      v_threshold: membrane potential at and above which the neuron fires; an `nnx.Param` is learned.
      v_reset: potential after a spike (hard reset), which may be learned too; None subtracts v_threshold instead (soft
        reset).
      detach_reset: lets no gradient through the spike in the reset, as the paper trains.
      surrogate: the spike function; ATan(alpha=2), the paper's, where not given.

    Raises:
      UserError: surrogate is not callable, or a class instead of an instance; a potential is not a real number;
        detach_reset is not True or False.
    """

    def __init__(
        self,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        detach_reset: bool = True,
        surrogate: surrogates.Surrogate | None = None,
    ):
        self.v_threshold = surrogates.as_setting(v_threshold)
        self.v_reset = surrogates.as_setting(v_reset)
        for name, value in (("v_threshold", v_threshold), ("v_reset", v_reset)):
            if value is None and name == "v_reset":
                continue
            if not isinstance(value, _POTENTIALS):
                kind = type(value).__name__
                raise UserError(f"{name} is of type {kind}; give a number, an array, or an nnx.Param to be learned")
            if not is_real(getattr(value, "dtype", float)):
                raise UserError(f"{name} is {value!r}; a potential is a real number, or an array of them")
        surrogates.check_switch("detach_reset", detach_reset)
        self.detach_reset = detach_reset
        self.surrogate = surrogates.ATan() if surrogate is None else surrogate
        if isinstance(surrogate, type) or not callable(self.surrogate):
            name = surrogate.__name__ if isinstance(surrogate, type) else repr(surrogate)
            raise UserError(f"surrogate is {name}; give an instance, such as surrogate.ATan()")
        held = () if isinstance(surrogate, nnx.Module) else getattr(surrogate, "__dict__", {}).values()
        if any(isinstance(value, nnx.Variable | jax.Array) for value in held):  # out of reach of gradients and states
            kind = type(surrogate).__name__
            raise UserError(f"surrogate is a {kind}, which holds arrays but is no nnx.Module; derive it from Surrogate")

    def charge(self, v, x):
        """Membrane h[t] before firing, from v[t-1] and the input current x[t], elementwise.

        It is pure: it changes no variable and draws from no `nnx.Rngs`. What changes over time belongs in the state,
        see `rest`. It is compiled, also in a call outside `jax.jit`: what it reads besides its arguments and
        attributes stays what it was at the first call.
        """
        raise NotImplementedError(f"{type(self).__name__} has no charge, which says how its membrane charges")

    def step(self, v, x):
        """One timestep: (v[t-1], x[t]) to (v[t], s[t]), all of shape [...]; pure, so that `lax.scan` can take it."""
        h = self.charge(v, x.astype(v.dtype))
        s = self.surrogate(h - self.v_threshold)
        reset = lax.stop_gradient(s) if self.detach_reset else s
        after = h - reset * self.v_threshold if self.v_reset is None else h * (1 - reset) + reset * self.v_reset
        # Settings may be NumPy's numbers, of a wider type than the membrane's.
        return after.astype(v.dtype), s.astype(x.dtype)

    def rest(self, x):
        """The membrane at rest for currents x [T, ...]: v_reset, or 0 with soft reset; never below float32.

        A neuron of several states stacks them in this one array, and a `step` of its own takes them apart.
        """
        dtype = at_least_float32(x.dtype)
        axes = jax.typeof(x).sharding.spec[1:]  # explicit ones, of which a scan asks that its carry has them too
        explicit = any(axes) and not jax.sharding.get_abstract_mesh().empty
        return jnp.full(x.shape[1:], at_rest(self.v_reset), dtype, out_sharding=jax.P(*axes) if explicit else None)

    def unroll(self, v, x, *, T=None):
        """Runs currents x [T, ...] from the membrane v [...] (None: at rest).

        Returns the membrane after the last step and the spikes [T, ...]. Feeding a sequence in chunks, the membrane
        carried over, gives what one call gives; a chunk of one timestep is live inference. A current that stays the
        same for T timesteps may be given once, x [1, ...], which spares memory.

        Raises:
          UserError: x has no axis of time or neither 1 nor T timesteps, v is not real or not of the shape of one
            timestep, or potentials are of a shape that does not fit it.
        """
        return run(*self._prepared(v, x, T), None)

    def _prepared(self, v, x, T):
        """What `sequence` takes, from what `unroll` is given; raises what that raises."""
        x = _currents(x)
        own = type(self).rest is not Neuron.rest
        for name in () if own else ("v_threshold", "v_reset"):
            shape = np.shape(getattr(self, name))
            if shape and not _spreads(shape, x.shape[1:]):
                raise UserError(f"{name} of shape {shape} does not fit currents of shape [T, ...] = {x.shape}")
        if T is not None and not is_whole(T, 0):
            raise UserError(f"T is {T!r}; the number of timesteps is a whole number, and known before compilation")
        if T is not None and len(x) not in (1, T):
            raise UserError(f"currents of shape {x.shape} for T = {T}; give [T, ...], or [1, ...] for one that stays")
        # Of the usual one the shape and the type will do, which cost nothing.
        rest = self.rest(x) if own else jax.ShapeDtypeStruct(x.shape[1:], at_least_float32(x.dtype))
        if not hasattr(rest, "shape"):
            raise UserError(
                f"rest of {type(self).__name__} gives a {type(rest).__name__}; stack its states in one array"
            )
        if v is not None:
            if np.shape(v) != rest.shape:
                raise UserError(f"membrane of shape {np.shape(v)} does not fit currents of shape [T, ...] = {x.shape}")
            if not is_real(v.dtype if hasattr(v, "dtype") else np.asarray(v).dtype):
                raise UserError("the membrane v is not of real numbers; give what an earlier call returned")
            v = jnp.asarray(v, rest.dtype)
        elif own:
            v = rest
        elif not isinstance(self.v_reset, int | float | None):
            v = self.rest(x)
        graphdef, params, other = nnx.split(self, _floats, ...)
        try:
            hash(graphdef)
        except TypeError as error:  # it is compiled for its settings
            kind = type(self).__name__
            raise UserError(f"{kind} holds a setting of {error}; give a tuple, an nnx.List or an nnx.Dict") from None
        return graphdef, gpu_kernels(), len(x) if T is None else T, *vary_alike(params, other, v, x)

    def unroll_by_autodiff(self, v, x):
        """The definition that `unroll` must equal: `lax.scan` over `step`, differentiated by JAX."""
        x = _currents(x)
        return lax.scan(self.step, *vary_alike(self.rest(x) if v is None else v, x))

    def __call__(self, x):
        """Spikes [T, ...] in answer to currents x [T, ...], from rest."""
        return self.unroll(None, x)[1]


def _currents(x):
    """Currents as floating-point numbers, for spikes have their type: whole ones would have no gradient."""
    x = jnp.asarray(x)
    if x.ndim == 0:
        raise UserError("currents are one number; give [T, ...], the first axis the timesteps")
    check_timesteps(x)
    if jnp.iscomplexobj(x):
        raise UserError(f"currents are of type {x.dtype}; give real numbers")
    return x if is_floating(x.dtype) else x.astype(float)


def check_timesteps(x):
    """Raises a UserError where the number of timesteps of x [T, ...] is left open, as `jax.export` may leave it."""
    if not isinstance(x.shape[0], int):
        raise UserError(f"x of shape {x.shape} leaves the number of timesteps open; fix it, the batch may stay open")


def _spreads(shape, over):
    """Whether an array of one shape can be spread over another."""
    return len(shape) <= len(over) and all(n in (1, m) for n, m in zip(shape[::-1], over[::-1], strict=False))


def _floats(path, leaf):
    """Whether a leaf can have a gradient: an `nnx.Param`, or another variable of a custom neuron."""
    return hasattr(leaf, "dtype") and is_floating(leaf.dtype)


class IF(Neuron):
    """Integrate and fire, without leak: h[t] = v[t-1] + x[t]."""

    def charge(self, v, x):
        return v + x


@jax.custom_vjp
def _sigmoid(w):
    """sigmoid(w), rounded where PyTorch rounds: w is float32 even under float64, so the last bit of k counts."""
    dtype = at_least_float32(w.dtype)
    return (1 / (1 + jnp.exp(-w.astype(float)).astype(dtype))).astype(w.dtype)


def _sigmoid_forward(w):
    k = _sigmoid(w)
    return k, k


def _sigmoid_backward(k, g):
    product = (g * (1 - wide(k)) * wide(k)).astype(k.dtype)
    # The select changes nothing; it keeps the CPU from fusing this product with the sum over timesteps, which would
    # round once where PyTorch rounds twice.
    return (jnp.where(jnp.isnan(product), jnp.nan, product),)


_sigmoid.defvjp(_sigmoid_forward, _sigmoid_backward)


def _leaky(v, x, v_reset, k):
    return v + (x - (v - at_rest(v_reset))) * k


class LIF(Neuron):
    """Leaky integrate and fire: h[t] = v[t-1] + (x[t] - (v[t-1] - v_reset)) / tau (Fang et al., 2021, Eq. 5).

    With soft reset v_reset is 0 there.

    Args:
      tau: membrane time constant in timesteps, above 1: at 1 the membrane would forget v[t-1]. A setting, fixed when
        compiled: for gradients take `PLIF`.
      (others as in `Neuron`)

    Raises:
      UserError: tau is not above 1, or not below 1e30.
    """

    def __init__(self, tau: float = 2.0, **kwargs):
        super().__init__(**kwargs)
        self.tau = _checked_tau("tau", tau)

    def charge(self, v, x):
        return _leaky(v, x, self.v_reset, 1 / self.tau)


class PLIF(Neuron):
    """Parametric LIF: the time constant of the layer is learned (Fang et al., 2021, Eq. 6).

        h[t] = v[t-1] + (x[t] - (v[t-1] - v_reset)) k,   k = sigmoid(w) = 1 / tau

    With soft reset v_reset is 0 there. w, the paper's a, named as in its program, is one scalar parameter for the whole
    layer, so tau never falls below 1 whatever the optimiser does (it is 1 in float32 from w = 17 on, in bfloat16 from
    6.25). It starts as a float32 number, so under float64 tau starts at init_tau to 7 digits.

    Args:
      init_tau: tau before training, in timesteps, above 1: w starts at -ln(init_tau - 1).
      param_dtype: of w.
      (others as in `Neuron`)

    Raises:
      UserError: init_tau is not above 1, or not below 1e30; param_dtype is no floating-point type.
    """

    def __init__(self, init_tau: float = 2.0, *, param_dtype=float, **kwargs):
        super().__init__(**kwargs)
        surrogates.check_param_dtype(param_dtype)
        # Through float32, as the paper's program starts: under float64 the rounding decides who fires at the threshold.
        w = np.float32(-math.log(_checked_tau("init_tau", init_tau) - 1))
        self.w = nnx.Param(jnp.asarray(w, param_dtype))

    @property
    def tau(self):
        """The membrane time constant now, in timesteps."""
        return 1 / self.k

    @property
    def k(self):
        """1 / tau, as the membrane charges with it."""
        return _sigmoid(self.w[...])

    def charge(self, v, x):
        return _leaky(v, x, self.v_reset, self.k.astype(v.dtype))


def _checked_tau(name, tau):
    if isinstance(tau, nnx.Variable | jax.core.Tracer):
        kind = "a value that JAX traces" if isinstance(tau, jax.core.Tracer) else f"an nnx.{type(tau).__name__}"
        raise UserError(f"{name} is {kind}; give a number: PLIF(init_tau=2.0) learns tau and starts from it")
    # Far below where float32 ends; with so large a one nothing charges.
    if np.ndim(tau) or not isinstance(tau, int | float | np.number | jax.Array) or not 1 < tau < 1e30:
        raise UserError(
            f"{name} is {tau!r}; a membrane time constant is a number above 1 timestep and below 1e30, 2.0 in the paper"
        )
    return float(tau)
