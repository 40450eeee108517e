"""Files that are looked at before they are opened, and the JSON beside weights."""

import json
from pathlib import Path
from typing import Any

# An index of 100,000 tensors has 10 MB; Python's JSON takes some 20 times the bytes of a hostile one.
MAX_JSON_BYTES = 2**26


def check_file(path: Path) -> None:
    """Raises FileNotFoundError or ValueError unless `path` is a file; reading a pipe or a device might never end."""
    if not path.exists():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe or a device"
        raise ValueError(f"{path} must be a checkpoint file, but it is {kind}")


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
