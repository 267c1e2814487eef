"""Damaged bytes from outside: each reader refuses them with its documented error, or reads what was written.

Files are random, cut short, have bits flipped, or bytes overwritten with the extremes that headers claim. Each reading
is bounded in time and memory. What is compressed or has a checksum is also damaged beneath, so that a reader comes to
what the damaged bytes claim. The short form tries some inputs of each kind, `make test-faults` thousands.
"""

import io
import time
import tracemalloc
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plif_jax.errors import UserError

MEMORY = 100 << 20  # bytes that reading a file of a few thousand may take; libraries bring buffers of their own
SECONDS = 10  # of processor time
SHORT, LONG = 25, 2000
both_forms = pytest.mark.parametrize("examples", [SHORT, pytest.param(LONG, marks=pytest.mark.faults)])
EXTREMES = [b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\0\0\0", b"\0" * 8, b"\xff" * 8]


@st.composite
def damaged(draw, valid: bytes):
    """A file that is not what it was."""
    kind = draw(st.sampled_from(["random", "truncated", "flipped", "overwritten"]))
    if kind == "random":
        return draw(st.binary(max_size=300))
    raw = bytearray(valid)
    # Most of what a reader believes is at the beginning or the end.
    where = (
        st.integers(0, len(raw) - 1)
        | st.integers(0, min(64, len(raw) - 1))
        | st.integers(max(0, len(raw) - 64), len(raw) - 1)
    )
    if kind == "truncated":
        return bytes(raw[: draw(where)])
    for at in draw(st.lists(where, min_size=1, max_size=4)):
        if kind == "flipped":
            raw[at] ^= 1 << draw(st.integers(0, 7))
        else:
            extreme = draw(st.sampled_from(EXTREMES))
            raw[at : at + len(extreme)] = extreme
    return bytes(raw)


def refused_or_read(read, allowed=UserError):
    """What `read` gives; None where it refuses as it should. Takes little time and memory."""
    tracemalloc.start()
    began = time.process_time()
    try:
        return read()
    except allowed as error:
        assert str(error) and "\n" not in str(error)
        return None
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert time.process_time() - began < SECONDS
        assert peak < MEMORY


def try_all(strategy, check, examples):
    """Runs `check` on drawn inputs; the short form draws the same ones every time."""
    run = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples <= SHORT,
        suppress_health_check=list(HealthCheck),
    )(given(strategy)(check))
    run()


def stored(entries):
    """A zip archive of {name: bytes}, as a file's bytes."""
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in entries.items():
                archive.writestr(name, content)
        return file.getvalue()
