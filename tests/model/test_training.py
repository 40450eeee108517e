"""Fine-tuning as users do it: stock Trainer, checkpointing, adapters, several processes; and labels with holes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import pictures
import pytest
import tiny
import torch
from catalogue import CLASSES, GRAPHS, WITH_LOSS
from datasets import Dataset
from fresh_process import run_fresh
from tiny import assert_same_gradients
from tiny_tokenizer import write_tokenizer
from transformers import AutoImageProcessor, AutoProcessor, PreTrainedModel, Trainer, TrainingArguments

from vit_embed import VitEmbedForContrastive, VitEmbedForDepthEstimation, VitEmbedForImageClassification
from vit_embed.contrastive_vit_embed import CONTRASTIVE_LOSSES, PairRows
from vit_embed.depth_vit_embed import gradient_matching_loss

EXAMPLES, BATCH = 10, 4  # the last batch has 2
STEPS = 10


def labelled(folder: Path, rows: list[tuple[Any, Any]]) -> Dataset:
    """Images with a label each, as the model takes them."""
    images, labels = zip(*rows)
    processor = AutoImageProcessor.from_pretrained(folder)
    columns = {"pixel_values": processor(list(images))["pixel_values"], "labels": labels}
    return Dataset.from_dict(columns).with_format("torch")


def classified_crops(folder: Path) -> Dataset:
    """Crops of three photos; the label is the photo."""
    photos = enumerate(("astronaut", "coffee", "flower"))
    return labelled(folder, [(crop, label) for label, name in photos for crop in pictures.crops(name, 4)][:EXAMPLES])


def captioned_photos(folder: Path) -> Dataset:
    """Ten photos, each with what it shows."""
    # transformers 5 reads config.json for the tokenizer too, so it asks whether the code in the folder is trusted.
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    photos, texts = [pictures.photo(name) for name in pictures.CAPTIONS], list(pictures.CAPTIONS.values())
    return Dataset.from_dict(processor(text=texts, images=photos, padding="max_length")).with_format("torch")


def measured_crops(folder: Path) -> Dataset:
    """Crops of the motorcycle; the label is the measured depth in metres, NaN where there is none."""
    return labelled(folder, pictures.depth_crops(EXAMPLES))


class Head(NamedTuple):
    """A class to fine-tune, its Auto class, and examples of its task."""

    model_class: type[PreTrainedModel]
    auto_class: str
    settings: dict
    make_dataset: Callable[[Path], Dataset]


HEADS = {
    "classification": Head(
        VitEmbedForImageClassification, "AutoModelForImageClassification", {"num_labels": 3}, classified_crops
    ),
    "contrastive": Head(
        VitEmbedForContrastive, "AutoModelForZeroShotImageClassification", {"text_config": tiny.TEXT}, captioned_photos
    ),
    "depth": Head(VitEmbedForDepthEstimation, "AutoModelForDepthEstimation", {"max_depth": 10.0}, measured_crops),
}


class Run(NamedTuple):
    """A finished fine-tuning: metrics before and after, and where the checkpoints lie."""

    head: Head
    output: Path
    trainer: Trainer
    dataset: Dataset
    before: dict[str, float]
    after: dict[str, float]


def make_trainer(model: PreTrainedModel, dataset: Dataset, output: Path, **options) -> Trainer:
    settings = {
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "max_steps": STEPS,
        "save_steps": STEPS,
        "learning_rate": 2e-3,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,  # two runs are compared, which other devices do not add up in the same order
        **options,
    }
    arguments = TrainingArguments(output_dir=str(output), **settings)
    return Trainer(model=model, args=arguments, train_dataset=dataset, eval_dataset=dataset)


def fine_tune(head: Head, base: Path, output: Path) -> Run:
    """A checkpoint folder, loaded, evaluated, fine-tuned with stock Trainer, and evaluated again."""
    torch.manual_seed(0)
    if "text_config" in head.settings:
        write_tokenizer(base)
    head.model_class(tiny.vision_config(**head.settings)).save_pretrained(base)
    dataset = head.make_dataset(base)
    trainer = make_trainer(head.model_class.from_pretrained(base), dataset, output)
    before = trainer.evaluate()
    trainer.train()
    return Run(head, output, trainer, dataset, before, trainer.evaluate())


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: fine_tune(head, folder / name / "base", folder / name / "output") for name, head in HEADS.items()}


@pytest.fixture(params=HEADS)
def run(request, runs) -> Run:
    return runs[request.param]


def test_trainer_lowers_the_loss_and_reports_it_with_no_extra_arguments(run):
    # A depth head starts flat, so with no more than the scene's own spread as its loss.
    assert run.after["eval_loss"] < (0.9 if "max_depth" in run.head.settings else 0.8) * run.before["eval_loss"]
    logged = [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]
    assert len(logged) == STEPS and np.isfinite(logged).all()
    # Trainer weighs each batch, the odd last one too, by its size.
    with torch.no_grad():
        batches = [run.dataset[start : start + BATCH] for start in range(0, EXAMPLES, BATCH)]
        sums = [run.trainer.model.eval()(**batch).loss * len(batch["pixel_values"]) for batch in batches]
    assert run.after["eval_loss"] == pytest.approx(float(sum(sums)) / EXAMPLES, rel=1e-5)  # float32 sums


def test_trainer_predicts_rows_and_never_gathers_logits_of_a_batch(run):
    predictions = run.trainer.predict(run.dataset).predictions
    with torch.no_grad():
        outputs = run.trainer.model.eval()(**run.dataset[:])
    if run.head.model_class is VitEmbedForContrastive:
        expected = (outputs.image_embeds, outputs.text_embeds)
        assert len(predictions) == len(expected)
    else:
        expected = (outputs[1],)
        predictions = (predictions,)
    for found, wanted in zip(predictions, expected):
        assert len(found) == EXAMPLES
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-5)  # another batch size


def ask_checkpoints(picture: str, checkpoints: dict[str, str]) -> dict[str, tuple[dict[str, list], list]]:
    """Inputs from the processor and first output of the model of each folder, by the Auto class that loads it."""
    import torch
    import transformers
    from PIL import Image

    image, answers = Image.open(picture), {}
    for auto_class, checkpoint in checkpoints.items():
        model = getattr(transformers, auto_class).from_pretrained(checkpoint, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
        if auto_class == "AutoModelForZeroShotImageClassification":
            processor = transformers.AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
            inputs = processor(text=["a cat", "a rocket"], images=image, padding=True, return_tensors="pt")
        else:
            inputs = transformers.AutoImageProcessor.from_pretrained(checkpoint)(image, return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs)[0]
        answers[auto_class] = {name: values.tolist() for name, values in inputs.items()}, output.tolist()
    return answers


@pytest.fixture(scope="module")
def answers_elsewhere(runs, tmp_path_factory) -> dict[str, tuple[dict[str, list], list]]:
    """Of every run's last checkpoint, from a process that has nothing but the folders."""
    folder = tmp_path_factory.mktemp("elsewhere")
    pictures.photo("chelsea").save(folder / "cat.png")
    checkpoints = {run.head.auto_class: str(run.output / f"checkpoint-{STEPS}") for run in runs.values()}
    return run_fresh(ask_checkpoints, folder / "home", picture=str(folder / "cat.png"), checkpoints=checkpoints)


def test_a_checkpoint_folder_loads_by_itself_in_a_fresh_process(run, answers_elsewhere):
    inputs, output = answers_elsewhere[run.head.auto_class]
    inputs = {name: torch.tensor(values) for name, values in inputs.items()}
    with torch.no_grad():
        expected = run.trainer.model.eval()(**inputs)[0]
    torch.testing.assert_close(torch.tensor(output), expected, rtol=0, atol=1e-6)  # the same weights and arithmetic
    height, width = run.trainer.model.config.image_shape
    assert inputs["pixel_values"].shape == (1, 3, height, width)


def dual_inputs() -> dict[str, torch.Tensor]:
    return {"pixel_values": tiny.pixels(), "input_ids": tiny.tokens()}


@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("name", [*CLASSES, "stem hybrid", "stem adaptive", "stem token_learner"])
def test_gradient_checkpointing_changes_no_gradient(name, use_reentrant):
    model, inputs = GRAPHS[name].model().train(), GRAPHS[name].training_inputs()

    def gradients() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)  # the same random choices
        return tiny.gradients(model, inputs)

    expected, calls = gradients(), []
    layer = next(module for module in model.modules() if type(module).__name__ == "VitEmbedLayer")
    layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable(None if use_reentrant is None else {"use_reentrant": use_reentrant})
    assert model.is_gradient_checkpointing
    found = gradients()
    assert len(calls) == 2, "once forward and once more for the gradients"
    assert_same_gradients(found, expected)
    model.gradient_checkpointing_disable()
    assert gradients().keys() == expected.keys() and len(calls) == 3


@pytest.mark.parametrize("use_reentrant", [None, True])
@pytest.mark.parametrize("name", CLASSES)
def test_adapters_on_a_frozen_trunk_learn_under_gradient_checkpointing(name, use_reentrant):
    """The reentrant checkpoint needs an input that requires a gradient; the default one must not."""
    inputs = CLASSES[name].training_inputs()

    def adapted(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = CLASSES[name].model()
        torch.manual_seed(0)
        settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        with_adapters = peft.get_peft_model(model, settings)
        if checkpointing:
            model.gradient_checkpointing_enable(None if use_reentrant is None else {"use_reentrant": use_reentrant})
            if use_reentrant:
                model.enable_input_require_grads()
        return tiny.gradients(with_adapters.train(), inputs)

    expected, found = adapted(False), adapted(True)
    layers = [key for key in expected if ".layers." in key]
    of_model = [key for key in CLASSES[name].model().state_dict() if key.endswith(("q_proj.weight", "v_proj.weight"))]
    assert len(layers) == 2 * len([key for key in of_model if ".layers." in key]), "A and B of each"
    assert all(expected[key].abs().max() > 0 for key in layers)
    assert_same_gradients(found, expected)


def test_input_gradients_can_be_switched_on_and_off():
    model = VitEmbedForContrastive(tiny.dual_config()).requires_grad_(False)
    model.enable_input_require_grads()
    assert model(**dual_inputs()).loss.requires_grad
    model.disable_input_require_grads()
    assert not model(**dual_inputs()).loss.requires_grad
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("name", WITH_LOSS)
def test_a_step_under_bfloat16_autocast_is_finite_and_learns(name):
    model, inputs = CLASSES[name].model_class(CLASSES[name].config()).train(), CLASSES[name].training_inputs()
    exact = float(model(**inputs).loss.detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs).loss
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(exact, rel=0.05)  # bfloat16 has 8 bits, through some layers
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(**inputs).loss.isfinite()


EVERY_LOSS = pytest.mark.parametrize("settings", [{}, {"hard_negative_beta": 0.5}, {"contrastive_loss": "sigmoid"}])


@EVERY_LOSS
def test_group_ids_keep_pairs_of_one_group_from_being_negatives(settings):
    model = tiny.randomised(VitEmbedForContrastive(tiny.dual_config(**settings)))
    with torch.no_grad():
        plain, distinct, grouped = (
            model(**dual_inputs(), group_ids=ids) for ids in (None, torch.arange(3), torch.tensor([4, 9, 4]))
        )
    assert torch.equal(plain.loss, distinct.loss)
    ignored = torch.tensor([[False, False, True], [False, False, False], [True, False, False]])
    loss = CONTRASTIVE_LOSSES[model.config.contrastive_loss]
    options = {"hard_negative_beta": 0.5} if "hard_negative_beta" in settings else {}
    rows = PairRows.whole(plain.logits_per_image, ignored)
    torch.testing.assert_close(grouped.loss, loss(rows, **options) / 3)
    assert grouped.loss < plain.loss
    assert torch.equal(grouped.logits_per_image, plain.logits_per_image), "the loss alone knows of groups"


@pytest.mark.parametrize(
    "group_ids", [torch.arange(2), torch.arange(3)[:, None], torch.arange(3).int(), torch.arange(3.0)]
)
def test_group_ids_of_another_shape_or_type_are_refused(group_ids):
    with pytest.raises(ValueError, match=r"group_ids must be \(batch=3,\) of torch.int64, one number a pair; got \("):
        VitEmbedForContrastive(tiny.dual_config())(**dual_inputs(), group_ids=group_ids)


# --- depth labels ---


def silog(predicted: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
    error = predicted.log() - depth.log()
    return error.var(unbiased=False) + 0.5 * error.mean().square()


PLAIN_DEPTH_LOSSES = {
    "silog": silog,
    "l1": lambda predicted, depth: (predicted - depth).abs().mean(),
    "l2": lambda predicted, depth: (predicted - depth).square().mean(),
}


@pytest.mark.parametrize("loss_name", PLAIN_DEPTH_LOSSES)
def test_holes_in_depth_labels_count_neither_in_the_loss_nor_in_the_gradients(loss_name):
    model = VitEmbedForDepthEstimation(tiny.vision_config(depth_loss=loss_name))
    labels = torch.rand(3, 32, 32) + 0.5
    holes = torch.rand(labels.shape) < 0.4
    labels[holes] = torch.tensor([0.0, -1.0, torch.nan, torch.inf, -torch.inf])[torch.arange(int(holes.sum())) % 5]

    def by_hand() -> torch.Tensor:
        predicted = model(tiny.pixels()).predicted_depth
        return sum(PLAIN_DEPTH_LOSSES[loss_name](p[~h], d[~h]) for p, d, h in zip(predicted, labels, holes)) / 3

    loss = model(tiny.pixels(), labels=labels).loss
    torch.testing.assert_close(loss, by_hand(), rtol=1e-5, atol=1e-6)  # float32 sums over 1800 pixels
    found = tiny.gradients(model, {"pixel_values": tiny.pixels(), "labels": labels})
    assert_same_gradients(found, tiny.gradients_of(model, by_hand))


@pytest.mark.parametrize("loss_name", PLAIN_DEPTH_LOSSES)
def test_gradient_matching_is_added_to_the_depth_loss_with_its_weight(loss_name):
    labels = torch.rand(3, 20, 24) + 0.5
    labels[torch.rand(labels.shape) < 0.3] = torch.nan
    model = VitEmbedForDepthEstimation(tiny.vision_config(depth_loss=loss_name))
    plain = model(tiny.pixels(), labels=labels)
    model.config.depth_gradient_weight = 0.5
    both = model(tiny.pixels(), labels=labels)
    resized = torch.nn.functional.interpolate(plain.predicted_depth[:, None], (20, 24), mode="bilinear")[:, 0]
    matching = gradient_matching_loss(resized, labels, labels > 0).mean()
    torch.testing.assert_close(both.loss, plain.loss + 0.5 * matching)
    assert both.loss > 1.01 * plain.loss
