"""Running a source by its own code: what every layout's `reference` needs."""

import torch
from torch.nn import functional as F

from vit_embed.conversion.layouts.layout import StateDict
from vit_embed.conversion.memory import one_by_one


def as_float32(state_dict: StateDict) -> dict[str, torch.Tensor]:
    """The same numbers in float32; what is no float stays as it is."""
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in one_by_one(state_dict)}


def with_remainder(pixel_values: torch.Tensor, image_shape: tuple[int, int]) -> torch.Tensor:
    """(B, C, H, W) -> (B, C, *image_shape): zeros where a convolution drops the pixels that fill no patch."""
    height, width = pixel_values.shape[-2:]
    return F.pad(pixel_values, (0, image_shape[1] - width, 0, image_shape[0] - height))
