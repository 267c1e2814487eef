from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from plif_jax import curves, neurons, surrogate
from plif_jax.analysis import plots
from plif_jax.analysis.recording import LayerRecord
from plif_jax.errors import UserError


@pytest.fixture
def ax():
    return curves.figure()[1]


def drawn(ax):
    """Draws the figure, so that whatever only fails when rendered fails; gives the legend's texts."""
    ax.figure.canvas.draw()
    legend = ax.get_legend()
    return [text.get_text() for text in legend.get_texts()] if legend else []


METRICS = {
    "test_accuracy": [(0, 0.5), (1, 0.8), (2, 0.8)],
    "w0": [(90, 0.0), (180, -1.0), (270, -2.0)],
    "w10": [(90, 0.0), (180, 0.0), (270, -5.0)],
    "w2": [(90, 0.0), (180, 0.0), (270, 1.0)],
}


def test_accuracy_is_drawn_after_the_epochs_trained(ax):
    assert curves.accuracy_over_epochs(ax, METRICS) is ax
    assert drawn(ax) == ["test", "accuracy-A: 80.00 %"]
    line, star = ax.lines
    np.testing.assert_allclose(line.get_xydata(), [[1, 50], [2, 80], [3, 80]])
    assert star.get_xydata().tolist() == [[3, 80]]  # of equal epochs the later


def test_accuracy_b_is_read_where_validation_is_best(ax):
    curves.accuracy_over_epochs(ax, METRICS | {"val_accuracy": [(0, 0.9), (1, 0.8), (2, 0.7)]})
    assert drawn(ax) == ["test", "val", "accuracy-B: 50.00 %"]


def test_the_rest_is_drawn_where_the_decisive_point_was_lost(ax):
    curves.accuracy_over_epochs(ax, {"test_accuracy": [(1, 0.5)], "val_accuracy": [(0, 0.9), (1, 0.8)]})
    assert drawn(ax) == ["test", "val"]


def test_tau_is_drawn_for_each_layer_in_order(ax):
    assert curves.tau_over_epochs(ax, METRICS) is ax
    assert drawn(ax) == ["layer 1: 8.389", "layer 3: 1.368", "layer 11: 149.413"]
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[1, 2], [2, 1 + np.e], [3, 1 + np.e**2]], rtol=1e-6)
    assert ax.get_yscale() == "log"


def test_taus_begin_where_all_layers_began():
    _, ax = curves.figure()
    curves.tau_over_epochs(ax, {"w0": [(10, 0.0), (20, 1.0)], "w1": [(10, 0.0), (20, -1.0)]}, init_tau=16.0)
    for line, last in zip(ax.lines, (1 + np.exp(-1), 1 + np.exp(1)), strict=True):
        np.testing.assert_allclose(line.get_xdata(), [0, 1, 2])
        np.testing.assert_allclose(line.get_ydata(), [16, 2, last])


@pytest.mark.parametrize("metrics", [{}, {"test_accuracy": [(0, 0.5)]}, METRICS])
def test_a_summary_is_written_whatever_was_logged(metrics, tmp_path):
    curves.summary(metrics, tmp_path / "summary.png", "run")
    learned = Image.open(tmp_path / "summary.png").width > 1000
    assert learned == ("w0" in metrics)


def test_a_raster_of_no_neurons_is_empty(ax):
    assert plots.raster(ax, np.zeros((5, 0))) is ax
    assert not ax.collections and ax.get_xlim() == (0.5, 5.5)


def test_neuron_response_shows_membranes_and_spikes(ax):
    x = jnp.full(6, 1.5)
    assert plots.neuron_response(ax, x, {"a": neurons.LIF(2.0), "b": neurons.IF()}) is ax
    assert drawn(ax) == ["a, spikes: 3", "b, spikes: 6"]
    # h[t], then v[t]: 0.75, no spike; (0.75 + 1.5) / 2, a spike.
    np.testing.assert_allclose(ax.lines[1].get_ydata(), [0.75, 0.75, 1.125, 0] * 3)
    np.testing.assert_allclose(ax.lines[1].get_xdata(), np.repeat(range(1, 7), 2))
    assert [list(c.get_positions()) for c in ax.collections] == [[2, 4, 6], [1, 2, 3, 4, 5, 6]]


def test_neuron_response_shows_each_threshold(ax):
    own = {
        "learned": neurons.IF(nnx.Param(jnp.asarray(1.5))),
        "set": neurons.IF(0.5),
        "same": neurons.LIF(v_threshold=0.5),
    }
    plots.neuron_response(ax, jnp.full(6, 0.4), own)
    assert [text.get_text() for text in ax.texts] == ["threshold 0.5", "threshold 1.5"]
    assert [line.get_ydata()[0] for line in ax.lines[:2]] == [0.5, 1.5]


def test_surrogate_pictures_show_g_and_its_derivative():
    (_, (left, right)), atan = curves.figure(1, 2), {"ATan": surrogate.ATan()}
    assert drawn(plots.surrogate_functions(left, atan)) == ["spike", "ATan"]
    assert drawn(plots.surrogate_gradients(right, atan)) == ["ATan"]
    x, g = left.lines[1].get_data()
    np.testing.assert_allclose(np.gradient(g, x)[1:-1], right.lines[0].get_ydata()[1:-1], atol=1e-3)


def test_a_raster_has_a_tick_for_every_spike(ax):
    spikes = np.array([[1, 0, 0], [1, 0, 1]])
    assert plots.raster(ax, spikes, "layer") is ax
    drawn(ax)
    assert [list(c.get_positions()) for c in ax.collections] == [[1, 2], [], [2]]


def test_firing_rates_show_percent_per_layer_and_timestep(ax):
    none = jnp.zeros((2, 3, 0))
    layers = {
        name: LayerRecord(none, none, none, none, rate_TB, jnp.zeros(5))
        for name, rate_TB in {"a": jnp.array([[0.1, 0.3], [0, 0]]), "b": jnp.array([[1, 1], [0.5, 0]])}.items()
    }
    assert plots.firing_rates(ax, layers) is ax
    drawn(ax)
    np.testing.assert_allclose(ax.images[0].get_array(), [[20, 0], [100, 25]], rtol=1e-6)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]


def test_a_layer_that_hardly_fires_is_told_from_one_that_is_silent(ax):
    none = jnp.zeros((2, 1, 0))
    rates = {"silent": jnp.zeros((2, 1)), "sparse": jnp.full((2, 1), 3e-4)}
    layers = {name: LayerRecord(none, none, none, none, rate_TB, jnp.zeros(5)) for name, rate_TB in rates.items()}
    plots.firing_rates(ax, layers)
    assert [text.get_text() for text in ax.texts] == ["0", "0", "<0.1", "<0.1"]
    assert plots.firing_rates(curves.figure()[1], {"silent": layers["silent"]}).images[0].get_clim() == (0, 1)


@pytest.mark.parametrize(("T", "every"), [(20, 1), (60, 3)])
def test_timesteps_of_spike_maps_are_told_where_there_is_room(ax, T, every):
    plots.spike_maps(ax, np.zeros((T, 4, 4, 2)))
    assert [label.get_text() for label in ax.get_xticklabels()] == [str(t) for t in range(1, T + 1, every)]


def test_spike_maps_lie_in_rows_of_channels_and_columns_of_time(ax):
    spikes = np.zeros((3, 4, 5, 10))
    spikes[2, 1, 3, 7] = 1
    assert plots.spike_maps(ax, spikes) is ax
    drawn(ax)
    image = np.asarray(ax.images[0].get_array())
    row = [label.get_text() for label in ax.get_yticklabels()].index("7")
    assert np.argwhere(image == 1).tolist() == [[row * 5 + 1, 2 * 6 + 3]]


def test_many_wide_maps_stay_apart_on_a_page(ax):
    plots.spike_maps(ax, np.zeros((20, 128, 128, 8)))
    drawn(ax)
    gaps = np.isnan(np.asarray(ax.images[0].get_array())[0]).sum() / 19
    assert gaps * ax.get_window_extent().width / ax.images[0].get_array().shape[1] > 0.8  # of a pixel


def test_event_colors_tell_polarities_apart():
    frames = np.zeros((1, 2, 2, 2))
    frames[0, 0, 0, 0] = frames[0, 1, 1, 1] = 3
    colors = curves.event_colors(frames)[0]
    assert colors[0, 1].tolist() == [1, 1, 1]
    assert colors[0, 0].argmax() == 2 and colors[1, 1].argmax() == 0
    assert (curves.event_colors(np.zeros((1, 2, 2, 2))) == 1).all()
    with pytest.raises(UserError, match=r"event frames of shape \(2, 2\)"):
        curves.event_colors(np.zeros((2, 2)))


def test_event_frames_and_animation_show_every_frame(ax, tmp_path):
    frames = np.random.default_rng(0).poisson(0.2, (7, 34, 34, 2))
    assert plots.event_frames(ax, frames) is ax
    drawn(ax)
    assert ax.get_xlabel().endswith("orange brighter, black both; full colour from 2 in a pixel and frame")
    assert [text.get_text() for text in ax.texts] == [f"t = {t}" for t in range(1, 8)]
    plots.save_gif(frames, tmp_path / "a.gif", milliseconds=50)
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"], gif.info["loop"]) == (7, (238, 238), 50, 0)


def test_confusion_matrix_shows_shares_of_each_class(ax):
    assert plots.confusion_matrix(ax, [[3, 1], [0, 0]], ["cat", "dog"]) is ax
    drawn(ax)
    np.testing.assert_allclose(ax.images[0].get_array(), [[75, 25], [0, 0]])
    assert ax.get_title() == "accuracy 75.00% of 4 samples"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["cat", "dog"]


class PerChannel(neurons.IF):
    def __init__(self, shape=3):
        super().__init__(v_threshold=np.ones(shape))


class TwoStates(neurons.IF):
    def rest(self, x):
        return jnp.stack([super().rest(x)] * 2)


@pytest.mark.parametrize(
    ("draw", "says"),
    [
        (lambda ax: plots.neuron_response(ax, np.ones((4, 2)), {"IF": neurons.IF()}), r"\(4, 2\); give \[T\]"),
        (lambda ax: plots.neuron_response(ax, [1, np.nan], {"IF": neurons.IF()}), "a value that is not finite"),
        (lambda ax: plots.neuron_response(ax, np.ones(4), {}), "there are no neurons to draw"),
        (
            lambda ax: plots.neuron_response(ax, np.ones(4), {"a": PerChannel()}),
            "a has several states, or values for several neurons",
        ),
        (
            lambda ax: plots.neuron_response(ax, np.ones(4), {"a": PerChannel(1)}),
            "a has several states, or values for several neurons",
        ),
        (
            lambda ax: plots.neuron_response(ax, np.ones(4), {"a": TwoStates()}),
            "a has several states, or values for several neurons",
        ),
        (lambda ax: plots.raster(ax, [[0, 1], [1]]), r"rows of different lengths; give \[T, N\]"),
        (lambda ax: plots.event_frames(ax, np.ones((0, 4, 4, 2))), r"\(0, 4, 4, 2\); give \[T, H, W, 2\]"),
        (lambda ax: plots.raster(ax, np.ones((4, 2, 3))), r"spikes of shape \(4, 2, 3\); give \[T, N\]"),
        (lambda ax: plots.spike_maps(ax, np.ones((4, 2))), r"spikes of shape \(4, 2\); give \[T, H, W, C\]"),
        (lambda ax: plots.confusion_matrix(ax, np.ones((2, 2)), ["a"]), r"\(2, 2\) for 1 classes"),
        (lambda ax: plots.confusion_matrix(ax, np.ones(2)), r"counts of shape \(2,\); give \[label, prediction\]"),
        (lambda ax: plots.firing_rates(ax, {}), "there are no layers to draw; give what `recording.record` returns"),
        (lambda ax: plots.spike_maps(ax, np.ones((4, 5, 5, 3)), [3]), r"channels are \[3\]; give some of the 3"),
        (lambda ax: plots.spike_maps(ax, np.ones((4, 5, 5, 3)), []), r"channels are \[\]; give some of the 3"),
        (lambda ax: plots.spike_maps(ax, np.ones((4, 5, 5, 3)), 1), "channels are 1; .* as a list"),
        (lambda ax: plots.event_frames(ax, np.ones((4, 5, 5, 2)), columns=0), "columns is 0; give how many frames"),
        (lambda ax: plots.event_frames(ax, np.ones((4, 5, 5, 2)), columns=2.5), "columns is 2.5; give how many frames"),
        (lambda ax: plots.save_gif(np.ones((0, 4, 4, 2)), "a.gif"), r"frames of shape \(0, 4, 4, 2\); .*one entry"),
    ],
)
def test_what_cannot_be_drawn_is_told(ax, draw, says):
    with pytest.raises(UserError, match=says):
        draw(ax)


def test_a_current_may_have_the_axis_of_its_neuron(ax):
    plots.neuron_response(ax, np.full((6, 1), 0.6), {"IF": neurons.IF()})
    assert drawn(ax) == ["IF, spikes: 3"]


def test_of_no_samples_no_accuracy_is_told(ax):
    assert plots.confusion_matrix(ax, np.zeros((2, 2))).get_title() == "no samples"


@pytest.mark.parametrize(("others", "said"), [(199, "<1"), (134, "1")])  # half a percent, and 0.74
def test_a_confusion_that_happened_is_never_called_zero(ax, others, said):
    plots.confusion_matrix(ax, [[others, 1], [0, 1]])
    assert [text.get_text() for text in ax.texts][1] == said


def test_a_rate_is_written_on_the_row_that_shows_it(ax):
    layers = {name: SimpleNamespace(firing_rate=np.full((3, 1), rate)) for name, rate in (("a", 0.2), ("b", 0.1))}
    plots.firing_rates(ax, layers)
    (image,) = ax.images
    *_, bottom, top = image.get_extent()
    for text in ax.texts:
        row = int((text.get_position()[1] - top) / (bottom - top) * 2)
        assert text.get_text() == f"{image.get_array()[row, 0]:.1f}"
