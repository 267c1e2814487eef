"""3x3 convolution and matrix product with their gradients, arranged for a CPU; elsewhere XLA's own.

A convolution is worked a few images at a time, so that what it spreads out never leaves the cache.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from plif_jax.mapped import vary_alike

# Below these, Winograd's transforms cost more than the products they save.
WINOGRAD_CHANNELS, WINOGRAD_POSITIONS = 32, 64

# F(2x2, 3x3): 2x2 outputs of 4x4 inputs in 16 products instead of 36.
KERNEL_TRANSFORM = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])


def conv3x3(x, kernel):
    """3x3 convolution, padding 1, stride 1, of x [N, H, W, C] with kernel [3, 3, C, O]: [N, H, W, O].

    On a CPU: Winograd's F(2x2, 3x3) where there are channels enough, which is exact but for rounding, and the kernel's
    gradient image by image.

    Reference: Lavin and Gray, CVPR 2016, "Fast algorithms for convolutional neural networks".
    """
    return _conv3x3(*vary_alike(x, kernel))


@jax.custom_vjp
def _conv3x3(x, kernel):
    if not _suits_winograd(x, kernel):
        return _direct(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=_winograd, default=_direct)


def _forward(x, kernel):
    return _conv3x3(x, kernel), (x, kernel)


def _backward(residuals, g):
    x, kernel = residuals
    by_image = _kernel_gradient_by_image if _can_be_cut(x) else _kernel_gradient
    kernel_bar = lax.platform_dependent(x, g, cpu=by_image, default=_kernel_gradient)
    return _conv3x3(g, kernel[::-1, ::-1].swapaxes(2, 3)), kernel_bar


_conv3x3.defvjp(_forward, _backward)


def _direct(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _suits_winograd(x, kernel):
    _, H, W, C = x.shape
    wide = min(C, kernel.shape[-1]) >= WINOGRAD_CHANNELS and H * W >= WINOGRAD_POSITIONS
    return wide and _can_be_cut(x) and x.dtype in (jnp.float32, jnp.float64)


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


def _kernel_gradient(x, g):
    x, kernel = vary_alike(x, jnp.zeros((3, 3, x.shape[-1], g.shape[-1]), x.dtype))
    return jax.linear_transpose(lambda kernel: _direct(x, kernel), kernel)(g)[0]


def _kernel_gradient_by_image(x, g):
    """Sum over images of g^T patches."""
    N, H, W, features = g.shape
    images = _images(N, 512 // (H * W))
    dtype = jnp.promote_types(x.dtype, jnp.float32)

    def add(total, some):
        x, g = some
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        patches = jnp.concatenate([x[:, i : i + H, j : j + W] for i in range(3) for j in range(3)], axis=-1)
        return total + jnp.einsum("nhwo,nhwp->op", g, patches, preferred_element_type=dtype), None

    chunks = [array.reshape(-1, images, *array.shape[1:]) for array in (x, g)]
    total, _ = lax.scan(add, vary_alike(jnp.zeros((features, 9 * x.shape[-1]), dtype), x)[0], chunks)
    return jnp.moveaxis(total.reshape(features, 3, 3, -1), 0, -1).astype(x.dtype)


def _images(N, most):
    """The largest power of two that divides N images and is not above `most`, or 1."""
    return math.gcd(N, 1 << max(most, 1).bit_length() - 1)


def dot_general(x, kernel, *args, **kwargs):
    """`lax.dot_general`; on a CPU shorter floats are multiplied in float32, for which XLA is much faster there."""

    def product(x, kernel):
        return lax.dot_general(x, kernel, *args, **kwargs)

    def in_float32(x, kernel):
        return product(x.astype(jnp.float32), kernel.astype(jnp.float32)).astype(x.dtype)

    if x.dtype in (jnp.float32, jnp.float64):
        return product(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=in_float32, default=product)
