"""3x3 convolution and matrix product with their gradients, arranged for a CPU and, where it pays, for NVIDIA's GPUs.

On a CPU a convolution is worked a few images at a time, so that what it spreads out never leaves the cache. On a GPU
one of few channels, as frames have, is a product of patches: cuDNN is slow at these. All else is XLA's own.
"""

import math
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from plif_jax.dtypes import at_least_float32
from plif_jax.mapped import vary_alike

# Below these, Winograd's transforms cost more than the products they save.
WINOGRAD_CHANNELS, WINOGRAD_POSITIONS = 32, 64

# Of fewer channels, products of rows cost more than XLA's convolution; of fewer positions, rows of an image alone give
# other bits than rows of many.
ROW_CHANNELS, ROW_POSITIONS = 64, 4

# Patches of more channels would take more traffic than cuDNN's kernels lose.
PATCH_CHANNELS = 3

# F(2x2, 3x3): 2x2 outputs of 4x4 inputs in 16 products instead of 36.
KERNEL_TRANSFORM = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])


@partial(jax.jit, inline=True)  # a call outside jit is one program, without a conditional of devices
def conv3x3(x, kernel):
    """3x3 convolution, padding 1, stride 1, of x [N, H, W, C] with kernel [3, 3, C, O]: [N, H, W, O].

    On a CPU: Winograd's F(2x2, 3x3) where there are channels enough, which is exact but for rounding; for bfloat16,
    where the CPU has units for its products, products of rows; and the kernel's gradient a few images at a time. On a
    GPU: of up to `PATCH_CHANNELS` channels, products of patches.

    Reference: Lavin and Gray, CVPR 2016, "Fast algorithms for convolutional neural networks".
    """
    return _conv3x3(*vary_alike(x, kernel))


def _convolved(x, kernel):
    if x.shape[-1] <= PATCH_CHANNELS:
        return lax.platform_dependent(x, kernel, cuda=_by_patches, default=_direct)
    if _can_be_cut(x) and suits_winograd(x.shape[1:], kernel.shape[-1], x.dtype):
        return lax.platform_dependent(x, kernel, cpu=_winograd, default=_direct)
    if _can_be_cut(x) and suits_rows(x.shape[1:], kernel.shape[-1], x.dtype):
        return lax.platform_dependent(x, kernel, cpu=_by_rows, default=_direct)
    return _direct(x, kernel)


_conv3x3 = jax.custom_vjp(_convolved)


def _forward(x, kernel):
    # Not `_conv3x3`: differentiated twice within a `lax.map`, JAX gives the gradient an x without its axes then.
    return _convolved(x, kernel), (x, kernel)


def _backward(residuals, g):
    x, kernel = residuals
    by_image = _kernel_gradient_by_image if _can_be_cut(x) else _kernel_gradient
    by_patches = _kernel_gradient_by_patches if x.shape[-1] <= PATCH_CHANNELS else _kernel_gradient

    def first(kernel_gradient):
        # Before x's gradient, or XLA puts it off to the end, and keeps x and g for it that long.
        return lambda x, g: lax.optimization_barrier((kernel_gradient(x, g), g))

    ways = {"cuda": first(by_patches), "default": first(_kernel_gradient), "cpu": lambda x, g: (by_image(x, g), g)}
    kernel_bar, g = lax.platform_dependent(x, g, **ways)
    return _conv3x3(g, kernel[::-1, ::-1].swapaxes(2, 3)), kernel_bar


_conv3x3.defvjp(_forward, _backward)


def _direct(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))


def suits_winograd(shape, features, dtype):
    """Whether on a CPU maps of a shape (H, W, C) become so many features by Winograd's algorithm."""
    H, W, C = shape
    return min(C, features) >= WINOGRAD_CHANNELS and H * W >= WINOGRAD_POSITIONS and dtype in (jnp.float32, jnp.float64)


def suits_rows(shape, features, dtype):
    """Whether on this machine's CPU maps of a shape (H, W, C) become so many features by products of rows."""
    H, W, C = shape
    return min(C, features) >= ROW_CHANNELS and H * W >= ROW_POSITIONS and _has_units_for(dtype)


def _can_be_cut(x):
    """Whether the number of images is one; an exported function's open batch is not."""
    return isinstance(x.shape[0], int)


def _winograd(x, kernel):
    N, H, W, C = x.shape
    rows, columns = -(-H // 2), -(-W // 2)  # of tiles, 2x2 outputs each
    transform = KERNEL_TRANSFORM.astype(kernel.dtype)
    U = jnp.einsum("ai,bj,ijco->abco", transform, transform, kernel).reshape(16, C, -1)

    def convolve(x):
        n = x.shape[0]
        x = jnp.pad(x, ((0, 0), (1, 2 * rows - H + 1), (1, 2 * columns - W + 1), (0, 0)))
        x = jnp.stack(_input_transform([x[:, i : i + 2 * rows - 1 : 2] for i in range(4)]))
        V = jnp.stack(_input_transform([x[:, :, :, j : j + 2 * columns - 1 : 2] for j in range(4)]), axis=1)
        M = jnp.einsum("apc,aco->apo", V.reshape(16, -1, C), U).reshape(4, 4, n, rows, columns, -1)
        y = jnp.stack(_output_transform(M), axis=3)
        y = jnp.stack(_output_transform(y), axis=4)
        return y.reshape(n, 2 * rows, 2 * columns, -1)[:, :H, :W]

    y = lax.map(convolve, x.reshape(-1, _images(N, 4096 // (H * W)), H, W, C))
    return y.reshape(N, H, W, kernel.shape[-1])


def _input_transform(d):
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _output_transform(m):
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _by_rows(x, kernel):
    """One product for each row of the kernel, a few images at a time."""
    N, H, W, C = x.shape
    rows = kernel.reshape(3, 3 * C, kernel.shape[-1])

    def convolve(x):
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = jnp.concatenate([x[:, :, j : j + W] for j in range(3)], axis=-1)
        products = [
            jnp.einsum("nhwp,po->nhwo", x[:, i : i + H], rows[i], preferred_element_type=jnp.float32) for i in range(3)
        ]
        return sum(products).astype(x.dtype)

    y = lax.map(convolve, x.reshape(-1, _images(N, 2048 // (H * W)), H, W, C))
    return y.reshape(N, H, W, kernel.shape[-1])


def _by_patches(x, kernel):
    patches, rows = _aligned(_around(x)), _aligned(kernel.reshape(-1, kernel.shape[-1]).T)
    return jnp.einsum("nhwp,op->nhwo", patches, rows)


def _kernel_gradient_by_patches(x, g):
    """Image by image, for one product with so long a sum would leave most of the GPU idle."""
    dtype = at_least_float32(x.dtype)
    of_images = jnp.einsum("nhwo,nhwp->nop", g, _aligned(_around(x)), preferred_element_type=dtype)
    rows = of_images.sum(0)[:, : 9 * x.shape[-1]]
    return rows.T.reshape(3, 3, x.shape[-1], -1).astype(x.dtype)


def _aligned(patches):
    """With zeros up to a multiple of 4 numbers, by which tensor cores load."""
    return jnp.pad(patches, [(0, 0)] * (patches.ndim - 1) + [(0, -patches.shape[-1] % 4)])


def _around(x):
    """The 3x3 values around each place, [N, H, W, 9 C]."""
    _, H, W, _ = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate([x[:, i : i + H, j : j + W] for i in range(3) for j in range(3)], axis=-1)


def _kernel_gradient(x, g):
    x, kernel = vary_alike(x, jnp.zeros((3, 3, x.shape[-1], g.shape[-1]), x.dtype))
    return jax.linear_transpose(lambda kernel: _direct(x, kernel), kernel)(g)[0]


def _kernel_gradient_by_image(x, g):
    """Sum over images of g^T patches."""
    N, H, W, features = g.shape
    images = _images(N, 512 // (H * W))
    dtype = at_least_float32(x.dtype)

    def add(total, some):
        x, g = some
        patches = _around(x)
        return total + jnp.einsum("nhwo,nhwp->op", g, patches, preferred_element_type=dtype), None

    chunks = [array.reshape(-1, images, *array.shape[1:]) for array in (x, g)]
    total, _ = lax.scan(add, vary_alike(jnp.zeros((features, 9 * x.shape[-1]), dtype), x)[0], chunks)
    return jnp.moveaxis(total.reshape(features, 3, 3, -1), 0, -1).astype(x.dtype)


def _images(N, most):
    """The largest power of two that divides N images and is not above `most`, or 1."""
    return math.gcd(N, 1 << max(most, 1).bit_length() - 1)


def dot_general(x, kernel, *args, **kwargs):
    """`lax.dot_general` of x [..., I] with kernel [I, O], as `nnx.Linear` calls it; on a CPU as fast as XLA can.

    There shorter floats are multiplied in float32, but where the CPU has units for them.
    """

    def product(x, kernel):
        return lax.dot_general(x, kernel, *args, **kwargs)

    def in_float32(x, kernel):
        return product(x.astype(jnp.float32), kernel.astype(jnp.float32)).astype(x.dtype)

    if x.dtype in (jnp.float32, jnp.float64):
        return product(x, kernel)
    on_cpu = _in_bfloat16 if _has_units_for(x.dtype) else in_float32
    return lax.platform_dependent(*vary_alike(x, kernel), cpu=on_cpu, default=product)


@jax.custom_vjp
def _in_bfloat16(x, kernel):
    return jnp.einsum("...i,io->...o", x, kernel, preferred_element_type=jnp.float32).astype(x.dtype)


def _in_bfloat16_backward(residuals, g):
    x, kernel = residuals
    x_bar = jnp.einsum("...o,io->...i", g, kernel, preferred_element_type=jnp.float32)
    # XLA hands no unit a product that sums over rows: in bfloat16 it takes five times as long as in float32.
    kernel_bar = jnp.einsum("...i,...o->io", x.astype(jnp.float32), g.astype(jnp.float32))
    return x_bar.astype(x.dtype), kernel_bar.astype(kernel.dtype)


_in_bfloat16.defvjp(lambda x, kernel: (_in_bfloat16(x, kernel), (x, kernel)), _in_bfloat16_backward)


def _has_units_for(dtype):
    """Whether this machine's CPU has units for products of a short type: Intel's AMX, for bfloat16."""
    return dtype == jnp.bfloat16 and _has_amx()


@cache
def _has_amx():
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False
