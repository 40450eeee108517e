"""Pooled image features of ViT towers: vit_embed, its `optimized()` copy, and transformers with sdpa, of equal weights.

    python benchmarks/bench_towers.py --output towers.json
    python benchmarks/bench_towers.py --modes compiled --sizes B/32 B/16 --batches 16 --output compiled.json
    python benchmarks/bench_towers.py --peers transformers open_clip timm      # where those are installed
    python benchmarks/bench_towers.py --shares --sizes B/16 --dtypes bf16 --batches 16        # where the time goes
    python benchmarks/bench_towers.py --products --modes compiled --sizes B/16 --batches 16   # share of products' rate

Every round measures every side. Before anything is timed the outputs are compared: in float32 with transformers', in
bfloat16 each side's distance to the float32 result with that of transformers. A file keeps its other cells.
"""

import argparse
import importlib.util
import itertools
import logging
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from timing import CLOCK_HELP, CLOCKS, Ratios, about, interleave, keep_freed_memory, machine, store, table, timed
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import vit_embed

logger = logging.getLogger("bench_towers")

SMALL = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
HUGE = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
SIZES = {
    "B/32": {"patch_size": 32, "projection_dim": 512},
    "B/16": {"patch_size": 16, "projection_dim": 512},
    "L/14": {"patch_size": 14, "projection_dim": 768, **LARGE},
    "S/16": {"patch_size": 16, "projection_dim": 384, **SMALL},
    "L/16": {"patch_size": 16, "projection_dim": 768, **LARGE},
    "H/16": {"patch_size": 16, "projection_dim": 1024, **HUGE},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
IMAGE_SIZE = 224  # pixels
TOLERANCE = 1e-5  # of float32, relative: sums taken in another order
# Of bfloat16: a side's distance to float32 over that of transformers. Both round as often, not at the same places.
BF16_TOLERANCE = 1.1

# What tells a stored cell from another.
SETTINGS = ("freezing", "keep_freed_memory")
CELL = ("size", "dtype", "batch", "mode", *SETTINGS)
PACKAGES = {"transformers": "transformers", "open_clip": "open_clip_torch", "timm": "timm"}

Embed = Callable[[torch.Tensor], torch.Tensor]


def make_ours(size: str, image_size: int = IMAGE_SIZE) -> vit_embed.VitEmbedModelWithProjection:
    """Random weights, float32."""
    torch.manual_seed(0)
    config = vit_embed.VitEmbedConfig(image_size=image_size, **SIZES[size])
    return vit_embed.VitEmbedModelWithProjection(config).eval()


def make_transformers(ours: vit_embed.VitEmbedModelWithProjection, size: str) -> tuple[torch.nn.Module, str]:
    config = CLIPVisionConfig(image_size=ours.config.image_size, **SIZES[size])
    model = CLIPVisionModelWithProjection._from_config(config, attn_implementation="sdpa")
    model.load_state_dict(ours.state_dict())
    return model, "image_embeds"


def make_open_clip(ours: vit_embed.VitEmbedModelWithProjection, size: str) -> tuple[torch.nn.Module, str]:
    """Its CLIP class, with a text tower of one layer that no call reaches."""
    import open_clip

    from vit_embed.conversion.layouts.open_clip import LAYOUT

    config = vit_embed.VitEmbedConfig(**{**ours.config.to_dict(), "text_config": {"num_hidden_layers": 1}})
    config.architectures = ["VitEmbedForContrastive"]
    dual = vit_embed.VitEmbedForContrastive(config)
    dual.load_state_dict(ours.state_dict(), strict=False)
    restored = LAYOUT.restore(config, dual.state_dict())
    model = open_clip.model.CLIP(**restored.files["open_clip_config.json"]["model_cfg"])
    model.load_state_dict(restored.state_dict)
    return model.visual, ""


def make_timm(ours: vit_embed.VitEmbedModelWithProjection, size: str) -> tuple[torch.nn.Module, str]:
    import timm

    from vit_embed.conversion.layouts.timm import LAYOUT

    ours.config.architectures = [type(ours).__name__]
    restored = LAYOUT.restore(ours.config, ours.state_dict())
    described = restored.files["config.json"]
    sizes = {"num_classes": ours.config.projection_dim, **described.get("model_args", {})}
    model = timm.create_model(described["architecture"], **sizes)
    model.load_state_dict(restored.state_dict)
    return model, ""


PEERS = {"transformers": make_transformers, "open_clip": make_open_clip, "timm": make_timm}


def is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def embedding(module: torch.nn.Module, field: str) -> Embed:
    """A call of another package's tower: its output, or a field of it."""
    return lambda pixels: module(pixels)[field] if field else module(pixels)


def sides_of(size: str, dtype: torch.dtype, peers: list[str], image_size: int = IMAGE_SIZE) -> dict[str, Embed]:
    """What is compared, each (B, 3, H, W) -> (B, projection_dim). Peers that are not installed are left out."""
    ours = make_ours(size, image_size)
    sides = {}
    for name in peers:
        try:
            module, field = PEERS[name](ours, size)
        except ImportError as error:
            logger.warning("%s is left out: %s", name, error)
            continue
        sides[name] = embedding(module.eval().requires_grad_(False).to(dtype), field)
    sides["optimized"] = ours.optimized(dtype).get_image_features
    sides["vit_embed"] = ours.to(dtype).get_image_features
    return sides


def error_of(embed: Embed, exact: torch.Tensor, pixels: torch.Tensor) -> float:
    """The relative distance of a side's output to the float32 result."""
    return ((embed(pixels).float() - exact).norm() / exact.norm()).item()


def check_equal(
    what: str, sides: dict[str, Embed], exact: torch.Tensor, pixels: torch.Tensor, of_peer: float | None = None
) -> dict[str, float]:
    """`error_of` each side.

    Args:
        of_peer: what transformers is off in bfloat16; that of its side by default.

    Raises:
        RuntimeError: a side is further from the float32 result than rounding explains.
    """
    errors = {name: error_of(embed, exact, pixels) for name, embed in sides.items()}
    allowed = TOLERANCE if pixels.dtype == torch.float32 else BF16_TOLERANCE * (of_peer or errors["transformers"])
    wrong = {name: error for name, error in errors.items() if not error <= allowed}
    if wrong:
        raise RuntimeError(f"{what}: expected a distance to float32 of {allowed:.1e} at most, got {wrong}")
    logger.info("%s: distance to float32 %s", what, {name: f"{error:.1e}" for name, error in errors.items()})
    return errors


def products_alone(config: vit_embed.VitEmbedConfig, batch: int, dtype: torch.dtype) -> Callable[[], None]:
    """The matrix products that a tower of ours makes of all tokens, one after the other, and nothing else: patches,
    layers, and of the last layer, which is read at one row an image, keys and values."""
    gh, gw = config.grid_size
    width, inner, tokens = config.hidden_size, config.intermediate_size, batch * (gh * gw + 1)
    layer = [(width, 3 * width), (width, width), (width, inner), (inner, width)]
    patches = [(config.num_channels * config.patch_size**2, width)]
    sizes = patches + layer * (config.num_hidden_layers - 1) + [(width, 2 * width)]
    pairs = [(torch.randn(tokens, wide, dtype=dtype), torch.randn(out, wide, dtype=dtype)) for wide, out in sizes]

    def multiply() -> None:
        for states, weight in pairs:
            torch.nn.functional.linear(states, weight)

    return multiply


def measure(size: str, dtype_name: str, batch: int, mode: str, args: argparse.Namespace) -> dict:
    """One cell: the seconds of every side in every round."""
    dtype, what = DTYPES[dtype_name], f"{size} {dtype_name}, batch {batch}, {mode}"
    pixels = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        exact = PEERS["transformers"](make_ours(size), size)[0].eval()(pixels).image_embeds
    sides = sides_of(size, dtype, args.peers)
    # Compiled sides round less often than eager ones, each at other places: they are held against the eager peer.
    with torch.inference_mode():
        of_peer = error_of(sides["transformers"], exact, pixels.to(dtype))
    if mode == "compiled":
        torch._dynamo.reset()
        torch._inductor.config.freezing = args.freezing
        sides = {name: torch.compile(embed) for name, embed in sides.items()}
    pixels = pixels.to(dtype)
    with torch.inference_mode() if mode == "eager" else torch.no_grad():
        errors = check_equal(what, sides, exact, pixels, of_peer)
        clock = CLOCKS[args.clock]
        calls = {name: timed(lambda e=embed: e(pixels), clock) for name, embed in sides.items()}
        if args.products:
            calls["products alone"] = timed(products_alone(make_ours(size).config, batch, dtype), clock)
        rounds = args.large_rounds if size == "L/14" and batch > 1 else args.rounds
        seconds = interleave(what, calls, rounds)
    products = {"products": seconds.pop("products alone")} if args.products else {}
    cell = {"size": size, "dtype": dtype_name, "batch": batch, "mode": mode, "seconds": seconds, "errors": errors}
    return {**cell, **products}


# What a pass of a tower is made of, by the names of torch's operations. What is copied are biases, into the output
# before the product is added to it, and pixels into patches.
SHARES = {
    "matrix products": ("aten::addmm", "aten::mm", "aten::mkldnn_convolution"),
    "copies": ("aten::copy_",),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",),
    "activation": ("aten::mul", "aten::mul_", "aten::sigmoid", "aten::sigmoid_", "aten::silu_"),
    "norms": ("aten::native_layer_norm",),
    "residual sums": ("aten::add",),
}


def shares_of(embed: Embed, pixels: torch.Tensor) -> dict[str, float]:
    """The share of each of SHARES in the time of a pass, and of the rest."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        embed(pixels)
    spent = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    total = sum(spent.values())
    shares = {part: sum(spent.get(name, 0) for name in names) / total for part, names in SHARES.items()}
    return {**shares, "rest": 1 - sum(shares.values())}


def share_lines(size: str, dtype_name: str, batch: int, args: argparse.Namespace) -> list[tuple[str, ...]]:
    """Of each part: its median share on every side."""
    pixels = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE).to(DTYPES[dtype_name])
    with torch.inference_mode():
        sides = sides_of(size, DTYPES[dtype_name], args.peers)
        calls = {name: lambda e=embed: shares_of(e, pixels) for name, embed in sides.items()}
        found = interleave(f"{size} {dtype_name}, batch {batch}, shares", calls, args.rounds)
    medians = [
        [statistics.median(each[part] for each in found[name]) for name in sides] for part in found["optimized"][0]
    ]
    rows = zip(found["optimized"][0], medians)
    return [("share of time", *sides), *((part, *(f"{share:.0%}" for share in row)) for part, row in rows)]


HEADER = (
    *("pooled image features", "fastest peer", "vit_embed", "optimized()", "images/s, optimized()"),
    *("products / optimized()", "rounds"),
)


def lines(cells: list[dict]) -> list[tuple[str, ...]]:
    """How many times as fast as the fastest peer each of our sides is, median and range over the rounds; and, if
    measured, which share of the copy's time its matrix products alone take."""
    result = []
    for cell in cells:
        seconds = cell["seconds"]
        peers = [name for name in seconds if name in PEERS]
        fastest = min(peers, key=lambda name: statistics.median(seconds[name]))
        ratios = {name: Ratios.of(seconds[fastest], seconds[name]) for name in ("vit_embed", "optimized")}
        spans = (f"{r.median:.2f} ({r.lowest:.2f} - {r.highest:.2f})" for r in ratios.values())
        what = f"{cell['size']} {cell['dtype']}, batch {cell['batch']}, {cell['mode']}"
        rate = cell["batch"] / statistics.median(seconds["optimized"])
        products = cell.get("products")
        share = f"{Ratios.of(products, seconds['optimized']).median:.2f}" if products else ""
        result.append((what, fastest, *spans, f"{rate:.1f}", share, str(len(seconds[fastest]))))
    return result


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["B/32", "B/16", "L/14"])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager"])
    parser.add_argument("--freezing", action="store_true", help="inductor holds weights as constants, for all sides")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=["transformers"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--large_rounds", type=int, default=3, help="the same for more than one image of L/14")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="cpu", help=CLOCK_HELP)
    parser.add_argument("--output", type=Path, help="JSON that a chart can be drawn of")
    parser.add_argument("--shares", action="store_true", help="in place of times what each is spent on, eager")
    parser.add_argument("--products", action="store_true", help="beside the sides, their matrix products alone")
    parser.add_argument("--keep_freed_memory", action="store_true", help="malloc keeps what was freed, as a server may")
    args = parser.parse_args()
    if "transformers" not in args.peers:
        parser.error("--peers must name transformers, whose outputs are what the others are held against")
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if args.keep_freed_memory:
        keep_freed_memory()
    installed = [PACKAGES[name] for name in args.peers if is_installed(name)]
    settings = {name: getattr(args, name) for name in SETTINGS}
    if args.shares:
        for cell in itertools.product(args.sizes, args.dtypes, args.batches):
            header, *rows = share_lines(*cell, args)
            sys.stdout.write(f"{cell}: {machine()}\n\n{table(header, rows)}\n\n")
        return
    cells = []
    for size in args.sizes:
        for dtype_name in args.dtypes:
            for batch in args.batches:
                for mode in args.modes:
                    cell = measure(size, dtype_name, batch, mode, args)
                    cells.append({**cell, **settings, "about": about(args.clock, installed)})
                    if args.output:
                        store(args.output, cells[-1:], CELL)
    sys.stdout.write(f"{machine()}, {args.clock} time; times as fast as the peer\n\n{table(HEADER, lines(cells))}\n")


if __name__ == "__main__":
    main()
