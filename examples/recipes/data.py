"""Rows of a data set for the recipes: holding out, checking, and drawing at random. `reading/` opens data sets.

Rows are named as their user knows them in the log and in sheets: the column ROW stays with its row through every
selection.
"""

from __future__ import annotations

import contextlib
import csv
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from PIL import Image
from tqdm import tqdm
from transformers import TrainingArguments

from recipes.arguments import DataArguments
from recipes.files import written_aside
from recipes.reading.tables import PROBLEM, ROW
from vit_embed.retrieval.pictures import UNREADABLE, read_rgb

logger = logging.getLogger(__name__)

NUM_NAMED = 10  # rows that the log names for each finding
# What reading a file raises that is gone or was cut off; a ValueError is more often a fault of ours.
LOST = (OSError, SyntaxError, EOFError, Image.DecompressionBombError)
MOST_LOST_IN_A_ROW = 20  # neighbours; beyond that the disk is gone rather than a file


# --- columns ---


def columns_of(rows: Dataset) -> list[str]:
    """The columns that the user knows."""
    return [name for name in rows.column_names or () if name not in (ROW, PROBLEM)]


def require_columns(rows: Dataset, split: str, flags: dict[str, str | None]) -> None:
    """ValueError for a column that is asked for and is not there.

    Args:
        flags: {flag of the command line: the column it names, or None}.
    """
    missing = sorted({column for column in flags.values() if column is not None} - set(rows.column_names or ()))
    if missing:
        raise ValueError(
            f"expected columns {missing} in split {split!r}, found {columns_of(rows)}; set {', '.join(flags)}"
        )


# --- splits ---


def wanted_splits(arguments: DataArguments, training: TrainingArguments, splits: Mapping[str, object]) -> list[str]:
    """The splits that --do_train, --do_eval and --do_predict need, each once; for --check_only all that are there."""
    if arguments.check_only:
        return [name for name in dict.fromkeys(arguments.splits) if name in splits]
    names = [arguments.train_split] * training.do_train + arguments.validation_splits * training.do_eval
    return list(dict.fromkeys(names + [arguments.test_split] * training.do_predict))


def random_rows(rows: Dataset, share: float, seed: int) -> np.ndarray:
    """The numbers of a `share` of the rows, at least one, drawn by `seed`."""
    count = max(1, round(share * len(rows)))
    return np.random.default_rng(seed).permutation(len(rows))[:count]


def hold_out(
    splits: DatasetDict,
    arguments: DataArguments,
    seed: int,
    choose: Callable[[Dataset, float, int], np.ndarray] = random_rows,
) -> DatasetDict:
    """The splits, with a validation split taken out of the training split where there is none.

    Args:
        choose: (training split, --validation_share, seed) -> the numbers of the rows to hold out.
    """
    train, validation = arguments.train_split, arguments.validation_splits[0]
    if len(arguments.validation_splits) > 1 or validation in splits or train not in splits:
        return splits
    chosen = np.sort(choose(splits[train], arguments.validation_share, seed))
    logger.info("no split %r: %d rows of %r are held out", validation, len(chosen), train)
    kept = np.setdiff1d(np.arange(len(splits[train])), chosen)
    return DatasetDict({**splits, train: splits[train].select(kept), validation: splits[train].select(chosen)})


def require_splits(splits: dict, wanted: list[str], dataset: str) -> None:
    """ValueError where a split that is asked for is missing."""
    missing = sorted(set(wanted) - set(splits))
    if missing:
        raise ValueError(
            f"expected splits {missing} in {dataset}, found {sorted(splits)}; set --train_split, --validation_split "
            "and --test_split"
        )


# --- checking ---


class Finding(NamedTuple):
    """Something that was found about a row, in words that continue "rows with"; by default the row is of no use."""

    reason: str
    drop: bool = True
    level: int = logging.WARNING


class Found(NamedTuple):
    """A finding about one row: its number in the rows that were checked, and its name."""

    number: int
    name: int | str
    finding: Finding


class Report:
    """What was found about the rows of each split, for the card, `--check_only` and the last line of the log."""

    def __init__(self) -> None:
        self.rows: dict[str, Dataset] = {}  # as they were checked
        self.kept: dict[str, int] = {}
        self.found: dict[str, list[Found]] = {}
        self.remarks: dict[str, list[str]] = {}  # more lines about a split, such as counts of its labels

    def add(self, split: str, rows: Dataset, kept: int, found: list[Found]) -> None:
        self.rows[split], self.kept[split], self.found[split] = rows, kept, found

    def num_left_out(self) -> int:
        return sum(len(rows) - self.kept[split] for split, rows in self.rows.items())

    def notes(self) -> dict[str, list[str]]:
        """Lines about each split: how many rows there are, and what was found, most first."""
        notes = {}
        for split, rows in self.rows.items():
            counts = Counter((each.finding.reason, each.finding.drop) for each in self.found[split])
            notes[split] = [f"{self.kept[split]:,} rows, {len(rows) - self.kept[split]:,} left out"]
            notes[split] += self.remarks.get(split, [])
            for (reason, drop), count in counts.most_common():
                notes[split].append(f"{count:,} {'left out' if drop else 'rows'} with {reason}")
        return notes

    def write(self, path: Path) -> None:
        """Every finding as a line of a csv: split, row, what was found, and whether the row was left out."""
        with written_aside(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(("split", "row", "found", "left out"))
            for split, found in self.found.items():
                table.writerows((split, each.name, each.finding.reason, each.finding.drop) for each in found)


def picture_findings(picture: Callable[[], Image.Image]) -> Iterator[Finding]:
    """What is wrong with a picture, or had to be changed, given a function that opens it."""
    try:
        for note in read_rgb(picture())[1]:
            yield Finding(note, drop=False, level=logging.INFO)
    except FileNotFoundError:
        yield Finding("a picture that is not there")
    except UNREADABLE:
        yield Finding("an unreadable picture")


def check_rows(
    rows: Dataset, split: str, examine: Callable[[int], Iterable[Finding]], report: Report | None = None
) -> Dataset:
    """The rows that are of use, before the first step; the others are counted and named in the log.

    Args:
        examine: number of a row -> what was found about it.
        report: takes what was found.

    Raises:
        ValueError: no row is of use.
    """
    names = rows[ROW][:] if ROW in rows.column_names else range(len(rows))
    problems = rows[PROBLEM][:] if PROBLEM in rows.column_names else [None] * len(rows)
    found: list[Found] = []
    kept = []
    for number in tqdm(range(len(rows)), desc=f"check {split}", disable=not logger.isEnabledFor(logging.INFO)):
        findings = [Finding(problems[number])] if problems[number] else list(examine(number))
        found += [Found(number, names[number], finding) for finding in findings]
        if not any(finding.drop for finding in findings):
            kept.append(number)
    if report is not None:
        report.add(split, rows, len(kept), found)
    by_finding: dict[Finding, list[int | str]] = defaultdict(list)
    for each in found:
        by_finding[each.finding].append(each.name)
    for finding, named in by_finding.items():
        more = " ..." if len(named) > NUM_NAMED else ""
        what = (split, len(named), finding.reason, named[:NUM_NAMED], more)
        logger.log(finding.level, "split %s: %d rows with %s: %s%s", *what)
    if not kept:
        reasons = ", ".join(
            f"{len(named)} with {finding.reason}" for finding, named in by_finding.items() if finding.drop
        )
        raise ValueError(
            f"expected usable rows in split {split!r}, none of {len(rows)} are: {reasons or 'it is empty'}"
        )
    logger.info("split %s: %d rows kept, %d dropped", split, len(kept), len(rows) - len(kept))
    return rows.select(kept) if len(kept) < len(rows) else rows


# --- randomness that belongs to rows ---


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Draw from python, numpy and torch as `key` determines, and afterwards as if nothing had been drawn."""
    words = np.random.SeedSequence([int(number) for number in key]).generate_state(3)
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.default_generator.manual_seed(int(words[2]))  # torch.manual_seed would seed devices too, and takes 0.3 ms
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)


class SeededRows(torch.utils.data.Dataset):
    """`make(rows[i])` with randomness that depends on the seed, the epoch and the row alone.

    A row whose files were there when it was checked and are not any more is named in the log, and the next one takes
    its place: training goes on. `lost` marks such rows. RecipeTrainer sets the epoch. Workers share both with the
    process that started them.
    """

    def __init__(self, rows, make: Callable[[object], dict], seed: int) -> None:
        self.rows, self.make, self.seed = rows, make, seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.lost = torch.zeros(len(rows), dtype=torch.bool).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict:
        for shift in range(MOST_LOST_IN_A_ROW + 1):
            place = (row + shift) % len(self.rows)
            try:
                with seeded(self.seed, int(self.epoch), place):
                    return self.make(self.rows[place])
            except LOST as error:
                if shift == min(MOST_LOST_IN_A_ROW, len(self.rows) - 1):
                    raise
                if not self.lost[place]:
                    self.lost[place] = True
                    logger.warning(
                        "row %s could be read and cannot now: %s; the next takes its place", self.name(place), error
                    )

    def name(self, place: int) -> int | str:
        """How the user knows a row; its number where the rows have no names."""
        columns = getattr(self.rows, "column_names", None) or ()
        return self.rows.select_columns([ROW])[place][ROW] if ROW in columns else place
