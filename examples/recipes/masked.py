"""Pictures without labels: crops for training, and evaluation that hides the same patches every time."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from kornia import augmentation
from PIL import ImageOps
from transformers import CLIPImageProcessor

from recipes import arguments as base
from recipes.data import Report, SeededRows, check_rows, picture_findings, seeded
from recipes.reading.layouts import read_splits
from recipes.reading.pictures import LAYOUTS
from recipes.reading.tables import IMAGE
from vit_embed import VitEmbedConfig
from vit_embed.retrieval.pictures import as_rgb

NUM_SHOWN = 8
NUMBER = "__number__"  # column of the numbers that choose the hidden patches
# A margin keeps detail where a crop is enlarged.
MARGIN = 5 / 4


@dataclass
class ModelArguments(base.ModelArguments):
    """Which model to start from."""

    CONFIG_FIELDS = ("mask_ratio",)

    mask_ratio: float | None = field(
        default=None, metadata={"help": "share of the patches to hide, in [0, 1); default: that of the config, 0.75"}
    )


@dataclass
class DataArguments(base.DataArguments):
    """Which pictures, and how they are cropped while training."""

    validation_share: float = field(default=0.05, metadata={"help": base.HELD_OUT_HELP})
    smallest_crop: float = field(default=0.2, metadata={"help": "smallest share of a picture's area in a crop, 0 to 1"})
    mirror: float = field(default=0.5, metadata={"help": "chance of a mirrored picture, 0 to 1"})


def load_pictures(arguments: base.DataArguments) -> DatasetDict:
    """The splits of --dataset with the columns IMAGE and ROW."""
    return read_splits(LAYOUTS, arguments)[1]


def check_pictures(rows: Dataset, split: str, report: Report | None = None) -> Dataset:
    """Drop rows with an unreadable picture, and name them in the log."""
    pictures = rows.select_columns([IMAGE])
    return check_rows(rows, split, lambda row: picture_findings(lambda: pictures[row][IMAGE]), report)


class TrainingPicture:
    """A row -> the middle of its picture as uint8 (3, h, w), MARGIN larger than the model's, and a key for its crop."""

    def __init__(self, image_shape: tuple[int, int]) -> None:
        self.shape = tuple(round(MARGIN * side) for side in image_shape)

    def __call__(self, row: dict) -> dict[str, object]:
        picture = as_rgb(row[IMAGE])
        if picture.size != self.shape[::-1]:
            picture = ImageOps.fit(picture, self.shape[::-1])
        return {"rgb": torch.from_numpy(np.array(picture)).permute(2, 0, 1), "key": random.getrandbits(32)}


class EvaluationPicture:
    """A numbered row -> the middle of its picture as the model takes it, and patches to hide, by its number alone."""

    def __init__(self, processor: CLIPImageProcessor, config: VitEmbedConfig) -> None:
        self.processor, self.config = processor, config

    def __call__(self, row: dict) -> dict[str, torch.Tensor]:
        rows, columns = self.config.grid_size
        order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(row[NUMBER]))
        return {
            "pixel_values": self.processor(as_rgb(row[IMAGE]), return_tensors="pt").pixel_values[0],
            "bool_masked_pos": order < int(rows * columns * self.config.mask_ratio),
        }


def evaluation_rows(rows: Dataset, processor: CLIPImageProcessor, config: VitEmbedConfig, seed: int) -> SeededRows:
    """The rows as they are judged."""
    numbered = rows.add_column(NUMBER, list(range(len(rows))))
    return SeededRows(numbered, EvaluationPicture(processor, config), seed)


class Collator:
    """Rows -> what the model takes; rows for training are cropped, mirrored and normalised, the whole batch at once."""

    def __init__(self, processor: CLIPImageProcessor, arguments: DataArguments, shape: tuple[int, int]) -> None:
        self.vary = torch.nn.Sequential(
            augmentation.RandomResizedCrop(shape, scale=(arguments.smallest_crop, 1.0)),
            augmentation.RandomHorizontalFlip(p=arguments.mirror),
            augmentation.Normalize(processor.image_mean, processor.image_std),
        )

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        if "rgb" in rows[0]:
            with seeded(*(row["key"] for row in rows)):
                return {"pixel_values": self.vary(torch.stack([row["rgb"] for row in rows]).float() / 255)}
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
