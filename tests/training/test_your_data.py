"""docs/your-data.md: the command of every row of its tables, run on a small data set of that layout."""

import importlib
import json
import re
import shlex
from pathlib import Path

import captioned_sets
import depth_sets
import labelled_sets
import numpy as np
import pytest
import tiny
import training_runs
from training_runs import REPO, run_here

SETS = {
    "train_classification": labelled_sets.SETS,
    "train_contrastive": captioned_sets.SETS,
    "train_depth": depth_sets.SETS,
}
# A bar in a cell of a table is written with a backslash.
COMMAND = re.compile(r"`python examples/(\w+)\.py --dataset (\S+)((?: (?:[^`|]|\\\|)+)?)` \|$", re.M)
PAGE = (REPO / "docs" / "your-data.md").read_text()
ROWS = [(script, name, more.replace("\\|", "|")) for script, name, more in COMMAND.findall(PAGE)]
TRAINING = {"do_train": True, "do_eval": True, "max_steps": 1, "per_device_train_batch_size": 4}


def options_of(words: str) -> dict[str, object]:
    """`--a 1 --b x y` -> {"a": ["1"], "b": ["x", "y"]}."""
    options: dict[str, list[str]] = {}
    for word in shlex.split(words):
        if word.startswith("--"):
            options[word.removeprefix("--")] = []
        else:
            list(options.values())[-1].append(word)
    return options


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, dict]:
    """recipe -> the options that name a small model."""
    root = tmp_path_factory.mktemp("models")
    tiny.vision_config(max_depth=80.0).save_pretrained(root / "depth")
    tiny.vision_config().save_pretrained(root / "trunk")
    tiny.vision_config(text_config=training_runs.text_fields()).save_pretrained(root / "two")
    return {
        "train_classification": {"config_name": root / "trunk"},
        "train_depth": {"config_name": root / "depth"},
        "train_contrastive": {"config_name": root / "two", "tokenizer_name": REPO},
    }


def test_every_layout_has_a_row_and_every_row_a_data_set():
    for recipe, sets in SETS.items():
        assert sorted({name for script, name, _ in ROWS if script == recipe}) == sorted(sets)


@pytest.mark.parametrize(("recipe", "name", "more"), ROWS, ids=[f"{row[0]} {row[1]}{row[2]}" for row in ROWS])
def test_every_command_of_the_page_trains_and_checks(recipe, name, more, models, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    SETS[recipe][name](tmp_path / name)
    command = importlib.import_module(recipe)
    options = {**models[recipe], **options_of(f"--dataset {name}{more}")}
    run_here(command, **options, output_dir="looked", check_only=True)
    assert Path("looked/check/rows.png").exists() and Path("looked/check/found.csv").exists()
    assert not Path("looked/model.safetensors").exists()
    run_here(command, **options, output_dir="run", **TRAINING)
    assert np.isfinite(json.loads(Path("run/eval_results.json").read_text())["eval_loss"])
    assert Path("run/model.safetensors").exists()
