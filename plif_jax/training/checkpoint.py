"""Checkpoints: Orbax writes them in the background, a seal tells whether one can be trusted.

One folder per step holds the state's arrays by name, a JSON record of the settings and the progress, and the seal, put
on before the folder gets its name, and looked at before Orbax sees it. Kept are the last two, the best, and one every
four hours. Nothing is pickled.
"""

import contextlib
import copy
import dataclasses
import fcntl
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSeconds, LatestN

from plif_jax.config import Config
from plif_jax.errors import UserError, first_line
from plif_jax.spiking_net import layer_settings
from plif_jax.training import devices
from plif_jax.training import state as states
from plif_jax.training.seals import REPLACED, SEAL, damage_of, digests, examined, step_of, steps

KEEP_EVERY_SECONDS = 4 * 3600

# Settings that do not change what a step computes: a run may continue with other values.
MAY_CHANGE = {
    "max_epoch",
    "eval_every",
    "steps_per_call",
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


def check_place(folder: Path):
    """Raises a UserError where Orbax cannot write, or, since it takes its paths for patterns, not read again."""
    folder = folder.absolute()
    try:
        str(folder).encode()
    except UnicodeEncodeError:  # bytes that are no letters
        raise UserError(f"checkpoints cannot lie in {str(folder)!a}: give a -log_dir_prefix in UTF-8") from None
    if unfit := set("[]\\") & set(str(folder)):
        raise UserError(f"checkpoints cannot lie in {folder}: give a -log_dir_prefix without {min(unfit)}")


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: where they lie; made if missing. One program at a time holds it.
      config: the run's settings; a checkpoint of other settings is refused.
      say: prints a line for people.

    Raises:
      UserError: another program trains in the folder, or checkpoints cannot lie there; `save` and `wait`: one could not
        be written.
    """

    def __init__(self, folder: Path, config: Config, say=print):
        self.folder, self.config, self.say = folder.absolute(), config, say
        check_place(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / ".lock").open("w")
        with contextlib.ExitStack() as failing:
            failing.callback(self._lock.close)  # in a notebook the exception would keep it open
            if jax.process_index() == 0:
                self._take_lock()
                self._set_damaged_aside()
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("checkpoints are checked")
            self._manager = ocp.CheckpointManager(self.folder, options=self._options())
            failing.pop_all()
        self._writer, self._writing = ThreadPoolExecutor(1), None

    def _take_lock(self):
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another program is training in {self.folder}; wait for it, or give -log_dir_prefix"
            ) from None
        except OSError as error:
            raise UserError(
                f"{self.folder} lies where files cannot be locked ({error.strerror}); give another -log_dir_prefix"
            ) from None

    def _options(self):
        policy = AnyPreservationPolicy([LatestN(2), _Best(), EveryNSeconds(KEEP_EVERY_SECONDS)])
        # Called when the files are written but their folder is not renamed yet from its temporary name.
        sealing = ocp.options.AsyncOptions(post_finalization_callback=self._seal_finished)
        return ocp.CheckpointManagerOptions(
            best_fn=lambda metrics: metrics["score"], preservation_policy=policy, async_options=sealing
        )

    def _seal_finished(self):
        if jax.process_index() == 0:
            for folder in self.folder.glob("*.orbax-checkpoint-tmp*"):
                (folder / SEAL).write_text(json.dumps(digests(folder)))

    def _set_damaged_aside(self):
        for path in self.folder.glob(f"{REPLACED}*"):  # by a program that was killed before it had written another
            step = self.folder / str(step_of(path))
            if step.exists() and damage_of(step) is None:
                shutil.rmtree(path, ignore_errors=True)
            else:
                shutil.rmtree(step, ignore_errors=True)
                path.rename(step)
        sound, damaged, half_removed = examined(self.folder)
        half_written = self.folder.glob("*.orbax-checkpoint-tmp*")  # of a program that was killed
        for path in (*half_removed, *half_written):
            shutil.rmtree(path, ignore_errors=True)
        for path, damage in damaged.items():
            aside = self.folder / f"damaged_{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            newest = sound and int(path.name) > int(sound[0].name)
            instead = f"; using that of step {sound[0].name}" if newest else ""
            self.say(f"checkpoint of step {path.name} is damaged ({damage}), it is now {aside}{instead}")
        for found in ocp.path.step.standard_name_format().find_all(self.folder):
            try:
                found.commit_timestamp  # noqa: B018
            except Exception:  # damaged, Orbax's note of the time stops it; missing, it takes the folder's
                (found.path / "_CHECKPOINT_METADATA").unlink()
        if damaged and not sound:
            self.say(f"{self.folder} holds no other checkpoint: the training begins anew")

    def save(self, state, progress: dict, score: float):
        """Starts writing a checkpoint; the training goes on meanwhile.

        `progress` is what the loop needs to continue, JSON; `score` decides which checkpoint is best.
        """
        self.wait()
        for leaf in jax.tree.leaves(state):
            leaf.copy_to_host_async()
        # On a CPU these are views: JAX writes no new value into memory that something else still looks at.
        arrays = {name: np.asarray(leaf) for name, leaf in _names(state).items()}
        record = {
            "config": dataclasses.asdict(self.config),
            "progress": copy.deepcopy(progress),  # the training changes it meanwhile
            "score": score,
        }
        step = int(arrays["step"])
        # NumPy arrays: across processes a pmap's results are arrays of each process alone, which Orbax does not take.
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), record=ocp.args.JsonSave(record))

        def write():
            if step in self._manager.all_steps():  # a run stopped before or in an evaluation saved this step already
                self._set_replaced_aside(step)
            self._manager.save(step, args=items, metrics={"score": score})

        # Before it writes in the background Orbax copies everything and makes folders: that too is better done there.
        # Several processes meet in it, and must not do so beside the meetings of the training.
        if jax.process_count() == 1:
            self._writing = self._writer.submit(write)
        else:
            self._guard(write)

    def _set_replaced_aside(self, step):
        """Takes a step's checkpoint out of Orbax's sight, until the one that replaces it is on the disk."""
        if jax.process_index() == 0:
            (self.folder / str(step)).rename(self.folder / f"{REPLACED}{step}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("a checkpoint is put by")
        self._manager.reload()

    def wait(self):
        """Waits until what was started is on the disk."""
        self._guard(self._finish_writing)

    def _finish_writing(self):
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            for path in self.folder.glob(f"{REPLACED}*"):
                if (self.folder / str(step_of(path))).exists():  # not after a save that failed
                    shutil.rmtree(path, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            if error is None:
                self.wait()
        except BaseException as failed:
            error = failed
            raise
        finally:
            self._writer.shutdown()
            # Closing waits for the other processes, of which one may be gone.
            if error is None or jax.process_count() == 1:
                with contextlib.suppress(Exception):  # what is already being raised says more
                    self._manager.close()
            self._lock.close()

    def _guard(self, write):
        try:
            write()
        except (OSError, ValueError, RuntimeError) as error:
            good = steps(self.folder)
            kept = f"the last good one is of step {step_of(good[0])}" if good else "there is no earlier one"
            reason = first_line(error)
            raise UserError(f"a checkpoint could not be written to {self.folder} ({reason}); {kept}") from None

    def restore(self, template):
        """The newest checkpoint as (state, progress), placed as `template` is; None where there is none.

        Raises:
          UserError: the checkpoint is of other settings, which are named, or of another network.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        record = _read_record(self.folder / str(step))
        self._refuse_others(record["config"])
        if lost := _lost_best(steps(self.folder)):
            self.say(
                f"the checkpoint of the best epoch, {lost}, is gone: its figures stay the best, its weights are lost"
            )
        return _read_state(self.folder / str(step), template), record["progress"]

    def _refuse_others(self, before):
        now = dataclasses.asdict(self.config)
        ignored = MAY_CHANGE | {*self.config.unused}
        differing = [
            f"{name} was {before.get(name)}, is {value}"
            for name, value in now.items()
            if name not in ignored and before.get(name) != value
        ]
        if differing:
            raise UserError(
                f"{self.folder} holds a run with other settings: {'; '.join(differing)}. "
                "Give these again to continue it, or another -log_dir_prefix"
            )


def _read_record(folder):
    # The handler itself, here and below: a `Checkpointer` would warn that a part has no metadata of a whole checkpoint.
    with contextlib.closing(ocp.JsonCheckpointHandler()) as handler:
        return handler.restore(folder / "record")


def _read_state(folder, template):
    named = _names(template)
    abstract = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for name, leaf in named.items()
    }
    args = ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        _refuse_another_network(folder, handler.metadata(folder / "state").tree, abstract)
        arrays = handler.restore(folder / "state", args=args)
    return jax.tree.unflatten(jax.tree.structure(template), [arrays[name] for name in named])


def _refuse_another_network(folder, saved, abstract):
    there, here = ({name: tuple(leaf.shape) for name, leaf in tree.items()} for tree in (saved, abstract))
    differing = [name for name in {**here, **there} if there.get(name) != here.get(name)]
    # What follows from a parameter comes before it.
    _refuse(folder, sorted(differing, key=lambda name: not name.startswith("params")), there, here)


def refuse_other_layers(folder, there, here):
    """Raises a UserError where layers are others than those of a checkpoint, both as `layer_settings` tells them."""
    both = there.keys() & here.keys()
    # What only one version of the code tells says nothing.
    told = there and [name for name in {**here, **there} if name in both or name.rpartition(".")[0] not in both]
    _refuse(folder, [name for name in told if there.get(name) != here.get(name)], there, here)


def _refuse(folder, differing, there, here):
    if differing:
        there, here = (str(told.get(differing[0], "missing")) for told in (there, here))
        raise UserError(
            f"{folder} is of another network than the code makes now: {differing[0]} is {there} there, {here} here. Go "
            "back to that network, or train this one under another -log_dir_prefix"
        )


def load_network(run: str | Path, kind: str = "best"):
    """A finished or running run's settings and network, in evaluation mode, from its checkpoint.

    Args:
      run: the run's folder.
      kind: "best" or "latest".

    Returns:
      (config, net)

    Raises:
      UserError: the folder is not a run's, has no sound checkpoint, or one of another network; or an unknown kind.

    JAX computes in 64 bits afterwards where the run did, and in 32 where not.
    """
    return load_checkpoint(run, kind)[:2]


def load_checkpoint(run: str | Path, kind: str = "best"):
    """As `load_network`, but (config, net, what the checkpoint is): the best may be gone, or none was tested."""
    if kind not in ("best", "latest"):
        raise UserError(f"there is no {kind!r} checkpoint; give best or latest")
    run = Path(run).absolute()  # "." has no name, by which its checkpoints lie beside it
    if not (run.parent / f"pt_{run.name}").is_dir():
        run = run.resolve()  # beside what a link leads to
    try:
        config = Config.of_run(run)
    except OSError:
        beside = run.parent / run.name.removeprefix("pt_")
        hint = f"; its checkpoints are here, the run is {beside}" if (beside / "config.json").exists() else ""
        raise UserError(f"{run} is not the folder of a run: it has no config.json{hint}") from None
    folder = run.parent / f"pt_{run.name}"
    states.set_precision(config)
    devices.start()
    graphdef, template = states.create(config, states.adam(config, 1), jax.local_devices()[:1], abstract=True)
    try:
        state, layers, what = _read_chosen(folder, kind, template)
    except UserError:
        raise
    except Exception:  # Orbax's and TensorStore's, of a folder of which a part is gone
        # A running run has removed it since; by the next time it has long to go.
        state, layers, what = _read_chosen(folder, kind, template)
    net = nnx.merge(graphdef, state.params, state.batch_stats)
    refuse_other_layers(folder, layers, layer_settings(net))
    net.set_attributes(axis_name=None)
    net.eval()
    return config, net, what


def _read_chosen(folder, kind, template):
    """(state, the layers' settings, what it is) of a folder's best or latest sound checkpoint."""
    sound, damaged, _ = examined(folder)
    for path, damage in damaged.items():
        print(f"checkpoint of step {path.name} is damaged ({damage}); looking at the others")
    if not sound:
        raise UserError(f"there is no sound checkpoint in {folder}")
    # The first is the newest: of equal scores the later counts.
    path, what = sound[0], f"{kind} checkpoint"
    if kind == "best":
        path = max(sound, key=lambda path: _read_record(path)["score"])
        if lost := _lost_best(sound):
            print(
                f"the checkpoint of the best epoch, {lost}, is gone; this is the best that is left, of step {path.name}"
            )
            what = f"checkpoint of step {path.name}, not the best epoch's"
        elif _read_record(path)["score"] < 0:
            print("no checkpoint that is left was tested, so none is the best; this is the latest")
            what = "latest checkpoint, none was tested"
    return _read_state(path, template), _read_record(path)["progress"].get("layers", {}), what


def _lost_best(paths):
    """The best epoch that the newest of these checkpoints tells of, where none of them is its; None where one is."""
    best = _read_record(paths[0])["progress"].get("best")
    if best and all(_read_record(path)["score"] < best["score"] for path in paths):
        return best["epoch"]
    return None
