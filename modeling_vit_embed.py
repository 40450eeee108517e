"""CLIP and ViT in one trunk: attention, layer, encoder, the two towers, and the classes that the Auto classes load.

Symbols, used in every shape comment: B batch, C channels, H W image pixels, gh gw patch rows and columns,
N = gh * gw patches, P prefix tokens (class token and registers), L = P + N, T text tokens, D hidden size, h heads.
Height comes before width everywhere.

The state dict of `VitEmbedForContrastive` is that of `transformers.CLIPModel`, key for key.
"""

import contextlib
import copy
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    DepthEstimatorOutput,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
)
from transformers.utils import ModelOutput

from .configuration_vit_embed import (
    GRIDLESS_STEMS,
    LEGACY_EOS_TOKEN_ID,
    NUM_DPT_TAPS,
    TOKEN_CHOOSING_STEMS,
    VitEmbedConfig,
    VitEmbedTextConfig,
    as_size,
)
from .embeddings_vit_embed import (
    LearnedPositions,
    VitEmbedEmbeddings,
    VitEmbedTextEmbeddings,
    image_sizes,
    sinusoidal_positions,
)
from .encoder_vit_embed import (
    NORMS,
    QUERY_SUBSET,
    VitEmbedEncoder,
    VitEmbedLayer,
    linear,
)
from .heads_vit_embed import (
    DEPTH_ACTIVATIONS,
    DEPTH_HEADS,
    AttentionPooling,
)
from .losses_vit_embed import (
    CONTRASTIVE_LOSSES,
    DEPTH_LOSSES,
    MAX_LOGIT_SCALE,
    contrastive_logits,
    gather_batch,
    gradient_matching_loss,
    same_group,
)
from .processor_files_vit_embed import (
    write_processor_files,
)
from .stems_vit_embed import (
    HybridStem,
    patchify,
    unpatchify,
)
from .tokens_vit_embed import (
    TokenLayout,
    key_bias,
    mean_of_patches,
    random_kept,
    select_rows,
    spread,
)

# Implementations that are told to be causal by a flag; every other one is given a causal mask.
CAUSAL_BY_FLAG = ("sdpa", "flash_attention_2", "flash_attention_3")

# Where a checkpoint is read from, among the keywords of `from_pretrained`.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

# What `save_pretrained(push_to_hub=True)` passes on to `push_to_hub`.
PUSH_OPTIONS = ("repo_id", "commit_message", "commit_description", "create_pr", "private", "revision", "tags", "token")

# Cross-entropy's mark for a row to leave out.
IGNORED_LABEL = -100

# SigLIP's start: almost every pair of a batch is a negative (arXiv:2303.15343 section 3.2).
SIGMOID_LOGIT_BIAS_INIT = -10.0


def _fill(parameter: torch.Tensor | None, initialise, **options) -> None:
    """Initialises a parameter, or a norm's statistic, where there is one.

    `initialise` is a function of `torch.nn.init`: those are what transformers 5 keeps from touching a loaded weight.
    """
    if parameter is not None:
        initialise(parameter, **options)


class VitEmbedTower(PreTrainedModel):
    """What the image and the text side share: how weights start, and what transformers may do with the layers."""

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _require_grads_hooks = []
    # Non-persistent tables that CLIP checkpoints of transformers < 4.31 carry.
    _keys_to_ignore_on_load_unexpected = [r"embeddings\.position_ids$"]

    def __init__(self, config: VitEmbedConfig | VitEmbedTextConfig):
        config.validate_architecture()  # fields may have been set since the config was made
        super().__init__(config)

    def _init_weights(self, module: nn.Module) -> None:
        """CLIP's initialisation, as in its reference code (arXiv:2103.00020 section 2.4)."""
        config, factor = self.config, self.config.initializer_factor
        width = config.hidden_size
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            _fill(module.weight, nn.init.ones_)
            _fill(getattr(module, "bias", None), nn.init.zeros_)
        elif hasattr(module, "init_std"):
            _fill(module.weight, nn.init.normal_, std=module.init_std)
            _fill(module.bias, nn.init.zeros_)
        elif isinstance(module, nn.Linear):
            _fill(module.weight, nn.init.normal_, std=width**-0.5 * factor)
            _fill(module.bias, nn.init.zeros_)
        elif isinstance(module, nn.BatchNorm2d):
            _fill(module.weight, nn.init.ones_)
            _fill(module.bias, nn.init.zeros_)
            _fill(module.running_mean, nn.init.zeros_)
            _fill(module.running_var, nn.init.ones_)
            _fill(module.num_batches_tracked, nn.init.zeros_)
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            _fill(module.weight, nn.init.kaiming_normal_, nonlinearity="relu")
            _fill(module.bias, nn.init.zeros_)
        elif isinstance(module, nn.Embedding):
            _fill(module.weight, nn.init.normal_, std=config.initializer_range * factor)
        elif isinstance(module, VitEmbedLayer):
            _fill(module.layer_scale1, nn.init.constant_, val=config.layer_scale_init_value)
            _fill(module.layer_scale2, nn.init.constant_, val=config.layer_scale_init_value)
        elif isinstance(module, VitEmbedEmbeddings):
            _fill(module.class_embedding, nn.init.normal_, std=width**-0.5 * factor)
            _fill(module.register_tokens, nn.init.normal_, std=config.initializer_range * factor)
        elif isinstance(module, AttentionPooling):
            _fill(module.probe, nn.init.normal_, std=width**-0.5 * factor)
        elif isinstance(module, VitEmbedPatchDecoder):
            _fill(module.mask_token, nn.init.normal_, std=config.initializer_range * factor)
        elif isinstance(module, VitEmbedForContrastive):
            _fill(module.logit_scale, nn.init.constant_, val=config.logit_scale_init_value)
            _fill(module.logit_bias, nn.init.constant_, val=SIGMOID_LOGIT_BIAS_INIT)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """True: every attention call looks the implementation up. transformers guesses from the text of the file."""
        return True

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], **kwargs) -> None:
        """As in transformers, for towers and decoder. A hybrid stem's backbone keeps its own: few have the choice."""
        hybrids = [module for module in self.modules() if isinstance(module, HybridStem)]
        backbones = [hybrid.backbone for hybrid in hybrids]
        for hybrid in hybrids:
            hybrid.backbone = None
        try:
            super().set_attn_implementation(attn_implementation, **kwargs)
        finally:
            for hybrid, backbone in zip(hybrids, backbones):
                hybrid.backbone = backbone
        for module in self.modules():
            if isinstance(module, VitEmbedPatchDecoder):
                module.config._attn_implementation = self.config._attn_implementation

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        """As in transformers, with the non-reentrant checkpoint unless told otherwise: the reentrant one gives no
        gradients to adapters on a frozen trunk."""
        chosen = {"use_reentrant": False} if gradient_checkpointing_kwargs is None else gradient_checkpointing_kwargs
        super().gradient_checkpointing_enable(gradient_checkpointing_kwargs=chosen, **kwargs)

    def enable_input_require_grads(self) -> None:
        """Makes the towers' input require a gradient, which reentrant checkpointing of a frozen trunk needs.

        transformers hooks the input embedding's output and takes it for a tensor; a stem's is a StemOutput.
        """

        def require_grad(module, inputs, output):
            (output[0] if isinstance(output, tuple) else output).requires_grad_(True)

        self.disable_input_require_grads()
        towers = [module for module in self.modules() if isinstance(module, (VitEmbedModel, VitEmbedTextModel))]
        self._require_grads_hooks = [t.get_input_embeddings().register_forward_hook(require_grad) for t in towers]

    def disable_input_require_grads(self) -> None:
        """Takes back `enable_input_require_grads`."""
        for hook in self._require_grads_hooks:
            hook.remove()
        self._require_grads_hooks = []

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


# Which place of a row (B, T) its text is read at, (B,), from the place of the first end-of-text token and T. The names
# are `configuration_vit_embed.TEXT_POOLING_TYPES`.
TEXT_PLACES = {
    "eos": lambda ends, length: ends,
    "first": lambda ends, length: torch.zeros_like(ends),
    "last": lambda ends, length: torch.full_like(ends, length - 1),
}


class VitEmbedTextModel(VitEmbedTower):
    """The text tower: a transformer, its last state normalised and read at one place; CLIP's is causal and read at the
    end-of-text token.

    Where `config.reads_padding`, what stands behind a text changes its vector. Such towers were trained on rows of one
    length, so rows are padded here to `max_position_embeddings` tokens of `pad_token_id`, and so is what attention_mask
    hides: the result does not depend on how much padding the tokenizer gave.
    """

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
            input_ids: (B, T) token ids, padded behind the text; with pooling_type="eos" each row with its end-of-text
                token.
            attention_mask: (B, T) of the tokenizer. What lies behind the end token cannot be seen before it under a
                causal mask, so there it changes nothing; it is checked, as padding in front would. Where
                `config.reads_padding`, what it hides is padding, whatever ids stand there.
            output_attentions, output_hidden_states, return_dict: as in transformers.

        Returns:
            last_hidden_state (B, T, D) after the final norm, pooler_output (B, D) at the place that `pooling_type`
            reads; hidden_states, one more than layers, before the final norm; attentions (B, h, T, T) a layer. Where
            `config.reads_padding`, T is `max_position_embeddings`.

        Raises:
            ValueError: more tokens than `max_position_embeddings`, an id outside the vocabulary, a row without an end
                token that is to be read there, padding on the left.
        """
        output_attentions, output_hidden_states = self._wants(output_attentions, output_hidden_states)
        input_ids, places = self.read_text(input_ids, attention_mask)
        hidden_states = self.embeddings(input_ids)
        encoded = self.encoder(
            hidden_states,
            attention_mask=self._mask(hidden_states, "eager" if output_attentions else None),
            is_causal=self.config.use_causal_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        last_hidden_state = self.final_layer_norm(encoded.last_hidden_state)  # (B, T, D)
        output = BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state,
            pooler_output=select_rows(last_hidden_state, places[:, None])[:, 0],  # (B, D)
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return self._returned(output, return_dict)

    def pool(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """`pooler_output` (B, D) of `forward` for less work: of the last layer the rows that are read alone, and no
        token behind the batch's last end-of-text token where nothing reads the padding. Exact, as nothing else can
        reach them."""
        input_ids, places = self.read_text(input_ids, attention_mask)
        if not self.config.reads_padding and not torch.compiler.is_compiling():
            # A length read from the data would break the graph.
            input_ids = input_ids[:, : int(places.max()) + 1]
        hidden_states = self.embeddings(input_ids)
        rows = last_mask = None
        if self.config._attn_implementation in QUERY_SUBSET:
            rows = places[:, None]  # (B, 1)
            last_mask = self._mask_of_rows(hidden_states, rows)
        encoded = self.encoder(
            hidden_states,
            self._mask(hidden_states),
            is_causal=self.config.use_causal_mask,
            last_rows=rows,
            last_mask=last_mask,
        )
        states = encoded.last_hidden_state  # (B, T, D), or (B, 1, D) of the rows
        pooled = states if rows is not None else select_rows(states, places[:, None])
        return self.final_layer_norm(pooled)[:, 0]

    def _mask(self, hidden_states: torch.Tensor, implementation: str | None = None) -> torch.Tensor | BlockMask | None:
        """`causal_mask` for an implementation, by default the one that is set; None for a bidirectional tower."""
        if not self.config.use_causal_mask:
            return None
        return causal_mask(hidden_states, implementation or self.config._attn_implementation)

    def _mask_of_rows(self, hidden_states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
        """The lines of the mask for row numbers (B, 1), as (B, 1, 1, T); None for a bidirectional tower."""
        if not self.config.use_causal_mask:
            return None
        seen = torch.arange(hidden_states.shape[1], device=rows.device) <= rows  # (B, T)
        lowest = torch.finfo(hidden_states.dtype).min
        return torch.zeros_like(seen, dtype=hidden_states.dtype).masked_fill(~seen, lowest)[:, None, None]

    def read_text(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the encoder is given for a batch, and where its texts are read. Raises as `forward` does.

        Returns:
            (B, T) token ids, as they came or, where `config.reads_padding`, padded to `max_position_embeddings`; and
            (B,) places in them.
        """
        config = self.config
        ends = self.end_of_text(input_ids, attention_mask)
        if config.reads_padding:
            if attention_mask is not None:
                input_ids = input_ids.masked_fill(~attention_mask.bool(), config.pad_token_id)
            missing = config.max_position_embeddings - input_ids.shape[1]
            input_ids = F.pad(input_ids, (0, missing), value=config.pad_token_id)
        return input_ids, TEXT_PLACES[config.pooling_type](ends, input_ids.shape[1])

    def end_of_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T) token ids -> (B,) place of the first end-of-text token, 0 for a row that may go without one. Raises as
        `forward` does."""
        config = self.config
        if input_ids.dim() != 2 or 0 in input_ids.shape or input_ids.is_floating_point():
            raise ValueError(
                f"input_ids must be (batch, tokens) of integers, got {tuple(input_ids.shape)} of {input_ids.dtype}"
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids {tuple(input_ids.shape)}, got "
                f"{tuple(attention_mask.shape)}"
            )
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
            self._check_ids(input_ids)
            if config.pooling_type == "eos":
                self._check_ends(is_end, ends, attention_mask)
            if config.reads_padding and attention_mask is not None:
                self._check_padding(attention_mask)
        return ends

    def _check_ids(self, input_ids: torch.Tensor) -> None:
        vocab_size = self.config.vocab_size
        outside = (input_ids < 0) | (input_ids >= vocab_size)
        if outside.any():
            raise ValueError(
                f"input_ids must be in [0, vocab_size={vocab_size}), got {int(input_ids[outside][0])}; use the "
                "tokenizer of this checkpoint"
            )

    def _check_ends(self, is_end: torch.Tensor, ends: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        endless = ~is_end.any(dim=1)
        if endless.any():
            raise ValueError(
                f"every row of input_ids needs its end-of-text token {self.config.eos_token_id}, row "
                f"{int(endless.int().argmax())} has none; tokenize with add_special_tokens=True and keep the last token"
            )
        if attention_mask is not None and not attention_mask.cumprod(dim=1).gather(1, ends[:, None]).all():
            raise ValueError(
                "attention_mask hides a token before a row's end-of-text token; pad on the right (padding_side='right')"
            )

    @staticmethod
    def _check_padding(attention_mask: torch.Tensor) -> None:
        seen = attention_mask.bool()
        if (seen[:, 1:] & ~seen[:, :-1]).any():
            raise ValueError(
                "attention_mask hides a token before one that it shows; pad on the right (padding_side='right')"
            )


class VitEmbedPreTrainedModel(VitEmbedTower):
    """Everything with an image tower: how a checkpoint is loaded at another image size, and what is saved with it."""

    config_class = VitEmbedConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["VitEmbedEmbeddings", "VitEmbedLayer"]
    # A vision-only class takes its trunk from a dual encoder's or a masked autoencoder's checkpoint and leaves the
    # rest.
    _keys_to_ignore_on_load_unexpected = [
        *VitEmbedTower._keys_to_ignore_on_load_unexpected,
        r"^text_model\.",
        r"^(visual|text)_projection\.",
        r"^logit_(scale|bias)$",
        r"^decoder\.",
    ]
    has_text_tower = False
    image_processor_type = "CLIPImageProcessor"
    # The checkpoint that this model came from, and how it was reached: where `save_pretrained` finds the processor.
    _loaded_from = (None, {})

    @property
    def trunk(self) -> "VitEmbedModel":
        """The image tower, whichever class this is."""
        return self if isinstance(self, VitEmbedModel) else self.vision_model

    def get_input_embeddings(self) -> nn.Module:
        return self.trunk.embeddings.patch_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.trunk.embeddings.patch_embedding = value

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
        hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        merge_size = kwargs.pop("token_merge_size", None) if image_size is not None else None
        if isinstance(config, (str, os.PathLike)):
            config = cls.config_class.from_pretrained(config)
        # As remote code the config's class may come from another copy of the file than the one imported here.
        if isinstance(config, PretrainedConfig) and pretrained_model_name_or_path is not None:
            image_size = config.image_size if image_size is None else image_size
            # Saved beside the weights, so it says what shape they have; absent where only weights were given.
            try:
                stored = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub_options)
            except OSError:
                stored = config
            if stored.patch_shape == config.patch_shape:
                config = copy.deepcopy(config)
                # What may merge is held against the size asked for, below.
                merge_size = config.token_merge_size if merge_size is None else merge_size
                config.image_size, config.token_merge_size = stored.image_size, 0
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if pretrained_model_name_or_path is not None:
            source = os.fspath(pretrained_model_name_or_path)
            # Absolute, as it is looked at again from wherever the process is when it saves.
            source = os.path.abspath(source) if os.path.isdir(source) else source
            model._loaded_from = (source, {k: v for k, v in hub_options.items() if k != "force_download"})
        if image_size is not None:
            model.set_image_size(image_size)
        if merge_size is not None:
            model.config.token_merge_size = merge_size
            model.config.validate_architecture()
        return loaded

    def set_image_size(self, image_size: int | tuple[int, int]) -> None:
        """Makes (height, width) in pixels the native size: a learned position table is resampled to its grid, in place.

        Raises:
            ValueError: a side is not a multiple of the patch, and `pad_to_patch` is not set.
        """
        changed = copy.deepcopy(self.config)
        changed.image_size = as_size(image_size)
        changed.validate_architecture()
        positions = self.trunk.embeddings.position_embedding
        if isinstance(positions, LearnedPositions) and changed.grid_size != self.config.grid_size:
            positions.resize(changed.grid_size)
        self.config.image_size = changed.image_size

    def __getstate__(self) -> dict:
        """What pickle, deepcopy and `torch.save` take: everything but the access token of the load."""
        source, hub_options = self._loaded_from
        return {**self.__dict__, "_loaded_from": (source, {k: v for k, v in hub_options.items() if k != "token"})}

    def save_pretrained(self, save_directory: str | os.PathLike, *args, push_to_hub: bool = False, **kwargs) -> None:
        """As in transformers, and the folder is complete: code, the whole auto_map, and a processor.

        The processor's files are those of the checkpoint that this model was loaded from; without one, an image
        processor for `config.image_size` with CLIP's mean and standard deviation. Files already there stay. With
        `push_to_hub` the same is then pushed, to `repo_id` or else the name of the folder.
        """
        push_options = {name: kwargs.pop(name) for name in PUSH_OPTIONS if name in kwargs}
        config = self.config
        if not self.has_text_tower:
            # The weights saved have no text tower, so the config must not ask for one.
            self.config = config.vision_only()
        try:
            if kwargs.get("is_main_process", True):
                os.makedirs(save_directory, exist_ok=True)
                write_processor_files(
                    save_directory, self.config, self.image_processor_type, self.has_text_tower, *self._loaded_from
                )
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config = config
        if push_to_hub:
            # Not by transformers' own path: that uploads only what changed after our files were written.
            repo_id = push_options.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
            self.push_to_hub(repo_id, **push_options)


class VisionFeatures(NamedTuple):
    """What the trunk gives before pooling.

    last_hidden_state: (B, L, D), or (B, 1, D) where only the pooled row was asked for.
    layout: which patches the tokens of last_hidden_state stand for.
    hidden_states, attentions, layouts: as in EncoderOutput.
    feature_pyramid: maps of the stem, from fine to coarse, or None.
    loss: scalar of the stem that training adds to the head's, or None.
    """

    last_hidden_state: torch.Tensor
    layout: TokenLayout
    hidden_states: tuple[torch.Tensor, ...] | None
    attentions: tuple[torch.Tensor, ...] | None
    layouts: tuple[TokenLayout, ...]
    feature_pyramid: tuple[torch.Tensor, ...] | None
    loss: torch.Tensor | None


@dataclass
class VitEmbedModelOutput(BaseModelOutputWithPooling):
    """BaseModelOutputWithPooling, and feature_pyramid: maps of the stem (B, C_i, H_i, W_i), fine to coarse;
    stem_loss: scalar to add to the loss when training, of an adaptive stem (the classes with a loss have added it)."""

    feature_pyramid: tuple[torch.Tensor, ...] | None = None
    stem_loss: torch.Tensor | None = None


class VitEmbedModel(VitEmbedPreTrainedModel):
    """The image tower: pixels, or another encoder's patch features, -> tokens and one pooled vector."""

    def __init__(self, config: VitEmbedConfig):
        super().__init__(config)
        width, eps = config.hidden_size, config.layer_norm_eps
        self.embeddings = VitEmbedEmbeddings(config)
        # (sic) the name in every CLIP checkpoint
        self.pre_layrnorm = NORMS[config.norm_type if config.use_pre_layernorm else "none"](width, eps=eps)
        self.encoder = VitEmbedEncoder(config)
        self.post_layernorm = NORMS[config.resolved_final_norm_type](width, eps=eps)
        self.pooler = AttentionPooling(config) if config.pooling_type == "map" else None
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        patch_embeds: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> VitEmbedModelOutput | tuple:
        """
        Args:
            pixel_values: (B, C, H, W), normalised; H and W any multiples of the patch, or any with `pad_to_patch`.
            patch_embeds: (B, D, gh, gw) of another encoder, in place of pixel_values.
            pixel_mask: (B, H, W) for images of different sizes: 1 in the image, which lies in the top left corner, 0 in
                the padding. Each image then gives what it gives alone; its tokens come first in its row.
            output_attentions, output_hidden_states, return_dict: as in transformers.

        Returns:
            last_hidden_state (B, L, D) before the final norm, pooler_output (B, D) after it; hidden_states, one more
            than layers, the first of them the input of layer 1; attentions (B, h, L, L) a layer; feature_pyramid of a
            stem that has one. L is the prefix and one token a patch, fewer where the config reduces tokens.

        Raises:
            ValueError: not exactly one input, or one of the wrong shape.
        """
        wants = self._wants(output_attentions, output_hidden_states)
        features = self.forward_features(pixel_values, patch_embeds, pixel_mask, *wants)
        output = VitEmbedModelOutput(
            last_hidden_state=features.last_hidden_state,
            pooler_output=self.pool(features),
            hidden_states=features.hidden_states,
            attentions=features.attentions,
            feature_pyramid=features.feature_pyramid,
            stem_loss=features.loss if self.training else None,
        )
        return self._returned(output, return_dict)

    def forward_features(
        self,
        pixel_values: torch.Tensor | None = None,
        patch_embeds: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        pooled_only: bool = False,
        kept: torch.Tensor | None = None,
        num_kept: int | None = None,
    ) -> VisionFeatures:
        """Everything before pooling. With `pooled_only` the last layer computes no row that `pool` does not read;
        `kept` and `num_kept` choose patches, as in VitEmbedEmbeddings."""
        if pixel_mask is not None and self.config.token_merge_size and not self.training:
            raise ValueError(
                f"token_merge_size={self.config.token_merge_size} merges equally many tokens of every image, but "
                "pixel_mask pads images of different sizes; set token_merge_size=0, or batch images of one size"
            )
        embedded = self.embeddings(pixel_values, patch_embeds, pixel_mask, kept, num_kept)  # tokens: (B, L, D)
        hidden_states = self.pre_layrnorm(embedded.tokens)
        last_rows = None
        skips = pooled_only and not (output_attentions or output_hidden_states)
        if skips and self.config.pooling_type == "cls" and self.config._attn_implementation in QUERY_SUBSET:
            # the class token
            last_rows = torch.zeros(len(hidden_states), 1, dtype=torch.long, device=hidden_states.device)
        encoded = self.encoder(
            hidden_states,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            last_rows=last_rows,
            layout=embedded.layout,
        )
        return VisionFeatures(
            encoded.last_hidden_state,
            encoded.layouts[-1],
            encoded.hidden_states,
            encoded.attentions,
            encoded.layouts,
            embedded.feature_pyramid,
            embedded.loss,
        )

    def pool(self, features: VisionFeatures) -> torch.Tensor:
        """(B, D), normalised: after picking ("cls") or averaging the patches ("mean"), before attending ("map"), and
        before averaging with `norm_before_pooling`."""
        hidden_states, num_prefix = features.last_hidden_state, self.config.num_prefix_tokens
        if self.config.pooling_type == "map":
            bias = key_bias(features.layout, num_prefix, hidden_states.dtype)
            return self.pooler(self.post_layernorm(hidden_states), bias)
        if self.config.pooling_type == "mean":
            patches = hidden_states[:, num_prefix:]
            if self.config.norm_before_pooling:
                return mean_of_patches(self.post_layernorm(patches), features.layout)
            return self.post_layernorm(mean_of_patches(patches, features.layout))
        return self.post_layernorm(hidden_states[:, 0])

    def patch_grid(self, hidden_states: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """(B, L, D) and what its tokens stand for -> one token a patch, normalised, as (B, gh, gw, D); zeros in
        padding.

        Raises:
            ValueError: a stem without a grid, or patches that training has dropped.
        """
        require_grid(self.config, "a grid of patches")
        if self.training and self.config.patch_drop_rate:
            raise ValueError(
                f"patch_drop_rate={self.config.patch_drop_rate} leaves holes in the grid in training; set "
                "patch_drop_rate=0 for dense outputs"
            )
        patches = spread(self.post_layernorm(hidden_states[:, self.config.num_prefix_tokens :]), layout)
        return patches.unflatten(1, layout.grid_size)

    def feature_map(self, features: VisionFeatures, stage: int) -> torch.Tensor:
        """Hidden state number `stage`, which `features` must have, as a map (B, D, gh, gw). Raises as `patch_grid`
        does."""
        return self.patch_grid(features.hidden_states[stage], features.layouts[stage]).permute(0, 3, 1, 2)

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
        require_grid(self.config, "attention over a grid of patches")
        features = self.forward_features(pixel_values, patch_embeds, pixel_mask, output_attentions=True)
        layers = []
        for weights, layout in zip(features.attentions, features.layouts):
            weights = weights[:, :, 0, self.config.num_prefix_tokens :].transpose(1, 2)  # (B, n, h)
            if layout.sizes is not None:
                weights = weights / layout.sizes[..., None].clamp(min=1)
            layers.append(spread(weights, layout).transpose(1, 2))  # (B, h, N)
        return torch.stack(layers, dim=1).unflatten(-1, features.layout.grid_size)

    @torch.no_grad()
    def get_token_map(
        self,
        pixel_values: torch.Tensor | None = None,
        patch_embeds: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Which token stands for each patch behind the last layer: (B, gh, gw) counted from 0 behind the prefix, -1 for
        padding. Patches of equal number were given one token by an adaptive stem, or merged into one.

        Raises:
            ValueError: a stem without a grid, or a bad input.
        """
        require_grid(self.config, "a map of tokens")
        layout = self.forward_features(pixel_values, patch_embeds, pixel_mask).layout
        of_patch = layout.token_of_patch
        if of_patch is None:
            rows, columns = layout.grid_size
            batch = len(patch_embeds if pixel_values is None else pixel_values)
            of_patch = torch.arange(rows * columns, device=self.device).expand(batch, -1)
        return of_patch.unflatten(1, layout.grid_size)


def require_grid(config: VitEmbedConfig, purpose: str) -> None:
    """Raises ValueError for a stem whose tokens belong to no place in the image."""
    if config.stem_type in GRIDLESS_STEMS:
        raise ValueError(
            f"{purpose} cannot be had with stem_type={config.stem_type!r}: its tokens belong to no place in the "
            "image; use another stem_type"
        )


def freeze_pooler(trunk: VitEmbedModel) -> None:
    """Leaves attention pooling out of training, for heads that read patches alone: DistributedDataParallel waits for a
    gradient of every parameter that asks for one."""
    if trunk.pooler is not None:
        trunk.pooler.requires_grad_(False)


def with_stem_loss(loss: torch.Tensor, stem_loss: torch.Tensor | None, training: bool) -> torch.Tensor:
    """A head's loss with what the stem adds to it in training."""
    return loss + stem_loss if training and stem_loss is not None else loss


class VitEmbedForImageClassification(VitEmbedPreTrainedModel):
    """A linear classifier on the pooled vector."""

    def __init__(self, config: VitEmbedConfig):
        super().__init__(config)
        self.vision_model = VitEmbedModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        patch_embeds: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput | tuple:
        """
        Args:
            pixel_values, patch_embeds, pixel_mask: as in VitEmbedModel.
            labels: (B,) class numbers, for cross-entropy, -100 for a row to leave out. With `problem_type=
                "multi_label_classification"` (B, num_labels) of 0 and 1, for binary cross-entropy; with "regression"
                numbers (B, num_labels), or (B,) for one label, for the mean squared error.

        Returns:
            loss if labels were given, logits (B, num_labels).

        Raises:
            ValueError: labels of the wrong shape, or class numbers outside [0, num_labels).
        """
        output_attentions, output_hidden_states = self._wants(output_attentions, output_hidden_states)
        features = self.vision_model.forward_features(
            pixel_values, patch_embeds, pixel_mask, output_attentions, output_hidden_states, pooled_only=True
        )
        logits = self.classifier(self.vision_model.pool(features))
        output = ImageClassifierOutput(
            loss=None if labels is None else with_stem_loss(self._loss(logits, labels), features.loss, self.training),
            logits=logits,
            hidden_states=features.hidden_states,
            attentions=features.attentions,
        )
        return self._returned(output, return_dict)

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        problem = self.config.problem_type or "single_label_classification"
        if problem == "single_label_classification":
            self._check_class_numbers(labels, logits)
            total = F.cross_entropy(logits.float(), labels.long(), ignore_index=IGNORED_LABEL, reduction="sum")
            return total / (labels != IGNORED_LABEL).sum().clamp(min=1)  # nothing to learn from is loss 0
        if labels.dim() == 1 and logits.shape[1] == 1:
            labels = labels[:, None]
        if labels.shape != logits.shape:
            raise ValueError(
                f"labels for problem_type={problem!r} must be {tuple(logits.shape)}, got {tuple(labels.shape)}"
            )
        if problem == "regression":
            return F.mse_loss(logits.float(), labels.float())
        return F.binary_cross_entropy_with_logits(logits.float(), labels.float())

    @staticmethod
    def _check_class_numbers(labels: torch.Tensor, logits: torch.Tensor) -> None:
        batch, num_labels = logits.shape
        if labels.shape != (batch,) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(
                f"labels must be ({batch},) class numbers, got {tuple(labels.shape)} of {labels.dtype}; set "
                "config.problem_type for multi-label or regression targets"
            )
        if torch.compiler.is_compiling():
            return
        outside = (labels < 0) | (labels >= num_labels)
        outside &= labels != IGNORED_LABEL
        if outside.any():
            raise ValueError(
                f"labels must be in [0, num_labels={num_labels}), got {int(labels[outside][0])}; load the model with "
                "num_labels=... of your data set"
            )


class VitEmbedForDepthEstimation(VitEmbedPreTrainedModel):
    """A dense head that predicts a depth for every pixel from the patch grid of one or four layers."""

    image_processor_type = "DPTImageProcessor"

    def __init__(self, config: VitEmbedConfig):
        super().__init__(config)
        require_grid(config, "depth")
        if config.patch_drop_rate:
            raise ValueError(
                f"depth needs every patch, but patch_drop_rate={config.patch_drop_rate} drops some in training; set "
                "patch_drop_rate=0"
            )
        self.vision_model = VitEmbedModel(config)
        freeze_pooler(self.vision_model)
        self.depth_head = DEPTH_HEADS[config.depth_head_type](config)
        self.taps = self._evenly_spaced_layers(config.num_hidden_layers, self.depth_head.num_taps)
        self.post_init()

    @staticmethod
    def _evenly_spaced_layers(num_layers: int, num_taps: int) -> list[int]:
        """Which hidden states the head reads; the last one always is among them. 12 layers, 4 taps: 3, 6, 9, 12."""
        if num_layers < num_taps:
            raise ValueError(
                f"depth_head_type='dpt' reads {NUM_DPT_TAPS} layers, but num_hidden_layers={num_layers}; use "
                "depth_head_type='deconv' or a deeper trunk"
            )
        return [round(num_layers * i / num_taps) for i in range(1, num_taps + 1)]

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        patch_embeds: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> DepthEstimatorOutput | tuple:
        """
        Args:
            pixel_values, patch_embeds, pixel_mask: as in VitEmbedModel.
            labels: (B, H', W') depths in the unit to be predicted; entries <= 0, NaN or infinite are left out. The
                prediction is resized to them for the loss.

        Returns:
            loss if labels were given; predicted_depth (B, H, W) > 0, in metres up to `max_depth`, unitless without one;
            any number with depth_activation="identity".

        Raises:
            ValueError: labels that are not one map of depths an image, or that depth_loss="silog" is to compare with
                depths that may be negative.
        """
        output_attentions, output_hidden_states = self._wants(output_attentions, output_hidden_states)
        if self.config.use_feature_pyramid:
            require_pyramid(patch_embeds, pixel_mask, "use_feature_pyramid=True")
        features = self.vision_model.forward_features(pixel_values, patch_embeds, pixel_mask, output_attentions, True)
        maps = self._maps(features)
        if pixel_mask is None:
            depth = self._depth(maps, self._image_shape(pixel_values, features.layout))  # (B, H, W)
        else:
            depth = self._depth_of_sizes(maps, image_sizes(pixel_mask, pixel_values), tuple(pixel_values.shape[2:]))
        output = DepthEstimatorOutput(
            loss=None if labels is None else self._loss(depth, labels, features, pixel_mask),
            predicted_depth=depth,
            hidden_states=features.hidden_states if output_hidden_states else None,
            attentions=features.attentions,
        )
        return self._returned(output, return_dict)

    def _maps(self, features: VisionFeatures) -> tuple[torch.Tensor, ...]:
        """What the head reads, fine and shallow first: maps of layers, or a pyramid's two finest and those of
        layers."""
        pyramid = features.feature_pyramid[-3:-1] if self.config.use_feature_pyramid else ()  # strides p / 4 and p / 2
        return (*pyramid, *(self.vision_model.feature_map(features, tap) for tap in self.taps[len(pyramid) :]))

    def _image_shape(self, pixel_values: torch.Tensor | None, layout: TokenLayout) -> tuple[int, int]:
        """(height, width) in pixels of the image, or of what another encoder's patch features cover."""
        if pixel_values is not None:
            return tuple(pixel_values.shape[2:])
        return tuple(count * side for count, side in zip(layout.grid_size, self.config.patch_shape))

    def _depth(self, maps: tuple[torch.Tensor, ...], image_shape: tuple[int, int]) -> torch.Tensor:
        """Maps of whole images -> (B, H, W): as the padded image, of which the padding is cut off."""
        activation = DEPTH_ACTIVATIONS[self.config.depth_activation]
        depth = activation(self.depth_head(maps), self.config.max_depth)  # (B, any, any)
        height, width = image_shape
        return resize_depth(depth, self.config.padded_shape(image_shape))[:, :height, :width]

    def _depth_of_sizes(
        self, maps: tuple[torch.Tensor, ...], sizes: list[tuple[int, int]], padded: tuple[int, int]
    ) -> torch.Tensor:
        """Depth of each image of a padded batch as if it were alone, (B, H, W), zeros in the padding."""
        depth = torch.zeros(len(sizes), *padded, device=maps[0].device)
        for height, width in sorted(set(sizes)):
            members = [i for i, size in enumerate(sizes) if size == (height, width)]
            rows, columns = self.config.grid_of((height, width))
            part = self._depth(tuple(each[members, :, :rows, :columns] for each in maps), (height, width))
            depth[members, :height, :width] = part
        return depth

    def _loss(
        self, depth: torch.Tensor, labels: torch.Tensor, features: VisionFeatures, pixel_mask: torch.Tensor | None
    ) -> torch.Tensor:
        if self.config.depth_activation == "identity" and self.config.depth_loss == "silog":
            raise ValueError(
                "depth_loss='silog' takes the logarithm of a depth, which may be negative with "
                "depth_activation='identity'; set depth_loss='l1' or 'l2'"
            )
        if labels.dim() != 3 or labels.shape[0] != depth.shape[0]:
            raise ValueError(
                f"labels must be (batch={depth.shape[0]}, height, width), one depth a pixel; got {tuple(labels.shape)}"
            )
        if pixel_mask is not None:
            if labels.shape != depth.shape:
                raise ValueError(
                    f"labels of a batch with pixel_mask must have its height and width {tuple(depth.shape[1:])}, as "
                    f"they are padded alike; got {tuple(labels.shape[1:])}"
                )
            labels = labels.masked_fill(~pixel_mask.bool(), 0)  # left out of the loss, whatever they say of the padding
        depth = depth if labels.shape == depth.shape else resize_depth(depth, tuple(labels.shape[1:]))
        loss = DEPTH_LOSSES[self.config.depth_loss](depth, labels)
        if self.config.depth_gradient_weight:
            loss = loss + self.config.depth_gradient_weight * gradient_matching_loss(depth, labels)
        return with_stem_loss(loss, features.loss, self.training)


def require_pyramid(patch_embeds: torch.Tensor | None, pixel_mask: torch.Tensor | None, reader: str) -> None:
    """Raises ValueError for inputs that have no feature pyramid."""
    for name, value in (("patch_embeds", patch_embeds), ("pixel_mask", pixel_mask)):
        if value is not None:
            raise ValueError(
                f"{reader} reads the stem's feature pyramid, which there is for pixel_values of one size only, got "
                f"{name}; leave {name} out or do not read the pyramid"
            )


def resize_depth(depth: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, h, w) -> (B, *size), bilinear: no new extremes, so the range of the depths holds."""
    return F.interpolate(depth[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def _check_flag(normalize: bool) -> None:
    """CLIP's second argument is the attention mask: given by place it must not pass for `normalize`."""
    if not isinstance(normalize, bool):
        raise TypeError(f"normalize must be True or False, got {type(normalize).__name__}; pass other inputs by name")


def visual_projection(config: VitEmbedConfig) -> nn.Module:
    """(..., D) -> (..., projection_dim): a linear layer, or nothing where the pooled vector is the embedding itself."""
    if not config.use_visual_projection:
        return nn.Identity()
    std = config.hidden_size**-0.5 * config.initializer_factor
    return linear(config.hidden_size, config.projection_dim, std, bias=False)


class VitEmbedProjectedModel(VitEmbedPreTrainedModel):
    """What reads images into the joint space: any class with a trunk `vision_model` and its `visual_projection`."""

    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        normalize: bool = False,
        patch_embeds: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Images in the joint space: (B, projection_dim), of unit length with `normalize`.

        Inputs as in VitEmbedModel.
        """
        _check_flag(normalize)
        features = self.vision_model.forward_features(pixel_values, patch_embeds, pixel_mask, pooled_only=True)
        projected = self.visual_projection(self.vision_model.pool(features))
        return F.normalize(projected, dim=-1) if normalize else projected

    def get_patch_features(
        self,
        pixel_values: torch.Tensor | None = None,
        patch_embeds: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Every patch in the joint space, unit length: (B, gh, gw, projection_dim); zeros in padding.

        `patches @ text_features.T` is then a similarity map of (B, gh, gw, texts), cosines in [-1, 1].
        """
        features = self.vision_model.forward_features(pixel_values, patch_embeds, pixel_mask)
        patches = self.vision_model.patch_grid(features.last_hidden_state, features.layout)
        return F.normalize(self.visual_projection(patches), dim=-1)


@dataclass
class VitEmbedProjectionOutput(ModelOutput):
    """What the image tower says of a batch, in the joint space and before it.

    image_embeds: (B, projection_dim), of whatever length, as those of transformers' CLIPVisionModelWithProjection.
    last_hidden_state, hidden_states, attentions, stem_loss: as in VitEmbedModelOutput.
    """

    image_embeds: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    stem_loss: torch.Tensor | None = None


class VitEmbedModelWithProjection(VitEmbedProjectedModel):
    """The image tower of a dual encoder with its projection into the joint space, without the text tower."""

    _keys_to_ignore_on_load_unexpected = [
        *VitEmbedTower._keys_to_ignore_on_load_unexpected,
        r"^text_model\.",
        r"^text_projection\.",
        r"^logit_(scale|bias)$",
        r"^decoder\.",
    ]

    def __init__(self, config: VitEmbedConfig):
        super().__init__(config)
        self.vision_model = VitEmbedModel(config)
        self.visual_projection = visual_projection(config)
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        patch_embeds: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> VitEmbedProjectionOutput | tuple:
        """Inputs as in VitEmbedModel. Returns as VitEmbedProjectionOutput says; `get_image_features` gives the same
        image_embeds for less work."""
        wants = self._wants(output_attentions, output_hidden_states)
        features = self.vision_model.forward_features(pixel_values, patch_embeds, pixel_mask, *wants)
        output = VitEmbedProjectionOutput(
            image_embeds=self.visual_projection(self.vision_model.pool(features)),  # (B, projection_dim)
            last_hidden_state=features.last_hidden_state,
            hidden_states=features.hidden_states,
            attentions=features.attentions,
            stem_loss=features.loss if self.training else None,
        )
        return self._returned(output, return_dict)


@dataclass
class VitEmbedContrastiveOutput(ModelOutput):
    """What two towers say of a batch.

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


class Embedded(NamedTuple):
    """What a tower of a dual encoder gives: embeds (B, projection_dim) of unit length, stem_loss as in VisionFeatures,
    hidden_states and attentions where they were asked for. All None for a tower with no input."""

    embeds: torch.Tensor | None = None
    stem_loss: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@contextlib.contextmanager
def unchanged(buffers: list[torch.Tensor]) -> Iterator[None]:
    """Gives the buffers their values back at the end: what is computed again counts once in running statistics."""
    values = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, values):
                buffer.copy_(value)


class VitEmbedForContrastive(VitEmbedProjectedModel):
    """CLIP: images and texts in one space, where a cosine says how well they go together."""

    has_text_tower = True
    input_modalities = ("image", "text")
    _no_split_modules = ["VitEmbedEmbeddings", "VitEmbedTextEmbeddings", "VitEmbedLayer"]
    _keys_to_ignore_on_load_unexpected = [*VitEmbedTower._keys_to_ignore_on_load_unexpected, r"^decoder\."]

    def __init__(self, config: VitEmbedConfig):
        super().__init__(config)
        if config.text_config is None:
            raise ValueError(
                "VitEmbedForContrastive needs a text tower, but text_config is None; give the config a "
                "VitEmbedTextConfig, or load a vision-only checkpoint with VitEmbedModel"
            )
        self.vision_model = VitEmbedModel(config)
        self.text_model = VitEmbedTextModel(config.text_config)
        self.visual_projection = visual_projection(config)
        text_width = config.text_config.hidden_size
        text_std = text_width**-0.5 * config.initializer_factor
        self.text_projection = linear(
            text_width, config.projection_dim, text_std, bias=config.text_config.projection_bias
        )
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.logit_bias = (
            nn.Parameter(torch.tensor(SIGMOID_LOGIT_BIAS_INIT)) if config.contrastive_loss == "sigmoid" else None
        )
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        patch_embeds: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        return_loss: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        group_ids: torch.Tensor | None = None,
    ) -> VitEmbedContrastiveOutput | tuple:
        """
        Args:
            pixel_values, patch_embeds, pixel_mask: images, as in VitEmbedModel. Without images only text_embeds are
                returned.
            input_ids, attention_mask: texts, as in VitEmbedTextModel. Without texts only image_embeds are returned.
            return_loss: whether to return the loss; there is one where image i and text i are a pair, so with
                as many images as texts. Under torch.distributed it is the loss of the joined batch of all processes.
            group_ids: (B,) int64, for batches in which several pairs say the same, as equal captions do: image i and
                text j of pairs with equal ids are not negatives of each other in the loss. Under torch.distributed
                every process gives them, or none.

        Returns:
            as VitEmbedContrastiveOutput says.

        Raises:
            ValueError: neither images nor texts, a bad input to a tower, or group_ids of another shape or type.
        """
        if pixel_values is None and patch_embeds is None and input_ids is None:
            raise ValueError("give images (pixel_values or patch_embeds), texts (input_ids), or both; got neither")
        wants = self._wants(output_attentions, output_hidden_states)
        images = texts = Embedded()
        if pixel_values is not None or patch_embeds is not None:
            images = self._in_chunks(self._embed_images, (pixel_values, patch_embeds, pixel_mask), *wants)
        if input_ids is not None:
            texts = self._in_chunks(self._embed_texts, (input_ids, attention_mask), *wants)
        loss = logits = None
        if images.embeds is not None and texts.embeds is not None:
            self._bound_logit_scale()
            logits = self._logits(images.embeds, texts.embeds)  # (images, texts)
            if return_loss and logits.shape[0] == logits.shape[1]:
                loss = self._loss(logits, images.embeds, texts.embeds, group_ids)
                loss = with_stem_loss(loss, images.stem_loss, self.training)
        output = VitEmbedContrastiveOutput(
            loss=loss,
            logits_per_image=logits,
            logits_per_text=None if logits is None else logits.t(),
            image_embeds=images.embeds,
            text_embeds=texts.embeds,
            hidden_states=images.hidden_states,
            attentions=images.attentions,
            text_hidden_states=texts.hidden_states,
            text_attentions=texts.attentions,
        )
        return self._returned(output, return_dict)

    def get_text_features(
        self, input_ids: torch.Tensor, normalize: bool = False, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Texts in the joint space: (B, projection_dim), of unit length with `normalize`.

        Inputs as in VitEmbedTextModel.
        """
        _check_flag(normalize)
        projected = self.text_projection(self.text_model.pool(input_ids, attention_mask))
        return F.normalize(projected, dim=-1) if normalize else projected

    def _embed_images(
        self,
        pixel_values: torch.Tensor | None,
        patch_embeds: torch.Tensor | None,
        pixel_mask: torch.Tensor | None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> Embedded:
        features = self.vision_model.forward_features(
            pixel_values, patch_embeds, pixel_mask, output_attentions, output_hidden_states, pooled_only=True
        )
        embeds = F.normalize(self.visual_projection(self.vision_model.pool(features)), dim=-1)
        return Embedded(embeds, features.loss, features.hidden_states, features.attentions)

    def _embed_texts(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> Embedded:
        """By the short way, or the long way with what is asked for besides."""
        hidden_states = attentions = None
        if output_attentions or output_hidden_states:
            read = self.text_model(input_ids, attention_mask, output_attentions, output_hidden_states, return_dict=True)
            pooled, hidden_states, attentions = read.pooler_output, read.hidden_states, read.attentions
        else:
            pooled = self.text_model.pool(input_ids, attention_mask)
        return Embedded(F.normalize(self.text_projection(pooled), dim=-1), None, hidden_states, attentions)

    def _in_chunks(
        self,
        embed: Callable[..., Embedded],
        inputs: tuple[torch.Tensor | None, ...],
        output_attentions: bool,
        output_hidden_states: bool,
    ) -> Embedded:
        """`embed(*inputs)`, in training `contrastive_chunk_size` rows at a time: only the embeddings are kept, and the
        backward pass of a chunk embeds it again, with the same random numbers.

        The gradients are those of the whole batch. What a batch is measured by is measured by the chunk: batch norm's
        statistics, whose running ones move once a chunk, and an adaptive stem's budget, of which the mean is taken.
        """
        size = self.config.contrastive_chunk_size
        if size is None or not (self.training and torch.is_grad_enabled()):
            return embed(*inputs, output_attentions, output_hidden_states)
        if output_attentions or output_hidden_states:
            raise ValueError(
                f"contrastive_chunk_size={size} keeps nothing of a batch in training but its embeddings; leave "
                "output_attentions and output_hidden_states out, or set contrastive_chunk_size=None"
            )
        batch = next(len(rows) for rows in inputs if rows is not None)
        count = math.ceil(batch / size)
        if count <= 1:
            return embed(*inputs)
        # Even chunks: batch norm would see a remainder of one image.
        columns = [[None] * count if rows is None else rows.tensor_split(count) for rows in inputs]
        statistics = list(self.buffers())
        parts = [
            checkpoint(
                embed,
                *chunk,
                use_reentrant=False,
                context_fn=lambda: (contextlib.nullcontext(), unchanged(statistics)),
            )
            for chunk in zip(*columns)
        ]
        embeds = torch.cat([part.embeds for part in parts])
        stem_losses = [part.stem_loss * (len(part.embeds) / batch) for part in parts if part.stem_loss is not None]
        return Embedded(embeds, sum(stem_losses) if stem_losses else None)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        """As in transformers, for the text tower."""
        return self.text_model.resize_token_embeddings(*args, **kwargs)

    def _bound_logit_scale(self) -> None:
        """As OpenAI trains: the parameter itself stays in bounds, for beyond them it would get no gradient back. Once a
        pass, before it is read: a backward pass refuses what was written to since."""
        if self.training and self.logit_bias is None:
            with torch.no_grad():
                self.logit_scale.clamp_(max=MAX_LOGIT_SCALE)

    def _logits(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        return contrastive_logits(image_embeds, text_embeds, self.logit_scale, self.logit_bias)

    def _loss(
        self,
        logits: torch.Tensor,
        image_embeds: torch.Tensor,
        text_embeds: torch.Tensor,
        group_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """Of the joined batch of all processes; `logits` are those of this process and serve where it is alone."""
        ignored = None
        if group_ids is not None:
            self._check_group_ids(group_ids, len(image_embeds))
            ignored = same_group(gather_batch(group_ids[:, None])[:, 0])
        all_image_embeds, all_text_embeds = gather_batch(image_embeds), gather_batch(text_embeds)
        if all_image_embeds is not image_embeds:
            logits = self._logits(all_image_embeds, all_text_embeds)
        beta = self.config.hard_negative_beta
        options = {"hard_negative_beta": beta} if beta else {}  # of the softmax loss alone, as the config sees to
        return CONTRASTIVE_LOSSES[self.config.contrastive_loss](logits, ignored, **options)

    @staticmethod
    def _check_group_ids(group_ids: torch.Tensor, batch: int) -> None:
        if group_ids.shape != (batch,) or group_ids.dtype != torch.int64:
            raise ValueError(
                f"group_ids must be (batch={batch},) of torch.int64, one number a pair; got {tuple(group_ids.shape)} "
                f"of {group_ids.dtype}"
            )


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

    def forward(self, tokens: torch.Tensor, layout: TokenLayout, num_prefix_tokens: int) -> torch.Tensor:
        """The encoder's tokens (B, P + n, D) and what they stand for -> every patch's values (B, N, C * ph * pw)."""
        # In the precision of the weights, whatever autocast makes of the projection.
        hidden_states = self.projection(tokens).to(self.mask_token.dtype)
        prefix, seen = hidden_states[:, :num_prefix_tokens], hidden_states[:, num_prefix_tokens:]
        is_seen = (layout.token_of_patch >= 0)[..., None]  # (B, N, 1)
        patches = torch.where(is_seen, spread(seen, layout), self.mask_token)
        positions = sinusoidal_positions(layout.grid_size, self.config.hidden_size, patches.device)
        patches = patches + positions.to(patches.dtype)
        decoded = self.encoder(torch.cat([prefix, patches], dim=1)).last_hidden_state[:, num_prefix_tokens:]
        return self.prediction(self.layernorm(decoded))


@dataclass
class VitEmbedMaskedImageModelingOutput(MaskedImageModelingOutput):
    """MaskedImageModelingOutput, and mask: (B, gh, gw) bool, True for the patches that were hidden."""

    mask: torch.Tensor | None = None


class VitEmbedForMaskedImageModeling(VitEmbedPreTrainedModel):
    """Masked autoencoding: the trunk sees a few patches, a light decoder predicts the pixels of the others.

    Source: arXiv:2111.06377 section 3. Stems that mix the pixels of neighbouring patches get images with the hidden
    patches blanked, so that nothing of them leaks.
    """

    def __init__(self, config: VitEmbedConfig):
        super().__init__(config)
        if config.stem_type in TOKEN_CHOOSING_STEMS:
            raise ValueError(
                f"masked image modelling hides patches, but stem_type={config.stem_type!r} chooses its tokens "
                "itself; use another stem_type"
            )
        whole = tuple(size // side for size, side in zip(config.padded_shape(config.image_shape), config.patch_shape))
        if config.grid_size != whole:
            raise ValueError(
                f"masked image modelling needs one token a patch, {whole} for this image_size, but patch_kernel_size="
                f"{config.patch_kernel_size!r} with patch_size={config.patch_size!r} gives {config.grid_size}; use a "
                "kernel of patch_size plus an even number of at least patch_size pixels"
            )
        for name in ("patch_drop_rate", "token_merge_size"):
            if getattr(config, name):
                raise ValueError(
                    f"masked image modelling hides patches by mask_ratio and needs a token for each other one; set "
                    f"{name}=0, got {getattr(config, name)}"
                )
        self.vision_model = VitEmbedModel(config)
        freeze_pooler(self.vision_model)
        self.decoder = VitEmbedPatchDecoder(config.decoder_config(), config.hidden_size)
        self.decoder.config._attn_implementation = self.config._attn_implementation
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        return_loss: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> VitEmbedMaskedImageModelingOutput | tuple:
        """
        Args:
            pixel_values: (B, C, H, W), as in VitEmbedModel.
            bool_masked_pos: (B, N) or (B, gh, gw) bool, True for patches to hide, at least one of each image left; None
                hides `mask_ratio` of them at random.
            return_loss: whether to return the loss. It needs no labels; padding of `pad_to_patch` counts as pixels of
                0.

        Returns:
            loss: mean squared error over the values of the hidden patches, each patch less its mean and over its
                standard deviation with `norm_pix_loss`.
            reconstruction: (B, C, H, W), what the decoder predicts for every patch, in the units of pixel_values; with
                `norm_pix_loss` each patch gets the mean and deviation of the picture's own.
            mask: (B, gh, gw) bool, True for the hidden patches. hidden_states, attentions: of the trunk.

        Raises:
            ValueError: a mask of the wrong shape, or one that hides a whole image.
        """
        wants = self._wants(output_attentions, output_hidden_states)
        trunk, patch = self.vision_model, self.config.patch_shape
        trunk.embeddings.check_pixel_values(pixel_values)
        image_shape = tuple(pixel_values.shape[2:])
        grid_size = self.config.grid_of(image_shape)
        height, width = self.config.padded_shape(image_shape)
        padded = F.pad(pixel_values, (0, width - image_shape[1], 0, height - image_shape[0]))
        kept, num_kept = self._kept(bool_masked_pos, len(pixel_values), grid_size)  # (B, N)
        visible = padded
        if not trunk.embeddings.patch_embedding.is_local:
            visible = unpatchify(patchify(padded, patch) * kept[..., None], grid_size, patch)
        features = trunk.forward_features(visible, None, None, *wants, kept=kept, num_kept=num_kept)
        tokens = trunk.post_layernorm(features.last_hidden_state)
        predicted = self.decoder(tokens, features.layout, self.config.num_prefix_tokens).float()  # (B, N, C * ph * pw)
        patches = patchify(padded.float(), patch)
        mean, deviation = patch_statistics(patches) if self.config.norm_pix_loss else (0.0, 1.0)
        reconstruction = unpatchify(predicted.detach() * deviation + mean, grid_size, patch)
        output = VitEmbedMaskedImageModelingOutput(
            loss=masked_error(predicted, (patches - mean) / deviation, ~kept) if return_loss else None,
            reconstruction=reconstruction[..., : image_shape[0], : image_shape[1]],
            mask=~kept.unflatten(1, grid_size),
            hidden_states=features.hidden_states,
            attentions=features.attentions,
        )
        return self._returned(output, return_dict)

    def _kept(
        self, bool_masked_pos: torch.Tensor | None, batch: int, grid_size: tuple[int, int]
    ) -> tuple[torch.Tensor, int | None]:
        """(B, N) bool, True for the patches that the trunk sees, and how many of each image where that is known."""
        num_patches = math.prod(grid_size)
        if bool_masked_pos is None:
            return random_kept(batch, num_patches, self.config.mask_ratio, self.device)
        if bool_masked_pos.shape not in ((batch, num_patches), (batch, *grid_size)):
            raise ValueError(
                f"bool_masked_pos must be (batch={batch}, patches={num_patches}) or (batch, {grid_size[0]}, "
                f"{grid_size[1]}), got {tuple(bool_masked_pos.shape)}"
            )
        kept = ~bool_masked_pos.bool().flatten(1)
        if not kept.any(dim=1).all():
            raise ValueError("bool_masked_pos must leave at least one patch of each image, got an image with none")
        return kept, None


def masked_error(predicted: torch.Tensor, patches: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the hidden patches' values: (B, N, values) twice and (B, N) bool -> scalar, 0 for none."""
    errors = (predicted - patches).square().mean(dim=-1)  # (B, N)
    return (errors * hidden).sum() / hidden.sum().clamp(min=1)


def patch_statistics(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each patch's values: (B, N, values) -> twice (B, N, 1)."""
    # 1e-6 as in the paper's reference code: flat patches are common.
    return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()


class VitEmbedBackbone(VitEmbedPreTrainedModel):
    """The trunk as a feature extractor for dense models of transformers (segmentation, detection, depth)."""

    def __init__(self, config: VitEmbedConfig):
        super().__init__(config)
        require_grid(config, "a feature map")
        self.vision_model = VitEmbedModel(config)
        freeze_pooler(self.vision_model)
        self.post_init()

    @property
    def out_features(self) -> list[str]:
        """Names of the stages returned, among `config.stage_names`."""
        return self.config.out_features

    @property
    def out_indices(self) -> list[int]:
        """Their places among `stage_names`."""
        return [self.stage_names.index(name) for name in self.out_features]

    @property
    def stage_names(self) -> list[str]:
        """Every stage: maps of the stem if it has them, the input of the first layer, then the output of each."""
        return self.config.stage_names

    @property
    def out_feature_channels(self) -> dict[str, int]:
        """Channels of each stage: D, but for the stem's maps."""
        widths = self.config.pyramid_widths
        return {
            name: widths[i] if i < len(widths) else self.config.hidden_size for i, name in enumerate(self.stage_names)
        }

    @property
    def channels(self) -> list[int]:
        """Channels of each map returned."""
        return [self.out_feature_channels[name] for name in self.out_features]

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        patch_embeds: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BackboneOutput | tuple:
        """Inputs as in VitEmbedModel. Returns feature_maps, one for each of `out_features`: (B, D, gh, gw) after the
        final norm, or the stem's (B, C_i, H_i, W_i) as it is."""
        output_attentions, output_hidden_states = self._wants(output_attentions, output_hidden_states)
        num_maps = len(self.config.pyramid_widths)
        reads_pyramid = any(stage < num_maps for stage in self.out_indices)
        if reads_pyramid:
            require_pyramid(patch_embeds, pixel_mask, f"out_features={self.out_features}")
        features = self.vision_model.forward_features(pixel_values, patch_embeds, pixel_mask, output_attentions, True)
        maps = list(features.feature_pyramid) if reads_pyramid else [None] * num_maps
        for stage in range(len(features.hidden_states)):
            wanted = num_maps + stage in self.out_indices
            maps.append(self.vision_model.feature_map(features, stage) if wanted else None)
        output = BackboneOutput(
            feature_maps=tuple(maps[stage] for stage in self.out_indices),
            hidden_states=features.hidden_states if output_hidden_states else None,
            attentions=features.attentions,
        )
        return self._returned(output, return_dict)

    def forward_with_filtered_kwargs(self, *args, **kwargs) -> BackboneOutput | tuple:
        """What transformers' dense models call; the same as calling the backbone."""
        return self(*args, **kwargs)


class VitEmbedAutoModel(VitEmbedPreTrainedModel):
    """What AutoModel loads: both towers where the checkpoint has a text tower, else the image tower, with its
    projection where it was saved with one.

    One name for every checkpoint: transformers 5 remembers, for the whole process, which class AutoModel took for
    folders of one base name, and would give a dual encoder named like an earlier vision-only one no text tower.
    """

    @classmethod
    def class_for(cls, config: PretrainedConfig) -> type[VitEmbedPreTrainedModel]:
        """The class that a config describes."""
        if config.text_config is not None:
            return VitEmbedForContrastive
        with_projection = config.architectures == [VitEmbedModelWithProjection.__name__]
        return VitEmbedModelWithProjection if with_projection else VitEmbedModel

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *model_args, config: PretrainedConfig, **kwargs
    ):
        """As AutoModel calls it, with the config that it has read."""
        chosen = cls.class_for(config)
        return chosen.from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: PretrainedConfig, **kwargs):
        """As `AutoModel.from_config` calls it."""
        return cls.class_for(config)._from_config(config, **kwargs)


VitEmbedTextModel.register_for_auto_class("AutoModel")
VitEmbedModel.register_for_auto_class("AutoModel")
VitEmbedModelWithProjection.register_for_auto_class("AutoModel")
VitEmbedForImageClassification.register_for_auto_class("AutoModelForImageClassification")
VitEmbedForDepthEstimation.register_for_auto_class("AutoModelForDepthEstimation")
VitEmbedForContrastive.register_for_auto_class("AutoModelForZeroShotImageClassification")
VitEmbedForMaskedImageModeling.register_for_auto_class("AutoModelForMaskedImageModeling")
VitEmbedBackbone.register_for_auto_class("AutoBackbone")
