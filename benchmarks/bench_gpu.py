"""What a GPU makes of the towers, a contrastive training step and texts, in five minutes at most.

    python benchmarks/bench_gpu.py --output gpu.json
    python benchmarks/bench_gpu.py --device cpu --tiny                  # the script itself, without a GPU

bfloat16, `bench_towers.py`'s sides and weights; outputs are compared before anything is timed. Times are those of CUDA
events around enough calls to fill a round, after a warm-up, all sides in every round. Every call is also watched for
waits of the host, in two ways. Cells go by importance: what the budget leaves out is named, and so is what failed. A
compiled cell has transformers alone as a peer, as compiling is what takes the time.
"""

import argparse
import contextlib
import importlib.util
import itertools
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from bench_towers import (
    HEADER,
    IMAGE_SIZE,
    PACKAGES,
    PEERS,
    SIZES,
    check_equal,
    embedding,
    is_installed,
    lines,
    make_ours,
    make_transformers,
    sides_of,
)
from dual_encoders import END_TOKEN, MODELS, START_TOKEN, features_of, make_batch
from dual_encoders import check_equal as check_losses
from timing import Ratios, about, interleave, machine, store, table, timed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel

logger = logging.getLogger("bench_gpu")

DTYPE = torch.bfloat16
NARROW = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES["tiny"] = {"patch_size": 56, "projection_dim": 32, **NARROW}
TEXTS = {"tiny": NARROW, "B/16": {}}  # text configs beside the towers that have one here; {} is CLIP's own
BATCHES, TINY_BATCHES = (64, 1, 256), (4, 1, 8)
PROMPT_START, LONGEST_NAME = 5, 8  # tokens: "a photo of a", then a name

# Dense bfloat16 peak with float32 sums, TFLOP/s, by the name that CUDA gives the chip; the first that fits counts.
# NVIDIA's data sheets of each, halved where they count sparsity; 4090: its Ada architecture paper, appendix A. A T4 has
# no bfloat16 units.
PEAKS = {
    "H200": 989.5,
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H100": 989.5,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
}
ROUND_S = 0.03  # seconds of calls between two events: launches take microseconds
WARM_UP = 4  # calls; CUDA graphs are recorded in the second and third
WAITED = "called a synchronizing CUDA operation"  # of torch's sync debug mode
MODES = {"compiled": {"dynamic": False}, "graphs": {"dynamic": False, "mode": "reduce-overhead"}}
COMPILED_PEERS = ["transformers"]
FLASH = "flash_attention_2"
# A compiled cell of a size that is new is taken to last as many times as long as the longest so far.
LARGER = 2

Call = Callable[[], Any]


class Cell(NamedTuple):
    """What is measured. mode: eager or one of MODES. attention: sdpa, flash (torch's own flash kernel alone) or
    flash_attention_2 (the package)."""

    part: str
    size: str
    batch: int
    mode: str = "eager"
    attention: str = "sdpa"


def cells_of(towers: list[str], batches: tuple[int, int, int]) -> list[Cell]:
    """By importance; texts and steps are of the first size."""
    small, (first, one, large) = towers[0], batches
    ordered = [Cell("tower", size, batch) for batch in batches for size in towers]
    ordered += [Cell("step", small, first), Cell("text", small, first), Cell("tower", small, first, "compiled")]
    ordered += [Cell("tower", small, one, "graphs")]
    ordered += [Cell("tower", size, first, "eager", kind) for kind in ("flash", FLASH) for size in towers]
    ordered += [Cell("tower", size, first, "compiled") for size in towers] + [Cell("step", small, first, "compiled")]
    ordered += [Cell("tower", size, one, "graphs") for size in towers] + [Cell("step", small, large)]
    rest = itertools.product(["tower"], towers, batches, ["eager", *MODES], ["sdpa", "flash", FLASH])
    return list(dict.fromkeys([*ordered, *itertools.starmap(Cell, rest)]))


# --- time, waits, peak ---


def seconds_by_events(call: Call, repeats: int) -> float:
    """Seconds of one call, of so many that the device works through without a pause of ours."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / repeats


def on_gpu(args: argparse.Namespace) -> bool:
    return args.device.type == "cuda"


def warmed_up(call: Call, args: argparse.Namespace) -> Callable[[], float]:
    """What measures the call, once."""
    for _ in range(WARM_UP):
        call()
    if not on_gpu(args):
        return timed(call, time.process_time)
    repeats = max(1, round(ROUND_S / seconds_by_events(call, 1)))
    return lambda: seconds_by_events(call, repeats)


def waits_of(call: Call) -> dict[str, int]:
    """How often the host waits in a call: by torch's own warnings, by the calls of CUDA that a profiler sees, and what
    is copied back. The profiler's own end is a wait for the device, which is not counted."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiled:
        call()
    counts = {event.key: event.count for event in profiled.key_averages()}
    return {
        "warnings": sum(WAITED in str(each.message) for each in caught),
        "synchronizations": sum(counts.get(f"cuda{what}Synchronize", 0) for what in ("Stream", "Event")),
        "copies": sum(count for key, count in counts.items() if key.startswith("Memcpy DtoH")),
    }


def peak_of(chip: str) -> float | None:
    """FLOP/s of a chip that is known."""
    return next((peak * 1e12 for name, peak in PEAKS.items() if name in chip), None)


def flops_of(call: Call) -> int:
    """Of matrix products and attention; on a CPU, of matrix products."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


# --- what is measured ---


def kernel_of(attention: str) -> contextlib.AbstractContextManager:
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if attention == "flash" else contextlib.nullcontext()


def compiled(call: Callable, mode: str, args: argparse.Namespace) -> Callable:
    if mode == "eager":
        return call
    return torch.compile(call, backend="aot_eager") if args.tiny else torch.compile(call, **MODES[mode])


def flash_sides(size: str) -> dict[str, Callable]:
    """transformers' and our towers with the package flash_attn."""
    ours = make_ours(size)
    theirs, field = make_transformers(ours, size)
    fast, theirs, ours = ours.optimized(DTYPE), theirs.eval().to(DTYPE), ours.to(DTYPE)
    for model in (theirs, fast, ours):
        model.set_attn_implementation(FLASH)
    return {
        "transformers": embedding(theirs, field),
        "optimized": fast.get_image_features,
        "vit_embed": ours.get_image_features,
    }


def tower(cell: Cell, args: argparse.Namespace) -> tuple[dict[str, Call], dict[str, int]]:
    """Pooled image features: the calls that are timed, and the FLOPs of each."""
    pixels = torch.randn(cell.batch, 3, IMAGE_SIZE, IMAGE_SIZE, device=args.device)
    with torch.device(args.device), torch.inference_mode():
        exact = make_transformers(make_ours(cell.size), cell.size)[0].eval()(pixels).image_embeds
    with torch.device(args.device):
        peers = args.peers if cell.mode == "eager" else COMPILED_PEERS
        sides = flash_sides(cell.size) if cell.attention == FLASH else sides_of(cell.size, DTYPE, peers)
    pixels = pixels.to(DTYPE)
    flops = {name: flops_of(lambda e=embed: e(pixels)) for name, embed in sides.items()}
    sides = {name: compiled(embed, cell.mode, args) for name, embed in sides.items()}

    def call(embed: Callable, pixels: torch.Tensor) -> torch.Tensor:
        if cell.mode == "graphs":
            torch.compiler.cudagraph_mark_step_begin()
        with torch.inference_mode() if cell.mode == "eager" else torch.no_grad(), kernel_of(cell.attention):
            return embed(pixels)

    calls = {name: lambda x, e=embed: call(e, x) for name, embed in sides.items()}
    with torch.no_grad():
        check_equal(str(cell), calls, exact, pixels)
    return {name: lambda c=each: c(pixels) for name, each in calls.items()}, flops


def dual_encoders(size: str, device: torch.device) -> dict[str, torch.nn.Module]:
    """CLIPModel and ours, float32, of one checkpoint."""
    torch.manual_seed(0)
    vision = {"image_size": IMAGE_SIZE, **SIZES[size]}
    text = {"bos_token_id": START_TOKEN, "eos_token_id": END_TOKEN, **TEXTS[size]}
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=vision["projection_dim"])
    names = {"ours": "vit_embed", "theirs": "transformers"}
    with tempfile.TemporaryDirectory() as folder:
        CLIPModel(config).save_pretrained(folder)
        loaded = {
            names[name]: made.from_pretrained(folder, attn_implementation="sdpa") for name, made in MODELS.items()
        }
    return {name: model.to(device) for name, model in loaded.items()}


def step(cell: Cell, args: argparse.Namespace) -> tuple[dict[str, Call], dict[str, int]]:
    """A contrastive training step: float32 weights, bfloat16 autocast, fused AdamW, texts of 77 tokens."""
    batch = {name: value.to(args.device) for name, value in make_batch(cell.batch).items()}
    calls = {}
    for name, model in dual_encoders(cell.size, args.device).items():
        forward = compiled(model.train(), cell.mode, args)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def call(forward=forward, optimizer=optimizer) -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(args.device.type, dtype=DTYPE):
                loss = forward(**batch, return_loss=True).loss
            loss.backward()
            optimizer.step()
            return loss.detach()

        calls[name] = call
    for _ in range(2):  # the second loss is that of weights that a step has changed
        check_losses(str(cell), calls["vit_embed"](), calls["transformers"](), "bf16")
    return calls, {}


def text(cell: Cell, args: argparse.Namespace) -> tuple[dict[str, Call], dict[str, int]]:
    """Prompts that begin alike, padded to 77 tokens or to the longest, and with what they share computed once."""
    ids = make_batch(cell.batch)["input_ids"]
    ids[:, 1:PROMPT_START] = ids[:1, 1:PROMPT_START]
    ends = PROMPT_START + 1 + torch.arange(cell.batch) % LONGEST_NAME
    ids = ids.where(torch.arange(ids.shape[1]) < ends[:, None], END_TOKEN).to(args.device)
    longest = int(ends.max()) + 1
    models = dual_encoders(cell.size, args.device)
    with torch.inference_mode():
        exact = features_of(models["transformers"].eval().get_text_features(ids))
    fast = models["vit_embed"].eval().optimized(DTYPE)
    theirs, ours = (models[name].to(DTYPE) for name in ("transformers", "vit_embed"))
    sides = {
        "transformers": lambda ids: features_of(theirs.get_text_features(ids)),
        "transformers, trimmed": lambda ids: features_of(theirs.get_text_features(ids[:, :longest])),
        "vit_embed": ours.get_text_features,
        "vit_embed, trimmed": lambda ids: ours.get_text_features(ids[:, :longest]),
        "vit_embed, prefixes shared": lambda ids: ours.get_text_features(ids, share_prefixes=True),
        "optimized, trimmed": lambda ids: fast.get_text_features(ids[:, :longest]),
    }
    with torch.inference_mode():
        check_equal(str(cell), sides, exact, ids)
    return {name: torch.inference_mode()(lambda e=embed: e(ids)) for name, embed in sides.items()}, {}


PARTS = {"tower": tower, "step": step, "text": text}


def measure(cell: Cell, args: argparse.Namespace) -> dict:
    """A stored cell: the seconds of every side in every round, its waits, and its share of the chip's peak."""
    torch._dynamo.reset()
    calls, flops = PARTS[cell.part](cell, args)
    seconds = interleave(str(cell), {name: warmed_up(call, args) for name, call in calls.items()}, args.rounds)
    waits = {name: waits_of(call) for name, call in calls.items()} if on_gpu(args) else {}
    peak = peak_of(args.chip)
    shares = {name: count / statistics.median(seconds[name]) / peak for name, count in flops.items()} if peak else {}
    return {**cell._asdict(), "chip": args.chip, "dtype": "bf16", "seconds": seconds, "waits": waits, "peak": shares}


def why_not(cell: Cell, args: argparse.Namespace, longest: dict[tuple[str, str], float], left: float) -> str | None:
    """Why a cell is not measured."""
    if cell.mode == "graphs" and not on_gpu(args):
        return "CUDA graphs need CUDA"
    if cell.attention == FLASH and importlib.util.find_spec("flash_attn") is None:
        return "flash_attn is not installed"
    known = [value for (_, mode), value in longest.items() if mode == cell.mode]
    expected = longest.get((cell.size, cell.mode), LARGER * max(known, default=0))
    return f"{args.budget_s} s are over" if left <= 0 or expected > left else None


def measure_all(cells: Iterable[Cell], args: argparse.Namespace) -> tuple[list[dict], dict[Cell, str], dict[Cell, str]]:
    """What was measured, what was left out, and what failed, with the reason."""
    started, found, left_out, failed = time.monotonic(), [], {}, {}
    longest: dict[tuple[str, str], float] = {}
    packages = [PACKAGES[name] for name in args.peers if is_installed(name)]
    machine_and_versions = about("CUDA events" if on_gpu(args) else "cpu", packages)
    machine_and_versions["machine"] = f"{args.chip}; {machine_and_versions['machine']}"
    for cell in cells:
        began = time.monotonic()
        reason = why_not(cell, args, longest, args.budget_s - (began - started))
        if reason:
            left_out[cell] = reason
            continue
        try:
            found.append({**measure(cell, args), "about": machine_and_versions})
        except Exception as error:  # a GPU is lent for minutes: what else can be measured, is
            logger.exception("%s", cell)
            failed[cell] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            if args.output:
                store(args.output, found[-1:], ("chip", *Cell._fields))
        if on_gpu(args):
            torch.cuda.empty_cache()
        key = (cell.size, cell.mode)
        longest[key] = max(longest.get(key, 0), time.monotonic() - began)
    return found, left_out, failed


# --- tables ---


def waits_in_words(cell: dict, side: str) -> str:
    waits = cell["waits"].get(side)
    return "/".join(map(str, waits.values())) if waits else "-"


def tables_of(cells: list[dict]) -> str:
    """Markdown."""
    towers = [cell for cell in cells if cell["part"] == "tower"]
    named = [{**cell, "mode": f"{cell['mode']}, {cell['attention']}"} for cell in towers]
    rows = []
    for cell, line in zip(towers, lines(named)):
        share = cell["peak"].get("optimized")
        rows.append((*line, "-" if share is None else f"{share:.0%}", waits_in_words(cell, "vit_embed")))
    parts = [table([*HEADER, "share of peak, optimized()", "waits"], rows)]
    for cell in (cell for cell in cells if cell["part"] != "tower"):
        theirs = cell["seconds"]["transformers"]
        rows = []
        for name, values in cell["seconds"].items():
            median, spread, _ = Ratios.of(theirs, values).cells(2)
            milliseconds = f"{statistics.median(values) * 1000:.2f}"
            rows.append((name, milliseconds, f"{median} ({spread})", waits_in_words(cell, name)))
        what = f"{cell['part']}, {cell['size']}, batch {cell['batch']}, {cell['mode']}"
        parts.append(table([what, "ms", "times as fast as transformers", "waits"], rows))
    return "\n\n".join(parts)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny towers and no inductor: whether the script works")
    parser.add_argument("--budget_s", type=float, default=300, help="no cell starts that would end later")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON; a file keeps its other cells")
    args = parser.parse_args()
    if on_gpu(args) and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch sees; --device cpu --tiny tries the script without one")
    if "transformers" not in args.peers:
        parser.error("--peers must name transformers, whose outputs are what the others are held against")
    args.chip = torch.cuda.get_device_name(args.device) if on_gpu(args) else "CPU"
    return args


def main() -> None:
    args = parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    cells = cells_of(["tiny"], TINY_BATCHES) if args.tiny else cells_of(["B/16", "L/14"], BATCHES)
    found, left_out, failed = measure_all(cells, args)
    waits = "waits of the host a call, by warnings / by calls of CUDA / copies back"
    sys.stdout.write(f"{args.chip}; {machine()}; times as fast as the peer; {waits}\n\n{tables_of(found)}\n")
    for what, some in (("left out", left_out), ("failed", failed)):
        for cell, reason in some.items():
            sys.stdout.write(f"\n{what}: {', '.join(map(str, cell))}: {reason}")
    sys.stdout.write("\n")
    if failed:
        sys.exit(f"{len(failed)} cells failed")


if __name__ == "__main__":
    main()
