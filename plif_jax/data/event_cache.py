"""Recordings to arrays of frames on disk: prepared once, by all cores, and never half.

A prepared set is a folder with `train.npy`, `test.npy` and `record.json`, which says what they were made from. It is
made in parts of some hundred recordings, each named after them: a part is a whole file or none, and an interrupted
preparation goes on from the parts that are there, also where a recording between them has been mended.
"""

import contextlib
import hashlib
import itertools
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

import plif_jax
from plif_jax import files
from plif_jax.data import event_readers, frames, storage
from plif_jax.errors import UserError

FORMAT = 1  # of the prepared arrays; counts up when the same recordings would give others
PART_BYTES, PART_RECORDINGS = 32 << 20, 256  # at most so much in a part, so that little is lost and memory stays small
ALONE_BYTES = 64 << 20  # so few bytes of recordings are read sooner than workers have started
# A worker imports this plif_jax, wherever it lies and whatever else has its name; on PYTHONPATH all that lies beside it
# would come before the standard library.
WORKER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("plif_jax", sys.argv[1])
sys.modules["plif_jax"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from plif_jax.data.event_worker import main
main()
"""


def prepare(name, recordings, sensor, cache_dir, *, T, split_by, normalization, progress=True):
    """Gives the frames of every recording, from the cache or made now.

    Args:
      name: the data set's name, for people.
      recordings: {"train": [...], "test": [...]} or one of them, each a list of `recordings.Recording`.
      sensor: height, width.
      cache_dir: where prepared sets are kept.
      T, split_by, normalization: as `frames.integrate` has them.
      progress: whether to show a bar.

    Returns:
      {"train": x, "test": x}, as given, memory maps [N, T, H, W, 2] of the smallest unsigned integers that hold the
      counts, float32 where normalised; and the folder they lie in.

    Raises:
      UserError: a recording cannot be used, or the cache cannot be written; what was prepared is kept.
    """
    settings = {"T": int(T), "split_by": split_by, "normalization": normalization, "sensor": list(sensor)}
    stat = cache(_stat)
    record = {"format": FORMAT, **settings} | {
        split: {"recordings": len(ours), "sha256": _digest(ours, stat)} for split, ours in recordings.items()
    }
    key = hashlib.sha256(json.dumps(record).encode()).hexdigest()[:12]
    parts = Path(cache_dir) / "frames" / f"{name}_T_{T}_split_by_{split_by}_normalization_{normalization}.parts"
    folder = parts.with_name(f"{parts.stem}_{key}")
    if not _complete(folder):
        with storage.locked(parts.with_suffix(".lock")):
            if not _complete(folder):
                orders = {split: _by_file(ours) for split, ours in recordings.items()}
                jobs = {
                    split: _jobs(parts, [recordings[split][i] for i in order], settings, stat)
                    for split, order in orders.items()
                }
                _make(folder, parts, jobs, orders, record, progress and name)
    try:
        return {split: np.load(folder / f"{split}.npy", mmap_mode="r") for split in recordings}, folder
    except (ValueError, EOFError):
        raise UserError(f"what was prepared in {folder} is damaged: delete that folder, and it is made anew") from None


def make_part(job):
    """Integrates the recordings of one part and saves it: what a worker does.

    Args:
      job: {"path", "recordings", "T", "split_by", "normalization", "sensor"}, as JSON can carry it.
    """
    dtype = np.uint8 if job["normalization"] is None else np.float32
    part = np.empty((len(job["recordings"]), job["T"], *job["sensor"], 2), dtype)
    for i, recording in enumerate(job["recordings"]):
        x_THWC = integrate(recording, job["sensor"], job["T"], job["split_by"], job["normalization"])
        if job["normalization"] is None and x_THWC.max() > np.iinfo(part.dtype).max:
            part = part.astype(np.min_scalar_type(x_THWC.max()))
        part[i] = x_THWC
    storage.save(job["path"], part)


def integrate(recording, sensor, T, split_by="number", normalization=None):
    """The frames of one `recordings.Recording`; a UserError names its file."""
    path, _, start, end = recording
    events = event_readers.read_once(path)
    if end is not None:
        events = events[(events["t"] >= start) & (events["t"] < end)]
    try:
        return frames.integrate(events, *sensor, T, split_by, normalization)
    except UserError as error:
        cut = "" if end is None else f" between {start} and {end} us"
        raise UserError(f"{path}{cut}: {error}") from None


def _stat(path):
    """What tells a file from another of its name: its last three names, size and time of change, not where it lies."""
    with storage.reading(path):
        stat = os.stat(path)
    return [*Path(path).parts[-3:], stat.st_size, stat.st_mtime_ns]


def _digest(recordings, stat, *more):
    """Digests which recordings these are, with the label and the cut of each, and what `more` there is to tell."""
    digest = hashlib.sha256(json.dumps(more).encode())
    for path, *rest in recordings:
        digest.update(json.dumps([*stat(path), *rest]).encode())
    return digest.hexdigest()


def _complete(folder):
    """Whether `folder` holds a set that was finished and is still as it was then."""
    try:
        sizes = json.loads((folder / "record.json").read_text())["bytes"]
        return all((folder / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _by_file(recordings):
    """The recordings' numbers in an order in which the cuts of a file follow one another, for it to be read once."""
    first = {}
    for i, recording in enumerate(recordings):
        first.setdefault(recording.path, i)
    return sorted(range(len(recordings)), key=lambda i: first[recordings[i].path])


def _make(folder, parts, jobs, orders, record, name):
    """Makes the parts that are missing, joins them, and writes the record last; `name` titles the bar, False: none."""
    with storage.writing(parts):
        parts.mkdir(parents=True, exist_ok=True)
    for partial in [*parts.glob("*.partial"), *folder.glob("*.partial")]:  # of a killed program: we hold the lock
        partial.unlink(missing_ok=True)
    every = [job for ours in jobs.values() for job in ours]
    total = sum(len(job["recordings"]) for job in every)
    with tqdm(total=total, desc=f"preparing {name}", unit=" recordings", disable=not name) as bar:
        missing = []
        for job in every:
            if _is_made(job):
                bar.update(len(job["recordings"]))
            else:
                missing.append(job)
        _run(missing, lambda job: bar.update(len(job["recordings"])))
    sizes = {}
    with storage.writing(folder):
        folder.mkdir(exist_ok=True)
    for split, ours in jobs.items():
        storage.join(folder / f"{split}.npy", [job["path"] for job in ours], orders[split])
        sizes[f"{split}.npy"] = (folder / f"{split}.npy").stat().st_size
    versions = {"plif_jax": plif_jax.__version__, "numpy": np.__version__}
    with storage.writing(folder / "record.json"):
        files.write(folder / "record.json", json.dumps({**record, "bytes": sizes, "versions": versions}, indent=2))
    for job in every:  # and no others: they are of a preparation that was interrupted
        Path(job["path"]).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # that, or a killed program's worker is still at one
        parts.rmdir()
    if name:
        print(f"{name}: frames are kept in {folder}, {sum(sizes.values()) / 1e6:.0f} MB")


def _jobs(folder, recordings, settings, stat):
    """Divides recordings into parts, the cuts of a file in one where they fit in it."""
    bytes_each = settings["T"] * settings["sensor"][0] * settings["sensor"][1] * 2
    size = max(1, min(PART_RECORDINGS, PART_BYTES // bytes_each))
    parts = [[]]
    for _, cuts in itertools.groupby(recordings, key=lambda recording: recording.path):
        cuts = list(cuts)
        for some in (cuts[first : first + size] for first in range(0, len(cuts), size)):
            if parts[-1] and len(parts[-1]) + len(some) > size:
                parts.append([])
            parts[-1] += some
    return [
        {"path": str(folder / f"{_digest(ours, stat, FORMAT, settings['sensor'])}.npy"), "recordings": ours, **settings}
        for ours in parts
    ]


def _is_made(job):
    """Whether the part of a job lies there whole."""
    try:
        return len(np.load(job["path"], mmap_mode="r")) == len(job["recordings"])
    except (OSError, ValueError, EOFError):
        return False


def _run(jobs, done):
    """Does jobs, on all cores if they are many, and calls `done` with each; stops at the first that fails."""
    if sum(os.path.getsize(path) for path in {r[0] for job in jobs for r in job["recordings"]}) < ALONE_BYTES:
        event_readers.read_once.cache_clear()  # a file may have been written anew since an earlier preparation
        for job in jobs:
            make_part(job)
            done(job)
        return
    waiting, lock, errors = list(reversed(jobs)), threading.Lock(), []

    def next_job():
        with lock:
            return waiting.pop() if waiting and not errors else None

    def drive_a_worker(_):
        # Plain programs rather than multiprocessing: that would import the caller's script once more in every worker,
        # or fork a process in which JAX runs threads.
        command = [sys.executable, "-P", "-c", WORKER, plif_jax.__file__]  # -P: not what lies in the user's folder
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        # In a session of its own, which Ctrl-C does not reach: it goes on until it is told nothing more.
        with subprocess.Popen(command, **pipes, start_new_session=True) as worker:
            while (job := next_job()) is not None:
                try:
                    worker.stdin.write(json.dumps(job) + "\n")
                    worker.stdin.flush()
                except BrokenPipeError:  # the worker has ended: its answer is empty
                    with contextlib.suppress(BrokenPipeError):
                        worker.stdin.close()  # which tries once more to send what is left
                answer = worker.stdout.readline()
                early = "a worker ended early, with status {}: is there enough memory?"
                error = json.loads(answer)["error"] if answer else early.format(worker.wait())
                if error:
                    errors.append(error)
                    return
                with lock:
                    done(job)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(len(jobs), cores)
    with ThreadPoolExecutor(workers) as pool:
        try:
            list(pool.map(drive_a_worker, range(workers)))
        except BaseException as error:  # Ctrl-C, say: let workers finish the part they are at, and no other
            errors.append(repr(error))
            if not isinstance(error, Exception):
                tqdm.write("Stopping once the recordings at work are done; the same command goes on from there.")
            raise
    if errors:
        raise UserError(errors[0])
