"""Drawings that nearly equal each other: compared by their ink on a thumbnail."""

from __future__ import annotations

import numpy as np
from PIL import Image
from tqdm import tqdm

from vit_embed.retrieval.pictures import put_on, read_rgba

NEAR_DUPLICATE_COSINE = 0.95
THUMBNAIL = 16  # pixels on a side


def ink(picture: Image.Image) -> np.ndarray:
    """A picture's darkness on white, (THUMBNAIL ** 2,) float32 of unit length: what two drawings have in common."""
    grey = put_on(read_rgba(picture)[0], "white").convert("L")
    small = 255 - np.asarray(grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX), dtype=np.float32).ravel()
    return small / max(float(np.linalg.norm(small)), 1e-6)


def mark_near_duplicates(rows: list[dict], held_out: list[dict], block: int = 4096) -> list[dict]:
    """The rows that nearly equal no held-out row; the held-out ones that had such a neighbour are marked."""
    table = np.stack([row["ink"] for row in held_out])
    kept = []
    for start in tqdm(range(0, len(rows), block), desc="near-duplicates"):
        part = rows[start : start + block]
        near = np.stack([row["ink"] for row in part]) @ table.T > NEAR_DUPLICATE_COSINE  # (part, held out)
        for index in np.flatnonzero(near.any(axis=0)):
            held_out[index]["near_duplicate"] = True
        kept += [row for row, is_near in zip(part, near.any(axis=1), strict=True) if not is_near]
    return kept
