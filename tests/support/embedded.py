"""Pictures of noise, the command that embeds them, and what it wrote."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from vit_embed.retrieval.embed_command import main


def picture(seed: int, width: int = 40, height: int = 36) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def embed(source, output, model, *options) -> int:
    given = ["--model", model, "--dtype", "float32", "--workers", "2", "--batch_size", "4", "--shard_size", "4"]
    return main([str(source), "--output", str(output), *given, *map(str, options)])


def rows(output) -> dict[str, np.ndarray]:
    table = pq.read_table(output)
    found = dict(zip(table["path"].to_pylist(), np.stack(table["embedding"].to_numpy())))
    assert len(found) == table.num_rows  # no path twice
    return found


def reasons(output: Path) -> dict[str, str]:
    table = pq.read_table(output.with_suffix(".errors.parquet"))
    assert table.num_rows == len(set(table["path"].to_pylist()))
    return dict(zip(table["path"].to_pylist(), table["reason"].to_pylist()))


def same_rows(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for path, vector in expected.items():
        np.testing.assert_array_equal(found[path], vector, err_msg=path)


def write_tar(path: Path, names: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in names.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
