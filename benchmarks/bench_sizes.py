"""Speed of a batch of photos of many sizes, with `pixel_mask`: without padding against padded, and against timm.

    python benchmarks/bench_sizes.py --output benchmarks/sizes.json
    python benchmarks/bench_sizes.py --rows "scaled, 256, fp32" --rounds 7

ViT-S/16, the pooled vector, noise in the shapes of photos. "scaled": each photo has the largest size of its shape
within the budget of patches, as timm's NaFlex loader makes them. "as they come": photos of the web, made smaller where
they are beyond the budget and never larger. Sides: "packed" is what `pixel_mask` does; "padded" is what it does where
someone looks between the layers, and did everywhere before: stems by size, layers on rows padded to the longest with
padding masked; "timm" is NaFlexVit with the same weights, given patches that are cut and padded already. Outputs are
held against each other first.
"""

import argparse
import logging
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from timing import CLOCK_HELP, CLOCKS, Ratios, about, interleave, keep_freed_memory, machine, store, table, timed
from torch import nn

from vit_embed import VitEmbedConfig, VitEmbedModel
from vit_embed.stem_layers_vit_embed import patchify
from vit_embed.stems_vit_embed import ConvStem

logger = logging.getLogger("bench_sizes")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BUDGETS = (256, 1024)  # patches an image
PATCH, NATIVE = 16, 224
# Width / height of cameras' pictures, each cropped by up to 5 %.
SHAPES = (1.0, 4 / 3, 3 / 2, 16 / 9, 5 / 4, 3 / 4, 2 / 3, 9 / 16, 4 / 5)
# Natural logarithm of the patches of a photo of the web: median 493 (355 x 355 pixels), two thirds within 270 and 900.
LOG_PATCHES, SPREAD = 6.2, 0.6
ROWS = [f"{kind}, {budget}, {dtype}" for kind in ("scaled", "as they come") for budget in BUDGETS for dtype in DTYPES]
# What tells a stored cell from another.
CELL = ("kind", "budget", "dtype")
Batch = dict[str, torch.Tensor]


def photo_sizes(kind: str, budget: int, count: int) -> list[tuple[int, int]]:
    """(height, width) in pixels, in whole patches."""
    draw, sizes = random.Random(0), []
    for _ in range(count):
        shape = draw.choice(SHAPES) * draw.uniform(0.95, 1.05)
        area = min(budget, draw.lognormvariate(LOG_PATCHES, SPREAD)) if kind == "as they come" else budget
        rows = max(1, int((area / shape) ** 0.5))
        sizes.append((PATCH * rows, PATCH * max(1, min(int(area / rows), int((area * shape) ** 0.5)))))
    return sizes


def padded_batch(sizes: list[tuple[int, int]]) -> Batch:
    """Noise of these sizes as an image processor pads them: pixel_values and pixel_mask."""
    generator = torch.Generator().manual_seed(0)
    height, width = (max(sides) for sides in zip(*sizes))
    batch = {
        "pixel_values": torch.zeros(len(sizes), 3, height, width),
        "pixel_mask": torch.zeros(len(sizes), height, width),
    }
    for i, (rows, columns) in enumerate(sizes):
        batch["pixel_values"][i, :, :rows, :columns] = torch.randn(3, rows, columns, generator=generator)
        batch["pixel_mask"][i, :rows, :columns] = 1
    return batch


def naflex_batch(batch: Batch, sizes: list[tuple[int, int]], dtype: torch.dtype) -> Batch:
    """The same images as timm's loader gives them: (B, n, ph * pw * C), row and column of each, which are real."""
    longest = max(height * width for height, width in sizes) // PATCH**2
    patches = torch.zeros(len(sizes), longest, 3 * PATCH**2, dtype=dtype)
    coordinates = torch.zeros(len(sizes), longest, 2, dtype=torch.long)
    valid = torch.zeros(len(sizes), longest, dtype=torch.bool)
    for i, (height, width) in enumerate(sizes):
        own = patchify(batch["pixel_values"][i : i + 1, :, :height, :width], (PATCH, PATCH))[0]  # (n, C * ph * pw)
        patches[i, : len(own)] = own.unflatten(1, (3, -1)).transpose(1, 2).flatten(1)
        coordinates[i, : len(own)] = torch.cartesian_prod(*(torch.arange(side // PATCH) for side in (height, width)))
        valid[i, : len(own)] = True
    return {"patches": patches, "patch_coord": coordinates, "patch_valid": valid}


def make_model() -> VitEmbedModel:
    torch.manual_seed(0)
    config = VitEmbedConfig(
        hidden_size=384,
        num_attention_heads=6,
        intermediate_size=1536,
        image_size=NATIVE,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        use_pre_layernorm=False,
        patch_bias=True,
        position_interpolation="bicubic_antialias",
    )
    return VitEmbedModel._from_config(config, attn_implementation="sdpa").eval()


def naflex_model(model: VitEmbedModel) -> nn.Module | None:
    """timm's NaFlexVit with these weights, or None where timm is not installed."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
    import references

    try:
        naflexvit = references.import_package("timm").models.naflexvit
    except ImportError:
        return None
    config, trunk = model.config, model.state_dict()
    fields = {
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
    }
    options = naflexvit.NaFlexVitCfg(
        patch_size=PATCH, class_token=True, pos_embed_grid_size=config.grid_size, global_pool="token", **fields
    )
    positions = trunk["embeddings.position_embedding.weight"]
    state = {
        "embeds.cls_token": (trunk["embeddings.class_embedding"] + positions[0])[None, None],
        "embeds.pos_embed": positions[1:].reshape(1, *config.grid_size, -1),
        "embeds.proj.weight": trunk["embeddings.patch_embedding.weight"].permute(0, 2, 3, 1).flatten(1),
        "embeds.proj.bias": trunk["embeddings.patch_embedding.bias"],
    }
    names = {"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attn.proj", "mlp.fc1": "mlp.fc1"}
    names["mlp.fc2"] = "mlp.fc2"
    for kind in ("weight", "bias"):
        for i in range(config.num_hidden_layers):
            ours = f"encoder.layers.{i}."
            for name, theirs in names.items():
                state[f"blocks.{i}.{theirs}.{kind}"] = trunk[f"{ours}{name}.{kind}"]
            qkv = [trunk[f"{ours}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(qkv)
        state[f"norm.{kind}"] = trunk[f"post_layernorm.{kind}"]
    theirs = naflexvit.NaFlexVit(options, num_classes=0)
    theirs.load_state_dict(state)
    return theirs.eval()


@contextmanager
def padding(model: VitEmbedModel) -> Iterator[None]:
    """Stems by size and layers on padded rows."""
    hook = model.encoder.layers[0].register_forward_pre_hook(lambda *_: None)
    ConvStem.reads_single_patches = False
    try:
        yield
    finally:
        hook.remove()
        ConvStem.reads_single_patches = True


def pooled(model: VitEmbedModel, batch: Batch) -> torch.Tensor:
    return model(**batch, pooled_only=True).pooler_output


def pooled_padded(model: VitEmbedModel, batch: Batch) -> torch.Tensor:
    with padding(model):
        return pooled(model, batch)


def check_equal(calls: dict[str, Callable], reference: torch.Tensor, dtype: str) -> None:
    """Raises AssertionError unless all sides give the reference, float32 computed padded; in bf16 with no more error
    than the padded side has."""
    errors = {name: call().float() - reference for name, call in calls.items()}
    if dtype == "fp32":
        assert all(error.abs().max() < 1e-5 * reference.abs().max() for error in errors.values()), errors
    else:
        norms = {name: error.norm().item() for name, error in errors.items()}
        assert max(norms.values()) <= 1.05 * norms["padded"], norms


def measure(row: str, args: argparse.Namespace) -> dict:
    """One cell: what was measured, and the seconds of every round of each side."""
    kind, budget, dtype = row.split(", ")
    model = make_model()
    timm_model = naflex_model(model)
    sizes = photo_sizes(kind, int(budget), args.photos)
    batch = padded_batch(sizes)
    counts = [height * width // PATCH**2 for height, width in sizes]
    with torch.inference_mode():
        reference = pooled_padded(model, batch)
        model.to(DTYPES[dtype])
        calls = {"packed": partial(pooled, model, batch), "padded": partial(pooled_padded, model, batch)}
        if timm_model is not None:
            inputs = naflex_batch(batch, sizes, DTYPES[dtype])
            calls["timm"] = partial(timm_model.to(DTYPES[dtype]), inputs)
        check_equal(calls, reference, dtype)
        clocked = {name: timed(call, CLOCKS[args.clock]) for name, call in calls.items()}
        seconds = interleave(row, clocked, args.rounds)
    facts = {"kind": kind, "budget": int(budget), "dtype": dtype, "photos": args.photos}
    facts |= {"sizes": len(set(sizes)), "lengths": len(set(counts))}
    padded_by = args.photos * max(counts) / sum(counts)
    described = about(args.clock, [] if timm_model is None else ["timm"])
    return {**facts, "padded_by": padded_by, "seconds": seconds, "about": described}


HEADER = ("photos", "padding adds", "packed", "padded / packed", "range", "timm / packed", "range")


def line(cell: dict) -> tuple[str, ...]:
    seconds = cell["seconds"]
    ratios = [
        Ratios.of(seconds[side], seconds["packed"]).cells(2)[:2] if side in seconds else ("-", "-")
        for side in ("padded", "timm")
    ]
    median = f"{statistics.median(seconds['packed']):.2f} s"
    what = f"{cell['photos']} {cell['kind']}, {cell['budget']}, {cell['dtype']}"
    return (what, f"{cell['padded_by'] - 1:.0%}", median, *ratios[0], *ratios[1])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="ROW", help=f"of {ROWS}")
    parser.add_argument("--rounds", type=int, default=7, help="measures of each side of each row")
    parser.add_argument("--photos", type=int, default=100)
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
    for row in args.rows:
        started = time.perf_counter()
        cells.append(measure(row, args))
        logger.info("%s, %.0f s", " | ".join(line(cells[-1])), time.perf_counter() - started)
        if args.output is not None:
            store(args.output, cells[-1:], CELL)
    sys.stdout.write(f"{machine()}, {args.clock} time\n\n{table(HEADER, [line(cell) for cell in cells])}\n")


if __name__ == "__main__":
    main()
