"""`model.optimized()` against the model itself.

Float32: rounding of sums in another order. bfloat16: the copy's distance to the float32 model is at most what the
model's own bfloat16 form has (times 1.1, the mean over several models: both round as often, not at the same places).
"""

import copy
import io

import peft
import pytest
import torch
from catalogue import ARITHMETIC, CLASSES, GRAPHS, Case, flat, mostly_heavy
from tiny import CLOSE, pixels, tokens, use_attention
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.activations import ACT2FN

from vit_embed import optimized_vit_embed
from vit_embed.activations_vit_embed import activation
from vit_embed.inputs_vit_embed import is_traced
from vit_embed.optimized_vit_embed import OptimizedAttention, OptimizedMLP

CASES = {**GRAPHS, **ARITHMETIC}
EVERYTHING = {"output_hidden_states": True, "output_attentions": True}
KEPT = ("hidden_states", "attentions", "text_hidden_states", "text_attentions")


def outputs(case: Case, model: nn.Module, **options) -> list[torch.Tensor]:
    torch.manual_seed(0)
    output = model(**case.inputs(), **options)
    return flat(output, (*case.outputs, *(name for name in KEPT if output.get(name) is not None)))


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected):
        scale = max(1.0, other.abs().max().item())  # of hidden states, which grow from layer to layer
        torch.testing.assert_close(one / scale, other / scale, **CLOSE)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_copy_gives_what_the_model_gives(name):
    case = CASES[name]
    model = case.model()
    copied = model.optimized()
    assert type(copied) is type(model) and copied.config.to_dict() == model.config.to_dict()
    kinds = {type(module) for module in copied.modules()}
    assert {OptimizedAttention, OptimizedMLP} <= kinds
    assert_close(outputs(case, copied), outputs(case, model))
    expected = outputs(case, model, **EVERYTHING)
    assert len(expected) > len(case.outputs)
    assert_close(outputs(case, copied, **EVERYTHING), expected)


@pytest.mark.parametrize("name", ["contrastive", "merging", "layer scale", "mean"])
@torch.no_grad()
def test_an_mlp_that_takes_a_few_tokens_at_a_time(name, monkeypatch):
    case, rows = CASES[name], []
    model = case.model()
    copied = model.optimized()
    monkeypatch.setattr(optimized_vit_embed, "ROWS_AT_ONCE", 7)
    whole = OptimizedMLP._of_rows
    monkeypatch.setattr(OptimizedMLP, "_of_rows", lambda self, part: rows.append(part.shape) or whole(self, part))
    assert_close(outputs(case, copied), outputs(case, model))
    assert any(len(shape) == 2 and shape[0] < 14 for shape in rows)


@pytest.mark.parametrize("name", ["contrastive", "text", "layer scale"])
@torch.no_grad()
def test_attention_that_takes_a_few_images_or_texts_at_a_time(name, monkeypatch):
    case, batches = CASES[name], []
    model = case.model()
    copied = model.optimized()
    monkeypatch.setattr(optimized_vit_embed, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(optimized_vit_embed, "LARGE_PROJECTION", 0)
    whole = OptimizedAttention.projected
    monkeypatch.setattr(OptimizedAttention, "projected", lambda *args: batches.append(len(args[1])) or whole(*args))
    assert_close(outputs(case, copied), outputs(case, model))
    assert 1 in batches
    batches.clear()
    for module in copied.modules():
        if isinstance(module, OptimizedAttention):
            module.out_proj.register_forward_hook(lambda *_: None)
    assert_close(outputs(case, copied), outputs(case, model))
    assert batches and 1 not in batches  # who looks inside sees whole batches


@torch.no_grad()
def test_features_of_a_copy():
    model = CLASSES["contrastive"].model()
    copied = model.optimized()
    for normalize in (False, True):
        assert_close(
            [copied.get_image_features(pixels(), normalize), copied.get_text_features(tokens(), normalize)],
            [model.get_image_features(pixels(), normalize), model.get_text_features(tokens(), normalize)],
        )
    assert_close([copied.get_patch_features(pixels())], [model.get_patch_features(pixels())])


@torch.no_grad()
def test_a_copy_packs_images_of_several_sizes_and_shares_what_texts_begin_with():
    """As the model does, and to the same numbers."""
    model = CASES["contrastive"].model()
    copied, ids, mask = model.optimized(), tokens(6), torch.ones(2, 32, 32)
    ids[1:, :4] = ids[0, :4]
    mask[1, :, 16:] = 0
    for share in (True, False):
        expected = model.get_text_features(ids, share_prefixes=False)
        torch.testing.assert_close(copied.get_text_features(ids, share_prefixes=share), expected, **CLOSE)
    shown = {"pixel_values": pixels(2, 32, 32), "pixel_mask": mask}
    torch.testing.assert_close(copied.get_image_features(**shown), model.get_image_features(**shown), **CLOSE)
    alone = model.get_image_features(shown["pixel_values"][1:, :, :, :16])
    torch.testing.assert_close(copied.get_image_features(**shown)[1:], alone, **CLOSE)


@pytest.mark.parametrize("name", ["contrastive", "layer scale", "text", "depth", "map"])
@torch.no_grad()
def test_bfloat16_is_as_far_from_float32_as_the_models_own(name):
    case = CASES[name]

    def error(candidate: nn.Module, exact: list[torch.Tensor]) -> float:
        pairs = zip(outputs(case, candidate), exact)
        return sum(((one.float() - other).norm() / other.norm()).item() for one, other in pairs)

    errors = []
    for seed in range(8):
        model = case.model(seed)
        exact, half = outputs(case, model), copy.deepcopy(model).bfloat16()
        candidates = (half, half.optimized(), model.optimized(torch.bfloat16))
        errors.append([error(each, exact) for each in candidates])
        assert all(p.dtype == torch.bfloat16 for p in candidates[2].parameters())
    own, *copies = torch.tensor(errors).mean(dim=0).tolist()
    assert max(copies) <= 1.1 * own, (own, copies)


@torch.no_grad()
def test_weights_are_rounded_once_where_the_copy_is_made_in_another_dtype():
    model = CASES["classification"].model()
    fc1 = model.vision_model.encoder.layers[0].mlp.fc1.weight
    found = model.optimized(torch.bfloat16).vision_model.encoder.layers[0].mlp.up_proj.weight
    assert torch.equal(found, (1.702 * fc1).bfloat16())


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@torch.no_grad()
def test_a_copy_takes_any_attention(implementation):
    case = CLASSES["contrastive"]
    copied, expected = case.model().optimized(), outputs(case, case.model())
    use_attention(copied, implementation)
    assert_close(outputs(case, copied), expected)


@torch.no_grad()
def test_keys_without_a_bias_beside_queries_and_values_with_one():
    case = CASES["classification"]
    model = case.model()
    for layer in model.vision_model.encoder.layers:
        layer.self_attn.k_proj.bias = None
    assert_close(outputs(case, model.optimized()), outputs(case, model))


def test_the_model_stays_as_it_is_and_shares_nothing():
    model = CASES["layer scale"].model().train()
    model.vision_model.embeddings.requires_grad_(False)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    wants = [parameter.requires_grad for parameter in model.parameters()]
    copied = model.optimized()
    assert model.training and wants == [parameter.requires_grad for parameter in model.parameters()]
    assert before.keys() == model.state_dict().keys() and not model.is_optimized
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    storages = [{StorageWeakRef(p.untyped_storage()) for p in each.parameters()} for each in (model, copied)]
    assert not storages[0] & storages[1]
    assert copied.is_optimized and not any(each.training for each in copied.modules())
    assert not any(parameter.requires_grad for parameter in copied.parameters())


def test_gradients_flow_to_the_input_of_a_copy():
    case = CASES["classification"]
    model, found = case.model(), []
    for each in (model, model.optimized()):
        images = pixels().requires_grad_()
        each(images).logits.square().sum().backward()
        found.append([images.grad])
    assert_close(*found)


def test_input_gradients_asked_for_of_the_model_are_not_of_the_copy():
    model = CASES["classification"].model()
    model.enable_input_require_grads()
    assert not model.optimized()(pixels()).logits.requires_grad
    assert model(pixels()).logits.requires_grad


@pytest.mark.parametrize("name", mostly_heavy(CLASSES, "contrastive", "depth, dpt"))
def test_a_copy_is_one_graph(name):
    case = CLASSES[name]
    torch._dynamo.reset()
    copied = case.model().optimized()
    with torch.no_grad():
        assert_close(outputs(case, torch.compile(copied, backend="eager", fullgraph=True)), outputs(case, copied))


@torch.no_grad()
def test_a_copy_exports_and_its_mlp_is_whole_there(monkeypatch):
    monkeypatch.setattr(optimized_vit_embed, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(optimized_vit_embed, "is_traced", lambda: seen.append(is_traced()) or is_traced())
    seen, copied = [], CASES["classification"].model().optimized()
    dims = {"pixel_values": {0: torch.export.Dim("batch")}}
    program = torch.export.export(copied, (), {"pixel_values": pixels()}, dynamic_shapes=dims)
    assert seen and all(seen)
    assert_close([program.module()(pixel_values=pixels(5)).logits], [copied(pixels(5)).logits])


@torch.no_grad()
def test_a_copy_of_a_copy_a_pickle_and_a_state_dict():
    case = CASES["layer scale"]
    model = case.model()
    copied = model.optimized()
    expected, file = outputs(case, copied), io.BytesIO()
    torch.save(copied, file)
    file.seek(0)
    others = [copy.deepcopy(copied), copied.optimized(), torch.load(file, weights_only=False)]
    others.append(case.model(seed=1).optimized())
    others[-1].load_state_dict(copied.state_dict())
    for other in others:
        assert other is not copied and other.is_optimized
        assert_close(outputs(case, other), expected)
    for one, other in ((model, copied), (copied, model)):
        with pytest.raises(RuntimeError, match="Missing key"):
            one.load_state_dict(other.state_dict())


@torch.no_grad()
def test_a_copy_at_another_dtype_and_image_size():
    case = CASES["classification"]
    model = case.model().double()
    copied = model.optimized()
    torch.testing.assert_close(
        copied(pixels().double()).logits, model(pixels().double()).logits, rtol=1e-12, atol=1e-12
    )
    assert copied.float()(pixels()).logits.dtype == torch.float32
    for each in (model.float(), copied):
        each.set_image_size((48, 64))
    assert_close([copied(pixels(height=48, width=64)).logits], [model(pixels(height=48, width=64)).logits])


@torch.no_grad()
def test_hooks_of_towers_and_layers_come_along_and_others_may_keep_what_they_see():
    model, seen = CASES["classification"].model(), []
    model.vision_model.register_forward_hook(lambda *_: seen.append("tower"))
    model.vision_model.encoder.layers[1].register_forward_hook(lambda *_: seen.append("layer"))
    copied = model.optimized()
    copied(pixels())
    assert seen == ["layer", "tower"]
    mlp, kept = copied.vision_model.encoder.layers[0].mlp, []
    mlp.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    mlp.up_proj.register_forward_hook(lambda module, inputs, output: kept.append(output))
    copied(pixels())
    torch.testing.assert_close(kept[1], nn.functional.linear(kept[0], mlp.up_proj.weight, mlp.up_proj.bias))


def with_lora(model):
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))


def with_hook(model):
    model.vision_model.encoder.layers[1].mlp.fc1.register_forward_hook(print)


def with_another_layer(model):
    model.vision_model.encoder.layers[0].self_attn.q_norm = nn.LayerNorm(8)


def on_meta(model):
    model.vision_model.encoder.layers[0].mlp.to("meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_lora, r"layers\.0\.self_attn\.q_proj is a peft.*Linear, not an nn\.Linear; merge adapters"),
        (with_hook, r"layers\.1\.mlp\.fc1 has hooks, which would be lost; remove them"),
        (with_another_layer, r"layers\.0\.self_attn, a VitEmbedAttention of \['q_proj'.*got .*'q_norm'\]"),
        (on_meta, r"mlp\.fc1\.weight is a Parameter of torch\.float32 on meta; expected an ordinary parameter"),
    ],
)
def test_what_would_be_lost_is_refused(change, message):
    model = CASES["classification"].model()
    change(model)
    with pytest.raises(ValueError, match=message):
        model.optimized()


@pytest.mark.parametrize("dtype", [torch.int8, "bfloat16"])
def test_a_dtype_that_is_none_of_floats(dtype):
    with pytest.raises(ValueError, match="dtype must be a torch.dtype of floats, .* got "):
        CASES["classification"].model().optimized(dtype)


def test_a_copy_neither_trains_nor_is_saved(tmp_path):
    model = CLASSES["contrastive"].model()
    model.save_pretrained(tmp_path / "model")
    copied = type(model).from_pretrained(tmp_path / "model").optimized()
    for part in (copied, copied.vision_model, copied.text_model):
        with pytest.raises(ValueError, match=r"save_pretrained needs the model itself, .*from_pretrained\(folder\)"):
            part.save_pretrained(tmp_path / "copy")
    with pytest.raises(ValueError, match=f"push_to_hub needs the model itself.* of '{tmp_path / 'model'}'"):
        copied.push_to_hub("somebody/copy")
    assert not (tmp_path / "copy").exists()
    with pytest.raises(ValueError, match="train the model that it was made of"):
        copied.train()
    assert not copied.eval().training


@pytest.mark.parametrize("wants_gradients", [False, True])
def test_quick_gelu_is_transformers_bit_for_bit(wants_gradients):
    values = pixels().requires_grad_(wants_gradients)
    assert torch.equal(activation("quick_gelu")(values), ACT2FN["quick_gelu"](values))
    assert torch.equal(values, pixels())
