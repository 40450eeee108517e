"""open_clip's CLIP, CustomTextCLIP and SigLIP: files of every form, what must be given, preprocessing.

What holds for every layout is in test_there_and_back.py.
"""

import dataclasses
import json

import numpy as np
import pictures
import pytest
import tiny
import torch
from conversions import CLOSE, converter
from conversions import built as ours_of
from open_clip_reference import (
    MODEL_CFG,
    MODEL_CFGS,
    SIGLIP_CFG,
    SQUASH,
    built,
    changed,
    open_clip_code,
    small_siglip,
    source,
    write_folder,
)
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from vit_embed import VitEmbedConfig
from vit_embed.conversion.layouts.layout import ConversionOptions
from vit_embed.conversion.layouts.open_clip import model_cfg, siglip_names
from vit_embed.conversion.layouts.open_clip.image_processor import image_processor
from vit_embed.conversion.layouts.timm.names import find_architecture
from vit_embed.conversion.processor_files import CLIP_IMAGE_MEAN, CLIP_IMAGE_STD
from vit_embed.convert_checkpoint import convert_checkpoint, main

CONVERT = converter("open_clip")
# What weights alone do not say.
GIVEN = {
    "hidden_act": "gelu",
    "num_attention_heads": 4,
    "text_num_attention_heads": 3,
    "layer_norm_eps": 1e-5,
    "pooling_type": "cls",
}
# Of open_clip's two classes, as the layout has them.
VISION_DEFAULTS, TEXT_DEFAULTS = (
    {name: value for part in parts for name, value in getattr(model_cfg, part).items()}
    for parts in (
        ("VISION_DEFAULTS", "VISION_NEEDED", "VISION_SHOWN"),
        ("TEXT_DEFAULTS", "TEXT_NEEDED", "TEXT_SHOWN"),
    )
)


@pytest.fixture(autouse=True)
def _small_siglip(monkeypatch):
    small_siglip(monkeypatch)


@torch.no_grad()
def test_other_vocabularies_are_read_at_their_largest_id():
    ours = ours_of(*CONVERT(*source(MODEL_CFGS["largest id"]), ConversionOptions()))
    input_ids = torch.randint(1, 90, (8, 16), generator=torch.Generator().manual_seed(0))  # none the vocabulary's last
    expected = built(MODEL_CFGS["largest id"]).encode_text(input_ids)
    torch.testing.assert_close(ours.get_text_features(input_ids), expected, **CLOSE)


@pytest.mark.parametrize("name", ["clipa", "siglip"])
def test_the_trunk_alone(name, tmp_path):
    write_folder(tmp_path / "source", MODEL_CFGS[name])
    differences = convert_checkpoint(tmp_path / "source", tmp_path / "folder", ConversionOptions(trunk_only=True))
    # SigLIP's states reach 30.
    assert set(differences) == {"last_hidden_state", "pooler_output"} and max(differences.values()) < 1e-4
    config = VitEmbedConfig.from_pretrained(tmp_path / "folder")
    assert config.architectures == ["VitEmbedModel"] and config.text_config is None


def test_a_remainder_of_pixels_is_left_out(tmp_path):
    name = {"timm_model_name": "vit_so400m_patch14_siglip_384", "image_size": 384}
    write_folder(tmp_path / "source", {**changed(SIGLIP_CFG, name), "embed_dim": 48})
    assert max(convert_checkpoint(tmp_path / "source", tmp_path / "folder").values()) < 1e-5
    config = VitEmbedConfig.from_pretrained(tmp_path / "folder")
    assert (config.image_size, config.num_attention_heads, config.intermediate_size) == (378, 16, 179)
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "folder")(pictures.photo("china"), return_tensors="pt")
    assert pixels.pixel_values.shape[-2:] == (378, 378)


def test_files_of_other_times(tmp_path):
    state_dict, config = source()
    _, expected = CONVERT(state_dict, config, ConversionOptions())
    mask = torch.full((16, 16), -torch.inf).triu_(1)
    training = {f"module.{key}": tensor for key, tensor in {**state_dict, "attn_mask": mask}.items()}
    (tmp_path / "source").mkdir()
    torch.save({"epoch": 3, "state_dict": training}, tmp_path / "source" / "epoch_3.pt")
    (tmp_path / "source" / "open_clip_config.json").write_text(json.dumps(config["model_cfg"]))  # as in its package
    assert max(convert_checkpoint(tmp_path / "source" / "epoch_3.pt", tmp_path / "folder").values()) < 1e-5
    weights = AutoModel.from_pretrained(tmp_path / "folder", trust_remote_code=True).state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


# What weights do not say


def test_a_file_alone_needs_every_option_and_may_be_openais(tmp_path, caplog):
    state_dict, _ = source()
    torch.save(state_dict, tmp_path / "clip.pt")
    with pytest.raises(
        ValueError, match="several layouts, give the one that it is: --layout openai, .*--layout open_clip"
    ):
        convert_checkpoint(tmp_path / "clip.pt", tmp_path / "folder", ConversionOptions(**GIVEN))
    for missing in GIVEN:
        given = ConversionOptions(**{name: value for name, value in GIVEN.items() if name != missing})
        if missing == "layer_norm_eps":  # open_clip's own default
            assert CONVERT(state_dict, {}, given)[0].layer_norm_eps == 1e-5
            continue
        # of heads 64 wide neither tower has a whole number
        with pytest.raises(ValueError, match=f"--{missing}.* put the open_clip_config.json of this model beside"):
            CONVERT(state_dict, {}, given)
    command = [f"--{name}={value}" for name, value in GIVEN.items()]
    arguments = [str(tmp_path / "clip.pt"), "--output_dir", str(tmp_path / "folder"), "--layout", "open_clip"]
    assert main([*arguments, *command]) == 0
    assert "the text tower is taken for CLIP's" in caplog.text
    given, weights = CONVERT(state_dict, {}, ConversionOptions(**GIVEN))
    stated, expected = CONVERT(*source(), ConversionOptions())
    assert given.to_dict() == stated.to_dict() and weights.keys() == expected.keys()


@pytest.mark.parametrize("name", ["custom text", "layer scale", "siglip"])
def test_a_file_alone_of_another_form_is_refused(name):
    with pytest.raises(ValueError, match="put the open_clip_config.json of this model beside its weights"):
        CONVERT(source(MODEL_CFGS[name])[0], {}, ConversionOptions(**GIVEN))
    with pytest.raises(ValueError, match="--pooling_type mean does not say whether the norm"):
        CONVERT(source()[0], {}, ConversionOptions(**{**GIVEN, "pooling_type": "mean"}))


def test_options_win_over_the_config(tmp_path, caplog):
    write_folder(tmp_path / "source", MODEL_CFG)
    given = ConversionOptions(hidden_act="quick_gelu", num_attention_heads=2, text_num_attention_heads=6)
    assert max(convert_checkpoint(tmp_path / "source", tmp_path / "folder", given).values()) < 1e-5
    config = VitEmbedConfig.from_pretrained(tmp_path / "folder")
    assert (config.hidden_act, config.num_attention_heads) == ("quick_gelu", 2)
    assert (config.text_config.hidden_act, config.text_config.num_attention_heads) == ("quick_gelu", 6)
    assert "--hidden_act quick_gelu overrides the source's activation, gelu" in caplog.text


def test_defaults_and_names_are_the_packages():
    code = open_clip_code()
    for config_class, defaults, unread in (
        (code.CLIPVisionCfg, VISION_DEFAULTS, model_cfg.VISION_UNREAD),
        (code.CLIPTextCfg, TEXT_DEFAULTS, model_cfg.TEXT_UNREAD),
    ):
        fields = {field.name: field.default for field in dataclasses.fields(config_class)}
        assert {name: fields[name] for name in defaults} == defaults
        assert set(fields) == {*defaults, *unread}
    stated = [code.get_model_config(name)["vision_cfg"].get("timm_model_name", "") for name in code.list_models()]
    assert {name for name in stated if "_siglip_" in name} == set(siglip_names.SIGLIP_NAMES)


@pytest.mark.parametrize("name", siglip_names.SIGLIP_NAMES)
def test_siglips_names_stand_for_timms_models(name, monkeypatch):
    monkeypatch.undo()  # the whole model, of which the shapes alone are made
    import timm

    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, global_pool="map")
    named, parts = find_architecture(name), siglip_names.SIGLIP_NAME.fullmatch(name)
    block, pool = model.blocks[0], model.attn_pool
    assert named.width == model.embed_dim and named.num_heads == block.attn.num_heads == pool.num_heads
    assert siglip_names.SIGLIP_DEPTHS[parts["family"]] == (len(model.blocks), block.mlp.fc1.out_features)
    assert {norm.eps for norm in (block.norm1, block.norm2, model.norm, pool.norm)} == {named.eps}
    patch, size = int(parts["patch"]), int(parts["size"])
    assert (model.patch_embed.patch_size, model.patch_embed.img_size) == ((patch, patch), (size, size))
    expected = torch.nn.functional.gelu(
        x := tiny.pixels(), approximate="tanh" if "tanh" in named.hidden_act else "none"
    )
    for activation in (block.mlp.act, pool.mlp.act):
        assert torch.equal(activation(x), expected)


@pytest.mark.parametrize(
    "text_cfg, expected",
    [
        ({"pad_id": 9, "hf_tokenizer_name": "words"}, 9),
        ({}, 0),
        ({"hf_tokenizer_name": "timm/ViT-B-16-SigLIP2", "vocab_size": 256000}, 0),
        ({"hf_tokenizer_name": "timm/ViT-B-16-SigLIP", "vocab_size": 32000}, 1),
        ({"hf_tokenizer_name": "bert-base-uncased", "vocab_size": 32000}, 0),  # CLIPA
    ],
)
def test_what_a_text_is_padded_with(text_cfg, expected):
    given = {"pool_type": "last", "no_causal_mask": True, **text_cfg}
    config, _ = CONVERT(*source(changed(MODEL_CFG, None, given)), ConversionOptions())
    assert config.text_config.pad_token_id == expected


def test_unknown_padding_that_is_read_must_be_given():
    given = {"pool_type": "last", "no_causal_mask": True, "hf_tokenizer_name": "words"}
    with pytest.raises(ValueError, match="text_cfg.pad_id in open_clip_config.json"):
        CONVERT(*source(changed(MODEL_CFG, None, given)), ConversionOptions())


# Preprocessing


@pytest.mark.parametrize(
    "preprocess_cfg, crops, resample",
    [({}, True, 3), ({"interpolation": "random", "mean": 0.5}, True, 3), (SQUASH, False, 2)],
)
def test_pixels_are_those_of_open_clips_transform(preprocess_cfg, crops, resample, tmp_path):
    write_folder(tmp_path / "source", MODEL_CFG, preprocess_cfg)
    convert_checkpoint(tmp_path / "source", tmp_path / "folder")
    # Three to two: of an odd number of pixels to cut off, torchvision leaves one more on the left.
    photo = pictures.photo("china").crop((0, 0, 624, 416))
    resized = photo.resize((48, 32) if crops else (32, 32), resample)
    if crops:
        resized = resized.crop((8, 0, 40, 32))
    mean, std = (
        preprocess_cfg.get("mean", CLIP_IMAGE_MEAN),
        preprocess_cfg.get("std", CLIP_IMAGE_STD),
    )
    expected = (np.asarray(resized, dtype=np.float32) / 255 - np.array(mean)) / np.array(std)
    got = AutoImageProcessor.from_pretrained(tmp_path / "folder")(photo, return_tensors="pt").pixel_values[0]
    np.testing.assert_allclose(got.permute(1, 2, 0).numpy(), expected, atol=0.02)
    names = {Image.Resampling.BICUBIC: ("bicubic", "random"), Image.Resampling.BILINEAR: ("bilinear",)}
    assert preprocess_cfg.get("interpolation", "bicubic") in names[resample]


def test_transforms_without_a_stock_processor_squeeze_with_a_warning(caplog):
    config, _ = CONVERT(*source(), ConversionOptions())
    stated = {"model_cfg": MODEL_CFG, "preprocess_cfg": {"resize_mode": "longest"}}
    processor = image_processor(stated, config)
    assert processor["size"] == {"height": 32, "width": 32} and not processor["do_center_crop"]
    assert "resize_mode='longest'" in caplog.text
    with pytest.raises(ValueError, match="got 'nearest' and 'longest'"):
        image_processor({**stated, "preprocess_cfg": {"interpolation": "nearest", "resize_mode": "longest"}}, config)
