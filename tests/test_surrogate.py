"""Spike functions: Heaviside forward, and backward the derivative of the stated primitive."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plif_jax import networks, surrogate
from plif_jax.errors import UserError

# Derivatives at x = -0.7, 0, 0.3, 1.5 with the default parameters, as SpikingJelly 2.0 gives them.
DERIVATIVES = {
    surrogate.ATan: (0.171347123095, 1.0, 0.529586853444, 0.043091171188),
    surrogate.Sigmoid: (0.216152459026, 1.0, 0.711577762587, 0.009866037165),
    surrogate.PiecewiseQuadratic: (0.3, 1.0, 0.7, 0.0),
    surrogate.PiecewiseExp: (0.248292651896, 0.5, 0.370409110341, 0.111565080074),
    surrogate.SoftSign: (0.173611111111, 1.0, 0.390625, 0.0625),
    surrogate.SuperSpike: (0.346020761246, 1.0, 0.591715976331, 0.16),
    surrogate.Erf: (0.158941707677, 1.128379167096, 0.787243431714, 0.000139253052),
    surrogate.NonzeroSignLogAbs: (0.588235294118, 1.0, 0.769230769231, 0.4),
    surrogate.QPseudoSpike: (0.173611111111, 1.0, 0.390625, 0.0625),
    surrogate.Rect: (0.0, 1.0, 1.0, 0.0),
    surrogate.LogTailedReLU: (0.0, 0.0, 1.0, 0.666666666667),
    surrogate.S2NN: (0.216152459026, 1.0, 0.769230769231, 0.4),
    surrogate.LeakyKReLU: (0.0, 1.0, 1.0, 1.0),
    surrogate.PiecewiseLeakyReLU: (0.5, 0.5, 0.5, 0.01),
    surrogate.SquarewaveFourierSeries: (0.426320082177, 0.5, 0.486184960199, 0.191341716183),
}
# Their derivative for x keeps to the defaults above; these settings move every kink and every slope.
SETTINGS = [
    (surrogate.ATan, {"alpha": 3.1}),
    (surrogate.Sigmoid, {"alpha": 2.7}),
    (surrogate.PiecewiseQuadratic, {"alpha": 0.8}),
    (surrogate.PiecewiseExp, {"alpha": 1.7}),
    (surrogate.SoftSign, {"alpha": 3.3}),
    (surrogate.SuperSpike, {"alpha": 1.9}),
    (surrogate.Erf, {"alpha": 0.9}),
    (surrogate.NonzeroSignLogAbs, {"alpha": 2.2}),
    (surrogate.QPseudoSpike, {"alpha": 3.5}),
    (surrogate.Rect, {"alpha": 0.7}),
    (surrogate.LogTailedReLU, {"alpha": 0.2}),
    (surrogate.S2NN, {"alpha": 3.0, "beta": 0.6}),
    (surrogate.LeakyKReLU, {"alpha": 1.4, "leak": 0.3}),
    (surrogate.PiecewiseLeakyReLU, {"alpha": 0.6, "c": 0.2}),
    (surrogate.SquarewaveFourierSeries, {"n": 4, "alpha": 5.0}),
]
X = np.linspace(-2.03, 2.11, 53)  # no point on a kink, points on both sides of every one

every_class = pytest.mark.parametrize("cls", DERIVATIVES, ids=lambda cls: cls.__name__)
every_setting = pytest.mark.parametrize("cls, settings", SETTINGS, ids=lambda value: getattr(value, "__name__", ""))


def test_every_surrogate_is_in_the_tables():
    classes = {c for c in vars(surrogate).values() if isinstance(c, type) and issubclass(c, surrogate.Surrogate)}
    assert set(DERIVATIVES) == {cls for cls, _ in SETTINGS} == classes - {surrogate.Surrogate}


@every_class
def test_fires_at_and_above_zero(cls):
    for dtype in (jnp.float32, jnp.bfloat16):
        spikes = cls()(jnp.asarray([-1.0, -1e-30, -0.0, 0.0, 1e-30, 3.0], dtype))
        np.testing.assert_array_equal(spikes, [0, 0, 1, 1, 1, 1])
        assert spikes.dtype == dtype


@every_class
def test_default_derivatives_are_the_fields(cls, x64):
    x = jnp.asarray([-0.7, 0.0, 0.3, 1.5])
    np.testing.assert_allclose(jax.grad(lambda x: cls()(x).sum())(x), DERIVATIVES[cls], atol=1e-11)


@every_setting
def test_gradient_is_the_derivative_of_the_primitive(cls, settings, x64):
    fire = cls(**settings)
    cotangent = jnp.cos(jnp.arange(X.size))
    gradient = jax.vjp(fire, jnp.asarray(X))[1](cotangent)[0]
    expected = jax.vjp(fire.primitive, jnp.asarray(X))[1](cotangent)[0]
    np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-13)


@every_setting
def test_learned_alpha_gets_the_derivative_of_the_primitive(cls, settings, x64):
    """Against central differences, since all but ATan take this derivative by autodiff."""
    cotangent = np.cos(np.arange(X.size))

    def total(fire):
        return jnp.sum(cotangent * fire(jnp.asarray(X)))

    alpha_bar = nnx.grad(total)(cls(**settings, learnable=True)).alpha[...]
    step = 1e-6
    above, below = (cls(**{**settings, "alpha": settings["alpha"] + d}).primitive(X) for d in (step, -step))
    np.testing.assert_allclose(alpha_bar, np.sum(cotangent * (above - below)) / (2 * step), rtol=1e-7, atol=1e-8)
    assert alpha_bar.shape == ()


def test_a_plain_number_fires_and_has_a_gradient(x64):
    assert surrogate.ATan()(0.5) == 1 and surrogate.ATan()(-0.5) == 0
    np.testing.assert_allclose(jax.grad(surrogate.ATan())(0.3), surrogate.ATan().derivative(0.3), rtol=1e-15)


@every_class
def test_the_primitive_of_no_number_is_none(cls):
    assert np.isnan(cls().primitive(jnp.float32(np.nan)))


def test_a_learned_alpha_has_a_gradient_however_large_the_current():
    far = surrogate.SoftSign(learnable=True).alpha_derivative(jnp.array([-1e30, 1e30], jnp.float32))
    np.testing.assert_array_equal(far, 0)


def test_alpha_is_one_number():
    for alpha in ("2", None, float("nan"), 2 + 1j, jnp.inf):
        with pytest.raises(UserError, match=r"alpha is .*; a surrogate's alpha is a finite number"):
            surrogate.ATan(alpha)
    for alpha in (2, np.float32(2), jnp.bfloat16(2), nnx.Param(2.0), nnx.Param(jnp.asarray(2.0))):
        np.testing.assert_allclose(surrogate.ATan(alpha).derivative(0.0), 1.0)
        np.testing.assert_allclose(nnx.jit(lambda alpha: surrogate.ATan(alpha).derivative(0.0))(alpha), 1.0)
    with pytest.raises(UserError, match=r"alpha has shape \(3,\); a surrogate has one alpha"):
        surrogate.ATan(jnp.full(3, 2.0), learnable=True)


@pytest.mark.parametrize("shape", [(3,), (2, 1), (1, 1, 3)])
def test_alphas_of_a_subclass_get_gradients_of_their_own(shape, x64):
    class Each(surrogate.ATan):
        def __init__(self, alphas):
            super().__init__(learnable=True)
            self.alpha = nnx.Param(alphas)

    alphas = jnp.linspace(1.0, 3.0, math.prod(shape)).reshape(shape)
    x, g = (jax.random.normal(jax.random.key(i), (4, 2, 3)) for i in (0, 1))
    with jax.numpy_rank_promotion("allow"):
        found = nnx.grad(lambda s: (s(x) * g).sum())(Each(alphas)).alpha[...]
        expected = jax.grad(lambda alphas: (jnp.arctan(jnp.pi / 2 * alphas * x) / jnp.pi * g).sum())(alphas)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_alpha_is_a_parameter_only_where_it_is_learned():
    assert not jax.tree.leaves(nnx.state(surrogate.ATan(), nnx.Param))
    (alpha,) = jax.tree.leaves(nnx.state(surrogate.ATan(3.0, learnable=True), nnx.Param))
    assert alpha == 3


def test_a_surrogate_of_ones_own_needs_two_functions(x64):
    class Gaussian(surrogate.Surrogate):
        def primitive(self, x):
            return jax.scipy.stats.norm.cdf(self.alpha * x)

        def derivative(self, x):
            return self.alpha * jax.scipy.stats.norm.pdf(self.alpha * x)

    fire = Gaussian(1.5, learnable=True)
    x = jnp.asarray([-0.4, 0.9])
    np.testing.assert_allclose(jax.grad(lambda x: fire(x).sum())(x), jax.grad(lambda x: fire.primitive(x).sum())(x))
    np.testing.assert_allclose(
        nnx.grad(lambda fire: fire(x).sum())(fire).alpha[...],
        jnp.sum(x * jax.scipy.stats.norm.pdf(1.5 * x)),
        rtol=1e-12,
    )


def test_each_of_several_learned_parameters_gets_its_own_gradient(x64):
    class Scaled(surrogate.Surrogate):
        def __init__(self, alpha, beta):
            super().__init__(alpha, learnable=True)
            self.beta = nnx.Param(jnp.asarray(beta))

        def primitive(self, x):
            return self.beta * jax.nn.sigmoid(self.alpha * x)

        def derivative(self, x):
            return self.beta * self.alpha * jax.nn.sigmoid(self.alpha * x) * jax.nn.sigmoid(-self.alpha * x)

    fire, x = Scaled(1.5, 0.7), jnp.asarray([-0.4, 0.9, 1.3])
    found, expected = (
        nnx.grad(lambda fire, function=function: jnp.sum(jnp.arange(3) * function(fire)))(fire)
        for function in (lambda fire: fire(x), lambda fire: fire.primitive(x))
    )
    for name in ("alpha", "beta"):
        np.testing.assert_allclose(found[name][...], expected[name][...], rtol=1e-12)
    assert not np.isclose(found["alpha"][...], found["beta"][...])


@pytest.mark.parametrize("setting", ["alpha", "beta"])
def test_the_gradient_of_a_setting_that_jax_traces_is_not_lost(setting):
    x = jnp.linspace(-1, 1, 8)  # without the step
    of_spikes = jax.grad(lambda value: (surrogate.S2NN(**{setting: value})(x) * x).sum())(1.5)
    of_primitive = jax.grad(lambda value: (surrogate.S2NN(**{setting: value}).primitive(x) * x).sum())(1.5)
    assert of_primitive != 0
    np.testing.assert_allclose(of_spikes, of_primitive, rtol=1e-5)


@pytest.mark.parametrize("cls", list(DERIVATIVES))
def test_no_type_is_promoted_by_the_way(cls):
    with jax.numpy_dtype_promotion("strict"):
        nnx.grad(lambda fire: fire(jnp.ones(3)).sum())(cls(learnable=True))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_short_floats_compute_where_promotion_is_forbidden(dtype):
    net = networks.NMNISTNet(channels=4, number_layer=1, dtype=dtype, rngs=nnx.Rngs(0))
    net.set_attributes(deterministic=True)
    with jax.numpy_dtype_promotion("strict"):
        nnx.grad(lambda net, x: net(x).sum())(net, jnp.ones((2, 1, 34, 34, 2)))


@pytest.mark.parametrize(
    "function, x, slopes",
    [
        (surrogate.Rect(2.0), [-0.25, -0.24, 0.24, 0.25], [0, 2, 2, 0]),
        (surrogate.S2NN(alpha=2.0, beta=3.0), [0.0], [3.0]),
        (surrogate.PiecewiseLeakyReLU(2.0, 0.1), [-2.0, 2.0], [0.1, 0.1]),
    ],
)
def test_a_slope_at_a_kink_is_the_one_outside(function, x, slopes):
    np.testing.assert_allclose(function.derivative(jnp.array(x)), slopes, rtol=1e-6)


class Scaled(surrogate.ATan):
    """A function with two parameters, which computes in float32 whatever it is given."""

    def __init__(self):
        super().__init__(2.0, learnable=True)
        self.scale = nnx.Param(jnp.ones((), jnp.float32))

    def primitive(self, x):
        return self.scale[...] * super().primitive(x.astype(jnp.float32))

    def derivative(self, x):
        return self.scale[...] * super().derivative(x)


def test_a_function_may_compute_in_a_wider_type_than_its_spikes():
    x = jnp.linspace(-1, 1, 5, dtype=jnp.bfloat16)
    bar = nnx.grad(lambda function: function(x).astype(jnp.float32).sum())(Scaled())
    assert bar.scale[...].dtype == jnp.float32 and bar.scale[...] != 0
    wide = surrogate.ATan(jnp.float32(2.0))
    assert jax.grad(lambda x: wide(x).astype(jnp.float32).sum())(x).dtype == jnp.bfloat16
