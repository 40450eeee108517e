"""CLIPModel, SiglipModel and their image towers of transformers: scales, trunks, files of every release.

What holds for every layout is in test_there_and_back.py.
"""

import json
import math

import pictures
import pytest
import tiny
import torch
from conversions import converter, saved
from safetensors.torch import save_file
from sources import (
    CLIP_TEXT,
    SIGLIP_TEXT,
    SIGLIP_VISION,
    hf_clip,
    with_trunk_prefix,
)
from transformers import (
    AutoImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    SiglipImageProcessor,
    SiglipTextConfig,
    SiglipTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from vit_embed import VitEmbedForContrastive, VitEmbedModel
from vit_embed.conversion.layouts.layout import ConversionOptions
from vit_embed.convert_checkpoint import convert_checkpoint


def convert(state_dict, config):
    return converter("hf_clip")(state_dict, config, ConversionOptions())


def test_siglips_scale_has_no_bound(tmp_path):
    # google/siglip-base-patch16-224 says 117, beyond the 100 that CLIP trains with.
    model = hf_clip("SiglipModel")
    torch.nn.init.constant_(model.logit_scale, math.log(117.0))
    model.save_pretrained(tmp_path / "source")
    assert convert_checkpoint(tmp_path / "source", tmp_path / "folder")["logits_per_image"] < 1e-4
    ours = VitEmbedForContrastive.from_pretrained(tmp_path / "folder").train()
    ours(tiny.pixels(), tiny.tokens()).loss.backward()
    assert ours.logit_scale.exp().item() == pytest.approx(117) and ours.logit_scale.grad is not None


def test_a_remainder_of_pixels_is_left_out(tmp_path):
    # As in google/siglip-so400m-patch14-384, whose convolution reads 378 of 384 pixels.
    vision = {**SIGLIP_VISION, "image_size": 35}
    tiny.randomised(SiglipVisionModel(SiglipVisionConfig(**vision))).save_pretrained(tmp_path / "source")
    SiglipImageProcessor(size={"height": 35, "width": 35}).save_pretrained(tmp_path / "source")
    assert max(convert_checkpoint(tmp_path / "source", tmp_path / "folder").values()) < 1e-5
    processor = AutoImageProcessor.from_pretrained(tmp_path / "folder")
    pixel_values = processor(pictures.photo("china"), return_tensors="pt").pixel_values
    assert pixel_values.shape[-2:] == (32, 32)
    VitEmbedModel.from_pretrained(tmp_path / "folder")(pixel_values)


# Forms of other releases


@pytest.mark.parametrize("name", ["CLIPVisionModel", "SiglipVisionModel"])
def test_image_towers_of_both_releases_give_the_same(name, tmp_path):
    state_dict, config = saved(hf_clip(name), tmp_path / "source")
    forms = [{key.removeprefix("vision_model."): tensor for key, tensor in state_dict.items()}]
    forms.append(with_trunk_prefix(forms[0]))
    results = [convert(form, config) for form in forms]
    assert results[0][1].keys() == results[1][1].keys()
    assert all(torch.equal(results[0][1][key], tensor) for key, tensor in results[1][1].items())
    for number, form in enumerate(forms):
        save_file(form, tmp_path / "source" / "model.safetensors")
        assert max(convert_checkpoint(tmp_path / "source", tmp_path / f"{number}").values()) < 1e-5


def test_tables_of_position_ids_are_left_out(tmp_path):
    state_dict, config = saved(hf_clip("CLIPModel"), tmp_path / "source")
    old = {
        **state_dict,
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
        "text_model.embeddings.position_ids": torch.arange(16)[None],
    }
    _, weights = convert(old, config)
    assert weights.keys() == state_dict.keys()
    save_file(old, tmp_path / "source" / "model.safetensors")
    assert max(convert_checkpoint(tmp_path / "source", tmp_path / "folder").values()) < 1e-5


def test_a_config_may_leave_out_defaults_and_name_towers_twice(made):
    state_dict, config = made("hf_clip: CLIPModel")[2:]
    towers = {"vision_config": {}, "vision_config_dict": config["vision_config"], "text_config": config["text_config"]}
    got, _ = convert(state_dict, {"model_type": "clip", "projection_dim": 20, **towers})
    assert (got.num_attention_heads, got.layer_norm_eps, got.hidden_act) == (4, 1e-3, "gelu")
    # What a text tower's config leaves out is CLIP's: quick_gelu.
    assert got.text_config.hidden_act == "quick_gelu"
    siglip, config = made("hf_clip: SiglipModel")[2:]
    config = dict(config)
    for tower in ("vision_config", "text_config"):
        config[tower] = {name: value for name, value in config[tower].items() if name not in ("hidden_act", "dtype")}
    got, _ = convert(siglip, config)
    assert got.hidden_act == got.text_config.hidden_act == "gelu_pytorch_tanh"
    assert got.text_config.eos_token_id == 1  # 49,407 of SiglipTextConfig is beyond the vocabulary


# Refused


def test_a_file_alone_needs_its_config(made):
    with pytest.raises(ValueError, match="needs its config.json .* there is no config.json beside it"):
        convert(made("hf_clip: SiglipModel").state_dict, {})


def test_text_towers_are_refused_by_name(tmp_path):
    for number, model in enumerate(
        (CLIPTextModel(CLIPTextConfig(**CLIP_TEXT)), SiglipTextModel(SiglipTextConfig(**SIGLIP_TEXT)))
    ):
        model.save_pretrained(tmp_path / f"{number}")
        with pytest.raises(ValueError, match="model_type '(clip|siglip)_text_model' .* text tower alone"):
            convert_checkpoint(tmp_path / f"{number}", tmp_path / "out")


def test_siglip_without_its_processor_gets_siglips_settings(made, tmp_path):
    convert_checkpoint(made("hf_clip: SiglipModel").path, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    stock = json.loads(SiglipImageProcessor(size={"height": 32, "width": 32}).to_json_string())
    assert written["do_center_crop"] is False and written["size"] == {"height": 32, "width": 32}
    for name in ("image_mean", "image_std", "rescale_factor", "do_resize", "do_normalize"):
        assert written[name] == stock[name], name
    assert written["resample"] == int(stock["resample"])
