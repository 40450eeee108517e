"""Layout "open_clip": CLIP, CustomTextCLIP and SigLIP of open_clip_torch (read at 3.3.0), with vision transformers.

What its weights do not show (heads, activation, epsilon, pooling, masks) comes from open_clip_config.json beside them,
with open_clip's own defaults for what that leaves out.
"""

import logging
import math
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch

from vit_embed import VitEmbedConfig
from vit_embed.checkpoint_reader import listing
from vit_embed.layouts import openai, timm
from vit_embed.layouts.hf_clip import with_remainder
from vit_embed.layouts.open_clip_config import (
    CONFIG_FILE,
    WHAT_CAN_BE,
    Form,
    check_model_cfg,
    check_shown,
    config_of,
    form_of,
    is_number,
    is_quick_gelu,
    model_cfg_from,
    model_cfg_of,
    stated_model_cfg,
)
from vit_embed.layouts.rules import (
    ConversionOptions,
    Layout,
    Restored,
    Rule,
    SampleInputs,
    SourceConfig,
    StateDict,
    as_float32,
    check_sizes,
    convert_weights,
    layer_rules,
    left_out,
    reverse_rules,
    rule,
)
from vit_embed.saving_vit_embed import CLIP_IMAGE_MEAN, CLIP_IMAGE_STD, image_processor_dict

logger = logging.getLogger(__name__)

LAYER_SCALE_NAMES = {"ls_1.gamma": "layer_scale1", "ls_2.gamma": "layer_scale2"}
VIT_RULES = (
    *openai.TRUNK_RULES,
    *layer_rules("visual.transformer.resblocks.{n}", "vision_model.encoder.layers.{n}", LAYER_SCALE_NAMES),
)
VISUAL_PROJECTION_RULE, *OPENAI_TEXT_RULES, TEXT_PROJECTION_RULE, _ = openai.HEAD_RULES
SIGLIP_RULES = tuple(
    each._replace(source=f"visual.trunk.{each.source}")
    for each in (*timm.TRUNK_RULES, rule("norm.{p}", "vision_model.post_layernorm.{p}"))
)

# Keys of towers that cannot be converted, and what they are.
FOREIGN_KEYS = {
    r"visual\.(layer1|attnpool)\..*": "a ResNet image tower (visual.layer1, visual.attnpool)",
    r"visual\.attn_pool(_contrastive)?\..*": "attentional pooling (vision_cfg.attentional_pool, as CoCa's)",
    r"visual\.transformer\.resblocks\.\d+\.(attn\.(ln_[qk]|[qk]_norm|logit_scale|head_scale|ln_inner)|ln_attn)\b.*": (
        "norms or scales inside attention (qk_norm, scaled_cosine_attn, scale_heads, scale_attn)"
    ),
    r"visual\.trunk\.(stem|stages|blocks\.\d+\.(conv|attn\.rope|mlp\.fc1_g)|norm_pre\b).*|visual\.head\..*": (
        "an image tower of timm that is none of its SigLIP's (ConvNeXt, ViTamin, EVA, PE, MobileCLIP, or a projection "
        "behind it)"
    ),
    r"text_decoder\..*": "CoCa's text decoder (multimodal_cfg)",
    r"(text\.)?cls_emb": "a class token in its texts (text_cfg.embed_cls)",
    r"text\.(transformer\.(embeddings|encoder|shared|block)|proj)\b.*": "a text tower of transformers (hf_model_name)",
    r"(text\.)?transformer\.resblocks\.\d+\.ls_[12]\..*": "layer scale in its text tower (text_cfg.ls_init_value)",
}

# PIL.Image.Resampling; open_clip itself takes "random" for training alone, and bicubic for the rest.
RESAMPLING = {"bicubic": 3, "bilinear": 2, "random": 3}
PREPROCESS_DEFAULTS = {
    "mean": CLIP_IMAGE_MEAN,
    "std": CLIP_IMAGE_STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
RESIZE_MODES = ("shortest", "squash", "longest")


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
        *(each._replace(source=form.text + each.source) for each in (*OPENAI_TEXT_RULES, projection)),
        rule("logit_scale", "logit_scale", leading=form.scale_axes),
        rule("logit_bias", "logit_bias", leading=form.scale_axes),
        Rule(f"{form.text}attn_mask"),  # of files from before it stopped being stored
    )


def detect(state_dict: StateDict, source_config: SourceConfig) -> str | None:
    """The keys of open_clip's CLIP, or an open_clip_config.json. OpenAI's own archives say more, and are not these."""
    if not any(key.startswith("visual.") for key in state_dict):
        return None
    if stated_model_cfg(source_config):
        return f"{CONFIG_FILE} lies beside it"
    if source_config or any(key in state_dict for key in openai.METADATA):
        return None
    names = ("visual.class_embedding", "visual.trunk.patch_embed.proj.weight")
    if any(name in state_dict for name in names) and any("token_embedding.weight" in key for key in state_dict):
        return "it has open_clip's keys"
    return None


# There


def convert(
    state_dict: StateDict, source_config: SourceConfig, options: ConversionOptions
) -> tuple[VitEmbedConfig, dict[str, torch.Tensor]]:
    """A dual encoder of open_clip with a plain vision transformer, its own or one of timm's SigLIP's.

    Args:
        state_dict: of CLIP or CustomTextCLIP.
        source_config: open_clip_config.json. Without it only CLIP's own form is converted, and every option is needed.
        options: `hidden_act`, `layer_norm_eps` of both towers, `num_attention_heads`, `text_num_attention_heads`,
            `pooling_type`; `image_size` for a grid that is no square.

    Returns:
        The config, and the weights of VitEmbedForContrastive. An image of 384 pixels in patches of 14 becomes one of
        378: a convolution reads no remainder.

    Raises:
        ValueError: a tower or a setting that cannot be expressed here, named; or weights that contradict each other or
            their config.
    """
    for pattern, what in FOREIGN_KEYS.items():
        if found := [key for key in state_dict if re.fullmatch(pattern, key)]:
            raise ValueError(f"this model has {what}: {listing(found)}; {WHAT_CAN_BE}")
    form, model_cfg = form_of(state_dict), stated_model_cfg(source_config)
    check_model_cfg(model_cfg)
    check_sizes(state_dict, _sizes(form), "a dual encoder of open_clip with a vision transformer")
    check_shown(state_dict, form, model_cfg)
    if not model_cfg:
        _check_bare(form, options)
    config = config_of(state_dict, form, model_cfg, options)
    kept = config.converted_from.get("text_cfg", {})
    if config.text_config is not None and not {"tokenizer_kwargs", "tokenizer_mode"}.isdisjoint(kept):
        logger.warning("open_clip changes texts around its tokenizer, which that of the folder does not: %s", kept)
    heads = left_out(head_rules(form)) if options.trunk_only else head_rules(form)
    return config, convert_weights(config, state_dict, (*trunk_rules(form), *heads), options.dtype)


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
            sizes[f"visual.trunk.{key}"] = timm.SIZES[key]
        sizes["visual.trunk.pos_embed"] = timm.OPTIONAL_SIZES["pos_embed"]
    return sizes


def _check_bare(form: Form, options: ConversionOptions) -> None:
    """Raises ValueError for weights whose form needs a config, or for which something must still be told."""
    ask = f"put the {CONFIG_FILE} of this model beside its weights"
    if form.text or form.siglip or form.linear_projection:
        raise ValueError(f"its keys are of a model with a text or image tower of its own choosing; {ask}")
    needed = ("hidden_act", "num_attention_heads", "layer_norm_eps", "pooling_type")
    needed += () if options.trunk_only else ("text_num_attention_heads",)
    if missing := [f"--{name}" for name in needed if getattr(options, name) is None]:
        raise ValueError(
            f"weights alone do not say what these are: {', '.join(missing)}; {ask}, or say them (most models of "
            "open_clip: gelu, width // 64 heads, 1e-5, cls)"
        )
    if options.pooling_type != "cls":
        raise ValueError(
            f"--pooling_type {options.pooling_type} does not say whether the norm comes before it or behind; {ask}"
        )
    logger.warning("no %s: the text tower is taken for CLIP's, causal and read at its largest id", CONFIG_FILE)


# Preprocessing


def image_processor(source_config: SourceConfig, config: VitEmbedConfig) -> dict[str, Any] | None:
    """open_clip's transform for evaluation, as preprocess_cfg describes it: the shorter side, then the centre; with
    resize_mode "squash" both sides.

    Squeezed as well are images that open_clip resizes to cover a rectangle, or pads ("longest"), which no stock
    processor does; the log says so. Where an odd number of pixels is to be cut off, torchvision's centre lies one pixel
    further right or down than the stock processor's.
    """
    if not stated_model_cfg(source_config):
        return None
    stated = source_config.get("preprocess_cfg") or {}
    if not isinstance(stated, dict):
        raise ValueError(f"preprocess_cfg must be an object, got {stated!r}")
    said = {
        name: default if stated.get(name) is None else stated[name] for name, default in PREPROCESS_DEFAULTS.items()
    }
    if said["interpolation"] not in tuple(RESAMPLING) or said["resize_mode"] not in RESIZE_MODES:
        raise ValueError(
            f"preprocess_cfg must have an interpolation of {', '.join(RESAMPLING)} and a resize_mode of "
            f"{', '.join(RESIZE_MODES)}; got {said['interpolation']!r} and {said['resize_mode']!r}"
        )
    height, width = config.image_shape
    crops = said["resize_mode"] == "shortest" and height == width
    if not crops and said["resize_mode"] != "squash":
        logger.warning(
            "open_clip resizes by resize_mode=%r to (%d, %d) pixels; the image processor here squeezes both sides",
            said["resize_mode"],
            height,
            width,
        )
    mean, std = (_per_channel(name, said[name]) for name in ("mean", "std"))
    return {
        **image_processor_dict(config, "CLIPImageProcessor"),
        "size": {"shortest_edge": height} if crops else {"height": height, "width": width},
        "do_center_crop": crops,
        "crop_size": {"height": height, "width": width},
        "resample": RESAMPLING[said["interpolation"]],
        "image_mean": mean,
        "image_std": std,
    }


def _per_channel(name: str, value: Any) -> list[float]:
    values = value if isinstance(value, (list, tuple)) else [value] * 3
    if not values or not all(map(is_number, values)):
        raise ValueError(f"preprocess_cfg.{name} must be a number or one for each channel, got {value!r}")
    return list(values)


def preprocess_cfg(preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """What open_clip calls the settings of a CLIPImageProcessor."""
    names = {number: name for name, number in reversed(RESAMPLING.items())}
    crops = preprocessor.get("do_center_crop", True)
    return {
        "mode": "RGB",
        "mean": list(preprocessor.get("image_mean", CLIP_IMAGE_MEAN)),
        "std": list(preprocessor.get("image_std", CLIP_IMAGE_STD)),
        "interpolation": names.get(preprocessor.get("resample"), "bicubic"),
        "resize_mode": "shortest" if crops else "squash",
        "fill_color": 0,
    }


def restored_processor(files: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """The files of a folder of open_clip with our image processor's settings in them."""
    written = files[CONFIG_FILE]
    return {
        **files,
        CONFIG_FILE: {**written, "preprocess_cfg": {**written["preprocess_cfg"], **preprocess_cfg(preprocessor)}},
    }


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
    model_cfg = model_cfg_of(config, form)
    state_dict = reverse_rules(weights, (*trunk_rules(form), *head_rules(form)))
    return Restored(
        state_dict,
        usage='open_clip.create_model("local-dir:FILE") for a folder; open_clip.factory.load_checkpoint(model, "FILE")',
        weights_file="open_clip_model.safetensors",
        files={CONFIG_FILE: {"model_cfg": model_cfg, "preprocess_cfg": {"size": list(config.image_shape)}}},
    )


# Running the source


@torch.no_grad()
def reference(
    state_dict: StateDict, source_config: SourceConfig, config: VitEmbedConfig, inputs: SampleInputs
) -> dict[str, torch.Tensor]:
    """Features and logits of open_clip's own code; of a trunk alone its states. Raises ImportError without it."""
    import open_clip

    form = form_of(state_dict)
    model_cfg = stated_model_cfg(source_config)
    if not model_cfg or _is_told_otherwise(state_dict, model_cfg, config):
        model_cfg = model_cfg_from(config, form)
    if config.text_config is None:
        visual = _build(open_clip, model_cfg, form, state_dict, trunk_only=True)
        return _trunk_outputs(visual, _on_canvas(visual, inputs.pixel_values, form), form)
    model = _build(open_clip, model_cfg, form, state_dict)
    pixel_values = _on_canvas(model.visual, inputs.pixel_values, form)
    return {
        "image_features": model.encode_image(pixel_values),
        "text_features": model.encode_text(inputs.input_ids),
        "logits_per_image": model.get_logits(pixel_values, inputs.input_ids)[0],
    }


TOLD = ("hidden_act", "layer_norm_eps", "num_attention_heads", "pooling_type")


def _is_told_otherwise(state_dict: StateDict, model_cfg: Mapping[str, Any], config: VitEmbedConfig) -> bool:
    """Whether the user told something else than open_clip's config says."""
    trunk_only = config.text_config is None
    options = ConversionOptions(image_size=config.image_shape, trunk_only=trunk_only)
    stated = config_of(state_dict, form_of(state_dict), model_cfg, options)
    towers = [(stated, config)] if trunk_only else [(stated, config), (stated.text_config, config.text_config)]
    return any(getattr(said, name) != getattr(told, name) for said, told in towers for name in TOLD)


def _build(
    open_clip: ModuleType, model_cfg: Mapping[str, Any], form: Form, state_dict: StateDict, trunk_only: bool = False
) -> torch.nn.Module:
    """open_clip's model with these weights, or its image tower."""
    fields = {name: value for name, value in model_cfg.items() if name != "custom_text"}
    fields["vision_cfg"] = {**model_cfg["vision_cfg"], "timm_model_pretrained": False}
    fields["nonscalar_logit_scale"] = bool(form.scale_axes)
    fields["init_logit_bias"] = -10.0 if "logit_bias" in state_dict else None
    weights = {name: tensor for name, tensor in state_dict.items() if name != f"{form.text}attn_mask"}
    model_class = open_clip.CustomTextCLIP if form.text else open_clip.CLIP
    try:
        with torch.device("meta"):
            if trunk_only:
                tower = (fields["embed_dim"], fields["vision_cfg"], is_quick_gelu(fields))
                model = open_clip.model._build_vision_tower(*tower).eval()
                weights = {name[len("visual.") :]: t for name, t in weights.items() if name.startswith("visual.")}
            else:
                model = model_class(**fields).eval()
        model.load_state_dict(as_float32(weights), assign=True)
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"open_clip does not take these weights: {error}") from error
    text = None if trunk_only else model.text if form.text else model
    if text is not None and text.attn_mask is not None:  # a buffer that is not stored
        text.attn_mask = torch.full(text.attn_mask.shape, -math.inf).triu_(1)
    return model


def _on_canvas(visual: torch.nn.Module, pixel_values: torch.Tensor, form: Form) -> torch.Tensor:
    """Images of the size that the tower insists on."""
    return with_remainder(pixel_values, visual.trunk.patch_embed.img_size) if form.siglip else pixel_values


def _trunk_outputs(visual: torch.nn.Module, pixel_values: torch.Tensor, form: Form) -> dict[str, torch.Tensor]:
    """States before the last norm, and the pooled vector before the projection."""
    if form.siglip:
        states = []
        hook = visual.trunk.norm.register_forward_pre_hook(lambda module, given: states.append(given[0]))
        pooled = visual(pixel_values)
        hook.remove()
        return {"last_hidden_state": states[0], "pooler_output": pooled}
    states = visual.transformer(visual._embeds(pixel_values))
    return {"last_hidden_state": states, "pooler_output": visual._pool(states)[0]}


LAYOUT = Layout(
    detect,
    convert,
    reference,
    ("hidden_act", "num_attention_heads", "text_num_attention_heads", "layer_norm_eps", "pooling_type", "image_size"),
    image_processor,
    restore,
    restored_processor,
)
