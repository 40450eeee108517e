"""Pictures with captions on one sheet."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from vit_embed.retrieval.fonts import fitting, paste_text, shortened
from vit_embed.retrieval.pictures import UNREADABLE, read_rgb
from vit_embed.retrieval.sources import Item, open_content

COLUMNS = 5
SIDE, MARGIN, LINE = 200, 12, 18
MAX_LETTERS = 28


def draw_sheet(pictures: Sequence[tuple[Item | None, str]], title: str, output: Path) -> None:
    """Saves (item, caption) pairs as rows of COLUMNS; one that cannot be read any more is an empty frame."""
    columns = min(COLUMNS, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    width = MARGIN + columns * (SIDE + MARGIN)
    sheet = Image.new("RGB", (width, 2 * MARGIN + LINE + rows * (SIDE + LINE + 2 * MARGIN)), "white")
    draw = ImageDraw.Draw(sheet)
    _write(sheet, (MARGIN, MARGIN), title, columns * MAX_LETTERS, "black", LINE)
    for place, (item, caption) in enumerate(pictures):
        left = MARGIN + place % columns * (SIDE + MARGIN)
        top = 3 * MARGIN + LINE + place // columns * (SIDE + LINE + 2 * MARGIN)
        thumbnail = _thumbnail(item)
        if thumbnail is None:
            draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), outline="grey")
            _write(sheet, (left + MARGIN, top + SIDE // 2), "cannot be read", MAX_LETTERS, "grey", LINE - 6)
        else:
            sheet.paste(thumbnail, (left + (SIDE - thumbnail.width) // 2, top + (SIDE - thumbnail.height) // 2))
        _write(sheet, (left, top + SIDE + 4), caption, MAX_LETTERS, "black", LINE - 6)
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f".{output.name}.partial")
    sheet.save(aside, format="PNG")
    os.replace(aside, output)


def _thumbnail(item: Item | None) -> Image.Image | None:
    try:
        with open_content(item.content) as file:
            picture = read_rgb(file)[0]
    except (*UNREADABLE, TypeError):
        return None
    scale = SIDE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


def _write(sheet: Image.Image, place: tuple[int, int], text: str, letters: int, colour: str, size: int) -> None:
    """A text in one line of as many letters at most, wide ones counted twice."""
    paste_text(sheet, place, shortened(fitting(" ".join(text.split()))[0], letters), colour, size)
