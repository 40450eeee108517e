"""Running open_clip's own code on the source's weights."""

import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch

from vit_embed import VitEmbedConfig
from vit_embed.conversion.layouts.layout import ConversionOptions, SampleInputs, SourceConfig, StateDict
from vit_embed.conversion.layouts.open_clip.config import build_config
from vit_embed.conversion.layouts.open_clip.form import Form, find_form
from vit_embed.conversion.layouts.open_clip.model_cfg import is_quick_gelu, read_model_cfg
from vit_embed.conversion.layouts.open_clip.written import write_model_cfg
from vit_embed.conversion.layouts.running import as_float32, with_remainder


@torch.no_grad()
def reference(
    state_dict: StateDict, source_config: SourceConfig, config: VitEmbedConfig, inputs: SampleInputs
) -> dict[str, torch.Tensor]:
    """Features and logits of open_clip's own code; of a trunk alone its states. Raises ImportError without it."""
    import open_clip

    form = find_form(state_dict)
    model_cfg = read_model_cfg(source_config)
    if not model_cfg or _differs(state_dict, model_cfg, config):
        model_cfg = write_model_cfg(config, form)
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


# What options may change.
CHANGEABLE = ("hidden_act", "layer_norm_eps", "num_attention_heads", "pooling_type")


def _differs(state_dict: StateDict, model_cfg: Mapping[str, Any], config: VitEmbedConfig) -> bool:
    """Whether the user gave something else than open_clip's config says."""
    trunk_only = config.text_config is None
    options = ConversionOptions(image_size=config.image_shape, trunk_only=trunk_only)
    original = build_config(state_dict, find_form(state_dict), model_cfg, options)
    towers = [(original, config)] if trunk_only else [(original, config), (original.text_config, config.text_config)]
    return any(getattr(old, name) != getattr(new, name) for old, new in towers for name in CHANGEABLE)


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
