"""The simulated camera: deterministic, upright, true to its thresholds, and in N-MNIST's own files."""

import numpy as np
import pytest
import tonic.io
from sklearn.datasets import load_digits

from plif_jax.data import digits, frames
from plif_jax.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return digits.ensure(tmp_path_factory.mktemp("cache"))


def test_every_digit_is_recorded_in_n_mnists_layout(folder):
    labels = load_digits().target
    for digit in range(10):
        train, test = (list((folder / split / str(digit)).glob("*.bin")) for split in ("Train", "Test"))
        assert len(train) + len(test) == (labels == digit).sum()
        assert len(test) == len(train + test) // 5
        assert all(labels[int(file.stem) - 1] == digit for file in train + test)


def test_recordings_are_realistic_and_read_by_tonic(folder):
    dtype = np.dtype([("x", int), ("y", int), ("t", int), ("p", int)])
    for file in sorted(folder.glob("Train/*/*.bin"))[::100]:
        events = tonic.io.read_mnist_file(str(file), dtype)
        assert 1500 < len(events) < 6000
        assert (np.diff(events["t"]) >= 0).all()
        assert events["t"].min() >= 0 and 290_000 < events["t"].max() <= 300_000
        saccades = np.bincount(np.minimum(events["t"] // digits.SACCADE, 2))
        assert saccades.min() > len(events) / 6, "all three saccades are seen"


def test_the_same_image_gives_the_same_events_alone_or_in_company():
    images = load_digits().images[:3] / 16
    together = digits.record(images)
    for image, events in zip(images, together, strict=True):
        np.testing.assert_array_equal(digits.record(image[None])[0], events)


def test_on_and_off_events_cancel_on_the_way_back_to_the_start():
    """The path is closed, so every pixel ends within one threshold of where it began."""
    (events,) = digits.record(load_digits().images[5:6] / 16)
    net = frames.integrate(events, digits.SIZE, digits.SIZE, 1)[0].astype(int) @ [-1, 1]
    assert np.abs(net).max() <= 1
    assert len(events) > 1000


def test_ink_that_comes_is_on_and_ink_that_goes_is_off():
    """The second saccade moves right and up: at the right edge of a bar ink comes, at the left it goes."""
    bar = np.zeros((1, 8, 8))
    bar[0, :, 3:5] = 1
    (events,) = digits.record(bar)
    third = events[events["t"] >= 2 * digits.SACCADE]  # the last one moves left only
    on, off = third["x"][third["p"] == 1], third["x"][third["p"] == 0]
    assert len(on) > 100 and on.mean() < off.mean() - 3


def test_digits_stand_upright():
    """A bar at the top of the image gives events in the upper half of the frame, one at the left in the left half."""
    bars = np.zeros((2, 8, 8))
    bars[0, 1], bars[1, :, 1] = 1, 1
    top, left = digits.record(bars)
    assert np.median(top["y"].astype(int)) < 14
    assert np.median(left["x"].astype(int)) < 14


@pytest.mark.parametrize(
    "change, says", [({"t": [1 << 23]}, "t must lie"), ({"x": [256]}, "x must"), ({"y": [240]}, "y")]
)
def test_what_five_bytes_cannot_hold_is_refused(tmp_path, change, says):
    with pytest.raises(UserError, match=says):
        digits.write_recording(tmp_path / "1.bin", {"t": [0], "x": [0], "y": [0], "p": [0]} | change)


def test_a_coordinate_below_zero_is_no_byte(tmp_path):
    with pytest.raises(UserError, match=r"x must lie in 0\.\.255, not -1\.\.-1"):
        digits.write_recording(tmp_path / "1.bin", {"t": [0], "x": [-1], "y": [0], "p": [0]})
