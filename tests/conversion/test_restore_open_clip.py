"""What of open_clip has no place here and what contradicts itself is refused by name; and the way back."""

import json

import pytest
import tiny
import tiny_tokenizer
import torch
from conversions import CLOSE, converter
from open_clip_reference import (
    MODEL_CFG,
    MODEL_CFGS,
    SQUASH,
    built,
    changed,
    open_clip_code,
    small_siglip,
    source,
    write_folder,
)
from safetensors.torch import load_file
from transformers import SiglipConfig, SiglipModel

from vit_embed import VitEmbedForContrastive
from vit_embed.conversion.compare import sample_inputs
from vit_embed.conversion.layouts import LAYOUTS, detect_layout
from vit_embed.conversion.layouts.layout import ConversionOptions
from vit_embed.conversion.layouts.open_clip import siglip_names, written
from vit_embed.conversion.layouts.open_clip.form import Form
from vit_embed.convert_checkpoint import convert_checkpoint, main, restore_checkpoint

CONVERT = converter("open_clip")


@pytest.fixture(autouse=True)
def _small_siglip(monkeypatch):
    small_siglip(monkeypatch)


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


def test_the_preprocessing_and_the_file_alone_go_back(tmp_path):
    write_folder(tmp_path / "source", MODEL_CFGS["custom text"])
    convert_checkpoint(tmp_path / "source", tmp_path / "ours")
    restored = restore_checkpoint(tmp_path / "ours", "open_clip", output_dir=tmp_path / "back")
    code = open_clip_code()
    preprocess_cfg = code.get_model_preprocess_cfg(code.create_model(f"local-dir:{tmp_path / 'back'}"))
    assert {key: preprocess_cfg[key] for key in SQUASH} == SQUASH
    # The file alone, in the model that the config describes.
    alone = built(restored.files["open_clip_config.json"]["model_cfg"])
    alone.load_state_dict(load_file(tmp_path / "back" / "open_clip_model.safetensors"), strict=True)


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
