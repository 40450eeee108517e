"""What the tabs of the page show, without the page: answers held to the model's own, refusals in words."""

import matplotlib
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tiny_tokenizer import write_tokenizer
from transformers import AutoTokenizer, CLIPImageProcessor
from uploads import BAD, PICTURES, REPO, write_bad, write_pictures

from vit_embed import (
    VitEmbedForContrastive,
    VitEmbedForDepthEstimation,
    VitEmbedForImageClassification,
    VitEmbedModel,
)
from vit_embed.retrieval import embed_command
from vit_embed.retrieval.colours import TABLES, coloured, overlay, with_scale
from vit_embed.retrieval.search import load_vectors
from vit_embed.retrieval.views import TILE, Views, load_views

HEART = str(PICTURES / "red-heart.png")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    write_pictures(folder / "pictures")
    arguments = [str(folder / "pictures"), "--model", str(REPO), "--output", str(folder / "photos.parquet")]
    assert embed_command.main([*arguments, "--dtype", "float32"]) == 0
    return folder / "photos.parquet"


@pytest.fixture(scope="module")
def views(store):
    return load_views(None, store)


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    return write_bad(tmp_path_factory.mktemp("bad"))


def tiny_views(model, folder, **options) -> Views:
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder) if hasattr(model, "get_text_features") else None
    return Views(model.eval(), processor, tokenizer, **options)


def paths(found) -> list[str]:
    return [caption.split("  ")[1] for _, caption in found.tiles]


# ----------------------------------------------------------------------------------------------------------- search


def test_words_find_their_picture_first(views):
    found = views.find("a red heart", count=3)
    assert paths(found)[:2] == ["hearts/red-heart.png", "hearts/heart-with-arrow.png"]
    assert found.tiles[0][1].startswith("0.49  ")
    assert found.stands_out and found.note == "3 of 31 pictures, nearest first; the number is the cosine."
    assert np.asarray(found.tiles[0][0]).shape == (72, 72, 3)


def test_a_picture_finds_itself(views):
    assert views.find(picture=HEART, count=1).tiles[0][1] == "1.00  hearts/red-heart.png"


def test_words_and_a_picture_are_added_and_words_subtracted(views):
    """Against the sum written out."""
    words, minus = views.text_vectors(["a fish", "a cat"])
    query = words + views.picture_vector(HEART) - minus
    cosines = torch.from_numpy(views.vectors.embeddings).float() @ (query / query.norm())
    best = [views.vectors.paths[place] for place in cosines.argsort(descending=True)[:5]]
    assert paths(views.find("a fish", HEART, "a cat", count=5)) == best
    assert best != paths(views.find("a fish", HEART, count=5))


def test_a_query_of_nothing_in_particular_says_so(views):
    found = views.find("quantum chromodynamics")
    assert not found.stands_out and found.note.startswith("Nothing stands out")
    assert found.tiles  # and still shows what there is


def test_paths_are_filtered(views):
    assert set(paths(views.find("a fish", pattern="hearts/*", count=60))) == {
        "hearts/red-heart.png",
        "hearts/heart-with-arrow.png",
    }


def test_large_pictures_are_shown_small(tmp_path):
    Image.effect_noise((3000, 1500), 90).save(tmp_path / "large.png")
    assert embed_command.main([str(tmp_path), "--model", str(REPO), "--output", str(tmp_path / "one.parquet")]) == 0
    ((tile, _),) = load_views(None, tmp_path / "one.parquet").find(picture=HEART).tiles
    assert tile.size == (TILE, TILE // 2)


def test_pictures_that_went_away_leave_empty_tiles(tmp_path):
    write_pictures(tmp_path / "pictures")
    arguments = [str(tmp_path / "pictures"), "--model", str(REPO), "--output", str(tmp_path / "photos.parquet")]
    assert embed_command.main(arguments) == 0
    views = load_views(None, tmp_path / "photos.parquet")
    (tmp_path / "pictures" / "hearts" / "red-heart.png").unlink()
    found = views.find("a red heart", count=2)
    assert "1 of them cannot be read any more" in found.note
    assert found.tiles[0][0].getcolors() == [(TILE * TILE, (212, 212, 216))]  # grey
    (tmp_path / "pictures").rename(tmp_path / "moved")
    found = views.find("a red heart", count=2)
    assert "2 of them cannot be read any more" in found.note and paths(found)[0] == "hearts/red-heart.png"
    found = load_views(None, tmp_path / "photos.parquet", str(tmp_path / "moved")).find("a red heart", count=2)
    assert "1 of them cannot be read any more" in found.note  # the one that is gone


@pytest.mark.parametrize("path", ["../secret.png", "hearts/../../secret.png", "/etc/secret.png"])
def test_no_picture_outside_of_the_folder_is_shown(views, store, path):
    """A store may come from anywhere, and its paths may say anything."""
    Image.new("RGB", (50, 50), "red").save(store.parent / "secret.png")
    path = path.replace("/etc", str(store.parent))
    changed = views.vectors._replace(paths=[path, *views.vectors.paths[1:]])
    found = Views(views.model, views.processor, views.texts.tokenizer, changed).find("a cat", count=31)
    assert found.tiles[paths(found).index(path)][0].size == (TILE, TILE)  # empty, where the picture is 50 wide
    assert "1 of them cannot be read" in found.note


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", BAD)
def test_each_tab_says_what_is_wrong_with_an_upload(views, bad, name):
    file = str(bad / name)
    for call in (
        lambda: views.find("a fish", file),
        lambda: views.classify(file, "cat\ndog"),
        lambda: views.attention(file),
        lambda: views.similarity(file, "ear"),
    ):
        with pytest.raises(ValueError, match=f"cannot be read: .*{BAD[name]}") as refusal:
            call()
        assert str(bad) not in str(refusal.value)  # no path of the server


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda views: views.find(), "Type some words or add a picture"),
        (lambda views: views.find("  ", None, " \n"), "Type some words or add a picture"),
        (lambda views: views.find("cat " * 40), r"is too long: 4\d tokens, the model takes 32. Use fewer words"),
        (lambda views: views.find("a cat", minus="a cat"), "cancels out"),
        (lambda views: views.find("a cat", pattern="dogs/*"), "No path fits “dogs/\\*”, so there is no result"),
        (lambda views: views.classify(None, "cat\ndog"), "Add a picture first"),
        (lambda views: views.classify(HEART, "cat\n\n cat "), "at least two class names"),
        (lambda views: views.classify(HEART, "cat\ndog", "a photo"), r"must have \{\} where the class name goes"),
        (lambda views: views.classify(HEART, "\n".join(map(str, range(41)))), "At most 40 lines, please; there are 41"),
        (lambda views: views.classify(HEART, "cat\n" + "dog " * 40), "is too long"),
        (lambda views: views.attention(None), "Add a picture first"),
        (lambda views: views.similarity(HEART, " \n"), "Type what to look for"),
    ],
)
def test_what_has_no_answer_is_refused_in_words(views, call, message):
    with pytest.raises(ValueError, match=message):
        call(views)


def test_stores_that_do_not_fit_the_model_are_refused(store, views, tmp_path):
    (tmp_path / "captions.txt").write_text("a cat\na dog\n", encoding="utf-8")
    texts = tmp_path / "texts.parquet"
    assert (
        embed_command.main(["--texts", str(tmp_path / "captions.txt"), "--model", str(REPO), "--output", str(texts)])
        == 0
    )
    with pytest.raises(ValueError, match="expected a store of pictures, .* is of texts"):
        load_views(None, texts)
    other = VitEmbedForContrastive(tiny.dual_config())
    with pytest.raises(ValueError, match="was made with other weights"):
        Views(other, views.processor, None, load_vectors(store))
    with pytest.raises(ValueError, match="expected a store .* or --model"):
        load_views(None, None)


# ----------------------------------------------------------------------------------------------------------- classes


def test_classes_get_the_probabilities_of_the_model(views):
    names = ["pizza", "car", "rocket"]
    shares = views.classify(str(PICTURES / "pizza.png"), "\n".join(names), "a picture of {}")
    texts = views.texts.tokenizer([f"a picture of {name}" for name in names], padding=True, return_tensors="pt")
    picture = Image.open(PICTURES / "pizza.png").convert("RGBA")
    white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    pixels = views.processor(white, return_tensors="pt").pixel_values
    expected = views.model(input_ids=texts.input_ids, pixel_values=pixels).logits_per_image[0].softmax(0)
    assert list(shares) == names
    torch.testing.assert_close(torch.tensor(list(shares.values())), expected, atol=1e-4, rtol=1e-4)
    assert shares["pizza"] > 0.9


def test_a_sigmoid_model_scores_each_class_on_its_own(tmp_path):
    model = VitEmbedForContrastive(tiny.dual_config(contrastive_loss="sigmoid"))
    views = tiny_views(model, tmp_path)
    alone = views.classify(HEART, "cat")["cat"]
    assert 0 < alone < 1
    assert views.classify(HEART, "cat\nrocket")["cat"] == pytest.approx(alone, abs=1e-6)
    with pytest.raises(ValueError, match="Type a class name"):
        views.classify(HEART, "")


# -------------------------------------------------------------------------------------------------------------- maps


def brightest(tile: Image.Image, side: int) -> tuple[int, int]:
    """(x, y) of the brightest of side x side squares of a map, without its scale."""
    map_of = np.asarray(tile.convert("L"), dtype=float)[: tile.width, :]
    step = tile.width // side
    squares = map_of[: step * side, : step * side].reshape(side, step, side, step).mean((1, 3))
    y, x = np.unravel_index(squares.argmax(), squares.shape)
    return int(x), int(y)


def test_attention_maps_are_bright_where_the_class_token_looks(views, tmp_path):
    blank = tmp_path / "white.png"
    Image.new("RGB", (48, 48), "white").save(blank)  # so that brightness is of the map alone
    tiles = views.attention(str(blank), layer=2, detail=2)
    assert [caption for _, caption in tiles] == [
        "layer 2, mean of the heads",
        *(f"layer 2, head {number}" for number in range(1, 5)),
    ]
    pixels = views.processor(
        Image.open(blank), size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96}, return_tensors="pt"
    ).pixel_values
    weights = views.model.trunk.get_class_attentions(pixels)[0, 1]  # (heads, 6, 6)
    for (tile, _), values in zip(tiles, [weights.mean(0), *weights]):
        y, x = divmod(int(values.argmax()), 6)
        assert brightest(tile, 6) == (x, y)
    assert len({tile.tobytes() for tile, _ in tiles}) == 5


def test_similarity_maps_are_bright_where_the_cosine_is(views, tmp_path):
    tiles = views.similarity(str(PICTURES / "cat.png"), "the ear\nthe tail", detail=1)
    patches = views.model.get_patch_features(views._pixels(views._read(str(PICTURES / "cat.png"))))[0]
    cosines = patches @ views.text_vectors(["the ear", "the tail"]).T  # (3, 3, 2)
    assert [caption for _, caption in tiles] == [
        f"the ear, up to {cosines[..., 0].max():.2f}",
        f"the tail, up to {cosines[..., 1].max():.2f}",
    ]
    assert tiles[0][0].tobytes() != tiles[1][0].tobytes()


def test_maps_lie_over_what_the_model_sees(views, tmp_path):
    """A wide picture: its middle square."""
    wide = Image.new("RGB", (1440, 480), "black")
    wide.paste("white", (480, 0, 960, 480))
    wide.save(tmp_path / "wide.png")
    seen = views._seen(views._read(str(tmp_path / "wide.png")))
    assert seen.size == (480, 480)
    assert np.asarray(seen)[:, 8:-8].min() > 250


def test_detail_is_offered_as_far_as_attention_fits(views, tmp_path):
    assert views.details() == [1, 2, 3, 4, 8]
    views_of_many = tiny_views(VitEmbedModel(tiny.vision_config(image_size=512, patch_size=8)), tmp_path)
    assert views_of_many.details() == [1]  # 4096 patches: 1.07 GB at 1x already


# ------------------------------------------------------------------------------------------------------------- depth


def test_depth_in_metres_with_its_scale(tmp_path):
    torch.manual_seed(1)
    model = tiny.randomised(VitEmbedForDepthEstimation(tiny.vision_config(max_depth=10.0)))
    views = tiny_views(model, tmp_path)
    seen, drawn, note = views.depth(str(PICTURES / "cat.png"))
    depth = model(views._pixels(views._read(str(PICTURES / "cat.png")))).predicted_depth[0].detach()
    assert note.startswith(f"From {depth.min():.2f} m to {depth.max():.2f} m")
    assert seen.size == (480, 480) and drawn.width == 480 and drawn.height > 480
    y, x = divmod(int(depth.argmax()), 32)
    nearest_and_farthest = np.asarray(drawn)[int((y + 0.5) * 15), int((x + 0.5) * 15)]
    assert np.abs(nearest_and_farthest.astype(int) - (0xFD, 0xE7, 0x25)).max() < 40  # viridis' end


def test_depth_without_a_unit_says_so(tmp_path):
    views = tiny_views(VitEmbedForDepthEstimation(tiny.vision_config()), tmp_path)
    note = views.depth(HEART)[2]
    assert "no unit" in note and " m to " not in note and " m, " not in note


# -------------------------------------------------------------------------------------------------- what can be shown


@pytest.mark.parametrize(
    ("model", "able"),
    [
        (lambda: VitEmbedForContrastive(tiny.dual_config()), "classes attention similarity"),
        (
            lambda: VitEmbedForContrastive(tiny.dual_config(use_cls_token=False, pooling_type="mean")),
            "classes similarity",
        ),
        (lambda: VitEmbedForDepthEstimation(tiny.vision_config()), "attention depth"),
        (lambda: VitEmbedForImageClassification(tiny.vision_config()), "attention"),
    ],
    ids=["dual", "dual without a class token", "depth", "classification"],
)
def test_a_model_shows_what_it_can(model, able, tmp_path):
    views = tiny_views(model(), tmp_path)
    names = ("search", "classes", "attention", "similarity", "depth")
    assert [name for name in names if getattr(views, f"has_{name}")] == able.split()


def test_a_model_with_nothing_to_show_is_refused(tmp_path):
    model = VitEmbedModel(tiny.vision_config(use_cls_token=False, pooling_type="mean"))
    with pytest.raises(ValueError, match="alone has nothing to show; give a store"):
        tiny_views(model, tmp_path)


def test_a_depth_folder_loads_with_its_processor(tmp_path):
    VitEmbedForDepthEstimation(tiny.vision_config()).save_pretrained(tmp_path)
    views = load_views(str(tmp_path), None)
    assert views.has_depth and views.depth(HEART)[1].width >= 480


# ----------------------------------------------------------------------------------------------------------- colours


@pytest.mark.parametrize("table", TABLES)
def test_tables_are_those_of_matplotlib(table):
    values = np.linspace(0, 1, 256)[None]
    expected = matplotlib.colormaps[table](values)[..., :3] * 255
    assert np.abs(coloured(values, table) - expected).max() < 7.5
    assert (coloured(np.array([[-1.0, 2.0]]), table) == coloured(np.array([[0.0, 1.0]]), table)).all()


def test_an_overlay_is_grey_picture_and_colour(tmp_path):
    picture = Image.new("RGB", (4, 4), (100, 100, 100))
    drawn = np.asarray(overlay(picture, np.array([[0.0, 1.0], [0.0, 1.0]]), 0.0, 1.0, "viridis"))
    ends = np.array([(0x44, 0x01, 0x54), (0xFD, 0xE7, 0x25)])
    expected = (0.65 * ends + 0.35 * 100).round()
    assert (drawn[:, 0] == expected[0]).all() and (drawn[:, -1] == expected[1]).all()


def test_a_scale_runs_from_low_to_high():
    drawn = np.asarray(with_scale(Image.new("RGB", (100, 50), "red"), 0.0, 2.0, "viridis"))
    assert (drawn[:50] == (255, 0, 0)).all()
    strip = drawn[70]
    assert tuple(strip[0]) == (0x44, 0x01, 0x54) and tuple(strip[-1]) == (0xFD, 0xE7, 0x25)
    assert (drawn[100:] < 128).any()  # numbers below it
