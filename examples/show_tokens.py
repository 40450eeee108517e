"""Look at the tokens that a model makes of a picture, and at what it fills in where it sees nothing.

    python examples/show_tokens.py --pictures photo.jpg --merged . --merged_size 512 --token_merge_size 128 \\
        --adaptive runs/adaptive --masked runs/masked --output tokens.png

A row for each picture, and behind the picture itself columns for each kind of checkpoint that is named:

- --adaptive: one of the stem "adaptive". Its coarse tokens are the large cells, its fine tokens the small ones.
- --merged: any of another stem. The tokens that are left when each layer has merged `token_merge_size` of them, each
  in the mean colour of its pixels, with borders between tokens.
- --masked: one of masked image modelling. What it sees of the picture, and the same with the hidden patches filled in.
- --attended: one with a class token. Where that looks in the last layer, the mean of its heads; and the first three
  principal components of all pictures' patches as red, green and blue, so that like patches have like colours.

Needs matplotlib besides the package's own requirements.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from functools import partial
from itertools import chain
from pathlib import Path

import matplotlib
import numpy as np
import torch
from picture_files import as_rgb
from PIL import Image, ImageOps
from transformers import AutoImageProcessor

from vit_embed import VitEmbedForMaskedImageModeling, VitEmbedModel
from vit_embed.tokens_vit_embed import patch_grid

matplotlib.use("Agg")  # a picture file is wanted, so no screen is
from matplotlib import pyplot  # noqa: E402
from matplotlib.collections import LineCollection  # noqa: E402

logger = logging.getLogger("show_tokens")

HIDDEN_GREY = 0.7
# Two colours that people who mix up red and green can tell apart (Okabe and Ito).
COARSE_COLOUR, FINE_COLOUR = "#E69F00", "#0072B2"
COLUMN_INCHES, DOTS_PER_INCH, PICTURE_PIXELS = 2.4, 105, 512


def read_pixels(paths: list[Path], processor, shape: tuple[int, int]) -> torch.Tensor:
    """Pictures as a model takes them, their middles at `shape` (height, width): (B, C, H, W)."""
    fitted = [ImageOps.fit(as_rgb(Image.open(path)), shape[::-1], Image.Resampling.BICUBIC) for path in paths]
    return processor(fitted, do_resize=False, do_center_crop=False, return_tensors="pt").pixel_values


def as_colours(pixel_values: torch.Tensor, processor) -> np.ndarray:
    """The inverse of the processor's normalisation: (B, C, H, W) -> (B, H, W, C) in [0, 1]."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (processor.image_mean, processor.image_std))
    return (pixel_values.float() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()


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


def draw_picture(axis, picture: np.ndarray, title: str) -> None:
    """A picture (height, width, 3), or weights (height, width) from black to white, with a title."""
    axis.imshow(picture, cmap="gray")
    axis.set_title(title, fontsize=8)


def draw_adaptive(axis, picture: np.ndarray, token_map: np.ndarray, patch_shape: tuple[int, int]) -> None:
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


def draw_merged(axis, picture: np.ndarray, token_map: np.ndarray, patch_shape: tuple[int, int]) -> None:
    """Paints each token in its mean colour, with borders between tokens."""
    axis.imshow(mean_colours(picture, token_map))
    axis.add_collection(LineCollection(borders(token_map, patch_shape), colors="0.5", linewidths=0.5), autolim=False)
    axis.set_title(f"merged: {len(np.unique(token_map))} of {token_map.size} tokens", fontsize=8)


@torch.inference_mode()
def fill_in(
    model: VitEmbedForMaskedImageModeling, pixel_values: torch.Tensor, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model predicts in place of patches hidden by `seed`: (B, C, H, W) with the other patches as they were,
    and whether each pixel was hidden (B, 1, H, W)."""
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        output = model(pixel_values)
    patch_height, patch_width = model.config.patch_shape
    hidden = output.mask.repeat_interleave(patch_height, dim=1).repeat_interleave(patch_width, dim=2)[:, None]
    hidden = hidden[..., : pixel_values.shape[2], : pixel_values.shape[3]]
    return torch.where(hidden, output.reconstruction.to(pixel_values.dtype), pixel_values), hidden


def masked_pictures(
    model: VitEmbedForMaskedImageModeling, pixel_values: torch.Tensor, processor
) -> tuple[np.ndarray, ...]:
    """The pictures with grey in place of hidden patches, and with these filled in: twice (B, H, W, 3) in [0, 1]."""
    filled, hidden = fill_in(model, pixel_values.to(model.device))
    seen = np.where(hidden.cpu().permute(0, 2, 3, 1).numpy(), HIDDEN_GREY, as_colours(pixel_values.cpu(), processor))
    return seen, as_colours(filled.cpu(), processor)


def save_figure(figure, output: Path) -> None:
    """Writes a figure aside and then renames it, so that nobody finds half a picture."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as aside:
        written = Path(aside) / f"sheet{output.suffix or '.png'}"
        figure.savefig(written, dpi=DOTS_PER_INCH, bbox_inches="tight", pad_inches=0.05)
        if written.suffix == ".png":  # 256 colours are enough here, and a third of the bytes
            Image.open(written).convert("RGB").quantize(256).save(written, optimize=True)
        written.replace(output)
    pyplot.close(figure)


def new_sheet(rows: int, columns: int, inches: float = COLUMN_INCHES, shape: tuple[int, int] = (1, 1)):
    """A figure and its (rows, columns) axes without ticks, each for a picture of `shape` (height, width)."""
    size = (inches * columns, (inches * shape[0] / shape[1] + 0.15) * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    return figure, axes


def draw_reconstructions(
    model: VitEmbedForMaskedImageModeling, pixel_values: torch.Tensor, processor, output: Path
) -> None:
    """Saves three rows: the pictures (B, C, H, W), what the model sees of them, and the hidden patches filled in."""
    seen, filled = masked_pictures(model, pixel_values, processor)
    figure, axes = new_sheet(3, len(pixel_values), inches=1.1, shape=tuple(pixel_values.shape[2:]))
    titles = ("picture", f"{model.config.mask_ratio:.0%} hidden", "filled in")
    for row, title, pictures in zip(axes, titles, (as_colours(pixel_values.cpu(), processor), seen, filled)):
        row[0].set_title(title, fontsize=8, loc="left")
        for axis, picture in zip(row, pictures):
            axis.imshow(picture)
    save_figure(figure, output)


def load(model_class: type, name: str, image_size: list[int] | None, **fields):
    """A checkpoint in evaluation, at `image_size` (height, width) or else its own, and its image processor."""
    shape = None if image_size is None else (image_size[0], image_size[-1])
    model = model_class.from_pretrained(name, image_size=shape, **fields).eval()
    return model, AutoImageProcessor.from_pretrained(name)


@torch.inference_mode()
def token_panels(draw, model: VitEmbedModel, processor, paths: list[Path]) -> list[list]:
    """One column: for each picture a function that draws its tokens on an axis."""
    pixel_values = read_pixels(paths, processor, model.config.image_shape)
    token_maps, pictures = model.get_token_map(pixel_values).numpy(), as_colours(pixel_values, processor)
    return [
        [partial(draw, picture=picture, token_map=token_map, patch_shape=model.config.patch_shape)]
        for picture, token_map in zip(pictures, token_maps)
    ]


def adaptive_panels(options: argparse.Namespace) -> list[list]:
    """One column, the tokens of `--adaptive`."""
    model, processor = load(VitEmbedModel, options.adaptive, options.adaptive_size)
    if model.config.stem_type != "adaptive":
        raise ValueError(
            f"--adaptive must have stem_type='adaptive', {options.adaptive} has {model.config.stem_type!r}"
        )
    return token_panels(draw_adaptive, model, processor, options.pictures)


def merged_panels(options: argparse.Namespace) -> list[list]:
    """One column, the tokens of `--merged`."""
    model, processor = load(
        VitEmbedModel, options.merged, options.merged_size, token_merge_size=options.token_merge_size
    )
    return token_panels(draw_merged, model, processor, options.pictures)


def masked_panels(options: argparse.Namespace) -> list[list]:
    """Two columns, what `--masked` sees and what it fills in."""
    model, processor = load(VitEmbedForMaskedImageModeling, options.masked, options.masked_size)
    if options.mask_ratio is not None:
        model.config.mask_ratio = options.mask_ratio
        model.config.validate_architecture()
    seen, filled = masked_pictures(model, read_pixels(options.pictures, processor, model.config.image_shape), processor)
    titles = (f"{model.config.mask_ratio:.0%} hidden", "filled in")
    return [[partial(draw_picture, picture=p, title=t) for p, t in zip(pair, titles)] for pair in zip(seen, filled)]


@torch.inference_mode()
def attended_panels(options: argparse.Namespace) -> list[list]:
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


def principal_colours(patches: torch.Tensor) -> torch.Tensor:
    """(B, gh, gw, D) -> (B, gh, gw, 3): the first three principal components of all of them, each spread over [0, 1]
    between its 2nd and its 98th hundredth."""
    flat = patches.flatten(0, 2)
    centred = flat - flat.mean(dim=0)
    components = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:3].T  # (B * gh * gw, 3)
    low, high = torch.quantile(components, torch.tensor([0.02, 0.98]), dim=0)
    return ((components - low) / (high - low)).clamp(0, 1).view(*patches.shape[:3], 3)


KINDS = {"adaptive": adaptive_panels, "merged": merged_panels, "masked": masked_panels, "attended": attended_panels}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, nargs="+", required=True, help="picture files")
    parser.add_argument("--adaptive", help="folder or Hub id of a checkpoint of stem_type='adaptive'")
    parser.add_argument("--merged", help="folder or Hub id of any checkpoint of another stem")
    parser.add_argument("--masked", help="folder or Hub id of a checkpoint of masked image modelling")
    parser.add_argument("--attended", help="folder or Hub id of any checkpoint with a class token")
    for kind in KINDS:
        parser.add_argument(
            f"--{kind}_size", type=int, nargs="+", help="pixels, one number or height and width; default: native"
        )
    parser.add_argument("--token_merge_size", type=int, default=32, help="tokens that each layer of --merged merges")
    parser.add_argument("--mask_ratio", type=float, help="share of the patches to hide; default: that of --masked")
    parser.add_argument("--output", type=Path, default=Path("demo_output/tokens.png"), help="picture to write")
    options = parser.parse_args(arguments)
    if not any(getattr(options, kind) for kind in KINDS):
        parser.error("name a checkpoint with --adaptive, --merged, --masked or --attended")
    for kind in KINDS:
        size = getattr(options, f"{kind}_size")
        if size is not None and len(size) > 2:
            parser.error(f"--{kind}_size must be one number or height and width, got {size}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    columns = [panels(options) for kind, panels in KINDS.items() if getattr(options, kind)]
    height, width = columns[0][0][0].keywords["picture"].shape[:2]  # all show the same part of it
    shape = (PICTURE_PIXELS, round(PICTURE_PIXELS * height / width))
    rows = []
    for path, *panels in zip(options.pictures, *columns):
        picture = ImageOps.fit(as_rgb(Image.open(path)), shape)
        rows.append([partial(draw_picture, picture=picture, title="picture"), *chain(*panels)])
    figure, axes = new_sheet(len(rows), len(rows[0]), shape=(height, width))
    for panels, axes_of_row in zip(rows, axes):
        for draw, axis in zip(panels, axes_of_row):
            draw(axis)
    save_figure(figure, options.output)
    logger.info("%d pictures shown; the sheet is %s", len(rows), options.output)


if __name__ == "__main__":
    main()
