"""Which samples make a batch, and how they reach the devices.

A batch is a pure function of (seed, epoch, step): no iterator has a state that a checkpoint would have to hold. The
same indices address a data set in device memory or in a memory map on disk, so both give the same batches.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from plif_jax.data.dataset import Dataset, Split, check_labels
from plif_jax.errors import UserError


@dataclass(frozen=True)
class Samples:
    """Some of a split's samples: those at `index` [n]."""

    split: Split
    index: np.ndarray

    def __len__(self):
        return len(self.index)


def spread(y, n):
    """Indices of the first samples of every class, n together, as equal in number as the classes allow."""
    rank = np.empty(len(y), np.int64)  # how many of its class come before a sample
    for label in np.unique(y):
        of_class = np.flatnonzero(y == label)
        rank[of_class] = np.arange(len(of_class))
    return np.sort(np.argsort(rank, kind="stable")[:n])


def split_per_class(y, index, val_ratio):
    """Accuracy-B's two parts of `index`: of each class the first ceil((1 - val_ratio) n) train, the rest validate."""
    train, val = [], []
    for label in np.unique(y[index]):
        of_class = index[y[index] == label]
        cut = math.ceil(len(of_class) * (1 - val_ratio))
        train.append(of_class[:cut])
        val.append(of_class[cut:])
    return np.concatenate(train), np.concatenate(val)


def partition(config, dataset: Dataset) -> dict[str, Samples]:
    """The samples of each part of a run: "train", "test", and with `val_ratio` "val".

    Raises:
      UserError: a part is empty, a label no class, or there are fewer training samples than a batch holds.
    """
    check_labels(config.dataset_name, dataset.train.y)
    train = spread(dataset.train.y, config.train_samples)
    parts = {"train": Samples(dataset.train, train), "test": test_part(config, dataset)}
    _refuse_empty(dataset, "train", parts["train"], "more train samples")
    if config.val_ratio is not None:
        train, val = (
            Samples(dataset.train, index) for index in split_per_class(dataset.train.y, train, config.val_ratio)
        )
        # enough of each class to leave one for validation
        enough = config.facts.classes * math.ceil(1 / config.val_ratio)
        more = f"-train_samples {enough} or more, or " if enough <= dataset.train.found else ""
        _refuse_empty(dataset, "val", val, f"{more}a larger -val_ratio")
        parts |= {"train": train, "val": val}
    if len(parts["train"]) < config.batch_size:
        n = len(parts["train"])
        raise UserError(f"{n} training samples make no batch of -batch_size {config.batch_size}; give {n} or less")
    return parts


def test_part(config, dataset: Dataset) -> Samples:
    """The samples that a run tests on; for training there need not be any.

    Raises:
      UserError: there are none, or a label is no class.
    """
    check_labels(config.dataset_name, dataset.test.y)
    part = Samples(dataset.test, spread(dataset.test.y, config.test_samples))
    _refuse_empty(dataset, "test", part, "more test samples")
    return part


def _refuse_empty(dataset, name, part, more):
    if len(part) == 0:
        raise UserError(f"{dataset.name} has no sample for {name}: give {more}; the data are {dataset.source}")


def training_batches(seed: int, epoch: int, part: Samples, batch_size: int) -> np.ndarray:
    """Sample indices [steps, B] of an epoch: all samples shuffled, the last partial batch dropped."""
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(part.index)
    steps = len(order) // batch_size
    return order[: steps * batch_size].reshape(steps, batch_size)


def evaluation_batches(part: Samples, batch_size: int) -> np.ndarray:
    """Sample indices [steps, B] that show every sample once; -1 pads the last batch."""
    steps = -(-len(part) // batch_size)
    padded = np.full(steps * batch_size, -1, part.index.dtype)
    padded[: len(part)] = part.index
    return padded.reshape(steps, batch_size)


def digest(part: Samples) -> dict:
    """What tells a part from another: its number of samples, and a checksum of labels and of 64 to 127 samples."""
    some = part.index[:: max(1, len(part) // 64)]
    checksum = hashlib.sha256(part.split.y[part.index].tobytes())
    for x in part.split.x[some]:
        checksum.update(str((x.dtype, x.shape)).encode() + x.tobytes())
    return {"samples": len(part), "sha256": checksum.hexdigest()}


def replicated(devices) -> NamedSharding:
    """Placement of an array whole on each of the devices."""
    return NamedSharding(Mesh(np.array(devices), ("batch",)), PartitionSpec())


class Feed:
    """Brings batches to the devices: indices into a split that lies there, or the samples themselves.

    `axis` is the mapped axis of x and y for `jax.pmap`: None when the split lies on every device, 0 when each device
    is sent its share.
    """

    def __init__(self, split: Split, devices, on_device: str = "auto"):
        self.split, self.devices = split, devices
        self.local = [i for i, device in enumerate(devices) if device.process_index == jax.process_index()]
        resident = _fits(split, devices[self.local[0]]) if on_device == "auto" else on_device == "yes"
        self.axis = None if resident else 0
        if resident:
            self.x, self.y = (_place(array, replicated(devices)) for array in (split.x, split.y))

    def take(self, index_KB: np.ndarray):
        """The arguments x, y, index of K steps; index is [local devices, K, B / devices], -1 where padded."""
        index = index_KB.reshape(len(index_KB), len(self.devices), -1).transpose(1, 0, 2)[self.local]  # [L, K, b]
        if self.axis is None:
            return self.x, self.y, index.astype(np.int32)
        flat = np.maximum(index, 0).reshape(len(index), -1)
        here = np.where(index < 0, -1, np.arange(flat.shape[1]).reshape(index.shape[1:]))
        return self.split.x[flat], self.split.y[flat], here.astype(np.int32)

    def chunks(self, index_SB: np.ndarray, sizes) -> Iterator:
        """`take` for consecutive chunks of `sizes` steps, the next one read while the last one is in use."""
        ends = np.cumsum([0, *sizes])
        with ThreadPoolExecutor(1) as reader:
            coming = None
            for start, end in itertools.pairwise(ends):
                following = reader.submit(self.take, index_SB[start:end])
                if coming is not None:
                    yield coming.result()
                coming = following
            if coming is not None:
                yield coming.result()


def _fits(split, device):
    """Whether a split takes at most a quarter of the device's memory; on a CPU, where a map is as good, 1 GiB.

    Several processes read from disk, each its share only.
    """
    if jax.process_count() > 1:
        return False
    stats = device.memory_stats() or {}
    return split.x.nbytes <= stats.get("bytes_limit", 4 << 30) / 4


def _place(array, sharding):
    return jax.make_array_from_callback(array.shape, sharding, lambda where: np.asarray(array[where]))
