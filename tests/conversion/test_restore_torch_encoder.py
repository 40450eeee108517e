"""Vision transformers on torch.nn.TransformerEncoderLayer: every author's own names, there and back."""

import pytest
import tiny
import torch
from torch_encoder_reference import (
    POST,
    PRE,
    MiniViT,
    MiniViTDepth,
    ViTTiny,
    assert_bit_equal,
    assert_close,
    converted,
    from_torch,
    renamed,
    restored,
    small,
)

from vit_embed import VitEmbedForDepthEstimation, VitEmbedForImageClassification
from vit_embed.conversion.layouts import LAYOUTS, detect_layout

NAMES = [
    {
        "patch_embed": "patch_embed.proj",
        "encoder.layers": "transformer.layers",
        "norm": "mlp_head.0",
        "head": "mlp_head.1",
    },
    {
        "patch_embed": "conv_proj",
        "cls_token": "class_token",
        "pos_embed": "positional_embedding",
        "norm": "encoder.norm",
    },
    {"patch_embed": "to_patches", "encoder.layers": "blocks", "norm": "ln", "head": "to_logits"},
    {"patch_embed": "patch_embedding.proj", "pos_embed": "pos_embedding", "norm": "head.0", "head": "head.1"},
    {"encoder.layers": "my_own_blocks", "norm": "fc.0", "head": "fc.1"},
    {name: f"net.{name}" for name in ("patch_embed", "cls_token", "pos_embed", "encoder.layers", "norm", "head")},
    {name: f"vit.{name}" for name in ("patch_embed", "cls_token", "pos_embed", "encoder.layers", "norm")},
]


@pytest.mark.parametrize("names", NAMES, ids=lambda names: names.get("patch_embed", "patch_embed"))
@torch.no_grad()
def test_names_of_other_authors_come_back_as_they_were(names):
    source, pixel_values = small(MiniViT), tiny.pixels()
    state_dict = renamed(source.state_dict(), names)
    assert detect_layout(state_dict, {})[0] == "torch_encoder"
    model = converted(state_dict, POST)
    assert_close(model(pixel_values).logits, source(pixel_values))
    assert_bit_equal(restored(model), state_dict)


@pytest.mark.parametrize(
    "names", [("deconv1", "deconv2", "out"), [f"depth_head.{i}" for i in (0, 2, 4)], [f"head.{i}" for i in (0, 2, 4)]]
)
@torch.no_grad()
def test_names_of_depth_heads(names):
    source = small(MiniViTDepth)
    state_dict = renamed(source.state_dict(), dict(zip(("decoder.0", "decoder.2", "decoder.4"), names)))
    model = converted(state_dict, POST)
    assert_close(model(tiny.pixels()).predicted_depth, source(tiny.pixels()))
    assert_bit_equal(restored(model), state_dict)


@pytest.mark.parametrize("leading", [0, 1])
def test_class_token_and_positions_with_fewer_axes(leading):
    source = small(MiniViT).state_dict()
    positions = {"pos_embed": source["pos_embed"]} if leading else {"pos_embed.weight": source["pos_embed"][0]}
    state_dict = {key: tensor for key, tensor in source.items() if key != "pos_embed"} | positions
    state_dict["cls_token"] = state_dict["cls_token"].reshape([1] * leading + [32])
    assert_bit_equal(restored(converted(state_dict, POST)), state_dict)


def test_a_model_that_was_trained_here_gets_the_canonical_names():
    config, _ = from_torch(small(MiniViT).state_dict(), POST)
    config.converted_from = None
    model = tiny.randomised(VitEmbedForImageClassification(config))
    source = small(MiniViT)
    source.load_state_dict(restored(model))  # strict
    assert_close(model(tiny.pixels()).logits, source(tiny.pixels()))
    config.depth_activation, config.final_norm_type = "identity", "none"
    depth = tiny.randomised(VitEmbedForDepthEstimation(config))
    source = small(MiniViTDepth)
    source.load_state_dict(restored(depth))
    assert_close(depth(tiny.pixels()).predicted_depth, source(tiny.pixels()))


def test_a_new_head_on_a_converted_trunk():
    config, weights = from_torch(small(ViTTiny).state_dict(), PRE)
    config.num_labels = 3
    keys = set(restored(tiny.randomised(VitEmbedForImageClassification(config))))
    assert keys == {*small(ViTTiny).state_dict(), "head.weight", "head.bias"}


# What torch's layer cannot express

UNFIT = {
    "layer_scale_init_value": 0.1,
    "norm_type": "rms_norm",
    "num_register_tokens": 2,
    "stem_type": "linear",
    "position_embedding_type": "sinusoidal",
    "use_pre_layernorm": True,
    "qkv_bias": False,
    "pooling_type": "map",
    "token_merge_size": 1,
}


@pytest.mark.parametrize("field", UNFIT)
def test_what_torchs_layer_does_not_have_is_refused_by_field(field):
    config, weights = from_torch(small(MiniViT).state_dict(), POST)
    setattr(config, field, UNFIT[field])
    with pytest.raises(ValueError, match=f"TransformerEncoderLayer cannot express this model: {field}="):
        LAYOUTS["torch_encoder"].restore(config, weights)


def test_other_heads_and_foreign_records_are_refused():
    config, weights = from_torch(small(MiniViT).state_dict(), POST)
    for changes, reason in [
        ({"architectures": ["VitEmbedForContrastive"]}, "cannot express VitEmbedForContrastive"),
        ({"architectures": ["VitEmbedForDepthEstimation"]}, "depth_activation=None"),
        ({"converted_from": {"layout": "torch_encoder"}}, "names=None"),
        ({"converted_from": {"layout": "torch_encoder", "names": {"norm": "{n}"}, "leading_axes": {}}}, "names="),
    ]:
        changed = type(config)(**{**config.to_dict(), **changes})
        with pytest.raises(ValueError, match=reason):
            LAYOUTS["torch_encoder"].restore(changed, weights)
