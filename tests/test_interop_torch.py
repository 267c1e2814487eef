"""Weights from elsewhere: names and layouts, networks built again."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_files_writer as writer
from flax import nnx
from reference import cases
from weights import arrays_of, authors_module, same, small

from plif_jax import networks, neurons, surrogate
from plif_jax.errors import UserError
from plif_jax.interop import spikingjelly, torch_files
from plif_jax.interop import torch as torch_interop
from plif_jax.interop.fold import fold
from plif_jax.interop.rebuild import rebuild

# Names and layouts


def test_state_dict_has_the_authors_names_and_layouts():
    arrays = torch_interop.state_dict(small(alpha_learnable=True))
    assert arrays["conv.0.weight"].shape == (3, 2, 3, 3) and arrays["fc.2.weight"].shape == (48, 192)
    assert arrays["conv.2.w"].shape == arrays["conv.2.surrogate_function.alpha"].shape == ()
    assert list(arrays)[:8] == [
        "conv.0.weight",
        *(f"conv.1.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        "conv.2.w",
        "conv.2.surrogate_function.alpha",
    ]


def test_biases_of_convolutions_travel_too():
    net, twin = (fold(networks.NMNISTNet(T=2, channels=3, rngs=nnx.Rngs(seed))) for seed in (0, 1))
    net.conv[0].bias[...] += jnp.arange(3.0)
    torch_interop.load_state_dict(twin, torch_interop.state_dict(net))
    np.testing.assert_array_equal(twin.conv[0].bias[...], [0, 1, 2])


class OwnNeuron(neurons.IF):
    """Learns a threshold for each unit, and a surrogate that is a function."""

    def __init__(self, size):
        super().__init__(surrogate=lambda x: jnp.where(x >= 0, 1.0, 0.0))
        self.theta = nnx.Param(jnp.linspace(0.5, 1.5, size))


def test_what_a_neuron_of_ones_own_learns_travels_too():
    def net(seed):
        table = {"static_conv": [], "conv": [], "fc": [networks.flatten, lambda *_: (OwnNeuron(4), (4,))]}
        return networks.SpikingNet(table, (1, 2, 2), 4, T=2, rngs=nnx.Rngs(seed))

    arrays = torch_interop.state_dict(net(0))
    assert list(arrays) == ["fc.1.theta"]
    other = net(1)
    torch_interop.load_state_dict(other, {"fc.1.theta": arrays["fc.1.theta"] + 1})
    np.testing.assert_array_equal(other.fc[1].theta[...], np.linspace(0.5, 1.5, 4, dtype=np.float32) + 1)


@pytest.mark.parametrize(
    "make", [lambda: nnx.BatchNorm(2, rngs=nnx.Rngs(0)), lambda: nnx.List([nnx.Param(jnp.ones(2))])]
)
def test_weights_of_a_layer_that_is_not_known_are_not_lost(make):
    fc = [lambda *_: (make(), (1, 2, 2)), networks.flatten, networks.neuron]
    table = {"static_conv": [], "conv": [], "fc": fc}
    net = networks.SpikingNet(table, (1, 2, 2), 4, T=2, rngs=nnx.Rngs(0))
    for export in (torch_interop.state_dict, lambda net: torch_interop.load_state_dict(net, {"fc.2.w": 0.0})):
        with pytest.raises(UserError, match=r"fc\.0 is flax's (BatchNorm|List), whose (bias|0|mean) has no place"):
            export(net)


class Gain(nnx.Conv):
    def __init__(self):
        super().__init__(2, 2, (1, 1), rngs=nnx.Rngs(0))
        self.gain = nnx.Param(jnp.ones(()))


class Counting(neurons.PLIF):
    def __init__(self):
        super().__init__()
        self.seen = nnx.BatchStat(jnp.zeros(()))


@pytest.mark.parametrize(("layer", "what"), [(Gain, "gain"), (Counting, "seen")])
def test_nor_are_those_that_a_known_layer_has_besides(layer, what):
    table = {"static_conv": [], "conv": [lambda *_: (layer(), (1, 2, 2))], "fc": [networks.flatten, networks.neuron]}
    net = networks.SpikingNet(table, (1, 2, 2), 4, T=2, rngs=nnx.Rngs(0))
    with pytest.raises(
        UserError, match=rf"conv\.0 is test_interop_torch's {layer.__name__}, whose {what} has no place"
    ):
        torch_interop.state_dict(net)


class Tensor:
    """What PyTorch's tensors that want a gradient are to NumPy."""

    def __array__(self, *_, **__):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.\nUse detach")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (np.array(1j), "fc.1.w holds complex128; weights are real numbers"),
        (np.array("1"), "fc.1.w holds <U1; weights are real numbers"),
        (Tensor(), r"fc.1.w is no array that NumPy takes: Can't call numpy\(\) on Tensor that requires grad\.$"),
        ([1, [2]], "fc.1.w is no array that NumPy takes"),
        (np.ma.array(1.0, mask=True), "fc.1.w is masked in places; give an array that holds all its numbers"),
        (np.array(1e300), "fc.1.w holds numbers beyond the largest of float32"),
    ],
)
def test_what_are_no_weights_is_refused(given, says):
    table = {"static_conv": [], "conv": [], "fc": [networks.flatten, networks.neuron]}
    net = networks.SpikingNet(table, (1, 2, 2), 4, T=2, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=says):
        torch_interop.load_state_dict(net, {"fc.1.w": given})
    with pytest.raises(UserError, match="weights are a list; give a mapping from names to arrays"):
        torch_interop.load_state_dict(net, [given])


@pytest.mark.parametrize("flat", [False, True])
def test_what_each_neuron_of_maps_has_goes_channel_first(flat):
    """Of maps and of these flattened, where batch norm has values for each of them too."""
    theta = np.arange(24.0).reshape(2, 3, 4)

    def neuron(net, shape, rngs):
        layer = neurons.IF(nnx.Param(jnp.asarray(theta.reshape(shape))))
        return layer, shape

    fc = [networks.flatten, networks.norm, neuron] if flat else [neuron, networks.flatten, networks.norm]
    net, other = (
        networks.SpikingNet({"static_conv": [], "conv": [], "fc": fc}, (2, 3, 4), 4, T=2, rngs=nnx.Rngs(0))
        for _ in range(2)
    )
    net.fc[1 if flat else 2].scale[...] = jnp.asarray(theta.ravel())
    arrays, norm = torch_interop.state_dict(net), "fc.1" if flat else "fc.2"
    first = theta.transpose(2, 0, 1)
    np.testing.assert_array_equal(arrays[f"{norm}.weight"], first.ravel())
    np.testing.assert_array_equal(
        arrays["fc.2.v_threshold" if flat else "fc.0.v_threshold"], first.ravel() if flat else first
    )
    torch_interop.load_state_dict(other, arrays)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(other), nnx.state(net))


@pytest.mark.parametrize("settings", [{"alpha_learnable": True}, {"use_plif": False, "number_layer": 3}])
def test_weights_come_back_as_they_were_loaded(settings):
    net = small(**settings)
    arrays = arrays_of(net)
    torch_interop.load_state_dict(net, arrays)
    for name, array in torch_interop.state_dict(net).items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)


def test_a_state_dict_may_be_changed():
    arrays = torch_interop.state_dict(small())
    for array in arrays.values():
        array += 1


def test_weights_that_were_loaded_are_not_the_caller_s_memory():
    """In which a PyTorch network may train on: JAX borrows what lies at multiples of 64 bytes."""
    net = small()
    before, given = torch_interop.state_dict(net), {}
    for name, array in torch_interop.state_dict(net).items():
        room = np.empty(array.size + 16, array.dtype)
        start = -room.ctypes.data % 64 // array.itemsize
        given[name] = room[start : start + array.size].reshape(array.shape)
        given[name][...] = array
    torch_interop.load_state_dict(net, given)
    for array in given.values():
        array += 1
    for name, array in torch_interop.state_dict(net).items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)


def test_a_linear_layer_sees_features_channel_first():
    """One weight, from channel 1, row 2, column 3 of the last feature map [3, 8, 8]."""
    net = small()
    arrays = arrays_of(net)
    arrays["fc.2.weight"] = np.zeros_like(arrays["fc.2.weight"])
    arrays["fc.2.weight"][0, 1 * 64 + 2 * 8 + 3] = 1
    torch_interop.load_state_dict(net, arrays)
    features = jnp.asarray(cases.array(0, (1, 1, 8, 8, 3)), jnp.float32)
    np.testing.assert_allclose(net.fc[2](net.fc[0](features))[0, 0, 0], features[0, 0, 2, 3, 1], rtol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.pop("conv.1.bias"), "missing: conv.1.bias"),
        (lambda a: a.update({"conv.2.alpha": np.ones(())}), "unknown: conv.2.alpha"),
        (lambda a: a.update({n: np.ones(()) for n in range(12)}), "unknown: 0, 1, .* 9 and 2 more$"),
        (lambda a: a.update({"conv.0.weight": np.ones((3, 2, 5, 5))}), r"conv.0.weight has shape \(3, 2, 5, 5\).*3, 3"),
    ],
)
def test_other_weights_are_refused_and_change_nothing(change, message):
    net = small()
    before = torch_interop.state_dict(net)
    arrays = arrays_of(net)
    change(arrays)
    with pytest.raises(UserError, match=message):
        torch_interop.load_state_dict(net, arrays)
    for name, array in torch_interop.state_dict(net).items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("legacy", [False, True])
def test_an_authors_checkpoint_is_read_and_its_network_built_again(monkeypatch, tmp_path, legacy):
    weights = arrays_of(small(use_plif=False))
    net = authors_module(monkeypatch, weights, pool="AvgPool2d", T=7)
    path = tmp_path / "check_point_max.pt"
    writer.save(path, {"net": net, "epoch": 3, "max_test_accuracy": 0.5, "log_dir": "logs"}, legacy)
    monkeypatch.undo()
    named = {"models", "spikingjelly"}
    loaded = named & sys.modules.keys()  # by the tests of exchange, where SpikingJelly is installed

    checkpoint = torch_files.read(path)
    same(checkpoint.arrays, weights)
    assert str(checkpoint.module.cls) == "models.NMNISTNet"
    assert named & sys.modules.keys() == loaded

    net = rebuild(checkpoint)
    assert type(net) is networks.NMNISTNet and net.T == 7 and not net.use_max_pool and not net.detach_reset
    assert {neuron.tau for neuron in net.named_neurons().values()} == {4.0}
    assert net.fc[1].deterministic  # in evaluation mode
    same(torch_interop.state_dict(net), weights)


# Networks built again


@pytest.mark.parametrize(
    "make, settings",
    [
        (lambda **s: networks.NMNISTNet(channels=5, number_layer=3, alpha_learnable=True, **s), {}),
        (lambda **s: networks.CIFAR10DVSNet(channels=2, number_layer=6, use_plif=False, **s), {"init_tau": 3.0}),
        (lambda **s: networks.DVS128GestureNet(channels=2, number_layer=6, **s), {"detach_reset": False, "T": 2}),
        (lambda **s: networks.ASLDVSNet(channels=2, number_layer=6, **s), {}),
    ],
)
def test_weights_alone_tell_which_network_they_are_of(make, settings):
    weights = arrays_of(make(rngs=nnx.Rngs(0)))
    net = rebuild(torch_files.Checkpoint(weights), use_max_pool=True, **settings)
    assert type(net) is type(make(rngs=nnx.Rngs(0)))
    same(torch_interop.state_dict(net), weights)
    for name, value in settings.items():
        assert getattr(net, name) == value


@pytest.mark.parametrize("settings, missing", [({}, "init_tau"), ({"init_tau": 2.0}, "use_max_pool")])
def test_what_weights_do_not_tell_is_asked_for(settings, missing):
    with pytest.raises(UserError, match=f"give {missing}"):
        rebuild(torch_files.Checkpoint(arrays_of(small(use_plif=False))), **settings)


@pytest.mark.parametrize(
    "neuron, message",
    [
        ({"v_threshold": 0.5}, "another threshold or reset"),
        ({"v_reset": None}, "another threshold or reset"),
        ({"decay_input": False}, "decay_input=False"),
    ],
)
def test_neurons_that_ours_are_not_are_refused(monkeypatch, tmp_path, neuron, message):
    net = authors_module(monkeypatch, arrays_of(small()), **neuron)
    writer.save(tmp_path / "x.pt", net)
    with pytest.raises(UserError, match=message):
        rebuild(torch_files.read(tmp_path / "x.pt"))


def test_weights_of_no_known_network_are_refused():
    with pytest.raises(UserError, match="dataset_name is 'NMIST'; weights with these names are of NMNIST, CIFAR10DVS"):
        rebuild(torch_files.Checkpoint(arrays_of(small())), use_max_pool=True, dataset_name="NMIST")
    theirs = arrays_of(spikingjelly.NMNISTNet(neurons.PLIF, channels=3, rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match="dataset_name is 'CIFAR10'; weights of these shapes are of NMNIST, Digits"):
        rebuild(torch_files.Checkpoint(theirs), dataset_name="CIFAR10")
    with pytest.raises(UserError, match=r'surrogate Atan in the file or given has no .* such as \("ATan", 2.0\)'):
        rebuild(torch_files.Checkpoint(theirs), surrogate=("Atan", 2.0))
    for names in ({"conv.0.weight": np.zeros((3, 3))}, {"conv_fc.0.weight": np.zeros((3, 2, 3, 3))}):
        with pytest.raises(UserError, match="are of none of"):
            rebuild(torch_files.Checkpoint(names))


# SpikingJelly


@pytest.mark.parametrize("cls, channels, inputs", [(spikingjelly.NMNISTNet, 3, 192), (spikingjelly.CIFAR10Net, 2, 128)])
def test_spikingjellys_networks_have_its_names_and_biases(cls, channels, inputs):
    weights = arrays_of(cls(neurons.PLIF, channels=channels, rngs=nnx.Rngs(0)))
    n = max(int(name.split(".")[1]) for name in weights)
    assert weights[f"conv_fc.{n - 1}.weight"].shape == (100, 2048) and weights[f"conv_fc.{n - 1}.bias"].shape == (100,)
    assert weights[f"conv_fc.{n - 4}.weight"].shape == (2048, inputs)
    for wrong in ("ATan", surrogate.ATan()):
        with pytest.raises(UserError, match="give its name and alpha, such as"):
            rebuild(torch_files.Checkpoint(weights), surrogate=wrong)
    net = rebuild(torch_files.Checkpoint(weights), v_reset=None, surrogate=("ATan", 3.0))
    assert type(net) is cls
    same(torch_interop.state_dict(net), weights)
    for neuron in net.named_neurons().values():
        assert neuron.v_reset is None and not neuron.detach_reset  # the latter SpikingJelly's default
        assert type(neuron.surrogate) is surrogate.ATan and neuron.surrogate.alpha == 3.0


def test_spikingjellys_networks_are_as_wide_as_there():
    for name, width in (("MNISTNet", 128), ("FashionMNISTNet", 128), ("CIFAR10Net", 256), ("DVSGestureNet", 128)):
        cls = getattr(spikingjelly, name)
        net = nnx.eval_shape(lambda cls=cls: cls(neurons.PLIF, rngs=nnx.Rngs(0)))
        assert net.conv_fc[0].out_features == width


def test_spikingjelly_gives_the_same_spikes():
    torch = pytest.importorskip("torch")
    parametric_lif_net = pytest.importorskip("spikingjelly.activation_based.model.parametric_lif_net")
    from spikingjelly.activation_based import functional, neuron

    theirs = parametric_lif_net.NMNISTNet(channels=3, spiking_neuron=neuron.ParametricLIFNode, init_tau=2.0)
    functional.set_step_mode(theirs, "m")
    weights = arrays_of(spikingjelly.NMNISTNet(neurons.PLIF, channels=3, rngs=nnx.Rngs(0)))
    theirs.load_state_dict({name: torch.as_tensor(array) for name, array in weights.items()})
    theirs.eval()
    x = cases.frames(0, (4, 2, 2, 34, 34)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.as_tensor(x)).numpy()
    net = rebuild(torch_files.Checkpoint(weights))
    _, votes = jax.jit(lambda net, x: net.unroll(None, x))(net, x.transpose(0, 1, 3, 4, 2))
    assert expected.any()
    np.testing.assert_allclose(votes, expected, atol=1e-6)


def test_a_learned_alpha_of_another_start_is_taken_from_the_weights():
    weights = arrays_of(small(alpha_learnable=True))
    net = rebuild(torch_files.Checkpoint(weights), use_max_pool=True, surrogate=("ATan", 3.0))
    assert net.fc[3].surrogate.alpha[...] == weights["fc.3.surrogate_function.alpha"]


def test_only_the_layer_behind_flattened_maps_has_another_order_there():
    table = {"static_conv": [], "conv": [networks.conv(2)], "fc": [networks.flatten, networks.linear(8)]}
    table["fc"] += [networks.linear(10), networks.neuron]  # as wide as the maps: 8 values
    net = networks.SpikingNet(table, (2, 2, 2), 10, T=3, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(torch_interop.state_dict(net)["fc.2.weight"], net.fc[2].kernel[...].T)
