"""What is lossy beside `model.optimized()`: token merging and int8 weights; speed, size, and what accuracy they cost.

    python benchmarks/bench_lossy.py --vit vit-s14 --emoji data/emoji --icons data/icons --json benchmarks/lossy.json
    python benchmarks/charts.py lossy

Two trained models: the icon checkpoint, and a folder of a trained tower (`--vit`, docs/convert.md makes one).
Speed: pooled image features, every side in every round; before anything is timed each side's vectors are compared
with those of the float32 model. Accuracy: the icon checkpoint finds held-out drawings by their names (`--icons`,
which examples/data/build_icon_dataset.py makes); the tower finds Noto's drawing of an emoji by Twemoji's (`--emoji`,
of build_emoji_dataset.py); and vectors of photos are compared. torchao's sides run where torchao is installed.
"""

import argparse
import importlib.util
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from timing import CLOCK_HELP, CLOCKS, MIB, Ratios, about, interleave, keep_freed_memory, machine, store, table, timed
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel, AutoProcessor

import vit_embed
from vit_embed.retrieval.pictures import as_rgb

REPO = Path(vit_embed.__file__).resolve().parent
sys.path[1:1] = [str(REPO / "examples"), str(REPO / "tests" / "support")]

from recipes.retrieval import caption_id, recalls  # noqa: E402

logger = logging.getLogger("bench_lossy")

BATCHES = {"icon checkpoint": 64, "ViT-S/14": 16}
IMAGE_SIZE = 224  # pixels, of the tower; the icon checkpoint has its own
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "china", "flower", "motorcycle", "retina", "hubble_deep_field")
ICON_SPLITS = ("test", "test_emoji")
BANK, QUERIES = "noto", "twemoji"
CELL = ("model", "part", "batch")
BASE = "float32"  # the side that the others are held against
# The least cosine with the float32 model's vectors of the pictures that are timed. Less is no loss but a fault.
FLOORS = {BASE: 1 - 1e-5, "bfloat16": 0.995, "int8": 0.95, "merging": 0.7}


class Side(NamedTuple):
    """A model and the dtype of the pixels that it is given."""

    model: torch.nn.Module
    dtype: torch.dtype


def torch_int8(model: torch.nn.Module, engine: str = "onednn") -> torch.nn.Module:
    """Its linear layers by torch: int8 weights, a scale for each output, and inputs rounded as they come."""
    kept = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine  # for whose kernel the weights are packed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torchao is to take its place
            scheme = torch.ao.quantization.per_channel_dynamic_qconfig
            return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear: scheme})
    finally:
        torch.backends.quantized.engine = kept


def torchao_int8(model: torch.nn.Module, scheme: str) -> torch.nn.Module:
    from torchao import quantization

    quantization.quantize_(model, getattr(quantization, scheme)())
    return model


def merge_sizes(config) -> list[int]:
    """A thirty-second and a sixteenth of the patches a layer, at least 1 and 2."""
    gh, gw = config.grid_size
    return [max(1, gh * gw // 32), max(2, gh * gw // 16)]


def sides_of(load: Callable[..., torch.nn.Module]) -> dict[str, Side]:
    """{name: side}, all of them copies of the model that `load(**fields of its config)` gives."""
    fp32, bf16 = torch.float32, torch.bfloat16
    sides = {BASE: Side(load().optimized(), fp32), "bfloat16": Side(load().optimized(bf16), bf16)}
    sides["int8, torch"] = Side(torch_int8(load().optimized()), fp32)
    if importlib.util.find_spec("torchao") is None:
        logger.warning("torchao is not installed: its sides are left out")
    else:
        for dtype, name in ((fp32, "float32"), (bf16, "bfloat16")):
            weights = torchao_int8(load().optimized(dtype), "Int8WeightOnlyConfig")
            both = torchao_int8(load().optimized(dtype), "Int8DynamicActivationInt8WeightConfig")
            sides[f"int8 weights, torchao, {name}"] = Side(weights, dtype)
            sides[f"int8 weights and inputs, torchao, {name}"] = Side(both, dtype)
    for size in merge_sizes(load().config):
        merging = load(token_merge_size=size)
        sides[f"merging {size}, float32"] = Side(merging.optimized(), fp32)
        sides[f"merging {size}, bfloat16"] = Side(merging.optimized(bf16), bf16)
    sides[f"merging {size}, int8, torch"] = Side(torch_int8(merging.optimized()), fp32)
    return sides


def features(side: Side, pixels: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) -> (B, D): image features where the model has them, else the pooled vector."""
    pixels = pixels.to(side.dtype)
    if hasattr(side.model, "get_image_features"):
        return side.model.get_image_features(pixels)
    return side.model(pixels).pooler_output


def weight_mib(model: torch.nn.Module) -> float:
    """What the state dict takes in a file: packed weights have no size of their own to ask for."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.getbuffer().nbytes / MIB


def check_near(what: str, sides: dict[str, Side], exact: torch.Tensor, pixels: torch.Tensor) -> None:
    """Raises RuntimeError for a side whose vectors are further from the float32 model's (B, D) than it may lose."""
    for name, side in sides.items():
        cosine = F.cosine_similarity(features(side, pixels).float(), exact).min().item()
        floor = min(floor for kind, floor in FLOORS.items() if kind in name)
        logger.info("%s, %s: least cosine %.5f", what, name, cosine)
        if not cosine >= floor:
            raise RuntimeError(f"{what}, {name}: expected a least cosine of {floor} with float32, got {cosine:.4f}")


def bench_speed(name: str, load: Callable, pictures: list, args: argparse.Namespace) -> list[dict]:
    """Seconds of each round, and the size of the weights."""
    pixels = read(load.processor, pictures)
    cells = []
    with torch.inference_mode():
        sides = sides_of(load)
        for batch in sorted({1, args.batch or BATCHES[name]}):
            given = pixels[torch.arange(batch) % len(pixels)]
            what = f"{name}, batch {batch}"
            check_near(what, sides, features(Side(load(), torch.float32), given), given)
            clock = CLOCKS[args.clock]
            calls = {side: timed(partial(features, each, given.to(each.dtype)), clock) for side, each in sides.items()}
            cell = {"model": name, "part": "speed", "batch": batch, "seconds": interleave(what, calls, args.rounds)}
            cells.append({**cell, "mib": {side: weight_mib(each.model) for side, each in sides.items()}})
    return cells


def read(processor, pictures: Iterable) -> torch.Tensor:
    return processor([as_rgb(picture) for picture in pictures], return_tensors="pt").pixel_values


def embed(side: Side, processor, pictures: list, batch: int = 32) -> torch.Tensor:
    """(pictures, D), unit length, float32."""
    parts = [
        features(side, read(processor, pictures[start : start + batch])) for start in range(0, len(pictures), batch)
    ]
    return F.normalize(torch.cat(parts).float(), dim=-1)


def with_error(value: float, count: int) -> list[float]:
    """A share and its standard error."""
    return [value, (value * (1 - value) / count) ** 0.5]


def icon_figures(side: Side, load: Callable, args: argparse.Namespace) -> dict[str, list[float]]:
    """The share of names whose drawing is found first, among those of the split."""
    from datasets import load_from_disk

    from recipes.embedding import embed_texts

    figures = {}
    for split in ICON_SPLITS:
        rows = load_from_disk(args.icons)[split]
        ids = np.array(list(map(caption_id, rows["name"][:])))
        texts = embed_texts(side.model, load.tokenizer, rows["name"][:], truncate=True)
        pictures = embed(side, load.processor, rows["image"][:])
        figures[f"R@1 {split}"] = with_error(recalls((texts @ pictures.T).numpy(), ids, ids)[0], len(rows))
    return figures


def emoji_pairs(args: argparse.Namespace) -> tuple[list, list]:
    """Drawings of the same emoji by two vendors, in the same order, spread evenly over them."""
    from datasets import load_from_disk

    dataset = load_from_disk(args.emoji)
    by_vendor = {}
    for vendor, split in ((BANK, "train"), (QUERIES, "test")):
        rows = dataset[split].filter(lambda each, vendor=vendor: each == vendor, input_columns="vendor")
        by_vendor[vendor] = {key: (rows, place) for place, key in enumerate(rows["codepoints"][:])}
    both = sorted(by_vendor[BANK].keys() & by_vendor[QUERIES].keys())
    chosen = both[:: max(1, len(both) // args.pictures)][: args.pictures] if args.pictures else both
    return tuple(
        [rows[place]["image"] for rows, place in map(by_vendor[v].__getitem__, chosen)] for v in (BANK, QUERIES)
    )


def emoji_figures(side: Side, load: Callable, pairs: tuple[list, list]) -> dict[str, list[float]]:
    """The share of Twemoji's drawings whose nearest drawing of Noto's is of the same emoji."""
    bank, queries = (embed(side, load.processor, pictures) for pictures in pairs)
    ids = np.arange(len(bank))
    return {"R@1 emoji": with_error(recalls((queries @ bank.T).numpy(), ids, ids)[0], len(ids))}


def bench_accuracy(name: str, load: Callable, pictures: list, args: argparse.Namespace) -> list[dict]:
    """Figures of each side, and the mean and least cosine of its vectors of photos with the float32 model's."""
    if name == "icon checkpoint":
        of_side = partial(icon_figures, load=load, args=args) if args.icons else None
    else:
        of_side = partial(emoji_figures, load=load, pairs=emoji_pairs(args)) if args.emoji else None
    if of_side is None:
        logger.warning("%s: accuracy is left out, no data set is given", name)
        return []
    figures = {}
    with torch.inference_mode():
        exact = embed(Side(load(), torch.float32), load.processor, pictures)
        for side, each in sides_of(load).items():
            cosines = (embed(each, load.processor, pictures) * exact).sum(dim=-1)
            figures[side] = {**of_side(each), "cosine": [cosines.mean().item(), cosines.min().item()]}
            logger.info("%s, %s: %s", name, side, figures[side])
    return [{"model": name, "part": "accuracy", "batch": None, "figures": figures}]


PARTS = {"speed": bench_speed, "accuracy": bench_accuracy}


class IconCheckpoint:
    """Loads it, from this folder by default."""

    def __init__(self, folder: str):
        self.folder = folder
        both = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        self.processor, self.tokenizer = both.image_processor, both.tokenizer

    def __call__(self, **fields):
        return vit_embed.VitEmbedForContrastive.from_pretrained(self.folder, **fields).eval()


class Tower:
    """Loads a tower at `IMAGE_SIZE`, or its own size where that is smaller."""

    def __init__(self, folder: str):
        self.folder = folder
        own = vit_embed.VitEmbedConfig.from_pretrained(folder).image_size
        self.image_size = min(IMAGE_SIZE, own if isinstance(own, int) else min(own))
        side = {"height": self.image_size, "width": self.image_size}
        self.processor = AutoImageProcessor.from_pretrained(
            folder, size={"shortest_edge": self.image_size}, crop_size=side
        )

    def __call__(self, **fields):
        return AutoModel.from_pretrained(self.folder, image_size=self.image_size, **fields).eval()


def photos() -> list:
    """Each of PHOTOS whole, and its four quarters."""
    from pictures import photo

    found = []
    for picture in map(photo, PHOTOS):
        x, y, right, bottom = picture.width // 2, picture.height // 2, picture.width, picture.height
        parts = ((0, 0, right, bottom), (0, 0, x, y), (x, 0, right, y), (0, y, x, bottom), (x, y, right, bottom))
        found += [picture.crop(part) for part in parts]
    return found


def summary(cells: list[dict]) -> dict[str, dict[str, dict]]:
    """{model: {side: {"mib", "speed": {batch: Ratios over the float32 copy}, figures}}} of what a file holds."""
    found: dict[str, dict[str, dict]] = {}
    for cell in cells:
        sides = found.setdefault(cell["model"], {})
        if cell["part"] == "speed":
            for side, seconds in cell["seconds"].items():
                entry = sides.setdefault(side, {"speed": {}})
                entry.setdefault("speed", {})[cell["batch"]] = Ratios.of(cell["seconds"][BASE], seconds)
                entry["mib"] = cell["mib"][side]
        else:
            for side, figures in cell["figures"].items():
                sides.setdefault(side, {"speed": {}}).update(figures)
    return found


def lines(model: str, sides: dict[str, dict]) -> list[tuple[str, ...]]:
    """A header, then a line a side."""
    batches = sorted({batch for each in sides.values() for batch in each["speed"]})
    figures = [name for name in next(iter(sides.values())) if name not in ("speed", "mib")]
    rows = [(model, *(f"speed, batch {batch}" for batch in batches), "weights, MiB", *figures)]
    for side, each in sides.items():
        speeds = (each["speed"][batch] for batch in batches)
        spans = (f"{r.median:.2f} ({r.lowest:.2f} - {r.highest:.2f})" for r in speeds)
        shares = (
            f"{each[name][0]:.1%}" if name.startswith("R@1") else "{:.4f}; {:.4f}".format(*each[name])
            for name in figures
        )
        rows.append((side, *spans, f"{each['mib']:.1f}" if "mib" in each else "", *shares))
    return rows


def draw(cells: list[dict]) -> Figure:
    """Speed against accuracy (cosines where nothing else is stored), ranges and standard errors, a panel a model."""
    found = {}
    for model, sides in summary(cells).items():
        metric = next((name for name in sides[BASE] if name.startswith("R@1")), "cosine")
        if metric in sides[BASE] and sides[BASE]["speed"]:
            found[model] = (metric, max(sides[BASE]["speed"]), sides)
    figure = Figure(figsize=(8.4, 5.6), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for panel, (model, (metric, batch, sides)) in zip(panels, found.items()):
        colours: dict[str, str] = {}
        for side, each in sides.items():
            speed, (share, error) = each["speed"][batch], each[metric]
            error = None if metric == "cosine" else 100 * error
            reach = [[speed.median - speed.lowest], [speed.highest - speed.median]]
            dtype = next((name for name in ("bfloat16", "float32") if side.endswith(name)), "int8")
            kind = side.removesuffix(dtype)
            colour = colours.setdefault(kind, f"C{len(colours)}")
            style = {"fmt": {"float32": "o", "bfloat16": "s", "int8": "D"}[dtype], "color": colour, "label": side}
            panel.errorbar(speed.median, 100 * share, error, reach, lw=0.6, **style)
        panel.set_title(f"{model}, batch {batch}", fontsize=10)
        panel.set_xlabel("times as fast as optimized() in float32")
        panel.set_ylabel(f"{metric}, %" if metric != "cosine" else "mean cosine with float32, %")
        panel.axvline(1, color="grey", lw=0.6, ls=":")
        panel.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    about = cells[0]["about"]
    figure.supxlabel(f"{about['machine']}; {about['date']}", fontsize=7)
    return figure


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--icon_model", default=str(REPO), help="folder of a model of both towers")
    parser.add_argument("--vit", help="folder of a trained tower; left out without")
    parser.add_argument("--icons", help="folder that build_icon_dataset.py has written")
    parser.add_argument("--emoji", help="folder that build_emoji_dataset.py has written")
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=list(BATCHES), default=list(BATCHES))
    parser.add_argument("--pictures", type=int, help="emoji of each vendor at most; all of them without")
    parser.add_argument("--batch", type=int, help="images at a time, beside 1")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="cpu", help=CLOCK_HELP)
    parser.add_argument("--json", type=Path, help="file for what was measured; cells that were not are kept")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    pictures, cells = photos(), []
    packages = ["torchao"] if importlib.util.find_spec("torchao") else []
    folders = {"icon checkpoint": (IconCheckpoint, args.icon_model), "ViT-S/14": (Tower, args.vit)}
    for name in args.models:
        kind, folder = folders[name]
        if not folder:
            logger.warning("%s is left out: no folder is given", name)
            continue
        load = kind(folder)
        for part in args.part:
            found = PARTS[part](name, load, pictures, args)
            cells += [{**cell, "about": about(args.clock, packages)} for cell in found]
            if args.json:
                store(args.json, cells, CELL)
    if args.json:
        cells = store(args.json, cells, CELL)
    sys.stdout.write(f"{machine()}, {args.clock} time; times as fast as `optimized()` in float32\n")
    for model, sides in summary(cells).items():
        header, *rows = lines(model, sides)
        sys.stdout.write(f"\n{table(header, rows)}\n")


if __name__ == "__main__":
    main()
