"""Where a training step computes gradients in its own way: the same values and gradients as the plain way.

Float32: rounding of sums in another order. bfloat16: no further from float32 than the plain way's own bfloat16.
"""

import contextlib

import pytest
import torch
from catalogue import CLASSES
from tiny import CLOSE, pixels, tokens
from torch import nn
from torch.func import functional_call, grad, hessian, vmap
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vit_embed import VitEmbedForContrastive, encoder_vit_embed
from vit_embed.activations_vit_embed import QuickGELU, activation
from vit_embed.encoder_vit_embed import _HostAttention

PLAIN, FAST = ACT2FN["quick_gelu"], activation("quick_gelu")


def contrastive(**fields) -> VitEmbedForContrastive:
    model = CLASSES["contrastive"].model(**fields)
    model.set_attn_implementation("sdpa")
    return model.train()


def autocast(dtype: torch.dtype):
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype=dtype)


def gradients(model: nn.Module, dtype: torch.dtype, call=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and all gradients of a step, in one row."""
    model.zero_grad()
    with autocast(dtype):
        loss = (model if call is None else call)(pixel_values=pixels(), input_ids=tokens(), return_loss=True).loss
    loss.backward()
    found = [each.grad.flatten() for each in model.parameters() if each.grad is not None]
    return loss.detach(), torch.cat(found)


def test_quick_gelu_has_the_plain_gradients_of_every_kind():
    values = (3 * torch.randn(4, 7, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(FAST, values, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(FAST, values)
    for transformed in (lambda f: vmap(grad(lambda row: f(row).sin().sum())), lambda f: hessian(lambda x: f(x).sum())):
        torch.testing.assert_close(transformed(FAST)(values.detach()), transformed(PLAIN)(values.detach()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quick_gelu_keeps_its_input_alone(dtype):
    values, upstream = torch.randn(2, 64, 32, dtype=torch.float64)
    found, kept = {}, {}
    for name, function, as_dtype in (("fast", FAST, dtype), ("plain", PLAIN, dtype), ("exact", PLAIN, torch.float64)):
        given, kept[name] = values.to(as_dtype).requires_grad_(), []
        keep = kept[name].append
        with torch.autograd.graph.saved_tensors_hooks(lambda saved, keep=keep: keep(saved) or saved, lambda x: x):
            result = function(given)
        found[name] = torch.autograd.grad(result, given, upstream.to(as_dtype))[0]
    assert len(kept["fast"]) == 1 < len(kept["plain"])
    if dtype == torch.float32:
        return torch.testing.assert_close(found["fast"], found["plain"], **CLOSE)
    errors = {name: (found[name] - found["exact"]).norm() for name in ("fast", "plain")}
    assert errors["fast"] <= errors["plain"]


@pytest.mark.parametrize("rows, is_causal", [(5, False), (5, True), (1, False)])
@pytest.mark.parametrize("scores_at_once", [2**20, 1])
def test_attention_of_the_host_has_torchs_gradients(rows, is_causal, scores_at_once, monkeypatch):
    monkeypatch.setattr(encoder_vit_embed, "SCORES_AT_ONCE", scores_at_once)
    query, key, value = (torch.randn(3, n, 2, 4, dtype=torch.float64).transpose(1, 2) for n in (rows, 5, 5))
    states = [each.requires_grad_() for each in (query, key, value)]
    upstream = torch.randn(3, rows, 2, 4, dtype=torch.float64).transpose(1, 2)
    mixed = _HostAttention.apply(*states, is_causal, 0.3)
    expected = F.scaled_dot_product_attention(*states, is_causal=is_causal, scale=0.3)
    torch.testing.assert_close(mixed, expected)
    found = torch.autograd.grad(mixed, states, upstream)
    torch.testing.assert_close(found, torch.autograd.grad(expected, states, upstream))
    assert [each.stride() for each in found] == [each.stride() for each in states]  # nothing copied on the way back
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda *given: _HostAttention.apply(*given, is_causal, 0.3), states)


def test_where_the_host_attends(monkeypatch):
    calls = []
    spied = type("Spied", (), {"apply": lambda *given: calls.append(1) or _HostAttention.apply(*given)})
    monkeypatch.setattr(encoder_vit_embed, "_HostAttention", spied)
    model = contrastive()

    def count(dtype=torch.bfloat16, wants_gradients=True) -> int:
        calls.clear()
        with torch.set_grad_enabled(wants_gradients), autocast(dtype):
            model(pixel_values=pixels(), input_ids=tokens())
        return len(calls)

    text_layers = model.config.text_config.num_hidden_layers
    assert count() == model.config.num_hidden_layers + text_layers - 1  # the text's last layer has a mask
    assert count(torch.float32) == count(wants_gradients=False) == 0
    monkeypatch.setattr(encoder_vit_embed, "MAX_HOST_TOKENS", 7)
    assert count() < text_layers + 1
    monkeypatch.undo()
    monkeypatch.setattr(encoder_vit_embed, "_HostAttention", spied)
    monkeypatch.setitem(
        encoder_vit_embed.ALL_ATTENTION_FUNCTIONS, "sdpa", lambda *a, **k: sdpa_attention_forward(*a, **k)
    )
    assert count() == 0  # somebody's own is taken as it is
    monkeypatch.undo()
    monkeypatch.setattr(encoder_vit_embed, "_HostAttention", spied)
    model.config.attention_dropout = 0.5
    assert count() == text_layers - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_the_plain_step(dtype, monkeypatch):
    model = contrastive()
    with monkeypatch.context() as plain:
        plain.setattr(QuickGELU, "forward", lambda self, values: PLAIN(values))
        plain.setattr(encoder_vit_embed, "ATTENTIONS", {})
        plain.setattr(encoder_vit_embed, "as_product_input", lambda states: states)
        _, exact = gradients(model, torch.float32)
        plain_loss, plain_gradients = gradients(model, dtype)
    loss, found = gradients(model, dtype)
    torch.testing.assert_close(loss, plain_loss, rtol=1e-6, atol=0)
    if dtype == torch.float32:
        torch.testing.assert_close(found, exact, **CLOSE)
    else:
        assert (found - exact).norm() <= 1.1 * (plain_gradients - exact).norm()


def test_float64_stays_float64_under_autocast():
    model = CLASSES["classification"].model().double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(pixels().double()).logits.dtype == torch.float64


def test_projections_share_one_copy_under_autocast():
    model, seen = contrastive(), []
    attention = model.vision_model.encoder.layers[0].self_attn
    for name in "qkv":
        getattr(attention, f"{name}_proj").register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    for dtype in (torch.bfloat16, torch.float32):
        seen.clear()
        with autocast(dtype):
            model(pixel_values=pixels(), input_ids=tokens())
        assert {each.dtype for each in seen} == {dtype} and len({each.data_ptr() for each in seen}) == 1


@pytest.mark.parametrize("how", ["compile", "checkpoint"])
def test_a_step_under(how):
    model = contrastive()
    _, exact = gradients(model, torch.float32)
    loss, expected = gradients(model, torch.bfloat16)
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if how == "compile" else None
    if how == "checkpoint":
        model.gradient_checkpointing_enable()
    found_loss, found = gradients(model, torch.bfloat16, call)
    torch.testing.assert_close(found_loss, loss, rtol=1e-2, atol=0)
    assert (found - exact).norm() <= 1.5 * (expected - exact).norm()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_each_sample():
    model = CLASSES["classification"].model().train()
    model.set_attn_implementation("sdpa")
    model.set_input_checks("never")
    weights, labels = {name: p.detach() for name, p in model.named_parameters()}, torch.tensor([0, 1, 2])

    def loss(weights, image, label):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return functional_call(model, weights, (), {"pixel_values": image[None], "labels": label[None]}).loss

    found = vmap(grad(loss), in_dims=(None, 0, 0))(weights, pixels(), labels)
    for i in range(3):
        alone = grad(loss)(weights, pixels()[i], labels[i])
        together, apart = (
            torch.cat([each[name].flatten() for name in alone]) for each in ({n: g[i] for n, g in found.items()}, alone)
        )
        assert (together - apart).norm() <= 0.02 * apart.norm()
