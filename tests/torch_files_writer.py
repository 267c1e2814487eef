"""Writes files as torch.save does, without PyTorch: tensors and module trees, as the authors' checkpoints hold them."""

import io
import pickle
import sys
import types
import zipfile
from collections import OrderedDict

import numpy as np

STORAGES = {"f4": "FloatStorage", "f8": "DoubleStorage", "f2": "HalfStorage", "i8": "LongStorage"}


class _Storage:
    def __init__(self, array):
        self.array = array


class Tensor:
    """Pickles as a torch.Tensor does; `transposed` stores the numbers column by column, as a transposed view does."""

    def __init__(self, array, transposed=False):
        self.array, self.transposed = np.asarray(array), transposed

    def __reduce_ex__(self, protocol):
        flat = (self.array.T if self.transposed else self.array).ravel()
        strides = np.empty(self.array.shape, np.int8, order="F" if self.transposed else "C").strides
        return sys.modules["torch._utils"]._rebuild_tensor_v2, (
            _Storage(flat),
            0,
            self.array.shape,
            strides,
            False,
            OrderedDict(),
        )


class _Pickler(pickle.Pickler):
    def __init__(self, stream):
        super().__init__(stream, protocol=2)
        self.storages = {}

    def persistent_id(self, obj):
        if not isinstance(obj, _Storage):
            return None
        key = str(len(self.storages))
        self.storages[key] = obj.array
        kind = getattr(sys.modules["torch"], STORAGES[obj.array.dtype.str[1:]])
        return "storage", kind, key, "cuda:0", obj.array.size


def foreign_modules(monkeypatch, names):
    """Lets pickle find {module: names} as the file's author had them, so that it writes their names."""
    members = {"torch": STORAGES.values(), "torch._utils": ["_rebuild_tensor_v2"]} | names
    packages = {module.rpartition(".")[0] for module in members} - {""}
    packages |= {package.rpartition(".")[0] for package in packages} - {""}
    for module in sorted(packages | members.keys()):
        fake = types.ModuleType(module)
        for member in members.get(module, ()):
            setattr(fake, member, type(member, (), {"__module__": module}))
        monkeypatch.setitem(sys.modules, module, fake)


def save(path, obj, legacy=False):
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    pickler.dump(obj)
    if legacy:
        with path.open("wb") as file:
            for part in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}):
                pickle.dump(part, file, protocol=2)
            file.write(stream.getvalue())
            pickle.dump(sorted(pickler.storages), file, protocol=2)
            for key in sorted(pickler.storages):
                file.write(np.int64(pickler.storages[key].size).tobytes() + pickler.storages[key].tobytes())
        return
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", stream.getvalue())
        for key, array in pickler.storages.items():
            archive.writestr(f"archive/data/{key}", array.tobytes())
        archive.writestr("archive/version", "3\n")


def module(cls, children=(), parameters=(), buffers=(), **attributes):
    """A torch.nn.Module as pickle sees it: an instance with its members in dicts."""
    instance = cls()
    instance.__dict__.update(
        training=True,
        _parameters=OrderedDict(parameters),
        _buffers=OrderedDict(buffers),
        _non_persistent_buffers_set={"scratch"},
        _backward_hooks=OrderedDict(),
        _modules=OrderedDict(children),
        **attributes,
    )
    return instance
