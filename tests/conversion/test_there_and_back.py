"""One suite over every layout: a source and its conversion compute the same, and the way back gives the same bits.

The cases are in support/sources.py, a model for every form of every layout.
"""

import pytest
import torch
from open_clip_reference import small_siglip
from sources import CASES, run_source, with_trunk_prefix

from vit_embed.conversion.compare import OUTPUTS, sample_inputs
from vit_embed.conversion.layouts import LAYOUTS, detections
from vit_embed.conversion.layouts.layout import MODEL_CLASSES, ConversionOptions
from vit_embed.conversion.reading import read_checkpoint
from vit_embed.convert_checkpoint import convert_checkpoint, restore_checkpoint

# Two orders of float32 operations over three layers, of the largest value; measured at most 6e-6.
CLOSE = 1e-5
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=str)
# One form after the other takes the same rules; the first few of a layout have them all.
KEYED = pytest.mark.parametrize("case", [case for case in CASES if case.is_keyed], ids=str)


@pytest.fixture(autouse=True)
def _small_siglip(monkeypatch):
    small_siglip(monkeypatch)


def assert_close(found, expected, name):
    assert found.shape == expected.shape, name
    assert float((found - expected).abs().max() / expected.abs().max()) < CLOSE, name


def hidden_states(model, inputs):
    """What enters the first layer of each tower and what leaves each layer."""
    states = list(model.trunk(inputs.pixel_values, output_hidden_states=True).hidden_states)
    if inputs.input_ids is not None:
        states += model.text_model(inputs.input_ids, output_hidden_states=True).hidden_states
    return states


def weights_of(folder):
    return read_checkpoint(folder / "model.safetensors")


@EVERY_CASE
@torch.no_grad()
def test_there_and_back(case, tmp_path):
    source = case.make(tmp_path / "source")
    options = ConversionOptions(**case.options)
    differences = convert_checkpoint(source.path, tmp_path / "ours", options, layout=case.layout)
    model = MODEL_CLASSES[case.model_class].from_pretrained(tmp_path / "ours").eval()
    inputs = sample_inputs(model.config)
    assert model.config.converted_from["layout"] == case.layout
    assert case.layout in detections(source.state_dict, source.config)

    states, outputs = run_source(case, source.model, inputs)
    found = hidden_states(model, inputs)
    assert len(found) == len(states) and outputs
    for number, (ours, theirs) in enumerate(zip(found, states)):
        assert_close(ours, theirs, f"state {number}")
    for name, expected in outputs.items():
        assert_close(OUTPUTS[name](model, inputs), expected, name)
    if case.runs:
        assert differences and max(differences.values()) < 1e-3
    else:
        assert differences is None

    if case.back is None:
        return
    if case.back == "folder":
        restored = restore_checkpoint(tmp_path / "ours", case.layout, output_dir=tmp_path / "back")
        again, weights = tmp_path / "back", read_checkpoint(tmp_path / "back" / restored.weights_file)
    else:
        again = tmp_path / "back.pt"
        restore_checkpoint(tmp_path / "ours", case.layout, output_file=again)
        weights = read_checkpoint(again)
    expected = with_trunk_prefix(source.state_dict)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor) or name in case.one_way, name
    convert_checkpoint(again, tmp_path / "again", options, layout=case.layout)
    first, second = weights_of(tmp_path / "ours"), weights_of(tmp_path / "again")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@KEYED
def test_every_key_is_needed_and_no_other_is_taken(case, tmp_path):
    source = case.make(tmp_path / "source")

    def convert(state_dict):
        return LAYOUTS[case.layout].convert(state_dict, source.config, ConversionOptions(**case.options))

    def is_refused(state_dict):
        try:
            convert(state_dict)
        except ValueError:
            return True
        return False

    for key, tensor in source.state_dict.items():
        if case.is_needed(key):
            assert is_refused({name: value for name, value in source.state_dict.items() if name != key}), key
            # Nothing reads Meta's mask token.
            wrong = {**source.state_dict, key: torch.stack([tensor] * 3)}
            assert key == "mask_token" or is_refused(wrong), f"{key} of another rank"
    with pytest.raises(ValueError, match=r"without a place in the model: .*extra\.weight"):
        convert({**source.state_dict, "extra.weight": torch.ones(1)})
