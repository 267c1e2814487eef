"""The GPU's kernels: run by Pallas' interpreter they give what the scan gives, and what does not fit is scanned."""

import itertools
import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plif_jax import networks, neuron_kernel, neurons, sequence, surrogate
from plif_jax.config import Config
from plif_jax.interop import export
from plif_jax.training import state, step


def currents(T, N, dtype=jnp.float32):
    x = jax.random.normal(jax.random.key(T), (T, N)) * 1.5 + 0.6
    return x.astype(dtype)


def run(neuron, x, v, last_bar, T=None):
    """Membranes, spikes and all gradients, of spikes alone or of the membranes too."""
    s_bar = jax.random.normal(jax.random.key(1), (T or len(x), *x.shape[1:])).astype(x.dtype)

    def unroll(neuron, v, x):
        v, s = neuron.unroll(v, x, T=T)
        return (v, s) if last_bar else s

    found, vjp = jax.vjp(unroll, neuron, v, x)
    neuron_bar, v_bar, x_bar = vjp((jnp.ones_like(found[0]), s_bar) if last_bar else s_bar)
    return found, jax.tree.leaves(neuron_bar), v_bar, x_bar


NEURONS = {
    "paper's": partial(neurons.PLIF),
    "soft reset, alpha learned": partial(
        neurons.PLIF, v_reset=None, detach_reset=False, surrogate=surrogate.ATan(learnable=True)
    ),
    "LIF": partial(neurons.LIF, tau=3.0, v_reset=-0.2, surrogate=surrogate.Sigmoid()),
    "IF": neurons.IF,
}


SEQUENCES = [(3, 700, False, False), (2, 5, True, True), (1, 1, True, False)]
# Every neuron over every sequence, and both in either type.
TYPED = [(*pair, (jnp.float32, jnp.bfloat16)[i % 2]) for i, pair in enumerate(itertools.product(NEURONS, SEQUENCES))]


@pytest.mark.parametrize("name, sequence_of, dtype", TYPED)
def test_a_kernel_gives_what_the_scan_gives(name, sequence_of, dtype, kernels):
    """700 neurons are two blocks, the second not full. Where the membrane has begun, the current stays."""
    T, N, begun, last_bar = sequence_of
    v = jax.random.normal(jax.random.key(2), (N,)) if begun else None
    arguments = NEURONS[name](), currents(1 if begun else T, N, dtype), v, last_bar, T
    found = run(*arguments)
    assert kernels and all(kernels)
    with sequence.scanned():
        expected = run(*arguments)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == jnp.float32 else {"rtol": 2e-2, "atol": 2e-2}

    def check(array, wanted):
        assert array.dtype == wanted.dtype
        np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (array, wanted)), **tolerance)

    jax.tree.map(check, found, expected)


def test_a_training_step_runs_on_kernels(kernels):
    """Also under `pmap`, which adds primitives of its own to what is traced."""
    config = Config(dataset_name="Digits", T=2, channels=4, number_layer=2, use_plif=True, batch_size=4)
    optimizer = state.adam(config, 10)
    devices = jax.local_devices()[:1]
    x = np.random.default_rng(0).integers(0, 3, (4, 2, *config.facts.shape), np.uint8)
    batch = x, np.arange(4, dtype=np.int32), np.arange(4, dtype=np.int32)[None, None], np.zeros(1, np.int32)

    def train():
        graphdef, now = state.create(config, optimizer, devices)
        return step.make_train(config, graphdef, optimizer, devices, None)(now, *batch)

    (now, metrics) = train()
    assert len(kernels) >= 2 * len(state.network(config).named_neurons()) and all(kernels)
    with sequence.scanned():
        (expected, expected_metrics) = train()
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-5)
    # Adam's first step is lr * sign(gradient), so the moments say more than the weights.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), now.opt_state, expected.opt_state)


def test_a_gradient_has_a_gradient_and_maps_over_samples(kernels):
    def found(unroll=neurons.Neuron.unroll):
        def loss(neuron, x):
            return (jnp.arange(1.0, 4)[:, None] * unroll(neuron, None, x)[1]).sum()

        def penalised(neuron, x):
            return jnp.square(jax.grad(loss, argnums=1)(neuron, x)).sum()

        return jax.vmap(jax.grad(penalised), (None, 1))(neurons.PLIF(), currents(3, 10).reshape(3, 2, 5)).w[...]

    interpreted = found()
    assert all(kernels) and kernels
    with sequence.scanned():
        np.testing.assert_allclose(interpreted, found(), rtol=1e-5)
        np.testing.assert_allclose(interpreted, found(neurons.Neuron.unroll_by_autodiff), rtol=1e-5)
    assert np.abs(interpreted).min() > 0


class Inhibited(neurons.Neuron):
    """Neurons that inhibit one another: no step of one alone."""

    def charge(self, v, x):
        return v + x - v.mean()


class OfEachItsOwn(neurons.Neuron):
    """A time constant for each neuron."""

    def __init__(self, N):
        super().__init__()
        self.w = nnx.Param(jnp.zeros(N))

    def charge(self, v, x):
        return v + (x - v) * jax.nn.sigmoid(self.w[...])


class InSmallSteps(neurons.Neuron):
    """A loop within a timestep."""

    def charge(self, v, x):
        return jax.lax.fori_loop(0, 4, lambda i, v: v + 0.25 * (x - v) / 2, v)


class ByItsShape(neurons.Neuron):
    def charge(self, v, x):
        return v + x / x.shape[-1]


class OfGivenConstants(neurons.Neuron):
    def charge(self, v, x):
        return v + x * np.linspace(0.5, 1, x.shape[-1], dtype=np.float32)


class Branching(neurons.PLIF):
    def charge(self, v, x):
        return jax.lax.cond(self.w[...] > 0, lambda: v + x, lambda: v + x / 2)


class RestingShort(neurons.IF):
    def rest(self, x):
        return jnp.zeros(x.shape[1:], jnp.bfloat16)


class Singular(neurons.PLIF):
    """Whose derivative for w is infinite at a current of 0."""

    def charge(self, v, x):
        return v + jnp.sqrt(jnp.square(self.w[...] + 1) * x)


def test_a_single_neuron_is_scanned(kernels):
    x, v = jnp.array([0.5, 3.0]), jnp.array(0.9)
    np.testing.assert_array_equal(neurons.PLIF().unroll(v, x)[1], [0, 1])
    assert kernels == [False]


def test_places_beyond_the_last_neuron_have_no_gradient(kernels):
    x = jnp.abs(currents(2, 10)) + 0.1
    w_bar = jax.grad(lambda neuron: neuron(x).sum())(Singular()).w[...]
    assert kernels and all(kernels) and np.isfinite(w_bar) and w_bar != 0


@pytest.mark.parametrize(
    "neuron, T, N, dtype, whether",
    [
        (neurons.PLIF(), 32, 7, jnp.float32, True),
        (neurons.PLIF(), 33, 7, jnp.float32, False),
        (neurons.PLIF(), 0, 7, jnp.float32, False),
        (neurons.PLIF(), 4, 0, jnp.float32, False),
        (neurons.PLIF(), 4, 7, jnp.float16, False),
        (neurons.PLIF(surrogate=surrogate.Erf()), 4, 7, jnp.float32, True),
        (neurons.PLIF(surrogate=surrogate.Erf(learnable=True)), 4, 7, jnp.float32, False),
        (Inhibited(), 4, 7, jnp.float32, False),
        (OfEachItsOwn(7), 4, 7, jnp.float32, False),
        (InSmallSteps(), 4, 7, jnp.float32, False),
        (ByItsShape(), 4, 7, jnp.float32, False),
        (OfGivenConstants(), 4, 7, jnp.float32, False),
        (Branching(), 4, 7, jnp.float32, False),
    ],
)
def test_what_does_not_fit_is_scanned(neuron, T, N, dtype, whether, kernels):
    x = currents(T, N, dtype)
    graphdef, params, other = nnx.split(neuron, neurons._floats, ...)
    assert neuron_kernel.fits(sequence._step(graphdef, other), len(x), params, None, x) is whether
    if not whether:
        np.testing.assert_array_equal(neuron(x), neuron.unroll_by_autodiff(None, x)[1])


@pytest.mark.parametrize("N, whether", [(2**31 - 2**9 - 1, True), (2**31 - 2**9, False)])
def test_places_of_a_timestep_are_counted_in_32_bits(N, whether):
    graphdef, params, other = nnx.split(neurons.PLIF(), neurons._floats, ...)

    def check(x):
        assert neuron_kernel.fits(sequence._step(graphdef, other), 4, params, None, x) is whether

    jax.eval_shape(check, jax.ShapeDtypeStruct((4, N), jnp.float32))


def test_a_membrane_that_rests_elsewhere_is_begun_there(kernels):
    class Restless(neurons.IF):
        def rest(self, x):
            return super().rest(x) + 0.9

    x = jnp.full((2, 3), 0.2)
    np.testing.assert_array_equal(Restless()(x), [[1, 1, 1], [0, 0, 0]])
    assert kernels == [True]
    RestingShort()(x.astype(jnp.bfloat16))
    assert kernels == [True, False]


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("kind", surrogate.Surrogate.__subclasses__())
def test_every_surrogate_fits_but_one(kind, learnable):
    """Triton has no erfc, of which the derivative of Erf for alpha is made."""
    neuron = neurons.PLIF(surrogate=kind(learnable=learnable))
    graphdef, params, other = nnx.split(neuron, neurons._floats, ...)
    whether = neuron_kernel.fits(sequence._step(graphdef, other), 4, params, None, currents(4, 7))
    assert whether is not (kind is surrogate.Erf and learnable)


def test_kernels_are_for_gpus_that_triton_knows(gpu):
    assert sequence.gpu_kernels() is neuron_kernel
    with sequence.scanned():
        assert sequence.gpu_kernels() is None
    for unknown in ("7.5", "gfx90a"):
        gpu.setattr(jax, "local_devices", lambda **_: [SimpleNamespace(compute_capability=unknown)])  # noqa: B023
        assert sequence.gpu_kernels() is None
    gpu.undo()
    assert jax.default_backend() != "cpu" or sequence.gpu_kernels() is None


def test_what_is_exported_holds_no_kernel(gpu):
    net = networks.NETWORKS["Digits"](channels=4, number_layer=2, rngs=nnx.Rngs(0))
    exported = export.to_exported(net, 1)  # for CUDA too
    assert "triton" not in exported.mlir_module()


class WithNumbers(neurons.PLIF):
    """Numbers computed from numbers."""

    def charge(self, v, x):
        return super().charge(v, x * jax.nn.sigmoid(0.3)) + jnp.square(jnp.float32(0.1))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("neuron", [neurons.PLIF(v_reset=None, detach_reset=False), WithNumbers()])
def test_kernels_lower_for_a_gpu(neuron, dtype, gpu):
    def both(neuron, x):
        s, vjp = jax.vjp(lambda neuron, x: neuron(x), neuron, x)
        return s, vjp(s)

    lowered = jax.jit(both).trace(neuron, currents(4, 1000, dtype)).lower(lowering_platforms=("cuda",))
    # Spikes and gradient; the membranes that nobody asks for are dropped sooner or later.
    assert lowered.as_text().count("custom_call @__gpu$xla.gpu.triton") in (2, 3)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_kernels_lower_under_shard_map_with_its_checks(gpu):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("batch",))
    P = jax.sharding.PartitionSpec

    def both(neuron, x):
        s, vjp = jax.vjp(lambda neuron, x: neuron(x), neuron, x)
        return s, jax.tree.map(lambda bar: jax.lax.psum(bar, "batch"), vjp(s)[0])

    mapped = jax.shard_map(both, mesh=mesh, in_specs=(P(), P(None, "batch")), out_specs=(P(None, "batch"), P()))
    lowered = jax.jit(mapped).trace(neurons.PLIF(), currents(4, 1000)).lower(lowering_platforms=("cuda",))
    assert "custom_call @__gpu$xla.gpu.triton" in lowered.as_text()


def test_a_jax_without_pallas_triton_scans(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "plif_jax.neuron_kernel", None)
    monkeypatch.delattr("plif_jax.neuron_kernel")
    assert sequence.gpu_kernels() is None


@pytest.mark.parametrize("capability, known", [("8.0", True), ("7.5", False)])
def test_kernels_are_for_an_a100_and_later(gpu, capability, known):
    gpu.setattr(jax, "local_devices", lambda **_: [SimpleNamespace(compute_capability=capability)])
    assert (sequence.gpu_kernels() is neuron_kernel) == known


class Charging(neurons.Neuron):
    def __init__(self, charge):
        super().__init__()
        self.charge = charge


UNFIT = {
    "a parameter of 16 bits": neurons.PLIF(param_dtype=jnp.bfloat16),
    "another shape": Charging(lambda v, x: v + jnp.maximum(x.reshape(1, -1), jnp.zeros((1, x.size))).reshape(-1)),
    "a number of the shape within a call": Charging(jax.jit(lambda v, x: v + x / x.shape[-1])),
    "arithmetic in float16": Charging(lambda v, x: v + (2 * x.astype(jnp.float16)).astype(v.dtype)),
    "the larger of whole numbers": Charging(lambda v, x: v + jnp.maximum(x.astype(jnp.int32), 0).astype(v.dtype)),
}


@pytest.mark.parametrize("neuron", UNFIT.values(), ids=UNFIT)
def test_what_a_kernel_would_compute_otherwise_or_not_at_all_is_scanned(neuron, kernels):
    x = currents(4, 7)
    graphdef, params, other = nnx.split(neuron, neurons._floats, ...)
    assert not neuron_kernel.fits(sequence._step(graphdef, other), 4, params, None, x)
    np.testing.assert_array_equal(neuron(x), neuron.unroll_by_autodiff(None, x)[1])
