"""Reads the pickles in PyTorch's files without running them.

Unpickling calls whatever the file names, so a file from elsewhere can do anything. Here the opcodes are interpreted
by a stack machine that calls nothing: a class or function that the file names becomes a `Name`, an instance an
`Object` holding a dict of attributes, a tensor a `Tensor` saying where its numbers lie. Only the calls in `CALLS`
have a meaning; a file that asks for another is refused. What is built stays in proportion to the bytes read, though a
pickle can name one thing many times.
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


MOST_DIMENSIONS = 64  # of NumPy's arrays, and more than PyTorch's own have
LONGEST_TEXT = 1000  # characters of a name or a key


def is_text(value):
    """Whether a value can stand in a message of one line; a tuple nested by a hostile file can be endless as text."""
    return type(value) is str and len(value) <= LONGEST_TEXT and value.isprintable()


def _tensor(storage, offset, shape, strides, *_):
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
        raise Refused("a tensor whose shape is damaged")
    if len(shape) != len(strides) or len(shape) > MOST_DIMENSIONS:
        raise Refused("a tensor whose shape is damaged")
    return Tensor(storage, offset, tuple(shape), tuple(strides))


def _mapping(pairs=()):
    _check_keys(key for key, _ in pairs)
    return dict(pairs)


def _set(items=()):
    """Of a set's items those that can be keys; modules name buffers in it."""
    return frozenset(item for item in items if _is_key(item))


def _is_key(value):
    """Only simple keys: hashing a tuple nested by a hostile file can take forever, a long number nearly so."""
    if type(value) is int:
        return value.bit_length() <= 64
    return type(value) in (str, float, bool, type(None), Name, Tensor)


def _check_keys(keys):
    for key in keys:
        if not _is_key(key):
            raise Refused(f"a key that is a {type(key).__name__}")


def _member(owner, name):
    """A function of a class, which old pickles name by `getattr`: only the name is kept."""
    if type(owner) is not Name or not is_text(name) or len(owner.name) > LONGEST_TEXT:
        raise Refused("an attribute of something else than a class")
    return Name(owner.module, f"{owner.name}.{name}")


# All that a pickle may call: what each call means here.
CALLS: dict[str, Callable] = {
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": lambda *_: {},
    "__builtin__.set": _set,
    "builtins.set": _set,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch.Size": tuple,
    "__builtin__.getattr": _member,
    "builtins.getattr": _member,
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
        self.read = 0  # bytes of the pickle
        self.copied = 0  # items that were copied, not built one by one by the bytes read

    def pop_to_mark(self):
        """What was pushed since the last mark; drops the mark."""
        items = []
        while (item := self.stack.pop()) is not _Mark:
            items.append(item)
        return items[::-1]

    def run(self, stream):
        """Reads opcodes to the STOP; returns the object."""
        for opcode, argument, self.read in pickletools.genops(stream):
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

    def count(self, items):
        """Refuses the pickle whose calls and states would copy more items than it has bytes."""
        self.copied += len(items)
        if self.copied > self.read:
            raise Refused("the same items again and again")

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
            self.count(arguments)
            for argument in arguments:
                if hasattr(argument, "__len__"):
                    self.count(argument)
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
            self.count(state)
            target.attributes.update(state)
        elif type(target) is Object and str(target.cls) in FACTS:
            pass
        elif type(target) is not dict:
            raise Refused(f"a state of {_describe(target)}")

    def persistent(self, _):
        """Storages; in old files also the source of each class, of which only the name is kept."""
        match self.stack.pop():
            case ("module", Name() as cls, *_):
                self.stack.append(cls)
            case ("storage", Name() as kind, key, _, int(size), *_) if is_text(key):
                storage = self.storages[key] = Storage(kind.name, key, size)
                self.stack.append(storage)
            case _:
                raise Refused("a persistent id that is neither a storage nor a module")

    def name_of_strings(self, _):
        name, module = self.stack.pop(), self.stack.pop()
        self.name(module, name)

    def name(self, module, name):
        if not (is_text(module) and is_text(name)):
            raise Refused("a name that is damaged")
        self.stack.append(Name(module, name))


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
    "GLOBAL": lambda m, argument: m.name(*argument.split(" ", 1)),
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
