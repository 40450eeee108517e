"""Every code block of README.md, CONTRIBUTING.md and docs/ runs by itself and prints what the page says that it prints.

A Python block runs in a process, a folder and a namespace of its own, so it imports and loads all that it uses. A shell
block runs in a folder of its own, too. One that does not run has `<!-- not run: reason -->` before it.
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fresh_process import DEAD_ENDPOINT
from pages import PAGES, REPO, Block, blocks_of, locate
from transformers import TrainingArguments

SUPPORT = REPO / "tests" / "support"
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


def variables(home: Path) -> dict[str, str]:
    """Of a process without a Hub, and with a home of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}",
        "HF_HOME": str(home),
        "HF_ENDPOINT": DEAD_ENDPOINT,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


class Server:
    """`block_server.py`, started at the first block."""

    def __init__(self, home: Path):
        self.process = subprocess.Popen(
            [sys.executable, SUPPORT / "block_server.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=variables(home),
        )
        assert self.answer() == "ready"

    def answer(self) -> int | str:
        return json.loads(self.process.stdout.readline())["status"]

    def run(self, code: str, folder: Path) -> str:
        """What the code prints."""
        file, log = folder / "block.py", folder / "printed"
        file.write_text(code, encoding="utf-8")
        request = {"file": str(file), "folder": str(folder), "log": str(log), "seconds": SECONDS}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        status = self.answer()
        assert status == 0, f"exit status {status}\n{Path(str(log) + '.err').read_text()[-3000:]}"
        return log.read_text()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("home"))
    yield server
    server.close()


def same(text: str) -> str:
    """Without spaces at the ends of lines and empty lines at the ends of the text."""
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


def prints(printed: str, stated: str) -> bool:
    """Whether what is printed is what a page states, where a line `...` stands for any lines."""
    lines = [r"(?:.*\n)*?" if line == "..." else re.escape(line) + r"\n" for line in same(stated).splitlines()]
    return re.fullmatch("".join(lines), same(printed) + "\n") is not None


def of_language(language: str) -> list:
    return [pytest.param(block, id=block.name) for block in RUN if block.language == language]


@pytest.mark.parametrize("block", of_language("python"))
def test_a_python_block_runs_by_itself_and_prints_what_it_says(block: Block, server, tmp_path):
    printed = server.run(block.code, make_clone(tmp_path / "clone"))
    if block.output is not None:
        assert prints(printed, block.output), printed


@pytest.mark.parametrize("block", of_language("bash"))
def test_a_shell_block_runs_by_itself_and_prints_what_it_says(block: Block, tmp_path):
    assert not NEVER_RUN.search(block.code), "mark it with <!-- not run: why -->"
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", block.code],
        cwd=make_clone(tmp_path / "clone"),
        env=variables(tmp_path / "home"),
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
    if block.output is not None:
        assert prints(printed, block.output), printed


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
