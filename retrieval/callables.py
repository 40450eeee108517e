"""The embedder for loops and `map`s of others: a generator of rows, and a callable for batches of a data set."""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vit_embed.retrieval.embedder import PictureEmbedder, Rows, TextEmbedder, load_embedder
from vit_embed.retrieval.local import embed_items
from vit_embed.retrieval.sources import Address, Item, find_source


class Row(NamedTuple):
    """What became of a picture.

    path: its name in the source; its number, where it has none. embedding: (D,) float32 of unit length, None where the
    picture could not be read. width, height: of the picture, upright, 0 where unread. reason: why it was not read.
    """

    path: str
    embedding: np.ndarray | None
    width: int
    height: int
    reason: str | None


def embed(
    images: str | os.PathLike | Iterable[Any],
    model: str | PictureEmbedder,
    *,
    batch_size: int = 64,
    workers: int | None = None,
    **options: Any,
) -> Iterator[Row]:
    """A row for each picture, in order; one that cannot be read has a reason in place of an embedding.

    Args:
        images: what `embed_images` takes as SOURCE; or paths, bytes, {bytes, path} or PIL pictures.
        model: folder or Hub id, or an embedder that is loaded already. workers: threads that read, None for one a core.
        options: of `load_embedder` (dtype, device, reduced), for a model that is loaded here.

    Raises:
        ValueError: there is no such source or model.
        TypeError: an image is none of the above.
    """
    if isinstance(images, bytes | Mapping | Image.Image):
        raise TypeError(f"expected a source's name or a list of pictures, got {type(images).__name__}; write [it]")
    if isinstance(images, str | os.PathLike):
        items = find_source(os.fspath(images)).items()
    else:
        items = (as_item(image, number) for number, image in enumerate(images))
    embedder = load_embedder(model, **options) if isinstance(model, str | os.PathLike) else model
    return _rows(items, embedder, batch_size, workers or os.cpu_count() or 1)


def _rows(items: Iterable[Item], embedder: PictureEmbedder, batch_size: int, workers: int) -> Iterator[Row]:
    waiting: deque[Item] = deque()

    def noted() -> Iterator[Item]:
        for item in items:
            waiting.append(item)
            yield item

    for batch in embed_items(embedder, noted(), batch_size, workers):
        yield from _in_order([waiting.popleft() for _ in range(len(batch.read) + len(batch.failures))], batch)


def _in_order(items: list[Item], batch: Rows) -> Iterator[Row]:
    """The rows of the items of a batch, which keeps those that could not be read apart."""
    read, failures = zip(batch.read, batch.embeddings), deque(batch.failures)
    for item in items:
        if failures and failures[0].item is item:
            yield Row(item.key, None, 0, 0, failures.popleft().reason)
        else:
            each, vector = next(read)
            yield Row(item.key, vector, each.width, each.height, None)


def as_item(cell: Any, number: int) -> Item:
    """A picture as lists and data sets hold it; an empty cell becomes one that cannot be read.

    Raises:
        TypeError: it is of another kind.
    """
    name = str(number)
    if isinstance(cell, Mapping):
        name = cell.get("path") or name
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, Item):
        return cell
    if isinstance(cell, str | os.PathLike):
        path = os.fspath(cell)
        return Item(path, "", Address(path) if "://" in path else path)
    if isinstance(cell, Image.Image):
        name = getattr(cell, "filename", "") or name
    elif cell is None:
        cell = b""
    elif not isinstance(cell, bytes):
        raise TypeError(f"expected paths, bytes, {{bytes, path}} or PIL pictures, got {type(cell).__name__}")
    return Item(str(name), "", cell)


class EmbedPictures:
    """`embed_pictures(batch)` for `Dataset.map(..., batched=True)`, Ray's `map_batches` and the like.

    It holds names and options and no model, so it is sent to other processes cheaply and `datasets` finds what it has
    cached; the model is loaded at the first batch in each process. With `datasets`:

        rows.map(embed_pictures, batched=True, features=embed_pictures.features(rows))

    Args:
        model: folder or Hub id. column: of the pictures, as `embed` takes them.
        batch_size: pictures that go through the model together. workers: threads that read, None for one a core.
        options: of `load_embedder`.
    """

    def __init__(
        self,
        model: str | Path,
        column: str = "image",
        *,
        batch_size: int = 64,
        workers: int | None = None,
        **options: Any,
    ):
        self.model, self.column, self.batch_size, self.workers = os.fspath(model), column, batch_size, workers
        self.options = options

    @property
    def embedder(self) -> PictureEmbedder | TextEmbedder:
        return _loaded(self.model, tuple(sorted(self.options.items())))

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """{column: list} -> the same with "embedding" ((D,) float32 or None) and "reason" (None where all is well).

        Raises:
            ValueError: there is no such column.
        """
        if self.column not in batch:
            raise ValueError(f"expected a column {self.column!r}, got {', '.join(batch)}; EmbedPictures(column=...)")
        items = [as_item(cell, number) for number, cell in enumerate(batch[self.column])]
        rows = list(_rows(items, self.embedder, self.batch_size, self.workers or os.cpu_count() or 1))
        # `Dataset.map` gives a mapping of its own, keeps its columns itself, and would encode decoded pictures again.
        kept = batch if isinstance(batch, dict) else {}
        return {**kept, "embedding": [row.embedding for row in rows], "reason": [row.reason for row in rows]}

    def features(self, data_set: Any) -> Any:
        """Features of a data set after this was mapped over it: `Dataset.map` cannot guess the type of "reason" from a
        first batch without one.
        """
        from datasets import Features, Sequence, Value

        return Features({**data_set.features, "embedding": Sequence(Value("float32")), "reason": Value("string")})

    def embed_items(self, items: Iterable[Item]) -> list[Rows]:
        """Items of a source -> their rows, by batches of the model."""
        return list(embed_items(self.embedder, items, self.batch_size, self.workers or os.cpu_count() or 1))


@functools.lru_cache(maxsize=1)
def _loaded(model: str, options: tuple[tuple[str, Any], ...]) -> PictureEmbedder | TextEmbedder:
    return load_embedder(model, **dict(options))
