"""Trained networks to and from NIR, the graph format that spiking simulators and chips share.

    nir.write("net.nir", nir_interop.to_nir(net))
    net = nir_interop.from_nir(nir.read("net.nir"))

NIR (Pedersen et al., 2024, Nature Communications 15:8122) states neurons as differential equations. A simulator with
the Euler step dt makes of its LIF

    h[t] = v[t-1] + dt / tau (v_leak - v[t-1] + r x[t])

which is the PLIF neuron's charge for tau = dt / k, r = 1, v_leak = v_reset; k = sigmoid(w), or 1 / tau here. The
simulator must run with the dt of the export, which the graph's metadata keeps beside T.

What becomes of the parts that NIR has no node for:

- Batch norm is folded into the convolution or linear layer before it; dropout is left out.
- The static part is in the graph like any other layer: show the image at each of T steps.
- Max pooling of spikes is "did any of the four fire", exactly: average pooling and a neuron with v_reset = 0 that any
  single spike fires. Its membrane is 0 after every step, so it remembers nothing.
- The vote is a last linear node that averages each class's neurons: the graph's outputs are votes [B, classes] per
  timestep, their mean over T the firing rates.
- NIR cannot say: soft reset, max pooling of values that are not spikes, batch norm after anything else, and what custom
  layers do in a `__call__` of their own, which are refused; and surrogate functions, which parameters are shared
  or learned (PLIF comes back as LIF), and whether a membrane exactly at the threshold fires (here it does; NIR's text
  says above), which the graph does not hold.

Feature maps are channels-first in NIR, and flattened so.
"""

from plif_jax.errors import UserError

try:
    import nir  # noqa: F401
except ImportError as error:
    raise UserError("NIR exchange needs the package nir: pip install nir") from error

from plif_jax.interop.nir_export import to_nir
from plif_jax.interop.nir_import import from_nir

__all__ = ["from_nir", "to_nir"]
