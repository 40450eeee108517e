"""The icon data set, of packages made here: what it keeps and leaves out; and look-up and evaluation on it."""

import gzip
import io
import json
import logging
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from PIL import Image

from data import build_emoji_dataset, build_icon_dataset, icons, npm_packages
from data.icon_names import is_held_out, split_style
from evaluation import evaluate_retrieval, lookup_baseline

REPO = Path(__file__).resolve().parents[2]

SQUARE = '<path d="M4 4h16v16H4z"/>'
DISC = '<circle cx="12" cy="12" r="9" fill="none" stroke="currentColor"/>'
BAR = '<path d="M2 10h20v3H2z"/>'
RED_BAR = '<path fill="#f00" d="M10 2h4v20h-4z"/>'
TRIANGLE = '<path d="M2 22h20L12 2z"/>'
CORNER = '<path d="M0 0h9v9H0z"/>'
MIT = {"spdx": "MIT", "url": "https://example.org/license"}


def a_set(prefix: str, bodies: dict[str, str], **more) -> dict:
    return {"prefix": prefix, "width": 24, "height": 24, "icons": {k: {"body": v} for k, v in bodies.items()}, **more}


SETS = {
    "ph": a_set(
        "ph", {"square": SQUARE, "umbrella": TRIANGLE, "corner-bold": CORNER}, suffixes={"": "Regular", "bold": "Bold"}
    ),
    "basil": a_set("basil", {"bar-outline": BAR}, suffixes={"outline": "Outline"}),
    "kept": a_set(
        "kept",
        {
            "square-20-filled": SQUARE.replace("M4 4h16v16", "M4 4h16.2v16"),  # all but the one of ph
            "disc-20-filled": DISC,
            "disc-24-filled": DISC,
            "disc-20-regular": BAR.replace("M2 10", "M2 1"),
            "red-bar-20-regular": RED_BAR,
            "beach-umbrella-20-regular": CORNER,
            "brand-red-20-regular": RED_BAR,
            "u1f600-20-regular": RED_BAR,
            "gone-20-regular": '<path d=""/>',
        },
        suffixes={"20-filled": "20 Filled", "24-filled": "24 Filled", "20-regular": "20 Regular"},
        aliases={
            "rose-bar-20-regular": {"parent": "red-bar-20-regular"},
            "turned": {"parent": "disc-20-filled", "rotate": 1},
        },
        categories={"Shapes & umbrellas": ["disc-20-filled"], "Red Things": ["red-bar-20-regular"]},
    ),
    **{prefix: a_set(prefix, {"disc": DISC}) for prefix in ("unfree", "unsigned", "makers", "fa-brands")},
}
DIFFERENT = {
    "unfree": {"license": {"spdx": "CC-BY-NC-4.0", "url": "https://example.org"}},
    "unsigned": {"license": {"spdx": "MIT"}},
    "makers": {"category": "Logos"},
    "fa-brands": {"category": "Archive / Unmaintained"},
}
COMMON = {"author": {"name": "A. Hand"}, "license": MIT, "category": "UI 24px"}
COLLECTIONS = {prefix: {"name": prefix.title(), **COMMON, **DIFFERENT.get(prefix, {})} for prefix in SETS}


class FakePackage:
    def __init__(self, files: dict[str, object]) -> None:
        self.files = files

    def json(self, name: str):
        return self.files[name]

    def read(self, name: str) -> bytes:
        return json.dumps(self.files[name]).encode()


PACKAGES = {
    build_icon_dataset.ICONS_PACKAGE: {
        "collections.json": COLLECTIONS,
        **{f"json/{name}.json": rows for name, rows in SETS.items()},
    },
    icons.LUCIDE_PACKAGE: {"tags.json": {"red-bar": ["stripe", "cocktail umbrella", "corner"]}},
    icons.MDI_PACKAGE: {"meta.json": [{"name": "disc", "aliases": ["ball", "umbrella-top"], "tags": ["Round"]}]},
    icons.TABLER_PACKAGE: {"icons.json": {"disc": {"name": "disc", "tags": ["circle", 8]}}},
}


def an_emoji(name: str, vendor: str, colour: str, box: tuple[int, int, int, int], tags: list[str]) -> dict:
    picture, content = Image.new("RGBA", (32, 32)), io.BytesIO()
    picture.paste(colour, box)
    picture.save(content, "PNG")
    image = {"bytes": content.getvalue(), "path": None}
    return {"image": image, "vendor": vendor, "name": name, "captions": [name, *tags]}


EMOJI = {
    "train": [
        an_emoji("Blue heart", "noto", "blue", (0, 0, 9, 30), ["love", "candle light"]),
        an_emoji("hammer", "noto", "brown", (3, 0, 9, 12), ["tool"]),
    ],
    "validation": [an_emoji("blue heart", "openmoji", "blue", (20, 0, 28, 30), ["love"])],
    "test": [an_emoji("blue heart", "twemoji", "navy", (0, 20, 30, 30), ["love"])],
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("icons") / "out"
    with pytest.MonkeyPatch.context() as patch:
        for module in (build_icon_dataset, icons):
            patch.setattr(module, "fetch", lambda spec, cache_dir: FakePackage(PACKAGES[spec]))
            patch.setattr(module, "TEST_SETS", ("ph",))
            patch.setattr(module, "VALIDATION_SETS", ("basil",))
        patch.setattr(build_icon_dataset, "emoji_rows", lambda cache_dir, size: EMOJI)
        build_icon_dataset.build(folder, folder.parent, size=32, processes=1)
        with pytest.raises(ValueError, match="expected .* not to exist"):
            build_icon_dataset.build(folder, folder.parent, size=32, processes=1)
    return folder, load_from_disk(str(folder))


def test_only_free_sets_without_brands_are_read(dataset):
    folder, splits = dataset
    assert set(splits["train"]["set"][:]) == {"kept", "emoji-noto"}
    written = json.loads((folder / "sets.json").read_text())
    counts = [written["training"][name] for name in ("rendered", "without held-out words", "without near-duplicates")]
    assert counts == [7, 5, 4], "of two emoji one has a held-out word; the other counts once, whatever its share"
    assert written["sets"] == {
        "kept": {"name": "Kept", "author": "A. Hand", "license": "MIT", "url": MIT["url"], "drawings": 3},
    }, "what NOTICE lists: sets that are trained on"


def test_names_styles_synonyms_and_held_out_words(dataset):
    rows = {(row["name"], *row["tags"][:1]): row for row in dataset[1]["train"]}
    assert {name for name, *_ in rows} == {"disc", "red bar", "blue heart"}, (
        "no brand, codepoint, blank or held-out word"
    )
    disc = rows["disc", "filled"]
    assert disc["captions"] == ["disc", "ball"], "of the other names, one has a held-out word"
    assert disc["tags"] == ["filled", "circle", "round"], "a category with a held-out word is left out, a number, too"
    assert sum(row["name"] == "disc" for row in dataset[1]["train"]) == 2, "one size of each style"
    assert disc["group"] == "kept/disc"
    bar = rows["red bar", "regular"]
    assert bar["captions"] == ["red bar", "rose bar"] and bar["tags"] == ["regular", "red things", "stripe", "corner"]
    assert rows["blue heart", "love"]["tags"] == ["love"]
    hearts = [row["group"] for row in dataset[1]["train"] if row["set"] == "emoji-noto"]
    assert hearts == [f"emoji-noto/blue heart/{number}" for number in range(icons.EMOJI_SHARE)], "drawn more than once"


def test_near_duplicates_of_held_out_drawings_are_left_out_and_counted(dataset):
    splits = dataset[1]
    assert "square" not in splits["train"]["name"][:], "all but equal to the square of a held-out set"
    marks = dict(zip(splits["test"]["name"][:], splits["test"]["near_duplicate"][:], strict=True))
    # The corner's only neighbour was dropped for its word, before.
    assert marks == {"square": True, "umbrella": False, "corner": False}
    assert splits["validation"]["near_duplicate"][:] == [False]


def test_one_colour_is_stored_as_grey_and_alpha(dataset):
    modes = {row["name"]: row["image"].mode for row in dataset[1]["train"]}
    assert modes == {"disc": "LA", "red bar": "RGBA", "blue heart": "RGBA"}


def test_held_out_words():
    held_out = ["umbrella", "beach Umbrellas", "guitarist", "sail-boat-sink", "scissor", "cut-scissor2"]
    held_out += ["bees", "bee hives", "honeybee"]
    others = ["be excited", "beer", "frisbee", "crabby"]
    assert [text for text in [*held_out, *others] if is_held_out(text)] == held_out


def test_styles_of_sets_without_a_table():
    expected = {"home-outline": ("home", "outline"), "bell-thin": ("bell", ""), "cup-solid-alt": ("cup", "filled")}
    expected |= {name: (name, "") for name in ("bar-chart-line", "traffic-light")}
    assert {name: split_style(name, {}) for name in expected} == expected


def a_tarball(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def test_a_package_gives_its_files_in_any_order_and_names_what_it_lacks(tmp_path):
    path = tmp_path / "icons-1.tgz"
    path.write_bytes(a_tarball({"a.json": b'{"b": [1]}', "c": b"last"}))
    package = npm_packages.fetch("@icons@1", tmp_path)
    assert package.read("c") == b"last" and package.json("a.json") == {"b": [1]} and package.read("c") == b"last"
    with pytest.raises(ValueError, match=r"expected a file 'd' in @icons@1, found \['a.json', 'c'\]"):
        package.read("d")


def test_a_damaged_package_is_named(tmp_path):
    whole = a_tarball({"a": b"b" * 999})
    for content in (whole[:-9], b"<html>", gzip.compress(b"no archive")):
        (tmp_path / "icons-1.tgz").write_bytes(content)
        with pytest.raises(ValueError, match=r"expected an npm tarball at .*icons-1.tgz, got: .*; remove it"):
            npm_packages.fetch("@icons@1", tmp_path)


def test_the_look_up_finds_what_a_dictionary_and_a_thumbnail_know(dataset):
    """The pictures of the one name with a word of the query are compared with those searched; "square" knows none."""
    splits = dataset[1]
    drawings = lookup_baseline.inks(splits["test"])
    similarity = lookup_baseline.look_up(splits["train"], ["rusty bar", "square"], drawings)
    known = lookup_baseline.inks(splits["train"].filter(lambda row: row["name"] == "red bar"))
    np.testing.assert_allclose(similarity[0], (known @ drawings.T).max(axis=0), rtol=1e-5)
    assert similarity[0].max() > 0 and (similarity[1] == 0).all()


def test_each_name_is_of_one_kind():
    kinds = {
        "names with a held-out word": ["umbrella", "red umbrellas"],
        "names with another word that no training picture has": ["red square"],
        "new names of words that training pictures have": ["red corner"],
        "names that a training picture has": ["corner"],
    }
    names = [name for each in kinds.values() for name in each]
    rows = Dataset.from_dict({"name": names, "near_duplicate": [False, True, False, True, False]})
    chosen = evaluate_retrieval.choose_queries(rows, {"red bar", "corner"})
    found = {kind: [name for name, is_one in zip(names, rows_of) if is_one] for kind, rows_of in chosen.items()}
    assert {kind: found[kind] for kind in kinds} == kinds
    assert found["all names"] == names and found["without near-duplicates"] == names[::2]


def test_the_evaluation_reports_each_kind_of_name_and_shows_failures(dataset, tmp_path, monkeypatch, caplog):
    folder, splits = dataset
    monkeypatch.setattr(evaluate_retrieval, "LEAST_QUERIES", 1)
    arguments = ["evaluate", "--dataset", str(folder), "--model", str(REPO), "--splits", "test", "--output_dir"]
    monkeypatch.setattr(sys, "argv", [*arguments, str(tmp_path / "report")])
    with caplog.at_level(logging.INFO):
        evaluate_retrieval.main()
    report = json.loads((tmp_path / "report" / "report.json").read_text())["test"]
    assert {kind: figures["queries"] for kind, figures in report.items()} == {
        "all names": 3,
        "without near-duplicates": 2,
        "names with a held-out word": 1,
        "names with another word that no training picture has": 1,  # "square"
        "names that a training picture has": 1,  # "corner", a tag of the red bar
    }
    assert all(figures["pictures"] == 3 and figures["recall@5"] == 1 for figures in report.values())
    with pytest.raises(SystemExit):
        evaluate_retrieval.main()


def test_the_tokenizer_of_the_emoji_data_set(tmp_path, monkeypatch, capsys):
    merges = [f"{chr(97 + i)} {chr(97 + j)}" for i in range(26) for j in range(26)]
    with gzip.open(tmp_path / "bpe.txt.gz", "wt") as file:
        file.write("\n".join(["#header", *merges]))
    asked = ["x", "--bpe_file", tmp_path / "bpe.txt.gz", "--tokenizer_dir", tmp_path / "out", "--vocab_size", 614]
    monkeypatch.setattr(sys, "argv", list(map(str, asked)))
    build_emoji_dataset.main()
    vocab = json.loads((tmp_path / "out" / "vocab.json").read_text())
    assert len(vocab) == 614 and vocab["<|endoftext|>"] == 613 and vocab["aa"] == 512
    with pytest.raises(SystemExit):
        build_emoji_dataset.main()
    assert "out not to exist" in capsys.readouterr().err
