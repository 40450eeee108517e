"""CLIP and ViT embeddings and encoder for transformers: the flat files of this folder, as the package `vit_embed`.

Importing it registers config and models with the Auto classes, so that `AutoModel.from_pretrained` and the
`backbone_config` of transformers' dense models need no `trust_remote_code`.
"""

from typing import Any

import transformers

from . import modeling_vit_embed
from .configuration_vit_embed import AUTO_MAP, TEXT_AUTO_MAP, VitEmbedConfig, VitEmbedTextConfig
from .modeling_vit_embed import (
    VitEmbedBackbone,
    VitEmbedForContrastive,
    VitEmbedForDepthEstimation,
    VitEmbedForImageClassification,
    VitEmbedForMaskedImageModeling,
    VitEmbedModel,
    VitEmbedModelWithProjection,
    VitEmbedTextModel,
    VitEmbedTextModelWithProjection,
)

__version__ = "0.3.0"
__all__ = [
    "VitEmbedBackbone",
    "VitEmbedConfig",
    "VitEmbedForContrastive",
    "VitEmbedForDepthEstimation",
    "VitEmbedForImageClassification",
    "VitEmbedForMaskedImageModeling",
    "VitEmbedModel",
    "VitEmbedModelWithProjection",
    "VitEmbedTextConfig",
    "VitEmbedTextModel",
    "VitEmbedTextModelWithProjection",
    "load_picture",
]


def _register_with_auto_classes() -> None:
    for config_class, auto_map in ((VitEmbedConfig, AUTO_MAP), (VitEmbedTextConfig, TEXT_AUTO_MAP)):
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto_class, name in auto_map.items():
            if auto_class != "AutoConfig":
                model_class = getattr(modeling_vit_embed, name.partition(".")[2])
                getattr(transformers, auto_class).register(config_class, model_class, exist_ok=True)


_register_with_auto_classes()


def __getattr__(name: str) -> Any:
    """`vit_embed.embed` and `vit_embed.load_picture`; only those who call `embed` wait for its packages (pyarrow,
    fsspec).
    """
    if name == "embed":
        from vit_embed.retrieval.callables import embed

        return embed
    if name == "load_picture":
        from vit_embed.retrieval.pictures import load_picture

        return load_picture
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "embed"})
