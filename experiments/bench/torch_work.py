"""SpikingJelly 2's side: the same neuron, networks, steps and frames in PyTorch.

The networks are the paper's as `plif_jax.networks` has them, so the static part runs once per image, not T times as
in SpikingJelly's own model zoo: the stronger peer.
"""

import gc
from importlib import metadata

import numpy as np
import torch
from spikingjelly.activation_based import functional, layer, neuron, precision, surrogate
from torch import nn

from bench.fitting import fitting
from bench.machine import peak_resident
from bench.recordings import recording

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# As JAX does unless told otherwise; no effect on a CPU.
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
torch.backends.cudnn.benchmark = True  # shapes are fixed, and XLA times kernels too


def build(spec):
    """(run, facts) of a spec."""
    if spec["gpu"] and DEVICE.type != "cuda" and spec["kind"] != "frames":  # which no GPU makes
        raise RuntimeError("PyTorch finds no GPU, JAX has one")
    return {"neuron": _neuron, "train": _network, "infer": _network, "memory": _memory, "frames": _frames}[
        spec["kind"]
    ](spec)


def _calls(spec, call):
    """As many calls as a run is told to make, waiting for all of them."""

    def run():
        for _ in range(spec["calls"]):
            call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return run


def _facts(**facts):
    versions = {name: metadata.version(name) for name in ("torch", "spikingjelly")}
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    return {"device": device, "threads": torch.get_num_threads(), "versions": versions, **facts}


def _plif(mode):
    return neuron.ParametricLIFNode(
        init_tau=2.0, detach_reset=True, surrogate_function=surrogate.ATan(), step_mode=mode
    )


def _neuron(spec):
    shape = (spec["T"], spec["N"])
    x = (torch.randn(shape, device=DEVICE) * 1.5 + 0.6).requires_grad_()
    g = torch.randn(shape, device=DEVICE)
    plif = _plif("m").to(DEVICE)

    def call():
        functional.reset_net(plif)
        x.grad = plif.w.grad = None
        plif(x).backward(g)

    return _calls(spec, call), _facts()


class Network(nn.Module):
    """The paper's network for a data set: [N, C, H, W] or [T, N, C, H, W] to firing rates [N, classes]."""

    def __init__(self, name, shape, classes, T, channels, number_layer, mode):
        super().__init__()
        (H, W, C), self.classes, self.T, self.mode = shape, classes, T, mode
        width = channels or (256 if name == "CIFAR10" else 128)
        still = channels is None

        def conv(C_in):
            return [layer.Conv2d(C_in, width, 3, padding=1, bias=False), layer.BatchNorm2d(width)]

        pool = [layer.MaxPool2d(2, 2)]
        if name == "CIFAR10":
            body = [_plif(mode)]
            for i in range(1, 6):
                body += [*conv(width), _plif(mode), *(pool if i in (2, 5) else [])]
            halvings = 2
        elif still:
            body = [_plif(mode), *pool, *conv(width), _plif(mode), *pool]
            halvings = 2
        else:
            body, halvings = [], number_layer
            for i in range(number_layer):
                body += [*conv(width if i else C), _plif(mode), *pool]
        n_in = width * (H >> halvings) * (W >> halvings)
        hidden = 2048 if still else n_in // 4
        head = [layer.Flatten(), layer.Dropout(0.5), layer.Linear(n_in, hidden, bias=False), _plif(mode)]
        head += [] if name == "CIFAR10" else [layer.Dropout(0.5)]
        head += [layer.Linear(hidden, 10 * classes, bias=False), _plif(mode)]
        self.still = nn.Sequential(nn.Conv2d(C, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.still = self.still if still else None
        self.body = nn.Sequential(*body, *head)
        functional.set_step_mode(self.body, mode)

    def forward(self, x):
        """Multi-step: all T at once, layer by layer; single-step: the whole network once per timestep."""
        functional.reset_net(self.body)
        if self.still is not None:
            x = self.still(x)
            x = x.unsqueeze(0).expand(self.T, *x.shape)
        spikes = self.body(x).mean(0) if self.mode == "m" else sum(self.body(x_t) for x_t in x) / self.T
        return spikes.view(spikes.shape[0], self.classes, -1).mean(-1)


def _step(spec, batch):
    """One training step, or one forward pass, of a network on a batch of noise."""
    net = Network(**spec["network"], mode=spec["mode"]).to(DEVICE)
    H, W, C = spec["network"]["shape"]
    shape = (batch, C, H, W) if net.still is not None else (net.T, batch, C, H, W)
    x = torch.randn(shape).to(DEVICE)
    target = nn.functional.one_hot(torch.arange(batch) % net.classes, net.classes).float().to(DEVICE)
    net, autocast = _in_precision(net, spec)
    if spec["kind"] == "infer":
        net.eval()

        def forward():
            with torch.no_grad(), autocast:
                net(x)

        return _calls(spec, forward)
    # "fused" updates all parameters in one kernel: the fastest Adam that PyTorch has.
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            loss = nn.functional.mse_loss(net(x).float(), target)
        loss.backward()
        optimizer.step()

    return _calls(spec, step)


def _in_precision(net, spec):
    """The network, and the context that it runs in.

    On a GPU SpikingJelly's kernels refuse what autocast makes, and a loop over timesteps takes their place: it has a
    way of its own to have them in bfloat16, multi-step.
    """
    if spec["precision"] == "bfloat16" and spec["mode"] == "m" and DEVICE.type == "cuda":
        wanted = precision.PrecisionConfig(mode="bf16", neuron_storage="bf16")
        prepared = precision.prepare_model_for_precision(net, DEVICE, wanted)
        return prepared.model, prepared.autocast_context()
    return net, torch.autocast(DEVICE.type, torch.bfloat16, enabled=spec["precision"] == "bfloat16")


def _network(spec):
    def make(batch):
        gc.collect()
        torch.cuda.empty_cache()  # of the trial before
        return _step(spec, batch)

    run, batch, larger = fitting(make, spec["batch"])
    return run, _facts(samples=spec["calls"] * batch, batch=batch, larger=larger)


def _memory(spec):
    """Peak memory of a training step; on a CPU the growth of the process, which is what PyTorch lets one see."""
    before = peak_resident()
    run = _step(spec | {"kind": "train"}, spec["batch"])
    if DEVICE.type == "cuda":
        run()
        torch.cuda.reset_peak_memory_stats()  # cuDNN has tried its algorithms, also those that take much

    def facts():
        if DEVICE.type == "cuda":
            return _facts(peak_bytes=torch.cuda.max_memory_allocated())
        return _facts(peak_bytes=peak_resident() - before)

    return run, facts


def _frames(spec):
    from spikingjelly.datasets import utils  # which brings torchvision

    events = recording(**spec["events"])
    columns = {name: np.ascontiguousarray(events[name]) for name in ("t", "x", "y", "p")}
    H, W, T = spec["events"]["height"], spec["events"]["width"], spec["T"]

    def run():
        for _ in range(spec["repeats"]):
            utils.integrate_events_by_fixed_frames_number(columns, "number", T, H, W)

    return run, _facts()
