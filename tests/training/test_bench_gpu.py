"""The script for a GPU, on a CPU: all of it with tiny models, and what CUDA alone has with stand-ins."""

import json
import subprocess
import sys
import warnings
from argparse import Namespace
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench_gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import bench_gpu

    return bench_gpu


def test_the_whole_script_on_a_cpu(tmp_path):
    stored = tmp_path / "gpu.json"
    command = [sys.executable, FOLDER / "bench_gpu.py", "--device", "cpu", "--tiny", "--rounds", "1"]
    command += ["--peers", "transformers", "--output", stored]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    cells = json.loads(stored.read_text())
    measured = {(cell["part"], cell["mode"], cell["attention"]) for cell in cells}
    ways = {(mode, attention) for mode in ("eager", "compiled") for attention in ("sdpa", "flash")}
    texts_and_steps = {("text", "eager", "sdpa"), ("step", "eager", "sdpa"), ("step", "compiled", "sdpa")}
    assert measured == {("tower", *way) for way in ways} | texts_and_steps
    assert all(len(seconds) == 1 for cell in cells for seconds in cell["seconds"].values())
    assert "left out: tower, tiny, 1, graphs, sdpa: CUDA graphs need CUDA" in done.stdout
    assert "failed" not in done.stdout and "| tiny bf16, batch 4, eager, sdpa |" in done.stdout


class Event:
    """CUDA's, of a device on which time is the number of events."""

    made = 0

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        Event.made += 1
        self.time = Event.made

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: "Event") -> float:
        return float(end.time - self.time)


def test_what_a_gpu_adds(bench_gpu, monkeypatch, tmp_path):
    """Events, waits, share of the peak and CUDA graphs, and a cell that fails."""
    monkeypatch.setattr(bench_gpu, "on_gpu", lambda args: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    output = tmp_path / "gpu.json"
    args = Namespace(
        device=torch.device("cpu"), tiny=True, budget_s=300, peers=["transformers"], rounds=2, output=output
    )
    args.chip = "NVIDIA H200"
    monkeypatch.setattr(bench_gpu, "ROUND_S", 0.002)  # two calls of a millisecond
    right = bench_gpu.Cell("tower", "tiny", 2, "graphs")
    wrong = right._replace(part="step", size="L/14")
    found, left_out, failed = bench_gpu.measure_all([right, wrong], args)
    assert set(failed) == {wrong} and "KeyError" in failed[wrong] and not left_out
    (cell,) = found
    assert all(seconds == [0.0005] * 2 for seconds in cell["seconds"].values())
    assert modes == ["warn", "default"] * len(cell["seconds"])
    assert all(set(waits.values()) == {0} for waits in cell["waits"].values())
    pixels = torch.randn(2, 3, bench_gpu.IMAGE_SIZE, bench_gpu.IMAGE_SIZE)
    flops = bench_gpu.flops_of(lambda: bench_gpu.make_ours("tiny").optimized().get_image_features(pixels))
    assert cell["peak"]["optimized"] == pytest.approx(flops / 0.0005 / 989.5e12)
    assert "NVIDIA H200; " in json.loads(output.read_text())[0]["about"]["machine"]
    assert "0/0/0" in bench_gpu.tables_of(found)


def test_waits_are_counted(bench_gpu, monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def call() -> None:
        if modes[-1] == "warn":
            warnings.warn(f"{bench_gpu.WAITED} (of c10/cuda)", stacklevel=1)
        for name in ("cudaStreamSynchronize", "cudaDeviceSynchronize", "Memcpy DtoH (Device -> Pageable)"):
            with torch.profiler.record_function(name):
                pass

    assert bench_gpu.waits_of(call) == {"warnings": 1, "synchronizations": 1, "copies": 1}


def test_cells_stay_within_the_budget(bench_gpu):
    args = Namespace(device=torch.device("cpu"), budget_s=300)
    cell = bench_gpu.Cell("tower", "L/14", 64, "compiled")
    for longest, left, is_measured in (
        ({}, 1.0, True),
        ({}, -1.0, False),
        ({("B/16", "compiled"): 20.0}, 30.0, False),  # a size that is new
        ({("B/16", "compiled"): 20.0}, 50.0, True),
        ({("B/16", "compiled"): 20.0, ("L/14", "compiled"): 25.0}, 30.0, True),
        ({("L/14", "eager"): 40.0}, 30.0, True),
    ):
        reason = bench_gpu.why_not(cell, args, longest, left)
        assert reason == (None if is_measured else "300 s are over"), (longest, left)


@pytest.mark.parametrize(
    ("chip", "peak"),
    [
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
    ],
)
def test_the_peak_of_a_chip(bench_gpu, chip, peak):
    assert bench_gpu.peak_of(chip) == peak
    assert bench_gpu.peak_of("Tesla T4") is None
