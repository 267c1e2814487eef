"""Pictures of neurons, layers and event recordings, each drawn on the axes it is given, which it returns.

The curves of a run are in `plif_jax.curves`; make figures with `plif_jax.curves.figure`, or give pyplot's axes.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.ticker import MaxNLocator
from PIL import Image

from plif_jax import files
from plif_jax.analysis.recording import LayerRecord, charge_fire_reset
from plif_jax.curves import COLORS, event_colors, full_strength, shades
from plif_jax.dtypes import is_whole
from plif_jax.errors import UserError
from plif_jax.neurons import Neuron
from plif_jax.surrogate import Surrogate

BEHIND = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1}  # text that lies over a picture


def _array(what, array, axes):
    """An array as NumPy's, with the axes that `axes` names."""
    try:
        array = np.asarray(array)
    except ValueError:
        raise UserError(f"{what} have rows of different lengths; give [{axes}]") from None
    if array.ndim != len(axes.split(", ")) or 0 in array.shape[:1]:
        raise UserError(f"{what} of shape {array.shape}; give [{axes}], one entry at least")
    return array


def is_single(neuron: Neuron) -> bool:
    """Whether all that a neuron has are single numbers, none for each channel say: one alone can be drawn then."""
    potentials = (neuron.v_threshold, 0.0 if neuron.v_reset is None else neuron.v_reset)
    values = (*potentials, *jax.tree.leaves(nnx.state(neuron)), neuron.rest(jnp.zeros(1)))
    return all(jnp.ndim(jnp.asarray(value)) == 0 for value in values)


def neuron_response(ax, currents, neurons: Mapping[str, Neuron]):
    """Membrane and spikes of single neurons in answer to one current (compare Fang et al., 2021, Fig. 2).

    The membrane charges to h; where that reaches the threshold the neuron fires and the line falls to v, the reset.
    Of a neuron with a `step` of its own v alone is drawn.

    Args:
      ax: the axes drawn on.
      currents: x [T], or [T, 1].
      neurons: {label: neuron}; a row of ticks above the membranes shows the spikes of each.

    Raises:
      UserError: currents of another shape or not finite, no neurons, or one with several numbers where one alone has
        one.
    """
    x = np.asarray(currents, float)
    x = _array("currents", x[:, 0] if x.ndim == 2 and x.shape[1] == 1 else x, "T")
    if not np.isfinite(x).all():
        raise UserError("currents hold a value that is not finite; there is no membrane to draw after it")
    if not neurons:
        raise UserError("there are no neurons to draw; give {label: neuron}")
    if many := [label for label, neuron in neurons.items() if not is_single(neuron)]:
        raise UserError(
            f"{many[0]} has several states, or values for several neurons; give neurons that have one number of each"
        )
    timesteps = np.arange(1, len(x) + 1)
    thresholds = sorted({float(jnp.asarray(neuron.v_threshold)) for neuron in neurons.values()})
    for threshold in thresholds:
        ax.axhline(threshold, color="gray", linestyle="--", linewidth=1)
        which = "threshold" if len(thresholds) == 1 else f"threshold {threshold:g}"
        ax.text(len(x) + 0.3, threshold, which, color="gray", ha="right", va="bottom", fontsize="small", bbox=BEHIND)
    answers = {label: charge_fire_reset(neuron, jnp.asarray(x, float)) for label, neuron in neurons.items()}
    answers = {label: (v if h is None else h, v, s) for label, (h, v, s) in answers.items()}
    top = max(*thresholds, *(float(h.max()) for h, _, _ in answers.values()))
    for row, ((label, (h, v, s)), color) in enumerate(zip(answers.items(), shades(len(answers)), strict=True)):
        membrane = np.stack([h, v], 1).ravel()
        ax.plot(timesteps.repeat(2), membrane, color=color, label=f"{label}, spikes: {int(s.sum())}", linewidth=1.5)
        ax.eventplot(
            timesteps[np.asarray(s) > 0],
            lineoffsets=top * (1.12 + 0.1 * row),
            linelengths=top * 0.08,
            colors=[color],
            linewidths=2,
        )
    ax.set(xlim=(0.5, len(x) + 0.5), xlabel="time (timesteps)", ylabel="membrane h, reset to v; ticks: spikes")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize="small")
    return ax


def surrogate_functions(ax, surrogates: Mapping[str, Surrogate]):
    """The smooth functions g that stand in for the spike, and the spike itself, over h - v_threshold."""
    x = jnp.linspace(-2, 2, 801)
    ax.step(x, x >= 0, color="black", linewidth=1, linestyle="--", label="spike")
    return _surrogate_lines(ax, x, {name: s.primitive for name, s in surrogates.items()}, "surrogate g")


def surrogate_gradients(ax, surrogates: Mapping[str, Surrogate]):
    """The derivatives g' that the backward pass uses for the spike's, over h - v_threshold."""
    x = jnp.linspace(-2, 2, 801)
    return _surrogate_lines(ax, x, {name: s.derivative for name, s in surrogates.items()}, "gradient g'")


def _surrogate_lines(ax, x, functions, ylabel):
    dashes = ("-", "--", "-.", ":")
    for i, (name, function) in enumerate(functions.items()):
        color, dash = COLORS[i % len(COLORS)], dashes[i // len(COLORS) % len(dashes)]
        ax.plot(x, function(x), color=color, linestyle=dash, label=name)
    ax.set(xlabel="h - v_threshold (threshold = 1)", ylabel=ylabel)
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")
    return ax


def raster(ax, spikes_TN, title="", ylabel="neuron"):
    """A tick for every spike: time to the right, neurons upward in the order given."""
    spikes_TN = _array("spikes", spikes_TN, "T, N")
    T, N = spikes_TN.shape
    times = [np.flatnonzero(train) + 1 for train in spikes_TN.T]
    if N:  # none where only rates were recorded
        ax.eventplot(times, lineoffsets=np.arange(N), linelengths=0.8, linewidths=max(1, 60 / T), colors=COLORS[0])
    ax.set(xlim=(0.5, T + 0.5), ylim=(-0.5, max(N, 1) - 0.5), xlabel="time (timesteps)", ylabel=ylabel, title=title)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return ax


def firing_rates(ax, layers: Mapping[str, LayerRecord]):
    """Heat map of the share of each layer's neurons that fire at each timestep, mean over samples, with the figures.

    Raises:
      UserError: there are no layers.
    """
    if not layers:
        raise UserError("there are no layers to draw; give what `recording.record` returns, {name: LayerRecord}")
    rates_LT = 100 * np.array([np.asarray(layer.firing_rate).mean(1) for layer in layers.values()])
    L, T = rates_LT.shape
    top, extent = rates_LT.max() or 1, (0.5, T + 0.5, L - 0.5, -0.5)  # 1 where nothing fires
    image = ax.imshow(rates_LT, cmap="cividis", aspect="auto", vmin=0, vmax=top, extent=extent)
    if T <= 12:
        for i, t in np.ndindex(L, T):
            color = "black" if rates_LT[i, t] > 0.6 * top else "white"
            ax.text(t + 1, i, _percent(rates_LT[i, t], 1), color=color, ha="center", va="center", fontsize="small")
    ax.set_yticks(range(L), layers)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set(xlabel="time (timesteps)", ylabel="spiking layer, input at the top")
    ax.figure.colorbar(image, ax=ax, label="neurons that fire (%)")
    return ax


def _percent(share, digits):
    """A share in percent as text: little is not nothing."""
    text = f"{share:.{digits}f}"
    return text if float(text) else f"<{10.0**-digits:g}" if share else "0"


def _mosaic(images_N, columns, fill):
    """Images [N, H, W, ...] side by side in rows of `columns`, `fill` between them; and how wide that gap is."""
    N, H, W, *rest = images_N.shape
    rows = -(-N // columns)
    gap = max(1, columns * W // 500)  # still seen where many wide images share a page
    padded = np.full((rows * columns, H + gap, W + gap, *rest), fill, np.float32)
    padded[:N, :H, :W] = images_N
    tiled = np.moveaxis(padded.reshape(rows, columns, H + gap, W + gap, *rest), 2, 1)
    return tiled.reshape(rows * (H + gap), columns * (W + gap), *rest)[:-gap, :-gap], gap


def spike_maps(ax, spikes_THWC, channels: Sequence[int] | None = None):
    """Feature maps of a spiking convolution: a row for each channel, a column for each timestep, spikes bright.

    Args:
      ax: the axes drawn on.
      spikes_THWC: of one sample.
      channels: the eight that spike most if None.

    Raises:
      UserError: spikes are of another shape, or there are no such channels.
    """
    spikes_THWC = _array("spikes", spikes_THWC, "T, H, W, C").astype(np.float32)
    T, H, W, C = spikes_THWC.shape
    if channels is None:
        channels = np.sort(np.argsort(-spikes_THWC.sum((0, 1, 2)), kind="stable")[:8])
    elif np.ndim(channels) != 1 or not len(channels) or not set(channels) <= set(range(C)):
        raise UserError(f"channels are {channels}; give some of the {C} channels, counted from 0, as a list")
    maps = np.moveaxis(spikes_THWC[..., channels], -1, 0).reshape(-1, H, W)
    picture, gap = _mosaic(maps, T, fill=np.nan)  # nan shows the axes, white
    ax.imshow(picture, cmap="cividis", vmin=0, vmax=1)
    told = np.arange(0, T, -(-T // 20))
    ax.set_xticks(told * (W + gap) + W / 2, told + 1)
    ax.set_yticks(np.arange(len(channels)) * (H + gap) + H / 2, channels)
    ax.tick_params(length=0)
    ax.set(xlabel="time (timesteps)", ylabel="channel")
    return ax


def event_frames(ax, frames_THW2, columns: int = 5):
    """The frames [T, H, W, 2] of one recording side by side, in reading order.

    Raises:
      UserError: frames are of another shape, or columns is not a whole number from 1.
    """
    colors = event_colors(_array("frames", frames_THW2, "T, H, W, 2"))
    T, H, W, _ = colors.shape
    if not is_whole(columns):
        raise UserError(f"columns is {columns!r}; give how many frames lie side by side, 1 or more")
    columns = min(columns, T)
    picture, gap = _mosaic(colors, columns, fill=0.5)
    ax.imshow(picture)
    for t in range(T):
        row, column = divmod(t, columns)
        at = (column * (W + gap) + 0.03 * W, row * (H + gap) + 0.03 * H)
        ax.text(*at, f"t = {t + 1}", va="top", fontsize="x-small", bbox=BEHIND)
    ax.set(xticks=[], yticks=[])
    full = full_strength(np.asarray(frames_THW2, np.float32))
    ax.set_xlabel(f"events: blue darker, orange brighter, black both; full colour from {full:.3g} in a pixel and frame")
    return ax


def save_gif(frames_THW2, path: str | Path, milliseconds: int = 100):
    """Writes a recording's frames [T, H, W, 2] as an animation some 256 pixels high that repeats forever.

    Raises:
      UserError: frames are of another shape.
    """
    pictures = (255 * event_colors(_array("frames", frames_THW2, "T, H, W, 2"))).astype(np.uint8)
    scale = max(1, 256 // pictures.shape[1])
    first, *rest = [Image.fromarray(picture.repeat(scale, 0).repeat(scale, 1)) for picture in pictures]
    animation = io.BytesIO()
    first.save(animation, "GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0)
    files.write(path, animation.getvalue())


def confusion_matrix(ax, counts, names: Sequence[str] | None = None):
    """Share of each class's samples given each class, in percent, from counts [label, prediction].

    Raises:
      UserError: counts are not square, or not of as many classes as there are names.
    """
    counts = _array("counts", counts, "label, prediction")
    names = list(map(str, range(len(counts)) if names is None else names))
    if counts.shape != (len(names), len(names)):
        raise UserError(f"counts of shape {counts.shape} for {len(names)} classes; give a row and a column for each")
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = ax.imshow(share, cmap="cividis", vmin=0, vmax=100)
    for label, prediction in np.ndindex(*share.shape):
        if counts[label, prediction]:
            color = "black" if share[label, prediction] > 60 else "white"
            text = _percent(share[label, prediction], 0)
            ax.text(prediction, label, text, color=color, ha="center", va="center", fontsize="small")
    ax.set_xticks(range(len(counts)), names, rotation=90 if max(map(len, names)) > 2 else 0)
    ax.set_yticks(range(len(counts)), names)
    total = int(counts.sum())
    title = f"accuracy {np.trace(counts) / total:.2%} of {total} samples" if total else "no samples"
    ax.set(xlabel="predicted class", ylabel="class", title=title)
    ax.figure.colorbar(image, ax=ax, label="of the class's samples (%)")
    return ax
