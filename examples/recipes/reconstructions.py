"""What a model of masked image modelling fills in. Needs torch and matplotlib alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from recipes.drawing import as_colours, draw_picture, picture_sheet, save_figure
from vit_embed import VitEmbedForMaskedImageModeling

HIDDEN_GREY = 0.7
NUM_COLOURS = 256  # enough for a sheet of small pictures, and a third of the bytes


@torch.no_grad()  # not inference_mode: a sharded model is trained on
def fill_in(
    model: VitEmbedForMaskedImageModeling, pixel_values: torch.Tensor, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model predicts for patches hidden by `seed`, in eval mode.

    Args:
        pixel_values: (B, C, H, W).

    Returns:
        (B, C, H, W) with the other patches as they were, and whether each pixel was hidden (B, 1, H, W).
    """
    was_training = model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        output = model(pixel_values)
    model.train(was_training)
    patch_height, patch_width = model.config.patch_shape
    hidden = output.mask.repeat_interleave(patch_height, dim=1).repeat_interleave(patch_width, dim=2)[:, None]
    hidden = hidden[..., : pixel_values.shape[2], : pixel_values.shape[3]]
    return torch.where(hidden, output.reconstruction.to(pixel_values.dtype), pixel_values), hidden


def masked_pictures(
    model: VitEmbedForMaskedImageModeling, pixel_values: torch.Tensor, processor
) -> tuple[np.ndarray, np.ndarray]:
    """The pictures with grey for hidden patches, and with these filled in: twice (B, H, W, 3) in [0, 1]."""
    filled, hidden = fill_in(model, pixel_values.to(model.device))
    seen = np.where(hidden.cpu().permute(0, 2, 3, 1).numpy(), HIDDEN_GREY, as_colours(pixel_values, processor))
    return seen, as_colours(filled, processor)


def draw_reconstructions(rows: dict[str, np.ndarray], output: Path) -> None:
    """Saves a row for each title: pictures (B, H, W, 3) in [0, 1]."""
    count, *shape, _ = next(iter(rows.values())).shape
    figure, axes = picture_sheet(len(rows), count, inches=1.1, shape=tuple(shape))
    for row, (title, pictures) in zip(axes, rows.items()):
        for axis, picture in zip(row, pictures):
            draw_picture(axis, picture)
        row[0].set_title(title, fontsize=8, loc="left")
    save_figure(figure, output, NUM_COLOURS)
