"""Pictures of every kind become RGB by one helper, in every recipe and viewer, and the log names the changes."""

import logging
import random
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from font_files import forget, only_fonts
from PIL import Image, ImageDraw
from transformers import AutoImageProcessor, AutoTokenizer, TrainingArguments

from recipes import classification, contrastive, depth, masked, search, tokens
from recipes.card import Base, write_model_card
from recipes.drawing import _wrapped, draw_label, draw_picture, new_sheet, save_figure
from vit_embed import VitEmbedForImageClassification
from vit_embed.retrieval.pictures import ON_BLACK, ON_WHITE, SCALED, is_one_grey, read_rgba

REPO = Path(__file__).resolve().parents[2]


def icon(colour: tuple[int, int, int], mode: str = "RGBA") -> Image.Image:
    """A disc on nothing, whose hidden pixels are black, as most programs write them."""
    picture = Image.new("RGBA", (48, 48), (0, 0, 0, 0))
    ImageDraw.Draw(picture).ellipse((8, 8, 40, 40), fill=(*colour, 255))
    return picture.convert(mode)


ICONS = {
    "black": (icon((0, 0, 0)), ON_WHITE),
    "black, grey and alpha": (icon((0, 0, 0), "LA"), ON_WHITE),
    "black, palette": (icon((0, 0, 0)).quantize(), ON_WHITE),
    "white": (icon((255, 255, 255)), ON_BLACK),
    "nearly white": (icon((245, 245, 245)), ON_BLACK),
    "red": (icon((255, 0, 0)), ON_WHITE),
}


def test_what_is_drawn_in_one_grey():
    greys = [icon((0, 0, 0)), icon((255, 255, 255)), icon((90, 90, 90), "LA")]
    shaded = icon((90, 90, 90))
    ImageDraw.Draw(shaded).ellipse((20, 20, 28, 28), fill=(200, 200, 200, 255))
    others = [icon((255, 0, 0)), shaded, Image.new("L", (4, 4), 90), Image.new("RGBA", (4, 4))]
    assert [is_one_grey(read_rgba(picture)[0]) for picture in [*greys, *others]] == [True] * 3 + [False] * 4


def pixels_of(recipe: str, picture: Image.Image, path: str) -> torch.Tensor:
    """What a recipe or viewer makes of a picture."""
    processor = AutoImageProcessor.from_pretrained(REPO)
    if recipe == "classification":
        return classification.Process(processor)({"image": picture, "labels": 0})["pixel_values"]
    if recipe == "contrastive":
        rows = Dataset.from_dict({"image": [path], "captions": ["x"]}).cast_column("image", ImageFeature())
        return contrastive.evaluation_pictures(rows, processor)[0]["pixel_values"]
    if recipe == "depth":
        shape = SimpleNamespace(image_shape=(48, 48), max_depth=None)
        make = depth.EvaluationPair(depth.MILLIMETRES, shape, processor, None)
        return make({"image": path, "depth": np.ones((48, 48))})["pixel_values"]
    if recipe == "masked":
        rgb = masked.TrainingPicture((48, 48))({"image": picture})["rgb"].float() / 255
        return (rgb - 0.45) / 0.27
    return tokens.read_pixels([path], processor, (48, 48))[0]


@pytest.mark.parametrize("name", ["black", "white"])
@pytest.mark.parametrize("recipe", ["classification", "contrastive", "depth", "masked", "tokens"])
def test_every_recipe_and_viewer_sees_the_drawing(recipe, name, tmp_path):
    """The disc in the middle is as far from its ground as black from white."""
    picture, note = ICONS[name]
    picture.save(tmp_path / "icon.png")
    pixels = pixels_of(recipe, picture, str(tmp_path / "icon.png"))
    middle, corner = (pixels[:, place, place].mean().item() for place in (pixels.shape[1] // 2, 1))
    assert (corner - middle if note == ON_WHITE else middle - corner) > 3


def test_training_on_captions_draws_it_in_any_colour_on_any_ground():
    arguments, tokenizer = contrastive.DataArguments(dataset="x"), AutoTokenizer.from_pretrained(REPO)
    random.seed(0)
    for name, (picture, _) in ICONS.items():
        item = contrastive.training_item({"image": picture, "captions": "disc"}, arguments, tokenizer, 48)
        assert item["is_mono"] == (name != "red") and item["rgba"][3, 0, 0] == 0 and item["rgba"][3, 24, 24] == 255


def test_the_log_counts_what_was_changed(tmp_path, caplog):
    """For a folder that is searched, and, row by row, for what a recipe reads."""

    caplog.set_level(logging.INFO)
    paths = [tmp_path / f"{name}.png" for name in ICONS]
    for path, (picture, _) in zip(paths, ICONS.values()):
        picture.save(path)
    model = SimpleNamespace(device="cpu", get_image_features=lambda pixels, normalize: pixels.flatten(1)[:, :2])
    processor = SimpleNamespace(image_processor=AutoImageProcessor.from_pretrained(REPO))
    kept, embeds = search.embed_files(model, processor, paths, batch_size=4)
    assert kept == paths and embeds.shape == (6, 2)
    assert f"4 of 6 pictures with {ON_WHITE}" in caplog.text and f"2 of 6 pictures with {ON_BLACK}" in caplog.text
    masked.check_pictures(masked.load_pictures(masked.DataArguments(str(tmp_path)))["train"], "train")
    assert f"split train: 2 rows with {ON_BLACK}: ['nearly white.png', 'white.png']" in caplog.text


def card_text(folder: Path, **notes) -> str:
    model = VitEmbedForImageClassification(tiny.vision_config())
    training = TrainingArguments(folder, use_cpu=True, report_to=[])
    folder.mkdir(exist_ok=True)
    write_model_card(model, type(model), Base(""), "data", training, 3, {}, **notes)
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_card_says_what_became_of_the_data(tmp_path):
    left_out, icons = "1,234 rows, 5 left out: 5 with an unreadable picture", f"17 rows with {ON_WHITE}"
    text = card_text(tmp_path, data_notes={"train": [left_out, icons], "validation": [], "test": ["9 rows"]})
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## Metrics", "## Data", "## Use", "## Training", "## Licence"]
    assert f"\n- train: {left_out}; {icons}\n- test: 9 rows\n\nPipelines" in text and "vit_embed.load_picture" in text
    opaque = card_text(tmp_path, data_notes={"train": [left_out]})
    assert f"## Data\n\n- train: {left_out}\n\n## Use" in opaque and "load_picture" not in opaque
    assert "load_picture" in card_text(tmp_path, data_notes={"train": [f"3 rows with {SCALED}"]})
    assert "## Data" not in card_text(tmp_path) and "## Data" not in card_text(tmp_path, data_notes={"train": []})


def sheet_of(caption: str, path: Path) -> np.ndarray:
    """A figure with a caption in each place that captions have."""
    figure, (axes,) = new_sheet(1, 3, (9, 3))
    draw_label(axes[0], caption)
    draw_picture(axes[1], np.ones((8, 8, 3)), f"{caption}\nis {caption}")
    axes[2].axis("on")
    axes[2].set(xticks=[0, 1], yticks=[0, 1], xlabel=caption)
    axes[2].set_xticklabels(["plain", caption])
    figure.suptitle(caption)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what matplotlib says of a letter that it draws as a box
        save_figure(figure, path)
    return np.asarray(Image.open(path).convert("L"))


@pytest.fixture
def squares(monkeypatch, tmp_path):
    """A font in which a cat and a rocket are black squares."""
    with monkeypatch.context() as patched:
        only_fonts(patched, tmp_path, squares={"letters": "猫🚀"})
        yield
    forget()


def test_a_sheet_of_a_recipe_shows_captions_of_any_script(squares, tmp_path):
    for caption, shown in {"犬 🐎": "U+72AC :horse:", "猫 🐎": "猫 :horse:", "$a 🚀": "$a 🚀"}.items():
        assert (sheet_of(caption, tmp_path / "a.png") == sheet_of(shown, tmp_path / "b.png")).all()
    assert (sheet_of("猫" * 5, tmp_path / "a.png") < 128).sum() > 5 * 5 * 40, "five squares in five places"


def test_a_label_in_codes_does_not_push_the_axes_off_the_sheet(squares, tmp_path):
    labels = {"犬" * 9: "U+72AC U+72AC U+72A…", "猫" * 8: "猫" * 8, "long " * 5: "long " * 5}
    figure, ((axis,),) = new_sheet(1, 1, (9, 3))
    axis.axis("on")
    axis.set_xticks(range(len(labels)), labels)
    save_figure(figure, tmp_path / "sheet.png")
    assert [label.get_text() for label in axis.get_xticklabels()] == list(labels.values())


def test_a_line_breaks_where_wide_letters_fill_it(squares):
    assert _wrapped("猫" * 7, 6) == "猫猫猫\n猫猫猫\n猫" and _wrapped("a cat 猫猫", 6) == "a cat\n猫猫"
    assert _wrapped("犬犬犬犬", 22) == "U+72AC U+72AC\nU+72AC U+72AC"
    assert _wrapped("one two\n\nthree", 5) == "one\ntwo\n\nthree"
