"""A source, an embedder and a store -> a run that can be killed and goes on."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from vit_embed.retrieval.embedder import PictureEmbedder, TextEmbedder
from vit_embed.retrieval.local import Clock, batches, embed_items
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
    has_replaced = False
    with store.locked():
        known = store.known(retry_errors)
        if share.of == 1 and known.has_replaced():
            store.drop_replaced()
        clock = Clock()
        total = source.total()
        with tqdm(total=total and total // share.of, unit="image", smoothing=0.05, dynamic_ncols=True) as bar:
            todo = _new(share.items(source), known, bar)
            for shard in batches(todo, shard_size):
                has_replaced = has_replaced or any(known.had(item) for item in shard)
                rows = []
                for batch in embed_items(embedder, shard, batch_size, workers, clock):
                    rows.append(batch)
                    for failure in batch.failures[: max(SAID - unreadable, 0)]:
                        tqdm.write(f"left out: {failure.item.key!r}: {failure.reason}")
                    embedded, unreadable = embedded + len(batch.read), unreadable + len(batch.failures)
                    bar.update(len(batch.read) + len(batch.failures))
                    bar.set_postfix_str(clock.shares(), refresh=False)
                store.write(rows)
        if share.of > 1:  # what others have replaced, too; not while they write
            has_replaced = store.is_last() and store.known().has_replaced()
        if has_replaced:
            store.drop_replaced()
    return Counts(embedded, unreadable)


def _new(items: Iterator[Item], known: Known, bar: Any) -> Iterator[Item]:
    """Items that are not known; the bar does not count those that are."""
    for item in items:
        if not known.has(item):
            yield item
        elif bar.total:
            bar.total -= 1
