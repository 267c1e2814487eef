"""Values under a mapped axis, of `jax.pmap` or `jax.shard_map`: averages over it, and what differs along it."""

import jax
from jax import lax


def mean_over_devices(tree, axis_name):
    """The mean over a mapped axis; of one device, or without an axis, what was given: `lax.pmean` would copy it."""
    return tree if axis_name is None or lax.axis_size(axis_name) == 1 else lax.pmean(tree, axis_name)


def varying_as(x, tree):
    """A tree whose arrays count as differing along every mapped axis along which x does.

    `jax.shard_map` asks this of what a loop carries, and of what a gradient written by hand is for: JAX then adds up
    its parts from all devices.
    """
    axes = jax.typeof(x).manual_axis_type.varying

    def vary(leaf):
        more = axes - jax.typeof(leaf).manual_axis_type.varying
        return lax.pcast(leaf, tuple(more), to="varying") if more else leaf

    return jax.tree.map(vary, tree)
