"""Each stem against its equation, written out, and against the library that has it."""

import copy
import itertools
import math
from fractions import Fraction

import pytest
import torch
from scipy.fft import dctn
from stem_family import RESNET, assert_close, build, positions_of, stem_config
from tiny import CLOSE, pixels, randomised, vision_config
from torch.nn import functional as F
from transformers import AutoBackbone

from vit_embed import VitEmbedModel, options_vit_embed
from vit_embed.stem_layers_vit_embed import haar_basis
from vit_embed.stems_vit_embed import STEMS


def patches_of(images: torch.Tensor, patch: tuple[int, int]) -> torch.Tensor:
    """(B, C, H, W) -> (B, N, C, ph, pw), one slice at a time."""
    (ph, pw), (height, width) = patch, images.shape[2:]
    corners = itertools.product(range(0, height, ph), range(0, width, pw))
    return torch.stack([images[:, :, top : top + ph, left : left + pw] for top, left in corners], dim=1)


def conv_reference(images, weight, bias=None, **options) -> torch.Tensor:
    return F.conv2d(images, weight, bias, **options).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("patch_size", [8, (4, 8)])
@pytest.mark.parametrize("stem", ["conv", "linear", "dct", "wavelet", "deformable"])
@torch.no_grad()
def test_equals_conv_with_its_weight_carried_over(stem, patch_size):
    """float32, sums of up to 192 products in another basis and order: 1e-5."""
    config = vision_config(stem_type=stem, patch_size=patch_size, patch_bias=True)
    kind, (ph, pw) = STEMS[stem], config.patch_shape
    weight, bias = 0.02 * torch.randn(32, 3, ph, pw), torch.randn(32)
    layer = kind.make(config)
    layer.weight.copy_(kind.carried(config, weight) if hasattr(kind, "carried") else weight.view_as(layer.weight))
    layer.bias.copy_(bias)
    if stem == "deformable":
        layer.offsets.weight.zero_()
        layer.offsets.bias.zero_()
    images = pixels(2, 64, 96)
    output = kind.read(config, layer, images, None)
    expected = conv_reference(images, weight, bias, stride=(ph, pw))
    torch.testing.assert_close(output.states, expected, rtol=1e-5, atol=1e-5)
    assert output.layout.grid_size == (64 // ph, 96 // pw)


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


@pytest.mark.parametrize(("down", "right"), [(1, 0), (1, -1)])
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
@pytest.mark.parametrize(
    ("patch_size", "kernel", "shape"), [(8, None, (16, 16)), (4, 7, (7, 7)), ((8, 4), (12, 5), (12, 5))]
)
@torch.no_grad()
def test_overlap_is_a_convolution(patch_size, kernel, shape, pointwise):
    fields = {"patch_size": patch_size, "patch_kernel_size": kernel, "patch_pointwise": pointwise, "patch_bias": True}
    config = vision_config(stem_type="overlap", **fields)
    stem = randomised(STEMS["overlap"](config))
    weight, bias = stem.projection.weight, stem.projection.bias
    assert weight.shape == (32, 3, *shape)
    padding = tuple((k - s) // 2 for k, s in zip(shape, config.patch_shape))
    expected = F.conv2d(pixels(2, 32, 64), weight, bias, stride=config.patch_shape, padding=padding)
    assert config.patch_padding == padding and config.grid_of((32, 64)) == tuple(expected.shape[2:])
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


def test_each_level_of_haar_wavelets_is_half_as_wide_as_the_one_before():
    assert haar_basis(16)[1] == [0, 1, 2, 2, *[3] * 4, *[4] * 8]


HALF, ROOT = 0.5, 0.5**0.5
HAAR_2 = [[ROOT, ROOT], [ROOT, -ROOT]]
HAAR_4 = [[HALF] * 4, [HALF, HALF, -HALF, -HALF], [ROOT, -ROOT, 0, 0], [0, 0, ROOT, -ROOT]]


def lowest(frequencies: list[list[Fraction]], count: int) -> list[tuple[int, int]]:
    """(row, column) of the `count` coefficients with the lowest sum of both frequencies, in exact arithmetic; of equal
    ones the one that comes first row by row."""
    places = itertools.product(*(range(len(axis)) for axis in frequencies))
    return sorted(places, key=lambda place: frequencies[0][place[0]] + frequencies[1][place[1]])[:count]


@pytest.mark.parametrize(
    ("patch_size", "count"),
    [(8, None), (8, 1), (8, 11), ((4, 8), 5), ((16, 2), 11), ((16, 2), None), (14, 19), ((6, 10), 36)],
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
    patches = patches_of(images, (4, 2))
    coefficients = torch.einsum("up,bncpq,vq->bncuv", torch.tensor(HAAR_4), patches, torch.tensor(HAAR_2))
    levels = [[Fraction(level) for level in axis] for axis in ([0, 1, 2, 2], [0, 1])]
    places = lowest(levels, count or 8)
    assert places[:3] == [(0, 0), (0, 1), (1, 0)][: len(places)]
    expected = torch.stack([coefficients[..., row, column] for row, column in places], dim=-1)
    torch.testing.assert_close(stem.patch_values(config, images), expected.flatten(2), **CLOSE)


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
