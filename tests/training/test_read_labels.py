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
from training_runs import REPO, run_here
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


# --- what is refused and said ---


def table(folder: Path, text: str) -> Path:
    """labels.csv of `text`, with pictures 0.png to 11.png beside it."""
    for row in range(12):
        sets.save(folder / f"{row}.png", sets.SINGLE, row)
    (folder / "labels.csv").write_text(text)
    return folder


def column(*cells: object, name: str = "label") -> str:
    """A table of pictures and cells, which are repeated up to 12 rows."""
    return f"image,{name}\n" + "".join(f"{row}.png,{cells[row % len(cells)]}\n" for row in range(12))


REFUSED = {
    "floats that are whole": (
        column("1.0", "2.0"),
        "column 'label' can be read in two ways, found 1.0, 2.0; .*regression",
    ),
    "an id": (column(*"abcdefghijkl"), "every row has one of its own .a, b, c.* set --label_column"),
    "an id of numbers": (column(*range(12)), "--problem_type single_label_classification or regression"),
    "names in one cell": (column("cat|dog", "cat", "dog"), r"found 'cat\|dog': --label_separator '\|' reads each"),
    "words in one cell": (
        column("clear primary", "clear", "primary", "water clear", "water", "primary water"),
        "--label_separator ' ' reads each as several labels",
    ),
    "one of several columns": (column("1,0", "0,1", name="cat,dog"), "columns cat, dog can be read in two ways"),
    "shares of several": (column("0.5,0.9", "0,1", name="a,b"), "multi_label_classification reads .*regression reads"),
    "uncertain ones": (column("1,0", "-1,1", "0,0", name="a,b"), r"found \[1.0, 0.0\], \[-1.0, 1.0\]"),
    "no column": (column("x", name="colour"), "labels.csv: has the columns image, colour"),
    "text for a number": (
        column("1,x", "0,1", name="a,b"),
        "in column 'b', got 'x'; set --label_columns",
        "label_columns",
        "a",
        "b",
    ),
    "a column that is not there": (
        column("x"),
        r"expected columns \['b'\] in split 'train'",
        "label_columns",
        "label",
        "b",
    ),
    "two separators": (
        *(column("cat|dog", "cat;dog"), r"found \| and ;; set --label_separator"),
        *("problem_type", "multi_label_classification"),
    ),
    "a space": (column("cat dog", "cow"), "of which 'cat dog' may be", "problem_type", "multi_label_classification"),
    "an unknown kind": (
        column("x"),
        "multi_label_classification, regression, soft_labels, got 'multi_label'",
        "problem_type",
        "multi_label",
    ),
    "level 0": (column("x"), "expected --label_level 1 for the first folder", "label_level", "0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_two_readings_is_refused(case, tmp_path):
    text, message, *flags = REFUSED[case]
    given = [f"--{flags[0]}", *flags[1:]] if flags else []
    with pytest.raises(ValueError, match=message):
        read(table(tmp_path, text), *given)


SAID = {
    "a -1 of its own": (column(0, 1, -1), "column 'label': -1 is learned as a label of its own"),
    "amounts": (
        *("image,label\n" + "".join(f"{row % 12}.png,{row % 24}\n" for row in range(48)),),
        "column 'label': 24 whole numbers are read as classes; --problem_type regression would read them as amounts",
    ),
    "the kind and the counts": (
        column("cat", "dog", "cat"),
        "split train: single_label_classification, 2 labels: cat 8, dog 4",
    ),
    "labels alike": (
        column("Cat", "cat", "dog"),
        "differ only in case or spaces, each is learned as its own: 'Cat' and 'cat'",
    ),
    "labels that look missing": (
        column("cat", "NaN", "dog"),
        "look like missing ones, each is learned as a label: NaN",
    ),
    "an empty cell": (column("cat", "dog", ""), "split train: 4 rows with no label: ['labels.csv:4', 'labels.csv:7'"),
    "the separator": (
        *(column("cat;dog", "cat"), "column 'label': names are separated by ';'"),
        *("problem_type", "multi_label_classification"),
    ),
    "what -1 is": (
        *(
            column("1,0", "-1,1", "0,0", name="a,b"),
            "-1 in the columns of labels stands for: unknown, left out of the loss",
        ),
        *("problem_type", "multi_label_classification"),
    ),
    "no number": (
        *(
            column("1.5", "x", "3", "4"),
            "3 rows with no number for a value: ['labels.csv:3', 'labels.csv:7', 'labels.csv:11']",
        ),
        *("problem_type", "regression"),
    ),
    "not one": (
        *(column("0.5,0.5", "0.5,0.2", name="a,b"), "6 rows with probabilities that do not sum to 1: ['labels.csv:3'"),
        *("problem_type", "soft_labels"),
    ),
    "more than one": (
        *(column("1,0", "0,1", "1,1", name="a,b"), "4 rows with not one label: ['labels.csv:4'"),
        *("problem_type", "single_label_classification"),
    ),
}


@pytest.mark.parametrize("case", SAID)
def test_what_is_said(case, tmp_path, caplog):
    text, message, *flags = SAID[case]
    with caplog.at_level(logging.INFO):
        read(table(tmp_path, text), *([f"--{flags[0]}", *flags[1:]] if flags else []))
    assert message in caplog.text


def test_numbers_are_classes_in_the_order_of_their_values(tmp_path):
    assert read(table(tmp_path / "table", "image,label\n" + column(10, 9, 2).split("\n", 1)[1]))[0].names == (
        "2",
        "9",
        "10",
    )
    for row in range(12):
        sets.save(tmp_path / "folders" / str((2, 10, 9)[row % 3]) / f"{row}.png", sets.SINGLE, row)
    assert read(tmp_path / "folders")[0].names == ("2", "9", "10")


def test_many_labels_are_counted_in_a_line(tmp_path, caplog):
    rows = "".join(f"{row % 12}.png,name {row // 2}\n" for row in range(60)) + "0.png,rare\n" + "1.png,name 0\n" * 5
    with caplog.at_level(logging.INFO):
        read(table(tmp_path, "image,label\n" + rows), "--problem_type", "single_label_classification")
    line = next(record.message for record in caplog.records if "31 labels" in record.message)
    assert "31 labels: name 0 7, " in line and line.endswith("and 11 more down to rare 1")


def test_folders_that_can_be_read_in_two_ways(tmp_path, caplog):
    sets.splits_in_labels(tmp_path)
    sets.save(tmp_path / "bird" / "1.png", sets.SINGLE, 0)
    with pytest.raises(ValueError, match=r"found .*/train/.*png and bird/1.png; lay them out as train/LABEL"):
        read(tmp_path)
    deep = tmp_path / "deep"
    sets.deep_folders(deep)
    with caplog.at_level(logging.INFO):
        assert read(deep)[0].names == ("Kuh", "cat", "dog")
    assert "those below them (batch0, batch1) are passed through: --label_level 2 would make them" in caplog.text
    assert read(deep, "--label_level", "-1")[0].names == ("batch0", "batch1")


def test_a_form_of_kaggle_is_no_table_of_labels(tmp_path, caplog):
    sets.kaggle(tmp_path)
    with caplog.at_level(logging.INFO):
        _, splits = read(tmp_path)
    assert "left out, a form to fill in: sample_submission.csv" in caplog.text
    assert "split test: the 4 pictures of test, unlabelled" in caplog.text
    (tmp_path / "test.csv").write_text("id\n" + "".join(f"b{row}\n" for row in (2, 0)))
    _, splits = read(tmp_path)
    assert splits["test"]["__row__"][:] == ["test.csv:2", "test.csv:3"] and "labels" not in splits["test"].column_names


def test_rows_to_be_labelled_stand_beside_labelled_ones(tmp_path, caplog):
    rows = column("cat", "dog").splitlines()
    (table(tmp_path, "") / "labels.csv").unlink()
    (tmp_path / "train.csv").write_text("\n".join(rows[:9]))
    (tmp_path / "test.csv").write_text("\n".join([rows[0], rows[9], "9.png,", "10.png,cow"]))
    with caplog.at_level(logging.INFO):
        problem, splits = read(tmp_path)
    assert splits["test"]["labels"][:] == [problem.names.index("cat"), UNKNOWN, UNKNOWN]
    assert "1 rows with no label, predicted and not judged: ['test.csv:3']" in caplog.text
    assert "1 rows with a label outside the 2 known, predicted and not judged: ['test.csv:4']" in caplog.text


def test_lists_beside_folders_are_refused(tmp_path):
    """As the lists of boxes of Tiny ImageNet are, which stand beside its folders of labels."""
    sets.class_folders(tmp_path)
    (tmp_path / "train.txt").write_text("".join(f"Kuh/{row}.png 3 4\n" for row in (2, 5, 8)))
    with pytest.raises(
        ValueError, match=r"lists without a header .train.txt. .* --label_column label reads the lists, "
    ):
        read(tmp_path)
    problem, splits = read(tmp_path, "--label_level", "1")
    assert problem.names == ("Kuh", "cat", "dog") and len(splits["train"]) == 12


def test_a_list_may_have_the_label_first(tmp_path):
    lines = "".join(f"{sets.label_of(row)} {row}.png\n" for row in range(12))
    (table(tmp_path, "") / "labels.csv").unlink()
    (tmp_path / "train.txt").write_text(lines)
    problem, splits = read(tmp_path)
    assert [problem.names[label] for label in splits["train"]["labels"]] == [sets.label_of(row) for row in range(12)]


def test_an_index_column_is_no_label(tmp_path):
    rows = "".join(f"{row},{row}.png,{row % 2},{row % 3 // 2}\n" for row in range(12))
    assert read(table(tmp_path, ",image,red,round\n" + rows))[0].names == ("red", "round")


def test_pictures_may_lie_in_parts_and_in_folders_of_their_own_name(tmp_path):
    """As those of HAM10000 and of CelebA do; a file of the same name in two parts is refused."""
    for row in range(12):
        sets.save(tmp_path / f"part_{row % 2}" / "part" / f"{row}.png", sets.SINGLE, row)
    (tmp_path / "all.csv").write_text("image,label\n" + "".join(f"{row},{sets.label_of(row)}\n" for row in range(12)))
    problem, splits = read(tmp_path)
    assert [problem.names[row["labels"]] for row in splits["train"]] == [sets.label_of(row) for row in range(12)]
    assert [sets.truth_of(sets.SINGLE, row["image"]) for row in splits["train"]] == [
        sets.label_of(r) for r in range(12)
    ]
    sets.save(tmp_path / "part_1" / "part" / "0.png", sets.SINGLE, 1)
    with pytest.raises(
        ValueError, match=r"found files of these names in .*part_0/part and in .*part_1/part; set --image_folder"
    ):
        read(tmp_path)


def test_a_validation_split_of_other_labels_is_refused(tmp_path):
    """As that of Tiny ImageNet, whose pictures lie in val/images."""
    for row in range(12):
        sets.save(tmp_path / "train" / sets.label_of(row) / f"{row}.png", sets.SINGLE, row)
        sets.save(tmp_path / "val" / "images" / f"{row}.png", sets.SINGLE, row)
    given = {"dataset": tmp_path, "do_train": True, "do_eval": True, "output_dir": tmp_path / "run", "max_steps": 1}
    with pytest.raises(ValueError, match="in split 'validation', found none of them: images in place of Kuh, cat, dog"):
        run_here(train_classification, **given)
