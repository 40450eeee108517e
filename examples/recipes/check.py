"""--check_only: what is wrong with a data set and what the model sees of it, in the log, as a table and as pictures."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes

from recipes.data import Report, SeededRows
from recipes.drawing import as_colours, draw_picture, picture_sheet, save_figure, short, spread_over
from recipes.reading.tables import IMAGE
from vit_embed.retrieval.fonts import shortened
from vit_embed.retrieval.pictures import UNREADABLE, as_rgb

logger = logging.getLogger(__name__)

COLUMNS, ROWS_A_SPLIT = 6, 2
LONGEST = 60  # columns of a label or caption
FOUND_COLUMNS, EXAMPLES_A_REASON, MOST_REASONS = 5, 3, 16


def check_and_show(
    splits: dict[str, SeededRows],
    report: Report,
    collate: Callable[[list[dict]], dict[str, torch.Tensor]],
    processor,
    describe: Callable[[dict], str],
    folder: Path,
) -> None:
    """Writes to `folder` rows.png, some rows of each split as the model sees them; found.csv, every finding; found.png,
    some rows that were found fault with.

    Args:
        describe: item -> its label or caption.
        collate: items -> `pixel_values` (B, 3, H, W), and `labels` (B, H, W) where these are maps, which are drawn.
    """
    for split, notes in report.notes().items():
        for note in notes:
            logger.info("split %s: %s", split, note)
    draw_rows(splits, collate, processor, describe, folder / "rows.png")
    report.write(folder / "found.csv")
    written = ["rows.png", "found.csv"]
    if any(report.found.values()):
        draw_found(report, folder / "found.png")
        written.append("found.png")
    logger.info("checked, nothing was trained: see %s in %s", ", ".join(written), folder)


def draw_rows(splits: dict[str, SeededRows], collate, processor, describe, path: Path) -> None:
    """Saves a sheet of rows of each split: the pixels that the model gets, with the row's name and what is learned."""
    lines: list[tuple[np.ndarray, list[str]]] = []
    for split, rows in splits.items():
        places = spread_over(len(rows), COLUMNS * ROWS_A_SPLIT)
        items = [rows[place] for place in places]
        batch = collate(items)
        titles = [
            f"{split}\n{short(rows.name(place))}\n{shortened(describe(item), LONGEST)}"
            for place, item in zip(places, items)
        ]
        pictures = as_colours(batch["pixel_values"], processor)
        maps = batch["labels"] if batch.get("labels") is not None and batch["labels"].ndim == 3 else None
        for start in range(0, len(places), COLUMNS):
            chosen = slice(start, start + COLUMNS)
            lines.append((pictures[chosen], titles[chosen]))
            if maps is not None:
                lines.append((maps[chosen].numpy(), [_span(depth) for depth in maps[chosen]]))
    height, width = lines[0][0].shape[1:3]
    figure, axes = picture_sheet(len(lines), COLUMNS, inches=1.8, shape=(height + width // 4, width))
    for line, (pictures, titles) in zip(axes, lines):
        for axis, picture, title in zip(line, pictures, titles):
            if picture.ndim == 2:
                _draw_map(axis, picture, title)
            else:
                draw_picture(axis, picture, title)
    save_figure(figure, path)


def _span(depth: torch.Tensor) -> str:
    measured = depth[depth > 0]
    return f"{measured.min():.3g} to {measured.max():.3g} m" if len(measured) else "nothing measured"


def _draw_map(axis: Axes, depth: np.ndarray, title: str) -> None:
    axis.imshow(np.where(depth > 0, depth, np.nan), cmap="viridis")
    axis.set_title(title, fontsize=8)


def draw_found(report: Report, path: Path) -> None:
    """Saves a sheet of rows that were found fault with: a few of each reason, those left out first."""
    by_reason: dict[tuple[bool, str, str], list] = {}
    for split, found in report.found.items():
        for each in found:
            by_reason.setdefault((not each.finding.drop, split, each.finding.reason), []).append(each)
    shown = []
    for is_kept, split, reason in sorted(by_reason)[:MOST_REASONS]:
        found = by_reason[is_kept, split, reason]
        more = f" ({len(found):,} rows)" if len(found) > EXAMPLES_A_REASON else ""
        what = f"{'' if is_kept else 'left out: '}{reason}{more}"
        shown += [(split, each, what) for each in found[:EXAMPLES_A_REASON]]
    figure, axes = picture_sheet(math.ceil(len(shown) / FOUND_COLUMNS), FOUND_COLUMNS, inches=2.0, shape=(5, 4))
    for axis, (split, each, what) in zip(axes.flat, shown):
        draw_picture(
            axis, _thumbnail(report.rows[split], each.number), f"{split}: {short(each.name)}\n{what}", width=28
        )
    save_figure(figure, path)


def _thumbnail(rows: Sequence, number: int) -> np.ndarray:
    """The picture of a row, or a grey field where there is none to show."""
    try:
        picture = as_rgb(rows.select_columns([IMAGE])[number][IMAGE])
        picture.thumbnail((160, 160))
        return np.asarray(picture)
    except (*UNREADABLE, TypeError):
        return np.full((120, 120, 3), 210, np.uint8)
