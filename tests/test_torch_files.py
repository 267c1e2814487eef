"""PyTorch's files read without running them, NumPy's beside."""

import io
import os
import pickle
import runpy
import sys
import zipfile
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
import torch_files_writer as writer
from weights import arrays_of, authors_module, same, small

from plif_jax.errors import UserError
from plif_jax.interop import torch_files
from plif_jax.interop.inert_pickle import Storage, Tensor


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state, "epoch": 1}])
def test_a_state_dict_is_read(monkeypatch, tmp_path, legacy, wrap):
    writer.foreign_modules(monkeypatch, {})
    expected = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.asarray(3, np.int64),
        "c": np.linspace(0, 1, 4),
        "d": np.zeros((0, 3), np.float16),
    }
    state = {name: writer.Tensor(array, transposed=name == "a") for name, array in expected.items()}
    writer.save(tmp_path / "weights.pt", wrap(state), legacy)
    same(torch_files.read(tmp_path / "weights.pt").arrays, expected)


def test_npz_goes_out_and_in(tmp_path):
    expected = arrays_of(small())
    torch_files.write(tmp_path / "weights.npz", expected)
    same(torch_files.read(tmp_path / "weights.npz").arrays, expected)


def test_bfloat16_goes_out_as_float32(tmp_path):
    torch_files.write(tmp_path / "x.npz", {"a": np.asarray([1.5, 2.5], jnp.bfloat16)})
    np.testing.assert_array_equal(torch_files.read(tmp_path / "x.npz").arrays["a"], np.float32([1.5, 2.5]))


def test_torch_itself_reads_what_is_written_and_writes_what_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    expected, path = arrays_of(small()), tmp_path / "weights.pt"
    torch_files.write(path, expected)
    same({name: tensor.numpy() for name, tensor in torch.load(path, weights_only=True).items()}, expected)
    same(torch_files.read(path).arrays, expected)


class Payload:
    """What a hostile file holds: unpickling calls `os.mkdir`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_would_run_something_is_refused_and_runs_nothing(tmp_path, legacy):
    trace, path = tmp_path / "trace", tmp_path / "hostile.pt"
    writer.save(path, {"net": Payload(trace)}, legacy)
    with pytest.raises(UserError, match=r"hostile\.pt needs a call of posix\.mkdir .* refused"):
        torch_files.read(path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Payload(trace)))
    assert trace.exists()  # it would have


@pytest.mark.parametrize(
    "instructions",
    [
        b"cos\nsystem\n(S'true'\ntR.",  # call
        b"(S'true'\nios\nsystem\n.",  # instance by call, protocol 0
        b"(cos\nsystem\nS'true'\no.",  # the same, protocol 1
        b"\x80\x02cbuiltins\neval\n)\x81.",  # instance that is no network
        b"\x80\x02ccollections\nOrderedDict\n)R}(X\x01\x00\x00\x00aK\x01ub\x85.",  # state of a mapping, in a tuple
        b"\x80\x02ctorch._utils\n_rebuild_parameter\n}(X\x08\x00\x00\x00__code__K\x01ub.",  # state of a function
        b"\x80\x02]}(K\x01K\x02e\x81.",
        b"\x80\x02\x82\x01.",  # extension registry
        b"\x80\x02}(((K\x01t\x85tK\x01u.",  # a nested tuple as a key
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"",
        b".",
        b"R.",
    ],
)
def test_no_instruction_does_more_than_build_data(tmp_path, instructions, monkeypatch):
    monkeypatch.setattr(os, "system", lambda command: pytest.fail("ran"))
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", instructions)
    with pytest.raises(UserError) as caught:
        torch_files.read(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.fixture(scope="module")
def sound_files(tmp_path_factory):
    folder, files = tmp_path_factory.mktemp("sound"), []
    with pytest.MonkeyPatch.context() as monkeypatch:
        weights = arrays_of(small())
        net = authors_module(monkeypatch, weights)
        for legacy in (False, True):
            writer.save(folder / "x.pt", {"net": net}, legacy)
            files.append((folder / "x.pt").read_bytes())
    stream = io.BytesIO()
    np.savez(stream, a=np.arange(3.0))
    return folder, [*files, stream.getvalue()]


@hypothesis.given(st.integers(0, 2), st.floats(0, 1), st.integers(0, 255), st.booleans())
@hypothesis.settings(max_examples=300, deadline=None)
def test_a_damaged_file_gives_one_line_or_its_arrays(sound_files, which, position, byte, cut):
    folder, files = sound_files
    content = bytearray(files[which])
    index = min(int(position * len(content)), len(content) - 1)
    if cut:
        del content[index:]
    else:
        content[index] = byte
    path = folder / ("damaged.npz" if which == 2 else "damaged.pt")
    path.write_bytes(content)
    try:
        arrays = torch_files.read(path).arrays
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        assert all(isinstance(array, np.ndarray) for array in arrays.values())


@pytest.mark.parametrize(
    "tensor, message",
    [
        ((b"\x01" * 40, 0, (4, 4), (4, 1)), "numbers of a are missing or cut short"),
        ((b"\x01" * 64, 1, (4, 4), (4, 1)), "a reaches past its numbers"),
        ((b"\x01" * 64, 0, (1 << 40, 1 << 40), (0, 0)), "a reaches past its numbers"),
        ((b"\x01" * 64, 0, (4, 4), (-4, 1)), "shape is damaged"),
        ((b"\x01" * 64, 0, (1,) * 70, (1,) * 70), "shape is damaged"),
        ((b"\x01" * 64, 0, (1,), (1 << 70,)), "shape is damaged"),
        ((b"\x01" * 64, 0, (0, 1 << 62, 1 << 62), (1, 1, 1)), "a has an impossible shape"),
    ],
)
def test_a_tensor_reaches_only_its_own_numbers(monkeypatch, tmp_path, tensor, message):
    data, offset, shape, strides = tensor
    writer.foreign_modules(monkeypatch, {})
    storage = writer._Storage(np.ones(16, np.float32))

    class Crooked:
        def __reduce_ex__(self, protocol):
            return sys.modules["torch._utils"]._rebuild_tensor_v2, (storage, offset, shape, strides, False, None)

    path = tmp_path / "crooked.pt"
    writer.save(path, {"a": Crooked()})
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("archive/data.pkl")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", data)
    with pytest.raises(UserError, match=message):
        torch_files.read(path)


def test_a_compressed_archive_is_refused_before_it_is_inflated(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\0" * 1_000_000)
    with pytest.raises(UserError, match="is compressed as its writers never do"):
        torch_files.read(tmp_path / "bomb.pt")


def test_a_compressed_npz_is_read(tmp_path):
    expected = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((1000, 100))}
    np.savez_compressed(tmp_path / "weights.npz", **expected)
    same(torch_files.read(tmp_path / "weights.npz").arrays, expected)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.pt", None, "cannot be read: No such file"),
        ("text.pt", b"hello", "neither a .npz nor a file of torch.save"),
        ("text.npz", b"hello", "not a whole archive"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        torch_files.read(tmp_path / name)


def test_an_npz_of_text_is_no_damaged_one(tmp_path):
    np.savez(tmp_path / "text.npz", w=np.ones(2), name=np.asarray("conv"))
    with pytest.raises(UserError, match=r"text\.npz holds name.npy of type <U4; of weights all are numbers"):
        torch_files.read(tmp_path / "text.npz")


def test_an_npz_of_objects_is_refused(tmp_path):
    np.savez(tmp_path / "objects.npz", a=np.asarray([Payload(tmp_path / "trace")], object))
    with pytest.raises(UserError, match="not an archive of plain arrays"):
        torch_files.read(tmp_path / "objects.npz")
    assert not (tmp_path / "trace").exists()


def test_weights_go_out_under_known_suffixes_only(tmp_path):
    with pytest.raises(UserError, match=r"\.h5; weights are written as \.npz or \.pt"):
        torch_files.write(tmp_path / "weights.h5", {})
    with pytest.raises(UserError, match=r"weights\.npz cannot be written: No such file or directory"):
        torch_files.write(tmp_path / "nowhere" / "weights.npz", {})


def test_the_script_converts_between_files(tmp_path, capsys):
    convert = runpy.run_path(str(Path(__file__).parents[1] / "experiments" / "convert.py"))["main"]
    expected = arrays_of(small())
    torch_files.write(tmp_path / "a.npz", expected)
    convert([str(tmp_path / "a.npz"), str(tmp_path / "b.npz")])
    same(torch_files.read(tmp_path / "b.npz").arrays, expected)
    assert f"b.npz: {len(expected)} arrays" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"-checkpoint latest is of a run; .* is a file, and has one state"):
        convert([str(tmp_path / "a.npz"), "-checkpoint", "latest", str(tmp_path / "c.npz")])
    with pytest.raises(UserError, match="not the folder of a run"):
        convert([str(tmp_path), str(tmp_path / "c.npz")])


def test_a_stride_along_an_axis_of_one_is_nobody_s_concern():
    tensor = Tensor(Storage("FloatStorage", "0", 2), 0, (1, 2), (1 << 62, 1))
    storages = {"0": np.float32([1, 2]).tobytes()}
    np.testing.assert_array_equal(torch_files._array("x.pt", "a", tensor, storages), [[1, 2]])
