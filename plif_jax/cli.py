"""How the scripts end: a user's mistake in one line, an interrupted run with the status that says so."""

import logging
import os
import sys
import traceback
from pathlib import Path

import jax

from plif_jax.errors import UserError
from plif_jax.training.signals import Interrupted


def run(main):
    """Calls `main(argv)` and exits: 0, 2 after a `UserError` (one line, no traceback), 143 or 130 when interrupted."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs tracebacks of what is said here in a line
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        _leave(2)
    except Interrupted as interrupted:
        sys.exit(interrupted.code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:
        traceback.print_exc()
        _leave(1)


def _leave(code):
    """Exits; one of several processes without a farewell, for which JAX would wait minutes while the others wait."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
