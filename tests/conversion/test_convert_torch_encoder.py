"""Vision transformers on torch.nn.TransformerEncoderLayer: every activation and name, what weights do not show.

What holds for every layout is in test_there_and_back.py.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn
from torch_encoder_reference import (
    POST,
    PRE,
    MiniViT,
    MiniViTDepth,
    ViTTiny,
    assert_bit_equal,
    assert_close,
    converted,
    from_torch,
    renamed,
    restored,
    small,
    without_class_token,
)
from transformers.activations import ACT2FN

import vit_embed
from vit_embed import VitEmbedForDepthEstimation, VitEmbedForImageClassification, VitEmbedModel
from vit_embed.conversion.layouts import LAYOUTS, detect_layout
from vit_embed.convert_checkpoint import convert_checkpoint, restore_checkpoint

CONFIGS = Path(vit_embed.__file__).parent / "configs"

# Equal to the source


@torch.no_grad()
def test_depth_heads_of_four_pixels():
    source, pixel_values = small(MiniViTDepth, kernel=4), tiny.pixels()
    model = converted(source.state_dict(), POST)
    expected = source(pixel_values)
    assert model.config.deconv_kernel_size == 4 and (expected < 0).any()  # raw numbers
    assert_close(model(pixel_values).predicted_depth, expected)
    assert model(pixel_values, labels=torch.ones(3, 32, 32)).loss.isfinite()  # and its loss takes them


@pytest.mark.parametrize("name", ["gelu", "relu", "quick_gelu", "silu"])
@torch.no_grad()
def test_any_activation_norm_position_and_eps(name):
    for norm_position in ("pre", "post"):
        source = small(MiniViT)
        for layer in source.encoder.layers:
            layer.activation, layer.activation_relu_or_gelu = ACT2FN[name], 0
            layer.norm_first, layer.norm1.eps, layer.norm2.eps = norm_position == "pre", 1e-2, 1e-2
        source.norm.eps = 1e-2
        options = replace(POST, hidden_act=name, norm_position=norm_position, layer_norm_eps=1e-2)
        assert_close(converted(source.state_dict(), options)(tiny.pixels()).logits, source(tiny.pixels()))


def test_the_way_back_logs_how_to_load_the_file(made, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    convert_checkpoint(made("torch_encoder: MiniViT").path, tmp_path / "folder", POST)
    restore_checkpoint(tmp_path / "folder", "torch_encoder", tmp_path / "back.pth")
    assert "load_state_dict" in caplog.text and "TransformerEncoderLayer(32, 4, 48" in caplog.text


# The published systems


@pytest.mark.parametrize(
    ("name", "source_class", "sizes", "options"),
    [
        ("vit-tiny-muomni", ViTTiny, (128, 4, 2, 512), PRE),
        ("minivit", MiniViT, (768, 6, 8, 2048), POST),
        ("minivit-depth", MiniViTDepth, (768, 6, 8, 2048), POST),
    ],
)
def test_full_size_gives_the_config_of_the_system(name, source_class, sizes, options):
    width, layers, heads, hidden = sizes
    with torch.device("meta"):
        source = source_class(image=224, patch=16, width=width, layers=layers, heads=heads, hidden=hidden)
    # Zeros take no memory until they are written.
    state_dict = {key: torch.zeros(tensor.shape) for key, tensor in source.state_dict().items()}
    config, _ = from_torch(state_dict, replace(options, num_attention_heads=heads))
    stated = json.loads((CONFIGS / f"{name}.json").read_text())
    assert stated.pop("hidden_dropout_prob") and stated.pop("attention_dropout")  # only training has them
    assert {field: getattr(config, field) for field in stated} == stated


# Which it is


def text_model() -> dict:
    layers = {f"encoder.layers.{key}": tensor for key, tensor in small(MiniViT).encoder.layers.state_dict().items()}
    return {"embedding.weight": torch.ones(100, 32), **layers, "fc.weight": torch.ones(5, 32), "fc.bias": torch.ones(5)}


def detr() -> dict:
    layers = small(MiniViT).encoder.layers.state_dict()
    return {
        "backbone.0.body.conv1.weight": torch.ones(64, 3, 7, 7),
        "input_proj.weight": torch.ones(32, 64, 1, 1),
        **{f"transformer.encoder.layers.{key}": tensor for key, tensor in layers.items()},
        **{f"transformer.decoder.layers.{key}": tensor for key, tensor in layers.items()},
    }


# What weights do not show


def test_eps_is_torchs_default_but_for_an_rms_norm(caplog):
    given = replace(POST, layer_norm_eps=1e-5)
    assert from_torch(small(MiniViT).state_dict(), given)[0].layer_norm_eps == 1e-5
    assert not caplog.text
    assert from_torch(small(MiniViT).state_dict(), replace(POST, layer_norm_eps=None))[0].layer_norm_eps == 1e-5
    assert "using 1e-05, torch's default; --layer_norm_eps" in caplog.text and "--layer_norm_eps" in caplog.text
    with pytest.raises(ValueError, match="an RMSNorm.*--layer_norm_eps.*two different ones cannot be expressed"):
        from_torch(small(ViTTiny).state_dict(), replace(PRE, layer_norm_eps=None))


@torch.no_grad()
def test_a_grid_that_is_no_square_must_be_told():
    source, pixel_values = small(MiniViTDepth), tiny.pixels(height=16, width=40)
    source.pos_embed = nn.Parameter(torch.randn(1, 1 + 2 * 5, 32))
    with pytest.raises(ValueError, match="10 patches.*--image_size"):
        from_torch(source.state_dict(), POST)
    model = converted(source.state_dict(), replace(POST, image_size=(16, 40)))
    assert_close(model(pixel_values).predicted_depth, source(pixel_values))
    assert_bit_equal(restored(model), source.state_dict())


# What is refused


PARTS = {
    "without a place in the model: encoder.norm.weight": lambda weights, depth: (
        weights | {"encoder.norm.weight": torch.ones(32), "encoder.norm.bias": torch.ones(32)}
    ),
    "no learned positions": lambda weights, depth: without(weights, "pos_embed"),
    "got decoder.0 alone": lambda weights, depth: without(depth, "decoder.2", "decoder.4"),
    "no patch convolution": lambda weights, depth: text_model(),
    "one stack of layers.*got 2": lambda weights, depth: detr(),
}


def without(state_dict, *starts):
    return {key: tensor for key, tensor in state_dict.items() if not key.startswith(starts)}


@pytest.mark.parametrize("message", PARTS)
def test_parts_too_many_or_too_few_are_refused(message):
    weights = PARTS[message](small(MiniViT).state_dict(), small(MiniViTDepth).state_dict())
    with pytest.raises(ValueError, match=message):
        from_torch(weights, POST)


@pytest.mark.parametrize("make", [text_model, detr])
def test_other_models_on_the_same_layer_are_not_detected(make):
    assert LAYOUTS["torch_encoder"].detect(make(), {}) is None


def test_a_linear_map_of_patches_is_detected():  # and refused by name
    weights = small(MiniViT).state_dict() | {"patch_embed.weight": torch.ones(32, 192)}
    assert detect_layout(weights, {})[0] == "torch_encoder"


def test_two_heads_are_refused_and_their_trunk_is_converted():
    both = small(MiniViT).state_dict() | small(MiniViTDepth).state_dict()
    with pytest.raises(ValueError, match="a classifier and a depth head, head and decoder.0, decoder.2, decoder.4"):
        from_torch(both, POST)
    source, pixel_values = small(MiniViT), tiny.pixels()
    model = converted(both, replace(POST, trunk_only=True))
    assert isinstance(model, VitEmbedModel)
    with torch.no_grad():
        assert_close(model(pixel_values).pooler_output, source.norm(source.tokens(pixel_values))[:, 0])


def test_an_average_beside_a_class_token_is_warned_of_as_such(caplog):
    state_dict = renamed(small(MiniViT).state_dict(), {"norm": "encoder.norm"})
    config, _ = from_torch(state_dict, replace(POST, pooling_type="mean"))
    assert config.pooling_type == "mean"
    assert "--pooling_type mean overrides the source's pooling, cls" in caplog.text


@pytest.mark.parametrize("before", [True, False])
@torch.no_grad()
def test_patches_that_are_averaged(before, tmp_path):
    source, pixel_values = small(MiniViT), tiny.pixels()
    mean = replace(POST, pooling_type="mean")
    state_dict = without_class_token(source)
    with pytest.raises(ValueError, match="--pooling_type mean, as there is no class token"):
        from_torch(state_dict, POST)
    with pytest.raises(ValueError, match="whether norm is before the average of the patches or after"):
        from_torch(state_dict, mean)
    names = {"norm": "encoder.norm"} if before else {"norm": "head.0", "head": "head.1"}
    state_dict = renamed(state_dict, names)
    tokens = source.encoder(source.patch_embed(pixel_values).flatten(2).mT + state_dict["pos_embed"])
    pooled = source.norm(tokens).mean(dim=1) if before else source.norm(tokens.mean(dim=1))
    model = converted(state_dict, mean)
    assert_close(model(pixel_values).logits, source.head(pooled))
    assert_bit_equal(restored(model), state_dict)
    torch.save(state_dict, tmp_path / "source.pth")
    assert convert_checkpoint(tmp_path / "source.pth", tmp_path / "folder", mean)["logits"] < 1e-4


@torch.no_grad()
def test_depth_needs_no_class_token():
    source, pixel_values = small(MiniViTDepth), tiny.pixels()
    state_dict = without_class_token(source)
    model = converted(state_dict, POST)
    tokens = source.encoder(source.patch_embed(pixel_values).flatten(2).mT + state_dict["pos_embed"])
    depth = source.decoder(tokens.mT.unflatten(2, (4, 4)))
    expected = nn.functional.interpolate(depth, size=(32, 32), mode="bilinear")[:, 0]
    assert_close(model(pixel_values).predicted_depth, expected)
    assert_bit_equal(restored(model), state_dict)


# Names of other authors, there and back

PARTS_OF_MINIVIT = ("patch_embed", "cls_token", "pos_embed", "encoder.layers", "norm", "head")
NAMES = [
    dict(zip(PARTS_OF_MINIVIT, names))
    for names in (
        ("patch_embed.proj", "cls_token", "pos_embed", "transformer.layers", "mlp_head.0", "mlp_head.1"),
        ("conv_proj", "class_token", "positional_embedding", "encoder.layers", "encoder.norm", "head"),
        ("to_patches", "cls_token", "pos_embed", "blocks", "ln", "to_logits"),
        ("patch_embedding.proj", "cls_token", "pos_embedding", "encoder.layers", "head.0", "head.1"),
        ("patch_embed", "cls_token", "pos_embed", "my_own_blocks", "fc.0", "fc.1"),
        [f"net.{name}" for name in PARTS_OF_MINIVIT],
        [*(f"vit.{name}" for name in PARTS_OF_MINIVIT[:5]), "head"],
    )
]


@pytest.mark.parametrize("names", NAMES, ids=lambda names: names["patch_embed"])
@torch.no_grad()
def test_names_of_other_authors_come_back_as_they_were(names):
    source, pixel_values = small(MiniViT), tiny.pixels()
    state_dict = renamed(source.state_dict(), names)
    assert detect_layout(state_dict, {})[0] == "torch_encoder"
    model = converted(state_dict, POST)
    assert_close(model(pixel_values).logits, source(pixel_values))
    assert_bit_equal(restored(model), state_dict)


@pytest.mark.parametrize(
    "names", [("deconv1", "deconv2", "out"), [f"depth_head.{i}" for i in (0, 2, 4)], [f"head.{i}" for i in (0, 2, 4)]]
)
@torch.no_grad()
def test_names_of_depth_heads(names):
    source = small(MiniViTDepth)
    state_dict = renamed(source.state_dict(), dict(zip(("decoder.0", "decoder.2", "decoder.4"), names)))
    model = converted(state_dict, POST)
    assert_close(model(tiny.pixels()).predicted_depth, source(tiny.pixels()))
    assert_bit_equal(restored(model), state_dict)


@pytest.mark.parametrize("leading", [0, 1])
def test_class_token_and_positions_with_fewer_axes(leading):
    source = small(MiniViT).state_dict()
    positions = {"pos_embed": source["pos_embed"]} if leading else {"pos_embed.weight": source["pos_embed"][0]}
    state_dict = {key: tensor for key, tensor in source.items() if key != "pos_embed"} | positions
    state_dict["cls_token"] = state_dict["cls_token"].reshape([1] * leading + [32])
    assert_bit_equal(restored(converted(state_dict, POST)), state_dict)


def test_a_model_that_was_trained_here_gets_the_canonical_names():
    config, _ = from_torch(small(MiniViT).state_dict(), POST)
    config.converted_from = None
    model = tiny.randomised(VitEmbedForImageClassification(config))
    source = small(MiniViT)
    source.load_state_dict(restored(model))  # strict
    assert_close(model(tiny.pixels()).logits, source(tiny.pixels()))
    config.depth_activation, config.final_norm_type = "identity", "none"
    depth = tiny.randomised(VitEmbedForDepthEstimation(config))
    source = small(MiniViTDepth)
    source.load_state_dict(restored(depth))
    assert_close(depth(tiny.pixels()).predicted_depth, source(tiny.pixels()))


def test_a_new_head_on_a_converted_trunk():
    config, weights = from_torch(small(ViTTiny).state_dict(), PRE)
    config.num_labels = 3
    keys = set(restored(tiny.randomised(VitEmbedForImageClassification(config))))
    assert keys == {*small(ViTTiny).state_dict(), "head.weight", "head.bias"}


# What torch's layer cannot express

UNFIT = {
    "layer_scale_init_value": 0.1,
    "norm_type": "rms_norm",
    "num_register_tokens": 2,
    "stem_type": "linear",
    "position_embedding_type": "sinusoidal",
    "use_pre_layernorm": True,
    "qkv_bias": False,
    "pooling_type": "map",
    "token_merge_size": 1,
}


@pytest.mark.parametrize("field", UNFIT)
def test_what_torchs_layer_does_not_have_is_refused_by_field(field):
    config, weights = from_torch(small(MiniViT).state_dict(), POST)
    setattr(config, field, UNFIT[field])
    with pytest.raises(ValueError, match=f"TransformerEncoderLayer cannot express this model: {field}="):
        LAYOUTS["torch_encoder"].restore(config, weights)


def test_other_heads_and_foreign_records_are_refused():
    config, weights = from_torch(small(MiniViT).state_dict(), POST)
    for changes, reason in [
        ({"architectures": ["VitEmbedForContrastive"]}, "cannot express VitEmbedForContrastive"),
        ({"architectures": ["VitEmbedForDepthEstimation"]}, "depth_activation=None"),
        ({"converted_from": {"layout": "torch_encoder"}}, "names=None"),
        ({"converted_from": {"layout": "torch_encoder", "names": {"norm": "{n}"}, "leading_axes": {}}}, "names="),
    ]:
        changed = type(config)(**{**config.to_dict(), **changes})
        with pytest.raises(ValueError, match=reason):
            LAYOUTS["torch_encoder"].restore(changed, weights)
