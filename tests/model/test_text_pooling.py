"""Text towers that are not CLIP's: bidirectional ones, and those read at the first or the last place of a row.

The reference is stock SiglipTextModel and SiglipModel with the same weights, whose texts the caller pads.
"""

import shutil

import pytest
import torch
from conversions import built, converter, saved
from tiny import CLOSE, EOS, SIGLIP_TEXT, TEXT, VISION, dual_config, pixels, randomised, tokens, use_attention
from transformers import SiglipConfig, SiglipModel, SiglipTextConfig, SiglipTextModel

from vit_embed import VitEmbedForContrastive, VitEmbedTextConfig, VitEmbedTextModel, encoder_vit_embed
from vit_embed.conversion.layouts.layout import ConversionOptions

PAD = 7
LENGTHS = (5, 9, 12)
STOCK_TEXT = {name: value for name, value in SIGLIP_TEXT.items() if name in SiglipTextConfig().to_dict()}
STOCK_TEXT["pad_token_id"] = PAD
# Every kind of tower whose vector depends on what stands behind the text.
READS_PADDING = {
    "last": {"pooling_type": "last", "use_causal_mask": False},
    "first": {"pooling_type": "first", "use_causal_mask": False},
    "eos": {"pooling_type": "eos", "use_causal_mask": False},
    "causal last": {"pooling_type": "last"},
}
EVERY = pytest.mark.parametrize("name", READS_PADDING)
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["eager", "sdpa"])


def model_of(name: str) -> VitEmbedForContrastive:
    text = {**TEXT, **READS_PADDING[name], "pad_token_id": PAD}
    return randomised(VitEmbedForContrastive(dual_config(text_config=text)))


def texts() -> list[torch.Tensor]:
    """Three rows of LENGTHS tokens, each with its end token at the end, none of them padding."""
    rows = tokens(3)
    rows[(rows == EOS) | (rows == PAD)] = 50
    rows = [rows[i, :length].clone() for i, length in enumerate(LENGTHS)]
    for row in rows:
        row[-1] = EOS
    return rows


def padded(length: int, padding: int = PAD) -> torch.Tensor:
    """(3, length) of `texts`."""
    ids = torch.full((3, length), padding)
    for row, text in zip(ids, texts()):
        row[: len(text)] = text
    return ids


def mask(length: int) -> torch.Tensor:
    return (torch.arange(length) < torch.tensor(LENGTHS)[:, None]).long()


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[SiglipModel, VitEmbedForContrastive]:
    """SigLIP of transformers and ours, with its weights."""
    vision = {**VISION, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
    text = {**STOCK_TEXT, "projection_size": 32}
    stock = randomised(SiglipModel(SiglipConfig(vision_config=vision, text_config=text)))
    stock.set_attn_implementation("eager")
    weights = saved(stock, tmp_path_factory.mktemp("siglip"))
    return stock, built(*converter("hf_clip")(*weights, ConversionOptions()))


@torch.no_grad()
@IMPLEMENTATIONS
@pytest.mark.parametrize("length", [16, 12], ids=["full length", "shorter"])
def test_the_dual_encoder_equals_siglip(pair, implementation, length):
    stock, model = pair
    use_attention(model, implementation)
    theirs, ours = stock(input_ids=padded(16), pixel_values=pixels()), model(pixels(), padded(length))
    for name in ("image_embeds", "text_embeds", "logits_per_image"):
        torch.testing.assert_close(ours[name], theirs[name], **CLOSE)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    tower = SiglipTextModel(stock.text_model.config).eval()  # the tower inside SiglipModel keeps nothing on 4.57
    getattr(tower, "text_model", tower).load_state_dict(stock.text_model.state_dict())
    use_attention(tower, "eager")  # which gives attentions
    theirs, ours = tower(padded(16), **wanted), model.text_model(padded(length), **wanted)
    for name in ("hidden_states", "attentions"):
        for own, their in zip(ours[name], theirs[name], strict=True):
            torch.testing.assert_close(own, their, **CLOSE)
    torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state, **CLOSE)
    torch.testing.assert_close(model.get_text_features(padded(length)), theirs.pooler_output, **CLOSE)
    assert torch.equal(model.get_image_features(pixels()), model.vision_model(pixels()).pooler_output)


@torch.no_grad()
@EVERY
def test_the_result_does_not_depend_on_padding(name):
    model = model_of(name)
    expected = model.get_text_features(padded(16))
    pooled = model.text_model(padded(16)).pooler_output
    for length in (12, 16):
        for ids, hidden in ((padded(length), None), (padded(length), mask(length)), (padded(length, 33), mask(length))):
            found = model.get_text_features(ids, attention_mask=hidden)
            torch.testing.assert_close(found, expected, **CLOSE)
            torch.testing.assert_close(model.text_model(ids, hidden).pooler_output, pooled, **CLOSE)
    alone = torch.cat([model.get_text_features(row[None]) for row in texts()])
    torch.testing.assert_close(alone, expected, **CLOSE)
    # What no mask hides is read, so the above says something.
    assert not torch.allclose(model.get_text_features(padded(16, 33)), expected, atol=1e-3)


@torch.no_grad()
@EVERY
@IMPLEMENTATIONS
def test_the_row_that_is_read_is_computed_alone(name, implementation):
    model = model_of(name)
    use_attention(model, implementation)
    lengths, rows = [], []
    encoder = model.text_model.encoder
    hooks = [
        encoder.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1])),
        encoder.layers[-1].mlp.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1])),
    ]
    short = model.get_text_features(padded(12))
    whole = model.text_model(padded(12))
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(short, model.text_projection(whole.pooler_output), **CLOSE)
    places = {"eos": [length - 1 for length in LENGTHS], "first": [0, 0, 0]}.get(name, [15, 15, 15])
    assert torch.equal(whole.pooler_output, whole.last_hidden_state[torch.arange(3), torch.tensor(places)])
    assert lengths == [16, 16], "no text is cut, as the padding is read"
    assert rows == [1, 16], "the last layer computes one row of each text"


@torch.no_grad()
@IMPLEMENTATIONS
@pytest.mark.parametrize(("name", "causal"), [("last", False), ("causal last", True)])
def test_a_bidirectional_token_sees_those_behind_it(name, causal, implementation):
    changed = padded(16)
    changed[:, 3] = 60
    tower = model_of(name).text_model
    use_attention(tower, implementation)
    before, after = tower(padded(16)).last_hidden_state, tower(changed).last_hidden_state
    assert torch.allclose(before[:, :3], after[:, :3], atol=1e-6) == causal
    assert not torch.allclose(before[:, -1], after[:, -1], atol=1e-3)


@torch.no_grad()
@pytest.mark.skipif(shutil.which("g++") is None, reason="flex attention on a CPU is compiled by g++, which is not here")
@pytest.mark.parametrize("name", ["last", "causal last"])
def test_flex_attention_equals_eager(name):
    """float32 through a compiled kernel that sums in blocks: 1e-4."""
    config = VitEmbedTextConfig(**{**TEXT, **READS_PADDING[name], "num_hidden_layers": 1})
    tower = randomised(VitEmbedTextModel(config))
    use_attention(tower, "eager")
    expected = tower(padded(12)).pooler_output
    use_attention(tower, "flex_attention")
    torch.testing.assert_close(tower(padded(12)).pooler_output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "causal"), [("last", False), ("causal last", True)])
def test_implementations_without_a_mask_get_the_direction(name, causal, monkeypatch):
    """Flash attention takes no mask: that a tower is bidirectional it knows by the flag alone."""
    calls = []

    def flash(module, query, key, value, attention_mask, scaling, dropout, is_causal):
        calls.append((attention_mask, is_causal))
        return value.transpose(1, 2), None

    monkeypatch.setattr(encoder_vit_embed, "ALL_ATTENTION_FUNCTIONS", {"flash_attention_2": flash})
    model = model_of(name)
    model.text_model.config._attn_implementation = "flash_attention_2"
    model.get_text_features(padded(12))
    assert calls == [(None, causal)] * 3


@torch.no_grad()
@pytest.mark.parametrize("name", ["eos", "last"])
def test_the_graph_of_a_compiled_tower_is_whole(name):
    model = model_of(name)
    compiled = torch.compile(model.get_text_features, backend="eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(padded(12, 33), attention_mask=mask(12)), model.get_text_features(padded(16)), **CLOSE
    )


@EVERY
def test_masks_that_are_no_padding_on_the_right_are_refused(name):
    model = model_of(name)
    left, hole, late = mask(12), mask(12), mask(12)
    left[1, 0] = 0
    hole[2, 4] = 0
    late[0, 8] = 1  # behind the end token of row 0 and a hidden place: no end token is hidden by it
    for wrong in (left, hole, late):
        with pytest.raises(ValueError, match="attention_mask hides a token before.*padding_side='right'"):
            model.get_text_features(padded(12), attention_mask=wrong)
        with pytest.raises(ValueError, match="padding_side='right'"):
            model.text_model(padded(12), wrong)


def test_only_a_tower_that_reads_the_end_token_asks_for_one():
    endless = torch.tensor([[98, 5, 6]])
    for name, fields in READS_PADDING.items():
        tower = VitEmbedTextModel(VitEmbedTextConfig(**{**TEXT, **fields}))  # which pads with the end token
        if name == "eos":
            with pytest.raises(ValueError, match="end-of-text token 99, row 0 has none"):
                tower(endless)
        else:
            assert tower(endless).pooler_output.isfinite().all()
