"""A caption of any script is drawn in letters, or in names and codes where no font has them; never in boxes."""

import importlib.util
import io
import logging
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from font_files import forget, only_fonts
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image

from vit_embed.retrieval.fonts import columns_of, fitting, is_invisible, pillow_has
from vit_embed.retrieval.sheet import LINE, MARGIN, SIDE, draw_sheet
from vit_embed.retrieval.sources import Item

# {text: what is drawn of it where there are matplotlib's fonts alone}
TEXTS = {
    "plain": "plain",
    "süß für 5 €": "süß für 5 €",
    "قطة": "قطة",
    "猫": "U+732B",
    "a猫、犬b": "a U+732B U+3001 U+72AC b",
    "고양이": "U+ACE0 U+C591 U+C774",
    "बिल्ली": "U+092C U+093F U+0932 U+094D U+0932 U+0940",
    "to 🚀 go": "to :rocket: go",
    "👩‍🚀": ":woman: :rocket:",
    "two\n猫 lines": "two\nU+732B lines",
    "tab\t and\u3000wide": "tab  and wide",
    "bell\a": "bell U+0007",
    "name\udcff": "name U+DCFF",
    "\ufeffmark": "\ufeffmark",
}


@pytest.fixture(autouse=True)
def as_before():
    yield
    forget()


@pytest.fixture
def no_fonts(monkeypatch, tmp_path):
    only_fonts(monkeypatch, tmp_path)


@pytest.fixture
def squares(monkeypatch, tmp_path):
    """猫 and the rocket are black squares; the horse is there without an outline."""
    only_fonts(monkeypatch, tmp_path, squares={"letters": "猫🚀", "blank": "🐴"})


@pytest.fixture
def no_matplotlib(monkeypatch):
    for name in ("matplotlib", "matplotlib.font_manager"):
        monkeypatch.setitem(sys.modules, name, None)
    forget()


def assert_no_boxes(text: str) -> None:
    """Every visible letter has a glyph in one of the fonts, and matplotlib draws all without a warning."""
    shown, families = fitting(text)
    found = [
        font_manager.get_font(
            font_manager.findfont(font_manager.FontProperties(family=[name]), fallback_to_default=False)
        )
        for name in families
    ]
    for letter in shown:
        if letter != "\n" and not is_invisible(letter):
            assert any(font.get_char_index(ord(letter)) for font in found), (letter, families)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = Figure((3, 2))
        figure.text(0, 0.5, shown, fontfamily=families)
        figure.savefig(io.BytesIO(), format="png")


def sheet(caption: str, path: Path) -> np.ndarray:
    """What `draw_sheet` writes under a picture."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_sheet([(Item("gone", "", "gone.png"), caption)], "title", path)
    top = 3 * MARGIN + LINE + SIDE
    return np.asarray(Image.open(path).convert("L"))[top:]


@pytest.mark.parametrize("text", TEXTS)
def test_what_no_font_has_is_named(text, no_fonts):
    assert fitting(text) == (TEXTS[text], ("sans-serif",))
    assert_no_boxes(text)


def test_a_font_that_has_the_letters_draws_them(squares, tmp_path):
    for text in ("a 猫", "to 🚀 go"):
        assert fitting(text) == (text, ("sans-serif", "Squares"))
        assert_no_boxes(text)
    assert fitting("🚀🐴\ufe0f")[0] == "🚀 :horse face:", "a glyph without an outline shows nothing"
    square = sheet("猫", tmp_path / "sheet.png") < 128
    assert square.sum() > 40 and square.any(0).sum() * square.any(1).sum() == square.sum()


def test_a_sheet_has_the_letters_or_their_names(no_fonts, tmp_path):
    for text, shown in TEXTS.items():
        drawn = sheet(text, tmp_path / "sheet.png")
        assert (drawn == sheet(" ".join(shown.split()), tmp_path / "named.png")).all() and (drawn < 128).any()


def test_the_log_says_once_what_to_install(no_fonts, caplog):
    caplog.set_level(logging.WARNING)
    for text in ("猫", "犬", "猫"):
        fitting(text)
    (message,) = caplog.messages
    assert "'\\u732b'" in message and "pip install matplotlib manimgx-fonts noto-cjk-sans-otc" in message


def test_without_matplotlib_there_is_ascii(no_matplotlib, tmp_path, caplog):
    assert fitting("Käse 猫 🚀 \udcff")[0] == "K U+00E4 se U+732B :rocket: U+DCFF"
    assert (sheet("ä猫", tmp_path / "a.png") == sheet("U+00E4 U+732B", tmp_path / "b.png")).all()
    assert "matplotlib" in caplog.text
    assert all(pillow_has(chr(code)) for code in range(33, 127)) and not pillow_has("猫") and not pillow_has("\a")


def test_a_long_caption_is_cut_where_wide_letters_count_twice(squares, tmp_path):
    assert [columns_of(text) for text in ("cat", "猫", "ネコ", "고양이", "🚀")] == [3, 2, 4, 6, 2]
    drawn = sheet("猫" * 40, tmp_path / "sheet.png")
    assert (drawn[:, : SIDE + 2 * MARGIN] < 128).any() and (drawn[:, MARGIN + SIDE :] > 128).all()


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("manimgx_fonts", "noto_cjk_sans_otc"))),
    reason="needs both packages of fonts",
)
def test_the_packages_that_the_log_names_have_every_script(monkeypatch):
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    forget()
    texts = [
        "猫、犬",
        "ネコと犬",
        "고양이",
        "قطة على الأريكة",
        "बिल्ली",
        "แมว",
        "חתול",
        "🐱🚀👩‍🚀👍🏽🇫🇷❤️",
        "кот γάτα süß",
    ]
    for text in texts:
        assert fitting(text)[0] == text
        assert_no_boxes(text)
    faces = [fitting(text)[1][-1] for text in texts[:3]]
    assert faces == ["Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR"]
