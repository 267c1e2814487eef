"""The training loop: epochs of steps, evaluation, logs and checkpoints."""

import dataclasses
import itertools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from plif_jax import data, files
from plif_jax.config import expanded
from plif_jax.data import batches
from plif_jax.errors import UserError
from plif_jax.neurons import PLIF
from plif_jax.spiking_net import layer_settings
from plif_jax.training import devices, distributed, report, signals, state, step
from plif_jax.training.checkpoint import Checkpoints, check_place, refuse_other_layers
from plif_jax.training.logs import Logs

SAVE_EVERY_SECONDS = 600  # in the middle of an epoch: a kill costs no more of a long one
LOG_EVERY = 256  # steps between train_loss and train_accuracy, as the paper's program logs


def train(config, say=print, dataset=None) -> dict:
    """Trains as the settings say, or continues where an earlier call was stopped, and returns the result.

    Accuracy-A (Fang et al., 2021): the best test accuracy over epochs. With `val_ratio`, accuracy-B: the test accuracy
    of the epoch with the best validation accuracy. Of equal epochs the later counts. Writes TensorBoard scalars,
    checkpoints, `config.json`, `result.json` and `summary.png`.

    Args:
      config: the settings, a `plif_jax.config.Config`.
      say: takes each line of the report; None for no report and no bars. Messages about fetching and
        unpacking data are printed all the same.
      dataset: a `plif_jax.data.dataset.Dataset` in place of what the settings name: another split, or samples of your
        own in its form.

    JAX computes in 64 bits afterwards where `precision` is float64, and in 32 where not. It keeps the programs that it
    compiled: between many runs in one process call `jax.clear_caches()`.

    Raises:
      UserError: a setting, the data or a checkpoint does not allow the run; or a loss or gradient is not finite.
      signals.Interrupted: SIGTERM or SIGINT asked the run to stop; it has saved, and the same call continues it.
    """
    bars, say = say is not None, say or (lambda line: None)
    state.set_precision(config)
    distributed.join(config, say)
    devices.start()
    settings = dataclasses.asdict(config).items()
    distributed.agree({f"-{name}": value for name, value in settings if name not in distributed.MAY_DIFFER})
    if jax.process_index() != 0:
        bars, say = False, lambda line: None
    chosen = devices.choose(config, say)
    devices.keep_compiled(chosen, config.cache_dir)
    check_place(config.checkpoint_dir)
    try:  # what cannot be written should not cost the preparation of the data
        expanded(config.log_dir_prefix).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"-log_dir_prefix {config.log_dir_prefix} cannot be written: {error.strerror}") from None
    dataset = data.load(config, progress=bars) if dataset is None else dataset
    given = [split.x.shape[1] for split in (dataset.train, dataset.test)] if config.facts.events else []
    if set(given) - {config.T}:
        raise UserError(
            f"T is {config.T}, but training and test frames have {given[0]} and {given[1]} steps; make them the same"
        )
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        say(f"{dataset.name} {name}: {split.found} of {split.expected} samples from {dataset.source}")
    for name in config.without_effect():
        say(f"-{name} {getattr(config, name)} has no effect: {dataset.name} does not use it")
    try:
        parts = batches.partition(config, dataset)
        if (config.train_samples, config.test_samples, config.val_ratio) != (None, None, None):
            used = [f"{len(parts[name])} {name}" for name in ("train", "val", "test") if name in parts]
            say(f"of these are used: {', '.join(used)}")
        # Listening to the end: a signal while the last checkpoint is written must not stop that.
        with signals.listening() as stop, Checkpoints(config.checkpoint_dir, config, say) as checkpoints:
            return Run(config, dataset, parts, chosen, checkpoints, stop, say, bars).finish()
    except BrokenPipeError:  # nobody reads what is said any more
        raise
    except OSError as error:  # of logs, pictures and what is said; checkpoints say more themselves
        raise UserError(
            f"{error.filename2 or error.filename or f'{config.run_dir}, or standard output,'} cannot be written: "
            f"{error.strerror or error}. "
            "Mend that and start again: the run continues from its last checkpoint"
        ) from None


class Run:
    """A run in progress: the state on the devices, and how far it has come.

    `progress` is what a checkpoint keeps beside the state: the epochs done, summed loss and accuracy of the steps of
    the epoch begun, how many scalars were logged, seconds spent, the figures of the best and the last epoch, and what
    tells the data and the layers from others.
    """

    def __init__(self, config, dataset, parts, chosen, checkpoints, stop, say, bars):
        self.config, self.devices, self.checkpoints, self.stop = config, chosen, checkpoints, stop
        self.say, self.bars = say, bars
        self.main = jax.process_index() == 0
        self.parts = parts
        digests = {name: batches.digest(part) for name, part in self.parts.items()}
        distributed.agree({f"{d['samples']} samples of {n},": f"digest {d['sha256'][:8]}" for n, d in digests.items()})
        self.steps_per_epoch = len(self.parts["train"]) // config.batch_size
        optimizer = state.adam(config, self.steps_per_epoch)
        self.graphdef, self.state = state.create(config, optimizer, chosen)
        train_feed = batches.Feed(dataset.train, chosen, config.data_on_device)
        test_feed = batches.Feed(dataset.test, chosen, config.data_on_device)
        self.feeds = {"train": train_feed, "val": train_feed, "test": test_feed}
        self.train_steps = step.make_train(config, self.graphdef, optimizer, chosen, train_feed.axis)
        self.evaluate_batches = {
            axis: step.make_evaluate(config, self.graphdef, chosen, axis) for axis in {train_feed.axis, test_feed.axis}
        }
        self.progress = {
            "epoch": 0,
            "sums": [0.0, 0.0],
            "points": None,
            "best": None,
            "last": None,
            "seconds": 0.0,
            "steps_timed": 0,
            "seconds_timed": 0.0,
            "hardware": report.hardware(chosen),
            "data": digests,
            "layers": layer_settings(self._network()),
        }
        self.taus_before = self.taus()
        self.asked = 0  # the signal that some process was sent
        self.compiled = set()  # steps per dispatch, of each of which the first call compiles
        restored = checkpoints.restore(self.state)
        if restored is not None:
            self.state, progress = restored
            self._refuse_other_data(progress["data"])
            refuse_other_layers(config.checkpoint_dir, progress.get("layers", {}), self.progress["layers"])
            self.progress |= progress
            say(f"continuing after epoch {self.progress['epoch']}, step {int(self.state.step)}")
            differing = report.differences(self.progress["hardware"], report.hardware(chosen))
            if differing and self.progress["epoch"] < config.max_epoch:
                say(f"elsewhere than before, where numbers may round otherwise: {', '.join(differing)}")
        if self.main:
            self.logs = Logs(config.run_dir, self.progress["points"], say)
            files.write(config.run_dir / "config.json", config.to_json())
        self.saved = time.monotonic()
        self.started = self.saved - self.progress["seconds"]

    def finish(self) -> dict:
        """Trains the epochs that are left and returns the result."""
        if self.progress["epoch"] >= self.config.max_epoch:
            self.say(f"finished already: {self.progress['epoch']} epochs are done; a larger -max_epoch trains on")
        for epoch in range(self.progress["epoch"], self.config.max_epoch):
            figures = self.train_epoch(epoch)
            if (epoch + 1) % self.config.eval_every == 0 or epoch + 1 == self.config.max_epoch:
                figures |= {f"{name}_accuracy": self.accuracy(name) for name in self.parts if name != "train"}
            self.conclude(epoch, figures)
        result = report.result(self)
        if self.main:
            report.write_result(self.config, result)
            report.conclude(self.config, result, self.say)
        return result

    def train_epoch(self, epoch) -> dict:
        """Takes the epoch's steps that are left and returns its mean loss and accuracy."""
        index_SB = batches.training_batches(self.config.seed, epoch, self.parts["train"], self.config.batch_size)
        first = epoch * self.steps_per_epoch
        done = timed_from = int(self.state.step) - first
        sizes = self.call_sizes(done)
        if sizes:  # and not where a finished run is only called again
            self._note_hardware()
        sums, count, pending = np.array(self.progress["sums"]), done, None
        bar = tqdm(
            total=len(index_SB),
            initial=done,
            desc=f"epoch {epoch + 1}/{self.config.max_epoch}",
            unit="step",
            leave=False,
            mininterval=0.2 if sys.stderr.isatty() else 10,
            disable=not self.bars,
        )
        calls = self.feeds["train"].chunks(index_SB[done:], sizes)

        def read():
            """Takes the figures of the call that is pending, for which it waits."""
            nonlocal sums, count, pending
            if pending is not None:
                sums += self._account(*pending, index_SB)
                count += pending[1]
                bar.set_postfix(loss=f"{sums[0] / count:.4f}", accuracy=f"{sums[1] / count:.3f}", refresh=False)
                bar.update(pending[1])
                pending = None

        def stop_clock():
            """Counts the steps since the clock began, if any, as timed."""
            if count > timed_from:
                self.progress["steps_timed"] += count - timed_from
                self.progress["seconds_timed"] += time.monotonic() - began

        with bar:
            began = time.monotonic()
            for size, arguments in zip(sizes, calls, strict=True):
                compiles = size not in self.compiled
                if compiles:
                    read()
                    if self.asked:
                        break
                    stop_clock()
                asked = np.full(len(arguments[-1]), self.stop.signum or 0, np.int32)
                self.state, metrics = self.train_steps(self.state, *arguments, asked)
                read()  # of the call before: that does not make the devices wait
                pending = (first + done, size, metrics)
                done += size
                if compiles:
                    read()
                    self.compiled.add(size)
                    began, timed_from = time.monotonic(), done
                # Several processes would have to agree on the time.
                if jax.process_count() == 1 and time.monotonic() - self.saved > SAVE_EVERY_SECONDS:
                    read()
                    self._save_in_mid_epoch(sums)
                if self.asked:
                    break
            read()
            self.progress["sums"] = sums.tolist()
            stop_clock()
        self._refuse_lost_weights()
        if self.asked:
            self._save_and_stop(self.asked)
        loss, accuracy = (sums / max(count, 1)).tolist()
        return {"loss": loss, "train_accuracy": accuracy}

    def _note_hardware(self):
        """Notes where steps are done; elsewhere than those before, what is told of speed begins anew."""
        here = report.hardware(self.devices)
        if self.progress["hardware"] != here:
            self.progress |= {"hardware": here, "steps_timed": 0, "seconds_timed": 0.0}

    def call_sizes(self, done):
        """Steps per dispatch for the rest of an epoch; the cuts are the same wherever a run was stopped."""
        K = steps_per_call(self.config, self.devices)
        if self.config.steps_per_call is None:  # one that divides, if it is near: a shorter last call is a program more
            K = max((k for k in range(-(-3 * K // 4), K + 1) if self.steps_per_epoch % k == 0), default=K)
        rest = self.steps_per_epoch // K * K
        cuts = [*range(0, rest, K), *range(rest, self.steps_per_epoch + 1)]
        # A run that was stopped on other devices, with another K, may be between two cuts.
        return [end - start for start, end in itertools.pairwise([done, *(cut for cut in cuts if cut > done)])]

    def _account(self, first, size, metrics, index_SB):
        """Logs the figures of a call's steps; returns their summed loss and accuracy."""
        loss, accuracy, healthy = (np.asarray(metrics[name]) for name in ("loss", "accuracy", "healthy"))
        self.asked = int(metrics["asked"])
        if not healthy.all():
            self._explain_failure(first + int(np.argmin(healthy)), index_SB)
        if self.main:
            for i in range(-first % LOG_EVERY, size, LOG_EVERY):
                self.logs.add("train_accuracy", accuracy[i], first + i)
                self.logs.add("train_loss", loss[i], first + i)
        return np.array([loss.sum(dtype=float), accuracy.sum(dtype=float)])

    def _explain_failure(self, at, index_SB):
        position = at % self.steps_per_epoch
        split = self.parts["train"].split
        x, y = split.x[index_SB[position]], split.y[index_SB[position]]
        before = jax.tree.map(jnp.asarray, jax.device_get(self.state))
        self._fail(at, step.first_failure(self.config, self.graphdef, before, x, y) or "the loss")

    def _refuse_lost_weights(self):
        """Stops where the last update made weights of which nothing comes back, before they are tested or saved."""
        lost = step.first_lost(self.state.params)
        if lost:
            self._fail(int(self.state.step) - 1, f"the norm of the weights of {lost} after the update")

    def _fail(self, at, what):
        raise UserError(
            f"epoch {at // self.steps_per_epoch + 1}, step {at}: {what} is not finite. Nothing was saved since the "
            f"last checkpoint; -seed {self.config.seed} gives the same batch again; a smaller -learning_rate may help"
        )

    def _refuse_other_data(self, before):
        now = self.progress["data"]
        differing = [
            f"{name} has {now[name]['samples']} samples, had {before[name]['samples']}"
            if now[name]["samples"] != before[name]["samples"]
            else f"the samples of {name} are others"
            for name in now
            if now[name] != before[name]
        ]
        if differing:
            raise UserError(
                f"{self.config.checkpoint_dir} holds a run on other data: {'; '.join(differing)}. "
                "Give its -data_root again to continue it, or another -log_dir_prefix"
            )

    def accuracy(self, name) -> float:
        """Share of a part's samples, 0..1, that the network as it is now classifies rightly."""
        feed = self.feeds[name]
        evaluate = self.evaluate_batches[feed.axis]
        confusion = 0
        for arguments in evaluation_calls(self.config, feed, self.parts[name], self.devices):
            counts = evaluate(self.state.params, self.state.batch_stats, *arguments)
            confusion = confusion + np.asarray(counts["confusion"])
            # Several processes stop together, at the next training step, where they agree on it.
            if self.stop.signum is not None and jax.process_count() == 1:
                self._save_and_stop(self.stop.signum)
        return float(np.trace(confusion) / confusion.sum())

    def conclude(self, epoch, figures):
        """Logs an epoch's figures, remembers the best, saves."""
        progress, last_step = self.progress, (epoch + 1) * self.steps_per_epoch
        figures |= {"epoch": epoch + 1}
        score = -1.0
        if "test_accuracy" in figures:
            score = figures["test_accuracy" if self.config.val_ratio is None else "val_accuracy"]
            if progress["best"] is None or score >= progress["best"]["score"]:
                progress["best"] = figures | {"score": score}
            progress["last"] = figures
        if self.main:
            for name in ("test_accuracy", "val_accuracy"):
                if name in figures:
                    self.logs.add(name, figures[name], epoch)
            learned = [n for n in self._neurons().values() if isinstance(n, PLIF) and n.w[...].size == 1]
            for i, neuron in enumerate(learned):
                self.logs.add(f"w{i}", float(neuron.w[...]), last_step)
        progress |= {"epoch": epoch + 1, "sums": [0.0, 0.0]}
        self._save(score)
        if self.main:
            report.write_result(self.config, report.result(self))
        self.say(report.epoch_line(self, figures))

    def _save(self, score):
        self.progress["seconds"] = time.monotonic() - self.started
        self.progress["points"] = self.logs.sync() if self.main else 0
        self.checkpoints.save(self.state, self.progress, score)
        self.saved = time.monotonic()

    def _save_in_mid_epoch(self, sums):
        self._refuse_lost_weights()
        self.progress["sums"] = sums.tolist()
        self._save(-1.0)

    def _save_and_stop(self, signum):
        self._save(-1.0)
        self.checkpoints.wait()
        interrupted = signals.Interrupted(signum)
        self.say(f"{interrupted} at step {int(self.state.step)}; saved: the same command continues")
        raise interrupted

    def _network(self):
        """The network as it is now."""
        return nnx.merge(self.graphdef, self.state.params, self.state.batch_stats)

    def _neurons(self):
        """The spiking layers as they are now, {name: neuron}."""
        return self._network().named_neurons()

    def taus(self) -> dict[str, float]:
        """tau of every spiking layer now, in timesteps, by the layer's name, where it has one."""
        taus = {name: report.tau(neuron) for name, neuron in self._neurons().items()}
        return {name: tau for name, tau in taus.items() if tau is not None}

    def alphas(self) -> dict[str, float]:
        """The surrogate's alpha of every spiking layer now, by the layer's name, where it is learned."""
        alphas = {name: getattr(neuron.surrogate, "alpha", None) for name, neuron in self._neurons().items()}
        learned = {name: np.asarray(alpha[...]) for name, alpha in alphas.items() if isinstance(alpha, nnx.Variable)}
        return {name: float(alpha.reshape(())) for name, alpha in learned.items() if alpha.size == 1}


def steps_per_call(config, chosen):
    """Steps per dispatch: on an accelerator the host would otherwise be most of a small step's time."""
    return config.steps_per_call or (1 if chosen[0].platform == "cpu" else 32)


def evaluation_calls(config, feed, part, chosen):
    """Yields x, y, index of each call of a `step.make_evaluate` that together show all samples of a part."""
    # Large event frames fill a device's memory sooner than small ones.
    batch_size = config.batch_size * (4 if max(config.facts.shape) < 64 else 1)
    steps = -(-len(part) // batch_size)
    calls = -(-steps // steps_per_call(config, chosen))
    K = -(-steps // calls)  # all calls alike, so that little is padding
    index_SB = batches.evaluation_batches(part, K * batch_size).reshape(-1, batch_size)
    return feed.chunks(index_SB, [K] * calls)
