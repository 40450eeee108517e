"""Images of several sizes in one batch, padded, with `pixel_mask`: each gives what it gives alone."""

import pictures
import pytest
import torch
from stem_family import FAMILY, READINGS, assert_every_weight_learns, read
from stem_family import build_reading as build
from tiny import CLOSE, pixels, tokens, use_attention
from transformers import PreTrainedModel, ViltImageProcessor

from vit_embed.options_vit_embed import STEM_TYPES

SIZES = [(32, 32), (48, 16), (16, 64)]  # (height, width) in pixels; multiples of the adaptive stem's cells


def padded(sizes: list[tuple[int, int]], filling: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Images of these sizes in one batch with `filling` right of them and below; the mask; each alone."""
    height, width = (max(sides) for sides in zip(*sizes))
    images = torch.full((len(sizes), 3, height, width), filling)
    mask, alone = torch.zeros(len(sizes), height, width, dtype=torch.bool), []
    for row, (rows, columns) in enumerate(sizes):
        alone.append(pixels(1, rows, columns, seed=10 + row))
        images[row, :, :rows, :columns] = alone[-1][0]
        mask[row, :rows, :columns] = True
    return images, mask, alone


def assert_alone(head: str, model: PreTrainedModel, together: tuple, alone: list[torch.Tensor]) -> None:
    """Each row of a padded batch is what its image gives alone, and zero beyond it."""
    for row, image in enumerate(alone):
        for found, expected in zip(together, read(head, model, pixel_values=image)):
            found, expected = found[row], expected[0]
            if found.shape != expected.shape:
                rows, columns = expected.shape[-2:]
                assert (found[..., rows:, :] == 0).all() and (found[..., columns:] == 0).all()
                found = found[..., :rows, :columns]
            torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize(
    ("head", "stem"),
    [
        *((head, "conv") for head in READINGS),
        *(("map", stem) for stem in STEM_TYPES if stem != "conv"),
        *((head, "adaptive") for head in ("mean", "contrastive", "backbone", "depth-dpt", "class attentions")),
    ],
)
def test_images_of_several_sizes_equal_themselves_alone(head, stem):
    model = build(head, **FAMILY[stem])
    images, mask, alone = padded(SIZES, filling=1e3)
    together = read(head, model, pixel_values=images, pixel_mask=mask)
    assert_alone(head, model, together, alone)
    unreadable = padded(SIZES, filling=float("nan"))[0]
    again = read(head, model, pixel_values=unreadable, pixel_mask=mask.long())
    assert all(torch.equal(one, other) for one, other in zip(together, again))


@pytest.mark.parametrize(
    ("head", "fields"),
    [
        ("backbone", {"position_embedding_type": "polynomial"}),
        ("backbone", {"position_embedding_type": "sinusoidal", "use_cls_token": False, "pooling_type": "mean"}),
        ("contrastive", {"num_register_tokens": 2}),
        ("backbone", {"num_register_tokens": 2}),
        ("mean", {"norm_position": "post", "use_pre_layernorm": False, "final_norm_type": "none"}),
        ("depth-dpt", {"patch_size": (8, 4)}),
        ("depth-dpt", {"stem_type": "overlap", "patch_size": 4, "patch_kernel_size": 7}),
        ("map", {"stem_type": "adaptive", "num_register_tokens": 2}),
        *((head, {"pad_to_patch": True}) for head in ("map", "backbone", "depth-deconv", "depth-dpt")),
        *((head, {"stem_type": "adaptive", "pad_to_patch": True}) for head in ("mean", "depth-deconv")),
    ],
)
def test_options_of_images_of_several_sizes(head, fields):
    model = build(head, **fields)
    sizes = [(30, 33), (41, 16), (11, 64), (30, 33)] if "pad_to_patch" in fields else [*SIZES, SIZES[0]]
    images, mask, alone = padded(sizes, filling=1e3)
    for implementation in ("sdpa", "eager"):
        use_attention(model, implementation)
        assert_alone(head, model, read(head, model, pixel_values=images, pixel_mask=mask), alone)


@torch.no_grad()
def test_token_map_of_several_sizes():
    images, mask, _ = padded(SIZES)
    places = build("cls").get_token_map(images, pixel_mask=mask)
    assert places.shape == (3, 6, 8)
    for row, (height, width) in enumerate(SIZES):
        rows, columns = height // 8, width // 8
        assert torch.equal(places[row, :rows, :columns].flatten(), torch.arange(rows * columns))
        assert (places[row] >= 0).sum() == rows * columns


def test_depth_of_several_sizes_learns_from_the_images_alone():
    """Whatever the labels say of the padding: the loss is that of the valid pixels."""
    model = build("depth-deconv", depth_loss="l1")
    images, mask, _ = padded(SIZES)
    labels = pixels(3, 48, 64, seed=4)[:, 0].abs() + 0.1
    output = model(images, pixel_mask=mask, labels=labels)
    errors = (output.predicted_depth - labels).abs()
    expected = sum(error[seen].mean() for error, seen in zip(errors, mask)) / 3
    torch.testing.assert_close(output.loss, expected, **CLOSE)
    with pytest.raises(ValueError, match=r"labels of a batch with pixel_mask must have its .* \(48, 64\)"):
        model(images, pixel_mask=mask, labels=labels[:, :32])


def edited(index: tuple, value: bool) -> torch.Tensor:
    mask = torch.zeros(2, 32, 48, dtype=torch.bool)
    mask[0], mask[1, :16, :24] = True, True
    mask[index] = value
    return mask


HALF_A_CELL = edited((1, slice(16), slice(16, 24)), False)
HALF_A_CELL[1, :24, :16] = True  # 24 x 16
WRONG_MASKS = {
    "a hole": ({}, edited((1, 3, 4), False), "rectangle in the top left corner.*image 1 is not"),
    "a speck": ({}, edited((1, 20, 30), True), "rectangle in the top left corner.*image 1 is not"),
    "padding on the left": ({}, edited((0, slice(None), slice(8)), False), "top left corner.*image 0 is not"),
    "padding on top": ({}, edited((0, slice(8)), False), "top left corner.*image 0 is not"),
    "an L": ({}, edited((1, slice(24), slice(8)), True), "rectangle.*image 1 is not"),
    "nothing": ({}, edited((1,), False), r"multiples of patch_size \(8, 8\), got \(0, 0\)"),
    "nothing, padded": ({"pad_to_patch": True}, edited((1,), False), r"got \(0, 0\)"),
    "half a patch": ({}, edited((1, slice(16), slice(28)), True), r"multiples of patch_size \(8, 8\), got \(16, 28\)"),
    "half a cell": (
        {"stem_type": "adaptive"},
        HALF_A_CELL,
        r"multiples of twice patch_size \(16, 16\), got \(24, 16\)",
    ),
    "one image less": ({}, edited((0,), True)[:1], r"pixel_mask must be .* \(2, 32, 48\), got \(1, 32, 48\)"),
    "a channel": ({}, edited((0,), True)[:, None], r"\(2, 32, 48\), got \(2, 1, 32, 48\)"),
    "patches": ({}, torch.ones(2, 4, 6), r"\(2, 32, 48\), got \(2, 4, 6\)"),
}


@pytest.mark.parametrize("name", WRONG_MASKS)
def test_wrong_masks_are_refused(name):
    fields, mask, message = WRONG_MASKS[name]
    with pytest.raises(ValueError, match=message):
        build("classification", **fields)(pixels(2, 32, 48), pixel_mask=mask)


def test_dropping_leaves_each_image_of_a_padded_batch_its_share():
    model = build("mean", patch_drop_rate=0.5).train()
    images, mask, _ = padded([(32, 32), (16, 32), (8, 24)])
    layout = model.embeddings(images, pixel_mask=mask).layout
    assert [int((row >= 0).sum()) for row in layout.token_of_patch] == [8, 4, 2]
    assert layout.sizes.sum(dim=1).tolist() == [8, 4, 2]


def test_merging_leaves_padded_batches_to_training():
    model = build("classification", token_merge_size=2).train()
    images, mask, _ = padded(SIZES)
    assert model(images, pixel_mask=mask).logits.isfinite().all()


@pytest.mark.parametrize("stem", STEM_TYPES)
def test_a_padded_batch_trains_every_weight(stem):
    model = build("classification", pooling_type="map", **FAMILY[stem]).train()
    images, mask, _ = padded(SIZES * 2, filling=float("nan"))
    model(images, pixel_mask=mask, labels=torch.tensor([0, 1, 1] * 2)).loss.backward()
    assert_every_weight_learns(model)


def test_photos_of_two_shapes_through_a_stock_processor():
    """ViLT's processor keeps the shape of a photo, pads the batch and says where. `forward` takes that beside texts."""
    processor = ViltImageProcessor(size={"shortest_edge": 64}, size_divisor=16)
    photos = [pictures.photo(name) for name in ("astronaut", "rocket")]
    model = build("contrastive")
    batch = processor(photos, return_tensors="pt")
    alone = [processor([photo], return_tensors="pt")["pixel_values"] for photo in photos]
    assert alone[0].shape != alone[1].shape and not batch["pixel_mask"].bool().all()
    with torch.no_grad():
        found = model(input_ids=tokens(2), **batch).image_embeds
    for row, image in enumerate(alone):
        torch.testing.assert_close(found[row], model.get_image_features(image, True)[0], **CLOSE)
