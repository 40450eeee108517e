"""Files and folders that are whole or absent: written beside their place and renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_absent(path: Path) -> None:
    """ValueError where a file or folder would be written over."""
    if path.exists():
        raise ValueError(f"expected {path} not to exist; remove it or name another one")


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Gives a path beside `path`, with the same suffix, to write a file or a folder to.

    At the end it is renamed to `path`, replacing a file of that name (a folder that is not empty stays, with an
    OSError); after an error it is removed and `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        yield Path(scratch) / path.name
        os.replace(Path(scratch) / path.name, path)
