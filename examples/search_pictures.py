"""Search a folder of pictures by text, and look at the answer.

    python examples/search_pictures.py --pictures my_photos --queries "red fruit" "a happy face" --output sheet.png

Each query is a row of its best matches with their cosines; the last row shows where the class token looks in one
picture, head by head. Needs matplotlib and tqdm besides the package's own requirements.
"""

import argparse
import logging
from pathlib import Path

from PIL import Image
from transformers import AutoProcessor

from recipes.embedding import embed_texts
from recipes.search import ATTENTION_SCALE, COLUMNS, class_attention, draw_found, embed_files, find_pictures
from vit_embed import VitEmbedForContrastive
from vit_embed.retrieval.pictures import as_rgb

logger = logging.getLogger("search_pictures")

REPO = Path(__file__).resolve().parent.parent
QUERIES = (
    *("smiling face with sunglasses", "turned off camera", "person riding a snowboard", "heart on a calendar"),
    *("no wifi connection", "arrow pointing up and right", "unlocked padlock", "red fruit", "add a file"),
)


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
    paths, image_embeds = embed_files(model, processor, paths, options.batch_size)
    similarities = embed_texts(model, processor.tokenizer, options.queries) @ image_embeds.t()  # (queries, pictures)
    best = similarities.topk(min(COLUMNS, len(paths)))
    matches = {
        query: [(paths[i], cosine) for cosine, i in zip(cosines, places)]
        for query, cosines, places in zip(options.queries, best.values.tolist(), best.indices.tolist())
    }
    for query, found in matches.items():
        logger.info("%-36s %s", query, ", ".join(f"{path.stem} {cosine:.2f}" for path, cosine in found[:3]))
    attended = as_rgb(options.attention_of or matches[options.queries[0]][0][0])
    height, width = (ATTENTION_SCALE * side for side in model.config.image_shape)
    attended = attended.resize((width, height), Image.Resampling.BICUBIC)
    attention = None if options.no_attention else class_attention(model, processor, attended)
    draw_found(matches, attended, attention, options.output)
    logger.info("%d pictures searched; the sheet is %s", len(paths), options.output)


if __name__ == "__main__":
    main()
