"""What is written where a model is saved: whole or not at all, with what came with its weights, and asking no Hub."""

import copy
import json
import logging
import pickle
import shutil
import socket
from pathlib import Path

import pictures
import pytest
import tiny
import torch
import transformers
from fresh_process import auto_load, digests, run_fresh
from safetensors.torch import load_file
from tiny_tokenizer import TOKENIZER_FILES, write_tokenizer

from vit_embed import (
    VitEmbedForContrastive,
    VitEmbedForImageClassification,
    VitEmbedModel,
    saving_vit_embed,
)
from vit_embed.saving_vit_embed import image_processor_dict, resized

MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
MINE = {"image_processor_type": "CLIPImageProcessor", "image_mean": MEAN, "image_std": STD, "mine": True}


@pytest.fixture
def model():
    return tiny.randomised(VitEmbedModel(tiny.vision_config()))


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """A dual encoder's folder `source` in the working folder, with a tokenizer, a notice and a mean of its own."""
    monkeypatch.chdir(tmp_path)
    tiny.randomised(VitEmbedForContrastive(tiny.dual_config())).save_pretrained("source")
    write_tokenizer(tmp_path / "source")
    (tmp_path / "source" / "NOTICE").write_text("theirs")
    change(tmp_path / "source" / "preprocessor_config.json", MINE)
    return tmp_path / "source"


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def change(path: Path, fields: dict) -> None:
    path.write_text(json.dumps({**(read(path) if path.exists() else {}), **fields}))


def image_processor(folder: Path) -> dict:
    return read(folder / "preprocessor_config.json")


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# The image processor


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


def test_a_processor_that_names_neither_class_nor_size_gets_both(model, tmp_path):
    change(tmp_path / "preprocessor_config.json", {"image_mean": MEAN, "mine": True})
    model.save_pretrained(tmp_path)
    written = image_processor(tmp_path)
    assert written["image_mean"] == MEAN and written["mine"]
    assert written["image_processor_type"] == "CLIPImageProcessor" and written["size"] == {"shortest_edge": 32}


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


def test_a_margin_around_the_crop_keeps_its_share():
    own = image_processor_dict(tiny.vision_config(image_size=64), "CLIPImageProcessor")
    source = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True}
    assert resized(source, own)["size"] == {"shortest_edge": 73}  # 64 * 256 / 224
    rectangle = image_processor_dict(tiny.vision_config(image_size=(32, 64)), "CLIPImageProcessor")
    assert resized(source, rectangle)["size"] == {"height": 32, "width": 64}
    assert resized(source, rectangle)["do_center_crop"] is False


def test_a_hub_that_gives_no_processor_is_named(tmp_path, monkeypatch, caplog):
    """Weights may be in the cache where the processor is not, and the network away."""

    def unreachable(*arguments, **options):
        raise OSError("no connection")

    monkeypatch.setattr(saving_vit_embed, "snapshot_download", unreachable)
    model = VitEmbedModel(tiny.vision_config())
    with caplog.at_level(logging.WARNING):
        model._processor_folder = saving_vit_embed.processor_folder("alice/photos", {})
    assert "the processor of alice/photos could not be fetched (no connection)" in caplog.text
    model.save_processor(tmp_path)
    assert image_processor(tmp_path)["image_mean"][0] == 0.48145466


def read_processors(folders: list) -> list:
    """What AutoProcessor makes of each folder, in a process that knows it by its files alone."""
    import numpy as np
    from transformers import AutoProcessor

    found = []
    for folder in folders:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        batch = processor(text=["a cat"], images=[np.full((40, 50, 3), 200, dtype=np.uint8)], return_tensors="pt")
        pixels, ids = batch["pixel_values"], batch["input_ids"].tolist()
        found.append([type(processor).__name__, list(pixels.shape), pixels.mean(dim=(0, 2, 3)).tolist(), ids])
    return found


def test_what_openais_repos_leave_to_the_model_type_is_written(tmp_path):
    """Their processor files name no class and have sizes as one number; our model type implies nothing of CLIP."""
    source = tmp_path / "clip"
    tiny.clip_model().save_pretrained(source)
    write_tokenizer(source)
    settings = read(source / "tokenizer_config.json")
    del settings["tokenizer_class"]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    old = {
        **{"crop_size": 32, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 32},
        **{"feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.4] * 3, "image_std": [0.3] * 3},
    }
    change(source / "preprocessor_config.json", old)
    VitEmbedForContrastive.from_pretrained(source).save_pretrained(tmp_path / "ours")
    folders = [str(source), str(tmp_path / "ours")]
    theirs, ours = run_fresh(read_processors, tmp_path / "home", folders=folders)
    assert theirs[:2] == ["CLIPProcessor", [1, 3, 32, 32]]
    assert ours == theirs

    for file in TOKENIZER_FILES:
        (source / file).unlink()
    VitEmbedForContrastive.from_pretrained(source).save_pretrained(tmp_path / "weights alone")
    assert not files(tmp_path / "weights alone") & TOKENIZER_FILES, "none came, none named"


# Heads and towers of a dual encoder


def use_dual_encoder(dual: str, heads: str) -> dict:
    """Goes from one dual encoder's folder to its heads' folders and back, as a user of the Auto classes does."""
    result = {}
    for task in ("ZeroShotImageClassification", "ImageClassification", "DepthEstimation"):
        folder = f"{heads}/{task}"
        auto_load(f"AutoModelFor{task}", dual).save_pretrained(folder)
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        result[task] = [type(auto_load("AutoModel", folder)).__name__, type(processor).__name__]
    # A config object of the remote class, whose file is another copy than the model's.
    config = transformers.AutoConfig.from_pretrained(dual, trust_remote_code=True)
    config.image_size = [24, 64]
    result["resized"] = digests(auto_load("AutoModel", dual, config=config))
    return result


def test_a_dual_encoder_and_its_heads_keep_processor_and_tokenizer(source, tmp_path):
    heads = tmp_path / "heads"
    result = run_fresh(use_dual_encoder, tmp_path / "home", dual=str(source), heads=str(heads))
    expected = {
        "ZeroShotImageClassification": ("VitEmbedForContrastive", "CLIPImageProcessor", TOKENIZER_FILES),
        "ImageClassification": ("VitEmbedModel", "CLIPImageProcessor", set()),
        "DepthEstimation": ("VitEmbedModel", "DPTImageProcessor", set()),
    }
    for task, (model_class, processor_class, tokenizer) in expected.items():
        # Without torchvision transformers 5 loads the same file as its PIL variant.
        assert result[task][0] == model_class and result[task][1].startswith(processor_class)
        assert files(heads / task) & TOKENIZER_FILES == tokenizer
        assert all((heads / task / file).read_bytes() == (source / file).read_bytes() for file in tokenizer)
        kept = image_processor(heads / task)
        assert kept["image_mean"] == MEAN and kept["image_std"] == STD
        # A depth head resizes without a crop, whatever the trunk's processor does.
        assert ("crop_size" in kept) == (processor_class == "CLIPImageProcessor")
        assert ("processor_class" in kept) == bool(tokenizer)
        assert (read(heads / task / "config.json")["text_config"] is not None) == bool(tokenizer)
    assert result["resized"] == digests(VitEmbedForContrastive.from_pretrained(source, image_size=(24, 64)))


def test_a_tower_that_is_saved_by_itself_takes_what_came_with_the_whole(source, tmp_path):
    whole = VitEmbedForContrastive.from_pretrained("source")
    whole.vision_model.save_pretrained("images")
    whole.text_model.save_pretrained("texts")
    assert image_processor(tmp_path / "images")["image_mean"] == MEAN
    assert files(tmp_path / "texts") >= TOKENIZER_FILES | {"NOTICE"} and "NOTICE" in files(tmp_path / "images")


def test_tokenizer_of_a_subfolder_is_carried(source, tmp_path):
    VitEmbedForContrastive.from_pretrained(tmp_path, subfolder="source").save_pretrained("saved")
    assert files(tmp_path / "saved") >= TOKENIZER_FILES


# Where the source is


def test_a_relative_source_is_found_again_from_elsewhere(source, tmp_path, monkeypatch):
    model = VitEmbedForContrastive.from_pretrained("source")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "source").mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    model.save_pretrained("saved")
    assert image_processor(elsewhere / "saved")["image_mean"] == MEAN
    assert files(elsewhere / "saved") >= TOKENIZER_FILES


@pytest.mark.parametrize("gone", [False, True])
def test_saving_asks_no_network_and_names_a_source_that_is_gone(source, tmp_path, monkeypatch, caplog, gone):
    """Saving asks no network, whatever name the checkpoint had: what goes with the weights was fetched with them."""
    model = VitEmbedForContrastive.from_pretrained("source")
    model.config._name_or_path = model.name_or_path = "alice/model"
    if gone:
        shutil.rmtree(source)

    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: asked.append(args))
    monkeypatch.setattr(socket.socket, "connect", lambda *args: asked.append(args))
    with caplog.at_level(logging.WARNING):
        model.save_pretrained("saved")
    assert not asked and ("is gone" in caplog.text) == gone
    assert "preprocessor_config.json" in files(tmp_path / "saved")


def test_a_token_does_not_leave_with_the_model(source, tmp_path):
    model = VitEmbedForContrastive.from_pretrained("source", token="hf_SECRET")
    assert b"hf_SECRET" not in pickle.dumps(model)
    torch.save(model, tmp_path / "model.pt")
    assert b"hf_SECRET" not in (tmp_path / "model.pt").read_bytes()
    again = copy.deepcopy(model)
    assert torch.equal(again.get_image_features(tiny.pixels()), model.get_image_features(tiny.pixels()))


# Licences, cards, and what other libraries read


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


def test_the_licence_goes_on_through_folders(model, tmp_path):
    """Trained, saved, loaded and pushed: the card that is written in between has the source's."""
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
    assert read(tmp_path / "sentence_bert_config.json")["modality_config"].keys() == {"text", "image"}


def test_the_sigmoid_pipeline_is_saved_with_the_loss_it_belongs_to(tmp_path):
    sigmoid = VitEmbedForContrastive(tiny.dual_config(contrastive_loss="sigmoid"))
    sigmoid.save_pretrained(tmp_path / "sigmoid")
    VitEmbedForContrastive.from_pretrained(tmp_path / "sigmoid", contrastive_loss="softmax").save_pretrained(
        tmp_path / "softmax"
    )
    VitEmbedModel(sigmoid.config).save_pretrained(tmp_path / "images")
    for name in ("sigmoid", "softmax", "images"):
        assert ("custom_pipelines" in read(tmp_path / name / "config.json")) == (name == "sigmoid")


# Whole or not at all


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
    def weights() -> set[str]:
        return {name for name in files(tmp_path) if "safetensors" in name}

    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(weights()) > 3
    (tmp_path / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path)
    assert weights() == {"model.safetensors"} and "notes.txt" in files(tmp_path)
    model.save_pretrained(tmp_path, variant="half")
    assert weights() == {"model.safetensors", "model.half.safetensors"}


def test_the_weights_that_are_given_are_saved(model, tmp_path):
    state_dict = {name: torch.zeros_like(weight) for name, weight in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state_dict)
    assert not any(weight.any() for weight in load_file(tmp_path / "model.safetensors").values())


def test_another_process_than_the_main_one_writes_nothing_of_ours(model, tmp_path):
    """What transformers does there is its own: version 4 leaves the weights to `save_function`."""
    (tmp_path / "saved").mkdir()
    model.save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not files(tmp_path / "saved") & {"preprocessor_config.json", "modules.json", "sentence_bert_config.json"}


# What a user changes after loading


def test_resizing_keeps_a_frozen_table_frozen(model):
    model.requires_grad_(False).set_image_size(64)
    assert not model.embeddings.position_embedding.weight.requires_grad
    assert not model.embeddings.position_embedding.training


def test_the_vocabulary_can_grow():
    model = VitEmbedForContrastive(tiny.dual_config())
    model.resize_token_embeddings(110)
    assert model.text_model.get_input_embeddings().weight.shape == (110, 24)
    assert model.config.text_config.vocab_size == 110


def test_labels_of_other_integer_types_and_rows_left_out():
    model, images = VitEmbedForImageClassification(tiny.vision_config(num_labels=5)).eval(), tiny.pixels()
    expected = model(images, labels=torch.tensor([1, 2, 3])).loss
    torch.testing.assert_close(model(images, labels=torch.tensor([1, 2, 3], dtype=torch.int32)).loss, expected)
    some = model(images, labels=torch.tensor([1, -100, -100])).loss
    torch.testing.assert_close(some, model(images[:1], labels=torch.tensor([1])).loss, rtol=1e-4, atol=1e-5)
    assert model(images, labels=torch.tensor([-100] * 3)).loss == 0
