"""A network made from a table of layers: each over all timesteps before the next, its membranes the state.

A table has the paper program's three parts. `static_conv` sees an image once; `conv` and `fc` see all T timesteps,
layer by layer. The entries are builders: given the shape that reaches it, each makes its layer and names the shape
that leaves it. Positions in a part are those of the paper program's `Sequential`, so weights carry over by name.
"""

import inspect
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from plif_jax import neurons, normalized
from plif_jax.dtypes import is_floating, is_whole
from plif_jax.errors import UserError
from plif_jax.layers import BatchNorm, Dropout, dropout_key, firing_rates, vote
from plif_jax.surrogate import check_switch


class SpikingNet(nnx.Module):
    """A spiking network made from a table of layers; the paper's networks are its subclasses.

    Args:
      table: {"static_conv": [...], "conv": [...], "fc": [...]} of builders: functions of (net, shape, rngs) that
        return a layer and the shape that leaves it.
      shape: (H, W, C) of an image or a frame.
      classes: number of classes; the last layer has a group of outputs for each, of neurons usually.
      T: timesteps for which a static image is shown. Frames bring their own number; there T says what
        `interop.export` and `interop.nir` write.
      init_tau: tau of LIF neurons, initial tau of PLIF neurons, in timesteps, above 1.
      use_plif, use_max_pool, alpha_learnable, detach_reset: the paper program's flags.
      dtype: of convolutions and linear layers, such as bfloat16; membranes and parameters stay float32 or better.
      rngs: source of the initial weights.

    Raises:
      UserError: T is not a whole number from 1, a switch neither True nor False, tau not above 1, rngs no nnx.Rngs for
        weights, or a feature map too small to be pooled; the table lacks a part or has another, holds what is no
        builder or a neuron in static_conv, or does not end in a group of outputs for each class.
    """

    PARTS = ("static_conv", "conv", "fc")

    def __init__(
        self,
        table,
        shape,
        classes,
        *,
        T,
        init_tau=2.0,
        use_plif=True,
        use_max_pool=True,
        alpha_learnable=False,
        detach_reset=True,
        dtype=None,
        rngs,
    ):
        if not is_whole(T):
            raise UserError(f"T is {T}; a network runs for a whole number of timesteps, 1 or more")
        if not isinstance(rngs, nnx.Rngs):
            raise UserError(f"rngs is of type {type(rngs).__name__}; give nnx.Rngs(2020), to draw initial weights from")
        if not {"params", "default"} & set(rngs):
            raise UserError(f"rngs has the streams {', '.join(rngs)}; give nnx.Rngs(0), or nnx.Rngs(params=0)")
        if dtype is not None and not is_floating(dtype):
            raise UserError(
                f"dtype is {dtype!r}; give a floating-point type, such as jnp.bfloat16, or None for the input's"
            )
        whole = isinstance(table, Mapping) and set(table) == set(self.PARTS)
        if not whole or not all(isinstance(part, list | tuple) for part in table.values()):
            given = f" of {', '.join(map(str, table))}" if isinstance(table, Mapping) else ""
            kind, parts = type(table).__name__, ", ".join(self.PARTS)
            raise UserError(f"the table is a {kind}{given}; give a dict of {parts}, each a list of builders")
        self.shape, self.classes, self.T, self.init_tau, self.dtype = tuple(shape), classes, T, init_tau, dtype
        self.use_plif, self.use_max_pool = use_plif, use_max_pool
        self.alpha_learnable, self.detach_reset = alpha_learnable, detach_reset
        for name in ("use_plif", "use_max_pool", "alpha_learnable", "detach_reset"):
            check_switch(name, getattr(self, name))
        for part in self.PARTS:
            layers = []
            for i, build in enumerate(table[part]):
                layer, shape = _built(f"{part}.{i}", build, self, shape, rngs)
                if part == "static_conv" and isinstance(layer, neurons.Neuron):
                    raise UserError("a neuron in static_conv, where it would see a still image once; put it in conv")
                layers.append(layer)
            setattr(self, part, nnx.List(layers))
        outputs = vector("the vote", shape)
        if not is_whole(classes) or outputs % classes:
            raise UserError(f"{outputs} outputs for {classes} classes; the last layer has a group of neurons for each")

    def named_layers(self):
        """All layers in order, as {"conv.2": layer}: the paper program's names."""
        return {f"{part}.{i}": layer for part in self.PARTS for i, layer in enumerate(getattr(self, part))}

    def named_neurons(self):
        """The spiking layers in order, as {name: neuron}."""
        return {name: layer for name, layer in self.named_layers().items() if isinstance(layer, neurons.Neuron)}

    def unroll(self, state, x, *, rngs=None, observe=None):
        """Runs the network on x from `state`, layer by layer, each over all timesteps.

        A sequence in chunks, the state carried over, gives what one call gives, but for a custom layer that
        looks at several timesteps at once, such as attention over time: it would see those of its chunk.

        Args:
          state: tuple of membranes as an earlier call returned it; None: at rest. `unroll(None, x[:0])` returns the one
            at rest, for the carry of a `lax.scan`.
          x: images [B, H, W, C], shown for T timesteps, or frames [T, B, H, W, C].
          rngs: for dropout in training mode: a key, keys [B], nnx.Rngs or one of its streams.
          observe: called as observe(name, layer, input, output) after each layer, for those who look inside.

        Returns:
          The state after the last timestep and the votes [T, B, classes]: each class's mean output spikes.

        Raises:
          UserError: x or a membrane is of another shape, x sharded by explicit axes; dropout in training has no key;
            a custom layer holds neurons, whose membranes are in no state, or is a recurrent one of Flax's.
        """
        for name, layer in self.named_layers().items():
            if isinstance(layer, neurons.Neuron):
                continue
            kind = type(layer).__name__
            for _, node in nnx.iter_graph(layer):
                if isinstance(node, neurons.Neuron):
                    raise UserError(
                        f"{name} is a {kind} whose neurons no state carries; call net(x), or list its layers"
                    )
                if isinstance(node, nnx.RNNCellBase):
                    raise UserError(f"{name} is a {kind} that would begin anew at every call; call net(x)")
        after, spikes = self._run(state, x, rngs, observe)
        return after, vote(spikes, self.classes)

    def _run(self, state, x, rngs, observe):
        """The membranes after the last timestep and the output neurons' spikes [T, B, N]."""
        x, still = self._as_frames(jnp.asarray(x))
        count = len(self.named_neurons())
        if state is None:
            state = [None] * count
        if isinstance(state, Mapping) or not hasattr(state, "__len__"):
            raise UserError(
                f"state is a {type(state).__name__}; give the tuple of membranes that a call returned, or None"
            )
        if len(state) != count:
            raise UserError(f"a state of {len(state)} membranes; this network has {count}")
        before, after, norm = iter(state), [], None
        layers = list(self.named_layers().items())
        # Before any layer: a call that fails for want of a key should not have moved the running statistics.
        drops = {name for name, layer in layers if _drops(name, layer)}
        key = dropout_key(rngs, x.shape[1]) if drops else None
        for index, (name, layer) in enumerate(layers):
            following = layers[index + 1][1] if index + 1 < len(layers) else None
            shown = still and index == len(self.static_conv)
            if shown and (observe is not None or not isinstance(layer, neurons.Neuron)):
                x = jnp.broadcast_to(x, (self.T, *x.shape[1:]))
            entering = x
            if isinstance(layer, BatchNorm) and isinstance(following, neurons.Neuron) and observe is None:
                norm = layer  # the neuron's: see `normalized`
            elif isinstance(layer, neurons.Neuron):
                unroll = layer.unroll if norm is None else partial(normalized.unroll, norm, layer)
                v, x = unroll(next(before), x, **({"T": self.T} if shown else {}))
                after.append(v)
                norm = None
            elif name in drops:
                x = layer(x, rngs=_fold_in(key, index))
            else:
                x = layer(x)
            if observe is not None:
                observe(name, layer, entering, x)
        return tuple(after), x

    def _as_frames(self, x):
        """Checks x and gives it as [T, B, H, W, C] with whether it is a still image, T = 1."""
        still = x.ndim == 4 and len(self.static_conv) > 0
        if x.ndim != 5 - still or x.shape[-3:] != self.shape:
            H, W, C = self.shape
            image = f"images [B, {H}, {W}, {C}] or " if self.static_conv else ""
            raise UserError(f"input of shape {x.shape}; this network takes {image}frames [T, B, {H}, {W}, {C}]")
        if not still:
            neurons.check_timesteps(x)
        if jnp.iscomplexobj(x):
            raise UserError(f"input of type {x.dtype}; give real numbers")
        if any(jax.typeof(x).sharding.spec):  # explicit axes: automatic ones are not part of a type, and need nothing
            raise UserError(f"x is {jax.typeof(x)}, sharded by explicit axes; wrap the step in jax.sharding.auto_axes")
        x = x.astype(self.dtype or jnp.result_type(float))
        return (x[None] if still else x), still

    def __call__(self, x, *, rngs=None, observe=None):
        """Firing rates [B, classes] in 0..1 for x [B, H, W, C] or [T, B, H, W, C], from rest; arguments as of `unroll`.

        Where the last layer is none of neurons, these are means of what leaves it.

        Raises:
          UserError: x is of another shape or has no timestep; dropout in training mode has no key.
        """
        x = jnp.asarray(x)
        if x.ndim == 5 and x.shape[0] == 0:
            raise UserError(f"x of shape {x.shape} has no timestep, in which nothing can fire; give at least one")
        return firing_rates(self._run(None, x, rngs, observe)[1], self.classes)


def vector(taker, shape):
    """The length of what reaches a layer that takes vectors.

    Raises:
      UserError: it is no vector.
    """
    if len(shape) != 1:
        raise UserError(f"{taker} takes vectors, but maps of shape {shape} reach it: put flatten before it")
    return shape[0]


def _built(name, build, net, shape, rngs):
    """The layer that a table's entry makes, and the shape that leaves it."""
    try:
        if isinstance(build, type):  # a class of layers takes other arguments
            raise TypeError
        inspect.signature(build).bind(net, shape, rngs)
    except (TypeError, ValueError):
        entry = getattr(build, "__name__", type(build).__name__)
        raise UserError(
            f"{name} of the table is {entry}, no builder; give norm, conv(8), or a function of (net, shape, rngs) that "
            "returns a layer and the shape that leaves it"
        ) from None
    made = build(net, shape, rngs)
    if not isinstance(made, tuple) or len(made) != 2:
        raise UserError(
            f"{name} of the table makes a {type(made).__name__}; a builder returns a layer and the shape that leaves it"
        )
    return made


def _drops(name, layer):
    """Whether a layer is, or holds, dropout that is on; raises where it takes no key for it."""
    if not any(isinstance(node, Dropout) and node.drops for _, node in nnx.iter_graph(layer)):
        return False
    parameters = inspect.signature(layer.__call__).parameters.values()
    if not any(p.name == "rngs" or p.kind is p.VAR_KEYWORD for p in parameters):
        kind = type(layer).__name__
        raise UserError(f"{name} is a {kind} that holds dropout; let its __call__ take rngs and pass them on")
    return True


def layer_settings(net):
    """{"conv.2": "PLIF", "conv.2.v_reset": 0.0, ...}: tells networks apart whose weights have the same shapes.

    Of layers that are Flax's, or derived from them, the class alone: their settings change with its versions. The
    network is as it trains, for modes are settings too.
    """
    told = {}
    for path, module in nnx.iter_graph(net):
        if not isinstance(module, nnx.Module) or isinstance(module, nnx.List | nnx.Dict | SpikingNet):
            continue
        name = ".".join(map(str, path))
        told[name] = type(module).__name__
        if any(base.__module__.startswith("flax.nnx.nn.") for base in type(module).__mro__):
            continue
        for setting, value in vars(module).items():
            if setting[0] != "_" and isinstance(value, bool | int | float | str | None):
                told[f"{name}.{setting}"] = value
            elif setting == "surrogate" and not isinstance(value, nnx.Module):
                told[f"{name}.{setting}"] = getattr(value, "__name__", type(value).__name__)  # a function
    return told


def check_net(net):
    """Raises UserError unless it is a `SpikingNet`, whose layers have names and an order."""
    if not isinstance(net, SpikingNet):
        raise UserError(f"a {type(net).__name__} is no SpikingNet; give one, the paper's or of a table of your layers")


def _fold_in(key, index):
    """One key per layer, from one key or from one key per sample [B]."""
    return jax.random.fold_in(key, index) if key.ndim == 0 else jax.vmap(jax.random.fold_in, (0, None))(key, index)
