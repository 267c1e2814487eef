import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plif_jax import networks, neurons
from plif_jax.analysis import operations, plots, recording
from plif_jax.curves import figure
from plif_jax.errors import UserError


@pytest.fixture(scope="module")
def net():
    """A small event network in training mode, scaled so that every layer spikes."""
    net = networks.NMNISTNet(T=4, channels=8, number_layer=2, init_tau=2.0, rngs=nnx.Rngs(0))
    for layer in net.named_layers().values():
        if hasattr(layer, "kernel"):
            layer.kernel[...] *= 8
    return net


@pytest.fixture(scope="module")
def frames():
    return jnp.asarray(np.random.default_rng(0).poisson(0.5, (4, 3, 34, 34, 2)), jnp.float32)


def test_recording_follows_the_neuron_equations(net, frames):
    rates, layers = recording.record(net, frames)
    assert list(layers) == ["conv.2", "conv.6", "fc.3", "fc.6"]
    for layer in layers.values():
        v = np.zeros(layer.currents.shape[1:])
        for t in range(4):
            h = v + (np.asarray(layer.currents[t]) - v) / 2
            np.testing.assert_allclose(layer.charges[t], h, rtol=1e-5, atol=1e-6)
            fired = np.asarray(layer.charges[t]) >= 1
            np.testing.assert_array_equal(layer.spikes[t], fired)
            v = np.where(fired, 0, layer.charges[t])
            np.testing.assert_allclose(layer.membranes[t], v, rtol=1e-6, atol=1e-6)
        assert 0 < layer.firing_rate.mean() < 1
        np.testing.assert_allclose(
            layer.firing_rate, np.mean(layer.spikes, tuple(range(2, layer.spikes.ndim))), atol=1e-6
        )
        np.testing.assert_allclose(layer.neuron_rate, np.mean(layer.spikes, (0, 1)), atol=1e-6)
    votes = np.mean(layers["fc.6"].spikes, 0).reshape(3, 10, 10).mean(-1)
    np.testing.assert_allclose(rates, votes, atol=1e-6)


def test_recording_leaves_the_network_alone(net, frames):
    before = jax.tree.map(np.array, nnx.state(net))
    training = net.conv[1].use_running_average
    recording.record(net, frames, 2)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(net))
    assert net.conv[1].use_running_average == training


def test_chosen_neurons_and_parts_of_a_batch_are_those_of_the_whole(net, frames):
    rates, whole = recording.record(net, frames)
    index = np.array([5, 9247, 0])
    part_rates, chosen = recording.record(net, frames, {"conv.2": index}, batch_size=2)
    np.testing.assert_array_equal(part_rates, rates)
    for field in ("currents", "charges", "membranes", "spikes"):
        expected = getattr(whole["conv.2"], field).reshape(4, 3, -1)[..., index]
        # Convolutions of other batch sizes round otherwise.
        np.testing.assert_allclose(getattr(chosen["conv.2"], field), expected, atol=1e-5)
        assert getattr(chosen["fc.3"], field).shape == (4, 3, 0)
    np.testing.assert_allclose(chosen["fc.3"].neuron_rate, whole["fc.3"].neuron_rate, atol=1e-6)
    np.testing.assert_allclose(chosen["conv.6"].firing_rate, whole["conv.6"].firing_rate, atol=1e-6)


def test_layers_keep_their_order_when_there_are_many():
    net = networks.NMNISTNet(T=2, channels=2, number_layer=3, rngs=nnx.Rngs(0))
    frames = jnp.zeros((2, 2, 34, 34, 2))
    ordered = ["conv.2", "conv.6", "conv.10", "fc.3", "fc.6"]
    assert list(recording.record(net, frames, 1)[1]) == ordered
    assert list(recording.record(net, frames, 1, batch_size=1)[1]) == ordered
    assert list(operations.count(net, frames)) == ["conv.0", "conv.4", "conv.8", "fc.2", "fc.5"]


def test_a_number_of_neurons_spreads_over_each_layer(net, frames):
    _, layers = recording.record(net, frames, np.int64(5))
    assert {layer.spikes.shape for layer in layers.values()} == {(4, 3, 5)}


def test_wrong_choices_are_named(net, frames):
    with pytest.raises(UserError, match=r"no spiking layer conv\.3; this network's are conv\.2, conv\.6"):
        recording.record(net, frames, {"conv.3": [0]})
    for beyond in (100, -1):
        with pytest.raises(UserError, match=rf"neuron {beyond} of fc\.6: it has 100 neurons"):
            recording.record(net, frames, {"fc.6": [3, beyond]})
    for wrong in ([0, 5], -1, True):
        with pytest.raises(UserError, match=r"neurons is .*; give how many, or \{layer: indices\} for some of conv\.2"):
            recording.record(net, frames, wrong)
    with pytest.raises(UserError, match=r"neurons of fc\.6 are \[0\.7\]; give a list of whole numbers"):
        recording.record(net, frames, {"fc.6": [0.7]})
    with pytest.raises(UserError, match="batch_size is -1; give 1 or more"):
        recording.record(net, frames, batch_size=-1)


def test_a_wrong_input_is_told_as_it_was_given(net):
    with pytest.raises(UserError, match=r"input of shape \(3, 8, 8, 2\)"):
        recording.record(net, jnp.zeros((3, 8, 8, 2)))


def test_rates_are_of_the_spikes_type_and_no_narrower(net, frames, x64):
    graphdef, state = nnx.split(net)
    for dtype, batch_size in ((jnp.float32, None), (jnp.float32, 1), (jnp.float64, None)):
        net = nnx.merge(graphdef, jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), state))
        net.set_attributes(dtype=dtype)
        _, layers = recording.record(net, frames.astype(dtype), batch_size=batch_size)
        for layer in layers.values():
            assert layer.neuron_rate.dtype == layer.firing_rate.dtype == dtype


def test_recording_works_under_jit(net, frames):
    graphdef, state = nnx.split(net)
    traced = jax.jit(lambda state, x: recording.record(nnx.merge(graphdef, state), x, 3)[1]["fc.3"].spikes)
    np.testing.assert_array_equal(traced(state, frames), recording.record(net, frames, 3)[1]["fc.3"].spikes)


def test_fan_out_counts_what_a_lone_spike_changes():
    layer = nnx.Conv(2, 6, (3, 3), strides=(2, 1), padding=1, use_bias=False, rngs=nnx.Rngs(0))
    reach = operations.fan_out(layer, (5, 4, 2))
    lone = jnp.eye(40).reshape(40, 5, 4, 2)
    np.testing.assert_array_equal(reach.ravel(), jnp.count_nonzero(layer(lone), axis=(1, 2, 3)))


def test_operations_of_events_and_spikes(net, frames):
    counted = operations.count(net, frames)
    assert list(counted) == ["conv.0", "conv.4", "fc.2", "fc.5"]
    taps = np.pad(np.full((32, 32), 9), 1)
    taps[0, :] = taps[-1, :] = taps[:, 0] = taps[:, -1] = 6
    taps[[0, 0, -1, -1], [0, -1, 0, -1]] = 4
    expected = 8 * np.einsum("tbhwc,hw->b", frames, taps)
    np.testing.assert_array_equal(counted["conv.0"].accumulates, expected)
    assert counted["conv.0"].dense == 8 * 2 * taps.sum()
    hidden = recording.record(net, frames)[1]["fc.3"].spikes
    np.testing.assert_array_equal(counted["fc.5"].accumulates, 100 * np.sum(hidden, (0, 2)))
    assert counted["fc.5"].dense == hidden.shape[-1] * 100
    assert all((layer.multiply_accumulates == 0).all() for layer in counted.values())


def test_pixels_and_averaged_spikes_are_multiplied():
    table = {
        "static_conv": [networks.conv(4), networks.norm],
        "conv": [networks.neuron, networks.pool, networks.conv(4)],
        "fc": [networks.flatten, networks.linear(20), networks.neuron],
    }
    net = networks.SpikingNet(table, (8, 8, 1), 2, T=3, init_tau=1.1, use_max_pool=False, rngs=nnx.Rngs(0))
    image = jnp.linspace(0, 4, 64).reshape(1, 8, 8, 1)
    counted = operations.count(net, image)
    first, second = counted["static_conv.0"], counted["conv.2"]
    assert first.accumulates == [0] and first.multiply_accumulates == [first.dense] == [4 * 22 * 22]
    spikes = recording.record(net, image)[1]["conv.0"].spikes
    averaged = np.asarray(spikes).reshape(3, 1, 4, 2, 4, 2, 4).mean((3, 5))
    reach = operations.fan_out(net.conv[2], (4, 4, 4))
    assert second.multiply_accumulates == [(reach * ((averaged > 0) & (averaged < 1))).sum()] != [0]
    assert second.accumulates == [(reach * (averaged == 1)).sum()] != [0]


def test_energy_has_changeable_constants():
    counted = {"a": operations.LayerOperations(np.array([10, 0]), np.array([1, 2]), 50)}
    spiking, dense = operations.energy(counted)
    np.testing.assert_allclose(spiking, [13.6e-12, 9.2e-12])
    assert dense == pytest.approx(230e-12)
    np.testing.assert_allclose(operations.energy(counted, 1, 2)[0], [12e-12, 4e-12])
    counted = {"a": operations.LayerOperations(np.array([10**6]), np.array([0]), 10**6)}
    assert "energy 0.90 uJ against 4.60 uJ" in operations.table(counted)
    changed = operations.table(counted, 1, 2)
    assert "energy 1.00 uJ against 2.00 uJ" in changed and "(1 pJ an accumulate, 2 pJ a multiply-acc" in changed


def test_a_neuron_of_several_states_is_refused_in_a_line():
    class Double(neurons.IF):
        def rest(self, x):
            return jnp.stack([super().rest(x)] * 2)

    with pytest.raises(UserError, match=r"Double has states \(2, 4\) for neurons \(4,\); one each is recorded"):
        recording.charge_fire_reset(Double(), jnp.ones((3, 4)))


def test_of_a_neuron_of_several_states_all_but_its_membranes_is_recorded():
    class Double(neurons.IF):
        def rest(self, x):
            return jnp.stack([super().rest(x)] * 2)

        def step(self, states, x):
            v, s = super().step(states[0], x)
            return jnp.stack([v, states[1]]), s

    def recorded(neuron, **more):
        table = {"static_conv": [], "conv": [], "fc": [networks.flatten, lambda net, shape, rngs: (neuron, shape)]}
        net = networks.SpikingNet(table, (1, 2, 3), 2, T=4, rngs=nnx.Rngs(0))
        return recording.record(net, jax.random.uniform(jax.random.key(0), (4, 5, 1, 2, 3)), **more)

    for more in ({}, {"neurons": 2}, {"batch_size": 2}):
        (rates, layers), (expected_rates, expected) = recorded(Double(), **more), recorded(neurons.IF(), **more)
        assert layers["fc.1"].charges is layers["fc.1"].membranes is None
        np.testing.assert_array_equal(rates, expected_rates)
        for field in ("currents", "spikes", "firing_rate", "neuron_rate"):
            np.testing.assert_array_equal(getattr(layers["fc.1"], field), getattr(expected["fc.1"], field))


def test_of_a_step_of_ones_own_no_charge_is_told():
    """It need not charge as `charge` says, nor have one."""

    class Eager(neurons.LIF):
        def step(self, v, x):
            return super().step(v, 3 * x)

    class Chargeless(neurons.Neuron):
        def step(self, v, x):
            return 0.5 * v + x, (v >= 1).astype(x.dtype)

    x = jnp.abs(jax.random.normal(jax.random.key(0), (5, 2, 4)))
    for neuron in (Eager(), Chargeless()):
        told = recording._layer_record(neuron, x, neuron(x), None)
        assert told.charges is None
        assert recording._layer_record(neuron, x, neuron(x), np.array([], int)).charges is None
        np.testing.assert_allclose(told.membranes[-1], neuron.unroll(None, x)[0], rtol=1e-6)
        assert plots.neuron_response(figure()[1], [2.0, 2.0, 2.0], {"own": neuron}).lines


def test_counting_nothing_is_refused_in_a_line(net):
    with pytest.raises(UserError, match=r"x of shape \(4, 0, 34, 34, 2\) holds nothing to count; give at least one"):
        operations.count(net, jnp.zeros((4, 0, 34, 34, 2)))


def test_recording_nothing_is_refused_in_a_line(net):
    with pytest.raises(UserError, match=r"x of shape \(4, 0, 34, 34, 2\) holds nothing to record; give at least one"):
        recording.record(net, jnp.zeros((4, 0, 34, 34, 2)))


@pytest.mark.parametrize("given", [3, [[0], [1]], [[0], [1, 2]], [0.5], "0"])
def test_chosen_neurons_are_a_list(net, given):
    with pytest.raises(UserError, match=r"neurons of fc\.3 are .*; give a list of whole numbers, counted from 0"):
        recording.record(net, jnp.zeros((4, 1, 34, 34, 2)), {"fc.3": given})


def test_a_layer_by_another_kind_of_name_is_unknown(net):
    with pytest.raises(UserError, match="no spiking layer 3; this network's are conv"):
        recording.record(net, jnp.zeros((4, 1, 34, 34, 2)), {3: [0], "x": [0]})


def test_no_operations_are_a_table_too():
    assert operations.table({}).splitlines()[-1].startswith("energy 0.00 uJ against 0.00 uJ")


class PerChannel(neurons.Neuron):
    """A neuron of one's own: a time constant for each value of the last axis."""

    def __init__(self, features):
        super().__init__()
        self.w = nnx.Param(jnp.linspace(-1, 1, features))

    def charge(self, v, x):
        return v + (x - v) * jax.nn.sigmoid(self.w[...].reshape((1,) * (x.ndim - 1) + (-1,)))


@pytest.mark.parametrize("index", [[0, 5, 9, 14], [3], []])
def test_chosen_neurons_keep_parameters_of_their_own(index):
    x = jax.random.normal(jax.random.key(0), (6, 2, 2, 2, 4)) + 1
    whole = recording._layer_record(PerChannel(4), x, PerChannel(4)(x), None)
    some = recording._layer_record(PerChannel(4), x, PerChannel(4)(x), np.array(index, int))
    for field in ("currents", "charges", "membranes", "spikes"):
        expected = getattr(whole, field).reshape(6, 2, -1)[..., np.array(index, int)]
        np.testing.assert_allclose(getattr(some, field), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_operations_are_counted_exactly(dtype):
    table = {
        "static_conv": [],
        "conv": [networks.conv(57), networks.pool],
        "fc": [networks.flatten, networks.linear(10)],
    }
    net = networks.SpikingNet(table, (34, 34, 2), 10, T=2, dtype=dtype, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 1, 34, 34, 2))
    counted = operations.count(net, x)["conv.0"]
    reached = 57 * 2 * (9 * 32**2 + 6 * 4 * 32 + 4 * 4)  # 9 outputs of an inner pixel, 6 at an edge, 4 at a corner
    assert counted.dense == reached and counted.accumulates == 2 * reached


def test_operations_of_a_layer_that_is_not_known_are_refused():
    fc = [lambda *_: (nnx.LinearGeneral(2, 2, rngs=nnx.Rngs(0)), (1, 1, 2)), networks.flatten, networks.neuron]
    net = networks.SpikingNet({"static_conv": [], "conv": [], "fc": fc}, (1, 1, 2), 2, T=2, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=r"fc\.0 is a LinearGeneral, whose operations nobody here can count"):
        operations.count(net, jnp.ones((2, 1, 1, 1, 2)))


def test_an_array_on_the_host_is_recorded_in_parts(net, frames, monkeypatch):
    record, parts = recording._record, []
    monkeypatch.setattr(recording, "_record", lambda *a: parts.append(a[2].shape[1]) or record(*a))
    rates, _ = recording.record(net, np.asarray(frames), 0, batch_size=2)
    assert parts == [2, 1]
    np.testing.assert_allclose(rates, recording.record(net, frames, 0)[0], rtol=1e-6)


def small(static, dtype=None):
    first = [networks.conv(2)]
    table = {
        "static_conv": first if static else [],
        "conv": [networks.neuron] if static else [*first, networks.neuron],
        "fc": [networks.flatten, networks.linear(4), networks.neuron],
    }
    return networks.SpikingNet(table, (4, 4, 1), 2, T=2, dtype=dtype, rngs=nnx.Rngs(0))


def test_rates_of_a_bfloat16_network_are_counted_in_float32():
    _, layers = recording.record(small(False, jnp.bfloat16), np.ones((2, 1, 4, 4, 1), np.float32), 0)
    assert {str(a.dtype) for record in layers.values() for a in (record.firing_rate, record.neuron_rate)} == {"float32"}


def test_a_negative_value_of_a_frame_costs_as_many_operations_as_a_positive_one():
    x = jnp.ones((2, 3, 4, 4, 1))
    positive, negative = (operations.count(small(False), sign * x)["conv.0"].accumulates for sign in (1, -1))
    np.testing.assert_array_equal(positive, negative)
    assert (positive > 0).all()


def test_whole_frames_are_accumulated_in_the_static_part_too():
    counted = operations.count(small(True), jnp.ones((2, 3, 4, 4, 1)))["static_conv.0"]
    assert (counted.accumulates == 2 * counted.dense).all() and not counted.multiply_accumulates.any()


def test_fan_outs_beyond_bfloat16_s_whole_numbers_are_counted():
    fc = [networks.flatten, networks.linear(257), networks.neuron, networks.linear(2), networks.neuron]
    table = {"static_conv": [], "conv": [], "fc": fc}
    net = networks.SpikingNet(table, (1, 1, 2), 2, T=2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(operations.fan_out(net.fc[1], (2,)), [257, 257])
