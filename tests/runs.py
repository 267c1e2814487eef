"""What a run leaves, read back."""

import numpy as np
from tensorboardX.proto import event_pb2

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
    """The scalars of a run's one event file, {tag: [(step, value), ...]}; lengths frame each protobuf event."""
    (path,) = run.glob("events.out.tfevents.*")
    raw, at, scalars = path.read_bytes(), 0, {}
    while at < len(raw):
        size = int.from_bytes(raw[at : at + 8], "little")
        event = event_pb2.Event.FromString(raw[at + 12 : at + 12 + size])
        at += 16 + size
        for value in event.summary.value:
            scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    return scalars
