"""A look at a data set before training: what is there, whole or not, and a picture of a few samples."""

import os
from pathlib import Path

import numpy as np

from plif_jax.catalog import DATASETS
from plif_jax.config import expanded
from plif_jax.curves import event_colors, figure
from plif_jax.data import downloads, event_cache, event_readers, events, image_files, images, recordings, storage
from plif_jax.data.dataset import check_labels, check_name, default_cache_dir
from plif_jax.errors import UserError
from plif_jax.files import write_figure

SAMPLES = 10  # shown, spread over the classes
SHOWN_FRAMES = 8  # of each event recording
NOT_FETCHED = (
    "{name} has not been fetched yet: its first use in training fetches it into {folder}; "
    "if you have it, give -data_root, the folder with your data sets."
)
QUARTER_TURNS = {"CIFAR10DVS": -1}  # its recordings lie on their side, and the paper's program leaves them so


def check(name: str, data_root: str | Path | None = None, cache_dir: str | Path | None = None) -> str:
    """Describes a data set and draws `<name>.png` in the working directory; returns the description.

    Event recordings are counted and a few are read; nothing is prepared and nothing large is fetched.

    Raises:
      UserError: an unknown name, no such data, or samples that cannot be read.
    """
    check_name(name)
    cache_dir = expanded(cache_dir or default_cache_dir())
    lines, rows, labels, title = (_events if DATASETS[name].events else _images)(name, data_root, cache_dir)
    check_labels(name, labels)
    with storage.writing(Path(f"{name}.png").resolve(), "Run it in a folder of yours that has space."):
        _draw(rows, [DATASETS[name].class_names[label] for label in labels], title, f"{name}.png")
    return "\n".join([*lines, f"a few samples: {Path(f'{name}.png').resolve()}"])


def _events(name, data_root, cache_dir):
    """Describes recordings, and integrates a few into rows of frames [H, T W, 3]."""
    if data_root is None and name != "Digits":
        data_root = cache_dir / "downloads" / name
        if name not in downloads.ARCHIVES:
            raise UserError(downloads.BY_HAND[name])
        with storage.reading(data_root):
            fetched = data_root.is_dir()
        if not fetched:
            recut = " (tonic's cut of it, 1077 + 264)" if name == "DVS128Gesture" else ""
            raise UserError(NOT_FETCHED.format(name=name + recut, folder=data_root))
    find = events.locate if name == "Digits" else recordings.find  # written where they are missing
    found = find(name, data_root, cache_dir)
    if found is None:
        raise UserError(f"no recordings of {name} are in {data_root}; looked for {recordings.LAYOUTS[name]}.")
    files = {recording.path for recording in found.train + found.test}
    lines = _summary(name, len(found.train), len(found.test), found.expected)
    with storage.reading(found.folder):
        size = sum(map(os.path.getsize, files))
    lines.append(f"{len(files)} files, {size / 1e6:.1f} MB, in {found.folder}")
    chosen = _spread(found.train or found.test)
    event_readers.read_once.cache_clear()  # a file may have been written anew since an earlier look
    rows = []
    for recording in chosen:
        counts_THWC = event_cache.integrate(recording, DATASETS[name].shape[:2], SHOWN_FRAMES)
        shown = np.rot90(counts_THWC, QUARTER_TURNS.get(name, 0), axes=(1, 2))
        rows.append(np.concatenate(list(event_colors(shown)), axis=1))
    turned = ", shown a quarter turn clockwise" if name in QUARTER_TURNS else ""
    return (
        lines,
        rows,
        [r.label for r in chosen],
        f"{name}: ON events orange, OFF blue, both black, time to the right{turned}",
    )


def _images(name, data_root, cache_dir):
    """Describes images, and lays out a row of each of a few classes."""
    if data_root is None and not images.is_prepared(name, cache_dir):
        raise UserError(NOT_FETCHED.format(name=name, folder=cache_dir))
    if data_root is not None and not images.find(name, data_root)[1]:
        files = ", ".join(image_files.official_names(name))
        raise UserError(f"no official files of {name} are in {data_root}; they are called {files}.")
    dataset = images.load(name, data_root, cache_dir)
    train, test = dataset.train, dataset.test
    lines = _summary(name, train.found, test.found, (train.expected, test.expected))
    lines.append(f"{(train.x.nbytes + test.x.nbytes) / 1e6:.1f} MB of pixels, from {dataset.source}")
    split = train if train.found else test
    labels = sorted(set(split.y.tolist()))[:SAMPLES]
    rows = []
    for label in labels:
        ours = split.x[np.flatnonzero(split.y == label)[:SHOWN_FRAMES]]
        blank = np.zeros((SHOWN_FRAMES - len(ours), *ours.shape[1:]), ours.dtype)
        row = np.concatenate([*ours, *blank], axis=1) / 255
        rows.append(np.broadcast_to(row, (*row.shape[:2], 3)))
    return lines, rows, labels, name


def _summary(name, train, test, expected):
    """Says how much of the set there is."""
    whole = "whole" if (train, test) == expected else "in part"
    return [f"{name}: {train} of {expected[0]} for training, {test} of {expected[1]} for testing: {whole}"]


def _spread(ours):
    """Chooses samples of as many classes as there are."""
    by_label = {}
    for recording in ours:
        by_label.setdefault(recording.label, recording)
    labels = sorted(by_label)
    return [by_label[labels[i]] for i in np.unique(np.linspace(0, len(labels) - 1, SAMPLES).astype(int))]


def _draw(rows, labels, title, path):
    """Draws labelled rows of pictures under each other."""
    height, width = rows[0].shape[:2]
    fig, columns = figure(len(rows), width=10, height=10 * len(rows) * height / width + 0.6, squeeze=False)
    for row, label, axes in zip(rows, labels, columns[:, 0], strict=True):
        axes.imshow(row, interpolation="nearest", aspect="equal")
        axes.set_xticks(np.arange(0, width + 1, width // SHOWN_FRAMES) - 0.5, [])
        axes.set_yticks([])
        axes.grid(axis="x", color="0.8")
        axes.set_ylabel(label, rotation=0, ha="right", va="center")
    fig.suptitle(title)
    fig.draw_without_rendering()  # with axes of a fixed shape the layout needs a second time to leave room for labels
    write_figure(fig, path, dpi=max(100, 12 * rows[0].shape[1] // 100))
