"""Pictures with depth: pairs and what is wrong with them, crops that keep the metres right, metrics, and sheets."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from kornia import augmentation
from PIL import Image
from sklearn.metrics import mean_absolute_error, mean_absolute_percentage_error, root_mean_squared_error
from transformers import DPTImageProcessor, EvalPrediction
from transformers.trainer_utils import EvalLoopOutput

from recipes import arguments as base
from recipes.arguments import SHIPPED_CHECKPOINT
from recipes.data import Finding, SeededRows, check_rows, require_columns
from recipes.drawing import as_colours, picture_sheet, save_figure, short, spread_over
from recipes.models import image_processor_of, load_model
from recipes.reading.depths import DEPTH, DEPTH_COLUMNS, LAYOUTS
from recipes.reading.layouts import read_splits
from recipes.reading.tables import IMAGE, ROW, Target
from recipes.trainer import RecipeTrainer
from vit_embed import VitEmbedConfig, VitEmbedForDepthEstimation
from vit_embed.depth_vit_embed import resize_depth
from vit_embed.retrieval.pictures import UNREADABLE, as_rgb, read_rgb

logger = logging.getLogger(__name__)

# Medians in metres outside of which a depth map is more likely in another unit than of such a place.
PLAUSIBLE_MEDIAN = (0.01, 1000.0)
# Metres that 8 bits must reach to be taken for depth and not for a picture of depth.
LEAST_REACH_OF_8_BITS = 1.0
SMALLEST_PREDICTION = 1e-3  # metres; as in the benchmarks' own scripts, before a logarithm is taken
LARGEST_RATIO_ERROR = 0.01  # of height to width, between a picture and its depth
DELTAS = (1, 2, 3)
NUM_SHOWN = 6
LARGEST_SHOWN_ERROR = 0.25  # of the depth
WRONG_SCALE = "a depth that looks wrongly scaled"


@dataclass
class ModelArguments(base.ModelArguments):
    """Which model to start from, and what of its depth head differs from its config."""

    CONFIG_FIELDS = (
        *("image_size", "depth_head_type", "deconv_kernel_size", "depth_loss", "depth_gradient_weight", "max_depth"),
    )

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "checkpoint whose trunk to train on; default: the one that ships"}
    )
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


@dataclass
class DataArguments(base.DataArguments):
    """Which pictures and depths, and how they are varied while training."""

    depth_column: str | None = field(
        default=None, metadata={"help": "column of the depths, pictures or arrays; default: depth, depth_map, ..."}
    )
    depth_scale: float = field(default=1000.0, metadata={"help": "divides whole numbers, which gives metres"})
    smallest_crop: float = field(
        default=0.6, metadata={"help": "smallest share of a picture's area in a crop, in (0, 1]; 1 does not crop"}
    )
    mirror: float = field(default=0.5, metadata={"help": "chance of a mirrored picture, 0 to 1"})
    jitter: float = field(default=0.3, metadata={"help": "largest relative change of brightness, contrast, saturation"})
    hue: float = field(default=0.0, metadata={"help": "largest change of hue, 0 to 0.5 turns"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.depth_scale > 0:
            raise ValueError(f"expected --depth_scale above 0, got {self.depth_scale}; 1000 is millimetres")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"expected --hue in [0, 0.5], got {self.hue}; 0.5 is any hue, 0 leaves it")
        if not 0 < self.smallest_crop <= 1:
            raise ValueError(f"expected --smallest_crop in (0, 1], got {self.smallest_crop}; 1 does not crop")


# --- pairs ---


def load_pairs(arguments: DataArguments) -> DatasetDict:
    """Every split of --dataset: rows of IMAGE and DEPTH, each a path or what `datasets` makes of a cell, and ROW."""
    return read_splits(LAYOUTS, arguments, Target(DEPTH, arguments.depth_column, DEPTH_COLUMNS, "--depth_column"))[1]


def open_depth(cell: str | Image.Image | list | np.ndarray) -> np.ndarray:
    """A path, a picture or an array -> what is stored, (H, W), whole or floating point numbers.

    Raises:
        ValueError: several numbers a pixel, or colours in a palette, whose numbers are no distances.
    """
    if isinstance(cell, str):
        cell = np.load(cell, allow_pickle=False) if cell.endswith(".npy") else Image.open(cell)
    if isinstance(cell, Image.Image) and cell.mode == "P":
        raise ValueError("expected a depth of one number a pixel, got a palette PNG, whose numbers stand for colours")
    depth = np.asarray(cell)
    depth = depth[..., 0] if depth.ndim == 3 and depth.shape[-1] == 1 else depth
    depth = depth[0] if depth.ndim == 3 and depth.shape[0] == 1 else depth
    if depth.ndim != 2 or depth.dtype.kind not in "uif":
        raise ValueError(f"expected a depth of one number a pixel, got shape {depth.shape} of {depth.dtype}")
    return depth


def read_depth(cell: str | Image.Image | list | np.ndarray, scale: float, max_depth: float | None) -> np.ndarray:
    """A path, a picture or an array -> depth (H, W) in metres, float32, 0 where nothing was measured.

    Args:
        cell: whole numbers are divided by `scale`, floating point ones are metres.
        max_depth: metres, what is beyond was not measured; None for no bound.

    Raises:
        as open_depth.
    """
    depth = open_depth(cell)
    metres = depth.astype(np.float32) if depth.dtype.kind == "f" else (depth / scale).astype(np.float32)
    measured = np.isfinite(metres) & (metres > 0) & (metres <= (max_depth or np.inf))
    return np.where(measured, metres, np.float32(0))


# --- what is wrong with them ---


def looks_wrongly_scaled(depth: np.ndarray) -> bool:
    """Whether the measured depths are of an unlikely size, or all of them whole numbers of metres."""
    measured = depth[depth > 0]
    low, high = PLAUSIBLE_MEDIAN
    whole = len(np.unique(measured)) > 1 and bool((measured == np.round(measured)).all())
    return whole or not low <= np.median(measured) <= high


def depth_findings(cell: object, size: tuple[int, int], arguments: DataArguments) -> list[Finding | np.ndarray | None]:
    """What is wrong with a depth beside its picture of `size` (height, width); last the metres, None if of no use."""
    try:
        stored = open_depth(cell)
    except UNREADABLE as error:
        return [Finding("a palette PNG for a depth" if "palette" in str(error) else "an unreadable depth"), None]
    depth = read_depth(stored, arguments.depth_scale, None)
    if not depth.any():
        return [Finding("a depth without a valid pixel"), None]
    rows, columns = depth.shape
    if abs(math.log(size[0] * columns / (size[1] * rows))) > LARGEST_RATIO_ERROR:
        return [Finding("a depth of another shape than its picture"), None]
    findings = []
    if stored.dtype == np.uint8:
        reach = 255 / arguments.depth_scale
        if reach < LEAST_REACH_OF_8_BITS:
            scale = f"--depth_scale {arguments.depth_scale:g}"
            return [Finding(f"a depth of 8 bits, at most {reach:.3g} m with {scale}"), None]
        findings.append(Finding("a depth of 8 bits, at most 255 distances", drop=False))
    if looks_wrongly_scaled(depth):
        findings.append(Finding(WRONG_SCALE, drop=False))
    elif (rows, columns) != size:
        findings.append(Finding("a depth of another size than its picture, which is scaled to it", drop=False))
    return [*findings, depth]


def check_pairs(
    dataset: Dataset, split: str, arguments: DataArguments, max_depth: float | None
) -> tuple[Dataset, tuple[int, int] | None]:
    """Drop rows that are of no use and name them in the log.

    Returns:
        the rows kept, and the (height, width) of every depth, None where there are several.

    Raises:
        ValueError: no column of that name, no row of use, or every depth looks wrongly scaled.
    """
    require_columns(dataset, split, {"--image_column": IMAGE, "--depth_column": DEPTH})
    sizes, medians, suspicious = Counter(), [], 0

    def examine(row: int) -> Iterator[Finding]:
        nonlocal suspicious
        try:
            pair = dataset[row]  # `datasets` opens the pictures of a row
        except UNREADABLE:
            yield Finding("an unreadable picture or depth")
            return
        image, cell = pair[IMAGE], pair[DEPTH]
        if image is None or cell is None:
            yield Finding("a picture without a depth" if cell is None else "a depth without a picture")
            return
        try:
            picture, notes = read_rgb(image)
        except UNREADABLE:
            yield Finding("an unreadable picture")
            return
        for note in notes:
            yield Finding(note, drop=False, level=logging.INFO)
        *findings, depth = depth_findings(cell, picture.size[::-1], arguments)
        yield from findings
        if depth is None:
            return
        measured = depth[(depth > 0) & (depth <= (max_depth or np.inf))]
        if not len(measured):
            yield Finding(f"no valid pixel within --max_depth {max_depth:g}")
            return
        suspicious += WRONG_SCALE in {finding.reason for finding in findings}
        sizes[depth.shape] += 1
        medians.append(np.median(measured))

    kept = check_rows(dataset, split, examine)
    low, middle, high = np.percentile(medians, [0, 50, 100])
    logger.info("split %s: median depths of %.3g to %.3g, mostly %.3g m", split, low, high, middle)
    if suspicious == len(kept):
        raise ValueError(
            f"expected depths in metres, those of split {split!r} have medians of {low:.3g} to {high:.3g} with "
            f"--depth_scale {arguments.depth_scale:g}; set it to what one metre is in the files"
        )
    return kept, next(iter(sizes)) if len(sizes) == 1 else None


# --- rows ---


def resize_labels(depth: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) -> `shape`, each the nearest pixel: the mean of a surface and one farther away is the depth of neither."""
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
        finest = min(side / target for side, target in zip(picture.size[::-1], self.shape))
        return tuple(round(side * min(max(finest, 1.0), 1.25)) for side in self.shape)

    def __call__(self, row: dict) -> dict[str, torch.Tensor]:
        picture = as_rgb(row[IMAGE])
        depth = read_depth(row[DEPTH], self.arguments.depth_scale, self.max_depth)
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
    """A row -> `pixel_values` (3, H, W) of the stock processor and `labels` (rows, columns) in metres.

    Args:
        label_shape: (rows, columns) of the labels; None for the model's shape.
    """

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
        picture = as_rgb(row[IMAGE])
        depth = read_depth(row[DEPTH], self.arguments.depth_scale, self.max_depth)
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
        self.places = spread_over(len(rows), NUM_SHOWN)
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
        figure, axes = picture_sheet(len(self.shown), len(titles), shape=next(iter(self.shown.values()))[1].shape)
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
            name = short(self.rows.rows[place].get(ROW, place))
            row[3].set_xlabel(f"{name}: AbsRel {np.nanmean(error):.3f}", fontsize=8)
            for axis in row:
                axis.axis("on")
                axis.set(xticks=[], yticks=[], facecolor="0.85")
        figure.colorbar(metres, ax=axes[:, 1:3], shrink=0.6, extend="both", label="metres (grey: not measured)")
        figure.colorbar(errors, ax=axes[:, 3], shrink=0.6, extend="max", label="error, % of the depth")
        save_figure(figure, path)


class DepthTrainer(RecipeTrainer):
    """RecipeTrainer whose predictions, like its evaluations, keep no maps: those of 5,000 pictures are gigabytes."""

    def evaluation_loop(self, dataloader, description, *args, **kwargs) -> EvalLoopOutput:
        return super().evaluation_loop(dataloader, "Evaluation", *args, **kwargs)


# --- model ---


def check_head(saved: VitEmbedConfig, arguments: ModelArguments) -> None:
    """ValueError where the flags ask for a deconv head of another kernel than the checkpoint's own head has."""
    has_head = (saved.architectures, saved.depth_head_type) == (["VitEmbedForDepthEstimation"], "deconv")
    kernel = arguments.deconv_kernel_size
    if has_head and arguments.depth_head_type != "dpt" and kernel not in (None, saved.deconv_kernel_size):
        raise ValueError(
            f"expected --deconv_kernel_size {saved.deconv_kernel_size}, of the depth head in --model_name_or_path, got "
            f"{kernel}; leave the flag out, or start from a checkpoint without a depth head"
        )


def load_depth_model(arguments: ModelArguments) -> tuple[VitEmbedForDepthEstimation, DPTImageProcessor]:
    """The model, its head new unless the checkpoint has one, and the image processor it is saved with."""
    source = None if arguments.config_name is not None else arguments.model_name_or_path or SHIPPED_CHECKPOINT
    if source is not None:
        check_head(VitEmbedConfig.from_pretrained(source), arguments)
    # Depth needs every patch, whatever share of them the trunk was trained without.
    model = load_model(VitEmbedForDepthEstimation, arguments, default=SHIPPED_CHECKPOINT, patch_drop_rate=0.0)
    return model, image_processor_of(model)
