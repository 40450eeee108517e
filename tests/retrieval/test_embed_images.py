"""embed_images: what it writes, every unreadable file, killed at any moment, run again, refused where it must be."""

import hashlib
import importlib.util
import io
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from embedded import embed, encoded, picture, reasons, rows, same_rows
from PIL import Image
from tqdm import tqdm
from transformers import AutoImageProcessor

from vit_embed import VitEmbedForContrastive, VitEmbedForImageClassification, VitEmbedTextModel
from vit_embed.retrieval.embed_command import EXIT_ERROR, EXIT_UNREADABLE, main
from vit_embed.retrieval.embedder import Clock, Failure, Read, Rows, load_embedder
from vit_embed.retrieval.pictures import LEAST_REDUCED, read_reduced
from vit_embed.retrieval.run import embed_into
from vit_embed.retrieval.sources import Item, find_source
from vit_embed.retrieval.store import Store

REPO = Path(__file__).resolve().parents[2]


# What is written


def test_a_folder_becomes_the_models_own_vectors(photos, model, tmp_path, capsys):
    assert embed(photos, tmp_path / "out.parquet", model, "--vector_dtype", "float32", "--sha256") == 0
    assert "10 embedded" in capsys.readouterr().out
    found = rows(tmp_path / "out.parquet")
    assert list(found) == [
        "0.png",
        "2.png",
        "4.png",
        "6.png",
        "8.png",
        *(f"inner/deep/{n}.png" for n in (1, 3, 5, 7, 9)),
    ]
    processor = AutoImageProcessor.from_pretrained(model)
    inputs = processor([picture(int(Path(path).stem)) for path in found], return_tensors="pt")
    with torch.no_grad():
        expected = VitEmbedForContrastive.from_pretrained(model).eval().get_image_features(**inputs, normalize=True)
    # Float32 sums in another order; the processor rounds its float32 pixels at another place.
    np.testing.assert_allclose(np.stack(list(found.values())), expected.numpy(), atol=1e-5)
    table = pq.read_table(tmp_path / "out.parquet")
    assert set(table["width"].to_pylist()) == {40} and set(table["height"].to_pylist()) == {36}
    assert table["sha256"].to_pylist()[0] == hashlib.sha256((photos / "0.png").read_bytes()).hexdigest()
    assert [shard.name for shard in sorted((tmp_path / "out.parquet").iterdir())] == [
        f"part-0000{n}.parquet" for n in range(3)
    ]
    assert json.loads(table.schema.metadata[b"vit_embed"])["dtype"] == "float32"


@pytest.mark.parametrize("vector_dtype", ["float16", "float32"])
def test_the_files_open_in_every_data_tool(photos, model, tmp_path, vector_dtype):
    output = tmp_path / "out.parquet"
    assert embed(photos, output, model, "--vector_dtype", vector_dtype) == 0
    expected, files = np.stack(list(rows(output).values())).astype(np.float32), f"{output}/*.parquet"
    readers = {
        "pandas": lambda: pandas.read_parquet(output)["embedding"].tolist(),
        "datasets": lambda: datasets.load_dataset(str(output), split="train", cache_dir=str(tmp_path / "cache"))[
            "embedding"
        ][:],
    }
    if polars := importlib.util.find_spec("polars") and importlib.import_module("polars"):
        readers["polars"] = lambda: polars.read_parquet(files)["embedding"].to_numpy()
    if duckdb := importlib.util.find_spec("duckdb") and importlib.import_module("duckdb"):
        readers["duckdb"] = lambda: [
            row[0] for row in duckdb.sql(f"select embedding from '{files}' order by filename").fetchall()
        ]
    if faiss := importlib.util.find_spec("faiss") and importlib.import_module("faiss"):
        index = faiss.IndexFlatIP(expected.shape[1])
        index.add(expected)
        assert index.search(expected, 1)[1][:, 0].tolist() == list(range(len(expected)))
    for name, read in readers.items():
        np.testing.assert_allclose(np.array(read(), np.float32), expected, err_msg=name)


def test_patches_come_along(photos, model, tmp_path):
    assert embed(photos, tmp_path / "out.parquet", model, "--patches") == 0
    row = pq.read_table(tmp_path / "out.parquet").to_pylist()[0]
    config = VitEmbedForContrastive.from_pretrained(model).config
    assert len(row["patches"]) == math.prod(config.grid_size) and len(row["patches"][0]) == config.projection_dim
    assert row["grid_height"] == config.grid_size[0]
    norms = np.linalg.norm(np.array(row["patches"]), axis=1)
    np.testing.assert_allclose(norms, 1, atol=2e-3)  # float16


def test_a_model_without_a_joint_space_gives_its_pooled_features(photos, tmp_path):
    folder = tmp_path / "model"
    model = tiny.randomised(VitEmbedForImageClassification(tiny.vision_config(num_labels=3)))
    model.save_pretrained(folder)
    assert embed(photos, tmp_path / "out.parquet", str(folder), "--vector_dtype", "float32") == 0
    embedder = load_embedder(str(folder), "float32")
    pixels = embedder._normalised(torch.from_numpy(embedder.read(Item("a", "", encoded(picture(0)))).pixels)[None])
    expected = torch.nn.functional.normalize(model.eval().trunk(pixels).pooler_output, dim=-1)[0].detach()
    np.testing.assert_allclose(rows(tmp_path / "out.parquet")["0.png"], expected, atol=1e-5)


def test_texts_are_embedded_and_a_long_one_is_left_out_unless_cut(tmp_path):
    texts = ["red apple", "word " * 200, "a rocket"]
    (tmp_path / "captions.txt").write_text("\n".join(texts) + "\n")
    given = ["--texts", str(tmp_path / "captions.txt"), "--dtype", "float32", "--vector_dtype", "float32"]
    assert main([*given, "--output", str(tmp_path / "a.parquet")]) == EXIT_UNREADABLE
    assert list(rows(tmp_path / "a.parquet")) == ["1", "3"]
    assert "--truncate cuts" in reasons(tmp_path / "a.parquet")["2"]
    assert main([*given, "--truncate", "--output", str(tmp_path / "b.parquet")]) == 0
    found = pq.read_table(tmp_path / "b.parquet")
    assert found["text"].to_pylist() == texts
    embedder = load_embedder(str(REPO), "float32", texts=True)
    np.testing.assert_allclose(rows(tmp_path / "b.parquet")["3"], embedder.vectors(["a rocket"])[0], atol=1e-5)


@pytest.mark.parametrize("size", [(4000, 3000), (1500, 3100)])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_large_picture_is_decoded_smaller_but_never_below_twice_the_side(form, size):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    large = picture(0, 60, 40).resize(size, Image.Resampling.BILINEAR)
    file = io.BytesIO(encoded(large, form, exif=exif, compress_level=1))
    small, original = read_reduced(file, 448)
    assert original == size[::-1]
    assert 448 <= min(small.size) < 4 * 448 and (small.width < small.height) == (size[0] > size[1])
    whole, _ = read_reduced(io.BytesIO(file.getvalue()), None)
    assert whole.size == original
    # What the processor then makes of both differs by rounding and by the kind of mean.
    views = [np.asarray(each.resize((224, 224), Image.Resampling.BICUBIC), float) for each in (small, whole)]
    assert np.abs(views[0] - views[1]).mean() < 1.0


@pytest.mark.parametrize("size", [(4243, 2828), (2828, 4243), (3464, 3464)])
def test_a_reduced_picture_is_cropped_where_the_whole_one_is(size):
    """531 x 354 for 4243 x 2828 is not the same shape: its longer side would come out a pixel longer."""
    large = picture(0, 60, 40).resize(size, Image.Resampling.BILINEAR)
    item = Item("a.jpg", "", encoded(large, "JPEG", quality=95))
    reduced, whole = (load_embedder(str(REPO), "float32", reduced=reduced) for reduced in (True, False))
    assert reduced.embed([reduced.read(item)]).embeddings[0] @ whole([item]).embeddings[0] > 0.999
    pixels = [each.read(item).pixels.astype(int) for each in (reduced, whole)]
    assert np.abs(pixels[0] - pixels[1]).mean() < 4.0  # of noise; a crop that is off by half a pixel gives 20


def test_a_picture_below_a_megapixel_is_read_whole():
    assert LEAST_REDUCED > 990 * 1000
    assert read_reduced(io.BytesIO(encoded(picture(0, 990, 1000), "JPEG")), 96)[0].size == (990, 1000)


# Unreadable files


def spoil(folder: Path) -> dict[str, str]:
    """Every kind of unreadable file, and a part of its reason."""
    whole = encoded(picture(3, 400, 300), "JPEG")
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "truncated.png").write_bytes(encoded(picture(3))[:-200])
    (folder / "text.png").write_text("not a picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "broken_link.png").symlink_to(folder / "nothing.png")
    os.mkfifo(folder / "pipe.png")
    bomb = encoded(Image.new("1", (30_000, 30_000)))
    (folder / "bomb.png").write_bytes(bomb)
    Path(os.fsdecode(bytes(folder) + b"/name\xff.png")).write_bytes(encoded(picture(1)))
    Image.fromarray(np.ones((4, 4), np.float32)).save(folder / "float.tif")
    Image.new("RGB", (1, 100_000)).save(folder / "thread.png")
    return {
        "truncated.jpg": "truncated",
        "truncated.png": "",
        "text.png": "no picture, or of a kind",
        "empty.png": "no picture, or of a kind",
        "broken_link.png": "No such file",
        "pipe.png": "not a regular file",
        "bomb.png": "decompression bomb",
        "name\\udcff.png": "not UTF-8",
        "float.tif": "floating point",
        "thread.png": "1 x 100000 pixels would become gigabytes",
    }


def test_every_unreadable_file_is_a_row_with_its_reason_and_stops_nothing(photos, model, tmp_path, capsys):
    expected = spoil(photos)
    start = time.monotonic()
    assert embed(photos, tmp_path / "out.parquet", model) == EXIT_UNREADABLE
    assert time.monotonic() - start < 60
    found = reasons(tmp_path / "out.parquet")
    assert found.keys() == expected.keys()
    for path, part in expected.items():
        assert part in found[path], found[path]
    assert len(rows(tmp_path / "out.parquet")) == 10
    last = capsys.readouterr().out.splitlines()[-1]
    assert "10 embedded" in last and f"{len(expected)} could not be read" in last
    # Nothing is tried twice, but on request.
    (photos / "text.png").unlink()
    assert embed(photos, tmp_path / "out.parquet", model) == EXIT_UNREADABLE
    assert "0 embedded into" in (last := capsys.readouterr().out) and f"{len(expected)} could not be read" in last
    assert embed(photos, tmp_path / "out.parquet", model, "--retry_errors") == EXIT_UNREADABLE
    assert len(rows(tmp_path / "out.parquet")) == 10 and len(reasons(tmp_path / "out.parquet")) == len(expected)


# Run again


def test_new_and_changed_files_alone_are_embedded(photos, model, tmp_path, capsys):
    output = tmp_path / "out.parquet"
    assert embed(photos, output, model) == 0
    before = rows(output)
    assert embed(photos, output, model) == 0
    assert "10 were there; 0 embedded" in capsys.readouterr().out
    picture(77).save(photos / "new.png")
    picture(78).save(photos / "inner" / "deep" / "1.png")
    assert embed(photos, output, model) == 0
    assert "10 were there; 2 embedded" in capsys.readouterr().out
    after = rows(output)
    assert after.keys() == {*before, "new.png"}
    changed = [path for path in before if not np.array_equal(before[path], after[path])]
    assert changed == ["inner/deep/1.png"]


def test_what_cannot_be_reached_for_a_while_keeps_its_rows(photos, model, tmp_path):
    (tmp_path / "list.txt").write_text("photos/0.png\nphotos/2.png\n")
    output = tmp_path / "out.parquet"
    assert embed(tmp_path / "list.txt", output, model) == 0
    photos.rename(tmp_path / "unmounted")
    assert embed(tmp_path / "list.txt", output, model) == 0
    assert list(rows(output)) == ["photos/0.png", "photos/2.png"]


def test_what_a_source_names_twice_is_one_row_and_known_afterwards(photos, model, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("photos/0.png\n" * 9)
    for embedded in (9, 0):
        assert embed(tmp_path / "list.txt", tmp_path / "out.parquet", model) == 0
        assert f"{embedded} embedded" in capsys.readouterr().out
        assert list(rows(tmp_path / "out.parquet")) == ["photos/0.png"]


def test_texts_that_are_there_are_not_embedded_again(tmp_path, capsys):
    (tmp_path / "captions.txt").write_bytes(b"a cat\n\na dog\n" + b"caf\xe9\n")
    given = ["--texts", str(tmp_path / "captions.txt"), "--dtype", "float32", "--output", str(tmp_path / "a.parquet")]
    for embedded in (2, 0):
        assert main(given) == EXIT_UNREADABLE
        assert f"{embedded} embedded" in capsys.readouterr().out
    assert list(rows(tmp_path / "a.parquet")) == ["1", "3"] and "UTF-8" in reasons(tmp_path / "a.parquet")["4"]


def test_a_batch_of_which_nothing_can_be_read_has_the_models_width(photos, tmp_path):
    folder = tmp_path / "model"
    VitEmbedForImageClassification(tiny.vision_config(num_labels=3)).save_pretrained(folder)
    (photos / "0.png").write_text("no picture")
    assert embed(photos, tmp_path / "out.parquet", str(folder), "--batch_size", "1") == EXIT_UNREADABLE
    assert len(rows(tmp_path / "out.parquet")) == 9


def test_damaged_metadata_is_a_reason(photos, model, tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.ImageOps.exif_transpose", lambda picture: abs("not a number"))
    assert embed(photos, tmp_path / "out.parquet", model) == EXIT_UNREADABLE
    assert len(reasons(tmp_path / "out.parquet")) == 10


def test_another_source_does_not_go_into_the_same_output(photos, model, tmp_path, capsys):
    assert embed(photos, tmp_path / "out.parquet", model) == 0
    other = tmp_path / "other"
    other.mkdir()
    picture(50).save(other / "0.png")
    assert embed(other, tmp_path / "out.parquet", model) == EXIT_ERROR
    assert "which is still there; name another --output" in capsys.readouterr().err
    photos.rename(tmp_path / "moved")  # the same pictures, elsewhere
    assert embed(tmp_path / "moved", tmp_path / "out.parquet", model) == 0
    assert "10 were there; 0 embedded" in capsys.readouterr().out


class Stub:
    """Embeds by arithmetic, so that a killed run costs no model."""

    clock = Clock()

    def read(self, item: Item):
        time.sleep(0.001)
        seed = int(Path(item.key).stem)
        return Failure(item, "every seventh") if seed % 7 == 3 else Read(item, np.full(3, seed), 1, 1)

    def embed(self, read):
        good = [each for each in read if isinstance(each, Read)]
        vectors = np.array([np.cos(each.pixels) for each in good], np.float32).reshape(len(good), 3)
        return Rows(good, [each for each in read if isinstance(each, Failure)], vectors)


ABOUT = {"input": "pictures", "weights": "none", "model": "stub"}


def run_stub_in_child(folder: Path, output: Path) -> None:
    tqdm.set_lock(threading.RLock())  # that of tqdm is shared with forks: killed, one would keep it
    run_stub(folder, output)


def run_stub(folder: Path, output: Path) -> None:
    store = Store(output, ABOUT)
    embed_into(store, find_source(str(folder)), Stub(), batch_size=5, shard_size=20, workers=2)


def test_a_run_that_is_killed_twenty_times_ends_like_an_unbroken_one(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(400):
        (folder / f"{number:04d}.png").write_bytes(b"")
    run_stub(folder, tmp_path / "whole.parquet")
    chance = random.Random(0)
    process = multiprocessing.get_context("fork")
    kills = 0
    while kills < 20:
        child = process.Process(target=run_stub_in_child, args=(folder, tmp_path / "killed.parquet"))
        child.start()
        child.join(chance.uniform(0.01, 0.2))
        if child.exitcode == 0:  # done already: start afresh with what is left of the kills
            same_rows(rows(tmp_path / "killed.parquet"), rows(tmp_path / "whole.parquet"))
            for shard in (tmp_path / "killed.parquet").iterdir():
                shard.unlink()
            continue
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills += 1
    run_stub(folder, tmp_path / "killed.parquet")
    expected = rows(tmp_path / "whole.parquet")
    same_rows(rows(tmp_path / "killed.parquet"), expected)
    assert reasons(tmp_path / "killed.parquet") == reasons(tmp_path / "whole.parquet")
    names = [
        [shard.name for shard in sorted(out.iterdir())]
        for out in (tmp_path / "whole.parquet", tmp_path / "killed.parquet")
    ]
    assert names[0] == names[1] and not list(tmp_path.glob(".*.partial"))


def test_a_row_that_was_replaced_is_taken_out_after_a_kill_between_both(photos, model, tmp_path, monkeypatch):
    output = tmp_path / "out.parquet"
    assert embed(photos, output, model) == 0
    picture(78).save(photos / "0.png")
    with monkeypatch.context() as patched:
        patched.setattr(Store, "drop_replaced", lambda self: os._exit)
        assert embed(photos, output, model) == 0
    assert pq.read_table(output)["path"].to_pylist().count("0.png") == 2
    assert embed(photos, output, model) == 0
    assert len(rows(output)) == 10


@pytest.mark.heavy
def test_the_command_itself_is_killed_and_goes_on(photos, model, tmp_path):
    for number in range(10, 300):
        picture(number, 300, 300).save(photos / f"{number}.jpg")
    command = [sys.executable, str(REPO / "embed_images.py"), str(photos), "--model", model, "--dtype", "float32"]
    command += ["--batch_size", "4", "--shard_size", "8", "--output"]
    subprocess.run([*command, str(tmp_path / "whole.parquet")], check=True, capture_output=True)
    for _ in range(3):
        process = subprocess.Popen([*command, str(tmp_path / "killed.parquet")], stderr=subprocess.DEVNULL)
        while len(list((tmp_path / "killed.parquet").glob("*"))) < 3 and process.poll() is None:
            time.sleep(0.02)
        time.sleep(random.uniform(0, 0.5))
        process.kill()
        process.wait()
    subprocess.run([*command, str(tmp_path / "killed.parquet")], check=True, capture_output=True)
    same_rows(rows(tmp_path / "killed.parquet"), rows(tmp_path / "whole.parquet"))


# Refused before work, or without loss


def test_another_models_or_another_processings_output_is_refused(photos, model, tmp_path, capsys):
    output = tmp_path / "out.parquet"
    assert embed(photos, output, model) == 0
    before = rows(output)
    other = tmp_path / "other"
    tiny.randomised(VitEmbedForContrastive(tiny.dual_config()), seed=5).save_pretrained(other)
    for changed, word in (
        ([str(other)], "weights"),
        ([model, "--patches"], "patches"),
        ([model, "--full_size"], "reduced"),
    ):
        assert embed(photos, output, *changed) == EXIT_ERROR
        assert f"made otherwise ({word}" in capsys.readouterr().err
    same_rows(rows(output), before)


def test_an_output_that_cannot_be_is_refused(photos, model, tmp_path, capsys):
    (tmp_path / "file.parquet").write_bytes(b"a file")
    (tmp_path / "foreign.parquet").mkdir()
    pq.write_table(pa.table({"a": [1]}), tmp_path / "foreign.parquet" / "part-00000.parquet")
    for name, message in {
        "out": "expected --output to end in .parquet",
        "file.parquet": "is a file",
        "foreign.parquet": "was not written by vit_embed.embed_images",
        "file.parquet/inner.parquet": "Not a directory",
    }.items():
        assert embed(photos, tmp_path / name, model) == EXIT_ERROR
        assert message in capsys.readouterr().err
    assert (tmp_path / "file.parquet").read_bytes() == b"a file"


def test_two_runs_on_one_output_are_refused(photos, model, tmp_path, capsys):
    store = Store(tmp_path / "out.parquet", ABOUT)
    with store.locked():
        assert embed(photos, tmp_path / "out.parquet", model) == EXIT_ERROR
    assert "another run writes to" in capsys.readouterr().err
    assert embed(photos, tmp_path / "out.parquet", model) == 0


def test_a_full_disk_is_an_error_that_loses_nothing(photos, model, tmp_path, capsys):
    output = tmp_path / "out.parquet"
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    picture(0).save(photos / "z.png")
    assert embed(photos, output, model) == 0
    before = rows(output)
    for number in range(20, 30):
        picture(number).save(photos / f"{number}.png")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # a disk that takes no file of 1000 bytes
        assert embed(photos, output, model) == EXIT_ERROR
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in capsys.readouterr().err
    same_rows(rows(output), before)
    assert embed(photos, output, model) == 0 and len(rows(output)) == 21


def test_a_model_that_cannot_embed_is_refused(photos, tmp_path, capsys):
    text_only = tmp_path / "text"
    VitEmbedTextModel(tiny.dual_config().text_config).save_pretrained(text_only)
    siglip = tmp_path / "siglip"
    siglip.mkdir()
    (siglip / "config.json").write_text('{"model_type": "siglip"}')
    for folder, message in {
        text_only: "expected a model with a picture tower",
        siglip: "convert_checkpoint` converts SigLIP",
        tmp_path / "nowhere": "expected --model to be a folder or Hub id",
    }.items():
        assert embed(photos, tmp_path / "out.parquet", str(folder)) == EXIT_ERROR
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out.parquet").exists()


def test_a_folder_without_a_tokenizer_is_named(model, tmp_path, capsys):
    (tmp_path / "captions.txt").write_text("a cat\n")
    given = ["--texts", str(tmp_path / "captions.txt"), "--model", model, "--output", str(tmp_path / "a.parquet")]
    assert main(given) == EXIT_ERROR
    assert "to have a tokenizer" in capsys.readouterr().err and not (tmp_path / "a.parquet").exists()


def test_dtype_auto_says_what_it_measured(photos, model, tmp_path, caplog):
    caplog.set_level("INFO")
    assert main([str(photos), "--output", str(tmp_path / "out.parquet"), "--model", model]) == 0
    assert "--dtype auto: torch." in caplog.text and "times as fast as float32 here" in caplog.text


def test_options_that_the_model_or_the_machine_has_not_are_refused(photos, model, tmp_path, capsys):
    folder = tmp_path / "classifier"
    VitEmbedForImageClassification(tiny.vision_config(num_labels=3)).save_pretrained(folder)
    for given, message in (
        ((str(folder), "--patches"), "--patches needs a model with a joint space"),
        ((model, "--device", "nonsense"), "--device nonsense cannot be used here"),
    ):
        assert embed(photos, tmp_path / "out.parquet", *given) == EXIT_ERROR
        assert message in capsys.readouterr().err
    assert embed("", tmp_path / "out.parquet", model) == EXIT_ERROR
    assert "got an empty name" in capsys.readouterr().err
    assert not (tmp_path / "out.parquet").exists()


def test_no_source_or_two_is_a_usage_error(tmp_path, capsys):
    for given in ([], ["photos", "--texts", "captions.txt"]):
        with pytest.raises(SystemExit):
            main([*given, "--output", "out.parquet"])
        assert "either SOURCE or --texts FILE" in capsys.readouterr().err
