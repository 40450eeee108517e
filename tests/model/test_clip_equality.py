"""Against `transformers.CLIPModel` with the same random weights, and against the slower of our own paths.

Tolerances: float32, so 1e-5 relative is rounding of sums in another order. bfloat16: our distance to the float32 result
is at most what the reference's own bfloat16 run has (times 1.1, as both are roundings of the same size by chance).
"""

import pytest
import torch
import transformers
from tiny import CLOSE, EOS, clip_model, dual_config, pixels, tokens, use_attention

from vit_embed import VitEmbedForContrastive, VitEmbedTextModel


@pytest.fixture(scope="module")
def reference():
    return clip_model()


@pytest.fixture(scope="module")
def model(reference):
    """Strict: the state dict is CLIP's, names and shapes."""
    ours = VitEmbedForContrastive(dual_config()).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    return ours


def clip_features(output):
    """transformers 5 returns an output object from get_*_features, 4.57 a tensor."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


@torch.no_grad()
def test_forward_equals_clip(reference, model):
    theirs = reference(input_ids=tokens(), pixel_values=pixels(), return_loss=True)
    ours = model(pixels(), tokens())
    names = ["loss", "logits_per_image", "logits_per_text", "image_embeds", "text_embeds"]
    assert list(ours)[:5] == names
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name], **CLOSE)


@torch.no_grad()
def test_features_equal_clip_and_are_plain_tensors(reference, model):
    image, text = model.get_image_features(pixels()), model.get_text_features(tokens())
    assert type(image) is torch.Tensor and type(text) is torch.Tensor
    torch.testing.assert_close(image, clip_features(reference.get_image_features(pixel_values=pixels())), **CLOSE)
    torch.testing.assert_close(text, clip_features(reference.get_text_features(input_ids=tokens())), **CLOSE)
    normalized = model.get_image_features(pixels(), normalize=True)
    torch.testing.assert_close(normalized, image / image.norm(dim=-1, keepdim=True), **CLOSE)


@pytest.mark.skipif(transformers.__version__.startswith("5.0."), reason="CLIPModel of 5.0 gives no hidden states")
@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_hidden_state_and_attention_equals_clip(reference, model, implementation):
    use_attention(model, implementation)
    use_attention(reference, "eager")
    wants = {"output_hidden_states": True, "output_attentions": True}
    for tower, given, layers in (("vision_model", pixels(), 4), ("text_model", tokens(), 3)):
        theirs, ours = (getattr(each, tower)(given, **wants) for each in (reference, model))
        for name in ("last_hidden_state", "pooler_output"):
            torch.testing.assert_close(ours[name], theirs[name], **CLOSE)
        assert len(ours.hidden_states) == layers + 1 and len(ours.attentions) == layers
        for name in ("hidden_states", "attentions"):
            for own, their in zip(ours[name], theirs[name], strict=True):
                torch.testing.assert_close(own, their, **CLOSE)
    # The same on the outputs of the dual encoder.
    both = model(pixels(), tokens(), **wants)
    assert len(both.hidden_states) == 5 and len(both.text_hidden_states) == 4
    assert both.attentions[0].shape == (3, 4, 17, 17) and both.text_attentions[0].shape == (3, 3, 16, 16)
    torch.testing.assert_close(both.attentions[-1].sum(-1), torch.ones(3, 4, 17))
    use_attention(model, "sdpa")
    use_attention(reference, "sdpa")


@torch.no_grad()
def test_bfloat16_is_no_further_from_float32_than_clips(reference, model):
    exact_image = clip_features(reference.get_image_features(pixel_values=pixels(8)))
    exact_text = clip_features(reference.get_text_features(input_ids=tokens(8)))
    low, low_reference = VitEmbedForContrastive(dual_config()).eval(), clip_model().to(torch.bfloat16)
    low.load_state_dict(reference.state_dict())
    low.to(torch.bfloat16)

    their_image = clip_features(low_reference.get_image_features(pixel_values=pixels(8).bfloat16()))
    their_text = clip_features(low_reference.get_text_features(input_ids=tokens(8)))
    for found, theirs, exact in (
        (low.get_image_features(pixels(8)), their_image, exact_image),
        (low.get_text_features(tokens(8)), their_text, exact_text),
    ):
        assert (found.float() - exact).norm() <= 1.1 * (theirs.float() - exact).norm()
    assert low(pixels(), tokens()).logits_per_image.dtype == torch.float32


def test_gradients_equal_clip(reference, model):
    reference(input_ids=tokens(), pixel_values=pixels(), return_loss=True).loss.backward()
    model(pixels(), tokens()).loss.backward()
    theirs = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        # Gradients are sums over batch and tokens of terms up to ~1: rounding of 1e-6 of the largest entry of each.
        bound = 1e-5 * max(1.0, theirs[name].abs().max().item())
        torch.testing.assert_close(parameter.grad, theirs[name], rtol=1e-4, atol=bound)
    reference.zero_grad(), model.zero_grad()


@torch.no_grad()
def test_other_sizes_equal_clip_with_interpolation(reference, model):
    """CLIP resamples for other square sizes behind a flag; ours needs none."""
    larger = pixels(2, 48, 48)
    theirs = reference.vision_model(larger, interpolate_pos_encoding=True)
    torch.testing.assert_close(model.vision_model(larger).last_hidden_state, theirs.last_hidden_state, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_short_way_to_the_pooled_vector_is_exact(model, implementation):
    """The last layer on pooled rows alone, and text cut behind the last end token, against the whole computation."""
    use_attention(model, implementation)
    whole = model.vision_model(pixels()).pooler_output
    torch.testing.assert_close(model.get_image_features(pixels()), model.visual_projection(whole), **CLOSE)
    short = tokens()
    short[:, 9:] = EOS
    whole = model.text_model(short).pooler_output
    torch.testing.assert_close(model.get_text_features(short), model.text_projection(whole), **CLOSE)
    seen = []
    hook = model.text_model.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    model.get_text_features(short)
    hook.remove()
    assert seen == [int((short == EOS).int().argmax(1).max()) + 1], "text is cut behind the batch's last end token"
    use_attention(model, "sdpa")


@torch.no_grad()
def test_text_does_not_depend_on_padding(model):
    ids = tokens()
    features = model.get_text_features(ids)
    for padding in (0, 5, EOS):
        padded = ids.clone()
        for row in range(len(ids)):
            padded[row, int((ids[row] == EOS).int().argmax()) + 1 :] = padding
        torch.testing.assert_close(model.get_text_features(padded), features, **CLOSE)
        torch.testing.assert_close(model.text_model(padded).pooler_output, model.text_model(ids).pooler_output, **CLOSE)
    right = (ids == EOS).int().cumsum(1) <= 1  # up to the end of each
    torch.testing.assert_close(model.get_text_features(ids, attention_mask=right), features, **CLOSE)
    alone = torch.cat([model.get_text_features(row[None, : int((row == EOS).int().argmax()) + 1]) for row in ids])
    torch.testing.assert_close(alone, features, **CLOSE)


@torch.no_grad()
def test_legacy_end_token_is_read_as_clip_reads_it(reference):
    """`eos_token_id=2` in a config means the largest id of the row; with OpenAI's vocabulary, 49407."""
    config = dual_config().text_config
    config.eos_token_id = 2
    legacy = VitEmbedTextModel(config).eval()
    legacy.load_state_dict(reference.text_model.state_dict())
    reference.text_model.eos_token_id = 2
    ids = torch.randint(3, 97, (4, 12), generator=torch.Generator().manual_seed(5))
    theirs = reference.text_model(ids).pooler_output
    reference.text_model.eos_token_id = EOS
    torch.testing.assert_close(legacy(ids).pooler_output, theirs, **CLOSE)
    assert type(config)(eos_token_id=2).eos_token_id == 49407


@torch.no_grad()
def test_one_side_alone_and_uneven_sides(model):
    assert model(pixels()).to_tuple()[0].shape == (3, 20), "images alone: their embeddings, and nothing before them"
    assert model(input_ids=tokens()).to_tuple()[0].shape == (3, 20)
    uneven = model(pixels(1), tokens(3))
    assert uneven.logits_per_image.shape == (1, 3) and uneven.loss is None
    assert model(pixels(), tokens(), return_loss=False).loss is None
    with pytest.raises(ValueError, match="pixel_values.*input_ids"):
        model()


@torch.no_grad()
def test_patch_features_are_in_text_space(model):
    patches = model.get_patch_features(pixels(2, 32, 64))
    assert patches.shape == (2, 4, 8, 20)
    torch.testing.assert_close(patches.norm(dim=-1), torch.ones(2, 4, 8))
    hidden = model.vision_model(pixels(2, 32, 64)).last_hidden_state[:, 1:]
    by_hand = torch.nn.functional.normalize(model.visual_projection(model.vision_model.post_layernorm(hidden)), dim=-1)
    torch.testing.assert_close(patches.flatten(1, 2), by_hand, **CLOSE)
