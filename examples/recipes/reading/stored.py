"""Data sets that `datasets` reads by itself: saved by it, of parquet files, or on the Hub."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
from datasets import (
    Dataset,
    DatasetDict,
    IterableDatasetDict,
    load_dataset,
    load_from_disk,
)

from recipes.arguments import DataArguments
from recipes.reading.layouts import Layout, Sign
from recipes.reading.place import Place, split_of_file
from recipes.reading.tables import ROW


def named_rows(splits: DatasetDict, files: dict[str, list[str]] | None = None) -> DatasetDict:
    """Adds ROW: the number of the row, in its file where the files of each split are given."""
    for split, rows in splits.items():
        names: list = list(range(len(rows)))
        if files is not None:
            names = [
                f"{Path(file).name} row {number}"
                for file in files[split]
                for number in range(pq.read_metadata(file).num_rows)
            ]
        splits[split] = rows.add_column(ROW, names)
    return splits


def read_saved(place: Place, arguments: DataArguments) -> DatasetDict | IterableDatasetDict:
    saved = load_from_disk(place.name)
    splits = DatasetDict({arguments.train_split: saved}) if isinstance(saved, Dataset) else saved
    if arguments.streaming:
        return IterableDatasetDict({name: rows.to_iterable_dataset() for name, rows in splits.items()})
    return named_rows(splits)


def read_parquet(place: Place, arguments: DataArguments) -> DatasetDict | IterableDatasetDict:
    files: dict[str, list[str]] = {}
    for file in place.with_suffix(".parquet"):
        try:
            pq.read_metadata(place.full(file))
        except (OSError, ValueError) as error:
            raise ValueError(f"{place.full(file)} cannot be read as parquet: {error}; remove or replace it") from error
        files.setdefault(split_of_file(file, arguments) or arguments.train_split, []).append(place.full(file))
    splits = load_dataset("parquet", data_files=files, streaming=arguments.streaming)
    return splits if arguments.streaming else named_rows(splits, files)


def read_hub(place: Place, arguments: DataArguments) -> DatasetDict | IterableDatasetDict:
    try:
        splits = load_dataset(place.name, streaming=arguments.streaming)
    except (OSError, ValueError) as error:  # of the network, or no data set of that name
        raise ValueError(
            f"expected a file, a folder or a data set on the Hub of the name {place.name}: neither file nor folder is "
            f"here, and as a data set it cannot be read ({error})"
        ) from error
    return splits if arguments.streaming else named_rows(splits)


def is_saved(place: Place, arguments: DataArguments) -> bool:
    return any((place.path / name).exists() for name in ("dataset_dict.json", "dataset_info.json"))


def may_be_on_the_hub(place: Place, arguments: DataArguments) -> bool:
    return not place.path.exists() and not place.name.startswith((".", "/", "~")) and place.name.count("/") <= 1


SAVED = Layout(
    "saved by datasets",
    "the folder that save_to_disk wrote",
    (Sign("dataset_dict.json or dataset_info.json", is_saved),),
    read_saved,
    has_user_columns=True,
)
PARQUET = Layout(
    "parquet",
    "train-00000.parquet, test-00000.parquet, ...; pictures as paths, bytes or {bytes, path}",
    (Sign("files of the suffix .parquet", lambda place, arguments: bool(place.with_suffix(".parquet"))),),
    read_parquet,
    has_user_columns=True,
)
HUB = Layout(
    "a data set on the Hub",
    "OWNER/NAME",
    (Sign("a name on the Hub, where no file or folder of that name is here", may_be_on_the_hub),),
    read_hub,
    has_user_columns=True,
)
