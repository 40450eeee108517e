"""Layout "hf_vit": ViT and DeiT of transformers (`ViTModel`, `DeiTModel` and what stands on them).

Every `save_pretrained` up to 5.23 writes the names of transformers 4; since 5 the modules are called otherwise in
memory, so that a file of `model.state_dict()` has new names. Both are read. What the DINOv2 of transformers shares with
these is here too.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from vit_embed import VitEmbedConfig
from vit_embed.checkpoint_reader import listing
from vit_embed.layouts.hf_clip import with_remainder
from vit_embed.layouts.image_processors import BILINEAR, IMAGENET_IMAGE_MEAN, IMAGENET_IMAGE_STD
from vit_embed.layouts.rules import (
    ConversionOptions,
    Layout,
    Rule,
    SampleInputs,
    SourceConfig,
    StateDict,
    as_class,
    as_float32,
    check_sizes,
    convert_weights,
    count_layers,
    image_size_of,
    known,
    layer_rules,
    left_out,
    rule,
)
from vit_embed.saving_vit_embed import image_processor_dict


@dataclass(frozen=True)
class Family:
    """The classes of transformers that share a `model_type`.

    model: what computes tokens, and what it is built with beside its config.
    classifier: the class with a linear layer on the class token, or None.
    """

    config: str
    model: str
    options: Mapping[str, Any]
    classifier: str | None = None


FAMILIES = {
    "vit": Family("ViTConfig", "ViTModel", {"add_pooling_layer": False}, "ViTForImageClassification"),
    "deit": Family("DeiTConfig", "DeiTModel", {"add_pooling_layer": False}, "DeiTForImageClassification"),
    "vit_mae": Family("ViTMAEConfig", "ViTMAEModel", {}),
}
# What a file of weights alone does not say.
TOLD_OPTIONS = ("num_attention_heads", "hidden_act", "layer_norm_eps", "image_size")
# What the classes put before the names of their trunk; a trunk saved alone has none of it.
PREFIXES = ("", "vit.", "deit.")

# The names of transformers 4, which are those of files; then those of transformers 5 in memory.
ATTENTION_NAMES = {
    "attention.attention.query.{p}": "self_attn.q_proj.{p}",
    "attention.attention.key.{p}": "self_attn.k_proj.{p}",
    "attention.attention.value.{p}": "self_attn.v_proj.{p}",
    "attention.output.dense.{p}": "self_attn.out_proj.{p}",
}
NEW_ATTENTION_NAMES = {
    "attention.q_proj.{p}": "self_attn.q_proj.{p}",
    "attention.k_proj.{p}": "self_attn.k_proj.{p}",
    "attention.v_proj.{p}": "self_attn.v_proj.{p}",
    "attention.o_proj.{p}": "self_attn.out_proj.{p}",
}
NORM_NAMES = {"layernorm_before.{p}": "layer_norm1.{p}", "layernorm_after.{p}": "layer_norm2.{p}"}
LAYER_NAMES = {
    **NORM_NAMES,
    **ATTENTION_NAMES,
    "intermediate.dense.{p}": "mlp.fc1.{p}",
    "output.dense.{p}": "mlp.fc2.{p}",
}
NEW_LAYER_NAMES = {**NORM_NAMES, **NEW_ATTENTION_NAMES, "mlp.fc1.{p}": "mlp.fc1.{p}", "mlp.fc2.{p}": "mlp.fc2.{p}"}
# Where the layers are, and the first matrix of their MLP.
STACKS = {"encoder.layer": "intermediate.dense.weight", "layers": "mlp.fc1.weight"}

CLASSIFIER_RULES = (rule("classifier.{p}", "classifier.{p}"),)
# What there is no place for, by how its keys begin.
HEADS = {
    "pooler.": "the dense layer with tanh behind the class token (ViTModel has none with add_pooling_layer=False)",
    "cls_classifier.": "DeiTForImageClassificationWithTeacher, the mean of two classifiers on two tokens",
    "distillation_classifier.": "DeiTForImageClassificationWithTeacher, the mean of two classifiers on two tokens",
    "decoder.": "the decoder of masked image modelling, which predicts hidden pixels",
}


def detect(state_dict: StateDict, source_config: SourceConfig) -> str | None:
    """The keys of ViT's embeddings, layers with `layernorm_before`, and no config of another model beside them."""
    prefix = prefix_of(state_dict, PREFIXES)
    stack = None if prefix is None else stack_of(state_dict, prefix, STACKS)
    if stack is None or f"{stack}.0.layernorm_before.weight" not in state_dict:
        return None
    if source_config and source_config.get("model_type") not in tuple(FAMILIES):
        return None
    return (
        "it has the keys of transformers' ViT" if source_config else "it has the keys of transformers' ViT, no config"
    )


def convert(
    state_dict: StateDict, source_config: SourceConfig, options: ConversionOptions
) -> tuple[VitEmbedConfig, dict[str, torch.Tensor]]:
    """ViT or DeiT of transformers.

    DeiT's distillation token becomes a register: ours have no position, so the sum of the token and its position, which
    is what DeiT computes, is stored.

    Args:
        state_dict: of ViTModel or DeiTModel without its pooler, or of the image classifier with one of them; with
            `trunk_only` of any class, its heads left out.
        source_config: the config.json of transformers. Without it `num_attention_heads`, `hidden_act` and
            `layer_norm_eps` have to be told.

    Returns:
        The config and the state dict of VitEmbedModel, or VitEmbedForImageClassification. `last_hidden_state` of ours
        is before the final norm, that of transformers behind it.

    Raises:
        ValueError: a head or a pooler that has no place here, sizes that contradict each other or the config.
    """
    prefix = prefix_of(state_dict, PREFIXES)
    stack = None if prefix is None else stack_of(state_dict, prefix, STACKS)
    if stack is None:
        raise ValueError(f"not a ViT of transformers; its own keys are {listing(list(state_dict))}")
    stated = stated_config(source_config, FAMILIES)
    if not options.trunk_only and stated is not None and stated.model_type == "vit_mae":
        raise ValueError("a ViTMAEModel hides patches at random; convert the trunk, which sees all, with --trunk_only")
    state_dict = without_heads(state_dict, (prefix, ""), HEADS, options)
    has_classifier = "classifier.weight" in state_dict
    config = _config(state_dict, prefix, stack, stated, options, has_classifier and not options.trunk_only)
    head_rules = left_out(CLASSIFIER_RULES) if options.trunk_only else CLASSIFIER_RULES
    folded = _without_token_positions(state_dict, prefix)
    return config, convert_weights(config, folded, (*_trunk_rules(prefix), *head_rules), options.dtype)


def _trunk_rules(prefix: str) -> tuple[Rule, ...]:
    return (
        *embedding_rules(prefix),
        rule(f"{prefix}embeddings.distillation_token", "vision_model.embeddings.register_tokens", leading=1),
        *layer_rules(f"{prefix}encoder.layer.{{n}}", "vision_model.encoder.layers.{n}", LAYER_NAMES),
        *layer_rules(f"{prefix}layers.{{n}}", "vision_model.encoder.layers.{n}", NEW_LAYER_NAMES),
    )


def embedding_rules(prefix: str) -> tuple[Rule, ...]:
    """What every ViT of transformers has around its layers."""
    return (
        rule(f"{prefix}embeddings.cls_token", "vision_model.embeddings.class_embedding", leading=2),
        rule(f"{prefix}embeddings.patch_embeddings.projection.{{p}}", "vision_model.embeddings.patch_embedding.{p}"),
        rule(f"{prefix}embeddings.position_embeddings", "vision_model.embeddings.position_embedding.weight", leading=1),
        rule(f"{prefix}embeddings.mask_token"),  # stands for hidden patches in training
        rule(f"{prefix}layernorm.{{p}}", "vision_model.post_layernorm.{p}"),
    )


def _without_token_positions(state_dict: StateDict, prefix: str) -> StateDict:
    """DeiT's positions without the distillation token's, which is added to the token; other files as they are."""
    token, positions = f"{prefix}embeddings.distillation_token", f"{prefix}embeddings.position_embeddings"
    if token not in state_dict:
        return state_dict
    if state_dict[token].shape != (1, 1, state_dict[positions].shape[2]):
        width = state_dict[positions].shape[2]
        raise ValueError(f"{token} must be (1, 1, {width}), got {tuple(state_dict[token].shape)}")
    table = state_dict[positions]
    return {
        **state_dict,
        token: state_dict[token].float() + table[:, 1:2].float(),
        positions: torch.cat([table[:, :1], table[:, 2:]], dim=1),
    }


def _config(
    state_dict: StateDict,
    prefix: str,
    stack: str,
    stated: PretrainedConfig | None,
    options: ConversionOptions,
    is_classifier: bool,
) -> VitEmbedConfig:
    distilled = f"{prefix}embeddings.distillation_token" in state_dict
    if stated is not None and (stated.model_type == "deit") != distilled:
        has = "a" if distilled else "no"
        raise ValueError(f"config.json says model_type={stated.model_type!r}, but there is {has} distillation token")
    mlp = f"{stack}.0.{STACKS[stack.removeprefix(prefix)]}"
    fields = trunk_fields(state_dict, prefix, stack, mlp, 1 + distilled, stated, options)
    bias = f"{stack}.0.attention.attention.query.bias", f"{stack}.0.attention.q_proj.bias"
    return VitEmbedConfig(
        **fields,
        **(classifier_fields(state_dict, stated) if is_classifier else {}),
        architectures=["VitEmbedForImageClassification" if is_classifier else "VitEmbedModel"],
        converted_from={"layout": "hf_vit"},
        num_register_tokens=int(distilled),
        qkv_bias=any(key in state_dict for key in bias),
    )


# What the ViTs of transformers have in common


def prefix_of(state_dict: StateDict, prefixes: Iterable[str]) -> str | None:
    """What stands before the embeddings' names, or None where none of them is there."""
    return next((prefix for prefix in prefixes if f"{prefix}embeddings.cls_token" in state_dict), None)


def stack_of(state_dict: StateDict, prefix: str, stacks: Iterable[str]) -> str | None:
    """Where the layers are, with the prefix: the first of `stacks` that has a layer 0."""
    return next((prefix + stack for stack in stacks if count_layers(state_dict, prefix + stack)), None)


def stated_config(source_config: SourceConfig, families: Mapping[str, Family]) -> PretrainedConfig | None:
    """The config.json as the class of transformers reads it, with its defaults; None where there is none.

    Raises:
        ValueError: a config of another model, or values that the class refuses.
    """
    if not source_config:
        return None
    model_type = source_config.get("model_type")
    if model_type not in tuple(families):  # of any type, a list as well
        raise ValueError(
            f"config.json must have model_type {' or '.join(families)} for these weights, got {model_type!r}"
        )
    return as_class(source_config, families[model_type].config)


def without_heads(
    state_dict: StateDict, prefixes: Sequence[str], heads: Mapping[str, str], options: ConversionOptions
) -> StateDict:
    """The weights without those of heads that there is no place for.

    Args:
        prefixes: what may stand before the beginnings that are keys of `heads`.
        heads: {how keys begin: what they are}.

    Raises:
        ValueError: there are such weights, and `trunk_only` does not ask to leave them out; names one of each kind.
    """
    found = {
        key: what
        for key in state_dict
        for begin, what in heads.items()
        if any(key.startswith(prefix + begin) for prefix in prefixes)
    }
    if found and not options.trunk_only:
        first = {what: key for key, what in reversed(found.items())}
        named = "; ".join(f"{key} is of {what}" for what, key in first.items())
        raise ValueError(f"vit_embed has no place for this: {named}; convert the trunk without it by --trunk_only")
    return {key: tensor for key, tensor in state_dict.items() if key not in found}


def trunk_fields(
    state_dict: StateDict,
    prefix: str,
    stack: str,
    mlp: str,
    num_token_positions: int,
    stated: PretrainedConfig | None,
    options: ConversionOptions,
) -> dict[str, Any]:
    """The fields of VitEmbedConfig that a trunk of transformers gives, sizes from shapes, the rest from its config.

    Args:
        stack: where the layers are.
        mlp: the first matrix of an MLP.
        num_token_positions: rows of the position table before the patches'.

    Raises:
        ValueError: a tensor of another rank, sizes other than the config states, or nothing that says a value.
    """
    projection, positions = (
        f"{prefix}embeddings.patch_embeddings.projection.weight",
        f"{prefix}embeddings.position_embeddings",
    )
    sizes = {
        projection: ("width", "channels", "patch height", "patch width"),
        positions: ("1", "tokens + patches", "width"),
        mlp: ("MLP width", "width"),
    }
    check_sizes(state_dict, sizes, "a ViT of transformers")
    width, channels, *patch_size = state_dict[projection].shape
    num_patches = state_dict[positions].shape[1] - num_token_positions
    read = {
        "hidden_size": width,
        "num_hidden_layers": count_layers(state_dict, stack),
        "intermediate_size": state_dict[mlp].shape[0],
        "num_channels": channels,
        "patch_size": tuple(patch_size),
    }
    image_size = options.image_size
    if stated is not None:
        image_size = known(image_size, _whole_patches(stated, num_patches), "image_size", "--image_size")
        said = {name: _stated_size(stated, name) for name in read}
        wrong = [f"{name}={said[name]!r} (here {value})" for name, value in read.items() if said[name] != value]
        if wrong:
            raise ValueError(f"config.json contradicts the shapes of the weights: {', '.join(wrong)}")
    return {
        **read,
        "image_size": image_size_of(num_patches, tuple(patch_size), replace(options, image_size=image_size)),
        "num_attention_heads": _known(options, stated, "num_attention_heads", "the number of heads"),
        "hidden_act": _known(options, stated, "hidden_act", "the activation"),
        "layer_norm_eps": _known(options, stated, "layer_norm_eps", "what norms add to the variance"),
        "hidden_dropout_prob": 0.0 if stated is None else stated.hidden_dropout_prob,
        "attention_dropout": 0.0 if stated is None else stated.attention_probs_dropout_prob,
        "patch_bias": True,
        "use_pre_layernorm": False,
    }


def _known(options: ConversionOptions, stated: PretrainedConfig | None, name: str, what: str) -> Any:
    return known(getattr(options, name), getattr(stated, name, None), what, f"--{name}")


def _stated_size(stated: PretrainedConfig, name: str) -> Any:
    """A size that the config says, pairs as tuples."""
    if name == "intermediate_size" and hasattr(stated, "mlp_ratio"):  # DINOv2
        return int(stated.hidden_size * stated.mlp_ratio)
    value = getattr(stated, name)
    return _pair(value) if name == "patch_size" else value


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _whole_patches(stated: PretrainedConfig, num_patches: int) -> tuple[int, int]:
    """The (height, width) in pixels that the config states, less a remainder that the model does not see.

    Raises:
        ValueError: it has another number of patches than the position table.
    """
    patch_size = _pair(stated.patch_size)
    rows, columns = (size // side for size, side in zip(_pair(stated.image_size), patch_size))
    if rows * columns != num_patches:
        raise ValueError(
            f"config.json contradicts the shapes of the weights: image_size={stated.image_size!r} and "
            f"patch_size={stated.patch_size!r} make {rows * columns} patches (here {num_patches})"
        )
    return rows * patch_size[0], columns * patch_size[1]


def classifier_fields(state_dict: StateDict, stated: PretrainedConfig | None) -> dict[str, Any]:
    """The names of the classes that `classifier.weight` tells apart.

    Raises:
        ValueError: the config names another number of classes.
    """
    check_sizes(state_dict, {"classifier.weight": ("classes", "width")}, "an image classifier of transformers")
    num_labels = state_dict["classifier.weight"].shape[0]
    if stated is None:
        return {"num_labels": num_labels}
    if len(stated.id2label) != num_labels:
        raise ValueError(
            f"config.json names {len(stated.id2label)} classes in id2label, classifier.weight has {num_labels}"
        )
    return {"id2label": stated.id2label, "label2id": stated.label2id, "problem_type": stated.problem_type}


def image_processor(source_config: SourceConfig, config: VitEmbedConfig) -> dict[str, Any]:
    """As the published ViTs were trained: the whole image made square, to [-1, 1]; DeiT as on ImageNet, cropped."""
    if config.num_register_tokens:
        return imagenet_image_processor(config)
    height, width = config.image_shape
    return {
        **image_processor_dict(config, "CLIPImageProcessor"),
        "resample": BILINEAR,
        "size": {"height": height, "width": width},
        "do_center_crop": False,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def imagenet_image_processor(config: VitEmbedConfig) -> dict[str, Any]:
    """The evaluation on ImageNet of DeiT and DINOv2: the shorter side to 256, the middle 224, ImageNet's statistics.

    Models of other patches than fit into 224 take their own image size, with the same margin.
    """
    fits = all(224 % side == 0 for side in config.patch_shape)
    side = 224 if fits else min(config.image_shape)
    return {
        **image_processor_dict(config, "CLIPImageProcessor"),
        "size": {"shortest_edge": round(side * 256 / 224)},
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side} if fits else dict(zip(("height", "width"), config.image_shape)),
        "image_mean": IMAGENET_IMAGE_MEAN,
        "image_std": IMAGENET_IMAGE_STD,
    }


# Running the source


@torch.no_grad()
def reference(
    state_dict: StateDict, source_config: SourceConfig, config: VitEmbedConfig, inputs: SampleInputs
) -> dict[str, torch.Tensor]:
    """What transformers computes; raises ImportError for names that the installed release does not know."""
    model_type = "deit" if config.num_register_tokens else "vit"
    bare = {"model_type": model_type, "intermediate_size": config.intermediate_size}
    stated = transformers_config(source_config, FAMILIES, config, bare)
    family = FAMILIES[stated.model_type]
    prefix = prefix_of(state_dict, PREFIXES)
    trunk_alone = config.architectures == ["VitEmbedModel"]
    heads = {**HEADS, "embeddings.mask_token": "", **({"classifier.": ""} if trunk_alone else {})}
    state_dict = without_heads(state_dict, (prefix, ""), heads, ConversionOptions(trunk_only=True))
    pixel_values = with_remainder(inputs.pixel_values, _pair(stated.image_size))
    if not trunk_alone:
        stated.num_labels = config.num_labels
        output = load(family.classifier, stated, state_dict)(pixel_values, output_hidden_states=True)
        return {"last_hidden_state": output.hidden_states[-1], "logits": output.logits}
    arguments = {}
    if stated.model_type == "vit_mae":  # it shuffles patches by noise, even where it hides none
        stated.mask_ratio = 0.0
        num_patches = math.prod(config.grid_size)
        arguments["noise"] = torch.arange(num_patches).float().expand(len(inputs.pixel_values), -1)
    model = load(family.model, stated, state_dict, **family.options)
    return trunk_outputs(model(pixel_values, output_hidden_states=True, **arguments))


def trunk_outputs(output: Any) -> dict[str, torch.Tensor]:
    """Outputs of a trunk of transformers by our names: its `last_hidden_state` is behind the final norm."""
    return {"last_hidden_state": output.hidden_states[-1], "pooler_output": output.last_hidden_state[:, 0]}


def transformers_config(
    source_config: SourceConfig, families: Mapping[str, Family], config: VitEmbedConfig, bare: Mapping[str, Any]
) -> PretrainedConfig:
    """The config that a source runs with: its own or, without one, `bare` with our sizes; in either what users may tell
    is as it is in `config`."""
    stated = stated_config(source_config, families)
    if stated is None:
        names = ("hidden_size", "num_hidden_layers", "image_size", "patch_size", "num_channels", "qkv_bias")
        stated = stated_config({**{name: getattr(config, name) for name in names}, **bare}, families)
    for name in ("num_attention_heads", "hidden_act", "layer_norm_eps"):
        setattr(stated, name, getattr(config, name))
    return stated


def load(model_class: str, stated: PretrainedConfig, state_dict: StateDict, **options: Any) -> PreTrainedModel:
    """A model of transformers with these weights in float32, by transformers' own reading of their names.

    Raises:
        ImportError: the installed release has other names for some of them.
    """
    model, found = getattr(transformers, model_class).from_pretrained(
        None,
        config=stated,
        state_dict=as_float32(state_dict),
        dtype=torch.float32,
        output_loading_info=True,
        **options,
    )
    if missing := [*found["missing_keys"], *found["unexpected_keys"]]:
        raise ImportError(f"{model_class} of transformers {transformers.__version__} does not know {listing(missing)}")
    return model.eval()


LAYOUT = Layout(detect, convert, reference, TOLD_OPTIONS, image_processor)
