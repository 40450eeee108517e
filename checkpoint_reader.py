"""The tensors in checkpoint files from a stranger: no code that a file holds is ever run.

`torch.jit.load` compiles and runs the code of an archive, an ordinary unpickler runs whatever a pickle names, and
`torch.load(weights_only=True)` still lets a pickle of a hundred bytes take all memory (`bytearray(10**12)`) and a
tensor be larger than its record, with whatever memory held before. So pickles are read as data (torch_pickle.py), and
what they describe is looked up in the file and checked. Tensors are mapped from their files,
not copied, so that a checkpoint takes memory only while a tensor of it is looked at. (As with every mapped file: it
must not be cut short meanwhile, the system ends a process that reads behind the end.)
"""

import contextlib
import ctypes
import gc
import io
import json
import math
import mmap
import os
import re
import struct
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

from vit_embed.torch_pickle import DTYPES, MAX_DIMENSIONS, Module, Pickle, Storage, View

INDEX_ENDING = ".index.json"  # of the file that says which shard holds which tensor
LISTED = 5  # names that an error lists before it counts the rest


def listing(names: list[str]) -> str:
    """The first few of many names, and how many there are."""
    rest = f", ... ({len(names)} in all)" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + rest


# Linux's advice to write changed pages out and drop the others from memory (asm-generic/mman-common.h). They are read
# again when they are next looked at, so following it changes no number, whatever the memory holds.
MADV_PAGEOUT = 21

# The keys by which training code stores the weights beside its other state; "vit" is muOmni's.
STATE_KEYS = ("state_dict", "model_state_dict", "model", "vit")
# What DistributedDataParallel and torch.compile put in front of every name.
WRAPPERS = ("module.", "_orig_mod.")

# A name of a tensor is printed in messages: longer than this is no name. One of a ViT has about 60 characters.
MAX_NAME_LENGTH = 500
# An index of 100,000 tensors has 10 MB; Python's JSON takes some 20 times the bytes of a hostile one.
MAX_JSON_BYTES = 2**26


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
    STATE_KEYS and whose names may all start with one of WRAPPERS. Nothing that the file holds is run: the code of an
    archive is not looked at, and a pickle may only describe tensors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated, foreign, or holds anything that is not a plain tensor; a shard lies
            elsewhere than beside its index, or has other tensors than the index says.
        OSError: the system does not let it be read.
    """
    path = Path(path)
    if path.name.endswith(INDEX_ENDING):
        return _read_shards(path)
    check_file(path)
    if not path.stat().st_size:
        raise ValueError(f"{path} must be a checkpoint file, but it is empty")
    with open(path, "rb") as file:
        start = file.read(9)
    try:
        # A safetensors file starts with the length of its header, eight bytes, and the header is JSON.
        if start[8:9] == b"{":
            state_dict = _read_safetensors(path)
        else:
            state_dict = _read_zip(path) if start.startswith(b"PK\x03\x04") else _read_legacy(path)
        _check_tensors(state_dict)
    # Whatever a broken or hostile file makes a parser raise: OSError too, by sending it to places outside the file.
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {_one_line(error)}") from error
    for prefix in (*WRAPPERS, *WRAPPERS):  # the one may wrap the other, either way
        if all(name.startswith(prefix) for name in state_dict):
            state_dict = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
    return state_dict


def _one_line(error: Exception) -> str:
    """What went wrong; a stranger's names in it cannot write to a terminal what they like."""
    line = (str(error) or type(error).__name__).splitlines()[0][:MAX_NAME_LENGTH]
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def check_file(path: Path) -> None:
    """Raises FileNotFoundError or ValueError unless `path` is a file; reading a pipe or a device might never end."""
    if not path.exists():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe or a device"
        raise ValueError(f"{path} must be a checkpoint file, but it is {kind}")


def _check_tensors(state_dict: Mapping[str, torch.Tensor]) -> None:
    if not state_dict:
        raise ValueError("it must hold a state dict, names and their tensors, but there is none in it")
    for name, tensor in state_dict.items():
        if not name.isprintable() or len(name) > MAX_NAME_LENGTH:
            raise ValueError(f"a tensor's name must be a word of at most {MAX_NAME_LENGTH} letters, got {name[:40]!a}")
        if tensor.dtype not in DTYPES.values():
            raise ValueError(f"{name} must be a tensor of numbers, got {tensor.dtype}")
        # torch lets a tensor of no numbers have sides of any length.
        if tensor.dim() > MAX_DIMENSIONS or (not tensor.numel() and max(tensor.shape) > 2**31):
            raise ValueError(f"{name} has {tensor.dim()} dimensions, the longest {max(tensor.shape)}; it is corrupt")


# Safetensors, and several files


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:  # checks that the header's offsets fill the file
        names = list(file.keys())
        with open(path, "rb") as content:
            header = content.read(struct.unpack("<Q", content.read(8))[0])
        # Of two tensors with one name the library takes one.
        stated = json.loads(header, object_pairs_hook=_once)
        if set(names) != stated.keys() - {"__metadata__"}:
            raise ValueError("its header can be read in two ways")
        return {name: file.get_tensor(name) for name in names}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises ValueError for two of one name."""
    result = dict(pairs)
    if len(result) < len(pairs):
        [(name, count)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"its header has {count} entries named {name[:40]!a}")
    return result


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError for another file."""
    check_file(path)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; a JSON file has at most {MAX_JSON_BYTES}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def read_index(path: Path) -> dict[str, str]:
    """Which shard holds which tensor: {name of the tensor: name of a file}. Raises ValueError for a foreign file."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{path} must be the index of a sharded checkpoint, with a weight_map of names and files")
    if not weight_map:
        raise ValueError(f"{path} must be the index of a sharded checkpoint, but its weight_map is empty")
    return weight_map


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    weight_map = read_index(index)
    expected: dict[str, set[str]] = {}
    for key, name in weight_map.items():
        expected.setdefault(name, set()).add(key)
    shards = {name: _beside(index, name) for name in sorted(expected)}  # all of them, before the first is read
    state_dict: dict[str, torch.Tensor] = {}
    for name, path in shards.items():
        shard = read_checkpoint(path)
        if wrong := sorted(expected[name].symmetric_difference(shard)):
            raise ValueError(
                f"{index} says that {name} has {len(expected[name])} tensors, but the file has {len(shard)}; in one of "
                f"them alone: {listing([ascii(key)[:MAX_NAME_LENGTH] for key in wrong])}"
            )
        state_dict.update(shard)
    return state_dict


def _beside(index: Path, name: str) -> Path:
    """The file of that name in the folder of an index. Raises ValueError for one that lies anywhere else."""
    folder = index.parent.resolve()
    # A snapshot of the Hub's cache links to the blobs of its own repository, two folders up.
    allowed = {folder, folder.parent.parent / "blobs"} if folder.parent.name == "snapshots" else {folder}
    is_plain = name == os.path.basename(name) and name not in ("", ".", "..") and not name.endswith(INDEX_ENDING)
    # Not `Path.resolve`, which raises RuntimeError for links in a ring; and no file name has other characters.
    if not is_plain or not name.isprintable() or Path(os.path.realpath(folder / name)).parent not in allowed:
        raise ValueError(
            f"{index} names the shard {name[:MAX_NAME_LENGTH]!r}, which must be a file beside it, not a path or a link "
            "away"
        )
    return folder / name


# What a pickle describes


def _described(root: Any) -> dict[str, View]:
    """The tensors of a module, or of a state dict, which may lie under a key of STATE_KEYS."""
    if isinstance(root, Module):
        root = dict(_module_tensors(root, "", set()))
    for key in STATE_KEYS:
        if isinstance(root, dict) and isinstance(root.get(key), dict):
            root = root[key]
    if not isinstance(root, dict) or not root:
        raise ValueError(f"it must hold a state dict, names and their tensors; got {type(root).__name__}")
    foreign = [name for name, value in root.items() if not (isinstance(name, str) and isinstance(value, View))]
    if foreign:
        raise ValueError(
            "it must hold a state dict, dense tensors by name; these are something else: "
            f"{listing([str(name) for name in foreign])}"
        )
    return root


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


# The files of torch: where the numbers lie

_MAGIC = 0x1950A86A20F9469CFC6C, 1001  # what a file of torch < 1.6 starts with, two pickles


def _read_zip(path: Path) -> dict[str, torch.Tensor]:
    """A TorchScript archive or a file of `torch.save`: a pickle, and a record for each row of numbers."""
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
        pickled = Pickle()
        views = _described(pickled.load(io.BytesIO(archive.read(roots[0] + "data.pkl"))))
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
    """Where in the file the data of a record begin."""
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


def _read_legacy(path: Path) -> dict[str, torch.Tensor]:
    """A file of `torch.save` before torch 1.6: five pickles, then each row of numbers behind its length."""
    with open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        magic = [Pickle().load(content), Pickle().load(content)]
    except ValueError as error:
        if str(error).startswith("it names"):
            raise
        magic = []
    if magic != list(_MAGIC):
        raise ValueError("it is truncated, or no file of safetensors or torch")
    system = Pickle().load(content)
    _check_byte_order(isinstance(system, dict) and system.get("little_endian") is (sys.byteorder == "little"))
    pickled = Pickle()
    views = _described(pickled.load(content))
    keys = Pickle().load(content)
    is_list = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not is_list or sorted(keys) != sorted(pickled.storages):
        raise ValueError("its list of records is corrupt")
    begins = {}
    for key in keys:
        storage = pickled.storages[key]
        (numel,) = struct.unpack("<q", content.read(8))
        begins[key] = content.tell()
        if numel != storage.numel or numel < 0:
            raise ValueError(f"record {key} must have {storage.numel} numbers, got {numel}")
        content.seek(numel * storage.dtype.itemsize, os.SEEK_CUR)  # raises behind the end
    if content.tell() != len(content):
        raise ValueError(f"{len(content) - content.tell()} bytes behind its last record belong to nothing")
    return _tensors(views, content, lambda storage: begins[storage.key])


def _check_byte_order(is_ours: bool) -> None:
    if not is_ours:
        raise ValueError(f"its numbers are not in this machine's order of bytes, {sys.byteorder} end first")


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
