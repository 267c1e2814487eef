"""The data set that needs no download: scikit-learn's digits, seen by a simulated event camera.

Each of the 1797 handwritten digits is shown to a 34 x 34 sensor that makes the three saccades of N-MNIST. The
recordings are written once, as N-MNIST's own files, so that everything after them is the path of real data.
"""

import itertools
from pathlib import Path

import numpy as np

from plif_jax.data import storage
from plif_jax.errors import UserError

SIZE = 34  # pixels, each side of the sensor
SACCADE = 100_000  # microseconds
CORNERS = np.array([[0.0, 0.0], [3.5, 7.0], [7.0, 0.0], [0.0, 0.0]]) - [3.5, 3.5]  # x, y: the path of N-MNIST, pixels
STEPS = 24  # simulated instants in a saccade; crossings between them are interpolated
MAGNIFICATION = 3.0  # sensor pixels for each of the 8 x 8 pixels of a digit
DARK = 0.15  # luminance of the paper, where ink is 1
THRESHOLD, MISMATCH = 0.4, 0.03  # contrast threshold in log luminance, and its spread over the pixels
TEST_EVERY = 5  # of each class, every fifth digit is for testing

RECORDING = np.dtype([("x", "u1"), ("y", "u1"), ("t", "i8"), ("p", "u1")])


def ensure(cache_dir):
    """Returns the folder of the recordings, `Train/<digit>/<number>.bin` and `Test/...`, written if it is not there."""
    return storage.made(Path(cache_dir) / "digits-1", _write_all)  # the number changes with the camera


def write_recording(path, events):
    """Writes events (fields x, y, t in microseconds, p) in N-MNIST's form of 5 bytes an event.

    Byte 0 holds x, byte 1 y, then one bit the polarity and 23 bits the time, high byte first.

    Raises:
      UserError: a coordinate or time that the form cannot hold.
    """
    t, x, y, p = (np.asarray(events[name]).astype(np.int64) for name in ("t", "x", "y", "p"))
    for name, column, limit in (("t", t, 1 << 23), ("x", x, 256), ("y", y, 240)):  # y = 240 marks a clock overflow
        if column.size and not (column.min() >= 0 and column.max() < limit):
            raise UserError(f"{path}: {name} must lie in 0..{limit - 1}, not {column.min()}..{column.max()}.")
    high = (p != 0) << 7 | t >> 16
    Path(path).write_bytes(np.stack([x, y, high, t >> 8 & 255, t & 255], axis=-1).astype(np.uint8).tobytes())


def _write_all(folder):
    """Records every digit and writes the recordings under `folder`."""
    from sklearn.datasets import load_digits  # which takes a second to import, and is needed once

    images_N88, labels_N = load_digits(return_X_y=True)
    images_N88 = images_N88.reshape(-1, 8, 8) / 16
    rank_in_class = np.zeros(len(labels_N), int)
    for digit in range(10):
        for split in ("Train", "Test"):
            (folder / split / str(digit)).mkdir(parents=True)
        rank_in_class[labels_N == digit] = np.arange((labels_N == digit).sum())
    for first in range(0, len(images_N88), 200):  # some at a time, to bound the memory
        for number, events in enumerate(record(images_N88[first : first + 200]), start=first):
            split = "Test" if rank_in_class[number] % TEST_EVERY == TEST_EVERY - 1 else "Train"
            write_recording(folder / split / str(labels_N[number]) / f"{number + 1:05d}.bin", events)


def record(images_N88):
    """Shows images [N, 8, 8] of ink in 0..1 to the camera; returns one structured array of events for each.

    A pixel's level is its log luminance in units of its threshold. It sends an event each time the level moves a whole
    unit up (p = 1) or down (p = 0) from the level of its last event: the model of ESIM (Rebecq et al., CoRL 2018).
    """
    level_scale = 1 / (THRESHOLD * (1 + MISMATCH * np.random.default_rng(0).standard_normal((SIZE, SIZE))))
    xy_K2, t_K = _path()
    events = []  # columns of (image, t, y, x, p)
    before = start = reached = None
    for (x, y), t_before, t in zip(xy_K2, np.append(0, t_K), t_K, strict=False):
        ink = _lens(y) @ images_N88 @ _lens(x).T
        level = np.log(DARK + (1 - DARK) * ink) * level_scale
        if before is None:
            before, start, reached = level, level, np.zeros(level.shape, np.int64)
        crossed = np.trunc(level - start - reached).astype(np.int64)
        n, row, column = np.nonzero(crossed)
        count = np.abs(crossed[n, row, column])
        sign = np.sign(crossed[n, row, column]).repeat(count)
        nth = np.arange(count.sum()) - (count.cumsum() - count).repeat(count) + 1
        n, row, column = (index.repeat(count) for index in (n, row, column))
        crossing = start[n, row, column] + reached[n, row, column] + sign * nth
        moved = level[n, row, column] - before[n, row, column]
        when = t_before + (t - t_before) * (crossing - before[n, row, column]) / moved
        events.append(np.stack([n, when.astype(np.int64), row, column, sign > 0]))
        before, reached = level, reached + crossed
    n, t, y, x, p = np.concatenate(events, axis=1)
    order = np.lexsort((t, n))
    recording = np.empty(len(order), RECORDING)
    for name, column in (("x", x), ("y", y), ("t", t), ("p", p)):
        recording[name] = column[order]
    return np.split(recording, np.searchsorted(n[order], np.arange(1, len(images_N88))))


def _path():
    """Returns where the camera looks, [K, 2] pixels, and when, [K] microseconds; saccades start and end slowly."""
    fraction = np.arange(1, STEPS + 1) / STEPS
    eased = (1 - np.cos(np.pi * fraction))[:, None] / 2
    legs = [a + (b - a) * eased for a, b in itertools.pairwise(CORNERS)]
    times = [SACCADE * (leg + fraction) for leg in range(len(legs))]
    return np.concatenate([CORNERS[:1], *legs]), np.concatenate([[0], *times])


def _lens(shift):
    """Returns the [SIZE, 8] weights with which a digit, moved by `shift` pixels, falls on the sensor."""
    place = (np.arange(SIZE) - (SIZE - 1) / 2 - shift) / MAGNIFICATION + 3.5
    distance = np.minimum(np.abs(place[:, None] - np.arange(8)), 1)
    return (1 + np.cos(np.pi * distance)) / 2
