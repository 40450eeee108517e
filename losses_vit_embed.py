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


def softmax_contrastive_loss(logits: torch.Tensor) -> torch.Tensor:
    """Symmetric cross-entropy of (B, B) image-by-text logits whose diagonal are the pairs.

    Source: arXiv:2103.00020 figure 3.
    """
    targets = torch.arange(logits.shape[0], device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.t(), targets)) / 2


def sigmoid_contrastive_loss(logits: torch.Tensor) -> torch.Tensor:
    """Every (image, text) cell of (B, B) logits as its own binary decision, summed and divided by B.

    Source: arXiv:2303.15343 algorithm 1.
    """
    signs = 2 * torch.eye(logits.shape[0], device=logits.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / logits.shape[0]


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


def _masked_mean(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean over the valid entries; 0, with zero gradients, where there are none."""
    return torch.where(valid, values, torch.zeros_like(values)).sum() / valid.sum().clamp(min=1)


def silog_loss(predicted_depth: torch.Tensor, depth: torch.Tensor, variance_focus: float = 0.5) -> torch.Tensor:
    """Scale-invariant log loss over valid pixels: Var(e) + (1 - variance_focus) * mean(e)^2, e = log(pred / depth).

    The variance is taken about the mean, in float32: the textbook form mean(e^2) - mean(e)^2 cancels to noise once
    predictions are good.

    Args:
        predicted_depth, depth: (B, H, W), same unit, predictions positive; labels <= 0, NaN or inf are left out.
        variance_focus: 1 ignores a global scale, 0 is the plain squared log error.

    Source: arXiv:1406.2283 equation 4 with lambda = 0.5.
    """
    valid = valid_depth(depth)
    # Left-out labels become 1, so that no log of NaN reaches the gradients.
    smallest = torch.finfo(torch.float32).tiny
    predicted = predicted_depth.float().clamp(min=smallest)
    target = torch.where(valid, depth.float(), torch.ones_like(predicted))
    error = predicted.log() - target.log()
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


DEPTH_LOSSES = {"silog": silog_loss, "l1": l1_depth_loss, "l2": l2_depth_loss}
