"""Draws a run: what its neurons did with one test sample, how its training went, what it confuses, what it costs.

    python experiments/figures.py logs/Digits_init_tau_2.0_...

Writes into RUN/figures: training.png, neuron.png, surrogate.png, input.png (and input.gif for event data),
firing_rates.png, raster.png, spike_maps.png, confusion.png, operations.txt.
"""

import argparse
import dataclasses
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from plif_jax import cli, data, neurons, surrogate
from plif_jax.analysis import operations, plots, recording
from plif_jax.curves import figure, summary
from plif_jax.data import batches
from plif_jax.errors import UserError
from plif_jax.training.checkpoint import load_network
from plif_jax.training.logs import read_metrics
from plif_jax.training.step import frames_for

RASTER_NEURONS = 60  # of each layer; more cannot be told apart


def save(fig, path):
    fig.savefig(path, dpi=120)
    print(path)


def draw_neurons(net, folder):
    """The neuron figure with the network's own time constants, and its surrogate function."""
    x = np.concatenate([np.zeros(4), np.full(20, 1.3), np.zeros(8), np.full(8, 4.0), np.zeros(10)])
    taus = {f"{name}, tau = {float(n.tau):.2f}": neurons.LIF(float(n.tau)) for name, n in net.named_neurons().items()}
    fig, (above, below) = figure(2, width=8, height=5, sharex=True, height_ratios=[1, 3])
    above.step(np.arange(1, len(x) + 1), x, where="mid", color="black")
    above.set_ylabel("current x")
    plots.neuron_response(below, x, taus)
    save(fig, folder / "neuron.png")
    some = {"ATan (the paper's)": surrogate.ATan()}
    some |= {kind.__name__: kind() for kind in (surrogate.Sigmoid, surrogate.PiecewiseQuadratic, surrogate.Erf)}
    fig, axes = figure(1, 2, width=10)
    plots.surrogate_functions(axes[0], some)
    plots.surrogate_gradients(axes[1], some)
    save(fig, folder / "surrogate.png")


def draw_input(config, x, stored, folder):
    """The sample: frames as a sheet and as an animation, or the image."""
    fig, ax = figure(width=8, height=0.5 + 8 * -(-config.T // 5) / 5) if config.facts.events else figure(width=4)
    if config.facts.events:
        plots.event_frames(ax, x[:, 0])
        plots.save_gif(x[:, 0], folder / "input.gif")
        print(folder / "input.gif")
    else:
        ax.imshow(stored[0].squeeze(), cmap="gray")
        ax.set(xlabel="x (pixels)", ylabel="y (pixels)")
    save(fig, folder / "input.png")


def draw_layers(net, x, folder):
    """Firing rates, a raster of every layer, and the first layer's spikes as maps, for the first sample of x."""
    first = next(iter(net.named_neurons()))
    _, layers = recording.record(net, x, RASTER_NEURONS)
    fig, ax = figure(width=7, height=1 + 0.55 * len(layers))
    plots.firing_rates(ax, layers)
    save(fig, folder / "firing_rates.png")
    columns = min(len(layers), 4)
    rows = -(-len(layers) // columns)
    fig, axes = figure(rows, columns, width=3 * columns, height=4 * rows, squeeze=False)
    for ax, (name, layer) in zip(axes.flat, layers.items(), strict=False):
        shown, total = layer.spikes.shape[-1], layer.neuron_rate.size
        plots.raster(ax, layer.spikes[:, 0], f"{name}, {shown} of {total} neurons")
    save(fig, folder / "raster.png")
    one = x[:, :1] if x.ndim == 5 else x[:1]
    spikes = recording.record(net, one)[1][first].spikes[:, 0]
    fig, ax = figure(width=8, height=6.5)
    plots.spike_maps(ax, spikes).set_title(f"spikes of {first}")
    save(fig, folder / "spike_maps.png")


def confusion(config, net, part, batch_size=32):
    """Counts [label, prediction] over the samples of a part."""
    graphdef, state = nnx.split(net)
    rates = jax.jit(lambda state, x: recording.evaluate(graphdef, state, frames_for(config, x), None))
    counts = np.zeros((config.facts.classes,) * 2, int)
    for index in batches.evaluation_batches(part, batch_size):
        predictions = np.asarray(rates(state, part.split.x[index]).argmax(-1))
        np.add.at(counts, (part.split.y[index[index >= 0]], predictions[index >= 0]), 1)
    return counts


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("-data_root", "--data_root", help="where the data sets lie now, if not where the run had them")
    parser.add_argument("-sample", "--sample", type=int, default=0, help="position of the drawn sample in the test set")
    flags = parser.parse_args(argv)
    config, net = load_network(flags.run)
    if flags.data_root:
        config = dataclasses.replace(config, data_root=flags.data_root)
    part = batches.partition(config, data.load(config))["test"]
    if not 0 <= flags.sample < len(part):
        raise UserError(f"-sample {flags.sample}: the run tests on {len(part)} samples; give 0 to {len(part) - 1}")
    folder = flags.run / "figures"
    folder.mkdir(exist_ok=True)
    # The drawn sample first, then some spread over the test set for the means.
    index = part.index[[flags.sample, *np.linspace(0, len(part) - 1, min(len(part), 15)).astype(int)]]
    stored = part.split.x[index]
    x = jax.jit(partial(frames_for, config))(stored)

    summary(read_metrics(flags.run), folder / "training.png", flags.run.name)
    print(folder / "training.png")
    draw_neurons(net, folder)
    draw_input(config, x, stored, folder)
    draw_layers(net, x, folder)
    fig, ax = figure(width=6.4, height=5.4)
    plots.confusion_matrix(ax, confusion(config, net, part))
    save(fig, folder / "confusion.png")
    text = operations.table(operations.count(net, x))
    (folder / "operations.txt").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    cli.run(main)
