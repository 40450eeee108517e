"""A series of seeds: each is run once, one that was stopped goes on, and a failure ends the series."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "evaluation" / "over_seeds.py"

# Stands for a recipe: writes down its arguments, fails where --failing says so, else leaves the metrics of a test.
RECIPE = """
import argparse, json, pathlib, sys
parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int)
parser.add_argument("--output_dir", type=pathlib.Path)
parser.add_argument("--resume_from_checkpoint")
parser.add_argument("--failing", type=int)
parser.add_argument("--model_name_or_path")
arguments = parser.parse_args()
with open(arguments.output_dir.parent / "calls.txt", "a") as calls:
    print(arguments.seed, arguments.resume_from_checkpoint or arguments.model_name_or_path, file=calls)
arguments.output_dir.mkdir(exist_ok=True)
(arguments.output_dir / "checkpoint").touch()
if arguments.seed == arguments.failing and not (arguments.output_dir / "lucky").exists():
    sys.exit("out of luck")
metrics = {"test_accuracy": 0.5 + arguments.seed / 10, "test_runtime": 3.0, "test_epochs_seen": 2, "epoch": 1.0}
(arguments.output_dir / "test_results.json").write_text(json.dumps(metrics))
"""


def run(folder: Path, *recipe: str) -> subprocess.CompletedProcess:
    (folder / "recipe.py").write_text(RECIPE)
    command = [sys.executable, str(SCRIPT), "--seeds", "0", "1", "3", "--output_dir", str(folder / "runs"), "--"]
    return subprocess.run([*command, "python", str(folder / "recipe.py"), *recipe], capture_output=True, text=True)


def calls(folder: Path) -> list[str]:
    return (folder / "runs" / "calls.txt").read_text().splitlines()


def test_table_has_mean_and_range_and_a_second_stage_takes_up_its_own_seed(tmp_path):
    result = run(tmp_path, "--model_name_or_path", "first/seed-{seed}")
    assert result.returncode == 0, result.stderr
    rows = (tmp_path / "runs" / "metrics.md").read_text().splitlines()
    assert rows[0] == "| metric | mean (least - most) | seed 0 | seed 1 | seed 3 |"
    assert rows[2:] == [
        "| test_accuracy | 0.6333 (0.5000 - 0.8000) | 0.5000 | 0.6000 | 0.8000 |",
        "| test_epochs_seen | 2.0000 (2.0000 - 2.0000) | 2.0000 | 2.0000 | 2.0000 |",
    ]
    assert rows[2] in result.stdout
    assert calls(tmp_path) == ["0 first/seed-0", "1 first/seed-1", "3 first/seed-3"]


def test_a_failure_is_named_and_the_series_goes_on(tmp_path):
    result = run(tmp_path, "--failing", "1")
    assert result.returncode != 0 and "to end with 0, got 1" in result.stderr
    assert "out of luck" in (tmp_path / "runs" / "seed-1.log").read_text()
    other = run(tmp_path)
    assert other.returncode != 0 and "name another --output_dir" in other.stderr, "the folder is of another command"
    (tmp_path / "runs" / "seed-1" / "lucky").touch()
    assert run(tmp_path, "--failing", "1").returncode == 0
    assert calls(tmp_path) == ["0 None", "1 None", "1 True", "3 None"], "seed 0 is not run again"


def test_a_command_without_a_test_is_refused(tmp_path):
    (tmp_path / "runs").mkdir()
    nothing = [sys.executable, str(SCRIPT), "--seeds", "0", "--output_dir", str(tmp_path / "runs"), "--"]
    result = subprocess.run([*nothing, "python", "-c", "pass"], capture_output=True, text=True)
    assert "found none; add --do_predict" in result.stderr
    assert "expected a command after --" in subprocess.run(nothing, capture_output=True, text=True).stderr
