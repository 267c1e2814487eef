"""One training step: its loss, its gradient averaged over devices, its optimiser, what it draws."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plif_jax import data, layers, networks
from plif_jax.config import Config
from plif_jax.data import batches
from plif_jax.training import checkpoint, state, step


@pytest.mark.parametrize("precision, tolerance", [("float64", 1e-10), ("float32", 1e-5)])
def test_1_2_and_4_devices_train_the_same_network(settings, precision, tolerance):
    """In float32 as long as no last bit turns a spike; in these 20 steps none does."""
    config = settings(precision=precision, init_tau=1.1, channels=4)  # its neurons fire from the start
    state.set_precision(config)
    part = batches.partition(config, data.load(config, progress=False))["train"]
    index = np.concatenate([batches.training_batches(config.seed, epoch, part, 8) for epoch in range(4)])

    def trained(chosen):
        optimizer = state.adam(config, 5)
        graphdef, now = state.create(config, optimizer, chosen)
        feed = batches.Feed(part.split, chosen)
        train = step.make_train(config, graphdef, optimizer, chosen, feed.axis)
        for arguments in feed.chunks(index, [1] * 20):
            now, _ = train(now, *arguments, np.zeros(len(chosen), np.int32))
        copies = [np.stack([shard.data for shard in leaf.addressable_shards]) for leaf in jax.tree.leaves(now)]
        assert all((copy == copy[:1]).all() for copy in copies)  # devices agree to the bit
        return checkpoint._names((now.params, now.batch_stats))

    one = trained(jax.devices()[:1])
    for count in (2, 4):
        many = trained(jax.devices()[:count])
        for name, value in one.items():
            # w is float32, as in the paper's program: its last bit may differ.
            bound = tolerance if value.dtype == precision else 2e-6
            np.testing.assert_allclose(many[name], value, rtol=bound, atol=bound, err_msg=name)


def test_learning_rate_follows_the_cosine_past_T_max(settings, x64):
    config, steps_per_epoch = settings(learning_rate=0.1, T_max=4), 3
    optimizer = state.adam(config, steps_per_epoch)
    now, moved = optimizer.init(jnp.ones(())), []
    for _ in range(9 * steps_per_epoch):
        update, now = optimizer.update(jnp.ones(()), now)  # Adam under a constant gradient moves by -lr
        moved.append(-float(update))
    epochs = np.arange(9)
    expected = 0.1 * (1 + np.cos(np.pi * epochs / 4)) / 2
    np.testing.assert_allclose(np.array(moved).reshape(9, 3), expected[:, None].repeat(3, 1), atol=1e-8)
    assert expected[4] < 1e-9 and expected[8] == pytest.approx(0.1)


def test_adam_is_the_papers(settings, x64):
    """Kingma and Ba, 2015, Algorithm 1, written out, under gradients that change."""
    optimizer = state.adam(settings(), steps_per_epoch=100)
    gradients = np.random.default_rng(0).normal(1, 3, 50)
    now, m, v = optimizer.init(jnp.ones(())), 0.0, 0.0
    for step_count, g in enumerate(gradients, 1):
        update, now = optimizer.update(jnp.asarray(g), now)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        expected = -1e-3 * (m / (1 - 0.9**step_count)) / (np.sqrt(v / (1 - 0.999**step_count)) + 1e-8)
        np.testing.assert_allclose(update, expected, rtol=1e-9)


def test_loss_is_the_squared_error_of_rates_and_accuracy_counts_the_largest(settings):
    config, net = settings(), state.network(settings())
    for layer in net.named_layers().values():
        if hasattr(layer, "kernel"):
            layer.kernel[...] *= 8  # all layers fire
    graphdef, params, batch_stats = nnx.split(net, nnx.Param, nnx.BatchStat)
    x = np.random.default_rng(0).poisson(0.5, (8, config.T, 34, 34, 2)).astype(np.uint8)
    keys = step.sample_keys(config, 0, jnp.arange(8))
    rates = np.asarray(net(step.frames_for(config, jnp.asarray(x)), rngs=keys[1]))
    y = np.where(np.arange(8) < 5, rates.argmax(-1), 9 - rates.argmax(-1))
    loss, (accuracy, _) = step.loss_of(config, graphdef, params, batch_stats, jnp.asarray(x), jnp.asarray(y), keys)
    assert np.ptp(rates) > 0 and accuracy == 5 / 8
    np.testing.assert_allclose(loss, np.mean((rates - np.eye(10)[y]) ** 2), rtol=1e-6)


def test_the_first_layer_that_failed_is_named_also_where_names_sort_otherwise(settings):
    config = settings(number_layer=4)
    graphdef, now = state.create(config, state.adam(config, 1), jax.local_devices()[:1])
    for index in (4, 12):
        now.params["conv"][index]["kernel"][...] = jnp.full_like(now.params["conv"][index]["kernel"][...], jnp.nan)
    frames = np.ones((2, 3, 34, 34, 2), np.uint8)
    assert step.first_failure(config, graphdef, now, frames, np.zeros(2, np.int32)) == "the output of conv.4"


def test_the_layer_whose_gradient_failed_is_named(settings):
    """Nothing fires where tau is not a number: all outputs are finite."""
    config = settings()
    graphdef, now = state.create(config, state.adam(config, 1), jax.local_devices()[:1])
    now.params["conv"][2]["w"][...] = jnp.full_like(now.params["conv"][2]["w"][...], jnp.nan)
    frames = np.ones((2, 3, 34, 34, 2), np.uint8)
    assert step.first_failure(config, graphdef, now, frames, np.zeros(2, np.int32)) == "the gradient of conv.2"


def test_dropout_and_order_are_functions_of_seed_and_step(settings):
    config = settings()
    part = batches.partition(config, data.load(config, progress=False))["train"]
    order = partial(batches.training_batches, part=part, batch_size=8)
    assert (
        (order(1, 2) == order(1, 2)).all() and (order(1, 2) != order(1, 3)).any() and (order(1, 2) != order(2, 2)).any()
    )
    at = [(config, 3), (config, 3), (config, 4), (settings(seed=1), 3)]
    first, again, later, other = (jax.random.key_data(step.sample_keys(*one, jnp.arange(4))) for one in at)
    assert (first == again).all() and (first != later).all() and (first != other).all()
    assert (first[0] != first[1]).all()  # augmentation's and dropout's


def test_training_augments_by_the_key_of_each_sample():
    config = Config(dataset_name="MNIST", T=2, use_plif=True)
    table = {"static_conv": [networks.conv(2), networks.norm], "conv": [networks.neuron] + [networks.pool] * 3}
    table |= {"fc": [networks.flatten, networks.linear(10), networks.neuron]}
    net = networks.SpikingNet(table, config.facts.shape, 10, T=2, init_tau=1.1, rngs=nnx.Rngs(0))
    graphdef, params, batch_stats = nnx.split(net, nnx.Param, nnx.BatchStat)
    x = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 1), np.uint8)
    augment_keys, dropout_keys = step.sample_keys(config, 0, jnp.arange(4))
    seen = []

    def entering(keys):
        def observe(name, layer, entering, leaving):
            if name == "static_conv.0":
                seen.append(np.asarray(entering))

        step.loss_of(config, graphdef, params, batch_stats, x, np.arange(4), (keys, dropout_keys), observe)

    for keys in (augment_keys, augment_keys, augment_keys[::-1]):
        entering(keys)
    first, again, other = seen
    plain = np.asarray(step.frames_for(config, x))
    assert (first == again).all()
    assert all((first[0, b] != images[b]).any() for images in (other[0], plain) for b in range(4))


def test_masks_do_not_depend_on_the_devices_whatever_generator_jax_is_told_to_use(settings):
    """Another than threefry draws differently where fewer draw together."""
    drop, x = layers.Dropout(0.5), jnp.ones((2, 8, 50))
    with jax.default_prng_impl("rbg"):
        whole, half = (step.sample_keys(settings(), 3, jnp.arange(first, 8))[1] for first in (0, 4))
        np.testing.assert_array_equal(drop(x, whole)[:, 4:], drop(x[:, 4:], half))


def test_a_run_computes_in_its_own_precision_whatever_ran_before(settings):
    for precision in ("float64", "float32", "float64", "bfloat16"):
        state.set_precision(settings(precision=precision))
        assert jnp.zeros(()).dtype == ("float64" if precision == "float64" else "float32")


def stepping(settings, x, **more):
    """(state, a compiled training step, a compiled evaluation, what feeds them) of a small network on frames x."""
    config, chosen = settings(**more), jax.devices()[:1]
    optimizer = state.adam(config, 5)
    graphdef, now = state.create(config, optimizer, chosen)
    feed = batches.Feed(batches.Split(x, np.zeros(len(x), np.int32), len(x)), chosen, "yes")
    train = step.make_train(config, graphdef, optimizer, chosen, feed.axis)
    return now, train, step.make_evaluate(config, graphdef, chosen, feed.axis, firing_rates=True), feed


def test_what_follows_a_step_that_failed_in_one_call_trains_nothing(settings):
    x = np.ones((16, 3, 34, 34, 2), np.float32)
    x[:8] = np.nan
    now, train, _, feed = stepping(settings, x)
    now, metrics = train(now, *feed.take(np.arange(16).reshape(2, 8)), np.zeros(1, np.int32))
    assert metrics["healthy"].tolist() == [False, False] and now.step == 0


def test_a_gradient_that_is_no_number_is_a_failure_though_the_loss_is_one(settings):
    now, train, _, feed = stepping(settings, np.ones((8, 3, 34, 34, 2), np.uint8))
    w = now.params["conv"][2]["w"]
    w[...] = jax.device_put(jnp.full((), jnp.nan, jnp.float32), w[...].sharding)
    now, metrics = train(now, *feed.take(np.arange(8)[None]), np.zeros(1, np.int32))
    assert np.isfinite(metrics["loss"]).all() and not metrics["healthy"].any() and now.step == 0


def test_a_gradient_whose_square_is_beyond_float32_is_lost():
    assert step.first_lost({"conv": {0: {"kernel": np.full(3, 1e20, np.float32)}}}) == "conv.0"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_firing_rates_are_of_the_samples_alone(settings, precision):
    x = np.random.default_rng(0).poisson(20, (8, 3, 34, 34, 2)).astype(np.uint8)
    now, _, evaluate, feed = stepping(settings, x, init_tau=1.1, channels=4, precision=precision)
    some, filled_up = (
        evaluate(now.params, now.batch_stats, *feed.take(np.array([index]))) for index in ([0, 1], [0, 1, -1, -1])
    )
    assert some["confusion"].sum() == filled_up["confusion"].sum() == 2
    assert {str(spikes.dtype) for spikes in some["spikes"].values()} == {"float32"}
    assert some["spikes"]["conv.2"] > 0
    np.testing.assert_allclose(filled_up["spikes"]["conv.2"], some["spikes"]["conv.2"], rtol=1e-6)


def test_a_network_that_is_made_for_evaluation_is_trained_all_the_same(settings, monkeypatch):
    class Evaluating(networks.NMNISTNet):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.eval()

    monkeypatch.setitem(networks.NETWORKS, "Digits", Evaluating)
    now, train, _, feed = stepping(settings, np.ones((8, 3, 34, 34, 2), np.uint8))
    before = jax.device_get(now.batch_stats)
    now, _ = train(now, *feed.take(np.arange(8)[None]), np.zeros(1, np.int32))
    assert all(map(np.any, jax.tree.leaves(jax.tree.map(np.not_equal, before, jax.device_get(now.batch_stats)))))
