"""Masked autoencoding, for each stem that allows it: what the trunk sees, what the loss is, what is left for heads."""

import logging
from functools import partial

import pictures
import pytest
import torch
from fresh_process import digests, outputs, run_fresh
from tiny import CLOSE, TEXT, pixels, randomised, use_attention, vision_config
from torch.nn import functional as F
from transformers import ResNetConfig, Trainer, TrainingArguments, ViTMAEConfig, ViTMAEForPreTraining

from vit_embed import (
    VitEmbedBackbone,
    VitEmbedForContrastive,
    VitEmbedForDepthEstimation,
    VitEmbedForImageClassification,
    VitEmbedForMaskedImageModeling,
    VitEmbedModel,
    VitEmbedModelWithProjection,
)
from vit_embed.options_vit_embed import STEM_TYPES, TOKEN_CHOOSING_STEMS

# Two stages of 8 and 16 channels, the second of stride 8, the patch of the tiny models.
BACKBONE = ResNetConfig(
    embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
)
STEM_FIELDS = {"hybrid": {"backbone_config": BACKBONE.to_dict()}}
STEMS = [stem for stem in STEM_TYPES if stem not in TOKEN_CHOOSING_STEMS]
EVERY_STEM = pytest.mark.parametrize("stem", STEMS)

# Tokens that each of three images keeps in `uneven_mask`: few, some, all of its 16.
UNEVEN_COUNTS = (3, 9, 16)


def config(stem: str = "conv", **fields):
    """The tiny trunk with one stem, and a decoder of 2 layers of 24."""
    decoder = {
        "decoder_hidden_size": 24,
        "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 3,
        "decoder_intermediate_size": 40,
    }
    return vision_config(**{**decoder, "stem_type": stem, **STEM_FIELDS.get(stem, {}), **fields})


def model_of(stem: str = "conv", **fields) -> VitEmbedForMaskedImageModeling:
    return randomised(VitEmbedForMaskedImageModeling(config(stem, **fields)))


def even_mask(batch: int = 3, num_patches: int = 16, num_hidden: int = 12) -> torch.Tensor:
    """(batch, num_patches) bool: as many hidden in every row, at other places in each."""
    order = torch.rand(batch, num_patches, generator=torch.Generator().manual_seed(3)).argsort(dim=1)
    return order < num_hidden


def uneven_mask() -> torch.Tensor:
    return torch.cat([even_mask(1, 16, 16 - count) for count in UNEVEN_COUNTS])


def as_pixels(mask: torch.Tensor, side: int = 8) -> torch.Tensor:
    """(B, gh, gw) -> (B, 1, H, W): the pixels of each patch."""
    return mask.repeat_interleave(side, dim=1).repeat_interleave(side, dim=2)[:, None]


def as_patches(pixel_values: torch.Tensor, patch: tuple[int, int] = (8, 8)) -> torch.Tensor:
    """(B, C, H, W) -> (B, N, C * ph * pw), by torch's own unfold."""
    return F.unfold(pixel_values, patch, stride=patch).transpose(1, 2)


def gradients(model: torch.nn.Module, **inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@torch.no_grad()
def test_the_loss_is_that_of_transformers_vit_mae(norm_pix_loss):
    """Its values of a patch come row, column, channel; ours as in a convolution's weight: channel, row, column."""
    model, mask = model_of(norm_pix_loss=norm_pix_loss), even_mask()
    predicted = torch.randn(3, 16, 3 * 8 * 8)
    model.decoder.forward = lambda *arguments: predicted
    found = model(pixels(), bool_masked_pos=mask)

    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 24}
    decoder = {f"decoder_{name}": size for name, size in sizes.items()}
    reference_config = ViTMAEConfig(**sizes, **decoder, image_size=32, patch_size=8, norm_pix_loss=norm_pix_loss)
    reference = ViTMAEForPreTraining(reference_config).eval()
    last = predicted.unflatten(-1, (3, 8, 8)).permute(0, 1, 3, 4, 2).flatten(2)

    def replace_logits(module, inputs, output):
        output.logits = last
        return output

    reference.decoder.register_forward_hook(replace_logits)
    expected = reference(pixels(), noise=mask.float())  # it keeps the quarter of lowest noise
    assert torch.equal(expected.mask.bool(), mask)
    torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
    assert found.loss > 0.5


@EVERY_STEM
@torch.no_grad()
def test_the_encoder_computes_the_kept_patches_alone(stem):
    model, lengths = model_of(stem, num_register_tokens=2), []
    for layer in (*model.vision_model.encoder.layers, *model.decoder.encoder.layers):
        layer.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    model(pixels(), bool_masked_pos=even_mask())
    assert lengths == [3 + 4] * 4 + [3 + 16] * 2
    lengths.clear()
    output = model(pixels())
    assert lengths == [3 + 4] * 4 + [3 + 16] * 2, "three quarters are hidden unless told otherwise"
    assert output.mask.shape == (3, 4, 4) and output.mask.dtype == torch.bool
    assert output.mask.flatten(1).sum(dim=1).tolist() == [12] * 3


@EVERY_STEM
@torch.no_grad()
def test_hidden_pixels_do_not_reach_the_trunk(stem):
    model, mask = model_of(stem), uneven_mask()
    hidden = as_pixels(mask.unflatten(1, (4, 4)))
    one = pixels()
    other = torch.where(hidden, 5 * pixels(seed=7) + 2, one)
    call = partial(model, bool_masked_pos=mask, output_hidden_states=True)
    before, after = call(one), call(other)
    for first, second in zip(before.hidden_states, after.hidden_states):
        for row, count in enumerate(UNEVEN_COUNTS):  # what is behind these is padding
            assert torch.equal(first[row, : 1 + count], second[row, : 1 + count])
    assert (before.loss - after.loss).abs() > 1e-4, "the target has changed"
    shown = torch.where(hidden, one, pixels(seed=7))
    assert not torch.equal(before.hidden_states[0], call(shown).hidden_states[0]), "the others do reach it"


@torch.no_grad()
def test_predictions_of_hidden_patches_do_not_depend_on_their_pixels():
    """Without the normalisation by the picture's own patches, the reconstruction is the prediction."""
    model, mask = model_of(norm_pix_loss=False), even_mask()
    other = torch.where(as_pixels(mask.unflatten(1, (4, 4))), 0.0, pixels())
    before, after = (model(values, bool_masked_pos=mask).reconstruction for values in (pixels(), other))
    assert torch.equal(before, after)


@pytest.mark.parametrize(("mask_ratio", "hidden"), [(0.0, 0), (0.5, 8), (0.75, 12), (0.9, 14), (0.99, 15)])
@torch.no_grad()
def test_mask_ratio(mask_ratio, hidden):
    output = model_of(mask_ratio=mask_ratio)(pixels())
    assert output.mask.flatten(1).sum(dim=1).tolist() == [hidden] * 3
    assert output.loss.isfinite() and (output.loss == 0) == (hidden == 0)


@torch.no_grad()
def test_random_masks_differ_by_image_and_call_and_follow_the_seed():
    model, masks = model_of(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(model(pixels()).mask)
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0][0], masks[0][1])


@EVERY_STEM
@torch.no_grad()
def test_uneven_rows_equal_each_row_alone(stem):
    model, mask = model_of(stem), uneven_mask()
    whole = model(pixels(), bool_masked_pos=mask, output_hidden_states=True)
    as_grid = model(pixels(), bool_masked_pos=mask.unflatten(1, (4, 4)))
    assert torch.equal(whole.loss, as_grid.loss) and torch.equal(whole.mask, mask.unflatten(1, (4, 4)))
    losses = []
    for row, count in enumerate(UNEVEN_COUNTS):
        rows = slice(row, row + 1)
        alone = model(pixels()[rows], bool_masked_pos=mask[rows], output_hidden_states=True)
        torch.testing.assert_close(alone.reconstruction[0], whole.reconstruction[row], **CLOSE)
        for found, expected in zip(alone.hidden_states, whole.hidden_states):
            assert found.shape[1] == 1 + count
            torch.testing.assert_close(found[0], expected[row, : 1 + count], **CLOSE)
        losses.append(alone.loss)
    assert losses[2] == 0, "nothing of the third image is hidden"
    torch.testing.assert_close(whole.loss, sum(losses) / (len(losses) - 1), **CLOSE)
    # Of several batches of one step: the mean over all hidden patches.
    hidden = [16 - count for count in UNEVEN_COUNTS]
    in_step = [model(pixels(), bool_masked_pos=mask, num_items_in_batch=2 * sum(hidden)).loss for _ in range(2)]
    expected = sum(loss * count for loss, count in zip(losses, hidden)) / sum(hidden)
    torch.testing.assert_close(sum(in_step), expected, **CLOSE)


@torch.no_grad()
def test_integer_masks_are_read_as_bool():
    model, mask = model_of(), even_mask()
    assert torch.equal(model(pixels(), mask).loss, model(pixels(), mask.long()).loss)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("shape", [(32, 32), (24, 40), (27, 30)])
@torch.no_grad()
def test_a_perfect_prediction_reconstructs_the_image(norm_pix_loss, shape):
    model = model_of(norm_pix_loss=norm_pix_loss, patch_size=(8, 4), pad_to_patch=True)
    image = 0.3 + 0.2 * pixels(2, *shape)
    rows, columns = -(-shape[0] // 8), -(-shape[1] // 4)
    target = as_patches(F.pad(image, (0, 4 * columns - shape[1], 0, 8 * rows - shape[0])), (8, 4))
    if norm_pix_loss:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    model.decoder.forward = lambda *arguments: target
    output = model(image)
    assert output.reconstruction.shape == image.shape and output.mask.shape == (2, rows, columns)
    torch.testing.assert_close(output.reconstruction, image, **CLOSE)
    assert output.loss < 1e-10


@torch.no_grad()
def test_a_flat_patch_has_a_finite_target():
    output = model_of()(torch.full((2, 3, 32, 32), 0.7))
    assert output.loss.isfinite() and output.reconstruction.isfinite().all()


@EVERY_STEM
@torch.no_grad()
def test_rectangles_and_padding(stem):
    fields = {"image_size": (32, 64)}
    output = model_of(stem, **fields)(pixels(2, 24, 40))
    assert output.reconstruction.shape == (2, 3, 24, 40) and output.mask.shape == (2, 3, 5)
    model = model_of(stem, **fields, pad_to_patch=True)
    image, mask = pixels(2, 21, 37), even_mask(2, 15, 7)
    padded = F.pad(image, (0, 3, 0, 3))
    found, expected = model(image, mask), model(padded, mask)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.reconstruction, expected.reconstruction[..., :21, :37])


@EVERY_STEM
def test_gradients_reach_every_parameter(stem):
    model = model_of(stem, num_register_tokens=2).train()
    found = gradients(model, pixel_values=pixels(), bool_masked_pos=even_mask())
    idle = {name for name, _ in model.named_parameters() if name not in found or not found[name].abs().sum() > 0}
    # A key's bias shifts all scores of a query alike, which softmax ignores: its gradient is zero up to rounding.
    assert {name for name in idle if not name.endswith("k_proj.bias")} == set()


@pytest.mark.parametrize("mask", [even_mask, uneven_mask])
def test_sdpa_equals_eager(mask):
    model, results = model_of(), {}
    for implementation in ("eager", "sdpa"):
        use_attention(model, implementation)
        results[implementation] = gradients(model, pixel_values=pixels(), bool_masked_pos=mask())
    assert results["eager"].keys() == results["sdpa"].keys()
    for name, gradient in results["eager"].items():
        bound = 1e-5 * max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(results["sdpa"][name], gradient, rtol=1e-4, atol=bound)


def test_the_decoder_takes_the_attention_implementation_of_the_model(tmp_path):
    model_of().save_pretrained(tmp_path)
    model = VitEmbedForMaskedImageModeling.from_pretrained(tmp_path, attn_implementation="eager")
    assert model.decoder.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    assert model.decoder.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_both_stacks_to_equal_gradients(use_reentrant):
    model, calls = model_of().train(), []
    for layer in (model.vision_model.encoder.layers[1], model.decoder.encoder.layers[1]):
        layer.layer_norm1.register_forward_hook(lambda module, *_: calls.append(module))
    inputs = {"pixel_values": pixels(), "bool_masked_pos": uneven_mask()}
    plain = gradients(model, **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed = gradients(model, **inputs)
    assert len(calls) == 2 + 4
    assert checkpointed.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, **CLOSE)


@torch.no_grad()
def test_tuple_equals_dict_and_more_on_request():
    model, mask = model_of(), even_mask()
    output = model(pixels(), mask)
    assert set(output) == {"loss", "reconstruction", "mask"}
    for found, expected in zip(model(pixels(), mask, return_dict=False), output.to_tuple()):
        assert torch.equal(found, expected)
    full = model(pixels(), mask, output_hidden_states=True, output_attentions=True)
    assert len(full.hidden_states) == 5 and len(full.attentions) == 4
    assert full.hidden_states[4].shape == (3, 5, 32) and full.attentions[0].shape == (3, 4, 5, 5)
    torch.testing.assert_close(full.reconstruction, output.reconstruction, **CLOSE)


@EVERY_STEM
@torch.no_grad()
def test_bfloat16_runs_and_stays_near_float32(stem):
    """bfloat16 keeps 8 bits: a few layers of it stay within some percent of the size of the result."""
    model, mask = model_of(stem), uneven_mask()
    exact = model(pixels(), mask).loss
    found = model.to(torch.bfloat16)(pixels(), mask).loss
    assert found.dtype == torch.float32 and abs(found - exact) <= 0.1 * abs(exact) + 0.05


def test_options_of_the_trunk_go_together_with_it():
    for fields in (
        {"use_cls_token": False, "pooling_type": "mean"},
        {"norm_position": "post", "use_pre_layernorm": False},
        {"final_norm_type": "none"},
        {"position_embedding_type": "sinusoidal"},
        {"position_embedding_type": "polynomial"},
        {"position_embedding_type": "none"},
    ):
        output = model_of(**fields)(pixels())
        assert output.loss.isfinite() and output.reconstruction.shape == (3, 3, 32, 32), fields


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of a masked autoencoder, and the model."""
    folder, model = tmp_path_factory.mktemp("masked") / "saved", model_of(num_register_tokens=2)
    model.save_pretrained(folder)
    return folder, model


@EVERY_STEM
def test_what_is_saved_comes_back(stem, tmp_path):
    model = model_of(stem)
    model.save_pretrained(tmp_path)
    again, info = VitEmbedForMaskedImageModeling.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert digests(again) == digests(model)
    with torch.no_grad():
        assert torch.equal(again.eval()(pixels(), even_mask()).loss, model(pixels(), even_mask()).loss)


def load_in_a_new_process(folder: str, file: str) -> list:
    import torch
    from fresh_process import auto_load, digests, outputs

    stored = torch.load(file)
    model = auto_load("AutoModelForMaskedImageModeling", folder)
    equal = [torch.equal(a, b) for a, b in zip(outputs(model, stored["inputs"]), stored["outputs"])]
    return [type(model).__name__, digests(model), equal]


def test_the_auto_class_loads_it_in_a_new_process(saved, tmp_path):
    folder, model = saved
    inputs = {"pixel_values": pixels(), "bool_masked_pos": uneven_mask()}
    torch.save({"inputs": inputs, "outputs": outputs(model, inputs)}, tmp_path / "io.pt")
    name, found, equal = run_fresh(
        load_in_a_new_process, tmp_path / "home", folder=str(folder), file=str(tmp_path / "io.pt")
    )
    assert name == "VitEmbedForMaskedImageModeling" and found == digests(model) and equal == [True] * 3


# class: fields to load it with, and the first parts of the names of parameters that the checkpoint cannot have.
HEADS = {
    VitEmbedModel: ({}, set()),
    VitEmbedModelWithProjection: ({}, {"visual_projection"}),
    VitEmbedForImageClassification: ({"num_labels": 5}, {"classifier"}),
    VitEmbedForDepthEstimation: ({}, {"depth_head"}),
    VitEmbedForContrastive: (
        {"text_config": TEXT},
        {"text_model", "visual_projection", "text_projection", "logit_scale"},
    ),
    VitEmbedBackbone: ({}, set()),
}


@pytest.mark.parametrize("head_class", HEADS, ids=lambda head_class: head_class.__name__)
def test_its_trunk_loads_into_every_head(head_class, saved, caplog, monkeypatch):
    folder, pretrained = saved
    fields, new = HEADS[head_class]
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.INFO):
        model, info = head_class.from_pretrained(folder, **fields, output_loading_info=True)
    assert digests(model.trunk) == digests(pretrained.vision_model)
    assert {name.split(".")[0] for name in info["missing_keys"]} == new
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert "decoder" not in caplog.text and "nexpected" not in caplog.text.replace("UNEXPECTED:", "")
    assert all(name in caplog.text for name in new), "what starts from random weights is named"
    with torch.no_grad():
        expected = pretrained.vision_model(pixels()).last_hidden_state
        assert torch.equal(model.eval().trunk(pixels()).last_hidden_state, expected)


def test_a_trunk_trained_otherwise_can_be_its_start(tmp_path):
    trunk = randomised(VitEmbedModel(config()))
    trunk.save_pretrained(tmp_path)
    model, info = VitEmbedForMaskedImageModeling.from_pretrained(tmp_path, output_loading_info=True)
    assert digests(model.vision_model) == digests(trunk)
    assert info["missing_keys"] and all(name.startswith("decoder.") for name in info["missing_keys"])


def photo_crops(count: int, seed: int) -> torch.Tensor:
    """(3 * count, 3, 32, 32) of three photos, in [-1, 1]."""
    crops = [crop for name in ("astronaut", "coffee", "flower") for crop in pictures.crops(name, count, seed=seed)]
    small = [torch.tensor(list(crop.resize((32, 32)).tobytes())).view(32, 32, 3).permute(2, 0, 1) for crop in crops]
    return torch.stack(small) / 127.5 - 1


def test_training_predicts_hidden_patches_of_unseen_photos():
    model = VitEmbedForMaskedImageModeling(config(norm_pix_loss=False))
    training, held_out, mask = photo_crops(24, seed=0), photo_crops(4, seed=1), even_mask(12)

    @torch.no_grad()
    def error() -> float:
        return model.eval()(held_out, mask).loss.item()

    start = error()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model.train()(training[torch.randint(len(training), (24,))]).loss.backward()
        optimizer.step()
    assert error() < 0.25 * start, f"{start} fell to {error()}"


def test_the_trainer_reports_the_loss_of_an_evaluation(tmp_path):
    rows = [{"pixel_values": values} for values in pixels(6)]
    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=4, report_to="none", use_cpu=True)
    metrics = Trainer(model_of(), arguments, eval_dataset=rows).evaluate()
    assert metrics["eval_loss"] > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stem_type": "token_learner"}, "stem_type='token_learner' chooses its tokens"),
        ({"stem_type": "adaptive"}, "stem_type='adaptive' chooses its tokens"),
        (
            {"stem_type": "overlap", "patch_kernel_size": 7, "patch_size": 4},
            r"one token a patch, \(8, 8\) for this.* patch_kernel_size=7 with patch_size=4 gives \(7, 7\)",
        ),
        ({"patch_drop_rate": 0.5}, "mask_ratio.*; set patch_drop_rate=0, got 0.5"),
        ({"mask_ratio": 1.0}, r"mask_ratio must be a number in \[0, 1\), got 1.0"),
        ({"mask_ratio": -0.1}, r"mask_ratio must be a number in \[0, 1\), got -0.1"),
        ({"mask_ratio": "most"}, "mask_ratio must be a number"),
        ({"norm_pix_loss": "yes"}, "norm_pix_loss must be one of True, False"),
        ({"decoder_hidden_size": 26}, "decoder_hidden_size must be a multiple of decoder_num_attention_heads"),
        ({"decoder_num_hidden_layers": 0}, "decoder_num_hidden_layers must be an integer >= 1"),
    ],
)
def test_configs_without_a_meaning_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        VitEmbedForMaskedImageModeling(config(**fields))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(3, 16), "at least one patch of each image, got an image with none"),
        (torch.cat([even_mask(2), torch.ones(1, 16, dtype=torch.bool)]), "an image with none"),
        (torch.zeros(3, 15), r"bool_masked_pos must be \(batch=3, patches=16\) or \(batch, 4, 4\), got \(3, 15\)"),
        (torch.zeros(2, 16), r"got \(2, 16\)"),
        (torch.zeros(3, 2, 8), r"got \(3, 2, 8\)"),
        (torch.zeros(16), r"got \(16,\)"),
        (torch.zeros(3, 3, 32, 32), r"got \(3, 3, 32, 32\)"),
    ],
)
def test_bad_masks_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        model_of()(pixels(), bool_masked_pos=mask)


def test_bad_images_are_refused():
    for image, message in (
        (pixels(2, 30, 32), r"multiples of patch_size \(8, 8\)"),
        (pixels()[:, :1], "num_channels=3"),
    ):
        with pytest.raises(ValueError, match=message):
            model_of()(image)
