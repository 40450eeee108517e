"""torch's older ONNX exporter takes inputs by name, as optimum-onnx gives them.

It passes a dict's entries by position in the signature of `forward`, None for those between: no argument that a caller
may give can be keyword-only.
"""

import warnings

import pytest
import torch
from catalogue import CLASSES, flat

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("name", CLASSES)
def test_exported_by_name(name, tmp_path):
    case, path = CLASSES[name], tmp_path / "model.onnx"
    model, inputs = case.model(), case.inputs()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this exporter is the older one, and of each Python number it meets
        torch.onnx.export(model, (inputs,), path, dynamo=False, opset_version=18)
        output = model(**inputs)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {each.name: inputs[each.name.partition(".")[0]].numpy() for each in session.get_inputs()}
    assert len(given) == len(inputs)
    found = session.run(None, given)
    expected = flat(output, tuple(output))
    assert len(found) == len(expected)
    has_loss = int("loss" in output)  # of onnxruntime, whose log-sigmoid of -17 is -16.2, and of -18 minus infinity
    for one, other in zip(found[has_loss:], expected[has_loss:]):
        torch.testing.assert_close(torch.as_tensor(one), other, rtol=1e-4, atol=1e-4)
