"""Archives of event data sets are unpacked once, whole or not at all, and in their folder."""

import contextlib
import io
import os
import shutil
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from event_files import numbers, pack, write_cifar10dvs, write_nmnist

from plif_jax.data import archives, events, recordings, storage
from plif_jax.errors import UserError


@pytest.mark.parametrize("names", [("Train.zip", "Test.zip"), ("train.zip", "test.zip")])
def test_nmnist_archives_are_unpacked_once_into_the_cache(tmp_path, names):
    write_nmnist(tmp_path / "made")
    (tmp_path / "data" / "NMNIST" / "Train" / "0").mkdir(parents=True)  # begun by hand, and empty
    for split, name in zip(("Train", "Test"), names, strict=True):
        pack(tmp_path / "made" / split, tmp_path / "data" / "NMNIST" / name)
    first = recordings.find("NMNIST", tmp_path / "data", tmp_path / "cache")
    stamp = Path(first.train[0].path).stat().st_ctime_ns
    again = recordings.find("NMNIST", tmp_path / "data", tmp_path / "cache")
    assert first == again and stamp == Path(again.train[0].path).stat().st_ctime_ns
    assert numbers(first.train) == [2, 9, 10] * 10 and len(first.test) == 20
    assert all(Path(recording.path).is_relative_to(tmp_path / "cache") for recording in first.train + first.test)


def test_an_archive_unpacked_again_gives_the_same_frames(tmp_path, monkeypatch):
    """Frames are found again by their recordings' times, which the archive tells, whatever the zone."""
    write_nmnist(tmp_path / "made")
    for split in ("Train", "Test"):
        pack(tmp_path / "made" / split, tmp_path / f"{split}.zip")
    try:
        for zone in ("UTC", "America/New_York"):
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            events.load("NMNIST", tmp_path, tmp_path / "cache", T=2, progress=False)
            shutil.rmtree(tmp_path / "cache" / "unpacked")
    finally:
        monkeypatch.undo()
        time.tzset()
    assert len(list((tmp_path / "cache" / "frames").glob("*/record.json"))) == 1


def test_zips_in_zips_in_a_zip(tmp_path):
    inner, content = "a/a_1.mat", b""
    for archive in ("a.zip", "ICCV2019_DVS_dataset.zip", "ASLDVS.zip"):
        with zipfile.ZipFile(tmp_path / archive, "w") as packed:
            packed.writestr(inner, content)
        inner, content = archive, (tmp_path / archive).read_bytes()
    for archive in ("a.zip", "ICCV2019_DVS_dataset.zip"):
        (tmp_path / archive).unlink()
    assert numbers(recordings.find("ASLDVS", tmp_path, tmp_path / "cache").train) == [1]


def test_what_a_file_manager_hides_is_no_data(tmp_path):
    write_cifar10dvs(tmp_path / "made", [0])
    (tmp_path / "data" / "cat").mkdir(parents=True)
    (tmp_path / "data" / "cat" / ".DS_Store").touch()  # the folder of an archive that is not unpacked yet
    pack(tmp_path / "made" / "cat", tmp_path / "data" / "cat.zip")
    (hidden := tmp_path / "made" / "__MACOSX" / "._dog.zip").parent.mkdir()
    hidden.write_bytes(b"attributes of dog.zip")
    with zipfile.ZipFile(tmp_path / "data" / "dog.zip", "w") as packed:
        packed.write(tmp_path / "made" / "dog" / "cifar10_dog_0.aedat", "dog/cifar10_dog_0.aedat")
        packed.write(hidden, "__MACOSX/._dog.zip")
    found = recordings.find("CIFAR10DVS", tmp_path / "data", tmp_path / "cache")
    assert [recording.label for recording in found.train] == [3, 5]
    with zipfile.ZipFile(tmp_path / "data" / "CIFAR10DVS.zip", "w") as packed:
        for name in ("cat", "dog"):
            packed.write(tmp_path / "data" / f"{name}.zip", f"{name}.zip")
            (tmp_path / "data" / f"{name}.zip").unlink()
    found = recordings.find("CIFAR10DVS", tmp_path / "data", tmp_path / "cache")
    assert [recording.label for recording in found.train] == [3, 5]


def test_a_damaged_zip_in_a_zip_is_named_by_both(tmp_path):
    with zipfile.ZipFile(tmp_path / "CIFAR10DVS.zip", "w") as packed:
        packed.writestr("cat.zip", b"no zip")
    with pytest.raises(UserError, match=f"{tmp_path / 'CIFAR10DVS.zip'}: cat.zip: the archive is truncated or damaged"):
        recordings.find("CIFAR10DVS", tmp_path, tmp_path / "cache")


@pytest.mark.parametrize("inside", ["CIFAR10DVS/cat/cat_0.aedat", "cat/cat_0.aedat", "events/cat/cat_0.aedat"])
def test_an_archive_may_hold_a_folder_of_the_whole(tmp_path, inside):
    with zipfile.ZipFile(tmp_path / "CIFAR10DVS.zip", "w") as packed:
        packed.writestr(inside, b"")
    (found,) = recordings.find("CIFAR10DVS", tmp_path, tmp_path / "cache").train
    assert found.label == 3


@pytest.mark.parametrize("archive, inside", [("cat.zip", "cat_0.aedat"), ("CAT.ZIP", "cat/cat_0.aedat")])
def test_an_archive_of_a_class_may_hold_its_recordings_alone(tmp_path, archive, inside):
    with zipfile.ZipFile(tmp_path / archive, "w") as packed:
        packed.writestr(inside, b"")
    (found,) = recordings.find("CIFAR10DVS", tmp_path, tmp_path / "cache").train
    assert found.label == 3


def test_dropbox_s_archives_begin_with_a_folder_without_a_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "Yin_b.ZIP", "w") as packed:
        packed.writestr("b/b_0001.mat", b"")
    with zipfile.ZipFile(tmp_path / "ICCV2019_DVS_dataset.zip", "w") as packed:
        packed.writestr("/", b"")
        packed.write(tmp_path / "Yin_b.ZIP", "Yin_b.ZIP")
    (tmp_path / "Yin_b.ZIP").unlink()
    assert numbers(recordings.find("ASLDVS", tmp_path, tmp_path / "cache").train) == [1]


def test_an_archive_that_python_cannot_unpack_says_so(tmp_path):
    with zipfile.ZipFile(tmp_path / "Train.zip", "w") as packed:
        packed.writestr("Train/0/1.bin", b"12345")
    content = bytearray((tmp_path / "Train.zip").read_bytes())
    for header in (content.index(b"PK\x03\x04") + 8, content.index(b"PK\x01\x02") + 10):
        content[header] = 9  # Deflate64, which Windows uses for large files
    (tmp_path / "Train.zip").write_bytes(content)
    with pytest.raises(UserError, match=r"Train\.zip: .* unpack it yourself, beside it"):
        archives.unpacked(tmp_path / "Train.zip", tmp_path / "cache")


def test_an_encrypted_archive_says_so(tmp_path):
    with zipfile.ZipFile(tmp_path / "Train.zip", "w") as packed:
        packed.writestr("Train/0/1.bin", b"12345")
    content = bytearray((tmp_path / "Train.zip").read_bytes())
    for header in (content.index(b"PK\x03\x04") + 6, content.index(b"PK\x01\x02") + 8):
        content[header] |= 1
    (tmp_path / "Train.zip").write_bytes(content)
    with pytest.raises(UserError, match=r"Train\.zip: Train/0/1\.bin in it is encrypted: unpack it yourself"):
        archives.unpacked(tmp_path / "Train.zip", tmp_path / "cache")


def truncate(archive):
    archive.write_bytes(archive.read_bytes()[:-300])


def test_a_damaged_lzma_archive_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "Train.zip", "w", zipfile.ZIP_LZMA) as packed:
        packed.writestr("Train/0/1.bin", bytes(range(250)) * 40)
    content = bytearray((tmp_path / "Train.zip").read_bytes())
    content[60:90] = b"\xff" * 30
    (tmp_path / "Train.zip").write_bytes(content)
    with pytest.raises(UserError, match=r"Train\.zip: the archive is truncated or damaged"):
        archives.unpacked(tmp_path / "Train.zip", tmp_path / "cache")


@pytest.mark.parametrize("name", ["Train.zip", "DvsGesture.tar.gz"])
def test_a_truncated_archive_is_named_and_leaves_nothing(tmp_path, name):
    write_nmnist(tmp_path / "made")
    archive = tmp_path / name
    if name.endswith("zip"):
        pack(tmp_path / "made" / "Train", archive)
    else:
        with tarfile.open(archive, "w:gz") as packed:
            packed.add(tmp_path / "made", "DvsGesture")
    truncate(archive)
    with pytest.raises(UserError, match=f"{name}: the archive is truncated or damaged") as error:
        archives.unpacked(archive, tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.suffix != ".lock"] == [tmp_path / "cache/unpacked"]


def tar_of_three(archive):
    """A tar archive of files of 600 bytes, compressed as its name says; where each member begins."""
    with tarfile.open(archive, f"w:{archive.suffix.removeprefix('.').removesuffix('tar')}") as packed:
        for number in range(3):
            member = tarfile.TarInfo(f"Train/{number}/1.bin")
            member.size = 600
            packed.addfile(member, io.BytesIO(np.random.default_rng(number).bytes(600)))
    with tarfile.open(archive) as packed:
        return [member.offset for member in packed]


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_bit_turned_in_a_compressed_archive_is_seen(tmp_path, kind):
    """Also where every member can be read: the checksum comes last, behind the end of the archive in it."""
    archive = tmp_path / f"DvsGesture.tar.{kind}"
    tar_of_three(archive)
    sound = archive.read_bytes()
    for at in np.linspace(60, len(sound) - 9, 25).astype(int):  # behind gzip's copy of the name
        archive.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        with pytest.raises(UserError, match=r"DvsGesture.* the archive is truncated or damaged"):
            archives.unpacked(archive, tmp_path / "cache")


@pytest.mark.parametrize("member", [1, 2])
def test_a_damaged_header_is_not_the_archive_s_end(tmp_path, member):
    archive = tmp_path / "a.tar"
    at, sound = tar_of_three(archive)[member], archive.read_bytes()
    assert at > 0
    for content in (sound[:at] + b"?" + sound[at + 1 :], sound[:at]):
        archive.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.tar: the archive is truncated or damaged"):
            archives.unpacked(archive, tmp_path / "cache")


@pytest.mark.parametrize("names, said", [(["a", "a/b"], "Not a directory"), (["a" * 300], "File name too long")])
def test_names_that_no_folder_can_have_are_the_archive_s_fault(tmp_path, names, said):
    with zipfile.ZipFile(tmp_path / "Train.zip", "w") as packed:
        for name in names:
            packed.writestr(name, b"")
    with pytest.raises(UserError, match=rf"Train\.zip: the archive is damaged, or .* cannot hold its names \({said}\)"):
        archives.unpacked(tmp_path / "Train.zip", tmp_path / "cache")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_may_not_leave_its_folder(tmp_path, kind):
    (tmp_path / "evil").write_text("out")
    archive = tmp_path / f"a.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as packed:
            packed.write(tmp_path / "evil", "../../escaped")
    else:
        with tarfile.open(archive, "w") as packed:
            packed.add(tmp_path / "evil", "../../escaped")
    with pytest.raises(UserError, match=r"a\.(zip|tar).*\.\./\.\./escaped"):
        archives.unpacked(archive, tmp_path / "cache")
    assert not list(tmp_path.rglob("escaped"))


def test_a_time_that_is_none_is_told_in_a_line(tmp_path):
    """Found by fuzzing: more seconds than a system's clock counts."""
    archive = tmp_path / "a.tar"
    with tarfile.open(archive, "w", format=tarfile.GNU_FORMAT) as packed:
        member = tarfile.TarInfo("Train/0/1.bin")
        member.mtime = 2**80
        packed.addfile(member)
    with pytest.raises(UserError, match=r"a\.tar: the archive is truncated or damaged \(.*\): fetch it again"):
        archives.unpacked(archive, tmp_path / "cache")


def test_archives_within_an_archive_are_removed_once_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "cat.zip", "w") as packed:
        packed.writestr("cat/cat_0.aedat", b"")
    with zipfile.ZipFile(tmp_path / "CIFAR10DVS.zip", "w") as packed:
        packed.write(tmp_path / "cat.zip", "cat.zip")
    (tmp_path / "cat.zip").unlink()
    recordings.find("CIFAR10DVS", tmp_path, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.zip"))


def test_an_archive_that_takes_the_place_of_another_of_its_size_is_unpacked(tmp_path):
    for content in (b"12345", b"54321"):
        with zipfile.ZipFile(tmp_path / "Train.zip", "w") as packed:
            packed.writestr("Train/0/1.bin", content)
        os.utime(tmp_path / "Train.zip", (int(content), int(content)))
        folder = archives.unpacked(tmp_path / "Train.zip", tmp_path / "cache")
        assert (folder / "Train/0/1.bin").read_bytes() == content


def test_a_zip_without_times_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "Train.zip", "w") as packed:
        packed.writestr(zipfile.ZipInfo("Train/0/1.bin", (1980, 0, 0, 0, 0, 0)), b"12345")
    folder = archives.unpacked(tmp_path / "Train.zip", tmp_path / "cache")
    assert (folder / "Train/0/1.bin").read_bytes() == b"12345"


def test_what_another_program_made_while_one_waited_is_not_made_again(tmp_path, monkeypatch):
    @contextlib.contextmanager
    def waited_for(path):
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "theirs").touch()
        yield

    monkeypatch.setattr(storage, "locked", waited_for)
    storage.made(tmp_path / "made", lambda partial: pytest.fail("made again"))
