"""Tars of samples (WebDataset) -> rows: the files of a sample share their name up to the first dot."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, Value
from datasets import Image as ImageFeature

from recipes.arguments import DataArguments
from recipes.reading.place import Place, split_of_file
from recipes.reading.tables import IMAGE, PROBLEM, ROW, column_of
from vit_embed.retrieval.pictures import PICTURE_SUFFIXES

SUFFIXES = (".tar", ".tar.gz", ".tgz")
IMAGE_NAMES = tuple(suffix.removeprefix(".") for suffix in PICTURE_SUFFIXES)


def samples(path: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {what follows the key's dot: bytes}) of each sample.

    Raises:
        tarfile.TarError, OSError, EOFError: the tar ends in the middle; the samples before were given.
    """
    key, fields = None, {}
    with tarfile.open(path, "r|*") as tar:
        for member in tar:
            if not member.isfile():
                continue
            folder, _, file = member.name.rpartition("/")
            stem, _, name = file.partition(".")
            if f"{folder}/{stem}" != key and fields:
                yield key.lstrip("./"), fields
                fields = {}
            key = f"{folder}/{stem}"
            fields[name.lower()] = tar.extractfile(member).read()
    if fields:
        yield key.lstrip("./"), fields


def rows_of_tar(path: str, image: str | None, caption_column: str | None, usual: tuple[str, ...]) -> Iterator[dict]:
    """Rows of IMAGE, captions (a list of texts), ROW and PROBLEM; the last row of a torn tar says so."""
    name = Path(path).name
    try:
        for key, fields in samples(path):
            texts = {name: value.decode("utf-8", "replace") for name, value in fields.items() if name == "txt"}
            if "json" in fields:
                texts |= {f"json.{name}": value for name, value in json.loads(fields["json"]).items()}
            asked = column_of(list(texts), caption_column, usual)
            caption = texts.get(asked)
            picture = next((fields[name] for name in ([image] if image else IMAGE_NAMES) if name in fields), None)
            yield {
                IMAGE: {"bytes": picture, "path": None},
                "captions": [caption] if isinstance(caption, str) else caption or [],
                ROW: f"{name}/{key}",
                PROBLEM: "no picture" if picture is None else None,
            }
    except (tarfile.TarError, OSError, EOFError) as error:
        empty = {"bytes": None, "path": None}
        yield {IMAGE: empty, "captions": [], ROW: name, PROBLEM: f"the rest of a tar that breaks off ({error})"}


FEATURES = Features(
    {IMAGE: ImageFeature(), "captions": [Value("string")], ROW: Value("string"), PROBLEM: Value("string")}
)


def rows_of_tars(
    paths: list[str], stamps: list[str], image: str | None, caption_column: str | None, usual: tuple[str, ...]
) -> Iterator[dict]:
    """As rows_of_tar, of several; `stamps` make another cache where a file changed."""
    for path in paths:
        yield from rows_of_tar(path, image, caption_column, usual)


def read_tars(
    place: Place, arguments: DataArguments, caption_column: str | None, usual: tuple[str, ...]
) -> DatasetDict | IterableDatasetDict:
    files: dict[str, list[str]] = {}
    for file in place.with_suffix(*SUFFIXES):
        files.setdefault(split_of_file(file, arguments) or arguments.train_split, []).append(place.full(file))
    make, kind = (IterableDataset, IterableDatasetDict) if arguments.streaming else (Dataset, DatasetDict)
    return kind(
        {
            split: make.from_generator(
                rows_of_tars,
                features=FEATURES,
                gen_kwargs={
                    "paths": paths,
                    "stamps": [str(os.stat(path).st_mtime_ns) for path in paths],
                    "image": arguments.image_column,
                    "caption_column": caption_column,
                    "usual": usual,
                },
            )
            for split, paths in files.items()
        }
    )
