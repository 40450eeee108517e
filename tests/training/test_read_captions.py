"""recipes/reading/captions.py: every layout of captioned pictures reads to the same rows, whole and as a stream."""

import io
import json
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
from captioned_sets import FLAGS, SETS, content, expected, number_of, write_tar
from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature
from PIL import Image as PictureImage

from recipes.contrastive import DataArguments, load_captioned
from recipes.data import columns_of
from recipes.reading import stored
from recipes.reading.captions import CAPTIONS, as_list
from recipes.reading.tables import IMAGE, PROBLEM, ROW
from recipes.reading.tars import NOTE


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Writes a set of SETS to the current folder."""
    monkeypatch.chdir(tmp_path)

    def make(name: str) -> DataArguments:
        SETS[name](Path(name))
        return DataArguments(dataset=name, **FLAGS.get(name, {}))

    return make


def rows_of(rows: Dataset | IterableDataset) -> list[tuple]:
    """(number of the picture or None, captions, name, problem) of each row."""
    found = []
    for row in rows.cast_column(IMAGE, ImageFeature(decode=False)):
        problem = row.get(PROBLEM)
        number = None if problem else number_of(ImageFeature().decode_example(row[IMAGE]))
        found.append((number, as_list(row[CAPTIONS]), row[ROW], problem))
    return found


def read(dataset: object = "set", **options) -> dict[str, list[tuple]]:
    return {s: rows_of(rows) for s, rows in load_captioned(DataArguments(dataset=str(dataset), **options)).items()}


NAMES = {
    "open_clip": ("train.csv:2", "train.csv:14"),  # two lines of a caption
    "cc3m": ("Train_GCC-training.tsv:1", "Train_GCC-training.tsv:12"),
    "flickr8k": ("captions.txt:2", "captions.txt:36"),
    "coco": tuple(f"annotations/captions_train2017.json {number:012}.jpg" for number in (0, 11)),
    "karpathy": ("dataset_coco.json COCO_val2014_000000000000.jpg", "dataset_coco.json COCO_val2014_000000000011.jpg"),
    "photos": ("train/a/000.png", "train/a/011.png"),
    "imagefolder": ("train/metadata.csv:2", "train/metadata.csv:13"),
    "parquet_structs": ("train-00000-of-00002.parquet row 0", "train-00001-of-00002.parquet row 3"),
    "shards": ("train-000.tar/000000", "train-001.tar.gz/000011"),
    "json_shards": ("train/00000.tar/000000000", "train/00000.tar/000000011"),
}


@pytest.mark.parametrize("name", SETS)
def test_every_set_reads_to_what_was_written_whole_and_as_a_stream(name, made):
    """Each picture with its captions, in its split; ROW is the place that its user knows."""
    arguments = made(name)
    whole = {split: rows_of(rows) for split, rows in load_captioned(arguments).items()}
    assert {split: [row[:2] for row in rows] for split, rows in whole.items()} == expected(name)
    if name in NAMES:
        assert (whole["train"][0][2], whole["train"][-1][2]) == NAMES[name]
    arguments.streaming = True
    streams = load_captioned(arguments)
    assert isinstance(streams["train"], IterableDataset)
    assert {split: rows_of(rows) for split, rows in streams.items()} == whole
    assert streams["train"].num_shards >= 2 or name == "json_shards", "parts for processes and workers"
    shuffled = rows_of(streams["train"].shuffle(seed=1, buffer_size=20))
    assert shuffled != whole["train"] and sorted(shuffled) == sorted(whole["train"]), "names go with their rows"


def test_rows_of_a_stream_of_the_hub_are_named_by_their_shard(made, monkeypatch):
    files = sorted(map(str, Path(made("parquet_structs").dataset).glob("*.parquet")))
    splits = {"train": files[:2], "validation": files[2:]}
    hub = stored.load_dataset("parquet", data_files=splits, streaming=True)
    monkeypatch.setattr(stored, "load_dataset", lambda name, streaming: hub)
    rows = load_captioned(DataArguments(dataset="owner/name", streaming=True))["train"]
    named = {(number, row) for number, _, row, _ in rows_of(rows)}
    assert rows.num_shards >= 2 and len({row.split(" row ")[0] for _, row in named}) == rows.num_shards
    assert {row for number, row in named if number == 0} == {"shard 0 row 0"}
    assert {(number, row) for number, _, row, _ in rows_of(rows.shuffle(seed=1, buffer_size=20))} == named
    parts = [rows_of(rows.shard(2, part)) for part in (0, 1)]
    assert {(number, row) for part in parts for number, _, row, _ in part} == named


def test_tags_and_groups_come_with_the_rows(made):
    for name in ("json_shards", "imagefolder_jsonl"):
        arguments = made(name)
        rows = load_captioned(arguments)["train"]
        assert rows[5][arguments.tag_column] == ["flat", "square"]
    assert load_captioned(made("json_shards"))["train"]["json.thing"][3] == "t3"


# --- tables ---

LOGGED = "recipes.reading"


def table(folder: Path, name: str, text: str, *pictures: str) -> Path:
    """A folder of a table and pictures 1, 2, ... of these names."""
    for file in (name, *pictures):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures, 1):
        (folder / picture).write_bytes(content(number, "png"))
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_a_stray_quote_swallows_no_line_and_is_named(tmp_path, caplog):
    text = 'filepath\ttitle\n1.png\t"a stray\n2.png\tone at the end"\n3.png\t"not" closed\n4.png\t"a\nb"\n'
    folder = table(tmp_path, "captions.tsv", text, "1.png", "2.png", "3.png", "4.png")
    with caplog.at_level(logging.INFO, LOGGED):
        found = read(folder)["train"]
    assert [row[:3] for row in found] == [
        (1, ['"a stray'], "captions.tsv:2"),
        (2, ['one at the end"'], "captions.tsv:3"),
        (3, ['"not" closed'], "captions.tsv:4"),
        (4, ["a\nb"], "captions.tsv:5"),
    ]
    assert "captions.tsv: 2 lines have a quote that does not close, read as a letter: 2, 4" in caplog.text


@pytest.mark.parametrize(
    ("text", "captions"),
    [
        ("1.png,a cat; a dog\n2.png,a cat\n", ["a cat; a dog", "a cat"]),
        ("image_name| comment_number| comment\n1.png| 0| a cat, a dog; a cow\n2.png| 0| a cat\n", None),
        ('image,caption\n1.png,"a \\"cat\\", a dog"\n2.png, "b, c"\n', ['a "cat", a dog', "b, c"]),
        ("caption,image\na cat,1.png\n\n\na dog,2.png\n", ["a cat", "a dog"]),
        ("image,caption,split\n1.png,a,train\n9.png,x,restval\n2.png,b,train\n1.png,y,test\n", ["a", "b"]),
        ("image,raw\n1.png,\"['a', 'b']\"\n2.png,\"['c']\"\n", [["a", "b"], ["c"]]),
    ],
)
def test_separators_quotes_and_lists_in_cells(text, captions, tmp_path):
    captions = captions or ["a cat, a dog; a cow", "a cat"]
    found = read(table(tmp_path, "captions.csv", text, "1.png", "2.png"))["train"]
    assert [row[:2] for row in found] == [(n, as_list(each)) for n, each in enumerate(captions, 1)]


def test_a_json_of_paths_and_captions(tmp_path):
    folder = table(tmp_path, "captions.json", '{"1.png": "a", "2.png": ["b", "c"]}', "1.png", "2.png")
    assert [row[:3] for row in read(folder)["train"]] == [
        (1, ["a"], "captions.json:1"),
        (2, ["b", "c"], "captions.json:2"),
    ]


def test_rows_of_one_picture_become_one_and_what_is_of_no_use_is_named(tmp_path, caplog):
    rows = 'image,caption,tag\n1.png,a,x\n2.png,b,y\n1.png,c,z\n1.png,,z\n3.png,d,x\n2.png,e,"y",\n'
    folder = table(tmp_path, "captions.csv", rows, "1.png", "2.png")
    with caplog.at_level(logging.INFO, LOGGED):
        splits = load_captioned(DataArguments(dataset=str(folder)))
    ragged = "4 cells in a table of 3 columns; quote a text that holds a separator"
    assert list(zip(splits["train"][ROW][:], splits["train"][CAPTIONS][:], splits["train"][PROBLEM][:])) == [
        ("captions.csv:2", ["a", "c"], None),
        ("captions.csv:3", ["b"], None),
        ("captions.csv:5", [], None),
        ("captions.csv:6", ["d"], None),
        ("captions.csv:7", ["e"], ragged),
    ]
    assert "split train: 6 rows are of 5 pictures, with up to 2 captions" in caplog.text
    assert columns_of(splits["train"]) == ["image", "tag", "captions"]


def test_folders_in_paths_name_splits(tmp_path):
    text = "file_name,text\ndata/train/1.png,a\ndata/train/2.png,b\ndata/val/3.png,c\n"
    folder = table(tmp_path, "metadata.csv", text, "data/train/1.png", "data/train/2.png", "data/val/3.png")
    found = read(folder)
    assert {split: [row[0] for row in rows] for split, rows in found.items()} == {"train": [1, 2], "validation": [3]}


def test_texts_and_lists_of_texts_mix_and_numbers_are_refused(tmp_path):
    lines = [{"image": "1.png", "text": "a"}, {"image": "2.png", "text": ["b", None, ""]}]
    folder = table(tmp_path / "a", "m.jsonl", "\n".join(map(json.dumps, lines)), "1.png", "2.png")
    assert [row[1] for row in read(folder)["train"]] == [["a"], ["b"]]
    folder = table(tmp_path / "b", "m.jsonl", '{"image": "1.png", "text": 5}', "1.png")
    with pytest.raises(ValueError, match="texts or lists of texts in column 'captions' .* Value.'int64'.; set --capt"):
        read(folder)


# --- json of COCO, texts beside pictures ---


def test_what_cocos_json_lacks_is_named(tmp_path, caplog):
    images = [{"id": number, "file_name": f"{number}.png"} for number in (1, 2, 3)]
    annotations = [{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": None}, {"image_id": 9, "caption": "b"}]
    coco = json.dumps({"images": images, "annotations": annotations})
    folder = table(tmp_path, "annotations/x.json", coco, "val/1.png", "val/2.png", "images/train/3.png")
    assert [row[1:] for row in rows_of(load_captioned(DataArguments(dataset=str(folder)))["train"].select([1, 2]))] == [
        ([], "annotations/x.json 2.png", "no caption"),
        ([], "annotations/x.json 3.png", "no caption"),
    ]
    assert "1 images have captions and are not among the images: [9]" in caplog.text
    (folder / "annotations" / "captions_test.json").write_text(coco.replace(".png", ".gone"))
    assert list(read(folder)) == ["train"]
    assert "left out: expected the pictures of" in caplog.text and "captions_test.json, no file" in caplog.text
    with pytest.raises(ValueError, match=r"pictures of .*x.json, no file is at '.*1.png'; set --image_folder"):
        read(folder / "annotations" / "x.json", image_folder=str(folder / "images"))


def test_texts_beside_pictures(tmp_path, caplog):
    """One without a text is named; .caption where --caption_column asks for it; boxes of YOLO are no captions."""
    folder = table(tmp_path, "1.txt", "a\n\nb\n", "1.png", "2.png")
    (folder / "1.caption").write_text("c")
    assert read(folder)["train"] == [
        (1, ["a", "b"], "1.png", None),
        (None, [], "2.png", "no text of its name beside it"),
    ]
    assert read(folder, caption_column="caption")["train"][0][1] == ["c"]
    (folder / "1.txt").write_text("0 0.5 0.5 0.25 0.125\n")
    with pytest.raises(ValueError, match=r"captions in the texts beside the pictures of .*found numbers, as '0 0.5"):
        read(folder)


# --- tars ---

GOOD = {"jpg": content(1, "jpg"), "txt": b"fine"}
# files of a sample -> what is wrong with it
SPOILED = {
    "no picture, but txt": {"txt": b"a"},
    "a .json that is none": {"jpg": GOOD["jpg"], "json": b"{"},
    "a .json that is a list, not an object": {"jpg": GOOD["jpg"], "json": b"[]"},
    "a .txt that is no text in UTF-8": {"jpg": GOOD["jpg"], "txt": b"\xff"},
    "a int in 'json.caption' in place of a text": {"jpg": GOOD["jpg"], "json": b'{"caption": 5}'},
    "a dict in 'json.caption' in place of a text": {"jpg": GOOD["jpg"], "json": b'{"caption": [{}]}'},
}


@pytest.mark.parametrize("streaming", [False, True])
def test_what_a_sample_lacks_is_named_by_its_key(streaming, tmp_path):
    samples = {f"s/{place}": files for place, files in enumerate(SPOILED.values())}
    write_tar(
        tmp_path / "a.tar", {"s/good": GOOD, "s/none": {"jpg": GOOD["jpg"], "json": b'{"caption": null}'}, **samples}
    )
    found = read(tmp_path, streaming=streaming)["train"]
    assert found[0] == (1, ["fine"], "a.tar/s/good", None)
    assert found[1] == (1, [], "a.tar/s/none", None)
    assert [row[2:] for row in found[2:]] == [(f"a.tar/s/{place}", problem) for place, problem in enumerate(SPOILED)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_a_torn_tar_gives_what_came_before_and_is_named(kind, streaming, tmp_path):
    """Cut in a picture, in a header, or between two, or overwritten in the middle; the next tar is read."""
    write_tar(tmp_path / f"0.{kind}", {str(number): {"png": noise(number), "txt": b"a"} for number in range(8)})
    write_tar(tmp_path / "1.tar", {"good": GOOD})
    file, whole = tmp_path / f"0.{kind}", (tmp_path / f"0.{kind}").read_bytes()
    member = tar_offsets(file)[6] if kind == "tar" else len(whole) // 2
    cuts = [whole[: member + 700], whole[: member + 100], whole[:member]]
    cuts += [whole[:member] + b"\x55" * 600 + whole[member + 600 :]]
    for cut in cuts:
        file.write_bytes(cut)
        *before, last, good = read(tmp_path, streaming=streaming)["train"]
        assert [row[2] for row in before] == [f"0.{kind}/{number}" for number in range(len(before))]
        assert 1 < len(before) < 8
        assert last[2] == f"0.{kind}" and last[3].startswith("the rest of a tar that cannot be read (")
        assert good[2] == "1.tar/good"


def noise(number: int) -> bytes:
    """A picture that does not compress, so that a cut of a compressed tar is in the middle of its samples."""
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    PictureImage.fromarray(pixels).save(file, "png")
    return file.getvalue()


def tar_offsets(path: Path) -> list[int]:
    """Where each file begins."""
    with tarfile.open(path) as tar:
        return [member.offset for member in tar]


def test_of_two_pictures_in_a_sample_the_one_used_is_named(tmp_path):
    write_tar(tmp_path / "a.tar", {"0": {**GOOD, "png": content(2, "png")}, "1": GOOD})
    rows = load_captioned(DataArguments(dataset=str(tmp_path)))["train"]
    assert rows[NOTE][:] == ["png and jpg, of which png is used (--image_column)", None]
    assert [row[0] for row in rows_of(rows)] == [2, 1]
    assert [row[0] for row in read(tmp_path, image_column="jpg")["train"]] == [1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"caption_column": "json.text"},
            r"expected files \['json.text'\] in the samples of .*a.tar, they have jpg, txt",
        ),
        (
            {"image_column": "png"},
            r"expected files \['png'\] in the samples of .*a.tar, they have jpg, txt; set --image",
        ),
        ({"tag_column": "json.tags"}, r"expected files \['json.tags'\] in the samples"),
    ],
)
def test_files_of_tars_that_are_asked_for_and_missing(options, message, tmp_path):
    write_tar(tmp_path / "a.tar", {"0": GOOD})
    with pytest.raises(ValueError, match=message):
        read(tmp_path, **options)


def test_tars_without_captions_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", {"0": {"jpg": GOOD["jpg"], "json": b'{"label": "cat"}'}})
    with pytest.raises(
        ValueError, match=r"expected captions .txt, caption, json.captions.* they have jpg, json, json.label"
    ):
        read(tmp_path)


def test_tars_whose_samples_are_torn_apart_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("0.jpg", "1.jpg", "0.txt", "1.txt"):
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(ValueError, match=r"beside its text in .*a.tar, each sample is one file; .* tar --sort=name"):
        read(tmp_path)
