"""The tensors in checkpoint files from a stranger: no code that a file holds is ever run.

`torch.jit.load` compiles and runs the code of an archive, and an ordinary unpickler runs whatever a pickle names; the
readers here know tensors and the containers of tensors, and refuse the rest. Tensors are mapped from their files, not
copied, so that a checkpoint takes memory only while a tensor of it is looked at.
"""

import contextlib
import ctypes
import gc
import io
import json
import mmap
import os
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

INDEX_ENDING = ".index.json"  # of the file that says which shard holds which tensor
LISTED = 5  # names that an error lists before it counts the rest


def listing(names: list[str]) -> str:
    """The first few of many names, and how many there are."""
    rest = f", ... ({len(names)} in all)" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + rest


# Linux's advice to write changed pages out and drop the others from memory (asm-generic/mman-common.h). They are read
# again when they are next looked at, so following it changes no number, whatever the memory holds.
MADV_PAGEOUT = 21

# The key by which training code stores the weights beside its other state.
STATE_KEYS = ("state_dict", "model")


def release(tensor: torch.Tensor) -> None:
    """Lets go of the memory of a tensor that is mapped from a file, until it is looked at again.

    Converting reads every tensor of a large file once; without this all of the file stays in memory.
    """
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin and tensor.is_contiguous():
        with contextlib.suppress(AttributeError, OSError, TypeError):  # advice: a system without it keeps the memory
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_PAGEOUT)


def collect() -> None:
    """Gives the memory of a model that nothing needs any more back to the system.

    Modules that refer to each other in a ring wait for Python's collector; and the C library keeps what it frees
    between two small pieces that are in use, which after a model can be all of it.
    """
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def read_checkpoint(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of one file, or of all shards that an index file names, by their dotted names.

    Read are safetensors, TorchScript archives, and state dicts saved by `torch.save`, which may lie under a key of
    STATE_KEYS and whose names may all start with "module.". Nothing that the file holds is run: the code of an archive
    is not looked at, and a pickle may only build tensors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated, foreign, or holds anything that is not a plain tensor; a shard lies
            elsewhere than beside its index, or has other tensors than the index says.
    """
    path = Path(path)
    if path.name.endswith(INDEX_ENDING):
        return _read_shards(path)
    if not path.exists():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    if not path.is_file() or not path.stat().st_size:
        raise ValueError(f"{path} must be a checkpoint file, but it is {'empty' if path.is_file() else 'a folder'}")
    with open(path, "rb") as file:
        start = file.read(9)
    is_zip = zipfile.is_zipfile(path)
    if start.startswith(b"PK\x03\x04") and not is_zip:
        raise ValueError(f"{path} is truncated: the directory at the end of the archive is missing; fetch it again")
    try:
        # A safetensors file starts with the length of its header, eight bytes, and the header is JSON.
        if start[8:9] == b"{":
            state_dict = _read_safetensors(path)
        elif is_zip and _is_torchscript(path):
            state_dict = _read_torchscript(path)
        else:
            state_dict = _read_torch_save(path, is_zip)
    # Whatever a broken or hostile file makes a parser raise: OSError too, by sending it to places outside the file.
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {_reason(error)}") from error
    return _checked_tensors(state_dict, path)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:  # checks that the header's offsets fill the file
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping


def read_index(path: Path) -> dict[str, str]:
    """Which shard holds which tensor: {name of the tensor: name of a file}. Raises ValueError for a foreign file."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError("its weight_map is no table of names and files")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be the index of a sharded checkpoint, with a weight_map: {error}") from error
    return weight_map


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    weight_map = read_index(index)
    state_dict: dict[str, torch.Tensor] = {}
    for name in sorted(set(weight_map.values())):
        shard = read_checkpoint(_beside(index, name))
        expected = {key for key, file in weight_map.items() if file == name}
        if wrong := sorted(expected.symmetric_difference(shard)):
            raise ValueError(
                f"{index} says that {name} has {len(expected)} tensors, but the file has {len(shard)}; in one of them "
                f"alone: {listing(wrong)}"
            )
        state_dict.update(shard)
    return state_dict


def _beside(index: Path, name: str) -> Path:
    """The file of that name in the folder of an index. Raises ValueError for one that lies anywhere else."""
    folder = index.parent.resolve()
    # A snapshot of the Hub's cache links to the blobs of its own repository, two folders up.
    allowed = {folder, folder.parent.parent / "blobs"} if folder.parent.name == "snapshots" else {folder}
    path = folder / name
    is_plain = name == os.path.basename(name) and name not in ("", ".", "..") and not name.endswith(INDEX_ENDING)
    if not is_plain or path.resolve().parent not in allowed:
        raise ValueError(f"{index} names the shard {name!r}, which must be a file beside it, not a path or a link away")
    return path


def _reason(error: Exception) -> str:
    """What went wrong, without torch's advice to switch its safety off."""
    forbidden = re.search(r"GLOBAL (\S+)", str(error))
    if forbidden:
        return f"it names {forbidden[1]}, but it may hold tensors only (loading other objects can run code)"
    if not str(error) or "weights_only" in str(error):
        return "it is truncated, is no file of torch, or holds other objects than tensors (loading them can run code)"
    return str(error).splitlines()[0]


def _checked_tensors(state_dict: Any, path: Path) -> dict[str, torch.Tensor]:
    for key in STATE_KEYS:
        if isinstance(state_dict, Mapping) and isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
    if not isinstance(state_dict, Mapping) or not state_dict:
        raise ValueError(f"{path} must hold a state dict, names and their tensors; got {type(state_dict).__name__}")
    foreign = [
        str(name)
        for name, value in state_dict.items()
        if not (isinstance(name, str) and isinstance(value, torch.Tensor))
        or value.layout is not torch.strided
        or value.device.type != "cpu"  # "meta": a shape without numbers
    ]
    if foreign:
        raise ValueError(
            f"{path} must hold a state dict, dense tensors by name; these are something else: {listing(foreign)}"
        )
    # Views that repeat a few stored bytes many times over would fill memory when copied.
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in state_dict.values())
    if claimed > path.stat().st_size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, but its tensors claim {claimed}; it is corrupt")
    prefix = "module." if all(name.startswith("module.") for name in state_dict) else ""
    return {name.removeprefix(prefix): tensor.detach() for name, tensor in state_dict.items()}


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.rpartition("/")[2] == "constants.pkl" for name in archive.namelist())


def _read_torch_save(path: Path, is_zip: bool) -> Any:
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            _check_stored(archive, path)
    # Only the zip format of torch >= 1.6 can be mapped.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


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


def _read_torchscript(path: Path) -> dict[str, torch.Tensor]:
    """The state of the modules of a TorchScript archive. `torch.jit.load` would compile and run the archive's code."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        _check_stored(archive, path)
        roots = [name.removesuffix("data.pkl") for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(roots) != 1:
            raise ValueError(f"a TorchScript archive has one NAME/data.pkl, got {len(roots)}")
        pickled = archive.read(roots[0] + "data.pkl")
        for opcode, argument, _ in pickletools.genops(pickled):
            # Python's unpickler makes room for every number up to the one given: gigabytes for a few bytes of file.
            if opcode.name.endswith("PUT") and argument > len(pickled):
                raise ValueError(f"data.pkl has {len(pickled)} bytes, but numbers an object {argument}; it is corrupt")
        records = _MappedRecords(archive, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), roots[0])
        root = _TorchScriptUnpickler(io.BytesIO(pickled), records).load()
    if not isinstance(root, _ScriptModule):
        raise ValueError(f"a TorchScript archive holds a module, got {type(root).__name__}")
    return dict(_named_tensors(root, "", set()))


class _MappedRecords:
    """The data of an archive whose records are stored as they are, where it lies in the file."""

    def __init__(self, archive: zipfile.ZipFile, content: mmap.mmap, root: str):
        self._archive = archive
        self._content = content
        self._root = root

    def tensor(self, key: str, dtype: torch.dtype, numel: int) -> torch.Tensor:
        """The record data/`key` as a flat tensor of `numel` elements."""
        record = self._archive.getinfo(f"{self._root}data/{key}")
        if record.file_size != numel * dtype.itemsize:
            raise pickle.UnpicklingError(
                f"record data/{key} must have {numel * dtype.itemsize} bytes ({numel} of {dtype}), got "
                f"{record.file_size}"
            )
        if not numel:
            return torch.empty(0, dtype=dtype)
        # The record's own header in front of it: 30 bytes, whose last two numbers are the lengths of what follows.
        name_length, extra_length = struct.unpack_from("<HH", self._content, record.header_offset + 26)
        begin = record.header_offset + 30 + name_length + extra_length
        data = memoryview(self._content)[begin : begin + record.file_size]
        if len(data) != record.file_size or zlib.crc32(data) != record.CRC:
            raise zipfile.BadZipFile(f"Bad CRC-32 for record data/{key}")
        if begin % dtype.itemsize:  # torch itself writes every record at a multiple of 64
            return torch.frombuffer(bytearray(data), dtype=dtype)
        tensor = torch.frombuffer(self._content, dtype=dtype, count=numel, offset=begin)
        release(tensor)
        return tensor


class _ScriptModule:
    """What every class of an archive's code becomes: the attributes of its object, and no behaviour."""

    attributes: Mapping[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise pickle.UnpicklingError("the state of a module must be a dict of attributes")
        self.attributes = state


def _named_tensors(module: _ScriptModule, prefix: str, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor below a module with its dotted name."""
    # CLIP shares no module; an archive nested in itself would never end.
    if id(module) in seen:
        raise ValueError(f"the module {prefix.rstrip('.')} appears twice in the archive")
    seen.add(id(module))
    for name, value in module.attributes.items():
        if isinstance(value, torch.Tensor):
            yield prefix + name, value
        elif isinstance(value, _ScriptModule):
            yield from _named_tensors(value, f"{prefix}{name}.", seen)


class _TorchScriptUnpickler(pickle.Unpickler):
    """Reads the `data.pkl` of a TorchScript archive, knowing no name but the few that modules and tensors need.

    Callables are bound methods of this object: a pickle that tries to set their attributes fails.
    """

    _STORAGES = {
        "DoubleStorage": torch.float64,
        "FloatStorage": torch.float32,
        "HalfStorage": torch.float16,
        "BFloat16Storage": torch.bfloat16,
        "LongStorage": torch.int64,
        "IntStorage": torch.int32,
        "ShortStorage": torch.int16,
        "CharStorage": torch.int8,
        "ByteStorage": torch.uint8,
        "BoolStorage": torch.bool,
    }

    def __init__(self, file: io.BytesIO, records: _MappedRecords):
        super().__init__(file)
        self._records = records
        self._storages: dict[str, torch.Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "__torch__":
            return _ScriptModule
        if module == "torch" and name in self._STORAGES:
            return self._STORAGES[name]
        known = {
            ("collections", "OrderedDict"): self._ordered_dict,  # a tensor's backward hooks, always empty
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            # Attributes that are lists, such as the padding of a scripted convolution.
            ("torch.jit._pickle", "build_intlist"): self._list,
            ("torch.jit._pickle", "build_doublelist"): self._list,
            ("torch.jit._pickle", "build_boollist"): self._list,
            ("torch.jit._pickle", "build_tensorlist"): self._list,
        }
        if (module, name) not in known:
            # The form of torch's own message, which `_reason` reads.
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not allowed")
        return known[module, name]

    def persistent_load(self, pid: Any) -> torch.Tensor:
        """A record of the archive as a flat tensor."""
        kind, dtype, key, _, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(numel, int):
            raise pickle.UnpicklingError(f"a reference to data must name a storage, got {pid!r}")
        if key not in self._storages:
            self._storages[key] = self._records.tensor(key, dtype, numel)
        if self._storages[key].dtype != dtype:
            raise pickle.UnpicklingError(f"record data/{key} is read as two dtypes")
        return self._storages[key]

    def _tensor(
        self, storage: torch.Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> torch.Tensor:
        return torch.as_strided(storage, size, stride, offset)  # refuses what lies outside the storage

    def _ordered_dict(self) -> dict:
        return {}

    def _list(self, values: Any) -> list:
        return list(values)
