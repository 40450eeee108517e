"""Data sets that `datasets` reads by itself: saved by it, of parquet files, or on the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)

from recipes.arguments import DataArguments
from recipes.reading.layouts import Layout, Sign
from recipes.reading.place import Place, split_of_file
from recipes.reading.tables import PROBLEM, ROW

ROWS_AT_A_TIME = 64


def named_rows(splits: DatasetDict, files: dict[str, list[str]] | None = None, folder: Path = Path()) -> DatasetDict:
    """Adds ROW: the number of the row, in its file where the files of each split below a folder are given."""
    for split, rows in splits.items():
        names: list = list(range(len(rows)))
        if files is not None:
            names = [
                f"{file} row {number}"
                for file in files[split]
                for number in range(pq.read_metadata(folder / file).num_rows)
            ]
        splits[split] = rows.add_column(ROW, names)
    return splits


def read_saved(place: Place, arguments: DataArguments) -> DatasetDict:
    """Also for --streaming: what is saved is mapped into memory, not copied."""
    saved = load_from_disk(str(place.path))
    return named_rows(DatasetDict({arguments.train_split: saved}) if isinstance(saved, Dataset) else saved)


def read_parquet(place: Place, arguments: DataArguments) -> DatasetDict | IterableDatasetDict:
    files: dict[str, list[str]] = {}
    for file in place.with_suffix(".parquet"):
        try:
            pq.read_metadata(place.full(file))
        except (OSError, ValueError) as error:
            raise ValueError(f"{place.full(file)} cannot be read as parquet: {error}; remove or replace it") from error
        files.setdefault(split_of_file(file, arguments) or arguments.train_split, []).append(file)
    if arguments.streaming:
        return IterableDatasetDict({split: parquet_stream(names, place.folder) for split, names in files.items()})
    full = {split: list(map(place.full, names)) for split, names in files.items()}
    return named_rows(load_dataset("parquet", data_files=full), files, place.folder)


def parquet_stream(files: list[str], folder: Path) -> IterableDataset:
    """The rows of some files as they come; each row group is a shard of its own for processes and workers."""
    parts = []
    for file in files:
        metadata, start = pq.read_metadata(folder / file), 0
        for group in range(metadata.num_row_groups):
            parts.append((file, group, start))
            start += metadata.row_group(group).num_rows
    features = Features.from_arrow_schema(pq.read_schema(folder / files[0]))
    features |= {ROW: Value("string"), PROBLEM: Value("string")}
    given = {"parts": parts, "folder": folder}
    return IterableDataset.from_generator(rows_of_parquet, features=Features(features), gen_kwargs=given)


def rows_of_parquet(parts: list[tuple[str, int, int]], folder: Path) -> Iterator[dict]:
    """The rows of (file, row group, number of its first row); what cannot be read is one row that says so."""
    for file, group, number in parts:
        try:
            with pq.ParquetFile(folder / file) as parquet:
                for batch in parquet.iter_batches(ROWS_AT_A_TIME, row_groups=[group]):
                    for row in batch.to_pylist():
                        yield {**row, ROW: f"{file} row {number}", PROBLEM: None}
                        number += 1
        except (OSError, ValueError) as error:
            yield {ROW: f"{file} row {number}", PROBLEM: f"the rest of a file that cannot be read ({error})"}


def read_hub(place: Place, arguments: DataArguments) -> DatasetDict | IterableDatasetDict:
    try:
        splits = load_dataset(place.name, streaming=arguments.streaming)
    except (OSError, ValueError) as error:  # of the network, or no data set of that name
        raise ValueError(
            f"expected a file, a folder or a data set on the Hub of the name {place.name}: neither file nor folder is "
            f"here, and as a data set it cannot be read ({error})"
        ) from error
    if not arguments.streaming:
        return named_rows(splits)
    return IterableDatasetDict({split: _numbered(rows) for split, rows in splits.items()})


def _numbered(rows: IterableDataset) -> IterableDataset:
    """ROW is the shard and the number of the row there, which stay with it whatever reads which shard when."""
    rows = rows if rows.features is not None else rows._resolve_features()
    features = Features({**rows.features, ROW: Value("string")})
    shards = [
        rows.shard(rows.num_shards, shard).map(partial(_number, shard=shard), with_indices=True, features=features)
        for shard in range(rows.num_shards)
    ]
    return concatenate_datasets(shards)


def _number(row: dict, number: int, shard: int) -> dict[str, str]:
    return {ROW: f"shard {shard} row {number}"}


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
