"""SiglipModel of transformers (arXiv:2303.15343) and its image tower: the part of layout "hf_clip" that is SigLIP's."""

from typing import Any

from transformers import PretrainedConfig

from vit_embed import VitEmbedConfig, VitEmbedTextConfig
from vit_embed.conversion.layouts.hf_towers import (
    TEXT_FIELDS,
    TEXT_RULES,
    VISION_FIELDS,
    fields_of,
    source_class,
    vision_part,
)
from vit_embed.conversion.layouts.layout import ConversionOptions
from vit_embed.conversion.layouts.questions import layer_norm_at_end, require, resolve
from vit_embed.conversion.layouts.rules import Rule, rule
from vit_embed.conversion.processor_files import clip_image_processor, sides

PACKAGE = "transformers' SiglipModel"
CLASSES = {"VitEmbedModel": "SiglipVisionModel", "VitEmbedForContrastive": "SiglipModel"}

POOLER_NAMES = {
    "probe": ("probe",),
    "attention.in_proj_{p}": ("q_proj.{p}", "k_proj.{p}", "v_proj.{p}"),
    "attention.out_proj.{p}": ("out_proj.{p}",),
    "layernorm.{p}": ("layernorm.{p}",),
    "mlp.fc1.{p}": ("fc1.{p}",),
    "mlp.fc2.{p}": ("fc2.{p}",),
}
HEAD_RULES = (
    *TEXT_RULES,
    rule("text_model.head.{p}", "text_projection.{p}"),
    rule("logit_scale", "logit_scale", leading=1),
    rule("logit_bias", "logit_bias", leading=1),
)

# What SiglipModel takes for granted: fields of the config, of the dual encoder's, of the text tower's.
ARCHITECTURE = {
    "stem_type": "conv",
    "patch_bias": True,
    "use_cls_token": False,
    "num_register_tokens": 0,
    "position_embedding_type": "learned",
    "norm_type": "layer_norm",
    "norm_position": "pre",
    "use_pre_layernorm": False,
    "qkv_bias": True,
    "layer_scale_init_value": None,
    "pooling_type": "map",
}
DUAL_ARCHITECTURE = {"use_visual_projection": False, "contrastive_loss": "sigmoid"}
TEXT_ARCHITECTURE = {"pooling_type": "last", "use_causal_mask": False, "projection_bias": True}

# SiglipVisionConfig has none of these.
SIGLIP_VISION_FIELDS = tuple(name for name in VISION_FIELDS if name not in ("initializer_range", "projection_dim"))


def pooler_rules(prefix: str) -> tuple[Rule, ...]:
    """The rules of the attention pooling in an image tower whose names start with `prefix`."""
    return tuple(
        rule(f"{prefix}head.{name}", *(f"vision_model.pooler.{each}" for each in targets))
        for name, targets in POOLER_NAMES.items()
    )


def read_config(source: PretrainedConfig, options: ConversionOptions, is_classifier: bool) -> VitEmbedConfig:
    """Ours for a SiglipConfig or a SiglipVisionConfig. A classifier's logits are of the mean of the patches."""
    vision = vision_part(source)
    # transformers 4 knows this field only where a config.json has it.
    if not getattr(vision, "vision_use_head", True) and not is_classifier:
        raise ValueError(
            "this SigLIP image tower has no attention pooling (vision_use_head=false in its config.json), so nothing "
            "says what its pooled vector is; convert the checkpoint that it was taken from"
        )
    fields = fields_of(vision, SIGLIP_VISION_FIELDS)
    fields["hidden_act"] = resolve(options, "hidden_act", vision.hidden_act)
    if isinstance(vision.image_size, int) and isinstance(vision.patch_size, int):
        fields["image_size"] = whole_patches(vision.image_size, vision.patch_size)
    pooling = {"pooling_type": "mean", "norm_before_pooling": True} if is_classifier else {"pooling_type": "map"}
    return VitEmbedConfig(
        **fields,
        **{**ARCHITECTURE, **DUAL_ARCHITECTURE, **pooling},
        projection_dim=vision.hidden_size,
        text_config=_read_text_config(source, options) if hasattr(source, "text_config") else None,
        converted_from={"layout": "hf_clip"},
    )


def _read_text_config(source: PretrainedConfig, options: ConversionOptions) -> VitEmbedTextConfig:
    text = source.text_config
    fields = {name: getattr(text, name) for name in TEXT_FIELDS}
    fields["hidden_act"] = resolve(options, "hidden_act", text.hidden_act)
    # Google's configs leave these at CLIP's ids, beyond their vocabularies. Nothing reads them: the last place of a row
    # is its text.
    for name, instead in (("bos_token_id", None), ("eos_token_id", text.pad_token_id)):
        if not isinstance(fields[name], int) or fields[name] >= text.vocab_size:
            fields[name] = instead
    return VitEmbedTextConfig(**fields, **TEXT_ARCHITECTURE, projection_dim=source.vision_config.hidden_size)


def whole_patches(image_size: int, patch_size: int) -> int:
    """The pixels of a side that patches cover: a convolution reads no remainder (384 with patches of 14 is 378)."""
    return image_size // patch_size * patch_size


def image_processor(config: VitEmbedConfig) -> dict[str, Any]:
    """Both sides resized, without a crop, to values in [-1, 1] (preprocessor_config.json of
    google/siglip-base-patch16-224)."""
    return clip_image_processor(
        config, size=sides(config.image_shape), do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )


def write_config(config: VitEmbedConfig) -> tuple[str, dict[str, Any]]:
    """The class for a model of ours, and its config.json. Raises ValueError, naming fields, where there is none."""
    name = source_class(config, CLASSES, PACKAGE)
    needed = {**ARCHITECTURE, "final_norm_type": layer_norm_at_end(config)}
    is_dual = name == "SiglipModel"
    if is_dual:
        needed.update(DUAL_ARCHITECTURE)
        needed.update({f"text_config.{field}": value for field, value in TEXT_ARCHITECTURE.items()})
    require(config, needed, PACKAGE)
    vision = {field: getattr(config, field) for field in SIGLIP_VISION_FIELDS if field != "initializer_factor"}
    if not is_dual:
        return name, {"model_type": "siglip_vision_model", **vision}
    text = {field: getattr(config.text_config, field) for field in TEXT_FIELDS}
    return name, {
        "model_type": "siglip",
        "vision_config": {"model_type": "siglip_vision_model", **vision},
        "text_config": {"model_type": "siglip_text_model", **text, "projection_size": config.projection_dim},
    }
