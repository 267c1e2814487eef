"""`python -m plif_jax.data check NAME`: counts, size, place and a picture that shows polarity and orientation."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from event_files import random_events, write_aedat2, write_aedat3, write_nmnist
from image_sets import write_idx_set
from matplotlib.image import imread

import plif_jax
from plif_jax.data import check as checks
from plif_jax.data.digits import write_recording
from plif_jax.errors import UserError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def test_a_part_of_nmnist(here):
    write_nmnist(here / "data")
    said = checks.check("NMNIST", here / "data", here / "cache")
    assert "30 of 60000 for training, 20 of 10000 for testing: in part" in said
    assert f"50 files, 0.1 MB, in {here / 'data'}" in said
    assert str(here / "here" / "NMNIST.png") in said
    assert imread("NMNIST.png").shape[0] > 500


def test_a_recording_written_anew_is_looked_at_anew(here, monkeypatch):
    """In one program, which keeps the last recording that it read."""
    path, caught = here / "data" / "Train" / "4" / "1.bin", drawn(monkeypatch)
    path.parent.mkdir(parents=True)
    for x in (5, 7):
        write_recording(path, {"t": [1, 2], "x": [x, x], "y": [0, 0], "p": [1, 1]})
        checks.check("NMNIST", here / "data", here / "cache")
    assert [sorted(set(np.nonzero((rows[0] < 1).any(-1))[1] % 34)) for rows, *_ in caught] == [[5], [7]]


def test_no_class_s_name_is_cut_off(here):
    write_idx_set(here / "FashionMNIST")  # "T-shirt/top" is the longest name of any set
    checks.check("FashionMNIST", here, here / "cache")
    assert imread("FashionMNIST.png")[:, 0].min() == 1, "the page's left edge is white"


def test_a_bad_recording_is_named(here):
    write_nmnist(here / "data")
    bad = here / "data" / "Train" / "0" / "2.bin"
    bad.write_bytes(bytes([34, 0, 0, 0, 1]))
    with pytest.raises(UserError, match=f"^{bad}: event 0 at x = 34 lies outside"):
        checks.check("NMNIST", here / "data", here / "cache")


@pytest.mark.parametrize("name", ["MNIST", "NMNIST"])
def test_nothing_is_fetched_for_a_look(here, name):
    with pytest.raises(UserError, match=f"{name} has not been fetched yet"):
        checks.check(name, None, here / "cache")


def test_what_is_never_fetched_says_what_to_put_there(here):
    with pytest.raises(UserError, match=r"Put ICCV2019_DVS_dataset\.zip"):
        checks.check("ASLDVS", None, here / "cache")


def test_digits_need_no_files_wherever_data_lies(here):
    assert checks.check("Digits", here).startswith("Digits: 1442 of 1442 for training, 355 of 355")


def test_a_folder_that_is_none_is_told_for_digits_too(here):
    with pytest.raises(UserError, match="nowhere is not a folder: give the folder that holds the data sets"):
        checks.check("Digits", here / "nowhere")


def test_a_picture_that_cannot_be_written_is_said(here):
    write_nmnist(here / "data")
    (here / "here" / "NMNIST.png").mkdir()
    with pytest.raises(UserError, match=r"NMNIST\.png cannot be written: Is a directory\. Run it in a folder"):
        checks.check("NMNIST", here / "data", here / "cache")


def test_whole_is_every_sample_of_both_halves():
    assert checks._summary("Digits", 1442, 355, (1442, 355))[0].endswith("whole")
    assert checks._summary("Digits", 1442, 354, (1442, 355))[0].endswith("in part")


def drawn(monkeypatch):
    """Catch what is drawn."""
    caught = []
    monkeypatch.setattr(checks, "_draw", lambda rows, labels, title, path: caught.append((rows, labels, title)))
    return caught


def test_the_picture_is_upright_and_time_runs_to_the_right(here, monkeypatch):
    """First all events at the upper left, then all at the lower right."""
    t = np.arange(80)
    corner = np.repeat([3, 30], 40)
    for split in ("Train", "Test"):
        (here / "data" / split / "4").mkdir(parents=True)
        write_recording(here / "data" / split / "4" / "1.bin", {"t": t, "x": corner, "y": corner, "p": t % 2})
    caught = drawn(monkeypatch)
    checks.check("NMNIST", here / "data", here / "cache")
    (((row,), labels, _),) = caught
    assert labels == ["4"]
    ys, xs = np.nonzero((row < 1).any(-1))
    assert set(zip(ys.tolist(), xs.tolist(), strict=True)) == {
        (corner, frame * 34 + corner) for frame in range(8) for corner in ([3] if frame < 4 else [30])
    }


def test_cifar10_dvs_is_turned_upright(here, monkeypatch):
    """The upper left of the paper program's frame is the upper right of the picture."""
    events = random_events(0, 100, 20, 20)
    write_aedat2(here / "data" / "cat" / "cifar10_cat_0.aedat", events)
    caught = drawn(monkeypatch)
    checks.check("CIFAR10DVS", here / "data", here / "cache")
    (((row,), labels, title),) = caught
    assert labels == ["cat"] and "quarter turn clockwise" in title
    ys, xs = np.nonzero((row < 1).any(-1))
    assert ys.max() < 20 and (xs % 128).min() >= 108


@pytest.mark.parametrize(
    "name, says",
    [
        ("NMIST", "no data set 'NMIST'; allowed are .*Did you mean NMNIST?"),
        ("cifar10", "Did you mean CIFAR10?"),
        ("CIFAR10", r"no official files of CIFAR10 are in .*; they are called data_batch_1\.bin, .*cifar-10-python"),
        ("CIFAR10DVS", r"no recordings of CIFAR10DVS are in .*; looked for <class>/\*\.aedat"),
    ],
)
def test_mistakes_are_named(here, name, says):
    with pytest.raises(UserError, match=says):
        checks.check(name, here, here / "cache")


def test_the_command_line(here):
    write_nmnist(here / "data")
    command = [sys.executable, "-m", "plif_jax.data", "check"]
    env = {"PYTHONPATH": str(Path(plif_jax.__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    options = dict(capture_output=True, text=True, env=env, cwd=here)
    good = subprocess.run([*command, "NMNIST", "-data_root", "data", "-cache_dir", "cache"], **options)
    assert good.returncode == 0 and "30 of 60000" in good.stdout and (here / "NMNIST.png").is_file(), good.stderr
    bad = subprocess.run([*command, "NMNIST", "--data_root", "nowhere"], **options)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and "nowhere is not a folder" in bad.stderr


def test_one_half_alone_is_told_as_a_part(here):
    write_nmnist(here / "data", train=0)
    said = checks.check("NMNIST", here / "data", here / "cache")
    assert "0 of 60000 for training, 20 of 10000 for testing: in part" in said


def test_one_half_of_an_image_set_alone_is_told_as_a_part(here):
    write_idx_set(here / "MNIST")
    for file in (here / "MNIST").glob("train-*"):
        file.unlink()
    said = checks.check("MNIST", here, here / "cache")
    assert "0 of 60000 for training, 20 of 10000 for testing: in part" in said


def test_a_file_of_several_gestures_is_counted_once(here):
    root = here / "data" / "DvsGesture"
    write_aedat3(root / "user01_led.aedat", random_events(0, 500, 128, 128))
    (root / "trials_to_train.txt").write_text("user01_led.aedat\n")
    (root / "user01_led_labels.csv").write_text("class,startTime_usec,endTime_usec\n1,0,30000\n2,40000,80000\n")
    said = checks.check("DVS128Gesture", here / "data", here / "cache")
    assert "2 of 1176 for training" in said and "\n1 files, 0.0 MB" in said
