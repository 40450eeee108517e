"""Bars for what takes long."""

from collections.abc import Iterator
from typing import BinaryIO

from tqdm import tqdm

MIN_BYTES = 100 * 2**20  # less than this takes no time
BLOCK_BYTES = 2**20


def progress(what: str, num_bytes: int) -> tqdm:
    """A bar that counts bytes; silent below MIN_BYTES."""
    return tqdm(total=num_bytes or None, desc=what, unit="B", unit_scale=True, disable=num_bytes < MIN_BYTES)


def blocks(file: BinaryIO, what: str, num_bytes: int) -> Iterator[bytes]:
    """The content of an open file, block by block, with a bar where it is long."""
    with progress(what, num_bytes) as bar:
        while block := file.read(BLOCK_BYTES):
            yield block
            bar.update(len(block))
