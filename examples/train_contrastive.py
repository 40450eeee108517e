"""Train or fine-tune a two-tower `VitEmbedForContrastive` on captioned pictures with the stock Trainer.

    python examples/train_contrastive.py --dataset data/icons --group_column group --tag_column tags \
        --config_name configs/icon-search.json --tokenizer_name . --output_dir runs/icons --do_train --do_eval

The dataset is a folder written by `datasets` (`save_to_disk`), of parquet files, of tar shards (WebDataset) or of
pictures with `metadata.jsonl`, or a name on the Hub; `--streaming` reads it without a copy. Each row has an image and a
caption, or a list of captions, the first of which is the name of the picture. Pairs whose first captions are equal are
not each other's negatives (`--duplicates_are_negatives` for CLIP's way). With `--group_column` an epoch draws one
picture of each group. Pictures in grey and alpha ("LA": icons) are drawn in random colours on random backgrounds.

Needs: `pip install accelerate datasets kornia matplotlib pillow scikit-learn tqdm`.
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
import textwrap
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict, IterableDataset, Value
from datasets import Image as ImageFeature
from kornia import augmentation
from matplotlib.figure import Figure
from picture_files import UNREADABLE, as_rgb
from PIL import ImageOps
from recipe import Problems, RecipeTrainer, SeededRows, load_splits, parse, prepare, run, seeded
from sklearn.metrics import top_k_accuracy_score
from tqdm import tqdm
from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer, EvalPrediction, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from vit_embed import VitEmbedConfig, VitEmbedForContrastive

logger = logging.getLogger("train_contrastive")

RECALL_AT = (1, 5, 10)
# Kinds of columns that hold texts, or lists of texts; the last is that of a column of empty lists.
TEXT = (Value("string"), Value("large_string"), Value("string_view"), Value("null"))
SENTENCES = ("a picture of {}", "a photo of {}", "an icon of {}", "This is a photo of {}.")
# A mirrored picture keeps its caption unless the caption names a side.
SIDED = {
    *("left", "right", "clockwise", "counterclockwise", "back", "next", "previous", "forward", "reverse"),
    *("clock", "quarter", "waxing", "waning", "button"),
}
SHEET_QUERIES, SHEET_COLUMNS = 8, 8


@dataclass
class ModelArguments:
    """Which model to start from."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "checkpoint to fine-tune"})
    config_name: str | None = field(default=None, metadata={"help": "config.json of a model to train from scratch"})
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
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "eager or sdpa; under bf16 on a CPU eager can be the faster one, time both"}
    )


@dataclass
class DataArguments:
    """Which pictures and captions, and how they are varied while training."""

    dataset: str = field(metadata={"help": "saved dataset, or folder of parquet, tar shards or images, or a Hub name"})
    streaming: bool = field(default=False, metadata={"help": "read rows as they come; needs --max_steps"})
    image_column: str = field(default="image", metadata={"help": "column of the pictures"})
    caption_column: str = field(default="captions", metadata={"help": "column of a caption or of a list of captions"})
    tag_column: str | None = field(
        default=None, metadata={"help": "column of lists of words that say more about the picture beside a caption"}
    )
    group_column: str | None = field(default=None, metadata={"help": "column equal for pictures of the same thing"})
    duplicates_are_negatives: bool = field(
        default=False, metadata={"help": "keep pairs with the same first caption as each other's negatives, as CLIP"}
    )
    train_split: str = field(default="train", metadata={"help": "split that is trained on"})
    validation_split: list[str] = field(
        default_factory=lambda: ["validation"], metadata={"help": "splits that pick the best checkpoint"}
    )
    test_split: str = field(default="test", metadata={"help": "split for --do_predict, never seen before"})
    validation_share: float = field(
        default=0.1, metadata={"help": "share of the training split to hold out where there is no validation split"}
    )
    name_share: float = field(
        default=0.6, metadata={"help": "share of the texts that are the name alone, where there is more to draw from"}
    )
    sentence_share: float = field(default=0.2, metadata={"help": "share of the texts put into a sentence"})
    rotation: float = field(default=10.0, metadata={"help": "largest rotation, degrees"})
    mirror: float = field(default=0.0, metadata={"help": "chance of a mirrored picture, 0 to 1"})
    jitter: float = field(default=0.3, metadata={"help": "largest relative change of brightness, contrast, saturation"})
    hue: float = field(default=0.04, metadata={"help": "largest change of hue, 0 to 0.5 turns"})


def as_list(captions: str | list[str] | None) -> list[str]:
    """Give one caption and a list of captions the same form."""
    return [captions] if isinstance(captions, str) else list(captions or ())


def caption_problem(captions: list, tokenizer: CLIPTokenizer) -> str | None:
    """What is wrong with the captions of a row, if anything is."""
    if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
        return "empty caption"
    if max(map(len, tokenizer(captions, verbose=False).input_ids)) > tokenizer.model_max_length:
        return "caption too long, cut"
    return None


def check_columns(dataset: Dataset | IterableDataset, split: str, arguments: DataArguments) -> None:
    """Raise ValueError for a column that is asked for and is not there."""
    wanted = {arguments.image_column, arguments.caption_column, arguments.tag_column, arguments.group_column} - {None}
    missing = wanted - set(dataset.column_names or wanted)
    if missing:
        raise ValueError(
            f"expected columns {sorted(missing)} in split {split!r}, found {dataset.column_names}; "
            "set --image_column, --caption_column, --tag_column and --group_column"
        )
    feature = (dataset.features or {}).get(arguments.image_column)
    if not isinstance(feature, ImageFeature):
        raise ValueError(
            f"expected pictures in column {arguments.image_column!r} of split {split!r}, it has {feature}; set "
            "--image_column, or cast it to datasets.Image()"
        )
    for flag, column in (("--caption_column", arguments.caption_column), ("--tag_column", arguments.tag_column)):
        feature = dataset.features[column] if column else Value("string")
        if getattr(feature, "feature", feature) not in TEXT:
            raise ValueError(
                f"expected texts or lists of texts in column {column!r} of split {split!r}, it is {feature}; set {flag}"
            )


def check_rows(dataset: Dataset, split: str, arguments: DataArguments, tokenizer: CLIPTokenizer) -> Dataset:
    """Drop rows with an unreadable picture or no caption, count captions that will be cut, and name them in the log."""
    check_columns(dataset, split, arguments)
    problems = Problems()
    all_captions = dataset[arguments.caption_column][:]
    pictures = dataset.select_columns([arguments.image_column])
    for row in tqdm(range(len(dataset)), desc=f"check {split}"):
        problem = caption_problem(as_list(all_captions[row]), tokenizer)
        if problem is not None:
            problems.add(problem, row, drop=problem == "empty caption")
        if problem != "empty caption":
            try:
                as_rgb(pictures[row][arguments.image_column])
            except UNREADABLE:
                problems.add("unreadable picture", row)
    dropped = problems.report(split, len(dataset))
    return dataset.select([row for row in range(len(dataset)) if row not in dropped]) if dropped else dataset


def caption_id(caption: str) -> int:
    """A number in [0, 2^63) that is equal for equal captions."""
    return int.from_bytes(hashlib.sha256(caption.strip().lower().encode()).digest()[:8], "big") >> 1


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
    """`draw_caption`, or the name where what was made of it is longer than the tokenizer's limit."""
    text = draw_caption(captions, tags, arguments)
    fits = len(tokenizer(text, verbose=False).input_ids) <= tokenizer.model_max_length
    return text if fits else captions[0]


PLACE = "__place__"  # column that says where in its stream a row was
# What a training item has.
ITEM = ("rgba", "is_mono", "caption", "group_id", "key")


def training_item(row: dict, arguments: DataArguments, tokenizer: CLIPTokenizer, canvas: int) -> dict[str, object]:
    """A row -> rgba uint8 (4, canvas, canvas), whether it has one colour, a random caption, ids of caption and draw."""
    picture = row[arguments.image_column]
    captions = as_list(row[arguments.caption_column])
    tags = list(filter(None, as_list(row[arguments.tag_column]))) if arguments.tag_column else []
    is_mono = picture.mode == "LA"
    picture = picture.convert("RGBA") if "A" in picture.mode else as_rgb(picture).convert("RGBA")
    if picture.size != (canvas, canvas):
        picture = ImageOps.fit(picture, (canvas, canvas))
    if random.random() < arguments.mirror and not SIDED & set(" ".join(captions).lower().split()):
        picture = ImageOps.mirror(picture)
    return {
        "rgba": torch.from_numpy(np.array(picture)).permute(2, 0, 1),
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


def with_validation(splits: DatasetDict, arguments: DataArguments, seed: int) -> DatasetDict:
    """The splits, with a validation split of whole groups taken out of the training split where there is none."""
    train, (validation, *others) = arguments.train_split, arguments.validation_split
    if others or validation in splits or train not in splits:
        return splits
    check_columns(splits[train], train, arguments)
    groups = rows_of_groups(splits[train], arguments.group_column)
    order = np.random.default_rng(seed).permutation(len(groups))
    count = math.ceil(arguments.validation_share * len(groups))
    held_out, kept = (sorted(row for group in part for row in groups[group]) for part in (order[:count], order[count:]))
    logger.info("no split %r: %d rows of %r are held out", validation, len(held_out), train)
    return DatasetDict({**splits, train: splits[train].select(kept), validation: splits[train].select(held_out)})


class Groups:
    """Lists of row numbers as rows: item i is a random row of group i."""

    def __init__(self, dataset: Dataset, column: str | None) -> None:
        self.dataset, self.rows = dataset, rows_of_groups(dataset, column)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.dataset[random.choice(self.rows[index])]


def undecoded(dataset: IterableDataset, arguments: DataArguments) -> IterableDataset:
    """A stream whose pictures are bytes or paths, so that one that cannot be read does not end it."""
    return dataset.cast_column(arguments.image_column, ImageFeature(decode=False))


def training_stream(dataset: IterableDataset, arguments: DataArguments, tokenizer, canvas: int, seed: int):
    """Training items of a stream, shuffled in a buffer; rows that cannot be used are passed over and named."""
    column, columns = arguments.image_column, dataset.column_names

    def make(rows: dict[str, list], places: list[int]) -> dict[str, list]:
        """One row as lists of length one -> a training item likewise, or lists of length zero."""
        row = {name: values[0] for name, values in rows.items()}
        problem = caption_problem(as_list(row[arguments.caption_column]), tokenizer)
        item = None
        try:
            if problem != "empty caption":
                picture = ImageFeature().decode_example(row[column])
                with seeded(seed, places[0]):
                    item = training_item({**row, column: picture}, arguments, tokenizer, canvas)
        except UNREADABLE as error:
            problem = f"unreadable picture ({error})"
        if problem is not None:
            logger.warning("stream: row %d with %s", row[PLACE], problem)
        return {name: [] if item is None else [item[name]] for name in ITEM}

    dataset = undecoded(dataset, arguments).map(lambda row, place: {PLACE: place}, with_indices=True)
    dataset = dataset.shuffle(seed=seed, buffer_size=1000)
    return dataset.map(make, with_indices=True, batched=True, batch_size=1, remove_columns=[*columns, PLACE])


def evaluation_pictures(dataset: Dataset, arguments: DataArguments, image_processor: CLIPImageProcessor) -> Dataset:
    """Give every row its pixels (C, H, W) on white through the stock processor, the first of its captions, its id."""

    def transform(rows: dict[str, list]) -> dict[str, list]:
        flat = [as_rgb(picture) for picture in rows[arguments.image_column]]
        captions = [as_list(captions)[0] for captions in rows[arguments.caption_column]]
        return {
            "pixel_values": list(image_processor(flat, return_tensors="pt").pixel_values),
            "caption": captions,
            "group_id": list(map(caption_id, captions)),
        }

    return dataset.with_transform(transform)


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """(B, T) int64, padded to the longest; a text beyond the tokenizer's limit is cut, as was counted at the start."""
    limit = tokenizer.model_max_length
    return tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt").input_ids


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
        # What has one colour is black in half of the cases, else any colour; dark grounds turn it light.
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


def recalls(similarity: np.ndarray, query_ids: np.ndarray, found_ids: np.ndarray) -> list[float]:
    """Share of the rows of `similarity` (queries, found) whose own id is among the k most similar ids."""
    ids, starts = np.unique(found_ids[np.argsort(found_ids, kind="stable")], return_index=True)
    by_id = np.maximum.reduceat(similarity[:, np.argsort(found_ids, kind="stable")], starts, axis=1)  # (queries, ids)
    # Further classes that nothing is: the metric reads two classes in another way.
    by_id = np.pad(by_id, ((0, 0), (0, 2)), constant_values=similarity.min() - 1)
    own, labels = np.searchsorted(ids, query_ids), np.arange(len(ids) + 2)
    return [float(top_k_accuracy_score(own, by_id, k=min(k, len(ids)), labels=labels)) for k in RECALL_AT]


def retrieval_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Recall at k both ways over all pairs, equal captions counting as one, and that of chance."""
    image_embeds, text_embeds = (rows.astype(np.float32) for rows in prediction.predictions)  # (N, J), unit length
    ids = prediction.label_ids
    similarity = text_embeds @ image_embeds.T
    metrics = {}
    for name, rows in (("text_to_image", similarity), ("image_to_text", similarity.T)):
        metrics |= {f"{name}_recall@{k}": value for k, value in zip(RECALL_AT, recalls(rows, ids, ids), strict=True)}
    return metrics | {f"chance_recall@{k}": min(1.0, k / len(np.unique(ids))) for k in RECALL_AT}


def draw_sheet(rows_of: dict[str, Dataset], arguments: DataArguments, output: EvalLoopOutput, path: Path) -> None:
    """Save what some captions find: a caption a line, its best pictures from the left, the right one framed."""
    rows = rows_of[path.name.rsplit("-", 1)[0]]
    image_embeds, text_embeds = output.predictions[:2]
    queries = np.linspace(0, len(rows) - 1, min(SHEET_QUERIES, len(rows))).astype(int)
    best = np.argsort(-(text_embeds[queries] @ image_embeds.T), axis=1)[:, :SHEET_COLUMNS]
    figure = Figure(figsize=(1.1 * SHEET_COLUMNS + 2, 1.2 * len(queries)))
    axes = figure.subplots(len(queries), SHEET_COLUMNS + 1, squeeze=False)
    for line, query, found in zip(axes, queries, best, strict=True):
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_frame_on(False)
        caption = as_list(rows[int(query)][arguments.caption_column])[0]
        line[0].text(1, 0.5, textwrap.fill(caption, 22), ha="right", va="center", fontsize=9)
        for axis, index in zip(line[1:], found, strict=False):
            axis.imshow(as_rgb(rows[int(index)][arguments.image_column]))
            if output.label_ids[index] == output.label_ids[query]:
                axis.set_frame_on(True)
                for spine in axis.spines.values():
                    spine.set(color="tab:green", linewidth=3)
    figure.savefig(path, dpi=80, bbox_inches="tight")


def image_processor_of(config: VitEmbedConfig, **kwargs) -> CLIPImageProcessor:
    """CLIP's processor for the size of a config: the shorter side is brought to it, the middle is cut out."""
    height, width = config.image_shape
    size = {"size": {"shortest_edge": min(height, width)}, "crop_size": {"height": height, "width": width}}
    return CLIPImageProcessor(**{**kwargs, **size})


def read_tokenizer(folder: str, config: VitEmbedConfig) -> CLIPTokenizer:
    """A CLIP tokenizer whose limit is at most the model's."""
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.text_config.max_position_embeddings)
    return tokenizer


def load_model(arguments: ModelArguments) -> tuple[VitEmbedForContrastive, CLIPProcessor]:
    """Return the model and its processor, both from a checkpoint or both new."""
    if (arguments.model_name_or_path is None) == (arguments.config_name is None):
        raise ValueError("expected one of --model_name_or_path and --config_name, got both or neither")
    names = ("image_size", "contrastive_loss", "hard_negative_beta", "contrastive_chunk_size")
    overrides = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.model_name_or_path is not None:
        model = VitEmbedForContrastive.from_pretrained(
            arguments.model_name_or_path,
            attn_implementation=arguments.attn_implementation,
            dtype=torch.float32,  # of the weights that are trained, whatever is stored; --bf16 is for the arithmetic
            **overrides,
        )
        tokenizer = read_tokenizer(arguments.tokenizer_name or arguments.model_name_or_path, model.config)
        image_processor = CLIPImageProcessor.from_pretrained(arguments.model_name_or_path)
        if arguments.image_size is not None:
            image_processor = image_processor_of(model.config, **image_processor.to_dict())
        return model, CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)
    if arguments.tokenizer_name is None:
        raise ValueError("expected --tokenizer_name beside --config_name, got none; name a folder of a CLIP tokenizer")
    config = VitEmbedConfig.from_pretrained(arguments.config_name, **overrides)
    tokenizer = read_tokenizer(arguments.tokenizer_name, config)
    if len(tokenizer) != config.text_config.vocab_size:
        raise ValueError(
            f"expected a tokenizer of text_config.vocab_size = {config.text_config.vocab_size} tokens, "
            f"{arguments.tokenizer_name} has {len(tokenizer)}; change one of them"
        )
    config._attn_implementation = arguments.attn_implementation
    processor = CLIPProcessor(image_processor=image_processor_of(config), tokenizer=tokenizer)
    return VitEmbedForContrastive(config), processor


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


def main() -> None:
    """Parse the command line, then train, evaluate and test as asked."""
    model_arguments, data, recipe, training = parse(ModelArguments, DataArguments, description=__doc__)
    training.label_names = ["group_ids"]  # what the metrics tell pairs by
    model, processor = load_model(model_arguments)
    prepare(model, recipe)
    splits = load_splits(data.dataset, data.streaming)
    if training.do_eval and not data.streaming:
        splits = with_validation(splits, data, training.seed)
    trained = [data.train_split] * training.do_train
    evaluated = list(dict.fromkeys(data.validation_split * training.do_eval + [data.test_split] * training.do_predict))
    missing = {*trained, *evaluated} - set(splits)
    if missing:
        raise ValueError(
            f"expected splits {sorted(missing)} in {data.dataset}, found {sorted(splits)}; set --train_split, "
            "--validation_split and --test_split"
        )
    checked = {}
    for split in dict.fromkeys(evaluated + trained * (not data.streaming)):
        rows = splits[split]
        if data.streaming:  # metrics need all of it
            check_columns(rows, split, data)
            rows = Dataset.from_list(list(undecoded(rows, data)), features=rows.features)
        checked[split] = check_rows(rows, split, data, processor.tokenizer)
    pictures = {split: evaluation_pictures(checked[split], data, processor.image_processor) for split in evaluated}
    # A margin keeps detail where a picture is enlarged.
    canvas = max(model.config.image_shape) * 4 // 3
    train_dataset = None
    if training.do_train and data.streaming:
        check_streaming(data, training)
        check_columns(splits[data.train_split], data.train_split, data)
        train_dataset = training_stream(splits[data.train_split], data, processor.tokenizer, canvas, training.seed)
    elif training.do_train:
        groups = Groups(checked[data.train_split], data.group_column)
        train_dataset = SeededRows(
            groups, partial(training_item, arguments=data, tokenizer=processor.tokenizer, canvas=canvas), training.seed
        )
    validation = {split: pictures[split] for split in data.validation_split * training.do_eval}
    is_one = len(validation) == 1
    sheets = {"eval" if is_one else f"eval_{split}": checked[split] for split in validation}
    if training.do_predict:
        sheets["test"] = checked[data.test_split]
    trainer = RecipeTrainer(
        recipe,
        partial(draw_sheet, sheets, data),
        model=model,
        args=training,
        data_collator=Collator(processor, data, model.config.image_shape),
        train_dataset=train_dataset,
        eval_dataset=next(iter(validation.values())) if is_one else validation or None,
        compute_metrics=retrieval_metrics,
        processing_class=processor,
    )
    run(trainer, test_dataset=pictures[data.test_split] if training.do_predict else None)


if __name__ == "__main__":
    main()
