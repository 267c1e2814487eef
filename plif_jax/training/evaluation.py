"""What a trained network does on the test set: accuracy, confusions, firing rates."""

import dataclasses

import jax
import numpy as np
from flax import nnx

from plif_jax import data
from plif_jax.data import batches
from plif_jax.errors import UserError
from plif_jax.training import step
from plif_jax.training.loop import evaluation_calls


def evaluate(config, net, progress=True) -> dict:
    """Runs a network over its test set.

    Args:
      config: the run's settings, as `checkpoint.load_network` gives them.
      net: the network.
      progress: shows a bar while the data set is prepared.

    Returns:
      {"accuracy": 0..1, "per_class": [classes], "confusion": counts [label, prediction], "samples": n,
      "firing_rates": {layer: mean spikes per neuron and timestep}}.

    Raises:
      UserError: the data are not there, or a network for still images has another T than the settings.
    """
    if net.static_conv and net.T != config.T:  # the network shows a still image, the data bring their own timesteps
        raise UserError(f"T is {config.T} in the settings, {net.T} in the network; set net.T too for another T")
    chosen = jax.local_devices()[:1]
    config = dataclasses.replace(config, batch_size=min(config.batch_size, 16))  # the run's was for all its devices
    part = batches.test_part(config, data.load(config, progress=progress, to_train=False))
    feed = batches.Feed(part.split, chosen, config.data_on_device)
    graphdef, batch_stats, params = nnx.split(net, nnx.BatchStat, ...)
    run = step.make_evaluate(config, graphdef, chosen, feed.axis, firing_rates=True)
    calls = evaluation_calls(config, feed, part, chosen)
    counts = [jax.device_get(run(params, batch_stats, *arguments)) for arguments in calls]
    total = jax.tree.map(lambda *parts: np.sum(parts, axis=0), *counts)
    confusion = total["confusion"]
    with np.errstate(invalid="ignore"):  # a class without samples has no accuracy
        per_class = np.diag(confusion) / confusion.sum(1)
    return {
        "accuracy": float(np.trace(confusion) / confusion.sum()),
        "per_class": per_class,
        "confusion": confusion,
        "samples": len(part),
        # In the order of the layers: jit has sorted them by name, conv.10 before conv.2.
        "firing_rates": {name: float(total["spikes"][name]) / len(part) for name in net.named_neurons()},
    }
