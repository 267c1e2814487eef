"""Writing to a cache that several programs share: one writer at a time, whole files or none."""

import contextlib
import errno
import fcntl
import os
from pathlib import Path

import numpy as np

from plif_jax.errors import UserError


@contextlib.contextmanager
def locked(path):
    """Hold the lock file at `path`; wait, and say so, while another program holds it.

    The kernel frees the lock when its holder ends in whatever way, so a killed program never blocks the next one.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Another program is writing {path.with_suffix('')}: waiting for it.", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def writing(path):
    """Turn the system's refusal to write at `path` into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.EFBIG):
            raise
        raise UserError(
            f"{path} cannot be written: {error.strerror}. "
            "Free space there, or choose another folder with -cache_dir or PLIF_JAX_CACHE, and run again: what is "
            "finished is kept."
        ) from None


@contextlib.contextmanager
def replacing(path):
    """Give a binary file to write whose content takes the place of `path` at the end, all of it or nothing."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with writing(path):
        try:
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def save(path, array):
    """Save an array as `path`, all of it or nothing."""
    with replacing(path) as file:
        np.lib.format.write_array(file, array, allow_pickle=False)
