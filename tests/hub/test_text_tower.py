"""The text tower alone: with its projection, in a folder of its own, under the names that stock CLIP has for it."""

import json

import pytest
import tiny
import torch
from fresh_process import run_fresh
from test_loading import classes_of
from tiny_tokenizer import TOKENIZER_FILES, write_tokenizer
from transformers import AutoTokenizer, CLIPTextModelWithProjection

from vit_embed import (
    VitEmbedConfig,
    VitEmbedForContrastive,
    VitEmbedForImageClassification,
    VitEmbedModel,
    VitEmbedTextModel,
    VitEmbedTextModelWithProjection,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dual encoder with its tokenizer, and its text tower without and with the projection, each saved."""
    root = tmp_path_factory.mktemp("text")
    tiny.randomised(VitEmbedForContrastive(tiny.dual_config())).save_pretrained(root / "dual")
    write_tokenizer(root / "dual")
    for name, model_class in {"tower": VitEmbedTextModel, "projection": VitEmbedTextModelWithProjection}.items():
        model_class.from_pretrained(root / "dual").save_pretrained(root / name)
    return root


def test_it_gives_the_dual_encoders_text_features(folders):
    dual = VitEmbedForContrastive.from_pretrained(folders / "dual")
    texts = {"input_ids": tiny.tokens(), "attention_mask": torch.ones(3, 16, dtype=torch.long)}
    for folder in ("dual", "projection"):
        model = VitEmbedTextModelWithProjection.from_pretrained(folders / folder)
        with torch.no_grad():
            wanted = dual.get_text_features(**texts)
            torch.testing.assert_close(model.get_text_features(**texts), wanted, rtol=0, atol=0)
            output = model(**texts)
            # All rows of the last layer, in another order of operations: float32 rounding.
            torch.testing.assert_close(output.text_embeds, wanted, rtol=0, atol=1e-5)
        assert output.last_hidden_state.shape == (3, 16, 24)


def test_stock_clip_reads_the_projection_and_its_width(folders):
    """From the dual encoder's folder: transformers looks for projection_dim in the text tower's config."""
    stock = CLIPTextModelWithProjection.from_pretrained(folders / "dual").eval()
    ours = VitEmbedTextModelWithProjection.from_pretrained(folders / "dual")
    with torch.no_grad():
        expected = stock(tiny.tokens()).text_embeds
        torch.testing.assert_close(ours.get_text_features(tiny.tokens()), expected, rtol=0, atol=1e-5)


def test_an_older_folder_says_the_width_in_one_place(folders, tmp_path):
    (tmp_path / "model.safetensors").symlink_to(folders / "dual" / "model.safetensors")
    config = json.loads((folders / "dual" / "config.json").read_text())
    assert config["projection_dim"] == 20
    del config["text_config"]["projection_dim"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert VitEmbedTextModelWithProjection.from_pretrained(tmp_path).config.projection_dim == 20


@pytest.mark.parametrize("name", ["tower", "projection"])
def test_its_folder_has_the_tokenizer(folders, name):
    files = {path.name for path in (folders / name).iterdir()}
    assert files >= TOKENIZER_FILES and "preprocessor_config.json" not in files
    assert AutoTokenizer.from_pretrained(folders / name)("cat").input_ids[-1] == tiny.EOS


def test_auto_model_knows_which_was_saved(folders, tmp_path):
    found = run_fresh(classes_of, tmp_path, folders=[str(folders / name) for name in ("tower", "projection")])
    assert found == ["VitEmbedTextModel", "VitEmbedTextModelWithProjection"]


TYPES = {
    VitEmbedModel: "vit_embed, clip, clip_vision",
    VitEmbedTextModel: "vit_embed_text, vit_embed, clip, clip_text_model",
    VitEmbedConfig: "vit_embed, clip, clip_vision",
}


@pytest.mark.parametrize("loaded", TYPES)
def test_a_folder_of_another_model_is_refused(tmp_path, loaded):
    """transformers warns and starts every weight anew."""
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": 32}')
    with pytest.raises(ValueError, match=f"holds a model of type 'bert', expected one of {TYPES[loaded]}"):
        loaded.from_pretrained(tmp_path)


@pytest.mark.parametrize("model_class", [VitEmbedModel, VitEmbedForContrastive, VitEmbedForImageClassification])
def test_an_image_class_refuses_the_folder_of_a_text_tower(folders, model_class):
    with pytest.raises(ValueError, match="tower is a text tower alone; load it with AutoModel or VitEmbedTextModel"):
        model_class.from_pretrained(folders / "tower")
