"""The CPU's own arrangements of a 3x3 convolution against XLA's, forward and backward."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plif_jax import convolution


def direct(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))


def operands(N, H, W, C, features, dtype=float):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (N, H, W, C), (3, 3, C, features), (N, H, W, features)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def with_gradients(convolve, x, kernel, g):
    y, pull = jax.vjp(convolve, x, kernel)
    return y, *pull(g)


# Odd sizes and unequal channels; images in several chunks; too small for tiles.
@pytest.mark.parametrize("shape", [(5, 9, 17, 40, 33), (24, 16, 16, 32, 32), (2, 4, 4, 64, 64)])
def test_a_convolution_and_its_gradients_are_xlas(shape, x64):
    found = [jax.jit(partial(with_gradients, c))(*operands(*shape)) for c in (convolution.conv3x3, direct)]
    for ours, xlas in zip(*found, strict=True):
        np.testing.assert_allclose(ours, xlas, atol=1e-13 * np.abs(xlas).max())


# Of few channels, by Winograd's algorithm, and neither.
@pytest.mark.parametrize("shape", [(3, 6, 6, 2, 3), (3, 8, 8, 32, 32), (3, 6, 6, 5, 4)])
@pytest.mark.parametrize("within", [lambda f: f, lambda f: lambda x, k: jax.lax.map(lambda one: f(one[None], k)[0], x)])
def test_a_convolution_is_differentiated_twice_also_within_a_loop(shape, within, x64):
    def of_gradients(convolve):
        def loss(x, kernel):
            return jnp.sin(within(convolve)(x, kernel)).sum()

        def of_first(x, kernel):
            return sum((bar**2).sum() for bar in jax.grad(loss, (0, 1))(x, kernel))

        x, kernel, _ = operands(*shape)
        return jax.jit(jax.grad(of_first, (0, 1)))(x, kernel)

    for ours, xlas in zip(of_gradients(convolution.conv3x3), of_gradients(direct), strict=True):
        np.testing.assert_allclose(ours, xlas, atol=1e-11 * np.abs(xlas).max())
        assert np.abs(xlas).max() > 0


# A frame's two channels, which are 18 values to a patch; an image's; odd sizes.
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(5, 9, 7, 2, 33), (3, 8, 8, 3, 16), (2, 6, 6, 1, 8)])
def test_on_a_gpu_few_channels_are_products_of_patches(shape, dtype, x64, monkeypatch):
    def found(convolve):
        return jax.jit(partial(with_gradients, convolve))(x, kernel, g)

    x, kernel, g = operands(*shape, dtype)
    expected = found(direct)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, **ways: ways.get("cuda", ways["default"])(*args))
    for ours, xlas in zip(found(convolution.conv3x3), expected, strict=True):
        assert ours.dtype == dtype
        ours, xlas = (np.asarray(array, float) for array in (ours, xlas))
        np.testing.assert_allclose(ours, xlas, atol=(1e-13 if dtype == jnp.float64 else 0.01) * np.abs(xlas).max())
    y = jax.make_jaxpr(convolution.conv3x3)(x, kernel)
    assert "conv_general_dilated" not in str(y)


def test_rounding_in_float32_stays_near_that_of_the_direct_form(x64):
    x, kernel, _ = operands(8, 14, 14, 128, 128)
    exact = direct(x, kernel)
    single = [operand.astype(jnp.float32) for operand in (x, kernel)]
    ours, xlas = (np.abs(f(*single) - exact).max() for f in (convolution.conv3x3, direct))
    assert ours < 4 * xlas, (ours, xlas)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_short_floats_are_not_transformed(dtype):
    """Winograd's sums and differences would cost them bits."""
    x, kernel, _ = operands(2, 14, 14, 32, 32, dtype)
    np.testing.assert_array_equal(convolution.conv3x3(x, kernel), direct(x, kernel))


# As on a CPU with units for bfloat16 and on one without; what runs is right on both.
@pytest.mark.parametrize("dtype, channels, amx", [("bfloat16", 32, 0), ("float16", 64, 1), ("bfloat16", 64, 1)])
def test_gradients_of_short_floats_are_rounded_once(dtype, channels, amx, monkeypatch):
    """Compiled, so that the branches of every platform are traced."""
    monkeypatch.setattr(convolution, "_has_amx", lambda: amx)
    *primals, g = operands(16, 9, 8, channels, channels + 8, dtype)
    found = jax.jit(partial(with_gradients, convolution.conv3x3))(*primals, g)
    longer = [array.astype(jnp.float32) for array in (*primals, g)]
    for short, long in zip(found, with_gradients(direct, *longer), strict=True):
        assert short.dtype == dtype
        once = {"rtol": jnp.finfo(dtype).eps, "atol": 1e-3 * np.abs(long).max()}
        np.testing.assert_allclose(short.astype(jnp.float32), long, **once)


def test_no_images_are_convolved_to_none(monkeypatch):
    monkeypatch.setattr(convolution, "_has_amx", lambda: True)
    for channels, dtype in ((64, jnp.bfloat16), (64, jnp.float32), (2, jnp.float32)):
        y, x_bar, kernel_bar = with_gradients(convolution.conv3x3, *operands(0, 8, 8, channels, 64, dtype))
        assert (y.shape, x_bar.shape) == ((0, 8, 8, 64), (0, 8, 8, channels))
        assert kernel_bar.shape == (3, 3, channels, 64) and not kernel_bar.any()


@pytest.mark.parametrize("dtype, amx", [("bfloat16", 0), ("bfloat16", 1), ("float32", 0)])
def test_products_of_short_floats_are_rounded_once(dtype, amx, monkeypatch):
    monkeypatch.setattr(convolution, "_has_amx", lambda: amx)
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel, g = (
        jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, [(2, 5, 300), (300, 7), (2, 5, 7)], strict=True)
    )
    dims = (((2,), (0,)), ((), ()))
    y, vjp = jax.vjp(jax.jit(lambda x, kernel: convolution.dot_general(x, kernel, dims)), x, kernel)
    x_bar, kernel_bar = vjp(g)
    long = [np.asarray(array, np.float32).reshape(-1, array.shape[-1]) for array in (x, kernel, g)]
    for ours, exact in ((y, long[0] @ long[1]), (x_bar, long[2] @ long[1].T), (kernel_bar, long[0].T @ long[2])):
        assert ours.dtype == dtype
        ours = np.asarray(ours, np.float32).reshape(exact.shape)
        np.testing.assert_allclose(ours, exact, rtol=2 * jnp.finfo(dtype).eps, atol=1e-4)


def test_a_cpu_s_units_for_bfloat16_are_used(monkeypatch):
    """Where it has them, products take bfloat16, and no convolution is left for XLA, which would not use them."""
    dims = (((1,), (0,)), ((), ()))
    for amx, N in ((False, 2), (True, 3)):  # another N, for `conv3x3` is traced once for each shape
        monkeypatch.setattr(convolution, "_has_amx", lambda amx=amx: amx)
        product = jax.jit(lambda x, kernel: convolution.dot_general(x, kernel, dims))
        text = product.lower(*(jnp.zeros((n, 64), jnp.bfloat16) for n in (N, 64))).as_text()
        assert f"(tensor<{N}x64x{'bf16' if amx else 'f32'}>, " in text
        convolve = jax.jit(partial(with_gradients, convolution.conv3x3))
        assert ("stablehlo.convolution" in convolve.lower(*operands(N, 8, 8, 64, 64, jnp.bfloat16)).as_text()) != amx


def test_a_kernel_s_gradient_comes_before_its_input_s():
    """Elsewhere than on a CPU; what it is made of can go then. A barrier says so: the result is the same."""
    x, kernel, g = operands(2, 6, 6, 4, 4)
    for platform, barriers in (("cpu", 0), ("cuda", 1), ("tpu", 1)):
        lowered = jax.jit(lambda x, k, g: jax.vjp(convolution.conv3x3, x, k)[1](g)).trace(x, kernel, g)
        text = lowered.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.optimization_barrier") == barriers


def test_a_kernel_s_gradient_in_bfloat16_is_summed_in_float32_over_the_images():
    x, g = (jax.random.normal(jax.random.key(i), (64, 8, 8, 2 + 6 * i), jnp.bfloat16) for i in range(2))
    given = convolution._kernel_gradient_by_patches(x, g)
    exact = convolution._kernel_gradient_by_patches(x.astype(jnp.float32), g.astype(jnp.float32))
    assert (given == exact.astype(jnp.bfloat16)).mean() > 0.99
