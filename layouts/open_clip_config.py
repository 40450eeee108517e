"""What open_clip_config.json says of a model of open_clip (read at 3.3.0), and what we would write there."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vit_embed import VitEmbedConfig, VitEmbedTextConfig
from vit_embed.configuration_vit_embed import LEGACY_EOS_TOKEN_ID
from vit_embed.layouts.hf_clip import SIGLIP_ARCHITECTURE, SIGLIP_DUAL_ARCHITECTURE
from vit_embed.layouts.rules import (
    ConversionOptions,
    SourceConfig,
    StateDict,
    count_layers,
    image_size_of,
    known,
    require,
)
from vit_embed.layouts.timm_names import architecture_of
from vit_embed.options_vit_embed import CLIP_VOCAB_SIZE

CONFIG_FILE = "open_clip_config.json"

# Fields of open_clip's CLIPVisionCfg and CLIPTextCfg that say what a model computes, with their defaults.
VISION_DEFAULTS = {
    "head_width": 64,
    "image_size": 224,
    "patch_dropout": 0.0,
    "no_ln_pre": False,
    "final_ln_after_pool": False,
    "pool_type": "tok",
    "act_kwargs": None,
    "norm_kwargs": None,
    "timm_model_name": None,
    "timm_pool": "avg",
    "timm_proj": "linear",
}
TEXT_DEFAULTS = {
    "hf_tokenizer_name": None,
    "tokenizer_kwargs": None,
    "tokenizer_mode": None,
    "heads": 8,
    "eos_id": 2,
    "no_causal_mask": False,
    "pool_type": "argmax",
    "act_kwargs": None,
    "norm_kwargs": None,
}
# Fields of which one value can be converted, their default.
_ONLY_DEFAULTS = {
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}
VISION_NEEDED = {"attentional_pool": False, **_ONLY_DEFAULTS}
TEXT_NEEDED = {
    "hf_model_name": None,
    "embed_cls": False,
    "proj_type": "linear",
    "ls_init_value": None,
    **_ONLY_DEFAULTS,
}
# Fields that shapes show as well, and must agree with; `image_size` does too. timm's towers read none of the first.
VISION_SHOWN = {"layers": 12, "width": 768, "mlp_ratio": 4.0, "patch_size": 16, "ls_init_value": None}
TEXT_SHOWN = {
    "context_length": 77,
    "vocab_size": 49408,
    "width": 512,
    "layers": 12,
    "mlp_ratio": 4.0,
    "proj_bias": False,
}
# Fields that no inference reads: `pos_embed_type` only says how a stored table began, and `final_ln_after_pool` of the
# text tower nothing. `pad_id` is read where it is stated; what it is by default no model needs.
VISION_UNREAD = (
    *("pos_embed_type", "output_tokens", "block_type", "attn_pooler_queries", "attn_pooler_heads"),
    *("timm_model_pretrained", "timm_proj_bias", "timm_drop", "timm_drop_path"),
)
TEXT_UNREAD = (
    *("pad_id", "output_tokens", "final_ln_after_pool", "block_type"),
    *("hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
)
MODEL_FIELDS = (
    *("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale", "init_logit_bias"),
    "nonscalar_logit_scale",
)


# timm's SigLIP towers that open_clip's configs name. timm's own name of one says its heads, activation and eps.
SIGLIP_NAME = re.compile(r"vit_(?P<family>base|large|so400m|giantopt)_patch(?P<patch>\d+)_siglip_(?P<size>\d+)")
SIGLIP_NAMES = (
    "vit_base_patch32_siglip_256",
    *(f"vit_base_patch16_siglip_{size}" for size in (224, 256, 384, 512)),
    *(f"vit_large_patch16_siglip_{size}" for size in (256, 384, 512)),
    *(f"vit_so400m_patch14_siglip_{size}" for size in (224, 378, 384)),
    *(f"vit_so400m_patch16_siglip_{size}" for size in (256, 384, 512)),
    *(f"vit_giantopt_patch16_siglip_{size}" for size in (256, 384)),
)
# Layers and MLP width of each family.
SIGLIP_DEPTHS = {"base": (12, 3072), "large": (24, 4096), "so400m": (27, 4304), "giantopt": (40, 6144)}
# What fills rows behind a text, by the vocabulary of SigLIP's tokenizers (open_clip's SigLipTokenizer): T5's end token
# for C4 and mC4, Gemma's padding.
SIGLIP_PADDING = {32000: 1, 250000: 1, 256000: 0}
# By the name of a tokenizer of transformers that open_clip's configs use: [PAD] of CLIPA's BERT.
NAMED_PADDING = {"bert-base-uncased": 0}


def is_number(value: Any, kinds: tuple[type, ...] = (int, float)) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return is_number(value, (int,)) and value > 0


# What a field that is read must be, by its name in any part of the config; None as well where that is its default.
KINDS: dict[tuple[str, ...], tuple[str, Callable[[Any], bool]]] = {
    ("embed_dim", "layers", "width", "head_width", "heads", "context_length", "vocab_size"): (
        "a whole number from 1",
        _is_count,
    ),
    ("image_size", "patch_size"): (
        "a whole number from 1 or two of them",
        lambda value: (
            _is_count(value) or (isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_count, value)))
        ),
    ),
    ("eos_id", "pad_id"): ("a token's id", lambda value: is_number(value, (int,))),
    ("mlp_ratio", "patch_dropout", "ls_init_value"): ("a number", is_number),
    ("no_ln_pre", "final_ln_after_pool", "no_causal_mask", "proj_bias", "quick_gelu", "custom_text"): (
        "true or false",
        lambda value: isinstance(value, bool),
    ),
    ("pool_type", "timm_model_name", "hf_tokenizer_name", "tokenizer_mode"): (
        "a string",
        lambda value: isinstance(value, str),
    ),
    ("act_kwargs", "tokenizer_kwargs"): ("an object", lambda value: isinstance(value, dict)),
    ("norm_kwargs",): (
        "an object with numbers",
        lambda value: isinstance(value, dict) and is_number(value.get("eps", DEFAULT_EPS)),
    ),
}
TEXT_POOLINGS = {"argmax": "eos", "eos": "eos", "first": "first", "last": "last"}

DEFAULT_EPS = 1e-5  # of torch.nn.LayerNorm
# Layer scale starts from it where nothing says; nothing else reads it.
LAYER_SCALE_INIT = 1e-4
WHAT_CAN_BE = (
    "converted are CLIP, CustomTextCLIP and SigLIP with a plain vision transformer and open_clip's own text transformer"
)


class Form(NamedTuple):
    """In which of its forms open_clip stores a model.

    text: what stands before the names of the text tower, "" in CLIP and "text." in CustomTextCLIP.
    siglip: whether the image tower is timm's, below "visual.trunk.".
    linear_projection: whether the text projection is a linear layer with a bias, or CLIP's matrix.
    scale_axes: axes of logit_scale, 0 or 1.
    """

    text: str
    siglip: bool
    linear_projection: bool
    scale_axes: int


def form_of(state_dict: StateDict) -> Form:
    text = "text." if "text.token_embedding.weight" in state_dict else ""
    scale = state_dict.get("logit_scale")
    return Form(
        text,
        siglip="visual.trunk.patch_embed.proj.weight" in state_dict,
        linear_projection=f"{text}text_projection.weight" in state_dict,
        scale_axes=0 if scale is None else min(scale.dim(), 1),
    )


# Reading it


def stated_model_cfg(source_config: SourceConfig) -> dict[str, Any]:
    """What open_clip builds a model from, {} where the config is not open_clip's."""
    model_cfg = source_config.get("model_cfg", source_config)
    if isinstance(model_cfg, dict) and all(
        isinstance(model_cfg.get(name), dict) for name in ("vision_cfg", "text_cfg")
    ):
        return model_cfg
    return {}


def check_model_cfg(model_cfg: Mapping[str, Any]) -> None:
    """Raises ValueError, naming every field, for what cannot be expressed, or what open_clip does not know."""
    if not model_cfg:
        return
    _check_kinds(model_cfg)
    wrong = []
    if "multimodal_cfg" in model_cfg:
        wrong.append("multimodal_cfg (a CoCa)")
    wrong += [name for name in model_cfg if name not in (*MODEL_FIELDS, "multimodal_cfg")]
    vision_cfg, text_cfg = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    for tower, given, needed, others in (
        ("vision_cfg", vision_cfg, VISION_NEEDED, (*VISION_DEFAULTS, *VISION_SHOWN, *VISION_UNREAD)),
        ("text_cfg", text_cfg, TEXT_NEEDED, (*TEXT_DEFAULTS, *TEXT_SHOWN, *TEXT_UNREAD)),
    ):
        wrong += [f"{tower}.{name}={given[name]!r}" for name in needed if given.get(name, needed[name]) != needed[name]]
        wrong += [f"{tower}.{name} (unknown)" for name in given if name not in needed and name not in others]
        if given.get("block_type") not in (None, "default"):
            wrong.append(f"{tower}.block_type={given['block_type']!r}")
        if any(name != "eps" for name in given.get("norm_kwargs") or {}):
            wrong.append(f"{tower}.norm_kwargs={given['norm_kwargs']!r}")
        act = given.get("act_kwargs")
        if act is not None and (
            act not in ({}, {"approximate": "tanh"}, {"approximate": "none"}) or is_quick_gelu(model_cfg)
        ):
            wrong.append(f"{tower}.act_kwargs={act!r}")
    if isinstance(vision_cfg.get("layers"), (list, tuple)):
        wrong.append(f"vision_cfg.layers={vision_cfg['layers']} (a ResNet)")
    if vision_cfg.get("pool_type", "tok") not in ("tok", "avg"):
        wrong.append(f"vision_cfg.pool_type={vision_cfg['pool_type']!r}")
    if text_cfg.get("pool_type", "argmax") not in TEXT_POOLINGS:
        wrong.append(f"text_cfg.pool_type={text_cfg['pool_type']!r}")
    name = vision_cfg.get("timm_model_name")
    if name is not None:
        pooling, projection = (
            vision_cfg.get(f"timm_{part}", VISION_DEFAULTS[f"timm_{part}"]) for part in ("pool", "proj")
        )
        if name not in SIGLIP_NAMES or pooling != "map" or projection != "none":
            wrong.append(f"vision_cfg.timm_model_name={name!r} with timm_pool={pooling!r} and timm_proj={projection!r}")
    if wrong:
        raise ValueError(f"{CONFIG_FILE} asks for what cannot be converted: {', '.join(wrong)}; {WHAT_CAN_BE}")


def _check_kinds(model_cfg: Mapping[str, Any]) -> None:
    """Raises ValueError, naming every field, for values of another kind than open_clip takes."""
    vision_cfg, text_cfg = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    nullable = [name for part in (VISION_DEFAULTS, TEXT_DEFAULTS, VISION_SHOWN) for name in part if part[name] is None]
    wrong = [] if "embed_dim" in model_cfg else ["embed_dim must be a whole number from 1, and is not there"]
    for prefix, part in (("", model_cfg), ("vision_cfg.", vision_cfg), ("text_cfg.", text_cfg)):
        for names, (kind, fits) in KINDS.items():
            for name in names:
                value = part.get(name)
                if name not in part or fits(value) or (value is None and name in nullable):
                    continue
                if name in ("layers", "patch_size") and isinstance(part.get("layers"), (list, tuple)):
                    continue  # a ResNet's, which has its own message
                wrong.append(f"{prefix}{name} must be {kind}, got {value!r}")
    if wrong:
        raise ValueError(f"{CONFIG_FILE} cannot be read: {', '.join(wrong)}")


def check_shown(state_dict: StateDict, form: Form, model_cfg: Mapping[str, Any]) -> None:
    """Raises ValueError, naming every field, where a config says other sizes than the weights have.

    What it leaves out has open_clip's default. To be called behind `check_model_cfg`.
    """
    if not model_cfg:
        return
    said = {
        "": model_cfg,
        "vision_cfg.": {**VISION_DEFAULTS, **VISION_SHOWN, **model_cfg["vision_cfg"]},
        "text_cfg.": {**TEXT_DEFAULTS, **TEXT_SHOWN, **model_cfg["text_cfg"]},
    }
    image = _siglip_seen if form.siglip else _vit_seen
    wrong = []
    for prefix, seen in {
        **image(state_dict, said["vision_cfg."]),
        "text_cfg.": _text_seen(state_dict, form, said["text_cfg."]),
    }.items():
        for name, value in seen.items():
            if said[prefix][name] != value:
                wrong.append(f"{prefix}{name}={said[prefix][name]!r}, the weights have {value!r}")
    if wrong:
        raise ValueError(f"{CONFIG_FILE} contradicts the weights: {'; '.join(wrong)}")


def _vit_seen(state_dict: StateDict, vision_cfg: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the weights of open_clip's own image tower show, as the config has it where both agree."""
    width, _, *patch_size = state_dict["visual.conv1.weight"].shape
    layer_scale = "visual.transformer.resblocks.0.ls_1.gamma" in state_dict
    said_patch, said_scale = vision_cfg["patch_size"], vision_cfg["ls_init_value"]
    fits = patch_size == ([said_patch] * 2 if isinstance(said_patch, int) else list(said_patch))
    return {
        "": {"embed_dim": state_dict["visual.proj"].shape[1]},
        "vision_cfg.": {
            **_tower_seen(state_dict, "visual.transformer.resblocks", width, vision_cfg["mlp_ratio"]),
            "patch_size": said_patch if fits else patch_size,
            "no_ln_pre": "visual.ln_pre.weight" not in state_dict,
            "ls_init_value": said_scale if (said_scale is not None) == layer_scale else layer_scale or None,
        },
    }


def _siglip_seen(state_dict: StateDict, vision_cfg: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The same of timm's, whose name says its sizes."""
    width, _, *patch_size = state_dict["visual.trunk.patch_embed.proj.weight"].shape
    name, layers = vision_cfg["timm_model_name"], count_layers(state_dict, "visual.trunk.blocks")
    found = f"{layers} layers of width {width} and patches of {tuple(patch_size)}"
    fits = name is None or named_sizes(name) == (layers, width, *patch_size)
    return {"": {"embed_dim": width}, "vision_cfg.": {"timm_model_name": name if fits else found}}


def named_sizes(name: str) -> tuple[int, int, int, int]:
    """Layers, width and patch of one of SIGLIP_NAMES."""
    parts = SIGLIP_NAME.fullmatch(name)
    return SIGLIP_DEPTHS[parts["family"]][0], architecture_of(name).width, *[int(parts["patch"])] * 2


def _text_seen(state_dict: StateDict, form: Form, text_cfg: Mapping[str, Any]) -> dict[str, Any]:
    vocab_size, width = state_dict[f"{form.text}token_embedding.weight"].shape
    return {
        **_tower_seen(state_dict, f"{form.text}transformer.resblocks", width, text_cfg["mlp_ratio"]),
        "context_length": len(state_dict[f"{form.text}positional_embedding"]),
        "vocab_size": vocab_size,
        "proj_bias": form.linear_projection,
    }


def _tower_seen(state_dict: StateDict, blocks: str, width: int, mlp_ratio: float) -> dict[str, Any]:
    mlp_width = len(state_dict[f"{blocks}.0.mlp.c_fc.weight"])
    return {
        "width": width,
        "layers": count_layers(state_dict, blocks),
        "mlp_ratio": mlp_ratio if int(width * mlp_ratio) == mlp_width else mlp_width / width,
    }


def is_quick_gelu(model_cfg: Mapping[str, Any]) -> bool:
    return bool(model_cfg.get("quick_gelu", False))


def config_of(
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


# What a folder's tokenizer is told besides its files, kept for the way back.
KEPT_TEXT = ("hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode")


def _vit_fields(
    state_dict: StateDict, model_cfg: Mapping[str, Any], vision_cfg: Mapping[str, Any], options: ConversionOptions
) -> dict[str, Any]:
    """What the config says of open_clip's own vision transformer."""
    width, channels, *patch_size = state_dict["visual.conv1.weight"].shape
    positions = len(state_dict["visual.positional_embedding"])
    head_width = vision_cfg["head_width"] if model_cfg else None
    pooling = {"tok": "cls", "avg": "mean"}[vision_cfg["pool_type"]] if model_cfg else None
    pooling = known(options.pooling_type, pooling, "the pooling", "--pooling_type")
    layer_scale = "visual.transformer.resblocks.0.ls_1.gamma" in state_dict
    return {
        "hidden_size": width,
        "num_hidden_layers": count_layers(state_dict, "visual.transformer.resblocks"),
        "num_attention_heads": known(
            options.num_attention_heads,
            None if head_width is None else width // head_width,
            "the number of attention heads",
            "--num_attention_heads",
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
    named = architecture_of(vision_cfg["timm_model_name"])
    fields = {name: value for name, value in SIGLIP_ARCHITECTURE.items() if name != "pooling_type"}
    heads = None if named is None else named.num_heads
    eps = known(options.layer_norm_eps, None if named is None else named.eps, "eps of the norms", "--layer_norm_eps")
    act = known(options.hidden_act, None if named is None else named.hidden_act, "the activation", "--hidden_act")
    return {
        **fields,
        "hidden_size": width,
        "num_hidden_layers": count_layers(state_dict, "visual.trunk.blocks"),
        "num_attention_heads": known(
            options.num_attention_heads, heads, "the number of attention heads", "--num_attention_heads"
        ),
        "intermediate_size": len(state_dict["visual.trunk.blocks.0.mlp.fc1.weight"]),
        "hidden_act": act,
        "layer_norm_eps": eps,
        "image_size": _image_size(
            state_dict["visual.trunk.pos_embed"].shape[1], tuple(patch_size), vision_cfg, options
        ),
        "patch_size": tuple(patch_size),
        "num_channels": channels,
        "pooling_type": known(options.pooling_type, "map", "the pooling", "--pooling_type"),
        "use_visual_projection": SIGLIP_DUAL_ARCHITECTURE["use_visual_projection"],
        "projection_dim": width,
    }


def _image_size(
    num_patches: int, patch_size: tuple[int, int], vision_cfg: Mapping[str, Any], options: ConversionOptions
) -> tuple[int, int]:
    """(height, width) in pixels that the position table covers; raises ValueError where the config says another."""
    stated = vision_cfg.get("image_size")
    if stated is None or options.image_size is not None:
        return image_size_of(num_patches, patch_size, options)
    stated = (stated, stated) if isinstance(stated, int) else tuple(stated)
    rows, columns = (side // patch for side, patch in zip(stated, patch_size))
    if rows * columns != num_patches:
        raise ValueError(
            f"vision_cfg.image_size={list(stated)} has {rows} x {columns} patches of {patch_size} pixels, but the "
            f"position table has {num_patches}; correct it in {CONFIG_FILE}"
        )
    return rows * patch_size[0], columns * patch_size[1]


def _activation(model_cfg: Mapping[str, Any], tower_cfg: Mapping[str, Any], options: ConversionOptions) -> str:
    stated = "quick_gelu" if is_quick_gelu(model_cfg) else "gelu"
    if (tower_cfg.get("act_kwargs") or {}).get("approximate") == "tanh":
        stated = "gelu_pytorch_tanh"
    return known(options.hidden_act, stated if model_cfg else None, "the activation", "--hidden_act")


def _eps(model_cfg: Mapping[str, Any], tower_cfg: Mapping[str, Any], options: ConversionOptions) -> float:
    stated = (tower_cfg.get("norm_kwargs") or {}).get("eps", DEFAULT_EPS)
    return known(options.layer_norm_eps, stated if model_cfg else None, "eps of the norms", "--layer_norm_eps")


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
        num_attention_heads=known(
            options.text_num_attention_heads,
            text_cfg["heads"] if model_cfg else None,
            "the number of attention heads of the text tower",
            "--text_num_attention_heads",
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
    """What stands behind a text. Under a causal mask read at its end nothing sees it."""
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
        f"this text tower reads the padding behind a text, and nothing says what {given['hf_tokenizer_name']} pads "
        f"with; say it as text_cfg.pad_id in {CONFIG_FILE}"
    )


# Writing it

# Fields of an image tower that its name alone says, and those that weights show.
UNSEEN_FIELDS = ("num_attention_heads", "hidden_act", "layer_norm_eps", "patch_size", "image_size")
SIZE_FIELDS = ("hidden_size", "num_hidden_layers", "intermediate_size")
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")
VIT_ARCHITECTURE = {
    "stem_type": "conv",
    "patch_bias": False,
    "use_cls_token": True,
    "num_register_tokens": 0,
    "position_embedding_type": "learned",
    "norm_type": "layer_norm",
    "norm_position": "pre",
    "qkv_bias": True,
    "num_channels": 3,
    "use_visual_projection": True,
}


def model_cfg_of(config: VitEmbedConfig, form: Form) -> dict[str, Any]:
    """What open_clip builds this model from; raises ValueError, naming every field, where it cannot."""
    text = config.text_config
    if config.architectures != ["VitEmbedForContrastive"] or text is None:
        raise ValueError(
            f"open_clip's models are dual encoders, this is a {config.architectures[0]}; use --layout timm or hf_clip "
            "for an image tower"
        )
    needed = (
        {**SIGLIP_ARCHITECTURE, "use_visual_projection": False, "num_channels": 3} if form.siglip else VIT_ARCHITECTURE
    )
    final_norm = config.final_norm_type if config.resolved_final_norm_type == "layer_norm" else "layer_norm"
    require(config, {**needed, "final_norm_type": final_norm}, "open_clip")
    quick = [act == "quick_gelu" for act in (config.hidden_act, text.hidden_act)]
    if not {config.hidden_act, text.hidden_act} <= set(ACTIVATIONS) or (not form.siglip and quick[0] != quick[1]):
        raise ValueError(
            f"open_clip cannot express this model: hidden_act={config.hidden_act!r} with text_config.hidden_act="
            f"{text.hidden_act!r} (it has 'quick_gelu' for both, or 'gelu' or 'gelu_pytorch_tanh' for each)"
        )
    return model_cfg_from(config, form)


def model_cfg_from(config: VitEmbedConfig, form: Form) -> dict[str, Any]:
    text = config.text_config
    quick = "quick_gelu" in ((config if text is None else text).hidden_act, config.hidden_act)
    return {
        "embed_dim": config.projection_dim,
        **({"quick_gelu": True} if quick else {}),
        **({"custom_text": True} if form.text else {}),
        **({"nonscalar_logit_scale": True} if form.scale_axes else {}),
        # Where training starts; what is stored replaces it.
        **({"init_logit_bias": -10} if config.contrastive_loss == "sigmoid" else {}),
        "vision_cfg": _siglip_cfg(config) if form.siglip else _vit_cfg(config),
        "text_cfg": {} if text is None else _text_cfg(text, config.converted_from or {}),
    }


def _vit_cfg(config: VitEmbedConfig) -> dict[str, Any]:
    mean = config.pooling_type == "mean"
    scale = config.layer_scale_init_value
    return {
        "image_size": list(config.image_shape) if len(set(config.image_shape)) > 1 else config.image_shape[0],
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "head_width": config.hidden_size // config.num_attention_heads,
        "mlp_ratio": _mlp_ratio(config.hidden_size, config.intermediate_size),
        "patch_size": list(config.patch_shape) if len(set(config.patch_shape)) > 1 else config.patch_shape[0],
        **({"patch_dropout": config.patch_drop_rate} if config.patch_drop_rate else {}),
        **({} if scale is None else {"ls_init_value": scale}),
        **({} if config.use_pre_layernorm else {"no_ln_pre": True}),
        **({"pool_type": "avg", "final_ln_after_pool": not config.norm_before_pooling} if mean else {}),
        **_kwargs(config.hidden_act, config.layer_norm_eps),
    }


def _siglip_cfg(config: VitEmbedConfig) -> dict[str, Any]:
    return {
        "image_size": int(SIGLIP_NAME.fullmatch(name := siglip_name(config))["size"]),
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
        **({"patch_dropout": config.patch_drop_rate} if config.patch_drop_rate else {}),
    }


def siglip_name(config: VitEmbedConfig) -> str:
    """timm's name of an image tower of SigLIP: the one that it came from, else the one of its sizes."""
    origin = (config.converted_from or {}).get("timm_model_name")
    fitting = []
    for name in SIGLIP_NAMES:
        named, parts = architecture_of(name), SIGLIP_NAME.fullmatch(name)
        patch, family = int(parts["patch"]), parts["family"]
        side = int(parts["size"]) // patch * patch
        unseen = (named.num_heads, named.hidden_act, named.eps, patch, side)
        sizes = (named.width, *SIGLIP_DEPTHS[family])
        if unseen != tuple(getattr(config, field) for field in UNSEEN_FIELDS):
            continue
        if name == origin:
            return name
        if sizes == tuple(getattr(config, field) for field in SIZE_FIELDS):
            fitting.append(name)
    if not fitting:
        found = ", ".join(f"{field}={getattr(config, field)!r}" for field in (*UNSEEN_FIELDS, *SIZE_FIELDS))
        raise ValueError(
            f"open_clip has SigLIP's image towers in sizes that timm has names for, and none for this model's: {found}"
        )
    return fitting[0]


def _text_cfg(text: VitEmbedTextConfig, origin: Mapping[str, Any]) -> dict[str, Any]:
    largest = text.eos_token_id in (text.vocab_size - 1, LEGACY_EOS_TOKEN_ID)
    pooling = {"eos": {"pool_type": "eos", "eos_id": text.eos_token_id}}.get(
        text.pooling_type, {"pool_type": text.pooling_type}
    )
    kept = dict(origin.get("text_cfg") or {})
    if text.vocab_size != CLIP_VOCAB_SIZE and not kept and origin.get("layout") != "open_clip":
        kept = {"hf_tokenizer_name": "."}  # any name makes open_clip read the tokenizer of the folder
    return {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        **kept,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "layers": text.num_hidden_layers,
        "mlp_ratio": _mlp_ratio(text.hidden_size, text.intermediate_size),
        **({} if text.use_causal_mask else {"no_causal_mask": True}),
        **({} if text.pooling_type == "eos" and largest else pooling),
        **({"pad_id": text.pad_token_id} if text.reads_padding else {}),
        **({"proj_bias": True} if text.projection_bias else {}),
        **_kwargs(text.hidden_act, text.layer_norm_eps),
    }


def _kwargs(hidden_act: str, eps: float) -> dict[str, Any]:
    return {
        **({"act_kwargs": {"approximate": "tanh"}} if hidden_act == "gelu_pytorch_tanh" else {}),
        **({"norm_kwargs": {"eps": eps}} if eps != DEFAULT_EPS else {}),
    }


def _mlp_ratio(width: int, intermediate_size: int) -> float:
    """The factor of which open_clip takes int(width * factor)."""
    ratio = intermediate_size / width
    return ratio if int(width * ratio) == intermediate_size else math.nextafter(ratio, math.inf)
