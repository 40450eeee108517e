"""CLIP and ViT in one trunk: the two towers, and the classes that the Auto classes load.

Symbols, used in every shape comment: B batch, C channels, H W image pixels, gh gw patch rows and columns,
N = gh * gw patches, P prefix tokens (class token and registers), L = P + N, T text tokens, D hidden size, h heads.
Height comes before width everywhere.

The state dict of `VitEmbedForContrastive` is that of `transformers.CLIPModel`, key for key.

The rules of a forward pass, which tests/test_forward_rules.py holds every class to:

1. Submodules are called. Nobody reads another module's weights, so hooks, compilation, sharding, offload and adapters
   work on any of them.
2. Dtype and device come from the inputs or a named weight of the same module: a replica of `nn.DataParallel` has no
   `parameters()`.
3. Shapes come from `.shape`, and no branch of a recorded graph depends on values.
4. Collectives belong to training steps: evaluation and passes without gradients are local.
5. No parameter is written to.
6. Losses take `num_items_in_batch`, so a step cut into batches and processes is the step in one.
7. Parts may lie on different devices.
8. A layer that is a layer of torch behaves as one.
9. On an accelerator a training step does not make the host wait, but for what `ChecksValues` and docstrings say.
10. What was not asked for is not kept.
11. What is frozen does not move, running statistics included.
"""

import copy
import functools
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    DepthEstimatorOutput,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
)
from transformers.utils import ModelOutput

from .classification_vit_embed import (
    CLASSIFICATION_LOSSES,
    problem_type,
)
from .configuration_vit_embed import (
    GRIDLESS_STEMS,
    LEGACY_EOS_TOKEN_ID,
    TOKEN_CHOOSING_STEMS,
    VitEmbedConfig,
    VitEmbedTextConfig,
    as_size,
)
from .contrastive_vit_embed import (
    CONTRASTIVE_LOSSES,
    SIGMOID_LOGIT_BIAS_INIT,
    Embedded,
    PairRows,
    contrastive_logits,
    embed_in_chunks,
    has_other_processes,
    joined_loss,
    same_group,
)
from .depth_vit_embed import (
    DEPTH_HEADS,
    depth_loss,
    evenly_spaced_layers,
    predict_depth,
    predict_depth_of_sizes,
)
from .embeddings_vit_embed import (
    VitEmbedEmbeddings,
    VitEmbedTextEmbeddings,
    in_whole_patches,
)
from .encoder_vit_embed import (
    NORMS,
    QUERY_SUBSET,
    VitEmbedEncoder,
    VitEmbedLayer,
    linear,
)
from .inputs_vit_embed import (
    ChecksValues,
    check_depth_labels,
    check_group_ids,
    check_images,
    check_normalize,
    check_pyramid_inputs,
    check_text_values,
    check_texts,
    image_sizes,
    is_on_host,
    is_traced,
)
from .losses_vit_embed import (
    total_items,
    with_stem_loss,
)
from .masked_vit_embed import (
    VitEmbedPatchDecoder,
    masked_error,
    patch_statistics,
    seen_patches,
)
from .pooling_vit_embed import (
    POOLED_TOKEN,
    POOLINGS,
    AttentionPooling,
)
from .processor_files_vit_embed import (
    write_processor_files,
)
from .stems_vit_embed import (
    STEMS,
    HybridStem,
    patchify,
    unpatchify,
)
from .tokens_vit_embed import (
    KeptPatches,
    Tokens,
    feature_map,
    patch_grid,
    select_rows,
    spread,
)

# Implementations that are told to be causal by a flag; every other one is given a causal mask.
CAUSAL_BY_FLAG = ("sdpa", "flash_attention_2", "flash_attention_3")

# Where a checkpoint is read from, among the keywords of `from_pretrained`.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

# What `save_pretrained(push_to_hub=True)` passes on to `push_to_hub`.
PUSH_OPTIONS = ("repo_id", "commit_message", "commit_description", "create_pr", "private", "revision", "tags", "token")


def _fill(parameter: torch.Tensor | None, initialise, **options) -> None:
    """Initialises a parameter, or a norm's statistic, where there is one.

    `initialise` is a function of `torch.nn.init`: those are what transformers 5 keeps from touching a loaded weight.
    """
    if parameter is not None:
        initialise(parameter, **options)


def with_output_options(forward: Callable[..., ModelOutput]) -> Callable[..., ModelOutput | tuple]:
    """Gives a `forward` the options of transformers: `output_attentions` and `output_hidden_states` reach it as bools,
    from the call or else from the config, and with `return_dict=False` its output becomes a tuple."""

    @functools.wraps(forward)
    def with_options(self, *args, output_attentions=None, output_hidden_states=None, return_dict=None, **kwargs):
        config = self.config
        output = forward(
            self,
            *args,
            output_attentions=bool(config.output_attentions if output_attentions is None else output_attentions),
            output_hidden_states=bool(
                config.output_hidden_states if output_hidden_states is None else output_hidden_states
            ),
            **kwargs,
        )
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    return with_options


class VitEmbedTower(ChecksValues, PreTrainedModel):
    """What the image and the text side share: how weights start, and what transformers may do with the layers."""

    supports_gradient_checkpointing = True
    # What Trainer asks: whether the loss takes `num_items_in_batch`.
    accepts_loss_kwargs = False
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

        transformers hooks the input embedding's output and takes it for a tensor; that of some stems is a Tokens.
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

    @with_output_options
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        *,
        pooled_only: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            input_ids: (B, T) token ids, padded behind the text; with pooling_type="eos" each row with its end-of-text
                token.
            attention_mask: (B, T) of the tokenizer. What lies behind the end token cannot be seen before it under a
                causal mask, so there it changes nothing; it is checked, as padding in front would. Where
                `config.reads_padding`, what it hides is padding, whatever ids stand there.
            position_ids: (1, T) or (B, T), which position each token has; None counts from 0.
            pooled_only: gives pooler_output alone, for less work: of the last layer the pooled rows, and on a CPU no
                token after the batch's last end of text where nothing reads the padding. Exact, as nothing else can
                reach them.
            output_attentions, output_hidden_states, return_dict: as in transformers.

        Returns:
            last_hidden_state (B, T, D) after the final norm, pooler_output (B, D) of the token that `pooling_type`
            names; hidden_states, one more than layers, before the final norm; attentions (B, h, T, T) a layer. Where
            `config.reads_padding`, T is `max_position_embeddings`.

        Raises:
            TypeError: an input that is no tensor.
            ValueError: more tokens than `max_position_embeddings`, another shape or dtype; and, as far as
                `input_checks` says, an id outside the vocabulary, a row without an end token that is to be pooled
                there, padding on the left.
        """
        config = self.config
        check_texts(config, input_ids, attention_mask, position_ids)
        pooled_only = pooled_only and not (output_attentions or output_hidden_states)
        input_ids, pooled = self._read(input_ids, attention_mask)  # (B, T), (B,)
        if pooled_only and not config.reads_padding and is_on_host(input_ids) and not is_traced():
            input_ids = input_ids[:, : int(pooled.max()) + 1]
        position_ids = None if position_ids is None else position_ids[:, : input_ids.shape[1]]
        hidden_states = self.embeddings(input_ids, position_ids)  # (B, T, D)
        rows = pooled[:, None] if pooled_only and config._attn_implementation in QUERY_SUBSET else None  # (B, 1)
        encoded = self.encoder(
            hidden_states,
            attention_mask=self._mask(hidden_states, "eager" if output_attentions else config._attn_implementation),
            is_causal=config.use_causal_mask,
            stages=range(config.num_hidden_layers + 1) if output_hidden_states else (),
            output_attentions=output_attentions,
            last_rows=rows,
            last_mask=None if rows is None else self._mask_of_rows(hidden_states, rows),
        )
        last_hidden_state = encoded.last.states  # (B, T, D), or (B, 1, D) of the rows
        if pooled_only and rows is None:
            last_hidden_state = select_rows(last_hidden_state, pooled[:, None])
        last_hidden_state = self.final_layer_norm(last_hidden_state)
        if not pooled_only:
            pooler_output = select_rows(last_hidden_state, pooled.to(last_hidden_state.device)[:, None])[:, 0]
        return BaseModelOutputWithPooling(
            last_hidden_state=None if pooled_only else last_hidden_state,
            pooler_output=last_hidden_state[:, 0] if pooled_only else pooler_output,  # (B, D)
            hidden_states=tuple(each.states for each in encoded.stages.values()) if output_hidden_states else None,
            attentions=encoded.attentions,
        )

    def _read(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T) token ids, as they came or, where `config.reads_padding`, padded to `max_position_embeddings`; and the
        index of each text's pooled token, (B,)."""
        config = self.config
        # Configs of other vocabularies than OpenAI's that still carry CLIP's legacy value pool as CLIP does.
        legacy = config.eos_token_id == LEGACY_EOS_TOKEN_ID
        is_end = input_ids == (input_ids.amax(dim=1, keepdim=True) if legacy else config.eos_token_id)
        ends = is_end.int().argmax(dim=1)  # (B,), 0 for a row that may go without an end
        if self.checks_values(input_ids):
            check_text_values(config, input_ids, attention_mask, is_end, ends)
        if config.reads_padding:
            if attention_mask is not None:
                input_ids = input_ids.masked_fill(~attention_mask.bool(), config.pad_token_id)
            missing = config.max_position_embeddings - input_ids.shape[1]
            input_ids = F.pad(input_ids, (0, missing), value=config.pad_token_id)
        return input_ids, POOLED_TOKEN[config.pooling_type](ends, input_ids.shape[1])

    def _mask(self, hidden_states: torch.Tensor, implementation: str) -> torch.Tensor | BlockMask | None:
        """`causal_mask` for an implementation; None for a bidirectional tower."""
        return causal_mask(hidden_states, implementation) if self.config.use_causal_mask else None

    def _mask_of_rows(self, hidden_states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
        """The lines of the mask for row numbers (B, 1), as (B, 1, 1, T); None for a bidirectional tower."""
        if not self.config.use_causal_mask:
            return None
        seen = torch.arange(hidden_states.shape[1], device=rows.device) <= rows  # (B, T)
        lowest = torch.finfo(hidden_states.dtype).min
        return torch.zeros_like(seen, dtype=hidden_states.dtype).masked_fill(~seen, lowest)[:, None, None]


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
        if changed.grid_size != self.config.grid_size and self.trunk.embeddings.has_positions_elsewhere:
            raise ValueError(
                f"image_size={image_size!r} resamples the position table, which device_map has offloaded; save it at "
                "this size first (from_pretrained(..., image_size=...).save_pretrained(folder)) and load that folder, "
                "or keep vision_model.embeddings on a device"
            )
        if changed.grid_size != self.config.grid_size:
            self.trunk.embeddings.resize_positions(changed.grid_size)
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


@dataclass
class VitEmbedModelOutput(BaseModelOutputWithPooling):
    """BaseModelOutputWithPooling, and feature_pyramid: maps of the stem (B, C_i, H_i, W_i), fine to coarse;
    stem_loss: scalar to add to the loss when training, of an adaptive stem (the classes with a loss have added it);
    stages: the hidden states asked for, normalised, with what their tokens stand for."""

    feature_pyramid: tuple[torch.Tensor, ...] | None = None
    stem_loss: torch.Tensor | None = None
    stages: tuple[Tokens, ...] | None = None


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

    @with_output_options
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        patch_embeds: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        *,
        interpolate_pos_encoding: bool | None = None,
        pooled_only: bool = False,
        stages: Collection[int] | None = None,
        kept: KeptPatches | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> VitEmbedModelOutput:
        """
        Args:
            pixel_values: (B, C, H, W), normalised; H and W any multiples of the patch, or any with `pad_to_patch`.
            patch_embeds: (B, D, gh, gw) of another encoder, in place of pixel_values.
            pixel_mask: (B, H, W) for images of different sizes: 1 in the image, which lies in the top left corner, 0 in
                the padding. Each image then gives what it gives alone; its tokens come first in its row. The sizes are
                read from the device.
            interpolate_pos_encoding: as in transformers; here positions are resampled to any grid unless this is False,
                which refuses other sizes than `image_size`.
            pooled_only: gives pooler_output alone, for less work: the last layer computes the class token only.
            stages: numbers of hidden states to give normalised, with their layouts, as `stages` in the order of their
                numbers, in place of the pooled vector: 0 is the input of layer 1, i the output of layer i.
            kept: the patches to go on with; None for all.
            output_attentions, output_hidden_states, return_dict: as in transformers.

        Returns:
            last_hidden_state (B, L, D) before the final norm, pooler_output (B, D) after it; hidden_states, one more
            than layers, the first of them the input of layer 1; attentions (B, h, L, L) a layer; feature_pyramid of a
            stem that has one. L is the prefix and one token a patch, fewer where the config reduces tokens.

        Raises:
            TypeError: an input that is no tensor.
            ValueError: not exactly one input, or one of the wrong shape or dtype.
        """
        config = self.config
        check_images(config, pixel_values, patch_embeds, pixel_mask, interpolate_pos_encoding, self.training)
        pooled_only = pooled_only and not (output_attentions or output_hidden_states)
        states, layout, feature_pyramid, stem_loss = self.embeddings(pixel_values, patch_embeds, pixel_mask, kept)
        states = self.pre_layrnorm(states)  # (B, L, D)
        one_row = pooled_only and config.pooling_type == "cls" and config._attn_implementation in QUERY_SUBSET
        encoded = self.encoder(
            states,
            layout=layout,
            stages=range(config.num_hidden_layers + 1) if output_hidden_states else stages or (),
            output_attentions=output_attentions,
            last_rows=slice(0, 1) if one_row else None,  # the class token
        )
        pooler_output = None
        if stages is None:
            pooler_output = POOLINGS[config.pooling_type](encoded.last, config, self.post_layernorm, self.pooler)
        else:
            stages = tuple(self._normalised(encoded.stages[number]) for number in sorted(set(stages)))
        return VitEmbedModelOutput(
            last_hidden_state=None if pooled_only else encoded.last.states,
            pooler_output=pooler_output,  # (B, D)
            hidden_states=tuple(each.states for each in encoded.stages.values()) if output_hidden_states else None,
            attentions=encoded.attentions,
            feature_pyramid=feature_pyramid,
            stem_loss=stem_loss if self.training else None,
            stages=stages,
        )

    def _normalised(self, tokens: Tokens) -> Tokens:
        return tokens._replace(states=self.post_layernorm(tokens.states))

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
        inputs = range(self.config.num_hidden_layers)  # of the layers: what their keys stand for
        read = self(pixel_values, patch_embeds, pixel_mask, stages=inputs, output_attentions=True, return_dict=True)
        layers = []
        for weights, (_, layout, *_) in zip(read.attentions, read.stages):
            weights = weights[:, :, 0, self.config.num_prefix_tokens :].transpose(1, 2)  # (B, n, h)
            if layout.sizes is not None:
                weights = weights / layout.sizes[..., None].clamp(min=1)
            layers.append(spread(weights, layout).transpose(1, 2))  # (B, h, N)
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
        require_grid(self.config, "a map of tokens")
        last = self.config.num_hidden_layers
        (tokens,) = self(pixel_values, patch_embeds, pixel_mask, stages=[last], return_dict=True).stages
        of_patch = tokens.layout.token_of_patch
        rows, columns = tokens.layout.grid_size
        if of_patch is None:
            of_patch = torch.arange(rows * columns, device=tokens.states.device).expand(tokens.states.shape[0], -1)
        return of_patch.unflatten(1, (rows, columns))


def require_grid(config: VitEmbedConfig, purpose: str) -> None:
    """Raises ValueError for a stem whose tokens belong to no place in the image."""
    if config.stem_type in GRIDLESS_STEMS:
        raise ValueError(
            f"{purpose} is not available with stem_type={config.stem_type!r}: its tokens belong to no place in the "
            "image; use another stem_type"
        )


def require_every_patch(config: VitEmbedConfig, training: bool) -> None:
    """Raises ValueError where training drops patches that a dense output needs."""
    if training and config.patch_drop_rate:
        raise ValueError(
            f"patch_drop_rate={config.patch_drop_rate} leaves holes in the grid in training; set "
            "patch_drop_rate=0 for dense outputs"
        )


def freeze_pooler(trunk: VitEmbedModel) -> None:
    """Leaves attention pooling out of training, for heads that read patches alone: DistributedDataParallel waits for a
    gradient of every parameter that asks for one."""
    if trunk.pooler is not None:
        trunk.pooler.requires_grad_(False)


class VitEmbedForImageClassification(VitEmbedPreTrainedModel):
    """A linear classifier on the pooled vector."""

    accepts_loss_kwargs = True

    def __init__(self, config: VitEmbedConfig):
        super().__init__(config)
        self.vision_model = VitEmbedModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @with_output_options
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        patch_embeds: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        *,
        interpolate_pos_encoding: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values, patch_embeds, pixel_mask, interpolate_pos_encoding: as in VitEmbedModel.
            labels: (B,) class numbers, for cross-entropy, -100 for a row to leave out. With `problem_type=
                "multi_label_classification"` (B, num_labels) in [0, 1], -100 or NaN for an entry to leave out, for
                binary cross-entropy; with "regression" numbers (B, num_labels), or (B,) for one label, for the mean
                squared error.
            num_items_in_batch: label entries of all the batches of this training step that are not -100, as Trainer
                counts them; None for those of this batch.

        Returns:
            loss if labels were given, logits (B, num_labels).

        Raises:
            TypeError: an input that is no tensor.
            ValueError: labels of the wrong shape; and, as far as `input_checks` says, class numbers outside
                [0, num_labels) or multi-label targets outside [0, 1].
        """
        images = self.vision_model(
            pixel_values,
            patch_embeds,
            pixel_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
            pooled_only=True,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.classifier(images.pooler_output)
        return ImageClassifierOutput(
            loss=None if labels is None else self._loss(logits, labels, num_items_in_batch, images.stem_loss),
            logits=logits,
            hidden_states=images.hidden_states,
            attentions=images.attentions,
        )

    def _loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
        stem_loss: torch.Tensor | None,
    ) -> torch.Tensor:
        kind = problem_type(self.config.problem_type, labels, self.config.num_labels)
        total, count = CLASSIFICATION_LOSSES[kind](logits, labels, self)
        items = total_items(count, num_items_in_batch)  # nothing to learn from is loss 0
        return with_stem_loss(total / items, stem_loss, 1.0 if num_items_in_batch is None else count / items)


class VitEmbedForDepthEstimation(VitEmbedPreTrainedModel):
    """A dense head that predicts a depth for every pixel from the patch grid of one or four layers."""

    image_processor_type = "DPTImageProcessor"
    accepts_loss_kwargs = True

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
        self.taps = evenly_spaced_layers(config.num_hidden_layers, self.depth_head.num_taps)
        if config.use_feature_pyramid:  # the stem's maps of strides p / 4 and p / 2 take the place of the shallow ones
            self.taps = self.taps[2:]
        self.post_init()

    @with_output_options
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        patch_embeds: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        *,
        interpolate_pos_encoding: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> DepthEstimatorOutput:
        """
        Args:
            pixel_values, patch_embeds, pixel_mask, interpolate_pos_encoding: as in VitEmbedModel.
            labels: (B, H', W') depths of any real type in the unit to be predicted; entries <= 0, beyond `max_depth`,
                NaN or infinite are left out. The prediction is resized to them for the loss, which is the mean over
                images of each image's loss.
            num_items_in_batch: label entries of all the batches of this training step that are not -100, as Trainer
                counts them; None for those of this batch.

        Returns:
            loss if labels were given; predicted_depth (B, H, W) > 0, in metres up to `max_depth`, unitless without one;
            any number with depth_activation="identity".

        Raises:
            TypeError: an input that is no tensor.
            ValueError: labels that are not one map of depths an image, or that depth_loss="silog" is to compare with
                depths that may be negative.
        """
        if self.config.use_feature_pyramid:
            check_pyramid_inputs(patch_embeds, pixel_mask, "use_feature_pyramid=True")
        images = self.vision_model(
            pixel_values,
            patch_embeds,
            pixel_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
            stages=self.taps,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        depth = self._depth(images, pixel_values, pixel_mask)  # (B, H, W)
        return DepthEstimatorOutput(
            loss=None
            if labels is None
            else self._loss(depth, labels, pixel_mask, num_items_in_batch, images.stem_loss),
            predicted_depth=depth,
            hidden_states=images.hidden_states,
            attentions=images.attentions,
        )

    def _depth(
        self, images: VitEmbedModelOutput, pixel_values: torch.Tensor | None, pixel_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """What the trunk gives -> depth of the image, or of what another encoder's patch features cover."""
        config = self.config
        pyramid = images.feature_pyramid[-3:-1] if config.use_feature_pyramid else ()
        maps = (*pyramid, *(feature_map(tokens, config.num_prefix_tokens) for tokens in images.stages))
        if pixel_mask is not None:
            sizes, padded = image_sizes(pixel_mask, pixel_values), tuple(pixel_values.shape[2:])
            return predict_depth_of_sizes(self.depth_head, config, maps, sizes, padded)
        if pixel_values is None:
            grid_size = images.stages[-1].layout.grid_size
            image_shape = tuple(count * side for count, side in zip(grid_size, config.patch_shape))
        else:
            image_shape = tuple(pixel_values.shape[2:])
        return predict_depth(self.depth_head, config, maps, image_shape)

    def _loss(
        self,
        depth: torch.Tensor,
        labels: torch.Tensor,
        pixel_mask: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
        stem_loss: torch.Tensor | None,
    ) -> torch.Tensor:
        check_depth_labels(labels, depth, pixel_mask)
        total, count = depth_loss(self.config, depth, labels, pixel_mask)
        items = total_items(count, num_items_in_batch)
        return with_stem_loss(total / items, stem_loss, 1.0 if num_items_in_batch is None else count / items)


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
        interpolate_pos_encoding: bool | None = None,
    ) -> torch.Tensor:
        """Images in the joint space: (B, projection_dim), of unit length with `normalize`.

        Inputs as in VitEmbedModel.
        """
        check_normalize(normalize)
        images = self.vision_model(
            pixel_values,
            patch_embeds,
            pixel_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
            pooled_only=True,
            output_attentions=False,
            output_hidden_states=False,
            return_dict=True,
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
        require_grid(self.config, "a grid of patches")
        require_every_patch(self.config, self.training)
        last = self.config.num_hidden_layers
        (tokens,) = self.vision_model(pixel_values, patch_embeds, pixel_mask, stages=[last], return_dict=True).stages
        patches = patch_grid(tokens, self.config.num_prefix_tokens)
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

    @with_output_options
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        patch_embeds: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        *,
        interpolate_pos_encoding: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> VitEmbedProjectionOutput:
        """Inputs as in VitEmbedModel. Returns as VitEmbedProjectionOutput says; `get_image_features` gives the same
        image_embeds for less work."""
        images = self.vision_model(
            pixel_values,
            patch_embeds,
            pixel_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        return VitEmbedProjectionOutput(
            image_embeds=self.visual_projection(images.pooler_output),  # (B, projection_dim)
            last_hidden_state=images.last_hidden_state,
            hidden_states=images.hidden_states,
            attentions=images.attentions,
            stem_loss=images.stem_loss,
        )


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

    @with_output_options
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        patch_embeds: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        return_loss: bool = True,
        *,
        position_ids: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        group_ids: torch.Tensor | None = None,
        gather_loss: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> VitEmbedContrastiveOutput:
        """
        Args:
            pixel_values, patch_embeds, pixel_mask, interpolate_pos_encoding: images, as in VitEmbedModel. Without
                images only text_embeds are returned.
            input_ids, attention_mask, position_ids: texts, as in VitEmbedTextModel. Without texts only image_embeds
                are returned.
            return_loss: whether to return the loss; there is one where image i and text i are a pair, so with
                as many images as texts.
            group_ids: (B,) int64, for batches in which several pairs say the same, as equal captions do: image i and
                text j of pairs with equal ids are not negatives of each other in the loss. Under torch.distributed
                every process gives them, or none.
            gather_loss: whether the loss is that of the joined batch of all processes of torch.distributed, for which
                every process has to make this call. None: in a training step (training mode, gradients on), and in no
                other pass. The processes tell each other the sizes of their batches, which the host waits for.

        Returns:
            as VitEmbedContrastiveOutput says.

        Raises:
            TypeError: an input that is no tensor.
            ValueError: neither images nor texts, a bad input to a tower, or group_ids of another shape or type.
        """
        if pixel_values is None and patch_embeds is None and input_ids is None:
            raise ValueError("give images (pixel_values or patch_embeds), texts (input_ids), or both; got neither")
        asked = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        images = texts = None
        if pixel_values is not None or patch_embeds is not None:
            embed = functools.partial(self._embed_images, interpolate_pos_encoding=interpolate_pos_encoding, **asked)
            images = self._embed(embed, (pixel_values, patch_embeds, pixel_mask), **asked)
        if input_ids is not None:
            embed = functools.partial(self._embed_texts, **asked)
            texts = self._embed(embed, (input_ids, attention_mask, position_ids), **asked)
        loss = logits = None
        if images is not None and texts is not None:
            logits = contrastive_logits(images.embeds, texts.embeds, self.logit_scale, self.logit_bias)
            if return_loss and logits.shape[0] == logits.shape[1]:
                loss = self._loss(logits, images, texts, group_ids, gather_loss)
        return VitEmbedContrastiveOutput(
            loss=loss,
            logits_per_image=logits,  # (images, texts)
            logits_per_text=None if logits is None else logits.t(),
            image_embeds=None if images is None else images.embeds,
            text_embeds=None if texts is None else texts.embeds,
            hidden_states=None if images is None else images.hidden_states,
            attentions=None if images is None else images.attentions,
            text_hidden_states=None if texts is None else texts.hidden_states,
            text_attentions=None if texts is None else texts.attentions,
        )

    def get_text_features(
        self,
        input_ids: torch.Tensor,
        normalize: bool = False,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Texts in the joint space: (B, projection_dim), of unit length with `normalize`.

        Inputs as in VitEmbedTextModel.
        """
        check_normalize(normalize)
        texts = self.text_model(
            input_ids,
            attention_mask,
            position_ids,
            pooled_only=True,
            output_attentions=False,
            output_hidden_states=False,
            return_dict=True,
        )
        projected = self.text_projection(texts.pooler_output)
        return F.normalize(projected, dim=-1) if normalize else projected

    def _embed_images(self, pixel_values, patch_embeds, pixel_mask, **options) -> Embedded:
        images = self.vision_model(
            pixel_values, patch_embeds, pixel_mask, pooled_only=True, return_dict=True, **options
        )
        embeds = F.normalize(self.visual_projection(images.pooler_output), dim=-1)
        return Embedded(embeds, images.stem_loss, images.hidden_states, images.attentions)

    def _embed_texts(self, input_ids, attention_mask, position_ids, **options) -> Embedded:
        texts = self.text_model(input_ids, attention_mask, position_ids, pooled_only=True, return_dict=True, **options)
        embeds = F.normalize(self.text_projection(texts.pooler_output), dim=-1)
        return Embedded(embeds, None, texts.hidden_states, texts.attentions)

    def _embed(
        self,
        embed: Callable[..., Embedded],
        inputs: tuple[torch.Tensor | None, ...],
        output_attentions: bool,
        output_hidden_states: bool,
    ) -> Embedded:
        """`embed(*inputs)`, in a training step `contrastive_chunk_size` rows at a time."""
        size = self.config.contrastive_chunk_size
        if size is None or not (self.training and torch.is_grad_enabled()):
            return embed(*inputs)
        if output_attentions or output_hidden_states:
            raise ValueError(
                f"contrastive_chunk_size={size} keeps nothing of a batch in training but its embeddings; leave "
                "output_attentions and output_hidden_states out, or set contrastive_chunk_size=None"
            )
        return embed_in_chunks(embed, inputs, size, list(self.buffers()))

    def _loss(
        self,
        logits: torch.Tensor,
        images: Embedded,
        texts: Embedded,
        group_ids: torch.Tensor | None,
        gather: bool | None,
    ) -> torch.Tensor:
        batch = logits.shape[0]
        if group_ids is not None:
            check_group_ids(group_ids, batch)
        beta = self.config.hard_negative_beta
        options = {"hard_negative_beta": beta} if beta else {}  # of the softmax loss alone, as the config sees to
        row_loss = functools.partial(CONTRASTIVE_LOSSES[self.config.contrastive_loss], **options)
        gather = self.training and torch.is_grad_enabled() if gather is None else gather
        if gather and has_other_processes():
            scale = (self.logit_scale, self.logit_bias)
            loss = joined_loss(images.embeds, texts.embeds.to(logits.device), *scale, group_ids, row_loss)
        else:
            ignored = None if group_ids is None else same_group(group_ids).to(logits.device)
            loss = row_loss(PairRows.whole(logits, ignored)) / batch
        return with_stem_loss(loss, images.stem_loss)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        """As in transformers, for the text tower."""
        return self.text_model.resize_token_embeddings(*args, **kwargs)


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

    @with_output_options
    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        return_loss: bool = True,
        *,
        interpolate_pos_encoding: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> VitEmbedMaskedImageModelingOutput:
        """
        Args:
            pixel_values, interpolate_pos_encoding: as in VitEmbedModel.
            bool_masked_pos: (B, N) or (B, gh, gw) bool, True for patches to hide, at least one of each image left; None
                hides `mask_ratio` of them at random. How many are left is read from the device.
            return_loss: whether to return the loss. It needs no labels; padding of `pad_to_patch` counts as pixels of
                0.
            num_items_in_batch: hidden patches of all the batches of this training step; None for the mean over the
                images of this batch.

        Returns:
            loss: mean squared error over the values of the hidden patches, each patch less its mean and over its
                standard deviation with `norm_pix_loss`.
            reconstruction: (B, C, H, W), what the decoder predicts for every patch, in the units of pixel_values; with
                `norm_pix_loss` each patch gets the mean and deviation of the picture's own.
            mask: (B, gh, gw) bool, True for the hidden patches. hidden_states, attentions: of the trunk.

        Raises:
            TypeError: an input that is no tensor.
            ValueError: a mask of the wrong shape, or one that hides a whole image.
        """
        config, patch = self.config, self.config.patch_shape
        check_images(config, pixel_values)
        batch, _, *image_shape = pixel_values.shape
        grid_size, padded = config.grid_of(tuple(image_shape)), in_whole_patches(config, pixel_values)
        seen = seen_patches(bool_masked_pos, batch, grid_size, config.mask_ratio, pixel_values.device)  # (B, N)
        visible = padded
        if not STEMS[config.stem_type].is_local:
            visible = unpatchify(patchify(padded, patch) * seen.mask[..., None], grid_size, patch)
        images = self.vision_model(
            visible,
            interpolate_pos_encoding=interpolate_pos_encoding,
            stages=[config.num_hidden_layers],
            kept=seen,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        predicted = self.decoder(images.stages[0], config.num_prefix_tokens).float()  # (B, N, C * ph * pw)
        patches = patchify(padded.float(), patch).to(predicted.device)
        mean, deviation = patch_statistics(patches) if config.norm_pix_loss else (0.0, 1.0)
        loss, hidden = None, ~seen.mask.to(predicted.device)
        if return_loss:
            loss = masked_error(predicted, (patches - mean) / deviation, hidden, num_items_in_batch)
        reconstruction = unpatchify(predicted.detach() * deviation + mean, grid_size, patch)
        return VitEmbedMaskedImageModelingOutput(
            loss=loss,
            reconstruction=reconstruction[..., : image_shape[0], : image_shape[1]],
            mask=hidden.reshape(batch, *grid_size),
            hidden_states=images.hidden_states,
            attentions=images.attentions,
        )


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

    @with_output_options
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        patch_embeds: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        *,
        interpolate_pos_encoding: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> BackboneOutput:
        """Inputs as in VitEmbedModel. Returns feature_maps, one for each of `out_features`: (B, D, gh, gw) after the
        final norm, or the stem's (B, C_i, H_i, W_i) as it is."""
        require_every_patch(self.config, self.training)
        num_maps = len(self.config.pyramid_widths)
        from_stem = [index for index in self.out_indices if index < num_maps]
        stages = sorted({index - num_maps for index in self.out_indices if index >= num_maps})
        if from_stem:
            check_pyramid_inputs(patch_embeds, pixel_mask, f"out_features={self.out_features}")
        images = self.vision_model(
            pixel_values,
            patch_embeds,
            pixel_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
            stages=stages,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        maps = {index: images.feature_pyramid[index] for index in from_stem}
        for stage, tokens in zip(stages, images.stages):
            maps[num_maps + stage] = feature_map(tokens, self.config.num_prefix_tokens)
        return BackboneOutput(
            feature_maps=tuple(maps[index] for index in self.out_indices),
            hidden_states=images.hidden_states,
            attentions=images.attentions,
        )

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
