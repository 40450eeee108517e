"""What every labelled data set reads to, and what is refused or said of labels."""

import logging
import re
import shlex
from pathlib import Path

import labelled_sets as sets
import numpy as np
import pytest
import tiny
import train_classification
from labelled_sets import COUNTS, SETS
from training_runs import REPO
from transformers import HfArgumentParser

from recipes.classification import DataArguments, check_labelled, find_problem, load_labelled
from recipes.problems import UNKNOWN

SECTION = (REPO / "docs" / "your-data.md").read_text().split("## Classification")[1].split("\n## ")[0]
COMMANDS = [
    shlex.split(command.replace("\\|", "|"))
    for command in re.findall(r"`python examples/train_classification.py ([^`]*)`", SECTION)
]
KINDS = {"single_label_classification": sets.SINGLE, "multi_label_classification": sets.MULTI, "soft_labels": sets.SOFT}
WHOLE = {"train": 18}  # of a data set without splits
# data set -> its splits where they are others, and the name of its first row of training
EXPECTED = {
    "class_folders": (COUNTS, "train/Kuh/11.png"),
    "deep_folders": (WHOLE, "Kuh/batch0/14.png"),
    "wrapped_folders": (COUNTS, "pets/Train/images/Kuh/11.png"),
    "splits_in_labels": (COUNTS, "Kuh/train/11.png"),
    "labels_below": (COUNTS, "train/farm/Kuh/11.png"),
    "unlabelled_test": ({**COUNTS, "test": 4}, "train/Kuh/11.png"),
    "csv_table": (COUNTS, "labels.csv:2"),
    "tsv_tables": (COUNTS, "train.tsv:2"),
    "txt_lists": (COUNTS, "train.txt:1"),
    "headerless_csv": (WHOLE, "all.csv:1"),
    "jsonl_tables": (COUNTS, "train/metadata.jsonl:1"),
    "json_list": (COUNTS, "train.json:1"),
    "kaggle": ({**WHOLE, "test": 4}, "train.csv:2"),
    "saved": (COUNTS, 0),
    "tags_jsonl": (COUNTS, "train/metadata.jsonl:1"),
    "tags_separated": ({"train": 11, "validation": 5}, "train.csv:2"),  # an empty cell is no label
    "soft_lists": (COUNTS, "train.parquet row 0"),
    **{name: (COUNTS, "train-00000.parquet row 0") for name in SETS if name.startswith("parquet")},
}


def test_every_data_set_has_a_command_in_the_docs():
    assert {command[1] for command in COMMANDS} == set(SETS)


def read(folder: Path, *flags: str):
    """The problem and the checked splits of a data set."""
    given = [flag for flag in flags if flag != "--do_predict"]
    arguments = HfArgumentParser(DataArguments).parse_args_into_dataclasses(["--dataset", str(folder), *given])[0]
    data = load_labelled(arguments)
    problem = find_problem(data, arguments, tiny.vision_config())
    splits = {name: check_labelled(rows, name, arguments, problem) for name, rows in data.splits.items()}
    return problem, splits


def in_words(problem, target: object, name: str) -> object:
    """A target as `labelled_sets.truth_of` has it."""
    if problem.kind == "regression":
        return target[0] / (4 if name == "whole_values" else 1)
    if problem.kind == "soft_labels":
        return [round(share, 2) for share in target]
    if isinstance(target, list):
        return sorted(label for label, there in zip(problem.names, target) if there)
    label = problem.names[target]
    return sets.NAMES[int(label)] if name == "txt_lists" else label


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[1:]))
def test_every_row_has_its_own_picture_and_label(command, tmp_path):
    name, *flags = command[1:]
    SETS[name](tmp_path / name)
    problem, splits = read(tmp_path / name, *flags)
    counts, first = EXPECTED.get(name, (COUNTS, "train.csv:2"))
    assert {split: len(rows) for split, rows in splits.items()} == counts
    assert splits["train"]["__row__"][0] == first
    kind = KINDS.get(problem.kind, sets.REGRESSION)
    for split, rows in splits.items():
        if split == "test":
            assert "labels" not in rows.column_names and set(rows["__row__"]) <= {
                f"test/{b}{n}.png" for b in ("", "b") for n in range(4)
            }
            continue
        for row in rows:
            truth = sets.truth_of(kind, row["image"])
            assert in_words(problem, row["labels"], name) == (sorted(truth) if kind == sets.MULTI else truth), row[
                "__row__"
            ]
    if name == "two_values":
        assert problem.names == ("width", "price")
        labels = np.array(splits["train"]["labels"][:])
        np.testing.assert_allclose(labels[:, 1], 1000 * labels[:, 0])
