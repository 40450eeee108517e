"""Checkpoint files written byte by byte, so that they can lie: pickles of torch's form, archives, safetensors."""

import io
import json
import pickle
import struct
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save

FLOATS = tuple(float(number) for number in range(6))


class Name(NamedTuple):
    """GLOBAL: something that a pickle imports, "module.name"."""

    dotted: str


class Call(NamedTuple):
    """REDUCE: what a pickle calls, and with what."""

    called: Any
    arguments: tuple


class Reference(NamedTuple):
    """BINPERSID: what a pickle asks its reader for."""

    reference: Any


def pickled(value: Any) -> bytes:
    """A pickle of protocol 2 with exactly these names, calls and references in it."""
    return b"\x80\x02" + instructions(value) + b"."


def instructions(value: Any) -> bytes:
    if isinstance(value, Name):
        return b"c" + value.dotted.replace(".", "\n").encode() + b"\n" if value.dotted.count(".") == 1 else _deep(value)
    if isinstance(value, Call):
        return instructions(value.called) + instructions(value.arguments) + b"R"
    if isinstance(value, Reference):
        return instructions(value.reference) + b"Q"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(instructions, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(instructions, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(instructions(key) + instructions(each) for key, each in value.items()) + b"u"
    return pickle.dumps(value, protocol=2)[2:-1]


def _deep(name: Name) -> bytes:
    module, _, last = name.dotted.rpartition(".")
    return b"c" + module.encode() + b"\n" + last.encode() + b"\n"


def storage(key: Any = "0", numel: Any = 6, kind: str = "torch.FloatStorage") -> Reference:
    return Reference(("storage", Name(kind), key, "cpu", numel))


def tensor(row: Any = None, offset: Any = 0, size: Any = (6,), stride: Any = (1,), *more: Any) -> Call:
    row = storage() if row is None else row
    return Call(
        Name("torch._utils._rebuild_tensor_v2"),
        (row, offset, size, stride, False, Call(Name("collections.OrderedDict"), ()), *more),
    )


def archive(data: bytes, records: dict[str, bytes] | None = None, root: str = "archive") -> bytes:
    """A file of `torch.save` with this pickle over these records."""
    records = {"0": struct.pack("=6f", *FLOATS)} if records is None else records
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(f"{root}/data.pkl", data)
        file.writestr(f"{root}/byteorder", sys.byteorder)
        for key, content in records.items():
            file.writestr(f"{root}/data/{key}", content)
    return buffer.getvalue()


def legacy(data: bytes, keys: Any = ("0",), rows: bytes | None = None, little: bool = True) -> bytes:
    """A file of `torch.save` before torch 1.6 with this pickle in it, this list (or pickle) of records, and these."""
    rows = struct.pack("=q6f", 6, *FLOATS) if rows is None else rows
    head = pickled(0x1950A86A20F9469CFC6C) + pickled(1001) + pickled({"little_endian": little})
    return head + data + (keys if isinstance(keys, bytes) else pickled(list(keys))) + rows


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header, JSON or bytes, and this length of it stated."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype: str = "F32", shape: Any = (6,), begin: Any = 0, end: Any = 24) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def small_state_dict() -> dict[str, torch.Tensor]:
    return {
        "layer.weight": torch.arange(12.0).reshape(3, 4),
        "layer.bias": torch.arange(3.0).half(),
        "steps": torch.tensor(7),
    }


class _Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Module()
        self.layer.weight = torch.nn.Parameter(small_state_dict()["layer.weight"])
        self.layer.register_buffer("bias", small_state_dict()["layer.bias"])
        self.register_buffer("steps", small_state_dict()["steps"])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + self.layer.weight + self.steps + self.layer.bias[0]


def valid_files() -> dict[str, bytes]:
    """`small_state_dict()` in every form that is read, by the name of a file."""
    files = {"a.safetensors": save(small_state_dict())}
    training = {"state_dict": small_state_dict(), "epoch": 3, "args": {"lr": 1e-3}}
    for name, new, content in (("zip.pt", True, training), ("legacy.pt", False, small_state_dict())):
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=new)
        files[name] = buffer.getvalue()
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; OpenAI's files are not going away
        torch.jit.save(torch.jit.trace(_Small(), torch.zeros(3, 4)), buffer)
    return {**files, "script.pt": buffer.getvalue()}


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
