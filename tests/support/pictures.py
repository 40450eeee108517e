"""Real photographs with captions and depth, out of packages.

The files come inside the wheels of scikit-image and scikit-learn: nothing is downloaded.
"""

import functools

import numpy as np
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_image

CAPTIONS = {
    "astronaut": "an astronaut",
    "chelsea": "a cat",
    "china": "a temple",
    "coffee": "a cup of coffee",
    "flower": "a flower",
    "hubble_deep_field": "many galaxies",
    "motorcycle": "a motorcycle",
    "retina": "a retina",
    "rocket": "a rocket",
    "text": "notes on paper",
}

# Middlebury 2014 "Motorcycle" at the size that scikit-image ships: focal length and offset of the principal points in
# pixels, baseline in metres.
FOCAL_LENGTH, DISPARITY_OFFSET, BASELINE = 994.978, 31.086, 0.193001


@functools.cache
def photo(name: str) -> Image.Image:
    """One of CAPTIONS in RGB and in full size. Shared by all tests: not to be changed in place."""
    if name in ("china", "flower"):
        pixels = load_sample_image(f"{name}.jpg")
    elif name == "motorcycle":
        pixels = data.stereo_motorcycle()[0]
    else:
        pixels = getattr(data, name)()
    return Image.fromarray(pixels).convert("RGB")


def crops(name: str, count: int, size: int = 160, seed: int = 0) -> list[Image.Image]:
    """`count` squares of `size` pixels from places of a photo drawn by `seed`."""
    image, random = photo(name), np.random.default_rng(seed)
    corners = [
        (random.integers(image.width - size + 1), random.integers(image.height - size + 1)) for _ in range(count)
    ]
    return [image.crop((int(x), int(y), int(x) + size, int(y) + size)) for x, y in corners]


@functools.cache
def motorcycle_depth() -> np.ndarray:
    """(500, 741) metres of photo("motorcycle"), measured; NaN where the scanner saw nothing."""
    disparity = data.stereo_motorcycle()[2]
    depth = FOCAL_LENGTH * BASELINE / (disparity + DISPARITY_OFFSET)
    return np.where(np.isfinite(disparity), depth, np.nan).astype(np.float32)


def depth_crops(count: int, size: int = 160, seed: int = 0) -> list[tuple[Image.Image, np.ndarray]]:
    """Squares of the motorcycle, each with its (size, size) metres, NaN where unknown."""
    image, depth, random = photo("motorcycle"), motorcycle_depth(), np.random.default_rng(seed)
    result = []
    for _ in range(count):
        top, left = (int(random.integers(side - size + 1)) for side in depth.shape)
        box = (left, top, left + size, top + size)
        result.append((image.crop(box), depth[top : top + size, left : left + size]))
    return result
