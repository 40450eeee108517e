"""Rendered rooms: exact depth, nothing shared among splits, the same scenes after any interruption."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pybullet
import pytest
from PIL import Image

from data import render_depth_scenes, scenes

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "data" / "render_depth_scenes.py"
SIZE = 64


@pytest.fixture
def client():
    number = pybullet.connect(pybullet.DIRECT)
    yield number
    pybullet.disconnect(number)


def digests(folder: Path) -> dict[str, str]:
    """What every file of a folder holds."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rendered(client: int, textures: Path, seed: int, number: int, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    camera = scenes.build_scene(client, seed, number, textures)
    return scenes.render_scene(client, seed, number, camera, size)


def ray_depth(client: int, camera: scenes.Camera) -> np.ndarray:
    """Depth along the optical axis by casting a ray for each pixel, 0 where none hits: (SIZE, SIZE)."""
    start, rays = camera.rays(SIZE)
    ends = start + scenes.FAR * rays.reshape(-1, 3)
    hits = pybullet.rayTestBatch([start.tolist()] * len(ends), ends.tolist(), physicsClientId=client)
    depth = np.array([fraction * scenes.FAR * (body >= 0) for body, _, fraction, *_ in hits])
    return depth.reshape(SIZE, SIZE)


@pytest.mark.parametrize("number", [2, 6, 10])
def test_depth_is_that_of_rays_within_a_centimetre(number, client, tmp_path):
    """Of the physics engine's own collision shapes; pixels that graze an edge may fall on either side of it."""
    camera = scenes.build_scene(client, 0, number, tmp_path, solid=True)
    _, depth = scenes.render_scene(client, 0, number, camera, SIZE)
    expected = ray_depth(client, camera)
    assert ((depth > 0) != (expected > 0)).mean() < 0.005
    both = (depth > 0) & (expected > 0)
    assert both.mean() > 0.5
    error = np.abs(depth - expected)[both]
    assert (error < 0.01).mean() > 0.99 and np.median(error) < 1e-4


def test_a_scene_depends_on_the_seed_and_its_number_alone(client, tmp_path):
    """Also its textures, in a folder that serves two seeds."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    scenes_of = [("one", 1, 7), ("one", 0, 8), ("one", 0, 7), ("two", 0, 7)]
    *others, first, again = (rendered(client, tmp_path / folder, *which) for folder, *which in scenes_of)
    assert all((one == two).all() for one, two in zip(first, again))
    assert all((first[0] != other[0]).mean() > 0.5 for other in others)
    files = [scenes.texture_file(tmp_path / folder, *which) for folder, *which in scenes_of]
    *others, first, again = (file.read_bytes() for file in files)
    assert first == again and first not in others


def test_test_scenes_hold_no_mesh_and_no_texture_of_another_split(client, monkeypatch, tmp_path):
    """What pybullet really loads, for scenes of every split."""
    loaded: dict[str, set[int]] = {}
    create, load = pybullet.createVisualShape, pybullet.loadTexture

    def created(*args, **kwargs):
        if "fileName" in kwargs:
            loaded["meshes"].add(int(Path(kwargs["fileName"]).stem))
        return create(*args, **kwargs)

    def texture(path, **kwargs):
        loaded["textures"].add(int(Path(path).stem.split("-")[1]))
        return load(path, **kwargs)

    monkeypatch.setattr(pybullet, "createVisualShape", created)
    monkeypatch.setattr(pybullet, "loadTexture", texture)
    for split, numbers in {"test": range(0, 200, 10), "validation": range(1, 200, 10), "train": range(2, 9)}.items():
        loaded |= {"meshes": set(), "textures": set()}
        for number in numbers:
            assert scenes.split_of(number) == split
            scenes.build_scene(client, 0, number, tmp_path)
        assert len(loaded["meshes"]) > 20 and len(loaded["textures"]) > 5
        assert {scenes.split_of(number) for found in loaded.values() for number in found} == {split}
    assert [len(scenes.numbers_of(split, 1000)) for split in ("train", "validation", "test")] == [800, 100, 100]


def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_files(tmp_path, caplog):
    def render(folder: Path, seed: int = 0, processes: int = 1) -> None:
        render_depth_scenes.render_scenes(folder, 60, SIZE, seed, processes)

    whole, broken, partial = (tmp_path / name for name in ("whole", "broken", "broken.partial"))
    render(whole, processes=2)
    asked = [sys.executable, SCRIPT, "--output_dir", broken, "--num_scenes", "60", "--size", str(SIZE)]
    process = subprocess.Popen(asked, stderr=subprocess.DEVNULL, start_new_session=True)
    while len(list(partial.glob("*/depths/*.png"))) < 12:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert partial.exists() and not broken.exists(), "a folder has its name only when it is complete"
    (partial / "test" / "depths" / "000000.99.tmp").write_bytes(b"half a picture")
    with pytest.raises(ValueError, match="give the same settings"):
        render(broken, seed=1)
    caplog.set_level("INFO")
    render(broken)
    assert "of 60 scenes to render" in caplog.text and "60 of 60" not in caplog.text
    assert digests(broken) == digests(whole) and not partial.exists()
    names = [len(list((whole / split / "images").iterdir())) for split in ("train", "validation", "test")]
    assert names == [48, 6, 6]
    depth = np.asarray(Image.open(whole / "test" / "depths" / "000010.png"))
    assert depth.dtype == np.uint16 and depth.shape == (SIZE, SIZE) and 300 < np.median(depth[depth > 0]) < 10_000
    with pytest.raises(ValueError, match="not to exist, it does"):
        render(whole)


def test_a_floor_alone_does_not_give_the_depth_away(client, tmp_path):
    """The best picture-blind answer, the mean depth of each pixel, is far from what is asked of a model (0.08)."""
    depths = np.stack([rendered(client, tmp_path, 0, number, 32)[1] for number in range(2, 42)])
    measured = depths > 0
    mean = depths.sum(0) / measured.sum(0).clip(min=1)
    error = np.abs(mean - depths)[measured] / depths[measured]
    assert error.mean() > 0.24


def test_a_command_line_that_asks_for_nothing_is_refused(monkeypatch, capsys):
    for arguments, message in (
        ([], "--output_dir or --motorcycle"),
        (["--output_dir", "x", "--size", "0"], "--size to be at least 1, got 0"),
    ):
        monkeypatch.setattr(sys, "argv", ["render", *arguments])
        with pytest.raises(SystemExit):
            render_depth_scenes.main()
        assert message in capsys.readouterr().err


def test_the_motorcycle_is_the_one_of_middlebury(tmp_path):
    render_depth_scenes.write_motorcycle(tmp_path / "motorcycle")
    folder = tmp_path / "motorcycle" / "test"
    depth = np.load(folder / "depths" / "motorcycle.npy")
    assert Image.open(folder / "images" / "motorcycle.png").size == (741, 500) and depth.shape == (500, 741)
    # Where disparity is missing there is no depth; the rest of the garage is 2.1 to 5 m away.
    assert 0.9 < (depth > 0).mean() < 0.95
    assert depth[depth > 0].min() == pytest.approx(2.11, abs=0.01) and depth.max() == pytest.approx(5.02, abs=0.01)
