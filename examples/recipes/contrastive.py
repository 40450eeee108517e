"""Captioned pictures: what is wrong with them, which look a picture gets, rows and batches of pairs."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from datasets import Dataset, IterableDataset, Value
from kornia import augmentation
from PIL import ImageOps
from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer

from recipes import arguments as base
from recipes.data import Finding, Report, SeededRows, check_rows, picture_findings, require_columns, seeded
from recipes.embedding import token_ids
from recipes.models import image_processor_of, load_model
from recipes.reading.captions import (
    CAPTION_COLUMNS,
    CAPTIONS,
    LAYOUTS,
    as_list,
    as_stream,
    lists_in_texts,
    one_row_a_picture,
)
from recipes.reading.layouts import read_splits
from recipes.reading.tables import IMAGE, Target
from recipes.reading.tars import NOTE
from recipes.retrieval import caption_id
from recipes.texts import EMPTY, NAME_SHARE, caption_problem, draw_fitting
from vit_embed import VitEmbedConfig, VitEmbedForContrastive, VitEmbedTextConfig
from vit_embed.retrieval.pictures import as_rgb, is_one_grey, read_rgba

logger = logging.getLogger(__name__)

# Kinds of columns that hold texts, or lists of texts; the last is that of a column of empty lists.
TEXT = (Value("string"), Value("large_string"), Value("string_view"), Value("null"))
# A mirrored picture keeps its caption unless the caption names a side.
SIDED = {
    *("left", "right", "clockwise", "counterclockwise", "back", "next", "previous", "forward", "reverse"),
    *("clock", "quarter", "waxing", "waning", "button"),
}


@dataclass
class ModelArguments(base.ModelArguments):
    """Which model to start from."""

    CONFIG_FIELDS = ("image_size", "contrastive_loss", "hard_negative_beta", "contrastive_chunk_size")

    tokenizer_name: str | None = field(
        default=None, metadata={"help": "folder of a CLIP tokenizer; default: the checkpoint's own"}
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "side of the pictures, pixels; not the checkpoint's own: positions are resampled"},
    )
    contrastive_loss: str | None = field(
        default=None, metadata={"help": "softmax (CLIP) or sigmoid (SigLIP); default: the config's own"}
    )
    hard_negative_beta: float | None = field(
        default=None, metadata={"help": "weight of similar negatives, 0 weighs all alike; default: the config's own"}
    )
    contrastive_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "pairs whose activations are kept at a time, for batches of any size; default: the config's own"
        },
    )


@dataclass
class DataArguments(base.DataArguments):
    """Which pictures and captions, and how they are varied while training."""

    validation_split: list[str] = field(
        default_factory=lambda: ["validation"], metadata={"help": "splits that pick the best checkpoint"}
    )
    streaming: bool = field(default=False, metadata={"help": "read rows as they come; needs --max_steps"})
    caption_column: str | None = field(
        default=None,
        metadata={"help": "column of a caption or of a list of captions; default: captions, text, title, txt, ..."},
    )
    tag_column: str | None = field(
        default=None, metadata={"help": "column of lists of words that say more about the picture beside a caption"}
    )
    group_column: str | None = field(default=None, metadata={"help": "column equal for pictures of the same thing"})
    duplicates_are_negatives: bool = field(
        default=False, metadata={"help": "keep pairs with the same first caption as each other's negatives, as CLIP"}
    )
    name_share: float | None = field(
        default=None,
        metadata={
            "help": "share of the texts that are the first caption alone, where there is more to draw from; default: "
            f"{NAME_SHARE} with --tag_column, else all captions of a picture are drawn alike"
        },
    )
    sentence_share: float = field(default=0.2, metadata={"help": "share of the short texts put into a sentence"})
    rotation: float = field(default=10.0, metadata={"help": "largest rotation, degrees"})
    mirror: float = field(default=0.0, metadata={"help": "chance of a mirrored picture, 0 to 1"})
    jitter: float = field(default=0.3, metadata={"help": "largest relative change of brightness, contrast, saturation"})
    hue: float = field(default=0.04, metadata={"help": "largest change of hue, 0 to 0.5 turns"})


# --- what is wrong with the data ---


def load_captioned(arguments: base.DataArguments, needs_pictures: bool = True) -> dict[str, Dataset | IterableDataset]:
    """The splits of --dataset with the columns IMAGE (where there are pictures), CAPTIONS and ROW.

    A picture is one row, but in a stream. --streaming is for training; a split of what is mapped from the disk or is a
    table of paths stays whole for evaluation.
    """
    target = Target(CAPTIONS, arguments.caption_column, CAPTION_COLUMNS, "--caption_column")
    splits = dict(read_splits(LAYOUTS, arguments, target, needs_pictures)[1])
    for split, rows in splits.items():
        if isinstance(rows, Dataset) and needs_pictures and CAPTIONS in rows.column_names:
            check_texts(rows, split, CAPTIONS, "--caption_column")
            rows = one_row_a_picture(lists_in_texts(rows, split), split)
            splits[split] = as_stream(rows) if arguments.streaming and split == arguments.train_split else rows
    return splits


def check_texts(rows: Dataset | IterableDataset, split: str, column: str, flag: str) -> None:
    """ValueError where a column holds neither texts nor lists of texts."""
    feature = rows.features[column]
    if getattr(feature, "feature", feature) not in TEXT:
        raise ValueError(
            f"expected texts or lists of texts in column {column!r} of split {split!r}, it is {feature}; set {flag}"
        )


def check_columns(dataset: Dataset | IterableDataset, split: str, arguments: DataArguments) -> None:
    """ValueError where a column is missing or is not what it should be."""
    texts = {"--caption_column": CAPTIONS, "--tag_column": arguments.tag_column}
    require_columns(dataset, split, {**texts, "--group_column": arguments.group_column})
    for flag, column in texts.items():
        if column is not None:
            check_texts(dataset, split, column, flag)


def check_pairs(
    dataset: Dataset, split: str, arguments: DataArguments, tokenizer: CLIPTokenizer, report: Report | None = None
) -> Dataset:
    """Drop rows with an unreadable picture or no caption, count captions that will be cut, and name them in the log."""
    check_columns(dataset, split, arguments)
    all_captions, pictures = dataset[CAPTIONS][:], dataset.select_columns([IMAGE])
    notes = dataset[NOTE][:] if NOTE in dataset.column_names else [None] * len(dataset)

    def examine(row: int) -> Iterator[Finding]:
        problem = caption_problem(as_list(all_captions[row]), tokenizer)
        if problem is not None:
            yield Finding(problem, drop=problem == EMPTY)
        if notes[row] is not None:
            yield Finding(notes[row], drop=False)
        if problem != EMPTY:
            yield from picture_findings(lambda: pictures[row][IMAGE])

    return check_rows(dataset, split, examine, report)


# --- rows ---

# What a training item has.
ITEM = ("rgba", "is_mono", "caption", "group_id", "key")


def training_item(row: dict, arguments: DataArguments, tokenizer: CLIPTokenizer, canvas: int) -> dict[str, object]:
    """A row -> rgba uint8 (4, canvas, canvas), whether it is drawn in one grey, a random caption, its id, and a key.

    Grey with alpha ("LA") counts as one grey whatever its shades: so the icon data set stores drawings of one colour.
    """
    picture = row[IMAGE]
    captions = as_list(row[CAPTIONS])
    tags = list(filter(None, as_list(row[arguments.tag_column]))) if arguments.tag_column else []
    rgba, _ = read_rgba(picture)
    is_mono = picture.mode == "LA" or is_one_grey(rgba)
    if rgba.size != (canvas, canvas):
        rgba = ImageOps.fit(rgba, (canvas, canvas))
    if random.random() < arguments.mirror and not SIDED & set(" ".join(captions).lower().split()):
        rgba = ImageOps.mirror(rgba)
    return {
        "rgba": torch.from_numpy(np.array(rgba)).permute(2, 0, 1),
        "is_mono": is_mono,
        "caption": draw_fitting(captions, tags, arguments, tokenizer),
        "group_id": caption_id(captions[0]),
        "key": random.getrandbits(32),
    }


def rows_of_groups(dataset: Dataset, column: str | None) -> list[list[int]]:
    """The rows of each group, in the order of their first; without a column each row is a group."""
    rows_of: dict[object, list[int]] = {}
    for row, group in enumerate(range(len(dataset)) if column is None else dataset[column][:]):
        rows_of.setdefault(group, []).append(row)
    return list(rows_of.values())


def random_groups(dataset: Dataset, share: float, seed: int, column: str | None) -> np.ndarray:
    """The numbers of the rows of a `share` of the groups, at least one, drawn by `seed`."""
    groups = rows_of_groups(dataset, column)
    order = np.random.default_rng(seed).permutation(len(groups))
    return np.array([row for group in order[: int(np.ceil(share * len(groups)))] for row in groups[group]])


class Groups:
    """Lists of row numbers as rows: item i is a random row of group i."""

    def __init__(self, dataset: Dataset, column: str | None) -> None:
        self.dataset, self.rows = dataset, rows_of_groups(dataset, column)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.dataset[random.choice(self.rows[index])]


def first_ids(rows: Dataset | Groups) -> list[int]:
    """The id of the first caption of each row, or of the first row of each group."""
    if isinstance(rows, Groups):
        rows = rows.dataset.select([group[0] for group in rows.rows])
    return [caption_id(as_list(captions)[0]) for captions in rows[CAPTIONS][:]]


def evaluation_item(row: dict, image_processor: CLIPImageProcessor) -> dict[str, object]:
    """A row -> its pixels (C, H, W) through the stock processor, the first of its captions, and its id."""
    caption = as_list(row[CAPTIONS])[0]
    pixel_values = image_processor(as_rgb(row[IMAGE]), return_tensors="pt").pixel_values[0]
    return {"pixel_values": pixel_values, "caption": caption, "group_id": caption_id(caption)}


def evaluation_pictures(dataset: Dataset, image_processor: CLIPImageProcessor) -> SeededRows:
    """The rows as they are judged."""
    return SeededRows(dataset, partial(evaluation_item, image_processor=image_processor), seed=0)


# --- batches ---


class Collator:
    """Rows -> pixel_values (B, 3, H, W), input_ids (B, T), group_ids (B,); pictures are varied on the whole batch."""

    def __init__(self, processor: CLIPProcessor, arguments: DataArguments, image_size: tuple[int, int]) -> None:
        self.tokenizer, self.image_size = processor.tokenizer, image_size
        self.mask_duplicates = not arguments.duplicates_are_negatives
        self.move = augmentation.RandomAffine(
            degrees=arguments.rotation, translate=(0.1, 0.1), scale=(0.75, 1.15), shear=(-5.0, 5.0), p=1.0
        )
        jitter = (arguments.jitter, arguments.jitter, arguments.jitter, arguments.hue)
        self.recolour = torch.nn.Sequential(
            augmentation.ColorJiggle(*jitter, p=0.4),
            augmentation.RandomGrayscale(p=0.05),
            augmentation.RandomGaussianBlur((3, 3), (0.3, 1.0), p=0.1),
            augmentation.Normalize(processor.image_processor.image_mean, processor.image_processor.image_std),
        )

    def vary(self, rgba: torch.Tensor, is_mono: torch.Tensor) -> torch.Tensor:
        """RGBA uint8 (B, 4, S, S) -> normalised pixels (B, 3, H, W): moved, on a random background, recoloured."""
        rgba = self.move(rgba.float() / 255)
        rgba = torch.nn.functional.interpolate(rgba, self.image_size, mode="bilinear", antialias=True)
        colour, alpha = rgba[:, :3], rgba[:, 3:]
        # A half of the backgrounds is white, a quarter light and a quarter any colour.
        darkest = torch.tensor([1.0, 1.0, 0.75, 0.0])[torch.randint(4, (len(rgba),))].view(-1, 1, 1, 1)
        background = darkest + (1 - darkest) * torch.rand(len(rgba), 3, 1, 1)
        # A drawing in one grey is black in half of the cases, else any colour; dark backgrounds make it light.
        ink = torch.rand(len(rgba), 3, 1, 1) * torch.randint(2, (len(rgba), 1, 1, 1))
        is_dark = background.mean(dim=1, keepdim=True) < 0.5
        ink = torch.where(is_dark, 1 - ink / 2, ink / 2)
        colour = torch.where(is_mono.view(-1, 1, 1, 1), ink, colour)
        return self.recolour((alpha * colour + (1 - alpha) * background).clamp(0, 1))

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        if "rgba" in rows[0]:
            with seeded(*(row["key"] for row in rows)):
                rgba = torch.stack([torch.as_tensor(row["rgba"]) for row in rows])
                pixel_values = self.vary(rgba, torch.tensor([row["is_mono"] for row in rows]))
        else:
            pixel_values = torch.stack([row["pixel_values"] for row in rows])
        batch = {"pixel_values": pixel_values, "input_ids": token_ids(self.tokenizer, [row["caption"] for row in rows])}
        if self.mask_duplicates or "rgba" not in rows[0]:
            batch["group_ids"] = torch.tensor([row["group_id"] for row in rows])
        return batch


# --- model ---


def read_tokenizer(folder: str, config: VitEmbedConfig) -> CLIPTokenizer:
    """A CLIP tokenizer whose limit is at most the model's."""
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.text_config.max_position_embeddings)
    return tokenizer


def check_tokenizer(tokenizer: CLIPTokenizer, name: str, config: VitEmbedTextConfig) -> None:
    """Raises ValueError for a tokenizer of another vocabulary: of a folder without one transformers makes an empty one,
    to which every word is the end of the text."""
    if len(tokenizer) != config.vocab_size or tokenizer.eos_token_id != config.eos_token_id:
        raise ValueError(
            f"expected a tokenizer of text_config.vocab_size = {config.vocab_size} tokens that ends a text with "
            f"{config.eos_token_id}, {name} has {len(tokenizer)} and {tokenizer.eos_token_id}; where the folder has no "
            "tokenizer name one with --tokenizer_name, or convert the checkpoint with convert_checkpoint.py, which "
            "adds it"
        )


def load_two_towers(arguments: ModelArguments) -> tuple[VitEmbedForContrastive, CLIPProcessor]:
    """The model and its processor, both from a checkpoint or both new.

    Raises:
        ValueError: as load_model; no tokenizer is named for a new model, or one of another size than its vocabulary.
    """
    if arguments.config_name is not None and arguments.tokenizer_name is None:
        raise ValueError("expected --tokenizer_name beside --config_name, got none; name a folder of a CLIP tokenizer")
    model = load_model(VitEmbedForContrastive, arguments)
    tokenizer = read_tokenizer(arguments.tokenizer_name or arguments.model_name_or_path, model.config)
    check_tokenizer(tokenizer, arguments.tokenizer_name or arguments.model_name_or_path, model.config.text_config)
    image_processor = image_processor_of(model)
    return model, CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)
