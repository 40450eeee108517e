"""The CLIP half of DeepSeek-OCR: converted to the same numbers, alone or out of the whole model."""

import importlib.util
import json
import logging
from pathlib import Path

import pytest
import tiny
import torch
from conversions import built, converter
from deepseek_reference import HEADS, DeepSeekClip, deepseek_clip, whole_config, whole_model
from PIL import Image
from transformers import AutoImageProcessor

import vit_embed
from vit_embed import VitEmbedConfig, VitEmbedModel
from vit_embed.conversion.layouts import detect_layout
from vit_embed.conversion.layouts.layout import ConversionOptions
from vit_embed.convert_checkpoint import convert_checkpoint

CONFIGS = Path(vit_embed.__file__).parent / "configs"
GIVEN = ConversionOptions(num_attention_heads=HEADS)


def from_deepseek(state_dict: dict, source_config: dict | None = None, options: ConversionOptions = GIVEN):
    return converter("deepseek_ocr")(state_dict, source_config or {}, options)


def converted(state_dict: dict, *args) -> VitEmbedModel:
    return built(*from_deepseek(state_dict, *args))


@torch.no_grad()
def assert_every_state_equal(model: VitEmbedModel, expected: list[torch.Tensor], **inputs) -> None:
    output = model(**inputs, output_hidden_states=True)
    assert len(output.hidden_states) == len(expected)
    for ours, theirs in zip((*output.hidden_states, output.last_hidden_state), (*expected, expected[-1])):
        # Of the largest value: two orders of float32 sums over three layers, measured 5e-7.
        torch.testing.assert_close(ours / theirs.abs().max(), theirs / theirs.abs().max(), rtol=0, atol=1e-5)


# Equal


@pytest.mark.parametrize("size", [48, 16])
def test_pixels_of_other_sizes(size):
    source, pixel_values = deepseek_clip(), tiny.pixels(height=size, width=size)
    assert_every_state_equal(converted(source.weights()), source(pixel_values), pixel_values=pixel_values)


@pytest.mark.parametrize("side", [4, 8, 3])
def test_features_of_another_encoder_in_place_of_pixels(side):
    source, patch_embeds = deepseek_clip(), torch.randn(2, 32, side, side, generator=torch.Generator().manual_seed(3))
    expected = source(torch.empty(2, 3, 0, 0), patch_embeds)
    assert_every_state_equal(converted(source.weights()), expected, patch_embeds=patch_embeds)


def test_the_published_width_gives_the_config_of_the_system():
    with torch.device("meta"):
        source = DeepSeekClip(width=1024, layers=1, heads=16, hidden=4096, patch=14, image=224)
    # Zeros take no memory until they are written.
    state_dict = {key: torch.zeros(tensor.shape) for key, tensor in source.weights().items()}
    config, _ = from_deepseek(state_dict, {}, ConversionOptions())
    stated = json.loads((CONFIGS / "deepseek-ocr-clip-l.json").read_text())
    assert stated.pop("num_hidden_layers") == 24 and config.num_hidden_layers == 1
    assert {name: getattr(config, name) for name in stated} == stated
    # Whatever the file leaves at its default is the default here too.
    expected = VitEmbedConfig(**{**stated, "num_hidden_layers": 1}, architectures=["VitEmbedModel"])
    got = config.to_dict()
    assert got.pop("converted_from") == {"layout": "deepseek_ocr"}
    assert got == {name: value for name, value in expected.to_dict().items() if name != "converted_from"}


@pytest.mark.skipif(
    importlib.util.find_spec("transformers.models.unlimited_ocr") is None, reason="transformers 5.23 and newer"
)
@torch.no_grad()
def test_equals_the_encoder_of_unlimited_ocr():
    """Another hand's code for the same weights: transformers' model of Unlimited-OCR, which took this half over."""
    from transformers.models.unlimited_ocr.configuration_unlimited_ocr import UnlimitedOcrVisionEncoderConfig
    from transformers.models.unlimited_ocr.modeling_unlimited_ocr import UnlimitedOcrVisionEncoder

    source = deepseek_clip()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": HEADS}
    theirs = UnlimitedOcrVisionEncoder(UnlimitedOcrVisionEncoderConfig(**sizes, image_size=32, patch_size=8)).eval()
    model = converted(source.weights())
    weights = {key: tensor for key, tensor in model.state_dict().items() if "patch_embedding" not in key}
    theirs.load_state_dict(weights)  # strict: its keys are CLIP's, as ours are
    for grid in ((4, 4), (8, 8), (3, 5)):
        patch_embeds = torch.randn(2, 32, *grid)
        torch.testing.assert_close(
            model(patch_embeds=patch_embeds).last_hidden_state,
            theirs(patch_embeds).last_hidden_state,
            rtol=0,
            atol=1e-5,
        )


def test_the_whole_models_folder_gives_the_half(made, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    convert_checkpoint(made("deepseek_ocr: whole model").path, tmp_path / "clip")
    assert "layout deepseek_ocr" in caplog.text and "could not be run" in caplog.text
    processor = AutoImageProcessor.from_pretrained(tmp_path / "clip")
    pictures = [Image.new("RGB", (50, 40), (level,) * 3) for level in (0, 255)]
    pixel_values = processor(images=pictures, return_tensors="pt")["pixel_values"]
    # Mean and deviation 0.5 make of 0 ... 255 the range -1 ... 1; float32 rounds.
    expected = torch.stack([torch.full((3, 32, 32), -1.0), torch.ones(3, 32, 32)])
    torch.testing.assert_close(pixel_values, expected, rtol=0, atol=1e-5)


# Which it is


@pytest.mark.parametrize("prefix", ["", "vision_model.", "model.vision_model."])
@pytest.mark.parametrize("source_config", [{}, whole_config()])
def test_detected_with_and_without_a_config_and_under_every_prefix(prefix, source_config):
    weights = {prefix + key: tensor for key, tensor in deepseek_clip().weights().items()}
    layout, reason = detect_layout(weights, source_config)
    assert layout == "deepseek_ocr" and f"{prefix}transformer.layers" in reason
    assert from_deepseek(weights, source_config)[0].num_hidden_layers == 3


# Heads, and what is refused


def test_heads_come_from_the_config_or_must_be_given():
    weights = deepseek_clip().weights()
    assert from_deepseek(weights, whole_config(), ConversionOptions())[0].num_attention_heads == HEADS
    with pytest.raises(ValueError, match="--num_attention_heads of width 32"):
        from_deepseek(weights, {}, ConversionOptions())
    with pytest.raises(ValueError, match="--num_attention_heads"):
        from_deepseek(weights, {"vision_config": {"width": 1024}}, ConversionOptions())


@pytest.mark.parametrize(("field", "value"), [("width", 64), ("layers", 24), ("patch_size", 14), ("image_size", 224)])
def test_a_config_that_contradicts_the_weights(field, value):
    with pytest.raises(ValueError, match=f"{field} of clip-l-14-224 must be .* got {value}"):
        from_deepseek(deepseek_clip().weights(), whole_config(**{field: value}))


def test_options_that_its_code_fixes_are_refused(made, tmp_path):
    for option in ({"hidden_act": "gelu"}, {"layer_norm_eps": 1e-6}, {"norm_position": "post"}):
        with pytest.raises(ValueError, match=f"does not read --{next(iter(option))}"):
            convert_checkpoint(made("deepseek_ocr: whole model").path, tmp_path, ConversionOptions(**option))


@pytest.mark.parametrize(
    "key", ["model.audio_model.weight", "model.qwen2_model.query_768.weight", "post_layernorm.bias"]
)
def test_a_part_that_is_not_known_is_listed(key):
    with pytest.raises(ValueError, match=f"without a place in the model: {key}"):
        from_deepseek({**whole_model(deepseek_clip()), key: torch.ones(2)})
