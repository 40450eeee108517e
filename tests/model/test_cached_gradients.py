"""`contrastive_chunk_size`: the loss and gradients of the whole batch, in the memory of a chunk."""

import copy
import math
from collections.abc import Callable

import pytest
import stem_family
import tiny
import torch
from tiny import assert_same_gradients

from vit_embed import VitEmbedForContrastive
from vit_embed.contrastive_vit_embed import CONTRASTIVE_LOSSES, PairRows, contrastive_logits

BATCH, CHUNK = 7, 3
CHUNKS = (3, 2, 2)  # of 7 rows, as even as can be
DROPPING = {"hidden_dropout_prob": 0.2, "attention_dropout": 0.2, "drop_path_rate": 0.5, "patch_drop_rate": 0.5}


def inputs(batch: int = BATCH, **others: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"pixel_values": tiny.pixels(batch), "input_ids": tiny.tokens(batch), **others}


def make_model(chunk: int | None, **fields) -> VitEmbedForContrastive:
    config = tiny.dual_config(**fields)
    config.contrastive_chunk_size = chunk
    return tiny.randomised(VitEmbedForContrastive(config)).train()


def step(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], loss: Callable | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients by name, from one state of the random numbers."""
    torch.manual_seed(5)
    model.zero_grad()
    value = model(**batch).loss if loss is None else loss(model, **batch)
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(found: tuple, expected: tuple) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)  # float32, sums in another order
    assert_same_gradients(found[1], expected[1])


def batches_seen(tower: torch.nn.Module) -> list[int]:
    """Fills up with the number of rows of each pass through a tower's first layer."""
    seen = []
    tower.encoder.layers[0].self_attn.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


def by_hand(model: VitEmbedForContrastive, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """The loss of embeddings that were made chunk by chunk and all kept: what differs between a chunk and a batch, as
    dropout does, is that of the chunk, and nothing is computed twice."""
    images = [model.get_image_features(part, normalize=True) for part in pixel_values.split(CHUNKS)]
    texts = [model.get_text_features(part, normalize=True) for part in input_ids.split(CHUNKS)]
    logits = contrastive_logits(torch.cat(images), torch.cat(texts), model.logit_scale, model.logit_bias)
    return CONTRASTIVE_LOSSES[model.config.contrastive_loss](PairRows.whole(logits)) / len(logits)


SETTINGS = {
    "softmax": {},
    "sigmoid": {"contrastive_loss": "sigmoid"},
    "hard negatives": {"hard_negative_beta": 0.5},
    "siglip": tiny.SIGLIP,
    # Heads see tokens of other stems alike, and batch norm sees a chunk where it would see the batch.
    **{stem: stem_family.FAMILY[stem] for stem in ("token_learner", "hybrid, ConvNext from a dict")},
    "adaptive": {"stem_type": "adaptive", "adaptive_budget_weight": 0.0},
}


@pytest.mark.parametrize(
    ("name", "chunk"), [("softmax", 1), ("softmax", BATCH - 1), *((name, CHUNK) for name in SETTINGS)]
)
def test_loss_and_gradients_are_those_of_the_whole_batch(name, chunk):
    settings = SETTINGS[name]
    batch = inputs(group_ids=torch.tensor([0, 1, 0, 2, 3, 3, 0]))
    whole, cached = make_model(None, **settings), make_model(chunk, **settings)
    seen = [batches_seen(tower) for tower in (cached.vision_model, cached.text_model)]
    assert_same_step(step(cached, batch), step(whole, batch))
    for sizes in seen:  # once for the loss, once more for the gradients, never more than a chunk
        assert len(sizes) == 2 * math.ceil(BATCH / chunk) and sum(sizes) == 2 * BATCH and max(sizes) <= chunk
        assert max(sizes) - min(sizes) <= 1


def test_reentrant_checkpointing_inside_a_chunk_changes_no_gradient():
    whole, cached = make_model(None), make_model(CHUNK)
    seen = batches_seen(cached.vision_model)
    cached.gradient_checkpointing_enable({"use_reentrant": True})
    cached.enable_input_require_grads()
    assert_same_step(step(cached, inputs()), step(whole, inputs()))
    assert len(seen) == 3 * len(CHUNKS)  # and once more in each layer's own checkpoint


@pytest.mark.parametrize("stem", ["hybrid", "hierarchical, batch norm"])
def test_batch_norm_measures_chunks_and_counts_each_once(stem):
    cached, kept = make_model(CHUNK, **stem_family.FAMILY[stem]), make_model(None, **stem_family.FAMILY[stem])
    start = {name: buffer.clone() for name, buffer in cached.named_buffers()}
    assert_same_step(step(cached, inputs()), step(kept, inputs(), by_hand))
    expected = dict(kept.named_buffers())
    assert len(start) >= 9
    for name, buffer in cached.named_buffers():
        assert torch.equal(buffer, expected[name]) and not torch.equal(buffer, start[name]), name
        assert not name.endswith("num_batches_tracked") or buffer == len(CHUNKS)


def test_an_adaptive_stem_adds_the_mean_of_its_chunks_budget_losses():
    fields = {"stem_type": "adaptive", "adaptive_budget": 0.3, "adaptive_budget_weight": 50.0}
    cached = make_model(CHUNK, **fields)
    torch.nn.init.zeros_(cached.vision_model.embeddings.patch_embedding.gate[-1].bias)
    alone = make_model_like(cached, contrastive_chunk_size=None)
    budgets = [alone.vision_model(part).stem_loss * len(part) / BATCH for part in tiny.pixels(BATCH).split(CHUNKS)]
    assert sum(budgets) > 0.1
    bare, _ = step(make_model_like(cached, adaptive_budget_weight=0.0), inputs())
    torch.testing.assert_close(step(cached, inputs())[0], bare + sum(budgets).detach(), **tiny.CLOSE)


def make_model_like(model: VitEmbedForContrastive, **fields) -> VitEmbedForContrastive:
    config = copy.deepcopy(model.config)
    config.update(fields)
    other = VitEmbedForContrastive(config).train()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize(("name", "checkpointing"), [*((name, False) for name in DROPPING), ("drop_path_rate", True)])
def test_what_is_dropped_is_dropped_alike_when_a_chunk_is_embedded_again(name, checkpointing):
    text = {**tiny.TEXT, "attention_dropout": 0.2}
    fields = {name: DROPPING[name], "text_config": text, "pooling_type": "mean"}
    cached, kept = make_model(CHUNK, **fields), make_model(None, **fields)
    if checkpointing:
        cached.gradient_checkpointing_enable()
    expected = step(kept, inputs(), by_hand)
    assert_same_step(step(cached, inputs()), expected)
    after = torch.rand(3)
    step(kept, inputs(), by_hand)
    assert torch.equal(after, torch.rand(3)), "random numbers go on behind the batch as they would have"
    assert abs(float(kept(**inputs()).loss.detach() - expected[0])) > 1e-4, "it does drop"


EVERY_SECOND_16_X_24 = torch.ones(BATCH, 32, 32, dtype=torch.long)
EVERY_SECOND_16_X_24[::2, 16:] = EVERY_SECOND_16_X_24[::2, :, 24:] = 0


@pytest.mark.parametrize(
    "others",
    [
        {"pixel_values": None, "patch_embeds": torch.randn(BATCH, 32, 4, 4)},
        {"pixel_mask": EVERY_SECOND_16_X_24, "attention_mask": torch.ones(BATCH, 16, dtype=torch.long)},
    ],
    ids=lambda others: ", ".join(others),
)
def test_every_kind_of_input_is_cut_into_chunks(others):
    assert_same_step(step(make_model(CHUNK), inputs(**others)), step(make_model(None), inputs(**others)))


def test_texts_are_cut_to_the_longest_of_their_chunk():
    model, lengths = make_model(CHUNK), []
    ids = torch.full((BATCH, 16), tiny.EOS)
    ids[:, 0], ids[:3, 1:4], ids[3:5, 1:11], ids[5:, 1:2] = tiny.TEXT["bos_token_id"], 5, 6, 7
    layer = model.text_model.encoder.layers[0].self_attn
    layer.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    batch = inputs(input_ids=ids)
    assert_same_step(step(model, batch), step(make_model(None), batch))
    assert lengths[:3] == [5, 12, 3] and sorted(lengths[3:]) == [3, 5, 12]


@pytest.mark.parametrize(
    ("tower", "projection"), [("vision_model", "visual_projection"), ("text_model", "text_projection")]
)
def test_a_frozen_tower_is_not_embedded_again(tower, projection):
    models = [make_model(CHUNK), make_model(None)]
    for model in models:
        for name in (tower, projection):
            model.get_submodule(name).requires_grad_(False)
    seen = batches_seen(models[0].get_submodule(tower))
    assert_same_step(*(step(model, inputs()) for model in models))
    assert len(seen) == len(CHUNKS)


def test_a_weight_in_a_frozen_model_learns_in_chunks():
    """As adapters do."""
    models = [make_model(CHUNK), make_model(None)]
    for model in models:
        model.requires_grad_(False)
        model.vision_model.encoder.layers[0].self_attn.q_proj.requires_grad_(True)
    assert_same_step(*(step(model, inputs()) for model in models))


def test_bfloat16_autocast_stays_in_force_in_the_second_pass():
    model, kinds = make_model(CHUNK), set()
    with torch.no_grad():
        model.logit_scale.fill_(9.0)  # beyond the bound
    layer = model.vision_model.encoder.layers[0].mlp.fc1
    layer.register_forward_hook(lambda module, args, output: kinds.add((output.dtype, torch.is_grad_enabled())))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**inputs())
        expected = make_model_like(model, contrastive_chunk_size=None)(**inputs()).loss
    assert output.loss.dtype == output.logits_per_image.dtype == torch.float32
    output.loss.backward()  # outside, as Trainer calls it
    assert kinds == {(torch.bfloat16, True)}
    assert float(output.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-3)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def bytes_kept(model: VitEmbedForContrastive, batch: dict[str, torch.Tensor]) -> int:
    """Bytes that the forward pass leaves behind for the backward pass, weights and inputs not counted."""
    counted = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *batch.values())}
    total = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**batch)
    del output
    return total


def test_only_embeddings_are_kept_for_the_backward_pass():
    whole, cached = bytes_kept(make_model(None), inputs(32)), bytes_kept(make_model(4), inputs(32))
    embeds, logits = 2 * 32 * 20 * 4, 32 * 32 * 4  # two towers of 20 numbers a row; float32
    assert cached < 4 * embeds + 8 * logits < whole / 50


def test_a_batch_within_a_chunk_evaluation_and_no_grad_take_one_pass():
    cached, whole = make_model(CHUNK), make_model(None)
    seen = batches_seen(cached.vision_model)
    for batch in (inputs(CHUNK), inputs(1)):
        found, expected = step(cached, batch), step(whole, batch)
        assert torch.equal(found[0], expected[0])
        assert all(torch.equal(found[1][name], gradient) for name, gradient in expected[1].items())
    assert seen == [CHUNK, 1]
    with torch.no_grad():
        cached(**inputs())
    assert torch.equal(cached.eval()(**inputs()).loss, whole.eval()(**inputs()).loss)
    assert seen == [CHUNK, 1, BATCH, BATCH]


def test_one_tower_alone_is_embedded_in_chunks_too():
    """For a loss of one's own."""

    def loss(model, **batch):
        embeds = model(**batch)[0]  # all there is
        return (embeds * torch.linspace(-1, 1, embeds.shape[1])).sum()

    for name, rows in inputs().items():
        cached = make_model(CHUNK)
        seen = batches_seen(cached.vision_model if name == "pixel_values" else cached.text_model)
        assert_same_step(step(cached, {name: rows}, loss), step(make_model(None), {name: rows}, loss))
        assert len(seen) == 2 * len(CHUNKS)


@pytest.mark.parametrize("asked", ["output_attentions", "output_hidden_states"])
def test_what_a_chunk_lets_go_of_cannot_be_asked_for_in_training(asked):
    model = make_model(CHUNK)
    with pytest.raises(ValueError, match=f"contrastive_chunk_size={CHUNK} keeps nothing .*{asked}"):
        model(**inputs(), **{asked: True})
    assert model.eval()(**inputs(), **{asked: True}).loss is not None


def test_a_mask_of_another_batch_is_an_error():
    with pytest.raises(ValueError, match="attention_mask must have the shape of input_ids"):
        make_model(CHUNK)(**inputs(attention_mask=torch.ones(BATCH - 1, 16, dtype=torch.long)))
