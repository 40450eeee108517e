"""Image processors of other models -> the stock CLIPImageProcessor with the same steps."""

import logging
from typing import Any

import transformers

from vit_embed.saving_vit_embed import IMAGE_PROCESSOR_FILE, image_processor_kind

logger = logging.getLogger(__name__)

# Of ImageNet's training images, as torchvision's and timm's models take them.
IMAGENET_IMAGE_MEAN = [0.485, 0.456, 0.406]
IMAGENET_IMAGE_STD = [0.229, 0.224, 0.225]
BILINEAR = 2  # PIL.Image.Resampling.BILINEAR

# Stock image processors whose steps are CLIPImageProcessor's, all or some of them, in the same order: RGB, resize,
# centre crop, rescale, normalise. They differ in their defaults.
CLIP_LIKE_IMAGE_PROCESSORS = (
    "BitImageProcessor",
    "CLIPImageProcessor",
    "DeiTImageProcessor",
    "SiglipImageProcessor",
    "ViTImageProcessor",
)


def equal_image_processor(source: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The `preprocessor_config.json` of our kind of image processor that gives what a source's stock one gives.

    Args:
        source: the other's `preprocessor_config.json`; what it leaves out is its class's default.
        own: what this model's says without a source, as in `image_processor_dict`.

    Returns:
        A CLIPImageProcessor equal to it, with sizes as (height, width) or by the shorter side, where it is one of
        CLIP_LIKE_IMAGE_PROCESSORS: files from before transformers 4.25 say one number. `source` itself where it is of
        another kind, that of `own`. Else `own` with its mean and standard deviation, and a warning: how it resizes and
        crops is not known.

    Raises:
        ValueError: values that the stock class cannot read.
    """
    kind = image_processor_kind(source)
    if kind == own["image_processor_type"] != "CLIPImageProcessor":
        return dict(source)
    if kind not in CLIP_LIKE_IMAGE_PROCESSORS or own["image_processor_type"] != "CLIPImageProcessor":
        logger.warning(
            "the source's image processor is %s, which %s may not equal: mean and standard deviation are taken from "
            "it, size and crop from the model",
            kind or "of no named class",
            own["image_processor_type"],
        )
        return {**own, **{name: source[name] for name in ("image_mean", "image_std") if name in source}}
    settings = {name: value for name, value in source.items() if not name.endswith(("_type", "processor_class"))}
    try:
        stated = getattr(transformers, kind).from_dict(settings).to_dict()
        size = {name: int(value) for name, value in stated["size"].items() if value is not None}
        crop = stated["crop_size"] if stated.get("do_center_crop") else size
        crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
        crop = {name: int(crop.get(name) or crop["shortest_edge"]) for name in ("height", "width")}
    # Whatever the stock class raises for values that it cannot use: KeyError, TypeError, its own errors of validation.
    except Exception as error:
        raise ValueError(f"the source's {IMAGE_PROCESSOR_FILE} cannot be read as a {kind}: {error!r}") from error
    return {
        **own,
        **{name: stated[name] for name in ("do_resize", "do_rescale", "rescale_factor", "do_normalize")},
        "resample": int(stated["resample"]),
        "size": size,
        "do_center_crop": bool(stated.get("do_center_crop")),
        "crop_size": crop,
        "image_mean": list(stated["image_mean"]),
        "image_std": list(stated["image_std"]),
    }
