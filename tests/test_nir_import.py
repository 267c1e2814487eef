"""Networks from NIR graphs that others drew."""

import jax.numpy as jnp
import numpy as np
import pytest
from nir_graphs import (
    B,
    chain,
    interpret,
    lif,
)

from plif_jax.errors import UserError
from plif_jax.interop import nir as nir_interop

nir = pytest.importorskip("nir")


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


def test_what_these_networks_cannot_express_is_refused():
    for neuron, message in (
        (lif(4, tau=[1e-3, 2e-3, 3e-3, 4e-3]), "tau differs between the neurons of spiking"),
        (lif(4, v_leak=0.1), "leaks to 0.1 and resets to 0.0"),
        (lif(4, tau=1e-4), "spiking has tau 0.0001 s at dt 0.0001 s; tau is above one timestep here"),
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


@pytest.mark.parametrize("field", ["weight", "r", "tau", "v_threshold"])
def test_values_that_are_not_finite_are_refused(field):
    graph = mlp(lif(4))
    name, node = next((name, node) for name, node in graph.nodes.items() if hasattr(node, field))
    getattr(node, field).flat[0] = np.nan
    with pytest.raises(UserError, match=f"{field} of {name} is not finite everywhere"):
        nir_interop.from_nir(graph, T=20)


def test_a_leaky_neuron_after_average_pooling_is_no_maximum():
    side = (np.array(pair) for pair in ((2, 2), (2, 2), (0, 0)))
    graph = chain(
        ("input", nir.Input(np.array([1, 4, 4]))),
        ("spiking", lif((1, 4, 4))),
        ("pool", nir.AvgPool2d(*side)),
        ("any", lif((1, 2, 2), tau=2e-4, v_leak=0.1, v_threshold=1 / 16)),
        ("flat", nir.Flatten(np.array([1, 2, 2]), 0, -1)),
        ("output", nir.Output(np.array([4]))),
        metadata={"dt": 1e-4, "T": 2},
    )
    with pytest.raises(UserError, match=r"any leaks to 0\.1 and resets to 0\.0"):
        nir_interop.from_nir(graph)


def test_vectors_may_be_flattened():
    rng = np.random.default_rng(0)
    graph = chain(
        ("input", nir.Input(np.array([7]))),
        ("flat", nir.Flatten(np.array([7]), 0, -1)),
        ("first", nir.Affine(rng.normal(size=(4, 7)), rng.normal(size=4))),
        ("spiking", lif(4)),
        ("output", nir.Output(np.array([4]))),
        metadata={"dt": 1e-4, "T": 3},
    )
    assert nir_interop.from_nir(graph)(jnp.ones((2, 1, 1, 7))).shape == (2, 4)
