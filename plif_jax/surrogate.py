"""Spike functions: a Heaviside step forward, the derivative of a smooth primitive backward.

A spike s = H(x) has no useful derivative. Training replaces it by the derivative of a primitive g that
approximates H (Neftci et al., 2019, arXiv:1901.09948). Each class below is one g: `primitive` states it, `derivative`
is its hand-written derivative, and calling the object fires. Names, formulas and default parameters are
SpikingJelly's, so that results carry over.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.scipy.special import erfc

from plif_jax.dtypes import is_floating, is_real, is_whole
from plif_jax.errors import UserError


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spike(graphdef, params, x):
    return (x >= 0).astype(x.dtype)


def _forward(graphdef, params, x):
    return _spike(graphdef, params, x), (params, x)


def _backward(graphdef, residuals, g):
    params, x = residuals
    surrogate = nnx.merge(graphdef, params)
    x_bar = (g * surrogate.derivative(x)).astype(x.dtype)

    def alpha_bar(alpha):
        of_each = g * surrogate.alpha_derivative(x)
        # One alpha for all, or for each channel; in a GPU's kernel one for each x.
        leading = np.ndim(x) - np.ndim(alpha)
        sizes = (1,) * leading + np.shape(alpha)
        axes = tuple(i for i, (n, m) in enumerate(zip(sizes, x.shape, strict=True)) if i < leading or n != m)
        return (of_each.sum(axes).reshape(np.shape(alpha)) if axes else of_each).astype(jnp.result_type(alpha))

    if not params.keys() - {"alpha"}:
        return jax.tree.map(alpha_bar, params), x_bar
    # A custom function with more to learn.
    y, backward = jax.vjp(lambda params: nnx.merge(graphdef, params).primitive(x), params)
    return *backward(g.astype(y.dtype)), x_bar


_spike.defvjp(_forward, _backward)


def as_setting(setting):
    """A setting as a module can hold it."""
    # NumPy's 0.7 equals Python's, so what is compiled for one runs for the other too; but it brings a type along.
    if isinstance(setting, np.generic):
        return setting.item()
    # Flax would take what JAX traces for static, and lose its gradient.
    return nnx.data(setting) if isinstance(setting, jax.core.Tracer) else setting


def check_param_dtype(param_dtype):
    """Raises a UserError unless parameters of this type can have gradients."""
    if not is_floating(param_dtype):
        raise UserError(f"param_dtype is {param_dtype!r}; give a floating-point type, such as float")


def check_switch(name, value):
    """Raises a UserError unless a setting is True or False: a word such as "no" would count as true."""
    if not isinstance(value, bool | np.bool_):
        raise UserError(f"{name} is {value!r}; give True or False")


def _finite(number):
    """Whether it is a finite real number, or an array of them."""
    return is_real(np.asarray(number).dtype) and bool(np.isfinite(np.asarray(number, float)).all())


def _setting(name, value):
    """A number beside alpha, checked, to assign to a module."""
    number = value.get_value() if isinstance(value, nnx.Variable) else value
    if not isinstance(number, jax.core.Tracer) and not _finite(number):
        raise UserError(f"{name} is {value!r}; give a finite number")
    return as_setting(value)


class Surrogate(nnx.Module):
    """Base of the spike functions: s = 1 where x >= 0, else 0; ds/dx := g'(x).

    A subclass states `primitive` g(x) and `derivative` g'(x); both take arrays of any shape.

    Args:
      alpha: the number that shapes g, where not said otherwise its steepness.
      learnable: makes alpha a parameter (one scalar), with gradient sum(dL/ds * dg/dalpha).
      param_dtype: of alpha where it is a parameter.

    Raises:
      UserError: alpha is not one finite number, another setting of a subclass is not allowed, learnable is not True or
        False, or param_dtype is not a floating-point type.
    """

    def __init__(self, alpha: float, learnable: bool = False, param_dtype=float):
        check_switch("learnable", learnable)
        check_param_dtype(param_dtype)
        value = alpha.get_value() if isinstance(alpha, nnx.Variable) else alpha
        if np.ndim(value):
            raise UserError(f"alpha has shape {np.shape(value)}; a surrogate has one alpha for its whole layer")
        if not isinstance(value, jax.core.Tracer) and not _finite(value):
            raise UserError(f"alpha is {alpha!r}; a surrogate's alpha is a finite number")
        self.alpha = nnx.Param(jnp.asarray(alpha, param_dtype)) if learnable else as_setting(alpha)

    def primitive(self, x):
        """The smooth function g whose derivative stands in for the spike's."""
        raise NotImplementedError(
            f"{type(self).__name__} has no primitive, of which the arrays that it holds get their gradients; "
            "state it, or hold plain numbers"
        )

    def derivative(self, x):
        """g'(x), written by hand so that it can be checked against the derivative of `primitive`."""
        raise NotImplementedError(f"{type(self).__name__} has no derivative, which stands in for the spike's")

    def alpha_derivative(self, x):
        """dg/dalpha at x; by autodiff of `primitive` unless a subclass knows better."""
        graphdef, params = nnx.split(self)
        tangent = jax.tree.map(jnp.ones_like, params)
        return jax.jvp(lambda params: nnx.merge(graphdef, params).primitive(x), (params,), (tangent,))[1]

    def __call__(self, x):
        """Spikes of x = h - v_threshold, same shape and dtype."""
        return _spike(*nnx.split(self), jnp.asarray(x))


class ATan(Surrogate):
    """g = atan(pi/2 alpha x) / pi + 1/2, g' = alpha / (2 (1 + (pi/2 alpha x)^2)): the paper's (Fang et al., 2021)."""

    def __init__(self, alpha: float = 2.0, learnable: bool = False, param_dtype=float):
        super().__init__(alpha, learnable, param_dtype)

    def primitive(self, x):
        return jnp.arctan(math.pi / 2 * self.alpha * x) / math.pi + 0.5

    def derivative(self, x):
        return self.alpha / 2 / (1 + (math.pi / 2 * self.alpha * x) ** 2)

    def alpha_derivative(self, x):
        # Autodiff agrees, but rounds twice in alpha's dtype; the sums over a layer cancel, so that would show.
        return x / 2 / (1 + (math.pi / 2 * self.alpha * x) ** 2)


class Sigmoid(Surrogate):
    """g = sigmoid(alpha x), g' = alpha g (1 - g)."""

    def __init__(self, alpha: float = 4.0, learnable: bool = False, param_dtype=float):
        super().__init__(alpha, learnable, param_dtype)

    def primitive(self, x):
        return jax.nn.sigmoid(self.alpha * x)

    def derivative(self, x):
        g = jax.nn.sigmoid(self.alpha * x)
        return self.alpha * g * (1 - g)


class PiecewiseQuadratic(Surrogate):
    """g' = max(0, alpha - alpha^2 |x|), a triangle of width 2 / alpha; alpha is not 0 (Esser et al., 2016)."""

    def __init__(self, alpha: float = 1.0, learnable: bool = False, param_dtype=float):
        super().__init__(alpha, learnable, param_dtype)

    def primitive(self, x):
        inside = 0.5 + self.alpha * x - 0.5 * self.alpha**2 * jnp.abs(x) * x
        return jnp.where(jnp.abs(x) > 1 / self.alpha, (x > 0).astype(x.dtype), inside)

    def derivative(self, x):
        return jnp.maximum(0, self.alpha - self.alpha**2 * jnp.abs(x))


class PiecewiseExp(Surrogate):
    """g' = alpha/2 exp(-alpha |x|) (Shrestha and Orchard, SLAYER, 2018)."""

    def __init__(self, alpha: float = 1.0, learnable: bool = False, param_dtype=float):
        super().__init__(alpha, learnable, param_dtype)

    def primitive(self, x):
        tail = 0.5 * jnp.exp(-self.alpha * jnp.abs(x))
        return jnp.where(x >= 0, 1 - tail, tail)

    def derivative(self, x):
        return self.alpha / 2 * jnp.exp(-self.alpha * jnp.abs(x))


class SoftSign(Surrogate):
    """g = (alpha x / (1 + |alpha x|) + 1) / 2, g' = alpha / (2 (1 + |alpha x|)^2)."""

    def __init__(self, alpha: float = 2.0, learnable: bool = False, param_dtype=float):
        super().__init__(alpha, learnable, param_dtype)

    def primitive(self, x):
        return (jax.nn.soft_sign(self.alpha * x) + 1) / 2

    def derivative(self, x):
        return self.alpha / (2 * (1 + jnp.abs(self.alpha * x)) ** 2)

    def alpha_derivative(self, x):  # by autodiff the square of a large x, so NaN
        return x / (2 * (1 + jnp.abs(self.alpha * x)) ** 2)


class SuperSpike(Surrogate):
    """g = alpha x / (1 + |x|), g' = alpha / (1 + |x|)^2, of height alpha (Zenke and Ganguli, 2018, their beta 1)."""

    def __init__(self, alpha: float = 1.0, learnable: bool = False, param_dtype=float):
        super().__init__(alpha, learnable, param_dtype)

    def primitive(self, x):
        return self.alpha * jax.nn.soft_sign(x)

    def derivative(self, x):
        return self.alpha / (1 + jnp.abs(x)) ** 2


class Erf(Surrogate):
    """g = erfc(-alpha x) / 2, g' = alpha / sqrt(pi) exp(-(alpha x)^2), a Gaussian."""

    def __init__(self, alpha: float = 2.0, learnable: bool = False, param_dtype=float):
        super().__init__(alpha, learnable, param_dtype)

    def primitive(self, x):
        return erfc(-self.alpha * x) / 2

    def derivative(self, x):
        return self.alpha / math.sqrt(math.pi) * jnp.exp(-((self.alpha * x) ** 2))


class NonzeroSignLogAbs(Surrogate):
    """g = sign(x) log(|alpha x| + 1), g' = alpha / (1 + |alpha x|)."""

    def __init__(self, alpha: float = 1.0, learnable: bool = False, param_dtype=float):
        super().__init__(alpha, learnable, param_dtype)

    def primitive(self, x):
        return jnp.where(x >= 0, 1, -1) * jnp.log1p(jnp.abs(self.alpha * x))

    def derivative(self, x):
        return self.alpha / (1 + jnp.abs(self.alpha * x))


class QPseudoSpike(Surrogate):
    """g' = (1 + 2 |x| / (alpha - 1))^-alpha, a tail of exponent alpha, not 1 (Herranz-Celotti and Rouat, 2022)."""

    def __init__(self, alpha: float = 2.0, learnable: bool = False, param_dtype=float):
        super().__init__(alpha, learnable, param_dtype)

    def primitive(self, x):
        tail = 0.5 * (1 + 2 / (self.alpha - 1) * jnp.abs(x)) ** (1 - self.alpha)
        return jnp.where(x >= 0, 1 - tail, tail)

    def derivative(self, x):
        return (1 + 2 / (self.alpha - 1) * jnp.abs(x)) ** (-self.alpha)


class Rect(Surrogate):
    """g = clip(alpha x + 1/2, 0, 1), g' = alpha where |x| < 1 / (2 alpha), else 0; alpha is not 0."""

    def __init__(self, alpha: float = 1.0, learnable: bool = False, param_dtype=float):
        super().__init__(alpha, learnable, param_dtype)

    def primitive(self, x):
        return jnp.clip(self.alpha * x + 0.5, 0, 1)

    def derivative(self, x):
        return jnp.where(jnp.abs(x) < 0.5 / self.alpha, self.alpha, 0)


class LogTailedReLU(Surrogate):
    """g = alpha x below 0, x up to 1, log x + 1 above; g' = alpha, 1, 1/x (Cai et al., HWGQ, 2017)."""

    def __init__(self, alpha: float = 0.0, learnable: bool = False, param_dtype=float):
        super().__init__(alpha, learnable, param_dtype)

    def primitive(self, x):
        return jnp.where(x > 1, jnp.log(jnp.maximum(x, 1)) + 1, jnp.where(x > 0, x, self.alpha * x))

    def derivative(self, x):
        return jnp.where(x > 0, 1 / jnp.maximum(x, 1), self.alpha)


class S2NN(Surrogate):
    """g = sigmoid(alpha x) below 0, beta log(x + 1) + 1/2 above (Suetake et al., S2NN, 2022); beta is not learned.

    SpikingJelly's documentation has 1 in place of 1/2, which would jump at 0; its code has 1/2, and g' is the same.
    """

    def __init__(self, alpha: float = 4.0, beta: float = 1.0, learnable: bool = False, param_dtype=float):
        super().__init__(alpha, learnable, param_dtype)
        self.beta = _setting("beta", beta)

    def primitive(self, x):
        return jnp.where(x < 0, jax.nn.sigmoid(self.alpha * x), self.beta * jnp.log1p(jnp.maximum(x, 0)) + 0.5)

    def derivative(self, x):
        g = jax.nn.sigmoid(self.alpha * x)
        return jnp.where(x < 0, self.alpha * g * (1 - g), self.beta / (jnp.maximum(x, 0) + 1))


class LeakyKReLU(Surrogate):
    """g = alpha x from 0 on, leak x below; leak is not learned; SpikingJelly calls alpha k."""

    def __init__(self, leak: float = 0.0, alpha: float = 1.0, learnable: bool = False, param_dtype=float):
        super().__init__(alpha, learnable, param_dtype)
        self.leak = _setting("leak", leak)

    def primitive(self, x):
        return jnp.where(x >= 0, self.alpha, self.leak) * x

    def derivative(self, x):
        return jnp.where(x >= 0, self.alpha, self.leak)


class PiecewiseLeakyReLU(Surrogate):
    """g' = 1 / (2 alpha) where |x| < alpha, else c; c is not learned; alpha, SpikingJelly's w, is not 0."""

    def __init__(self, alpha: float = 1.0, c: float = 0.01, learnable: bool = False, param_dtype=float):
        super().__init__(alpha, learnable, param_dtype)
        self.c = _setting("c", c)

    def primitive(self, x):
        outside = self.c * (x - jnp.sign(x) * self.alpha) + jnp.where(x > 0, 1, 0)
        return jnp.where(jnp.abs(x) < self.alpha, x / (2 * self.alpha) + 0.5, outside)

    def derivative(self, x):
        return jnp.where(jnp.abs(x) < self.alpha, 1 / (2 * self.alpha), self.c)


class SquarewaveFourierSeries(Surrogate):
    """g = 1/2 + 2/pi sum_k sin(k w x) / k, w = 2 pi / alpha, over k = 1, 3, .. 2n - 3: a square wave's first harmonics.

    g' = 4/alpha sum_k cos(k w x); n, a whole number from 2, gives n - 1 harmonics; alpha, SpikingJelly's T_period, is
    the period, not 0.
    """

    def __init__(self, n: int = 2, alpha: float = 8.0, learnable: bool = False, param_dtype=float):
        super().__init__(alpha, learnable, param_dtype)
        if not is_whole(n, 2):
            raise UserError(f"n is {n!r}; a whole number from 2, with which there is one harmonic")
        self.harmonics = range(1, 2 * n - 2, 2)

    def primitive(self, x):
        w = 2 * math.pi / self.alpha
        return 0.5 + 2 / math.pi * sum(jnp.sin(k * w * x) / k for k in self.harmonics)

    def derivative(self, x):
        w = 2 * math.pi / self.alpha
        return 4 / self.alpha * sum(jnp.cos(k * w * x) for k in self.harmonics)
