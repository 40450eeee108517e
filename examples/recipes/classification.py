"""The classification recipe: its flags, its rows and their labels, how pictures are varied, and its model."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, List
from kornia import augmentation
from sklearn.model_selection import train_test_split
from transformers import CLIPImageProcessor, TrainingArguments

from recipes import arguments as base
from recipes.arguments import SHIPPED_CHECKPOINT, RecipeArguments
from recipes.classification_losses import TargetLoss, UnitLinear
from recipes.data import Finding, Report, check_rows, picture_findings, random_rows
from recipes.models import load_model, prepare
from recipes.problems import (
    MULTI,
    PROBLEMS,
    REGRESSION,
    SINGLE,
    SOFT,
    UNKNOWN,
    Problem,
    cells_of,
    find_kind,
    find_separator,
    make_problem,
    say_alike,
)
from recipes.reading.labels import LAYOUTS, label_columns_of, some
from recipes.reading.layouts import read_splits
from recipes.reading.tables import IMAGE, PROBLEM, ROW
from recipes.trainer import asks_for_fsdp
from vit_embed import VitEmbedConfig, VitEmbedForImageClassification
from vit_embed.retrieval.pictures import as_rgb

logger = logging.getLogger(__name__)

MODES = ("linear", "full", "lora")


@dataclass
class ModelArguments(base.ModelArguments):
    """Which model to start from, and which part of it to train."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "checkpoint to start from; default: the one of this repo"}
    )
    mode: str = field(default="full", metadata={"help": "what is trained: linear, full or lora"})
    lora_rank: int = field(default=8, metadata={"help": "rank of the changes of --mode lora"})
    lora_alpha: float = field(default=16.0, metadata={"help": "changes are scaled by lora_alpha / lora_rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before the changes, in [0, 1)"})
    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        metadata={"help": "names of the linear layers that --mode lora changes"},
    )

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"expected --mode {', '.join(MODES)}, got {self.mode!r}")


@dataclass
class DataArguments(base.DataArguments):
    """Which pictures and labels, and how pictures are varied while training."""

    # Set by the script: whether a classifier is trained, or else the checkpoint's is used; --do_predict alone needs no
    # labels.
    trains, only_predicts = True, False

    label_column: str | None = field(
        default=None, metadata={"help": "column of the labels, numbers or names; default: label, class, category, ..."}
    )
    label_columns: list[str] = field(
        default_factory=list,
        metadata={"help": "columns of 0 and 1, of probabilities, or of numbers; default: all, where all hold 0 and 1"},
    )
    label_separator: str | None = field(
        default=None, metadata={"help": "what separates several names in a cell of labels, as '|'"}
    )
    label_level: int | None = field(
        default=None,
        metadata={
            "help": "which folder below that of the split is the label: 1 the first, -1 the one with the pictures; "
            "default: 1, below any that lie around all others"
        },
    )
    problem_type: str | None = field(
        default=None, metadata={"help": f"{', '.join(PROBLEMS)}; default: found from the labels, and logged"}
    )
    class_weights: list[str] = field(
        default_factory=list,
        metadata={"help": "balanced, or LABEL=WEIGHT of some labels: what their loss is multiplied by"},
    )
    rotation: float = field(default=10.0, metadata={"help": "largest rotation, degrees"})
    shift: float = field(default=0.1, metadata={"help": "largest shift, share of a side"})
    zoom: float = field(default=0.1, metadata={"help": "largest relative change of size, 0 to 1"})
    jitter: float = field(default=0.2, metadata={"help": "largest relative change of brightness, contrast, saturation"})
    hue: float = field(default=0.0, metadata={"help": "largest change of hue, 0 to 0.5 turns"})
    mirror: float = field(default=0.0, metadata={"help": "chance of left for right, 0 to 1; 0 for digits and letters"})
    mirror_vertical: float = field(default=0.0, metadata={"help": "chance of up for down, 0 to 1"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.problem_type is not None and self.problem_type not in PROBLEMS:
            raise ValueError(f"expected --problem_type {', '.join(PROBLEMS)}, got {self.problem_type!r}")
        if self.label_column is not None and self.label_columns:
            raise ValueError("expected one of --label_column and --label_columns, got both")
        if self.label_separator is not None and self.problem_type not in (None, MULTI):
            raise ValueError(
                f"--label_separator reads several labels a picture, got --problem_type {self.problem_type}; drop one"
            )
        if self.label_level == 0:
            raise ValueError(
                "expected --label_level 1 for the first folder, 2 for the next, ... or -1 for the last, got 0"
            )


# --- labels ---


class Labelled(NamedTuple):
    """A data set: splits with the columns IMAGE and ROW, and the names of those that are learned."""

    splits: DatasetDict
    columns: list[str]


def load_labelled(arguments: DataArguments) -> Labelled:
    """The data set that --dataset names.

    Raises:
        ValueError: it has no layout that is read, or no column of labels.
    """
    _, splits = read_splits(LAYOUTS, arguments)
    columns = label_columns_of(splits, arguments, needs_one=not arguments.only_predicts)
    if (
        arguments.only_predicts
        and len(splits) == 1
        and not set(columns) & set(next(iter(splits.values())).column_names)
    ):
        splits = DatasetDict({arguments.test_split: next(iter(splits.values()))})
    return Labelled(splits, columns)


def known_problem(config: VitEmbedConfig) -> Problem | None:
    """What a checkpoint's classifier was trained for; None where it has none."""
    if "ImageClassification" not in "".join(config.architectures or []):
        return None
    return Problem(config.problem_type or SINGLE, tuple(config.id2label.values()), ())


def find_problem(data: Labelled, arguments: DataArguments, config: VitEmbedConfig) -> Problem:
    """What is learned: told by the labels of the training split, or by the checkpoint where nothing is trained.

    The outputs are the labels that the training split declares or else has; where they are those of the checkpoint,
    in its order.

    Raises:
        ValueError: neither the data nor the checkpoint says; there are two readings; there is nothing to tell apart.
    """
    known, split = known_problem(config), arguments.train_split
    is_trained = split in data.splits and set(data.columns) & set(data.splits[split].column_names)
    is_trained = is_trained and (arguments.trains or known is None)
    if not is_trained and known is None:
        raise ValueError(
            f"expected a classifier in the checkpoint or split {split!r} to train one, found neither; splits are "
            f"{sorted(data.splits)}"
        )
    if not is_trained:
        return _as_known(data, arguments, known)
    rows = data.splits[split]
    problem = _problem_of(rows, data.columns, arguments, None)
    names, where = problem.names, " and ".join(map(repr, data.columns))
    if problem.kind in (SINGLE, SOFT) and len(names) < 2:
        raise ValueError(f"expected at least two labels in column {where}, found {list(names)}")
    say_alike(names)
    return _ordered(problem, known.names) if known is not None and is_same(problem, known) else problem


def is_same(problem: Problem, known: Problem | None) -> bool:
    """Whether a checkpoint's classifier is one for these labels."""
    return known is not None and problem.config_type == known.config_type and set(problem.names) == set(known.names)


def _problem_of(rows: Dataset, columns: list[str], arguments: DataArguments, usual: str | None) -> Problem:
    """The problem that the labels of a split pose; `usual` is its kind where they leave it open."""
    separator, where = arguments.label_separator, f"column {columns[0]!r}"
    cells = cells_of(rows, columns, separator)
    feature = rows.features.get(columns[0])
    feature = feature.feature if isinstance(feature, List) else feature
    kind = arguments.problem_type or (MULTI if separator else usual)
    if kind == MULTI and separator is None and len(columns) == 1 and not isinstance(feature, ClassLabel):
        separator = find_separator(cells, where)
        cells = cells_of(rows, columns, separator)
    kind = kind or find_kind(cells, columns, separator, isinstance(feature, ClassLabel))
    problem = make_problem(kind, cells, columns, separator)
    declared = isinstance(feature, ClassLabel) and kind in (SINGLE, MULTI)
    return replace(problem, names=tuple(feature.names)) if declared else problem


def _ordered(problem: Problem, names: tuple[str, ...]) -> Problem:
    """The problem with its outputs in the order of `names`, which are the same ones."""
    if problem.has_vectors and len(problem.columns) == 1:
        return problem  # the order is that of each list
    return replace(problem, names=names, columns=names if problem.has_vectors else problem.columns)


def _as_known(data: Labelled, arguments: DataArguments, known: Problem) -> Problem:
    """The checkpoint's problem, for labels that are written as those of the first split that has some."""
    labelled = [rows for rows in data.splits.values() if set(data.columns) & set(rows.column_names)]
    labelled = [rows for rows in labelled if any(cell is not None for cell in cells_of(rows, data.columns))]
    if not labelled:
        return replace(known, kind=arguments.problem_type or known.kind)
    usual = known.kind if known.kind != SINGLE or len(data.columns) == 1 else None
    feature = labelled[0].features.get(data.columns[0])
    if usual == SINGLE and isinstance(feature, List):
        usual = None  # may be soft labels
    problem = _problem_of(labelled[0], data.columns, arguments, usual)
    if problem.config_type != known.config_type:
        raise ValueError(
            f"expected labels for {known.config_type}, which the checkpoint was trained for, found {problem.kind}; set "
            "--problem_type, or --label_column"
        )
    if not problem.has_vectors:
        return replace(problem, names=known.names)
    if set(problem.columns) == set(known.names):
        return _ordered(problem, known.names)
    if len(problem.names) == len(known.names) and len(problem.columns) == 1:
        return replace(problem, names=known.names)
    raise ValueError(
        f"expected columns of the checkpoint's outputs ({some(known.names)}), found {some(problem.columns)}; set "
        "--label_columns"
    )


def held_out(problem: Problem, rows: Dataset, share: float, seed: int) -> np.ndarray:
    """The numbers of a `share` of the rows: for one label a picture of each label, else at random."""
    if problem.kind != SINGLE:
        return random_rows(rows, share, seed)
    cells = cells_of(rows, problem.columns)
    return stratified_rows([problem.target(cell)[0] for cell in cells], share, seed)


def stratified_rows(labels: list, share: float, seed: int) -> np.ndarray:
    """The numbers of a `share` of the rows of each label, one at least; a label with one picture keeps it in training.

    Raises:
        ValueError: no row is left to train on.
    """
    counts = Counter(labels)
    rest = [row for row, label in enumerate(labels) if counts[label] > 1]
    kinds = [str(labels[row]) for row in rest]
    count = max(math.ceil(share * len(rest)), len(set(kinds)))
    try:
        _, chosen = train_test_split(rest, test_size=count, stratify=kinds, random_state=seed)
    except ValueError as error:
        raise ValueError(f"--validation_share {share} of {len(rest)} pictures: {error}") from error
    return np.array(chosen)


def check_labelled(
    rows: Dataset, split: str, arguments: DataArguments, problem: Problem, report: Report | None = None
) -> Dataset:
    """The usable rows as columns IMAGE, "labels" (without any there is none) and ROW; the others are named in the log.

    Rows of the test split without a label are kept: they are predicted, and metrics leave them out.
    """
    targets = [problem.target(cell) for cell in cells_of(rows, problem.columns, problem.separator)]
    is_test = split == arguments.test_split
    if not arguments.only_predicts:
        is_test = is_test and split not in (arguments.train_split, arguments.validation_split)
    pictures = rows.select_columns([IMAGE])
    note = ", predicted and not judged" if is_test else ""

    def examine(row: int) -> Iterator[Finding]:
        target, reason = targets[row]
        if target is None:
            yield Finding(f"{reason}{note}", drop=not is_test, level=logging.INFO if is_test else logging.WARNING)
        yield from picture_findings(lambda: pictures[row][IMAGE])

    rows = rows.select_columns([name for name in (IMAGE, ROW, PROBLEM) if name in rows.column_names])
    if any(target is not None for target, _ in targets):
        values = [problem.unknown if target is None else target for target, _ in targets]
        rows = rows.add_column("labels", values)
    checked = check_rows(rows, split, examine, report)
    if "labels" in checked.column_names:
        summary = problem.summary(np.array(checked["labels"][:]))
        logger.info("split %s: %s, %s", split, problem.kind, summary)
        if report is not None:
            report.remarks.setdefault(split, []).append(f"{problem.kind}, {summary}")
    return checked


def check_label_sets(checked: dict[str, Dataset], arguments: DataArguments, problem: Problem) -> None:
    """Name the labels that cannot be learned or judged, and folders for labels that hold no picture.

    Raises:
        ValueError: validation has no label of training.
    """
    folder = Path(arguments.dataset)
    if folder.is_dir() and not (folder / "dataset_dict.json").exists():
        empty = sorted(str(path) for path in folder.rglob("*") if path.is_dir() and not any(path.iterdir()))
        if empty:
            logger.warning("%d empty folders: %s", len(empty), empty[:10])
    has = {split: _labels_of(rows, problem) for split, rows in checked.items() if "labels" in rows.column_names}
    train = has.pop(arguments.train_split, None)
    if train is None or problem.kind == REGRESSION:
        return
    if set(problem.names) - train:
        unseen = sorted(set(problem.names) - train)[:10]
        logger.warning("split %s: no picture of labels %s", arguments.train_split, unseen)
    for split, labels in has.items():
        if labels and not labels & train and split == arguments.validation_split:
            raise ValueError(
                f"expected labels of training in split {split!r}, found none of them: {some(sorted(labels))} in place "
                f"of {some(sorted(train))}; lay it out as the training split, or leave --do_eval out"
            )
        if labels - train:
            unseen = sorted(labels - train)[:10]
            logger.warning("split %s: labels that training lacks, always counted as mistakes: %s", split, unseen)


def _labels_of(rows: Dataset, problem: Problem) -> set[str]:
    """The labels that some row has."""
    targets = np.array(rows["labels"][:])
    found = np.unique(targets[targets != UNKNOWN]) if targets.ndim == 1 else np.flatnonzero((targets > 0).any(axis=0))
    return {problem.names[int(number)] for number in found}


# --- rows ---


class Vary:
    """A row -> `pixel_values` (3, H, W) and `labels`, moved and recoloured at random."""

    def __init__(self, processor: CLIPImageProcessor, arguments: DataArguments) -> None:
        self.processor = processor
        shift, zoom, jitter = arguments.shift, arguments.zoom, arguments.jitter
        moved = {"degrees": arguments.rotation, "translate": (shift, shift), "scale": (1 - zoom, 1 + zoom)}
        steps = {
            augmentation.RandomHorizontalFlip(p=arguments.mirror): arguments.mirror,
            augmentation.RandomVerticalFlip(p=arguments.mirror_vertical): arguments.mirror_vertical,
            augmentation.RandomAffine(**moved, padding_mode="border", p=1.0): arguments.rotation or shift or zoom,
            augmentation.ColorJiggle(jitter, jitter, jitter, arguments.hue, p=0.8): jitter or arguments.hue,
            augmentation.Normalize(processor.image_mean, processor.image_std): True,
        }
        self.vary = torch.nn.Sequential(*(step for step, asked in steps.items() if asked))

    def __call__(self, row: dict) -> dict[str, torch.Tensor | int | list[float]]:
        unvaried = self.processor(as_rgb(row["image"]), do_normalize=False, return_tensors="pt").pixel_values
        return {"pixel_values": self.vary(unvaried)[0], "labels": row["labels"]}


class Process:
    """A row -> `pixel_values` (3, H, W) through the stock processor, and `labels` where it has some."""

    def __init__(self, processor: CLIPImageProcessor) -> None:
        self.processor = processor

    def __call__(self, row: dict) -> dict[str, torch.Tensor | int | list[float]]:
        pixel_values = self.processor(as_rgb(row["image"]), return_tensors="pt").pixel_values
        labels = {"labels": row["labels"]} if "labels" in row else {}
        return {"pixel_values": pixel_values[0], **labels}


# --- model ---


def load_classifier(
    arguments: ModelArguments, problem: Problem, known: Problem | None
) -> VitEmbedForImageClassification:
    """The model with an output for each name; a checkpoint's classifier for other labels is replaced by a new one.

    Args:
        known: what the checkpoint was trained for, or None.
    """
    model = load_model(
        VitEmbedForImageClassification,
        arguments,
        default=SHIPPED_CHECKPOINT,
        any_head=True,
        id2label=dict(enumerate(problem.names)),
        label2id={name: number for number, name in enumerate(problem.names)},
        problem_type=problem.config_type,
    )
    if known is not None and not is_same(problem, known):
        fresh = VitEmbedForImageClassification(model.config).classifier  # of the same size, ours would have been kept
        model.classifier.load_state_dict(fresh.state_dict())
    return model


def learn_in_units(model: VitEmbedForImageClassification, problem: Problem, targets: np.ndarray, is_new: bool) -> None:
    """Give a model of numbers a classifier that starts at their mean and learns at their spread.

    Args:
        targets: (rows, outputs) of the training split.
        is_new: whether the classifier was not trained before.

    Raises:
        ValueError: all values of a column are the same.
    """
    means, spreads = targets.mean(axis=0), targets.std(axis=0)
    for name, mean, spread in zip(problem.names, means, spreads):
        if not spread > abs(mean) * np.finfo(np.float32).eps:
            raise ValueError(f"expected values that differ in column {name!r}, every row has {mean:.6g}")
    means, spreads = (torch.tensor(values, dtype=torch.float32) for values in (means, spreads))
    model.classifier = UnitLinear.of(model.classifier, spreads, means if is_new else None)


def loss_of(
    problem: Problem, model: VitEmbedForImageClassification, weights: torch.Tensor | None, training: TrainingArguments
) -> TargetLoss | None:
    """The loss in place of the model's own, where that is another one.

    Raises:
        ValueError: --label_smoothing_factor for labels that are no classes.
    """
    smoothing = training.label_smoothing_factor
    if smoothing and problem.kind in (MULTI, REGRESSION):
        raise ValueError(
            f"--label_smoothing_factor {smoothing} smooths classes of which a picture has one, got {problem.kind}; "
            "leave it out"
        )
    if weights is None and problem.kind in (SINGLE, MULTI):
        return None
    return TargetLoss(problem, model, weights, smoothing, getattr(model.classifier, "spreads", None))


def choose_trained(
    model: VitEmbedForImageClassification,
    arguments: ModelArguments,
    recipe: RecipeArguments,
    training: TrainingArguments,
) -> torch.nn.Module:
    """Leave for training what --mode and the recipe ask for; with lora the model is wrapped.

    Raises:
        ValueError: lora or numbers with FSDP.
    """
    if isinstance(getattr(model, "classifier", None), UnitLinear) and asks_for_fsdp(training):
        raise ValueError("a classifier of numbers scales whole weights, under FSDP they are split; drop FSDP")
    if arguments.mode == "linear":
        recipe.freeze.append("vision_model")
    if arguments.mode == "lora":
        if asks_for_fsdp(training):
            raise ValueError("--mode lora merges its changes into whole weights, under FSDP they are split; drop FSDP")
        from peft import LoraConfig, get_peft_model

        training.hub_strategy = "end"  # what is pushed is the merged model, not the changes of a checkpoint
        model = get_peft_model(
            model,
            LoraConfig(
                r=arguments.lora_rank,
                lora_alpha=arguments.lora_alpha,
                lora_dropout=arguments.lora_dropout,
                target_modules=arguments.lora_targets,
                modules_to_save=["classifier"],
            ),
        )
    prepare(model, recipe)
    return model
