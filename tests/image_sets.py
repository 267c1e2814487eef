"""The image sets, small, in their official formats."""

import gzip
import hashlib
import io
import struct
import tarfile

import numpy as np

from plif_jax.data import image_files

TRAIN, TEST = 60, 20  # samples of the small sets


def samples(split, shape, n):
    """Random images and labels, always the same of a split."""
    rng = np.random.default_rng(len(split))
    return rng.integers(0, 256, (n, *shape), dtype=np.uint8), rng.integers(0, 10, n, dtype=np.uint8)


def idx(array):
    """An array of bytes as an idx file has it."""
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def write_idx_set(folder, gzipped=True):
    """The four files of a small MNIST or Fashion-MNIST."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, stem, n in (("train", "train", TRAIN), ("test", "t10k", TEST)):
        for kind, array in zip(("images-idx3", "labels-idx1"), samples(split, (28, 28), n), strict=True):
            file = folder / f"{stem}-{kind}-ubyte{'.gz' * gzipped}"
            file.write_bytes(gzip.compress(idx(array), mtime=0) if gzipped else idx(array))


def cifar_batches():
    """The records [N, 3073] of a small CIFAR-10, by batch: a label, then the planes R, G, B."""
    batches = {}
    for split, names in (("train", [f"data_batch_{i}" for i in range(1, 6)]), ("test", ["test_batch"])):
        x, y = samples(split, (32, 32, 3), TRAIN if split == "train" else TEST)
        records = np.concatenate([y[:, None], x.transpose(0, 3, 1, 2).reshape(len(x), -1)], 1)
        batches |= dict(zip(names, np.split(records, len(names)), strict=True))
    return batches


def python2_pickle(records):
    """A batch as Python 2's pickle wrote it: byte strings, NumPy's array of that time, labels as a list."""

    def text(s):
        return b"U" + bytes([len(s)]) + s

    def size(n):
        return b"J" + struct.pack("<i", n)

    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR(K\x03" + text(b"|") + b"NNN" + size(-1) * 2 + b"K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR(K\x01("
    array += size(len(records)) + size(3072) + b"t" + dtype + b"\x89"
    array += b"T" + struct.pack("<i", records[:, 1:].size) + records[:, 1:].tobytes() + b"tb"
    labels = b"](" + b"".join(b"K" + bytes([label]) for label in records[:, 0]) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + labels + b"u."


def write_cifar(folder, form, monkeypatch):
    """A small CIFAR-10 in one of its four published forms."""
    folder.mkdir(parents=True, exist_ok=True)
    binary = "bin" in form
    files = {
        batch + ".bin" * binary: records.tobytes() if binary else python2_pickle(records)
        for batch, records in cifar_batches().items()
    }
    md5 = {file: hashlib.md5(data).hexdigest() for file, data in files.items()}
    monkeypatch.setattr(image_files, "_PYTHON_BATCH_MD5", md5)
    if not form.endswith(".tar.gz"):
        (folder / form).mkdir()
        for file, data in files.items():
            (folder / form / file).write_bytes(data)
        return
    with tarfile.open(folder / form, "w:gz") as archive:
        for file, data in reversed(files.items()):  # any order will do
            member = tarfile.TarInfo(f"cifar-10-batches-{'bin' if binary else 'py'}/{file}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def assert_is_the_small_set(dataset, shape):
    for split, name, n in ((dataset.train, "train", TRAIN), (dataset.test, "test", TEST)):
        x, y = samples(name, shape[:2] if shape[2] == 1 else shape, n)
        np.testing.assert_array_equal(split.x, x.reshape(-1, *shape))
        np.testing.assert_array_equal(split.y, y)
        assert (split.x.dtype, split.y.dtype, split.found) == (np.uint8, np.int32, n)


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}
