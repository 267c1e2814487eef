"""Being asked to stop: SIGTERM from a scheduler, SIGINT from Ctrl-C."""

import contextlib
import os
import signal
import threading


class Interrupted(Exception):
    """The run stopped because it was asked to, after saving; `code` is the exit status that says so."""

    def __init__(self, signum):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.code = 128 + signum


class Stop:
    """Whether a signal has asked the run to stop; a second one ends the program at once."""

    signum = None

    def _ask(self, signum, frame):
        if self.signum is not None:
            os._exit(128 + signum)
        self.signum = signum


@contextlib.contextmanager
def listening():
    """Catches SIGTERM and SIGINT; yields a `Stop`. Outside the main thread nothing is caught."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {signum: signal.signal(signum, stop._ask) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
