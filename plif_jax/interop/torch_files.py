"""Files of PyTorch: state dicts, whole-object checkpoints, and NumPy's `.npz` beside them.

Reading needs no PyTorch and runs nothing that a file names (see `inert_pickle`); writing `.pt` needs it.
"""

import io
import math
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from plif_jax.errors import UserError
from plif_jax.interop.inert_pickle import Object, Tensor, load

DTYPES = {
    "FloatStorage": np.dtype("f4"),
    "DoubleStorage": np.dtype("f8"),
    "HalfStorage": np.dtype("f2"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("i8"),
    "IntStorage": np.dtype("i4"),
    "ShortStorage": np.dtype("i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
# A file from before PyTorch 1.6 (or written in that form) opens with the pickle of 0x1950A86A20F9469CFC6C.
LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# Where a checkpoint keeps its network: the paper's program, then common habits.
NETWORK_KEYS = ("net", "model", "state_dict", "model_state_dict")


@dataclass
class Checkpoint:
    """What a file holds: weights by name, and the module tree where whole objects were saved.

    Attributes:
      arrays: {parameter or buffer name: NumPy array}.
      module: the root module as an inert object; None for a plain state dict.
    """

    arrays: dict[str, np.ndarray]
    module: Object | None = field(default=None, repr=False)


def read(path):
    """Weights from a `.npz`, or from a `.pt` holding a state dict, a module, or a dict with either under "net".

    Raises:
      UserError: no such file; the file is damaged, holds no network, or could only be read by running it.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if path.suffix == ".npz":
        return Checkpoint(_read_npz(path, content))
    root, storages = (_read_zip if content.startswith(b"PK") else _read_legacy)(path, content)
    try:
        tensors, module = _network(path, root)
    except RecursionError:
        raise _damaged(path, "its modules are nested without end") from None
    return Checkpoint({name: _array(path, name, tensor, storages) for name, tensor in tensors.items()}, module)


def write(path, arrays):
    """Writes {name: NumPy array} as `.npz`, or as a PyTorch state dict, `.pt`, which needs PyTorch.

    Raises:
      UserError: another suffix, or `.pt` without PyTorch.
    """
    path = Path(path)
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix in (".pt", ".pth"):
        try:
            import torch
        except ImportError:
            raise UserError(f'writing {path} needs PyTorch: pip install "plif_jax[torch]", or write a .npz') from None
        torch.save({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}, path)
    else:
        raise UserError(f"{path} ends in {path.suffix or 'nothing'}; weights are written as .npz or .pt")


def _damaged(path, what):
    return UserError(f"{path} is damaged: {what}; fetch or save the file again")


def _read_npz(path, content):
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            return dict(archive)
    except Exception:  # zipfile and NumPy fail in many ways on damaged bytes
        raise _damaged(path, "not an archive of plain arrays") from None


def _read_zip(path, content):
    """Root object and {key: bytes} of a file as PyTorch writes since 1.6."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
        # PyTorch never compresses; refusing to inflate bounds what a file can ask of memory by its own size.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise UserError(f"{path} is a compressed archive, which PyTorch does not write; give the .pt file itself")
        entries = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, NotImplementedError, EOFError):
        raise _damaged(path, "its archive is incomplete") from None
    if "data.pkl" not in entries:
        raise UserError(f"{path} is not a file of torch.save: its archive has no data.pkl")
    if entries.get("byteorder", b"little") != b"little":
        raise UserError(f"{path} was written on a big-endian machine; save it again on a usual one")
    root, _ = load(io.BytesIO(entries["data.pkl"]), path)
    return root, {name.removeprefix("data/"): data for name, data in entries.items() if name.startswith("data/")}


def _read_legacy(path, content):
    """The same of the older form: five pickles, then each storage as its length and its numbers."""
    stream = io.BytesIO(content)
    if not content.startswith(LEGACY_START):
        raise UserError(f"{path} is neither a .npz nor a file of torch.save")
    _magic, _protocol, system, root, keys = (load(stream, path) for _ in range(5))
    if type(system[0]) is not dict or system[0].get("little_endian") is not True:
        raise UserError(f"{path} was written on a big-endian machine; save it again on a usual one")
    root, known = root
    if type(keys[0]) is not list or any(type(key) is not str or key not in known for key in keys[0]):
        raise _damaged(path, "its list of storages is not that of its tensors")
    storages = {}
    for key in keys[0]:
        size = int.from_bytes(stream.read(8), "little")
        if size != known[key].size:
            raise _damaged(path, f"storage {key} has another length than its tensors say")
        storages[key] = stream.read(size * _dtype(path, known[key]).itemsize)
    return root, storages


def _dtype(path, storage):
    if storage.kind not in DTYPES:
        raise UserError(f"{path} holds a {storage.kind}; known are {', '.join(DTYPES)}")
    return DTYPES[storage.kind]


def _network(path, root):
    """({name: Tensor}, module or None) of the network in a file's root object."""
    if type(root) is Object and "_modules" in root.attributes:
        return dict(_walk(root, "", set())), root
    if type(root) is dict and root and all(type(value) is Tensor for value in root.values()):
        return {str(name): tensor for name, tensor in root.items()}, None
    if type(root) is dict:
        for key in NETWORK_KEYS:
            if key in root:
                return _network(path, root[key])
    raise UserError(f'{path} holds no network: a state dict, a module, or a dict with one under "net" is needed')


def _walk(module, prefix, seen):
    """Yields (name, Tensor) as `state_dict` would; `seen` ends cycles, which only a damaged file has."""
    if type(module) is not Object or id(module) in seen:
        return
    seen.add(id(module))
    skipped = module.attributes.get("_non_persistent_buffers_set", ())
    for group in ("_parameters", "_buffers"):
        for name, tensor in _dict(module, group).items():
            if type(tensor) is Tensor and name not in skipped:
                yield f"{prefix}{name}", tensor
    for name, child in _dict(module, "_modules").items():
        yield from _walk(child, f"{prefix}{name}.", seen)


def _dict(module, group):
    value = module.attributes.get(group)
    return value if type(value) is dict else {}


def _array(path, name, tensor, storages):
    """The tensor's numbers; every index is checked to lie inside its storage."""
    dtype = _dtype(path, tensor.storage)
    data = storages.get(tensor.storage.key, b"")
    if len(data) != tensor.storage.size * dtype.itemsize:
        raise _damaged(path, f"the numbers of {name} are missing or cut short")
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    size = math.prod(tensor.shape)
    if size > tensor.storage.size or (size and last >= tensor.storage.size):
        raise _damaged(path, f"{name} reaches past its numbers")
    if not size:
        return np.zeros(tensor.shape, dtype)
    flat = np.frombuffer(data, dtype)[tensor.offset :]
    strides = [stride * dtype.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides).copy()
