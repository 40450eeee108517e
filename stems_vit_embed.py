"""Stems: pixels -> patch tokens. One class a kind, one table of them, one contract.

Symbols: B batch, C channels, H W image pixels, ph pw patch pixels, gh gw patch rows and columns, N = gh * gw, n tokens
kept, D hidden size. Height comes before width everywhere.
"""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoBackbone

from .configuration_vit_embed import (
    VitEmbedConfig,
)
from .tokens_vit_embed import (
    TokenLayout,
    keep_tokens,
)

# Width of the hidden layer that turns patches into the maps of learned tokens, as in the paper's reference code.
TOKEN_LEARNER_WIDTH = 64


class StemOutput(NamedTuple):
    """What a stem makes of a batch of images.

    tokens: (B, N, D), the patches row by row, without positions.
    grid_size: (gh, gw).
    feature_pyramid: maps (B, C_i, H_i, W_i) from fine to coarse, of a stem that has them.
    is_coarse: (B, N), 1 where a patch shares one token with the rest of its 2 x 2 cell, else 0; None for all 0.
    loss: scalar that training adds to the loss of the head, or None.
    """

    tokens: torch.Tensor
    grid_size: tuple[int, int]
    feature_pyramid: tuple[torch.Tensor, ...] | None = None
    is_coarse: torch.Tensor | None = None
    loss: torch.Tensor | None = None


class Stem:
    """The contract: a module made from the config whose `forward` takes (B, C, H, W) and returns a StemOutput.

    Its parameters live under `embeddings.patch_embedding`. Adding a stem means one such class, a row in STEMS and its
    name in `configuration_vit_embed.STEM_TYPES`.
    """

    # Whether a token depends on the pixels of its own patch alone.
    is_local = True

    def select(self, output: StemOutput, positions: torch.Tensor | None) -> tuple[torch.Tensor, TokenLayout]:
        """What enters the trunk of its own output at these positions (N, D): (B, n, D), and what each stands for. All N
        tokens, unless a stem says otherwise."""
        return placed(output.tokens, positions), TokenLayout(output.grid_size)


def placed(tokens: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """Tokens (B, N, D) at their positions (N, D) or (B, N, D), if there are any."""
    return tokens if positions is None else tokens + positions


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
    grid = patches.unflatten(-1, (-1, *patch_shape)).unflatten(1, grid_size)  # (B, gh, gw, C, ph, pw)
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def as_tokens(feature_map: torch.Tensor) -> StemOutput:
    """(B, D, gh, gw) -> the same features as tokens, row by row."""
    return StemOutput(feature_map.flatten(2).transpose(1, 2), tuple(feature_map.shape[2:]))


def pointwise(width_in: int, width_out: int, config: VitEmbedConfig, bias: bool = True) -> nn.Conv2d:
    """A 1x1 convolution that keeps the size of what it is fed when it starts."""
    layer = nn.Conv2d(width_in, width_out, kernel_size=1, bias=bias)
    layer.init_std = width_in**-0.5 * config.initializer_factor
    return layer


class ConvStem(Stem, nn.Conv2d):
    """CLIP's patch embedding: a convolution with kernel = stride = patch, computed as one matrix product.

    token[i] = weight.flatten(1) @ patch[i] (+ bias); N = (H / ph) * (W / pw) tokens.

    Source: arXiv:2010.11929 equation 1. The parameters are those of the convolution, so CLIP's weight loads as it is.
    """

    def __init__(self, config: VitEmbedConfig):
        patch = config.patch_shape
        super().__init__(config.num_channels, config.hidden_size, patch, stride=patch, bias=config.patch_bias)
        self.init_std = config.initializer_range * config.initializer_factor

    def forward(self, pixel_values: torch.Tensor) -> StemOutput:
        tokens = F.linear(patchify(pixel_values, self.kernel_size), self.weight.flatten(1), self.bias)
        grid_size = tuple(size // step for size, step in zip(pixel_values.shape[2:], self.kernel_size))
        return StemOutput(tokens, grid_size)


class PatchLinear(Stem, nn.Linear):
    """A linear map of each patch's values, which `patch_values` gives in some basis: (B, N, values) -> (B, N, D)."""

    def __init__(self, config: VitEmbedConfig, num_values: int):
        super().__init__(num_values, config.hidden_size, bias=config.patch_bias)
        self.patch_shape = config.patch_shape
        self.init_std = config.initializer_range * config.initializer_factor

    def patch_values(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, N, values)."""
        return patchify(pixel_values, self.patch_shape)

    def forward(self, pixel_values: torch.Tensor) -> StemOutput:
        grid_size = tuple(size // step for size, step in zip(pixel_values.shape[2:], self.patch_shape))
        return StemOutput(super().forward(self.patch_values(pixel_values)), grid_size)


class LinearStem(PatchLinear):
    """ConvStem with its weight stored flat, (D, C * ph * pw), as in the equation of the paper.

    Equal to ConvStem when `weight = conv.weight.flatten(1)`. Source: arXiv:2010.11929 equation 1.
    """

    def __init__(self, config: VitEmbedConfig):
        super().__init__(config, config.num_channels * math.prod(config.patch_shape))


class OverlapStem(Stem, nn.Module):
    """One convolution whose kernel k is larger than its stride s = patch, so that patches share pixels.

    Zero padding p = floor((k - s) / 2) on each side; floor((H + 2 p - k) / s) + 1 rows of tokens, columns alike: as
    many as ConvStem's for k = 2 s, one less each way for k = 7, s = 4. With `patch_pointwise` a 1x1 convolution
    follows.

    Source: arXiv:2106.13797 (PVT v2's overlapping patch embedding, which pads k // 2).
    """

    is_local = False

    def __init__(self, config: VitEmbedConfig):
        super().__init__()
        width = config.hidden_size
        self.projection = nn.Conv2d(
            config.num_channels,
            width,
            config.patch_kernel_shape,
            stride=config.patch_shape,
            padding=config.patch_padding,
            bias=config.patch_bias,
        )
        self.projection.init_std = config.initializer_range * config.initializer_factor
        self.pointwise = pointwise(width, width, config) if config.patch_pointwise else None

    def forward(self, pixel_values: torch.Tensor) -> StemOutput:
        feature_map = self.projection(pixel_values)
        return as_tokens(feature_map if self.pointwise is None else self.pointwise(feature_map))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of every pixel. (B, C, H, W) -> the same."""

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        return super().forward(feature_map.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# The names are `configuration_vit_embed.STEM_NORM_TYPES`.
STEM_NORMS = {"layer_norm": ChannelNorm, "batch_norm": nn.BatchNorm2d}


class HierarchicalStem(Stem, nn.Module):
    """log2(patch) stages of GELU(norm(3x3 convolution of stride 2)), then a 1x1 projection.

    N = (H / p) * (W / p) tokens. Each stage halves the map and doubles its channels up to D: 96, 192, 384, 768 at
    strides 2, 4, 8, 16 for ViT-B/16. All maps are returned as `feature_pyramid`.

    Source: arXiv:2106.14881 (the convolutional stem). "batch_norm" is its norm; "layer_norm" needs no running
    statistics and treats every image alone.
    """

    is_local = False

    def __init__(self, config: VitEmbedConfig):
        super().__init__()
        widths = (config.num_channels, *config.pyramid_widths)
        norm = STEM_NORMS[config.stem_norm_type]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width_in, width, 3, stride=2, padding=1, bias=False), norm(width), nn.GELU())
            for width_in, width in zip(widths, widths[1:])
        )
        self.projection = pointwise(widths[-1], config.hidden_size, config, bias=config.patch_bias)

    def forward(self, pixel_values: torch.Tensor) -> StemOutput:
        feature_map, pyramid = pixel_values, []
        for stage in self.stages:
            feature_map = stage(feature_map)  # (B, C_i, H / 2^i, W / 2^i)
            pyramid.append(feature_map)
        return as_tokens(self.projection(feature_map))._replace(feature_pyramid=tuple(pyramid))


class HybridStem(Stem, nn.Module):
    """The last feature map of any transformers backbone, then a 1x1 projection.

    N = (H / p) * (W / p) tokens, p being the stride of that map; the backbone ends there. With `use_feature_pyramid`
    its last three maps, of strides p / 4, p / 2 and p, are returned as `feature_pyramid`. It starts from random
    weights: load trained ones into `embeddings.patch_embedding.backbone`. Source: arXiv:2010.11929 section 3.1 (hybrid
    architecture); arXiv:2103.13413 section 3.1 (DPT-Hybrid) for the pyramid.
    """

    is_local = False

    def __init__(self, config: VitEmbedConfig):
        super().__init__()
        self.patch_shape = config.patch_shape
        if getattr(config.backbone_config, "num_channels", config.num_channels) != config.num_channels:
            raise ValueError(
                f"backbone_config.num_channels must be num_channels={config.num_channels}, got "
                f"{config.backbone_config.num_channels}"
            )
        try:
            self.backbone = AutoBackbone.from_config(copy.deepcopy(config.backbone_config))
        except ValueError as error:
            raise ValueError(
                "backbone_config must be of a transformers backbone, as ResNetConfig or ConvNextConfig, got "
                f"{type(config.backbone_config).__name__}: {error}"
            ) from error
        num_maps = max(1, len(config.pyramid_widths))
        wanted = list(self.backbone.stage_names[-num_maps:])
        if list(self.backbone.out_features) != wanted:
            raise ValueError(
                f"backbone_config must give {wanted} with use_feature_pyramid={config.use_feature_pyramid}: what is "
                f"computed is read, and the last stage is the map that is wanted; got "
                f"out_features={list(self.backbone.out_features)}; set them so, and make it as deep as that map"
            )
        if config.pyramid_widths and tuple(self.backbone.channels) != config.pyramid_widths:
            raise ValueError(
                f"use_feature_pyramid=True reads maps of hidden_sizes={list(config.pyramid_widths)} channels, but "
                f"the stages {wanted} of {type(self.backbone).__name__} have {list(self.backbone.channels)}; give "
                "hidden_sizes one entry a stage, or use another backbone"
            )
        # ConvNext and Swin have a norm for each map that they give. What reads the finer ones, the depth head, starts
        # with a convolution that scales and shifts them itself; any other head would leave these norms without a
        # gradient, which DistributedDataParallel does not forgive.
        for stage, norm in getattr(self.backbone, "hidden_states_norms", {}).items():
            norm.requires_grad_(stage == wanted[-1])
        self.projection = pointwise(self.backbone.channels[-1], config.hidden_size, config, bias=config.patch_bias)

    def forward(self, pixel_values: torch.Tensor) -> StemOutput:
        maps = tuple(self.backbone(pixel_values).feature_maps)  # (B, C_i, gh * 2^k, gw * 2^k), k = 2, 1, 0; or the last
        rows, columns = (size // step for size, step in zip(pixel_values.shape[2:], self.patch_shape))
        expected = [(rows << k, columns << k) for k in reversed(range(len(maps)))]
        found = [tuple(each.shape[2:]) for each in maps]
        if found != expected:
            raise ValueError(
                f"the last feature map of backbone_config must have a stride of patch_size {self.patch_shape}, and "
                f"those of a pyramid half of the next one's, so {expected} for {tuple(pixel_values.shape[2:])} pixels; "
                f"got {found}; change its out_features, or patch_size"
            )
        return as_tokens(self.projection(maps[-1]))._replace(feature_pyramid=maps if len(maps) > 1 else None)


class AdaptiveStem(Stem, nn.Module):
    """Mixed-scale tokens: each cell of 2 x 2 patches becomes one coarse token or four fine ones.

    fine = conv of patch p, coarse = conv of patch 2p, gate = argmax(MLP(coarse)). Between N / 4 and N tokens an image,
    N = (H / p) * (W / p); H and W are multiples of 2p. A coarse token has the mean position of its four patches and
    counts as four of them in attention and pooling.

    In training the choice is a Gumbel-softmax sample with a straight-through gradient, and a coarse token stays as four
    equal slots: the same numbers as one token that counts as four, in tensors of fixed shape. In evaluation the choice
    is hard and only the chosen tokens are computed; images of a batch keep different counts, the rest is masked
    padding, so a batch costs as much as its fullest image. Compiled or exported, the slots stay in evaluation, too: no
    shape may depend on the data. The budget loss, a mean over image sizes where they are mixed, is
    `adaptive_budget_weight` * (share of tokens that evaluation keeps - `adaptive_budget`) ** 2.

    Source: arXiv:2307.02321 (there with a sigmoid gate, both scales masked, and a batch-shaping loss for the share).
    """

    def __init__(self, config: VitEmbedConfig):
        super().__init__()
        width, patch = config.hidden_size, config.patch_shape
        self.budget, self.budget_weight = config.adaptive_budget, config.adaptive_budget_weight
        self.fine = ConvStem(config)
        coarse = tuple(2 * side for side in patch)
        self.coarse = nn.Conv2d(config.num_channels, width, coarse, stride=coarse, bias=config.patch_bias)
        # Half of a fine weight's, for four times the pixels: coarse and fine tokens start with the same deviation.
        self.coarse.init_std = 0.5 * self.fine.init_std
        hidden = max(2, width // 4)
        self.gate = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 2))

    def forward(self, pixel_values: torch.Tensor) -> StemOutput:
        fine, grid_size = self.fine(pixel_values)[:2]  # (B, N, D)
        coarse = self.coarse(pixel_values).permute(0, 2, 3, 1)  # (B, gh / 2, gw / 2, D)
        logits = self.gate(coarse).float()  # (B, gh / 2, gw / 2, 2): keep fine, take coarse
        if self.training:
            choice = F.gumbel_softmax(logits, hard=True)
        else:
            choice = F.one_hot(logits.argmax(-1), 2).to(logits.dtype)
        is_coarse = repeat_cells(choice[..., 1:])[..., 0]  # (B, N)
        # What evaluation would keep, not what this sample does; its gradient is that of the probabilities.
        probability = logits.softmax(-1)
        certain = F.one_hot(logits.argmax(-1), 2) + probability - probability.detach()
        kept = certain[..., 0].mean() + certain[..., 1].mean() / 4
        gates = repeat_cells(choice).to(fine.dtype)  # (B, N, 2)
        tokens = gates[..., :1] * fine + gates[..., 1:] * repeat_cells(coarse)
        loss = self.budget_weight * (kept - self.budget) ** 2
        return StemOutput(tokens, grid_size, is_coarse=is_coarse, loss=loss)

    def select(self, output: StemOutput, positions: torch.Tensor | None) -> tuple[torch.Tensor, TokenLayout]:
        rows, columns = output.grid_size
        is_coarse = output.is_coarse.detach()
        if positions is not None:
            cells = positions.unflatten(0, (rows // 2, 2, columns // 2, 2)).mean(dim=(1, 3))  # (gh / 2, gw / 2, D)
            # Positions alone are averaged: a mean over the slots would hide from the gate that they want to differ.
            positions = torch.where(is_coarse[..., None] > 0, repeat_cells(cells[None]), positions)  # (B, N, D)
        tokens = placed(output.tokens, positions)
        layout = TokenLayout(output.grid_size)
        if self.training or torch.compiler.is_compiling():  # counts read from the data would break the graph
            return tokens, layout
        row = torch.arange(rows, device=tokens.device)[:, None]
        column = torch.arange(columns, device=tokens.device)
        first_of_cell = (row // 2 * 2 * columns + column // 2 * 2).flatten()  # (N,) top left patch of each patch's cell
        own = torch.arange(rows * columns, device=tokens.device)
        holder = torch.where(is_coarse > 0, first_of_cell, own)  # (B, N) patch whose slot each patch's token is in
        return keep_tokens(tokens, layout, holder == own, sizes=1 + 3 * is_coarse, holder=holder)


def repeat_cells(cells: torch.Tensor) -> torch.Tensor:
    """Gives each patch the value of its 2 x 2 cell: (B, gh / 2, gw / 2, X) -> (B, gh * gw, X)."""
    return cells.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).flatten(1, 2)


class TokenLearnerStem(Stem, nn.Module):
    """K tokens, each a mean over all patches weighted by a learned map of the content.

    token[k] = sum_i softmax_i(MLP(LN(x[i]))[k]) * x[i], x[i] being ConvStem's token at its position; K =
    `num_learned_tokens` tokens for any image size, and no grid behind it.

    Source: arXiv:2106.11297 (in the later form of its reference code: an MLP and a softmax over space).
    """

    def __init__(self, config: VitEmbedConfig):
        super().__init__()
        width = config.hidden_size
        self.patches = ConvStem(config)
        self.maps = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, TOKEN_LEARNER_WIDTH),
            nn.GELU(),
            nn.Linear(TOKEN_LEARNER_WIDTH, config.num_learned_tokens),
        )

    def forward(self, pixel_values: torch.Tensor) -> StemOutput:
        return self.patches(pixel_values)

    def select(self, output: StemOutput, positions: torch.Tensor | None) -> tuple[torch.Tensor, TokenLayout]:
        tokens = placed(output.tokens, positions)
        weights = self.maps(tokens).float().softmax(dim=1).to(tokens.dtype)  # (B, N, K)
        return weights.transpose(1, 2) @ tokens, TokenLayout(None)


def dct_basis(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The orthonormal cosine transform (DCT-II): rows (length, length) in float64, and the frequency of each, 0 to
    1."""
    frequency = torch.arange(length, dtype=torch.float64)
    samples = torch.arange(length, dtype=torch.float64) + 0.5
    basis = torch.cos(math.pi / length * frequency[:, None] * samples) * math.sqrt(2 / length)
    basis[0] /= math.sqrt(2)
    return basis, frequency / length


def haar_basis(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The orthonormal Haar wavelets of a power of two: rows (length, length) in float64, and the level of each, 0 for
    the mean, growing as they get narrower."""
    basis, level = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    while len(basis) < length:
        size = len(basis)
        means = torch.kron(basis, torch.tensor([[1.0, 1.0]], dtype=torch.float64))
        details = torch.kron(torch.eye(size, dtype=torch.float64), torch.tensor([[1.0, -1.0]], dtype=torch.float64))
        basis = torch.cat([means, details]) / math.sqrt(2)
        level = torch.cat([level, (level.max() + 1).expand(size)])
    return basis, level


class SpectralStem(PatchLinear):
    """A linear map of each patch's coefficients in an orthonormal basis: token[i] = weight @ (basis @ patch[i]).

    N = (H / ph) * (W / pw) tokens. The basis acts on each channel alone; of its ph * pw coefficients the
    `num_coefficients` of lowest frequency are kept, the sum of both directions', rows first. With all of them and
    `weight = carried(conv.weight)` it equals ConvStem.
    """

    # Length of an axis -> rows (length, length) of its basis, and the frequency of each.
    axis_basis: Callable[[int], tuple[torch.Tensor, torch.Tensor]]

    def __init__(self, config: VitEmbedConfig):
        num_kept = config.num_coefficients or math.prod(config.patch_shape)
        super().__init__(config, config.num_channels * num_kept)
        self.num_kept = num_kept

    def basis(self, device: torch.device) -> torch.Tensor:
        """(kept coefficients, ph * pw) float32. Computed, not stored: it is no parameter and there are no buffers."""
        (rows, row_frequency), (columns, column_frequency) = (self.axis_basis(side) for side in self.patch_shape)
        # Made whole numbers, so that rounding does not order equal frequencies.
        frequency = ((row_frequency[:, None] + column_frequency) * math.prod(self.patch_shape)).round().flatten()
        lowest = frequency.argsort(stable=True)[: self.num_kept]
        return torch.kron(rows, columns)[lowest].float().to(device)

    def patch_values(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = super().patch_values(pixel_values)
        patches = patches.unflatten(-1, (-1, math.prod(self.patch_shape)))  # (B, N, C, ph * pw)
        basis = self.basis(pixel_values.device).to(pixel_values.dtype)
        return (patches @ basis.t()).flatten(2)

    def carried(self, conv_weight: torch.Tensor) -> torch.Tensor:
        """A convolution's weight (D, C, ph, pw) in this basis: (D, C * kept coefficients)."""
        return (conv_weight.flatten(2).float() @ self.basis(conv_weight.device).t()).flatten(1).to(conv_weight.dtype)


class DctStem(SpectralStem):
    """Cosine transform of each patch before the projection, the DCT-II of JPEG (Ahmed, Natarajan and Rao, 1974)."""

    axis_basis = staticmethod(dct_basis)


class WaveletStem(SpectralStem):
    """Haar wavelets of each patch, at all levels down to its mean, before the projection."""

    axis_basis = staticmethod(haar_basis)


class DeformableStem(PatchLinear):
    """Each patch is sampled from a box that is moved and scaled by what the patch shows, then projected.

    centre' = centre + patch * tanh(o), side' = patch * 2 ** tanh(s), with (o, s) = offsets(patch); ph * pw bilinear
    samples spread over the box replace the pixels. N = (H / ph) * (W / pw) tokens. Zero offsets, the start, equal
    ConvStem.

    Source: arXiv:2107.14467 (where the box is predicted from a feature map, and unbounded).
    """

    is_local = False

    def __init__(self, config: VitEmbedConfig):
        num_values = config.num_channels * math.prod(config.patch_shape)
        super().__init__(config, num_values)
        self.offsets = nn.Linear(num_values, 4)
        self.offsets.init_std = 0.0

    def patch_values(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = super().patch_values(pixel_values)  # (B, N, C * ph * pw)
        points = self.sample_points(self.offsets(patches).float(), tuple(pixel_values.shape[2:]))
        sampled = F.grid_sample(pixel_values.float(), points, padding_mode="border", align_corners=False)
        return super().patch_values(sampled.to(pixel_values.dtype))

    def sample_points(self, raw: torch.Tensor, image_shape: tuple[int, int]) -> torch.Tensor:
        """(B, N, 4) of moves and scales, y before x -> (B, H, W, 2) places of the samples, x before y, in [-1, 1] from
        border to border of the image: what grid_sample takes."""
        move, scale = torch.tanh(raw[..., :2]), 2 ** torch.tanh(raw[..., 2:])  # (B, N, 2) each
        axes = []
        for axis, (size, side) in enumerate(zip(image_shape, self.patch_shape)):
            pixel = torch.arange(size, device=raw.device, dtype=torch.float32)
            within = pixel % side + 0.5 - side / 2  # (size,) pixels from the centre of its patch
            centre = pixel + 0.5 - within
            shape = (-1, 1) if axis == 0 else (1, -1)
            moved, scaled = (self.per_pixel(values[..., axis], image_shape) for values in (move, scale))  # (B, H, W)
            axes.append((centre.view(shape) + side * moved + scaled * within.view(shape)) * (2 / size) - 1)
        return torch.stack(axes[::-1], dim=-1)

    def per_pixel(self, values: torch.Tensor, image_shape: tuple[int, int]) -> torch.Tensor:
        """Gives each pixel the value of its patch: (B, N) -> (B, H, W)."""
        height, width = self.patch_shape
        grid = values.unflatten(1, (image_shape[0] // height, image_shape[1] // width))
        return grid.repeat_interleave(height, dim=1).repeat_interleave(width, dim=2)


STEMS = {
    "conv": ConvStem,
    "linear": LinearStem,
    "overlap": OverlapStem,
    "hierarchical": HierarchicalStem,
    "hybrid": HybridStem,
    "adaptive": AdaptiveStem,
    "token_learner": TokenLearnerStem,
    "dct": DctStem,
    "wavelet": WaveletStem,
    "deformable": DeformableStem,
}
