"""What callers give by mistake: each is an error that names what was expected, what came and what to do."""

import numpy as np
import pytest
import torch
from catalogue import CLASSES, IMAGE_CLASSES
from PIL import Image
from tiny import pixels, randomised, tokens, vision_config
from transformers import BatchFeature

import vit_embed

PICTURE = Image.new("RGB", (32, 32), (200, 100, 50))
PIXELS = pixels(1)
# what comes: the value, and what the message says
WRONG_IMAGES = {
    "BatchFeature": (
        BatchFeature({"pixel_values": PIXELS}),
        TypeError,
        r"tensor.*got BatchFeature; .*model\(\*\*inputs\)",
    ),
    "list": (PIXELS.tolist(), TypeError, "tensor.*got list; use the image processor"),
    "ndarray": (PIXELS.numpy(), TypeError, "tensor.*got ndarray; use the image processor"),
    "PIL image": (PICTURE, TypeError, "tensor.*got Image; use the image processor"),
    "uint8": (
        torch.from_numpy(np.array(PICTURE)).permute(2, 0, 1)[None],
        ValueError,
        "normalised floating-point numbers, got torch.uint8; scale and normalise",
    ),
    "no batch": (PIXELS[0], ValueError, r"got \(3, 32, 32\); a single image needs a batch dimension"),
    "channels last": (PIXELS.permute(0, 2, 3, 1), ValueError, r"got \(1, 32, 32, 3\); channels come before height"),
    "grey": (PIXELS[:, :1], ValueError, r"num_channels=3.*got \(1, 1, 32, 32\); convert the images to 3 channels"),
    "empty batch": (PIXELS[:0], ValueError, r"got \(0, 3, 32, 32\); leave empty batches out"),
    "other size": (pixels(1, 30, 32), ValueError, r"multiples of patch_size \(8, 8\), got \(30, 32\); resize or crop"),
}


@pytest.mark.parametrize(
    ("name", "wrong"),
    [*(("model", wrong) for wrong in WRONG_IMAGES), *((name, "grey") for name in IMAGE_CLASSES if name != "model")],
)
def test_wrong_images(name, wrong):
    value, kind, message = WRONG_IMAGES[wrong]
    case = CLASSES[name]
    inputs, model = {key: rows[:1] for key, rows in case.inputs().items()}, case.model()
    with pytest.raises(kind, match="pixel_values must be .*" + message if wrong != "other size" else message):
        model(**{**inputs, "pixel_values": value})
    if name == "contrastive":
        for read in (model.get_image_features, model.get_patch_features):
            with pytest.raises(kind, match=message):
                read(value)


WRONG_TEXTS = {
    "BatchEncoding": (BatchFeature({"input_ids": tokens()}), TypeError, r"tensor.*model\(\*\*inputs\)"),
    "strings": (["a cat"], TypeError, "tensor.*got list; use the tokenizer"),
    "ndarray": (tokens().numpy(), TypeError, "tensor.*got ndarray; use the tokenizer"),
    "one text": (tokens()[0], ValueError, r"integers, got \(16,\) of torch.int64; use the tokenizer"),
    "floats": (tokens().float(), ValueError, r"integers, got \(3, 16\) of torch.float32"),
    "too long": (
        torch.full((1, 17), 99),
        ValueError,
        "at most max_position_embeddings=16 tokens, got 17; .*truncation",
    ),
    "outside": (torch.full((1, 8), 100), ValueError, r"in \[0, vocab_size=100\), got 100; use the tokenizer of this"),
    "endless": (torch.full((2, 8), 5), ValueError, "end-of-text token 99, row 0 has none; tokenize with add_special"),
    "empty": (tokens()[:0], ValueError, r"got \(0, 16\)"),
}


@pytest.mark.parametrize(
    ("name", "wrong"),
    [*(("contrastive", wrong) for wrong in WRONG_TEXTS), ("text", "strings"), ("text, projection", "strings")],
)
def test_wrong_texts(name, wrong):
    value, kind, message = WRONG_TEXTS[wrong]
    model = CLASSES[name].model()
    calls = [model, model.get_text_features] if name == "contrastive" else [model]
    for call in calls:
        with pytest.raises(kind, match="input_ids must .*" + message if wrong != "endless" else message):
            call(input_ids=value)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"attention_mask": torch.ones(3, 15)},
            r"attention_mask must have the shape of input_ids \(3, 16\), got \(3, 15\)",
        ),
        (
            {"position_ids": torch.arange(15)[None]},
            r"position_ids must be \(1, 16\) or \(3, 16\) of integers, got \(1, 15\)",
        ),
        ({"position_ids": torch.arange(16.0)[None]}, "position_ids must be .* of integers, got .*float32"),
        ({"position_ids": torch.arange(16)}, r"position_ids must be .*, got \(16,\)"),
    ],
)
def test_what_goes_with_a_text_has_its_shape(inputs, message):
    with pytest.raises(ValueError, match=message):
        CLASSES["text"].model()(tokens(), **inputs)


def test_positions_of_a_tower_that_reads_its_padding():
    model = CLASSES["contrastive, siglip"].model()
    with pytest.raises(ValueError, match="reads the padding.*all max_position_embeddings=16 places, got 8; pad"):
        model.get_text_features(torch.full((2, 8), 99), position_ids=torch.arange(8)[None])


def classifier(**fields) -> torch.nn.Module:
    return randomised(vit_embed.VitEmbedForImageClassification(vision_config(**{"num_labels": 5, **fields})))


SEVERAL = {"problem_type": "multi_label_classification"}
WRONG_LABELS = {
    "list": ({}, [0, 1, 2], TypeError, r"labels must be a tensor of shape \(3,\), got list; .*torch.tensor\(labels\)"),
    "other batch": ({}, torch.tensor([0, 1]), ValueError, r"labels must be \(3,\) class numbers, got \(2,\)"),
    "floats": ({}, torch.zeros(3), ValueError, "class numbers, got .*float32; set config.problem_type"),
    "bools": ({}, torch.zeros(3, dtype=torch.bool), ValueError, "class numbers, got .*bool; set config.problem_type"),
    "outside": ({}, torch.tensor([0, 5, 1]), ValueError, r"in \[0, num_labels=5\), got 5; load the model with num_"),
    "one class, whole numbers": (
        {"num_labels": 1},
        torch.tensor([0, 1, 0]),
        ValueError,
        "num_labels=1 and labels are torch.int64.*set config.problem_type to 'regression' or",
    ),
    "class numbers for several labels": (
        SEVERAL,
        torch.arange(15.0).view(3, 5),
        ValueError,
        r"labels for problem_type='multi_label_classification' must be in \[0, 1\].*got 2; for class numbers set",
    ),
    "minus one for several labels": (SEVERAL, -torch.ones(3, 5), ValueError, "-100 or NaN where it is not .*; got -1"),
    "shape of several labels": (SEVERAL, torch.ones(3, 4), ValueError, r"must be \(3, 5\), got \(3, 4\)"),
    "list of numbers": ({"problem_type": "regression"}, [1.0], TypeError, "labels must be a tensor"),
}


@pytest.mark.parametrize("wrong", WRONG_LABELS)
def test_wrong_labels(wrong):
    fields, labels, kind, message = WRONG_LABELS[wrong]
    with pytest.raises(kind, match=message):
        classifier(**fields)(pixels(), labels=labels)


@pytest.mark.parametrize("unknown", [-100.0, float("nan")])
def test_unknown_entries_of_several_labels_are_left_out(unknown):
    model = classifier(num_labels=3, **SEVERAL)
    labels = torch.tensor([[1.0, 0, unknown], [0.3, unknown, 1]])
    known = torch.tensor([[True, True, False], [True, False, True]])
    images = pixels(2)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(model(images).logits[known], labels[known])
    loss = model(images, labels=labels).loss
    torch.testing.assert_close(loss, expected)
    nothing = model(images, labels=torch.full((2, 3), unknown)).loss
    nothing.backward()
    assert nothing.item() == 0 and all((p.grad == 0).all() for p in model.parameters())


def test_one_label_of_numbers_is_regression():
    output = classifier(num_labels=1)(pixels(), labels=torch.tensor([0.5, 1.0, -2.0]))
    expected = (output.logits[:, 0] - torch.tensor([0.5, 1.0, -2.0])).square().mean()
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize(
    "dtype", [torch.uint16, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float64, torch.bfloat16]
)
def test_depth_labels_of_any_real_type(dtype):
    depths = torch.randint(0, 120, (3, 32, 32), generator=torch.Generator().manual_seed(0))
    model = CLASSES["depth"].model()
    expected = model(pixels(), labels=depths.float()).loss
    assert torch.equal(model(pixels(), labels=depths.to(dtype)).loss, expected)


def test_depths_beyond_max_depth_do_not_count():
    """A sky of 65,535 mm where 10 m are predicted at most."""
    far = pixels()[:, 0].abs() + 0.1
    near = far.clone()
    far[:, :9], near[:, :9] = 65.535, 0.0
    for name, same in (("depth, dpt", True), ("depth", False)):  # max_depth=10, and none
        model = CLASSES[name].model()
        assert torch.equal(model(pixels(), labels=far).loss, model(pixels(), labels=near).loss) == same


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        (np.ones((3, 32, 32)), TypeError, "labels must be a tensor.*got ndarray"),
        (
            torch.ones(3, 1, 32, 32),
            ValueError,
            r"labels must be \(batch=3, height, width\).* one depth a pixel; got \(3, 1",
        ),
        (torch.ones(2, 32, 32), ValueError, r"labels must be \(batch=3, height, width\)"),
        (torch.ones(3, 32, 32, dtype=torch.bool), ValueError, "numbers, one depth a pixel; got .* of torch.bool"),
        (torch.ones(3, 32, 32, dtype=torch.complex64), ValueError, "of torch.complex64"),
    ],
)
def test_wrong_depths(labels, kind, message):
    with pytest.raises(kind, match=message):
        CLASSES["depth"].model()(pixels(), labels=labels)


@pytest.mark.parametrize("name", [name for name in IMAGE_CLASSES if name not in ("depth, dpt", "contrastive, siglip")])
def test_other_sizes_are_refused_where_they_are_not_wanted(name):
    """interpolate_pos_encoding=False is stock CLIP's default: it takes the native size alone."""
    case = CLASSES[name]
    model, inputs = case.model(), case.inputs()
    with torch.no_grad():
        model(**inputs, interpolate_pos_encoding=False)
    inputs.pop("bool_masked_pos", None)
    inputs["pixel_values"] = pixels(3, 64, 32)
    with torch.no_grad():
        model(**inputs, interpolate_pos_encoding=True)
    with pytest.raises(
        ValueError, match=r"False takes images of image_size \(32, 32\) only, got \(64, 32\); leave it out"
    ):
        model(**inputs, interpolate_pos_encoding=False)


def test_group_ids_and_masks_are_tensors():
    contrastive = CLASSES["contrastive"]
    with pytest.raises(TypeError, match="group_ids must be a tensor.*got list"):
        contrastive.model()(**contrastive.inputs(), group_ids=[0, 1, 2])
    with pytest.raises(TypeError, match="bool_masked_pos must be a tensor.*got ndarray"):
        CLASSES["masked"].model()(pixels(), bool_masked_pos=np.ones((3, 16)))
    with pytest.raises(TypeError, match="pixel_mask must be a tensor.*got list"):
        CLASSES["model"].model()(pixels(), pixel_mask=[1])
