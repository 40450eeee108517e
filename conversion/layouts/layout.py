"""What a layout is: how the checkpoints of one origin are recognised, read, written, and run by their own code."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from vit_embed import (
    VitEmbedConfig,
    VitEmbedForContrastive,
    VitEmbedForDepthEstimation,
    VitEmbedForImageClassification,
    VitEmbedModel,
    VitEmbedModelWithProjection,
)
from vit_embed.modeling_vit_embed import VitEmbedPreTrainedModel

StateDict = Mapping[str, torch.Tensor]
SourceConfig = Mapping[str, Any]  # the JSON that lies beside the weights, empty where there is none

# What a conversion can give. A layout names the class in `config.architectures`.
MODEL_CLASSES = {
    model_class.__name__: model_class
    for model_class in (
        VitEmbedModel,
        VitEmbedModelWithProjection,
        VitEmbedForContrastive,
        VitEmbedForImageClassification,
        VitEmbedForDepthEstimation,
    )
}


@dataclass(frozen=True)
class ConversionOptions:
    """What the user states because the checkpoint may not, and what to make of it. None: use the checkpoint's value.

    dtype: of every weight written.
    hidden_act: activation of both towers, one of HIDDEN_ACTS.
    num_attention_heads, text_num_attention_heads: of the image and of the text tower.
    layer_norm_eps: of both towers.
    norm_position: "pre" or "post".
    pooling_type: of the image tower, one of POOLING_TYPES.
    image_size: (height, width) in pixels of a position table whose grid is no square.
    max_position_embeddings: tokens that the text tower is to take; its position table is resampled.
    trunk_only: leaves out heads, projections and the text tower.
    weights_key: the state dict of a training checkpoint that has several, as "state_dict" or "state_dict_ema".
    """

    dtype: torch.dtype = torch.float32
    hidden_act: str | None = None
    num_attention_heads: int | None = None
    text_num_attention_heads: int | None = None
    layer_norm_eps: float | None = None
    norm_position: str | None = None
    pooling_type: str | None = None
    image_size: tuple[int, int] | None = None
    max_position_embeddings: int | None = None
    trunk_only: bool = False
    weights_key: str | None = None


# Options that mean something for every layout; a layout names the others that it reads.
COMMON_OPTIONS = ("dtype", "max_position_embeddings", "trunk_only", "weights_key")


class SampleInputs(NamedTuple):
    """What source and result are both run on: images (2, C, H, W) and, for a text tower, texts (2, T) of token ids."""

    pixel_values: torch.Tensor
    input_ids: torch.Tensor | None


@dataclass(frozen=True)
class Converted:
    """A checkpoint in our form.

    model: of the class that `config.architectures` names, without memory for its weights.
    weights: its state dict.
    """

    model: VitEmbedPreTrainedModel
    weights: dict[str, torch.Tensor]

    @property
    def config(self) -> VitEmbedConfig:
        return self.model.config


@dataclass(frozen=True)
class Restored:
    """A model of ours in another package's form.

    state_dict: its weights by the package's names.
    usage: Python that loads the file, for the log.
    weights_file: the name of the weights in a folder of the package; None where it knows files only.
    files: the JSON files of such a folder by name.
    """

    state_dict: dict[str, torch.Tensor]
    usage: str
    weights_file: str | None = None
    files: Mapping[str, Any] = field(default_factory=dict)


def _no_image_processor(source_config: SourceConfig, config: VitEmbedConfig) -> None:
    return None


def _files_as_they_are(files: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> Mapping[str, Any]:
    return files


@dataclass(frozen=True)
class Layout:
    """How the checkpoints of one origin are read, written and run. Every function is pure.

    name: what `--layout` calls it.
    detect: (state dict, source config) -> why they are of this layout, or None.
    convert: (state dict, source config, options) -> the model and its weights. Raises ValueError for anything in the
        checkpoint that it cannot take; what else it raises is a mistake of its own.
    reference: (state dict, source config, config, sample inputs) -> outputs of the source's own code in float32, by the
        names of `compare.OUTPUTS`; raises ImportError where that is not installed.
    reference_name: what `reference` runs, for the card.
    options: fields of ConversionOptions that `convert` reads, besides COMMON_OPTIONS.
    image_processor: (source config, config) -> the preprocessor_config.json that the source's config describes, or None
        where it describes none.
    sees_as_clip: whether such models were trained on images prepared as CLIP's, where nothing else is said.
    restore: (config, weights by our names, the trunk below "vision_model.") -> the same in this layout; raises
        ValueError for a model that it cannot express. None where there is no way back.
    restored_processor: (files of a Restored, our preprocessor_config.json) -> the files, with its settings in them.
    can_pad: whether the package can pad an image to whole patches, as `pad_to_patch` does.
    """

    name: str
    detect: Callable[[StateDict, SourceConfig], str | None]
    convert: Callable[[StateDict, SourceConfig, ConversionOptions], Converted]
    reference: Callable[[StateDict, SourceConfig, VitEmbedConfig, SampleInputs], dict[str, torch.Tensor]]
    reference_name: str
    options: tuple[str, ...] = ()
    image_processor: Callable[[SourceConfig, VitEmbedConfig], dict[str, Any] | None] = _no_image_processor
    sees_as_clip: bool = False
    restore: Callable[[VitEmbedConfig, StateDict], Restored] | None = None
    restored_processor: Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]] = _files_as_they_are
    can_pad: bool = False


def empty_model(config: VitEmbedConfig) -> VitEmbedPreTrainedModel:
    """The model of `config.architectures` without memory for its weights: their names and shapes."""
    with torch.device("meta"):
        return MODEL_CLASSES[config.architectures[0]](config).eval()


def trunk_prefix(model: VitEmbedPreTrainedModel) -> str:
    """What stands before the names of the trunk alone to give those that it has in every other class."""
    return f"{model.base_model_prefix}." if isinstance(model, VitEmbedModel) else ""
