"""The network that a file's weights belong to, built again.

Names and shapes tell which network it is, its widths and depth, and whether tau and alpha are learned. The rest is in
whole-object files. For a plain state dict the tau of LIF and, in the paper's networks, the kind of pooling have to be
given. What is left is the paper's unless given; in SpikingJelly's networks T is 8, and threshold, reset and surrogate
are its defaults. A whole object with decay_input=False is refused; a plain state dict does not tell that it had been
trained so, and gives a network whose currents are divided by tau.
"""

import jax.numpy as jnp
from flax import nnx

from plif_jax import neurons, surrogate
from plif_jax.catalog import DATASETS
from plif_jax.errors import UserError, nearest
from plif_jax.interop import spikingjelly
from plif_jax.interop.inert_pickle import Object
from plif_jax.interop.torch import load_state_dict
from plif_jax.networks import NETWORKS

# Classes of neurons there that are neurons.LIF or neurons.PLIF here.
NEURON_CLASSES = ("LIFNode", "PLIFNode", "ParametricLIFNode")
SETTINGS = ("T", "init_tau", "use_max_pool", "detach_reset", "v_threshold", "v_reset", "surrogate", "dataset_name")


def rebuild(checkpoint, **given):
    """Builds the network of a `torch_files.Checkpoint`, loads its weights, and sets it to evaluation mode.

    Args:
      checkpoint: as `torch_files.read` returns it.
      given: settings that the file does not hold, or that shall replace its own, under the names of `SETTINGS`;
        `init_tau` is tau where neurons are LIF. `v_threshold`, `v_reset` and `surrogate` (name and alpha, such as
        ("ATan", 2.0)) are fixed in the paper's networks and free in SpikingJelly's.

    Raises:
      UserError: the weights are of no known network, a setting is missing, or the file's neurons differ from ours.
    """
    if unknown := given.keys() - set(SETTINGS):
        raise UserError(f"{', '.join(sorted(unknown))} cannot be set here; settings are {', '.join(SETTINGS)}")
    if "surrogate" in given and not (isinstance(given["surrogate"], tuple | list) and len(given["surrogate"]) == 2):
        raise UserError(f'surrogate is {given["surrogate"]!r}; give its name and alpha, such as ("ATan", 2.0)')
    arrays = checkpoint.arrays
    settings = _found(checkpoint.module) | given
    build = _spikingjelly if any(name.startswith("conv_fc.") for name in arrays) else _paper
    net = build(arrays, settings)
    load_state_dict(net, arrays)
    net.eval()
    return net


def _objects(module):
    """All modules below one, itself first; each once."""
    waiting, seen = [module] if module is not None else [], set()
    while waiting:
        module = waiting.pop(0)
        if type(module) is Object and id(module) not in seen:
            seen.add(id(module))
            yield module
            children = module.attributes.get("_modules")
            if type(children) is dict and id(children) not in seen:  # shared by modules of hostile files only
                seen.add(id(children))
                waiting += children.values()


def _found(module):
    """Settings held by a saved module tree; of neurons, what all agree in."""
    settings, facts = {}, []
    for part in _objects(module):
        name, attributes = part.cls.name.rpartition(".")[2], part.attributes
        if name in ("MaxPool2d", "AvgPool2d"):
            settings["use_max_pool"] = name == "MaxPool2d"
        elif "v_threshold" in attributes:
            facts.append(_neuron_facts(part, name))
    if facts and any(other != facts[0] for other in facts):
        raise UserError("the file's spiking layers differ in their settings; networks here have one setting for all")
    if module is not None and type(module.attributes.get("T")) is int:
        settings["T"] = module.attributes["T"]
    return settings | (facts[0] if facts else {})


def _neuron_facts(part, name):
    attributes = part.attributes
    if name not in NEURON_CLASSES:
        raise UserError(f"the file's neurons are {name}; those read are {', '.join(NEURON_CLASSES)}")
    if attributes.get("decay_input") is False:
        raise UserError(
            f"the file's {name} has decay_input=False, its current is not divided by tau; here it always is"
        )
    names = {"v_threshold": "v_threshold", "v_reset": "v_reset", "detach_reset": "detach_reset", "tau": "init_tau"}
    facts = {ours: attributes[theirs] for theirs, ours in names.items() if theirs in attributes}
    children = attributes.get("_modules")
    fire = children.get("surrogate_function") if type(children) is dict else None
    alpha = fire.attributes.get("alpha") if type(fire) is Object else None
    for key, value in (*facts.items(), ("alpha", alpha)):
        if not isinstance(value, bool | int | float | None) or (type(value) is int and value.bit_length() > 63):
            raise UserError(f"the file's {name} has as {key} a {type(value).__name__}; a usual number is needed")
    if type(fire) is Object:
        kind, more = fire.cls.name.rpartition(".")[2], fire.attributes
        if more.get("spiking") is False:
            raise UserError(f"the file's {kind} gives its smooth output in place of spikes; here it always fires")
        other = more.keys() & {"beta", "leak", "k", "c", "n", "T_period"}  # alpha alone would not tell it
        facts["surrogate"] = kind, None if other else alpha
    return facts


def _need(settings, name, why):
    if name not in settings:
        raise UserError(f"the file holds weights only, and they do not tell {name}: give {name}, {why}")
    return settings[name]


def _paper(arrays, settings):
    """One of the paper authors' networks."""
    found, widths = _paper_name(arrays)
    learnable = any(key.endswith("surrogate_function.alpha") for key in arrays)
    if (settings.get("v_threshold", 1.0), settings.get("v_reset", 0.0)) != (1.0, 0.0):
        raise UserError("in the file or given is another threshold or reset than the paper's networks have, 1 and 0")
    kind, alpha = settings.get("surrogate", ("ATan", 2.0))
    if kind != "ATan" or (not learnable and alpha not in (2.0, None)):
        raise UserError(
            f"in the file or given is the surrogate {kind} with alpha {alpha}; the paper's networks have ATan with 2"
        )
    use_plif = any(key.endswith(".w") for key in arrays)
    name = settings.get("dataset_name", found)
    fitting = [other for other in NETWORKS if DATASETS[other].events == DATASETS[found].events]
    if name not in fitting:
        raise UserError(f"dataset_name is {name!r}; weights with these names are of {', '.join(fitting)}")
    return NETWORKS[name](
        T=settings.get("T", DATASETS[name].T),
        init_tau=2.0 if use_plif else _need(settings, "init_tau", "the tau of its LIF neurons"),
        use_plif=use_plif,
        use_max_pool=_need(settings, "use_max_pool", "True for max pooling, False for average pooling"),
        alpha_learnable=learnable,
        detach_reset=settings.get("detach_reset", True),
        **widths,
        rngs=nnx.Rngs(0),
    )


def _paper_name(arrays):
    """Which data set's network the shapes are of, with its channels and number_layer where these are free."""
    shapes = {name: array.shape for name, array in arrays.items()}
    static = shapes.get("static_conv.0.weight")
    if static is not None:
        name = {(128, 1, 3, 3): "MNIST", (256, 3, 3, 3): "CIFAR10"}.get(static)
        if name is not None:
            return name, {}
    convolutions = [shape for name, shape in shapes.items() if name.startswith("conv.") and len(shape) == 4]
    linears = [shape for name, shape in shapes.items() if name.startswith("fc.") and len(shape) == 2]
    if convolutions and len(linears) == 2:
        channels, number_layer = convolutions[0][0], len(convolutions)
        for name, facts in DATASETS.items():
            H, W, _ = facts.shape
            inputs = channels * (H >> number_layer) * (W >> number_layer)
            if facts.events and (linears[0][1], linears[1][0]) == (inputs, 10 * facts.classes):
                return name, {"channels": channels, "number_layer": number_layer}
    raise UserError("these weights are of none of the paper's networks: " + ", ".join(DATASETS))


def _spikingjelly(arrays, settings):
    """One of SpikingJelly 2's networks."""
    shapes = {name: array.shape for name, array in arrays.items()}
    convolutions = [shape for shape in shapes.values() if len(shape) == 4]
    linears = [shape for shape in shapes.values() if len(shape) == 2]
    for cls in spikingjelly.NETWORKS:
        H, W, C = cls.shape
        channels, halvings = convolutions[0][0] if convolutions else 0, len(cls.stages)
        inputs = channels * (H >> halvings) * (W >> halvings)
        if len(convolutions) == sum(cls.stages) and linears[:1] == [(cls.hidden, inputs)] and convolutions[0][1] == C:
            fitting = [n for n, facts in DATASETS.items() if (facts.shape, facts.classes) == (cls.shape, cls.classes)]
            name = settings.get("dataset_name", fitting[0])
            if name not in fitting:
                raise UserError(f"dataset_name is {name!r}; weights of these shapes are of {', '.join(fitting)}")
            if not settings.get("use_max_pool", True):
                raise UserError("the file's network pools by average; SpikingJelly's networks here pool by maximum")
            T = settings.get("T", 8)
            return cls(_spiking_neuron(arrays, settings), channels=channels, T=T, rngs=nnx.Rngs(0))
    names = ", ".join(cls.__name__ for cls in spikingjelly.NETWORKS)
    raise UserError(f"these weights are of none of SpikingJelly 2's networks: {names}")


def _spiking_neuron(arrays, settings):
    """Makes neurons as the file has them, by SpikingJelly's defaults where neither it nor the caller says."""
    kind, alpha = settings.get("surrogate", ("Sigmoid", 4.0))
    fire = {cls.__name__: cls for cls in surrogate.Surrogate.__subclasses__()}
    if kind not in fire or alpha is None:
        near = "ATan" if kind in fire else nearest(str(kind), fire) or "ATan"
        why = "has more settings than alpha" if kind in fire else "has no counterpart"
        raise UserError(f'the surrogate {kind} in the file or given {why}: give surrogate, such as ("{near}", 2.0)')
    options = {
        "v_threshold": settings.get("v_threshold", 1.0),
        "v_reset": settings.get("v_reset", 0.0),
        "detach_reset": settings.get("detach_reset", False),
    }
    if any(key.endswith(".w") for key in arrays):
        return lambda: neurons.PLIF(param_dtype=jnp.float32, surrogate=fire[kind](alpha=alpha), **options)
    tau = _need(settings, "init_tau", "the tau of its LIF neurons")
    return lambda: neurons.LIF(tau, surrogate=fire[kind](alpha=alpha), **options)
