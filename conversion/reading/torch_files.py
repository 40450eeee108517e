"""Files of `torch.save` and TorchScript: a pickle that describes tensors, and the rows of numbers that they lie in.

`torch.jit.load` compiles and runs the code of an archive, an ordinary unpickler runs whatever a pickle names, and
`torch.load(weights_only=True)` still lets a pickle of a hundred bytes take all memory (`bytearray(10**12)`) and a
tensor be larger than its record, with whatever memory held before. Here a pickle is only read (torch_pickle.py), and
what it describes is looked up in the file and checked. (As with every mapped file: it must not be cut short meanwhile,
the system ends a process that reads beyond its end.)
"""

import io
import logging
import math
import mmap
import os
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from vit_embed.conversion.messages import listing
from vit_embed.conversion.reading.torch_pickle import ForbiddenName, Module, Storage, TensorUnpickler, View

# The keys by which training code stores the weights beside its other state; "vit" is muOmni's.
STATE_KEYS = ("state_dict", "model_state_dict", "model", "vit")
# The same weights averaged over training steps, which timm evaluates where a checkpoint has them.
AVERAGED_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "model_state_dict_ema", "ema")

logger = logging.getLogger(__name__)


class WeightsChoice(NamedTuple):
    """Which weights of a training checkpoint to read.

    key: the entry that holds them; None takes averaged weights where there are some.
    is_logged: whether a choice between averaged and other weights is logged.
    """

    key: str | None = None
    is_logged: bool = True


AVERAGED_FIRST = WeightsChoice()


def read_torch_file(path: Path, start: bytes, choice: WeightsChoice) -> dict[str, torch.Tensor]:
    """The tensors of a file that begins with `start`, mapped from it."""
    return (_read_zip if start.startswith(b"PK\x03\x04") else _read_legacy)(path, choice)


# What a pickle describes


def _described(root: Any, choice: WeightsChoice) -> dict[str, View]:
    """The tensors of a module, or of a state dict, which may lie under a key of STATE_KEYS or AVERAGED_KEYS."""
    if isinstance(root, Module):
        root = dict(_module_tensors(root, "", set()))
    root = _chosen_weights(root, choice)
    if not isinstance(root, dict) or not root:
        raise ValueError(f"it must hold a state dict, names and their tensors; got {type(root).__name__}")
    foreign = [name for name, value in root.items() if not (isinstance(name, str) and isinstance(value, View))]
    if foreign:
        raise ValueError(
            "it must hold a state dict, dense tensors by name; these are something else: "
            f"{listing([str(name) for name in foreign])}"
        )
    return root


def _chosen_weights(root: Any, choice: WeightsChoice) -> Any:
    """The state dict among the entries of a training checkpoint: the one that is named, else averaged weights."""
    if choice.key is not None:
        if not _has_table(root, choice.key):
            names = [key for key in root if isinstance(key, str) and _has_table(root, key)] if root else []
            raise ValueError(f"--weights_key must name a state dict in it ({listing(names)}), got {choice.key}")
        return root[choice.key]
    averaged = [key for key in AVERAGED_KEYS if _has_table(root, key)]
    others = [key for key in STATE_KEYS if _has_table(root, key)]
    if averaged and others and choice.is_logged:
        logger.warning(
            "the checkpoint has averaged weights, %s, and others, %s: the averaged ones are used, as timm does; "
            "--weights_key %s uses the others",
            averaged[0],
            others[0],
            others[0],
        )
    for key in (*averaged[:1], *STATE_KEYS):
        if _has_table(root, key):
            root = root[key]
    return root


def _has_table(root: Any, key: str) -> bool:
    return isinstance(root, dict) and isinstance(root.get(key), dict) and bool(root[key])


def _module_tensors(module: Module, prefix: str, seen: set[int]) -> Iterator[tuple[str, View]]:
    """Every tensor below a module with its dotted name."""
    # CLIP shares no module; an archive nested in itself would never end.
    if id(module) in seen:
        raise ValueError(f"the module {prefix.rstrip('.')} appears twice in the archive")
    seen.add(id(module))
    for name, value in module.items():
        if isinstance(value, View):
            yield prefix + name, value
        elif isinstance(value, Module):
            yield from _module_tensors(value, f"{prefix}{name}.", seen)


# Archives: TorchScript, and `torch.save` since torch 1.6


def _read_zip(path: Path, choice: WeightsChoice) -> dict[str, torch.Tensor]:
    """A pickle, and a record for each row of numbers."""
    if not zipfile.is_zipfile(path):
        raise ValueError("it is truncated: the directory at the end of the archive is missing; fetch it again")
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        names = archive.namelist()
        if len(set(names)) < len(names):
            raise ValueError("two records of the archive have one name")
        _check_stored(archive, path)
        roots = [name.removesuffix("data.pkl") for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(roots) != 1:
            raise ValueError(f"an archive of torch has one NAME/data.pkl, got {len(roots)}")
        order = roots[0] + "byteorder"
        _check_byte_order(order not in names or archive.read(order) == sys.byteorder.encode())
        views = _described(TensorUnpickler(io.BytesIO(archive.read(roots[0] + "data.pkl"))).load(), choice)
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return _tensors(views, content, lambda storage: _record_begin(archive, file, roots[0], storage))


def _check_stored(archive: zipfile.ZipFile, path: Path) -> None:
    """Raises ValueError where the zip directory promises more bytes than the file has.

    torch stores data uncompressed, so a record that would grow on reading is no work of torch.
    """
    records = [record for record in archive.infolist() if not record.filename.endswith((".py", ".debug_pkl"))]
    grown = [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]
    if grown:
        raise ValueError(f"these records must be stored uncompressed, as torch does: {listing(grown)}")
    claimed = sum(record.file_size for record in records)
    if claimed > path.stat().st_size:
        raise ValueError(f"its directory claims {claimed} bytes of data, the file has {path.stat().st_size}")


def _record_begin(archive: zipfile.ZipFile, file: BinaryIO, root: str, storage: Storage) -> int:
    """Where in the file the data of a record begin, after a check of their length and checksum."""
    record = archive.getinfo(f"{root}data/{storage.key}")
    expected = storage.numel * storage.dtype.itemsize
    if record.file_size != expected:
        raise ValueError(
            f"record data/{storage.key} must have {expected} bytes ({storage.numel} of {storage.dtype}), got "
            f"{record.file_size}"
        )
    # The record's own header in front of it: 30 bytes, whose last two numbers are the lengths of what follows.
    file.seek(record.header_offset)
    magic, name_length, extra_length = struct.unpack("<4s22xHH", file.read(30))
    if magic != b"PK\x03\x04" or file.read(name_length) != record.orig_filename.encode():
        raise ValueError(f"record data/{storage.key} is not where the directory says")
    begin = file.seek(extra_length, os.SEEK_CUR)
    # Read, not looked at where it is mapped: that would keep all of it in memory.
    checksum, left = 0, expected
    while block := file.read(min(left, 2**20)):
        checksum, left = zlib.crc32(block, checksum), left - len(block)
    if left or checksum != record.CRC:
        raise ValueError(f"Bad CRC-32 for record data/{storage.key}")
    return begin


# `torch.save` before torch 1.6

_MAGIC = (0x1950A86A20F9469CFC6C, 1001)  # the first two pickles of every file


def _read_legacy(path: Path, choice: WeightsChoice) -> dict[str, torch.Tensor]:
    """Five pickles, then each row of numbers after its length."""
    with open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        magic = (TensorUnpickler(content).load(), TensorUnpickler(content).load())
    except ForbiddenName:
        raise
    except ValueError:
        magic = None
    if magic != _MAGIC:
        raise ValueError("it is truncated, or no file of safetensors or torch")
    system = TensorUnpickler(content).load()
    _check_byte_order(isinstance(system, dict) and system.get("little_endian") is (sys.byteorder == "little"))
    unpickler = TensorUnpickler(content)
    views = _described(unpickler.load(), choice)
    keys = TensorUnpickler(content).load()
    is_list = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not is_list or sorted(keys) != sorted(unpickler.storages):
        raise ValueError("its list of records is corrupt")
    begins = {}
    for key in keys:
        storage = unpickler.storages[key]
        (numel,) = struct.unpack("<q", content.read(8))
        begins[key] = content.tell()
        if numel != storage.numel or numel < 0:
            raise ValueError(f"record {key} must have {storage.numel} numbers, got {numel}")
        content.seek(numel * storage.dtype.itemsize, os.SEEK_CUR)  # raises beyond the end
    if content.tell() != len(content):
        raise ValueError(f"{len(content) - content.tell()} bytes after its last record belong to nothing")
    return _tensors(views, content, lambda storage: begins[storage.key])


def _check_byte_order(is_ours: bool) -> None:
    if not is_ours:
        raise ValueError(f"its numbers are not in this machine's order of bytes, {sys.byteorder} end first")


# Both


def _tensors(
    views: Mapping[str, View], content: mmap.mmap, begin_of: Callable[[Storage], int]
) -> dict[str, torch.Tensor]:
    """The tensors that a pickle describes over the rows of numbers that begin there in the file."""
    rows: dict[Storage, torch.Tensor] = {}
    for storage in dict.fromkeys(view.storage for view in views.values()):
        begin, num_bytes = begin_of(storage), storage.numel * storage.dtype.itemsize
        # torch < 1.6 writes records anywhere, later ones at multiples of 64; 16 suits the widest number.
        if not num_bytes:
            rows[storage] = torch.empty(0, dtype=storage.dtype)
        elif begin % 16:
            copied = bytearray(content[begin : begin + num_bytes])
            rows[storage] = torch.frombuffer(copied, dtype=storage.dtype)
        else:
            rows[storage] = torch.frombuffer(content, dtype=storage.dtype, count=storage.numel, offset=begin)
    # Views that repeat a few stored bytes many times over would fill memory when copied. Names of one and the same
    # tensor are no such thing: tied weights.
    claimed = sum(math.prod(view.size) * view.dtype.itemsize for view in set(views.values()))
    if claimed > len(content):
        raise ValueError(f"it has {len(content)} bytes, but its tensors claim {claimed}; it is corrupt")
    return {name: _tensor(view, rows[view.storage]) for name, view in views.items()}


def _tensor(view: View, row: torch.Tensor) -> torch.Tensor:
    if row.dtype != view.dtype:
        row = row[: len(row) // view.dtype.itemsize * view.dtype.itemsize].view(view.dtype)
    return torch.as_strided(row, view.size, view.stride, view.offset)
