"""Weights from elsewhere: names and layouts, PyTorch's files read without running them, networks built again."""

import io
import os
import pickle
import runpy
import sys
import zipfile
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_files_writer as writer
from flax import nnx
from reference import cases

from plif_jax import networks, neurons, surrogate
from plif_jax.errors import UserError
from plif_jax.interop import spikingjelly, torch_files
from plif_jax.interop import torch as torch_interop
from plif_jax.interop.fold import fold
from plif_jax.interop.rebuild import rebuild


def small(**settings):
    return networks.NMNISTNet(**{"T": 3, "channels": 3, "rngs": nnx.Rngs(0)} | settings)


def arrays_of(net, dtype=np.float32):
    shapes = {name: array.shape for name, array in torch_interop.state_dict(net).items()}
    arrays = cases.state_dict(shapes)
    return {name: array if array.dtype == np.int64 else np.asarray(array, dtype) for name, array in arrays.items()}


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
        (lambda a: a.update({str(n): np.ones(()) for n in range(12)}), "unknown: 0, 1, .* 9 and 2 more$"),
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


# Files


def authors_module(monkeypatch, arrays, pool="MaxPool2d", T=3, **neuron):
    """The authors' module tree for the weights of an N-MNIST network."""
    layers, clock = "torch.nn.modules", "spikingjelly.clock_driven"
    writer.foreign_modules(
        monkeypatch,
        {
            "models": ["NMNISTNet", "PLIFNode"],
            layers: ["Sequential", "Conv2d", "BatchNorm2d", "Linear", "Flatten", pool],
            f"{clock}.neuron": ["LIFNode"],
            f"{clock}.layer": ["Dropout"],
            f"{clock}.surrogate": ["ATan"],
        },
    )
    modules = {name: vars(sys.modules[name]) for name in ("models", layers, f"{clock}.neuron", f"{clock}.layer")}
    classes = {key: value for members in modules.values() for key, value in members.items()}
    atan = sys.modules[f"{clock}.surrogate"].ATan

    def spiking_function(x, alpha):  # which each instance keeps, so that the pickle names a class's member
        raise AssertionError("it is never called")

    spiking_function.__module__, spiking_function.__qualname__ = f"{clock}.surrogate", "ATan.spiking_function"
    atan.spiking_function = staticmethod(spiking_function)
    plif = any(name.endswith(".w") for name in arrays)

    def leaf(name, kind):
        own = [(key.rpartition(".")[2], writer.Tensor(a)) for key, a in arrays.items() if key.startswith(f"{name}.")]
        buffers = [(key, t) for key, t in own if key.startswith(("running", "num_batches"))]
        parameters = [(key, t) for key, t in own if (key, t) not in buffers]
        if kind == "neuron":
            settings = {"v_threshold": 1.0, "v_reset": 0.0, "detach_reset": False, "v": 0.0} | neuron
            children = [("surrogate_function", writer.module(atan, alpha=2.0, spiking=True, f=spiking_function))]
            if not plif:
                settings |= {"tau": 4.0}
            kind = classes["PLIFNode" if plif else "LIFNode"]
            return writer.module(kind, children, parameters, **settings)
        scratch = [("scratch", writer.Tensor(np.ones(2, np.float32)))] if buffers else []
        return writer.module(classes[kind], parameters=parameters, buffers=buffers + scratch, bias=None)

    kinds = {
        "conv": ["Conv2d", "BatchNorm2d", "neuron", pool] * 2,
        "fc": ["Flatten", "Dropout", "Linear", "neuron", "Dropout", "Linear", "neuron"],
    }
    parts = {
        part: writer.module(classes["Sequential"], [(str(i), leaf(f"{part}.{i}", k)) for i, k in enumerate(names)])
        for part, names in kinds.items()
    }
    return writer.module(classes["NMNISTNet"], parts.items(), T=T, init_tau=2.0)


def same(arrays, expected):
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)


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


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state, "epoch": 1}])
def test_a_state_dict_is_read(monkeypatch, tmp_path, legacy, wrap):
    writer.foreign_modules(monkeypatch, {})
    expected = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.asarray(3, np.int64),
        "c": np.linspace(0, 1, 4),
        "d": np.zeros((0, 3), np.float16),
    }
    state = {name: writer.Tensor(array, transposed=name == "a") for name, array in expected.items()}
    writer.save(tmp_path / "weights.pt", wrap(state), legacy)
    same(torch_files.read(tmp_path / "weights.pt").arrays, expected)


def test_npz_goes_out_and_in(tmp_path):
    expected = arrays_of(small())
    torch_files.write(tmp_path / "weights.npz", expected)
    same(torch_files.read(tmp_path / "weights.npz").arrays, expected)


def test_bfloat16_goes_out_as_float32(tmp_path):
    torch_files.write(tmp_path / "x.npz", {"a": np.asarray([1.5, 2.5], jnp.bfloat16)})
    np.testing.assert_array_equal(torch_files.read(tmp_path / "x.npz").arrays["a"], np.float32([1.5, 2.5]))


def test_torch_itself_reads_what_is_written_and_writes_what_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    expected, path = arrays_of(small()), tmp_path / "weights.pt"
    torch_files.write(path, expected)
    same({name: tensor.numpy() for name, tensor in torch.load(path, weights_only=True).items()}, expected)
    same(torch_files.read(path).arrays, expected)


class Payload:
    """What a hostile file holds: unpickling calls `os.mkdir`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_would_run_something_is_refused_and_runs_nothing(tmp_path, legacy):
    trace, path = tmp_path / "trace", tmp_path / "hostile.pt"
    writer.save(path, {"net": Payload(trace)}, legacy)
    with pytest.raises(UserError, match=r"hostile\.pt needs a call of posix\.mkdir .* refused"):
        torch_files.read(path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Payload(trace)))
    assert trace.exists()  # it would have


@pytest.mark.parametrize(
    "instructions",
    [
        b"cos\nsystem\n(S'true'\ntR.",  # call
        b"(S'true'\nios\nsystem\n.",  # instance by call, protocol 0
        b"(cos\nsystem\nS'true'\no.",  # the same, protocol 1
        b"\x80\x02cbuiltins\neval\n)\x81.",  # instance that is no network
        b"\x80\x02ccollections\nOrderedDict\n)R}(X\x01\x00\x00\x00aK\x01ub\x85.",  # state of a mapping, in a tuple
        b"\x80\x02ctorch._utils\n_rebuild_parameter\n}(X\x08\x00\x00\x00__code__K\x01ub.",  # state of a function
        b"\x80\x02]}(K\x01K\x02e\x81.",
        b"\x80\x02\x82\x01.",  # extension registry
        b"\x80\x02}(((K\x01t\x85tK\x01u.",  # a nested tuple as a key
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"",
        b".",
        b"R.",
    ],
)
def test_no_instruction_does_more_than_build_data(tmp_path, instructions, monkeypatch):
    monkeypatch.setattr(os, "system", lambda command: pytest.fail("ran"))
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", instructions)
    with pytest.raises(UserError) as caught:
        torch_files.read(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.fixture(scope="module")
def sound_files(tmp_path_factory):
    folder, files = tmp_path_factory.mktemp("sound"), []
    with pytest.MonkeyPatch.context() as monkeypatch:
        weights = arrays_of(small())
        net = authors_module(monkeypatch, weights)
        for legacy in (False, True):
            writer.save(folder / "x.pt", {"net": net}, legacy)
            files.append((folder / "x.pt").read_bytes())
    stream = io.BytesIO()
    np.savez(stream, a=np.arange(3.0))
    return folder, [*files, stream.getvalue()]


@hypothesis.given(st.integers(0, 2), st.floats(0, 1), st.integers(0, 255), st.booleans())
@hypothesis.settings(max_examples=300, deadline=None)
def test_a_damaged_file_gives_one_line_or_its_arrays(sound_files, which, position, byte, cut):
    folder, files = sound_files
    content = bytearray(files[which])
    index = min(int(position * len(content)), len(content) - 1)
    if cut:
        del content[index:]
    else:
        content[index] = byte
    path = folder / ("damaged.npz" if which == 2 else "damaged.pt")
    path.write_bytes(content)
    try:
        arrays = torch_files.read(path).arrays
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        assert all(isinstance(array, np.ndarray) for array in arrays.values())


@pytest.mark.parametrize(
    "tensor, message",
    [
        ((b"\x01" * 40, 0, (4, 4), (4, 1)), "numbers of a are missing or cut short"),
        ((b"\x01" * 64, 1, (4, 4), (4, 1)), "a reaches past its numbers"),
        ((b"\x01" * 64, 0, (1 << 40, 1 << 40), (0, 0)), "a reaches past its numbers"),
        ((b"\x01" * 64, 0, (4, 4), (-4, 1)), "shape is damaged"),
        ((b"\x01" * 64, 0, (1,) * 70, (1,) * 70), "shape is damaged"),
        ((b"\x01" * 64, 0, (1,), (1 << 70,)), "shape is damaged"),
        ((b"\x01" * 64, 0, (0, 1 << 62, 1 << 62), (1, 1, 1)), "a has an impossible shape"),
    ],
)
def test_a_tensor_reaches_only_its_own_numbers(monkeypatch, tmp_path, tensor, message):
    data, offset, shape, strides = tensor
    writer.foreign_modules(monkeypatch, {})
    storage = writer._Storage(np.ones(16, np.float32))

    class Crooked:
        def __reduce_ex__(self, protocol):
            return sys.modules["torch._utils"]._rebuild_tensor_v2, (storage, offset, shape, strides, False, None)

    path = tmp_path / "crooked.pt"
    writer.save(path, {"a": Crooked()})
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("archive/data.pkl")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", data)
    with pytest.raises(UserError, match=message):
        torch_files.read(path)


def test_a_compressed_archive_is_refused_before_it_is_inflated(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\0" * 1_000_000)
    with pytest.raises(UserError, match="is compressed as its writers never do"):
        torch_files.read(tmp_path / "bomb.pt")


def test_a_compressed_npz_is_read(tmp_path):
    expected = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((1000, 100))}
    np.savez_compressed(tmp_path / "weights.npz", **expected)
    same(torch_files.read(tmp_path / "weights.npz").arrays, expected)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.pt", None, "cannot be read: No such file"),
        ("text.pt", b"hello", "neither a .npz nor a file of torch.save"),
        ("text.npz", b"hello", "not a whole archive"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        torch_files.read(tmp_path / name)


def test_an_npz_of_objects_is_refused(tmp_path):
    np.savez(tmp_path / "objects.npz", a=np.asarray([Payload(tmp_path / "trace")], object))
    with pytest.raises(UserError, match="not an archive of plain arrays"):
        torch_files.read(tmp_path / "objects.npz")
    assert not (tmp_path / "trace").exists()


def test_weights_go_out_under_known_suffixes_only(tmp_path):
    with pytest.raises(UserError, match=r"\.h5; weights are written as \.npz or \.pt"):
        torch_files.write(tmp_path / "weights.h5", {})
    with pytest.raises(UserError, match=r"weights\.npz cannot be written: No such file or directory"):
        torch_files.write(tmp_path / "nowhere" / "weights.npz", {})


def test_the_script_converts_between_files(tmp_path, capsys):
    convert = runpy.run_path(str(Path(__file__).parents[1] / "experiments" / "convert.py"))["main"]
    expected = arrays_of(small())
    torch_files.write(tmp_path / "a.npz", expected)
    convert([str(tmp_path / "a.npz"), str(tmp_path / "b.npz")])
    same(torch_files.read(tmp_path / "b.npz").arrays, expected)
    assert f"b.npz: {len(expected)} arrays" in capsys.readouterr().out
    with pytest.raises(UserError, match="not the folder of a run"):
        convert([str(tmp_path), str(tmp_path / "c.npz")])


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
