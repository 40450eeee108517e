"""torch.compile of a tower, of a class, of a training step: one graph, and the numbers of the plain pass."""

import pytest
import stem_family
import tiny
import torch
from catalogue import CLASSES, GRAPHS, SHALLOW, WITH_LOSS, Case, contrastive, flat, mostly_heavy
from tiny import pixels, tokens

# Sums in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def assert_same_outputs(case: Case, model, compiled) -> None:
    with torch.no_grad():
        expected = flat(model(**case.inputs()), case.outputs)
        found = flat(compiled(**case.inputs()), case.outputs)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, **CLOSE)


# Compiling takes seconds: `make test` takes the cases whose code differs most, `make test-all` every case.
@pytest.mark.parametrize(
    "name",
    mostly_heavy(GRAPHS, "contrastive, siglip", "depth, dpt", "polynomial", "merging", "stem adaptive"),
)
def test_a_class_is_one_graph(name):
    case = GRAPHS[name]
    model = case.model()
    assert_same_outputs(case, model, torch.compile(model, backend="eager", fullgraph=True))


@pytest.mark.heavy
@pytest.mark.parametrize("name", CLASSES)
def test_inductor_computes_a_class(name):
    case = CLASSES[name]
    model = case.model()
    assert_same_outputs(case, model, torch.compile(model, fullgraph=True, dynamic=True))


def counting(graphs: list):
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend


@pytest.mark.parametrize(
    "name", mostly_heavy([each for each in CLASSES if each not in ("model", "text")], "contrastive")
)
def test_a_tower_that_is_compiled_alone_is_what_the_class_runs(name):
    case, graphs = CLASSES[name], []
    model, plain = case.model(), case.model()
    towers = [tower for tower in ("vision_model", "text_model") if hasattr(model, tower)]
    for tower in towers:
        getattr(model, tower).compile(backend=counting(graphs), fullgraph=True)
    assert_same_outputs(case, plain, model)
    assert len(graphs) == len(towers)
    if name == "contrastive":
        torch.testing.assert_close(model.get_image_features(pixels()), plain.get_image_features(pixels()), **CLOSE)
        assert len(graphs) > len(towers)


def assert_same_step(model, compiled, inputs) -> None:
    expected = tiny.gradients(model, inputs)
    found = tiny.gradients_of(model, lambda: compiled(**inputs).loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * max(1, gradient.abs().max().item()))


@pytest.mark.parametrize("name", mostly_heavy(WITH_LOSS, "masked"))
def test_a_training_step_is_one_graph(name):
    case = CLASSES[name]
    model = case.model().train()
    assert_same_step(model, torch.compile(model, backend="aot_eager", fullgraph=True), case.training_inputs())


BATCH = {"pixel_values": pixels(4), "input_ids": tokens(4)}


def test_a_training_step_in_chunks_is_one_graph():
    model = contrastive(contrastive_chunk_size=2).model().train()
    assert_same_step(model, torch.compile(model, backend="aot_eager", fullgraph=True), BATCH)


@pytest.mark.heavy
def test_a_training_step_in_chunks_with_batch_norm_leaves_the_chunks_out_of_the_graph():
    model = stem_family.build("hybrid", "contrastive", contrastive_chunk_size=2, **SHALLOW).train()
    assert_same_step(model, torch.compile(model, backend="eager"), BATCH)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile the towers instead"):
        torch.compile(model, backend="eager", fullgraph=True)(**BATCH)
