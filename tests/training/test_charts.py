"""The charts of docs/ are drawn of the measurements that are stored, and a missing file is named."""

import json
import logging
import re
import shutil
import struct
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "benchmarks"))

import charts  # noqa: E402


def size_of(picture: Path) -> tuple[int, int]:
    head = picture.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:])


@pytest.mark.parametrize("name", [name for name, chart in charts.CHARTS.items() if (charts.HERE / chart.file).exists()])
def test_a_chart_is_drawn_as_wide_as_a_page_and_no_higher_than_a_screen(name, tmp_path):
    charts.main([name, "--folder", str(tmp_path)])
    (picture,) = tmp_path.iterdir()
    width, height = size_of(picture)
    assert picture.name == charts.CHARTS[name].picture and width == 840 and height <= 700


def test_a_missing_file_is_named_and_the_others_are_drawn(tmp_path, caplog):
    shutil.copy(charts.HERE / "sizes.json", tmp_path)
    with caplog.at_level(logging.WARNING):
        drawn = list(charts.draw(list(charts.CHARTS), tmp_path, tmp_path))
    assert [path.name for path in drawn] == ["sizes.png"]
    missing = {chart.file for name, chart in charts.CHARTS.items() if name != "sizes"}
    assert {Path(record.args[1]).name for record in caplog.records} == missing


def test_machine_versions_and_dates_stand_below_a_chart():
    cells = json.loads((charts.HERE / "towers.json").read_text())
    cells[0]["about"]["date"] = "2026-11-30"
    below = charts.origin(cells)
    for cell in cells:
        assert cell["about"]["date"] in below
        assert all(number in below for number in cell["about"]["versions"].values())
    assert re.search(r"Xeon.*1 thread", below)


def test_memory_and_training_are_drawn_of_the_cells_that_their_benchmarks_keep(tmp_path):
    about = json.loads((charts.HERE / "towers.json").read_text())[0]["about"]
    cell = {"class": "image tower", "image_size": 224, "dtype": "fp32", "about": about}
    cells = [{**cell, "mib": {"transformers": [4.0], "vit_embed": [3.0]}}]
    (tmp_path / "memory.json").write_text(json.dumps(cells))
    step = {"task": "depth", "size": "B/16", "dtype": "bf16", "batch": 2, "image_size": 224, "about": about}
    sides = {"transformers": [2.0, 3.0], "vit_embed": [1.0, 2.0], charts.HALF: [1.0, 1.0]}
    kinds = {"forward and backward": "seconds", "AdamW": "seconds", "peak memory": "mib"}
    cells = [{**step, "what": what, kind: sides} for what, kind in kinds.items()]
    (tmp_path / "training.json").write_text(json.dumps(cells))
    assert [path.name for path in charts.draw(["memory", "training"], tmp_path, tmp_path)] == [
        "memory.png",
        "training.png",
    ]
    assert charts.name_of(cells[0]) == charts.name_of(cells[2]) == "depth, B/16, 224 pixels, bf16"


def test_the_page_shows_charts_that_are_there():
    shown = re.findall(r"\]\(\.\./benchmarks/([\w.]+\.png)\)", (REPO / "docs" / "speed.md").read_text())
    assert set(shown) <= {chart.picture for chart in charts.CHARTS.values()}
    assert all((charts.HERE / picture).exists() for picture in shown)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_the_page_states_the_least_and_the_best_of_the_stored_towers(mode):
    cells = [cell for cell in json.loads((charts.HERE / "towers.json").read_text()) if charts.is_plain(cell)]
    of_mode = [cell for cell in cells if cell["mode"] == mode]
    for side in charts.OURS:
        medians = [charts.Span.of(cell, charts.fastest_peer([cell]), side).median for cell in of_mode]
        assert f"| {min(medians):.2f} - {max(medians):.2f} |" in (REPO / "docs" / "speed.md").read_text(), side
