"""Pictures and texts -> embeddings of a two-tower model, batch by batch. Needs torch and tqdm alone."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch
from PIL import Image
from tqdm import tqdm


def token_ids(tokenizer, texts: list[str]) -> torch.Tensor:
    """(B, T) int64, padded to the longest; a text beyond the tokenizer's `model_max_length` is cut."""
    limit = tokenizer.model_max_length
    return tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt").input_ids


@torch.inference_mode()
def embed_pictures(
    model, image_processor, pictures: Iterable[Image.Image], total: int, batch_size: int = 64
) -> torch.Tensor:
    """Pictures in RGB, in any number -> (pictures, projection_dim), unit length.

    Args:
        pictures: read a batch at a time, so they need not fit in memory.
        total: how many there are at most, for the progress bar.

    Raises:
        ValueError: there are none.
    """
    pictures, parts = iter(pictures), []
    with tqdm(total=total, desc="pictures", unit="picture") as bar:
        while batch := list(islice(pictures, batch_size)):
            inputs = image_processor(batch, return_tensors="pt")
            parts.append(model.get_image_features(inputs.pixel_values.to(model.device), normalize=True).float().cpu())
            bar.update(len(batch))
    if not parts:
        raise ValueError(f"expected pictures to embed, none of {total} can be read")
    return torch.cat(parts)


@torch.inference_mode()
def embed_texts(model, tokenizer, texts: list[str], batch_size: int = 256, truncate: bool = False) -> torch.Tensor:
    """Texts -> (texts, projection_dim), unit length.

    Args:
        truncate: cut texts beyond the tokenizer's limit; else the model refuses those beyond its own with a ValueError.
    """
    parts = []
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        ids = token_ids(tokenizer, batch) if truncate else tokenizer(batch, padding=True, return_tensors="pt").input_ids
        parts.append(model.get_text_features(ids.to(model.device), normalize=True).float().cpu())
    return torch.cat(parts)
