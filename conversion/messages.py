"""Parts of messages that many modules need."""

from collections.abc import Iterable

MAX_LISTED = 5  # names that a message lists before it only counts the rest
MAX_LENGTH = 500  # characters of a message that quotes a file


def listing(names: Iterable[str]) -> str:
    """The first few of many names, and how many there are."""
    names = list(names)
    rest = f", ... ({len(names)} in all)" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + rest


def one_line(error: Exception) -> str:
    """What went wrong, without the control characters that a file may have put into its names."""
    line = (str(error) or type(error).__name__).splitlines()[0][:MAX_LENGTH]
    return "".join(letter if letter.isprintable() else "?" for letter in line)
