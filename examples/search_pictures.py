"""Search a folder of pictures by text, and look at the answer.

    python examples/search_pictures.py --pictures my_photos --queries "red fruit" "a happy face" --output sheet.png

Each query is a row of its best matches with their cosines; the last row shows where the class token looks in one
picture, head by head, unless `--no_attention` is given. Needs matplotlib and tqdm besides the package's own
requirements.
"""

import argparse
import logging
import tempfile
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import torch
from picture_files import UNREADABLE, as_rgb
from PIL import Image
from tqdm import tqdm
from transformers import AutoProcessor

from vit_embed import VitEmbedForContrastive

matplotlib.use("Agg")  # a picture file is wanted, so no screen is
from matplotlib import pyplot  # noqa: E402

logger = logging.getLogger("search_pictures")

REPO = Path(__file__).resolve().parent.parent
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
QUERIES = (
    *("smiling face with sunglasses", "turned off camera", "person riding a snowboard", "heart on a calendar"),
    *("no wifi connection", "arrow pointing up and right", "unlocked padlock", "red fruit", "add a file"),
)
COLUMNS = 6
QUERY_COLUMNS = 16  # characters in a line of a query
ATTENTION_SCALE = 3


def find_pictures(folder: Path) -> list[Path]:
    """All pictures below a folder, in order of name.

    Raises:
        ValueError: there are none.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    if not paths:
        raise ValueError(f"--pictures must be a folder with {', '.join(PICTURE_SUFFIXES)} files, got {folder}")
    return paths


def read_pictures(paths: list[Path]) -> list[tuple[Path, Image.Image]]:
    """The pictures that can be read, in RGB; the others are named in the log."""
    pictures = []
    for path in paths:
        try:
            pictures.append((path, as_rgb(Image.open(path))))
        except UNREADABLE as error:
            logger.warning("%s is left out: %s", path, error)
    return pictures


@torch.inference_mode()
def embed_pictures(model, processor, paths: list[Path], batch_size: int) -> tuple[list[Path], torch.Tensor]:
    """The readable ones of the paths, and their embeddings (number of them, projection_dim), unit length."""
    kept, embeds = [], []
    for start in tqdm(range(0, len(paths), batch_size), desc="pictures", unit="batch"):
        pictures = read_pictures(paths[start : start + batch_size])
        if pictures:
            inputs = processor.image_processor([image for _, image in pictures], return_tensors="pt")
            embeds.append(model.get_image_features(**inputs, normalize=True))
            kept += [path for path, _ in pictures]
    if not kept:
        raise ValueError(f"none of the {len(paths)} pictures can be read")
    return kept, torch.cat(embeds)


@torch.inference_mode()
def embed_queries(model, processor, queries: list[str]) -> torch.Tensor:
    """(queries, projection_dim), unit length."""
    inputs = processor.tokenizer(queries, padding=True, return_tensors="pt")
    return model.get_text_features(**inputs, normalize=True)


@torch.inference_mode()
def class_attention(model, processor, picture: Image.Image) -> np.ndarray:
    """Where the class token looks in the last layer: (heads, gh, gw), each head's largest weight 1.

    The picture is enlarged, for a finer grid than the one that the model was trained on.
    """
    height, width = (ATTENTION_SCALE * side for side in model.config.image_shape)
    sizes = {"size": {"shortest_edge": min(height, width)}, "crop_size": {"height": height, "width": width}}
    inputs = processor.image_processor(picture, return_tensors="pt", **sizes)
    attention = model.trunk.get_class_attentions(**inputs)[0, -1]
    return (attention / attention.amax(dim=(1, 2), keepdim=True)).numpy()


def draw_attention(figure, last: np.ndarray, picture: Image.Image, attention: np.ndarray) -> None:
    """Fills a row of axes with the picture and each head's attention over it."""
    last[0].text(0.95, 0.5, "class attention,\nlast layer", ha="right", va="center", transform=last[0].transAxes)
    last[1].imshow(picture)
    last[1].set_title("picture", fontsize=8)
    shown = min(len(attention), COLUMNS - 1)
    for head, axis in zip(range(shown), last[2:]):
        height, width = np.asarray(picture).shape[:2]
        axis.imshow(picture.convert("L"), cmap="gray", extent=(0, width, height, 0))
        shade = axis.imshow(
            attention[head],
            cmap="inferno",
            alpha=0.65,
            vmin=0,
            vmax=1,
            extent=(0, width, height, 0),
            interpolation="bilinear",
        )
        axis.set_title(f"head {head + 1}", fontsize=8)
    figure.colorbar(shade, ax=list(last), fraction=0.02, label="share of largest weight")


def draw_sheet(
    matches: dict[str, list[tuple[Path, float]]], picture: Image.Image, attention: np.ndarray | None, output: Path
) -> None:
    """Saves the matches of each query as a row, and the attention over one picture as the last.

    Args:
        matches: query -> (path, cosine), best first.
        picture: the picture that the attention is of, as the model sees it.
        attention: (heads, gh, gw), 1 at each head's largest weight; None leaves its row out.
        output: the file to write; it is written aside and then renamed.
    """
    rows = len(matches) + (attention is not None)
    figure, axes = pyplot.subplots(rows, COLUMNS + 1, figsize=(1.6 * (COLUMNS + 1), 1.85 * rows), squeeze=False)
    figure.subplots_adjust(hspace=0.5)  # room for names of two lines
    for axis in axes.flat:
        axis.axis("off")
    for row, (query, found) in zip(axes, matches.items()):
        row[0].text(
            *(0.95, 0.5, textwrap.fill(f"“{query}”", QUERY_COLUMNS)),
            **{"ha": "right", "va": "center", "fontsize": 11, "parse_math": False},
            transform=row[0].transAxes,
        )
        for axis, (path, cosine) in zip(row[1:], found):
            axis.imshow(as_rgb(Image.open(path)))
            axis.set_title(f"{textwrap.fill(path.stem, 18)}\n{cosine:.2f}", fontsize=8, parse_math=False)
    if attention is not None:
        draw_attention(figure, axes[-1], picture, attention)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as aside:
        written = Path(aside) / f"sheet{output.suffix or '.png'}"
        figure.savefig(written, dpi=110, bbox_inches="tight")
        written.replace(output)
    pyplot.close(figure)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(REPO), help="folder or Hub id of a dual encoder, ours or CLIP; default: this repo's own"
    )
    parser.add_argument("--pictures", type=Path, default=REPO / "examples" / "pictures", help="folder to search")
    parser.add_argument("--queries", nargs="+", default=list(QUERIES), help="texts to search for")
    parser.add_argument("--output", type=Path, default=Path("demo_output/search.png"), help="picture to write")
    parser.add_argument(
        "--attention_of", type=Path, help="picture for the attention row; default: the first query's best"
    )
    parser.add_argument("--no_attention", action="store_true", help="leave the attention row out")
    parser.add_argument("--batch_size", type=int, default=64, help="pictures at a time")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    paths = find_pictures(options.pictures)
    model = VitEmbedForContrastive.from_pretrained(options.model).eval()
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
    paths, image_embeds = embed_pictures(model, processor, paths, options.batch_size)
    similarities = embed_queries(model, processor, options.queries) @ image_embeds.t()  # (queries, pictures)
    best = similarities.topk(min(COLUMNS, len(paths)))
    matches = {
        query: [(paths[i], cosine) for cosine, i in zip(cosines, places)]
        for query, cosines, places in zip(options.queries, best.values.tolist(), best.indices.tolist())
    }
    for query, found in matches.items():
        logger.info("%-36s %s", query, ", ".join(f"{path.stem} {cosine:.2f}" for path, cosine in found[:3]))
    attended = as_rgb(Image.open(options.attention_of or matches[options.queries[0]][0][0]))
    height, width = (ATTENTION_SCALE * side for side in model.config.image_shape)
    attended = attended.resize((width, height), Image.Resampling.BICUBIC)
    attention = None if options.no_attention else class_attention(model, processor, attended)
    draw_sheet(matches, attended, attention, options.output)
    logger.info("%d pictures searched; the sheet is %s", len(paths), options.output)


if __name__ == "__main__":
    main()
