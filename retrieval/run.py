"""A source, an embedder and a store -> a run that can be killed and goes on."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from vit_embed.retrieval.embedder import PictureEmbedder, Rows, TextEmbedder
from vit_embed.retrieval.local import embed_items
from vit_embed.retrieval.sources import Item, Source
from vit_embed.retrieval.store import Counts, Known, Store, plain_key

logger = logging.getLogger(__name__)

# What a run says of unreadable items one by one; the rest stands in the errors.
SAID = 5


class Share:
    """Which items of a source are one process's: by their keys, so that processes may list it at different times."""

    def __init__(self, rank: int = 0, of: int = 1):
        self.rank, self.of = rank, of

    def items(self, source: Source) -> Iterator[Item]:
        for item in source.items():
            if self.of == 1 or zlib.crc32(plain_key(item.key).encode()) % self.of == self.rank:
                yield item


def embed_into(
    store: Store,
    source: Source,
    embedder: PictureEmbedder | TextEmbedder,
    *,
    batch_size: int = 64,
    shard_size: int = 4096,
    workers: int = 4,
    retry_errors: bool = False,
    share: Share | None = None,
) -> Counts:
    """Embeds what of the source is not in the store, or has changed since, and returns what was added.

    Args:
        shard_size: items of a shard, which is what a run loses when it is killed.
        workers: threads that read. retry_errors: whether what could not be read is tried again.

    Raises:
        ValueError: another run writes to the store.
        OSError: the disk is full. What was written before stays.
    """
    share = share or Share()
    embedded = unreadable = 0
    with store.locked():
        known = store.known(retry_errors)
        if share.of == 1 and known.has_replaced():
            store.drop_replaced()
        total = source.total()
        with tqdm(total=total and total // share.of, unit="image", smoothing=0.05, dynamic_ncols=True) as bar:
            todo = _new(share.items(source), known, bar)
            rows: list[Rows] = []
            held = 0
            for batch in embed_items(embedder, todo, batch_size, workers):
                rows.append(batch)
                for failure in batch.failures[: max(SAID - unreadable, 0)]:
                    tqdm.write(f"left out: {failure.item.key!r}: {failure.reason}")
                embedded, unreadable = embedded + len(batch.read), unreadable + len(batch.failures)
                bar.update(len(batch.read) + len(batch.failures))
                bar.set_postfix_str(embedder.clock.shares(), refresh=False)
                held += len(batch.read) + len(batch.failures)
                if held >= shard_size:  # a batch is never cut, so that a run which goes on has the same ones
                    store.write(rows)
                    rows, held = [], 0
            if rows:
                store.write(rows)
        # Not while other processes write.
        if store.is_last() and store.known().has_replaced():
            store.drop_replaced()
    return Counts(embedded, unreadable)


def _new(items: Iterator[Item], known: Known, bar: Any) -> Iterator[Item]:
    """Items that are not known; the bar does not count those that are."""
    for item in items:
        if not known.has(item):
            yield item
        elif bar.total:
            bar.total -= 1
