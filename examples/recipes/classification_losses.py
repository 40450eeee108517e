"""Losses of the classification recipe beside the model's own: soft labels, class weights, and numbers in their units.

Each is a sum over the rows of a batch, divided by the rows or entries of the whole training step, so that gradient
accumulation and several processes change nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from recipes.models import base_model_of, towers_of
from recipes.problems import MULTI, REGRESSION, SINGLE, SOFT, UNKNOWN, Problem
from vit_embed.losses_vit_embed import step_loss

logger = logging.getLogger(__name__)

BALANCED = "balanced"


# --- weights of labels ---


def class_weights(problem: Problem, targets: np.ndarray, asked: Sequence[str]) -> torch.Tensor | None:
    """The weight of each label, or None where the command line asks for none.

    For one label a picture, and for probabilities of labels, their mean over the training rows is 1: the loss of an
    epoch is the weighted mean that torch.nn.CrossEntropyLoss(weight=...) gives, and a batch of common labels alone
    counts less than one of rare ones. For several labels a picture it is what the loss of a label that is there is
    multiplied by, as `pos_weight` of torch.nn.BCEWithLogitsLoss.

    Args:
        targets: of the training rows, none where there is no training.
        asked: "balanced", or NAME=WEIGHT of some labels; the others weigh 1.

    Raises:
        ValueError: it is neither; a name that is no label; numbers have no labels to weigh.
    """
    if not asked:
        return None
    if problem.kind == REGRESSION:
        raise ValueError(f"--class_weights {' '.join(asked)}: numbers have no labels to weigh; leave it out")
    if not len(targets):
        logger.warning("--class_weights %s: of training, of which there is none here; the loss is unweighted", asked)
        return None
    counts, others = _counts(problem, targets)
    if list(asked) == [BALANCED]:
        weights = np.where(counts > 0, others / np.maximum(counts, 1e-12), 1.0)
    else:
        weights = _named_weights(problem, asked)
    if problem.kind != MULTI:
        weights = weights * counts.sum() / (weights * counts).sum()
    return torch.tensor(weights, dtype=torch.float32)


def _counts(problem: Problem, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How often each label is there, and what "balanced" divides by it."""
    if problem.kind == SINGLE:
        counts = np.bincount(targets[targets != UNKNOWN], minlength=len(problem.names)).astype(float)
    else:
        counts = np.where(targets == UNKNOWN, 0, targets).sum(axis=0)
    if problem.kind == MULTI:
        return counts, (targets != UNKNOWN).sum(axis=0) - counts
    return counts, np.full(len(counts), counts.sum() / (counts > 0).sum())


def _named_weights(problem: Problem, asked: Sequence[str]) -> np.ndarray:
    weights = np.ones(len(problem.names))
    for pair in asked:
        name, _, number = pair.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if name not in problem.places or not 0 <= weight < np.inf:
            raise ValueError(
                f"expected --class_weights {BALANCED}, or LABEL=WEIGHT with a weight of at least 0, got {pair!r}; "
                f"labels are {', '.join(problem.names[:20])}"
            )
        weights[problem.places[name]] = weight
    if not weights.any():
        raise ValueError(f"expected a weight above 0, got --class_weights {' '.join(asked)}")
    return weights


# --- losses ---


class TargetLoss:
    """Trainer's `compute_loss_func`: (outputs, labels, num_items_in_batch) -> the loss of a batch.

    Args:
        weights: of the labels.
        smoothing: --label_smoothing_factor.
        spreads: of numbers, what the error of each is divided by.
        model: whose adaptive stem may add to the loss.
    """

    def __init__(
        self,
        problem: Problem,
        model: torch.nn.Module,
        weights: torch.Tensor | None = None,
        smoothing: float = 0.0,
        spreads: torch.Tensor | None = None,
    ) -> None:
        self.problem, self.weights, self.smoothing, self.spreads = problem, weights, smoothing, spreads
        self.stem_loss: torch.Tensor | None = None
        towers_of(base_model_of(model))[0].register_forward_hook(self._keep_stem_loss)

    def _keep_stem_loss(self, tower: torch.nn.Module, inputs: tuple, output) -> None:
        self.stem_loss = getattr(output, "stem_loss", None)

    def __call__(self, outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        logits = outputs["logits"].float()
        total, count = LOSSES[self.problem.kind](self, logits, labels)
        if num_items_in_batch is None:
            return step_loss(total, count, None, self.stem_loss)
        # Trainer gives nn.DataParallel the number once for each of its replicas, and multiplies the loss by how many.
        items = torch.as_tensor(num_items_in_batch, device=logits.device)
        entries = labels[0].numel()  # Trainer counts the entries of a row of labels
        per_row = entries if self.problem.kind == SOFT else 1
        return step_loss(total, count, items.flatten()[0] / per_row, self.stem_loss) / items.numel()


def _cross_entropy(loss: TargetLoss, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of class numbers (B,), or of probabilities (B, num_labels); a row of UNKNOWN is left out."""
    known = labels != UNKNOWN if labels.ndim == 1 else (labels != UNKNOWN).all(dim=1)
    weights = None if loss.weights is None else loss.weights.to(logits.device)
    total = F.cross_entropy(
        logits[known], labels[known], weight=weights, label_smoothing=loss.smoothing, reduction="sum"
    )
    return total, known.sum()


def _binary_cross_entropy(loss: TargetLoss, logits: torch.Tensor, labels: torch.Tensor):
    known = labels != UNKNOWN
    weights = None if loss.weights is None else loss.weights.to(logits.device)
    cells = F.binary_cross_entropy_with_logits(logits, labels.where(known, 0.0), pos_weight=weights, reduction="none")
    return cells.where(known, 0.0).sum(), known.sum()


def _squared_error(loss: TargetLoss, logits: torch.Tensor, labels: torch.Tensor):
    known = labels.isfinite()
    spreads = torch.ones(()) if loss.spreads is None else loss.spreads
    cells = ((logits - labels.where(known, 0.0)) / spreads.to(logits.device)).square()
    return cells.where(known, 0.0).sum(), known.sum()


# (loss, logits, labels) -> the sum over rows or entries, and how many.
LOSSES = {
    SINGLE: _cross_entropy,
    SOFT: _cross_entropy,
    MULTI: _binary_cross_entropy,
    REGRESSION: _squared_error,
}


# --- numbers in their units ---


class UnitLinear(torch.nn.Linear):
    """A linear layer whose outputs are in the units of the data, trained as if each had a spread of about 1.

    output = spread * (weight x + bias): with an optimizer such as AdamW, whose steps have the size of the learning
    rate, an output of thousands would hardly move. A state dict holds spread * weight and spread * bias, so every
    checkpoint is that of a plain linear layer and predicts values in their units. The spreads are powers of two:
    saving and loading them rounds nothing.
    """

    spreads: torch.Tensor

    @classmethod
    def of(cls, layer: torch.nn.Linear, spreads: torch.Tensor, means: torch.Tensor | None) -> UnitLinear:
        """The same outputs as `layer`; with `means` a new one, whose outputs all are these.

        Args:
            spreads, means: (out_features,) of the training rows.
        """
        new = cls(layer.in_features, layer.out_features, device=layer.weight.device, dtype=layer.weight.dtype)
        new.register_buffer("spreads", 2.0 ** spreads.log2().round(), persistent=False)
        with torch.no_grad():
            if means is None:
                new.load_state_dict(layer.state_dict())
            else:
                new.weight.zero_()
                new.bias.copy_(means / new.spreads)
        return new

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        # In float32 under autocast, too: bfloat16 has 8 bits, so years would be rounded to multiples of 8.
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(self.weight.dtype)) * self.spreads

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"] * self.spreads[:, None]
        destination[f"{prefix}bias"] = destination[f"{prefix}bias"] * self.spreads

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        scaled = dict(state_dict)
        for name, spreads in ((f"{prefix}weight", self.spreads[:, None]), (f"{prefix}bias", self.spreads)):
            if name in scaled:
                scaled[name] = scaled[name] / spreads.to(scaled[name].device)
        super()._load_from_state_dict(scaled, prefix, *args, **kwargs)
