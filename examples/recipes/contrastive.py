"""Captioned pictures: what is wrong with them, which text and which look a picture gets, rows and streams of pairs."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, Value
from datasets import Image as ImageFeature
from kornia import augmentation
from PIL import ImageOps
from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer, TrainingArguments

from recipes import arguments as base
from recipes.data import Finding, check_rows, picture_findings, require_columns, seeded
from recipes.embedding import token_ids
from recipes.models import image_processor_of, load_model
from recipes.reading.captions import CAPTION_COLUMNS, CAPTIONS, LAYOUTS
from recipes.reading.layouts import read_splits
from recipes.reading.tables import IMAGE, Target
from recipes.retrieval import caption_id
from vit_embed import VitEmbedConfig, VitEmbedForContrastive, VitEmbedTextConfig
from vit_embed.retrieval.pictures import UNREADABLE, as_rgb, is_one_grey, read_rgba

logger = logging.getLogger(__name__)

# Kinds of columns that hold texts, or lists of texts; the last is that of a column of empty lists.
TEXT = (Value("string"), Value("large_string"), Value("string_view"), Value("null"))
SENTENCES = ("a picture of {}", "a photo of {}", "an icon of {}", "This is a photo of {}.")
# A mirrored picture keeps its caption unless the caption names a side.
SIDED = {
    *("left", "right", "clockwise", "counterclockwise", "back", "next", "previous", "forward", "reverse"),
    *("clock", "quarter", "waxing", "waning", "button"),
}
EMPTY, TOO_LONG = "an empty caption", "a caption too long, cut"


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
    name_share: float = field(
        default=0.6, metadata={"help": "share of the texts that are the name alone, where there is more to draw from"}
    )
    sentence_share: float = field(default=0.2, metadata={"help": "share of the texts put into a sentence"})
    rotation: float = field(default=10.0, metadata={"help": "largest rotation, degrees"})
    mirror: float = field(default=0.0, metadata={"help": "chance of a mirrored picture, 0 to 1"})
    jitter: float = field(default=0.3, metadata={"help": "largest relative change of brightness, contrast, saturation"})
    hue: float = field(default=0.04, metadata={"help": "largest change of hue, 0 to 0.5 turns"})


# --- captions ---


def as_list(captions: str | list[str] | None) -> list[str]:
    """Give one caption and a list of captions the same form."""
    return [captions] if isinstance(captions, str) else list(captions or ())


def caption_problem(captions: list, tokenizer: CLIPTokenizer) -> str | None:
    """EMPTY, TOO_LONG or None."""
    if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
        return EMPTY
    if max(map(len, tokenizer(captions, verbose=False).input_ids)) > tokenizer.model_max_length:
        return TOO_LONG
    return None


def draw_caption(captions: list[str], tags: list[str], arguments: DataArguments) -> str:
    """Draw one text: the name, the name with tags, another caption, or tags alone; at times in a sentence."""
    text, others, choice = captions[0], captions[1:], random.random()
    if choice > arguments.name_share and (others or tags):
        some_tags = random.sample(tags, min(len(tags), random.randint(1, 3)))
        if others and random.random() < 1 / 2:
            text = random.choice(others)
        elif len(some_tags) > 1 and random.random() < 1 / 3:
            text = ", ".join(some_tags)
        else:
            text = ", ".join([text, *some_tags])
    return random.choice(SENTENCES).format(text) if random.random() < arguments.sentence_share else text


def draw_fitting(captions: list[str], tags: list[str], arguments: DataArguments, tokenizer: CLIPTokenizer) -> str:
    """`draw_caption`, or the name where the drawn text is longer than the tokenizer's limit."""
    text = draw_caption(captions, tags, arguments)
    fits = len(tokenizer(text, verbose=False).input_ids) <= tokenizer.model_max_length
    return text if fits else captions[0]


# --- what is wrong with the data ---


def load_captioned(arguments: DataArguments, needs_pictures: bool = True) -> DatasetDict | IterableDatasetDict:
    """The splits of --dataset with the columns IMAGE (where there are pictures), CAPTIONS and ROW."""
    target = Target(CAPTIONS, arguments.caption_column, CAPTION_COLUMNS, "--caption_column")
    return read_splits(LAYOUTS, arguments, target, needs_pictures)[1]


def check_columns(dataset: Dataset | IterableDataset, split: str, arguments: DataArguments) -> None:
    """ValueError where a column is missing or is not what it should be."""
    texts = {"--caption_column": CAPTIONS, "--tag_column": arguments.tag_column}
    require_columns(dataset, split, {**texts, "--group_column": arguments.group_column})
    for flag, column in texts.items():
        feature = dataset.features[column] if column else Value("string")
        if getattr(feature, "feature", feature) not in TEXT:
            raise ValueError(
                f"expected texts or lists of texts in column {column!r} of split {split!r}, it is {feature}; set {flag}"
            )


def check_pairs(dataset: Dataset, split: str, arguments: DataArguments, tokenizer: CLIPTokenizer) -> Dataset:
    """Drop rows with an unreadable picture or no caption, count captions that will be cut, and name them in the log."""
    check_columns(dataset, split, arguments)
    all_captions, pictures = dataset[CAPTIONS][:], dataset.select_columns([IMAGE])

    def examine(row: int) -> Iterator[Finding]:
        problem = caption_problem(as_list(all_captions[row]), tokenizer)
        if problem is not None:
            yield Finding(problem, drop=problem == EMPTY)
        if problem != EMPTY:
            yield from picture_findings(lambda: pictures[row][IMAGE])

    return check_rows(dataset, split, examine)


def check_captions_differ(dataset: Dataset, split: str, arguments: DataArguments) -> None:
    """Warn where most pictures share their first caption with others; ValueError where all do, as nothing is learned.

    Pairs of equal first captions are not each other's negatives, so a batch may hold none.
    """
    counts = Counter(caption_id(as_list(captions)[0]) for captions in dataset[CAPTIONS][:])
    if len(counts) < 2:
        raise ValueError(
            f"expected at least two different captions in split {split!r}, all {len(dataset)} rows have the same in "
            f"column {arguments.caption_column or CAPTIONS!r}; set --caption_column"
        )
    shared = sum(count for count in counts.values() if count > 1)
    if 2 * shared > len(dataset):
        meaning = "are" if arguments.duplicates_are_negatives else "are not"
        logger.warning(
            "split %s: %d of %d rows share their first caption with others, %d captions differ; pairs of equal "
            "captions %s each other's negatives (--duplicates_are_negatives)",
            *(split, shared, len(dataset), len(counts), meaning),
        )


# --- rows ---

PLACE = "__place__"  # column of a stream: the number of the row before shuffling
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


def evaluation_pictures(dataset: Dataset, image_processor: CLIPImageProcessor) -> Dataset:
    """Give every row its pixels (C, H, W) through the stock processor, the first of its captions, and its id."""

    def transform(rows: dict[str, list]) -> dict[str, list]:
        flat = [as_rgb(picture) for picture in rows[IMAGE]]
        captions = [as_list(captions)[0] for captions in rows[CAPTIONS]]
        return {
            "pixel_values": list(image_processor(flat, return_tensors="pt").pixel_values),
            "caption": captions,
            "group_id": list(map(caption_id, captions)),
        }

    return dataset.with_transform(transform)


# --- streams ---


def check_streaming(data: DataArguments, training: TrainingArguments) -> None:
    """Set how processes share a stream, each reading its own part; ValueError for what a stream cannot do."""
    if data.group_column is not None:
        raise ValueError("--group_column picks from rows that are all known, which those of a stream are not; drop one")
    strategies = ("eval_strategy", "save_strategy", "logging_strategy")
    by_epoch = [name for name in strategies if getattr(training, name) == "epoch"]
    if training.world_size > 1 and by_epoch:
        raise ValueError(
            f"the processes come to the end of their parts of a stream at different steps, got --{by_epoch[0]} epoch; "
            "set it to steps"
        )
    if training.world_size > 1 and training.gradient_accumulation_steps > 1:
        raise ValueError(
            "the processes come to the end of their parts of a stream at different steps, got "
            f"--gradient_accumulation_steps {training.gradient_accumulation_steps}; set it to 1"
        )
    if training.resume_from_checkpoint:
        logger.warning("a stream goes on where it was stopped if that was in its first pass; later, in its second")
    training.accelerator_config.dispatch_batches = False  # texts of a batch are as long as the longest of it


def undecoded(dataset: IterableDataset) -> IterableDataset:
    """A stream whose pictures are bytes or paths, so that one that cannot be read does not end it."""
    return dataset.cast_column(IMAGE, ImageFeature(decode=False))


def training_stream(dataset: IterableDataset, arguments: DataArguments, tokenizer, canvas: int, seed: int):
    """Training items of a stream, shuffled in a buffer; rows that cannot be used are skipped and named."""
    columns = dataset.column_names

    def make(rows: dict[str, list], places: list[int]) -> dict[str, list]:
        """One row as lists of length one -> a training item likewise, or lists of length zero."""
        row = {name: values[0] for name, values in rows.items()}
        problem = caption_problem(as_list(row[CAPTIONS]), tokenizer)
        item = None
        try:
            if problem != EMPTY:
                picture = ImageFeature().decode_example(row[IMAGE])
                with seeded(seed, places[0]):
                    item = training_item({**row, IMAGE: picture}, arguments, tokenizer, canvas)
        except UNREADABLE as error:
            problem = f"an unreadable picture ({error})"
        if problem is not None:
            logger.warning("stream: row %d with %s", row[PLACE], problem)
        return {name: [] if item is None else [item[name]] for name in ITEM}

    dataset = undecoded(dataset).map(lambda row, place: {PLACE: place}, with_indices=True)
    dataset = dataset.shuffle(seed=seed, buffer_size=1000)
    return dataset.map(make, with_indices=True, batched=True, batch_size=1, remove_columns=[*columns, PLACE])


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
