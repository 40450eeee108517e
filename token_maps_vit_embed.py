"""Where the tokens of an image tower look, and what they stand for, as maps over the patches."""

import torch

from .combinations_vit_embed import check_combinations, needs_grid
from .configuration_vit_embed import VitEmbedConfig
from .tokens_vit_embed import token_of_each_patch


class TokenMapsMixin:
    """Of the image tower: maps over its patches."""

    config: VitEmbedConfig

    def get_class_attentions(
        self,
        pixel_values: torch.Tensor | None = None,
        patch_embeds: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """How much the class token looks at each patch: (B, layers, h, gh, gw), weights in [0, 1], at most 1 in sum.

        What it looks at a token that stands for several patches is shared among them evenly.

        Raises:
            ValueError: a model without a class token or a grid, or a bad input.
        """
        if not self.config.use_cls_token:
            raise ValueError("class attention needs a class token: use_cls_token is False in this config")
        check_combinations(self.config, (needs_grid("attention over a grid of patches"),))
        inputs = range(self.config.num_hidden_layers)  # of the layers: what their keys stand for
        read = self(pixel_values, patch_embeds, pixel_mask, stages=inputs, output_attentions=True, return_dict=True)
        layers = []
        for weights, (_, layout, *_) in zip(read.attentions, read.stages):
            weights = weights[:, :, 0, self.config.num_prefix_tokens :].transpose(1, 2)  # (B, n, h)
            if layout.sizes is not None:
                weights = weights / layout.sizes[..., None].clamp(min=1)
            layers.append(token_of_each_patch(weights, layout).transpose(1, 2))  # (B, h, N)
        return torch.stack(layers, dim=1).unflatten(-1, layout.grid_size)

    @torch.no_grad()
    def get_token_map(
        self,
        pixel_values: torch.Tensor | None = None,
        patch_embeds: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Which token stands for each patch after the last layer: (B, gh, gw) counted from 0 after the prefix, -1 for
        padding. Patches of equal number were given one token by an adaptive stem, or merged into one.

        Raises:
            ValueError: a stem without a grid, or a bad input.
        """
        check_combinations(self.config, (needs_grid("a map of tokens"),))
        last = self.config.num_hidden_layers
        (tokens,) = self(pixel_values, patch_embeds, pixel_mask, stages=[last], return_dict=True).stages
        of_patch = tokens.layout.token_of_patch
        rows, columns = tokens.layout.grid_size
        if of_patch is None:
            of_patch = torch.arange(rows * columns, device=tokens.states.device).expand(tokens.states.shape[0], -1)
        return of_patch.unflatten(1, (rows, columns))
