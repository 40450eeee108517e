"""What transformers may do with any of our models: draw its weights, choose its attention, checkpoint its layers."""

from torch import nn
from transformers import PreTrainedModel

from .initialisation_vit_embed import initialise
from .masked_vit_embed import VitEmbedPatchDecoder
from .stems_vit_embed import HybridStem


class TowerMixin:
    """Of a `PreTrainedModel`: how weights start, and what transformers may do with the layers."""

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
    _require_grads_hooks = []

    def _init_weights(self, module: nn.Module) -> None:
        initialise(module, self.config)

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


class ImageTowerMixin:
    """Of a class that is, or has, an image tower."""

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
