"""open_clip's CLIP, CustomTextCLIP and SigLIP: files of every form, preprocessing, what has no place, the way back.

What holds for every layout is in test_there_and_back.py.
"""

import dataclasses
import json

import numpy as np
import pictures
import pytest
import tiny
import tiny_tokenizer
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
from transformers import AutoImageProcessor, AutoModel, SiglipConfig, SiglipModel

from vit_embed import VitEmbedConfig, VitEmbedForContrastive
from vit_embed.conversion.compare import sample_inputs
from vit_embed.conversion.layouts import LAYOUTS, detect_layout
from vit_embed.conversion.layouts.layout import ConversionOptions
from vit_embed.conversion.layouts.open_clip import model_cfg, siglip_names, written
from vit_embed.conversion.layouts.open_clip.form import Form
from vit_embed.conversion.layouts.open_clip.image_processor import image_processor
from vit_embed.conversion.layouts.timm.names import find_architecture
from vit_embed.conversion.processor_files import CLIP_IMAGE_MEAN, CLIP_IMAGE_STD
from vit_embed.convert_checkpoint import convert_checkpoint, main, restore_checkpoint

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
    for parts in (("VISION_DEFAULTS", "VISION_NEEDED", "VISION_SHOWN"), ("TEXT_DEFAULTS", "TEXT_NEEDED", "TEXT_SHOWN"))
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
    mean, std = (preprocess_cfg.get("mean", CLIP_IMAGE_MEAN), preprocess_cfg.get("std", CLIP_IMAGE_STD))
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


# Detected


def test_a_bare_model_cfg_is_detected_and_openais_archive_is_not():
    state_dict, config = source()
    assert detect_layout(state_dict, config) == ("open_clip", "open_clip_config.json lies beside it")
    assert detect_layout(state_dict, config["model_cfg"])[0] == "open_clip"
    archive = {**state_dict, **dict.fromkeys(("input_resolution", "context_length", "vocab_size"), torch.tensor(1))}
    assert LAYOUTS["open_clip"].detect(archive, {}) is None


# Refused


SIGLIP_NAME = {"timm_model_name": "vit_base_patch16_siglip_224"}
MAP_POOL = {**SIGLIP_NAME, "timm_pool": "map", "timm_proj": "none"}
UNFIT = [
    ({"qk_norm": True}, {}, "vision_cfg.qk_norm=True"),
    ({"scale_heads": True, "scale_fc": True}, {}, "vision_cfg.scale_heads=True, vision_cfg.scale_fc=True"),
    ({"attentional_pool": True}, {}, "vision_cfg.attentional_pool=True"),
    ({"pool_type": "none"}, {}, "vision_cfg.pool_type='none'"),
    ({"layers": [3, 4, 6, 3]}, {}, "a ResNet"),
    ({"act_kwargs": {"approximate": "erf"}}, {}, "vision_cfg.act_kwargs="),
    ({"norm_kwargs": {"elementwise_affine": False}}, {}, "vision_cfg.norm_kwargs="),
    ({"input_patchnorm": True}, {}, r"vision_cfg.input_patchnorm \(unknown\)"),
    ({"timm_model_name": "convnext_base"}, {}, "vision_cfg.timm_model_name='convnext_base' with timm_pool='avg'"),
    (SIGLIP_NAME, {}, "with timm_pool='avg' and timm_proj='linear'"),
    (MAP_POOL, {}, "contradicts"),
    ({}, {"hf_model_name": "roberta-base"}, "text_cfg.hf_model_name='roberta-base'"),
    ({}, {"embed_cls": True}, "text_cfg.embed_cls=True"),
    ({}, {"proj_type": "none"}, "text_cfg.proj_type='none'"),
    ({}, {"ls_init_value": 1e-5}, "text_cfg.ls_init_value=1e-05"),
    ({}, {"pool_type": "none", "scale_attn": True}, "text_cfg.scale_attn=True, text_cfg.pool_type='none'"),
    ({}, {"pool_type": "eos"}, "text_cfg.eos_id=2 cannot be converted"),
    ({}, {"pool_type": "first"}, "use_causal_mask=False"),
    ({"image_size": 40}, {}, "has 5 x 5 patches .* position table has 16"),
    ({"head_width": 5}, {}, "num_attention_heads=6"),
    ({"width": 40}, {}, "vision_cfg.width=40, the weights have 32"),
    ({"layers": 4}, {"layers": 3}, "vision_cfg.layers=4, .* have 3; text_cfg.layers=3, .* have 2"),
    ({"mlp_ratio": 2}, {"mlp_ratio": 3.5}, "vision_cfg.mlp_ratio=2, .* 4.0; text_cfg.mlp_ratio=3.5, .* 4.0"),
    ({"patch_size": [8, 4]}, {}, r"vision_cfg.patch_size=\[8, 4\], the weights have \[8, 8\]"),
    ({"no_ln_pre": True}, {}, "vision_cfg.no_ln_pre=True, the weights have False"),
    ({"ls_init_value": 0.1}, {}, "vision_cfg.ls_init_value=0.1, the weights have None"),
    ({}, {"context_length": 17, "vocab_size": 9}, "context_length=17, .* 16; text_cfg.vocab_size=9, .* 100"),
    ({}, {"width": 32}, "text_cfg.width=32, the weights have 24"),
    ({}, {"proj_bias": True}, "text_cfg.proj_bias=True, the weights have False"),
]
UNFIT_FORMS = [
    ("layer scale", {"ls_init_value": None}, "vision_cfg.ls_init_value=None, the weights have True"),
    ("siglip", {"image_size": 256}, "has 16 x 16 patches .* position table has 196"),
    ("siglip", {"timm_model_name": "vit_base_patch32_siglip_256"}, r"have '2 layers .*patches of \(16, 16\)'"),
]


@pytest.mark.parametrize(
    "name, vision, text, message",
    [("clip", *row) for row in UNFIT] + [(name, vision, {}, message) for name, vision, message in UNFIT_FORMS],
)
def test_settings_without_a_place_or_unlike_the_weights_are_refused_by_name(name, vision, text, message):
    state_dict, _ = source(MODEL_CFGS[name])
    with pytest.raises(ValueError, match=message):
        CONVERT(state_dict, {"model_cfg": changed(MODEL_CFGS[name], vision, text)}, ConversionOptions())


def test_what_a_config_leaves_out_has_open_clips_default():
    model_cfg = changed(MODEL_CFG, embed_dim=21)
    del model_cfg["vision_cfg"]["width"], model_cfg["text_cfg"]["context_length"]
    message = "embed_dim=21, the weights have 20; vision_cfg.width=768, .* 32; text_cfg.context_length=77, .* 16"
    with pytest.raises(ValueError, match=message):
        CONVERT(source()[0], {"model_cfg": model_cfg}, ConversionOptions())
    del model_cfg["embed_dim"]
    with pytest.raises(ValueError, match="embed_dim must be a whole number from 1, and is not there"):
        CONVERT(source()[0], {"model_cfg": model_cfg}, ConversionOptions())


def test_the_sizes_that_siglips_names_stand_for_are_held_to(monkeypatch):
    state_dict, config = source(MODEL_CFGS["siglip"])
    monkeypatch.undo()
    message = "timm_model_name='vit_base_patch16_siglip_224', the weights have '2 layers of width 48"
    with pytest.raises(ValueError, match=message):
        CONVERT(state_dict, config, ConversionOptions())


def test_weights_that_open_clip_does_not_load_are_an_error_of_the_source():
    state_dict, config = source()
    converted, _ = CONVERT(state_dict, config, ConversionOptions())
    other = {**state_dict, "visual.ln_post.weight": torch.ones(7)}
    with pytest.raises(ValueError, match=r"open_clip does not take these weights: [^$]*visual.ln_post.weight"):
        LAYOUTS["open_clip"].reference(other, config, converted, sample_inputs(converted))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open_clip") / "source"
    write_folder(folder, MODEL_CFG)
    return folder


KINDS = {
    "model_cfg": [("embed_dim", "x"), ("quick_gelu", [])],
    "vision_cfg": [
        *[("image_size", "x"), ("image_size", [32]), ("head_width", "x"), ("head_width", 0), ("patch_dropout", {})],
        *[("layers", True), ("norm_kwargs", -1), ("norm_kwargs", {"eps": "x"}), ("timm_model_name", [])],
    ],
    "text_cfg": [("pool_type", []), ("act_kwargs", 1.5), ("heads", None), ("hf_tokenizer_name", 3)],
    None: [("preprocess_cfg", "x")],
    "preprocess_cfg": [("interpolation", []), ("resize_mode", {}), ("mean", ["x"]), ("std", {"a": 1})],
}


@pytest.mark.parametrize("part, name, value", [(part, *row) for part in KINDS for row in KINDS[part]])
def test_values_of_another_kind_are_named_and_nothing_is_written(folder, part, name, value, tmp_path, caplog):
    stated = json.loads((folder / "open_clip_config.json").read_text())
    parts = {None: stated, **stated, **stated["model_cfg"]}
    parts[part][name] = value
    (tmp_path / "open_clip_config.json").write_text(json.dumps(stated))
    (tmp_path / "open_clip_model.safetensors").symlink_to(folder / "open_clip_model.safetensors")
    assert main([str(tmp_path), "--output_dir", str(tmp_path / "folder")]) == 1
    assert name in caplog.text and "Traceback" not in caplog.text
    assert not (tmp_path / "folder").exists()


RESNET = {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64, "patch_size": None}
POOL = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 3}
FOREIGN_KEYS = [
    ({"vision": RESNET}, "a ResNet image"),
    ({"vision": POOL}, "attentional pool"),
    ({"text": {"embed_cls": True}, "custom_text": True}, "a class token in its texts"),
    ({"text": {"ls_init_value": 1e-4}}, "layer scale in its text tower"),
    ({"vision": {"qk_norm": True}}, "norms or scales inside attention|without a place in the model: .*attn.ln_q"),
    ({"vision": {**MAP_POOL, "timm_proj": "linear"}}, r"an image tower of timm .*visual.head.proj.weight"),
]


@pytest.mark.parametrize("changes, message", FOREIGN_KEYS)
def test_foreign_keys_are_refused_by_name(changes, message):
    state_dict = built(changed(MODEL_CFG, **changes)).state_dict()
    with pytest.raises(ValueError, match=message):
        CONVERT(state_dict, {"model_cfg": MODEL_CFG}, ConversionOptions())


def test_coca_and_what_open_clip_does_not_know_are_refused():
    state_dict, _ = source()
    for extra, message in (({"multimodal_cfg": {}}, "a CoCa"), ({"voice_cfg": {}}, "voice_cfg")):
        with pytest.raises(ValueError, match=message):
            CONVERT(state_dict, {"model_cfg": {**MODEL_CFG, **extra}}, ConversionOptions())
    with pytest.raises(ValueError, match=r"CoCa's text decoder \(multimodal_cfg\): text_decoder.ln_final.weight"):
        CONVERT({**state_dict, "text_decoder.ln_final.weight": torch.ones(1)}, {}, ConversionOptions())


# The way back


def test_the_preprocessing_goes_back(tmp_path):
    write_folder(tmp_path / "source", MODEL_CFGS["custom text"])
    convert_checkpoint(tmp_path / "source", tmp_path / "ours")
    restore_checkpoint(tmp_path / "ours", "open_clip", output_dir=tmp_path / "back")
    code = open_clip_code()
    preprocess_cfg = code.get_model_preprocess_cfg(code.create_model(f"local-dir:{tmp_path / 'back'}"))
    assert {key: preprocess_cfg[key] for key in SQUASH} == SQUASH


@pytest.mark.parametrize("in_folder", [False, True])
def test_the_tokenizer_goes_back(in_folder, tmp_path):
    given = {"hf_tokenizer_name": "words", "pool_type": "last", "no_causal_mask": True, "pad_id": 3}
    write_folder(tmp_path / "source", changed(MODEL_CFG, None, given if in_folder else {"vocab_size": 49408}))
    if in_folder:
        tiny_tokenizer.write_sentencepiece_tokenizer(tmp_path / "source", "<pad>")
    convert_checkpoint(tmp_path / "source", tmp_path / "ours")
    restored = restore_checkpoint(tmp_path / "ours", "open_clip", output_dir=tmp_path / "back")
    before, after = (
        open_clip_code().get_tokenizer(f"local-dir:{tmp_path / folder}")(["a photo of cats", "a cat"])
        for folder in ("source", "back")
    )
    assert torch.equal(before, after) and before.shape == (2, 16)
    # What the tokenizer pads with, whatever the config says.
    text_cfg = restored.files["open_clip_config.json"]["model_cfg"]["text_cfg"]
    assert text_cfg.get("pad_id") == (0 if in_folder else None)


@torch.no_grad()
def test_a_model_trained_here_goes_there(tmp_path):
    config = tiny.dual_config(hidden_act="gelu", intermediate_size=47, text_config={**tiny.TEXT, "hidden_act": "gelu"})
    ours = tiny.randomised(VitEmbedForContrastive(config))
    ours.save_pretrained(tmp_path / "ours")
    restore_checkpoint(tmp_path / "ours", "open_clip", output_dir=tmp_path / "back")
    back = open_clip_code().create_model(f"local-dir:{tmp_path / 'back'}").eval()
    assert type(back).__name__ == "CLIP" and back.visual.preprocess_cfg["resize_mode"] == "shortest"
    expected = ours(tiny.pixels(), tiny.tokens()).logits_per_image
    torch.testing.assert_close(back.get_logits(tiny.pixels(), tiny.tokens())[0], expected, **CLOSE)


@torch.no_grad()
def test_transformers_siglip_goes_to_open_clip(tmp_path, monkeypatch):
    # By the sizes of timm's name: nothing else tells open_clip what the image tower is.
    monkeypatch.setitem(siglip_names.SIGLIP_DEPTHS, "base", (2, 192))
    named = siglip_names.find_architecture("vit_base_patch32_siglip_256")
    monkeypatch.setattr(siglip_names, "find_architecture", lambda name: named._replace(width=48))
    vision = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "image_size": 256, "patch_size": 32}
    text = {**tiny.TEXT, "hidden_size": 24, "projection_size": 48}
    model = tiny.randomised(SiglipModel(SiglipConfig(vision_config=vision, text_config=text)))
    model.save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "ours")
    restore_checkpoint(tmp_path / "ours", "open_clip", output_dir=tmp_path / "back")
    back = open_clip_code().create_model(f"local-dir:{tmp_path / 'back'}").eval()
    pixel_values, input_ids = tiny.pixels(2, 256, 256), tiny.tokens(2)
    expected = model(pixel_values=pixel_values, input_ids=input_ids).logits_per_image
    torch.testing.assert_close(back.get_logits(pixel_values, input_ids)[0], expected, **CLOSE)


def test_siglips_image_towers_have_three_channels():
    config, _ = CONVERT(*source(MODEL_CFGS["siglip"]), ConversionOptions())
    form = Form("text.", siglip=True, linear_projection=True, scale_axes=0)
    assert written.checked_model_cfg(config, form)["vision_cfg"]["timm_model_name"] == "vit_base_patch16_siglip_224"
    config.num_channels = 1
    with pytest.raises(ValueError, match=r"num_channels=1 \(it has 3\)"):
        written.checked_model_cfg(config, form)
