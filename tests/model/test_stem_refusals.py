"""Combinations of fields and inputs that have no meaning: each is refused by the names of its fields."""

import pytest
import torch
from stem_family import (
    APPLIES,
    CONVNEXT_MAPS,
    FAMILY,
    HEADS,
    PYRAMID_STEMS,
    RESNET,
    choices_of,
    fields_for,
    other_value,
    stem_config,
)
from tiny import dual_config, pixels, vision_config
from transformers import BertConfig, BitConfig, ResNetConfig, SwinConfig

from vit_embed import (
    VitEmbedBackbone,
    VitEmbedForContrastive,
    VitEmbedForDepthEstimation,
    VitEmbedModel,
    VitEmbedModelWithProjection,
)
from vit_embed.options_vit_embed import GRIDLESS_STEMS, TOKEN_CHOOSING_STEMS


@pytest.mark.parametrize("field", APPLIES)
def test_a_field_is_refused_where_it_has_no_meaning(field):
    other, meant = APPLIES[field].applies_when
    value = other_value(APPLIES[field])
    for choice in choices_of(other):
        fields = {**fields_for(other, [choice]), field: value}
        if choice in meant:
            assert getattr(vision_config(**fields), field) == value
            continue
        with pytest.raises(ValueError, match=f"(?s){field}=.*{other}='{choice}'; leave {field} at"):
            vision_config(**fields)


def assert_names(error: pytest.ExceptionInfo, named: list[str]) -> None:
    assert not [name for name in named if name not in str(error.value)], str(error.value)


def stem(name: str, **fields) -> dict:
    return {"stem_type": name, **fields}


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"use_cls_token": False}, ["pooling_type='cls'", "use_cls_token=True"]),
        (
            {"position_embedding_type": "sinusoidal", "hidden_size": 6, "num_attention_heads": 2},
            ["position_embedding_type='sinusoidal'", "hidden_size=6"],
        ),
        ({"out_features": ["pyramid1"]}, ["out_features must be among ['stem', 'stage1'", "['pyramid1']"]),
        # sizes
        ({"image_size": 36}, ["image_size=36", "patch_size=8", "pad_to_patch=True"]),
        (stem("overlap", image_size=(27, 45)), ["image_size=(27, 45) and patch_size=8", "pad_to_patch=True"]),
        (
            stem("adaptive", image_size=40),
            ["image_size=40", "twice patch_size", "stem_type='adaptive'", "patch_size=8", "pad_to_patch=True"],
        ),
        # stems
        (stem("overlap", patch_kernel_size=7), ["patch_kernel_size", "7", "patch_size=8"]),
        (stem("overlap", patch_kernel_size=(16, 7)), ["patch_kernel_size", "(16, 7)", "patch_size=8"]),
        (stem("overlap", patch_size=4, patch_kernel_size=7, image_size=4), ["patch_kernel_size", "image"]),
        (stem("hierarchical", patch_size=(8, 4)), ["stem_type='hierarchical'", "patch_size", "(8, 4)"]),
        (stem("hierarchical", patch_size=12, image_size=48), ["stem_type='hierarchical'", "patch_size", "12"]),
        (stem("hierarchical", patch_size=1), ["stem_type='hierarchical'", "patch_size"]),
        (stem("hierarchical", patch_size=32), ["hidden_size must be at least 2 ", "patch_size=32"]),
        (stem("wavelet", patch_size=(8, 12), image_size=48), ["stem_type='wavelet'", "patch_size", "(8, 12)"]),
        (stem("wavelet", num_coefficients=65), ["num_coefficients", "65", "patch_size=8"]),
        (stem("dct", num_coefficients=65), ["num_coefficients", "64 pixels", "65", "patch_size=8"]),
        (stem("hybrid"), ["stem_type='hybrid'", "backbone_config", "got None"]),
        (stem("hybrid", backbone_config={"model_type": "nope"}), ["backbone_config", "'nope'"]),
        # pyramids
        (stem("hierarchical", use_feature_pyramid=True), ["use_feature_pyramid=True", "got depth_head_type='deconv'"]),
        ({**PYRAMID_STEMS["hierarchical"], "patch_size": 4}, ["use_feature_pyramid=True", "patch_size=4"]),
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
        # merging, dropping
        ({"token_merge_size": 9}, ["token_merge_size must be at most half of the 16 patch tokens, got 9"]),
        (stem("token_learner", token_merge_size=5), ["token_merge_size", "half of the 8 patch tokens, got 5"]),
        (stem("adaptive", token_merge_size=2), ["token_merge_size=2", "stem_type='adaptive'"]),
        *(
            ({**FAMILY[name], "patch_drop_rate": 0.5}, ["patch_drop_rate=0.5", f"stem_type='{name}'"])
            for name in TOKEN_CHOOSING_STEMS
        ),
        # masked image modelling
        (
            {"decoder_hidden_size": 24, "decoder_num_attention_heads": 5},
            ["decoder_hidden_size must be a multiple of", "decoder_hidden_size=24", "decoder_num_attention_heads=5"],
        ),
        (
            {"decoder_hidden_size": 18, "decoder_num_attention_heads": 3},
            ["decoder_hidden_size=18", "of 4", "decoder_num_attention_heads=3"],
        ),
    ],
)
def test_combinations_without_a_meaning_are_refused(overrides, named):
    with pytest.raises(ValueError) as refused:
        vision_config(**overrides)
    assert_names(refused, named)


@pytest.mark.parametrize("value", ["resnet", 3, {"hidden_sizes": [8]}])
def test_a_backbone_config_of_the_wrong_type_is_refused(value):
    with pytest.raises(TypeError, match="backbone_config must be a config of transformers"):
        vision_config(stem_type="hybrid", backbone_config=value)


def with_features(config, *names: str):
    """The config of a backbone that gives other maps."""
    return type(config)(**{**config.to_dict(), "out_features": list(names), "out_indices": None})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backbone_config": BertConfig()}, "backbone_config must be of a transformers backbone"),
        ({"backbone_config": RESNET, "num_channels": 1}, "backbone_config.num_channels must be num_channels=1, got 3"),
        # Stages that nothing reads have no gradients, which DistributedDataParallel does not forgive.
        *(
            (
                {"backbone_config": with_features(RESNET, *names)},
                r"backbone_config must give \['stage2'\] with use_feature_pyramid=False",
            )
            for names in (["stage1"], ["stage1", "stage2"])
        ),
        (
            {**PYRAMID_STEMS["hybrid"], "backbone_config": with_features(CONVNEXT_MAPS, "stage3")},
            r"must give \['stage1', 'stage2', 'stage3'\] with use_feature_pyramid=True",
        ),
        (
            {
                **PYRAMID_STEMS["hybrid"],
                "backbone_config": ResNetConfig(
                    hidden_sizes=[8, 8, 16],
                    depths=[1, 1],
                    layer_type="basic",
                    out_features=["stem", "stage1", "stage2"],
                ),
            },
            r"hidden_sizes=\[8, 8, 16\].*\['stem', 'stage1', 'stage2'\].* one entry a stage",
        ),
    ],
)
def test_backbones_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        VitEmbedModel(vision_config(**{"stem_type": "hybrid", "backbone_config": RESNET, **fields}))


# Strides 4, 8 and 8: the last is right, the first is not, and would be scaled to the others' size.
BIT = BitConfig(
    embedding_size=8,
    hidden_sizes=[8, 12, 16],
    depths=[1, 1, 1],
    layer_type="preactivation",
    num_groups=2,
    output_stride=8,
    out_features=["stage1", "stage2", "stage3"],
)


@pytest.mark.parametrize(
    ("fields", "height", "message"),
    [
        (
            stem("hybrid", backbone_config=RESNET, patch_size=4),
            32,
            r"backbone_config must have a stride of patch_size \(4, 4\).*got \[\(4, 4\)\]",
        ),
        (
            {**PYRAMID_STEMS["hybrid"], "backbone_config": BIT},
            32,
            r"those of a pyramid half of the next one's.* got \[\(8, 8\), \(4, 4\), \(4, 4\)\]",
        ),
        (stem("overlap", patch_size=4, patch_kernel_size=7), 4, "must hold the kernel, patch_kernel_size"),
    ],
)
def test_images_that_the_stem_cannot_read_are_refused(fields, height, message):
    model = VitEmbedModel(vision_config(**fields))
    with pytest.raises(ValueError, match=message):
        model(pixels(1, height, 32))


MASK = torch.ones(2, 32, 32, dtype=torch.bool)
PATCHES = {"patch_embeds": torch.randn(2, 32, 4, 4)}
IMAGES = {"pixel_values": pixels(2)}
PADDED = {**IMAGES, "pixel_mask": MASK}
PYRAMID = PYRAMID_STEMS["hierarchical"]
MAPS = stem("hierarchical", out_features=["pyramid1", "stage2"])


@pytest.mark.parametrize(
    ("model_class", "fields", "call", "inputs", "named"),
    [
        (VitEmbedModel, stem("adaptive"), "forward", PATCHES, ["patch_embeds", "stem_type='adaptive'"]),
        (VitEmbedForDepthEstimation, PYRAMID, "forward", PATCHES, ["use_feature_pyramid=True", "patch_embeds"]),
        (VitEmbedForDepthEstimation, PYRAMID, "forward", PADDED, ["use_feature_pyramid=True", "pixel_mask"]),
        (VitEmbedBackbone, MAPS, "forward", PATCHES, ["out_features=['pyramid1', 'stage2']", "patch_embeds"]),
        (VitEmbedBackbone, MAPS, "forward", PADDED, ["out_features=['pyramid1', 'stage2']", "pixel_mask"]),
        (VitEmbedModel, {}, "forward", {**PATCHES, "pixel_mask": MASK}, ["pixel_mask", "patch_embeds have no pixels"]),
        (VitEmbedModel, {"token_merge_size": 2}, "forward", PADDED, ["token_merge_size=2", "pixel_mask"]),
        *(
            (model_class, FAMILY[name], call, IMAGES, [f"stem_type='{name}'", "use another stem_type"])
            for name in GRIDLESS_STEMS
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
    assert_names(refused, named)


NO_GRID = r"is not available with stem_type='token_learner'.*use another stem_type"


@pytest.mark.parametrize(
    ("head", "fields", "message"),
    [
        *((head, FAMILY["token_learner"], "depth " + NO_GRID) for head in ("depth-deconv", "depth-dpt")),
        ("backbone", FAMILY["token_learner"], "a feature map " + NO_GRID),
        *(
            ("masked", FAMILY[name], f"masked image modelling hides patches, but stem_type='{name}' chooses its tokens")
            for name in TOKEN_CHOOSING_STEMS
        ),
        ("depth-deconv", {"patch_drop_rate": 0.5}, "depth needs every patch.*patch_drop_rate=0.5"),
        ("masked", {"patch_drop_rate": 0.5}, "mask_ratio.*; set patch_drop_rate=0, got 0.5"),
        # Hidden patches have no token, and images may keep different counts: the same as with `pixel_mask`.
        ("masked", {"token_merge_size": 2}, "token_merge_size"),
        (
            "masked",
            stem("overlap", patch_kernel_size=11),
            r"one token a patch, \(4, 4\).*patch_kernel_size=11.*patch_size=8.*\(3, 3\)",
        ),
        (
            "backbone",
            {**MAPS, "reshape_hidden_states": False},
            "reshape_hidden_states=False gives tokens, but out_features=.*pyramid1",
        ),
    ],
)
def test_heads_refuse_what_they_cannot_read(head, fields, message):
    with pytest.raises(ValueError, match=message):
        HEADS[head].model_class(stem_config("conv", head, **fields))
