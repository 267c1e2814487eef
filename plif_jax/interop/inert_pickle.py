"""Reads the pickles in PyTorch's files without running them.

Unpickling calls whatever the file names, so a file from elsewhere can do anything. Here the opcodes are interpreted
by a stack machine that calls nothing: a class or function that the file names becomes a `Name`, an instance an
`Object` holding a dict of attributes, a tensor a `Tensor` saying where its numbers lie. Only the calls in `CALLS`
have a meaning; a file that asks for another is refused.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from plif_jax.errors import UserError


@dataclass(frozen=True)
class Name:
    """A class or function as the file names it; never imported."""

    module: str
    name: str

    def __str__(self):
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Object:
    """An instance of a class that is not imported: the class's name and the instance's attributes."""

    cls: Name
    attributes: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Storage:
    """A run of `size` numbers of type `kind` (such as "FloatStorage"), under `key` in the file."""

    kind: str
    key: str
    size: int


@dataclass(eq=False)
class Tensor:
    """A strided view into a storage, in numbers, not bytes; compares by identity, since optimisers key dicts by it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Refused(ValueError):
    """The pickle is damaged, or asks for something that is neither data nor a known call."""


def _tensor(storage, offset, shape, strides, *_):
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or not all(type(n) is int and n >= 0 for n in numbers):
        raise Refused("a tensor whose shape is damaged")
    if len(shape) != len(strides):
        raise Refused("a tensor whose shape is damaged")
    return Tensor(storage, offset, tuple(shape), tuple(strides))


def _parameter(data, *_):
    return data


def _mapping(pairs=()):
    _check_keys(key for key, _ in pairs)
    return dict(pairs)


def _check_keys(keys):
    """Only simple keys: hashing a tuple nested by a hostile file can take forever."""
    for key in keys:
        if type(key) not in (str, int, float, bool, type(None), Name, Tensor):
            raise Refused(f"a key that is a {type(key).__name__}")


# All that a pickle may call: what each call means here.
CALLS: dict[str, Callable] = {
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": lambda *_: {},
    "__builtin__.set": list,
    "builtins.set": list,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": tuple,
}
# Plain facts that are spelt as calls; kept as inert objects.
FACTS = (
    "torch.device",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "_codecs.encode",
)


class _Mark:
    pass


class _Machine:
    """The state of one pickle being read: a stack, a memo, and one method per group of opcodes."""

    def __init__(self, storages):
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages = storages

    def pop_to_mark(self):
        """What was pushed since the last mark; drops the mark."""
        items = []
        while (item := self.stack.pop()) is not _Mark:
            items.append(item)
        return items[::-1]

    def run(self, stream):
        """Reads opcodes to the STOP; returns the object."""
        for opcode, argument, _ in pickletools.genops(stream):
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in _PUSHES:
                self.stack.append(argument)
            elif name in _BUILDS:
                _BUILDS[name](self, argument)
            elif name not in ("PROTO", "FRAME"):
                raise Refused(f"the instruction {name}")
        raise Refused("no end")

    def put(self, argument):
        self.memo[argument] = self.stack[-1]

    def memoize(self, _):
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, argument):
        self.stack.append(self.memo[argument])

    def tuple_of(self, count):
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        self.stack.append(tuple(items))

    def set_items(self, keys_and_values):
        target = self.stack[-1]
        if type(target) is not dict:
            raise Refused(f"items set in {_describe(target)}")
        _check_keys(keys_and_values[::2])
        target.update(zip(keys_and_values[::2], keys_and_values[1::2], strict=True))

    def append(self, items):
        target = self.stack[-1]
        if type(target) is not list:
            raise Refused(f"items appended to {_describe(target)}")
        target.extend(items)

    def call(self, _):
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(arguments) is not tuple or type(function) is not Name:
            raise Refused(f"a call of {_describe(function)}")
        if str(function) in CALLS:
            self.stack.append(CALLS[str(function)](*arguments))
        elif str(function) in FACTS:
            self.stack.append(Object(function, {"arguments": arguments}))
        else:
            raise Refused(f"a call of {function}")

    def new_object(self, _):
        _, cls = self.stack.pop(), self.stack.pop()
        if type(cls) is not Name:
            raise Refused(f"an instance of {_describe(cls)}")
        self.stack.append(Object(cls))

    def build(self, _):
        """The attributes of the object below; those of a mapping are of no use here."""
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Object and type(state) is dict:
            target.attributes.update(state)
        elif type(target) is Object and str(target.cls) in FACTS:
            pass
        elif type(target) is not dict:
            raise Refused(f"a state of {_describe(target)}")

    def persistent(self, _):
        """Storages; in old files also the source of each class, of which only the name is kept."""
        kind, *rest = self.stack.pop()
        if kind == "module":
            self.stack.append(rest[0])
        elif kind == "storage" and type(rest[0]) is Name and type(rest[3]) is int:
            storage = Storage(rest[0].name, str(rest[1]), rest[3])
            self.storages[storage.key] = storage
            self.stack.append(storage)
        else:
            raise Refused(f"the persistent id {kind}")

    def name_of_strings(self, _):
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(Name(str(module), str(name)))


def _describe(value):
    return str(value) if type(value) is Name else f"an {value.cls}" if type(value) is Object else type(value).__name__


# Opcodes whose argument is the value.
_PUSHES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_BUILDS: dict[str, Callable] = {
    "NONE": lambda m, _: m.stack.append(None),
    "NEWTRUE": lambda m, _: m.stack.append(True),
    "NEWFALSE": lambda m, _: m.stack.append(False),
    "MARK": lambda m, _: m.stack.append(_Mark),
    "POP": lambda m, _: m.stack.pop(),
    "POP_MARK": lambda m, _: m.pop_to_mark(),
    "DUP": lambda m, _: m.stack.append(m.stack[-1]),
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "EMPTY_TUPLE": lambda m, _: m.stack.append(()),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.pop_to_mark())),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "SETITEM": lambda m, _: m.set_items([m.stack.pop(), m.stack.pop()][::-1]),
    "SETITEMS": lambda m, _: m.set_items(m.pop_to_mark()),
    "APPEND": lambda m, _: m.append([m.stack.pop()]),
    "APPENDS": lambda m, _: m.append(m.pop_to_mark()),
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "GLOBAL": lambda m, argument: m.stack.append(Name(*argument.split(" ", 1))),
    "STACK_GLOBAL": _Machine.name_of_strings,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.new_object,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}


def load(stream, path):
    """Reads the next pickle in a binary stream.

    Returns:
      The object, made of plain containers, numbers and the classes above; and {key: Storage} of all it mentions.

    Raises:
      UserError: the pickle is damaged, or would have to run something to be read; `path` is named.
    """
    storages = {}
    try:
        return _Machine(storages).run(stream), storages
    except Refused as error:
        raise UserError(
            f"{path} needs {error} to be read, which is refused: only tensors, containers and modules' attributes are; "
            "save the network's state_dict() instead"
        ) from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, RecursionError):
        raise UserError(f"{path} is damaged: its pickle cannot be followed; fetch or save the file again") from None
