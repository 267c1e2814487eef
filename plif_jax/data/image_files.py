"""The official files of MNIST, Fashion-MNIST and CIFAR-10, read as their authors wrote them.

MNIST and Fashion-MNIST are idx files, gzipped or not: a magic number, the sizes as big-endian 32-bit integers, then the
bytes. CIFAR-10 comes as binary batches (a label byte, then the planes R, G, B of 32 x 32), as Python pickles of the
same, or as a tar archive of either. No file is trusted: no size is allocated because a header says so, and nothing is
unpickled that is not, byte for byte, the official file.

References: http://yann.lecun.com/exdb/mnist/, https://github.com/zalandoresearch/fashion-mnist,
https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import contextlib
import gzip
import hashlib
import io
import math
import pickle
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np

from plif_jax.catalog import DATASETS
from plif_jax.errors import UserError

_IDX_STEMS = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
# MNIST and Fashion-MNIST share their file names; the md5 of the labels tells them apart.
_LABELS_MD5 = {
    "e86ee40d66677c011a9abda399ec8c4d": "MNIST",
    "073c3904dfbd3e141ff8aa01cfde6b15": "MNIST",
    "3236f6424fc25388b2834cb19942cf7e": "FashionMNIST",
    "8dea97a4e78c1bd1b5a6e8efbb870b6e": "FashionMNIST",
}

_BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
_PYTHON_BATCH_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
_ARCHIVES = ("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz")
_RECORD_BYTES, _BATCH_RECORDS = 1 + 3 * 32 * 32, 10_000
_LARGEST_BATCH = 32 << 20  # bytes; the largest official batch has 31 035 704
_LARGEST_MEMBER = 1 << 40
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)
_WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)

_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError)  # how a truncated or altered archive shows


def official_names(name: str) -> tuple[str, ...]:
    """Names every official file of the set `name`, in the order in which they are preferred."""
    if name == "CIFAR10":
        batches = [batch for split in _BATCHES.values() for batch in split]
        return (*(batch + ".bin" for batch in batches), *batches, *_ARCHIVES)
    return tuple(stem + end for stems in _IDX_STEMS.values() for stem in stems for end in ("", ".gz"))


def read(name: str, files: dict[str, Path]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads what there is of a set.

    Args:
      name: MNIST, FashionMNIST or CIFAR10.
      files: paths by official file name, some of `official_names(name)`; the paths may be called otherwise.

    Returns:
      For "train" and "test" the images `[N, H, W, C]` uint8 and labels `[N]` int32, in the files' order; N is zero
      where a split has no file.

    Raises:
      UserError: if a file is damaged, is not what its name says, or lacks its partner; the message names it.
    """
    if name == "CIFAR10":
        return _read_cifar10(files)
    return {split: _read_idx_split(name, files, split) for split in _IDX_STEMS}


def _read_idx_split(name: str, files: dict[str, Path], split: str) -> tuple[np.ndarray, np.ndarray]:
    """The images and labels of one split of MNIST or Fashion-MNIST."""
    shape = DATASETS[name].shape
    there = {stem: files.get(stem) or files.get(stem + ".gz") for stem in _IDX_STEMS[split]}
    if not any(there.values()):
        return np.zeros((0, *shape), np.uint8), np.zeros(0, np.int32)
    for stem, path in there.items():
        if path is None:
            partner = next(filter(None, there.values()))
            raise UserError(f"{partner} is of no use without {stem} or {stem}.gz: put that file beside it")
    images, labels = there.values()
    whole = dict(zip(("train", "test"), DATASETS[name].samples, strict=True))[split]
    x = _read_idx(images, shape[:2], whole)[..., None]
    y = _read_idx(labels, (), whole)
    if len(x) != len(y):
        raise UserError(f"{labels} has {len(y)} labels for the {len(x)} images of {images}: get both files again")
    owner = _LABELS_MD5.get(hashlib.md5(y).hexdigest(), name)
    if owner != name:
        raise UserError(f"{labels} belongs to {owner}, not to {name}: give {name}'s folder as data_root")
    return x, _checked_labels(y, labels, DATASETS[name].classes)


def _read_idx(path: Path, shape: tuple[int, ...], most: int) -> np.ndarray:
    """The array `[N, *shape]` of an idx file of bytes, N at most `most`."""
    try:
        with _opened(path) as file:
            sizes = file.read(8 + 4 * len(shape))
            if len(sizes) < 8 + 4 * len(shape):
                raise EOFError("the header is not whole")
            magic, count, *item = struct.unpack(f">{2 + len(shape)}I", sizes)
            if magic != 0x0801 + len(shape):
                raise UserError(f"{path} is no idx file of images or labels (magic number {magic:#x}): get it again")
            if tuple(item) != shape or not 0 < count <= most:
                raise UserError(f"{path} claims the shape {[count, *item]}: expected {[most, *shape]}, or fewer items")
            length = count * math.prod(shape)
            data = file.read(length + 1)
    except _DAMAGE as error:
        raise UserError(f"{path} is truncated or damaged ({error}): get it again") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) != length:
        raise UserError(f"{path} holds {'more' if len(data) > length else 'less'} than its header says: get it again")
    return np.frombuffer(data, np.uint8).reshape(-1, *shape)


def _opened(path: Path):
    """The file's bytes as a stream, inflated if it is gzipped."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if zipped else path.open("rb")


def _read_cifar10(files: dict[str, Path]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Both splits of CIFAR-10, from loose batches if there are any, else from an archive."""
    archive = next((files[archive] for archive in _ARCHIVES if archive in files), None)
    try:
        batches = _read_loose(files) or (_read_archive(archive) if archive else {})
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error
    splits = {}
    for split, names in _BATCHES.items():
        x, y = [np.zeros((0, 32, 32, 3), np.uint8)], [np.zeros(0, np.int32)]
        for batch in filter(batches.__contains__, names):
            x.append(batches[batch][0])
            y.append(batches[batch][1])
        splits[split] = (np.concatenate(x), np.concatenate(y))
    return splits


def _read_loose(files: dict[str, Path]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The loose batches by name, binary where there is a choice."""
    batches = {}
    for file in official_names("CIFAR10"):
        batch = file.removesuffix(".bin")
        if file in files and file not in _ARCHIVES and batch not in batches:
            batches[batch] = _read_batch(file, files[file].read_bytes(), files[file])
    return batches


def _members(archive):
    """(header, size) of each member of a tar archive that is being read, which stands at the member's bytes then."""
    with contextlib.suppress(tarfile.EOFHeaderError):  # raised at the archive's end
        while True:
            member = tarfile.TarInfo.frombuf(archive.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
            size = 0 if member.type in _WITHOUT_DATA else member.size
            if not 0 <= size <= _LARGEST_MEMBER:
                raise tarfile.ReadError(f"a member claims {size} bytes")
            end = archive.tell() + size + -size % tarfile.BLOCKSIZE
            yield member, size
            archive.seek(end)


def _read_archive(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The batches of a tar archive by name. Nothing is extracted, so no member can write anywhere.

    `tarfile` parses single headers and no more: by itself it keeps all of them, and reads a long name or a pax header
    whole, whatever size it claims. No official archive holds these, and here they are skipped as other members are.
    """
    wanted, batches = official_names("CIFAR10"), {}
    try:
        with _opened(path) as archive:
            for member, size in _members(archive):
                file = Path(member.name).name
                if file in wanted and member.type in _REGULAR and size <= _LARGEST_BATCH:
                    data = archive.read(size)
                    if len(data) < size:
                        raise EOFError(f"it ends inside {file}")
                    batches[file.removesuffix(".bin")] = _read_batch(file, data, path / file)
            while archive.read(1 << 20):
                pass  # the checksum of what is compressed comes last
    except _DAMAGE as error:
        raise UserError(f"{path} is truncated or damaged ({error}): get it again") from error
    if not batches:
        raise UserError(f"{path} holds no batch of CIFAR-10: get it again")
    return batches


def _read_batch(file: str, data: bytes, where: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images `[N, 32, 32, 3]` and labels `[N]` of one batch of CIFAR-10, binary or pickled by its official name."""
    if file.endswith(".bin"):
        if not data or len(data) % _RECORD_BYTES or len(data) > _RECORD_BYTES * _BATCH_RECORDS:
            raise UserError(
                f"{where} has {len(data)} bytes: a batch has {_RECORD_BYTES} for each image,"
                f" {_RECORD_BYTES * _BATCH_RECORDS} when whole; get it again"
            )
        records = np.frombuffer(data, np.uint8).reshape(-1, _RECORD_BYTES)
        y, planes = records[:, 0], records[:, 1:]
    else:
        # A pickle can run any code when it is loaded; only a file known byte for byte is.
        if hashlib.md5(data).hexdigest() != _PYTHON_BATCH_MD5[file]:
            raise UserError(f"{where} is not the official pickle (its md5 differs), so it is not opened: get it again")
        batch = _BatchUnpickler(io.BytesIO(data), encoding="bytes").load()
        y, planes = np.asarray(batch[b"labels"]), batch[b"data"]
    x = np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return x, _checked_labels(y, where)


_PICKLE_MAY_CALL = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _BatchUnpickler(pickle.Unpickler):
    """Rebuilds NumPy arrays and calls nothing else: a second lock behind the checksum."""

    def find_class(self, module: str, name: str):
        """The class or function that a pickle may call; called by `load`."""
        try:
            return _PICKLE_MAY_CALL[module, name]
        except KeyError:
            raise UserError(f"a CIFAR-10 pickle asks for {module}.{name}, which no official batch does") from None


def _checked_labels(y: np.ndarray, where: Path, classes: int = 10) -> np.ndarray:
    """The labels as int32, if each is a class."""
    if y.max() >= classes:
        raise UserError(f"{where} has the label {y.max()}: classes are 0 to {classes - 1}; get the file again")
    return y.astype(np.int32)
