"""The README's table for people who come from another library: its lines run and give the embedding.

Of other libraries than transformers our side alone is run: their preprocessing needs torchvision.
"""

import re

import pytest
import torch
import transformers
from pages import REPO
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

import vit_embed

README = (REPO / "README.md").read_text(encoding="utf-8")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def lines_of(library: str) -> tuple[list[str], list[str]]:
    """The lines of the library, and ours."""
    row = re.search(rf"^\| {library} \| (.*) \| (.*) \|$", README, re.MULTILINE)
    return tuple(re.findall(r"`([^`]+)`", cell) for cell in row.groups())


def value_of(lines: list[str], names: dict) -> torch.Tensor:
    """Of the last line, after the others."""
    imported = {
        name: getattr(module, name)
        for name in re.findall(r"\b(?:Auto|CLIP|VitEmbed)\w+", "\n".join(lines))
        for module in (transformers, vit_embed)
        if hasattr(module, name)
    }
    names = {**imported, **names}
    with torch.no_grad():
        exec("\n".join(lines[:-1]), names)
        return eval(lines[-1], names)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> str:
    """A small CLIPModel of transformers, as it saves itself, with its image processor."""
    folder = tmp_path_factory.mktemp("clip")
    sizes = {"image_size": 64, "patch_size": 16}
    CLIPModel(CLIPConfig(vision_config={**SMALL, **sizes}, text_config=SMALL)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def picture() -> Image.Image:
    return Image.open(REPO / "examples" / "pictures" / "cat.png")


@pytest.mark.parametrize("library", ["transformers", "open_clip", "timm", "sentence-transformers"])
def test_our_lines_are_as_many_and_give_the_embedding(library, clip_folder, picture):
    theirs, ours = lines_of(library)
    assert len(theirs) == len(ours) == 3
    for line in theirs:
        compile(line, library, "exec")
    names = {"folder": clip_folder, "out": str(REPO), "picture": picture, "SentenceTransformer": SentenceTransformer}
    names["load_picture"] = vit_embed.load_picture
    embeds = torch.as_tensor(value_of(ours, names))
    assert embeds.shape[0] == 1 and embeds.isfinite().all()


def test_lines_of_transformers_give_the_same_embedding(clip_folder, picture):
    theirs, ours = (value_of(lines, {"folder": clip_folder, "picture": picture}) for lines in lines_of("transformers"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
