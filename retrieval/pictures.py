"""Pictures as they come in files and data sets -> RGB or RGBA of 8 bits, upright.

The only place that opens or converts a picture. What had to be changed comes back as notes, which the callers count and
log (`NoteCounts`, `recipes.data.check_rows`).
"""

from __future__ import annotations

import io
import logging
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageColor, ImageOps, UnidentifiedImageError

# What opening or converting a picture can raise; AttributeError where the cell of a dataset is empty.
UNREADABLE = (OSError, ValueError, SyntaxError, AttributeError, Image.DecompressionBombError)
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

TURNED = "an EXIF rotation, turned upright"
SCALED = "16 bits of grey, scaled to 8"
ON_WHITE = "transparency, put on white"
ON_BLACK = "a white drawing on transparency, put on black"
Source = str | Path | BinaryIO | Image.Image
Colour = str | tuple[int, int, int]
# Below this many pixels a picture is read whole: decoding it smaller would save little and show.
LEAST_REDUCED = 1_000_000
# Two greys nearer than this (of 255) look alike: what is drawn in one cannot be seen on the other.
VISIBLE_CONTRAST = 16


def load_picture(
    source: str | os.PathLike | bytes | BinaryIO | Image.Image, background: Colour | None = None
) -> Image.Image:
    """A picture as the recipes of this repository show it to a model: RGB of 8 bits, upright, no transparency.

    For processors and pipelines. transformers' own `load_image`, which its pipelines read paths with, shows what lies
    under the alpha channel, and cuts 16 bits of grey at 255.

    Args:
        source: path, bytes or binary file of a picture; or a PIL picture, which stays as it is. Of an animated one the
            first frame, or that which the PIL picture stands at.
        background: colour under what is transparent, a name that Pillow knows or (red, green, blue) of 0 to 255. None
            is white, and black where the drawing is white and could not be seen.

    Raises:
        ValueError: the source is an address, or no picture; or the background is no colour.
        OSError: the file cannot be opened.
    """
    colour = None if background is None else _opaque(background)
    if isinstance(source, Image.Image):
        return _load(source, colour, f"a PIL picture of mode {source.mode}")
    if isinstance(source, str) and re.match(r"(\w[\w+.-]+://|data:)", source):
        raise ValueError(f"expected a file, got the address {source[:80]!r}; download it and pass the path or bytes")
    if isinstance(source, str | os.PathLike):
        with open(source, "rb") as file:
            return _load(file, colour, repr(os.fspath(source)))
    if isinstance(source, bytes | bytearray | memoryview):
        return _load(io.BytesIO(source), colour, f"{len(source):,} bytes, {bytes(source[:8])!r} first")
    if hasattr(source, "read") and not isinstance(source, io.TextIOBase):
        return _load(source, colour, f"the file {getattr(source, 'name', type(source).__name__)!r}")
    kind = type(source).__name__
    raise ValueError(f"expected the path, the bytes or the binary file of a picture, or a PIL picture, got {kind}")


def _load(picture: BinaryIO | Image.Image, background: Colour | None, shown: str) -> Image.Image:
    try:
        return read_rgb(picture)[0] if background is None else put_on(read_rgba(picture)[0], background)
    except UNREADABLE as error:
        reason = "no format that Pillow reads" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"expected a picture, got {shown}: {reason}") from error


def _opaque(colour: Any) -> Colour:
    """A colour, checked."""
    try:
        values = ImageColor.getrgb(colour) if isinstance(colour, str) else tuple(colour)
        if len(values) == 3 and all(int(value) == value and 0 <= value <= 255 for value in values):
            return tuple(int(value) for value in values)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"expected background to be a colour's name or (red, green, blue) of 0 to 255, got {colour!r}")


def read_rgba(picture: Source) -> tuple[Image.Image, list[str]]:
    """A picture, its file or its path -> RGBA of 8 bits, upright, opaque where it has no alpha; and notes on changes.

    Raises:
        one of UNREADABLE: no picture, a damaged one, or floating point values, whose range is unknown.
    """
    upright, notes = _upright(picture if isinstance(picture, Image.Image) else Image.open(picture))
    return upright.convert("RGBA"), notes


def read_rgb(picture: Source) -> tuple[Image.Image, list[str]]:
    """A picture, its file or its path -> RGB of 8 bits, upright, no transparency; and notes on changes.

    What is transparent becomes white, and black where the drawing is white and could not be seen: dropping the alpha
    channel, as `convert("RGB")` and transformers' `load_image` do, makes most icons one black square.

    Raises:
        as read_rgba.
    """
    upright, notes = _upright(picture if isinstance(picture, Image.Image) else Image.open(picture))
    if not upright.has_transparency_data:
        return upright.convert("RGB"), notes
    rgba = upright.convert("RGBA")
    alpha = rgba.getchannel("A")
    if alpha.getextrema()[0] == 255:
        return rgba.convert("RGB"), notes
    rgb = put_on(rgba, "white")
    is_blank = rgb.convert("L").getextrema()[0] > 255 - VISIBLE_CONTRAST
    if is_blank and alpha.getextrema()[1] >= VISIBLE_CONTRAST:
        return put_on(rgba, "black"), [*notes, ON_BLACK]
    return rgb, [*notes, ON_WHITE]


def read_reduced(file: BinaryIO | Image.Image, side: int | None) -> tuple[Image.Image, tuple[int, int]]:
    """A picture or its file -> RGB as of `read_rgb`, and its (width, height), upright, in the file.

    Args:
        side: a picture of LEAST_REDUCED pixels or more is made smaller on the way, by a whole factor, and no side below
            this; of a JPEG the decoder makes it smaller, which is most of the time that it takes. None keeps the size.

    Raises:
        as read_rgba.
    """
    picture = file if isinstance(file, Image.Image) else Image.open(file)
    width, height = picture.size
    if picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5:  # lies on its side
        width, height = height, width
    if side is None or width * height < LEAST_REDUCED:
        return read_rgb(picture)[0], (width, height)
    if picture is not file:  # a caller's picture stays as it is
        picture.draft(None, (side, side))
    rgb = read_rgb(picture)[0]
    factor = min(rgb.size) // (2 * side)  # a mean over blocks shows more than the decoder's own way
    smaller = (rgb.width // factor, rgb.height // factor) if factor > 1 else rgb.size
    return rgb.resize(smaller, Image.Resampling.BOX), (width, height)


def _upright(picture: Image.Image) -> tuple[Image.Image, list[str]]:
    """A picture turned by its EXIF tag, in 8 bits; and notes on changes."""
    notes = []
    upright = ImageOps.exif_transpose(picture)
    if picture.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        notes.append(TURNED)
    if upright.mode.startswith("I"):  # Pillow would cut values above 255
        deep, hidden = np.asarray(upright), upright.info.get("transparency")
        upright = Image.fromarray((deep.clip(0, 65535) / 257).round().astype(np.uint8))
        if hidden is not None:  # the one grey that a PNG shows as transparent
            upright.putalpha(Image.fromarray(np.where(deep == hidden, 0, 255).astype(np.uint8)))
        notes.append(SCALED)
    elif upright.mode == "F":
        raise ValueError("expected a picture of 8 or 16 bits, got floating point values of unknown range")
    return upright, notes


def as_rgb(picture: Source) -> Image.Image:
    """`read_rgb` without the notes."""
    return read_rgb(picture)[0]


def put_on(rgba: Image.Image, colour: Colour) -> Image.Image:
    """An RGBA picture on a ground of one colour, in RGB."""
    return Image.alpha_composite(Image.new("RGBA", rgba.size, colour), rgba).convert("RGB")


def is_one_grey(rgba: Image.Image) -> bool:
    """Whether a picture is transparent in parts and drawn in one grey (black and white included), as most icons are."""
    pixels = np.asarray(rgba).reshape(-1, 4)
    drawn = pixels[pixels[:, 3] >= VISIBLE_CONTRAST, :3]
    return 0 < len(drawn) < len(pixels) and int(np.ptp(drawn.astype(int))) < VISIBLE_CONTRAST


class NoteCounts:
    """Counts the notes of many pictures for one line of the log each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, notes: list[str]) -> None:
        self.counts.update(notes)

    def log(self, logger: logging.Logger, total: int) -> None:
        for note, count in self.counts.items():
            logger.info("%d of %d pictures with %s", count, total, note)
