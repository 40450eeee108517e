"""Packages of the npm registry as pinned files, and icons of iconify sets as pictures.

Needs the `npm` command to fetch, `pip install resvg-py` to render.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from pathlib import Path


class Package:
    """The files of one npm tarball, decompressed once to a nameless file, as gzip is read from its start for each."""

    def __init__(self, spec: str, path: Path) -> None:
        self.spec = spec
        plain = tempfile.TemporaryFile()  # noqa: SIM115, read until the script ends
        try:
            with gzip.open(path) as packed:
                shutil.copyfileobj(packed, plain)
            plain.seek(0)
            self.archive = tarfile.open(fileobj=plain, mode="r:")  # noqa: SIM115
        except (gzip.BadGzipFile, EOFError, zlib.error, tarfile.TarError) as error:
            raise ValueError(
                f"expected an npm tarball at {path}, got: {error}; remove it, it is fetched again"
            ) from None
        self.names = [name.removeprefix("package/") for name in self.archive.getnames()]

    def read(self, name: str) -> bytes:
        """Return the bytes of one file; a missing one is a ValueError."""
        if name not in self.names:
            raise ValueError(
                f"expected a file {name!r} in {self.spec}, found {sorted(self.names)[:8]}...; "
                "the version pinned in this script no longer has that layout"
            )
        return self.archive.extractfile(f"package/{name}").read()

    def json(self, name: str) -> dict | list:
        """Return one parsed JSON file."""
        return json.loads(self.read(name))

    def license(self) -> str:
        """Return the SPDX name of the art: `info.license` of an iconify set, else `license` of package.json."""
        if "info.json" in self.names:
            return self.json("info.json")["license"]["spdx"]
        return self.json("package.json")["license"]


def fetch(spec: str, cache_dir: Path) -> Package:
    """Fetch `NAME@VERSION` with `npm pack` into `cache_dir`, unless it is already there.

    Raises:
        ValueError: there is no `npm`, it fails, or the file is damaged.
    """
    name, version = spec.rsplit("@", 1)
    path = cache_dir / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not path.exists():
        if shutil.which("npm") is None:
            raise ValueError(
                f"expected the command `npm` to fetch {spec}, found none on PATH; install Node.js, "
                f"or put {path.name} into {cache_dir} yourself"
            )
        with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
            command = ["npm", "pack", spec, "--pack-destination", scratch, "--silent"]
            result = subprocess.run(command, check=False, capture_output=True, text=True)
            if result.returncode or not (Path(scratch) / path.name).exists():
                raise ValueError(
                    f"expected `{' '.join(command)}` to write {path.name}, got exit code "
                    f"{result.returncode}: {result.stderr.strip()[-500:]}"
                )
            os.replace(Path(scratch) / path.name, path)
    return Package(spec, path)


def render_svg(icon: dict, icons: dict, size: int) -> bytes:
    """Return a PNG of `size` x `size` pixels with alpha of one icon of a parsed iconify set."""
    import resvg_py  # only needed to render

    left, top = icon.get("left", icons.get("left", 0)), icon.get("top", icons.get("top", 0))
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True))
