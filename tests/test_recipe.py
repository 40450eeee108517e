"""examples/recipe.py: what the training scripts share."""

import json
import logging
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict
from fresh_process import run_fresh
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from PIL import Image
from test_hub import TOKEN, hub  # noqa: F401, a fixture
from transformers import ResNetConfig, TrainerCallback, TrainingArguments

from vit_embed import (
    VitEmbedForContrastive,
    VitEmbedForDepthEstimation,
    VitEmbedForImageClassification,
    VitEmbedForMaskedImageModeling,
)

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from picture_files import as_rgb  # noqa: E402
from recipe import (  # noqa: E402
    Problems,
    RecipeArguments,
    RecipeTrainer,
    SeededRows,
    checkpoint_to_resume,
    frozen_modules,
    last_complete_checkpoint,
    load_splits,
    parse,
    prepare,
    run,
    seeded,
)

PICTURES = Path(__file__).parent.parent / "examples" / "pictures"
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
    "lora": lambda: lora(VitEmbedForImageClassification(tiny.vision_config(num_labels=3))),
    "rms norm": lambda: VitEmbedForImageClassification(tiny.vision_config(norm_type="rms_norm", num_labels=3)),
}
LAYERS = {"vision_model": 4, "text_model": 3}  # of tests/tiny.py


def trainer_of(model: torch.nn.Module, folder: Path, recipe: RecipeArguments | None = None, **options) -> RecipeTrainer:
    kwargs = {
        name: options.pop(name) for name in ("train_dataset", "eval_dataset", "draw", "callbacks") if name in options
    }
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        **{"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", **options},
    )
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


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
@pytest.mark.parametrize("model", MODELS)
def test_learning_rate_of_every_parameter(model, optim, tmp_path):
    module = MODELS[model]()
    trainer = trainer_of(
        module, tmp_path, RecipeArguments(layer_decay=DECAY), learning_rate=0.1, weight_decay=0.3, optim=optim
    )
    optimizer = trainer.create_optimizer()
    assert ("Adafactor" if optim == "adafactor" else "AdamW") in type(
        optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer
    ).__name__
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
        elif own.endswith((".weight",)) and parameter.dim() == 2:
            assert group["weight_decay"] == 0.3, name
        scales.add(round(expected_scale(own), 6))
    assert len(scales) >= 5, "the rates differ from layer to layer"
    # The schedule keeps the ratios.
    trainer.create_scheduler(10, optimizer)
    before = [group["lr"] for group in optimizer.param_groups]
    optimizer.step()
    trainer.lr_scheduler.step()
    after = [group["lr"] for group in optimizer.param_groups]
    np.testing.assert_allclose(np.divide(after, before), 0.9, rtol=1e-6)


def test_without_decay_all_parameters_have_one_rate(tmp_path):
    optimizer = trainer_of(MODELS["two towers"](), tmp_path, learning_rate=0.1).create_optimizer()
    assert {group["lr"] for group in optimizer.param_groups} == {0.1} and len(optimizer.param_groups) == 2


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_layer_decay_out_of_range(value):
    with pytest.raises(ValueError, match="--layer_decay"):
        RecipeArguments(layer_decay=value)


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


def test_freezing_by_prefix_ends_at_a_dot():
    model = VitEmbedForImageClassification(tiny.vision_config(num_hidden_layers=11, num_labels=3))
    prepare(model, RecipeArguments(freeze=["vision_model.encoder.layers.1"]))
    frozen = {name.split(".")[3] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"1"}


def test_freezing_works_through_peft():
    model = MODELS["lora"]()
    prepare(model, RecipeArguments(freeze=["vision_model.encoder.layers.0"]))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and not any("layers.0." in name for name in trained)


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (["vision_modle.embeddings"], "near are vision_model.embeddings"),
        (["vision_model.embed"], "near are vision_model.embeddings"),
        (["vision_model", "classifier"], "leaves none"),
    ],
)
def test_freezing_refuses(freeze, message):
    with pytest.raises(ValueError, match=message):
        prepare(MODELS["rms norm"](), RecipeArguments(freeze=freeze))


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


def test_patch_drop_rate_refuses():
    with pytest.raises(ValueError, match="depth needs every patch"):
        prepare(VitEmbedForDepthEstimation(tiny.vision_config()), RecipeArguments(patch_drop_rate=0.5))
    with pytest.raises(ValueError, match="patch_drop_rate"):
        prepare(MODELS["rms norm"](), RecipeArguments(patch_drop_rate=1.5))
    with pytest.raises(ValueError, match="is frozen"):
        prepare(MODELS["rms norm"](), RecipeArguments(patch_drop_rate=0.5, freeze=["vision_model"]))


def test_channels_last_trains_saves_and_resumes_the_same_weights(tmp_path):
    """The layout is of memory alone: the same training, and files that load and resume like any other."""
    state = MODELS["hybrid"]().state_dict()
    trained = {}
    for channels_last in (False, True):
        model = MODELS["hybrid"]()
        model.load_state_dict(state)
        recipe = RecipeArguments(channels_last=channels_last)
        prepare(model, recipe)
        kernel = next(parameter for parameter in model.parameters() if parameter.dim() == 4 and parameter.shape[2] > 1)
        assert kernel.is_contiguous(memory_format=torch.channels_last) == channels_last
        folder = tmp_path / str(channels_last)
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "train_dataset": labelled_pixels()}
        options |= {"optim": "sgd", "learning_rate": 0.05}  # Adam divides by gradients that are all rounding
        trainer = trainer_of(model, folder, recipe, **options)
        trainer.train()
        trainer.save_model()
        trained[channels_last] = {name: value.clone() for name, value in model.state_dict().items()}
        saved = type(model).from_pretrained(folder).state_dict()
        assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
        resumed = trainer_of(model, folder, recipe, **options)
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        assert all(torch.equal(value, trained[channels_last][name]) for name, value in model.state_dict().items())
    for name, value in trained[False].items():
        torch.testing.assert_close(trained[True][name], value, rtol=1e-4, atol=1e-5, msg=name)


# --- rows ---


def test_problems_are_counted_and_named(caplog):
    problems = Problems()
    for row in range(12):
        problems.add("an unreadable picture", row)
    problems.add("a caption that is cut", "shard-1/7", drop=False)
    with caplog.at_level(logging.INFO):
        dropped = problems.report("train", 20)
    assert dropped == set(range(12))
    assert "split train: 12 rows with an unreadable picture: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9] ..." in caplog.text
    assert "split train: 1 rows with a caption that is cut: ['shard-1/7']" in caplog.text
    assert "8 rows kept, 12 dropped" in caplog.text
    with pytest.raises(ValueError, match="none of 12 are: 12 with an unreadable picture"):
        problems.report("train", 12)
    with pytest.raises(ValueError, match="it is empty"):
        Problems().report("train", 0)


@pytest.fixture(scope="module")
def picture_files() -> list[Path]:
    return sorted(PICTURES.glob("*.png"))[:4]


def write_saved(files, folder):
    DatasetDict(train=Dataset.from_dict({"image": [str(f) for f in files]})).save_to_disk(folder)


def write_saved_alone(files, folder):
    Dataset.from_dict({"image": [str(f) for f in files]}).save_to_disk(folder)


def write_parquet(files, folder):
    folder.mkdir()
    Dataset.from_dict({"image": [str(f) for f in files]}).to_parquet(folder / "train-00000.parquet")


def write_folder(files, folder):
    (folder / "train").mkdir(parents=True)
    for file in files:
        (folder / "train" / file.name).write_bytes(file.read_bytes())
    lines = [json.dumps({"file_name": file.name, "text": file.stem}) for file in files]
    (folder / "train" / "metadata.jsonl").write_text("\n".join(lines))


def write_shards(files, folder):
    folder.mkdir()
    for number in range(2):
        with tarfile.open(folder / f"shard-{number}.tar", "w") as shard:
            for file in files[number::2]:
                shard.add(file, file.name)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
@pytest.mark.parametrize("write", [write_saved, write_saved_alone, write_parquet, write_folder, write_shards])
def test_every_kind_of_dataset_opens(write, streaming, picture_files, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write(picture_files, tmp_path / "data")
    splits = load_splits(str(tmp_path / "data"), streaming=streaming)
    assert list(splits) == ["train"] and len(list(splits["train"])) == 4
    row = next(iter(splits["train"]))
    assert "text" in row or write is not write_folder
    assert "png" in row or write is not write_shards


def read_from_the_hub(file: str, token: str, examples: str) -> list:
    import sys

    from huggingface_hub import HfApi

    sys.path.insert(0, examples)
    from recipe import load_splits

    api = HfApi(token=token)
    api.create_repo("alice/pictures", repo_type="dataset")
    path = "data/train-00000-of-00001.parquet"
    api.upload_file(path_or_fileobj=file, path_in_repo=path, repo_id="alice/pictures", repo_type="dataset")
    found = []
    for streaming in (False, True):
        rows = load_splits("alice/pictures", streaming)["train"]
        found.append([[row["image"].size, row["text"]] for row in rows])
    return found


def test_a_dataset_is_read_by_its_name_on_the_hub(hub, tmp_path):  # noqa: F811
    rows = [{"image": Image.new("RGB", (width, 4)), "text": "x" * width} for width in (3, 5)]
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    arguments = {"file": str(tmp_path / "train.parquet"), "token": TOKEN, "examples": str(PICTURES.parent)}
    found = run_fresh(read_from_the_hub, tmp_path / "home", environment=hub, **arguments)
    assert found == [[[[3, 4], "xxx"], [[5, 4], "xxxxx"]]] * 2, "whole, and as a stream"


def test_a_path_that_is_not_there_is_no_name_on_the_hub(tmp_path):
    with pytest.raises(ValueError, match="expected a folder, a .parquet or .tar file, or a name on the Hub"):
        load_splits(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="expected a folder"):
        (tmp_path / "a.txt").write_text("")
        load_splits(str(tmp_path / "a.txt"))


def test_pictures_of_every_kind_become_rgb(tmp_path):
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "16bit.png")
    deep = Image.open(tmp_path / "16bit.png")
    assert deep.mode.startswith("I")
    np.testing.assert_array_equal(np.asarray(as_rgb(deep))[..., 0], np.arange(256).reshape(16, 16))
    np.testing.assert_array_equal(np.asarray(as_rgb(deep.convert("I")))[..., 2], np.arange(256).reshape(16, 16))

    grey = Image.new("L", (2, 2), 7)
    assert as_rgb(grey).getpixel((0, 0)) == (7, 7, 7)
    assert as_rgb(Image.new("RGBA", (2, 2), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert as_rgb(palette).getpixel((0, 0)) == (10, 200, 30)
    palette.info["transparency"] = 1
    assert as_rgb(palette).getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (4, 2)).save(tmp_path / "turned.jpg", exif=exif)
    assert as_rgb(Image.open(tmp_path / "turned.jpg")).size == (2, 4)
    with pytest.raises(ValueError, match="floating point"):
        as_rgb(Image.new("F", (2, 2)))


def draw_number(row: int) -> dict:
    return {"row": row, "torch": torch.rand(()), "numpy": np.random.rand(), "python": __import__("random").random()}


def test_what_is_drawn_depends_on_seed_epoch_and_row_alone():
    rows = SeededRows(range(6), draw_number, seed=3)
    loader = torch.utils.data.DataLoader(rows, num_workers=2, persistent_workers=True, batch_size=None)
    one = torch.utils.data.DataLoader(rows, shuffle=True, batch_size=None)
    drawn = {}
    for epoch in (0, 1):
        rows.set_epoch(epoch)
        by_row = {item["row"]: item for item in loader}
        drawn[epoch] = [by_row[row]["torch"].item() for row in range(6)]
        for item in one:
            for kind in ("torch", "numpy", "python"):
                assert item[kind] == by_row[item["row"]][kind], "alike with workers and without, in any order"
    assert len(set(drawn[0] + drawn[1])) == 12
    rows.set_epoch(0)
    assert rows[0]["torch"] == drawn[0][0]
    assert SeededRows(range(6), draw_number, seed=4)[0]["torch"] != drawn[0][0]


def test_drawing_from_a_key_leaves_other_randomness_as_it_was():
    def after(inside: bool) -> list[float]:
        with seeded(1):
            if inside:
                with seeded(2, 3):
                    draw_number(0)
            return [float(value) for value in draw_number(0).values()]

    assert after(True) == after(False)


# --- the trainer ---


class Stop(TrainerCallback):
    """Remembers how far training went."""

    def on_train_end(self, args, state, control, **kwargs):
        self.steps = state.global_step


def test_early_stop(tmp_path):
    """Nothing is learned at a rate of 0, so the second evaluation without a better one ends it."""
    stop = Stop()
    trainer = trainer_of(
        MODELS["rms norm"](),
        tmp_path,
        RecipeArguments(early_stopping_patience=2),
        **{"train_dataset": labelled_pixels(), "eval_dataset": labelled_pixels(4), "callbacks": [stop]},
        **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 9},
        **{"learning_rate": 0.0, "load_best_model_at_end": True, "metric_for_best_model": "loss"},
    )
    trainer.train()
    assert stop.steps == 3


def test_early_stop_says_at_once_what_to_set(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="--early_stopping_patience of at least 1"):
        RecipeArguments(early_stopping_patience=0)
    monkeypatch.setattr("sys.argv", ["x", "--early_stopping_patience", "2", "--use_cpu", "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match="also set --eval_strategy.*--metric_for_best_model.*--load_best_model_at_end"):
        parse()


@pytest.mark.parametrize(
    ("metric", "is_greater_better"),
    [("loss", False), ("eval_median_scaled_abs_rel", False), ("rmse", False), ("delta1", True), ("accuracy", True)],
)
def test_the_best_of_errors_is_the_least(metric, is_greater_better, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "sys.argv", ["x", "--use_cpu", "--output_dir", str(tmp_path), "--metric_for_best_model", metric]
    )
    assert parse()[-1].greater_is_better is is_greater_better


def test_parse_refuses_to_write_over_a_run(monkeypatch, tmp_path):
    (tmp_path / "left").write_text("")
    command = ["x", "--use_cpu", "--output_dir", str(tmp_path), "--do_train"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(ValueError, match="to be empty.*--resume_from_checkpoint True"):
        parse()
    monkeypatch.setattr("sys.argv", [*command, "--resume_from_checkpoint", "True", "--freeze", "a", "b"])
    recipe, training = parse()
    assert recipe.freeze == ["a", "b"] and not training.remove_unused_columns


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
        self.images.append((name, pixels.shape, step, dataformats))


def test_every_evaluation_leaves_a_picture_and_run_its_metrics(tmp_path):
    board, drawn = Board(), []

    def draw(output, path):
        drawn.append(path.name.split("-")[0])
        assert output.predictions.shape == (4, 3)
        figure = Figure(figsize=(1, 1))
        figure.suptitle("$5 a shirt #$1")  # no formula, whatever matplotlib takes it for
        figure.savefig(path, dpi=50)

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
    assert board.images[0] == ("pictures/eval", (50, 50, 3), 1, "HWC") and len(board.images) == 4
    results = {name: json.loads((tmp_path / "run" / f"{name}_results.json").read_text()) for name in ("eval", "test")}
    assert results["eval"]["eval_kind"] == 1.0 and results["test"]["test_kind"] == 2.0
    assert (tmp_path / "run" / "model.safetensors").exists() and (tmp_path / "run" / "train_results.json").exists()


@pytest.mark.parametrize("name", ["two towers", "masked"])
def test_label_smoothing_is_refused_where_there_are_no_class_numbers(name, tmp_path):
    """Trainer takes the labels away, and would smooth nothing or fail later."""
    with pytest.raises(ValueError, match="--label_smoothing_factor 0.1 smooths class numbers, of which .* has none"):
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
