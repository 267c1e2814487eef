"""What a run leaves, read back; and an epoch that trains nothing."""

import dataclasses

import numpy as np

from plif_jax.analysis import reference
from plif_jax.interop import torch
from plif_jax.training import checkpoint
from plif_jax.training.logs import read_metrics


def arrays(config, kind="latest"):
    _, net = checkpoint.load_network(config.run_dir, kind)
    return torch.state_dict(net)


def assert_same_run(config, reference):
    """Bitwise the same network and the same curves."""
    for (name, mine), theirs in zip(arrays(config).items(), arrays(reference).values(), strict=True):
        np.testing.assert_array_equal(mine, theirs, err_msg=name)
    assert read_metrics(config.run_dir) == read_metrics(reference.run_dir)
    assert tensorboard(config.run_dir) == tensorboard(reference.run_dir)


def tensorboard(run):
    """The scalars of a run's one event file, {tag: [(step, value), ...]}."""
    (path,), scalars = run.glob("events.out.tfevents.*"), {}
    for tag, _, step, value in reference._read_events(path):
        scalars.setdefault(tag, []).append((step, value))
    return scalars


def pretend_epoch(run):
    """In place of `loop.Run.train_epoch`: counts the steps."""
    run.state = dataclasses.replace(run.state, step=run.state.step + run.steps_per_epoch)
    return {"loss": 0.0, "train_accuracy": 0.0}
