"""The image sets from small files in the official formats: every layout, every damage, and the way through tfds."""

import errno
import functools
import gzip
import hashlib
import http.server
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest

from plif_jax.data import image_files, images, tfds_builders
from plif_jax.errors import UserError

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


# ---------------------------------------------------------------------------------------- the user's own files


@pytest.mark.parametrize("gzipped", [True, False])
@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("MNIST", "."),
        ("MNIST", "mnist"),
        ("MNIST", "MNIST/raw"),
        ("MNIST", "MNIST/MNIST/raw"),
        ("FashionMNIST", "FashionMNIST/FashionMNIST/raw"),
        ("FashionMNIST", "fashion_mnist"),
        ("FashionMNIST", "fashion-mnist"),
    ],
)
def test_idx_files_are_used_where_they_lie(tmp_path, name, where, gzipped):
    write_idx_set(tmp_path / where, gzipped)
    before = contents(tmp_path)
    dataset = images.load(name, tmp_path)
    assert_is_the_small_set(dataset, (28, 28, 1))
    assert dataset.name == name and dataset.source == str(tmp_path / where)
    assert (dataset.train.expected, dataset.test.expected) == (60_000, 10_000)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("where", [".", "CIFAR10", "cifar-10"])
@pytest.mark.parametrize(
    "form", ["cifar-10-batches-bin", "cifar-10-batches-py", "cifar-10-binary.tar.gz", "cifar-10-python.tar.gz"]
)
def test_cifar_files_are_used_where_they_lie(tmp_path, monkeypatch, where, form):
    write_cifar(tmp_path / where, form, monkeypatch)
    before = contents(tmp_path)
    dataset = images.load("CIFAR10", tmp_path)
    assert_is_the_small_set(dataset, (32, 32, 3))
    assert (dataset.train.expected, dataset.test.expected) == (50_000, 10_000)
    assert contents(tmp_path) == before


def test_an_incomplete_set_is_used_as_it_is(tmp_path, monkeypatch):
    write_cifar(tmp_path, "cifar-10-batches-bin", monkeypatch)
    for batch in ("data_batch_2", "data_batch_5", "test_batch"):
        (tmp_path / "cifar-10-batches-bin" / f"{batch}.bin").unlink()
    dataset = images.load("CIFAR10", tmp_path)
    x, _ = samples("train", (32, 32, 3), TRAIN)
    there = np.concatenate([x[:12], x[24:48]])
    np.testing.assert_array_equal(dataset.train.x, there)
    assert (dataset.train.found, dataset.train.expected) == (36, 50_000)
    assert (dataset.test.found, dataset.test.expected) == (0, 10_000)
    assert dataset.test.x.shape == (0, 32, 32, 3)


def test_binary_batches_are_preferred_to_pickles(tmp_path, monkeypatch):
    write_cifar(tmp_path, "cifar-10-batches-bin", monkeypatch)
    (tmp_path / "cifar-10-batches-bin" / "data_batch_3").write_bytes(b"not the official pickle")
    assert_is_the_small_set(images.load("CIFAR10", tmp_path), (32, 32, 3))


def test_the_set_itself_is_preferred_to_files_of_the_same_names(tmp_path):
    write_idx_set(tmp_path / "fashion_mnist")
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"another set's")
    assert images.load("FashionMNIST", tmp_path).source == str(tmp_path / "fashion_mnist")


# ------------------------------------------------------------------------------------------------- damaged files


def train_file(tmp_path, kind, gzipped=True):
    write_idx_set(tmp_path, gzipped)
    return next(tmp_path.glob(f"train-{kind}*"))


def claims(*sizes):
    return idx(np.zeros((1, 28, 28), np.uint8)).replace(struct.pack(">3I", 1, 28, 28), struct.pack(">3I", *sizes))


WHOLE = idx(np.zeros((TRAIN, 28, 28), np.uint8))
ZIPPED = gzip.compress(WHOLE, mtime=0)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        pytest.param(ZIPPED[:60], "is truncated or damaged", id="gzip cut"),
        pytest.param(ZIPPED[:-8] + b"8 bytes.", "is truncated or damaged", id="gzip checksum"),
        pytest.param(ZIPPED[:10] + b"\xff" * 50, "is truncated or damaged", id="gzip content"),
        pytest.param(b"\x1f\x8bnot gzip", "is truncated or damaged", id="gzip header"),
        pytest.param(WHOLE[:9], "is truncated or damaged", id="idx header cut"),
        pytest.param(b"", "is truncated or damaged", id="empty"),
        pytest.param(WHOLE[:-1], "holds less than its header says", id="a byte less"),
        pytest.param(WHOLE + b"\0", "holds more than its header says", id="a byte more"),
        pytest.param(idx(np.zeros(TRAIN, np.uint8)) + bytes(99), "is no idx file of images or labels", id="magic"),
        pytest.param(claims(4_000_000_000, 28, 28), r"claims the shape \[4000000000, 28, 28\]", id="too many"),
        pytest.param(claims(TRAIN, 65535, 65535), r"claims the shape \[60, 65535, 65535\]", id="too large"),
        pytest.param(claims(0, 28, 28), r"claims the shape \[0, 28, 28\]", id="none"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path, data, says):
    file = train_file(tmp_path, "images")
    file.write_bytes(data)
    with pytest.raises(UserError, match=f"^{file} {says}"):
        images.load("MNIST", tmp_path)


def test_a_label_out_of_range_is_named(tmp_path):
    file = train_file(tmp_path, "labels")
    file.write_bytes(idx(np.full(TRAIN, 10, np.uint8)))
    with pytest.raises(UserError, match=f"^{file} has the label 10"):
        images.load("MNIST", tmp_path)


def test_images_and_labels_must_match(tmp_path):
    file = train_file(tmp_path, "labels")
    file.write_bytes(idx(np.zeros(TRAIN - 1, np.uint8)))
    with pytest.raises(UserError, match=f"^{file} has 59 labels for the 60 images"):
        images.load("MNIST", tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz is of no use without train-labels-idx1-ubyte"):
        images.load("MNIST", tmp_path)


def test_the_labels_tell_fashion_mnist_from_mnist(tmp_path, monkeypatch):
    file = train_file(tmp_path, "labels")
    owner = {hashlib.md5(samples("train", (28, 28), TRAIN)[1]).hexdigest(): "FashionMNIST"}
    monkeypatch.setattr(image_files, "_LABELS_MD5", owner)
    with pytest.raises(UserError, match=f"^{file} belongs to FashionMNIST, not to MNIST"):
        images.load("MNIST", tmp_path)
    assert images.load("FashionMNIST", tmp_path).train.found == TRAIN


@pytest.mark.parametrize("length", [0, 3073 * 2 - 1, 3073 * 10_001])
def test_a_cifar_batch_of_the_wrong_length_is_named(tmp_path, length):
    file = tmp_path / "data_batch_1.bin"
    file.write_bytes(bytes(length))
    with pytest.raises(UserError, match=f"^{file} has {length} bytes: a batch has 3073 for each image"):
        images.load("CIFAR10", tmp_path)


def test_a_cifar_label_out_of_range_is_named(tmp_path):
    file = tmp_path / "data_batch_1.bin"
    file.write_bytes(b"\x0a" + bytes(3072))
    with pytest.raises(UserError, match=f"^{file} has the label 10"):
        images.load("CIFAR10", tmp_path)


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("sprung"),)


def test_a_pickle_that_is_not_the_official_one_is_never_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "data_batch_1"
    file.write_bytes(pickle.dumps({b"data": Trap()}))
    with pytest.raises(UserError, match=f"^{file} is not the official pickle"):
        images.load("CIFAR10", tmp_path)
    md5 = {"data_batch_1": hashlib.md5(file.read_bytes()).hexdigest()}  # and even if it were the official one
    monkeypatch.setattr(image_files, "_PYTHON_BATCH_MD5", md5)
    with pytest.raises(UserError, match="which no official batch does"):
        images.load("CIFAR10", tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("keep", [40, -4000])
def test_a_truncated_archive_is_named(tmp_path, monkeypatch, keep):
    file = tmp_path / "cifar-10-binary.tar.gz"
    write_cifar(tmp_path, file.name, monkeypatch)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=f"^{file} is truncated or damaged"):
        images.load("CIFAR10", tmp_path)


def test_an_archive_of_something_else_is_named(tmp_path):
    file = tmp_path / "cifar-10-python.tar.gz"
    file.write_bytes(gzip.compress(b"<html>not found</html>" * 100))
    with pytest.raises(UserError, match=f"^{file} is truncated or damaged"):
        images.load("CIFAR10", tmp_path)


def test_an_archive_writes_nothing_and_must_hold_batches(tmp_path):
    file = tmp_path / "in" / "cifar-10-binary.tar.gz"
    file.parent.mkdir()
    with tarfile.open(file, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("../../escaped.bin"))
        link = tarfile.TarInfo("data_batch_1.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    with pytest.raises(UserError, match=f"^{file} holds no batch of CIFAR-10"):
        images.load("CIFAR10", tmp_path / "in")
    assert sorted(tmp_path.rglob("*")) == [file.parent, file]


def test_a_misspelt_set_is_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no data set 'mnist'; allowed are .* Did you mean MNIST\?"):
        images.load("mnist", None, tmp_path)


def test_a_data_root_that_is_no_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=f"data_root {tmp_path / 'tpyo'} is not a folder"):
        images.load("MNIST", tmp_path / "tpyo")


# ------------------------------------------------------------------- downloaded, prepared and read through tfds


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A web site with the small MNIST, whose address and checksums stand in for the real ones."""
    folder = tmp_path / "site"
    write_idx_set(folder)
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sums = {
        file.name: (file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()) for file in folder.iterdir()
    }
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setitem(tfds_builders.SOURCES, "MNIST", (f"http://127.0.0.1:{server.server_port}/", sums))
    server.folder, server.requests = folder, requests
    yield server
    server.shutdown()
    server.server_close()


def load(cache):
    return images.load("MNIST", cache_dir=cache, progress=False)


def record_folder(cache):
    return cache / "tensorflow_datasets" / "images" / "MNIST" / "1.0.0"


def test_a_first_use_downloads_and_prepares_and_a_second_needs_no_network(tmp_path, site, capsys):
    dataset = load(tmp_path / "cache")
    assert_is_the_small_set(dataset, (28, 28, 1))
    assert dataset.source == str(record_folder(tmp_path / "cache"))
    said = capsys.readouterr().out
    assert "MNIST: downloading 0 MiB from http://127.0.0.1" in said
    assert f"MNIST: 0 MiB of record files are in {dataset.source}" in said
    site.shutdown()
    site.server_close()
    before = contents(tmp_path / "cache")
    assert_is_the_small_set(load(tmp_path / "cache"), (28, 28, 1))
    assert capsys.readouterr().out == ""
    assert contents(tmp_path / "cache") == before


def test_without_a_network_it_says_which_files_to_put_where(tmp_path, site):
    site.shutdown()
    site.server_close()
    files = "train-images-idx3-ubyte.gz.* from http://127.0.0.1.* into a folder of your own and give it as data_root"
    with pytest.raises(
        UserError, match=rf"^MNIST cannot be downloaded \(no connection\): try again, or put .*{files}$"
    ):
        load(tmp_path / "cache")


def test_a_file_that_is_gone_from_the_site_is_named(tmp_path, site):
    (site.folder / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match=r"train-labels-idx1-ubyte.gz. HTTP code: 404.*data_root$"):
        load(tmp_path / "cache")


def test_a_download_with_the_wrong_checksum_is_not_used(tmp_path, site):
    file = site.folder / "train-labels-idx1-ubyte.gz"
    good = file.read_bytes()
    file.write_bytes(good[:-1])
    with pytest.raises(
        UserError, match=r"train-labels-idx1-ubyte.gz, .* has wrong checksum: it is not used; try again"
    ):
        load(tmp_path / "cache")
    assert not record_folder(tmp_path / "cache").exists()
    file.write_bytes(good)
    assert_is_the_small_set(load(tmp_path / "cache"), (28, 28, 1))


def test_an_interrupted_preparation_continues_with_what_was_downloaded(tmp_path, site, monkeypatch):
    def interrupted(self, x, y):
        yield 0, {"image": x[0], "label": y[0]}
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tfds_builders.Images, "_generate_examples", interrupted)
        load(tmp_path / "cache")
    assert not record_folder(tmp_path / "cache").exists()
    # What a killed program leaves behind.
    half = record_folder(tmp_path / "cache").parent / "incomplete.ABCDEF_1.0.0"
    half.mkdir(parents=True)
    (half / "images-train.array_record-00000-of-00001").write_bytes(b"half")
    assert_is_the_small_set(load(tmp_path / "cache"), (28, 28, 1))
    assert len(site.requests) == 4
    assert not half.exists()


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("write() failed: No space left on device; writing images-train.array_record"),  # ArrayRecord's
    ],
    ids=["operating system", "ArrayRecord"],
)
def test_a_full_disk_ends_in_one_line_and_loses_nothing(tmp_path, site, monkeypatch, failure):
    def full(self, x, y):
        yield 0, {"image": x[0], "label": y[0]}
        raise failure

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"/cache/.* cannot be written: No space left"):
        patch.setattr(tfds_builders.Images, "_generate_examples", full)
        load(tmp_path / "cache")
    assert not record_folder(tmp_path / "cache").exists()
    assert_is_the_small_set(load(tmp_path / "cache"), (28, 28, 1))
    assert len(site.requests) == 4


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda file: file.unlink(), id="gone"),
        pytest.param(lambda file: file.write_bytes(file.read_bytes()[:500]), id="cut"),
        pytest.param(lambda file: os.truncate(file, file.stat().st_size // 2), id="halved"),
        pytest.param(lambda file: file.write_bytes(bytes(len(file.read_bytes()))), id="overwritten"),
    ],
)
def test_damaged_record_files_are_named(tmp_path, site, damage):
    load(tmp_path / "cache")
    folder = record_folder(tmp_path / "cache")
    damage(next(folder.glob("*train.array_record*")))
    with pytest.raises(UserError, match=f"^the record files in {folder} are damaged: delete that folder"):
        load(tmp_path / "cache")


@pytest.mark.parametrize("size", [0, 100])
def test_a_damaged_description_of_record_files_is_named(tmp_path, site, size):
    load(tmp_path / "cache")
    os.truncate(record_folder(tmp_path / "cache") / "dataset_info.json", size)
    folder = record_folder(tmp_path / "cache").parent
    with pytest.raises(UserError, match=f"^{folder} is damaged: delete that folder"):
        load(tmp_path / "cache")


def test_two_programs_prepare_a_set_once_and_without_tensorflow(tmp_path, site):
    program = textwrap.dedent(f"""
        import sys
        from plif_jax.data import images, tfds_builders
        tfds_builders.SOURCES["MNIST"] = {tfds_builders.SOURCES["MNIST"]}
        print(images.load("MNIST", cache_dir={str(tmp_path / "cache")!r}, progress=False).train.y.sum())
        assert "tensorflow" not in sys.modules
    """)
    start = functools.partial(subprocess.Popen, [sys.executable, "-c", program], text=True, stdout=subprocess.PIPE)
    programs = [start(), start()]
    outputs = [program.communicate(timeout=60)[0] for program in programs]
    assert [program.returncode for program in programs] == [0, 0]
    assert {int(output.split()[-1]) for output in outputs} == {samples("train", (28, 28), TRAIN)[1].sum(dtype=int)}
    assert len(site.requests) == 4  # each file once
