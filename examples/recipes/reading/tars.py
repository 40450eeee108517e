"""Tars of samples (WebDataset) -> rows: the files of a sample share their name up to the first dot."""

from __future__ import annotations

import json
import logging
import os
import tarfile
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, Value
from datasets import Image as ImageFeature

from recipes.arguments import DataArguments
from recipes.reading.place import Place, split_of_file
from recipes.reading.tables import IMAGE, PROBLEM, ROW, column_of
from vit_embed.retrieval.pictures import PICTURE_SUFFIXES

logger = logging.getLogger(__name__)

SUFFIXES = (".tar", ".tar.gz", ".tgz")
IMAGE_NAMES = tuple(suffix.removeprefix(".") for suffix in PICTURE_SUFFIXES)
NOTE = "__note__"  # what was chosen for a row that could be read in two ways
NUM_PEEKED = 64  # samples that show what there is
SORTED = "the files of a sample have to lie next to each other, as tar --sort=name puts them"
TORN = (tarfile.TarError, OSError, EOFError, zlib.error)


class Fields(NamedTuple):
    """Which files of a sample, or keys of its .json as `json.KEY`, are read.

    Args:
        image, captions: as asked, or None for the usual ones.
        usual_captions: names that captions have.
        lists, texts: others that are asked for, of which the first hold lists of texts.
    """

    image: str | None
    captions: str | None
    usual_captions: tuple[str, ...]
    lists: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()

    def features(self, captions: str) -> Features:
        several = dict.fromkeys((captions, *self.lists), [Value("string")])
        single = dict.fromkeys((*self.texts, ROW, PROBLEM, NOTE), Value("string"))
        return Features({IMAGE: ImageFeature(), **several, **single})


class Header(tarfile.TarInfo):
    """tarfile takes a header that is cut off or none at all for the end; here only the end mark is."""

    @classmethod
    def frombuf(cls, buffer, encoding, errors):
        try:
            return super().frombuf(buffer, encoding, errors)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.SubsequentHeaderError(str(error)) from error


def samples(path: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {what follows the key's dot: bytes}) of each sample.

    Raises:
        one of TORN: the tar ends in the middle; the samples before were given.
    """
    key, fields = None, {}
    with tarfile.open(path, "r|*", tarinfo=Header) as tar:
        for member in tar:
            folder, _, file = member.name.rpartition("/")
            stem, _, name = file.partition(".")
            if not member.isfile() or not stem:
                continue
            if f"{folder}/{stem}" != key and fields:
                yield key.removeprefix("./").lstrip("/"), fields
                fields = {}
            key = f"{folder}/{stem}"
            fields[name.lower()] = tar.extractfile(member).read()
            tar.members = []  # tarfile keeps all of them
    if fields:
        yield key.removeprefix("./").lstrip("/"), fields


def decoded(fields: dict[str, bytes], asked: Fields) -> dict[str, object]:
    """The texts of a sample that may be asked for: lines of files, and what its .json holds, as `json.KEY`.

    Raises:
        ValueError: one is no text, or no JSON object.
    """
    wanted, found = {asked.captions, *asked.usual_captions, *asked.lists, *asked.texts}, {}
    for name, value in fields.items():
        if name == "json":
            try:
                entries = json.loads(value)
            except ValueError as error:
                raise ValueError("a .json that is none") from error
            if not isinstance(entries, dict):
                raise ValueError(f"a .json that is a {type(entries).__name__}, not an object")
            found |= {f"json.{key}": entry for key, entry in entries.items()}
        elif name in wanted:
            try:
                found[name] = value.decode("utf-8-sig").splitlines()
            except UnicodeDecodeError as error:
                raise ValueError(f"a .{name} that is no text in UTF-8") from error
    return found


def texts_of(value: object, name: str) -> list[str]:
    """What a field holds as a list of texts without the empty ones.

    Raises:
        ValueError: it holds something else.
    """
    entries = value if isinstance(value, list) else [value]
    wrong = next((entry for entry in entries if not (entry is None or isinstance(entry, str))), None)
    if wrong is not None:
        raise ValueError(f"a {type(wrong).__name__} in {name!r} in place of a text")
    return [entry.strip() for entry in entries if entry and entry.strip()]


def empty_row(name: str, asked: Fields, captions: str, problem: str | None = None) -> dict:
    empty = {**dict.fromkeys((captions, *asked.lists), []), **dict.fromkeys((*asked.texts, NOTE))}
    return {IMAGE: None, **empty, ROW: name, PROBLEM: problem}


def row_of(name: str, fields: dict[str, bytes], asked: Fields, captions: str) -> dict:
    """A sample as a row of IMAGE, captions, what else is asked for, ROW, PROBLEM and NOTE."""
    row = empty_row(name, asked, captions)
    pictures = [name for name in ([asked.image] if asked.image else IMAGE_NAMES) if name in fields]
    if not pictures:
        row[PROBLEM] = f"no picture{f' of the name {asked.image!r}' if asked.image else ''}, but {', '.join(fields)}"
        return row
    row[IMAGE] = {"bytes": fields[pictures[0]], "path": None}
    if len(pictures) > 1:
        row[NOTE] = f"{' and '.join(pictures)}, of which {pictures[0]} is used (--image_column)"
    try:
        texts = decoded(fields, asked)
        name = column_of(list(texts), asked.captions, asked.usual_captions)
        row[captions] = texts_of(texts.get(name), name)
        row |= {name: texts_of(texts.get(name), name) for name in asked.lists}
        row |= {name: None if texts.get(name) is None else str(texts[name]) for name in asked.texts}
    except ValueError as error:
        row[PROBLEM] = str(error)
    return row


def rows_of_tars(paths: list[str], stamps: list[str], folder: str, asked: Fields, captions: str) -> Iterator[dict]:
    """The rows of tars below a folder; that of a torn tar says so, behind those before. `stamps` tell that a file
    changed, so that it is not taken from the cache of `datasets`."""
    for path in paths:
        try:
            for key, fields in samples(os.path.join(folder, path)):
                yield row_of(f"{path}/{key}", fields, asked, captions)
        except TORN as error:
            problem = f"the rest of a tar that cannot be read ({error})"
            yield empty_row(path, asked, captions, problem)


def check_fields(path: str, asked: Fields) -> None:
    """Says in the log what is read as captions; ValueError where what is asked for is in none of the first samples."""
    peeked = []
    try:
        for _, fields in islice(samples(path), NUM_PEEKED):
            peeked.append(fields)
    except TORN:
        pass
    texts = []
    for fields in peeked:
        try:
            texts.append(decoded(fields, asked))
        except ValueError:
            continue
    there = sorted({name for found in (*peeked, *texts) for name in found})
    wanted = [name for name in (asked.image, asked.captions, *asked.lists, *asked.texts) if name is not None]
    missing = [name for name in wanted if name not in there]
    names = {column_of(list(found), asked.captions, asked.usual_captions) for found in texts} - {None}
    if peeked and (missing or not names):
        what = f"files {missing}" if missing else f"captions ({', '.join(asked.usual_captions[:4])}, ...)"
        raise ValueError(
            f"expected {what} in the samples of {path}, they have {', '.join(there)}; set --image_column, "
            f"--caption_column, --tag_column and --group_column, where json.KEY is a key of the .json; {SORTED}"
        )
    if len(peeked) > 1 and max(map(len, peeked)) == 1:
        raise ValueError(f"expected a picture beside its text in {path}, each sample is one file; {SORTED}")
    logger.info("%s: captions are read from %s", path, " and ".join(sorted(names)))


def read_tars(
    place: Place, arguments: DataArguments, asked: Fields, captions: str
) -> DatasetDict | IterableDatasetDict:
    """Raises ValueError where the first samples lack what is asked for."""
    files: dict[str, list[str]] = {}
    for file in place.with_suffix(*SUFFIXES):
        files.setdefault(split_of_file(file, arguments) or arguments.train_split, []).append(file)
    for paths in files.values():
        check_fields(place.full(paths[0]), asked)
    make, kind = (IterableDataset, IterableDatasetDict) if arguments.streaming else (Dataset, DatasetDict)
    shared = {"folder": str(Path(place.folder).resolve()), "asked": asked, "captions": captions}
    return kind(
        {
            split: make.from_generator(
                rows_of_tars,
                features=asked.features(captions),
                gen_kwargs={
                    "paths": paths,
                    "stamps": [str(os.stat(place.full(path)).st_mtime_ns) for path in paths],
                    **shared,
                },
            )
            for split, paths in files.items()
        }
    )
