"""The embedder over a stream of items on this machine: threads read, the model embeds, in the order of the source."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from vit_embed.retrieval.embedder import PictureEmbedder, Rows, TextEmbedder
from vit_embed.retrieval.sources import Item

T = TypeVar("T")
# Batches that are read while one is embedded.
AHEAD = 2


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def embed_items(
    embedder: PictureEmbedder | TextEmbedder,
    items: Iterable[Item],
    batch_size: int,
    workers: int,
) -> Iterator[Rows]:
    """Items -> a `Rows` for each batch of them, in order.

    Threads are enough: Pillow decodes and resizes without Python's lock, and nothing is copied between processes.
    No more than AHEAD batches are read before the model takes them.
    """
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[list[Any]] = deque()
        try:
            for batch in batches(items, batch_size):
                waiting.append([pool.submit(embedder.read, item) for item in batch])
                if len(waiting) > AHEAD:
                    yield embedder.embed([future.result() for future in waiting.popleft()])
            while waiting:
                yield embedder.embed([future.result() for future in waiting.popleft()])
        finally:
            for futures in waiting:
                for future in futures:
                    future.cancel()
