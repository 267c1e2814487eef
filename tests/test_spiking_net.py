"""What a network of a user's own table takes: layers that hold neurons, states, types."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plif_jax import networks, neurons
from plif_jax.errors import UserError

X = jnp.full((2, 1, 8, 8, 2), 2.5)


class Block(nnx.Module):
    """A layer of a user's own that holds neurons."""

    def __init__(self):
        self.neuron = neurons.PLIF()

    def __call__(self, x):
        return x + self.neuron(x)


def flat(conv=(), **settings):
    fc = [networks.flatten, networks.linear(6), networks.neuron]
    table = {"static_conv": [], "conv": conv, "fc": fc}
    net = networks.SpikingNet(table, (8, 8, 2), 3, T=2, rngs=nnx.Rngs(0), **settings)
    net.fc[1].kernel[...] = jnp.linspace(0.0, 0.01, 6)[None] * jnp.ones((128, 1))  # currents 0 to 3.2
    return net


def with_block():
    return flat([lambda net, shape, rngs: (Block(), shape)])


def test_a_block_with_neurons_of_its_own_runs_from_rest():
    expected = flat()(X + neurons.PLIF()(X))
    np.testing.assert_array_equal(with_block()(X), expected)
    assert (expected != flat()(X)).any()


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
        (lambda: flat(dtype="bf"), "dtype is 'bf'; give a floating-point type"),
        (lambda: flat(dtype=jnp.int32), "dtype is .*int32.*; give a floating-point type"),
    ],
)
def test_mistakes_are_told(make, says):
    with pytest.raises(UserError, match=says):
        make()
