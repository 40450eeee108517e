"""Pictures with depth: pairs, crops that keep the metres right, metrics, and sheets."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import DatasetDict
from kornia import augmentation
from PIL import Image
from sklearn.metrics import mean_absolute_error, mean_absolute_percentage_error, root_mean_squared_error
from transformers import DPTImageProcessor, EvalPrediction
from transformers.trainer_utils import EvalLoopOutput

from recipes import arguments as base
from recipes.arguments import SHIPPED_CHECKPOINT
from recipes.data import SeededRows
from recipes.drawing import as_colours, picture_sheet, save_figure, short, spread_over
from recipes.models import image_processor_of, load_model
from recipes.reading.depth_files import DEPTH_SCALE, DEPTH_SUFFIXES, Scale, open_picture, read_depth, require_libraries
from recipes.reading.depth_pairs import DEPTH
from recipes.reading.depths import DEPTH_COLUMNS, LAYOUTS, MILLIMETRES, refuse_disparity
from recipes.reading.layouts import read_splits
from recipes.reading.tables import IMAGE, ROW, Target, Texts
from recipes.trainer import RecipeTrainer
from vit_embed import VitEmbedConfig, VitEmbedForDepthEstimation
from vit_embed.depth_vit_embed import resize_depth
from vit_embed.retrieval.pictures import as_rgb

logger = logging.getLogger(__name__)

SMALLEST_PREDICTION = 1e-3  # metres; as in the benchmarks' own scripts, before a logarithm is taken
DELTAS = (1, 2, 3)
NUM_SHOWN = 6
LARGEST_SHOWN_ERROR = 0.25  # of the depth


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
    depth_folder: str | None = field(
        default=None, metadata={"help": "folder that the paths of depths in a table start at; default: --image_folder"}
    )
    image_glob: str | None = field(
        default=None, metadata={"help": "pattern of the pictures below --dataset, in quotes, as 'scans/*/left/*.jpg'"}
    )
    depth_glob: str | None = field(
        default=None, metadata={"help": "pattern of the depths, whose wildcards match what those of --image_glob do"}
    )
    depth_scale: float | None = field(
        default=None,
        metadata={"help": "divides whole numbers, which gives metres; default: the layout's own, or 1000, millimetres"},
    )
    smallest_crop: float = field(
        default=0.6, metadata={"help": "smallest share of a picture's area in a crop, in (0, 1]; 1 does not crop"}
    )
    mirror: float = field(default=0.5, metadata={"help": "chance of a mirrored picture, 0 to 1"})
    jitter: float = field(default=0.3, metadata={"help": "largest relative change of brightness, contrast, saturation"})
    hue: float = field(default=0.0, metadata={"help": "largest change of hue, 0 to 0.5 turns"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.image_glob is None) != (self.depth_glob is None):
            raise ValueError("expected both of --image_glob and --depth_glob, got one")
        if self.depth_scale is not None and not self.depth_scale > 0:
            raise ValueError(f"expected --depth_scale above 0, got {self.depth_scale}; 1000 is millimetres")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"expected --hue in [0, 0.5], got {self.hue}; 0.5 is any hue, 0 leaves it")
        if not 0 < self.smallest_crop <= 1:
            raise ValueError(f"expected --smallest_crop in (0, 1], got {self.smallest_crop}; 1 does not crop")


# --- pairs ---


def load_pairs(arguments: DataArguments) -> tuple[DatasetDict, Scale]:
    """Every split of --dataset, rows of IMAGE, DEPTH (cells as of `open_picture` and `open_depth`) and ROW; the scale.

    Raises:
        ValueError: no layout that is read, disparity by its name, a library for the files is missing, or a flag for
            tables is given where there is none.
    """
    target = Target(DEPTH, arguments.depth_column, DEPTH_COLUMNS, "--depth_column", DEPTH_SUFFIXES)
    layout, splits = read_splits(LAYOUTS, arguments, target)
    flags = {"--image_column": arguments.image_column, "--depth_column": arguments.depth_column}
    flags["--depth_folder"] = arguments.depth_folder
    unused = [flag for flag, value in flags.items() if value is not None]
    if unused and not layout.has_user_columns:
        raise ValueError(
            f"expected a table for {', '.join(unused)}, {arguments.dataset} is read as: {layout.name} ({layout.form}); "
            "leave the flag out, or name a column that is there"
        )
    named = Path(arguments.dataset).expanduser()
    start = f"{named if named.is_dir() else named.parent}/"  # the user's own folders say nothing about the files
    for rows in splits.values():
        if DEPTH in rows.column_names and rows.features[DEPTH] in Texts:
            files = [file for file in rows[DEPTH] if file]
            refuse_disparity(file.removeprefix(start) for file in files)
            require_libraries(files)
    if arguments.depth_scale is not None:
        return splits, Scale(arguments.depth_scale, arguments.depth_scale, DEPTH_SCALE)
    return splits, layout.scale or MILLIMETRES


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

    def __init__(
        self, arguments: DataArguments, scale: Scale, config: VitEmbedConfig, processor: DPTImageProcessor
    ) -> None:
        self.arguments, self.scale, self.shape, self.max_depth = arguments, scale, config.image_shape, config.max_depth
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
        picture = as_rgb(open_picture(row[IMAGE]))
        depth = read_depth(row[DEPTH], self.scale, self.max_depth)
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
        scale: Scale,
        config: VitEmbedConfig,
        processor: DPTImageProcessor,
        label_shape: tuple[int, int] | None,
    ) -> None:
        self.scale, self.processor, self.max_depth = scale, processor, config.max_depth
        self.label_shape = label_shape or config.image_shape

    def __call__(self, row: dict) -> dict[str, torch.Tensor]:
        picture = as_rgb(open_picture(row[IMAGE]))
        depth = read_depth(row[DEPTH], self.scale, self.max_depth)
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
