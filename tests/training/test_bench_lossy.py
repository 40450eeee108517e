"""The benchmark of lossy options, on models of a few hundred weights and six drawings of noise."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from PIL import Image
from tiny import dual_config, randomised, vision_config
from tiny_tokenizer import write_tokenizer

from vit_embed import VitEmbedForContrastive, VitEmbedModel

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
COUNT = 6


@pytest.fixture
def bench_lossy(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import bench_lossy

    monkeypatch.setattr(bench_lossy, "keep_freed_memory", lambda: None)  # of the process that tests
    monkeypatch.setattr(bench_lossy, "PHOTOS", ("chelsea",))
    # Random weights make other pictures of merged tokens.
    monkeypatch.setattr(bench_lossy, "FLOORS", {**bench_lossy.FLOORS, "merging": -1, "int8": 0.9})
    return bench_lossy


@pytest.fixture
def given(tmp_path) -> list[str]:
    """The arguments that name models and data."""
    pixels = np.random.default_rng(0).integers(0, 255, (COUNT, 40, 40, 3), dtype=np.uint8)
    pictures = list(map(Image.fromarray, pixels))
    codepoints = [f"1F40{number}" for number in range(COUNT)]
    emoji = {"image": pictures, "codepoints": codepoints}
    named = Dataset.from_dict({"image": pictures, "name": ["cat", "flower", "rocket", "photo", "a", "b"]})
    data = {
        "icons": {"test": named, "test_emoji": named},
        "emoji": {
            "train": Dataset.from_dict({**emoji, "vendor": ["noto"] * COUNT}),
            "test": Dataset.from_dict({**emoji, "vendor": ["twemoji"] * COUNT}),
        },
    }
    for name, splits in data.items():
        DatasetDict(splits).save_to_disk(str(tmp_path / name))
    write_tokenizer(tmp_path / "icon_model")
    randomised(VitEmbedForContrastive(dual_config())).save_pretrained(tmp_path / "icon_model")
    randomised(VitEmbedModel(vision_config())).save_pretrained(tmp_path / "vit")
    return [each for name in ("icon_model", "vit", *data) for each in (f"--{name}", str(tmp_path / name))]


def test_speed_size_and_accuracy_of_every_side_are_kept_and_drawn(bench_lossy, given, tmp_path, capsys):
    stored = tmp_path / "lossy.json"
    bench_lossy.main([*given, "--rounds", "1", "--batch", "2", "--json", str(stored)])
    cells = json.loads(stored.read_text())
    models = ("icon checkpoint", "ViT-S/14")
    parts = (("speed", 1), ("speed", 2), ("accuracy", None))
    assert [(each["model"], each["part"], each["batch"]) for each in cells] == [
        (m, *part) for m in models for part in parts
    ]
    for cell in cells:
        sides = cell["seconds"] if cell["part"] == "speed" else cell["figures"]
        assert {"float32", "bfloat16", "int8, torch", "merging 1, float32", "merging 2, int8, torch"} <= set(sides)
        assert {"machine", "versions", "date"} <= set(cell["about"])
        if cell["part"] == "speed":
            assert {len(rounds) for rounds in sides.values()} == {1} and cell["mib"].keys() == sides.keys()
            assert cell["mib"]["int8, torch"] < cell["mib"]["float32"]
    # The two vendors' drawings are the same pictures here, so each finds its own.
    assert all(figures["R@1 emoji"] == [1, 0] for figures in cells[-1]["figures"].values())
    assert {"R@1 test", "R@1 test_emoji", "cosine"} == set(cells[2]["figures"]["float32"])
    assert len(bench_lossy.draw(cells).axes) == len(models)
    assert "| int8, torch | " in capsys.readouterr().out


def test_a_side_that_has_lost_too_much_is_not_timed(bench_lossy, given, monkeypatch):
    monkeypatch.setattr(bench_lossy, "FLOORS", {**bench_lossy.FLOORS, "int8": 1.0})
    with pytest.raises(RuntimeError, match="ViT-S/14, batch 1, int8.*: expected a least cosine of 1.0"):
        bench_lossy.main([*given, "--rounds", "1", "--part", "speed", "--models", "ViT-S/14"])
