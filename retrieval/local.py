"""The embedder over a stream of items on this machine: threads read, the model embeds, in the order of the source."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from vit_embed.retrieval.embedder import PictureEmbedder, Rows, TextEmbedder
from vit_embed.retrieval.sources import Item

T = TypeVar("T")
# Batches that are read while one is embedded.
AHEAD = 2


class Clock:
    """Seconds of reading and of the model, summed over threads."""

    def __init__(self) -> None:
        self.read = self.model = 0.0

    def shares(self) -> str:
        total = self.read + self.model
        return f"{self.read / total:.0%} read, {self.model / total:.0%} model" if total else ""


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def embed_items(
    embedder: PictureEmbedder | TextEmbedder,
    items: Iterable[Item],
    batch_size: int,
    workers: int,
    clock: Clock | None = None,
) -> Iterator[Rows]:
    """Items -> a `Rows` for each batch of them, in order.

    Threads are enough: Pillow decodes and resizes without Python's lock, and nothing is copied between processes.
    No more than AHEAD batches are read before the model takes them.
    """
    clock = clock or Clock()

    def read(item: Item) -> Any:
        start = time.thread_time()
        found = embedder.read(item)
        clock.read += time.thread_time() - start
        return found

    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[list[Any]] = deque()
        try:
            for batch in batches(items, batch_size):
                waiting.append([pool.submit(read, item) for item in batch])
                if len(waiting) > AHEAD:
                    yield _embedded(embedder, waiting.popleft(), clock)
            while waiting:
                yield _embedded(embedder, waiting.popleft(), clock)
        finally:
            for futures in waiting:
                for future in futures:
                    future.cancel()


def _embedded(embedder: Any, futures: list[Any], clock: Clock) -> Rows:
    read = [future.result() for future in futures]
    start = time.perf_counter()
    rows = embedder.embed(read)
    clock.model += time.perf_counter() - start
    return rows
