"""Networks as NIR graphs: against a plain interpreter of NIR's equations, against other simulators, and back again."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nir_graphs import (
    CLASSES,
    SHAPE,
    B,
    T,
    as_frames,
    assert_same_spikes,
    interpret,
    some_input,
    spikes_of,
    static_table,
    trained,
)

from plif_jax import layers, networks, neurons
from plif_jax.analysis import operations
from plif_jax.errors import UserError

nir = pytest.importorskip("nir")

from plif_jax.interop import nir as nir_interop  # noqa: E402
from plif_jax.interop.fold import fold  # noqa: E402

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


def test_a_batch_norm_that_begins_a_part_is_folded_into_the_part_before():
    table = static_table()
    table["conv"] = [table["static_conv"].pop(), *table["conv"]]
    net = networks.SpikingNet(table, SHAPE, CLASSES, T=T, rngs=nnx.Rngs(0))
    net.conv[0].mean[...] += 0.3
    net.eval()
    x = some_input()
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), spikes_of(fold(net), x), spikes_of(net, x))
    assert spikes_of(net, x)[0][0].any()


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


def test_time_constants_of_channels_stay_those_of_channels():
    net = trained()
    net.conv[0].w = nnx.Param(jnp.linspace(-1.0, 1.0, net.static_conv[0].out_features).reshape(1, 1, 1, -1))
    node = nir_interop.to_nir(net, dt=1.0).nodes["conv_0"]
    taus = np.asarray(net.conv[0].tau).ravel()
    np.testing.assert_allclose(node.tau, np.broadcast_to(taus[:, None, None], node.tau.shape), rtol=1e-6)


def test_what_nir_cannot_express_is_refused():
    with pytest.raises(UserError, match=r"conv\.0 has a soft reset"):
        nir_interop.to_nir(with_neuron(v_reset=None))
    with pytest.raises(UserError, match=r"conv\.0 is a OwnNeuron"):
        nir_interop.to_nir(with_neuron(kind=OwnNeuron))
    with pytest.raises(UserError, match=r"conv\.0 takes the maximum of values that are not spikes"):
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
    for padding in (1, (1, 1), ((1, 1), (1, 1)), (1, (1, 1))):
        circular.conv[2].padding = padding
        assert nir_interop.to_nir(circular).nodes["conv_2"].padding == (1, 1)
    circular.conv[2].input_dilation = 2
    with pytest.raises(UserError, match=r"conv\.2 dilates its input by 2"):
        nir_interop.to_nir(circular)
    unflattened = trained()
    unflattened.fc = nnx.List(layer for layer in unflattened.fc if not isinstance(layer, networks.Flatten))
    with pytest.raises(UserError, match="over the channels of maps; NIR's take vectors: flatten first"):
        nir_interop.to_nir(unflattened)


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


def untrained(*more):
    table = {"static_conv": [], "conv": [networks.conv(2), networks.neuron, *more]}
    table["fc"] = [networks.flatten, networks.linear(10), networks.neuron]
    net = networks.SpikingNet(table, (8, 8, 2), 10, T=3, rngs=nnx.Rngs(0))
    net.eval()
    return net


def test_a_maximum_of_averages_is_refused():
    net = untrained(networks.pool, networks.pool)
    net.conv[2].use_max = False
    with pytest.raises(UserError, match=r"conv\.3 takes the maximum of values that are not spikes"):
        nir_interop.to_nir(net)


def test_padding_by_name_is_refused_where_its_size_depends_on_the_map():
    net = untrained()
    net.conv[0] = layers.Conv(2, 2, (3, 3), padding="SAME", strides=(2, 2), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="pads by SAME; NIR has zero padding"):
        nir_interop.to_nir(net)


def test_a_mask_of_weights_leaves_with_them():
    net = untrained()
    mask = jnp.zeros((3, 3, 2, 2)).at[1, 1].set(1)
    net.conv[0] = layers.Conv(2, 2, (3, 3), padding=1, mask=mask, rngs=nnx.Rngs(0))
    weight = nir_interop.to_nir(net).nodes["conv_0"].weight
    assert np.count_nonzero(weight) == 4 and weight[..., 1, 1].all()
