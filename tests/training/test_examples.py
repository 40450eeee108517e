"""The scripts in examples/, run as a user runs them, on little."""

import gzip
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from tiny_tokenizer import write_tokenizer
from transformers import CLIPImageProcessor

REPO = Path(__file__).parent.parent
PICTURES = REPO / "examples" / "pictures"


def run(script: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPO / "examples" / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture
def some_pictures(tmp_path) -> Path:
    """A dozen pictures, one of them a text file with the name of a picture."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in sorted(PICTURES.glob("*.png"))[::24]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "broken.png").write_text("this is no picture")
    return folder


def test_the_demo_writes_a_sheet_and_names_what_it_cannot_read(some_pictures, tmp_path):
    output = tmp_path / "new" / "sheet.png"
    ran = run(
        *("search_pictures.py", "--pictures", some_pictures, "--queries", "animal", "costs $_$ a lot"),
        *("--output", output),
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    assert "broken.png is left out" in ran.stderr and "12 pictures searched" in ran.stderr
    sheet = Image.open(output).convert("RGB")
    assert sheet.width > 600 and sheet.height > 200
    assert len(sheet.getcolors(2**24)) > 500, "it shows pictures and attention, not blank axes"
    assert [path.name for path in output.parent.iterdir()] == ["sheet.png"]


def test_pictures_are_searched_as_they_look(tmp_path, monkeypatch, caplog):
    """Ink on nothing is ink on white, 16 bits keep their range; what is damaged or too large is left out."""
    monkeypatch.syspath_prepend(REPO / "examples")
    import search_pictures

    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(tmp_path / "nothing.png")
    Image.fromarray(np.full((9, 9), 32768, np.uint16)).save(tmp_path / "grey.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)).save(tmp_path / "damaged.png")
    content = bytearray((tmp_path / "damaged.png").read_bytes())
    second = content.index(b"IDAT", content.index(b"IDAT") + 1)
    content[second : second + 4] = bytes(4)
    (tmp_path / "damaged.png").write_bytes(content)
    Image.new("1", (900, 900)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300_000)
    read = {path.stem: picture for path, picture in search_pictures.read_pictures(sorted(tmp_path.iterdir()))}
    assert {name: picture.getpixel((4, 4)) for name, picture in read.items()} == {
        "nothing": (255, 255, 255),
        "grey": (128, 128, 128),
    }
    assert "damaged.png is left out" in caplog.text and "huge.png is left out" in caplog.text


def test_a_stock_clip_searches_too(some_pictures, tmp_path, monkeypatch, caplog):
    monkeypatch.syspath_prepend(REPO / "examples")
    import search_pictures

    tiny.clip_model().save_pretrained(tmp_path / "clip")
    write_tokenizer(tmp_path / "clip")
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**size).save_pretrained(tmp_path / "clip")
    asked = ["--model", tmp_path / "clip", "--pictures", some_pictures, "--queries", "cat"]
    asked += ["--output", tmp_path / "sheet.png"]
    with caplog.at_level(logging.INFO):
        search_pictures.main(list(map(str, asked)))
    assert "12 pictures searched" in caplog.text and (tmp_path / "sheet.png").stat().st_size > 10_000


def test_the_demo_says_what_is_wrong_with_an_empty_folder(tmp_path):
    ran = run("search_pictures.py", "--pictures", tmp_path, cwd=tmp_path)
    assert ran.returncode != 0 and "--pictures must be a folder with .png" in ran.stderr


def test_contrastive_training_end_to_end(some_pictures, tmp_path):
    """Image folder with captions -> two steps from the shipped checkpoint -> a folder that loads, and its metrics."""
    (some_pictures / "broken.png").unlink()
    data = tmp_path / "data"
    for split in ("train", "validation"):
        (data / split).mkdir(parents=True)
        rows = []
        for path in sorted(some_pictures.iterdir()):
            (data / split / path.name).write_bytes(path.read_bytes())
            rows.append({"file_name": path.name, "text": path.stem.replace("-", " ")})
        rows[0]["text"] = " "  # an empty caption is named and left out
        (data / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--dataset", data, "--caption_column", "text", "--model_name_or_path", REPO, "--output_dir", "run"]
    arguments += ["--do_train", "--do_eval", "--max_steps", 2, "--per_device_train_batch_size", 4, "--use_cpu"]
    arguments += ["--per_device_eval_batch_size", 4, "--save_steps", 1, "--report_to", "none"]
    ran = run("train_contrastive.py", *arguments, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "1 rows with empty caption: [0]" in ran.stderr
    metrics = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert metrics["eval_chance_recall@1"] == pytest.approx(1 / 11)
    assert metrics["eval_text_to_image_recall@10"] > 0.5 and metrics["eval_loss"] > 0
    for name in ("model.safetensors", "modeling_vit_embed.py", "tokenizer_config.json"):
        assert (tmp_path / "run" / name).exists()
    assert (tmp_path / "run" / "checkpoint-2" / "optimizer.pt").exists()
    again = run("train_contrastive.py", *arguments, cwd=tmp_path)
    assert again.returncode != 0 and "--resume_from_checkpoint" in again.stderr


def test_the_tokenizer_of_the_data_set_script(tmp_path):
    merges = [f"{chr(97 + i)} {chr(97 + j)}" for i in range(26) for j in range(26)]
    with gzip.open(tmp_path / "bpe.txt.gz", "wt") as file:
        file.write("\n".join(["#header", *merges]))
    arguments = ["--bpe_file", "bpe.txt.gz", "--tokenizer_dir", "out", "--vocab_size", 614]
    ran = run("build_emoji_dataset.py", *arguments, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    vocab = json.loads((tmp_path / "out" / "vocab.json").read_text())
    assert len(vocab) == 614 and vocab["<|endoftext|>"] == 613 and vocab["aa"] == 512
    again = run("build_emoji_dataset.py", *arguments, cwd=tmp_path)
    assert again.returncode == 1 and "expected out not to exist" in again.stderr
