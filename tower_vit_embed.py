"""What transformers may do with any of our models: choose its class, draw its weights, choose its attention, checkpoint
its layers."""

import os
from collections.abc import Callable, Iterator

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig, PreTrainedModel

from .configuration_vit_embed import VitEmbedConfig, VitEmbedTextConfig
from .masked_vit_embed import VitEmbedPatchDecoder
from .saving_vit_embed import other_parts
from .stems_vit_embed import HybridStem


class TowerMixin:
    """Of a `PreTrainedModel`: what transformers may do with the layers."""

    config: VitEmbedConfig | VitEmbedTextConfig
    modules: Callable[[], Iterator[nn.Module]]

    supports_gradient_checkpointing = True
    # What Trainer asks: whether the loss takes `num_items_in_batch`.
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Whether it is one tower, with embeddings, layers and a norm of its own.
    is_tower = False
    _require_grads_hooks: list[RemovableHandle] = []

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """True: every attention call looks the implementation up. transformers guesses from the text of the file."""
        return True

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], **kwargs) -> None:
        """As in transformers, for towers and decoder. A hybrid stem's backbone keeps its own: few have the choice."""
        hybrids = [module for module in self.modules() if isinstance(module, HybridStem)]
        backbones = [hybrid.backbone for hybrid in hybrids]
        for hybrid in hybrids:
            hybrid.backbone = None  # type: ignore[assignment]
        try:
            super().set_attn_implementation(attn_implementation, **kwargs)
        finally:
            for hybrid, backbone in zip(hybrids, backbones):
                hybrid.backbone = backbone
        for module in self.modules():
            if isinstance(module, VitEmbedPatchDecoder):
                module.config._attn_implementation = self.config._attn_implementation

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        """As in transformers, with the non-reentrant checkpoint unless another is asked for: the reentrant one
        gives no gradients to adapters on a frozen trunk."""
        chosen = {"use_reentrant": False} if gradient_checkpointing_kwargs is None else gradient_checkpointing_kwargs
        super().gradient_checkpointing_enable(gradient_checkpointing_kwargs=chosen, **kwargs)

    def enable_input_require_grads(self) -> None:
        """Makes the towers' input require a gradient, which reentrant checkpointing of a frozen trunk needs.

        transformers hooks the input embedding's output and takes it for a tensor; that of some stems is a Tokens.
        """

        def require_grad(module, inputs, output):
            (output[0] if isinstance(output, tuple) else output).requires_grad_(True)

        self.disable_input_require_grads()
        towers = [module for module in self.modules() if getattr(module, "is_tower", False)]
        self._require_grads_hooks = [t.get_input_embeddings().register_forward_hook(require_grad) for t in towers]

    def disable_input_require_grads(self) -> None:
        """Takes back `enable_input_require_grads`."""
        for hook in self._require_grads_hooks:
            hook.remove()
        self._require_grads_hooks = []


class AutoModelMixin:
    """Of a class that AutoModel loads, and that stands for others: `class_for(config)` says which one is made.

    One name for every checkpoint: transformers 5 remembers, for the whole process, which class AutoModel took for
    folders of one base name, and would give a dual encoder named like an earlier vision-only one no text tower.
    """

    class_for: Callable[[PretrainedConfig], type[PreTrainedModel]]

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


class TextTowerMixin:
    """Of a class that is, or has, a text tower and no image tower."""

    config_class = VitEmbedTextConfig
    base_model_prefix = "text_model"
    main_input_name = "input_ids"
    input_modalities = ("text",)
    image_processor_type = None
    has_text_tower = True
    _no_split_modules = ["VitEmbedTextEmbeddings", "VitEmbedLayer"]
    _keys_to_ignore_on_load_unexpected = other_parts("vision_model", "(visual|text)_projection", "logit_(scale|bias)")


class ImageTowerMixin:
    """Of a class that is, or has, an image tower."""

    is_tower: bool
    vision_model: nn.Module
    config_class = VitEmbedConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["VitEmbedEmbeddings", "VitEmbedLayer"]
    # A vision-only class takes its trunk from a dual encoder's or a masked autoencoder's checkpoint and leaves the
    # rest.
    _keys_to_ignore_on_load_unexpected = other_parts(
        "text_model", "(visual|text)_projection", "logit_(scale|bias)", "decoder"
    )

    @property
    def trunk(self) -> PreTrainedModel:
        """The image tower, whichever class this is."""
        return self if self.is_tower else self.vision_model

    def get_input_embeddings(self) -> nn.Module:
        return self.trunk.embeddings.patch_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.trunk.embeddings.patch_embedding = value

    def _freeze_pooler(self) -> None:
        """Leaves attention pooling out of training, for heads that read patches alone: DistributedDataParallel waits
        for a gradient of every parameter that asks for one."""
        if self.vision_model.pooler is not None:
            self.vision_model.pooler.requires_grad_(False)
