"""Layouts of captioned pictures -> rows of IMAGE, CAPTIONS (a text or a list of texts) and ROW."""

from __future__ import annotations

import ast
import json
import logging
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from accelerate import PartialState
from datasets import Dataset, DatasetDict, IterableDataset
from datasets import Image as ImageFeature

from recipes.arguments import DataArguments
from recipes.reading import stored, tars
from recipes.reading.layouts import HAS_TABLE, Layout, Sign
from recipes.reading.place import Finder, Place, split_folders, split_of_file
from recipes.reading.tables import IMAGE, PROBLEM, ROW, from_rows, read_tables, tables_of

logger = logging.getLogger(__name__)

CAPTIONS = "captions"
CAPTION_COLUMNS = (
    *("captions", "caption", "text", "texts", "title", "txt", "description", "sentence", "sentences", "alt"),
    *("alt_text", "comment", "prompt", "raw"),
)
TAR_CAPTIONS = ("txt", "caption", *(f"json.{name}" for name in CAPTION_COLUMNS))
HEADERLESS = (IMAGE, CAPTIONS)
MOST_SHARDS = 64  # of a stream of what lies here, for each process
NUM_SNIFFED = 64


def as_list(captions: str | list[str] | None) -> list[str]:
    """One caption and a list of captions in the same form, without the empty ones."""
    captions = [captions] if isinstance(captions, str) else captions or ()
    return [caption for caption in captions if caption and caption.strip()]


# --- tables ---


def caption_tables(place: Place, arguments: DataArguments) -> list[str]:
    return tables_of(place, arguments, arguments.caption_column, CAPTION_COLUMNS, HEADERLESS)


def with_pictures(splits: dict[str, list[dict]]) -> DatasetDict:
    read = from_rows(splits)
    return DatasetDict({split: rows.cast_column(IMAGE, ImageFeature()) for split, rows in read.items()})


# --- json of COCO and of Karpathy's splits ---


def jsons_with(place: Place, *words: str) -> list[str]:
    """The .json files that hold all of `words`; those of boxes are large and are not parsed."""
    key = ("jsons", words)
    if key not in vars(place):
        vars(place)[key] = [file for file in place.with_suffix(".json") if _holds(Path(place.full(file)), words)]
    return vars(place)[key]


def _holds(path: Path, words: tuple[str, ...]) -> bool:
    if path.stat().st_size == 0:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return all(content.find(f'"{word}"'.encode()) >= 0 for word in words)


def _parsed(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"expected JSON in {path}: {error}") from error


def read_jsons(place: Place, arguments: DataArguments, files: list[str], rows_of) -> DatasetDict:
    """Splits of the rows that `rows_of(content of a file)` gives: (split or None, path, captions, name).

    A file whose pictures are not here is left out.

    Raises:
        ValueError: so are all.
    """
    splits: dict[str, list[dict]] = {}
    lacking = []
    for file in files:
        path = Path(place.full(file))
        rows = list(rows_of(_parsed(path)))
        finder = Finder(path, arguments).fit([row[1] for row in rows])
        if rows and not any(finder.finds(row[1]) for row in rows):
            lacking.append(f"expected the pictures of {path}, no file is at {rows[0][1]!r}; set --image_folder")
            continue
        of_file = split_of_file(file, arguments) or arguments.train_split
        for split, picture, captions, name in rows:
            problem = None if captions else "no caption"
            row = {IMAGE: finder(picture), CAPTIONS: captions, ROW: f"{file} {name}", PROBLEM: problem}
            splits.setdefault(split or of_file, []).append(row)
    if lacking and not splits:
        raise ValueError(lacking[0])
    for each in lacking:
        logger.warning("left out: %s", each)
    return with_pictures(splits)


def coco_rows(content: dict) -> Iterator[tuple[None, str, list[str], str]]:
    captions: dict[object, list[str]] = {}
    for entry in content["annotations"]:
        captions.setdefault(entry.get("image_id"), []).append(entry.get("caption"))
    for image in content["images"]:
        yield None, image["file_name"], as_list(captions.pop(image["id"], None)), image["file_name"]
    if captions:
        logger.warning("%d images have captions and are not among the images: %s", len(captions), list(captions)[:5])


KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "validation", "test": "test"}


def karpathy_rows(content: dict) -> Iterator[tuple[str, str, list[str], str]]:
    for image in content["images"]:
        path = "/".join(filter(None, (image.get("filepath"), image["filename"])))
        captions = as_list([sentence.get("raw") for sentence in image["sentences"]])
        yield KARPATHY_SPLITS.get(image["split"], image["split"]), path, captions, image["filename"]


# --- a picture beside its text ---

TEXT_SUFFIXES = (".txt", ".caption")


def texts_beside(place: Place, arguments: DataArguments) -> dict[str, str]:
    """{picture: its text}, of the suffix that --caption_column asks for or the first of TEXT_SUFFIXES that is there."""
    asked = arguments.caption_column
    suffixes = TEXT_SUFFIXES if asked is None else (f".{asked.lstrip('.')}",)
    files = set(place.files)
    for suffix in suffixes:
        named = {picture: str(PurePosixPath(picture).with_suffix(suffix)) for picture in place.pictures}
        found = {picture: text for picture, text in named.items() if text in files}
        if found:
            return found
    return {}


def read_beside(place: Place, arguments: DataArguments) -> DatasetDict:
    """Each line of a text is a caption.

    Raises:
        ValueError: the texts hold numbers, as those of boxes do.
    """
    texts, tops = texts_beside(place, arguments), split_folders(place, arguments)
    splits: dict[str, list[dict]] = {split: [] for split in tops.values()} or {arguments.train_split: []}
    for picture in place.pictures:
        top = picture.split("/")[0]
        if tops and top not in tops:
            continue
        problem, captions = None, []
        try:
            captions = as_list(Path(place.full(texts[picture])).read_text(encoding="utf-8-sig").splitlines())
        except KeyError:
            problem = "no text of its name beside it"
        except (OSError, UnicodeDecodeError):
            problem = "a text that cannot be read as UTF-8"
        row = {IMAGE: place.full(picture), CAPTIONS: captions, ROW: picture, PROBLEM: problem}
        splits[tops[top] if tops else arguments.train_split].append(row)
    some = [caption for rows in splits.values() for row in rows[:NUM_SNIFFED] for caption in row[CAPTIONS]]
    if some and all(all(_is_number(word) for word in caption.split()) for caption in some):
        raise ValueError(
            f"expected captions in the texts beside the pictures of {place.name}, found numbers, as {some[0]!r}"
        )
    return with_pictures({split: rows for split, rows in splits.items() if rows})


def _is_number(word: str) -> bool:
    return word.lstrip("-").replace(".", "", 1).isdigit()


# --- tars ---


def read_tars(place: Place, arguments: DataArguments):
    tags, group = arguments.tag_column, getattr(arguments, "group_column", None)
    asked = tars.Fields(
        arguments.image_column,
        arguments.caption_column,
        TAR_CAPTIONS,
        lists=() if tags is None else (tags,),
        texts=() if group is None else (group,),
    )
    return tars.read_tars(place, arguments, asked, CAPTIONS)


# --- the table ---


def _json_layout(name: str, form: str, keys: tuple[str, str, str], rows_of: Callable) -> Layout:
    """A layout told by the keys in its .json, whose rows `rows_of` gives."""
    words = f'a .json with "{keys[0]}", "{keys[1]}" and "{keys[2]}"'
    return Layout(
        name,
        form,
        (Sign(words, lambda place, arguments: bool(jsons_with(place, *keys))),),
        lambda place, arguments: read_jsons(place, arguments, jsons_with(place, *keys), rows_of),
    )


LAYOUTS = (
    stored.SAVED,
    Layout(
        "tars of samples (WebDataset)",
        "000.tar, 001.tar.gz, ... of KEY.jpg (png, webp) beside KEY.txt or KEY.json (--caption_column json.caption)",
        (Sign("files of the suffix .tar", lambda place, arguments: bool(place.with_suffix(*tars.SUFFIXES))),),
        read_tars,
    ),
    stored.PARQUET,
    _json_layout(
        "captions of COCO",
        "annotations/captions_train2017.json beside train2017/, or the .json alone and --image_folder",
        ("images", "annotations", "caption"),
        coco_rows,
    ),
    _json_layout(
        "captions of Karpathy's splits",
        "dataset_coco.json, dataset_flickr8k.json, ...: the split and the sentences of each picture",
        ("images", "sentences", "raw"),
        karpathy_rows,
    ),
    Layout(
        "table of captions",
        "captions.csv (or .tsv, .txt, .jsonl, .json), metadata.jsonl in each split: a path and a caption a row",
        (
            HAS_TABLE,
            Sign(
                "a table with a column of pictures and one of captions (--image_column, --caption_column)",
                lambda place, arguments: bool(caption_tables(place, arguments)),
            ),
        ),
        lambda place, arguments: read_tables(place, caption_tables(place, arguments), arguments, HEADERLESS),
        has_user_columns=True,
    ),
    Layout(
        "a picture beside its text",
        "1.jpg beside 1.txt or 1.caption, a caption a line; in train/ and validation/, or all for training",
        (
            Sign("pictures", lambda place, arguments: bool(place.pictures)),
            Sign(
                "texts of their names beside them (1.txt, 1.caption)",
                lambda place, arguments: bool(texts_beside(place, arguments)),
            ),
        ),
        read_beside,
    ),
    stored.HUB,
)


# --- what all of them become ---


def one_row_a_picture(rows: Dataset, split: str) -> Dataset:
    """Rows of the same file become one with all their captions: else they would be each other's negatives.

    What else a row has is that of the first.
    """
    if not isinstance(rows, Dataset) or IMAGE not in rows.column_names:
        return rows
    problems = rows[PROBLEM][:] if PROBLEM in rows.column_names else [None] * len(rows)
    captions, firsts, merged = rows[CAPTIONS][:], {}, {}
    for number, (path, problem) in enumerate(zip(file_paths(rows), problems, strict=True)):
        texts = as_list(captions[number])
        # A row that cannot be used stays a row of its own, so that it is named.
        first = firsts.setdefault(path, number) if path and texts and problem is None else number
        merged.setdefault(first, []).extend(texts)
    if len(merged) == len(rows):
        return rows
    most = max(map(len, merged.values()))
    logger.info("split %s: %d rows are of %d pictures, with up to %d captions", split, len(rows), len(merged), most)
    kept = rows.select(list(merged)).remove_columns(CAPTIONS)
    return kept.add_column(CAPTIONS, list(merged.values()))


def file_paths(rows: Dataset) -> Iterator[str | None]:
    """The path of each picture that is a file; bytes have none that tells them apart, and are not read."""
    for table in rows.select_columns([IMAGE]).with_format("arrow").iter(1000):
        for part in table.column(IMAGE).chunks:
            for path, is_file in zip(part.field("path").to_pylist(), part.field("bytes").is_null().to_pylist()):
                yield path if is_file else None


def lists_in_texts(rows: Dataset, split: str) -> Dataset:
    """Captions written as Python's or JSON's lists of texts in the cells of a csv become lists."""
    captions = rows[CAPTIONS][:]
    given = [caption for caption in captions if caption]
    if not all(isinstance(caption, str) and caption[0] + caption[-1] == "[]" for caption in given):
        return rows
    try:
        lists = [ast.literal_eval(caption) if caption else [] for caption in captions]
    except (ValueError, SyntaxError):
        return rows
    if not given or not all(isinstance(text, str) for texts in lists for text in texts):
        return rows
    logger.info("split %s: each caption is a list of texts in brackets, and is read as such", split)
    return rows.remove_columns(CAPTIONS).add_column(CAPTIONS, lists)


def as_stream(rows: Dataset) -> IterableDataset:
    """Rows that lie here as a stream of parts enough for all processes and workers."""
    processes = PartialState().num_processes
    shards = processes * max(1, min(MOST_SHARDS, len(rows) // processes))
    return rows.to_iterable_dataset(num_shards=min(shards, len(rows)))
