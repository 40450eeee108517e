"""Fonts that a test makes: letters that are black squares, in a package of font files as pip installs them."""

from pathlib import Path

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager

from vit_embed.retrieval import fonts

CACHES = (fonts.font_manager, fonts._other_fonts, fonts._nowhere, fonts.letters_of)


def write_font(path: Path, letters: str, family: str = "Squares", blank: str = "") -> None:
    """A font of `letters`; those of `blank` have no outline, as in fonts of coloured pictures."""
    names = {ord(letter): f"u{ord(letter):X}" for letter in letters + blank}
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names.values()])
    builder.setupCharacterMap(names)
    pen = TTGlyphPen(None)
    for step, place in enumerate([(100, 0), (100, 800), (900, 800), (900, 0)]):
        (pen.lineTo if step else pen.moveTo)(place)
    pen.closePath()
    square, empty = pen.glyph(), TTGlyphPen(None).glyph()
    drawn = {name: empty if chr(code) in blank else square for code, name in names.items()}
    builder.setupGlyf({".notdef": empty, **drawn})
    builder.setupHorizontalMetrics(dict.fromkeys((".notdef", *names.values()), (1000, 100)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800, usWeightClass=400)
    builder.setupPost()
    path.parent.mkdir(parents=True, exist_ok=True)
    builder.save(path)


def only_fonts(monkeypatch: pytest.MonkeyPatch, folder: Path, **letters: dict[str, str]) -> None:
    """A machine with matplotlib's own fonts, and a package of those given: file name = write_font's options."""
    own = [entry for entry in font_manager.fontManager.ttflist if "mpl-data" in entry.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    monkeypatch.setattr(fonts, "PACKAGES", ("fonts_of_a_test",))
    package = folder / "fonts_of_a_test"
    package.mkdir()
    (package / "__init__.py").touch()
    for name, options in letters.items():
        write_font(package / f"{name}.ttf", **options)
    monkeypatch.syspath_prepend(str(folder))
    forget()


def forget() -> None:
    for cache in CACHES:
        cache.cache_clear()
    font_manager.fontManager._findfont_cached.cache_clear()
