"""Int8 layers and merged tokens in the copy that `optimized` makes, as docs/speed.md shows them."""

import pytest
import torch
from catalogue import CLASSES, pixels, tokens
from torch import nn
from torch.nn import functional as F

from vit_embed import VitEmbedForContrastive

# Three times the distance from 1 that seven seeds had at most; trained models are in docs/speed.md.
LEAST_COSINE = 0.998
DynamicLinear = torch.ao.nn.quantized.dynamic.Linear


def quantised(model: nn.Module) -> nn.Module:
    scheme = {nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
    return torch.ao.quantization.quantize_dynamic(model, scheme)


def merging(tmp_path, **fields) -> VitEmbedForContrastive:
    CLASSES["contrastive"].model().save_pretrained(tmp_path)
    return VitEmbedForContrastive.from_pretrained(tmp_path, **fields).eval()


def both_features(model) -> list[torch.Tensor]:
    return [model.get_image_features(pixels()), model.get_text_features(tokens())]


@pytest.mark.filterwarnings("ignore")  # torch: that torchao takes the place of this
@torch.no_grad()
def test_an_int8_copy_has_int8_weights_alone_and_nearly_the_same_features():
    model = CLASSES["contrastive"].model()
    small = quantised(model.optimized())
    layers = [each for each in small.modules() if isinstance(each, nn.Linear | DynamicLinear)]
    assert len(layers) > 10 and all(each.weight().dtype == torch.qint8 for each in layers)
    for found, expected in zip(both_features(small), both_features(model)):
        assert (F.cosine_similarity(found, expected) > LEAST_COSINE).all()
        assert not torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_copy_of_an_int8_copy():
    small = quantised(CLASSES["contrastive"].model().optimized())
    for found, expected in zip(both_features(small.optimized()), both_features(small)):
        assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prepare", [lambda copied: copied, quantised], ids=["float32", "int8"])
@torch.no_grad()
def test_a_copy_merges_as_many_tokens_as_its_model(prepare, tmp_path):
    model = merging(tmp_path, token_merge_size=2)
    counts = [
        [states.shape[1] for states in each.vision_model(pixels(), output_hidden_states=True).hidden_states]
        for each in (model, prepare(model.optimized()))
    ]
    first, step = counts[0][0], counts[0][0] - counts[0][1]
    assert counts[0] == counts[1] and step == 2 and counts[0] == [first - 2 * i for i in range(len(counts[0]))]
