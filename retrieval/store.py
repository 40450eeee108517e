"""Rows -> parquet shards that are whole or absent, and what is in them already.

    photos.parquet/part-00000.parquet ...          path, width, height, embedding
    photos.errors.parquet/part-00000.parquet ...   path, stamp, reason: what of that shard could not be read

A shard is written aside, flushed to disk and renamed, its errors before it: a shard that is there is whole, and its
errors with it. So a run that was killed goes on after the last shard, with the batches that it would have had.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vit_embed.retrieval.embedder import Failure, Rows
from vit_embed.retrieval.sources import Item

# What says where things lie, not what they are: a folder may be moved.
NAMES = {"model", "source", "split", "column"}
# Of a shard's metadata: what its embeddings are of, and when it was written.
ABOUT, WRITTEN = b"vit_embed", b"written"
DIGEST_BYTES = 16  # 12 in base64
# How long a process waits for the first one of its run.
SECONDS_TO_JOIN = 10
VECTOR_DTYPES = {"float16": pa.float16(), "float32": pa.float32()}
ERRORS = pa.schema([("path", pa.string()), ("stamp", pa.string()), ("reason", pa.string())])


class Counts(NamedTuple):
    """Rows of a store: embedded, and unreadable."""

    embedded: int = 0
    unreadable: int = 0


class Store:
    """The parquet shards of one run after another over one source.

    Args:
        path: a folder, whose name ends in .parquet. about: of the model and the processing, see `Embedder.about`.
        vector_dtype: of VECTOR_DTYPES. rank: of this process, where several write a share each; run: the same for all
            of these, and another for every other run.

    Raises:
        ValueError: what is there is no store, or of another model or processing.
        OSError: it cannot be written to.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        about: dict[str, Any],
        vector_dtype: str = "float16",
        rank: int | None = None,
        run: str = "",
    ):
        self.path, self.rank, self.run = Path(path), rank, run
        if self.path.suffix != ".parquet":
            raise ValueError(f"expected --output to end in .parquet, got {path}")
        if self.path.is_file():
            raise ValueError(f"expected --output to be a new name or a folder of shards, {path} is a file")
        self.errors = self.path.with_suffix(".errors.parquet")
        self.prefix = "part-" if rank is None else f"part-r{rank:03d}-"
        self.hidden = f".{self.path.name}" if rank is None else f".{self.path.name}.{rank}"
        self.aside = self.path.with_name(f"{self.hidden}.partial")
        self.about = {**about, "vector_dtype": vector_dtype}
        self.element = VECTOR_DTYPES[vector_dtype]
        self.path.mkdir(parents=True, exist_ok=True)
        if not os.access(self.path, os.W_OK):
            raise PermissionError(f"--output {path} cannot be written to")
        for shard in self.shards():
            check_about(shard, self.about)
        self._check_source()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other runs out; the lock goes with the process that holds it.

        Raises:
            ValueError: another run writes here.
        """
        with contextlib.ExitStack() as stack:
            self._lock = stack.enter_context(open(self.path.with_name(f".{self.path.name}.lock"), "a+"))
            self._enter_run()
            if self.rank is not None:
                own = stack.enter_context(open(self.path.with_name(f"{self.hidden}.lock"), "a+"))
                if not _locks(own, fcntl.LOCK_EX):
                    raise self._busy()
            self.errors.mkdir(exist_ok=True)
            self.aside.mkdir()
            try:
                yield
            finally:
                shutil.rmtree(self.aside, ignore_errors=True)

    def _enter_run(self) -> None:
        """Takes the lock of the store: alone, or together with the other processes of this run."""
        deadline = time.monotonic() + SECONDS_TO_JOIN
        while True:
            if is_first := _locks(self._lock, fcntl.LOCK_EX):
                for number in ("", ".[0-9]*"):  # of runs that were killed
                    for aside in self.path.parent.glob(f".{self.path.name}{number}.partial"):
                        shutil.rmtree(aside, ignore_errors=True)
                self._lock.truncate(0)
                self._lock.write(self.run)
                self._lock.flush()
            if self.rank is None and is_first:
                return
            if self.rank is not None and _locks(self._lock, fcntl.LOCK_SH):
                self._lock.seek(0)
                if self._lock.read() == self.run:
                    return
                raise self._busy()
            if self.rank is None or time.monotonic() > deadline:
                raise self._busy()
            time.sleep(0.05)  # the first process has the lock for itself until it has written which run it is of

    def is_last(self) -> bool:
        """Whether no other process of this run is left; then the store is this one's. Its part of the lock ends."""
        return self.rank is None or _locks(self._lock, fcntl.LOCK_EX)

    def _busy(self) -> ValueError:
        return ValueError(f"another run writes to {self.path}; wait for it, or name another --output")

    def _check_source(self) -> None:
        """ValueError where the store is of another source, which is still there: names of both would be mixed up."""
        shard = next(iter(self.shards()), None)
        before, now = (read_about(shard) if shard else {}).get("source"), self.about.get("source")
        if before and now and before != now and os.path.exists(before):
            raise ValueError(f"{self.path} holds embeddings of {before}, which is still there; name another --output")

    def shards(self) -> list[Path]:
        return sorted(self.path.glob("part-*.parquet"))

    def counts(self) -> Counts:
        shards = self.shards()
        errors = [self.errors / shard.name for shard in shards]
        return Counts(
            sum(pq.read_metadata(shard).num_rows for shard in shards),
            sum(pq.read_metadata(file).num_rows for file in errors if file.exists()),
        )

    def known(self, again: bool = False) -> Known:
        """What is here already, errors among it unless they are to be tried `again`."""
        digests, keys, embedded = [_digests(())], [_digests(())], [_digests(())]
        for shard in self.shards():
            for file in (shard, self.errors / shard.name):
                if file.exists():
                    rows = pq.read_table(file, columns=["path", "stamp"]).to_pylist()
                    keys.append(_digests((row["path"], "") for row in rows))
                    if file is shard:
                        embedded.append(keys[-1])
                    if not again or file is shard:
                        digests.append(_digests((row["path"], row["stamp"]) for row in rows))
        return Known(*(np.sort(np.concatenate(each)) for each in (digests, keys, embedded)))

    def write(self, rows: Sequence[Rows]) -> Path:
        """A shard of batches, whole or not at all."""
        failures = [failure for batch in rows for failure in batch.failures]
        return self.write_tables(rows_table(rows, self.about, self.element), error_table(failures))

    def write_tables(self, rows: pa.Table, errors: pa.Table) -> Path:
        """A shard of rows (as of `rows_table`) and its errors; its name comes after those that are there."""
        numbers = [int(shard.stem.rpartition("-")[2]) for shard in self.path.glob(f"{self.prefix}*.parquet")]
        name = f"{self.prefix}{max(numbers, default=-1) + 1:05d}.parquet"
        self._put(self.errors / name, errors)
        self._put(self.path / name, rows.replace_schema_metadata(_metadata(self.about)))
        return self.path / name

    def drop_replaced(self) -> int:
        """Takes out all but the last row of each item: older ones of items that changed, doubles. Their number."""
        seen: set[bytes] = set()
        dropped = 0
        for shard in sorted(self.shards(), key=written, reverse=True):
            for file in (shard, self.errors / shard.name):
                if file.exists():
                    table = pq.read_table(file)
                    keys = [digest(key, "") for key in table["path"].to_pylist()]
                    last = {key: place for place, key in enumerate(keys)}
                    kept = [key not in seen and last[key] == place for place, key in enumerate(keys)]
                    if not all(kept):
                        self._put(file, table.filter(pa.array(kept)))
                        dropped += kept.count(False)
                    seen.update(keys)
        return dropped

    def _put(self, target: Path, table: pa.Table) -> None:
        aside = self.aside / f"{target.parent.name}-{target.name}"
        with open(aside, "wb") as file:
            pq.write_table(table, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class Known(NamedTuple):
    """Items that a store has, as sorted digests of 16 bytes, so that millions fit: of key and stamp, of the key, and of
    the key of what is embedded."""

    digests: np.ndarray
    keys: np.ndarray
    embedded: np.ndarray

    def has(self, item: Item) -> bool:
        """Whether the item is here as it is now. One without a stamp cannot be seen: what was embedded of it stays."""
        if _among(self.digests, digest(item.key, item.stamp)):
            return True
        return not item.stamp and _among(self.embedded, digest(item.key, ""))

    def has_replaced(self) -> bool:
        """Whether an item is here twice: it changed, or its source names it twice."""
        return bool((self.keys[1:] == self.keys[:-1]).any())


def _locks(file: TextIO, kind: int) -> bool:
    """Whether a file could be locked, or its lock changed, without waiting; a lock that it had may be gone if not."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _among(sorted_digests: np.ndarray, wanted: bytes) -> bool:
    place = int(np.searchsorted(sorted_digests, wanted))
    return place < len(sorted_digests) and sorted_digests[place] == wanted


def _digests(pairs: Iterable[tuple[str, str]]) -> np.ndarray:
    return np.array([digest(*pair) for pair in pairs], f"S{DIGEST_BYTES}")


def digest(key: str, stamp: str) -> bytes:
    text = f"{plain_key(key)}\0{stamp}".encode("utf-8", "backslashreplace")
    return base64.b64encode(hashlib.blake2b(text, digest_size=12).digest())  # NumPy's bytes end at a zero


def written(shard: Path) -> int:
    return int(pq.read_schema(shard).metadata.get(WRITTEN, 0))


def plain_key(key: str) -> str:
    """A key that parquet can hold: what is not UTF-8 in it is written as an escape."""
    return key.encode("utf-8", "backslashreplace").decode()


def rows_table(rows: Sequence[Rows], about: dict[str, Any], element: pa.DataType) -> pa.Table:
    """Batches as one table, with `about` in its metadata."""
    read = [each for batch in rows for each in batch.read]
    vectors = np.concatenate([batch.embeddings for batch in rows])
    columns: dict[str, Any] = {}
    items = [each if isinstance(each, Item) else each.item for each in read]
    columns["path"] = pa.array([item.key for item in items], pa.string())
    columns["stamp"] = pa.array([item.stamp for item in items], pa.string())
    if about["input"] == "texts":
        columns["text"] = pa.array([item.content for item in items], pa.string())
    else:
        columns["width"] = pa.array([each.width for each in read], pa.int32())
        columns["height"] = pa.array([each.height for each in read], pa.int32())
    if about.get("hashed"):
        columns["sha256"] = pa.array([each.sha256 for each in read], pa.string())
    columns["embedding"] = _vectors(vectors, element)
    if about.get("patches"):
        grids = [grid for batch in rows for grid in batch.patches]
        columns["grid_height"] = pa.array([grid.shape[0] for grid in grids], pa.int32())
        offsets = np.cumsum([0, *(grid.shape[0] * grid.shape[1] for grid in grids)])
        flat = np.concatenate([grid.reshape(-1, vectors.shape[1]) for grid in grids] or [vectors])
        columns["patches"] = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), _vectors(flat, element))
    return pa.table(columns).replace_schema_metadata(_metadata(about))


def _metadata(about: dict[str, Any]) -> dict[bytes, str]:
    return {ABOUT: json.dumps(about, sort_keys=True), WRITTEN: str(time.time_ns())}


def _vectors(vectors: np.ndarray, element: pa.DataType) -> pa.Array:
    flat = pa.array(vectors.astype(element.to_pandas_dtype()).reshape(-1), element)
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def error_table(failures: Iterable[Failure]) -> pa.Table:
    rows = [(plain_key(failure.item.key), failure.item.stamp, failure.reason) for failure in failures]
    return pa.Table.from_arrays([pa.array(column, pa.string()) for column in zip(*rows)] or [[]] * 3, schema=ERRORS)


def read_about(shard: Path) -> dict[str, Any]:
    """What a shard says of its embeddings.

    Raises:
        ValueError: it is none of ours.
    """
    metadata = pq.read_schema(shard).metadata or {}
    if ABOUT not in metadata:
        raise ValueError(f"{shard} was not written by vit_embed.embed_images: it does not say which model it is of")
    return json.loads(metadata[ABOUT])


def check_about(shard: Path, about: dict[str, Any]) -> None:
    """ValueError where the rows of a shard are not of this model and processing."""
    there = read_about(shard)
    different = [name for name in sorted({*there, *about} - NAMES) if there.get(name) != about.get(name)]
    if different:
        said = "; ".join(f"{name} {there.get(name)} there, {about.get(name)} now" for name in different)
        raise ValueError(
            f"{shard.parent} holds embeddings of {there.get('model')} made otherwise ({said}); name another --output"
        )
