"""The benchmarks of training steps and of memory run, and keep what they print."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 128}


@pytest.fixture
def benchmark(monkeypatch):
    """A call of a benchmark with arguments, as from the command line."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def run(name: str, *arguments: str):
        script = __import__(name)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        threads = torch.get_num_threads()
        try:
            return script.main()
        finally:
            torch.set_num_threads(threads)

    return run


@pytest.mark.parametrize("task", ["contrastive", "classification", "depth"])
def test_training_steps_are_compared_and_kept(task, benchmark, monkeypatch, tmp_path, capsys):
    # Roundings of so few numbers differ by more than those of a tower.
    monkeypatch.setattr(__import__("bench_training"), "BF16_TOLERANCE", 2.0)
    output = tmp_path / "training.json"
    tiny = ["--batch_size", "3", "--image_size", "64", "--rounds", "1", "--sizes", "B/16", "--fields", json.dumps(TINY)]
    parts = ["--parts", "time", "optimizer", "memory", "--output", str(output)]
    benchmark("bench_training", "--tasks", task, *tiny, *parts)
    cells = json.loads(output.read_text())
    kinds = ["forward and backward", "AdamW", "peak memory"]
    assert [(cell["dtype"], cell["what"]) for cell in cells] == [(d, kind) for d in ("fp32", "bf16") for kind in kinds]
    for cell in cells:
        sides = cell.get("seconds") or cell["mib"]
        assert {"transformers", "vit_embed"} <= set(sides) and all(min(rounds) > 0 for rounds in sides.values())
        assert ("vit_embed, half the patches" in sides) == (task != "depth" and cell["what"] != "AdamW")
    assert cells[0]["errors"]["gradients"] <= 1e-5
    assert f"peak memory, {task} B/16 bf16, 64 pixels" in capsys.readouterr().out


def test_unequal_sides_are_not_timed(benchmark, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    bench_training = __import__("bench_training")
    pair = bench_training.make_pair("classification", 16, 32, TINY)
    batch = bench_training.batch_of("classification", 2, 32)
    bench_training.check_equal("equal", pair, batch, "bf16")
    pair.ours.classifier.bias.data[0] += 1
    with pytest.raises(RuntimeError, match="changed: expected relative distances of at most.*got {'loss'"):
        bench_training.check_equal("changed", pair, batch, "fp32")


def test_memory_is_counted_alike_with_and_without_values(benchmark, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    bench_memory = __import__("bench_memory")
    monkeypatch.setattr(bench_memory, "TRUNK", {**TINY, "num_hidden_layers": 12, "patch_size": 16})
    found = []
    for options in ([], ["--with_values"]):
        output = tmp_path / f"memory{len(options)}.json"
        arguments = ["--image_size", "32", "64", "--batch_size", "2", "--output", str(output), *options]
        assert benchmark("bench_memory", "--classes", "classification", "dual encoder", "depth, dpt", *arguments) in (
            0,
            1,
        )
        found.append([(cell["class"], cell["image_size"], cell["mib"]) for cell in json.loads(output.read_text())])
    assert len(found[0]) == 6 and found[0] == found[1]
    assert set(found[0][0][2]) == {"transformers", "vit_embed", "optimized"}
