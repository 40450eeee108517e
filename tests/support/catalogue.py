"""The classes, each with the kinds of config that take another path in the code, as cases for suites of properties."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import stem_family
import torch
from tiny import SIGLIP, TEXT, dual_config, hidden_patches, pixels, randomised, tokens, vision_config
from torch import nn

import vit_embed

# A last layer and one that is not: the least that differ, as time goes with the layers that are traced.
SHALLOW = {"num_hidden_layers": 2}


class Case(NamedTuple):
    """A class and a config.

    config: makes the config. inputs: makes what the model is called with. outputs: the names of what it is called for.
    labels: besides, for a loss; None for a class without one. stem: a row of `stem_family.FAMILY` to build it of.
    """

    model_class: type
    config: Callable[[], Any]
    inputs: Callable[[], dict[str, torch.Tensor]]
    outputs: tuple[str, ...]
    labels: Callable[[], dict[str, torch.Tensor]] | None = None
    stem: str | None = None

    def model(self, seed: int = 0) -> nn.Module:
        """In eval mode, every weight random."""
        if self.stem:
            return stem_family.build(self.stem, "classification", **SHALLOW)
        return randomised(self.model_class(self.config()), seed)

    def training_inputs(self) -> dict[str, torch.Tensor]:
        """With what gives a loss, where there is one."""
        return {**self.inputs(), **(self.labels() if self.labels else {})}


def vision(**fields):
    return vision_config(**{**SHALLOW, **fields})


def dual(**fields):
    return dual_config(**{**SHALLOW, **fields, "text_config": {**fields.get("text_config", TEXT), **SHALLOW}})


def images() -> dict[str, torch.Tensor]:
    return {"pixel_values": pixels()}


def texts() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens()}


def images_and_texts() -> dict[str, torch.Tensor]:
    return {**images(), **texts()}


def images_and_masks() -> dict[str, torch.Tensor]:
    return {**images(), "bool_masked_pos": hidden_patches()}


def depths() -> dict[str, torch.Tensor]:
    return {"labels": pixels()[:, 0].abs() + 0.1}


def classifier(stem: str | None = None, **fields) -> Case:
    return Case(
        vit_embed.VitEmbedForImageClassification,
        lambda: vision(num_labels=5, **fields),
        images,
        ("logits",),
        lambda: {"labels": torch.tensor([0, 4, 2])},
        stem,
    )


def depth(**fields) -> Case:
    return Case(vit_embed.VitEmbedForDepthEstimation, lambda: vision(**fields), images, ("predicted_depth",), depths)


def contrastive(**fields) -> Case:
    outputs = ("logits_per_image", "text_embeds")
    return Case(vit_embed.VitEmbedForContrastive, lambda: dual(**fields), images_and_texts, outputs, dict)


CLASSES = {
    "model": Case(vit_embed.VitEmbedModel, vision, images, ("last_hidden_state", "pooler_output")),
    "projection": Case(vit_embed.VitEmbedModelWithProjection, vision, images, ("image_embeds",)),
    "text": Case(
        vit_embed.VitEmbedTextModel, lambda: dual().text_config, texts, ("last_hidden_state", "pooler_output")
    ),
    "text, projection": Case(
        vit_embed.VitEmbedTextModelWithProjection, lambda: dual().text_config, texts, ("text_embeds",)
    ),
    "classification": classifier(),
    "depth": depth(),
    "depth, dpt": depth(depth_head_type="dpt", max_depth=10.0, num_hidden_layers=4),
    "contrastive": contrastive(),
    "contrastive, siglip": contrastive(**SIGLIP),
    "masked": Case(vit_embed.VitEmbedForMaskedImageModeling, vision, images_and_masks, ("reconstruction",), dict),
    "backbone": Case(vit_embed.VitEmbedBackbone, lambda: vision(out_indices=[0, 1, 2]), images, ("feature_maps",)),
}

# Those that read pixels, and those with a loss.
IMAGE_CLASSES = [name for name in CLASSES if not name.startswith("text")]
WITH_LOSS = [name for name, case in CLASSES.items() if case.labels]

# Options of the trunk that take another path in a graph, each with the head whose loss reaches everything.
OPTIONS = {
    "antialias": classifier(position_interpolation="bicubic_antialias"),
    "polynomial": classifier(position_embedding_type="polynomial"),
    "sinusoidal": classifier(position_embedding_type="sinusoidal", num_register_tokens=2),
    "padding": classifier(pad_to_patch=True),
    "mean": classifier(use_cls_token=False, pooling_type="mean"),
    "map": classifier(pooling_type="map"),
    "merging": classifier(token_merge_size=2),
    "layer scale": classifier(layer_scale_init_value=0.1, qkv_bias=False),
}
STEMS = {f"stem {name}": classifier(stem=name) for name in stem_family.FAMILY}
# What a pass does in another order or way, without another path for a graph.
ARITHMETIC = {
    "norm before mean": classifier(pooling_type="mean", norm_before_pooling=True, hidden_act="relu"),
    "rms norm": classifier(norm_type="rms_norm", hidden_act="silu", position_embedding_type="none"),
    "final rms norm": classifier(final_norm_type="rms_norm", hidden_act="gelu"),
    "post norm": classifier(norm_position="post", use_pre_layernorm=False, final_norm_type="none"),
    "rectangle": classifier(image_size=(32, 64), patch_size=(8, 4), stem_type="linear", patch_bias=True),
    "raw depth": depth(deconv_kernel_size=4, depth_activation="identity", depth_loss="l1"),
}
# What wrappers, graphs and adapters are tested on.
GRAPHS = {**CLASSES, **STEMS, **OPTIONS}


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
