"""Tables of pictures: csv, tsv, lists of paths, jsonl and json -> rows; and the columns that recipes look for.

A cell of a csv is a text, and an empty one is None; nothing is guessed about numbers here. Rows are named by the line
of their file.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import datasets
from datasets import Dataset, DatasetDict, IterableDataset, Value
from datasets import Image as ImageFeature

from recipes.arguments import DataArguments
from recipes.reading.cells import Cells, is_path, likely_separator, rows_of_lines
from recipes.reading.place import NUM_TRIED, Finder, Place, split_of_file, split_of_paths, split_of_word
from vit_embed.retrieval import sources
from vit_embed.retrieval.pictures import PICTURE_SUFFIXES

logger = logging.getLogger(__name__)

ROW = "__row__"  # how the user knows a row
PROBLEM = "__problem__"  # why a row cannot be used, where reading it found that out
IMAGE = "image"
# Tables of Kaggle name pictures by their stems.
IMAGE_COLUMNS = (*sources.IMAGE_COLUMNS, "rgb", "image_name", "img_name", "image index", "image_id", "id_code", "id")
SPLIT_COLUMNS = ("split", "set", "subset", "partition")
LIST_SUFFIXES = (".txt", ".lst")
TEXT_TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", *LIST_SUFFIXES)
MOST_TABLES, DEEPEST_TABLE = 64, 3  # files looked into for a table, and folders above them
NUM_SNIFFED = 5
Texts = (Value("string"), Value("large_string"), Value("string_view"))
Bytes = (Value("binary"), Value("large_binary"), Value("binary_view"))


class Record(NamedTuple):
    """A row of a table: the line it begins at, its cells by column, and why it cannot be used."""

    line: int
    cells: dict[str, object]
    problem: str | None = None


# --- reading a file ---


def records(path: Path, arguments: DataArguments, columns: Sequence[str] = ()) -> Iterator[Record]:
    """The rows of a table, one by one.

    Args:
        columns: names for the columns of a table without a header.

    Raises:
        ValueError: the file is no text in UTF-8, or no JSON where it should be.
    """
    try:
        yield from (
            _json_records(path, columns)
            if path.suffix.lower() not in (".csv", ".tsv", *LIST_SUFFIXES)
            else _text_records(path, arguments, columns)
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"expected text in UTF-8 in {path}, {error}; save it as UTF-8") from error


def _json_records(path: Path, names: Sequence[str]) -> Iterator[Record]:
    """Objects, one a line, or a list of them, of which one that is none has a problem; or {path of a picture: what is
    learned}, to which `names` give columns."""
    with path.open(encoding="utf-8-sig") as file:
        if path.suffix.lower() == ".json":
            try:
                entries = json.load(file)
            except json.JSONDecodeError as error:
                raise ValueError(f"expected JSON in {path}: {error}") from error
            if isinstance(entries, dict) and len(names) > 1 and entries and all(map(is_path, entries)):
                entries = [dict(zip(names, item)) for item in entries.items()]
            for number, entry in enumerate(entries if isinstance(entries, list) else (), 1):
                yield Record(number, entry) if isinstance(entry, dict) else Record(number, {}, "no JSON object")
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    entry = None
                yield Record(number, entry) if isinstance(entry, dict) else Record(number, {}, "no JSON object")


def _text_records(path: Path, arguments: DataArguments, names: Sequence[str]) -> Iterator[Record]:
    separator, stray = separator_of(path, arguments), []
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = _words(file) if separator is None else rows_of_lines(file, separator)
        first = next((row for row in rows if any(map(str.strip, row.cells))), None)
        if first is None:
            return
        if is_header(first.cells, path, arguments):
            columns = [name.strip() for name in first.cells]
        else:
            columns, rows = headerless_columns(first.cells, names), itertools.chain([first], rows)
        for line, cells, is_stray in rows:
            if not any(cell.strip() for cell in cells):
                continue
            problem = None
            if len(cells) != len(columns):
                problem = (
                    f"{len(cells)} cells in a table of {len(columns)} columns; quote a text that holds a separator"
                )
            elif is_stray:
                stray.append(line)
            yield Record(line, {name: cell.strip() or None for name, cell in zip(columns, cells)}, problem)
    if stray:
        more = ", ..." if len(stray) > NUM_SNIFFED else ""
        lines = ", ".join(map(str, stray[:NUM_SNIFFED])) + more
        logger.info("%s: %d lines have a quote that does not close, read as a letter: %s", path, len(stray), lines)


def _words(file: Iterable[str]) -> Iterator[Cells]:
    """Lines of words between spaces."""
    for number, line in enumerate(file, 1):
        if not line.lstrip().startswith("#"):
            yield Cells(number, line.split(), False)


def separator_of(path: Path, arguments: DataArguments) -> str | None:
    """--separator, or what separates the first lines into the same number of cells, two at least; None for spaces."""
    if arguments.separator:
        return arguments.separator.encode().decode("unicode_escape")
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        first = [line for line in itertools.islice(file, 4 * NUM_SNIFFED) if line.strip() and line[0] != "#"]
    separator = likely_separator(first) if first else None
    is_list = path.suffix.lower() in LIST_SUFFIXES
    if separator is not None:
        return separator
    return None if is_list and all(len(line.split()) > 1 for line in first[:NUM_SNIFFED]) else ","


def headerless_columns(first: Sequence[str], names: Sequence[str]) -> list[str]:
    """`names` for the columns of a table without a header, where the first name is that of the pictures' column."""
    columns = [*names[: len(first)], *(f"column {number}" for number in range(len(names) + 1, len(first) + 1))]
    place = next((place for place, cell in enumerate(first) if is_path(cell)), 0)
    return [*columns[1 : place + 1], columns[0], *columns[place + 1 :]] if columns else columns


def is_header(first: Sequence[str], path: Path, arguments: DataArguments) -> bool:
    """Whether the first row of a table names its columns: none of its cells is a picture."""
    cells = [cell for cell in first if cell and not cell.isspace()]
    if any(map(is_path, cells)):
        return False
    finder = Finder(path, arguments).fit(cells)
    return not any(finder.finds(cell) for cell in cells)


# --- finding the tables of a place ---


def column_of(columns: Sequence[str], asked: str | None, usual: Sequence[str]) -> str | None:
    """The column that is asked for, or the first of the usual ones that is there, in any case; None for none."""
    if asked is not None:
        return asked if asked in columns else None
    by_name = {name.lower(): name for name in reversed(columns)}
    return next((by_name[name] for name in usual if name in by_name), None)


def tables_of(
    place: Place, arguments: DataArguments, asked: str | None, usual: Sequence[str], columns: Sequence[str]
) -> list[str]:
    """The tables of a place that have a column of pictures and one of what is learned.

    Args:
        asked, usual: the column of what is learned, by the command line, or by its usual names.
        columns: names for the columns of a table without a header.
    """

    def lacks(found: list[Record], image: str) -> str | None:
        names = list(found[0].cells)
        is_there = column_of([name for name in names if name != image], asked, usual) is not None
        return None if is_there else _columns(names)

    return tables_with(place, arguments, f"{asked} {usual}", lacks, columns)


def tables_with(
    place: Place,
    arguments: DataArguments,
    what: str,
    lacks: Callable[[list[Record], str], str | None],
    columns: Sequence[str],
) -> list[str]:
    """The tables of a place that have a column of pictures and lack nothing; what they have instead goes to
    `place.tables_seen`.

    Args:
        what: names `lacks`, as each table is looked into once.
        lacks: the first rows of a table and its column of pictures -> None, or what it has instead.
        columns: names for the columns of a table without a header.
    """
    key = f"tables with {what}"
    if key not in vars(place):
        stems = {PurePosixPath(file).stem for file in place.pictures}  # 1.txt is about 1.jpg, also in another folder
        near = [file for file in place.with_suffix(*TEXT_TABLES) if file.count("/") < DEEPEST_TABLE]
        near = [file for file in near if PurePosixPath(file).stem not in stems][:MOST_TABLES]
        vars(place)[key] = [file for file in near if _has(place, file, arguments, lacks, columns)]
    return vars(place)[key]


def _has(place: Place, file: str, arguments: DataArguments, lacks, columns) -> bool:
    try:
        first = list(itertools.islice(records(Path(place.full(file)), arguments, columns), NUM_SNIFFED))
    except (ValueError, OSError) as error:
        place.tables_seen[file] = str(error)
        return False
    first = [record for record in first if record.cells]
    names = list(first[0].cells) if first else []
    image = column_of(names, arguments.image_column, IMAGE_COLUMNS)
    instead = _columns(names) if image is None else lacks(first, image)
    if not first:
        place.tables_seen[file] = "has no rows"
    elif instead and len(names) > 1:
        place.tables_seen[file] = instead
    return image is not None and instead is None


def _columns(names: Sequence[str]) -> str:
    return f"has the columns {', '.join(map(str, names[:12]))}"


def split_tables(place: Place, tables: Sequence[str], arguments: DataArguments) -> dict[str, list[str]]:
    """{split: its tables}: by the words in their names or the folder they lie in; one without a word is for training.

    Raises:
        ValueError: several tables, of which none names a split.
    """
    named: dict[str, list[str]] = {}
    for table in tables:
        named.setdefault(split_of_file(table, arguments), []).append(table)
    rest = named.pop(None, [])
    if not named and len(rest) > 1:
        raise ValueError(
            f"expected one table in {place.name}, or names that tell the split as train.csv and validation.csv do, "
            f"found {', '.join(rest[:6])}; give --dataset the path of one"
        )
    if named and rest:
        hint = f"--train_split {PurePosixPath(rest[0]).stem} would read the first"
        logger.warning("left out, as their names tell no split: %s; %s", ", ".join(rest), hint)
    return named or {arguments.train_split: rest}


class PathColumn(NamedTuple):
    """A column of paths beside that of the pictures: asked for, or by its usual names; the suffixes of its files.

    Args:
        folder: where its paths start; None for where those of pictures do, or as found.
        folders, others: names of folders that hold its files, and that hold pictures.
    """

    asked: str | None
    usual: tuple[str, ...]
    suffixes: tuple[str, ...]
    folder: str | None
    folders: tuple[str, ...]
    others: tuple[str, ...]


def read_tables(
    place: Place,
    tables: Sequence[str],
    arguments: DataArguments,
    columns: Sequence[str] = (),
    also: PathColumn | None = None,
) -> DatasetDict:
    """The rows of some tables by split: their own columns, ROW and PROBLEM; pictures, and what `also` names, as paths.

    A column `split` (SPLIT_COLUMNS) tells the split of each row. Other tables that were looked into are named.
    """
    unread = [f"{name} ({what})" for name, what in place.tables_seen.items() if name not in tables]
    if unread:
        logger.warning("tables that are not read: %s", "; ".join(unread[:4]))
    splits: dict[str, list[dict]] = {}
    for split, files in split_tables(place, tables, arguments).items():
        for file in files:
            for own, row in _rows(place, file, arguments, columns, also):
                splits.setdefault(own or split, []).append(row)
    return from_rows(splits)


def from_rows(splits: dict[str, list[dict]]) -> DatasetDict:
    """Splits of rows, each a dict of its cells; all get the columns that any has."""
    names = dict.fromkeys(name for rows in splits.values() for row in rows for name in row)
    read = {s: {name: [row.get(name) for row in rows] for name in names} for s, rows in splits.items()}
    return DatasetDict({split: from_columns(found) for split, found in read.items()})


def from_columns(columns: dict[str, list]) -> Dataset:
    """A dataset of columns; one of texts and lists becomes one of lists, and ValueError names one of other kinds."""
    for name, cells in columns.items():
        if {type(cell) for cell in cells} - {type(None)} == {str, list}:
            columns[name] = [[cell] if isinstance(cell, str) else cell for cell in cells]
    try:
        return Dataset.from_dict(columns)
    except (datasets.exceptions.DatasetGenerationError, ValueError, TypeError) as error:
        for name, cells in columns.items():
            kinds = sorted({type(cell).__name__ for cell in cells if cell is not None})
            if len(kinds) > 1:
                raise ValueError(f"expected cells of one kind in column {name!r}, found {', '.join(kinds)}") from error
        raise


def _rows(place: Place, file: str, arguments: DataArguments, columns, also) -> Iterator[tuple[str | None, dict]]:
    """(split by the table's own column or None, row) of each row of a table."""
    path, known = Path(place.full(file)), split_of_word(arguments)
    found = list(records(path, arguments, columns))
    cells = next((record.cells for record in found if record.cells), {})
    image = column_of(list(cells), arguments.image_column, IMAGE_COLUMNS)
    split = column_of(list(cells), None, SPLIT_COLUMNS)
    words = {str(record.cells.get(split)).lower() for record in found if record.problem is None}
    others = sorted(words - set(known))
    if split is not None and others:
        is_split = len({known[word] for word in words & set(known)}) > 1
        what = "rows of these are left out" if is_split else "is not read as splits, as these are none"
        logger.warning("%s: column %r: %s: %s", file, split, what, ", ".join(others[:5]))
        split = split if is_split else None
    paths = _texts(found, image)
    finder = Finder(path, arguments, skip=also.folders if also is not None else ()).fit(list(filter(None, paths)))
    second = None
    if also is not None:
        second = column_of([name for name in cells if name != image], also.asked, also.usual)
        at_folder = replace(arguments, image_folder=also.folder or arguments.image_folder)
        find_second = Finder(path, at_folder, also.suffixes, also.others).fit(list(filter(None, _texts(found, second))))
    own = iter(split_of_paths(list(filter(None, paths)), arguments))
    for record, cell in zip(found, paths):
        row = {**record.cells, ROW: f"{file}:{record.line}", PROBLEM: record.problem}
        of_path = next(own) if cell else None
        if cell:
            row[image] = picture_path(cell, finder)
        elif record.problem is None and image is not None and record.cells.get(image) is None:
            row[PROBLEM] = "no path of a picture"
        if second is not None and isinstance(row.get(second), str):
            row[second] = None if row[second].lower() == "none" else picture_path(row[second], find_second)
            if row[second] is not None and row[second] == row[image]:
                row[PROBLEM] = f"one file in the columns {image!r} and {second!r}"
        word = str(record.cells.get(split)).lower()
        if split is None or word in known or record.problem is not None:
            yield known.get(word) if split is not None else of_path, row


def _texts(found: list[Record], column: str | None) -> list[str]:
    """The texts of a column, whole numbers among them; "" for a cell that holds none."""
    return [str(cell) if isinstance(cell := record.cells.get(column), (str, int)) else "" for record in found]


def picture_path(cell: str, finder: Finder) -> str:
    """The path that a cell stands for.

    Raises:
        ValueError: it is an address.
    """
    if "://" in cell:
        raise ValueError(
            f"expected paths of pictures in {finder.table}, got the address {cell}; download them first, as "
            "img2dataset does, which writes tars that train_contrastive.py reads"
        )
    return finder(cell)


# --- columns ---


class Target(NamedTuple):
    """What is learned: the name that its column gets, the column asked for by `flag`, and the usual names for it.

    Args:
        suffixes: of the files that its texts are paths of; empty where they are no paths.
    """

    name: str
    asked: str | None
    usual: tuple[str, ...]
    flag: str
    suffixes: tuple[str, ...] = ()


def with_known_columns(
    splits: DatasetDict, folder: Path, arguments: DataArguments, target: Target | None, needs_pictures: bool
) -> DatasetDict:
    """The splits with their pictures in the column IMAGE and what is learned in that of the target's name.

    Pictures are cast to datasets.Image from paths (relative ones start at `folder`), bytes, or {bytes, path}. A split
    without a column of what is learned, as of unlabelled pictures, is left without.

    Raises:
        ValueError: a split has no column of pictures, or it holds something else; the files of every split are missing;
            no split has the target's column.
    """
    renamed, missing = dict(splits), None
    for split, rows in splits.items() if needs_pictures else ():
        try:
            renamed[split] = _with_pictures(rows, split, folder, arguments)
        except FileNotFoundError as error:
            missing = error
            del renamed[split]
            logger.warning("split %s is left out: %s", split, error)
    if missing is not None and not renamed:
        raise ValueError(str(missing)) from missing
    if target is None:
        return type(splits)(renamed)
    found = {split: column_of(own_columns(rows), target.asked, target.usual) for split, rows in renamed.items()}
    if not any(found.values()):
        columns = sorted({name for rows in renamed.values() for name in own_columns(rows)})
        asked = target.asked or " or ".join(target.usual)
        raise ValueError(f"expected a column {asked!r}, found columns {columns}; set {target.flag}")
    for split, column in found.items():
        if column is not None:
            rows = _renamed(renamed[split], column, target.name, split)
            if target.suffixes and rows.features[target.name] in Texts:
                rows = _with_paths(rows, target.name, split, folder, arguments, target.suffixes)
            renamed[split] = rows
    return type(splits)(renamed)


def own_columns(rows: Dataset) -> list[str]:
    """The columns that the user knows, but for the pictures."""
    return [name for name in rows.column_names if name not in (IMAGE, ROW, PROBLEM)]


def _renamed(rows: Dataset, column: str, name: str, split: str) -> Dataset:
    if column == name:
        return rows
    logger.info("split %s: column %r is read as %r", split, column, name)
    return (rows.remove_columns(name) if name in rows.column_names else rows).rename_column(column, name)


def _with_pictures(rows: Dataset, split: str, folder: Path, arguments: DataArguments) -> Dataset:
    columns = [name for name in rows.column_names if name not in (ROW, PROBLEM)]
    column = column_of(columns, arguments.image_column, IMAGE_COLUMNS)
    if column is None:
        asked = arguments.image_column or " or ".join(IMAGE_COLUMNS[:4])
        advice = "set --image_column"
        if any(name.lower() in ("url", "image_url") for name in columns):
            advice = "addresses are not read: download the pictures first, as img2dataset does"
        raise ValueError(f"expected pictures in column {asked!r} of split {split!r}, found columns {columns}; {advice}")
    feature = rows.features[column]
    is_struct = isinstance(feature, dict) and set(feature) <= {"bytes", "path"}
    if not isinstance(feature, ImageFeature):
        if feature not in (*Texts, *Bytes) and not is_struct:
            raise ValueError(
                f"expected pictures in column {column!r} of split {split!r} (paths, bytes or {{bytes, path}}), it has "
                f"{feature}; set --image_column"
            )
        if feature in Texts or is_struct:
            rows = _with_paths(rows, column, split, folder, arguments)
        rows = rows.cast_column(column, ImageFeature())
    return _renamed(rows, column, IMAGE, split)


def path_in(cell: object) -> str | None:
    """The path that a cell of pictures stands for; None where it holds the bytes, or nothing."""
    if isinstance(cell, dict):
        return None if cell.get("bytes") else cell.get("path")
    return cell if isinstance(cell, str) else None


def _with_paths(
    rows: Dataset | IterableDataset,
    column: str,
    split: str,
    folder: Path,
    arguments: DataArguments,
    suffixes: tuple[str, ...] = PICTURE_SUFFIXES,
) -> Dataset | IterableDataset:
    """Paths as they were written -> paths from here.

    Raises:
        FileNotFoundError: none of them, or of the first of a stream, leads to a file.
    """
    if isinstance(rows, IterableDataset):
        some = list(rows.select_columns([column]).take(NUM_TRIED))
    else:
        some = [rows[place] for place in range(0, len(rows), max(1, len(rows) // NUM_TRIED))]
    sample = [path for row in some if (path := path_in(row[column]))]
    if not sample or any(map(os.path.isfile, sample)):
        return rows
    finder = Finder(folder / "table", arguments, suffixes).fit(sample)
    if not any(map(finder.finds, sample)):
        raise FileNotFoundError(
            f"expected paths of files in column {column!r} of split {split!r}, no file is at {sample[0]!r} or at any "
            "other of its paths; set --image_folder, or which column it is"
        )
    said = {} if isinstance(rows, IterableDataset) else {"desc": f"paths of {split}"}
    return rows.map(partial(_found, column=column, finder=finder), batched=True, features=rows.features, **said)


def _found(cells: dict[str, list], column: str, finder: Finder) -> dict[str, list]:
    paths = [(cell, path_in(cell)) for cell in cells[column]]
    return {
        column: [
            cell if path is None else {**cell, "path": finder(path)} if isinstance(cell, dict) else finder(path)
            for cell, path in paths
        ]
    }
