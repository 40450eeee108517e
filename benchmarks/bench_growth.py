"""How time and memory grow with pixels, batch, tokens of text and the size of the tower; and where fewer tokens pay.

    python benchmarks/bench_growth.py --output benchmarks/growth.json
    python benchmarks/bench_growth.py --part pixels batch --peers transformers open_clip timm
    python benchmarks/bench_growth.py --part fewer attention

All in bfloat16. Image sides are those of `bench_towers.py`, equal weights and outputs compared first; texts are of 64
tokens with nothing in common. Every round measures every side. An exponent is the slope of a straight line through the
logarithms: 1 where twice the work takes twice the time. Memory is what `LiveBytes` counts above weights and inputs. The
part `fewer` holds a ViT-B/16 with fewer tokens against itself with all of them, as many patches in every call; the part
`attention` one implementation against another.
"""

import argparse
import contextlib
import copy
import gc
import logging
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import transformers
from bench_memory import LiveBytes
from bench_text import random_texts
from bench_tokens import count_tokens, expect_tokens, flat_images, teach_gate, with_field
from bench_towers import PACKAGES, PEERS, SIZES, check_equal, is_installed, make_ours, sides_of
from dual_encoders import END_TOKEN
from timing import CLOCK_HELP, CLOCKS, MIB, Ratios, about, interleave, machine, store, table, timed

from vit_embed import (
    VitEmbedConfig,
    VitEmbedForImageClassification,
    VitEmbedModelWithProjection,
    VitEmbedTextConfig,
    VitEmbedTextModelWithProjection,
)

logger = logging.getLogger("bench_growth")

DTYPE = torch.bfloat16
OURS = ("vit_embed", "optimized")
IMAGE_SIZE, PATCH = 224, 16
PIXELS = (224, 448, 896)  # of a side
BATCHES = (1, 4, 16, 64)
TOKENS = tuple(1024 * 2**i for i in range(5))
TOWERS = ("S/16", "B/16", "L/16", "H/16")
TEXT_LENGTH = 64
# Sides of the parts `fewer` and `attention`, and images of each: 3136 patches a call.
IMAGES = {128: 49, 224: 16, 448: 4, 896: 1}
MERGED, DROPPED = 13 / 196, 0.5  # of the patches: arXiv:2210.09461, a layer; arXiv:2212.00794
IMPLEMENTATIONS = ("sdpa", "eager")
# What tells a stored cell from another. `at` is what is varied, `count` what an exponent is taken over.
CELL = ("part", "what", "at")

Calls = dict[str, Callable[[], object]]


def peak_mib(call: Callable[[], object]) -> float:
    """Above the tensors that stand before the call."""
    gc.collect()
    standing = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    with LiveBytes(standing) as live:
        call()
    return live.peak / MIB


def measure(cell: dict, calls: Calls, args: argparse.Namespace) -> dict:
    """Adds peak memory, which warms up as well, and the seconds of every round."""
    what = f"{cell['part']}: {cell['what']}, {cell['at']}"
    mib = {name: [round(peak_mib(call), 2)] for name, call in calls.items()}
    clocked = {name: timed(call, CLOCKS[args.clock]) for name, call in calls.items()}
    return {**cell, "seconds": interleave(what, clocked, args.rounds), "mib": mib}


def image_cell(cell: dict, size: str, batch: int, image_size: int, args: argparse.Namespace) -> dict:
    pixels = torch.randn(batch, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        exact = PEERS["transformers"](make_ours(size, image_size), size)[0].eval()(pixels).image_embeds
        pixels = pixels.to(DTYPE)
        sides = sides_of(size, DTYPE, args.peers, image_size)
        errors = check_equal(f"{cell['what']}, {cell['at']}", sides, exact, pixels)
        calls = {name: lambda e=embed: e(pixels) for name, embed in sides.items()}
        return {**measure(cell, calls, args), "errors": errors}


def by_pixels(args: argparse.Namespace) -> Iterator[dict]:
    for size in args.pixels:
        cell = {"part": "pixels", "what": "ViT-B/16, 1 image", "at": size, "count": size**2}
        yield image_cell(cell, "B/16", 1, size, args)


def by_batch(args: argparse.Namespace) -> Iterator[dict]:
    for tower in ("B/32", "B/16"):
        for batch in args.batches:
            cell = {"part": "batch", "what": f"ViT-{tower}, {IMAGE_SIZE} pixels", "at": batch, "count": batch}
            yield image_cell(cell, tower, batch, IMAGE_SIZE, args)


def by_tower(args: argparse.Namespace) -> Iterator[dict]:
    for tower in args.towers:
        cell = {"part": "towers", "what": "4 images", "at": tower, "count": make_ours(tower).num_parameters()}
        yield image_cell(cell, tower, 4, IMAGE_SIZE, args)


def by_tokens(args: argparse.Namespace) -> Iterator[dict]:
    """Against transformers alone: open_clip has 77 tokens in every text."""
    torch.manual_seed(0)
    ours = VitEmbedTextModelWithProjection(VitEmbedTextConfig()).eval()
    config = transformers.CLIPTextConfig(eos_token_id=END_TOKEN, projection_dim=ours.config.projection_dim)
    exact = transformers.CLIPTextModelWithProjection._from_config(config, attn_implementation="sdpa").eval()
    exact.load_state_dict(ours.state_dict())
    theirs, optimized = copy.deepcopy(exact).to(DTYPE), ours.optimized(DTYPE)
    ours.to(DTYPE)
    sides = {
        "transformers": lambda ids: theirs(ids).text_embeds,
        "optimized": optimized.get_text_features,
        "vit_embed": ours.get_text_features,
    }
    for total in args.tokens:
        ids = random_texts(total // TEXT_LENGTH, TEXT_LENGTH)["input_ids"]
        with torch.inference_mode():
            errors = check_equal(f"{total} tokens", sides, exact(ids).text_embeds, ids)
            calls = {name: partial(embed, ids) for name, embed in sides.items()}
            cell = {"part": "tokens", "what": f"texts of {TEXT_LENGTH} tokens", "at": total, "count": total}
            yield {**measure(cell, calls, args), "errors": errors}


def config_of(image_size: int, **fields) -> VitEmbedConfig:
    return VitEmbedConfig(image_size=image_size, **SIZES["B/16"], **fields)


def by_implementation(args: argparse.Namespace) -> Iterator[dict]:
    """The copy, as most users of large images have it."""
    for image_size, batch in args.images.items():
        model = make_ours("B/16", image_size).optimized(DTYPE)
        pixels = torch.randn(batch, 3, image_size, image_size, dtype=DTYPE)

        def embed(name, model=model, pixels=pixels):
            model.set_attn_implementation(name)
            return model.get_image_features(pixels)

        with torch.inference_mode():
            calls = {name: partial(embed, name) for name in IMPLEMENTATIONS}
            torch.testing.assert_close(*(call() for call in calls.values()), rtol=5e-2, atol=5e-2)
            cell = {"part": "attention", "what": "ViT-B/16, optimized()", "at": image_size, "count": image_size**2}
            yield measure(cell, calls, args)


def merging(image_size: int, batch: int) -> tuple[Calls, str]:
    """Pooled image features with and without `token_merge_size`."""
    model = make_ours("B/16", image_size).to(DTYPE)
    pixels = torch.randn(batch, 3, image_size, image_size, dtype=DTYPE)
    patches = (image_size // PATCH) ** 2
    size = round(patches * MERGED)
    embed = partial(model.get_image_features, pixels)
    calls = {"all": with_field(model, "token_merge_size", 0, embed)}
    calls["fewer"] = with_field(model, "token_merge_size", size, embed)
    expected = [patches - size * i for i in range(model.config.num_hidden_layers)]
    return calls, expect_tokens("merging", count_tokens(model, calls["fewer"]), expected)


def dropping(image_size: int, batch: int) -> tuple[Calls, str]:
    """A training step of a classifier under autocast, with AdamW, with and without `patch_drop_rate`."""
    torch.manual_seed(0)
    model = VitEmbedForImageClassification(config_of(image_size, num_labels=1000)).train()
    # A rate of learning at which the weights keep their size: what is timed does not depend on it.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    pixels, labels = torch.randn(batch, 3, image_size, image_size), torch.arange(batch)

    def step():
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=DTYPE):
            loss = model(pixels, labels=labels).loss
        loss.backward()
        optimizer.step()

    patches = (image_size // PATCH) ** 2
    calls = {"all": with_field(model, "patch_drop_rate", 0.0, step)}
    calls["fewer"] = with_field(model, "patch_drop_rate", DROPPED, step)
    left = patches - int(patches * DROPPED)
    layers = model.config.num_hidden_layers
    return calls, expect_tokens("dropping", count_tokens(model, calls["fewer"]), [left] * layers)


def adapting(image_size: int, batch: int) -> tuple[Calls, str]:
    """Pooled image features of the adaptive stem, on pictures half flat, beside the `conv` stem's."""
    torch.manual_seed(0)
    models = {
        name: VitEmbedModelWithProjection(config_of(image_size, stem_type=stem)).eval()
        for name, stem in (("all", "conv"), ("fewer", "adaptive"))
    }
    cell, adaptive = 2 * PATCH, models["fewer"]
    teach_gate(adaptive.vision_model.embeddings.patch_embedding, cell)
    pixels = flat_images((0.5,), batch, cell, image_size)[0].to(DTYPE)
    calls = {name: partial(model.to(DTYPE).get_image_features, pixels) for name, model in models.items()}
    with torch.no_grad():
        counts = adaptive.vision_model.get_token_map(pixels).flatten(1).amax(dim=1) + 1
    return calls, f"{counts.min()} - {counts.max()}" if counts.min() < counts.max() else str(int(counts[0]))


FEWER = {"token_merge_size": merging, "patch_drop_rate": dropping, "adaptive stem": adapting}


def by_fewer(args: argparse.Namespace) -> Iterator[dict]:
    for what, make in FEWER.items():
        for image_size, batch in args.images.items():
            calls, tokens = make(image_size, batch)
            facts = {"at": image_size, "count": (image_size // PATCH) ** 2, "images": batch, "tokens": tokens}
            with contextlib.nullcontext() if make is dropping else torch.no_grad():
                yield measure({"part": "fewer", "what": what, **facts}, calls, args)
            del calls
            gc.collect()


PARTS = {
    "pixels": by_pixels,
    "batch": by_batch,
    "tokens": by_tokens,
    "towers": by_tower,
    "attention": by_implementation,
    "fewer": by_fewer,
}


def slope(counts: list[float], values: list[float]) -> float:
    """Of the straight line through the logarithms of both that is closest in squares."""
    return statistics.linear_regression([math.log(c) for c in counts], [math.log(v) for v in values]).slope


def fastest_peer(cells: list[dict]) -> str:
    """The peer that takes least in the last of the cells."""
    seconds = cells[-1]["seconds"]
    return min((name for name in seconds if name in PEERS), key=lambda name: statistics.median(seconds[name]))


def grown(cells: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """Cells of one (part, what) each, those with an exponent, smallest first."""
    found: dict[tuple[str, str], list[dict]] = {}
    for cell in sorted(cells, key=lambda cell: cell["count"]):
        if not {"attention", "fewer"} & {cell["part"]}:
            found.setdefault((cell["part"], cell["what"]), []).append(cell)
    return found


def exponents(cells: list[dict]) -> list[tuple[str, ...]]:
    """Of each (part, what): the exponents of time and of memory of the fastest peer and of ours."""
    rows = []
    for (part, what), those in grown(cells).items():
        if len(those) < 2:
            continue
        sides = [fastest_peer(those), *OURS]
        counts = [cell["count"] for cell in those]
        time = [slope(counts, [statistics.median(cell["seconds"][side]) for cell in those]) for side in sides]
        memory = [slope(counts, [cell["mib"][side][0] for cell in those]) for side in sides]
        span = f"{those[0]['at']} to {those[-1]['at']}"
        rows.append((part, what, span, sides[0], *(f"{each:.2f}" for each in (*time, *memory))))
    return rows


def ratios(cells: list[dict]) -> list[tuple[str, ...]]:
    """Of each cell: its first side, or the fastest peer, over each of the others."""
    rows = []
    for cell in cells:
        seconds = cell["seconds"]
        peers = [name for name in seconds if name in PEERS]
        base = min(peers, key=lambda name: statistics.median(seconds[name])) if peers else next(iter(seconds))
        for side in (name for name in seconds if name != base and name not in peers):
            found = Ratios.of(seconds[base], seconds[side])
            memory = cell["mib"][side][0] / cell["mib"][base][0]
            spans = (f"{found.median:.2f} ({found.lowest:.2f} - {found.highest:.2f})", f"{memory:.2f}")
            rows.append((cell["part"], cell["what"], cell["at"], base, side, *spans, len(seconds[side])))
    return rows


SIDES = ("peer", *OURS)
EXPONENTS = ("part", "what", "from - to", "peer", *(f"{kind}, {s}" for kind in ("time", "memory") for s in SIDES))
RATIOS = ("part", "what", "at", "base", "side", "times as fast", "memory", "rounds")


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--pixels", nargs="+", type=int, default=PIXELS, help="sides of an image")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--towers", nargs="+", choices=TOWERS, default=TOWERS)
    parser.add_argument(
        "--sizes", nargs="+", type=int, choices=list(IMAGES), default=list(IMAGES), help="fewer, attention"
    )
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=["transformers"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="cpu", help=CLOCK_HELP)
    parser.add_argument("--output", type=Path, help="JSON; cells that are not measured again are kept")
    args = parser.parse_args(arguments)
    if "transformers" not in args.peers:
        parser.error("--peers must name transformers, whose outputs are what the others are held against")
    args.images = {size: IMAGES[size] for size in args.sizes}
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    described = about(args.clock, [PACKAGES[name] for name in args.peers if is_installed(name)])
    cells = []
    for part in args.part:
        for cell in PARTS[part](args):
            cells.append({**cell, "about": described})
            logger.info("%s", ratios(cells[-1:]))
            if args.output:
                store(args.output, cells[-1:], CELL)
    tables = (table(EXPONENTS, exponents(cells)), table(RATIOS, ratios(cells)))
    sys.stdout.write(f"{machine()}, {args.clock} time\n\n" + "\n\n".join(tables) + "\n")


if __name__ == "__main__":
    main()
