"""Peers: each in a process of its own, timed in turn.

A worker builds its work, warms up, answers with facts about it, and then does one run for each line it is sent. So
peers share no interpreter, thread pool or allocator, and A B A B ... lets what else the machine does fall on all alike.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


class PeerError(RuntimeError):
    """A peer could not be built or run; the message is its error, or the last line that it wrote before it died."""


class Peer:
    """A worker process that runs one piece of work on demand; it starts at once, `ready` waits for it.

    Args:
      python: its interpreter.
      framework: the module of this package that builds the work: "jax_work" or "torch_work".
      spec: what to build, {"kind": ..., ...}; JSON.
      environment: variables added to this process's own.
    """

    def __init__(self, python, framework, spec, environment=()):
        here = Path(__file__).parents[1]
        paths = [str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        # JAX would otherwise take most of a GPU's memory before its peers start.
        settings = {"PYTHONPATH": os.pathsep.join(paths), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        # A pipe that nobody reads would fill, and stop the worker.
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [python, "-m", "bench.worker", framework, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if sys.flags.dev_mode else self.errors,
            text=True,
            env=os.environ | settings | dict(environment),
        )

    def ready(self):
        """Waits until the work is built and warm; its facts."""
        self.facts = self._answer()
        return self.facts

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            errors = self.errors.read().strip().splitlines()
            raise PeerError(errors[-1] if errors else f"ended with status {self.process.returncode}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def run(self):
        """Seconds of one run."""
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self.process.stdin.write("run\n")
            self.process.stdin.flush()
        return self._answer()["seconds"]

    def close(self):
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def in_turn(peers, rounds, limit):
    """Seconds of each peer's runs, {name: [rounds]}, one run of each per round; no round starts after `limit` s.

    Beside them {name: reason} of the peers that died; the others go on without these.
    """
    seconds, died = {name: [] for name in peers}, {}
    began = time.monotonic()
    for _ in range(rounds):
        for name in list(seconds):
            try:
                seconds[name].append(peers[name].run())
            except PeerError as error:
                died[name] = str(error)
                del seconds[name]
        if time.monotonic() - began > limit:
            break
    return seconds, died
