"""Real photographs with captions, out of packages.

The files come inside the wheels of scikit-image and scikit-learn: nothing is downloaded.
"""

import functools

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
