"""CLIP and ViT in one trunk: attention, layer, encoder, the two towers, and the classes that the Auto classes load.

Symbols, used in every shape comment: B batch, C channels, H W image pixels, gh gw patch rows and columns,
N = gh * gw patches, P prefix tokens (class token and registers), L = P + N, T text tokens, D hidden size, h heads.
Height comes before width everywhere.

The state dict of `VitEmbedForContrastive` is that of `transformers.CLIPModel`, key for key.
"""

import copy
import json
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    DepthEstimatorOutput,
    ImageClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, cached_file

from .configuration_vit_embed import (
    LEGACY_EOS_TOKEN_ID,
    NUM_DPT_TAPS,
    VitEmbedConfig,
    VitEmbedTextConfig,
)
from .embeddings_vit_embed import (
    VitEmbedEmbeddings,
    VitEmbedTextEmbeddings,
)
from .heads_vit_embed import (
    DEPTH_HEADS,
    AttentionPooling,
    to_depth,
)
from .losses_vit_embed import (
    CONTRASTIVE_LOSSES,
    DEPTH_LOSSES,
    contrastive_logits,
    gather_batch,
)

NORMS = {
    "layer_norm": nn.LayerNorm,
    "rms_norm": nn.RMSNorm,
    "none": lambda width, eps: nn.Identity(),
}

# Implementations that are told to be causal by a flag; every other one is given the causal mask as a tensor.
CAUSAL_BY_FLAG = ("sdpa", "flash_attention_2", "flash_attention_3")

# Implementations with which the last layer can run on the pooled rows alone: they take any number of queries and any mask.
QUERY_SUBSET = ("eager", "sdpa")

# SigLIP's start: almost every pair of a batch is a negative (arXiv:2303.15343 section 3.2).
SIGMOID_LOGIT_BIAS_INIT = -10.0


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


def select_rows(hidden_states: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """(B, L, D) and row numbers (B, R) -> (B, R, D); without row numbers, all rows."""
    if rows is None:
        return hidden_states
    return hidden_states.gather(1, rows[:, :, None].expand(-1, -1, hidden_states.shape[-1]))


class VitEmbedAttention(nn.Module):
    """Multi-head attention with separate q, k, v and output projections (arXiv:1706.03762 section 3.2.2)."""

    def __init__(self, config: VitEmbedConfig | VitEmbedTextConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.head_dim = width // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False  # read by transformers' attention functions when a call does not say
        self.k_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.q_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        rows: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, L, D) -> (B, Q, D) with Q = L, or the number of `rows`; and the weights (B, h, Q, L) if asked for."""
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
        return self.out_proj(mixed.flatten(2)), weights if output_attentions else None


class VitEmbedMLP(nn.Module):
    """fc1, activation, fc2. (B, L, D) -> the same."""

    def __init__(self, config: VitEmbedConfig | VitEmbedTextConfig):
        super().__init__()
        self.config = config
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class VitEmbedLayer(GradientCheckpointingLayer):
    """Attention and MLP, each a branch on the residual stream: x + f(norm(x)) for "pre", norm(x + f(x)) for "post"."""

    def __init__(self, config: VitEmbedConfig | VitEmbedTextConfig, drop_path_rate: float = 0.0):
        super().__init__()
        width = config.hidden_size
        self.norm_first = config.norm_position == "pre"
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
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, L, D) -> (B, L, D), or (B, R, D) for row numbers (B, R); and the attention weights if asked for."""
        residual = select_rows(hidden_states, rows)
        if self.norm_first:
            hidden_states = self.layer_norm1(hidden_states)
        mixed, weights = self.self_attn(hidden_states, attention_mask, is_causal, rows, output_attentions)
        hidden_states = residual + self._scaled(mixed, self.layer_scale1)
        if not self.norm_first:
            hidden_states = self.layer_norm1(hidden_states)

        residual = hidden_states
        if self.norm_first:
            hidden_states = self.layer_norm2(hidden_states)
        hidden_states = residual + self._scaled(self.mlp(hidden_states), self.layer_scale2)
        if not self.norm_first:
            hidden_states = self.layer_norm2(hidden_states)
        return hidden_states, weights

    def _scaled(self, branch: torch.Tensor, layer_scale: torch.Tensor | None) -> torch.Tensor:
        branch = self.dropout(branch)
        if layer_scale is not None:
            branch = branch * layer_scale
        return drop_path(branch, self.drop_path_rate, self.training)


class EncoderOutput(NamedTuple):
    """What the layers give: last_hidden_state (B, L, D), or (B, R, D) where rows were asked for; one entry a layer in
    attentions (B, h, L, L), and the input besides in hidden_states (B, L, D); each None unless asked for."""

    last_hidden_state: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None
    attentions: tuple[torch.Tensor, ...] | None


class VitEmbedEncoder(nn.Module):
    """The stack of layers that both towers use."""

    def __init__(self, config: VitEmbedConfig | VitEmbedTextConfig):
        super().__init__()
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
    ) -> EncoderOutput:
        """
        Args:
            hidden_states: (B, L, D).
            attention_mask: added to the scores of every layer, broadcast to (B, h, L, L), or None.
            is_causal: whether a token sees only itself and those before it (for implementations without a mask).
            last_rows: row numbers (B, R). The last layer then computes these rows alone: the same numbers for
                1 / num_hidden_layers less work, as no later layer reads the others.
            last_mask: as attention_mask, for `last_rows`: broadcast to (B, h, R, L).
        """
        all_hidden_states, all_attentions = [hidden_states], []
        for layer in self.layers[:-1]:
            hidden_states, weights = layer(hidden_states, attention_mask, is_causal, None, output_attentions)
            all_hidden_states.append(hidden_states)
            all_attentions.append(weights)
        if last_rows is not None:
            attention_mask, is_causal = last_mask, False
        hidden_states, weights = self.layers[-1](hidden_states, attention_mask, is_causal, last_rows, output_attentions)
        all_hidden_states.append(hidden_states)
        all_attentions.append(weights)
        return EncoderOutput(
            hidden_states,
            tuple(all_hidden_states) if output_hidden_states else None,
            tuple(all_attentions) if output_attentions else None,
        )


def _fill(parameter: nn.Parameter | None, initialise, **options) -> None:
    """Initialises a parameter unless there is none or transformers has marked it as loaded.

    transformers calls `_init_weights` for a whole module when one of its keys is missing: without this its neighbours,
    already loaded, would start over.
    """
    if parameter is not None and not getattr(parameter, "_is_hf_initialized", False):
        initialise(parameter, **options)


class VitEmbedTower(PreTrainedModel):
    """What the image and the text side share: how weights start, and what transformers may do with the layers."""

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Non-persistent tables that CLIP checkpoints of transformers < 4.31 carry.
    _keys_to_ignore_on_load_unexpected = [r"embeddings\.position_ids$"]

    def __init__(self, config: VitEmbedConfig | VitEmbedTextConfig):
        config.validate_architecture()  # fields may have been set since the config was made
        super().__init__(config)

    def _init_weights(self, module: nn.Module) -> None:
        """CLIP's initialisation, as in its reference code (arXiv:2103.00020 section 2.4), of what is not loaded yet."""
        config, factor = self.config, self.config.initializer_factor
        width, depth = config.hidden_size, config.num_hidden_layers
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            _fill(module.weight, nn.init.ones_)
            _fill(getattr(module, "bias", None), nn.init.zeros_)
        elif isinstance(module, nn.Linear):
            _fill(module.weight, nn.init.normal_, std=width**-0.5 * factor)
            _fill(module.bias, nn.init.zeros_)
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            _fill(module.weight, nn.init.kaiming_normal_, nonlinearity="relu")
            _fill(module.bias, nn.init.zeros_)
        elif isinstance(module, nn.Embedding):
            _fill(module.weight, nn.init.normal_, std=config.initializer_range * factor)
        elif isinstance(module, VitEmbedAttention):
            for projection in (module.q_proj, module.k_proj, module.v_proj):
                _fill(projection.weight, nn.init.normal_, std=width**-0.5 * (2 * depth) ** -0.5 * factor)
        elif isinstance(module, VitEmbedMLP):
            _fill(module.fc1.weight, nn.init.normal_, std=(2 * width) ** -0.5 * factor)
            _fill(module.fc2.weight, nn.init.normal_, std=width**-0.5 * (2 * depth) ** -0.5 * factor)
        elif isinstance(module, VitEmbedLayer):
            _fill(module.layer_scale1, nn.init.constant_, val=config.layer_scale_init_value)
            _fill(module.layer_scale2, nn.init.constant_, val=config.layer_scale_init_value)
        elif isinstance(module, VitEmbedEmbeddings):
            _fill(module.class_embedding, nn.init.normal_, std=width**-0.5 * factor)
            _fill(module.register_tokens, nn.init.normal_, std=config.initializer_range * factor)
            _fill(module.patch_embedding.weight, nn.init.normal_, std=config.initializer_range * factor)
        elif isinstance(module, AttentionPooling):
            _fill(module.probe, nn.init.normal_, std=width**-0.5 * factor)
        elif isinstance(module, VitEmbedForContrastive):
            text_width = config.text_config.hidden_size
            _fill(module.text_projection.weight, nn.init.normal_, std=text_width**-0.5 * factor)
            _fill(module.logit_scale, nn.init.constant_, val=config.logit_scale_init_value)
            _fill(module.logit_bias, nn.init.constant_, val=SIGMOID_LOGIT_BIAS_INIT)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        """As in transformers, with the non-reentrant checkpoint unless told otherwise: the reentrant one gives no
        gradients to adapters on a frozen trunk."""
        chosen = {"use_reentrant": False} if gradient_checkpointing_kwargs is None else gradient_checkpointing_kwargs
        super().gradient_checkpointing_enable(gradient_checkpointing_kwargs=chosen, **kwargs)

    def _wants(self, output_attentions: bool | None, output_hidden_states: bool | None) -> tuple[bool, bool]:
        """What to return besides the result, from the call or else from the config."""
        config = self.config
        return (
            bool(config.output_attentions if output_attentions is None else output_attentions),
            bool(config.output_hidden_states if output_hidden_states is None else output_hidden_states),
        )

    def _returned(self, output: ModelOutput, return_dict: bool | None) -> ModelOutput | tuple:
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


def causal_mask(length: int, like: torch.Tensor) -> torch.Tensor:
    """(1, 1, T, T) in the dtype and on the device of `like`: 0 where a token may look, its lowest number elsewhere."""
    lowest = torch.finfo(like.dtype).min
    return torch.full((1, 1, length, length), lowest, dtype=like.dtype, device=like.device).triu(diagonal=1)


class VitEmbedTextModel(VitEmbedTower):
    """CLIP's text tower: a causal transformer, its last state normalised and read at the end-of-text token."""

    config_class = VitEmbedTextConfig
    base_model_prefix = "text_model"
    main_input_name = "input_ids"
    input_modalities = ("text",)
    _no_split_modules = ["VitEmbedTextEmbeddings", "VitEmbedLayer"]
    _keys_to_ignore_on_load_unexpected = [
        *VitEmbedTower._keys_to_ignore_on_load_unexpected,
        r"^vision_model\.",
        r"^(visual|text)_projection\.",
        r"^logit_(scale|bias)$",
    ]

    def __init__(self, config: VitEmbedTextConfig):
        super().__init__(config)
        self.embeddings = VitEmbedTextEmbeddings(config)
        self.encoder = VitEmbedEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.token_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.token_embedding = value

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple:
        """
        Args:
            input_ids: (B, T) token ids, each row with its end-of-text token and padded behind it.
            attention_mask: (B, T) of the tokenizer. What lies behind the end token cannot be seen before it, so the
                mask changes nothing; it is checked, as padding in front would.
            output_attentions, output_hidden_states, return_dict: as in transformers.

        Returns:
            last_hidden_state (B, T, D) after the final norm, pooler_output (B, D) at the first end-of-text token;
            hidden_states, one more than layers, before the final norm; attentions (B, h, T, T) a layer.

        Raises:
            ValueError: more tokens than `max_position_embeddings`, an id outside the vocabulary, a row without an end
                token, padding on the left.
        """
        output_attentions, output_hidden_states = self._wants(output_attentions, output_hidden_states)
        ends = self.end_of_text(input_ids, attention_mask)
        hidden_states = self.embeddings(input_ids)
        encoded = self.encoder(
            hidden_states,
            attention_mask=self._causal_mask(hidden_states, output_attentions),
            is_causal=True,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        last_hidden_state = self.final_layer_norm(encoded.last_hidden_state)  # (B, T, D)
        output = BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state,
            pooler_output=select_rows(last_hidden_state, ends[:, None])[:, 0],  # (B, D)
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return self._returned(output, return_dict)

    def pool(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """`pooler_output` (B, D) of `forward` for less work: no token behind the batch's last end-of-text token, and
        of the last layer the end-of-text rows alone. Exact, as under the causal mask nothing else can reach them."""
        ends = self.end_of_text(input_ids, attention_mask)
        if not torch.compiler.is_compiling():  # a length read from the data would break the graph
            input_ids = input_ids[:, : int(ends.max()) + 1]
        hidden_states = self.embeddings(input_ids)
        length = input_ids.shape[1]
        rows = last_mask = None
        if self.config._attn_implementation in QUERY_SUBSET:
            rows = ends[:, None]  # (B, 1)
            seen = torch.arange(length, device=rows.device) <= rows  # (B, T)
            lowest = torch.finfo(hidden_states.dtype).min
            last_mask = torch.zeros_like(seen, dtype=hidden_states.dtype).masked_fill(~seen, lowest)[:, None, None]
        encoded = self.encoder(
            hidden_states, self._causal_mask(hidden_states, False), True, last_rows=rows, last_mask=last_mask
        )
        ended = encoded.last_hidden_state if rows is not None else select_rows(encoded.last_hidden_state, ends[:, None])
        return self.final_layer_norm(ended)[:, 0]

    def end_of_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T) token ids -> (B,) place of the first end-of-text token. Raises as `forward` does."""
        config = self.config
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise ValueError(f"input_ids must be (batch, tokens) of integers, got {tuple(input_ids.shape)} of "
                             f"{input_ids.dtype}")
        if input_ids.shape[1] > config.max_position_embeddings:
            raise ValueError(
                f"input_ids must have at most max_position_embeddings={config.max_position_embeddings} tokens, got "
                f"{input_ids.shape[1]}; call the tokenizer with truncation=True, or split the text"
            )
        # Configs of other vocabularies than OpenAI's that still carry CLIP's legacy value pool as CLIP does.
        legacy = config.eos_token_id == LEGACY_EOS_TOKEN_ID
        is_end = input_ids == (input_ids.amax(dim=1, keepdim=True) if legacy else config.eos_token_id)
        ends = is_end.int().argmax(dim=1)
        if not torch.compiler.is_compiling():
            self._check_text(input_ids, is_end, ends, attention_mask)
        return ends

    def _check_text(
        self, input_ids: torch.Tensor, is_end: torch.Tensor, ends: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> None:
        config = self.config
        outside = (input_ids < 0) | (input_ids >= config.vocab_size)
        if outside.any():
            raise ValueError(
                f"input_ids must be in [0, vocab_size={config.vocab_size}), got {int(input_ids[outside][0])}; use the "
                "tokenizer of this checkpoint"
            )
        endless = ~is_end.any(dim=1)
        if endless.any():
            raise ValueError(
                f"every row of input_ids needs its end-of-text token {config.eos_token_id}, row "
                f"{int(endless.int().argmax())} has none; tokenize with add_special_tokens=True and do not cut the end off"
            )
        if attention_mask is not None and not select_rows(attention_mask.cumprod(1)[..., None], ends[:, None]).all():
            raise ValueError(
                "attention_mask hides a token before a row's end-of-text token; pad on the right (padding_side='right')"
            )

    def _causal_mask(self, hidden_states: torch.Tensor, output_attentions: bool) -> torch.Tensor | None:
        if self.config._attn_implementation in CAUSAL_BY_FLAG and not output_attentions:
            return None
        return causal_mask(hidden_states.shape[1], hidden_states)


class VitEmbedPreTrainedModel(VitEmbedTower):
    """Everything with an image tower: how a checkpoint is loaded at another image size, and what is saved with it."""

    config_class = VitEmbedConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["VitEmbedEmbeddings", "VitEmbedLayer"]
    # A vision-only class takes its trunk from a dual encoder's checkpoint and leaves the rest.
    _keys_to_ignore_on_load_unexpected = [
        *VitEmbedTower._keys_to_ignore_on_load_unexpected,
        r"^text_model\.",
        r"^(visual|text)_projection\.",
        r"^logit_(scale|bias)$",
    ]
    has_text_tower = False
    image_processor_type = "CLIPImageProcessor"

    @property
    def trunk(self) -> "VitEmbedModel":
        """The image tower, whichever class this is."""
        return self if isinstance(self, VitEmbedModel) else self.vision_model

    def get_input_embeddings(self) -> nn.Module:
        return self.trunk.embeddings.patch_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.trunk.embeddings.patch_embedding = value

    def enable_input_require_grads(self) -> None:
        """Makes the trunk's input require a gradient, which reentrant checkpointing of a frozen trunk needs.

        transformers hooks the input embedding's output, a tensor; a stem's output is tokens and their grid.
        """

        def require_grad(module, inputs, output):
            for tensor in output if isinstance(output, tuple) else (output,):
                if isinstance(tensor, torch.Tensor):
                    tensor.requires_grad_(True)

        towers = [module for module in self.modules() if isinstance(module, (VitEmbedModel, VitEmbedTextModel))]
        self._require_grads_hooks = [t.get_input_embeddings().register_forward_hook(require_grad) for t in towers]
        self._require_grads_hook = self._require_grads_hooks[0]

    def disable_input_require_grads(self) -> None:
        for hook in self._require_grads_hooks:
            hook.remove()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        config: PretrainedConfig | str | os.PathLike | None = None,
        image_size: int | tuple[int, int] | None = None,
        **kwargs,
    ):
        """As in transformers. With another `image_size`, given here or in `config`, than the checkpoint's, the model is
        loaded at the checkpoint's and its position table is then resampled; nothing is re-initialised.

        Raises:
            ValueError: `image_size` is not a multiple of the patch.
        """
        if image_size is None and isinstance(config, VitEmbedConfig):
            image_size = config.image_size
        if isinstance(config, VitEmbedConfig) and pretrained_model_name_or_path is not None:
            # Saved beside the weights, so it says what shape they have; absent where only weights were given.
            hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
            try:
                stored = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub_options)
            except OSError:
                stored = config
            config = copy.deepcopy(config)
            config.image_size = stored.image_size
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if image_size is not None:
            model.set_image_size(image_size)
        return loaded

    def set_image_size(self, image_size: int | tuple[int, int]) -> None:
        """Makes (height, width) in pixels the native size: the learned position table is resampled to its grid, in place.

        Raises:
            ValueError: a side is not a multiple of the patch.
        """
        changed = copy.deepcopy(self.config)
        changed.image_size = tuple(image_size) if isinstance(image_size, list) else image_size
        changed.validate_architecture()
        if changed.grid_size != self.config.grid_size:
            self.trunk.embeddings.resize_positions(changed.grid_size)
        self.config.image_size = changed.image_size

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As in transformers, and the folder is complete: code, the whole auto_map, and a processor.

        The processor's files are those of the checkpoint that this model was loaded from; without one, an image
        processor for `config.image_size` with CLIP's mean and standard deviation. Files already there stay.
        """
        config = self.config
        if not self.has_text_tower:
            self.config = config.vision_only()  # the weights saved have no text tower, so the config must not ask for one
        try:
            if kwargs.get("is_main_process", True):
                os.makedirs(save_directory, exist_ok=True)
                self._save_processor(save_directory)
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config = config

    def _save_processor(self, save_directory: str | os.PathLike) -> None:
        source = self.config._name_or_path
        names = PROCESSOR_FILES if self.has_text_tower else PROCESSOR_FILES[:1]
        found = {name: path for name in names if (path := _source_file(source, name)) is not None}
        image_processor = _image_processor_dict(self.config, self.image_processor_type)
        if PROCESSOR_FILES[0] in found:
            with open(found.pop(PROCESSOR_FILES[0]), encoding="utf-8") as file:
                image_processor = _adapted_image_processor(json.load(file), image_processor)
        for name, path in found.items():
            with open(path, "rb") as file:
                _write_if_absent(os.path.join(save_directory, name), file.read())
        text = json.dumps(image_processor, indent=2, sort_keys=True) + "\n"
        _write_if_absent(os.path.join(save_directory, PROCESSOR_FILES[0]), text.encode())
