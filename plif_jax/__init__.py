"""Spiking networks with learnable membrane time constants, after Fang et al., ICCV 2021."""

import importlib

__version__ = "0.1.0"
_MODULES = ("surrogate", "neurons", "layers", "networks")


def __getattr__(name):
    """The modules that notebooks begin with, imported when first named."""
    if name in _MODULES:
        return importlib.import_module(f"plif_jax.{name}")
    raise AttributeError(f"module 'plif_jax' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_MODULES})
