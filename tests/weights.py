"""Weights of small networks, and the authors' module tree that holds them."""

import sys

import numpy as np
import torch_files_writer as writer
from flax import nnx
from reference import cases

from plif_jax import networks
from plif_jax.interop import torch as torch_interop


def small(**settings):
    return networks.NMNISTNet(**{"T": 3, "channels": 3, "rngs": nnx.Rngs(0)} | settings)


def arrays_of(net, dtype=np.float32):
    shapes = {name: array.shape for name, array in torch_interop.state_dict(net).items()}
    arrays = cases.state_dict(shapes)
    return {name: array if array.dtype == np.int64 else np.asarray(array, dtype) for name, array in arrays.items()}


def authors_module(monkeypatch, arrays, pool="MaxPool2d", T=3, **neuron):
    """The authors' module tree for the weights of an N-MNIST network."""
    layers, clock = "torch.nn.modules", "spikingjelly.clock_driven"
    writer.foreign_modules(
        monkeypatch,
        {
            "models": ["NMNISTNet", "PLIFNode"],
            layers: ["Sequential", "Conv2d", "BatchNorm2d", "Linear", "Flatten", pool],
            f"{clock}.neuron": ["LIFNode"],
            f"{clock}.layer": ["Dropout"],
            f"{clock}.surrogate": ["ATan"],
        },
    )
    modules = {name: vars(sys.modules[name]) for name in ("models", layers, f"{clock}.neuron", f"{clock}.layer")}
    classes = {key: value for members in modules.values() for key, value in members.items()}
    atan = sys.modules[f"{clock}.surrogate"].ATan

    def spiking_function(x, alpha):  # which each instance keeps, so that the pickle names a class's member
        raise AssertionError("it is never called")

    spiking_function.__module__, spiking_function.__qualname__ = f"{clock}.surrogate", "ATan.spiking_function"
    atan.spiking_function = staticmethod(spiking_function)
    plif = any(name.endswith(".w") for name in arrays)

    def leaf(name, kind):
        own = [(key.rpartition(".")[2], writer.Tensor(a)) for key, a in arrays.items() if key.startswith(f"{name}.")]
        buffers = [(key, t) for key, t in own if key.startswith(("running", "num_batches"))]
        parameters = [(key, t) for key, t in own if (key, t) not in buffers]
        if kind == "neuron":
            settings = {"v_threshold": 1.0, "v_reset": 0.0, "detach_reset": False, "v": 0.0} | neuron
            children = [("surrogate_function", writer.module(atan, alpha=2.0, spiking=True, f=spiking_function))]
            if not plif:
                settings |= {"tau": 4.0}
            kind = classes["PLIFNode" if plif else "LIFNode"]
            return writer.module(kind, children, parameters, **settings)
        scratch = [("scratch", writer.Tensor(np.ones(2, np.float32)))] if buffers else []
        return writer.module(classes[kind], parameters=parameters, buffers=buffers + scratch, bias=None)

    kinds = {
        "conv": ["Conv2d", "BatchNorm2d", "neuron", pool] * 2,
        "fc": ["Flatten", "Dropout", "Linear", "neuron", "Dropout", "Linear", "neuron"],
    }
    parts = {
        part: writer.module(classes["Sequential"], [(str(i), leaf(f"{part}.{i}", k)) for i, k in enumerate(names)])
        for part, names in kinds.items()
    }
    return writer.module(classes["NMNISTNet"], parts.items(), T=T, init_tau=2.0)


def same(arrays, expected):
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)
