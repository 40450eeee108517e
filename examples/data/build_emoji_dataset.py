"""Build a labelled picture dataset from emoji art in npm packages, and a small tokenizer for it.

    python examples/data/build_emoji_dataset.py --output_dir data/emoji
    python examples/data/build_emoji_dataset.py --bpe_file bpe_simple_vocab_16e6.txt.gz --tokenizer_dir data/tokenizer

Splits: `train` holds art under licences that allow a trained checkpoint to be redistributed, `validation` is OpenMoji
(CC-BY-SA, for choosing settings only) and `test` is Twemoji (never trained on, never tuned on). Every picture is joined
to its Unicode emoji by codepoint; labels and tags are the English ones of emojibase-data. Flags, keycaps, skin tones,
regional indicators and hair components are dropped.

Needs: `pip install datasets pillow resvg-py tqdm` and the `npm` command.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

if __name__ == "__main__":  # the rule of imports in examples/README.md
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature

from data.emoji import emoji_rows
from recipes.files import check_absent, written_aside
from vit_embed.conversion.tokenizer import clip_bpe_vocabulary, clip_tokenizer_files, write_tokenizer

logger = logging.getLogger("build_emoji_dataset")

# CLIP's vocabulary besides the merges: 256 bytes, the same 256 ending a word, start and end of text.
SPECIAL_AND_BYTE_TOKENS = 514


def build(output_dir: Path, cache_dir: Path, size: int) -> None:
    """Save a DatasetDict of `emoji_rows`."""
    check_absent(output_dir)
    rows = emoji_rows(cache_dir, size)
    features = Features(
        image=ImageFeature(),
        captions=List(Value("string")),
        name=Value("string"),
        vendor=Value("string"),
        codepoints=Value("string"),
    )
    dataset = DatasetDict({split: Dataset.from_list(part, features=features) for split, part in rows.items()})
    with written_aside(output_dir) as aside:
        dataset.save_to_disk(str(aside))
    logger.info("saved %s to %s", {split: len(part) for split, part in dataset.items()}, output_dir)


def build_tokenizer(bpe_file: Path, tokenizer_dir: Path, vocab_size: int, max_length: int) -> None:
    """Write a CLIP tokenizer with CLIP's first merges only: a prefix of a BPE merge list is itself a valid BPE."""
    check_absent(tokenizer_dir)
    vocab, merges = clip_bpe_vocabulary(bpe_file, vocab_size - SPECIAL_AND_BYTE_TOKENS)
    with written_aside(tokenizer_dir) as aside:
        aside.mkdir()
        write_tokenizer(aside, clip_tokenizer_files(vocab, merges, max_length))
    logger.info("saved a tokenizer of %d tokens to %s", vocab_size, tokenizer_dir)


def main() -> None:
    """Parse the command line and build what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, help="folder of the dataset to write; must not exist")
    parser.add_argument("--cache_dir", type=Path, default=Path("data/npm"), help="folder that keeps the npm tarballs")
    parser.add_argument("--size", type=int, default=80, help="side of the rendered pictures, pixels")
    parser.add_argument("--tokenizer_dir", type=Path, help="folder of the tokenizer to write; must not exist")
    parser.add_argument(
        "--bpe_file",
        type=Path,
        help="bpe_simple_vocab_16e6.txt.gz of OpenAI CLIP (MIT); it lies in the package clip-anytorch",
    )
    parser.add_argument("--vocab_size", type=int, default=8192, help="tokens of the tokenizer")
    parser.add_argument("--max_length", type=int, default=32, help="longest caption, tokens")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    if arguments.output_dir is None and arguments.tokenizer_dir is None:
        parser.error("expected --output_dir, --tokenizer_dir or both, got neither")
    if (arguments.tokenizer_dir is None) != (arguments.bpe_file is None):
        parser.error("expected --tokenizer_dir and --bpe_file together, got one of them")
    if arguments.size < 16:
        parser.error(f"expected --size of 16 pixels or more, got {arguments.size}")
    try:
        if arguments.tokenizer_dir is not None:
            build_tokenizer(arguments.bpe_file, arguments.tokenizer_dir, arguments.vocab_size, arguments.max_length)
        if arguments.output_dir is not None:
            build(arguments.output_dir, arguments.cache_dir, arguments.size)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
