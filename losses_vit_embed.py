"""Losses as pure functions of tensors: contrastive image-text, and depth with missing pixels.

Symbols: B batch, H W pixels, D width of the joint space.
"""

import math

import torch
import torch.distributed as dist
from torch.nn import functional as F

from .configuration_vit_embed import (
    MAX_INVERSE_TEMPERATURE,
)

MAX_LOGIT_SCALE = math.log(MAX_INVERSE_TEMPERATURE)


def bounded_logit_scale(logit_scale: torch.Tensor) -> torch.Tensor:
    """exp(logit_scale) in float32, at most MAX_INVERSE_TEMPERATURE. The gradient is zero above the bound."""
    return logit_scale.float().clamp(max=MAX_LOGIT_SCALE).exp()


def same_group(group_ids: torch.Tensor) -> torch.Tensor:
    """(B,) group of each pair -> (B, B) bool, True where image i and text j are of two pairs of one group."""
    same = group_ids[:, None] == group_ids
    return same & ~torch.eye(len(group_ids), dtype=torch.bool, device=group_ids.device)


def softmax_contrastive_loss(
    logits: torch.Tensor, ignored: torch.Tensor | None = None, hard_negative_beta: float = 0.0
) -> torch.Tensor:
    """Symmetric cross-entropy of (B, B) image-by-text logits whose diagonal are the pairs.

    Args:
        logits: (B, B), images by texts.
        ignored: (B, B) bool, True for cells off the diagonal that are nobody's negatives: no denominator holds them.
        hard_negative_beta: how much more the negatives count that look like the pair, see `weigh_negatives`.

    Source: arXiv:2103.00020 figure 3.
    """
    by_image, by_text = logits, logits.t()
    if hard_negative_beta:
        negatives = ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        negatives = negatives if ignored is None else negatives & ~ignored
        by_image = weigh_negatives(by_image, negatives, hard_negative_beta)
        by_text = weigh_negatives(by_text, negatives.t(), hard_negative_beta)
    if ignored is not None:
        by_image, by_text = by_image.masked_fill(ignored, -math.inf), by_text.masked_fill(ignored.t(), -math.inf)
    targets = torch.arange(logits.shape[0], device=logits.device)
    return (F.cross_entropy(by_image, targets) + F.cross_entropy(by_text, targets)) / 2


def weigh_negatives(logits: torch.Tensor, negatives: torch.Tensor, beta: float) -> torch.Tensor:
    """Adds to each negative's logit the log of its weight exp(beta * logit) / mean over the negatives of its row.

    In a softmax the negative then counts that many times. The weights have a mean of 1 in each row and a gradient, as
    in the reference code; its correction for negatives that belong together (tau+) is 0 here: `group_ids` name them.

    Args:
        logits: (rows, columns), a row of cosines over the temperature for each anchor.
        negatives: (rows, columns) bool; a row may have none.
        beta: concentration, 0 for equal weights.

    Source: arXiv:2010.04592 section 3 and github.com/joshr17/HCL (image/main.py, estimator "hard").
    """
    # The lowest number, not -inf: a row without negatives would have NaN for a gradient.
    hardness = (beta * logits).masked_fill(~negatives, torch.finfo(logits.dtype).min)
    count = negatives.sum(dim=1, keepdim=True).clamp(min=1)
    log_weights = hardness - hardness.logsumexp(dim=1, keepdim=True) + count.log()
    return torch.where(negatives, logits + log_weights, logits)


def sigmoid_contrastive_loss(logits: torch.Tensor, ignored: torch.Tensor | None = None) -> torch.Tensor:
    """Every (image, text) cell of (B, B) logits as its own binary decision, summed and divided by B.

    Args:
        logits: (B, B), images by texts.
        ignored: (B, B) bool, True for cells off the diagonal that the sum leaves out.

    Source: arXiv:2303.15343 algorithm 1.
    """
    signs = 2 * torch.eye(logits.shape[0], device=logits.device, dtype=logits.dtype) - 1
    cells = F.logsigmoid(signs * logits)
    return -(cells if ignored is None else cells.masked_fill(ignored, 0)).sum() / logits.shape[0]


CONTRASTIVE_LOSSES = {"softmax": softmax_contrastive_loss, "sigmoid": sigmoid_contrastive_loss}


class _GatherRows(torch.autograd.Function):
    """(B, D) of this process -> (processes, B, D); the gradient of every process's loss comes back to its rows."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()  # reduced in place
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()]


def gather_batch(embeds: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, in order of rank, with gradients to the process they came from.

    With DistributedDataParallel, which averages gradients, a loss of the gathered rows computed on every process gives
    loss and gradients of one process on the joined batch. Batches may differ in size. Without a process group, or
    with one process, the input itself.

    Args:
        embeds: (B, D) of this process.

    Returns:
        (sum of B over processes, D).
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return embeds
    own_size = torch.tensor([embeds.shape[0]], device=embeds.device)
    sizes = [torch.empty_like(own_size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, own_size)
    sizes = [int(size) for size in sizes]
    padded = F.pad(embeds, (0, 0, 0, max(sizes) - embeds.shape[0]))
    parts = _GatherRows.apply(padded.contiguous())
    return torch.cat([part[:size] for part, size in zip(parts, sizes)])


def contrastive_logits(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scaled cosines of unit-length rows, (images, texts), in float32 whatever the inputs are.

    Args:
        image_embeds, text_embeds: (images, D) and (texts, D), unit length.
        logit_scale: scalar, natural log of the inverse temperature; bounded where there is no bias. SigLIP's has no
            bound: that of google/siglip-base-patch16-224 is beyond OpenAI's.
        logit_bias: scalar added to every cell, or None.
    """
    with torch.autocast(device_type=image_embeds.device.type, enabled=False):
        scale = bounded_logit_scale(logit_scale) if logit_bias is None else logit_scale.float().exp()
        logits = scale * (image_embeds.float() @ text_embeds.float().t())
        return logits if logit_bias is None else logits + logit_bias.float()


def valid_depth(depth: torch.Tensor) -> torch.Tensor:
    """True where a depth label means something: finite and above zero."""
    return torch.isfinite(depth) & (depth > 0)


def _masked_sum(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Sum over the valid entries; 0, with zero gradients, where there are none."""
    return torch.where(valid, values, torch.zeros_like(values)).sum()


def _masked_mean(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean over the valid entries; 0, with zero gradients, where there are none."""
    return _masked_sum(values, valid) / valid.sum().clamp(min=1)


def _log_error(predicted_depth: torch.Tensor, depth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log(pred / depth) in float32, any number where there is no label; and where there is one."""
    valid = valid_depth(depth)
    # Left-out labels become 1, so that no log of NaN reaches the gradients.
    smallest = torch.finfo(torch.float32).tiny
    predicted = predicted_depth.float().clamp(min=smallest)
    target = torch.where(valid, depth.float(), torch.ones_like(predicted))
    return predicted.log() - target.log(), valid


def silog_loss(predicted_depth: torch.Tensor, depth: torch.Tensor, variance_focus: float = 0.5) -> torch.Tensor:
    """Scale-invariant log loss over valid pixels: Var(e) + (1 - variance_focus) * mean(e)^2, e = log(pred / depth).

    The variance is taken about the mean, in float32: the textbook form mean(e^2) - mean(e)^2 cancels to noise once
    predictions are good.

    Args:
        predicted_depth, depth: (B, H, W), same unit, predictions positive; labels <= 0, NaN or inf are left out.
        variance_focus: 1 ignores a global scale, 0 is the plain squared log error.

    Source: arXiv:1406.2283 equation 4 with lambda = 0.5.
    """
    error, valid = _log_error(predicted_depth, depth)
    mean = _masked_mean(error, valid)
    return _masked_mean((error - mean).square(), valid) + (1 - variance_focus) * mean.square()


def l1_depth_loss(predicted_depth: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
    """Mean absolute error over valid pixels, in the unit of the labels. (B, H, W) each."""
    valid = valid_depth(depth)
    target = torch.where(valid, depth.float(), torch.zeros_like(predicted_depth, dtype=torch.float32))
    return _masked_mean((predicted_depth.float() - target).abs(), valid)


def l2_depth_loss(predicted_depth: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
    """Mean squared error over valid pixels, in the squared unit of the labels. (B, H, W) each."""
    valid = valid_depth(depth)
    target = torch.where(valid, depth.float(), torch.zeros_like(predicted_depth, dtype=torch.float32))
    return _masked_mean((predicted_depth.float() - target).square(), valid)


def gradient_matching_loss(predicted_depth: torch.Tensor, depth: torch.Tensor, scales: int = 4) -> torch.Tensor:
    """How much the steps of log depth between neighbours differ from the labels', at several scales.

    The sum over k = 0 ... scales - 1 of: every 2^k-th row and column of e = log(pred / depth) from the top left on;
    |e[y, x] - e[y, x + 1]| and |e[y, x] - e[y + 1, x]| summed over the pairs of which both have a label; divided by how
    many of that scale's pixels have one, in the whole batch. A scale without such a pair adds nothing. A global factor
    of the prediction changes nothing, a blurred edge costs at every scale that sees it.

    Args:
        predicted_depth, depth: (B, H, W), same unit, predictions positive; labels <= 0, NaN or inf are left out.
        scales: how many; 4 in the source.

    Source: arXiv:1804.00607 section 4.2 (on log depth), arXiv:1907.01341 equation 11 (scales by leaving out pixels).
    """
    error, valid = _log_error(predicted_depth, depth)
    total = error.new_zeros(())
    for step in (2**k for k in range(scales)):
        part, seen = error[:, ::step, ::step], valid[:, ::step, ::step]
        down = _masked_sum((part[:, 1:] - part[:, :-1]).abs(), seen[:, 1:] & seen[:, :-1])
        across = _masked_sum((part[:, :, 1:] - part[:, :, :-1]).abs(), seen[:, :, 1:] & seen[:, :, :-1])
        total = total + (down + across) / seen.sum().clamp(min=1)
    return total


DEPTH_LOSSES = {"silog": silog_loss, "l1": l1_depth_loss, "l2": l2_depth_loss}
