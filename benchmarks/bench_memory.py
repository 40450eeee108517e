"""The most memory that inference holds above the weights, for every class beside its peer in transformers.

    python benchmarks/bench_memory.py --output benchmarks/memory.json

Counts the bytes of all tensors that are alive after each operation: the same on every run and machine. What a kernel
takes and gives back inside one operation is not seen, and is alike on both sides. The tensors have shapes and no
values, so nothing is computed; `--with_values` computes, and counts the same.
"""

import argparse
import contextlib
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from timing import MIB, about, store, table
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import vit_embed
from vit_embed.inputs_vit_embed import ChecksValues

TRUNK = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
TRUNK["patch_size"] = 16
TAPS = {"out_features": ["stage3", "stage6", "stage9", "stage12"], "apply_layernorm": True}
NUM_TOKENS = 77
CELL = ("class", "image_size", "batch")


class LiveBytes(TorchDispatchMode):
    """Of the tensors that operations under it have made: `peak`, the most that were alive after one. Those that `owned`
    are views of do not count."""

    def __init__(self, owned: list[torch.Tensor], read_as: int = 0):
        """`read_as`: what the host reads of a number without a value."""
        super().__init__()
        self.owned = {tensor.untyped_storage()._cdata for tensor in owned}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak, self.read_as = 0, read_as

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return self.read_as
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.owned:
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.alive.values()))
        return result


def take_values(model: torch.nn.Module, mode: FakeTensorMode) -> torch.nn.Module:
    """Leaves parameters and buffers their shapes alone."""
    for module in model.modules():
        for name, each in module._parameters.items():
            if each is not None:
                module._parameters[name] = torch.nn.Parameter(mode.from_tensor(each.detach()), each.requires_grad)
        for name, each in module._buffers.items():
            if each is not None:
                module._buffers[name] = mode.from_tensor(each)
        if isinstance(module, ChecksValues):
            module.set_input_checks("never")
    return model


def peak_of(
    model: torch.nn.Module,
    inputs: dict[str, object],
    with_values: bool = True,
    call: Callable[[dict], object] | None = None,
) -> int:
    """Bytes above weights and inputs of `call`, else of an inference pass, on `inputs`. Without values nothing is
    computed, and the model is good for nothing else afterwards."""
    mode = contextlib.nullcontext() if with_values else FakeTensorMode()
    if not with_values:
        take_values(model, mode)
        inputs = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    gc.collect()
    tensors = [each for each in inputs.values() if isinstance(each, torch.Tensor)]
    with mode, LiveBytes([*model.parameters(), *model.buffers(), *tensors], NUM_TOKENS - 1) as live:
        if call is not None:
            call(inputs)
        else:
            with torch.no_grad():
                model(**inputs)
    return live.peak


def ours(fields: dict, **others) -> vit_embed.VitEmbedConfig:
    return vit_embed.VitEmbedConfig(**{**fields, **others})


def stock_vit(cls: type, fields: dict, **others) -> torch.nn.Module:
    return cls(transformers.ViTConfig(**{**fields, "hidden_act": "quick_gelu", **others}))


def stock_clip(**fields) -> transformers.CLIPModel:
    return transformers.CLIPModel(transformers.CLIPConfig(vision_config=fields, text_config={}))


# what: ours and theirs of a trunk's sizes, and what both are called with.
PAIRS = {
    "image tower": (
        lambda sizes: vit_embed.VitEmbedModel(ours(sizes)),
        lambda sizes: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes)),
        ("pixel_values",),
    ),
    "image tower, 24 layers": (
        lambda sizes: vit_embed.VitEmbedModel(ours(sizes, num_hidden_layers=24)),
        lambda sizes: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**{**sizes, "num_hidden_layers": 24})),
        ("pixel_values",),
    ),
    "image tower with projection": (
        lambda sizes: vit_embed.VitEmbedModelWithProjection(ours(sizes)),
        lambda sizes: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**sizes)),
        ("pixel_values",),
    ),
    "text tower": (
        lambda sizes: vit_embed.VitEmbedTextModel(vit_embed.VitEmbedTextConfig()),
        lambda sizes: transformers.CLIPTextModel(transformers.CLIPTextConfig(eos_token_id=49407)),
        ("input_ids",),
    ),
    "classification": (
        lambda sizes: vit_embed.VitEmbedForImageClassification(ours(sizes, num_labels=1000)),
        lambda sizes: stock_vit(transformers.ViTForImageClassification, sizes, num_labels=1000),
        ("pixel_values",),
    ),
    "dual encoder": (
        lambda sizes: vit_embed.VitEmbedForContrastive(ours(sizes, text_config={})),
        lambda sizes: stock_clip(**sizes),
        ("pixel_values", "input_ids"),
    ),
    "depth, dpt": (
        lambda sizes: vit_embed.VitEmbedForDepthEstimation(ours(sizes, depth_head_type="dpt", hidden_act="gelu")),
        lambda sizes: transformers.DPTForDepthEstimation(transformers.DPTConfig(**sizes, is_hybrid=False)),
        ("pixel_values",),
    ),
    "masked image modelling": (
        lambda sizes: vit_embed.VitEmbedForMaskedImageModeling(
            ours(sizes, decoder_num_hidden_layers=8, hidden_act="gelu")
        ),
        lambda sizes: transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**sizes)),
        ("pixel_values",),
    ),
    "backbone, 4 maps": (
        lambda sizes: vit_embed.VitEmbedBackbone(ours(sizes, out_features=TAPS["out_features"], hidden_act="gelu")),
        lambda sizes: transformers.Dinov2Backbone(transformers.Dinov2Config(**sizes, **TAPS)),
        ("pixel_values",),
    ),
    "depth, deconv (beside a bare ViT)": (
        lambda sizes: vit_embed.VitEmbedForDepthEstimation(ours(sizes)),
        lambda sizes: stock_vit(transformers.ViTModel, sizes),
        ("pixel_values",),
    ),
}


def measure(what: str, image_size: int, args: argparse.Namespace) -> dict:
    """A cell: MiB of each side."""
    make_ours, make_theirs, names = PAIRS[what]
    ids = torch.randint(1, 49406, (args.batch_size, NUM_TOKENS), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[:, -1] = 49406, 49407
    given = {"pixel_values": torch.randn(args.batch_size, 3, image_size, image_size), "input_ids": ids}
    sizes = {**TRUNK, "image_size": image_size}
    model = make_ours(sizes).eval()
    sides = {"transformers": make_theirs(sizes).eval(), "optimized": model.optimized(), "vit_embed": model}
    inputs = {name: given[name] for name in names}
    peaks = {name: [peak_of(side, inputs, args.with_values) / MIB] for name, side in sides.items()}
    return {"class": what, "image_size": image_size, "batch": args.batch_size, "mib": peaks}


def main() -> int:
    """Prints the table; the status is 1 where a class holds more than its peer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--image_size", type=int, nargs="+", default=[224, 896])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--with_values", action="store_true", help="compute what is counted")
    parser.add_argument("--output", type=Path, help="JSON that a chart can be drawn of")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows, larger = [], []
    for what in tqdm(args.classes, file=sys.stderr):
        for image_size in args.image_size if "pixel_values" in PAIRS[what][2] else args.image_size[:1]:
            cell = measure(what, image_size, args)
            if args.output:
                store(args.output, [{**cell, "about": about("none: tensors are counted")}], CELL)
            theirs, *others = (cell["mib"][name][0] for name in ("transformers", "vit_embed", "optimized"))
            larger += [what] if others[0] > theirs and "beside" not in what else []
            numbers = (f"{value:.1f}" for value in (theirs, *others))
            rows.append((what, image_size, *numbers, *(f"{each / theirs:.2f}" for each in others)))
    header = (
        "class",
        "pixels",
        "transformers, MiB",
        "vit_embed",
        "optimized()",
        "vit_embed, ratio",
        "optimized(), ratio",
    )
    print(table(header, rows))
    if larger:
        print("more than the peer:", ", ".join(larger), file=sys.stderr)
    return bool(larger)


if __name__ == "__main__":
    sys.exit(main())
