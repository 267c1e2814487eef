"""Spiking networks with learnable membrane time constants, after Fang et al., ICCV 2021."""

__version__ = "0.1.0"
