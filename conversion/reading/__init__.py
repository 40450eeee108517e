"""The tensors in untrusted checkpoint files: no code that a file holds is ever run.

Tensors are mapped from their files, not copied, so that a checkpoint takes memory only while a tensor of it is looked
at (`vit_embed.conversion.memory`).
"""

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from vit_embed.conversion.messages import MAX_LENGTH, listing, one_line
from vit_embed.conversion.reading.files import check_file
from vit_embed.conversion.reading.index import INDEX_ENDING, shards
from vit_embed.conversion.reading.safetensors import is_safetensors, read_safetensors
from vit_embed.conversion.reading.torch_files import AVERAGED_FIRST, WeightsChoice, read_torch_file
from vit_embed.conversion.reading.torch_pickle import DTYPES, MAX_DIMENSIONS

# What DistributedDataParallel and torch.compile put in front of every name.
WRAPPERS = ("module.", "_orig_mod.")


def read_checkpoint(path: str | os.PathLike, choice: WeightsChoice = AVERAGED_FIRST) -> dict[str, torch.Tensor]:
    """The tensors of one file, or of all files that an index names, by their dotted names.

    Read are safetensors, TorchScript archives, and state dicts saved by `torch.save`, which may lie under a key of
    `torch_files.STATE_KEYS` and whose names may all start with one of WRAPPERS. Nothing that the file holds is run:
    the code of an archive is not looked at, and a pickle may only describe tensors.

    Args:
        choice: between the state dicts of a training checkpoint.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated, of another kind, or holds anything that is not a plain tensor; a shard lies
            elsewhere than beside its index, or has other tensors than the index says.
        OSError: the system does not let it be read.
    """
    path = Path(path)
    if path.name.endswith(INDEX_ENDING):
        return _read_shards(path, choice)
    check_file(path)
    if not path.stat().st_size:
        raise ValueError(f"{path} must be a checkpoint file, but it is empty")
    with open(path, "rb") as file:
        start = file.read(9)
    try:
        state_dict = _read_file(path, start, choice)
        _check_tensors(state_dict)
    # Whatever a broken or hostile file makes a parser raise: OSError too, by sending it to places outside the file.
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {one_line(error)}") from error
    if any(name.startswith(WRAPPERS) for name in state_dict):  # torch's AveragedModel counts its steps beside
        state_dict.pop("n_averaged", None)
    for prefix in (*WRAPPERS, *WRAPPERS):  # the one may wrap the other, either way
        if all(name.startswith(prefix) for name in state_dict):
            state_dict = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
    return state_dict


def _read_file(path: Path, start: bytes, choice: WeightsChoice) -> dict[str, torch.Tensor]:
    if not is_safetensors(start):
        return read_torch_file(path, start, choice)
    if choice.key is not None:
        raise ValueError(f"--weights_key {choice.key} is for checkpoints of torch.save; safetensors have no such entry")
    return read_safetensors(path)


def _read_shards(index: Path, choice: WeightsChoice) -> dict[str, torch.Tensor]:
    state_dict: dict[str, torch.Tensor] = {}
    for path, expected in shards(index).items():
        shard = read_checkpoint(path, choice)
        if wrong := sorted(expected.symmetric_difference(shard)):
            raise ValueError(
                f"{index} says that {path.name} has {len(expected)} tensors, but the file has {len(shard)}; in one of "
                f"them alone: {listing([ascii(name)[:MAX_LENGTH] for name in wrong])}"
            )
        state_dict.update(shard)
    return state_dict


def _check_tensors(state_dict: Mapping[str, torch.Tensor]) -> None:
    if not state_dict:
        raise ValueError("it must hold a state dict, names and their tensors, but there is none in it")
    for name, tensor in state_dict.items():
        # A tensor's name is printed in messages; one of a ViT has about 60 characters.
        if not name.isprintable() or len(name) > MAX_LENGTH:
            raise ValueError(f"a tensor's name must be a word of at most {MAX_LENGTH} letters, got {name[:40]!a}")
        if tensor.dtype not in DTYPES.values():
            raise ValueError(f"{name} must be a tensor of numbers, got {tensor.dtype}")
        # torch lets a tensor of no numbers have sides of any length.
        if tensor.dim() > MAX_DIMENSIONS or (not tensor.numel() and max(tensor.shape) > 2**31):
            raise ValueError(f"{name} has {tensor.dim()} dimensions, the longest {max(tensor.shape)}; it is corrupt")
