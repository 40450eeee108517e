"""Speed of having fewer tokens: merging at inference, dropping in training, and the adaptive stem, on ViT-B/16.

    python benchmarks/bench_tokens.py --rounds 6
    python benchmarks/bench_tokens.py --part merge --dtypes bf16

Each row holds one model against itself with the field set (the adaptive stem: against `conv` on the same trunk), random
weights, 224 x 224 pixels. Every round measures both, in an order that is swapped from round to round: read the ratios,
not the times. Before anything is timed the tokens of both are counted.
"""

import argparse
import logging
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from bench_training import forward_backward
from dual_encoders import DTYPES, END_TOKEN, IMAGE_SIZE, NUM_TOKENS, START_TOKEN, Batch, make_batch
from timing import CLOCK_HELP, CLOCKS, Ratios, interleave, keep_freed_memory, machine, table, timed
from torch import nn

from vit_embed import VitEmbedConfig, VitEmbedForContrastive
from vit_embed.tokens_vit_embed import TokenLayout, match_tokens, merge_tokens

logger = logging.getLogger("bench_tokens")

MERGE_SIZE = 13  # arXiv:2210.09461 table 1: the most that ViT-B/16 at 224 pixels merges with little loss
DROP_RATE = 0.5  # arXiv:2212.00794
TARGETS = {"merge": 1.5, "drop": 1.6}
# Ids of a caption such as "two dogs run over a meadow", with both ends.
CAPTION_TOKENS = (5, 12)
# Shares of 2 x 2 cells of each image that show one flat colour.
FLAT_SHARES = {
    "no flat cell": (0.0,),
    "half flat": (0.5,),
    "all flat": (1.0,),
    "none to all flat": (0.0, 0.25, 0.5, 1.0),
}
GATE_STEPS = 100


class Row(NamedTuple):
    """One line of the table: tokens after the prefix in and out of the encoder, and seconds of each round."""

    what: str
    tokens: str
    without: list[float]
    with_it: list[float]
    target: float | None

    def cells(self) -> tuple[str, ...]:
        medians = (f"{statistics.median(values):.3f} s" for values in (self.without, self.with_it))
        target = "" if self.target is None else f"{self.target:.1f}"
        return (self.what, self.tokens, *medians, *Ratios.of(self.without, self.with_it).cells(2), target)


def measure(what: str, calls: dict[str, Callable], tokens: str, target: float | None, args: argparse.Namespace) -> Row:
    """Times `calls`, "without" and "with_it", which have run once before."""
    clocked = {name: timed(call, CLOCKS[args.clock]) for name, call in calls.items()}
    row = Row(what, tokens, **interleave(what, clocked, args.rounds), target=target)
    logger.info("%s", " | ".join(row.cells()))
    return row


def make_model(**fields) -> VitEmbedForContrastive:
    """CLIP ViT-B/16, the defaults of the config, random weights, in eval mode."""
    torch.manual_seed(0)
    config = VitEmbedConfig(image_size=IMAGE_SIZE, text_config={}, **fields)
    return VitEmbedForContrastive._from_config(config, attn_implementation="sdpa").eval()


def with_field(model: VitEmbedForContrastive, name: str, value: float, call: Callable) -> Callable[[], object]:
    """A call with a field of the model's config at `value`, so that both sides of a row share one set of weights."""

    def run():
        setattr(model.config, name, value)
        return call()

    return run


def count_tokens(model: VitEmbedForContrastive, call: Callable[[], object]) -> list[int]:
    """Tokens after the prefix that the attention of each layer sees during a call."""
    counts, num_prefix = [], model.config.num_prefix_tokens
    hooks = [
        layer.self_attn.register_forward_pre_hook(lambda _, inputs: counts.append(inputs[0].shape[1] - num_prefix))
        for layer in model.vision_model.encoder.layers
    ]
    call()
    for hook in hooks:
        hook.remove()
    return counts


def expect_tokens(what: str, found: list[int], expected: list[int]) -> str:
    """Raises unless a call had the tokens that it should have had, layer by layer; else says how many."""
    if found != expected:
        raise RuntimeError(f"{what}: {found} tokens by layer, expected {expected}")
    return str(found[0]) if found[0] == found[-1] else f"{found[0]} to {found[-1]}"


def bench_merge(args: argparse.Namespace) -> list[Row]:
    """`get_image_features` with and without `token_merge_size`."""
    pixel_values = make_batch(args.batch_size)["pixel_values"]
    model, rows = make_model(), []
    get_features = partial(model.get_image_features, pixel_values)
    num_patches, layers = (IMAGE_SIZE // model.config.patch_size) ** 2, range(model.config.num_hidden_layers)
    for dtype_name in args.dtypes:
        model.to(DTYPES[dtype_name])
        with torch.inference_mode():
            calls = {
                name: with_field(model, "token_merge_size", size, get_features)
                for name, size in (("without", 0), ("with_it", MERGE_SIZE))
            }
            what = f"image features, token_merge_size={MERGE_SIZE}, {dtype_name}"
            expect_tokens(what, count_tokens(model, calls["without"]), [num_patches for _ in layers])
            found = count_tokens(model, calls["with_it"])
            tokens = expect_tokens(what, found, [num_patches - MERGE_SIZE * i for i in layers])
            rows.append(measure(what, calls, tokens, TARGETS["merge"], args))
    return rows


def bench_matching(args: argparse.Namespace) -> list[Row]:
    """What merging itself costs: matching and merging of the keys and tokens of all layers, against image features."""
    pixel_values = make_batch(args.batch_size)["pixel_values"]
    model, rows = make_model(token_merge_size=MERGE_SIZE), []
    config = model.config
    num_patches = (IMAGE_SIZE // config.patch_size) ** 2
    counts = [num_patches - MERGE_SIZE * i for i in range(config.num_hidden_layers - 1)]  # the last layer merges none
    for dtype_name in args.dtypes:
        dtype = DTYPES[dtype_name]
        model.to(dtype)
        heads, head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        # Heads last but one, as the projections give them.
        keys = [torch.randn(args.batch_size, n, heads, head_dim, dtype=dtype).transpose(1, 2) for n in counts]
        states = [torch.randn(args.batch_size, n, config.hidden_size, dtype=dtype) for n in counts]
        sizes = [torch.ones(args.batch_size, n) for n in counts]

        def merge_all(keys=keys, states=states, sizes=sizes):
            for key, tokens, size in zip(keys, states, sizes):
                merge_tokens(tokens, TokenLayout(None, size), match_tokens(key.mean(dim=1), MERGE_SIZE))

        with torch.inference_mode():
            calls = {"without": partial(model.get_image_features, pixel_values), "with_it": merge_all}
            for call in calls.values():
                call()
            what = f"image features against their matching and merging alone, {dtype_name}"
            rows.append(measure(what, calls, f"{counts[0]} to {counts[-1]}", None, args))
    return rows


def caption_ids(batch_size: int) -> torch.Tensor:
    """(B, 12) ids of captions of CAPTION_TOKENS, padded with end tokens as CLIP's tokenizer does."""
    generator = torch.Generator().manual_seed(2)
    shortest, longest = CAPTION_TOKENS
    ids = torch.randint(1, START_TOKEN, (batch_size, longest), generator=generator)
    ids[:, 0] = START_TOKEN
    for row in range(batch_size):
        ids[row, shortest - 1 + row % (longest - shortest + 1) :] = END_TOKEN
    return ids


def training_step(
    model: VitEmbedForContrastive, optimizer: torch.optim.Optimizer, batch: Batch, dtype_name: str
) -> torch.Tensor:
    loss = forward_backward(model, batch, dtype_name)
    optimizer.step()
    return loss


def bench_drop(args: argparse.Namespace) -> list[Row]:
    """A contrastive training step, forward, backward and AdamW, with and without `patch_drop_rate`."""
    batch = make_batch(args.batch_size)
    texts = {
        f"captions of {CAPTION_TOKENS[0]} - {CAPTION_TOKENS[1]} tokens": caption_ids(args.batch_size),
        f"texts of {NUM_TOKENS} tokens": batch["input_ids"],
    }
    model, rows = make_model().train(), []
    num_patches, num_layers = (IMAGE_SIZE // model.config.patch_size) ** 2, model.config.num_hidden_layers
    # A rate of learning at which the weights keep their size: what is timed does not depend on it.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    for dtype_name in args.dtypes:
        for text, input_ids in texts.items():
            inputs = {**batch, "input_ids": input_ids}
            step = partial(training_step, model, optimizer, inputs, dtype_name)
            calls = {
                name: with_field(model, "patch_drop_rate", rate, step)
                for name, rate in (("without", 0.0), ("with_it", DROP_RATE))
            }
            what = f"training step, patch_drop_rate={DROP_RATE}, {text}, {dtype_name}"
            expect_tokens(what, count_tokens(model, calls["without"]), [num_patches] * num_layers)
            left = num_patches - int(num_patches * DROP_RATE)
            tokens = expect_tokens(what, count_tokens(model, calls["with_it"]), [left] * num_layers)
            rows.append(measure(what, calls, tokens, TARGETS["drop"], args))
    return rows


def flat_images(
    shares: tuple[float, ...], batch_size: int, cell: int, image_size: int = IMAGE_SIZE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise in which a share of the cells of `cell` pixels, from the top left on, shows one random colour an image.

    Returns:
        (B, 3, H, W), and which cells are flat (B, rows, columns).
    """
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(batch_size, 3, image_size, image_size, generator=generator)
    colours = torch.randn(batch_size, 3, 1, 1, generator=generator)
    side = image_size // cell
    place = torch.arange(side * side).reshape(side, side)
    is_flat = torch.stack([place < round(shares[i % len(shares)] * side * side) for i in range(batch_size)])
    flat_pixels = is_flat.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, None]
    return torch.where(flat_pixels, colours, images), is_flat


def teach_gate(stem: nn.Module, cell: int) -> None:
    """Trains the gate alone to make flat cells coarse and all others fine, which a trained model's may come to."""
    images, is_flat = flat_images((0.0, 0.25, 0.5, 1.0), 64, cell)
    with torch.no_grad():
        coarse = stem.coarse(images).permute(0, 2, 3, 1)  # (B, rows, columns, D)
    optimizer = torch.optim.Adam(stem.gate.parameters(), lr=1e-2)
    for _ in range(GATE_STEPS):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(stem.gate(coarse).flatten(0, 2), is_flat.long().flatten())
        loss.backward()
        optimizer.step()
    logger.info("the gate separates flat cells: loss %.1e after %d steps", loss.item(), GATE_STEPS)


def bench_adaptive(args: argparse.Namespace) -> list[Row]:
    """`get_image_features` of the adaptive stem against the `conv` stem's, on images with more and less to see."""
    models = {"without": make_model(), "with_it": make_model(stem_type="adaptive")}
    adaptive, rows = models["with_it"], []
    cell = 2 * adaptive.config.patch_size
    teach_gate(adaptive.vision_model.embeddings.patch_embedding, cell)
    for dtype_name in args.dtypes:
        for model in models.values():
            model.to(DTYPES[dtype_name])
        for name, shares in FLAT_SHARES.items():
            images, _ = flat_images(shares, args.batch_size, cell)
            with torch.inference_mode():
                places = adaptive.vision_model.get_token_map(images).flatten(1)
                counts = (places.amax(dim=1) + 1).tolist()
                calls = {side: partial(m.get_image_features, images) for side, m in models.items()}
                for call in calls.values():
                    call()
                low, high, mean = min(counts), max(counts), statistics.mean(counts)
                tokens = str(low) if low == high else f"{low} - {high}, mean {mean:.0f}"
                what = f"image features, stem_type='adaptive', {name}, {dtype_name}"
                rows.append(measure(what, calls, tokens, None, args))
    return rows


PARTS = {"merge": bench_merge, "matching": bench_matching, "drop": bench_drop, "adaptive": bench_adaptive}


HEADER = ("measured", "tokens", "without", "with", "times as fast", "range", "of the best", "asked for")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=[*PARTS, "all"], default=["all"])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=6, help="measures of each side of each row")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="cpu", help=CLOCK_HELP)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parts = PARTS if "all" in args.part else args.part
    rows = [row for part in parts for row in PARTS[part](args)]
    sys.stdout.write(
        f"{machine()}, batch {args.batch_size}, {args.clock} time\n\n{table(HEADER, [row.cells() for row in rows])}\n"
    )


if __name__ == "__main__":
    main()
