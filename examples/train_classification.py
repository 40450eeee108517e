"""Train a `VitEmbedForImageClassification` on labelled pictures with the stock Trainer.

    python examples/train_classification.py --dataset my_photos --mode full --mirror 0.5 --output_dir run \\
        --do_train --do_eval --do_predict --eval_strategy epoch --num_train_epochs 20 --learning_rate 3e-4

The dataset is a folder with a folder of pictures for each label, in `train/`, `validation/` and `test/` or without
splits; a folder of parquet files or one written by `save_to_disk`; or a name on the Hub. Without a validation split a
stratified `--validation_share` of the training split is held out. `--mode` says what is trained:

- linear: the classifier alone, on a trunk that stays as it is, bit for bit.
- full: everything; `--layer_decay 0.75` changes early layers less.
- lora: low-rank changes of the projections in `--lora_targets` and the classifier (arXiv:2106.09685). They are merged
  before the model is saved, so that it loads without peft.

What is saved is loaded with `AutoModelForImageClassification.from_pretrained("run", trust_remote_code=True)`. Each
evaluation leaves a picture in `pictures/` of the output folder: what was taken for what, and the worst mistakes.

Augmentation stays within what a digit survives; for photos set `--mirror 0.5`, and `--mirror_vertical 0.5` where
there is no up, as seen from above or through a microscope.

Two processes without a GPU: `accelerate launch --multi_gpu --num_processes 2 examples/train_classification.py
--use_cpu ...`; with `--cpu` instead of `--multi_gpu` accelerate starts one alone.

Needs: `pip install accelerate datasets kornia matplotlib pillow scikit-learn tqdm`, and `peft` for `--mode lora`.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from datasets import Image as ImageFeature
from kornia import augmentation
from matplotlib import pyplot
from picture_files import UNREADABLE, as_rgb
from recipe import (
    Problems,
    RecipeArguments,
    RecipeTrainer,
    SeededRows,
    load_splits,
    parse,
    prepare,
    run,
)
from sklearn.metrics import ConfusionMatrixDisplay, accuracy_score, confusion_matrix, f1_score
from sklearn.model_selection import train_test_split
from tqdm import tqdm
from transformers import CLIPImageProcessor, DefaultDataCollator, EvalPrediction, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from vit_embed import VitEmbedConfig, VitEmbedForImageClassification

logger = logging.getLogger("train_classification")

MODES = ("linear", "full", "lora")
# In a sheet of an evaluation: the worst mistakes, and the labels of the confusion matrix at most.
NUM_SHOWN, MOST_LABELS = 20, 25
REPO = Path(__file__).parent.parent


@dataclass
class ModelArguments:
    """Which model to start from, and which part of it to train."""

    model_name_or_path: str = field(default=str(REPO), metadata={"help": "checkpoint; default: the one of this repo"})
    mode: str = field(default="full", metadata={"help": "what is trained: linear, full or lora"})
    lora_rank: int = field(default=8, metadata={"help": "rank of the changes of --mode lora"})
    lora_alpha: float = field(default=16.0, metadata={"help": "changes are scaled by lora_alpha / lora_rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout in front of the changes, in [0, 1)"})
    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        metadata={"help": "names of the linear layers that --mode lora changes"},
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "eager or sdpa"})

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"expected --mode {', '.join(MODES)}, got {self.mode!r}")


@dataclass
class DataArguments:
    """Which pictures and labels, and how pictures are varied while training."""

    dataset: str = field(metadata={"help": "folder of pictures, of a saved dataset, of parquet, or a name on the Hub"})
    image_column: str = field(default="image", metadata={"help": "column of the pictures"})
    label_column: str = field(default="label", metadata={"help": "column of the labels: numbers or names"})
    train_split: str = field(default="train", metadata={"help": "split that is trained on"})
    validation_split: str = field(default="validation", metadata={"help": "split that is evaluated on"})
    test_split: str = field(default="test", metadata={"help": "split for --do_predict, never seen before"})
    validation_share: float = field(
        default=0.1, metadata={"help": "share of the training split to hold out where there is no validation split"}
    )
    rotation: float = field(default=10.0, metadata={"help": "largest rotation, degrees"})
    shift: float = field(default=0.1, metadata={"help": "largest shift, share of a side"})
    zoom: float = field(default=0.1, metadata={"help": "largest relative change of size, 0 to 1"})
    jitter: float = field(default=0.2, metadata={"help": "largest relative change of brightness, contrast, saturation"})
    hue: float = field(default=0.0, metadata={"help": "largest change of hue, 0 to 0.5 turns"})
    mirror: float = field(default=0.0, metadata={"help": "chance of left for right, 0 to 1; 0 for digits and letters"})
    mirror_vertical: float = field(default=0.0, metadata={"help": "chance of up for down, 0 to 1"})


# --- data ---


def with_validation(splits: DatasetDict, arguments: DataArguments, seed: int) -> DatasetDict:
    """The splits, with a stratified validation split taken out of the training split where there is none."""
    train, validation = arguments.train_split, arguments.validation_split
    if validation in splits or train not in splits:
        return splits
    counts = Counter(splits[train].select_columns([arguments.label_column])[arguments.label_column])
    # A label with one picture cannot be in both parts; it stays in training.
    alone = [row for row, label in enumerate(splits[train][arguments.label_column]) if counts[label] == 1]
    rest = np.setdiff1d(np.arange(len(splits[train])), alone)
    labels = [str(label) for label in splits[train].select(rest)[arguments.label_column]]
    try:
        kept, held_out = train_test_split(
            rest, test_size=arguments.validation_share, stratify=labels, random_state=seed
        )
    except ValueError as error:
        raise ValueError(f"--validation_share {arguments.validation_share} of {len(rest)} pictures: {error}") from error
    logger.info("no split %r: %d rows of %r are held out", validation, len(held_out), train)
    kept = np.sort(np.concatenate([kept, alone]).astype(int))
    return DatasetDict({**splits, train: splits[train].select(kept), validation: splits[train].select(held_out)})


def check_columns(rows: Dataset, split: str, arguments: DataArguments) -> None:
    """ValueError where a column is missing or is not what it should be."""
    for name, flag in ((arguments.image_column, "--image_column"), (arguments.label_column, "--label_column")):
        if name not in rows.column_names:
            raise ValueError(f"expected column {name!r} in split {split!r}, found {rows.column_names}; set {flag}")
    feature = rows.features[arguments.image_column]
    if not isinstance(feature, ImageFeature):
        raise ValueError(
            f"expected pictures in column {arguments.image_column!r}, it has {feature}; set --image_column, or cast "
            "it to datasets.Image()"
        )
    dtype = getattr(rows.features[arguments.label_column], "dtype", None)
    if dtype is None or dtype.startswith("float"):
        raise ValueError(
            f"expected one label a picture in column {arguments.label_column!r}, as a number or a name; it has "
            f"{rows.features[arguments.label_column]}; set --label_column"
        )


def label_names(splits: DatasetDict, arguments: DataArguments, config: VitEmbedConfig) -> list[str]:
    """The names of the labels, in the order of the classifier.

    They are those that the training split declares or else has; without one, or where they are the same, those that
    the checkpoint was trained for.
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
    feature = rows.features[arguments.label_column]
    if isinstance(feature, ClassLabel):
        names = list(feature.names)
    else:
        found = set(rows[arguments.label_column]) - {None}
        names = [str(label) for label in sorted(found)]
    if len(names) < 2:
        raise ValueError(f"expected at least two labels in column {arguments.label_column!r}, found {names}")
    return known if set(known) == set(names) else names


def numbered(rows: Dataset, arguments: DataArguments, names: list[str]) -> list[int | None]:
    """The label of every row as the number of its output; None where it has none or one outside `names`."""
    feature = rows.features[arguments.label_column]
    place = {name: number for number, name in enumerate(names)}
    declared = feature.names if isinstance(feature, ClassLabel) else None

    def number(label: object) -> int | None:
        if label is None or (declared is not None and not 0 <= label < len(declared)):
            return None
        return place.get(str(label) if declared is None else declared[label])

    return [number(label) for label in rows[arguments.label_column]]


def check_rows(rows: Dataset, split: str, arguments: DataArguments, names: list[str]) -> Dataset:
    """The usable rows as columns `image` and `labels`; the others are named in the log."""
    column = arguments.image_column
    labels, problems = numbered(rows, arguments, names), Problems()
    given = rows[arguments.label_column]
    stored = rows.select_columns([column]).cast_column(column, ImageFeature(decode=False))
    pictures = rows.select_columns([column])
    for row in tqdm(range(len(rows)), desc=f"check {split}", disable=not logger.isEnabledFor(logging.INFO)):
        if labels[row] is None:
            what = "no label" if given[row] in (None, -1) else f"a label outside the {len(names)} known"
            problems.add(what, row)
        try:
            as_rgb(pictures[row][column])
        except UNREADABLE:
            problems.add("an unreadable picture", row)
            path = (stored[row][column] or {}).get("path")
            logger.warning("split %s: row %d cannot be read%s", split, row, f": {path}" if path else "")
    dropped = problems.report(split, len(rows))
    kept = [row for row in range(len(rows)) if row not in dropped]
    usable = pictures.select(kept)
    usable = usable if column == "image" else usable.rename_column(column, "image")
    return usable.add_column("labels", [labels[row] for row in kept])


def check_labels(checked: dict[str, Dataset], arguments: DataArguments, names: list[str]) -> None:
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


def metrics_of(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, and F1 as the mean over the labels that occur, from logits (N, num_labels) and labels (N,)."""
    guessed = prediction.predictions.argmax(axis=1)
    return {
        "accuracy": float(accuracy_score(prediction.label_ids, guessed)),
        "macro_f1": float(f1_score(prediction.label_ids, guessed, average="macro", zero_division=0)),
    }


class DrawMistakes:
    """Draws what was taken for what, and the mistakes that the model was most sure of."""

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

        columns = NUM_SHOWN // 4
        size = 2.5 + 0.35 * len(shown)
        figure = pyplot.figure(figsize=(size + 1.5 * columns, max(size, 7.0)), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(size, 1.5 * columns))
        display = ConfusionMatrixDisplay(counts[np.ix_(shown, shown)], display_labels=np.array(self.names)[shown])
        axes = left.subplots()
        display.plot(ax=axes, cmap="Blues", colorbar=False, xticks_rotation="vertical")
        hidden = (
            "" if len(shown) == len(self.names) else f", the {len(shown)} of {len(self.names)} labels most mixed up"
        )
        axes.set_title(f"{len(labels) - len(mistakes)} of {len(labels)} right{hidden}", fontsize=10)
        right.suptitle(f"{len(worst)} worst of {len(mistakes)} mistakes" if len(worst) else "no mistakes", fontsize=10)
        for place, axes in enumerate(right.subplots(4, columns).flat):
            axes.axis("off")
            if place < len(worst):
                row = int(worst[place])
                axes.imshow(as_rgb(rows[row]["image"]))
                told = f"said {self.names[guessed[row]]}, {probabilities[row].max():.0%} sure"
                axes.set_title(f"{told}\nis {self.names[labels[row]]}", fontsize=8)
        figure.savefig(path, dpi=110)
        pyplot.close(figure)


# --- model ---


def load_model(arguments: ModelArguments, names: list[str]) -> VitEmbedForImageClassification:
    """The model with an output for each name; what a checkpoint for other labels knows of those is left out."""
    return VitEmbedForImageClassification.from_pretrained(
        arguments.model_name_or_path,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        attn_implementation=arguments.attn_implementation,
        dtype=torch.float32,  # of the weights that are trained, whatever is stored; --bf16 is for the arithmetic
        ignore_mismatched_sizes=True,
    )


def choose_trained(
    model: VitEmbedForImageClassification,
    arguments: ModelArguments,
    recipe: RecipeArguments,
    training: TrainingArguments,
) -> torch.nn.Module:
    """Leave for training what --mode and the recipe say; with lora the model is wrapped."""
    if arguments.mode == "linear":
        recipe.freeze.append("vision_model")
    if arguments.mode == "lora":
        if training.fsdp:
            raise ValueError(
                "--mode lora merges its changes into whole weights, under FSDP they are split; drop --fsdp"
            )
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


def main() -> None:
    """Parse the command line, then train, evaluate and test as asked."""
    model_arguments, data_arguments, recipe, training = parse(ModelArguments, DataArguments, description=__doc__)
    wanted = [data_arguments.train_split] * training.do_train + [data_arguments.validation_split] * training.do_eval
    wanted = list(dict.fromkeys(wanted + [data_arguments.test_split] * training.do_predict))
    splits = load_splits(data_arguments.dataset)
    for split in {*wanted, data_arguments.train_split} & set(splits):
        check_columns(splits[split], split, data_arguments)
    splits = with_validation(splits, data_arguments, training.seed)
    missing = set(wanted) - set(splits)
    if missing:
        raise ValueError(f"expected splits {sorted(missing)} in {data_arguments.dataset}, found {sorted(splits)}")
    config = VitEmbedConfig.from_pretrained(model_arguments.model_name_or_path)
    names = label_names(splits, data_arguments, config)
    checked = {split: check_rows(splits[split], split, data_arguments, names) for split in wanted}
    check_labels(checked, data_arguments, names)

    processor = CLIPImageProcessor.from_pretrained(model_arguments.model_name_or_path)
    model = choose_trained(load_model(model_arguments, names), model_arguments, recipe, training)
    plain, varied = Process(processor), Vary(processor, data_arguments)
    judged = {split: SeededRows(rows, plain, training.seed) for split, rows in checked.items()}
    trained = SeededRows(checked[data_arguments.train_split], varied, training.seed) if training.do_train else None
    drawn = {"eval": checked.get(data_arguments.validation_split), "test": checked.get(data_arguments.test_split)}
    trainer = RecipeTrainer(
        recipe,
        draw=DrawMistakes(drawn, names),
        model=model,
        args=training,
        data_collator=DefaultDataCollator(),
        train_dataset=trained,
        eval_dataset=judged.get(data_arguments.validation_split),
        compute_metrics=metrics_of,
        processing_class=processor,
    )
    run(trainer, test_dataset=judged.get(data_arguments.test_split))


if __name__ == "__main__":
    main()
