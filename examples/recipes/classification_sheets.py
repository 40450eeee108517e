"""Sheets of an evaluation of a classifier: on the left what is mixed up or how far off, on the right the worst rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from datasets import Dataset
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix
from transformers.trainer_utils import EvalLoopOutput

from recipes.classification_metrics import THRESHOLD, Outputs, average_precisions, outputs_of
from recipes.drawing import draw_picture, save_figure, short
from recipes.problems import MULTI, REGRESSION, SINGLE, SOFT, UNKNOWN, Problem
from recipes.reading.tables import ROW
from vit_embed.retrieval.pictures import as_rgb

# The worst rows, and the labels on the left at most.
NUM_SHOWN, MOST_LABELS, MOST_PLOTS = 20, 25, 4


class DrawMistakes:
    """Draws an evaluation of each split; without labels what is said of the rows, the least sure first."""

    def __init__(self, rows_of: dict[str, Dataset], problem: Problem) -> None:
        self.rows_of, self.problem = rows_of, problem

    def __call__(self, output: EvalLoopOutput, path: Path) -> None:
        rows, problem = self.rows_of[path.name.split("-")[0]], self.problem
        outputs = outputs_of(problem, output.predictions, output.label_ids)
        shown = MOST_PLOTS if problem.kind == REGRESSION else min(len(problem.names), MOST_LABELS)
        columns, size = NUM_SHOWN // 4, 2.5 + 0.35 * shown
        figure = Figure(figsize=(size + 1.6 * columns, max(size, 7.0)), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(size, 1.6 * columns))
        if outputs.known.any():
            DRAWN[problem.kind](left, problem, outputs)
            badness = BADNESS[problem.kind](outputs)
            worst = np.argsort(-badness, kind="stable")
            worst = worst[badness[worst] > 0]
            count = min(len(worst), NUM_SHOWN)
            title = f"{count} worst of {len(worst)} mistakes" if len(worst) else "no mistakes"
            if problem.kind in (REGRESSION, SOFT):
                title = f"{count} of {len(badness)} rows, the worst first"
            right.suptitle(title, fontsize=10)
        else:
            _draw_said(left.subplots(), problem, outputs)
            worst = np.argsort(_sureness(problem, outputs), kind="stable")
            right.suptitle(f"no labels: {min(len(worst), NUM_SHOWN)} of {len(worst)} rows", fontsize=10)
        for axis in right.subplots(4, columns).flat:
            axis.axis("off")
        for row, axis in zip(map(int, worst[:NUM_SHOWN]), right.axes):
            text = said(problem, outputs.values[row])
            if outputs.targets is not None and np.any(outputs.known[row]):
                text += f"\nis {true(problem, outputs.targets[row])}"
            draw_picture(axis, as_rgb(rows[row]["image"]), f"{short(rows[row][ROW])}\n{text}")
        save_figure(figure, path)


# --- rows ---


def said(problem: Problem, values: np.ndarray) -> str:
    """What the model says of a row."""
    if problem.kind == REGRESSION:
        return _numbers(problem, values)
    if problem.kind == MULTI:
        return _several(problem, values >= THRESHOLD)
    return f"{problem.names[values.argmax()]}, {values.max():.0%} sure"


def true(problem: Problem, target: np.ndarray) -> str:
    """What a row's label says."""
    if problem.kind == REGRESSION:
        return _numbers(problem, target)
    if problem.kind == MULTI:
        return _several(problem, (target > THRESHOLD) & (target != UNKNOWN))
    if problem.kind == SOFT:
        return f"{problem.names[target.argmax()]}, {target.max():.0%}"
    return problem.names[int(target)]


def _numbers(problem: Problem, values: np.ndarray) -> str:
    if len(values) == 1:
        return f"{values[0]:.6g}"
    return ", ".join(f"{name} {value:.6g}" for name, value in zip(problem.names[:MOST_PLOTS], values))


def _several(problem: Problem, is_there: np.ndarray) -> str:
    return ", ".join(problem.names[place] for place in np.flatnonzero(is_there)) or "none"


def _sureness(problem: Problem, outputs: Outputs) -> np.ndarray:
    """(N,) how sure the model is, where nothing is known of the rows; of numbers their order."""
    if problem.kind == REGRESSION:
        return np.arange(len(outputs.values))
    if problem.kind == MULTI:
        return np.abs(outputs.values - THRESHOLD).min(axis=1)
    return outputs.values.max(axis=1)


def _wrong_and_sure(outputs: Outputs) -> np.ndarray:
    guessed = outputs.values.argmax(axis=1)
    return np.where(outputs.known & (guessed != outputs.targets), outputs.values.max(axis=1), 0.0)


def _divergence(outputs: Outputs) -> np.ndarray:
    """(N,) cross-entropy above the least that is possible, nats."""
    targets = np.where(outputs.known[:, None], outputs.targets, 0.0)
    return (targets * (np.log(targets.clip(1e-12)) - np.log(outputs.values.clip(1e-12)))).sum(axis=1)


def _wrong_labels(outputs: Outputs) -> np.ndarray:
    """(N,) the largest distance of a label's probability from what is true, where that is a mistake."""
    distance = np.where(outputs.known, np.abs(outputs.values - outputs.targets), 0.0).max(axis=1)
    return np.where(distance > THRESHOLD, distance, 0.0)


def _error(outputs: Outputs) -> np.ndarray:
    """(N,) the largest error of a row, each column in units of its spread."""
    spread = np.maximum(np.nanstd(outputs.targets, axis=0), 1e-12)
    return np.nan_to_num(np.abs(outputs.values - outputs.targets) / spread).max(axis=1)


# (outputs) -> (N,) how bad each row is, 0 where it is right or unknown.
BADNESS = {SINGLE: _wrong_and_sure, SOFT: _divergence, MULTI: _wrong_labels, REGRESSION: _error}


# --- the left side ---


def _draw_confusion(figure, problem: Problem, outputs: Outputs) -> None:
    """Which labels were mistaken for which."""
    targets, guessed = outputs.targets[outputs.known], outputs.values[outputs.known].argmax(axis=1)
    targets = targets.argmax(axis=1) if targets.ndim == 2 else targets
    counts = confusion_matrix(targets, guessed, labels=np.arange(len(problem.names)))
    wrong = counts.sum(axis=0) + counts.sum(axis=1) - 2 * counts.diagonal()
    shown = np.sort(np.argsort(-wrong, kind="stable")[:MOST_LABELS])
    display = ConfusionMatrixDisplay(counts[np.ix_(shown, shown)], display_labels=np.array(problem.names)[shown])
    axes = figure.subplots()
    display.plot(ax=axes, cmap="Blues", colorbar=False, xticks_rotation="vertical")
    hidden = "" if len(shown) == len(problem.names) else f", the {len(shown)} of {len(problem.names)} most mixed up"
    axes.set_title(f"{(guessed == targets).sum()} of {len(targets)} right{hidden}", fontsize=10)


def _draw_precisions(figure, problem: Problem, outputs: Outputs) -> None:
    """The average precision of each label, the worst first."""
    precisions = average_precisions(outputs)
    shown = np.argsort(precisions, kind="stable")  # NaN last
    shown = shown[~np.isnan(precisions[shown])][:MOST_LABELS][::-1]
    axes = figure.subplots()
    counts = ((outputs.targets > THRESHOLD) & outputs.known).sum(axis=0)
    axes.barh([f"{problem.names[place]} ({counts[place]})" for place in shown], precisions[shown], color="tab:blue")
    hidden = "" if len(shown) == len(problem.names) else f", the worst {len(shown)} of {len(problem.names)}"
    axes.set(xlim=(0, 1))
    axes.set_title(f"average precision{hidden}", fontsize=10)


def _draw_dots(figure, problem: Problem, outputs: Outputs) -> None:
    """True against predicted values, a plot a column; those with the largest errors where there are many."""
    targets, values = outputs.targets[outputs.known], outputs.values[outputs.known]
    shown = range(min(len(problem.names), MOST_PLOTS))
    for axes, column in zip(figure.subplots(len(shown), 1, squeeze=False).flat, shown):
        low, high = (limit(np.concatenate([targets[:, column], values[:, column]])) for limit in (np.min, np.max))
        axes.plot([low, high], [low, high], color="tab:grey", linewidth=1)
        axes.plot(targets[:, column], values[:, column], ".", alpha=0.5)
        axes.set(xlabel=f"true {problem.names[column]}", ylabel="predicted")
    if len(problem.names) > len(shown):
        figure.suptitle(f"the first {len(shown)} of {len(problem.names)}", fontsize=10)


DRAWN = {SINGLE: _draw_confusion, SOFT: _draw_confusion, MULTI: _draw_precisions, REGRESSION: _draw_dots}


def _draw_said(axes: Axes, problem: Problem, outputs: Outputs) -> None:
    """How often each label is said, or how values are spread."""
    if problem.kind == REGRESSION:
        for column, name in list(enumerate(problem.names))[:MOST_PLOTS]:
            axes.hist(outputs.values[:, column], bins=20, alpha=0.6, label=name)
        axes.legend()
        axes.set_title("predicted values", fontsize=10)
        return
    if problem.kind == MULTI:
        counts = (outputs.values >= THRESHOLD).sum(axis=0)
    else:
        counts = np.bincount(outputs.values.argmax(axis=1), minlength=len(problem.names))
    shown = np.argsort(-counts, kind="stable")[:MOST_LABELS][::-1]
    axes.barh([problem.names[place] for place in shown], counts[shown], color="tab:blue")
    axes.set_title("how often each label is said", fontsize=10)
