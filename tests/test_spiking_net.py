"""What a network of a user's own table takes: layers that hold neurons, states, types."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plif_jax import layers, networks, neurons
from plif_jax.analysis import operations, recording
from plif_jax.errors import UserError
from plif_jax.interop import export, torch
from plif_jax.spiking_net import layer_settings
from plif_jax.training.checkpoint import refuse_other_layers

X = jnp.full((2, 1, 8, 8, 2), 2.5)


class Block(nnx.Module):
    """A layer of a user's own that holds neurons."""

    def __init__(self):
        self.neuron = neurons.PLIF()

    def __call__(self, x):
        return x + self.neuron(x)


class Dropping(nnx.Module):
    """One that holds dropout."""

    def __init__(self):
        self.dropout = layers.Dropout(0.5)

    def __call__(self, x, rngs=None):
        return self.dropout(x, rngs)


class Careless(Dropping):
    def __call__(self, x):
        return self.dropout(x)


def test_what_looks_into_networks_takes_no_other_module():
    lone = neurons.PLIF()
    for look in (
        lambda: recording.record(lone, X),
        lambda: operations.count(lone, X),
        lambda: torch.state_dict(lone),
        lambda: torch.load_state_dict(lone, {}),
        lambda: export.to_exported(lone),
    ):
        with pytest.raises(UserError, match="a PLIF is no SpikingNet; give one"):
            look()


class Recurrent(nnx.Module):
    """One with a memory of its own."""

    def __init__(self):
        self.cell = nnx.GRUCell(6, 6, rngs=nnx.Rngs(0))

    def __call__(self, x):
        carry, ys = jnp.zeros(x.shape[1:]), []
        for x_t in x:
            carry, y = self.cell(carry, x_t)
            ys.append(y)
        return jnp.stack(ys)


class Carried(neurons.Neuron):
    """A neuron whose state is that of a recurrent cell."""

    def __init__(self):
        super().__init__()
        self.cell = nnx.GRUCell(6, 6, rngs=nnx.Rngs(0))

    def step(self, v, x):
        v, y = self.cell(v, x)
        return v, self.surrogate(y)


def test_a_memory_that_no_state_carries_is_for_whole_sequences():
    for layer in (Recurrent(), nnx.RNN(Recurrent().cell, time_major=True)):
        net = flat(fc=[lambda net, shape, rngs, layer=layer: (layer, shape)])
        assert net(X).shape == (1, 3)
        with pytest.raises(UserError, match=r"fc\.2 is a R[a-zN]+ that would begin anew at every call; call net\(x\)"):
            net.unroll(None, X)
    net = flat(fc=[lambda net, shape, rngs: (Carried(), shape)])
    end, _ = net.unroll(None, X)
    live, _ = net.unroll(None, X[:1])
    np.testing.assert_allclose(net.unroll(live, X[1:])[0][0], end[0], rtol=1e-4)


def test_a_number_of_timesteps_left_open_is_told():
    T, B = jax.export.symbolic_shape("T, B")
    for module, shape in ((flat(), (T, B, 8, 8, 2)), (neurons.PLIF(), (T, B))):
        with pytest.raises(UserError, match=r"x of shape \(T, B.*\) leaves the number of timesteps open; fix it"):
            jax.export.export(jax.jit(module))(jax.ShapeDtypeStruct(shape, jnp.float32))


def flat(conv=(), fc=(), T=2, **settings):
    fc = [networks.flatten, networks.linear(6), *fc, networks.neuron]
    table = {"static_conv": [], "conv": conv, "fc": fc}
    net = networks.SpikingNet(table, (8, 8, 2), 3, T=T, rngs=nnx.Rngs(0), **settings)
    net.fc[1].kernel[...] = jnp.linspace(0.0, 0.01, 6)[None] * jnp.ones((128, 1))  # currents 0 to 3.2
    return net


def with_block(Block=Block):
    return flat([lambda net, shape, rngs: (Block(), shape)])


def test_a_block_with_neurons_of_its_own_runs_from_rest():
    expected = flat()(X + neurons.PLIF()(X))
    np.testing.assert_array_equal(with_block()(X), expected)
    assert (expected != flat()(X)).any()


def test_dropout_within_a_layer_of_ones_own_gets_the_key_of_its_place():
    drop = lambda net, shape, rngs: (layers.Dropout(0.5), shape)  # noqa: E731
    net, x, keys = with_block(Dropping), jnp.repeat(X, 5, 1), jax.random.split(jax.random.key(3), 5)
    np.testing.assert_array_equal(net(x, rngs=keys), flat([drop])(x, rngs=keys))
    assert (net(x, rngs=keys) != flat()(x)).any()
    net.eval()
    np.testing.assert_array_equal(net(x), flat()(x))


def test_a_neuron_may_run_by_itself():
    class Alone(neurons.PLIF):
        def unroll(self, v, x):  # as the documentation has it, without T
            return super().unroll(v, x)

    alone = lambda net, shape, rngs: (Alone(), shape)  # noqa: E731
    for conv in ([], [networks.norm]):
        net, usual = flat([*conv, alone]), flat([*conv, networks.neuron])
        np.testing.assert_array_equal(net(X), usual(X))


def test_layers_are_told_by_their_class_and_settings(tmp_path):
    told = layer_settings(flat([networks.conv(2), networks.norm, networks.neuron]))
    assert told["conv.2"] == "PLIF" and told["conv.2.v_reset"] == 0.0 and told["conv.1.momentum"] == 0.1
    assert told["conv.2.surrogate"] == "ATan" and told["conv.2.surrogate.alpha"] == 2.0
    assert [name for name in told if name.startswith("conv.0")] == ["conv.0"]  # Flax's, whose settings it may change
    refuse_other_layers(tmp_path, {}, told)  # of a checkpoint from before they were told
    refuse_other_layers(tmp_path, told | {"conv.2.more": 1, "conv.2.v_reset": 0}, told)
    for other in (told | {"conv.2.v_reset": None}, told | {"fc.9": "IF"}, {"conv.2": "PLIF"}):
        with pytest.raises(UserError, match=f"^{tmp_path} is of another network than the code makes now: "):
            refuse_other_layers(tmp_path, other, told)


def test_membranes_may_come_in_any_sequence():
    net = flat()
    state, from_rest = net.unroll(None, X[:1])
    expected = net.unroll(state, X[:1])[1]
    for given in (list(state), nnx.List(state)):
        np.testing.assert_array_equal(net.unroll(given, X[:1])[1], expected)
    assert (expected != from_rest).any()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: with_block().unroll(None, X), r"conv\.0 is a Block whose neurons no state carries; call net\(x\), or"),
        (lambda: flat().unroll(0, X), "state is a int; give the tuple of membranes"),
        (lambda: flat().unroll({}, X), "state is a dict; give the tuple of membranes"),
        (lambda: flat()(X.astype(complex)), "input of type complex64; give real numbers"),
        (lambda: with_block(Dropping)(X), "dropout in training mode needs a key"),
        (
            lambda: with_block(Careless)(X, rngs=jax.random.key(0)),
            r"conv\.0 is a Careless .* let its __call__ take rngs",
        ),
        (lambda: flat([neurons.PLIF()]), r"conv\.0 of the table is PLIF, no builder; give norm, conv\(8\), or"),
        (lambda: flat([networks.norm, neurons.PLIF]), r"conv\.1 of the table is PLIF, no builder"),
        (lambda: flat([networks.conv]), r"conv\.0 of the table is conv, no builder"),
        (
            lambda: networks.SpikingNet([], (8, 8, 2), 3, T=2, rngs=nnx.Rngs(0)),
            "the table is a list; give a dict of static_conv",
        ),
        (lambda: flat(networks.norm), "fc; give a dict of static_conv, conv, fc, each a list of builders"),
        (lambda: flat(T=True), "T is True; a network runs for a whole number of timesteps"),
        (lambda: flat([8]), r"conv\.0 of the table is int, no builder"),
        (lambda: flat([lambda net, shape, rngs: neurons.PLIF()]), r"conv\.0 of the table makes a PLIF; a builder"),
        (lambda: flat([networks.conv(0)]), r"conv\(0\): a layer has a whole number of features, 1 or more"),
        (lambda: flat([networks.conv(8.0)]), r"conv\(8\.0\): a layer has a whole number of features"),
        (lambda: flat([networks.flatten, networks.linear(0)]), r"linear\(0\): a layer has a whole number of features"),
        (lambda: networks.NMNISTNet(T=2, rngs=nnx.Rngs(dropout=1)), r"the streams dropout; give nnx\.Rngs\(0\), or"),
        (lambda: layers.vote(jnp.ones((2, 1, 10)), 3), "10 outputs for 3 classes; give as many for each class"),
        (lambda: layers.vote(jnp.ones((2, 1, 10)), 0), "10 outputs for 0 classes; give as many for each class"),
        (lambda: layers.vote(jnp.ones((1, 10)), 2), r"spikes of shape \(1, 10\); give \[T, B, N\]"),
        (lambda: layers.max_pool(jnp.ones((4, 4))), r"x of shape \(4, 4\); pooling takes maps \[\.\.\., H, W, C\]"),
        (lambda: flat(dtype="bf"), "dtype is 'bf'; give a floating-point type"),
        (lambda: flat(dtype=jnp.float8_e5m2), "dtype is .*float8.*; give a floating-point type"),
        (lambda: flat(dtype=jnp.int32), "dtype is .*int32.*; give a floating-point type"),
    ],
)
def test_mistakes_are_told(make, says):
    with pytest.raises(UserError, match=says):
        make()


def test_each_layer_of_dropout_draws_a_mask_of_its_own():
    left = []

    def observe(name, layer, entering, leaving):
        left.append((leaving != 0).mean())

    net = flat([networks.dropout, networks.dropout])
    net(jnp.ones((2, 50, 8, 8, 2)), rngs=jax.random.key(0), observe=observe)
    np.testing.assert_allclose(left[:2], [1 / 2, 1 / 4], atol=0.03)


def test_frames_enter_a_bfloat16_network_in_its_type():
    entered = []
    flat(dtype=jnp.bfloat16)(X, observe=lambda name, layer, entering, leaving: entered.append(entering.dtype))
    assert entered[0] == jnp.bfloat16


class Keyed(nnx.Module):
    """Takes what is given to it by name, of which it names nothing."""

    def __init__(self):
        self.drop = layers.Dropout(0.5)

    def __call__(self, x, **settings):
        return self.drop(x, **settings)


def test_a_layer_that_takes_anything_by_name_is_given_its_key():
    assert with_block(Keyed)(X, rngs=jax.random.key(0)).shape == (1, 3)


def test_a_view_that_switches_batch_norm_leaves_dropout_as_it_was():
    net = flat([networks.dropout])
    net.eval()
    assert nnx.view(net, use_running_average=True).conv[0].deterministic is True


def test_frames_of_an_open_number_are_told_before_a_convolution_sees_them():
    net = networks.NMNISTNet(channels=2, number_layer=1, rngs=nnx.Rngs(0))
    T, B = jax.export.symbolic_shape("T, B")
    with pytest.raises(UserError, match=r"^x of shape \(T, B, 34, 34, 2\) leaves the number of timesteps open"):
        jax.export.export(jax.jit(net))(jax.ShapeDtypeStruct((T, B, *net.shape), jnp.float32))


def test_a_surrogate_that_is_a_function_is_told_by_its_name():
    def step(x):
        return (x >= 0).astype(x.dtype)

    net = flat()
    net.fc[2].surrogate = step
    assert layer_settings(net)["fc.2.surrogate"] == "step"
