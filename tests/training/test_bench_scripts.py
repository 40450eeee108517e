"""The benchmarks of starting, of the joined loss and of a recipe's steps, at a size that is over at once."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def run(script: str, folder: Path, *options: object) -> tuple[list[dict], str]:
    """The cells that a script stores, and what it prints."""
    stored = folder / "cells.json"
    command = [sys.executable, FOLDER / script, "--output", stored, *options]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    return json.loads(stored.read_text()), done.stdout


def test_starting(tmp_path):
    cells, printed = run("bench_start.py", tmp_path, "--size", "tiny", "--ways", "package", "--rounds", 1)
    seconds = {cell["step"]: cell["seconds"] for cell in cells}
    whole = seconds.pop("all")
    for side in ("vit_embed", "transformers"):
        assert whole[side] == pytest.approx([sum(each[side][0] for each in seconds.values())])
    assert "| package | from_pretrained |" in printed


@pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="open_clip is not installed")
def test_the_joined_loss(tmp_path):
    options = ("--processes", 2, "--batches", 4, "--counted", 16, 2048, "--rounds", 1)
    cells, printed = run("bench_loss.py", tmp_path, *options)
    found = {(cell["loss"], cell["how"], cell["what"]): cell[cell["what"]] for cell in cells}
    ways = {("gloo", "seconds"), ("gloo", "mib"), ("count", "mib"), ("count", "tflop")}
    assert set(found) == {(loss, *way) for loss in ("softmax", "sigmoid") for way in ways}
    for loss, num_products in (("softmax", 6), ("sigmoid", 3)):  # forward, and two of each in the backward pass
        expected = num_products * 2 * 2048 * 16 * 2048 * 512 / 1e12
        assert found[loss, "count", "tflop"]["vit_embed"] == pytest.approx([expected])
        assert found[loss, "count", "mib"]["vit_embed"] < found[loss, "count", "mib"]["open_clip"]
    assert "| softmax | 2 x 4 | seconds, gloo |" in printed


def test_a_step_of_a_recipe(tmp_path):
    options = ("--models", "tiny", "--dtypes", "fp32", "--workers", 0, "--steps", 6, "--threads", 1)
    (cell,), printed = run("bench_recipe.py", tmp_path, *options)
    step, data, optimizer = (cell["seconds"][name] for name in ("step", "data", "optimizer"))
    assert len(step) == len(data) == len(optimizer) == 6 - 1 - 3  # without the last and those that warm up
    assert all(wait + update < whole for whole, wait, update in zip(step, data, optimizer))
    assert "| tiny fp32, workers: 0 |" in printed
