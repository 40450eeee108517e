"""The family of patch embeddings: what holds for every stem with every head, and what each stem alone must equal.

The suite runs over `stem_family.py`: a new stem is tested by being in STEM_TYPES.
"""

import copy
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from fresh_process import digests, junk_in_new_memory, outputs, run_fresh
from numpy.polynomial.chebyshev import chebval2d
from scipy.fft import dctn
from stem_family import (
    DECODER,
    FAMILY,
    HEADS,
    NEEDED,
    PAIRS,
    REFUSED_PAIRS,
    RESNET,
    build,
    inputs_of,
    result,
    stem_config,
)
from test_models import CLOSE, gradients
from tiny import dual_config, pixels, randomised, vision_config
from torch import nn
from torch.nn import functional as F
from transformers import AutoBackbone, BertConfig, ResNetConfig

from vit_embed import (
    VitEmbedBackbone,
    VitEmbedConfig,
    VitEmbedForContrastive,
    VitEmbedForDepthEstimation,
    VitEmbedForImageClassification,
    VitEmbedForMaskedImageModeling,
    VitEmbedModel,
    configuration_vit_embed,
)
from vit_embed.configuration_vit_embed import (
    DEFAULTS,
    GRIDLESS_STEMS,
    MEANT_FOR,
    POSITION_EMBEDDING_TYPES,
    STEM_TYPES,
    TOKEN_CHOOSING_STEMS,
)
from vit_embed.embeddings_vit_embed import POSITIONS
from vit_embed.encoder_vit_embed import VitEmbedLayer
from vit_embed.stems_vit_embed import STEMS, dct_basis, haar_basis

EVERY_PAIR = pytest.mark.parametrize(("stem", "head"), PAIRS)
EVERY_STEM = pytest.mark.parametrize("stem", FAMILY)
GRID_STEMS = [stem for stem in STEM_TYPES if stem not in GRIDLESS_STEMS]
FIXED_STEMS = [stem for stem in STEM_TYPES if stem not in TOKEN_CHOOSING_STEMS]

# Every config field that the trunk alone has no use for, so that one config serves all heads.
ALL_HEADS = {"depth_head_type": "dpt", **DECODER}


def seeded_gradients(model: nn.Module, inputs: dict, seed: int = 3) -> dict[str, torch.Tensor]:
    """Gradients of one step whose random choices are those of the seed."""
    torch.manual_seed(seed)
    return gradients(model, inputs)


def use_attention(model: nn.Module, implementation: str) -> None:
    """Sets the attention of all our towers, and of no backbone within a stem."""
    model.set_attn_implementation(implementation)
    layers = [module for module in model.modules() if isinstance(module, VitEmbedLayer)]
    assert layers and all(layer.self_attn.config._attn_implementation == implementation for layer in layers)


def assert_same_gradients(found: dict, expected: dict, tolerance: float = 1e-5) -> None:
    """Equal up to the rounding of sums in another order, which grows with the size of what is summed."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        bound = tolerance * max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


def assert_close(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], **tolerance) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, **(tolerance or CLOSE))


def conv_named(state: dict[str, torch.Tensor], kept: str) -> dict[str, torch.Tensor]:
    """The state dict of a model whose stem holds a ConvStem under the name `kept`, as that of a `conv` model."""
    prefix = "embeddings.patch_embedding."
    named = {name.replace(f"{prefix}{kept}.", prefix): value for name, value in state.items() if prefix not in name}
    named |= {
        name.replace(f"{prefix}{kept}.", prefix): value for name, value in state.items() if f"{prefix}{kept}." in name
    }
    return named


# What the tables say


def test_tables_and_names_agree():
    assert set(STEMS) == set(STEM_TYPES) and set(POSITIONS) == set(POSITION_EMBEDDING_TYPES)
    assert set(NEEDED) | set(GRIDLESS_STEMS) | set(TOKEN_CHOOSING_STEMS) <= set(STEM_TYPES)
    for stem in STEM_TYPES:
        assert STEMS[stem].__doc__ and len(STEMS[stem].__doc__) > 80, f"{stem} has to say its equation"


@pytest.mark.parametrize(("stem", "head"), REFUSED_PAIRS)
def test_heads_refuse_stems_that_they_cannot_read(stem, head):
    with pytest.raises(ValueError, match=HEADS[head].message.format(stem=stem)):
        HEADS[head].model_class(stem_config(stem, head))


# How many tokens


@EVERY_STEM
@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 64), (96, 64)])
@torch.no_grad()
def test_token_count(stem, height, width):
    model = build(stem)
    config = model.config
    grid_size = config.grid_of((height, width))
    if config.stem_type != "overlap":
        assert grid_size == (height // 8, width // 8)
    num_patches = math.prod(grid_size)
    images = pixels(4, height, width)
    found = model(images).last_hidden_state.shape[1] - config.num_prefix_tokens
    if config.stem_type in GRIDLESS_STEMS:
        assert found == config.num_learned_tokens
        return
    token_map = model.get_token_map(images)
    assert token_map.shape == (4, *grid_size)
    counts = [len(image.unique()) for image in token_map]
    assert max(counts) == found and token_map.min() == 0 and token_map.max() == found - 1
    if config.stem_type in TOKEN_CHOOSING_STEMS:
        assert all(num_patches / 4 <= count <= num_patches for count in counts)
    else:
        assert counts == [num_patches] * 4
        assert torch.equal(token_map[0].flatten(), torch.arange(num_patches))


@pytest.mark.parametrize(
    ("image", "kernel", "stride", "padding", "grid"),
    [
        (224, 7, 4, (1, 1), (55, 55)),
        (224, None, 16, (8, 8), (14, 14)),
        (224, 16, 16, (0, 0), (14, 14)),
        ((32, 48), (12, 5), (8, 4), (2, 0), (4, 11)),
    ],
)
@torch.no_grad()
def test_overlap_counts_follow_the_formula(image, kernel, stride, padding, grid):
    """floor((H + 2 p - k) / s) + 1 with p = floor((k - s) / 2)."""
    config = vision_config(stem_type="overlap", image_size=image, patch_size=stride, patch_kernel_size=kernel)
    assert config.patch_padding == padding and config.grid_size == grid
    kernels = config.patch_kernel_shape
    assert grid == tuple(
        (size + 2 * pad - k) // s + 1
        for size, pad, k, s in zip(config.image_shape, padding, kernels, config.patch_shape)
    )
    output = STEMS["overlap"](config)(pixels(1, *config.image_shape))
    assert output.grid_size == grid and output.tokens.shape == (1, math.prod(grid), 32)


@torch.no_grad()
def test_adaptive_images_of_a_batch_keep_different_counts():
    model = build("adaptive")
    images = pixels(6, 64, 64)
    counts = [len(image.unique()) for image in model.get_token_map(images)]
    assert len(set(counts)) > 2 and min(counts) < 64
    layout = model.embeddings(images).layout
    assert [int((sizes > 0).sum()) for sizes in layout.sizes] == counts
    assert (layout.sizes.sum(dim=1) == 64).all(), "every patch is counted once"
    training = model.train()(images).last_hidden_state
    assert training.shape[1] == 65, "in training all slots stay"


@torch.no_grad()
def test_token_learner_keeps_k_tokens_of_any_image():
    model = randomised(VitEmbedModel(vision_config(stem_type="token_learner", num_learned_tokens=5)))
    assert [model(pixels(2, h, w)).last_hidden_state.shape[1] for h, w in ((32, 32), (64, 96))] == [6, 6]


# Everything holds for all of them


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[tuple[str, str], tuple]:
    """The folder of every pair, its weights' digests, and its inputs and outputs: saved behind a step of training."""
    root, found = tmp_path_factory.mktemp("stems"), {}
    for number, (stem, head) in enumerate(PAIRS):
        model = build(stem, head).train()
        inputs = inputs_of(head, model.config)
        with torch.no_grad():
            model(**inputs)  # moves the statistics of batch norms
        model.eval().save_pretrained(root / str(number))
        inputs.pop("labels", None)
        expected = outputs(model, inputs)
        torch.save({"inputs": inputs, "outputs": expected}, root / f"{number}.pt")
        found[stem, head] = root / str(number), digests(model), inputs, expected
    return found


@EVERY_PAIR
def test_save_and_load_is_bit_equal(saved, stem, head):
    folder, weights, inputs, expected = saved[stem, head]
    with junk_in_new_memory():
        loaded, info = HEADS[head].model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.to_dict()["stem_type"] == FAMILY[stem]["stem_type"]
    assert digests(loaded) == weights
    found = outputs(loaded, inputs)
    assert len(found) == len(expected) and all(torch.equal(one, other) for one, other in zip(found, expected))


def load_by_auto_classes(folders: dict) -> dict[str, bool]:
    """{name: (Auto class, folder)} -> whether each gives the outputs beside it, to the bit."""
    import torch
    from fresh_process import auto_load, outputs

    torch.set_num_threads(1)
    found = {}
    for name, (auto_class, folder) in folders.items():
        kept = torch.load(f"{folder}.pt")
        given = outputs(auto_load(auto_class, folder), kept["inputs"])
        pairs = list(zip(given, kept["outputs"]))
        found[name] = len(given) == len(kept["outputs"]) and all(torch.equal(one, other) for one, other in pairs)
    return found


def test_auto_classes_load_every_stem_in_another_process(saved, tmp_path):
    """With another head each: which Auto class loads which head is test_loading's question."""
    chosen = {("hierarchical, batch norm", "classification")}
    for number, stem in enumerate(STEM_TYPES):
        heads = [head for head in HEADS if (stem, head) in saved]
        chosen.add((stem, heads[number % len(heads)]))
    folders = {f"{s}, {h}": (HEADS[h].auto_class, str(saved[s, h][0])) for s, h in sorted(chosen)}
    found = run_fresh(load_by_auto_classes, tmp_path, folders=folders)
    assert len(found) == len(folders) and all(found.values()), found


@EVERY_STEM
def test_state_is_parameters_and_the_statistics_of_batch_norms(stem):
    """transformers 5 fills non-persistent buffers with junk on load, so there are none."""
    model = build(stem)
    names = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    assert set(model.state_dict()) == names
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert {name for name, _ in model.named_buffers()} == {f"{norm}.{s}" for norm in norms for s in statistics}


def idle_parameters(model: nn.Module, head: str) -> set[str]:
    """Parameters that training gives no gradient, in any of three draws: one may take no coarse cell at all."""
    inputs = inputs_of(head, model.train().config)
    # A key's bias shifts all scores of a query alike, which softmax ignores: its gradient is zero up to rounding.
    idle = {name for name, _ in model.named_parameters() if not name.endswith("k_proj.bias")}
    for seed in range(3):
        found = seeded_gradients(model, inputs, seed)
        assert all(gradient.isfinite().all() for gradient in found.values())
        idle -= {name for name, gradient in found.items() if gradient.abs().sum() > 0}
        if not idle:
            break
    return idle


@EVERY_PAIR
def test_gradients_reach_every_parameter(stem, head):
    assert not idle_parameters(build(stem, head), head)


@EVERY_STEM
def test_gradients_reach_every_parameter_from_the_start(stem):
    """As initialised: no stem starts where it cannot learn."""
    assert not idle_parameters(VitEmbedForImageClassification(stem_config(stem, "classification")), "classification")


@EVERY_STEM
@torch.no_grad()
def test_tokens_start_about_as_large_as_those_of_conv(stem):
    """Within a factor of 30 of it: what is behind the stem is made for tokens of that size."""
    config = stem_config(stem)
    images, sizes = pixels(8), {}
    for name in ("conv", stem):
        model = VitEmbedModel(stem_config(name, hidden_size=config.hidden_size))
        sizes[name] = model.train().embeddings.patch_embedding(images).tokens.std().item()
    assert 1 / 30 < sizes[stem] / sizes["conv"] < 30, sizes


@EVERY_PAIR
def test_sdpa_equals_eager(stem, head):
    """In evaluation, where tokens may be masked or count for several; training is the test below."""
    model = build(stem, head)
    inputs = inputs_of(head, model.config)
    found, values = {}, {}
    for implementation in ("eager", "sdpa"):
        use_attention(model, implementation)
        found[implementation] = gradients(model, inputs)
        with torch.no_grad():
            values[implementation] = result(head, model(**inputs))
    assert_close(values["sdpa"], values["eager"])
    assert_same_gradients(found["sdpa"], found["eager"])


def implementations(model: nn.Module) -> set[str]:
    layers = [module for module in model.modules() if isinstance(module, VitEmbedLayer)]
    return {layer.self_attn.config._attn_implementation for layer in layers}


@pytest.mark.parametrize("stem", FAMILY)
def test_attention_can_be_changed(stem):
    """For every layer of ours, whatever the backbone of a hybrid stem has to choose from."""
    model = VitEmbedModel(stem_config(stem))
    for implementation in ("sdpa", "eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert implementations(model) == {implementation}


@pytest.mark.parametrize("head", HEADS)
def test_attention_can_be_chosen_from_the_start(head):
    for implementation in ("eager", "sdpa"):
        model = HEADS[head].model_class._from_config(stem_config("conv", head), attn_implementation=implementation)
        assert implementations(model) == {implementation}


@EVERY_STEM
def test_checkpointing_and_sdpa_change_nothing_in_training(stem):
    model = build(stem, "classification").train()
    inputs = inputs_of("classification", model.config)
    use_attention(model, "eager")
    plain = seeded_gradients(model, inputs)
    use_attention(model, "sdpa")
    assert_same_gradients(seeded_gradients(model, inputs), plain)
    calls = []
    model.trunk.encoder.layers[1].layer_norm1.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable()
    assert_same_gradients(seeded_gradients(model, inputs), plain)
    assert len(calls) == 2, "the layers were computed again"


@EVERY_PAIR
@torch.no_grad()
def test_bfloat16_is_finite_and_near_float32(stem, head):
    """bfloat16 keeps 8 bits: 0.4 % a rounding, through a stem, four layers and a head. 10 % of the norm would be far
    outside for a right result and is far inside for a wrong one, which is 140 % off."""
    model = build(stem, head)
    inputs = inputs_of(head, model.config)
    # A choice that rounding may flip is no matter of precision: make the gates decided.
    if FAMILY[stem]["stem_type"] == "adaptive":
        model.trunk.embeddings.patch_embedding.gate[3].bias.copy_(torch.tensor([1e4, 0.0]))
    exact = result(head, model(**inputs))
    rounded = result(head, model.to(torch.bfloat16)(**inputs))
    for one, other in zip(rounded, exact, strict=True):
        assert one.isfinite().all() and one.shape == other.shape
        assert (one.float() - other).norm() < 0.1 * other.norm()


@EVERY_PAIR
@torch.no_grad()
def test_rows_of_a_batch_equal_the_image_alone(stem, head):
    model = build(stem, head)
    inputs = inputs_of(head, model.config, 4, 32, 64)
    whole = result(head, model(**inputs))
    for row in range(4):
        alone = result(head, model(**{name: value[row : row + 1] for name, value in inputs.items()}))
        assert_close(alone, tuple(value[row : row + 1] for value in whole))


@EVERY_PAIR
@torch.no_grad()
def test_rectangles_are_not_transposed_squares(stem, head):
    """Images of another size than the native one, whose sides must not be mixed up on the way."""
    model = build(stem, head)
    config = model.config
    inputs = inputs_of(head, config, 2, 32, 64)
    wide = result(head, model(**inputs))
    turned = {name: value.transpose(2, 3) if value.dim() == 4 else value for name, value in inputs.items()}
    tall = result(head, model(**turned))
    expected = {
        "predicted_depth": (2, 32, 64),
        "feature_maps": (2, 32, *config.grid_of((32, 64))),
        "reconstruction": (2, 3, 32, 64),
    }
    for one, other in zip(wide, tall, strict=True):
        shape = expected.get(HEADS[head].result)
        if shape is None:
            assert one.shape == other.shape and (one - other).norm() > 1e-3 * one.norm()
        else:
            grid = (*shape[:-2], *config.grid_of((64, 32))) if "maps" in HEADS[head].result else (*shape[:-2], 64, 32)
            assert one.shape == shape and other.shape == grid
            same = other.transpose(-2, -1)
            assert same.shape != one.shape or (one - same).norm() > 1e-3 * one.norm()


@pytest.mark.parametrize(("stem", "head"), [pair for pair in PAIRS if pair[1] != "masked"])
@torch.no_grad()
def test_mixed_sizes_equal_each_image_alone(stem, head):
    model = build(stem, head)
    sizes = [(32, 64), (64, 32), (32, 64), (32, 32)]
    inputs = inputs_of(head, model.config, 4, 64, 64)
    inputs.pop("labels", None)
    mask = torch.zeros(4, 64, 64, dtype=torch.bool)
    for row, (height, width) in enumerate(sizes):
        mask[row, :height, :width] = True
    inputs["pixel_values"] = torch.where(mask[:, None], inputs["pixel_values"], torch.full((), 1e3))
    together = result(head, model(**inputs, pixel_mask=mask))
    for row, (height, width) in enumerate(sizes):
        single = {name: value[row : row + 1] for name, value in inputs.items()}
        single["pixel_values"] = single["pixel_values"][..., :height, :width]
        for one, other in zip(result(head, model(**single)), together, strict=True):
            if other.dim() > 2:  # a map: the rest of it is padding
                other = other[..., : one.shape[-2], : one.shape[-1]]
            torch.testing.assert_close(one, other[row : row + 1], **CLOSE)


@pytest.mark.parametrize("stem", STEM_TYPES)
@torch.no_grad()
def test_patch_bias_adds_biases_and_nothing_else(stem):
    with_bias = build(stem, patch_bias=True)
    plain = build(stem)
    state, without = with_bias.state_dict(), plain.state_dict()
    added = set(state) - set(without)
    assert added and all(name.endswith("bias") and "patch_embedding" in name for name in added)
    with_bias.load_state_dict({**{name: torch.zeros_like(state[name]) for name in added}, **without})
    assert_close((with_bias(pixels()).pooler_output,), (plain(pixels()).pooler_output,))
    for name in added:
        with_bias.get_parameter(name).normal_()
    assert (with_bias(pixels()).pooler_output - plain(pixels()).pooler_output).abs().max() > 1e-3


@EVERY_STEM
@torch.no_grad()
def test_another_native_size_computes_the_same(stem):
    """Positions resampled once, or at every call, are the same numbers; nothing else knows the native size."""
    model = build(stem)
    images = pixels(2, 64, 96)
    before = model(images).last_hidden_state
    model.set_image_size((64, 96))
    assert model.config.grid_size == model.config.grid_of((64, 96))
    assert torch.equal(model(images).last_hidden_state, before)


# torch.compile. backend="eager" runs the graph that was captured as it is: what can break is in the capture.


def compiled(model: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="eager")


@pytest.mark.parametrize("stem", STEM_TYPES)
def test_compiles_without_graph_breaks(stem):
    """The stem in evaluation, the whole model in training: random choices included, with the draws of a seed."""
    model = build(stem, "classification", num_hidden_layers=1)
    inputs = inputs_of("classification", model.config)
    with torch.no_grad():
        embeddings = model.trunk.embeddings
        tokens = compiled(embeddings)(inputs["pixel_values"]).tokens
        expected, layout = embeddings(inputs["pixel_values"])[:2]
        if layout.sizes is None:
            assert torch.equal(tokens, expected)
        else:  # compiled, a coarse token is four equal ones
            holder = layout.token_of_patch[..., None].expand(-1, -1, 32)
            assert_close((tokens[:, 1:],), (expected[:, 1:].gather(1, holder),))
    model.train()
    again = copy.deepcopy(model)
    torch.manual_seed(5)
    loss = compiled(model)(**inputs).loss
    torch.manual_seed(5)
    torch.testing.assert_close(loss, again(**inputs).loss)


@pytest.mark.parametrize(
    ("head", "fields", "training"),
    [
        ("classification", {"token_merge_size": 3}, False),
        ("depth-deconv", {"token_merge_size": 3}, False),
        ("classification", {"patch_drop_rate": 0.5}, True),
        ("masked", {}, True),
        ("depth-dpt", {"stem_type": "hierarchical", "use_feature_pyramid": True}, True),
    ],
)
def test_fewer_tokens_compile_without_graph_breaks(head, fields, training):
    layers = {} if head == "depth-dpt" else {"num_hidden_layers": 2}
    model = build("conv", head, **layers, **fields).train(training)
    inputs = inputs_of(head, model.config)
    inputs.pop("bool_masked_pos", None)  # drawn: how many a given mask hides is read from the data
    torch.manual_seed(5)
    found = compiled(model)(**inputs)
    torch.manual_seed(5)
    expected = model(**inputs)
    torch.testing.assert_close(found.loss, expected.loss)
    assert_close(result(head, found), result(head, expected))


# Each stem against its equation, written out


def patches_of(images: torch.Tensor, patch: tuple[int, int]) -> torch.Tensor:
    """(B, C, H, W) -> (B, N, C, ph, pw), one slice at a time."""
    (ph, pw), (height, width) = patch, images.shape[2:]
    corners = itertools.product(range(0, height, ph), range(0, width, pw))
    return torch.stack([images[:, :, top : top + ph, left : left + pw] for top, left in corners], dim=1)


def conv_reference(images, weight, bias=None, **options) -> torch.Tensor:
    return F.conv2d(images, weight, bias, **options).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("patch_size", [8, (4, 8)])
@pytest.mark.parametrize("stem", ["linear", "dct", "wavelet", "deformable"])
@torch.no_grad()
def test_equals_conv_with_its_weight_carried_over(stem, patch_size):
    """float32, sums of up to 192 products in another basis and order: 1e-5, as the issue asks."""
    config = vision_config(patch_size=patch_size, patch_bias=True)
    conv = STEMS["conv"](config)
    nn.init.normal_(conv.weight, std=conv.init_std)
    nn.init.normal_(conv.bias)
    other = STEMS[stem](vision_config(stem_type=stem, patch_size=patch_size, patch_bias=True))
    other.weight.copy_(other.carried(conv.weight) if hasattr(other, "carried") else conv.weight.flatten(1))
    other.bias.copy_(conv.bias)
    if stem == "deformable":
        other.offsets.weight.zero_()
        other.offsets.bias.zero_()
    images = pixels(2, 64, 96)
    output = other(images)
    expected = conv_reference(images, conv.weight, conv.bias, stride=config.patch_shape)
    torch.testing.assert_close(output.tokens, expected, rtol=1e-5, atol=1e-5)
    assert output.grid_size == conv(images).grid_size == (64 // config.patch_shape[0], 96 // config.patch_shape[1])


@torch.no_grad()
def test_deformable_starts_as_conv_at_full_size():
    """A model as initialised has zero offsets. grid_sample takes places in [-1, 1], which float32 rounds to 1e-5 of a
    pixel at 224 pixels; neighbours of noise differ by up to 6, and 768 of them are summed with weights of 0.02."""
    config = vision_config(image_size=224, patch_size=16)
    model = VitEmbedModel(vision_config(stem_type="deformable", image_size=224, patch_size=16))
    stem = model.embeddings.patch_embedding
    assert not stem.offsets.weight.any() and not stem.offsets.bias.any()
    images = pixels(1, 224, 224)
    expected = conv_reference(images, stem.weight.unflatten(1, (3, *config.patch_shape)), stride=16)
    torch.testing.assert_close(stem(images).tokens, expected, rtol=0, atol=1e-4)


def deformed(move: tuple[float, float], scale: tuple[float, float], images: torch.Tensor) -> torch.Tensor:
    """What a deformable stem of patch (4, 8) reads in place of the patches when every box is moved and scaled alike:
    (B, gh, gw, C, 4, 8). Numbers are what the stem's linear layer puts out, before tanh."""
    config = vision_config(stem_type="deformable", patch_size=(4, 8))
    stem = STEMS["deformable"](config)
    with torch.no_grad():
        stem.offsets.weight.zero_()
        stem.offsets.bias.copy_(torch.tensor([*move, *scale]))
        values = stem.patch_values(images)
    grid = (images.shape[2] // 4, images.shape[3] // 8)
    return values.unflatten(2, (3, 4, 8)).unflatten(1, grid)


SATURATED = 20.0  # tanh(20) is 1 in float32


@pytest.mark.parametrize(("down", "right"), [(1, 0), (0, 1), (-1, 0), (1, -1)])
def test_a_box_moved_by_a_patch_reads_the_neighbour(down, right):
    images = pixels(2, 32, 64)
    found = deformed((down * SATURATED, right * SATURATED), (0.0, 0.0), images)
    whole = patches_of(images, (4, 8)).unflatten(1, (8, 8))
    inner = (slice(None), slice(1, 7), slice(1, 7))  # whose neighbours are in the image
    expected = whole.roll((-down, -right), dims=(1, 2))
    torch.testing.assert_close(found[inner], expected[inner], rtol=0, atol=1e-4)  # 1e-5 of a pixel, steps of up to 8
    if (down, right) == (1, 0):  # past the border its last pixels are read on
        edge = images[:, :, -1].unflatten(2, (8, 8)).permute(0, 2, 1, 3)
        torch.testing.assert_close(found[:, -1], edge[:, :, :, None].expand(-1, -1, -1, 4, -1), rtol=0, atol=1e-4)


def test_boxes_scale_about_their_centre():
    """On an image whose value is its row in one channel and its column in another, a sample is its own place."""
    rows, columns = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    images = torch.stack([rows, columns, torch.zeros_like(rows)])[None]
    found = deformed((0.0, 0.0), (SATURATED, -SATURATED), images)  # twice as high, half as wide
    within_row = torch.arange(4) + 0.5 - 2
    within_column = torch.arange(8) + 0.5 - 4
    for i, j in itertools.product(range(1, 7), range(8)):
        expected_rows = (4 * i + 2 + 2 * within_row)[:, None].expand(4, 8)
        expected_columns = (8 * j + 4 + 0.5 * within_column)[None].expand(4, 8)
        torch.testing.assert_close(found[0, i, j, 0], expected_rows, rtol=0, atol=1e-4)
        torch.testing.assert_close(found[0, i, j, 1], expected_columns, rtol=0, atol=1e-4)


def test_a_box_of_half_the_size_is_its_middle_scaled_up():
    images = pixels(2, 32, 64)
    found = deformed((0.0, 0.0), (-SATURATED, -SATURATED), images)[:, 2, 3]
    middle = images[:, :, 8:12, 24:32][:, :, 1:3, 2:6]
    expected = F.interpolate(middle, scale_factor=2, mode="bilinear", align_corners=False)
    # On its rim F.interpolate repeats the crop, where the stem sees the rest of the image.
    torch.testing.assert_close(found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], rtol=0, atol=1e-4)


def test_each_box_follows_its_own_patch():
    """Offsets come from the patch itself: with weights on them, other images read other places."""
    stem = randomised(STEMS["deformable"](vision_config(stem_type="deformable")))
    images = pixels(1)
    changed = images.clone()
    changed[..., :8, :8] += 1
    with torch.no_grad():
        values, others = stem.patch_values(images), stem.patch_values(changed)
        raw = stem.offsets(patches_of(images, (8, 8)).flatten(2))
        points = stem.sample_points(raw, (32, 32))
    corner = (patches_of(points.permute(0, 3, 1, 2), (8, 8)) * 16 + 16)[0].flatten(2)  # (N, x and y, 64) in pixels
    move, scale = raw.tanh()[0, :, :2], 2 ** raw.tanh()[0, :, 2:]
    for number, (i, j) in enumerate(itertools.product(range(4), range(4))):
        centre = torch.stack([8 * j + 4 + 8 * move[number, 1], 8 * i + 4 + 8 * move[number, 0]])
        torch.testing.assert_close(corner[number].mean(1), centre, rtol=0, atol=1e-4)
        side = corner[number].amax(1) - corner[number].amin(1)
        torch.testing.assert_close(side, 7 * scale[number].flip(0), rtol=0, atol=1e-4)
    assert not torch.equal(values[:, 0], others[:, 0])


@pytest.mark.parametrize("pointwise", [False, True])
@pytest.mark.parametrize(("patch_size", "kernel"), [(8, None), (8, (12, 9)), ((4, 8), (7, 16))])
@torch.no_grad()
def test_overlap_is_a_convolution(patch_size, kernel, pointwise):
    fields = {"patch_size": patch_size, "patch_kernel_size": kernel, "patch_pointwise": pointwise, "patch_bias": True}
    config = vision_config(stem_type="overlap", **fields)
    stem = randomised(STEMS["overlap"](config))
    weight, bias = stem.projection.weight, stem.projection.bias
    kernels = (16, 16) if kernel is None else kernel
    assert weight.shape == (32, 3, *kernels)
    padding = tuple((k - s) // 2 for k, s in zip(kernels, config.patch_shape))
    expected = F.conv2d(pixels(2, 32, 64), weight, bias, stride=config.patch_shape, padding=padding)
    assert (stem.pointwise is not None) == pointwise
    if pointwise:
        mixed = torch.einsum("oi,bihw->bohw", stem.pointwise.weight[:, :, 0, 0], expected)
        expected = mixed + stem.pointwise.bias[:, None, None]
    output = stem(pixels(2, 32, 64))
    assert output.grid_size == tuple(expected.shape[2:])
    torch.testing.assert_close(output.tokens, expected.flatten(2).transpose(1, 2), **CLOSE)


@pytest.mark.parametrize("norm", configuration_vit_embed.STEM_NORM_TYPES)
@torch.no_grad()
def test_hierarchical_is_the_sequence_of_its_layers(norm):
    stem = build("hierarchical", stem_norm_type=norm).embeddings.patch_embedding
    images = pixels(2, 32, 64)
    output = stem(images)
    hidden, maps = images, []
    for stage, (convolution, normalisation, _) in enumerate(stem.stages):
        assert convolution.weight.shape == (4 * 2 ** (stage + 1), 3 if stage == 0 else 4 * 2**stage, 3, 3)
        hidden = F.conv2d(hidden, convolution.weight, stride=2, padding=1)
        if norm == "batch_norm":
            shift, scale = normalisation.running_mean, (normalisation.running_var + normalisation.eps).sqrt()
            assert shift.abs().max() > 0.01, "statistics of the images, or the test says nothing"
            hidden = (hidden - shift[:, None, None]) / scale[:, None, None]
        else:
            mean, variance = hidden.mean(1, keepdim=True), hidden.var(1, keepdim=True, unbiased=False)
            hidden = (hidden - mean) / (variance + normalisation.eps).sqrt()
        hidden = hidden * normalisation.weight[:, None, None] + normalisation.bias[:, None, None]
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        maps.append(hidden)
    assert_close(output.feature_pyramid, tuple(maps), rtol=1e-4, atol=1e-5)
    expected = F.conv2d(hidden, stem.projection.weight).flatten(2).transpose(1, 2)
    torch.testing.assert_close(output.tokens, expected, rtol=1e-4, atol=1e-5)
    assert output.grid_size == (4, 8)


@torch.no_grad()
def test_hybrid_is_the_backbone_and_a_projection():
    for name in ("hybrid", "hybrid, ConvNext from a dict"):
        stem = build(name).embeddings.patch_embedding
        backbone = AutoBackbone.from_config(stem_config(name).backbone_config).eval()
        backbone.load_state_dict(stem.backbone.state_dict())
        features = backbone(pixels(2, 32, 64)).feature_maps[-1]
        assert features.shape == (2, 12, 4, 8)
        expected = F.conv2d(features, stem.projection.weight).flatten(2).transpose(1, 2)
        torch.testing.assert_close(stem(pixels(2, 32, 64)).tokens, expected, **CLOSE)


def test_hybrid_leaves_the_config_it_was_given_alone():
    """What is done to one model must not reach another one made from the same backbone_config."""
    given = copy.deepcopy(RESNET)
    before = given.to_dict()
    model = VitEmbedModel(vision_config(stem_type="hybrid", backbone_config=given))
    model.set_attn_implementation("eager")
    assert given.to_dict() == before
    backbone = model.embeddings.patch_embedding.backbone
    assert model.config.backbone_config is not given and backbone.config is not given


def test_hybrid_refuses_a_backbone_of_another_stride():
    backbone = ResNetConfig(**{**RESNET.to_dict(), "out_features": ["stage1"], "out_indices": None})
    model = VitEmbedModel(vision_config(stem_type="hybrid", backbone_config=backbone))
    with pytest.raises(ValueError, match=r"backbone_config must have a stride of patch_size \(8, 8\).*\(8, 8\)"):
        model(pixels())


@torch.no_grad()
def test_token_learner_is_the_formula():
    model = build("token_learner")
    stem, images = model.embeddings.patch_embedding, pixels(2, 32, 64)
    patches = conv_reference(images, stem.patches.weight, stride=8)
    placed = patches + model.embeddings.position_embedding((4, 8))[1]
    norm, narrow, _, wide = stem.maps
    normed = F.layer_norm(placed, (32,), norm.weight, norm.bias)
    inner = F.gelu(F.linear(normed, narrow.weight, narrow.bias))
    scores = F.linear(inner, wide.weight, wide.bias)  # (B, N, K)
    weights = scores.exp() / scores.exp().sum(dim=1, keepdim=True)
    expected = torch.einsum("bnk,bnd->bkd", weights, placed)
    assert expected.shape == (2, 8, 32)
    torch.testing.assert_close(model.embeddings(images).tokens[:, 1:], expected, **CLOSE)


# dct, wavelet


@pytest.mark.parametrize("basis", [dct_basis, haar_basis])
@pytest.mark.parametrize("length", [1, 2, 4, 8, 16, 32])
def test_spectral_bases_are_orthonormal(basis, length):
    rows, frequency = basis(length)
    torch.testing.assert_close(rows @ rows.t(), torch.eye(length, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(rows[0], torch.full((length,), length**-0.5, dtype=torch.float64))
    assert torch.equal(frequency, frequency.sort().values) and frequency[0] == 0


def test_haar_wavelets_are_those_of_the_textbook():
    half, root = 0.5, 0.5**0.5
    two = [[root, root], [root, -root]]
    four = [[half] * 4, [half, half, -half, -half], [root, -root, 0, 0], [0, 0, root, -root]]
    for expected, levels in ((two, [0, 1]), (four, [0, 1, 2, 2])):
        rows, level = haar_basis(len(expected))
        torch.testing.assert_close(rows, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
        assert level.tolist() == levels


def lowest(frequencies: list[list[Fraction]], count: int) -> list[tuple[int, int]]:
    """(row, column) of the `count` coefficients with the lowest sum of both frequencies, in exact arithmetic; of equal
    ones the one that comes first row by row."""
    places = itertools.product(*(range(len(axis)) for axis in frequencies))
    return sorted(places, key=lambda place: frequencies[0][place[0]] + frequencies[1][place[1]])[:count]


@pytest.mark.parametrize(
    ("patch_size", "count"),
    [
        *itertools.product([8, (4, 8), (16, 2)], [None, 1, 5, 11]),
        (14, 11),
        (14, 19),
        (14, None),
        ((6, 10), 36),
    ],
)
@torch.no_grad()
def test_dct_is_scipys_and_keeps_the_lowest_frequencies(patch_size, count):
    image_size = (56, 56) if patch_size == 14 else (24, 40) if patch_size == (6, 10) else 32
    config = vision_config(stem_type="dct", patch_size=patch_size, image_size=image_size, num_coefficients=count)
    stem, (ph, pw) = randomised(STEMS["dct"](config)), config.patch_shape
    images = pixels(2, *config.image_shape)
    coefficients = dctn(patches_of(images, (ph, pw)).double().numpy(), axes=(-2, -1), norm="ortho")
    if count is None:
        assert stem.num_kept == ph * pw and stem.weight.shape == (32, 3 * ph * pw)
        sums = np.square(coefficients).sum(axis=(-2, -1))  # an orthonormal transform keeps lengths
        found = stem.patch_values(images).unflatten(2, (3, -1)).square().sum(dim=-1)
        torch.testing.assert_close(found, torch.from_numpy(sums).float(), rtol=1e-4, atol=1e-4)
    places = lowest([[Fraction(k, side) for k in range(side)] for side in (ph, pw)], count or ph * pw)
    expected = torch.stack([torch.from_numpy(coefficients[..., row, column]) for row, column in places], dim=-1).float()
    torch.testing.assert_close(stem.patch_values(images), expected.flatten(2), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(stem(images).tokens, F.linear(expected.flatten(2), stem.weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [None, 1, 3, 6])
@torch.no_grad()
def test_wavelet_is_haars_and_keeps_the_coarsest(count):
    config = vision_config(stem_type="wavelet", patch_size=(4, 2), num_coefficients=count)
    stem, images = randomised(STEMS["wavelet"](config)), pixels(2)
    half, root = 0.5, 0.5**0.5
    tall = torch.tensor([[half] * 4, [half, half, -half, -half], [root, -root, 0, 0], [0, 0, root, -root]])
    wide = torch.tensor([[root, root], [root, -root]])
    coefficients = torch.einsum("up,bncpq,vq->bncuv", tall, patches_of(images, (4, 2)), wide)
    levels = [[Fraction(level) for level in axis] for axis in ([0, 1, 2, 2], [0, 1])]
    places = lowest(levels, count or 8)
    assert places[:3] == [(0, 0), (0, 1), (1, 0)][: len(places)]
    expected = torch.stack([coefficients[..., row, column] for row, column in places], dim=-1)
    torch.testing.assert_close(stem.patch_values(images), expected.flatten(2), **CLOSE)


# adaptive


def decided(stem: str, coarse: bool, **overrides) -> nn.Module:
    """A model whose every gate says the same, by a margin that no Gumbel noise overturns."""
    model = build("adaptive", stem, **overrides)
    gate = model.trunk.embeddings.patch_embedding.gate[3]
    with torch.no_grad():
        gate.weight.zero_()
        gate.bias.copy_(torch.tensor([-200.0, 200.0] if coarse else [200.0, -200.0]))
    return model


@torch.no_grad()
def test_adaptive_with_fine_cells_only_is_conv():
    model = decided("trunk", coarse=False)
    conv = VitEmbedModel(vision_config()).eval()
    conv.load_state_dict(conv_named(model.state_dict(), "fine"))
    images = pixels(2, 32, 64)
    torch.testing.assert_close(model(images).last_hidden_state, conv(images).last_hidden_state, **CLOSE)
    assert torch.equal(model.get_token_map(images), conv.get_token_map(images))


@torch.no_grad()
def test_adaptive_with_coarse_cells_only_is_conv_of_patches_twice_as_large():
    model = decided("trunk", coarse=True, use_cls_token=False, pooling_type="mean")
    stem, images = model.embeddings.patch_embedding, pixels(2, 32, 64)
    assert stem.coarse.weight.shape == (32, 3, 16, 16)
    positions = model.embeddings.position_embedding((4, 8))[1].view(4, 8, 32)
    means = torch.stack(
        [positions[i : i + 2, j : j + 2].mean((0, 1)) for i, j in itertools.product((0, 2), (0, 2, 4, 6))]
    )
    expected = conv_reference(images, stem.coarse.weight, stride=16) + means
    embedded = model.embeddings(images)
    torch.testing.assert_close(embedded.tokens, expected, **CLOSE)
    assert embedded.tokens.shape[1] == 32 / 4 and (embedded.layout.sizes == 4).all()
    cells = torch.arange(8).view(2, 4).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(model.get_token_map(images), cells.expand(2, -1, -1))
    hidden = model.pre_layrnorm(expected)  # all sizes are equal, so a trunk without sizes sees the same
    for layer in model.encoder.layers:
        hidden = layer(hidden)[0]
    torch.testing.assert_close(model(images).pooler_output, model.post_layernorm(hidden.mean(1)), **CLOSE)


@pytest.mark.parametrize("pooling_type", ["cls", "mean", "map"])
@torch.no_grad()
def test_adaptive_training_and_evaluation_are_the_same_numbers(pooling_type):
    """Four equal slots, or one token that counts as four: gates that are decided, differently by content."""
    model = build("adaptive", pooling_type=pooling_type)
    gate = model.embeddings.patch_embedding.gate[3]
    gate.weight.mul_(1e5)
    gate.bias.zero_()
    images = pixels(4, 64, 64)
    hard = model(images)
    assert 16 < hard.last_hidden_state.shape[1] - 1 < 64, "some cells are coarse and some are fine"
    soft = model.train()(images)
    assert soft.last_hidden_state.shape[1] == 65
    torch.testing.assert_close(soft.pooler_output, hard.pooler_output, **CLOSE)


@pytest.mark.parametrize(("coarse", "kept"), [(False, 1.0), (True, 0.25)])
def test_budget_loss_is_added_in_training(coarse, kept):
    for head in ("classification", "contrastive", "depth-deconv"):
        model = decided(head, coarse=coarse, adaptive_budget=0.4, adaptive_budget_weight=3.0)
        inputs = inputs_of(head, model.config)
        evaluated, trained = model(**inputs).loss, model.train()(**inputs).loss
        expected = evaluated + 3 * (kept - 0.4) ** 2
        torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-5)


# Positions


@pytest.mark.parametrize("scheme", POSITION_EMBEDDING_TYPES)
@pytest.mark.parametrize("stem", STEM_TYPES)
def test_every_position_scheme_on_every_stem(stem, scheme):
    """At the native grid and at others; a scheme with weights is trained, and all but "none" can be seen."""
    model = build(stem, position_embedding_type=scheme).train()
    for height, width in ((32, 32), (32, 64), (96, 64)):
        output = model(pixels(2, height, width))
        assert output.last_hidden_state.isfinite().all() and output.pooler_output.shape == (2, 32)
        positions = model.embeddings.position_embedding
        if scheme == "none":
            assert positions is None
            continue
        grid_size = model.config.grid_of((height, width))
        table = positions(grid_size)[1]
        assert table.shape == (math.prod(grid_size), 32) and len(table.unique(dim=0)) == len(table)
    output.pooler_output.square().sum().backward()
    weights = [] if scheme == "none" else list(positions.parameters())
    assert len(weights) == (scheme in ("learned", "polynomial"))
    assert all(weight.grad.abs().sum() > 0 for weight in weights)


@torch.no_grad()
def test_tokens_are_the_stems_and_their_positions():
    for stem, scheme in itertools.product(FIXED_STEMS, POSITION_EMBEDDING_TYPES):
        embeddings = build(stem, position_embedding_type=scheme).embeddings
        images = pixels(2, 32, 64)
        tokens, grid_size = embeddings.patch_embedding(images)[:2]
        if scheme != "none":
            tokens = tokens + embeddings.position_embedding(grid_size)[1]
        torch.testing.assert_close(embeddings(images).tokens[:, 1:], tokens, **CLOSE)


@pytest.mark.parametrize("degree", [1, 4, 7])
@pytest.mark.parametrize("grid_size", [(4, 4), (1, 9), (12, 5)])
@torch.no_grad()
def test_polynomial_positions_are_numpys(degree, grid_size):
    positions = POSITIONS["polynomial"](vision_config(position_embedding_type="polynomial", position_degree=degree))
    assert positions.weight.shape == ((degree + 1) ** 2, 32)
    class_position, found = positions(grid_size)
    assert class_position is None
    rows, columns = ((2 * np.arange(count) + 1) / count - 1 for count in grid_size)
    coefficients = positions.weight.double().numpy().reshape(degree + 1, degree + 1, 32)
    expected = chebval2d(*np.meshgrid(rows, columns, indexing="ij"), coefficients)  # (D, gh, gw)
    # float32 sums of 64 terms of size 1
    torch.testing.assert_close(found.double(), torch.from_numpy(expected).flatten(1).t(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_polynomial_positions_are_a_function_of_the_place():
    """A patch whose centre lies at the same place of the image has the same position, whatever the grid."""
    model = build("conv", position_embedding_type="polynomial")
    positions = model.embeddings.position_embedding
    coarse, fine = positions((4, 4))[1].view(4, 4, 32), positions((12, 20))[1].view(12, 20, 32)
    # Three, or five, patches to each of the four: the middle one has its centre.
    torch.testing.assert_close(fine[1::3, 2::5], coarse, rtol=1e-4, atol=1e-5)
    between = (fine[1:, :] - fine[:-1, :]).abs().max()
    finer = positions((120, 20))[1].view(120, 20, 32)
    assert (finer[1:] - finer[:-1]).abs().max() < 0.2 * between, "ten times finer, smaller steps: no jumps"
    before = positions.weight.clone()
    model.set_image_size((96, 160))
    assert torch.equal(positions.weight, before) and positions.weight is model.embeddings.position_embedding.weight


def test_sinusoidal_positions_are_computed():
    model = build("conv", position_embedding_type="sinusoidal")
    assert not [name for name in model.state_dict() if "position" in name]


# Padding to whole patches


@EVERY_PAIR
@torch.no_grad()
def test_padding_to_patches_equals_padding_by_hand(stem, head):
    model = build(stem, head, pad_to_patch=True)
    inputs = inputs_of(head, model.config, 2, 27, 45)
    images = inputs["pixel_values"]
    unit = model.config.image_multiple
    height, width = math.ceil(27 / unit[0]) * unit[0], math.ceil(45 / unit[1]) * unit[1]
    assert model.config.padded_shape((27, 45)) == (height, width)
    padded = images.new_zeros(2, 3, height, width)
    padded[..., :27, :45] = images
    found = result(head, model(**inputs))
    expected = result(head, model(**{**inputs, "pixel_values": padded}))
    if HEADS[head].result in ("predicted_depth", "reconstruction"):
        assert found[0].shape[-2:] == (27, 45), "as large as the image"
        expected = tuple(value[..., :27, :45] for value in expected)
    assert_close(found, expected)
    refusing = build(stem, head)
    with pytest.raises(ValueError, match=r"multiples of (twice )?patch_size.*got \(27, 45\).*pad_to_patch=True"):
        refusing(**inputs)


@pytest.mark.parametrize("stem", STEM_TYPES)
def test_native_size_that_is_padded(stem):
    config = stem_config(stem, image_size=(27, 45), pad_to_patch=True)
    model = VitEmbedModel(config)
    assert config.grid_size == config.grid_of(config.padded_shape((27, 45)))
    assert len(model.embeddings.position_embedding.weight) == 1 + math.prod(config.grid_size)
    assert model(pixels(2, 27, 45)).last_hidden_state.isfinite().all()
    with pytest.raises(ValueError, match=r"image_size=\(27, 45\) and patch_size=8.*pad_to_patch=True"):
        stem_config(stem, image_size=(27, 45))


# Combinations without a meaning


def other_than_default(field: str):
    """A value of a field that is in range and not its default: read off the default, or off the field's constant."""
    needed = {name: value for fields in NEEDED.values() for name, value in fields.items()}
    default = DEFAULTS[field]
    if field in needed or default is None:
        return needed.get(field, 8)
    if isinstance(default, bool):
        return not default
    if isinstance(default, str):
        choices = getattr(configuration_vit_embed, f"{field.upper()}S")
        return next(choice for choice in choices if choice != default)
    return default + 1 if isinstance(default, int) else default / 2


def fields_for(name: str, value: str) -> dict:
    """The fields that make `name=value` a config that stands."""
    return {name: value, **(NEEDED.get(value, {}) if name == "stem_type" else {}), **ALL_HEADS}


@pytest.mark.parametrize("field", MEANT_FOR)
def test_a_field_is_refused_where_it_has_no_meaning(field):
    other, meant = MEANT_FOR[field]
    value = other_than_default(field)
    for choice in getattr(configuration_vit_embed, f"{other.upper()}S"):
        fields = {**fields_for(other, choice), field: value}
        if choice in meant:
            assert getattr(vision_config(**fields), field) == value
            continue
        with pytest.raises(ValueError, match=f"(?s){field}=.*{other}='{choice}'; leave {field} at"):
            vision_config(**fields)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"use_cls_token": False}, ["pooling_type='cls'", "use_cls_token=True"]),
        (
            {"position_embedding_type": "sinusoidal", "hidden_size": 6, "num_attention_heads": 2},
            ["position_embedding_type='sinusoidal'", "hidden_size=6"],
        ),
        *(
            ({**FAMILY[stem], "patch_drop_rate": 0.5}, ["patch_drop_rate=0.5", f"stem_type='{stem}'"])
            for stem in TOKEN_CHOOSING_STEMS
        ),
        ({"stem_type": "adaptive", "token_merge_size": 2}, ["token_merge_size=2", "stem_type='adaptive'"]),
        (
            {"stem_type": "hierarchical", "use_feature_pyramid": True},
            ["use_feature_pyramid=True", "depth_head_type='dpt'", "got depth_head_type='deconv'"],
        ),
        ({"image_size": 36}, ["image_size=36", "patch_size=8", "pad_to_patch=True"]),
        (
            {"stem_type": "adaptive", "image_size": 40},
            ["image_size=40", "twice patch_size", "stem_type='adaptive'", "patch_size=8", "pad_to_patch=True"],
        ),
        ({"stem_type": "overlap", "patch_kernel_size": 0}, ["patch_kernel_size must be pixels > 0", "0"]),
        ({"stem_type": "overlap", "patch_kernel_size": 7}, ["patch_kernel_size", "7", "patch_size=8"]),
        ({"stem_type": "overlap", "patch_kernel_size": (16, 7)}, ["patch_kernel_size", "(16, 7)", "patch_size=8"]),
        ({"stem_type": "hierarchical", "patch_size": (8, 4)}, ["stem_type='hierarchical'", "patch_size", "(8, 4)"]),
        (
            {"stem_type": "hierarchical", "patch_size": 12, "image_size": 48},
            ["stem_type='hierarchical'", "patch_size", "12"],
        ),
        ({"stem_type": "hierarchical", "patch_size": 1}, ["stem_type='hierarchical'", "patch_size"]),
        (
            {
                "stem_type": "hierarchical",
                "patch_size": 4,
                "use_feature_pyramid": True,
                "depth_head_type": "dpt",
            },
            ["use_feature_pyramid=True", "patch_size=4"],
        ),
        (
            {"stem_type": "wavelet", "patch_size": (8, 12), "image_size": 48},
            ["stem_type='wavelet'", "patch_size", "(8, 12)"],
        ),
        ({"stem_type": "dct", "num_coefficients": 0}, ["num_coefficients must be an integer >= 1, got 0"]),
        ({"stem_type": "dct", "num_coefficients": 65}, ["num_coefficients", "64 pixels", "65", "patch_size=8"]),
        ({"stem_type": "wavelet", "num_coefficients": 65}, ["num_coefficients", "65", "patch_size=8"]),
        ({"stem_type": "hybrid"}, ["stem_type='hybrid'", "backbone_config", "got None"]),
        ({"stem_type": "adaptive", "adaptive_budget": 0.2}, ["adaptive_budget", "[0.25, 1]", "0.2"]),
        ({"stem_type": "adaptive", "adaptive_budget": 1.1}, ["adaptive_budget", "1.1"]),
        ({"stem_type": "adaptive", "adaptive_budget": "half"}, ["adaptive_budget", "'half'"]),
        ({"stem_type": "adaptive", "adaptive_budget_weight": -1.0}, ["adaptive_budget_weight", ">= 0", "-1.0"]),
        ({"stem_type": "adaptive", "adaptive_budget_weight": math.nan}, ["adaptive_budget_weight", "nan"]),
        ({"token_merge_size": 9}, ["token_merge_size", "half of the 16 patch tokens", "9"]),
        ({"stem_type": "token_learner", "token_merge_size": 5}, ["token_merge_size", "half of the 8", "5"]),
        ({"stem_type": "token_learner", "num_learned_tokens": 0}, ["num_learned_tokens must be an integer >= 1"]),
        ({"patch_drop_rate": 1.0}, ["patch_drop_rate must be a number in [0, 1), got 1.0"]),
        ({"patch_drop_rate": -0.1}, ["patch_drop_rate must be a number in [0, 1), got -0.1"]),
        ({"mask_ratio": 1.0}, ["mask_ratio must be a number in [0, 1), got 1.0"]),
        ({"token_merge_size": -1}, ["token_merge_size must be an integer >= 0, got -1"]),
        ({"position_embedding_type": "polynomial", "position_degree": 0}, ["position_degree must be an integer >= 1"]),
        ({"pad_to_patch": "yes"}, ["pad_to_patch must be one of True, False; got 'yes'"]),
        ({"stem_type": "hierarchical", "stem_norm_type": "group_norm"}, ["stem_norm_type must be one of layer_norm"]),
        (
            {"decoder_hidden_size": 24, "decoder_num_attention_heads": 5},
            ["decoder_hidden_size=24", "decoder_num_attention_heads=5"],
        ),
        (
            {"decoder_hidden_size": 18, "decoder_num_attention_heads": 3},
            ["decoder_hidden_size=18", "of 4", "decoder_num_attention_heads=3"],
        ),
        ({"out_features": ["pyramid1"]}, ["out_features must be among ['stem', 'stage1'", "['pyramid1']"]),
    ],
)
def test_combinations_without_a_meaning_are_refused(overrides, named):
    with pytest.raises(ValueError) as refused:
        vision_config(**overrides)
    assert not [name for name in named if name not in str(refused.value)], str(refused.value)


@pytest.mark.parametrize("value", ["resnet", 3, {"hidden_sizes": [8]}])
def test_a_backbone_config_of_the_wrong_type_is_refused(value):
    with pytest.raises(TypeError, match="backbone_config must be a config of transformers"):
        vision_config(stem_type="hybrid", backbone_config=value)


def test_a_config_of_a_model_that_is_no_backbone_is_refused():
    with pytest.raises(ValueError, match="backbone_config"):
        VitEmbedModel(vision_config(stem_type="hybrid", backbone_config=BertConfig()))


def images_and(**inputs) -> dict:
    return {"pixel_values": pixels(2), **inputs}


PYRAMID = {"stem_type": "hierarchical", "use_feature_pyramid": True, "depth_head_type": "dpt"}
MASK = torch.ones(2, 32, 32, dtype=torch.bool)
PATCHES = torch.randn(2, 32, 4, 4)


@pytest.mark.parametrize(
    ("model_class", "fields", "call", "inputs", "named"),
    [
        (
            VitEmbedModel,
            {"stem_type": "adaptive"},
            "forward",
            {"patch_embeds": PATCHES},
            ["patch_embeds", "stem_type='adaptive'"],
        ),
        (
            VitEmbedForDepthEstimation,
            PYRAMID,
            "forward",
            {"patch_embeds": PATCHES},
            ["use_feature_pyramid=True", "patch_embeds"],
        ),
        (
            VitEmbedForDepthEstimation,
            PYRAMID,
            "forward",
            images_and(pixel_mask=MASK),
            ["use_feature_pyramid=True", "pixel_mask"],
        ),
        (
            VitEmbedBackbone,
            {"stem_type": "hierarchical", "out_features": ["pyramid1", "stage2"]},
            "forward",
            {"patch_embeds": PATCHES},
            ["out_features=['pyramid1', 'stage2']", "patch_embeds"],
        ),
        (
            VitEmbedBackbone,
            {"stem_type": "hierarchical", "out_features": ["pyramid3"]},
            "forward",
            images_and(pixel_mask=MASK),
            ["out_features=['pyramid3']", "pixel_mask"],
        ),
        (VitEmbedModel, {}, "forward", {"patch_embeds": PATCHES, "pixel_mask": MASK}, ["pixel_mask", "patch_embeds"]),
        (
            VitEmbedModel,
            {"token_merge_size": 2},
            "forward",
            images_and(pixel_mask=MASK),
            ["token_merge_size=2", "pixel_mask"],
        ),
        *(
            (model_class, FAMILY[stem], call, images_and(), [f"stem_type='{stem}'", "use another stem_type"])
            for stem in GRIDLESS_STEMS
            for model_class, call in (
                (VitEmbedModel, "get_token_map"),
                (VitEmbedModel, "get_class_attentions"),
                (VitEmbedForContrastive, "get_patch_features"),
            )
        ),
    ],
)
def test_calls_without_a_meaning_are_refused(model_class, fields, call, inputs, named):
    config = dual_config if model_class is VitEmbedForContrastive else vision_config
    model = model_class(config(**fields)).eval()
    with pytest.raises(ValueError) as refused:
        getattr(model, call)(**inputs)
    assert not [name for name in named if name not in str(refused.value)], str(refused.value)


@pytest.mark.parametrize("model_class", [VitEmbedForDepthEstimation, VitEmbedForMaskedImageModeling])
def test_dense_heads_refuse_to_drop_patches(model_class):
    with pytest.raises(ValueError, match="patch_drop_rate=0, got 0.5|patch_drop_rate=0.5.*patch_drop_rate=0$"):
        model_class(vision_config(patch_drop_rate=0.5, **DECODER))


def test_masked_image_modelling_refuses_a_grid_that_is_not_the_patches():
    config = vision_config(stem_type="overlap", patch_kernel_size=11, patch_size=8, **DECODER)
    assert config.grid_size == (3, 3)
    with pytest.raises(ValueError, match=r"one token a patch, \(4, 4\).*patch_kernel_size=11.*patch_size=8.*\(3, 3\)"):
        VitEmbedForMaskedImageModeling(config)


# The feature pyramid


def test_pyramid_of_vit_b_16():
    """Widths and sizes of SOURCES.md: 224 -> 112, 56, 28, 14 at 96, 192, 384, 768."""
    config = VitEmbedConfig(stem_type="hierarchical", num_hidden_layers=1)
    assert config.pyramid_widths == (96, 192, 384, 768)
    with torch.device("meta"):
        stem = STEMS["hierarchical"](config)
        output = stem(torch.empty(2, 3, 224, 224))
    expected = [(2, width, side, side) for width, side in zip((96, 192, 384, 768), (112, 56, 28, 14))]
    assert [tuple(maps.shape) for maps in output.feature_pyramid] == expected
    assert output.tokens.shape == (2, 196, 768) and output.grid_size == (14, 14)


@torch.no_grad()
def test_pyramid_is_an_output_of_the_trunk():
    model = build("hierarchical")
    found = model(pixels(2, 32, 64)).feature_pyramid
    assert [tuple(maps.shape) for maps in found] == [(2, 8, 16, 32), (2, 16, 8, 16), (2, 32, 4, 8)]
    assert_close(found, model.embeddings.patch_embedding(pixels(2, 32, 64)).feature_pyramid)
    for stem in set(STEM_TYPES) - {"hierarchical"}:
        assert build(stem)(pixels()).feature_pyramid is None


@torch.no_grad()
def test_backbone_gives_the_maps_of_the_pyramid():
    names = ["pyramid1", "pyramid3", "stem", "stage4"]
    model = build("hierarchical", "backbone", out_features=names)
    assert model.stage_names == ["pyramid1", "pyramid2", "pyramid3", "stem", "stage1", "stage2", "stage3", "stage4"]
    assert model.channels == [8, 32, 32, 32] and model.out_indices == [0, 2, 3, 7]
    assert model.out_feature_channels == {
        **dict(zip(model.stage_names, (8, 16, 32))),
        **dict.fromkeys(model.stage_names[3:], 32),
    }
    images = pixels(2, 32, 64)
    found = model(images).feature_maps
    assert [maps.shape[1] for maps in found] == model.channels
    trunk = model.vision_model(images, output_hidden_states=True)
    dense = [
        model.vision_model.post_layernorm(trunk.hidden_states[i][:, 1:]).transpose(1, 2).unflatten(2, (4, 8))
        for i in (0, 4)
    ]
    assert_close(found, (trunk.feature_pyramid[0], trunk.feature_pyramid[2], *dense))
    alone = build("hierarchical", "backbone", out_features=["stage2"])
    assert_close(alone(images).feature_maps, (alone.vision_model.feature_map(
        alone.vision_model.forward_features(images, output_hidden_states=True), 2
    ),))  # fmt: skip


def test_depth_reads_its_two_finest_levels_from_the_pyramid():
    model = build("hierarchical", "depth-dpt", use_feature_pyramid=True)
    read = []
    hook = model.depth_head.register_forward_pre_hook(lambda _, inputs: read.extend(inputs[0]))
    images = pixels(2, 32, 64)
    depth = model(images).predicted_depth
    hook.remove()
    trunk = model.vision_model(images, output_hidden_states=True)
    maps = [
        model.vision_model.post_layernorm(trunk.hidden_states[i][:, 1:]).transpose(1, 2).unflatten(2, (4, 8))
        for i in (3, 4)
    ]
    assert_close(tuple(read), (*trunk.feature_pyramid[:2], *maps))  # strides 2 and 4 of patch 8
    assert [tuple(level.shape[1:]) for level in read] == [(8, 16, 32), (16, 8, 16), (32, 4, 8), (32, 4, 8)]
    for gradient in torch.autograd.grad(depth.sum(), read):
        assert gradient.abs().sum() > 0

    def without_pyramid(_, inputs):
        return ((*(torch.zeros_like(level) for level in inputs[0][:2]), *inputs[0][2:]),)

    model.depth_head.register_forward_pre_hook(without_pyramid)
    with torch.no_grad():
        assert (model(images).predicted_depth - depth).abs().max() > 1e-3


def test_depth_with_a_pyramid_trains():
    torch.manual_seed(0)
    config = vision_config(**PYRAMID, depth_loss="l1", layer_scale_init_value=None)
    model = VitEmbedForDepthEstimation(config).train()
    images = pixels(4)
    labels = 1 + images[:, 0].abs()
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-4)
    before = {name: value.clone() for name, value in model.named_parameters() if "stages" in name}
    losses = []
    for _ in range(25):
        optimiser.zero_grad()
        loss = model(images, labels=labels).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    after = dict(model.named_parameters())
    assert before and all(not torch.equal(value, after[name]) for name, value in before.items())
