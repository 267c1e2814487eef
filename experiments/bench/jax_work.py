"""Our side of each comparison, and the machine's own limits measured with the same framework and threads."""

import contextlib
import tempfile

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from bench.fitting import fitting
from bench.limits import multiply_adds, training_operations
from bench.machine import cores, peak_resident
from bench.recordings import recording
from plif_jax import cli, neurons
from plif_jax.config import Config
from plif_jax.data import frames
from plif_jax.training import state, step

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def build(spec):
    """(run, facts) of a spec."""
    kinds = {
        "neuron": _neuron,
        "copy": _copy,
        "matmul": _matmul,
        "train": _train,
        "infer": _infer,
        "memory": _memory,
        "frames": _frames,
        "epoch": _epoch,
    }
    cli.keep_freed_memory()  # as every script does
    return kinds[spec["kind"]](spec)


def _facts(**facts):
    device = jax.devices()[0]
    versions = {"jax": jax.__version__, "flax": flax.__version__, "numpy": np.__version__}
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "threads": cores(),
        "versions": versions,
        **facts,
    }


def _calls(spec, call):
    """As many calls as a run is told to make, waiting for all of them."""

    def run():
        for _ in range(spec["calls"]):
            last = call()
        jax.block_until_ready(last)

    return run


def _currents(spec):
    keys = jax.random.split(jax.random.key(0))
    x, g = (jax.random.normal(key, (spec["T"], spec["N"])) for key in keys)
    return x * 1.5 + 0.6, g


def _neuron(spec):
    graphdef, params = nnx.split(neurons.PLIF())

    def forward_backward(x, g):
        spikes, backward = jax.vjp(lambda params, x: nnx.merge(graphdef, params)(x), params, x)
        return spikes, *backward(g)

    return _chained(spec, forward_backward, (params,)), _facts()


def _copy(spec):
    """The bytes that a neuron must move: x read, spikes written; x and gradient read, gradient written."""

    def copy(x, g):
        spikes, x = lax.optimization_barrier((x + 1, x))  # or x would be read once for both
        return spikes, x + g

    return _chained(spec, copy), _facts(bytes=5 * 4 * spec["T"] * spec["N"])


def _chained(spec, f, others=()):
    """As many calls of f as a run is told to make, (x, g) -> (spikes, *others, g), each with the g of the one before.

    In one program, so that a gradient is a value within it, as in a network, which a kernel may write over. On a GPU
    three passes over an array begin the loop of eight calls, alike for all: ratios are a point too near to 1.
    """
    x, g = _currents(spec)

    @jax.jit
    def calls(x, g):
        def call(_, found):  # behind the barrier, or what does not depend on g would leave the loop
            return f(*lax.optimization_barrier((x, found[-1])))

        return lax.fori_loop(0, spec["calls"], call, (jnp.zeros_like(x), *others, g))

    return lambda: jax.block_until_ready(calls(x, g))


def _matmul(spec):
    """The machine's rate for what the networks' time goes into."""
    n = spec["size"]
    a, b = (jax.random.normal(key, (n, n), DTYPES[spec["precision"]]) for key in jax.random.split(jax.random.key(0)))
    matmul = jax.jit(lambda a, b: a @ b)
    return _calls(spec, lambda: matmul(a, b)), _facts(flops=spec["calls"] * 2 * n**3)


def _config(spec, batch, **settings):
    names = ("dataset_name", "T", "channels", "number_layer")
    network = {name: spec["network"][key] for name, key in zip(names, ("name", *names[1:]), strict=True)}
    paper = {"use_plif": True, "use_max_pool": True, "detach_reset": True}
    return Config(**paper, **network, batch_size=batch, precision=spec["precision"], **settings)


def _samples(config, count):
    H, W, C = config.facts.shape
    rng = np.random.default_rng(0)
    shape, high = ((config.T, H, W, 2), 3) if config.facts.events else ((H, W, C), 256)
    return rng.integers(0, high, (count, *shape), np.uint8), rng.integers(0, config.facts.classes, count, np.int32)


def _step(spec, batch):
    """The step that `experiments/train.py` runs, augmentation and its check for finite gradients included.

    The compiled function, and what it takes: the state and the rest.
    """
    config = _config(spec, batch)
    devices = jax.local_devices()[:1]
    optimizer = state.adam(config, 1000)
    graphdef, now = state.create(config, optimizer, devices)
    train_steps = step.make_train(config, graphdef, optimizer, devices, None)
    x, y = (jax.device_put(array, state.replicated(devices)) for array in _samples(config, batch))
    index = np.broadcast_to(np.arange(batch, dtype=np.int32), (1, spec["calls"], batch))
    return train_steps, now, x, y, index, np.zeros(1, np.int32)


def _stepping(train_steps, now, *others):
    """A run that takes the step from the state that it reached."""

    def run():
        nonlocal now
        now, metrics = train_steps(now, *others)
        jax.block_until_ready((now, metrics))

    return run


def _train(spec):
    found = fitting(lambda batch: _stepping(*_step(spec, batch)), spec["batch"])
    return _per_sample(spec, found, training_operations(spec["network"]))


def _infer(spec):
    def make(batch):
        config = _config(spec, batch)
        net = state.network(config)
        net.eval()
        graphdef, weights = nnx.split(net)
        forward = jax.jit(lambda weights, x: nnx.merge(graphdef, weights)(x))
        x = step.frames_for(config, jnp.asarray(_samples(config, batch)[0]))
        return _calls(spec, lambda: forward(weights, x))

    return _per_sample(spec, fitting(make, spec["batch"]), 2 * multiply_adds(spec["network"]))


def _per_sample(spec, found, flops):
    """What a network's peer runs, and its facts."""
    run, batch, larger = found
    samples = spec["calls"] * batch
    return run, _facts(samples=samples, flops=flops * samples, batch=batch, larger=larger)


def _memory(spec):
    """Peak memory of a training step: what the compiled step's buffers take, all of them planned ahead.

    On a CPU the growth of the process beside it, for of PyTorch nothing else can be seen there.
    """
    before = peak_resident()
    train_steps, *arguments = _step(spec, spec["batch"])
    compiled = train_steps.lower(*arguments).compile()
    plan = compiled.memory_analysis()
    peak = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes - plan.alias_size_in_bytes
    if jax.default_backend() != "cpu":
        return lambda: None, _facts(peak_bytes=peak)
    return _stepping(compiled, *arguments), lambda: _facts(peak_bytes=peak_resident() - before, planned_bytes=peak)


def _frames(spec):
    events, T = recording(**spec["events"]), spec["T"]
    H, W = spec["events"]["height"], spec["events"]["width"]
    if spec["by"] == "tonic":
        import tonic

        to_frame = tonic.transforms.ToFrame(sensor_size=(W, H, 2), n_event_bins=T)
        versions = {"tonic": tonic.__version__}
    else:
        to_frame, versions = (lambda events: frames.integrate(events, H, W, T)), {}

    def run():
        for _ in range(spec["repeats"]):
            to_frame(events)

    facts = _facts()
    return run, facts | {"versions": facts["versions"] | versions}


def _epoch(spec):
    """An epoch as a user runs it or, `bare`, its compiled steps and evaluations with nothing between them."""
    from plif_jax import data
    from plif_jax.data import batches
    from plif_jax.training import loop, signals
    from plif_jax.training.checkpoint import Checkpoints

    ending = contextlib.ExitStack()
    config = _config(
        spec,
        16,
        log_dir_prefix=ending.enter_context(tempfile.TemporaryDirectory(prefix="plif_jax_bench_")),
        data_root=spec["data_root"],
        train_samples=spec["train_samples"],
        test_samples=spec["test_samples"],
        max_epoch=1000,
    )
    chosen = jax.local_devices()[:1]  # asked for all, `devices.choose` refuses a number that the batch cannot be cut in
    checkpoints = ending.enter_context(Checkpoints(config.checkpoint_dir, config, print))
    dataset = data.load(config, progress=False)
    parts = batches.partition(config, dataset)
    training = loop.Run(config, dataset, parts, chosen, checkpoints, signals.Stop(), print, True)
    facts = _facts(samples=training.steps_per_epoch * config.batch_size)
    epochs = iter(range(config.max_epoch))

    def as_run():
        epoch = next(epochs)
        figures = training.train_epoch(epoch)
        training.conclude(epoch, figures | {"test_accuracy": training.accuracy("test")})

    run = _bare(training) if spec["bare"] else as_run
    run.close = ending.close
    return run, facts


def _bare(training):
    """The epoch's compiled calls one after the other, their arguments made beforehand."""
    from plif_jax.data import batches
    from plif_jax.training import loop

    config, test = training.config, training.parts["test"]
    index_SB = batches.training_batches(config.seed, 0, training.parts["train"], config.batch_size)
    steps = list(training.feeds["train"].chunks(index_SB, training.call_sizes(0)))
    evaluate = training.evaluate_batches[training.feeds["test"].axis]
    evaluations = list(loop.evaluation_calls(config, training.feeds["test"], test, training.devices))
    now, asked = training.state, np.zeros(1, np.int32)

    def run():
        nonlocal now
        for arguments in steps:
            now, _ = training.train_steps(now, *arguments, asked)
        jax.block_until_ready([evaluate(now.params, now.batch_stats, *arguments) for arguments in evaluations])

    return run
