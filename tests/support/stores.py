"""Small folders of pictures, and what the stores made of them hold."""

import shutil
from pathlib import Path

import numpy as np
from embedded import reasons, rows

import vit_embed

REPO = Path(vit_embed.__file__).resolve().parent


def some_pictures(folder: Path, count: int) -> Path:
    """A folder of `count` of the pictures that ship, and of one file that is none."""
    folder.mkdir()
    for picture in sorted((REPO / "examples" / "pictures").glob("*.png"))[:count]:
        shutil.copy(picture, folder)
    (folder / "torn.png").write_bytes(b"no picture")
    return folder


def assert_same(store: Path, expected: Path) -> float:
    """Fails where two stores do not hold the same rows, embeddings to 1e-3; the largest difference."""
    found, wanted = rows(store), rows(expected)
    assert found.keys() == wanted.keys()
    largest = max(float(np.abs(found[path] - wanted[path]).max()) for path in wanted)
    assert largest <= 1e-3
    assert reasons(store).keys() == reasons(expected).keys()
    return largest
