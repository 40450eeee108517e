"""What holds for every stem. A new stem is tested by its name in STEM_TYPES; its equation is in test_stem_equations."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from numpy.polynomial.chebyshev import chebval2d
from stem_family import (
    FAMILY,
    HEADS,
    NEEDED,
    PAIRS,
    PYRAMID_STEMS,
    assert_close,
    assert_every_weight_learns,
    build,
    inputs_of,
    positions_of,
    read_stem,
    result,
    stem_config,
)
from tiny import CLOSE, gradients, pixels, score, vision_config
from torch import nn

from vit_embed import VitEmbedForImageClassification, VitEmbedModel
from vit_embed.embeddings_vit_embed import POSITIONS
from vit_embed.options_vit_embed import (
    GRIDLESS_STEMS,
    POSITION_EMBEDDING_TYPES,
    STEM_NORM_TYPES,
    STEM_TYPES,
    TOKEN_CHOOSING_STEMS,
)
from vit_embed.stem_layers_vit_embed import STEM_NORMS
from vit_embed.stems_vit_embed import STEMS

EVERY_PAIR = pytest.mark.parametrize(("stem", "head"), PAIRS)
EVERY_STEM = pytest.mark.parametrize("stem", FAMILY)
FIXED_STEMS = [stem for stem in STEM_TYPES if stem not in TOKEN_CHOOSING_STEMS]


def test_tables_and_names_agree():
    assert set(STEMS) == set(STEM_TYPES) and set(POSITIONS) == set(POSITION_EMBEDDING_TYPES)
    assert set(STEM_NORMS) == set(STEM_NORM_TYPES)
    assert set(NEEDED) | set(GRIDLESS_STEMS) | set(TOKEN_CHOOSING_STEMS) <= set(STEM_TYPES)
    for stem in STEM_TYPES:
        assert STEMS[stem].__doc__ and len(STEMS[stem].__doc__) > 80, f"the docstring of {stem} gives its equation"


# --- tokens ---


@EVERY_STEM
@torch.no_grad()
def test_token_count(stem):
    model = build(stem)
    config = model.config
    images, grid_size = pixels(4, 96, 64), config.grid_of((96, 64))
    assert grid_size == (12, 8) or config.stem_type == "overlap"
    found = model(images).last_hidden_state.shape[1] - config.num_prefix_tokens
    if config.stem_type in GRIDLESS_STEMS:
        assert found == config.num_learned_tokens
        return
    token_map = model.get_token_map(images)
    assert token_map.shape == (4, *grid_size)
    counts = [len(image.unique()) for image in token_map]
    assert max(counts) == found and token_map.min() == 0 and token_map.max() == found - 1
    if config.stem_type in TOKEN_CHOOSING_STEMS:
        assert all(96 / 4 <= count <= 96 for count in counts)
    else:
        assert torch.equal(token_map.flatten(1), torch.arange(math.prod(grid_size)).expand(4, -1))


@EVERY_STEM
@torch.no_grad()
def test_tokens_start_about_as_large_as_those_of_conv(stem):
    """Within a factor of 30 of it: what is behind the stem is made for tokens of that size."""
    sizes = {}
    for name in ("conv", stem):
        model = VitEmbedModel(stem_config(name))
        sizes[name] = read_stem(model.train().embeddings, pixels(8)).states.std().item()
    assert 1 / 30 < sizes[stem] / sizes["conv"] < 30, sizes


@pytest.mark.parametrize("stem", STEM_TYPES)
@torch.no_grad()
def test_patch_bias_adds_biases_and_nothing_else(stem):
    with_bias, plain = build(stem, patch_bias=True), build(stem)
    state, without = with_bias.state_dict(), plain.state_dict()
    added = set(state) - set(without)
    assert added and all(name.endswith("bias") and "patch_embedding" in name for name in added)
    with_bias.load_state_dict({**{name: torch.zeros_like(state[name]) for name in added}, **without})
    assert_close((with_bias(pixels()).pooler_output,), (plain(pixels()).pooler_output,))
    for name in added:
        with_bias.get_parameter(name).normal_()
    assert (with_bias(pixels()).pooler_output - plain(pixels()).pooler_output).abs().max() > 1e-3


# --- gradients, attention, precision ---


@pytest.mark.parametrize(
    ("stem", "scheme"),
    [
        *((stem, "learned") for stem in FAMILY),
        *itertools.product(["conv", *TOKEN_CHOOSING_STEMS], POSITION_EMBEDDING_TYPES[1:]),
    ],
)
def test_gradients_reach_every_weight_from_the_start(stem, scheme):
    """As initialised: no stem starts where it cannot learn. Of three draws, as one may take no coarse cell at all."""
    config = stem_config(stem, "classification", position_embedding_type=scheme)
    model = VitEmbedForImageClassification(config).train()
    assert (model.trunk.embeddings.position_embedding is not None) == (scheme in ("learned", "polynomial"))
    inputs = inputs_of("classification", model.config)
    for seed in range(3):
        torch.manual_seed(seed)
        score(model(**inputs)).backward()
    assert all(weight.requires_grad for weight in model.parameters())
    assert_every_weight_learns(model)


@pytest.mark.parametrize("head", ["depth-deconv", "backbone", "masked"])
def test_dense_heads_leave_no_pooler_without_a_gradient(head):
    model = build("conv", head, pooling_type="map").train()
    gradients(model, inputs_of(head, model.config))
    assert_every_weight_learns(model)
    assert not any(".pooler." in name for name, weight in model.named_parameters() if weight.requires_grad)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_is_chosen_at_the_start_whatever_the_backbone_of_a_hybrid_has_to_choose_from(implementation):
    model = VitEmbedModel._from_config(stem_config("hybrid"), attn_implementation=implementation)
    assert {layer.self_attn.config._attn_implementation for layer in model.encoder.layers} == {implementation}


@pytest.mark.parametrize(
    ("stem", "scheme"),
    [*((stem, "learned") for stem in FAMILY), *(("conv", scheme) for scheme in POSITION_EMBEDDING_TYPES[1:])],
)
@torch.no_grad()
def test_autocast_leaves_the_residual_stream_in_float32(stem, scheme):
    """Its matrix products round to bfloat16; a stream that did so as well would add up the roundings of all layers."""
    model = build(stem, position_embedding_type=scheme)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pixels(), output_hidden_states=True)
    assert {state.dtype for state in output.hidden_states} == {torch.float32}


# --- sizes ---


@EVERY_STEM
@torch.no_grad()
def test_images_of_another_size(stem):
    """Each image of a batch is what it is alone, and not what it is when turned over; the native size plays no part."""
    model, images = build(stem), pixels(4, 32, 64)
    whole = model(images)
    alone = torch.cat([model(image[None]).pooler_output for image in images])
    torch.testing.assert_close(alone, whole.pooler_output, **CLOSE)
    turned = model(images.transpose(2, 3)).pooler_output
    assert (turned - whole.pooler_output).norm() > 1e-3 * turned.norm()
    model.set_image_size((32, 64))  # positions resampled once, or at every call, are the same numbers
    assert model.config.grid_size == model.config.grid_of((32, 64))
    assert torch.equal(model(images).last_hidden_state, whole.last_hidden_state)


@EVERY_PAIR
@torch.no_grad()
def test_padding_to_patches_equals_padding_by_hand(stem, head):
    model = build(stem, head, pad_to_patch=True)
    inputs = inputs_of(head, model.config, 2, 27, 45)
    images = inputs["pixel_values"]
    unit = model.config.image_multiple
    height, width = math.ceil(27 / unit[0]) * unit[0], math.ceil(45 / unit[1]) * unit[1]
    assert model.config.padded_shape((27, 45)) == (height, width)
    padded = images.new_zeros(2, 3, height, width)
    padded[..., :27, :45] = images
    found = result(head, model(**inputs))
    expected = result(head, model(**{**inputs, "pixel_values": padded}))
    if HEADS[head].result in ("predicted_depth", "reconstruction"):
        assert found[0].shape[-2:] == (27, 45), "as large as the image"
        expected = tuple(value[..., :27, :45] for value in expected)
    assert_close(found, expected)
    with pytest.raises(ValueError, match=r"multiples of (twice )?patch_size.*got \(27, 45\).*pad_to_patch=True"):
        build(stem, head)(**inputs)


@pytest.mark.parametrize("stem", ["conv", "overlap", "adaptive"])
def test_native_size_that_is_padded(stem):
    config = stem_config(stem, image_size=(27, 45), pad_to_patch=True)
    model = VitEmbedModel(config)
    assert config.grid_size == config.grid_of(config.padded_shape((27, 45)))
    assert len(model.embeddings.position_embedding.weight) == 1 + math.prod(config.grid_size)
    assert model(pixels(2, 27, 45)).last_hidden_state.isfinite().all()


@pytest.mark.parametrize(
    ("head", "fields", "training"),
    [
        ("classification", {"stem_type": "adaptive"}, True),
        ("depth-deconv", {"token_merge_size": 3}, False),
        ("classification", {"patch_drop_rate": 0.5}, True),
        ("masked", {}, True),
        pytest.param("depth-dpt", PYRAMID_STEMS["hierarchical"], True, marks=pytest.mark.heavy),
    ],
)
def test_a_pass_with_random_choices_or_merging_is_one_graph(head, fields, training):
    """With the draws of a seed. test_compile has the rest. backend="eager" runs what was captured as it is."""
    layers = {} if head == "depth-dpt" else {"num_hidden_layers": 1}
    model = build("conv", head, **layers, **fields).train(training)
    inputs = inputs_of(head, model.config)
    inputs.pop("bool_masked_pos", None)  # drawn: how many a given mask hides is read from the data
    plain = copy.deepcopy(model)
    torch._dynamo.reset()
    torch.manual_seed(5)
    found = torch.compile(model, fullgraph=True, backend="eager")(**inputs)
    torch.manual_seed(5)
    expected = plain(**inputs)
    torch.testing.assert_close(found.loss, expected.loss)
    assert_close(result(head, found), result(head, expected))


# --- positions ---


@pytest.mark.parametrize("stem", FIXED_STEMS)
@torch.no_grad()
def test_tokens_are_the_stems_and_their_positions(stem):
    embeddings = build(stem).embeddings
    tokens, layout = read_stem(embeddings, pixels(2, 32, 64))[:2]
    expected = tokens + positions_of(embeddings, layout.grid_size)
    torch.testing.assert_close(embeddings(pixels(2, 32, 64)).states[:, 1:], expected, **CLOSE)


@pytest.mark.parametrize(("degree", "grid_size"), [(1, (4, 4)), (4, (1, 9)), (7, (12, 5))])
@torch.no_grad()
def test_polynomial_positions_are_numpys(degree, grid_size):
    config = vision_config(position_embedding_type="polynomial", position_degree=degree)
    embeddings = VitEmbedModel(config).embeddings
    positions = nn.init.normal_(embeddings.position_embedding.weight)
    assert positions.shape == ((degree + 1) ** 2, 32)
    rows, columns = ((2 * np.arange(count) + 1) / count - 1 for count in grid_size)
    coefficients = positions.double().numpy().reshape(degree + 1, degree + 1, 32)
    expected = chebval2d(*np.meshgrid(rows, columns, indexing="ij"), coefficients)  # (D, gh, gw)
    # float32 sums of 64 terms of size 1
    found = positions_of(embeddings, grid_size).double()
    torch.testing.assert_close(found, torch.from_numpy(expected).flatten(1).t(), rtol=1e-4, atol=1e-5)
    embeddings.resize_positions(grid_size)
    assert embeddings.position_embedding.weight is positions, "they know no native grid"
