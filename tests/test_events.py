"""From recordings to frames on disk: right, once, in parts that survive, and never half."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from event_files import random_events, write_nmnist

import plif_jax
from plif_jax.config import Config
from plif_jax.data import batches, digits, event_cache, event_readers, events, frames, recordings, storage
from plif_jax.errors import UserError

REPOSITORY = str(Path(plif_jax.__file__).parents[1])


@pytest.fixture
def data(tmp_path):
    write_nmnist(tmp_path / "data" / "NMNIST")
    return tmp_path / "data"


@pytest.fixture
def parts_of_ten(monkeypatch):
    monkeypatch.setattr(event_cache, "PART_RECORDINGS", 10)


def load(data, T=4, **settings):
    return events.load("NMNIST", data, data.parent / "cache", T=T, progress=False, **settings)


def expected_frames(file, T=4, **settings):
    return frames.integrate(event_readers.read(file), 34, 34, T, **settings)


def test_a_damaged_prepared_array_is_named(tmp_path):
    write_nmnist(tmp_path / "data")
    events.load("NMNIST", tmp_path / "data", tmp_path / "cache", T=2, progress=False)
    (path,) = (tmp_path / "cache" / "frames").glob("*/train.npy")
    path.write_bytes(bytes(8) + path.read_bytes()[8:])
    with pytest.raises(UserError, match=r"prepared in .*NMNIST.* is damaged: delete that folder, and it is made anew"):
        events.load("NMNIST", tmp_path / "data", tmp_path / "cache", T=2, progress=False)


def test_frames_and_labels_are_those_of_the_files_in_order_of_number(data):
    dataset = load(data)
    assert (dataset.train.found, dataset.train.expected) == (30, 60000)
    assert (dataset.test.found, dataset.test.expected) == (20, 10000)
    assert dataset.train.x.dtype == np.uint8 and dataset.train.y.dtype == np.int32
    files = [data / "NMNIST" / "Train" / str(d) / f"{n}.bin" for d in range(10) for n in (2, 9, 10)]
    for x, y, file in zip(dataset.train.x, dataset.train.y, files, strict=True):
        np.testing.assert_array_equal(x, expected_frames(file))
        assert y == int(file.parent.name)
    assert isinstance(dataset.train.x, np.memmap)


def test_a_second_load_reads_no_recording(data, monkeypatch):
    first = load(data)
    monkeypatch.setattr(event_readers, "read_once", None)
    np.testing.assert_array_equal(load(data).train.x, first.train.x)


def test_T_may_be_numpy_s(data):
    assert load(data, T=np.int64(3)).train.x.shape[1] == 3


def test_other_settings_are_prepared_beside(data):
    assert load(data, T=4).train.x.shape[1] == 4
    assert load(data, T=5).train.x.shape[1] == 5
    by_time = load(data, split_by="time").train.x
    assert (by_time != load(data).train.x).any()
    assert len(list((data.parent / "cache" / "frames").glob("*/record.json"))) == 3


def test_changed_recordings_are_prepared_anew(data):
    load(data)
    file = data / "NMNIST" / "Train" / "0" / "2.bin"
    digits.write_recording(file, random_events(77, 300, 34, 34))
    np.testing.assert_array_equal(load(data).train.x[0], expected_frames(file))


@pytest.mark.parametrize("normalization", ["frequency", "max", "norm", "sum"])
def test_normalised_frames_are_float32(data, normalization):
    x = load(data, normalization=normalization).train.x
    assert x.dtype == np.float32
    file = data / "NMNIST" / "Train" / "0" / "2.bin"
    np.testing.assert_allclose(x[0], expected_frames(file, normalization=normalization), rtol=1e-6, atol=1e-12)


def test_counts_never_overflow(data, parts_of_ten):
    """300 events in a pixel need 16 bits, and only one part of the five holds such a pixel."""
    busy = {"t": np.arange(300), "x": np.full(300, 3), "y": np.full(300, 5), "p": np.ones(300)}
    digits.write_recording(data / "NMNIST" / "Train" / "5" / "10.bin", busy)
    x = load(data, T=1).train.x
    assert x.dtype == np.uint16
    assert x[17, 0, 5, 3, 1] == 300 == x[17].sum()
    assert x[0].sum() == 200


def test_the_record_says_what_it_was_made_from(data):
    load(data, split_by="time")
    (record,) = (json.loads(f.read_text()) for f in (data.parent / "cache").glob("frames/*/record.json"))
    assert (record["T"], record["split_by"], record["normalization"], record["sensor"]) == (4, "time", None, [34, 34])
    assert record["train"]["recordings"] == 30 and len(record["train"]["sha256"]) == 64
    assert set(record["versions"]) == {"plif_jax", "numpy"}


def test_nothing_is_written_where_the_data_lie(data):
    before = sorted(data.rglob("*"))
    load(data)
    assert sorted(data.rglob("*")) == before


def spoil(content):
    return lambda file: file.write_bytes(content)


@pytest.mark.parametrize(
    "damage, says, workers",
    [
        (spoil(b"\x01" * 7), "truncated: 7 bytes", False),
        (spoil(b""), "is empty", False),
        (spoil(bytes([34, 0, 0, 0, 1])), "x = 34 lies outside the sensor: x is 0 to 33", False),
        (spoil(bytes([1, 1, 0, 0, 9, 1, 1, 0, 0, 8])), "out of order: event 1 at 8 us follows one at 9 us", False),
        (spoil(bytes([0, 240, 0, 0, 9])), "no events", False),
        (spoil(bytes([0, 240, 0, 0, 9])), "no events", True),  # a worker's line is the same
    ],
)
def test_one_bad_file_among_many_is_named_and_the_rest_is_kept(data, parts_of_ten, monkeypatch, damage, says, workers):
    if workers:
        monkeypatch.setattr(event_cache, "ALONE_BYTES", 0)
    bad = data / "NMNIST" / "Test" / "9" / "10.bin"
    good = bad.read_bytes()
    damage(bad)
    with pytest.raises(UserError, match=says) as error:
        load(data)
    assert str(bad) in str(error.value) and "\n" not in str(error.value)
    parts = list((data.parent / "cache").glob("frames/*.parts/*.npy"))
    assert len(parts) == 4, "all parts but the last"
    assert len(list((data.parent / "cache").glob("frames/*/"))) == 1, "no folder yet of the whole set"
    bad.write_bytes(good)
    assert load(data).test.found == 20


def test_parts_that_are_made_are_not_made_again(data, parts_of_ten, monkeypatch):
    bad = data / "NMNIST" / "Test" / "9" / "10.bin"
    good, read, seen = bad.read_bytes(), event_readers.read, []
    bad.write_bytes(b"\xff" * len(good))  # outside the sensor
    with pytest.raises(UserError):
        load(data)
    bad.write_bytes(good)
    monkeypatch.setattr(event_readers, "read", lambda path: seen.append(path) or read(path))
    dataset = load(data)
    assert len(seen) == 10, "one part of five"
    np.testing.assert_array_equal(dataset.test.x[-1], expected_frames(data / "NMNIST" / "Test" / "9" / "10.bin"))


def test_the_parts_of_an_interrupted_set_outlive_another(data, parts_of_ten):
    bad = data / "NMNIST" / "Test" / "9" / "10.bin"
    good = bad.read_bytes()
    bad.write_bytes(b"\xff" * len(good))
    with pytest.raises(UserError):
        load(data)
    kept = set((data.parent / "cache").glob("frames/*.parts/*.npy"))
    part = data.parent / "part" / "NMNIST"
    for split in ("Train", "Test"):
        shutil.copytree(data / "NMNIST" / split / "0", part / split / "0")
    load(part.parent)
    assert kept and set((data.parent / "cache").glob("frames/*.parts/*.npy")) == kept
    bad.write_bytes(good)
    load(data)
    assert not list((data.parent / "cache").glob("frames/*.parts"))


@pytest.mark.parametrize("file", ["train.npy", "record.json"])
def test_a_damaged_cache_is_made_anew(data, file):
    good = np.array(load(data).train.x)
    (cached,) = (data.parent / "cache").glob(f"frames/*/{file}")
    cached.write_bytes(cached.read_bytes()[:-100])
    np.testing.assert_array_equal(load(data).train.x, good)


@pytest.mark.parametrize("left", [-5, 0])
def test_a_damaged_part_is_made_anew(data, parts_of_ten, left):
    bad = data / "NMNIST" / "Test" / "9" / "10.bin"
    good = bad.read_bytes()
    bad.write_bytes(b"\xff" * len(good))
    with pytest.raises(UserError):
        load(data)
    part = min((data.parent / "cache").glob("frames/*.parts/*.npy"))
    part.write_bytes(part.read_bytes()[:left])
    bad.write_bytes(good)
    np.testing.assert_array_equal(load(data).test.x[0], expected_frames(data / "NMNIST" / "Test" / "0" / "2.bin"))


def test_a_recording_written_anew_is_read_anew(tmp_path):
    """In one program, which keeps the last recording that it read."""
    path = tmp_path / "0.bin"
    for x in (5, 7):
        digits.write_recording(path, {"t": [1, 2], "x": [x, x], "y": [0, 0], "p": [1, 1]})
        prepared, _ = event_cache.prepare(
            *("NMNIST", {"train": [recordings.Recording(str(path), 0)]}, (34, 34), tmp_path / "cache"),
            **{"T": 1, "split_by": "number", "normalization": None, "progress": False},
        )
        assert prepared["train"][0, 0, 0, x, 1] == 2


def test_a_full_disk_is_said_in_one_line_and_leaves_nothing_half(data, parts_of_ten):
    """A limit on the size of files makes the system refuse the joined array as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(UserError, match=r"train\.npy cannot be written: File too large\. Mend that") as error:
            load(data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    kept = sorted(file.name for file in (data.parent / "cache").glob("frames/*/**/*") if file.is_file())
    assert len(kept) == 5 and all(name.endswith(".npy") and "train" not in name for name in kept), kept
    assert load(data).train.found == 30


def test_more_parts_than_a_program_may_open(data, parts_of_ten, monkeypatch):
    monkeypatch.setattr(event_cache, "PART_RECORDINGS", 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 10, hard))
    try:
        assert load(data).train.found == 30
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_recording_that_is_gone_is_named(data):
    gone = data / "NMNIST" / "Train" / "0" / "2.bin"
    gone.unlink()
    gone.symlink_to("nowhere")
    with pytest.raises(UserError, match=f"^{gone} cannot be read: No such file or directory"):
        load(data)


@pytest.mark.parametrize("content", ["null", "[]", '{"bytes": 1}'])
def test_a_record_that_is_none_is_made_anew(data, content):
    load(data)
    (record,) = (data.parent / "cache").glob("frames/*/record.json")
    record.write_text(content)
    assert load(data).train.found == 30


SCRIPT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell has started the tests with &
from plif_jax.data import event_cache, events
event_cache.PART_RECORDINGS, event_cache.ALONE_BYTES = 5, int(sys.argv[3])
dataset = events.load("NMNIST", sys.argv[1], sys.argv[2], T=4, progress=False)
print("sum", int(dataset.train.x.sum(dtype=int)))
"""  # as users write scripts: nothing guards __main__


def run_script(data, alone=1, **options):
    command = [sys.executable, "-c", SCRIPT, str(data), str(data.parent / "cache"), str(alone)]
    env = os.environ | {"PYTHONPATH": REPOSITORY, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **options)


def test_a_killed_preparation_goes_on(data):
    cache = data.parent / "cache"
    killed = run_script(data)
    while killed.poll() is None and len(list(cache.glob("frames/*.parts/*.npy"))) < 2:
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL and list(cache.glob("frames/*.parts/*.npy"))
    again = run_script(data)
    out, err = again.communicate(timeout=60)
    assert "sum 6000" in out, err
    assert not list(cache.glob("frames/*.parts")) and not list(cache.rglob("*.partial"))


def test_ctrl_c_lets_workers_finish_their_part_even_while_they_start(data):
    cache = data.parent / "cache"
    stopped = run_script(data, start_new_session=True)  # the group that a terminal's Ctrl-C reaches
    while stopped.poll() is None and not list(cache.glob("frames/*.parts")):
        time.sleep(0.001)
    time.sleep(0.5)
    os.killpg(stopped.pid, signal.SIGINT)
    out, err = stopped.communicate(timeout=120)
    assert "Stopping once the recordings at work are done" in out
    assert err.count("Traceback") == 1 and "KeyboardInterrupt" in err, err
    assert 1 <= len(list(cache.glob("frames/*.parts/*.npy"))) < 8
    assert "sum 6000" in run_script(data).communicate(timeout=120)[0]


def test_a_worker_that_ends_early_is_told(data, parts_of_ten, monkeypatch):
    monkeypatch.setattr(event_cache, "ALONE_BYTES", 1)
    monkeypatch.setattr(event_cache.sys, "executable", shutil.which("false"))
    for _ in range(3):  # before or after it is sent its part
        with pytest.raises(UserError, match="a worker ended early, with status 1: is"):
            load(data)


def test_workers_take_nothing_that_lies_beside_the_package(data, tmp_path, parts_of_ten, monkeypatch):
    (tmp_path / "plif_jax").symlink_to(os.path.dirname(plif_jax.__file__))
    (tmp_path / "pathlib.py").write_text("raise ImportError('an old backport, as site-packages may have')")
    monkeypatch.setattr(plif_jax, "__file__", str(tmp_path / "plif_jax/__init__.py"))
    monkeypatch.setattr(event_cache, "ALONE_BYTES", 1)
    assert load(data).train.x.sum() == 6000


def test_a_worker_whose_program_was_killed_ends_quietly():
    command = [sys.executable, "-c", event_cache.WORKER, plif_jax.__file__]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    job = {"path": "", "recordings": [["/nowhere.bin", 0, None, None]], "T": 1, "sensor": [1, 1]}
    with subprocess.Popen(command, **pipes) as worker:
        worker.stdout.close()
        worker.stdin.write(json.dumps(job | {"split_by": "number", "normalization": None}).encode() + b"\n")
        worker.stdin.close()
        assert worker.wait(60) == 0 and worker.stderr.read() == b""


def test_two_programs_may_prepare_the_same_set_at_once(data):
    programs = [run_script(data, alone=1 << 40) for _ in range(2)]
    for program in programs:
        out, err = program.communicate(timeout=60)
        assert "sum 6000" in out, err
    assert len(list((data.parent / "cache").glob("frames/*/record.json"))) == 1


def test_a_second_program_waits_until_the_first_is_done(tmp_path, capsys):
    def enter():
        with storage.locked(tmp_path / "set.lock"):
            order.append("second")

    order = []
    second = threading.Thread(target=enter)
    with storage.locked(tmp_path / "set.lock"):
        second.start()
        second.join(0.3)
        order.append("first")
    second.join(10)
    assert order == ["first", "second"]
    assert f"Another program is writing {tmp_path / 'set'}: waiting" in capsys.readouterr().out


@pytest.mark.parametrize("half, other", [("test", "train"), ("train", "test")])
def test_one_half_may_be_missing_but_not_to_train(data, half, other):
    whole = load(data)
    for file in (data / "NMNIST" / half.title()).rglob("*.bin"):
        file.unlink()
    shutil.rmtree(data.parent / "cache")
    with pytest.raises(UserError, match=f"holds no {half} recordings of NMNIST: training needs some of either"):
        load(data)
    assert not (data.parent / "cache").exists()  # nothing was prepared in vain
    dataset = load(data, to_train=False)
    assert getattr(dataset, half).x.shape == (0, 4, 34, 34, 2) and len(getattr(dataset, half).y) == 0
    np.testing.assert_array_equal(getattr(dataset, other).x, getattr(whole, other).x)
    config = Config(dataset_name="NMNIST", batch_size=4)
    if half == "train":
        assert len(batches.test_part(config, dataset)) == 20
    else:
        with pytest.raises(UserError, match="NMNIST has no sample for test: give more test samples; the data are"):
            batches.test_part(config, dataset)


def test_settings_are_checked_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match=r"there is no data set 'nmnist'; .* Did you mean NMNIST\?"):
        events.load("nmnist", tmp_path, tmp_path, T=1)
    with pytest.raises(UserError, match="T is 0"):
        events.load("NMNIST", tmp_path / "nowhere", tmp_path, T=0)
    with pytest.raises(UserError, match=r"nowhere is not a folder"):
        events.load("NMNIST", tmp_path / "nowhere", tmp_path, T=1)


def test_digits_are_an_event_data_set_like_any_other():
    dataset = events.load("Digits", T=2, progress=False)
    assert dataset.train.x.shape == (1442, 2, 34, 34, 2) and dataset.test.x.shape == (355, 2, 34, 34, 2)
    for split in (dataset.train, dataset.test):
        assert split.found == split.expected == len(split.x)
        assert (np.bincount(split.y) > 30).all()
