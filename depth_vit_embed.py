"""Depth: maps of the trunk -> a depth for every pixel, and losses that know of missing labels.

Symbols: B batch, D hidden size, gh gw patch rows and columns, H W pixels. Height comes before width everywhere.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_vit_embed import VitEmbedConfig
from .inputs_vit_embed import IGNORED_LABEL, check_depth_labels, image_sizes
from .options_vit_embed import NUM_DPT_TAPS


class DeconvDepthHead(nn.Module):
    """Two transposed convolutions D -> D/2 -> D/4, each doubling the grid, then a 1x1 convolution to one channel.

    Their kernel is `deconv_kernel_size`; what a wider one than 2 adds around the map, its padding takes off.
    """

    num_taps = 1

    def __init__(self, config: VitEmbedConfig):
        super().__init__()
        width, half, quarter = (max(1, config.hidden_size // divisor) for divisor in (1, 2, 4))
        kernel = config.deconv_kernel_size
        doubling = {"kernel_size": kernel, "stride": 2, "padding": (kernel - 2) // 2}
        self.deconv1 = nn.ConvTranspose2d(width, half, **doubling)
        self.deconv2 = nn.ConvTranspose2d(half, quarter, **doubling)
        self.projection = nn.Conv2d(quarter, 1, kernel_size=1)
        self.projection.init_std = config.initializer_range * config.initializer_factor  # a flat depth to start from

    def forward(self, feature_maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """One (B, D, gh, gw) -> (B, 4 gh, 4 gw), any real number."""
        (hidden,) = feature_maps
        hidden = F.relu(self.deconv1(hidden))  # (B, D / 2, 2 gh, 2 gw)
        hidden = F.relu(self.deconv2(hidden))  # (B, D / 4, 4 gh, 4 gw)
        return self.projection(hidden).squeeze(1)


def linear_conv(kind: type[nn.Conv2d | nn.ConvTranspose2d], width_in: int, width: int, kernel: int, **options):
    """A convolution with no ReLU in front: it starts with a gain of 1, where that of the others is sqrt(2).

    A chain of them with the larger gain multiplies what comes out of the trunk by hundreds, and `to_depth` of that is 0
    or max_depth, where no gradient is.
    """
    conv = kind(width_in, width, kernel_size=kernel, **options)
    # A transposed convolution whose kernel is its stride writes each pixel from one.
    num_read = width_in * (kernel**2 if kind is nn.Conv2d else 1)
    conv.init_std = num_read**-0.5
    return conv


class ResidualConvUnit(nn.Module):
    """Two 3x3 convolutions with a ReLU before each, added to the input. (B, F, H, W) -> the same.

    The second starts at zero, so a unit starts as the identity (arXiv:1901.09321) and a row of them does not grow.
    """

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.conv2.init_std = 0.0  # type: ignore[assignment]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.conv2(F.relu(self.conv1(F.relu(hidden))))


class FeatureFusion(nn.Module):
    """Adds one level's map to what came from the deeper levels, refines, and scales up to the next level's size."""

    def __init__(self, width: int, has_deeper: bool):
        super().__init__()
        self.level_unit = ResidualConvUnit(width) if has_deeper else None
        self.unit = ResidualConvUnit(width)
        self.projection = linear_conv(nn.Conv2d, width, width, 1)

    def forward(self, level: torch.Tensor, deeper: torch.Tensor | None, size: tuple[int, int]) -> torch.Tensor:
        """(B, F, H, W) and the same or None -> (B, F, *size)."""
        if deeper is not None:
            level = self.level_unit(level) + deeper
        # A pixel's projection and a mean of neighbours, whose weights sum to 1, go in either order; the paper's, which
        # scales up first, is four times the work and keeps the larger map for the backward pass.
        hidden = self.projection(self.unit(level))
        return F.interpolate(hidden, size=size, mode="bilinear", align_corners=False)


class DPTDepthHead(nn.Module):
    """Four depths of the trunk, reassembled at strides p/4, p/2, p and 2p, fused from deep to shallow, then read out.

    Source: arXiv:2103.13413 sections 3.2 and 3.3; channels D/8, D/4, D/2, D (its ViT-Base has 96 ... 768). Prefix
    tokens are left out instead of being projected into the patches (its "ignore" readout), and the fusion width is
    min(256, D/2) so that small trunks keep a small head.

    With `use_feature_pyramid` the two finest levels read the stem's maps of strides p/4 and p/2 in place of shallow
    layers, as the paper's hybrid reads its CNN's.
    """

    num_taps = NUM_DPT_TAPS

    def __init__(self, config: VitEmbedConfig):
        super().__init__()
        width = config.hidden_size
        channels = [max(1, width // divisor) for divisor in (8, 4, 2, 1)]
        fusion = max(2, min(256, width // 2))
        widths, fine_resizes = [width] * 4, [nn.Identity(), nn.Identity()]
        if config.use_feature_pyramid:
            widths[:2] = config.pyramid_widths[-3:-1]
        else:
            fine_resizes = [
                linear_conv(nn.ConvTranspose2d, channels[0], channels[0], 4, stride=4),
                linear_conv(nn.ConvTranspose2d, channels[1], channels[1], 2, stride=2),
            ]
        self.projections = nn.ModuleList(
            [linear_conv(nn.Conv2d, width_in, channel, 1) for width_in, channel in zip(widths, channels)]
        )
        coarse_resize = linear_conv(nn.Conv2d, channels[3], channels[3], 3, stride=2, padding=1)
        self.resizes = nn.ModuleList([*fine_resizes, nn.Identity(), coarse_resize])
        self.levels = nn.ModuleList([linear_conv(nn.Conv2d, c, fusion, 3, padding=1, bias=False) for c in channels])
        deepest = len(channels) - 1
        self.fusions = nn.ModuleList([FeatureFusion(fusion, has_deeper=i < deepest) for i in range(len(channels))])
        self.head1 = linear_conv(nn.Conv2d, fusion, fusion // 2, 3, padding=1)
        self.head2 = linear_conv(nn.Conv2d, fusion // 2, 32, 3, padding=1)
        self.head3 = nn.Conv2d(32, 1, kernel_size=1)
        self.head3.init_std = config.initializer_range * config.initializer_factor  # a flat depth to start from

    def forward(self, feature_maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Four (B, D, gh, gw), shallow to deep, or a pyramid's two (B, C_i, H_i, W_i) and two of those -> (B, 16 gh,
        16 gw), any real number."""
        fused, level = None, self._level(len(feature_maps) - 1, feature_maps)
        for i in reversed(range(len(feature_maps))):  # from deep to shallow, two levels at a time
            finer = self._level(i - 1, feature_maps) if i else None
            height, width = level.shape[2:]
            size = tuple(finer.shape[2:]) if i else (2 * height, 2 * width)
            fused, level = self.fusions[i](level, fused, size), finer  # type: ignore[assignment]
        hidden = self.head1(fused)  # (B, F / 2, 8 gh, 8 gw)
        del fused
        hidden = F.interpolate(hidden, scale_factor=2, mode="bilinear", align_corners=False)
        return self.head3(F.relu(self.head2(hidden))).squeeze(1)

    def _level(self, number: int, feature_maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Map `number`, at its own stride and the width of the fusions."""
        return self.levels[number](self.resizes[number](self.projections[number](feature_maps[number])))


# A depth head takes `num_taps` maps (B, D, gh, gw), shallow to deep, and gives one real number a pixel of a finer
# grid. The names are `options_vit_embed.DEPTH_HEAD_TYPES`.
DEPTH_HEADS = {"deconv": DeconvDepthHead, "dpt": DPTDepthHead}


def to_depth(raw: torch.Tensor, max_depth: float | None) -> torch.Tensor:
    """A head's real numbers -> depth > 0: metres in (0, max_depth), or unitless and unbounded without a max_depth."""
    return F.softplus(raw.float()) if max_depth is None else max_depth * torch.sigmoid(raw.float())


def raw_depth(raw: torch.Tensor, max_depth: None) -> torch.Tensor:
    """A head's real numbers in float32: any number, in whatever unit it was trained in."""
    return raw.float()


# How depth is made of a head's real numbers, by `depth_activation`. The names are
# `options_vit_embed.DEPTH_ACTIVATIONS`.
DEPTH_ACTIVATIONS = {None: to_depth, "identity": raw_depth}


def resize_depth(depth: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, h, w) -> (B, *size), bilinear: no new extremes, so the range of the depths holds."""
    return F.interpolate(depth[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def evenly_spaced_layers(num_layers: int, num_taps: int) -> list[int]:
    """Which hidden states a head reads; the last one always is among them. 12 layers, 4 taps: 3, 6, 9, 12."""
    return [round(num_layers * i / num_taps) for i in range(1, num_taps + 1)]


def predict_depth(
    head: nn.Module,
    config: VitEmbedConfig,
    maps: tuple[torch.Tensor, ...],
    pixel_values: torch.Tensor | None,
    pixel_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Depth of images, or of what another encoder's patch features cover.

    Args:
        maps: what the head reads, (B, D_i, gh_i, gw_i) from fine to coarse.
        pixel_values: (B, C, H, W) that they are of, or None.
        pixel_mask: (B, H, W) for images of different sizes, or None.

    Returns:
        (B, H, W), zeros in the padding.
    """
    if pixel_mask is not None:
        return _of_sizes(head, config, maps, image_sizes(pixel_mask, pixel_values), tuple(pixel_values.shape[2:]))
    if pixel_values is None:
        return _of_one_size(
            head, config, maps, tuple(n * side for n, side in zip(maps[-1].shape[2:], config.patch_shape))
        )
    return _of_one_size(head, config, maps, tuple(pixel_values.shape[2:]))


def _of_one_size(
    head: nn.Module, config: VitEmbedConfig, maps: tuple[torch.Tensor, ...], image_shape: tuple[int, int]
) -> torch.Tensor:
    """Maps of whole images of (height, width) pixels -> (B, height, width): as the padded image, less its padding."""
    depth = DEPTH_ACTIVATIONS[config.depth_activation](head(maps), config.max_depth)  # (B, any, any)
    height, width = image_shape
    return resize_depth(depth, config.padded_shape(image_shape))[:, :height, :width]


def _of_sizes(
    head: nn.Module,
    config: VitEmbedConfig,
    maps: tuple[torch.Tensor, ...],
    sizes: list[tuple[int, int]],
    padded: tuple[int, int],
) -> torch.Tensor:
    """Each image of a padded batch as if it were alone, (B, *padded), zeros in the padding."""
    depth = torch.zeros(len(sizes), *padded, device=maps[0].device)
    for height, width in sorted(set(sizes)):
        members = [i for i, size in enumerate(sizes) if size == (height, width)]
        rows, columns = config.grid_of((height, width))
        part = tuple(each[members, :, :rows, :columns] for each in maps)
        depth[members, :height, :width] = _of_one_size(head, config, part, (height, width))
    return depth


def valid_depth(depth: torch.Tensor, max_depth: float | None = None) -> torch.Tensor:
    """True where a depth label means something: finite, above zero, and at most `max_depth`, beyond which nothing is
    predicted."""
    valid = torch.isfinite(depth) & (depth > 0)
    return valid if max_depth is None else valid & (depth <= max_depth)


def _sum(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """(B, H, W) -> (B,), over the valid entries; 0, with zero gradients, where there are none."""
    return torch.where(valid, values, 0.0).sum(dim=(1, 2))


def _mean(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """(B, H, W) -> (B,), over the valid entries; 0, with zero gradients, where there are none."""
    return _sum(values, valid) / valid.sum(dim=(1, 2)).clamp(min=1)


def _log_error(predicted_depth: torch.Tensor, depth: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Log ratio log(pred / depth) in float32, arbitrary at invalid pixels."""
    # Left-out labels become 1, so that no log of NaN reaches the gradients.
    smallest = torch.finfo(torch.float32).tiny
    return predicted_depth.float().clamp(min=smallest).log() - depth.where(valid, 1.0).log()


def silog_loss(
    predicted_depth: torch.Tensor, depth: torch.Tensor, valid: torch.Tensor, variance_focus: float = 0.5
) -> torch.Tensor:
    """Scale-invariant log loss of each image: Var(e) + (1 - variance_focus) * mean(e)^2, e = log(pred / depth).

    The variance is taken about the mean, in float32: the textbook form mean(e^2) - mean(e)^2 cancels to noise once
    predictions are good.

    Args:
        predicted_depth, depth: (B, H, W), same unit, predictions positive.
        valid: (B, H, W) bool, the labels that count.
        variance_focus: 1 ignores a global scale, 0 is the plain squared log error.

    Returns:
        (B,).

    Source: arXiv:1406.2283 equation 4 with lambda = 0.5, there too of one image.
    """
    error = _log_error(predicted_depth, depth, valid)
    mean = _mean(error, valid)
    variance = _mean((error - mean[:, None, None]).square(), valid)
    return variance + (1 - variance_focus) * mean.square()


def l1_depth_loss(predicted_depth: torch.Tensor, depth: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of each image, in the unit of the labels. (B, H, W) each -> (B,)."""
    return _mean((predicted_depth.float() - depth.where(valid, 0.0)).abs(), valid)


def l2_depth_loss(predicted_depth: torch.Tensor, depth: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each image, in the squared unit of the labels. (B, H, W) each -> (B,)."""
    return _mean((predicted_depth.float() - depth.where(valid, 0.0)).square(), valid)


def gradient_matching_loss(
    predicted_depth: torch.Tensor, depth: torch.Tensor, valid: torch.Tensor, scales: int = 4
) -> torch.Tensor:
    """How much the steps of log depth between neighbours differ from the labels', at several scales, for each image.

    The sum over k = 0 ... scales - 1 of: every 2^k-th row and column of e = log(pred / depth) from the top left on;
    |e[y, x] - e[y, x + 1]| and |e[y, x] - e[y + 1, x]| summed over the pairs of which both have a label; divided by how
    many of that scale's pixels have one. A scale without such a pair adds nothing. A global factor of the prediction
    changes nothing, a blurred edge costs at every scale that sees it.

    Args:
        predicted_depth, depth: (B, H, W), same unit, predictions positive.
        valid: (B, H, W) bool, the labels that count.
        scales: how many; 4 in the source.

    Returns:
        (B,).

    Source: arXiv:1804.00607 section 4.2 (on log depth), arXiv:1907.01341 equation 11 (scales by leaving out pixels).
    """
    error = _log_error(predicted_depth, depth, valid)
    total = error.new_zeros(error.shape[0])
    for step in (2**k for k in range(scales)):
        part, seen = error[:, ::step, ::step], valid[:, ::step, ::step]
        down = _sum((part[:, 1:] - part[:, :-1]).abs(), seen[:, 1:] & seen[:, :-1])
        across = _sum((part[:, :, 1:] - part[:, :, :-1]).abs(), seen[:, :, 1:] & seen[:, :, :-1])
        total = total + (down + across) / seen.sum(dim=(1, 2)).clamp(min=1)
    return total


# Prediction, labels and where they count, (B, H, W) each -> a loss for each image (B,). The names are
# `options_vit_embed.DEPTH_LOSSES`.
DEPTH_LOSSES: dict[str, Callable[..., torch.Tensor]] = {"silog": silog_loss, "l1": l1_depth_loss, "l2": l2_depth_loss}


def depth_loss(
    config: VitEmbedConfig, predicted_depth: torch.Tensor, labels: torch.Tensor, pixel_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the losses of a batch, each image weighted by its label entries, and how many of these there are.

    An entry is anything but IGNORED_LABEL, which is what transformers' Trainer counts; so the mean over a training
    step, however it is cut into batches, is the mean over its images. Where missing depths are marked by IGNORED_LABEL
    and not by 0, NaN or infinity, an image counts by how many depths it has.

    Args:
        predicted_depth: (B, H, W). labels: (B, H', W') of any real type; the prediction is resized to them.
        pixel_mask: (B, H, W), 0 in padding; labels there are left out, whatever they say.
    """
    check_depth_labels(labels, predicted_depth, pixel_mask)
    if config.depth_activation == "identity" and config.depth_loss == "silog":
        raise ValueError(
            "depth_loss='silog' takes the logarithm of a depth, which may be negative with "
            "depth_activation='identity'; set depth_loss='l1' or 'l2'"
        )
    labels = labels.float()
    valid = valid_depth(labels, config.max_depth)
    if pixel_mask is not None:
        valid = valid & pixel_mask.bool()
    if labels.shape != predicted_depth.shape:
        predicted_depth = resize_depth(predicted_depth, tuple(labels.shape[1:]))
    losses = DEPTH_LOSSES[config.depth_loss](predicted_depth, labels, valid)  # (B,)
    if config.depth_gradient_weight:
        losses = losses + config.depth_gradient_weight * gradient_matching_loss(predicted_depth, labels, valid)
    entries = (labels != IGNORED_LABEL).sum(dim=(1, 2))  # (B,)
    return (losses * entries).sum(), entries.sum()
