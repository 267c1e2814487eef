"""Fetching: the right file is kept, an empty or wrong answer is named, and so is what to do."""

import contextlib
import errno
import hashlib
import http.server
import threading
import zipfile

import pytest

from plif_jax.data import downloads, events
from plif_jax.errors import UserError

CONTENT = b"an archive"


@pytest.fixture
def server():
    """A web server that answers /good, /empty and /wrong."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answer = {"/good": CONTENT, "/empty": b"", "/wrong": b"<html>no robots</html>"}.get(self.path)
            self.send_response(200 if answer is not None else 404)
            self.send_header("Content-Length", str(len(answer or b"")))
            self.end_headers()
            self.wfile.write(answer or b"")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def offer(monkeypatch, url):
    archive = downloads.Archive("Train.zip", hashlib.md5(CONTENT).hexdigest(), url)
    monkeypatch.setitem(downloads.ARCHIVES, "NMNIST", [archive])


def test_a_right_archive_is_kept_and_fetched_once(tmp_path, monkeypatch, server):
    offer(monkeypatch, server + "/good")
    folder = downloads.fetch("NMNIST", tmp_path)
    assert (folder / "Train.zip").read_bytes() == CONTENT
    offer(monkeypatch, server + "/gone")
    assert downloads.fetch("NMNIST", tmp_path) == folder


def test_archives_put_there_that_hold_no_recordings_are_named(tmp_path):
    folder = tmp_path / "downloads" / "NMNIST"
    folder.mkdir(parents=True)
    for name in ("Train.zip", "Test.zip"):
        with zipfile.ZipFile(folder / name, "w") as packed:
            packed.writestr("readme.txt", "nothing")
    with pytest.raises(UserError, match=f"the archives in {folder} hold no recordings of NMNIST: remove them"):
        events.load("NMNIST", None, tmp_path, T=2)


def test_what_another_program_fetched_meanwhile_is_not_fetched(tmp_path, monkeypatch, capsys):
    @contextlib.contextmanager
    def waited_for(path):
        path.with_suffix("").mkdir()
        (path.with_suffix("") / "Train.zip").write_bytes(CONTENT)
        yield

    offer(monkeypatch, "nowhere")
    (tmp_path / "downloads").mkdir()
    monkeypatch.setattr(downloads.storage, "locked", waited_for)
    assert (downloads.fetch("NMNIST", tmp_path) / "Train.zip").exists()
    assert "fetching" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "path, says", [("/empty", "an empty file"), ("/wrong", "22 bytes, has not the md5"), ("/gone", "404")]
)
def test_a_wrong_answer_is_named_and_not_kept(tmp_path, monkeypatch, server, path, says):
    offer(monkeypatch, server + path)
    with pytest.raises(
        UserError, match=f"Train.zip could not be fetched from {server}{path}: .*{says}.*put it into"
    ) as e:
        downloads.fetch("NMNIST", tmp_path)
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)
    assert not list((tmp_path / "downloads" / "NMNIST").iterdir())


def test_a_full_disk_is_not_taken_for_a_bad_answer(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(downloads, "download_url", full)
    with pytest.raises(UserError, match=r"NMNIST cannot be written: No space left on device\. Mend that"):
        downloads.fetch("NMNIST", tmp_path)


def test_what_cannot_be_fetched_says_which_file_to_put_where(tmp_path):
    with pytest.raises(UserError, match=r"Put ICCV2019_DVS_dataset\.zip .* into DATA/ASLDVS"):
        downloads.fetch("ASLDVS", tmp_path)


def test_an_archive_that_was_begun_and_is_empty_is_fetched_anew(tmp_path, monkeypatch, server):
    offer(monkeypatch, server + "/good")
    (tmp_path / "downloads" / "NMNIST").mkdir(parents=True)
    (tmp_path / "downloads" / "NMNIST" / "Train.zip").touch()
    assert (downloads.fetch("NMNIST", tmp_path) / "Train.zip").read_bytes() == CONTENT
