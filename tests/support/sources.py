"""A small model for every layout and form of it, as its own package saves it: what goes there and back.

A `Case` says where a source's states are and what it computes, in the package's own words; test_there_and_back.py holds
one suite of properties against all of them. What is special to a layout is tested in a file of its own.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import deepseek_reference
import open_clip_reference
import openai_reference
import timm_reference
import tiny
import torch
import torch_encoder_reference as torch_encoder
import transformers
from conversions import by_meta, saved
from safetensors.torch import save_file
from torch import nn

from vit_embed.conversion.layouts.layout import SampleInputs
from vit_embed.conversion.layouts.openai import METADATA

Outputs = dict[str, torch.Tensor]
DUAL = {"image_features", "text_features", "logits_per_image"}
TRUNK = {"last_hidden_state", "pooler_output"}


class Source(NamedTuple):
    """A model, what a user names to convert it, and what a layout reads: weights by the names in the file, config."""

    model: nn.Module
    path: Path
    state_dict: dict[str, torch.Tensor]
    config: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """
    layout, name: together what the tests call it.
    make: (a folder that does not exist) -> the Source in it.
    blocks: model -> the layers of its image tower, and of its text tower.
    run: (model, inputs) -> outputs, by the names of `compare.OUTPUTS`.
    model_class: ours.
    compared: the outputs that the pipeline compares; empty where it cannot run the source's own code.
    options: that the source needs.
    back: what the way back writes, "folder" or "file"; None where there is none.
    reload: (folder that came back, the source's model) -> the model that the package itself makes of it.
    free: keys without which it is another model and no error, by how they end.
    one_way: keys that come back with other numbers, of which the model computes the same.
    part: how the keys of the model begin, where a file holds more than it.
    is_keyed: whether every single key of it is tried by `make test`.
    """

    layout: str
    name: str
    make: Callable[[Path], Source]
    blocks: Callable[[nn.Module], list[Iterable[nn.Module]]]
    run: Callable[[nn.Module, SampleInputs], Outputs]
    model_class: str
    compared: set[str]
    options: dict[str, Any] = field(default_factory=dict)
    back: str | None = "folder"
    reload: Callable[[Path, nn.Module], nn.Module] | None = None
    free: tuple[str, ...] = ()
    one_way: tuple[str, ...] = ()
    part: str = ""
    is_keyed: bool = True

    def is_needed(self, key: str) -> bool:
        # One layer stands for all.
        is_later_layer = re.search(r"\.[1-9]\d*\.", key.removeprefix(self.part)) is not None
        return key.startswith(self.part) and not key.endswith(self.free or ("\0",)) and not is_later_layer

    def __str__(self) -> str:
        return f"{self.layout}: {self.name}"


@torch.no_grad()
def run_source(case: Case, model: nn.Module, inputs: SampleInputs) -> tuple[list[torch.Tensor], Outputs]:
    """What enters the first layer of each tower and what leaves each layer, (B, L, D), and the outputs."""
    states, hooks = [], []

    def keep(value: Any) -> None:
        states.append(value if torch.is_tensor(value) else value[0])

    for blocks in map(list, case.blocks(model)):
        hooks.append(blocks[0].register_forward_pre_hook(lambda module, given: keep(given[0])))
        hooks += [block.register_forward_hook(lambda module, given, output: keep(output)) for block in blocks]
    try:
        outputs = case.run(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    states = states[: sum(len(list(blocks)) + 1 for blocks in case.blocks(model))]  # `run` may run a tower again
    if case.layout == "openai":  # its blocks work on (L, B, D)
        states = [state.transpose(0, 1) for state in states]
    return states, outputs


def of_file(model: nn.Module, folder: Path, state_dict: dict | None = None) -> Source:
    """A lone file of `torch.save`."""
    folder.mkdir(parents=True)
    state_dict = dict(model.state_dict()) if state_dict is None else state_dict
    torch.save(state_dict, folder / "model.pth")
    return Source(model, folder / "model.pth", state_dict, {})


def of_transformers(make: Callable[[], nn.Module], folder: Path) -> Source:
    """A folder of `save_pretrained`."""
    model = tiny.randomised(make())
    return Source(model, folder, *saved(model, folder))


# OpenAI


def _openai(folder: Path) -> Source:
    model = openai_reference.openai_clip().float()
    for parameter in model.parameters():
        parameter.data += 1e-5 * torch.randn_like(parameter)  # no number that float16 could hold
    return of_file(model, folder, openai_reference.openai_state_dict(model))


def _run_clip(model: nn.Module, inputs: SampleInputs) -> Outputs:
    return {
        "image_features": model.encode_image(inputs.pixel_values),
        "text_features": model.encode_text(inputs.input_ids),
        "logits_per_image": model(*inputs)[0],
    }


def _reload_openai(file: Path, model: nn.Module) -> nn.Module:
    """By OpenAI's `build_model`, which rounds weights to float16; then with the file's own."""
    state_dict = torch.load(file, weights_only=True)
    model = openai_reference.openai_code().build_model(dict(state_dict)).float()
    model.load_state_dict({name: tensor for name, tensor in state_dict.items() if name not in METADATA})
    return model.eval()


OPENAI = [
    Case(
        "openai",
        "CLIP",
        _openai,
        lambda model: [model.visual.transformer.resblocks, model.transformer.resblocks],
        _run_clip,
        "VitEmbedForContrastive",
        DUAL,
        back="file",
        reload=_reload_openai,
        free=METADATA,
        options={"hidden_act": "quick_gelu"},
    )
]


# open_clip


def _open_clip(model_cfg: dict[str, Any], folder: Path) -> Source:
    model = open_clip_reference.write_folder(folder, model_cfg)
    config = json.loads((folder / "open_clip_config.json").read_text())
    return Source(model, folder, dict(model.state_dict()), config)


def _open_clip_blocks(model: nn.Module) -> list[Iterable[nn.Module]]:
    visual, text = model.visual, getattr(model, "text", model)
    image_blocks = visual.trunk.blocks if hasattr(visual, "trunk") else visual.transformer.resblocks
    return [image_blocks, text.transformer.resblocks]


def _run_open_clip(model: nn.Module, inputs: SampleInputs) -> Outputs:
    return {
        "image_features": model.encode_image(inputs.pixel_values),
        "text_features": model.encode_text(inputs.input_ids),
        "logits_per_image": model.get_logits(*inputs)[0],
    }


OPEN_CLIP = [
    Case(
        "open_clip",
        name,
        partial(_open_clip, model_cfg),
        _open_clip_blocks,
        _run_open_clip,
        "VitEmbedForContrastive",
        DUAL,
        reload=lambda folder, model: open_clip_reference.open_clip_code().create_model(f"local-dir:{folder}").eval(),
        free=("logit_bias",),  # without it the model is one of CLIP's loss
        is_keyed=name in ("layer scale", "custom text", "siglip"),
    )
    for name, model_cfg in open_clip_reference.MODEL_CFGS.items()
]


# timm


def _timm(arguments: dict[str, Any], folder: Path) -> Source:
    return of_file(timm_reference.of_timm(**arguments), folder)


def _timm_folder(name: str, arguments: dict[str, Any], folder: Path) -> Source:
    model = timm_reference.registered(name, **arguments)
    timm_reference.saved(model, folder)
    return Source(model, folder, dict(model.state_dict()), json.loads((folder / "config.json").read_text()))


def _run_timm(model: nn.Module, inputs: SampleInputs) -> Outputs:
    features = model.forward_features(inputs.pixel_values)
    pooled = {"pooler_output": model.forward_head(features, pre_logits=True)}
    return pooled if isinstance(model.head, nn.Identity) else {**pooled, "logits": model.forward_head(features)}


def _timm_case(name: str, make: Callable, arguments: dict[str, Any], **fields: Any) -> Case:
    is_trunk = arguments.get("num_classes") == 0
    # Registers with positions keep them: in timm's form they come back added to the tokens, and their rows are zero.
    folded = (
        ("reg_token", "pos_embed") if name.startswith(("registers with pos", "registers alone", "test_vit")) else ()
    )
    return Case(
        "timm",
        name,
        make,
        lambda model: [model.blocks],
        _run_timm,
        "VitEmbedModel" if is_trunk else "VitEmbedForImageClassification",
        TRUNK if is_trunk else TRUNK | {"logits"},
        reload=lambda folder, model: timm_reference.reloaded(folder),
        one_way=folded,
        **fields,
    )


TIMM = [
    _timm_case(
        name,
        partial(_timm, arguments),
        arguments,
        options={**timm_reference.GIVEN, **options},
        free=("pos_embed",) if "image_size" in options else (),
        is_keyed=name in ("layer scale", "attention pooling", "registers with positions"),
    )
    for name, (arguments, options) in timm_reference.VARIANTS.items()
] + [
    _timm_case(
        name, partial(_timm_folder, name, arguments), arguments, free=("head.weight", "head.bias"), is_keyed=False
    )
    for name, arguments in timm_reference.FOLDERS.items()
]


# transformers: CLIP and SigLIP

# Heads that no rule of thumb gives, and epsilons and activations that differ between the towers.
CLIP_VISION = {**tiny.VISION, "layer_norm_eps": 1e-3, "hidden_act": "gelu"}
CLIP_TEXT = {**tiny.TEXT, "layer_norm_eps": 1e-4}
SIGLIP_VISION = {**tiny.VISION, "layer_norm_eps": 1e-3}
SIGLIP_TEXT = {name: value for name, value in tiny.TEXT.items() if not name.endswith("token_id")}
SIGLIP_TEXT.update(layer_norm_eps=1e-4, projection_size=tiny.VISION["hidden_size"], pad_token_id=1)
LABELS = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}


def clip_config(**overrides: Any) -> transformers.CLIPConfig:
    towers = {"vision_config": dict(CLIP_VISION), "text_config": dict(CLIP_TEXT)}
    return transformers.CLIPConfig(**towers, projection_dim=20, **overrides)


def siglip_config(**overrides: Any) -> transformers.SiglipConfig:
    towers = {"vision_config": dict(SIGLIP_VISION), "text_config": dict(SIGLIP_TEXT)}
    return transformers.SiglipConfig(**towers, **overrides)


HF_CLIP_CONFIGS = {
    "CLIPModel": clip_config,
    "CLIPVisionModel": lambda: transformers.CLIPVisionConfig(**CLIP_VISION),
    "CLIPVisionModelWithProjection": lambda: transformers.CLIPVisionConfig(**CLIP_VISION, projection_dim=20),
    "CLIPForImageClassification": lambda: clip_config(**LABELS),
    "SiglipModel": siglip_config,
    "SiglipVisionModel": lambda: transformers.SiglipVisionConfig(**SIGLIP_VISION),
    "SiglipForImageClassification": lambda: siglip_config(**LABELS),
}


def hf_clip(name: str) -> nn.Module:
    """A model of transformers, CLIP's or SigLIP's, with no idle weight."""
    return tiny.randomised(getattr(transformers, name)(HF_CLIP_CONFIGS[name]()))


def with_trunk_prefix(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights, those of an image tower alone below "vision_model." as transformers 4 saves them and we do."""
    if "embeddings.patch_embedding.weight" not in state_dict:
        return state_dict
    return {f"vision_model.{name}": tensor for name, tensor in state_dict.items()}


def _hf_clip_blocks(model: nn.Module) -> list[Iterable[nn.Module]]:
    vision = getattr(model, "vision_model", model)
    towers = [vision, model.text_model] if hasattr(model, "text_model") else [vision]
    return [getattr(tower, "vision_model", tower).encoder.layers for tower in towers]


def _run_hf_clip(model: nn.Module, inputs: SampleInputs) -> Outputs:
    if hasattr(model, "text_model"):
        output = model(pixel_values=inputs.pixel_values, input_ids=inputs.input_ids)
        return {"logits_per_image": output.logits_per_image}
    output = model(inputs.pixel_values)
    names = {"logits": "logits", "image_embeds": "image_features", "pooler_output": "pooler_output"}
    return {ours: output[theirs] for theirs, ours in names.items() if theirs in output}


def _ours_of_hf_clip(name: str) -> tuple[str, set[str]]:
    if "Classification" in name:
        return "VitEmbedForImageClassification", {"logits"}
    if "Vision" in name:
        is_projected = "Projection" in name
        return ("VitEmbedModelWithProjection", {"image_features"}) if is_projected else ("VitEmbedModel", TRUNK)
    return "VitEmbedForContrastive", DUAL


def _reload_hf_clip(folder: Path, model: nn.Module) -> nn.Module:
    back, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()) and back.config.architectures == [type(model).__name__]
    for tower in ("vision_config", "text_config"):
        theirs, ours = (getattr(each.config, tower, each.config).to_dict() for each in (model, back))
        # Of a dual encoder's text tower nothing reads the width of its own; SigLIP's special tokens are not read.
        unread = {"projection_dim", "bos_token_id", "eos_token_id", "_name_or_path", "dtype", "torch_dtype"}
        assert {key: ours[key] for key in ours if key not in unread} == {
            key: theirs[key] for key in theirs if key not in unread
        }
    return back.eval()


# The attention pooling of SigLIP, which its classifier has and does not read.
SIGLIP_POOLER = ("probe",) + tuple(
    f"{part}{kind}"
    for part in ("attention.in_proj_", "attention.out_proj.", "layernorm.", "mlp.fc1.", "mlp.fc2.")
    for kind in ("weight", "bias")
)
HF_CLIP = [
    Case(
        "hf_clip",
        name,
        partial(of_transformers, partial(hf_clip, name)),
        _hf_clip_blocks,
        _run_hf_clip,
        *_ours_of_hf_clip(name),
        back=None if "Classification" in name else "folder",
        reload=_reload_hf_clip,
        is_keyed=name in ("CLIPModel", "CLIPVisionModelWithProjection", "SiglipForImageClassification"),
        # A classifier reads neither the pooler nor CLIP's last norm; without the projection it is another class.
        free={
            "CLIPForImageClassification": ("post_layernorm.weight", "post_layernorm.bias"),
            "SiglipForImageClassification": tuple(f"head.{key}" for key in SIGLIP_POOLER),
        }.get(name, ()),
    )
    for name in HF_CLIP_CONFIGS
]


# transformers: ViT, DeiT, DINOv2

VIT_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-3,
    "num_labels": 5,
}
DINO_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "mlp_ratio": 2,
    "image_size": 70,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-3,
}
REGISTERS = {"num_register_tokens": 3}
# What a file alone does not show.
BARE_OPTIONS = {"num_attention_heads": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-3}


def hf_vit(model_class: str, config_class: str, **overrides: Any) -> nn.Module:
    options = {"add_pooling_layer": False} if model_class in ("ViTModel", "DeiTModel") else {}
    config = getattr(transformers, config_class)(**{**VIT_SIZES, **overrides})
    return tiny.randomised(getattr(transformers, model_class)(config, **options))


def dinov2(model_class: str = "Dinov2Model", config_class: str = "Dinov2Config", **overrides: Any) -> nn.Module:
    config = getattr(transformers, config_class)(**{**DINO_SIZES, **overrides})
    return tiny.randomised(getattr(transformers, model_class)(config))


HF_VIT_MODELS = {
    "ViTModel": partial(hf_vit, "ViTModel", "ViTConfig"),
    "ViTForImageClassification": partial(hf_vit, "ViTForImageClassification", "ViTConfig"),
    "DeiTModel": partial(hf_vit, "DeiTModel", "DeiTConfig"),
    "DeiTForImageClassification": partial(hf_vit, "DeiTForImageClassification", "DeiTConfig"),
}
DINOV2_MODELS = {
    "Dinov2Model": dinov2,
    "Dinov2WithRegistersModel": partial(dinov2, "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **REGISTERS),
}


def _hf_vit_blocks(model: nn.Module) -> list[Iterable[nn.Module]]:
    trunk = model.base_model
    layers = getattr(trunk, "layers", None)
    return [trunk.encoder.layer if layers is None else layers]


def _run_hf_vit(model: nn.Module, inputs: SampleInputs) -> Outputs:
    output = model(inputs.pixel_values)
    return {"logits": output.logits} if "logits" in output else {"pooler_output": output.last_hidden_state[:, 0]}


def _meta(make: Callable[[], nn.Module], folder: Path) -> Source:
    """DINOv2 as Meta's own files have it; what it computes is what transformers does."""
    model = make()
    state_dict, _ = saved(model, folder / "saved")
    return of_file(model, folder / "meta", by_meta(state_dict))


HF_VIT = [
    Case(
        "hf_vit",
        name,
        partial(of_transformers, make),
        _hf_vit_blocks,
        _run_hf_vit,
        "VitEmbedForImageClassification" if "Classification" in name else "VitEmbedModel",
        {"last_hidden_state", "logits" if "Classification" in name else "pooler_output"},
        back=None,
        is_keyed=name == "DeiTForImageClassification",
        free=("classifier.weight",),  # without which `classifier.bias` is over
    )
    for name, make in HF_VIT_MODELS.items()
]
DINOV2 = [
    Case(
        "dinov2",
        f"{name}{form}",
        partial(of_transformers if form == "" else _meta, make),
        _hf_vit_blocks,
        _run_hf_vit,
        "VitEmbedModel",
        TRUNK,
        back=None,
        is_keyed="Registers" in name,
        options={} if form == "" else BARE_OPTIONS,
        # Dinov2Config(use_mask_token=False) has no mask token; without registers it is another model of Meta's.
        free=("embeddings.mask_token",) if form == "" else ("register_tokens",),
    )
    for name, make in DINOV2_MODELS.items()
    for form in ("", " of Meta")
]


# DeepSeek-OCR, and torch's own layers


def _deepseek(folder: Path) -> Source:
    """The published model, small: two shards and their index, its config."""
    model = deepseek_reference.deepseek_clip()
    state_dict, config = deepseek_reference.whole_model(model), deepseek_reference.whole_config()
    folder.mkdir(parents=True)
    names = sorted(state_dict)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, keys in shards.items():
        save_file({key: state_dict[key].contiguous() for key in keys}, folder / shard)
    index = {"weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return Source(model, folder, state_dict, config)


DEEPSEEK_OCR = [
    Case(
        "deepseek_ocr",
        "whole model",
        _deepseek,
        lambda model: [model.layers],
        lambda model, inputs: {"last_hidden_state": model(inputs.pixel_values)[-1]},
        "VitEmbedModel",
        set(),  # its code comes with the weights, and is never run
        back=None,
        free=("embeddings.position_ids",),
        part="model.vision_model.",
    )
]


def _torch_encoder(source_class: type[nn.Module], folder: Path) -> Source:
    return of_file(torch_encoder.small(source_class), folder)


def _run_torch_encoder(model: nn.Module, inputs: SampleInputs) -> Outputs:
    output = model(inputs.pixel_values)
    name = {"ViTTiny": "pooler_output", "MiniViT": "logits", "MiniViTDepth": "predicted_depth"}[type(model).__name__]
    return {name: output[0][:, 0] if isinstance(output, tuple) else output}


TORCH_ENCODER = [
    Case(
        "torch_encoder",
        source_class.__name__,
        partial(_torch_encoder, source_class),
        lambda model: [getattr(model, "blocks", None) or model.encoder.layers],
        _run_torch_encoder,
        model_class,
        TRUNK | {outputs} if outputs else TRUNK,
        options={name: value for name, value in vars(torch_encoder.OPTIONS[source_class]).items() if value},
        back="file",
        # A patch convolution, a final norm and a head may be there or not, with a bias or without.
        free=("proj.bias", "patch_embed.bias", "norm.weight", "norm.bias", "head.weight"),
    )
    for source_class, model_class, outputs in (
        (torch_encoder.ViTTiny, "VitEmbedModel", None),
        (torch_encoder.MiniViT, "VitEmbedForImageClassification", "logits"),
        (torch_encoder.MiniViTDepth, "VitEmbedForDepthEstimation", "predicted_depth"),
    )
]

CASES = [*OPENAI, *OPEN_CLIP, *TIMM, *HF_CLIP, *HF_VIT, *DINOV2, *DEEPSEEK_OCR, *TORCH_ENCODER]
NAMED_CASES = {str(case): case for case in CASES}
