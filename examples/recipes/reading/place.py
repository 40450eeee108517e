"""What --dataset names: its files, which split each belongs to, and where the paths in a table lead."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path, PurePosixPath

from recipes.arguments import DataArguments
from vit_embed.retrieval.pictures import PICTURE_SUFFIXES

logger = logging.getLogger(__name__)

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
IGNORED_FOLDERS = ("__MACOSX", "lost+found")
NUM_TRIED = 64  # rows of a table that show where its paths start
# What Flickr8k puts behind a file's name to number its captions.
CAPTION_NUMBER = re.compile(r"#\d+$")


class Place:
    """A folder or a file, by the name that the user gave; with neither there it may be a name on the Hub."""

    def __init__(self, name: str) -> None:
        self.name, self.path = name, Path(name).expanduser()
        self.tables_seen: dict[str, str] = {}  # what tables have in place of the columns looked for

    @property
    def folder(self) -> Path:
        """The folder that paths of `files` start at."""
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def files(self) -> list[str]:
        """Every file as a posix path from `folder`, in order; hidden ones are left out, and links are followed."""
        if not self.path.is_dir():
            return [self.path.name] if self.path.is_file() else []
        found, seen = [], set()
        for folder, folders, names in os.walk(self.path, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:  # a link to a folder that it lies in
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in IGNORED_FOLDERS)
            start = Path(folder).relative_to(self.path).as_posix()
            found += [name if start == "." else f"{start}/{name}" for name in names if not name.startswith(".")]
        return sorted(found)

    def with_suffix(self, *suffixes: str) -> list[str]:
        return [file for file in self.files if file.lower().endswith(suffixes)]

    @cached_property
    def pictures(self) -> list[str]:
        return self.with_suffix(*PICTURE_SUFFIXES)

    @cached_property
    def folders(self) -> set[str]:
        """Every folder that holds a file, at any depth, as a posix path from `folder`."""
        return {str(parent) for file in self.files for parent in PurePosixPath(file).parents if str(parent) != "."}

    def full(self, file: str) -> str:
        return str(self.folder / file)

    def summary(self) -> str:
        """What was found, in a line: kinds of files by count, and the first folders."""
        if not self.files:
            return "nothing is there" if not self.path.exists() else "no files"
        kinds = Counter(PurePosixPath(file).suffix.lower() or "no suffix" for file in self.files)
        kinds_text = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(6))
        top = sorted({file.split("/")[0] + "/" for file in self.files if "/" in file})
        more = ", ..." if len(top) > 8 else ""
        return f"{kinds_text}" + (f"; in {', '.join(top[:8])}{more}" if top else "")


def split_of_word(arguments: DataArguments) -> dict[str, str]:
    """Lower-case word -> the split that it names; the user's own names go first."""
    words = {word: split for split, words in SPLIT_WORDS.items() for word in words}
    return words | {name.lower(): name for name in arguments.splits}


def split_of_name(name: str, arguments: DataArguments) -> str | None:
    """The split that a file's stem or a folder's name speaks of, as `captions_val2017` of validation; None for none."""
    known = split_of_word(arguments)
    whole = known.get(name.lower())
    return whole or next((known[word] for word in re.findall(r"[a-z]+", name.lower()) if word in known), None)


def split_of_file(file: str, arguments: DataArguments) -> str | None:
    """The split that a file's name speaks of, or else the nearest folder that it lies in."""
    path = PurePosixPath(file)
    names = (path.name.split(".")[0], *reversed(path.parent.parts))
    return next(filter(None, (split_of_name(name, arguments) for name in names)), None)


def split_of_paths(paths: Sequence[str], arguments: DataArguments) -> list[str | None]:
    """The split of each path of a table, where one of their folders has names of splits alone, two at least."""
    known, parts = split_of_word(arguments), [_parts(path) for path in paths]
    for position in range(min(map(len, parts), default=1) - 1):
        splits = [known.get(each[position].lower()) for each in parts]
        if None not in splits and len(set(splits)) > 1:
            return splits
    return [None] * len(paths)


def split_folders(place: Place, arguments: DataArguments, files: Sequence[str] | None = None) -> dict[str, str]:
    """{name of a folder at the top: split}, where the folders at the top are those of splits.

    They are where all of them have names of splits, or one that is split further is for training: "valid" beside
    "invalid" is a label.

    Args:
        files: those that count; None for the pictures.
    """
    known = split_of_word(arguments)
    files = [file for file in (place.pictures if files is None else files) if "/" in file]
    tops = {file.split("/")[0]: file.count("/") for file in files}
    splits = {top: known[top.lower()] for top in sorted(tops) if top.lower() in known}
    others = sorted(set(tops) - set(splits))
    if others and not any(split == arguments.train_split and tops[top] > 1 for top, split in splits.items()):
        return {}
    if others and splits:
        logger.warning("%s: left out, as their names are of no split: %s", place.name, ", ".join(others))
    return splits


class Finder:
    """A path as a table has it -> the path of the file.

    Tables move, so `fit` chooses once for the whole table which folder its paths start at and how many of their first
    folders to drop: the choice that finds most of its rows. Where that is a folder beside the table, others beside it
    may hold more of them, as parts of an archive do, if no file is in two. A row that it does not find is missing; it
    is never looked for elsewhere, where another file may have its name. Names without a suffix are tried with those of
    pictures.
    """

    def __init__(
        self,
        table: Path,
        arguments: DataArguments,
        suffixes: tuple[str, ...] = PICTURE_SUFFIXES,
        skip: tuple[str, ...] = (),
    ) -> None:
        """`skip`: names, in lower case, of folders beside the table whose files are something else."""
        self.table, self.suffixes, self.skip = table, suffixes, skip
        self.given = arguments.image_folder is not None
        self.usual = [Path(arguments.image_folder).expanduser()] if self.given else [table.parent, table.parent.parent]
        # COCO's tables lie in annotations/, its pictures beside that folder.
        root = Path(arguments.dataset).expanduser()
        is_below = table.parent != root and root in table.parent.parents
        above = [table.parent.parent] if is_below or table.parent.name.lower() == "annotations" else []
        self.near, self.split_of = [table.parent, *above], partial(split_of_name, arguments=arguments)
        self.starts, self.dropped = self.usual[:1], 0

    def _folders(self, depth: int) -> list[Path]:
        """Folders near the table, those of its split alone if it names one that they have."""
        found = self.near
        for _ in range(depth):
            found = [folder for folder in _folders_in(found) if folder.name.lower() not in self.skip]
        split = self.split_of(self.table.stem)
        own = [folder for folder in found if split is not None and self.split_of(folder.name) == split]
        return own or [folder for folder in found if folder != self.table.parent]

    def fit(self, names: Sequence[str]) -> Finder:
        """Chooses where the paths of `names` start.

        Raises:
            ValueError: two folders beside the table hold files of these names.
        """
        step = max(1, len(names) // NUM_TRIED)
        sample = [name for name in names[::step] if name and not _is_there(name)][:NUM_TRIED]
        depth = max((len(_parts(name)) for name in sample), default=1)
        for level in (0,) if self.given else (1, 2):
            starts = self.usual * (level < 2) + self._folders(level) * (level > 0)
            found = {
                (start, dropped): sum(self._at(name, start, dropped) is not None for name in sample)
                for dropped in range(depth)
                for start in starts
            }
            most = max(found.values(), default=0)
            if most:
                break
        best = [choice for choice, count in found.items() if count == most > 0]
        if not best:
            return self
        start, self.dropped = best[0]
        self.starts = [start]
        if start not in self.usual:
            parts = [path for path in starts if path not in self.usual and found[path, self.dropped]]
            holding = [[path for path in parts if self._at(name, path, self.dropped)] for name in sample]
            if all(len(paths) < 2 for paths in holding):
                self.starts = parts
            else:  # copies, of which one may be whole
                self._only([path for path in parts if most == found[path, self.dropped] == len(sample)] or parts)
        return self

    def _only(self, starts: Sequence[Path]) -> None:
        if len(starts) > 1:
            raise ValueError(
                f"expected the pictures of {self.table} in one folder, or each in one of several, found files of "
                f"these names in {' and in '.join(map(str, starts))}; set --image_folder"
            )

    def __call__(self, name: str) -> str:
        """The path of the file, also where it is missing: opening it says so.

        Raises:
            ValueError: it is in two parts of the data set.
        """
        if _is_there(name):
            return name
        found = {start: path for start in self.starts if (path := self._at(name, start, self.dropped)) is not None}
        self._only(list(found))
        return next(iter(found.values()), os.path.join(self.starts[0], *_parts(name)[self.dropped :]))

    def finds(self, name: str) -> bool:
        return bool(name.strip()) and os.path.isfile(self(name))

    def _at(self, name: str, start: Path, dropped: int) -> str | None:
        parts = _parts(name)[dropped:]
        if not parts:
            return None
        path = os.path.join(start, *parts)
        endings = ("",) if path.lower().endswith(self.suffixes) else ("", *self.suffixes)
        return next((path + ending for ending in endings if os.path.isfile(path + ending)), None)


def _is_there(name: str) -> bool:
    return os.path.isabs(name) and os.path.isfile(name)


def _folders_in(folders: Iterable[Path]) -> list[Path]:
    found = []
    for folder in folders:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        found += [folder / name for name in names]
    return found


def _parts(name: str) -> tuple[str, ...]:
    """The folders and the file of a path; Windows' separators count, too."""
    return PurePosixPath(CAPTION_NUMBER.sub("", name.strip()).replace("\\", "/").lstrip("/")).parts
