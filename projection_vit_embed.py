"""The joint space of images and texts: the projections into it, and the methods that give embeddings alone."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from .combinations_vit_embed import check_combinations, needs_grid
from .configuration_vit_embed import VitEmbedConfig, VitEmbedTextConfig
from .initialisation_vit_embed import linear
from .inputs_vit_embed import check_every_patch, check_normalize
from .tokens_vit_embed import patch_grid
from .zero_shot_vit_embed import class_features

# Everything but the pooled vector switched off, whatever the config asks for.
POOLED = {"pooled_only": True, "output_attentions": False, "output_hidden_states": False, "return_dict": True}


def visual_projection(config: VitEmbedConfig) -> nn.Module:
    """(..., D) -> (..., projection_dim): a linear layer, or nothing where the pooled vector is the embedding itself."""
    if not config.use_visual_projection:
        return nn.Identity()
    std = config.hidden_size**-0.5 * config.initializer_factor
    return linear(config.hidden_size, config.projection_dim, std, bias=False)


def text_projection(config: VitEmbedTextConfig, projection_dim: int) -> nn.Linear:
    """(..., D of texts) -> (..., projection_dim)."""
    std = config.hidden_size**-0.5 * config.initializer_factor
    return linear(config.hidden_size, projection_dim, std, bias=config.projection_bias)


class ImageProjectionMixin:
    """Images in the joint space, of any class with a trunk `vision_model` and its `visual_projection`."""

    config: VitEmbedConfig
    training: bool
    vision_model: nn.Module
    visual_projection: nn.Module

    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        normalize: bool = False,
        patch_embeds: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
    ) -> torch.Tensor:
        """Images in the joint space: (B, projection_dim), of unit length with `normalize`.

        Inputs as in VitEmbedModel.
        """
        check_normalize(normalize)
        images = self.vision_model(
            pixel_values, patch_embeds, pixel_mask, interpolate_pos_encoding=interpolate_pos_encoding, **POOLED
        )
        projected = self.visual_projection(images.pooler_output)
        return F.normalize(projected, dim=-1) if normalize else projected

    def get_patch_features(
        self,
        pixel_values: torch.Tensor | None = None,
        patch_embeds: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Every patch in the joint space, unit length: (B, gh, gw, projection_dim); zeros in padding.

        `patches @ text_features.T` is then a similarity map of (B, gh, gw, texts), cosines in [-1, 1].

        Raises:
            ValueError: a stem without a grid, patches that training has dropped, or a bad input.
        """
        check_combinations(self.config, (needs_grid("a grid of patches"),))
        check_every_patch(self.config, self.training)
        last = [self.config.num_hidden_layers]
        (tokens,) = self.vision_model(pixel_values, patch_embeds, pixel_mask, stages=last, return_dict=True).stages
        patches = patch_grid(tokens, self.config.num_prefix_tokens)
        return F.normalize(self.visual_projection(patches), dim=-1)


class TextProjectionMixin:
    """Texts in the joint space, of any class with a tower `text_model` and its `text_projection`."""

    text_model: nn.Module
    text_projection: nn.Module

    def get_text_features(
        self,
        input_ids: torch.Tensor,
        normalize: bool = False,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        share_prefixes: bool | None = None,
    ) -> torch.Tensor:
        """Texts in the joint space: (B, projection_dim), of unit length with `normalize`.

        Inputs as in VitEmbedTextModel.
        """
        check_normalize(normalize)
        texts = self.text_model(input_ids, attention_mask, position_ids, share_prefixes=share_prefixes, **POOLED)
        projected = self.text_projection(texts.pooler_output)
        return F.normalize(projected, dim=-1) if normalize else projected

    @torch.no_grad()
    def get_class_features(
        self,
        tokenizer: PreTrainedTokenizerBase,
        names: Sequence[str],
        templates: Sequence[str | Callable[[str], str]] = ("{}",),
    ) -> torch.Tensor:
        """Classes in the joint space: (names, projection_dim) of unit length, float32. Each is the mean of the unit
        vectors of its sentences; the cosines of an image with them say which class it is of.

        What sentences begin with in common is computed once where that is exact, as `share_prefixes` of
        VitEmbedTextModel says, and equal sentences are; a bidirectional tower gains the latter alone.

        Args:
            tokenizer: of this checkpoint. A sentence longer than `max_position_embeddings` tokens is an error.
            names: of the classes.
            templates: sentences with {} where a name goes, or functions of a name.

        Raises:
            TypeError: names or templates that are one string, or hold anything else.
            ValueError: no names, no templates, a template without {}, a sentence that is too long.

        Source: arXiv:2103.00020 section 3.1.4 (ensembles in embedding space). There as here the mean is taken of unit
        vectors; here in float32.
        """
        return class_features(self, tokenizer, names, templates)
