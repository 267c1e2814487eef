"""A run's scalars: a JSON line each, and TensorBoard's event file made from them.

The JSON lines are the record; a checkpoint knows how many there were. A run that continues drops later ones and
writes the event file anew, so that a curve has neither doubled nor missing points, wherever the run was stopped.
"""

import itertools
import json
import os
import socket
import struct
import time
from pathlib import Path

from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import masked_crc32c

from plif_jax import files
from plif_jax.errors import UserError

FILE = "metrics.jsonl"
OURS = ".plif_jax"  # ends the name of an event file of ours: the paper's program writes its own into the same folder


def read_metrics(run) -> dict[str, list[tuple[int, float]]]:
    """The scalars of a run folder, {tag: [(step or epoch, value), ...]}.

    Raises:
      UserError: the folder has no scalars, or their file is damaged.
    """
    path, metrics = Path(run) / FILE, {}
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not the folder of a run, or its curves are gone: it has no {FILE}") from None
    for number, line in enumerate(lines, 1):
        try:
            point = _point(line) if line else None
        except ValueError as error:
            mend = "the command that trained the run leaves the line out"
            raise UserError(f"{path} is damaged in line {number} ({error}); {mend}") from None
        if point:
            metrics.setdefault(point["tag"], []).append((point["step"], point["value"]))
    return metrics


class Logs:
    """Writes a run's scalars; `points` counts them.

    Args:
      run_dir: the run's folder, made if missing.
      points: how many of the scalars on disk still hold, as the checkpoint says from which the run continues; None
        where there is no checkpoint. Scalars that are there nevertheless are set aside, never lost.
      say: prints a line for people.
    """

    def __init__(self, run_dir: Path, points: int | None = None, say=print):
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / FILE
        if points is None:
            self._set_aside(say)
        self.points = points or 0
        there = self.path.exists()
        lines = self.path.read_bytes().split(b"\n")[: self.points] if there else []
        kept = list(filter(None, map(_valid, lines)))
        if len(kept) < self.points and there:
            say(f"{self.path} is damaged: {self.points - len(kept)} of {self.points} points are lost")
        elif len(kept) < self.points:
            checkpoints = run_dir.with_name(f"pt_{run_dir.name}")
            say(f"{self.path} is gone, and with it {self.points} points; to begin anew remove {checkpoints} too")
        # An empty line for each that is lost: checkpoints count lines.
        files.write(self.path, b"".join(map(_line, kept)) + b"\n" * (self.points - len(kept)))
        for outdated in run_dir.glob(f"events.out.tfevents.*{OURS}"):
            outdated.unlink()
        self._events = run_dir / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}{OURS}"
        begin = event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2")
        self._events.write_bytes(_framed(begin) + b"".join(map(_scalar, kept)))

    def _set_aside(self, say):
        """Gives the scalars of a run whose checkpoints are gone a name that is free."""
        if self.path.exists() and self.path.stat().st_size:
            names = (self.path.with_name(f"metrics_{i}.jsonl") for i in itertools.count(1))
            aside = next(path for path in names if not path.exists())
            self.path.rename(aside)
            say(f"there is no checkpoint to continue from; the curves of the run before are kept in {aside}")

    def add(self, tag: str, value: float, step: int):
        """Records one scalar at a step, or at an epoch as the tag has it."""
        point = {"tag": tag, "step": step, "value": float(value), "time": time.time()}
        # Opened for every point: a full disk shows here, not in a buffer or a thread of which nobody hears.
        for path, encoded in ((self.path, _line(point)), (self._events, _scalar(point))):
            with path.open("ab") as file:
                file.write(encoded)
        self.points += 1

    def sync(self) -> int:
        """Brings all scalars to the disk and returns how many there are."""
        with self.path.open("ab") as file:
            os.fsync(file.fileno())
        return self.points


def _line(point):
    """A scalar as a line of JSON."""
    return json.dumps(point).encode() + b"\n"


def _scalar(point):
    """A scalar as an entry of TensorBoard's event file."""
    value = summary_pb2.Summary.Value(tag=point["tag"], simple_value=point["value"])
    summary = summary_pb2.Summary(value=[value])
    return _framed(event_pb2.Event(wall_time=point["time"], step=point["step"], summary=summary))


def _framed(event):
    """An event between its length and its checksums, as TensorFlow's record files have it."""
    content = event.SerializeToString()
    length = struct.pack("<Q", len(content))
    return length + _checksum(length) + content + _checksum(content)


def _checksum(content):
    return struct.pack("<I", masked_crc32c(content))


def _valid(line):
    """A scalar from its line, None where the line is damaged."""
    try:
        return _point(line)
    except ValueError:
        return None


def _point(line):
    """A scalar from its line of JSON; ValueError if it is none."""
    try:
        point = json.loads(line)
        tag, step = point["tag"], int(point["step"])
        tag.encode()
        if not 0 <= step < 2**63:
            raise ValueError(f"step {step}")
        return {"tag": tag, "step": step, "value": float(point["value"]), "time": float(point["time"])}
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{line[:80]!r} is not a scalar") from error
