"""The most memory that inference holds above the weights, for every class beside its peer in transformers.

    python benchmarks/bench_memory.py --batch_size 8

Counts the bytes of all tensors that are alive after each operation: the same on every run and machine. What a kernel
takes and gives back inside one operation is not seen, and is alike on both sides.
"""

import argparse
import gc
import sys

import torch
import transformers
from timing import MIB, table
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import vit_embed

SIZES = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
SIZES.update(image_size=224, patch_size=16)
DEEP = {**SIZES, "num_hidden_layers": 24}
TAPS = {"out_features": ["stage3", "stage6", "stage9", "stage12"], "apply_layernorm": True}


class LiveBytes(TorchDispatchMode):
    """Of the tensors that operations under it have made: `peak`, the most that were alive after one. Those that `owned`
    are views of do not count."""

    def __init__(self, owned: list[torch.Tensor]):
        super().__init__()
        self.owned = {tensor.untyped_storage()._cdata for tensor in owned}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.owned:
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.alive.values()))
        return result


def peak_of(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """Bytes above weights and inputs."""
    gc.collect()
    with torch.no_grad(), LiveBytes([*model.parameters(), *model.buffers(), *inputs.values()]) as live:
        model(**inputs)
    return live.peak


def ours(fields: dict, **others) -> vit_embed.VitEmbedConfig:
    return vit_embed.VitEmbedConfig(**{**fields, **others})


def stock_vit(cls: type, fields: dict, **others) -> torch.nn.Module:
    return cls(transformers.ViTConfig(**{**fields, "hidden_act": "quick_gelu", **others}))


def stock_clip(**fields) -> transformers.CLIPModel:
    return transformers.CLIPModel(transformers.CLIPConfig(vision_config=fields, text_config={}))


# what: ours, theirs, and what both are called with besides pixels
PAIRS = {
    "image tower": (
        lambda: vit_embed.VitEmbedModel(ours(SIZES)),
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES)),
        ("pixel_values",),
    ),
    "image tower, 24 layers": (
        lambda: vit_embed.VitEmbedModel(ours(DEEP)),
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**DEEP)),
        ("pixel_values",),
    ),
    "image tower with projection": (
        lambda: vit_embed.VitEmbedModelWithProjection(ours(SIZES)),
        lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**SIZES)),
        ("pixel_values",),
    ),
    "text tower": (
        lambda: vit_embed.VitEmbedTextModel(vit_embed.VitEmbedTextConfig()),
        lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(eos_token_id=49407)),
        ("input_ids",),
    ),
    "classification": (
        lambda: vit_embed.VitEmbedForImageClassification(ours(SIZES, num_labels=1000)),
        lambda: stock_vit(transformers.ViTForImageClassification, SIZES, num_labels=1000),
        ("pixel_values",),
    ),
    "dual encoder": (
        lambda: vit_embed.VitEmbedForContrastive(ours(SIZES, text_config={})),
        lambda: stock_clip(**SIZES),
        ("pixel_values", "input_ids"),
    ),
    "depth, dpt": (
        lambda: vit_embed.VitEmbedForDepthEstimation(ours(SIZES, depth_head_type="dpt", hidden_act="gelu")),
        lambda: transformers.DPTForDepthEstimation(transformers.DPTConfig(**SIZES, is_hybrid=False)),
        ("pixel_values",),
    ),
    "masked image modelling": (
        lambda: vit_embed.VitEmbedForMaskedImageModeling(ours(SIZES, decoder_num_hidden_layers=8, hidden_act="gelu")),
        lambda: transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**SIZES)),
        ("pixel_values",),
    ),
    "backbone, 4 maps": (
        lambda: vit_embed.VitEmbedBackbone(ours(SIZES, out_features=TAPS["out_features"], hidden_act="gelu")),
        lambda: transformers.Dinov2Backbone(transformers.Dinov2Config(**SIZES, **TAPS)),
        ("pixel_values",),
    ),
    "depth, deconv (beside a bare ViT)": (
        lambda: vit_embed.VitEmbedForDepthEstimation(ours(SIZES)),
        lambda: stock_vit(transformers.ViTModel, SIZES),
        ("pixel_values",),
    ),
}


def main() -> int:
    """Prints the table; the status is 1 where a class holds more than its peer."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--num_tokens", type=int, default=77, help="of each text")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    ids = torch.full((args.batch_size, args.num_tokens), 320)
    ids[:, 0], ids[:, -1] = 49406, 49407
    given = {"pixel_values": torch.randn(args.batch_size, 3, 224, 224), "input_ids": ids}
    rows, larger = [], []
    for what, (make_ours, make_theirs, names) in tqdm(PAIRS.items(), file=sys.stderr):
        inputs = {name: given[name] for name in names}
        peaks = [peak_of(make().eval(), inputs) for make in (make_ours, make_theirs)]
        ratio = peaks[0] / peaks[1]
        larger += [what] if ratio > 1 and "beside" not in what else []
        rows.append((what, *(f"{peak / MIB:.1f}" for peak in peaks), f"{ratio:.2f}"))
    header = ("class", "vit_embed, MiB", f"transformers {transformers.__version__}, MiB", "ratio")
    print(table(header, rows))
    if larger:
        print("more than the peer:", ", ".join(larger), file=sys.stderr)
    return bool(larger)


if __name__ == "__main__":
    sys.exit(main())
