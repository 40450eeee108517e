"""The command line of the converter: `python -m vit_embed.convert_checkpoint`."""

import argparse
import dataclasses
import logging
from typing import Any

import torch

from vit_embed.conversion.convert import MAX_SHARD_SIZE, convert_checkpoint, restore_checkpoint
from vit_embed.conversion.layouts import LAYOUTS
from vit_embed.conversion.layouts.layout import ConversionOptions
from vit_embed.conversion.openai_files import BPE_FILE, OPENAI_MODELS
from vit_embed.options_vit_embed import HIDDEN_ACTS, NORM_POSITIONS, POOLING_TYPES

logger = logging.getLogger("vit_embed.convert_checkpoint")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns its exit status.

    Args:
        arguments: None takes those of the process.
    """
    given = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        _run(given)
    except (ValueError, OSError) as error:
        logger.error("nothing was written: %s", " ".join(str(error).split()))  # on one line
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vit_embed.convert_checkpoint",
        description="Weights in another layout -> a folder that every Auto class loads, and back.",
    )
    parser.add_argument(
        "source",
        help=f"a file of weights, a folder, owner/name on the Hub, or one of {', '.join(OPENAI_MODELS)}; with "
        "--reverse a folder of ours",
    )
    parser.add_argument("--output_dir", help="a new or an empty folder")
    parser.add_argument("--layout", choices=["auto", *LAYOUTS], default="auto", help="names of the source's weights")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="of the weights written")
    parser.add_argument("--max_shard_size", help=f"of a file of weights (default: {MAX_SHARD_SIZE})")
    parser.add_argument("--tokenizer", help=f"a folder of a tokenizer, or {BPE_FILE}")
    parser.add_argument("--reverse", action="store_true", help="from a folder of ours to --layout")
    parser.add_argument("--output_file", help="with --reverse: a new file, .safetensors, .pt, .pth or .bin")
    group = parser.add_argument_group("what the source does not say, or what to make of it")
    group.add_argument("--hidden_act", choices=HIDDEN_ACTS, help="activation of the towers")
    group.add_argument("--num_attention_heads", type=int, help="of the image tower")
    group.add_argument("--text_num_attention_heads", type=int, help="of the text tower")
    group.add_argument("--layer_norm_eps", type=float, help="what every norm adds to the variance")
    group.add_argument("--norm_position", choices=NORM_POSITIONS, help="before each branch, or after the sum")
    group.add_argument("--pooling_type", choices=POOLING_TYPES, help="how the image tower's tokens become one vector")
    group.add_argument("--image_size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="where it is no square")
    group.add_argument("--max_position_embeddings", type=int, help="tokens of a text; resamples the text positions")
    group.add_argument("--weights_key", help="state dict of a training checkpoint, as state_dict or state_dict_ema")
    group.add_argument("--trunk_only", action="store_true", help="leave out heads, projections and the text tower")
    return parser


def _run(given: argparse.Namespace) -> None:
    values: dict[str, Any] = {each.name: getattr(given, each.name) for each in dataclasses.fields(ConversionOptions)}
    values["dtype"] = DTYPES[given.dtype]
    values["image_size"] = None if given.image_size is None else tuple(given.image_size)
    options = ConversionOptions(**values)
    if given.reverse:
        if options != ConversionOptions() or given.tokenizer is not None or given.max_shard_size is not None:
            raise ValueError(
                "--reverse takes --layout and --output_file or --output_dir alone; the model says the rest"
            )
        restore_checkpoint(given.source, given.layout, given.output_file, given.output_dir)
        return
    if given.output_dir is None or given.output_file is not None:
        raise ValueError("give --output_dir, the folder to write; --output_file is for --reverse")
    max_shard_size = MAX_SHARD_SIZE if given.max_shard_size is None else given.max_shard_size
    convert_checkpoint(given.source, given.output_dir, options, given.tokenizer, given.layout, max_shard_size)
