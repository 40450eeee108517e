"""Icon sets of `@iconify/json` as rows: which sets are read, how they are drawn, and what describes them."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from data.icon_names import clean, named_icons, split_style, words_of
from data.near_duplicates import ink
from data.npm_packages import fetch, render_svg
from vit_embed.retrieval.pictures import read_rgba

logger = logging.getLogger(__name__)

LUCIDE_PACKAGE = "lucide-static@1.62.0"
MDI_PACKAGE = "@mdi/svg@7.4.47"
TABLER_PACKAGE = "@tabler/icons@3.51.0"


LICENSES = {"MIT", "Apache-2.0", "ISC", "CC0-1.0", "Unlicense", "CC-BY-3.0", "CC-BY-4.0"}
# Whole sets: an unseen hand. Nothing of the first is looked at before the end; settings are chosen on the second.
TEST_SETS = ("ph", "carbon", "iconoir", "mage", "pixelarticons")
VALIDATION_SETS = ("majesticons", "akar-icons", "basil", "clarity", "pixel")
EMOJI_SHARE = 3  # how often an epoch draws each emoji, by as many groups: they are few beside the icons

DROPPED_CATEGORIES = {"Logos", "Emoji", "Programming"}
DROPPED_SETS = {
    **dict.fromkeys(("flag", "circle-flags", "flagpack", "cif"), "flags"),
    **dict.fromkeys(("fa-brands", "fa6-brands", "meteor-icons"), "brands"),
    "nrk": "names are Norwegian",
    "iwwa": "names are Japanese in part",
}
# Of the dropped categories: tools without brands, and emoji drawn in one colour.
KEPT_SETS = {"codicon", "fluent-emoji-high-contrast", "emojione-monotone", "streamline-emojis"}
LARGEST_CAPTIONS, LARGEST_TAGS = 6, 12


def as_stored(png: bytes) -> tuple[bytes, np.ndarray] | None:
    """A rendered PNG -> (PNG bytes, "LA" where it has no colour; its ink), None where nothing is drawn."""
    picture, _ = read_rgba(io.BytesIO(png))
    red, green, blue, alpha = picture.split()
    if alpha.getextrema()[1] < 32:
        return None
    if red.tobytes() == green.tobytes() == blue.tobytes():
        buffer = io.BytesIO()
        picture.convert("LA").save(buffer, "PNG", compress_level=3)
        png = buffer.getvalue()
    return png, ink(picture)


def set_rows(icons: dict, size: int) -> list[dict]:
    """All rows of one parsed set, rendered, with their ink."""
    aliases, categories = {}, {}
    for alias, target in icons.get("aliases", {}).items():
        if set(target) == {"parent"}:
            aliases.setdefault(target["parent"], []).append(" ".join(words_of(split_style(alias, icons)[0])))
    for category, names in icons.get("categories", {}).items():
        for name in names:
            categories.setdefault(name, []).append(" ".join(words_of(category)))
    rows = []
    for icon, name, style in named_icons(icons):
        if {"rotate", "hFlip", "vFlip"} & icons["icons"][icon].keys():
            continue
        stored = as_stored(render_svg(icons["icons"][icon], icons, size))
        if stored is None:
            continue
        rows.append(
            {
                "image": {"bytes": stored[0], "path": None},
                "ink": stored[1],
                "captions": [name, *aliases.get(icon, ())],
                "tags": [*categories.get(icon, ()), *([style] if style else ())],
                "name": name,
                "set": icons["prefix"],
                "group": f"{icons['prefix']}/{name}",
                "near_duplicate": False,
            }
        )
    return rows


def render_set(task: tuple[str, int]) -> list[dict]:
    """`set_rows` of the JSON text of a set: one task of a worker."""
    text, size = task
    return set_rows(json.loads(text), size)


def wanted_sets(collections: dict[str, dict]) -> list[str]:
    """The sets that are read; counts of the others by reason in the log."""
    kept, reasons = [], Counter()
    for prefix, info in collections.items():
        spdx = info["license"].get("spdx")
        held_out = prefix in TEST_SETS or prefix in VALIDATION_SETS
        if spdx not in LICENSES:
            reasons["licence is another"] += 1
        elif not info["license"].get("url") and not held_out:
            reasons["no address of a licence"] += 1
        elif prefix in DROPPED_SETS:
            reasons[DROPPED_SETS[prefix]] += 1
        elif prefix not in KEPT_SETS and info.get("category") in DROPPED_CATEGORIES:
            reasons[f"category {info['category']}"] += 1
        elif info.get("hidden") or "Contains Animations" in info.get("tags", ()):
            reasons["retired or animated"] += 1
        else:
            kept.append(prefix)
    logger.info("%d sets kept; dropped: %s", len(kept), dict(reasons))
    return kept


def origins(collections: dict[str, dict], read: dict[str, int]) -> dict[str, dict]:
    """Licence, author and address of each set, and how many drawings of it are trained on: what NOTICE lists."""
    return {
        prefix: {
            "name": info["name"],
            "author": info["author"]["name"],
            "license": info["license"]["spdx"],
            "url": info["license"].get("url"),
            "drawings": read[prefix],
        }
        for prefix, info in sorted(collections.items())
        if prefix in read
    }


def read_synonyms(cache_dir: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """{name: other names} and {name: tags} of three packages that describe their icons."""
    names, tags = {}, {}
    for name, words in fetch(LUCIDE_PACKAGE, cache_dir).json("tags.json").items():
        tags.setdefault(" ".join(words_of(name)), []).extend(words)
    for icon in fetch(TABLER_PACKAGE, cache_dir).json("icons.json").values():
        tags.setdefault(" ".join(words_of(icon["name"])), []).extend(map(str, icon.get("tags", ())))
    for icon in fetch(MDI_PACKAGE, cache_dir).json("meta.json"):
        key = " ".join(words_of(icon["name"]))
        names.setdefault(key, []).extend(icon["aliases"])
        tags.setdefault(key, []).extend(icon["tags"])
    return names, tags


def describe(row: dict, names: dict[str, list[str]], tags: dict[str, list[str]]) -> dict:
    """Give a row its synonyms; the name stays first even where it is held out, so such rows are dropped before."""
    captions = clean([*row["captions"][1:], *names.get(row["name"], ())], LARGEST_CAPTIONS)
    captions = [text for text in captions if text != row["name"]]
    words = clean([*row["tags"][::-1], *tags.get(row["name"], ())], LARGEST_TAGS)
    return {**row, "captions": [row["name"], *captions], "tags": words}


def emoji_as_icon(row: dict) -> dict:
    """A row of `build_emoji_dataset` in the columns of this one."""
    name = row["name"].lower()
    return {
        "image": row["image"],
        "ink": ink(Image.open(io.BytesIO(row["image"]["bytes"]))),
        "captions": [name],
        "tags": row["captions"][1:],
        "name": name,
        "set": f"emoji-{row['vendor']}",  # one of the icon sets is called as a vendor is
        "group": f"emoji-{row['vendor']}/{name}",
        "near_duplicate": False,
    }


def copies(row: dict) -> list[dict]:
    """A row of an icon set, or EMOJI_SHARE copies of an emoji, each a group."""
    if not row["set"].startswith("emoji-"):
        return [row]
    return [{**row, "group": f"{row['group']}/{number}"} for number in range(EMOJI_SHARE)]


def order(text: str) -> str:
    """A fixed random order that depends on the text alone."""
    return hashlib.sha256(text.encode()).hexdigest()


def one_of_each(rows: list[dict], column: str) -> list[dict]:
    """One row of each value of a column, the first in a fixed random order; of styles the plainest comes first."""
    chosen = {}
    for row in sorted(rows, key=lambda row: (len(row["tags"]), order(row["group"]))):
        chosen.setdefault(row[column], row)
    return sorted(chosen.values(), key=lambda row: order(row["name"]))
