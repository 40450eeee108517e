"""What a conversion gives besides equal numbers: longer texts, shards, the card, its memory; and the way back."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import openai_reference
import pytest
import tiny
import torch
from torch.nn import functional as F
from transformers import AutoConfig

from vit_embed import VitEmbedForContrastive
from vit_embed.conversion import progress
from vit_embed.conversion.layouts import LAYOUTS, openai
from vit_embed.conversion.layouts.layout import ConversionOptions
from vit_embed.conversion.reading import read_checkpoint
from vit_embed.convert_checkpoint import convert_checkpoint, main, restore_checkpoint

# The way back


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layout", "openai"], "give --output_file for the weights alone, or --output_dir"),
        (["--layout", "openai", "--output_file", "a.pt", "--output_dir", "b"], "give --output_file"),
        (["--layout", "openai", "--output_file", "a.txt"], "must end in one of .safetensors, .pt"),
        (["--layout", "openai", "--output_dir", "b"], "layout openai has no folder for this model, only a file"),
        (["--output_file", "a.pt"], "--reverse needs --layout, one of openai"),
        (["--layout", "openai", "--output_file", "a.pt", "--hidden_act", "gelu"], "the model says the rest"),
    ],
)
def test_a_way_back_that_makes_no_sense_is_refused(converted, tmp_path, monkeypatch, caplog, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main([str(converted), "--reverse", *arguments]) == 1
    assert message in caplog.text and list(tmp_path.iterdir()) == []


def test_the_way_back_takes_folders_of_ours_only(source, converted, tmp_path):
    with pytest.raises(ValueError, match="takes a folder that vit_embed wrote"):
        restore_checkpoint(source.file, "openai", output_file=tmp_path / "back.pt")
    config = json.loads((converted / "config.json").read_text())
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes((converted / "model.safetensors").read_bytes())
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 9}))
    with pytest.raises(ValueError, match="are not those that its config describes: .*layers.3"):
        restore_checkpoint(broken, "openai", output_file=tmp_path / "back.pt")


# Options


def text_features(folder: Path, input_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return VitEmbedForContrastive.from_pretrained(folder).eval().get_text_features(input_ids)


def test_a_shorter_context_keeps_the_features_of_texts_that_fit(source, converted, tmp_path):
    convert_checkpoint(source.file, tmp_path / "short", ConversionOptions(max_position_embeddings=8))
    input_ids = tiny.tokens(length=8)
    input_ids[:, -1] = tiny.EOS
    got, expected = text_features(tmp_path / "short", input_ids), text_features(converted, input_ids)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="at most max_position_embeddings=8"):
        text_features(tmp_path / "short", tiny.tokens(length=9))


def test_a_longer_context_is_resampled_as_open_clip_does(source, converted, tmp_path):
    convert_checkpoint(source.file, tmp_path / "long", ConversionOptions(max_position_embeddings=40))
    config = AutoConfig.from_pretrained(tmp_path / "long", trust_remote_code=True)
    assert config.text_config.max_position_embeddings == 40
    name = "text_model.embeddings.position_embedding.weight"
    table = read_checkpoint(converted / "model.safetensors")[name]
    # open_clip's `resize_text_pos_embed`: linear, without antialias, half-pixel centres.
    places = ((torch.arange(40) + 0.5) * 16 / 40 - 0.5).clamp(0, 15)
    left = places.floor().long()
    share = (places - left)[:, None]
    expected = table[left] * (1 - share) + table[(left + 1).clamp(max=15)] * share
    got = read_checkpoint(tmp_path / "long" / "model.safetensors")[name]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)  # two orders of one interpolation
    input_ids = F.pad(tiny.tokens(), (24, 0), value=5)
    input_ids[:, 0] = 98
    assert text_features(tmp_path / "long", input_ids).isfinite().all()
    assert "could not be run" in (tmp_path / "long" / "README.md").read_text()


@pytest.mark.parametrize(
    ("number", "message"), [(1, "from 2, start"), (0, "from 2"), (10**11, "to 131072; got 100000000000")]
)
def test_a_context_of_no_text_is_refused(source, tmp_path, number, message):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(source.file, tmp_path / "out", ConversionOptions(max_position_embeddings=number))
    options = ConversionOptions(max_position_embeddings=20, trunk_only=True)
    with pytest.raises(ValueError, match="is for a text tower, and this model has none"):
        convert_checkpoint(source.file, tmp_path / "out", options)
    with pytest.raises(ValueError, match="--tokenizer .* is for a text tower"):
        convert_checkpoint(source.file, tmp_path / "out", ConversionOptions(trunk_only=True), tokenizer=tmp_path)


# The card


def test_card_and_config_name_the_origin_of_the_weights(source, converted):
    digest = hashlib.sha256(source.archive.read_bytes()).hexdigest()
    config = AutoConfig.from_pretrained(converted, trust_remote_code=True)
    assert config.converted_from == {
        "layout": "openai",
        "source": source.archive.name,  # no path of the machine that converted it
        "sha256": {source.archive.name: digest},
        "license": None,
    }
    card = (converted / "README.md").read_text()
    assert f"| `{source.archive.name}` | `{digest}` |" in card and "The source states no licence." in card
    assert "| width | 128 | 64 |" in card and "| heads | 2 | 1 |" in card
    assert "| image_features |" in card and "license:" not in card.split("---")[1]


# Progress


def test_large_files_show_bars_and_small_ones_none(source, tmp_path, capfd, monkeypatch):
    convert_checkpoint(source.file, tmp_path / "small")
    assert "converting" not in capfd.readouterr().err
    monkeypatch.setattr(progress, "MIN_BYTES", 10**6)  # of 100 MB
    convert_checkpoint(source.file, tmp_path / "large")
    shown = capfd.readouterr().err
    assert "converting: 100%" in shown and f"hashing {source.file.name}: 100%" in shown


# Memory


PEAK = """
import sys
from vit_embed.convert_checkpoint import main

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))

for arguments in (["clip.pt", "--output_dir", "out"], "out --reverse --layout openai --output_file back.pt".split()):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is what there is now
    before = peak()
    assert main(arguments) == 0
    print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads its peak memory from Linux")
@pytest.mark.parametrize("stored", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.heavy)])
def test_memory_stays_below_a_fifth_more_than_the_float32_weights(tmp_path, stored):
    sizes = {"vision_width": 768, "vision_layers": 8, "transformer_width": 512, "transformer_heads": 8}
    state_dict = openai_reference.openai_state_dict(openai_reference.openai_clip(**sizes))
    state_dict = {k: v.to(stored) if v.is_floating_point() else v for k, v in state_dict.items()}
    torch.save(state_dict, tmp_path / "clip.pt")
    weights = 4 * sum(tensor.numel() for tensor in state_dict.values())
    assert weights > 240e6  # so that what else a process allocates is small beside them
    done = subprocess.run([sys.executable, "-c", PEAK], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    there, back = map(int, done.stdout.split())
    assert there < 1.2 * weights and back < 1.2 * weights


# What ours bounds, rounds or does beyond its weights


def test_a_logit_scale_above_the_bound_is_named_and_features_are_compared(tmp_path, caplog):
    clip = tiny.clip_model()
    clip.logit_scale.data.fill_(5.0)
    clip.save_pretrained(tmp_path / "clip")
    differences = convert_checkpoint(tmp_path / "clip", tmp_path / "out")
    assert "logit_scale is 5.0000, above ln 100 = 4.6052" in caplog.text
    assert set(differences) == {"image_features", "text_features"}
    caplog.clear()
    clip.logit_scale.data.fill_(4.6052)
    clip.save_pretrained(tmp_path / "clip")
    assert "logits_per_image" in convert_checkpoint(tmp_path / "clip", tmp_path / "bounded")
    assert "above ln 100" not in caplog.text


@pytest.mark.parametrize(
    ("dtype", "sign", "message"),
    [
        (torch.bfloat16, 1, None),
        (torch.bfloat16, -1, "image_features of the result differs"),
        (torch.float32, None, "the source's own code does not run these weights .*: size mismatch"),
    ],
)
def test_what_the_sources_code_gives_is_compared(source, tmp_path, monkeypatch, dtype, sign, message):
    def reference(*arguments):
        if sign is None:
            raise RuntimeError("size mismatch")
        return {name: sign * value for name, value in openai.reference(*arguments).items()}

    monkeypatch.setitem(LAYOUTS, "openai", replace(LAYOUTS["openai"], reference=reference))
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        convert_checkpoint(source.file, tmp_path / "out", ConversionOptions(dtype=dtype))
    assert (tmp_path / "out").exists() == (message is None)


# Image processors


def test_unknown_preprocessing_is_warned_of(source, tmp_path, caplog, monkeypatch):
    convert_checkpoint(source.file, tmp_path / "clips")
    assert "how the source's images were prepared" not in caplog.text
    monkeypatch.setitem(LAYOUTS, "openai", replace(LAYOUTS["openai"], sees_as_clip=False))
    convert_checkpoint(source.file, tmp_path / "unknown")
    assert "nothing says how the source's images were prepared" in caplog.text


# What a config of others may hold


@pytest.mark.parametrize("value", [None, "many", [4], {"a": 1}, 0, -3, 2.5, 10**30])
def test_a_config_with_values_of_no_use_is_an_error_of_one_line(tmp_path, caplog, value):
    model = tiny.clip_model()
    model.save_pretrained(tmp_path / "clip")
    config = json.loads((tmp_path / "clip" / "config.json").read_text())
    for field in ("num_attention_heads", "layer_norm_eps", "image_size"):  # of the image tower
        changed = {**config, "vision_config": {**config["vision_config"], field: value}}
        if field == "layer_norm_eps" and isinstance(value, (int, float)) and value > 0:
            continue
        (tmp_path / "clip" / "config.json").write_text(json.dumps(changed))
        caplog.clear()
        assert main([str(tmp_path / "clip"), "--output_dir", str(tmp_path / "out")]) == 1
        assert "nothing was written" in caplog.text and not (tmp_path / "out").exists()
