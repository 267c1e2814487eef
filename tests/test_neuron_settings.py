"""What neurons are made of: time constants, potentials, surrogates; and those that JAX traces."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from weights import small

from plif_jax import networks, neurons, surrogate
from plif_jax.errors import UserError


@pytest.mark.parametrize("tau", [1.0, 0.0, -2.0, math.nan, math.inf, 10**400, "2", np.array([2.0, 3.0])])
def test_tau_of_one_or_less_is_refused(tau):
    with pytest.raises(UserError, match=r"above 1 timestep"):
        neurons.PLIF(tau)
    with pytest.raises(UserError, match=r"above 1 timestep"):
        neurons.LIF(tau)


@pytest.mark.parametrize(("given", "said"), [(surrogate.ATan, "ATan"), ("atan", "'atan'")])
def test_a_surrogate_is_made_before_it_is_given(given, said):
    with pytest.raises(UserError, match=rf"surrogate is {said}; give an instance"):
        neurons.PLIF(surrogate=given)


def test_a_surrogate_that_holds_parameters_is_a_module():
    class Holder:
        def __init__(self):
            self.alpha = nnx.Param(jnp.asarray(2.0))

        def __call__(self, x):
            return surrogate.ATan(self.alpha[...])(x)

    with pytest.raises(UserError, match=r"surrogate is a Holder, which holds arrays but is no nnx\.Module; derive it"):
        neurons.PLIF(surrogate=Holder())


def test_numbers_of_numpy_s_fire_as_python_s(x64):
    current = jnp.full((1, 1), np.float32(0.7))  # of which 0.7 in float64 is a little more
    for threshold in (np.float64(0.7), 0.7):
        neuron = neurons.IF(v_threshold=threshold)
        for spikes in (neuron(current), neuron.unroll_by_autodiff(None, current)[1]):
            np.testing.assert_array_equal(spikes, [[1.0]])


@pytest.mark.parametrize("value", [[1.0, 2.0], "1", None, surrogate.ATan()])
def test_a_threshold_is_a_number(value):
    with pytest.raises(UserError, match=r"v_threshold is of type .*; give a number, an array, or an nnx") as error:
        neurons.LIF(v_threshold=value)
    assert "\n" not in str(error.value)
    if value is not None:
        with pytest.raises(UserError, match="v_reset is of type"):
            neurons.LIF(v_reset=value)


@pytest.mark.parametrize("value", [np.complex64(1j), np.array(["1", "2"]), jnp.array(True)])
@pytest.mark.parametrize("name", ["v_threshold", "v_reset"])
def test_a_potential_is_real(name, value):
    with pytest.raises(UserError, match=f"{name} is .*; a potential is a real number, or an array of them"):
        neurons.LIF(**{name: value})


@pytest.mark.parametrize("value", ["no", 1, None])
def test_a_switch_is_true_or_false(value):
    with pytest.raises(UserError, match=rf"^detach_reset is {value!r}; give True or False"):
        neurons.PLIF(detach_reset=value)
    with pytest.raises(UserError, match=rf"^learnable is {value!r}; give True or False"):
        surrogate.ATan(learnable=value)
    for name in ("use_plif", "use_max_pool", "alpha_learnable", "detach_reset"):
        with pytest.raises(UserError, match=rf"^{name} is {value!r}; give True or False"):
            networks.NMNISTNet(channels=2, rngs=nnx.Rngs(0), **{name: value})


@pytest.mark.parametrize("v", [np.array([None, None]), np.array([1j, 0])])
def test_a_membrane_is_real(v):
    with pytest.raises(UserError, match="the membrane v is not of real numbers"):
        neurons.PLIF().unroll(v, jnp.ones((3, 2)))


@pytest.mark.parametrize(
    "make", [lambda n: surrogate.S2NN(beta=n), surrogate.LeakyKReLU, lambda n: surrogate.PiecewiseLeakyReLU(c=n)]
)
@pytest.mark.parametrize("value", ["1", math.nan, [1.0, math.inf]])
def test_what_a_surrogate_has_besides_alpha_is_a_number(make, value):
    with pytest.raises(UserError, match=r"^(beta|leak|c) is .*; give a finite number"):
        make(value)


@pytest.mark.parametrize("beta", [np.array([0.5, 2.0]), nnx.Param(jnp.array([0.5, 2.0])), "traced"])
def test_a_setting_may_be_an_array_or_learned(beta):
    x, expected = jnp.array([0.5, 1.0]), np.array([0.5, 2.0]) / (np.array([0.5, 1.0]) + 1)
    if isinstance(beta, str):
        found = jax.jit(lambda b: surrogate.S2NN(beta=nnx.Param(b)).derivative(x))(jnp.array([0.5, 2.0]))
    else:
        found = surrogate.S2NN(beta=beta).derivative(x)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("n", [1, 0, 2.5, "3"])
def test_a_square_wave_has_a_harmonic(n):
    with pytest.raises(UserError, match=rf"^n is {n!r}; a whole number from 2"):
        surrogate.SquarewaveFourierSeries(n)


@pytest.mark.parametrize("shape", [(2,), (7, 3), (5, 2, 3)])
@pytest.mark.parametrize("name", ["v_threshold", "v_reset"])
def test_potentials_fit_the_currents(name, shape):
    neuron = neurons.LIF(**{name: np.full(shape, 0.5)})
    with pytest.raises(UserError, match=rf"{name} of shape {re.escape(str(shape))} does not fit .* = \(4, 2, 3\)"):
        neuron(jnp.ones((4, 2, 3)))


@pytest.mark.parametrize("shape", [(2, 1), (1, 3), (2, 3)])
def test_potentials_may_be_spread_over_neurons(shape):
    alike, x = np.full(shape, 0.5), jnp.linspace(0, 2, 24).reshape(4, 2, 3)
    np.testing.assert_array_equal(neurons.LIF(v_threshold=alike)(x), neurons.LIF(v_threshold=0.5)(x))


def test_what_is_learned_is_of_a_floating_point_type():
    for make, dtype in itertools.product((neurons.PLIF, surrogate.ATan), (int, jnp.float8_e4m3fn)):
        with pytest.raises(UserError, match=r"param_dtype is .*(int|float8).*; give a floating-point type"):
            make(param_dtype=dtype)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_a_w_of_few_bits_rounds_k_once(dtype):
    w = jnp.linspace(-12, 12, 401).astype(dtype)
    k, slope = jax.vmap(jax.value_and_grad(neurons._sigmoid))(w)
    exact = 1 / (1 + np.exp(-np.asarray(w, float)))
    np.testing.assert_array_equal(k, jnp.asarray(exact, jnp.float32).astype(dtype))
    wide = np.asarray(k, np.float32)
    np.testing.assert_array_equal(slope, jnp.asarray((1 - wide) * wide).astype(dtype))
    assert neurons.PLIF(1.002, param_dtype=jnp.bfloat16).tau > 1


def test_gradients_of_parameters_of_few_bits_are_summed_in_float32():
    """In bfloat16 a sum of ones ends at 256."""
    x = jax.random.normal(jax.random.key(0), (800, 64)) + 1

    def bars(dtype):
        fire = surrogate.ATan(learnable=True, param_dtype=dtype)
        neuron = neurons.PLIF(param_dtype=dtype, v_threshold=nnx.Param(jnp.ones((), dtype)), surrogate=fire)
        return nnx.grad(lambda neuron: neuron(x).sum())(neuron)

    ours, wide = bars(jnp.bfloat16), bars(jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {jnp.dtype(jnp.bfloat16)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.float32(a), b, rtol=0.02), ours, wide)


def test_a_tau_that_is_learned_is_plifs():
    with pytest.raises(UserError, match=r"tau is an nnx.Param; give a number: PLIF\(init_tau=2.0\) learns tau"):
        neurons.LIF(nnx.Param(2.0))


def test_thresholds_and_resets_may_be_mapped_and_differentiated():
    x = jax.random.normal(jax.random.key(0), (8, 20)) * 2

    def total(v_threshold, v_reset):
        return (neurons.PLIF(v_threshold=v_threshold, v_reset=v_reset)(x) * x).sum()

    pairs = jnp.asarray([0.5, 1.0]), jnp.asarray([0.0, 0.1])
    np.testing.assert_allclose(jax.vmap(total)(*pairs), list(map(total, *pairs)), rtol=1e-6)
    learned = neurons.PLIF(v_threshold=nnx.Param(jnp.float32(1)), v_reset=nnx.Param(jnp.float32(0.1)))
    expected = nnx.grad(lambda neuron: (neuron(x) * x).sum())(learned)
    found = jax.grad(total, (0, 1))(1.0, 0.1)
    np.testing.assert_allclose(found, (expected.v_threshold[...], expected.v_reset[...]), rtol=1e-5)


@pytest.mark.parametrize("make", [neurons.LIF, neurons.PLIF])
def test_a_traced_tau_is_told_how_tau_is_learned(make):
    with pytest.raises(UserError, match=r"tau is a value that JAX traces; give a number: PLIF\(init_tau=2\.0\) learns"):
        jax.jit(lambda tau: make(tau).tau)(2.0)


def test_a_square_wave_needs_a_harmonic():
    with pytest.raises(UserError, match="n is 1; a whole number from 2"):
        surrogate.SquarewaveFourierSeries(n=1)


@pytest.mark.parametrize("use_plif", [False, True])
def test_a_network_that_keeps_the_gradient_of_its_resets_does_so_in_all_neurons(use_plif):
    neurons_of = small(use_plif=use_plif, detach_reset=False).named_neurons().values()
    assert neurons_of and not any(neuron.detach_reset for neuron in neurons_of)


def test_thresholds_of_a_wider_type_leave_the_membrane_its_own(x64):
    v, s = neurons.IF(v_threshold=np.full(3, 1.1)).unroll(None, jnp.ones((2, 3), jnp.float32))
    assert v.dtype == s.dtype == jnp.float32


def test_a_reset_that_is_learned_is_where_a_sequence_begins(x64):
    x = 2 * jax.random.normal(jax.random.key(0), (4, 11))
    neuron = neurons.LIF(3.0, v_reset=nnx.Param(jnp.asarray(0.4)))

    def gradient(run):
        return nnx.grad(lambda neuron: run(neuron, None, x)[0].sum())(neuron).v_reset[...]

    fast, by_autodiff = map(gradient, (neurons.Neuron.unroll, neurons.Neuron.unroll_by_autodiff))
    np.testing.assert_allclose(fast, by_autodiff, rtol=1e-11)


def test_a_membrane_of_whole_numbers_is_taken_as_real_ones():
    x = jax.random.uniform(jax.random.key(0), (4, 11))
    for given, expected in zip(neurons.LIF().unroll(np.zeros(11, int), x), neurons.LIF().unroll(None, x), strict=True):
        np.testing.assert_array_equal(given, expected)


def test_no_timesteps_leave_the_membrane_as_it_was():
    v, spikes = neurons.LIF().unroll(jnp.full(3, 0.3), jnp.ones((1, 3)), T=0)
    assert (v == jnp.float32(0.3)).all() and spikes.shape == (0, 3)


def test_the_gradient_of_a_current_that_stays_is_summed_in_float32():
    T, neuron = 400, neurons.IF(v_threshold=1e9)

    def gradient(rows):
        x = jnp.full((rows, 1), 0.25, jnp.bfloat16)
        return jax.grad(lambda x: neuron.unroll(None, x, T=T)[0].sum())(x)

    once, each = gradient(1), gradient(T)
    assert once.dtype == jnp.bfloat16 and once[0] == each.astype(jnp.float32).sum(0) == T


def test_short_currents_are_taken_where_the_user_forbids_to_mix_types():
    with jax.numpy_dtype_promotion("strict"):
        assert neurons.PLIF()(jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.bfloat16
