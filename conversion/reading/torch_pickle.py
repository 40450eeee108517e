"""The pickles of torch, read without running anything of them.

Python's unpickler imports and calls whatever a pickle names. This one knows the names that torch writes and stands
something inert in for each; every other name, and every instruction that no tensor needs, is refused. What comes out
are tables, lists, numbers, text, and descriptions of tensors (`View`); whoever has the file looks the numbers up.

It extends the unpickler that is written in Python (as torch.package does), whose memo is a dict: the one in C
makes an array as long as the largest number by which a pickle calls an object, gigabytes for a file of ten bytes.
"""

import pickle
import pickletools
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, NamedTuple

import torch

MAX_DIMENSIONS = 64  # torch computes with no more
# Reads of a pickle, about 40 a tensor: room for 100,000 tensors, and for a few seconds and 1 GB at most.
MAX_READS = 2**22

DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex128", "complex64", "bool"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
    )
}
_STORAGES = {
    f"torch.{name}Storage": DTYPES[dtype]
    for name, dtype in (
        *(("Double", "float64"), ("Float", "float32"), ("Half", "float16"), ("BFloat16", "bfloat16")),
        *(("ComplexDouble", "complex128"), ("ComplexFloat", "complex64"), ("Bool", "bool")),
        *(("Long", "int64"), ("Int", "int32"), ("Short", "int16"), ("Char", "int8"), ("Byte", "uint8")),
    )
}
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


class ForbiddenName(ValueError):
    """A pickle that names what no tensor needs."""


# What a pickle may build. None of it can be changed by a pickle except as its methods say: an object without
# `__setstate__` and with a `__dict__` could be given any attribute.


class Storage(NamedTuple):
    """A row of numbers in a file."""

    dtype: torch.dtype
    key: str
    numel: int

    def __setstate__(self, state: Any) -> None:
        raise TypeError("it sets the state of what has none")


class View(NamedTuple):
    """A tensor as a pickle describes it: part of a row of numbers. offset and stride are in elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    __setstate__ = Storage.__setstate__


class Table(dict):
    """A dict, or an OrderedDict, with keys that take no time to hash: a tuple of tuples of ... takes for ever."""

    __slots__ = ()

    def __init__(self, pairs: Iterable = ()):
        super().__init__()
        for key, value in pairs:  # Python 2 writes an OrderedDict so
            self[key] = value

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, (str, int, float, bytes, type(None))):
            raise TypeError(f"a key must be text or a number, got {type(key).__name__}")
        super().__setitem__(key, value)

    def __setstate__(self, state: Any) -> None:
        """Ignores the versions of modules that a state dict carries."""


class Module(Table):
    """An object of any class of an archive's own code: its attributes, and no behaviour."""

    __slots__ = ()

    def __init__(self, *arguments: Any):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, Table) or not all(isinstance(name, str) for name in state):
            raise TypeError("the state of a module must be a table of attributes")
        self.update(state)


class PassedOver:
    """Something that is no tensor: takes what a pickle does with it, and keeps nothing."""

    __slots__ = ()

    def __init__(self, *arguments: Any):
        pass

    def ignore(self, *arguments: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = ignore


class Name:
    """Something that a pickle may name: a dtype, a class of tensors, or what describes a tensor when it is called."""

    __slots__ = ("_call", "dtype")

    def __init__(self, call: Callable | None = None, dtype: torch.dtype | None = None):
        self._call, self.dtype = call, dtype

    def __call__(self, *arguments: Any) -> Any:
        if self._call is None:
            raise TypeError("it calls what cannot be called")
        return self._call(*arguments)

    __setstate__ = Storage.__setstate__


# What torch's functions are called with, and what they describe


def _rebuild_tensor_v2(storage, offset, size, stride, requires_grad=None, hooks=None, metadata=None) -> View:
    return _view(storage, offset, size, stride, None, metadata)


def _rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None) -> View:
    if not isinstance(dtype, Name) or dtype.dtype is None:
        raise TypeError("the dtype of a tensor must be one of torch's")
    return _view(storage, offset, size, stride, dtype.dtype, metadata)


def _first(first: Any, *more: Any) -> Any:
    """A parameter is its tensor; a list of TorchScript is the list."""
    return first


def _rebuild_from_type(call: Any, tensor_class: Any, arguments: Any, state: Any = None) -> Any:
    """A tensor with attributes of its own, or of a class."""
    if tensor_class is not _TENSOR_CLASS or not isinstance(call, Name) or not isinstance(arguments, tuple):
        raise TypeError("a tensor must be of torch's own class")
    return call(*arguments)


def _view(storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None, metadata: Any) -> View:
    is_shape = all(isinstance(part, tuple) and len(part) <= MAX_DIMENSIONS for part in (size, stride))
    if not isinstance(storage, Storage) or not is_shape or len(size) != len(stride):
        raise ValueError("a tensor in its pickle must have a storage, an offset, a size and strides")
    if not all(type(number) is int and 0 <= number < 2**62 for number in (offset, *size, *stride)):
        raise ValueError("a tensor in its pickle must have an offset, a size and strides from 0 up")
    dtype = storage.dtype if dtype is None else dtype
    if dtype != storage.dtype and storage.dtype != torch.uint8:
        raise ValueError(f"a tensor in its pickle must have the dtype of its record, {storage.dtype}")
    end = offset + 1 + sum((count - 1) * step for count, step in zip(size, stride)) if all(size) else offset
    if end * dtype.itemsize > storage.numel * storage.dtype.itemsize:
        raise ValueError(f"a tensor in its pickle ends at {end}, the record data/{storage.key} at {storage.numel}")
    if metadata:
        raise ValueError("a tensor in its pickle is a negated or conjugated view, which is not read")
    return View(storage, offset, size, stride, dtype)


_TENSOR_CLASS = Name()
_NAMES: dict[str, Any] = {
    **{name: Name(dtype=dtype) for name, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": Name(dtype=torch.uint8),
    **{f"torch.{name}": Name(dtype=dtype) for name, dtype in DTYPES.items()},
    **dict.fromkeys(_PASSED_OVER, PassedOver),
    **dict.fromkeys(("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter"), _TENSOR_CLASS),
    **{f"torch.jit._pickle.build_{kind}list": Name(_first) for kind in ("int", "double", "bool", "tensor")},
    "collections.OrderedDict": Table,
    "torch._utils._rebuild_tensor": Name(_rebuild_tensor_v2),
    "torch._utils._rebuild_tensor_v2": Name(_rebuild_tensor_v2),
    "torch._utils._rebuild_tensor_v3": Name(_rebuild_tensor_v3),
    "torch._utils._rebuild_parameter": Name(_first),
    "torch._utils._rebuild_parameter_with_state": Name(_first),
    "torch._tensor._rebuild_from_type_v2": Name(_rebuild_from_type),
}


class _Instructions(dict):
    """What follows each instruction of a pickle that is allowed: {its byte: method of the unpickler}."""

    def __missing__(self, opcode: int) -> Callable:
        known = [each.name for each in pickletools.opcodes if ord(each.code) == opcode]
        raise ValueError(f"its pickle has the instruction {(known or [opcode])[0]}, which no tensor needs")


# Not among them: what only objects need (OBJ, INST, NEWOBJ_EX, the EXT registry), text forms of numbers, and POP and
# DUP, which no pickler writes for a state dict.
_ALLOWED = [
    ord(getattr(pickle, name))
    for name in (
        *("PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE"),
        *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
        *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
        *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS"),
        *("SETITEM", "SETITEMS", "ADDITEMS", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT", "MEMOIZE"),
        *("GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID"),
    )
]


class _CountedReads:
    """A file that gives out at most MAX_READS parts: every instruction of a pickle is at least one."""

    def __init__(self, file: BinaryIO):
        self._file, self._left = file, MAX_READS

    def read(self, size: int) -> bytes:
        self._count()
        return self._file.read(size)

    def readline(self) -> bytes:
        self._count()
        return self._file.readline()

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"its pickle has more than {MAX_READS} parts, no checkpoint needs them")


class TensorUnpickler(pickle._Unpickler):
    """Reads one pickle of torch. What it builds takes memory in proportion to the pickle, and nothing is run.

    Args:
        file: open at the start of the pickle; left at its end.

    storages: every row of numbers that the pickle names, by key.
    """

    dispatch = _Instructions({opcode: pickle._Unpickler.dispatch[opcode] for opcode in _ALLOWED})

    def __init__(self, file: BinaryIO):
        super().__init__(_CountedReads(file), encoding="latin-1")
        self.storages: dict[str, Storage] = {}

    def load(self) -> Any:
        """What the pickle describes.

        Raises:
            ForbiddenName: it names something that no tensor needs.
            ValueError: it is damaged, or does what no tensor needs.
        """
        try:
            return super().load()
        except ValueError:
            raise
        except Exception as error:  # whatever Python's own instructions raise for what they do not fit
            raise ValueError(f"its pickle is corrupt: {str(error) or type(error).__name__}") from error

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name.startswith("__torch__."):
            return Module
        if full_name not in _NAMES:
            raise ForbiddenName(
                f"it names {full_name:.200}, but it may hold tensors only (loading other objects can run code)"
            )
        return _NAMES[full_name]

    def persistent_load(self, pid: Any) -> Storage:
        what, dtype, key, _, numel, *view = pid
        if what != "storage" or not isinstance(dtype, Name) or type(numel) is not int or any(view):
            raise ValueError("a reference to data must name a storage")
        if not isinstance(key, str):
            got = f"data/{key}" if isinstance(key, int) else type(key).__name__
            raise ValueError(f"a reference to data must name a record, got {got}")
        if dtype.dtype is None:
            raise ValueError("a reference to data must name a storage")
        storage = Storage(dtype.dtype, key, numel)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"record data/{key} is read as two dtypes or lengths")
        return storage

    # Instructions that Python follows in a way that a hostile file can use.

    def _empty_dict(self) -> None:
        self.append(Table())

    def _empty_set(self) -> None:
        self.append(PassedOver())  # to put something into a set is to hash it

    def _frozenset(self) -> None:
        self.pop_mark()
        self.append(PassedOver())

    def _bytearray(self) -> None:
        self.append(self.read(int.from_bytes(self.read(8), "little")))  # Python makes one of that length first

    def _frame(self) -> None:
        self.read(8)  # only says how much to read at once

    dispatch[ord(pickle.EMPTY_DICT)] = _empty_dict
    dispatch[ord(pickle.EMPTY_SET)] = _empty_set
    dispatch[ord(pickle.FROZENSET)] = _frozenset
    dispatch[ord(pickle.BYTEARRAY8)] = _bytearray
    dispatch[ord(pickle.FRAME)] = _frame
