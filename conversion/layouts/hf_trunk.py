"""What the ViT, DeiT and DINOv2 of transformers have in common: names, fields of their configs, and how they run."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from vit_embed import VitEmbedConfig
from vit_embed.conversion.layouts.layout import ConversionOptions, SourceConfig, StateDict
from vit_embed.conversion.layouts.questions import (
    check_sizes,
    count_layers,
    read_transformers_config,
    resolve,
    table_image_size,
)
from vit_embed.conversion.layouts.rules import Rule, rule
from vit_embed.conversion.layouts.running import as_float32
from vit_embed.conversion.messages import listing
from vit_embed.conversion.processor_files import (
    IMAGENET_IMAGE_MEAN,
    IMAGENET_IMAGE_STD,
    clip_image_processor,
    sides,
)


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


# What weights alone do not show.
BARE_OPTIONS = ("num_attention_heads", "hidden_act", "layer_norm_eps", "image_size")

# Every `save_pretrained` up to 5.23 writes the names of transformers 4; since 5 the modules are called otherwise in
# memory, so that a file of `model.state_dict()` has new names. Both are read.
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
QUERY_BIASES = ("attention.attention.query.bias", "attention.q_proj.bias")


def embedding_rules(prefix: str) -> tuple[Rule, ...]:
    """What these models have around their layers."""
    return (
        rule(f"{prefix}embeddings.cls_token", "vision_model.embeddings.class_embedding", leading=2),
        rule(f"{prefix}embeddings.patch_embeddings.projection.{{p}}", "vision_model.embeddings.patch_embedding.{p}"),
        rule(f"{prefix}embeddings.position_embeddings", "vision_model.embeddings.position_embedding.weight", leading=1),
        rule(f"{prefix}embeddings.mask_token"),  # stands for hidden patches in training
        rule(f"{prefix}layernorm.{{p}}", "vision_model.post_layernorm.{p}"),
    )


def find_prefix(state_dict: StateDict, prefixes: Iterable[str]) -> str | None:
    """What stands before the embeddings' names, or None where none of them is there."""
    return next((prefix for prefix in prefixes if f"{prefix}embeddings.cls_token" in state_dict), None)


def find_layers(state_dict: StateDict, prefix: str, stacks: Iterable[str]) -> str | None:
    """Where the layers are, with the prefix: the first of `stacks` that has a layer 0."""
    return next((prefix + stack for stack in stacks if count_layers(state_dict, prefix + stack)), None)


def has_query_bias(state_dict: StateDict, layers: str) -> bool:
    return any(f"{layers}.0.{name}" in state_dict for name in QUERY_BIASES)


def read_config(source_config: SourceConfig, families: Mapping[str, Family]) -> PretrainedConfig | None:
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
    return read_transformers_config(source_config, families[model_type].config)


def without_heads(
    state_dict: StateDict, prefixes: Sequence[str], heads: Mapping[str, str], trunk_only: bool
) -> StateDict:
    """The weights without those of heads that there is no place for.

    Args:
        prefixes: what may stand before the beginnings that are keys of `heads`.
        heads: {how keys begin: what they are}.
        trunk_only: whether they may be left out.

    Raises:
        ValueError: there are such weights, and they may not be left out; names one of each kind.
    """
    found = {
        key: what
        for key in state_dict
        for begin, what in heads.items()
        if any(key.startswith(prefix + begin) for prefix in prefixes)
    }
    if found and not trunk_only:
        first = {what: key for key, what in reversed(found.items())}
        named = "; ".join(f"{key} is of {what}" for what, key in first.items())
        raise ValueError(f"vit_embed has no place for this: {named}; convert the trunk without it by --trunk_only")
    return {key: tensor for key, tensor in state_dict.items() if key not in found}


def trunk_fields(
    state_dict: StateDict,
    prefix: str,
    layers: str,
    mlp: str,
    num_token_positions: int,
    source: PretrainedConfig | None,
    options: ConversionOptions,
) -> dict[str, Any]:
    """The fields of VitEmbedConfig that a trunk of transformers gives, sizes from shapes, the rest from its config.

    Args:
        layers: where they are.
        mlp: the first matrix of an MLP.
        num_token_positions: rows of the position table before the patches'.

    Raises:
        ValueError: a tensor of another rank, sizes other than the config's, or nothing that says a value.
    """
    projection = f"{prefix}embeddings.patch_embeddings.projection.weight"
    positions = f"{prefix}embeddings.position_embeddings"
    sizes = {
        projection: ("width", "channels", "patch height", "patch width"),
        positions: ("1", "tokens + patches", "width"),
        mlp: ("MLP width", "width"),
    }
    check_sizes(state_dict, sizes, "a ViT of transformers")
    width, channels, *patch_size = state_dict[projection].shape
    num_patches = state_dict[positions].shape[1] - num_token_positions
    shown = {
        "hidden_size": width,
        "num_hidden_layers": count_layers(state_dict, layers),
        "intermediate_size": state_dict[mlp].shape[0],
        "num_channels": channels,
        "patch_size": tuple(patch_size),
    }
    image_size = options.image_size
    if source is not None:
        image_size = resolve(options, "image_size", _whole_patches(source, num_patches))
        said = {name: _said(source, name) for name in shown}
        wrong = [f"{name}={said[name]!r} (here {value})" for name, value in shown.items() if said[name] != value]
        if wrong:
            raise ValueError(f"config.json contradicts the shapes of the weights: {', '.join(wrong)}")
    return {
        **shown,
        "image_size": table_image_size(num_patches, tuple(patch_size), image_size),
        "num_attention_heads": resolve(options, "num_attention_heads", getattr(source, "num_attention_heads", None)),
        "hidden_act": resolve(options, "hidden_act", getattr(source, "hidden_act", None)),
        "layer_norm_eps": resolve(options, "layer_norm_eps", getattr(source, "layer_norm_eps", None)),
        "hidden_dropout_prob": 0.0 if source is None else source.hidden_dropout_prob,
        "attention_dropout": 0.0 if source is None else source.attention_probs_dropout_prob,
        "patch_bias": True,
        "use_pre_layernorm": False,
    }


def _said(source: PretrainedConfig, name: str) -> Any:
    """A size that the config says, pairs as tuples."""
    if name == "intermediate_size" and hasattr(source, "mlp_ratio"):  # DINOv2
        return int(source.hidden_size * source.mlp_ratio)
    value = getattr(source, name)
    return as_pair(value) if name == "patch_size" else value


def as_pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _whole_patches(source: PretrainedConfig, num_patches: int) -> tuple[int, int]:
    """The (height, width) in pixels that the config states, less a remainder that the model does not see.

    Raises:
        ValueError: it has another number of patches than the position table.
    """
    patch_size = as_pair(source.patch_size)
    rows, columns = (size // side for size, side in zip(as_pair(source.image_size), patch_size))
    if rows * columns != num_patches:
        raise ValueError(
            f"config.json contradicts the shapes of the weights: image_size={source.image_size!r} and "
            f"patch_size={source.patch_size!r} make {rows * columns} patches (here {num_patches})"
        )
    return rows * patch_size[0], columns * patch_size[1]


def imagenet_image_processor(config: VitEmbedConfig) -> dict[str, Any]:
    """The evaluation on ImageNet of DeiT and DINOv2: the shorter side to 256, the middle 224, ImageNet's statistics.

    Models of other patches than fit into 224 take their own image size, with the same margin.
    """
    fits = all(224 % side == 0 for side in config.patch_shape)
    side = 224 if fits else min(config.image_shape)
    return clip_image_processor(
        config,
        size={"shortest_edge": round(side * 256 / 224)},
        do_center_crop=True,
        crop_size=sides((side, side) if fits else config.image_shape),
        image_mean=IMAGENET_IMAGE_MEAN,
        image_std=IMAGENET_IMAGE_STD,
    )


# Running the source


def trunk_outputs(output: Any) -> dict[str, torch.Tensor]:
    """Outputs of a trunk of transformers by our names: its `last_hidden_state` is after the final norm."""
    return {"last_hidden_state": output.hidden_states[-1], "pooler_output": output.last_hidden_state[:, 0]}


def running_config(
    source_config: SourceConfig, families: Mapping[str, Family], config: VitEmbedConfig, bare: Mapping[str, Any]
) -> PretrainedConfig:
    """The config that a source runs with: its own or, without one, `bare` with our sizes; in either what an option may
    have changed is as it is in `config`."""
    source = read_config(source_config, families)
    if source is None:
        names = ("hidden_size", "num_hidden_layers", "image_size", "patch_size", "num_channels", "qkv_bias")
        source = read_config({**{name: getattr(config, name) for name in names}, **bare}, families)
    for name in ("num_attention_heads", "hidden_act", "layer_norm_eps"):
        setattr(source, name, getattr(config, name))
    return source


def load(model_class: str, source: PretrainedConfig, state_dict: StateDict, **options: Any) -> PreTrainedModel:
    """A model of transformers with these weights in float32, by transformers' own reading of their names.

    Raises:
        ImportError: the installed release has other names for some of them.
    """
    model, found = getattr(transformers, model_class).from_pretrained(
        None,
        config=source,
        state_dict=as_float32(state_dict),
        dtype=torch.float32,
        output_loading_info=True,
        **options,
    )
    if missing := [*found["missing_keys"], *found["unexpected_keys"]]:
        raise ImportError(f"{model_class} of transformers {transformers.__version__} does not know {listing(missing)}")
    return model.eval()
