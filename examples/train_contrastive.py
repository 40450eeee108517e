"""Train or fine-tune a two-tower `VitEmbedForContrastive` on captioned pictures with the stock Trainer.

    python examples/train_contrastive.py --dataset data/emoji --group_column name \\
        --config_name small.json --tokenizer_name data/tokenizer --output_dir run --do_train --do_eval --do_predict

The dataset is a folder written by `datasets` (`save_to_disk`), a folder of parquet files, an image folder with
`metadata.jsonl`, or a name on the Hub. Each row has an image and a caption, or a list of captions whose first is the
name of the picture and whose others are tags. With `--group_column` one step draws one picture of each group, so that
two pictures of the same thing are never each other's negatives; without it they are, as in CLIP.

Needs: `pip install accelerate datasets kornia pillow tqdm`.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from kornia import augmentation
from PIL import Image, ImageOps
from tqdm import tqdm
from transformers import (
    CLIPImageProcessor,
    CLIPProcessor,
    CLIPTokenizer,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from vit_embed import VitEmbedConfig, VitEmbedForContrastive

logger = logging.getLogger("train_contrastive")

RECALL_AT = (1, 5, 10)
# A third of the captions is put into a sentence, as zero-shot pipelines do with their labels.
SENTENCES = ("a picture of {}", "a photo of {}", "This is a photo of {}.")
# A mirrored picture keeps its caption unless the caption names a side.
SIDED = {
    *("left", "right", "clockwise", "counterclockwise", "back", "next", "previous", "forward", "reverse"),
    *("clock", "quarter", "waxing", "waning", "button"),
}


@dataclass
class ModelArguments:
    """Which model to start from."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "checkpoint to fine-tune"})
    config_name: str | None = field(default=None, metadata={"help": "config.json of a model to train from scratch"})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "folder of a CLIP tokenizer; default: the checkpoint's own"}
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "eager or sdpa; under bf16 on a CPU eager can be the faster one, time both"}
    )


@dataclass
class DataArguments:
    """Which pictures and captions, and how they are varied while training."""

    dataset: str = field(metadata={"help": "folder of a saved dataset, of parquet, of images, or a name on the Hub"})
    image_column: str = field(default="image", metadata={"help": "column of the pictures"})
    caption_column: str = field(default="captions", metadata={"help": "column of a caption or of a list of captions"})
    group_column: str | None = field(default=None, metadata={"help": "column equal for pictures of the same thing"})
    train_split: str = field(default="train", metadata={"help": "split that is trained on"})
    validation_split: str = field(default="validation", metadata={"help": "split that picks the best checkpoint"})
    test_split: str = field(default="test", metadata={"help": "split for --do_predict, never seen before"})
    rotation: float = field(default=15.0, metadata={"help": "largest rotation, degrees"})
    mirror: float = field(default=0.5, metadata={"help": "chance of a mirrored picture, 0 to 1"})
    jitter: float = field(default=0.3, metadata={"help": "largest relative change of brightness, contrast, saturation"})
    hue: float = field(default=0.04, metadata={"help": "largest change of hue, 0 to 0.5 turns"})


def load_splits(path: str) -> DatasetDict:
    """Open a saved dataset, a folder of parquet files, an image folder or a dataset of the Hub."""
    folder = Path(path)
    if (folder / "dataset_dict.json").exists():
        return load_from_disk(path)
    if folder.is_dir() and any(folder.rglob("*.parquet")):
        return load_dataset("parquet", data_dir=path)
    if folder.is_dir():
        return load_dataset("imagefolder", data_dir=path)
    return load_dataset(path)


def as_list(captions: str | list[str]) -> list[str]:
    """Give one caption and a list of captions the same form."""
    return [captions] if isinstance(captions, str) else list(captions)


def check_rows(dataset: Dataset, split: str, arguments: DataArguments, tokenizer: CLIPTokenizer) -> Dataset:
    """Drop rows with an unreadable picture or no caption, count captions that will be cut, and name them in the log."""
    missing = {arguments.image_column, arguments.caption_column} - set(dataset.column_names)
    if missing:
        raise ValueError(
            f"expected columns {sorted(missing)} in split {split!r}, found {dataset.column_names}; "
            "set --image_column and --caption_column"
        )
    bad: dict[str, list[int]] = {"unreadable picture": [], "empty caption": [], "caption too long, cut": []}
    all_captions = dataset.select_columns([arguments.caption_column])
    pictures = dataset.select_columns([arguments.image_column])
    for row in tqdm(range(len(dataset)), desc=f"check {split}"):
        captions = as_list(all_captions[row][arguments.caption_column] or [])
        if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
            bad["empty caption"].append(row)
            continue
        if max(map(len, tokenizer(captions, verbose=False).input_ids)) > tokenizer.model_max_length:
            bad["caption too long, cut"].append(row)
        try:
            pictures[row][arguments.image_column].load()
        except (OSError, ValueError, AttributeError):  # AttributeError: the cell is empty
            bad["unreadable picture"].append(row)
    for reason, rows in bad.items():
        if rows:
            logger.warning(
                "split %s: %d rows with %s: %s%s", split, len(rows), reason, rows[:10], " ..." if len(rows) > 10 else ""
            )
    dropped = set(bad["unreadable picture"]) | set(bad["empty caption"])
    if len(dropped) == len(dataset):
        raise ValueError(f"expected rows with a picture and a caption in split {split!r}, all {len(dataset)} are bad")
    logger.info("split %s: %d rows kept, %d dropped", split, len(dataset) - len(dropped), len(dropped))
    return dataset.select([row for row in range(len(dataset)) if row not in dropped]) if dropped else dataset


def draw_caption(captions: list[str]) -> str:
    """Draw one text: the name (1/2), the name and tags (1/3) or tags alone (1/6), at times in a sentence."""
    name, tags = captions[0], captions[1:]
    choice = random.random()
    if choice < 1 / 2 or len(tags) < 2:
        text = name
    else:
        chosen = random.sample(tags, random.randint(2, min(4, len(tags))))
        text = ", ".join([name, *chosen] if choice < 5 / 6 else chosen)
    return random.choice(SENTENCES).format(text) if random.random() < 1 / 3 else text


class TrainingPictures(torch.utils.data.Dataset):
    """One item a group: a random picture of it as RGBA uint8 (4, S, S), and a random caption."""

    def __init__(self, dataset: Dataset, arguments: DataArguments, size: int) -> None:
        self.dataset, self.arguments, self.size = dataset, arguments, size
        self.groups = [[row] for row in range(len(dataset))]
        if arguments.group_column is not None:
            rows_of: dict[object, list[int]] = {}
            for row, group in enumerate(dataset[arguments.group_column]):
                rows_of.setdefault(group, []).append(row)
            self.groups = list(rows_of.values())

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict[str, object]:
        row = self.dataset[random.choice(self.groups[index])]
        picture = row[self.arguments.image_column].convert("RGBA")
        if picture.size != (self.size, self.size):
            picture = ImageOps.fit(picture, (self.size, self.size))
        captions = as_list(row[self.arguments.caption_column])
        if random.random() < self.arguments.mirror and not SIDED & set(" ".join(captions).lower().split()):
            picture = ImageOps.mirror(picture)
        return {"rgba": torch.from_numpy(np.array(picture)).permute(2, 0, 1), "caption": draw_caption(captions)}


def evaluation_pictures(dataset: Dataset, arguments: DataArguments, image_processor: CLIPImageProcessor) -> Dataset:
    """Give every row its pixels (C, H, W) on white through the stock processor, and the first of its captions."""

    def transform(rows: dict[str, list]) -> dict[str, list]:
        flat = []
        for picture in rows[arguments.image_column]:
            rgba = picture.convert("RGBA")
            white = Image.new("RGBA", rgba.size, "white")
            flat.append(Image.alpha_composite(white, rgba).convert("RGB"))
        pixel_values = image_processor(flat, return_tensors="pt").pixel_values
        return {
            "pixel_values": list(pixel_values),
            "caption": [as_list(captions)[0] for captions in rows[arguments.caption_column]],
        }

    return dataset.with_transform(transform)


class Collator:
    """Rows -> pixel_values (B, 3, H, W) and input_ids (B, T); pictures with alpha are varied on the whole batch."""

    def __init__(self, processor: CLIPProcessor, arguments: DataArguments, image_size: tuple[int, int]) -> None:
        self.tokenizer = processor.tokenizer
        self.image_size = image_size
        self.move = augmentation.RandomAffine(
            degrees=arguments.rotation, translate=(0.1, 0.1), scale=(0.75, 1.15), shear=(-8.0, 8.0), p=1.0
        )
        jitter = (arguments.jitter, arguments.jitter, arguments.jitter, arguments.hue)
        self.recolour = torch.nn.Sequential(
            augmentation.ColorJiggle(*jitter, p=0.8),
            augmentation.RandomGrayscale(p=0.1),
            augmentation.RandomGaussianBlur((3, 3), (0.3, 1.2), p=0.2),
            augmentation.Normalize(processor.image_processor.image_mean, processor.image_processor.image_std),
        )

    def vary(self, rgba: torch.Tensor) -> torch.Tensor:
        """RGBA uint8 (B, 4, S, S) -> normalised pixels (B, 3, H, W): moved, on a random background, recoloured."""
        rgba = self.move(rgba.float() / 255)
        rgba = torch.nn.functional.interpolate(rgba, self.image_size, mode="bilinear", antialias=True)
        alpha = rgba[:, 3:]
        # A third of the backgrounds is white, a third light and a third any colour.
        darkest = torch.tensor([1.0, 0.75, 0.0])[torch.randint(3, (len(rgba),))].view(-1, 1, 1, 1)
        background = darkest + (1 - darkest) * torch.rand(len(rgba), 3, 1, 1)
        return self.recolour((alpha * rgba[:, :3] + (1 - alpha) * background).clamp(0, 1))

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        tokens = self.tokenizer(
            [row["caption"] for row in rows],
            padding=True,
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        )
        if "rgba" in rows[0]:
            pixel_values = self.vary(torch.stack([row["rgba"] for row in rows]))
        else:
            pixel_values = torch.stack([row["pixel_values"] for row in rows])
        return {"pixel_values": pixel_values, "input_ids": tokens.input_ids}


def recalls(hits: np.ndarray, similarity: np.ndarray) -> list[float]:
    """Share of the rows of `similarity` (N, M) with one of their `hits` (N, M) among the k most similar columns."""
    ranked = np.argsort(-similarity, axis=1)[:, : max(RECALL_AT)]
    found = np.take_along_axis(hits, ranked, axis=1)
    return [float(found[:, :k].any(axis=1).mean()) for k in RECALL_AT]


def retrieval_metrics(captions: list[str]) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return a compute_metrics over all N captions of a split: recall at k both ways, and that of chance."""
    hits = np.array(captions)[:, None] == np.array(captions)[None, :]  # (N, N): equal captions are all right

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        image_embeds, text_embeds = prediction.predictions  # (N, projection_dim) each, unit length
        similarity = text_embeds.astype(np.float32) @ image_embeds.astype(np.float32).T
        metrics = {}
        for k, value in zip(RECALL_AT, recalls(hits, similarity), strict=True):
            metrics[f"text_to_image_recall@{k}"] = value
        for k, value in zip(RECALL_AT, recalls(hits.T, similarity.T), strict=True):
            metrics[f"image_to_text_recall@{k}"] = value
            metrics[f"chance_recall@{k}"] = min(1.0, k / len(hits))
        return metrics

    return compute


def load_model(arguments: ModelArguments) -> tuple[VitEmbedForContrastive, CLIPProcessor]:
    """Return the model and its processor, both from a checkpoint or both new."""
    if (arguments.model_name_or_path is None) == (arguments.config_name is None):
        raise ValueError("expected one of --model_name_or_path and --config_name, got both or neither")
    if arguments.model_name_or_path is not None:
        model = VitEmbedForContrastive.from_pretrained(
            arguments.model_name_or_path, attn_implementation=arguments.attn_implementation
        )
        tokenizer = CLIPTokenizer.from_pretrained(arguments.tokenizer_name or arguments.model_name_or_path)
        image_processor = CLIPImageProcessor.from_pretrained(arguments.model_name_or_path)
        return model, CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)
    if arguments.tokenizer_name is None:
        raise ValueError("expected --tokenizer_name beside --config_name, got none; name a folder of a CLIP tokenizer")
    config = VitEmbedConfig.from_pretrained(arguments.config_name)
    tokenizer = CLIPTokenizer.from_pretrained(arguments.tokenizer_name)
    if len(tokenizer) != config.text_config.vocab_size:
        raise ValueError(
            f"expected a tokenizer of text_config.vocab_size = {config.text_config.vocab_size} tokens, "
            f"{arguments.tokenizer_name} has {len(tokenizer)}; change one of them"
        )
    config._attn_implementation = arguments.attn_implementation
    height, width = config.image_shape
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": min(height, width)}, crop_size={"height": height, "width": width}
    )
    return VitEmbedForContrastive(config), CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)


def main() -> None:
    """Parse the command line, then train, evaluate and test as asked."""
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments), description=__doc__)
    model_arguments, data_arguments, training_arguments = parser.parse_args_into_dataclasses()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    output_dir = Path(training_arguments.output_dir)
    resume = training_arguments.resume_from_checkpoint
    if training_arguments.do_train and not resume and output_dir.is_dir() and any(output_dir.iterdir()):
        raise ValueError(
            f"expected --output_dir {output_dir} to be empty, it is not; name another folder, or continue "
            "with --resume_from_checkpoint True"
        )
    set_seed(training_arguments.seed)
    # Rows carry pictures and captions, which no forward takes by name; the collator turns them into what it takes.
    training_arguments.remove_unused_columns = False

    model, processor = load_model(model_arguments)
    wanted = {
        data_arguments.train_split: training_arguments.do_train,
        data_arguments.validation_split: training_arguments.do_eval or training_arguments.eval_strategy != "no",
        data_arguments.test_split: training_arguments.do_predict,
    }
    caption_column = data_arguments.caption_column
    splits = load_splits(data_arguments.dataset)
    missing = {split for split, needed in wanted.items() if needed} - set(splits)
    if missing:
        raise ValueError(f"expected splits {sorted(missing)} in {data_arguments.dataset}, found {sorted(splits)}")
    splits = {
        split: check_rows(splits[split], split, data_arguments, processor.tokenizer)
        for split, needed in wanted.items()
        if needed
    }
    evaluated = {
        split: evaluation_pictures(rows, data_arguments, processor.image_processor)
        for split, rows in splits.items()
        if split != data_arguments.train_split
    }
    metrics_of = {
        split: retrieval_metrics([as_list(captions)[0] for captions in splits[split][caption_column]])
        for split in evaluated
    }
    train_dataset = None
    if training_arguments.do_train:
        # A margin of a quarter keeps detail where a picture is enlarged.
        canvas = max(model.config.image_shape) * 5 // 4
        train_dataset = TrainingPictures(splits[data_arguments.train_split], data_arguments, canvas)
    trainer = Trainer(
        model=model,
        args=training_arguments,
        data_collator=Collator(processor, data_arguments, model.config.image_shape),
        train_dataset=train_dataset,
        eval_dataset=evaluated.get(data_arguments.validation_split),
        compute_metrics=metrics_of.get(data_arguments.validation_split),
        processing_class=processor,
    )
    if training_arguments.do_train:
        result = trainer.train(resume_from_checkpoint=True if resume == "True" else resume)
        trainer.save_model()
        trainer.save_metrics("train", result.metrics)
    if training_arguments.do_eval:
        trainer.save_metrics("eval", trainer.evaluate())
    if training_arguments.do_predict:
        trainer.compute_metrics = metrics_of[data_arguments.test_split]
        # predict, not evaluate: with persistent workers evaluate would read the validation split again.
        result = trainer.predict(evaluated[data_arguments.test_split])
        logger.info("split %s: %s", data_arguments.test_split, result.metrics)
        trainer.save_metrics("test", result.metrics)


if __name__ == "__main__":
    main()
