"""Each stem against its equation, written out, and against the library that has it."""

import copy
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from stem_family import (
    CONVNEXT_MAPS,
    PYRAMID_STEMS,
    RESNET,
    assert_close,
    build,
    positions_of,
    stem_config,
)
from tiny import CLOSE, pixels, randomised, vision_config
from torch import nn
from torch.nn import functional as F
from transformers import AutoBackbone, BitConfig, ConvNextConfig, ResNetConfig

from vit_embed import (
    VitEmbedModel,
    options_vit_embed,
)
from vit_embed.stem_layers_vit_embed import dct_basis, haar_basis
from vit_embed.stems_vit_embed import STEMS


def conv_named(state: dict[str, torch.Tensor], kept: str) -> dict[str, torch.Tensor]:
    """The state dict of a model whose stem holds a ConvStem under the name `kept`, as that of a `conv` model."""
    prefix = "embeddings.patch_embedding."
    named = {name.replace(f"{prefix}{kept}.", prefix): value for name, value in state.items() if prefix not in name}
    named |= {
        name.replace(f"{prefix}{kept}.", prefix): value for name, value in state.items() if f"{prefix}{kept}." in name
    }
    return named


def patches_of(images: torch.Tensor, patch: tuple[int, int]) -> torch.Tensor:
    """(B, C, H, W) -> (B, N, C, ph, pw), one slice at a time."""
    (ph, pw), (height, width) = patch, images.shape[2:]
    corners = itertools.product(range(0, height, ph), range(0, width, pw))
    return torch.stack([images[:, :, top : top + ph, left : left + pw] for top, left in corners], dim=1)


def conv_reference(images, weight, bias=None, **options) -> torch.Tensor:
    return F.conv2d(images, weight, bias, **options).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("patch_size", [8, (4, 8)])
@pytest.mark.parametrize("stem", ["linear", "dct", "wavelet", "deformable"])
@torch.no_grad()
def test_equals_conv_with_its_weight_carried_over(stem, patch_size):
    """float32, sums of up to 192 products in another basis and order: 1e-5, as the issue asks."""
    config = vision_config(patch_size=patch_size, patch_bias=True)
    conv = STEMS["conv"].make(config)
    nn.init.normal_(conv.weight, std=conv.init_std)
    nn.init.normal_(conv.bias)
    other_config = vision_config(stem_type=stem, patch_size=patch_size, patch_bias=True)
    kind = STEMS[stem]
    other = kind.make(other_config)
    other.weight.copy_(kind.carried(other_config, conv.weight) if hasattr(kind, "carried") else conv.weight.flatten(1))
    other.bias.copy_(conv.bias)
    if stem == "deformable":
        other.offsets.weight.zero_()
        other.offsets.bias.zero_()
    images = pixels(2, 64, 96)
    output = kind.read(other_config, other, images, None)
    expected = conv_reference(images, conv.weight, conv.bias, stride=config.patch_shape)
    torch.testing.assert_close(output.states, expected, rtol=1e-5, atol=1e-5)
    assert output.layout.grid_size == (64 // config.patch_shape[0], 96 // config.patch_shape[1])


@torch.no_grad()
def test_deformable_starts_as_conv_at_full_size():
    """A model as initialised has zero offsets. grid_sample takes places in [-1, 1], which float32 rounds to 1e-5 of a
    pixel at 224 pixels; neighbours of noise differ by up to 6, and 768 of them are summed with weights of 0.02."""
    config = vision_config(image_size=224, patch_size=16)
    model = VitEmbedModel(vision_config(stem_type="deformable", image_size=224, patch_size=16))
    stem = model.embeddings.patch_embedding
    assert not stem.offsets.weight.any() and not stem.offsets.bias.any()
    images = pixels(1, 224, 224)
    expected = conv_reference(images, stem.weight.unflatten(1, (3, *config.patch_shape)), stride=16)
    torch.testing.assert_close(stem(images).states, expected, rtol=0, atol=1e-4)


def deformed(move: tuple[float, float], scale: tuple[float, float], images: torch.Tensor) -> torch.Tensor:
    """What a deformable stem of patch (4, 8) reads in place of the patches when every box is moved and scaled alike:
    (B, gh, gw, C, 4, 8). Numbers are what the stem's linear layer puts out, before tanh."""
    config = vision_config(stem_type="deformable", patch_size=(4, 8))
    stem = STEMS["deformable"](config)
    with torch.no_grad():
        stem.offsets.weight.zero_()
        stem.offsets.bias.copy_(torch.tensor([*move, *scale]))
        values = stem.patch_values(images)
    grid = (images.shape[2] // 4, images.shape[3] // 8)
    return values.unflatten(2, (3, 4, 8)).unflatten(1, grid)


SATURATED = 20.0  # tanh(20) is 1 in float32


@pytest.mark.parametrize(("down", "right"), [(1, 0), (0, 1), (-1, 0), (1, -1)])
def test_a_box_moved_by_a_patch_reads_the_neighbour(down, right):
    images = pixels(2, 32, 64)
    found = deformed((down * SATURATED, right * SATURATED), (0.0, 0.0), images)
    whole = patches_of(images, (4, 8)).unflatten(1, (8, 8))
    inner = (slice(None), slice(1, 7), slice(1, 7))  # whose neighbours are in the image
    expected = whole.roll((-down, -right), dims=(1, 2))
    torch.testing.assert_close(found[inner], expected[inner], rtol=0, atol=1e-4)  # 1e-5 of a pixel, steps of up to 8
    if (down, right) == (1, 0):  # past the border its last pixels are read on
        edge = images[:, :, -1].unflatten(2, (8, 8)).permute(0, 2, 1, 3)
        torch.testing.assert_close(found[:, -1], edge[:, :, :, None].expand(-1, -1, -1, 4, -1), rtol=0, atol=1e-4)


def test_boxes_scale_about_their_centre():
    """On an image whose value is its row in one channel and its column in another, a sample is its own place."""
    rows, columns = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    images = torch.stack([rows, columns, torch.zeros_like(rows)])[None]
    found = deformed((0.0, 0.0), (SATURATED, -SATURATED), images)  # twice as high, half as wide
    within_row = torch.arange(4) + 0.5 - 2
    within_column = torch.arange(8) + 0.5 - 4
    for i, j in itertools.product(range(1, 7), range(8)):
        expected_rows = (4 * i + 2 + 2 * within_row)[:, None].expand(4, 8)
        expected_columns = (8 * j + 4 + 0.5 * within_column)[None].expand(4, 8)
        torch.testing.assert_close(found[0, i, j, 0], expected_rows, rtol=0, atol=1e-4)
        torch.testing.assert_close(found[0, i, j, 1], expected_columns, rtol=0, atol=1e-4)


def test_a_box_of_half_the_size_is_its_middle_scaled_up():
    images = pixels(2, 32, 64)
    found = deformed((0.0, 0.0), (-SATURATED, -SATURATED), images)[:, 2, 3]
    middle = images[:, :, 8:12, 24:32][:, :, 1:3, 2:6]
    expected = F.interpolate(middle, scale_factor=2, mode="bilinear", align_corners=False)
    # On its rim F.interpolate repeats the crop, where the stem sees the rest of the image.
    torch.testing.assert_close(found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], rtol=0, atol=1e-4)


def test_each_box_follows_its_own_patch():
    """Offsets come from the patch itself: with weights on them, other images read other places."""
    stem = randomised(STEMS["deformable"](vision_config(stem_type="deformable")))
    images = pixels(1)
    changed = images.clone()
    changed[..., :8, :8] += 1
    with torch.no_grad():
        values, others = stem.patch_values(images), stem.patch_values(changed)
        raw = stem.offsets(patches_of(images, (8, 8)).flatten(2))
        points = stem.sample_points(raw, (32, 32))
    corner = (patches_of(points.permute(0, 3, 1, 2), (8, 8)) * 16 + 16)[0].flatten(2)  # (N, x and y, 64) in pixels
    move, scale = raw.tanh()[0, :, :2], 2 ** raw.tanh()[0, :, 2:]
    for number, (i, j) in enumerate(itertools.product(range(4), range(4))):
        centre = torch.stack([8 * j + 4 + 8 * move[number, 1], 8 * i + 4 + 8 * move[number, 0]])
        torch.testing.assert_close(corner[number].mean(1), centre, rtol=0, atol=1e-4)
        side = corner[number].amax(1) - corner[number].amin(1)
        torch.testing.assert_close(side, 7 * scale[number].flip(0), rtol=0, atol=1e-4)
    assert not torch.equal(values[:, 0], others[:, 0])


@pytest.mark.parametrize("pointwise", [False, True])
@pytest.mark.parametrize(("patch_size", "kernel"), [(8, None), (8, (12, 9)), ((4, 8), (7, 16))])
@torch.no_grad()
def test_overlap_is_a_convolution(patch_size, kernel, pointwise):
    fields = {"patch_size": patch_size, "patch_kernel_size": kernel, "patch_pointwise": pointwise, "patch_bias": True}
    config = vision_config(stem_type="overlap", **fields)
    stem = randomised(STEMS["overlap"](config))
    weight, bias = stem.projection.weight, stem.projection.bias
    kernels = (16, 16) if kernel is None else kernel
    assert weight.shape == (32, 3, *kernels)
    padding = tuple((k - s) // 2 for k, s in zip(kernels, config.patch_shape))
    expected = F.conv2d(pixels(2, 32, 64), weight, bias, stride=config.patch_shape, padding=padding)
    assert (stem.pointwise is not None) == pointwise
    if pointwise:
        mixed = torch.einsum("oi,bihw->bohw", stem.pointwise.weight[:, :, 0, 0], expected)
        expected = mixed + stem.pointwise.bias[:, None, None]
    output = stem(pixels(2, 32, 64))
    assert output.layout.grid_size == tuple(expected.shape[2:])
    torch.testing.assert_close(output.states, expected.flatten(2).transpose(1, 2), **CLOSE)


@pytest.mark.parametrize("norm", options_vit_embed.STEM_NORM_TYPES)
@torch.no_grad()
def test_hierarchical_is_the_sequence_of_its_layers(norm):
    stem = build("hierarchical", stem_norm_type=norm).embeddings.patch_embedding
    images = pixels(2, 32, 64)
    output = stem(images)
    hidden, maps = images, []
    for stage, (convolution, normalisation, _) in enumerate(stem.stages):
        assert convolution.weight.shape == (4 * 2 ** (stage + 1), 3 if stage == 0 else 4 * 2**stage, 3, 3)
        hidden = F.conv2d(hidden, convolution.weight, stride=2, padding=1)
        if norm == "batch_norm":
            shift, scale = normalisation.running_mean, (normalisation.running_var + normalisation.eps).sqrt()
            assert shift.abs().max() > 0.01, "statistics of the images, or the test says nothing"
            hidden = (hidden - shift[:, None, None]) / scale[:, None, None]
        else:
            mean, variance = hidden.mean(1, keepdim=True), hidden.var(1, keepdim=True, unbiased=False)
            hidden = (hidden - mean) / (variance + normalisation.eps).sqrt()
        hidden = hidden * normalisation.weight[:, None, None] + normalisation.bias[:, None, None]
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        maps.append(hidden)
    assert_close(output.feature_pyramid, tuple(maps), rtol=1e-4, atol=1e-5)
    expected = F.conv2d(hidden, stem.projection.weight).flatten(2).transpose(1, 2)
    torch.testing.assert_close(output.states, expected, rtol=1e-4, atol=1e-5)
    assert output.layout.grid_size == (4, 8)


@torch.no_grad()
def test_hybrid_is_the_backbone_and_a_projection():
    for name in ("hybrid", "hybrid, ConvNext from a dict"):
        stem = build(name).embeddings.patch_embedding
        backbone = AutoBackbone.from_config(stem_config(name).backbone_config).eval()
        backbone.load_state_dict(stem.backbone.state_dict())
        features = backbone(pixels(2, 32, 64)).feature_maps[-1]
        assert features.shape == (2, 12, 4, 8)
        expected = F.conv2d(features, stem.projection.weight).flatten(2).transpose(1, 2)
        torch.testing.assert_close(stem(pixels(2, 32, 64)).states, expected, **CLOSE)


def test_hybrid_leaves_the_config_it_was_given_alone():
    """What is done to one model must not reach another one made from the same backbone_config."""
    given = copy.deepcopy(RESNET)
    before = given.to_dict()
    model = VitEmbedModel(vision_config(stem_type="hybrid", backbone_config=given))
    model.set_attn_implementation("eager")
    assert given.to_dict() == before
    backbone = model.embeddings.patch_embedding.backbone
    assert model.config.backbone_config is not given and backbone.config is not given


def test_hybrid_refuses_a_backbone_of_another_stride():
    model = VitEmbedModel(vision_config(stem_type="hybrid", backbone_config=RESNET, patch_size=4))
    with pytest.raises(
        ValueError, match=r"backbone_config must have a stride of patch_size \(4, 4\).*got \[\(4, 4\)\]"
    ):
        model(pixels())


@pytest.mark.parametrize("out_features", [["stage1"], ["stage1", "stage2"]])
def test_hybrid_refuses_a_backbone_that_goes_on_behind_its_map(out_features):
    """Stages that nothing reads have no gradients, which DistributedDataParallel does not forgive."""
    backbone = ResNetConfig(**{**RESNET.to_dict(), "out_features": out_features, "out_indices": None})
    with pytest.raises(ValueError, match=r"backbone_config must give \['stage2'\] with use_feature_pyramid=False"):
        VitEmbedModel(vision_config(stem_type="hybrid", backbone_config=backbone))


def test_hybrid_pyramid_refuses_a_backbone_that_gives_other_maps():
    fields = {**PYRAMID_STEMS["hybrid"], "backbone_config": ConvNextConfig(
        **{**CONVNEXT_MAPS.to_dict(), "out_features": ["stage3"], "out_indices": None}
    )}  # fmt: skip
    with pytest.raises(ValueError, match=r"must give \['stage1', 'stage2', 'stage3'\] with use_feature_pyramid=True"):
        VitEmbedModel(vision_config(**fields))


def test_hybrid_pyramid_refuses_maps_that_do_not_halve():
    """A map of the wrong stride would be scaled to the others' size and be wrong without a word."""
    backbone = BitConfig(
        embedding_size=8,
        hidden_sizes=[8, 12, 16],
        depths=[1, 1, 1],
        layer_type="preactivation",
        num_groups=2,
        output_stride=8,  # strides 4, 8 and 8: the last is right, the first is not
        out_features=["stage1", "stage2", "stage3"],
    )
    model = VitEmbedModel(vision_config(**{**PYRAMID_STEMS["hybrid"], "backbone_config": backbone}))
    with pytest.raises(
        ValueError, match=r"those of a pyramid half of the next one's.* got \[\(8, 8\), \(4, 4\), \(4, 4\)\]"
    ):
        model(pixels())


def test_hybrid_pyramid_refuses_a_backbone_with_other_widths_than_it_says():
    backbone = ResNetConfig(
        hidden_sizes=[8, 8, 16], depths=[1, 1], layer_type="basic", out_features=["stem", "stage1", "stage2"]
    )
    with pytest.raises(
        ValueError, match=r"hidden_sizes=\[8, 8, 16\].*\['stem', 'stage1', 'stage2'\].* one entry a stage"
    ):
        VitEmbedModel(vision_config(**{**PYRAMID_STEMS["hybrid"], "backbone_config": backbone}))


def test_hybrid_refuses_a_backbone_for_other_channels():
    with pytest.raises(ValueError, match="backbone_config.num_channels must be num_channels=1, got 3"):
        VitEmbedModel(vision_config(stem_type="hybrid", backbone_config=RESNET, num_channels=1))


@torch.no_grad()
def test_token_learner_is_the_formula():
    model = build("token_learner")
    stem, images = model.embeddings.patch_embedding, pixels(2, 32, 64)
    patches = conv_reference(images, stem.patches.weight, stride=8)
    placed = patches + positions_of(model.embeddings, (4, 8))
    norm, narrow, _, wide = stem.maps
    normed = F.layer_norm(placed, (32,), norm.weight, norm.bias)
    inner = F.gelu(F.linear(normed, narrow.weight, narrow.bias))
    scores = F.linear(inner, wide.weight, wide.bias)  # (B, N, K)
    weights = scores.exp() / scores.exp().sum(dim=1, keepdim=True)
    expected = torch.einsum("bnk,bnd->bkd", weights, placed)
    assert expected.shape == (2, 8, 32)
    torch.testing.assert_close(model.embeddings(images).states[:, 1:], expected, **CLOSE)


# dct, wavelet


@pytest.mark.parametrize("basis", [dct_basis, haar_basis])
@pytest.mark.parametrize("length", [1, 2, 4, 8, 16, 32])
def test_spectral_bases_are_orthonormal(basis, length):
    rows, frequency = (torch.tensor(each, dtype=torch.float64) for each in basis(length))
    torch.testing.assert_close(rows @ rows.t(), torch.eye(length, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(rows[0], torch.full((length,), length**-0.5, dtype=torch.float64))
    assert torch.equal(frequency, frequency.sort().values) and frequency[0] == 0


def test_haar_wavelets_are_those_of_the_textbook():
    half, root = 0.5, 0.5**0.5
    two = [[root, root], [root, -root]]
    four = [[half] * 4, [half, half, -half, -half], [root, -root, 0, 0], [0, 0, root, -root]]
    for expected, levels in ((two, [0, 1]), (four, [0, 1, 2, 2])):
        rows, level = haar_basis(len(expected))
        found, expected = (torch.tensor(each, dtype=torch.float64) for each in (rows, expected))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert level == levels
    assert haar_basis(16)[1] == [0, 1, 2, 2, *[3] * 4, *[4] * 8], "each level is half as wide as the one before"


def lowest(frequencies: list[list[Fraction]], count: int) -> list[tuple[int, int]]:
    """(row, column) of the `count` coefficients with the lowest sum of both frequencies, in exact arithmetic; of equal
    ones the one that comes first row by row."""
    places = itertools.product(*(range(len(axis)) for axis in frequencies))
    return sorted(places, key=lambda place: frequencies[0][place[0]] + frequencies[1][place[1]])[:count]


@pytest.mark.parametrize(
    ("patch_size", "count"),
    [
        *itertools.product([8, (4, 8), (16, 2)], [None, 1, 5, 11]),
        (14, 11),
        (14, 19),
        (14, None),
        ((6, 10), 36),
    ],
)
@torch.no_grad()
def test_dct_is_scipys_and_keeps_the_lowest_frequencies(patch_size, count):
    image_size = (56, 56) if patch_size == 14 else (24, 40) if patch_size == (6, 10) else 32
    config = vision_config(stem_type="dct", patch_size=patch_size, image_size=image_size, num_coefficients=count)
    stem, (ph, pw) = STEMS["dct"], config.patch_shape
    layer = randomised(stem.make(config))
    images = pixels(2, *config.image_shape)
    coefficients = dctn(patches_of(images, (ph, pw)).double().numpy(), axes=(-2, -1), norm="ortho")
    if count is None:
        assert layer.weight.shape == (32, 3 * ph * pw)
        sums = np.square(coefficients).sum(axis=(-2, -1))  # an orthonormal transform keeps lengths
        found = stem.patch_values(config, images).unflatten(2, (3, -1)).square().sum(dim=-1)
        torch.testing.assert_close(found, torch.from_numpy(sums).float(), rtol=1e-4, atol=1e-4)
    places = lowest([[Fraction(k, side) for k in range(side)] for side in (ph, pw)], count or ph * pw)
    expected = torch.stack([torch.from_numpy(coefficients[..., row, column]) for row, column in places], dim=-1).float()
    torch.testing.assert_close(stem.patch_values(config, images), expected.flatten(2), rtol=1e-5, atol=2e-5)
    states = stem.read(config, layer, images, None).states
    torch.testing.assert_close(states, F.linear(expected.flatten(2), layer.weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [None, 1, 3, 6])
@torch.no_grad()
def test_wavelet_is_haars_and_keeps_the_coarsest(count):
    config = vision_config(stem_type="wavelet", patch_size=(4, 2), num_coefficients=count)
    stem, images = STEMS["wavelet"], pixels(2)
    half, root = 0.5, 0.5**0.5
    tall = torch.tensor([[half] * 4, [half, half, -half, -half], [root, -root, 0, 0], [0, 0, root, -root]])
    wide = torch.tensor([[root, root], [root, -root]])
    coefficients = torch.einsum("up,bncpq,vq->bncuv", tall, patches_of(images, (4, 2)), wide)
    levels = [[Fraction(level) for level in axis] for axis in ([0, 1, 2, 2], [0, 1])]
    places = lowest(levels, count or 8)
    assert places[:3] == [(0, 0), (0, 1), (1, 0)][: len(places)]
    expected = torch.stack([coefficients[..., row, column] for row, column in places], dim=-1)
    torch.testing.assert_close(stem.patch_values(config, images), expected.flatten(2), **CLOSE)


# adaptive


def decided(stem: str, coarse: bool, **overrides) -> nn.Module:
    """A model whose every gate says the same, by a margin that no Gumbel noise overturns."""
    model = build("adaptive", stem, **overrides)
    gate = model.trunk.embeddings.patch_embedding.gate[3]
    with torch.no_grad():
        gate.weight.zero_()
        gate.bias.copy_(torch.tensor([-200.0, 200.0] if coarse else [200.0, -200.0]))
    return model


@torch.no_grad()
def test_adaptive_with_fine_cells_only_is_conv():
    model = decided("trunk", coarse=False)
    conv = VitEmbedModel(vision_config()).eval()
    conv.load_state_dict(conv_named(model.state_dict(), "fine"))
    images = pixels(2, 32, 64)
    torch.testing.assert_close(model(images).last_hidden_state, conv(images).last_hidden_state, **CLOSE)
    assert torch.equal(model.get_token_map(images), conv.get_token_map(images))


@torch.no_grad()
def test_adaptive_with_coarse_cells_only_is_conv_of_patches_twice_as_large():
    model = decided("trunk", coarse=True, use_cls_token=False, pooling_type="mean")
    stem, images = model.embeddings.patch_embedding, pixels(2, 32, 64)
    assert stem.coarse.weight.shape == (32, 3, 16, 16)
    positions = positions_of(model.embeddings, (4, 8)).view(4, 8, 32)
    means = torch.stack(
        [positions[i : i + 2, j : j + 2].mean((0, 1)) for i, j in itertools.product((0, 2), (0, 2, 4, 6))]
    )
    expected = conv_reference(images, stem.coarse.weight, stride=16) + means
    embedded = model.embeddings(images)
    torch.testing.assert_close(embedded.states, expected, **CLOSE)
    assert embedded.states.shape[1] == 32 / 4 and (embedded.layout.sizes == 4).all()
    cells = torch.arange(8).view(2, 4).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(model.get_token_map(images), cells.expand(2, -1, -1))
    hidden = model.pre_layrnorm(expected)  # all sizes are equal, so a trunk without sizes sees the same
    for layer in model.encoder.layers:
        hidden = layer(hidden)[0]
    torch.testing.assert_close(model(images).pooler_output, model.post_layernorm(hidden.mean(1)), **CLOSE)


@pytest.mark.parametrize("pooling_type", ["cls", "mean", "map"])
@torch.no_grad()
def test_adaptive_training_and_evaluation_are_the_same_numbers(pooling_type):
    """Four equal slots, or one token that counts as four: gates that are decided, differently by content."""
    model = build("adaptive", pooling_type=pooling_type)
    gate = model.embeddings.patch_embedding.gate[3]
    gate.weight.mul_(1e5)
    gate.bias.zero_()
    images = pixels(4, 64, 64)
    hard = model(images)
    assert 16 < hard.last_hidden_state.shape[1] - 1 < 64, "some cells are coarse and some are fine"
    soft = model.train()(images)
    assert soft.last_hidden_state.shape[1] == 65
    torch.testing.assert_close(soft.pooler_output, hard.pooler_output, **CLOSE)
