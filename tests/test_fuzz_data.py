"""Damaged files of data: each is refused, or what was written is read."""

import gzip
import io
import shutil
import struct
import tarfile
import zlib
from functools import partial

import numpy as np
import pytest
from damage import both_forms, damaged, refused_or_read, stored, try_all
from event_files import random_events, write_aedat2, write_aedat3
from hypothesis import strategies as st
from image_sets import idx

from plif_jax.data import archives, digits, event_readers, image_files, recordings


def five_bytes(path):
    digits.write_recording(path, random_events(0, 50, 34, 34))


def npy(path):
    np.save(path, np.arange(400).reshape(100, 4))


def mat(path, compressed=False):
    from scipy.io import savemat

    columns = {name: np.arange(50)[:, None] for name in ("ts", "x", "y", "pol")}
    savemat(path, columns, do_compression=compressed)


def compressed_mat(content):
    """A MATLAB file whose variables are compressed whatever they hold, as one."""
    data = zlib.compress(content[128:])
    return content[:128].ljust(128) + struct.pack("<II", 15, len(data)) + data


def aedat4(path):
    path.write_bytes(b"#!AER-DAT4.0\r\n" + struct.pack("<I", 60) + bytes(range(200)))


@pytest.mark.parametrize(
    "name, write",
    [
        ("1.bin", five_bytes),
        ("1.bs2", five_bytes),
        ("two.aedat", partial(write_aedat2, events=random_events(1, 50, 128, 128))),
        ("three.aedat", partial(write_aedat3, events=random_events(2, 50, 128, 128), packet=20)),
        ("4.aedat4", aedat4),
        ("5.npy", npy),
        ("6.mat", mat),
        ("7.mat", partial(mat, compressed=True)),
    ],
)
@both_forms
def test_recordings(tmp_path, name, write, examples):
    if name.endswith(".aedat4"):
        pytest.importorskip("aedat", reason="aedat has no wheel for this system: .aedat4 is not fuzzed")
    path = tmp_path / name
    write(path)
    contents = damaged(path.read_bytes())
    if name == "7.mat":
        mat(path)
        contents |= damaged(path.read_bytes()).map(compressed_mat)

    def check(content):
        path.write_bytes(content)
        events = refused_or_read(lambda: event_readers.read(path))
        assert events is None or events.dtype == event_readers.EVENTS

    try_all(contents, check, examples)


@pytest.mark.parametrize("zipped", [False, True])
@both_forms
def test_idx_files(tmp_path, zipped, examples):
    images, labels = tmp_path / "images", tmp_path / "labels"
    files = {"train-images-idx3-ubyte": images, "train-labels-idx1-ubyte": labels}
    pack = partial(gzip.compress, mtime=0) if zipped else bytes
    raw = [idx(np.full((5, 28, 28), 7, np.uint8)), idx(np.arange(5, dtype=np.uint8))]
    contents = [pack(content) for content in raw]

    def check(drawn):
        *both, told = drawn
        for path, content in zip((images, labels), both, strict=True):
            path.write_bytes(content)
        splits = refused_or_read(lambda: image_files.read("MNIST", files))
        assert splits is None or splits["train"][0].shape == (len(splits["train"][1]), 28, 28, 1)
        if splits is not None and told:  # by the checksum, where nothing was packed anew: read is what was written
            assert (splits["train"][0] == 7).all() and splits["train"][1].tolist() == [0, 1, 2, 3, 4]

    kept = [st.just(content) for content in contents]
    broken = [(damaged(packed), st.just(zipped)) for packed in contents]
    beneath = [(damaged(content).map(pack), st.just(False)) for content in raw]
    one = st.one_of(
        st.tuples(*[content if i == which else kept[i] for i in (0, 1)], told)
        for way in (broken, beneath)
        for which, (content, told) in enumerate(way)
    )
    try_all(one, check, examples)


def cifar_batch():
    return b"".join(bytes([label]) + bytes(3072) for label in range(3))


def cifar_archive():
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            member = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
            member.size = len(cifar_batch())
            archive.addfile(member, io.BytesIO(cifar_batch()))
        return file.getvalue()


def checked(archive):
    """A tar archive whose first header has the right checksum."""
    header = bytearray(archive[:512])
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + archive[512:]


@pytest.mark.parametrize(
    "name, contents",
    [
        ("data_batch_1.bin", damaged(cifar_batch())),
        ("data_batch_1", damaged(b"\x80\x02}q\x01U\x06labelsq\x02]q\x03K\x01as.")),
        ("cifar-10-binary.tar.gz", damaged(gzip.compress(cifar_archive(), mtime=0))),
        ("cifar-10-binary.tar.gz", damaged(cifar_archive()).map(checked).map(gzip.compress)),
    ],
    ids=["binary", "pickle", "tar.gz", "tar in gz"],
)
@both_forms
def test_cifar_batches(tmp_path, name, contents, examples):
    path = tmp_path / name

    def check(content):
        path.write_bytes(content)
        splits = refused_or_read(lambda: image_files.read("CIFAR10", {name: path}))
        assert splits is None or splits["train"][0].shape[1:] == (32, 32, 3)

    try_all(contents, check, examples)


@pytest.mark.parametrize(
    "name, contents",
    [
        ("Train.zip", lambda: damaged(stored({"Train/0/1.bin": bytes(50)}))),
        ("CIFAR10DVS.zip", lambda: damaged(stored({"airplane.zip": stored({"airplane/a_0.aedat": bytes(50)})}))),
        ("DvsGesture.tar.gz", lambda: damaged(gzip.compress(cifar_archive(), mtime=0))),
        ("DvsGesture.tar.gz", lambda: damaged(cifar_archive()).map(checked).map(gzip.compress)),
    ],
    ids=["zip", "zip in zip", "tar.gz", "tar in gz"],
)
@both_forms
def test_archives(tmp_path, name, contents, examples):
    """Also what is unpacked stays within its folder, and nothing half is left."""
    cache, before = tmp_path / "cache", {tmp_path / name, tmp_path / "cache"}

    def check(content):
        shutil.rmtree(cache, ignore_errors=True)
        (tmp_path / name).write_bytes(content)
        folder = refused_or_read(lambda: archives.unpacked(tmp_path / name, cache))
        assert set(tmp_path.iterdir()) <= before
        assert folder or not [path for path in (cache / "unpacked").glob("*") if path.suffix != ".lock"]

    try_all(contents(), check, examples)


@pytest.mark.parametrize(
    "name, content",
    [
        ("labels.txt", b"1 1\n2 11\n3 4 and more\n"),
        ("user01_fluorescent_labels.csv", b"class,startTime_usec,endTime_usec\n1,10,20\n11,20,400\n"),
        ("trials_to_train.txt", b"user01_fluorescent.aedat\nuser01_led.aedat\n"),
    ],
)
@both_forms
def test_lists_of_recordings(tmp_path, name, content, examples):
    folder, cache = tmp_path / "DvsGesture", tmp_path / "cache"
    folder.mkdir()
    if name == "labels.txt":
        for number in (1, 2, 3):
            five_bytes(folder / f"{number}.bs2")
    else:
        (folder / "trials_to_train.txt").write_text("user01_fluorescent.aedat")
        (folder / "user01_fluorescent_labels.csv").write_text("class,start,end\n1,10,20")
        (folder / "user01_fluorescent.aedat").write_bytes(b"")

    def check(content):
        (folder / name).write_bytes(content)
        found = refused_or_read(lambda: recordings.find("DVS128Gesture", tmp_path, cache))
        assert found is None or all(0 <= recording.label < 11 for recording in found.train)

    try_all(damaged(content), check, examples)
