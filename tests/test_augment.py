"""Augmentation: the geometry against Pillow, the random parameters against torchvision's distributions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from plif_jax.data import augment


def pillow_affine(image_HW, angle, shift, scale):
    """What torchvision's RandomAffine gives on a Pillow image for these parameters."""
    height, width = image_HW.shape
    cos, sin = math.cos(math.radians(angle)) / scale, math.sin(math.radians(angle)) / scale
    dx, dy = -width / 2 - shift[0], -height / 2 - shift[1]
    matrix = [cos, sin, cos * dx + sin * dy + width / 2, -sin, cos, -sin * dx + cos * dy + height / 2]
    nearest, size = Image.Resampling.NEAREST, (width, height)
    return np.asarray(Image.fromarray(image_HW).transform(size, Image.Transform.AFFINE, matrix, nearest, fillcolor=0))


def differing_pixels(size, cases):
    """How many pixels of `cases` random images and parameters differ from Pillow's."""
    rng = np.random.default_rng(2020)
    turn = jax.jit(augment.affine)
    differing = 0
    for _ in range(cases):
        image = rng.integers(1, 256, size, dtype=np.uint8)
        angle, shift, scale = rng.uniform(-30, 30), rng.integers(-4, 5, 2), rng.uniform(0.85, 1.11)
        ours = turn(image[..., None], angle, shift, scale)[..., 0]
        differing += np.count_nonzero(ours != pillow_affine(image, angle, shift, scale))
    return differing


@pytest.mark.parametrize("size", [(28, 28), (20, 31)])
def test_affine_is_pillows_pixel_for_pixel(size):
    with jax.enable_x64(True):
        assert differing_pixels(size, 200) == 0


def test_affine_in_float32_differs_in_a_pixel_of_ten_thousand_at_most():
    with jax.enable_x64(False):
        assert differing_pixels((28, 28), 200) <= 200 * 28 * 28 // 10_000


def test_affine_by_hand():
    image = jnp.arange(1, 10, dtype=jnp.uint8).reshape(3, 3, 1)
    same = augment.affine(image, 0.0, jnp.array([0, 0]), 1.0)
    np.testing.assert_array_equal(same, image)
    shifted = augment.affine(image, 0.0, jnp.array([1, -1]), 1.0)[..., 0]  # one to the right, one up
    np.testing.assert_array_equal(shifted, [[0, 4, 5], [0, 7, 8], [0, 0, 0]])
    turned = augment.affine(image, 90.0, jnp.array([0, 0]), 1.0)[..., 0]  # clockwise
    np.testing.assert_array_equal(turned, np.rot90(image[..., 0], -1))


@pytest.mark.parametrize(("top", "left"), [(0, 0), (4, 4), (8, 0), (3, 7), (8, 8)])
def test_crop_and_flip_are_pillows(top, left):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    padded = Image.new("RGB", (40, 40))
    padded.paste(Image.fromarray(image), (4, 4))
    cropped = padded.crop((left, top, left + 32, top + 32))
    ours = augment.crop(jnp.asarray(image), top, left, padding=4)
    np.testing.assert_array_equal(ours, np.asarray(cropped))
    mirrored = np.asarray(cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    np.testing.assert_array_equal(augment.flip(ours), mirrored)


def assert_uniform(sample, low, high):
    """Kolmogorov and Smirnov's test at the level of one in a thousand."""
    sorted_ = (np.sort(np.asarray(sample, np.float64)) - low) / (high - low)
    assert sorted_[0] >= 0 and sorted_[-1] <= 1
    steps = np.arange(1, len(sorted_) + 1) / len(sorted_)
    assert np.abs(sorted_ - steps).max() < 1.95 / math.sqrt(len(sorted_))


def test_affine_parameters_follow_torchvisions_distributions(monkeypatch):
    monkeypatch.setattr(augment, "affine", lambda image, angle, shift, scale: jnp.array([angle, *shift, scale]))
    keys = jax.random.split(jax.random.key(0), 20_000)
    image = jnp.zeros((28, 28, 1), jnp.uint8)
    angle, right, down, scale = jax.vmap(augment.random_affine, (None, 0), out_axes=1)(image, keys)
    assert_uniform(angle, -30, 30)
    assert_uniform(scale, 0.85, 1.11)
    for shift in (right, down):  # round(U(-4.2, 4.2)): the two ends are less likely
        values, counts = np.unique(shift, return_counts=True)
        np.testing.assert_array_equal(values, np.arange(-4, 5))
        expected = len(keys) * np.array([0.7] + [1.0] * 7 + [0.7]) / 8.4
        assert ((counts - expected) ** 2 / expected).sum() < 26.1  # chi squared, 8 degrees, one in a thousand
    assert np.abs(np.corrcoef([angle, right, down, scale]) - np.eye(4)).max() < 0.03


def test_crop_and_flip_follow_torchvisions_distributions():
    keys = jax.random.split(jax.random.key(0), 20_000)
    # Each pixel holds its own position, so that the pixel at (16, 16) tells which crop was taken and whether mirrored.
    rows, columns = jnp.meshgrid(jnp.arange(32), jnp.arange(32), indexing="ij")
    image = jnp.stack([rows, columns], -1)
    pair = jax.vmap(lambda key: augment.random_crop_flip(image, key)[16, 15:17])(keys)  # [N, 2, (row, column)]
    mirrored = pair[:, 0, 1] > pair[:, 1, 1]
    top, left = pair[:, 0, 0] - 12, jnp.where(mirrored, pair[:, 1, 1], pair[:, 0, 1]) - 11
    cells = np.zeros((9, 9, 2))  # 162 equally likely, so crop and flip are independent too
    np.add.at(cells, tuple(np.asarray(i, int) for i in (top, left, mirrored)), 1)
    expected = len(keys) / cells.size
    assert ((cells - expected) ** 2 / expected).sum() < 222.2  # chi squared, 161 degrees, one in a thousand


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize(
    "name, mean, std",
    [  # as the authors' program has them
        ("MNIST", [0.1307], [0.3081]),
        ("FashionMNIST", [0.2860], [0.3530]),
        ("CIFAR10", [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
    ],
)
def test_evaluation_is_only_normalised(name, mean, std, x64):
    channels = len(mean)
    x = np.random.default_rng(0).integers(0, 256, (4, 28, 28, channels), dtype=np.uint8)
    mean, std = np.array(mean), np.array(std)
    with jax.enable_x64(x64):
        out = augment.preprocess(name, jnp.asarray(x))
        assert out.dtype == (jnp.float64 if x64 else jnp.float32)
        tolerance = 1e-12 if x64 else 1e-6
        np.testing.assert_allclose(out, (x / 255 - mean) / std, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "moves"), [("MNIST", True), ("FashionMNIST", False), ("CIFAR10", True)])
def test_training_moves_pixels_the_same_however_the_batch_is_split(name, moves):
    shape = (16, 32, 32, 3) if name == "CIFAR10" else (16, 28, 28, 1)
    x = jnp.asarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    keys = jax.random.split(jax.random.key(1), 16)
    preprocess = jax.jit(augment.preprocess, static_argnums=0)
    whole = preprocess(name, x, keys)
    assert bool((whole != preprocess(name, x)).any()) == moves
    halves = [preprocess(name, x[i : i + 8], keys[i : i + 8]) for i in (0, 8)]
    np.testing.assert_array_equal(whole, jnp.concatenate(halves))


def test_event_frames_are_only_cast():
    frames = np.random.default_rng(0).integers(0, 9, (2, 10, 34, 34, 2), dtype=np.uint16)
    out = augment.preprocess("NMNIST", jnp.asarray(frames), jax.random.split(jax.random.key(0), 2))
    assert out.dtype == jnp.result_type(float)
    np.testing.assert_array_equal(out, frames)
