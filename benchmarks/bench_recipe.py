"""What a step of `examples/train_classification.py` waits for: data, the model, the optimizer.

    python benchmarks/bench_recipe.py --output benchmarks/recipe.json

Trains on a folder of 224-pixel JPEGs of photos with the recipe's own defaults, in a new process for each row, elapsed
time: it wants a machine that does nothing else. On a busy one `--clock cpu --threads 1 --workers 0` gives the shares of
the work. `data` is what the loop waits for a batch, `optimizer` is the
optimizer's step, `model` all else: forward and backward pass, clipping, the loop.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from bench_embed import write_pictures
from timing import CLOCK_HELP, CLOCKS, about, machine, store, table

from vit_embed import VitEmbedConfig

logger = logging.getLogger("bench_recipe")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SMALL = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {"B/32": {"patch_size": 32}, "S/16": {"patch_size": 16, **SMALL}, "tiny": {"patch_size": 56, **TINY}}
DTYPES = {"fp32": [], "bf16": ["--bf16"]}
IMAGE_SIZE = 224  # pixels
NUM_LABELS, NUM_OF_LABEL = 4, 64
WARM_UP = 3  # steps
CELL = ("model", "dtype", "workers", "threads")


def write_folder(folder: Path) -> None:
    """Photos by label, as the recipe reads them."""
    for label in range(NUM_LABELS):
        inner = folder / "train" / f"label{label}"
        inner.mkdir(parents=True)
        write_pictures(inner, (IMAGE_SIZE, IMAGE_SIZE), NUM_OF_LABEL)


def train(arguments: list[str], clock: Callable[[], float]) -> dict[str, list[float]]:
    """Runs the recipe in this process. Seconds of each step, of its wait for data and of its optimizer."""
    sys.path.insert(0, str(EXAMPLES))
    import train_classification

    from recipes.trainer import RecipeTrainer

    began, waits, optimized = [], [], []

    class Timed(RecipeTrainer):
        def get_batch_samples(self, *args, **kwargs):
            began.append(clock())
            batches = super().get_batch_samples(*args, **kwargs)
            waits.append(clock() - began[-1])
            return batches

        def create_optimizer(self, *args, **kwargs):
            optimizer, started = super().create_optimizer(*args, **kwargs), []
            optimizer.register_step_pre_hook(lambda *_: started.append(clock()))
            optimizer.register_step_post_hook(lambda *_: optimized.append(clock() - started.pop()))
            logger.info("optimizer: %s, fused=%s", type(optimizer).__name__, optimizer.defaults.get("fused"))
            return optimizer

    train_classification.RecipeTrainer = Timed
    sys.argv[1:] = arguments
    train_classification.main()
    steps = [after - before for before, after in zip(began, began[1:])]
    # The last step ends in saving, of which it is not known where it begins.
    return {"step": steps[WARM_UP:], "data": waits[WARM_UP : len(steps)], "optimizer": optimized[WARM_UP : len(steps)]}


def measure(model: str, dtype: str, workers: int, root: Path, args: argparse.Namespace) -> dict:
    """A cell, of a new process."""
    config = root / f"{model.replace('/', '')}.json"
    config.write_text(VitEmbedConfig(image_size=IMAGE_SIZE, **MODELS[model]).to_json_string())
    output = tempfile.mkdtemp(dir=root)
    flags = ["--dataset", root / "photos", "--config_name", config, "--output_dir", output, "--do_train", "--use_cpu"]
    flags += ["--max_steps", args.steps, "--report_to", "none", "--save_strategy", "no", *DTYPES[dtype]]
    flags += ["--dataloader_num_workers", workers]
    command = [sys.executable, __file__, "--threads", args.threads, "--clock", args.clock, "--job", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"training ended with {done.returncode}; its own error stands above")
    seconds = json.loads(done.stdout.splitlines()[-1])
    cell = {"model": model, "dtype": dtype, "workers": workers}
    return {**cell, "threads": args.threads, "seconds": seconds, "about": about(args.clock)}


def line(cell: dict) -> tuple[str, ...]:
    seconds = cell["seconds"]
    step, data, optimizer = (sum(seconds[name]) for name in ("step", "data", "optimizer"))
    shares = (data / step, optimizer / step, 1 - (data + optimizer) / step)
    what = f"{cell['model']} {cell['dtype']}, workers: {cell['workers']}"
    return (what, *(f"{share:.1%}" for share in shares), f"{statistics.median(seconds['step']):.3f} s")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["B/32", "S/16"])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1], help="processes that load")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help=CLOCK_HELP)
    parser.add_argument("--output", type=Path, help="JSON; a file keeps its other cells")
    parser.add_argument("--job", nargs=argparse.REMAINDER, help="for the processes that this script starts")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.job is not None:
        sys.stdout.write(json.dumps(train(args.job, CLOCKS[args.clock])) + "\n")
        return
    cells = []
    with tempfile.TemporaryDirectory() as name:
        write_folder(Path(name, "photos"))
        for model in args.models:
            for dtype in args.dtypes:
                for workers in args.workers:
                    cells.append(measure(model, dtype, workers, Path(name), args))
                    if args.output:
                        store(args.output, cells[-1:], CELL)
    header = ("training", "waits for data", "optimizer", "model", "a step")
    sys.stdout.write(f"{machine()}, {args.clock} time\n\n{table(header, map(line, cells))}\n")


if __name__ == "__main__":
    main()
