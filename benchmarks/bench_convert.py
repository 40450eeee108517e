"""Seconds and peak memory of converting a ViT-L/14 of OpenAI's layout, there and back.

    python benchmarks/bench_convert.py [--rounds 3] [--folder FOLDER]

The weights are random, of the sizes and in the form of OpenAI's own ViT-L-14.pt (428 M parameters in float16). Each
conversion runs in a process of its own, as a user would run it, comparison with OpenAI's code included where that is
installed. Memory is the highest that the process held, less what it held before it opened a file, in units of the
float32 weights.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from timing import median_and_range, table
from tqdm import tqdm

from vit_embed import VitEmbedConfig, VitEmbedForContrastive
from vit_embed.conversion.layouts.openai import HEAD_RULES, METADATA, TRUNK_RULES
from vit_embed.conversion.layouts.rules import reverse_rules

# arXiv:2103.00020 table 20.
VIT_L_14 = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "patch_size": 14,
    "projection_dim": 768,
    "text_config": {
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "projection_dim": 768,
    },
}

WATCHED = """
import sys, json
from vit_embed.convert_checkpoint import main

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))

before = peak()
assert main(sys.argv[1:]) == 0
print(json.dumps(peak() - before))
"""


def write_source(path: Path) -> int:
    """A state dict as `torch.save` stores OpenAI's, in float16; returns the bytes of the weights in float32."""
    config = VitEmbedConfig(**VIT_L_14)
    weights = {name: tensor.half() for name, tensor in VitEmbedForContrastive(config).state_dict().items()}
    state_dict = reverse_rules(weights, (*TRUNK_RULES, *HEAD_RULES))
    text = config.text_config
    sizes = (config.image_size, text.max_position_embeddings, text.vocab_size)
    state_dict.update({key: torch.tensor(size) for key, size in zip(METADATA, sizes)})
    torch.save(state_dict, path)
    return 4 * sum(tensor.numel() for tensor in weights.values())


def run(folder: Path, arguments: list[str]) -> tuple[float, int]:
    """Seconds and bytes of one conversion."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", WATCHED, *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return time.perf_counter() - start, json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "bench_convert")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    weights = write_source(given.folder / "ViT-L-14.pt")
    jobs = {
        "OpenAI float16 -> float32": ["ViT-L-14.pt", "--output_dir", "float32"],
        "OpenAI float16 -> bfloat16": ["ViT-L-14.pt", "--output_dir", "bfloat16", "--dtype", "bfloat16"],
        "float32 -> OpenAI": ["float32", "--reverse", "--layout", "openai", "--output_file", "back.pt"],
        "OpenAI float32 -> float32, 500 MB shards": ["back.pt", "--output_dir", "s", "--max_shard_size", "500MB"],
    }
    measured: dict[str, list[tuple[float, int]]] = {name: [] for name in jobs}
    for _ in tqdm(range(given.rounds), desc="rounds"):
        for output in ("float32", "bfloat16", "s"):
            shutil.rmtree(given.folder / output, ignore_errors=True)
        (given.folder / "back.pt").unlink(missing_ok=True)
        for name, arguments in jobs.items():
            measured[name].append(run(given.folder, arguments))
    print(f"{weights / 1e9:.2f} GB of float32 weights, {os.cpu_count()} cores, median (range) of {given.rounds}")
    rows = []
    for name, rounds in measured.items():
        seconds, peaks = zip(*((second, peak / weights) for second, peak in rounds))
        rows.append((name, median_and_range(seconds, 0), median_and_range(peaks, 2)))
    print(table(("", "seconds", "peak memory / float32 weights"), rows))


if __name__ == "__main__":
    main()
