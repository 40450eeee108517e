"""Stems: pixels -> patch tokens. One class a kind, one table of them, one contract.

Symbols: B batch, C channels, H W image pixels, ph pw patch pixels, gh gw patch rows and columns, N = gh * gw, n tokens
kept, D hidden size. Height comes before width everywhere.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoBackbone

from .configuration_vit_embed import VitEmbedConfig
from .initialisation_vit_embed import fill, linear
from .inputs_vit_embed import is_traced
from .stem_layers_vit_embed import (
    STEM_NORMS,
    PatchConv2d,
    PatchLinear,
    dct_basis,
    haar_basis,
    patch_conv,
    patch_linear,
    patchify,
    pointwise,
    spectral_basis,
    stored_spectral_basis,
    with_stem_norms,
)
from .tokens_vit_embed import KeptPatches, TokenLayout, Tokens, keep_tokens

# Width of the hidden layer that turns patches into the maps of learned tokens, as in the paper's reference code.
TOKEN_LEARNER_WIDTH = 64


class Stem:
    """The contract: what lies at `embeddings.patch_embedding`, and how tokens are read off it.

    A stem that is one layer of torch has that very layer there and calls it as it is called anywhere, tensor in and
    tensor out: adapters, quantisers and hooks find layers by their type. Any other stem is a module of its own, which
    takes pixels and positions. Adding a stem means one such class, a row in STEMS and its name in
    `options_vit_embed.STEM_TYPES`.
    """

    # Whether a token depends on the pixels of its own patch alone.
    is_local = True
    # Whether `read` makes of a patch by itself, as an image of one patch, the token that it makes of it in an image.
    reads_single_patches = False

    @classmethod
    def make(cls, config: VitEmbedConfig) -> nn.Module:
        """The module at `embeddings.patch_embedding`."""
        return cls(config)  # type: ignore[call-arg]

    @classmethod
    def read(
        cls, config: VitEmbedConfig, layer: nn.Module, pixel_values: torch.Tensor, positions: torch.Tensor | None
    ) -> Tokens:
        """What enters the trunk.

        Args:
            layer: what `make` made, or what has taken its place.
            pixel_values: (B, C, H, W), H and W multiples of `config.image_multiple`.
            positions: (N, D) of the patches, or None.

        Returns:
            (B, n, D) at their positions, of the layer's dtype.
        """
        return layer(pixel_values, positions)

    @classmethod
    def read_patch_embeds(cls, layer: nn.Module, patch_embeds: torch.Tensor, positions: torch.Tensor | None) -> Tokens:
        """What enters the trunk of another encoder's features (B, D, gh, gw) in place of the stem's own patches."""
        return read_map(patch_embeds, positions)


def place(tokens: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """Tokens (B, N, D) at their positions (N, D) or (B, N, D), if there are any."""
    return tokens if positions is None else tokens + positions.to(tokens)


def read_map(feature_map: torch.Tensor, positions: torch.Tensor | None) -> Tokens:
    """(B, D, gh, gw) -> its pixels as tokens, row by row, at their positions."""
    return Tokens(place(feature_map.flatten(2).transpose(1, 2), positions), TokenLayout(tuple(feature_map.shape[2:])))


class ConvStem(Stem):
    """CLIP's patch embedding: a convolution with kernel = stride = patch, computed as one matrix product.

    token[i] = weight.flatten(1) @ patch[i] (+ bias); N = (H / ph) * (W / pw) tokens.

    Source: arXiv:2010.11929 equation 1. The parameters are those of the convolution, so CLIP's weight loads as it is.
    """

    reads_single_patches = True

    @classmethod
    def make(cls, config: VitEmbedConfig) -> PatchConv2d:
        return patch_conv(config, config.patch_shape)

    @classmethod
    def read(cls, config, layer, pixel_values, positions) -> Tokens:
        return read_map(layer(pixel_values), positions)


class LinearStem(Stem):
    """ConvStem with its weight stored flat, (D, C * ph * pw), as in the equation of the paper.

    Equal to ConvStem when `weight = conv.weight.flatten(1)`. Source: arXiv:2010.11929 equation 1.
    """

    reads_single_patches = True

    @classmethod
    def make(cls, config: VitEmbedConfig) -> PatchLinear:
        return patch_linear(config, config.num_channels * math.prod(config.patch_shape))

    @classmethod
    def patch_values(cls, config: VitEmbedConfig, pixel_values: torch.Tensor) -> torch.Tensor:
        """What the layer is fed: (B, C, H, W) -> (B, N, values)."""
        return patchify(pixel_values, config.patch_shape)

    @classmethod
    def read(cls, config, layer, pixel_values, positions) -> Tokens:
        grid_size = config.grid_of(tuple(pixel_values.shape[2:]))
        return Tokens(place(layer(cls.patch_values(config, pixel_values)), positions), TokenLayout(grid_size))


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
        self.projection = PatchConv2d(
            config.num_channels,
            width,
            config.patch_kernel_shape,
            stride=config.patch_shape,
            padding=config.patch_padding,
            bias=config.patch_bias,
        )
        self.projection.init_std = config.initializer_range * config.initializer_factor
        self.pointwise = pointwise(width, width, config) if config.patch_pointwise else None

    def forward(self, pixel_values: torch.Tensor, positions: torch.Tensor | None = None) -> Tokens:
        feature_map = self.projection(pixel_values)
        return read_map(feature_map if self.pointwise is None else self.pointwise(feature_map), positions)


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
            nn.Sequential(PatchConv2d(width_in, width, 3, stride=2, padding=1, bias=False), norm(width), nn.GELU())
            for width_in, width in zip(widths, widths[1:])
        )
        self.projection = pointwise(widths[-1], config.hidden_size, config, bias=config.patch_bias)

    def forward(self, pixel_values: torch.Tensor, positions: torch.Tensor | None = None) -> Tokens:
        feature_map, pyramid = pixel_values, []
        for stage in self.stages:
            feature_map = stage(feature_map)  # (B, C_i, H / 2^i, W / 2^i)
            pyramid.append(feature_map)
        return read_map(self.projection(feature_map), positions)._replace(feature_pyramid=tuple(pyramid))


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
            self.backbone = with_stem_norms(AutoBackbone.from_config(copy.deepcopy(config.backbone_config)))
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

    def forward(self, pixel_values: torch.Tensor, positions: torch.Tensor | None = None) -> Tokens:
        pixel_values = pixel_values.to(self.projection.weight.dtype)  # few backbones cast their input
        maps = tuple(self.backbone(pixel_values).feature_maps)  # (B, C_i, gh * 2^k, gw * 2^k), k = 2, 1, 0; or the last
        if not is_traced():
            self._check_strides(tuple(pixel_values.shape[2:]), [tuple(each.shape[2:]) for each in maps])
        return read_map(self.projection(maps[-1]), positions)._replace(feature_pyramid=maps if len(maps) > 1 else None)

    def _check_strides(self, image_shape: tuple[int, int], found: list[tuple[int, int]]) -> None:
        """Raises ValueError for a backbone whose last map is not of one pixel a patch, or whose maps do not double."""
        rows, columns = (size // step for size, step in zip(image_shape, self.patch_shape))
        expected = [(rows << k, columns << k) for k in reversed(range(len(found)))]
        if found != expected:
            raise ValueError(
                f"the last feature map of backbone_config must have a stride of patch_size {self.patch_shape}, and "
                f"those of a pyramid half of the next one's, so {expected} for {image_shape} pixels; "
                f"got {found}; change its out_features, or patch_size"
            )


class AdaptiveStem(Stem, nn.Module):
    """Mixed-scale tokens: each cell of 2 x 2 patches becomes one coarse token or four fine ones.

    fine = conv of patch p, coarse = conv of patch 2p, gate = argmax(MLP(coarse)). Between N / 4 and N tokens an image,
    N = (H / p) * (W / p); H and W are multiples of 2p. A coarse token has the mean position of its four patches and
    counts as four of them in attention and pooling.

    In training the choice is a Gumbel-softmax sample with a straight-through gradient, and a coarse token stays as four
    equal slots: the same numbers as one token that counts as four, in tensors of fixed shape. In evaluation the choice
    is hard and only the chosen tokens are computed; images of a batch keep different counts, the rest is masked
    padding, so a batch costs as much as its fullest image where the layers do not run without it. Compiled or
    exported, the slots stay in evaluation, too: no shape may depend on the data. The budget loss, a mean over image
    sizes where they are mixed, is `adaptive_budget_weight` * (share of tokens that evaluation keeps -
    `adaptive_budget`) ** 2.

    Source: arXiv:2307.02321 (there with a sigmoid gate, both scales masked, and a batch-shaping loss for the share).
    """

    def __init__(self, config: VitEmbedConfig):
        super().__init__()
        width = config.hidden_size
        self.budget, self.budget_weight = config.adaptive_budget, config.adaptive_budget_weight
        self.fine = patch_conv(config, config.patch_shape)
        # Half of a fine weight's deviation, for four times the pixels: coarse and fine tokens start with the same.
        self.coarse = patch_conv(config, tuple(2 * side for side in config.patch_shape), gain=0.5)
        hidden = max(2, width // 4)
        self.gate = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 2))

    def forward(self, pixel_values: torch.Tensor, positions: torch.Tensor | None = None) -> Tokens:
        fine = self.fine(pixel_values)  # (B, D, gh, gw)
        grid_size = tuple(fine.shape[2:])
        fine = fine.flatten(2).transpose(1, 2)  # (B, N, D)
        coarse = self.coarse(pixel_values).permute(0, 2, 3, 1)  # (B, gh / 2, gw / 2, D)
        logits = self.gate(coarse).float()  # (B, gh / 2, gw / 2, 2): keep fine, take coarse
        if self.training:
            choice = F.gumbel_softmax(logits, hard=True)
        else:
            choice = F.one_hot(logits.argmax(-1), 2).to(logits.dtype)
        gates = repeat_cells(choice).to(fine.dtype)  # (B, N, 2)
        tokens = gates[..., :1] * fine + gates[..., 1:] * repeat_cells(coarse)
        is_coarse = repeat_cells(choice[..., 1:])[..., 0].detach()  # (B, N), 1 where a patch shares one token, else 0
        tokens, layout = self.select(tokens, is_coarse, grid_size, positions)
        return Tokens(tokens, layout, loss=self.budget_loss(logits))

    def budget_loss(self, logits: torch.Tensor) -> torch.Tensor:
        """Of what evaluation would keep, not of what this sample does; its gradient is that of the probabilities."""
        probability = logits.softmax(-1)
        certain = F.one_hot(logits.argmax(-1), 2) + probability - probability.detach()
        kept = certain[..., 0].mean() + certain[..., 1].mean() / 4
        return self.budget_weight * (kept - self.budget) ** 2

    def select(
        self,
        tokens: torch.Tensor,
        is_coarse: torch.Tensor,
        grid_size: tuple[int, int],
        positions: torch.Tensor | None,
    ) -> tuple[torch.Tensor, TokenLayout]:
        """A token for each patch (B, N, D), equal in a coarse cell -> those that enter the trunk, at their
        positions."""
        rows, columns = grid_size
        if positions is not None:
            cells = positions.reshape(rows // 2, 2, columns // 2, 2, -1).mean(dim=(1, 3))  # (gh / 2, gw / 2, D)
            # Positions alone are averaged: a mean over the slots would hide from the gate that they want to differ.
            positions = torch.where(is_coarse[..., None] > 0, repeat_cells(cells[None]), positions)  # (B, N, D)
        tokens, layout = place(tokens, positions), TokenLayout(grid_size)
        if self.training or is_traced():  # counts read from the data would break the graph
            return tokens, layout
        row = torch.arange(rows, device=tokens.device)[:, None]
        column = torch.arange(columns, device=tokens.device)
        first_of_cell = (row // 2 * 2 * columns + column // 2 * 2).flatten()  # (N,) top left patch of each patch's cell
        own = torch.arange(rows * columns, device=tokens.device)
        standing_for = torch.where(
            is_coarse > 0, first_of_cell, own
        )  # (B, N) patch whose slot each patch's token is in
        return keep_tokens(
            tokens, layout, KeptPatches(standing_for == own), sizes=1 + 3 * is_coarse, standing_for=standing_for
        )


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
        self.patches = patch_conv(config, config.patch_shape)
        self.maps = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, TOKEN_LEARNER_WIDTH),
            nn.GELU(),
            nn.Linear(TOKEN_LEARNER_WIDTH, config.num_learned_tokens),
        )

    @classmethod
    def read_patch_embeds(cls, layer: nn.Module, patch_embeds: torch.Tensor, positions: torch.Tensor | None) -> Tokens:
        return layer(None, positions, patch_embeds)

    def forward(
        self,
        pixel_values: torch.Tensor | None,
        positions: torch.Tensor | None = None,
        patch_embeds: torch.Tensor | None = None,
    ) -> Tokens:
        patches = self.patches(pixel_values) if patch_embeds is None else patch_embeds
        tokens = place(patches.flatten(2).transpose(1, 2), positions)  # (B, N, D)
        weights = self.maps(tokens).float().softmax(dim=1).to(tokens.dtype)  # (B, N, K)
        learned = weights.transpose(1, 2) @ tokens  # (B, K, D), in half precision under autocast
        return Tokens(learned.to(tokens.dtype), TokenLayout(None))


class SpectralStem(LinearStem):
    """A linear map of each patch's coefficients in an orthonormal basis: token[i] = weight @ (basis @ patch[i]).

    N = (H / ph) * (W / pw) tokens. The basis acts on each channel alone; of its ph * pw coefficients the
    `num_coefficients` of lowest frequency are kept, the sum of both directions', rows first. With all of them and
    `weight = carried(conv.weight)` it equals ConvStem.
    """

    # Length of an axis -> rows of its basis, and the frequency of each.
    axis_basis: Callable[[int], tuple[list[list[float]], list[float]]]

    @classmethod
    def make(cls, config: VitEmbedConfig) -> PatchLinear:
        num_kept = config.num_coefficients or math.prod(config.patch_shape)
        return patch_linear(config, config.num_channels * num_kept)

    @classmethod
    def basis(cls, config: VitEmbedConfig, like: torch.Tensor) -> torch.Tensor:
        """(kept coefficients, ph * pw), of the dtype and on the device of `like`."""
        num_kept = config.num_coefficients or math.prod(config.patch_shape)
        key = (cls.axis_basis, config.patch_shape, num_kept, like.dtype, like.device)
        # Beside tensors that have no values the basis must have none either.
        return stored_spectral_basis(*key) if type(like) is torch.Tensor else spectral_basis(*key)

    @classmethod
    def patch_values(cls, config: VitEmbedConfig, pixel_values: torch.Tensor) -> torch.Tensor:
        # A half precision basis would cost more digits than half precision pixels do.
        pixel_values = pixel_values.to(torch.promote_types(pixel_values.dtype, torch.float32))
        patches = super().patch_values(config, pixel_values)
        patches = patches.unflatten(-1, (-1, math.prod(config.patch_shape)))  # (B, N, C, ph * pw)
        return (patches @ cls.basis(config, patches).t()).flatten(2)

    @classmethod
    def carried(cls, config: VitEmbedConfig, conv_weight: torch.Tensor) -> torch.Tensor:
        """A convolution's weight (D, C, ph, pw) in this basis: (D, C * kept coefficients)."""
        weight = conv_weight.detach().flatten(2).float()
        return (weight @ cls.basis(config, weight).t()).flatten(1).to(conv_weight.dtype)


class DctStem(SpectralStem):
    """Cosine transform of each patch before the projection, the DCT-II of JPEG (Ahmed, Natarajan and Rao, 1974)."""

    axis_basis = staticmethod(dct_basis)


class WaveletStem(SpectralStem):
    """Haar wavelets of each patch, at all levels down to its mean, before the projection."""

    axis_basis = staticmethod(haar_basis)


class DeformableStem(Stem, nn.Module):
    """Each patch is sampled from a box that is moved and scaled by what the patch shows, then projected.

    centre' = centre + patch * tanh(o), side' = patch * 2 ** tanh(s), with (o, s) = offsets(patch); ph * pw bilinear
    samples spread over the box replace the pixels. N = (H / ph) * (W / pw) tokens. Zero offsets, the start, equal
    ConvStem.

    Source: arXiv:2107.14467 (where the box is predicted from a feature map, and unbounded).
    """

    is_local = False

    def __init__(self, config: VitEmbedConfig):
        super().__init__()
        self.patch_shape = config.patch_shape
        num_values = config.num_channels * math.prod(config.patch_shape)
        self.weight = nn.Parameter(torch.empty(config.hidden_size, num_values))
        self.bias = nn.Parameter(torch.empty(config.hidden_size)) if config.patch_bias else None
        self.offsets = linear(num_values, 4, 0.0)

    def init_parameters(self, config: VitEmbedConfig) -> None:
        fill(self.weight, nn.init.normal_, std=config.initializer_range * config.initializer_factor)
        fill(self.bias, nn.init.zeros_)

    def patch_values(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, N, C * ph * pw), the samples in place of the pixels."""
        patches = patchify(pixel_values, self.patch_shape)
        points = self.sample_points(self.offsets(patches).float(), tuple(pixel_values.shape[2:]))
        sampled = F.grid_sample(pixel_values.float(), points, padding_mode="border", align_corners=False)
        return patchify(sampled.to(pixel_values.dtype), self.patch_shape)

    def forward(self, pixel_values: torch.Tensor, positions: torch.Tensor | None = None) -> Tokens:
        grid_size = tuple(size // step for size, step in zip(pixel_values.shape[2:], self.patch_shape))
        values = self.patch_values(pixel_values.to(self.weight.dtype))
        tokens = F.linear(values, self.weight, self.bias).to(self.weight.dtype)
        return Tokens(place(tokens, positions), TokenLayout(grid_size))

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


STEMS: dict[str, Any] = {
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
