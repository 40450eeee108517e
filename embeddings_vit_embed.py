"""Pixels or token ids -> (B, L, D): positions, prefix tokens, and what is left of the patches.

Symbols: B batch, C channels, H W image pixels, gh gw patch rows and columns, N = gh * gw patches, n tokens for them,
P prefix tokens, L = P + n, D hidden size. Height comes before width everywhere.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_vit_embed import (
    GRIDLESS_STEMS,
    VitEmbedConfig,
    VitEmbedTextConfig,
)
from .stems_vit_embed import (
    STEMS,
    StemOutput,
    as_tokens,
)
from .tokens_vit_embed import (
    TokenLayout,
    keep_tokens,
    random_kept,
)

INTERPOLATION_OPTIONS = {
    "bicubic": {"mode": "bicubic", "antialias": False},
    "bicubic_antialias": {"mode": "bicubic", "antialias": True},
    "bilinear": {"mode": "bilinear", "antialias": False},
}


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


def sinusoidal_positions(
    grid_size: tuple[int, int], hidden_size: int, device: torch.device | None = None
) -> torch.Tensor:
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


def polynomial_basis(grid_size: tuple[int, int], degree: int, device: torch.device) -> torch.Tensor:
    """All products T_a(y) T_b(x), a and b up to `degree`, at the centres of the patches; T are Chebyshev's polynomials.

    They span all polynomials of that degree in each coordinate and, unlike plain powers, stay in [-1, 1] and apart.

    Args:
        grid_size: (gh, gw); the image reaches from -1 to 1 in both directions.

    Returns:
        (gh * gw, (degree + 1) ** 2) float32.
    """
    axes = []
    for count in grid_size:
        centre = (2 * torch.arange(count, dtype=torch.float32, device=device) + 1) / count - 1
        powers = torch.arange(degree + 1, dtype=torch.float32, device=device)
        axes.append(torch.cos(powers * torch.acos(centre)[:, None]))  # (count, degree + 1): T_k(t) = cos(k acos t)
    return torch.einsum("ya,xb->yxab", *axes).flatten(2).flatten(0, 1)


class LearnedPositions(nn.Embedding):
    """CLIP's table: a position for the class token, if there is one, and for each patch of the native grid."""

    def __init__(self, config: VitEmbedConfig):
        num_class_positions = int(config.use_cls_token)
        super().__init__(num_class_positions + math.prod(config.grid_size), config.hidden_size)
        self.num_class_positions = num_class_positions
        self.grid_size = config.grid_size
        self.interpolation = config.position_interpolation

    def forward(
        self, grid_size: tuple[int, int], device: torch.device | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        patches = self.weight[self.num_class_positions :]
        patches = interpolate_positions(patches, self.grid_size, grid_size, self.interpolation)
        return (self.weight[:1] if self.num_class_positions else None), patches

    def resize(self, grid_size: tuple[int, int]) -> None:
        """Replaces the table by itself resampled to `grid_size` (gh, gw), which becomes the native one."""
        with torch.no_grad():
            class_position, patches = self(grid_size)
            table = patches if class_position is None else torch.cat([class_position, patches])
        self.weight = nn.Parameter(table.clone(), requires_grad=self.weight.requires_grad)
        self.num_embeddings, self.grid_size = len(table), grid_size


class SinusoidalPositions(nn.Module):
    """`sinusoidal_positions`, computed at every call: no parameters, no buffers."""

    def __init__(self, config: VitEmbedConfig):
        super().__init__()
        self.hidden_size = config.hidden_size

    def forward(self, grid_size: tuple[int, int], device: torch.device | None = None) -> tuple[None, torch.Tensor]:
        return None, sinusoidal_positions(grid_size, self.hidden_size, device)


class PolynomialPositions(nn.Embedding):
    """A learned polynomial of the patch centre's coordinates: continuous, so any grid is read off without resampling.

    position(y, x) = sum over a, b <= degree of weight[a, b] * T_a(y) * T_b(x), y and x in [-1, 1] over the image.
    """

    def __init__(self, config: VitEmbedConfig):
        super().__init__((config.position_degree + 1) ** 2, config.hidden_size)
        self.degree = config.position_degree

    def forward(self, grid_size: tuple[int, int], device: torch.device | None = None) -> tuple[None, torch.Tensor]:
        basis = polynomial_basis(grid_size, self.degree, self.weight.device)
        return None, (basis @ self.weight.float()).to(self.weight.dtype)


# A position scheme is a module made from the config: (gh, gw) and the device to compute on -> the class token's
# position (1, D) or None, and the patches' (N, D). The names are `configuration_vit_embed.POSITION_EMBEDDING_TYPES`.
POSITIONS = {
    "learned": LearnedPositions,
    "sinusoidal": SinusoidalPositions,
    "polynomial": PolynomialPositions,
    "none": lambda config: None,
}


class EmbeddedImages(NamedTuple):
    """What enters the encoder.

    tokens: (B, P + n, D). layout: what the n tokens stand for. feature_pyramid, loss: the stem's, as in StemOutput.
    """

    tokens: torch.Tensor
    layout: TokenLayout
    feature_pyramid: tuple[torch.Tensor, ...] | None
    loss: torch.Tensor | None


class VitEmbedEmbeddings(nn.Module):
    """An image, or another encoder's patch features, -> the tokens that enter the encoder.

    Order: [class token][registers][patches row by row, or what the stem selects of them].
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
        self.position_embedding = POSITIONS[config.position_embedding_type](config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        pixel_values: torch.Tensor | None,
        patch_embeds: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        kept: torch.Tensor | None = None,
        num_kept: int | None = None,
    ) -> EmbeddedImages:
        """
        Args:
            pixel_values: (B, C, H, W), H and W multiples of the patch, or any with `pad_to_patch`; cast to the dtype of
                the weights.
            patch_embeds: (B, D, gh, gw) to take in place of the stem's output.
            pixel_mask: (B, H, W), 1 for pixels of the image and 0 for padding right of it and below; None for no
                padding.
            kept: (B, N) bool, the patches to go on with; None for all, less `patch_drop_rate` in training.
            num_kept: how many each row of `kept` has, where all have as many.

        Raises:
            ValueError: not exactly one of pixel_values and patch_embeds, or an input of the wrong shape.
        """
        if (pixel_values is None) == (patch_embeds is None):
            got = "neither" if pixel_values is None else "both"
            raise ValueError(f"give exactly one of pixel_values and patch_embeds, got {got}")
        if patch_embeds is not None and pixel_mask is not None:
            raise ValueError("pixel_mask says which pixels are padding, but patch_embeds have no pixels; leave it out")
        if patch_embeds is not None:
            stem_output = self._read_patch_embeds(patch_embeds)
        else:
            self.check_pixel_values(pixel_values)
            if pixel_mask is not None:
                return self._read_mixed_sizes(pixel_values, image_sizes(pixel_mask, pixel_values))
            stem_output = self._read_pixels(pixel_values)
        return self._embed(stem_output, kept, num_kept)

    def _embed(
        self, stem_output: StemOutput, kept: torch.Tensor | None = None, num_kept: int | None = None
    ) -> EmbeddedImages:
        """Adds positions, selects tokens, puts the prefix before them."""
        # Autocast gives a stem's tokens in half precision; the residual stream has the precision of the weights.
        stem_output = stem_output._replace(tokens=stem_output.tokens.to(self._dtype))
        class_position = positions = None
        if self.position_embedding is not None:
            device = stem_output.tokens.device
            class_position, positions = self.position_embedding(stem_output.grid_size, device)  # (1, D) or None, (N, D)
            positions = positions.to(self._dtype)
        tokens, layout = self.patch_embedding.select(stem_output, positions)  # (B, n, D)
        if kept is None and self.training and self.config.patch_drop_rate:
            kept, num_kept = random_kept(*tokens.shape[:2], self.config.patch_drop_rate, tokens.device)
        if kept is not None:
            tokens, layout = keep_tokens(tokens, layout, kept, num_kept)
        tokens = self.dropout(self._with_prefix(tokens.to(self._dtype), class_position))
        return EmbeddedImages(tokens, layout, stem_output.feature_pyramid, stem_output.loss)

    def _read_pixels(self, pixel_values: torch.Tensor) -> StemOutput:
        """(B, C, H, W) -> the stem's output, after padding where the config asks for it."""
        height, width = pixel_values.shape[2:]
        padded_height, padded_width = self.config.padded_shape((height, width))
        if (padded_height, padded_width) != (height, width):
            pixel_values = F.pad(pixel_values, (0, padded_width - width, 0, padded_height - height))
        return self.patch_embedding(pixel_values.to(self._dtype))

    def _read_mixed_sizes(self, pixel_values: torch.Tensor, sizes: list[tuple[int, int]]) -> EmbeddedImages:
        """Embeds images of one size at a time, each as if it were alone, and joins them."""
        self._check_sizes(sizes)
        parts = []
        for height, width in sorted(set(sizes)):
            members = [i for i, size in enumerate(sizes) if size == (height, width)]
            parts.append((members, self._embed(self._read_pixels(pixel_values[members, :, :height, :width]))))
        has_grid = self.config.stem_type not in GRIDLESS_STEMS
        grid_size = self.config.grid_of(tuple(pixel_values.shape[2:])) if has_grid else None
        return join_sizes(parts, len(sizes), grid_size, self.config.num_prefix_tokens)

    def _with_prefix(self, tokens: torch.Tensor, class_position: torch.Tensor | None) -> torch.Tensor:
        """(B, n, D) -> (B, P + n, D)."""
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

    def _read_patch_embeds(self, patch_embeds: torch.Tensor) -> StemOutput:
        width, stem_type = self.config.hidden_size, self.config.stem_type
        if stem_type == "adaptive":
            raise ValueError(
                "patch_embeds take the place of the stem, but stem_type='adaptive' has to see pixels to choose its "
                "tokens; use another stem_type, or pixel_values"
            )
        if patch_embeds.dim() != 4 or patch_embeds.shape[1] != width or 0 in patch_embeds.shape:
            raise ValueError(
                f"patch_embeds must be (batch, hidden_size={width}, grid rows, grid columns), got "
                f"{tuple(patch_embeds.shape)}"
            )
        return as_tokens(patch_embeds.to(self._dtype))

    @property
    def _dtype(self) -> torch.dtype:
        """What pixels are cast to: the dtype of the stem's weights."""
        return next(self.patch_embedding.parameters()).dtype

    def check_pixel_values(self, pixel_values: torch.Tensor) -> None:
        """Raises ValueError unless they are (B, C, H, W) of whole patches."""
        channels = self.config.num_channels
        if pixel_values.dim() != 4 or pixel_values.shape[1] != channels or not pixel_values.shape[0]:
            raise ValueError(
                f"pixel_values must be (batch, num_channels={channels}, height, width), got "
                f"{tuple(pixel_values.shape)}; convert the images to {channels} channels in the image processor"
            )
        self._check_sizes([tuple(pixel_values.shape[2:])])

    def _check_sizes(self, sizes: list[tuple[int, int]]) -> None:
        """Raises ValueError for an image (height, width) that is not cut into whole patches."""
        unit = self.config.image_multiple
        for height, width in sizes:
            remainder = height % unit[0] or width % unit[1]
            if min(height, width) < 1 or (remainder and not self.config.pad_to_patch):
                twice = "twice " if unit != self.config.patch_shape else ""
                raise ValueError(
                    f"image height and width must be multiples of {twice}patch_size {unit}, got ({height}, {width}); "
                    "resize or crop in the image processor, or set pad_to_patch=True"
                )
            if min(self.config.grid_of((height, width))) < 1:
                raise ValueError(
                    f"an image must hold the kernel, patch_kernel_size={self.config.patch_kernel_shape}, got "
                    f"({height}, {width}) pixels; enlarge it in the image processor"
                )


def join_sizes(
    parts: list[tuple[list[int], EmbeddedImages]], batch: int, grid_size: tuple[int, int] | None, num_prefix_tokens: int
) -> EmbeddedImages:
    """Joins images that were embedded apart into one batch, whose rows of tokens are padded to the longest.

    Args:
        parts: numbers of images in the batch, and what was made of them.
        batch: B.
        grid_size: (gh, gw) that holds the grid of every image at its top left, or None for tokens without a grid.
        num_prefix_tokens: P.
    """
    first = parts[0][1].tokens
    length = max(part.tokens.shape[1] for _, part in parts)
    tokens = first.new_zeros(batch, length, first.shape[2])
    if grid_size is None:  # as many tokens for every image
        for members, part in parts:
            tokens[members] = part.tokens
        return EmbeddedImages(tokens, TokenLayout(None), None, None)
    sizes = torch.zeros(batch, length - num_prefix_tokens, device=first.device)
    of_patch = torch.full((batch, *grid_size), -1, device=first.device)
    losses = []
    for members, (part_tokens, layout, _, loss) in parts:
        rows, columns = layout.grid_size
        num_tokens = part_tokens.shape[1] - num_prefix_tokens
        tokens[members, : part_tokens.shape[1]] = part_tokens
        sizes[members, :num_tokens] = 1.0 if layout.sizes is None else layout.sizes.to(sizes.dtype)
        place = layout.token_of_patch
        place = torch.arange(num_tokens, device=first.device)[None] if place is None else place
        of_patch[members, :rows, :columns] = place.unflatten(1, (rows, columns))
        if loss is not None:
            losses.append(loss * len(members) / batch)
    return EmbeddedImages(
        tokens, TokenLayout(grid_size, sizes, of_patch.flatten(1)), None, sum(losses) if losses else None
    )


def image_sizes(pixel_mask: torch.Tensor, pixel_values: torch.Tensor) -> list[tuple[int, int]]:
    """(height, width) in pixels of each image of a padded batch.

    Args:
        pixel_mask: (B, H, W), 1 for pixels of the image, which lie in the top left corner, and 0 for padding.
        pixel_values: (B, C, H, W) that it belongs to.

    Raises:
        ValueError: another shape, or an image that is no rectangle in the top left corner.
    """
    expected = (pixel_values.shape[0], *pixel_values.shape[2:])
    if tuple(pixel_mask.shape) != expected:
        raise ValueError(f"pixel_mask must be (batch, height, width) = {expected}, got {tuple(pixel_mask.shape)}")
    mask = pixel_mask.bool()
    heights, widths = mask[:, :, 0].sum(dim=1), mask[:, 0].sum(dim=1)
    rows = torch.arange(mask.shape[1], device=mask.device)[:, None] < heights[:, None, None]
    columns = torch.arange(mask.shape[2], device=mask.device) < widths[:, None, None]
    wrong = (mask != (rows & columns)).flatten(1).any(dim=1)
    if wrong.any():
        raise ValueError(
            "pixel_mask must be 1 in a rectangle in the top left corner and 0 elsewhere, image "
            f"{int(wrong.int().argmax())} is not; pad images on the right and at the bottom"
        )
    return list(zip(heights.tolist(), widths.tolist()))


class VitEmbedTextEmbeddings(nn.Module):
    """Token ids (B, T) -> (B, T, D): a token table plus a learned position for each place."""

    def __init__(self, config: VitEmbedTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, T) integer ids -> (B, T, D)."""
        return self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]
