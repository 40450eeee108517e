"""The benchmark of growth, on towers of a few hundred weights."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vit_embed import VitEmbedConfig, VitEmbedModelWithProjection

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import bench_growth  # noqa: E402
import bench_towers  # noqa: E402

TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 8,
}


@pytest.fixture
def tiny(monkeypatch):
    for name, fields in bench_growth.SIZES.items():
        monkeypatch.setitem(bench_growth.SIZES, name, {**fields, **TINY})
    monkeypatch.setattr(bench_growth, "IMAGES", {64: 2, 128: 1})
    # Roundings of so few numbers differ by more than those of a tower.
    monkeypatch.setattr(sys.modules["bench_towers"], "BF16_TOLERANCE", 2.0)


def cells_of(arguments: list[str], target: Path) -> list[dict]:
    bench_growth.main([*arguments, "--rounds", "1", "--output", str(target)])
    return json.loads(target.read_text())


def test_time_and_memory_of_every_side_are_kept(tiny, tmp_path, capsys):
    given = ["--part", "pixels", "batch", "towers", "--pixels", "64", "128", "--batches", "1", "2", "--towers", "S/16"]
    cells = cells_of(given, tmp_path / "growth.json")
    assert [(cell["part"], cell["at"], cell["count"]) for cell in cells[:2]] == [
        ("pixels", 64, 4096),
        ("pixels", 128, 16384),
    ]
    assert len(cells) == 2 + 2 * 2 + 1
    for cell in cells:
        for kept in (cell["seconds"], cell["mib"]):
            assert set(kept) == {"transformers", *bench_growth.OURS} and {len(values) for values in kept.values()} == {
                1
            }
        assert {"machine", "versions", "date"} <= set(cell["about"])
    assert "| pixels | ViT-B/16, 1 image | 64 to 128 | transformers |" in capsys.readouterr().out


def test_fewer_tokens_are_counted_before_they_are_timed(tiny, tmp_path):
    cells = cells_of(["--part", "fewer", "attention", "--sizes", "64", "128"], tmp_path / "growth.json")
    tokens = {(cell["what"], cell["at"]): cell["tokens"] for cell in cells if cell["part"] == "fewer"}
    assert tokens[("token_merge_size", 128)] == "64 to 60" and tokens[("patch_drop_rate", 128)] == "32"
    assert 16 < int(tokens[("adaptive stem", 128)]) < 64  # half of 16 cells, as far as so small a gate can tell
    assert [set(cell["seconds"]) for cell in cells if cell["part"] == "attention"] == [{"sdpa", "eager"}] * 2


def test_an_exponent_is_the_power_of_the_count():
    counts = [1, 4, 16, 64]
    assert bench_growth.slope(counts, [3 * count**1.5 for count in counts]) == pytest.approx(1.5)
    cells = [
        {
            "part": "batch",
            "what": "x",
            "at": count,
            "count": count,
            "seconds": {
                "transformers": [count],
                "timm": [count * 0.9],
                "vit_embed": [count**2],
                "optimized": [count**0.5],
            },
            "mib": {name: [count] for name in ("transformers", "timm", "vit_embed", "optimized")},
        }
        for count in counts
    ]
    assert bench_growth.exponents(cells) == [
        ("batch", "x", "1 to 64", "timm", "1.00", "2.00", "0.50", "1.00", "1.00", "1.00")
    ]


def test_products_alone_are_those_of_the_tower():
    config = VitEmbedConfig(**{**TINY, "num_hidden_layers": 6}, image_size=(64, 32), patch_size=8)
    model, flops = VitEmbedModelWithProjection(config).eval(), []
    pixels = torch.randn(3, 3, 64, 32)
    for call in (lambda: model.get_image_features(pixels), bench_towers.products_alone(config, 3, torch.float32)):
        with torch.inference_mode(), FlopCounterMode(display=False) as counted:
            call()
        products = (torch.ops.aten.addmm, torch.ops.aten.mm)
        flops.append(sum(counted.get_flop_counts()["Global"].get(product, 0) for product in products))
    assert flops[1] == pytest.approx(flops[0], rel=0.03)  # less the rows of the last layer and of no patch
