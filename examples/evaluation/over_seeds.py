"""Run a training script of examples/ with several seeds, and tabulate the metrics of its test.

    python examples/evaluation/over_seeds.py --seeds 0 1 2 --output_dir runs/digits-full -- \\
        python examples/train_classification.py --dataset data/digits --mode full --do_train --do_predict ...

Each run gets `--seed S --output_dir OUTPUT_DIR/seed-S` after its own arguments, and writes its log to
`OUTPUT_DIR/seed-S.log`; `{seed}` in an argument stands for S, so that a second stage starts from the first one's
(`--model_name_or_path runs/first/seed-{seed}`). A seed that has been tested is not run again and one that was stopped
goes on from its last checkpoint, so the same command continues a series; another one in its folder is refused. The
table, one row a metric with mean (least - most) of the seeds, is printed and written to `OUTPUT_DIR/metrics.md`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

RESULTS = "test_results.json"
# What Trainer measures of the machine, not of the model: endings of names.
NOT_A_METRIC = ("_runtime", "_per_second", "_preparation_time")


def run_seed(command: list[str], seed: int, output_dir: Path) -> dict[str, float]:
    """Run `command` with a seed to its end, unless it has been; return the metrics of its test.

    Raises:
        RuntimeError: the command failed, or ended without a test.
    """
    folder, log = output_dir / f"seed-{seed}", output_dir / f"seed-{seed}.log"
    results = folder / RESULTS
    if not results.exists():
        own = [argument.replace("{seed}", str(seed)) for argument in command]
        arguments = [*own, "--seed", str(seed), "--output_dir", str(folder)]
        if folder.exists() and any(folder.iterdir()):
            arguments += ["--resume_from_checkpoint", "True"]
        with open(log, "a", encoding="utf-8") as stream:
            code = subprocess.run(arguments, stdout=stream, stderr=subprocess.STDOUT).returncode
        if code != 0:
            raise RuntimeError(f"expected {' '.join(arguments)} to end with 0, got {code}; {log} says why")
        if not results.exists():
            raise RuntimeError(f"expected {results} from {' '.join(arguments)}, found none; add --do_predict")
    metrics = json.loads(results.read_text(encoding="utf-8"))
    return {name: value for name, value in metrics.items() if name != "epoch" and not name.endswith(NOT_A_METRIC)}


def check_same_command(command: list[str], output_dir: Path) -> None:
    """Note the command of a series in its folder; ValueError if the folder is of another one."""
    path = output_dir / "command.json"
    if not path.exists():
        path.write_text(json.dumps(command), encoding="utf-8")
    elif (before := json.loads(path.read_text(encoding="utf-8"))) != command:
        raise ValueError(
            f"expected the command that {output_dir} was started with, {' '.join(before)}; got {' '.join(command)}; "
            "name another --output_dir"
        )


def as_table(metrics_of: dict[int, dict[str, float]]) -> str:
    """Metrics by seed -> a Markdown table: a row a metric, mean (least - most), and the value of each seed.

    Raises:
        ValueError: the seeds have different metrics.
    """
    lines = ["| metric | mean (least - most) | " + " | ".join(f"seed {seed}" for seed in metrics_of) + " |"]
    lines.append("|" + "---|" * (2 + len(metrics_of)))
    first = next(iter(metrics_of.values()))
    for seed, metrics in metrics_of.items():
        if metrics.keys() != first.keys():
            raise ValueError(
                f"expected the same metrics of all seeds, seed {seed} differs in {metrics.keys() ^ first.keys()}"
            )
    for name in first:
        values = [metrics[name] for metrics in metrics_of.values()]
        spread = f"{statistics.mean(values):.4f} ({min(values):.4f} - {max(values):.4f})"
        lines.append(f"| {name} | {spread} | " + " | ".join(f"{value:.4f}" for value in values) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line, run every seed, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="what --seed is set to, in this order")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the runs, logs and the table")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command, with --do_predict")
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        parser.error("expected a command after --, got none")
    if command[0] == "python":
        command = [sys.executable, *command[1:]]
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    check_same_command(command, arguments.output_dir)
    metrics_of = {}
    for seed in tqdm(arguments.seeds, desc=str(arguments.output_dir)):
        metrics_of[seed] = run_seed(command, seed, arguments.output_dir)
        (arguments.output_dir / "metrics.md").write_text(as_table(metrics_of), encoding="utf-8")
    print(as_table(metrics_of))


if __name__ == "__main__":
    main()
