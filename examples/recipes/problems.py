"""What a classifier learns from its data set: one label a picture, several, numbers, or probabilities of labels.

A kind of problem is one object of PROBLEMS. `cells_of` reads labels however they are written into one form, `find_kind`
tells the kind from them and refuses where there are two readings, `Problem.target` gives what the loss takes.
"""

from __future__ import annotations

import ast
import logging
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset, List

from recipes.reading.labels import in_order, some
from recipes.reading.tables import Bytes

logger = logging.getLogger(__name__)

SINGLE, MULTI, REGRESSION, SOFT = (
    *("single_label_classification", "multi_label_classification", "regression"),
    "soft_labels",
)
SEPARATORS = ("|", ";", ",")  # a space is looked for last, as many a name has one
UNKNOWN = -100  # of the model's losses and of Trainer's count of items: a row or entry without a label
SUM_TOLERANCE = 0.01  # of probabilities that are written with two digits
MANY_NUMBERS = 20  # more whole numbers than that may well be amounts
MISSING_WORDS = ("nan", "na", "n/a", "none", "null", "?", "-")  # what programs write for an empty cell
NUM_COUNTED = 20  # labels that the log counts one by one


# --- cells: labels as they are written ---


def cells_of(rows: Dataset, columns: Sequence[str], separator: str | None = None) -> list:
    """What each row has: a name, a number, a list of either, or None; of several columns a list of their cells.

    Args:
        separator: of several names in one cell.

    Raises:
        ValueError: a column holds something else.
    """
    known = [name for name in columns if name in rows.column_names]
    if not known:
        return [None] * len(rows)
    if len(columns) > 1:
        lists = [[_number(cell, name) for cell in rows[name][:]] if name in known else [] for name in columns]
        lists = [cells or [None] * len(rows) for cells in lists]
        return [list(cells) if any(cell is not None for cell in cells) else None for cells in zip(*lists)]
    feature = rows.features[known[0]]
    inner = feature.feature if isinstance(feature, List) else feature
    if getattr(inner, "dtype", None) is None or inner in Bytes or not _is_plain(inner.dtype):
        raise ValueError(
            f"expected labels in column {columns[0]!r}, as names, numbers or lists of them; it has {feature}; set "
            "--label_column"
        )
    cells = [_missing_is_none(cell) for cell in rows[known[0]][:]]
    if isinstance(inner, ClassLabel):
        return [_declared(cell, inner.names) for cell in cells]
    return _listed([str(cell) if isinstance(cell, bool) else cell for cell in cells], separator)


def _is_plain(dtype: str) -> bool:
    return dtype.startswith(("int", "uint", "float", "bool", "string", "large_string", "null"))


def _missing_is_none(cell: object) -> object:
    return None if isinstance(cell, float) and math.isnan(cell) else cell


def _declared(cell: object, names: list[str]) -> object:
    if isinstance(cell, list):
        return [_declared(each, names) for each in cell]
    if cell is None or cell == -1:  # what data sets of the Hub have in place of a label that is kept secret
        return None
    return names[cell] if 0 <= cell < len(names) else str(cell)


def _number(cell: object, column: str) -> float | None:
    number = number_of(cell)
    if number is None and cell is not None:
        raise ValueError(f"expected numbers in column {column!r}, got {cell!r}; set --label_columns, or --label_column")
    return None if number is None or math.isnan(number) else number


def number_of(cell: object) -> float | None:
    """The number that a cell is or spells."""
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


def _listed(cells: list, separator: str | None) -> list:
    """Texts of lists, as pandas writes them to a csv, and of names with `separator` between them, as lists."""
    texts = [cell for cell in cells if cell is not None]
    if not texts or not all(isinstance(cell, str) for cell in texts):
        return cells
    if all(cell.startswith("[") and cell.endswith("]") for cell in texts):
        try:
            return [None if cell is None else list(ast.literal_eval(cell)) for cell in cells]
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"expected lists as ['a', 'b'] in the column of labels: {error}") from error
    return [None if cell is None else names_in(cell, separator) for cell in cells] if separator else cells


def names_in(cell: str, separator: str) -> list[str]:
    return [name.strip() for name in cell.split(separator) if name.strip()]


def text_of(cell: object) -> str:
    """The name of a label: a whole number has no decimals."""
    return unicodedata.normalize("NFC", str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell))


# --- the kinds ---

Target = int | list[float] | None  # None: of no use, with a reason


@dataclass(frozen=True)
class Problem:
    """What is learned.

    Args:
        kind: a name of PROBLEMS.
        names: of the classifier's outputs, in order.
        columns: of the data set, or LABEL.
        separator: of several names in a cell.
        has_vectors: whether a cell has a number for each output, in their order, in place of names.
        minus_one: what -1 stands for in such numbers: 0 where it is the opposite of 1, UNKNOWN where there is a 0, too.
    """

    kind: str
    names: tuple[str, ...]
    columns: tuple[str, ...]
    separator: str | None = None
    has_vectors: bool = False
    minus_one: float = 0.0
    places: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "places", {name: place for place, name in enumerate(self.names)})

    @property
    def config_type(self) -> str:
        """`problem_type` of the model's config, which decides what pipelines make of its logits."""
        return PROBLEMS[self.kind].config_type

    @property
    def unknown(self) -> int | list[float]:
        """The target of a row without a label, that losses and metrics leave out."""
        if self.kind == SINGLE:
            return UNKNOWN
        return [math.nan if self.kind == REGRESSION else float(UNKNOWN)] * len(self.names)

    def target(self, cell: object) -> tuple[Target, str | None]:
        """What the loss takes for a cell; or None, and why."""
        return (None, "no label") if cell is None else PROBLEMS[self.kind].target(self, cell)

    def outside(self) -> str:
        return f"a label outside the {len(self.names)} known"

    def summary(self, targets: np.ndarray) -> str:
        """Counts of labels, or the range of values, in a line."""
        return PROBLEMS[self.kind].summary(self, targets)


def _class_number(problem: Problem, cell: object) -> tuple[Target, str | None]:
    if problem.has_vectors:
        return (cell.index(1), None) if cell.count(1) == 1 and set(cell) <= {0, 1, -1} else (None, "not one label")
    if isinstance(cell, list):
        if len(cell) != 1:
            return None, f"{len(cell)} labels where one is expected"
        cell = cell[0]
    number = problem.places.get(text_of(cell))
    return number, None if number is not None else problem.outside()


def _several(problem: Problem, cell: object) -> tuple[Target, str | None]:
    if problem.has_vectors:
        meaning = {None: float(UNKNOWN), -1: problem.minus_one}
        targets = [float(meaning.get(value, value)) for value in cell]
        is_usable = len(targets) == len(problem.names) and all(0 <= t <= 1 or t == UNKNOWN for t in targets)
        return (targets, None) if is_usable else (None, "other numbers than one in [0, 1] for each label")
    places = [problem.places.get(text_of(name)) for name in (cell if isinstance(cell, list) else [cell])]
    if None in places:
        return None, problem.outside()
    return [float(place in places) for place in range(len(problem.names))], None


def _values(problem: Problem, cell: object) -> tuple[Target, str | None]:
    numbers = [number_of(value) for value in (cell if isinstance(cell, list) else [cell])]
    if len(numbers) != len(problem.names):
        return None, f"{len(numbers)} values where {len(problem.names)} are expected"
    if any(number is None or not math.isfinite(number) for number in numbers):
        return None, "no number for a value"
    # Trainer counts every entry but UNKNOWN: a value that happens to be it moves by one step of float32.
    return [float(np.nextafter(np.float32(n), np.float32(0))) if n == UNKNOWN else n for n in numbers], None


def _shares(problem: Problem, cell: object) -> tuple[Target, str | None]:
    values = np.array(cell if isinstance(cell, list) else [cell], dtype=object)
    numbers = np.array([number_of(value) for value in values], dtype=float)
    total = numbers.sum()
    if len(numbers) != len(problem.names) or not np.isfinite(total):
        return None, f"no probability of each of the {len(problem.names)} labels"
    if (numbers < 0).any() or abs(total - 1) > SUM_TOLERANCE:
        return None, "probabilities that do not sum to 1"
    return (numbers / total).tolist(), None


def _counts(problem: Problem, counts: Sequence[float]) -> str:
    order = np.argsort(-np.asarray(counts), kind="stable")
    named = [f"{problem.names[place]} {counts[place]:.4g}" for place in order]
    text = f"{len(named)} labels: {', '.join(named[:NUM_COUNTED])}"
    return text if len(named) <= NUM_COUNTED else f"{text}, and {len(named) - NUM_COUNTED} more down to {named[-1]}"


def _class_counts(problem: Problem, targets: np.ndarray) -> str:
    return _counts(problem, np.bincount(targets[targets != UNKNOWN], minlength=len(problem.names)))


def _positive_counts(problem: Problem, targets: np.ndarray) -> str:
    known = (targets != UNKNOWN).all(axis=1)
    per_row = (targets[known] > 0.5).sum(axis=1)
    rows = f"; {per_row.mean():.2g} a picture, {(per_row == 0).sum()} pictures with none" if known.any() else ""
    return _counts(problem, (targets > 0.5).sum(axis=0)) + rows


def _mean_shares(problem: Problem, targets: np.ndarray) -> str:
    return "sums of probabilities of " + _counts(problem, np.where(targets == UNKNOWN, 0, targets).sum(axis=0))


def _ranges(problem: Problem, targets: np.ndarray) -> str:
    lines = []
    for name, values in zip(problem.names, targets.T):
        values = values[np.isfinite(values)]
        if len(values):
            lines.append(f"{name} from {values.min():.6g} to {values.max():.6g}, mean {values.mean():.6g}")
    return "; ".join(lines) or "no values"


class Kind(NamedTuple):
    """A kind of problem.

    Args:
        words: what it is, after "--problem_type NAME reads them as".
        config_type: `problem_type` of the model's config.
        target: (problem, cell) -> what the loss takes, and why it is None.
        summary: (problem, targets of a split) -> a line for the log.
    """

    words: str
    config_type: str
    target: Callable[[Problem, object], tuple[Target, str | None]]
    summary: Callable[[Problem, np.ndarray], str]


PROBLEMS = {
    SINGLE: Kind("one label a picture", SINGLE, _class_number, _class_counts),
    MULTI: Kind("any number of labels a picture", MULTI, _several, _positive_counts),
    REGRESSION: Kind("amounts", REGRESSION, _values, _ranges),
    SOFT: Kind("probabilities of the labels", SINGLE, _shares, _mean_shares),
}


# --- finding the kind ---


def find_kind(cells: list, columns: Sequence[str], separator: str | None, is_declared: bool) -> str:
    """The kind of problem that cells are of.

    Args:
        cells: of the training split, as `cells_of` gives them.
        is_declared: whether the data set itself says that they are classes, as ClassLabel and class folders do.

    Raises:
        ValueError: there are two readings, or every row has a label of its own.
    """
    known = [cell for cell in cells if cell is not None]
    where = f"column {columns[0]!r}" if len(columns) == 1 else f"columns {some(columns)}"
    if not known:
        raise ValueError(f"expected labels in {where}, found none; set --label_column")
    lists = [cell for cell in known if isinstance(cell, list)]
    if lists and len(lists) < len(known):
        raise ValueError(f"expected lists of labels in {where}, found {some(known)}")
    if lists:
        return _kind_of_lists(lists, where)
    numbers = [number_of(cell) for cell in known]
    if not is_declared and None not in numbers:
        is_whole = all(number.is_integer() for number in numbers)
        if not is_whole:
            return REGRESSION
        if any(isinstance(cell, float) or (isinstance(cell, str) and not _is_integer(cell)) for cell in known):
            raise two_readings(where, known, SINGLE, REGRESSION)
    if not is_declared and all(re.fullmatch(r"-?\d+,\d+", str(cell)) for cell in known):
        raise ValueError(f"expected numbers with decimal points in {where}, found {some(known)}; write 1.5 for 1,5")
    if not is_declared and separator is None:
        _refuse_joined_names(known, where)
    if not is_declared and len(known) > 3 and len(set(known)) == len(known):
        raise ValueError(
            f"expected labels that rows share in {where}, every row has one of its own ({some(known)}): it may be an "
            f"id; set --label_column, or say what they are: --problem_type {SINGLE} or {REGRESSION}"
        )
    if not is_declared and None not in numbers:
        _say_whole_numbers(set(numbers), where)
    return SINGLE


def _say_whole_numbers(numbers: set[float], where: str) -> None:
    """Says what may be amounts, or no label at all."""
    if len(numbers) > MANY_NUMBERS:
        logger.warning(
            "%s: %d whole numbers are read as classes; --problem_type %s would read them as amounts",
            *(where, len(numbers), REGRESSION),
        )
    if -1 in numbers and min(numbers - {-1}, default=-1) >= 0:
        logger.warning(
            "%s: -1 is learned as a label of its own; where it stands for none, leave its cells empty", where
        )


def _kind_of_lists(lists: list[list], where: str) -> str:
    values = [value for cell in lists for value in cell if value is not None]
    if any(isinstance(value, str) for value in values):
        return MULTI
    lengths = {len(cell) for cell in lists}
    if len(lengths) > 1 or lengths <= {0, 1}:
        if all(float(value).is_integer() for value in values):
            return MULTI
        raise ValueError(
            f"expected lists of one length in {where}, found lengths {sorted(lengths)}; set --label_column"
        )
    kinds, sums = set(values), [sum(cell) for cell in lists if None not in cell]
    if kinds <= {0, 1} or kinds == {-1, 1}:
        if sums and all(list(cell).count(1) == 1 for cell in lists):
            raise two_readings(where, lists, SINGLE, MULTI)
        return MULTI
    if kinds <= {-1, 0, 1}:
        raise two_readings(where, lists, MULTI, REGRESSION)
    if min(values) >= 0 and sums and all(abs(total - 1) <= SUM_TOLERANCE for total in sums):
        return SOFT
    if min(values) >= 0 and max(values) <= 1:
        raise two_readings(where, lists, MULTI, REGRESSION)
    return REGRESSION


def two_readings(where: str, cells: list, *kinds: str) -> ValueError:
    ways = ", ".join(f"--problem_type {kind} reads them as {PROBLEMS[kind].words}" for kind in kinds)
    return ValueError(f"{where} can be read in two ways, found {some(list(dict.fromkeys(map(str, cells))))}; {ways}")


def _is_integer(text: str) -> bool:
    return text.strip().lstrip("+-").isdigit()


def _refuse_joined_names(cells: list, where: str) -> None:
    """ValueError where names seem to be joined in one cell: the parts of some cells are found in others."""
    distinct = sorted({cell for cell in cells if isinstance(cell, str)})
    for separator in (*SEPARATORS, " "):
        joined = [cell for cell in distinct if separator in cell and len(names_in(cell, separator)) > 1]
        parts = Counter(part for cell in distinct for part in set(names_in(cell, separator)))
        recurs = any(parts[part] > 1 for cell in joined for part in names_in(cell, separator))
        # Names of two words share words, too: there have to be fewer words than names.
        if recurs and (separator != " " or len(parts) < len(distinct)):
            shown = some([repr(cell) for cell in joined])
            raise ValueError(
                f"{where} can be read in two ways, found {shown}: --label_separator {separator!r} reads each as "
                f"several labels of a picture, --problem_type {SINGLE} as one name"
            )


def find_separator(cells: list, where: str) -> str | None:
    """What separates the names in a cell, for several labels a picture; None where a cell has one name or a list.

    Raises:
        ValueError: more than one may.
    """
    texts = [cell for cell in cells if isinstance(cell, str)]
    found = [separator for separator in SEPARATORS if any(separator in text for text in texts)]
    if len(found) > 1:
        raise ValueError(
            f"expected one separator of names in {where}, found {' and '.join(found)}; set --label_separator"
        )
    if not found and any(" " in text for text in texts):
        example = next(text for text in texts if " " in text)
        raise ValueError(
            f"expected the separator of names in {where}, of which {example!r} may be one or several; set "
            "--label_separator ' ', or one that no name has"
        )
    if found:
        logger.info("%s: names are separated by %r; --label_separator would set another", where, found[0])
    return found[0] if found else None


def make_problem(kind: str, cells: list, columns: Sequence[str], separator: str | None = None) -> Problem:
    """A problem with the outputs that the cells of the training split have."""
    lists = [cell for cell in cells if isinstance(cell, list)]
    values = {value for cell in lists for value in cell} - {None}
    lengths = set(map(len, lists))
    length = max(lengths, default=1)
    are_numbers = len(lengths) == 1 and length > 1 and not any(isinstance(value, str) for value in values)
    has_vectors = are_numbers and (kind in (REGRESSION, SOFT) or all(-1 <= value <= 1 for value in values))
    minus_one = float(UNKNOWN) if 0 in values else 0.0
    if kind == MULTI and has_vectors and -1 in values:
        meaning = "unknown, left out of the loss" if 0 in values else "no"
        logger.info("-1 in the columns of labels stands for: %s", meaning)
    if len(columns) > 1:
        names = list(columns)
    elif has_vectors:
        names = [f"{columns[0]} {number}" if kind == REGRESSION else str(number) for number in range(length)]
    elif kind == REGRESSION:
        names = [columns[0]]
    else:
        each = (name for cell in cells if cell is not None for name in (cell if isinstance(cell, list) else [cell]))
        names = in_order({text_of(name) for name in each})
    return Problem(kind, tuple(names), tuple(columns), separator, has_vectors, minus_one)


def say_alike(names: Sequence[str]) -> None:
    """Names in the log labels that differ in nothing but case or spaces, or look like cells that are missing."""
    missing = [name for name in names if name.strip().lower() in MISSING_WORDS]
    if missing:
        logger.warning(
            "labels that look like missing ones, each is learned as a label: %s; empty the cell", some(missing)
        )
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault("".join(name.casefold().replace("_", " ").split()), []).append(name)
    alike = [group for group in groups.values() if len(group) > 1]
    if alike:
        shown = some([" and ".join(map(repr, group)) for group in alike])
        logger.warning("labels that differ only in case or spaces, each is learned as its own: %s", shown)
