"""Train or fine-tune a `VitEmbedForDepthEstimation` on pictures with depth with the stock Trainer.

    python examples/render_depth_scenes.py --output_dir data/scenes
    python examples/train_depth.py --dataset data/scenes --config_name configs/depth-scenes.json --max_depth 10 \\
        --output_dir run --do_train --do_eval --do_predict

The dataset is a folder with `train/images/NAME.png` and `train/depths/NAME.png` (so, too, `validation/` and `test/`; or
`images/` and `depths/` alone, which are one split named train), a folder written by `datasets` (`save_to_disk`), a
folder of parquet files, or a name on the Hub, with a column of pictures and one of depths. Whole numbers are divided by
`--depth_scale` (1000: millimetres, 256: KITTI), floating point ones are metres. What is zero, negative, infinite,
not a number or beyond `--max_depth` counts as not measured. What is wrong with the data is counted and named first.

A crop is enlarged to the size of the model, so what it shows looks nearer, and its depths are made smaller by the same
factor: those of a picture that the same camera took from there.

Every evaluation leaves its metrics, and `pictures/` in the output folder: picture, depth, prediction and error.
Metrics are the mean over pictures of what scikit-learn says of the measured pixels of each, as in the benchmarks of
NYU and KITTI, at the size of the depth maps where these are of one size; once as predicted, and once with each
prediction scaled to the median of its depth map (`median_scaled_`), which leaves out a wrong unit or camera.

Needs: `pip install accelerate datasets kornia matplotlib pillow scikit-learn tqdm`.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch
from datasets import Dataset, DatasetDict
from kornia import augmentation
from picture_files import UNREADABLE, as_rgb
from PIL import Image
from recipe import Problems, RecipeTrainer, SeededRows, load_splits, parse, prepare, run
from show_tokens import as_colours
from sklearn.metrics import mean_absolute_error, mean_absolute_percentage_error, root_mean_squared_error
from tqdm import tqdm
from transformers import DPTImageProcessor, EvalPrediction
from transformers.trainer_utils import EvalLoopOutput

from vit_embed import VitEmbedConfig, VitEmbedForDepthEstimation
from vit_embed.depth_vit_embed import resize_depth

matplotlib.use("Agg")  # a picture file is wanted, so no screen is
from matplotlib import pyplot  # noqa: E402

logger = logging.getLogger("train_depth")

SHIPPED_CHECKPOINT = str(Path(__file__).resolve().parent.parent)
PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}
DEPTH_SUFFIXES = {".png", ".tif", ".tiff", ".npy"}
# Medians in metres outside of which a depth map is more likely in another unit than of such a place.
PLAUSIBLE_MEDIAN = (0.01, 1000.0)
SMALLEST_PREDICTION = 1e-3  # metres; as in the benchmarks' own scripts, before a logarithm is taken
LARGEST_RATIO_ERROR = 0.01  # of height to width, between a picture and its depth
DELTAS = (1, 2, 3)
NUM_SHOWN = 6
LARGEST_SHOWN_ERROR = 0.25  # of the depth


@dataclass
class ModelArguments:
    """Which model to start from, and what of its depth head differs from its config."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "checkpoint whose trunk to train on; default: the one that ships"}
    )
    config_name: str | None = field(default=None, metadata={"help": "config.json of a model to train from scratch"})
    image_size: int | None = field(
        default=None, metadata={"help": "height and width in pixels; default: the checkpoint's own"}
    )
    depth_head_type: str | None = field(default=None, metadata={"help": "deconv or dpt; default: the config's own"})
    deconv_kernel_size: int | None = field(
        default=None,
        metadata={"help": "kernel of the deconv head, even, wider ones overlap; default: the config's own"},
    )
    depth_loss: str | None = field(default=None, metadata={"help": "silog, l1 or l2; default: the config's own"})
    depth_gradient_weight: float | None = field(
        default=None, metadata={"help": "factor of the gradient matching loss; default: the config's own"}
    )
    max_depth: float | None = field(
        default=None, metadata={"help": "metres that no prediction exceeds; default: the config's own"}
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "eager or sdpa; under bf16 on a CPU eager can be the faster one, time both"}
    )


@dataclass
class DataArguments:
    """Which pictures and depths, and how they are varied while training."""

    dataset: str = field(metadata={"help": "folder with images/ and depths/, of a saved dataset, or a name on the Hub"})
    image_column: str = field(default="image", metadata={"help": "column of the pictures"})
    depth_column: str = field(default="depth", metadata={"help": "column of the depths: pictures or arrays"})
    depth_scale: float = field(default=1000.0, metadata={"help": "what whole numbers are divided by to be metres"})
    train_split: str = field(default="train", metadata={"help": "split that is trained on"})
    validation_split: str = field(default="validation", metadata={"help": "split that picks the best checkpoint"})
    test_split: str = field(default="test", metadata={"help": "split for --do_predict, never seen before"})
    smallest_crop: float = field(
        default=0.6, metadata={"help": "smallest share of a picture's area in a crop, in (0, 1]; 1 does not crop"}
    )
    mirror: float = field(default=0.5, metadata={"help": "chance of a mirrored picture, 0 to 1"})
    jitter: float = field(default=0.3, metadata={"help": "largest relative change of brightness, contrast, saturation"})
    hue: float = field(default=0.0, metadata={"help": "largest change of hue, 0 to 0.5 turns"})

    def __post_init__(self) -> None:
        if not self.depth_scale > 0:
            raise ValueError(f"expected --depth_scale above 0, got {self.depth_scale}; 1000 is millimetres")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"expected --hue in [0, 0.5], got {self.hue}; 0.5 is any hue, 0 leaves it")
        if not 0 < self.smallest_crop <= 1:
            raise ValueError(f"expected --smallest_crop in (0, 1], got {self.smallest_crop}; 1 does not crop")


# --- data ---


def files_by_name(folder: Path, suffixes: set[str]) -> dict[str, str]:
    """The files below `folder` with one of these suffixes, by their path in it without the suffix."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in suffixes:
            continue
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise ValueError(f"expected one file of the name {name!r} in {folder}, found {found[name]} and {path}")
        found[name] = str(path)
    return found


def paired_rows(folder: Path, arguments: DataArguments) -> Dataset:
    """A row for each name in `images/` or `depths/` of `folder`: name, and both paths, None for a missing one."""
    images = files_by_name(folder / "images", PICTURE_SUFFIXES)
    depths = files_by_name(folder / "depths", DEPTH_SUFFIXES)
    names = sorted({*images, *depths})
    columns = {arguments.image_column: images, arguments.depth_column: depths}
    return Dataset.from_dict(
        {"name": names, **{column: [files.get(name) for name in names] for column, files in columns.items()}}
    )


def load_pairs(arguments: DataArguments) -> DatasetDict:
    """Every split of `--dataset`: rows of a picture and a depth, each a path or what `datasets` makes of a cell."""
    folder = Path(arguments.dataset)
    if (folder / "images").is_dir() and (folder / "depths").is_dir():
        return DatasetDict({arguments.train_split: paired_rows(folder, arguments)})
    parts = [path.parent for path in sorted(folder.glob("*/images")) if (path.parent / "depths").is_dir()]
    if parts:
        return DatasetDict({part.name: paired_rows(part, arguments) for part in parts})
    if (folder / "images").is_dir() or any(folder.glob("*/images")):
        raise ValueError(f"expected a folder depths/ beside images/ in {folder}, found none; name it so")
    return load_splits(arguments.dataset)


def read_picture(cell: str | Image.Image) -> Image.Image:
    """A path or a picture -> the picture in RGB, loaded."""
    return as_rgb(Image.open(cell) if isinstance(cell, str) else cell)


def read_depth(cell: str | Image.Image | list | np.ndarray, scale: float, max_depth: float | None) -> np.ndarray:
    """A path, a picture or an array -> depth (H, W) in metres, float32, 0 where nothing was measured.

    Args:
        cell: whole numbers are divided by `scale`, floating point ones are metres.
        max_depth: metres, what is beyond was not measured; None for no bound.
    """
    if isinstance(cell, str):
        cell = np.load(cell, allow_pickle=False) if cell.endswith(".npy") else Image.open(cell)
    depth = np.asarray(cell)
    depth = depth[..., 0] if depth.ndim == 3 and depth.shape[-1] == 1 else depth
    depth = depth[0] if depth.ndim == 3 and depth.shape[0] == 1 else depth
    if depth.ndim != 2 or depth.dtype.kind not in "uif":
        raise ValueError(f"expected a depth of one number a pixel, got shape {depth.shape} of {depth.dtype}")
    metres = depth.astype(np.float32) if depth.dtype.kind == "f" else (depth / scale).astype(np.float32)
    measured = np.isfinite(metres) & (metres > 0) & (metres <= (max_depth or np.inf))
    return np.where(measured, metres, np.float32(0))


def looks_wrongly_scaled(depth: np.ndarray) -> bool:
    """Whether the measured depths are of an unlikely size, or all of them whole numbers of metres."""
    measured = depth[depth > 0]
    low, high = PLAUSIBLE_MEDIAN
    whole = len(np.unique(measured)) > 1 and bool((measured == np.round(measured)).all())
    return whole or not low <= np.median(measured) <= high


def check_row(row: dict, arguments: DataArguments) -> tuple[np.ndarray | None, str | None, bool]:
    """The depth of a row with nothing left out beyond a bound, what is wrong with the row, and whether it is of use."""
    image, depth = row[arguments.image_column], row[arguments.depth_column]
    if image is None or depth is None:
        return None, "a picture without a depth" if depth is None else "a depth without a picture", False
    try:
        width, height = read_picture(image).size
    except UNREADABLE:
        return None, "unreadable picture", False
    try:
        depth = read_depth(depth, arguments.depth_scale, None)
    except UNREADABLE:
        return None, "unreadable depth", False
    if not depth.any():
        return None, "a depth without a valid pixel", False
    rows, columns = depth.shape
    if abs(math.log(height * columns / (width * rows))) > LARGEST_RATIO_ERROR:
        return None, "a depth of another shape than its picture", False
    if looks_wrongly_scaled(depth):
        return depth, "a depth that looks wrongly scaled", True
    if (rows, columns) != (height, width):
        return depth, "a depth of another size than its picture, which is scaled to it", True
    return depth, None, True


def check_rows(
    dataset: Dataset, split: str, arguments: DataArguments, max_depth: float | None
) -> tuple[Dataset, tuple[int, int] | None]:
    """Drop rows that are of no use and name them in the log; return the rest, and the (height, width) of all depths.

    Returns:
        the rows kept, and the size of every depth, None where there are several.

    Raises:
        ValueError: no column of that name, no row of use, or every depth looks wrongly scaled.
    """
    missing = {arguments.image_column, arguments.depth_column} - set(dataset.column_names)
    if missing:
        raise ValueError(
            f"expected columns {sorted(missing)} in split {split!r}, found {dataset.column_names}; "
            "set --image_column and --depth_column"
        )
    names = dataset["name"][:] if "name" in dataset.column_names else range(len(dataset))
    labels = names if len(set(map(str, names))) == len(dataset) else range(len(dataset))
    problems, kept, sizes, medians = Problems(), [], Counter(), []
    for index in tqdm(range(len(dataset)), desc=f"check {split}"):
        try:
            depth, reason, is_of_use = check_row(dataset[index], arguments)
        except UNREADABLE:  # `datasets` opens the pictures of a row
            depth, reason, is_of_use = None, "unreadable row", False
        if is_of_use and max_depth is not None and not (near := (depth > 0) & (depth <= max_depth)).any():
            depth, reason, is_of_use = None, f"no valid pixel within --max_depth {max_depth:g}", False
        if reason is not None:
            problems.add(reason, labels[index], drop=not is_of_use)
        if is_of_use:
            kept.append(index)
            sizes[depth.shape] += 1
            medians.append(np.median(depth[depth > 0 if max_depth is None else near]))
    problems.report(split, len(dataset))
    low, middle, high = np.percentile(medians, [0, 50, 100])
    logger.info("split %s: median depths of %.3g to %.3g, mostly %.3g m", split, low, high, middle)
    if len(problems.rows["a depth that looks wrongly scaled"]) == len(kept):
        raise ValueError(
            f"expected depths in metres, those of split {split!r} have medians of {low:.3g} to {high:.3g} with "
            f"--depth_scale {arguments.depth_scale:g}; set it to what one metre is in the files"
        )
    return dataset.select(kept), next(iter(sizes)) if len(sizes) == 1 else None


def resize_labels(depth: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) -> `shape`, each the nearest pixel: a mean of a surface and what is behind it is the depth of neither."""
    if depth.shape == tuple(shape):
        return depth
    return np.array(Image.fromarray(depth).resize(shape[::-1], Image.Resampling.NEAREST))


class TrainingPair:
    """A row -> `pixel_values` (3, H, W) and `labels` (H, W) in metres: cropped and mirrored alike, recoloured.

    A crop shows things as a camera would that is nearer by the factor it is enlarged by, and so are its labels.
    """

    def __init__(self, arguments: DataArguments, config: VitEmbedConfig, processor: DPTImageProcessor) -> None:
        self.arguments, self.shape, self.max_depth = arguments, config.image_shape, config.max_depth
        height, width = self.shape
        crop, jitter = arguments.smallest_crop, (1 - arguments.jitter, 1 + arguments.jitter)
        steps = [augmentation.RandomHorizontalFlip(p=arguments.mirror)]
        if crop < 1:
            ratio = (width / height, width / height)
            steps.insert(0, augmentation.RandomResizedCrop(self.shape, scale=(crop, 1.0), ratio=ratio))
        # Of the image alone in kornia's own table: what changes colours leaves masks as they are.
        recolour = (augmentation.RandomBrightness, augmentation.RandomContrast, augmentation.RandomSaturation)
        steps += [change(jitter, p=0.8) for change in recolour if arguments.jitter]
        steps += [augmentation.RandomHue((-arguments.hue, arguments.hue), p=0.8)] if arguments.hue else []
        steps.append(augmentation.Normalize(processor.image_mean, processor.image_std))
        self.vary = augmentation.AugmentationSequential(*steps, data_keys=["input", "mask"])

    def canvas(self, picture: Image.Image) -> tuple[int, int]:
        """(height, width) to crop from: the model's shape, or up to a quarter more where the picture has more."""
        if self.arguments.smallest_crop == 1:
            return self.shape
        finest = min(has / wants for has, wants in zip(picture.size[::-1], self.shape))
        return tuple(round(side * min(max(finest, 1.0), 1.25)) for side in self.shape)

    def __call__(self, row: dict) -> dict[str, torch.Tensor]:
        picture = read_picture(row[self.arguments.image_column])
        depth = read_depth(row[self.arguments.depth_column], self.arguments.depth_scale, self.max_depth)
        canvas = self.canvas(picture)
        if picture.size != canvas[::-1]:
            picture = picture.resize(canvas[::-1], Image.Resampling.BICUBIC)
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255  # (1, 3, h, w)
        labels = torch.from_numpy(resize_labels(depth, canvas))[None, None]  # (1, 1, h, w)
        image, labels = self.vary(image, labels)
        if self.arguments.smallest_crop < 1:
            # Pixels of the result in one of the canvas, over what that is without a crop.
            enlarged = torch.det(self.vary.transform_matrix[0, :2, :2].float()).abs().sqrt()
            labels = labels / (enlarged * canvas[0] / self.shape[0])
        return {"pixel_values": image[0], "labels": labels[0, 0]}


class EvaluationPair:
    """A row -> `pixel_values` (3, H, W) of the stock processor and `labels` (rows, columns) in metres."""

    def __init__(
        self,
        arguments: DataArguments,
        config: VitEmbedConfig,
        processor: DPTImageProcessor,
        label_shape: tuple[int, int] | None,
    ) -> None:
        self.arguments, self.processor, self.max_depth = arguments, processor, config.max_depth
        self.label_shape = label_shape or config.image_shape

    def __call__(self, row: dict) -> dict[str, torch.Tensor]:
        picture = read_picture(row[self.arguments.image_column])
        depth = read_depth(row[self.arguments.depth_column], self.arguments.depth_scale, self.max_depth)
        return {
            "pixel_values": self.processor(picture, return_tensors="pt").pixel_values[0],
            "labels": torch.from_numpy(resize_labels(depth, self.label_shape)),
        }


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


# --- metrics ---


def depth_metrics(predicted: np.ndarray, depth: np.ndarray) -> dict[str, float]:
    """The customary metrics (arXiv:1406.2283) of one picture, over its measured pixels: (pixels,) each, metres."""
    predicted = predicted.clip(min=SMALLEST_PREDICTION)
    ratio = np.maximum(predicted / depth, depth / predicted)
    return {
        "abs_rel": mean_absolute_percentage_error(depth, predicted),
        "rmse": root_mean_squared_error(depth, predicted),
        "log10": mean_absolute_error(np.log10(depth), np.log10(predicted)),
        **{f"delta{power}": float((ratio < 1.25**power).mean()) for power in DELTAS},
    }


class DepthEvaluation:
    """The `compute_metrics` of one split: takes batch after batch and keeps no map but the few that are shown.

    Args:
        rows: the split as it is evaluated, in order.
        processor: the one that made its pixels.
    """

    def __init__(self, rows: SeededRows, processor: DPTImageProcessor) -> None:
        self.rows, self.processor = rows, processor
        # From all over the split: neighbouring rows are often alike.
        self.places = np.unique(np.linspace(0, len(rows) - 1, min(NUM_SHOWN, len(rows))).astype(int)).tolist()
        self.start()

    def start(self) -> None:
        self.per_picture: list[dict[str, float]] = []
        self.count = 0

    def __call__(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        """Take a batch of predictions (B, H, W) and labels (B, rows, columns); after the last, the means."""
        if self.count == 0:
            self.shown = {}
        labels = torch.as_tensor(prediction.label_ids).float().cpu()
        predictions = torch.as_tensor(prediction.predictions).float().cpu()
        predictions = resize_depth(predictions, tuple(labels.shape[1:])).numpy()
        for predicted, depth in zip(predictions, labels.numpy()):
            measured = depth > 0
            if measured.any():
                raw, target = predicted[measured], depth[measured]
                scaled = raw * (np.median(target) / max(np.median(raw), SMALLEST_PREDICTION))
                row = depth_metrics(raw, target)
                row.update({f"median_scaled_{name}": value for name, value in depth_metrics(scaled, target).items()})
                self.per_picture.append(row)
            if self.count in self.places:
                self.shown[self.count] = (predicted, depth)
            self.count += 1
        if not compute_result:
            return {}
        names = self.per_picture[0]
        means = {name: float(np.mean([row[name] for row in self.per_picture])) for name in names}
        self.start()
        return means

    def draw(self, path: Path) -> None:
        """Write the pictures kept: image, depth, prediction on the same scale in metres, and the relative error."""
        titles = ("image", "depth", "prediction", "error")
        figure, axes = pyplot.subplots(
            len(self.shown),
            len(titles),
            figsize=(9.5, 2.1 * len(self.shown) + 0.3),
            squeeze=False,
            layout="constrained",
        )
        depths = np.concatenate([depth[depth > 0] for _, depth in self.shown.values()])
        scale = {"cmap": "viridis", "vmin": np.percentile(depths, 1), "vmax": np.percentile(depths, 99)}
        for axis, title in zip(axes[0], titles):
            axis.set_title(title, fontsize=9)
        for row, (place, (predicted, depth)) in zip(axes, self.shown.items()):
            measured = depth > 0
            error = np.where(measured, np.abs(predicted - depth) / np.where(measured, depth, 1), np.nan)
            image = as_colours(self.rows[place]["pixel_values"][None], self.processor)[0]
            height, width = depth.shape
            row[0].imshow(image, extent=(0, width, height, 0))
            metres = row[1].imshow(np.where(measured, depth, np.nan), **scale)
            row[2].imshow(predicted, **scale)
            errors = row[3].imshow(100 * error, cmap="magma", vmin=0, vmax=100 * LARGEST_SHOWN_ERROR)
            row[3].set_xlabel(f"row {place}: AbsRel {np.nanmean(error):.3f}", fontsize=8)
            for axis in row:
                axis.set(xticks=[], yticks=[], facecolor="0.85")
        figure.colorbar(metres, ax=axes[:, 1:3], shrink=0.6, extend="both", label="metres (grey: not measured)")
        figure.colorbar(errors, ax=axes[:, 3], shrink=0.6, extend="max", label="error, % of the depth")
        figure.savefig(path, dpi=110)
        pyplot.close(figure)


class DepthTrainer(RecipeTrainer):
    """RecipeTrainer whose predictions, like its evaluations, keep no maps: those of 5,000 pictures are gigabytes."""

    def evaluation_loop(self, dataloader, description, *args, **kwargs) -> EvalLoopOutput:
        return super().evaluation_loop(dataloader, "Evaluation", *args, **kwargs)


# --- model ---


def check_head(saved: VitEmbedConfig, arguments: ModelArguments) -> None:
    """Raises ValueError where the flags ask for a deconv head of another kernel than the checkpoint's own head has."""
    has_head = (saved.architectures, saved.depth_head_type) == (["VitEmbedForDepthEstimation"], "deconv")
    kernel = arguments.deconv_kernel_size
    if has_head and arguments.depth_head_type != "dpt" and kernel not in (None, saved.deconv_kernel_size):
        raise ValueError(
            f"expected --deconv_kernel_size {saved.deconv_kernel_size}, of the depth head in --model_name_or_path, got "
            f"{kernel}; leave the flag out, or start from a checkpoint without a depth head"
        )


def load_model(arguments: ModelArguments) -> tuple[VitEmbedForDepthEstimation, DPTImageProcessor]:
    """Return the model, its head new unless the checkpoint has one, and the image processor it is saved with."""
    if arguments.model_name_or_path is not None and arguments.config_name is not None:
        raise ValueError("expected one of --model_name_or_path and --config_name, got both")
    names = ("image_size", "depth_head_type", "deconv_kernel_size", "depth_loss", "depth_gradient_weight", "max_depth")
    names += ("attn_implementation",)
    overrides = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.config_name is not None:
        model = VitEmbedForDepthEstimation(VitEmbedConfig.from_pretrained(arguments.config_name, **overrides))
    else:
        source = arguments.model_name_or_path or SHIPPED_CHECKPOINT
        check_head(VitEmbedConfig.from_pretrained(source), arguments)
        # Depth needs every patch, whatever share of them the trunk was trained without.
        model = VitEmbedForDepthEstimation.from_pretrained(
            source,
            patch_drop_rate=0.0,
            dtype=torch.float32,  # of the weights that are trained, whatever is stored; --bf16 is for the arithmetic
            **overrides,
        )
    with tempfile.TemporaryDirectory() as folder:
        model.save_processor(folder)
        return model, DPTImageProcessor.from_pretrained(folder)


def main() -> None:
    """Parse the command line, then train, evaluate and test as asked."""
    model_arguments, data_arguments, recipe, training = parse(ModelArguments, DataArguments, description=__doc__)
    training.batch_eval_metrics = True
    model, processor = load_model(model_arguments)
    prepare(model, recipe)
    wanted = {
        "train": (data_arguments.train_split, training.do_train),
        "validation": (data_arguments.validation_split, training.do_eval),
        "test": (data_arguments.test_split, training.do_predict),
    }
    splits = load_pairs(data_arguments)
    missing = {split for split, needed in wanted.values() if needed} - set(splits)
    if missing:
        raise ValueError(
            f"expected splits {sorted(missing)} in {data_arguments.dataset}, found {sorted(splits)}; set "
            "--train_split, --validation_split and --test_split"
        )
    rows_of, evaluations = {}, {}
    for role, (split, needed) in wanted.items():
        if not needed:
            continue
        rows, label_shape = check_rows(splits[split], split, data_arguments, model.config.max_depth)
        if role == "train":
            make = TrainingPair(data_arguments, model.config, processor)
        else:
            make = EvaluationPair(data_arguments, model.config, processor, label_shape)
        rows_of[role] = SeededRows(rows, make, training.seed)
        if role != "train":
            evaluations[role] = DepthEvaluation(rows_of[role], processor)
            if label_shape is None:
                logger.warning("split %s: depths of several sizes, compared at %s", split, model.config.image_shape)
    trainer = DepthTrainer(
        recipe,
        draw=lambda output, path: trainer.compute_metrics.draw(path),
        model=model,
        args=training,
        data_collator=collate,
        train_dataset=rows_of.get("train"),
        eval_dataset=rows_of.get("validation"),
        compute_metrics=evaluations.get("validation"),
        processing_class=processor,
    )
    run(
        trainer,
        test_dataset=rows_of.get("test"),
        test_metrics=evaluations.get("test"),
    )


if __name__ == "__main__":
    main()
