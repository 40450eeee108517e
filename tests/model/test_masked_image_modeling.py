"""Masked autoencoding: what the trunk sees, what the loss is, what is left for heads."""

import logging

import pytest
import torch
from fresh_process import digests
from stem_family import DECODER, FAMILY, HEADS
from tiny import CLOSE, TEXT, pixels, randomised, vision_config
from torch.nn import functional as F
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from vit_embed import VitEmbedForMaskedImageModeling
from vit_embed.options_vit_embed import STEM_TYPES, TOKEN_CHOOSING_STEMS
from vit_embed.stem_layers_vit_embed import patchify

EVERY_STEM = pytest.mark.parametrize("stem", [stem for stem in STEM_TYPES if stem not in TOKEN_CHOOSING_STEMS])
# Tokens that each of three images keeps in `uneven_mask`: few, some, all of its 16.
UNEVEN_COUNTS = (3, 9, 16)


def model_of(stem: str = "conv", **fields) -> VitEmbedForMaskedImageModeling:
    """A decoder of 2 layers of 24 on the tiny trunk."""
    config = vision_config(**{**DECODER, "decoder_num_hidden_layers": 2, **FAMILY[stem], **fields})
    return randomised(VitEmbedForMaskedImageModeling(config))


def even_mask(batch: int = 3, num_patches: int = 16, num_hidden: int = 12) -> torch.Tensor:
    """(batch, num_patches) bool: as many hidden in every row, at other places in each."""
    order = torch.rand(batch, num_patches, generator=torch.Generator().manual_seed(3)).argsort(dim=1)
    return order < num_hidden


def uneven_mask() -> torch.Tensor:
    return torch.cat([even_mask(1, 16, 16 - count) for count in UNEVEN_COUNTS])


def as_pixels(mask: torch.Tensor) -> torch.Tensor:
    """(B, 16) -> (B, 1, 32, 32): the pixels of each patch."""
    return mask.unflatten(1, (4, 4)).repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)[:, None]


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

    def replace_logits(module, inputs, output):
        output.logits = predicted.unflatten(-1, (3, 8, 8)).permute(0, 1, 3, 4, 2).flatten(2)
        return output

    reference.decoder.register_forward_hook(replace_logits)
    expected = reference(pixels(), noise=mask.float())  # it keeps the quarter of lowest noise
    assert torch.equal(expected.mask.bool(), mask)
    torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
    assert found.loss > 0.5


@torch.no_grad()
def test_the_encoder_computes_the_kept_patches_alone():
    model, lengths = model_of(num_register_tokens=2), []
    for layer in (*model.vision_model.encoder.layers, *model.decoder.encoder.layers):
        layer.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    model(pixels(), bool_masked_pos=even_mask())
    assert lengths == [3 + 4] * 4 + [3 + 16] * 2
    lengths.clear()
    model(pixels())
    assert lengths == [3 + 4] * 4 + [3 + 16] * 2, "three quarters are hidden by default"


@EVERY_STEM
@torch.no_grad()
def test_hidden_pixels_do_not_reach_the_trunk(stem):
    model, mask = model_of(stem), uneven_mask()
    hidden = as_pixels(mask)

    def call(images: torch.Tensor):
        return model(images, bool_masked_pos=mask, output_hidden_states=True)

    before, after = call(pixels()), call(torch.where(hidden, 5 * pixels(seed=7) + 2, pixels()))
    for first, second in zip(before.hidden_states, after.hidden_states):
        for row, count in enumerate(UNEVEN_COUNTS):  # what is behind these is padding
            assert torch.equal(first[row, : 1 + count], second[row, : 1 + count])
    assert (before.loss - after.loss).abs() > 1e-4, "the target has changed"
    shown = call(torch.where(hidden, pixels(), pixels(seed=7)))
    assert not torch.equal(before.hidden_states[0], shown.hidden_states[0]), "the others do reach it"


@pytest.mark.parametrize(("mask_ratio", "hidden"), [(0.0, 0), (0.5, 8), (0.9, 14), (0.99, 15)])
@torch.no_grad()
def test_mask_ratio(mask_ratio, hidden):
    output = model_of(mask_ratio=mask_ratio)(pixels())
    assert output.mask.dtype == torch.bool and output.mask.flatten(1).sum(dim=1).tolist() == [hidden] * 3
    assert output.loss.isfinite() and (output.loss == 0) == (hidden == 0)


@torch.no_grad()
def test_uneven_rows_equal_each_row_alone():
    model, mask = model_of(), uneven_mask()
    whole = model(pixels(), bool_masked_pos=mask, output_hidden_states=True)
    as_grid = model(pixels(), bool_masked_pos=mask.unflatten(1, (4, 4)).long())
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


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("shape", [(24, 40), (27, 30)])
@torch.no_grad()
def test_a_perfect_prediction_reconstructs_the_image(norm_pix_loss, shape):
    model = model_of(norm_pix_loss=norm_pix_loss, patch_size=(8, 4), pad_to_patch=True)
    image = 0.3 + 0.2 * pixels(2, *shape)
    rows, columns = -(-shape[0] // 8), -(-shape[1] // 4)
    padded = F.pad(image, (0, 4 * columns - shape[1], 0, 8 * rows - shape[0]))
    target = F.unfold(padded, (8, 4), stride=(8, 4)).transpose(1, 2)  # (B, N, C * ph * pw)
    if norm_pix_loss:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    model.decoder.forward = lambda *arguments: target
    output = model(image)
    assert output.reconstruction.shape == image.shape and output.mask.shape == (2, rows, columns)
    torch.testing.assert_close(output.reconstruction, image, **CLOSE)
    assert output.loss < 1e-10


@torch.no_grad()
def test_hidden_patches_differ_by_their_place():
    model, mask = model_of(norm_pix_loss=False), even_mask()
    predicted = patchify(model(pixels(), mask).reconstruction, (8, 8))
    assert predicted[0, mask[0]].std(dim=0).max() > 1e-2


@torch.no_grad()
def test_a_flat_patch_has_a_finite_target():
    output = model_of()(torch.full((2, 3, 32, 32), 0.7))
    assert output.loss.isfinite() and output.reconstruction.isfinite().all()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of a masked autoencoder, and the model."""
    folder, model = tmp_path_factory.mktemp("masked"), model_of(num_register_tokens=2)
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("head", [head for head in HEADS if head != "masked"])
def test_its_trunk_loads_into_every_head(head, saved, caplog, monkeypatch):
    folder, pretrained = saved
    fields = {**HEADS[head].fields, **({"text_config": TEXT} if head == "contrastive" else {})}
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.INFO):
        model, info = HEADS[head].model_class.from_pretrained(folder, **fields, output_loading_info=True)
    assert digests(model.trunk) == digests(pretrained.vision_model)
    new = set() if head == "trunk" else {name.split(".")[0] for name in model.state_dict()} - {"vision_model"}
    assert {name.split(".")[0] for name in info["missing_keys"]} == new
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert "decoder" not in caplog.text and "nexpected" not in caplog.text.replace("UNEXPECTED:", "")
    assert all(name in caplog.text for name in new), "what starts from random weights is named"


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
