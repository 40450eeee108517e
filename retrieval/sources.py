"""What a user names -> a stream of items: folders, lists, globs, tars, parquet files, data sets; here or at any address
that fsspec opens.

A source is listed while it is read: nothing keeps all of its items.
"""

from __future__ import annotations

import glob
import io
import os
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import fsspec
import pyarrow.parquet as pq

from vit_embed.retrieval.pictures import PICTURE_SUFFIXES

LIST_SUFFIXES = (".txt", ".lst")
# Columns of parquet files and data sets that hold pictures, the first that is there.
IMAGE_COLUMNS = (
    *("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "bytes", "image_path", "img_path", "filepath"),
    *("file_path", "path", "file_name", "filename", "image_file", "file"),
)
KEY_COLUMNS = ("key", "id", "path", "file_name")
ROWS_AT_A_TIME = 256
LAYOUTS = (
    "a folder of pictures",
    f"a list of paths ({', '.join(LIST_SUFFIXES)}, one a line)",
    "a glob in quotes ('photos/**/*.jpg')",
    "webdataset tars (a file, or a glob)",
    f"parquet files with a column {', '.join(IMAGE_COLUMNS[:3])}, ... of paths, bytes or {{bytes, path}}",
    "a data set (its name on the Hub, or the folder that `save_to_disk` wrote)",
    "an address that fsspec opens (s3://..., gs://..., memory://...)",
)


class Item(NamedTuple):
    """A picture or text that is to be embedded.

    key: its name in the source, unique there. stamp: changes when the item does; empty where that cannot be seen.
    content: a path, an address, a part of a file, bytes, a PIL picture; or a text.
    """

    key: str
    stamp: str
    content: Any


class Address(NamedTuple):
    """A file at an fsspec address."""

    url: str


class Broken(NamedTuple):
    """What could not even be listed; opening it says why."""

    reason: str


class Part(NamedTuple):
    """A part of a file here, as a tar holds its members."""

    path: str
    offset: int
    size: int


class Source(NamedTuple):
    """items: gives the items, in the same order each time. total: how many, or None where only reading tells."""

    items: Callable[[], Iterator[Item]]
    total: Callable[[], int | None]


def open_content(content: str | Address | Broken | Part | bytes) -> BinaryIO:
    """The bytes of an item.

    Raises:
        OSError: they cannot be read, or belong to no regular file, which could block for ever.
    """
    if isinstance(content, Broken):
        raise OSError(content.reason)
    if isinstance(content, bytes):
        return io.BytesIO(content)
    if isinstance(content, Address):
        return fsspec.open(content.url, "rb").open()
    if isinstance(content, Part):
        with open(content.path, "rb") as file:
            file.seek(content.offset)
            return io.BytesIO(file.read(content.size))
    mode = os.stat(content).st_mode
    if stat.S_ISDIR(mode):
        os.listdir(content)
    if not stat.S_ISREG(mode):
        raise OSError("not a regular file")
    return open(content, "rb")


def find_source(name: str, *, split: str = "train", column: str | None = None) -> Source:
    """The source that a user's word stands for.

    Args:
        name: see LAYOUTS.
        split: of a data set. column: of the pictures, in a data set or parquet files; None looks for IMAGE_COLUMNS.

    Raises:
        ValueError: it is none of LAYOUTS, or holds no picture.
    """
    if not name:
        raise ValueError("expected a source of pictures, got an empty name")
    is_address = "://" in name
    path = Path(name)
    if name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")):
        raise ValueError(f"{name} is compressed, so its pictures cannot be read one by one; unpack it, or to a .tar")
    if not is_address and path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return _dataset(name, split, column)
        return _checked(Source(lambda: _folder(path), lambda: sum(1 for _ in _folder(path))), name)
    if is_address and not glob.has_magic(name) and not PurePosixPath(name).suffix:
        return _checked(_addresses(f"{name.rstrip('/')}/**"), name)
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in LIST_SUFFIXES:
        _must_exist(name)
        return _checked(Source(lambda: _listed(name), lambda: sum(1 for _ in _lines(name))), name)
    if suffix == ".parquet":
        files = _files(name)
        for file in files:
            try:
                pq.read_metadata(file)
            except (OSError, ValueError) as error:
                raise ValueError(f"{file} cannot be read as parquet: {error}") from error
        return _checked(
            Source(lambda: _parquet(files, column), lambda: sum(pq.read_metadata(f).num_rows for f in files)), name
        )
    if suffix == ".tar":
        files = _files(name)
        return _checked(Source(lambda: _tars(files), lambda: None), name)
    if is_address:
        return _checked(_addresses(name), name)
    if glob.has_magic(name) or path.exists():
        return _checked(Source(lambda: _globbed(name), lambda: sum(1 for _ in _globbed(name))), name)
    if name.count("/") <= 1 and not name.startswith((".", "/")) and not suffix:
        return _dataset(name, split, column)
    raise ValueError(f"expected pictures at {name}, nothing is there; what can be read: {'; '.join(LAYOUTS)}")


def text_source(path: str) -> Source:
    """A text a line; its key is the number of the line, from 1."""
    _must_exist(path)

    def items() -> Iterator[Item]:
        with fsspec.open(path, "r", encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                if text := line.rstrip("\r\n"):
                    yield Item(str(number), f"{zlib.crc32(text.encode('utf-8', 'surrogateescape')):08x}", text)

    if next(items(), None) is None:
        raise ValueError(f"expected texts in {path}, a line each; it has none")
    return Source(items, lambda: sum(1 for _ in items()))


def _checked(source: Source, name: str) -> Source:
    """ValueError where there is nothing to read."""
    if next(source.items(), None) is None:
        raise ValueError(
            f"expected pictures ({', '.join(PICTURE_SUFFIXES)}) at {name}, found none; what can be read: "
            f"{'; '.join(LAYOUTS)}"
        )
    return source


def _must_exist(name: str) -> None:
    if "://" not in name and not os.path.isfile(name):
        raise ValueError(f"expected a file, {name} is none")


def _folder(top: Path) -> Iterator[Item]:
    """Every picture below a folder, in order of name; links are followed, but not to a folder they lie in."""

    def walk(folder: str, above: tuple[str, ...]) -> Iterator[Item]:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:  # the folder stands for what is in it: opening it says why it cannot be listed
            yield Item(f"{os.path.relpath(folder, top)}/", "", folder)
            return
        for entry in entries:
            if entry.is_dir():
                real = os.path.realpath(entry.path)
                if real not in above:
                    yield from walk(entry.path, (*above, real))
            elif entry.name.lower().endswith(PICTURE_SUFFIXES):
                yield _file(entry.path, os.path.relpath(entry.path, top))

    return walk(str(top), (os.path.realpath(top),))


def _file(path: str, key: str) -> Item:
    try:
        found = os.stat(path)
        stamp = f"{found.st_size}-{found.st_mtime_ns}"
    except OSError:  # reading it says why
        stamp = ""
    return Item(key.replace(os.sep, "/"), stamp, path)


def _lines(name: str) -> Iterator[str]:
    with fsspec.open(name, "r", encoding="utf-8-sig", errors="surrogateescape") as file:
        for line in file:
            if line := line.rstrip("\r\n"):
                yield line


def _listed(name: str) -> Iterator[Item]:
    """Paths of a list; relative ones start at the list's folder."""
    folder = os.path.dirname(name)
    for line in _lines(name):
        path = line if "://" in line else os.path.join(folder, line)
        yield Item(line, "", Address(path)) if "://" in path else _file(path, line)


def _globbed(pattern: str) -> Iterator[Item]:
    """Files of a glob; keys start at the last folder that the pattern names in full."""
    if os.path.exists(pattern) or not glob.has_magic(pattern):
        yield _file(pattern, os.path.basename(pattern))
        return
    top = pattern
    while glob.has_magic(top):
        top = os.path.dirname(top)
    for path in sorted(glob.glob(pattern, recursive=True)):
        if path.lower().endswith(PICTURE_SUFFIXES):
            yield _file(path, os.path.relpath(path, top or "."))


def _addresses(pattern: str) -> Source:
    """Files at an address, in order of name. The listing of a bucket is kept: names and sizes alone."""
    system, path = fsspec.url_to_fs(pattern)
    if not glob.has_magic(path) and system.isdir(path):
        path = f"{path.rstrip('/')}/**"
    found = system.glob(path, detail=True) if glob.has_magic(path) else {path: system.info(path)}
    found = {
        name: info for name, info in found.items() if info["type"] == "file" and name.lower().endswith(PICTURE_SUFFIXES)
    }

    def items() -> Iterator[Item]:
        for name in sorted(found):
            info = found[name]
            changed = info.get("ETag") or info.get("mtime") or info.get("LastModified") or info.get("created") or ""
            url = system.unstrip_protocol(name)
            yield Item(url, f"{info.get('size')}-{changed}", Address(url))

    return Source(items, lambda: len(found))


def _files(name: str) -> list[str]:
    """Files of a name that may be a glob."""
    is_glob = glob.has_magic(name) and not os.path.exists(name)
    files = sorted(glob.glob(name, recursive=True)) if is_glob else [name]
    if not files:
        raise ValueError(f"expected files at {name}, found none")
    for each in files:
        _must_exist(each)
    return files


def _tars(files: list[str]) -> Iterator[Item]:
    """Pictures of tars, by tar and name; they are read from where they lie in it."""
    for file, name in zip(files, _names(files)):
        try:
            with tarfile.open(file, "r:") as tar:
                for member in tar:
                    if member.name.lower().endswith(PICTURE_SUFFIXES) and (member.isfile() or member.islnk()):
                        target = tar.getmember(member.linkname) if member.islnk() else member
                        part = Part(file, target.offset_data, target.size)
                        yield Item(f"{name}/{member.name}", f"{target.size}-{member.mtime}", part)
                if os.path.getsize(file) < tar.offset + tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("it has no end mark")
        except (tarfile.TarError, OSError, KeyError) as error:  # the other tars can be read
            yield Item(f"{name}/", "", Broken(f"the tar cannot be read to its end: {error}"))


def _names(files: list[str]) -> list[str]:
    """What tells files apart: their paths below the folder that all lie in."""
    top = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    return [os.path.relpath(os.path.abspath(file), top).replace(os.sep, "/") for file in files]


def _column(columns: list[str], wanted: str | None, place: str) -> str:
    found = next((name for name in ([wanted] if wanted else IMAGE_COLUMNS) if name in columns), None)
    if found is None:
        looked = wanted or ", ".join(IMAGE_COLUMNS)
        raise ValueError(
            f"{place} must have a column of pictures ({looked}), has {', '.join(columns)}; --column names it"
        )
    return found


def _cell(value: Any, folder: str) -> str | Address | bytes:
    """A path, bytes or {bytes, path}, as the Hub and pandas write pictures."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        return b""  # not a picture, as its row of the errors says
    return Address(value) if "://" in value else os.path.join(folder, value)


def _parquet(files: list[str], column: str | None) -> Iterator[Item]:
    for file, file_name in zip(files, _names(files)):
        own_stamp = _file(file, file).stamp
        with pq.ParquetFile(file) as parquet:
            columns = parquet.schema_arrow.names
            image = _column(columns, column, file)
            key = next((name for name in KEY_COLUMNS if name in columns), None)
            number = 0
            wanted = [image] if key in (None, image) else [image, key]
            for rows in parquet.iter_batches(ROWS_AT_A_TIME, columns=wanted):
                for row in rows.to_pylist():
                    content = _cell(row[image], os.path.dirname(file))
                    name = row[key] if key is not None and isinstance(row[key], str | int) else number
                    prefix = f"{file_name}/" if len(files) > 1 or name is number else ""
                    number += 1
                    stamp = _file(content, content).stamp if isinstance(content, str) else own_stamp
                    yield Item(f"{prefix}{name}", stamp, content)


def _dataset(name: str, split: str, column: str | None) -> Source:
    """Rows of a data set, by number; its pictures are not decoded by `datasets`."""
    import datasets

    try:
        if Path(name).is_dir():
            found = datasets.load_from_disk(name)
            if isinstance(found, datasets.DatasetDict) and split not in found:
                raise ValueError(f"there is no split {split!r}; --split is one of {', '.join(found)}")
            rows = found[split] if isinstance(found, datasets.DatasetDict) else found
        else:
            rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # of the Hub, of requests, of the data set's own layout
        layouts = "; ".join(LAYOUTS)
        raise ValueError(
            f"expected pictures at {name}: no file or folder is there, and as a data set it cannot be read "
            f"({type(error).__name__}: {error}); what can be read: {layouts}"
        ) from error
    image = _column(rows.column_names, column, name)
    if isinstance(rows.features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))

    def items() -> Iterator[Item]:
        for number, row in enumerate(rows.select_columns([image])):
            yield Item(str(number), rows._fingerprint, _cell(row[image], ""))

    return Source(items, lambda: len(rows))
