"""The names of open_clip's CLIP, CustomTextCLIP and SigLIP (open_clip_torch, read at 3.3.0), there and back."""

import logging
import re

from vit_embed import VitEmbedConfig
from vit_embed.conversion.layouts import openai
from vit_embed.conversion.layouts.layout import ConversionOptions, Converted, Restored, SourceConfig, StateDict
from vit_embed.conversion.layouts.open_clip.config import build_config
from vit_embed.conversion.layouts.open_clip.form import Form, find_form
from vit_embed.conversion.layouts.open_clip.model_cfg import (
    CONFIG_FILE,
    WHAT_CAN_BE,
    check_model_cfg,
    check_shown,
    read_model_cfg,
)
from vit_embed.conversion.layouts.open_clip.written import checked_model_cfg
from vit_embed.conversion.layouts.questions import check_sizes
from vit_embed.conversion.layouts.rules import (
    Rule,
    below,
    convert_weights,
    layer_rules,
    left_out,
    reverse_rules,
    rule,
)
from vit_embed.conversion.layouts.timm import weights as timm_weights
from vit_embed.conversion.messages import listing

logger = logging.getLogger(__name__)

LAYER_SCALE_NAMES = {"ls_1.gamma": "layer_scale1", "ls_2.gamma": "layer_scale2"}
VIT_RULES = (
    *openai.TRUNK_RULES,
    *layer_rules("visual.transformer.resblocks.{n}", "vision_model.encoder.layers.{n}", LAYER_SCALE_NAMES),
)
VISUAL_PROJECTION_RULE, *OPENAI_TEXT_RULES, TEXT_PROJECTION_RULE, _ = openai.HEAD_RULES
SIGLIP_RULES = below("visual.trunk.", (*timm_weights.TRUNK_RULES, rule("norm.{p}", "vision_model.post_layernorm.{p}")))

# Keys of towers that cannot be converted, and what they are.
FOREIGN_KEYS = {
    r"visual\.(layer1|attnpool)\..*": "a ResNet image tower (visual.layer1, visual.attnpool)",
    r"visual\.attn_pool(_contrastive)?\..*": "attentional pooling (vision_cfg.attentional_pool, as CoCa's)",
    r"visual\.transformer\.resblocks\.\d+\.(attn\.(ln_[qk]|[qk]_norm|logit_scale|head_scale|ln_inner)|ln_attn)\b.*": (
        "norms or scales inside attention (qk_norm, scaled_cosine_attn, scale_heads, scale_attn)"
    ),
    r"visual\.trunk\.(stem|stages|blocks\.\d+\.(conv|attn\.rope|mlp\.fc1_g)|norm_pre\b).*|visual\.head\..*": (
        "an image tower of timm that is none of its SigLIP's (ConvNeXt, ViTamin, EVA, PE, MobileCLIP, or a projection "
        "after it)"
    ),
    r"text_decoder\..*": "CoCa's text decoder (multimodal_cfg)",
    r"(text\.)?cls_emb": "a class token in its texts (text_cfg.embed_cls)",
    r"text\.(transformer\.(embeddings|encoder|shared|block)|proj)\b.*": "a text tower of transformers (hf_model_name)",
    r"(text\.)?transformer\.resblocks\.\d+\.ls_[12]\..*": "layer scale in its text tower (text_cfg.ls_init_value)",
}


def trunk_rules(form: Form) -> tuple[Rule, ...]:
    """Of the image tower."""
    return SIGLIP_RULES if form.siglip else VIT_RULES


def head_rules(form: Form) -> tuple[Rule, ...]:
    """Of everything beside the image tower."""
    projection = TEXT_PROJECTION_RULE
    if form.linear_projection:
        projection = rule("text_projection.{p}", "text_projection.{p}")
    return (
        *(() if form.siglip else (VISUAL_PROJECTION_RULE,)),
        *below(form.text, (*OPENAI_TEXT_RULES, projection)),
        rule("logit_scale", "logit_scale", leading=form.scale_axes),
        rule("logit_bias", "logit_bias", leading=form.scale_axes),
        Rule(f"{form.text}attn_mask"),  # of files from before it stopped being stored
    )


def detect(state_dict: StateDict, source_config: SourceConfig) -> str | None:
    """The keys of open_clip's CLIP, or an open_clip_config.json. OpenAI's own archives say more, and are not these."""
    if not any(key.startswith("visual.") for key in state_dict):
        return None
    if read_model_cfg(source_config):
        return f"{CONFIG_FILE} lies beside it"
    if source_config or any(key in state_dict for key in openai.METADATA):
        return None
    names = ("visual.class_embedding", "visual.trunk.patch_embed.proj.weight")
    if any(name in state_dict for name in names) and any("token_embedding.weight" in key for key in state_dict):
        return "it has open_clip's keys"
    return None


# There


def convert(state_dict: StateDict, source_config: SourceConfig, options: ConversionOptions) -> Converted:
    """A dual encoder of open_clip with a plain vision transformer, its own or one of timm's SigLIP's: a
    VitEmbedForContrastive. An image size of 384 pixels in patches of 14 becomes 378: a convolution reads no remainder.

    Args:
        state_dict: of CLIP or CustomTextCLIP.
        source_config: open_clip_config.json. Without it only CLIP's own form is converted, and every option is needed.
        options: `hidden_act`, `layer_norm_eps` of both towers, `num_attention_heads`, `text_num_attention_heads`,
            `pooling_type`; `image_size` for a grid that is no square.

    Raises:
        ValueError: a tower or a setting that cannot be expressed here, named; or weights that contradict each other or
            their config.
    """
    for pattern, what in FOREIGN_KEYS.items():
        if found := [key for key in state_dict if re.fullmatch(pattern, key)]:
            raise ValueError(f"this model has {what}: {listing(found)}; {WHAT_CAN_BE}")
    form, model_cfg = find_form(state_dict), read_model_cfg(source_config)
    check_model_cfg(model_cfg)
    check_sizes(state_dict, _sizes(form), "a dual encoder of open_clip with a vision transformer")
    check_shown(state_dict, form, model_cfg)
    if not model_cfg:
        _check_bare(form, options)
    config = build_config(state_dict, form, model_cfg, options)
    kept = config.converted_from.get("text_cfg", {})
    if config.text_config is not None and not {"tokenizer_kwargs", "tokenizer_mode"}.isdisjoint(kept):
        logger.warning("open_clip changes texts around its tokenizer, which that of the folder does not: %s", kept)
    heads = left_out(head_rules(form)) if options.trunk_only else head_rules(form)
    return convert_weights(config, state_dict, (*trunk_rules(form), *heads), options.dtype)


def _sizes(form: Form) -> dict[str, tuple[str, ...]]:
    """The tensors that sizes are read from, and what their axes are."""
    sizes = {}
    for key, axes in openai.SIZES.items():
        if not key.startswith("visual."):
            sizes[form.text + key] = axes
        elif not form.siglip:
            sizes[key] = axes
    if form.siglip:
        for key in ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"):
            sizes[f"visual.trunk.{key}"] = timm_weights.SIZES[key]
        sizes["visual.trunk.pos_embed"] = timm_weights.OPTIONAL_SIZES["pos_embed"]
    return sizes


def _check_bare(form: Form, options: ConversionOptions) -> None:
    """Raises ValueError for weights whose form needs a config, or for which an option must still be given."""
    ask = f"put the {CONFIG_FILE} of this model beside its weights"
    if form.text or form.siglip or form.linear_projection:
        raise ValueError(f"its keys are of a model with a text or image tower of its own choosing; {ask}")
    missing = [f"--{name}" for name in ("hidden_act", "pooling_type") if getattr(options, name) is None]
    if missing:
        raise ValueError(
            f"the weights do not show {' and '.join(missing)}; {ask}, or give them (most models of open_clip: gelu, "
            "cls)"
        )
    if options.pooling_type != "cls":
        raise ValueError(
            f"--pooling_type {options.pooling_type} does not say whether the norm comes before it or after; {ask}"
        )
    logger.warning("no %s: the text tower is taken for CLIP's, causal and read at its largest id", CONFIG_FILE)


# The way back


def restore(config: VitEmbedConfig, weights: StateDict) -> Restored:
    """A dual encoder as `open_clip.create_model("local-dir:FOLDER")` reads it: in the form that it came from, else as
    CLIP; with SigLIP's image tower, as CustomTextCLIP.

    Raises:
        ValueError: a model that open_clip cannot compute; names every field.
    """
    origin = config.converted_from or {}
    form = Form(
        text="text." if config.pooling_type == "map" or origin.get("custom_text") else "",
        siglip=config.pooling_type == "map",
        linear_projection=config.text_config is not None and config.text_config.projection_bias,
        scale_axes=int(origin.get("nonscalar_logit_scale", False)),
    )
    model_cfg = checked_model_cfg(config, form)
    state_dict = reverse_rules(weights, (*trunk_rules(form), *head_rules(form)))
    return Restored(
        state_dict,
        usage='open_clip.create_model("local-dir:FILE") for a folder; open_clip.factory.load_checkpoint(model, "FILE")',
        weights_file="open_clip_model.safetensors",
        files={CONFIG_FILE: {"model_cfg": model_cfg, "preprocess_cfg": {"size": list(config.image_shape)}}},
    )
