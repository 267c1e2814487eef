"""Neurons of a user's own: several states, other variables, other outputs, no tau."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import cases

from plif_jax import networks, neurons, surrogate
from plif_jax.errors import UserError
from plif_jax.training import checkpoint, loop

pytestmark = pytest.mark.usefixtures("optimized")


def currents(T=4, N=11, seed=0):
    return jnp.asarray(cases.array(seed, (T, N), 1.2) + 0.7)


class Synaptic(neurons.PLIF):
    """A neuron of a user's own with two states, the synapse's current and the membrane, and a decay for each."""

    def __init__(self):
        super().__init__(3.0)
        self.decay = nnx.Param(jnp.asarray(0.7))

    def rest(self, x):
        return jnp.stack([super().rest(x)] * 2)

    def step(self, states, x):
        i, v = states
        i = self.decay[...] * i + x
        v, s = super().step(v, i)
        return jnp.stack([i, v]), s


def test_several_states_are_stacked_in_one_array(x64):
    neuron, x = Synaptic(), currents(T=7)
    ways = (neurons.Neuron.unroll, neurons.Neuron.unroll_by_autodiff)
    fast, autodiff = (
        nnx.grad(lambda neuron, x, run=run: (jnp.arange(7) @ run(neuron, None, x)[1] ** 2).sum(), argnums=(0, 1))(
            neuron, x
        )
        for run in ways
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), fast, autodiff)
    assert fast[0].decay[...] != 0 != fast[0].w[...]
    states, s = neuron.unroll(None, x)
    middle, first = neuron.unroll(None, x[:3])
    after, second = neuron.unroll(middle, x[3:])
    np.testing.assert_array_equal(after, states)
    np.testing.assert_array_equal(jnp.concatenate([first, second]), s)


def test_several_states_and_a_current_given_once(x64):
    """As in an image network, whose first neurons see one current at every timestep."""
    neuron, x = Synaptic(), currents(T=1)

    def loss(neuron, x, T):
        return (jnp.arange(7) @ neuron.unroll(None, x, T=T)[1] ** 2).sum()

    once = nnx.grad(lambda neuron, x: loss(neuron, x, 7), argnums=(0, 1))(neuron, x)
    repeated = nnx.grad(lambda neuron, x: loss(neuron, x.repeat(7, 0), None), argnums=(0, 1))(neuron, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), once, repeated)
    assert (once[1] != 0).any()


def test_any_variable_of_a_neuron_of_ones_own_gets_its_gradient():
    class Rate(nnx.Variable):
        pass

    class Leaky(neurons.Neuron):
        def __init__(self):
            super().__init__()
            self.rate = Rate(jnp.asarray(0.5))

        def charge(self, v, x):
            return v + (x - v) * self.rate[...]

    x = currents(4, 3)
    fast, plain = (
        nnx.grad(lambda neuron, way=way: getattr(neuron, way)(None, x)[1].sum(), argnums=nnx.DiffState(0, Rate))(
            Leaky()
        )
        for way in ("unroll", "unroll_by_autodiff")
    )
    np.testing.assert_allclose(fast.rate[...], plain.rate[...], rtol=1e-6)
    assert fast.rate[...] != 0


def test_settings_that_cannot_be_compiled_for_are_told():
    class Decaying(neurons.Neuron):
        def __init__(self, betas):
            super().__init__()
            self.betas = betas

        def charge(self, v, x):
            return self.betas[0] * v + x

    x = currents(4, 3)
    for betas in ([0.5, 0.9], {0: 0.5}):
        with pytest.raises(UserError, match=r"Decaying holds a setting of unhashable type: '(list|dict)'; give"):
            Decaying(betas)(x)
    np.testing.assert_array_equal(Decaying((0.5, 0.9))(x), Decaying(nnx.List([0.5, 0.9]))(x))


class Telling(neurons.IF):
    """Gives its potential before firing beside its spikes."""

    def step(self, v, x):
        h = self.charge(v, x)
        v, s = super().step(v, x)
        return v, (s, h)


@pytest.mark.parametrize("which", [0, 1])
def test_a_step_may_give_more_than_spikes(which):
    neuron, x = Telling(), currents(3, 5)
    given, defined = (
        jax.grad(lambda x, unroll=unroll: jax.tree.leaves(unroll(None, x))[which].sum())(x)
        for unroll in (neuron.unroll, neuron.unroll_by_autodiff)
    )
    np.testing.assert_allclose(given, defined, rtol=1e-6)


def test_neurons_without_one_tau_are_trained_and_no_tau_is_told(settings, tmp_path, monkeypatch):
    """IF neurons, which have none, and PLIF neurons with one for each channel, learned alphas among them."""

    class PerChannel(neurons.PLIF):
        def __init__(self, C):
            super().__init__(surrogate=surrogate.ATan(learnable=True))
            self.w = nnx.Param(jnp.zeros((1, 1, 1, C)))

    class Net(networks.SpikingNet):
        def __init__(self, T, *, channels, number_layer, **flags):
            own = lambda net, shape, rngs: (PerChannel(shape[-1]), shape)  # noqa: E731
            integrating = lambda net, shape, rngs: (neurons.IF(), shape)  # noqa: E731
            conv = [networks.conv(channels), networks.norm, own, networks.pool, own]
            fc = [networks.flatten, networks.linear(100), integrating]
            super().__init__({"static_conv": [], "conv": conv, "fc": fc}, (34, 34, 2), 10, T=T, **flags)
            self.conv[4].surrogate.alpha = nnx.Param(jnp.full((1, 1, 1, channels), 2.0))

    monkeypatch.setitem(networks.NETWORKS, "Digits", Net)
    said = []
    result = loop.train(settings(log_dir_prefix=str(tmp_path), max_epoch=1), say=said.append)
    assert result["tau"] == result["tau_before"] == {} and list(result["alpha"]) == ["conv.2"]
    (line,) = [line for line in said if line.startswith("epoch ")]
    assert "tau" not in line


class PerNeuron(neurons.PLIF):
    def __init__(self, n):
        super().__init__()
        self.w = nnx.Param(jnp.zeros(n))


def with_neuron(make):
    """The quickstart's network with a neuron of one's own."""

    class Net(networks.SpikingNet):
        def __init__(self, T, *, channels, number_layer, **flags):
            own = lambda net, shape, rngs: (make(), shape)  # noqa: E731
            conv = [networks.conv(channels), networks.norm, own, networks.pool]
            fc = [networks.flatten, networks.linear(100), networks.neuron]
            super().__init__({"static_conv": [], "conv": conv, "fc": fc}, (34, 34, 2), 10, T=T, **flags)

    return Net


@pytest.mark.parametrize(
    ("of", "said"),
    [
        (
            nnx.Variable,
            r"conv\.2\.v_threshold is an nnx\.Variable; training learns each nnx\.Param and keeps each nnx\.Ba",
        ),
        (jnp.asarray, r"conv\.2\.v_threshold is an array; training learns each nnx\.Param"),
    ],
)
def test_what_training_neither_learns_nor_keeps_is_refused(settings, tmp_path, monkeypatch, of, said):
    monkeypatch.setitem(networks.NETWORKS, "Digits", with_neuron(lambda: neurons.IF(v_threshold=of(jnp.ones(())))))
    with pytest.raises(UserError, match=said):
        loop.train(settings(log_dir_prefix=str(tmp_path)), say=None)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: Synaptic(), r"params/conv/2/decay\S* is missing there, \(\) here"),
        (lambda: neurons.IF(), r"params/conv/2/w\S* is \(\) there, missing here"),
        (lambda: PerNeuron(2), r"params/conv/2/w\S* is \(\) there, \(2,\) here"),
        (lambda: neurons.PLIF(v_reset=None), r"conv\.2\.v_reset is 0\.0 there, None here"),
        (lambda: neurons.PLIF(surrogate=surrogate.Erf()), r"conv\.2\.surrogate is ATan there, Erf here"),
        (lambda: neurons.PLIF(surrogate=surrogate.ATan(3.0)), r"conv\.2\.surrogate\.alpha is 2\.0 there, 3\.0 here"),
        (lambda: neurons.PLIF(surrogate=jax.nn.relu), r"conv\.2\.surrogate is ATan there, relu here"),
    ],
)
def test_the_checkpoint_of_another_network_is_refused_in_a_line(settings, tmp_path_factory, monkeypatch, other, said):
    folder = tmp_path_factory.getbasetemp() / "networks"
    config = settings(log_dir_prefix=str(folder), max_epoch=1)
    monkeypatch.setitem(networks.NETWORKS, "Digits", with_neuron(neurons.PLIF))
    loop.train(config, say=None)
    monkeypatch.setitem(networks.NETWORKS, "Digits", with_neuron(other))
    longer = dataclasses.replace(config, max_epoch=2)
    for read in (lambda: loop.train(longer, say=None), lambda: checkpoint.load_network(config.run_dir)):
        with pytest.raises(UserError, match=f"is of another network than the code makes now: {said}. Go back") as told:
            read()
        assert "\n" not in str(told.value)


def test_a_network_whose_making_needs_numbers_is_read_back(settings, tmp_path, monkeypatch):
    """JAX traces how others are made; this one it cannot."""
    monkeypatch.setitem(networks.NETWORKS, "Digits", with_neuron(lambda: neurons.PLIF(jnp.float32(3))))
    config = settings(log_dir_prefix=str(tmp_path), max_epoch=1)
    result = loop.train(config, say=None)
    _, net = checkpoint.load_network(config.run_dir)
    np.testing.assert_allclose(net.conv[2].tau, result["tau"]["conv.2"], rtol=1e-6)


class TwoCompartments(neurons.IF):
    """A threshold for each, of which both see the current."""

    def rest(self, x):
        return jnp.zeros((2, *x.shape[1:]), x.dtype)

    def step(self, v, x):
        v, s = super().step(v, jnp.stack([x, x]))
        return v, s.mean(0)


def test_thresholds_may_be_of_the_states_of_a_neuron_of_ones_own():
    neuron = TwoCompartments(v_threshold=jnp.array([[0.5], [1.0]]))
    np.testing.assert_array_equal(neuron(jnp.full((2, 3), 0.5)), [[0.5] * 3, [1.0] * 3])
