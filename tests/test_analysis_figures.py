from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import figures
from plif_jax.analysis import recording
from plif_jax.config import Config
from plif_jax.networks import NMNISTNet

CLASSES = [f"class {c}" for c in range(10)]


def firing(number_layer):
    """A network whose neurons all fire now and then."""
    net = NMNISTNet(T=3, channels=4, number_layer=number_layer, rngs=nnx.Rngs(0))
    for layer in net.named_layers().values():
        if hasattr(layer, "kernel"):
            layer.kernel[...] *= 8
    net.eval()
    return net


@pytest.fixture(scope="module")
def net():
    return firing(number_layer=2)


@pytest.fixture(scope="module")
def frames():
    """Stored frames [N, T, H, W, 2] of five samples."""
    return np.random.default_rng(0).poisson(0.5, (5, 3, 34, 34, 2)).astype(np.uint8)


def test_every_picture_is_written(net, frames, tmp_path, capsys):
    x = jnp.moveaxis(jnp.asarray(frames, jnp.float32), 1, 0)
    figures.draw_neurons(net, tmp_path, "best checkpoint")
    figures.draw_layers(net, x, CLASSES, tmp_path, "sample 0", "best checkpoint")
    figures.draw_input(Config(dataset_name="NMNIST", T=3), x, frames, tmp_path, "sample 0")
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {
        *("neuron.png", "surrogate.png", "firing_rates.png", "raster.png", "spike_maps.png", "input.png", "input.gif")
    }
    assert {Path(line).name for line in capsys.readouterr().out.split()} == written
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as picture:
            assert picture.width <= 1500 and np.asarray(picture.convert("L")).std() > 5


def test_every_axis_is_used_and_equal_taus_share_a_line(frames, tmp_path, monkeypatch):
    drawn, said = {}, {}

    def save(fig, path):
        drawn[path.stem] = fig.axes
        said[path.stem] = " ".join([fig.get_suptitle(), *(ax.get_title() for ax in fig.axes)])

    monkeypatch.setattr(figures, "save", save)
    net, x = firing(number_layer=3), jnp.moveaxis(jnp.asarray(frames, jnp.float32), 1, 0)
    figures.draw_layers(net, x, CLASSES, tmp_path, "sample 0: class 3", "latest")
    assert "mean over 5 test samples, latest" in said["firing_rates"]
    voters = figures._voters(np.asarray(recording.record(net, x[:, :1])[1]["fc.6"].spikes[:, 0]), 10)
    shown = [list(ticks.get_positions()) for ticks in drawn["raster"][-1].collections]
    assert any(shown) and shown == [list(np.flatnonzero(train) + 1) for train in voters.T]
    assert all("sample 0: class 3, latest" in said[name] for name in ("raster", "spike_maps"))
    titles = [ax.get_title().split("\n")[0] for ax in drawn["raster"]]
    assert titles == ["conv.2", "conv.6", "conv.10", "fc.3", "fc.6"]
    assert {ax.get_ylabel() for ax in drawn["raster"][:-1]} == {"chosen neuron, evenly spread", "neuron"}
    assert [text.get_text() for text in drawn["raster"][-1].get_yticklabels()] == CLASSES
    np.testing.assert_allclose(drawn["raster"][-1].get_yticks(), 6 * np.arange(10) + 2.5)
    figures.draw_neurons(net, tmp_path, "latest")
    (label,) = (text.get_text() for text in drawn["neuron"][2].get_legend().get_texts())
    assert label.split() == ["tau", "=", "2.00:", "conv.2,", "conv.6,", "conv.10,", "fc.3,", "fc.6,", "spikes:", "14"]
    for layer in net.named_neurons().values():
        layer.w[...] = 6.0  # tau = 1.0025, which reads 1.00
    figures.draw_neurons(net, tmp_path, "latest")
    lines = {text.get_text() for text in drawn["surrogate"][1].get_legend().get_texts()}
    assert lines == {"ATan (the paper's)", "Sigmoid", "PiecewiseQuadratic", "Erf"}
    assert [text.get_text() for text in drawn["surrogate"][0].get_legend().get_texts()] == ["spike"]
    net = NMNISTNet(T=3, channels=4, number_layer=1, alpha_learnable=True, rngs=nnx.Rngs(0))
    net.conv[2].surrogate.alpha[...] = 2.5
    figures.draw_neurons(net, tmp_path, "latest")
    lines = {" ".join(text.get_text().split()) for text in drawn["surrogate"][1].get_legend().get_texts()}
    assert {"ATan, alpha 2.50: conv.2", "ATan, alpha 2.00: fc.3, fc.6"} <= lines


@pytest.mark.parametrize("classes", [2, 10, 11, 24, 100])
def test_of_every_class_as_many_voters_are_drawn(classes):
    votes_for = np.arange(10 * classes)[None] // 10
    (drawn,) = figures._voters(votes_for, classes)
    np.testing.assert_array_equal(drawn, np.repeat(np.arange(classes), len(drawn) // classes))
    assert len(drawn) == classes * min(10, max(1, 60 // classes))


@pytest.mark.parametrize("dataset_name", ["MNIST", "CIFAR10"])
def test_an_image_is_drawn_as_it_is_stored(dataset_name, tmp_path):
    config = Config(dataset_name=dataset_name)
    stored = np.random.default_rng(0).integers(0, 256, (1, *config.facts.shape), np.uint8)
    figures.draw_input(config, None, stored, tmp_path, "sample 0")
    assert [path.name for path in tmp_path.iterdir()] == ["input.png"]
