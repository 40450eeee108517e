"""For the tests of this folder: the modules that the commands of `examples/` import, and a folder of pictures."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))


@pytest.fixture
def photos(tmp_path) -> Path:
    """Ten pictures, one with transparency, one grey, one of another shape."""
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (10, 60, 60, 3), dtype=np.uint8)
    pictures = [Image.fromarray(picture) for picture in pixels]
    pictures[1].putalpha(100)
    pictures[2] = pictures[2].convert("L")
    pictures[3] = pictures[3].crop((0, 0, 60, 40))
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
    return folder
