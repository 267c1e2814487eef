"""What a run's settings make of its network and its data: each of them must arrive there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plif_jax import data, layers, networks, neurons
from plif_jax.config import Config
from plif_jax.data import events
from plif_jax.layers import Conv3x3
from plif_jax.training import state

PAPER = {"use_plif": True, "use_max_pool": True, "detach_reset": True}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"init_tau": 16.0},
        {"use_plif": False},
        {"use_plif": False, "init_tau": 16.0},
        {"use_max_pool": False},
        {"detach_reset": False},
        {"alpha_learnable": True},
        {"T": 3, "channels": 4, "number_layer": 3},
        {"precision": "bfloat16"},
    ],
    ids=str,
)
def test_the_network_is_the_one_that_the_settings_name(settings):
    config = Config(dataset_name="Digits", **PAPER | settings)
    net = state.network(config)
    spiking = list(net.named_neurons().values())
    assert {type(neuron) for neuron in spiking} == {neurons.PLIF if config.use_plif else neurons.LIF}
    np.testing.assert_allclose([neuron.tau for neuron in spiking], config.init_tau, rtol=1e-6)
    assert {neuron.detach_reset for neuron in spiking} == {config.detach_reset}
    assert {isinstance(neuron.surrogate.alpha, nnx.Param) for neuron in spiking} == {config.alpha_learnable}
    layers = net.named_layers().values()
    assert {layer.use_max for layer in layers if isinstance(layer, networks.Pool)} == {config.use_max_pool}
    convolutions = [layer for layer in layers if isinstance(layer, Conv3x3)]
    assert [conv.out_features for conv in convolutions] == [config.channels] * config.number_layer
    assert {conv.dtype for conv in convolutions} == {jnp.bfloat16 if config.precision == "bfloat16" else None}
    assert net.T == config.T


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_every_data_set_has_its_network(name):
    net = nnx.eval_shape(lambda: state.network(Config(dataset_name=name)))
    facts = Config(dataset_name=name).facts
    assert type(net) is networks.NETWORKS[name]
    assert (net.shape, net.classes, net.T) == (facts.shape, facts.classes, facts.T)


def test_the_seed_draws_the_weights():
    first, again, other = (
        state.network(Config(dataset_name="Digits", seed=seed)).conv[0].kernel[...] for seed in (1, 1, 2)
    )
    assert (first == again).all() and (first != other).any()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_shapes_alone_are_those_of_a_fresh_state_and_draw_nothing(precision, settings, monkeypatch):
    config = settings(precision=precision, alpha_learnable=True)
    made = state.create(config, state.adam(config, 1), jax.devices()[:2])

    def drawn(key, shape, *_):
        assert isinstance(key, jax.core.Tracer)
        return jnp.zeros(shape)

    monkeypatch.setattr(networks, "torch_default_init", drawn)
    monkeypatch.setattr(layers, "torch_default_init", drawn)
    graphdef, shapes = state.create(config, state.adam(config, 1), jax.devices()[:2], abstract=True)

    def fact(leaf):
        return leaf.shape, leaf.dtype, leaf.sharding

    assert graphdef == made[0]
    assert jax.tree.map(fact, shapes) == jax.tree.map(fact, made[1])


def test_the_settings_of_the_data_reach_them(monkeypatch):
    monkeypatch.setattr(events, "load", lambda *given, **named: (given, named))
    config = Config(
        dataset_name="CIFAR10DVS", T=3, split_by="time", normalization="max", cifar10dvs_split="tebn", data_root="a"
    )
    given, named = data.load(config.elsewhere(cache_dir="b"), progress=False, to_train=False)
    assert given == ("CIFAR10DVS", "a", "b")
    settings = {"T": 3, "split_by": "time", "normalization": "max", "cifar10dvs_split": "tebn"}
    assert named == settings | {"progress": False, "to_train": False}


def test_a_network_that_reads_numbers_while_it_is_made_has_shapes_too(settings, monkeypatch):
    class OfItsWeights(networks.NMNISTNet):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.largest = float(jnp.abs(self.fc[2].kernel[...]).max())

    monkeypatch.setitem(networks.NETWORKS, "Digits", OfItsWeights)
    config, chosen = settings(), jax.devices()[:1]
    made, shapes = (state.create(config, state.adam(config, 1), chosen, abstract)[1] for abstract in (False, True))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, shapes)
