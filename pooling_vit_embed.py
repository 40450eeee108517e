"""Many tokens -> one vector: what the image tower reads of its patches, and where a text is read.

Symbols: B batch, L tokens, P prefix tokens, T text tokens, D hidden size, h heads.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .configuration_vit_embed import (
    VitEmbedConfig,
)
from .tokens_vit_embed import (
    Tokens,
    key_bias,
    mean_of_patches,
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


def pool_class_token(tokens: Tokens, config: VitEmbedConfig, norm: nn.Module, pooler: None) -> torch.Tensor:
    """The class token, normalised: CLIP's."""
    return norm(tokens.states[:, 0])


def pool_mean(tokens: Tokens, config: VitEmbedConfig, norm: nn.Module, pooler: None) -> torch.Tensor:
    """The normalised mean of the patches, or the mean of the normalised ones with `norm_before_pooling`."""
    patches = tokens.states[:, config.num_prefix_tokens :]
    if config.norm_before_pooling:
        return mean_of_patches(norm(patches), tokens.layout)
    return norm(mean_of_patches(patches, tokens.layout))


def pool_attention(tokens: Tokens, config: VitEmbedConfig, norm: nn.Module, pooler: AttentionPooling) -> torch.Tensor:
    """Attention pooling over all normalised tokens."""
    bias = key_bias(tokens.layout, config.num_prefix_tokens, tokens.states.dtype)
    return pooler(norm(tokens.states), bias)


# Tokens (B, L, D), their config, the final norm and the attention pooling, if there is one -> (B, D).
# The names are `configuration_vit_embed.POOLING_TYPES`.
POOLINGS = {"cls": pool_class_token, "mean": pool_mean, "map": pool_attention}

# Index of the first end-of-text token of each text (B,), and T -> index of the token that is its pooled one, (B,).
# The names are `configuration_vit_embed.TEXT_POOLING_TYPES`.
POOLED_TOKEN = {
    "eos": lambda ends, length: ends,
    "first": lambda ends, length: torch.zeros_like(ends),
    "last": lambda ends, length: torch.full_like(ends, length - 1),
}
