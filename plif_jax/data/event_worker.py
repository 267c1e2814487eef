"""A worker of `event_cache`: takes jobs as lines of JSON, answers each with a line, ends with its input."""

import json
import os
import sys

from plif_jax.data import event_cache
from plif_jax.errors import UserError


def main():
    """Answers until there is nothing more to do."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    for line in sys.stdin:
        error = None
        try:
            event_cache.make_part(json.loads(line))
        except UserError as user_error:
            error = str(user_error)
        try:
            print(json.dumps({"error": error}), file=answers, flush=True)
        except BrokenPipeError:  # whoever asked has been killed
            os._exit(0)
