"""Layout "deepseek_ocr": the CLIP half of DeepSeek-OCR's encoder, and of models that took it over (Unlimited-OCR).

It is CLIP-L fed with the features of a SAM encoder in place of patches (arXiv:2510.18234 section 3.2); its own patch
convolution lies in the weights and is not used there. Converted it takes both, `pixel_values` and `patch_embeds`.

Source: deepencoder/clip_sdpa.py of github.com/deepseek-ai/DeepSeek-OCR (commit 236bdc2) for names, order of
computation and what weights do not say.
"""

from collections.abc import Mapping
from typing import Any

from vit_embed import VitEmbedConfig
from vit_embed.conversion.layouts.layout import (
    ConversionOptions,
    Converted,
    Layout,
    SampleInputs,
    SourceConfig,
    StateDict,
)
from vit_embed.conversion.layouts.questions import (
    CLIP_HEADS_ORIGIN,
    check_sizes,
    clip_heads,
    count_layers,
    resolve,
    square_clip_size,
)
from vit_embed.conversion.layouts.rules import below, convert_weights, fused, layer_rules, rule
from vit_embed.conversion.processor_files import clip_image_processor

# Where the half lies: in a file of its own, in a saved encoder, in the published model.
PREFIXES = ("", "vision_model.", "model.vision_model.")
# The published one has 16 heads (`vit_model_cfg`), and so says `clip-l-14-224` in the config of the whole model.
HEADS_OF_WIDTH = {1024: 16}
CLIP_CONFIG = "clip-l-14-224"

# In the source's code, not in its config: QuickGELU, and `layernorm_epsilon` and `pre_layernorm_epsilon`.
HIDDEN_ACT, LAYER_NORM_EPS = "quick_gelu", 1e-5

RULES = (
    rule("embeddings.class_embedding", "vision_model.embeddings.class_embedding"),
    rule("embeddings.patch_embedding.weight", "vision_model.embeddings.patch_embedding.weight"),
    rule("embeddings.position_embedding.weight", "vision_model.embeddings.position_embedding.weight"),
    rule("embeddings.position_ids"),  # 0, 1, 2, ...
    rule("pre_layrnorm.{p}", "vision_model.pre_layrnorm.{p}"),
    *layer_rules(
        "transformer.layers.{n}",
        "vision_model.encoder.layers.{n}",
        {
            "layer_norm1.{p}": "layer_norm1.{p}",
            **fused("self_attn.qkv_proj"),
            "self_attn.out_proj.{p}": "self_attn.out_proj.{p}",
            "layer_norm2.{p}": "layer_norm2.{p}",
            "mlp.fc1.{p}": "mlp.fc1.{p}",
            "mlp.fc2.{p}": "mlp.fc2.{p}",
        },
    ),
)
# The rest of the published model: SAM, what joins the two halves, the language model.
OTHER_PARTS = (
    rule("model.sam_model.{x}"),
    rule("model.projector.{x}"),
    rule("model.image_newline"),
    rule("model.view_seperator"),  # sic
    rule("model.embed_tokens.weight"),
    rule("model.layers.{n}.{x}"),
    rule("model.norm.weight"),
    rule("lm_head.weight"),
)

SIZES = {
    "embeddings.class_embedding": ("width",),
    "embeddings.patch_embedding.weight": ("width", "channels", "patch height", "patch width"),
    "embeddings.position_embedding.weight": ("1 + patches", "width"),
    "transformer.layers.0.self_attn.qkv_proj.weight": ("3 * width", "width"),
    "transformer.layers.0.mlp.fc1.weight": ("MLP width", "width"),
}


def _prefix(state_dict: StateDict) -> str | None:
    proof = ("transformer.layers.0.self_attn.qkv_proj.weight", "pre_layrnorm.weight")
    return next((prefix for prefix in PREFIXES if all(prefix + key in state_dict for key in proof)), None)


def detect(state_dict: StateDict, source_config: SourceConfig) -> str | None:
    """CLIP's keys with `transformer` for its encoder and one matrix for query, key and value."""
    prefix = _prefix(state_dict)
    return None if prefix is None else f"it has DeepSeek-OCR's {prefix}transformer.layers.N.self_attn.qkv_proj"


def convert(state_dict: StateDict, source_config: SourceConfig, options: ConversionOptions) -> Converted:
    """The CLIP half of DeepSeek-OCR, a VitEmbedModel whose `last_hidden_state` is the source's output.

    Args:
        state_dict: the half alone, or the whole model, of which the other parts are left out.
        source_config: of the whole model, for the heads; it may be absent.
        options: `num_attention_heads` is needed where no config states it and no default fits the width.

    Raises:
        ValueError: another layout, weights that contradict each other or their config, or unknown heads.
    """
    prefix = _prefix(state_dict) or ""
    check_sizes(state_dict, {prefix + key: axes for key, axes in SIZES.items()}, "the CLIP half of DeepSeek-OCR")
    config = _config(state_dict, prefix, _clip_config(source_config), options)
    return convert_weights(config, state_dict, (*below(prefix, RULES), *OTHER_PARTS), options.dtype)


def _clip_config(source_config: SourceConfig) -> Mapping[str, Any]:
    """What the config of the whole model says of the CLIP half, empty where it says nothing."""
    found: Any = source_config
    for key in ("vision_config", "width", CLIP_CONFIG):
        found = found.get(key, {}) if isinstance(found, Mapping) else {}
    return found if isinstance(found, Mapping) else {}


def _config(
    state_dict: StateDict, prefix: str, clip_config: Mapping[str, Any], options: ConversionOptions
) -> VitEmbedConfig:
    patches = f"{prefix}embeddings.patch_embedding.weight"
    image_size, patch_size = square_clip_size(
        state_dict, patches, f"{prefix}embeddings.position_embedding.weight", "DeepSeek-OCR's CLIP"
    )
    width, channels = state_dict[patches].shape[:2]
    layers = count_layers(state_dict, f"{prefix}transformer.layers")
    shown = {"width": width, "layers": layers, "patch_size": patch_size, "image_size": image_size}
    for name, size in shown.items():
        if clip_config.get(name, size) != size:
            raise ValueError(f"{name} of {CLIP_CONFIG} must be {size} as the weights say, got {clip_config[name]!r}")
    return VitEmbedConfig(
        architectures=["VitEmbedModel"],
        converted_from={"layout": "deepseek_ocr"},
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=resolve(
            options,
            "num_attention_heads",
            clip_config.get("heads", HEADS_OF_WIDTH.get(width)),
            default=clip_heads(width),
            origin=CLIP_HEADS_ORIGIN,
            hint=f"of width {width}",
        ),
        intermediate_size=len(state_dict[f"{prefix}transformer.layers.0.mlp.fc1.weight"]),
        hidden_act=HIDDEN_ACT,
        image_size=image_size,
        patch_size=patch_size,
        num_channels=channels,
        position_interpolation="bicubic_antialias",
        final_norm_type="none",
        layer_norm_eps=LAYER_NORM_EPS,
    )


def reference(
    state_dict: StateDict, source_config: SourceConfig, config: VitEmbedConfig, inputs: SampleInputs
) -> dict[str, Any]:
    """Raises ImportError: the code is published beside the weights, and nothing that comes with weights is run."""
    raise ImportError("no package has DeepSeek-OCR's own code; it comes with the weights, and such code is never run")


def image_processor(source_config: SourceConfig, config: VitEmbedConfig) -> dict[str, Any]:
    """Mean and deviation 0.5, as `DeepseekOCRProcessor` has them (process/image_process.py of its repository). That one
    pads to 1024 pixels for SAM; this one crops to the native size, as CLIP does."""
    half = [0.5] * config.num_channels
    return clip_image_processor(config, image_mean=half, image_std=half)


LAYOUT = Layout(
    "deepseek_ocr",
    detect,
    convert,
    reference,
    "",  # nothing can run it
    options=("num_attention_heads",),
    image_processor=image_processor,
)
