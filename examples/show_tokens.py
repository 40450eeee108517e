"""Look at the tokens that a model makes of a picture, and at what it fills in where it sees nothing.

    python examples/show_tokens.py --pictures photo.jpg --merged . --merged_size 512 --token_merge_size 128 \\
        --adaptive runs/adaptive --masked runs/masked --output tokens.png

A row for each picture: the picture itself, then columns for each kind of checkpoint that is named:

- --adaptive: one of the stem "adaptive". Its coarse tokens are the large cells, its fine tokens the small ones.
- --merged: any of another stem. The tokens that are left when each layer has merged `token_merge_size` of them, each
  in the mean colour of its pixels, with borders between tokens.
- --masked: one of masked image modelling. What it sees of the picture, and the same with the hidden patches filled in.
- --attended: one with a class token. Where that looks in the last layer, the mean of its heads; and the first three
  principal components of all pictures' patches as red, green and blue, so that like patches have like colours.

Needs matplotlib besides the package's own requirements.
"""

import argparse
import logging
from functools import partial
from itertools import chain
from pathlib import Path

from PIL import ImageOps

from recipes.drawing import draw_picture, picture_sheet, save_figure
from recipes.tokens import KINDS
from vit_embed.retrieval.pictures import as_rgb

logger = logging.getLogger("show_tokens")

PICTURE_PIXELS = 512
NUM_COLOURS = 256  # enough for a sheet of small pictures, and a third of the bytes


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
        picture = ImageOps.fit(as_rgb(path), shape)
        rows.append([partial(draw_picture, picture=picture, title="picture"), *chain(*panels)])
    figure, axes = picture_sheet(len(rows), len(rows[0]), shape=(height, width))
    for panels, axes_of_row in zip(rows, axes):
        for draw, axis in zip(panels, axes_of_row):
            draw(axis)
    save_figure(figure, options.output, NUM_COLOURS)
    logger.info("%d pictures shown; the sheet is %s", len(rows), options.output)


if __name__ == "__main__":
    main()
