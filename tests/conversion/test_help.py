"""What the converter tells users who come with the wrong thing, and which weights of a training checkpoint it takes."""

import json
import logging

import numpy as np
import pytest
import tiny
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from sources import SIGLIP_TEXT, SIGLIP_VISION
from tiny_tokenizer import write_sentencepiece_tokenizer

from vit_embed.conversion.layouts import LAYOUTS
from vit_embed.conversion.layouts.layout import ConversionOptions
from vit_embed.conversion.reading import read_checkpoint
from vit_embed.conversion.source import find_source
from vit_embed.convert_checkpoint import convert_checkpoint, main, restore_checkpoint

RAW, AVERAGED = {"w": torch.zeros(3)}, {"w": torch.ones(3)}


@pytest.fixture
def clip(made):
    """A folder of stock CLIP."""
    return made("hf_clip: CLIPModel").path


# Options


@pytest.mark.parametrize("name", ["layer_norm_eps", "num_attention_heads", "text_num_attention_heads"])
def test_zero_is_a_value(clip, tmp_path, name):
    with pytest.raises(ValueError, match=f"layout hf_clip does not read --{name}"):
        convert_checkpoint(clip, tmp_path / "out", ConversionOptions(**{name: 0}))
    assert not (tmp_path / "out").exists()


def test_an_unknown_layout_is_refused_with_the_known_ones(clip, tmp_path):
    with pytest.raises(ValueError, match="layout must be auto or one of openai, .*dinov2; got 'clip'"):
        convert_checkpoint(clip, tmp_path / "out", layout="clip")
    with pytest.raises(ValueError, match="--layout, one of openai, .*; got clip"):
        restore_checkpoint(clip, "clip", output_dir=tmp_path / "out")


def test_an_error_of_our_own_is_not_reported_as_the_users(clip, tmp_path, monkeypatch):
    def broken(*_):
        raise KeyError("a mistake of ours")

    layout = LAYOUTS["hf_clip"]
    monkeypatch.setitem(LAYOUTS, "hf_clip", type(layout)(**{**vars(layout), "convert": broken}))
    with pytest.raises(KeyError, match="a mistake of ours"):
        convert_checkpoint(clip, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The wrong source


def test_a_folder_of_ours_needs_no_conversion(clip, tmp_path):
    convert_checkpoint(clip, tmp_path / "ours")
    with pytest.raises(ValueError, match="ours is a folder of vit_embed already: .*from_pretrained; --reverse"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "again")


@pytest.mark.parametrize("name", ["RN50", "RN50x64"])
def test_a_resnet_of_openai_is_named(name):
    with pytest.raises(ValueError, match=f"{name} is a CLIP with a ResNet.* ViT-B/32"):
        find_source(name)


def test_the_layout_of_the_keys_is_named_where_another_is_given(clip, tmp_path):
    with pytest.raises(ValueError, match="rather of another layout: --layout hf_clip"):
        convert_checkpoint(clip, tmp_path / "out", layout="timm")


@pytest.mark.parametrize("prefix, beside", [("model.clip.", {}), ("encoder.", {"head.weight": torch.zeros(2)})])
def test_a_prefix_of_the_keys_is_named(source, tmp_path, prefix, beside):
    weights = {prefix + key: tensor for key, tensor in source.state_dict.items()}
    torch.save({**weights, **beside}, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match=f'below the prefix "{prefix}" are of layout openai: .*removeprefix'):
        convert_checkpoint(tmp_path / "clip.pt", tmp_path / "out")


# Averaged weights of training


@pytest.mark.parametrize("key, other", [("state_dict_ema", "state_dict"), ("model_ema", "model")])
@pytest.mark.parametrize("is_zip", [True, False])
def test_averaged_weights_are_taken_and_the_choice_is_logged(tmp_path, caplog, key, other, is_zip):
    path = tmp_path / "last.pth.tar"
    torch.save({"epoch": 3, other: RAW, key: AVERAGED}, path, _use_new_zipfile_serialization=is_zip)
    assert torch.equal(read_checkpoint(path)["w"], AVERAGED["w"])
    assert f"averaged weights, {key}" in caplog.text and f"--weights_key {other}" in caplog.text
    caplog.clear()
    assert torch.equal(find_source(path, other).state_dict()["w"], RAW["w"])
    assert torch.equal(find_source(path, key).state_dict()["w"], AVERAGED["w"])
    assert not caplog.text
    with pytest.raises(ValueError, match=f"--weights_key must name a state dict in it .*{other}.*got teacher"):
        find_source(path, "teacher").state_dict()


def test_torchs_averaged_model_is_read(tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 3))
    torch.save(averaged.state_dict(), tmp_path / "swa.pt")
    assert set(read_checkpoint(tmp_path / "swa.pt")) == {"weight", "bias"}


def test_safetensors_have_no_weights_key(tmp_path):
    save_file(RAW, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="--weights_key state_dict is for checkpoints of torch.save"):
        find_source(tmp_path / "a.safetensors", "state_dict").state_dict()


def test_the_command_line_takes_the_weights_that_are_named(source, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    changed = {key: tensor * 2 if key == "visual.proj" else tensor for key, tensor in source.state_dict.items()}
    torch.save({"state_dict": source.state_dict, "state_dict_ema": changed}, tmp_path / "clip.pt")
    arguments = [str(tmp_path / "clip.pt"), "--layout", "openai", "--output_dir"]
    assert main([*arguments, str(tmp_path / "averaged")]) == 0
    assert caplog.text.count("--weights_key state_dict uses") == 1  # though the weights are read twice
    assert main([*arguments, str(tmp_path / "raw"), "--weights_key", "state_dict"]) == 0
    averaged, raw = (read_checkpoint(tmp_path / name / "model.safetensors") for name in ("averaged", "raw"))
    key = "visual_projection.weight"
    assert torch.equal(averaged[key], 2 * raw[key])


# The scores of SigLIP


def test_a_converted_siglip_scores_labels_as_its_source_does(tmp_path):
    # transformers reads 64 tokens whatever the config has
    text = {**SIGLIP_TEXT, "max_position_embeddings": 64}
    config = transformers.SiglipConfig(vision_config=dict(SIGLIP_VISION), text_config=text)
    model = tiny.randomised(transformers.SiglipModel(config))
    with torch.no_grad():
        model.logit_scale.fill_(1.0)
        model.logit_bias.fill_(-0.5)
    source, ours, saved = tmp_path / "source", tmp_path / "ours", tmp_path / "saved"
    model.save_pretrained(source)
    write_sentencepiece_tokenizer(source, "<pad>")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["model_input_names"] = ["input_ids"]  # as SigLIP's own: the padding is read
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    transformers.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(source)
    convert_checkpoint(source, ours)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3)).astype("uint8"))
    task = "zero-shot-image-classification"

    def scores(place, labels):
        pipe = transformers.pipeline(task, model=str(place), trust_remote_code=True)
        found = pipe(picture, candidate_labels=labels)
        return pipe, {each["label"]: each["score"] for each in found}

    for labels in (["a cat"], ["a cat", "a dog", "very " * 40]):
        (_, expected), (pipe, found) = scores(source, labels), scores(ours, labels)
        assert found == pytest.approx(expected, abs=1e-4)  # softmax would give one label 1
        assert type(pipe).__name__ == "VitEmbedZeroShotPipeline"
    pipe.model.save_pretrained(saved)  # its config was changed by `pipeline`
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (saved / name).write_bytes((ours / name).read_bytes())
    assert scores(saved, ["a cat"])[1] == pytest.approx(scores(ours, ["a cat"])[1])
