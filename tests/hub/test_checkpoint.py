"""The checkpoint that ships: complete, small, and what the card says of it holds."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoProcessor

from vit_embed.configuration_vit_embed import AUTO_MAP

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO / "examples"))

from recipes.embedding import embed_texts  # noqa: E402
from recipes.search import embed_files, find_pictures  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return AutoModel.from_pretrained(REPO, trust_remote_code=True).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(REPO, trust_remote_code=True)


@pytest.fixture(scope="module")
def retrieval(model, processor):
    """(texts, pictures) cosines of the demo's pictures, a vendor never trained on, and their names."""
    paths = find_pictures(REPO / "examples" / "pictures")
    paths, image_embeds = embed_files(model, processor, paths, batch_size=64)
    names = [path.stem.replace("-", " ") for path in paths]
    return embed_texts(model, processor.tokenizer, names) @ image_embeds.t()


def test_it_is_complete_and_small():
    assert (REPO / "model.safetensors").stat().st_size < 20e6
    written = json.loads((REPO / "config.json").read_text())
    assert set(written["auto_map"]) == set(AUTO_MAP)
    with safe_open(REPO / "model.safetensors", "pt") as weights:
        dtypes = {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118, not a dict
    assert dtypes == {"F16", "I64"}, "weights, and the counters of batch norm"


def test_it_finds_pictures_of_an_unseen_vendor_far_better_than_chance(retrieval):
    """528 names: chance puts the right picture first in 0.2 % and among ten in 2 %."""
    rank = (retrieval >= retrieval.diag()[:, None]).sum(dim=1)
    assert (rank <= 1).float().mean() > 0.45
    assert (rank <= 10).float().mean() > 0.75
    rank = (retrieval.t() >= retrieval.diag()[:, None]).sum(dim=1)
    assert (rank <= 10).float().mean() > 0.75, "and names for pictures"


def test_it_computes_in_float32_though_float16_is_stored(model):
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.dtype == torch.float32
    half = AutoModel.from_pretrained(REPO, trust_remote_code=True, dtype=torch.bfloat16)
    assert half.logit_scale.dtype == torch.bfloat16


def test_text_is_limited_to_its_context(model, processor):
    long = processor.tokenizer("red " * 60, return_tensors="pt")
    with pytest.raises(ValueError, match="at most max_position_embeddings=32 tokens, got 62.*truncation=True"):
        model.get_text_features(**long)
    cut = processor.tokenizer("red " * 60, truncation=True, return_tensors="pt")
    assert model.get_text_features(**cut).shape == (1, 256)
