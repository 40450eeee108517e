"""Small folders of pictures, and what the stores made of them hold."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

import vit_embed

REPO = Path(vit_embed.__file__).resolve().parent


def some_pictures(folder: Path, count: int) -> Path:
    """A folder of `count` of the pictures that ship, and of one file that is none."""
    folder.mkdir()
    for picture in sorted((REPO / "examples" / "pictures").glob("*.png"))[:count]:
        shutil.copy(picture, folder)
    (folder / "torn.png").write_bytes(b"no picture")
    return folder


def rows_of(store: Path) -> dict[str, np.ndarray]:
    """{path: embedding} of all shards; fails where a path is there twice."""
    rows = [row for shard in sorted(store.glob("part-*.parquet")) for row in pq.read_table(shard).to_pylist()]
    found = {row["path"]: np.array(row["embedding"], np.float32) for row in rows}
    assert len(found) == len(rows), "a row is there twice"
    return found


def errors_of(store: Path) -> list[str]:
    """Paths in the errors of all shards."""
    files = sorted(store.with_suffix(".errors.parquet").glob("part-*.parquet"))
    return [path for file in files for path in pq.read_table(file)["path"].to_pylist()]


def assert_same(store: Path, expected: Path) -> float:
    """Fails where two stores do not hold the same rows, embeddings to 1e-3; the largest difference."""
    rows, wanted = rows_of(store), rows_of(expected)
    assert rows.keys() == wanted.keys()
    largest = max(float(np.abs(rows[path] - wanted[path]).max()) for path in wanted)
    assert largest <= 1e-3
    assert sorted(errors_of(store)) == sorted(errors_of(expected))
    return largest
