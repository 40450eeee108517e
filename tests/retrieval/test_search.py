"""Search over what embed_images wrote: by words, pictures, sums of both; near-duplicates, filters, an index."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from PIL import Image

from vit_embed import VitEmbedForContrastive
from vit_embed.retrieval import search
from vit_embed.retrieval.embed_command import main as embed
from vit_embed.retrieval.search_command import EXIT_ERROR, EXIT_NOTHING, main
from vit_embed.retrieval.store import ABOUT

REPO = Path(__file__).resolve().parents[2]
NAMES = (
    "banana",
    "bicycle",
    "black-cat",
    "cat",
    "dog",
    "pizza",
    "red-apple",
    "rocket",
    "snake",
    "tomato",
    "train",
    "tree",
)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Twelve pictures and a copy of one in another folder, embedded by the checkpoint that ships."""
    folder = tmp_path_factory.mktemp("search") / "pictures"
    (folder / "copies").mkdir(parents=True)
    for name in NAMES:
        source = REPO / "examples" / "pictures" / f"{name}.png"
        if source.exists():
            (folder / source.name).write_bytes(source.read_bytes())
    cat = Image.open(REPO / "examples" / "pictures" / "cat.png").convert("RGBA")
    Image.alpha_composite(Image.new("RGBA", cat.size, "white"), cat).convert("RGB").save(
        folder / "copies" / "cat.jpg", quality=90
    )
    output = folder.parent / "pictures.parquet"
    assert embed([str(folder), "--output", str(output), "--dtype", "float32"]) == 0
    return output


def found(capsys, *arguments) -> list[tuple[str, float]]:
    """The hits of a command, as json gives them."""
    main([*map(str, arguments), "--format", "json"])
    return [(hit["path"], hit["cosine"]) for hit in json.loads(capsys.readouterr().out)]


def test_words_find_their_picture(store, capsys):
    hits = found(capsys, store, "--query", "a rocket", "--top", "3")
    assert len(hits) == 3 and hits[0][0] == "rocket.png"
    assert hits == sorted(hits, key=lambda hit: -hit[1])


def test_a_picture_finds_itself_and_its_copy(store, capsys):
    hits = found(capsys, store, "--query_image", store.parent / "pictures" / "cat.png")
    assert [path for path, _ in hits[:2]] == ["cat.png", "copies/cat.jpg"]
    assert hits[0][1] == pytest.approx(1, abs=2e-3)  # float16


@pytest.mark.parametrize("options", [[], ["--full_size"]])
def test_a_query_picture_is_read_as_the_stores_pictures_were(options, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))
    noise.resize((1600, 1200), Image.Resampling.BILINEAR).save(folder / "large.jpg")
    output = tmp_path / "out.parquet"
    assert (
        embed([str(folder), "--output", str(output), "--dtype", "float32", "--vector_dtype", "float32", *options]) == 0
    )
    capsys.readouterr()
    ((_, cosine),) = found(capsys, output, "--query_image", folder / "large.jpg")
    assert cosine == pytest.approx(1, abs=1e-5)


def test_words_and_pictures_are_added_and_subtracted(store, capsys):
    picture = store.parent / "pictures" / "cat.png"
    plain = dict(found(capsys, store, "--query_image", picture, "--top", "20"))
    without = dict(found(capsys, store, "--query_image", picture, "--minus", "a black cat", "--top", "20"))
    added = dict(found(capsys, store, "--query_image", picture, "--query", "a rocket", "--top", "20"))
    assert without["black-cat.png"] < plain["black-cat.png"] and added["rocket.png"] > plain["rocket.png"]


def test_a_filter_leaves_other_paths_out(store, capsys):
    assert [path for path, _ in found(capsys, store, "--query", "a cat", "--filter", "copies/*")] == ["copies/cat.jpg"]
    assert main([str(store), "--query", "a cat", "--filter", "dogs/*"]) == EXIT_ERROR
    assert "no path of" in capsys.readouterr().err


def test_near_duplicates_are_grouped(store, capsys):
    assert main([str(store), "--duplicates", "0.97", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == [["cat.png", "copies/cat.jpg"]]
    assert main([str(store), "--duplicates", "0.99999", "--filter", "[a-m]*.png"]) == EXIT_NOTHING
    assert "no two are that near" in capsys.readouterr().out


def test_csv_and_text_give_the_same_hits(store, capsys):
    main([str(store), "--query", "a cat", "--top", "2", "--format", "csv"])
    lines = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    main([str(store), "--query", "a cat", "--top", "2"])
    text = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["path", "cosine"] and [path for path, _ in lines[1:]] == [path for _, path in text]
    assert all(float(a) == pytest.approx(float(b), abs=6e-3) for (_, a), (b, _) in zip(lines[1:], text))


def test_a_sheet_shows_the_hits(store, tmp_path):
    main([str(store), "--query", "a rocket", "--top", "7", "--sheet", str(tmp_path / "out" / "hits.png")])
    sheet = np.asarray(Image.open(tmp_path / "out" / "hits.png").convert("RGB"))
    assert sheet.shape[1] == 5 * 212 + 12  # five columns, two rows
    drawn = [(sheet[54:254, 12 + 212 * place : 212 * (place + 1)] < 200).any() for place in range(5)]
    assert all(drawn)


def test_texts_have_no_sheet_and_a_folder_that_was_moved_is_named(store, tmp_path, capsys):
    (tmp_path / "captions.txt").write_text("a cat\n")
    assert embed(["--texts", str(tmp_path / "captions.txt"), "--output", str(tmp_path / "t.parquet")]) == 0
    sheet = ["--query", "a cat", "--sheet", str(tmp_path / "s.png")]
    assert main([str(tmp_path / "t.parquet"), *sheet]) == EXIT_ERROR
    assert "which have no sheet" in capsys.readouterr().err
    assert main([str(store), *sheet, "--source", str(tmp_path / "nowhere" / "at all")]) == EXIT_ERROR
    assert main([str(store), *sheet, "--source", str(store.parent / "pictures")]) == 0


def test_nothing_near_is_said(store, capsys):
    assert main([str(store), "--query", "a rocket", "--least", "0.99"]) == EXIT_NOTHING
    assert "nothing is at 0.99 or nearer" in capsys.readouterr().err


def vectors_of(embeddings: np.ndarray, path: Path = Path("none.parquet")) -> search.Vectors:
    return search.Vectors(path, [str(n) for n in range(len(embeddings))], embeddings, {})


def unit(count: int, width: int = 64, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_best_of_unrelated_vectors_does_not_stand_out_and_a_match_does():
    embeddings = unit(20_000)
    stood_out = [
        search.search(vectors_of(embeddings), torch.from_numpy(unit(1, seed=seed)), 3).stands_out
        for seed in range(1, 21)
    ]
    assert sum(stood_out) <= 6  # the bound is the expected largest, which some draws pass
    query = torch.from_numpy(embeddings[77:78] + 0.5 * unit(1, seed=3))
    answer = search.search(vectors_of(embeddings), query / query.norm(), 3)
    assert answer.stands_out and answer.hits[0].path == "77"


def test_exact_search_over_blocks_equals_one_sort(monkeypatch):
    embeddings, queries = unit(1000), torch.from_numpy(unit(5, seed=1))
    monkeypatch.setattr(search, "BLOCK", 64)
    cosines, places = search.nearest(embeddings, queries, 10)
    expected = (queries @ torch.from_numpy(embeddings).T).sort(dim=1, descending=True)
    assert torch.equal(places, expected.indices[:, :10])
    torch.testing.assert_close(cosines, expected.values[:, :10])


def test_duplicates_over_blocks_join_chains(monkeypatch):
    monkeypatch.setattr(search, "BLOCK", 16)
    embeddings = unit(100)
    chain = embeddings[3] + np.outer(np.arange(3) * 0.15, unit(1, seed=9)[0])
    embeddings[[3, 50, 99]] = chain / np.linalg.norm(chain, axis=1, keepdims=True)
    assert search.duplicates(vectors_of(embeddings), 0.98) == [["3", "50", "99"]]


def test_an_index_finds_nearly_what_exact_search_does_and_is_left_when_rows_come(tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    # Clusters, as pictures have them.
    embeddings = unit(50, 64)[np.random.default_rng(1).integers(0, 50, 5000)] + 0.3 * unit(5000, 64, seed=2)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    vectors = vectors_of(embeddings, tmp_path / "v.parquet")
    queries = embeddings[:50]
    exact = search.nearest(embeddings, torch.from_numpy(queries), 10)[1].tolist()
    assert search.index_of(vectors) is None
    search.build_index(vectors)
    monkeypatch.setattr(search, "EXACT_LIMIT", 100)
    hits = [[int(hit.path) for hit in search.search(vectors, torch.from_numpy(q[None]), 10).hits] for q in queries]
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, hits)])
    assert recall > 0.9, recall
    assert search.index_of(vectors_of(embeddings[:-1], vectors.path)) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{store}", "--query_image", "absent.png"], "'absent.png' cannot be searched for: No such file"),
        (["{store}", "--query", "word " * 200], "cannot be searched for: "),
        (["{store}", "--query", "a cat", "--minus", "a cat"], "cancels out"),
        (["{folder}/absent.parquet", "--query", "a cat"], "expected a folder that vit_embed.embed_images wrote"),
        (["{folder}/foreign.parquet", "--query", "a cat"], "was not written by vit_embed.embed_images"),
        (["{folder}/empty.parquet", "--query", "a cat"], "none of its pictures could be read"),
        (["{store}", "--query", "a cat", "--model", "{folder}"], "expected --model to be a folder or Hub id"),
        (["{store}", "--query", "a cat", "--model", "{folder}/other"], "was embedded by other weights than"),
    ],
)
def test_a_bad_search_is_an_error(store, arguments, message, tmp_path, capsys):
    for name, metadata in (("foreign", {}), ("empty", {ABOUT: b'{"weights": "none"}'})):
        (tmp_path / f"{name}.parquet").mkdir()
        schema = pa.schema([("path", pa.string()), ("embedding", pa.list_(pa.float32(), 4))], metadata=metadata)
        pq.write_table(schema.empty_table(), tmp_path / f"{name}.parquet" / "part-00000.parquet")
    VitEmbedForContrastive(tiny.dual_config()).save_pretrained(tmp_path / "other")
    assert main([each.format(store=store, folder=tmp_path) for each in arguments]) == EXIT_ERROR
    assert message in capsys.readouterr().err


def test_a_usage_error_says_what_could_be_given(store, capsys):
    for given, message in (
        ([], "give a query"),
        (["--query", "a", "--duplicates", "0.9"], "give a query"),
        (["--query", "a", "--top", "0"], "at least 1"),
        (["--query", "a", "--sheet", "hits.jpg"], "must end in .png"),
    ):
        with pytest.raises(SystemExit):
            main([str(store), *given])
        assert message in capsys.readouterr().err
