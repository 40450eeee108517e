"""timm's vision transformers: its names, folders and bare files, what is asked for and refused, the way back.

What holds for every layout is in test_there_and_back.py.
"""

import contextlib
import functools
import json
import logging
import re

import pytest
import tiny
import torch
from timm_reference import (
    CLASSIFIER,
    CLS,
    GIVEN,
    SIZES,
    assert_close,
    assert_equal,
    convert,
    images,
    of_timm,
    ours,
    registered,
    reloaded,
    restore,
    saved,
    timm,
)
from transformers import AutoImageProcessor

from vit_embed import VitEmbedConfig, VitEmbedForContrastive, VitEmbedModel, VitEmbedModelWithProjection
from vit_embed.conversion.layouts import LAYOUTS, detect_layout
from vit_embed.conversion.layouts.layout import MODEL_CLASSES, ConversionOptions, SampleInputs
from vit_embed.conversion.layouts.timm.config import READ_ARGUMENTS, SHOWN_ARGUMENTS
from vit_embed.conversion.layouts.timm.names import FOREIGN_NAMES, find_architecture
from vit_embed.convert_checkpoint import convert_checkpoint, main, restore_checkpoint


@pytest.mark.parametrize("norm_layer, eps", [("rmsnorm", 1e-6), (None, 1e-5)])
def test_the_norm_is_what_the_config_says(norm_layer, eps):
    name = "vit_base_patch16_224" if norm_layer else "vit_base_patch16_clip_224"
    model = tiny.randomised(timm.create_model(name, **{**SIZES, "norm_layer": norm_layer}))
    # So small a residual stream that the epsilon shows.
    for tensor in (model.cls_token, model.pos_embed, model.patch_embed.proj.weight):
        tensor.data *= 1e-3
    stated = {"architecture": name, "model_args": {"num_heads": 4, "norm_layer": norm_layer}, "num_classes": 5}
    config, weights = convert(model, stated)
    assert (config.norm_type, config.layer_norm_eps) == ("rms_norm" if norm_layer else "layer_norm", eps)
    assert_equal(model, ours(config, weights))
    restored = restore(config, weights)
    back = timm.create_model(name, **restored.files["config.json"]["model_args"])
    back.load_state_dict(restored.state_dict)
    assert_equal(back.eval(), ours(config, weights))


def test_other_sizes_resample_positions_as_timm_does():
    model = of_timm(dynamic_img_size=True)
    assert_equal(model, ours(*convert(model, **CLS)), image_size=(48, 72))


def test_positions_of_registers_are_added_in_float32():
    model = of_timm(reg_tokens=2).bfloat16()
    config, weights = convert(model, **CLS, dtype=torch.bfloat16)
    expected = (model.reg_token.float() + model.pos_embed[:, 1:3].float()).bfloat16()[0]
    assert torch.equal(weights["vision_model.embeddings.register_tokens"], expected)


# Names


# Blocks that are no plain layers though their keys start like them, and what of them shows it.
OTHER_LAYERS = {"attn.lambda_q1", "attn.norm.weight", "mlp.fc1_g.weight"}
ACTIVATIONS = {"GELU": "gelu", "QuickGELU": "quick_gelu", "GELUTanh": "gelu_pytorch_tanh"}
POOLINGS = {"token": "cls", "avg": "mean", "map": "map"}


def test_every_name_of_timm_stands_for_what_timm_makes_of_it():
    """The whole table against one layer of each of timm's own models."""
    plain = timm.list_models(module="vision_transformer") + timm.list_models(module="deit")
    named = {name for name in timm.list_models() if find_architecture(name) is not None}
    assert named <= set(plain) and len(named) > 140
    for name in plain:
        with torch.device("meta"):
            model = timm.create_model(name, depth=1, weight_init="skip")
        block, found = model.blocks[0], find_architecture(name)
        if found is None:  # its keys or a part of its name show that it is something else
            keys, parts = set(block.state_dict()), set(name.split("_"))
            assert "attn.qkv.weight" not in keys or keys & OTHER_LAYERS or parts & set(FOREIGN_NAMES), name
            continue
        norm_type = "rms_norm" if type(block.norm1).__name__ == "RmsNorm" else "layer_norm"
        expected = (model.embed_dim, block.attn.num_heads, norm_type, block.norm1.eps)
        assert (found.width, found.num_heads, found.norm_type, found.eps) == expected, name
        assert type(block).__name__ == "Block" and type(block.attn).__name__ == "Attention"
        if type(block.mlp).__name__ == "Mlp":  # a gated one is refused
            assert found.hidden_act == ACTIVATIONS[type(block.mlp.act).__name__], name


def test_pooling_and_positions_of_every_name_are_timms():
    """What names and keys say of each of timm's models, made narrow and shallow."""
    names = timm.list_models(module="vision_transformer") + timm.list_models(module="deit")
    for name in names:
        named = find_architecture(name)
        if named is None or re.fullmatch("vit_giant_.*(dinov2|tipsv2)|vit_so150m_.*_map_256", name):
            continue  # those two kinds are refused below
        model = timm.create_model(name, depth=1, embed_dim=named.num_heads, num_classes=0, weight_init="skip")
        stated = {"architecture": name, "model_args": {"embed_dim": named.num_heads, "num_heads": named.num_heads}}
        config, _ = convert(model, stated, trunk_only=True)
        grid = tuple(zip(model.patch_embed.patch_size, model.patch_embed.grid_size))
        assert config.pooling_type == POOLINGS[model.global_pool], name
        assert config.image_shape == tuple(side * number for side, number in grid), name
        assert config.converted_from["model_args"]["no_embed_class"] == model.no_embed_class, name


# Folders, through the whole pipeline


def test_the_head_of_a_clip_tower_without_a_bias_is_its_projection(tmp_path):
    model = registered("vit_base_patch32_clip_224", num_classes=7)
    model.head.bias.data.zero_()
    differences = convert_checkpoint(saved(model, tmp_path / "source"), tmp_path / "ours")
    assert set(differences) == {"last_hidden_state", "pooler_output", "image_features"}
    tower = VitEmbedModelWithProjection.from_pretrained(tmp_path / "ours").eval()
    assert tower.config.projection_dim == 7
    assert_equal(model, tower)
    restored = restore_checkpoint(tmp_path / "ours", "timm", output_dir=tmp_path / "back")
    assert restored.files["config.json"]["architecture"] == "vit_base_patch32_clip_224"
    back = reloaded(tmp_path / "back").state_dict()
    assert all(torch.equal(back[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("entries", [{"label_names": ["a", "b", "c"]}, {"label_descriptions": {"a": "b"}}])
def test_a_head_with_labels_is_a_classifier_though_the_tower_is_clips(entries):
    model = registered("vit_base_patch32_clip_224", num_classes=3)
    model.head.bias.data.zero_()
    stated = {"architecture": "vit_base_patch32_clip_224", "model_args": {"num_heads": 4}, **entries}
    config, weights = convert(model, stated)
    assert config.architectures == [CLASSIFIER] and config.num_labels == 3
    assert config.id2label[0] == ("a" if "label_names" in entries else "LABEL_0")
    assert_equal(model, ours(config, weights))


def test_a_distilled_deit_gives_its_trunk(tmp_path):
    model = tiny.randomised(timm.create_model("deit_tiny_distilled_patch16_224"))
    source = saved(model, tmp_path / "source")
    with pytest.raises(ValueError, match="distilled.*--trunk_only"):
        convert_checkpoint(source, tmp_path / "refused")
    differences = convert_checkpoint(source, tmp_path / "ours", ConversionOptions(trunk_only=True))
    assert set(differences) == {"last_hidden_state", "pooler_output"}
    trunk = VitEmbedModel.from_pretrained(tmp_path / "ours").eval()
    assert (trunk.config.num_register_tokens, trunk.config.num_attention_heads) == (1, 3)
    with torch.no_grad():
        states = trunk(images(model)).last_hidden_state
        assert_close(trunk.post_layernorm(states), model.forward_features(images(model)))
    restore_checkpoint(tmp_path / "ours", "timm", output_dir=tmp_path / "back")
    assert_equal(reloaded(tmp_path / "back"), trunk)


def test_a_bare_file_by_the_command_line(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    model = of_timm(reg_tokens=1, no_embed_class=True)
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "vit.pth")
    given = ["--num_attention_heads=4", "--hidden_act=gelu", "--layer_norm_eps=1e-6", "--pooling_type=cls"]
    given += ["--image_size", "32", "32"]
    assert main([str(tmp_path / "vit.pth"), "--output_dir", str(tmp_path / "ours"), *given]) == 0
    assert "layout timm, as it has timm's keys" in caplog.text and "largest difference of logits" in caplog.text
    back = ["--reverse", "--layout=timm", "--output_file", str(tmp_path / "back.safetensors")]
    assert main([str(tmp_path / "ours"), *back]) == 0
    call = re.search(r"for a file (timm\.create_model\(.*\))$", caplog.text, re.MULTILINE)[1]
    loaded = eval(call, {"timm": timm}).eval()  # the log's own words load it
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in model.state_dict().items())


# Models of ours as timm's


@pytest.mark.parametrize(
    "model_class, fields",
    [
        ("VitEmbedModelWithProjection", {}),
        ("VitEmbedModel", {"norm_type": "rms_norm", "layer_norm_eps": 1e-6}),
        (CLASSIFIER, {"use_pre_layernorm": False, "num_register_tokens": 2, "pooling_type": "mean", "num_labels": 3}),
        (CLASSIFIER, {"patch_bias": True, "use_pre_layernorm": False, "pad_to_patch": True, "hidden_act": "relu"}),
        ("VitEmbedModel", {"use_cls_token": False, "pooling_type": "map", "layer_norm_eps": 1e-6}),
        ("VitEmbedModel", {"pooling_type": "map", "num_register_tokens": 1, "intermediate_size": 43}),
    ],
)
def test_a_model_of_ours_as_timms_folder(model_class, fields, tmp_path):
    model = tiny.randomised(MODEL_CLASSES[model_class](tiny.vision_config(**fields)))
    model.save_pretrained(tmp_path / "ours")
    restore_checkpoint(tmp_path / "ours", "timm", output_dir=tmp_path / "timm")
    assert_equal(reloaded(tmp_path / "timm"), model)
    assert convert_checkpoint(tmp_path / "timm", tmp_path / "again")  # compared with timm's own
    again = MODEL_CLASSES[model_class].from_pretrained(tmp_path / "again")
    mine = model.state_dict()
    assert set(again.state_dict()) - set(mine) <= {"vision_model.embeddings.patch_embedding.bias"} | {
        "embeddings.patch_embedding.bias"
    }
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in mine.items())
    assert again.config.pad_to_patch == model.config.pad_to_patch


def test_another_epsilon_has_a_file_and_no_folder(tmp_path):
    model = tiny.randomised(VitEmbedModel(tiny.vision_config(layer_norm_eps=1e-12)))
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="--output_file"):
        restore_checkpoint(tmp_path / "ours", "timm", output_dir=tmp_path / "timm")
    restored = restore_checkpoint(tmp_path / "ours", "timm", output_file=tmp_path / "vit.pth")
    call = restored.usage.partition(".load_state_dict")[0]
    back = eval(call, {"timm": timm, "functools": functools})
    back.load_state_dict(torch.load(tmp_path / "vit.pth"))
    assert_equal(back.eval(), model)


def test_the_image_tower_of_a_dual_encoder_goes_to_timm(tmp_path):
    VitEmbedForContrastive(tiny.dual_config()).save_pretrained(tmp_path / "dual")
    VitEmbedModelWithProjection.from_pretrained(tmp_path / "dual").save_pretrained(tmp_path / "tower")
    restore_checkpoint(tmp_path / "tower", "timm", output_dir=tmp_path / "timm")
    assert_equal(reloaded(tmp_path / "timm"), VitEmbedModelWithProjection.from_pretrained(tmp_path / "dual").eval())


def test_a_position_that_was_trained_since_takes_the_form_that_has_one():
    model = of_timm(no_embed_class=True, reg_tokens=1)
    config, weights = convert(model, **CLS, image_size=(32, 32))
    weights["vision_model.embeddings.position_embedding.weight"][0] += 1
    restored = restore(config, weights)
    back = timm.models.vision_transformer.VisionTransformer(**restored.files["config.json"]["model_args"])
    assert not back.no_embed_class
    back.load_state_dict(restored.state_dict)
    assert_equal(back.eval(), ours(config, weights))


# What is found, what is asked for, what is refused


def test_timms_files_are_detected_with_and_without_a_config():
    state_dict = of_timm().state_dict()
    assert detect_layout(state_dict, {})[0] == "timm"
    layout, reason = detect_layout(state_dict, {"architecture": "vit_tiny_patch16_224.augreg_in21k"})
    assert layout == "timm" and "vit_tiny_patch16_224" in reason
    detect = LAYOUTS["timm"].detect
    for key in ("mask_token", "register_tokens"):  # Meta's own DINOv2
        assert detect({**state_dict, key: torch.zeros(1, 32)}, {}) is None
    assert detect({key: tensor for key, tensor in state_dict.items() if "attn.qkv" not in key}, {}) is None


def test_a_name_of_another_width_or_an_unknown_name_gives_no_heads():
    model = of_timm()
    with pytest.raises(ValueError, match="nothing is known of vit_base_patch16_224 with a width of 32"):
        convert(model, {"architecture": "vit_base_patch16_224"})
    with pytest.raises(ValueError, match="--num_attention_heads"):
        convert(model, {"architecture": "vit_base_patch16_new_224"}, hidden_act="gelu", pooling_type="cls")
    stated = {"architecture": "vit_base_patch16_224", "model_args": {"num_heads": 8}}
    assert convert(model, stated)[0].num_attention_heads == 8
    assert convert(model, stated, num_attention_heads=4)[0].num_attention_heads == 4  # the option wins


def test_a_grid_that_two_readings_fit_is_asked_for():
    model = of_timm(img_size=24, reg_tokens=4, no_embed_class=True)  # 9 patches, or 5 tokens before 4
    with pytest.raises(ValueError, match="9 positions, which may be 9 patches, or 5 prefix tokens.*--image_size"):
        convert(model, **CLS)
    assert_equal(model, ours(*convert(model, **CLS, image_size=(24, 24))))
    stated = {"architecture": "x", "pretrained_cfg": {"input_size": [3, 24, 24]}}
    assert_equal(model, ours(*convert(model, stated, **CLS)))
    with pytest.raises(ValueError, match="13 positions.*12 patches, which is no square grid; .*--image_size"):
        convert(of_timm(img_size=(24, 32)), **CLS)
    with pytest.raises(ValueError, match="14 patches, which is no square grid.*--image_size"):
        convert(of_timm(img_size=(16, 56), class_token=False, global_pool="avg"), **GIVEN)
    with pytest.raises(ValueError, match="--image_size must have"):
        convert(of_timm(), **CLS, image_size=(16, 16))
    with pytest.raises(ValueError, match="--image_size"):
        convert(of_timm(pos_embed="none"), **CLS)
    assert convert(of_timm(pos_embed="none"), {"architecture": "x", "model_args": {"img_size": 40}}, **CLS)[
        0
    ].image_shape == (40, 40)


@pytest.mark.parametrize("no_embed_class, size", [(False, (64, 48)), (True, (56, 56))])
def test_a_square_table_is_not_taken_to_leave_out_the_prefix_tokens(no_embed_class, size):
    model = of_timm(img_size=size, no_embed_class=no_embed_class)  # 49 rows, for 48 patches or for 49
    with pytest.raises(ValueError, match="49 patches, or 1 prefix tokens and 48 patches.*--image_size HEIGHT WIDTH"):
        convert(model, **CLS)
    stated = {"architecture": "x", "pretrained_cfg": {"input_size": [3, 56, 48]}}  # of neither
    with pytest.raises(ValueError, match="--image_size HEIGHT WIDTH"):
        convert(model, stated, **CLS)
    with pytest.raises(ValueError, match="--image_size must have 48 or 49 patches"):
        convert(model, **CLS, image_size=(56, 48))
    assert_equal(model, ours(*convert(model, **CLS, image_size=size)))
    stated["pretrained_cfg"]["input_size"][1:] = size
    assert_equal(model, ours(*convert(model, stated, **CLS)))


@pytest.mark.parametrize("name", [None, "deit3_small_patch16_224"])
def test_a_table_without_the_prefix_tokens_is_known_by_config_or_name(name):
    model = of_timm(no_embed_class=True)
    args = {"num_heads": 4} if name else {"no_embed_class": True}
    assert_equal(model, ours(*convert(model, {"architecture": name or "x", "model_args": args}, **CLS)))
    args["no_embed_class"] = False
    with pytest.raises(ValueError, match="15 patches, which is no square grid"):
        convert(model, {"architecture": name or "x", "model_args": args}, **CLS)


def test_a_table_with_the_prefix_tokens_is_known_by_name():
    model = of_timm(img_size=24, reg_tokens=4, class_token=False, global_pool="avg")  # 13 rows
    stated = {"architecture": "vit_so150m_patch16_reg4_gap_256", "model_args": {"num_heads": 4}}
    assert_equal(model, ours(*convert(model, stated)))
    model = of_timm(img_size=(64, 48))
    with pytest.raises(ValueError, match="48 patches, which is no square grid"):
        convert(model, {"architecture": "vit_base_patch16_224", "model_args": {"num_heads": 4}})


def test_what_the_average_takes_in_is_warned_of_where_nothing_states_it(caplog):
    model = of_timm(reg_tokens=2, global_pool="avg")
    stated = {"architecture": "x", "model_args": {"pool_include_prefix": False}}
    assert_equal(model, ours(*convert(model, stated, **GIVEN)))
    assert not caplog.text
    assert_equal(model, ours(*convert(model, **GIVEN)))
    assert "(pool_include_prefix); converting without them" in caplog.text
    stated["model_args"]["pool_include_prefix"] = True
    with pytest.raises(ValueError, match="pool_include_prefix=True with 3 prefix tokens"):
        convert(model, stated, **GIVEN)


def test_pixels_that_make_no_patch_are_left_out_and_another_size_is_warned_of(caplog):
    model = of_timm(img_size=39)
    stated = {"architecture": "x", "model_args": {"img_size": 39}}
    config, weights = convert(model, stated, **CLS)
    assert config.image_shape == (32, 32)
    with torch.no_grad():
        pixel_values = tiny.pixels(2, 39, 39)
        assert_close(ours(config, weights)(pixel_values[:, :, :32, :32]).logits, model(pixel_values))
    assert not caplog.text
    with pytest.raises(ValueError, match=r"img_size=64 .the weights have \[32, 32\].; --image_size"):
        convert(model, {"architecture": "x", "model_args": {"img_size": 64}}, **CLS)
    caplog.clear()
    stated = {"architecture": "x", "pretrained_cfg": {"input_size": [3, 64, 64]}}  # the default of a name
    assert convert(model, stated, **CLS)[0].image_shape == (32, 32)
    assert "17 positions, which are not those of 64 x 64 pixels" in caplog.text
    stated["model_args"] = {"img_size": 64}
    assert convert(model, stated, **CLS, image_size=(32, 32))[0].image_shape == (32, 32)  # the option wins


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"qk_norm": True}, "qk_norm"),
        ({"scale_attn_norm": True}, "scale_attn_norm"),
        ({"scale_mlp_norm": True}, "scale_mlp_norm"),
        ({"attn_layer": "diff"}, "differential attention"),
        ({"embed_norm_layer": timm.layers.LayerNorm}, "embed_norm_layer"),
        ({"mlp_layer": timm.layers.SwiGLU}, "SwiGLU"),
        ({"mlp_layer": timm.layers.SwiGLUPacked}, "SwiGLU"),
        ({"norm_layer": "rmsnorm"}, "no bias.*norm_layer"),
        ({"proj_bias": False}, "not in the source: .*out_proj.bias"),
        ({"reg_tokens": 2, "class_token": False, "global_pool": "map"}, "nothing says.*2 prefix tokens"),
        ({"class_token": False, "global_pool": "map", "fc_norm": True}, "fc_norm after attention pooling"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(arguments, message):
    pooling = {} if arguments.get("class_token") is False else {"pooling_type": "cls"}
    with pytest.raises(ValueError, match=message):
        convert(of_timm(**arguments), **GIVEN, **pooling)


CONVERT = LAYOUTS["timm"].convert
NAME = "vit_base_patch16_224"


@pytest.mark.parametrize(
    "source_config, message",
    [
        ({"architecture": "vit_base_patch16_rpn_224"}, "norms after each branch"),
        ({"architecture": "vit_base_patch16_rope_224"}, "rotary positions"),
        ({"architecture": NAME, "global_pool": "avgmax"}, "global_pool='avgmax'"),
        ({"architecture": NAME, "model_args": {"act_layer": "mish"}}, "act_layer='mish'"),
        ({"architecture": NAME, "model_args": {"norm_layer": "simplenorm"}}, "norm_layer='simplenorm'"),
        ({"architecture": NAME, "model_args": {"global_pool": ""}}, "--pooling_type"),
        ({"architecture": NAME, "model_args": {"depth": 4, "patch_size": 16}}, r"depth=4 .*patch_size=\[16, 16\]"),
        ({"architecture": NAME, "num_classes": 3}, "num_classes=3 .the weights have 5"),
        ({"architecture": NAME, "model_args": [4]}, "model_args of config.json must be an object"),
        ({"architecture": NAME, "pretrained_cfg": "imagenet"}, "pretrained_cfg of config.json must be an object"),
        ({"architecture": NAME, "model_args": {"img_size": "large"}}, "img_size of config.json must be 2 numbers"),
        ({"architecture": NAME, "global_pool": ["avg"]}, "global_pool of config.json must be a string"),
        ({"architecture": NAME, "label_names": {"first": "cat"}}, "label_names of config.json"),
        ({"architecture": NAME, "model_args": {"num_heads": "4"}}, "num_attention_heads must be an integer"),
    ],
)
def test_a_config_that_is_not_of_the_weights_or_no_plain_model_is_refused(source_config, message):
    stated = {**source_config}
    if isinstance(stated.get("model_args", {}), dict):
        stated["model_args"] = {"num_heads": 4, **stated.get("model_args", {})}
    with pytest.raises(ValueError, match=message):
        convert(of_timm(), stated)


# Everything that weights of SIZES show, as they are, and what each may be said to be otherwise.
SHOWN = {
    "attn_layer": ("attn", "diff"),
    "class_token": (True, False),
    "depth": (3, 4),
    "embed_dim": (32, 48),
    "fc_norm": (False, True),
    "final_norm": (True, False),
    "img_size": ([32, 32], [40, 32]),
    "in_chans": (3, 1),
    "init_values": (0.0, 0.1),
    "mlp_ratio": (4, 3),
    "num_classes": (5, 4),
    "patch_size": (8, [8, 4]),
    "pos_embed": ("learn", "none"),
    "pre_norm": (False, True),
    "proj_bias": (True, False),
    "qk_norm": (False, True),
    "qkv_bias": (True, False),
    "reg_tokens": (0, 2),
    "scale_attn_norm": (False, True),
    "scale_mlp_norm": (False, True),
}


def test_whatever_a_config_says_that_weights_show_is_held_against_them():
    assert set(SHOWN) == set(SHOWN_ARGUMENTS)
    model, right = of_timm(), {name: values[0] for name, values in SHOWN.items()}
    wrong = {name: values[1] for name, values in SHOWN.items()}
    training = {"drop_rate": 0.1, "drop_path_rate": 0.2, "weight_init": "skip", "fix_init": True}
    assert convert(model, {"architecture": NAME, "model_args": {"num_heads": 4, **right, **training}})
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"not of these weights: {name}=.*the weights have"):
            convert(model, {"architecture": NAME, "model_args": {"num_heads": 4, name: value}})
    del wrong["final_norm"]
    with pytest.raises(ValueError) as caught:
        convert(model, {"architecture": NAME, "model_args": {"num_heads": 4, **wrong}})
    assert all(f"{name}=" in str(caught.value) for name in wrong)


def test_an_argument_that_is_not_known_is_refused_by_name():
    stated = {"architecture": NAME, "model_args": {"num_heads": 4, "foo": 1, "block_fn": "parallel", "bar": None}}
    with pytest.raises(ValueError, match="model_args of config.json have foo=1, block_fn='parallel', whose part"):
        convert(of_timm(), stated)


@pytest.mark.parametrize("name", [*SHOWN, *READ_ARGUMENTS])
def test_no_argument_of_another_type_gives_another_error(name):
    model = of_timm()
    for value in ("x", -1, [], {"a": 1}, 1.5, float("nan"), True):
        with contextlib.suppress(ValueError):
            convert(model, {"architecture": NAME, "model_args": {"num_heads": 4, name: value}})


def test_timms_own_model_of_another_architecture_does_not_take_the_weights():
    model, inputs = of_timm(), SampleInputs(tiny.pixels(2), None)
    config, _ = convert(model, **CLS)
    for name in ("vit_base_patch16_xp_224", "resnet18"):
        with pytest.raises(ValueError, match=f"timm's {name} does not take these weights"):
            LAYOUTS["timm"].reference(model.state_dict(), {"architecture": name}, config, inputs)


# What travels with the weights


def test_labels_are_the_descriptions_of_timms_names():
    names = ["n1", "n2", "n3", "n4"]
    described = {"n1": "crane", "n2": "crane", "n3": "tench"}
    stated = {"architecture": "x", "label_names": names, "label_descriptions": described}
    config, weights = convert(of_timm(), stated, **CLS)
    assert config.id2label == {0: "crane (n1)", 1: "crane (n2)", 2: "tench", 3: "n4", 4: "LABEL_4"}
    assert restore(config, weights).files["config.json"]["label_names"] == list(config.id2label.values())
    config, weights = convert(of_timm(), {"architecture": "x", "label_names": {"3": "cat"}}, **CLS)
    assert (config.num_labels, config.id2label[3], config.label2id["cat"]) == (5, "cat", 3)
    config, weights = convert(of_timm(), **CLS)
    assert config.num_labels == 5 and "label_names" not in restore(config, weights).files["config.json"]


@pytest.mark.parametrize(
    "name, size",
    [
        ("deit_base_patch16_384", {"shortest_edge": 384}),
        ("vit_base_patch16_224", {"shortest_edge": 248}),  # floor(224 / 0.9)
        ("vit_medium_patch16_gap_384", {"height": 404, "width": 404}),  # crop_mode="squash", 0.95
    ],
)
def test_the_image_processor_is_timms_transform(name, size, tmp_path):
    pretrained = timm.get_pretrained_cfg(name).to_dict()
    config = VitEmbedConfig(image_size=pretrained["input_size"][1])
    found = LAYOUTS["timm"].image_processor({"architecture": name, "pretrained_cfg": pretrained}, config)
    expected = timm.data.resolve_data_config(pretrained_cfg=pretrained)
    assert tuple(found["image_mean"]) == tuple(expected["mean"]) and tuple(found["image_std"]) == tuple(expected["std"])
    assert found["size"] == size and found["resample"] == {"bilinear": 2, "bicubic": 3}[expected["interpolation"]]
    assert found["crop_size"] == dict(zip(("height", "width"), expected["input_size"][1:]))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(found))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    pixel_values = processor(torch.zeros(3, 500, 700, dtype=torch.uint8), return_tensors="pt")["pixel_values"]
    assert pixel_values.shape[2:] == config.image_shape
    torch.testing.assert_close(
        pixel_values[0, :, 9, 9], -torch.tensor(expected["mean"]) / torch.tensor(expected["std"])
    )


def test_timms_defaults_fill_in_a_processor_and_a_bare_file_has_none(caplog):
    image_processor, config = LAYOUTS["timm"].image_processor, tiny.vision_config()
    found = image_processor({"architecture": "vit_base_patch16_224", "pretrained_cfg": {}}, config)
    default = timm.models.PretrainedCfg()
    assert tuple(found["image_mean"]) == default.mean and found["size"] == {"shortest_edge": int(32 / default.crop_pct)}
    assert "does not say mean and std of the images" in caplog.text
    caplog.clear()
    assert image_processor({}, config) is None and image_processor({"model_type": "vit"}, config) is None
    assert not caplog.text
    grey = tiny.vision_config(num_channels=1)  # timm takes the mean over the colours
    found = image_processor({"architecture": "x", "pretrained_cfg": {"mean": [0.3, 0.4, 0.5]}}, grey)
    torch.testing.assert_close(found["image_mean"], [0.4])
    with pytest.raises(ValueError, match="interpolation must be one of"):
        image_processor({"architecture": "x", "pretrained_cfg": {"interpolation": "random"}}, config)
