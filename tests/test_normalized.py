"""A neuron after batch normalisation in one kernel, interpreted, against the two layers one after the other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plif_jax import layers, networks, neurons, normalized, sequence, surrogate


def layers_and_currents(rows, B, size, C, dtype):
    atan = surrogate.ATan(learnable=True)
    norm, neuron = layers.BatchNorm(C, dtype=dtype), neurons.PLIF(v_reset=None, surrogate=atan)
    keys = jax.random.split(jax.random.key(0), 3)
    norm.scale[...], norm.bias[...] = jax.random.normal(keys[0], C) + 1, jax.random.normal(keys[1], C)
    x = 3 * jax.random.normal(keys[2], (rows, B, size, size, C)) + 0.5
    return norm, neuron, x.astype(dtype)


def found(unroll, norm, neuron, x, T, v=None, last_bar=False):
    """Membranes, spikes, running statistics and all gradients."""
    graphdef, params, rest = nnx.split((norm, neuron), nnx.Param, ...)

    def run(params, x, v):
        norm, neuron = nnx.merge(graphdef, params, rest, copy=True)
        after, s = unroll(norm, neuron, v, x, T=T)
        return (after if last_bar else None, s), (after, norm.mean[...], norm.var[...])

    (kept, s), vjp, more = jax.vjp(run, params, x, v, has_aux=True)
    s_bar = jax.random.normal(jax.random.key(1), s.shape).astype(s.dtype)
    return s, more, vjp((None if kept is None else jnp.ones_like(kept), s_bar))


def one_after_the_other(norm, neuron, v, x, T):
    return neuron.unroll(v, norm(x), T=T)


def by_autodiff(norm, neuron, v, x, T):
    """The definition of both, differentiated by JAX alone."""
    samples = tuple(range(1, x.ndim - 1))
    mean = x.mean(samples, keepdims=True)
    var = jnp.square(x - mean).mean(samples, keepdims=True)
    scale, bias = (variable[...].reshape((1,) * (x.ndim - 1) + (-1,)) for variable in (norm.scale, norm.bias))
    return neuron.unroll_by_autodiff(v, (x - mean) / jnp.sqrt(var + norm.eps) * scale + bias)


# 700 neurons are more than a block, of which one of 5 channels is no multiple; a current that stays; membranes begun.
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "rows, T, C, begun, last_bar, trains",
    [
        (3, 3, 5, False, False, True),
        (1, 3, 32, False, False, True),
        (2, 2, 256, True, True, True),
        (1, 3, 32, True, True, False),
    ],
)
def test_it_gives_what_the_two_layers_give(rows, T, C, begun, last_bar, trains, dtype, kernels):
    norm, neuron, x = layers_and_currents(rows, 7, 4, C, dtype)
    norm.mean[...], norm.var[...] = jnp.linspace(-1, 1, C), jnp.linspace(3, 9, C)
    norm.use_running_average = not trains
    v = jax.random.normal(jax.random.key(2), x.shape[1:]) if begun else None
    ours = found(normalized.unroll, norm, neuron, x, T, v, last_bar)
    assert kernels and all(kernels)
    with sequence.scanned():
        expected = found(one_after_the_other, norm, neuron, x, T, v, last_bar)

    def check(array, wanted):
        assert array.dtype == wanted.dtype
        # Sums in float32 are so even of short currents.
        tolerance = 3e-2 if array.dtype == jnp.bfloat16 else 2e-5 if dtype == jnp.float32 else 1e-3
        array, wanted = np.asarray(array, np.float32), np.asarray(wanted, np.float32)
        np.testing.assert_allclose(array, wanted, rtol=tolerance, atol=tolerance * max(1, np.abs(wanted).max()))

    jax.tree.map(check, ours, expected)


def test_its_gradient_has_a_gradient(kernels):
    """Through the statistics too."""
    norm, _, x = layers_and_currents(2, 3, 2, 4, jnp.float32)
    neuron = neurons.PLIF()
    weights = jnp.arange(2.0)[:, None, None, None, None]

    def penalty(unroll, x):
        def loss(x):
            return (weights * unroll(nnx.clone(norm), neuron, None, x, T=2)[1]).sum()

        return jnp.square(jax.grad(loss)(x)).sum()

    ours = jax.grad(partial(penalty, normalized.unroll))(x)
    assert kernels and all(kernels)
    with sequence.scanned():
        expected = jax.grad(partial(penalty, by_autodiff))(x)
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def test_over_mapped_samples_the_statistics_are_those_of_all(kernels):
    norm, neuron, x = layers_and_currents(2, 6, 4, 5, jnp.float32)
    whole = found(normalized.unroll, norm, neuron, x, 2)
    norm.axis_name = "batch"
    graphdef, params, rest = nnx.split((norm, neuron), nnx.Param, ...)

    def part(x, s_bar):
        def run(x):
            norm, neuron = nnx.merge(graphdef, params, rest, copy=True)
            return normalized.unroll(norm, neuron, None, x, T=2)[1], (norm.mean[...], norm.var[...])

        s, vjp, statistics = jax.vjp(run, x, has_aux=True)
        return s, *statistics, *vjp(s_bar)

    s_bar = jax.random.normal(jax.random.key(1), x.shape)
    parts = [array.reshape(2, 3, 2, *x.shape[2:]) for array in (x, s_bar)]
    s, mean, var, x_bar = jax.vmap(part, 1, (1, None, None, 1), axis_name="batch")(*parts)
    assert kernels and all(kernels)
    np.testing.assert_array_equal(s.reshape(x.shape), whole[0])
    for ours, wanted in ((mean, whole[1][1]), (var, whole[1][2]), (x_bar.reshape(x.shape), whole[2][1])):
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)


class Shifted(layers.BatchNorm):
    def __call__(self, x):
        return super().__call__(x) + 1


class Delayed(neurons.PLIF):
    def unroll(self, v, x, *, T=None):
        return super().unroll(v, jnp.roll(x, 1, 0), T=T)


class StartingWithItsCurrent(neurons.IF):
    def rest(self, x):
        return super().rest(x) + x[0] / 2


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize(
    "norm, neuron",
    [(Shifted, neurons.PLIF), (layers.BatchNorm, Delayed), (layers.BatchNorm, StartingWithItsCurrent)],
)
def test_layers_of_ones_own_run_as_they_are_written(norm, neuron, trains, kernels):
    norm, neuron = norm(5), neuron()
    norm.use_running_average = not trains
    x = 3 * jax.random.normal(jax.random.key(0), (3, 2, 4, 4, 5))
    spikes = normalized.unroll(nnx.clone(norm), neuron, None, x)[1]
    assert 0 < spikes.mean() < 1
    np.testing.assert_array_equal(spikes, neuron(norm(x)))


def test_currents_of_another_type_are_normalised_before_the_neuron(kernels):
    norm, neuron, x = layers_and_currents(2, 3, 2, 5, jnp.bfloat16)
    norm.dtype = jnp.float32
    spikes = normalized.unroll(nnx.clone(norm), neuron, None, x)[1]
    assert spikes.dtype == jnp.float32
    np.testing.assert_array_equal(spikes, neuron(norm(x)))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("C", [5, 256])
def test_it_lowers_for_a_gpu(C, gpu):
    norm, neuron, x = layers_and_currents(4, 2, 4, C, jnp.float32)

    def both(x):
        s, vjp = jax.vjp(lambda x: normalized.unroll(nnx.clone(norm), neuron, None, x)[1], x)
        return s, vjp(s)

    lowered = jax.jit(both).trace(x).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call @__gpu$xla.gpu.triton") in (2, 3)


def test_a_network_writes_no_normalised_currents(kernels, monkeypatch):
    """But for those who look inside the layers run one after the other."""
    called = []
    for name in ("sequence", "run"):  # in training mode, in evaluation mode
        whole = getattr(normalized, name)
        monkeypatch.setattr(normalized, name, lambda *args, whole=whole: called.append(1) or whole(*args))
    net = networks.NETWORKS["Digits"](channels=4, number_layer=2, rngs=nnx.Rngs(0))
    x, key = jax.random.uniform(jax.random.key(0), (2, 2, *net.shape)), jax.random.key(1)
    graphdef, state = nnx.split(net)
    rates = nnx.merge(graphdef, state, copy=True)(x, rngs=key)
    assert len(called) == 2
    inside = nnx.merge(graphdef, state, copy=True)(x, rngs=key, observe=lambda *_: None)
    assert len(called) == 2
    net.eval()
    net(x)
    assert len(called) == 4
    np.testing.assert_allclose(rates, inside, atol=1e-6)


def test_the_running_statistics_send_back_no_gradient(kernels):
    norm, neuron, x = layers_and_currents(2, 3, 2, 5, jnp.float32)

    def tracked(x):
        after = nnx.clone(norm)
        normalized.unroll(after, neuron, None, x)
        return after.mean[...].sum() + after.var[...].sum()

    assert not jax.grad(tracked)(x).any()
    assert kernels and all(kernels)


def test_a_channel_of_little_variance_is_evaluated_as_by_the_layer(kernels):
    norm, neuron, x = layers_and_currents(3, 4, 4, 5, jnp.float32)
    norm.use_running_average = True
    norm.var[...], norm.scale[...] = jnp.full(5, norm.eps), jnp.full(5, norm.eps**0.5)
    spikes = normalized.unroll(norm, neuron, None, x)[1]
    assert kernels and all(kernels) and 0 < spikes.mean() < 1
    with sequence.scanned():
        np.testing.assert_array_equal(spikes, neuron(norm(x)))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("trains", [True, False])
def test_it_lowers_under_shard_map_with_its_checks(trains, gpu):
    norm, neuron, x = layers_and_currents(4, 2, 4, 5, jnp.float32)
    norm.use_running_average = not trains

    def both(scale, x):
        def spikes(scale, x):
            ours = nnx.clone(norm)
            ours.scale[...] = scale
            return normalized.unroll(ours, neuron, None, x)[1]

        s, vjp = jax.vjp(spikes, scale, x)
        return s, vjp(s)

    over, P = jax.sharding.PartitionSpec(None, "batch"), jax.sharding.PartitionSpec
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("batch",))
    mapped = jax.shard_map(both, mesh=mesh, in_specs=(P(), over), out_specs=(over, (P(), over)))
    lowered = jax.jit(mapped).trace(norm.scale[...], x).lower(lowering_platforms=("cuda",))
    assert "custom_call @__gpu$xla.gpu.triton" in lowered.as_text()
