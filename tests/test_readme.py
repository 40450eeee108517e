"""The README: its code runs, its table is the auto_map, its links lead somewhere."""

import os
import re
from pathlib import Path

import pytest
import yaml

from vit_embed.configuration_vit_embed import AUTO_MAP

REPO = Path(__file__).parent.parent
README = (REPO / "README.md").read_text()


def code_blocks() -> list[tuple[str, str]]:
    """(heading, code) of every Python block, in order."""
    blocks = []
    for section in re.split(r"^## ", README, flags=re.MULTILINE)[1:]:
        heading = section.splitlines()[0]
        blocks += [(heading, code) for code in re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)]
    return blocks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that looks like the repository, in which the blocks may write."""
    folder = tmp_path_factory.mktemp("clone")
    for path in REPO.iterdir():
        if not path.name.startswith(".") and path.name not in ("tests", "demo_output"):
            (folder / path.name).symlink_to(path)
    before = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def test_every_block_runs_in_order(folder, capsys):
    """One reader, top to bottom: what an earlier section imports and loads is there in a later one."""
    blocks = code_blocks()
    assert len(blocks) >= 10
    names = {}
    for heading, code in blocks:
        try:
            exec(compile(code, f"README.md, {heading}", "exec"), names)
        except Exception as error:
            pytest.fail(f"README section {heading!r}: {type(error).__name__}: {error}")
    assert (folder / "my-model" / "config.json").exists()


def test_the_start_is_eight_lines_and_prints_what_it_says(folder, capsys):
    heading, code = code_blocks()[0]
    assert heading == "Start" and len([line for line in code.splitlines() if line.strip()]) == 8
    exec(compile(code, "README.md, Start", "exec"), {})
    said = re.search(r"# (torch\.Size.*)$", code, re.MULTILINE)[1]
    assert capsys.readouterr().out.strip().endswith(said)


def test_the_table_of_heads_is_the_auto_map():
    rows = re.findall(r"^\| `(VitEmbed\w+)` \| ([^|]*) \|", README, re.MULTILINE)
    table = {name: re.findall(r"`(Auto\w+)`", autos) for name, autos in rows}
    heads = {auto: target.split(".")[1] for auto, target in AUTO_MAP.items() if auto not in ("AutoConfig", "AutoModel")}
    by_auto_model = {"VitEmbedModel", "VitEmbedModelWithProjection", "VitEmbedForContrastive"}
    assert set(table) == {*by_auto_model, *heads.values()}
    for auto, name in heads.items():
        assert auto in table[name], auto
    # AutoModel gives what the checkpoint has.
    assert {name for name, autos in table.items() if "AutoModel" in autos} == by_auto_model


def test_front_matter_is_a_model_card():
    card = yaml.safe_load(README.split("---")[1])
    assert card["library_name"] == "transformers" and card["license"] == "apache-2.0"
    assert card["pipeline_tag"] == "zero-shot-image-classification"


def test_links_lead_somewhere():
    headings = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("http"):
            assert (REPO / target).exists(), target
