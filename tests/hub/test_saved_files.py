"""What is written where a model is saved: whole or not at all, in the pieces asked for, and without asking a Hub."""

import json
import socket

import pictures
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file
from tiny_tokenizer import TOKENIZER_FILES, write_tokenizer

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


@pytest.mark.parametrize("kind", ["ViTImageProcessor", "SiglipImageProcessor", "BitImageProcessor"])
def test_another_processor_for_the_same_kind_of_task_stays(model, tmp_path, kind):
    """A picture gives the same pixels before and after, in the source's folder and in another."""
    model.save_pretrained(tmp_path / "source")
    chosen = getattr(transformers, kind)(image_mean=[0.5] * 3, resample=2, size={"height": 32, "width": 32})
    chosen.save_pretrained(tmp_path / "source")
    loaded = VitEmbedModel.from_pretrained(tmp_path / "source")
    loaded.save_pretrained(tmp_path / "again")
    loaded.save_pretrained(tmp_path / "source")
    wanted = chosen(pictures.photo("coffee"), return_tensors="pt").pixel_values
    for folder in ("source", "again"):
        again = transformers.AutoImageProcessor.from_pretrained(tmp_path / folder)
        torch.testing.assert_close(again(pictures.photo("coffee"), return_tensors="pt").pixel_values, wanted)
    if kind == "ViTImageProcessor":
        VitEmbedModel.from_pretrained(tmp_path / "source", image_size=64).save_pretrained(tmp_path / "64")
        assert image_processor(tmp_path / "64")["size"] == {"height": 64, "width": 64}


def test_a_tower_that_is_saved_by_itself_takes_what_came_with_the_whole(tmp_path):
    tiny.randomised(VitEmbedForContrastive(tiny.dual_config())).save_pretrained(tmp_path / "source")
    write_tokenizer(tmp_path / "source")
    (tmp_path / "source" / "NOTICE").write_text("theirs")
    path = tmp_path / "source" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **MINE}))
    whole = VitEmbedForContrastive.from_pretrained(tmp_path / "source")
    whole.vision_model.save_pretrained(tmp_path / "images")
    whole.text_model.save_pretrained(tmp_path / "texts")
    assert image_processor(tmp_path / "images")["image_mean"] == MINE["image_mean"]
    assert files(tmp_path / "texts") >= TOKENIZER_FILES | {"NOTICE"} and "NOTICE" in files(tmp_path / "images")


def test_the_licence_goes_on_through_folders(model, tmp_path):
    """Trained, saved, loaded and pushed: the card that is written in between says what the source's did."""
    model.save_pretrained(tmp_path / "source")
    card = "---\nlicense: cc-by-nc-4.0\nbase_model: them/base\n---\n\nTheirs.\n"
    (tmp_path / "source" / "README.md").write_text(card)
    VitEmbedModel.from_pretrained(tmp_path / "source").save_pretrained(tmp_path / "between")
    written = (tmp_path / "between" / "README.md").read_text()
    assert "license: cc-by-nc-4.0" in written and "base_model: them/base" in written and "Theirs." not in written
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "README.md").write_text("mine")
    VitEmbedModel.from_pretrained(tmp_path / "between").save_pretrained(tmp_path / "own")
    assert (tmp_path / "own" / "README.md").read_text() == "mine"
    model.save_pretrained(tmp_path / "none")
    assert "README.md" not in files(tmp_path / "none")


def test_what_sentence_transformers_reads_follows_the_class(model, tmp_path):
    model.save_pretrained(tmp_path)
    VitEmbedForContrastive(tiny.dual_config()).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "sentence_bert_config.json").read_text())
    assert settings["modality_config"].keys() == {"text", "image"}


def test_the_sigmoid_pipeline_is_saved_with_the_loss_it_belongs_to(tmp_path):
    sigmoid = VitEmbedForContrastive(tiny.dual_config(contrastive_loss="sigmoid"))
    sigmoid.save_pretrained(tmp_path / "sigmoid")
    assert "custom_pipelines" in json.loads((tmp_path / "sigmoid" / "config.json").read_text())
    softmax = VitEmbedForContrastive.from_pretrained(tmp_path / "sigmoid", contrastive_loss="softmax")
    softmax.save_pretrained(tmp_path / "softmax")
    VitEmbedModel(sigmoid.config).save_pretrained(tmp_path / "images")
    for name in ("softmax", "images"):
        assert "custom_pipelines" not in json.loads((tmp_path / name / "config.json").read_text())


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


def test_another_process_than_the_main_one_writes_nothing_of_ours(model, tmp_path):
    """What transformers does there is its own: version 4 leaves the weights to `save_function`."""
    (tmp_path / "saved").mkdir()
    model.save_pretrained(tmp_path / "saved", is_main_process=False)
    ours = {"preprocessor_config.json", "modules.json", "sentence_bert_config.json"}
    assert not files(tmp_path / "saved") & ours


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
    assert (tmp_path / "own" / "LICENSE").read_text() == "mine" and "LICENSE.md" not in files(tmp_path / "own")
    assert (tmp_path / "own" / "NOTICE").read_text() == "theirs", "a licence of one's own is no notice of theirs"
