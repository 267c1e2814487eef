"""Values under a mapped axis, of `jax.pmap` or `jax.shard_map`: averages over it, and what differs along it."""

import jax
from jax import lax


def mean_over_devices(tree, axis_name):
    """The mean over a mapped axis; of one device, or without an axis, what was given: `lax.pmean` would copy it."""
    if axis_name is None or (lax.axis_size(axis_name) == 1 and not _varying(tree)):
        return tree
    return lax.pmean(tree, axis_name)


def vary_alike(*trees):
    """The trees, all of whose arrays count as differing along every mapped axis along which one of them does.

    `jax.shard_map` requires this of a loop's carry, and of the arguments of a hand-written gradient: JAX then sums that
    gradient over the devices.
    """
    axes = _varying(trees)

    def vary(leaf):
        more = axes - _varying(leaf)
        return lax.pcast(leaf, tuple(more), to="varying") if more else leaf

    return jax.tree.map(vary, trees)


def _varying(tree):
    """The mapped axes along which an array of a tree differs, where `jax.shard_map` checks that."""
    return frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(tree)))
