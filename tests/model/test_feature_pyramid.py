"""`use_feature_pyramid`: the maps of a hierarchical or hybrid stem, and the heads and backbones that read them."""

import pytest
import torch
from stem_family import PYRAMID_STEMS, assert_close, assert_every_weight_learns, build, inputs_of
from tiny import pixels, score

from vit_embed import VitEmbedConfig
from vit_embed.options_vit_embed import STEM_TYPES

IMAGES = pixels(2, 32, 64)


def trunk_maps(model: torch.nn.Module, stages: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """The normalised patches behind these layers, as maps of 4 x 8."""
    trunk = model.trunk
    hidden = trunk(IMAGES, output_hidden_states=True).hidden_states
    return tuple(trunk.post_layernorm(hidden[i][:, 1:]).transpose(1, 2).unflatten(2, (4, 8)) for i in stages)


@torch.no_grad()
def test_pyramid_is_an_output_of_the_trunk():
    """Of a hierarchical stem always; of a hybrid one, the maps of its backbone, where asked for."""
    assert VitEmbedConfig(stem_type="hierarchical").pyramid_widths == (96, 192, 384, 768)  # ViT-B/16
    model = build("hierarchical")
    found = model(IMAGES).feature_pyramid
    assert [tuple(maps.shape) for maps in found] == [(2, 8, 16, 32), (2, 16, 8, 16), (2, 32, 4, 8)]
    assert_close(found, model.embeddings.patch_embedding(IMAGES).feature_pyramid)
    for stem in set(STEM_TYPES) - {"hierarchical"}:
        assert build(stem)(pixels()).feature_pyramid is None
    hybrid = build("hybrid", **PYRAMID_STEMS["hybrid"])
    found = hybrid(IMAGES).feature_pyramid
    assert [tuple(maps.shape) for maps in found] == [(2, 8, 16, 32), (2, 12, 8, 16), (2, 16, 4, 8)]
    assert_close(found, hybrid.embeddings.patch_embedding.backbone(IMAGES).feature_maps)


@pytest.mark.parametrize(("stem", "widths"), [("hierarchical", (8, 16, 32)), ("hybrid", (8, 12, 16))])
@torch.no_grad()
def test_backbone_gives_the_maps_of_the_pyramid(stem, widths):
    model = build(stem, "backbone", **PYRAMID_STEMS[stem], out_features=["pyramid1", "pyramid3", "stem", "stage4"])
    assert model.config.pyramid_widths == widths
    assert model.stage_names == ["pyramid1", "pyramid2", "pyramid3", "stem", "stage1", "stage2", "stage3", "stage4"]
    assert model.channels == [widths[0], widths[2], 32, 32] and model.out_indices == [0, 2, 3, 7]
    assert model.out_feature_channels == dict(zip(model.stage_names, (*widths, *[32] * 5)))
    pyramid = model.trunk(IMAGES).feature_pyramid
    assert_close(model(IMAGES).feature_maps, (pyramid[0], pyramid[2], *trunk_maps(model, (0, 4))))


@pytest.mark.parametrize("stem", PYRAMID_STEMS)
def test_depth_reads_its_two_finest_levels_from_the_pyramid(stem):
    model = build(stem, "depth-dpt", **PYRAMID_STEMS[stem])
    fine, middle, _ = model.config.pyramid_widths
    read = []
    hook = model.depth_head.register_forward_pre_hook(lambda _, inputs: read.extend(inputs[0]))
    depth = model(IMAGES).predicted_depth
    hook.remove()
    pyramid = model.trunk(IMAGES).feature_pyramid
    assert_close(tuple(read), (*pyramid[:2], *trunk_maps(model, (3, 4))))  # strides 2 and 4 of patch 8
    assert [tuple(level.shape[1:]) for level in read] == [(fine, 16, 32), (middle, 8, 16), (32, 4, 8), (32, 4, 8)]
    for gradient in torch.autograd.grad(depth.sum(), read):
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("head", ["classification", "depth-dpt", "backbone"])
@pytest.mark.parametrize("stem", PYRAMID_STEMS)
def test_gradients_reach_every_weight(stem, head):
    """Whether or not the head reads the maps. ConvNext has a norm for each; those of the finer ones ask for none."""
    stages = {"out_features": ["stem", "stage4"]} if head == "backbone" else {}
    model = build(stem, head, **PYRAMID_STEMS[stem], **stages).train()
    score(model(**inputs_of(head, model.config))).backward()
    assert_every_weight_learns(model)
    frozen = {name.split("backbone.")[-1] for name, weight in model.named_parameters() if not weight.requires_grad}
    norms = {f"hidden_states_norms.stage{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    assert frozen == (norms if stem == "hybrid" else set())
