"""The image sets downloaded, prepared and read through tfds: interrupted, damaged, by two programs at once."""

import errno
import functools
import hashlib
import http.server
import os
import subprocess
import sys
import tempfile
import textwrap
import threading

import pytest
from image_sets import (
    TRAIN,
    assert_is_the_small_set,
    contents,
    samples,
    write_idx_set,
)
from tensorflow_datasets.core.download import downloader

from plif_jax.data import images, tfds_builders
from plif_jax.errors import UserError


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


def test_nothing_is_left_in_the_systems_folder_of_temporary_files(tmp_path, site, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    load(tmp_path / "cache")
    assert not list(temporary.iterdir())


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


def test_a_set_without_an_address_is_for_data_root(tmp_path):
    with pytest.raises(UserError, match="Mine has no address to be fetched from: give -data_root"):
        tfds_builders.find("Mine", tmp_path)


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


def test_what_another_program_has_prepared_meanwhile_is_not_downloaded(tmp_path, site, capsys):
    load(tmp_path)
    capsys.readouterr()
    tfds_builders._prepare("MNIST", tmp_path, False)  # as one does that waited for the other
    assert capsys.readouterr().out == ""


def test_few_retries_are_for_our_downloads_alone(monkeypatch):
    monkeypatch.setattr(downloader, "MAX_RETRIES", 10)
    with tfds_builders._tfds_settings(False):
        assert downloader.MAX_RETRIES == 3
    assert downloader.MAX_RETRIES == 10
