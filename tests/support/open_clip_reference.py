"""open_clip's own models at a small size, and the folders that it keeps them in: what conversion is held to.

Needs open_clip_torch and timm of requirements-references.txt.
"""

import copy
import functools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch
from references import import_package
from safetensors.torch import save_file

from vit_embed.conversion.layouts.open_clip import siglip_names

# Heads that no rule of thumb gives: four of 8 in the image tower, three of 8 in the text tower.
MODEL_CFG = {
    "embed_dim": 20,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": tiny.TEXT["vocab_size"], "width": 24, "heads": 3, "layers": 2},
}
# As open_clip's ViT-B-16-SigLIP.json, with a smaller text tower and, by `small_siglip`, a smaller image tower.
SIGLIP_WIDTH = 48  # of twelve heads, which the name says
SIGLIP_CFG = {
    "embed_dim": SIGLIP_WIDTH,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 224,
        "timm_model_name": "vit_base_patch16_siglip_224",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": {
        **MODEL_CFG["text_cfg"],
        "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "pad_id": 1,
        "norm_kwargs": {"eps": 1e-4},
    },
}
SQUASH = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash"}


@functools.cache
def open_clip_code() -> ModuleType:
    import_package("timm")
    return import_package("open_clip")


def small_siglip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes timm build SigLIP's image towers two layers deep and SIGLIP_WIDTH wide, by their own names."""
    open_clip_code()
    import timm

    def create_model(name: str, **options: Any) -> torch.nn.Module:
        small = {"embed_dim": SIGLIP_WIDTH, "depth": 2} if "_siglip_" in name else {}
        return original(name, **{**options, **small})

    original, sizes = timm.create_model, siglip_names.named_sizes
    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(siglip_names, "named_sizes", lambda name: (2, SIGLIP_WIDTH, *sizes(name)[2:]))


def changed(base: dict[str, Any], vision: dict | None = None, text: dict | None = None, **top: Any) -> dict[str, Any]:
    """A model_cfg with other values."""
    model_cfg = copy.deepcopy(base)
    model_cfg["vision_cfg"].update(vision or {})
    model_cfg["text_cfg"].update(text or {})
    return {**model_cfg, **top}


def built(model_cfg: dict[str, Any]) -> torch.nn.Module:
    """open_clip's model of a config, every weight random and of a size that shows in the output."""
    fields = copy.deepcopy(model_cfg)
    model_class = "CustomTextCLIP" if fields.pop("custom_text", False) else "CLIP"
    return tiny.randomised(getattr(open_clip_code(), model_class)(**fields))


def write_folder(folder: Path, model_cfg: dict[str, Any], preprocess_cfg: dict | None = None) -> torch.nn.Module:
    """A folder as open_clip pushes it to the Hub, of the model that is returned."""
    model = built(model_cfg)
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    stated = {"model_cfg": model_cfg, "preprocess_cfg": SQUASH if preprocess_cfg is None else preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(stated))
    return model


def source(model_cfg=MODEL_CFG):
    """A model of open_clip: its weights and its config."""
    return built(model_cfg).state_dict(), {"model_cfg": copy.deepcopy(model_cfg)}


TANH = {"act_kwargs": {"approximate": "tanh"}}
MODEL_CFGS = {
    "clip": MODEL_CFG,
    "quickgelu": changed(MODEL_CFG, quick_gelu=True),
    "clipa": changed(
        MODEL_CFG,
        {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        {"pool_type": "last", "no_causal_mask": True},
    ),
    "norm before the mean": changed(MODEL_CFG, {"pool_type": "avg", "norm_kwargs": {"eps": 1e-3}, **TANH}),
    "layer scale": changed(MODEL_CFG, {"ls_init_value": 1e-4, "mlp_ratio": 2.3}, {"proj_bias": True, **TANH}),
    "custom text": changed(MODEL_CFG, custom_text=True, nonscalar_logit_scale=True, init_logit_bias=-10),
    "end of text": changed(MODEL_CFG, None, {"pool_type": "eos", "eos_id": 7, "hf_tokenizer_name": "words"}),
    "largest id": changed(MODEL_CFG, None, {"hf_tokenizer_name": "words", "norm_kwargs": {"eps": 1e-3}}),
    "first token": changed(MODEL_CFG, None, {"pool_type": "first", "no_causal_mask": True}),
    "rectangle": changed(MODEL_CFG, {"image_size": [32, 48], "pos_embed_type": "learnable"}),
    "siglip": SIGLIP_CFG,
    "siglip2": changed(SIGLIP_CFG, {"timm_model_name": "vit_base_patch32_siglip_256", "image_size": 256}, TANH),
}
