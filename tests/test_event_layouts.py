"""Every layout in which users have the event data sets is found, split as published, in an order of its own."""

import errno
import re
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from event_files import numbers, pack, random_events, write_aedat3, write_cifar10dvs, write_nmnist

from plif_jax.data import event_cache, event_readers, events, images, recordings
from plif_jax.errors import UserError


@pytest.mark.parametrize("place", [".", "NMNIST", "nmnist", "N-MNIST", "NMNIST/extract"])
def test_nmnist_folders(tmp_path, place):
    write_nmnist(tmp_path / "data" / place)
    found = recordings.find("NMNIST", tmp_path / "data", tmp_path / "cache")
    assert numbers(found.train) == [2, 9, 10] * 10 and numbers(found.test) == [2, 10] * 10
    assert [recording.label for recording in found.train] == sorted([*range(10)] * 3)
    assert found.expected == (60000, 10000)
    assert not (tmp_path / "cache").exists()


def test_a_second_download_is_no_recording_and_no_folder_is_one(tmp_path):
    write_nmnist(tmp_path)
    (tmp_path / "Train" / "0" / "11.bin").mkdir()
    assert numbers(recordings.find("NMNIST", tmp_path, tmp_path).train) == [2, 9, 10] * 10
    (tmp_path / "Train" / "0" / "9.bin").rename(tmp_path / "Train" / "0" / "8 (1).bin")  # of which there is one alone
    found = recordings.find("NMNIST", tmp_path, tmp_path).train
    assert [Path(r.path).name for r in found[:3]] == ["8 (1).bin", "2.bin", "10.bin"]
    for copy in ("2 (1)", "2(1)", "2 - Copy", "2 copy"):
        copied = shutil.copy(tmp_path / "Train" / "0" / "2.bin", tmp_path / "Train" / "0" / f"{copy}.bin")
        with pytest.raises(UserError, match=rf"{re.escape(str(copied))} is by its name a copy of 2\.bin: remove it"):
            recordings.find("NMNIST", tmp_path, tmp_path)
        copied.unlink()


@pytest.mark.parametrize(
    "find", [lambda root: recordings.find("NMNIST", root, root), lambda root: images.find("MNIST", root)]
)
def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch, find):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match=f"{tmp_path} cannot be read: Permission denied"):
        find(tmp_path)


def test_nothing_found_is_none(tmp_path):
    for name in recordings.FINDERS:
        assert recordings.find(name, tmp_path, tmp_path) is None


@pytest.mark.parametrize("layout", ["CIFAR10DVS", "CIFAR10DVS/events", "CIFAR10DVS/<class>.zip", "CIFAR10DVS.zip"])
def test_cifar10_dvs_layouts(tmp_path, layout):
    data = tmp_path / "data"
    if layout.endswith("zip"):
        write_cifar10dvs(tmp_path / "made")
        zips = tmp_path / "zips" if layout == "CIFAR10DVS.zip" else data / "CIFAR10DVS"
        zips.mkdir(parents=True)
        for name in recordings.CIFAR10_CLASSES:
            pack(tmp_path / "made" / name, zips / f"{name}.zip")
        if layout == "CIFAR10DVS.zip":
            (data / "CIFAR10DVS").mkdir(parents=True)
            with zipfile.ZipFile(data / "CIFAR10DVS" / "CIFAR10DVS.zip", "w") as packed:
                for file in zips.iterdir():
                    packed.write(file, file.name)
    else:
        write_cifar10dvs(data / layout)
    found = recordings.find("CIFAR10DVS", data, tmp_path / "cache")
    assert numbers(found.train) == [0, 2, 99, 100, 899] * 10 and numbers(found.test) == [900, 999] * 10
    assert [recording.label for recording in found.test] == sorted([*range(10)] * 2)
    assert found.expected == (9000, 1000)


def test_the_other_published_split_of_cifar10_dvs(tmp_path):
    write_cifar10dvs(tmp_path, classes=recordings.CIFAR10_CLASSES[:1])
    found = recordings.find("CIFAR10DVS", tmp_path, tmp_path, cifar10dvs_split="tebn")
    assert numbers(found.test) == [0, 2, 99] and numbers(found.train) == [100, 899, 900, 999]
    with pytest.raises(UserError, match="cifar10dvs_split is 'random'; allowed are paper, tebn"):
        recordings.find("CIFAR10DVS", tmp_path, tmp_path, cifar10dvs_split="random")


@pytest.mark.parametrize(
    "name, says",
    [
        ("cifar10_airplane_999 (2).aedat", r"_999 \(2\)\.aedat is by its name a copy of .*_999\.aedat: remove it"),
        ("cifar10_airplane_copy_999.aedat", r"airplane_999\.aedat and .*copy_999\.aedat have one number"),
        ("cifar10_airplane_1950.aedat", r"1950\.aedat: its number, which tells the split, is not one of 0 to 999"),
    ],
)
def test_a_copy_of_a_test_recording_does_not_train(tmp_path, name, says):
    write_cifar10dvs(tmp_path, classes=recordings.CIFAR10_CLASSES[:1])
    shutil.copy(tmp_path / "airplane" / "cifar10_airplane_999.aedat", tmp_path / "airplane" / name)
    with pytest.raises(UserError, match=says):
        recordings.find("CIFAR10DVS", tmp_path, tmp_path)


def test_nor_does_one_of_asl_dvs(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a_0002", "a_3400", "a_copy_3400"):
        (tmp_path / "a" / f"{name}.mat").touch()
    with pytest.raises(UserError, match=r"a_3400\.mat and .*a_copy_3400\.mat have one number"):
        recordings.find("ASLDVS", tmp_path, tmp_path)


def write_gesture(folder):
    """Write two users, one for testing; user01 shows gesture 2 twice, and its gestures overlap in time."""
    folder.mkdir(parents=True)
    for user, rows in {
        "user01_led": [(3, 100, 20_000), (2, 20_000, 40_000), (2, 39_000, 60_000), (11, 60_000, 89_000)],
        "user24_lab": [(1, 5_000, 50_000)],
    }.items():
        write_aedat3(folder / f"{user}.aedat", random_events(len(rows), 900, 128, 128))
        lines = ["class,startTime_usec,endTime_usec", *(",".join(map(str, row)) for row in rows)]
        (folder / f"{user}_labels.csv").write_text("\n".join(lines) + "\n")
    (folder / "trials_to_train.txt").write_text("user01_led.aedat\nuser02_lab.aedat\n\n")
    (folder / "trials_to_test.txt").write_text("user24_lab.aedat\n")


@pytest.mark.parametrize("layout", ["DVS128Gesture/DvsGesture", "DVS128Gesture/extract/DvsGesture", "tar.gz", "itself"])
def test_the_published_gestures_are_cut_by_their_labels(tmp_path, layout):
    data = tmp_path / "data"
    if layout == "tar.gz":
        write_gesture(tmp_path / "DvsGesture")
        (data / "DVS128Gesture").mkdir(parents=True)
        with tarfile.open(data / "DVS128Gesture" / "DvsGesture.tar.gz", "w:gz") as packed:
            packed.add(tmp_path / "DvsGesture", "DvsGesture")
    elif layout == "itself":
        write_gesture(data)
    else:
        write_gesture(data / layout)
    dataset = events.load("DVS128Gesture", data, tmp_path / "cache", T=3, progress=False)
    assert dataset.train.y.tolist() == [1, 1, 2, 10] and dataset.test.y.tolist() == [0]
    assert (dataset.train.expected, dataset.test.expected) == (1176, 288)
    t = random_events(4, 900, 128, 128)["t"]
    cuts = [(20_000, 40_000), (39_000, 60_000), (100, 20_000), (60_000, 89_000)]
    assert dataset.train.x.sum((1, 2, 3, 4)).tolist() == [((t >= a) & (t < b)).sum() for a, b in cuts]


def test_a_gesture_without_events_is_named(tmp_path):
    write_gesture(tmp_path / "data")
    (tmp_path / "data" / "user24_lab_labels.csv").write_text("class,startTime_usec,endTime_usec\n1,200000,300000\n")
    with pytest.raises(UserError, match=r"user24_lab\.aedat between 200000 and 300000 us: there are no events"):
        events.load("DVS128Gesture", tmp_path / "data", tmp_path / "cache", T=3, progress=False)


@pytest.mark.parametrize("train", ["a.aedat\nb.aedat\n./a.aedat", "b.aedat\nc.aedat"])
def test_a_recording_that_is_listed_twice_is_named(tmp_path, train):
    """It would count double, or be trained on and tested."""
    (tmp_path / "trials_to_train.txt").write_text(train)
    (tmp_path / "trials_to_test.txt").write_text("c.aedat\n")
    with pytest.raises(
        UserError, match=r"trials_to_train\.txt and trials_to_test\.txt name [ac]\.aedat twice: name it"
    ):
        recordings.find("DVS128Gesture", tmp_path, tmp_path / "cache")


def test_gesture_labels_that_are_missing_are_named(tmp_path):
    write_gesture(tmp_path / "data")
    (tmp_path / "data" / "user24_lab_labels.csv").unlink()
    with pytest.raises(UserError, match=r"user24_lab_labels\.csv: no such file; it tells where in user24_lab\.aedat"):
        recordings.find("DVS128Gesture", tmp_path / "data", tmp_path / "cache")


def test_damaged_gesture_labels_are_named(tmp_path):
    write_gesture(tmp_path / "data")
    (tmp_path / "data" / "user24_lab_labels.csv").write_text("class,startTime_usec,endTime_usec\n1,soon,later\n")
    with pytest.raises(UserError, match=r"user24_lab_labels\.csv: cannot be read as class, startTime_usec"):
        recordings.find("DVS128Gesture", tmp_path / "data", tmp_path / "cache")


@pytest.mark.parametrize("size", [1, 3, 256])
def test_a_gesture_file_is_read_once_for_all_its_cuts(tmp_path, monkeypatch, size):
    write_gesture(tmp_path / "data")
    write_aedat3(tmp_path / "data" / "user02_lab.aedat", random_events(7, 900, 128, 128))
    shutil.copy(tmp_path / "data" / "user01_led_labels.csv", tmp_path / "data" / "user02_lab_labels.csv")
    read, seen = event_readers.read, []
    monkeypatch.setattr(event_readers, "read", lambda path: seen.append(Path(path).stem) or read(path))
    monkeypatch.setattr(event_cache, "PART_RECORDINGS", size)
    dataset = events.load("DVS128Gesture", tmp_path / "data", tmp_path / "cache", T=3, progress=False)
    assert seen == ["user01_led", "user02_lab", "user24_lab"]
    found = recordings.find("DVS128Gesture", tmp_path / "data", tmp_path / "cache").train
    assert [Path(r.path).stem[:6] for r in found] == ["user01", "user01", "user02", "user02"] + ["user01", "user02"] * 2
    for x_THWC, recording in zip(dataset.train.x, found, strict=True):
        np.testing.assert_array_equal(x_THWC, event_cache.integrate(recording, (128, 128), 3))


def test_the_cuts_of_a_file_are_in_one_part_where_they_fit(tmp_path):
    cuts = {"a": 2, "b": 3, "c": 7, "d": 1}
    ours = [recordings.Recording(name, 0, i, i + 1) for name, n in cuts.items() for i in range(n)]
    settings = {"T": event_cache.PART_BYTES // 10, "sensor": [1, 1]}  # five to a part
    jobs = event_cache._jobs(tmp_path, ours, settings, lambda path: [path])
    assert ["".join(r.path for r in job["recordings"]) for job in jobs] == ["aabbb", "ccccc", "ccd"]


def test_tonics_gestures(tmp_path):
    for split, users in (("Train", ("user02_led", "user01_lab")), ("Test", ("user24_lab",))):
        for user in users:
            folder = tmp_path / "DVSGesture" / f"ibmGesture{split}" / user
            folder.mkdir(parents=True)
            for label in (0, 10):
                e = random_events(label, 50, 128, 128)
                np.save(folder / f"{label}.npy", np.stack([e["x"], e["y"], e["p"], e["t"] // 1000], 1))
    found = recordings.find("DVS128Gesture", tmp_path, tmp_path / "cache")
    assert [Path(r.path).parent.name for r in found.train] == ["user01_lab", "user02_led"] * 2
    assert [r.label for r in found.train] == [0, 0, 10, 10] and len(found.test) == 2
    assert found.expected == (1077, 264)
    train = tmp_path / "DVSGesture" / "ibmGestureTrain"
    (train / "user01_lab" / "0.npy").rename(train / "user01_lab" / "0.NPY")
    (train / "user01_lab" / "5.npy").mkdir()
    shutil.copytree(train / "user02_led", train / ".user01_lab")
    again = recordings.find("DVS128Gesture", tmp_path, tmp_path / "cache")
    assert [Path(r.path).name for r in again.train] == ["0.NPY", "0.npy", "10.npy", "10.npy"]
    copied = shutil.copytree(train / "user02_led", train / "user01_lab (1)")
    with pytest.raises(UserError, match=r"user01_lab \(1\) is by its name a copy of user01_lab: remove it"):
        recordings.find("DVS128Gesture", tmp_path, tmp_path / "cache")
    shutil.rmtree(copied)
    for deeper in tmp_path.glob("DVSGesture/ibm*"):  # not a layout that anybody has
        deeper.rename(deeper.with_name("moved"))
        deeper.mkdir()
        (deeper.with_name("moved")).rename(deeper / "wrapped")
    with pytest.raises(UserError, match=r"DVSGesture: ibmGestureTrain and ibmGestureTest hold no <user>_<lighting>/"):
        recordings.find("DVS128Gesture", tmp_path, tmp_path / "cache")


@pytest.mark.parametrize("place", ["ASLDVS", "ASLDVS/ICCV2019_DVS_dataset"])
def test_asl_dvs_letters(tmp_path, place):
    for letter in "aky":
        for number in (1, 3360, 3361, 4200):
            (tmp_path / place / letter).mkdir(parents=True, exist_ok=True)
            (tmp_path / place / letter / f"{letter}_{number:04d}.mat").touch()
    found = recordings.find("ASLDVS", tmp_path, tmp_path / "cache")
    assert numbers(found.train) == [1, 3360] * 3 and numbers(found.test) == [3361, 4200] * 3
    assert [r.label for r in found.test] == [0, 0, 9, 9, 23, 23], "24 letters: j and z are left out"


def test_the_same_recordings_elsewhere_share_the_cache(tmp_path):
    write_nmnist(tmp_path / "a" / "NMNIST")
    events.load("NMNIST", tmp_path / "a", tmp_path / "cache", T=2, progress=False)
    (tmp_path / "a").rename(tmp_path / "b")
    events.load("NMNIST", tmp_path / "b", tmp_path / "cache", T=2, progress=False)
    assert len(list((tmp_path / "cache" / "frames").glob("*/record.json"))) == 1


@pytest.mark.parametrize(
    "file, content, says",
    [
        ("labels.txt", b"0 12\n", "cannot be read as lines of number and class .class 12 is not one of 1 to 11"),
        ("labels.txt", b"these are mine\n", "cannot be read as lines of number and class"),
        ("labels.txt", b"1 1\n2 1\n1 3\n", "cannot be read as lines .* .number 1 is there twice"),
        ("labels.txt", b"\xff\xfe", "is not a text file"),
        ("trials_to_train.txt", b"\xff\xfe", "is not a text file"),
        ("a_labels.csv", b"class,start,end\n0,1,2\n", "class 0 is not one of 1 to 11"),
        ("a_labels.csv", b"class,start,end\n1,2,2\n", "nothing lies between 2 and 2"),
        ("a_labels.csv", b"", "it has no row"),
        ("a_labels.csv", b"\n1,0,2\n2,2,4\n", "cannot be read as class, .* .its first line does not name the columns"),
        ("a_labels.csv", b"class,start,end\n1,0,2\n1,0,2\n", "two gestures begin at 0"),
        ("a_labels.csv", b"class,start,end\n1,0,2\n2,0,3\n", "two gestures begin at 0"),
        ("a_labels.csv", b"class,start,end\n1\n", "cannot be read as class, startTime_usec, endTime_usec"),
        ("a_labels.csv", b"\xff\xfe", "is not a text file"),
    ],
)
def test_lists_of_gestures_that_are_none_are_named(tmp_path, file, content, says):
    if file == "a_labels.csv":
        (tmp_path / "trials_to_train.txt").write_text("a.aedat")
        (tmp_path / "a.aedat").touch()
    if file == "labels.txt":
        (tmp_path / "1.bs2").touch()
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=f"^{tmp_path / file}: .*{says}") as error:
        recordings.find("DVS128Gesture", tmp_path, tmp_path / "cache")
    assert str(error.value).count(file) == 1


def test_lists_without_their_recordings_are_not_a_data_set(tmp_path):
    """What else lies there is looked at."""
    (tmp_path / "labels.txt").write_text("cat 1\n")
    (tmp_path / "DvsGesture").mkdir()
    (tmp_path / "DvsGesture" / "trials_to_train.txt").write_text("gone.aedat\n")
    assert recordings.find("DVS128Gesture", tmp_path, tmp_path / "cache") is None
    (tmp_path / "labels.txt").write_text("12 1\n")
    (tmp_path / "13.bs2").write_bytes(bytes(5))
    assert recordings.find("DVS128Gesture", tmp_path, tmp_path / "cache") is None


def test_a_list_may_begin_with_a_byte_order_mark_or_an_empty_line(tmp_path):
    write_aedat3(tmp_path / "a.aedat", random_events(0, 50, 128, 128))
    (tmp_path / "trials_to_train.txt").write_bytes(b"\xef\xbb\xbfa.aedat\r\n")
    (tmp_path / "a_labels.csv").write_text("\r\nclass,start,end\r\n3,1,200\r\n")
    (found,) = recordings.find("DVS128Gesture", tmp_path, tmp_path / "cache").train
    assert found.label == 2 and (found.start, found.end) == (1, 200)


def test_folders_may_be_links_to_elsewhere(tmp_path):
    write_nmnist(tmp_path / "elsewhere")
    for split in ("Train", "Test"):
        (tmp_path / "NMNIST" / split).mkdir(parents=True)
        for digit in range(10):
            (tmp_path / "NMNIST" / split / str(digit)).symlink_to(tmp_path / "elsewhere" / split / str(digit))
    assert len(recordings.find("NMNIST", tmp_path, tmp_path / "cache").train) == 30


def test_folders_that_were_unpacked_into_a_folder_of_their_name(tmp_path):
    write_nmnist(tmp_path / "made")
    for split in ("Train", "Test"):
        shutil.copytree(tmp_path / "made" / split, tmp_path / "NMNIST" / split / split)
    assert len(recordings.find("NMNIST", tmp_path, tmp_path / "cache").train) == 30


def test_the_parts_of_a_large_frame_stay_small():
    settings = {"T": 20, "sensor": [128, 128]}
    jobs = event_cache._jobs(
        Path("p"), [recordings.Recording(str(i), 0) for i in range(1000)], settings, lambda path: []
    )
    assert max(len(job["recordings"]) for job in jobs) * 20 * 128 * 128 * 2 <= event_cache.PART_BYTES
    assert [r for job in jobs for r in job["recordings"]] == [recordings.Recording(str(i), 0) for i in range(1000)]


def test_a_file_called_as_the_set_hides_no_folder(tmp_path):
    write_nmnist(tmp_path)
    (tmp_path / "nmnist").write_text("where I got it")
    assert len(recordings.find("NMNIST", tmp_path, tmp_path).train) == 30


def test_what_lies_unpacked_comes_before_a_download_of_the_same(tmp_path):
    for folder in ("download", "extract"):
        write_nmnist(tmp_path / "NMNIST" / folder)
    assert recordings.find("NMNIST", tmp_path, tmp_path).folder.name == "extract"


def test_gestures_come_by_class_and_name_in_whatever_order_they_are_listed(tmp_path):
    root, names = tmp_path / "DvsGesture", ["user02_led", "user01_led"]
    root.mkdir()
    (root / "trials_to_train.txt").write_text("".join(f"{name}.aedat\n" for name in names))
    for name in names:
        (root / f"{name}.aedat").touch()
        (root / f"{name}_labels.csv").write_text("class,startTime_usec,endTime_usec\n2,0,10\n1,20,30\n")
    found = [(r.label, Path(r.path).stem) for r in recordings.find("DVS128Gesture", tmp_path, tmp_path).train]
    assert found == [(label, name) for label in (0, 1) for name in sorted(names)]


def test_one_recording_in_an_archive_is_a_set(tmp_path):
    with zipfile.ZipFile(tmp_path / "ASLDVS.zip", "w") as packed:
        packed.writestr("a/a_0001.mat", b"")
    assert len(recordings.find("ASLDVS", tmp_path, tmp_path / "cache").train) == 1
