"""Numeric columns of MATLAB level 5 files, of which no claimed size is believed.

A file is a header of 128 bytes and elements, each a type, a size and as many bytes, padded to 8. A variable is an
element of elements: flags, dimensions, name, numbers; it may be compressed. Reference: "MAT-File Format", MathWorks.
"""

import struct
import zlib

import numpy as np

from plif_jax.errors import UserError

NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
MATRIX, COMPRESSED = 14, 15
MOST = 256 << 20  # bytes of a variable; half an hour of ASL-DVS


def columns(content: bytes) -> dict[str, np.ndarray]:
    """Read the numeric variables of a file, each flattened.

    Raises:
        UserError: the file is not of this form, is truncated, or holds a variable of more than 256 MiB.
    """
    order = {b"IM": "<", b"MI": ">"}.get(content[126:128])
    if order is None:
        raise UserError("the file is not a MATLAB level 5 file: save it with -v6 or -v7")
    found = {}
    for kind, data in _elements(memoryview(content)[128:], order):
        if kind == COMPRESSED:
            # One byte more than is allowed tells that there are more.
            data = zlib.decompressobj().decompress(data, MOST + 1)
            if len(data) > MOST:
                raise UserError(f"the file holds a variable of more than {MOST >> 20} MiB")
            kind, data = next(_elements(memoryview(data), order), (None, b""))
        if kind == MATRIX:
            parts = list(_elements(data, order))
            if len(parts) > 3 and parts[3][0] in NUMBERS:
                (_, name), (kind, numbers) = parts[2:4]
                found[bytes(name).decode("ascii")] = np.frombuffer(numbers, order + NUMBERS[kind])
    return found


def _elements(data, order):
    """Yield (type, bytes) of the elements in `data`; one of up to 4 bytes keeps them in its tag."""
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from(order + "II", data, at)
        at += 8
        if kind >> 16:
            kind, size, start = kind & 0xFFFF, kind >> 16, at - 4
            if size > 4:
                raise UserError(f"the file is damaged: a short element claims {size} bytes")
        else:
            start, at = at, at + size
            if at > len(data):
                raise UserError(f"the file is truncated: an element claims {size} bytes, {len(data) - start} are left")
            if kind != COMPRESSED:
                at += -at % 8
        yield kind, data[start : start + size]
