"""CLIPModel, SiglipModel and their image towers of transformers: there and back, files of every release."""

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
    HF_CLIP_CONFIGS,
    SIGLIP_TEXT,
    SIGLIP_VISION,
    hf_clip,
    siglip_config,
    with_trunk_prefix,
)
from transformers import (
    AutoImageProcessor,
    AutoModel,
    CLIPTextConfig,
    CLIPTextModel,
    SiglipImageProcessor,
    SiglipModel,
    SiglipTextConfig,
    SiglipTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from vit_embed import VitEmbedForContrastive, VitEmbedModel
from vit_embed.conversion.layouts import detect_layout
from vit_embed.conversion.layouts.layout import ConversionOptions
from vit_embed.convert_checkpoint import convert_checkpoint

CONVERT = converter("hf_clip")
DUAL = {"image_features", "text_features", "logits_per_image"}
OUTPUTS = {
    "CLIPModel": ("VitEmbedForContrastive", DUAL),
    "CLIPVisionModel": ("VitEmbedModel", {"last_hidden_state", "pooler_output"}),
    "CLIPVisionModelWithProjection": ("VitEmbedModelWithProjection", {"image_features"}),
    "CLIPForImageClassification": ("VitEmbedForImageClassification", {"logits"}),
    "SiglipModel": ("VitEmbedForContrastive", DUAL),
    "SiglipVisionModel": ("VitEmbedModel", {"last_hidden_state", "pooler_output"}),
    "SiglipForImageClassification": ("VitEmbedForImageClassification", {"logits"}),
}


def source(name, tmp_path):
    """A saved model: weights by their names in the file, and config.json."""
    return saved(hf_clip(name), tmp_path / "source")


# The same numbers


@pytest.mark.parametrize("name", HF_CLIP_CONFIGS)
def test_outputs_equal_transformers(name, tmp_path):
    hf_clip(name).save_pretrained(tmp_path / "source")
    differences = convert_checkpoint(tmp_path / "source", tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    expected_class, outputs = OUTPUTS[name]
    assert config["architectures"] == [expected_class] and config["converted_from"]["layout"] == "hf_clip"
    assert set(differences) == outputs
    # Two orders of float32 operations; measured at most 5e-6 where the largest value is 10.
    assert all(difference < 1e-5 for difference in differences.values())
    if "Classification" in name:
        assert config["id2label"] == {"0": "a", "1": "b", "2": "c"}
    loaded = AutoModel.from_pretrained(tmp_path / "folder", trust_remote_code=True)
    assert type(loaded).__name__ == ("VitEmbedModel" if "Classification" in name else expected_class)


def test_siglips_scale_has_no_bound(tmp_path):
    # google/siglip-base-patch16-224 says 117, beyond the 100 that CLIP trains with.
    model = hf_clip("SiglipModel")
    torch.nn.init.constant_(model.logit_scale, math.log(117.0))
    model.save_pretrained(tmp_path / "source")
    assert convert_checkpoint(tmp_path / "source", tmp_path / "folder")["logits_per_image"] < 1e-4
    ours = VitEmbedForContrastive.from_pretrained(tmp_path / "folder").train()
    ours(tiny.pixels(), tiny.tokens()).loss.backward()
    assert ours.logit_scale.exp().item() == pytest.approx(117) and ours.logit_scale.grad is not None


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel", "SiglipForImageClassification"])
def test_the_trunk_alone(name, tmp_path):
    hf_clip(name).save_pretrained(tmp_path / "source")
    differences = convert_checkpoint(tmp_path / "source", tmp_path / "folder", ConversionOptions(trunk_only=True))
    assert set(differences) == {"last_hidden_state", "pooler_output"} and max(differences.values()) < 1e-5
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["architectures"] == ["VitEmbedModel"] and config.get("text_config") is None


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
    state_dict, config = source(name, tmp_path)
    forms = [{key.removeprefix("vision_model."): tensor for key, tensor in state_dict.items()}]
    forms.append(with_trunk_prefix(forms[0]))
    results = [CONVERT(form, config, ConversionOptions()) for form in forms]
    assert results[0][1].keys() == results[1][1].keys()
    assert all(torch.equal(results[0][1][key], tensor) for key, tensor in results[1][1].items())
    for number, form in enumerate(forms):
        save_file(form, tmp_path / "source" / "model.safetensors")
        assert max(convert_checkpoint(tmp_path / "source", tmp_path / f"{number}").values()) < 1e-5


def test_tables_of_position_ids_are_left_out(tmp_path):
    state_dict, config = source("CLIPModel", tmp_path)
    old = {
        **state_dict,
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
        "text_model.embeddings.position_ids": torch.arange(16)[None],
    }
    _, weights = CONVERT(old, config, ConversionOptions())
    assert weights.keys() == state_dict.keys()
    save_file(old, tmp_path / "source" / "model.safetensors")
    assert max(convert_checkpoint(tmp_path / "source", tmp_path / "folder").values()) < 1e-5


def test_a_config_may_leave_out_defaults_and_name_towers_twice(tmp_path):
    state_dict, config = source("CLIPModel", tmp_path)
    towers = {"vision_config": {}, "vision_config_dict": config["vision_config"], "text_config": config["text_config"]}
    got, _ = CONVERT(state_dict, {"model_type": "clip", "projection_dim": 20, **towers}, ConversionOptions())
    assert (got.num_attention_heads, got.layer_norm_eps, got.hidden_act) == (4, 1e-3, "gelu")
    # What a text tower's config leaves out is CLIP's: quick_gelu.
    assert got.text_config.hidden_act == "quick_gelu"
    siglip, config = source("SiglipModel", tmp_path / "siglip")
    for tower in ("vision_config", "text_config"):
        config[tower] = {name: value for name, value in config[tower].items() if name not in ("hidden_act", "dtype")}
    got, _ = CONVERT(siglip, config, ConversionOptions())
    assert got.hidden_act == got.text_config.hidden_act == "gelu_pytorch_tanh"
    assert got.text_config.eos_token_id == 1  # 49,407 of SiglipTextConfig is beyond the vocabulary


# Told apart, and refused


@pytest.mark.parametrize("name", HF_CLIP_CONFIGS)
def test_detection(name, tmp_path):
    state_dict, config = source(name, tmp_path)
    assert detect_layout(state_dict, config)[0] == "hf_clip"
    assert detect_layout(state_dict, {})[0] == "hf_clip"
    with pytest.raises(ValueError, match="needs its config.json .* there is no config.json beside it"):
        CONVERT(state_dict, {}, ConversionOptions())


def test_text_towers_are_refused_by_name(tmp_path):
    for number, model in enumerate(
        (CLIPTextModel(CLIPTextConfig(**CLIP_TEXT)), SiglipTextModel(SiglipTextConfig(**SIGLIP_TEXT)))
    ):
        model.save_pretrained(tmp_path / f"{number}")
        with pytest.raises(ValueError, match="model_type '(clip|siglip)_text_model' .* text tower alone"):
            convert_checkpoint(tmp_path / f"{number}", tmp_path / "out")


@pytest.mark.parametrize("model_type", ["siglip2", "metaclip_2", "chinese_clip", "clipseg"])
def test_relatives_are_refused_by_name(model_type, tmp_path):
    state_dict, config = source("CLIPModel", tmp_path)
    with pytest.raises(ValueError, match=f"model_type '{model_type}' cannot be converted: "):
        CONVERT(state_dict, {**config, "model_type": model_type}, ConversionOptions())
    assert detect_layout(state_dict, {**config, "model_type": model_type})[0] == "hf_clip"


def test_a_siglip_tower_without_its_head_is_refused(tmp_path):
    state_dict, config = source("SiglipVisionModel", tmp_path)
    with pytest.raises(ValueError, match="vision_use_head=false"):
        CONVERT(state_dict, {**config, "vision_use_head": False}, ConversionOptions())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_hidden_layers": 3}, "without a place in the model: .*layers.3"),
        ({"hidden_size": 36}, "another shape than the sizes"),
        ({"num_attention_heads": 5}, "num_attention_heads|number of attention heads"),
        ({"hidden_act": "mish"}, "hidden_act must be one of"),
        ({"image_size": 64}, "position_embedding.weight must be"),
        ({"image_size": "large"}, "image_size"),
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused(changes, message, tmp_path):
    for name in ("CLIPVisionModel", "SiglipVisionModel"):
        state_dict, config = source(name, tmp_path / name)
        with pytest.raises(ValueError, match=message):
            CONVERT(state_dict, {**config, **changes}, ConversionOptions())


def test_tensors_of_another_rank_are_refused(tmp_path):
    state_dict, config = source("SiglipModel", tmp_path)
    for key in ("vision_model.embeddings.patch_embedding.weight", "logit_scale", "vision_model.head.probe"):
        with pytest.raises(ValueError, match=f"{key} must be"):
            CONVERT({**state_dict, key: state_dict[key][None]}, config, ConversionOptions())


def test_another_activation_may_be_told(tmp_path, caplog):
    hf_clip("CLIPModel").save_pretrained(tmp_path / "source")
    differences = convert_checkpoint(tmp_path / "source", tmp_path / "folder", ConversionOptions(hidden_act="relu"))
    assert max(differences.values()) < 1e-5
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["hidden_act"] == config["text_config"]["hidden_act"] == "relu"
    assert "--hidden_act relu overrides the source's activation, gelu" in caplog.text
    with pytest.raises(ValueError, match="does not read --num_attention_heads"):
        convert_checkpoint(tmp_path / "source", tmp_path / "other", ConversionOptions(num_attention_heads=2))


def test_siglip_without_its_processor_gets_siglips_settings(tmp_path):
    tiny.randomised(SiglipModel(siglip_config())).save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    stock = json.loads(SiglipImageProcessor(size={"height": 32, "width": 32}).to_json_string())
    assert written["do_center_crop"] is False and written["size"] == {"height": 32, "width": 32}
    for name in ("image_mean", "image_std", "rescale_factor", "do_resize", "do_normalize"):
        assert written[name] == stock[name], name
    assert written["resample"] == int(stock["resample"])
