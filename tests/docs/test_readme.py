"""README.md is a model card and a start of one page; its table is the auto_map; links of all pages lead somewhere."""

import re
import struct

import yaml
from pages import PAGES, REPO, anchors, locate

import vit_embed
from vit_embed.configuration_vit_embed import AUTO_MAP

README = (REPO / "README.md").read_text(encoding="utf-8")
# Longer pages are read by nobody.
MOST_BYTES, MOST_LINES, MOST_PICTURE_PIXELS = 15_000, 250, 700


def png_size(path) -> tuple[int, int]:
    """(width, height) of a PNG file."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n", path
    return struct.unpack(">II", head[16:])


def test_the_readme_is_short():
    assert len(README.encode()) <= MOST_BYTES
    assert len(README.splitlines()) <= MOST_LINES


def test_the_readme_has_one_picture_that_fits_a_screen():
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert len(pictures) == 1
    width, height = png_size(REPO / pictures[0])
    assert height <= MOST_PICTURE_PIXELS and width <= 1100  # GitHub shows about 850, the Hub about 1000


def test_the_readme_names_every_page_and_every_section():
    for page in (REPO / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in README, page.name
    contents = README.partition("## Contents")[2].partition("\n## ")[0]
    sections = set(re.findall(r"^## (.+)$", README, re.MULTILINE)) - {"Contents"}
    assert set(re.findall(r"\[([^]]+)\]\(#", contents)) == sections


def test_every_page_but_the_readme_is_linked_back():
    for page in (REPO / "docs").glob("*.md"):
        assert "(../README.md" in page.read_text(encoding="utf-8"), page.name


def test_the_table_of_heads_is_the_auto_map():
    rows = re.findall(r"^\| `(VitEmbed\w+)` \| ([^|]*) \|", README, re.MULTILINE)
    table = {name: re.findall(r"`(Auto\w+)`", autos) for name, autos in rows}
    heads = {auto: target.split(".")[1] for auto, target in AUTO_MAP.items() if auto not in ("AutoConfig", "AutoModel")}
    by_auto_model = {"VitEmbedModel", "VitEmbedModelWithProjection", "VitEmbedForContrastive"}
    text_towers = {name for name in dir(vit_embed) if name.startswith("VitEmbedTextModel")}
    assert set(table) >= {*by_auto_model, *heads.values(), *text_towers}
    assert set(table) - {*by_auto_model, *heads.values(), *text_towers} <= {"VitEmbedTextModelWithProjection"}
    for auto, name in heads.items():
        assert auto in table[name], auto
    assert {name for name, autos in table.items() if "AutoModel" in autos} >= by_auto_model


def test_front_matter_is_a_model_card():
    card = yaml.safe_load(README.split("---")[1])
    assert card["library_name"] == "transformers" and card["license"] == "apache-2.0"
    assert card["pipeline_tag"] == "zero-shot-image-classification"


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
            if target.startswith("http"):
                continue
            path, _, anchor = target.partition("#")
            leads_to = page if not path else (page.parent / path).resolve()
            if not leads_to.exists():
                leads_to = locate(str(leads_to.relative_to(REPO)))
                assert leads_to is not None, f"{page.name}: {target}"
            if anchor and leads_to.suffix == ".md" and not (path and leads_to.name != path.rpartition("/")[2]):
                assert anchor in anchors(leads_to), f"{page.name}: {target}"


def test_files_that_pages_name_exist():
    for page in PAGES:
        for path in re.findall(
            r"\b((?:examples|benchmarks|configs|tests|conversion)/[\w./-]*\w/?)", page.read_text(encoding="utf-8")
        ):
            path = path if "." in path.rpartition("/")[2] else path.rstrip("/") + "/"
            if page.parent == REPO or not (page.parent / path).exists():
                assert locate(path) is not None or locate(path.rstrip("/")) is not None, f"{page.name}: {path}"
