"""Layouts of depth data sets that many people have as they were published: NYU Depth v2, KITTI, TUM RGB-D."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from datasets import DatasetDict

from recipes.arguments import DataArguments
from recipes.reading.depth_files import HDF5_SUFFIXES, Scale, hdf5_cell, hdf5_shapes, is_hdf5
from recipes.reading.depth_pairs import NUM_NAMED, Pair, by_split, joined, split_of_path, splits_of_pairs
from recipes.reading.layouts import Layout, Sign
from recipes.reading.place import Place, split_of_name, split_of_word
from vit_embed.retrieval.pictures import PICTURE_SUFFIXES

logger = logging.getLogger(__name__)

KITTI_SCALE = Scale(256.0, 256.0, "KITTI's")
NUM_OPENED = 8  # HDF5 files that are opened to tell a layout
FARTHEST_IN_TIME = 0.02  # seconds between a picture of TUM RGB-D and its depth, as in its own script

# --- NYU Depth v2: all pictures in a file, or one a file ---


def shapes_of(place: Place) -> dict[str, dict[str, tuple[int, ...]]]:
    """{file: the shapes of its arrays} of the first HDF5 files.

    Raises:
        ValueError: none of them can be read, as after a download that broke off.
    """
    if "hdf5_shapes" not in vars(place):
        files = place.with_suffix(*HDF5_SUFFIXES)[:NUM_OPENED]
        found = vars(place)["hdf5_shapes"] = {file: hdf5_shapes(place.full(file)) for file in files}
        if not any(found.values()) and (torn := [file for file in files if is_hdf5(place.full(file))]):
            raise ValueError(f"expected HDF5 in {place.full(torn[0])}, it is damaged or breaks off; get it again")
    return vars(place)["hdf5_shapes"]


def is_stack(shapes: dict[str, tuple[int, ...]]) -> bool:
    return len(shapes.get("images", ())) == 4 and len(shapes.get("depths", ())) == 3


def axes_of_stack(file: str, shapes: dict[str, tuple[int, ...]]) -> tuple[str, str]:
    """The axes of a picture and a depth: MATLAB reverses them; of others the longer side is taken for the width.

    Raises:
        ValueError: the arrays do not belong together, or their sides are alike.
    """
    images, depths = shapes["images"], shapes["depths"]
    first, second = depths[1:]
    if images == (depths[0], 3, first, second) and (file.lower().endswith(".mat") or first > second):
        return "CWH", "WH"
    if first < second and images in ((depths[0], 3, first, second), (depths[0], first, second, 3)):
        return ("CHW" if images[1] == 3 else "HWC"), "HW"
    raise ValueError(
        f"expected images (N, 3, W, H) and depths (N, W, H) as MATLAB writes them, or (N, 3, H, W) and (N, H, W) wider "
        f"than high, in {file}, got {images} and {depths}; write an .h5 file a picture, rgb (3, H, W) and depth (H, W)"
    )


def numbers_of_splits(file: Path, arguments: DataArguments) -> dict[str, list[int]]:
    """{split: rows} of splits.mat beside the labelled file, which counts from 1; empty without it."""
    beside = file.with_name("splits.mat")
    if not beside.is_file():
        return {}
    from scipy.io import loadmat  # here: 0.2 s that other data sets need not wait for

    arrays, known = loadmat(beside), split_of_word(arguments)
    return {known[word]: [int(n) - 1 for n in arrays[f"{word}Ndxs"].ravel()] for word in ("train", "test")}


def read_stacks(place: Place, arguments: DataArguments) -> DatasetDict:
    pairs: dict[str, list[Pair]] = {}
    files = [file for file in place.with_suffix(*HDF5_SUFFIXES) if PurePosixPath(file).name != "splits.mat"]
    for file in files:
        path, shapes = place.full(file), hdf5_shapes(place.full(file))
        if not is_stack(shapes):
            logger.warning("%s is left out: it is damaged, or has no images and depths", path)
            continue
        image_axes, depth_axes = axes_of_stack(file, shapes)
        logger.info(
            "%s: images are read as (N, %s), depths as (N, %s)", path, *map(", ".join, (image_axes, depth_axes))
        )
        numbers = numbers_of_splits(Path(path), arguments) if len(files) == 1 else {}
        own = split_of_path(file, arguments) or split_of_name(PurePosixPath(file).stem, arguments)
        for split, rows in (numbers or {own or arguments.train_split: range(shapes["depths"][0])}).items():
            for n in rows:
                image, depth = hdf5_cell(path, "images", image_axes, n), hdf5_cell(path, "depths", depth_axes, n)
                pairs.setdefault(split, []).append(Pair(f"{file}[{n}]", image, depth))
    return splits_of_pairs(pairs)


def has_singles(place: Place, arguments: DataArguments) -> bool:
    return any(len(s.get("rgb", ())) == 3 and len(s.get("depth", ())) == 2 for s in shapes_of(place).values())


def read_singles(place: Place, arguments: DataArguments) -> DatasetDict:
    pairs = []
    for file in place.with_suffix(".h5", ".hdf5"):
        path = place.full(file)
        pairs.append(Pair(file, hdf5_cell(path, "rgb", "CHW"), hdf5_cell(path, "depth", "HW")))
    return by_split(place, pairs, arguments)


# --- KITTI ---

KITTI_DEPTH = re.compile(r"(?:(.*)/)?([^/]+)/proj_depth/groundtruth/(image_0[23])/(\d+)\.png")
KITTI_PICTURE = re.compile(r"(?:.*/)?([^/]+)/(image_0[23])/data/(\d+)\.(?:png|jpg|jpeg)")
SELECTION = "val_selection_cropped"
SELECTED = re.compile(rf"(?:.*/)?{SELECTION}/(image|groundtruth_depth)/(.+)\.png")


def kitti_depths(place: Place) -> list[re.Match]:
    return [m for file in place.with_suffix(".png") if (m := KITTI_DEPTH.fullmatch(file))]


def kitti_pictures(place: Place, arguments: DataArguments) -> dict[tuple[str, ...], str]:
    """{(drive, camera, number): path}, below --dataset and --image_folder."""
    places = [place, *([Place(arguments.image_folder)] if arguments.image_folder else [])]
    found = ((p, file, KITTI_PICTURE.fullmatch(file)) for p in places for file in p.pictures)
    return {match.groups(): p.full(file) for p, file, match in found if match}


def selected(place: Place) -> list[Pair]:
    """The pairs of depth_selection/val_selection_cropped."""
    files: dict[str, dict[str, str]] = {"image": {}, "groundtruth_depth": {}}
    for file in place.with_suffix(".png"):
        if match := SELECTED.fullmatch(file):
            files[match[1]][match[2].replace("_groundtruth_depth_", "_image_")] = file
    return [
        pair._replace(image=pair.image and place.full(pair.image), depth=pair.depth and place.full(pair.depth))
        for pair in joined(*({name: [file] for name, file in found.items()} for found in files.values()))
    ]


def read_kitti(place: Place, arguments: DataArguments) -> DatasetDict:
    """A row a depth; KITTI has none for the first and the last five pictures of a drive."""
    pictures, pairs = kitti_pictures(place, arguments), {}
    for match in kitti_depths(place):
        _, drive, camera, number = match.groups()
        split = split_of_path(match[0], arguments) or arguments.train_split
        picture = pictures.get((drive, camera, number))
        pairs.setdefault(split, []).append(Pair(match[0], picture, place.full(match[0])))
    used = {pair.image for found in pairs.values() for pair in found}
    drives = {match[2] for match in kitti_depths(place)}
    unused = [path for (drive, _, _), path in pictures.items() if drive in drives and path not in used]
    if unused:
        logger.info("%d pictures have no depth and are left out: %s", len(unused), ", ".join(unused[:NUM_NAMED]))
    if chosen := selected(place):
        validation = arguments.validation_splits[0]
        own = SELECTION if validation in pairs else validation
        logger.info("%s is split %r", SELECTION, own)
        pairs[own] = chosen
    return splits_of_pairs(pairs)


# --- TUM RGB-D ---

ASSOCIATIONS = ("associations.txt", "association.txt", "associate.txt", "associated.txt", "assoc.txt")


def lines_of(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(number, cells) of the lines that are no comment."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.strip() and not line.startswith("#"):
                yield number, line.split()


def is_association(path: Path) -> bool:
    _, first = next(lines_of(path), (0, []))
    return len(first) == 4 and all(name.lower().endswith(PICTURE_SUFFIXES) for name in first[1::2])


def sequences_of(place: Place) -> dict[str, str | None]:
    """{folder of a sequence: its file of associations, None for one of rgb.txt and depth.txt alone}."""
    names: dict[str, dict[str, str]] = {}
    for file in place.with_suffix(".txt"):
        path = PurePosixPath(file)
        if path.name in (*ASSOCIATIONS, "rgb.txt", "depth.txt"):
            names.setdefault(str(path.parent), {})[path.name] = file
    found = {}
    for folder, files in names.items():
        association = next((files[name] for name in ASSOCIATIONS if name in files), None)
        if association is not None and is_association(Path(place.full(association))):
            found[folder] = association
        elif {"rgb.txt", "depth.txt"} <= set(files):
            found[folder] = None
    return found


def associated(path: Path) -> list[tuple[str, str]]:
    """(picture, depth) of every line of time, file, time, file; which is which their folders tell.

    Raises:
        ValueError: a line has other cells, or neither file lies in a folder named depth.
    """
    pairs = []
    for number, cells in lines_of(path):
        depths = [n for n in (1, 3) if len(cells) == 4 and "depth" in cells[n].lower()]
        if len(depths) != 1:
            raise ValueError(
                f"expected TIME rgb/FILE TIME depth/FILE in {path}, got {' '.join(cells)!r} in line {number}, in which "
                "one file has to lie in a folder named depth"
            )
        pairs.append((cells[4 - depths[0]], cells[depths[0]]))
    return pairs


def timed(path: Path) -> list[tuple[float, str]]:
    """(time, file) in order of time.

    Raises:
        ValueError: a line is something else.
    """
    files = []
    for number, cells in lines_of(path):
        try:
            files.append((float(cells[0]), cells[1]))
        except (ValueError, IndexError) as error:
            raise ValueError(f"expected TIME FILE in {path}, got {' '.join(cells)!r} in line {number}") from error
    return sorted(files)


def nearest_in_time(rgb: Path, depth: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Pairs of one picture and one depth, those nearest in time first; and pictures without one."""
    images, depths = timed(rgb), timed(depth)
    times = np.array([time for time, _ in depths])
    near = []
    for number, (time, _) in enumerate(images):
        first, last = np.searchsorted(times, [time - FARTHEST_IN_TIME, time + FARTHEST_IN_TIME])
        near += [(abs(times[other] - time), number, int(other)) for other in range(first, last)]
    partner, taken = {}, set()
    for _, number, other in sorted(near):
        if number not in partner and other not in taken:
            partner[number] = other
            taken.add(other)
    pairs = [(images[number][1], depths[partner[number]][1]) for number in sorted(partner)]
    return pairs, [name for number, (_, name) in enumerate(images) if number not in partner]


def read_tum(place: Place, arguments: DataArguments) -> DatasetDict:
    pairs = []
    for folder, association in sequences_of(place).items():
        start = "" if folder == "." else f"{folder}/"
        alone: list[str] = []
        if association is not None:
            found = associated(Path(place.full(association)))
        else:
            found, alone = nearest_in_time(Path(place.full(f"{start}rgb.txt")), Path(place.full(f"{start}depth.txt")))
        logger.info("%s: %d pairs of %s", folder, len(found), association or "rgb.txt and depth.txt, by nearest time")
        if alone:
            some = ", ".join(alone[:NUM_NAMED])
            logger.info("%s: %d pictures have no depth within %g s: %s", folder, len(alone), FARTHEST_IN_TIME, some)
        pairs += [Pair(start + image, start + image, start + depth) for image, depth in found]
    return by_split(place, pairs, arguments)


# --- the table ---

LAYOUTS = (
    Layout(
        "NYU Depth v2, labelled",
        "nyu_depth_v2_labeled.mat (v7.3) or an .h5 file of images and depths; splits.mat beside it",
        (
            Sign(
                "a .mat (v7.3) or .h5 file of images (N, 3, W, H) and depths (N, W, H)",
                lambda place, arguments: any(map(is_stack, shapes_of(place).values())),
            ),
        ),
        read_stacks,
    ),
    Layout(
        "one .h5 file a picture",
        "train/SCENE/1.h5 and val/SCENE/1.h5 of rgb (3, H, W) and depth (H, W), as FastDepth's NYU",
        (Sign(".h5 files of rgb (3, H, W) and depth (H, W)", has_singles),),
        read_singles,
    ),
    Layout(
        "KITTI",
        "train/DRIVE/proj_depth/groundtruth/image_02/1.png, DATE/DRIVE/image_02/data/1.png beside or in --image_folder",
        (
            Sign(
                "depths in proj_depth/groundtruth, or val_selection_cropped",
                lambda place, arguments: bool(kitti_depths(place) or selected(place)),
            ),
            Sign(
                "pictures in DRIVE/image_02/data below --dataset or --image_folder",
                lambda place, arguments: bool(kitti_pictures(place, arguments) or selected(place)),
            ),
        ),
        read_kitti,
        scale=KITTI_SCALE,
    ),
    Layout(
        "TUM RGB-D",
        "rgb/, depth/ and associations.txt (TIME rgb/1.png TIME depth/1.png), or rgb.txt and depth.txt, a sequence",
        (Sign("associations.txt, or rgb.txt and depth.txt", lambda place, arguments: bool(sequences_of(place))),),
        read_tum,
        scale=Scale(5000.0, 5000.0, "TUM RGB-D's"),
    ),
)
