"""Pictures as they come (mode, orientation, bit depth) through the stock processor of a saved folder into the model."""

import json
from pathlib import Path

import numpy as np
import pictures
import pytest
import tiny
import torch
import transformers
from PIL import Image, ImageOps
from torch.nn import functional as F
from transformers import AutoImageProcessor, PreTrainedModel, pipeline
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, load_image

from vit_embed import VitEmbedForDepthEstimation, VitEmbedForImageClassification, VitEmbedModel

# Without torchvision, transformers 4 has a DPTImageProcessor that takes RGB alone, and drops alpha where 5 puts
# transparent pictures on white.
TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
ROTATED_BY_VIEWER = 6  # EXIF orientation: stored a quarter turn anticlockwise

MODELS = {"features": VitEmbedModel, "depth": VitEmbedForDepthEstimation}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, tuple]:
    """{kind: (model, processor, folder)}."""
    found = {}
    for kind, model_class in MODELS.items():
        folder, model = tmp_path_factory.mktemp(kind), tiny.randomised(model_class(tiny.vision_config(image_size=64)))
        model.save_pretrained(folder)
        found[kind] = model, AutoImageProcessor.from_pretrained(folder), folder
    return found


@pytest.fixture(params=MODELS)
def kind(request) -> str:
    return request.param


def processed(processor, picture) -> torch.Tensor:
    return processor(picture, return_tensors="pt")["pixel_values"]


def features(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """One vector of whatever the model says of one image."""
    with torch.no_grad():
        outputs = model(pixel_values)
    return outputs.get("pooler_output", outputs.get("predicted_depth")).flatten()


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(F.cosine_similarity(one, other, dim=0))


def with_corner_cut_out(image: Image.Image) -> Image.Image:
    """RGBA whose left half is transparent, over black: what most drawing programs leave under transparency."""
    opaque = Image.new("L", image.size, 255)
    opaque.paste(0, (0, 0, image.width // 2, image.height))
    cut = Image.composite(image, Image.new("RGB", image.size), opaque)
    cut.putalpha(opaque)
    return cut


def on_white(image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "CMYK", "YCbCr", "P", "L", "LA", "1"])
def test_pictures_of_every_mode_mean_what_they_show(saved, kind, mode):
    model, processor, _ = saved[kind]
    photo = pictures.photo("astronaut")
    picture = photo.convert(mode)
    if kind == "depth" and not TRANSFORMERS_5:
        picture = load_image(picture)  # what its pipeline does
    pixel_values = processed(processor, picture)
    assert pixel_values.shape == (1, 3, 64, 64)
    shown = photo.convert("L").convert("RGB") if mode in ("L", "LA", "1") else photo
    expected = processed(processor, shown)
    # 256 colours or two, dithered, and rounding to YCbCr and back, differ in every pixel but not in what is shown.
    assert cosine(features(model, pixel_values), features(model, expected)) > 0.999
    if mode in ("RGB", "RGBA", "CMYK", "L", "LA"):
        torch.testing.assert_close(pixel_values, expected, rtol=0, atol=0)


def features_by_pipeline(folder: Path, picture) -> torch.Tensor:
    pipe = pipeline("image-feature-extraction", model=str(folder), trust_remote_code=True)
    return pipe(picture, pool=True, return_tensors=True)[0]


def test_transparent_pictures_are_put_on_white(saved):
    model, processor, folder = saved["features"]
    picture = with_corner_cut_out(pictures.photo("astronaut"))
    expected = processed(processor, on_white(picture))
    black = processed(processor, picture.convert("RGB"))
    assert not torch.equal(expected, black)
    # transformers 4 shows what lies under the transparent part, and so do the pipelines of both: put it on white first.
    torch.testing.assert_close(processed(processor, picture), expected if TRANSFORMERS_5 else black, rtol=0, atol=0)
    found = features_by_pipeline(folder, on_white(picture))
    torch.testing.assert_close(found, features(model, expected), rtol=0, atol=1e-5)  # float32


def test_sixteen_bit_pictures_need_scaling_to_eight_bits(saved, kind):
    model, processor, _ = saved[kind]
    grey = pictures.photo("astronaut").convert("L")
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)  # 0 ... 255 -> 0 ... 65535
    assert sixteen.mode == "I;16"
    expected = processed(processor, grey.convert("RGB"))

    scaled = Image.fromarray((np.asarray(sixteen) // 257).astype(np.uint8)).convert("RGB")
    torch.testing.assert_close(processed(processor, scaled), expected, rtol=0, atol=0)
    # Without that step PIL clips at 255, silently: nearly everything is white.
    clipped = processed(processor, load_image(sixteen))
    assert features(model, clipped).isfinite().all()
    assert (clipped > expected + 0.1).float().mean() > 0.9


def test_pictures_with_an_orientation_are_turned_by_path_but_not_as_an_open_image(saved, kind, tmp_path):
    model, processor, folder = saved[kind]
    upright = pictures.photo("coffee")
    orientation = Image.Exif()
    orientation[0x0112] = ROTATED_BY_VIEWER
    path = str(tmp_path / "turned.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=orientation)
    expected = processed(processor, upright)

    torch.testing.assert_close(processed(processor, load_image(path)), expected, rtol=0, atol=0)
    with Image.open(path) as opened:
        torch.testing.assert_close(processed(processor, ImageOps.exif_transpose(opened)), expected, rtol=0, atol=0)
        lying = processed(processor, upright.transpose(Image.Transpose.ROTATE_90))
        torch.testing.assert_close(processed(processor, opened), lying, rtol=0, atol=0)
    assert not torch.allclose(lying, expected, atol=0.1)
    if kind == "features":
        torch.testing.assert_close(processed(processor, path), expected, rtol=0, atol=0)
        # A pipeline turns both, as it loads whatever it is given.
        with Image.open(path) as opened:
            for given in (path, opened):
                found = features_by_pipeline(folder, given)
                torch.testing.assert_close(found, features(model, expected), rtol=0, atol=1e-5)  # float32


def as_tensor(image: Image.Image) -> torch.Tensor:
    """(3, H, W), 0 ... 255."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalised(image: torch.Tensor) -> torch.Tensor:
    """(3, H, W) of 0 ... 255 -> (1, 3, H, W) as CLIP sees it."""
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return ((image.float() / 255 - mean) / deviation)[None]


def centre_cropped(image: Image.Image, size: int) -> Image.Image:
    """CLIP's own way: the shorter side to `size`, then the middle."""
    width, height = (size * side // min(image.size) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return resized.crop((left, top, left + size, top + size))


@pytest.mark.parametrize("name", list(pictures.CAPTIONS))
def test_features_do_not_depend_on_whether_pil_or_torch_resizes(saved, name):
    """Pixels are CLIP's, of PIL, numpy and torch; torch's antialiased resize, as torchvision's, gives the same."""
    (model, processor, _), photo = saved["features"], pictures.photo(name)
    found = processed(processor, photo)
    torch.testing.assert_close(found, normalised(as_tensor(centre_cropped(photo, 64))), rtol=0, atol=1e-5)  # float32
    torch.testing.assert_close(processed(processor, np.array(photo)), found, rtol=0, atol=1e-5)
    torch.testing.assert_close(processed(processor, as_tensor(photo)), found, rtol=0, atol=1e-5)

    size = tuple(64 * side // min(photo.size) for side in (photo.height, photo.width))
    resized = F.interpolate(as_tensor(photo)[None], size=size, mode="bicubic", antialias=True)[0]
    top, left = ((side - 64) // 2 for side in size)
    by_torch = normalised(resized[:, top : top + 64, left : left + 64])
    assert cosine(features(model, by_torch), features(model, found)) > 0.999


@pytest.mark.parametrize(
    "model_class, image_size, patch_size",
    [
        (VitEmbedModel, 48, 8),
        (VitEmbedModel, (32, 64), (8, 16)),
        (VitEmbedForImageClassification, (64, 32), 8),
        (VitEmbedForDepthEstimation, 48, (8, 16)),
        (VitEmbedForDepthEstimation, (64, 32), 8),
    ],
)
def test_the_processor_follows_the_image_size(model_class, image_size, patch_size, tmp_path):
    model = model_class(tiny.vision_config(patch_size=patch_size))
    model.set_image_size(image_size)
    model.save_pretrained(tmp_path)
    pixel_values = processed(AutoImageProcessor.from_pretrained(tmp_path), pictures.photo("coffee"))
    height, width = model.config.image_shape
    assert pixel_values.shape[2:] == (height, width)
    assert features(VitEmbedModel.from_pretrained(tmp_path), pixel_values).isfinite().all()
    if model_class is VitEmbedForDepthEstimation or height != width:
        # Nothing is cropped away: the whole picture, at the model's size.
        whole = pictures.photo("coffee").resize((width, height), Image.Resampling.BICUBIC)
        torch.testing.assert_close(pixel_values, normalised(as_tensor(whole)), rtol=0, atol=1e-5)  # float32


def test_a_depth_folder_names_the_stock_processor_with_clips_numbers(saved):
    model, processor, folder = saved["depth"]
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    assert settings["image_processor_type"] == "DPTImageProcessor" and settings["ensure_multiple_of"] == 8
    assert settings["image_mean"] == OPENAI_CLIP_MEAN and settings["image_std"] == OPENAI_CLIP_STD
    # Another size asked for at the call is rounded to whole patches, which the model then takes as it is.
    pixel_values = processor(pictures.photo("coffee"), size={"height": 45, "width": 70}, return_tensors="pt")
    assert pixel_values["pixel_values"].shape == (1, 3, 48, 72)
    depth = model(**pixel_values).predicted_depth
    assert depth.shape == (1, 48, 72) and depth.isfinite().all()
