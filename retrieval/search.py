"""The embeddings of a store -> the nearest of them to words and pictures.

Exact up to EXACT_LIMIT vectors: one product that reads each vector once. Above, an inverted file of faiss where one was
built (`build_index`); docs/embed-folders.md has the measured recall.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from vit_embed.retrieval.sources import Item, find_source
from vit_embed.retrieval.store import read_about, written

# Vectors that one query reads in about a second on two cores.
EXACT_LIMIT = 1_000_000
# Rows of a product, which is all that is held in float32.
BLOCK = 65_536
INDEX_FILE = "index.faiss"


class Vectors(NamedTuple):
    """The rows of a store: paths (N), embeddings (N, D) float16 or float32 of unit length, and what they are of."""

    path: Path
    paths: list[str]
    embeddings: np.ndarray
    about: dict[str, Any]

    def select(self, pattern: str) -> Vectors:
        """Those whose path fits a pattern as of `fnmatch`.

        Raises:
            ValueError: there is none.
        """
        kept = [place for place, path in enumerate(self.paths) if fnmatch.fnmatchcase(path, pattern)]
        if not kept:
            raise ValueError(f"no path of {self.path} fits {pattern!r}; the first is {self.paths[0]!r}")
        return self._replace(paths=[self.paths[place] for place in kept], embeddings=self.embeddings[kept])


class Hit(NamedTuple):
    """A row of the store and its cosine to the query."""

    path: str
    cosine: float


class Answer(NamedTuple):
    """hits: best first. stands_out: whether the best one is nearer than the best of as many unrelated ones would be."""

    hits: list[Hit]
    stands_out: bool


def load_vectors(path: str | os.PathLike) -> Vectors:
    """Reads a store.

    Raises:
        ValueError: it is none, or empty, or its shards are of different models.
    """
    path = Path(path)
    shards = sorted(path.glob("part-*.parquet")) if path.is_dir() else [path] if path.is_file() else []
    if not shards:
        raise ValueError(f"expected a folder that vit_embed.embed_images wrote, found none at {path}")
    about = read_about(shards[0])
    paths: list[str] = []
    parts = []
    for shard in sorted(shards, key=written):
        there = read_about(shard)
        if there["weights"] != about["weights"]:
            raise ValueError(f"{shard} is of another model than {shards[0]}")
        about = {**about, "source": there.get("source")}  # the newest: a folder may have been moved
        table = pq.read_table(shard, columns=["path", "embedding"])
        if table.num_rows:
            paths += table["path"].to_pylist()
            parts.append(_matrix(table["embedding"].combine_chunks()))
    if not paths:
        raise ValueError(f"{path} has no embeddings: none of its pictures could be read")
    embeddings = np.concatenate(parts)
    newest = {path: place for place, path in enumerate(paths)}
    if len(newest) < len(paths):  # a run was stopped before it took out the older rows of what changed
        places = sorted(newest.values())
        paths, embeddings = [paths[place] for place in places], embeddings[places]
    return Vectors(path, paths, embeddings, about)


def _matrix(column: pa.Array) -> np.ndarray:
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


def blocks(embeddings: np.ndarray) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows in float32), BLOCK at a time."""
    for start in range(0, len(embeddings), BLOCK):
        yield start, torch.from_numpy(embeddings[start : start + BLOCK]).float()


def nearest(embeddings: np.ndarray, queries: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` rows of the largest cosine to each query: cosines and places, both (queries, count), best first."""
    best, places = torch.zeros(len(queries), 0), torch.zeros(len(queries), 0, dtype=torch.int64)
    for start, rows in blocks(embeddings):
        cosines = queries @ rows.T
        top = cosines.topk(min(count, len(rows)), dim=1)
        best, places = torch.cat([best, top.values], 1), torch.cat([places, top.indices + start], 1)
        kept = best.topk(min(count, best.shape[1]), dim=1)
        best, places = kept.values, places.gather(1, kept.indices)
    return best, places


def combine(added: Sequence[torch.Tensor], subtracted: Sequence[torch.Tensor] = ()) -> torch.Tensor:
    """One query (1, D) of several vectors (D,) of unit length, added and subtracted.

    Raises:
        ValueError: they cancel out.
    """
    query = sum(added, torch.zeros_like([*added, *subtracted][0])) - sum(subtracted, torch.zeros(()))
    if query.norm() < 1e-3:
        raise ValueError("what is added and subtracted cancels out; nothing is left to search for")
    return (query / query.norm())[None].float().cpu()


def search(vectors: Vectors, query: torch.Tensor, count: int = 20) -> Answer:
    """The nearest rows to a query (1, D)."""
    index = index_of(vectors) if len(vectors.paths) > EXACT_LIMIT else None
    if index is None:
        cosines, places = nearest(vectors.embeddings, query, count)
    else:
        cosines, places = (torch.from_numpy(each) for each in index.search(query.numpy(), count))
    found = zip(places[0].tolist(), cosines[0].tolist())
    hits = [Hit(vectors.paths[place], cosine) for place, cosine in found if place >= 0]  # -1: the index has no more
    return Answer(hits, _stands_out(vectors.embeddings, query, hits))


def _stands_out(embeddings: np.ndarray, query: torch.Tensor, hits: list[Hit]) -> bool:
    """Whether the best cosine is beyond what the largest of as many draws from a normal distribution would be."""
    sample = embeddings[:: max(len(embeddings) // BLOCK, 1)]
    if len(sample) < 20:  # too few to say what is usual
        return True
    cosines = torch.from_numpy(sample).float() @ query[0]
    expected = math.sqrt(2 * math.log(len(embeddings)))
    return hits[0].cosine > float(cosines.mean() + expected * cosines.std())


def duplicates(vectors: Vectors, least: float) -> list[list[str]]:
    """Groups of paths that a chain of cosines of at least `least` joins, largest first."""
    parent = list(range(len(vectors.paths)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    for start, rows in blocks(vectors.embeddings):
        for other, columns in blocks(vectors.embeddings[start:]):
            for row, column in (rows @ columns.T >= least).nonzero().tolist():
                if start + row < start + other + column:
                    parent[root(start + other + column)] = root(start + row)
    groups: dict[int, list[str]] = {}
    for place, path in enumerate(vectors.paths):
        groups.setdefault(root(place), []).append(path)
    return sorted((group for group in groups.values() if len(group) > 1), key=len, reverse=True)


def build_index(vectors: Vectors) -> Path:
    """An inverted file over the vectors in float16, beside the shards; returns its path. Needs faiss.

    sqrt(N) * 4 lists, of which a search reads a 32nd.
    """
    import faiss

    count, width = vectors.embeddings.shape
    lists = max(1, min(int(4 * math.sqrt(count)), count // 40))
    index = faiss.index_factory(width, f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
    sample = np.random.default_rng(0).choice(count, min(count, 64 * lists), replace=False)
    index.train(vectors.embeddings[np.sort(sample)].astype(np.float32))
    for _, rows in blocks(vectors.embeddings):
        index.add(rows.numpy())
    target = index_path(vectors)
    aside = target.with_name(f".{target.name}.partial")
    faiss.write_index(index, str(aside))
    os.replace(aside, target)
    index_path(vectors, ".sha256").write_text(_digest(vectors))
    return target


def _digest(vectors: Vectors) -> str:
    """Changes when rows come, go or change."""
    digest = hashlib.sha256("\0".join(vectors.paths).encode())
    digest.update(np.ascontiguousarray(vectors.embeddings))
    return digest.hexdigest()


def index_path(vectors: Vectors, ending: str = "") -> Path:
    return vectors.path.with_suffix(f".{INDEX_FILE}{ending}")


def index_of(vectors: Vectors) -> Any | None:
    """The index of a store, or None where none was built, or since then rows have come or changed."""
    path, digest = index_path(vectors), index_path(vectors, ".sha256")
    if not path.exists() or not digest.exists() or digest.read_text() != _digest(vectors):
        return None
    import faiss

    index = faiss.read_index(str(path))
    index.nprobe = max(1, index.nlist // 32)
    return index


def open_pictures(vectors: Vectors, keys: Sequence[str]) -> dict[str, Item]:
    """The items of some paths of a store, from the source that it was made of.

    Raises:
        ValueError: the source is not there any more.
    """
    about = vectors.about
    source = find_source(about["source"], split=about["split"], column=about["column"])
    folder = Path(about["source"])
    if folder.is_dir() and not any((folder / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        return {key: Item(key, "", str(folder / key)) for key in keys}
    wanted, found = set(keys), {}
    for item in source.items():
        if item.key in wanted:
            found[item.key] = item
            if len(found) == len(wanted):
                break
    return found
