"""SpikingJelly 2's versions of the paper's networks (`activation_based.model.parametric_lif_net`).

They are other networks than those of the paper's program: linear layers have biases, nothing is static (an image is a
sequence of T equal frames, and batch norm sees every one), pooling is by maximum. As in the paper's Table 6, CIFAR-10
has a second dropout and CIFAR10-DVS a hidden layer of 512. They are told here by tables of their own, and keep
SpikingJelly's parameter names. As there, the neuron is the caller's choice: `spiking_neuron` makes one per spiking
layer, e.g. `lambda: PLIF(init_tau=2.0)`.
"""

from functools import partial

from plif_jax import networks
from plif_jax.networks import conv, dropout, flatten, norm, pool
from plif_jax.spiking_net import SpikingNet

linear = partial(networks.linear, use_bias=True)


class SpikingJellyNet(SpikingNet):
    """One sequence `conv_fc` over frames [T, B, H, W, C]; the networks below are its subclasses.

    Args:
      spiking_neuron: makes the neuron of a layer; called once for each.
      channels: width of every convolution; 128 where not given, 256 for CIFAR-10.
      rngs: source of the initial weights.
      T, dtype: as in `SpikingNet`; T only says how long an image is to be shown by the caller.
    """

    PARTS = ("static_conv", "conv_fc")
    shape: tuple[int, int, int]
    classes, width = 10, 128
    # Convolutions between poolings, and the width of the hidden layer.
    stages: tuple[int, ...]
    hidden: int

    def __init__(self, spiking_neuron, *, channels=None, T=8, dtype=None, rngs):
        channels = self.width if channels is None else channels

        def neuron(net, shape, rngs):
            return spiking_neuron(), shape

        blocks = []
        for convolutions in self.stages:
            blocks += [conv(channels), norm, neuron] * convolutions + [pool]
        classifier = [flatten, dropout, linear(self.hidden), neuron, dropout, linear(10 * self.classes), neuron]
        table = {"static_conv": [], "conv_fc": blocks + classifier}
        super().__init__(table, self.shape, self.classes, T=T, dtype=dtype, rngs=rngs)


class MNISTNet(SpikingJellyNet):
    """SpikingJelly's network for MNIST."""

    shape, stages, hidden = (28, 28, 1), (1, 1), 2048


class FashionMNISTNet(MNISTNet):
    """SpikingJelly's network for Fashion-MNIST."""


class NMNISTNet(SpikingJellyNet):
    """SpikingJelly's network for N-MNIST."""

    shape, stages, hidden = (34, 34, 2), (1, 1), 2048


class CIFAR10Net(SpikingJellyNet):
    """SpikingJelly's network for CIFAR-10."""

    shape, stages, hidden, width = (32, 32, 3), (3, 3), 2048, 256


class CIFAR10DVSNet(SpikingJellyNet):
    """SpikingJelly's network for CIFAR10-DVS."""

    shape, stages, hidden = (128, 128, 2), (1,) * 4, 512


class DVSGestureNet(SpikingJellyNet):
    """SpikingJelly's network for DVS128 Gesture."""

    shape, stages, hidden, classes = (128, 128, 2), (1,) * 5, 512, 11


NETWORKS = (MNISTNet, NMNISTNet, CIFAR10Net, CIFAR10DVSNet, DVSGestureNet)
