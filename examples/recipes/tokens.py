"""What a model's tokens are, in panels of a sheet for each kind of checkpoint. Needs torch and matplotlib alone."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from PIL import Image, ImageOps
from transformers import AutoImageProcessor

from recipes.drawing import as_colours, draw_picture
from recipes.reconstructions import masked_pictures
from vit_embed import VitEmbedForMaskedImageModeling, VitEmbedModel
from vit_embed.retrieval.pictures import as_rgb
from vit_embed.tokens_vit_embed import patch_grid

# Two colours that people who mix up red and green can tell apart (Okabe and Ito).
COARSE_COLOUR, FINE_COLOUR = "#E69F00", "#0072B2"

# What one kind of checkpoint adds to a sheet: for each picture a list of partial functions that draw on an axis, each
# with a keyword `picture`, (height, width) or (height, width, 3).
Panels = list[list[Callable[[Axes], None]]]


# --- a picture's tokens ---


def borders(token_map: np.ndarray, patch_shape: tuple[int, int]) -> np.ndarray:
    """The lines between patches of different tokens, and around the image.

    Args:
        token_map: (gh, gw), which token stands for each patch.
        patch_shape: (ph, pw) in pixels.

    Returns:
        (lines, 2 ends, x and y) in pixels.
    """
    rows, columns = token_map.shape
    outside = np.pad(token_map, 1, constant_values=-1)
    # Row i, column j of `above`: whether a line runs along the upper side of patch (i, j); of `left`, the left side.
    above = [(i, j) for i, j in np.argwhere(outside[1:, 1:-1] != outside[:-1, 1:-1])]
    left = [(i, j) for i, j in np.argwhere(outside[1:-1, 1:] != outside[1:-1, :-1])]
    lines = [((j, i), (j + 1, i)) for i, j in above] + [((j, i), (j, i + 1)) for i, j in left]
    return np.array(lines, dtype=float).reshape(-1, 2, 2) * np.array(patch_shape[::-1])


def mean_colours(picture: np.ndarray, token_map: np.ndarray) -> np.ndarray:
    """Paints each token's patches in the mean colour of their pixels: (H, W, 3) -> (H, W, 3)."""
    scale = [side // count for side, count in zip(picture.shape[:2], token_map.shape)]
    token_of_pixel = token_map.repeat(scale[0], axis=0).repeat(scale[1], axis=1)  # (H, W)
    tokens, index = np.unique(token_of_pixel, return_inverse=True)
    pixels = np.bincount(index.ravel(), minlength=len(tokens))
    means = [np.bincount(index.ravel(), weights=channel.ravel()) / pixels for channel in np.moveaxis(picture, -1, 0)]
    return np.stack(means, axis=-1)[index.reshape(token_of_pixel.shape)]


def draw_adaptive(axis: Axes, picture: np.ndarray, token_map: np.ndarray, patch_shape: tuple[int, int]) -> None:
    """Outlines fine tokens thinly and coarse ones, of 2 x 2 patches, boldly, over a paler picture."""
    rows, columns = token_map.shape
    cells = token_map.reshape(rows // 2, 2, columns // 2, 2)
    is_coarse = (cells == cells[:, :1, :, :1]).all(axis=(1, 3))  # (gh / 2, gw / 2)
    of_patch = is_coarse.repeat(2, axis=0).repeat(2, axis=1)
    axis.imshow(0.45 + 0.55 * picture)
    thin = min(1.2, 30 / columns)
    for colour, width, chosen in ((FINE_COLOUR, thin, ~of_patch), (COARSE_COLOUR, 1.5 * thin, of_patch)):
        outlined = np.where(chosen, token_map, -1)
        axis.add_collection(
            LineCollection(borders(outlined, patch_shape), colors=colour, linewidths=width), autolim=False
        )
    num_tokens = len(np.unique(token_map))
    axis.set_title(f"adaptive: {num_tokens} of {token_map.size} tokens", fontsize=8)


def draw_merged(axis: Axes, picture: np.ndarray, token_map: np.ndarray, patch_shape: tuple[int, int]) -> None:
    """Paints each token in its mean colour, with borders between tokens."""
    axis.imshow(mean_colours(picture, token_map))
    axis.add_collection(LineCollection(borders(token_map, patch_shape), colors="0.5", linewidths=0.5), autolim=False)
    axis.set_title(f"merged: {len(np.unique(token_map))} of {token_map.size} tokens", fontsize=8)


def principal_colours(patches: torch.Tensor) -> torch.Tensor:
    """(B, gh, gw, D) -> (B, gh, gw, 3): the first three principal components of all of them, each spread over [0, 1]
    between its 2nd and its 98th percentile."""
    flat = patches.flatten(0, 2)
    centred = flat - flat.mean(dim=0)
    components = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:3].T  # (B * gh * gw, 3)
    low, high = torch.quantile(components, torch.tensor([0.02, 0.98]), dim=0)
    return ((components - low) / (high - low)).clamp(0, 1).view(*patches.shape[:3], 3)


# --- panels of a sheet ---


def load(model_class: type, name: str, image_size: list[int] | None, **fields):
    """A checkpoint in evaluation, at `image_size` (height, width) or else its own, and its image processor."""
    shape = None if image_size is None else (image_size[0], image_size[-1])
    model = model_class.from_pretrained(name, image_size=shape, **fields).eval()
    return model, AutoImageProcessor.from_pretrained(name)


def read_pixels(paths: list[Path], processor, shape: tuple[int, int]) -> torch.Tensor:
    """Pictures as a model takes them, their middles at `shape` (height, width): (B, C, H, W)."""
    fitted = [ImageOps.fit(as_rgb(path), shape[::-1], Image.Resampling.BICUBIC) for path in paths]
    return processor(fitted, do_resize=False, do_center_crop=False, return_tensors="pt").pixel_values


@torch.inference_mode()
def token_panels(draw, model: VitEmbedModel, processor, paths: list[Path]) -> Panels:
    """One column: for each picture a function that draws its tokens on an axis."""
    pixel_values = read_pixels(paths, processor, model.config.image_shape)
    token_maps, pictures = model.get_token_map(pixel_values).numpy(), as_colours(pixel_values, processor)
    return [
        [partial(draw, picture=picture, token_map=token_map, patch_shape=model.config.patch_shape)]
        for picture, token_map in zip(pictures, token_maps)
    ]


def adaptive_panels(options: argparse.Namespace) -> Panels:
    """One column, the tokens of `--adaptive`."""
    model, processor = load(VitEmbedModel, options.adaptive, options.adaptive_size)
    if model.config.stem_type != "adaptive":
        raise ValueError(
            f"--adaptive must have stem_type='adaptive', {options.adaptive} has {model.config.stem_type!r}"
        )
    return token_panels(draw_adaptive, model, processor, options.pictures)


def merged_panels(options: argparse.Namespace) -> Panels:
    """One column, the tokens of `--merged`."""
    model, processor = load(
        VitEmbedModel, options.merged, options.merged_size, token_merge_size=options.token_merge_size
    )
    return token_panels(draw_merged, model, processor, options.pictures)


def masked_panels(options: argparse.Namespace) -> Panels:
    """Two columns, what `--masked` sees and what it fills in."""
    model, processor = load(VitEmbedForMaskedImageModeling, options.masked, options.masked_size)
    if options.mask_ratio is not None:
        model.config.mask_ratio = options.mask_ratio
        model.config.validate_architecture()
    seen, filled = masked_pictures(model, read_pixels(options.pictures, processor, model.config.image_shape), processor)
    titles = (f"{model.config.mask_ratio:.0%} hidden", "filled in")
    return [[partial(draw_picture, picture=p, title=t) for p, t in zip(pair, titles)] for pair in zip(seen, filled)]


@torch.inference_mode()
def attended_panels(options: argparse.Namespace) -> Panels:
    """Two columns, the class attention of `--attended` and the components of its patches."""
    model, processor = load(VitEmbedModel, options.attended, options.attended_size)
    pixel_values = read_pixels(options.pictures, processor, model.config.image_shape)
    attention = model.get_class_attentions(pixel_values)[:, -1].mean(dim=1)  # (B, gh, gw)
    attention = attention / attention.amax(dim=(1, 2), keepdim=True)
    (tokens,) = model(pixel_values, stages=[model.config.num_hidden_layers]).stages
    coloured = principal_colours(patch_grid(tokens, model.config.num_prefix_tokens))
    titles = ("class attention", "patches")
    pairs = zip(attention.numpy(), coloured.numpy())
    return [[partial(draw_picture, picture=p, title=t) for p, t in zip(pair, titles)] for pair in pairs]


KINDS = {"adaptive": adaptive_panels, "merged": merged_panels, "masked": masked_panels, "attended": attended_panels}
