"""`vit_embed.load_picture`: what a person sees in a file of any kind is what a processor or a pipeline gets."""

import io
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from embedded import encoded
from PIL import Image, ImageDraw
from transformers import AutoImageProcessor, CLIPImageProcessor, pipeline

import vit_embed
from vit_embed import VitEmbedForImageClassification, load_picture
from vit_embed.retrieval.pictures import TURNED, read_rgb

WHITE, BLACK, GREY, RED = (255, 255, 255), (0, 0, 0), (128, 128, 128), (255, 0, 0)
SIDE = 32
# The left half of a disc, and so on: each has half of the ink.
SHAPES = {"left": (90, 270), "right": (270, 450), "top": (180, 360), "bottom": (0, 180)}


def icon(ink: tuple[int, int, int], hidden: tuple[int, int, int] = BLACK) -> Image.Image:
    """A disc in the middle on nothing, below which another colour lies, as most programs write it."""
    picture = Image.new("RGBA", (SIDE, SIDE), (*hidden, 0))
    ImageDraw.Draw(picture).ellipse((8, 8, 23, 23), fill=(*ink, 255))
    return picture


def opaque(ink: tuple[int, int, int]) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", (SIDE, SIDE), "white"), icon(ink)).convert("RGB")


def deep(ground: int, ink: int, kind=np.uint16) -> Image.Image:
    """16 bits of grey: 8 of them and the same 8 again."""
    return Image.fromarray((np.where(np.asarray(icon(BLACK))[..., 3] > 0, ink, ground) * 257).astype(kind))


# Red first, black then: only the first is to be seen.
MOVING = {"save_all": True, "append_images": [icon(BLACK)], "disposal": 2}
# {what it is: (format, picture, how it is saved, colour at the edge, colour in the middle)}
FILES = {
    "RGB": ("PNG", opaque(RED), {}, WHITE, RED),
    "RGBA": ("PNG", icon(RED), {}, WHITE, RED),
    "white drawing": ("PNG", icon(WHITE), {}, BLACK, WHITE),
    "white drawing, white below": ("PNG", icon(WHITE, WHITE), {}, BLACK, WHITE),
    "LA": ("PNG", icon(BLACK).convert("LA"), {}, WHITE, BLACK),
    "palette with transparency": ("PNG", icon(RED).quantize(), {}, WHITE, RED),
    "PNG with one transparent colour": ("PNG", opaque(RED), {"transparency": WHITE}, WHITE, RED),
    "grey with one transparent grey": ("PNG", icon(GREY).convert("L"), {"transparency": 0}, WHITE, GREY),
    "1 bit": ("PNG", opaque(BLACK).convert("1"), {}, WHITE, BLACK),
    "CMYK": ("TIFF", opaque(RED).convert("CMYK"), {}, WHITE, RED),
    "I;16": ("PNG", deep(255, 128), {}, WHITE, GREY),
    "I;16 with one transparent grey": ("PNG", deep(0, 128), {"transparency": 0}, WHITE, GREY),
    "I": ("TIFF", deep(255, 128, np.int32), {}, WHITE, GREY),
    "GIF": ("GIF", icon(RED), {}, WHITE, RED),
    "animated GIF": ("GIF", icon(RED), MOVING, WHITE, RED),
    "animated WebP": ("WEBP", icon(RED), {**MOVING, "lossless": True}, WHITE, RED),
    "animated PNG": ("PNG", icon(RED), MOVING, WHITE, RED),
}
SOURCES = {
    "str": str,
    "Path": lambda path: path,
    "bytes": Path.read_bytes,
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "BytesIO": lambda path: io.BytesIO(path.read_bytes()),
    "file": lambda path: path.open("rb"),
    "PIL": Image.open,
}


def ends(picture: Image.Image) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The colours at the edge and in the middle."""
    assert (picture.mode, picture.size) == ("RGB", (SIDE, SIDE))
    return picture.getpixel((1, 1)), picture.getpixel((SIDE // 2, SIDE // 2))


@pytest.mark.parametrize("name", FILES)
def test_a_picture_of_any_kind_from_any_source_is_what_a_person_sees(name, tmp_path):
    form, picture, options, ground, ink = FILES[name]
    path = tmp_path / "picture"
    path.write_bytes(encoded(picture, form, **options))
    for kind, source in SOURCES.items():
        given = source(path)
        assert ends(load_picture(given)) == (ground, ink), kind
        assert load_picture(path) == read_rgb(path)[0], "the recipes' own reading"
        if hasattr(given, "close"):
            given.close()


@pytest.mark.parametrize("background", ["lime", "#00ff00", (0, 255, 0), [0, 255, 0], np.array([0, 255, 0])])
def test_a_background_lies_under_what_is_transparent_and_nowhere_else(background, tmp_path):
    for name, (form, picture, options, ground, ink) in FILES.items():
        has_alpha = Image.open(io.BytesIO(encoded(picture, form, **options))).has_transparency_data
        found = ends(load_picture(encoded(picture, form, **options), background))
        assert found == ((0, 255, 0) if has_alpha else ground, ink), name
    assert ends(load_picture(icon(WHITE), "white")) == (WHITE, WHITE), "no black but by default"
    assert ends(load_picture(Image.new("RGBA", (SIDE, SIDE)))) == (WHITE, WHITE), "nothing is drawn"


def test_a_photo_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    halves = Image.new("RGB", (40, 20), "red")
    halves.paste((0, 0, 255), (0, 0, 20, 20))
    halves.save(tmp_path / "lying.png", exif=exif)
    assert read_rgb(tmp_path / "lying.png")[1] == [TURNED]
    for source in (tmp_path / "lying.png", Image.open(tmp_path / "lying.png")):
        found = load_picture(source)
        assert (found.size, found.getpixel((10, 5)), found.getpixel((10, 35))) == ((20, 40), (0, 0, 255), RED)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "PA", "P", "CMYK", "I;16"])
def test_the_picture_of_a_caller_stays_as_it_is(mode):
    exif = Image.Exif()
    exif[0x0112] = 6
    mine = deep(0, 255) if mode == "I;16" else icon(RED).quantize() if mode == "P" else icon(RED).convert(mode)
    mine.info["exif"] = exif.tobytes()
    before = mine.tobytes(), mine.mode, mine.size, dict(mine.info)
    for background in (None, "black"):
        found = load_picture(mine, background)
        found.paste((1, 2, 3), (0, 0, *found.size))
        assert (mine.tobytes(), mine.mode, mine.size, dict(mine.info)) == before
    moving = Image.open(io.BytesIO(encoded(icon(RED), "PNG", **MOVING)))
    moving.seek(1)
    assert ends(load_picture(moving)) == (WHITE, BLACK) and moving.tell() == 1, "the frame that it stands at"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("https://example.org/cat.png", "address 'https://example.org/cat.png'; download it"),
        ("file:///home/me/cat.png", "address 'file:///home/me/cat.png'; download it"),
        ("data:image/png;base64,iVBORw0KGgo", "address 'data:image/png"),
        (b"", "got 0 bytes, b'' first: no format that Pillow reads"),
        (b"<html>not found</html>", "got 22 bytes, b'<html>no' first: no format"),
        (encoded(icon(RED))[:120], "got 120 bytes, .*PNG.* first: "),
        (Path(__file__), "test_load_picture.py': no format that Pillow reads"),
        (io.BytesIO(b"no picture"), "got the file 'BytesIO': no format"),
        (io.StringIO("text"), "got StringIO"),
        (None, "PIL picture, got NoneType"),
        (np.zeros((4, 4, 3), np.uint8), "got ndarray"),
        ([icon(RED)], "got list"),
        (Image.new("F", (2, 2)), "PIL picture of mode F: .*floating point"),
    ],
)
def test_what_is_no_picture_is_refused_by_name(source, says):
    with pytest.raises(ValueError, match=says):
        load_picture(source)


@pytest.mark.parametrize("background", ["transparrent", "#ffffff80", (255, 255), (0, 0, 0, 0), (0, 0, 256), 255, 0.5])
def test_a_background_that_is_no_colour_is_refused(background):
    with pytest.raises(ValueError, match="colour's name or .* got "):
        load_picture(icon(RED), background)


def test_a_file_that_is_not_there_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.png"):
        load_picture(tmp_path / "gone.png")


def test_the_package_offers_it_and_lists_what_it_offers():
    assert {"embed", "load_picture", "VitEmbedModel"} <= set(dir(vit_embed))


def half(shape: str) -> Image.Image:
    """Half of a disc in black on transparent black: which half is in the alpha channel alone."""
    picture = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
    ImageDraw.Draw(picture).pieslice((4, 4, 27, 27), *SHAPES[shape], fill=(0, 0, 0, 255))
    return picture


@pytest.fixture(scope="module")
def icons(tmp_path_factory) -> Path:
    """A classifier in the stock form that has learned which half is drawn, and a file of each."""
    folder = tmp_path_factory.mktemp("icons")
    for shape in SHAPES:
        half(shape).save(folder / f"{shape}.png")
    processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    torch.manual_seed(0)
    config = tiny.vision_config(id2label=dict(enumerate(SHAPES)), label2id={name: i for i, name in enumerate(SHAPES)})
    model = VitEmbedForImageClassification(config)
    pixels = processor([read_rgb(half(shape))[0] for shape in SHAPES], return_tensors="pt").pixel_values
    adam = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(30):
        adam.zero_grad()
        model(pixels, labels=torch.arange(len(SHAPES))).loss.backward()
        adam.step()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder


def test_pipelines_and_processors_tell_icons_on_nothing_apart_by_it(icons):
    """A path, which the pipeline opens by itself, is one black square whatever is drawn."""
    paths = [str(icons / f"{shape}.png") for shape in SHAPES]
    classify = pipeline("image-classification", model=str(icons / "model"))
    read = classify([load_picture(path) for path in paths])
    assert [answers[0]["label"] for answers in read] == list(SHAPES)
    assert len({answers[0]["label"] for answers in classify(paths)}) == 1
    model = VitEmbedForImageClassification.from_pretrained(icons / "model").eval()
    pixels = AutoImageProcessor.from_pretrained(icons / "model")([load_picture(p) for p in paths], return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**pixels).logits.softmax(dim=-1)
    assert probabilities.argmax(dim=-1).tolist() == [0, 1, 2, 3]
    best = torch.tensor([answers[0]["score"] for answers in read])
    torch.testing.assert_close(best, probabilities.max(dim=-1).values, **tiny.CLOSE)
