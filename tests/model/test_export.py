"""Graphs of the classes, made at one size and held against the model at sizes that they have not seen: traced,
exported, as ONNX files, compiled ahead of time."""

import functools
import warnings

import pytest
import torch
from catalogue import CLASSES, GRAPHS, OPTIONS, Case, flat, mostly_heavy, sized_inputs
from torch import nn
from torch.export import Dim

EXAMPLE = (2, 32, 32, 16)  # the native grid, which must not be baked in
UNSEEN = [(3, 32, 64, 12), (1, 64, 48, 16), (5, 96, 32, 7)]
# Float32 sums in another order, of outputs around 1.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
# onnxruntime sums in its own order, and DPT adds up four levels.
ONNX_TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


class Graphed(nn.Module):
    """A model as exporters want it: tensors in, tensors out."""

    def __init__(self, case: Case, model: nn.Module):
        super().__init__()
        self.case, self.model, self.names = case, model, list(case.inputs())

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.model(**dict(zip(self.names, inputs)))
        return tuple(flat(output, self.case.outputs))


def graphed(name: str) -> Graphed:
    return Graphed(GRAPHS[name], GRAPHS[name].model()).eval()


def inputs(case: Case, size: tuple[int, int, int, int]) -> tuple[torch.Tensor, ...]:
    return tuple(sized_inputs(case, *size).values())


def dynamic_shapes(case: Case, coarse: bool) -> dict[str, tuple[dict[int, Dim], ...]]:
    """Batch, sizes in whole patches, text length. Cells and coarse levels are two patches wide."""
    # torch.export takes a size of 0 or 1 for another program, and so a grid of which some level has one row.
    unit, least = (16, 2) if coarse else (8, 2)
    batch = Dim("batch", min=1, max=64)
    rows, columns = Dim("rows", min=least, max=30), Dim("columns", min=least, max=30)
    of = {
        "pixel_values": {0: batch, 2: unit * rows, 3: unit * columns},
        "input_ids": {0: batch, 1: Dim("tokens", min=2, max=16)},
        "bool_masked_pos": {0: batch, 1: Dim.AUTO},
    }
    return {"inputs": tuple(of[each] for each in case.inputs())}


def is_coarse(name: str) -> bool:
    return name in ("stem adaptive", "depth, dpt", "merging")


def assert_serves_unseen_sizes(graph, part: Graphed, tolerance: dict[str, float]) -> None:
    for size in UNSEEN:
        given = inputs(part.case, size)
        with torch.no_grad():
            expected, found = part(*given), graph(*given)
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            torch.testing.assert_close(torch.as_tensor(one), other, **tolerance)


@functools.cache
def exported(name: str, strict: bool = False) -> tuple[torch.export.ExportedProgram, Graphed]:
    """A case as a program, and the model that it is of."""
    part = graphed(name)
    given = inputs(part.case, (2, 64, 48, 16) if is_coarse(name) else EXAMPLE)
    shapes = dynamic_shapes(part.case, is_coarse(name))
    with torch.no_grad():
        return torch.export.export(part, given, dynamic_shapes=shapes, strict=strict), part


@pytest.mark.parametrize("name", GRAPHS)
def test_traced(name):
    part = graphed(name)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of each Python number that the tracer meets
        graph = torch.jit.trace(part, inputs(part.case, EXAMPLE), check_trace=False)
    assert_serves_unseen_sizes(graph, part, TOLERANCE)


# An export takes many seconds: `make test` takes the classes that differ most, `make test-all` every case.
@pytest.mark.parametrize("name", mostly_heavy(GRAPHS, "contrastive", "contrastive, siglip", "depth, dpt", "masked"))
def test_exported(name):
    program, part = exported(name)
    assert_serves_unseen_sizes(program.module(), part, TOLERANCE)


@pytest.mark.parametrize("name", mostly_heavy(GRAPHS, "text, projection"))
def test_exported_strictly(name):
    program, part = exported(name, strict=True)
    assert_serves_unseen_sizes(program.module(), part, TOLERANCE)


def run_onnx(path) -> object:
    """A function that onnxruntime computes."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return lambda *given: session.run(None, {name: tensor.numpy() for name, tensor in zip(names, given)})


@pytest.mark.parametrize("name", mostly_heavy(GRAPHS, "contrastive"))
def test_onnx_of_the_exported_program(name, tmp_path):
    pytest.importorskip("onnxscript")
    program, part = exported(name)
    torch.onnx.export(program, (), tmp_path / "model.onnx", dynamo=True, verbose=False)
    assert_serves_unseen_sizes(run_onnx(tmp_path / "model.onnx"), part, ONNX_TOLERANCE)


# torch's older exporter has no such operator: an error of its own.
NOT_IN_ONNX_OF_A_TRACE = {"antialias": "_upsample_bicubic2d_aa"}


@pytest.mark.parametrize(
    "name", mostly_heavy(GRAPHS, *CLASSES, *OPTIONS, "stem adaptive", "stem deformable", "stem dct")
)
def test_onnx_of_the_trace(name, tmp_path):
    part, path = graphed(name), tmp_path / "model.onnx"
    names = list(part.case.inputs())
    axes = {
        each: {0: "batch", **({2: "height", 3: "width"} if each == "pixel_values" else {1: "length"})} for each in names
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this exporter is the older one, and of each Python number it meets
        options = {"dynamo": False, "input_names": names, "dynamic_axes": axes, "opset_version": 18}
        if name in NOT_IN_ONNX_OF_A_TRACE:
            with pytest.raises(torch.onnx.errors.UnsupportedOperatorError, match=NOT_IN_ONNX_OF_A_TRACE[name]):
                torch.onnx.export(part, inputs(part.case, EXAMPLE), path, **options)
            return
        torch.onnx.export(part, inputs(part.case, EXAMPLE), path, **options)
    assert_serves_unseen_sizes(run_onnx(path), part, ONNX_TOLERANCE)


@pytest.mark.heavy
@pytest.mark.parametrize("name", [*CLASSES, "stem hybrid", "stem adaptive", "stem dct"])
def test_compiled_ahead_of_time(name, tmp_path):
    program, part = exported(name)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    assert_serves_unseen_sizes(torch._inductor.aoti_load_package(path), part, TOLERANCE)


def test_sizes_in_the_data_cannot_be_exported():
    """Each image's own size is read from pixel_mask, which a graph for good could only bake in."""
    model = CLASSES["classification"].model()
    mask = torch.ones(2, 32, 32)
    part = Graphed(CLASSES["classification"]._replace(inputs=lambda: {"pixel_values": None, "pixel_mask": None}), model)
    given = (*inputs(CLASSES["classification"], EXAMPLE), mask)
    with pytest.raises(ValueError, match="pixel_mask says in its values.*export without pixel_mask"):
        torch.jit.trace(part, given, check_trace=False)
    with pytest.raises(Exception, match="pixel_mask says in its values"):
        torch.export.export(part, given)
