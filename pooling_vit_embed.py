"""Many tokens -> one vector: what the image tower reads of its patches, and where a text is read.

Symbols: B batch, L tokens, P prefix tokens, T text tokens, D hidden size, h heads.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .activations_vit_embed import activation
from .configuration_vit_embed import LEGACY_EOS_TOKEN_ID, VitEmbedConfig, VitEmbedTextConfig
from .initialisation_vit_embed import fill
from .inputs_vit_embed import check_text_values
from .tokens_vit_embed import Tokens, key_bias, mean_of_patches


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
        self.activation = activation(config.hidden_act)
        self.fc2 = nn.Linear(config.intermediate_size, width)

    def init_parameters(self, config: VitEmbedConfig) -> None:
        fill(self.probe, nn.init.normal_, std=config.hidden_size**-0.5 * config.initializer_factor)

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
# The names are `options_vit_embed.POOLING_TYPES`.
POOLINGS = {"cls": pool_class_token, "mean": pool_mean, "map": pool_attention}

# Index of the first end-of-text token of each text (B,), and T -> index of the token that is its pooled one, (B,).
# The names are `options_vit_embed.TEXT_POOLING_TYPES`.
POOLED_TOKEN = {
    "eos": lambda ends, length: ends,
    "first": lambda ends, length: torch.zeros_like(ends),
    "last": lambda ends, length: torch.full_like(ends, length - 1),
}


def read_texts(
    config: VitEmbedTextConfig, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, check: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a text tower is given, and where it is read.

    Args:
        input_ids: (B, T). attention_mask: (B, T) or None.
        check: whether to look at values.

    Returns:
        (B, T) token ids, as they came or, where `config.reads_padding`, padded to `max_position_embeddings`; and the
        index of each text's pooled token, (B,).

    Raises:
        ValueError: as `check_text_values` does.
    """
    # Configs of other vocabularies than OpenAI's that still carry CLIP's legacy value pool as CLIP does.
    legacy = config.eos_token_id == LEGACY_EOS_TOKEN_ID
    is_end = input_ids == (input_ids.amax(dim=1, keepdim=True) if legacy else config.eos_token_id)
    ends = is_end.int().argmax(dim=1)  # (B,), 0 for a row that may go without an end
    if check:
        check_text_values(config, input_ids, attention_mask, is_end, ends)
    if config.reads_padding:
        if attention_mask is not None:
            input_ids = input_ids.masked_fill(~attention_mask.bool(), config.pad_token_id)
        missing = config.max_position_embeddings - input_ids.shape[1]
        input_ids = F.pad(input_ids, (0, missing), value=config.pad_token_id)
    return input_ids, POOLED_TOKEN[config.pooling_type](ends, input_ids.shape[1])
