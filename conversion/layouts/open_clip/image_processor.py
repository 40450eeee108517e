"""open_clip's transform for evaluation as an image processor, and back."""

import logging
from collections.abc import Mapping
from typing import Any

from vit_embed import VitEmbedConfig
from vit_embed.conversion.layouts.layout import SourceConfig
from vit_embed.conversion.layouts.open_clip.model_cfg import CONFIG_FILE, read_model_cfg
from vit_embed.conversion.layouts.questions import is_number
from vit_embed.conversion.processor_files import CLIP_IMAGE_MEAN, CLIP_IMAGE_STD, clip_image_processor, sides

logger = logging.getLogger(__name__)

# PIL.Image.Resampling; open_clip itself takes "random" for training alone, and bicubic for the rest.
RESAMPLING = {"bicubic": 3, "bilinear": 2, "random": 3}
PREPROCESS_DEFAULTS = {
    "mean": CLIP_IMAGE_MEAN,
    "std": CLIP_IMAGE_STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
RESIZE_MODES = ("shortest", "squash", "longest")


def image_processor(source_config: SourceConfig, config: VitEmbedConfig) -> dict[str, Any] | None:
    """open_clip's transform for evaluation, as preprocess_cfg describes it: the shorter side, then the centre; with
    resize_mode "squash" both sides.

    Squeezed as well are images that open_clip resizes to cover a rectangle, or pads ("longest"), which no stock
    processor does; the log says so. Where an odd number of pixels is to be cut off, torchvision's centre lies one pixel
    further right or down than the stock processor's.
    """
    if not read_model_cfg(source_config):
        return None
    given = source_config.get("preprocess_cfg") or {}
    if not isinstance(given, dict):
        raise ValueError(f"preprocess_cfg must be an object, got {given!r}")
    said = {**PREPROCESS_DEFAULTS, **{name: value for name, value in given.items() if value is not None}}
    if said["interpolation"] not in tuple(RESAMPLING) or said["resize_mode"] not in RESIZE_MODES:
        raise ValueError(
            f"preprocess_cfg must have an interpolation of {', '.join(RESAMPLING)} and a resize_mode of "
            f"{', '.join(RESIZE_MODES)}; got {said['interpolation']!r} and {said['resize_mode']!r}"
        )
    height, width = config.image_shape
    crops = said["resize_mode"] == "shortest" and height == width
    if not crops and said["resize_mode"] != "squash":
        logger.warning(
            "open_clip resizes by resize_mode=%r to (%d, %d) pixels; the image processor here squeezes both sides",
            said["resize_mode"],
            height,
            width,
        )
    return clip_image_processor(
        config,
        size={"shortest_edge": height} if crops else sides((height, width)),
        do_center_crop=crops,
        crop_size=sides((height, width)),
        resample=RESAMPLING[said["interpolation"]],
        image_mean=_per_channel("mean", said["mean"]),
        image_std=_per_channel("std", said["std"]),
    )


def _per_channel(name: str, value: Any) -> list[float]:
    values = value if isinstance(value, (list, tuple)) else [value] * 3
    if not values or not all(map(is_number, values)):
        raise ValueError(f"preprocess_cfg.{name} must be a number or one for each channel, got {value!r}")
    return list(values)


def _preprocess_cfg(preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """What open_clip calls the settings of a CLIPImageProcessor."""
    names = {number: name for name, number in reversed(RESAMPLING.items())}
    crops = preprocessor.get("do_center_crop", True)
    return {
        "mode": "RGB",
        "mean": list(preprocessor.get("image_mean", CLIP_IMAGE_MEAN)),
        "std": list(preprocessor.get("image_std", CLIP_IMAGE_STD)),
        "interpolation": names.get(preprocessor.get("resample"), "bicubic"),
        "resize_mode": "shortest" if crops else "squash",
        "fill_color": 0,
    }


def restored_processor(files: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """The files of a folder of open_clip with our image processor's settings in them."""
    written = files[CONFIG_FILE]
    return {
        **files,
        CONFIG_FILE: {**written, "preprocess_cfg": {**written["preprocess_cfg"], **_preprocess_cfg(preprocessor)}},
    }
