"""Streams of captioned pictures: what cannot be done with them, and the training items that they become."""

from __future__ import annotations

import logging
import zlib
from collections import Counter
from itertools import islice

import torch
from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature
from transformers import CLIPTokenizer, TrainingArguments

from recipes.contrastive import ITEM, DataArguments, training_item
from recipes.data import LOST, NUM_NAMED, seeded
from recipes.negatives import check_captions_differ
from recipes.reading.captions import CAPTIONS, as_list
from recipes.reading.tables import IMAGE, PROBLEM, ROW
from recipes.reading.tars import NOTE
from recipes.retrieval import caption_id
from recipes.texts import EMPTY, caption_problem
from vit_embed.retrieval.pictures import UNREADABLE

logger = logging.getLogger(__name__)

BUFFER = 1000  # rows that are shuffled together
NUM_MARKS = 2**20  # of rows that were lost


def check_streaming(data: DataArguments, training: TrainingArguments) -> None:
    """Set how processes share a stream, each reading its own part; ValueError for what a stream cannot do."""
    if data.group_column is not None:
        raise ValueError("--group_column picks from rows that are all known, which those of a stream are not; drop one")
    if training.max_steps <= 0:
        raise ValueError("expected --max_steps beside --streaming, as nothing tells how many rows a stream has")
    strategies = ("eval_strategy", "save_strategy", "logging_strategy")
    by_epoch = [name for name in strategies if getattr(training, name) == "epoch"]
    if training.world_size > 1 and by_epoch:
        raise ValueError(
            f"the processes come to the end of their parts of a stream at different steps, got --{by_epoch[0]} epoch; "
            "set it to steps"
        )
    if training.world_size > 1 and training.gradient_accumulation_steps > 1:
        raise ValueError(
            "the processes come to the end of their parts of a stream at different steps, got "
            f"--gradient_accumulation_steps {training.gradient_accumulation_steps}; set it to 1"
        )
    if training.resume_from_checkpoint:
        logger.warning("a stream goes on where it was stopped if that was in its first pass; later, in its second")
    training.accelerator_config.dispatch_batches = False  # texts of a batch are as long as the longest of it


def check_first_rows(rows: IterableDataset, split: str, data: DataArguments, training: TrainingArguments) -> None:
    """As check_captions_differ, of the rows that are shuffled together first; warns of pictures in several rows."""
    first = [row for row in islice(undecoded(rows), BUFFER) if row.get(PROBLEM) is None and as_list(row[CAPTIONS])]
    if not first:
        raise ValueError(f"expected captioned pictures in split {split!r}, none of its first {BUFFER} rows is one")
    ids = [caption_id(as_list(row[CAPTIONS])[0]) for row in first]
    where = f"the first {len(first)} rows of split {split!r}, which are shuffled together,"
    check_captions_differ(ids, where, training, data.caption_column, data.duplicates_are_negatives)
    files = Counter(row[IMAGE]["path"] for row in first if row[IMAGE] and row[IMAGE]["bytes"] is None)
    several = [path for path, count in files.items() if count > 1]
    if several:
        logger.warning(
            "%d pictures are in several rows, as %s, which a stream cannot make one row with all captions, so they may "
            "be each other's negatives: leave out --streaming",
            *(len(several), several[0]),
        )


def undecoded(rows: IterableDataset) -> IterableDataset:
    """A stream whose pictures are bytes or paths, so that one that cannot be read does not end it."""
    return rows.cast_column(IMAGE, ImageFeature(decode=False))


def whole(rows: IterableDataset) -> Dataset:
    """All rows of a stream, for metrics."""
    return Dataset.from_list(list(undecoded(rows)), features=rows.features)


class StreamItems:
    """One row as lists of length one -> a training item likewise, or lists of length zero where it cannot be used.

    `lost` marks such rows by a number of their names, and each is named in the log once, whichever process or worker
    meets it.
    """

    def __init__(self, arguments: DataArguments, tokenizer: CLIPTokenizer, canvas: int, seed: int) -> None:
        self.arguments, self.tokenizer, self.canvas, self.seed = arguments, tokenizer, canvas, seed
        self.lost = torch.zeros(NUM_MARKS, dtype=torch.bool).share_memory_()
        self.noted: Counter[str] = Counter()

    def __call__(self, rows: dict[str, list], places: list[int]) -> dict[str, list]:
        row = {name: values[0] for name, values in rows.items()}
        problem, item = row.get(PROBLEM), None
        if problem is None:
            captions = as_list(row[CAPTIONS])
            problem = EMPTY if not captions else None
            try:
                if captions:
                    picture = ImageFeature().decode_example(row[IMAGE])
                    with seeded(self.seed, places[0]):
                        item = training_item({**row, IMAGE: picture}, self.arguments, self.tokenizer, self.canvas)
                    self.note(row[ROW], caption_problem(captions, self.tokenizer))
                    self.note(row[ROW], row.get(NOTE))
            except (*UNREADABLE, *LOST) as error:
                problem = f"an unreadable picture ({error})"
        if item is None:
            self.lose(row[ROW], problem)
        return {name: [] if item is None else [item[name]] for name in ITEM}

    def note(self, name: int | str, reason: str | None) -> None:
        """Names the first rows of each reason."""
        if reason is not None:
            self.noted[reason] += 1
            if self.noted[reason] <= NUM_NAMED:
                more = "; later ones are not named" if self.noted[reason] == NUM_NAMED else ""
                logger.warning("stream: row %s with %s%s", name, reason, more)

    def lose(self, name: int | str, problem: str) -> None:
        mark = zlib.crc32(str(name).encode()) % NUM_MARKS
        if not self.lost[mark]:
            self.lost[mark] = True
            logger.error("stream: row %s with %s", name, problem)  # an error: other processes log nothing less


def training_stream(
    rows: IterableDataset, arguments: DataArguments, tokenizer: CLIPTokenizer, canvas: int, seed: int
) -> IterableDataset:
    """Training items of a stream, shuffled in a buffer; rows that cannot be used are named and marked in its `lost`."""
    make = StreamItems(arguments, tokenizer, canvas, seed)
    shuffled = undecoded(rows).shuffle(seed=seed, buffer_size=BUFFER)
    items = shuffled.map(make, with_indices=True, batched=True, batch_size=1, remove_columns=rows.column_names)
    items.lost = make.lost  # RecipeTrainer counts them at the end
    return items
