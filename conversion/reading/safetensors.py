"""Files of safetensors."""

import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


def is_safetensors(start: bytes) -> bool:
    """Whether a file that begins so is one: the length of its header in eight bytes, and the header is JSON."""
    return start[8:9] == b"{"


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by name, mapped from it."""
    with safe_open(path, framework="pt") as file:  # checks that the header's offsets fill the file
        names = list(file.keys())
        with open(path, "rb") as content:
            header = content.read(struct.unpack("<Q", content.read(8))[0])
        # Of two tensors with one name the library takes one.
        entries = json.loads(header, object_pairs_hook=_unique)
        if set(names) != entries.keys() - {"__metadata__"}:
            raise ValueError("its header can be read in two ways")
        return {name: file.get_tensor(name) for name in names}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises ValueError for two entries of one name."""
    result = dict(pairs)
    if len(result) < len(pairs):
        [(name, count)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"its header has {count} entries named {name[:40]!a}")
    return result
