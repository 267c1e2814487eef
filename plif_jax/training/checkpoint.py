"""Checkpoints: Orbax writes them in the background, a digest tells whether one can be trusted.

One folder per step holds the state's arrays by name, and a JSON record: the settings, the progress, and a checksum of
every array. Kept are the last two, the best, and one every four hours. Nothing is pickled.
"""

import contextlib
import dataclasses
import fcntl
import json
import shutil
import zlib
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSeconds, LatestN

from plif_jax.config import Config
from plif_jax.errors import UserError
from plif_jax.training import state as states

KEEP_EVERY_SECONDS = 4 * 3600

# Settings that do not change what a run computes: a run may continue with other values.
MAY_CHANGE = {
    "max_epoch",
    "device",
    "log_dir_prefix",
    "data_root",
    "cache_dir",
    "data_on_device",
    "coordinator",
    "num_processes",
    "process_id",
}


class _Best:
    """Preserves the checkpoint with the best score; of equals the later, as the paper's program has it."""

    def should_preserve(self, checkpoints, *, context):
        scores = [((c.metrics or {}).get("score", -1.0), c.step) for c in checkpoints]
        return [score == max(scores) for score in scores]


def _names(tree):
    """A pytree's leaves by readable names."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _digest(arrays):
    return {name: zlib.crc32(np.ascontiguousarray(array).data) for name, array in arrays.items()}


def _seal(record):
    """Checksum of a record itself: of its text, which JSON gives back to the digit."""
    return zlib.crc32(json.dumps({**record, "seal": None}, sort_keys=True).encode())


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: where they lie; made if missing. One program at a time holds it.
      config: the run's settings; a checkpoint of other settings is refused.
      say: prints a line for people.

    Raises:
      UserError: another program trains in the folder.
    """

    def __init__(self, folder: Path, config: Config, say=print):
        self.folder, self.config, self.say = folder.absolute(), config, say
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / ".lock").open("w")
        if jax.process_index() == 0:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"another program is training in {folder}; wait for it, or give -log_dir_prefix"
                ) from None
        self._manager = _manager(self.folder)

    def save(self, state, progress: dict, score: float):
        """Starts writing a checkpoint; the training goes on meanwhile.

        `progress` is what the loop needs to continue, JSON; `score` decides which checkpoint is best.
        """
        arrays = {name: np.asarray(leaf) for name, leaf in _names(state).items()}
        record = {
            "config": dataclasses.asdict(self.config),
            "progress": progress,
            "score": score,
            "crc32": _digest(arrays),
        }
        record["seal"] = _seal(record)
        step = int(arrays["step"])
        # NumPy arrays: across processes a pmap's results are arrays of each process alone, which Orbax does not take.
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), record=ocp.args.JsonSave(record))

        def write():
            if step in self._manager.all_steps():  # a run stopped in an evaluation saved this step already
                self._manager.delete(step)
            self._manager.save(step, args=items, metrics={"score": score})

        self._guard(write)

    def wait(self):
        """Waits until what was started is on the disk."""
        self._guard(self._manager.wait_until_finished)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is None:
            self.wait()
        if error is None or jax.process_count() == 1:  # closing waits for the other processes, of which one may be gone
            with contextlib.suppress(Exception):  # what is already being raised says more
                self._manager.close()
        self._lock.close()

    def _guard(self, write):
        try:
            write()
        except (OSError, ValueError, RuntimeError) as error:
            good = self._manager.all_steps()
            kept = f"the last good one is of step {max(good)}" if good else "there is no earlier one"
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"a checkpoint could not be written to {self.folder} ({reason}); {kept}") from None

    def restore(self, template):
        """The newest sound checkpoint as (state, progress), placed as `template` is; None where there is none.

        A damaged one is reported, set aside, and the one before it used.

        Raises:
          UserError: the checkpoint is of other settings; they are named.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                record = _read_record(self.folder / str(step))
                self._refuse_others(record["config"])
                state = _read_state(self.folder / str(step), record, template)
                return state, record["progress"]
            except _Damaged as damage:
                self.say(f"checkpoint of step {step} is damaged ({damage}); trying the one before it")
                if jax.process_index() == 0:
                    shutil.move(self.folder / str(step), self.folder / f"damaged_{step}")
                self._manager.reload()
        return None

    def _refuse_others(self, before):
        now = dataclasses.asdict(self.config)
        differing = [
            f"{name} was {before.get(name)}, is {value}"
            for name, value in now.items()
            if name not in MAY_CHANGE and before.get(name) != value
        ]
        if differing:
            raise UserError(
                f"{self.folder} holds a run with other settings: {'; '.join(differing)}. "
                "Give these again to continue it, or another -log_dir_prefix"
            )


class _Damaged(Exception):
    """A checkpoint that cannot be trusted."""


def _manager(folder):
    policy = AnyPreservationPolicy([LatestN(2), _Best(), EveryNSeconds(KEEP_EVERY_SECONDS)])
    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["score"], preservation_policy=policy)
    return ocp.CheckpointManager(folder, options=options)


def _read_record(folder):
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        try:
            record = checkpointer.restore(folder / "record")
        except Exception as error:  # whatever a reader makes of damaged bytes
            raise _Damaged(f"its record: {_first_line(error)}") from None
    if not isinstance(record, dict) or record.get("seal") != _seal(record):
        raise _Damaged("checksum of its record")
    return record


def _read_state(folder, record, template):
    named = _names(template)
    abstract = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for name, leaf in named.items()
    }
    args = ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            arrays = checkpointer.restore(folder / "state", args=args)
        except Exception as error:  # as above
            raise _Damaged(_first_line(error)) from None
    digest = _digest({name: np.asarray(array) for name, array in arrays.items()})
    wrong = [name for name in digest if digest[name] != record["crc32"].get(name)]
    if wrong:
        raise _Damaged(f"checksum of {wrong[0]}")
    return jax.tree.unflatten(jax.tree.structure(template), [arrays[name] for name in named])


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_network(run: str | Path, kind: str = "best"):
    """A finished or running run's settings and network, in evaluation mode, from its checkpoint.

    Args:
      run: the run's folder.
      kind: "best" or "latest".

    Returns:
      (config, net)

    Raises:
      UserError: the folder is not a run's, or has no sound checkpoint.
    """
    run = Path(run)
    try:
        config = Config.from_json((run / "config.json").read_text())
    except OSError:
        raise UserError(f"{run} is not the folder of a run: it has no config.json") from None
    folder = run.parent / f"pt_{run.name}"
    states.set_precision(config)
    graphdef, template = states.create(config, states.adam(config, 1), jax.local_devices()[:1])
    found = []
    for path in folder.absolute().glob("[0-9]*"):
        with contextlib.suppress(_Damaged):
            record = _read_record(path)
            found.append((record["score"] if kind == "best" else 0, int(path.name), path, record))
    for _, _, path, record in sorted(found, key=lambda entry: entry[:2], reverse=True):
        with contextlib.suppress(_Damaged):
            state = _read_state(path, record, template)
            net = nnx.merge(graphdef, state.params, state.batch_stats)
            net.set_attributes(axis_name=None)
            net.eval()
            return config, net
    raise UserError(f"{run} has no sound checkpoint in {folder}")
