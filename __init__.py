"""CLIP and ViT embeddings and encoder for transformers: the flat files of this folder, as the package `vit_embed`."""

from .configuration_vit_embed import VitEmbedConfig, VitEmbedTextConfig
from .modeling_vit_embed import (
    VitEmbedBackbone,
    VitEmbedForContrastive,
    VitEmbedForDepthEstimation,
    VitEmbedForImageClassification,
    VitEmbedForMaskedImageModeling,
    VitEmbedModel,
    VitEmbedModelWithProjection,
    VitEmbedTextModel,
)

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
]
