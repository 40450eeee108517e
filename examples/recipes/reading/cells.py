"""Lines of a csv or tsv -> cells. A quote that does not close is a letter of its line and swallows none after it."""

from __future__ import annotations

import csv
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from recipes.reading.place import CAPTION_NUMBER
from vit_embed.retrieval.pictures import PICTURE_SUFFIXES

SEPARATORS = ("\t", ";", "|", ",")
MOST_LINES = 100  # of a quoted text
ESCAPED = {"doublequote": False, "escapechar": "\\"}  # \" for a quote inside quotes, which is "" else


class Cells(NamedTuple):
    """A row: the line it begins at, and whether a quote of it does not close, so that its quotes are letters."""

    line: int
    cells: list[str]
    is_stray: bool


def rows_of_lines(lines: Iterable[str], separator: str) -> Iterator[Cells]:
    """The rows of a table, in which quoted texts hold separators and line breaks."""
    csv.field_size_limit(sys.maxsize)
    lines, ahead, number = iter(lines), deque(), 1
    while True:
        ahead.extend(islice(lines, 0 if ahead else 1))
        if not ahead:
            return
        found = None
        if '"' in ahead[0]:
            ahead.extend(islice(lines, MOST_LINES - len(ahead)))
            found = _quoted(ahead, separator)
        cells, count = found or (ahead[0].rstrip("\r\n").split(separator), 1)
        yield Cells(number, cells, found is None and '"' in ahead[0])
        number += count
        for _ in range(count):
            ahead.popleft()


def _quoted(lines: Sequence[str], separator: str) -> tuple[list[str], int] | None:
    """The cells of the row at the first line, and how many lines it has; None where its quotes do not close."""
    for dialect in ({}, ESCAPED) if '\\"' in lines[0] else ({},):
        reader = csv.reader(
            iter(lines), delimiter=separator, strict=True, skipinitialspace=separator != "\t", **dialect
        )
        try:
            cells = next(reader)
        except csv.Error:
            continue
        swallowed = (part for cell in cells for part in cell.splitlines()[1:])
        if not any(_is_row(part, separator) for part in swallowed):
            return cells, reader.line_num
    return None


def _is_row(text: str, separator: str) -> bool:
    """Whether a part of a quoted text is a row of the table itself."""
    cells = text.split(separator)
    return len(cells) > 1 and (separator == "\t" or any(c.strip().lower().endswith(PICTURE_SUFFIXES) for c in cells))


def likely_separator(lines: Sequence[str]) -> str | None:
    """What separates the first lines of a table into the same number of cells, two at least; None for nothing.

    Where several do: what leaves a cell that is a picture's path, as texts hold commas and semicolons, too.
    """
    rows = {separator: [row.cells for row in rows_of_lines(lines, separator)] for separator in SEPARATORS}
    several = {separator: found for separator, found in rows.items() if len(found[0]) > 1}
    # The last row may go on behind the lines that were looked at.
    even = [s for s, found in several.items() if all(len(row) == len(found[0]) for row in found[:-1])]
    some = even or list(several)
    with_path = [s for s in some if any(map(is_path, rows[s][-1]))]
    return next(iter(with_path or some), None)


def is_path(cell: str) -> bool:
    """Whether a cell is a picture's path by its end, a number of Flickr8k's behind it or not."""
    return CAPTION_NUMBER.sub("", cell.strip()).lower().endswith(PICTURE_SUFFIXES)
