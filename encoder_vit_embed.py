"""The stack of layers that every tower and decoder uses: attention, MLP, layer, encoder.

Symbols: B batch, L tokens, R or Q rows asked for, P prefix tokens, D hidden size, h heads.
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .activations_vit_embed import activation
from .configuration_vit_embed import VitEmbedConfig, VitEmbedTextConfig
from .initialisation_vit_embed import fill, linear
from .inputs_vit_embed import is_on_host, is_traced
from .prefixes_vit_embed import PrefixBlocks, PrefixTree
from .tokens_vit_embed import (
    Packing,
    TokenLayout,
    Tokens,
    key_bias,
    match_tokens,
    merge_tokens,
    packing_of,
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
# Implementations that are told to be causal by a flag; every other one is given a causal mask.
CAUSAL_BY_FLAG = ("sdpa", "flash_attention_2", "flash_attention_3")
# Up to how many tokens `_HostAttention` is the faster: at 50 its backward pass takes 0.25 of the time, at 197 and 577
# 0.6, at 1,025 0.9, at 2,049 1.7 (Xeon with AMX, torch 2.13). And how many scores it holds at a time.
MAX_HOST_TOKENS, SCORES_AT_ONCE = 1024, 2**20


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


class _HostAttention(torch.autograd.Function):
    """torch's attention of bfloat16 on a CPU with a backward pass of whole matrix products.

    torch's own goes through blocks of a few rows, in products too small for the processor's matrix units. As there the
    weights are computed anew and not kept. Unlike there the gradients have gradients.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scaling: float
    ) -> torch.Tensor:
        """Query (B, h, Q, D / h), key and value (B, h, L, D / h) -> (B, h, Q, D / h)."""
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scaling)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: torch.Tensor) -> None:
        *states, ctx.is_causal, ctx.scaling = inputs
        ctx.save_for_backward(*states)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once, as checkpoints ask
        d_query, d_key, d_value = (torch.empty_like(each) for each in saved)
        batch, heads, rows, _ = gradient.shape
        length = d_key.shape[2]
        images = max(1, SCORES_AT_ONCE // (heads * rows * length))
        for start in range(0, batch, images):
            part = slice(start, start + images)
            query, key, value, d_mixed = (
                each[part].flatten(0, 1) for each in (*saved, gradient)
            )  # (images * h, L, D / h)
            query = query * ctx.scaling
            scores = query @ key.mT
            if ctx.is_causal:
                hidden = torch.ones(rows, length, dtype=torch.bool, device=query.device).triu(1)
                scores = scores.masked_fill(hidden, -torch.inf)
            weights = F.softmax(scores, dim=-1)
            d_weights = d_mixed @ value.mT
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_query[part] = (d_scores @ key).mul_(ctx.scaling).unflatten(0, (-1, heads))
            d_key[part] = (d_scores.mT @ query).unflatten(0, (-1, heads))
            d_value[part] = (weights.mT @ d_mixed).unflatten(0, (-1, heads))
        return d_query, d_key, d_value, None, None


def sdpa_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float,
    is_causal: bool,
) -> tuple[torch.Tensor, None]:
    """What is registered as "sdpa"; in its place `_HostAttention` where a gradient is wanted and it is faster.

    (B, h, Q or L, D / h) -> (B, Q, h, D / h).
    """
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    is_plain = attend is sdpa_attention_forward and attention_mask is None and not dropout and not is_traced()
    wants_gradients = query.requires_grad or key.requires_grad or value.requires_grad
    is_slow = query.dtype == torch.bfloat16 and is_on_host(query) and key.shape[2] <= MAX_HOST_TOKENS
    if is_plain and wants_gradients and is_slow:
        return _HostAttention.apply(query, key, value, is_causal, scaling).transpose(1, 2), None
    options = {"scaling": scaling, "dropout": dropout, "is_causal": is_causal}
    return attend(module, query, key, value, attention_mask, **options)


# Attention of our own, by implementation; the others are those that transformers knows.
ATTENTIONS = {"eager": eager_attention, "sdpa": sdpa_attention}


def causal_mask(hidden_states: torch.Tensor, implementation: str) -> torch.Tensor | BlockMask | None:
    """What tells an attention implementation that a token sees itself and those before it, for states (B, T, D).

    None where a flag says so; a BlockMask for flex attention; else (1, 1, T, T) to add to the scores, of the states'
    dtype: 0 where a token may look, the lowest number elsewhere.
    """
    length = hidden_states.shape[1]
    if implementation in CAUSAL_BY_FLAG:
        return None
    if implementation == "flex_attention":
        device = hidden_states.device.type
        return create_block_mask(lambda b, h, query, key: query >= key, None, None, length, length, device=device)
    lowest = torch.finfo(hidden_states.dtype).min
    return hidden_states.new_full((1, 1, length, length), lowest).triu(diagonal=1)


def causal_mask_of_rows(hidden_states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The lines of the mask for row numbers (B, 1) of states (B, T, D), as (B, 1, 1, T)."""
    seen = torch.arange(hidden_states.shape[1], device=rows.device) <= rows  # (B, T)
    lowest = torch.finfo(hidden_states.dtype).min
    return torch.zeros_like(seen, dtype=hidden_states.dtype).masked_fill(~seen, lowest)[:, None, None]


def within_images(attend: Callable, module: nn.Module, states: list[torch.Tensor], packing: Packing, **options):
    """Attention among the tokens of each image: query (1, h, T or B, D / h), key and value (1, h, T, D / h) -> (1, T or
    B, h, D / h). Images of one length are a batch, so nothing is computed of padding and nothing masked."""
    mixed = []
    biases = [None] * len(packing.groups) if packing.bias is None else packing.split(packing.bias[None, None, :, None])
    for *group, bias in zip(*map(packing.split, states), biases):
        mask = None if bias is None else bias.transpose(2, 3)  # (images, 1, 1, tokens)
        mixed.append(attend(module, *group, mask, **options)[0].flatten(0, 1))
    return torch.cat(mixed)[None]


def is_watched(module: nn.Module) -> bool:
    """Whether someone looks at what goes through it, and may expect (B, L, D): a hook, or a compiler of it alone."""
    return any(
        each._forward_hooks
        or each._forward_pre_hooks
        or each._backward_hooks
        or each._backward_pre_hooks
        or each._compiled_call_impl
        or "_orig_mod" in each._modules
        for each in module.modules()
    )


def drop_path(branch: torch.Tensor, rate: float, training: bool, packing: Packing | None = None) -> torch.Tensor:
    """Zeroes the whole branch of a random share of the images and scales up the others. (B, ...), or packed (1, T, D)
    -> the same."""
    if rate == 0.0 or not training:
        return branch
    batch = branch.shape[0] if packing is None else packing.shape[0]
    kept = torch.rand(batch, *[1] * (branch.dim() - 1), device=branch.device) >= rate
    if packing is not None:
        kept = kept[packing.images_of(branch)].transpose(0, 1)  # (1, T, 1)
    return branch * kept.to(branch.dtype) / (1 - rate)


def as_product_input(states: torch.Tensor) -> torch.Tensor:
    """float32 states under autocast in its dtype, once for the projections that read them: each would make and keep a
    copy of its own."""
    device = states.device.type
    has_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    # A compiler joins the copies itself, and float64 is computed in float64 under autocast, too.
    if is_traced() or not has_autocast or states.dtype != torch.float32:
        return states
    return states.to(torch.get_autocast_dtype(device))


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
        attention_mask: torch.Tensor | BlockMask | Packing | PrefixBlocks | None = None,
        is_causal: bool = False,
        queries: torch.Tensor | None = None,
        output_attentions: bool = False,
        output_keys: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """(B, L, D), or other states (B, Q, D) as queries -> (B, Q, D); and if asked for the weights (B, h, Q, L), and
        the keys (B, h, L, D / h), by which tokens are compared."""
        hidden_states = as_product_input(hidden_states)
        query, key, value = (
            states.view(*states.shape[:2], -1, self.head_dim).transpose(1, 2)  # (B, h, Q or L, D / h)
            for states in self.projected(hidden_states, queries)
        )
        # Only the plain implementation has weights to show, so a call that wants them takes it.
        implementation = "eager" if output_attentions else self.config._attn_implementation
        blocks = attention_mask if isinstance(attention_mask, PrefixBlocks) else None
        if blocks is not None:
            query, key, value, attention_mask = blocks.gathered(query, key, value)
        has_sizes = isinstance(attention_mask, torch.Tensor | Packing) and not is_causal
        if has_sizes and implementation not in QUERY_SUBSET:  # flash and flex attention take no bias of the scores
            implementation = "sdpa"
        attend = ATTENTIONS.get(implementation) or ALL_ATTENTION_FUNCTIONS[implementation]
        options = {
            "scaling": self.scaling,
            "dropout": self.config.attention_dropout if self.training else 0.0,
            "is_causal": is_causal,
        }
        if isinstance(attention_mask, Packing):
            mixed, weights = within_images(attend, self, [query, key, value], attention_mask, **options), None
        else:
            mixed, weights = attend(self, query, key, value, attention_mask, **options)
        mixed = self.out_proj((mixed if blocks is None else blocks.joined(mixed)).flatten(2))
        return mixed, weights if output_attentions else None, key if output_keys else None

    def projected(
        self, hidden_states: torch.Tensor, queries: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (B, Q, D), keys and values (B, L, D)."""
        query = self.q_proj(hidden_states if queries is None else queries)
        return query, self.k_proj(hidden_states), self.v_proj(hidden_states)


class VitEmbedMLP(nn.Module):
    """fc1, activation, fc2. (B, L, D) -> the same."""

    def __init__(self, config: VitEmbedConfig | VitEmbedTextConfig):
        super().__init__()
        self.activation_fn = activation(config.hidden_act)
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

    def init_parameters(self, config: VitEmbedConfig | VitEmbedTextConfig) -> None:
        for scale in (self.layer_scale1, self.layer_scale2):
            fill(scale, nn.init.constant_, val=config.layer_scale_init_value)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | BlockMask | Packing | PrefixBlocks | None = None,
        is_causal: bool = False,
        layout: TokenLayout | None = None,
        rows: torch.Tensor | slice | None = None,
        merge_size: int = 0,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, TokenLayout | None]:
        """
        Args:
            hidden_states: (B, L, D), or packed (1, T, D).
            attention_mask: added to the scores, broadcast to (B, h, Q, L); or how images are packed, or which nodes of
                a tree of texts see which; or None.
            is_causal: for implementations that are told by a flag.
            layout: of the image tokens.
            rows: which to compute, (B, Q) or a slice; None for all, Q = L.
            merge_size: pairs of tokens to merge.

        Returns:
            (B, Q, D), less `merge_size` rows; the attention weights if asked for; the layout afterwards.
        """
        packing = attention_mask if isinstance(attention_mask, Packing) else None
        normed = self.layer_norm1(hidden_states) if self.norm_first else hidden_states
        branch, weights, keys = self.self_attn(
            normed,
            attention_mask,
            is_causal,
            queries=None if rows is None else select_rows(normed, rows),
            output_attentions=output_attentions,
            output_keys=merge_size > 0,
        )
        del normed  # nothing is kept that is not used again
        hidden_states = select_rows(hidden_states, rows) + self._scaled(branch, self.layer_scale1, packing)
        del branch
        if not self.norm_first:
            hidden_states = self.layer_norm1(hidden_states)
        if keys is not None:
            hidden_states, layout = self._merged(hidden_states, layout, keys, merge_size)
        branch = self.mlp(self.layer_norm2(hidden_states) if self.norm_first else hidden_states)
        hidden_states = hidden_states + self._scaled(branch, self.layer_scale2, packing)
        if not self.norm_first:
            hidden_states = self.layer_norm2(hidden_states)
        return hidden_states, weights, layout

    def _merged(
        self, hidden_states: torch.Tensor, layout: TokenLayout, keys: torch.Tensor, merge_size: int
    ) -> tuple[torch.Tensor, TokenLayout]:
        """(B, L, D) -> (B, L - merge_size, D): the tokens with the most similar keys (B, h, L, D / h) become one."""
        num_prefix = self.num_prefix_tokens
        merge_size = min(merge_size, (keys.shape[2] - num_prefix) // 2)
        if merge_size < 1:
            return hidden_states, layout
        prefix, patches = hidden_states[:, :num_prefix], hidden_states[:, num_prefix:]
        merge = match_tokens(keys[:, :, num_prefix:].mean(dim=1), merge_size)
        patches, layout = merge_tokens(patches, layout, merge)
        return torch.cat([prefix, patches], dim=1), layout

    def _scaled(self, branch: torch.Tensor, layer_scale: torch.Tensor | None, packing: Packing | None) -> torch.Tensor:
        branch = self.dropout(branch)
        if layer_scale is not None:
            branch = branch * layer_scale
        return drop_path(branch, self.drop_path_rate, self.training, packing)


class EncoderOutput(NamedTuple):
    """What the layers give.

    last: the output of the last layer, (B, L, D), or (B, Q, D) where rows were asked for.
    stages: {number: hidden state}, of those asked for; 0 is the input of the first layer, i the output of layer i.
        Merging makes L differ by layer.
    attentions: (B, h, L, L) a layer if asked for, else None.
    """

    last: Tokens
    stages: dict[int, Tokens]
    attentions: tuple[torch.Tensor, ...] | None

    @property
    def hidden_states(self) -> tuple[torch.Tensor, ...]:
        """The states of the stages, in order."""
        return tuple(each.states for each in self.stages.values())


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
        is_causal: bool = False,
        layout: TokenLayout | None = None,
        stages: Collection[int] = (),
        output_attentions: bool = False,
        last_rows: torch.Tensor | slice | None = None,
        tree: PrefixTree | None = None,
    ) -> EncoderOutput:
        """
        Args:
            hidden_states: (B, L, D).
            is_causal: whether a token sees only itself and those before it.
            layout: of image tokens, none of which is causal: each counts by its size, and in evaluation every layer
                merges `token_merge_size` of them. Rows of different lengths go through the layers without padding
                where `_packs` says so, and come out with zeros in it.
            stages: numbers of the hidden states to keep.
            last_rows: row numbers (B, Q), or a slice. The last layer then computes these rows alone: the same numbers
                for 1 / num_hidden_layers less work, as no later layer reads the others.
            tree: of texts, whose nodes (1, N, D) the hidden states are; the last layer computes its ends alone.
        """
        num_prefix = self.config.num_prefix_tokens
        merge_size = 0 if layout is None or self.training else self.config.token_merge_size
        kept = {0: Tokens(hidden_states, layout)} if 0 in stages else {}
        attentions, last = [], len(self.layers)
        packing = None
        attention_mask: torch.Tensor | BlockMask | Packing | PrefixBlocks | None = None
        if layout is not None and self._packs(layout, merge_size, output_attentions, last_rows):
            packing = packing_of(layout, num_prefix, hidden_states.dtype)
            hidden_states = packing.pack(hidden_states)
        if tree is not None:
            attention_mask, is_causal, last_rows = tree.blocks, False, tree.ends
        elif is_causal:
            implementation = "eager" if output_attentions else self.config._attn_implementation
            attention_mask = causal_mask(hidden_states, implementation)
        for number, layer in enumerate(self.layers, start=1):
            rows = None
            if packing is not None:
                attention_mask = packing
            elif layout is not None:
                attention_mask = key_bias(layout, num_prefix, hidden_states.dtype)
            if number == last and last_rows is not None:
                rows, merge_size = last_rows if packing is None else packing.first[None], 0
                if tree is not None:
                    attention_mask = tree.blocks_of_ends
                elif is_causal:
                    attention_mask, is_causal = causal_mask_of_rows(hidden_states, rows), False
            hidden_states, weights, layout = layer(
                hidden_states, attention_mask, is_causal, layout, rows, merge_size, output_attentions
            )
            attentions.append(weights)
            if number in stages:
                kept[number] = Tokens(hidden_states if packing is None else packing.unpack(hidden_states), layout)
        if packing is not None:
            hidden_states = packing.unpack(hidden_states)
        return EncoderOutput(Tokens(hidden_states, layout), kept, tuple(attentions) if output_attentions else None)

    def _packs(
        self, layout: TokenLayout, merge_size: int, output_attentions: bool, last_rows: torch.Tensor | slice | None
    ) -> bool:
        """Whether the layers run on the tokens of all images without their padding: where the counts can be read
        without waiting, the lengths stay, and nobody looks at what is between the layers."""
        if layout.sizes is None or merge_size or output_attentions or is_traced():
            return False
        if type(layout.sizes) is not torch.Tensor or not is_on_host(layout.sizes):
            return False
        is_first_row = isinstance(last_rows, slice) and last_rows == slice(0, 1)
        return (last_rows is None or is_first_row) and not is_watched(self.layers)
