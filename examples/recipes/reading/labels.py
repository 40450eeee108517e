"""Layouts of labelled pictures -> rows of IMAGE, what is learned (LABEL, or columns of the user's own) and ROW."""

from __future__ import annotations

import itertools
import logging
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from datasets import ClassLabel, Dataset, DatasetDict, Value
from datasets import Image as ImageFeature

from recipes.arguments import DataArguments
from recipes.reading import stored
from recipes.reading.layouts import HAS_TABLE, Layout, Sign
from recipes.reading.pictures import read_folder
from recipes.reading.place import Finder, Place, split_folders, split_of_name, split_of_word
from recipes.reading.tables import (
    IMAGE,
    IMAGE_COLUMNS,
    ROW,
    SPLIT_COLUMNS,
    Record,
    column_of,
    from_columns,
    read_tables,
    records,
    tables_of,
    tables_with,
)

logger = logging.getLogger(__name__)

LABEL = "label"
LABEL_COLUMNS = (
    *("label", "labels", "class", "class_name", "category", "target", "y", "breed", "species", "class_id", "classid"),
    "diagnosis",
)
HEADERLESS = (IMAGE, LABEL)
INDEX_COLUMNS = ("", "unnamed: 0", "index", "id")  # what pandas and databases number rows by
SUBMISSION = "submission"  # in the name of a table of Kaggle: a form whose labels are no one's
# Folders of a data set that no one means for labels.
NO_LABELS = {"images", "image", "imgs", "img", "jpegimages", "annotations", "annotation", "masks", "trimaps", "labels"}
NUM_NAMED = 6
FIRST = Record(1, {})  # a table with a header has its first row in line 2


def in_order(names: Iterable[str]) -> list[str]:
    """Names sorted, by their value where all of them are numbers."""
    names = list(names)
    try:
        return sorted(names, key=lambda name: (float(name), name))
    except ValueError:
        return sorted(names)


def some(names: Sequence[object]) -> str:
    """The first of some names, in a line."""
    return ", ".join(map(str, names[:NUM_NAMED])) + (", ..." if len(names) > NUM_NAMED else "")


# --- class folders ---

Labelled = list[tuple[str, str | None]]  # (file, label)


def class_paths(place: Place, arguments: DataArguments) -> dict[str, Labelled]:
    """{split: [(file, label)]}: the label is the first folder below that of the split, or that of --label_level.

    Folders around everything are passed through, and splits may be folders below the labels (`cat/train/1.jpg`).
    Pictures beside the folders of labels have none.

    Raises:
        ValueError: the folders of some labels are split further and those of others are not.
    """
    if "class paths" not in vars(place):
        parts = {file: PurePosixPath(file).parts for file in place.pictures}
        known = split_of_word(arguments)
        start = _around(list(parts.values()), 0, known)
        files = ["/".join(p[start:]) for p in parts.values() if len(p) > start]
        tops = split_folders(place, arguments, files)
        if tops:
            splits = {file: tops.get(p[start]) for file, p in parts.items() if len(p) > start}
            main = arguments.train_split if arguments.train_split in tops.values() else next(iter(tops.values()))
            start = _around([parts[file] for file, split in splits.items() if split == main], start + 1)
        else:
            splits = _splits_in_labels(parts, start, arguments, known)
        labelled: dict[str, Labelled] = {}
        for file, split in splits.items():
            if split is not None:
                labelled.setdefault(split, []).append((file, _label(parts[file], start, arguments.label_level or 1)))
        vars(place)["class paths"] = labelled
    return vars(place)["class paths"]


def _around(parts: list[tuple[str, ...]], start: int, known: Mapping[str, str] | None = None) -> int:
    """The level below the folders that lie around all others; one with the name of a split does not count."""
    while True:
        deep = [p for p in parts if len(p) > start + 1]
        names = {p[start] for p in deep}
        if (
            len(names) != 1
            or not any(len(p) > start + 2 for p in deep)
            or {n.lower() for n in names} & set(known or ())
        ):
            return start
        start += 1


def _splits_in_labels(
    parts: dict[str, tuple[str, ...]], start: int, arguments: DataArguments, known: dict[str, str]
) -> dict[str, str]:
    below = start + max(arguments.label_level or 1, 1)
    words = {file: p[below].lower() for file, p in parts.items() if len(p) > below + 1 and p[below].lower() in known}
    labelled = [file for file, p in parts.items() if len(p) > start + 1]
    if arguments.train_split not in {known[word] for word in words.values()}:
        return dict.fromkeys(parts, arguments.train_split)
    rest = [file for file in labelled if file not in words]
    if rest:
        raise ValueError(
            f"expected folders of splits in the folder of every label or of none, found {next(iter(words))} and "
            f"{rest[0]}; lay them out as train/LABEL/1.jpg and validation/LABEL/1.jpg"
        )
    return {file: known[word] for file, word in words.items()}


def _label(parts: tuple[str, ...], start: int, level: int) -> str | None:
    place = start + level - 1 if level > 0 else len(parts) - 1 + level
    # One way to write accents: file systems of macOS have another.
    return unicodedata.normalize("NFC", parts[place]) if start <= place < len(parts) - 1 else None


def has_class_folders(place: Place, arguments: DataArguments) -> bool:
    labels = {label for files in class_paths(place, arguments).values() for _, label in files}
    return len(labels - {None}) > 1


def read_class_folders(place: Place, arguments: DataArguments) -> DatasetDict:
    found = dict(class_paths(place, arguments))
    trained = {label for _, label in found.get(arguments.train_split, ())} - {None}
    tested = {label for _, label in found.get(arguments.test_split, ())} - {None}
    if trained and tested and not trained & tested:
        logger.warning(
            "split %s: %s is no label of training, its pictures are read as unlabelled",
            arguments.test_split,
            some(list(tested)),
        )
        found[arguments.test_split] = [(file, None) for file, _ in found[arguments.test_split]]
    names = in_order({label for files in found.values() for _, label in files} - {None})
    if arguments.label_level is None:
        _refuse_other_readings(place, in_order(trained or names), arguments)
        _say_deeper(found, names, split_of_word(arguments))
    number = {name: index for index, name in enumerate(names)}
    splits = DatasetDict()
    for split, files in found.items():
        columns = {IMAGE: [place.full(file) for file, _ in files], ROW: [file for file, _ in files]}
        labels = [number.get(label) for _, label in files]
        if any(label is not None for label in labels):
            columns[LABEL] = labels
        rows = from_columns(columns).cast_column(IMAGE, ImageFeature())
        splits[split] = rows.cast_column(LABEL, ClassLabel(names=names)) if LABEL in columns else rows
    return splits


def _refuse_other_readings(place: Place, labels: list[str], arguments: DataArguments) -> None:
    """ValueError where the folders are rather parts of a data set, or a table of the pictures lies beside them."""
    folders = f"the folders {some(labels)}"
    splits = {split_of_name(label, arguments) for label in labels}
    if None not in splits and len(splits) > 1:
        raise ValueError(
            f"expected labels, {folders} of {place.name} look like splits; put the pictures of each into a folder for "
            "every label (train/LABEL/1.jpg), or name a table of labels; --label_level 1 takes the folders for labels"
        )
    parts = [label for label in labels if label.lower() in NO_LABELS]
    tables = [table for table in picture_tables(place, arguments) if _names_pictures(place, table, arguments)]
    if parts or tables:
        seen = [f"{table} ({place.tables_seen.get(table, 'paths alone')})" for table in tables]
        raise ValueError(
            f"{place.name} can be read in more than one way, found {folders}"
            f"{f' and tables of the pictures: {some(seen)}' if seen else ', which are rather parts of a data set'}; "
            "--label_column NAME reads a table, --label_level 1 takes the folders for labels"
        )


def _names_pictures(place: Place, table: str, arguments: DataArguments) -> bool:
    """Whether the first rows of a table lead to files."""
    first = list(itertools.islice(records(Path(place.full(table)), arguments, HEADERLESS), NUM_NAMED))
    image = column_of(list(next((record.cells for record in first if record.cells), {})), None, IMAGE_COLUMNS)
    cells = [cell for record in first if isinstance(cell := record.cells.get(image), str)]
    try:
        finder = Finder(Path(place.full(table)), arguments).fit(cells)
    except ValueError:  # in several folders: it speaks of pictures
        return True
    return any(map(finder.finds, cells))


def _say_deeper(found: dict[str, Labelled], names: list[str], splits: Mapping[str, str]) -> None:
    """Says which folders below those of the labels are neither labels nor splits, if there are any."""
    below = set()
    for file, label in (each for files in found.values() for each in files):
        parts = PurePosixPath(unicodedata.normalize("NFC", file)).parts
        if label is not None and (place := parts.index(label) + 1) < len(parts) - 1:
            below.add(parts[place])
    below = {name for name in below if name.lower() not in splits}
    if below:
        logger.info(
            "labels are the folders %s; those below them (%s) are passed through: --label_level 2 would make them "
            "the labels",
            *(some(names), some(sorted(below))),
        )


# --- tables ---


def label_tables(place: Place, arguments: DataArguments) -> list[str]:
    """The tables with labels, and that of unlabelled pictures to test, where there is one; no form of Kaggle's."""
    asked = arguments.label_columns[0] if arguments.label_columns else arguments.label_column
    tables = tables_of(place, arguments, asked, LABEL_COLUMNS, HEADERLESS)
    if not tables and asked is None:
        tables = tables_with(place, arguments, "numbers", _lacks_numbers, HEADERLESS)
    real = [table for table in tables if SUBMISSION not in PurePosixPath(table).stem.lower()]
    splits = {split_of_name(PurePosixPath(table).stem, arguments) for table in real}
    if arguments.train_split in splits and arguments.test_split not in splits:
        stems = {table: PurePosixPath(table).stem for table in picture_tables(place, arguments) if table not in tables}
        real += [t for t, stem in stems.items() if split_of_name(stem, arguments) == arguments.test_split][:1]
    return real


def picture_tables(place: Place, arguments: DataArguments) -> list[str]:
    """The tables that have a column of pictures, whatever else; no form of Kaggle's."""
    tables = tables_with(place, arguments, "pictures", lambda rows, image: None, HEADERLESS)
    return [table for table in tables if SUBMISSION not in PurePosixPath(table).stem.lower()]


def _lacks_numbers(rows: list[Record], image: str) -> str | None:
    """None where all columns but that of the pictures hold numbers in [-1, 1], as labels of 0 and 1 do; else what is
    there."""
    names = [name for name in rows[0].cells if name != image and is_own(name)]
    cells = [record.cells.get(name) for record in rows for name in names]
    if len(names) > 1 and all(is_share(cell) for cell in cells if cell is not None):
        return None
    return f"has the columns {', '.join(list(rows[0].cells)[:12])}"


def is_own(column: str) -> bool:
    """Whether a column may hold labels, by its name."""
    return column.lower() not in (*SPLIT_COLUMNS, *INDEX_COLUMNS)


def is_share(cell: object) -> bool:
    """Whether a cell is a number in [-1, 1], or a text of one."""
    try:
        return not abs(float(cell)) > 1  # NaN is a missing one
    except (TypeError, ValueError):
        return False


def read_label_tables(place: Place, arguments: DataArguments) -> DatasetDict:
    """The rows of the tables, and of a folder `test` of which no table speaks, whose pictures are unlabelled."""
    tables = label_tables(place, arguments)
    _refuse_lists_beside_folders(place, tables, arguments)
    splits = read_tables(place, tables, arguments, HEADERLESS)
    forms = [file for file in place.files if SUBMISSION in file.lower() and file.lower().endswith(".csv")]
    if forms:
        logger.info("left out, a form to fill in: %s", some(forms))
    if arguments.test_split in splits:
        return splits
    used = {cell for rows in splits.values() for name in rows.column_names for cell in _texts(rows, name)}
    untold = [file for file in place.pictures if "/" in file and place.full(file) not in used]
    tests = [file for file in untold if split_of_name(file.split("/")[0], arguments) == arguments.test_split]
    if tests:
        logger.info(
            "split %s: the %d pictures of %s, unlabelled", arguments.test_split, len(tests), Path(tests[0]).parts[0]
        )
        column = arguments.image_column or IMAGE
        splits[arguments.test_split] = from_columns({column: [place.full(file) for file in tests], ROW: tests})
    return splits


def _refuse_lists_beside_folders(place: Place, tables: list[str], arguments: DataArguments) -> None:
    """ValueError where no table has a header that says what it holds, and the folders of the pictures may be labels."""
    if arguments.label_column or arguments.label_columns or not has_class_folders(place, arguments):
        return
    lists = [t for t in tables if t.lower().endswith((".txt", ".lst", ".csv", ".tsv"))]
    lists = [t for t in lists if next(records(Path(place.full(t)), arguments, HEADERLESS), FIRST).line == FIRST.line]
    if lists and len(lists) == len(tables):
        labels = {label for files in class_paths(place, arguments).values() for _, label in files} - {None}
        raise ValueError(
            f"{place.name} can be read in two ways, found lists without a header ({some(lists)}) and folders that may "
            f"be labels ({some(sorted(labels))}); --label_column {LABEL} reads the lists, --label_level 1 the folders"
        )


def _texts(rows: Dataset, name: str) -> list[str]:
    return rows[name][:] if getattr(rows.features[name], "dtype", None) == "string" else []


def label_columns_of(splits: DatasetDict, arguments: DataArguments, needs_one: bool = True) -> list[str]:
    """The columns that are learned: those asked for, one of the usual names, or all where all hold 0 and 1.

    Args:
        needs_one: else that of the usual name, which is not there, stands for none.

    Raises:
        ValueError: there is none, or one that is asked for is not there.
    """
    split = arguments.train_split if arguments.train_split in splits else next(iter(splits))
    own = {
        name: None
        for rows in splits.values()
        for name in rows.column_names
        if not name.startswith("__") and name != IMAGE
    }
    asked = list(arguments.label_columns or [])
    if asked:
        missing = sorted(set(asked) - set(splits[split].column_names))
        if missing:
            raise ValueError(f"expected columns {missing} in split {split!r}, found {list(own)}; set --label_columns")
        return asked
    usual = column_of(list(own), arguments.label_column, LABEL_COLUMNS)
    if usual is not None:
        return [usual]
    others = [name for name in splits[split].column_names if name in own and is_own(name)]
    are_plain = all(isinstance(splits[split].features[name], Value) for name in others)  # others may be pictures
    cells = (cell for name in others for cell in splits[split][name][:])
    may_be_labels = arguments.label_column is None and len(others) > 1 and are_plain
    if may_be_labels and all(is_share(cell) for cell in cells if cell is not None):
        return others
    if not needs_one and arguments.label_column is None:
        return [LABEL]
    wanted = arguments.label_column or " or ".join(LABEL_COLUMNS)
    raise ValueError(
        f"expected a column {wanted!r}, found columns {list(own)}; set --label_column, or --label_columns for several"
    )


# --- the table ---

ONLY_PREDICTS = Sign("--do_predict alone, which needs no labels", lambda place, arguments: arguments.only_predicts)

LAYOUTS = (
    stored.SAVED,
    stored.PARQUET,
    Layout(
        "table of labels",
        "labels.csv (or .tsv, .txt, .jsonl, .json), or train.csv and validation.csv: a path and a label a row",
        (
            HAS_TABLE,
            Sign(
                "a table with a column of pictures and one of labels (--image_column, --label_column), or several "
                "columns of 0 and 1 (--label_columns)",
                lambda place, arguments: arguments.label_level is None and bool(label_tables(place, arguments)),
            ),
        ),
        read_label_tables,
        has_user_columns=True,
    ),
    Layout(
        "class folders",
        "train/LABEL/.../1.jpg and validation/LABEL/.../1.jpg, or LABEL/.../1.jpg, or LABEL/train/.../1.jpg",
        (
            Sign("pictures", lambda place, arguments: bool(place.pictures)),
            Sign("folders of two labels at least", has_class_folders),
        ),
        read_class_folders,
    ),
    Layout(
        "table of pictures",
        "a table or list of paths without labels, for --do_predict alone",
        (
            Sign("a table with a column of pictures (--image_column)", lambda place, a: bool(picture_tables(place, a))),
            ONLY_PREDICTS,
        ),
        lambda place, arguments: read_tables(place, picture_tables(place, arguments), arguments, HEADERLESS),
        has_user_columns=True,
    ),
    Layout(
        "pictures without labels",
        "pictures at any depth, for --do_predict alone",
        (Sign("pictures", lambda place, arguments: bool(place.pictures)), ONLY_PREDICTS),
        read_folder,
    ),
    stored.HUB,
)
