"""Draws a run: what its neurons did with test samples, how its training went, what it confuses, what it costs.

    python experiments/figures.py logs/Digits_init_tau_2.0_...

Writes into RUN/figures, or into -out: training.png, neuron.png, surrogate.png, input.png (and input.gif for event
data), firing_rates.png, raster.png, spike_maps.png, confusion.png, operations.txt.
"""

import math
import tempfile
import textwrap
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from plif_jax import cli, data, files, neurons, surrogate
from plif_jax.analysis import operations, plots, recording
from plif_jax.config import Parser
from plif_jax.curves import figure, summary
from plif_jax.data import batches
from plif_jax.data.storage import writing
from plif_jax.errors import UserError
from plif_jax.training import report
from plif_jax.training.checkpoint import load_checkpoint
from plif_jax.training.evaluation import evaluate
from plif_jax.training.logs import read_metrics
from plif_jax.training.step import frames_for

RASTER_NEURONS = 60  # of each layer; more cannot be told apart


def save(fig, path):
    files.write_figure(fig, path)
    print(path)


def caption(fig, text):
    """Writes over a figure what it shows, in as many lines as its width asks for."""
    fig.suptitle(textwrap.fill(text, int(11 * fig.get_figwidth())), fontsize="medium")


def _named(alike):
    """{label with the layers' names: what the first of them has} from {label: {layer's name: what it has}}."""
    return {
        textwrap.fill(f"{label}: {', '.join(layers)}", 24): next(iter(layers.values()))
        for label, layers in alike.items()
    }


def draw_neurons(net, folder, checkpoint):
    """The neuron figure, with some time constants and with the network's own; and surrogates, with those it learned."""
    x = np.concatenate([np.zeros(4), np.full(20, 1.3), np.zeros(8), np.full(8, 2.5), np.zeros(10)])
    alike = {}  # layers whose tau reads the same
    for name, layer in net.named_neurons().items():
        tau = report.tau(layer)
        label = type(layer).__name__ if tau is None else f"tau = {tau:.2f}"
        if plots.is_single(layer):
            alike.setdefault(label, {})[name] = layer
    some = {f"tau = {tau:g}": neurons.LIF(tau) for tau in (1.25, 2.0, 4.0, 16.0)}
    own = _named(alike)
    rows = [1, 3, 3] if own else [1, 3]
    fig, (current, above, *below) = figure(len(rows), width=9, height=sum(rows) + 1, sharex=True, height_ratios=rows)
    current.step(np.arange(1, len(x) + 1), x, where="mid", color="black")
    current.set_ylabel("current x")
    plots.neuron_response(above, x, some)
    for ax in below:
        above.set_xlabel("")
        plots.neuron_response(ax, x, own).set_title(f"time constants of this network, {checkpoint}", fontsize="medium")
    save(fig, folder / "neuron.png")
    some = {"ATan (the paper's)": surrogate.ATan()}
    some |= {kind.__name__: kind() for kind in (surrogate.Sigmoid, surrogate.PiecewiseQuadratic, surrogate.Erf)}
    learned = {}  # likewise
    for name, layer in net.named_neurons().items():
        alpha = getattr(layer.surrogate, "alpha", None)
        if isinstance(layer.surrogate, surrogate.Surrogate) and isinstance(alpha, nnx.Param):
            label = f"{type(layer.surrogate).__name__}, alpha {alpha[...]:.2f}"
            learned.setdefault(label, {})[name] = layer.surrogate
    some |= _named(learned)
    fig, axes = figure(1, 2, width=12)
    plots.surrogate_functions(axes[0], some).legend(axes[0].lines[:1], ["spike"])  # the other's tells the rest
    plots.surrogate_gradients(axes[1], some).legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize="small")
    save(fig, folder / "surrogate.png")


def draw_input(config, x, stored, folder, title):
    """The sample: frames as a sheet and as an animation, or the image."""
    H, W, _ = config.facts.shape
    columns = min(5, config.T)
    rows = -(-config.T // columns)
    fig, ax = figure(width=8, height=0.5 + 8 * rows / columns * H / W) if config.facts.events else figure(width=4)
    if config.facts.events:
        plots.event_frames(ax, x[:, 0])
        plots.save_gif(x[:, 0], folder / "input.gif")
        print(folder / "input.gif")
    else:
        ax.imshow(stored[0].squeeze(), cmap="gray")
        ax.set(xlabel="x (pixels)", ylabel="y (pixels)")
    ax.set_title(title, fontsize="medium")
    save(fig, folder / "input.png")


def _voters(spikes_TN, classes):
    """Of as many output neurons of every class the spikes [T, n], evenly spread over those of the class."""
    group = spikes_TN.shape[1] // classes  # a whole number, or they could not vote
    of_class = np.linspace(0, group - 1, min(group, max(1, RASTER_NEURONS // classes))).astype(int)
    return spikes_TN[:, (group * np.arange(classes)[:, None] + of_class).ravel()]


def draw_layers(net, x, classes, folder, sample, checkpoint):
    """Mean firing rates over the samples x; of the first, a raster of every layer and the first layer's spike maps."""
    first, *_, output = net.named_neurons()
    _, layers = recording.record(net, x, RASTER_NEURONS)
    one = x[:, :1] if x.ndim == 5 else x[:1]
    whole = recording.record(net, one)[1]
    fig, ax = figure(width=7, height=1.3 + 0.55 * len(layers))
    samples = x.shape[1] if x.ndim == 5 else len(x)
    plots.firing_rates(ax, layers).set_title(f"mean over {samples} test samples, {checkpoint}", fontsize="medium")
    save(fig, folder / "firing_rates.png")
    rows = -(-len(layers) // 4)
    columns = -(-len(layers) // rows)
    fig, axes = figure(rows, columns, width=3 * columns, height=4 * rows, squeeze=False)
    # The output, whose classes may have long names, at the right edge.
    *others, last = axes.flat
    for ax, (name, layer) in zip([*others[: len(layers) - 1], last], layers.items(), strict=True):
        spikes = _voters(whole[name].spikes[:, 0], len(classes)) if name == output else layer.spikes[:, 0]
        shown, total = spikes.shape[-1], layer.neuron_rate.size
        ylabel = "neuron" if shown == total else "chosen neuron, evenly spread"
        plots.raster(ax, spikes, f"{name}\n{shown} of {total} neurons", ylabel)
        if name == output:  # whose neurons vote, those of a class one after another
            ax.set_yticks(shown * (np.arange(len(classes)) + 0.5) / len(classes) - 0.5, classes, fontsize="small")
            ax.yaxis.tick_right()
            ax.yaxis.set_label_position("right")
            ax.set_ylabel("class that the neurons vote for")
    for ax in others[len(layers) - 1 :]:
        ax.remove()
    caption(fig, f"{sample}, {checkpoint}")
    save(fig, folder / "raster.png")
    spikes = whole[first].spikes[:, 0]
    T, H, W, C = spikes.shape
    cell = min(10 / T, 6 / min(C, 8) * W / H)  # inches that a map may be wide
    fig, ax = figure(width=cell * T + 1, height=cell * H / W * min(C, 8) + 1)
    plots.spike_maps(ax, spikes)
    caption(fig, f"spikes of {first}, {sample}, {checkpoint}")
    save(fig, folder / "spike_maps.png")


def main(argv):
    parser = Parser(description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("-data_root", help="where the data sets lie now, if not where the run had them")
    parser.add_argument("-cache_dir", help="folder of prepared data, if not the one of the training")
    parser.add_argument(
        "-sample",
        type=int,
        default=0,
        help="drawn sample's position in the test set, 0 the first; in event data the classes come one after another",
    )
    energies = {"accumulate": operations.ACCUMULATE_PJ, "multiply_accumulate": operations.MULTIPLY_ACCUMULATE_PJ}
    for name, pj in energies.items():
        parser.add_argument(f"-{name}_pj", type=float, default=pj, help=f"energy in pJ; {pj} for 45 nm")
    parser.add_argument("-checkpoint", choices=("best", "latest"), default="best", help="of the run")
    parser.add_argument("-out", type=Path, help="folder for the pictures (default RUN/figures)")
    flags = parser.parse_args(argv)
    for name in energies:
        if not 0 <= (pj := getattr(flags, f"{name}_pj")) < math.inf:
            raise UserError(f"-{name}_pj {pj}: an energy is a number from 0")
    config, net, checkpoint = load_checkpoint(flags.run, flags.checkpoint)
    curves = read_metrics(flags.run)
    config = config.elsewhere(flags.data_root, flags.cache_dir)
    part = batches.test_part(config, data.load(config, to_train=False))
    if not 0 <= flags.sample < len(part):
        raise UserError(f"-sample {flags.sample}: the run tests on {len(part)} samples; give 0 to {len(part) - 1}")
    folder = flags.out or flags.run / "figures"
    with writing(folder, "Give another folder with -out"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # refused before anything is computed for it
    # The drawn sample first, then some spread over the test set for the means.
    spread = np.linspace(0, len(part) - 1, min(len(part), 15)).astype(int)
    index = part.index[list(dict.fromkeys([flags.sample, *spread.tolist()]))]
    stored = part.split.x[index]
    x = jax.jit(partial(frames_for, config))(stored)
    one = x[:, :1] if config.facts.events else x[:1]
    names = config.facts.class_names
    label, guess = (names[int(i)] for i in (part.split.y[index[0]], nnx.jit(net)(one)[0].argmax()))
    sample = f"sample {flags.sample} of {len(part)}: class {label}, taken for {guess}"
    print(sample)

    summary(curves, folder / "training.png", config.run_name, config.init_tau)
    print(folder / "training.png")
    draw_neurons(net, folder, checkpoint)
    draw_input(config, x, stored, folder, sample)
    draw_layers(net, x, names, folder, sample, checkpoint)
    fig, ax = figure(width=6.4, height=5.4)
    plots.confusion_matrix(ax, evaluate(config, net)["confusion"], names)
    caption(fig, checkpoint)
    save(fig, folder / "confusion.png")
    text = operations.table(operations.count(net, x), flags.accumulate_pj, flags.multiply_accumulate_pj)
    files.write(folder / "operations.txt", text + "\n")
    print(f"{folder / 'operations.txt'}\n\n{text}")


if __name__ == "__main__":
    cli.run(main)
