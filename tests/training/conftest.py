"""For the tests of this folder: the commands of `examples/`, and the modules that they import."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Commands

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))


@pytest.fixture(scope="session")
def command() -> Iterator[Commands]:
    """Runs a command in a process of its own: `command("examples/train_depth.py", "--dataset", ..., cwd=tmp_path)`."""
    commands = Commands()
    yield commands
    commands.close()
