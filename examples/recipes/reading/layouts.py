"""Which layout a data set has: found by a table, and one error for what none of it reads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

from accelerate import PartialState
from datasets import DatasetDict, IterableDatasetDict

from recipes.arguments import DataArguments
from recipes.reading.place import Place
from recipes.reading.tables import TEXT_TABLES, Target, with_known_columns

UNREAD_PICTURES = (".heic", ".heif", ".jxl", ".jp2", ".svg", ".dng", ".cr2", ".nef", ".arw", ".psd")
# What a file of another kind has to become first.
ADVICE = {
    **dict.fromkeys((".zip", ".rar", ".7z", ".gz", ".tgz", ".bz2", ".xz"), "unpack it"),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save the table as .csv"),
    **dict.fromkeys(UNREAD_PICTURES, "convert it to .png or .jpg"),
}
NUM_NAMED = 4  # tables that an error says the columns of

logger = logging.getLogger(__name__)


class Sign(NamedTuple):
    """What a data set of a layout has, in words that follow "it has", and whether this one has it."""

    words: str
    holds: Callable[[Place, DataArguments], bool]


class Layout(NamedTuple):
    """A way that people lay out a data set.

    Args:
        name: what it is called in the log and in docs/your-data.md.
        form: its files in a line.
        signs: what tells it; all hold for a data set of this layout.
        read: gives the splits.
        has_user_columns: whether their columns have the user's names; else they have the recipe's.
        scale: of depths, what whole numbers are divided by (`depth_files.Scale`), where the layout settles it.
    """

    name: str
    form: str
    signs: tuple[Sign, ...]
    read: Callable[[Place, DataArguments], DatasetDict | IterableDatasetDict]
    has_user_columns: bool = False
    scale: tuple | None = None


HAS_TABLE = Sign(f"a table ({', '.join(TEXT_TABLES)})", lambda place, arguments: bool(place.with_suffix(*TEXT_TABLES)))


def read_splits(
    layouts: Sequence[Layout], arguments: DataArguments, target: Target | None = None, needs_pictures: bool = True
) -> tuple[Layout, DatasetDict | IterableDatasetDict]:
    """The layout of --dataset, the first of the table whose signs all hold, and its splits.

    Returns:
        the layout, and splits with the columns IMAGE, that of the target's name, ROW, and whatever else there is.

    Raises:
        ValueError: it has none of them, or lacks a column.
    """
    place = Place(arguments.dataset)
    with PartialState().main_process_first():  # one process fills the cache of `datasets`, the others read it
        layout = next((layout for layout in layouts if all(s.holds(place, arguments) for s in layout.signs)), None)
        if layout is None:
            raise ValueError(unknown_layout(layouts, place, arguments))
        logger.info("%s is read as: %s (%s)", arguments.dataset, layout.name, layout.form)
        splits = layout.read(place, arguments)
    for suffix, files in unread_pictures(place).items():
        logger.warning("%d files of %s are not read, as %s; convert them to .png or .jpg", len(files), suffix, files[0])
    if layout.has_user_columns:
        splits = with_known_columns(splits, place.folder, arguments, target, needs_pictures)
    return layout, splits


def unread_pictures(place: Place) -> dict[str, list[str]]:
    """{suffix: files} of pictures of kinds that Pillow does not open by itself."""
    found = {suffix: place.with_suffix(suffix) for suffix in UNREAD_PICTURES}
    return {suffix: files for suffix, files in found.items() if files}


def unknown_layout(layouts: Sequence[Layout], place: Place, arguments: DataArguments) -> str:
    """What can be read, what was found, and the nearest layout with what it lacks."""
    held = {layout: [sign.holds(place, arguments) for sign in layout.signs] for layout in layouts}
    nearest = max(layouts, key=lambda layout: sum(held[layout]) / len(held[layout]))
    lines = [f"expected a data set of a layout that this recipe reads, {place.name} has none of them"]
    lines.append(f"found: {place.summary()}")
    if any(held[nearest]):
        lacks = [sign.words for sign, holds in zip(nearest.signs, held[nearest]) if not holds]
        lines.append(f"nearest: {nearest.name} ({nearest.form}), but it lacks {' and '.join(lacks)}")
    lines += [f"{files[0]}: {advice}" for suffix, advice in ADVICE.items() if (files := place.with_suffix(suffix))]
    lines += [f"{table}: {columns}" for table, columns in list(place.tables_seen.items())[:NUM_NAMED]]
    lines += ["layouts:", *(f"- {layout.name}: {layout.form}" for layout in layouts)]
    return "\n".join(lines)
