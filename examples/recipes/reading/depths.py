"""Layouts of pictures with depth -> rows of IMAGE and DEPTH (a path, a cell, or a place in an HDF5 file) and ROW."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from datasets import DatasetDict

from recipes.arguments import DataArguments
from recipes.reading import depth_benchmarks, stored
from recipes.reading.depth_files import DEPTH_SUFFIXES, Scale
from recipes.reading.depth_pairs import DEPTH, by_split, joined
from recipes.reading.layouts import HAS_TABLE, Layout, Sign
from recipes.reading.place import Place
from recipes.reading.tables import (
    IMAGE,
    IMAGE_COLUMNS,
    PathColumn,
    column_of,
    read_tables,
    records,
    tables_of,
)
from vit_embed.retrieval.pictures import PICTURE_SUFFIXES

logger = logging.getLogger(__name__)

DEPTH_COLUMNS = ("depth", "depth_map", "depth_path", "depths", "depth_file", "depth_image", "depth_file_name")
HEADERLESS = (IMAGE, DEPTH)
IMAGE_FOLDERS = ("images", "rgb", "image", "color", "img", "imgs", "rgbs", "colors", "colour", "rgb_images")
DEPTH_FOLDERS = ("depths", "depth", "depth_map", "depth_maps", "depthmap", "depthmaps", "depth_images", "gt_depth")
# Words in the names of files of a pair that say which of both each is.
IMAGE_WORDS, DEPTH_WORDS = {*IMAGE_FOLDERS, "left"}, {*DEPTH_FOLDERS}
PAIR_WORDS = {*IMAGE_WORDS, *DEPTH_WORDS, "sync"}
MASK_WORDS = {"mask", "valid", "confidence"}
DISPARITY = re.compile(r"disp\d*(gt)?|disparity|disparities", re.IGNORECASE)
NUM_SNIFFED = 64
MILLIMETRES = Scale(1000.0, 1000.0, "millimetres, as neither the layout nor --depth_scale says otherwise")


def words_of(name: str) -> list[str]:
    return [word for word in re.split(r"[_.\- ]", name.lower()) if word]


# --- folders of pictures and of depths ---


def files_in(place: Place, names: tuple[str, ...], suffixes: tuple[str, ...]) -> dict[str, list[str]]:
    """{folder with one of these names: the files below it}; what lies in a folder of the other kind is of that."""
    found: dict[str, list[str]] = {}
    for file in place.with_suffix(*suffixes):
        parents = PurePosixPath(file).parent.parts
        kinds = [n for n, part in enumerate(parents) if part.lower() in (*IMAGE_FOLDERS, *DEPTH_FOLDERS)]
        if kinds and parents[kinds[-1]].lower() in names:
            found.setdefault("/".join(parents[: kinds[-1] + 1]), []).append(file)
    return found


def folders_above(folders: dict[str, list[str]]) -> set[str]:
    return {folder.rpartition("/")[0] for folder in folders}


def keys_of(folders: dict[str, list[str]], drop: set[str]) -> dict[str, list[str]]:
    """{path of a file without the folder that tells its kind, its suffix, and words of its name in `drop`: files}."""
    keys: dict[str, list[str]] = {}
    for folder, files in folders.items():
        above = folder.rpartition("/")[0]
        for file in files:
            path = PurePosixPath(f"{above}/{file.removeprefix(folder + '/')}".lstrip("/")).with_suffix("")
            name = "_".join(word for word in words_of(path.name) if word not in drop) if drop else path.name
            keys.setdefault(str(path.with_name(name or path.name)), []).append(file)
    return keys


def read_folder_pairs(place: Place, arguments: DataArguments) -> DatasetDict:
    images = files_in(place, IMAGE_FOLDERS, PICTURE_SUFFIXES)
    depths = files_in(place, DEPTH_FOLDERS, DEPTH_SUFFIXES)
    pairs = keys_of(images, set()), keys_of(depths, set())
    if not {*pairs[0]} & {*pairs[1]}:  # rgb_1.png in one folder, depth_1.png in the other
        pairs = keys_of(images, PAIR_WORDS), keys_of(depths, PAIR_WORDS)
    return by_split(place, joined(*pairs), arguments)


# --- pictures and depths in one folder ---


def beside(place: Place) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Pictures and depths by folder and name without the words that say which is which."""
    images: dict[str, list[str]] = {}
    depths: dict[str, list[str]] = {}
    for file in place.with_suffix(*PICTURE_SUFFIXES, *DEPTH_SUFFIXES):
        path = PurePosixPath(file)
        words = words_of(path.stem)
        if not MASK_WORDS & {*words}:
            kind = depths if DEPTH_WORDS & {*words} else images
            name = "_".join(word for word in words if word not in PAIR_WORDS)
            if kind is depths or file.lower().endswith(PICTURE_SUFFIXES):
                kind.setdefault(str(path.with_name(name or path.stem)), []).append(file)
    return images, depths


def has_pairs_beside(place: Place, arguments: DataArguments) -> bool:
    images, depths = beside(place)
    return bool({*images} & {*depths})


def read_beside(place: Place, arguments: DataArguments) -> DatasetDict:
    masks = [file for file in place.files if MASK_WORDS & {*words_of(PurePosixPath(file).stem)}]
    if masks:
        logger.warning(
            "%d masks are not read (%s): write 0 to the depths where nothing was measured", len(masks), masks[0]
        )
    return by_split(place, joined(*beside(place)), arguments)


# --- patterns ---


def glob_regex(pattern: str) -> re.Pattern:
    """A pattern of files -> a regular expression whose groups are what the wildcards match."""
    parts = {"**/": r"(?:(.*)/)?", "**": "(.*)", "*": "([^/]*)", "?": "([^/])"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    sets = {piece: f"({piece.replace('[!', '[^')})" for piece in pieces if piece.startswith("[") and len(piece) > 1}
    return re.compile("".join({**parts, **sets}.get(piece, re.escape(piece)) for piece in pieces))


def globbed(place: Place, flag: str, pattern: str) -> dict[str, list[str]]:
    """{what the wildcards match, joined by slashes: files}.

    Raises:
        ValueError: no wildcard, or no file matches.
    """
    inside = pattern.removeprefix(f"{place.name.rstrip('/')}/").removeprefix("./")
    regex = glob_regex(inside)
    found: dict[str, list[str]] = {}
    for file in place.files:
        if match := regex.fullmatch(file):
            found.setdefault("/".join(group or "" for group in match.groups()), []).append(file)
    if not found or not regex.groups:
        some = ", ".join(place.files[:3]) or "none"
        raise ValueError(
            f"expected {flag} with wildcards that match files in {place.name}, got {pattern!r}, which matches "
            f"{len(found)} and has {regex.groups} wildcards; its files are {some}, ..."
        )
    return found


def read_globs(place: Place, arguments: DataArguments) -> DatasetDict:
    images = globbed(place, "--image_glob", arguments.image_glob)
    depths = globbed(place, "--depth_glob", arguments.depth_glob)
    if not {*images} & {*depths}:
        (image, first), (depth, second) = next(iter(images.items())), next(iter(depths.items()))
        raise ValueError(
            f"expected wildcards of --image_glob {arguments.image_glob!r} and --depth_glob {arguments.depth_glob!r} "
            f"that match the same in both files of a pair, got {image!r} of {first[0]} and {depth!r} of {second[0]}"
        )
    return by_split(place, joined(images, depths), arguments)


# --- tables ---


def depth_tables(place: Place, arguments: DataArguments) -> list[str]:
    """The tables with a column of pictures and one of depths, in which the first rows name files of depth."""
    tables = tables_of(place, arguments, arguments.depth_column, DEPTH_COLUMNS, HEADERLESS)
    return [table for table in tables if first_depths(place, table, arguments)]


def first_depths(place: Place, table: str, arguments: DataArguments) -> list[str]:
    """The cells of depth in the first rows that have the suffix of one; without it they are of another column."""
    rows = itertools.islice(records(Path(place.full(table)), arguments, HEADERLESS), NUM_SNIFFED)
    cells = [row.cells for row in rows]
    image = column_of([*cells[0]], arguments.image_column, IMAGE_COLUMNS)
    column = column_of([name for name in cells[0] if name != image], arguments.depth_column, DEPTH_COLUMNS)
    return [cell for row in cells if isinstance(cell := row.get(column), str) and cell.lower().endswith(DEPTH_SUFFIXES)]


def read_depth_tables(place: Place, arguments: DataArguments) -> DatasetDict:
    also = PathColumn(
        arguments.depth_column, DEPTH_COLUMNS, DEPTH_SUFFIXES, arguments.depth_folder, DEPTH_FOLDERS, IMAGE_FOLDERS
    )
    return read_tables(place, depth_tables(place, arguments), arguments, HEADERLESS, also)


def lists_kitti(place: Place, arguments: DataArguments) -> bool:
    cells = [cell for table in depth_tables(place, arguments) for cell in first_depths(place, table, arguments)]
    return any("proj_depth/groundtruth" in cell.replace("\\", "/") for cell in cells)


def kaggle_tables(place: Place, arguments: DataArguments) -> list[str]:
    return [t for t in depth_tables(place, arguments) if PurePosixPath(t).name in ("nyu2_train.csv", "nyu2_test.csv")]


VIRTUAL_KITTI = re.compile(r"(.*/)?frames/depth/Camera_\d+/depth_\d+\.png")


# --- disparity ---


def is_disparity(path: str) -> bool:
    """Whether a word in the names of a file and its folders speaks of disparity."""
    parts = PurePosixPath(path).with_suffix("").parts
    return any(DISPARITY.fullmatch(word) for part in parts for word in words_of(part))


def disparities(place: Place) -> list[str]:
    return [file for file in place.with_suffix(*DEPTH_SUFFIXES) if is_disparity(file)]


def refuse_disparity(paths: Iterable[str]) -> None:
    """ValueError for a path that speaks of disparity."""
    named = next(filter(is_disparity, paths), None)
    if named is not None:
        raise ValueError(
            f"expected depth, got disparity by the name of {named}; write focal length * baseline / disparity (pixels, "
            "metres, pixels) as .npy to a folder named depths, or rename it, if it is depth"
        )


def read_disparity(place: Place, arguments: DataArguments) -> DatasetDict:
    refuse_disparity(disparities(place))
    return DatasetDict()


# --- the table ---

TABLE_OF_DEPTHS = (
    HAS_TABLE,
    Sign(
        "a table with a column of pictures and one of files of depth (--image_column, --depth_column)",
        lambda place, arguments: bool(depth_tables(place, arguments)),
    ),
)

LAYOUTS = (
    Layout(
        "patterns",
        "--image_glob 'scans/*/left/*.jpg' --depth_glob 'scans/*/metres/*.png', paired by what the wildcards match",
        (Sign("--image_glob and --depth_glob", lambda place, arguments: bool(arguments.image_glob)),),
        read_globs,
    ),
    stored.SAVED,
    stored.PARQUET,
    *depth_benchmarks.LAYOUTS,
    Layout(
        "NYU Depth v2 of Kaggle",
        "data/nyu2_train.csv and data/nyu2_test.csv, of data/nyu2_train/SCENE/1.jpg,data/nyu2_train/SCENE/1.png",
        (
            Sign(
                "nyu2_train.csv or nyu2_test.csv of paths",
                lambda place, arguments: bool(kaggle_tables(place, arguments)),
            ),
        ),
        read_depth_tables,
        has_user_columns=True,
        scale=Scale(1000.0, 25.5, "Kaggle's NYU: 8 bits up to 10 m, 16 bits of millimetres"),
    ),
    Layout(
        "list of KITTI",
        "a list of DATE/DRIVE/image_02/data/1.png DRIVE/proj_depth/groundtruth/image_02/1.png a row, as of BTS",
        (*TABLE_OF_DEPTHS, Sign("proj_depth/groundtruth in its paths", lists_kitti)),
        read_depth_tables,
        has_user_columns=True,
        scale=depth_benchmarks.KITTI_SCALE,
    ),
    Layout(
        "table of depths",
        "train.csv and validation.csv (or .tsv, .txt, .jsonl, .json): the path of a picture and of its depth a row",
        TABLE_OF_DEPTHS,
        read_depth_tables,
        has_user_columns=True,
    ),
    Layout(
        "Virtual KITTI 2",
        "SCENE/.../frames/rgb/Camera_0/rgb_1.jpg and SCENE/.../frames/depth/Camera_0/depth_1.png",
        (
            Sign(
                "frames/depth/Camera_0/depth_1.png",
                lambda place, arguments: any(map(VIRTUAL_KITTI.fullmatch, place.with_suffix(".png"))),
            ),
        ),
        read_folder_pairs,
        scale=Scale(100.0, 100.0, "Virtual KITTI's, centimetres"),
    ),
    Layout(
        "folders of pictures and depths",
        "images/NAME.jpg and depths/NAME.png (or rgb/ and depth/, ...), in scenes, in splits or without",
        (
            Sign(
                f"a folder {' or '.join(IMAGE_FOLDERS[:4])} of pictures",
                lambda place, arguments: bool(files_in(place, IMAGE_FOLDERS, PICTURE_SUFFIXES)),
            ),
            Sign(
                f"a folder {' or '.join(DEPTH_FOLDERS[:2])} beside it",
                lambda place, arguments: bool(
                    folders_above(files_in(place, IMAGE_FOLDERS, PICTURE_SUFFIXES))
                    & folders_above(files_in(place, DEPTH_FOLDERS, DEPTH_SUFFIXES))
                ),
            ),
        ),
        read_folder_pairs,
    ),
    Layout(
        "pictures beside their depths",
        "rgb_1.jpg and depth_1.png (or sync_depth_1.png, 1_color.png and 1_depth.npy) in one folder",
        (Sign("files named alike but for the words rgb, color and depth", has_pairs_beside),),
        read_beside,
    ),
    Layout(
        "disparity (refused)",
        "disparity/NAME.pfm, disp0.pfm: has to be made depth first",
        (Sign("files or folders named disparity", lambda place, arguments: bool(disparities(place))),),
        read_disparity,
    ),
    stored.HUB,
)
