"""OpenAI's checkpoints: converted to the same numbers, refused when unfit."""

import json
import logging
import resource
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import openai_reference
import pytest
import torch
import torch._utils
from conversions import converter, leftovers
from transformers import AutoConfig

import vit_embed
from vit_embed import VitEmbedForContrastive
from vit_embed.conversion import openai_files
from vit_embed.conversion.layouts import LAYOUTS
from vit_embed.conversion.layouts.layout import ConversionOptions
from vit_embed.conversion.layouts.openai import METADATA
from vit_embed.conversion.openai_files import BPE_FILE, find_openai_file
from vit_embed.convert_checkpoint import convert_checkpoint, main

REPO = Path(vit_embed.__file__).parent


def from_openai(state_dict: dict, options: ConversionOptions):
    return converter("openai")(state_dict, {}, options)


convert = convert_checkpoint


def config_but_origin(folder: Path) -> dict:
    config = json.loads((folder / "config.json").read_text())
    assert len(config.pop("converted_from")["sha256"]) == 1
    return config


def test_a_state_dict_gives_the_same_folder_as_the_archive(source, converted, tmp_path):
    training = {"state_dict": {f"module.{key}": tensor for key, tensor in source.state_dict.items()}, "epoch": 3}
    torch.save(training, tmp_path / "training.pt")
    torch.save(source.state_dict, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for number, file in enumerate((source.file, tmp_path / "training.pt", tmp_path / "legacy.pt")):
        convert(file, tmp_path / str(number), layout="openai")
        name = "model.safetensors"
        assert (tmp_path / str(number) / name).read_bytes() == (converted / name).read_bytes()
        assert config_but_origin(tmp_path / str(number)) == config_but_origin(converted)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_dtype_is_float32_by_default(source, tmp_path, name):
    arguments = [] if name == "float32" else ["--dtype", name]
    assert main([str(source.archive), "--output_dir", str(tmp_path / "out"), *arguments]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == name
    model = VitEmbedForContrastive.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, name)}
    stored = model.vision_model.embeddings.class_embedding
    torch.testing.assert_close(stored, source.model.visual.class_embedding.to(stored.dtype), rtol=0, atol=0)


def test_the_largest_difference_is_logged_returned_and_in_the_card(source, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        differences = convert(source.archive, tmp_path / "out")
    assert set(differences) == {"image_features", "text_features", "logits_per_image"}
    card = (tmp_path / "out" / "README.md").read_text()
    for name, difference in differences.items():
        assert 0 <= difference < 1e-4
        assert f"largest difference of {name} between source and result: {difference:.2e}" in caplog.text
        assert f"| {name} | {difference:.2e} |" in card
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: zero-shot-image-classification\n")
    assert "archive.pt" in card


def test_without_openais_code_the_folder_is_written_with_a_line_in_the_log(source, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(openai_files, "DISTRIBUTIONS", ())
    with caplog.at_level(logging.INFO):
        assert convert(source.archive, tmp_path / "out") is None
    assert "the source could not be run: OpenAI's CLIP code is not installed" in caplog.text
    assert "could not be run" in (tmp_path / "out" / "README.md").read_text()


def test_conversion_leaves_the_source_alone(source):
    before = {key: tensor.clone() for key, tensor in source.state_dict.items()}
    _, weights = from_openai(source.state_dict, ConversionOptions(dtype=torch.float16))
    for tensor in weights.values():
        tensor.fill_(7)
    for key, tensor in before.items():
        assert torch.equal(source.state_dict[key], tensor)


# What a source does not say


def without_metadata(source) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in source.state_dict.items() if key not in METADATA}


def test_weights_given_as_openais_have_its_activation_with_a_warning(source, tmp_path, caplog):
    torch.save(without_metadata(source), tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="several layouts"):  # its keys are open_clip's too
        convert(tmp_path / "clip.pt", tmp_path / "out")
    assert leftovers(tmp_path) == ["clip.pt"]
    for given, expected in ((None, "quick_gelu"), ("gelu", "gelu")):
        folder = tmp_path / f"given {given}"
        convert(tmp_path / "clip.pt", folder, ConversionOptions(hidden_act=given), layout="openai")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        assert config.hidden_act == config.text_config.hidden_act == expected
        assert ("using quick_gelu, OpenAI's own; --hidden_act" in caplog.text) == (given is None)
        caplog.clear()


def test_heads_are_64_wide_by_default(source):
    options = ConversionOptions(num_attention_heads=4, text_num_attention_heads=8)
    config, _ = from_openai(source.state_dict, options)
    assert (config.num_attention_heads, config.text_config.num_attention_heads) == (4, 8)
    with pytest.raises(ValueError, match="num_attention_heads=3"):
        from_openai(source.state_dict, ConversionOptions(num_attention_heads=3))
    narrow = openai_reference.openai_clip(transformer_width=96, transformer_heads=3)
    with pytest.raises(ValueError, match="this width is 96; give the number of heads with --text_num_attention"):
        from_openai(narrow.state_dict(), ConversionOptions(hidden_act="quick_gelu"))
    config, _ = from_openai(narrow.state_dict(), ConversionOptions(hidden_act="quick_gelu", text_num_attention_heads=3))
    assert config.text_config.num_attention_heads == 3


# State dicts that do not fit


def test_a_resnet_clip_is_refused_by_name():
    resnet = openai_reference.openai_clip(vision_layers=(1, 1, 1, 1), vision_width=8)
    with pytest.raises(ValueError, match="this is a ResNet CLIP"):
        from_openai(openai_reference.openai_state_dict(resnet), ConversionOptions())


def test_non_finite_weights_are_counted_and_converted(source, tmp_path, caplog):
    broken = {key: tensor.clone() for key, tensor in source.state_dict.items()}
    broken["visual.proj"][0, :3] = torch.nan
    broken["ln_final.bias"][0] = torch.inf
    torch.save(broken, tmp_path / "clip.pt")
    assert convert(tmp_path / "clip.pt", tmp_path / "out") is None
    assert "4 numbers of the source are NaN or infinite, in 2 tensors: " in caplog.text
    projection = VitEmbedForContrastive.from_pretrained(tmp_path / "out").visual_projection.weight
    assert projection[:3, 0].isnan().all() and projection.isnan().sum() == 3


def test_numbers_too_large_for_the_dtype_are_refused(source, tmp_path):
    large = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in source.state_dict.items()}
    large["visual.proj"] = large["visual.proj"].clone()
    large["visual.proj"][0, 0] = 1e6
    with pytest.raises(ValueError, match="1 numbers of visual.proj overflow torch.float16; use --dtype"):
        from_openai(large, ConversionOptions(dtype=torch.float16))
    _, weights = from_openai(large, ConversionOptions())
    assert weights["visual_projection.weight"][0, 0] == 1e6


# Where the result goes


def test_an_output_folder_in_use_is_refused_and_untouched(source, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for name in ("used", "file"):
        with pytest.raises(FileExistsError, match="must be a new or an empty folder"):
            convert(source.archive, tmp_path / name)
    assert leftovers(tmp_path) == ["file", "used"] and leftovers(tmp_path / "used") == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    convert(source.archive, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()


def test_missing_parents_are_made_and_removed_on_failure(source, tmp_path):
    torch.save({**source.state_dict, "extra": torch.zeros(1)}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="extra"):
        convert(tmp_path / "bad.pt", tmp_path / "a" / "b" / "out")
    assert leftovers(tmp_path) == ["bad.pt"]
    convert(source.archive, tmp_path / "a" / "b" / "out")
    assert leftovers(tmp_path / "a" / "b") == ["out"]


def test_a_full_disk_leaves_nothing(source, tmp_path, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))  # the weights are 2 MB
    try:
        with pytest.raises(OSError, match="the weights could not be written"):
            convert(source.archive, tmp_path / "a" / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert leftovers(tmp_path) == []
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="the weights need . MB, but the disk"):
        convert(source.archive, tmp_path / "a" / "out")
    assert leftovers(tmp_path) == []


def test_an_interrupt_leaves_nothing(source, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(LAYOUTS, "openai", replace(LAYOUTS["openai"], reference=interrupted))
    with pytest.raises(KeyboardInterrupt):
        convert(source.archive, tmp_path / "a" / "out")
    assert leftovers(tmp_path) == []


def test_files_of_packages_are_found_by_whole_names(monkeypatch):
    assert find_openai_file("clip/model.py").parts[-2:] == ("clip", "model.py")
    assert find_openai_file("lip/model.py") is None  # as open_clip/model.py is not clip/model.py
    monkeypatch.setattr(openai_files, "DISTRIBUTIONS", ("no-such-package",))
    assert find_openai_file(BPE_FILE) is None


# The command line


def test_command_line_as_a_module(source, converted, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", str(source.archive), "--output_dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("vit_embed.convert_checkpoint", run_name="__main__")
    assert not caught.value.code
    assert leftovers(tmp_path) == ["out"] and leftovers(tmp_path / "out") == leftovers(converted)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (converted / "model.safetensors").read_bytes()


def test_command_line_as_a_script_of_a_clone_of_any_name(source, converted, tmp_path):
    clone = tmp_path / "my clone-1.0"
    clone.mkdir()
    for path in REPO.glob("*.py"):
        shutil.copy(path, clone)
    shutil.copytree(REPO / "conversion", clone / "conversion", ignore=shutil.ignore_patterns("__pycache__"))
    marked = clone / "modeling_vit_embed.py"
    marked.write_text(marked.read_text() + "\n# of the clone\n")
    command = [sys.executable, clone / "convert_checkpoint.py", source.archive, "--output_dir", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "largest difference of logits_per_image" in done.stderr
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (converted / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "modeling_vit_embed.py").read_text().endswith("# of the clone\n")


def test_command_line_needs_an_output_and_names_options_of_other_layouts(source, tmp_path, caplog):
    assert main([str(source.file)]) == 1
    assert "give --output_dir" in caplog.text
    arguments = ["--output_dir", str(tmp_path / "out"), "--norm_position", "post", "--image_size", "32", "32"]
    assert main([str(source.file), *arguments]) == 1
    assert "layout openai does not read --norm_position, --image_size; leave it out" in caplog.text
    assert leftovers(tmp_path) == []
