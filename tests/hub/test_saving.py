"""Where a saved folder's processor comes from, and what must not leave with a model."""

import copy
import json
import logging
import pickle
import shutil

import pytest
import torch
from tiny import dual_config, pixels, tokens, vision_config
from tiny_tokenizer import TOKENIZER_FILES, write_tokenizer
from transformers.utils import hub

from vit_embed import VitEmbedConfig, VitEmbedForContrastive, VitEmbedForImageClassification, VitEmbedModel

MEAN = [0.1, 0.2, 0.3]


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A dual encoder's folder `source` in the working folder, with a tokenizer and a mean of its own."""
    monkeypatch.chdir(tmp_path)
    VitEmbedForContrastive(dual_config()).save_pretrained("source")
    write_tokenizer(tmp_path / "source")
    file = tmp_path / "source" / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_mean": MEAN}))
    return tmp_path / "source"


def test_a_relative_source_is_found_again_from_elsewhere(source, tmp_path, monkeypatch):
    model = VitEmbedForContrastive.from_pretrained("source")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "source").mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    model.save_pretrained("saved")
    assert json.loads((elsewhere / "saved" / "preprocessor_config.json").read_text())["image_mean"] == MEAN
    assert {path.name for path in (elsewhere / "saved").iterdir()} >= TOKENIZER_FILES


def test_a_source_that_is_gone_is_not_looked_for_on_the_hub(source, tmp_path, monkeypatch, caplog):
    model = VitEmbedForContrastive.from_pretrained("source")
    shutil.rmtree(source)
    asked = []
    monkeypatch.setattr(hub, "cached_files", lambda *args, **kwargs: asked.append(args))
    with caplog.at_level(logging.WARNING):
        model.save_pretrained("saved")
    assert not asked and "is gone" in caplog.text
    assert (tmp_path / "saved" / "preprocessor_config.json").exists()


def test_a_token_does_not_leave_with_the_model(source, tmp_path):
    model = VitEmbedForContrastive.from_pretrained("source", token="hf_SECRET")
    assert b"hf_SECRET" not in pickle.dumps(model)
    torch.save(model, tmp_path / "model.pt")
    assert b"hf_SECRET" not in (tmp_path / "model.pt").read_bytes()
    again = copy.deepcopy(model)
    assert torch.equal(again.get_image_features(pixels()), model.get_image_features(pixels()))


def test_image_size_by_a_config_file(source):
    VitEmbedConfig.from_pretrained("source", image_size=64).save_pretrained("larger")
    model, info = VitEmbedForContrastive.from_pretrained("source", config="larger", output_loading_info=True)
    assert model.config.grid_size == (8, 8) and not info["mismatched_keys"]


def test_resizing_keeps_a_frozen_table_frozen():
    model = VitEmbedModel(vision_config()).eval().requires_grad_(False)
    model.set_image_size(64)
    assert not model.embeddings.position_embedding.weight.requires_grad
    assert not model.embeddings.position_embedding.training


def test_the_scale_counts_up_to_its_bound_and_comes_back():
    """At random embeddings a lower scale is a lower loss, so the gradient leads back."""
    model = VitEmbedForContrastive(dual_config()).train()
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    optimizer = torch.optim.SGD([model.logit_scale], lr=0.5)
    output = model(pixels(), tokens())
    assert output.logits_per_image.abs().max() <= 100.01
    output.loss.backward()
    assert model.logit_scale.item() == 9.0 and model.logit_scale.grad > 0
    for _ in range(20):
        optimizer.zero_grad()
        model(pixels(), tokens()).loss.backward()
        optimizer.step()
    assert model.logit_scale < 4.6
    with pytest.raises(ValueError, match="logit_scale_init_value must be a natural log of at most ln 100, got 9.0"):
        dual_config(logit_scale_init_value=9.0)


def test_the_vocabulary_can_grow():
    model = VitEmbedForContrastive(dual_config())
    model.resize_token_embeddings(110)
    assert model.text_model.get_input_embeddings().weight.shape == (110, 24)
    assert model.config.text_config.vocab_size == 110


def test_clips_argument_order_is_refused():
    model = VitEmbedForContrastive(dual_config())
    with pytest.raises(TypeError, match="normalize must be True or False, got Tensor; pass other inputs by name"):
        model.get_text_features(tokens(), torch.ones(3, 16))


def test_labels_of_other_integer_types_and_rows_left_out():
    model = VitEmbedForImageClassification(vision_config(num_labels=5)).eval()
    expected = model(pixels(), labels=torch.tensor([1, 2, 3])).loss
    torch.testing.assert_close(model(pixels(), labels=torch.tensor([1, 2, 3], dtype=torch.int32)).loss, expected)
    some = model(pixels(), labels=torch.tensor([1, -100, -100])).loss
    torch.testing.assert_close(some, model(pixels(1), labels=torch.tensor([1])).loss, rtol=1e-4, atol=1e-5)
    assert model(pixels(), labels=torch.tensor([-100] * 3)).loss == 0
    with pytest.raises(ValueError, match="class numbers.*torch.bool"):
        model(pixels(), labels=torch.tensor([True, False, True]))


def test_targets_of_as_many_numbers_in_another_shape_are_refused():
    config = vision_config(num_labels=2, problem_type="multi_label_classification")
    with pytest.raises(ValueError, match=r"must be \(3, 2\), got \(2, 3\)"):
        VitEmbedForImageClassification(config)(pixels(), labels=torch.ones(2, 3))
