"""How the scripts end: a user's mistake in one line, an interrupted run with the status that says so."""

import sys
from pathlib import Path

from plif_jax.errors import UserError
from plif_jax.training.signals import Interrupted


def run(main):
    """Calls `main(argv)` and exits: 0, 2 after a `UserError` (one line, no traceback), 143 or 130 when interrupted."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(_fail(error))
    except Interrupted as interrupted:
        sys.exit(interrupted.code)
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(error):
    print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
    return 2
