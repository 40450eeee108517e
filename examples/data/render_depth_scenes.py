"""Render rooms of strange objects with pybullet: pictures and exact depth, to train `train_depth.py` on.

    python examples/data/render_depth_scenes.py --output_dir data/scenes --num_scenes 5000
    python examples/data/render_depth_scenes.py --motorcycle data/motorcycle

The first writes `SPLIT/images/NAME.png` (RGB) and `SPLIT/depths/NAME.png` (16-bit, millimetres along the optical axis,
0 where there is none: sky, or beyond 10 m) for the splits train, validation and test. A room has a floor, up to three
walls, boxes, and three to eight of pybullet_data's 1000 random meshes in any pose, 0.25 to 1 m large; the camera
hangs 1 to 1.5 m above the floor, as one that is held by hand, and looks down 5 to 40 degrees at 55 to 65 degrees of
view. One rule splits everything: scene, mesh and texture number 10 k is of the test split, 10 k + 1 of the validation
split and every other one of the training split, so that a room of the test split holds nothing that was trained on.

Scene i is a function of (`--seed`, i) alone. A run that was stopped goes on where it was; the folder gets its name when
it is complete. The second form writes the one real picture that a package here ships with its depth: the Middlebury
2014 motorcycle of scikit-image, as `test/images/` and `test/depths/` (.npy, metres).

Needs: `pip install numpy pillow pybullet tqdm`, and scikit-image for the motorcycle. It runs on the CPU, without a
display.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

if __name__ == "__main__":  # the rule of imports in examples/README.md
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from PIL import Image
from tqdm import tqdm

from data.scenes import SPLITS, render_to_folder, scene_paths

logger = logging.getLogger("render_depth_scenes")

# A pybullet client keeps memory of every mesh that it has loaded, so a new one is made for so many scenes.
SCENES_PER_TASK = 50

# Calibration of the left camera of Middlebury 2014 "Motorcycle" at the size that scikit-image ships (the docstring of
# `skimage.data.stereo_motorcycle`): focal length and offset in pixels, baseline in metres.
FOCAL, BASELINE, DISPARITY_OFFSET = 994.978, 0.193001, 31.086


def render_scenes(output: Path, num_scenes: int, size: int, seed: int, num_processes: int) -> None:
    """Renders all scenes into `output`, which must not exist; goes on with what a stopped run has left."""
    if output.exists():
        raise ValueError(f"expected --output_dir {output} not to exist, it does; remove it or name another one")
    unfinished = output.with_name(output.name + ".partial")
    settings = {"num_scenes": num_scenes, "size": size, "seed": seed}
    record = unfinished / "settings.json"
    if record.exists() and json.loads(record.read_text()) != settings:
        raise ValueError(
            f"expected {unfinished} to be of a run with {settings}, it is of {json.loads(record.read_text())}; "
            "remove it or give the same settings"
        )
    for split in SPLITS:
        for kind in ("images", "depths"):
            (unfinished / split / kind).mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(settings))
    for left_over in unfinished.rglob("*.tmp"):
        left_over.unlink()
    missing = [number for number in range(num_scenes) if not scene_paths(unfinished, number)[1].exists()]
    logger.info("%d of %d scenes to render", len(missing), num_scenes)
    tasks = [missing[start : start + SCENES_PER_TASK] for start in range(0, len(missing), SCENES_PER_TASK)]
    with (
        tempfile.TemporaryDirectory() as textures,
        ProcessPoolExecutor(num_processes, get_context("spawn")) as pool,
        tqdm(total=num_scenes, initial=num_scenes - len(missing), desc="render", unit="scene") as bar,
    ):
        futures = [pool.submit(render_to_folder, unfinished, Path(textures), seed, task, size) for task in tasks]
        for future in futures:
            bar.update(future.result())
    unfinished.replace(output)
    logger.info("%s is complete", output)


def write_motorcycle(output: Path) -> None:
    """Writes the Middlebury motorcycle as a test split: picture, and depth in metres, 0 where it was not measured."""
    from skimage.data import stereo_motorcycle

    if output.exists():
        raise ValueError(f"expected --motorcycle {output} not to exist, it does; remove it or name another one")
    left, _, disparity = stereo_motorcycle()
    measured = np.isfinite(disparity)
    depth = np.where(measured, FOCAL * BASELINE / (np.where(measured, disparity, 0) + DISPARITY_OFFSET), 0)
    unfinished = output.with_name(output.name + ".partial")
    for kind in ("images", "depths"):
        (unfinished / "test" / kind).mkdir(parents=True, exist_ok=True)
    Image.fromarray(left).save(unfinished / "test" / "images" / "motorcycle.png")
    np.save(unfinished / "test" / "depths" / "motorcycle.npy", depth.astype(np.float32))
    unfinished.replace(output)


def main() -> None:
    """Parse the command line and write what it asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, help="folder to write the scenes to; must not exist")
    parser.add_argument("--num_scenes", type=int, default=5000, help="scenes of all splits together")
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other scenes")
    parser.add_argument("--num_processes", type=int, default=1, help="processes that render")
    parser.add_argument("--motorcycle", type=Path, help="folder to write the Middlebury motorcycle to; must not exist")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    if arguments.output_dir is None and arguments.motorcycle is None:
        parser.error("expected --output_dir or --motorcycle, got neither")
    if arguments.output_dir is not None:
        for name in ("num_scenes", "size", "num_processes"):
            if getattr(arguments, name) < 1:
                parser.error(f"expected --{name} to be at least 1, got {getattr(arguments, name)}")
        values = (arguments.output_dir, arguments.num_scenes, arguments.size, arguments.seed, arguments.num_processes)
        render_scenes(*values)
    if arguments.motorcycle is not None:
        write_motorcycle(arguments.motorcycle)


if __name__ == "__main__":
    main()
