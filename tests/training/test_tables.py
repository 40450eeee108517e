"""recipes/reading: tables and stored data sets as people write them, where their paths lead, and what is refused."""

import json
import os
import unicodedata
from pathlib import Path

import pandas
import pytest
from datasets import Image as ImageFeature
from PIL import Image

from recipes.classification import DataArguments
from recipes.reading.labels import LABEL, LABEL_COLUMNS, LAYOUTS
from recipes.reading.layouts import read_splits
from recipes.reading.place import Finder, Place, split_folders, split_of_name
from recipes.reading.tables import IMAGE, PROBLEM, ROW, Target


def draw(folder: Path, *names: str) -> None:
    """A picture in one colour at each path."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 6), (40 * number, 0, 0)).save(folder / name, "png")


def read(folder: Path, **options) -> dict[str, list[tuple]]:
    """{split: [(path of the picture from `folder`, label, name, problem) of each row]}."""
    arguments = DataArguments(dataset=str(folder), **options)
    target = Target(LABEL, arguments.label_column, LABEL_COLUMNS, "--label_column")
    found = {}
    for split, rows in read_splits(LAYOUTS, arguments, target)[1].items():
        rows = rows.cast_column(IMAGE, ImageFeature(decode=False))
        paths = [row[IMAGE] and row[IMAGE]["path"] for row in rows]
        paths = [path and os.path.relpath(path, folder if folder.is_dir() else folder.parent) for path in paths]
        columns = [rows[name][:] if name in rows.column_names else [None] * len(rows) for name in (LABEL, ROW, PROBLEM)]
        found[split] = list(zip(paths, *columns))
    return found


CAT, DOG = ("1.png", "cat", "labels.csv:2", None), ("2.png", "dog", "labels.csv:3", None)
RAGGED = "3 cells in a table of 2 columns; quote a text that holds a separator"
# name of the table, its text, and what the rows of 1.png and 2.png read to
TABLES = {
    "commas": ("labels.csv", "image,label\n1.png,cat\n2.png,dog\n", [CAT, DOG]),
    "semicolons, CRLF and a byte order mark": (
        "labels.csv",
        "\ufeffimage;label\r\n1.png;cat\r\n2.png;dog\r\n",
        [CAT, DOG],
    ),
    "usual names in other letters": ("labels.csv", "Label,File_Name\ncat,1.png\ndog,2.png\n", [CAT, DOG]),
    "a moved table": ("labels.csv", "image,label\n/home/me/1.png,cat\nC:\\me\\2.png,dog\n", [CAT, DOG]),
    "a table moved from one folder": (
        "labels.csv",
        "image,label\n/home/me/1.png,cat\n/home/me/2.png,dog\n",
        [CAT, DOG],
    ),
    "stems": ("labels.csv", "id,breed\n1,cat\n2,dog\n", [CAT, DOG]),
    "a vanished file": ("labels.csv", "image,label\n1.png,cat\n3.png,dog\n", [CAT, ("3.png", *DOG[1:])]),
    "quoted cells over two lines": (
        *("labels.csv", 'image,label\n1.png,"cat,\nlarge"\n2.png,dog\n'),
        [("1.png", "cat,\nlarge", "labels.csv:2", None), ("2.png", "dog", "labels.csv:4", None)],
    ),
    "a ragged line": (
        *("labels.csv", "image,label\n1.png,cat\n2.png,dog,big\n"),
        [CAT, ("2.png", "dog", "labels.csv:3", RAGGED)],
    ),
    "no picture, no label": (
        *("labels.csv", "image,label\n1.png,\n,dog\n"),
        [("1.png", None, "labels.csv:2", None), (None, "dog", "labels.csv:3", "no path of a picture")],
    ),
    "tabs": ("l.tsv", "path\tclass\n1.png\tcat, a\n", [("1.png", "cat, a", "l.tsv:2", None)]),
    "no header": (
        "l.csv",
        "1.png,cat\n2.png,dog\n",
        [("1.png", "cat", "l.csv:1", None), ("2.png", "dog", "l.csv:2", None)],
    ),
    "a list of Caffe's": (
        "l.txt",
        "# made\n1.png 0\n\n2.png 1\n",
        [("1.png", "0", "l.txt:2", None), ("2.png", "1", "l.txt:4", None)],
    ),
    "lines of JSON": (
        *("l.jsonl", '{"image": "1.png", "label": ["a", "b"]}\n\nno JSON\n'),
        [("1.png", ["a", "b"], "l.jsonl:1", None), (None, None, "l.jsonl:3", "no JSON object")],
    ),
    "a list in JSON": ("l.json", json.dumps([{"image": "1.png", "label": 7}]), [("1.png", 7, "l.json:1", None)]),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_as_people_write_them(name, tmp_path):
    """In a folder, and named by itself."""
    file, text, expected = TABLES[name]
    draw(tmp_path, "1.png", "2.png")
    (tmp_path / file).write_bytes(text.encode())
    assert read(tmp_path) == read(tmp_path / file) == {"train": expected}


def test_splits_come_from_names_folders_and_a_column(tmp_path):
    draw(tmp_path / "a", "train/1.png", "test/1.png")
    (tmp_path / "a" / "train.csv").write_text("id,breed\n1,cat\n")
    (tmp_path / "a" / "sample_submission.csv").write_text("id,breed\n1,dog\n")
    assert read(tmp_path / "a") == {
        "train": [("train/1.png", "cat", "train.csv:2", None)],
        "test": [("test/1.png", None, "test/1.png", None)],  # to be labelled; never read from the form to hand in
    }
    draw(tmp_path / "b" / "wrapped", "train/1.png", "dev/2.png")
    for split in ("train", "dev"):
        (tmp_path / "b" / "wrapped" / split / "metadata.csv").write_text("file_name,label\n1.png,cat\n2.png,dog\n")
    assert {split: rows[0][2] for split, rows in read(tmp_path / "b").items()} == {
        "train": "wrapped/train/metadata.csv:2",
        "validation": "wrapped/dev/metadata.csv:2",
    }
    draw(tmp_path / "c", "1.png")
    (tmp_path / "c" / "all.csv").write_text("image,label,Split\n1.png,cat,Train\n1.png,dog,VAL\n")
    assert {split: rows[0][1] for split, rows in read(tmp_path / "c").items()} == {"train": "cat", "validation": "dog"}


def test_names_of_splits():
    arguments = DataArguments(dataset="x", test_split="unseen")
    names = {
        "captions_val2017": "validation",
        "Training": "train",
        "unseen": "unseen",
        "latest": None,
        "nyu2_test": "test",
    }
    assert {name: split_of_name(name, arguments) for name in names} == names


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["train/a/1.png", "val/a/1.png"], {"train": "train", "val": "validation"}),
        (["valid/1.png", "invalid/1.png"], {}),
        (["train/1.png", "plane/1.png"], {}),
        (["train/a/1.png", "extra/1.png"], {"train": "train"}),
    ],
)
def test_folders_of_splits_are_told_from_those_of_labels(files, expected, tmp_path):
    draw(tmp_path, *files)
    assert split_folders(Place(str(tmp_path)), DataArguments(dataset="x")) == expected


def test_a_missing_file_is_never_another_of_its_name(tmp_path):
    """`cat/1.png` is gone; dog/1.png and 1.png have its name."""
    draw(tmp_path, "cat/2.png", "dog/1.png", "1.png")
    (tmp_path / "labels.csv").write_text("image,label\ncat/1.png,cat\ncat/2.png,cat\n")
    assert [row[0] for row in read(tmp_path)["train"]] == ["cat/1.png", "cat/2.png"]


def test_two_folders_that_could_be_meant_are_refused(tmp_path):
    draw(tmp_path, "small/1.png", "large/1.png")
    (tmp_path / "labels.csv").write_text("image,label\n1.png,cat\n")
    with pytest.raises(ValueError, match=r"found files of these names in .*large and .*small; set --image_folder"):
        read(tmp_path)
    assert read(tmp_path, image_folder=str(tmp_path / "small"))["train"][0][0] == "small/1.png"


@pytest.mark.parametrize("column", ["image", "path", "img"])
def test_pictures_in_parquet_are_cast_without_being_asked(column, tmp_path, monkeypatch):
    """Paths, bytes, and what pandas and the Hub write; a picture lies beside the file, too."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    draw(tmp_path, "set/1.png", "set/2.png")
    files = [tmp_path / "set" / name for name in ("1.png", "2.png")]
    cells = {
        "image": [{"bytes": files[0].read_bytes(), "path": None}, {"bytes": None, "path": "2.png"}],
        "path": ["1.png", "2.png"],
        "img": [file.read_bytes() for file in files],
    }[column]
    pandas.DataFrame({column: cells, "label": ["cat", "dog"]}).to_parquet(tmp_path / "set" / "val-0.parquet")
    arguments = DataArguments(dataset=str(tmp_path / "set"))
    splits = read_splits(LAYOUTS, arguments, Target(LABEL, None, LABEL_COLUMNS, "--label_column"))[1]
    assert list(splits) == ["validation"]
    assert splits["validation"][ROW][:] == ["val-0.parquet row 0", "val-0.parquet row 1"]
    assert [row[IMAGE].convert("RGB").getpixel((0, 0))[0] for row in splits["validation"]] == [0, 40]


NEAREST = (
    r"(?s)found: 1 .png, 1 .csv\nnearest: table of labels .*lacks a table with a column of pictures and one of labels"
    r".*\nl.csv: has the columns image, lable\nlayouts:\n- saved by"
)


@pytest.mark.parametrize(
    ("file", "content", "options", "message"),
    [
        ("l.csv", b"image,lable\n1.png,cat\n", {}, NEAREST),
        ("l.csv", "image,label\n1.png,ch\u00e4t\n".encode("latin-1"), {}, "l.csv: expected text in UTF-8 in .*l.csv"),
        ("l.csv", b"image,label\nhttp://x/1.png,cat\n", {}, "paths of pictures in .*l.csv, got the address http"),
        ("l.csv", b"image,label\n7.png,cat\n", {}, "no file is at '.*7.png' or at any other of its paths"),
        (
            "l.jsonl",
            b'{"image": "1.png", "label": 1}\n{"label": "a"}',
            {},
            "one kind in column 'label', found int",
        ),
        ("l.csv", b"image,label\n1.png,cat\n", {"label_column": "kind"}, "l.csv: has the columns image, label"),
        ("t.parquet", b"PAR1 no more", {}, "t.parquet cannot be read as parquet"),
    ],
)
def test_refusals(file, content, options, message, tmp_path):
    draw(tmp_path, "1.png")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path, **options)


def test_tables_that_tell_no_split_are_refused(tmp_path):
    draw(tmp_path, "1.png")
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text("image,label\n1.png,cat\n")
    with pytest.raises(ValueError, match="found a.csv, b.csv; give --dataset the path of one"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["absent/at/all", "./absent", "/absent"])
def test_what_is_not_here_is_no_name_on_the_hub(name):
    with pytest.raises(ValueError, match=f"{name} has none of them\nfound: nothing is there\nlayouts:\n- saved by"):
        read_splits(LAYOUTS, DataArguments(dataset=name))


def test_a_name_that_is_on_no_hub_either(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no such data set")

    monkeypatch.setattr("recipes.reading.stored.load_dataset", fail)  # itself it asks for half a minute
    with pytest.raises(ValueError, match="neither file nor folder is here, and as a data set .* .no such"):
        read_splits(LAYOUTS, DataArguments(dataset="my_photos"))


def test_links_to_a_folder_above_end(tmp_path):
    draw(tmp_path, "cat/1.png", "dog/2.png")
    (tmp_path / "cat" / "up").symlink_to(tmp_path)
    assert Place(str(tmp_path)).files == ["cat/1.png", "dog/2.png"]


def test_a_path_is_found_where_most_of_the_table_is(tmp_path):
    draw(tmp_path, "one/a/1.png", "one/a/2.png", "two/1.png")
    finder = Finder(tmp_path / "two" / "t.csv", DataArguments(dataset="x")).fit(["x/one/a/1.png", "x/one/a/2.png"])
    assert finder("x/one/a/1.png") == str(tmp_path / "one" / "a" / "1.png")


def test_a_split_without_its_files_is_left_out_and_the_others_are_read(tmp_path, caplog):
    draw(tmp_path, "1.png")
    (tmp_path / "train.csv").write_text("image,label\n1.png,cat\n")
    (tmp_path / "test.csv").write_text("image,label\nunseen/7.png,cat\n")
    assert list(read(tmp_path)) == ["train"]
    assert "split test is left out: expected paths of files in column 'image' of split 'test'" in caplog.text


@pytest.mark.parametrize(
    ("pictures", "text", "message"),
    [
        (["train/cat.0.png", "test1/1.png"], {}, "the folders test1, train of .* look like splits"),
        (
            ["images/1.png", "annotations/1.png"],
            {},
            "annotations, images, which are rather parts of a data",
        ),
        (
            *(["part_1/1.png", "part_2/2.png"], {"meta.csv": "image_id,dx\n1,mel\n2,nv\n"}),
            r"tables of the pictures: meta.csv \(has the columns image_id, dx\); --label_column NAME reads a table",
        ),
        (
            *(["images/pie/1.png", "images/cake/2.png"], {"meta/train.txt": "pie/1\ncake/2\n"}),
            r"the folders cake, pie and tables of the pictures: meta/train.txt \(paths alone\)",
        ),
        (["images/0.png", "images/1.png"], {"labels/1.txt": "0 0.5 0.5 0.2 0.2\n"}, "has none of them"),
    ],
    ids=["splits", "parts", "table", "lists", "boxes"],
)
def test_folders_that_are_no_labels_are_refused_with_the_flag_that_decides(pictures, text, message, tmp_path):
    """Dogs vs. cats, Oxford Pets, HAM10000, Food-101 and an export of YOLO, as they are unpacked."""
    draw(tmp_path, *pictures)
    for name, content in text.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)
    if "labels/1.txt" not in text:
        assert sum(map(len, read(tmp_path, label_level=1).values())) == 2


def test_what_is_left_unread_is_said(tmp_path, caplog):
    composed, decomposed = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    draw(tmp_path, f"{composed}/1.png", f"{decomposed}/2.png", "tea/3.png")
    (tmp_path / "tea" / "4.HEIC").write_text("")
    assert {row[1] for row in read(tmp_path)["train"]} == {0, 1}, "one label however its accent is written"
    assert "1 files of .heic are not read, as tea/4.HEIC; convert them" in caplog.text
    draw(tmp_path / "b", "1.png")
    (tmp_path / "b" / "labels.csv").write_text("image,label\n1.png,cat\n")
    (tmp_path / "b" / "partition.csv").write_text("image,partition\n1.png,0\n")
    read(tmp_path / "b")
    assert "tables that are not read: partition.csv (has the columns image, partition)" in caplog.text


@pytest.mark.parametrize(
    ("name", "advice"), [("a.zip", "unpack it"), ("a.xlsx", "save the table as .csv"), ("a.csv", "has no rows")]
)
def test_a_file_of_another_kind_gets_advice(name, advice, tmp_path):
    (tmp_path / name).write_text("")
    for named in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=f"{name}: {advice}"):
            read(named)
