"""What stems are built of: layers that read patches, their norms, and the bases of the spectral stems.

Symbols as in stems_vit_embed.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_vit_embed import VitEmbedConfig


def patchify(pixel_values: torch.Tensor, patch_shape: tuple[int, int]) -> torch.Tensor:
    """Cuts an image into non-overlapping patches, row by row.

    Args:
        pixel_values: (B, C, H, W), H and W multiples of the patch.
        patch_shape: (ph, pw) in pixels.

    Returns:
        (B, gh * gw, C * ph * pw); within a patch in the order of a convolution's weight: channel, row, column.
    """
    batch, channels, height, width = pixel_values.shape
    patch_height, patch_width = patch_shape
    rows, columns = height // patch_height, width // patch_width
    patches = pixel_values.reshape(batch, channels, rows, patch_height, columns, patch_width)
    patches = patches.permute(0, 2, 4, 1, 3, 5)  # (B, gh, gw, C, ph, pw)
    return patches.reshape(batch, rows * columns, channels * patch_height * patch_width)


def unpatchify(patches: torch.Tensor, grid_size: tuple[int, int], patch_shape: tuple[int, int]) -> torch.Tensor:
    """The inverse of `patchify`: (B, gh * gw, C * ph * pw) -> (B, C, gh * ph, gw * pw)."""
    grid = patches.reshape(patches.shape[0], *grid_size, -1, *patch_shape)  # (B, gh, gw, C, ph, pw)
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


class PatchConv2d(nn.Conv2d):
    """A convolution that takes pixels of any float dtype and gives that of its weight, whatever autocast makes of the
    product; patches that do not overlap are multiplied with the weight in one matrix product."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, D, gh, gw)."""
        pixel_values = pixel_values.to(self.weight.dtype)
        is_patches = self.stride == self.kernel_size != (1, 1) and self.groups == 1 and self.dilation == (1, 1)
        if not is_patches or self.padding not in ((0, 0), "valid"):
            return super().forward(pixel_values).to(self.weight.dtype)
        height, width = self.kernel_size
        rows, columns = pixel_values.shape[2] // height, pixel_values.shape[3] // width
        patches = patchify(pixel_values[:, :, : rows * height, : columns * width], self.kernel_size)
        tokens = F.linear(patches, self.weight.flatten(1), self.bias).to(self.weight.dtype)  # (B, gh * gw, D)
        return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], rows, columns)


class PatchLinear(nn.Linear):
    """A linear layer that takes any float dtype and gives that of its weight, whatever autocast makes of the
    product."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(B, N, values) -> (B, N, D)."""
        return super().forward(values.to(self.weight.dtype)).to(self.weight.dtype)


class StemBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose running statistics stay as they are, and normalise, while its own weight is frozen.

    So a frozen trunk, a linear probe and an adapter leave a stem's buffers alone: an adapter's file has no buffers, and
    would come back on other statistics than it was trained on.
    """

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        if self.training and self.affine and not self.weight.requires_grad:
            statistics = (self.running_mean, self.running_var)
            return F.batch_norm(feature_map, *statistics, self.weight, self.bias, training=False, eps=self.eps)
        return super().forward(feature_map)


def with_stem_norms(module: nn.Module) -> nn.Module:
    """Puts a StemBatchNorm2d in the place of every BatchNorm2d in a module that is not trained yet."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            options = (child.eps, child.momentum, child.affine, child.track_running_stats)
            setattr(module, name, StemBatchNorm2d(child.num_features, *options))
        else:
            with_stem_norms(child)
    return module


def patch_conv(config: VitEmbedConfig, patch_shape: tuple[int, int], gain: float = 1.0) -> PatchConv2d:
    """A convolution of patches of (ph, pw) pixels; `gain` multiplies the deviation that CLIP starts it with."""
    layer = PatchConv2d(
        config.num_channels, config.hidden_size, patch_shape, stride=patch_shape, bias=config.patch_bias
    )
    layer.init_std = gain * config.initializer_range * config.initializer_factor
    return layer


def patch_linear(config: VitEmbedConfig, num_values: int) -> PatchLinear:
    """A linear layer of a patch's `num_values` values."""
    layer = PatchLinear(num_values, config.hidden_size, bias=config.patch_bias)
    layer.init_std = config.initializer_range * config.initializer_factor
    return layer


def pointwise(width_in: int, width_out: int, config: VitEmbedConfig, bias: bool = True) -> PatchConv2d:
    """A 1x1 convolution that keeps the size of what it is fed when it starts."""
    layer = PatchConv2d(width_in, width_out, kernel_size=1, bias=bias)
    layer.init_std = width_in**-0.5 * config.initializer_factor
    return layer


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of every pixel. (B, C, H, W) -> the same."""

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        return super().forward(feature_map.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# The names are `options_vit_embed.STEM_NORM_TYPES`.
STEM_NORMS = {"layer_norm": ChannelNorm, "batch_norm": StemBatchNorm2d}


def dct_basis(length: int) -> tuple[list[list[float]], list[float]]:
    """The orthonormal cosine transform (DCT-II): `length` rows of as many numbers, and the frequency of each, from 0 to
    1."""
    rows = [
        [math.sqrt((2 if k else 1) / length) * math.cos(math.pi / length * k * (n + 0.5)) for n in range(length)]
        for k in range(length)
    ]
    return rows, [k / length for k in range(length)]


def haar_basis(length: int) -> tuple[list[list[float]], list[float]]:
    """The orthonormal Haar wavelets of a power of two: `length` rows of as many numbers, and the level of each, 0 for
    the mean, growing as they get narrower."""
    rows, levels = [[length**-0.5] * length], [0.0]
    for level in range(1, length.bit_length()):
        width = length >> (level - 1)  # of a wavelet of this level, from left to right
        size, half = width**-0.5, width // 2
        for start in range(0, length, width):
            rows.append([0.0] * start + [size] * half + [-size] * half + [0.0] * (length - start - width))
            levels.append(float(level))
    return rows, levels


def spectral_basis(
    axis_basis: Callable[[int], tuple[list[list[float]], list[float]]],
    patch_shape: tuple[int, int],
    num_kept: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """The basis of a patch: (num_kept, ph * pw), the coefficients of lowest frequency first.

    Args:
        axis_basis: length of an axis -> rows of its basis, and the frequency of each.
        patch_shape: (ph, pw) in pixels.
        num_kept: how many of the ph * pw coefficients; the frequency of one is the sum of both directions'.
    """
    (rows, row_frequency), (columns, column_frequency) = (axis_basis(side) for side in patch_shape)
    # Made whole numbers, so that rounding does not order equal frequencies.
    pairs = sorted(
        ((i, j) for i in range(len(rows)) for j in range(len(columns))),
        key=lambda pair: round((row_frequency[pair[0]] + column_frequency[pair[1]]) * math.prod(patch_shape)),
    )[:num_kept]
    down = torch.tensor([rows[i] for i, _ in pairs], dtype=torch.float64)  # (num_kept, ph)
    across = torch.tensor([columns[j] for _, j in pairs], dtype=torch.float64)  # (num_kept, pw)
    return (down[:, :, None] * across[:, None, :]).flatten(1).to(device=device, dtype=dtype)


# What `stored_spectral_basis` has made. No buffers of a module: those come back from `from_pretrained` of transformers
# 5 with whatever is in memory.
_BASES: dict[tuple, torch.Tensor] = {}


@torch.compiler.assume_constant_result
def stored_spectral_basis(*key) -> torch.Tensor:
    """`spectral_basis`, made once for each dtype and device; a graph holds it as a constant."""
    if key not in _BASES:
        # A tensor made in inference mode could not take part in training later.
        with torch.inference_mode(False), torch.no_grad():
            _BASES[key] = spectral_basis(*key)
    return _BASES[key]
