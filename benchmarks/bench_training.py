"""Training steps beside transformers with sdpa, of equal weights: contrastive, classification, depth.

    python benchmarks/bench_training.py --output benchmarks/training.json
    python benchmarks/bench_training.py --tasks contrastive --sizes B/16 --dtypes bf16 --rounds 7
    python benchmarks/bench_training.py --parts memory --output benchmarks/training.json

A step is forward and backward on float32 weights, under autocast for bf16; the optimizer's step, the same on both
sides, is timed apart. Loss and gradients are compared first: in float32 with each other (depth's gradients in float64),
in bfloat16 each side's distance to the float32 gradients. "vit_embed, half the patches" is ours with
patch_drop_rate=0.5. Memory is counted in tensors, see bench_memory.py. A file keeps its other cells.

Depth is the `dpt` head and DPTForDepthEstimation on a Dinov2Backbone. That has no loss and scales up with other
corners: both get the same loss, and the peer's `align_corners` is set to False. Its maps fit each other where the grid
is even, hence 256 pixels for depth with patches of 32.
"""

import argparse
import contextlib
import functools
import json
import logging
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from bench_memory import MIB, peak_of
from dual_encoders import END_TOKEN, IMAGE_SIZE, START_TOKEN, Batch, make_batch
from timing import CLOCK_HELP, CLOCKS, Ratios, about, interleave, machine, store, table, timed
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    ViTConfig,
    ViTForImageClassification,
)

import vit_embed
from vit_embed.conversion.layouts.dinov2 import HF_LAYER_NAMES
from vit_embed.conversion.layouts.hf_trunk import NEW_ATTENTION_NAMES, embedding_rules
from vit_embed.conversion.layouts.hf_vit import NEW_LAYER_NAMES
from vit_embed.conversion.layouts.rules import Rule, apply_rules, layer_rules, rule
from vit_embed.depth_vit_embed import resize_depth
from vit_embed.options_vit_embed import NUM_DPT_TAPS

logger = logging.getLogger("bench_training")

SIZES = {"B/32": 32, "B/16": 16}
DTYPES = ("fp32", "bf16")
NUM_LABELS = 1000
DROP_RATE = 0.5
HALF = "vit_embed, half the patches"
TOLERANCE = 1e-5  # of loss and gradients in float32, relative: sums taken in another order
# Of bfloat16: a side's distance to the float32 gradients over the peer's. Both round as often, not at the same places.
BF16_TOLERANCE = 1.1
CELL = ("task", "size", "dtype", "batch", "what")

Loss = Callable[[torch.nn.Module, Batch], torch.Tensor]


class Pair(NamedTuple):
    """Two models of equal weights, the loss of either, and tensors by the peer's names of parameters -> by ours."""

    ours: torch.nn.Module
    theirs: torch.nn.Module
    loss: Loss
    renamed: Callable[[Batch], Batch]


def contrastive_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return model(**batch, return_loss=True).loss


def class_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return model(**batch).loss


def depth_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Mean squared error of a map of the labels' size."""
    depth, labels = model(batch["pixel_values"]).predicted_depth.float(), batch["labels"]
    return F.mse_loss(depth if depth.shape == labels.shape else resize_depth(depth, tuple(labels.shape[1:])), labels)


def contrastive_pair(trunk: dict) -> Pair:
    layers = {"num_hidden_layers": trunk["num_hidden_layers"]} if "num_hidden_layers" in trunk else {}
    text = {"bos_token_id": START_TOKEN, "eos_token_id": END_TOKEN, **layers}
    theirs = CLIPModel._from_config(CLIPConfig(vision_config=trunk, text_config=text), attn_implementation="sdpa")
    config = vit_embed.VitEmbedConfig(**trunk, text_config=text)
    ours = vit_embed.VitEmbedForContrastive._from_config(config, attn_implementation="sdpa")
    ours.load_state_dict(theirs.state_dict())
    return Pair(ours, theirs, contrastive_loss, lambda tensors: tensors)


# What ViT and DPT of transformers have and CLIP has not, the other way round.
VIT_TRUNK = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "use_pre_layernorm": False, "patch_bias": True}


def renaming(ours: torch.nn.Module, *rules: Rule) -> Callable[[Batch], Batch]:
    shapes = {name: weight.shape for name, weight in ours.state_dict().items()}
    return functools.partial(apply_rules, rules=rules, target_shapes=shapes, dtype=torch.float32)


def classification_pair(trunk: dict) -> Pair:
    fields = {"hidden_act": "gelu", "num_labels": NUM_LABELS, **trunk}
    theirs = ViTForImageClassification._from_config(ViTConfig(**fields), attn_implementation="sdpa")
    config = vit_embed.VitEmbedConfig(**VIT_TRUNK, num_labels=NUM_LABELS, **trunk)
    ours = vit_embed.VitEmbedForImageClassification._from_config(config, attn_implementation="sdpa")
    layers = layer_rules("vit.layers.{n}", "vision_model.encoder.layers.{n}", NEW_LAYER_NAMES)
    renamed = renaming(ours, *embedding_rules("vit."), *layers, rule("classifier.{p}", "classifier.{p}"))
    ours.load_state_dict(renamed(theirs.state_dict()))
    return Pair(ours, theirs, class_loss, renamed)


def depth_head_rules() -> list[Rule]:
    """DPT's neck and head; its fusions count from deep to shallow, ours the other way."""
    result = [
        rule("neck.reassemble_stage.layers.{n}.projection.{p}", "depth_head.projections.{n}.{p}"),
        rule("neck.reassemble_stage.layers.{n}.resize.{p}", "depth_head.resizes.{n}.{p}"),
        rule("neck.convs.{n}.weight", "depth_head.levels.{n}.weight"),
        *(rule(f"head.head.{2 * i}.{{p}}", f"depth_head.head{i + 1}.{{p}}") for i in range(3)),
    ]
    for deep in range(NUM_DPT_TAPS):
        theirs, ours = f"neck.fusion_stage.layers.{deep}", f"depth_head.fusions.{NUM_DPT_TAPS - 1 - deep}"
        result.append(rule(f"{theirs}.projection.{{p}}", f"{ours}.projection.{{p}}"))
        for unit, name in (("residual_layer1", "level_unit"), ("residual_layer2", "unit")):
            for i in (1, 2):
                # The deepest level is fused with nothing.
                targets = () if deep == 0 and name == "level_unit" else (f"{ours}.{name}.conv{i}.{{p}}",)
                result.append(rule(f"{theirs}.{unit}.convolution{i}.{{p}}", *targets))
    return result


def depth_pair(trunk: dict) -> Pair:
    """The peer's trunk is a Dinov2Backbone, which normalises what the head reads as ours does."""
    made = {"depth_head_type": "dpt", "depth_activation": "identity", "layer_scale_init_value": 1.0}
    config = vit_embed.VitEmbedConfig(**{**VIT_TRUNK, "layer_norm_eps": 1e-6}, **made, **trunk)
    ours = vit_embed.VitEmbedForDepthEstimation._from_config(config, attn_implementation="sdpa")
    backbone = Dinov2Config(**trunk, out_indices=ours.taps, apply_layernorm=True, reshape_hidden_states=False)
    head = {
        "neck_hidden_sizes": [layer.out_channels for layer in ours.depth_head.projections],
        "fusion_hidden_size": ours.depth_head.head1.in_channels,
        "readout_type": "ignore",
    }
    dpt = DPTConfig(backbone_config=backbone, is_hybrid=False, **head)
    theirs = DPTForDepthEstimation._from_config(dpt, attn_implementation="sdpa")
    for module in theirs.modules():
        if hasattr(module, "align_corners"):
            module.align_corners = False
    torch.nn.init.constant_(theirs.head.head[4].bias, 10.0)  # the labels' mean; its last ReLU lets all of these pass
    names = {**HF_LAYER_NAMES, **NEW_ATTENTION_NAMES}
    layers = layer_rules("backbone.encoder.layer.{n}", "vision_model.encoder.layers.{n}", names)
    renamed = renaming(ours, *embedding_rules("backbone."), *layers, *depth_head_rules())
    ours.load_state_dict(renamed(theirs.state_dict()))
    return Pair(ours, theirs, depth_loss, renamed)


TASKS = {"contrastive": contrastive_pair, "classification": classification_pair, "depth": depth_pair}


def make_pair(task: str, patch_size: int, image_size: int, fields: dict[str, int]) -> Pair:
    """Both in training mode, random weights, float32. `fields` replace those of ViT-B."""
    torch.manual_seed(0)
    pair = TASKS[task]({"image_size": image_size, "patch_size": patch_size, **fields})
    for model in (pair.ours, pair.theirs):
        model.train()
    return pair


def batch_of(task: str, batch_size: int, image_size: int) -> Batch:
    """Pixels (B, 3, H, W), and texts (B, 77) as long as the model allows, class numbers (B,) or depths (B, H, W)."""
    batch = make_batch(batch_size, image_size)
    if task == "contrastive":
        return batch
    pixel_values = batch["pixel_values"]
    if task == "classification":
        return {"pixel_values": pixel_values, "labels": torch.arange(batch_size) % NUM_LABELS}
    # One depth an image: of random pixels the gradients would cancel out to rounding.
    depths = torch.linspace(0, 20, batch_size)[:, None, None]
    return {"pixel_values": pixel_values, "labels": depths.expand_as(pixel_values[:, 0]).contiguous()}


def forward_backward(
    model: torch.nn.Module, batch: Batch, dtype_name: str, loss: Loss = contrastive_loss
) -> torch.Tensor:
    """The loss, and new gradients of float32 weights, under autocast for bf16."""
    model.zero_grad(set_to_none=True)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if dtype_name == "bf16" else contextlib.nullcontext()
    with autocast:
        value = loss(model, batch)
    value.backward()
    return value.detach()


def gradients_of(model: torch.nn.Module) -> Batch:
    """By name, zeros where there is none. Takes them off the model."""
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def distance(found: Batch, expected: Batch) -> float:
    """Of all gradients together, relative."""
    squares = sum((found[name] - gradient).square().sum() for name, gradient in expected.items())
    return (squares / sum(gradient.square().sum() for gradient in expected.values())).sqrt().item()


def check_equal(what: str, pair: Pair, batch: Batch, dtype_name: str) -> dict[str, float]:
    """Relative distances of loss and gradients: in float32 of ours to the peer's, in bf16 of each to its own float32.

    Raises:
        RuntimeError: they differ by more than rounding explains.
    """
    models = {"vit_embed": pair.ours, "transformers": pair.theirs}
    losses = {name: forward_backward(model, batch, "fp32", pair.loss) for name, model in models.items()}
    gradients = {name: gradients_of(model) for name, model in models.items()}
    exact = gradients
    if pair.loss is depth_loss:  # in float32 rounding takes some of its many ReLUs to the other side, 3e-4 of gradients
        doubled = {name: value.double() for name, value in batch.items()}
        for model in models.values():
            forward_backward(model.double(), doubled, "fp32", pair.loss)
        exact = {name: {n: g.float() for n, g in gradients_of(model).items()} for name, model in models.items()}
        for model in models.values():
            model.float()
    errors = {
        "loss": abs(losses["vit_embed"] / losses["transformers"] - 1).item(),
        "gradients": distance(exact["vit_embed"], pair.renamed(exact["transformers"])),
    }
    allowed = dict.fromkeys(errors, TOLERANCE)
    if dtype_name == "bf16":
        for name, model in models.items():
            forward_backward(model, batch, "bf16", pair.loss)
            errors[f"bf16 gradients, {name}"] = distance(gradients_of(model), gradients[name])
        allowed["bf16 gradients, vit_embed"] = BF16_TOLERANCE * errors["bf16 gradients, transformers"]
    logger.info("%s: relative distances %s", what, {name: f"{error:.1e}" for name, error in errors.items()})
    wrong = {name: errors[name] for name, most in allowed.items() if not errors[name] <= most}
    if wrong:
        raise RuntimeError(f"{what}: expected relative distances of at most {allowed}, got {wrong}")
    return errors


def dropping(pair: Pair, step: Callable[[], object]) -> Callable[[], object]:
    """A step of ours that drops half of the patches."""

    def run():
        pair.ours.config.patch_drop_rate = DROP_RATE
        try:
            return step()
        finally:
            pair.ours.config.patch_drop_rate = 0.0

    return run


def steps_of(pair: Pair, batch: Batch, dtype_name: str) -> dict[str, Callable[[], object]]:
    ours = functools.partial(forward_backward, pair.ours, batch, dtype_name, pair.loss)
    theirs = functools.partial(forward_backward, pair.theirs, batch, dtype_name, pair.loss)
    sides = {"transformers": theirs, "vit_embed": ours}
    # A depth head reads every patch.
    return sides if pair.loss is depth_loss else {**sides, HALF: dropping(pair, ours)}


def measure(task: str, size: str, dtype_name: str, args: argparse.Namespace) -> list[dict]:
    """A cell for each part: seconds of every round, or MiB."""
    two_patches = 2 * SIZES[size]
    image_size = args.image_size if task != "depth" else math.ceil(args.image_size / two_patches) * two_patches
    pair = make_pair(task, SIZES[size], image_size, args.fields)
    batch, what = batch_of(task, args.batch_size, image_size), f"{task} {size} {dtype_name}, batch {args.batch_size}"
    cell = {"task": task, "size": size, "dtype": dtype_name, "batch": args.batch_size, "image_size": image_size}
    errors = check_equal(what, pair, batch, dtype_name) if "time" in args.parts else {}
    cells, steps = [], steps_of(pair, batch, dtype_name)
    models = {name: pair.theirs if name == "transformers" else pair.ours for name in steps}
    if "time" in args.parts:
        for step in steps.values():
            step()
        calls = {name: timed(step, CLOCKS[args.clock]) for name, step in steps.items()}
        seconds = interleave(what, calls, args.rounds)
        cells.append({**cell, "what": "forward and backward", "seconds": seconds, "errors": errors})
    if "optimizer" in args.parts:
        calls = {}
        for name in ("transformers", "vit_embed"):
            steps[name]()
            optimizer = torch.optim.AdamW(models[name].parameters(), lr=1e-5)
            optimizer.step()
            calls[name] = timed(optimizer.step, CLOCKS[args.clock])
        cells.append({**cell, "what": "AdamW", "seconds": interleave(f"AdamW, {what}", calls, args.rounds)})
        del calls, optimizer
    if "memory" in args.parts:  # last, as it takes the models' values
        peaks = {}
        for name, model in models.items():
            pair.ours.config.patch_drop_rate = DROP_RATE if name == HALF else 0.0
            model.zero_grad(set_to_none=True)
            step = functools.partial(forward_backward, model, dtype_name=dtype_name, loss=pair.loss)
            peaks[name] = [peak_of(model, batch, args.with_values, step) / MIB]
        cells.append({**cell, "what": "peak memory", "mib": peaks})
    return cells


def lines(cells: list[dict]) -> list[tuple[str, ...]]:
    """The peer's seconds over ours, and our memory over the peer's: median and range over the rounds."""
    result = []
    for cell in cells:
        values = cell.get("seconds") or cell["mib"]
        theirs, unit = values["transformers"], "s" if "seconds" in cell else "MiB"
        what = f"{cell['what']}, {cell['task']} {cell['size']} {cell['dtype']}, {cell['image_size']} pixels"
        for name in values:
            if name == "transformers":
                continue
            ratios = Ratios.of(theirs, values[name]) if unit == "s" else Ratios.of(values[name], theirs)
            medians = (f"{statistics.median(each):.2f} {unit}" for each in (theirs, values[name]))
            result.append((what, name, *medians, *ratios.cells(2), str(len(theirs))))
    return result


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--parts", nargs="+", choices=["time", "optimizer", "memory"], default=["time", "memory"])
    parser.add_argument("--with_values", action="store_true", help="compute the step whose memory is counted")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--image_size", type=int, default=IMAGE_SIZE)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--fields", type=json.loads, default={}, help="in place of ViT-B's, as JSON: smaller sizes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="cpu", help=CLOCK_HELP)
    parser.add_argument("--output", type=Path, help="JSON that a chart can be drawn of")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    cells = []
    for task in args.tasks:
        for size in args.sizes:
            for dtype_name in args.dtypes:
                found = [{**cell, "about": about(args.clock)} for cell in measure(task, size, dtype_name, args)]
                cells += found
                if args.output:
                    store(args.output, found, CELL)
    header = ("measured", "side", "transformers", "this side", "ratio", "range", "of the best", "rounds")
    title = f"{machine()}, batch {args.batch_size}, {args.clock} time; times as fast, and times the memory"
    sys.stdout.write(f"{title}\n\n{table(header, lines(cells))}\n")


if __name__ == "__main__":
    main()
