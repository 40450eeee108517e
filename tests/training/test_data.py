"""recipes/data.py: names of rows, what is held out, what is checked, and what is drawn."""

import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

from recipes.arguments import DataArguments
from recipes.data import (
    ROW,
    Finding,
    Report,
    SeededRows,
    check_rows,
    hold_out,
    require_splits,
    seeded,
    wanted_splits,
)


def test_a_validation_split_is_held_out_where_there_is_none():
    rows = Dataset.from_dict({"x": list(range(20)), ROW: list(range(20))})
    arguments = DataArguments(dataset="data", validation_share=0.25)
    first, again, other = (hold_out(DatasetDict(train=rows), arguments, seed) for seed in (0, 0, 1))
    assert first["validation"]["x"][:] == again["validation"]["x"][:] != other["validation"]["x"][:]
    assert len(first["validation"]) == 5
    assert sorted(first["train"]["x"][:] + first["validation"]["x"][:]) == list(range(20))
    assert first["validation"][ROW][:] == first["validation"]["x"][:], "rows keep the numbers of the file"
    whole = DatasetDict(train=rows, validation=rows)
    assert hold_out(whole, arguments, 0) is whole
    with pytest.raises(ValueError, match=r"--validation_share in \(0, 1\), got 1"):
        DataArguments(dataset="data", validation_share=1.0)


def test_splits_that_are_asked_for_and_missing_are_named():
    asked = type("Training", (), {"do_train": True, "do_eval": True, "do_predict": True})
    wanted = wanted_splits(DataArguments(dataset="data", validation_split="test"), asked, {})
    assert wanted == ["train", "test"], "each once"
    check = DataArguments(dataset="data", check_only=True)
    assert wanted_splits(check, asked, {"test": None, "other": None, "train": None}) == ["train", "test"]
    with pytest.raises(ValueError, match=r"expected splits \['test'\] in data, found \['train'\]; set --train_split"):
        require_splits({"train": None}, wanted, "data")


def test_findings_are_counted_and_named_by_the_users_own_rows(caplog, tmp_path):
    rows = Dataset.from_dict({ROW: [f"cat/{number}.png" for number in range(20)]})

    def examine(row: int) -> list[Finding]:
        bad, cut = Finding("an unreadable picture"), Finding("a caption too long, cut", drop=False)
        return [bad] * (row < 12) + [cut] * (row in (3, 13)) + [Finding("a note", False, logging.INFO)] * (row == 19)

    report = Report()
    with caplog.at_level(logging.INFO):
        kept = check_rows(rows, "train", examine, report)
    assert len(kept) == 8 and kept[0][ROW] == "cat/12.png"
    assert "split train: 12 rows with an unreadable picture: ['cat/0.png', 'cat/1.png'" in caplog.text
    assert "'cat/9.png'] ..." in caplog.text and "8 rows kept, 12 dropped" in caplog.text
    assert "split train: 2 rows with a caption too long, cut: ['cat/3.png', 'cat/13.png']" in caplog.text
    levels = {record.message.split(" rows with ")[-1][:6]: record.levelname for record in caplog.records}
    assert levels["an unr"] == "WARNING" and levels["a note"] == "INFO"
    assert report.num_left_out() == 12
    assert report.notes() == {
        "train": [
            *("8 rows, 12 left out", "12 left out with an unreadable picture"),
            *("2 rows with a caption too long, cut", "1 rows with a note"),
        ]
    }
    report.write(tmp_path / "found.csv")
    lines = (tmp_path / "found.csv").read_text().splitlines()
    assert len(lines) == 16 and lines[:2] == ["split,row,found,left out", "train,cat/0.png,an unreadable picture,True"]
    with pytest.raises(ValueError, match="none of 12 are: 12 with an unreadable picture"):
        check_rows(rows.select(range(12)), "train", examine)
    with pytest.raises(ValueError, match="it is empty"):
        check_rows(rows.select([]), "train", examine)


def draw_number(row: int) -> dict:
    return {"row": row, "torch": torch.rand(()), "numpy": np.random.rand(), "python": random.random()}


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


@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_that_vanishes_while_training_is_named_once_and_replaced_by_the_next(workers, tmp_path, caplog):
    """Also where a worker reads it."""
    files = [tmp_path / f"{number}.txt" for number in range(6)]
    for file in files:
        file.write_text(file.stem)
    rows = Dataset.from_dict({"file": list(map(str, files)), ROW: [file.name for file in files]})
    made = SeededRows(rows, lambda row: int(Path(row["file"]).read_text()), seed=0)
    files[2].unlink(), files[5].unlink()
    loader = torch.utils.data.DataLoader(made, num_workers=workers, batch_size=None)
    assert [list(loader), list(loader)] == [[0, 1, 3, 3, 4, 0]] * 2
    assert made.lost.tolist() == [False, False, True, False, False, True]
    if not workers:
        assert caplog.text.count("row 2.txt could be read and cannot now: [Errno 2]") == 1


def test_a_fault_of_ours_is_no_vanished_row_and_a_lost_disk_ends_the_run(tmp_path):
    def fail(error: Exception):
        def make(row):
            raise error

        return make

    for error in (ValueError("ours"), OSError("gone")):
        with pytest.raises(type(error)):
            SeededRows(range(100), fail(error), seed=0)[3]
        with pytest.raises(type(error)):
            SeededRows(range(2), fail(error), seed=0)[1]
