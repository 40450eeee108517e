"""The stems, the heads that read them, and which of the two do not go together: the tables that test_stems.py crosses.

A stem needs a row here only where it needs fields that have no default; every other stem is tested as it stands in
`options_vit_embed.STEM_TYPES`.
"""

from collections.abc import Callable
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
)
from vit_embed.embeddings_vit_embed import POSITIONS, VitEmbedEmbeddings
from vit_embed.options_vit_embed import GRIDLESS_STEMS, STEM_TYPES, TOKEN_CHOOSING_STEMS
from vit_embed.stems_vit_embed import STEMS
from vit_embed.tokens_vit_embed import Tokens

# Both have a stride of 8, the patch of `tiny.VISION`, at their last stage. ResNet normalises by batch, ConvNext not.
RESNET = ResNetConfig(
    embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", out_features=["stage2"]
)
CONVNEXT = ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, out_features=["stage2"])
# Strides 2, 4 and 8.
CONVNEXT_MAPS = ConvNextConfig(
    patch_size=2,
    hidden_sizes=[8, 12, 16],
    depths=[1, 1, 1],
    num_stages=3,
    out_features=["stage1", "stage2", "stage3"],
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


class Head(NamedTuple):
    """A class that reads the trunk.

    fields: of its config. result: what it is called for, by its name in the output. labels: what it takes besides
    pixels. auto_class: what loads it. refuses: stems that it cannot read; message: what it then says.
    """

    model_class: type
    fields: dict[str, Any]
    result: str
    auto_class: str
    labels: Callable[[VitEmbedConfig, torch.Tensor], dict[str, torch.Tensor]] = lambda config, images: {}
    refuses: tuple[str, ...] = ()
    message: str = ""


def class_labels(config: VitEmbedConfig, images: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"labels": torch.arange(len(images)) % config.num_labels}


def texts(config: VitEmbedConfig, images: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(len(images))}


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
NO_GRID = r"is not available with stem_type='{stem}'.*use another stem_type"
HEADS = {
    "trunk": Head(VitEmbedModel, {}, "pooler_output", "AutoModel"),
    "classification": Head(
        VitEmbedForImageClassification, {"num_labels": 5}, "logits", "AutoModelForImageClassification", class_labels
    ),
    "contrastive": Head(VitEmbedForContrastive, {}, "image_embeds", "AutoModelForZeroShotImageClassification", texts),
    "projection": Head(VitEmbedModelWithProjection, {}, "image_embeds", "AutoModel"),
    "depth-deconv": Head(
        VitEmbedForDepthEstimation,
        {},
        "predicted_depth",
        "AutoModelForDepthEstimation",
        depths,
        GRIDLESS_STEMS,
        "depth " + NO_GRID,
    ),
    "depth-dpt": Head(
        VitEmbedForDepthEstimation,
        {"depth_head_type": "dpt", "max_depth": 10.0},
        "predicted_depth",
        "AutoModelForDepthEstimation",
        depths,
        GRIDLESS_STEMS,
        "depth " + NO_GRID,
    ),
    "backbone": Head(
        VitEmbedBackbone,
        {"out_features": ["stem", "stage4"]},
        "feature_maps",
        "AutoBackbone",
        refuses=GRIDLESS_STEMS,
        message="a feature map " + NO_GRID,
    ),
    "masked": Head(
        VitEmbedForMaskedImageModeling,
        DECODER,
        "reconstruction",
        "AutoModelForMaskedImageModeling",
        hidden_patches,
        TOKEN_CHOOSING_STEMS,
        "masked image modelling hides patches, but stem_type='{stem}' chooses its tokens itself",
    ),
}

# Every stem with every head that can read it; the variants, which differ in the stem alone, with one.
PAIRS = [(stem, head) for stem in STEM_TYPES for head in HEADS if stem not in HEADS[head].refuses]
PAIRS += [(variant, "classification") for variant in VARIANTS]
REFUSED_PAIRS = [(stem, head) for head in HEADS for stem in HEADS[head].refuses]


def stem_config(name: str, head: str = "trunk", **overrides) -> VitEmbedConfig:
    """The config of a row of FAMILY with a head: 32 x 32 pixels, 4 x 4 patches, 4 layers of 32."""
    config = dual_config if head == "contrastive" else vision_config
    return config(**{**FAMILY[name], **HEADS[head].fields, **overrides})


def build(name: str, head: str = "trunk", **overrides) -> torch.nn.Module:
    """A model in eval mode, every weight random. A norm's running statistics are of some images, not 0 and 1, and a
    gate decides by what it sees, not by its bias."""
    model = randomised(HEADS[head].model_class(stem_config(name, head, **overrides)))
    stem = model.trunk.embeddings.patch_embedding
    with torch.no_grad():
        for module in getattr(stem, "gate", ()):
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.fill_(1.0)
            if hasattr(module, "bias"):
                module.bias.zero_()
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


# Every config field that the trunk alone has no use for, so that one config serves all heads.
ALL_HEADS = {"depth_head_type": "dpt", **DECODER}
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
