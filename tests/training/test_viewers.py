"""The commands that look at pictures: search_pictures.py and show_tokens.py."""

import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import search_pictures
import show_tokens
import tiny
import torch
from PIL import Image
from tiny_tokenizer import write_tokenizer
from transformers import CLIPImageProcessor

from recipes.search import embed_files
from recipes.tokens import principal_colours
from vit_embed import VitEmbedForMaskedImageModeling, VitEmbedModel

PICTURES = Path(__file__).resolve().parents[2] / "examples" / "pictures"


def colours(path: Path) -> int:
    return len(Image.open(path).convert("RGB").getcolors(2**24))


# --- search ---


@pytest.fixture
def some_pictures(tmp_path) -> Path:
    """A dozen pictures, and a text file with the name of a picture."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in sorted(PICTURES.glob("*.png"))[::24]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "broken.png").write_text("this is no picture")
    return folder


@pytest.fixture
def stock_clip(tmp_path) -> Path:
    tiny.clip_model().save_pretrained(tmp_path / "clip")
    write_tokenizer(tmp_path / "clip")
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**size).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.mark.parametrize("model", ["the shipped one", "a stock CLIP"])
def test_the_search_writes_a_sheet_and_names_what_it_cannot_read(model, some_pictures, stock_clip, tmp_path, caplog):
    asked = ["--pictures", some_pictures, "--queries", "cat", "costs $_$ a lot", "--output", tmp_path / "new/sheet.png"]
    asked += ["--model", stock_clip] if model == "a stock CLIP" else []
    caplog.set_level(logging.INFO)
    search_pictures.main(list(map(str, asked)))
    assert "broken.png is left out" in caplog.text and "12 pictures searched" in caplog.text
    sheet = Image.open(tmp_path / "new" / "sheet.png")
    assert sheet.width > 600 and sheet.height > 200
    assert colours(tmp_path / "new" / "sheet.png") > 500, "it shows pictures and attention, not blank axes"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sheet.png"]


def write_damaged(path: Path) -> None:
    """A PNG whose second block of pixels has lost its name."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)).save(path)
    content = bytearray(path.read_bytes())
    second = content.index(b"IDAT", content.index(b"IDAT") + 1)
    content[second : second + 4] = bytes(4)
    path.write_bytes(content)


def test_damaged_and_huge_pictures_are_left_out_of_a_search(tmp_path, monkeypatch, caplog):
    model = SimpleNamespace(device="cpu", get_image_features=lambda pixels, normalize: pixels.flatten(1)[:, :2])
    Image.new("RGB", (9, 9)).save(tmp_path / "fine.png")
    write_damaged(tmp_path / "damaged.png")
    Image.new("1", (900, 900)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300_000)
    processor = SimpleNamespace(image_processor=CLIPImageProcessor())
    kept, _ = embed_files(model, processor, sorted(tmp_path.iterdir()), batch_size=4)
    assert [path.name for path in kept] == ["fine.png"]
    assert "damaged.png is left out" in caplog.text and "huge.png is left out" in caplog.text


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--pictures must be a folder with .png"):
        search_pictures.main(["--pictures", str(tmp_path)])


# --- tokens ---


@pytest.fixture
def checkpoints(tmp_path) -> dict[str, Path]:
    """A small model of each kind that the sheet shows."""
    made = {
        "adaptive": VitEmbedModel(tiny.vision_config(stem_type="adaptive")),
        "merged": VitEmbedModel(tiny.vision_config(image_size=(32, 24))),
        "masked": VitEmbedForMaskedImageModeling(tiny.vision_config(**tiny.DECODER)),
        "attended": VitEmbedModel(tiny.vision_config()),
    }
    for kind, model in made.items():
        model.save_pretrained(tmp_path / kind)
    return {kind: tmp_path / kind for kind in made}


def test_the_sheet_of_tokens(photos, checkpoints, tmp_path, caplog):
    asked = [part for kind, folder in checkpoints.items() for part in (f"--{kind}", folder)]
    asked += ["--adaptive_size", 48, 64, "--merged_size", 64, "--token_merge_size", 3, "--mask_ratio", 0.6]
    asked += ["--output", tmp_path / "new" / "sheet.png", "--pictures", *(photos / f"{n}.png" for n in range(4))]
    caplog.set_level(logging.INFO)
    show_tokens.main(list(map(str, asked)))
    assert "4 pictures shown" in caplog.text
    sheet = Image.open(tmp_path / "new" / "sheet.png")
    assert sheet.width > 1400 and sheet.height > 700
    assert colours(tmp_path / "new" / "sheet.png") > 100, "it shows pictures, not blank axes"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sheet.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a checkpoint with --adaptive, --merged, --masked or --attended"),
        (["--adaptive", "merged"], "--adaptive must have stem_type='adaptive', merged has 'conv'"),
        (["--merged", "merged", "--token_merge_size", "7"], "at most half of the 12 patch tokens, got 7"),
        (["--merged", "merged", "--merged_size", "8", "8", "8"], "one number or height and width"),
    ],
)
def test_what_cannot_be_shown_is_refused(arguments, message, photos, checkpoints, monkeypatch, capsys):
    monkeypatch.chdir(checkpoints["merged"].parent)
    with pytest.raises((ValueError, SystemExit)) as refusal:
        show_tokens.main(["--pictures", str(photos / "0.png"), *arguments])
    assert message in capsys.readouterr().err + str(refusal.value)


def test_principal_colours_tell_like_from_unlike():
    patches = 0.01 * torch.randn(2, 4, 6, 32, generator=torch.Generator().manual_seed(0))
    patches[0, :2] += 5  # half of one picture is another thing
    coloured = principal_colours(patches)
    assert coloured.shape == (2, 4, 6, 3) and coloured.min() >= 0 and coloured.max() <= 1
    thing, rest = coloured[0, :2, :, 0].flatten(), torch.cat([coloured[0, 2:, :, 0], coloured[1, :, :, 0]]).flatten()
    assert (thing.mean() - rest.mean()).abs() > 0.9 and thing.std() < 0.1 and rest.std() < 0.1
