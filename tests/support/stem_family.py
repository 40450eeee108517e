"""The stems, the heads that read them, and which of the two do not go together.

A stem needs a row here only where it needs fields that have no default.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from tiny import CLOSE, dual_config, pixels, randomised, tokens, vision_config
from transformers import ConvNextConfig, ResNetConfig

from vit_embed import (
    VitEmbedBackbone,
    VitEmbedConfig,
    VitEmbedForContrastive,
    VitEmbedForDepthEstimation,
    VitEmbedForImageClassification,
    VitEmbedForMaskedImageModeling,
    VitEmbedModel,
    VitEmbedModelWithProjection,
    options_vit_embed,
)
from vit_embed.embeddings_vit_embed import POSITIONS, VitEmbedEmbeddings
from vit_embed.options_vit_embed import OPTIONS, STEM_TYPES, Option
from vit_embed.stems_vit_embed import STEMS
from vit_embed.tokens_vit_embed import Tokens

# Both have a stride of 8, the patch of `tiny.VISION`, at their last stage. ResNet normalises by batch, ConvNext not.
RESNET = ResNetConfig(
    embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", out_features=["stage2"]
)
CONVNEXT = ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, out_features=["stage2"])
# Strides 2, 4 and 8.
CONVNEXT_MAPS = ConvNextConfig(
    patch_size=2, hidden_sizes=[8, 12, 16], depths=[1, 1, 1], num_stages=3, out_features=["stage1", "stage2", "stage3"]
)

# stem: the fields that it cannot do without.
NEEDED: dict[str, dict[str, Any]] = {"hybrid": {"backbone_config": RESNET}}

# name: fields of a stem that is not at its defaults, and takes another path in the code for it.
VARIANTS = {
    "overlap, pointwise": {"stem_type": "overlap", "patch_kernel_size": (12, 8), "patch_pointwise": True},
    "hierarchical, batch norm": {"stem_type": "hierarchical", "stem_norm_type": "batch_norm"},
    "hybrid, ConvNext from a dict": {"stem_type": "hybrid", "backbone_config": CONVNEXT.to_dict()},
    "dct, 5 coefficients": {"stem_type": "dct", "num_coefficients": 5},
    "wavelet, 5 coefficients": {"stem_type": "wavelet", "num_coefficients": 5},
}
FAMILY = {**{stem: {"stem_type": stem, **NEEDED.get(stem, {})} for stem in STEM_TYPES}, **VARIANTS}

# field: its option, for those that have a meaning with some values of another field alone.
APPLIES = {option.name: option for option in OPTIONS if option.applies_when is not None}


def choices_of(field: str) -> tuple:
    """The constant of the options' module that lists the values of a field: NORM_TYPES, CONTRASTIVE_LOSSES."""
    plural = f"{field}es" if field.endswith("s") else f"{field}s"
    return getattr(options_vit_embed, plural.upper())


def other_value(option: Option) -> Any:
    """A value of an option that is in range and not its default; None where the config makes something of it."""
    if option.check in (options_vit_embed.ANYTHING, options_vit_embed.JSON_DICT):
        return NEEDED["hybrid"].get(option.name)
    words = option.check.must_be.removeprefix("one of ").strip(";,").split(", ")
    candidates = (not option.default,) if isinstance(option.default, bool) else (*words, 24, 4, 0.5, 0.75)
    return next(value for value in candidates if value != option.default and option.check.accepts(value))


def fields_for(name: str, values: Sequence[str]) -> dict[str, Any]:
    """The fields that make the first of these values of `name` a config that stands, and one in which every other field
    has a meaning."""
    needed = {**NEEDED, "hybrid": {"backbone_config": CONVNEXT_MAPS}}  # three stages make a pyramid
    stem = needed.get(values[0], {}) if name == "stem_type" else {}
    return {"depth_head_type": "dpt", **DECODER, name: values[0], **stem}


class Head(NamedTuple):
    """A class that reads the trunk.

    fields: of its config. result: what it is called for, by its name in the output. labels: what it takes besides
    pixels.
    """

    model_class: type
    fields: dict[str, Any]
    result: str
    labels: Callable[[VitEmbedConfig, torch.Tensor], dict[str, torch.Tensor]] = lambda config, images: {}


def depths(config: VitEmbedConfig, images: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"labels": images[:, 0].abs()}


def hidden_patches(config: VitEmbedConfig, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Half of the patches, others in every image."""
    rows, columns = config.grid_of(tuple(images.shape[2:]))
    patch = torch.arange(rows * columns)
    return {"bool_masked_pos": torch.stack([(patch * 7 + image) % (2 + image) > 0 for image in range(len(images))])}


DECODER = {
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 3,
    "decoder_intermediate_size": 28,
}
DPT = {"depth_head_type": "dpt", "max_depth": 10.0}
HEADS = {
    "trunk": Head(VitEmbedModel, {}, "pooler_output"),
    "classification": Head(
        VitEmbedForImageClassification,
        {"num_labels": 5},
        "logits",
        lambda config, images: {"labels": torch.arange(len(images)) % config.num_labels},
    ),
    "contrastive": Head(
        VitEmbedForContrastive, {}, "image_embeds", lambda config, images: {"input_ids": tokens(len(images))}
    ),
    "projection": Head(VitEmbedModelWithProjection, {}, "image_embeds"),
    "depth-deconv": Head(VitEmbedForDepthEstimation, {}, "predicted_depth", depths),
    "depth-dpt": Head(VitEmbedForDepthEstimation, DPT, "predicted_depth", depths),
    "backbone": Head(VitEmbedBackbone, {"out_features": ["stem", "stage4"]}, "feature_maps"),
    "masked": Head(VitEmbedForMaskedImageModeling, DECODER, "reconstruction", hidden_patches),
}

# Heads see no more of a stem than its tokens and their layout: every stem with one head, every head with one stem, and
# those that meet in the code of both.
PAIRS = [
    *((stem, "classification") for stem in FAMILY),
    *(("conv", head) for head in HEADS if head != "classification"),
    ("adaptive", "depth-dpt"),
    ("adaptive", "backbone"),
    ("token_learner", "contrastive"),
    ("overlap", "masked"),
    ("hybrid", "masked"),
]


def stem_config(name: str, head: str = "trunk", **overrides) -> VitEmbedConfig:
    """The config of a row of FAMILY with a head: 32 x 32 pixels, 4 x 4 patches, 4 layers of 32."""
    config = dual_config if head == "contrastive" else vision_config
    return config(**{**FAMILY[name], **HEADS[head].fields, **overrides})


def gated_by_content(model: torch.nn.Module) -> torch.nn.Module:
    """The model, whose adaptive stem decides by what it sees, not by a bias: some cells each way."""
    with torch.no_grad():
        for module in getattr(model.trunk.embeddings.patch_embedding, "gate", ()):
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.fill_(1.0)
            if hasattr(module, "bias"):
                module.bias.zero_()
    return model


def build(name: str, head: str = "trunk", **overrides) -> torch.nn.Module:
    """A model in eval mode, every weight random. A norm's running statistics are of some images, not 0 and 1."""
    model = gated_by_content(randomised(HEADS[head].model_class(stem_config(name, head, **overrides))))
    with torch.no_grad():
        model.trunk.embeddings.train()(2 * pixels(4, seed=9) + 1)
    return model.eval()


def read_stem(embeddings: VitEmbedEmbeddings, images: torch.Tensor) -> Tokens:
    """The stem's tokens without positions."""
    return STEMS[embeddings.config.stem_type].read(embeddings.config, embeddings.patch_embedding, images, None)


def positions_of(embeddings: VitEmbedEmbeddings, grid_size: tuple[int, int]) -> torch.Tensor | None:
    """The positions of the patches, (N, D), or None."""
    scheme = POSITIONS[embeddings.config.position_embedding_type]
    layer, native = embeddings.position_embedding, embeddings.native_grid
    return scheme(embeddings.config, layer, native, grid_size, torch.device("cpu"))[1]


def inputs_of(head: str, config: VitEmbedConfig, batch: int = 3, height: int = 32, width: int = 32) -> dict:
    images = pixels(batch, height, width)
    return {"pixel_values": images, **HEADS[head].labels(config, images)}


def result(head: str, output) -> tuple[torch.Tensor, ...]:
    """What the head was called for, as a tuple of tensors."""
    found = output[HEADS[head].result]
    return found if isinstance(found, tuple) else (found,)


# What a user reads off an image: a head of HEADS and fields besides.
READINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "cls": ("trunk", {}),
    "mean": ("trunk", {"pooling_type": "mean"}),
    "map": ("trunk", {"pooling_type": "map"}),
    "mean of normalised": ("trunk", {"pooling_type": "mean", "norm_before_pooling": True}),
    "class attentions": ("trunk", {}),
    "patch features": ("contrastive", {}),
    **{head: (head, {}) for head in ("classification", "contrastive", "projection", "depth-deconv", "depth-dpt")},
    "backbone": ("backbone", {"out_features": ["stem", "stage1", "stage2", "stage3", "stage4"]}),
}


def build_reading(name: str, **fields) -> torch.nn.Module:
    """A model in eval mode with the same random weights for equal shapes, whatever the fields."""
    head, needed = READINGS[name]
    return gated_by_content(randomised(HEADS[head].model_class(stem_config("conv", head, **{**needed, **fields}))))


@torch.no_grad()
def read(name: str, model: torch.nn.Module, **inputs) -> tuple[torch.Tensor, ...]:
    """Vectors (B, X), or maps whose last two dimensions are rows and columns."""
    if name == "class attentions":
        return (model.get_class_attentions(**inputs),)
    if name == "patch features":
        return (model.get_patch_features(**inputs).permute(0, 3, 1, 2),)
    return result(READINGS[name][0], model(**inputs))


# What gives a depth head the maps of a stem, by stem.
PYRAMID = {"use_feature_pyramid": True, "depth_head_type": "dpt"}
PYRAMID_STEMS = {
    "hierarchical": {"stem_type": "hierarchical", **PYRAMID},
    "hybrid": {"stem_type": "hybrid", "backbone_config": CONVNEXT_MAPS, **PYRAMID},
}


def assert_close(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], **tolerance) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, **(tolerance or CLOSE))


def assert_every_weight_learns(model: torch.nn.Module) -> None:
    """Every weight that asks for a gradient has one that is finite and not 0. A key's bias shifts all scores of a query
    alike, which softmax ignores: its gradient is 0 up to rounding."""
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    idle = [name for name, gradient in gradients.items() if gradient is None or not gradient.abs().sum() > 0]
    assert [name for name in idle if not name.endswith("k_proj.bias")] == []
    assert all(gradient.isfinite().all() for gradient in gradients.values())
