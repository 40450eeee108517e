"""recipes/command.py: what a user reads who mistypes a flag, names what is not there, or asks for help."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.arguments import DataArguments, ModelArguments, RecipeArguments
from recipes.command import Parser, run_command

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TYPES = (ModelArguments, DataArguments, RecipeArguments)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--dataset", "x", "--layer_dekay", "0.5"], "there is no flag --layer_dekay; did you mean --layer_decay?"),
        (["--dataset", "x", "--layer-dekay=0.5"], "there is no flag --layer-dekay; did you mean --layer-decay?"),
        (["--dataset", "x", "--zzz"], "there is no flag --zzz; see --help"),
        (["--dataset", "x", "--layer", "0.5"], "there is no flag --layer;"),
        (["--dataset", "x", "more"], "'more' belongs to no flag"),
        (
            ["--dataset", "x", "--layer_decay", "half"],
            "argument --layer_decay/--layer-decay: invalid float value: 'half'",
        ),
        ([], "the following arguments are required: --dataset"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(given, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *given])
    with pytest.raises(SystemExit) as stopped:
        Parser(TYPES, "what it does").parse()
    written = capsys.readouterr().err
    assert stopped.value.code == 2 and written.startswith(f"train.py: error: {message}") and written.count("\n") == 1


def test_help_has_our_flags_first_in_groups_and_each_once(capsys):
    Parser(TYPES, "What it does,\n    line by line.").print_help()
    text = capsys.readouterr().out
    groups = ["What it does,\n    line by line.", "\nmodel:\n", "\ndata:\n", "\nrecipe:\n", "\ntraining (transformers"]
    places = [text.index(group) for group in groups]
    assert places == sorted(places) and places[0] < 300, "the usage line names no more than the main flags"
    assert "--layer-decay" not in text and "--check_only  " in text and "default: None" not in text


def missing_file() -> None:
    Path("/nowhere/at/all").read_text()


def refuse() -> None:
    DataArguments(dataset="x", validation_share=2.0)


def stop() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("main", "code", "line"),
    [
        (missing_file, 1, "train.py: error: [Errno 2] No such file or directory: '/nowhere/at/all'\n"),
        (refuse, 1, "train.py: error: expected --validation_share in (0, 1), got 2.0\n"),
        (stop, 130, "stopped; --resume_from_checkpoint True goes on from the last checkpoint\n"),
    ],
)
def test_what_the_user_can_mend_is_a_line_without_a_traceback(main, code, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/some/where/train.py"])
    with pytest.raises(SystemExit) as stopped:
        run_command(main)
    assert stopped.value.code == code and capsys.readouterr().err == line


def test_a_fault_keeps_its_traceback(monkeypatch):
    with pytest.raises(ValueError, match="expected --validation_share"):
        monkeypatch.setenv("VIT_EMBED_TRACEBACK", "1")
        run_command(refuse)
    monkeypatch.delenv("VIT_EMBED_TRACEBACK")

    with pytest.raises(ValueError, match="Expecting property name"):  # raised in the library, so it may be our fault
        run_command(lambda: json.loads("{"))


@pytest.mark.heavy
@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*train*.py")))
def test_every_command_ends_so(script):
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, "--datazet", "x"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and "usage" not in done.stderr
