"""The stack of layers that every tower and decoder uses: attention, MLP, layer, encoder.

Symbols: B batch, L tokens, R or Q rows asked for, P prefix tokens, D hidden size, h heads.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_vit_embed import (
    VitEmbedConfig,
    VitEmbedTextConfig,
)
from .tokens_vit_embed import (
    TokenLayout,
    key_bias,
    match_tokens,
    merge_tokens,
    select_rows,
)

NORMS = {
    "layer_norm": nn.LayerNorm,
    "rms_norm": nn.RMSNorm,
    "none": lambda width, eps: nn.Identity(),
}

# Implementations with which the last layer can run on the pooled rows alone: they take any number of queries and any
# mask.
QUERY_SUBSET = ("eager", "sdpa")


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as it is written, with its weights: the reference for every other implementation.

    Args:
        query: (B, h, Q, D/h), Q = L or the pooled rows; key, value: (B, h, L, D/h).
        attention_mask: added to the scores, broadcast to (B, h, Q, L), or None.

    Returns:
        (B, Q, h, D/h) and the weights (B, h, Q, L).
    """
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    mixed = F.dropout(weights, p=dropout, training=module.training) @ value
    return mixed.transpose(1, 2), weights


def drop_path(branch: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """Zeroes the whole branch of a random share of the samples and scales up the others. (B, ...) -> the same."""
    if rate == 0.0 or not training:
        return branch
    kept = torch.rand(branch.shape[0], *[1] * (branch.dim() - 1), device=branch.device) >= rate
    return branch * kept.to(branch.dtype) / (1 - rate)


def linear(width_in: int, width_out: int, std: float, bias: bool = True) -> nn.Linear:
    """A linear layer that knows the standard deviation its weight starts with.

    It has to know it itself: transformers 5 calls `_init_weights` of custom code only for modules that own parameters,
    so an attention block is never asked to initialise its projections.
    """
    layer = nn.Linear(width_in, width_out, bias=bias)
    layer.init_std = std
    return layer


class VitEmbedAttention(nn.Module):
    """Multi-head attention with separate q, k, v and output projections (arXiv:1706.03762 section 3.2.2)."""

    def __init__(self, config: VitEmbedConfig | VitEmbedTextConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.head_dim = width // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False  # read by transformers' attention functions when a call does not say
        std = width**-0.5 * config.initializer_factor
        in_std = std * (2 * config.num_hidden_layers) ** -0.5
        self.k_proj = linear(width, width, in_std, bias=config.qkv_bias)
        self.v_proj = linear(width, width, in_std, bias=config.qkv_bias)
        self.q_proj = linear(width, width, in_std, bias=config.qkv_bias)
        self.out_proj = linear(width, width, std)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        rows: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """(B, L, D) -> (B, Q, D) with Q = L, or the number of `rows`; the weights (B, h, Q, L) if asked for; and the
        keys (B, h, L, D / h), by which tokens are compared."""
        query, key, value = (
            states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, h, Q or L, D / h)
            for states in (
                self.q_proj(select_rows(hidden_states, rows)),
                self.k_proj(hidden_states),
                self.v_proj(hidden_states),
            )
        )
        # Only the plain implementation has weights to show, so a call that wants them takes it.
        implementation = "eager" if output_attentions else self.config._attn_implementation
        has_sizes = isinstance(attention_mask, torch.Tensor) and not is_causal
        if has_sizes and implementation not in QUERY_SUBSET:  # flash and flex attention take no bias of the scores
            implementation = "sdpa"
        attend = eager_attention if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
        mixed, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            is_causal=is_causal,
        )
        return self.out_proj(mixed.flatten(2)), weights if output_attentions else None, key


class VitEmbedMLP(nn.Module):
    """fc1, activation, fc2. (B, L, D) -> the same."""

    def __init__(self, config: VitEmbedConfig | VitEmbedTextConfig):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        width, factor = config.hidden_size, config.initializer_factor
        out_std = width**-0.5 * (2 * config.num_hidden_layers) ** -0.5 * factor
        self.fc1 = linear(width, config.intermediate_size, (2 * width) ** -0.5 * factor)
        self.fc2 = linear(config.intermediate_size, width, out_std)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class VitEmbedLayer(GradientCheckpointingLayer):
    """Attention and MLP, each a branch on the residual stream: x + f(norm(x)) for "pre", norm(x + f(x)) for "post"."""

    def __init__(self, config: VitEmbedConfig | VitEmbedTextConfig, drop_path_rate: float = 0.0):
        super().__init__()
        width = config.hidden_size
        self.norm_first = config.norm_position == "pre"
        self.num_prefix_tokens = config.num_prefix_tokens
        self.drop_path_rate = drop_path_rate
        self.self_attn = VitEmbedAttention(config)
        self.layer_norm1 = NORMS[config.norm_type](width, eps=config.layer_norm_eps)
        self.mlp = VitEmbedMLP(config)
        self.layer_norm2 = NORMS[config.norm_type](width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layer_scale1 = self.layer_scale2 = None
        if config.layer_scale_init_value is not None:
            self.layer_scale1 = nn.Parameter(torch.full((width,), config.layer_scale_init_value))
            self.layer_scale2 = nn.Parameter(torch.full((width,), config.layer_scale_init_value))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        rows: torch.Tensor | None = None,
        output_attentions: bool = False,
        layout: TokenLayout | None = None,
        merge_size: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor | None, TokenLayout | None]:
        """(B, L, D) -> (B, L, D), or (B, R, D) for row numbers (B, R); the attention weights if asked for; and the
        layout of the tokens afterwards, `merge_size` fewer than before."""
        residual = select_rows(hidden_states, rows)
        if self.norm_first:
            hidden_states = self.layer_norm1(hidden_states)
        mixed, weights, keys = self.self_attn(hidden_states, attention_mask, is_causal, rows, output_attentions)
        hidden_states = residual + self._scaled(mixed, self.layer_scale1)
        if not self.norm_first:
            hidden_states = self.layer_norm1(hidden_states)
        num_prefix = self.num_prefix_tokens
        merge_size = min(merge_size, (keys.shape[2] - num_prefix) // 2)
        if merge_size > 0:
            prefix, patches = hidden_states[:, :num_prefix], hidden_states[:, num_prefix:]
            merge = match_tokens(keys[:, :, num_prefix:].mean(dim=1), merge_size)
            patches, layout = merge_tokens(patches, layout, merge)
            hidden_states = torch.cat([prefix, patches], dim=1)  # (B, L - merge_size, D)

        residual = hidden_states
        if self.norm_first:
            hidden_states = self.layer_norm2(hidden_states)
        hidden_states = residual + self._scaled(self.mlp(hidden_states), self.layer_scale2)
        if not self.norm_first:
            hidden_states = self.layer_norm2(hidden_states)
        return hidden_states, weights, layout

    def _scaled(self, branch: torch.Tensor, layer_scale: torch.Tensor | None) -> torch.Tensor:
        branch = self.dropout(branch)
        if layer_scale is not None:
            branch = branch * layer_scale
        return drop_path(branch, self.drop_path_rate, self.training)


class EncoderOutput(NamedTuple):
    """What the layers give: last_hidden_state (B, L, D), or (B, R, D) where rows were asked for; one entry a layer in
    attentions (B, h, L, L), and the input besides in hidden_states (B, L, D), each None unless asked for; and the
    layout of the tokens in each hidden state, the input's first, where one was given. Merging makes L differ by
    layer."""

    last_hidden_state: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None
    attentions: tuple[torch.Tensor, ...] | None
    layouts: tuple[TokenLayout | None, ...]


class VitEmbedEncoder(nn.Module):
    """The stack of layers that all towers use."""

    def __init__(self, config: VitEmbedConfig | VitEmbedTextConfig):
        super().__init__()
        self.config = config
        depth = config.num_hidden_layers
        self.layers = nn.ModuleList(
            [VitEmbedLayer(config, config.drop_path_rate * i / max(1, depth - 1)) for i in range(depth)]
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        last_rows: torch.Tensor | None = None,
        last_mask: torch.Tensor | None = None,
        layout: TokenLayout | None = None,
    ) -> EncoderOutput:
        """
        Args:
            hidden_states: (B, L, D).
            attention_mask: added to the scores of every layer, broadcast to (B, h, L, L), or None.
            is_causal: whether a token sees only itself and those before it (for implementations without a mask).
            last_rows: row numbers (B, R). The last layer then computes these rows alone: the same numbers for
                1 / num_hidden_layers less work, as no later layer reads the others.
            last_mask: as attention_mask, for `last_rows`: broadcast to (B, h, R, L).
            layout: of image tokens, in place of the masks: each counts by its size, and in evaluation every layer
                merges `token_merge_size` of them.
        """
        num_prefix = self.config.num_prefix_tokens
        merge_size = 0 if layout is None or self.training else self.config.token_merge_size
        all_hidden_states, all_attentions, layouts = [hidden_states], [], [layout]
        for layer in self.layers:
            rows = None
            if layout is not None:
                attention_mask = key_bias(layout, num_prefix, hidden_states.dtype)
            if layer is self.layers[-1] and last_rows is not None:
                rows, is_causal, merge_size = last_rows, False, 0
                attention_mask = last_mask if layout is None else attention_mask
            hidden_states, weights, layout = layer(
                hidden_states, attention_mask, is_causal, rows, output_attentions, layout, merge_size
            )
            all_hidden_states.append(hidden_states)
            all_attentions.append(weights)
            layouts.append(layout)
        return EncoderOutput(
            hidden_states,
            tuple(all_hidden_states) if output_hidden_states else None,
            tuple(all_attentions) if output_attentions else None,
            tuple(layouts),
        )
