"""Masked image modelling: which patches the trunk sees, the decoder that predicts the others, and its error.

Symbols: B batch, C channels, ph pw patch pixels, gh gw patch rows and columns, N = gh * gw, n of them that are seen, P
prefix tokens, D hidden size.
"""

import math

import torch
from torch import nn

from .configuration_vit_embed import VitEmbedConfig
from .embeddings_vit_embed import sinusoidal_positions
from .encoder_vit_embed import VitEmbedEncoder
from .initialisation_vit_embed import fill, linear
from .inputs_vit_embed import check_masked_patches, is_traced
from .losses_vit_embed import total_items
from .stem_layers_vit_embed import patchify, unpatchify
from .tokens_vit_embed import KeptPatches, Tokens, random_kept, token_of_each_patch


def seen_patches(
    bool_masked_pos: torch.Tensor | None,
    batch: int,
    grid_size: tuple[int, int],
    mask_ratio: float,
    device: torch.device,
) -> KeptPatches:
    """The patches that the trunk sees.

    Args:
        bool_masked_pos: (B, N) or (B, gh, gw), True for patches to hide; None hides `mask_ratio` of them at random.

    Raises:
        TypeError, ValueError: a mask of another shape, or one that hides a whole image.
    """
    if bool_masked_pos is None:
        return random_kept(batch, math.prod(grid_size), mask_ratio, device)
    check_masked_patches(bool_masked_pos, batch, grid_size)
    seen = ~bool_masked_pos.bool().flatten(1)
    if is_traced():
        return KeptPatches(seen)
    count = seen.sum(dim=1)
    fewest, most = torch.stack([count.min(), count.max()]).tolist()  # read once
    if fewest == 0:
        raise ValueError("bool_masked_pos must leave at least one patch of each image, got an image with none")
    return KeptPatches(seen, most if fewest == most else None)


class VitEmbedPatchDecoder(nn.Module):
    """Masked autoencoding's light decoder: the encoder's tokens and a learned one for each hidden patch -> pixels."""

    def __init__(self, config: VitEmbedConfig, width_in: int):
        """
        Args:
            config: of the decoder's own layers, as `VitEmbedConfig.decoder_config` gives it.
            width_in: D of the encoder.
        """
        super().__init__()
        self.config = config
        width, factor = config.hidden_size, config.initializer_factor
        self.projection = linear(width_in, width, width_in**-0.5 * factor)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.encoder = VitEmbedEncoder(config)
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.prediction = linear(width, config.num_channels * math.prod(config.patch_shape), width**-0.5 * factor)

    def init_parameters(self, config: VitEmbedConfig) -> None:
        fill(self.mask_token, nn.init.normal_, std=config.initializer_range * config.initializer_factor)

    def forward(self, tokens: Tokens, num_prefix_tokens: int) -> torch.Tensor:
        """The encoder's normalised tokens (B, P + n, D) -> every patch's values (B, N, C * ph * pw)."""
        decoded = self.encoder(self._with_mask_tokens(tokens, num_prefix_tokens)).last.states
        return self.prediction(self.layernorm(decoded[:, num_prefix_tokens:]))

    def _with_mask_tokens(self, tokens: Tokens, num_prefix_tokens: int) -> torch.Tensor:
        """(B, P + n, D of the encoder) -> (B, P + N, D of the decoder), each patch at its position."""
        layout = tokens.layout
        # In the precision of the weights, whatever autocast makes of the projection.
        hidden_states = self.projection(tokens.states).to(self.mask_token.dtype)
        prefix, seen = hidden_states[:, :num_prefix_tokens], hidden_states[:, num_prefix_tokens:]
        is_seen = (layout.token_of_patch >= 0)[..., None]  # (B, N, 1)
        patches = torch.where(is_seen, token_of_each_patch(seen, layout), self.mask_token.to(seen.device))
        positions = sinusoidal_positions(layout.grid_size, self.config.hidden_size, patches.device)
        return torch.cat([prefix, patches + positions.to(patches.dtype)], dim=1)


def blanked(
    images: torch.Tensor, seen: torch.Tensor, grid_size: tuple[int, int], patch_shape: tuple[int, int]
) -> torch.Tensor:
    """Images (B, C, H, W) with the pixels of patches that are not seen, (B, N) bool, set to 0."""
    return unpatchify(patchify(images, patch_shape) * seen[..., None], grid_size, patch_shape)


def masked_error(
    predicted: torch.Tensor, patches: torch.Tensor, hidden: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """Mean squared error of the hidden patches' values: (B, N, values) twice and (B, N) bool -> scalar, 0 for none.

    The mean over the images with hidden patches of each one's mean; so the mean over batches of one size is that of
    the joined batch, which matters as Trainer has no labels to count here. With `num_items_in_batch`, the hidden
    patches of all the batches of a training step, it is the sum over the hidden patches, divided by that.
    """
    errors = (predicted - patches).square().mean(dim=-1)  # (B, N)
    totals, counts = (errors * hidden).sum(dim=1), hidden.sum(dim=1)
    if num_items_in_batch is None:
        return (totals / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)
    return totals.sum() / total_items(counts.sum(), num_items_in_batch)


def patch_statistics(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each patch's values: (B, N, values) -> twice (B, N, 1)."""
    # 1e-6 as in the paper's reference code: flat patches are common.
    return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
