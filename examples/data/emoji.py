"""Emoji art of npm packages, joined to its Unicode emoji by codepoint, with the English names of emojibase-data."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data.npm_packages import Package, fetch, render_svg
from vit_embed.retrieval.pictures import read_rgba

logger = logging.getLogger(__name__)

TRAIN_LICENSES = {"Apache-2.0", "MIT", "CC-BY-4.0"}
EVALUATION_LICENSES = TRAIN_LICENSES | {"CC-BY-SA-4.0"}
NAMES_PACKAGE = "emojibase-data@17.0.0"
# Sets without a codepoint table of their own share the icon names of these two.
JOIN_VENDORS = ("noto", "fluent-flat")
DROPPED_GROUPS = {"component", "flags"}
KEYCAP = "20E3"
VARIATION_SELECTOR = "fe0f"


@dataclass(frozen=True)
class Vendor:
    """One set of emoji art: the npm package, the split that it belongs to and how the pictures lie in the package."""

    name: str
    package: str
    split: str
    kind: str = "iconify"


VENDORS = (
    Vendor("noto", "@iconify-json/noto@1.2.9", "train"),
    Vendor("noto-v1", "@iconify-json/noto-v1@1.2.5", "train"),
    Vendor("fluent-flat", "@iconify-json/fluent-emoji-flat@1.2.6", "train"),
    Vendor("fluent-color", "@iconify-json/fluent-emoji@1.2.7", "train"),
    Vendor("fluent-3d", "@lobehub/fluent-emoji-3d@1.1.0", "train", kind="webp"),
    Vendor("emojione", "@iconify-json/emojione@1.2.3", "train"),
    Vendor("openmoji", "@iconify-json/openmoji@1.2.29", "validation"),
    Vendor("twemoji", "@iconify-json/twemoji@1.2.5", "test"),
)


def join_key(codepoints: str) -> str:
    """Normalise "1F441-FE0F" to "1f441": vendors disagree about the variation selector."""
    return "-".join(point for point in codepoints.lower().split("-") if point != VARIATION_SELECTOR)


def read_names(package: Package) -> dict[str, dict]:
    """Return {join key: {"name", "codepoints", "captions"}}; captions are the label, then tags, then the subgroup."""
    messages = package.json("en/messages.json")
    groups = {group["order"]: group["key"] for group in messages["groups"]}
    subgroups = {group["order"]: group["message"] for group in messages["subgroups"]}
    emojis, dropped = {}, 0
    for entry in package.json("en/data.json"):
        # Regional indicators have no group.
        if "group" not in entry or groups[entry["group"]] in DROPPED_GROUPS or KEYCAP in entry["hexcode"]:
            dropped += 1
            continue
        captions = [entry["label"], *entry.get("tags", ()), subgroups[entry["subgroup"]]]
        emojis[join_key(entry["hexcode"])] = {
            "name": entry["label"],
            "codepoints": entry["hexcode"],
            "captions": list(dict.fromkeys(captions)),
        }
    logger.info(
        "%s: %d emoji kept; %d flags, keycaps, components and indicators dropped, skin tones never listed",
        package.spec,
        len(emojis),
        dropped,
    )
    return emojis


def read_codepoints(package: Package) -> dict[str, str]:
    """Return {join key: icon name} from an iconify set's own codepoint table."""
    return {join_key(codepoints): name for codepoints, name in package.json("chars.json").items()}


def iconify_pictures(package: Package, keys_by_name: dict[str, str], keys: set[str], size: int) -> Iterator[tuple]:
    """Yield (join key, PNG bytes of a `size` x `size` picture with alpha) for each wanted icon of an iconify set."""
    icons = package.json("icons.json")
    if "chars.json" in package.names and package.json("chars.json"):
        table = read_codepoints(package)
    else:
        table = {keys_by_name[name]: name for name in icons["icons"] if name in keys_by_name}
    for key in sorted(keys & table.keys()):
        icon = icons["icons"].get(table[key])
        if icon is None:
            logger.warning("%s: codepoint %s points to %r, which the set does not have", package.spec, key, table[key])
            continue
        yield key, render_svg(icon, icons, size)


def webp_pictures(package: Package, keys: set[str], size: int) -> Iterator[tuple]:
    """Yield (join key, PNG bytes) for each wanted `assets/CODEPOINTS.webp` of a package."""
    table = {join_key(Path(name).stem): name for name in package.names if name.endswith(".webp")}
    for key in sorted(keys & table.keys()):
        image, _ = read_rgba(io.BytesIO(package.read(table[key])))
        buffer = io.BytesIO()
        image.resize((size, size), Image.Resampling.BICUBIC).save(buffer, "PNG")
        yield key, buffer.getvalue()


def check_license(vendor: Vendor, package: Package) -> str:
    """Return the SPDX licence of a vendor's art; one that its split does not allow is a ValueError."""
    allowed = TRAIN_LICENSES if vendor.split == "train" else EVALUATION_LICENSES
    spdx = package.license()
    if spdx not in allowed:
        raise ValueError(
            f"expected a licence out of {sorted(allowed)} for the {vendor.split} split, {vendor.package} "
            f"states {spdx!r}; take the vendor out of VENDORS"
        )
    return spdx


def emoji_rows(cache_dir: Path, size: int) -> dict[str, list[dict]]:
    """Render every vendor; rows by split, each with image, captions, name, vendor, codepoints."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    packages = {vendor.name: fetch(vendor.package, cache_dir) for vendor in tqdm(VENDORS, desc="npm packages")}
    licenses = {vendor.name: check_license(vendor, packages[vendor.name]) for vendor in VENDORS}
    emojis = read_names(fetch(NAMES_PACKAGE, cache_dir))
    keys_by_name = {}
    for name in JOIN_VENDORS:
        keys_by_name.update({icon: key for key, icon in read_codepoints(packages[name]).items() if key in emojis})

    rows = {split: [] for split in ("train", "validation", "test")}
    for vendor in VENDORS:
        package = packages[vendor.name]
        if vendor.kind == "webp":
            pictures = webp_pictures(package, set(emojis), size)
        else:
            pictures = iconify_pictures(package, keys_by_name, set(emojis), size)
        before = len(rows[vendor.split])
        for key, png in tqdm(pictures, desc=f"render {vendor.name}", total=len(emojis)):
            rows[vendor.split].append({"image": {"bytes": png, "path": None}, "vendor": vendor.name, **emojis[key]})
        logger.info(
            "%s (%s, %s): %d of %d emoji in the %s split",
            vendor.name,
            vendor.package,
            licenses[vendor.name],
            len(rows[vendor.split]) - before,
            len(emojis),
            vendor.split,
        )
    return rows
