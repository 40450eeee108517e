"""The processor files that lie beside the weights: which they are, what an image processor of ours says, and carrying
them from the checkpoint a model was loaded from to the folder it is saved in. The processors themselves are stock.
"""

import json
import logging
import math
import os
from typing import Any

from transformers.utils import CONFIG_NAME, cached_file

from .configuration_vit_embed import (
    VitEmbedConfig,
    as_size,
)

logger = logging.getLogger(__name__)

IMAGE_PROCESSOR_FILE = "preprocessor_config.json"
# transformers 5 saves a CLIPProcessor's image processor inside this one.
PROCESSOR_FILE = "processor_config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG_FILE,
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "tokenizer.model",
    "vocab.txt",
)

# OpenAI's statistics of its training images (the `_transform` of its reference code).
CLIP_IMAGE_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_IMAGE_STD = [0.26862954, 0.26130258, 0.27577711]
BICUBIC = 3  # PIL.Image.Resampling.BICUBIC


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


def carried_image_processor(source: dict[str, Any], own: dict[str, Any], same_image_size: bool) -> dict[str, Any]:
    """The source's image processor as a model with the image processor `own` needs it.

    Of the same kind it is the source's own where the size is the same, or the model has kept its `image_size`, which
    need not be the processor's (DINOv2: positions for 518 pixels, images of 224). Else its mean and deviation in `own`.
    """
    same_kind = image_processor_kind(source) == own["image_processor_type"]
    size_field = "crop_size" if "crop_size" in own else "size"
    size = source.get(size_field)
    size = {"height": size, "width": size} if isinstance(size, int) else size
    if same_kind and (same_image_size or size == own[size_field]):
        # OpenAI's repos name neither: transformers 4.25 had another field, and their model type says the rest.
        named = {name: own[name] for name in ("image_processor_type", "processor_class") if name in own}
        carried = {**named, **source}
        carried.pop("feature_extractor_type", None)
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


def _stored_image_size(config: dict[str, Any]) -> Any:
    """`image_size` of a config.json, ours or CLIP's; None where it does not say."""
    towers = (config.get(name) for name in ("vision_config_dict", "vision_config"))
    return as_size(next((each["image_size"] for each in (config, *towers) if each and "image_size" in each), None))


def _read_json(path: str) -> dict[str, Any]:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _with_tokenizer_class(content: bytes | None) -> bytes:
    """A `tokenizer_config.json` that names its class, which CLIP's own (of OpenAI's repos) leaves to the model type."""
    said = {} if content is None else json.loads(content)
    if "tokenizer_class" in said:
        return content
    return (json.dumps({**said, "tokenizer_class": "CLIPTokenizer"}, indent=2) + "\n").encode()


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
        names = (IMAGE_PROCESSOR_FILE, PROCESSOR_FILE, CONFIG_NAME)
        found = {name: _find(source, name, hub_options) for name in names}
        if with_tokenizer:
            found.update({name: _find(source, name, hub_options) for name in TOKENIZER_FILES})
        found = {name: path for name, path in found.items() if path is not None}
        if not os.path.isabs(source) and not found.keys() & {IMAGE_PROCESSOR_FILE, PROCESSOR_FILE}:
            logger.warning(
                "found no image processor in %s, or could not ask: %s gets one with CLIP's mean and standard "
                "deviation; where others belong to the weights, save the processor there yourself",
                source,
                folder,
            )
    image_processor = image_processor_dict(config, image_processor_type)
    source_processor, source_config = None, {}
    if CONFIG_NAME in found:
        source_config = _read_json(found.pop(CONFIG_NAME))
    if PROCESSOR_FILE in found:
        source_processor = _read_json(found.pop(PROCESSOR_FILE)).get("image_processor")
    if IMAGE_PROCESSOR_FILE in found:
        source_processor = _read_json(found.pop(IMAGE_PROCESSOR_FILE))
    if source_processor is not None:
        same_image_size = _stored_image_size(source_config) == config.image_size
        image_processor = carried_image_processor(source_processor, image_processor, same_image_size)
    contents = {IMAGE_PROCESSOR_FILE: (json.dumps(image_processor, indent=2, sort_keys=True) + "\n").encode()}
    for name, path in found.items():
        with open(path, "rb") as file:
            contents[name] = file.read()
    if source_config.get("model_type") == "clip" and contents.keys() & set(TOKENIZER_FILES):
        contents[TOKENIZER_CONFIG_FILE] = _with_tokenizer_class(contents.get(TOKENIZER_CONFIG_FILE))
    for name, content in contents.items():
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            with open(path, "wb") as file:
                file.write(content)
