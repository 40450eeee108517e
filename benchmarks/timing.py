"""What the benchmarks share: rounds that measure all sides in turn, what is made of them, memory, and tables.

Every round measures every side, in an order that is swapped from round to round, so what else the machine does reaches
all of them alike: read the ratios, not the times.
"""

from __future__ import annotations

import ctypes
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from tqdm import tqdm

CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}
CLOCK_HELP = "cpu: processor time, which other processes disturb least; wall: elapsed time, for more than one thread"
MIB = 2**20
# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4


# --- rounds ---


def interleave(what: str, calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list]:
    """What `rounds` calls of each side return; the order of the sides is swapped from round to round."""
    results = {name: [] for name in calls}
    for i in tqdm(range(rounds), desc=what, file=sys.stderr):
        for name in list(calls) if i % 2 == 0 else reversed(calls):
            results[name].append(calls[name]())
    return results


def timed(call: Callable[[], object], clock: Callable[[], float]) -> Callable[[], float]:
    """A call that returns its own seconds."""

    def measure() -> float:
        started = clock()
        call()
        return clock() - started

    return measure


class Ratios(NamedTuple):
    """Of values that were measured side by side: median and range over the rounds, and that of each side's best."""

    median: float
    lowest: float
    highest: float
    of_best: float

    @classmethod
    def of(cls, values: Sequence[float], others: Sequence[float]) -> Ratios:
        ratios = [value / other for value, other in zip(values, others)]
        return cls(statistics.median(ratios), min(ratios), max(ratios), min(values) / min(others))

    def cells(self, digits: int) -> tuple[str, str, str]:
        spread = f"{self.lowest:.{digits}f} - {self.highest:.{digits}f}"
        return f"{self.median:.{digits}f}", spread, f"{self.of_best:.{digits}f}"


def median_and_range(values: Sequence[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} - {max(values):.{digits}f})"


# --- processes and memory ---


def in_fork(function: Callable, *args):
    """`function(*args)` in a fork of this process: what is imported is there, and nothing of earlier calls."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as fork:
        return fork.submit(function, *args).result()


def memory_mib(field: str) -> float:
    """VmRSS, memory held now, or VmHWM, its peak since the last reset (Linux only)."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / MIB


def reset_peak() -> None:
    """Starts VmHWM anew."""
    Path("/proc/self/clear_refs").write_text("5")


def _set_malloc(**options: int) -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for name, value in options.items():
            libc.mallopt(globals()[name], value)


def keep_freed_memory() -> None:
    """Makes glibc's malloc reuse what was freed instead of returning it to the system.

    Without this the page faults of large activations, a tenth of the time, come and go with the layout of the heap:
    between two processes that run the same model, and between two models in one process.
    """
    _set_malloc(M_MMAP_MAX=0, M_TRIM_THRESHOLD=2**31 - 1)


def return_freed_memory() -> None:
    """Makes malloc give every freed tensor of 64 KiB and more back at once: otherwise resident memory holds the gaps of
    its heap, which are no tensors. It costs time."""
    _set_malloc(M_MMAP_THRESHOLD=64 * 1024)


# --- what is kept: JSON lists of cells, which benchmarks/charts.py draws ---


def about(clock: str, packages: Sequence[str] = ()) -> dict[str, object]:
    """Machine, versions (of torch, transformers and `packages`) and date, that go with every cell."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", *packages)}
    today = datetime.date.today().isoformat()
    return {"machine": machine(), "versions": versions, "date": today, "clock": clock}


def store(path: Path, cells: Sequence[dict], keys: Sequence[str]) -> list[dict]:
    """Writes the cells into `path`, in place of those whose `keys` are the same, and returns all that it holds."""
    kept = {tuple(cell[key] for key in keys): cell for cell in json.loads(path.read_text())} if path.exists() else {}
    kept.update({tuple(cell[key] for key in keys): cell for cell in cells})
    aside = path.with_name(f"{path.name}.aside")
    aside.write_text("[\n" + ",\n".join(map(json.dumps, kept.values())) + "\n]\n")
    os.replace(aside, path)
    return list(kept.values())


# --- tables ---


def machine() -> str:
    """The processor's name and what it runs."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    return f"{named[1] if named else platform.processor()}, {torch.get_num_threads()} thread(s); {versions}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
