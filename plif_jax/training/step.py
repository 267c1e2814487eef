"""The pure train and evaluation steps, mapped over devices."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

from plif_jax.data.augment import preprocess
from plif_jax.mapped import mean_over_devices
from plif_jax.training.state import AXIS, TrainState


def frames_for(config, x, keys=None):
    """Stored samples to the network's input: images [B, H, W, C], or event frames time first, [T, B, H, W, 2]."""
    x = preprocess(config.dataset_name, x, keys)
    return jnp.moveaxis(x, 1, 0) if config.facts.events else x


def sample_keys(config, step, positions_B):
    """(augmentation keys [B], dropout keys [B]) of a step: functions of seed, step and position in the whole batch."""
    # By name, for what another generator draws under vmap depends on how many draw with it.
    step_key = jax.random.fold_in(jax.random.key(config.seed, impl="threefry2x32"), step)
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(step_key, positions_B)
    return jax.vmap(jax.random.split, out_axes=1)(keys_B)


def loss_of(config, graphdef, params, batch_stats, x, y, keys, observe=None):
    """The loss of the paper's program, L = mean over b and i of (r_bi - y_bi)^2.

    r [B, classes] are firing rates, y the labels [B], one-hot. Sec. 3.7 of the paper prints the mean over timesteps of
    (o_tbi - y_bi)^2 instead, which is larger by the variance of the votes o over time.

    Args:
      x: a batch as it is stored, images [B, H, W, C] or frames [B, T, H, W, 2].
      keys: (augmentation keys [B], dropout keys [B]), of `sample_keys`.
      observe: as for `SpikingNet`.

    Returns:
      The loss, and (accuracy, running statistics after the batch).
    """
    augment_keys, dropout_keys = keys
    # copy=True: under jax.grad the merged network must own its running statistics.
    net = nnx.merge(graphdef, params, batch_stats, copy=True)
    net.train()
    rates = net(frames_for(config, x, augment_keys), rngs=dropout_keys, observe=observe)
    loss = jnp.mean(jnp.square(rates - jax.nn.one_hot(y, rates.shape[-1], dtype=rates.dtype)))
    accuracy = jnp.mean(rates.argmax(-1) == y, dtype=rates.dtype)
    return loss, (accuracy, nnx.state(net, nnx.BatchStat))


def _scan(step, carry, xs):
    """`lax.scan`, but a single step is no loop: on the CPU, XLA runs convolutions in a loop several times slower."""
    if len(xs) > 1:
        return lax.scan(step, carry, xs)
    carry, y = step(carry, xs[0])
    return carry, jax.tree.map(lambda leaf: leaf[None], y)


def _choose(condition, yes, no, state):
    """yes(state) or no(state): a branch on a CPU, where a choice by element copies the whole state.

    Elsewhere the choice costs nothing, for it fuses with the update, and a branch would wait for the host.
    """

    def branch(state):
        return lax.cond(condition, yes, no, state)

    def by_element(state):
        return jax.tree.map(partial(jnp.where, condition), yes(state), no(state))

    return lax.platform_dependent(state, cpu=branch, default=by_element)


def make_train(config, graphdef, optimizer, devices, data_axis):
    """Compiles K training steps in one dispatch.

    Returns:
      train(state, x, y, index, asked) -> (state, {"loss", "accuracy", "healthy": [K], "asked"}). `x, y, index` come
      from a `Feed` whose `axis` is `data_axis`. `asked` [local devices] is the largest over all processes when it
      returns, so that one told to stop stops all at the same step. The state passed in is donated; use the new one.
    """

    def train_step(x, y, state, index_b):
        positions = lax.axis_index(AXIS) * index_b.size + jnp.arange(index_b.size)
        keys = sample_keys(config, state.step, positions)
        grad = jax.value_and_grad(partial(loss_of, config, graphdef), has_aux=True)
        (loss, (accuracy, batch_stats)), grads = grad(state.params, state.batch_stats, x[index_b], y[index_b], keys)
        loss, accuracy, grads = mean_over_devices((loss, accuracy, grads), AXIS)
        # One infinite or undefined value makes the sum so.
        healthy = state.healthy & jnp.isfinite(loss) & jnp.isfinite(optax.tree.sum(grads))

        def update(state):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            return TrainState(params, batch_stats, opt_state, state.step + 1, healthy)

        def keep(state):
            return replace(state, healthy=healthy)

        state = _choose(healthy, update, keep, state)
        return state, {"loss": loss, "accuracy": accuracy, "healthy": healthy}

    def train(state, x, y, index_Kb, asked):
        state, metrics = _scan(partial(train_step, x, y), state, index_Kb)
        return state, metrics | {"asked": lax.pmax(asked, AXIS)}

    axes = (None, data_axis, data_axis, 0, 0)
    return jax.pmap(train, AXIS, in_axes=axes, out_axes=None, donate_argnums=0, devices=devices)


def make_evaluate(config, graphdef, devices, data_axis, firing_rates=False):
    """Compiles the evaluation of K batches in one dispatch; every sample counts once, padding (index -1) not at all.

    Returns:
      evaluate(params, batch_stats, x, y, index) -> {"confusion": counts [label, prediction]}, with `firing_rates`
      also {"spikes": {layer: sum over samples of the layer's mean firing rate}}.
    """
    classes = config.facts.classes

    def evaluate_batch(params, batch_stats, x, y, index_b):
        net = nnx.merge(graphdef, params, batch_stats)
        net.eval()
        spikes = {}
        weight_b = index_b >= 0

        def observe(name, layer, entering, leaving):
            if name in net.named_neurons():
                rate_b = jnp.mean(leaving, axis=(0, *range(2, leaving.ndim)), dtype=jnp.float32)
                spikes[name] = jnp.sum(rate_b * weight_b)

        rates = net(frames_for(config, x[index_b]), observe=observe if firing_rates else None)
        confusion = jnp.zeros((classes, classes), jnp.int32).at[y[index_b], rates.argmax(-1)].add(weight_b)
        return {"confusion": confusion} | ({"spikes": spikes} if firing_rates else {})

    def evaluate(params, batch_stats, x, y, index_Kb):
        def batch(_, index_b):
            return None, evaluate_batch(params, batch_stats, x, y, index_b)

        _, counts = _scan(batch, None, index_Kb)
        return lax.psum(jax.tree.map(lambda count: count.sum(0), counts), AXIS)

    axes = (None, None, data_axis, data_axis, 0)
    return jax.pmap(evaluate, AXIS, in_axes=axes, out_axes=None, devices=devices)


def first_lost(params):
    """The first layer with weights that are not finite, or so large that their squares are not; or None."""
    with np.errstate(over="ignore", invalid="ignore"):
        for path, leaf in jax.tree.leaves_with_path(params):
            # A dot product runs through the weights without writing anything.
            if not np.isfinite(np.vdot(leaf, leaf)):
                return jax.tree_util.keystr(path[:2], simple=True, separator=".")
    return None


def first_failure(config, graphdef, state, x, y):
    """Names the layer at which a batch's loss or gradient stops being finite, or None; on one device.

    Goes forward through the layers' outputs first, then backward through their gradients.
    """

    def loss(params, x, y):
        finite = {}

        def observe(name, layer, entering, leaving):
            finite[name] = jnp.isfinite(leaving).all()

        keys = sample_keys(config, state.step, jnp.arange(len(y)))
        value, _ = loss_of(config, graphdef, params, state.batch_stats, x, y, keys, observe)
        return value, finite

    # The layers average over AXIS; a mapped axis of one device stands in for it.
    grad = jax.vmap(jax.grad(loss, has_aux=True), (None, 0, 0), axis_name=AXIS)
    grads, finite = jax.jit(grad)(state.params, x[None], y[None])
    names = list(nnx.merge(graphdef, state.params, state.batch_stats).named_layers())  # in order; jit sorts them
    for name in names:
        if not finite[name].all():
            return f"the output of {name}"
    for name in reversed(names):
        part, index = name.split(".")
        if not all(jnp.isfinite(g).all() for g in jax.tree.leaves(dict(grads[part]).get(int(index), ()))):
            return f"the gradient of {name}"
    return None
