"""Classification: the losses of a row of logits, for classes, several labels and numbers.

Symbols: B batch.
"""

import torch
from torch.nn import functional as F

from .configuration_vit_embed import VitEmbedConfig
from .inputs_vit_embed import (
    IGNORED_LABEL,
    ChecksValues,
    check_class_numbers,
    check_class_values,
    check_multi_label_values,
    check_targets,
)


def class_loss(logits: torch.Tensor, labels: torch.Tensor, module: ChecksValues) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy: logits (B, num_labels), and (B,) class numbers of which IGNORED_LABEL is left out."""
    check_class_numbers(labels, logits)
    if module.checks_values(labels):
        check_class_values(labels, logits.shape[1])
    total = F.cross_entropy(logits.float(), labels.long(), ignore_index=IGNORED_LABEL, reduction="sum")
    return total, (labels != IGNORED_LABEL).sum()


def multi_label_loss(
    logits: torch.Tensor, labels: torch.Tensor, module: ChecksValues
) -> tuple[torch.Tensor, torch.Tensor]:
    """Binary cross-entropy: logits and targets (B, num_labels) in [0, 1], of which IGNORED_LABEL and NaN are left
    out."""
    targets = check_targets(labels, logits, "multi_label_classification").float()
    known = (targets != IGNORED_LABEL) & ~targets.isnan()
    if module.checks_values(targets):
        check_multi_label_values(targets, known)
    # What is left out becomes a target of 0 first, so that no NaN reaches the gradients.
    cells = F.binary_cross_entropy_with_logits(logits.float(), targets.where(known, 0.0), reduction="none")
    return cells.where(known, 0.0).sum(), known.sum()


def regression_loss(
    logits: torch.Tensor, labels: torch.Tensor, module: ChecksValues
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared error of numbers: logits and targets (B, num_labels), or targets (B,) for one."""
    targets = check_targets(labels, logits, "regression")
    total = F.mse_loss(logits.float(), targets.float(), reduction="sum")
    return total, torch.ones_like(targets).sum()


# Logits, labels and the module that decides on checks of values -> the sum of the losses, and of how many items.
# The names are `options_vit_embed.PROBLEM_TYPES`.
CLASSIFICATION_LOSSES = {
    "single_label_classification": class_loss,
    "multi_label_classification": multi_label_loss,
    "regression": regression_loss,
}


def classification_loss(
    config: VitEmbedConfig, logits: torch.Tensor, labels: torch.Tensor, module: ChecksValues
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the losses of a batch and of how many items, by the problem that config and labels state."""
    problem = problem_type(config.problem_type, labels, config.num_labels)
    return CLASSIFICATION_LOSSES[problem](logits, labels, module)


def problem_type(stated: str | None, labels: torch.Tensor, num_labels: int) -> str:
    """The config's `problem_type`, or where it states none what transformers takes: numbers for one label are
    regression, anything else is classes.

    Raises:
        ValueError: whole numbers for one label, which may be either.
    """
    if stated is not None or num_labels > 1 or not isinstance(labels, torch.Tensor):
        return stated or "single_label_classification"
    if not labels.is_floating_point():
        raise ValueError(
            f"num_labels=1 and labels are {labels.dtype}: with one class cross-entropy has nothing to tell apart; set "
            "config.problem_type to 'regression' or 'multi_label_classification', or num_labels to that of your data"
        )
    return "regression"
