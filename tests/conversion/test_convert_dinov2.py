"""DINOv2 of transformers and of Meta: the same numbers here and there at every size, and what has no place here."""

import logging
from functools import partial

import pytest
import references
import tiny
import torch
import transformers
from conversions import CLOSE, NEW_ATTENTION_NAMES, assert_same_states, built, by_meta, converter, renamed, saved
from safetensors.torch import save_file
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
)

from vit_embed import VitEmbedModel
from vit_embed.conversion.layouts import LAYOUTS, detect_layout
from vit_embed.conversion.layouts.layout import ConversionOptions
from vit_embed.convert_checkpoint import convert_checkpoint, main

CONVERT = converter("dinov2")
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "mlp_ratio": 2,
    "image_size": 70,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-3,
}
TOLD = {"num_attention_heads": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-3}
TRUNK_ONLY = ConversionOptions(trunk_only=True)
REGISTERS = {"num_register_tokens": 3}


def stock(model_class=Dinov2Model, config_class=Dinov2Config, **overrides):
    return tiny.randomised(model_class(config_class(**{**SIZES, **overrides})))


with_registers = partial(stock, Dinov2WithRegistersModel, Dinov2WithRegistersConfig, **REGISTERS)
MODELS = {"dinov2": stock, "registers": with_registers}


@pytest.fixture(params=MODELS)
def source(request, tmp_path):
    """A model of transformers, its weights by their names in the file, and config.json."""
    model = MODELS[request.param]()
    return model, *saved(model, tmp_path / "source")


@pytest.fixture
def meta(source):
    return by_meta(source[1])


# The same numbers


def test_states_equal_transformers(source, tmp_path):
    differences = convert_checkpoint(tmp_path / "source", tmp_path / "folder")
    assert set(differences) == {"last_hidden_state", "pooler_output"} and max(differences.values()) < 1e-4
    ours = VitEmbedModel.from_pretrained(tmp_path / "folder").eval()
    assert_same_states(ours, source[0], tiny.pixels(2, 70, 70))
    assert ours.config.num_register_tokens == getattr(source[0].config, "num_register_tokens", 0)


@pytest.mark.parametrize("name", MODELS)
def test_a_table_for_518_pixels_at_224(name, tmp_path):
    model = MODELS[name](image_size=518, num_hidden_layers=2)
    ours = built(*CONVERT(*saved(model, tmp_path), ConversionOptions()))
    assert ours.config.image_size == 518
    assert_same_states(ours, model, tiny.pixels(1, 224, 224))
    assert_same_states(ours, model, tiny.pixels(1, 28, 42))
    # The other way to resample would not do: that the two differ is what makes the two lines above a test.
    other = {"bicubic": "bicubic_antialias", "bicubic_antialias": "bicubic"}[ours.config.position_interpolation]
    ours.config.position_interpolation = other
    with pytest.raises(AssertionError):
        assert_same_states(ours, model, tiny.pixels(1, 224, 224))


def test_new_names_give_what_old_ones_do(source):
    model, state_dict, config = source
    new = renamed(state_dict, NEW_ATTENTION_NAMES)
    if transformers.__version__ >= "5":
        assert set(new) == set(model.state_dict())
    expected, got = (CONVERT(each, config, ConversionOptions())[1] for each in (state_dict, new))
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    assert detect_layout(new, config)[0] == "dinov2"


def test_no_qkv_bias(tmp_path):
    model = stock(qkv_bias=False)
    ours = built(*CONVERT(*saved(model, tmp_path), ConversionOptions()))
    assert_same_states(ours, model, tiny.pixels(2, 70, 70))
    assert not ours.config.qkv_bias


@pytest.mark.parametrize("name", MODELS)
def test_a_rectangle_that_transformers_cannot_run_is_converted_without_a_comparison(name, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    MODELS[name](image_size=[56, 70]).save_pretrained(tmp_path / "source")
    assert convert_checkpoint(tmp_path / "source", tmp_path / "folder") is None
    assert "could not be run: DINOv2 of transformers resamples square position tables alone" in caplog.text
    assert VitEmbedModel.from_pretrained(tmp_path / "folder").config.image_shape == (56, 70)


def test_a_rectangle_that_transformers_takes_for_a_square_is_asked_about(tmp_path):
    model = stock(image_size=[28, 112])
    state_dict, config = saved(model, tmp_path)
    with pytest.raises(ValueError, match=r"16 positions as 4 x 4 of them; give --image_size 56 56"):
        CONVERT(state_dict, config, ConversionOptions())
    ours = built(*CONVERT(state_dict, config, ConversionOptions(image_size=(56, 56))))
    assert_same_states(ours, model, tiny.pixels(1, 28, 112))


def test_the_rates_of_training_are_kept(tmp_path):
    rates = {"drop_path_rate": 0.3, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2}
    config, _ = CONVERT(*saved(stock(**rates), tmp_path), ConversionOptions())
    assert (config.drop_path_rate, config.hidden_dropout_prob, config.attention_dropout) == (0.3, 0.1, 0.2)


# Meta's files


def test_metas_names_give_what_transformers_names_do(source, meta):
    config, weights = CONVERT(meta, {}, ConversionOptions(**TOLD))
    expected, expected_weights = CONVERT(*source[1:], ConversionOptions())
    assert config.to_dict() == expected.to_dict()
    assert set(weights) == set(expected_weights)
    assert all(torch.equal(weights[key], expected_weights[key]) for key in weights)


def test_metas_file_equals_what_timm_makes_of_it(meta, tmp_path):
    references.import_package("timm")
    torch.save(meta, tmp_path / "dinov2.pth")
    told = ["--num_attention_heads=4", "--layer_norm_eps=1e-3"]
    assert main([str(tmp_path / "dinov2.pth"), "--output_dir", str(tmp_path / "folder"), *told]) == 0
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "| last_hidden_state |" in card and "| pooler_output |" in card

    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    registers = meta["register_tokens"].shape[1] if "register_tokens" in meta else 0
    theirs = VisionTransformer(
        img_size=70,
        patch_size=14,
        embed_dim=32,
        depth=3,
        num_heads=4,
        mlp_ratio=2,
        num_classes=0,
        init_values=1.0,
        reg_tokens=registers,
        no_embed_class=registers > 0,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-3),
    ).eval()
    theirs.load_state_dict(checkpoint_filter_fn(dict(meta), theirs))
    states = []
    for block in theirs.blocks:
        block.register_forward_hook(lambda block, arguments, output: states.append(output))
    ours = VitEmbedModel.from_pretrained(tmp_path / "folder").eval()
    pixel_values = tiny.pixels(2, 70, 70)
    with torch.no_grad():
        expected = theirs.forward_features(pixel_values)
        got = ours(pixel_values, output_hidden_states=True)
    assert len(states) == len(got.hidden_states) - 1 == 3
    for our, their in zip(got.hidden_states[1:], states):
        torch.testing.assert_close(our, their, **CLOSE)
    torch.testing.assert_close(got.pooler_output, expected[:, 0], **CLOSE)


def published(width: int, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """A file of Meta's of one layer."""
    block = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (8, width),
        "mlp.fc2": (width, 8),
        "norm1": (width,),
        "norm2": (width,),
    }
    shapes = {f"blocks.0.{name}.weight": shape for name, shape in block.items()}
    shapes |= {f"blocks.0.{name}.bias": shape[:1] for name, shape in block.items()}
    shapes |= {"cls_token": (1, 1, width), "mask_token": (1, width), "pos_embed": (1, 5, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, 14, 14)}
    shapes |= dict.fromkeys(("patch_embed.proj.bias", "norm.weight", "norm.bias"), (width,))
    shapes |= dict.fromkeys(("blocks.0.ls1.gamma", "blocks.0.ls2.gamma"), (width,))
    return {**{name: torch.zeros(shape) for name, shape in shapes.items()}, **more}


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12), (1024, 16)])
def test_metas_published_widths_need_not_be_told(width, heads):
    config = CONVERT(published(width), {}, ConversionOptions())[0]
    assert (config.num_attention_heads, config.hidden_act, config.layer_norm_eps) == (heads, "gelu", 1e-6)


def test_other_widths_must_be_told_their_heads(caplog):
    with pytest.raises(ValueError, match="give --num_attention_heads .none of Meta's published models has width 512"):
        CONVERT(published(512), {}, ConversionOptions())
    caplog.set_level(logging.WARNING)
    told = ConversionOptions(num_attention_heads=4, hidden_act="relu", layer_norm_eps=1e-5)
    config = CONVERT(published(512), {}, told)[0]
    assert (config.num_attention_heads, config.hidden_act, config.layer_norm_eps) == (4, "relu", 1e-5)
    assert "--hidden_act relu overrides the source's activation, gelu" in caplog.text
    assert "--layer_norm_eps 1e-05 overrides the source's epsilon of the norms, 1e-06" in caplog.text


def test_metas_heads_are_cut_off():
    classifier = {f"backbone.{key}": tensor for key, tensor in published(384).items()}
    classifier |= {"linear_head.weight": torch.ones(10, 768), "linear_head.bias": torch.ones(10)}
    assert detect_layout(classifier, {})[0] == "dinov2"
    with pytest.raises(ValueError, match="linear_head.weight is of Meta's linear classifier.*--trunk_only"):
        CONVERT(classifier, {}, ConversionOptions())
    assert set(CONVERT(classifier, {}, TRUNK_ONLY)[1]) == set(CONVERT(published(384), {}, ConversionOptions())[1])


# What has no place here

DEPTH = {
    "backbone_config": Dinov2Config(
        **SIZES, out_indices=[0, 1, 2, 3], apply_layernorm=True, reshape_hidden_states=False
    ),
    "reassemble_hidden_size": 32,
    "neck_hidden_sizes": [8, 8, 8, 8],
    "fusion_hidden_size": 8,
    "head_hidden_size": 4,
    "patch_size": 14,
}
UNFIT = {
    "classifier.* is of Dinov2ForImageClassification": lambda: stock(Dinov2ForImageClassification),
    "the class token and the mean of the patches": lambda: stock(
        Dinov2WithRegistersForImageClassification, Dinov2WithRegistersConfig, **REGISTERS
    ),
    "neck.* is of a neck.*head.* is of a head": lambda: tiny.randomised(
        DepthAnythingForDepthEstimation(DepthAnythingConfig(**DEPTH))
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


def test_swiglu_is_refused(tmp_path):
    state_dict, config = saved(stock(use_swiglu_ffn=True), tmp_path)
    of_meta = published(384, **{"blocks.0.mlp.w12.weight": torch.ones(16, 384)})
    in_memory = {key.replace("weights_in", "gate_proj"): tensor for key, tensor in state_dict.items()}
    for weights, beside in ((state_dict, config), (in_memory, config), (of_meta, {})):
        assert detect_layout(weights, beside)[0] == "dinov2"
        for options in (ConversionOptions(), TRUNK_ONLY):
            with pytest.raises(ValueError, match="SwiGLU"):
                CONVERT(weights, beside, options)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("pos_embed", (26, 32), "pos_embed must be"),
        ("pos_embed", (1, 25, 32), "no square grid"),
        ("register_tokens", (3, 32), "register_tokens must be .1, registers, width"),
        ("blocks.1.mlp.fc1.weight", (60, 32), "blocks.1.mlp.fc1.weight must be"),
        ("blocks.2.ls1.gamma", (1, 32), "blocks.2.ls1.gamma must be"),
    ],
)
def test_contradictory_sizes_are_refused(key, shape, message, meta):
    with pytest.raises(ValueError, match=message):
        CONVERT({**meta, key: torch.ones(shape)}, {}, ConversionOptions(**TOLD))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "hidden_size=64 .here 32"),
        ({"mlp_ratio": 3}, "intermediate_size=96 .here 64"),
        ({"image_size": 84}, "make 36 patches .here 25"),
        ({"model_type": "vit"}, "model_type dinov2 or dinov2_with_registers for these weights, got 'vit'"),
        ({"model_type": "dinov2_with_registers", "num_register_tokens": 5}, "says 5 registers"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(changes, message, source):
    with pytest.raises(ValueError, match=message):
        CONVERT(source[1], {**source[2], **changes}, ConversionOptions())


@pytest.mark.parametrize("missing", TOLD)
def test_a_bare_file_of_transformers_must_be_told(missing, source):
    told = {name: value for name, value in TOLD.items() if name != missing}
    with pytest.raises(ValueError, match=f"give --{missing}"):
        CONVERT(source[1], {}, ConversionOptions(**told))


def test_a_bare_file_that_is_told_gives_the_same(source, tmp_path):
    save_file(source[1], tmp_path / "dinov2.safetensors")
    differences = convert_checkpoint(tmp_path / "dinov2.safetensors", tmp_path / "folder", ConversionOptions(**TOLD))
    assert max(differences.values()) < 1e-4
    assert_same_states(VitEmbedModel.from_pretrained(tmp_path / "folder").eval(), source[0], tiny.pixels(2, 70, 70))


def test_detection(source, meta):
    state_dict, config = source[1:]
    assert detect_layout(state_dict, config)[0] == detect_layout(state_dict, {})[0] == "dinov2"
    assert detect_layout(meta, {}) == (
        "dinov2",
        "it has the keys of Meta's DINOv2, mask_token and layer scales among them",
    )
    assert LAYOUTS["dinov2"].detect(state_dict, {**config, "model_type": "vit"}) is None
    # timm's models of DINOv2 have no mask token.
    timms = {key.replace("register_tokens", "reg_token"): tensor for key, tensor in meta.items() if key != "mask_token"}
    assert detect_layout(timms, {"architecture": "vit_small_patch14_reg4_dinov2"})[0] == "timm"
    with pytest.raises(ValueError, match="its own keys are visual.proj"):
        CONVERT({"visual.proj": torch.ones(2)}, {}, ConversionOptions())


# Pixels


def test_the_folders_processor_is_carried_over(tmp_path):
    stock().save_pretrained(tmp_path / "source")
    BitImageProcessor(size={"shortest_edge": 80}, crop_size=70, image_mean=[0.1] * 3).save_pretrained(
        tmp_path / "source"
    )
    convert_checkpoint(tmp_path / "source", tmp_path / "folder")
    ours = AutoImageProcessor.from_pretrained(tmp_path / "folder")
    assert type(ours).__name__.startswith("CLIP") and list(ours.image_mean) == [0.1] * 3
    assert dict(ours.size)["shortest_edge"] == 80 and dict(ours.crop_size)["height"] == 70


def test_metas_files_have_imagenets_evaluation():
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
