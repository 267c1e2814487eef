"""The paper's networks: its program's numbers, shapes and parameters, chunks, mistakes."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from reference import cases

from plif_jax import networks, neurons
from plif_jax.errors import UserError
from plif_jax.interop import spikingjelly
from plif_jax.interop import torch as torch_interop

pytestmark = pytest.mark.usefixtures("optimized")
REFERENCE = json.loads((Path(__file__).parent / "reference" / "networks.json").read_text())


def small(cls=networks.NMNISTNet, **settings):
    return cls(**{"T": 4, "channels": 4, "rngs": nnx.Rngs(0)} | settings)


def firing(net):
    """The network with the reference cases' weights, under which every layer fires, dropout off."""
    shapes = {name: array.shape for name, array in torch_interop.state_dict(net).items()}
    torch_interop.load_state_dict(net, cases.state_dict(shapes))
    net.set_attributes(deterministic=True)
    return net


def frames(net, T=4, B=2, seed=0):
    return jnp.asarray(cases.frames(seed, (T, B, *net.shape)), jnp.result_type(float))


# The paper program's numbers


def reference_network(name):
    case, shapes = cases.NETWORKS[name], REFERENCE[name]["shapes"]
    settings = {key: value for key, value in case.items() if key not in ("cls", "x", "classes")}
    net = getattr(networks, case["cls"])(**settings, rngs=nnx.Rngs(0))
    torch_interop.load_state_dict(net, cases.state_dict(shapes))
    x = cases.network_input(case)
    return net, jnp.asarray(x.transpose(0, 2, 3, 1) if x.ndim == 4 else x.transpose(1, 0, 3, 4, 2))


@jax.jit(static_argnums=0)
def training_step(graphdef, params, rest, x, y):
    """(rates, loss, firing rates of the layers, gradients, parameters and statistics after Adam)."""

    def loss_of(params):
        net = nnx.merge(graphdef, params, rest, copy=True)
        firing_rates = {}
        rates = net(x, observe=lambda name, layer, x, y: firing_rates.update({name: y.mean()}))
        loss = jnp.square(rates - jax.nn.one_hot(y, rates.shape[-1])).mean()
        firing_rates = [firing_rates[name] for name in net.named_neurons()]
        return loss, (rates, firing_rates, nnx.state(net, nnx.Not(nnx.Param)))

    (loss, (rates, firing_rates, rest)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    adam = optax.adam(1e-3)
    updates, _ = adam.update(grads, adam.init(params))
    return rates, loss, firing_rates, grads, optax.apply_updates(params, updates), rest


def check_tensors(arrays, expected):
    """Norm, sum and sixteen entries of each tensor. Entries and sums are small against the norm where terms cancel."""
    for name, given in expected.items():
        array = np.asarray(arrays[name], np.float64).ravel()
        sample = array[np.linspace(0, array.size - 1, len(given["values"])).astype(int)]
        close = {"rtol": 1e-9, "atol": 1e-9 * given["norm"] / array.size**0.5, "err_msg": name}
        np.testing.assert_allclose(np.linalg.norm(array), given["norm"], rtol=1e-9, err_msg=name)
        np.testing.assert_allclose(array.sum(), given["sum"], **close | {"atol": 1e-9 * given["norm"]})
        np.testing.assert_allclose(sample, given["values"], **close)


@pytest.mark.parametrize("name", cases.NETWORKS)
def test_reference_case(name, x64, rolled):
    """Everything to 1e-9, the float32 parameters w and alpha and their gradients included."""
    expected = REFERENCE[name]
    net, x = reference_network(name)
    net.eval()
    rates = jax.jit(lambda net, x: net(x))(net, x)
    np.testing.assert_allclose(rates * net.T, expected["eval_counts"], rtol=1e-9)

    net.train()
    net.set_attributes(deterministic=True)  # dropout off
    graphdef, params, rest = nnx.split(net, nnx.Param, ...)
    y = jnp.asarray(cases.labels(cases.NETWORKS[name]))
    rates, loss, firing_rates, grads, params, after = training_step(graphdef, params, rest, x, y)
    np.testing.assert_allclose(rates * net.T, expected["train_counts"], rtol=1e-9)
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-9)
    np.testing.assert_allclose(firing_rates, expected["firing_rates"], rtol=1e-9)
    check_tensors(torch_interop.state_dict(nnx.merge(graphdef, grads, rest)), expected["grads"])
    check_tensors(torch_interop.state_dict(nnx.merge(graphdef, params, after)), expected["after_adam"])


# Time


@pytest.mark.parametrize("rngs", [None, 0, np.zeros((3, 2), np.uint32)])
def test_a_call_without_a_key_moves_no_statistics(rngs):
    net = small()
    with pytest.raises(UserError, match=r"needs a key|of type int; give jax.random.key|keys \[3\] for 2 samples"):
        net(frames(net), rngs=rngs)
    assert not net.conv[1].mean[...].any()


WIDE = {"channels": 64, "dtype": jnp.bfloat16}  # where the CPU has units for bfloat16, it uses them
LIF = {"use_plif": False, "use_max_pool": False, "init_tau": 1.3}


@pytest.mark.parametrize("cuts, of", [([1, 2, 3], {"channels": 16}), ([1], LIF), ([1, 2, 3], WIDE), ([1], WIDE)])
def test_evaluating_in_chunks_gives_exactly_what_one_call_gives(cuts, of):
    net = firing(small(T=4, **of))
    net.eval()
    run = jax.jit(lambda net, state, x: net.unroll(state, x))
    x = frames(net, B=1 if len(cuts) == 3 else 2)  # live, one stream
    end, whole = run(net, None, x)
    state, votes = None, []
    for chunk in jnp.split(x, cuts):
        state, vote = run(net, state, chunk)
        votes.append(vote)
    assert whole.any()
    np.testing.assert_array_equal(jnp.concatenate(votes), whole)
    jax.tree.map(np.testing.assert_array_equal, state, end)


def test_training_in_chunks_gives_what_one_call_gives(x64):
    """Statistics are per timestep, masks per presentation: chunks with one key move and drop the same."""
    whole, chunked = firing(small()), firing(small())
    for net in (whole, chunked):
        net.train()
    x, key = frames(whole), jax.random.key(3)
    run = nnx.jit(lambda net, state, x: net.unroll(state, x, rngs=key))
    _, votes = run(whole, None, x)
    state, first = run(chunked, None, x[:2])
    _, second = run(chunked, state, x[2:])
    assert votes.any()
    np.testing.assert_array_equal(jnp.concatenate([first, second]), votes)
    for a, b in zip(jax.tree.leaves(nnx.state(whole)), jax.tree.leaves(nnx.state(chunked)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13)


def test_evaluation_draws_nothing_from_rngs():
    net, rngs = small(), nnx.Rngs(0)
    net.eval()
    net(jnp.ones((4, 2, 34, 34, 2)), rngs=rngs)
    assert rngs.dropout.count[...] == 0


def test_rates_are_votes_averaged_over_time_and_lie_between_0_and_1():
    net = firing(small())
    net.eval()
    x = frames(net)
    rates = net(x)
    np.testing.assert_allclose(rates, net.unroll(None, x)[1].mean(0), rtol=1e-6)
    assert rates.shape == (2, 10) and rates.min() >= 0 and 0 < rates.max() <= 1


class TinyNet(networks.SpikingNet):
    """A static network small enough to run here: the paper's are wide."""

    def __init__(self, **settings):
        table = {
            "static_conv": [networks.conv(3), networks.norm],
            "conv": [networks.neuron, networks.pool],
            "fc": [networks.flatten, networks.dropout, networks.linear(20), networks.neuron],
        }
        super().__init__(table, (6, 6, 1), 10, **{"T": 5, "rngs": nnx.Rngs(0)} | settings)


def test_a_still_image_is_convolved_once_and_shown_T_times():
    net, image = TinyNet(), jnp.asarray(cases.array(0, (2, 6, 6, 1)))
    net.set_attributes(deterministic=True)
    seen = {}
    net(image, observe=lambda name, layer, x, y: seen.update({name: (x.shape[0], y.shape[0])}))
    assert seen["static_conv.0"] == seen["static_conv.1"] == (1, 1)
    assert seen["conv.0"] == seen["fc.3"] == (5, 5)
    momentum, (first,) = 0.1, nnx.state(net, nnx.BatchStat)["static_conv"][1]["mean"][...][:1]
    hidden = net.static_conv[0](image[None])[0, ..., 0].mean()
    np.testing.assert_allclose(first, momentum * hidden, rtol=1e-4)  # moved once, not five times


def test_views_switch_modes_as_those_of_flax_do():
    net = firing(small())
    net.set_attributes(deterministic=False)
    view, x = nnx.view(net, deterministic=True, use_running_average=True), frames(net)
    net.eval()
    np.testing.assert_array_equal(view(x), net(x))
    assert view.fc[2].use_running_average and view.fc[1].deterministic
    assert nnx.view(net, use_running_average=False).conv[1].use_running_average is False


@pytest.mark.parametrize("cls", [networks.MNISTNet, networks.NMNISTNet, spikingjelly.NMNISTNet])
def test_initial_weights_are_within_pytorchs_bounds(cls):
    settings = {"spiking_neuron": neurons.PLIF} if cls is spikingjelly.NMNISTNet else {}
    net = cls(rngs=nnx.Rngs(0), **settings)
    layers = [layer for layer in net.named_layers().values() if hasattr(layer, "kernel")]
    assert len(layers) >= 4
    for layer in layers:
        kernel = layer.kernel[...]
        bound = math.prod(kernel.shape[:-1]) ** -0.5
        for weights in [kernel] if layer.bias is None else [kernel, layer.bias[...]]:
            assert 0.9 * bound < np.abs(weights).max() <= bound


@pytest.mark.parametrize(
    "conv, fc, said",
    [
        ([networks.neuron], [networks.linear(20), networks.neuron], r"a linear layer .* maps of shape \(4, 4, 2\)"),
        ([], [networks.flatten, networks.pool], r"pooling takes maps .* shape \(32,\) reach it: maps end at flatten"),
        ([], [networks.flatten, networks.conv(3)], "a convolution takes maps"),
        ([], [networks.flatten, networks.flatten], "flatten takes maps"),
        ([networks.neuron], [], r"the vote takes vectors, but maps of shape \(4, 4, 2\) reach it: put flatten"),
    ],
)
def test_a_table_whose_layers_do_not_follow_one_another_is_refused(conv, fc, said):
    with pytest.raises(UserError, match=said):
        networks.SpikingNet({"static_conv": [], "conv": conv, "fc": fc}, (4, 4, 2), 2, T=2, rngs=nnx.Rngs(0))


def test_no_samples_give_no_rates():
    net = firing(small(channels=32))  # wide enough for every convolution that there is
    net.eval()
    loss, grads = nnx.value_and_grad(lambda net, x: net(x).sum())(net, jnp.zeros((4, 0, *net.shape)))
    assert loss == 0 and all((g == 0).all() for g in jax.tree.leaves(grads))
    assert net(jnp.zeros((4, 0, *net.shape))).shape == (0, 10)


def test_a_still_image_s_current_is_not_repeated(monkeypatch):
    given, unroll = [], neurons.Neuron.unroll
    monkeypatch.setattr(neurons.Neuron, "unroll", lambda *a, **k: given.append(len(a[2])) or unroll(*a, **k))
    net = TinyNet()
    net.set_attributes(deterministic=True)
    net(jnp.asarray(cases.array(0, (2, 6, 6, 1))))
    assert given == [1, 5]


def test_an_image_repeated_as_frames_gives_what_the_image_gives():
    net, image = TinyNet(), jnp.asarray(cases.array(0, (2, 6, 6, 1)))
    net.eval()
    np.testing.assert_array_equal(net(image), net(jnp.broadcast_to(image, (5, *image.shape))))


def test_dropout_masks_follow_the_samples_key():
    net = TinyNet()
    net.set_attributes(use_running_average=True)
    image, keys = jnp.asarray(cases.array(0, (4, 6, 6, 1))), jax.random.split(jax.random.key(0), 4)
    net.fc[2].kernel[...] = jnp.abs(net.fc[2].kernel[...]) * 3
    rates = net(image, rngs=keys)
    np.testing.assert_array_equal(net(image[2:], rngs=keys[2:]), rates[2:])
    assert (net(image, rngs=keys[::-1]) != rates).any()


def test_a_key_of_either_kind_drops_the_same():
    net, x = TinyNet(), jnp.ones((2, 6, 6, 1))
    old, typed = (net(x, rngs=key) for key in (jax.random.PRNGKey(7), jax.random.key(7)))
    np.testing.assert_array_equal(old, typed)


# Shapes and settings


@pytest.mark.parametrize(
    "name, parameters, neuron_layers",
    [  # counted by hand from the paper's program
        ("MNIST", 9 * 128 + 9 * 128**2 + 4 * 128 + 6272 * 2048 + 2048 * 100 + 4, 4),
        ("CIFAR10", 9 * 3 * 256 + 5 * 9 * 256**2 + 12 * 256 + 16384 * 2048 + 2048 * 100 + 8, 8),
        ("NMNIST", 9 * 2 * 128 + 9 * 128**2 + 4 * 128 + 8192 * 2048 + 2048 * 100 + 4, 4),
        ("CIFAR10DVS", 9 * 2 * 128 + 3 * 9 * 128**2 + 8 * 128 + 8192 * 2048 + 2048 * 100 + 6, 6),
        ("DVS128Gesture", 9 * 2 * 128 + 4 * 9 * 128**2 + 10 * 128 + 2048 * 512 + 512 * 110 + 7, 7),
        ("ASLDVS", 9 * 2 * 128 + 4 * 9 * 128**2 + 10 * 128 + 4480 * 1120 + 1120 * 240 + 7, 7),
    ],
)
def test_parameters_and_output_of_each_network(name, parameters, neuron_layers):
    net = nnx.eval_shape(lambda: networks.NETWORKS[name](rngs=nnx.Rngs(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(net, nnx.Param))) == parameters
    assert len(net.named_neurons()) == neuron_layers
    x = jax.ShapeDtypeStruct((3, *net.shape) if net.static_conv else (net.T, 3, *net.shape), jnp.float32)
    state, votes = nnx.eval_shape(lambda net, x: net.unroll(None, x, rngs=jax.random.key(0)), net, x)
    assert votes.shape == (net.T, 3, net.classes) and len(state) == neuron_layers


def layer_in_words(layer):
    match type(layer).__name__:
        case "Conv3x3":
            return f"conv {layer.in_features}-{layer.out_features}"
        case "Linear":
            return f"linear {layer.in_features}-{layer.out_features}"
        case "Dropout":
            return f"dropout {layer.rate}"
        case kind:
            return {"BatchNorm": "norm", "PLIF": "P", "Pool": "pool", "Flatten": None}[kind]


FC_128 = "dropout 0.5, linear 8192-2048, P, dropout 0.5, linear 2048-100, P"


@pytest.mark.parametrize(
    "name, once, each_timestep",
    [  # the paper's program, layer by layer
        (
            "MNIST",
            "conv 1-128, norm",
            "P, pool, conv 128-128, norm, P, pool, dropout 0.5, linear 6272-2048, P, dropout 0.5, linear 2048-100, P",
        ),
        (
            "CIFAR10",
            "conv 3-256, norm",
            "P, conv 256-256, norm, P, conv 256-256, norm, P, pool, conv 256-256, norm, P, conv 256-256, norm, P, "
            "conv 256-256, norm, P, pool, dropout 0.5, linear 16384-2048, P, linear 2048-100, P",
        ),
        ("NMNIST", "", "conv 2-128, norm, P, pool, " + "conv 128-128, norm, P, pool, " + FC_128),
        ("CIFAR10DVS", "", "conv 2-128, norm, P, pool, " + "conv 128-128, norm, P, pool, " * 3 + FC_128),
        (
            "DVS128Gesture",
            "",
            "conv 2-128, norm, P, pool, " + "conv 128-128, norm, P, pool, " * 4 + "dropout 0.5, linear 2048-512, P, "
            "dropout 0.5, linear 512-110, P",
        ),
    ],
    ids=["MNIST", "CIFAR10", "NMNIST", "CIFAR10DVS", "DVS128Gesture"],
)
def test_layers_of_each_network(name, once, each_timestep):
    net = nnx.eval_shape(lambda: networks.NETWORKS[name](rngs=nnx.Rngs(0)))
    words = [[layer_in_words(layer) for layer in part] for part in (net.static_conv, [*net.conv, *net.fc])]
    assert [", ".join(filter(None, part)) for part in words] == [once, each_timestep]


def test_settings_reach_every_neuron():
    net = small(init_tau=5.0, alpha_learnable=True, detach_reset=False)
    for neuron in net.named_neurons().values():
        assert isinstance(neuron, neurons.PLIF) and not neuron.detach_reset
        assert neuron.w[...].dtype == neuron.surrogate.alpha[...].dtype == jnp.float32
        np.testing.assert_allclose(neuron.tau, 5.0, rtol=1e-6)
    for neuron in small(init_tau=5.0, use_plif=False).named_neurons().values():
        assert type(neuron) is neurons.LIF and neuron.tau == 5.0 and neuron.detach_reset


def test_bfloat16_changes_the_arithmetic_not_the_parameters():
    net = small(dtype=jnp.bfloat16)
    net.eval()
    dtypes = {}
    state, votes = net.unroll(
        None, frames(net), observe=lambda name, layer, x, y: dtypes.update({type(layer).__name__: y.dtype})
    )
    assert dtypes["Conv3x3"] == dtypes["BatchNorm"] == dtypes["Linear"] == dtypes["PLIF"] == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((state, nnx.state(net), votes))} == {jnp.dtype("float32")}


def test_no_timestep_passes_in_training_mode_too():
    net = small()
    state, votes = net.unroll(None, jnp.zeros((0, 2, 34, 34, 2)), rngs=jax.random.key(0))
    assert votes.shape == (0, 2, 10) and len(state) == 4


# Mistakes


def of_table(table, classes=3):
    return networks.SpikingNet(table, (8, 8, 2), classes, T=2, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: small(T=0), "T is 0; .* whole number of timesteps, 1 or more"),
        (lambda: small(T=2.5), "T is 2.5; .* whole number"),
        (lambda: small(channels=0), "channels is 0"),
        (lambda: small(number_layer="2"), "whole numbers from 1"),
        (lambda: small(number_layer=0), "number_layer 0"),
        (lambda: small(number_layer=6), "1x1 feature map cannot be halved.*number_layer"),
        (lambda: small(number_layer=5, channels=3), "3 values reach the first linear layer, 4 at least"),
        (lambda: small(init_tau=1.0), "init_tau is 1.0"),
        (lambda: TinyNet()(jnp.zeros((2, 7, 6, 1))), r"\(2, 7, 6, 1\); .*images \[B, 6, 6, 1\] or frames"),
        (lambda: small()(jnp.zeros((2, 34, 34, 2))), r"\(2, 34, 34, 2\); .* takes frames \[T, B, 34, 34, 2\]"),
        (lambda: small().unroll((), jnp.zeros((4, 2, 34, 34, 2))), "a state of 0 membranes; this network has 4"),
        (lambda: small()(jnp.zeros((4, 2, 34, 34, 2))), r"needs a key: .* net.eval\(\) to evaluate"),
        (lambda: firing(small())(jnp.zeros((0, 2, 34, 34, 2))), "no timestep"),
        (lambda: small(rngs=0), r"rngs is of type int; .* nnx.Rngs\(2020\)"),
        (lambda: small(rngs=jax.random.key(0)), "rngs is of type .*Key.*; give nnx.Rngs"),
        (
            lambda: of_table({"static_conv": [networks.neuron], "conv": [], "fc": []}),
            "a neuron in static_conv, .* in conv",
        ),
        (lambda: of_table({"conv": [], "fc": []}), "the table is a dict of conv, fc; give a dict of static_conv"),
        (lambda: of_table({"static_conv": [], "conv": [], "fc": [], "head": []}), "a dict of .*, head; give"),
        (lambda: of_table(networks.event_table(2, 1, 2)), "20 outputs for 3 classes; the last layer has a group"),
        (lambda: of_table(networks.event_table(2, 1, 2), classes=0), "20 outputs for 0 classes"),
    ],
)
def test_mistakes_are_told_in_one_line(make, message):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
