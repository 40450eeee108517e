"""Each loss against its formula written out, in value and gradient; missing depth; pairs of one group."""

import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
from tiny import dual_config, pixels, tokens

from vit_embed import VitEmbedForContrastive, contrastive_vit_embed
from vit_embed.contrastive_vit_embed import (
    MAX_LOGIT_SCALE,
    PairRows,
    bounded_logit_scale,
    contrastive_logits,
    same_group,
)
from vit_embed.depth_vit_embed import DEPTH_LOSSES, gradient_matching_loss, valid_depth

BETA = 0.7


def softmax_contrastive_loss(logits, ignored=None, beta=0.0):
    """The mean over the pairs of a batch."""
    rows = PairRows.whole(logits, ignored)
    return contrastive_vit_embed.softmax_contrastive_loss(rows, beta) / len(logits)


def sigmoid_contrastive_loss(logits, ignored=None):
    """The mean over the pairs of a batch."""
    return contrastive_vit_embed.sigmoid_contrastive_loss(PairRows.whole(logits, ignored)) / len(logits)


def depth_loss(loss, predicted, depth, *options):
    """The mean over the images of a batch."""
    return loss(predicted, depth, valid_depth(depth), *options).mean()


NAN, INF = float("nan"), float("inf")


def naive_softmax(logits, ignored=None, beta=0.0):
    total = 0
    for rows, left_out in ((logits, ignored), (logits.t(), None if ignored is None else ignored.t())):
        for i, row in enumerate(rows):
            negatives = [row[j] for j in range(len(row)) if j != i and not (left_out is not None and left_out[i, j])]
            mean = sum((beta * s).exp() for s in negatives) / max(1, len(negatives))
            total += (row[i].exp() + sum((beta * s).exp() / mean * s.exp() for s in negatives)).log() - row[i]
    return total / (2 * len(logits))


def naive_sigmoid(logits, ignored=None):
    size = len(logits)
    cells = [(i, j) for i in range(size) for j in range(size) if not (ignored is not None and ignored[i, j])]
    return sum(torch.log1p(torch.exp(-logits[i, j] * (1 if i == j else -1))) for i, j in cells) / size


def naive_depth_of_image(kind, predicted, depth):
    keep = [(p, d) for p, d in zip(predicted.flatten(), depth.flatten()) if d > 0 and torch.isfinite(d)]
    if kind == "l1":
        return sum((p - d).abs() for p, d in keep) / len(keep)
    if kind == "l2":
        return sum((p - d) ** 2 for p, d in keep) / len(keep)
    errors = [p.log() - d.log() for p, d in keep]
    return sum(e**2 for e in errors) / len(errors) - 0.5 * (sum(errors) / len(errors)) ** 2


def naive_gradient_matching(predicted, depth):
    total = 0 * predicted.sum()
    for step in (1, 2, 4, 8):
        coarse, labels = predicted[::step, ::step], depth[::step, ::step]
        places = torch.nonzero(torch.isfinite(labels) & (labels > 0)).tolist()
        error = {(y, x): (coarse[y, x] / labels[y, x]).log() for y, x in places}
        pairs = [((y, x), (y + dy, x + dx)) for y, x in error for dy, dx in ((0, 1), (1, 0))]
        total = total + sum((error[p] - error[q]).abs() for p, q in pairs if q in error) / max(1, len(error))
    return total


def value_and_gradient(loss, argument):
    argument = argument.clone().requires_grad_(True)
    value = loss(argument)
    (gradient,) = torch.autograd.grad(value, argument)
    return value.detach(), gradient


def assert_equal_loss(loss, naive, argument, **tolerance):
    for found, expected in zip(value_and_gradient(loss, argument), value_and_gradient(naive, argument)):
        torch.testing.assert_close(found, expected, **tolerance)


# --- contrastive -----------------------------------------------------------------------------------------------------


GROUPS = {
    "none": None,
    "none alike": [4, 0, 1, 2, 3],
    "two pairs alike": [7, 1, 7, 2, 1],
    "all alike": [3, 3, 3, 3, 3],
    # Their difference is lost in float32 and in int32.
    "large ids": [2**40, 2**40 + 1, 2**40, -1, 2**62],
}


SOFTMAX, SIGMOID = (softmax_contrastive_loss, naive_softmax), (sigmoid_contrastive_loss, naive_sigmoid)


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize(
    ("loss", "naive", "options"), [(*SOFTMAX, ()), (*SIGMOID, ()), *((*SOFTMAX, (beta,)) for beta in (0.25, BETA, 2.0))]
)
def test_contrastive_losses_equal_their_formula(loss, naive, options, groups):
    """Pairs of one group are not negatives of each other."""
    logits, ignored = 3 * torch.randn(5, 5, dtype=torch.float64), None
    if groups is not None:
        ignored = same_group(torch.tensor(groups))
        assert ignored.tolist() == [[i != j and groups[i] == groups[j] for j in range(5)] for i in range(5)]
        gradient = value_and_gradient(lambda z: loss(z, ignored, *options), logits)[1]
        assert (gradient[ignored] == 0).all() and gradient.isfinite().all()
    assert_equal_loss(lambda z: loss(z, ignored, *options), lambda z: naive(z, ignored, *options), logits)


@pytest.mark.parametrize("beta", [0.0, BETA, 20.0])
def test_logits_at_the_bound_and_of_one_pair_give_finite_losses_and_gradients(beta):
    logits = 100 * (2 * torch.rand(5, 5) - 1)
    value, gradient = value_and_gradient(lambda z: softmax_contrastive_loss(z, None, beta), logits)
    assert value.isfinite() and gradient.isfinite().all()
    value, gradient = value_and_gradient(lambda z: softmax_contrastive_loss(z, None, beta), torch.tensor([[3.0]]))
    assert value == 0 and (gradient == 0).all(), "no negatives, no loss"


def test_logit_scale_bound():
    assert bounded_logit_scale(torch.tensor(2.0)).item() == pytest.approx(7.389056)
    assert bounded_logit_scale(torch.tensor(9.0)).item() == pytest.approx(100.0)
    # Beyond the bound a step back passes, and a step further out does not.
    for sign, expected in ((1.0, 100.0), (-1.0, 0.0)):
        gradient = value_and_gradient(lambda scale, s=sign: s * bounded_logit_scale(scale), torch.tensor(9.0))[1]
        assert gradient.item() == pytest.approx(expected)


@pytest.mark.parametrize("logit_bias", [None, torch.tensor(-10.0, dtype=torch.bfloat16)])
def test_logits_are_float32_products_of_float32_whatever_autocast_says(logit_bias):
    rows = torch.nn.functional.normalize(torch.randn(2, 6, 64), dim=-1).bfloat16()
    scale = torch.tensor(9.0 if logit_bias is None else MAX_LOGIT_SCALE, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = contrastive_logits(*rows, scale, logit_bias)
    images, texts = rows.double()
    expected = scale.double().clamp(max=MAX_LOGIT_SCALE if logit_bias is None else math.inf).exp() * images @ texts.t()
    assert logits.dtype == torch.float32
    # Float32 rounding of a factor of 100; a product in bfloat16 would be off by up to 0.4.
    torch.testing.assert_close(logits.double(), expected + (logit_bias or 0), rtol=0, atol=2e-4)


# --- gathering -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_a_group", [False, True])
def test_a_process_without_others_calls_no_collective(monkeypatch, in_a_group):
    for name in ("all_gather", "all_reduce", "broadcast", "all_gather_into_tensor", "barrier"):
        monkeypatch.setattr(dist, name, lambda *args, **kwargs: pytest.fail("a collective was called"))
    if in_a_group:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = VitEmbedForContrastive(dual_config()).train()
        batch = {"pixel_values": pixels(), "input_ids": tokens(), "group_ids": torch.tensor([0, 1, 0])}
        model(**batch, gather_loss=True).loss.backward()
    finally:
        if in_a_group:
            dist.destroy_process_group()


# --- depth -----------------------------------------------------------------------------------------------------------


DEPTH_CASES = {
    **{kind: (DEPTH_LOSSES[kind], partial(naive_depth_of_image, kind), (4, 5), 0.1) for kind in DEPTH_LOSSES},
    "gradients": (gradient_matching_loss, naive_gradient_matching, (11, 19), 0.1),
    "gradients, few neighbours": (gradient_matching_loss, naive_gradient_matching, (8, 8), 0.6),
    "gradients, one row": (gradient_matching_loss, naive_gradient_matching, (1, 6), 0.0),
    "gradients, a corner": (gradient_matching_loss, naive_gradient_matching, (3, 2), 0.0),
}


@pytest.mark.parametrize("name", DEPTH_CASES)
def test_depth_losses_equal_their_formula_on_valid_pixels(name):
    loss, naive, shape, holes = DEPTH_CASES[name]
    predicted, depth = torch.rand(2, 2, *shape) + 0.2
    depth[torch.rand(depth.shape) < holes] = NAN
    places = torch.tensor([0.0, -1.0, NAN, INF][: shape[1] - 1])
    depth[0, 0, : len(places)] = places
    found = value_and_gradient(lambda p: depth_loss(loss, p, depth), predicted)
    expected = value_and_gradient(lambda p: sum(map(naive, p, depth)) / 2, predicted)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)  # float32 sums of up to 800 terms
    assert (found[1][~(depth.isfinite() & (depth > 0))] == 0).all(), "a missing pixel pulls at nothing"


@pytest.mark.parametrize("loss", [*DEPTH_LOSSES.values(), gradient_matching_loss], ids=[*DEPTH_LOSSES, "gradients"])
@pytest.mark.parametrize("missing", [0.0, -2.0, NAN, INF])
def test_nothing_valid_is_loss_zero_and_gradient_zero(loss, missing):
    depth = torch.full((2, 9, 9), missing)
    if loss is gradient_matching_loss:
        depth[:, 1::4, 1::2] = 2.0  # no two beside each other, and none on the coarser scales
    value, gradient = value_and_gradient(lambda p: depth_loss(loss, p, depth), torch.rand(2, 9, 9) + 0.1)
    assert value == 0 and (gradient == 0).all()


def test_silog_keeps_a_share_of_the_scale_and_does_not_cancel():
    depth = torch.rand(1, 16, 16) + 1.0
    scaled = depth_loss(DEPTH_LOSSES["silog"], 1.001 * depth, depth)
    # Half the squared log of the scale, 5e-7: the textbook difference of means loses it in float32 rounding.
    assert scaled.item() == pytest.approx(0.5 * torch.tensor(1.001).double().log().item() ** 2, rel=1e-2)
