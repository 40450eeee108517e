"""ViT, DeiT and DINOv2 of transformers: other sizes, names of both releases, heads without a place, files alone.

What holds for every layout is in test_there_and_back.py.
"""

import json
import logging

import pytest
import tiny
import torch
import transformers
from conversions import NEW_ATTENTION_NAMES, assert_same_states, built, converter, renamed, saved
from safetensors.torch import save_file
from sources import BARE_OPTIONS, DINO_SIZES, DINOV2_MODELS, HF_VIT_MODELS, REGISTERS, VIT_SIZES, dinov2, hf_vit
from transformers import (
    AutoModelForImageClassification,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    ViTConfig,
    ViTImageProcessor,
    ViTMAEForPreTraining,
    ViTModel,
)

from vit_embed import VitEmbedModel
from vit_embed.conversion.layouts import LAYOUTS, detect_layout
from vit_embed.conversion.layouts.layout import ConversionOptions
from vit_embed.convert_checkpoint import convert_checkpoint, main

CONVERT = converter("hf_vit")
TRUNK_ONLY = ConversionOptions(trunk_only=True)
MODELS = {**HF_VIT_MODELS, **DINOV2_MODELS}
IMAGENET_MEAN = [0.485, 0.456, 0.406]

# What transformers 5 calls the modules of ViT in memory, for the names that files have.
NEW_NAMES = {
    r"encoder\.layer\.": "layers.",
    **NEW_ATTENTION_NAMES,
    r"intermediate\.dense": "mlp.fc1",
    r"(?<!attention\.)output\.dense": "mlp.fc2",
}


def layout_of(name):
    return "dinov2" if name in DINOV2_MODELS else "hf_vit"


def convert(name, state_dict, config):
    return converter(layout_of(name))(state_dict, config, ConversionOptions())


def ours_and_theirs(name, tmp_path, **overrides):
    model = MODELS[name](**overrides)
    return built(*convert(name, *saved(model, tmp_path))), model


@pytest.fixture
def vit(made):
    """A saved ViTForImageClassification: weights by their names in the file, and config.json."""
    return made("hf_vit: ViTForImageClassification")[2:]


# The same numbers


@pytest.mark.parametrize("name", ["ViTForImageClassification", "DeiTModel"])
def test_other_sizes_equal_transformers(name, tmp_path):
    ours, model = ours_and_theirs(name, tmp_path)
    assert_same_states(ours, model, tiny.pixels(2, 48, 24), interpolate_pos_encoding=True)


@pytest.mark.parametrize("name", DINOV2_MODELS)
def test_a_table_for_518_pixels_at_224(name, tmp_path):
    ours, model = ours_and_theirs(name, tmp_path, image_size=518, num_hidden_layers=1)
    assert ours.config.image_size == 518
    assert_same_states(ours, model, tiny.pixels(1, 224, 224))
    assert_same_states(ours, model, tiny.pixels(1, 28, 42))
    # The other way to resample would not do: that the two differ is what makes the two lines above a test.
    other = {"bicubic": "bicubic_antialias", "bicubic_antialias": "bicubic"}[ours.config.position_interpolation]
    ours.config.position_interpolation = other
    with pytest.raises(AssertionError):
        assert_same_states(ours, model, tiny.pixels(1, 224, 224))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("ViTModel", {"qkv_bias": False}),
        ("ViTModel", {"hidden_act": "relu", "num_channels": 1}),
        ("ViTModel", {"num_hidden_layers": 1, "num_attention_heads": 8}),
        ("Dinov2Model", {"qkv_bias": False}),
    ],
)
def test_variants_equal_transformers(name, overrides, tmp_path):
    ours, model = ours_and_theirs(name, tmp_path, **overrides)
    size = model.config.image_size
    assert_same_states(ours, model, tiny.pixels(2, size, size)[:, : model.config.num_channels])
    assert ours.config.qkv_bias == overrides.get("qkv_bias", True)


@pytest.mark.parametrize("image_size", [36, [36, 44]])
def test_a_remainder_of_pixels_is_left_out(image_size, tmp_path):
    MODELS["DeiTModel"](image_size=image_size).save_pretrained(tmp_path / "source")
    assert max(convert_checkpoint(tmp_path / "source", tmp_path / "folder").values()) < 1e-4
    shape = VitEmbedModel.from_pretrained(tmp_path / "folder").config.image_shape
    assert shape == (32, 32 if image_size == 36 else 40)


@pytest.mark.parametrize("name", MODELS)
def test_new_names_give_what_old_ones_do(name, made):
    model, _, state_dict, config = made(f"{layout_of(name)}: {name}")
    new = renamed(state_dict, NEW_ATTENTION_NAMES if name in DINOV2_MODELS else NEW_NAMES)
    if transformers.__version__ >= "5":
        assert set(new) == set(model.state_dict())
    assert new.keys() != state_dict.keys()
    expected, got = (convert(name, each, config)[1] for each in (state_dict, new))
    assert set(got) == set(expected) and all(torch.equal(got[key], expected[key]) for key in expected)
    assert detect_layout(new, config)[0] == layout_of(name)


def test_a_file_with_new_names_runs_where_they_are_known(made, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    save_file(renamed(made("hf_vit: ViTModel").state_dict, NEW_NAMES), tmp_path / "vit.safetensors")
    options = ConversionOptions(**BARE_OPTIONS)
    differences = convert_checkpoint(tmp_path / "vit.safetensors", tmp_path / "folder", options)
    if transformers.__version__ >= "5":
        assert max(differences.values()) < 1e-4
    else:
        assert differences is None
        assert f"ViTModel of transformers {transformers.__version__} does not know" in caplog.text


def test_a_distillation_token_has_its_position_in_half_precision_too(tmp_path):
    state_dict, config = saved(HF_VIT_MODELS["DeiTModel"]().half(), tmp_path)
    got = CONVERT(state_dict, config, ConversionOptions())[1]["embeddings.register_tokens"]
    token, positions = (state_dict[f"embeddings.{each}"] for each in ("distillation_token", "position_embeddings"))
    torch.testing.assert_close(got, token[0].float() + positions[:, 1].float(), rtol=0, atol=0)


def test_a_classifier_keeps_its_classes(tmp_path):
    names = {"problem_type": "multi_label_classification", "id2label": dict(enumerate("abcde"))}
    HF_VIT_MODELS["ViTForImageClassification"](**names).save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "folder")
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "folder", trust_remote_code=True).config
    assert [config.id2label[i] for i in range(5)] == list("abcde") and config.problem_type == names["problem_type"]


def test_a_classifier_of_siglip_keeps_its_classes(made):
    config, _ = converter("hf_clip")(*made("hf_clip: SiglipForImageClassification")[2:], ConversionOptions())
    assert config.id2label == {0: "a", 1: "b", 2: "c"}


# What has no place here


def pooled():
    return tiny.randomised(ViTModel(ViTConfig(**VIT_SIZES)))


def depth_anything():
    outputs = {"out_indices": [0, 1, 2, 3], "apply_layernorm": True, "reshape_hidden_states": False}
    sizes = {"reassemble_hidden_size": 32, "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "head_hidden_size": 4}
    config = DepthAnythingConfig(backbone_config=Dinov2Config(**DINO_SIZES, **outputs), **sizes, patch_size=14)
    return tiny.randomised(DepthAnythingForDepthEstimation(config))


MAE = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
MAE["decoder_intermediate_size"] = 20
REGISTERED = ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig")
UNFIT = {
    "pooler.dense": pooled,
    "decoder.0.* masked image modelling": lambda: hf_vit("ViTForMaskedImageModeling", "ViTConfig", encoder_stride=8),
    "WithTeacher": lambda: hf_vit("DeiTForImageClassificationWithTeacher", "DeiTConfig"),
    "hides patches at random": lambda: hf_vit("ViTMAEForPreTraining", "ViTMAEConfig", **MAE),
    "classifier.* is of Dinov2ForImageClassification": lambda: dinov2("Dinov2ForImageClassification"),
    "the class token and the mean of the patches": lambda: dinov2(*REGISTERED, **REGISTERS),
    "neck.* is of a neck.*head.* is of a head": depth_anything,
}


@pytest.mark.parametrize("named", UNFIT)
def test_what_has_no_place_is_named_and_the_trunk_is_equal(named, tmp_path):
    model = UNFIT[named]()
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=f"{named}.*--trunk_only"):
        convert_checkpoint(tmp_path / "source", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    differences = convert_checkpoint(tmp_path / "source", tmp_path / "folder", TRUNK_ONLY)
    assert set(differences) == {"last_hidden_state", "pooler_output"} and max(differences.values()) < 1e-4
    if not isinstance(model, (ViTMAEForPreTraining, DepthAnythingForDepthEstimation)):
        ours, size = VitEmbedModel.from_pretrained(tmp_path / "folder").eval(), model.config.image_size
        assert_same_states(ours, model.base_model, tiny.pixels(2, size, size))


def test_an_mae_encoder_sees_all_patches(tmp_path):
    model = hf_vit("ViTMAEModel", "ViTMAEConfig", **MAE, mask_ratio=0.0)
    ours = built(*CONVERT(*saved(model, tmp_path), TRUNK_ONLY))
    in_order = torch.arange(16).float().expand(3, -1)
    assert_same_states(ours, model, tiny.pixels(), noise=in_order)


# A file alone


@pytest.mark.parametrize("name", ["DeiTForImageClassification", "Dinov2WithRegistersModel"])
def test_a_file_alone_with_its_options_gives_the_same(name, made, tmp_path):
    _, _, state_dict, config = made(f"{layout_of(name)}: {name}")
    save_file(state_dict, tmp_path / "vit.safetensors")
    arguments = [f"--{name}={value}" for name, value in BARE_OPTIONS.items()]
    assert main([str(tmp_path / "vit.safetensors"), "--output_dir", str(tmp_path / "folder"), *arguments]) == 0
    written = json.loads((tmp_path / "folder" / "config.json").read_text())
    expected = json.loads(convert(name, state_dict, config)[0].to_json_string(use_diff=False))
    for same in (*VIT_SIZES, "num_register_tokens", "architectures"):
        assert written.get(same) == expected.get(same)
    assert "Largest absolute difference" in (tmp_path / "folder" / "README.md").read_text()


def test_a_rectangle_needs_its_size(tmp_path):
    state_dict, config = saved(HF_VIT_MODELS["ViTModel"](image_size=[32, 48], patch_size=[8, 16]), tmp_path)
    with pytest.raises(ValueError, match="12 patches, which is no square grid; give its pixels with --image_size"):
        CONVERT(state_dict, {}, ConversionOptions(**BARE_OPTIONS))
    given = CONVERT(state_dict, {}, ConversionOptions(**BARE_OPTIONS, image_size=(32, 48)))[0]
    stated = CONVERT(state_dict, config, ConversionOptions())[0]
    assert given.image_size == stated.image_size == (32, 48) and given.patch_size == stated.patch_size == (8, 16)


def test_other_model_types_and_a_lone_token_are_not_detected(vit, made):
    state_dict, config = vit
    assert LAYOUTS["hf_vit"].detect(state_dict, {**config, "model_type": "dpt"}) is None
    assert LAYOUTS["hf_vit"].detect({"vit.embeddings.cls_token": torch.ones(1, 1, 32)}, {}) is None
    _, _, state_dict, config = made("dinov2: Dinov2Model")
    assert LAYOUTS["dinov2"].detect(state_dict, {**config, "model_type": "vit"}) is None


# Pixels


def test_without_a_processor_there_is_the_published_one(made):
    def own(name):
        config = CONVERT(*made(f"hf_vit: {name}")[2:], ConversionOptions())[0]
        return LAYOUTS["hf_vit"].image_processor({}, config)

    stated = {"do_center_crop": False, "resample": 2, "size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3}
    assert {name: own("ViTModel")[name] for name in stated} == stated
    default = ViTImageProcessor()
    assert list(default.image_mean) == list(default.image_std) == stated["image_mean"] and default.resample == 2
    # github.com/facebookresearch/deit, its evaluation: 256, the middle 224, ImageNet's statistics
    stated = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "image_mean": IMAGENET_MEAN}
    assert {name: own("DeiTModel")[name] for name in stated} == stated
