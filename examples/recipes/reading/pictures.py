"""Layouts of pictures without labels -> rows of IMAGE and ROW."""

from __future__ import annotations

from datasets import DatasetDict
from datasets import Image as ImageFeature

from recipes.arguments import DataArguments
from recipes.reading import stored
from recipes.reading.layouts import Layout, Sign
from recipes.reading.place import Place, split_folders
from recipes.reading.tables import IMAGE, ROW, from_columns


def read_folder(place: Place, arguments: DataArguments) -> DatasetDict:
    tops = split_folders(place, arguments)
    files: dict[str, list[str]] = {}
    for file in place.pictures:
        split = tops.get(file.split("/")[0]) if tops else arguments.train_split
        if split is not None:
            files.setdefault(split, []).append(file)
    columns = {split: {IMAGE: list(map(place.full, found)), ROW: found} for split, found in files.items()}
    return DatasetDict({s: from_columns(found).cast_column(IMAGE, ImageFeature()) for s, found in columns.items()})


LAYOUTS = (
    stored.SAVED,
    stored.PARQUET,
    Layout(
        "folder of pictures",
        "pictures at any depth, in train/ and validation/ or without splits",
        (Sign("pictures", lambda place, arguments: bool(place.pictures)),),
        read_folder,
    ),
    stored.HUB,
)
