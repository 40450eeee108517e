"""Search without learning: the pictures of the training names most like the query, and the nearest of those searched.

    python examples/evaluation/lookup_baseline.py --dataset data/icons --split test

For each query the training names with the largest TF-IDF cosine of words are looked up (ties included), and the
pictures of the split are ranked by their largest cosine of 16 x 16 pixels of ink to any drawing of those names. A model
that does not beat this has learned nothing that a dictionary and a thumbnail do not know.

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
from sklearn.feature_extraction.text import TfidfVectorizer
from tqdm import tqdm

from data.near_duplicates import ink
from recipes.retrieval import RECALL_AT, caption_id, recalls

logger = logging.getLogger("lookup_baseline")

TIE = 1e-6


def inks(dataset: Dataset) -> np.ndarray:
    """The ink of every picture, (rows, 256)."""
    pictures = dataset.select_columns(["image"])
    return np.stack([ink(row["image"]) for row in tqdm(pictures, desc="ink")])


def look_up(train: Dataset, names: list[str], searched: np.ndarray) -> np.ndarray:
    """Similarity of each query name with each of the searched inks (queries, searched)."""
    known = np.array(train["name"][:])
    distinct, row_of = np.unique(known, return_inverse=True)
    vectorizer = TfidfVectorizer(token_pattern=r"[^\s]+")
    table = vectorizer.fit_transform(distinct)
    likeness = (vectorizer.transform(names) @ table.T).toarray()  # (queries, distinct)
    wanted = [np.flatnonzero((row >= row.max() - TIE) & (row > 0)) for row in likeness]
    rows_of = np.split(np.argsort(row_of, kind="stable"), np.cumsum(np.bincount(row_of))[:-1])
    needed = sorted({int(row) for names_of in wanted for name in names_of for row in rows_of[name]})
    place = {row: index for index, row in enumerate(needed)}
    drawings = inks(train.select(needed))
    similarity = np.zeros((len(names), len(searched)), dtype=np.float32)
    for query, names_of in enumerate(wanted):
        if len(names_of):
            chosen = [place[int(row)] for name in names_of for row in rows_of[name]]
            similarity[query] = (drawings[chosen] @ searched.T).max(axis=0)
    return similarity


def main() -> None:
    """Parse the command line and print the recalls as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="folder written by build_icon_dataset.py")
    parser.add_argument("--split", default="test", help="split whose names find its pictures")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    splits = load_from_disk(arguments.dataset)
    rows = splits[arguments.split]
    names = rows["name"][:]
    ids = np.array([caption_id(name) for name in names])
    similarity = look_up(splits["train"], names, inks(rows))
    is_new = ~np.array(rows["near_duplicate"][:])
    report = {}
    for title, chosen in (("all", slice(None)), ("without near-duplicates", is_new)):
        values = recalls(similarity[chosen], ids[chosen], ids)
        report[title] = {f"recall@{k}": round(value, 4) for k, value in zip(RECALL_AT, values, strict=True)}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
