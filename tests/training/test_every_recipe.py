"""What every recipe that trains on pictures does: goes on after a stop, shares the work, writes a model card, leaves a
folder that the other release of transformers reads."""

import importlib
import json
import os
import re
import shutil
import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import training_runs as runs
import transformers
from catalogue import mostly_heavy
from datasets import Dataset, DatasetDict
from datasets import Image as ImageFeature
from fresh_process import auto_load, outputs, run_fresh
from huggingface_hub import ModelCard
from PIL import Image
from training_runs import REPO, losses, results, run_apart, run_here, weights

import vit_embed
from vit_embed.retrieval.pictures import as_rgb

# recipe -> class of the model that it leaves
CLASSES = {
    "train_contrastive": "VitEmbedForContrastive",
    "train_classification": "VitEmbedForImageClassification",
    "train_depth": "VitEmbedForDepthEstimation",
    "pretrain_masked": "VitEmbedForMaskedImageModeling",
    "train_adaptive": "VitEmbedForDepthEstimation",
}
STREAM = "train_contrastive of a stream"
# Two processes vary the pictures of their batches differently, or read shards of their own.
VARIES_BATCHES = ("pretrain_masked", "train_adaptive", STREAM)
NOT_METRICS = {"epoch", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time"}
STEPS = 6  # two epochs


def write_pictures(folder: Path) -> None:
    """Pictures with a label each, 12 to train on and 6 to judge, with a depth each, and all but one with captions."""
    pixels, splits = np.random.default_rng(0), {}
    for split, count in (("train", 12), ("validation", 6)):
        for kind in ("images", "depths"):
            (folder / "pairs" / split / kind).mkdir(parents=True)
        for number in range(count):
            picture = folder / "labelled" / split / str(number % 3) / f"{number}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(picture)
            shutil.copy(picture, folder / "pairs" / split / "images")
            depth = pixels.uniform(1.2, 4, (40, 40)).astype(np.float32)
            np.save(folder / "pairs" / split / "depths" / f"{number}.npy", depth)
        columns = {"image": sorted(map(str, (folder / "labelled" / split).rglob("*.png")))}
        columns |= {"captions": [[f"{word} {word}", "thing"] for word in "abcdefghijkl"[:count]]}
        columns |= {"tags": [["sun", "moon"]] * count}
        splits[split] = Dataset.from_dict(columns).cast_column("image", ImageFeature())
    splits["validation"] = splits["validation"].select(range(5))  # more than fits two processes evenly
    DatasetDict(splits).save_to_disk(folder / "captioned", num_shards={"train": 2, "validation": 1})


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict[str, dict]:
    """recipe -> its options, of a model with dropout, dropped layers and hidden patches where it may have them."""
    folder = tmp_path_factory.mktemp("options")
    write_pictures(folder)
    random = {"hidden_dropout_prob": 0.1, "drop_path_rate": 0.2}
    fields = {
        "train_contrastive": {**random, "patch_drop_rate": 0.25, "text_config": runs.text_fields()},
        "train_classification": {**random, "patch_drop_rate": 0.25},
        "train_depth": {**random, "depth_loss": "l1", "max_depth": 10.0},
        "pretrain_masked": {**random, **tiny.DECODER},
    }
    found = {}
    for recipe in CLASSES:
        data = {"train_depth": "pairs", "train_contrastive": "captioned"}.get(recipe, "labelled")
        found[recipe] = {"dataset": folder / data, "do_train": True, "learning_rate": 1e-3, "logging_steps": 1}
        found[recipe] |= {"max_steps": STEPS, "per_device_train_batch_size": 4}
        if recipe in fields:
            tiny.vision_config(**fields[recipe]).save_pretrained(folder / recipe)
            found[recipe] |= {"config_name": folder / recipe, "do_eval": True}
    found["train_contrastive"] |= {"tokenizer_name": REPO, "tag_column": "tags", "layer_decay": 0.8}
    found[STREAM] = {**found["train_contrastive"], "streaming": True, "per_device_train_batch_size": 2}
    return found


def train(recipe: str, options: dict[str, dict], output_dir: Path, **more: object) -> Path:
    run_here(importlib.import_module(recipe.split()[0]), **options[recipe], output_dir=output_dir, **more)
    return output_dir


@pytest.fixture(scope="module")
def unbroken(options, tmp_path_factory):
    """Gives the folder of a recipe's run, with a checkpoint in the middle of the second epoch."""
    folder = tmp_path_factory.mktemp("unbroken")
    return cache(lambda recipe: train(recipe, options, folder / recipe, save_strategy="steps", save_steps=4))


@pytest.mark.parametrize("recipe", [*CLASSES, STREAM])
def test_a_resumed_run_equals_an_unbroken_one(recipe, options, unbroken, tmp_path):
    """Bit for bit, with pictures, texts, patches and layers drawn at random; a checkpoint cut off is left out."""
    shutil.copytree(unbroken(recipe) / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    (tmp_path / "run" / "checkpoint-5").mkdir()
    train(recipe, options, tmp_path / "run", resume_from_checkpoint=True)
    runs.assert_equal_runs(tmp_path / "run", unbroken(recipe))


def test_a_killed_run_resumed_equals_an_unbroken_one(options, unbroken, tmp_path):
    """With workers, where the unbroken one has none."""
    recipe, run = "train_contrastive", tmp_path / "run"
    given = {"save_strategy": "steps", "save_steps": 4, "dataloader_num_workers": 2}
    kill = partial(runs.kill_in_step, STEPS)
    run_apart(recipe, {**options[recipe], **given, "output_dir": run}, kill, status=-9)
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-4"]
    assert not (run / "model.safetensors").exists()
    train(recipe, options, run, **given, resume_from_checkpoint=True)
    runs.assert_equal_runs(run, unbroken(recipe))


@pytest.mark.parametrize("recipe", mostly_heavy([*CLASSES, STREAM], "train_contrastive"))
def test_two_processes_and_fsdp_give_the_curve_of_one(recipe, options, tmp_path):
    """Losses, metrics and weights at the same global batch, float32 sums in another order. FSDP splits every parameter
    but the scalar; its folder loads like any other."""
    given = dict(options[recipe])
    if "config_name" in given:
        config = vit_embed.VitEmbedConfig.from_pretrained(given["config_name"])
        config.hidden_dropout_prob = config.drop_path_rate = config.patch_drop_rate = 0.0
        config.save_pretrained(tmp_path / "still")
        given["config_name"] = tmp_path / "still"
    model_class = CLASSES[recipe.split()[0]]
    scalars = ["logit_scale"] if model_class == "VitEmbedForContrastive" else []
    before = [runs.leave_pictures_alone, runs.record_wrapper]
    for name, processes in (("one", 1), ("ddp", 2), ("fsdp", 2)):
        sizes = {f"per_device_{part}_batch_size": 4 // processes for part in ("train", "eval")}
        calls = [*before, runs.fsdp_on_cpus] if name == "fsdp" else before
        run_apart(recipe, {**given, **sizes, "output_dir": tmp_path / name}, *calls, processes=processes)
    wrappers = {name: json.loads((tmp_path / name / "wrapper.json").read_text()) for name in ("one", "ddp", "fsdp")}
    assert [wrappers[name]["class"] for name in ("one", "ddp")] == [model_class, "DistributedDataParallel"]
    assert wrappers["fsdp"]["is_fsdp"] and wrappers["fsdp"]["whole"] == scalars
    saved = weights(tmp_path / "fsdp")
    loaded = getattr(vit_embed, model_class).from_pretrained(tmp_path / "fsdp").state_dict()
    assert loaded.keys() == saved.keys() and all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
    assert not list((tmp_path / "fsdp").glob("_fsdp*"))
    for name in ("ddp", "fsdp"):
        assert len(losses(tmp_path / name)) == STEPS
        if recipe not in VARIES_BATCHES:
            assert_same_training(tmp_path / name, tmp_path / "one", recipe)


def assert_same_training(folder: Path, one: Path, recipe: str) -> None:
    np.testing.assert_allclose(losses(folder), losses(one), rtol=0, atol=1e-4)
    ours, theirs = weights(folder), weights(one)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        # The bias of keys shifts all scores of a row alike, so its gradient is rounding, which Adam magnifies.
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-3, msg=name)
    found, expected = results(folder, "eval"), results(one, "eval")
    # The contrastive loss of an evaluation is of each process's own batches, which are half as large.
    for name in set(expected) - NOT_METRICS - ({"loss"} if recipe == "train_contrastive" else set()) | {"epoch"}:
        assert found[name] == pytest.approx(expected[name], rel=1e-3), name


@pytest.mark.parametrize("recipe", CLASSES)
def test_the_model_card_says_what_the_folder_is_and_its_code_runs(recipe, options, unbroken, monkeypatch, tmp_path):
    folder = unbroken(recipe)
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers" and card.data.license is None and card.data.base_model is None
    assert CLASSES[recipe] in card.text and "trained from scratch on `" in card.text
    assert str(options[recipe]["dataset"].parent) not in card.content, "a path means something on one machine alone"
    if recipe == "train_adaptive":
        assert "Not evaluated" in card.text
    else:
        shown = dict(re.findall(r"^\| ([\w@]+) \| ([\d.e+-]+) \|$", card.text, re.MULTILINE))
        measured = {name: value for name, value in results(folder, "eval").items() if name not in NOT_METRICS}
        assert {name: float(shown[name]) for name in measured} == pytest.approx(measured, rel=1e-3)
        assert set(shown) - set(measured) == {"steps", "seed"}
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    names = {}
    icon, exif = Image.new("RGBA", (64, 48), (0, 0, 0, 0)), Image.Exif()
    icon.paste((0, 0, 0, 255), (30, 4, 60, 24))  # black on black, but for the alpha channel
    exif[0x0112] = 6  # to be turned by a quarter
    icon.save(tmp_path / "icon.png", exif=exif)
    monkeypatch.chdir(os.path.dirname(folder))
    exec(code.replace("path/to/this/folder", str(folder)).replace("picture.jpg", str(tmp_path / "icon.png")), names)
    assert names["image"] == as_rgb(tmp_path / "icon.png"), "what training saw"
    used = {"train_contrastive": "probabilities", "train_classification": "logits", "pretrain_masked": "features"}
    assert names[used.get(recipe, "depth")].isfinite().all()


# How what a recipe leaves is read: a pipeline's task, or an Auto class where there is none.
READERS = {
    "train_contrastive": "zero-shot-image-classification",
    "train_classification": "image-classification",
    "train_depth": "depth-estimation",
    "pretrain_masked": "AutoModelForMaskedImageModeling",
    "train_adaptive": "depth-estimation",
}
OTHER_PYTHON = os.environ.get("VIT_EMBED_OTHER_PYTHON") or str(REPO / ".venv-4.57" / "bin" / "python")


def read(folders: dict, readers: dict, picture: str) -> dict:
    """{recipe: [class, numbers]} of what each folder's own code says of a picture."""
    found = {"version": transformers.__version__, "package_imported": "vit_embed" in sys.modules}
    for recipe, folder in folders.items():
        if readers[recipe].startswith("Auto"):
            model = auto_load(readers[recipe], folder)
            generator = torch.Generator().manual_seed(0)
            inputs = {
                "pixel_values": torch.randn(1, 3, 32, 32, generator=generator),
                "bool_masked_pos": torch.arange(16)[None] % 4 > 0,
            }
            numbers = torch.cat([tensor.float().flatten() for tensor in outputs(model, inputs)])
        else:
            ask = transformers.pipeline(readers[recipe], model=folder, trust_remote_code=True)
            labels = {"candidate_labels": ["rocket", "carrot", "a red apple"]}
            model, answer = ask.model, ask(picture, **(labels if recipe == "train_contrastive" else {}))
            if "depth" in readers[recipe]:
                numbers = answer["predicted_depth"].flatten()
            else:
                numbers = torch.tensor([each["score"] for each in sorted(answer, key=lambda each: each["label"])])
        found[recipe] = [type(model).__name__, numbers.tolist()]
    return found


@pytest.mark.skipif(not os.path.exists(OTHER_PYTHON), reason=f"there is no {OTHER_PYTHON}; make test-4.57 makes it")
def test_the_other_release_reads_the_same(unbroken, tmp_path):
    """What the training recipes leave, written here, is read by the other release of transformers that CI tests."""
    Image.open(REPO / "examples" / "pictures" / "rocket.png").convert("RGB").save(tmp_path / "picture.png")
    given = {"folders": {recipe: str(unbroken(recipe)) for recipe in CLASSES}, "readers": READERS}
    given["picture"] = str(tmp_path / "picture.png")
    here, there = read(**given), run_fresh(read, tmp_path / "home", python=OTHER_PYTHON, **given)
    assert there["version"] != here["version"] and not there["package_imported"]
    for recipe, model_class in CLASSES.items():
        assert there[recipe][0] == here[recipe][0] == model_class
        found, expected = torch.tensor(there[recipe][1]), torch.tensor(here[recipe][1])
        assert expected.std() > 1e-4, "an answer that says something"
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
