"""What a contrastive batch teaches by: pairs whose captions differ. A run without them is refused before it starts."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from math import lgamma

import numpy as np
from transformers import TrainingArguments

from recipes.reading.captions import CAPTIONS

logger = logging.getLogger(__name__)

# Shares of batches with two different captions, below which a run is refused, and below which the log warns.
LEAST_SHARE, USUAL_SHARE = 0.5, 0.99
LARGER = (
    "set --per_device_train_batch_size to more (256, say); --contrastive_chunk_size N makes a batch of any size fit, a "
    "chunk of N pairs at a time"
)


def joined_batch(training: TrainingArguments) -> int:
    """Pairs whose loss is taken together: those of all processes, but not of several accumulated steps."""
    return training.train_batch_size * training.world_size


def check_batch_size(training: TrainingArguments) -> None:
    """ValueError for batches of one pair."""
    if joined_batch(training) < 2:
        raise ValueError(
            "expected at least 2 pairs in the joined batch of all processes, as each pair's negatives are the others "
            f"of its batch; got --per_device_train_batch_size {training.per_device_train_batch_size} on "
            f"{training.world_size} process, to which --gradient_accumulation_steps adds none; {LARGER}"
        )


def leave_out_single(count: int, training: TrainingArguments) -> None:
    """Sets --dataloader_drop_last where the last batch of an epoch would be one pair, which teaches nothing.

    Several processes fill their last batch from the first.
    """
    batch = joined_batch(training)
    if training.world_size == 1 and count > batch and count % batch == 1 and not training.dataloader_drop_last:
        logger.info("the last batch of an epoch would be one pair, which has no negative: it is left out")
        training.dataloader_drop_last = True


def share_that_teaches(ids: Iterable[int], batch: int) -> float:
    """The expected share of batches, drawn without replacement, that hold two different ids at least."""
    counts = np.array(list(Counter(ids).values()))
    total = int(counts.sum())
    batch = min(batch, total)

    def log_ways(count: int) -> float:
        return lgamma(count + 1) - lgamma(count - batch + 1)

    return 1.0 - sum(np.exp(log_ways(count) - log_ways(total)) for count in counts[counts >= batch])


def check_captions_differ(
    ids: Sequence[int], where: str, training: TrainingArguments, column: str | None, negatives: bool
) -> None:
    """ValueError where most batches hold one caption alone, in any number of pairs: nothing is learned from them.

    Pairs of equal first captions are not each other's negatives; where most rows have such the log says so.

    Args:
        ids: of the first caption of each row.
        where: names the rows, as "split 'train'".
        negatives: --duplicates_are_negatives.
    """
    counts, batch = Counter(ids), joined_batch(training)
    column = column or CAPTIONS
    if len(counts) < 2:
        raise ValueError(
            f"expected at least two different captions in {where}, all {len(ids)} rows have the same in column "
            f"{column!r}; set --caption_column"
        )
    share, most = share_that_teaches(ids, batch), max(counts.values())
    if share < USUAL_SHARE:
        found = (
            f"{most} of the {len(ids)} rows of {where} have the same caption in column {column!r}, so of batches of "
            f"{batch} pairs {1 - share:.0%} hold no other, and teach nothing"
        )
        if share < LEAST_SHARE:
            raise ValueError(f"expected batches whose captions differ: {found}; set --caption_column, or {LARGER}")
        logger.warning("%s; set --caption_column, or %s", found, LARGER)
    shared = sum(count for count in counts.values() if count > 1)
    if 2 * shared > len(ids):
        logger.warning(
            "%s: %d of %d rows share their first caption with others, %d captions differ; pairs of equal captions %s "
            "each other's negatives (--duplicates_are_negatives)",
            *(where, shared, len(ids), len(counts), "are" if negatives else "are not"),
        )
