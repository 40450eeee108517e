"""Rooms of strange objects in pybullet: one scene a number, with exact depth."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pybullet
import pybullet_data
from PIL import Image

SPLITS = ("train", "validation", "test")
NUM_MESHES = 1000
NUM_TEXTURES = 5000  # as many as scenes: a few are learned by heart, scale and all
NEAR, FAR = 0.1, 10.0  # metres; a surface beyond FAR is drawn, but has no depth
MILLIMETRES = 1000
TEXTURE_PIXELS = 128


def split_of(number: int) -> str:
    """The split that a scene, a mesh or a texture of this number belongs to."""
    return {0: "test", 1: "validation"}.get(number % 10, "train")


def numbers_of(split: str, count: int) -> np.ndarray:
    """All numbers below `count` of a split, in order."""
    return np.array([number for number in range(count) if split_of(number) == split])


def draw_texture(rng: np.random.Generator) -> Image.Image:
    """A random pattern that repeats, 1 m wide once it is on a surface: cells, stripes, tiles, dots or none, with
    stains."""
    size, cells = TEXTURE_PIXELS, int(rng.choice([1, 2, 4]))
    row, column = np.mgrid[:size, :size] * cells / size
    pattern = rng.integers(6)
    mask = (
        np.zeros((size, size), bool),
        (row.astype(int) + column.astype(int)) % 2 == 1 if cells > 1 else row < 0.5,
        column % 1 < rng.uniform(0.2, 0.6),
        np.minimum(row % 1, (column + (row.astype(int) % 2) / 2) % 1) < 0.06,
        np.minimum(row % 1, column % 1) < 0.08,
        (row % 1 - 0.5) ** 2 + (column % 1 - 0.5) ** 2 < rng.uniform(0.04, 0.16),
    )[pattern]
    colours = rng.uniform(0.15, 1, (2, 3))
    # Half of the patterns are two shades of one colour, as floors and walls mostly are.
    if rng.random() < 0.5:
        colours[1] = (colours[0] * rng.uniform(0.5, 0.8)).clip(0, 1)
    stains = Image.fromarray(rng.random((8, 8)).astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
    grain = rng.normal(0, 0.03, (size, size))
    shade = 1 + rng.uniform(0, 0.4) * (np.asarray(stains) - 0.5) + grain
    pixels = np.where(mask[..., None], colours[1], colours[0]) * shade[..., None]
    return Image.fromarray((255 * pixels.clip(0, 1)).astype(np.uint8))


def texture_file(folder: Path, seed: int, number: int) -> Path:
    """Texture `number`, a function of (seed, number) alone, as a file of `folder`; drawn if it is not there yet."""
    path = folder / f"{seed}-{number}.png"
    if not path.exists():
        save_image(draw_texture(np.random.default_rng((seed, 1, number))), path)
    return path


def mesh_path(number: int) -> str:
    return f"{pybullet_data.getDataPath()}/random_urdfs/{number:03d}/{number:03d}.obj"


@lru_cache(NUM_MESHES)
def mesh_vertices(number: int) -> np.ndarray:
    """(vertices, 3) of a mesh in the unit of its file, where it is 0.7 to 12 units large."""
    with open(mesh_path(number)) as file:
        return np.array([line.split()[1:4] for line in file if line.startswith("v ")], dtype=float)


@dataclass(frozen=True)
class Camera:
    """Where the camera is and what it sees: metres, degrees; `view` and `projection` are OpenGL's, column by column."""

    view: tuple[float, ...]
    projection: tuple[float, ...]

    @staticmethod
    def random(rng: np.random.Generator) -> Camera:
        position = np.array([0, 0, rng.uniform(1.0, 1.5)])
        pitch, roll = np.radians(rng.uniform(5, 40)), np.radians(rng.uniform(-4, 4))
        forward = np.array([0, math.cos(pitch), -math.sin(pitch)])
        up = np.array([math.sin(roll), 0, math.cos(roll)])
        field_of_view = rng.uniform(55, 65)
        return Camera(
            view=pybullet.computeViewMatrix(position.tolist(), (position + forward).tolist(), up.tolist()),
            projection=pybullet.computeProjectionMatrixFOV(field_of_view, 1, NEAR, FAR),
        )

    def rays(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The camera's place (3), and the ray of each pixel (size, size, 3), as long as goes 1 m along the optical
        axis.

        TinyRenderer looks through the lower left corner of a pixel, not through its middle.
        """
        view = np.array(self.view).reshape(4, 4).T
        tangent = 1 / np.array(self.projection).reshape(4, 4).T[0, 0]
        columns, rows = (tangent * (2 * (np.arange(size) + corner) / size - 1) for corner in (0, 1))
        right, up, axis = view[0, :3], view[1, :3], -view[2, :3]
        rays = axis + columns[None, :, None] * right - rows[:, None, None] * up
        return -view[:3, :3].T @ view[:3, 3], rays


def on_floor(spot: np.ndarray, height: float = 0.0) -> list[float]:
    return [float(spot[0]), float(spot[1]), float(height)]


class Builder:
    """Puts the bodies of a room into a pybullet client. With `solid` they stop rays too, for the test of the depth."""

    def __init__(
        self, client: int, rng: np.random.Generator, split: str, texture_of: Callable[[int], Path], solid: bool
    ) -> None:
        self.client, self.rng, self.texture_of, self.solid = client, rng, texture_of, solid
        self.mesh_numbers = numbers_of(split, NUM_MESHES)
        self.texture_numbers = numbers_of(split, NUM_TEXTURES)

    def body(self, shape: dict, colour: list[float], position: list[float], rotation: list[float], textured: bool):
        visual = pybullet.createVisualShape(**shape, rgbaColor=colour, physicsClientId=self.client)
        collision = -1
        if self.solid:
            shape = {name: value for name, value in shape.items() if name not in ("uvs", "normals")}
            flags = pybullet.GEOM_FORCE_CONCAVE_TRIMESH if shape["shapeType"] == pybullet.GEOM_MESH else 0
            collision = pybullet.createCollisionShape(**shape, flags=flags, physicsClientId=self.client)
        body = pybullet.createMultiBody(0, collision, visual, position, rotation, physicsClientId=self.client)
        number = self.rng.choice(self.texture_numbers)
        if textured:
            texture = pybullet.loadTexture(str(self.texture_of(number)), physicsClientId=self.client)
            pybullet.changeVisualShape(body, -1, textureUniqueId=texture, physicsClientId=self.client)

    def rectangle(self, corners: np.ndarray, width: float, height: float, normal: list[float]) -> None:
        """A textured surface through four corners (4, 3) in metres, counter-clockwise as seen."""
        start = self.rng.uniform(0, 1, 2)
        sides = np.array([[0, 0], [width, 0], [width, height], [0, height]])
        shape = {
            "shapeType": pybullet.GEOM_MESH,
            "vertices": corners.tolist(),
            "indices": [0, 1, 2, 0, 2, 3],
            "uvs": (start + sides).tolist(),
            "normals": [normal] * 4,
        }
        self.body(shape, [1, 1, 1, 1], [0, 0, 0], [0, 0, 0, 1], textured=True)

    def floor(self) -> None:
        angle, reach = self.rng.uniform(0, 2 * math.pi), 16.0
        turns = angle + np.pi / 2 * np.arange(4)
        corners = np.stack([np.cos(turns), np.sin(turns), np.zeros(4)], 1) * reach
        side = reach * math.sqrt(2)
        self.rectangle(corners, side, side, [0, 0, 1])

    def wall(self, middle: np.ndarray, facing: float) -> None:
        """A wall of 12 m through a spot on the floor, which faces the direction `facing` (radians)."""
        normal = np.array([math.cos(facing), math.sin(facing), 0])
        along = np.array([-normal[1], normal[0], 0])
        foot, height = np.array([*middle, 0]), self.rng.uniform(1.5, 3)
        corners = np.stack([foot - 6 * along, foot + 6 * along])
        corners = np.concatenate([corners, corners[::-1] + [0, 0, height]])
        self.rectangle(corners, 12, height, normal.tolist())

    def walls(self) -> None:
        chances = self.rng.random(3)
        if chances[0] < 0.85:
            self.wall(np.array([0, self.rng.uniform(2.5, 7)]), -np.pi / 2 + np.radians(self.rng.uniform(-35, 35)))
        for side, chance in zip((-1, 1), chances[1:]):
            if chance < 0.5:
                facing = (np.pi if side > 0 else 0) + np.radians(self.rng.uniform(-25, 25))
                self.wall(np.array([side * self.rng.uniform(1.2, 4), 2.5]), facing)

    def spot(self) -> np.ndarray:
        """Somewhere on the floor that the camera looks at, nearer spots as likely as farther ones."""
        distance = self.rng.uniform(1.0, 5.0)
        return np.array([distance * self.rng.uniform(-0.6, 0.6), distance])

    def box(self) -> tuple[np.ndarray, float]:
        """A box on the floor; returns its spot and the height of its top."""
        spot, half = self.spot(), self.rng.uniform(0.1, 0.4, 3)
        rotation = pybullet.getQuaternionFromEuler([0, 0, self.rng.uniform(0, np.pi)])
        shape = {"shapeType": pybullet.GEOM_BOX, "halfExtents": half.tolist()}
        colour = [*self.rng.uniform(0.2, 1, 3), 1]
        self.body(shape, colour, on_floor(spot, half[2]), rotation, textured=self.rng.random() < 0.5)
        return spot, 2 * half[2]

    def mesh(self, spot: np.ndarray, floor: float) -> None:
        """One of the split's meshes in any pose, its lowest point at the height `floor`."""
        number = int(self.rng.choice(self.mesh_numbers))
        vertices = mesh_vertices(number)
        scale = self.rng.uniform(0.25, 1.0) / np.ptp(vertices, axis=0).max()
        quaternion = self.rng.normal(size=4)
        quaternion /= np.linalg.norm(quaternion)
        turned = vertices @ np.array(pybullet.getMatrixFromQuaternion(quaternion)).reshape(3, 3).T * scale
        shape = {"shapeType": pybullet.GEOM_MESH, "fileName": mesh_path(number), "meshScale": [scale] * 3}
        colour = [*self.rng.uniform(0.1, 1, 3), 1]
        # Meshes have no texture coordinates.
        self.body(shape, colour, on_floor(spot, floor - turned[:, 2].min()), quaternion.tolist(), textured=False)

    def room(self) -> None:
        self.floor()
        self.walls()
        tops = [self.box() for _ in range(self.rng.integers(0, 4))]
        for _ in range(self.rng.integers(3, 9)):
            on_box = bool(tops) and self.rng.random() < 0.3
            spot, floor = tops[self.rng.integers(len(tops))] if on_box else (self.spot(), 0.0)
            self.mesh(spot, floor)


def build_scene(client: int, seed: int, number: int, textures: Path, solid: bool = False) -> Camera:
    """Empties the client, builds scene `number` in it with textures of that folder, and returns the camera to look
    with."""
    rng = np.random.default_rng((seed, 0, number))
    pybullet.resetSimulation(physicsClientId=client)
    camera = Camera.random(rng)
    Builder(client, rng, split_of(number), partial(texture_file, textures, seed), solid).room()
    return camera


def render_scene(client: int, seed: int, number: int, camera: Camera, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Renders what `build_scene` has built.

    Returns:
        RGB (size, size, 3) uint8, and depth (size, size) in metres along the optical axis, 0 where there is none.
    """
    rng = np.random.default_rng((seed, 2, number))
    light = rng.uniform([-3, -5, 2], [3, 1, 6])
    _, _, rgba, buffer, bodies = pybullet.getCameraImage(
        size,
        size,
        camera.view,
        camera.projection,
        lightDirection=light.tolist(),
        lightColor=rng.uniform(0.85, 1, 3).tolist(),
        lightDistance=10,
        lightAmbientCoeff=rng.uniform(0.4, 0.6),
        lightDiffuseCoeff=rng.uniform(0.3, 0.5),
        lightSpecularCoeff=rng.uniform(0, 0.3),
        shadow=0,  # its shadows fall on small triangles only: none on a floor
        renderer=pybullet.ER_TINY_RENDERER,
        physicsClientId=client,
    )
    rgb = np.reshape(rgba, (size, size, 4))[..., :3].astype(np.uint8)
    buffer = np.reshape(buffer, (size, size)).astype(np.float64)
    depth = FAR * NEAR / (FAR - (FAR - NEAR) * buffer)
    sky = np.reshape(bodies, (size, size)) < 0
    rgb[sky] = (rng.uniform(0.5, 1, 3) * 255).astype(np.uint8)
    return rgb, np.where(sky | (depth >= FAR) | (depth <= NEAR), 0, depth)


def save_image(image: Image.Image, path: Path) -> None:
    """Writes a picture under its name only once it is whole."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    image.save(temporary, format="PNG")
    temporary.replace(path)


def scene_paths(folder: Path, number: int) -> tuple[Path, Path]:
    """Where the picture and the depth of a scene lie."""
    name = f"{number:06d}.png"
    return folder / split_of(number) / "images" / name, folder / split_of(number) / "depths" / name


def render_to_folder(folder: Path, textures: Path, seed: int, numbers: list[int], size: int) -> int:
    """Renders these scenes into `folder`, the depth last; returns how many."""
    client = pybullet.connect(pybullet.DIRECT)
    for number in numbers:
        camera = build_scene(client, seed, number, textures)
        rgb, depth = render_scene(client, seed, number, camera, size)
        image_path, depth_path = scene_paths(folder, number)
        save_image(Image.fromarray(rgb), image_path)
        save_image(Image.fromarray(np.round(depth * MILLIMETRES).astype(np.uint16)), depth_path)
    pybullet.disconnect(client)
    return len(numbers)
