"""Files of depth by suffix -> what is stored, one number a pixel; metres of it; and pictures inside HDF5 files."""

from __future__ import annotations

import importlib
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path, PurePath
from types import ModuleType
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from vit_embed.retrieval.pictures import Source

HDF5_SUFFIXES = (".h5", ".hdf5", ".mat")
# The library for files that neither NumPy nor Pillow reads.
LIBRARIES = {".exr": "OpenEXR", **dict.fromkeys(HDF5_SUFFIXES, "h5py")}
# What NumPy, h5py and OpenEXR raise for a damaged file beside pictures.UNREADABLE.
DAMAGED = (EOFError, KeyError, RuntimeError, TypeError, MemoryError, OverflowError, struct.error, zlib.error)
DAMAGED += (zipfile.BadZipFile, NotImplementedError)
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
PFM_HEADER = re.compile(rb"(PF|Pf)\s+(\d+)\s+(\d+)\s+([-+.\deE]+)\r?\n")
DEPTH_SCALE = "--depth_scale"  # as the source of a scale
DEPTH_ARRAYS = ("depth", "depths", "depth_map", "z", "depth.z", "depth.v")


class Unusable(ValueError):
    """A depth that is none; the text continues "rows with" and is the same for all files with this fault."""


class Scale(NamedTuple):
    """What whole numbers are divided by to be metres: those of 16 bits and more, those of 8; and who says so."""

    whole: float
    of_8_bits: float
    source: str

    def of(self, dtype: np.dtype) -> float:
        return self.of_8_bits if dtype.itemsize == 1 else self.whole


def library(name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"expected the library {name} for {what}, it is not installed; pip install {name}") from error


def require_libraries(files: Iterable[str]) -> None:
    """ValueError where the library for one of these files is missing."""
    for suffix in sorted({PurePath(file).suffix.lower() for file in files} & set(LIBRARIES)):
        library(LIBRARIES[suffix], f"files of the suffix {suffix}")


# --- HDF5 ---


def hdf5_cell(file: str, array: str, axes: str, index: int | None = None) -> dict[str, object]:
    """The cell of a row that stands for an array of an HDF5 file, or one entry of it, whose axes are those of `axes`
    (H, W, C)."""
    return {"file": file, "array": array, "axes": axes, "index": index}


def hdf5_shapes(file: str) -> dict[str, tuple[int, ...]]:
    """{name of an array of numbers at the top: its shape}; empty for a file that is no HDF5."""
    h5py = library("h5py", file)
    try:
        with h5py.File(file) as arrays:
            found = {name: arrays[name] for name in arrays}
            return {name: array.shape for name, array in found.items() if isinstance(array, h5py.Dataset)}
    except (OSError, *DAMAGED):
        return {}


def is_hdf5(file: str) -> bool:
    """By its first bytes, which MATLAB puts behind 512 of its own; a file that breaks off is one, too."""
    with Path(file).open("rb") as stored:
        first = stored.read(520)
    return HDF5_SIGNATURE in (first[:8], first[512:])


def read_hdf5(file: str, array: str | None = None, index: int | None = None) -> np.ndarray:
    h5py = library("h5py", file)
    with h5py.File(file) as arrays:
        array = array or chosen([name for name in arrays if isinstance(arrays[name], h5py.Dataset)])
        return arrays[array][()] if index is None else arrays[array][index]


def read_mat(file: str) -> np.ndarray:
    """MATLAB reverses the axes of what it writes."""
    if not is_hdf5(file):
        raise Unusable("a .mat of before version 7.3, which is no HDF5: save it with -v7.3, or as .npy")
    return read_hdf5(file).T


def read_hdf5_cell(cell: dict) -> np.ndarray:
    """-> (H, W) or (H, W, C)."""
    stored = read_hdf5(cell["file"], cell["array"], cell["index"])
    if stored.ndim != len(cell["axes"]):
        raise Unusable(f"an array {cell['array']} of {stored.ndim} axes instead of {cell['axes']}")
    return stored.transpose([cell["axes"].index(axis) for axis in "HWC" if axis in cell["axes"]])


# --- formats ---


def chosen(names: list[str]) -> str:
    """The only array of a file, or the one whose name is that of depth."""
    usual = [name for name in names if name.lower().endswith(DEPTH_ARRAYS)]
    if len(names) == 1 or len(usual) == 1:
        return names[0] if len(names) == 1 else usual[0]
    raise Unusable(f"a file of several arrays, {', '.join(sorted(names)[:8]) or 'none'}: name one of them depth")


def of_picture(picture: Image.Image) -> np.ndarray:
    if picture.mode in ("P", "PA"):
        raise Unusable("a palette PNG for a depth, whose numbers stand for colours")
    if picture.format == "JPEG":
        raise Unusable("a JPEG for a depth, which changes its numbers")
    return np.asarray(picture)


def read_picture(path: str) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            return of_picture(picture)
    except UnidentifiedImageError as error:
        if path.lower().endswith((".tif", ".tiff")):
            raise Unusable("an unreadable .tif; whole numbers and floats of 32 bits are read") from error
        raise


def read_npy(path: str) -> np.ndarray:
    return np.load(path, allow_pickle=False)


def read_npz(path: str) -> np.ndarray:
    with np.load(path, allow_pickle=False) as arrays:
        return arrays[chosen(arrays.files)]


def read_pfm(path: str) -> np.ndarray:
    """Rows are stored from the bottom up; the sign of the scale tells the order of bytes, its size nothing of use."""
    stored = Path(path).read_bytes()
    header = PFM_HEADER.match(stored)
    if header is None:
        raise ValueError(f"expected the header of a .pfm in {path}")
    width, height, channels = int(header[2]), int(header[3]), 3 if header[1] == b"PF" else 1
    values = np.frombuffer(stored, "<f4" if float(header[4]) < 0 else ">f4", width * height * channels, header.end())
    return values.reshape(height, width, channels)[::-1]


def read_exr(path: str) -> np.ndarray:
    openexr = library("OpenEXR", path)
    Path(path).stat()  # FileNotFoundError, which OpenEXR does not tell from a damaged file
    with openexr.File(path, separate_channels=True) as file:
        channels = {name: channel.pixels for part in file.parts for name, channel in part.channels.items()}
    if not channels:
        raise ValueError(f"{path} ends in the middle")
    if {name.rpartition(".")[2] for name in channels} in ({*"RGB"}, {*"RGBA"}):
        return np.stack([values for name, values in channels.items() if name[-1] in "RGB"], -1)
    return channels[chosen([*channels])]


READERS: dict[str, Callable[[str], np.ndarray]] = {
    **dict.fromkeys((".png", ".tif", ".tiff", ".jpg", ".jpeg"), read_picture),
    ".npy": read_npy,
    ".npz": read_npz,
    ".pfm": read_pfm,
    ".exr": read_exr,
    **dict.fromkeys((".h5", ".hdf5"), read_hdf5),
    ".mat": read_mat,
}
DEPTH_SUFFIXES = tuple(READERS)

# --- cells of rows ---


def open_picture(cell: Source | dict) -> Source:
    """The picture of a row, a path, {bytes, path}, or an array of an HDF5 file -> what `read_rgb` takes.

    Raises:
        one of UNREADABLE.
    """
    if not isinstance(cell, dict):
        return cell
    if "array" not in cell:
        return BytesIO(cell["bytes"]) if cell["bytes"] else cell["path"]
    try:
        return Image.fromarray(np.ascontiguousarray(read_hdf5_cell(cell)))
    except DAMAGED as error:
        raise ValueError(f"{cell['file']} cannot be read: {error}") from error


def _stored(cell: object) -> object:
    if isinstance(cell, dict) and "array" in cell:
        return read_hdf5_cell(cell)
    if isinstance(cell, dict):
        cell = cell["bytes"] or cell["path"]
    if isinstance(cell, str):
        reader = READERS.get(PurePath(cell).suffix.lower())
        if reader is None:
            raise Unusable(f"a depth of the suffix {PurePath(cell).suffix or '(none)'}")
        return reader(cell)
    if isinstance(cell, bytes):
        cell = Image.open(BytesIO(cell))
    return of_picture(cell) if isinstance(cell, Image.Image) else cell


def open_depth(cell: object) -> np.ndarray:
    """A path, bytes, a picture, an array of an HDF5 file, or an array -> what is stored, (H, W), whole or floating.

    Raises:
        Unusable: several numbers a pixel, colours in a palette, or which of several arrays is not known.
        one of UNREADABLE: the file is missing or damaged.
    """
    try:
        depth = np.asarray(_stored(cell))
    except DAMAGED as error:
        raise ValueError(f"{cell if isinstance(cell, str) else 'a depth'} cannot be read: {error}") from error
    depth = depth[..., 0] if depth.ndim == 3 and depth.shape[-1] == 1 else depth
    depth = depth[0] if depth.ndim == 3 and depth.shape[0] == 1 else depth
    if depth.ndim == 3 and min(depth.shape[0], depth.shape[-1]) <= 4:
        channels = np.moveaxis(depth, 0, -1) if depth.shape[0] < depth.shape[-1] else depth
        if (channels[..., :3] == channels[..., :1]).all():
            raise Unusable("a depth of equal channels, one number saved as a colour: save one channel")
        raise Unusable(f"a depth of {channels.shape[-1]} channels, which is a picture of depth")
    if depth.ndim != 2 or depth.dtype.kind not in "uif":
        raise Unusable(f"a depth of {depth.ndim} axes of {depth.dtype} instead of one number a pixel")
    return depth


def read_depth(cell: object, scale: Scale, max_depth: float | None) -> np.ndarray:
    """A cell as of `open_depth` -> depth (H, W) in metres, float32, 0 where nothing was measured.

    Args:
        scale: divides whole numbers; floating point ones are metres.
        max_depth: metres, what is beyond was not measured; None for no bound.

    Raises:
        as open_depth.
    """
    depth = open_depth(cell)
    metres = (depth if depth.dtype.kind == "f" else depth / scale.of(depth.dtype)).astype(np.float32)
    measured = np.isfinite(metres) & (metres > 0) & (metres <= (max_depth or np.inf))
    return np.where(measured, metres, np.float32(0))
