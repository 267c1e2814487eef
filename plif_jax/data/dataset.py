"""What every loader returns, two splits as arrays and where they come from; and where loaders look."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plif_jax.catalog import DATASETS
from plif_jax.config import expanded
from plif_jax.data import storage
from plif_jax.errors import UserError, nearest


@dataclass(frozen=True)
class Split:
    """One split of a data set, whole or in part.

    `x` holds images [N, H, W, C] uint8, or event frames [N, T, H, W, 2]: a memory map of the smallest unsigned integer
    type that holds the counts, float32 where they were normalised. `y` holds labels [N] int32. `found` of `expected`
    samples were there; a part of a data set is used as it is.
    """

    x: np.ndarray
    y: np.ndarray
    expected: int

    @property
    def found(self) -> int:
        """How many samples there are."""
        return len(self.y)


@dataclass(frozen=True)
class Dataset:
    """A data set as the training loop takes it; `source` says for people where it lies."""

    name: str
    train: Split
    test: Split
    source: str


def check_name(name: str, allowed: Iterable[str] = DATASETS):
    """Raises UserError unless `name` is a data set among `allowed`."""
    if name not in allowed:
        near = nearest(str(name), allowed)
        meant = f" Did you mean {near}?" if near else ""
        raise UserError(f"there is no data set {name!r}; allowed are {', '.join(allowed)}.{meant}")


def default_cache_dir() -> Path:
    """Returns the folder for downloads and prepared arrays: `$PLIF_JAX_CACHE`, or `~/.cache/plif_jax`.

    Raises:
      UserError: no home folder is known.
    """
    if named := os.environ.get("PLIF_JAX_CACHE"):
        return expanded(named)
    try:
        return Path.home() / ".cache/plif_jax"
    except RuntimeError:
        raise UserError("no home folder is known: give a folder for data with -cache_dir or PLIF_JAX_CACHE.") from None


def existing(data_root: str | Path) -> Path:
    """The folder with data sets that a user names; UserError if it is none."""
    root = expanded(data_root)
    with storage.reading(root):
        there = root.is_dir()
    if not there:
        raise UserError(f"data_root {root} is not a folder: give the folder that holds the data sets, or leave it out")
    return root


def check_labels(name: str, y):
    """Raises a UserError where a sample of a set is of none of its classes: it would train and never be counted."""
    classes, y = DATASETS[name].classes, np.asarray(y)
    wrong = y[(y < 0) | (y >= classes)]
    if wrong.size:
        raise UserError(f"{name} has a sample with label {wrong[0]}; its {classes} classes are 0 to {classes - 1}")


def folders(root: Path, telling: set[str], depth: int = 3) -> Iterator[Path]:
    """The folders under root that may hold a set: those whose names are `telling`, deepest first, then root itself.

    Names are compared without case and punctuation; what lies unpacked comes before a "download" of the same.
    """
    telling = {_plain(name) for name in telling}
    with storage.reading(root):
        children = sorted(root.iterdir(), key=lambda child: (child.name == "download", child.name)) if depth else ()
        likely = [c for c in children if _plain(c.name) in telling and c.is_dir()]
    for child in likely:
        yield from folders(child, telling, depth - 1)
    yield root


def _plain(name):
    return re.sub("[^a-z0-9]", "", name.lower())
