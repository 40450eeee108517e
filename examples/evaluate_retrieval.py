"""How well a two-tower model finds held-out pictures by their names, in figures and in pictures of its failures.

    python examples/evaluate_retrieval.py --dataset data/icons --model . --output_dir runs/evaluation

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
import textwrap
from pathlib import Path

import numpy as np
import torch
from build_icon_dataset import is_held_out
from datasets import Dataset, load_from_disk
from matplotlib.figure import Figure
from npm_packages import written_aside
from picture_files import as_rgb
from tqdm import tqdm
from train_contrastive import RECALL_AT, caption_id, recalls, token_ids
from transformers import AutoProcessor

from vit_embed import VitEmbedForContrastive

logger = logging.getLogger("evaluate_retrieval")

SPLITS = ("validation", "validation_emoji", "test", "test_all", "test_emoji")
LEAST_QUERIES = 20  # a figure of fewer names says nothing
FAILURES, SHEET_COLUMNS = 16, 6


@torch.inference_mode()
def embed_pictures(model, processor, rows: Dataset, batch_size: int = 128) -> np.ndarray:
    """(rows, projection_dim), unit length."""
    parts = []
    for batch in tqdm(
        rows.select_columns(["image"]).iter(batch_size), total=-(-len(rows) // batch_size), desc="pictures"
    ):
        pixel_values = processor.image_processor(list(map(as_rgb, batch["image"])), return_tensors="pt").pixel_values
        parts.append(model.get_image_features(pixel_values, normalize=True))
    return torch.cat(parts).float().numpy()


@torch.inference_mode()
def embed_texts(model, processor, texts: list[str], batch_size: int = 256) -> np.ndarray:
    """(texts, projection_dim), unit length."""
    parts = []
    for start in range(0, len(texts), batch_size):
        inputs = token_ids(processor.tokenizer, texts[start : start + batch_size])
        parts.append(model.get_text_features(inputs, normalize=True))
    return torch.cat(parts).float().numpy()


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
    chosen = [missed[index] for index in np.linspace(0, len(missed) - 1, min(FAILURES, len(missed))).astype(int)]
    figure = Figure(figsize=(SHEET_COLUMNS + 3, 1.05 * len(chosen)))
    axes = figure.subplots(len(chosen), SHEET_COLUMNS + 2, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for line, query in zip(axes, chosen, strict=True):
        rank = int(np.flatnonzero(ids[order[query]] == ids[query])[0]) + 1
        name = textwrap.fill(rows[int(query)]["name"], 20)
        line[0].text(1, 0.5, f"{name}\nrank {rank}", ha="right", va="center", fontsize=8)
        for axis, index in zip(line[1:], [query, *order[query, :SHEET_COLUMNS]], strict=True):
            axis.imshow(as_rgb(rows[int(index)]["image"]))
    axes[0, 1].set_title("wanted", fontsize=8)
    axes[0, 2].set_title("found first", fontsize=8)
    figure.savefig(path, dpi=90, bbox_inches="tight")


def evaluate(model, processor, rows: Dataset, trained: set[str]) -> tuple[dict, np.ndarray, np.ndarray]:
    """Figures by kind of query; the similarity of all names with all pictures, and the pictures' ids."""
    pictures = embed_pictures(model, processor, rows)
    names = rows["name"][:]
    ids = np.array(list(map(caption_id, names)))
    similarity = embed_texts(model, processor, names) @ pictures.T
    figures = {
        kind: with_error(similarity[chosen], ids[chosen], ids)
        for kind, chosen in choose_queries(rows, trained).items()
        if chosen.sum() >= LEAST_QUERIES
    }
    others = [(text, own) for captions, own in zip(rows["captions"][:], ids, strict=True) for text in captions[1:]]
    if len(others) >= LEAST_QUERIES:
        texts, own = zip(*others, strict=True)
        figures["synonyms"] = with_error(embed_texts(model, processor, list(texts)) @ pictures.T, np.array(own), ids)
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
    missing = set(arguments.splits) - set(splits)
    if missing or arguments.output_dir.exists():
        parser.error(
            f"expected splits of {sorted(splits)}, got {sorted(missing)}"
            if missing
            else f"{arguments.output_dir} exists"
        )
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
