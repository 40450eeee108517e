"""Images of several sizes: one call of the stem for all patches, layers on all tokens without padding. What each image
gives alone is in test_token_budget.py; here it is held against rows that are padded and masked."""

from contextlib import contextmanager

import pytest
import tiny
import torch
from stem_family import FAMILY, build
from tiny import CLOSE, assert_same_gradients, pixels

from vit_embed import encoder_vit_embed
from vit_embed.stems_vit_embed import STEMS, Stem

SIZES = [(32, 32), (48, 16), (16, 64), (32, 32), (16, 16)]  # three of 16 patches, two of 12 and 4; of whole cells
LAYERS = 4


def padded_batch(seed: int = 1) -> dict[str, torch.Tensor]:
    images, mask = pixels(len(SIZES), 48, 64, seed=seed), torch.zeros(len(SIZES), 48, 64)
    for own, (rows, columns) in zip(mask, SIZES):
        own[:rows, :columns] = 1
    return {"pixel_values": images, "pixel_mask": mask}


@pytest.fixture
def packed(monkeypatch) -> list[tuple[int, ...]]:
    """The shape of the query of every attention among packed tokens."""
    shapes, within_images = [], encoder_vit_embed.within_images

    def watched(attend, module, states, packing, **options):
        shapes.append(tuple(states[0].shape))
        return within_images(attend, module, states, packing, **options)

    monkeypatch.setattr(encoder_vit_embed, "within_images", watched)
    return shapes


@contextmanager
def padding(model):
    """The other way: stems by size, layers on padded rows."""
    handle = model.trunk.encoder.layers[0].register_forward_hook(lambda *_: None)
    with pytest.MonkeyPatch.context() as patch:
        for stem in STEMS.values():
            patch.setattr(stem, "reads_single_patches", Stem.reads_single_patches)
        yield
    handle.remove()


def compiled(layer) -> None:
    layer.compile(backend="eager", fullgraph=True)


WATCHED = {
    "a hook before a layer": lambda layer: layer.register_forward_pre_hook(lambda *_: None),
    "a hook after its MLP": lambda layer: layer.mlp.register_forward_hook(lambda *_: None),
    "a hook on gradients": lambda layer: layer.register_full_backward_hook(lambda *_: None),
    "a compiled layer": compiled,
}


@torch.no_grad()
@pytest.mark.parametrize("reason", [*WATCHED, "output_attentions", "a compiled model"])
def test_whoever_looks_between_the_layers_sees_padded_rows(packed, reason):
    model, batch = build("conv"), padded_batch()
    expected = model(**batch).pooler_output
    assert packed == [(1, 4, 16 * 2 + 12 + 16 + 4 + 5, 8)] * LAYERS  # 4 heads of 8; a class token each
    packed.clear()
    options = {}
    if reason == "output_attentions":
        options = {"output_attentions": True}
    elif reason == "a compiled model":
        torch._dynamo.reset()
        model.compile(backend="eager")
    else:
        WATCHED[reason](model.encoder.layers[1])
    torch.testing.assert_close(model(**batch, **options).pooler_output, expected, **CLOSE)
    assert not packed


@torch.no_grad()
def test_a_hook_on_the_encoder_sees_padded_rows_of_packed_layers(packed):
    model, shapes = build("conv"), []
    model.encoder.register_forward_hook(
        lambda _, inputs, output: shapes.extend([inputs[0].shape, output.last.states.shape])
    )
    model(**padded_batch())
    assert shapes == [(5, 17, 32)] * 2 and len(packed) == LAYERS


@torch.no_grad()
def test_the_last_layer_computes_the_class_tokens_alone(packed):
    build("conv", "classification")(**padded_batch())
    assert [shape[2] for shape in packed] == [69] * (LAYERS - 1) + [len(SIZES)]


@torch.no_grad()
@pytest.mark.parametrize("stem", [*FAMILY])
def test_all_patches_are_one_call_of_a_stem_that_reads_them_singly(stem):
    model, shapes = build(stem), []
    model.trunk.embeddings.patch_embedding.register_forward_hook(
        lambda _, inputs, output: shapes.append(len(inputs[0]))
    )
    model(**padded_batch())
    single = FAMILY[stem]["stem_type"] in ("conv", "linear", "dct", "wavelet")
    assert shapes == ([64] if single else [1, 1, 2, 1])  # 64 patches; images by size


HIDDEN = {
    "cls": {},
    "registers, mean": {"num_register_tokens": 2, "pooling_type": "mean"},
    "no prefix, map": {"use_cls_token": False, "pooling_type": "map"},
    "post-norm": {"norm_position": "post", "layer_scale_init_value": 0.1},
}


@torch.no_grad()
@pytest.mark.parametrize("fields", HIDDEN.values(), ids=HIDDEN)
def test_hidden_states_are_those_of_each_image_alone_and_zero_beyond(packed, fields):
    model, batch = build("conv", **fields), padded_batch()
    together = model(**batch, output_hidden_states=True)
    assert len(packed) == LAYERS
    for row, (height, width) in enumerate(SIZES):
        alone = model(batch["pixel_values"][row : row + 1, :, :height, :width], output_hidden_states=True)
        length = alone.last_hidden_state.shape[1]
        for found, expected in zip(together.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(found[row, :length], expected[0], **CLOSE)
        assert (together.last_hidden_state[row, length:] == 0).all()
        torch.testing.assert_close(together.pooler_output[row], alone.pooler_output[0], **CLOSE)


TRAINED = {
    "conv, cls": ("conv", {}),
    "linear, map": ("linear", {"pooling_type": "map", "num_register_tokens": 1}),
    "dct, mean": ("dct", {"pooling_type": "mean", "position_embedding_type": "polynomial"}),
    "drop path": ("conv", {"drop_path_rate": 0.6, "layer_scale_init_value": 0.5}),
    "drop path, map": ("wavelet", {"drop_path_rate": 0.6, "pooling_type": "map"}),
    "overlap": ("overlap", {}),
    "odd pixels": ("conv", {"pad_to_patch": True, "patch_size": 7, "image_size": 28}),
    "adaptive": ("adaptive", {"pooling_type": "map"}),
    "sinusoidal": ("conv", {"position_embedding_type": "sinusoidal", "norm_type": "rms_norm"}),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("stem", "fields"), TRAINED.values(), ids=TRAINED)
def test_gradients_are_those_of_padded_rows(packed, stem, fields, checkpointing):
    """In training, with the same draws; of weights and of pixels."""
    model, batch = build(stem, "classification", **fields).train(), padded_batch()
    if checkpointing:
        model.gradient_checkpointing_enable()

    def step() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        images = batch["pixel_values"].clone().requires_grad_(True)
        found = tiny.gradients(model, {**batch, "pixel_values": images, "labels": torch.arange(5)})
        return {**found, "pixels": images.grad}

    found = step()
    assert len(packed) == LAYERS * (1 + checkpointing)
    with padding(model):
        expected = step()
    assert len(packed) == LAYERS * (1 + checkpointing)
    assert_same_gradients(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_an_adaptive_batch_is_packed_with_the_sizes_of_its_tokens(packed, implementation):
    """Without `pixel_mask`, too: images keep different counts."""
    model, images = build("adaptive", pooling_type="map"), pixels(5)
    model.set_attn_implementation(implementation)
    layout = model.embeddings(images).layout
    assert {0.0, 1.0, 4.0} == set(layout.sizes.flatten().tolist())
    found = model(images).pooler_output
    assert [shape[2] for shape in packed] == [int((layout.sizes > 0).sum()) + 5] * LAYERS
    with padding(model):
        torch.testing.assert_close(found, model(images).pooler_output, **CLOSE)


@torch.no_grad()
def test_bfloat16_is_no_further_from_float32_than_padded_rows():
    model, errors = build("conv"), {"packed": 0.0, "padded": 0.0}
    batches = [padded_batch(seed) for seed in range(8)]
    exact = [model(**batch).pooler_output for batch in batches]
    model.bfloat16()
    for batch, expected in zip(batches, exact):
        errors["packed"] += (model(**batch).pooler_output.float() - expected).square().mean()
        with padding(model):
            errors["padded"] += (model(**batch).pooler_output.float() - expected).square().mean()
    assert 0 < errors["packed"] <= 1.1 * errors["padded"]
