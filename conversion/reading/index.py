"""The index of a checkpoint in several files: which of them holds which tensor."""

import os
from pathlib import Path

from vit_embed.conversion.messages import MAX_LENGTH
from vit_embed.conversion.reading.files import read_json

INDEX_ENDING = ".index.json"


def read_index(path: Path) -> dict[str, str]:
    """{name of a tensor: name of a file}. Raises ValueError for another file."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{path} must be the index of a sharded checkpoint, with a weight_map of names and files")
    if not weight_map:
        raise ValueError(f"{path} must be the index of a sharded checkpoint, but its weight_map is empty")
    return weight_map


def shards(index: Path) -> dict[Path, set[str]]:
    """The files that an index names, each with the names of its tensors.

    Raises:
        ValueError: no index, or a file that lies elsewhere than beside it.
    """
    names: dict[str, set[str]] = {}
    for tensor, file in read_index(index).items():
        names.setdefault(file, set()).add(tensor)
    return {_beside(index, file): names[file] for file in sorted(names)}


def _beside(index: Path, name: str) -> Path:
    """The file of that name in the folder of an index. Raises ValueError for one that lies anywhere else."""
    folder = index.parent.resolve()
    # A snapshot of the Hub's cache links to the blobs of its own repository, two folders up.
    allowed = {folder, folder.parent.parent / "blobs"} if folder.parent.name == "snapshots" else {folder}
    is_plain = name == os.path.basename(name) and name not in ("", ".", "..") and not name.endswith(INDEX_ENDING)
    # Not `Path.resolve`, which raises RuntimeError for links in a ring; and no file name has other characters.
    if not is_plain or not name.isprintable() or Path(os.path.realpath(folder / name)).parent not in allowed:
        raise ValueError(
            f"{index} names the shard {name[:MAX_LENGTH]!r}, which must be a file beside it, not a path or a link away"
        )
    return folder / name
