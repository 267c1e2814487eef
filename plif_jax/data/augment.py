"""What happens to a batch on the device, inside the train step: the authors' augmentation and normalisation.

The random parameters are drawn apart from the geometry (`affine`, `crop`, `flip`), so that the geometry can be held
against Pillow pixel for pixel. Each sample has a key of its own: however a batch is sharded, its samples look the same.
"""

import jax
import jax.numpy as jnp

from plif_jax.catalog import DATASETS

MEAN_STD = {
    "MNIST": ((0.1307,), (0.3081,)),
    "FashionMNIST": ((0.2860,), (0.3530,)),
    "CIFAR10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
}
"""Mean and standard deviation of each channel of each image set, for pixels in 0..1: the authors' figures."""


def preprocess(name: str, x: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    """Turns a stored batch into the network's input: augmented if keys are given, then normalised.

    `(augmented / 255 - mean) / std` for images; event frames are counts already and are only cast.

    Args:
      name: a data set of `catalog.DATASETS`.
      x: images `[B, H, W, C]` in uint8, or event frames `[B, T, H, W, 2]` in any numeric type.
      keys: one random key per sample, `[B]`, in training; None in evaluation, where nothing is augmented.

    Returns:
      `x`'s shape in JAX's default float type: float32, or float64 under `jax_enable_x64`.
    """
    dtype = jnp.result_type(float)
    if DATASETS[name].events:
        return x.astype(dtype)
    if keys is not None and name in _AUGMENT:
        x = jax.vmap(_AUGMENT[name])(x, keys)
    mean, std = jnp.asarray(MEAN_STD[name], dtype)[:, None, None, None]
    return (x.astype(dtype) / 255 - mean) / std


def affine(image: jax.Array, angle: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Rotates and scales an image about its centre, then shifts it: nearest neighbour, zero outside.

    With c the centre (W / 2, H / 2), pixel centres at half-integers and y pointing down, the output at p is the input
    at `R(-angle) (p - c - shift) / scale + c`, torchvision's convention for `RandomAffine` on Pillow images. Pillow
    takes the nearest pixel in fixed-point arithmetic with 16 fractional bits, and so does this. In float64 the pixels
    are the same; in float32 the rounding of the matrix moves about one pixel in a million to its neighbour.

    Args:
      image: `[H, W, C]` in any numeric type.
      angle: degrees; on the screen a positive angle turns clockwise.
      shift: `[2]`, pixels to the right and down.
      scale: the factor of enlargement.

    Returns:
      The image of the same shape and type.
    """
    height, width, channels = image.shape
    centre = jnp.array([width / 2, height / 2])
    radians = jnp.deg2rad(angle)
    cos, sin = jnp.cos(radians) / scale, jnp.sin(radians) / scale
    inverse = jnp.array([[cos, sin], [-sin, cos]])  # from output (x, y) to input (x, y)
    # Where the centre of output pixel (0, 0) comes from. Not a matmul: accelerators may round its inputs.
    origin = (inverse * (0.5 - centre - shift)[None]).sum(1) + centre

    # Pillow rounds the matrix and the origin once and then steps from pixel to pixel in integers.
    inverse, origin = (jnp.floor(v * 65536 + 0.5).astype(jnp.int32) for v in (inverse, origin))
    columns, rows = jnp.arange(width)[None, :], jnp.arange(height)[:, None]
    x, y = ((origin[i] + inverse[i, 0] * columns + inverse[i, 1] * rows) >> 16 for i in range(2))  # [H, W] each
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    source = jnp.where(inside, y * width + x, height * width)  # one past the end: filled with zero
    return image.reshape(-1, channels).at[source].get(mode="fill", fill_value=0)


def crop(image: jax.Array, top: jax.Array, left: jax.Array, padding: int = 4) -> jax.Array:
    """Pads an image with zeros on all sides and cuts its own size out again.

    Args:
      image: `[H, W, C]`.
      top: first row kept of the padded image, 0 to 2 * padding.
      left: first column kept, likewise.
      padding: pixels on each side.

    Returns:
      The image of the same shape and type; `top = left = padding` gives it back unchanged.
    """
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)


def flip(image: jax.Array) -> jax.Array:
    """Mirrors an image `[H, W, C]` left to right."""
    return image[:, ::-1]


def random_affine(image: jax.Array, key: jax.Array) -> jax.Array:
    """MNIST's augmentation: turned by up to 30°, shifted by up to 15 % in whole pixels, scaled by 0.85 to 1.11.

    torchvision's `RandomAffine(degrees=30, translate=(0.15, 0.15), scale=(0.85, 1.11))`: all uniform.
    """
    angle_key, shift_key, scale_key = jax.random.split(key, 3)
    height, width, _ = image.shape
    furthest = 0.15 * jnp.array([width, height])
    angle = jax.random.uniform(angle_key, minval=-30.0, maxval=30.0)
    shift = jnp.round(jax.random.uniform(shift_key, (2,), minval=-furthest, maxval=furthest))
    scale = jax.random.uniform(scale_key, minval=0.85, maxval=1.11)
    return affine(image, angle, shift, scale)


def random_crop_flip(image: jax.Array, key: jax.Array) -> jax.Array:
    """CIFAR-10's augmentation: `RandomCrop(32, padding=4)`, then mirrored with probability one half."""
    crop_key, flip_key = jax.random.split(key)
    top, left = jax.random.randint(crop_key, (2,), 0, 2 * 4 + 1)
    image = crop(image, top, left, padding=4)
    return jnp.where(jax.random.bernoulli(flip_key), flip(image), image)


_AUGMENT = {"MNIST": random_affine, "CIFAR10": random_crop_flip}  # Fashion-MNIST is not augmented
