"""Small models of timm's own classes, and what they compute against what ours do."""

import references
import tiny
import torch
from conversions import built as ours  # noqa: F401
from conversions import converter
from safetensors.torch import load_file

from vit_embed.conversion.layouts import LAYOUTS
from vit_embed.conversion.layouts.layout import ConversionOptions

timm = references.import_package("timm")

CLASSIFIER = "VitEmbedForImageClassification"
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5}
# Options that a bare file of such a model needs; with a norm and a class token, how it pools besides.
GIVEN = {"num_attention_heads": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
CLS = {**GIVEN, "pooling_type": "cls"}

# What a VisionTransformer is made with, and what options its bare file needs besides GIVEN.
VARIANTS = {
    "class token": ({}, {"pooling_type": "cls"}),
    "norm after the mean": ({"global_pool": "avg"}, {}),
    "norm before the mean": ({"global_pool": "avg", "fc_norm": False}, {"pooling_type": "mean"}),
    "norm after the class token": ({"fc_norm": True}, {"pooling_type": "cls"}),
    "no class token": ({"class_token": False, "global_pool": "avg", "fc_norm": False}, {}),
    "no head": ({"num_classes": 0}, {"pooling_type": "cls"}),
    "no final norm": ({"final_norm": False}, {"pooling_type": "cls"}),
    "no qkv bias": ({"qkv_bias": False}, {"pooling_type": "cls"}),
    "no positions": ({"pos_embed": "none"}, {"pooling_type": "cls", "image_size": (32, 32)}),
    "layer scale": ({"init_values": 0.1}, {"pooling_type": "cls"}),
    "norm before the layers": ({"pre_norm": True}, {"pooling_type": "cls"}),
    "patch positions only": ({"no_embed_class": True}, {"pooling_type": "cls", "image_size": (32, 32)}),
    "registers without positions": (
        {"reg_tokens": 3, "no_embed_class": True},
        {"pooling_type": "cls", "image_size": (32, 32)},
    ),
    "registers with positions": ({"reg_tokens": 2}, {"pooling_type": "cls"}),
    "registers alone": ({"reg_tokens": 2, "class_token": False, "global_pool": "avg"}, {}),
    "attention pooling": ({"class_token": False, "global_pool": "map", "mlp_ratio": 3}, {}),
    "rectangle": ({"img_size": (32, 48), "patch_size": (8, 16)}, {"pooling_type": "cls", "image_size": (32, 48)}),
    # 44 * (30 / 44) is below 30 in floating point.
    "one channel, odd widths": ({"in_chans": 1, "embed_dim": 44, "mlp_ratio": 30.5 / 44}, {"pooling_type": "cls"}),
    "any size": ({"dynamic_img_size": True}, {"pooling_type": "cls"}),
}
# Registered architectures, as `registered` makes them small.
FOLDERS = {
    "vit_base_patch16_224": {},
    "vit_base_patch16_reg4_gap_256": {},
    "vit_base_patch16_siglip_256": {"num_classes": 0},
    "vit_small_patch14_reg4_dinov2": {"num_classes": 0, "img_size": (32, 64)},
    "vit_base_patch32_clip_quickgelu_224": {},
    "test_vit3": {},
    "test_vit4": {},
}

# Two orders of float32 operations, in units of the largest value; measured at most 2e-6 over three layers and 6e-6 over
# the twelve of a full size.
CLOSE = {"rtol": 0, "atol": 1e-5}


def of_timm(**arguments):
    """A VisionTransformer of timm with no idle weight."""
    make = timm.models.vision_transformer.VisionTransformer
    return tiny.randomised(make(**{**SIZES, **arguments}))


def registered(name, **arguments):
    """An architecture of timm, made small; it can be saved as timm saves it."""
    return tiny.randomised(timm.create_model(name, **{**SIZES, "depth": 2, **arguments}))


def convert(model, source_config=None, **options):
    return converter("timm")(model.state_dict(), source_config or {}, ConversionOptions(**options))


def restore(config, weights):
    """`weights` by the names that `convert` gives them."""
    prefix = "vision_model." if config.architectures == ["VitEmbedModel"] else ""
    return LAYOUTS["timm"].restore(config, {prefix + name: tensor for name, tensor in weights.items()})


def images(model) -> torch.Tensor:
    return tiny.pixels(2, *model.patch_embed.img_size)[:, : model.in_chans]


def assert_close(found, expected):
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, **CLOSE)


def assert_equal(model, converted, image_size=None):
    """Every hidden state, the pooled vector and the answer are timm's."""
    pixel_values = images(model) if image_size is None else tiny.pixels(2, *image_size)
    states = []
    hooks = [model.blocks[0].register_forward_pre_hook(lambda module, args: states.append(args[0]))]
    hooks += [block.register_forward_hook(lambda module, args, output: states.append(output)) for block in model.blocks]
    with torch.no_grad():
        features = model.forward_features(pixel_values)
        output = converted.trunk(pixel_values, output_hidden_states=True)
        expected = [*states, model.forward_head(features, pre_logits=True)]
        found = [*output.hidden_states, output.pooler_output]
        if converted.trunk is not converted:
            answer = converted(pixel_values)
            expected.append(model.forward_head(features))
            found.append(answer.logits if "logits" in answer else answer.image_embeds)
    for hook in hooks:
        hook.remove()
    assert len(found) == len(expected) == len(model.blocks) + 2 + (converted.trunk is not converted)
    for mine, theirs in zip(found, expected):
        assert_close(mine, theirs)


def saved(model, folder, **entries):
    """A folder as timm saves a model that `create_model` has made."""
    folder.mkdir()
    timm.models.save_for_hf(model, folder, safe_serialization=True, **entries)
    return folder


def reloaded(folder):
    """What timm makes of a folder, every weight of it from there."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    stored = load_file(folder / "model.safetensors")
    assert set(model.state_dict()) == set(stored)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in stored.items())
    return model
