"""Build a captioned picture dataset from the openly licensed icon sets and emoji art of the npm registry.

    python examples/build_icon_dataset.py --output_dir data/icons

Splits: `train`; `validation` and `validation_emoji` (OpenMoji) to choose settings on; `test`, 1000 distinct names of
icon sets that are never trained on, `test_all`, every name of them, and `test_emoji` (Twemoji). Which sets and which
words are held out is fixed below by name. No caption, synonym or category with a held-out word is trained on, and no
drawing that nearly equals one of a held-out split (cosine of 16 x 16 pixels of ink above 0.95); `near_duplicate` marks
the held-out drawings that have lost such a neighbour.

Each row has an image (grey and alpha, "LA", where it is drawn in one colour), captions (its name, then other names),
tags (synonyms, categories and style, which mean something beside a name), name, set and group (set and name: the styles
of one drawing). Kept are MIT, Apache-2.0, ISC, CC0, Unlicense and CC-BY with a licence address; dropped are brands,
flags, skin tones, animations, retired icons, and names without a word.

Needs: `pip install datasets pillow resvg-py tqdm` and the `npm` command.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import multiprocessing
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from build_emoji_dataset import emoji_rows
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from npm_packages import check_absent, fetch, render_svg, written_aside
from PIL import Image
from tqdm import tqdm

logger = logging.getLogger("build_icon_dataset")

ICONS_PACKAGE = "@iconify/json@2.2.535"
LUCIDE_PACKAGE = "lucide-static@1.62.0"
MDI_PACKAGE = "@mdi/svg@7.4.47"
TABLER_PACKAGE = "@tabler/icons@3.51.0"

LICENSES = {"MIT", "Apache-2.0", "ISC", "CC0-1.0", "Unlicense", "CC-BY-3.0", "CC-BY-4.0"}
# Whole sets: an unseen hand. Nothing of the first is looked at before the end; settings are chosen on the second.
TEST_SETS = ("ph", "carbon", "iconoir", "mage", "pixelarticons")
VALIDATION_SETS = ("majesticons", "akar-icons", "basil", "clarity", "pixel")
# Names with one of these words are never trained on, in any spelling of HELD_OUT.
HELD_OUT_WORDS = (
    *("accordion", "backpack", "bee", "bicycle", "cactus", "candle", "castle", "crab", "dolphin", "faucet", "guitar"),
    *("hammer", "helicopter", "ladder", "lobster", "microscope", "mushroom", "penguin", "rainbow", "sailboat"),
    *("scissors", "snail", "stethoscope", "strawberry", "tractor", "umbrella", "violin", "whale"),
)
# Forms of them that no rule below gives.
HELD_OUT_FORMS = ("beehive", "beekeeper", "beekeeping", "bumblebee", "honeybee", "cacti")
TEST_NAMES = 1000
EMOJI_SHARE = 3  # how often an epoch draws each emoji, by as many groups: they are few beside the icons
NEAR_DUPLICATE_COSINE = 0.95
THUMBNAIL = 16  # pixels on a side

DROPPED_CATEGORIES = {"Logos", "Emoji", "Programming"}
DROPPED_SETS = {
    **dict.fromkeys(("flag", "circle-flags", "flagpack", "cif"), "flags"),
    **dict.fromkeys(("fa-brands", "fa6-brands", "meteor-icons"), "brands"),
    "nrk": "names are Norwegian",
    "iwwa": "names are Japanese in part",
}
# Of the dropped categories: tools without brands, and emoji drawn in one colour.
KEPT_SETS = {"codicon", "fluent-emoji-high-contrast", "emojione-monotone", "streamline-emojis"}
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
LARGEST_CAPTIONS, LARGEST_TAGS = 6, 12


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


def ink(picture: Image.Image) -> np.ndarray:
    """A picture's darkness on white, (THUMBNAIL ** 2,) float32 of unit length: what two drawings have in common."""
    white = Image.new("RGBA", picture.size, "white")
    grey = Image.alpha_composite(white, picture.convert("RGBA")).convert("L")
    small = 255 - np.asarray(grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX), dtype=np.float32).ravel()
    return small / max(float(np.linalg.norm(small)), 1e-6)


def as_stored(png: bytes) -> tuple[bytes, np.ndarray] | None:
    """A rendered PNG -> (PNG bytes, "LA" where it has no colour; its ink), None where nothing is drawn."""
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
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


def clean(texts: Iterable[str], largest: int) -> list[str]:
    """Words of each text in order, each text once, none with a held-out word."""
    joined = dict.fromkeys(" ".join(words_of(text)) for text in texts)
    return [text for text in joined if text and not OPAQUE.match(text) and not is_held_out(text)][:largest]


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


def mark_near_duplicates(rows: list[dict], held_out: list[dict], block: int = 4096) -> list[dict]:
    """The rows that nearly equal no held-out row; the held-out ones that had such a neighbour are marked."""
    table = np.stack([row["ink"] for row in held_out])
    kept = []
    for start in tqdm(range(0, len(rows), block), desc="near-duplicates"):
        part = rows[start : start + block]
        near = np.stack([row["ink"] for row in part]) @ table.T > NEAR_DUPLICATE_COSINE  # (part, held out)
        for index in np.flatnonzero(near.any(axis=0)):
            held_out[index]["near_duplicate"] = True
        kept += [row for row, is_near in zip(part, near.any(axis=1), strict=True) if not is_near]
    return kept


def build(output_dir: Path, cache_dir: Path, size: int, processes: int) -> None:
    """Render everything and save the DatasetDict."""
    check_absent(output_dir)
    emojis = emoji_rows(cache_dir, size)
    package = fetch(ICONS_PACKAGE, cache_dir)
    collections = package.json("collections.json")
    sets = wanted_sets(collections)
    tasks = [(package.read(f"json/{prefix}.json").decode(), size) for prefix in sets]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        rendered = list(tqdm(pool.imap(render_set, tasks), total=len(tasks), desc="render icon sets"))
    names, tags = read_synonyms(cache_dir)
    by_set = {prefix: [describe(row, names, tags) for row in rows] for prefix, rows in zip(sets, rendered, strict=True)}
    test = one_of_each([row for prefix in TEST_SETS for row in by_set[prefix]], "group")
    validation = one_of_each([row for prefix in VALIDATION_SETS for row in by_set[prefix]], "group")
    splits = {
        "validation": one_of_each(validation, "name")[:TEST_NAMES],
        "test": one_of_each(test, "name")[:TEST_NAMES],
        "test_all": test,
        "validation_emoji": [emoji_as_icon(row) for row in emojis["validation"]],
        "test_emoji": [emoji_as_icon(row) for row in emojis["test"]],
    }
    held_out = {*TEST_SETS, *VALIDATION_SETS}
    train = [row for prefix, rows in by_set.items() if prefix not in held_out for row in rows]
    train += [{**row, "tags": clean(row["tags"], LARGEST_TAGS)} for row in map(emoji_as_icon, emojis["train"])]
    counts = {"rendered": len(train)}
    train = [row for row in train if not is_held_out(row["name"])]
    counts["without held-out words"] = len(train)
    train = mark_near_duplicates(train, [row for rows in splits.values() for row in rows] + validation)
    counts["without near-duplicates"] = len(train)
    counts |= {f"distinct {column}s": len({row[column] for row in train}) for column in ("group", "name")}
    logger.info("training rows: %s", counts)
    train = [copy for row in train for copy in copies(row)]
    splits = {"train": train, **splits}
    features = Features(
        image=ImageFeature(),
        captions=List(Value("string")),
        tags=List(Value("string")),
        name=Value("string"),
        set=Value("string"),
        group=Value("string"),
        near_duplicate=Value("bool"),
    )
    dataset = DatasetDict()
    for split, rows in splits.items():
        columns = {name: [row[name] for row in rows] for name in features}
        dataset[split] = Dataset.from_dict(columns, features=features)
        logger.info("%s: %d rows, %d with near-duplicates", split, len(rows), sum(columns["near_duplicate"]))
    with written_aside(output_dir) as aside:
        dataset.save_to_disk(str(aside))
        read = Counter(row["set"] for row in train)
        (aside / "sets.json").write_text(json.dumps({"training": counts, "sets": origins(collections, read)}, indent=1))


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the dataset to write; must not exist")
    parser.add_argument("--cache_dir", type=Path, default=Path("data/npm"), help="folder that keeps the npm tarballs")
    parser.add_argument("--size", type=int, default=64, help="side of the rendered pictures, pixels")
    parser.add_argument("--processes", type=int, default=2, help="how many sets are rendered at a time")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    if arguments.size < THUMBNAIL:
        parser.error(f"expected --size of {THUMBNAIL} pixels or more, got {arguments.size}")
    try:
        build(arguments.output_dir, arguments.cache_dir, arguments.size, arguments.processes)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
