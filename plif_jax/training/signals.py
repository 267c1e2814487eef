"""Being asked to stop: SIGTERM from a scheduler, SIGINT from Ctrl-C."""

import contextlib
import math
import os
import signal
import sys
import threading
import time

SIGNALS = (signal.SIGTERM, signal.SIGINT)

# `timeout` and schedulers signal a program and its group, so that it comes twice, which is one wish.
SAME_WISH_SECONDS = 1


class Interrupted(BaseException):
    """The run stopped because it was asked to, after saving; `code` is the exit status that says so.

    As `KeyboardInterrupt` is none of the errors that a loop over runs may catch, so is this none.
    """

    def __init__(self, signum):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.code = 128 + signum


class Stop:
    """Whether a signal has asked the run to stop; another one, a second later or more, ends the program at once."""

    signum = None

    def _ask(self, signum, frame):
        self.signum = self.signum or signum

    def _watch(self, arrivals):
        """Counts signals as they arrive: in a long compilation the interpreter would not get round to its handlers."""
        first = math.inf
        while arrived := os.read(arrivals, 1):
            if arrived[0] in SIGNALS:
                if time.monotonic() - first >= SAME_WISH_SECONDS:
                    os._exit(128 + arrived[0])
                first = min(first, time.monotonic())
        os.close(arrivals)


@contextlib.contextmanager
def listening():
    """Catches SIGTERM and SIGINT; yields a `Stop`. Outside the main thread nothing is caught."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    arrivals, arriving = os.pipe()
    os.set_blocking(arriving, False)
    threading.Thread(target=stop._watch, args=(arrivals,), daemon=True).start()
    fd_before = signal.set_wakeup_fd(arriving)
    before = {signum: signal.signal(signum, stop._ask) for signum in SIGNALS}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(fd_before)
        os.close(arriving)  # ends the watching


@contextlib.contextmanager
def ending():
    """Within it SIGTERM ends the program by an exception, as Ctrl-C does, so that what is finished can be written."""

    def end(signum, frame):
        signal.signal(signum, signal.SIG_IGN)  # a second one must not end the writing
        sys.exit(128 + signum)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
