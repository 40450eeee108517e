"""Build a captioned picture dataset from the openly licensed icon sets and emoji art of the npm registry.

    python examples/data/build_icon_dataset.py --output_dir data/icons

Splits: `train`; `validation` and `validation_emoji` (OpenMoji) to choose settings on; `test`, 1000 distinct names of
icon sets that are never trained on, `test_all`, every name of them, and `test_emoji` (Twemoji). Which sets and which
words are held out is fixed by name, in `icons.py` and `icon_names.py`. No caption, synonym or category with a held-out
word is trained on, and no drawing that nearly equals one of a held-out split (cosine of 16 x 16 pixels of ink above
0.95); `near_duplicate` marks the held-out drawings that have lost such a neighbour.

Each row has an image (grey and alpha, "LA", where it is drawn in one colour), captions (its name, then other names),
tags (synonyms, categories and style, which mean something beside a name), name, set and group (set and name: the styles
of one drawing). Kept are MIT, Apache-2.0, ISC, CC0, Unlicense and CC-BY with a licence address; dropped are brands,
flags, skin tones, animations, retired icons, and names without a word.

Needs: `pip install datasets pillow resvg-py tqdm` and the `npm` command.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import sys
from collections import Counter
from pathlib import Path

if __name__ == "__main__":  # the rule of imports in examples/README.md
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from tqdm import tqdm

from data.emoji import emoji_rows
from data.icon_names import clean, is_held_out
from data.icons import (
    LARGEST_TAGS,
    TEST_SETS,
    VALIDATION_SETS,
    copies,
    describe,
    emoji_as_icon,
    one_of_each,
    origins,
    read_synonyms,
    render_set,
    wanted_sets,
)
from data.near_duplicates import THUMBNAIL, mark_near_duplicates
from data.npm_packages import fetch
from recipes.files import check_absent, written_aside

logger = logging.getLogger("build_icon_dataset")

ICONS_PACKAGE = "@iconify/json@2.2.535"
TEST_NAMES = 1000


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
