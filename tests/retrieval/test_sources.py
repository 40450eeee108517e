"""What a user may name as a source of pictures, and what is none."""

import os
import tarfile
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedded import embed, encoded, picture, reasons, rows, write_tar

from vit_embed.retrieval.embed_command import EXIT_ERROR, EXIT_UNREADABLE
from vit_embed.retrieval.embedder import load_embedder
from vit_embed.retrieval.sources import Item, find_source


def list_file(folder: Path) -> str:
    picture(0).save(folder / "a.png")
    (folder / "b").mkdir()
    picture(1).save(folder / "b" / "b.png")
    (folder / "list.txt").write_text(f"a.png\nb/b.png\n\n{folder}/a.png\n")
    return str(folder / "list.txt")


def one_file(folder: Path) -> str:
    picture(0).save(folder / "a.png")
    return str(folder / "a.png")


def glob_pattern(folder: Path) -> str:
    list_file(folder)
    return f"{folder}/**/*.png"


def tars(folder: Path) -> str:
    for number in range(2):
        content = {"x.png": encoded(picture(number)), "x.txt": b"a caption", "y.jpg": encoded(picture(5), "JPEG")}
        write_tar(folder / f"{number}.tar", content)
    return f"{folder}/*.tar"


def parquet_of(column: str, cell) -> object:
    def write(folder: Path) -> str:
        for number in range(2):
            picture(number).save(folder / f"{number}.png")
        table = pa.table({"label": [1, 2], column: [cell(folder, number) for number in range(2)]})
        pq.write_table(table, folder / "table.parquet")
        return str(folder / "table.parquet")

    return write


def hub_cell(folder: Path, number: int) -> dict:
    return {"bytes": encoded(picture(number)), "path": None}


def saved_dataset(folder: Path) -> str:
    features = datasets.Features({"img": datasets.Image()})
    table = datasets.Dataset.from_dict({"img": [picture(0), picture(1)]}, features=features)
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(folder / "set")
    return str(folder / "set")


def memory(folder: Path) -> str:
    system = fsspec.filesystem("memory")
    for number, name in enumerate(("a.png", "b/b.PNG", "b/notes.txt")):
        system.pipe(f"/{folder.name}/{name}", encoded(picture(number)))
    return f"memory://{folder.name}"


SOURCES = {
    "a file": (one_file, ["a.png"]),
    "a list": (list_file, ["a.png", "b/b.png", "{folder}/a.png"]),
    "a glob": (glob_pattern, ["a.png", "b/b.png"]),
    "tars": (tars, ["0.tar/x.png", "0.tar/y.jpg", "1.tar/x.png", "1.tar/y.jpg"]),
    "parquet of paths": (parquet_of("path", lambda folder, n: f"{n}.png"), ["0.png", "1.png"]),
    "parquet of bytes": (
        parquet_of("bytes", lambda folder, n: encoded(picture(n))),
        ["table.parquet/0", "table.parquet/1"],
    ),
    "parquet of the Hub": (parquet_of("image", hub_cell), ["table.parquet/0", "table.parquet/1"]),
    "a data set": (saved_dataset, ["0", "1"]),
    "an address": (memory, ["memory:///{name}/a.png", "memory:///{name}/b/b.PNG"]),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_gives_its_pictures_with_keys_in_order(kind, tmp_path, model):
    make, keys = SOURCES[kind]
    source = make(tmp_path)
    assert embed(source, tmp_path / "out.parquet", model, "--vector_dtype", "float32") == 0
    expected = [key.format(folder=tmp_path, name=tmp_path.name) for key in keys]
    found = rows(tmp_path / "out.parquet")
    assert list(found) == expected
    embedder = load_embedder(model, "float32")
    seeds = [
        5 if "jpg" in key else int("b.p" in key.lower() or "1" in Path(key).parts[-1] or key[0] == "1") for key in keys
    ]
    for key, seed in zip(expected, seeds):
        content = encoded(picture(seed), "JPEG" if key.endswith("jpg") else "PNG")
        np.testing.assert_allclose(found[key], embedder([Item("", "", content)]).embeddings[0], atol=1e-5, err_msg=key)
    total = find_source(source).total()
    assert total in (None, len(keys))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/at/all.jpg", "nothing is there; what can be read: a folder of pictures"),
        ("{empty}", "found none; what can be read"),
        ("{empty}/*.jpg", "found none"),
        ("{empty}/list.txt", "expected a file"),
        ("{empty}/*.tar", "expected files at"),
        ("{table}", "must have a column of pictures (image, img"),
        ("owner/absent", "as a data set it cannot be read"),
    ],
)
def test_what_is_no_source_is_refused_before_anything_is_written(source, message, tmp_path, model, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table({"label": [1]}), tmp_path / "table.parquet")
    source = source.format(empty=tmp_path / "empty", table=tmp_path / "table.parquet")
    assert embed(source, tmp_path / "out.parquet", model) == EXIT_ERROR
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.parquet").exists()


def test_a_folder_that_links_to_itself_is_listed_once(photos):
    (photos / "inner" / "again").symlink_to(photos)
    assert len(list(find_source(str(photos)).items())) == 10


def test_tars_of_one_name_in_two_folders_are_told_apart_and_a_torn_one_stops_nothing(model, tmp_path):
    for name, seed in (("a", 0), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "0.tar", {f"{n}.png": encoded(picture(seed + n)) for n in range(3)})
    torn = (tmp_path / "b" / "0.tar").read_bytes()
    (tmp_path / "b" / "0.tar").write_bytes(torn[: len(torn) // 2])
    assert embed(f"{tmp_path}/*/0.tar", tmp_path / "out.parquet", model) == EXIT_UNREADABLE
    found = rows(tmp_path / "out.parquet")
    assert {"a/0.tar/0.png", "a/0.tar/2.png", "c/0.tar/0.png", "c/0.tar/2.png"} <= found.keys()
    assert "cannot be read to its end" in reasons(tmp_path / "out.parquet")["b/0.tar/"]
    with pytest.raises(ValueError, match="compressed"):
        find_source("pictures.tar.gz")


def test_a_hard_link_in_a_tar_is_a_picture(tmp_path):
    for name in ("a.png", "b.png"):
        picture(0).save(tmp_path / "a.png") if name == "a.png" else os.link(tmp_path / "a.png", tmp_path / name)
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        tar.add(tmp_path / "a.png", "a.png")
        tar.add(tmp_path / "b.png", "b.png")
    items = list(find_source(str(tmp_path / "links.tar")).items())
    assert [item.key for item in items] == ["links.tar/a.png", "links.tar/b.png"]
    assert items[0].content == items[1].content


def test_a_changed_cell_of_parquet_is_embedded_again(model, tmp_path, capsys):
    for seed in (0, 1):
        pq.write_table(pa.table({"bytes": [encoded(picture(seed))]}), tmp_path / "cells.parquet")
        assert embed(tmp_path / "cells.parquet", tmp_path / "out.parquet", model) == 0
        assert "1 embedded" in capsys.readouterr().out
    assert len(rows(tmp_path / "out.parquet")) == 1


def test_an_address_of_a_folder_may_have_a_dot(tmp_path):
    fsspec.filesystem("memory").pipe(f"/{tmp_path.name}/v1.2/a.png", encoded(picture(0)))
    (item,) = find_source(f"memory://{tmp_path.name}/v1.2").items()
    assert item.key.endswith("v1.2/a.png")


def test_a_file_that_is_there_is_no_glob(tmp_path):
    picture(0).save(tmp_path / "p[1].png")
    (item,) = find_source(str(tmp_path / "p[1].png")).items()
    assert item.key == "p[1].png"


def test_a_data_set_has_the_same_stamps_each_time_and_names_its_splits(tmp_path):
    folder = saved_dataset(tmp_path)
    stamps = [[item.stamp for item in find_source(folder).items()] for _ in range(2)]
    assert stamps[0] == stamps[1] and all(stamps[0])
    with pytest.raises(ValueError, match="--split is one of train, test"):
        find_source(folder, split="absent")
