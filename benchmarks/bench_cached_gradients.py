"""Memory of a contrastive training step against the size of its batch, with and without `contrastive_chunk_size`.

    python benchmarks/bench_cached_gradients.py
    python benchmarks/bench_cached_gradients.py --batch_sizes 256 4096 --chunk_size 16 --picture none.png

A dual encoder of random weights, 32 x 32 pixels and 16 tokens, one forward and backward pass in float32, each in a
fresh fork of a process that has done all imports and computed nothing. Memory is the largest resident memory above that
of model, gradients and batch (Linux only). Time is processor time, of another run. First the gradients of both ways are
compared on the smallest batch.

Needs: `pip install matplotlib tqdm`. Source: arXiv:2101.06983.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from timing import CLOCKS, in_fork, machine, memory_mib, reset_peak, return_freed_memory, table, timed
from tqdm import tqdm

from vit_embed import VitEmbedConfig, VitEmbedForContrastive

logger = logging.getLogger("bench_cached_gradients")

IMAGE_SIZE, NUM_TOKENS = 32, 16
# A small vocabulary: the table's gradient has nothing to do with the batch.
VOCAB_SIZE, START_TOKEN, END_TOKEN = 1000, 998, 999
VISION = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 512}
WAYS = ("whole batch", "in chunks")


def make_model(chunk_size: int | None) -> VitEmbedForContrastive:
    """Image and text tower of 4 layers of 128, 16 patches."""
    torch.manual_seed(0)
    sizes = {**VISION, "projection_dim": 128}
    config = VitEmbedConfig(
        **sizes,
        image_size=IMAGE_SIZE,
        patch_size=8,
        contrastive_chunk_size=chunk_size,
        text_config={
            **sizes,
            "max_position_embeddings": NUM_TOKENS,
            "vocab_size": VOCAB_SIZE,
            "bos_token_id": START_TOKEN,
            "eos_token_id": END_TOKEN,
        },
    )
    return VitEmbedForContrastive(config).train()


def make_batch(batch_size: int) -> dict[str, torch.Tensor]:
    """Noise, and texts that fill their rows: none is trimmed."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, START_TOKEN, (batch_size, NUM_TOKENS), generator=generator)
    ids[:, 0], ids[:, -1] = START_TOKEN, END_TOKEN
    pixels = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return {"pixel_values": pixels, "input_ids": ids}


def measure(way: str, batch_size: int, chunk_size: int, exact_memory: bool) -> dict[str, float]:
    """MiB above model and batch, or seconds of processor time, of one step in this process."""
    if exact_memory:
        return_freed_memory()
    model, batch = make_model(None if way == WAYS[0] else chunk_size), make_batch(batch_size)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # no matter of the batch
    before = memory_mib("VmRSS")
    reset_peak()
    seconds = timed(lambda: model(**batch).loss.backward(), CLOCKS["cpu"])()
    return {"mib": memory_mib("VmHWM") - before} if exact_memory else {"seconds": seconds}


def largest_difference(batch_size: int, chunk_size: int) -> float:
    """Between the gradients of both ways, over the largest entry of them all."""
    gradients = []
    for chunk in (None, chunk_size):
        model = make_model(chunk)
        model(**make_batch(batch_size)).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return float((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max())


def as_table(results: dict[str, list[dict[str, float]]], batch_sizes: list[int]) -> str:
    header = ("batch", *(f"{way}, MiB" for way in WAYS), "times less", *(f"{way}, s" for way in WAYS), "times as long")
    rows = []
    for size, whole, chunked in zip(batch_sizes, *(results[way] for way in WAYS)):
        mib, seconds = ([whole[unit], chunked[unit]] for unit in ("mib", "seconds"))
        memory = (*(f"{value:.0f}" for value in mib), f"{mib[0] / mib[1]:.1f}")
        rows.append((size, *memory, *(f"{value:.1f}" for value in seconds), f"{seconds[1] / seconds[0]:.2f}"))
    return table(header, rows)


def draw(results: dict[str, list[dict[str, float]]], batch_sizes: list[int], chunk_size: int, path: Path) -> None:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    labels = (WAYS[0], f"contrastive_chunk_size={chunk_size}")
    for way, label, colour in zip(WAYS, labels, ("tab:red", "tab:blue")):
        mib = [result["mib"] for result in results[way]]
        axes.plot(batch_sizes, mib, "o-", label=label, color=colour)
        for size, value in zip(batch_sizes, mib):
            axes.annotate(f"{value:.0f}", (size, value), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batch_sizes, [str(size) for size in batch_sizes])
    axes.set_xlabel("batch, pairs")
    axes.set_ylabel("peak memory of a step, MiB")
    axes.set_title("Contrastive training step: memory above model and batch")
    axes.margins(y=0.15)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[64, 128, 256, 512, 1024])
    parser.add_argument("--chunk_size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--picture", type=Path, default=Path(__file__).with_name("cached_gradients.png"))
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    size = min(args.batch_sizes)
    difference = in_fork(largest_difference, size, args.chunk_size)
    logger.info("batch %d: gradients differ by %.1e of the largest", size, difference)
    if difference > 1e-5:
        raise RuntimeError(f"gradients in chunks must be those of the batch, they differ by {difference:.1e}")
    runs = [(way, batch_size) for batch_size in args.batch_sizes for way in WAYS]
    results = {way: [] for way in WAYS}
    for way, batch_size in tqdm(runs, unit="step"):
        parts = [in_fork(measure, way, batch_size, args.chunk_size, exact_memory) for exact_memory in (True, False)]
        results[way].append(parts[0] | parts[1])
    draw(results, args.batch_sizes, args.chunk_size, args.picture)
    sys.stdout.write(
        f"{machine()}, chunk {args.chunk_size}, gradients on a batch of {size} differ by "
        f"{difference:.1e} of the largest\n\n{as_table(results, args.batch_sizes)}\n"
    )


if __name__ == "__main__":
    main()
