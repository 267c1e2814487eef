"""Files written whole or not at all: a program that is killed, or a full disk, leaves what was there before."""

import contextlib
import io
import os
import shutil
import threading
from pathlib import Path


@contextlib.contextmanager
def replacing(path):
    """Gives a binary file to write whose content takes the place of `path` at the end, all of it or nothing.

    Raises:
      OSError: the system's refusal, which names `path`.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device has nothing to keep; a folder refuses
        with open(path, "wb") as file:
            yield file
        return
    path = Path(os.path.realpath(path))  # of a link the file that it leads to
    partial = path.with_name(f"{path.name[:50]}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):  # where there was no file, or where files have no modes
            shutil.copymode(path, partial)
        os.replace(partial, path)
    except OSError as error:
        if error.errno is None:  # not the system's, but of a library that writes
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write(path, content: bytes | str):
    """Writes a file; raises what `replacing` does."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_figure(fig, path, dpi=120):
    """Writes a picture, in the form that the ending of its name says; raises what `replacing` does."""
    picture = io.BytesIO()  # matplotlib and Pillow have other words for a full disk
    fig.savefig(picture, dpi=dpi, format=Path(path).suffix[1:] or None)
    write(path, picture.getvalue())
