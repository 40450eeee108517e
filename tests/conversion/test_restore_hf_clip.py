"""Back to CLIPModel and SiglipModel, and the files beside the weights: shards, tokenizers, image processors.

What holds for every layout is in test_there_and_back.py.
"""

import json

import pictures
import pytest
import tiny
import tiny_tokenizer
import torch
from conversions import CLOSE
from sources import hf_clip
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    SiglipImageProcessor,
    SiglipModel,
)

from vit_embed import VitEmbedConfig, VitEmbedForContrastive
from vit_embed.convert_checkpoint import convert_checkpoint, main, restore_checkpoint


@pytest.fixture(scope="module")
def siglip(made, tmp_path_factory):
    """A converted SiglipModel."""
    folder = tmp_path_factory.mktemp("siglip") / "ours"
    convert_checkpoint(made("hf_clip: SiglipModel").path, folder)
    return folder


# The way back


def test_a_file_alone_has_the_same_weights(made, siglip, tmp_path):
    arguments = [str(siglip), "--reverse", "--layout", "hf_clip"]
    assert main([*arguments, "--output_file", str(tmp_path / "model.pt")]) == 0
    alone, expected = torch.load(tmp_path / "model.pt"), made("hf_clip: SiglipModel").state_dict
    assert alone.keys() == expected.keys() and all(torch.equal(alone[key], expected[key]) for key in expected)


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
