"""The processor files beside weights: their names, and what an image processor like CLIP's says in them."""

from typing import Any

from vit_embed import VitEmbedConfig

# The one place where conversion imports these.
from vit_embed.saving_vit_embed import (
    BICUBIC,
    CLIP_IMAGE_MEAN,
    CLIP_IMAGE_STD,
    IMAGE_PROCESSOR_FILE,
    PROCESSOR_FILE,
    TOKENIZER_FILES,
    carried_image_processor,
    image_processor_dict,
    image_processor_kind,
)

__all__ = [
    "BICUBIC",
    "BILINEAR",
    "CLIP_IMAGE_MEAN",
    "CLIP_IMAGE_STD",
    "IMAGENET_IMAGE_MEAN",
    "IMAGENET_IMAGE_STD",
    "IMAGE_PROCESSOR_FILE",
    "PROCESSOR_FILE",
    "TOKENIZER_FILES",
    "carried_image_processor",
    "clip_image_processor",
    "image_processor_dict",
    "image_processor_kind",
    "sides",
]

# Of ImageNet's training images, as torchvision's and timm's models take them.
IMAGENET_IMAGE_MEAN = [0.485, 0.456, 0.406]
IMAGENET_IMAGE_STD = [0.229, 0.224, 0.225]
BILINEAR = 2  # PIL.Image.Resampling.BILINEAR


def clip_image_processor(config: VitEmbedConfig, **changes: Any) -> dict[str, Any]:
    """The `preprocessor_config.json` of a CLIPImageProcessor for this model: CLIP's own settings but for `changes`."""
    return {**image_processor_dict(config, "CLIPImageProcessor"), **changes}


def sides(size: tuple[int, int]) -> dict[str, int]:
    """(height, width) in pixels, as an image processor has it."""
    return dict(zip(("height", "width"), size))
