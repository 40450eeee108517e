"""Pixels or token ids -> (B, L, D): stems, positions, prefix tokens.

Symbols: B batch, C channels, H W image pixels, ph pw patch pixels, gh gw patch rows and columns, N = gh * gw,
P prefix tokens, L = P + N, D hidden size. Height comes before width everywhere.
"""

import math

import torch
from torch import nn

from .configuration_vit_embed import (
    VitEmbedConfig,
    VitEmbedTextConfig,
)

INTERPOLATION_OPTIONS = {
    "bicubic": {"mode": "bicubic", "antialias": False},
    "bicubic_antialias": {"mode": "bicubic", "antialias": True},
    "bilinear": {"mode": "bilinear", "antialias": False},
}


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


class ConvStem(nn.Conv2d):
    """CLIP's patch embedding: a convolution with kernel = stride = patch, computed as one matrix product.

    token[i] = weight.flatten(1) @ patch[i] (+ bias); N = (H / ph) * (W / pw) tokens.

    Source: arXiv:2010.11929 equation 1. The parameters are those of the convolution, so CLIP's weight loads as it is.
    """

    def __init__(self, config: VitEmbedConfig):
        patch = config.patch_shape
        super().__init__(config.num_channels, config.hidden_size, patch, stride=patch, bias=config.patch_bias)
        self.init_std = config.initializer_range * config.initializer_factor

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """(B, C, H, W) -> (B, N, D), (gh, gw)."""
        tokens = nn.functional.linear(patchify(pixel_values, self.kernel_size), self.weight.flatten(1), self.bias)
        return tokens, (pixel_values.shape[2] // self.kernel_size[0], pixel_values.shape[3] // self.kernel_size[1])


class LinearStem(nn.Linear):
    """The same map with its weight stored flat, (D, C * ph * pw), as in the equation of the paper.

    Equal to ConvStem when `weight = conv.weight.flatten(1)`. Source: arXiv:2010.11929 equation 1.
    """

    def __init__(self, config: VitEmbedConfig):
        patch_values = config.num_channels * math.prod(config.patch_shape)
        super().__init__(patch_values, config.hidden_size, bias=config.patch_bias)
        self.patch_shape = config.patch_shape
        self.init_std = config.initializer_range * config.initializer_factor

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """(B, C, H, W) -> (B, N, D), (gh, gw)."""
        tokens = super().forward(patchify(pixel_values, self.patch_shape))
        return tokens, (pixel_values.shape[2] // self.patch_shape[0], pixel_values.shape[3] // self.patch_shape[1])


# A stem is a module made from the config: (B, C, H, W) -> tokens (B, N, D), grid (gh, gw). Its parameters live under
# `embeddings.patch_embedding`. The names are `configuration_vit_embed.STEM_TYPES`.
STEMS = {"conv": ConvStem, "linear": LinearStem}


def interpolate_positions(
    table: torch.Tensor, from_grid: tuple[int, int], to_grid: tuple[int, int], interpolation: str
) -> torch.Tensor:
    """Resamples a table of patch positions to another grid.

    Args:
        table: (gh * gw, D) of `from_grid`, any float dtype.
        from_grid, to_grid: (gh, gw).
        interpolation: a key of INTERPOLATION_OPTIONS.

    Returns:
        (gh * gw, D) of `to_grid` in the dtype of `table`, computed in float32; `table` itself for an equal grid.

    Source: "bicubic" is transformers' CLIP with `interpolate_pos_encoding=True` (which computes in the table's dtype),
    "bicubic_antialias" is `timm.layers.resample_abs_pos_embed`.
    """
    if from_grid == to_grid:
        return table
    grid = table.float().reshape(1, *from_grid, -1).permute(0, 3, 1, 2)  # (1, D, gh, gw)
    options = INTERPOLATION_OPTIONS[interpolation]
    grid = nn.functional.interpolate(grid, size=to_grid, align_corners=False, **options)
    return grid.permute(0, 2, 3, 1).reshape(to_grid[0] * to_grid[1], -1).to(table.dtype)


def sinusoidal_positions(grid_size: tuple[int, int], hidden_size: int, device: torch.device) -> torch.Tensor:
    """Fixed 2-D positions: sine and cosine of the row in the first half of the channels, of the column in the second.

    Args:
        grid_size: (gh, gw).
        hidden_size: D, a multiple of 4.
        device: where the result is made.

    Returns:
        (gh * gw, D) float32; frequencies 10000 ** (-4k / D).

    Source: arXiv:1706.03762 section 3.5, applied to each axis as in MAE (arXiv:2111.06377).
    """
    quarter = hidden_size // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
    rows, columns = grid_size
    row_angles = torch.arange(rows, dtype=torch.float32, device=device)[:, None] * frequencies  # (gh, D / 4)
    column_angles = torch.arange(columns, dtype=torch.float32, device=device)[:, None] * frequencies  # (gw, D / 4)
    row_part = torch.cat([row_angles.sin(), row_angles.cos()], dim=-1)  # (gh, D / 2)
    column_part = torch.cat([column_angles.sin(), column_angles.cos()], dim=-1)  # (gw, D / 2)
    row_part = row_part[:, None, :].expand(rows, columns, -1)
    column_part = column_part[None, :, :].expand(rows, columns, -1)
    return torch.cat([row_part, column_part], dim=-1).reshape(rows * columns, hidden_size)


class VitEmbedEmbeddings(nn.Module):
    """An image, or another encoder's patch features, -> the tokens that enter the encoder.

    Order: [class token][registers][patches row by row]. A learned table gives the class token and each patch a
    position; registers have none.
    """

    def __init__(self, config: VitEmbedConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.class_embedding = nn.Parameter(torch.zeros(width)) if config.use_cls_token else None
        self.patch_embedding = STEMS[config.stem_type](config)
        self.register_tokens = (
            nn.Parameter(torch.zeros(config.num_register_tokens, width)) if config.num_register_tokens else None
        )
        self.position_embedding = None
        if config.position_embedding_type == "learned":
            self.position_embedding = nn.Embedding(int(config.use_cls_token) + math.prod(config.grid_size), width)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, pixel_values: torch.Tensor | None, patch_embeds: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        """
        Args:
            pixel_values: (B, C, H, W), H and W multiples of the patch; cast to the dtype of the weights.
            patch_embeds: (B, D, gh, gw) to take in place of the stem's output.

        Returns:
            tokens (B, P + gh * gw, D) and (gh, gw).

        Raises:
            ValueError: not exactly one input given, or an input of the wrong shape.
        """
        if (pixel_values is None) == (patch_embeds is None):
            got = "neither" if pixel_values is None else "both"
            raise ValueError(f"give exactly one of pixel_values and patch_embeds, got {got}")
        if patch_embeds is not None:
            tokens, grid_size = self._tokens_of(patch_embeds)
        else:
            self._check_pixel_values(pixel_values)
            tokens, grid_size = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        class_position, patch_positions = self.positions(grid_size, tokens)
        if patch_positions is not None:
            tokens = tokens + patch_positions  # (B, N, D)
        return self.dropout(self._with_prefix(tokens, class_position)), grid_size

    def positions(
        self, grid_size: tuple[int, int], like: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The positions of the class token (1, D) or None, and of the patches (N, D) or None.

        Args:
            grid_size: (gh, gw).
            like: a tensor whose device and dtype computed positions take.
        """
        if self.config.position_embedding_type == "none":
            return None, None
        if self.config.position_embedding_type == "sinusoidal":
            return None, sinusoidal_positions(grid_size, self.config.hidden_size, like.device).to(like.dtype)
        num_class_positions = int(self.config.use_cls_token)
        table = self.position_embedding.weight
        patch_table = interpolate_positions(
            table[num_class_positions:], self.config.grid_size, grid_size, self.config.position_interpolation
        )
        return (table[:1] if num_class_positions else None), patch_table

    def resize_positions(self, grid_size: tuple[int, int]) -> None:
        """Replaces the learned table, if there is one, by itself resampled to `grid_size` (gh, gw)."""
        if self.position_embedding is None:
            return
        with torch.no_grad():
            class_position, patch_positions = self.positions(grid_size, self.position_embedding.weight)
            table = patch_positions if class_position is None else torch.cat([class_position, patch_positions])
        old = self.position_embedding
        self.position_embedding = nn.Embedding.from_pretrained(table.clone(), freeze=not old.weight.requires_grad)
        self.position_embedding.train(old.training)

    def _with_prefix(self, tokens: torch.Tensor, class_position: torch.Tensor | None) -> torch.Tensor:
        """(B, N, D) -> (B, P + N, D)."""
        prefix = []
        if self.class_embedding is not None:
            class_token = self.class_embedding[None]  # (1, D)
            prefix.append(class_token if class_position is None else class_token + class_position)
        if self.register_tokens is not None:
            prefix.append(self.register_tokens)
        if not prefix:
            return tokens
        prefix = torch.cat(prefix).to(tokens.dtype).expand(tokens.shape[0], -1, -1)  # (B, P, D)
        return torch.cat([prefix, tokens], dim=1)

    def _tokens_of(self, patch_embeds: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        width = self.config.hidden_size
        if patch_embeds.dim() != 4 or patch_embeds.shape[1] != width:
            raise ValueError(
                f"patch_embeds must be (batch, hidden_size={width}, grid rows, grid columns), got "
                f"{tuple(patch_embeds.shape)}"
            )
        tokens = patch_embeds.flatten(2).transpose(1, 2)  # (B, N, D)
        return tokens.to(self.patch_embedding.weight.dtype), tuple(patch_embeds.shape[2:])

    def _check_pixel_values(self, pixel_values: torch.Tensor) -> None:
        channels = self.config.num_channels
        if pixel_values.dim() != 4 or pixel_values.shape[1] != channels or not pixel_values.shape[0]:
            raise ValueError(
                f"pixel_values must be (batch, num_channels={channels}, height, width), got "
                f"{tuple(pixel_values.shape)}; convert the images to {channels} channels in the image processor"
            )
        height, width = pixel_values.shape[2:]
        patch_height, patch_width = self.config.patch_shape
        if height % patch_height or width % patch_width or not height or not width:
            raise ValueError(
                f"image height and width must be multiples of patch_size ({patch_height}, {patch_width}), got "
                f"({height}, {width}); resize or crop in the image processor"
            )


class VitEmbedTextEmbeddings(nn.Module):
    """Token ids (B, T) -> (B, T, D): a token table plus a learned position for each place."""

    def __init__(self, config: VitEmbedTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, T) integer ids -> (B, T, D)."""
        return self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]
