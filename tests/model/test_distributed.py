"""Two gloo processes against one: losses, gradients, sharded weights, evaluation."""

import distributed_worker
import pytest
import stem_family
import tiny
import torch
from catalogue import CLASSES, WITH_LOSS, flat
from tiny import CLOSE, assert_same_gradients


@pytest.fixture(scope="module")
def distributed_results(tmp_path_factory) -> dict:
    """What two gloo processes found, see distributed_worker."""
    folder = tmp_path_factory.mktemp("distributed")
    distributed_worker.launch(folder)
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("case", distributed_worker.CASES)
def test_two_processes_learn_as_one_on_the_joined_batch(distributed_results, case):
    sizes, fields, grouped, _ = distributed_worker.CASES[case]
    # In one piece: cached gradients are no less equal.
    model = distributed_worker.make_model(**{**fields, "contrastive_chunk_size": None})
    loss = model(**distributed_worker.joined_batch(sum(sizes), grouped)).loss
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    found_loss, found = distributed_results[case]
    torch.testing.assert_close(found_loss, loss.detach(), **CLOSE)  # float32, sums in another order
    assert_same_gradients(found, expected)
    assert all(gradient.abs().max() > 0 for name, gradient in found.items() if not name.endswith("k_proj.bias"))


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_whose_towers_and_layers_are_sharded_gives_what_it_gives_whole(distributed_results, name):
    """Every process has the same batch, so the mean of their gradients is that of one; a contrastive loss is of the
    batch twice over."""
    case, found = CLASSES[name], distributed_results["sharded classes"][name]
    model = case.model()
    with torch.no_grad():
        for number, tensor in enumerate(flat(model(**case.inputs()), case.outputs)):
            torch.testing.assert_close(found.pop(number), tensor, **CLOSE)
    if not case.labels:
        assert not found
        return
    inputs = case.training_inputs()
    if "input_ids" in inputs:
        inputs = {key: torch.cat([rows, rows]) for key, rows in inputs.items()}
    expected = tiny.gradients(model.train(), inputs)
    assert_same_gradients(found, expected)


def test_processes_that_evaluate_do_not_wait_for_each_other(distributed_results):
    """One has a batch more, and another size."""
    model = distributed_worker.make_model().eval()
    with torch.no_grad():
        of_size = {size: model(**distributed_worker.joined_batch(size)).loss.item() for size in (2, 3)}
    assert distributed_results["alone"] == [pytest.approx([of_size[3]] * 2), pytest.approx([of_size[2]])]


def test_ignored_labels_of_two_processes_count_as_in_one(distributed_results, tmp_path):
    expected = distributed_worker.train_with_ignored_labels(tmp_path, 1)
    for name, values in distributed_results["ignored labels"].items():
        torch.testing.assert_close(values, expected[name], rtol=0, atol=1e-6)


def test_every_stem_and_head_trains_in_two_processes(distributed_results):
    agree = distributed_results["family"]
    assert all(agree.values()), agree
    pairs = [pair.rsplit(", ", 1) for pair in agree]
    assert {stem for stem, _ in pairs} == set(stem_family.FAMILY)
    heads = {stem_family.HEADS[head].model_class for _, head in pairs}
    assert heads == {CLASSES[name].model_class for name in WITH_LOSS}


def test_trainer_in_two_processes_reports_the_mean_of_their_own_losses(distributed_results):
    """Evaluation is local: a process that evaluates alone, or has one batch more, waits for nobody."""
    size = distributed_worker.TRAINER_EXAMPLES
    joined, half = distributed_worker.joined_batch(size, grouped=True), size // 2
    model = distributed_worker.make_model().eval()
    with torch.no_grad():
        parts = [{name: rows[part] for name, rows in joined.items()} for part in (slice(half), slice(half, size))]
        expected = sum(model(**part).loss.item() for part in parts) / 2
    found = distributed_results["trainer"]
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)  # float32, sums in another order
    assert [len(rows) for rows in found["predictions"]] == [size, size]


def test_trainer_in_two_processes_and_in_chunks_learns_what_one_does(distributed_results, tmp_path):
    trainer = distributed_worker.make_trainer(tmp_path, processes=1)
    start = {name: values.clone() for name, values in trainer.model.state_dict().items()}
    trainer.train()
    expected = trainer.model.state_dict()
    assert max((expected[name] - start[name]).abs().max() for name in start) > 1e-3
    # A few float32 roundings of weights about 1.
    torch.testing.assert_close(distributed_results["trainer"]["weights"], expected, rtol=0, atol=1e-6)
