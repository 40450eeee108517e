"""What the classes give, and the options of transformers that every forward pass takes.

Symbols: B batch, D hidden size, L tokens, gh gw patch rows and columns. Height comes before width everywhere.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling, MaskedImageModelingOutput
from transformers.utils import ModelOutput

from .tokens_vit_embed import Tokens


@dataclass
class VitEmbedModelOutput(BaseModelOutputWithPooling):
    """BaseModelOutputWithPooling, and feature_pyramid: maps of the stem (B, C_i, H_i, W_i), fine to coarse;
    stem_loss: scalar to add to the loss when training, of an adaptive stem (the classes with a loss have added it);
    stages: the hidden states asked for, normalised, with what their tokens stand for."""

    feature_pyramid: tuple[torch.Tensor, ...] | None = None
    stem_loss: torch.Tensor | None = None
    stages: tuple[Tokens, ...] | None = None


@dataclass
class VitEmbedProjectionOutput(ModelOutput):
    """What a tower makes of a batch, in the joint space and before it.

    image_embeds: (B, projection_dim), of whatever length, as those of transformers' CLIPVisionModelWithProjection.
    last_hidden_state, hidden_states, attentions, stem_loss: as in VitEmbedModelOutput.
    """

    image_embeds: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    stem_loss: torch.Tensor | None = None


@dataclass
class VitEmbedContrastiveOutput(ModelOutput):
    """What two towers make of a batch.

    loss: scalar, where there are as many images as texts.
    logits_per_image: (images, texts), scaled cosines in float32; logits_per_text: its transpose.
    image_embeds, text_embeds: (images, projection_dim), (texts, projection_dim), unit length.
    hidden_states, attentions: of the image tower; text_hidden_states, text_attentions: of the text tower.
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    text_hidden_states: tuple[torch.Tensor, ...] | None = None
    text_attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class VitEmbedMaskedImageModelingOutput(MaskedImageModelingOutput):
    """MaskedImageModelingOutput, and mask: (B, gh, gw) bool, True for the patches that were hidden."""

    mask: torch.Tensor | None = None


class OutputOptions(TypedDict, total=False):
    """Options of transformers: what to return besides the result, from the call or else from the config."""

    output_attentions: bool | None
    output_hidden_states: bool | None


class ImageOptions(OutputOptions, total=False):
    """And whether positions are resampled to other grids than the native one, as they are unless this is False."""

    interpolate_pos_encoding: bool | None


def with_return_dict(forward: Callable[..., ModelOutput]) -> Callable[..., ModelOutput | tuple]:
    """Gives a `forward` transformers' option `return_dict`: False, from the call or else from the config, makes its
    output a tuple."""

    @functools.wraps(forward)
    def returning(self, *args, return_dict: bool | None = None, **kwargs):
        output = forward(self, *args, **kwargs)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    return returning


def asked_for(config, output_attentions: bool | None, output_hidden_states: bool | None) -> tuple[bool, bool]:
    """Whether to return attentions and hidden states, from the call or else from the config."""
    return (
        bool(config.output_attentions if output_attentions is None else output_attentions),
        bool(config.output_hidden_states if output_hidden_states is None else output_hidden_states),
    )
