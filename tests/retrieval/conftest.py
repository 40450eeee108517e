"""A small model and a folder of pictures, for the tests of more than one file."""

from pathlib import Path

import pytest
import tiny
from embedded import picture

from vit_embed import VitEmbedForContrastive


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny.randomised(VitEmbedForContrastive(tiny.dual_config())).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    for number in range(10):
        path = folder / ("inner/deep" if number % 2 else ".") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    (folder / "notes.md").write_text("no picture by its name")
    return folder
