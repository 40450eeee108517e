"""Captions of any script: which installed fonts have the letters of a text, and what stands for a letter that none has.

matplotlib finds the fonts, shapes the text and takes each letter from the first font that has it. Where matplotlib is
not installed there is Pillow's own font, which has ASCII and little more.
"""

from __future__ import annotations

import functools
import logging
import pkgutil
import re
import unicodedata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

logger = logging.getLogger(__name__)

# Packages of nothing but font files, by the beginnings of their names.
PACKAGES = ("manimgx_fonts", "noto_cjk_")
ADVICE = "pip install matplotlib manimgx-fonts noto-cjk-sans-otc, or install fonts in the system"
# Choose a form of the letter before them; what else is invisible is of the category Cf.
SELECTORS = re.compile("[\ufe00-\ufe0f\U000e0100-\U000e01ef]")


def fitting(text: str, families: tuple[str, ...] = ("sans-serif",)) -> tuple[str, tuple[str, ...]]:
    """A text -> what can be drawn of it, and the font families to draw it with: the given ones, and further ones for
    letters that these lack.

    A letter that no font has becomes its name where it is a symbol (":cat face:"), else its code ("U+732B"): a box
    would say nothing. The first time, the log says which fonts to install.
    """
    text = "".join(" " if letter.isspace() and letter != "\n" else letter for letter in text)
    visible = {letter for letter in text if letter not in " \n" and not is_invisible(letter)}
    manager = font_manager()
    if manager is None:
        missing = {letter for letter in visible if not pillow_has(letter)}
    else:
        given = [manager.findfont(manager.FontProperties(family=[family])) for family in families]
        missing = visible.difference(*map(letters_of, given))
        for family, path in ranked_fonts(text) if missing - _nowhere() else ():
            found = drawn_by(path, missing & letters_of(path))
            if found:
                families, missing = (*families, family), missing - found
            if not missing - _nowhere():
                break
    if missing and not _nowhere():
        letters = ascii("".join(sorted(missing)[:10]))
        logger.warning("no installed font has %s: their names or codes are drawn; %s", letters, ADVICE)
    _nowhere().update(missing)
    return _named(text, missing) if missing else text, families


def columns_of(text: str) -> int:
    """How wide a text is, in Latin letters: Chinese, Japanese, Korean ones and emoji count two."""
    return sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text)


def shortened(text: str, columns: int) -> str:
    """A text cut to a width, with an ellipsis where something is missing."""
    if columns_of(text) <= columns:
        return text
    while columns_of(text) >= columns:
        text = text[:-1]
    return f"{text}…"


def paste_text(sheet: Image.Image, place: tuple[int, int], text: str, colour: str, size: int) -> None:
    """Writes a line that is `fitting`, its left top at `place`, `size` pixels high."""
    if all(letter == " " or pillow_has(letter) for letter in text):
        ImageDraw.Draw(sheet).text(place, text, colour, ImageFont.load_default(size))
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(((sheet.width - place[0]) / 72, 2 * size / 72), dpi=72, facecolor="black")  # a point a pixel
    text, families = fitting(text)
    style = {"color": "white", "fontfamily": families, "fontsize": 0.95 * size, "parse_math": False}
    figure.text(0, 0.5, text, va="baseline", **style)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    sheet.paste(colour, place, Image.fromarray(np.asarray(canvas.buffer_rgba())[..., 0]))


def is_invisible(letter: str) -> bool:
    return unicodedata.category(letter) == "Cf" or SELECTORS.match(letter) is not None


def _named(text: str, missing: set[str]) -> str:
    """A text with names or codes, each between spaces, for what is missing."""
    words = []
    for letter in text:
        if letter in missing:
            name = unicodedata.name(letter, "").lower() if unicodedata.category(letter) in ("So", "Sk") else ""
            words.append(f" :{name}: " if name else f" U+{ord(letter):04X} ")
        elif not is_invisible(letter):  # which would join letters that are names now
            words.append(letter)
    return "\n".join(re.sub(" +", " ", line).strip() for line in "".join(words).split("\n"))


@functools.cache
def _nowhere() -> set[str]:
    """Letters that no font has, so that they are looked for once."""
    return set()


@functools.cache
def pillow_has(letter: str) -> bool:
    """Whether Pillow's own font has a letter: what it lacks it draws as it does a code that stands for none."""
    font = ImageFont.load_default(20)
    return letter.isprintable() and bytes(font.getmask(letter)) != bytes(font.getmask("\uffff"))


@functools.cache
def font_manager() -> ModuleType | None:
    """matplotlib's, or None where it is not installed."""
    try:
        from matplotlib import font_manager
    except ImportError:
        return None
    return font_manager


def _package_fonts() -> list[str]:
    modules = [module for module in pkgutil.iter_modules() if module.name.startswith(PACKAGES)]
    folders = [Path(module.module_finder.path, module.name) for module in modules if module.ispkg]
    return [str(path) for folder in folders for path in folder.iterdir() if path.suffix in (".ttf", ".otf", ".ttc")]


def ranked_fonts(text: str) -> list[tuple[str, Any]]:
    """(family, path) of what is installed beside matplotlib's own fonts, Noto Sans first. Of its faces for Chinese,
    Japanese and Korean the text's own comes first, as each draws the same code with other strokes.
    """
    language = "KR" if re.search("[\uac00-\ud7af]", text) else "JP" if re.search("[\u3040-\u30ff]", text) else "SC"

    def rank(font: tuple[str, Any]) -> tuple:
        family = font[0]
        is_other_language = " CJK " in family and not family.endswith(language)
        return not family.startswith("Noto "), "Mono" in family, "Serif" in family, is_other_language, family

    return sorted(_other_fonts(), key=rank)


@functools.cache
def _other_fonts() -> tuple[tuple[str, Any], ...]:
    """Also those of PACKAGES, and those installed since matplotlib wrote its list."""
    import matplotlib

    manager = font_manager()
    known = {entry.fname for entry in manager.fontManager.ttflist}
    for path in sorted({*manager.findSystemFonts(), *_package_fonts()} - known):
        try:
            manager.fontManager.addfont(path)
        except (OSError, RuntimeError, ValueError):  # of bitmaps alone, or damaged
            continue
    own = matplotlib.get_data_path()
    # The list keeps fonts that were removed since.
    entries = [e for e in manager.fontManager.ttflist if not e.fname.startswith(own) and Path(e.fname).exists()]
    upright = sorted(entries, key=lambda entry: (entry.style != "normal", abs(_weight(entry.weight) - 400)))
    found: dict[str, Any] = {}
    for entry in upright:
        index = getattr(entry, "index", 0)  # of collections, since matplotlib 3.11
        found.setdefault(entry.name, manager.FontPath(entry.fname, index) if index else entry.fname)
    return tuple(found.items())


def _weight(weight: str | int) -> int:
    return weight if isinstance(weight, int) else 400


@functools.lru_cache(maxsize=128)
def letters_of(path: Any) -> frozenset[str]:
    return frozenset(map(chr, font_manager().get_font(path).get_charmap()))


def drawn_by(path: Any, letters: set[str]) -> set[str]:
    """Those of a font's letters that it has an outline for: fonts of coloured pictures have none."""
    font = font_manager().get_font(path) if letters else None
    return {letter for letter in letters if any(font.load_glyph(font.get_char_index(ord(letter))).bbox)}
