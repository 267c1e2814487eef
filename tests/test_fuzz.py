"""Damaged weights, settings, curves and checkpoints: each is refused, or what was written is read."""

import io
import json
import pickle
import shutil
import struct
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from damage import LONG, SHORT, both_forms, damaged, refused_or_read, stored, try_all
from hypothesis import strategies as st

from plif_jax import config as configs
from plif_jax.analysis import reference
from plif_jax.config import Config
from plif_jax.interop import torch_files
from plif_jax.training import checkpoint, logs


def framed(record):
    """Bytes as the one record of an event file, with the right checksums."""
    return logs._framed(SimpleNamespace(SerializeToString=lambda: record))


RUN = Config(dataset_name="MNIST").run_name
SCALAR = logs._scalar({"tag": "test_accuracy", "step": 3, "value": 0.5, "time": 1.5})


@pytest.mark.parametrize(
    "name, contents",
    [
        (f"run-{RUN}-tag-w0.csv", damaged(b"Wall time,Step,Value\n1.6e9,3,0.5\n1.6e9,4,0.5\n")),
        ("accuracy_B/MNIST.csv", damaged(b"epoch,val_accuracy,test_accuracy,seconds\n0,0.44,0.47,486\n")),
        (f"{RUN}/events.out.tfevents.1.here", damaged(SCALAR * 3)),
        (f"{RUN}/events.out.tfevents.1.here", damaged(SCALAR[12:-4]).map(framed)),
    ],
    ids=["csv", "accuracy-B", "events", "record in events"],
)
@both_forms
def test_curves_of_others(tmp_path, name, contents, examples):
    (tmp_path / name).parent.mkdir(exist_ok=True)

    def check(content):
        (tmp_path / name).write_bytes(content)
        (files,) = reference.find(tmp_path).values()
        for points in (refused_or_read(lambda: reference.read(files)) or {}).values():
            assert all(isinstance(at, int) and isinstance(value, float) for at, value in points)

    try_all(contents, check, examples)


def npy_bytes():
    with io.BytesIO() as file:
        np.save(file, np.ones((2, 2)))
        return file.getvalue()


def npz(npy):
    return stored({"conv.0.weight.npy": npy, "conv.1.bias.npy": npy_bytes()})


def pickled_weights():
    """The state dict {"a.weight": four floats} as torch.save pickles it."""

    def text(words):
        return b"X" + struct.pack("<I", len(words)) + words

    storage = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu") + b"K\x04tQ"
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00(K\x04t(K\x01t\x89ccollections\nOrderedDict\n)RtR"
    )
    return b"\x80\x02}(" + text(b"a.weight") + tensor + b"u."


def legacy_pt():
    """The same as PyTorch wrote it before 1.6: three pickles, the state dict, its storages' names, their numbers."""
    start = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True})
    names, numbers = pickle.dumps(["0"], 2), np.int64(4).tobytes() + np.arange(4, dtype="<f4").tobytes()
    return b"".join(pickle.dumps(part, 2) for part in start) + pickled_weights() + names + numbers


def pt(pickled):
    return stored({"weights/data.pkl": pickled, "weights/data/0": np.arange(4, dtype="<f4").tobytes()})


@pytest.mark.parametrize(
    "suffix, contents",
    [
        (".npz", damaged(npz(npy_bytes()))),
        (".npz", damaged(npy_bytes()).map(npz)),  # past the archive's checksums
        (".pt", damaged(pt(pickled_weights()))),
        (".pt", damaged(pickled_weights()).map(pt)),
        (".pt", damaged(legacy_pt())),
    ],
    ids=["npz", "array in npz", "pt", "pickle in pt", "legacy pt"],
)
@both_forms
def test_weights(tmp_path, suffix, contents, examples):
    path = tmp_path / f"weights{suffix}"

    def check(content):
        path.write_bytes(content)
        refused_or_read(lambda: torch_files.read(path))

    try_all(contents, check, examples)


@pytest.mark.parametrize("content", [pt(pickled_weights()), legacy_pt()], ids=["pt", "legacy pt"])
def test_the_undamaged_weights_are_read(tmp_path, content):
    (tmp_path / "weights.pt").write_bytes(content)
    (array,) = torch_files.read(tmp_path / "weights.pt").arrays.values()
    np.testing.assert_array_equal(array, [0, 1, 2, 3])


VALID_CONFIG = b"from plif_jax.config import Config\nconfig = Config(dataset_name='Digits', T=4)\n"
WORDS = st.sampled_from([f"-{name}" for name in vars(Config(dataset_name="Digits"))]) | st.text(max_size=8)
SPECIAL = st.sampled_from(["True", "None", "Digits", "1e999", "9" * 400, "-"])
VALUES = st.integers().map(str) | st.floats().map(str) | SPECIAL


@both_forms
def test_command_lines(examples):
    def check(words):
        argv = [word for word in words if word not in ("-h", "--help")]
        refused_or_read(lambda: configs.parse(argv))

    try_all(st.lists(WORDS | VALUES, max_size=8), check, examples)


@both_forms
def test_settings_of_a_run(examples):
    values = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.integers(400, 4000).map(lambda digits: 10**digits)
        | st.floats()
        | st.text(max_size=5)
        | st.lists(st.integers(), max_size=2)
    )
    fields = st.dictionaries(st.sampled_from(list(vars(Config(dataset_name="Digits")))), values, max_size=4)
    edited = fields.map(lambda given: json.dumps({"dataset_name": "Digits"} | given))
    valid = Config(dataset_name="Digits").to_json().encode()
    texts = edited | damaged(valid) | st.text() | values.map(json.dumps)

    def check(text):
        refused_or_read(lambda: Config.from_json(text))

    try_all(texts, check, examples)


@both_forms
def test_config_files(tmp_path, examples):
    """A config is a program of the user's own: random text in it must not be run, so only its ends are damaged."""
    path = tmp_path / "config.py"

    def check(length):
        path.write_bytes(VALID_CONFIG[:length] + b"\0" * (length % 2))
        refused_or_read(lambda: configs.load(path))

    try_all(st.integers(0, len(VALID_CONFIG)), check, examples)


@both_forms
def test_metrics(tmp_path, examples):
    path = tmp_path / logs.FILE
    line = b'{"tag": "train_loss", "step": 256, "value": 0.25, "time": 1.5}\n'

    def check(content):
        path.write_bytes(content)
        metrics = refused_or_read(lambda: logs.read_metrics(tmp_path))
        for tag, points in (metrics or {}).items():
            assert isinstance(tag, str) and all(isinstance(at, int) and value == float(value) for at, value in points)
        path.write_bytes(content)
        refused_or_read(lambda: logs.Logs(tmp_path, 2))

    try_all(damaged(line * 3), check, examples)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two checkpoints of a state: (their folder, the state)."""
    folder, state = tmp_path_factory.mktemp("checkpoint"), {"kernel": jnp.arange(12.0).reshape(3, 4)}
    with checkpoint.Checkpoints(folder, Config(dataset_name="Digits")) as checkpoints:
        for step in (5, 10):
            checkpoints.save(state | {"step": jnp.int32(step)}, {"epoch": step // 5}, 0.5)
    return folder, state | {"step": jnp.int32(0)}


@pytest.mark.parametrize("examples", [SHORT // 2, pytest.param(LONG // 8, marks=pytest.mark.faults)])
def test_checkpoints(saved, tmp_path, examples):
    """Whatever is damaged in the newest: it is used as it was saved, or set aside and the one before it used."""
    whole, state = saved
    files = sorted(path for path in (whole / "10").rglob("*") if path.is_file() and path.stat().st_size)
    seen = []

    def restored(folder):
        said = []
        with checkpoint.Checkpoints(folder, Config(dataset_name="Digits"), said.append) as checkpoints:
            (found, progress), damaged = checkpoints.restore(state), bool(said)
        np.testing.assert_array_equal(found["kernel"], state["kernel"])
        assert int(found["step"]) == (5 if damaged else 10) and progress == {"epoch": 1 if damaged else 2}
        seen.append(damaged)

    def check(drawn):
        path, content = drawn
        shutil.rmtree(tmp_path)
        shutil.copytree(whole, tmp_path)
        (tmp_path / path.relative_to(whole)).write_bytes(content)
        refused_or_read(lambda: restored(tmp_path), ())

    one = st.sampled_from(files).flatmap(lambda path: st.tuples(st.just(path), damaged(path.read_bytes())))
    try_all(one, check, examples)
    assert any(seen)
