"""What we write into open_clip_config.json for a model of ours."""

from collections.abc import Mapping
from typing import Any

from vit_embed import VitEmbedConfig, VitEmbedTextConfig
from vit_embed.configuration_vit_embed import LEGACY_EOS_TOKEN_ID
from vit_embed.conversion.layouts import hf_siglip
from vit_embed.conversion.layouts.open_clip import siglip_names
from vit_embed.conversion.layouts.open_clip.form import Form
from vit_embed.conversion.layouts.open_clip.model_cfg import DEFAULT_EPS
from vit_embed.conversion.layouts.questions import layer_norm_at_end, require
from vit_embed.conversion.layouts.timm.config_file import mlp_ratio
from vit_embed.options_vit_embed import CLIP_VOCAB_SIZE

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


def checked_model_cfg(config: VitEmbedConfig, form: Form) -> dict[str, Any]:
    """What open_clip builds this model from; raises ValueError, naming every field, where it cannot."""
    text = config.text_config
    if config.architectures != ["VitEmbedForContrastive"] or text is None:
        raise ValueError(
            f"open_clip's models are dual encoders, this is a {config.architectures[0]}; use --layout timm or hf_clip "
            "for an image tower"
        )
    needed = (
        {**hf_siglip.ARCHITECTURE, "use_visual_projection": False, "num_channels": 3}
        if form.siglip
        else VIT_ARCHITECTURE
    )
    require(config, {**needed, "final_norm_type": layer_norm_at_end(config)}, "open_clip")
    quick = [act == "quick_gelu" for act in (config.hidden_act, text.hidden_act)]
    if not {config.hidden_act, text.hidden_act} <= set(ACTIVATIONS) or (not form.siglip and quick[0] != quick[1]):
        raise ValueError(
            f"open_clip cannot express this model: hidden_act={config.hidden_act!r} with text_config.hidden_act="
            f"{text.hidden_act!r} (it has 'quick_gelu' for both, or 'gelu' or 'gelu_pytorch_tanh' for each)"
        )
    return write_model_cfg(config, form)


def write_model_cfg(config: VitEmbedConfig, form: Form) -> dict[str, Any]:
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
        "mlp_ratio": mlp_ratio(config.intermediate_size, config.hidden_size),
        "patch_size": list(config.patch_shape) if len(set(config.patch_shape)) > 1 else config.patch_shape[0],
        **({"patch_dropout": config.patch_drop_rate} if config.patch_drop_rate else {}),
        **({} if scale is None else {"ls_init_value": scale}),
        **({} if config.use_pre_layernorm else {"no_ln_pre": True}),
        **({"pool_type": "avg", "final_ln_after_pool": not config.norm_before_pooling} if mean else {}),
        **_kwargs(config.hidden_act, config.layer_norm_eps),
    }


def _siglip_cfg(config: VitEmbedConfig) -> dict[str, Any]:
    return {
        "image_size": int(siglip_names.SIGLIP_NAME.fullmatch(name := siglip_names.fitting_name(config))["size"]),
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
        **({"patch_dropout": config.patch_drop_rate} if config.patch_drop_rate else {}),
    }


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
        "mlp_ratio": mlp_ratio(text.intermediate_size, text.hidden_size),
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
