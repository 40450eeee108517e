"""What a new process needs to its first embedding: imports, loading, the first image. vit_embed against transformers.

    python benchmarks/bench_start.py --output benchmarks/start.json

One CLIPModel folder of random weights, and the same saved by vit_embed with its code, each side in a new interpreter
every round, bytecode and files in the cache. `package` names the class; `Auto` asks AutoModel, of vit_embed with
`trust_remote_code`. The embeddings are compared first.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from dual_encoders import IMAGE_SIZE, START_TOKEN
from timing import CLOCK_HELP, CLOCKS, Ratios, about, interleave, machine, store, table
from transformers import CLIPConfig, CLIPModel

import vit_embed

SIDES = ("vit_embed", "transformers")
SIZES = {
    "B/32": {},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
}
IMPORTS = {
    ("package", "vit_embed"): "from vit_embed import VitEmbedForContrastive as Model",
    ("package", "transformers"): "from transformers import CLIPModel as Model",
    ("Auto", "vit_embed"): "from transformers import AutoModel as Model",
    ("Auto", "transformers"): "from transformers import AutoModel as Model",
}
# Seconds since the interpreter started, of which processor time knows and elapsed time does not: it counts from here.
PROCESS = """
import sys, time
clock = {clock}
started = 0.0 if clock is time.process_time else clock()
import torch, transformers
both = clock()
{imports}
imported = clock()
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
model = Model.from_pretrained(sys.argv[1], {options}).eval()
loaded = clock()
with torch.inference_mode():
    embeds = model.get_image_features(torch.ones(1, 3, {size}, {size}))
ended = clock()
embeds = embeds if isinstance(embeds, torch.Tensor) else embeds.pooler_output
print([started, both, imported, loaded, ended], embeds[0, :8].tolist(), sep="\\n")
"""
# What is timed, between which of those times. torch and transformers are what both sides import.
STEPS = {
    "import of torch and transformers": (0, 1),
    "import of the class": (1, 2),
    "from_pretrained": (2, 3),
    "first image": (3, 4),
    "all": (0, 4),
}
TOLERANCE = 1e-5  # of float32, relative: sums taken in another order


def save_checkpoints(size: str, root: Path) -> dict[str, Path]:
    """The folder that transformers writes, and the one that vit_embed makes of it."""
    torch.manual_seed(0)
    vision = {"patch_size": 32, "image_size": IMAGE_SIZE, **SIZES[size]}
    text = {"bos_token_id": START_TOKEN, **SIZES[size]}
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text)).save_pretrained(root / "transformers")
    model = vit_embed.VitEmbedForContrastive.from_pretrained(root / "transformers")
    model.save_pretrained(root / "vit_embed")
    return {name: root / name for name in SIDES}


def start(way: str, side: str, folders: dict[str, Path], clock: str) -> tuple[dict[str, float], list[float]]:
    """A new process: the seconds of its steps, and the first numbers of its embedding."""
    # `package` reads what CLIPModel wrote on both sides.
    folder = folders["transformers" if way == "package" else side]
    options = "trust_remote_code=True" if (way, side) == ("Auto", "vit_embed") else 'attn_implementation="sdpa"'
    code = PROCESS.format(
        clock=f"time.{CLOCKS[clock].__name__}", imports=IMPORTS[way, side], options=options, size=IMAGE_SIZE
    )
    environment = {**os.environ, "HF_HOME": str(folder.parent / "cache"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPYCACHEPREFIX"] = str(folder.parent / "bytecode")
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # as users have it
    done = subprocess.run([sys.executable, "-c", code, folder], stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"the process of {side}, {way}, ended with {done.returncode}; its own error stands above")
    times, embeds = map(json.loads, done.stdout.splitlines()[-2:])
    return {step: times[last] - times[first] for step, (first, last) in STEPS.items()}, embeds


def measure(way: str, folders: dict[str, Path], args: argparse.Namespace) -> list[dict]:
    """A cell a step."""
    what = f"{way}, {args.size}"
    embeds = [torch.tensor(start(way, side, folders, args.clock)[1]) for side in SIDES]  # fills the caches, too
    difference = ((embeds[0] - embeds[1]).norm() / embeds[1].norm()).item()
    if not difference <= TOLERANCE:
        raise RuntimeError(f"{what}: embeddings differ by {difference:.1e}, expected {TOLERANCE:.0e} at most")
    calls = {side: lambda s=side: start(way, s, folders, args.clock)[0] for side in SIDES}
    found = interleave(what, calls, args.rounds)
    return [
        {
            "way": way,
            "size": args.size,
            "step": step,
            "seconds": {side: [each[step] for each in found[side]] for side in SIDES},
            "about": about(args.clock),
        }
        for step in STEPS
    ]


def line(cell: dict) -> tuple[str, ...]:
    seconds = cell["seconds"]
    medians = (f"{statistics.median(seconds[side]):.3f} s" for side in SIDES)
    return (cell["way"], cell["step"], *medians, *Ratios.of(seconds["vit_embed"], seconds["transformers"]).cells(3))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=["package", "Auto"], default=["package", "Auto"])
    parser.add_argument("--size", choices=list(SIZES), default="B/32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", choices=list(CLOCKS), default="cpu", help=CLOCK_HELP)
    parser.add_argument("--output", type=Path, help="JSON; a file keeps its other cells")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as root:
        folders = save_checkpoints(args.size, Path(root))
        cells = [cell for way in args.ways for cell in measure(way, folders, args)]
    if args.output:
        store(args.output, cells, ("way", "size", "step"))
    header = ("how", "step", *SIDES, "ratio", "range of ratios", "ratio of the best")
    sys.stdout.write(f"{machine()}, {args.clock} time, {args.size}\n\n{table(header, map(line, cells))}\n")


if __name__ == "__main__":
    main()
