"""Head modules: patch grids -> depth, tokens -> one pooled vector. They take tensors and know nothing of the trunk.

Symbols: B batch, L tokens, D hidden size, gh gw patch rows and columns.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .configuration_vit_embed import (
    NUM_DPT_TAPS,
    VitEmbedConfig,
)


class AttentionPooling(nn.Module):
    """A learned query reads all tokens, then an MLP with a residual: `pooling_type="map"`.

    Source: arXiv:2106.04560 figure 1 (MAP head), as in SigLIP; here with separate q, k and v projections.
    """

    def __init__(self, config: VitEmbedConfig):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.probe = nn.Parameter(torch.zeros(1, 1, width))
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, width)

    def forward(self, tokens: torch.Tensor, key_bias: torch.Tensor | None = None) -> torch.Tensor:
        """(B, L, D), and what to add to the scores of each, (B, 1, 1, L) -> (B, D)."""
        probe = self.probe.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        query, key, value = (
            states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, h, 1 or L, D / h)
            for states in (self.q_proj(probe), self.k_proj(tokens), self.v_proj(tokens))
        )
        pooled = F.scaled_dot_product_attention(query, key, value, attn_mask=key_bias)  # (B, h, 1, D / h)
        pooled = self.out_proj(pooled.transpose(1, 2).flatten(2))[:, 0]  # (B, D)
        return pooled + self.fc2(self.activation(self.fc1(self.layernorm(pooled))))


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
        self.conv2.init_std = 0.0

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
        hidden = F.interpolate(self.unit(level), size=size, mode="bilinear", align_corners=False)
        return self.projection(hidden)


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
        stages = zip(feature_maps, self.projections, self.resizes, self.levels)
        levels = [level(resize(projection(maps))) for maps, projection, resize, level in stages]
        fused = None
        for i in reversed(range(len(levels))):
            height, width = levels[i].shape[2:]
            size = tuple(levels[i - 1].shape[2:]) if i else (2 * height, 2 * width)
            fused = self.fusions[i](levels[i], fused, size)
        hidden = self.head1(fused)  # (B, F / 2, 8 gh, 8 gw)
        hidden = F.interpolate(hidden, scale_factor=2, mode="bilinear", align_corners=False)
        return self.head3(F.relu(self.head2(hidden))).squeeze(1)


# A depth head takes `num_taps` maps (B, D, gh, gw), shallow to deep, and gives one real number a pixel of a finer
# grid. The names are `configuration_vit_embed.DEPTH_HEAD_TYPES`.
DEPTH_HEADS = {"deconv": DeconvDepthHead, "dpt": DPTDepthHead}


def to_depth(raw: torch.Tensor, max_depth: float | None) -> torch.Tensor:
    """A head's real numbers -> depth > 0: metres in (0, max_depth), or unitless and unbounded without a max_depth."""
    return F.softplus(raw.float()) if max_depth is None else max_depth * torch.sigmoid(raw.float())


def raw_depth(raw: torch.Tensor, max_depth: None) -> torch.Tensor:
    """A head's real numbers in float32: any number, in whatever unit it was trained in."""
    return raw.float()


# How depth is made of a head's real numbers, by `depth_activation`. The names are
# `configuration_vit_embed.DEPTH_ACTIVATIONS`.
DEPTH_ACTIVATIONS = {None: to_depth, "identity": raw_depth}
