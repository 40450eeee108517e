"""`vit_embed.embed` and `EmbedPictures`: the rows of the embedder for other people's loops."""

import pickle
import sys

import datasets
import numpy as np
import pytest
from fresh_process import run_fresh
from PIL import Image
from stores import REPO, some_pictures

import vit_embed
from vit_embed.retrieval import callables
from vit_embed.retrieval.callables import EmbedPictures
from vit_embed.retrieval.embed_command import EXIT_ERROR, main
from vit_embed.retrieval.embedder import load_embedder

PICTURES = sorted((REPO / "examples" / "pictures").glob("*.png"))[:6]
MODEL = str(REPO)
NO_PICTURE, NO_FILE = "no picture, or of a kind that Pillow does not know", "No such file or directory"


@pytest.fixture(scope="module")
def embedder():
    return load_embedder(MODEL, "float32")


@pytest.fixture(scope="module")
def expected(embedder):
    """(6, D) of PICTURES, by the folder's own methods."""
    pixels = [embedder.processor(Image.open(path).convert("RGB"), return_tensors="pt") for path in PICTURES]
    vectors = [embedder.model.get_image_features(**each, normalize=True)[0] for each in pixels]
    return np.stack([vector.numpy() for vector in vectors])


def test_every_kind_of_picture_gives_a_row_in_order(embedder, expected):
    opaque = [path for path in PICTURES if Image.open(path).convert("RGBA").getextrema()[3][0] == 255]
    images = [
        str(PICTURES[0]),
        b"no picture",
        PICTURES[1],
        PICTURES[2].read_bytes(),
        None,
        Image.open(PICTURES[3]),
        {"bytes": PICTURES[4].read_bytes(), "path": "four.png"},
        {"bytes": None, "path": str(PICTURES[5])},
        "nowhere.png",
    ]
    rows = list(vit_embed.embed(iter(images), embedder, batch_size=2, workers=2))
    read = [row for row in rows if row.reason is None]
    whole = list(vit_embed.embed(PICTURES, embedder))
    assert [row.path for row in rows] == [
        str(PICTURES[0]),
        "1",
        str(PICTURES[1]),
        "3",
        "4",
        str(PICTURES[3]),
        "four.png",
        str(PICTURES[5]),
        "nowhere.png",
    ]
    np.testing.assert_allclose([row.embedding for row in read], [row.embedding for row in whole], atol=1e-5)
    assert [(row.width, row.height) for row in read] == [Image.open(path).size for path in PICTURES]
    reasons = {number: row.reason for number, row in enumerate(rows) if row.reason}
    assert reasons == {1: NO_PICTURE, 4: NO_PICTURE, 8: NO_FILE}
    assert all(row.embedding is None for row in rows if row.reason)
    for path in opaque:  # the others are put on white
        place = PICTURES.index(path)
        np.testing.assert_allclose(whole[place].embedding, expected[place], atol=1e-5)


def test_a_source_is_read_as_the_command_reads_it(embedder, tmp_path):
    rows = list(vit_embed.embed(some_pictures(tmp_path / "photos", 3), embedder))
    assert [row.path for row in rows] == [*(path.name for path in PICTURES[:3]), "torn.png"]
    assert [row.embedding is None for row in rows] == [False, False, False, True]


def test_a_large_picture_of_the_caller_is_reduced_and_left_as_it_is(embedder, tmp_path):
    Image.linear_gradient("L").resize((2400, 1600)).convert("RGB").save(tmp_path / "large.jpg", quality=95)
    mine = Image.open(tmp_path / "large.jpg")
    by_hand, by_path = vit_embed.embed([mine, tmp_path / "large.jpg"], embedder)
    assert mine.size == (2400, 1600) == (by_hand.width, by_hand.height)
    assert by_hand.embedding @ by_path.embedding > 0.999


@pytest.mark.parametrize("images", [b"bytes", Image.new("RGB", (8, 8))])
def test_one_picture_is_no_list(images, embedder):
    with pytest.raises(TypeError, match=r"write \[it\]"):
        vit_embed.embed(images, embedder)


def test_another_kind_of_picture_is_refused(embedder):
    with pytest.raises(TypeError, match="PIL pictures, got ndarray"):
        list(vit_embed.embed([np.zeros((8, 8, 3))], embedder))


def test_a_batch_gets_its_embeddings_and_reasons(embedder):
    embed_pictures = EmbedPictures(MODEL, "file", dtype="float32")
    batch = {"file": [str(PICTURES[0]), "nowhere.png"], "label": [4, 5]}
    done = embed_pictures(batch)
    assert done["label"] == [4, 5] and done["file"] == batch["file"] and "embedding" not in batch
    (wanted,) = vit_embed.embed(PICTURES[:1], embedder)
    np.testing.assert_allclose(done["embedding"][0], wanted.embedding, atol=1e-5)
    assert done["embedding"][1] is None
    assert done["reason"][0] is None and done["reason"][1] == NO_FILE
    with pytest.raises(ValueError, match="expected a column 'file', got image, label"):
        embed_pictures({"image": [], "label": []})


def test_it_is_small_when_it_is_sent_and_its_hash_does_not_change():
    """`datasets` caches by this hash: the same before and after the first use, another for another model or option."""
    embed_pictures = EmbedPictures(MODEL, dtype="float32")
    before = datasets.fingerprint.Hasher.hash(embed_pictures)
    embed_pictures({"image": [str(PICTURES[0])]})
    assert len(pickle.dumps(embed_pictures)) < 1000
    again = pickle.loads(pickle.dumps(embed_pictures))
    assert {before} == {datasets.fingerprint.Hasher.hash(each) for each in (embed_pictures, again)}
    for other in (EmbedPictures("elsewhere", dtype="float32"), EmbedPictures(MODEL, dtype="bfloat16")):
        assert datasets.fingerprint.Hasher.hash(other) != before


@pytest.mark.parametrize("decode", [True, False])
def test_it_maps_over_a_data_set(decode, embedder, tmp_path):
    """Where the first batch has no embedding, and where the first has no reason."""
    files = [str(tmp_path / "torn.png"), *map(str, PICTURES), str(tmp_path / "torn.png")]
    (tmp_path / "torn.png").write_bytes(b"no picture")
    images = files[1:-1] if decode else files
    rows = datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image(decode=decode))
    embed_pictures = EmbedPictures(MODEL, dtype="float32")
    options = {"batched": True, "batch_size": 1, "writer_batch_size": 1, "load_from_cache_file": False}
    done = rows.map(embed_pictures, features=embed_pictures.features(rows), **options)
    wanted = [row.embedding for row in vit_embed.embed(PICTURES, embedder)]
    found = [vector for vector in done["embedding"] if vector is not None]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert [reason is None for reason in done["reason"]] == [image in files[1:-1] for image in images]
    assert done.features["image"] == rows.features["image"]
    # The stored cells are the data set's own: paths, not pictures that were encoded again.
    assert done.data.column("image").chunk(0)[0].as_py() == rows.data.column("image").chunk(0)[0].as_py()


def test_the_model_is_loaded_once_a_process(monkeypatch):
    loaded = []
    monkeypatch.setattr(callables, "load_embedder", lambda name, **options: loaded.append((name, options)))
    callables._loaded.cache_clear()
    first, second = EmbedPictures("some", dtype="float32"), EmbedPictures("some", "other column", dtype="float32")
    assert not loaded
    assert first.embedder is second.embedder and first.embedder is None
    assert loaded == [("some", {"dtype": "float32"})]
    callables._loaded.cache_clear()


def test_importing_the_package_imports_nothing_of_it(tmp_path):
    def question():
        import sys

        from transformers import PreTrainedModel  # noqa: F401 - 4.57 imports pyarrow, by way of scikit-learn and pandas

        before = set(sys.modules)
        import vit_embed

        names = ("pyarrow", "fsspec", "datasets", "vit_embed.retrieval")
        added = [name for name in names if name in sys.modules and name not in before]
        return added, callable(vit_embed.embed), "pyarrow" in sys.modules

    assert run_fresh(question, tmp_path / "home") == [[], True, True]


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'emebd'"):
        vit_embed.emebd  # noqa: B018


def test_ray_is_named_where_it_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "vit_embed.retrieval.ray_engine", raising=False)
    code = main([str(PICTURES[0]), "--output", str(tmp_path / "out.parquet"), "--engine", "ray"])
    assert code == EXIT_ERROR and 'pip install "vit_embed[ray]"' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
