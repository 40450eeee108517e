"""How well a two-tower model finds held-out pictures by their names, in figures and in pictures of its failures.

    python examples/evaluation/evaluate_retrieval.py --dataset data/icons --model . --output_dir runs/evaluation

Text to image, on the splits that `build_icon_dataset.py` writes: the share of names that have their own picture among
the first 1, 5 and 10 (pictures of equal names count as one), with its standard error, a binomial's. Beside all names of
a split: those whose drawing has no near-duplicate in what training rendered; those that a training picture has as a
name, other name or tag; the others in three parts, with a held-out word, with another word that no such text has, and
of words that all are in one, never put together so; and synonyms instead of names. The queries are the bare names.

Needs: what train_contrastive.py needs.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

if __name__ == "__main__":  # the rule of imports in examples/README.md
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from datasets import Dataset, load_from_disk
from transformers import AutoProcessor

from data.icon_names import is_held_out
from recipes.drawing import draw_label, draw_picture, new_sheet, save_figure, spread_over
from recipes.embedding import embed_pictures, embed_texts
from recipes.files import check_absent, written_aside
from recipes.retrieval import RECALL_AT, caption_id, recalls
from vit_embed import VitEmbedForContrastive
from vit_embed.retrieval.pictures import as_rgb

logger = logging.getLogger("evaluate_retrieval")

SPLITS = ("validation", "validation_emoji", "test", "test_all", "test_emoji")
LEAST_QUERIES = 20  # the share of fewer names is mostly chance
FAILURES, SHEET_COLUMNS = 16, 6


def with_error(similarity: np.ndarray, own: np.ndarray, ids: np.ndarray) -> dict[str, float | int]:
    """Recalls of queries (queries, pictures), and their standard errors as shares of independent queries."""
    figures: dict[str, float | int] = {"queries": len(own), "pictures": len(ids)}
    for k, value in zip(RECALL_AT, recalls(similarity, own, ids), strict=True):
        figures[f"recall@{k}"] = round(value, 4)
        figures[f"error@{k}"] = round((value * (1 - value) / len(own)) ** 0.5, 4)
    return figures


def training_texts(rows: Dataset) -> set[str]:
    """Every name, other name and tag of the training pictures."""
    return {text for column in ("captions", "tags") for texts in rows[column][:] for text in texts}


def choose_queries(rows: Dataset, trained: set[str]) -> dict[str, np.ndarray]:
    """Which rows of a split each figure asks for by name, given `training_texts`."""
    names = rows["name"][:]
    held_out = np.array([is_held_out(name) for name in names])
    seen = np.array([name in trained for name in names])
    words = {word for text in trained for word in text.split()}
    known = np.array([words.issuperset(name.split()) for name in names])
    return {
        "all names": np.ones(len(names), dtype=bool),
        "without near-duplicates": ~np.array(rows["near_duplicate"][:]),
        "names with a held-out word": held_out,
        "names with another word that no training picture has": ~held_out & ~known,
        "new names of words that training pictures have": ~held_out & known & ~seen,
        "names that a training picture has": seen,
    }


def draw_failures(rows: Dataset, similarity: np.ndarray, ids: np.ndarray, path: Path) -> None:
    """Save names whose own picture is not among the first ten, beside what was found instead."""
    order = np.argsort(-similarity, axis=1)
    missed = [query for query in range(len(ids)) if ids[query] not in ids[order[query, :10]]]
    if not missed:
        logger.info("%s: no failure to draw", path.stem)
        return
    chosen = [missed[index] for index in spread_over(len(missed), FAILURES)]
    figure, axes = new_sheet(len(chosen), SHEET_COLUMNS + 2, (SHEET_COLUMNS + 3, 1.05 * len(chosen)))
    for line, query in zip(axes, chosen, strict=True):
        rank = int(np.flatnonzero(ids[order[query]] == ids[query])[0]) + 1
        draw_label(line[0], f"{rows[query]['name']}\nrank {rank}")
        for axis, index in zip(line[1:], map(int, [query, *order[query, :SHEET_COLUMNS]])):
            draw_picture(axis, as_rgb(rows[index]["image"]))
    axes[0, 1].set_title("wanted", fontsize=8)
    axes[0, 2].set_title("found first", fontsize=8)
    save_figure(figure, path)


def evaluate(model, processor, rows: Dataset, trained: set[str]) -> tuple[dict, np.ndarray, np.ndarray]:
    """Figures by kind of query; the similarity of all names with all pictures, and the pictures' ids."""

    def embed_names(names: list[str]) -> np.ndarray:
        return embed_texts(model, processor.tokenizer, names, truncate=True).numpy()

    drawings = (as_rgb(row["image"]) for row in rows.select_columns(["image"]))
    pictures = embed_pictures(model, processor.image_processor, drawings, len(rows)).numpy()
    names = rows["name"][:]
    ids = np.array(list(map(caption_id, names)))
    similarity = embed_names(names) @ pictures.T
    figures = {
        kind: with_error(similarity[chosen], ids[chosen], ids)
        for kind, chosen in choose_queries(rows, trained).items()
        if chosen.sum() >= LEAST_QUERIES
    }
    others = [(text, own) for captions, own in zip(rows["captions"][:], ids, strict=True) for text in captions[1:]]
    if len(others) >= LEAST_QUERIES:
        texts, own = zip(*others, strict=True)
        figures["synonyms"] = with_error(embed_names(list(texts)) @ pictures.T, np.array(own), ids)
    return figures, similarity, ids


def main() -> None:
    """Parse the command line, write report.json and a sheet of failures for each split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="folder written by build_icon_dataset.py")
    parser.add_argument("--model", required=True, help="folder or Hub id of a two-tower model, ours or CLIP")
    parser.add_argument("--splits", nargs="+", default=list(SPLITS), help="splits to evaluate")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write; must not exist")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    splits = load_from_disk(arguments.dataset)
    missing = sorted(set(arguments.splits) - set(splits))
    if missing:
        parser.error(f"expected --splits of {sorted(splits)}, got {missing}")
    try:
        check_absent(arguments.output_dir)
    except ValueError as error:
        parser.error(str(error))
    model = VitEmbedForContrastive.from_pretrained(arguments.model).eval()
    processor = AutoProcessor.from_pretrained(arguments.model, trust_remote_code=True)
    trained = training_texts(splits["train"])
    report = {}
    with written_aside(arguments.output_dir) as aside:
        aside.mkdir()
        for split in arguments.splits:
            report[split], similarity, ids = evaluate(model, processor, splits[split], trained)
            draw_failures(splits[split], similarity, ids, aside / f"failures-{split}.png")
            for kind, figures in report[split].items():
                logger.info("%s, %s: %s", split, kind, figures)
        (aside / "report.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
