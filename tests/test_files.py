"""Files are written whole or not at all: where the disk refuses, what was there before stays, and is named."""

import contextlib
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx
from matplotlib.figure import Figure

import export as export_script
from plif_jax import curves, files, networks
from plif_jax.analysis import plots
from plif_jax.errors import UserError
from plif_jax.interop import export, torch_files

LIMIT = 1 << 10


@contextlib.contextmanager
def no_file_larger():
    """As on a disk that fills up: a write beyond LIMIT bytes is refused."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def small():
    return networks.NMNISTNet(T=2, channels=2, number_layer=1, rngs=nnx.Rngs(0))


def write_nir(path):
    pytest.importorskip("nir")
    export_script.write_nir(small(), SimpleNamespace(out=path))


def write_pt(path):
    pytest.importorskip("torch")
    torch_files.write(path, {"w": np.ones(LIMIT)})


WRITERS = {
    "text.md": lambda path: files.write(path, LIMIT * "text"),
    "weights.npz": lambda path: torch_files.write(path, {"w": np.ones(LIMIT)}),
    "weights.pt": write_pt,
    "net.jax": lambda path: export.save(small(), path, 1),
    "net.nir": write_nir,
    "curves.png": lambda path: curves.summary({"test_accuracy": [(0, 0.5)]}, path),
    "input.gif": lambda path: plots.save_gif(np.random.default_rng(0).poisson(1, (3, 34, 34, 2)), path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_refused_write_leaves_what_was_there(name, tmp_path):
    path = tmp_path / name
    WRITERS[name](path)
    assert path.stat().st_size > LIMIT
    path.write_bytes(b"good")
    with no_file_larger(), pytest.raises((OSError, UserError), match=f"{name}.*File too large|File too large.*{name}"):
        WRITERS[name](path)
    assert [other.name for other in tmp_path.iterdir()] == [name]
    assert path.read_bytes() == b"good"


def test_a_link_leads_to_what_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "file")
    for content in ("once", b"twice"):
        files.write(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "file").read_bytes() == b"twice"


def test_a_pipe_is_written_to_and_a_folder_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    files.write(tmp_path / "pipe", "content")
    assert os.read(reader, 100) == b"content"
    os.close(reader)
    with pytest.raises(IsADirectoryError, match=f"Is a directory: '{tmp_path}'$"):
        files.write(tmp_path, "content")
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*nowhere/file'$"):
        files.write(tmp_path / "nowhere" / "file", "content")


def test_what_replaces_a_file_has_its_mode(tmp_path):
    path = tmp_path / (255 * "a")
    files.write(path, "once")
    path.chmod(0o600)
    files.write(path, "twice")
    assert path.read_text() == "twice" and path.stat().st_mode & 0o777 == 0o600


def test_threads_write_one_file_at_once(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: files.write(tmp_path / "file", 1000 * str(i % 10)), range(100)))
    assert [tmp_path / "file"] == list(tmp_path.iterdir()) and len(set((tmp_path / "file").read_text())) == 1


def test_what_fails_while_a_file_is_made_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"good")
    with pytest.raises(ZeroDivisionError), files.replacing(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert [path] == list(tmp_path.iterdir()) and path.read_bytes() == b"good"


def test_a_picture_has_the_form_that_its_name_says(tmp_path):
    files.write_figure(Figure(), tmp_path / "a.svg")
    files.write_figure(Figure(), tmp_path / "a")
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    assert (tmp_path / "a").read_bytes()[1:4] == b"PNG"
