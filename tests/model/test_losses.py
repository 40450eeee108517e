"""Each loss against its formula written out, in value and gradient; missing depth; pairs of one group; the scale's
bound; what a process without others pays."""

import math

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


def naive_depth(kind, predicted, depth):
    return sum(naive_depth_of_image(kind, *image) for image in zip(predicted, depth)) / len(depth)


def naive_depth_of_image(kind, predicted, depth):
    keep = [(p, d) for p, d in zip(predicted.flatten(), depth.flatten()) if d > 0 and torch.isfinite(d)]
    if kind == "l1":
        return sum((p - d).abs() for p, d in keep) / len(keep)
    if kind == "l2":
        return sum((p - d) ** 2 for p, d in keep) / len(keep)
    errors = [p.log() - d.log() for p, d in keep]
    return sum(e**2 for e in errors) / len(errors) - 0.5 * (sum(errors) / len(errors)) ** 2


def naive_gradient_matching(predicted, depth, scales=4):
    images = zip(predicted[:, None], depth[:, None])
    return sum(naive_gradient_matching_of_image(*image, scales) for image in images) / len(depth)


def naive_gradient_matching_of_image(predicted, depth, scales):
    total = 0 * predicted.sum()
    for step in (2**k for k in range(scales)):
        coarse, labels = predicted[:, ::step, ::step], depth[:, ::step, ::step]
        places = torch.nonzero(torch.isfinite(labels) & (labels > 0)).tolist()
        error = {(b, y, x): (coarse[b, y, x] / labels[b, y, x]).log() for b, y, x in places}
        pairs = [((b, y, x), (b, y + dy, x + dx)) for b, y, x in error for dy, dx in ((0, 1), (1, 0))]
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


@pytest.mark.parametrize(
    ("loss", "naive"), [(softmax_contrastive_loss, naive_softmax), (sigmoid_contrastive_loss, naive_sigmoid)]
)
def test_contrastive_losses_equal_their_formula(loss, naive):
    assert_equal_loss(loss, naive, 3 * torch.randn(5, 5, dtype=torch.float64))


GROUPS = {
    "none alike": [4, 0, 1, 2, 3],
    "two pairs alike": [7, 1, 7, 2, 1],
    "all alike": [3, 3, 3, 3, 3],
    # Their difference is lost in float32 and in int32.
    "large ids": [2**40, 2**40 + 1, 2**40, -1, 2**62],
}


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize(
    ("loss", "naive"), [(softmax_contrastive_loss, naive_softmax), (sigmoid_contrastive_loss, naive_sigmoid)]
)
def test_pairs_of_one_group_are_not_negatives_of_each_other(loss, naive, groups):
    logits, ignored = 3 * torch.randn(5, 5, dtype=torch.float64), same_group(torch.tensor(groups))
    assert ignored.tolist() == [[i != j and groups[i] == groups[j] for j in range(5)] for i in range(5)]
    assert_equal_loss(lambda z: loss(z, ignored), lambda z: naive(z, ignored), logits)
    gradient = value_and_gradient(lambda z: loss(z, ignored), logits)[1]
    assert (gradient[ignored] == 0).all() and gradient.isfinite().all()


@pytest.mark.parametrize("groups", [None, *GROUPS.values()])
@pytest.mark.parametrize("beta", [0.25, BETA, 2.0])
def test_hard_negatives_equal_their_formula(beta, groups):
    ignored = None if groups is None else same_group(torch.tensor(groups))
    logits = 3 * torch.randn(5, 5, dtype=torch.float64)
    assert_equal_loss(
        lambda z: softmax_contrastive_loss(z, ignored, beta), lambda z: naive_softmax(z, ignored, beta), logits
    )


def test_hard_negatives_are_off_at_zero_and_pull_harder_at_the_most_similar():
    logits = 3 * torch.randn(6, 6)
    plain = value_and_gradient(softmax_contrastive_loss, logits)
    off = value_and_gradient(lambda z: softmax_contrastive_loss(z, None, 0.0), logits)
    assert all(torch.equal(one, other) for one, other in zip(plain, off))
    logits = torch.zeros(4, 4) + 4 * torch.eye(4)
    logits[0, 1] = 2.0  # the one hard negative
    share = [value_and_gradient(lambda z, b=b: softmax_contrastive_loss(z, None, b), logits)[1][0] for b in (0, BETA)]
    assert share[1][1] > 2 * share[0][1] > 0
    # Weights of mean 1: equal negatives weigh as ever.
    equal = torch.full((4, 4), 1.3) + torch.eye(4)
    torch.testing.assert_close(softmax_contrastive_loss(equal, None, BETA), softmax_contrastive_loss(equal))


@pytest.mark.parametrize("beta", [0.0, BETA])
def test_a_batch_of_one_pair_has_no_negatives_and_no_loss(beta):
    value, gradient = value_and_gradient(lambda z: softmax_contrastive_loss(z, None, beta), torch.tensor([[3.0]]))
    assert value == 0 and (gradient == 0).all()


@pytest.mark.parametrize("beta", [0.0, BETA, 20.0])
def test_logits_at_the_bound_give_finite_losses_and_gradients(beta):
    logits = 100 * (2 * torch.rand(5, 5) - 1)
    value, gradient = value_and_gradient(lambda z: softmax_contrastive_loss(z, None, beta), logits)
    assert value.isfinite() and gradient.isfinite().all()


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
    scale = torch.tensor(MAX_LOGIT_SCALE, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = contrastive_logits(*rows, scale, logit_bias)
    images, texts = rows.double()
    expected = scale.double().clamp(max=MAX_LOGIT_SCALE if logit_bias is None else math.inf).exp() * images @ texts.t()
    assert logits.dtype == torch.float32
    # Float32 rounding of a factor of 100; a product in bfloat16 would be off by up to 0.4.
    torch.testing.assert_close(logits.double(), expected + (logit_bias or 0), rtol=0, atol=2e-4)


# --- gathering -------------------------------------------------------------------------------------------------------


COLLECTIVES = ("all_gather", "all_reduce", "broadcast", "all_gather_into_tensor", "barrier")


@pytest.fixture
def no_collectives(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a collective was called")

    for name in COLLECTIVES:
        monkeypatch.setattr(dist, name, refuse)


@pytest.mark.parametrize("in_a_group", [False, True])
def test_a_process_without_others_calls_no_collective(no_collectives, in_a_group):
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


@pytest.mark.parametrize("kind", DEPTH_LOSSES)
def test_depth_losses_equal_their_formula_on_valid_pixels(kind):
    predicted = torch.rand(2, 4, 5) + 0.2
    depth = torch.rand(2, 4, 5) + 0.2
    depth[0, 0, :4] = torch.tensor([0.0, -1.0, NAN, INF])
    found = value_and_gradient(lambda p: depth_loss(DEPTH_LOSSES[kind], p, depth), predicted)
    expected = value_and_gradient(lambda p: naive_depth(kind, p, depth), predicted)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)  # float32 sums of 36 terms
    assert (found[1][0, 0, :4] == 0).all(), "a missing pixel pulls at nothing"


@pytest.mark.parametrize("holes", [0.0, 0.1, 0.6])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (11, 19), (1, 6), (3, 2)])
@pytest.mark.parametrize("scales", [1, 4])
def test_gradient_matching_equals_its_formula_on_valid_pairs(scales, height, width, holes):
    predicted, depth = torch.rand(2, 2, height, width) + 0.2
    depth[torch.rand(depth.shape) < holes] = NAN
    depth[0, 0, :2] = torch.tensor([-1.0, INF])
    assert_equal_loss(
        lambda p: depth_loss(gradient_matching_loss, p, depth, scales),
        lambda p: naive_gradient_matching(p, depth, scales),
        predicted,
        rtol=1e-4,
        atol=1e-6,  # float32 sums of up to 800 terms
    )
    gradient = value_and_gradient(lambda p: depth_loss(gradient_matching_loss, p, depth, scales), predicted)[1]
    assert (gradient[~(depth.isfinite() & (depth > 0))] == 0).all(), "a missing pixel pulls at nothing"


def test_gradient_matching_ignores_scale_and_minds_edges():
    depth = torch.ones(1, 16, 16)
    depth[:, :, 8:] = 3.0
    blurred = depth.clone()
    blurred[:, :, 7:9] = 3.0**0.5
    assert depth_loss(gradient_matching_loss, 2.5 * depth, depth) == pytest.approx(0.0, abs=1e-5)  # float32 logarithms
    # One edge of height ln 3 a row is missed: seen by 16 / 2^k of the (16 / 2^k)^2 pixels of scale k.
    flat = depth_loss(gradient_matching_loss, torch.ones_like(depth), depth)
    assert flat.item() == pytest.approx(math.log(3) * sum(2**k / 16 for k in range(4)), rel=1e-4)
    assert flat > depth_loss(gradient_matching_loss, blurred, depth) > 0.1 * flat


@pytest.mark.parametrize("loss", [*DEPTH_LOSSES.values(), gradient_matching_loss], ids=[*DEPTH_LOSSES, "gradients"])
@pytest.mark.parametrize("missing", [0.0, -2.0, NAN, INF])
def test_nothing_valid_is_loss_zero_and_gradient_zero(loss, missing):
    value, gradient = value_and_gradient(
        lambda p: depth_loss(loss, p, torch.full((2, 3, 3), missing)), torch.rand(2, 3, 3) + 0.1
    )
    assert value == 0 and (gradient == 0).all()


def test_labels_without_valid_neighbours_give_no_gradient_matching():
    depth = torch.full((2, 9, 9), NAN)
    depth[:, 1::4, 1::2] = 2.0  # no two beside each other, and none on the coarser scales
    value, gradient = value_and_gradient(
        lambda p: depth_loss(gradient_matching_loss, p, depth), torch.rand(2, 9, 9) + 0.1
    )
    assert value == 0 and (gradient == 0).all()


def test_silog_ignores_scale_as_told_and_does_not_cancel():
    depth = torch.rand(1, 16, 16) + 1.0
    scaled = depth_loss(DEPTH_LOSSES["silog"], 1.001 * depth, depth)
    # Half the squared log of the scale, 5e-7: the textbook difference of means loses it in float32 rounding.
    assert scaled.item() == pytest.approx(0.5 * torch.tensor(1.001).double().log().item() ** 2, rel=1e-2)
