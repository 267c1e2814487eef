"""What a run tells: a line per epoch, and at the end the result in words, as JSON and as a picture."""

import contextlib
import dataclasses
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from flax import nnx

from plif_jax import __version__, files
from plif_jax.curves import summary, tau_of
from plif_jax.dtypes import is_real
from plif_jax.neurons import PLIF
from plif_jax.training.logs import read_metrics

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tonic", "tensorflow-datasets", "numpy")


def _percent(figures):
    names = ("train_accuracy", "val_accuracy", "test_accuracy")
    return "  ".join(f"{name.removesuffix('_accuracy')} {figures[name]:.2%}" for name in names if name in figures)


def epoch_line(run, figures) -> str:
    """An epoch's figures on one line."""
    kind = "" if run.config.val_ratio is None else "val "
    best = f" (best {kind}{run.progress['best']['score']:.2%})" if run.progress["best"] else ""
    taus = [f"{tau:.2f}" for tau in run.taus().values()] if run.config.use_plif else []
    told = f"tau {' '.join(taus)}  " if taus else ""
    return (
        f"epoch {figures['epoch']:>4}/{run.config.max_epoch}  loss {figures['loss']:.4f}  {_percent(figures)}{best}  "
        f"{told}{_speed(samples_per_second(run))} samples/s"
    )


def tau(neuron) -> float | None:
    """A layer's membrane time constant in timesteps; None where it has none, or more than one."""
    # On the host: the arrays may span other processes' devices.
    tau = tau_of(neuron.w[...]) if isinstance(neuron, PLIF) else getattr(neuron, "tau", None)
    tau = np.asarray(tau[...] if isinstance(tau, nnx.Variable) else tau)
    return float(tau.reshape(())) if tau.size == 1 and is_real(tau.dtype) else None


def samples_per_second(run) -> float | None:
    """Training samples per second, without evaluation and without each program's first call, which compiles.

    Of a run that was continued with other devices or versions, since then. None where nothing was timed.
    """
    steps, seconds = run.progress["steps_timed"], run.progress["seconds_timed"]
    return steps * run.config.batch_size / seconds if seconds else None


def _speed(samples):
    return "-" if samples is None else f"{samples:.0f}"


def result(run) -> dict:
    """The run's result: best and last figures, tau before and after, learned alpha, speed, settings and versions."""
    progress = run.progress
    return {
        "dataset": run.config.dataset_name,
        "protocol": "accuracy-A" if run.config.val_ratio is None else "accuracy-B",
        "best": progress["best"],
        "last": progress["last"],
        "epochs": progress["epoch"],
        "finished": progress["epoch"] >= run.config.max_epoch,
        "samples": {name: len(part) for name, part in run.parts.items()},
        "tau_before": run.taus_before,
        "tau": run.taus(),
        "alpha": run.alphas(),
        "seconds": progress["seconds"],
        "samples_per_second": samples_per_second(run),
        **progress["hardware"],
        "settings": dataclasses.asdict(run.config),
    }


def hardware(devices) -> dict:
    """Where this program computes: devices, machine and versions."""
    return {
        "devices": [f"{d.platform}:{d.id} {d.device_kind}" for d in devices],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "plif_jax": __version__, **_versions()},
    }


def differences(before, now) -> list[str]:
    """What tells two places apart, as `hardware` gives them."""
    flat = [{"devices": ", ".join(h["devices"]), "machine": h["machine"], **h["versions"]} for h in (before, now)]
    names = dict.fromkeys(name for facts in flat for name in facts)
    was, is_ = ({name: facts.get(name, "none") for name in names} for facts in flat)
    return [f"{name} {is_[name]}, was {was[name]}" for name in names if was[name] != is_[name]]


def _versions():
    """The versions of `PACKAGES` that are installed: one that only lies on the path has none, and is left out."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def write_result(config, result):
    """Writes `result.json` into the run folder."""
    files.write(config.run_dir / "result.json", json.dumps(result, indent=1))


def conclude(config, result, say):
    """Draws `summary.png` into the run folder and says what there is to know."""
    folder = config.run_dir
    summary(read_metrics(folder), folder / "summary.png", title=config.run_name, init_tau=config.init_tau)
    best, last = result["best"], result["last"]
    say(f"\n{result['protocol']} of {config.run_name}")
    chosen = "test" if config.val_ratio is None else "validation"
    if best is None:
        say(f"  no epoch was tested: {result['epochs']} are done, -eval_every is {config.eval_every}")
    else:
        say(f"  best   {_percent(best)} in epoch {best['epoch']}, chosen by {chosen} accuracy")
        say(f"  last   {_percent(last)} in epoch {last['epoch']}")
    for name, tau in result["tau"].items() if config.use_plif else ():
        say(f"  tau    {name:<8} {result['tau_before'][name]:.3f} -> {tau:.3f}")
    for name, alpha in result["alpha"].items():
        say(f"  alpha  {name:<8} {alpha:.3f}")
    say(f"  time   {result['seconds']:.0f} s, {_speed(result['samples_per_second'])} training samples/s")
    say(f"  run    {folder}  (summary.png, result.json, TensorBoard; checkpoints in {config.checkpoint_dir})")
