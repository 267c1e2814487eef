"""Neurons: closed forms, the fast gradient against autodiff and a plain loop, the paper program's numbers."""

import itertools
import json
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import cases

from plif_jax import neurons, sequence, surrogate
from plif_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("optimized")
REFERENCE = np.load(Path(__file__).parent / "reference" / "neurons.npz")
RESETS = (0.0, 0.2, None)


def currents(T=4, N=11, seed=0):
    return jnp.asarray(cases.array(seed, (T, N), 1.2) + 0.7)


# Closed forms


@pytest.mark.parametrize("v_reset", RESETS)
def test_a_leaky_membrane_below_threshold_relaxes_exponentially(v_reset, x64):
    tau, current = 3.0, 0.6
    v, spikes = neurons.LIF(tau, v_reset=v_reset).unroll(None, jnp.full((12, 1), current))
    rest = v_reset or 0.0
    np.testing.assert_allclose(v, rest + current * (1 - (1 - 1 / tau) ** 12), rtol=1e-13)
    assert not spikes.any()


@pytest.mark.parametrize("v_reset", RESETS)
@pytest.mark.parametrize("make", [lambda **k: neurons.LIF(4.0, **k), lambda **k: neurons.PLIF(4.0, **k)])
def test_a_leaky_neuron_fires_with_the_period_of_the_closed_form(make, v_reset, x64, rolled):
    """From v0 the membrane reaches threshold after ceil(log(1 - (1 - v0) / (v_inf - v0)) / log(1 - 1/tau)) steps."""
    rest, current = v_reset or 0.0, 1.3
    v_inf, start = rest + current, rest
    spike_times = np.flatnonzero(make(v_reset=v_reset)(jnp.full((40, 1), current)))
    expected, t = [], -1
    while True:
        steps = math.ceil(math.log((v_inf - 1.0) / (v_inf - start)) / math.log(1 - 1 / 4.0))
        t += steps
        if t >= 40:
            break
        expected.append(t)
        start = v_inf - (v_inf - start) * (1 - 1 / 4.0) ** steps - 1.0 if v_reset is None else v_reset
    assert len(expected) > 3
    np.testing.assert_array_equal(spike_times, expected)


@pytest.mark.parametrize("v_reset, period", [(0.0, 4), (0.5, 2), (-0.5, 6)])
def test_an_integrator_fires_after_threshold_over_current_steps(v_reset, period, rolled):
    spikes = neurons.IF(v_reset=v_reset)(jnp.full((24, 1), 0.25))
    np.testing.assert_array_equal(np.flatnonzero(spikes), np.arange(period - 1, 24, period))


def test_soft_reset_keeps_what_exceeds_the_threshold():
    v, spikes = neurons.IF(v_reset=None, v_threshold=0.5).unroll(None, jnp.full((8, 1), 0.375))
    assert spikes.sum() == 6 and v == 8 * 0.375 - 6 * 0.5


def test_a_neuron_at_threshold_fires():
    assert neurons.IF()(jnp.ones((1, 1))) == 1


def test_the_tau_of_a_lif_is_a_setting():
    assert not jax.tree.leaves(nnx.state(neurons.LIF(tau=jnp.asarray(3.0))))


def test_tau_and_w_are_two_names_of_one_thing():
    plif = neurons.PLIF(init_tau=5.0)
    np.testing.assert_allclose(plif.w[...], -math.log(4.0), rtol=1e-6)
    np.testing.assert_allclose(plif.tau, 5.0, rtol=1e-6)
    plif.w[...] = jnp.asarray(-40.0)
    assert plif.tau > 1


# The fast gradient


class Adaptive(neurons.Neuron):
    """A neuron of a user's own: one learned gain per unit and a quadratic leak."""

    def __init__(self, size, **kwargs):
        super().__init__(**kwargs)
        self.gain = nnx.Param(jnp.linspace(0.5, 1.5, size))

    def charge(self, v, x):
        return v - 0.1 * v**2 + self.gain[...] * x


def test_w_starts_where_the_paper_s_program_starts(x64):
    """At a float32 number, whatever the precision."""
    w = float(neurons.PLIF(init_tau=3.0).w[...])
    assert w == np.float32(-np.log(2.0)) and w != -np.log(2.0)


def make_neurons(N=11):
    """Every neuron with every reset, detached or not; alpha is learned with either."""
    kinds = {"IF": neurons.IF, "LIF": partial(neurons.LIF, 3.0)}
    kinds |= {"PLIF": partial(neurons.PLIF, 3.0), "own": partial(Adaptive, N)}
    for v_reset, detach, (i, kind) in itertools.product(RESETS, (True, False), enumerate(kinds)):

        def made(kind=kind, v_reset=v_reset, detach=detach, learnable=detach == (i % 2 == 0)):
            fire = surrogate.ATan(1.7, learnable=learnable)
            return kinds[kind](v_reset=v_reset, detach_reset=detach, surrogate=fire)

        yield pytest.param(made, id=f"{kind},v_reset={v_reset},detach={detach}")
    for name in ("v_threshold", "v_reset"):  # which may be learned

        def learned(name=name):
            return neurons.PLIF(3.0, **{name: nnx.Param(jnp.asarray(0.4))})

        yield pytest.param(learned, id=f"{name} learned")


def by_a_loop(neuron, v, x):
    spikes = []
    for x_t in x:
        h = neuron.charge(v, x_t)
        s = neuron.surrogate(h - neuron.v_threshold)
        reset = jax.lax.stop_gradient(s) if neuron.detach_reset else s
        v = h - neuron.v_threshold * reset if neuron.v_reset is None else (1 - reset) * h + neuron.v_reset * reset
        spikes.append(s)
    return v, jnp.stack(spikes)


@pytest.mark.parametrize("make", list(make_neurons()))
def test_three_ways_to_unroll_agree_in_value_and_every_gradient(make, x64):
    graphdef, state = nnx.split(make())
    x, v = currents(), jnp.asarray(cases.array(1, (11,), 0.5))
    cotangents = jnp.asarray(cases.array(2, (11,))), jnp.asarray(cases.array(3, x.shape))

    @jax.jit
    def all_ways():
        ways = (neurons.Neuron.unroll, neurons.Neuron.unroll_by_autodiff, by_a_loop)
        answers = []
        for way in ways:
            value, vjp = jax.vjp(lambda state, v, x, way=way: way(nnx.merge(graphdef, state), v, x), state, v, x)
            answers.append((value, vjp(cotangents)))
        return answers

    fast, autodiff, loop = all_ways()
    assert fast[0][1].any() and (fast[1][1] != 0).all()  # spikes; d / dv
    for other in (autodiff, loop):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), fast, other)


def test_the_fast_gradient_holds_past_the_longest_unrolled_stretch(x64, monkeypatch):
    monkeypatch.setattr(sequence, "MAX_UNROLL", 2)
    neuron, x = neurons.PLIF(surrogate=surrogate.ATan(learnable=True)), currents(N=3)
    fast, autodiff = (
        jax.jit(nnx.grad(lambda neuron, x, run=run: (run(neuron, None, x)[1] ** 2).sum(), argnums=(0, 1)))(neuron, x)
        for run in (neurons.Neuron.unroll, neurons.Neuron.unroll_by_autodiff)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), fast, autodiff)


@pytest.mark.parametrize("T, loops", [(10, False), (20, True)])
def test_long_sequences_without_a_gradient_run_each_timestep_once(T, loops):
    neuron, x = neurons.PLIF(), currents(T, N=1000).astype(np.float32)
    forward_only = jax.jit(lambda x: neuron(x)).lower(x).compile()
    trained = jax.jit(lambda x: jax.vjp(neuron, x)[0]).lower(x).compile()
    np.testing.assert_array_equal(forward_only(x), trained(x))
    # Unrolled without the membranes being kept, timestep t's fusion would run the t before it again.
    assert ["while" in program.as_text() for program in (forward_only, trained)] == [loops, False]


@pytest.mark.parametrize("T", [10, 20])
def test_many_timesteps_are_written_where_they_end(T):
    neuron, x = neurons.PLIF(), currents(T, N=1000).astype(np.float32)

    def found():
        answer = jax.jit(nnx.value_and_grad(lambda neuron, x: (neuron(x) ** 2).sum(), argnums=(0, 1)))
        forward_and_backward = jax.jit(lambda x: (neuron(x), jax.vjp(neuron, x)[1](x)))
        program = forward_and_backward.lower(x).compile().as_text()
        # XLA's CPU compiler stacks results of many fusions by copying them, each at its own time.
        return answer(neuron, x), program[program.index("\nENTRY") :].count(" concatenate(")

    grouped, copies = found()
    assert copies == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequence, "MAX_STACK", sequence.MAX_UNROLL)
        jax.clear_caches()
        flat, copies = found()
        assert copies > 0  # or the groups are no longer worth their lines
    jax.clear_caches()
    jax.tree.map(np.testing.assert_array_equal, grouped, flat)


# The paper program's numbers


@pytest.mark.parametrize("spec", json.loads(str(REFERENCE["spec"])), ids=lambda spec: f"case{spec['seed']}")
def test_reference_case(spec, x64, rolled):
    i, shape = spec["seed"], (spec["T"], spec["N"])
    settings = {name: spec[name] for name in ("v_reset", "v_threshold", "detach_reset")}
    settings["surrogate"] = surrogate.ATan(learnable=spec["learn_alpha"])
    neuron = {"plif": neurons.PLIF, "lif": neurons.LIF}[spec["kind"]](spec["tau"], **settings)
    x = jnp.asarray(cases.array(200 + i, shape, 1.5) + 0.6)

    cotangent = jnp.asarray(cases.array(300 + i, shape))

    @jax.jit
    def run(neuron, x):
        (v, spikes), vjp = jax.vjp(lambda neuron, x: neuron.unroll(None, x), neuron, x)
        return v, spikes, *vjp((jnp.zeros_like(v), cotangent))

    v, spikes, neuron_bar, x_bar = run(neuron, x)

    np.testing.assert_array_equal(spikes, REFERENCE[f"{i}_spikes"])
    np.testing.assert_allclose(v, REFERENCE[f"{i}_v"], rtol=1e-9)
    np.testing.assert_allclose(x_bar, REFERENCE[f"{i}_gx"], rtol=1e-9, atol=1e-12)
    if spec["gw"] is not None:
        np.testing.assert_allclose(neuron_bar.w[...], spec["gw"], rtol=1e-9)
    if spec["learn_alpha"]:
        np.testing.assert_allclose(neuron_bar.surrogate.alpha[...], spec["galpha"], rtol=1e-9)


def test_float32_w_is_rounded_where_pytorch_rounds_it(x64, rolled):
    """To the bit: the membrane after one step shows k, and dv[T]/dw is a float32 sum of products rounded one by one."""
    T, N = 6, 2
    x = cases.array(1, (T, N), 0.2)  # no spikes
    for w in np.float32(cases.array(0, (60,))):
        neuron = neurons.PLIF(param_dtype=jnp.float32)
        neuron.w[...] = jnp.asarray(w)
        k = np.float32(1) / (np.float32(1) + np.float32(np.exp(-np.float64(w))))
        v, v_bar = [np.zeros(N)], np.ones(N)
        for x_t in x:
            v.append(v[-1] + (x_t - v[-1]) * np.float64(k))
        total = np.float32(0)
        for t in reversed(range(T)):
            g = np.float32(np.sum(v_bar * (x[t] - v[t])))
            total += g * (np.float32(1) - k) * k
            v_bar = v_bar - v_bar * np.float64(k)
        end, vjp = membrane_and_vjp(neuron, jnp.asarray(x))
        np.testing.assert_allclose(end, v[-1], rtol=1e-14)
        np.testing.assert_array_equal(vjp, total)


@jax.jit
def membrane_and_vjp(neuron, x):
    """v after the last step, and the gradient of its sum for w."""
    v, vjp = jax.vjp(lambda neuron: neuron.unroll(None, x)[0], neuron)
    return v, vjp(jnp.ones_like(v))[0].w[...]


# Time


@pytest.mark.parametrize("kind", [neurons.IF, neurons.LIF, neurons.PLIF])
def test_no_spike_depends_on_a_later_current(kind, x64):
    T = 6
    neuron = kind(detach_reset=False)
    jacobian = jax.jacrev(lambda x: neuron(x[:, None])[:, 0])(currents(T, 1)[:, 0])
    assert (jacobian[np.triu_indices(T, 1)] == 0).all()
    assert (jacobian[np.tril_indices(T)] != 0).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", [neurons.IF, neurons.LIF, neurons.PLIF])
def test_chunks_give_exactly_what_one_call_gives(kind, dtype):
    neuron, x = kind(v_reset=0.1), currents(T=12, N=40).astype(dtype)
    run = jax.jit(neuron.unroll)
    v_whole, whole = run(None, x)
    v, chunks = None, []
    for chunk in jnp.split(x, [1, 2, 5, 11]):
        v, spikes = run(v, chunk)
        chunks.append(spikes)
    np.testing.assert_array_equal(jnp.concatenate(chunks), whole)
    np.testing.assert_array_equal(v, v_whole)


def test_the_membrane_stays_float32_under_bfloat16():
    """bfloat16 has 8 bits: in it, a membrane near 1 would not notice a current of 0.0015."""
    x = jnp.full((9, 1), 0.0015, jnp.bfloat16)
    v, spikes = neurons.IF().unroll(jnp.full(1, 0.99), x)
    assert v.dtype == jnp.float32 and spikes.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.flatnonzero(spikes), [6])


def test_currents_may_be_numpys_or_plain_numbers():
    for x in (np.full((6, 2), 1.3), [[1.3, 1.3]] * 6):
        np.testing.assert_array_equal(neurons.PLIF()(x), neurons.PLIF()(jnp.full((6, 2), 1.3)))


def test_whole_currents_give_spikes_that_have_a_gradient():
    def loss(neuron, x):
        return jnp.mean((neuron(x) - 0.3) ** 2)

    x = np.ones((6, 2), np.uint8)
    bars = [nnx.grad(loss)(neurons.PLIF(), x).w[...] for x in (x, x.astype(np.float32))]
    assert bars[0] == bars[1] != 0


def test_w_has_a_second_derivative_where_the_first_is_zero(x64):
    def loss(w):
        neuron = neurons.PLIF()
        neuron.w[...] = w
        return (neuron.unroll_by_autodiff(None, jnp.ones((1, 1)))[0][0] - 0.5) ** 2 / 2

    assert jax.grad(loss)(0.0) == 0
    np.testing.assert_allclose(jax.grad(jax.grad(loss))(0.0), 0.0625, rtol=1e-6)


def test_no_timestep_leaves_the_membrane_alone():
    v, spikes = neurons.LIF().unroll(jnp.full(3, 0.3), jnp.zeros((0, 3)))
    assert (v == jnp.float32(0.3)).all() and spikes.shape == (0, 3)


# Mistakes


@pytest.mark.parametrize(("x", "says"), [(1.0, r"one number; give \[T, "), (jnp.ones(2, complex), "of type complex64")])
def test_a_current_has_an_axis_of_time_and_is_real(x, says):
    with pytest.raises(UserError, match=f"currents are {says}"):
        neurons.PLIF()(x)


@pytest.mark.parametrize("T", [1, 5, 40])
def test_a_current_that_stays_may_be_given_once(T, x64):
    """The same numbers, but the gradient of the one current is that of all."""
    neuron, x, v = neurons.PLIF(3.0), currents(1, 6), jnp.linspace(-0.5, 0.9, 6)

    def last_and_spikes(neuron, v, x):
        return neuron.unroll(v, x, T=T)

    once, vjp_once = jax.vjp(last_and_spikes, neuron, v, x)
    each, vjp_each = jax.vjp(last_and_spikes, neuron, v, jnp.broadcast_to(x, (T, 6)))
    jax.tree.map(np.testing.assert_array_equal, once, each)
    bars = (jnp.linspace(1, 2, 6), jnp.cos(jnp.arange(T * 6.0).reshape(T, 6)))
    (neuron_once, v_once, x_once), (neuron_each, v_each, x_each) = vjp_once(bars), vjp_each(bars)
    for one, other in [(neuron_once, neuron_each), (v_once, v_each), (x_once, x_each.sum(0, keepdims=True))]:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14), one, other)
    with pytest.raises(UserError, match=r"currents of shape \(2, 6\) for T = 3; give \[T, \.\.\.\], or \[1, "):
        neuron.unroll(None, currents(2, 6), T=3)


def test_a_membrane_of_another_shape_is_refused():
    with pytest.raises(UserError, match=r"\(4,\).*\[T, \.\.\.\] = \(5, 3\)"):
        neurons.LIF().unroll(jnp.zeros(4), jnp.zeros((5, 3)))


def test_a_reset_potential_may_be_an_array():
    for v_reset in (jnp.float32(0.1), np.array(0.1, np.float32)):
        for kind in (neurons.IF, neurons.LIF):
            np.testing.assert_array_equal(kind(v_reset=v_reset)(currents(3, 5)), kind(v_reset=0.1)(currents(3, 5)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: neurons.LIF(np.float64(3)),
        lambda: neurons.IF(v_threshold=np.float64(1.1)),
        lambda: neurons.IF(v_reset=np.float64(0.1)),
        lambda: neurons.IF(v_threshold=np.float64(1.1), v_reset=None),
    ],
)
def test_numpy_numbers_as_settings_do_not_widen_the_membrane(make, x64):
    x = jnp.asarray(currents(), jnp.float32)
    v, s = make().unroll(None, x)
    assert v.dtype == s.dtype == jnp.float32 and s.any()
    np.testing.assert_array_equal(s, make().unroll_by_autodiff(None, x)[1])


class Tupled(neurons.IF):
    def rest(self, x):
        return super().rest(x), super().rest(x)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x: Tupled().unroll(None, x), "rest of Tupled gives a tuple; stack its states in one array"),
        (
            lambda x: neurons.IF().unroll(None, x[:1], T=jnp.asarray(5)),
            "T is .*5.*; the number of timesteps is a whole",
        ),
        (lambda x: neurons.IF().unroll(None, x, T=3), r"shape \(4, 11\) for T = 3; give \[T, \.\.\.\], or \[1,"),
    ],
)
def test_what_unroll_cannot_take_is_told(call, said):
    with pytest.raises(UserError, match=said):
        call(jnp.asarray(currents()))
