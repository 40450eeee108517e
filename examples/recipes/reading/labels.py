"""Layouts of labelled pictures -> rows of IMAGE, LABEL (where there is one) and ROW."""

from __future__ import annotations

from pathlib import PurePosixPath

from datasets import ClassLabel, DatasetDict
from datasets import Image as ImageFeature

from recipes.arguments import DataArguments
from recipes.reading import stored
from recipes.reading.layouts import HAS_TABLE, Layout, Sign
from recipes.reading.place import Place, split_folders
from recipes.reading.tables import IMAGE, ROW, from_columns, read_tables, tables_of

LABEL = "label"
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category", "target", "y", "breed", "species")
HEADERLESS = (IMAGE, LABEL)


# --- class folders ---


def class_paths(place: Place, arguments: DataArguments) -> dict[str, list[tuple[str, str | None]]]:
    """{split: [(file, label)]}: the label is the first folder below that of the split, whatever lies between.

    Folders that hold nothing but one folder are passed through; pictures beside the folders of labels have none.
    """
    tops = split_folders(place, arguments)
    files = {split: [] for split in tops.values()} or {arguments.train_split: []}
    for file in place.pictures:
        top, _, rest = file.partition("/")
        if not tops:
            files[arguments.train_split].append(("", file))
        elif top in tops:
            files[tops[top]].append((f"{top}/", rest))
    return {split: _labelled(found) for split, found in files.items()}


def _labelled(files: list[tuple[str, str]]) -> list[tuple[str, str | None]]:
    parts = [PurePosixPath(file).parts for _, file in files]
    depth = 0
    while parts and all(len(p) > depth + 2 for p in parts) and len({p[depth] for p in parts}) == 1:
        depth += 1
    return [(start + file, p[depth] if len(p) > depth + 1 else None) for (start, file), p in zip(files, parts)]


def has_class_folders(place: Place, arguments: DataArguments) -> bool:
    labels = {label for files in class_paths(place, arguments).values() for _, label in files}
    return len(labels - {None}) > 1


def read_class_folders(place: Place, arguments: DataArguments) -> DatasetDict:
    found = class_paths(place, arguments)
    names = sorted({label for files in found.values() for _, label in files} - {None})
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


# --- the table ---


def label_tables(place: Place, arguments: DataArguments) -> list[str]:
    return tables_of(place, arguments, arguments.label_column, LABEL_COLUMNS, HEADERLESS)


LAYOUTS = (
    stored.SAVED,
    stored.PARQUET,
    Layout(
        "table of labels",
        "labels.csv (or .tsv, .txt, .jsonl, .json), or train.csv and validation.csv: a path and a label a row",
        (
            HAS_TABLE,
            Sign(
                "a table with a column of pictures and one of labels (--image_column, --label_column)",
                lambda place, arguments: bool(label_tables(place, arguments)),
            ),
        ),
        lambda place, arguments: read_tables(place, label_tables(place, arguments), arguments, HEADERLESS),
        has_user_columns=True,
    ),
    Layout(
        "class folders",
        "train/LABEL/.../1.jpg and validation/LABEL/.../1.jpg, or LABEL/.../1.jpg",
        (
            Sign("pictures", lambda place, arguments: bool(place.pictures)),
            Sign("folders of two labels at least", has_class_folders),
        ),
        read_class_folders,
    ),
    stored.HUB,
)
