"""The rules of a forward pass, which stand at the head of modeling_vit_embed.py, over every class."""

import copy
import importlib
from collections import Counter

import pytest
import stem_family
import tiny
import torch
import torch.distributed as dist
from accelerate import cpu_offload
from catalogue import CLASSES, GRAPHS, SHALLOW, STEMS, flat
from datasets import Dataset
from tiny import dual_config, pixels, randomised, tokens, vision_config
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainingArguments

import vit_embed
from vit_embed import stem_layers_vit_embed

DUAL = ["contrastive", "contrastive, siglip"]


def outputs(case, model) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return flat(model(**case.inputs()), case.outputs)


def assert_equal(found, expected, **tolerance) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, **(tolerance or {"rtol": 0, "atol": 0}))


def counted(module: nn.Module, run) -> int:
    calls = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    run()
    handle.remove()
    return len(calls)


# --- 1: submodules are called ---


def negative(value):
    if isinstance(value, torch.Tensor):
        return -value
    if isinstance(value, tuple):
        return tuple(each._replace(states=-each.states) if hasattr(each, "states") else each for each in value)
    return value


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in ("model", "text")])
@torch.no_grad()
def test_a_hook_on_a_tower_fires_once_a_pass_and_may_change_what_it_gives(name):
    case = CLASSES[name]
    model = case.model()
    expected = outputs(case, model)
    for tower in (module for path, module in model.named_children() if path in ("vision_model", "text_model")):
        assert counted(tower, lambda: outputs(case, model)) == 1
        handle = tower.register_forward_hook(
            lambda module, inputs, output: type(output)(**{key: negative(value) for key, value in output.items()})
        )
        changed = outputs(case, model)
        handle.remove()
        assert any((one - other).abs().max() > 1e-3 for one, other in zip(changed, expected))


@torch.no_grad()
def test_hooks_on_towers_fire_for_features():
    model = CLASSES["contrastive"].model()
    assert counted(model.vision_model, lambda: model.get_image_features(pixels())) == 1
    assert counted(model.vision_model, lambda: model.get_patch_features(pixels())) == 1
    assert counted(model.text_model, lambda: model.get_text_features(tokens())) == 1


@pytest.mark.parametrize("name", GRAPHS)
@torch.no_grad()
def test_weights_that_are_there_during_their_modules_own_pass_alone(name):
    """accelerate puts them on the meta device before and after: who reads them from outside fails."""
    case = GRAPHS[name]
    model = case.model()
    expected = outputs(case, model)
    cpu_offload(model, execution_device="cpu")
    assert all(p.is_meta for p in model.parameters())
    assert_equal(outputs(case, model), expected)


# --- 2: nothing from parameters() ---


def replica_of(model: nn.Module) -> nn.Module:
    """What `nn.DataParallel` runs on one of two devices; there is one here, so only the copy to it is replaced."""
    module = importlib.import_module("torch.nn.parallel.replicate")
    kept = module._broadcast_coalesced_reshape
    module._broadcast_coalesced_reshape = lambda tensors, devices, detach=False: [
        [each.detach().clone() if detach else each.clone() for each in tensors] for _ in devices
    ]
    try:
        return module.replicate(model, [0, 1])[1]
    finally:
        module._broadcast_coalesced_reshape = kept


@pytest.mark.parametrize("name", GRAPHS)
def test_a_replica_of_data_parallel(name):
    case, close = GRAPHS[name], {"rtol": 1e-5, "atol": 1e-6}
    model = case.model()
    replica = replica_of(model)
    assert not list(replica.parameters())
    with torch.no_grad():
        assert_equal(outputs(case, replica), outputs(case, model), **(close if name in STEMS else {}))
    if name not in STEMS:
        inputs = case.training_inputs()
        found = tiny.gradients_of(model, lambda: tiny.score(replica_of(model)(**inputs)))
        assert_equal(list(found.values()), list(tiny.gradients(model, inputs).values()), **close)


def test_a_replica_takes_the_count_of_items_as_trainer_gives_it():
    """(1, 1) in place of a scalar."""
    case = CLASSES["classification"]
    model = case.model()
    expected = model(**case.training_inputs(), num_items_in_batch=6).loss
    found = model(**case.training_inputs(), num_items_in_batch=torch.tensor([[6]])).loss
    assert found.shape == () and torch.equal(found, expected)


# --- 4: collectives belong to training steps ---


@pytest.fixture
def among_others(monkeypatch):
    """A process that believes it has others, where a collective is an error."""

    def refuse(*args, **kwargs):
        raise AssertionError("a collective was called")

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    for name in ("all_gather", "all_reduce", "broadcast", "all_gather_into_tensor", "barrier"):
        monkeypatch.setattr(dist, name, refuse)


@pytest.mark.parametrize("name", DUAL)
def test_evaluation_and_passes_without_gradients_are_local(among_others, name):
    case = CLASSES[name]
    model = case.model()
    assert model(**case.inputs()).loss is not None
    model.train()
    with torch.no_grad():
        assert model(**case.inputs()).loss is not None
    model.get_image_features(pixels())
    assert model(**case.inputs(), gather_loss=False).loss is not None
    for mode in (model.train(), copy.deepcopy(model).eval()):
        options = {} if mode.training else {"gather_loss": True}
        with pytest.raises(AssertionError, match="a collective was called"):
            mode(**case.inputs(), **options)


# --- 5: no parameter is written to ---


@pytest.mark.parametrize("name", CLASSES)
def test_two_passes_share_a_backward_and_none_writes_to_a_parameter(name):
    case = CLASSES[name]
    model = case.model().train()
    inputs = case.training_inputs()
    other = {**inputs, "pixel_values": pixels(seed=8)} if "pixel_values" in inputs else {"input_ids": tokens(seed=8)}
    before = {path: (p._version, p.detach().clone()) for path, p in model.named_parameters()}
    parts = [tiny.gradients(model, each) for each in (inputs, other)]

    def both():
        first = tiny.score(model(**inputs))
        with torch.no_grad():
            model(**other)
        return first + tiny.score(model(**other))

    for path, gradient in tiny.gradients_of(model, both).items():
        expected = parts[0][path] + parts[1][path]
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * max(1, expected.abs().max().item()))
    for path, parameter in model.named_parameters():
        version, value = before[path]
        assert parameter._version == version and torch.equal(parameter, value), path


# --- 6: losses take num_items_in_batch ---

SPARSE_CLASSES = torch.tensor([0, -100, -100, -100, 1, 2, 0, 1])
SPARSE_TARGETS = torch.tensor([[1, 0, -100], [0, -100, -100], [1, 1, 1], [0, 0, 1]] * 2)


def sparse_depths(missing: float) -> torch.Tensor:
    """Labels of 8 images, with more and more of them missing."""
    labels = pixels(8, seed=5)[:, 0].abs() + 0.2
    hidden = torch.rand(8, 32, 32, generator=torch.Generator().manual_seed(0)) < torch.arange(8)[:, None, None] / 9
    return labels.masked_fill(hidden, missing)


def uneven_masks() -> torch.Tensor:
    patch, image = torch.arange(16)[None], torch.arange(8)[:, None]
    return patch % (2 + image) > 0


STEPS = {
    "classes": ("classification", {"num_labels": 3}, {"labels": SPARSE_CLASSES}),
    "several labels": (
        "classification",
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        {"labels": SPARSE_TARGETS},
    ),
    "numbers": (
        "classification",
        {"num_labels": 3, "problem_type": "regression"},
        {"labels": SPARSE_TARGETS.clamp(min=0)},
    ),
    "depth, silog, zeros": ("depth", {"depth_loss": "silog"}, {"labels": sparse_depths(0.0)}),
    "depth, l1, -100": ("depth", {"depth_loss": "l1"}, {"labels": sparse_depths(-100.0)}),
    "depth, gradients, NaN": (
        "depth",
        {"depth_loss": "l2", "depth_gradient_weight": 0.5, "max_depth": 2.0},
        {"labels": sparse_depths(float("nan"))},
    ),
    "masks": ("masked", {}, {"bool_masked_pos": uneven_masks()}),
}


QUIET = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}


def trained(step: str, folder, batch: int, accumulated: int) -> tuple[torch.Tensor, float]:
    """All weights, and the loss that was logged, after one step of SGD by a stock Trainer."""
    name, fields, columns = STEPS[step]
    torch.manual_seed(0)
    model = CLASSES[name].model_class(vision_config(**SHALLOW, **fields))
    arguments = TrainingArguments(
        str(folder / f"{step}-{batch}"),
        max_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulated,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
        logging_steps=1,
        **QUIET,
    )
    columns = {"pixel_values": pixels(8), **columns}
    rows = [{column: values[row] for column, values in columns.items()} for row in range(8)]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    (loss,) = (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), loss


@pytest.mark.parametrize("step", STEPS)
def test_a_step_in_batches_is_the_step_in_one(step, tmp_path):
    """1e-6: float32 sums in another order, of weights around 1."""
    (whole, loss), (parts, loss_of_parts) = (trained(step, tmp_path, *sizes) for sizes in ((8, 1), (2, 4)))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)
    assert loss_of_parts == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("step", [step for step, (*_, columns) in STEPS.items() if "labels" in columns])
def test_the_losses_of_batches_add_up_to_the_loss_of_one(step):
    name, fields, columns = STEPS[step]
    model = randomised(CLASSES[name].model_class(vision_config(**SHALLOW, **fields)))
    images, labels = pixels(8), columns["labels"]
    count = (labels != -100).sum()
    parts = [
        model(images[rows], labels=labels[rows], num_items_in_batch=count).loss
        for rows in (slice(0, 3), slice(3, 4), slice(4, 8))
    ]
    torch.testing.assert_close(sum(parts), model(images, labels=labels).loss, rtol=1e-5, atol=1e-6)


def test_a_stems_loss_counts_by_the_share_of_its_batch():
    model = stem_family.build("adaptive", "classification").train()
    images, labels = pixels(), torch.tensor([0, 4, 2])
    with torch.no_grad():
        torch.manual_seed(0)
        whole = model(images, labels=labels).loss
        torch.manual_seed(0)
        half = model(images, labels=labels, num_items_in_batch=6).loss
    torch.testing.assert_close(half, whole / 2)


def test_label_smoothing_and_a_loss_function_of_ones_own(tmp_path):
    """Trainer takes the labels away from the model and gives its outputs to the function."""
    rows = [{"pixel_values": p, "labels": label} for p, label in zip(pixels(8), SPARSE_CLASSES.tolist())]
    model = randomised(vit_embed.VitEmbedForImageClassification(vision_config(num_labels=3)))

    def eval_loss(trainer_options=None, **options) -> float:
        arguments = TrainingArguments(str(tmp_path), **QUIET, **options)
        return Trainer(model, arguments, eval_dataset=rows, **(trainer_options or {})).evaluate()["eval_loss"]

    def count_rows(outputs, labels, num_items_in_batch=None):
        assert labels is not None and outputs["logits"].shape == (8, 3)
        return outputs["logits"].sum() * 0 + 7.0

    logits, known = model(pixels(8)).logits, SPARSE_CLASSES != -100
    expected = nn.functional.cross_entropy(logits[known], SPARSE_CLASSES[known], label_smoothing=0.1)
    assert eval_loss(label_smoothing_factor=0.1) == pytest.approx(expected.item(), rel=1e-5)
    assert eval_loss({"compute_loss_func": count_rows}) == 7.0


def test_labels_under_another_name(tmp_path):
    """`label_names` gives the columns of a metric; depth has none but its own."""
    model = randomised(vit_embed.VitEmbedForDepthEstimation(vision_config()))
    rows = Dataset.from_dict({"pixel_values": pixels(4).tolist(), "labels": sparse_depths(0.0)[:4].tolist()})
    arguments = TrainingArguments(str(tmp_path), label_names=["labels"], **QUIET)
    seen = []
    metrics = lambda prediction: {"seen": seen.append(prediction.label_ids.shape) or 1.0}  # noqa: E731
    assert Trainer(model, arguments, eval_dataset=rows, compute_metrics=metrics).evaluate()["eval_seen"] == 1.0
    assert seen == [(4, 32, 32)]


# --- 7: parts on different devices ---


@pytest.mark.parametrize("name", DUAL)
@torch.no_grad()
def test_towers_on_different_devices_meet_on_the_images(name):
    """The other device is one without values, which refuses to meet a CPU tensor as any other device does."""
    model = CLASSES[name].model()
    model.vision_model.to("meta")
    model.visual_projection.to("meta")
    output = model(pixels().to("meta"), tokens(), group_ids=torch.tensor([0, 1, 0]))
    assert output.logits_per_image.shape == (3, 3)
    assert {output.loss.device.type, output.logits_per_image.device.type} == {"meta"}
    assert output.text_embeds.device.type == model.logit_scale.device.type == "cpu"


@pytest.mark.parametrize("offloaded", ["vision_model.embeddings", "vision_model", "text_model"])
@torch.no_grad()
def test_another_image_size_with_offload_is_right_or_refused_at_load(offloaded, tmp_path):
    CLASSES["contrastive"].model().save_pretrained(tmp_path)
    load = vit_embed.VitEmbedForContrastive.from_pretrained
    expected = load(tmp_path, image_size=64).eval()
    device_map = dict.fromkeys([name for name, _ in expected.named_children()] + ["logit_scale"], "cpu")
    if offloaded == "vision_model.embeddings":
        del device_map["vision_model"]
        device_map.update({f"vision_model.{name}": "cpu" for name, _ in expected.vision_model.named_children()})
    device_map[offloaded] = "disk"
    options = {"image_size": 64, "device_map": device_map, "offload_folder": str(tmp_path / "offload")}
    if offloaded == "text_model":
        found, wanted = (
            each(pixels(2, 64, 64), tokens(2)).logits_per_image for each in (load(tmp_path, **options).eval(), expected)
        )
        torch.testing.assert_close(found, wanted)
        return
    with pytest.raises(ValueError, match="image_size=64.*position table.*offloaded; save it at this size first"):
        load(tmp_path, **options)


# --- 9: the host does not wait ---


class MadeOfNumbers(TorchFunctionMode):
    """Adds the calls that make a tensor of Python numbers on the meta device, where another device has them sent."""

    def __init__(self, calls: list[str]):
        super().__init__()
        self.calls = calls

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor) and output.is_meta and not isinstance(args[0], torch.Tensor):
            self.calls.append(function.__name__)
        return output


class Sent(TorchDispatchMode):
    """Collects the operations that take a tensor of the host to the meta device. A number that torch has made a tensor
    of stays with the host, unless it is copied."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __enter__(self):
        self.made = MadeOfNumbers(self.operations)
        self.made.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.made.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        made = [each for each in tree_leaves(output) if isinstance(each, torch.Tensor)]
        from_host = any(each.device.type == "cpu" and (each.dim() or "copy" in str(function)) for each in given)
        if from_host and any(each.is_meta for each in (*given, *made)):
            self.operations.append(str(function))
        return output


# An adaptive stem reads how many tokens its gate keeps, see `keep_tokens`.
@pytest.mark.parametrize("name", [name for name in GRAPHS if name != "stem adaptive"])
def test_a_training_step_reads_nothing_from_the_device(name):
    """The meta device has nothing to read: whoever asks for a value gets an error. Sending waits as well: all that is
    sent are the constants of a stem, the first time."""
    case = GRAPHS[name]
    model = case.model().train().to("meta")
    inputs = {key: value.to("meta") for key, value in case.training_inputs().items()}
    inputs.pop("bool_masked_pos", None)  # how many patches a given mask leaves is read, once
    for is_first in (True, False):
        with Sent() as sent:
            output = model.train()(**inputs)
            if case.labels:
                output.loss.backward()
            with torch.no_grad():
                model.eval()(**inputs)
        assert sent.operations == [] or (is_first and ("dct" in name or "wavelet" in name)), sent.operations


@pytest.fixture
def accelerator(monkeypatch):
    """CPU tensors count as those of a device that is slow to answer."""
    monkeypatch.setattr(vit_embed.inputs_vit_embed, "HOST_DEVICES", ())


WRONG_VALUES = {
    "id": ("contrastive", {"input_ids": torch.full((3, 16), 150)}, "input_ids must be in"),
    "negative id": ("contrastive", {"input_ids": torch.full((3, 16), -1)}, r"\[0, vocab_size=100\), got -1"),
    "end": ("contrastive", {"input_ids": torch.full((3, 16), 5)}, "needs its end-of-text token"),
    "left": (
        "contrastive",
        {"attention_mask": torch.cat([torch.zeros(3, 2), torch.ones(3, 14)], dim=1).long()},
        "pad on the right.*padding_side='right'",
    ),
    "class": ("classification", {"labels": torch.tensor([0, 1, 9])}, "labels must be in"),
    "negative class": ("classification", {"labels": torch.tensor([0, 1, -1])}, r"\[0, num_labels=5\), got -1"),
}


def wrong_inputs(wrong: str) -> tuple[nn.Module, dict, dict, str]:
    """A model, inputs for it, the same with a wrong value, and the message."""
    name, inputs, message = WRONG_VALUES[wrong]
    right = CLASSES[name].training_inputs()
    return CLASSES[name].model(), right, {**right, **inputs}, message


@pytest.mark.parametrize("wrong", WRONG_VALUES)
def test_values_are_checked_every_time_on_a_cpu(wrong):
    model, right, inputs, message = wrong_inputs(wrong)
    model(**right)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            model(**inputs)
    model.set_input_checks("never")
    if wrong in ("end", "left"):  # the others are errors of torch
        model(**inputs)


@pytest.mark.parametrize("wrong", ["end", "left"])
def test_values_are_checked_the_first_time_on_other_devices(accelerator, wrong):
    model, right, inputs, message = wrong_inputs(wrong)
    with pytest.raises(ValueError, match=message):
        model(**inputs)
    model(**right)
    model(**inputs)  # not looked at any more
    model.set_input_checks("always")
    with pytest.raises(ValueError, match=message):
        model(**inputs)
    with pytest.raises(ValueError, match="'auto', 'always' or 'never', got 'sometimes'"):
        model.set_input_checks("sometimes")


def test_a_text_is_trimmed_where_looking_is_free(accelerator):
    """Elsewhere its length would have to be waited for."""
    model = CLASSES["contrastive"].model()
    ids = tokens()
    lengths = []
    model.text_model.embeddings.register_forward_hook(lambda module, inputs, output: lengths.append(output.shape[1]))
    model.get_text_features(ids)
    assert lengths == [16]


# --- 10: what was not asked for is not kept ---


def most_alive(layers, run) -> int:
    """Most outputs of the layers whose memory is held at once while run() goes through them."""
    held, alive = [], []

    def count(module, inputs, output):
        held.append(StorageWeakRef(output[0].untyped_storage()))
        alive.append(sum(not each.expired() for each in held))

    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    assert len(held) == len(layers)
    return max(alive)


@pytest.mark.parametrize("name", CLASSES)
def test_layers_outputs_that_nobody_asked_for_are_let_go(name):
    case = CLASSES[name]
    config = case.config()
    config.num_hidden_layers = 12
    if config.model_type == "vit_embed":
        config.out_features = ["stage3", "stage12"]
    model = randomised(case.model_class(config))
    trunk = getattr(model, "vision_model", getattr(model, "text_model", model))
    kept = {"depth, dpt": 4, "backbone": 2}.get(name, 1)  # what the head reads
    assert most_alive(trunk.encoder.layers, lambda: model(**case.inputs())) <= kept + 1
    assert most_alive(trunk.encoder.layers, lambda: model(**case.inputs(), output_hidden_states=True)) == 12


@pytest.mark.parametrize("stem", ["dct", "wavelet"])
def test_a_spectral_basis_is_made_once_a_dtype_and_device(stem, monkeypatch):
    made = Counter()
    build = stem_layers_vit_embed.spectral_basis
    monkeypatch.setattr(stem_layers_vit_embed, "_BASES", {})
    monkeypatch.setattr(stem_layers_vit_embed, "spectral_basis", lambda *key: made.update([key[3]]) or build(*key))
    model = randomised(vit_embed.VitEmbedModel(vision_config(stem_type=stem)))
    with torch.inference_mode():
        model(pixels())
    model(pixels()).pooler_output.sum().backward()  # a basis made in inference mode could not be saved for this
    model.double()(pixels().double())
    vit_embed.VitEmbedModel(vision_config(stem_type=stem))(pixels())
    assert made == {torch.float32: 1, torch.float64: 1}
    assert not [key for key in model.state_dict() if "basis" in key]


@torch.no_grad()
def test_a_spectral_stem_computes_little_more_than_a_linear_one():
    def operations(stem: str) -> int:
        model = randomised(vit_embed.VitEmbedModel(vision_config(stem_type=stem)))
        model(pixels())
        with torch.autograd.profiler.profile() as seen:
            model(pixels(seed=4))
        return sum(event.cpu_parent is None for event in seen.function_events)

    for stem in ("dct", "wavelet"):
        assert operations(stem) - operations("linear") <= 8


# --- 11: frozen is frozen ---

WITH_BATCH_NORM = ["hybrid", "hierarchical, batch norm"]


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("order", ["frozen, then training", "training, then frozen"])
@pytest.mark.parametrize("stem", WITH_BATCH_NORM)
def test_statistics_of_a_frozen_stem_do_not_move(stem, order):
    model = stem_family.build(stem, "classification")
    steps = [lambda: model.vision_model.requires_grad_(False), model.train]
    for step in steps if order == "frozen, then training" else reversed(steps):
        step()
    before = statistics(model)
    assert len(before) >= 6
    in_training = model(pixels(), labels=torch.tensor([0, 4, 2]))
    in_training.loss.backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    torch.testing.assert_close(in_training.logits, model.eval()(pixels()).logits)


@pytest.mark.parametrize("stem", WITH_BATCH_NORM)
def test_statistics_of_a_stem_that_learns_do_move(stem):
    model = stem_family.build(stem, "classification").train()
    before = statistics(model)
    model(pixels())
    assert all(not torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


# --- inputs ---


def test_dual_encoders_take_what_clip_takes():
    ids = tokens()
    model = randomised(vit_embed.VitEmbedForContrastive(dual_config()))
    with torch.no_grad():
        plain = model(pixels(), ids, interpolate_pos_encoding=True)
        counted_from_0 = model(pixels(), ids, position_ids=torch.arange(16)[None])
        shifted = model(pixels(), ids, position_ids=(torch.arange(16)[None] + 1) % 16)
    assert torch.equal(plain.logits_per_image, counted_from_0.logits_per_image)
    assert not torch.allclose(plain.text_embeds, shifted.text_embeds, atol=1e-3)
