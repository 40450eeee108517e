"""recipes/trainer.py, models.py and arguments.py: what all recipes do beside the stock Trainer."""

import multiprocessing
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from training_runs import flags, results
from transformers import ResNetConfig, TrainerCallback, TrainingArguments, default_data_collator

from recipes.arguments import ModelArguments, RecipeArguments, parse
from recipes.drawing import save_figure
from recipes.models import frozen_modules, load_model, prepare
from recipes.trainer import RecipeTrainer, checkpoint_to_resume, last_complete_checkpoint, run
from vit_embed import (
    VitEmbedForContrastive,
    VitEmbedForDepthEstimation,
    VitEmbedForImageClassification,
    VitEmbedForMaskedImageModeling,
)

DECAY = 0.5


def hybrid_config():
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    backbone.out_features = ["stage2"]
    return tiny.vision_config(stem_type="hybrid", backbone_config=backbone.to_dict(), num_labels=3)


def lora(model: torch.nn.Module) -> torch.nn.Module:
    targets = ["q_proj", "v_proj", "fc1"]
    return get_peft_model(model, LoraConfig(r=2, target_modules=targets, modules_to_save=["classifier"]))


MODELS = {
    "two towers": lambda: VitEmbedForContrastive(tiny.dual_config()),
    "hybrid": lambda: VitEmbedForImageClassification(hybrid_config()),
    "masked": lambda: VitEmbedForMaskedImageModeling(tiny.vision_config()),
    "depth": lambda: VitEmbedForDepthEstimation(tiny.vision_config()),
    "lora": lambda: lora(VitEmbedForImageClassification(tiny.vision_config(num_labels=3))),
    "rms norm": lambda: VitEmbedForImageClassification(tiny.vision_config(norm_type="rms_norm", num_labels=3)),
}
LAYERS = {"vision_model": 4, "text_model": 3}  # of tests/support/tiny.py


def trainer_of(model: torch.nn.Module, folder: Path, recipe: RecipeArguments | None = None, **options) -> RecipeTrainer:
    of_trainer = ("train_dataset", "eval_dataset", "draw", "callbacks", "compute_metrics")
    kwargs = {name: options.pop(name) for name in of_trainer if name in options}
    defaults = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": "none"}
    quiet = {"use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False}
    arguments = TrainingArguments(output_dir=str(folder), **{**defaults, **quiet, **options})
    return RecipeTrainer(recipe or RecipeArguments(), model=model, args=arguments, **kwargs)


def labelled_pixels(count: int = 8) -> list[dict]:
    return [{"pixel_values": pixels, "labels": row % 3} for row, pixels in enumerate(tiny.pixels(count))]


# --- learning rates and weight decay ---


def expected_scale(name: str) -> float:
    """The learning rate that the formula gives a parameter, by the name it has in the model itself."""
    tower = name.split(".")[0]
    if tower not in LAYERS:
        return 1.0
    if ".embeddings." in name or ".pre_layrnorm." in name:
        return DECAY ** (LAYERS[tower] + 1)
    if name.startswith(f"{tower}.encoder.layers."):
        return DECAY ** (LAYERS[tower] - int(name.split(".")[3]))
    return 1.0


@pytest.mark.parametrize(
    ("model", "optim"), [*((model, "adamw_torch") for model in MODELS), ("two towers", "adafactor")]
)
def test_learning_rate_of_every_parameter(model, optim, tmp_path):
    module, recipe = MODELS[model](), RecipeArguments(layer_decay=DECAY)
    trainer = trainer_of(module, tmp_path, recipe, learning_rate=0.1, weight_decay=0.3, optim=optim)
    optimizer = trainer.create_optimizer()
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert len(group_of) == len(trained) == sum(len(group["params"]) for group in optimizer.param_groups)
    scales = set()
    for name, parameter in trained.items():
        own = name.replace("base_model.model.", "")
        group = group_of[id(parameter)]
        assert group["lr"] == pytest.approx(0.1 * expected_scale(own)), name
        if "norm" in own or own.endswith("bias") or own == "logit_scale":
            assert group["weight_decay"] == 0, name
        elif own.endswith(".weight") and parameter.dim() == 2:
            assert group["weight_decay"] == 0.3, name
        scales.add(round(expected_scale(own), 6))
    assert len(scales) >= 5, "the rates differ from layer to layer"
    rates = [group["lr"] for group in optimizer.param_groups]
    trainer.create_scheduler(10, optimizer)
    optimizer.step()
    trainer.lr_scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.9 * rate for rate in rates])


def test_without_decay_all_parameters_have_one_rate(tmp_path):
    optimizer = trainer_of(MODELS["two towers"](), tmp_path, learning_rate=0.1).create_optimizer()
    assert {group["lr"] for group in optimizer.param_groups} == {0.1} and len(optimizer.param_groups) == 2


# --- freezing and patch dropping ---


def test_frozen_parameters_and_statistics_stay_bit_equal(tmp_path):
    """A ResNet in the stem has batch statistics, which training mode would move."""
    model = MODELS["hybrid"]()
    prepare(model, RecipeArguments(freeze=["vision_model.embeddings", "vision_model.encoder.layers.0"]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert any("running_mean" in name for name in before)
    trainer_of(model, tmp_path, learning_rate=0.1, train_dataset=labelled_pixels()).train()
    for name, tensor in model.state_dict().items():
        frozen = name.startswith(("vision_model.embeddings.", "vision_model.encoder.layers.0."))
        if frozen or name == "vision_model.encoder.layers.1.layer_norm2.weight":
            assert torch.equal(tensor, before[name]) == frozen, name


def test_freezing_by_prefix_ends_at_a_dot_and_works_through_peft():
    for wrapped in (lambda model: model, lora):
        model = wrapped(VitEmbedForImageClassification(tiny.vision_config(num_hidden_layers=11, num_labels=3)))
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        prepare(model, RecipeArguments(freeze=["vision_model.encoder.layers.1"]))
        frozen = trained - {name for name, p in model.named_parameters() if p.requires_grad}
        assert {re.search(r"layers[.](\d+)", name)[1] for name in frozen} == {"1"}


@pytest.mark.parametrize(
    ("model", "recipe", "message"),
    [
        ("rms norm", {"freeze": ["vision_modle.embeddings"]}, "near are vision_model.embeddings"),
        ("rms norm", {"freeze": ["vision_model.embed"]}, "near are vision_model.embeddings"),
        ("rms norm", {"freeze": ["vision_model", "classifier"]}, "leaves none"),
        ("depth", {"patch_drop_rate": 0.5}, "depth needs every patch"),
        ("rms norm", {"patch_drop_rate": 1.5}, "patch_drop_rate"),
        ("rms norm", {"patch_drop_rate": 0.5, "freeze": ["vision_model"]}, "is frozen"),
    ],
)
def test_freezing_and_dropping_refuse(model, recipe, message):
    with pytest.raises(ValueError, match=message):
        prepare(MODELS[model](), RecipeArguments(**recipe))


def test_patch_drop_rate_reaches_the_trunk():
    model = VitEmbedForImageClassification(tiny.vision_config(num_labels=3))
    prepare(model, RecipeArguments(patch_drop_rate=0.5, freeze=["vision_model.embeddings"]))
    seen = []
    model.vision_model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    model.train()
    for module in frozen_modules(model):
        module.eval()
    model(tiny.pixels(2))
    model.eval()(tiny.pixels(2))
    assert seen == [1 + 8, 1 + 16], "half of 4 x 4 patches in training, all in evaluation"
    assert model.config.patch_drop_rate == 0.5


def test_channels_last_computes_and_saves_the_same(tmp_path):
    model, pixels = MODELS["hybrid"]().eval(), tiny.pixels()
    expected = model(pixels).logits
    prepare(model, RecipeArguments(channels_last=True))
    kernel = next(parameter for parameter in model.parameters() if parameter.dim() == 4 and parameter.shape[2] > 1)
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(pixels).logits, expected, rtol=1e-4, atol=1e-5)
    trainer = trainer_of(model, tmp_path, RecipeArguments(channels_last=True), train_dataset=labelled_pixels())
    trainer.train()
    trainer.save_model()
    saved = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


# --- models ---


def test_a_model_starts_from_a_checkpoint_or_a_config(tmp_path):
    """In float32, whatever is stored; a head of another size is an error unless the recipe asks for a new one."""
    VitEmbedForImageClassification(tiny.vision_config(num_labels=3)).half().save_pretrained(tmp_path)
    named = {"model_name_or_path": str(tmp_path), "config_name": str(tmp_path)}
    for source, folder in named.items():
        model = load_model(VitEmbedForImageClassification, ModelArguments(**{source: folder}), drop_path_rate=0.5)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert model.config.drop_path_rate == 0.5 and model.config.num_labels == 3
    checkpoint = ModelArguments(model_name_or_path=str(tmp_path))
    assert load_model(VitEmbedForImageClassification, checkpoint, any_head=True, num_labels=7).config.num_labels == 7
    with pytest.raises(RuntimeError, match="(?i)mismatch"):
        load_model(VitEmbedForImageClassification, checkpoint, num_labels=7)
    for given, what in ((named, "both"), ({}, "neither")):
        with pytest.raises(ValueError, match=f"expected one of --model_name_or_path and --config_name, got {what}"):
            load_model(VitEmbedForImageClassification, ModelArguments(**given))


# --- the command line ---


@pytest.fixture
def parse_with(monkeypatch, tmp_path):
    """Parses options of a run into a folder that is not empty."""
    (tmp_path / "left").write_text("")

    def parse_options(**options) -> tuple:
        given = {"use_cpu": True, "output_dir": tmp_path, "report_to": "none", **options}
        monkeypatch.setattr("sys.argv", ["x", *flags(**given)])
        return parse()

    return parse_options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_decay": 0.0}, "--layer_decay"),
        ({"layer_decay": 1.5}, "--layer_decay"),
        ({"early_stopping_patience": 0}, "--early_stopping_patience of at least 1"),
        ({}, "nothing to do: give --do_train, --do_eval, --do_predict, or --check_only"),
        (
            {"early_stopping_patience": 2, "do_eval": True},
            "set --eval_strategy.*--metric_for_best_model.*--load_best_model_at_end",
        ),
        ({"do_train": True}, "to be empty.*--resume_from_checkpoint True"),
    ],
)
def test_the_command_line_refuses_at_once(options, message, parse_with):
    with pytest.raises(ValueError, match=message):
        parse_with(**options)


def test_options_are_read_and_the_best_of_errors_is_the_least(parse_with):
    recipe, training = parse_with(do_train=True, resume_from_checkpoint=True, freeze=["a", "b"])
    assert recipe.freeze == ["a", "b"] and not training.remove_unused_columns and training.save_total_limit == 2
    assert parse_with(do_eval=True, save_total_limit=5)[-1].save_total_limit == 5
    least, greatest = ("loss", "eval_median_scaled_abs_rel", "rmse"), ("delta1", "accuracy")
    for name in (*least, *greatest):
        assert parse_with(do_eval=True, metric_for_best_model=name)[-1].greater_is_better is (name in greatest)


@pytest.mark.parametrize(
    ("methods", "cores", "shared", "workers"),
    [
        (["fork", "spawn"], 2, 2**34, 1),
        (["fork", "spawn"], 1, 2**34, 0),
        (["forkserver", "fork"], 2, 2**34, 0),
        (["fork", "spawn"], 2, 2**26, 0),
    ],
)
def test_one_process_reads_ahead_where_it_is_cheap(methods, cores, shared, workers, parse_with, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=shared))
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: methods)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    assert parse_with(do_eval=True)[-1].dataloader_num_workers == workers
    assert parse_with(do_eval=True, dataloader_num_workers=3)[-1].dataloader_num_workers == 3


def test_an_unfinished_checkpoint_is_left_out(tmp_path, caplog):
    assert last_complete_checkpoint(str(tmp_path)) is None
    for step, text in ((5, '{"global_step": 5}'), (10, '{"global_step": 10}'), (15, '{"glob'), (20, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")
    assert "checkpoint-15 is unfinished" in caplog.text and "checkpoint-20 is unfinished" in caplog.text
    for asked, given in ((None, None), ("somewhere", "somewhere"), ("True", str(tmp_path / "checkpoint-10"))):
        arguments = TrainingArguments(str(tmp_path), resume_from_checkpoint=asked, report_to=[])
        assert checkpoint_to_resume(arguments) == given


# --- the trainer ---


def test_early_stop(tmp_path):
    """Nothing is learned at a rate of 0, so the second evaluation without a better one ends it."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 9}
    options |= {"learning_rate": 0.0, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    options |= {"train_dataset": labelled_pixels(), "eval_dataset": labelled_pixels(4)}
    trainer = trainer_of(MODELS["rms norm"](), tmp_path, RecipeArguments(early_stopping_patience=2), **options)
    trainer.train()
    assert trainer.state.global_step == 3


class Board(TrainerCallback):
    """Stands where TensorBoardCallback stands: there is a `tb_writer` from the first metrics to the end of training."""

    def __init__(self):
        self.tb_writer, self.images = None, []

    def on_log(self, *args, **kwargs):
        self.tb_writer = self

    def on_train_end(self, *args, **kwargs):
        self.tb_writer = None

    def flush(self):
        pass

    def add_image(self, name, pixels, step, dataformats):
        self.images.append((name, pixels.ndim, step, dataformats))


def test_every_evaluation_leaves_a_sheet_and_run_its_metrics(tmp_path):
    board, drawn = Board(), []

    def draw(output, path):
        drawn.append(path.name.split("-")[0])
        assert output.predictions.shape == (4, 3)
        figure = Figure(figsize=(1, 1))
        figure.suptitle("$5 a shirt #$1")  # no formula, whatever matplotlib takes it for
        save_figure(figure, path)

    trainer = trainer_of(
        MODELS["rms norm"](),
        tmp_path / "run",
        **{"train_dataset": labelled_pixels(), "eval_dataset": labelled_pixels(4), "draw": draw, "callbacks": [board]},
        **{"eval_strategy": "steps", "eval_steps": 1, "do_train": True, "do_eval": True, "do_predict": True},
    )
    trainer.compute_metrics = lambda prediction: {"kind": 1.0}
    run(trainer, test_dataset=labelled_pixels(4), test_metrics=lambda prediction: {"kind": 2.0})
    assert drawn == ["eval", "eval", "eval", "test"]
    names = sorted(path.name for path in (tmp_path / "run" / "pictures").iterdir())
    assert names == ["eval-000001.png", "eval-000002.png", "test-000002.png"]
    assert board.images[0] == ("pictures/eval", 3, 1, "HWC") and len(board.images) == 4
    assert results(tmp_path / "run", "eval")["kind"] == 1.0 and results(tmp_path / "run", "test")["kind"] == 2.0
    assert (tmp_path / "run" / "model.safetensors").exists() and (tmp_path / "run" / "train_results.json").exists()


def test_evaluation_reads_every_row_once_and_in_order(tmp_path):
    """Whatever training leaves out or sorts: 7 rows in batches of 4, by length."""
    rows = [{**row, "labels": number, "input_ids": [0] * (9 - number)} for number, row in enumerate(labelled_pixels(7))]
    seen = []
    model = VitEmbedForImageClassification(tiny.vision_config(num_labels=7))
    trainer = trainer_of(
        model,
        tmp_path,
        **{"eval_dataset": rows, "compute_metrics": lambda found: seen.append(found.label_ids.tolist()) or {}},
        **{"per_device_eval_batch_size": 4, "dataloader_drop_last": True, "train_sampling_strategy": "group_by_length"},
    )
    trainer.data_collator = lambda batch: default_data_collator([{**row, "input_ids": None} for row in batch])
    trainer.evaluate()
    trainer.predict(rows)
    assert seen == [list(range(7))] * 2
    assert trainer.args.dataloader_drop_last and trainer.args.train_sampling_strategy == "group_by_length"


def test_prediction_loss_only_leaves_metrics_and_pictures_out(tmp_path):
    """And is refused where a metric chooses the best."""
    asked = {"eval_dataset": labelled_pixels(4), "compute_metrics": lambda found: {"kind": 1.0}}
    asked |= {"draw": lambda output, path: path.write_text(""), "prediction_loss_only": True}
    metrics = trainer_of(MODELS["rms norm"](), tmp_path, **asked).evaluate()
    assert metrics["eval_loss"] > 0 and "eval_kind" not in metrics and not (tmp_path / "pictures").exists()
    with pytest.raises(ValueError, match="leaves out all metrics, got --metric_for_best_model kind"):
        trainer_of(MODELS["rms norm"](), tmp_path, metric_for_best_model="kind", **asked)


def test_label_smoothing_is_refused_where_there_are_no_class_numbers(tmp_path):
    """Trainer takes the labels away, and would smooth nothing or fail later."""
    for name in ("two towers", "masked"):
        with pytest.raises(ValueError, match="--label_smoothing_factor 0.1 smooths class numbers, of .* has none"):
            trainer_of(MODELS[name](), tmp_path, label_smoothing_factor=0.1)
    trainer_of(MODELS["lora"](), tmp_path, label_smoothing_factor=0.1)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_logit_scale_that_is_saved_is_the_one_that_was_computed_with(frozen, tmp_path):
    model = MODELS["two towers"]()
    with torch.no_grad():
        model.logit_scale.fill_(5.0)
    model.logit_scale.requires_grad_(not frozen)
    rows = [{"pixel_values": p, "input_ids": ids} for p, ids in zip(tiny.pixels(8), tiny.tokens(8))]
    trainer_of(model, tmp_path, train_dataset=rows, learning_rate=1e-5, max_steps=1).train()
    assert model.logit_scale.item() == (5.0 if frozen else pytest.approx(4.60517))


def test_fsdp_is_refused_where_accelerate_would_not_shard(tmp_path, monkeypatch):
    """On CPUs it falls back to DistributedDataParallel without a word."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="expected accelerators for FSDP, got .* on cpu, where accelerate does not"):
        trainer_of(MODELS["rms norm"](), tmp_path)
