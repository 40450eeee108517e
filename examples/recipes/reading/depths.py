"""Layouts of pictures with depth -> rows of IMAGE and DEPTH (each a path or a cell) and ROW."""

from __future__ import annotations

from pathlib import PurePosixPath

from datasets import Dataset, DatasetDict

from recipes.arguments import DataArguments
from recipes.reading import stored
from recipes.reading.layouts import Layout, Sign
from recipes.reading.place import Place, split_of_word
from recipes.reading.tables import IMAGE, ROW
from vit_embed.retrieval.pictures import PICTURE_SUFFIXES

DEPTH = "depth"
DEPTH_COLUMNS = ("depth", "depth_map", "depth_path", "depths")
DEPTH_SUFFIXES = (".png", ".tif", ".tiff", ".npy")
IMAGE_FOLDERS, DEPTH_FOLDERS = ("images", "rgb", "image", "color"), ("depths", "depth")


def folders_of(place: Place, names: tuple[str, ...]) -> dict[str, str]:
    """{"" or the folder of a split: the folder of these names in it}."""
    return {
        str(path.parent).replace(".", "", 1) if str(path.parent) == "." else str(path.parent): str(path)
        for path in map(PurePosixPath, sorted(place.folders))
        if path.name.lower() in names and len(path.parts) <= 2
    }


def files_by_name(place: Place, folder: str, suffixes: tuple[str, ...]) -> dict[str, str]:
    """The files below `folder` with one of these suffixes, by their path in it without the suffix."""
    found = {}
    for file in place.with_suffix(*suffixes):
        if file.startswith(f"{folder}/"):
            name = str(PurePosixPath(file.removeprefix(f"{folder}/")).with_suffix(""))
            if name in found:
                raise ValueError(f"expected one file of the name {name!r} in {folder}, found {found[name]} and {file}")
            found[name] = file
    return found


def paired(place: Place, images: dict[str, str], depths: dict[str, str]) -> Dataset:
    """A row for each name of either side: the name (ROW), both paths, None for a missing one."""
    names = sorted({*images, *depths})
    paths = {
        column: [place.full(files[name]) if name in files else None for name in names]
        for column, files in ((IMAGE, images), (DEPTH, depths))
    }
    return Dataset.from_dict({ROW: names, **paths})


def read_folder_pairs(place: Place, arguments: DataArguments) -> DatasetDict:
    images, depths = folders_of(place, IMAGE_FOLDERS), folders_of(place, DEPTH_FOLDERS)
    known = {**split_of_word(arguments), "": arguments.train_split}
    return DatasetDict(
        {
            known.get(start.lower(), start): paired(
                place,
                files_by_name(place, images[start], PICTURE_SUFFIXES),
                files_by_name(place, depths[start], DEPTH_SUFFIXES),
            )
            for start in images
            if start in depths
        }
    )


LAYOUTS = (
    stored.SAVED,
    stored.PARQUET,
    Layout(
        "folders of pictures and depths",
        "images/NAME.jpg and depths/NAME.png (or rgb/ and depth/), in train/ and validation/ or without splits",
        (
            Sign(
                f"a folder {' or '.join(IMAGE_FOLDERS)}",
                lambda place, arguments: bool(folders_of(place, IMAGE_FOLDERS)),
            ),
            Sign(
                f"a folder {' or '.join(DEPTH_FOLDERS)} beside it",
                lambda place, arguments: bool(
                    {*folders_of(place, IMAGE_FOLDERS)} & {*folders_of(place, DEPTH_FOLDERS)}
                ),
            ),
        ),
        read_folder_pairs,
    ),
    stored.HUB,
)
