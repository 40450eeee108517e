"""Texts: short prompts, and the class vectors of zero-shot classification.

    python benchmarks/bench_text.py --output benchmarks/text_speed.json

`VitEmbedForContrastive` against `transformers.CLIPModel` with padding=True, and open_clip, which pads every text to 77
tokens: one text tower of CLIP's size with random weights in all of them, whose outputs are compared before anything is
timed. Templates and class names are those of ImageNet that open_clip carries. `bench_growth.py` has growth with tokens.
"""

import argparse
import logging
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from dual_encoders import DTYPES, END_TOKEN, NUM_TOKENS, START_TOKEN, check_equal, features_of
from timing import CLOCK_HELP, CLOCKS, Ratios, about, interleave, keep_freed_memory, machine, store, table, timed
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, PreTrainedTokenizerBase

from vit_embed import VitEmbedForContrastive, VitEmbedTextConfig
from vit_embed.conversion.tokenizer import read_tokenizer
from vit_embed.convert_checkpoint import restore_checkpoint
from vit_embed.prefixes_vit_embed import SortedTexts
from vit_embed.zero_shot_vit_embed import TOKENS_OF_A_PASS, text_batches

logger = logging.getLogger("bench_text")

SIDES = ("vit_embed", "transformers", "open_clip")
NUM_PROMPTS = 64
NUM_NAMES = (100, 1000)
LEAST_SAMPLE = 3  # batches of ours
# What tells a stored cell from another.
CELL = ("what", "dtype")


class Sides(NamedTuple):
    """The models, of one set of weights, and what reads texts for them."""

    ours: VitEmbedForContrastive
    theirs: CLIPModel
    open_clip: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    templates: tuple[Callable[[str], str], ...]
    names: list[str]


def open_clip_code() -> Any:
    """The package; without torchvision as our tests import it."""
    try:
        import open_clip
    except ImportError:
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
        from references import import_package

        open_clip = import_package("open_clip")
    return open_clip


def save_checkpoint(folder: Path) -> None:
    """A CLIPModel of base size with random weights."""
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config={"bos_token_id": START_TOKEN, "eos_token_id": END_TOKEN})).save_pretrained(folder)


def load_sides(folder: Path, dtype: torch.dtype) -> Sides:
    """From a CLIPModel's folder."""
    open_clip, back = open_clip_code(), folder.parent / "open_clip"
    if not back.exists():
        VitEmbedForContrastive.from_pretrained(folder).save_pretrained(folder.parent / "ours")
        restore_checkpoint(folder.parent / "ours", "open_clip", output_dir=back)
        (folder.parent / "tokenizer").mkdir()
        for name, content in read_tokenizer(None, [], VitEmbedTextConfig()).items():
            (folder.parent / "tokenizer" / name).write_bytes(content)
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    return Sides(
        VitEmbedForContrastive.from_pretrained(folder, dtype=dtype).eval(),
        CLIPModel.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval(),
        open_clip.create_model(f"local-dir:{back}").to(dtype).eval(),
        AutoTokenizer.from_pretrained(folder.parent / "tokenizer"),
        OPENAI_IMAGENET_TEMPLATES,
        IMAGENET_CLASSNAMES,
    )


def encode(sides: Sides, texts: list[str]) -> dict[str, torch.Tensor]:
    return dict(sides.tokenizer(texts, padding=True, return_tensors="pt"))


def random_texts(count: int, length: int) -> dict[str, torch.Tensor]:
    """(count, length) with nothing in common but the start, and nothing to trim."""
    ids = torch.randint(1, START_TOKEN, (count, length), generator=torch.Generator().manual_seed(2))
    ids[:, 0], ids[:, -1] = START_TOKEN, END_TOKEN
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def features_calls(sides: Sides, inputs: dict[str, torch.Tensor]) -> dict[str, Callable[[], torch.Tensor]]:
    """`get_text_features` of each; open_clip's texts are padded to 77."""
    ids = inputs["input_ids"]
    full = F.pad(ids.masked_fill(inputs["attention_mask"] == 0, 0), (0, NUM_TOKENS - ids.shape[1]))
    return {
        "vit_embed": lambda: sides.ours.get_text_features(**inputs),
        "transformers": lambda: features_of(sides.theirs.get_text_features(**inputs)),
        "open_clip": lambda: sides.open_clip.encode_text(full),
    }


def measure(what: str, calls: dict, dtype_name: str, args: argparse.Namespace, **facts) -> dict[str, Any]:
    """Compares what the calls return, times them in turn, and gives a cell: the seconds of each side in every round."""
    outputs = {name: call() for name, call in calls.items()}
    for name in list(outputs)[1:]:
        check_equal(f"{what}, {dtype_name}, {name}", outputs["vit_embed"], outputs[name], dtype_name)
    del outputs
    clock = CLOCKS[args.clock]
    seconds = interleave(what, {name: timed(call, clock) for name, call in calls.items()}, args.rounds)
    return {"what": what, "dtype": dtype_name, **facts, "seconds": seconds}


def bench_prompts(sides: Sides, dtype_name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """64 texts in one call."""
    names = sides.names[:: len(sides.names) // NUM_PROMPTS][:NUM_PROMPTS]
    inputs = {
        "64 names in one sentence": encode(sides, [f"a photo of a {name}." for name in names]),
        "64 names, each in another sentence": encode(sides, [t(name) for t, name in zip(sides.templates, names)]),
        "64 random texts of 10 tokens": random_texts(NUM_PROMPTS, 10),
    }
    return [
        measure(
            what, features_calls(sides, each), dtype_name, args, part="prompts", shape=list(each["input_ids"].shape)
        )
        for what, each in inputs.items()
    ]


def class_vectors(sides: Sides, names: list[str]) -> torch.Tensor:
    """As CLIP's own notebook makes them: a batch for each class."""
    classes = []
    for name in names:
        inputs = encode(sides, [template(name) for template in sides.templates])
        embeds = F.normalize(features_of(sides.theirs.get_text_features(**inputs)).float(), dim=-1)
        classes.append(F.normalize(embeds.mean(0), dim=-1))
    return torch.stack(classes)


def bench_classes(sides: Sides, dtype_name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """80 templates times 100 and 1000 names, from strings to vectors."""
    entries = []
    for count in args.classes:
        names, every = sides.names[:count], args.every
        what = f"class vectors, {len(sides.templates)} templates x {count} names"
        facts = {"part": "classes", "one_batch_of": every}
        if every == 1:
            calls = {
                "vit_embed": lambda n=names: sides.ours.get_class_features(sides.tokenizer, n, sides.templates),
                "transformers": lambda n=names: class_vectors(sides, n),
            }
            entries.append(measure(what, calls, dtype_name, args, **facts))
        else:
            entries.append(measure_sampled(what, names, every, sides, dtype_name, args, **facts))
    return entries


def measure_sampled(
    what: str, names: list[str], every: int, sides: Sides, dtype_name: str, args: argparse.Namespace, **facts
) -> dict[str, Any]:
    """Of every so many batches of each side, times the tokens that all have over the tokens that these have: nodes of
    the tree here, padding included there. What comes before the batches is timed whole."""
    clock = CLOCKS[args.clock]

    def batches() -> list:
        sentences = [template(name) for name in names for template in sides.templates]
        return list(text_batches(sides.ours.text_model.config, sides.tokenizer, sentences, TOKENS_OF_A_PASS))

    def embed(batch) -> torch.Tensor:
        return sides.ours.get_text_features(batch.input_ids, True, batch.attention_mask, share_prefixes=True)

    def num_nodes(some: list) -> int:
        return sum(SortedTexts.of(each.input_ids, each.attention_mask.sum(1) - 1).num_nodes for each in some)

    def num_padded(some: list[str]) -> int:
        return sum(encode(sides, [t(name) for t in sides.templates])["input_ids"].numel() for name in some)

    every_batch = batches()
    sample = every_batch[:: max(1, len(every_batch) // LEAST_SAMPLE)]
    factor = num_nodes(every_batch) / num_nodes(sample), num_padded(names) / num_padded(names[::every])

    def ours() -> float:
        started = clock()
        batches()
        prepared = clock()
        for batch in sample:
            embed(batch)
        return prepared - started + (clock() - prepared) * factor[0]

    def theirs() -> float:
        started = clock()
        class_vectors(sides, names[::every])
        return (clock() - started) * factor[1]

    given = {"input_ids": sample[0].input_ids, "attention_mask": sample[0].attention_mask}
    expected = F.normalize(features_of(sides.theirs.get_text_features(**given)), dim=-1)
    check_equal(f"{what}, {dtype_name}", embed(sample[0]), expected, dtype_name)
    seconds = interleave(what, {"vit_embed": ours, "transformers": theirs}, args.rounds)
    counts = {"nodes": num_nodes(every_batch), "padded": num_padded(names)}
    return {"what": what, "dtype": dtype_name, **facts, **counts, "seconds": seconds}


PARTS = {"prompts": bench_prompts, "classes": bench_classes}
HEADER = ("measured", "dtype", "side", "seconds", "times as long as vit_embed", "range")


def rows_of(cells: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    rows = []
    for cell in cells:
        for name in (side for side in SIDES if side in cell["seconds"]):
            seconds = cell["seconds"][name]
            ratio, spread, _ = Ratios.of(seconds, cell["seconds"]["vit_embed"]).cells(2)
            rows.append((cell["what"], cell["dtype"], name, f"{statistics.median(seconds):.3f}", ratio, spread))
    return rows


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--classes", nargs="+", type=int, default=list(NUM_NAMES), help="numbers of class names")
    parser.add_argument("--every", type=int, default=1, help="runs one of so many batches of the classes part alone")
    parser.add_argument("--rounds", type=int, default=7, help="measures of each side of each row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="cpu", help=CLOCK_HELP)
    parser.add_argument("--output", type=Path, help="JSON; cells that are not measured again are kept")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    cells = []
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        save_checkpoint(Path(scratch) / "clip")
        for dtype_name in args.dtypes:
            sides = load_sides(Path(scratch) / "clip", DTYPES[dtype_name])
            described = about(args.clock, ["open_clip_torch"])
            for part in args.part:
                found = [{**cell, "about": described} for cell in PARTS[part](sides, dtype_name, args)]
                cells += found
                if args.output:
                    store(args.output, found, CELL)
    sys.stdout.write(f"{machine()}, {args.clock} time\n\n{table(HEADER, rows_of(cells))}\n")


if __name__ == "__main__":
    main()
