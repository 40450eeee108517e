"""Our config for a model of open_clip: from the shapes of its weights, and open_clip_config.json."""

from collections.abc import Mapping
from typing import Any

from vit_embed import VitEmbedConfig, VitEmbedTextConfig
from vit_embed.configuration_vit_embed import LEGACY_EOS_TOKEN_ID
from vit_embed.conversion.layouts import hf_siglip
from vit_embed.conversion.layouts.layout import ConversionOptions, StateDict
from vit_embed.conversion.layouts.open_clip.form import Form
from vit_embed.conversion.layouts.open_clip.model_cfg import (
    CONFIG_FILE,
    DEFAULT_EPS,
    TEXT_DEFAULTS,
    TEXT_POOLINGS,
    VISION_DEFAULTS,
    is_quick_gelu,
)
from vit_embed.conversion.layouts.questions import (
    CLIP_HEADS_ORIGIN,
    clip_heads,
    count_layers,
    resolve,
    table_image_size,
)
from vit_embed.conversion.layouts.timm.names import find_architecture
from vit_embed.options_vit_embed import CLIP_VOCAB_SIZE

# Layer scale starts from it where nothing says; nothing else reads it.
LAYER_SCALE_INIT = 1e-4
# What a folder's tokenizer is given besides its files, kept for the way back.
KEPT_TEXT = ("hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode")
# What fills rows after a text, by the vocabulary of SigLIP's tokenizers (open_clip's SigLipTokenizer): T5's end token
# for C4 and mC4, Gemma's padding.
SIGLIP_PADDING = {32000: 1, 250000: 1, 256000: 0}
# By the name of a tokenizer of transformers that open_clip's configs use: [PAD] of CLIPA's BERT.
NAMED_PADDING = {"bert-base-uncased": 0}


def build_config(
    state_dict: StateDict, form: Form, model_cfg: Mapping[str, Any], options: ConversionOptions
) -> VitEmbedConfig:
    given = model_cfg.get("vision_cfg", {})
    vision_cfg = {**VISION_DEFAULTS, **given}
    tower = (_siglip_fields if form.siglip else _vit_fields)(state_dict, model_cfg, vision_cfg, options)
    if form.siglip != (vision_cfg["timm_model_name"] is not None):
        raise ValueError(
            f"vision_cfg.timm_model_name={vision_cfg['timm_model_name']!r} contradicts the weights, whose image tower "
            f"is {'timm' if form.siglip else 'open_clip'}'s"
        )
    kept = {name: (model_cfg.get("text_cfg") or {}).get(name) for name in KEPT_TEXT}
    origin = {
        "layout": "open_clip",
        "custom_text": bool(form.text),
        "nonscalar_logit_scale": bool(form.scale_axes),
        "timm_model_name": vision_cfg["timm_model_name"],
        "text_cfg": {name: value for name, value in kept.items() if value is not None},
    }
    return VitEmbedConfig(
        **tower,
        architectures=["VitEmbedModel" if options.trunk_only else "VitEmbedForContrastive"],
        converted_from={name: value for name, value in origin.items() if value},
        patch_drop_rate=vision_cfg["patch_dropout"],
        contrastive_loss="sigmoid" if "logit_bias" in state_dict else "softmax",
        text_config=None
        if options.trunk_only
        else _text_config(state_dict, form, model_cfg, options, tower["projection_dim"]),
    )


def _vit_fields(
    state_dict: StateDict, model_cfg: Mapping[str, Any], vision_cfg: Mapping[str, Any], options: ConversionOptions
) -> dict[str, Any]:
    """What the config says of open_clip's own vision transformer."""
    width, channels, *patch_size = state_dict["visual.conv1.weight"].shape
    positions = len(state_dict["visual.positional_embedding"])
    head_width = vision_cfg["head_width"] if model_cfg else None
    pooling = {"tok": "cls", "avg": "mean"}[vision_cfg["pool_type"]] if model_cfg else None
    pooling = resolve(options, "pooling_type", pooling)
    layer_scale = "visual.transformer.resblocks.0.ls_1.gamma" in state_dict
    return {
        "hidden_size": width,
        "num_hidden_layers": count_layers(state_dict, "visual.transformer.resblocks"),
        "num_attention_heads": resolve(
            options,
            "num_attention_heads",
            None if head_width is None else width // head_width,
            default=clip_heads(width),
            origin=CLIP_HEADS_ORIGIN,
            hint=f"or put the {CONFIG_FILE} of this model beside its weights",
        ),
        "intermediate_size": len(state_dict["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
        "hidden_act": _activation(model_cfg, vision_cfg, options),
        "layer_norm_eps": _eps(model_cfg, vision_cfg, options),
        "image_size": _image_size(positions - 1, tuple(patch_size), vision_cfg if model_cfg else {}, options),
        "patch_size": tuple(patch_size),
        "num_channels": channels,
        "use_pre_layernorm": "visual.ln_pre.weight" in state_dict,
        "layer_scale_init_value": (vision_cfg.get("ls_init_value") or LAYER_SCALE_INIT) if layer_scale else None,
        "pooling_type": pooling,
        "norm_before_pooling": pooling == "mean" and not vision_cfg["final_ln_after_pool"],
        "projection_dim": state_dict["visual.proj"].shape[1],
    }


def _siglip_fields(
    state_dict: StateDict, model_cfg: Mapping[str, Any], vision_cfg: Mapping[str, Any], options: ConversionOptions
) -> dict[str, Any]:
    """What the config says of timm's image tower of SigLIP."""
    width, channels, *patch_size = state_dict["visual.trunk.patch_embed.proj.weight"].shape
    named = find_architecture(vision_cfg["timm_model_name"])
    fields = {name: value for name, value in hf_siglip.ARCHITECTURE.items() if name != "pooling_type"}
    heads, act, eps = (None, None, None) if named is None else (named.num_heads, named.hidden_act, named.eps)
    return {
        **fields,
        "hidden_size": width,
        "num_hidden_layers": count_layers(state_dict, "visual.trunk.blocks"),
        "num_attention_heads": resolve(options, "num_attention_heads", heads),
        "intermediate_size": len(state_dict["visual.trunk.blocks.0.mlp.fc1.weight"]),
        "hidden_act": resolve(options, "hidden_act", act),
        "layer_norm_eps": resolve(options, "layer_norm_eps", eps),
        "image_size": _image_size(
            state_dict["visual.trunk.pos_embed"].shape[1], tuple(patch_size), vision_cfg, options
        ),
        "patch_size": tuple(patch_size),
        "num_channels": channels,
        "pooling_type": resolve(options, "pooling_type", "map"),
        "use_visual_projection": hf_siglip.DUAL_ARCHITECTURE["use_visual_projection"],
        "projection_dim": width,
    }


def _image_size(
    num_patches: int, patch_size: tuple[int, int], vision_cfg: Mapping[str, Any], options: ConversionOptions
) -> tuple[int, int]:
    """(height, width) in pixels that the position table covers; raises ValueError where the config says another."""
    found = vision_cfg.get("image_size")
    if found is None or options.image_size is not None:
        return table_image_size(num_patches, patch_size, options.image_size)
    found = (found, found) if isinstance(found, int) else tuple(found)
    rows, columns = (side // patch for side, patch in zip(found, patch_size))
    if rows * columns != num_patches:
        raise ValueError(
            f"vision_cfg.image_size={list(found)} has {rows} x {columns} patches of {patch_size} pixels, but the "
            f"position table has {num_patches}; correct it in {CONFIG_FILE}"
        )
    return rows * patch_size[0], columns * patch_size[1]


def _activation(model_cfg: Mapping[str, Any], tower_cfg: Mapping[str, Any], options: ConversionOptions) -> str:
    found = "quick_gelu" if is_quick_gelu(model_cfg) else "gelu"
    if (tower_cfg.get("act_kwargs") or {}).get("approximate") == "tanh":
        found = "gelu_pytorch_tanh"
    return resolve(options, "hidden_act", found if model_cfg else None)


def _eps(model_cfg: Mapping[str, Any], tower_cfg: Mapping[str, Any], options: ConversionOptions) -> float:
    found = (tower_cfg.get("norm_kwargs") or {}).get("eps", DEFAULT_EPS)
    return resolve(
        options, "layer_norm_eps", found if model_cfg else None, default=DEFAULT_EPS, origin="open_clip's default"
    )


def _text_config(
    state_dict: StateDict, form: Form, model_cfg: Mapping[str, Any], options: ConversionOptions, projection_dim: int
) -> VitEmbedTextConfig:
    given = model_cfg.get("text_cfg", {})
    text_cfg = {**TEXT_DEFAULTS, **given}
    vocab_size, width = state_dict[f"{form.text}token_embedding.weight"].shape
    layers = f"{form.text}transformer.resblocks"
    pooling, causal = TEXT_POOLINGS[text_cfg["pool_type"]], not text_cfg["no_causal_mask"]
    own_tokenizer = not text_cfg["hf_tokenizer_name"]
    return VitEmbedTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=count_layers(state_dict, layers),
        num_attention_heads=resolve(
            options,
            "text_num_attention_heads",
            text_cfg["heads"] if model_cfg else None,
            default=clip_heads(width),
            origin=CLIP_HEADS_ORIGIN,
            hint=f"or put the {CONFIG_FILE} of this model beside its weights",
        ),
        intermediate_size=len(state_dict[f"{layers}.0.mlp.c_fc.weight"]),
        max_position_embeddings=len(state_dict[f"{form.text}positional_embedding"]),
        hidden_act=_activation(model_cfg, text_cfg, options),
        layer_norm_eps=_eps(model_cfg, text_cfg, options),
        projection_dim=projection_dim,
        bos_token_id=vocab_size - 2 if own_tokenizer else None,
        eos_token_id=_eos_token_id(text_cfg, vocab_size, own_tokenizer),
        pad_token_id=_pad_token_id(given, vocab_size, own_tokenizer, reads_padding=pooling != "eos" or not causal),
        pooling_type=pooling,
        use_causal_mask=causal,
        projection_bias=form.linear_projection,
    )


def _eos_token_id(text_cfg: Mapping[str, Any], vocab_size: int, own_tokenizer: bool) -> int:
    """Where texts end: "argmax" reads the largest id of a row, which open_clip's own tokenizer makes the last one."""
    if text_cfg["pool_type"] == "eos":
        if text_cfg["eos_id"] == LEGACY_EOS_TOKEN_ID:
            raise ValueError(
                f"text_cfg.eos_id={LEGACY_EOS_TOKEN_ID} cannot be converted: as eos_token_id it is CLIP's legacy value "
                "here, which reads a text at its largest id"
            )
        return text_cfg["eos_id"]
    if own_tokenizer or text_cfg["pool_type"] != "argmax" or vocab_size == CLIP_VOCAB_SIZE:
        return vocab_size - 1
    return LEGACY_EOS_TOKEN_ID  # the largest id of a row, whatever it is


def _pad_token_id(given: Mapping[str, Any], vocab_size: int, own_tokenizer: bool, reads_padding: bool) -> int:
    """What stands after a text. Under a causal mask read at its end nothing sees it."""
    if "pad_id" in given:
        return given["pad_id"]
    if not reads_padding:
        return vocab_size - 1 if own_tokenizer else 0
    if own_tokenizer:
        return 0  # of open_clip's SimpleTokenizer
    if vocab_size in SIGLIP_PADDING and "siglip" in given["hf_tokenizer_name"].lower():
        return SIGLIP_PADDING[vocab_size]
    if given["hf_tokenizer_name"] in NAMED_PADDING:
        return NAMED_PADDING[given["hf_tokenizer_name"]]
    raise ValueError(
        f"this text tower reads the padding after a text, and nothing says what {given['hf_tokenizer_name']} pads "
        f"with; give it as text_cfg.pad_id in {CONFIG_FILE}"
    )
