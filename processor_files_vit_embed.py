"""The processor files that lie beside the weights: which they are, what an image processor of ours says, and carrying
them from the checkpoint a model was loaded from to the folder it is saved in. The processors themselves are stock.
"""

import json
import logging
import math
import os
from typing import Any

import transformers
from transformers.utils import cached_file

from .configuration_vit_embed import (
    VitEmbedConfig,
)

logger = logging.getLogger(__name__)

IMAGE_PROCESSOR_FILE = "preprocessor_config.json"
# transformers 5 saves a CLIPProcessor's image processor inside this one.
PROCESSOR_FILE = "processor_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)

# OpenAI's statistics of its training images (the `_transform` of its reference code).
CLIP_IMAGE_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_IMAGE_STD = [0.26862954, 0.26130258, 0.27577711]
# Of ImageNet's training images, as torchvision's and timm's models take them.
IMAGENET_IMAGE_MEAN = [0.485, 0.456, 0.406]
IMAGENET_IMAGE_STD = [0.229, 0.224, 0.225]
BILINEAR = 2  # PIL.Image.Resampling.BILINEAR
BICUBIC = 3  # PIL.Image.Resampling.BICUBIC

# Stock image processors whose steps are CLIPImageProcessor's, all or some of them, in the same order: RGB, resize,
# centre crop, rescale, normalise. They differ in their defaults.
CLIP_LIKE_IMAGE_PROCESSORS = (
    "BitImageProcessor",
    "DeiTImageProcessor",
    "SiglipImageProcessor",
    "ViTImageProcessor",
)


def image_processor_dict(config: VitEmbedConfig, image_processor_type: str) -> dict[str, Any]:
    """What `preprocessor_config.json` of a model says when there is no source to take it from.

    Args:
        config: gives the size in pixels and the patch.
        image_processor_type: "CLIPImageProcessor" resizes the shorter side and crops the centre as CLIP does (a
            rectangular model resizes to its size without a crop); "DPTImageProcessor" resizes to the size, as depth
            labels must not be cropped away.
    """
    height, width = config.image_shape
    result = {
        "image_processor_type": image_processor_type,
        # DPTImageProcessor's own default leaves greyscale and alpha in; its transformers 4 version has no such step.
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": BICUBIC,
        "size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": CLIP_IMAGE_MEAN,
        "image_std": CLIP_IMAGE_STD,
    }
    if image_processor_type == "DPTImageProcessor":
        return {
            **result,
            "do_pad": False,
            "keep_aspect_ratio": False,
            "ensure_multiple_of": math.lcm(*config.patch_shape),
        }
    result.update(do_center_crop=height == width, crop_size={"height": height, "width": width})
    if height == width:
        result["size"] = {"shortest_edge": height}
    if config.text_config is not None:
        result["processor_class"] = "CLIPProcessor"
    return result


def image_processor_kind(source: dict[str, Any]) -> str:
    """The stock class that a `preprocessor_config.json` names, without the suffixes of its backends; "" for none."""
    kind = source.get("image_processor_type", source.get("feature_extractor_type"))
    if not isinstance(kind, str):
        return ""
    return kind.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")


def equal_image_processor(source: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The `preprocessor_config.json` of our kind of image processor that gives what a source's stock one gives.

    Args:
        source: the other's `preprocessor_config.json`; what it leaves out is its class's default.
        own: what this model's says without a source, as in `image_processor_dict`.

    Returns:
        `source` itself where it is of the kind of `own`. A CLIPImageProcessor equal to it where it is one of
        CLIP_LIKE_IMAGE_PROCESSORS. Else `own` with its mean and standard deviation, and a warning: how it resizes and
        crops is not known.

    Raises:
        ValueError: values that the stock class cannot read.
    """
    kind = image_processor_kind(source)
    if kind == own["image_processor_type"]:
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


def carried_image_processor(source: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The source's image processor as a model with the image processor `own` needs it.

    Of the same kind and for the same size it is the source's own; of another kind, or for another size, its mean and
    standard deviation in `own`.
    """
    same_kind = image_processor_kind(source) == own["image_processor_type"]
    size_field = "crop_size" if "crop_size" in own else "size"
    size = source.get(size_field)
    size = {"height": size, "width": size} if isinstance(size, int) else size
    if same_kind and size == own[size_field]:
        carried = dict(source)
        if "processor_class" not in own:
            carried.pop("processor_class", None)
        return carried
    return {**own, **{name: source[name] for name in ("image_mean", "image_std") if name in source}}


def _find(source: str, name: str, hub_options: dict[str, Any]) -> str | None:
    """The path of a file of a checkpoint, in a local folder (absolute) or on the Hub, or None."""
    if os.path.isabs(source):  # never to be taken for a Hub id, even when the folder is gone by now
        path = os.path.join(source, hub_options.get("subfolder") or "", name)
        return path if os.path.isfile(path) else None
    try:
        return cached_file(source, name, **hub_options)
    except OSError:
        return None


def _read_json(path: str) -> dict[str, Any]:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def write_processor_files(
    folder: str | os.PathLike,
    config: VitEmbedConfig,
    image_processor_type: str,
    with_tokenizer: bool,
    source: str | None,
    hub_options: dict[str, Any],
) -> None:
    """Completes `folder` with an image processor and, for a dual encoder, the tokenizer; files already there stay.

    Args:
        folder: an existing folder.
        source: the folder or Hub id that the model was loaded from, or None.
        hub_options: revision, token and the like of that load.
    """
    found = {}
    if source and os.path.isabs(source) and not os.path.isdir(source):
        logger.warning(
            "%s, which this model was loaded from, is gone: %s gets an image processor with CLIP's mean and standard "
            "deviation and no tokenizer; save the processor there yourself",
            source,
            folder,
        )
    elif source:
        found = {name: _find(source, name, hub_options) for name in (IMAGE_PROCESSOR_FILE, PROCESSOR_FILE)}
        if with_tokenizer:
            found.update({name: _find(source, name, hub_options) for name in TOKENIZER_FILES})
        found = {name: path for name, path in found.items() if path is not None}
    image_processor = image_processor_dict(config, image_processor_type)
    source_processor = None
    if PROCESSOR_FILE in found:
        source_processor = _read_json(found.pop(PROCESSOR_FILE)).get("image_processor")
    if IMAGE_PROCESSOR_FILE in found:
        source_processor = _read_json(found.pop(IMAGE_PROCESSOR_FILE))
    if source_processor is not None:
        image_processor = carried_image_processor(source_processor, image_processor)
    contents = {IMAGE_PROCESSOR_FILE: (json.dumps(image_processor, indent=2, sort_keys=True) + "\n").encode()}
    for name, path in found.items():
        with open(path, "rb") as file:
            contents[name] = file.read()
    for name, content in contents.items():
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            with open(path, "wb") as file:
                file.write(content)
