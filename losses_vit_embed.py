"""What the losses share: how a sum over items becomes a mean, also where one step has several batches."""

import torch


def total_items(count: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
    """What a sum over the items of this batch is divided by: scalar, at least 1.

    Args:
        count: items of this batch.
        num_items_in_batch: items of all the batches of a training step, over gradient accumulation and processes, as
            transformers' Trainer gives it; None where this batch is the whole step. Trainer gives a replica of
            `nn.DataParallel` a tensor (1, 1).
    """
    if num_items_in_batch is None:
        return count.clamp(min=1)
    total = torch.as_tensor(num_items_in_batch, device=count.device)
    return total.flatten()[0].clamp(min=1)


def with_stem_loss(
    loss: torch.Tensor, stem_loss: torch.Tensor | None, share: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """A head's loss and what the stem adds to it, if anything; `share` is this batch's of the training step."""
    return loss if stem_loss is None else loss + share * stem_loss


def step_loss(
    total: torch.Tensor,
    count: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None,
    stem_loss: torch.Tensor | None,
) -> torch.Tensor:
    """What a batch adds to the loss of its training step: scalar; 0 where it has nothing to learn from.

    Args:
        total, count: the sum of the losses of this batch, and of how many items.
        num_items_in_batch: as in `total_items`.
        stem_loss: of this batch, or None.
    """
    items = total_items(count, num_items_in_batch)
    return with_stem_loss(total / items, stem_loss, 1.0 if num_items_in_batch is None else count / items)
