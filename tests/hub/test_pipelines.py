"""Every image pipeline of transformers from a saved folder: pictures, paths and batches equal calling the model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
import tiny
import torch
from PIL import Image
from tiny_tokenizer import write_tokenizer
from transformers import AutoImageProcessor, AutoProcessor, PreTrainedModel, pipeline

from vit_embed import VitEmbedForContrastive, VitEmbedForDepthEstimation, VitEmbedForImageClassification, VitEmbedModel

NAMES = ["astronaut", "chelsea", "rocket"]
LABELS = ["cat", "flower", "rocket"]
TEMPLATE = "this is a photo of {}."

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "image-classification": lambda: VitEmbedForImageClassification(
        tiny.vision_config(id2label=dict(enumerate(LABELS)), label2id={label: i for i, label in enumerate(LABELS)})
    ),
    "zero-shot-image-classification": lambda: VitEmbedForContrastive(tiny.dual_config()),
    "depth-estimation": lambda: VitEmbedForDepthEstimation(tiny.vision_config(max_depth=10.0)),
    "image-feature-extraction": lambda: VitEmbedModel(tiny.vision_config()),
}
# What a pipeline takes besides the images.
OPTIONS = {"zero-shot-image-classification": {"candidate_labels": LABELS, "hypothesis_template": TEMPLATE}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One folder a task, and the photos as files."""
    folder = tmp_path_factory.mktemp("saved")
    write_tokenizer(folder / "zero-shot-image-classification")
    for task, make_model in MODELS.items():
        tiny.randomised(make_model()).save_pretrained(folder / task)
    for name in NAMES:
        pictures.photo(name).save(folder / f"{name}.png")
    return folder


def by_hand(task: str, folder: Path, image: Image.Image) -> Any:
    """What the task's pipeline should give for an image."""
    model = type(MODELS[task]()).from_pretrained(folder).eval()
    if task == "zero-shot-image-classification":
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        texts = [TEMPLATE.format(label) for label in LABELS]
        inputs = processor(text=texts, images=image, padding=True, return_tensors="pt")
    else:
        inputs = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    if task == "image-feature-extraction":
        return outputs.last_hidden_state.tolist()
    if task == "depth-estimation":
        depth = torch.nn.functional.interpolate(
            outputs.predicted_depth[:, None], size=(image.height, image.width), mode="bicubic", align_corners=False
        )
        return depth[0, 0]
    logits = outputs.logits if task == "image-classification" else outputs.logits_per_image
    return dict(zip(LABELS, logits[0].softmax(dim=0).tolist()))


def assert_gives(task: str, found: Any, expected: Any) -> None:
    """That a pipeline's answer for one image is `expected`, to float32 rounding in batches of another size."""
    if task == "image-feature-extraction":
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    elif task == "depth-estimation":
        torch.testing.assert_close(found["predicted_depth"], expected, rtol=1e-4, atol=1e-4)
        assert found["depth"].size == (expected.shape[1], expected.shape[0])
    else:
        assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(expected, abs=1e-5)
        scores = [entry["score"] for entry in found]
        assert scores == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("task", MODELS)
def test_pipeline_of_a_saved_folder_equals_the_model_called_by_hand(task, folder):
    options = OPTIONS.get(task, {})
    pipe = pipeline(task, model=str(folder / task), trust_remote_code=True)
    # The package's, or on older releases the folder's, which trust_remote_code then prefers.
    assert type(pipe.model).__module__.endswith(".modeling_vit_embed")
    images = [pictures.photo(name) for name in NAMES]
    paths = [str(folder / f"{name}.png") for name in NAMES]
    expected = [by_hand(task, folder / task, image) for image in images]
    for one in (images[0], paths[0]):
        assert_gives(task, pipe(one, **options), expected[0])
    for several, batch_size in ((images, 1), (images, 2), (paths, 2)):  # of 3: the last batch of two is odd
        found = pipe(several, batch_size=batch_size, **options)
        for answer, wanted in zip(found, expected, strict=True):
            assert_gives(task, answer, wanted)


@pytest.mark.parametrize("task", ["image-feature-extraction", "zero-shot-image-classification"])
def test_feature_extraction_pipeline_pools(folder, task):
    """Of a dual encoder it gives image embeddings, pooled or not."""
    pipe = pipeline("image-feature-extraction", model=str(folder / task), trust_remote_code=True)
    model = type(MODELS[task]()).from_pretrained(folder / task)
    pixel_values = AutoImageProcessor.from_pretrained(folder / task)(pictures.photo("coffee"), return_tensors="pt")
    is_dual = isinstance(model, VitEmbedForContrastive)
    with torch.no_grad():
        expected = (
            model.get_image_features(**pixel_values, normalize=True) if is_dual else model(**pixel_values).pooler_output
        )
    found = pipe(pictures.photo("coffee"), pool=True, return_tensors=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # the same call in the same process
    if is_dual:
        np.testing.assert_allclose(pipe(pictures.photo("coffee")), expected.numpy(), rtol=0, atol=1e-5)


def test_zero_shot_pipeline_reads_what_a_stock_processor_saves_over_the_folder(folder, tmp_path):
    """Users save model and processor into one folder, in either order."""
    saved = folder / "zero-shot-image-classification"
    processor = AutoProcessor.from_pretrained(saved, trust_remote_code=True)
    model = VitEmbedForContrastive.from_pretrained(saved)
    processor.save_pretrained(tmp_path / "processor-first")
    model.save_pretrained(tmp_path / "processor-first")
    model.save_pretrained(tmp_path / "model-first")
    processor.save_pretrained(tmp_path / "model-first")
    expected = by_hand("zero-shot-image-classification", saved, pictures.photo("chelsea"))
    for order in ("processor-first", "model-first"):
        pipe = pipeline("zero-shot-image-classification", model=str(tmp_path / order), trust_remote_code=True)
        found = pipe(pictures.photo("chelsea"), candidate_labels=LABELS, hypothesis_template=TEMPLATE)
        assert_gives("zero-shot-image-classification", found, expected)
