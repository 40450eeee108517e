"""The pickles of torch, read as data: names in them stay names, and nothing is imported or called.

What comes out are tables, lists, numbers, text, and descriptions of tensors; whoever has the file looks the numbers up.
"""

import pickletools
from typing import Any, BinaryIO, NamedTuple

import torch

# torch computes with no more.
MAX_DIMENSIONS = 64
# Instructions of a pickle, about 25 a tensor: room for 160,000 tensors, and for a few seconds and 1 GB at most.
MAX_PICKLE_LENGTH = 2**22

DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex128", "complex64", "bool"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
    )
}
_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.storage.UntypedStorage": torch.uint8,
}
_TENSOR_CLASSES = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter")
# What stands beside weights in files of training code: it is not made, only passed over.
_PASSED_OVER = (
    "_codecs.encode",  # bytes, in a pickle of protocol 2
    *("builtins.bytearray", "builtins.complex", "builtins.frozenset", "builtins.set"),
    *("__builtin__.bytearray", "__builtin__.complex", "__builtin__.frozenset", "__builtin__.set"),  # Python 2's name
    *("argparse.Namespace", "collections.Counter", "collections.defaultdict"),
    *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype"),
    *("torch.Size", "torch.device", "torch.serialization._get_layout"),
    # In a state dict these are refused by the name of their key.
    *("torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_meta_tensor_no_storage"),
)
_LISTS = tuple(f"torch.jit._pickle.build_{kind}list" for kind in ("int", "double", "bool", "tensor"))
_KNOWN = (
    *_PASSED_OVER,
    *_LISTS,
    *_TENSOR_CLASSES,
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._tensor._rebuild_from_type_v2",
)


class _Name(NamedTuple):
    """What a pickle wants to call."""

    name: str


class _PassedOver:
    """Something that is no tensor."""


class Module(dict):
    """What every class of an archive's code becomes: the attributes of its object, and no behaviour."""


class Storage(NamedTuple):
    """A row of numbers in a file."""

    dtype: torch.dtype
    key: str
    numel: int


class View(NamedTuple):
    """A tensor as a pickle describes it: part of a row of numbers. offset and stride are in elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def _view(
    storage: Storage,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype | None = None,
    metadata: Any = None,
) -> View:
    is_shape = all(isinstance(part, tuple) and len(part) <= MAX_DIMENSIONS for part in (size, stride))
    if not isinstance(storage, Storage) or not is_shape or len(size) != len(stride):
        raise ValueError("a tensor in its pickle must have a storage, an offset, a size and strides")
    if not all(type(number) is int and 0 <= number < 2**62 for number in (offset, *size, *stride)):
        raise ValueError("a tensor in its pickle must have an offset, a size and strides from 0 up")
    dtype = storage.dtype if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or (dtype != storage.dtype and storage.dtype != torch.uint8):
        raise ValueError(f"a tensor in its pickle must have the dtype of its record, {storage.dtype}")
    end = offset + 1 + sum((count - 1) * step for count, step in zip(size, stride)) if all(size) else offset
    if end * dtype.itemsize > storage.numel * storage.dtype.itemsize:
        raise ValueError(f"a tensor in its pickle ends at {end}, the record data/{storage.key} at {storage.numel}")
    if metadata:
        raise ValueError("a tensor in its pickle is a negated or conjugated view, which is not read")
    return View(storage, offset, size, stride, dtype)


class Pickle:
    """One pickle as data: tables, lists, numbers, text, and descriptions of tensors.

    Nothing is imported and nothing called; what it builds is as large as the pickle at most.

    storages: every row of numbers that it names, by key.
    """

    _CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
    _EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": _PassedOver}
    # Instructions whose argument is the value.
    _VALUES = (
        *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
        *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    )
    _TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def load(self, file: BinaryIO) -> Any:
        """Reads to the end of the pickle that starts here."""
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if count > MAX_PICKLE_LENGTH:
                raise ValueError(f"its pickle has more than {MAX_PICKLE_LENGTH} instructions, no checkpoint needs them")
            try:
                self._follow(opcode.name, argument)
            except (AttributeError, IndexError, KeyError, TypeError) as error:
                raise ValueError(f"its pickle is corrupt at the instruction {opcode.name}: {error}") from error
        return self._stack.pop()

    def _follow(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in self._VALUES:
            stack.append(argument)
        elif name in self._CONSTANTS:
            stack.append(self._CONSTANTS[name])
        elif name in self._EMPTY:
            stack.append(self._EMPTY[name]())
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            number = len(self._memo) if argument is None else argument
            if number > MAX_PICKLE_LENGTH:
                raise ValueError(f"its pickle numbers an object {number}; it is corrupt")
            self._memo[number] = stack[-1]
        elif name in self._TUPLES:
            stack.append(tuple(self._pop(len(stack) - self._TUPLES[name])))
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(self._pop(self._marks.pop())))
        elif name in ("APPEND", "APPENDS", "ADDITEMS", "FROZENSET"):
            items = self._pop(len(stack) - 1 if name == "APPEND" else self._marks.pop())
            if name == "FROZENSET":
                stack.append(_PassedOver())
            elif not isinstance(stack[-1], _PassedOver):
                stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            self._set_items(self._pop(len(stack) - 2 if name == "SETITEM" else self._marks.pop()))
        elif name == "GLOBAL":
            stack.append(_named(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            stack.append(_named(".".join(self._pop(len(stack) - 2))))
        elif name in ("REDUCE", "NEWOBJ"):
            stack.append(_made(*self._pop(len(stack) - 2)))
        elif name == "BUILD":
            self._build(stack.pop())
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"its pickle has the instruction {name}, which no tensor needs; it may do anything")

    def _pop(self, begin: int) -> list[Any]:
        """What lies on the stack from there on."""
        if not 0 <= begin <= len(self._stack):
            raise IndexError("the stack is too short")
        items = self._stack[begin:]
        del self._stack[begin:]
        return items

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, _PassedOver):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise TypeError("it sets entries of what is no table")
        target.update(_table(zip(items[::2], items[1::2])))

    def _build(self, state: Any) -> None:
        target = self._stack[-1]
        if isinstance(target, Module):
            if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
                raise TypeError("the state of a module must be a table of attributes")
            target.update(state)
        elif not isinstance(target, (dict, _PassedOver)):  # of a table: the versions of modules
            raise TypeError("it sets the state of what has none")

    def _storage(self, reference: Any) -> Storage:
        what, dtype, key, _, numel, *view = reference
        if what != "storage" or not isinstance(dtype, torch.dtype) or type(numel) is not int or any(view):
            raise ValueError("a reference to data must name a storage")
        if not isinstance(key, str):
            got = f"data/{key}" if isinstance(key, int) else type(key).__name__
            raise ValueError(f"a reference to data must name a record, got {got}")
        storage = Storage(dtype, key, numel)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"record data/{key} is read as two dtypes or lengths")
        return storage


def _table(pairs: Any) -> dict:
    table = {}
    for key, value in pairs:
        # A tuple of tuples of ... takes for ever to hash.
        if not isinstance(key, (str, int, float, bytes, type(None))):
            raise TypeError(f"a key must be text or a number, got {type(key).__name__}")
        table[key] = value
    return table


def _named(name: str) -> Any:
    """What a name in a pickle stands for: a dtype, or itself where it may be called."""
    if name in _STORAGES:
        return _STORAGES[name]
    if name.startswith("torch.") and name.removeprefix("torch.") in DTYPES:
        return DTYPES[name.removeprefix("torch.")]
    if name in _KNOWN or name.startswith("__torch__."):
        return _Name(name)
    raise ValueError(f"it names {name:.200}, but it may hold tensors only (loading other objects can run code)")


def _made(called: Any, arguments: Any) -> Any:
    """What the name would make of the arguments in torch, as data."""
    if not isinstance(called, _Name) or not isinstance(arguments, tuple):
        raise TypeError("it calls what cannot be called")
    module, _, name = called.name.rpartition(".")
    if called.name.startswith("__torch__."):
        return Module()
    if called.name in _PASSED_OVER:
        return _PassedOver()
    if called.name == "collections.OrderedDict":
        return _table(*arguments) if arguments else {}  # with entries: Python 2's
    if called.name in _LISTS:
        return arguments[0]
    if module == "torch._utils" and name.startswith("_rebuild_parameter"):
        return arguments[0]
    if called.name == "torch._tensor._rebuild_from_type_v2":  # a tensor with attributes, or of a class
        if arguments[1] not in [_Name(each) for each in _TENSOR_CLASSES]:
            raise TypeError("a tensor must be of torch's own class")
        return _made(arguments[0], arguments[2])
    if name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
        return _view(*arguments[:4], metadata=arguments[6:] and arguments[6])
    if name == "_rebuild_tensor_v3":
        return _view(*arguments[:4], dtype=arguments[6], metadata=arguments[7:] and arguments[7])
    raise TypeError(f"it calls {called.name} without a reason")
