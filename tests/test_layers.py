"""Layers that know about time, against the same things written out step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import cases

from plif_jax import layers
from plif_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("optimized")


def randn(seed, *shape):
    return cases.array(seed, shape)


# Batch normalisation


@pytest.fixture(params=["cpu", "cuda"])
def platform(request, monkeypatch):
    """What is arranged for a platform, on this one."""
    if request.param == "cuda":
        monkeypatch.setattr(
            jax.lax, "platform_dependent", lambda *args, **ways: ways.get("cuda", ways["default"])(*args)
        )


def batch_norm_step_by_step(x_TBHWC, scale, bias, mean, var, momentum=0.1, eps=1e-5):
    """PyTorch's BatchNorm2d in training mode, called once per timestep, in NumPy."""
    out = []
    for x in x_TBHWC:
        axes = tuple(range(x.ndim - 1))
        batch_mean, batch_var = x.mean(axes), x.var(axes)
        out.append((x - batch_mean) / np.sqrt(batch_var + eps) * scale + bias)
        mean = (1 - momentum) * mean + momentum * batch_mean
        var = (1 - momentum) * var + momentum * x.var(axes, ddof=1)
    return np.stack(out), mean, var


def batch_norm(C=3, **settings):
    norm = layers.BatchNorm(C, **settings)
    norm.scale[...], norm.bias[...] = jnp.asarray(1.5 + 0.2 * randn(1, C)), jnp.asarray(randn(2, C))
    norm.mean[...], norm.var[...] = jnp.asarray(randn(3, C)), jnp.asarray(0.5 + randn(4, C) ** 2)
    return norm


@pytest.mark.parametrize("shape", [(1, 2, 4, 5, 3), (6, 2, 4, 5, 3), (4, 7, 3)])
@pytest.mark.parametrize("momentum", [0.1, 0.4])
def test_batch_norm_is_one_call_per_timestep(shape, momentum, x64, platform):
    norm, x = batch_norm(momentum=momentum), 2 * randn(5, *shape) + 1
    parts = [np.asarray(part[...]) for part in (norm.scale, norm.bias, norm.mean, norm.var)]
    y, mean, var = batch_norm_step_by_step(x, *parts, momentum=momentum)
    np.testing.assert_allclose(norm(jnp.asarray(x)), y, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-12)
    np.testing.assert_allclose(norm.var[...], var, rtol=1e-12)


def test_batch_norm_gradient_goes_through_the_statistics(x64, platform):
    """Against central differences of the step-by-step form, for x, scale and bias."""
    norm = batch_norm()
    parts = [np.asarray(part[...]) for part in (norm.scale, norm.bias, norm.mean, norm.var)]
    x, cotangent = randn(5, 2, 2, 2, 2, 3), randn(6, 2, 2, 2, 2, 3)

    def total(x, scale, bias):
        return np.sum(cotangent * batch_norm_step_by_step(x, scale, bias, *parts[2:])[0])

    def differences(index, arguments, step=1e-6):
        gradient = np.zeros_like(arguments[index])
        for i in np.ndindex(gradient.shape):
            values = []
            for sign in (1, -1):
                moved = [np.array(a) for a in arguments]
                moved[index][i] += sign * step
                values.append(total(*moved))
            gradient[i] = (values[0] - values[1]) / (2 * step)
        return gradient

    norm_bar, x_bar = nnx.grad(lambda norm, x: jnp.sum(cotangent * norm(x)), argnums=(0, 1))(norm, jnp.asarray(x))
    for index, gradient in enumerate((x_bar, norm_bar.scale[...], norm_bar.bias[...])):
        np.testing.assert_allclose(gradient, differences(index, (x, *parts[:2])), atol=1e-7)


def test_batch_norm_evaluates_with_its_running_statistics(x64):
    norm, x = batch_norm(), randn(5, 3, 2, 2, 2, 3)
    norm.eval()
    scale, bias, mean, var = (np.asarray(part[...]) for part in (norm.scale, norm.bias, norm.mean, norm.var))
    np.testing.assert_allclose(norm(jnp.asarray(x)), (x - mean) / np.sqrt(var + 1e-5) * scale + bias, rtol=1e-12)
    np.testing.assert_array_equal(norm.mean[...], mean)
    np.testing.assert_array_equal(norm.var[...], var)


def test_batch_norm_over_two_devices_is_that_of_the_whole_batch(x64, platform):
    x = jnp.asarray(randn(5, 3, 4, 2, 2, 3))
    whole = batch_norm()
    y = whole(x)
    graphdef, state = nnx.split(batch_norm(axis_name="batch"))

    def one_device(x):
        norm = nnx.merge(graphdef, state, copy=True)
        return norm(x), norm.mean[...], norm.var[...]

    spread = jax.pmap(one_device, axis_name="batch", in_axes=1, out_axes=(1, None, None))
    halves, mean, var = spread(x.reshape(3, 2, 2, 2, 2, 3))
    np.testing.assert_allclose(halves.reshape(y.shape), y, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(mean, whole.mean[...], rtol=1e-12)
    np.testing.assert_allclose(var, whole.var[...], rtol=1e-12)


def test_batch_norm_keeps_its_statistics_in_float32_under_bfloat16(platform):
    """A mean of 100 and a deviation of 0.1: in bfloat16 every value would be the same."""
    x = 100 + 0.1 * randn(5, 2, 64, 3)
    norm = layers.BatchNorm(3, dtype=jnp.bfloat16)
    y = norm(jnp.asarray(x, jnp.float32))
    assert y.dtype == jnp.bfloat16 and norm.mean[...].dtype == jnp.float32
    np.testing.assert_allclose(y.astype(jnp.float32).std(1), 1, atol=0.02)


@pytest.mark.parametrize("shape", [(0, 2, 4, 4, 3), (5, 0, 4, 4, 3)])
def test_batch_norm_of_no_timestep_or_sample_leaves_the_statistics_alone(shape, platform):
    norm = batch_norm()
    mean, var = norm.mean[...], norm.var[...]
    assert norm(jnp.zeros(shape)).shape == shape
    np.testing.assert_array_equal(norm.mean[...], mean)
    np.testing.assert_array_equal(norm.var[...], var)
    for bar in jax.tree.leaves(nnx.grad(lambda norm: norm(jnp.zeros(shape)).sum())(norm)):
        np.testing.assert_array_equal(bar, np.zeros(3))


def test_batch_norm_of_one_value_per_channel_takes_the_biased_variance(platform):
    norm = layers.BatchNorm(3)
    y = norm(jnp.full((2, 1, 3), 4.0))
    np.testing.assert_array_equal(y, np.zeros((2, 1, 3)))
    np.testing.assert_allclose(norm.var[...], np.full(3, 0.81))  # moved twice, by 0


def test_running_statistics_are_moved_in_full_precision():
    """Of products GPUs and TPUs round the factors, unless they are told."""
    jaxpr = jax.make_jaxpr(lambda x: batch_norm()(x))(jnp.ones((5, 2, 4, 4, 3)))
    products = [e.params["precision"] for e in jaxpr.eqns if e.primitive is jax.lax.dot_general_p]
    assert products == [(jax.lax.Precision.HIGHEST,) * 2] * 2


def test_batch_norm_takes_whole_numbers_as_what_they_are():
    x = np.random.default_rng(0).poisson(2, (4, 3, 5, 2)).astype(np.uint8)
    y, expected = batch_norm(2)(x), batch_norm(2)(x.astype(np.float32))
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize("C", [1, 3])
def test_batch_norm_of_other_channels_is_refused(C, evaluates):
    norm = batch_norm(4 - C)
    norm.use_running_average = evaluates
    with pytest.raises(UserError, match=rf"\(2, 3, {C}\) has {C} channels, its last axis; this takes {4 - C}"):
        norm(jnp.zeros((2, 3, C)))


@pytest.mark.parametrize("C", [2, 64])
def test_a_convolution_of_other_channels_is_refused(C):
    convolution = layers.Conv3x3(C, 64, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=rf"\(1, 1, 8, 8, 3\) has 3 channels, its last axis; this takes {C}"):
        convolution(jnp.zeros((1, 1, 8, 8, 3)))


@pytest.mark.filterwarnings("error")
def test_running_statistics_keep_their_type():
    graphdef, state = nnx.split(batch_norm(3))
    norm = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state))
    norm(jnp.asarray(randn(0, 64, 2, 3), jnp.float32))
    assert norm.mean[...].dtype == norm.var[...].dtype == jnp.bfloat16
    wide = nnx.merge(graphdef, state)
    wide(jnp.asarray(randn(0, 64, 2, 3), jnp.float32))
    for short, exact in ((norm.mean, wide.mean), (norm.var, wide.var)):
        np.testing.assert_array_equal(short[...], exact[...].astype(jnp.bfloat16))  # rounded once


# Linear and Conv


@pytest.mark.parametrize(
    "layer, shape",
    [
        (lambda rngs: layers.Linear(400, 100, rngs=rngs), (400,)),
        (lambda rngs: layers.Conv3x3(2, 16, rngs=rngs), (34, 34, 2)),
        (lambda rngs: layers.Conv3x3(128, 128, rngs=rngs), (4, 4, 128)),
        (lambda rngs: layers.Conv3x3(40, 40, rngs=rngs), (10, 10, 40)),  # by Winograd's algorithm, image by image
        (lambda rngs: layers.Conv3x3(40, 40, rngs=rngs), (17, 17, 40)),  # and at once
        (lambda rngs: layers.Conv(64, 64, (3, 3), strides=[2, 2], padding=[1, 1], rngs=rngs), (9, 9, 64)),
    ],
    ids=["linear", "few channels", "small maps", "Winograd", "Winograd at once", "strided"],
)
def test_to_evaluate_one_gives_the_bits_that_it_gives_among_others(layer, shape):
    layer = layer(nnx.Rngs(0))
    layer.eval()
    x = jax.random.normal(jax.random.key(0), (4, 2, *shape))
    run = jax.jit(layer)
    one_by_one = [[run(x[t : t + 1, b : b + 1])[0, 0] for b in range(2)] for t in range(4)]
    np.testing.assert_array_equal(run(x), np.array(one_by_one))


@pytest.mark.parametrize("size", [(5,), (4, 5, 5)])
def test_a_convolution_of_other_axes_gives_the_same_in_both_modes(size):
    conv = layers.Conv(2, 3, (3,) * len(size), rngs=nnx.Rngs(0))
    for leading in ((), (2, 2)):
        conv.train()
        x = jax.random.normal(jax.random.key(0), (*leading, *size, 2))
        trained = conv(x)
        conv.eval()
        np.testing.assert_allclose(conv(x), trained, atol=1e-5)


def test_on_a_gpu_evaluation_is_one_product():
    """In parts it would gain nothing there: convolutions sum in another order too."""
    linear = layers.Linear(64, 8, rngs=nnx.Rngs(0))
    linear.eval()
    for platform, loops in (("cpu", 1), ("cuda", 0)):
        lowered = jax.jit(linear).trace(jnp.ones((10, 16, 64))).lower(lowering_platforms=(platform,))
        assert lowered.as_text().count("stablehlo.while") == loops


# Dropout


def test_a_dropout_mask_is_held_over_time_and_scales_what_it_keeps():
    y = layers.Dropout(0.25)(jnp.ones((5, 4, 2000)), jax.random.key(0))
    assert (y == y[:1]).all()
    assert set(np.unique(y).tolist()) == {0.0, float(np.float32(1 / 0.75))}
    np.testing.assert_allclose((y[0] > 0).mean(), 0.75, atol=0.02)
    assert not (y[0, 0] == y[0, 1]).all()


def test_dropout_masks_follow_the_sample_not_its_place_in_the_batch():
    drop, x, keys = layers.Dropout(0.5), jnp.ones((2, 6, 50)), jax.random.split(jax.random.key(1), 6)
    whole = drop(x, keys)
    np.testing.assert_array_equal(drop(x[:, 3:], keys[3:]), whole[:, 3:])
    np.testing.assert_array_equal(drop(x, keys[::-1]), whole[:, ::-1])


def test_dropout_is_the_identity_in_evaluation_mode_and_at_rate_zero():
    x = jnp.arange(12.0).reshape(2, 3, 2)
    drop = layers.Dropout(0.5)
    drop.eval()
    assert drop(x) is x
    assert layers.Dropout(0.0)(x) is x


def test_at_dropout_rate_one_nothing_and_no_gradient_is_left():
    x, key = jnp.ones((2, 3, 4)), jax.random.key(0)
    y, gradient = jax.value_and_grad(lambda x: layers.Dropout(1.0)(x, key).sum())(x)
    assert y == 0 and (gradient == 0).all()


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan"), "half"])
def test_a_dropout_rate_is_a_share(rate):
    with pytest.raises(UserError, match=f"a dropout rate of {rate!r}; give the share"):
        layers.Dropout(rate)


def test_dropout_takes_rngs_and_asks_for_a_key_where_none_is_given():
    x = jnp.ones((2, 3, 40))
    np.testing.assert_array_equal(
        layers.Dropout(0.5)(x, nnx.Rngs(dropout=3)), layers.Dropout(0.5)(x, nnx.Rngs(dropout=3))
    )
    old, typed = (layers.Dropout(0.5)(x, key) for key in (jax.random.PRNGKey(7), jax.random.key(7)))
    np.testing.assert_array_equal(old, typed)
    stream, typed = nnx.Rngs(dropout=3).dropout, layers.Dropout(0.5)(x, nnx.Rngs(dropout=3))
    np.testing.assert_array_equal(layers.Dropout(0.5)(x, stream), typed)
    with pytest.raises(UserError, match=r"needs a key.*rngs=jax\.random\.key\(0\)"):
        layers.Dropout(0.5)(x)
    with pytest.raises(UserError, match=r"rngs are keys \[3, 2\] for 3 samples; give one key, or one for each"):
        layers.Dropout(0.5)(x, jax.random.split(jax.random.key(0), (3, 2)))
    for count in (1, 2, 4):
        with pytest.raises(UserError, match=rf"keys \[{count}\] for 3 samples; give one key, or one for each"):
            layers.Dropout(0.5)(x, jax.random.split(jax.random.key(0), count))
    for rngs in (0, "a key", jnp.zeros(())):
        with pytest.raises(UserError, match=r"rngs is .*; give jax\.random\.key"):
            layers.Dropout(0.5)(x, rngs)


# Pooling and votes


def test_average_pooling_takes_whole_numbers_as_what_they_are():
    assert layers.avg_pool(jnp.full((1, 2, 2, 1), 200, jnp.uint8)).item() == 200
    assert layers.avg_pool(jnp.ones((1, 2, 2, 1), bool)).item() == 1


def pool_by_loops(x_NHWC, g_NHWC):
    """Max pooling and its gradient as in PyTorch: of equal values in a window, the first in row-major order wins."""
    y, x_bar = np.zeros_like(g_NHWC), np.zeros_like(x_NHWC)
    for n, h, w, c in np.ndindex(y.shape):
        window = x_NHWC[n, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2, c]
        i, j = divmod(int(window.argmax()), 2)  # argmax gives the first
        y[n, h, w, c] = window[i, j]
        x_bar[n, 2 * h + i, 2 * w + j, c] += g_NHWC[n, h, w, c]
    return y, x_bar


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (2, 3), (17, 2)])
@pytest.mark.parametrize("spikes", [True, False])
def test_max_pool_sends_the_gradient_to_the_first_maximum(size, spikes):
    x = randn(1, 3, *size, 2)
    x = ((x > 0.3) if spikes else x).astype(np.float32)
    g = randn(2, 3, size[0] // 2, size[1] // 2, 2).astype(np.float32)
    y, vjp = jax.vjp(layers.max_pool, jnp.asarray(x))
    expected, x_bar = pool_by_loops(x, g)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(vjp(jnp.asarray(g))[0], x_bar)


@pytest.mark.parametrize("place", range(4))
def test_max_pool_sends_the_gradient_to_what_is_not_a_number(place):
    """As in PyTorch; the run is stopped for it."""
    x = jnp.ones(4).at[place].set(jnp.nan).reshape(2, 2, 1)
    gradient = jax.grad(lambda x: layers.max_pool(x).sum())(x)
    np.testing.assert_array_equal(gradient.ravel(), jnp.arange(4) == place)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_batch_norm_s_gradients_have_the_types_of_what_they_are_for(dtype):
    graphdef, params, rest = nnx.split(layers.BatchNorm(3), nnx.Param, ...)
    params, x = jax.tree.map(lambda leaf: leaf.astype(dtype), params), jnp.ones((2, 4, 3))
    grads = jax.grad(lambda params, x: nnx.merge(graphdef, params, rest, copy=True)(x).sum(), (0, 1))(params, x)
    assert [leaf.dtype for leaf in jax.tree.leaves(grads)] == [dtype, dtype, x.dtype]


@pytest.mark.parametrize("pool", [layers.max_pool, layers.avg_pool])
def test_windows_are_cut_without_strides(pool):
    """The compiler for TPUs ends the program at some strided slices, which no lowering shows."""
    assert "strides=(" not in str(jax.make_jaxpr(pool)(jnp.zeros((2, 3, 34, 34, 8))))


def test_max_pool_of_a_sequence_pools_every_frame():
    x = jnp.asarray(randn(1, 2, 3, 4, 6, 5))
    np.testing.assert_array_equal(layers.max_pool(x)[1, 2], layers.max_pool(x[1, 2]))


@pytest.mark.parametrize("size", [(4, 4), (5, 7)])
def test_avg_pool_is_the_mean_of_each_window(size, x64):
    x = randn(1, 3, *size, 2)
    H, W = size[0] // 2, size[1] // 2
    expected = x[:, : 2 * H, : 2 * W].reshape(3, H, 2, W, 2, 2).mean((2, 4))
    np.testing.assert_allclose(layers.avg_pool(jnp.asarray(x)), expected, rtol=1e-14, atol=1e-15)


def test_votes_average_adjacent_output_neurons():
    spikes = jnp.zeros((2, 1, 6)).at[0, 0, jnp.asarray([0, 3, 4, 5])].set(1)
    np.testing.assert_allclose(layers.vote(spikes, 2), [[[1 / 3, 1]], [[0, 0]]], rtol=1e-6)
    assert layers.vote(spikes.astype(jnp.bfloat16), 2).dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_classes_that_fired_as_often_have_the_same_rate_in_any_batch(dtype, x64):
    counts_BC = np.random.default_rng(0).integers(0, 101, (64, 4))
    counts_BC[:, 2] = counts_BC[:, 1]
    order = np.random.default_rng(1).permuted(np.broadcast_to(np.arange(100), (64, 4, 100)), axis=-1)
    fired = order < counts_BC[..., None]  # another hundred places for every sample and class
    spikes = jnp.asarray(fired.reshape(64, 4, 10, 10).transpose(2, 0, 1, 3).reshape(10, 64, 40), dtype)
    rates = jax.jit(layers.firing_rates, static_argnums=1)
    whole = rates(spikes, 4)
    np.testing.assert_allclose(whole, counts_BC / 100, rtol=2e-7)
    np.testing.assert_array_equal(whole[:, 1], whole[:, 2])
    for batch in (1, 16):
        parts = [rates(spikes[:, start : start + batch], 4) for start in range(0, 64, batch)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize(
    "rngs, said",
    [
        (np.arange(3), r"ndarray, shape \(3,\); give jax\.random\.key"),
        (jnp.zeros(3), r"\S+, shape \(3,\); give"),
        ([jax.random.key(0)] * 3, "of type list; give"),
        (nnx.Rngs(params=0), r"has the streams params; give nnx\.Rngs\(0\)"),
    ],
)
def test_what_is_no_key_is_told_in_a_line(rngs, said):
    with pytest.raises(UserError, match=f"rngs .*{said}") as error:
        layers.Dropout(0.5)(jnp.ones((2, 3, 4)), rngs)
    assert "\n" not in str(error.value)


def test_initial_weights_are_pytorchs_default():
    """U(-b, b) with b = 1 / sqrt(fan_in): the bound is kept and nearly reached, the deviation is b / sqrt(3)."""
    for shape, fan_in in [((3, 3, 8, 64), 72), ((300, 50), 300)]:
        w = layers.torch_default_init(jax.random.key(0), shape)
        bound = fan_in**-0.5
        assert 0.99 * bound < np.abs(w).max() <= bound
        np.testing.assert_allclose(w.std(), bound / 3**0.5, rtol=0.03)
