"""Four virtual CPU devices, set up before anything imports JAX; warnings of our own code are errors."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "16")  # several virtual devices on few cores deadlock with as few threads
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import jax
import pytest

from plif_jax import neurons


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", r"error:::plif_jax(\.|$)")
    config.addinivalue_line("markers", "faults: takes minutes; left out unless asked for, by `make test-faults`")


@pytest.fixture
def x64():
    """Runs a test in float64, in which results are compared to 1e-9."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def rolled(monkeypatch):
    """Many unrolled timesteps compile slowly, and give the same numbers."""
    monkeypatch.setattr(neurons, "MAX_UNROLL", 1)
