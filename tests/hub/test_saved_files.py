"""What is written where a model is saved: whole or not at all, in the pieces asked for, and without asking a Hub."""

import json
import socket

import pytest
import tiny
import torch
from safetensors.torch import load_file

from vit_embed import VitEmbedForContrastive, VitEmbedForDepthEstimation, VitEmbedModel
from vit_embed.saving_vit_embed import image_processor_dict, resized

MINE = {"image_processor_type": "CLIPImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}


@pytest.fixture
def model():
    return tiny.randomised(VitEmbedModel(tiny.vision_config()))


def image_processor(folder):
    return json.loads((folder / "preprocessor_config.json").read_text())


def files(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_processor_follows_the_image_size(model, tmp_path):
    model.save_pretrained(tmp_path / "32")
    VitEmbedModel.from_pretrained(tmp_path / "32", image_size=64).save_pretrained(tmp_path / "64")
    assert image_processor(tmp_path / "64")["crop_size"] == {"height": 64, "width": 64}
    assert image_processor(tmp_path / "64")["size"] == {"shortest_edge": 64}


@pytest.mark.parametrize("where", ["target", "source"])
def test_mean_and_deviation_that_came_with_the_weights_stay(model, tmp_path, where):
    """Whether they lie in the folder that is written or came with the checkpoint; the size follows the model."""
    model.save_pretrained(tmp_path / "source")
    folder = tmp_path / where
    folder.mkdir(exist_ok=True)
    size = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
    (folder / "preprocessor_config.json").write_text(json.dumps({**MINE, **size}))
    VitEmbedModel.from_pretrained(tmp_path / "source", image_size=64).save_pretrained(tmp_path / "target")
    written = image_processor(tmp_path / "target")
    assert {name: written[name] for name in MINE} == MINE
    assert written["crop_size"] == {"height": 64, "width": 64} and written["size"] == {"shortest_edge": 72}


def test_another_kind_of_processor_gives_its_mean_alone(model, tmp_path):
    """A depth head resizes without a crop, whatever the trunk's processor does."""
    model.save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **MINE}))
    VitEmbedForDepthEstimation.from_pretrained(tmp_path / "source").save_pretrained(tmp_path / "depth")
    written = image_processor(tmp_path / "depth")
    assert written["image_processor_type"] == "DPTImageProcessor" and "crop_size" not in written
    assert written["image_mean"] == MINE["image_mean"] and written["image_std"] == MINE["image_std"]


def test_a_margin_around_the_crop_keeps_its_share():
    own = image_processor_dict(tiny.vision_config(image_size=64), "CLIPImageProcessor")
    source = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True}
    assert resized(source, own)["size"] == {"shortest_edge": 73}  # 64 * 256 / 224
    rectangle = image_processor_dict(tiny.vision_config(image_size=(32, 64)), "CLIPImageProcessor")
    assert resized(source, rectangle)["size"] == {"height": 32, "width": 64}
    assert resized(source, rectangle)["do_center_crop"] is False


def test_a_save_that_fails_changes_nothing(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        model.post_layernorm.weight.mul_(2)

    def full_disk(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(VitEmbedModel, "_processor_files", full_disk)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_shards_of_an_earlier_save_go(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len([name for name in files(tmp_path) if name.startswith("model-")]) > 2
    (tmp_path / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path)
    left = {name for name in files(tmp_path) if "safetensors" in name}
    assert left == {"model.safetensors"} and "notes.txt" in files(tmp_path)
    model.save_pretrained(tmp_path, variant="half")
    assert {name for name in files(tmp_path) if "safetensors" in name} == {
        "model.safetensors",
        "model.half.safetensors",
    }


def test_the_weights_that_are_given_are_saved(model, tmp_path):
    state_dict = {name: torch.zeros_like(weight) for name, weight in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state_dict)
    assert not any(weight.any() for weight in load_file(tmp_path / "model.safetensors").values())


def test_another_process_than_the_main_one_writes_nothing(model, tmp_path):
    model.save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not (tmp_path / "saved").exists() or not files(tmp_path / "saved") & {"config.json", "model.safetensors"}


def test_saving_asks_no_network(tmp_path, monkeypatch):
    """Whatever name the checkpoint had: what goes with the weights was fetched with them."""
    tiny.randomised(VitEmbedForContrastive(tiny.dual_config())).save_pretrained(tmp_path / "source")
    model = VitEmbedForContrastive.from_pretrained(tmp_path / "source")
    model.config._name_or_path = model.name_or_path = "alice/model"

    def refuse(*args):
        raise AssertionError(f"connects to {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model.save_pretrained(tmp_path / "again")
    assert "preprocessor_config.json" in files(tmp_path / "again")


def test_licences_go_along_and_stay_where_there_are_some(model, tmp_path):
    model.save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "NOTICE").write_text("theirs")
    (tmp_path / "source" / "LICENSE.md").write_text("their licence")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "LICENSE").write_text("mine")
    loaded = VitEmbedModel.from_pretrained(tmp_path / "source")
    for name in ("new", "own"):
        loaded.save_pretrained(tmp_path / name)
    assert (tmp_path / "new" / "NOTICE").read_text() == "theirs"
    assert (tmp_path / "new" / "LICENSE.md").read_text() == "their licence"
    assert (tmp_path / "own" / "LICENSE").read_text() == "mine" and "NOTICE" not in files(tmp_path / "own")
