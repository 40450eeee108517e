"""Files and folders that appear whole or not at all, and never over what is already there."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

# Endings of a weights file, and how it is written.
SAFETENSORS_ENDING = ".safetensors"
TORCH_ENDINGS = (".pt", ".pth", ".bin")


def check_output_dir(path: Path) -> None:
    """Raises FileExistsError unless `path` is free or an empty folder."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if os.path.lexists(path):
        kind = "a folder with files in it" if path.is_dir() else "a file"
        raise FileExistsError(f"--output_dir must be a new or an empty folder, {path} is {kind}; choose another")


def check_output_file(path: Path) -> None:
    """Raises FileExistsError unless `path` is free, ValueError for an ending that no format of weights has."""
    if not path.name.endswith((SAFETENSORS_ENDING, *TORCH_ENDINGS)):
        endings = ", ".join((SAFETENSORS_ENDING, *TORCH_ENDINGS))
        raise ValueError(f"--output_file must end in one of {endings}, got {path.name!r}")
    if os.path.lexists(path):
        raise FileExistsError(f"--output_file must be a new file, {path} exists; choose another")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the block ends and leaves nothing behind when it fails.

    Raises:
        FileExistsError: another process has made `path`, which stays as it is.
    """
    with _aside(path) as partial:
        partial.mkdir()
        if path.is_dir():
            shutil.copymode(path, partial)  # it may have been made for a few to see
        yield partial
        for written in (*partial.rglob("*"), partial):
            _finish(written)
        try:
            os.rename(partial, path)  # over an empty folder too, never over one with files in it
        except OSError as error:
            check_output_dir(path)
            raise error
    _sync_folder(path.parent)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """As `new_folder`, for a file."""
    with _aside(path) as partial:
        yield partial
        _finish(partial)
        try:
            os.link(partial, path)  # unlike a rename this refuses a file that has appeared meanwhile
        except FileExistsError:
            check_output_file(path)
            raise
        except OSError:  # a file system without hard links
            check_output_file(path)
            os.rename(partial, path)
        else:
            partial.unlink()
    _sync_folder(path.parent)


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A name beside `path`, so that the last step stays on one file system. Missing parents are made, and removed with
    what was written when the block fails."""
    made = [parent for parent in path.parents if not parent.exists()]
    partial = path.with_name(f".{path.name[:50]}.{uuid.uuid4().hex}.partial")  # a name has 255 bytes at most
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            partial.unlink()
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def _finish(path: Path) -> None:
    """Gives a file the mode that the user's umask says, and returns when it is on the disk: a full disk may say so
    only now."""
    if path.is_file():
        path.chmod(0o666 & ~_umask())  # safetensors keeps its files to their owner
        sync(path)
    else:
        _sync_folder(path)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    """As `sync`. Some file systems cannot, and a folder that one may write to need not be readable; what is in it is
    whole all the same."""
    with contextlib.suppress(OSError):
        sync(path)


def check_space(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Raises OSError where the disk has too little room."""
    needed = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"the weights need {needed / 1e6:.0f} MB, but the disk of {folder} has {free / 1e6:.0f} MB free; make "
            "room, write elsewhere, or take --dtype bfloat16"
        )


def write_state_dict(path: Path, ending: str, state_dict: Mapping[str, torch.Tensor]) -> None:
    """A file of weights in the format of an ending: safetensors, or a state dict by `torch.save`."""
    if ending == SAFETENSORS_ENDING:
        save_file(dict(state_dict), path, metadata={"format": "pt"})
    else:
        torch.save(dict(state_dict), path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
