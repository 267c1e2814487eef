"""What training changes, as one pytree."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from plif_jax.data.batches import replicated
from plif_jax.errors import UserError
from plif_jax.networks import NETWORKS

# The mapped axis over devices: what averages over the batch averages over it too.
AXIS = "batch"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a training step reads and writes.

    `healthy` turns False at the first loss or gradient that is not finite and stays so: the state is then the one
    before that step, and later steps leave it alone.
    """

    params: nnx.State
    batch_stats: nnx.State
    opt_state: Any
    step: jax.Array
    healthy: jax.Array


def set_precision(config):
    """Switches JAX to 64 bits where the run computes in float64, and back where not; before any array is made."""
    jax.config.update("jax_enable_x64", config.precision == "float64")


def network(config):
    """The network that a `Config` names, with its initial weights from the seed."""
    widths = dict(channels=config.channels, number_layer=config.number_layer) if config.facts.events else {}
    return NETWORKS[config.dataset_name](
        T=config.T,
        init_tau=config.init_tau,
        use_plif=config.use_plif,
        use_max_pool=config.use_max_pool,
        alpha_learnable=config.alpha_learnable,
        detach_reset=config.detach_reset,
        dtype=jnp.bfloat16 if config.precision == "bfloat16" else None,
        rngs=nnx.Rngs(config.seed),
        **widths,
    )


def adam(config, steps_per_epoch):
    """Adam with lr(epoch) = learning_rate (1 + cos(pi epoch / T_max)) / 2, going on past T_max.

    Reference: Fang et al., 2021, supplement G; Loshchilov and Hutter, SGDR, 2016, https://arxiv.org/abs/1608.03983.
    """

    def rate(step):
        return config.learning_rate * (1 + jnp.cos(jnp.pi * (step // steps_per_epoch) / config.T_max)) / 2

    return optax.adam(rate, b1=0.9, b2=0.999, eps=1e-8)


def create(config, optimizer, devices, abstract=False):
    """The network's static half and a fresh `TrainState`, whole on each of the devices; `abstract`: shapes alone.

    Raises:
      UserError: a custom layer holds what is neither learned nor kept.
    """
    try:
        net = nnx.eval_shape(lambda: network(config)) if abstract else network(config)
    except (UserError, jax.errors.JAXTypeError):  # a custom layer that needs numbers to be made
        if not abstract:
            raise
        net = network(config)
    net.set_attributes(axis_name=AXIS)
    graphdef, params, batch_stats, other = nnx.split(net, nnx.Param, nnx.BatchStat, ...)
    for path, value in nnx.to_flat_state(other):
        kind = "an array" if isinstance(value, jax.Array | np.ndarray) else f"an nnx.{type(value).__name__}"
        raise UserError(
            f"{'.'.join(map(str, path))} is {kind}; training learns each nnx.Param and keeps each nnx.BatchStat: "
            "make it one of these (dropout is layers.Dropout, which has no random state)"
        )

    def state():
        return TrainState(params, batch_stats, optimizer.init(params), jnp.zeros((), jnp.int32), jnp.asarray(True))

    everywhere = replicated(devices)
    if abstract:
        shapes = jax.eval_shape(state)
        return graphdef, jax.tree.map(lambda leaf: leaf.update(sharding=everywhere), shapes)
    return graphdef, jax.device_put(jax.device_get(state()), everywhere)
