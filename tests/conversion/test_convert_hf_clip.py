"""CLIPModel and SiglipModel of transformers: scales, files of every release, shards, processors, tokenizers.

What holds for every layout is in test_there_and_back.py.
"""

import json
import math

import pictures
import pytest
import tiny
import tiny_tokenizer
import torch
from conversions import CLOSE, converter, saved
from safetensors.torch import save_file
from sources import CLIP_TEXT, SIGLIP_TEXT, SIGLIP_VISION, hf_clip, with_trunk_prefix
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    SiglipImageProcessor,
    SiglipModel,
    SiglipTextConfig,
    SiglipTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from vit_embed import VitEmbedConfig, VitEmbedForContrastive, VitEmbedModel
from vit_embed.conversion.layouts.layout import ConversionOptions
from vit_embed.convert_checkpoint import convert_checkpoint, restore_checkpoint


def convert(state_dict, config):
    return converter("hf_clip")(state_dict, config, ConversionOptions())


def test_siglips_scale_has_no_bound(tmp_path):
    # google/siglip-base-patch16-224 says 117, beyond the 100 that CLIP trains with.
    model = hf_clip("SiglipModel")
    torch.nn.init.constant_(model.logit_scale, math.log(117.0))
    model.save_pretrained(tmp_path / "source")
    assert convert_checkpoint(tmp_path / "source", tmp_path / "folder")["logits_per_image"] < 1e-4
    ours = VitEmbedForContrastive.from_pretrained(tmp_path / "folder").train()
    ours(tiny.pixels(), tiny.tokens()).loss.backward()
    assert ours.logit_scale.exp().item() == pytest.approx(117) and ours.logit_scale.grad is not None


def test_a_remainder_of_pixels_is_left_out(tmp_path):
    # As in google/siglip-so400m-patch14-384, whose convolution reads 378 of 384 pixels.
    vision = {**SIGLIP_VISION, "image_size": 35}
    tiny.randomised(SiglipVisionModel(SiglipVisionConfig(**vision))).save_pretrained(tmp_path / "source")
    SiglipImageProcessor(size={"height": 35, "width": 35}).save_pretrained(tmp_path / "source")
    assert max(convert_checkpoint(tmp_path / "source", tmp_path / "folder").values()) < 1e-5
    processor = AutoImageProcessor.from_pretrained(tmp_path / "folder")
    pixel_values = processor(pictures.photo("china"), return_tensors="pt").pixel_values
    assert pixel_values.shape[-2:] == (32, 32)
    VitEmbedModel.from_pretrained(tmp_path / "folder")(pixel_values)


# Forms of other releases


@pytest.mark.parametrize("name", ["CLIPVisionModel", "SiglipVisionModel"])
def test_image_towers_of_both_releases_give_the_same(name, tmp_path):
    state_dict, config = saved(hf_clip(name), tmp_path / "source")
    forms = [{key.removeprefix("vision_model."): tensor for key, tensor in state_dict.items()}]
    forms.append(with_trunk_prefix(forms[0]))
    results = [convert(form, config) for form in forms]
    assert results[0][1].keys() == results[1][1].keys()
    assert all(torch.equal(results[0][1][key], tensor) for key, tensor in results[1][1].items())
    for number, form in enumerate(forms):
        save_file(form, tmp_path / "source" / "model.safetensors")
        assert max(convert_checkpoint(tmp_path / "source", tmp_path / f"{number}").values()) < 1e-5


def test_tables_of_position_ids_are_left_out(tmp_path):
    state_dict, config = saved(hf_clip("CLIPModel"), tmp_path / "source")
    old = {
        **state_dict,
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
        "text_model.embeddings.position_ids": torch.arange(16)[None],
    }
    _, weights = convert(old, config)
    assert weights.keys() == state_dict.keys()
    save_file(old, tmp_path / "source" / "model.safetensors")
    assert max(convert_checkpoint(tmp_path / "source", tmp_path / "folder").values()) < 1e-5


def test_a_config_may_leave_out_defaults_and_name_towers_twice(made):
    state_dict, config = made("hf_clip: CLIPModel")[2:]
    towers = {"vision_config": {}, "vision_config_dict": config["vision_config"], "text_config": config["text_config"]}
    got, _ = convert(state_dict, {"model_type": "clip", "projection_dim": 20, **towers})
    assert (got.num_attention_heads, got.layer_norm_eps, got.hidden_act) == (4, 1e-3, "gelu")
    # What a text tower's config leaves out is CLIP's: quick_gelu.
    assert got.text_config.hidden_act == "quick_gelu"
    siglip, config = made("hf_clip: SiglipModel")[2:]
    config = dict(config)
    for tower in ("vision_config", "text_config"):
        config[tower] = {name: value for name, value in config[tower].items() if name not in ("hidden_act", "dtype")}
    got, _ = convert(siglip, config)
    assert got.hidden_act == got.text_config.hidden_act == "gelu_pytorch_tanh"
    assert got.text_config.eos_token_id == 1  # 49,407 of SiglipTextConfig is beyond the vocabulary


# Refused


def test_a_file_alone_needs_its_config(made):
    with pytest.raises(ValueError, match="needs its config.json .* there is no config.json beside it"):
        convert(made("hf_clip: SiglipModel").state_dict, {})


def test_text_towers_are_refused_by_name(tmp_path):
    for number, model in enumerate(
        (CLIPTextModel(CLIPTextConfig(**CLIP_TEXT)), SiglipTextModel(SiglipTextConfig(**SIGLIP_TEXT)))
    ):
        model.save_pretrained(tmp_path / f"{number}")
        with pytest.raises(ValueError, match="model_type '(clip|siglip)_text_model' .* text tower alone"):
            convert_checkpoint(tmp_path / f"{number}", tmp_path / "out")


def test_siglip_without_its_processor_gets_siglips_settings(made, tmp_path):
    convert_checkpoint(made("hf_clip: SiglipModel").path, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    stock = json.loads(SiglipImageProcessor(size={"height": 32, "width": 32}).to_json_string())
    assert written["do_center_crop"] is False and written["size"] == {"height": 32, "width": 32}
    for name in ("image_mean", "image_std", "rescale_factor", "do_resize", "do_normalize"):
        assert written[name] == stock[name], name
    assert written["resample"] == int(stock["resample"])


# The way back


@torch.no_grad()
def test_a_model_trained_here_goes_there(tmp_path):
    ours = tiny.randomised(VitEmbedForContrastive(tiny.vision_config(**tiny.SIGLIP)))
    ours.save_pretrained(tmp_path / "ours")
    restore_checkpoint(tmp_path / "ours", "hf_clip", output_dir=tmp_path / "siglip")
    theirs = SiglipModel.from_pretrained(tmp_path / "siglip").eval()
    expected = ours(tiny.pixels(), tiny.tokens())
    got = theirs(pixel_values=tiny.pixels(), input_ids=tiny.tokens())
    for field in ("image_embeds", "text_embeds", "logits_per_image"):
        torch.testing.assert_close(got[field], expected[field], **CLOSE)


# Shards


def test_shards_in_and_out(tmp_path):
    hf_clip("SiglipModel").save_pretrained(tmp_path / "source", max_shard_size="20KB")
    index = "model.safetensors.index.json"
    assert (tmp_path / "source" / index).is_file() and len(list((tmp_path / "source").glob("*.safetensors"))) > 2
    differences = convert_checkpoint(tmp_path / "source", tmp_path / "folder", max_shard_size="30KB")
    assert max(differences.values()) < 1e-5
    shards = sorted(path.name for path in (tmp_path / "folder").glob("*.safetensors"))
    assert len(shards) > 2 and (tmp_path / "folder" / index).is_file()
    card = (tmp_path / "folder" / "README.md").read_text()
    assert all(path.name in card for path in (tmp_path / "source").glob("*.safetensors"))
    model, info = VitEmbedForContrastive.from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert not any(info.values())
    restore_checkpoint(tmp_path / "folder", "hf_clip", output_dir=tmp_path / "back")
    assert not any(SiglipModel.from_pretrained(tmp_path / "back", output_loading_info=True)[1].values())


def test_a_repository_with_both_forms_is_read_as_one_of_them(tmp_path):
    hf_clip("CLIPModel").save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 1}}))
    (tmp_path / "source" / "open_clip_model.safetensors").write_bytes(b"not read")
    assert max(convert_checkpoint(tmp_path / "source", tmp_path / "folder").values()) < 1e-5


# Image processors


@pytest.mark.parametrize("in_processor_file", [False, True])
@pytest.mark.parametrize("stock_class", [SiglipImageProcessor, CLIPImageProcessor])
def test_pixels_equal_those_of_the_sources_processor(stock_class, in_processor_file, tmp_path):
    hf_clip("SiglipModel").save_pretrained(tmp_path / "source")
    sizes = {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 40}}
    theirs = stock_class(**(sizes if stock_class is CLIPImageProcessor else {"size": {"height": 32, "width": 32}}))
    theirs.save_pretrained(tmp_path / "source")
    if in_processor_file:  # as transformers 5 saves a whole processor
        stated = tmp_path / "source" / "preprocessor_config.json"
        whole = {"image_processor": json.loads(stated.read_text()), "processor_class": "SiglipProcessor"}
        (tmp_path / "source" / "processor_config.json").write_text(json.dumps(whole))
        stated.unlink()
    convert_checkpoint(tmp_path / "source", tmp_path / "folder")
    VitEmbedForContrastive.from_pretrained(tmp_path / "folder").save_pretrained(tmp_path / "saved")
    restore_checkpoint(tmp_path / "folder", "hf_clip", output_dir=tmp_path / "back")
    for photo in (pictures.photo("china"), pictures.photo("flower").crop((0, 0, 300, 400))):
        expected = theirs(photo, return_tensors="pt").pixel_values
        for folder in ("folder", "saved", "back"):
            ours = AutoImageProcessor.from_pretrained(tmp_path / folder)
            assert type(ours).__name__.startswith("CLIPImageProcessor")
            got = ours(photo, return_tensors="pt").pixel_values
            torch.testing.assert_close(got, expected, rtol=0, atol=0.02)  # what backends of transformers differ by


# Tokenizers


@pytest.mark.parametrize("pad_token, pad_token_id", [("<pad>", 0), ("</s>", 1)])
@torch.no_grad()
def test_siglips_tokenizer_travels_along_and_gives_the_padding(pad_token, pad_token_id, tmp_path, caplog):
    model = hf_clip("SiglipModel")  # its config has 1
    model.save_pretrained(tmp_path / "source")
    tiny_tokenizer.write_sentencepiece_tokenizer(tmp_path / "source", pad_token)
    convert_checkpoint(tmp_path / "source", tmp_path / "folder")
    assert ("the tokenizer pads with 0, the source's config says 1" in caplog.text) == (pad_token_id == 0)
    ours = VitEmbedForContrastive.from_pretrained(tmp_path / "folder").eval()
    assert ours.config.text_config.pad_token_id == pad_token_id
    processor = AutoProcessor.from_pretrained(tmp_path / "folder", trust_remote_code=True)
    assert type(processor).__name__ == "CLIPProcessor" and processor.tokenizer.model_max_length == 16
    # Rows are padded to 16 tokens here by the model, there by the tokenizer.
    texts, pixel_values = ["a photo of cats", "a cat"], tiny.pixels(2)
    read = processor(text=texts, padding=True, return_tensors="pt")
    assert read.input_ids.shape[1] < 16
    got = ours(pixel_values, read.input_ids, attention_mask=read.attention_mask).logits_per_image
    padded = AutoTokenizer.from_pretrained(tmp_path / "source")(
        texts, padding="max_length", max_length=16, return_tensors="pt"
    )
    assert padded.input_ids[1, -1] == pad_token_id
    expected = model(pixel_values=pixel_values, input_ids=padded.input_ids).logits_per_image
    torch.testing.assert_close(got, expected, **CLOSE)


def test_clips_tokenizer_travels_along(tmp_path):
    hf_clip("CLIPModel").save_pretrained(tmp_path / "source")
    tiny_tokenizer.write_tokenizer(tmp_path / "source")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "folder")
    restore_checkpoint(tmp_path / "folder", "hf_clip", output_dir=tmp_path / "back")
    expected = AutoTokenizer.from_pretrained(tmp_path / "source")("this is a photo of a cat").input_ids
    assert AutoTokenizer.from_pretrained(tmp_path / "back")("this is a photo of a cat").input_ids == expected
    processor = AutoProcessor.from_pretrained(tmp_path / "folder", trust_remote_code=True)
    assert processor(text="this is a photo of a cat").input_ids == expected


def test_a_sentencepiece_model_alone_is_copied(tmp_path, caplog):
    hf_clip("SiglipModel").save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "spiece.model").write_bytes(b"a model of sentencepiece")
    settings = {
        "tokenizer_class": "SiglipTokenizer",
        "pad_token": "</s>",
        "added_tokens_decoder": {"5": {"content": "</s>"}},
    }
    (tmp_path / "source" / "tokenizer_config.json").write_text(json.dumps(settings))
    convert_checkpoint(tmp_path / "source", tmp_path / "folder")
    assert (tmp_path / "folder" / "spiece.model").read_bytes() == b"a model of sentencepiece"
    written = json.loads((tmp_path / "folder" / "tokenizer_config.json").read_text())
    assert written == {**settings, "model_max_length": 16} and "copied unseen" in caplog.text
    assert VitEmbedConfig.from_pretrained(tmp_path / "folder").text_config.pad_token_id == 5
