"""Writing to a cache that several programs share: one writer at a time, whole files or none."""

import contextlib
import fcntl
import math
import os
import shutil
from pathlib import Path

import numpy as np

from plif_jax.errors import UserError
from plif_jax.files import replacing


@contextlib.contextmanager
def locked(path):
    """Holds the lock file at `path`; waits, and says so, while another program holds it.

    The kernel frees the lock when its holder ends in whatever way, so a killed program never blocks the next one.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Another program is writing {path.with_suffix('')}: waiting for it.", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"{path.parent} lies where files cannot be locked ({error.strerror}): choose another folder with "
                "-cache_dir or PLIF_JAX_CACHE."
            ) from None
        yield
    finally:
        os.close(lock)


ADVICE = (
    "Mend that, or choose another folder with -cache_dir or PLIF_JAX_CACHE, and run again: what is finished is kept."
)


@contextlib.contextmanager
def writing(path, advice=ADVICE):
    """Turns the system's refusal to write at `path` into a UserError that gives the advice."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the system but a library, of what it was reading
            raise
        raise UserError(f"{path} cannot be written: {error.strerror}. {advice}") from None


def made(folder, make):
    """The folder, filled by `make(partial)` if it is not there: by one program, whole or not at all."""
    with reading(folder):
        there = folder.exists()
    if not there:
        partial = folder.with_name(folder.name + ".partial")
        with locked(folder.with_name(folder.name + ".lock")), writing(folder):
            if not folder.exists():
                shutil.rmtree(partial, ignore_errors=True)
                try:
                    make(partial)
                    os.rename(partial, folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    return folder


@contextlib.contextmanager
def reading(path):
    """Turns the system's refusal to read at `path`, or what it names more closely, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read: {error.strerror}.") from None


def save(path, array):
    """Saves an array as the array file `path`: all of it or nothing."""
    with _rows_of(path, array.dtype, array.shape) as write:
        write(0, array)


def join(path, files, places):
    """Saves the rows of arrays in files as the one array file `path`, each in the place that `places` has for it.

    One is open at a time: there may be more of them than a program may open.
    """
    dtypes, lengths, shapes = zip(*((a.dtype, len(a), a.shape[1:]) for a in map(_mapped, files)), strict=True)
    with _rows_of(path, np.result_type(*dtypes), (sum(lengths), *shapes[0])) as write:
        for array, its in zip(map(_mapped, files), np.split(places, np.cumsum(lengths)[:-1]), strict=True):
            breaks = np.flatnonzero(np.diff(its) != 1) + 1
            for rows, where in zip(np.split(array, breaks), np.split(its, breaks), strict=True):
                write(where[0], rows)


def _mapped(file):
    """An array file, mapped into memory."""
    return np.load(file, mmap_mode="r")


@contextlib.contextmanager
def _rows_of(path, dtype, shape):
    """Gives a function that writes what begins at a row of the array file `path`: in the end all of it or nothing."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    row_bytes = dtype.itemsize * math.prod(shape[1:])
    with writing(path), replacing(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()

        def write(row, values):  # not with tofile, nor into a mapped file, which hide that a disk is full
            file.seek(start + row * row_bytes)
            file.write(np.ascontiguousarray(values, dtype).data)

        yield write
