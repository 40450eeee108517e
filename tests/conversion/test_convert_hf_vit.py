"""ViT and DeiT of transformers: the same numbers here and there, old names and new, and what has no place here."""

import json
import logging

import pytest
import tiny
import torch
import transformers
from conversions import NEW_ATTENTION_NAMES, assert_same_states, built, converter, renamed, saved
from fresh_process import run_fresh
from safetensors.torch import save_file
from sources import BARE_OPTIONS, HF_VIT_MODELS, VIT_SIZES, hf_vit
from transformers import (
    AutoImageProcessor,
    ViTConfig,
    ViTImageProcessor,
    ViTMAEForPreTraining,
    ViTModel,
)

from vit_embed import VitEmbedForImageClassification, VitEmbedModel
from vit_embed.conversion.layouts import LAYOUTS, detect_layout
from vit_embed.conversion.layouts.layout import ConversionOptions
from vit_embed.convert_checkpoint import convert_checkpoint, main

CONVERT = converter("hf_vit")
TRUNK_ONLY = ConversionOptions(trunk_only=True)
IMAGENET_MEAN = [0.485, 0.456, 0.406]
NAMES = {"problem_type": "multi_label_classification", "id2label": {0: "a", 1: "b", 2: "c", 3: "d", 4: "e"}}

# What transformers 5 calls the modules in memory, for the names that files have.
NEW_NAMES = {
    r"encoder\.layer\.": "layers.",
    **NEW_ATTENTION_NAMES,
    r"intermediate\.dense": "mlp.fc1",
    r"(?<!attention\.)output\.dense": "mlp.fc2",
}


@pytest.fixture
def vit(tmp_path):
    """A saved ViTForImageClassification: weights by their names in the file, and config.json."""
    return saved(HF_VIT_MODELS["ViTForImageClassification"](), tmp_path / "vit")


# The same numbers


@pytest.mark.parametrize("name", HF_VIT_MODELS)
def test_states_and_logits_equal_transformers(name, tmp_path):
    model = HF_VIT_MODELS[name]()
    model.save_pretrained(tmp_path / "source")
    differences = convert_checkpoint(tmp_path / "source", tmp_path / "folder")
    ours_class = VitEmbedForImageClassification if "Classification" in name else VitEmbedModel
    assert set(differences) == {"last_hidden_state", "logits" if "Classification" in name else "pooler_output"}
    assert all(difference < 1e-4 for difference in differences.values())
    assert_same_states(ours_class.from_pretrained(tmp_path / "folder").eval(), model, tiny.pixels())


@pytest.mark.parametrize("name", ["ViTForImageClassification", "DeiTModel"])
def test_other_sizes_equal_transformers(name, tmp_path):
    model = HF_VIT_MODELS[name]()
    ours = built(*CONVERT(*saved(model, tmp_path), ConversionOptions()))
    assert_same_states(ours, model, tiny.pixels(2, 48, 24), interpolate_pos_encoding=True)


@pytest.mark.parametrize(
    "overrides",
    [
        {"qkv_bias": False},
        {"hidden_act": "relu", "num_channels": 1},
        {"num_hidden_layers": 1, "num_attention_heads": 8},
    ],
)
def test_variants_equal_transformers(overrides, tmp_path):
    model = HF_VIT_MODELS["ViTModel"](**overrides)
    ours = built(*CONVERT(*saved(model, tmp_path), ConversionOptions()))
    assert_same_states(ours, model, tiny.pixels()[:, : model.config.num_channels])


@pytest.mark.parametrize("image_size", [36, [36, 44]])
@pytest.mark.parametrize("name", HF_VIT_MODELS)
def test_a_remainder_of_pixels_is_left_out(name, image_size, tmp_path):
    model = HF_VIT_MODELS[name](image_size=image_size)
    model.save_pretrained(tmp_path / "source")
    differences = convert_checkpoint(tmp_path / "source", tmp_path / "folder")
    assert max(differences.values()) < 1e-4
    ours = VitEmbedModel if "Classification" not in name else VitEmbedForImageClassification
    assert ours.from_pretrained(tmp_path / "folder").config.image_shape == (32, 32 if image_size == 36 else 40)


@pytest.mark.parametrize("name", HF_VIT_MODELS)
def test_new_names_give_what_old_ones_do(name, tmp_path):
    model = HF_VIT_MODELS[name]()
    state_dict, config = saved(model, tmp_path)
    new = renamed(state_dict, NEW_NAMES)
    if transformers.__version__ >= "5":
        assert set(new) == set(model.state_dict())
    assert len(set(new) & set(state_dict)) < len(new) / 2
    expected, got = (CONVERT(each, config, ConversionOptions())[1] for each in (state_dict, new))
    assert set(got) == set(expected) and all(torch.equal(got[key], expected[key]) for key in expected)
    assert detect_layout(new, config)[0] == "hf_vit"


def test_a_file_with_new_names_runs_where_they_are_known(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    save_file(
        renamed(saved(HF_VIT_MODELS["ViTModel"](), tmp_path / "source")[0], NEW_NAMES), tmp_path / "vit.safetensors"
    )
    differences = convert_checkpoint(
        tmp_path / "vit.safetensors", tmp_path / "folder", ConversionOptions(**BARE_OPTIONS)
    )
    if transformers.__version__ >= "5":
        assert max(differences.values()) < 1e-4
    else:
        assert (
            differences is None and f"ViTModel of transformers {transformers.__version__} does not know" in caplog.text
        )


@pytest.mark.parametrize("name", ["ViTForImageClassification", "DeiTForImageClassification"])
def test_trunk_only_is_the_trunk_saved_alone(name, tmp_path):
    model = HF_VIT_MODELS[name]()
    state_dict, source_config = saved(model, tmp_path / "whole")
    config, weights = CONVERT(state_dict, source_config, TRUNK_ONLY)
    assert config.architectures == ["VitEmbedModel"]
    alone = CONVERT(*saved(model.base_model, tmp_path / "alone"), ConversionOptions())[1]
    assert set(weights) == set(alone) and all(torch.equal(weights[key], alone[key]) for key in alone)


def test_a_distillation_token_has_its_position_in_half_precision_too(tmp_path):
    state_dict, config = saved(HF_VIT_MODELS["DeiTModel"]().half(), tmp_path)
    got = CONVERT(state_dict, config, ConversionOptions())[1]["embeddings.register_tokens"]
    token, positions = (state_dict[f"embeddings.{each}"] for each in ("distillation_token", "position_embeddings"))
    torch.testing.assert_close(got, token[0].float() + positions[:, 1].float(), rtol=0, atol=0)


def load_and_classify(folder: str, pixel_values: list) -> list:
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    assert type(AutoImageProcessor.from_pretrained(folder)).__name__.startswith("CLIPImageProcessor")
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = model(torch.tensor(pixel_values)).logits
    return [logits.tolist(), [model.config.id2label[i] for i in range(5)], model.config.problem_type]


def test_a_classifier_keeps_its_classes_in_a_fresh_process(tmp_path):
    model = HF_VIT_MODELS["ViTForImageClassification"](**NAMES)
    model.save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "folder")
    pixel_values = tiny.pixels(2)
    logits, names, problem_type = run_fresh(
        load_and_classify, tmp_path / "home", folder=str(tmp_path / "folder"), pixel_values=pixel_values.tolist()
    )
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(logits), model(pixel_values).logits, rtol=1e-5, atol=1e-5)
    assert names == list("abcde") and problem_type == NAMES["problem_type"]


# What has no place here


def pooled(**overrides):
    return tiny.randomised(ViTModel(ViTConfig(**{**VIT_SIZES, **overrides})))


MAE = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
UNFIT = {
    "pooler.dense": pooled,
    "decoder.0.* masked image modelling": lambda: hf_vit("ViTForMaskedImageModeling", "ViTConfig", encoder_stride=8),
    "WithTeacher": lambda: hf_vit("DeiTForImageClassificationWithTeacher", "DeiTConfig"),
    "hides patches at random": lambda: hf_vit(
        "ViTMAEForPreTraining", "ViTMAEConfig", **MAE, decoder_intermediate_size=20
    ),
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
    if not isinstance(model, ViTMAEForPreTraining):
        assert_same_states(VitEmbedModel.from_pretrained(tmp_path / "folder").eval(), model.base_model, tiny.pixels())


def test_an_mae_encoder_sees_all_patches(tmp_path):
    model = hf_vit("ViTMAEModel", "ViTMAEConfig", **MAE, decoder_intermediate_size=20, mask_ratio=0.0)
    ours = built(*CONVERT(*saved(model, tmp_path), TRUNK_ONLY))
    in_order = torch.arange(16).float().expand(3, -1)
    assert_same_states(ours, model, tiny.pixels(), noise=in_order)


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("vit.embeddings.patch_embeddings.projection.weight", torch.ones(32, 192), "patch height"),
        ("vit.embeddings.position_embeddings", torch.ones(17, 32), "position_embeddings must be"),
        ("vit.embeddings.position_embeddings", torch.ones(1, 26, 32), "make 16 patches .here 25"),
        ("vit.encoder.layer.0.intermediate.dense.weight", torch.ones(40, 32), "intermediate_size=48 .here 40"),
        ("vit.encoder.layer.1.intermediate.dense.weight", torch.ones(40, 32), "layer.1.intermediate.dense.weight must"),
        ("classifier.weight", torch.ones(6, 32), "names 5 classes in id2label, classifier.weight has 6"),
    ],
)
def test_contradictory_sizes_are_refused(key, tensor, message, vit):
    state_dict, config = vit
    with pytest.raises(ValueError, match=message):
        CONVERT({**state_dict, key: tensor}, config, ConversionOptions())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "hidden_size=64 .here 32"),
        ({"num_hidden_layers": 2}, "num_hidden_layers=2 .here 3"),
        ({"patch_size": 4, "image_size": 16}, "patch_size=.4, 4. .here"),
        ({"num_attention_heads": "four"}, "cannot be read as a ViTConfig|num_attention_heads must be"),
        ({"num_attention_heads": 5}, "num_attention_heads=5"),
        ({"hidden_act": "mish"}, "hidden_act must be one of"),
        ({"model_type": "beit"}, "model_type vit or deit or vit_mae for these weights, got 'beit'"),
        ({"model_type": "deit"}, "model_type='deit', but there is no distillation token"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(changes, message, vit):
    state_dict, config = vit
    with pytest.raises(ValueError, match=message):
        CONVERT(state_dict, {**config, **changes}, ConversionOptions())


# A file alone


@pytest.mark.parametrize("missing", BARE_OPTIONS)
def test_a_bare_file_must_be_told(missing, vit):
    told = {name: value for name, value in BARE_OPTIONS.items() if name != missing}
    with pytest.raises(ValueError, match=f"give --{missing}"):
        CONVERT(vit[0], {}, ConversionOptions(**told))


@pytest.mark.parametrize("name", HF_VIT_MODELS)
def test_a_bare_file_that_is_told_gives_the_same(name, tmp_path):
    state_dict, config = saved(HF_VIT_MODELS[name](), tmp_path / "source")
    save_file(state_dict, tmp_path / "vit.safetensors")
    arguments = [f"--{name}={value}" for name, value in BARE_OPTIONS.items()]
    assert main([str(tmp_path / "vit.safetensors"), "--output_dir", str(tmp_path / "folder"), *arguments]) == 0
    written = json.loads((tmp_path / "folder" / "config.json").read_text())
    expected = json.loads(CONVERT(state_dict, config, ConversionOptions())[0].to_json_string(use_diff=False))
    for same in (*VIT_SIZES, "num_register_tokens", "architectures"):
        assert written.get(same) == expected.get(same)
    assert "Largest absolute difference" in (tmp_path / "folder" / "README.md").read_text()


def test_a_rectangle_is_told_its_size(tmp_path):
    state_dict, config = saved(HF_VIT_MODELS["ViTModel"](image_size=[32, 48], patch_size=[8, 16]), tmp_path)
    with pytest.raises(ValueError, match="12 patches, which is no square grid; give its pixels with --image_size"):
        CONVERT(state_dict, {}, ConversionOptions(**BARE_OPTIONS))
    told = CONVERT(state_dict, {}, ConversionOptions(**BARE_OPTIONS, image_size=(32, 48)))[0]
    stated = CONVERT(state_dict, config, ConversionOptions())[0]
    assert told.image_size == stated.image_size == (32, 48) and told.patch_size == stated.patch_size == (8, 16)


def test_what_is_told_wins_with_a_warning(vit, caplog):
    caplog.set_level(logging.WARNING)
    config = CONVERT(*vit, ConversionOptions(num_attention_heads=8))[0]
    assert config.num_attention_heads == 8 and "--num_attention_heads 8 overrides the source's" in caplog.text


def test_detection(vit, tmp_path):
    state_dict, config = vit
    assert detect_layout(state_dict, config)[0] == "hf_vit"
    assert detect_layout(state_dict, {}) == ("hf_vit", "it has the keys of transformers' ViT, no config")
    assert LAYOUTS["hf_vit"].detect(state_dict, {**config, "model_type": "dpt"}) is None
    assert LAYOUTS["hf_vit"].detect({"vit.embeddings.cls_token": torch.ones(1, 1, 32)}, {}) is None
    with pytest.raises(ValueError, match="not a ViT of transformers; its own keys are visual.proj"):
        CONVERT({"visual.proj": torch.ones(2)}, {}, ConversionOptions())


# Pixels


def test_without_a_processor_there_is_the_published_one(tmp_path):
    def own(name):
        return LAYOUTS["hf_vit"].image_processor(
            {}, CONVERT(*saved(HF_VIT_MODELS[name](), tmp_path), ConversionOptions())[0]
        )

    stated = {"do_center_crop": False, "resample": 2, "size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3}
    assert {name: own("ViTModel")[name] for name in stated} == stated
    default = ViTImageProcessor()
    assert list(default.image_mean) == list(default.image_std) == stated["image_mean"] and default.resample == 2
    # github.com/facebookresearch/deit, its evaluation: 256, the middle 224, ImageNet's statistics
    stated = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "image_mean": IMAGENET_MEAN}
    assert {name: own("DeiTModel")[name] for name in stated} == stated


def test_the_folders_processor_is_carried_over(vit, tmp_path):
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6]).save_pretrained(tmp_path / "vit")
    convert_checkpoint(tmp_path / "vit", tmp_path / "folder")
    ours = AutoImageProcessor.from_pretrained(tmp_path / "folder")
    assert type(ours).__name__.startswith("CLIP") and list(ours.image_mean) == [0.4, 0.5, 0.6]
    assert ours(torch.zeros(3, 50, 20), return_tensors="pt").pixel_values.shape == (1, 3, 32, 32)
