"""recipes/reading/captions.py: every layout of captioned pictures reads to the same rows, whole and as a stream."""

from pathlib import Path

import pytest
from captioned_sets import FLAGS, SETS, expected, number_of
from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature

from recipes.contrastive import DataArguments, load_captioned
from recipes.reading.captions import CAPTIONS, as_list
from recipes.reading.tables import IMAGE, PROBLEM, ROW


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
    "coco": ("annotations/captions_train2017.json image 900", "annotations/captions_train2017.json image 911"),
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


def test_tags_and_groups_come_with_the_rows(made):
    for name in ("json_shards", "imagefolder_jsonl"):
        arguments = made(name)
        rows = load_captioned(arguments)["train"]
        assert rows[5][arguments.tag_column] == ["flat", "square"]
    assert load_captioned(made("json_shards"))["train"]["json.thing"][3] == "t3"
