"""A folder of pictures searched by text, and the sheet of what is found. Needs torch, matplotlib and tqdm alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from recipes.drawing import draw_label, draw_picture, new_sheet, save_figure
from recipes.embedding import embed_pictures
from vit_embed.retrieval.pictures import PICTURE_SUFFIXES, UNREADABLE, NoteCounts, as_rgb, read_rgb

logger = logging.getLogger(__name__)

COLUMNS = 6
ATTENTION_SCALE = 3


def find_pictures(folder: Path) -> list[Path]:
    """All pictures below a folder, in order of name.

    Raises:
        ValueError: there are none.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    if not paths:
        raise ValueError(f"--pictures must be a folder with {', '.join(PICTURE_SUFFIXES)} files, got {folder}")
    return paths


def embed_files(model, processor, paths: list[Path], batch_size: int) -> tuple[list[Path], torch.Tensor]:
    """The readable ones of the paths, and their embeddings (number of them, projection_dim), unit length.

    The log names the others, and how many pictures had to be changed to be read.

    Raises:
        ValueError: none can be read.
    """
    kept, notes = [], NoteCounts()

    def readable() -> Iterator[Image.Image]:
        for path in paths:
            try:
                picture, changes = read_rgb(path)
            except UNREADABLE as error:
                logger.warning("%s is left out: %s", path, error)
                continue
            kept.append(path)
            notes.add(changes)
            yield picture

    embeds = embed_pictures(model, processor.image_processor, readable(), len(paths), batch_size)
    notes.log(logger, len(kept))
    return kept, embeds


@torch.inference_mode()
def class_attention(model, processor, picture: Image.Image) -> np.ndarray:
    """Where the class token looks in the last layer: (heads, gh, gw), each head's largest weight 1.

    The picture is enlarged, for a finer grid than the one that the model was trained on.
    """
    height, width = (ATTENTION_SCALE * side for side in model.config.image_shape)
    sizes = {"size": {"shortest_edge": min(height, width)}, "crop_size": {"height": height, "width": width}}
    inputs = processor.image_processor(picture, return_tensors="pt", **sizes)
    attention = model.trunk.get_class_attentions(**inputs)[0, -1]
    return (attention / attention.amax(dim=(1, 2), keepdim=True)).numpy()


def draw_attention(figure, last: np.ndarray, picture: Image.Image, attention: np.ndarray) -> None:
    """Fills a row of axes with the picture and each head's attention over it."""
    draw_label(last[0], "class attention,\nlast layer")
    draw_picture(last[1], picture, "picture")
    for head, axis in zip(range(min(len(attention), COLUMNS - 1)), last[2:]):
        draw_picture(axis, picture.convert("L"), f"head {head + 1}")
        extent = (0, picture.width, picture.height, 0)
        shade = axis.imshow(
            attention[head], cmap="inferno", alpha=0.65, vmin=0, vmax=1, extent=extent, interpolation="bilinear"
        )
    figure.colorbar(shade, ax=list(last), fraction=0.02, label="share of largest weight")


def draw_found(
    matches: dict[str, list[tuple[Path, float]]], picture: Image.Image, attention: np.ndarray | None, output: Path
) -> None:
    """Saves the matches of each query as a row, and the attention over one picture as the last.

    Args:
        matches: query -> (path, cosine), best first.
        picture: the picture that the attention is of, as the model sees it.
        attention: (heads, gh, gw), 1 at each head's largest weight; None leaves its row out.
    """
    rows = len(matches) + (attention is not None)
    figure, axes = new_sheet(rows, COLUMNS + 1, (1.6 * (COLUMNS + 1), 1.85 * rows))
    for row, (query, found) in zip(axes, matches.items()):
        draw_label(row[0], f"“{query}”", width=16)
        for axis, (path, cosine) in zip(row[1:], found):
            draw_picture(axis, as_rgb(path), f"{path.stem}\n{cosine:.2f}", width=18)
    if attention is not None:
        draw_attention(figure, axes[-1], picture, attention)
    save_figure(figure, output)
