"""Sheets of pictures: a figure with axes for pictures, and how it is saved.

Figures are made without pyplot, which would look for a screen and keep them alive until they are closed.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from recipes.files import written_aside
from vit_embed.retrieval.fonts import columns_of, fitting, shortened

DOTS_PER_INCH = 105
# Letters of a tick's label that is written in codes; more would push the axes off the sheet.
MOST_CODES = 20
# The second column of a wide letter while a text is broken into lines; no text has it, as none is `fitting` with it.
FILLER = "\0"


def new_sheet(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """A figure of `size` (width, height) in inches, and its axes (rows, columns) without ticks or frames."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    return figure, axes


def picture_sheet(
    rows: int, columns: int, inches: float = 2.4, shape: tuple[int, int] = (1, 1)
) -> tuple[Figure, np.ndarray]:
    """`new_sheet` of pictures of one `shape` (height, width), each `inches` wide, with room for a title."""
    return new_sheet(rows, columns, (inches * columns, (inches * shape[0] / shape[1] + 0.15) * rows))


def draw_picture(axis: Axes, picture, title: str = "", width: int = 30) -> None:
    """A picture (height, width, 3), or weights (height, width) from black to white, with a title.

    Args:
        width: of a line of the title, characters.
    """
    axis.imshow(picture, cmap="gray")
    axis.set_title(_wrapped(title, width), fontsize=8)


def short(name: int | str, width: int = 22) -> str:
    """How a sheet names a row: "row 7", or the end of a file's path."""
    return f"row {name}" if isinstance(name, int) else name if len(name) <= width else f"…{name[-width:]}"


def draw_label(axis: Axes, text: str, width: int = 20) -> None:
    """A text in lines of `width` characters at the right edge, to stand before a row of pictures."""
    axis.text(0.95, 0.5, _wrapped(text, width), ha="right", va="center", fontsize=10, transform=axis.transAxes)


def _wrapped(text: str, width: int) -> str:
    """Lines of at most `width` Latin letters, of which a Chinese one or an emoji counts two."""
    shown = fitting(text)[0]
    if "U+" in shown:
        width = 2 * width // 3  # capitals and digits are wider than the letters that widths are meant for
    as_wide = re.sub(".", lambda letter: letter[0].ljust(columns_of(letter[0]), FILLER), shown)
    return "\n".join(textwrap.fill(line, width) for line in as_wide.split("\n")).replace(FILLER, "")


def frame(axis: Axes, colour: str) -> None:
    """A coloured frame around a picture."""
    axis.axis("on")
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color=colour, linewidth=3)


def spread_over(count: int, largest: int) -> list[int]:
    """At most `largest` of the numbers below `count`, from all over them: neighbouring rows are often alike."""
    return np.unique(np.linspace(0, count - 1, min(largest, count)).astype(int)).tolist()


def as_colours(pixel_values: torch.Tensor, processor) -> np.ndarray:
    """The inverse of the processor's normalisation: (B, C, H, W) -> (B, H, W, C) in [0, 1]."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (processor.image_mean, processor.image_std))
    return (pixel_values.float().cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def save_figure(figure: Figure, path: Path, num_colours: int | None = None) -> None:
    """Writes a figure, whole or not at all. A dollar in a text is a dollar, not the start of a formula, and letters of
    any script are drawn with the fonts that have them (`fitting`).

    Args:
        path: its suffix says the format, PNG where there is none.
        num_colours: of a PNG, to save bytes; None keeps all.
    """
    for axis in figure.findobj(Axis):  # which writes its labels anew when it is drawn
        labels = [label.get_text() for label in axis.get_ticklabels()]
        shown = [label if fitting(label)[0] == label else shortened(fitting(label)[0], MOST_CODES) for label in labels]
        if shown != labels:
            axis.set_ticklabels(shown)
    for text in figure.findobj(Text):
        text.set_parse_math(False)
        shown, families = fitting(text.get_text(), tuple(text.get_fontfamily()))
        text.set(text=shown, fontfamily=families)
    file_format = path.suffix.removeprefix(".") or "png"
    with written_aside(path) as aside:
        figure.savefig(aside, format=file_format, dpi=DOTS_PER_INCH, bbox_inches="tight", pad_inches=0.05)
        if num_colours is not None and file_format == "png":
            Image.open(aside).convert("RGB").quantize(num_colours).save(aside, format="png", optimize=True)
