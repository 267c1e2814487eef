"""A run's scalars: a JSON line each, and TensorBoard's event file made from them.

The JSON lines are the record; a checkpoint knows how many there were. A run that continues drops later ones and
writes the event file anew, so that a curve has neither doubled nor missing points, wherever the run was stopped.
"""

import json
import os
import time
from pathlib import Path

from tensorboardX import SummaryWriter

from plif_jax.errors import UserError

FILE = "metrics.jsonl"


def read_metrics(run) -> dict[str, list[tuple[int, float]]]:
    """The scalars of a run folder, {tag: [(step or epoch, value), ...]}.

    Raises:
      UserError: the folder has no scalars, or their file is damaged.
    """
    metrics = {}
    for point in _read(Path(run) / FILE):
        metrics.setdefault(point["tag"], []).append((point["step"], point["value"]))
    return metrics


def _read(path):
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not the folder of a run: it has no {FILE}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


class Logs:
    """Writes a run's scalars; `points` counts them.

    Args:
      run_dir: the run's folder, made if missing.
      points: how many of the scalars on disk still hold, as the checkpoint says from which the run continues.
    """

    def __init__(self, run_dir: Path, points: int = 0):
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / FILE
        kept = _read_valid(self.path)[:points]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(point) + "\n" for point in kept))
        os.replace(temporary, self.path)
        self.points = len(kept)
        self._file = self.path.open("a")
        outdated = list(run_dir.glob("events.out.tfevents.*"))
        self._writer = SummaryWriter(str(run_dir), flush_secs=10)
        for point in kept:
            self._writer.add_scalar(point["tag"], point["value"], point["step"], point["time"])
        self._writer.flush()
        for old in outdated:
            old.unlink()

    def add(self, tag: str, value: float, step: int):
        """Records one scalar at a step, or at an epoch as the tag has it."""
        point = {"tag": tag, "step": step, "value": float(value), "time": time.time()}
        self._file.write(json.dumps(point) + "\n")
        self._writer.add_scalar(tag, point["value"], step, point["time"])
        self.points += 1

    def sync(self) -> int:
        """Brings all scalars to the disk and returns how many there are."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._writer.flush()
        return self.points

    def close(self):
        """Syncs and closes the files."""
        self.sync()
        self._file.close()
        self._writer.close()


def _read_valid(path):
    """The points up to the first damaged line: a killed run may have left half of one."""
    points = []
    try:
        for line in path.read_bytes().splitlines():
            points.append(json.loads(line))
    except (FileNotFoundError, ValueError):
        pass
    return points
