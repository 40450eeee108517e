"""The classes, each with the kinds of config that take another path in the code, as cases for suites of properties."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from tiny import SIGLIP, dual_config, hidden_patches, pixels, randomised, tokens, vision_config
from torch import nn

import vit_embed


class Case(NamedTuple):
    """A class and a config.

    config: makes the config. inputs: makes what the model is called with. labels: besides, for a loss; None for a class
    without one. outputs: the names of what it is called for.
    """

    model_class: type
    config: Callable[[], Any]
    inputs: Callable[[], dict[str, torch.Tensor]]
    outputs: tuple[str, ...]
    labels: Callable[[], dict[str, torch.Tensor]] | None = None

    def model(self, seed: int = 0) -> nn.Module:
        """In eval mode, every weight random."""
        return randomised(self.model_class(self.config()), seed)

    def training_inputs(self) -> dict[str, torch.Tensor]:
        return {**self.inputs(), **self.labels()}


def images() -> dict[str, torch.Tensor]:
    return {"pixel_values": pixels()}


def images_and_texts() -> dict[str, torch.Tensor]:
    return {"pixel_values": pixels(), "input_ids": tokens()}


def depths() -> dict[str, torch.Tensor]:
    return {"labels": pixels()[:, 0].abs() + 0.1}


def classifier(**fields) -> Case:
    return Case(
        vit_embed.VitEmbedForImageClassification,
        lambda: vision_config(num_labels=5, **fields),
        images,
        ("logits",),
        lambda: {"labels": torch.tensor([0, 4, 2])},
    )


CLASSES = {
    "model": Case(vit_embed.VitEmbedModel, vision_config, images, ("last_hidden_state", "pooler_output")),
    "projection": Case(vit_embed.VitEmbedModelWithProjection, vision_config, images, ("image_embeds",)),
    "text": Case(
        vit_embed.VitEmbedTextModel,
        lambda: dual_config().text_config,
        lambda: {"input_ids": tokens()},
        ("last_hidden_state", "pooler_output"),
    ),
    "text, projection": Case(
        vit_embed.VitEmbedTextModelWithProjection,
        lambda: dual_config().text_config,
        lambda: {"input_ids": tokens()},
        ("text_embeds",),
    ),
    "classification": classifier(),
    "depth": Case(vit_embed.VitEmbedForDepthEstimation, vision_config, images, ("predicted_depth",), depths),
    "depth, dpt": Case(
        vit_embed.VitEmbedForDepthEstimation,
        lambda: vision_config(depth_head_type="dpt", max_depth=10.0),
        images,
        ("predicted_depth",),
        depths,
    ),
    "contrastive": Case(
        vit_embed.VitEmbedForContrastive, dual_config, images_and_texts, ("logits_per_image", "text_embeds"), dict
    ),
    "contrastive, siglip": Case(
        vit_embed.VitEmbedForContrastive,
        lambda: dual_config(**SIGLIP),
        images_and_texts,
        ("logits_per_image", "text_embeds"),
        dict,
    ),
    "masked": Case(
        vit_embed.VitEmbedForMaskedImageModeling,
        vision_config,
        lambda: {"pixel_values": pixels(), "bool_masked_pos": hidden_patches()},
        ("reconstruction",),
        dict,
    ),
    "backbone": Case(
        vit_embed.VitEmbedBackbone, lambda: vision_config(out_indices=[0, 2, 4]), images, ("feature_maps",)
    ),
}

# Those that read pixels.
IMAGE_CLASSES = [name for name in CLASSES if not name.startswith("text")]

# Options of the trunk that take another path in a graph, each with the head whose loss reaches everything.
OPTIONS = {
    "antialias": classifier(position_interpolation="bicubic_antialias"),
    "polynomial": classifier(position_embedding_type="polynomial"),
    "sinusoidal": classifier(position_embedding_type="sinusoidal", num_register_tokens=2),
    "padding": classifier(pad_to_patch=True),
    "mean": classifier(use_cls_token=False, pooling_type="mean"),
    "map": classifier(pooling_type="map"),
    "merging": classifier(token_merge_size=2),
    "layer scale": classifier(layer_scale_init_value=0.1),
}


def mostly_heavy(names, *kept: str) -> list:
    """Parameters of a test: `make test` runs it for those kept, `make test-all` for all."""
    assert set(kept) <= set(names), (kept, names)
    return [name if name in kept else pytest.param(name, marks=pytest.mark.heavy) for name in names]


def sized_inputs(case: Case, batch: int, height: int, width: int, length: int = 16) -> dict[str, torch.Tensor]:
    """Inputs of a case for images of (height, width) pixels, and texts of `length` tokens."""
    patch = torch.arange(height // 8 * (width // 8))
    made = {
        "pixel_values": lambda: pixels(batch, height, width),
        "input_ids": lambda: tokens(batch, length),
        "bool_masked_pos": lambda: torch.stack([(patch * 7 + image) % 4 > 0 for image in range(batch)]),
    }
    return {name: made[name]() for name in case.inputs()}


def flat(output, names: tuple[str, ...]) -> list[torch.Tensor]:
    """The tensors of an output under these names."""
    values = [output[name] for name in names]
    return [each for value in values for each in (value if isinstance(value, tuple) else (value,))]
