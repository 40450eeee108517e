"""Pixels or token ids -> (B, L, D): positions, prefix tokens, and what is left of the patches.

Symbols: B batch, C channels, H W image pixels, gh gw patch rows and columns, N = gh * gw patches, n tokens for them,
P prefix tokens, L = P + n, D hidden size. Height comes before width everywhere.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_vit_embed import VitEmbedConfig, VitEmbedTextConfig
from .initialisation_vit_embed import fill
from .inputs_vit_embed import check_image_sizes, image_sizes, is_exported, is_traced
from .options_vit_embed import GRIDLESS_STEMS
from .stems_vit_embed import STEMS, place
from .tokens_vit_embed import KeptPatches, TokenLayout, Tokens, keep_tokens, random_kept

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
        (gh * gw, D) of `to_grid` in the dtype of `table`, computed in float32; `table` itself for an equal grid. An
        exported graph resamples to an equal grid, too, which leaves the numbers as they are.

    Source: "bicubic" is transformers' CLIP with `interpolate_pos_encoding=True` (which computes in the table's dtype),
    "bicubic_antialias" is `timm.layers.resample_abs_pos_embed`.
    """
    if not is_exported() and from_grid == to_grid:
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


def learned_positions(
    config: VitEmbedConfig, layer: nn.Embedding, from_grid: tuple[int, int], to_grid: tuple[int, int], device
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """CLIP's table: a position for the class token, if there is one, and for each patch of `from_grid`, resampled."""
    num_class_positions = int(config.use_cls_token)
    numbers = torch.arange(num_class_positions + math.prod(from_grid), device=device)
    table = layer(numbers).to(device)
    patches = interpolate_positions(table[num_class_positions:], from_grid, to_grid, config.position_interpolation)
    return (table[:1] if num_class_positions else None), patches


def polynomial_positions(
    config: VitEmbedConfig, layer: nn.Embedding, from_grid: tuple[int, int], to_grid: tuple[int, int], device
) -> tuple[None, torch.Tensor]:
    """A learned polynomial of the patch centre's coordinates: continuous, so any grid is read off without resampling.

    position(y, x) = sum over a, b <= degree of weight[a, b] * T_a(y) * T_b(x), y and x in [-1, 1] over the image.
    """
    coefficients = layer(torch.arange((config.position_degree + 1) ** 2, device=device)).to(device)
    basis = polynomial_basis(to_grid, config.position_degree, device)
    return None, (basis @ coefficients.float()).to(coefficients.dtype)


# A position scheme: config, its layer, (gh, gw) of the native grid and of the grid asked for, and the device to compute
# on -> the class token's position (1, D) or None, and the patches' (N, D) or None.
# The names are `options_vit_embed.POSITION_EMBEDDING_TYPES`.
POSITIONS = {
    "learned": learned_positions,
    "sinusoidal": lambda config, layer, from_grid, to_grid, device: (
        None,
        sinusoidal_positions(to_grid, config.hidden_size, device),
    ),
    "polynomial": polynomial_positions,
    "none": lambda config, layer, from_grid, to_grid, device: (None, None),
}
# How many rows of D the layer of a scheme has; none without a layer.
NUM_POSITIONS = {
    "learned": lambda config: int(config.use_cls_token) + math.prod(config.grid_size),
    "polynomial": lambda config: (config.position_degree + 1) ** 2,
}


def in_whole_patches(config: VitEmbedConfig, pixel_values: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) with zeros on the right and at the bottom, up to whole patches where the config asks for it."""
    height, width = pixel_values.shape[2:]
    padded_height, padded_width = config.padded_shape((height, width))
    padding = (0, padded_width - width, 0, padded_height - height)
    if not config.pad_to_patch or not (is_traced() or any(padding)):
        return pixel_values
    return F.pad(pixel_values, padding)


class VitEmbedEmbeddings(nn.Module):
    """An image, or another encoder's patch features, -> the tokens that enter the encoder.

    Order: [class token][registers][patches row by row, or what the stem selects of them].
    """

    def __init__(self, config: VitEmbedConfig):
        super().__init__()
        self.config = config
        width, scheme = config.hidden_size, config.position_embedding_type
        self.class_embedding = nn.Parameter(torch.zeros(width)) if config.use_cls_token else None
        self.patch_embedding = STEMS[config.stem_type].make(config)
        self.register_tokens = (
            nn.Parameter(torch.zeros(config.num_register_tokens, width)) if config.num_register_tokens else None
        )
        self.position_embedding = (
            nn.Embedding(NUM_POSITIONS[scheme](config), width) if scheme in NUM_POSITIONS else None
        )
        self.native_grid = config.grid_size  # (gh, gw) of a learned table
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def init_parameters(self, config: VitEmbedConfig) -> None:
        fill(self.class_embedding, nn.init.normal_, std=config.hidden_size**-0.5 * config.initializer_factor)
        fill(self.register_tokens, nn.init.normal_, std=config.initializer_range * config.initializer_factor)

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        patch_embeds: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        kept: KeptPatches | None = None,
    ) -> Tokens:
        """
        Args:
            pixel_values: (B, C, H, W), H and W multiples of the patch, or any with `pad_to_patch`; cast to the dtype of
                the stem.
            patch_embeds: (B, D, gh, gw) to take in place of the stem's output; cast to the dtype of prefix or
                positions.
            pixel_mask: (B, H, W), 1 for pixels of the image and 0 for padding right of it and below; None for no
                padding.
            kept: the patches to go on with; None for all, less `patch_drop_rate` in training.

        Returns:
            (B, P + n, D).
        """
        if pixel_mask is not None:
            sizes = image_sizes(pixel_mask, pixel_values)
            check_image_sizes(self.config, sizes)
            drops = self.training and self.config.patch_drop_rate
            if STEMS[self.config.stem_type].reads_single_patches and not drops and not is_traced():
                return self._embed_patches(pixel_values, pixel_mask, sizes)
            return self._embed_sizes(pixel_values, sizes)
        return self._embed(pixel_values, patch_embeds, kept)

    def _embed(
        self,
        pixel_values: torch.Tensor | None,
        patch_embeds: torch.Tensor | None = None,
        kept: KeptPatches | None = None,
    ) -> Tokens:
        """Images of one size: positions, then the stem, then what is kept of the patches, then the prefix."""
        config = self.config
        stem = STEMS[config.stem_type]
        if patch_embeds is None:
            grid_size, device = config.grid_of(tuple(pixel_values.shape[2:])), pixel_values.device
        else:
            grid_size, device = (patch_embeds.shape[2], patch_embeds.shape[3]), patch_embeds.device
        class_position, positions = POSITIONS[config.position_embedding_type](
            config, self.position_embedding, self.native_grid, grid_size, device
        )  # (1, D) or None, (N, D) or None
        if patch_embeds is None:
            tokens = stem.read(config, self.patch_embedding, in_whole_patches(config, pixel_values), positions)
        else:
            patch_embeds = patch_embeds.to(self._dtype_beside(patch_embeds, positions))
            tokens = stem.read_patch_embeds(self.patch_embedding, patch_embeds, positions)
        states, layout = tokens.states, tokens.layout  # (B, n, D)
        if kept is None and self.training and config.patch_drop_rate:
            kept = random_kept(states.shape[0], states.shape[1], config.patch_drop_rate, states.device)
        if kept is not None:
            states, layout = keep_tokens(states, layout, kept)
        return tokens._replace(states=self.dropout(self._with_prefix(states, class_position)), layout=layout)

    def _embed_patches(
        self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor, sizes: list[tuple[int, int]]
    ) -> Tokens:
        """Embeds the patches of all images in one call, as images of one patch each; positions are resampled once a
        grid."""
        config, device = self.config, pixel_values.device
        if config.pad_to_patch:
            pixel_values = in_whole_patches(config, pixel_values.masked_fill(~pixel_mask.bool()[:, None], 0))
        grids = [config.grid_of(size) for size in sizes]
        layout = layout_of_grids(grids, config.grid_of(tuple(pixel_values.shape[2:])))  # on the host, as the sizes are
        of_patch = layout.token_of_patch.unflatten(1, layout.grid_size)  # (B, gh, gw)
        places = (of_patch >= 0).nonzero().T  # (3, T) of the patches of all images: image, row, column
        places = torch.cat([places, of_patch[tuple(places)][None]])  # (4, T)
        places, *described = (
            each.to(device, non_blocking=True) for each in (places, layout.sizes, layout.token_of_patch)
        )
        image, row, column, token = places
        (height, width), (rows, columns) = config.patch_shape, layout.grid_size
        cut = pixel_values.unflatten(3, (columns, width)).unflatten(2, (rows, height))  # (B, C, gh, ph, gw, pw)
        patches = cut.permute(0, 2, 4, 1, 3, 5)[image, row, column]  # (T, C, ph, pw)
        tokens = STEMS[config.stem_type].read(config, self.patch_embedding, patches, None).states[:, 0]  # (T, D)
        resampled = {
            grid: POSITIONS[config.position_embedding_type](
                config, self.position_embedding, self.native_grid, grid, device
            )
            for grid in set(grids)
        }
        class_position, positions = resampled[grids[0]]
        if positions is not None:
            tokens = place(tokens, torch.cat([resampled[grid][1] for grid in grids]))
        states = tokens.new_zeros(len(grids), layout.sizes.shape[1], tokens.shape[1])
        states[image, token] = tokens
        states = self.dropout(self._with_prefix(states, class_position))
        return Tokens(states, TokenLayout(layout.grid_size, *described))

    def _dtype_beside(self, patch_embeds: torch.Tensor, positions: torch.Tensor | None) -> torch.dtype:
        """The dtype of the model's own tokens, which another encoder's features take; theirs where there are none."""
        learned = None if self.position_embedding is None else positions
        own = (self.class_embedding, self.register_tokens, learned, patch_embeds)
        return next(each.dtype for each in own if each is not None)

    def _embed_sizes(self, pixel_values: torch.Tensor, sizes: list[tuple[int, int]]) -> Tokens:
        """Embeds images of one size at a time, each as if it were alone, and joins them."""
        parts = []
        for height, width in sorted(set(sizes)):
            members = [i for i, size in enumerate(sizes) if size == (height, width)]
            parts.append((members, self._embed(pixel_values[members, :, :height, :width])))
        has_grid = self.config.stem_type not in GRIDLESS_STEMS
        grid_size = self.config.grid_of(tuple(pixel_values.shape[2:])) if has_grid else None
        return join_sizes(parts, len(sizes), grid_size, self.config.num_prefix_tokens)

    @property
    def has_offloaded_positions(self) -> bool:
        """Whether accelerate has put a learned table on the disk or another device, to be there during a pass alone."""
        layer = self.position_embedding
        return self.config.position_embedding_type == "learned" and layer.weight.is_meta and hasattr(layer, "_hf_hook")

    def resize_positions(self, grid_size: tuple[int, int]) -> None:
        """Replaces a learned table by itself resampled to `grid_size` (gh, gw), which becomes the native one."""
        if self.config.position_embedding_type != "learned":
            return
        weight, num_class_positions = self.position_embedding.weight, int(self.config.use_cls_token)
        with torch.no_grad():
            patches = weight[num_class_positions:]
            patches = interpolate_positions(patches, self.native_grid, grid_size, self.config.position_interpolation)
            table = torch.cat([weight[:num_class_positions], patches])
        self.position_embedding.weight = nn.Parameter(table, requires_grad=weight.requires_grad)
        self.position_embedding.num_embeddings, self.native_grid = table.shape[0], grid_size

    def _with_prefix(self, states: torch.Tensor, class_position: torch.Tensor | None) -> torch.Tensor:
        """(B, n, D) -> (B, P + n, D)."""
        prefix = []
        if self.class_embedding is not None:
            class_token = self.class_embedding[None]  # (1, D)
            prefix.append(class_token if class_position is None else class_token + class_position)
        if self.register_tokens is not None:
            prefix.append(self.register_tokens)
        if not prefix:
            return states
        rows = torch.cat(prefix).to(states).expand(states.shape[0], -1, -1)  # (B, P, D)
        return torch.cat([rows, states], dim=1)


def layout_of_grids(grids: list[tuple[int, int]], grid_size: tuple[int, int]) -> TokenLayout:
    """Of images whose patches are a token each, row by row, and lie at the top left of `grid_size` (gh, gw)."""
    rows, columns = torch.tensor(grids).T[:, :, None, None]  # (B, 1, 1) each
    row, column = torch.arange(grid_size[0])[:, None], torch.arange(grid_size[1])
    of_patch = torch.where((row < rows) & (column < columns), row * columns + column, -1)  # (B, gh, gw)
    counts = (rows * columns).flatten(1)  # (B, 1)
    sizes = (torch.arange(int(counts.max())) < counts).float()
    return TokenLayout(grid_size, sizes, of_patch.flatten(1))


def join_sizes(
    parts: list[tuple[list[int], Tokens]], batch: int, grid_size: tuple[int, int] | None, num_prefix_tokens: int
) -> Tokens:
    """Joins images that were embedded apart into one batch, whose rows of tokens are padded to the longest.

    Args:
        parts: numbers of images in the batch, and what was made of them.
        batch: B.
        grid_size: (gh, gw) that holds the grid of every image at its top left, or None for tokens without a grid.
        num_prefix_tokens: P.
    """
    first = parts[0][1].states
    length = max(part.states.shape[1] for _, part in parts)
    states = first.new_zeros(batch, length, first.shape[2])
    if grid_size is None:  # as many tokens for every image
        for members, part in parts:
            states[members] = part.states
        return Tokens(states, TokenLayout(None))
    sizes = torch.zeros(batch, length - num_prefix_tokens, device=first.device)
    of_patch = torch.full((batch, *grid_size), -1, device=first.device)
    losses = []
    for members, part in parts:
        layout, num_tokens = part.layout, part.states.shape[1] - num_prefix_tokens
        rows, columns = layout.grid_size
        states[members, : part.states.shape[1]] = part.states
        sizes[members, :num_tokens] = 1.0 if layout.sizes is None else layout.sizes.to(sizes.dtype)
        token_of_patch = layout.token_of_patch
        if token_of_patch is None:
            token_of_patch = torch.arange(num_tokens, device=first.device)[None]
        of_patch[members, :rows, :columns] = token_of_patch.unflatten(1, (rows, columns))
        if part.loss is not None:
            losses.append(part.loss * len(members) / batch)
    return Tokens(states, TokenLayout(grid_size, sizes, of_patch.flatten(1)), loss=sum(losses) if losses else None)


class VitEmbedTextEmbeddings(nn.Module):
    """Token ids (B, T) -> (B, T, D): a token table plus a learned position for each place."""

    def __init__(self, config: VitEmbedTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T) integer ids, and places (1 or B, T) counted from 0, else 0 ... T - 1 -> (B, T, D)."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]  # (1, T)
        tokens = self.token_embedding(input_ids)
        return tokens + self.position_embedding(position_ids).to(tokens.device)
