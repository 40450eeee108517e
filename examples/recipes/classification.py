"""Labelled pictures: labels and what is wrong with them, how pictures are varied, metrics, and sheets of mistakes."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from kornia import augmentation
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay, accuracy_score, confusion_matrix, f1_score
from sklearn.model_selection import train_test_split
from transformers import CLIPImageProcessor, EvalPrediction, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from recipes import arguments as base
from recipes.arguments import SHIPPED_CHECKPOINT, RecipeArguments
from recipes.data import (
    Finding,
    check_rows,
    picture_findings,
    require_columns,
)
from recipes.drawing import draw_picture, save_figure, short
from recipes.models import load_model, prepare
from recipes.reading.labels import LABEL, LABEL_COLUMNS, LAYOUTS
from recipes.reading.layouts import read_splits
from recipes.reading.tables import IMAGE, PROBLEM, ROW, Target
from recipes.trainer import asks_for_fsdp
from vit_embed import VitEmbedConfig, VitEmbedForImageClassification
from vit_embed.retrieval.pictures import as_rgb

logger = logging.getLogger(__name__)

MODES = ("linear", "full", "lora")
# In a sheet of an evaluation: the worst mistakes, and the labels of the confusion matrix at most.
NUM_SHOWN, MOST_LABELS = 20, 25


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

    label_column: str | None = field(
        default=None, metadata={"help": "column of the labels, numbers or names; default: label, class, category, ..."}
    )
    rotation: float = field(default=10.0, metadata={"help": "largest rotation, degrees"})
    shift: float = field(default=0.1, metadata={"help": "largest shift, share of a side"})
    zoom: float = field(default=0.1, metadata={"help": "largest relative change of size, 0 to 1"})
    jitter: float = field(default=0.2, metadata={"help": "largest relative change of brightness, contrast, saturation"})
    hue: float = field(default=0.0, metadata={"help": "largest change of hue, 0 to 0.5 turns"})
    mirror: float = field(default=0.0, metadata={"help": "chance of left for right, 0 to 1; 0 for digits and letters"})
    mirror_vertical: float = field(default=0.0, metadata={"help": "chance of up for down, 0 to 1"})


# --- labels ---


def load_labelled(arguments: DataArguments) -> DatasetDict:
    """The splits of --dataset with the columns IMAGE, LABEL where pictures have labels, and ROW."""
    return read_splits(LAYOUTS, arguments, Target(LABEL, arguments.label_column, LABEL_COLUMNS, "--label_column"))[1]


def check_columns(rows: Dataset, split: str, arguments: DataArguments) -> None:
    """ValueError where a column is missing or is not what it should be."""
    require_columns(rows, split, {"--label_column": LABEL})
    feature = rows.features[LABEL]
    dtype = getattr(feature, "dtype", None)
    if dtype is None or dtype.startswith("float"):
        raise ValueError(
            f"expected one label a picture in column {arguments.label_column or LABEL!r}, as a number or a name; "
            f"it has {feature}; set --label_column"
        )


def stratified_rows(rows: Dataset, share: float, seed: int, column: str) -> np.ndarray:
    """The numbers of a `share` of the rows of each label; a label with one picture keeps it in training.

    Raises:
        ValueError: the share is less than one picture a label.
    """
    labels = rows[column][:]
    counts = Counter(labels)
    rest = [row for row, label in enumerate(labels) if counts[label] > 1]
    try:
        _, chosen = train_test_split(
            rest, test_size=share, stratify=[str(labels[row]) for row in rest], random_state=seed
        )
    except ValueError as error:
        raise ValueError(f"--validation_share {share} of {len(rest)} pictures: {error}") from error
    return np.array(chosen)


def label_names(splits: dict[str, Dataset], arguments: DataArguments, config: VitEmbedConfig) -> list[str]:
    """The names of the labels, in the order of the classifier.

    They are those that the training split declares or else has; without one, or where they are the same, those that
    the checkpoint was trained for.

    Raises:
        ValueError: neither the data nor the checkpoint has at least two labels.
    """
    known = list(config.id2label.values()) if "ImageClassification" in "".join(config.architectures or []) else []
    if arguments.train_split not in splits:
        if not known:
            raise ValueError(
                f"expected a classifier in the checkpoint or split {arguments.train_split!r} to train one, found "
                f"neither; splits are {sorted(splits)}"
            )
        return known
    rows = splits[arguments.train_split]
    feature = rows.features[LABEL]
    if isinstance(feature, ClassLabel):
        names = list(feature.names)
    else:
        names = [str(label) for label in sorted(set(rows[LABEL]) - {None})]
    if len(names) < 2:
        raise ValueError(f"expected at least two labels in column {arguments.label_column or LABEL!r}, found {names}")
    return known if set(known) == set(names) else names


def numbered(rows: Dataset, arguments: DataArguments, names: list[str]) -> list[int | None]:
    """The label of every row as the number of its output; None where it has none or one outside `names`."""
    feature = rows.features[LABEL]
    place = {name: number for number, name in enumerate(names)}
    declared = feature.names if isinstance(feature, ClassLabel) else None

    def number(label: object) -> int | None:
        if label is None or (declared is not None and not 0 <= label < len(declared)):
            return None
        return place.get(str(label) if declared is None else declared[label])

    return [number(label) for label in rows[LABEL]]


def check_labelled(rows: Dataset, split: str, arguments: DataArguments, names: list[str]) -> Dataset:
    """The usable rows as columns `image`, `labels` and ROW; the others are named in the log."""
    labels, given = numbered(rows, arguments, names), rows[LABEL][:]
    pictures = rows.select_columns([IMAGE])

    def examine(row: int) -> Iterator[Finding]:
        if labels[row] is None:
            none = given[row] in (None, -1)
            yield Finding("no label" if none else f"a label outside the {len(names)} known")
        yield from picture_findings(lambda: pictures[row][IMAGE])

    kept = [name for name in (IMAGE, ROW, PROBLEM) if name in rows.column_names]
    return check_rows(rows.select_columns(kept).add_column("labels", labels), split, examine)


def check_label_sets(checked: dict[str, Dataset], arguments: DataArguments, names: list[str]) -> None:
    """Name the labels that cannot be learned or judged, and folders for labels that hold no picture."""
    folder = Path(arguments.dataset)
    if folder.is_dir() and not (folder / "dataset_dict.json").exists():
        empty = sorted(str(path) for path in folder.rglob("*") if path.is_dir() and not any(path.iterdir()))
        if empty:
            logger.warning("%d empty folders: %s", len(empty), empty[:10])
    has = {split: {names[number] for number in set(rows["labels"])} for split, rows in checked.items()}
    train = has.pop(arguments.train_split, None)
    if train is None:
        return
    if set(names) - train:
        logger.warning("split %s: no picture of labels %s", arguments.train_split, sorted(set(names) - train)[:10])
    for split, labels in has.items():
        if labels - train:
            unseen = sorted(labels - train)[:10]
            logger.warning("split %s: labels that training lacks, always counted as mistakes: %s", split, unseen)


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

    def __call__(self, row: dict) -> dict[str, torch.Tensor | int]:
        unvaried = self.processor(as_rgb(row["image"]), do_normalize=False, return_tensors="pt").pixel_values
        return {"pixel_values": self.vary(unvaried)[0], "labels": row["labels"]}


class Process:
    """A row -> `pixel_values` (3, H, W) through the stock processor, and `labels`."""

    def __init__(self, processor: CLIPImageProcessor) -> None:
        self.processor = processor

    def __call__(self, row: dict) -> dict[str, torch.Tensor | int]:
        pixel_values = self.processor(as_rgb(row["image"]), return_tensors="pt").pixel_values
        return {"pixel_values": pixel_values[0], "labels": row["labels"]}


# --- evaluation ---


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, and F1 as the mean over the labels that occur, from logits (N, num_labels) and labels (N,)."""
    guessed = prediction.predictions.argmax(axis=1)
    return {
        "accuracy": float(accuracy_score(prediction.label_ids, guessed)),
        "macro_f1": float(f1_score(prediction.label_ids, guessed, average="macro", zero_division=0)),
    }


class DrawMistakes:
    """Draws which labels were mistaken for which, and the mistakes that the model was most sure of."""

    def __init__(self, rows_of: dict[str, Dataset], names: list[str]) -> None:
        self.rows_of, self.names = rows_of, names

    def __call__(self, output: EvalLoopOutput, path: Path) -> None:
        rows = self.rows_of[path.name.split("-")[0]]
        probabilities = torch.from_numpy(output.predictions).float().softmax(dim=1).numpy()  # (N, num_labels)
        labels, guessed = output.label_ids, probabilities.argmax(axis=1)
        mistakes = np.flatnonzero(guessed != labels)
        worst = mistakes[np.argsort(-probabilities[mistakes].max(axis=1))][:NUM_SHOWN]
        counts = confusion_matrix(labels, guessed, labels=np.arange(len(self.names)))
        wrong = counts.sum(axis=0) + counts.sum(axis=1) - 2 * counts.diagonal()
        shown = np.sort(np.argsort(-wrong, kind="stable")[:MOST_LABELS])

        columns, size = NUM_SHOWN // 4, 2.5 + 0.35 * len(shown)
        figure = Figure(figsize=(size + 1.6 * columns, max(size, 7.0)), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(size, 1.6 * columns))
        display = ConfusionMatrixDisplay(counts[np.ix_(shown, shown)], display_labels=np.array(self.names)[shown])
        axes = left.subplots()
        display.plot(ax=axes, cmap="Blues", colorbar=False, xticks_rotation="vertical")
        hidden = "" if len(shown) == len(self.names) else f", the {len(shown)} of {len(self.names)} most mixed up"
        axes.set_title(f"{len(labels) - len(mistakes)} of {len(labels)} right{hidden}", fontsize=10)
        right.suptitle(f"{len(worst)} worst of {len(mistakes)} mistakes" if len(worst) else "no mistakes", fontsize=10)
        for axis in right.subplots(4, columns).flat:
            axis.axis("off")
        for row, axis in zip(map(int, worst), right.axes):
            guess = f"{self.names[guessed[row]]}, {probabilities[row].max():.0%} sure\nis {self.names[labels[row]]}"
            draw_picture(axis, as_rgb(rows[row]["image"]), f"{short(rows[row][ROW])}\n{guess}")
        save_figure(figure, path)


# --- model ---


def load_classifier(arguments: ModelArguments, names: list[str]) -> VitEmbedForImageClassification:
    """The model with an output for each name; a checkpoint's classifier for other labels is replaced by a new one."""
    return load_model(
        VitEmbedForImageClassification,
        arguments,
        default=SHIPPED_CHECKPOINT,
        any_head=True,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )


def choose_trained(
    model: VitEmbedForImageClassification,
    arguments: ModelArguments,
    recipe: RecipeArguments,
    training: TrainingArguments,
) -> torch.nn.Module:
    """Leave for training what --mode and the recipe ask for; with lora the model is wrapped.

    Raises:
        ValueError: lora with FSDP.
    """
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
