"""DINOv2: Meta's own files, and rectangles. What it shares with ViT is in test_convert_hf_vit.py."""

import logging

import pytest
import tiny
import torch
from conversions import assert_same_states, built, by_meta, converter, saved
from sources import BARE_OPTIONS, DINOV2_MODELS, dinov2

from vit_embed import VitEmbedModel
from vit_embed.conversion.layouts import LAYOUTS, detect_layout
from vit_embed.conversion.layouts.layout import ConversionOptions
from vit_embed.convert_checkpoint import convert_checkpoint

CONVERT = converter("dinov2")
TRUNK_ONLY = ConversionOptions(trunk_only=True)
FIELDS = ("num_attention_heads", "hidden_act", "layer_norm_eps")


@pytest.mark.parametrize("name", DINOV2_MODELS)
def test_a_rectangle_that_transformers_cannot_run_is_converted_without_a_comparison(name, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    DINOV2_MODELS[name](image_size=[56, 70]).save_pretrained(tmp_path / "source")
    assert convert_checkpoint(tmp_path / "source", tmp_path / "folder") is None
    assert "could not be run: DINOv2 of transformers resamples square position tables alone" in caplog.text
    assert VitEmbedModel.from_pretrained(tmp_path / "folder").config.image_shape == (56, 70)


def test_a_rectangle_that_transformers_takes_for_a_square_is_asked_about(tmp_path):
    model = dinov2(image_size=[28, 112])
    state_dict, config = saved(model, tmp_path)
    with pytest.raises(ValueError, match=r"16 positions as 4 x 4 of them; give --image_size 56 56"):
        CONVERT(state_dict, config, ConversionOptions())
    ours = built(*CONVERT(state_dict, config, ConversionOptions(image_size=(56, 56))))
    assert_same_states(ours, model, tiny.pixels(1, 28, 112))


def test_the_rates_of_training_are_kept(tmp_path):
    rates = {"drop_path_rate": 0.3, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2}
    config, _ = CONVERT(*saved(dinov2(**rates), tmp_path), ConversionOptions())
    assert (config.drop_path_rate, config.hidden_dropout_prob, config.attention_dropout) == (0.3, 0.1, 0.2)


# Meta's files


@pytest.mark.parametrize("name", DINOV2_MODELS)
def test_metas_names_give_what_transformers_names_do(name, made):
    config, weights = CONVERT(made(f"dinov2: {name} of Meta").state_dict, {}, ConversionOptions(**BARE_OPTIONS))
    expected, expected_weights = CONVERT(*made(f"dinov2: {name}")[2:], ConversionOptions())
    assert config.to_dict() == expected.to_dict()
    assert set(weights) == set(expected_weights)
    assert all(torch.equal(weights[key], expected_weights[key]) for key in weights)


@pytest.fixture
def published(tmp_path):
    """Makes a file of Meta's of one layer."""

    def make(width: int) -> dict[str, torch.Tensor]:
        sizes = {"hidden_size": width, "num_hidden_layers": 1, "image_size": 28}
        return by_meta(saved(dinov2(**sizes), tmp_path / str(width))[0])

    return make


def test_metas_published_widths_need_no_options_and_others_do(published, caplog):
    for width, heads in ((384, 6), (768, 12), (1024, 16)):
        config = CONVERT(published(width), {}, ConversionOptions())[0]
        assert [getattr(config, name) for name in FIELDS] == [heads, "gelu", 1e-6]
    with pytest.raises(ValueError, match="give --num_attention_heads .none of Meta's published models has width 512"):
        CONVERT(published(512), {}, ConversionOptions())
    given = ConversionOptions(num_attention_heads=4, hidden_act="relu", layer_norm_eps=1e-5)
    config = CONVERT(published(512), {}, given)[0]
    assert [getattr(config, name) for name in FIELDS] == [4, "relu", 1e-5]
    assert "--hidden_act relu overrides the source's activation, gelu" in caplog.text
    assert "--layer_norm_eps 1e-05 overrides the source's epsilon of the norms, 1e-06" in caplog.text


def test_metas_heads_are_cut_off(published):
    classifier = {f"backbone.{key}": tensor for key, tensor in published(384).items()}
    classifier |= {"linear_head.weight": torch.ones(10, 768), "linear_head.bias": torch.ones(10)}
    assert detect_layout(classifier, {})[0] == "dinov2"
    with pytest.raises(ValueError, match="linear_head.weight is of Meta's linear classifier.*--trunk_only"):
        CONVERT(classifier, {}, ConversionOptions())
    assert set(CONVERT(classifier, {}, TRUNK_ONLY)[1]) == set(CONVERT(published(384), {}, ConversionOptions())[1])


def test_timms_models_of_dinov2_are_timms(made):
    meta = made("dinov2: Dinov2WithRegistersModel of Meta").state_dict
    timms = {key.replace("register_tokens", "reg_token"): tensor for key, tensor in meta.items() if key != "mask_token"}
    assert detect_layout(timms, {"architecture": "vit_small_patch14_reg4_dinov2"})[0] == "timm"


def test_swiglu_is_refused(published, tmp_path):
    state_dict, config = saved(dinov2(use_swiglu_ffn=True), tmp_path)
    of_meta = published(384) | {"blocks.0.mlp.w12.weight": torch.ones(16, 384)}
    in_memory = {key.replace("weights_in", "gate_proj"): tensor for key, tensor in state_dict.items()}
    for weights, beside in ((state_dict, config), (in_memory, config), (of_meta, {})):
        assert detect_layout(weights, beside)[0] == "dinov2"
        for options in (ConversionOptions(), TRUNK_ONLY):
            with pytest.raises(ValueError, match="SwiGLU"):
                CONVERT(weights, beside, options)


def test_metas_files_have_imagenets_evaluation(published):
    config = CONVERT(published(384), {}, ConversionOptions())[0]
    # github.com/facebookresearch/dinov2, dinov2/data/transforms.py: 256, bicubic, the middle 224, ImageNet's statistics
    stated = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 256},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    processor = LAYOUTS["dinov2"].image_processor({}, config)
    assert {name: processor[name] for name in stated} == stated
