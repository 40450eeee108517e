"""Layouts of captioned pictures -> rows of IMAGE, CAPTIONS (a text or a list of texts) and ROW."""

from __future__ import annotations

from recipes.arguments import DataArguments
from recipes.reading import stored, tars
from recipes.reading.layouts import HAS_TABLE, Layout, Sign
from recipes.reading.place import Place
from recipes.reading.tables import IMAGE, read_tables, tables_of

CAPTIONS = "captions"
CAPTION_COLUMNS = (
    "captions",
    "caption",
    "text",
    "texts",
    "title",
    "txt",
    "description",
    "sentence",
    "sentences",
    "alt",
)
TAR_CAPTIONS = ("txt", *(f"json.{name}" for name in CAPTION_COLUMNS))
HEADERLESS = (IMAGE, CAPTIONS)


def caption_tables(place: Place, arguments: DataArguments) -> list[str]:
    return tables_of(place, arguments, arguments.caption_column, CAPTION_COLUMNS, HEADERLESS)


LAYOUTS = (
    stored.SAVED,
    stored.PARQUET,
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
        "tars of samples (WebDataset)",
        "000.tar, 001.tar, ... of KEY.jpg (png, webp) beside KEY.txt or KEY.json (--caption_column json.caption)",
        (Sign("files of the suffix .tar", lambda place, arguments: bool(place.with_suffix(*tars.SUFFIXES))),),
        lambda place, arguments: tars.read_tars(place, arguments, arguments.caption_column, TAR_CAPTIONS),
    ),
    stored.HUB,
)
