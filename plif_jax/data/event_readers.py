"""Recordings of event cameras, one file at a time, as events in order of time.

Coordinates are as the paper's program sees them, x to the right and y down the frame. Where tonic's reader is right
it is used. Its `read_dvs_128` and `read_dvs_ibm` fail with the header reader of the same release (1.7), which itself
fails on some comments; it takes every packet of an AEDAT 3.1 file for polarity events and believes any packet size.
Here NumPy reads such files.
"""

import re
import struct
from functools import lru_cache
from pathlib import Path

import numpy as np
from tonic import io

from plif_jax.data import matlab
from plif_jax.data.frames import integers
from plif_jax.errors import UserError, first_line

EVENTS = np.dtype([("x", "i8"), ("y", "i8"), ("t", "i8"), ("p", "i8")])  # in the order that tonic fills it
POLARITY_EVENTS, COMPRESSED = 1, 0x8000  # the AEDAT 3.1 packet type, and a bit beside it
OTHER_CAMERAS = 0x7FFF0000  # AEDAT 2.0 address bits; a DVS128 sets bit 15, and jAER bit 31, for what came by its plug


def read(path: str | Path) -> np.ndarray:
    """Reads all events of a recording.

    The name's ending tells the form: `.bin`, `.bs2` (N-MNIST's 5 bytes an event), `.aedat` (AEDAT 2.0 of a DVS128, or
    AEDAT 3.1), `.aedat4` (CIFAR10-DVS as tonic has it), `.npy` (DVS128 Gesture as tonic has it), `.mat` (ASL-DVS).

    Returns:
      Structured array with t in microseconds, x, y, p; times and coordinates are not checked here.

    Raises:
      UserError: the file is empty, truncated or not of its form; the message names it.
    """
    path = Path(path)
    try:
        if path.stat().st_size == 0:
            raise UserError("the file is empty")
        return READERS[path.suffix.lower()](path)
    except ImportError:
        raise UserError(f"{path}: reading {path.suffix} files needs the package aedat: pip install aedat.") from None
    except UserError as error:
        raise UserError(f"{path}: {str(error).removesuffix('.')}.") from None
    except Exception as error:  # the readers of tonic, NumPy and aedat fail in many ways on a damaged file
        # Of NumPy's no more than that: it goes on to advise unpickling.
        raise UserError(f"{path}: not a readable {path.suffix} recording ({first_line(error)}).") from None


@lru_cache(maxsize=1)
def read_once(path: str | Path) -> np.ndarray:
    """Reads as `read` does, but keeps the last recording: a DVS128 Gesture file is cut into a dozen samples."""
    return read(path)


def _five_bytes(path):
    """Reads N-MNIST's form: x, y, then one bit of polarity and 23 bits of time, in microseconds."""
    if path.stat().st_size % 5:
        raise UserError(f"the file is truncated: {path.stat().st_size} bytes are not whole events of 5")
    return io.read_mnist_file(str(path), dtype=EVENTS)


def _aedat(path):
    """Reads AEDAT 2.0 or 3.1, as the header says: the lines that begin with #."""
    content, start = path.read_bytes(), 0
    version = re.match(rb"#!AER-DAT(\d{1,2}\.\d{1,2})\s", content)
    if not version:
        raise UserError("the file does not begin with #!AER-DAT and a version, as AEDAT does")
    if version[1] not in (b"2.0", b"3.1"):
        raise UserError(f"the file is AEDAT {version[1].decode()}; 2.0 and 3.1 are read")
    while content.startswith(b"#", start):
        start = content.find(b"\n", start) + 1 or len(content)
    return (_aedat2 if version[1] == b"2.0" else _aedat3)(memoryview(content)[start:])


def _aedat2(data):
    """Reads the DVS128 events of an AEDAT 2.0 file: CIFAR10-DVS as it was published.

    An address holds the polarity (0 is ON) in bit 0, then 7 bits from right to left and 7 bits from top to bottom: of
    the frame, not of the picture, which lies on its side. That is how the paper's program reads them.
    """
    if len(data) % 8:
        raise UserError(f"the file is truncated: {len(data)} bytes of data are not whole events of 8")
    address, t = np.frombuffer(data, ">u4").reshape(-1, 2).astype(np.int64).T
    if (others := address[address & OTHER_CAMERAS != 0]).size:
        raise UserError(f"addresses are not those of a DVS128, the camera that is read: one is {others[0]:#x}")
    return _events(t, 127 - (address >> 1 & 127), address >> 8 & 127, 1 - (address & 1))


def _aedat3(data):
    """Reads the polarity events of an AEDAT 3.1 file: DVS128 Gesture as it was published."""
    packets, at = [], 0
    while at < len(data):
        if at + 28 > len(data):
            raise UserError("the file is truncated: it ends inside a packet header")
        kind, _, size, _, overflow, capacity, number, _ = struct.unpack_from("<HHIIIIII", data, at)
        if kind & COMPRESSED:
            raise UserError("a packet is compressed: save the recording uncompressed")
        start, at = at + 28, at + 28 + size * capacity
        if at > len(data):  # before anything is allocated: a damaged header may claim any size
            raise UserError(
                f"the file is truncated: a packet claims {size * capacity} bytes, {len(data) - start} are left"
            )
        if kind == POLARITY_EVENTS:
            if size != 8 or number > capacity:
                raise UserError(f"a packet claims {number} of {capacity} polarity events of {size} bytes, not 8")
            words = np.frombuffer(data, "<u4", 2 * number, start).reshape(-1, 2).astype(np.int64)
            packets.append(np.stack([words[:, 0], words[:, 1] | overflow << 31]))
    if not packets:
        raise UserError("the file holds no polarity events")
    address, t = np.concatenate(packets, axis=1)
    return _events(t, address >> 17 & 0x7FFF, address >> 2 & 0x7FFF, address >> 1 & 1)


def _aedat4(path):
    """Reads CIFAR10-DVS as tonic has it: converted with DV, which counts y from the other side than AEDAT 2.0."""
    try:
        raw = io.read_aedat4(str(path))
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        # The package aedat is written in Rust, whose panics are no Exceptions.
        raise UserError(f"the file is damaged ({first_line(error)})") from None
    t, x, y, p = (raw[name].astype(np.int64) for name in raw.dtype.names)  # the package names the last p or on
    return _events(t, x, 127 - y, p)


def _npy(path):
    """Reads tonic's form of DVS128 Gesture: columns x, y, p and t in milliseconds."""
    with path.open("rb") as file:
        if file.read(8) != b"\x93NUMPY\x01\x00":  # later versions' headers may claim 4 GB for themselves
            raise UserError("the file is not an array as NumPy saves it, version 1.0")
    # Mapped, for a damaged header may claim any size; never unpickled.
    columns = np.load(path, mmap_mode="r", allow_pickle=False)
    if columns.ndim != 2 or columns.shape[1] != 4:
        raise UserError(f"the file holds an array {list(columns.shape)}, not [N, 4]")
    if columns.dtype.kind not in "iuf":
        raise UserError(f"the file holds {columns.dtype}, not numbers")
    x, y, p, t = columns.T
    return _events(np.round(np.multiply(t, 1000.0, dtype=np.float64)), x, y, p)


def _mat(path):
    """Reads ASL-DVS: MATLAB columns ts, x, y, pol, the sensor's corner at the lower right."""
    names = ("ts", "x", "y", "pol")
    found = matlab.columns(path.read_bytes(), names)
    if missing := [name for name in names if name not in found]:
        raise UserError(f"the file has no column {missing[0]}")
    if len({len(column) for column in found.values()}) > 1:
        raise UserError("the file's columns differ in length")
    t, x, y, p = (found[name] for name in names)
    # Columns may be of bytes, which cannot hold a difference.
    return _events(t, 239 - integers("x", x).astype(np.int64), 179 - integers("y", y).astype(np.int64), p)


def _events(t, x, y, p):
    """Puts columns of whole numbers together."""
    events = np.empty(len(t), EVENTS)
    for name, column in (("t", t), ("x", x), ("y", y), ("p", p)):
        if len(column) != len(t):  # one alone would be taken for each
            raise ValueError(f"{len(column)} values of {name} for {len(t)} of t")
        events[name] = integers(name, column)
    return events


READERS = {
    ".bin": _five_bytes,
    ".bs2": _five_bytes,
    ".aedat": _aedat,
    ".aedat4": _aedat4,
    ".npy": _npy,
    ".mat": _mat,
}
