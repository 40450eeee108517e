"""Names of icons: words, styles, and the words that are held out of training."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

# Names with one of these words are never trained on, in any spelling of HELD_OUT.
HELD_OUT_WORDS = (
    *("accordion", "backpack", "bee", "bicycle", "cactus", "candle", "castle", "crab", "dolphin", "faucet", "guitar"),
    *("hammer", "helicopter", "ladder", "lobster", "microscope", "mushroom", "penguin", "rainbow", "sailboat"),
    *("scissors", "snail", "stethoscope", "strawberry", "tractor", "umbrella", "violin", "whale"),
)
# Forms of them that no rule below gives.
HELD_OUT_FORMS = ("beehive", "beekeeper", "beekeeping", "bumblebee", "honeybee", "cacti")
BRAND_CATEGORIES = re.compile(r"brand|logo|social media|crypto|flags", re.IGNORECASE)
DROPPED_NAME = re.compile(r"^(brand|logo|flag-for|flag-of|flags?-[a-z]{2}$|country)-?|skin-tone|\blogo\b|-brand$")
# Of a set without a table of its own.
STYLES = {
    **dict.fromkeys(("outline", "outlined", "stroke", "linear"), "outline"),
    **dict.fromkeys(("filled", "fill", "solid", "f"), "filled"),
    **dict.fromkeys(("duotone", "twotone", "two-tone", "duo"), "duotone"),
    **dict.fromkeys(("thin", "light", "regular", "o", "alt", "alt1", "alt2", "line", "sharp", "rounded"), ""),
}
# Where the last word says what is drawn, though it is also a style: a line chart is no chart in outline.
STYLE_IS_MEANT = re.compile(
    r"(chart|straight|dash|dotted|broken|base|under|new|time|traffic|flash|night|day)-(line|light)$"
)
OPAQUE = re.compile(r"^(u[0-9a-f]{4,}|uni[0-9a-f]{4,}|[0-9]+|[a-z])$")


def words_of(name: str) -> list[str]:
    """Split "arrow-upLeft_2" into lower-case words without numbers at the end."""
    words = re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower()
    words = re.findall(r"[a-z0-9']+", words)
    while len(words) > 1 and words[-1].isdigit():
        words.pop()
    return words


def spellings(word: str) -> set[str]:
    """A held-out word with its plural, or its singular."""
    return {word, word + "s", word + "es", word.removesuffix("y") + "ies", word.removesuffix("s")}


HELD_OUT = set().union(*map(spellings, (*HELD_OUT_WORDS, *HELD_OUT_FORMS)))


def is_held_out(text: str) -> bool:
    """Whether a word is held out, alone, numbered ("bee2"), in two ("sail boat") or in another ("guitarist")."""
    words = [word.rstrip("0123456789") for word in words_of(text)]
    written = {*words, *(first + second for first, second in zip(words, words[1:]))}
    return bool(written & HELD_OUT) or any(held in word for word in words for held in HELD_OUT_WORDS if len(held) > 4)


def split_style(name: str, icons: dict) -> tuple[str, str]:
    """An icon's name -> (name without style, style); the set's own tables of prefixes and suffixes come first."""
    for affix, label in sorted(icons.get("suffixes", {}).items(), key=lambda item: -len(item[0])):
        if affix and name.endswith("-" + affix):
            return name.removesuffix("-" + affix), label.lower()
    for affix, label in sorted(icons.get("prefixes", {}).items(), key=lambda item: -len(item[0])):
        if affix and name.startswith(affix + "-"):
            return name.removeprefix(affix + "-"), label.lower()
    if icons.get("suffixes"):
        return name, icons["suffixes"].get("", "").lower()
    style = ""
    while not STYLE_IS_MEANT.search(name):
        for word, label in STYLES.items():
            if name.endswith("-" + word):
                name, style = name.removesuffix("-" + word), label or style
                break
        else:
            break
    return name, style


def brand_names(icons: dict) -> set[str]:
    """Names of the set's own categories of brands."""
    categories = icons.get("categories", {})
    return {name for category in categories if BRAND_CATEGORIES.search(category) for name in categories[category]}


def named_icons(icons: dict) -> Iterator[tuple[str, str, str]]:
    """(icon, name, style) of the icons of a parsed set that have a word for a name; one size of each drawing."""
    brands = brand_names(icons)
    seen = set()
    for icon in icons["icons"]:
        name, style = split_style(icon, icons)
        style = re.sub(r"\b\d+(px|x\d+)?\b", "", style).strip()
        words = words_of(name)
        if icons["icons"][icon].get("hidden") or icon in brands or DROPPED_NAME.search(icon):
            continue
        if all(OPAQUE.match(word) for word in words) or (" ".join(words), style, icon.rstrip("0123456789")) in seen:
            continue
        sized = (name, style)
        if re.search(r"\d", "".join(icons.get("suffixes", {}))) and sized in seen:
            continue
        seen |= {sized, (" ".join(words), style, icon.rstrip("0123456789"))}
        yield icon, " ".join(words), style


def clean(texts: Iterable[str], largest: int) -> list[str]:
    """Words of each text in order, each text once, none with a held-out word."""
    joined = dict.fromkeys(" ".join(words_of(text)) for text in texts)
    return [text for text in joined if text and not OPAQUE.match(text) and not is_held_out(text)][:largest]
