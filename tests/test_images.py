"""The image sets from small files in the official formats: every layout and every damage."""

import gzip
import hashlib
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from image_sets import (
    TEST,
    TRAIN,
    assert_is_the_small_set,
    cifar_batches,
    contents,
    idx,
    samples,
    write_cifar,
    write_idx_set,
)

from plif_jax.data import image_files, images
from plif_jax.errors import UserError

# The user's own files


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


# Damaged files


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


def test_a_bit_turned_in_a_compressed_archive_is_seen(tmp_path, monkeypatch):
    file = tmp_path / "cifar-10-binary.tar.gz"
    write_cifar(tmp_path, file.name, monkeypatch)
    sound = file.read_bytes()
    for at in np.linspace(60, len(sound) - 9, 25).astype(int):  # behind gzip's copy of the name
        file.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        with pytest.raises(UserError, match=f"^{file}"):
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


def test_a_link_in_an_archive_that_claims_a_size_has_no_content(tmp_path, monkeypatch):
    write_cifar(tmp_path, "cifar-10-binary.tar.gz", monkeypatch)
    file = tmp_path / "cifar-10-binary.tar.gz"
    link = tarfile.TarInfo("cifar-10-batches-bin/link")
    link.type, link.linkname, link.size = tarfile.LNKTYPE, "elsewhere", 5000
    file.write_bytes(gzip.compress(link.tobuf() + gzip.decompress(file.read_bytes())))
    assert_is_the_small_set(images.load("CIFAR10", tmp_path), (32, 32, 3))


def test_unpacked_files_are_preferred_to_those_they_were_unpacked_from(tmp_path):
    write_idx_set(tmp_path)
    x, _ = samples("test", (28, 28), TEST)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(255 - x))
    assert (images.load("MNIST", tmp_path).test.x[..., 0] == 255 - x).all()


def test_an_uncompressed_archive_cut_between_two_images_is_named(tmp_path):
    file, member = tmp_path / "cifar-10-binary.tar.gz", tarfile.TarInfo("data_batch_1.bin")
    records = cifar_batches()["data_batch_1"]
    member.size = records.size
    file.write_bytes(member.tobuf() + records[:-1].tobytes())
    with pytest.raises(UserError, match=r"truncated or damaged \(it ends inside data_batch_1\.bin\)"):
        images.load("CIFAR10", tmp_path)


def test_a_training_split_may_hold_sixty_thousand_images(tmp_path):
    files = {name: tmp_path / name for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")}
    for path, shape in zip(files.values(), [(60_000, 28, 28), (60_000,)], strict=True):
        path.write_bytes(idx(np.zeros(shape, np.uint8)))
    x, y = image_files.read("MNIST", files)["train"]
    assert len(x) == len(y) == 60_000
