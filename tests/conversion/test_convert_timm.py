"""timm's vision transformers: what its names stand for, its folders and its bare files.

What holds for every layout is in test_there_and_back.py.
"""

import functools
import logging
import re

import pytest
import tiny
import torch
from timm_reference import (
    CLASSIFIER,
    CLS,
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

from vit_embed import (
    VitEmbedForContrastive,
    VitEmbedModel,
    VitEmbedModelWithProjection,
)
from vit_embed.conversion.layouts.layout import MODEL_CLASSES, ConversionOptions
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
