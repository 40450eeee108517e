"""The two towers that CLIPModel and SiglipModel of transformers share: their names, and fields of their configs."""

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from vit_embed import VitEmbedConfig
from vit_embed.configuration_vit_embed import CLIP_VISION_FIELDS
from vit_embed.conversion.layouts.questions import require
from vit_embed.conversion.layouts.rules import Rule, layer_rules, rule

LAYER_NAMES = {
    name: name
    for name in (
        "layer_norm1.{p}",
        *(f"self_attn.{each}_proj.{{p}}" for each in ("q", "k", "v", "out")),
        "layer_norm2.{p}",
        "mlp.fc1.{p}",
        "mlp.fc2.{p}",
    )
}
# Of the image tower, below "vision_model." or, as transformers 5 saves image towers alone, below nothing.
TRUNK_NAMES = (
    "embeddings.class_embedding",
    "embeddings.patch_embedding.{p}",
    "embeddings.position_embedding.weight",
    "pre_layrnorm.{p}",
    "post_layernorm.{p}",
)
TEXT_NAMES = (
    "text_model.embeddings.token_embedding.weight",
    "text_model.embeddings.position_embedding.weight",
    "text_model.final_layer_norm.{p}",
)
TEXT_RULES = (
    *(rule(name, name) for name in TEXT_NAMES),
    *layer_rules("text_model.encoder.layers.{n}", "text_model.encoder.layers.{n}", LAYER_NAMES),
)

# Fields that a tower's config shares by name with ours.
VISION_FIELDS = CLIP_VISION_FIELDS
TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def trunk_rules(prefix: str) -> tuple[Rule, ...]:
    """The rules of an image tower whose names start with `prefix`."""
    return (
        *(rule(prefix + name, f"vision_model.{name}") for name in TRUNK_NAMES),
        *layer_rules(f"{prefix}encoder.layers.{{n}}", "vision_model.encoder.layers.{n}", LAYER_NAMES),
        Rule(f"{prefix}embeddings.position_ids"),
    )


def vision_part(source: PretrainedConfig) -> PretrainedConfig:
    """The config of the image tower, in that of a dual encoder or alone."""
    return getattr(source, "vision_config", source)


def fields_of(config: PretrainedConfig, names: tuple[str, ...]) -> dict[str, Any]:
    """{name: value} of a config, of the names that it has."""
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def source_class(config: VitEmbedConfig, classes: Mapping[str, str], package: str) -> str:
    """The class of transformers for one of ours; raises ValueError where there is none, and for rectangles, of which
    these classes know none."""
    name = config.architectures[0]
    if name not in classes:
        raise ValueError(f"{package} has no class for a {name}; it has them for {', '.join(classes)}")
    require(config, {"image_size": config.image_shape[0], "patch_size": config.patch_shape[0]}, package)
    return classes[name]
