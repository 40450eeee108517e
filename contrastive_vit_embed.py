"""Contrastive learning of images and texts: logits, losses, batches of several processes, batches in chunks.

Symbols: B batch, b rows of this process, D width of the joint space.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .configuration_vit_embed import VitEmbedConfig
from .initialisation_vit_embed import fill
from .inputs_vit_embed import check_chunk_options, check_group_ids
from .options_vit_embed import MAX_INVERSE_TEMPERATURE
from .outputs_vit_embed import OutputOptions, VitEmbedModelOutput, asked_for

MAX_LOGIT_SCALE = math.log(MAX_INVERSE_TEMPERATURE)

# SigLIP's start: almost every pair of a batch is a negative (arXiv:2303.15343 section 3.2).
SIGMOID_LOGIT_BIAS_INIT = -10.0

# Of the logits of a joined batch, how many are there at a time: on a CPU about what its cache holds, elsewhere what
# fills a GPU (128 MiB); and of how many rows at least, as each chunk reads the embeddings of all.
CELLS_OF_A_CHUNK, CELLS_ON_A_CPU = 2**25, 2**20
LEAST_ROWS = 64


class _BoundFromAbove(torch.autograd.Function):
    """min(value, bound). Above the bound only a gradient that leads back below passes."""

    @staticmethod
    def forward(value: torch.Tensor, bound: float) -> torch.Tensor:
        return value.clamp(max=bound)

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor, float], output: torch.Tensor) -> None:
        value, ctx.bound = inputs
        ctx.save_for_backward(value)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (value,) = ctx.saved_tensors
        # Descent takes a step against the gradient.
        return gradient.where((value <= ctx.bound) | (gradient > 0), 0.0), None


def bounded_logit_scale(logit_scale: torch.Tensor) -> torch.Tensor:
    """exp(logit_scale) in float32, at most MAX_INVERSE_TEMPERATURE.

    OpenAI clamps the parameter itself, after each step. Here no forward pass writes to a parameter: what is computed
    with is bounded, and so is the gradient. An optimiser with momentum may carry the parameter a little beyond the
    bound, where it has no effect and from where its gradient leads back.
    """
    return _BoundFromAbove.apply(logit_scale.float(), MAX_LOGIT_SCALE).exp()


def temperature_scale(logit_scale: torch.Tensor, logit_bias: torch.Tensor | None) -> torch.Tensor:
    """What cosines are multiplied by, in float32; bounded where there is no bias."""
    return bounded_logit_scale(logit_scale) if logit_bias is None else logit_scale.float().exp()


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    has_autocast = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if has_autocast else contextlib.nullcontext()


def contrastive_logits(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scaled cosines of unit-length rows, (images, texts), in float32 whatever the inputs are, on the images' device.

    Args:
        image_embeds, text_embeds: (images, D) and (texts, D), unit length.
        logit_scale: scalar, natural log of the inverse temperature; bounded where there is no bias. SigLIP's has no
            bound: that of google/siglip-base-patch16-224 is beyond OpenAI's.
        logit_bias: scalar added to every cell, or None.
    """
    device = image_embeds.device
    with _without_autocast(device):
        scale = temperature_scale(logit_scale, logit_bias)
        logits = scale.to(device) * (image_embeds.float() @ text_embeds.float().t().to(device))
        return logits if logit_bias is None else logits + logit_bias.float().to(device)


def same_group(group_ids: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
    """(B,) group of each pair -> (b, B) bool of these rows, True where image i and text j are of two pairs of one
    group."""
    pair = torch.arange(group_ids.shape[0], device=group_ids.device)
    return (group_ids[rows, None] == group_ids) & (pair[rows, None] != pair)


class PairRows(NamedTuple):
    """Rows of image-by-text logits and of text-by-image ones, b of a batch of B pairs; b = B without other processes.

    by_image, by_text: (b, B), by_text None where no loss reads it. targets: (b,) index of each row's pair. ignored: (b,
    B) bool, True for cells off the pairs that are nobody's negatives; None for none.
    """

    by_image: torch.Tensor
    by_text: torch.Tensor | None
    targets: torch.Tensor
    ignored: torch.Tensor | None = None

    @classmethod
    def whole(cls, logits: torch.Tensor, ignored: torch.Tensor | None = None) -> "PairRows":
        """Of all (B, B) logits, whose diagonal are the pairs. `ignored` is symmetric."""
        return cls(logits, logits.t(), torch.arange(logits.shape[0], device=logits.device), ignored)


def softmax_contrastive_loss(rows: PairRows, hard_negative_beta: float = 0.0) -> torch.Tensor:
    """Symmetric cross-entropy, summed over the rows.

    Args:
        rows: the ignored cells are in no denominator.
        hard_negative_beta: how much more the negatives count that look like the pair, see `weigh_negatives`.

    Source: arXiv:2103.00020 figure 3.
    """
    total: float | torch.Tensor = 0.0
    for logits in (rows.by_image, rows.by_text):
        if hard_negative_beta:
            negatives = torch.ones_like(logits, dtype=torch.bool).scatter(1, rows.targets[:, None], False)
            negatives = negatives if rows.ignored is None else negatives & ~rows.ignored
            logits = weigh_negatives(logits, negatives, hard_negative_beta)
        if rows.ignored is not None:
            logits = logits.masked_fill(rows.ignored, -math.inf)
        total = total + F.cross_entropy(logits, rows.targets, reduction="sum") / 2
    return total


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


def sigmoid_contrastive_loss(rows: PairRows) -> torch.Tensor:
    """Every (image, text) cell as its own binary decision, summed over the rows of images; ignored cells are left out.

    Source: arXiv:2303.15343 algorithm 1.
    """
    pairs = rows.targets[:, None]
    cells = F.logsigmoid(rows.by_image.neg().scatter_(1, pairs, rows.by_image.gather(1, pairs)))
    return -(cells if rows.ignored is None else cells.masked_fill(rows.ignored, 0)).sum()


# PairRows -> the sum over them; the mean over the batch is the loss. The names are
# `options_vit_embed.CONTRASTIVE_LOSSES`.
CONTRASTIVE_LOSSES = {"softmax": softmax_contrastive_loss, "sigmoid": sigmoid_contrastive_loss}
# Those that read the rows of texts, too.
READS_TEXT_ROWS = ("softmax",)


def has_other_processes() -> bool:
    """Whether this process trains together with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_sizes(batch: int, device: torch.device) -> list[int]:
    """B of every process, in order of rank. The host waits for it: no tensor can be gathered without its size."""
    own_size = torch.tensor([batch], device=device)
    sizes = [torch.empty_like(own_size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, own_size)
    return torch.cat(sizes).tolist()


class _GatherRows(torch.autograd.Function):
    """(B, D) of this process -> (processes, B, D); the gradient of every process's loss comes back to its rows."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> torch.Tensor:
        joined = rows.new_empty(dist.get_world_size(), *rows.shape)
        dist.all_gather(list(joined.unbind()), rows)
        return joined

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()  # reduced in place
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()]


def gather_batch(embeds: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """The rows of all processes, in order of rank, with gradients to the process they came from.

    Args:
        embeds: (B, D) of this process.
        sizes: B of every process; they may differ.

    Returns:
        (sum of B over processes, D).
    """
    if min(sizes) == max(sizes):
        return _GatherRows.apply(embeds.contiguous()).flatten(0, 1)
    padded = F.pad(embeds, (0, 0, 0, max(sizes) - embeds.shape[0]))
    parts = _GatherRows.apply(padded.contiguous())
    return torch.cat([part[:size] for part, size in zip(parts, sizes)])


class _MeanOverProcesses(torch.autograd.Function):
    """The mean of every process's value, with the gradient of this process's own."""

    @staticmethod
    def forward(ctx, value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value / dist.get_world_size()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class _MeanGradient(torch.autograd.Function):
    """The value itself, with the mean of every process's gradient: what DistributedDataParallel makes of it again, and
    what a parameter needs that a wrapper leaves alone (FSDP shards no scalars)."""

    @staticmethod
    def forward(ctx, value: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient / dist.get_world_size()


def _outside_graphs(reason: str) -> Callable[[Callable], Callable]:
    """Makes a function that torch.compile leaves out of its graphs, and says why; torch 2.6 has no word for the
    reason."""

    def decorate(function: Callable) -> Callable:
        try:
            return torch.compiler.disable(function, reason=reason)
        except TypeError:
            return torch.compiler.disable(function)

    return decorate


class _SumOfChunks(torch.autograd.Function):
    """The sum of `loss(rows, *inputs)` over chunks of rows, each with its gradient right after it: what is kept for the
    backward pass are the gradients of the inputs."""

    @staticmethod
    def forward(ctx, loss: Callable, chunks: list[slice], *inputs: torch.Tensor | None) -> torch.Tensor:
        needed = ctx.needs_input_grad[2:]
        leaves = [each if each is None else each.detach().requires_grad_(need) for each, need in zip(inputs, needed)]
        learning = [each for each in leaves if each is not None and each.requires_grad]
        total = leaves[0].new_zeros(())
        for rows in chunks:
            with torch.enable_grad():
                part = loss(rows, *leaves)
            if learning:
                torch.autograd.backward(part, inputs=learning)
            total += part.detach()
        ctx.save_for_backward(*(each if each is None else each.grad for each in leaves))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *(each if each is None else each * gradient.to(each.device) for each in ctx.saved_tensors)


@_outside_graphs("torch.compile knows no function that takes gradients in its forward pass")
def _sum_of_chunks(loss: Callable, chunks: list[slice], *inputs: torch.Tensor | None) -> torch.Tensor:
    if torch.is_grad_enabled():
        return _SumOfChunks.apply(loss, chunks, *inputs)
    return torch.stack([loss(rows, *inputs) for rows in chunks]).sum()


def joined_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor | None,
    group_ids: torch.Tensor | None,
    loss: Callable[[PairRows], torch.Tensor],
    reads_text_rows: bool,
) -> torch.Tensor:
    """The loss of the joined batch of all processes: value and, with wrappers that average gradients as
    DistributedDataParallel does, gradients are those of one process with all the rows. Each process computes the rows
    of its own images and texts, a chunk of the logits at a time.

    Args:
        image_embeds, text_embeds: (b, D) of this process, unit length; b may differ between processes.
        logit_scale, logit_bias: as in `contrastive_logits`.
        group_ids: (b,) int64 in every process, or None in every one.
        loss: the sum over rows. reads_text_rows: whether it reads by_text.
    """
    device, num_own = image_embeds.device, image_embeds.shape[0]
    sizes = gather_sizes(num_own, device)
    first, num_all = sum(sizes[: dist.get_rank()]), sum(sizes)
    groups = None if group_ids is None else gather_batch(group_ids[:, None], sizes)[:, 0]
    bias = None if logit_bias is None else _MeanGradient.apply(logit_bias).float().to(device)

    def loss_of(rows: slice, images, texts, all_images, all_texts, bias) -> torch.Tensor:
        own = slice(first + rows.start, first + rows.stop)
        by_image = images[rows] @ all_texts.t()
        by_text = texts[rows] @ all_images.t() if reads_text_rows else None
        if bias is not None:
            by_image, by_text = by_image + bias, None if by_text is None else by_text + bias
        ignored = None if groups is None else same_group(groups, own)
        return loss(PairRows(by_image, by_text, torch.arange(own.start, own.stop, device=device), ignored))

    cells = CELLS_ON_A_CPU if device.type == "cpu" else CELLS_OF_A_CHUNK
    step = max(LEAST_ROWS, cells // num_all)
    chunks = [slice(start, min(start + step, num_own)) for start in range(0, num_own, step)]
    with _without_autocast(device):
        # The scale is in the rows rather than in the logits, which are more.
        scale = temperature_scale(_MeanGradient.apply(logit_scale), logit_bias).to(device)
        total = _sum_of_chunks(
            loss_of,
            chunks,
            scale * image_embeds.float(),
            scale * text_embeds.float() if reads_text_rows else None,
            gather_batch(image_embeds, sizes).float() if reads_text_rows else None,
            gather_batch(text_embeds, sizes).float(),
            bias,
        )
    return _MeanOverProcesses.apply(total * (len(sizes) / num_all))


def contrastive_loss(
    config: VitEmbedConfig,
    logits: torch.Tensor,
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor | None,
    group_ids: torch.Tensor | None,
    gather: bool,
) -> torch.Tensor:
    """The loss of a batch of pairs, or with `gather` of the joined batch of all processes.

    Args:
        logits: (B, B) of the embeds of this process, images by texts.
        others: as in `joined_loss`.
    """
    if group_ids is not None:
        check_group_ids(group_ids, logits.shape[0])
    beta = config.hard_negative_beta
    options = {"hard_negative_beta": beta} if beta else {}  # of the softmax loss alone, as the config sees to
    row_loss = functools.partial(CONTRASTIVE_LOSSES[config.contrastive_loss], **options)
    if gather and has_other_processes():
        text_embeds = text_embeds.to(image_embeds.device)
        reads_text_rows = config.contrastive_loss in READS_TEXT_ROWS
        return joined_loss(image_embeds, text_embeds, logit_scale, logit_bias, group_ids, row_loss, reads_text_rows)
    ignored = None if group_ids is None else same_group(group_ids).to(logits.device)
    return row_loss(PairRows.whole(logits, ignored)) / logits.shape[0]


@contextlib.contextmanager
def preserve_buffers(buffers: list[torch.Tensor]) -> Iterator[None]:
    """Restores the buffers, so that recomputing a chunk does not update batch norm twice."""
    values = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, values):
                buffer.copy_(value)


@_outside_graphs("torch.compile knows no checkpoint that restores buffers; compile the towers instead")
def _chunks_with_buffers(
    embed: Callable[..., ModelOutput], columns: list[list[torch.Tensor | None]], buffers: list[torch.Tensor]
) -> list[ModelOutput]:
    def contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        return contextlib.nullcontext(), preserve_buffers(buffers)

    return [checkpoint(embed, *chunk, use_reentrant=False, context_fn=contexts) for chunk in zip(*columns)]


def embed_in_chunks(
    embed: Callable[..., ModelOutput],
    inputs: tuple[torch.Tensor | None, ...],
    chunk_size: int,
    buffers: list[torch.Tensor],
) -> ModelOutput:
    """`embed(*inputs)` for at most `chunk_size` rows at a time: only the embeddings are kept, and the backward pass of
    a chunk embeds it again, with the same random numbers (cached gradients, arXiv:2101.06983).

    The gradients are those of the whole batch. What a batch is measured by is measured by the chunk: batch norm's
    statistics, whose running ones move once a chunk, and an adaptive stem's budget, of which the mean is taken.

    Args:
        embed: rows of the inputs -> an output with pooler_output (rows, D) and, of some stems, stem_loss.
        inputs: (B, ...) each, or None.
        chunk_size: rows.
        buffers: of the model.
    """
    batch = next(rows.shape[0] for rows in inputs if rows is not None)
    count = math.ceil(batch / chunk_size)
    if count <= 1:
        return embed(*inputs)
    # Even chunks: batch norm would see a remainder of one image.
    columns = [[None] * count if rows is None else rows.tensor_split(count) for rows in inputs]
    if buffers:
        parts = _chunks_with_buffers(embed, columns, buffers)
    else:
        parts = [checkpoint(embed, *chunk, use_reentrant=False) for chunk in zip(*columns)]
    joined = type(parts[0])(pooler_output=torch.cat([part.pooler_output for part in parts]))
    if parts[0].get("stem_loss") is not None:
        joined["stem_loss"] = sum(part.stem_loss * (part.pooler_output.shape[0] / batch) for part in parts)
    return joined


class ContrastiveMixin:
    """Of a dual encoder: its towers' unit vectors, in training a chunk at a time."""

    config: VitEmbedConfig
    training: bool
    vision_model: nn.Module
    text_model: nn.Module
    visual_projection: nn.Module
    text_projection: nn.Module
    logit_scale: nn.Parameter
    logit_bias: nn.Parameter | None
    buffers: Callable[[], Iterator[torch.Tensor]]

    def init_parameters(self, config: VitEmbedConfig) -> None:
        fill(self.logit_scale, nn.init.constant_, val=config.logit_scale_init_value)
        fill(self.logit_bias, nn.init.constant_, val=SIGMOID_LOGIT_BIAS_INIT)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        """As in transformers, for the text tower."""
        return self.text_model.resize_token_embeddings(*args, **kwargs)

    def _image_embeds(self, pixel_values, patch_embeds, pixel_mask, **options) -> VitEmbedModelOutput:
        """The image tower's output, whose pooler_output is the unit vector in the joint space."""
        images = self.vision_model(
            pixel_values, patch_embeds, pixel_mask, pooled_only=True, return_dict=True, **options
        )
        images.pooler_output = F.normalize(self.visual_projection(images.pooler_output), dim=-1)
        return images

    def _text_embeds(self, input_ids, attention_mask, position_ids, **options) -> BaseModelOutputWithPooling:
        """The text tower's output, whose pooler_output is the unit vector in the joint space."""
        texts = self.text_model(input_ids, attention_mask, position_ids, pooled_only=True, return_dict=True, **options)
        texts.pooler_output = F.normalize(self.text_projection(texts.pooler_output), dim=-1)
        return texts

    @property
    def _is_training_step(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _in_chunks(self, embed, inputs: tuple[torch.Tensor | None, ...], options: OutputOptions):
        """`embed(*inputs, **options)`, in a training step `contrastive_chunk_size` rows at a time."""
        chunk_size = self.config.contrastive_chunk_size
        if chunk_size is None or not self._is_training_step:
            return embed(*inputs, **options)
        check_chunk_options(chunk_size, *asked_for(self.config, *map(options.get, OutputOptions.__annotations__)))
        return embed_in_chunks(functools.partial(embed, **options), inputs, chunk_size, list(self.buffers()))
