"""What several files of the project say has to agree: versions, tools, workflow."""

import configparser
import re

import yaml
from pages import REPO

import vit_embed


def text_of(name: str) -> str:
    return (REPO / name).read_text(encoding="utf-8")


def pinned(package: str) -> str:
    return re.search(rf"^{package}==(\S+)$", text_of("requirements-demo.txt") + text_of("requirements.txt"), re.M)[1]


def test_the_version_is_the_same_everywhere():
    metadata = configparser.ConfigParser()
    metadata.read_string(text_of("setup.cfg"))
    newest = re.search(r"^## (\S+)$", text_of("CHANGELOG.md"), re.MULTILINE)[1]
    assert vit_embed.__version__ == metadata["metadata"]["version"] == newest


def test_pre_commit_has_the_ruff_of_make_style():
    (repo,) = yaml.safe_load(text_of(".pre-commit-config.yaml"))["repos"]
    assert repo["rev"] == f"v{pinned('ruff')}"
    assert [hook["id"] for hook in repo["hooks"]] == ["ruff-check", "ruff-format"]


def test_the_workflow_calls_the_landing_check():
    jobs = yaml.safe_load(text_of(".github/workflows/ci.yml"))["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands == ["bash .ci/run"]
    assert set(re.findall(r"make (\S+)", text_of(".ci/run"))) <= set(
        re.findall(r"^([\w.-]+):", text_of("Makefile"), re.M)
    )


def test_the_matrix_has_the_pinned_versions():
    assert f'"transformers=={pinned("transformers")}", "huggingface_hub=={pinned("huggingface_hub")}"' in text_of(
        "tests/matrix.py"
    )


def test_the_public_names_are_those_of_the_package():
    """What `__all__` names is there, and every class with an Auto class is named."""
    from vit_embed.configuration_vit_embed import AUTO_MAP, TEXT_AUTO_MAP

    assert sorted(vit_embed.__all__) == vit_embed.__all__
    assert all(hasattr(vit_embed, name) for name in vit_embed.__all__)
    targets = {target.partition(".")[2] for target in (*AUTO_MAP.values(), *TEXT_AUTO_MAP.values())}
    assert targets - set(vit_embed.__all__) == {"VitEmbedAutoModel", "VitEmbedTextAutoModel"}
