"""How the scripts start and end: a user's mistake in one line, an interrupted run with the status that says so."""

import ctypes
import logging
import os
import select
import sys
import traceback
from pathlib import Path

import jax

from plif_jax.errors import PATH_ERRNOS, UserError, first_line
from plif_jax.training.signals import Interrupted

READER_GONE = 141  # the status of what SIGPIPE ends

# Of glibc's <malloc.h>: no array outside the heap, and a heap that never shrinks.
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1


def run(main):
    """Calls `main(argv)` and exits.

    0; 2 after a `UserError`, the system's refusal of a file or a full memory, said in one line; 1 after a defect; 143
    or 130 interrupted, 129 where the terminal closed; 141 where nobody reads what it prints any more.
    """
    for number, name in enumerate(("stdout", "stderr"), start=1):
        if getattr(sys, name) is None:  # closed, as by `2>&-`; the next file that is opened would take its number
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            os.set_inheritable(number, True)  # where it was the lowest number that was free
            setattr(sys, name, os.fdopen(number, "w", closefd=False))
    keep_freed_memory()
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs tracebacks of what is said here in a line
    sys.unraisablehook = _tell_unraisable
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        _refuse(error)
    except Interrupted as interrupted:
        _leave(interrupted.code, farewell=True)
    except KeyboardInterrupt:
        _leave(130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and not _is_read():
            _leave(READER_GONE)
        if isinstance(error, OSError) and error.errno in PATH_ERRNOS:
            _refuse(f"{error.filename or 'a file, or standard output'}: {error.strerror}")
        full = "RESOURCE_EXHAUSTED" in str(error) or "OUT_OF_MEMORY" in str(error)  # XLA's word, and CUDA's
        of_device = isinstance(error, jax.errors.JaxRuntimeError) and full
        if of_device or isinstance(error, MemoryError):
            whose = "a device" if of_device else "this machine"
            _refuse(
                f"{whose}'s memory is full, of this program or of others beside it; a smaller batch, T or width takes "
                f"less ({first_line(error)})"
            )
        traceback.print_exc()
        _leave(1)


def _tell_unraisable(unraisable):
    """Tells what nobody can catch, but not of a checkpoint's writes after one that failed, of which a line is said."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _is_read():
    """Whether what is printed still goes somewhere; of `| head` it does not once head has seen enough."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)  # the end of its reader is told unasked
    return not output.poll(0)


def keep_freed_memory():
    """Has glibc keep freed memory for the next array; call it before JAX computes. Elsewhere than on Linux, nothing.

    By itself glibc gives every large array back to the system, which hands out zeroed pages anew, one fault each: a
    fifth of a CPU's training step. The process then stays as large as it once was, so a program decides this and not
    the library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
        # A CPU's work then runs, and allocates, on the calling thread: only the main thread has a heap to keep.
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def _refuse(why):
    print(f"{Path(sys.argv[0]).name}: {why}", file=sys.stderr)
    _leave(2)


def _leave(code, farewell=False):
    """Exits, without another complaint if what was printed cannot be read.

    One of several processes without a farewell, for which JAX would wait minutes while the others wait.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # for the flush on the way out
    if jax.distributed.is_initialized() and not farewell:
        os._exit(code)
    sys.exit(code)
