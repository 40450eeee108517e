"""What a classifier's outputs are worth, by kind of problem, and the file of its predictions.

Symbols: N rows, K outputs.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, r2_score
from transformers import EvalPrediction

from recipes.files import written_aside
from recipes.problems import MULTI, REGRESSION, SINGLE, SOFT, UNKNOWN, Problem

PREDICTIONS_FILE = "predictions.csv"
THRESHOLD = 0.5  # probability from which a picture has a label


class Outputs(NamedTuple):
    """What a model says of some rows.

    Args:
        values: (N, K) probabilities, or values of a regression.
        targets: (N,) or (N, K) as `Problem.target` gives them; None without labels.
        known: (N,) rows with a label, or (N, K) entries of several.
    """

    values: np.ndarray
    targets: np.ndarray | None
    known: np.ndarray


def outputs_of(problem: Problem, logits: np.ndarray, targets: np.ndarray | None) -> Outputs:
    scores = torch.from_numpy(np.asarray(logits)).float()
    values = SCORES[problem.kind](scores).numpy()
    if targets is None:
        return Outputs(values, None, np.zeros(len(values), dtype=bool))
    if problem.kind == REGRESSION:
        return Outputs(values, targets, np.isfinite(targets).all(axis=1))
    known = targets != UNKNOWN
    return Outputs(values, targets, known.all(axis=1) if problem.kind == SOFT else known)


# What the pipeline "image-classification" makes of logits, too.
SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    SINGLE: lambda logits: logits.softmax(dim=1),
    SOFT: lambda logits: logits.softmax(dim=1),
    MULTI: torch.Tensor.sigmoid,
    REGRESSION: lambda logits: logits,
}


# --- metrics ---


class Metrics:
    """Trainer's `compute_metrics` of a problem: over the rows with labels; {} where there are none."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        outputs = outputs_of(self.problem, prediction.predictions, prediction.label_ids)
        return METRICS[self.problem.kind](self.problem, outputs) if outputs.known.any() else {}


def _of_classes(problem: Problem, outputs: Outputs) -> dict[str, float]:
    """Accuracy, and F1 as the mean over the labels that occur."""
    targets, guessed = outputs.targets[outputs.known], outputs.values[outputs.known].argmax(axis=1)
    return {
        "accuracy": float(accuracy_score(targets, guessed)),
        "macro_f1": float(f1_score(targets, guessed, average="macro", zero_division=0)),
    }


def _of_shares(problem: Problem, outputs: Outputs) -> dict[str, float]:
    """Accuracy of the most probable label, and cross-entropy, nats a row."""
    targets, values = outputs.targets[outputs.known], outputs.values[outputs.known]
    return {
        "accuracy": float((targets.argmax(axis=1) == values.argmax(axis=1)).mean()),
        "cross_entropy": float(-(targets * np.log(values.clip(1e-12))).sum(axis=1).mean()),
    }


def average_precisions(outputs: Outputs) -> np.ndarray:
    """(K,) the area under precision and recall of each label over the rows that know of it; NaN where none has it."""
    found = np.full(outputs.values.shape[1], np.nan)
    for label, known in enumerate(outputs.known.T):
        is_there = outputs.targets[known, label] > THRESHOLD
        if is_there.any():
            found[label] = average_precision_score(is_there, outputs.values[known, label])
    return found


def _of_several(problem: Problem, outputs: Outputs) -> dict[str, float]:
    """Mean average precision and macro F1 over the labels that occur; micro F1; and how many rows are all right."""
    known, is_there = outputs.known, (outputs.targets > THRESHOLD) & outputs.known
    is_said = (outputs.values >= THRESHOLD) & known
    right, wrong = (is_there & is_said).sum(axis=0), (is_there ^ is_said).sum(axis=0)
    occurs, rows = is_there.any(axis=0), known.any(axis=1)
    f1 = 2 * right / np.maximum(2 * right + wrong, 1)
    precisions = average_precisions(outputs)
    found = {
        "micro_f1": float(2 * right.sum() / max(2 * right.sum() + wrong.sum(), 1)),
        "exact_match": float((is_there == is_said).all(axis=1)[rows].mean()),
    }
    if occurs.any():
        found = {
            "mean_average_precision": float(precisions[occurs].mean()),
            "macro_f1": float(f1[occurs].mean()),
        } | found
    return found


def _of_values(problem: Problem, outputs: Outputs) -> dict[str, float]:
    """Mean absolute error and root mean squared error in the unit of the data, and R2; of each column by its name."""
    targets, values = outputs.targets[outputs.known], outputs.values[outputs.known]
    found = {}
    for column, name in enumerate(problem.names):
        error = values[:, column].astype(float) - targets[:, column].astype(float)
        start = f"{name}_" if len(problem.names) > 1 else ""
        found |= {f"{start}mae": float(np.abs(error).mean()), f"{start}rmse": float(np.sqrt(np.square(error).mean()))}
        if len(error) > 1:  # R2 compares with the mean, which is one row itself
            found[f"{start}r2"] = float(r2_score(targets[:, column], values[:, column]))
    if len(problem.names) > 1 and len(targets) > 1:
        found["mean_r2"] = float(np.mean([value for name, value in found.items() if name.endswith("_r2")]))
    return found


METRICS = {SINGLE: _of_classes, SOFT: _of_shares, MULTI: _of_several, REGRESSION: _of_values}


# --- predictions ---


def write_predictions(problem: Problem, names: Sequence[object], logits: np.ndarray, path: Path) -> None:
    """Writes a csv with a line a row: its name, and the label and its probability, or a column for each output.

    Args:
        names: of the rows, as their user knows them.
        logits: (N, K).
    """
    values = outputs_of(problem, logits, None).values
    if problem.config_type == SINGLE:
        header = ("row", "label", "probability")
        guessed = values.argmax(axis=1)
        lines = [(problem.names[guess], f"{row[guess]:.6g}") for guess, row in zip(guessed, values)]
    else:
        # A name of an output may be "row", too.
        header = ("row", *problem.names)
        digits = ".9g" if problem.kind == REGRESSION else ".6g"  # 9 digits tell any two numbers of float32 apart
        lines = [tuple(format(float(value), digits) for value in row) for row in values]
    with written_aside(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(header)
        table.writerows((name, *line) for name, line in zip(names, lines, strict=True))
