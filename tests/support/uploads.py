"""Files that visitors of the page upload and that are no good, each with what the page says of it."""

import io
from pathlib import Path

from PIL import Image

REPO = Path(__file__).resolve().parents[2]
PICTURES = REPO / "examples" / "pictures"
# Of the pictures that ship, one in every 12 and those that the tests ask for.
NAMED = ("black-cat", "cat", "fish", "heart-with-arrow", "pizza", "red-heart", "rocket")
# file -> what the page says of it
BAD = {
    "text.png": "no picture",
    "empty.png": "the file is empty",
    "short.png": "damaged, or cut short",
    "short.jpg": "damaged, or cut short",
    "line.png": "too long and thin",
    "bomb.png": "more pixels than can be read here",
}


def write_bad(folder: Path) -> Path:
    """Writes the files of BAD."""
    noise = Image.effect_noise((400, 300), 90)
    (folder / "text.png").write_text("this is no picture", encoding="utf-8")
    (folder / "empty.png").write_bytes(b"")
    for name, form in (("short.png", "PNG"), ("short.jpg", "JPEG")):
        file = io.BytesIO()
        noise.save(file, form)
        (folder / name).write_bytes(file.getvalue()[: len(file.getvalue()) // 3])
    Image.new("L", (20_000, 1)).save(folder / "line.png")
    Image.new("1", (14_000, 14_000)).save(folder / "bomb.png")
    return folder


def write_pictures(folder: Path) -> Path:
    """A folder of 31 pictures, some of them in a folder of it."""
    names = [path.stem for path in sorted(PICTURES.glob("*.png"))]
    chosen = sorted({*NAMED, *names[::12]})
    for name in chosen:
        target = folder / ("hearts" if "heart" in name else "") / f"{name}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((PICTURES / f"{name}.png").read_bytes())
    return folder
