"""sentence-transformers on the folders that we save: the vectors that our own methods give."""

import json
from pathlib import Path

import pytest
import torch
from pictures import photo
from transformers import AutoImageProcessor, AutoTokenizer

import vit_embed
from vit_embed.saving_vit_embed import sentence_files

sentence_transformers = pytest.importorskip("sentence_transformers", "6.0")

REPO = Path(vit_embed.__file__).parent
TEXTS = ["red apple", "a car"]
# What each class's folder embeds.
FOLDERS = {
    "VitEmbedForContrastive": ("text", "image"),
    "VitEmbedModel": ("image",),
    "VitEmbedModelWithProjection": ("image",),
    "VitEmbedForImageClassification": ("image",),
    "VitEmbedTextModel": ("text",),
    "VitEmbedTextModelWithProjection": ("text",),
}


def by_hand(model: torch.nn.Module, folder: Path, modality: str) -> torch.Tensor:
    if modality == "text":
        inputs = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    else:
        inputs = AutoImageProcessor.from_pretrained(folder)(photo("coffee"), return_tensors="pt")
    with torch.no_grad():
        if method := getattr(model, f"get_{modality}_features", None):
            return method(**inputs)
        return getattr(model, "vision_model", model)(**inputs).pooler_output


@pytest.mark.parametrize("name", FOLDERS)
def test_it_gives_our_own_vectors(name, tmp_path):
    model = getattr(vit_embed, name).from_pretrained(REPO).eval()
    model.save_pretrained(tmp_path / "ours")
    encoder = sentence_transformers.SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    encoder.save_pretrained(str(tmp_path / "theirs"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "theirs"), device="cpu")
    for modality in FOLDERS[name]:
        given = TEXTS if modality == "text" else [photo("coffee")]
        expected = by_hand(model, tmp_path / "ours", modality)
        for each in (encoder, again):
            torch.testing.assert_close(each.encode(given, convert_to_tensor=True), expected, rtol=0, atol=1e-5)


def test_the_repository_has_the_files():
    """What ships is loaded as what is saved."""
    for name, content in sentence_files(vit_embed.VitEmbedForContrastive, "nowhere").items():
        assert json.loads((REPO / name).read_text()) == json.loads(content), name


def test_files_that_are_there_stay(tmp_path):
    (tmp_path / "modules.json").write_text("[]")
    vit_embed.VitEmbedModel.from_pretrained(REPO).save_pretrained(tmp_path)
    assert (tmp_path / "modules.json").read_text() == "[]" and not (tmp_path / "sentence_bert_config.json").exists()
