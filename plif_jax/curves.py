"""Curves of a run: accuracy and membrane time constants over epochs; and the look that the package's pictures share.

All drawing goes through matplotlib's objects, never through pyplot: nothing global changes, no window opens, and a
training process can draw.
"""

import math
import re
import textwrap

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from plif_jax.errors import UserError
from plif_jax.files import write_figure

# Okabe and Ito's palette, distinct for every kind of colour vision; its yellow is too pale for lines on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
OFF, ON = COLORS[:2]  # polarity 0, darker; polarity 1, brighter


def figure(rows=1, columns=1, width=6.4, height=4.0, **subplots):
    """A figure of `width` x `height` inches on an Agg canvas and its axes, as `Figure.subplots` shapes them."""
    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    return fig, fig.subplots(rows, columns, **subplots)


def event_colors(frames_THW2) -> np.ndarray:
    """Event frames as colours in 0..1 [T, H, W, 3]: white where nothing happened, blue darker, orange brighter.

    Raises:
      UserError: frames are not [T, H, W, 2].
    """
    frames = np.abs(np.asarray(frames_THW2, np.float32))
    if frames.ndim != 4 or frames.shape[-1] != 2:
        raise UserError(f"event frames of shape {frames.shape}; they are [T, H, W, 2], those of one sample")
    strength = np.clip(frames / full_strength(frames), 0, 1)
    ink = 1 - np.array([to_rgb(OFF), to_rgb(ON)])
    return np.clip(1 - strength @ ink, 0, 1)


def full_strength(frames):
    """The value that gets the full colour: a hot pixel must not make the others pale."""
    some = np.abs(frames)[frames != 0]
    return np.percentile(some, 98) if some.size else 1.0


def shades(n):
    """n colours from dark to light, for things that have an order: layers by depth, tau by size."""
    return [colormaps["viridis"](0.8 * i / max(n - 1, 1)) for i in range(n)]


def tau_of(w):
    """Membrane time constant in timesteps, tau = 1 / sigmoid(w) = 1 + exp(-w) (Fang et al., 2021, Eq. 6)."""
    with np.errstate(over="ignore"):  # a w that training has blown up: tau is infinite
        return 1 + np.exp(-np.asarray(w, np.float64))


def w_tags(metrics) -> list[str]:
    """The tags w0, w1, ... that a run logged, in the order of the layers; none for LIF, or before the first epoch."""
    tags = [tag for tag in metrics if re.fullmatch("w[0-9]{1,9}", tag) and any(step for step, _ in metrics[tag])]
    return sorted(tags, key=lambda tag: int(tag[1:]))


def infer_steps_per_epoch(metrics) -> int | None:
    """Training steps per epoch, from w: it is logged after every epoch, at the step. None where there is no w."""
    steps = [step for tag in w_tags(metrics) for step, _ in metrics[tag]]
    return math.gcd(*steps) if steps else None


def line(points, color, thin=False):
    """The look of a curve: dots where they are few enough to tell apart, hollow ones on a thin line."""
    dots = {"marker": "o" if len(points) <= 40 else "", "markersize": 4, "markerfacecolor": "none" if thin else color}
    return {"color": color, "linewidth": 1 if thin else 1.5, **dots}


def run_title(fig, run_name):
    """Writes a run's name over a figure, in as many lines as its width asks for, each setting beside its value."""
    settings = re.sub(r"(_(?:True|False|None|[0-9][0-9.e+-]*))_", r"\1_ ", run_name)
    lines = textwrap.wrap(settings, int(10 * fig.get_figwidth()), break_on_hyphens=False)
    fig.suptitle("\n".join(text.replace("_ ", "_") for text in lines), fontsize="medium")


def epoch_axis(ax):
    """Whole epochs to the right, and a grid."""
    ax.set_xlabel("epochs trained")
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.grid(alpha=0.3)


def accuracy_over_epochs(ax, metrics):
    """Draws accuracies in percent over epochs, the epoch that counts marked.

    Args:
      metrics: {tag: [(epoch, value), ...]}, the first epoch 0: it is drawn at 1, for one epoch was trained.
    """
    for tag, color in zip(("test_accuracy", "val_accuracy"), COLORS, strict=False):
        if points := metrics.get(tag):
            epochs, values = np.array(points).T
            ax.plot(epochs + 1, 100 * values, label=tag.split("_")[0], **line(points, color))
    if test := dict(metrics.get("test_accuracy", ())):
        # Accuracy-B reads the test accuracy where validation was best; of equal epochs the later counts.
        kind, decisive = ("B", "val_accuracy") if metrics.get("val_accuracy") else ("A", "test_accuracy")
        epoch = max(metrics[decisive], key=lambda point: (point[1], point[0]))[0]
        if epoch in test:  # a damaged record of curves may lack it
            label = f"accuracy-{kind}: {100 * test[epoch]:.2f} %"
            ax.plot(epoch + 1, 100 * test[epoch], "*", color="black", mfc="none", markersize=15, label=label)
        ax.legend(loc="best")
    ax.set_ylabel("accuracy (%)")
    epoch_axis(ax)
    return ax


def tau_over_epochs(ax, metrics, init_tau=None):
    """Draws the membrane time constant of every spiking layer over epochs; logarithmic where they spread far.

    Args:
      metrics: {"w0": [(step, w), ...], ...}; the steps of an epoch are inferred.
      init_tau: where all layers began, drawn too if given.
    """
    before = [] if init_tau is None else [init_tau]
    tags = w_tags(metrics)
    steps_per_epoch = infer_steps_per_epoch(metrics)
    taus = []
    for tag, color in zip(tags, shades(len(tags)), strict=True):
        steps, w = np.array(metrics[tag]).T
        taus.append(np.array([*before, *tau_of(w)]))
        label = f"layer {int(tag[1:]) + 1}: {taus[-1][-1]:.3f}"
        epochs = [*(0 for _ in before), *steps / steps_per_epoch]
        ax.plot(epochs, taus[-1], label=label, **line(epochs, color))
    ax.ticklabel_format(axis="y", useOffset=False)
    if tags:
        columns = 1 + (len(tags) - 1) // 16
        ax.legend(title="tau now", fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1), ncols=columns)
        least, most = min(map(np.min, taus)), max(map(np.max, taus))
        if most > 8 * least:
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most < 1e5 * least else (1,)))
            ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_ylabel("tau (timesteps)")
    epoch_axis(ax)
    return ax


def summary(metrics, path, title="", init_tau=None):
    """Writes the picture of a run: accuracy over epochs, and beside it tau, from `init_tau` on, where it is learned."""
    learned = bool(w_tags(metrics))
    fig, axes = figure(1, 1 + learned, width=11 if learned else 6.4, squeeze=False)
    accuracy_over_epochs(axes[0, 0], metrics)
    if learned:
        tau_over_epochs(axes[0, 1], metrics, init_tau)
    run_title(fig, title)
    write_figure(fig, path)
