"""A training step of one's own under `jax.shard_map`, which checks what differs from device to device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from reference import cases

from plif_jax import networks, neurons
from plif_jax.errors import UserError
from plif_jax.interop import torch as torch_interop
from plif_jax.layers import BatchNorm, Conv3x3


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


def run_sharded(function, devices, in_specs, out_specs):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("batch",))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


@pytest.mark.parametrize("used", ["membranes", "spikes"])
def test_either_result_of_unroll_alone_has_a_gradient(used):
    graphdef, params = nnx.split(neurons.PLIF())
    x = jnp.asarray(cases.array(0, (3, 4, 5)) + 1, jnp.float32)

    def loss(params, x):
        v, spikes = nnx.merge(graphdef, params).unroll(None, x)
        return jnp.square(v if used == "membranes" else spikes + spikes.mean()).sum()

    P = PartitionSpec
    shared = run_sharded(lambda params, x: lax.psum(loss(params, x), "batch"), 1, (P(), P(None, "batch")), P())
    found, expected = (jax.tree.leaves(jax.grad(f)(params, x)) for f in (shared, loss))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_each_device_may_have_parameters_of_its_own():
    """For one and the same x: an ensemble."""
    x, P = jnp.asarray(cases.array(0, (3, 4, 8, 8, 4)) + 0.5, jnp.float32), PartitionSpec
    parts = (
        Conv3x3(4, 3, rngs=nnx.Rngs(0)),
        BatchNorm(3),
        neurons.PLIF(),
    )
    graphdef, params, rest = nnx.split(nnx.List(parts), nnx.Param, ...)

    def loss(params):
        conv, norm, neuron = nnx.merge(graphdef, params, rest, copy=True)
        return jnp.square(neuron(norm(conv(x)))).sum() + jnp.square(conv(x)).sum()

    def of_ensemble(params):
        return lax.psum(loss(jax.tree.map(lambda leaf: leaf[0], params)), "batch")

    both = jax.tree.map(lambda leaf: jnp.stack([leaf, 1.5 * leaf]), params)
    found = jax.grad(run_sharded(of_ensemble, 2, (P("batch"),), P()))(both)
    for i in range(2):
        mine = jax.tree.map(lambda leaf, i=i: leaf[i], both)
        for one, other in zip(jax.tree.leaves(jax.grad(loss)(mine)), jax.tree.leaves(found), strict=True):
            np.testing.assert_allclose(other[i], one, rtol=1e-3, atol=1e-3 * float(jnp.abs(one).max()))


@pytest.mark.parametrize("devices", [1, 2])
def test_running_statistics_are_those_of_the_whole_batch(devices):
    graphdef, params, stats = nnx.split(BatchNorm(3, axis_name="batch"), nnx.Param, ...)
    x, P = jnp.asarray(cases.array(0, (2, 4, 3)), jnp.float32), PartitionSpec

    def moved(params, stats, x):
        norm = nnx.merge(graphdef, params, stats, copy=True)
        norm(x)
        return nnx.state(norm, nnx.BatchStat)

    found = run_sharded(moved, devices, (P(), P(), P(None, "batch")), P())(params, stats, x)
    whole = BatchNorm(3)
    whole(x)
    np.testing.assert_allclose(found["mean"][...], whole.mean[...], rtol=1e-6)


def test_sharded_arrays_under_jit():
    net = networks.NMNISTNet(T=2, channels=4, rngs=nnx.Rngs(0))
    net.eval()
    graphdef, state = nnx.split(net)
    x = jnp.asarray(cases.frames(0, (2, 4, *net.shape)), jnp.float32)
    mesh = Mesh(np.array(jax.devices()[:2]), ("batch",))  # its axes are AxisType.Auto
    shared = jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "batch")))
    rates = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    np.testing.assert_array_equal(rates(state, shared), rates(state, x))


@pytest.mark.parametrize("rows", [3, 1])
@pytest.mark.parametrize("used", ["both", "membranes"])
def test_a_neuron_takes_currents_with_explicit_axes(rows, used):
    neuron = neurons.PLIF()
    graphdef, state = nnx.split(neuron)
    x = jnp.asarray(np.random.default_rng(0).normal(1, 1, (rows, 4, 5)), jnp.float32)

    def results(unroll, state, x):
        def loss(state, x):
            v, spikes = unroll(nnx.merge(graphdef, state), x)
            of_spikes = (spikes * jnp.arange(5.0).reshape(1, 1, 5)).sum() if used == "both" else 0
            return of_spikes + jnp.square(v).sum(), spikes

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(state, x)

    def once(neuron, x):
        return neuron.unroll(None, x, T=3)

    def definition(neuron, x):
        return neuron.unroll_by_autodiff(None, jnp.tile(x, (3 // rows, 1, 1)))

    whole = results(once, state, x)
    mesh = jax.make_mesh((2,), ("batch",), (AxisType.Explicit,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        shared = jax.device_put(x, PartitionSpec(None, "batch"))
        for unroll in (once, definition):
            found = results(unroll, state, shared)
            assert jax.typeof(found[0][1]).sharding.spec == PartitionSpec(None, "batch", None)
            for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
                np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
    elsewhere = jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "batch")))  # and no mesh is set
    for run in (lambda x: once(neuron, x)[1], jax.jit(lambda x: once(neuron, x)[1])):
        np.testing.assert_array_equal(run(elsewhere), whole[0][1])


def test_of_explicit_axes_it_says_how_to_make_them_automatic():
    """As those of `jax.make_mesh` are unless it is told otherwise."""
    net = networks.NMNISTNet(T=2, channels=4, rngs=nnx.Rngs(0))
    net.set_attributes(deterministic=True)
    graphdef, params, rest = nnx.split(net, nnx.Param, ...)
    x, P = jnp.asarray(cases.frames(0, (2, 4, *net.shape)), jnp.float32), PartitionSpec

    def gradient(params, x):
        return jax.grad(lambda params: jnp.square(nnx.merge(graphdef, params, rest, copy=True)(x) - 0.1).sum())(params)

    with jax.set_mesh(jax.make_mesh((2,), ("batch",), (AxisType.Explicit,), devices=jax.devices()[:2])):
        shared = jax.device_put(x, P(None, "batch"))
        with pytest.raises(UserError, match=r"x is float32\[2,4@batch,.*by explicit axes; .* jax.sharding.auto_axes"):
            jax.jit(gradient)(params, shared)
        found = jax.jit(jax.sharding.auto_axes(gradient, out_sharding=P()))(params, shared)
    for mine, whole in zip(jax.tree.leaves(found), jax.tree.leaves(jax.jit(gradient)(params, x)), strict=True):
        np.testing.assert_allclose(mine, whole, rtol=1e-4, atol=1e-4 * float(jnp.abs(whole).max()))
