"""A training step of one's own under `jax.shard_map`, which checks what differs from device to device."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from reference import cases

from plif_jax import networks, neurons
from plif_jax.interop import torch as torch_interop


def test_gradients_under_shard_map_are_those_of_the_whole_batch(x64):
    """Its first convolution is direct, the second wide enough for Winograd's algorithm."""
    net = networks.NMNISTNet(T=2, channels=32, alpha_learnable=True, rngs=nnx.Rngs(0))
    shapes = {name: array.shape for name, array in torch_interop.state_dict(net).items()}
    torch_interop.load_state_dict(net, cases.state_dict(shapes))  # under which every layer fires
    net.set_attributes(axis_name="batch", deterministic=True)
    graphdef, params, rest = nnx.split(net, nnx.Param, ...)
    x = jnp.asarray(cases.frames(0, (2, 4, *net.shape)), float)

    def loss(params, x):
        rates = nnx.merge(graphdef, params, rest, copy=True)(x)
        return lax.psum(jnp.square(rates - 0.1).sum(), "batch")

    def gradients(devices):
        mesh, P = Mesh(np.array(jax.devices()[:devices]), ("batch",)), PartitionSpec
        sharded = jax.shard_map(loss, mesh=mesh, in_specs=(P(), P(None, "batch")), out_specs=P())
        return jax.jit(jax.grad(sharded))(params, x)

    whole, shared = gradients(1), gradients(2)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(whole))
    for (path, g), h in zip(jax.tree.leaves_with_path(whole), jax.tree.leaves(shared), strict=True):
        bound = 1e-4 if g.dtype == jnp.float32 else 1e-10  # w and alpha are summed in float32
        np.testing.assert_allclose(h, g, rtol=bound, atol=bound * jnp.abs(g).max(), err_msg=jax.tree_util.keystr(path))


def test_the_scan_and_its_definition_run_under_shard_map():
    neuron, mesh, P = neurons.LIF(), Mesh(np.array(jax.devices()[:2]), ("batch",)), PartitionSpec("batch")
    x = jnp.asarray(cases.array(0, (2, 3, 5)), jnp.float32)
    for run in (neuron.unroll, neuron.unroll_by_autodiff):
        sharded = jax.shard_map(lambda x, run=run: run(None, x[0])[1][None], mesh=mesh, in_specs=P, out_specs=P)
        np.testing.assert_array_equal(sharded(x), jnp.stack([neuron(each) for each in x]))
