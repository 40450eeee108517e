"""Files of pictures and of depths -> pairs -> splits."""

from __future__ import annotations

import logging
from pathlib import PurePosixPath
from typing import NamedTuple

from datasets import DatasetDict

from recipes.arguments import DataArguments
from recipes.reading.place import Place, split_of_word
from recipes.reading.tables import IMAGE, ROW, from_columns

logger = logging.getLogger(__name__)

DEPTH = "depth"
NUM_NAMED = 6


class Pair(NamedTuple):
    """What a row has: how its user knows it, and the cells of its picture and its depth, None for a missing one."""

    row: str
    image: str | dict | None
    depth: str | dict | None


def joined(images: dict[str, list[str]], depths: dict[str, list[str]]) -> list[Pair]:
    """A pair for each key of either side, named by the file of its picture.

    Raises:
        ValueError: several files of one side have the same key.
    """
    pairs = []
    for key in sorted({*images, *depths}):
        image, depth = images.get(key, []), depths.get(key, [])
        if len(image) > 1 or len(depth) > 1:
            several = image if len(image) > 1 else depth
            raise ValueError(
                f"expected one picture and one depth of the name {key!r}, found {' and '.join(several[:NUM_NAMED])}; "
                "remove one, or set --image_glob and --depth_glob"
            )
        pairs.append(Pair((image or depth)[0], image[0] if image else None, depth[0] if depth else None))
    return pairs


def split_of_path(path: str, arguments: DataArguments) -> str | None:
    """The split of the first folder that has the name of one."""
    known = split_of_word(arguments)
    return next((known[part.lower()] for part in PurePosixPath(path).parent.parts if part.lower() in known), None)


def by_split(place: Place, pairs: list[Pair], arguments: DataArguments) -> DatasetDict:
    """Pairs of files of a place -> rows; without a folder of a split all are for training."""
    named: dict[str | None, list[Pair]] = {}
    for pair in pairs:
        named.setdefault(split_of_path(pair.row, arguments), []).append(pair)
    rest = named.pop(None, [])
    if named and rest:
        rows = ", ".join(pair.row for pair in rest[:NUM_NAMED])
        logger.warning("%s: %d pairs are left out, as no folder of theirs is a split: %s", place.name, len(rest), rows)
    return splits_of_pairs(
        {
            split: [pair._replace(image=_full(place, pair.image), depth=_full(place, pair.depth)) for pair in found]
            for split, found in (named or {arguments.train_split: rest}).items()
        }
    )


def _full(place: Place, cell: str | dict | None) -> str | dict | None:
    return place.full(cell) if isinstance(cell, str) else cell


def splits_of_pairs(pairs: dict[str, list[Pair]]) -> DatasetDict:
    columns = {
        split: {ROW: [p.row for p in found], IMAGE: [p.image for p in found], DEPTH: [p.depth for p in found]}
        for split, found in pairs.items()
    }
    return DatasetDict({split: from_columns(cells) for split, cells in columns.items()})
