"""NIR graphs against a plain interpreter of NIR's equations, against other simulators, and back again."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plif_jax import networks, neurons
from plif_jax.analysis import operations
from plif_jax.errors import UserError
from plif_jax.layers import BatchNorm

nir = pytest.importorskip("nir")

from plif_jax.interop import nir as nir_interop  # noqa: E402
from plif_jax.interop.fold import fold  # noqa: E402

B, T, SHAPE, CLASSES = 3, 6, (9, 8, 2), 5


def static_table():
    conv, norm, neuron = networks.conv(4), networks.norm, networks.neuron
    return {
        "static_conv": [conv, norm],
        "conv": [neuron, networks.pool, conv, norm, neuron, networks.pool],
        "fc": [networks.flatten, networks.dropout, networks.linear(20), neuron, networks.linear(10 * CLASSES), neuron],
    }


def trained(static=True, seed=0, **settings):
    """A small network in evaluation mode, as after training: busy neurons, unlike taus, batch norm that does a lot."""
    table = static_table() if static else networks.event_table(4, 2, CLASSES)
    net = networks.SpikingNet(table, SHAPE, CLASSES, T=T, rngs=nnx.Rngs(seed), **settings)
    net.eval()
    random = np.random.default_rng(seed)
    for layer in net.named_layers().values():
        if isinstance(layer, BatchNorm):
            C = layer.scale.shape
            layer.scale[...], layer.bias[...] = random.uniform(1, 3, C), random.uniform(0, 1, C)
            layer.mean[...], layer.var[...] = random.normal(size=C), random.uniform(0.5, 2, C)
        elif isinstance(layer, nnx.Linear):
            layer.kernel[...] *= 6
        elif isinstance(layer, neurons.PLIF):
            layer.w[...] = random.normal()
    return net


def some_input(static=True, seed=1):
    shape = (B, *SHAPE) if static else (T, B, *SHAPE)
    return jnp.asarray(np.random.default_rng(seed).poisson(0.7, shape), float)


def spikes_of(net, x):
    """The spikes [T, B, ...] of every neuron layer, in order, and the votes."""
    graphdef, state = nnx.split(net)

    @jax.jit
    def run(state, x):
        spikes = []

        def keep(name, layer, entering, leaving):
            if isinstance(layer, neurons.Neuron):
                spikes.append(leaving)

        _, votes = nnx.merge(graphdef, state).unroll(None, x, observe=keep)
        return spikes, votes

    return jax.tree.map(np.asarray, run(state, x))


def interpret(graph, x_TBCHW):
    """What NIR's text says: every node once per timestep, neurons by one Euler step of their equation, in float64.

    Returns the outputs of all nodes, {name: [T, B, ...]}.
    """
    dt, after = graph.metadata["dt"], dict(graph.edges)
    state, outputs = {}, {}
    for x in np.asarray(x_TBCHW, np.float64):
        name = "input"
        while (name := after[name]) != "output":
            node = graph.nodes[name]
            if isinstance(node, nir.Conv2d):
                x = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in node.padding)])
                windows = np.lib.stride_tricks.sliding_window_view(x, node.weight.shape[2:], (2, 3))
                x = np.einsum("bchwij,ocij->bohw", windows, node.weight.astype(float)) + node.bias[:, None, None]
            elif isinstance(node, nir.AvgPool2d):
                H, W = (size // 2 * 2 for size in x.shape[2:])
                x = x[:, :, :H, :W].reshape(*x.shape[:2], H // 2, 2, W // 2, 2).mean((3, 5))
            elif isinstance(node, nir.Flatten):
                x = x.reshape(len(x), -1)
            elif isinstance(node, nir.Linear | nir.Affine):
                x = x @ node.weight.T.astype(float) + getattr(node, "bias", 0)
            elif isinstance(node, nir.LIF):
                v = state.get(name, node.v_reset)
                v = v + dt / node.tau * (node.v_leak - v + node.r * x)
                x = (v > node.v_threshold).astype(float)
                state[name] = np.where(x > 0, node.v_reset, v)
            elif isinstance(node, nir.IF):
                v = state.get(name, node.v_reset) + dt * node.r * x
                x = (v > node.v_threshold).astype(float)
                state[name] = np.where(x > 0, node.v_reset, v)
            outputs.setdefault(name, []).append(x)
    return {name: np.stack(values) for name, values in outputs.items()}


def as_frames(x):
    """Input [T, B, C, H, W] for other simulators; a still image is shown at every step."""
    x = np.asarray(x, np.float32)
    return np.moveaxis(x if x.ndim == 5 else np.broadcast_to(x, (T, *x.shape)), -1, 2)


def assert_same_spikes(ours, theirs):
    """Ours channels-last, theirs channels-first, layer by layer; and neither silent nor always on."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert 0.02 < a.mean() < 0.98
        np.testing.assert_array_equal(a, np.moveaxis(b, 2, -1) if a.ndim == 5 else b)


CASES = {
    "static, PLIF, max pool": (True, {}),
    "events, PLIF, max pool": (False, {}),
    "events, PLIF, average pool": (False, {"use_max_pool": False}),
    "events, LIF": (False, {"use_plif": False, "init_tau": 3.0}),
}


@pytest.mark.parametrize("static, settings", CASES.values(), ids=CASES)
def test_the_graph_says_what_the_network_does(static, settings):
    net, x = trained(static, **settings), some_input(static)
    spikes, votes = spikes_of(net, x)
    graph = nir_interop.to_nir(net)
    outputs = interpret(graph, as_frames(x))
    fired = [s for name, s in outputs.items() if isinstance(graph.nodes[name], nir.LIF) and not name.endswith("_any")]
    assert_same_spikes(spikes, fired)
    np.testing.assert_allclose(outputs["vote"], votes, atol=1e-6)


@pytest.mark.parametrize("static, settings", CASES.values(), ids=CASES)
def test_a_round_trip_through_a_file_gives_identical_spikes(tmp_path, static, settings):
    net, x = trained(static, **settings), some_input(static)
    nir.write(tmp_path / "net.nir", nir_interop.to_nir(net, dt=1e-3))
    back = nir_interop.from_nir(nir.read(tmp_path / "net.nir"))
    ours = spikes_of(back, x)
    for original in (net, fold(net)):
        jax.tree.map(np.testing.assert_array_equal, spikes_of(original, x), ours)
    assert back.T == T
    assert [type(layer).__name__ for layer in back.named_layers().values()] == [
        type(layer).__name__.replace("PLIF", "LIF").replace("Conv3x3", "Conv")
        for layer in fold(net).named_layers().values()
    ]


def test_a_second_export_is_the_first():
    graph = nir_interop.to_nir(trained())
    again = nir_interop.to_nir(nir_interop.from_nir(graph))
    assert len(graph.nodes) == len(again.nodes)
    for a, b in zip(graph.nodes.values(), again.nodes.values(), strict=True):
        assert type(a) is type(b)
        for field, value in a.to_dict().items():
            if isinstance(value, np.ndarray) and value.dtype.kind == "f":
                np.testing.assert_allclose(b.to_dict()[field], value, rtol=1e-15)


def test_a_learned_time_constant_comes_back_to_the_last_bit():
    rest, unit = jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32)
    for seed in range(3):
        net = trained(seed=seed)
        back = nir_interop.from_nir(nir_interop.to_nir(net)).named_neurons()
        for name, neuron in fold(net).named_neurons().items():
            assert neuron.charge(rest, unit) == back[name].charge(rest, unit)  # k, as the membrane sees it


def test_exporting_leaves_the_network_as_it_is():
    net = trained()
    net.train()
    before = jax.tree.map(np.array, nnx.state(net))
    nir_interop.to_nir(net)
    assert "static_conv.1" in net.named_layers() and not net.static_conv[1].use_running_average
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, nnx.state(net)))


def test_max_pooling_is_exact_for_every_window_and_remembers_nothing():
    windows = np.array([[i >> bit & 1 for bit in range(4)] for i in range(16)], float)
    x = np.random.default_rng(0).permutation(np.tile(windows, (20, 1))).reshape(-1, 1, 1, 2, 2)
    node = nir_interop.to_nir(trained()).nodes["conv_1_any"]
    first = {field: np.full((1, 1, 1), getattr(node, field).flat[0]) for field in ("tau", "r", "v_leak", "v_threshold")}
    chain = [nir.AvgPool2d(np.array((2, 2)), np.array((2, 2)), np.array((0, 0))), nir.LIF(**first)]
    graph = nir.NIRGraph(
        {
            "input": nir.Input({"input": np.array([1, 2, 2])}),
            "pool": chain[0],
            "any": chain[1],
            "output": nir.Output(None),
        },
        [("input", "pool"), ("pool", "any"), ("any", "output")],
        metadata={"dt": 1e-4},
    )
    np.testing.assert_array_equal(interpret(graph, x)["any"].ravel(), x.reshape(-1, 4).max(1))


def chain(*named, metadata=None):
    names = [name for name, _ in named]
    return nir.NIRGraph(dict(named), list(pairwise(names)), metadata=metadata or {})


def lif(N, tau=3e-4, r=1.0, v_leak=0.0, v_threshold=1.0, v_reset=0.0):
    return nir.LIF(*(np.broadcast_to(a, N).astype(float) for a in (tau, r, v_leak, v_threshold, v_reset)))


def mlp(neuron, weight=None):
    random = np.random.default_rng(0)
    weight = random.normal(size=(4, 7)) if weight is None else weight
    return chain(
        ("input", nir.Input(np.array([7]))),
        ("first", nir.Affine(weight, random.normal(size=4))),
        ("spiking", neuron),
        ("output", nir.Output(np.array([4]))),
        metadata={"dt": 1e-4},
    )


@pytest.mark.parametrize(
    "neuron",
    [
        lif(4),
        lif(4, r=3.0, v_threshold=0.7),
        lif(4, v_leak=-0.2, v_threshold=0.6, v_reset=-0.2),
        nir.IF(np.full(4, 1e4), np.full(4, 1.5)),
        nir.IF(np.ones(4), np.full(4, 1e-4)),
    ],
    ids=["LIF", "LIF with resistance", "LIF with other rest", "IF", "IF with resistance"],
)
def test_a_graph_of_others_over_vectors(neuron):
    graph = mlp(neuron)
    x = np.random.default_rng(1).normal(size=(20, B, 7))
    net = nir_interop.from_nir(graph, T=20)
    votes = net.unroll(None, jnp.asarray(x[:, :, None, None]))[1]
    theirs = interpret(graph, x)["spiking"]
    assert 0.05 < theirs.mean() < 0.95
    np.testing.assert_array_equal(votes, theirs)


@pytest.mark.parametrize("table", [["neuron", "flatten"], ["flatten", "neuron"]])
def test_maps_that_are_flattened_last_vote_in_the_order_of_the_graph(table):
    """Their neurons' own thresholds too."""
    random, thresholds = np.random.default_rng(0), np.linspace(0.1, 0.9, 45)

    def neuron(net, shape, rngs):
        return neurons.IF(nnx.Param(jnp.asarray(thresholds.reshape(1, *shape)))), shape

    builders = {"neuron": neuron, "flatten": networks.flatten}
    parts = {"static_conv": [networks.conv(5)], "conv": [], "fc": [builders[name] for name in table]}
    net = networks.SpikingNet(parts, (3, 3, 2), 5, T=T, rngs=nnx.Rngs(0))
    net.eval()
    x = jnp.asarray(random.poisson(1.5, (B, 3, 3, 2)), jnp.float32)
    votes = net.unroll(None, x)[1]
    assert np.ptp(votes) > 0
    graph = nir_interop.to_nir(net)
    np.testing.assert_allclose(interpret(graph, as_frames(x))["vote"], votes, atol=1e-6)


def test_a_graph_that_flattens_into_its_outputs_is_refused():
    """Unless there is no order to lose."""
    for maps, refused in (((4, 2, 2), True), ((4, 1, 1), False), ((1, 2, 2), False)):
        graph = chain(
            ("input", nir.Input(np.array(maps))),
            ("spiking", lif(maps)),
            ("flat", nir.Flatten(np.array(maps), 0, -1)),
            ("output", nir.Output(np.array([np.prod(maps)]))),
            metadata={"dt": 1e-4, "T": 1},
        )
        if refused:
            with pytest.raises(UserError, match=r"flattens maps \(4, 2, 2\) into its outputs, .*; end in a Linear"):
                nir_interop.from_nir(graph)
        else:
            assert nir_interop.from_nir(graph).classes == 4


def test_a_strided_convolution_without_padding():
    random = np.random.default_rng(0)
    weight, bias = random.normal(size=(4, 2, 3, 3)).astype(np.float32), np.ones(4, np.float32)
    graph = chain(
        ("input", nir.Input(np.array([2, 9, 9]))),
        ("conv", nir.Conv2d((9, 9), weight, 2, "valid", 1, 1, bias)),
        ("spiking", lif((4, 4, 4))),
        ("flat", nir.Flatten(np.array([4, 4, 4]), 0, -1)),
        ("linear", nir.Linear(random.normal(size=(3, 64)).astype(np.float32))),
        ("output", nir.Output(np.array([3]))),
        metadata={"dt": 1e-4, "T": 1},
    )
    net = nir_interop.from_nir(graph)
    again = nir_interop.to_nir(net).nodes["static_conv_0"]
    assert (again.stride, again.padding) == ((2, 2), "valid")
    np.testing.assert_array_equal(again.weight, weight)
    x = random.normal(size=(1, 9, 9, 2)).astype(np.float32)
    y = net.static_conv[0](x)[0, 1, 2, 3]  # row 1, column 2, channel 3
    np.testing.assert_allclose(y, (x[0, 2:5, 4:7].transpose(2, 0, 1) * weight[3]).sum() + 1, rtol=1e-5)


class OwnNeuron(neurons.LIF):
    def charge(self, v, x):
        return 0.5 * v + x


def with_neuron(**settings):
    net = trained()
    net.conv[0] = settings.pop("kind", neurons.LIF)(**settings)
    return net


@pytest.mark.parametrize(
    "settings",
    [{"kind": neurons.IF, "v_threshold": 2.5}, {"tau": 1.7, "v_threshold": 0.8, "v_reset": -0.3}],
    ids=["IF", "LIF with other rest and threshold"],
)
def test_neurons_the_paper_does_not_use(settings):
    net, x = with_neuron(**settings), some_input()
    outputs, spikes = interpret(nir_interop.to_nir(net), as_frames(x)), spikes_of(net, x)[0]
    assert_same_spikes(spikes[:1], [outputs["conv_0"]])
    assert_same_spikes(spikes[-1:], [outputs["fc_4"]])
    again = nir_interop.from_nir(nir_interop.to_nir(net)).conv[0]
    for field in ("__class__", "v_threshold", "v_reset"):
        assert getattr(again, field) == getattr(net.conv[0], field)


def max_pool_first():
    table = static_table()
    table["conv"] = [networks.pool, *table["conv"][2:]]
    return networks.SpikingNet(table, SHAPE, CLASSES, T=T, rngs=nnx.Rngs(0))


def test_thresholds_of_channels_stay_those_of_channels():
    thresholds = np.linspace(0.1, 0.8, trained().static_conv[0].out_features)
    net = with_neuron(v_threshold=nnx.Param(jnp.asarray(thresholds).reshape(1, 1, 1, -1)))
    thresholds = np.asarray(net.conv[0].v_threshold[...]).ravel()
    node = nir_interop.to_nir(net).nodes["conv_0"]
    np.testing.assert_array_equal(node.v_threshold, np.broadcast_to(thresholds[:, None, None], node.v_threshold.shape))


def test_what_nir_cannot_express_is_refused():
    with pytest.raises(UserError, match=r"conv_0 has a soft reset"):
        nir_interop.to_nir(with_neuron(v_reset=None))
    with pytest.raises(UserError, match="conv_0 is a OwnNeuron"):
        nir_interop.to_nir(with_neuron(kind=OwnNeuron))
    with pytest.raises(UserError, match="conv_0 takes the maximum of values that are not spikes"):
        nir_interop.to_nir(max_pool_first())
    with pytest.raises(UserError, match="dt is 0"):
        nir_interop.to_nir(trained(), dt=0)
    circular = trained()
    circular.conv[2].padding = "CIRCULAR"
    with pytest.raises(UserError, match="pads by CIRCULAR"):
        nir_interop.to_nir(circular)
    circular.conv[2].padding = ((1, 0), (1, 1))
    with pytest.raises(UserError, match="the same before and after"):
        nir_interop.to_nir(circular)
    circular.conv[2].padding = ((1, 1), (1, 1))
    assert nir_interop.to_nir(circular).nodes["conv_2"].padding == (1, 1)
    circular.conv[2].input_dilation = 2
    with pytest.raises(UserError, match="conv_2 dilates its input by 2"):
        nir_interop.to_nir(circular)
    unflattened = trained()
    unflattened.fc = nnx.List(layer for layer in unflattened.fc if not isinstance(layer, networks.Flatten))
    with pytest.raises(UserError, match="over the channels of maps; NIR's take vectors: flatten first"):
        nir_interop.to_nir(unflattened)


def test_what_these_networks_cannot_express_is_refused():
    for neuron, message in (
        (lif(4, tau=[1e-3, 2e-3, 3e-3, 4e-3]), "tau differs between the neurons of spiking"),
        (lif(4, v_leak=0.1), "leaks to 0.1 and resets to 0.0"),
        (lif(4, tau=1e-4), "tau is 1.0"),
        (nir.LI(np.ones(4), np.ones(4), np.zeros(4)), "spiking is a LI"),
    ):
        with pytest.raises(UserError, match=message):
            nir_interop.from_nir(mlp(neuron), T=1)
    graph = mlp(lif(4))
    with pytest.raises(UserError, match="no T; give T"):
        nir_interop.from_nir(graph)
    graph.edges.append(("spiking", "first"))
    with pytest.raises(UserError, match="not one chain"):
        nir_interop.from_nir(graph, T=1)
    scaled = chain(
        ("input", nir.Input(np.array([4]))),
        ("spiking", lif(4, r=2.0)),
        ("output", nir.Output(np.array([4]))),
        metadata={"dt": 1e-4},
    )
    with pytest.raises(UserError, match="scales its input by 2"):
        nir_interop.from_nir(scaled, T=1)
    for given in ({"dt": 0.0, "T": 1}, {"dt": 1e-4, "T": 0}):
        with pytest.raises(UserError, match="give dt in seconds above 0, and T of 1 or more"):
            nir_interop.from_nir(scaled, **given)
    nothing = chain(("input", nir.Input(np.array([4]))), ("output", nir.Output(np.array([4]))), metadata={"dt": 1e-4})
    with pytest.raises(UserError, match="no neurons"):
        nir_interop.from_nir(nothing, T=1)


def run_in_torch(module, graph, x):
    """Steps a module that nirtorch made through [T, B, ...]; the spikes of every LIF, and the outputs."""
    import torch

    fired = {name: [] for name, node in graph.nodes.items() if isinstance(node, nir.LIF) and not name.endswith("_any")}

    def keep(name):
        return lambda module, inputs, output: fired[name].append(
            (output[0] if isinstance(output, tuple) else output).numpy()
        )

    for name in fired:
        getattr(module, name).register_forward_hook(keep(name))
    state, outputs = None, []
    with torch.no_grad():
        for x_t in torch.from_numpy(np.ascontiguousarray(x)):
            out, state = module(x_t, state)
            outputs.append(out.numpy())
    return [np.stack(spikes) for spikes in fired.values()], np.stack(outputs)


def in_spikingjelly(graph):
    exchange = pytest.importorskip("spikingjelly.activation_based.nir_exchange")
    return exchange.import_from_nir(graph)


def in_snntorch(graph):
    return pytest.importorskip("snntorch.import_nir").import_from_nir(graph)


@pytest.mark.parametrize("simulator", [in_spikingjelly, in_snntorch])
@pytest.mark.parametrize("static, settings", CASES.values(), ids=CASES)
def test_another_simulator_fires_the_same_spikes(tmp_path, simulator, static, settings):
    net, x = trained(static, **settings), some_input(static)
    nir.write(tmp_path / "net.nir", nir_interop.to_nir(net))
    graph = nir.read(tmp_path / "net.nir")
    fired, votes = run_in_torch(simulator(graph), graph, as_frames(x))
    ours, our_votes = spikes_of(net, x)
    assert_same_spikes(ours, fired)
    np.testing.assert_allclose(votes, our_votes, atol=1e-6)


def test_operations_of_an_event_network_are_the_same_after_a_round_trip():
    net = networks.NMNISTNet(T=2, channels=4, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).poisson(0.5, (2, 1, 34, 34, 2)), jnp.float32)
    before = operations.count(net, x).values()
    after = operations.count(nir_interop.from_nir(nir_interop.to_nir(net), T=2), x).values()
    for one, other in zip(before, after, strict=True):
        assert one.accumulates == other.accumulates and one.multiply_accumulates == other.multiply_accumulates
