"""Other stock image processors as CLIPImageProcessor: the same pixels of a photo."""

import json
import logging

import pytest
import torch
import transformers
from sklearn.datasets import load_sample_images
from transformers import AutoImageProcessor

from vit_embed import VitEmbedConfig
from vit_embed.conversion.image_processor import equal_image_processor
from vit_embed.conversion.processor_files import image_processor_dict, image_processor_kind

IMAGENET_MEAN = [0.485, 0.456, 0.406]

# A `preprocessor_config.json` as published, and as old releases wrote it.
PREPROCESSORS = {
    "ViT": {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 48}, "image_mean": [0.4] * 3},
    "ViT of 2021": {"feature_extractor_type": "ViTFeatureExtractor", "size": 32, "resample": 2, "do_normalize": True},
    "DeiT": {"image_processor_type": "DeiTImageProcessor", "size": 40, "crop_size": 32, "image_mean": IMAGENET_MEAN},
    "DINOv2": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 40},
        "crop_size": {"height": 32, "width": 32},
        "image_mean": IMAGENET_MEAN,
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
    },
    "defaults": {"image_processor_type": "BitImageProcessorFast"},
    "no crop": {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 32}, "do_center_crop": False},
    "SigLIP": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}, "resample": 2},
    "no normalisation": {"image_processor_type": "ViTImageProcessor", "do_normalize": False, "rescale_factor": 0.01},
}


@pytest.mark.parametrize("kind", PREPROCESSORS)
def test_another_image_processor_becomes_an_equal_one(kind, tmp_path):
    stated = PREPROCESSORS[kind]
    stock = image_processor_kind(stated)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**stated, "image_processor_type": stock}))
    theirs = getattr(transformers, stock).from_pretrained(tmp_path)
    equal = equal_image_processor(stated, image_processor_dict(VitEmbedConfig(), "CLIPImageProcessor"))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(equal))
    ours = AutoImageProcessor.from_pretrained(tmp_path)
    assert equal["image_processor_type"] == "CLIPImageProcessor" and type(ours).__name__.startswith("CLIP")
    for photo in load_sample_images().images:
        got, expected = (each(photo, return_tensors="pt").pixel_values for each in (ours, theirs))
        # Backends differ by 0.015 (FACTS.md); one grey level is 0.018.
        torch.testing.assert_close(got, expected, rtol=0, atol=0.02)


def test_image_processors_that_are_ours_unknown_or_broken(caplog):
    own = image_processor_dict(VitEmbedConfig(), "CLIPImageProcessor")
    clip = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224}
    assert equal_image_processor(clip, own) == own  # one number in old files, of the shorter side
    caplog.set_level(logging.WARNING)
    donut = {"image_processor_type": "DonutImageProcessor", "image_mean": [0.1] * 3, "size": {"height": 9, "width": 9}}
    assert equal_image_processor(donut, own) == {**own, "image_mean": [0.1] * 3}
    assert "DonutImageProcessor, which CLIPImageProcessor may not equal" in caplog.text
    with pytest.raises(ValueError, match="preprocessor_config.json cannot be read as a ViTImageProcessor"):
        equal_image_processor({"image_processor_type": "ViTImageProcessor", "size": {"side": 32}}, own)
