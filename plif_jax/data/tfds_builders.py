"""MNIST, Fashion-MNIST and CIFAR-10 as tensorflow-datasets builders that need no TensorFlow.

tfds' own builders of these sets prepare them with TensorFlow. This one takes from tfds what does without: the download
manager with its checksums, the record files (ArrayRecord) and the data source that reads them.
"""

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import requests
import tensorflow_datasets as tfds
from google.protobuf.json_format import ParseError
from tensorflow_datasets.core.download import checksums, download_manager, downloader, util

from plif_jax.catalog import DATASETS
from plif_jax.data import image_files, storage
from plif_jax.errors import UserError, first_line

_MNIST = {
    "train-images-idx3-ubyte.gz": (9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
    "train-labels-idx1-ubyte.gz": (28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
    "t10k-images-idx3-ubyte.gz": (1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
    "t10k-labels-idx1-ubyte.gz": (4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
}
_FASHION_MNIST = {
    "train-images-idx3-ubyte.gz": (26421880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
    "train-labels-idx1-ubyte.gz": (29515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
    "t10k-images-idx3-ubyte.gz": (4422102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
    "t10k-labels-idx1-ubyte.gz": (5148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
}
_CIFAR10 = {"cifar-10-binary.tar.gz": (170052171, "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd")}
SOURCES = {
    "MNIST": ("https://ossci-datasets.s3.amazonaws.com/mnist/", _MNIST),
    "FashionMNIST": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", _FASHION_MNIST),
    "CIFAR10": ("https://www.cs.toronto.edu/~kriz/", _CIFAR10),
}
"""Where each set is published, and each of its files with its length in bytes and SHA-256."""


def load(name: str, cache_dir: Path, *, progress: bool = True) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], Path]:
    """Reads a set from its record files, which the first call downloads and prepares.

    Downloads are checked against their SHA-256 and kept, so an interrupted preparation continues with what it has; the
    record files appear all at once or not at all. Of several programs that want the same set one prepares it.

    Args:
      name: MNIST, FashionMNIST or CIFAR10.
      cache_dir: everything is written below `cache_dir / "tensorflow_datasets"`.
      progress: whether to show progress bars while downloading and preparing.

    Returns:
      For "train" and "test" the images `[N, H, W, C]` uint8 and labels `[N]` int32, in the order of the official
      files; and the folder of the record files.

    Raises:
      UserError: if a download fails or is not the official file, if the folder cannot be written or is full, or if
        the record files are damaged.
    """
    builder = find(name, cache_dir)
    if not builder.data_path.exists():
        builder = _prepare(name, cache_dir, progress)
    folder = Path(builder.data_path)
    return {split: _read(builder, split, folder) for split in ("train", "test")}, folder


def find(name: str, cache_dir: Path) -> "Images":
    """The builder of a set; its `data_path` exists where the set is prepared.

    Raises:
      UserError: it has no address, or what describes its record files is damaged.
    """
    if name not in SOURCES:
        raise UserError(f"{name} has no address to be fetched from: give -data_root, the folder with its files")
    home = _home(cache_dir)
    try:
        return Images(config=name, data_dir=home)
    except (ValueError, ParseError) as error:
        raise UserError(f"{home}/images/{name} is damaged: delete that folder and run again") from error


def _home(cache_dir):
    return cache_dir.absolute() / "tensorflow_datasets"


def _prepare(name: str, cache_dir: Path, progress: bool) -> "Images":
    """Downloads a set and writes its record files, unless another program has just done it."""
    home = _home(cache_dir)
    with storage.locked(home / f"{name}.lock"), storage.writing(home):
        builder = find(name, cache_dir)
        if not builder.data_path.exists():
            downloads = home / "downloads" / name
            for leftover in (*Path(builder.data_path).parent.glob("incomplete.*"), *downloads.glob("**/*.tmp.*")):
                shutil.rmtree(leftover)  # of a program that was killed: we hold the lock, so nobody is writing there
            size = sum(size for size, _ in SOURCES[name][1].values())
            print(f"{name}: downloading {_mebibytes(size)} from {SOURCES[name][0]} to {downloads}")
            _download_and_prepare(builder, downloads, progress)
            size = sum(file.stat().st_size for file in Path(builder.data_path).iterdir())
            print(f"{name}: {_mebibytes(size)} of record files are in {builder.data_path}")
    return builder


def _download_and_prepare(builder: "Images", downloads: Path, progress: bool) -> None:
    """tfds' `download_and_prepare`, with errors that say what to do."""
    name = builder.builder_config.name
    address, files = SOURCES[name]
    by_hand = f"put {', '.join(files)} from {address} into a folder of your own and give it as data_root"
    try:
        with _tfds_settings(progress):
            builder.download_and_prepare(
                download_dir=downloads,
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
                file_format="array_record",
            )
    except (requests.RequestException, util.DownloadError) as error:
        why = "no connection" if isinstance(error, requests.ConnectionError) else error
        raise UserError(f"{name} cannot be downloaded ({why}): try again, or {by_hand}") from error
    except download_manager.NonMatchingChecksumError as error:
        what = first_line(error).rstrip(":")
        raise UserError(f"{what}: it is not used; try again, or {by_hand}") from error
    except (OSError, RuntimeError) as error:  # tfds and ArrayRecord pass a full disk on in words, without its number
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


@contextlib.contextmanager
def _tfds_settings(progress: bool) -> Iterator[None]:
    """Progress bars as asked, and few and silent retries: tfds' ten keep a machine without a network for minutes."""
    retries, urllib3 = downloader.MAX_RETRIES, logging.getLogger("urllib3")
    level = urllib3.level
    tfds.display_progress_bar(progress)
    downloader.MAX_RETRIES = 3
    urllib3.setLevel(logging.ERROR)
    try:
        yield
    finally:
        tfds.display_progress_bar(True)
        downloader.MAX_RETRIES = retries
        urllib3.setLevel(level)


def _read(builder: "Images", split: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """All samples of one split as arrays."""
    try:
        source = builder.as_data_source(split)
        samples = source.__getitems__(list(range(len(source))))
    except (RuntimeError, ValueError) as error:  # ArrayRecord and tfds, of a missing, short or altered file
        raise UserError(f"the record files in {folder} are damaged: delete that folder and run again") from error
    x_NHWC = np.stack([sample["image"] for sample in samples])
    return x_NHWC, np.array([sample["label"] for sample in samples], np.int32)


def _mebibytes(size: int) -> str:
    """A size for people."""
    return f"{size / 2**20:.0f} MiB"


class _Info(tfds.core.DatasetInfo):
    def initialize_from_bucket(self):
        """Nothing: tfds' bucket knows none of these builders, and each look leaves an empty temporary folder."""


class Images(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """One of the three image sets, chosen by `config`; samples keep the order of the official files."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name=name) for name in SOURCES]

    @property
    def url_infos(self):
        """What tfds holds each download against."""
        address, files = SOURCES[self.builder_config.name]
        return {
            address + file: checksums.UrlInfo(size=tfds.core.utils.Size(size), checksum=sha256, filename=file)
            for file, (size, sha256) in files.items()
        }

    def _info(self):
        facts = DATASETS[self.builder_config.name]
        features = {
            "image": tfds.features.Tensor(shape=facts.shape, dtype=np.uint8, encoding="bytes"),
            "label": tfds.features.ClassLabel(num_classes=facts.classes),
        }
        # The paper's validation split takes the first samples of each class, so their order is part of the data.
        return _Info(builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True)

    def _split_generators(self, dl_manager):
        address, files = SOURCES[self.builder_config.name]
        paths = dl_manager.download({file: address + file for file in files})
        splits = image_files.read(self.builder_config.name, {file: Path(path) for file, path in paths.items()})
        return {split: self._generate_examples(x, y) for split, (x, y) in splits.items()}

    def _generate_examples(self, x, y):
        for i in range(len(x)):
            yield i, {"image": x[i], "label": y[i]}
