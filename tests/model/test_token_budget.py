"""Fewer tokens, and images of several sizes: merging, dropping, the adaptive stem, padding with `pixel_mask`."""

import pytest
import torch
from stem_family import FAMILY, READINGS, assert_every_weight_learns, read
from stem_family import build_reading as build
from tiny import CLOSE, pixels, tokens, use_attention, vision_config
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vit_embed import VitEmbedConfig, VitEmbedModel
from vit_embed.options_vit_embed import STEM_TYPES
from vit_embed.stems_vit_embed import AdaptiveStem
from vit_embed.tokens_vit_embed import TokenLayout, match_tokens, merge_tokens, token_of_each_patch

EVERY_HEAD = pytest.mark.parametrize("head", READINGS)


# --- merging ---


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
@pytest.mark.parametrize(("count", "merge_size"), [(16, 1), (16, 8), (9, 3), (2, 1), (3, 1)])
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


@torch.no_grad()
def test_keys_are_averaged_over_heads():
    """The layer compares by the mean of the heads' keys, not by their concatenation."""
    model = build("cls", token_merge_size=3, num_register_tokens=2)
    layer, states = model.encoder.layers[0], torch.randn(2, 19, 32)
    out, _, layout = layer(states, layout=TokenLayout((4, 4)), merge_size=3)
    keys = layer.self_attn.k_proj(layer.layer_norm1(states)).unflatten(-1, (4, 8)).mean(dim=2)[:, 3:]
    assert out.shape == (2, 16, 32)
    assert torch.equal(layout.token_of_patch, match_tokens(keys, 3).place)


@torch.no_grad()
def test_training_merges_nothing():
    merging, plain = build("cls", token_merge_size=3), build("cls")
    expected = plain.train()(pixels()).last_hidden_state
    assert torch.equal(merging.train()(pixels()).last_hidden_state, expected)
    assert merging.eval()(pixels()).last_hidden_state.shape[1] == 17 - 4 * 3


NO_CLS = {"use_cls_token": False, "pooling_type": "mean"}
LEARNED = {"stem_type": "token_learner", "num_learned_tokens": 6}


@pytest.mark.parametrize(
    ("fields", "shape", "left"),
    [
        ({"token_merge_size": 3, "num_register_tokens": 2}, (32, 32), [16, 13, 10, 7, 4]),
        ({"token_merge_size": 3, **NO_CLS}, (32, 32), [16, 13, 10, 7, 4]),
        ({"token_merge_size": 1, **LEARNED}, (32, 32), [6, 5, 4, 3, 2]),
        # Half of what is left, down to one.
        ({"token_merge_size": 8, "num_hidden_layers": 5}, (32, 32), [16, 8, 4, 2, 1, 1]),
        ({"token_merge_size": 8}, (8, 24), [3, 2, 1, 1, 1]),
        ({"token_merge_size": 8}, (8, 8), [1, 1, 1, 1, 1]),
    ],
)
@torch.no_grad()
def test_each_layer_has_so_many_fewer_tokens(fields, shape, left):
    model = build("cls", **fields)
    num_prefix, stages = model.config.num_prefix_tokens, range(model.config.num_hidden_layers + 1)
    output = model(pixels(3, *shape), output_attentions=True, output_hidden_states=True, stages=stages)
    assert [weights.shape[-1] - num_prefix for weights in output.attentions] == left[:-1]
    assert [states.shape[1] - num_prefix for states in output.hidden_states] == left
    assert model(pixels(3, *shape)).pooler_output.isfinite().all()
    layouts = [each.layout for each in output.stages if each.layout.sizes is not None]
    assert len(layouts) == (0 if shape == (8, 8) else len(left) - 1)
    assert all((layout.sizes.sum(dim=1) == left[0]).all() for layout in layouts)
    for layout, count in zip(layouts, left[1:]):
        if layout.token_of_patch is not None:
            counts = nn.functional.one_hot(layout.token_of_patch, count).sum(dim=1).float()
            assert torch.equal(layout.sizes, counts)
    if "stem_type" not in fields and layouts:
        assert torch.equal(model.get_token_map(pixels(3, *shape)).flatten(1), layouts[-1].token_of_patch)


def twins() -> torch.Tensor:
    """(2, 3, 32, 64): four kinds of patches, columns in pairs of one kind, so that every token has equal ones."""
    kinds = torch.randn(2, 3, 8, 4, 8, generator=torch.Generator().manual_seed(5))
    return kinds.repeat_interleave(2, dim=3).flatten(3).repeat(1, 1, 4, 1)


@pytest.mark.parametrize(
    ("head", "implementation", "fields"),
    [
        *((head, "sdpa", {}) for head in READINGS),
        ("depth-dpt", "eager", {}),
        pytest.param("cls", "flex_attention", {"num_hidden_layers": 2}, marks=pytest.mark.heavy),
        ("depth-dpt", "sdpa", {"norm_position": "post", "use_pre_layernorm": False}),
        ("depth-dpt", "sdpa", {"norm_type": "rms_norm"}),
        ("depth-dpt", "sdpa", {"layer_scale_init_value": 0.1, "num_register_tokens": 2}),
    ],
)
def test_merging_equal_tokens_changes_nothing(head, implementation, fields):
    """What proportional attention is for, and the reason why sizes follow the tokens everywhere."""
    fields = {"position_embedding_type": "none", **fields}
    plain, merging = build(head, **fields), build(head, token_merge_size=3, **fields)
    use_attention(merging, implementation)
    images = twins()
    for row in merging.trunk.get_token_map(images):  # (4, 8)
        assert len(row.unique()) == 32 - 3 * merging.config.num_hidden_layers
        kinds = torch.arange(8).div(2, rounding_mode="floor").expand(4, 8)
        assert all(len(kinds[row == place].unique()) == 1 for place in row.unique()), "else it is another property"
    for found, expected in zip(read(head, merging, pixel_values=images), read(head, plain, pixel_values=images)):
        assert expected.abs().max() > 1e-2
        # Up to 32 equal terms are added one by one or as one term times their number; flex attention sums in blocks.
        rtol, atol = (1e-4, 1e-4) if implementation == "flex_attention" else (2e-5, 1e-5)
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@torch.no_grad()
def test_what_may_merge_is_held_against_the_size_asked_for(tmp_path):
    VitEmbedModel(vision_config()).save_pretrained(tmp_path)
    larger = VitEmbedModel.from_pretrained(tmp_path, image_size=64, token_merge_size=16).eval()
    assert larger(pixels(1, 64, 64)).last_hidden_state.shape[1] == 1 + 64 - 16 - 16 - 16 - 8  # half of 16 in the last
    config = VitEmbedConfig.from_pretrained(tmp_path, image_size=64, token_merge_size=16)
    assert VitEmbedModel.from_pretrained(tmp_path, config=config).config.token_merge_size == 16
    with pytest.raises(ValueError, match="token_merge_size must be at most half of the 64 patch tokens, got 33"):
        VitEmbedModel.from_pretrained(tmp_path, image_size=64, token_merge_size=33)


@pytest.mark.parametrize(("fields", "calls"), [({"token_merge_size": 3}, 1), ({"stem_type": "adaptive"}, 0), ({}, 4)])
def test_flash_attention_gets_no_mask(monkeypatch, fields, calls):
    """Flash attention takes no mask to add to the scores; where there is one, sdpa computes."""
    seen = []

    def flash(module, query, key, value, attention_mask, **kwargs):
        assert attention_mask is None
        seen.append(query.shape)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    model = build("classification", **fields)
    (expected,) = read("classification", model, pixel_values=pixels())
    model.config._attn_implementation = "flash_attention_2"
    (found,) = read("classification", model, pixel_values=pixels())
    torch.testing.assert_close(found, expected, **CLOSE)
    assert len(seen) == calls


# --- dropping ---


@pytest.mark.parametrize(("rate", "left"), [(0.3, 12), (0.75, 4), (0.99, 1), (0.05, 16)])
@torch.no_grad()
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


@torch.no_grad()
def test_dropping_is_drawn_for_each_image_and_step():
    model = build("cls", patch_drop_rate=0.5).train()
    draws = torch.stack([model.embeddings(pixels(64)).layout.token_of_patch >= 0 for _ in range(4)]).flatten(0, 1)
    assert len(draws.unique(dim=0)) > 250  # of 256 draws among 12,870 halves
    # Each patch is kept in half of the draws: 128, standard deviation 8, five of them.
    assert (draws.sum(dim=0) - 128).abs().max() < 40


@pytest.mark.parametrize("head", ["backbone", "patch features"])
def test_dropping_leaves_maps_to_evaluation(head):
    model = build(head, patch_drop_rate=0.5)
    assert read(head, model, pixel_values=pixels())[0].shape[-2:] == (4, 4)
    with pytest.raises(ValueError, match="patch_drop_rate=0.5 leaves holes in the grid in training"):
        read(head, model.train(), pixel_values=pixels())


# --- the adaptive stem ---

ADAPTIVE = {"stem_type": "adaptive", "image_size": 64}


def coarse_cells(stem: AdaptiveStem, images: torch.Tensor) -> torch.Tensor:
    """(B, gh / 2, gw / 2), 1 for the cells that the gate gives one token."""
    return stem.gate(stem.coarse(images).permute(0, 2, 3, 1)).argmax(-1).float()


def cells_of(places: torch.Tensor) -> torch.Tensor:
    """(B, gh, gw) -> (B, gh / 2, gw / 2, 4)."""
    batch, rows, columns = places.shape
    return places.reshape(batch, rows // 2, 2, columns // 2, 2).transpose(2, 3).flatten(3)


@torch.no_grad()
def images_of_several_counts(model: PreTrainedModel) -> torch.Tensor:
    """(3, 3, 64, 64) of which every image keeps another number of tokens, none of them all and none of them fewest.

    The gate of random weights takes one side for nearly every cell: its bias is moved to where half are coarse.
    """
    images, stem = pixels(12, 64, 64), model.trunk.embeddings.patch_embedding
    logits = stem.gate(stem.coarse(images).permute(0, 2, 3, 1))
    stem.gate[-1].bias[1] -= (logits[..., 1] - logits[..., 0]).median()
    counts = model.trunk.get_token_map(images).flatten(1).amax(dim=1) + 1
    chosen = {int(count): row for row, count in enumerate(counts) if 16 < count < 64}
    assert len(chosen) >= 3
    return images[list(chosen.values())[:3]]


@EVERY_HEAD
def test_adaptive_tokens_equal_the_slots_of_training(head, monkeypatch):
    """A coarse token that counts as four, and images padded to the longest, against four equal copies each."""
    model = build(head, **ADAPTIVE)
    images = images_of_several_counts(model)
    packed = read(head, model, pixel_values=images)
    assert model.trunk(images).last_hidden_state.shape[1] < 65
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert model.trunk(images).last_hidden_state.shape[1] == 65
    for found, expected in zip(packed, read(head, model, pixel_values=images)):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-5)  # sums of up to four equal terms, as above


@torch.no_grad()
def test_token_map_shows_the_gate():
    model = build("cls", **ADAPTIVE)
    images = images_of_several_counts(model)
    is_coarse = coarse_cells(model.embeddings.patch_embedding, images)  # (B, 4, 4)
    places, layout = model.get_token_map(images), model.embeddings(images).layout
    for row in range(3):
        for cell, coarse in zip(cells_of(places)[row].flatten(0, 1), is_coarse[row].flatten()):
            assert len(cell.unique()) == (1 if coarse else 4)
        count = 64 - 3 * int(is_coarse[row].sum())
        assert places[row].unique().tolist() == list(range(count)) and (layout.sizes[row] > 0).sum() == count
        # In order: of each token, the first patch row by row.
        first = [int((places[row].flatten() == place).int().argmax()) for place in range(count)]
        assert first == sorted(first)
    assert (layout.sizes.sum(dim=1) == 64).all(), "every patch is counted once"
    assert model.train()(images).last_hidden_state.shape[1] == 65, "in training all slots stay"


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


@pytest.mark.parametrize("head", ["classification", "contrastive", "depth-deconv"])
def test_budget_loss_by_hand(head):
    """In training every loss is the head's and weight * (share that evaluation keeps - budget) ** 2; in evaluation the
    head's alone."""
    labels = {
        "classification": {"labels": torch.tensor([0, 1, 1])},
        "contrastive": {"input_ids": tokens()},
        "depth-deconv": {"labels": pixels(3, 64, 64)[:, 0].abs()},
    }
    inputs = {"pixel_values": pixels(3, 64, 64), **labels[head]}
    model, outputs = build(head, adaptive_budget=0.3, adaptive_budget_weight=7.0, **ADAPTIVE).train(), []
    stem = model.trunk.embeddings.patch_embedding
    stem.register_forward_hook(lambda _, __, output: outputs.append(output))
    total = model(**inputs).loss
    share = 1 - 0.75 * coarse_cells(stem, inputs["pixel_values"]).mean()
    assert 0.25 < share < 1
    by_hand = 7 * (share - 0.3) ** 2
    torch.testing.assert_close(outputs[0].loss, by_hand, **CLOSE)
    # The same choices again, and the head's own loss of what comes out.
    stem.forward = lambda *_: outputs[0]._replace(loss=None)
    torch.testing.assert_close(total, model(**inputs).loss + by_hand, **CLOSE)
    del stem.forward
    in_evaluation = model.eval()(**inputs).loss
    stem.budget_weight = 0.0
    assert torch.equal(model(**inputs).loss, in_evaluation)


@pytest.mark.parametrize("budget", [0.3, 0.95])
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


# --- images of several sizes ---

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


@pytest.mark.parametrize(
    ("head", "stem"),
    [
        *((head, "conv") for head in READINGS),
        *(("map", stem) for stem in STEM_TYPES if stem != "conv"),
        *((head, "adaptive") for head in ("mean", "contrastive", "backbone", "depth-dpt", "class attentions")),
    ],
)
def test_images_of_several_sizes_equal_themselves_alone(head, stem):
    model = build(head, **FAMILY[stem])
    images, mask, alone = padded(SIZES, filling=1e3)
    together = read(head, model, pixel_values=images, pixel_mask=mask)
    assert_alone(head, model, together, alone)
    if stem == "adaptive":  # else it is another property
        assert {1, 4} <= set(model.trunk.embeddings(images, pixel_mask=mask).layout.sizes.flatten().tolist())
    unreadable = padded(SIZES, filling=float("nan"))[0]
    again = read(head, model, pixel_values=unreadable, pixel_mask=mask.long())
    assert all(torch.equal(one, other) for one, other in zip(together, again))


@pytest.mark.parametrize(
    ("head", "fields"),
    [
        ("backbone", {"position_embedding_type": "polynomial"}),
        ("backbone", {"position_embedding_type": "sinusoidal", "use_cls_token": False, "pooling_type": "mean"}),
        ("contrastive", {"num_register_tokens": 2}),
        ("backbone", {"num_register_tokens": 2}),
        ("mean", {"norm_position": "post", "use_pre_layernorm": False, "final_norm_type": "none"}),
        ("depth-dpt", {"patch_size": (8, 4)}),
        ("depth-dpt", {"stem_type": "overlap", "patch_size": 4, "patch_kernel_size": 7}),
        ("map", {"stem_type": "adaptive", "num_register_tokens": 2}),
        *((head, {"pad_to_patch": True}) for head in ("map", "backbone", "depth-deconv", "depth-dpt")),
        *((head, {"stem_type": "adaptive", "pad_to_patch": True}) for head in ("mean", "depth-deconv")),
    ],
)
def test_options_of_images_of_several_sizes(head, fields):
    model = build(head, **fields)
    sizes = [(30, 33), (41, 16), (11, 64), (30, 33)] if "pad_to_patch" in fields else [*SIZES, SIZES[0]]
    images, mask, alone = padded(sizes, filling=1e3)
    for implementation in ("sdpa", "eager"):
        use_attention(model, implementation)
        assert_alone(head, model, read(head, model, pixel_values=images, pixel_mask=mask), alone)


@torch.no_grad()
def test_token_map_of_several_sizes():
    images, mask, _ = padded(SIZES)
    places = build("cls").get_token_map(images, pixel_mask=mask)
    assert places.shape == (3, 6, 8)
    for row, (height, width) in enumerate(SIZES):
        rows, columns = height // 8, width // 8
        assert torch.equal(places[row, :rows, :columns].flatten(), torch.arange(rows * columns))
        assert (places[row] >= 0).sum() == rows * columns


def test_depth_of_several_sizes_learns_from_the_images_alone():
    """Whatever the labels say of the padding: the loss is that of the valid pixels."""
    model = build("depth-deconv", depth_loss="l1")
    images, mask, _ = padded(SIZES)
    labels = pixels(3, 48, 64, seed=4)[:, 0].abs() + 0.1
    output = model(images, pixel_mask=mask, labels=labels)
    errors = (output.predicted_depth - labels).abs()
    expected = sum(error[seen].mean() for error, seen in zip(errors, mask)) / 3
    torch.testing.assert_close(output.loss, expected, **CLOSE)
    with pytest.raises(ValueError, match=r"labels of a batch with pixel_mask must have its .* \(48, 64\)"):
        model(images, pixel_mask=mask, labels=labels[:, :32])


def test_budget_loss_of_several_sizes_is_the_mean_over_them():
    model = build("cls", stem_type="adaptive").train()
    images, mask, alone = padded(SIZES)
    expected = sum(model(image).stem_loss for image in alone) / 3
    assert expected > 1e-3
    torch.testing.assert_close(model(images, pixel_mask=mask).stem_loss, expected, **CLOSE)


def edited(index: tuple, value: bool) -> torch.Tensor:
    mask = torch.zeros(2, 32, 48, dtype=torch.bool)
    mask[0], mask[1, :16, :24] = True, True
    mask[index] = value
    return mask


HALF_A_CELL = edited((1, slice(16), slice(16, 24)), False)
HALF_A_CELL[1, :24, :16] = True  # 24 x 16
WRONG_MASKS = {
    "a hole": ({}, edited((1, 3, 4), False), "rectangle in the top left corner.*image 1 is not"),
    "a speck": ({}, edited((1, 20, 30), True), "rectangle in the top left corner.*image 1 is not"),
    "padding on the left": ({}, edited((0, slice(None), slice(8)), False), "top left corner.*image 0 is not"),
    "padding on top": ({}, edited((0, slice(8)), False), "top left corner.*image 0 is not"),
    "an L": ({}, edited((1, slice(24), slice(8)), True), "rectangle.*image 1 is not"),
    "nothing": ({}, edited((1,), False), r"multiples of patch_size \(8, 8\), got \(0, 0\)"),
    "nothing, padded": ({"pad_to_patch": True}, edited((1,), False), r"got \(0, 0\)"),
    "half a patch": ({}, edited((1, slice(16), slice(28)), True), r"multiples of patch_size \(8, 8\), got \(16, 28\)"),
    "half a cell": (
        {"stem_type": "adaptive"},
        HALF_A_CELL,
        r"multiples of twice patch_size \(16, 16\), got \(24, 16\)",
    ),
    "one image less": ({}, edited((0,), True)[:1], r"pixel_mask must be .* \(2, 32, 48\), got \(1, 32, 48\)"),
    "a channel": ({}, edited((0,), True)[:, None], r"\(2, 32, 48\), got \(2, 1, 32, 48\)"),
    "patches": ({}, torch.ones(2, 4, 6), r"\(2, 32, 48\), got \(2, 4, 6\)"),
}


@pytest.mark.parametrize("name", WRONG_MASKS)
def test_wrong_masks_are_refused(name):
    fields, mask, message = WRONG_MASKS[name]
    with pytest.raises(ValueError, match=message):
        build("classification", **fields)(pixels(2, 32, 48), pixel_mask=mask)


def test_dropping_leaves_each_image_of_a_padded_batch_its_share():
    model = build("mean", patch_drop_rate=0.5).train()
    images, mask, _ = padded([(32, 32), (16, 32), (8, 24)])
    layout = model.embeddings(images, pixel_mask=mask).layout
    assert [int((row >= 0).sum()) for row in layout.token_of_patch] == [8, 4, 2]
    assert layout.sizes.sum(dim=1).tolist() == [8, 4, 2]


def test_merging_leaves_padded_batches_to_training():
    model = build("classification", token_merge_size=2).train()
    images, mask, _ = padded(SIZES)
    assert model(images, pixel_mask=mask).logits.isfinite().all()


@pytest.mark.parametrize("stem", STEM_TYPES)
def test_a_padded_batch_trains_every_weight(stem):
    model = build("classification", pooling_type="map", **FAMILY[stem]).train()
    images, mask, _ = padded(SIZES * 2, filling=float("nan"))
    model(images, pixel_mask=mask, labels=torch.tensor([0, 1, 1] * 2)).loss.backward()
    assert_every_weight_learns(model)
