"""Four virtual CPU devices, a cache each of compiled programs, bytecode and prepared data, before JAX is imported.

Warnings of our own code are errors, and so is rank promotion.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
from functools import partial
from types import SimpleNamespace

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling is most of the tests' time; see `optimized`
os.environ.setdefault("NPROC", "16")  # several virtual devices on few cores deadlock with as few threads
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        # What wrote elementwise loops before compiles in a third of the time; later XLA has it no more.
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# The workers of pytest-xdist and the programs that tests start find the caches of who set them up: they compile once,
# and record the digits once. Where Python is told to keep no bytecode, each would import for 12 seconds in place of 4.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["PLIF_JAX_CACHE"] = tempfile.mkdtemp(prefix="plif_jax_tests_")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(os.environ["PLIF_JAX_CACHE"], "compiled")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
        sys.dont_write_bytecode = False
        sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = os.path.join(os.environ["PLIF_JAX_CACHE"], "bytecode")

import jax
import pytest
from jax.experimental import pallas as pl

from plif_jax import neuron_kernel, neurons, sequence
from plif_jax.config import Config

pytest.register_assert_rewrite("damage", "image_sets", "nir_graphs", "runs", "weights")

# Shapes that differ in their number of axes are a mistake more often than a wish.
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption("--first-cases", action="store_true", help="of each parametrised test the first case alone")


def pytest_collection_modifyitems(config, items):
    if config.getoption("first_cases"):
        first = {item.nodeid.split("[")[0]: item for item in reversed(items)}
        items[:] = reversed(first.values())


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", r"error:::plif_jax(\.|$)")
    config.addinivalue_line("markers", "faults: takes minutes; left out unless asked for, by `make test-faults`")


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["PLIF_JAX_CACHE"], ignore_errors=True)


@pytest.fixture
def x64():
    """Runs a test in float64, in which results are compared to 1e-9."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def back_to_float32():
    """A run in float64 switches the whole process; no test leaves that to the next."""
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(scope="module")
def optimized():
    """Compiled as for users: for tests of the last bit, which is the compiler's, and for those that run long."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()  # what was compiled otherwise
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


@pytest.fixture
def rolled(monkeypatch):
    """Many unrolled timesteps compile slowly, and give the same numbers."""
    monkeypatch.setattr(sequence, "MAX_UNROLL", 1)
    monkeypatch.setattr(sequence, "MAX_UNROLL_FORWARD", 1)


@pytest.fixture(scope="session")
def settings():
    """A run of seconds: two channels, 40 digits."""
    return partial(
        Config,
        dataset_name="Digits",
        use_plif=True,
        use_max_pool=True,
        detach_reset=True,
        T=3,
        channels=2,
        number_layer=1,
        batch_size=8,
        train_samples=40,
        test_samples=20,
        max_epoch=2,
        device="cpu:0",
    )


@pytest.fixture(scope="session")
def whole(settings, tmp_path_factory):
    """An uninterrupted run: (config, result). Its tests are the group "training", of one worker."""
    from plif_jax.training import loop  # which imports much, for other tests for nothing

    config = settings(log_dir_prefix=str(tmp_path_factory.mktemp("whole")))
    return config, loop.train(config, say=lambda line: None)


@pytest.fixture
def kernels(monkeypatch):
    """Neurons take the kernels on this machine too, interpreted; the results of `fits` are listed."""
    jax.clear_caches()  # what was traced without them
    fitted = []

    def fits(*arguments):
        fitted.append(whether(*arguments))
        return fitted[-1]

    whether = neuron_kernel.fits
    monkeypatch.setattr(neuron_kernel, "fits", fits)
    monkeypatch.setattr(neuron_kernel.pl, "pallas_call", partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr(neurons, "gpu_kernels", lambda: None if sequence._scanning.get() else neuron_kernel)
    monkeypatch.setattr(
        sequence.lax, "platform_dependent", lambda *args, **ways: ways.get("cuda", ways["default"])(*args)
    )
    yield fitted
    jax.clear_caches()  # what was traced with them


@pytest.fixture
def gpu(monkeypatch):
    """JAX believes that it has an H100, for which it can lower what it cannot run."""
    jax.clear_caches()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda **_: [SimpleNamespace(compute_capability="9.0")])
    if importlib.util.find_spec("jax._src.pallas.triton.gpu_info"):
        info = importlib.import_module("jax._src.pallas.triton.gpu_info")
        monkeypatch.setattr(info, "get_gpu_info", lambda: SimpleNamespace(compute_capability=90))
    yield monkeypatch
    jax.clear_caches()
