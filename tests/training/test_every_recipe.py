"""What every recipe that trains on pictures does: goes on after a kill, shares the work, and writes a model card.

In short runs; train_contrastive.py is put to the same test thoroughly, in test_train_contrastive.py.
"""

import importlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
from catalogue import mostly_heavy
from huggingface_hub import ModelCard
from PIL import Image
from training_runs import assert_equal_runs, flags, losses, results, run_here, shared_by_two, weights

import vit_embed

# recipe -> class of the model that it leaves
CLASSES = {
    "train_classification": "VitEmbedForImageClassification",
    "train_depth": "VitEmbedForDepthEstimation",
    "pretrain_masked": "VitEmbedForMaskedImageModeling",
    "train_adaptive": "VitEmbedForDepthEstimation",
}
# The pictures of a batch are varied together, so differently in two processes.
VARIES_BATCHES = ("pretrain_masked", "train_adaptive")
NOT_EVALUATED = ("train_adaptive",)
NOT_METRICS = {"epoch", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time"}


def write_pictures(folder: Path) -> None:
    """Pictures with a label each, 16 to train on and 6 to judge, and as many with their depth, all of it measured."""
    pixels = np.random.default_rng(0)
    for split, count in (("train", 16), ("validation", 6)):
        for number in range(count):
            picture = Image.fromarray(pixels.integers(0, 256, (40, 40, 3), dtype=np.uint8))
            for path in (f"labelled/{split}/{number % 3}", f"pairs/{split}/images", f"pairs/{split}/depths"):
                (folder / path).mkdir(parents=True, exist_ok=True)
            picture.save(folder / "labelled" / split / str(number % 3) / f"{number}.png")
            picture.save(folder / "pairs" / split / "images" / f"{number}.png")
            depth = pixels.uniform(1.2, 4, (40, 40)).astype(np.float32)
            np.save(folder / "pairs" / split / "depths" / f"{number}.npy", depth)


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict[str, dict]:
    """recipe -> its options, of a model with dropout, dropped layers and hidden patches where it may have them."""
    folder = tmp_path_factory.mktemp("options")
    write_pictures(folder)
    random = {"hidden_dropout_prob": 0.1, "drop_path_rate": 0.2}
    fields = {
        "train_classification": {**random, "patch_drop_rate": 0.25},
        "train_depth": {**random, "depth_loss": "l1", "max_depth": 10.0},
        "pretrain_masked": {**random, **tiny.DECODER},
    }
    found = {}
    for recipe in CLASSES:
        data = folder / ("pairs" if recipe == "train_depth" else "labelled")
        found[recipe] = {"dataset": data, "do_train": True, "learning_rate": 1e-3, "logging_steps": 1, "max_steps": 4}
        if recipe in fields:
            tiny.vision_config(**fields[recipe]).save_pretrained(folder / recipe)
            found[recipe]["config_name"] = folder / recipe
        if recipe not in NOT_EVALUATED:
            found[recipe]["do_eval"] = True
    return found


@pytest.fixture(scope="module")
def unbroken(options, tmp_path_factory) -> dict[str, Path]:
    """recipe -> the folder of a run of four steps."""
    folder = tmp_path_factory.mktemp("unbroken")
    for recipe, given in options.items():
        run = {**given, "output_dir": folder / recipe, "per_device_train_batch_size": 4}
        run_here(importlib.import_module(recipe), **run)
    return {recipe: folder / recipe for recipe in options}


@pytest.mark.parametrize("recipe", mostly_heavy(CLASSES, "train_classification", "pretrain_masked"))
def test_a_killed_run_resumed_equals_an_unbroken_one(recipe, options, unbroken, command, tmp_path):
    """Bit for bit, killed as it saves a checkpoint in its last step but one, with workers."""
    given = {**options[recipe], "output_dir": tmp_path / "run", "per_device_train_batch_size": 4, "report_to": "none"}
    given |= {"save_strategy": "steps", "save_steps": 2, "dataloader_num_workers": 2, "use_cpu": True}
    kill = "import training_runs; training_runs.kill_in_step(4)"
    assert command(f"examples/{recipe}.py", *flags(**given), cwd=tmp_path, before=kill).returncode == -9
    assert not (tmp_path / "run" / "model.safetensors").exists()
    (tmp_path / "run" / "checkpoint-3").mkdir()
    run_here(importlib.import_module(recipe), **given, resume_from_checkpoint=True)
    assert_equal_runs(tmp_path / "run", unbroken[recipe])


@pytest.mark.parametrize("recipe", mostly_heavy(CLASSES, "train_depth"))
def test_two_sharded_processes_train_as_one(recipe, options, command, tmp_path):
    """FSDP: parameters are split, the rows are shared, and the losses, metrics and weights are those of one process."""
    given = dict(options[recipe])
    if "config_name" in given:
        config = vit_embed.VitEmbedConfig.from_pretrained(given["config_name"])
        config.hidden_dropout_prob = config.drop_path_rate = config.patch_drop_rate = 0.0
        config.save_pretrained(tmp_path / "still")
        given["config_name"] = tmp_path / "still"
    shared_by_two(command, f"examples/{recipe}.py", given, tmp_path / "two", sharded=True)
    wrapper = json.loads((tmp_path / "two" / "wrapper.json").read_text())
    assert wrapper["is_fsdp"] and not wrapper["whole"]
    model = getattr(vit_embed, CLASSES[recipe]).from_pretrained(tmp_path / "two")
    assert weights(tmp_path / "two").keys() == model.state_dict().keys()
    if recipe in VARIES_BATCHES:
        assert len(losses(tmp_path / "two")) == 4
        return
    run_here(importlib.import_module(recipe), **given, output_dir=tmp_path / "one", per_device_train_batch_size=4)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    found, expected = (results(tmp_path / run, "eval") for run in ("two", "one"))
    for name in set(expected) - NOT_METRICS | {"epoch"}:
        assert found[name] == pytest.approx(expected[name], rel=1e-3), name


@pytest.mark.parametrize("recipe", CLASSES)
def test_the_model_card_says_what_the_folder_is_and_its_code_runs(recipe, options, unbroken, monkeypatch):
    folder = unbroken[recipe]
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers" and card.data.license is None and card.data.base_model is None
    assert CLASSES[recipe] in card.text and "trained from scratch on `" in card.text
    assert str(options[recipe]["dataset"].parent) not in card.content, "a path means something on one machine alone"
    if recipe in NOT_EVALUATED:
        assert "Not evaluated" in card.text
    else:
        shown = dict(re.findall(r"^\| (\w+) \| ([\d.e+-]+) \|$", card.text, re.MULTILINE))
        measured = {name: value for name, value in results(folder, "eval").items() if name not in NOT_METRICS}
        assert {name: float(shown[name]) for name in measured} == pytest.approx(measured, rel=1e-3)
        assert set(shown) - set(measured) == {"steps", "seed"}
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    names = {}
    picture = next(options[recipe]["dataset"].rglob("*.png"))
    monkeypatch.chdir(os.path.dirname(folder))
    exec(code.replace("path/to/this/folder", str(folder)).replace("picture.jpg", str(picture)), names)
    used = {"train_classification": "logits", "pretrain_masked": "features"}
    assert names[used.get(recipe, "depth")].isfinite().all()
