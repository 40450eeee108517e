"""Each loss against its formula written out, in value and gradient; missing depth; the scale's bound."""

import pytest
import torch

from vit_embed.losses_vit_embed import (
    DEPTH_LOSSES,
    bounded_logit_scale,
    gather_batch,
    sigmoid_contrastive_loss,
    softmax_contrastive_loss,
)


def naive_softmax(logits):
    by_image = [-(row[i] - row.exp().sum().log()) for i, row in enumerate(logits)]
    by_text = [-(column[i] - column.exp().sum().log()) for i, column in enumerate(logits.t())]
    return (sum(by_image) + sum(by_text)) / (2 * len(logits))


def naive_sigmoid(logits):
    size = len(logits)
    cells = [torch.log1p(torch.exp(-logits[i, j] * (1 if i == j else -1))) for i in range(size) for j in range(size)]
    return sum(cells) / size


def naive_depth(kind, predicted, depth):
    keep = [(p, d) for p, d in zip(predicted.flatten(), depth.flatten()) if d > 0 and torch.isfinite(d)]
    if kind == "l1":
        return sum((p - d).abs() for p, d in keep) / len(keep)
    if kind == "l2":
        return sum((p - d) ** 2 for p, d in keep) / len(keep)
    errors = [p.log() - d.log() for p, d in keep]
    return sum(e**2 for e in errors) / len(errors) - 0.5 * (sum(errors) / len(errors)) ** 2


def value_and_gradient(loss, argument):
    argument = argument.clone().requires_grad_(True)
    value = loss(argument)
    (gradient,) = torch.autograd.grad(value, argument)
    return value.detach(), gradient


@pytest.mark.parametrize(
    ("loss", "naive"), [(softmax_contrastive_loss, naive_softmax), (sigmoid_contrastive_loss, naive_sigmoid)]
)
def test_contrastive_losses_equal_their_formula(loss, naive):
    logits = 3 * torch.randn(5, 5, dtype=torch.float64)
    for found, expected in zip(value_and_gradient(loss, logits), value_and_gradient(naive, logits)):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", DEPTH_LOSSES)
def test_depth_losses_equal_their_formula_on_valid_pixels(kind):
    predicted = torch.rand(2, 4, 5) + 0.2
    depth = torch.rand(2, 4, 5) + 0.2
    depth[0, 0, :4] = torch.tensor([0.0, -1.0, float("nan"), float("inf")])
    found = value_and_gradient(lambda p: DEPTH_LOSSES[kind](p, depth), predicted)
    expected = value_and_gradient(lambda p: naive_depth(kind, p, depth), predicted)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)  # float32 sums of 36 terms
    assert (found[1][0, 0, :4] == 0).all(), "a missing pixel pulls at nothing"


@pytest.mark.parametrize("kind", DEPTH_LOSSES)
@pytest.mark.parametrize("missing", [0.0, -2.0, float("nan"), float("inf")])
def test_nothing_valid_is_loss_zero_and_gradient_zero(kind, missing):
    value, gradient = value_and_gradient(
        lambda p: DEPTH_LOSSES[kind](p, torch.full((2, 3, 3), missing)), torch.rand(2, 3, 3) + 0.1
    )
    assert value == 0 and (gradient == 0).all()


def test_silog_ignores_scale_as_told_and_does_not_cancel():
    depth = torch.rand(1, 16, 16) + 1.0
    scaled = DEPTH_LOSSES["silog"](1.001 * depth, depth)
    # Half the squared log of the scale, 5e-7: the textbook difference of means loses it in float32 rounding.
    assert scaled.item() == pytest.approx(0.5 * torch.tensor(1.001).double().log().item() ** 2, rel=1e-2)


def test_logit_scale_bound():
    assert bounded_logit_scale(torch.tensor(2.0)).item() == pytest.approx(7.389056)
    assert bounded_logit_scale(torch.tensor(9.0)).item() == pytest.approx(100.0)
    value, gradient = value_and_gradient(bounded_logit_scale, torch.tensor(9.0))
    assert gradient == 0


def test_gathering_without_a_process_group_is_the_input_itself():
    embeds = torch.randn(3, 4)
    assert gather_batch(embeds) is embeds
