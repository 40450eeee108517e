"""Combinations of fields and inputs that have no meaning: each is refused by the names of its fields."""

import math

import pytest
import torch
from stem_family import (
    ALL_HEADS,
    CONVNEXT_MAPS,
    DECODER,
    FAMILY,
    NEEDED,
    PYRAMID_STEMS,
    RESNET,
)
from tiny import dual_config, pixels, vision_config
from transformers import BertConfig, SwinConfig

from vit_embed import (
    VitEmbedBackbone,
    VitEmbedForContrastive,
    VitEmbedForDepthEstimation,
    VitEmbedForMaskedImageModeling,
    VitEmbedModel,
    VitEmbedModelWithProjection,
    options_vit_embed,
)
from vit_embed.options_vit_embed import GRIDLESS_STEMS, OPTIONS, TOKEN_CHOOSING_STEMS

APPLIES = {option.name: option for option in OPTIONS if option.applies_when is not None}


def choices_of(field: str) -> tuple:
    """The constant of the options' module that lists the values of a field: NORM_TYPES, CONTRASTIVE_LOSSES."""
    plural = f"{field}es" if field.endswith("s") else f"{field}s"
    return getattr(options_vit_embed, plural.upper())


def other_than_default(field: str):
    """A value of a field that is in range and not its default: read off the default, or off the field's constant."""
    needed = {name: value for fields in NEEDED.values() for name, value in fields.items()}
    default = APPLIES[field].default
    if field in needed or default is None:
        return needed.get(field, 8)
    if isinstance(default, bool):
        return not default
    if isinstance(default, str):
        return next(choice for choice in choices_of(field) if choice != default)
    return default * 2 if isinstance(default, int) else default / 2 or 0.5


def fields_for(name: str, value: str) -> dict:
    """The fields that make `name=value` a config that stands, and one in which every other field has a meaning."""
    needed = {**NEEDED, "hybrid": {"backbone_config": CONVNEXT_MAPS}}  # three stages make a pyramid
    return {**ALL_HEADS, name: value, **(needed.get(value, {}) if name == "stem_type" else {})}


@pytest.mark.parametrize("field", APPLIES)
def test_a_field_is_refused_where_it_has_no_meaning(field):
    other, meant = APPLIES[field].applies_when
    value = other_than_default(field)
    for choice in choices_of(other):
        fields = {**fields_for(other, choice), field: value}
        if choice in meant:
            assert getattr(vision_config(**fields), field) == value
            continue
        with pytest.raises(ValueError, match=f"(?s){field}=.*{other}='{choice}'; leave {field} at"):
            vision_config(**fields)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"use_cls_token": False}, ["pooling_type='cls'", "use_cls_token=True"]),
        (
            {"position_embedding_type": "sinusoidal", "hidden_size": 6, "num_attention_heads": 2},
            ["position_embedding_type='sinusoidal'", "hidden_size=6"],
        ),
        *(
            ({**FAMILY[stem], "patch_drop_rate": 0.5}, ["patch_drop_rate=0.5", f"stem_type='{stem}'"])
            for stem in TOKEN_CHOOSING_STEMS
        ),
        ({"stem_type": "adaptive", "token_merge_size": 2}, ["token_merge_size=2", "stem_type='adaptive'"]),
        (
            {"stem_type": "hierarchical", "use_feature_pyramid": True},
            ["use_feature_pyramid=True", "depth_head_type='dpt'", "got depth_head_type='deconv'"],
        ),
        ({"image_size": 36}, ["image_size=36", "patch_size=8", "pad_to_patch=True"]),
        (
            {"stem_type": "adaptive", "image_size": 40},
            ["image_size=40", "twice patch_size", "stem_type='adaptive'", "patch_size=8", "pad_to_patch=True"],
        ),
        ({"stem_type": "overlap", "patch_kernel_size": 0}, ["patch_kernel_size must be pixels > 0", "0"]),
        ({"stem_type": "overlap", "patch_kernel_size": 7}, ["patch_kernel_size", "7", "patch_size=8"]),
        ({"stem_type": "overlap", "patch_kernel_size": (16, 7)}, ["patch_kernel_size", "(16, 7)", "patch_size=8"]),
        ({"stem_type": "hierarchical", "patch_size": (8, 4)}, ["stem_type='hierarchical'", "patch_size", "(8, 4)"]),
        (
            {"stem_type": "hierarchical", "patch_size": 12, "image_size": 48},
            ["stem_type='hierarchical'", "patch_size", "12"],
        ),
        ({"stem_type": "hierarchical", "patch_size": 1}, ["stem_type='hierarchical'", "patch_size"]),
        (
            {
                "stem_type": "hierarchical",
                "patch_size": 4,
                "use_feature_pyramid": True,
                "depth_head_type": "dpt",
            },
            ["use_feature_pyramid=True", "patch_size=4"],
        ),
        (
            {"stem_type": "wavelet", "patch_size": (8, 12), "image_size": 48},
            ["stem_type='wavelet'", "patch_size", "(8, 12)"],
        ),
        ({"stem_type": "dct", "num_coefficients": 0}, ["num_coefficients must be an integer >= 1, got 0"]),
        ({"stem_type": "dct", "num_coefficients": 65}, ["num_coefficients", "64 pixels", "65", "patch_size=8"]),
        ({"stem_type": "wavelet", "num_coefficients": 65}, ["num_coefficients", "65", "patch_size=8"]),
        ({"stem_type": "hybrid"}, ["stem_type='hybrid'", "backbone_config", "got None"]),
        (
            {**PYRAMID_STEMS["hybrid"], "backbone_config": RESNET},
            ["use_feature_pyramid=True", "stem_type='hybrid'", "last 3 stages", "got ResNetConfig with [8, 12]"],
        ),
        (
            {**PYRAMID_STEMS["hybrid"], "patch_size": (8, 10), "image_size": 40},
            ["use_feature_pyramid=True", "multiple of 4 each way", "(8, 10)"],
        ),
        (
            {**PYRAMID_STEMS["hybrid"], "backbone_config": SwinConfig()},
            ["use_feature_pyramid=True", "backbone_config with hidden_sizes", "got SwinConfig with []"],
        ),
        ({"stem_type": "adaptive", "adaptive_budget": 0.2}, ["adaptive_budget", "[0.25, 1]", "0.2"]),
        ({"stem_type": "adaptive", "adaptive_budget": 1.1}, ["adaptive_budget", "1.1"]),
        ({"stem_type": "adaptive", "adaptive_budget": "half"}, ["adaptive_budget", "'half'"]),
        ({"stem_type": "adaptive", "adaptive_budget_weight": -1.0}, ["adaptive_budget_weight", ">= 0", "-1.0"]),
        ({"stem_type": "adaptive", "adaptive_budget_weight": math.nan}, ["adaptive_budget_weight", "nan"]),
        ({"token_merge_size": 9}, ["token_merge_size", "half of the 16 patch tokens", "9"]),
        ({"stem_type": "token_learner", "token_merge_size": 5}, ["token_merge_size", "half of the 8", "5"]),
        ({"stem_type": "token_learner", "num_learned_tokens": 0}, ["num_learned_tokens must be an integer >= 1"]),
        ({"patch_drop_rate": 1.0}, ["patch_drop_rate must be a number in [0, 1), got 1.0"]),
        ({"patch_drop_rate": -0.1}, ["patch_drop_rate must be a number in [0, 1), got -0.1"]),
        ({"mask_ratio": 1.0}, ["mask_ratio must be a number in [0, 1), got 1.0"]),
        ({"token_merge_size": -1}, ["token_merge_size must be an integer >= 0, got -1"]),
        ({"position_embedding_type": "polynomial", "position_degree": 0}, ["position_degree must be an integer >= 1"]),
        ({"pad_to_patch": "yes"}, ["pad_to_patch must be one of True, False; got 'yes'"]),
        ({"stem_type": "hierarchical", "stem_norm_type": "group_norm"}, ["stem_norm_type must be one of layer_norm"]),
        (
            {"decoder_hidden_size": 24, "decoder_num_attention_heads": 5},
            ["decoder_hidden_size=24", "decoder_num_attention_heads=5"],
        ),
        (
            {"decoder_hidden_size": 18, "decoder_num_attention_heads": 3},
            ["decoder_hidden_size=18", "of 4", "decoder_num_attention_heads=3"],
        ),
        ({"out_features": ["pyramid1"]}, ["out_features must be among ['stem', 'stage1'", "['pyramid1']"]),
    ],
)
def test_combinations_without_a_meaning_are_refused(overrides, named):
    with pytest.raises(ValueError) as refused:
        vision_config(**overrides)
    assert not [name for name in named if name not in str(refused.value)], str(refused.value)


@pytest.mark.parametrize("value", ["resnet", 3, {"hidden_sizes": [8]}])
def test_a_backbone_config_of_the_wrong_type_is_refused(value):
    with pytest.raises(TypeError, match="backbone_config must be a config of transformers"):
        vision_config(stem_type="hybrid", backbone_config=value)


def test_a_config_of_a_model_that_is_no_backbone_is_refused():
    with pytest.raises(ValueError, match="backbone_config"):
        VitEmbedModel(vision_config(stem_type="hybrid", backbone_config=BertConfig()))


def images_and(**inputs) -> dict:
    return {"pixel_values": pixels(2), **inputs}


MASK = torch.ones(2, 32, 32, dtype=torch.bool)
PATCHES = torch.randn(2, 32, 4, 4)


@pytest.mark.parametrize(
    ("model_class", "fields", "call", "inputs", "named"),
    [
        (
            VitEmbedModel,
            {"stem_type": "adaptive"},
            "forward",
            {"patch_embeds": PATCHES},
            ["patch_embeds", "stem_type='adaptive'"],
        ),
        (
            VitEmbedForDepthEstimation,
            PYRAMID_STEMS["hierarchical"],
            "forward",
            {"patch_embeds": PATCHES},
            ["use_feature_pyramid=True", "patch_embeds"],
        ),
        (
            VitEmbedForDepthEstimation,
            PYRAMID_STEMS["hierarchical"],
            "forward",
            images_and(pixel_mask=MASK),
            ["use_feature_pyramid=True", "pixel_mask"],
        ),
        (
            VitEmbedBackbone,
            {"stem_type": "hierarchical", "out_features": ["pyramid1", "stage2"]},
            "forward",
            {"patch_embeds": PATCHES},
            ["out_features=['pyramid1', 'stage2']", "patch_embeds"],
        ),
        (
            VitEmbedBackbone,
            {"stem_type": "hierarchical", "out_features": ["pyramid3"]},
            "forward",
            images_and(pixel_mask=MASK),
            ["out_features=['pyramid3']", "pixel_mask"],
        ),
        (VitEmbedModel, {}, "forward", {"patch_embeds": PATCHES, "pixel_mask": MASK}, ["pixel_mask", "patch_embeds"]),
        (
            VitEmbedModel,
            {"token_merge_size": 2},
            "forward",
            images_and(pixel_mask=MASK),
            ["token_merge_size=2", "pixel_mask"],
        ),
        *(
            (model_class, FAMILY[stem], call, images_and(), [f"stem_type='{stem}'", "use another stem_type"])
            for stem in GRIDLESS_STEMS
            for model_class, call in (
                (VitEmbedModel, "get_token_map"),
                (VitEmbedModel, "get_class_attentions"),
                (VitEmbedModelWithProjection, "get_patch_features"),
                (VitEmbedForContrastive, "get_patch_features"),
            )
        ),
    ],
)
def test_calls_without_a_meaning_are_refused(model_class, fields, call, inputs, named):
    config = dual_config if model_class is VitEmbedForContrastive else vision_config
    model = model_class(config(**fields)).eval()
    with pytest.raises(ValueError) as refused:
        getattr(model, call)(**inputs)
    assert not [name for name in named if name not in str(refused.value)], str(refused.value)


@pytest.mark.parametrize("model_class", [VitEmbedForDepthEstimation, VitEmbedForMaskedImageModeling])
def test_dense_heads_refuse_to_drop_patches(model_class):
    with pytest.raises(ValueError, match="patch_drop_rate=0, got 0.5|patch_drop_rate=0.5.*patch_drop_rate=0$"):
        model_class(vision_config(patch_drop_rate=0.5, **DECODER))


def test_masked_image_modelling_refuses_a_grid_that_is_not_the_patches():
    config = vision_config(stem_type="overlap", patch_kernel_size=11, patch_size=8, **DECODER)
    assert config.grid_size == (3, 3)
    with pytest.raises(ValueError, match=r"one token a patch, \(4, 4\).*patch_kernel_size=11.*patch_size=8.*\(3, 3\)"):
        VitEmbedForMaskedImageModeling(config)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (
            {"stem_type": "overlap", "patch_size": 4, "patch_kernel_size": 7, "image_size": 4},
            "patch_kernel_size.*image",
        ),
        (
            {"stem_type": "hierarchical", "patch_size": 32},
            "hidden_size must be at least 2 .*patch_size=32",
        ),
        ({"stem_type": "hybrid", "backbone_config": {"model_type": "nope"}}, "backbone_config.*'nope'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        vision_config(**fields)


def test_an_image_smaller_than_the_kernel_is_refused():
    model = VitEmbedModel(vision_config(stem_type="overlap", patch_size=4, patch_kernel_size=7))
    with pytest.raises(ValueError, match="must hold the kernel, patch_kernel_size"):
        model(pixels(1, 4, 32))
