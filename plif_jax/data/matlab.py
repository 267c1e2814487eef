"""Numeric columns of MATLAB level 5 files, of which no claimed size is believed.

A file is a header of 128 bytes and elements, each a type, a size and as many bytes, padded to 8. A variable is an
element of elements: flags, dimensions, name, numbers; it may be compressed. Reference: "MAT-File Format", MathWorks.
"""

import struct
import zlib
from itertools import islice

import numpy as np

from plif_jax.errors import UserError

NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
MATRIX, COMPRESSED = 14, 15
MOST = 4 << 20  # numbers in a file: a million events, some thirty times a recording of ASL-DVS


def columns(content: bytes, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Reads those of the numeric variables `names` that a file holds, each flattened.

    Raises:
      UserError: the file is not of this form, is truncated, or holds more than `MOST` numbers or as many doubles'
        bytes once it is inflated.
    """
    order = {b"IM": "<", b"MI": ">"}.get(content[126:128])
    if order is None:
        raise UserError("the file is not a MATLAB level 5 file: save it with -v6 or -v7")
    found, left = {}, 8 * MOST
    for kind, data in _elements(memoryview(content)[128:], order):
        if kind == COMPRESSED:
            # One byte more than is allowed tells that there are more.
            data = zlib.decompressobj().decompress(data, left + 1)
            left -= len(data)
            if left < 0:
                raise UserError(f"the file inflates to more than {8 * MOST >> 20} MiB: save fewer events in each")
            kind, data = next(_elements(memoryview(data), order), (None, b""))
        if kind == MATRIX:
            parts = list(islice(_elements(data, order), 4))
            if len(parts) == 4 and parts[3][0] in NUMBERS:
                (_, name), (kind, numbers) = parts[2:]
                if (name := bytes(name).decode("ascii", "replace")) in names:
                    found[name] = np.frombuffer(numbers, order + NUMBERS[kind])
    if (count := sum(map(len, found.values()))) > MOST:
        raise UserError(f"the file holds {count} numbers, more than {MOST}: save fewer events in each")
    return found


def _elements(data, order):
    """Yields (type, bytes) of the elements in `data`; one of up to 4 bytes keeps them in its tag."""
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
