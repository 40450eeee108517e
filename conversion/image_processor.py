"""The image processor of a converted model: that of its source, as the stock CLIPImageProcessor with the same steps."""

import logging
from typing import Any

import transformers

from vit_embed import VitEmbedConfig
from vit_embed.conversion.layouts.layout import Layout
from vit_embed.conversion.processor_files import (
    IMAGE_PROCESSOR_FILE,
    carried_image_processor,
    image_processor_dict,
    image_processor_kind,
)
from vit_embed.conversion.source import Source
from vit_embed.modeling_vit_embed import VitEmbedPreTrainedModel

logger = logging.getLogger(__name__)

# Stock image processors whose steps are CLIPImageProcessor's, all or some of them, in the same order: RGB, resize,
# centre crop, rescale, normalise. They differ in their defaults.
CLIP_LIKE_IMAGE_PROCESSORS = (
    "BitImageProcessor",
    "CLIPImageProcessor",
    "DeiTImageProcessor",
    "SiglipImageProcessor",
    "ViTImageProcessor",
)


def choose_image_processor(layout: Layout, source: Source, model: VitEmbedPreTrainedModel) -> dict[str, Any] | None:
    """The `preprocessor_config.json` for a model: from the source's own, or what its layout makes of its config.

    Returns:
        None where neither says anything: saving then writes CLIP's, which is logged where the model may want another.

    Raises:
        ValueError: an image processor that cannot be read.
    """
    config = model.config
    found = layout.image_processor(source.config, config)
    if source.preprocessor is not None:
        own = found or image_processor_dict(config, model.image_processor_type)
        found = equal_image_processor(source.preprocessor, own)
    elif found is None and not layout.sees_as_clip:
        logger.warning(
            "nothing says how the source's images were prepared: the folder's image processor has CLIP's mean, "
            "standard deviation and crop; put a preprocessor_config.json beside the weights, or correct the folder's"
        )
    if found is None:
        return None
    own = image_processor_dict(config, model.image_processor_type)
    return _in_whole_patches(carried_image_processor(found, own, same_image_size=True), config)


def _in_whole_patches(image_processor: dict[str, Any], config: VitEmbedConfig) -> dict[str, Any]:
    """The same for images without a remainder of pixels that fill no patch: other packages' convolutions leave it out
    (SigLIP's 384 pixels in patches of 14), ours refuses it."""
    if config.pad_to_patch:
        return image_processor
    units = dict(zip(("height", "width"), config.image_multiple))
    sizes = {name: image_processor[name] for name in ("size", "crop_size") if "height" in image_processor.get(name, ())}
    whole = {name: {side: size[side] // units[side] * units[side] for side in units} for name, size in sizes.items()}
    return {**image_processor, **whole}


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
        read = getattr(transformers, kind).from_dict(settings).to_dict()
        size = {name: int(value) for name, value in read["size"].items() if value is not None}
        crop = read["crop_size"] if read.get("do_center_crop") else size
        crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
        crop = {name: int(crop.get(name) or crop["shortest_edge"]) for name in ("height", "width")}
    # Whatever the stock class raises for values that it cannot use: KeyError, TypeError, its own errors of validation.
    except Exception as error:
        raise ValueError(f"the source's {IMAGE_PROCESSOR_FILE} cannot be read as a {kind}: {error!r}") from error
    return {
        **own,
        **{name: read[name] for name in ("do_resize", "do_rescale", "rescale_factor", "do_normalize")},
        "resample": int(read["resample"]),
        "size": size,
        "do_center_crop": bool(read.get("do_center_crop")),
        "crop_size": crop,
        "image_mean": list(read["image_mean"]),
        "image_std": list(read["image_std"]),
    }
