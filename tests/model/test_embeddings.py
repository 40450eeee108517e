"""Pixels or patch features -> tokens: patches, positions, prefix tokens, sizes, and what is refused."""

import math

import pytest
import torch
from references import import_package
from stem_family import positions_of, read_stem
from tiny import VISION, clip_model, pixels, randomised, vision_config
from torch.nn import functional as F

from vit_embed import VitEmbedModel
from vit_embed.embeddings_vit_embed import interpolate_positions, sinusoidal_positions
from vit_embed.options_vit_embed import POSITION_EMBEDDING_TYPES
from vit_embed.stem_layers_vit_embed import patchify, unpatchify
from vit_embed.tokens_vit_embed import TokenLayout


def test_patchify_is_row_by_row():
    image = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).reshape(2, 3, 4, 6)
    patches = patchify(image, (2, 3))
    assert patches.shape == (2, 4, 18)
    assert torch.equal(patches[1, 1], image[1, :, 0:2, 3:6].flatten())
    assert torch.equal(patches[0, 2], image[0, :, 2:4, 0:3].flatten())
    assert torch.equal(unpatchify(patches, (2, 2), (2, 3)), image)


@pytest.mark.parametrize("grid", [(8, 32), (32, 8), (3, 5)])
def test_resampling_equals_timm_with_antialias(grid):
    resample = import_package("timm").layers.resample_abs_pos_embed
    table = torch.randn(64, 12)
    expected = resample(table[None], list(grid), old_size=[8, 8], num_prefix_tokens=0)[0]
    found = interpolate_positions(table, (8, 8), grid, "bicubic_antialias")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", [2, 5, 8])
def test_resampling_equals_clip_without_antialias(side):
    embeddings = clip_model().vision_model.embeddings
    table = embeddings.position_embedding.weight
    blank = torch.zeros(1, 1 + side * side, VISION["hidden_size"])
    expected = embeddings.interpolate_pos_encoding(blank, side * 8, side * 8)[0, 1:]
    found = interpolate_positions(table[1:], (4, 4), (side, side), "bicubic")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_bilinear_resampling_is_torchs():
    table = torch.randn(16, 12)
    expected = F.interpolate(table.t().reshape(1, 12, 4, 4), size=(3, 7), mode="bilinear", align_corners=False)
    found = interpolate_positions(table, (4, 4), (3, 7), "bilinear")
    torch.testing.assert_close(found, expected[0].flatten(1).t(), rtol=0, atol=1e-6)


def test_resampling_to_the_native_grid_is_the_table_itself():
    table = torch.randn(16, 12)
    for interpolation in ("bicubic", "bicubic_antialias", "bilinear"):
        assert interpolate_positions(table, (4, 4), (4, 4), interpolation) is table


def test_resampling_of_bfloat16_is_computed_in_float32():
    table = torch.randn(64, 12).bfloat16()
    found = interpolate_positions(table, (8, 8), (16, 16), "bicubic")
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, interpolate_positions(table.float(), (8, 8), (16, 16), "bicubic").bfloat16())


def test_sinusoidal_positions_follow_the_formula():
    found = sinusoidal_positions((3, 5), 16)
    row, column, quarter = 2, 4, 4
    frequencies = [10000 ** (-k / quarter) for k in range(quarter)]
    expected = [f(n * w) for n in (row, column) for f in (math.sin, math.cos) for w in frequencies]
    torch.testing.assert_close(found[row * 5 + column], torch.tensor(expected))


@pytest.mark.parametrize("position_embedding_type", POSITION_EMBEDDING_TYPES)
@pytest.mark.parametrize(("use_cls_token", "registers"), [(True, 0), (True, 2), (False, 0), (False, 3)])
def test_token_order_and_count(position_embedding_type, use_cls_token, registers):
    config = vision_config(
        position_embedding_type=position_embedding_type,
        use_cls_token=use_cls_token,
        num_register_tokens=registers,
        pooling_type="cls" if use_cls_token else "mean",
    )
    embeddings = randomised(VitEmbedModel(config)).embeddings
    tokens, layout = embeddings(pixels(2, 32, 64))[:2]
    prefix = int(use_cls_token) + registers
    assert config.num_prefix_tokens == prefix
    assert tokens.shape == (2, prefix + 32, 32) and layout == TokenLayout((4, 8))
    patch_positions, patches = positions_of(embeddings, (4, 8)), read_stem(embeddings, pixels(2, 32, 64)).states
    is_learned = position_embedding_type == "learned"
    torch.testing.assert_close(tokens[:, prefix:], patches if patch_positions is None else patches + patch_positions)
    if use_cls_token:
        expected = embeddings.class_embedding + (embeddings.position_embedding.weight[0] if is_learned else 0)
        torch.testing.assert_close(tokens[0, 0], expected)
    if registers:
        assert torch.equal(tokens[1, prefix - registers : prefix], embeddings.register_tokens)


def test_inputs_are_cast_at_the_stem():
    model = VitEmbedModel(vision_config()).to(torch.bfloat16)
    assert model(pixels()).pooler_output.dtype == torch.bfloat16
    assert model(patch_embeds=torch.randn(1, 32, 4, 4)).pooler_output.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "exactly one of pixel_values and patch_embeds, got neither"),
        ({"pixel_values": pixels(), "patch_embeds": torch.randn(3, 32, 4, 4)}, "got both"),
        ({"pixel_values": pixels(1, 32, 31)}, r"multiples of patch_size \(8, 8\), got \(32, 31\)"),
        ({"pixel_values": pixels(1, 0, 32)}, "multiples of patch_size"),
        ({"patch_embeds": torch.randn(3, 31, 4, 4)}, r"hidden_size=32.*got \(3, 31, 4, 4\)"),
        ({"patch_embeds": torch.randn(3, 16, 32)}, r"got \(3, 16, 32\)"),
    ],
)
def test_bad_images_are_refused(inputs, message):
    """test_inputs has those that every class refuses."""
    with pytest.raises(ValueError, match=message):
        VitEmbedModel(vision_config())(**inputs)


def test_a_refused_size_changes_nothing():
    model = VitEmbedModel(vision_config())
    with pytest.raises(ValueError, match="image_size must be a multiple of patch_size"):
        model.set_image_size(50)
    assert model.config.image_size == 32 and model.embeddings.position_embedding.weight.shape == (17, 32)
