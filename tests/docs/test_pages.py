"""The pages: README.md is a model card and a start of one page, tables and links hold, every promise names tests that
exist; and what several files of the project state agrees."""

import configparser
import re
import struct

import yaml
from pages import PAGES, REPO, anchors, locate

import vit_embed
from vit_embed.configuration_vit_embed import AUTO_MAP, TEXT_AUTO_MAP


def text_of(name: str) -> str:
    return (REPO / name).read_text(encoding="utf-8")


README = text_of("README.md")
DOCS = {page.name: page.read_text(encoding="utf-8") for page in (REPO / "docs").glob("*.md")}
# Promises are numbered without a gap; none is dropped unnoticed.
PROMISES = 35


def test_the_readme_is_short():
    """Longer pages are read by nobody."""
    assert len(README.encode()) <= 15_000 and len(README.splitlines()) <= 250


def test_the_readme_has_one_picture_that_fits_a_screen():
    (picture,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    head = (REPO / picture).read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:])
    assert height <= 700 and width <= 1100  # GitHub shows about 850, the Hub about 1000


def test_the_readme_names_every_page_and_every_section_and_is_linked_back():
    for name, text in DOCS.items():
        assert f"(docs/{name})" in README and "(../README.md" in text, name
    contents = README.partition("## Contents")[2].partition("\n## ")[0]
    sections = set(re.findall(r"^## (.+)$", README, re.MULTILINE)) - {"Contents"}
    assert set(re.findall(r"\[([^]]+)\]\(#", contents)) == sections


def test_the_table_of_heads_is_the_auto_map():
    rows = re.findall(r"^\| `(VitEmbed\w+)` \| ([^|]*) \|", README, re.MULTILINE)
    table = {name: re.findall(r"`(Auto\w+)`", autos) for name, autos in rows}
    heads = {auto: target.split(".")[1] for auto, target in AUTO_MAP.items() if auto not in ("AutoConfig", "AutoModel")}
    by_auto_model = {"VitEmbedModel", "VitEmbedModelWithProjection", "VitEmbedForContrastive"}
    text_towers = {name for name in dir(vit_embed) if name.startswith("VitEmbedTextModel")}
    assert set(table) == {*by_auto_model, *heads.values(), *text_towers}
    assert all(auto in table[name] for auto, name in heads.items())
    assert {name for name, autos in table.items() if "AutoModel" in autos} >= by_auto_model


def test_front_matter_is_a_model_card():
    card = yaml.safe_load(README.split("---")[1])
    assert card["library_name"] == "transformers" and card["license"] == "apache-2.0"
    assert card["pipeline_tag"] == "zero-shot-image-classification"


def test_links_lead_somewhere():
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("http"):
                continue
            path, _, anchor = target.partition("#")
            leads_to = page if not path else (page.parent / path).resolve()
            assert leads_to.exists(), f"{page.name}: {target}"
            if anchor and leads_to.suffix == ".md":
                assert anchor in anchors(leads_to), f"{page.name}: {target}"


def test_files_that_pages_name_exist():
    named = r"\b((?:examples|benchmarks|configs|tests|conversion)/[\w./-]*\w/?)"
    for page in PAGES:
        for path in re.findall(named, page.read_text(encoding="utf-8")):
            if page.parent == REPO or not (page.parent / path).exists():
                assert locate(path) is not None, f"{page.name}: {path}"


def test_every_promise_names_tests_that_exist():
    row = re.compile(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
    rows = row.findall(DOCS["how-tested.md"])
    assert [int(number) for number, _, _ in rows] == list(range(1, PROMISES + 1))
    known = {
        f"{path.name}::{name}"
        for path in (REPO / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    for number, promise, tests in rows:
        named = set(re.findall(r"`(test_\w+\.py::test_\w+)`", tests))
        assert named and promise.strip(), number
        assert named <= known, f"promise {number}: {named - known}"


def pinned(package: str) -> str:
    return re.search(rf"^{package}==(\S+)$", text_of("requirements-demo.txt") + text_of("requirements.txt"), re.M)[1]


def test_the_version_is_the_same_everywhere():
    metadata = configparser.ConfigParser()
    metadata.read_string(text_of("setup.cfg"))
    newest = re.search(r"^## (\S+)$", text_of("CHANGELOG.md"), re.MULTILINE)[1]
    assert vit_embed.__version__ == metadata["metadata"]["version"] == newest


def test_tools_and_the_matrix_have_the_pinned_versions():
    (repo,) = yaml.safe_load(text_of(".pre-commit-config.yaml"))["repos"]
    assert repo["rev"] == f"v{pinned('ruff')}"
    assert [hook["id"] for hook in repo["hooks"]] == ["ruff-check", "ruff-format"]
    newest = ", ".join(f'"{package}=={pinned(package)}"' for package in ("transformers", "huggingface_hub"))
    assert newest in text_of("tests/matrix.py")


def test_the_workflow_calls_the_landing_check():
    jobs = yaml.safe_load(text_of(".github/workflows/ci.yml"))["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands == ["bash .ci/run"]
    targets = set(re.findall(r"^([\w.-]+):", text_of("Makefile"), re.MULTILINE))
    assert set(re.findall(r"make (\S+)", text_of(".ci/run"))) <= targets


def test_the_public_names_are_those_of_the_package():
    """What `__all__` names is there, and every class with an Auto class is named."""
    assert sorted(vit_embed.__all__) == vit_embed.__all__
    assert all(hasattr(vit_embed, name) for name in vit_embed.__all__)
    targets = {target.partition(".")[2] for target in (*AUTO_MAP.values(), *TEXT_AUTO_MAP.values())}
    assert targets - set(vit_embed.__all__) == {"VitEmbedAutoModel", "VitEmbedTextAutoModel"}
