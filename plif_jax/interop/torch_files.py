"""Files of PyTorch: state dicts, whole-object checkpoints, and NumPy's `.npz` beside them.

Reading needs no PyTorch and runs nothing that a file names (see `inert_pickle`); writing `.pt` needs it.
"""

import io
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from plif_jax import files
from plif_jax.errors import UserError
from plif_jax.interop.inert_pickle import LONGEST_TEXT, Object, Tensor, is_text, load

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
NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
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
    """Weights from a `.npz`, or from a `.pt` holding a state dict, a module, or a dict with either.

    In a dict it is what the first of `NETWORK_KEYS` names that is there.

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
    arrays, left = {}, _most(content)
    try:
        tensors, module = _network(path, root)
        for name, tensor in tensors:
            arrays[name] = _array(path, name, tensor, storages)
            left -= len(name) + arrays[name].nbytes
            if left < 0:
                raise _too_large(path, content)
    except RecursionError:
        raise _damaged(path, "its modules are nested without end") from None
    return Checkpoint(arrays, module)


def write(path, arrays):
    """Writes {name: NumPy array} as `.npz`, or as a PyTorch state dict, `.pt`, which needs PyTorch.

    Raises:
      UserError: another suffix, `.pt` without PyTorch, or a path that cannot be written.
    """
    path = Path(path)
    # Neither form knows NumPy's bfloat16, an extension; float32 holds it whole.
    arrays = {name: array.astype(np.float32) if array.dtype.kind == "V" else array for name, array in arrays.items()}
    if path.suffix == ".npz":
        save = partial(np.savez, **arrays)
    elif path.suffix in (".pt", ".pth"):
        try:
            import torch
        except ImportError:
            raise UserError(f"writing {path} needs PyTorch: pip install torch, or write a .npz") from None
        save = partial(torch.save, {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})
    else:
        raise UserError(f"{path} ends in {path.suffix or 'nothing'}; weights are written as .npz or .pt")
    try:
        content = io.BytesIO()
        save(content)
        files.write(path, content.getvalue())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def _damaged(path, what):
    return UserError(f"{path} is damaged: {what}; fetch or save the file again")


def _most(content):
    """Bytes that a file's arrays may take: more than its own, since tensors share numbers and `.npz` compresses."""
    return 4 * len(content) + (16 << 20)


def _too_large(path, content):
    return UserError(f"{path} claims arrays of more than {_most(content)} bytes, too many for its size; save it again")


def _unzip(path, content, methods) -> Iterator[tuple[str, bytes]]:
    """Yields (name, bytes) of an archive; what its directory claims is held against its size before."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
        entries = archive.infolist()
    except Exception:  # zipfile fails in many ways on damaged bytes
        raise _damaged(path, "it is not a whole archive") from None
    if any(entry.compress_type not in methods for entry in entries):
        raise UserError(
            f"{path} is compressed as its writers never do; give the file as torch.save or np.savez wrote it"
        )
    # Entries may claim the same bytes.
    if sum(max(entry.file_size, entry.compress_size) for entry in entries) > _most(content):
        raise _too_large(path, content)
    for entry in entries:
        try:
            with archive.open(entry) as file:
                # Without a size it would inflate what is there, not what was claimed.
                data = file.read(entry.file_size + 1)
        except Exception:
            raise _damaged(path, "it is not a whole archive") from None
        yield entry.filename, data


def _read_npz(path, content):
    # NumPy writes no other kinds of compression, and these two can be read up to a size.
    entries = _unzip(path, content, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    return {name.removesuffix(".npy"): _read_npy(path, name, data) for name, data in entries}


def _read_npy(path, name, data):
    """One array, of the size that its header says before anything is allocated."""
    stream = io.BytesIO(data)
    try:
        shape, _, dtype = NPY_HEADERS[np.lib.format.read_magic(stream)](stream)
        size = math.prod(shape) * dtype.itemsize
        if not is_text(name) or size != len(data) - stream.tell():
            raise ValueError
        if dtype.kind not in "biuf":
            raise UserError(f"{path} holds {name} of type {dtype}; of weights all are numbers")
        stream.seek(0)
        return np.lib.format.read_array(stream, allow_pickle=False)
    except UserError:
        raise
    except Exception:  # NumPy fails in many ways on damaged bytes
        raise _damaged(path, "not an archive of plain arrays") from None


def _read_zip(path, content):
    """Root object and {key: bytes} of a file as PyTorch writes since 1.6."""
    # PyTorch never compresses; refusing to inflate bounds what a pickle can ask of memory by the file's size.
    files = _unzip(path, content, (zipfile.ZIP_STORED,))
    entries = {name.partition("/")[2]: data for name, data in files}
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
        if size != known[key].size or size > len(content):
            raise _damaged(path, f"storage {key} has another length than its tensors say")
        storages[key] = stream.read(size * _dtype(path, known[key]).itemsize)
    return root, storages


def _dtype(path, storage):
    if storage.kind not in DTYPES:
        raise UserError(f"{path} holds a {storage.kind}; known are {', '.join(DTYPES)}")
    return DTYPES[storage.kind]


def _network(path, root):
    """(the (name, Tensor) pairs, module or None) of the network in a file's root object."""
    if type(root) is Object and "_modules" in root.attributes:
        return _walk(path, root, "", set()), root
    if type(root) is dict and root and all(is_text(name) and type(value) is Tensor for name, value in root.items()):
        return root.items(), None
    if type(root) is dict:
        for key in NETWORK_KEYS:
            if key in root:
                return _network(path, root[key])
    raise UserError(
        f"{path} holds no network: a state dict, a module, or a dict with one under {', '.join(NETWORK_KEYS)} is needed"
    )


def _walk(path, module, prefix, seen):
    """Yields (name, Tensor) as `state_dict` would.

    `seen` ends what only a damaged file has: cycles, and dicts of members that modules share.
    """
    if type(module) is not Object or id(module) in seen:
        return
    seen.add(id(module))
    skipped = module.attributes.get("_non_persistent_buffers_set")
    for group in ("_parameters", "_buffers", "_modules"):
        members = module.attributes.get(group)
        if type(members) is not dict or id(members) in seen:
            continue
        seen.add(id(members))
        for name, member in members.items():
            if not is_text(name) or len(prefix) + len(name) > LONGEST_TEXT:
                raise _damaged(path, "a module in it has members without a proper name")
            if group == "_modules":
                yield from _walk(path, member, f"{prefix}{name}.", seen)
            elif type(member) is Tensor and not (type(skipped) is frozenset and name in skipped):
                yield f"{prefix}{name}", member


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
        # Beside a zero the other sizes may be anything.
        if math.prod(n or 1 for n in tensor.shape) >= 1 << 48:
            raise _damaged(path, f"{name} has an impossible shape")
        return np.zeros(tensor.shape, dtype)
    flat = np.frombuffer(data, dtype)[tensor.offset :]
    # The stride along a single number may be anything too.
    strides = [stride * dtype.itemsize * (n > 1) for n, stride in zip(tensor.shape, tensor.strides, strict=True)]
    return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides).copy()
