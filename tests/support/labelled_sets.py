"""Small labelled data sets in every layout that the classification recipe reads, 12 rows to train on and 6 to judge.

The pictures are of one colour, from which `truth_of` tells what their label is: a row that was given another row's
picture or label shows.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

COUNTS = {"train": 12, "validation": 6}
NAMES = ("cat", "dog", "Kuh")
SINGLE, MULTI, REGRESSION, SOFT = "single", "multi", "regression", "soft"
LOW, HIGH = 40, 200


# --- what there is to learn ---


def label_of(row: int) -> str:
    return NAMES[row % 3]


def several_of(row: int) -> list[str]:
    return [name for place, name in enumerate(NAMES) if (row + 1) >> place & 1]


def value_of(row: int) -> float:
    return 12.5 + 2.75 * row


def shares_of(row: int) -> list[float]:
    return [(0.6, 0.4, 0.0), (0.0, 1.0, 0.0), (0.2, 0.2, 0.6)][row % 3]


def colour(kind: str, row: int) -> tuple[int, ...]:
    if kind == REGRESSION:
        return (round(value_of(row) * 4),) * 3
    if kind == SOFT:
        return tuple(round(255 * share) for share in shares_of(row))
    there = [label_of(row)] if kind == SINGLE else several_of(row)
    return tuple(HIGH if name in there else LOW for name in NAMES)


def truth_of(kind: str, picture: Image.Image) -> object:
    """What the picture's colour says: a name, a list of names, a value, or shares."""
    pixel = np.asarray(picture.convert("RGB"))[12, 12]
    if kind == REGRESSION:
        return float(pixel[0]) / 4
    if kind == SOFT:
        return [round(float(each) / 255, 2) for each in pixel]
    there = [name for name, level in zip(NAMES, pixel) if level > 128]
    return there[0] if kind == SINGLE else there


# --- writing ---


def picture(kind: str, row: int) -> Image.Image:
    return Image.new("RGB", (24 + row, 24), colour(kind, row))


def save(path: Path, kind: str, row: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(kind, row).save(path)


def png(kind: str, row: int) -> bytes:
    file = io.BytesIO()
    picture(kind, row).save(file, "png")
    return file.getvalue()


def rows_of(split: str) -> range:
    return range(12) if split == "train" else range(12, 18)


def write_table(path: Path, rows: Sequence[dict], separator: str = ",", header: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        if header:
            table.writeheader()
        table.writerows(rows)


# --- class folders ---


def folders(place: Callable[[str, int], str]) -> Callable[[Path], None]:
    """Each picture in the folder that `place` gives for its split and row."""

    def write(folder: Path) -> None:
        for split in COUNTS:
            for row in rows_of(split):
                save(folder / place(split, row) / f"{row}.png", SINGLE, row)

    return write


class_folders = folders(lambda split, row: f"{split}/{label_of(row)}")
deep_folders = folders(lambda split, row: f"{label_of(row)}/batch{row % 2}")
splits_in_labels = folders(lambda split, row: f"{label_of(row)}/{split.replace('validation', 'valid')}")


def wrapped_folders(folder: Path) -> None:
    names = {"train": "Train", "validation": "val"}
    folders(lambda split, row: f"pets/{names[split]}/images/{label_of(row)}")(folder)
    (folder / "notes.txt").write_text("photographed by ann\n")


def unlabelled_test(folder: Path) -> None:
    class_folders(folder)
    for row in range(4):
        save(folder / "test" / f"{row}.png", SINGLE, row)


# --- tables ---


def csv_table(folder: Path) -> None:
    """One table with a column of splits, and pictures in a folder beside it."""
    rows = []
    for split in COUNTS:
        for row in rows_of(split):
            save(folder / "pictures" / f"{row}.png", SINGLE, row)
            rows.append({"file_name": f"{row}.png", "label": label_of(row), "split": split})
    write_table(folder / "labels.csv", rows)


def tsv_tables(folder: Path) -> None:
    for split, name in (("train", "train"), ("validation", "val")):
        rows = [{"path": f"img/{row}.png", "category": label_of(row)} for row in rows_of(split)]
        for row in rows_of(split):
            save(folder / "img" / f"{row}.png", SINGLE, row)
        write_table(folder / f"{name}.tsv", rows, "\t")


def txt_lists(folder: Path) -> None:
    """Lists of a path and a number, as of ImageNet."""
    for split, name in (("train", "train"), ("validation", "val")):
        lines = []
        for row in rows_of(split):
            save(folder / name / f"{row}.png", SINGLE, row)
            lines.append(f"{name}/{row}.png {NAMES.index(label_of(row))}")
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


def headerless_csv(folder: Path) -> None:
    for row in range(18):
        save(folder / "photos" / f"{row}.png", SINGLE, row)
    rows = [{"path": f"photos/{row}.png", "label": label_of(row)} for row in range(18)]
    write_table(folder / "all.csv", rows, header=False)


def jsonl_of(kind: str, cells_of: Callable[[int], dict]) -> Callable[[Path], None]:
    """A metadata.jsonl in the folder of each split."""

    def write(folder: Path) -> None:
        for split in COUNTS:
            for row in rows_of(split):
                save(folder / split / f"{row}.png", kind, row)
            lines = [json.dumps({"file_name": f"{row}.png", **cells_of(row)}) for row in rows_of(split)]
            (folder / split / "metadata.jsonl").write_text("\n".join(lines))

    return write


def json_list(folder: Path) -> None:
    for row in range(18):
        save(folder / "images" / f"{row}.png", SINGLE, row)
    rows = [{"image": f"images/{row}.png", "label": label_of(row)} for row in range(18)]
    (folder / "train.json").write_text(json.dumps(rows[:12]))
    (folder / "validation.json").write_text(json.dumps(rows[12:]))


def kaggle(folder: Path) -> None:
    """train.csv of names without a suffix, pictures to test without labels, and a form that is no table of labels."""
    rows = [{"id": f"a{row:02}", "label": label_of(row)} for row in range(18)]
    for row, cells in enumerate(rows):
        save(folder / "train" / f"{cells['id']}.png", SINGLE, row)
    for row in range(4):
        save(folder / "test" / f"b{row}.png", SINGLE, row)
    write_table(folder / "train.csv", rows)
    write_table(folder / "sample_submission.csv", [{"id": f"b{row}", "label": "cat"} for row in range(4)])


# --- parquet and saved ---


def parquet_of(column: Callable[[Path, int], object], in_files: bool) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for split in COUNTS:
            if in_files:
                for row in rows_of(split):
                    save(folder / "files" / f"{row}.png", SINGLE, row)
            cells = {"image": [column(folder, row) for row in rows_of(split)]}
            cells["label"] = [label_of(row) for row in rows_of(split)]
            pandas.DataFrame(cells).to_parquet(folder / f"{split}-00000.parquet")

    return write


def saved(folder: Path) -> None:
    splits = {}
    for split in COUNTS:
        columns = {"image": [picture(SINGLE, row) for row in rows_of(split)]}
        columns["label"] = [label_of(row) for row in rows_of(split)]
        splits[split] = Dataset.from_dict(columns, Features({"image": ImageFeature(), "label": Value("string")}))
    DatasetDict(splits).save_to_disk(folder)


# --- other kinds of labels ---


def table_of(kind: str, cells_of: Callable[[int], dict]) -> Callable[[Path], None]:
    """train.csv and validation.csv, with pictures in images/."""

    def write(folder: Path) -> None:
        for split in COUNTS:
            for row in rows_of(split):
                save(folder / "images" / f"{row}.png", kind, row)
            write_table(folder / f"{split}.csv", [{"image": f"{row}.png", **cells_of(row)} for row in rows_of(split)])

    return write


def soft_lists(folder: Path) -> None:
    splits = {}
    for split in COUNTS:
        columns = {"image": [picture(SOFT, row) for row in rows_of(split)]}
        columns["label"] = [shares_of(row) for row in rows_of(split)]
        features = Features({"image": ImageFeature(), "label": List(Value("float32"))})
        splits[split] = Dataset.from_dict(columns, features)
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        rows.to_parquet(folder / f"{split}.parquet")


def flags(row: int, yes: object = 1, no: object = 0) -> dict[str, object]:
    return {name: yes if name in several_of(row) else no for name in NAMES}


SETS: dict[str, Callable[[Path], None]] = {
    "class_folders": class_folders,
    "deep_folders": deep_folders,
    "wrapped_folders": wrapped_folders,
    "splits_in_labels": splits_in_labels,
    # The first folders are groups of the labels.
    "labels_below": folders(lambda split, row: f"{split}/{'farm' if row % 3 == 2 else 'home'}/{label_of(row)}"),
    "unlabelled_test": unlabelled_test,
    "csv_table": csv_table,
    "tsv_tables": tsv_tables,
    "txt_lists": txt_lists,
    "headerless_csv": headerless_csv,
    "jsonl_tables": jsonl_of(SINGLE, lambda row: {"label": label_of(row)}),
    "json_list": json_list,
    "kaggle": kaggle,
    "parquet_paths": parquet_of(lambda folder, row: f"files/{row}.png", True),
    "parquet_bytes": parquet_of(lambda folder, row: png(SINGLE, row), False),
    "parquet_pandas": parquet_of(lambda folder, row: {"bytes": png(SINGLE, row), "path": f"{row}.png"}, False),
    "parquet_relative": parquet_of(lambda folder, row: {"bytes": None, "path": f"files/{row}.png"}, True),
    "saved": saved,
    "tags_jsonl": jsonl_of(MULTI, lambda row: {"labels": several_of(row)}),
    "tags_separated": table_of(MULTI, lambda row: {"label": "|".join(several_of(row))}),
    "tags_pandas": table_of(MULTI, lambda row: {"label": several_of(row)}),
    "tags_01": table_of(MULTI, flags),
    "tags_minus": table_of(MULTI, lambda row: {**flags(row, 1, -1), "photographer": "ann"}),
    "values": table_of(REGRESSION, lambda row: {"label": value_of(row)}),
    "whole_values": table_of(REGRESSION, lambda row: {"label": round(value_of(row) * 4)}),
    "two_values": table_of(REGRESSION, lambda row: {"width": value_of(row), "price": 1000 * value_of(row)}),
    "soft_columns": table_of(SOFT, lambda row: dict(zip(NAMES, shares_of(row)))),
    "soft_lists": soft_lists,
}
