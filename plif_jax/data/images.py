"""MNIST, Fashion-MNIST and CIFAR-10 as arrays: from the user's own files where there are any, else from tfds."""

from pathlib import Path

from plif_jax.catalog import DATASETS
from plif_jax.config import expanded
from plif_jax.data import image_files, storage
from plif_jax.data.dataset import Dataset, Split, check_name, default_cache_dir, existing, folders


def load(
    name: str, data_root: str | Path | None = None, cache_dir: str | Path | None = None, *, progress: bool = True
) -> Dataset:
    """Loads one of the three image sets into memory.

    Official files under `data_root` are read where they lie, and nothing is written there: reading them takes a second,
    so record files of them would only be a copy. Where there are none, the set is downloaded, checked and prepared once
    through tensorflow-datasets (`tfds_builders`). Both ways give the same arrays in the same order.

    Under `data_root` the files may lie in the folder itself or below it in folders called as the set is, in any case
    and with or without punctuation: `MNIST/MNIST/raw`, `fashion_mnist`, `CIFAR10/cifar-10-batches-py`. The first folder
    with an official file is taken, and what it lacks is lacking: see `Split.found`.

    Args:
      name: MNIST, FashionMNIST or CIFAR10.
      data_root: where the user keeps data sets, or None.
      cache_dir: for downloads and record files; `default_cache_dir()` if None.
      progress: whether to show progress bars in a first preparation.

    Returns:
      The set, with `x` `[N, H, W, C]` uint8 and `y` `[N]` int32 in each split.

    Raises:
      UserError: if `name` is another, `data_root` is no folder, a file is damaged, or the set cannot be downloaded
        or prepared.
    """
    check_name(name, [known for known, facts in DATASETS.items() if not facts.events])
    folder, files = find(name, data_root) if data_root is not None else (None, {})
    if files:
        splits = image_files.read(name, files)
    else:
        if data_root is not None:
            print(f"{name}: none of its official files are in {data_root}")
        from plif_jax.data import tfds_builders  # half a second to import, and seldom needed

        splits, folder = tfds_builders.load(name, expanded(cache_dir or default_cache_dir()), progress=progress)
    train, test = (
        Split(*splits[split], expected=whole)
        for split, whole in zip(("train", "test"), DATASETS[name].samples, strict=True)
    )
    return Dataset(name, train, test, source=str(folder))


def is_prepared(name: str, cache_dir: Path) -> bool:
    """Whether a set's record files are there, so that nothing need be downloaded."""
    from plif_jax.data import tfds_builders

    return tfds_builders.find(name, cache_dir).data_path.exists()


def find(name: str, root: str | Path) -> tuple[Path | None, dict[str, Path]]:
    """The first folder under root with official files of the set, and those files by name."""
    root = existing(root)
    telling = {name.lower(), "raw", "cifar10batchesbin", "cifar10batchespy"}
    for folder in folders(root, telling):
        with storage.reading(folder):
            files = {file: folder / file for file in image_files.official_names(name) if (folder / file).is_file()}
        if files:
            return folder, files
    return None, {}
