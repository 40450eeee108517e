"""open_clip_config.json: what open_clip builds a model from, read and held against the weights (read at 3.3.0)."""

from collections.abc import Mapping
from typing import Any

from vit_embed.conversion.layouts.layout import SourceConfig, StateDict
from vit_embed.conversion.layouts.open_clip import siglip_names
from vit_embed.conversion.layouts.open_clip.form import Form
from vit_embed.conversion.layouts.questions import (
    COUNT,
    NUMBER,
    OBJECT,
    SIZE,
    TEXT,
    TRUTH,
    WHOLE_NUMBER,
    Kind,
    count_layers,
    is_number,
    wrong_kinds,
)

CONFIG_FILE = "open_clip_config.json"
DEFAULT_EPS = 1e-5  # of torch.nn.LayerNorm
TEXT_POOLINGS = {"argmax": "eos", "eos": "eos", "first": "first", "last": "last"}
WHAT_CAN_BE = (
    "converted are CLIP, CustomTextCLIP and SigLIP with a plain vision transformer and open_clip's own text transformer"
)

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
ONLY_DEFAULTS = {
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}
VISION_NEEDED = {"attentional_pool": False, **ONLY_DEFAULTS}
TEXT_NEEDED = {
    "hf_model_name": None,
    "embed_cls": False,
    "proj_type": "linear",
    "ls_init_value": None,
    **ONLY_DEFAULTS,
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
# text tower nothing. `pad_id` is read where it is there; what it is by default no model needs.
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


# What a field that is read must be, in any part of the config; None as well where that is its default.
EPS = Kind("an object with numbers", lambda value: isinstance(value, dict) and is_number(value.get("eps", DEFAULT_EPS)))
KINDS = {
    **dict.fromkeys(("embed_dim", "layers", "width", "head_width", "heads", "context_length", "vocab_size"), COUNT),
    **dict.fromkeys(("image_size", "patch_size"), SIZE),
    **dict.fromkeys(("eos_id", "pad_id"), WHOLE_NUMBER),
    **dict.fromkeys(("mlp_ratio", "patch_dropout", "ls_init_value"), NUMBER),
    **dict.fromkeys(("no_ln_pre", "final_ln_after_pool", "no_causal_mask", "proj_bias"), TRUTH),
    **dict.fromkeys(("quick_gelu", "custom_text"), TRUTH),
    **dict.fromkeys(("pool_type", "timm_model_name", "hf_tokenizer_name", "tokenizer_mode"), TEXT),
    **dict.fromkeys(("act_kwargs", "tokenizer_kwargs"), OBJECT),
    "norm_kwargs": EPS,
}


def read_model_cfg(source_config: SourceConfig) -> dict[str, Any]:
    """What open_clip builds a model from, {} where the config is not open_clip's."""
    model_cfg = source_config.get("model_cfg", source_config)
    if isinstance(model_cfg, dict) and all(
        isinstance(model_cfg.get(name), dict) for name in ("vision_cfg", "text_cfg")
    ):
        return model_cfg
    return {}


def is_quick_gelu(model_cfg: Mapping[str, Any]) -> bool:
    return bool(model_cfg.get("quick_gelu", False))


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
        if name not in siglip_names.SIGLIP_NAMES or pooling != "map" or projection != "none":
            wrong.append(f"vision_cfg.timm_model_name={name!r} with timm_pool={pooling!r} and timm_proj={projection!r}")
    if wrong:
        raise ValueError(f"{CONFIG_FILE} asks for what cannot be converted: {', '.join(wrong)}; {WHAT_CAN_BE}")


def _check_kinds(model_cfg: Mapping[str, Any]) -> None:
    """Raises ValueError, naming every field, for values of another kind than open_clip takes."""
    nullable = [name for part in (VISION_DEFAULTS, TEXT_DEFAULTS, VISION_SHOWN) for name in part if part[name] is None]
    wrong = [] if "embed_dim" in model_cfg else ["embed_dim must be a whole number from 1, and is not there"]
    parts = {"": model_cfg, "vision_cfg.": model_cfg["vision_cfg"], "text_cfg.": model_cfg["text_cfg"]}
    for prefix, part in parts.items():
        # The stages of a ResNet have their own message.
        resnet = ("layers", "patch_size") if isinstance(part.get("layers"), (list, tuple)) else ()
        checked = {
            name: value
            for name, value in part.items()
            if name not in resnet and not (value is None and name in nullable)
        }
        wrong += wrong_kinds(checked, KINDS, prefix)
    if wrong:
        raise ValueError(f"{CONFIG_FILE} cannot be read: {', '.join(wrong)}")


def check_shown(state_dict: StateDict, form: Form, model_cfg: Mapping[str, Any]) -> None:
    """Raises ValueError, naming every field, where a config says other sizes than the weights have.

    What it leaves out has open_clip's default. To be called after `check_model_cfg`.
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
    fits = name is None or siglip_names.named_sizes(name) == (layers, width, *patch_size)
    return {"": {"embed_dim": width}, "vision_cfg.": {"timm_model_name": name if fits else found}}


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
