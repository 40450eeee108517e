"""Numbers over a picture -> colours, with the scale that says which number a colour stands for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# matplotlib's tables at 17 even steps; straight lines between them stay within 7 of 255 of the originals.
TABLES = {
    "viridis": "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c "
    "1fa088 28ae80 3fbc73 5ec962 84d44b addc30 d8e219 fde725",
    "inferno": "000004 0b0724 210c4a 3d0965 57106e 71196e 8a226a a32c61 bc3754 "
    "d24644 e45a31 f1731d f98e09 fcac11 f9cb35 f2ea69 fcffa4",
}
# How much of an overlay is the colour; the rest is the picture in grey.
OPACITY = 0.65
# Pixels of the scale, which has to be read on a picture that is shown at half its size.
STRIP, MARGIN, LETTERS = 24, 10, 32


def coloured(values: np.ndarray, table: str) -> np.ndarray:
    """(H, W) in [0, 1] -> (H, W, 3) uint8; what is beyond takes the colour of the end."""
    colours = np.array([list(bytes.fromhex(colour)) for colour in TABLES[table].split()])
    steps = np.linspace(0, 1, len(colours))
    return np.stack([np.interp(values, steps, channel) for channel in colours.T], -1).round().astype(np.uint8)


def spread(values: np.ndarray, low: float, high: float, size: tuple[int, int]) -> np.ndarray:
    """(h, w) -> (H, W) of a picture of `size` (W, H), bilinear, with low -> 0 and high -> 1."""
    fine = np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    return ((fine - low) / max(high - low, 1e-12)).clip(0, 1)


def overlay(picture: Image.Image, values: np.ndarray, low: float, high: float, table: str = "inferno") -> Image.Image:
    """A map (gh, gw) in colour over the picture in grey."""
    grey = np.asarray(picture.convert("L").convert("RGB"), dtype=np.float32)
    colour = coloured(spread(values, low, high, picture.size), table)
    return Image.fromarray((OPACITY * colour + (1 - OPACITY) * grey).round().astype(np.uint8))


def in_colour(
    values: np.ndarray, low: float, high: float, size: tuple[int, int], table: str = "viridis"
) -> Image.Image:
    """A map (h, w) in colour, as a picture of `size` (W, H)."""
    return Image.fromarray(coloured(spread(values, low, high, size), table))


def with_scale(
    picture: Image.Image, low: float, high: float, table: str, write: Callable[[float], str] = "{:.2f}".format
) -> Image.Image:
    """The picture with a strip of the table's colours below it, and what its ends and its middle stand for."""
    width, height = picture.size
    sheet = Image.new("RGB", (width, height + STRIP + LETTERS + 3 * MARGIN), "white")
    sheet.paste(picture, (0, 0))
    ramp = coloured(np.tile(np.linspace(0, 1, width), (STRIP, 1)), table)
    sheet.paste(Image.fromarray(ramp), (0, height + MARGIN))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(LETTERS)
    for place, anchor, value in ((0, "la", low), (width / 2, "ma", (low + high) / 2), (width, "ra", high)):
        draw.text((place, height + STRIP + 2 * MARGIN), write(value), "black", font, anchor=anchor)
    return sheet
