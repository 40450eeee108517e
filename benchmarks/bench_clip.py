"""Speed of `VitEmbedForContrastive` against `transformers.CLIPModel` with sdpa, from the same weights.

    python benchmarks/bench_clip.py --part all --rounds 6

Both read one CLIPModel folder of random weights, and their outputs are compared before anything is timed. Every round
measures both: read the ratios, not the times. Loading is measured in a fresh process for each model.
"""

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from timing import (
    CLOCK_HELP,
    CLOCKS,
    Ratios,
    in_fork,
    interleave,
    keep_freed_memory,
    machine,
    table,
    timed,
)
from transformers import CLIPConfig, CLIPModel, PreTrainedModel

from vit_embed import VitEmbedForContrastive

logger = logging.getLogger("bench_clip")

MODELS = {"ours": VitEmbedForContrastive, "theirs": CLIPModel}
PATCH_SIZES = {"ViT-B/32": 32, "ViT-B/16": 16}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
IMAGE_SIZE = 224  # pixels
NUM_TOKENS = 77
START_TOKEN, END_TOKEN = 49406, 49407  # of CLIP's vocabulary
# Largest relative difference between two equal models: sums taken in another order. 2e-2 is a few steps of bf16.
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}

Batch = dict[str, torch.Tensor]
Calls = dict[str, Callable[[], object]]  # for each of MODELS what is to be measured
Row = tuple[str, ...]  # a line of the table
HEADER = ("measured", "vit_embed", "transformers", "ratio", "range of ratios", "ratio of the best")


def save_checkpoint(patch_size: int, folder: Path) -> None:
    """A CLIPModel of base size with random weights: CLIPConfig's defaults, but for the patch and the special tokens."""
    torch.manual_seed(0)
    vision = {"patch_size": patch_size, "image_size": IMAGE_SIZE}
    text = {"bos_token_id": START_TOKEN, "eos_token_id": END_TOKEN}
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text)).save_pretrained(folder)


def load(name: str, folder: Path) -> PreTrainedModel:
    """One of the two models, float32, in eval mode."""
    return MODELS[name].from_pretrained(folder, attn_implementation="sdpa")


def make_batch(batch_size: int, image_size: int = IMAGE_SIZE) -> Batch:
    """Pixels (B, 3, H, W) and token ids (B, 77), every text as long as the model allows: nothing can be trimmed."""
    generator = torch.Generator().manual_seed(1)
    pixel_values = torch.randn(batch_size, 3, image_size, image_size, generator=generator)
    input_ids = torch.randint(1, START_TOKEN, (batch_size, NUM_TOKENS), generator=generator)
    input_ids[:, 0], input_ids[:, -1] = START_TOKEN, END_TOKEN
    return {"pixel_values": pixel_values, "input_ids": input_ids}


def features_of(output) -> torch.Tensor:
    """transformers 5 returns an output object where 4.57 and vit_embed return the tensor (B, projection_dim)."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def check_equal(what: str, ours: torch.Tensor, theirs: torch.Tensor, dtype_name: str) -> None:
    """Raises unless the two agree: a faster wrong answer is not faster."""
    difference = ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
    if not difference <= TOLERANCE[dtype_name]:
        raise RuntimeError(f"{what}: outputs differ by {difference:.1e}, expected {TOLERANCE[dtype_name]:.0e} at most")
    logger.info("%s: outputs agree to %.1e", what, difference)


def make_row(what: str, values: dict[str, list[float]], unit: str, digits: int) -> Row:
    """Medians of both, and their ratios."""
    medians = (f"{statistics.median(values[name]):.{digits}f} {unit}" for name in MODELS)
    return (what, *medians, *Ratios.of(values["ours"], values["theirs"]).cells(3))


def bench_forward(folders: dict[str, Path], args: argparse.Namespace) -> list[Row]:
    """One inference call: `get_image_features`, and `get_text_features` once, as both sizes have one text tower."""
    batch = make_batch(args.batch_size)
    rows = []
    for size, folder in folders.items():
        for dtype_name, dtype in DTYPES.items():
            models = {name: load(name, folder).to(dtype) for name in MODELS}
            towers = {
                "image": {name: lambda m=m: m.get_image_features(batch["pixel_values"]) for name, m in models.items()}
            }
            if size == "ViT-B/32":
                towers["text"] = {
                    name: lambda m=m: m.get_text_features(batch["input_ids"]) for name, m in models.items()
                }
            for tower, calls in towers.items():
                what = f"{tower} features, {size} {dtype_name}"
                with torch.inference_mode():
                    check_equal(what, *(features_of(calls[name]()) for name in MODELS), dtype_name)
                    calls = {name: timed(call, CLOCKS[args.clock]) for name, call in calls.items()}
                    rows.append(make_row(what, interleave(what, calls, args.rounds), "s", 3))
    return rows


def bench_load(folders: dict[str, Path], args: argparse.Namespace) -> list[Row]:
    """`from_pretrained` in new processes, everything imported, the files in the disk cache."""
    size = args.sizes[0]
    seconds = in_process("load", folders[size], args)
    return [make_row(f"from_pretrained, {size}", seconds, "s", 3)]


def in_process(job: str, folder: Path, args: argparse.Namespace, *options: str) -> dict:
    """Runs one of JOBS in a new process and returns its report."""
    command = [sys.executable, __file__, "--job", job, "--folder", str(folder), *options]
    for name in ("threads", "batch_size", "clock", "load_rounds"):
        command += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"the process of --job {job} ended with {done.returncode}; its own error stands above")
    return json.loads(done.stdout.splitlines()[-1])


def job_load(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of loads, each in a fork of this process, which has imported everything and loaded nothing."""
    calls = {name: lambda n=name: in_fork(load_seconds, n, args.folder, args.clock) for name in MODELS}
    for call in calls.values():
        call()  # fills the disk cache
    return interleave("from_pretrained", calls, args.load_rounds)


def load_seconds(name: str, folder: Path, clock: str) -> float:
    return timed(lambda: load(name, folder), CLOCKS[clock])()


PARTS = {"forward": bench_forward, "load": bench_load}
JOBS = {"load": job_load}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--sizes", nargs="+", choices=list(PATCH_SIZES), default=list(PATCH_SIZES))
    parser.add_argument("--rounds", type=int, default=6, help="measures of each model in each row")
    parser.add_argument("--load_rounds", type=int, default=24, help="the same for loading, which is short")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="cpu", help=CLOCK_HELP)
    for_processes = parser.add_argument_group("for the processes that this script starts")
    for_processes.add_argument("--job", choices=list(JOBS))
    for_processes.add_argument("--folder", type=Path)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    if args.job:
        sys.stdout.write(json.dumps(JOBS[args.job](args)) + "\n")
        return
    keep_freed_memory()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    rows = []
    with tempfile.TemporaryDirectory() as root:
        folders = {size: Path(root, f"patch{PATCH_SIZES[size]}") for size in args.sizes}
        for size, folder in folders.items():
            save_checkpoint(PATCH_SIZES[size], folder)
        for part in PARTS if args.part == "all" else [args.part]:
            rows += PARTS[part](folders, args)
    sys.stdout.write(f"{machine()}, batch {args.batch_size}, {args.clock} time\n\n{table(HEADER, rows)}\n")


if __name__ == "__main__":
    main()
