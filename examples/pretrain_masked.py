"""Pretrain a `VitEmbedForMaskedImageModeling` on pictures without labels with the stock Trainer.

    python examples/pretrain_masked.py --dataset my_photos --config_name small.json --output_dir run \\
        --do_train --do_eval --eval_strategy steps --eval_steps 500 --per_device_train_batch_size 256

The dataset is a folder of pictures, a folder written by `datasets` (`save_to_disk`), a folder of parquet files, or a
name on the Hub; without a validation split, `--validation_share` of the training split is held out. Training sees
random crops, mirrored half of the time. Evaluation hides the same patches every time, and each one leaves a sheet in
`reconstructions/` of the output folder: held-out pictures, what the model sees of them, and what it fills in.

The trunk then loads into every other class: `VitEmbedForImageClassification.from_pretrained("run", num_labels=10)`.

Needs: `pip install accelerate datasets kornia matplotlib pillow tqdm`. Source: arXiv:2111.06377.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from kornia import augmentation
from picture_files import UNREADABLE, as_rgb
from PIL import ImageOps
from recipe import Problems, check_output_dir, checkpoint_to_resume, load_splits
from show_tokens import draw_reconstructions
from tqdm import tqdm
from transformers import (
    CLIPImageProcessor,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from vit_embed import VitEmbedConfig, VitEmbedForMaskedImageModeling

logger = logging.getLogger("pretrain_masked")

NUM_SHOWN = 8


@dataclass
class ModelArguments:
    """Which model to start from."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "checkpoint whose trunk to train on"})
    config_name: str | None = field(default=None, metadata={"help": "config.json of a model to train from scratch"})
    mask_ratio: float | None = field(
        default=None, metadata={"help": "share of the patches to hide, in [0, 1); default: that of the config, 0.75"}
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "eager or sdpa"})


@dataclass
class DataArguments:
    """Which pictures, and how they are cropped while training."""

    dataset: str = field(metadata={"help": "folder of pictures, of a saved dataset, of parquet, or a name on the Hub"})
    image_column: str = field(default="image", metadata={"help": "column of the pictures"})
    train_split: str = field(default="train", metadata={"help": "split that is trained on"})
    validation_split: str = field(default="validation", metadata={"help": "split that is evaluated on"})
    validation_share: float = field(
        default=0.05, metadata={"help": "share of the training split to hold out where there is no validation split"}
    )
    smallest_crop: float = field(default=0.2, metadata={"help": "smallest share of a picture's area in a crop, 0 to 1"})
    mirror: float = field(default=0.5, metadata={"help": "chance of a mirrored picture, 0 to 1"})


def with_validation(splits: DatasetDict, arguments: DataArguments, seed: int) -> DatasetDict:
    """The splits, with a validation split taken out of the training split where there is none."""
    if arguments.train_split not in splits:
        raise ValueError(f"expected split {arguments.train_split!r} in {arguments.dataset}, found {sorted(splits)}")
    if arguments.validation_split in splits:
        return splits
    parts = splits[arguments.train_split].train_test_split(test_size=arguments.validation_share, seed=seed)
    logger.info("no split %r: %d rows are held out", arguments.validation_split, len(parts["test"]))
    return DatasetDict({arguments.train_split: parts["train"], arguments.validation_split: parts["test"]})


def readable_rows(dataset: Dataset, split: str, arguments: DataArguments) -> Dataset:
    """Drop rows with an unreadable picture, and name them in the log."""
    column = arguments.image_column
    if column not in dataset.column_names:
        raise ValueError(
            f"expected column {column!r} in split {split!r}, found {dataset.column_names}; set --image_column"
        )
    pictures, problems = dataset.select_columns([column]), Problems()
    for row in tqdm(range(len(dataset)), desc=f"check {split}"):
        try:
            as_rgb(pictures[row][column])
        except UNREADABLE:
            problems.add("unreadable picture", row)
    dropped = problems.report(split, len(dataset))
    return pictures.select([row for row in range(len(dataset)) if row not in dropped])


class TrainingPictures(torch.utils.data.Dataset):
    """The middle of each picture as uint8 (3, H, W) of `shape`, on white."""

    def __init__(self, dataset: Dataset, image_column: str, shape: tuple[int, int]) -> None:
        self.dataset, self.image_column, self.shape = dataset, image_column, shape

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        picture = as_rgb(self.dataset[index][self.image_column])
        if picture.size != self.shape[::-1]:
            picture = ImageOps.fit(picture, self.shape[::-1])
        return {"rgb": torch.from_numpy(np.array(picture)).permute(2, 0, 1)}


class EvaluationPictures(torch.utils.data.Dataset):
    """The middle of each picture as the model takes it, and patches to hide that depend on its number alone."""

    def __init__(
        self, dataset: Dataset, image_column: str, processor: CLIPImageProcessor, config: VitEmbedConfig
    ) -> None:
        self.dataset, self.image_column, self.processor, self.config = dataset, image_column, processor, config

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        picture = as_rgb(self.dataset[index][self.image_column])
        rows, columns = self.config.grid_size
        order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(index))
        return {
            "pixel_values": self.processor(picture, return_tensors="pt").pixel_values[0],
            "bool_masked_pos": order < int(rows * columns * self.config.mask_ratio),
        }


class Collator:
    """Rows -> what the model takes; rows for training are cropped, mirrored and normalised, the whole batch at once."""

    def __init__(self, processor: CLIPImageProcessor, arguments: DataArguments, shape: tuple[int, int]) -> None:
        self.vary = torch.nn.Sequential(
            augmentation.RandomResizedCrop(shape, scale=(arguments.smallest_crop, 1.0)),
            augmentation.RandomHorizontalFlip(p=arguments.mirror),
            augmentation.Normalize(processor.image_mean, processor.image_std),
        )

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return {"pixel_values": self.vary(batch["rgb"].float() / 255)} if "rgb" in batch else batch


class DrawReconstructions(TrainerCallback):
    """Leaves a sheet of reconstructions of held-out pictures behind every evaluation."""

    def __init__(self, pixel_values: torch.Tensor, processor: CLIPImageProcessor) -> None:
        self.pixel_values, self.processor = pixel_values, processor

    def on_evaluate(self, args, state, control, model, **kwargs) -> None:
        if state.is_world_process_zero:
            output = Path(args.output_dir) / "reconstructions" / f"step-{state.global_step:06d}.png"
            draw_reconstructions(model, self.pixel_values, self.processor, output)


def load_model(arguments: ModelArguments) -> tuple[VitEmbedForMaskedImageModeling, CLIPImageProcessor]:
    """Return the model and its image processor, both from a checkpoint or both new."""
    if (arguments.model_name_or_path is None) == (arguments.config_name is None):
        raise ValueError("expected one of --model_name_or_path and --config_name, got both or neither")
    overrides = {} if arguments.mask_ratio is None else {"mask_ratio": arguments.mask_ratio}
    overrides["attn_implementation"] = arguments.attn_implementation
    if arguments.model_name_or_path is not None:
        # Weights are trained in float32, whatever is stored.
        model = VitEmbedForMaskedImageModeling.from_pretrained(
            arguments.model_name_or_path, dtype=torch.float32, **overrides
        )
        return model, CLIPImageProcessor.from_pretrained(arguments.model_name_or_path)
    config = VitEmbedConfig.from_pretrained(arguments.config_name, **overrides)
    height, width = config.image_shape
    processor = CLIPImageProcessor(
        size={"shortest_edge": min(height, width)}, crop_size={"height": height, "width": width}
    )
    return VitEmbedForMaskedImageModeling(config), processor


def main() -> None:
    """Parse the command line, then train and evaluate as asked."""
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments), description=__doc__)
    model_arguments, data_arguments, training_arguments = parser.parse_args_into_dataclasses()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    check_output_dir(training_arguments)
    set_seed(training_arguments.seed)
    # Rows carry pictures, which no forward takes by name; the collator turns them into what it takes.
    training_arguments.remove_unused_columns = False

    model, processor = load_model(model_arguments)
    splits = with_validation(load_splits(data_arguments.dataset), data_arguments, training_arguments.seed)
    column = data_arguments.image_column
    train_dataset = eval_dataset = None
    if training_arguments.do_train:
        rows = readable_rows(splits[data_arguments.train_split], data_arguments.train_split, data_arguments)
        # A margin of a quarter keeps detail where a crop is enlarged.
        height, width = (side * 5 // 4 for side in model.config.image_shape)
        train_dataset = TrainingPictures(rows, column, (height, width))
    callbacks = []
    if training_arguments.do_eval:
        rows = readable_rows(splits[data_arguments.validation_split], data_arguments.validation_split, data_arguments)
        eval_dataset = EvaluationPictures(rows, column, processor, model.config)
        # From all over the split: neighbouring rows are often alike.
        places = np.linspace(0, len(rows) - 1, min(NUM_SHOWN, len(rows))).astype(int)
        shown = torch.stack([eval_dataset[int(place)]["pixel_values"] for place in places])
        callbacks.append(DrawReconstructions(shown, processor))
    trainer = Trainer(
        model=model,
        args=training_arguments,
        data_collator=Collator(processor, data_arguments, model.config.image_shape),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        callbacks=callbacks,
    )
    if training_arguments.do_train:
        result = trainer.train(resume_from_checkpoint=checkpoint_to_resume(training_arguments))
        trainer.save_model()
        trainer.save_metrics("train", result.metrics)
    if training_arguments.do_eval:
        trainer.save_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main()
