"""The family of patch embeddings: what holds for every stem with every head, and what each stem alone must equal.

The suite runs over `stem_family.py`: a new stem is tested by being in STEM_TYPES.
"""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from catalogue import mostly_heavy
from fresh_process import digests, junk_in_new_memory, outputs, run_fresh
from numpy.polynomial.chebyshev import chebval2d
from stem_family import (
    FAMILY,
    HEADS,
    NEEDED,
    PAIRS,
    PYRAMID_STEMS,
    REFUSED_PAIRS,
    assert_close,
    build,
    inputs_of,
    positions_of,
    read_stem,
    result,
    stem_config,
)
from tiny import CLOSE, clip_model, gradients, pixels, randomised, vision_config
from torch import nn

from vit_embed import (
    VitEmbedConfig,
    VitEmbedForDepthEstimation,
    VitEmbedForImageClassification,
    VitEmbedModel,
)
from vit_embed.embeddings_vit_embed import POSITIONS
from vit_embed.encoder_vit_embed import VitEmbedLayer
from vit_embed.options_vit_embed import GRIDLESS_STEMS, POSITION_EMBEDDING_TYPES, STEM_TYPES, TOKEN_CHOOSING_STEMS
from vit_embed.stems_vit_embed import STEMS

EVERY_PAIR = pytest.mark.parametrize(("stem", "head"), PAIRS)
EVERY_STEM = pytest.mark.parametrize("stem", FAMILY)
GRID_STEMS = [stem for stem in STEM_TYPES if stem not in GRIDLESS_STEMS]
FIXED_STEMS = [stem for stem in STEM_TYPES if stem not in TOKEN_CHOOSING_STEMS]


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
    assert output.layout.grid_size == grid and output.states.shape == (1, math.prod(grid), 32)


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


@pytest.mark.parametrize("head", ["classification", "depth-dpt", "backbone"])
@pytest.mark.parametrize("stem", PYRAMID_STEMS)
def test_gradients_reach_every_parameter_of_a_stem_with_a_pyramid(stem, head):
    """Whether or not the head reads it. ConvNext has a norm for each map; those of the finer ones ask for none."""
    stages = {"out_features": ["stem", "stage4"]} if head == "backbone" else {}
    model = build(stem, head, **PYRAMID_STEMS[stem], **stages)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert idle_parameters(model, head) == frozen
    norms = {f"hidden_states_norms.stage{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    assert {name.split("backbone.")[-1] for name in frozen} == (norms if stem == "hybrid" else set())


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
        sizes[name] = read_stem(model.train().embeddings, images).states.std().item()
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


@pytest.mark.parametrize("stem", mostly_heavy(STEM_TYPES, "adaptive", "token_learner"))
def test_compiles_without_graph_breaks(stem):
    """The stem in evaluation, the whole model in training: random choices included, with the draws of a seed."""
    model = build(stem, "classification", num_hidden_layers=1)
    inputs = inputs_of("classification", model.config)
    with torch.no_grad():
        embeddings = model.trunk.embeddings
        tokens = compiled(embeddings)(inputs["pixel_values"]).states
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


# Positions


@pytest.mark.parametrize("scheme", POSITION_EMBEDDING_TYPES)
@pytest.mark.parametrize("stem", STEM_TYPES)
def test_every_position_scheme_on_every_stem(stem, scheme):
    """At the native grid and at others; a scheme with weights is trained, and all but "none" can be seen."""
    model = build(stem, position_embedding_type=scheme).train()
    for height, width in ((32, 32), (32, 64), (96, 64)):
        output = model(pixels(2, height, width))
        assert output.last_hidden_state.isfinite().all() and output.pooler_output.shape == (2, 32)
        grid_size = model.config.grid_of((height, width))
        table = positions_of(model.embeddings, grid_size)
        if scheme == "none":
            assert table is None
            continue
        assert table.shape == (math.prod(grid_size), 32) and len(table.unique(dim=0)) == len(table)
    output.pooler_output.square().sum().backward()
    weights = [weight for name, weight in model.named_parameters() if "position_embedding" in name]
    assert len(weights) == (scheme in ("learned", "polynomial"))
    assert all(weight.grad.abs().sum() > 0 for weight in weights)


@torch.no_grad()
def test_tokens_are_the_stems_and_their_positions():
    for stem, scheme in itertools.product(FIXED_STEMS, POSITION_EMBEDDING_TYPES):
        embeddings = build(stem, position_embedding_type=scheme).embeddings
        images = pixels(2, 32, 64)
        tokens, layout = read_stem(embeddings, images)[:2]
        if scheme != "none":
            tokens = tokens + positions_of(embeddings, layout.grid_size)
        torch.testing.assert_close(embeddings(images).states[:, 1:], tokens, **CLOSE)


@pytest.mark.parametrize("degree", [1, 4, 7])
@pytest.mark.parametrize("grid_size", [(4, 4), (1, 9), (12, 5)])
@torch.no_grad()
def test_polynomial_positions_are_numpys(degree, grid_size):
    config = vision_config(position_embedding_type="polynomial", position_degree=degree)
    embeddings = VitEmbedModel(config).embeddings
    positions = nn.init.normal_(embeddings.position_embedding.weight)
    assert positions.shape == ((degree + 1) ** 2, 32)
    found = positions_of(embeddings, grid_size)
    rows, columns = ((2 * np.arange(count) + 1) / count - 1 for count in grid_size)
    coefficients = positions.double().numpy().reshape(degree + 1, degree + 1, 32)
    expected = chebval2d(*np.meshgrid(rows, columns, indexing="ij"), coefficients)  # (D, gh, gw)
    # float32 sums of 64 terms of size 1
    torch.testing.assert_close(found.double(), torch.from_numpy(expected).flatten(1).t(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_polynomial_positions_are_a_function_of_the_place():
    """A patch whose centre lies at the same place of the image has the same position, whatever the grid."""
    model = build("conv", position_embedding_type="polynomial")
    coarse, fine, finer = (
        positions_of(model.embeddings, grid).view(*grid, 32) for grid in ((4, 4), (12, 20), (120, 20))
    )
    # Three, or five, patches to each of the four: the middle one has its centre.
    torch.testing.assert_close(fine[1::3, 2::5], coarse, rtol=1e-4, atol=1e-5)
    between = (fine[1:, :] - fine[:-1, :]).abs().max()
    assert (finer[1:] - finer[:-1]).abs().max() < 0.2 * between, "ten times finer, smaller steps: no jumps"
    weight = model.embeddings.position_embedding.weight
    before = weight.clone()
    model.set_image_size((96, 160))
    assert torch.equal(weight, before) and weight is model.embeddings.position_embedding.weight


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
    assert output.states.shape == (2, 196, 768) and output.layout.grid_size == (14, 14)


@torch.no_grad()
def test_pyramid_is_an_output_of_the_trunk():
    model = build("hierarchical")
    found = model(pixels(2, 32, 64)).feature_pyramid
    assert [tuple(maps.shape) for maps in found] == [(2, 8, 16, 32), (2, 16, 8, 16), (2, 32, 4, 8)]
    assert_close(found, model.embeddings.patch_embedding(pixels(2, 32, 64)).feature_pyramid)
    for stem in set(STEM_TYPES) - {"hierarchical"}:
        assert build(stem)(pixels()).feature_pyramid is None


@torch.no_grad()
def test_pyramid_of_a_hybrid_is_the_maps_of_its_backbone():
    model = build("hybrid", **PYRAMID_STEMS["hybrid"])
    assert model.config.pyramid_widths == (8, 12, 16)
    images = pixels(2, 32, 64)
    found = model(images).feature_pyramid
    assert_close(found, model.embeddings.patch_embedding.backbone(images).feature_maps)
    assert [tuple(maps.shape) for maps in found] == [(2, 8, 16, 32), (2, 12, 8, 16), (2, 16, 4, 8)]
    backbone = build("hybrid", "backbone", **PYRAMID_STEMS["hybrid"], out_features=["pyramid1", "pyramid3", "stage4"])
    assert backbone.channels == [8, 16, 32]
    assert_close(
        backbone(images).feature_maps[:2],
        tuple(backbone.vision_model.embeddings.patch_embedding.backbone(images).feature_maps[::2]),
    )


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
    hidden = alone.vision_model(images, output_hidden_states=True).hidden_states[2]
    expected = alone.vision_model.post_layernorm(hidden[:, 1:]).transpose(1, 2).unflatten(2, (4, 8))
    assert_close(alone(images).feature_maps, (expected,))


@pytest.mark.parametrize("stem", PYRAMID_STEMS)
def test_depth_reads_its_two_finest_levels_from_the_pyramid(stem):
    model = build(stem, "depth-dpt", **PYRAMID_STEMS[stem])
    fine, middle, _ = model.config.pyramid_widths
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
    assert [tuple(level.shape[1:]) for level in read] == [(fine, 16, 32), (middle, 8, 16), (32, 4, 8), (32, 4, 8)]
    for gradient in torch.autograd.grad(depth.sum(), read):
        assert gradient.abs().sum() > 0

    def without_pyramid(_, inputs):
        return ((*(torch.zeros_like(level) for level in inputs[0][:2]), *inputs[0][2:]),)

    model.depth_head.register_forward_pre_hook(without_pyramid)
    with torch.no_grad():
        assert (model(images).predicted_depth - depth).abs().max() > 1e-3


@pytest.mark.parametrize("stem", PYRAMID_STEMS)
def test_depth_with_a_pyramid_trains(stem):
    torch.manual_seed(0)
    config = vision_config(**PYRAMID_STEMS[stem], depth_loss="l1", layer_scale_init_value=None)
    model = VitEmbedForDepthEstimation(config).train()
    images = pixels(4)
    labels = 1 + images[:, 0].abs()
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-4)
    before = {name: value.clone() for name, value in model.named_parameters() if "stages" in name}  # the stem's
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


# Precision and sizes


@pytest.mark.parametrize("scheme", POSITION_EMBEDDING_TYPES)
@pytest.mark.parametrize("stem", FAMILY)
@torch.no_grad()
def test_autocast_leaves_the_residual_stream_in_float32(stem, scheme):
    """Its matrix products round to bfloat16; a stream that did so as well would add up the roundings of all layers."""
    model = build(stem, position_embedding_type=scheme)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pixels(), output_hidden_states=True)
    assert {state.dtype for state in output.hidden_states} == {torch.float32}


@torch.no_grad()
def test_autocast_is_no_further_from_float32_than_clips(tmp_path):
    """1.1: both are roundings of the same size at other places, averaged over 96 images."""
    stock = clip_model()
    stock.save_pretrained(tmp_path)
    ours, images = VitEmbedModel.from_pretrained(tmp_path).eval(), pixels(96)
    errors = []
    for vision_model in (ours, stock.vision_model):
        exact = vision_model(images).pooler_output
        with torch.autocast("cpu", torch.bfloat16):
            errors.append((vision_model(images).pooler_output - exact).square().mean().sqrt())
    assert errors[0] <= 1.1 * errors[1]


def test_what_may_merge_is_held_against_the_size_asked_for(tmp_path):
    VitEmbedModel(vision_config()).save_pretrained(tmp_path)
    larger = VitEmbedModel.from_pretrained(tmp_path, image_size=64, token_merge_size=16).eval()
    assert larger.config.token_merge_size == 16
    assert larger(pixels(1, 64, 64)).last_hidden_state.shape[1] == 1 + 64 - 16 - 16 - 16 - 8  # half of 16 in the last
    config = VitEmbedConfig.from_pretrained(tmp_path, image_size=64, token_merge_size=16)
    assert VitEmbedModel.from_pretrained(tmp_path, config=config).config.token_merge_size == 16
    with pytest.raises(ValueError, match="token_merge_size must be at most half of the 64 patch tokens, got 33"):
        VitEmbedModel.from_pretrained(tmp_path, image_size=64, token_merge_size=33)


@pytest.mark.parametrize("head", ["depth-deconv", "backbone", "masked"])
def test_dense_heads_leave_no_pooler_without_a_gradient(head):
    model = build("conv", head, pooling_type="map").train()
    gradients(model, inputs_of(head, model.config))
    asked = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert asked and not any(".pooler." in name for name in asked)
    assert all(model.get_parameter(name).grad is not None for name in asked)


def test_the_trunk_alone_says_what_the_stem_adds_to_a_loss():
    model = build("adaptive").train()
    assert model(pixels()).stem_loss.requires_grad
    assert model.eval()(pixels()).stem_loss is None and build("conv").train()(pixels()).stem_loss is None
