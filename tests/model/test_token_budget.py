"""Fewer tokens, and images of several sizes: merging, dropping, the adaptive stem, padding with `pixel_mask`."""

import shutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import pictures
import pytest
import tiny
import torch
from tiny import CLOSE, dual_config, pixels, randomised, tokens, use_attention, vision_config
from torch import nn
from transformers import PreTrainedModel, ResNetConfig, ViltImageProcessor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vit_embed import (
    VitEmbedBackbone,
    VitEmbedForContrastive,
    VitEmbedForDepthEstimation,
    VitEmbedForImageClassification,
    VitEmbedForMaskedImageModeling,
    VitEmbedModel,
    VitEmbedModelWithProjection,
)
from vit_embed.options_vit_embed import GRIDLESS_STEMS, STEM_TYPES
from vit_embed.stems_vit_embed import AdaptiveStem
from vit_embed.tokens_vit_embed import TokenLayout, match_tokens, mean_of_patches, merge_tokens, token_of_each_patch


class Head(NamedTuple):
    """One thing that a user reads off a model: vectors (B, X), or maps whose last two dimensions are rows and
    columns."""

    model_class: type[PreTrainedModel]
    fields: dict
    read: Callable[..., tuple[torch.Tensor, ...]]
    has_grid: bool = True


def read_patch_features(model, **inputs):
    return (model.get_patch_features(**inputs).permute(0, 3, 1, 2),)


def vector(model_class, read, **fields) -> Head:
    return Head(model_class, fields, lambda model, **inputs: (read(model, **inputs),), has_grid=False)


HEADS = {
    "cls": vector(VitEmbedModel, lambda model, **inputs: model(**inputs).pooler_output),
    "mean": vector(VitEmbedModel, lambda model, **inputs: model(**inputs).pooler_output, pooling_type="mean"),
    "map": vector(VitEmbedModel, lambda model, **inputs: model(**inputs).pooler_output, pooling_type="map"),
    "classification": vector(VitEmbedForImageClassification, lambda model, **inputs: model(**inputs).logits),
    "contrastive": vector(
        VitEmbedForContrastive,
        lambda model, **inputs: model.get_image_features(**inputs),
        text_config=dict(tiny.TEXT),
    ),
    "mean of normalised": vector(
        VitEmbedModel,
        lambda model, **inputs: model(**inputs).pooler_output,
        pooling_type="mean",
        norm_before_pooling=True,
    ),
    "projection": vector(VitEmbedModelWithProjection, lambda model, **inputs: model(**inputs).image_embeds),
    "patch features": Head(VitEmbedForContrastive, {"text_config": dict(tiny.TEXT)}, read_patch_features),
    "backbone": Head(
        VitEmbedBackbone,
        {"out_features": ["stem", "stage1", "stage2", "stage3", "stage4"]},
        lambda model, **inputs: model(**inputs).feature_maps,
    ),
    "deconv": Head(VitEmbedForDepthEstimation, {}, lambda model, **inputs: (model(**inputs).predicted_depth,)),
    "dpt": Head(
        VitEmbedForDepthEstimation,
        {"depth_head_type": "dpt"},
        lambda model, **inputs: (model(**inputs).predicted_depth,),
    ),
    "class attentions": Head(VitEmbedModel, {}, lambda model, **inputs: (model.get_class_attentions(**inputs),)),
}
EVERY_HEAD = pytest.mark.parametrize("head", HEADS)

# Fields without which a stem means nothing.
NEEDED = {
    "hybrid": {
        "backbone_config": ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
        )
    },
}


def build(head: str, **fields) -> PreTrainedModel:
    """A model in eval mode, every weight random; the same weights for equal shapes whatever the fields."""
    return randomised(HEADS[head].model_class(vision_config(**{**HEADS[head].fields, **fields})))


def read(head: str, model: PreTrainedModel, **inputs) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return HEADS[head].read(model, **inputs)


def trunk_of(model: PreTrainedModel) -> VitEmbedModel:
    return model if isinstance(model, VitEmbedModel) else model.vision_model


def coarse_cells(stem: AdaptiveStem, images: torch.Tensor) -> torch.Tensor:
    """(B, gh / 2, gw / 2), 1 for the cells that the gate gives one token."""
    return stem.gate(stem.coarse(images).permute(0, 2, 3, 1)).argmax(-1).float()


def features_of(model: VitEmbedModel, images: torch.Tensor):
    with torch.no_grad():
        stages = range(model.config.num_hidden_layers + 1)
        output = model(images, output_attentions=True, output_hidden_states=True, stages=stages)
    return SimpleNamespace(**output, layouts=[each.layout for each in output.stages], layout=output.stages[-1].layout)


# Merging ----------------------------------------------------------------------------------------------------------


def merged_by_hand(metric, states, sizes, merge_size) -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    """arXiv:2210.09461 section 3 for one image, token by token: who merges with whom, the means, the sizes."""
    count = len(states)
    unit = [row / row.norm() for row in metric]
    likeness = {even: {odd: float(unit[even] @ unit[odd]) for odd in range(1, count, 2)} for even in range(0, count, 2)}
    partner = {even: max(scores, key=scores.get) for even, scores in likeness.items()}
    chosen = sorted(partner, key=lambda even: likeness[even][partner[even]], reverse=True)[:merge_size]
    groups = {i: [i] for i in range(count) if i not in chosen}
    for even in chosen:
        groups[partner[even]].append(even)
    members = list(groups.values())
    new_sizes = torch.stack([sum(sizes[i] for i in group) for group in members])
    means = torch.stack([sum(sizes[i] * states[i] for i in group) / sum(sizes[i] for i in group) for group in members])
    return members, means, new_sizes


@pytest.mark.parametrize("with_sizes", [False, True])
@pytest.mark.parametrize(("count", "merge_size"), [(16, 1), (16, 5), (16, 8), (9, 3), (9, 4), (2, 1), (3, 1)])
def test_merging_equals_the_paper_token_by_token(count, merge_size, with_sizes):
    metric, states = torch.randn(3, count, 6), torch.randn(3, count, 5)
    sizes = torch.randint(1, 5, (3, count)).float() if with_sizes else None
    merge = match_tokens(metric, merge_size)
    merged, layout = merge_tokens(states, TokenLayout((1, count), sizes), merge)
    for row in range(3):
        own_sizes = torch.ones(count) if sizes is None else sizes[row]
        members, means, new_sizes = merged_by_hand(metric[row], states[row], own_sizes, merge_size)
        assert [min(set(group) - set(merge.source[row].tolist())) for group in members] == merge.kept[row].tolist()
        assert merge.kept[row].tolist() == sorted(merge.kept[row].tolist())
        for place, group in enumerate(members):
            assert (layout.token_of_patch[row, group] == place).all()
        torch.testing.assert_close(merged[row], means)
        assert torch.equal(layout.sizes[row], new_sizes)


def test_merges_compose():
    """Tokens that say which patches they are made of, merged again and again."""
    count = 20
    states, layout = torch.eye(count).expand(3, -1, -1), TokenLayout((4, 5))
    for merge_size in (4, 8, 3, 2, 1):
        states, layout = merge_tokens(states, layout, match_tokens(torch.randn(3, states.shape[1], 7), merge_size))
        count_now = states.shape[1]
        is_member = nn.functional.one_hot(layout.token_of_patch, count_now).transpose(1, 2).float()  # (B, n, N)
        assert torch.equal(layout.sizes, is_member.sum(-1)) and (layout.sizes.sum(dim=1) == count).all()
        torch.testing.assert_close(states, is_member / layout.sizes[..., None])
        torch.testing.assert_close(token_of_each_patch(states, layout).sum(-1), torch.ones(3, count))
        torch.testing.assert_close(mean_of_patches(states, layout), torch.full((3, count), 1 / count))
    assert count_now == 2


def test_keys_are_averaged_over_heads():
    """The layer compares by the mean of the heads' keys, not by their concatenation."""
    model = build("cls", token_merge_size=3, num_register_tokens=2)
    layer, states = model.encoder.layers[0], torch.randn(2, 19, 32)
    with torch.no_grad():
        out, _, layout = layer(states, layout=TokenLayout((4, 4)), merge_size=3)
        normed = layer.layer_norm1(states)
        keys = layer.self_attn.k_proj(normed).unflatten(-1, (4, 8)).mean(dim=2)[:, 3:]
    assert out.shape == (2, 16, 32)
    assert torch.equal(layout.token_of_patch, match_tokens(keys, 3).place)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_a_token_of_size_s_counts_as_s_copies_and_padding_as_none(implementation):
    model = build("cls", num_register_tokens=1)
    use_attention(model, implementation)
    prefix, states = torch.randn(1, 2, 32), torch.randn(1, 4, 32)
    sizes = torch.tensor([2.0, 1.0, 3.0, 5.0])
    copies = torch.cat([prefix, states.repeat_interleave(sizes.long(), dim=1)], dim=1)
    padding = torch.full((1, 2, 32), 1e3)
    sized = torch.cat([prefix, states, padding], dim=1)
    layout = TokenLayout(None, torch.cat([sizes, torch.zeros(2)])[None])
    found = model.encoder(sized, layout=layout).last.states
    expected = model.encoder(copies, layout=TokenLayout(None)).last.states
    first = torch.cat([torch.arange(2), 2 + sizes.long().cumsum(0) - 1])
    torch.testing.assert_close(found[:, :6], expected[:, first], **CLOSE)


@torch.no_grad()
def test_without_merging_the_layers_are_plain_ones_bit_for_bit():
    model = build("cls", token_merge_size=0)
    states = model.pre_layrnorm(model.embeddings(pixels()).states)
    for layer in model.encoder.layers:
        mixed = layer.self_attn(layer.layer_norm1(states))[0]
        states = states + mixed
        states = states + layer.mlp(layer.layer_norm2(states))
    assert torch.equal(model(pixels()).last_hidden_state, states)


@torch.no_grad()
def test_training_merges_nothing():
    merging, plain = build("cls", token_merge_size=3), build("cls")
    expected = plain.train()(pixels()).last_hidden_state
    assert torch.equal(merging.train()(pixels()).last_hidden_state, expected)
    assert merging.eval()(pixels()).last_hidden_state.shape[1] == 17 - 4 * 3


@pytest.mark.parametrize("fields", [{}, {"num_register_tokens": 2}, {"use_cls_token": False, "pooling_type": "mean"}])
def test_each_layer_has_so_many_fewer_tokens(fields):
    model = build("cls", token_merge_size=3, **fields)
    num_prefix = model.config.num_prefix_tokens
    features = features_of(model, pixels())
    left = [16 - 3 * i for i in range(5)]
    assert [weights.shape[-1] - num_prefix for weights in features.attentions] == left[:-1]
    assert [states.shape[1] - num_prefix for states in features.hidden_states] == left
    for layout, count in zip(features.layouts[1:], left[1:]):
        counts = nn.functional.one_hot(layout.token_of_patch, count).sum(dim=1).float()
        assert torch.equal(layout.sizes, counts) and (layout.sizes.sum(dim=1) == 16).all()
    assert torch.equal(model.get_token_map(pixels()).flatten(1), features.layouts[-1].token_of_patch)


def twins(batch: int = 2) -> torch.Tensor:
    """(batch, 3, 32, 64): four kinds of patches, columns in pairs of one kind, so that every token has equal ones."""
    kinds = torch.randn(batch, 3, 8, 4, 8, generator=torch.Generator().manual_seed(5))
    return kinds.repeat_interleave(2, dim=3).flatten(3).repeat(1, 1, 4, 1)


ALIKE = {
    "plain": {},
    "post norm": {"norm_position": "post", "use_pre_layernorm": False},
    "rms norm": {"norm_type": "rms_norm"},
    "layer scale": {"layer_scale_init_value": 0.1, "num_register_tokens": 2},
    "eager": {},
}


@pytest.mark.parametrize("option", ALIKE)
@EVERY_HEAD
def test_merging_equal_tokens_changes_nothing(head, option):
    """What proportional attention is for, and the reason why sizes follow the tokens everywhere."""
    fields = {"position_embedding_type": "none", **ALIKE[option]}
    plain, merging = build(head, **fields), build(head, token_merge_size=3, **fields)
    if option == "eager":
        use_attention(merging, "eager")
    merging.load_state_dict(plain.state_dict())
    images = twins()
    places = trunk_of(merging).get_token_map(images)  # (B, 4, 8)
    for row in places:
        assert len(row.unique()) == 32 - 4 * 3
        kinds = torch.arange(8).div(2, rounding_mode="floor").expand(4, 8)
        assert all(len(kinds[row == place].unique()) == 1 for place in row.unique()), "else it is another property"
    for found, expected in zip(read(head, merging, pixel_values=images), read(head, plain, pixel_values=images)):
        assert expected.abs().max() > 1e-2
        # Up to 32 equal terms are added one by one or as one term times their number; rounding, four layers deep.
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-5)


@EVERY_HEAD
def test_merging_other_tokens_changes_something_and_keeps_shapes(head):
    plain, merging = build(head), build(head, token_merge_size=2)
    for found, expected in zip(read(head, merging, pixel_values=pixels()), read(head, plain, pixel_values=pixels())):
        assert found.shape == expected.shape and found.isfinite().all()
    assert not torch.allclose(found, expected, atol=1e-3), "the last of them lies behind the merges"


@torch.no_grad()
def test_patches_of_one_token_have_one_value_in_dense_outputs():
    model = build("backbone", token_merge_size=3)
    features = features_of(model.vision_model, pixels())
    maps = model(pixels()).feature_maps
    assert torch.equal(model.vision_model.get_token_map(pixels()).flatten(1), features.layouts[4].token_of_patch)
    for stage in (1, 2, 3, 4):
        of_patch = features.layouts[stage].token_of_patch
        normed = model.vision_model.post_layernorm(features.hidden_states[stage][:, 1:])
        for row in range(3):
            expected = normed[row, of_patch[row]].t().unflatten(1, (4, 4))
            torch.testing.assert_close(maps[stage][row], expected, **CLOSE)


@torch.no_grad()
def test_class_attention_sums_to_what_is_left_of_one():
    model = build("cls", token_merge_size=3, num_register_tokens=2)
    found = model.get_class_attentions(pixels())
    for layer, weights in enumerate(model(pixels(), output_attentions=True).attentions):
        torch.testing.assert_close(found[:, layer].sum(dim=(2, 3)), 1 - weights[:, :, 0, :3].sum(-1), **CLOSE)


@torch.no_grad()
def test_clip_checkpoint_merges_on_request(tmp_path):
    tiny.clip_model().save_pretrained(tmp_path / "clip")
    plain = VitEmbedForContrastive.from_pretrained(tmp_path / "clip")
    merging = VitEmbedForContrastive.from_pretrained(tmp_path / "clip", token_merge_size=3)
    assert merging.state_dict().keys() == plain.state_dict().keys()
    assert merging.vision_model(pixels()).last_hidden_state.shape[1] == 5
    found, expected = merging.get_image_features(pixels(), True), plain.get_image_features(pixels(), True)
    assert not torch.allclose(found, expected, atol=1e-4)
    merging.save_pretrained(tmp_path / "saved")
    again = VitEmbedForContrastive.from_pretrained(tmp_path / "saved")
    assert again.config.token_merge_size == 3
    assert torch.equal(again.get_image_features(pixels(), True), found)
    off = VitEmbedForContrastive.from_pretrained(tmp_path / "saved", token_merge_size=0)
    assert torch.equal(off.get_image_features(pixels(), True), expected)


@pytest.mark.parametrize("head", ["classification", "contrastive"])
def test_sdpa_equals_eager_with_merging(head):
    model = build(head, token_merge_size=3)
    results = []
    for implementation in ("sdpa", "eager"):
        use_attention(model, implementation)
        results.append(read(head, model, pixel_values=pixels())[0])
    torch.testing.assert_close(*results, **CLOSE)


@pytest.mark.parametrize("fields", [{"token_merge_size": 3}, {"stem_type": "adaptive"}, {}])
def test_flash_attention_gets_no_mask(monkeypatch, fields):
    """Flash attention takes no mask to add to the scores; where there is one, sdpa computes."""
    calls = []

    def flash(module, query, key, value, attention_mask, **kwargs):
        assert attention_mask is None
        calls.append(query.shape)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    model = build("classification", **fields)
    (expected,) = read("classification", model, pixel_values=pixels())
    model.config._attn_implementation = "flash_attention_2"
    (found,) = read("classification", model, pixel_values=pixels())
    torch.testing.assert_close(found, expected, **CLOSE)
    assert len(calls) == {"token_merge_size": 1, "stem_type": 0}.get(next(iter(fields), ""), 4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="flex attention on a CPU is compiled by g++, which is not here")
def test_flex_attention_equals_sdpa_with_merging():
    """float32 through a compiled kernel that sums in blocks: 1e-4."""
    model = build("classification", token_merge_size=3)
    (expected,) = read("classification", model, pixel_values=pixels())
    use_attention(model, "flex_attention")
    (found,) = read("classification", model, pixel_values=pixels())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("merge_size", [3, 8])
def test_the_pooled_row_alone_equals_all_rows(merge_size):
    model = build("contrastive", token_merge_size=merge_size)
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(pixels()).pooler_output)
        torch.testing.assert_close(model.get_image_features(pixels()), expected, **CLOSE)


def test_merging_stops_at_half_of_what_is_left():
    model = build("mean", token_merge_size=8)
    features = features_of(model, pixels())
    assert [states.shape[1] - 1 for states in features.hidden_states] == [16, 8, 4, 2, 1]
    assert (features.layout.sizes == 16).all() and (model.get_token_map(pixels()) == 0).all()


@pytest.mark.parametrize(("layers", "shape"), [(6, (32, 32)), (4, (8, 24)), (4, (8, 8))])
def test_one_token_has_none_to_merge_with(layers, shape):
    model = build("mean", token_merge_size=8, num_hidden_layers=layers)
    features = features_of(model, pixels(2, *shape))
    assert features.last_hidden_state.shape[1] - 1 == 1 and features.last_hidden_state.isfinite().all()
    if shape == (8, 8):  # there never was a pair
        assert torch.equal(features.last_hidden_state, features_of(build("mean"), pixels(2, 8, 8)).last_hidden_state)


def test_merges_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="token_merge_size must be at most half of the 16 patch tokens, got 9"):
        vision_config(token_merge_size=9)
    with pytest.raises(ValueError, match="half of the 6 patch tokens, got 4"):
        vision_config(stem_type="token_learner", num_learned_tokens=6, token_merge_size=4)
    with pytest.raises(ValueError, match="token_merge_size"):
        vision_config(token_merge_size=-1)
    with pytest.raises(ValueError, match="token_merge_size=2.*stem_type='adaptive'"):
        vision_config(token_merge_size=2, stem_type="adaptive")
    model = build("classification", token_merge_size=2)
    images, mask, _ = padded([(32, 32), (16, 32)])
    with pytest.raises(ValueError, match="token_merge_size=2.*pixel_mask"):
        model(images, pixel_mask=mask)
    assert model.train()(images, pixel_mask=mask).logits.isfinite().all(), "training merges nothing"


@torch.no_grad()
def test_learned_tokens_merge():
    model = build("map", stem_type="token_learner", num_learned_tokens=6, token_merge_size=1)
    features = features_of(model, pixels())
    assert [states.shape[1] - 1 for states in features.hidden_states] == [6, 5, 4, 3, 2]
    assert (features.layout.sizes.sum(dim=1) == 6).all() and features.layout.token_of_patch is None
    assert model(pixels()).pooler_output.isfinite().all()


@torch.no_grad()
def test_features_of_another_encoder_merge():
    model = build("mean", token_merge_size=2)
    embeds = model.embeddings.patch_embedding(pixels())
    expected = model(pixels()).pooler_output
    torch.testing.assert_close(model(patch_embeds=embeds).pooler_output, expected, **CLOSE)
    assert torch.equal(model.get_token_map(patch_embeds=embeds), model.get_token_map(pixels()))


def test_masked_image_modeling_refuses_to_merge():
    """Hidden patches have no token, and images may keep different counts: the same as with `pixel_mask`."""
    with pytest.raises(ValueError, match="token_merge_size"):
        VitEmbedForMaskedImageModeling(vision_config(token_merge_size=2))


# Dropping ---------------------------------------------------------------------------------------------------------

DROPPED = pytest.mark.parametrize(("rate", "left"), [(0.5, 8), (0.3, 12), (0.75, 4), (0.99, 1), (0.05, 16)])


@DROPPED
def test_dropping_keeps_the_prefix_and_so_many_patches_as_they_were(rate, left):
    model = build("cls", patch_drop_rate=rate, num_register_tokens=2)
    whole = model.embeddings(pixels(8)).states
    embedded = model.train().embeddings(pixels(8))
    places = embedded.layout.token_of_patch
    assert embedded.states.shape == (8, 3 + left, 32) and left == 16 - int(16 * rate)
    assert torch.equal(embedded.states[:, :3], whole[:, :3])
    for row in range(8):
        (kept,) = torch.where(places[row] >= 0)
        assert places[row, kept].tolist() == list(range(left))
        assert torch.equal(embedded.states[row, 3:], whole[row, 3 + kept])
    assert model.eval()(pixels()).last_hidden_state.shape == (3, 19, 32)


def test_dropping_is_drawn_for_each_image_and_step():
    model = build("cls", patch_drop_rate=0.5).train()
    draws = torch.stack([model.embeddings(pixels(64)).layout.token_of_patch >= 0 for _ in range(4)]).flatten(0, 1)
    assert len(draws.unique(dim=0)) > 250  # of 256 draws among 12,870 halves
    # Each patch is kept in half of the draws: 128, standard deviation 8, five of them.
    assert (draws.sum(dim=0) - 128).abs().max() < 40


def test_no_dropping_at_rate_0():
    model = build("cls")
    with torch.no_grad():
        assert torch.equal(model.train()(pixels()).pooler_output, model.eval()(pixels()).pooler_output)


@pytest.mark.parametrize("pooling_type", ["cls", "mean", "map"])
@pytest.mark.parametrize("head", ["classification", "contrastive"])
def test_dropping_trains(head, pooling_type):
    model = build(head, patch_drop_rate=0.5, pooling_type=pooling_type).train()
    inputs = {"input_ids": tokens()} if head == "contrastive" else {"labels": torch.tensor([0, 1, 1])}
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        optimizer.zero_grad()
        loss = model(pixel_values=pixels(), **inputs).loss
        loss.backward()
        if step == 0:
            assert_gradients(model)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5]), losses


def assert_gradients(model: nn.Module) -> None:
    """Every parameter has one that is finite and not zero; a key's bias shifts all scores of a query alike."""
    wrong = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.isfinite().all() or not parameter.grad.abs().sum() > 0
    ]
    assert [name for name in wrong if not name.endswith("k_proj.bias")] == []


def test_dropping_is_refused_where_every_patch_is_needed():
    with pytest.raises(ValueError, match="depth needs every patch.*patch_drop_rate=0.5"):
        VitEmbedForDepthEstimation(vision_config(patch_drop_rate=0.5))
    with pytest.raises(ValueError, match="mask_ratio.*; set patch_drop_rate=0, got 0.5"):
        VitEmbedForMaskedImageModeling(vision_config(patch_drop_rate=0.5))
    for head in ("backbone", "patch features"):
        model = build(head, patch_drop_rate=0.5)
        assert read(head, model, pixel_values=pixels())[0].shape[-2:] == (4, 4)
        with pytest.raises(ValueError, match="patch_drop_rate=0.5 leaves holes in the grid in training"):
            read(head, model.train(), pixel_values=pixels())
    for stem_type in ("adaptive", "token_learner"):
        with pytest.raises(ValueError, match=f"patch_drop_rate=0.5.*stem_type='{stem_type}'"):
            vision_config(stem_type=stem_type, patch_drop_rate=0.5)
    for rate in (-0.1, 1.0, 1.5, float("nan"), "a half"):
        with pytest.raises((ValueError, TypeError), match="patch_drop_rate"):
            vision_config(patch_drop_rate=rate)


def test_dropping_leaves_each_image_of_a_padded_batch_its_share():
    model = build("mean", patch_drop_rate=0.5).train()
    images, mask, sizes = padded([(32, 32), (16, 32), (8, 24)])
    layout = model.embeddings(images, pixel_mask=mask).layout
    assert [int((row >= 0).sum()) for row in layout.token_of_patch] == [8, 4, 2]
    assert layout.sizes.sum(dim=1).tolist() == [8, 4, 2]


# The adaptive stem ------------------------------------------------------------------------------------------------

ADAPTIVE = {"stem_type": "adaptive", "image_size": 64}


def cells_of(places: torch.Tensor) -> torch.Tensor:
    """(B, gh, gw) -> (B, gh / 2, gw / 2, 4)."""
    batch, rows, columns = places.shape
    return places.reshape(batch, rows // 2, 2, columns // 2, 2).transpose(2, 3).flatten(3)


@torch.no_grad()
def images_of_several_counts(model: PreTrainedModel) -> torch.Tensor:
    """(3, 3, 64, 64) of which every image keeps another number of tokens, none of them all and none of them fewest.

    The gate of random weights takes one side for nearly every cell: its bias is moved to where half are coarse.
    """
    images, stem = pixels(12, 64, 64), trunk_of(model).embeddings.patch_embedding
    logits = stem.gate(stem.coarse(images).permute(0, 2, 3, 1))
    stem.gate[-1].bias[1] -= (logits[..., 1] - logits[..., 0]).median()
    counts = trunk_of(model).get_token_map(images).flatten(1).amax(dim=1) + 1
    chosen = {int(count): row for row, count in enumerate(counts) if 16 < count < 64}
    assert len(chosen) >= 3
    return images[list(chosen.values())[:3]]


@EVERY_HEAD
def test_adaptive_tokens_equal_the_slots_of_training(head, monkeypatch):
    """A coarse token that counts as four, and images padded to the longest, against four equal copies each."""
    model = build(head, **ADAPTIVE)
    images = images_of_several_counts(model)
    packed = read(head, model, pixel_values=images)
    assert trunk_of(model)(images).last_hidden_state.shape[1] < 65
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert trunk_of(model)(images).last_hidden_state.shape[1] == 65
    for found, expected in zip(packed, read(head, model, pixel_values=images)):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-5)  # sums of up to four equal terms, as above


@EVERY_HEAD
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_images_of_several_counts_equal_themselves_alone(head, implementation):
    model = build(head, **ADAPTIVE)
    use_attention(model, implementation)
    images = images_of_several_counts(model)
    together = read(head, model, pixel_values=images)
    for row in range(3):
        for found, expected in zip(together, read(head, model, pixel_values=images[row : row + 1])):
            torch.testing.assert_close(found[row], expected[0], **CLOSE)


@torch.no_grad()
def test_token_map_shows_the_gate():
    model = build("cls", **ADAPTIVE)
    images, stem = images_of_several_counts(model), model.embeddings.patch_embedding
    is_coarse = stem.gate(stem.coarse(images).permute(0, 2, 3, 1)).argmax(-1) == 1  # (B, 4, 4)
    places = model.get_token_map(images)
    for row in range(3):
        for cell, coarse in zip(cells_of(places)[row].flatten(0, 1), is_coarse[row].flatten()):
            assert len(cell.unique()) == (1 if coarse else 4)
        count = 64 - 3 * int(is_coarse[row].sum())
        assert places[row].unique().tolist() == list(range(count))
        # In order: of each token, the first patch row by row.
        first = [int((places[row].flatten() == place).int().argmax()) for place in range(count)]
        assert first == sorted(first)
    tokens_alone = model.embeddings(images[:1])
    assert tokens_alone.states.shape[1] - 1 == 64 - 3 * int(is_coarse[0].sum())
    assert tokens_alone.layout.sizes.sum() == 64


@torch.no_grad()
def test_coarse_token_is_the_cell_at_its_mean_position():
    model = build("cls", **ADAPTIVE)
    stem, images = model.embeddings.patch_embedding, images_of_several_counts(model)
    positions = model.embeddings.position_embedding.weight[1:]
    cell_positions = positions.reshape(4, 2, 4, 2, 32).mean(dim=(1, 3))
    coarse = stem.coarse(images).permute(0, 2, 3, 1) + cell_positions
    fine = stem.fine(images).flatten(2).transpose(1, 2) + positions
    embedded = model.embeddings(images)
    spread_out = token_of_each_patch(embedded.states[:, 1:], embedded.layout)
    sizes = embedded.layout.sizes.gather(1, embedded.layout.token_of_patch)
    assert sorted(sizes.unique().tolist()) == [1, 4]
    expected = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    torch.testing.assert_close(spread_out, torch.where(sizes[..., None] == 4, expected, fine), **CLOSE)


def test_budget_loss_by_hand():
    """In training every loss is the head's and weight * (share that evaluation keeps - budget) ** 2; in evaluation the
    head's alone."""
    fields = {"adaptive_budget": 0.3, "adaptive_budget_weight": 7.0, **ADAPTIVE}
    cases = {
        "classification": {"labels": torch.tensor([0, 1, 1])},
        "contrastive": {"input_ids": tokens()},
        "deconv": {"labels": pixels(3, 64, 64)[:, 0].abs()},
    }
    for head, inputs in cases.items():
        model = build(head, **fields)
        outputs = []
        stem = trunk_of(model).embeddings.patch_embedding
        torch.nn.init.zeros_(stem.gate[-1].bias)  # some cells each way
        stem.register_forward_hook(lambda _, __, output, outputs=outputs: outputs.append(output))
        model.train()
        total = model(pixel_values=pixels(3, 64, 64), **inputs).loss
        in_training = outputs[-1]
        stem.eval()
        is_coarse = coarse_cells(stem, pixels(3, 64, 64))
        stem.train()
        assert 0 < is_coarse.mean() < 1
        by_hand = 7 * (1 - 0.75 * is_coarse.mean() - 0.3) ** 2
        torch.testing.assert_close(in_training.loss, by_hand, **CLOSE)
        # The same choices again, and the head's own loss of what comes out.
        stem.forward = lambda *_, given=in_training: given._replace(loss=None)
        alone = model(pixel_values=pixels(3, 64, 64), **inputs).loss
        torch.testing.assert_close(total, alone + by_hand, **CLOSE)
        del stem.forward
        model.eval()
        in_evaluation = model(pixel_values=pixels(3, 64, 64), **inputs).loss
        stem.budget_weight = 0.0
        assert torch.equal(model(pixel_values=pixels(3, 64, 64), **inputs).loss, in_evaluation)


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.95])
def test_budget_loss_alone_brings_the_share_to_the_budget(budget):
    model = build("cls", adaptive_budget=budget, **ADAPTIVE).train()
    stem, images = model.embeddings.patch_embedding, pixels(8, 64, 64)
    optimizer = torch.optim.AdamW(stem.gate.parameters(), lr=1e-3)
    for _ in range(150):
        optimizer.zero_grad()
        stem(images).loss.backward()
        optimizer.step()
    with torch.no_grad():
        share = 1 - 0.75 * coarse_cells(stem, images).mean().item()
    assert share == pytest.approx(budget, abs=0.03)


@pytest.mark.parametrize("head", ["classification", "contrastive", "deconv"])
def test_adaptive_trains(head):
    model = build(head, **ADAPTIVE).train()
    inputs = {
        "classification": {"labels": torch.tensor([0, 1, 1, 0])},
        "contrastive": {"input_ids": tokens(4)},
        "deconv": {"labels": torch.linspace(1, 9, 64).expand(4, 64, 64)},
    }[head]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(25):
        optimizer.zero_grad()
        loss = model(pixel_values=pixels(4, 64, 64), **inputs).loss
        loss.backward()
        if step == 0:
            assert_gradients(model)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), losses


@torch.no_grad()
def test_adaptive_class_attention_sums_to_what_is_left_of_one():
    model = build("cls", **ADAPTIVE)
    images = images_of_several_counts(model)
    found = model.get_class_attentions(images)
    assert found.shape == (3, 4, 4, 8, 8)
    for layer, weights in enumerate(model(images, output_attentions=True).attentions):
        torch.testing.assert_close(found[:, layer].sum(dim=(2, 3)), 1 - weights[:, :, 0, 0], **CLOSE)
    cells = cells_of(found[:, 0, 0])
    is_coarse = (cells_of(model.get_token_map(images)).diff(dim=-1) == 0).all(-1)
    assert (cells[is_coarse].amax(-1) == cells[is_coarse].amin(-1)).all()


# Images of several sizes -----------------------------------------------------------------------------------------

SIZES = [(32, 32), (48, 16), (16, 64)]  # (height, width) in pixels; multiples of the adaptive stem's cells


def padded(sizes: list[tuple[int, int]], filling: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Images of these sizes in one batch with `filling` right of them and below; the mask; each alone."""
    height, width = (max(sides) for sides in zip(*sizes))
    images = torch.full((len(sizes), 3, height, width), filling)
    mask, alone = torch.zeros(len(sizes), height, width, dtype=torch.bool), []
    for row, (rows, columns) in enumerate(sizes):
        alone.append(pixels(1, rows, columns, seed=10 + row))
        images[row, :, :rows, :columns] = alone[-1][0]
        mask[row, :rows, :columns] = True
    return images, mask, alone


def assert_alone(head: str, model: PreTrainedModel, together: tuple, alone: list[torch.Tensor]) -> None:
    """Each row of a padded batch is what its image gives alone, and zero beyond it."""
    for row, image in enumerate(alone):
        for found, expected in zip(together, read(head, model, pixel_values=image)):
            found, expected = found[row], expected[0]
            if found.shape != expected.shape:
                rows, columns = expected.shape[-2:]
                assert (found[..., rows:, :] == 0).all() and (found[..., columns:] == 0).all()
                found = found[..., :rows, :columns]
            torch.testing.assert_close(found, expected, **CLOSE)


@EVERY_HEAD
@pytest.mark.parametrize("stem_type", STEM_TYPES)
def test_images_of_several_sizes_equal_themselves_alone(stem_type, head):
    if stem_type in GRIDLESS_STEMS and HEADS[head].has_grid:
        pytest.skip("no grid")
    model = build(head, stem_type=stem_type, **NEEDED.get(stem_type, {}))
    images, mask, alone = padded(SIZES, filling=1e3)
    together = read(head, model, pixel_values=images, pixel_mask=mask)
    assert_alone(head, model, together, alone)
    unreadable = padded(SIZES, filling=float("nan"))[0]
    again = read(head, model, pixel_values=unreadable, pixel_mask=mask.long())
    assert all(torch.equal(one, other) for one, other in zip(together, again))


@pytest.mark.parametrize(
    "fields",
    [
        {"position_embedding_type": "polynomial"},
        {"position_embedding_type": "sinusoidal", "use_cls_token": False},
        {"num_register_tokens": 2},
        {"norm_position": "post", "use_pre_layernorm": False, "final_norm_type": "none"},
        {"patch_size": (8, 4)},
        {"stem_type": "overlap", "patch_size": 4, "patch_kernel_size": 7},
        {"stem_type": "conv", "pad_to_patch": True},
        {"stem_type": "adaptive", "pad_to_patch": True},
        {"stem_type": "adaptive", "num_register_tokens": 2},
    ],
    ids=lambda fields: " ".join(map(str, fields.values())),
)
@pytest.mark.parametrize("head", ["mean", "map", "contrastive", "backbone", "deconv", "dpt"])
def test_options_of_images_of_several_sizes(head, fields):
    fields = dict(fields)
    if not fields.get("use_cls_token", True) and "pooling_type" not in HEADS[head].fields:
        fields["pooling_type"] = "mean"
    model = build(head, **fields)
    sizes = [(30, 33), (41, 16), (11, 64), (30, 33)] if "pad_to_patch" in fields else [*SIZES, SIZES[0]]
    images, mask, alone = padded(sizes, filling=1e3)
    for implementation in ("sdpa", "eager"):
        use_attention(model, implementation)
        assert_alone(head, model, read(head, model, pixel_values=images, pixel_mask=mask), alone)


@torch.no_grad()
def test_token_map_of_several_sizes():
    model = build("cls")
    images, mask, _ = padded(SIZES)
    places = model.get_token_map(images, pixel_mask=mask)
    assert places.shape == (3, 6, 8)
    for row, (height, width) in enumerate(SIZES):
        rows, columns = height // 8, width // 8
        assert torch.equal(places[row, :rows, :columns].flatten(), torch.arange(rows * columns))
        assert (places[row] >= 0).sum() == rows * columns


@torch.no_grad()
def test_a_mask_of_ones_changes_nothing():
    model = build("classification")
    expected = model(pixels()).logits
    torch.testing.assert_close(model(pixels(), pixel_mask=torch.ones(3, 32, 32)).logits, expected, **CLOSE)


def test_depth_of_several_sizes_learns_from_the_images_alone():
    """Whatever the labels say of the padding: the loss is that of the valid pixels."""
    model = build("deconv", depth_loss="l1")
    images, mask, alone = padded(SIZES)
    labels = pixels(3, 48, 64, seed=4)[:, 0].abs() + 0.1
    output = model(images, pixel_mask=mask, labels=labels)
    errors = (output.predicted_depth - labels).abs()
    expected = sum(error[seen].mean() for error, seen in zip(errors, mask)) / 3
    torch.testing.assert_close(output.loss, expected, **CLOSE)
    with pytest.raises(
        ValueError, match=r"labels of a batch with pixel_mask must have its height and width \(48, 64\)"
    ):
        model(images, pixel_mask=mask, labels=labels[:, :32])


def edited(index: tuple, value: bool) -> torch.Tensor:
    mask = torch.zeros(2, 32, 48, dtype=torch.bool)
    mask[0], mask[1, :16, :24] = True, True
    mask[index] = value
    return mask


WRONG_MASKS = {
    "a hole": (edited((1, 3, 4), False), "rectangle in the top left corner.*image 1 is not"),
    "a speck": (edited((1, 20, 30), True), "rectangle in the top left corner.*image 1 is not"),
    "padding on the left": (edited((0, slice(None), slice(8)), False), "top left corner.*image 0 is not"),
    "padding on top": (edited((0, slice(8)), False), "top left corner.*image 0 is not"),
    "an L": (edited((1, slice(24), slice(8)), True), "rectangle.*image 1 is not"),
    "nothing": (edited((1,), False), r"multiples of patch_size \(8, 8\), got \(0, 0\)"),
    "half a patch": (edited((1, slice(16), slice(28)), True), r"multiples of patch_size \(8, 8\), got \(16, 28\)"),
    "one image less": (edited((0,), True)[:1], r"pixel_mask must be .* \(2, 32, 48\), got \(1, 32, 48\)"),
    "a channel": (edited((0,), True)[:, None], r"\(2, 32, 48\), got \(2, 1, 32, 48\)"),
    "patches": (torch.ones(2, 4, 6), r"\(2, 32, 48\), got \(2, 4, 6\)"),
}


@pytest.mark.parametrize("name", WRONG_MASKS)
@pytest.mark.parametrize("head", ["classification", "contrastive", "deconv", "backbone"])
def test_wrong_masks_are_refused(head, name):
    mask, message = WRONG_MASKS[name]
    with pytest.raises(ValueError, match=message):
        read(head, build(head), pixel_values=pixels(2, 32, 48), pixel_mask=mask)


def test_more_wrong_masks():
    with pytest.raises(ValueError, match="pixel_mask.*patch_embeds have no pixels"):
        build("cls")(patch_embeds=torch.randn(2, 32, 4, 6), pixel_mask=torch.ones(2, 32, 48))
    mask = edited((1, slice(16), slice(28)), True)
    mask[1, :16, 24:] = False  # 16 x 24: whole patches, but half a cell
    with pytest.raises(ValueError, match=r"multiples of twice patch_size \(16, 16\), got \(16, 24\)"):
        build("cls", stem_type="adaptive")(pixels(2, 32, 48), pixel_mask=mask)
    with pytest.raises(ValueError, match=r"got \(0, 0\)"):
        build("cls", pad_to_patch=True)(pixels(2, 32, 48), pixel_mask=edited((1,), False))


@pytest.mark.parametrize("stem_type", STEM_TYPES)
def test_a_padded_batch_trains(stem_type):
    model = build("classification", stem_type=stem_type, pooling_type="map", **NEEDED.get(stem_type, {})).train()
    images, mask, _ = padded(SIZES * 2, filling=float("nan"))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(10):
        optimizer.zero_grad()
        loss = model(images, pixel_mask=mask, labels=torch.tensor([0, 1, 1] * 2)).loss
        loss.backward()
        if step == 0:
            assert_gradients(model)
        optimizer.step()
        losses.append(loss.item())
    assert all(map(torch.isfinite, torch.tensor(losses))) and losses[-1] < losses[0], losses


@pytest.mark.parametrize("stem_type", ["conv", "hierarchical", "adaptive"])
def test_photos_of_two_shapes_through_a_stock_processor(stem_type):
    """ViLT's processor keeps the shape of a photo, pads the batch and says where."""
    processor = ViltImageProcessor(size={"shortest_edge": 64}, size_divisor=16)
    photos = [pictures.photo(name) for name in ("astronaut", "rocket")]
    model = build("contrastive", stem_type=stem_type)
    batch = processor(photos, return_tensors="pt")
    shapes = {tuple(processor([photo], return_tensors="pt")["pixel_values"].shape) for photo in photos}
    assert len(shapes) == 2 and not batch["pixel_mask"].bool().all()
    (found,) = read("contrastive", model, **batch)
    for row, photo in enumerate(photos):
        alone = processor([photo], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(found[row], read("contrastive", model, pixel_values=alone)[0][0], **CLOSE)


def test_dual_encoder_takes_a_mask_beside_texts():
    """`pixel_mask` reaches the image tower through `forward`, not only through `get_image_features`."""
    model = randomised(VitEmbedForContrastive(dual_config()))
    images, mask, alone = padded(SIZES)
    with torch.no_grad():
        output = model(images, tokens(), pixel_mask=mask)
        for row in range(3):
            torch.testing.assert_close(output.image_embeds[row], model.get_image_features(alone[row], True)[0], **CLOSE)
