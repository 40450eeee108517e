"""Vision transformers on torch.nn.TransformerEncoderLayer: the same numbers as the source."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn
from torch_encoder_reference import (
    OPTIONS,
    POST,
    PRE,
    SIZES,
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
from transformers import AutoModel, AutoModelForDepthEstimation, AutoModelForImageClassification
from transformers.activations import ACT2FN

import vit_embed
from vit_embed import VitEmbedModel
from vit_embed.conversion.layouts import LAYOUTS, detect_layout
from vit_embed.conversion.reading import read_checkpoint
from vit_embed.convert_checkpoint import convert_checkpoint, restore_checkpoint

CONFIGS = Path(vit_embed.__file__).parent / "configs"
EVERY_SOURCE = pytest.mark.parametrize("source_class", OPTIONS, ids=lambda each: each.__name__)

AUTO_CLASSES = {
    ViTTiny: AutoModel,
    MiniViT: AutoModelForImageClassification,
    MiniViTDepth: AutoModelForDepthEstimation,
}


@pytest.fixture(params=[True, False], ids=["fast path", "plain path"])
def fast_path(request):
    """torch's layer in evaluation: its fused kernel, and what it computes in training as well."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(request.param)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


# Equal to the source


@EVERY_SOURCE
def test_every_hidden_state(source_class, fast_path):
    source, pixel_values = small(source_class), tiny.pixels()
    expected = source.states(pixel_values)
    with torch.no_grad():
        output = converted(source.state_dict(), OPTIONS[source_class])(pixel_values, output_hidden_states=True)
    assert len(output.hidden_states) == len(expected) == SIZES["layers"] + 1
    for ours, theirs in zip(output.hidden_states, expected):
        assert_close(ours, theirs)


@torch.no_grad()
def test_class_token_and_grid_of_muomni(fast_path):
    source, pixel_values = small(ViTTiny), tiny.pixels()
    model = converted(source.state_dict(), PRE)
    class_token, grid = source(pixel_values)
    output = model(pixel_values)
    assert_close(output.pooler_output, class_token[:, 0])
    assert_close(model.post_layernorm(output.last_hidden_state)[:, 1:], grid)


@torch.no_grad()
def test_logits_of_minivit(fast_path):
    source, pixel_values = small(MiniViT), tiny.pixels()
    model = converted(source.state_dict(), POST)
    assert model.config.num_labels == 5
    assert_close(model(pixel_values).logits, source(pixel_values))


@pytest.mark.parametrize("kernel", [2, 4])
@torch.no_grad()
def test_depth_of_minivit(kernel, fast_path):
    source, pixel_values = small(MiniViTDepth, kernel=kernel), tiny.pixels()
    model = converted(source.state_dict(), POST)
    expected = source(pixel_values)
    assert model.config.deconv_kernel_size == kernel and (expected < 0).any()  # raw numbers
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


@EVERY_SOURCE
def test_the_pipeline_compares_and_the_folder_loads(source_class, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    source = small(source_class)
    torch.save(source.state_dict(), tmp_path / "source.pth")
    differences = convert_checkpoint(tmp_path / "source.pth", tmp_path / "folder", OPTIONS[source_class])
    outputs = {ViTTiny: set(), MiniViT: {"logits"}, MiniViTDepth: {"predicted_depth"}}[source_class]
    assert set(differences) == {"last_hidden_state", "pooler_output"} | outputs
    assert max(differences.values()) < 1e-4 and "layout torch_encoder" in caplog.text
    model = AUTO_CLASSES[source_class].from_pretrained(tmp_path / "folder", trust_remote_code=True).eval()
    assert_bit_equal(restored(model), source.state_dict())
    restore_checkpoint(tmp_path / "folder", "torch_encoder", tmp_path / "back.pth")
    assert "load_state_dict" in caplog.text and "TransformerEncoderLayer(32, 4, 48" in caplog.text
    assert_bit_equal(read_checkpoint(tmp_path / "back.pth"), source.state_dict())


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


@EVERY_SOURCE
def test_detected(source_class):
    layout, reason = detect_layout(small(source_class).state_dict(), {})
    assert layout == "torch_encoder" and "TransformerEncoderLayer" in reason


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


@pytest.mark.parametrize(
    ("make", "reason"), [(text_model, "no patch convolution"), (detr, "one stack of layers.*got 2")]
)
def test_other_models_on_the_same_layer_are_refused(make, reason):
    assert LAYOUTS["torch_encoder"].detect(make(), {}) is None
    with pytest.raises(ValueError, match=reason):
        from_torch(make(), POST)


# What must be told


@pytest.mark.parametrize("option", ["num_attention_heads", "norm_position", "hidden_act"])
@EVERY_SOURCE
def test_what_weights_do_not_say_must_be_told(source_class, option):
    with pytest.raises(ValueError, match=f"--{option}"):
        from_torch(small(source_class).state_dict(), replace(OPTIONS[source_class], **{option: None}))


def test_eps_is_torchs_default_but_for_an_rms_norm(caplog):
    told = replace(POST, layer_norm_eps=1e-5)
    assert from_torch(small(MiniViT).state_dict(), told)[0].layer_norm_eps == 1e-5
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


def test_parts_that_contradict_each_other():
    weights = small(MiniViT).state_dict()
    with pytest.raises(ValueError, match=r"linear2.weight must be \(32, 48\)"):
        from_torch({**weights, "encoder.layers.1.linear2.weight": torch.ones(32, 47)}, POST)
    with pytest.raises(ValueError, match=r"cls_token must be \(1, 1, 32\)"):
        from_torch({**weights, "cls_token": torch.ones(1, 1, 31)}, POST)
    with pytest.raises(ValueError, match=r"pos_embed must be \(1, 17, 32\)"):
        from_torch({**weights, "pos_embed": torch.ones(2, 17, 32)}, POST)
    with pytest.raises(ValueError, match="without a place in the model: encoder.norm.weight"):
        from_torch({**weights, "encoder.norm.weight": torch.ones(32), "encoder.norm.bias": torch.ones(32)}, POST)
    with pytest.raises(ValueError, match="deconv_kernel_size must be an even"):
        from_torch(small(MiniViTDepth, kernel=2).state_dict() | {"decoder.0.weight": torch.ones(32, 16, 3, 3)}, POST)


def test_parts_that_are_missing():
    weights, depth = small(MiniViT).state_dict(), small(MiniViTDepth).state_dict()
    with pytest.raises(ValueError, match="no learned positions"):
        from_torch({key: tensor for key, tensor in weights.items() if key != "pos_embed"}, POST)
    with pytest.raises(ValueError, match="got decoder.0 alone"):
        from_torch({key: tensor for key, tensor in depth.items() if key[:9] not in ("decoder.2", "decoder.4")}, POST)


def test_a_linear_map_of_patches_is_refused_by_name():
    weights = small(MiniViT).state_dict() | {"patch_embed.weight": torch.ones(32, 192)}
    assert detect_layout(weights, {})[0] == "torch_encoder"
    with pytest.raises(ValueError, match="patch_embed is a linear map of flattened patches"):
        from_torch(weights, POST)


def test_two_heads():
    both = small(MiniViT).state_dict() | small(MiniViTDepth).state_dict()
    with pytest.raises(ValueError, match="a classifier and a depth head, head and decoder.0, decoder.2, decoder.4"):
        from_torch(both, POST)
    config, weights = from_torch(both, replace(POST, trunk_only=True))
    assert config.architectures == ["VitEmbedModel"] and not any("head" in name for name in weights)


@torch.no_grad()
def test_the_trunk_alone():
    source, pixel_values = small(MiniViT), tiny.pixels()
    model = converted(source.state_dict(), replace(POST, trunk_only=True))
    assert isinstance(model, VitEmbedModel)
    assert_close(model(pixel_values).pooler_output, source.norm(source.states(pixel_values)[-1])[:, 0])


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
