"""The exported function against the network, loaded where plif_jax cannot be imported."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plif_jax import layers, networks, neurons
from plif_jax.errors import UserError
from plif_jax.interop import export
from plif_jax.interop.fold import fold
from plif_jax.layers import BatchNorm

pytest.importorskip("flatbuffers")

SHAPE, CLASSES, T = (6, 6, 1), 3, 5


def trained(static):
    """A small network in training mode, as after training: busy neurons, batch norm that does a lot."""
    layers = [networks.conv(3), networks.norm, networks.neuron, networks.pool]
    table = {
        "static_conv": layers[:2] if static else [],
        "conv": layers[2:] if static else layers,
        "fc": [networks.flatten, networks.dropout, networks.linear(10 * CLASSES), networks.neuron],
    }
    net = networks.SpikingNet(table, SHAPE, CLASSES, T=T, rngs=nnx.Rngs(0))
    norm = next(layer for layer in net.named_layers().values() if isinstance(layer, BatchNorm))
    norm.scale[...], norm.bias[...] = jnp.array([1.0, 2.0, 3.0]), jnp.array([0.2, 0.5, 0.8])
    norm.mean[...], norm.var[...] = jnp.array([-0.5, 0.0, 0.5]), jnp.array([0.5, 1.0, 2.0])
    net.fc[2].kernel[...] *= 4
    return net


def some_input(static, B):
    return np.random.default_rng(0).normal(size=(B, *SHAPE) if static else (T, B, *SHAPE)).astype(np.float32)


def assert_rates_are_those_of(net, x, rates):
    """The same number of spikes for every sample and class; means of them may differ in how they were rounded."""
    net.eval()
    ours = np.asarray(net(x))
    net.train()
    assert 0.02 < ours.mean() < 0.98
    np.testing.assert_array_equal(*(np.rint(r * 10 * T) for r in (rates, ours)))
    np.testing.assert_allclose(rates, ours, rtol=1e-6)


@pytest.mark.parametrize("static", [True, False], ids=["images", "frames"])
def test_the_file_gives_the_networks_rates_for_any_batch(tmp_path, static):
    net = trained(static)
    export.save(net, tmp_path / "net.jax")
    loaded = jax.export.deserialize((tmp_path / "net.jax").read_bytes())
    assert set(loaded.platforms) == {"cpu", "cuda", "tpu"}
    for B in (1, 4):
        x = some_input(static, B)
        assert_rates_are_those_of(net, x, loaded.call(x))
    assert not net.fc[1].deterministic  # exported as in evaluation, left in training


def test_in_bfloat16_batch_norm_stays_as_it_is():
    """Folded, its weights would be rounded again, and other neurons fire."""
    net, x = trained(True), some_input(True, 64)
    for layer in (*net.static_conv, *net.fc):
        if isinstance(layer, nnx.Conv | nnx.Linear | BatchNorm):
            layer.dtype = jnp.bfloat16
    net.dtype = jnp.bfloat16
    assert_rates_are_those_of(net, x, export.to_exported(net).call(x))


def test_a_fixed_batch_is_refused_another():
    exported = export.to_exported(trained(True), batch_size=2)
    assert exported.call(some_input(True, 2)).shape == (2, CLASSES)
    with pytest.raises(ValueError, match="shape"):
        exported.call(some_input(True, 3))
    for size in (0, 1.5, "2", 2**31):
        with pytest.raises(UserError, match=f"batch_size is {size!r}; give a whole number from 1"):
            export.to_exported(trained(True), batch_size=size)


LOAD = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("plif_jax", "flax", "optax"):
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Absent())
import jax, numpy

rates = jax.export.deserialize(open(sys.argv[1], "rb").read()).call(numpy.load(sys.argv[2]))
assert not {"plif_jax", "flax"} & set(sys.modules)
numpy.save(sys.argv[3], rates)
"""


def test_the_file_runs_without_plif_jax(tmp_path):
    net, x = trained(False), some_input(False, 2)
    export.save(net, tmp_path / "net.jax")
    np.save(tmp_path / "x.npy", x)
    paths = [str(tmp_path / name) for name in ("net.jax", "x.npy", "rates.npy")]
    subprocess.run([sys.executable, "-c", LOAD, *paths], check=True)
    assert_rates_are_those_of(net, x, np.load(paths[2]))


def test_a_network_wide_enough_for_winograd_takes_any_batch():
    table = {
        "static_conv": [],
        "conv": [networks.conv(32), networks.norm, networks.neuron, networks.conv(32), networks.norm, networks.neuron],
        "fc": [networks.pool, networks.flatten, networks.linear(20), networks.neuron],
    }
    net = networks.SpikingNet(table, (8, 8, 2), 2, T=2, init_tau=1.1, rngs=nnx.Rngs(0))
    for layer in (net.conv[0], net.conv[3], net.fc[2]):
        layer.kernel[...] *= 4
    net.eval()
    x = np.random.default_rng(0).poisson(1.0, (2, 3, 8, 8, 2)).astype(np.float32)
    exported = export.to_exported(net)
    rates, backward = jax.vjp(jax.jit(net.__call__), x)
    assert 0.02 < rates.mean() < 0.98
    np.testing.assert_allclose(exported.call(x), rates, atol=1e-6)
    for mine, its in zip(exported.vjp().call(x, rates), backward(rates), strict=True):
        assert np.abs(its).max() > 0
        np.testing.assert_allclose(mine, its, atol=1e-5 * np.abs(its).max())


def test_folding_keeps_the_currents():
    net = trained(True)
    x = some_input(True, 4)[None]
    folded = fold(net)
    net.eval()
    assert [type(layer).__name__ for layer in folded.static_conv] == ["Conv3x3"]
    np.testing.assert_allclose(
        folded.static_conv[0](x), net.static_conv[1](net.static_conv[0](x)), rtol=1e-5, atol=1e-6
    )


def test_layers_of_ones_own_are_folded_in_evaluation_mode():
    net = trained(True)
    net.fc[1] = nnx.Dropout(0.5)
    assert fold(net).fc[1].deterministic and not net.fc[1].deterministic


@pytest.fixture
def script(monkeypatch):
    """experiments/export.py with a run that need not be trained first."""
    path = Path(__file__).parents[1] / "experiments" / "export.py"
    spec = importlib.util.spec_from_file_location("export_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "load_network", lambda run, checkpoint: (None, trained(False)))
    return module


def test_the_script_writes_what_the_ending_says(tmp_path, script, capsys):
    script.main(["RUN", str(tmp_path / "net.jax"), "-batch_size", "2"])
    assert "a function of float32[5,2,6,6,1]" in capsys.readouterr().out
    x = some_input(False, 2)
    assert_rates_are_those_of(trained(False), x, jax.export.deserialize((tmp_path / "net.jax").read_bytes()).call(x))
    with pytest.raises(UserError, match=r"-batch_size 2: a NIR graph has no batch"):
        script.main(["RUN", "net.nir", "-batch_size", "2"])
    with pytest.raises(UserError, match=r"neither .nir nor .jax"):
        script.main(["RUN", "net.onnx"])
    with pytest.raises(UserError, match=r"nowhere/net\.jax cannot be written: No such file or directory$"):
        script.main(["RUN", str(tmp_path / "nowhere" / "net.jax")])


def test_the_script_writes_nir(tmp_path, script, capsys):
    nir = pytest.importorskip("nir")
    script.main(["RUN", str(tmp_path / "net.nir")])
    assert "10 NIR nodes" in capsys.readouterr().out
    assert nir.read(tmp_path / "net.nir").metadata == {"dt": 1e-4, "T": T}
    with pytest.raises(UserError, match=r"nowhere/net\.nir cannot be written: No such file or directory$"):
        script.main(["RUN", str(tmp_path / "nowhere" / "net.nir")])


def test_a_layer_that_stands_twice_keeps_its_own_weights_where_no_batch_norm_follows():
    shared = layers.Conv3x3(2, 2, rngs=nnx.Rngs(0))

    def conv(net, shape, rngs):
        return shared, shape

    table = {"static_conv": [], "conv": [conv, networks.norm, networks.neuron, conv, networks.neuron]}
    table["fc"] = [networks.flatten, networks.linear(10), networks.neuron]
    net = networks.SpikingNet(table, (4, 4, 2), 10, T=3, rngs=nnx.Rngs(0))
    net.conv[1].scale[...] *= 4
    net.conv[1].bias[...] += 0.5
    net.eval()
    x = jax.random.uniform(jax.random.key(0), (3, 2, 4, 4, 2))

    def currents(net):
        entered = []
        net.unroll(None, x, observe=lambda _, layer, x, y: isinstance(layer, neurons.Neuron) and entered.append(x))
        return entered

    for plain, folded in zip(currents(net), currents(fold(net)), strict=True):
        np.testing.assert_allclose(plain, folded, atol=1e-5)


def test_a_network_that_is_exported_trains_on():
    net = networks.NMNISTNet(T=2, channels=2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    export.to_exported(net, 1)
    assert not net.conv[1].use_running_average and not net.fc[1].deterministic
