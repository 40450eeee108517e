"""Every code block of README.md, CONTRIBUTING.md and docs/ runs by itself, in a process and a folder of its own, and
prints what the page says that it prints. One that does not run has `<!-- not run: reason -->` before it.
"""

import dataclasses
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fork_server import LIBRARIES, ForkServer
from fresh_process import environment_of
from pages import PAGES, REPO, Block, blocks_of, locate
from transformers import TrainingArguments

SECONDS = 120
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUN = [block for block in BLOCKS if block.reason is None]
# A test does not change the environment that it runs in, nor ask anybody on the network.
NEVER_RUN = re.compile(r"\b(pip3? install|make|npm|curl|wget|git clone)\b")


def make_clone(folder: Path) -> Path:
    """A folder that looks like a clone of the repository, in which a block may write."""
    folder.mkdir()
    for path in REPO.iterdir():
        if not path.name.startswith(".") and path.name not in ("examples", "runs", "data", "demo_output"):
            (folder / path.name).symlink_to(path)
    (folder / "examples").mkdir()
    for path in (REPO / "examples").iterdir():
        (folder / "examples" / path.name).symlink_to(path)
    return folder


# Of a process without a Hub; shells find the python of the tests.
VARIABLES = environment_of(
    PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def server() -> ForkServer:
    return ForkServer(sys.executable, VARIABLES, (*LIBRARIES, "transformers:Trainer", "vit_embed"))


def same(text: str) -> str:
    """Without spaces at the ends of lines and empty lines at the ends of the text."""
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


def prints(printed: str, stated: str) -> bool:
    """Whether what is printed is what a page states, where a line `...` stands for any lines."""
    lines = [r"(?:.*\n)*?" if line == "..." else re.escape(line) + r"\n" for line in same(stated).splitlines()]
    return re.fullmatch("".join(lines), same(printed) + "\n") is not None


def assert_prints(block: Block, printed: str) -> None:
    assert block.output is None or prints(printed, block.output), printed


def of_language(language: str) -> list:
    return [pytest.param(block, id=block.name) for block in RUN if block.language == language]


@pytest.mark.parametrize("block", of_language("python"))
def test_a_python_block_runs_by_itself_and_prints_what_it_says(block: Block, server, home, tmp_path):
    file = make_clone(tmp_path / "clone") / "block.py"
    file.write_text(block.code, encoding="utf-8")
    assert_prints(block, server.run(file, file.parent, home, seconds=SECONDS))


@pytest.mark.parametrize("block", of_language("bash"))
def test_a_shell_block_runs_by_itself_and_prints_what_it_says(block: Block, tmp_path):
    assert not NEVER_RUN.search(block.code), "mark it with <!-- not run: why -->"
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", block.code],
        cwd=make_clone(tmp_path / "clone"),
        env={**VARIABLES, "HF_HOME": str(tmp_path / "home")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed, errors = process.communicate(timeout=SECONDS)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)  # what the shell has started, too
        process.communicate()
        raise
    assert process.returncode == 0, errors[-3000:]
    assert_prints(block, printed)


def test_a_line_of_dots_stands_for_any_lines_and_no_other_line_does():
    assert prints("a\n b \n", "a\n b") and prints("x\ny\nb\n", "...\nb") and prints("b\n", "...\nb")
    assert not prints("a\nb\n", "b") and not prints("a\n", "...\nb") and not prints("ab\n", "a.")


def test_there_are_blocks_and_few_are_not_run():
    python = [block for block in BLOCKS if block.language == "python"]
    assert len(python) >= 20 and {block.page for block in python} >= {REPO / "README.md"}
    assert all(block.reason is None or len(block.reason) > 8 for block in BLOCKS)
    assert sum(block.reason is None for block in python) >= 0.9 * len(python)


def commands(code: str) -> list[tuple[str, set[str]]]:
    """(script, flags) of every Python script that a shell block runs."""
    joined = re.sub(r"\\\n", " ", re.sub(r"#.*$", "", code, flags=re.MULTILINE))
    script = r"(?:(?:examples|benchmarks|tests)/[\w/]+\.py|convert_checkpoint(?:\.py)?)"
    found = re.findall(rf"({script})(.*?)(?={script}|[\"\n]|$)", joined)
    return [(script, set(re.findall(r"--(\w+)", rest))) for script, rest in found]


def test_blocks_that_are_not_run_name_scripts_and_flags_that_exist():
    """A flag is a name in the source of some script or a field of TrainingArguments; every `--help` would take long."""
    sources = [
        path for name in ("examples", "benchmarks", "tests", "conversion") for path in (REPO / name).rglob("*.py")
    ]
    sources += [*REPO.glob("*.py"), *(REPO / "layouts").rglob("*.py")]
    names = set(re.findall(r"\w+", "\n".join(path.read_text(encoding="utf-8") for path in sources)))
    names |= {field.name for field in dataclasses.fields(TrainingArguments)} | {"help", "nproc_per_node"}
    found = [each for block in BLOCKS if block.language == "bash" for each in commands(block.code)]
    assert len(found) > 10
    for script, flags in found:
        assert locate(script if script.endswith(".py") else script + ".py") is not None, script
        assert flags <= names, (script, flags - names)
