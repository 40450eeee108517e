"""What texts begin with in common is computed once: against the rows as they are, and against stock CLIP."""

from contextlib import contextmanager

import peft
import pytest
import torch
from tiny import (
    CLOSE,
    EOS,
    SIGLIP,
    SIGLIP_TEXT,
    TEXT,
    assert_same_gradients,
    clip_model,
    dual_config,
    gradients_of,
    randomised,
    use_attention,
)
from tiny_tokenizer import write_tokenizer
from torch.nn import functional as F
from transformers import AutoTokenizer

from vit_embed import (
    VitEmbedForContrastive,
    VitEmbedTextConfig,
    VitEmbedTextModelWithProjection,
    encoder_vit_embed,
    prefixes_vit_embed,
    zero_shot_vit_embed,
)

# Every kind of causal tower: `eos_token_id=2` is read as "the largest id of the row".
CAUSAL = {
    "eos": {},
    "largest id": {"eos_token_id": 2},
    "last": {"pooling_type": "last", "pad_token_id": 7},
}
EVERY = pytest.mark.parametrize("name", CAUSAL)
NAMES = ["cat", "rocket", "flower", "ca", "cat"]
TEMPLATES = ["photo of {}", "this {}", "{}", "photo {}", "{} {}"]


def model_of(**fields) -> VitEmbedTextModelWithProjection:
    return randomised(VitEmbedTextModelWithProjection(VitEmbedTextConfig(**{**TEXT, **fields}))).requires_grad_(False)


def texts(batch: int = 90, length: int = 14, seed: int = 0) -> torch.Tensor:
    """(batch, length): start token, words of a vocabulary of three, end token, padding: many begin alike, some are
    equal, and some are the beginning of others but for their end."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 4, (batch, length), generator=generator)
    lengths = torch.randint(2, length - 1, (batch,), generator=generator)
    ids[:, 0] = TEXT["bos_token_id"]
    ids[torch.arange(length) > lengths[:, None]] = 7
    ids[torch.arange(batch), lengths] = EOS
    return ids


def num_prefixes(rows: list[list[int]]) -> int:
    """How many different beginnings they have."""
    return len({tuple(row[: i + 1]) for row in rows for i in range(len(row))})


@contextmanager
def shapes_of(module: torch.nn.Module):
    """The shapes of what a module is given. Patches its forward: a hook would be seen."""
    seen, forward = [], module.forward
    module.forward = lambda *args, **kwargs: seen.append(tuple(args[0].shape)) or forward(*args, **kwargs)
    try:
        yield seen
    finally:
        del module.forward


@EVERY
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("block", [1, 3, 32, 1000])
def test_shared_equals_rows_as_they_are(name, implementation, block, monkeypatch):
    monkeypatch.setattr(prefixes_vit_embed, "QUERIES_OF_A_BLOCK", block)
    model = model_of(**CAUSAL[name])
    use_attention(model, implementation)
    for ids in (texts(), texts(1), texts(3)[[0, 0, 0]], texts(20).int(), texts(5, 4)):
        with shapes_of(model.text_model.encoder) as seen:
            shared = model.get_text_features(ids, share_prefixes=True)
            plain = model.get_text_features(ids, share_prefixes=False)
        assert seen[0][0] == 1 and seen[1][0] == len(ids)
        torch.testing.assert_close(shared, plain, **CLOSE)


@torch.no_grad()
def test_shared_equals_clip():
    reference, model = clip_model(), VitEmbedForContrastive(dual_config()).eval()
    model.load_state_dict(reference.state_dict())
    theirs = reference.get_text_features(input_ids=texts(40))
    theirs = theirs if isinstance(theirs, torch.Tensor) else theirs.pooler_output
    torch.testing.assert_close(model.get_text_features(texts(40), share_prefixes=True), theirs, **CLOSE)
    embeds = [model(input_ids=texts(40), share_prefixes=share).text_embeds for share in (True, False)]
    torch.testing.assert_close(*embeds, **CLOSE)


@EVERY
def test_every_beginning_is_computed_once_and_of_the_last_layer_the_ends(name):
    model, ids = model_of(**CAUSAL[name]), texts()
    rows = [row[: row.index(EOS) + 1] for row in ids.tolist()]
    if name == "last":
        rows = F.pad(ids, (0, 2), value=7).tolist()  # as the tower does that reads padding
    layers = model.text_model.encoder.layers
    with shapes_of(layers[1].mlp.fc1) as first, shapes_of(layers[2].mlp.fc1) as last:
        model.get_text_features(ids, share_prefixes=True)
    assert first == [(1, num_prefixes(rows), 24)]
    assert last == [(1, len({tuple(row) for row in rows}), 24)]


def test_bfloat16_is_no_further_from_float32_than_rows_as_they_are():
    model, ids = model_of(), texts()
    exact = model.get_text_features(ids)
    model.bfloat16()
    shared, plain = (model.get_text_features(ids, share_prefixes=share) for share in (True, False))
    assert shared.dtype == torch.bfloat16
    assert (shared.float() - exact).norm() <= 1.1 * (plain.float() - exact).norm()
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        shared, plain = (model.get_text_features(ids, share_prefixes=share) for share in (True, False))
    assert (shared.float() - exact).norm() <= 1.1 * (plain.float() - exact).norm()


def test_gradients_are_those_of_rows_as_they_are():
    model, ids = model_of().requires_grad_(True), texts(30)
    weights = torch.randn(30, 512, generator=torch.Generator().manual_seed(1))
    found, expected = (
        gradients_of(model, lambda s=share: (model.get_text_features(ids, share_prefixes=s) * weights).sum())
        for share in (True, False)
    )
    assert_same_gradients(found, expected)


def test_adapters_and_hooks_on_linear_layers_work():
    model, ids = model_of(), texts(20)
    before = model.get_text_features(ids, share_prefixes=True)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "fc1", "out_proj"]))
    randomised(adapted, seed=3)
    model = adapted.base_model.model
    shared, plain = (model.get_text_features(ids, share_prefixes=share) for share in (True, False))
    torch.testing.assert_close(shared, plain, rtol=1e-4, atol=1e-4)
    assert (shared - before).abs().max() > 1e-2
    linears = [module for module in model.text_model.encoder.modules() if isinstance(module, torch.nn.Linear)]
    calls = []
    hooks = [module.register_forward_hook(lambda *args: calls.append(args[0])) for module in linears]
    model.get_text_features(ids, share_prefixes=True)
    assert len(hooks) == len(calls) == len({id(module) for module in calls}), "every one once"


@pytest.mark.parametrize("why", ["bidirectional", "positions", "training", "flash"])
def test_where_it_cannot_be_done_rows_come_as_they_are(why, monkeypatch):
    model = model_of(use_causal_mask=why != "bidirectional").train(why == "training")
    options = {"position_ids": torch.arange(14)[None]} if why == "positions" else {}
    if why == "flash":
        model.text_model.config._attn_implementation = "flash_attention_2"
    sdpa = encoder_vit_embed.ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setattr(encoder_vit_embed, "ALL_ATTENTION_FUNCTIONS", {"sdpa": sdpa, "flash_attention_2": sdpa})
    with shapes_of(model.text_model.encoder) as seen:
        found = model.get_text_features(texts(), share_prefixes=True, **options)
        expected = model.get_text_features(texts(), share_prefixes=False, **options)
    assert seen[0] == seen[1] == (90, 16 if why == "bidirectional" else 13, 24)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_a_recorded_graph_has_rows_as_they_are():
    model = model_of()
    compiled = torch.compile(model.get_text_features, backend="eager", fullgraph=True)
    expected = model.get_text_features(texts(), share_prefixes=False)
    torch.testing.assert_close(compiled(texts(), share_prefixes=True), expected, **CLOSE)


def test_by_itself_it_is_done_where_it_pays_and_nobody_looks():
    model = model_of()

    def rows(ids: torch.Tensor) -> int:
        with shapes_of(model.text_model.encoder) as seen:
            model.get_text_features(ids)
            model.text_model(ids)  # every token is asked for
        assert seen[1] == (*ids.shape, 24)
        return seen[0][0]

    different = torch.cat([torch.full((9, 1), 98), torch.arange(1, 82).view(9, 9), torch.full((9, 1), EOS)], dim=1)
    assert rows(texts()) == 1
    assert rows(texts()[:2]) == 2, "too few"
    assert rows(different) == 9, "nothing but the start in common"
    for module in (model.text_model.encoder.layers[0], model.text_model.final_layer_norm):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            hook = register(lambda *args: None)
            assert rows(texts()) == 90, "whoever hooks a module sees (B, T, D)"
            hook.remove()
    tower_hook = model.text_model.register_forward_hook(lambda *args: None)
    assert rows(texts()) == 1, "the tower itself gives the same"
    tower_hook.remove()


# --- vectors of classes ---


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


DUAL = {
    "clip": {},
    "siglip": {**SIGLIP, "text_config": {**SIGLIP_TEXT, "pad_token_id": EOS}},
    "causal last": {"text_config": {**TEXT, "pooling_type": "last"}},
}


@pytest.mark.parametrize("name", DUAL)
@pytest.mark.parametrize("num_tokens", [1, 30, 4096])
def test_a_class_is_the_mean_of_its_sentences(name, num_tokens, tokenizer, monkeypatch):
    monkeypatch.setattr(zero_shot_vit_embed, "TOKENS_OF_A_PASS", num_tokens)
    model = randomised(VitEmbedForContrastive(dual_config(**DUAL[name])))
    with shapes_of(model.text_model) as passes:
        found = model.get_class_features(tokenizer, NAMES, TEMPLATES)
    expected = []
    for each in NAMES:
        ids = tokenizer([template.replace("{}", each) for template in TEMPLATES], padding=True, return_tensors="pt")
        embeds = model.get_text_features(ids.input_ids, True, ids.attention_mask, share_prefixes=False)
        expected.append(F.normalize(embeds.mean(0), dim=-1))
    torch.testing.assert_close(found, torch.stack(expected), **CLOSE)
    assert found.dtype == torch.float32 and not found.requires_grad
    assert sum(shape[0] for shape in passes) == len(
        {template.replace("{}", each) for each in NAMES for template in TEMPLATES}
    ), "equal ones once"
    assert len(passes) == 1 or num_tokens < 4096


def test_templates_may_be_functions_and_names_stand_alone(tokenizer):
    model = model_of()
    functions = [lambda name: f"photo of {name}", "{}"]
    found = model.get_class_features(tokenizer, NAMES, functions)
    assert torch.equal(found, model.get_class_features(tokenizer, NAMES, ["photo of {}", "{}"]))
    assert torch.equal(model.get_class_features(tokenizer, NAMES), model.get_class_features(tokenizer, NAMES, ["{}"]))
    low = model.bfloat16().get_class_features(tokenizer, NAMES, functions)
    torch.testing.assert_close(low, found, rtol=0, atol=2e-2)
    assert low.dtype == torch.float32


@pytest.mark.parametrize(
    ("names", "templates", "error", "match"),
    [
        ("cat", ["{}"], TypeError, r"names must be a list of strings, got one string; give \['cat'\]"),
        (["cat"], "{}", TypeError, "templates must be a list"),
        ([7], ["{}"], TypeError, "names must be strings, got int"),
        (["cat"], [None], TypeError, "templates must be strings, got NoneType"),
        ([], ["{}"], ValueError, "names must have at least one entry"),
        (["cat"], [], ValueError, "templates must have at least one entry"),
        (["cat"], ["{}", "photo"], ValueError, "a template needs {} .* got 'photo'"),
        (["cat", "rocket " * 20], ["{}"], ValueError, "max_position_embeddings=16 tokens, 'rocket .*' has 22; shorten"),
    ],
)
def test_what_makes_no_sentences_is_refused(names, templates, error, match, tokenizer):
    with pytest.raises(error, match=match):
        model_of().get_class_features(tokenizer, names, templates)
