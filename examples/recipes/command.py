"""The commands of examples/: their parser, and how they end."""

from __future__ import annotations

import argparse
import difflib
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from transformers import HfArgumentParser

REPOSITORY = Path(__file__).resolve().parents[2]
EXIT_ERROR, EXIT_STOPPED = 1, 130
TRACEBACK = "VIT_EMBED_TRACEBACK"  # of the environment: where an error was raised, too
USAGE = "%(prog)s --dataset DATASET --output_dir FOLDER [--do_train] [--do_eval] [--do_predict] [--check_only] ..."


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The description as it is written; one spelling of a flag; a default where the help does not state it."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=min(120, shutil.get_terminal_size().columns))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        name, choices = action.option_strings[0], action.choices
        is_switch = action.nargs == "?" and action.const is True
        words = "" if is_switch else " NAME" if choices else f" {action.dest.upper()}"
        return name + words

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        states_none = action.default in (None, False, [], "", argparse.SUPPRESS)
        return text if states_none or "default" in text else f"{text} (default: %(default)s)"


class Parser(HfArgumentParser):
    """HfArgumentParser whose own groups of flags go first and whose errors are a line, with the nearest flag."""

    def __init__(self, dataclasses: tuple[type, ...], description: str | None) -> None:
        super().__init__(
            dataclasses, description=description, usage=USAGE, formatter_class=HelpFormatter, allow_abbrev=False
        )
        # What is in no group of ours are the flags of TrainingArguments, and --help.
        self._optionals.title = "training (transformers.TrainingArguments)"
        self._action_groups.append(self._action_groups.pop(self._action_groups.index(self._optionals)))

    def parse(self) -> tuple:
        """The dataclasses filled from the command line."""
        *parsed, unknown = self.parse_args_into_dataclasses(return_remaining_strings=True)
        flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        if flags:
            near = difflib.get_close_matches(flags[0], list(self._option_string_actions), n=1)
            self.error(f"there is no flag {flags[0]}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
        if unknown:
            self.error(f"{unknown[0]!r} belongs to no flag; see --help")
        return tuple(parsed)

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}\n")


def run_command(main: Callable[[], None]) -> None:
    """Runs the `main` of a script. What its user can mend is a line without a traceback, with exit status EXIT_ERROR.

    That is a ValueError of this repository, or a file, folder or Hub name that cannot be read or written.
    """
    try:
        main()
    except KeyboardInterrupt:
        print("stopped; --resume_from_checkpoint True goes on from the last checkpoint", file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    except (ValueError, OSError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        is_ours = raised_in.is_relative_to(REPOSITORY) and ".venv" not in raised_in.parts
        if os.environ.get(TRACEBACK) or not (is_ours or isinstance(error, OSError)):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(EXIT_ERROR)
