"""Text to picture and picture to text: which pairs count as equal, recall, and sheets of what captions find."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from sklearn.metrics import top_k_accuracy_score
from transformers import EvalPrediction
from transformers.trainer_utils import EvalLoopOutput

from recipes.drawing import draw_label, draw_picture, frame, new_sheet, save_figure, spread_over
from recipes.reading.tables import IMAGE
from vit_embed.retrieval.pictures import as_rgb

RECALL_AT = (1, 5, 10)
SHEET_QUERIES, SHEET_COLUMNS = 8, 8


def caption_id(caption: str) -> int:
    """A number in [0, 2^63) that is equal for equal captions, in every process and release."""
    return int.from_bytes(hashlib.sha256(caption.strip().lower().encode()).digest()[:8], "big") >> 1


def recalls(similarity: np.ndarray, query_ids: np.ndarray, found_ids: np.ndarray) -> list[float]:
    """Share of the rows of `similarity` (queries, found) whose own id is among the k most similar ids, k of RECALL_AT.

    Args:
        query_ids, found_ids: (queries,) and (found,); what has equal ids counts once, with its largest similarity.
    """
    ids, starts = np.unique(found_ids[np.argsort(found_ids, kind="stable")], return_index=True)
    by_id = np.maximum.reduceat(similarity[:, np.argsort(found_ids, kind="stable")], starts, axis=1)  # (queries, ids)
    # Two more classes, which no query has: the metric reads two classes in another way.
    by_id = np.pad(by_id, ((0, 0), (0, 2)), constant_values=similarity.min() - 1)
    own, labels = np.searchsorted(ids, query_ids), np.arange(len(ids) + 2)
    return [float(top_k_accuracy_score(own, by_id, k=min(k, len(ids)), labels=labels)) for k in RECALL_AT]


def retrieval_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Recall at k both ways over all pairs, equal captions counting as one, and that of chance."""
    image_embeds, text_embeds = (rows.astype(np.float32) for rows in prediction.predictions)  # (N, J), unit length
    ids = prediction.label_ids
    similarity = text_embeds @ image_embeds.T
    metrics = {}
    for name, rows in (("text_to_image", similarity), ("image_to_text", similarity.T)):
        metrics |= {f"{name}_recall@{k}": value for k, value in zip(RECALL_AT, recalls(rows, ids, ids), strict=True)}
    return metrics | {f"chance_recall@{k}": min(1.0, k / len(np.unique(ids))) for k in RECALL_AT}


class DrawFound:
    """Draws what some captions find: a caption a line, its best pictures from the left, the right ones framed.

    Args:
        rows_of: {what the sheet's name begins with: (pictures and captions of that split by number of the row)}.
    """

    def __init__(self, rows_of: dict, name_of) -> None:
        self.rows_of, self.name_of = rows_of, name_of

    def __call__(self, output: EvalLoopOutput, path: Path) -> None:
        rows = self.rows_of[path.name.rsplit("-", 1)[0]]
        image_embeds, text_embeds = output.predictions[:2]
        queries = spread_over(len(rows), SHEET_QUERIES)
        best = np.argsort(-(text_embeds[queries] @ image_embeds.T), axis=1)[:, :SHEET_COLUMNS]
        figure, axes = new_sheet(len(queries), SHEET_COLUMNS + 1, (1.1 * SHEET_COLUMNS + 2, 1.2 * len(queries)))
        for line, query, found in zip(axes, queries, best, strict=True):
            draw_label(line[0], self.name_of(rows[query]))
            for axis, index in zip(line[1:], map(int, found)):
                draw_picture(axis, as_rgb(rows[index][IMAGE]))
                if output.label_ids[index] == output.label_ids[query]:
                    frame(axis, "tab:green")
        save_figure(figure, path)
