"""Texts: short prompts, the class vectors of zero-shot classification, and growth with the number of tokens.

    python benchmarks/bench_text.py --json benchmarks/text_speed.json

`VitEmbedForContrastive` against `transformers.CLIPModel` with padding=True, and open_clip, which pads every text to 77
tokens: one text tower of CLIP's size with random weights in all of them, whose outputs are compared before anything is
timed. Templates and class names are those of ImageNet that open_clip carries.
"""

import argparse
import datetime
import json
import logging
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_clip import END_TOKEN, START_TOKEN, check_equal, features_of, save_checkpoint
from bench_memory import LiveBytes
from timing import CLOCK_HELP, CLOCKS, MIB, Ratios, interleave, keep_freed_memory, machine, table, timed
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPModel, PreTrainedTokenizerBase

from vit_embed import VitEmbedForContrastive, VitEmbedTextConfig
from vit_embed.conversion.tokenizer import read_tokenizer
from vit_embed.convert_checkpoint import restore_checkpoint
from vit_embed.prefixes_vit_embed import SortedTexts
from vit_embed.zero_shot_vit_embed import TOKENS_OF_A_PASS, text_batches

logger = logging.getLogger("bench_text")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIDES = ("vit_embed", "transformers", "open_clip")
NUM_PROMPTS = 64
TOTALS = [2**n * 1024 for n in range(5)]  # tokens of text
LONGEST = 77
NUM_NAMES = (100, 1000)
LEAST_SAMPLE = 3  # batches of ours


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
    full = F.pad(ids.masked_fill(inputs["attention_mask"] == 0, 0), (0, LONGEST - ids.shape[1]))
    return {
        "vit_embed": lambda: sides.ours.get_text_features(**inputs),
        "transformers": lambda: features_of(sides.theirs.get_text_features(**inputs)),
        "open_clip": lambda: sides.open_clip.encode_text(full),
    }


def measure(what: str, calls: dict, dtype_name: str, args: argparse.Namespace, **facts) -> dict[str, Any]:
    """Compares what the calls return, times them in turn, and gives an entry of the JSON: seconds of each, and how many
    times as long as vit_embed each takes, median and range over the rounds."""
    outputs = {name: call() for name, call in calls.items()}
    for name in list(outputs)[1:]:
        check_equal(f"{what}, {dtype_name}, {name}", outputs["vit_embed"], outputs[name], dtype_name)
    del outputs
    clock = CLOCKS[args.clock]
    seconds = interleave(what, {name: timed(call, clock) for name, call in calls.items()}, args.rounds)
    return entry_of(what, dtype_name, seconds, args, **facts)


def entry_of(what: str, dtype_name: str, seconds: dict[str, list[float]], args, **facts) -> dict[str, Any]:
    entry = {"what": what, "dtype": dtype_name, **facts, "rounds": args.rounds}
    for name, values in seconds.items():
        ratios = Ratios.of(values, seconds["vit_embed"])
        entry[name] = {"seconds": statistics.median(values), "ratio": ratios.median, "range": ratios[1:3]}
    logger.info("%s", json.dumps(entry))
    return entry


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
    return entry_of(what, dtype_name, seconds, args, **facts, nodes=num_nodes(every_batch), padded=num_padded(names))


def bench_growth(sides: Sides, dtype_name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """1 to 16 k tokens of text in one call: texts of 64 tokens with nothing in common, and sentences about classes."""
    entries = []
    sentences = [template(name) for name in sides.names[::7] for template in sides.templates]
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(3)).tolist()
    lengths = encode(sides, [sentences[i] for i in order])["attention_mask"].sum(1).cumsum(0)
    for kind in ("random texts of 64 tokens", "sentences about classes"):
        for total in args.totals:
            if kind.startswith("random"):
                inputs = random_texts(total // 64, 64)
            else:
                inputs = encode(sides, [sentences[i] for i in order[: int((lengths <= total).sum())]])
            calls = features_calls(sides, inputs)
            del calls["open_clip"]  # whose texts all have 77 tokens
            entry = measure(f"{total} tokens: {kind}", calls, dtype_name, args, part="growth", kind=kind, tokens=total)
            for name, call in calls.items():
                model = sides.ours if name == "vit_embed" else sides.theirs
                with LiveBytes([*model.parameters(), *model.buffers(), *inputs.values()]) as live:
                    call()
                entry[name]["peak_mib"] = live.peak / MIB
            entries.append(entry)
    return entries


def exponents(entries: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Of time and memory over tokens, for each kind of text, dtype and side: slopes of straight lines through logs."""
    rows = []
    grown = [entry for entry in entries if entry["part"] == "growth"]
    for kind, dtype_name in dict.fromkeys((entry["kind"], entry["dtype"]) for entry in grown):
        those = [entry for entry in grown if (entry["kind"], entry["dtype"]) == (kind, dtype_name)]
        tokens = torch.tensor([float(entry["tokens"]) for entry in those]).log()
        for name in (each for each in SIDES if each in those[0]):
            slopes = []
            for field in ("seconds", "peak_mib"):
                values = torch.tensor([entry[name][field] for entry in those]).log()
                centred = tokens - tokens.mean()
                slopes.append(f"{float((centred * values).sum() / centred.square().sum()):.2f}")
            rows.append((kind, dtype_name, name, *slopes))
    return rows


PARTS = {"prompts": bench_prompts, "classes": bench_classes, "growth": bench_growth}
HEADER = ("measured", "dtype", "side", "seconds", "times as long as vit_embed", "range")


def rows_of(entries: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    rows = []
    for entry in entries:
        for name in SIDES:
            if name in entry:
                found = entry[name]
                spread = "{:.2f} - {:.2f}".format(*found["range"])
                rows.append(
                    (entry["what"], entry["dtype"], name, f"{found['seconds']:.3f}", f"{found['ratio']:.2f}", spread)
                )
    return rows


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--classes", nargs="+", type=int, default=list(NUM_NAMES), help="numbers of class names")
    parser.add_argument("--every", type=int, default=1, help="runs one of so many batches of the classes part alone")
    parser.add_argument("--totals", nargs="+", type=int, default=TOTALS, help="tokens of the growth part")
    parser.add_argument("--rounds", type=int, default=7, help="measures of each side of each row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="cpu", help=CLOCK_HELP)
    parser.add_argument("--json", type=Path, help="file for what was measured; parts that were not run are kept")
    return parser.parse_args()


def store(target: Path, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Writes the entries in place of those of the same name; returns all that the file has."""
    kept = json.loads(target.read_text())["measured"] if target.exists() else []
    found = {(entry["what"], entry["dtype"]): entry for entry in [*kept, *entries]}
    measured = list(found.values())
    about = f"{machine()}; shared machine; {datetime.date.today()}"
    target.write_text(json.dumps({"about": about, "measured": measured}, indent=1) + "\n")
    return measured


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    entries = []
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        save_checkpoint(32, Path(scratch) / "clip")
        for dtype_name in args.dtypes:
            sides = load_sides(Path(scratch) / "clip", DTYPES[dtype_name])
            for part in args.part:
                entries += PARTS[part](sides, dtype_name, args)
                if args.json:
                    store(args.json, entries)
    if args.json:
        entries = store(args.json, entries)
    sys.stdout.write(f"{machine()}, {args.clock} time\n\n{table(HEADER, rows_of(entries))}\n")
    grown = exponents(entries)
    if grown:
        header = ("texts", "dtype", "side", "exponent of time", "exponent of memory")
        sys.stdout.write(f"\n{table(header, grown)}\n")


if __name__ == "__main__":
    main()
