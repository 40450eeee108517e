"""Pictures as they come in folders and datasets -> RGB, and what goes wrong with some of them."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

# What opening or converting a picture can raise; AttributeError where the cell of a dataset is empty.
UNREADABLE = (OSError, ValueError, SyntaxError, AttributeError, Image.DecompressionBombError)


def as_rgb(picture: Image.Image) -> Image.Image:
    """Any picture in RGB: upright, transparency on white, 16 bits of grey scaled to 8 rather than cut.

    Raises:
        ValueError: floating point values, whose range nothing says.
    """
    if picture.mode.startswith("I"):  # Pillow would cut values above 255
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) / 257).round().astype(np.uint8))
    elif picture.mode == "F":
        raise ValueError("expected a picture of 8 or 16 bits, got floating point values of unknown range")
    rgba = ImageOps.exif_transpose(picture).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
