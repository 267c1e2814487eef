"""The event data sets as frames: found or fetched, integrated once, and mapped into memory."""

from pathlib import Path

import numpy as np

from plif_jax.catalog import DATASETS
from plif_jax.config import expanded
from plif_jax.data import digits, downloads, event_cache, frames, recordings
from plif_jax.data.dataset import Dataset, Split, check_name, default_cache_dir, existing
from plif_jax.errors import UserError


def load(
    name: str,
    data_root: str | Path | None = None,
    cache_dir: str | Path | None = None,
    *,
    T: int,
    split_by: str = "number",
    normalization: str | None = None,
    cifar10dvs_split: str = "paper",
    progress: bool = True,
    to_train: bool = True,
) -> Dataset:
    """Loads an event data set as frames.

    Recordings under `data_root` are read where they lie, and nothing is written there; without any, they are fetched.
    Frames are prepared once for each setting and kept under `cache_dir`.

    Args:
      name: NMNIST, CIFAR10DVS, DVS128Gesture, ASLDVS, or Digits, which needs no files.
      data_root: where the user keeps data sets, or None.
      cache_dir: for downloads and frames; `default_cache_dir()` if None.
      T, split_by, normalization: as `frames.integrate` has them.
      cifar10dvs_split: "paper" or "tebn", as `recordings.split_cifar10dvs` has them.
      progress: whether to show what is being done.
      to_train: whether both splits are needed.

    Returns:
      The set, with `x` [N, T, H, W, 2] and `y` [N] int32 in each split, in order of label and number; N is 0 in a
      split that is missing.

    Raises:
      UserError: another name, a wrong setting, recordings that are missing or damaged, or a cache that cannot be
        written.
    """
    check_name(name, [known for known, facts in DATASETS.items() if facts.events])
    frames.check_settings(T, split_by, normalization)
    cache_dir = expanded(cache_dir or default_cache_dir())
    found = locate(name, data_root, cache_dir, cifar10dvs_split)
    splits = {"train": found.train, "test": found.test}
    for split, ours in splits.items():
        if to_train and not ours:
            raise UserError(f"{found.folder} holds no {split} recordings of {name}: training needs some of either.")
    sensor = DATASETS[name].shape[:2]
    x, folder = event_cache.prepare(
        name,
        {split: ours for split, ours in splits.items() if ours},
        sensor,
        cache_dir,
        T=T,
        split_by=split_by,
        normalization=normalization,
        progress=progress,
    )
    nothing = np.zeros((0, T, *sensor, 2), np.uint8)
    train, test = (
        Split(x.get(split, nothing), np.array([r.label for r in ours], np.int32), expected)
        for (split, ours), expected in zip(splits.items(), found.expected, strict=True)
    )
    return Dataset(name, train, test, source=f"{found.folder} (frames in {folder})")


def locate(name, data_root, cache_dir, cifar10dvs_split="paper") -> recordings.Found:
    """Finds the recordings of an event data set under `data_root`, or fetches them into `cache_dir`.

    Raises:
      UserError: they are not there and cannot be fetched, or one is damaged.
    """
    if name == "Digits":  # which needs no files
        if data_root is not None:
            existing(data_root)
        return recordings.find(name, digits.ensure(cache_dir), cache_dir)
    if data_root is not None:
        found = recordings.find(name, data_root, cache_dir, cifar10dvs_split)
        if found:
            return found
        print(f"{name}: no recordings of it are in {data_root}; looked for {recordings.LAYOUTS[name]}")
    folder = downloads.fetch(name, cache_dir)
    found = recordings.find(name, folder, cache_dir, cifar10dvs_split)
    if found is None:
        raise UserError(f"the archives in {folder} hold no recordings of {name}: remove them, to have them fetched")
    return found
