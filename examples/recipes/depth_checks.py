"""What is wrong with pictures and their depths, found and named before the first step."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from datasets import Image as ImageFeature

from recipes.data import Finding, Report, check_rows, require_columns
from recipes.reading.depth_files import DEPTH_SCALE, Scale, Unusable, open_depth, open_picture, read_depth
from recipes.reading.depth_pairs import DEPTH
from recipes.reading.tables import IMAGE
from vit_embed.retrieval.pictures import UNREADABLE, read_rgb

logger = logging.getLogger(__name__)

# Medians in metres outside of which a depth map is more likely in another unit than of such a place.
PLAUSIBLE_MEDIAN = (0.2, 200.0)
# Metres that 8 bits must reach to be taken for depth and not for a picture of depth.
LEAST_REACH_OF_8_BITS = 1.0
LARGEST_RATIO_ERROR = 0.01  # of height to width, between a picture and its depth
LARGEST_SHARE_BEYOND = 0.5  # of the measured pixels, farther than --max_depth
LARGEST_RATIO_OF_MEDIANS = 5.0  # between splits
# In most pictures the ground is nearest at the bottom. From so many maps on, and with so large a correlation of depth
# and row in the mean, and of that sign in so large a share of the maps, it is the other way round.
LEAST_TILTED, LEAST_TILT, LEAST_SHARE_TILTED = 8, 0.3, 0.8
TILT_SIDE = 64  # pixels of a side that are looked at
IMPLAUSIBLE = "a median depth outside {:g} to {:g} m".format(*PLAUSIBLE_MEDIAN)
# What stored numbers of a map (those measured) may look like, in words that follow "depths", and whether they do. It is
# said where most maps of a split do, and at least LEAST_ODD.
LEAST_ODD, LEAST_SHARE_ODD = 3, 0.8
ODD: dict[str, Callable[[np.ndarray], bool]] = {
    "end at exactly 1, as normalised numbers do, which are not metres": lambda values: (
        values.dtype.kind == "f" and values.max() == 1
    ),
    "reach 65535, the largest of 16 bits: if it stands for not measured, --max_depth leaves it out": lambda values: (
        values.dtype == np.uint16 and values.max() == 65535
    ),
    "are multiples of 8, as the rotated bits of SUN RGB-D are": lambda values: divides(8, values),
    "are multiples of 257, as 8 bits stretched to 16 are": lambda values: divides(257, values),
}
WHOLE = "a depth of nothing but whole numbers of metres"


class Checked(NamedTuple):
    """The rows of a split that are of use, the (height, width) of every depth (None for several), the median metres."""

    rows: Dataset
    label_shape: tuple[int, int] | None
    median: float


def divides(divisor: int, values: np.ndarray) -> bool:
    return values.dtype.kind in "ui" and values.dtype.itemsize > 1 and not (values % divisor).any()


def tilt(depth: np.ndarray) -> float | None:
    """Correlation in [-1, 1] of log depth with the number of the row; None where all are the same."""
    depth = depth[:: max(1, depth.shape[0] // TILT_SIDE), :: max(1, depth.shape[1] // TILT_SIDE)]
    rows = np.nonzero(depth > 0)[0]
    values = np.log(depth[depth > 0].astype(np.float64))
    if len(rows) < 2 or np.ptp(rows) == 0 or np.ptp(values) < 1e-6:
        return None
    return float(np.corrcoef(rows, values)[0, 1])


def fault_of(error: Exception, what: str) -> Finding:
    if isinstance(error, Unusable):
        return Finding(str(error))
    is_missing = isinstance(error, FileNotFoundError)
    return Finding(f"a {what} whose file is missing" if is_missing else f"an unreadable {what}")


def depth_findings(depth: np.ndarray, stored: np.dtype, size: tuple[int, int], scale: Scale) -> Iterator[Finding]:
    """What is wrong with a depth (metres) beside its picture of `size` (height, width)."""
    if not depth.any():
        yield Finding("a depth without a valid pixel")
        return
    rows, columns = depth.shape
    if abs(math.log(size[0] * columns / (size[1] * rows))) > LARGEST_RATIO_ERROR:
        is_turned = abs(math.log(size[0] * rows / (size[1] * columns))) <= LARGEST_RATIO_ERROR
        yield Finding(f"a depth {'turned by 90 degrees against' if is_turned else 'of another shape than'} its picture")
        return
    if stored == np.uint8:
        divisor = scale.of(stored)
        reach = 255 / divisor
        if reach < LEAST_REACH_OF_8_BITS:
            yield Finding(f"a depth of 8 bits, at most {reach:.3g} m with --depth_scale {divisor:g}")
            return
        yield Finding("a depth of 8 bits, at most 255 distances", drop=False)
    measured = depth[depth > 0]
    low, high = PLAUSIBLE_MEDIAN
    if not low <= np.median(measured) <= high:
        yield Finding(IMPLAUSIBLE)
        return
    if (measured == np.round(measured)).all() and np.ptp(measured) > 0:
        yield Finding(WHOLE, drop=False)
    if (rows, columns) != size:
        yield Finding("a depth of another size than its picture, which is scaled to it", drop=False)


class Split:
    """What is counted while the rows of a split are checked."""

    def __init__(self, name: str, scale: Scale, max_depth: float | None) -> None:
        self.name, self.scale, self.max_depth = name, scale, max_depth
        self.kinds: Counter[str] = Counter()
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.medians: list[float] = []
        self.implausible: list[float] = []
        self.tilts: list[float] = []
        self.odd: Counter[str] = Counter()
        self.num_whole = self.num_measured = self.num_beyond = self.num_scaled = 0

    def examine(self, pair: dict) -> Iterator[Finding]:
        """What is wrong with a row, whose pictures are not decoded."""
        image, cell = pair[IMAGE], pair[DEPTH]
        if image is None or cell is None:
            yield Finding("a picture without a depth" if cell is None else "a depth without a picture")
            return
        try:
            picture, notes = read_rgb(open_picture(image))
        except UNREADABLE as error:
            yield fault_of(error, "picture")
            return
        for note in notes:
            yield Finding(note, drop=False, level=logging.INFO)
        try:
            stored = open_depth(cell)
        except UNREADABLE as error:
            yield fault_of(error, "depth")
            return
        depth = read_depth(stored, self.scale, None)
        findings = list(depth_findings(depth, stored.dtype, picture.size[::-1], self.scale))
        yield from findings
        if any(finding.reason == IMPLAUSIBLE for finding in findings):
            self.implausible.append(float(np.median(depth[depth > 0])))
        if any(finding.drop for finding in findings):
            return
        self.num_measured += np.count_nonzero(depth)
        if self.max_depth is not None:
            is_beyond = depth > self.max_depth
            self.num_beyond += np.count_nonzero(is_beyond)
            depth = np.where(is_beyond, np.float32(0), depth)
        if not depth.any():
            yield Finding(f"no valid pixel within --max_depth {self.max_depth:g}")
            return
        self.num_whole += any(finding.reason == WHOLE for finding in findings)
        self.num_scaled += stored.dtype.kind != "f"
        self.kinds[kind_of(stored.dtype, self.scale)] += 1
        self.sizes[depth.shape] += 1
        self.medians.append(float(np.median(depth[depth > 0])))
        self.tilts += [t for t in [tilt(depth)] if t is not None]
        values = stored[depth > 0]
        self.odd.update(words for words, is_odd in ODD.items() if is_odd(values))

    def advice(self, medians: list[float]) -> str:
        low, high = min(medians), max(medians)
        return (
            f"medians of {low:.3g} to {high:.3g} m; whole numbers are divided by {self.scale.whole:g} "
            f"({self.scale.source}) and floating point ones are metres: set --depth_scale to what one metre is in the "
            "files, or write metres"
        )

    def report(self, num_kept: int) -> float:
        """Says how the depths were read and what looks wrong with all of them; returns the median of their medians.

        Raises:
            ValueError: all depths are whole numbers of metres, or most of their pixels lie beyond --max_depth.
        """
        name, (low, middle, high) = self.name, np.percentile(self.medians, [0, 50, 100])
        for kind, count in self.kinds.items():
            logger.info("split %s: %d depths %s", name, count, kind)
        logger.info("split %s: median depths of %.3g to %.3g, mostly %.3g m", name, low, high, middle)
        if self.scale.source == DEPTH_SCALE and not self.num_scaled:
            logger.warning("split %s: %s changes nothing, it divides whole numbers alone", name, DEPTH_SCALE)
        if self.num_whole == num_kept:
            raise ValueError(
                f"expected depths in metres, all of split {name!r} are whole numbers of them, with "
                f"{self.advice(self.medians)}"
            )
        if self.implausible:
            logger.warning("split %s: what is left out as implausible has %s", name, self.advice(self.implausible))
        if self.num_beyond:
            share = self.num_beyond / self.num_measured
            beyond = f"{self.num_beyond} of {self.num_measured} measured pixels ({share:.1%}) lie beyond --max_depth"
            if share > LARGEST_SHARE_BEYOND:
                raise ValueError(
                    f"expected most depths of split {name!r} within --max_depth {self.max_depth:g}, {beyond}; raise "
                    "it, or set --depth_scale"
                )
            logger.warning("split %s: %s %g, and are not learned from", name, beyond, self.max_depth)
        for words, count in self.odd.items():
            if count >= max(LEAST_ODD, LEAST_SHARE_ODD * len(self.medians)):
                logger.warning("split %s: %d of %d depths %s", name, count, len(self.medians), words)
        tilts = np.array(self.tilts)
        if len(tilts) >= LEAST_TILTED and tilts.mean() > LEAST_TILT and (tilts > 0).mean() >= LEAST_SHARE_TILTED:
            logger.warning(
                "split %s: %d of %d depths grow towards the bottom of the picture (correlation %.2f), where things are "
                "mostly near: are they disparity, inverse depth, or upside down?",
                *(name, int((tilts > 0).sum()), len(tilts), tilts.mean()),
            )
        return float(middle)


def kind_of(stored: np.dtype, scale: Scale) -> str:
    if stored.kind == "f":
        return f"are floating point numbers of {8 * stored.itemsize} bits, which are metres"
    return f"are whole numbers of {8 * stored.itemsize} bits, divided by {scale.of(stored):g} ({scale.source})"


def check_pairs(
    dataset: Dataset, split: str, scale: Scale, max_depth: float | None, report: Report | None = None
) -> Checked:
    """Drop rows that are of no use and name them in the log.

    Raises:
        ValueError: no column of that name, no row of use, or depths that are in another unit or mostly too far.
    """
    require_columns(dataset, split, {"--image_column": IMAGE, "--depth_column": DEPTH})
    undecoded = dataset  # a row whose picture is damaged still gives its cells
    for column in (IMAGE, DEPTH):
        if isinstance(dataset.features[column], ImageFeature):
            undecoded = undecoded.cast_column(column, ImageFeature(decode=False))
    found = Split(split, scale, max_depth)
    try:
        rows = check_rows(dataset, split, lambda row: found.examine(undecoded[row]), report)
    except ValueError as error:
        if found.implausible:
            raise ValueError(f"{error}: {found.advice(found.implausible)}") from error
        raise
    median = found.report(len(rows))
    return Checked(rows, next(iter(found.sizes)) if len(found.sizes) == 1 else None, median)


def compare_splits(medians: dict[str, float]) -> None:
    """Says where the depths of two splits are so far apart that one is more likely in another unit."""
    if len(medians) > 1 and max(medians.values()) > LARGEST_RATIO_OF_MEDIANS * min(medians.values()):
        found = ", ".join(f"{median:.3g} m in split {split!r}" for split, median in medians.items())
        logger.warning("median depths are far apart, so one split may be in another unit (--depth_scale): %s", found)
