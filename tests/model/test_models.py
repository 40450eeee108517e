"""What holds for every class and option: one table of models, one suite."""

import pytest
import torch
from tiny import (
    CLOSE,
    SIGLIP,
    dual_config,
    gradients,
    hidden_patches,
    pixels,
    randomised,
    score,
    tokens,
    use_attention,
    vision_config,
)
from torch import nn

from vit_embed import (
    VitEmbedBackbone,
    VitEmbedForContrastive,
    VitEmbedForDepthEstimation,
    VitEmbedForImageClassification,
    VitEmbedForMaskedImageModeling,
    VitEmbedModel,
    VitEmbedModelWithProjection,
    VitEmbedTextModel,
)

# name: (class, config, inputs as a function)
CLASSES = {
    "trunk": (VitEmbedModel, vision_config, lambda: {"pixel_values": pixels()}),
    "text": (VitEmbedTextModel, lambda: dual_config().text_config, lambda: {"input_ids": tokens()}),
    "classification": (
        VitEmbedForImageClassification,
        lambda: vision_config(num_labels=5),
        lambda: {"pixel_values": pixels(), "labels": torch.tensor([0, 4, 2])},
    ),
    "depth-deconv": (
        VitEmbedForDepthEstimation,
        vision_config,
        lambda: {"pixel_values": pixels(), "labels": pixels()[:, 0].abs()},
    ),
    "depth-deconv-wide": (
        VitEmbedForDepthEstimation,
        lambda: vision_config(deconv_kernel_size=4, depth_activation="identity", depth_loss="l1"),
        lambda: {"pixel_values": pixels(), "labels": pixels()[:, 0].abs()},
    ),
    "depth-dpt": (
        VitEmbedForDepthEstimation,
        lambda: vision_config(depth_head_type="dpt", max_depth=10.0),
        lambda: {"pixel_values": pixels(), "labels": pixels()[:, 0].abs()},
    ),
    "contrastive": (VitEmbedForContrastive, dual_config, lambda: {"pixel_values": pixels(), "input_ids": tokens()}),
    "contrastive-sigmoid": (
        VitEmbedForContrastive,
        lambda: dual_config(contrastive_loss="sigmoid"),
        lambda: {"pixel_values": pixels(), "input_ids": tokens()},
    ),
    "contrastive-siglip": (
        VitEmbedForContrastive,
        lambda: dual_config(**SIGLIP),
        lambda: {"pixel_values": pixels(), "input_ids": tokens()},
    ),
    "projection": (VitEmbedModelWithProjection, vision_config, lambda: {"pixel_values": pixels()}),
    "masked": (
        VitEmbedForMaskedImageModeling,
        vision_config,
        lambda: {"pixel_values": pixels(), "bool_masked_pos": hidden_patches()},
    ),
    "backbone": (VitEmbedBackbone, lambda: vision_config(out_indices=[0, 2, 4]), lambda: {"pixel_values": pixels()}),
}
# Options of the trunk, each of them on the classification head, whose loss reaches everything.
OPTIONS = {
    "linear stem": {"stem_type": "linear", "patch_bias": True},
    "sinusoidal": {"position_embedding_type": "sinusoidal"},
    "no positions": {"position_embedding_type": "none"},
    "registers": {"num_register_tokens": 3},
    "no class token": {"use_cls_token": False, "pooling_type": "mean"},
    "map pooling": {"pooling_type": "map"},
    "norm before mean": {"pooling_type": "mean", "norm_before_pooling": True},
    "rms norm": {"norm_type": "rms_norm"},
    "final rms norm": {"final_norm_type": "rms_norm"},
    "no final norm": {"final_norm_type": "none"},
    "post norm": {"norm_position": "post", "use_pre_layernorm": False},
    "layer scale": {"layer_scale_init_value": 0.1, "qkv_bias": False},
    "gelu": {"hidden_act": "gelu"},
    "relu": {"hidden_act": "relu"},
    "silu": {"hidden_act": "silu"},
    "rectangle": {"image_size": (32, 64), "patch_size": (8, 4)},
}
for option, fields in OPTIONS.items():
    CLASSES[option] = (
        VitEmbedForImageClassification,
        lambda fields=fields: vision_config(num_labels=5, **fields),
        CLASSES["classification"][2],
    )
EVERY = pytest.mark.parametrize("name", CLASSES)


def build(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model_class, config, inputs = CLASSES[name]
    return randomised(model_class(config())), inputs()


@EVERY
def test_gradients_reach_every_parameter(name):
    model, inputs = build(name)
    found = gradients(model, inputs)
    idle = {n for n, _ in model.named_parameters() if n not in found or not found[n].abs().sum() > 0}
    if name == "backbone":
        assert not idle
    # A key's bias shifts all scores of a query alike, which softmax ignores: its gradient is zero up to rounding.
    assert {n for n in idle if not n.endswith("k_proj.bias")} == set()


@EVERY
def test_sdpa_equals_eager(name):
    model, inputs = build(name)
    results = {}
    for implementation in ("eager", "sdpa"):
        use_attention(model, implementation)
        results[implementation] = gradients(model, inputs)
    assert results["eager"].keys() == results["sdpa"].keys()
    for parameter, gradient in results["eager"].items():
        bound = 1e-5 * max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(results["sdpa"][parameter], gradient, rtol=1e-4, atol=bound)


@EVERY
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_equal_gradients(name, use_reentrant):
    model, inputs = build(name)
    model.train()
    plain = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert model.is_gradient_checkpointing
    checkpointed = gradients(model, inputs)
    assert checkpointed.keys() == plain.keys()
    for parameter, gradient in plain.items():
        torch.testing.assert_close(checkpointed[parameter], gradient, **CLOSE)


def test_checkpointing_recomputes_the_layers():
    model, inputs = build("trunk")
    model.train()
    calls = []
    model.encoder.layers[1].layer_norm1.register_forward_hook(lambda *_: calls.append(1))
    gradients(model, inputs)
    assert len(calls) == 1
    model.gradient_checkpointing_enable()
    gradients(model, inputs)
    assert len(calls) == 3


@EVERY
@torch.no_grad()
def test_tuple_equals_dict(name):
    model, inputs = build(name)
    as_dict, as_tuple = model(**inputs), model(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == len(as_dict)
    for found, expected in zip(as_tuple, as_dict.values()):
        pairs = zip(found, expected) if isinstance(found, tuple) else [(found, expected)]
        assert all(torch.equal(one, other) for one, other in pairs)


@EVERY
@torch.no_grad()
def test_rows_equal_the_batch(name):
    model, inputs = build(name)
    inputs.pop("labels", None)
    whole = model(**inputs)
    for row in range(3):
        alone = model(**{key: value[row : row + 1] for key, value in inputs.items()})
        for key in set(whole) - {"loss", "logits_per_image", "logits_per_text"}:
            values = whole[key] if isinstance(whole[key], tuple) else (whole[key],)
            found = alone[key] if isinstance(alone[key], tuple) else (alone[key],)
            for batch_value, row_value in zip(values, found):
                torch.testing.assert_close(row_value[0], batch_value[row], **CLOSE)


@EVERY
@torch.no_grad()
def test_hidden_states_and_attentions_on_request(name):
    model, inputs = build(name)
    plain = model(**inputs)
    assert plain.get("hidden_states") is None and plain.get("attentions") is None
    use_attention(model, "sdpa")
    full = model(**inputs, output_hidden_states=True, output_attentions=True)
    layers = model.config.num_hidden_layers
    assert len(full.hidden_states) == layers + 1 and len(full.attentions) == layers
    for weights in full.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    for key in plain:  # asking for more changes nothing else
        pairs = zip(plain[key], full[key]) if isinstance(plain[key], tuple) else [(plain[key], full[key])]
        for before, after in pairs:
            torch.testing.assert_close(before, after, **CLOSE)


@EVERY
@torch.no_grad()
def test_bfloat16_runs_and_stays_near_float32(name):
    """bfloat16 keeps 8 bits: a few layers of it stay within some percent of the size of the result."""
    model, inputs = build(name)
    exact = score(model(**inputs))
    found = score(model.to(torch.bfloat16)(**inputs))
    assert found.isfinite() and abs(found.float() - exact) <= 0.1 * abs(exact) + 0.05


@EVERY
def test_names_that_wrappers_look_for(name):
    model, _ = build(name)
    classes = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) <= classes, "FSDP and device_map look for each of these"
    assert isinstance(model.get_input_embeddings(), nn.Module)
    assert isinstance(model.config.hidden_size, int)
    assert not list(model.buffers()), "transformers 5 fills non-persistent buffers with junk on load"


@EVERY
def test_frozen_trunk_with_reentrant_checkpointing_trains_what_is_left(name):
    """What `enable_input_require_grads` is for: adapters on a frozen trunk."""
    model, inputs = build(name)
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    projection = next(m for n, m in model.named_modules() if n.endswith("layers.0.self_attn.q_proj"))
    projection.weight.requires_grad_(True)
    plain = gradients(model, inputs)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    found = gradients(model, inputs)
    assert len(found) == len(plain) == 1
    for parameter, gradient in plain.items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(found[parameter], gradient, **CLOSE)
    model.disable_input_require_grads()
    assert not model.get_input_embeddings()._forward_hooks


@EVERY
def test_checkpointing_by_default_trains_what_is_left_on_a_frozen_trunk(name):
    """The reentrant checkpoint would give None here: no input of it requires a gradient."""
    model, inputs = build(name)
    model.train().requires_grad_(False)
    weight = next(p for n, p in model.named_parameters() if n.endswith("layers.0.self_attn.q_proj.weight"))
    weight.requires_grad_(True)
    plain = gradients(model, inputs)
    model.gradient_checkpointing_enable()
    found = gradients(model, inputs)
    assert len(found) == len(plain) == 1
    for parameter, gradient in plain.items():
        torch.testing.assert_close(found[parameter], gradient, **CLOSE)


def test_dropout_and_drop_path_act_in_training_only():
    model = randomised(VitEmbedModel(vision_config(hidden_dropout_prob=0.2, attention_dropout=0.2, drop_path_rate=0.5)))
    assert torch.equal(model(pixels()).pooler_output, model(pixels()).pooler_output)
    model.train()
    assert not torch.equal(model(pixels()).pooler_output, model(pixels()).pooler_output)
    rates = [layer.drop_path_rate for layer in model.encoder.layers]
    assert rates[0] == 0 and rates[-1] == 0.5 and rates == sorted(rates)


def test_initialisation_is_clips():
    """Standard deviations of OpenAI's reference code, at sizes where 5 % is many sigmas."""
    torch.manual_seed(0)
    model = VitEmbedForContrastive(
        dual_config(hidden_size=256, intermediate_size=1024, layer_scale_init_value=0.1, num_register_tokens=2)
    )
    layer = model.vision_model.encoder.layers[0]
    expected = {
        layer.self_attn.q_proj.weight: 256**-0.5 * 8**-0.5,
        layer.self_attn.out_proj.weight: 256**-0.5,
        layer.mlp.fc1.weight: 512**-0.5,
        layer.mlp.fc2.weight: 256**-0.5 * 8**-0.5,
        model.vision_model.embeddings.position_embedding.weight: 0.02,
        model.vision_model.embeddings.patch_embedding.weight: 0.02,
        model.text_model.embeddings.token_embedding.weight: 0.02,
        model.visual_projection.weight: 256**-0.5,
        model.text_projection.weight: 24**-0.5,
    }
    for parameter, std in expected.items():
        assert parameter.std().item() == pytest.approx(std, rel=0.08)
    assert layer.mlp.fc1.bias.abs().max() == 0 and (layer.layer_norm1.weight == 1).all()
    assert (layer.layer_scale1 == 0.1).all() and model.logit_scale.item() == pytest.approx(2.6592)


@torch.no_grad()
def test_pooling_reads_what_it_says():
    for pooling_type, norm_first in (("cls", False), ("mean", False), ("mean", True), ("map", False)):
        fields = {"pooling_type": pooling_type, "norm_before_pooling": norm_first, "num_register_tokens": 2}
        model = randomised(VitEmbedModel(vision_config(**fields)))
        hidden = model(pixels()).last_hidden_state
        pooled = model(pixels()).pooler_output
        if pooling_type == "cls":
            expected = model.post_layernorm(hidden[:, 0])
        elif norm_first:
            expected = model.post_layernorm(hidden)[:, 3:].mean(1)
        elif pooling_type == "mean":
            expected = model.post_layernorm(hidden[:, 3:].mean(1))
        else:
            pooler = model.pooler
            attention = nn.MultiheadAttention(32, 4, batch_first=True)
            attention.in_proj_weight.copy_(torch.cat([p.weight for p in (pooler.q_proj, pooler.k_proj, pooler.v_proj)]))
            attention.in_proj_bias.copy_(torch.cat([p.bias for p in (pooler.q_proj, pooler.k_proj, pooler.v_proj)]))
            attention.out_proj.load_state_dict(pooler.out_proj.state_dict())
            normed = model.post_layernorm(hidden)
            expected = attention(pooler.probe.expand(3, -1, -1), normed, normed)[0][:, 0]
            inner = torch.nn.functional.linear(pooler.layernorm(expected), pooler.fc1.weight, pooler.fc1.bias)
            expected = expected + pooler.fc2(inner * torch.sigmoid(1.702 * inner))
        torch.testing.assert_close(pooled, expected, **CLOSE)


@torch.no_grad()
def test_class_attention_has_the_shape_of_the_image():
    model = randomised(VitEmbedModel(vision_config(num_register_tokens=2)))
    found = model.get_class_attentions(pixels(2, 32, 64))
    assert found.shape == (2, 4, 4, 4, 8)
    whole = model(pixels(2, 32, 64), output_attentions=True).attentions
    assert torch.equal(found[:, 1].flatten(2), whole[1][:, :, 0, 3:])
    with pytest.raises(ValueError, match="use_cls_token is False"):
        VitEmbedModel(vision_config(use_cls_token=False, pooling_type="mean")).get_class_attentions(pixels())


@torch.no_grad()
def test_backbone_maps():
    model = randomised(VitEmbedBackbone(vision_config(out_features=["stem", "stage4"])))
    output = model(pixels(2, 32, 64))
    assert [tuple(maps.shape) for maps in output.feature_maps] == [(2, 32, 4, 8)] * 2
    trunk = model.vision_model
    hidden = trunk(pixels(2, 32, 64), output_hidden_states=True).hidden_states
    for maps, state in zip(output.feature_maps, (hidden[0], hidden[4])):
        expected = trunk.post_layernorm(state[:, 1:]).transpose(1, 2).unflatten(2, (4, 8))
        torch.testing.assert_close(maps, expected, **CLOSE)
    assert model.channels == [32, 32] and VitEmbedBackbone(vision_config()).out_features == ["stage4"]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.full((1, 17), 99), r"at most max_position_embeddings=16 tokens, got 17.*truncation=True"),
        (torch.tensor([[98, 5, 99], [98, 5, 6]]), "end-of-text token 99, row 1 has none"),
        (torch.tensor([[98, 100, 99]]), r"\[0, vocab_size=100\), got 100"),
        (torch.tensor([[98, -1, 99]]), "got -1"),
        (torch.tensor([98, 5, 99]), r"\(batch, tokens\) of integers, got \(3,\)"),
        (torch.zeros(2, 0, dtype=torch.long), r"\(batch, tokens\) of integers, got \(2, 0\)"),
        (torch.tensor([[98.0, 99.0]]), "of integers.*float32"),
    ],
)
def test_bad_text_is_refused(ids, message):
    model, _ = build("contrastive")
    for call in (model.text_model, model.get_text_features):
        with pytest.raises(ValueError, match=message):
            call(ids)


def test_padding_on_the_left_is_refused():
    model, _ = build("contrastive")
    ids = torch.tensor([[99, 98, 5, 99], [98, 5, 6, 99]])
    left = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    with pytest.raises(ValueError, match="padding_side='right'"):
        model.get_text_features(ids, attention_mask=left)
    model.get_text_features(ids, attention_mask=torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]]))
    with pytest.raises(ValueError, match=r"attention_mask must have the shape of input_ids \(2, 4\), got \(2, 3\)"):
        model.get_text_features(ids, attention_mask=left[:, :3])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 5, 1]), r"\[0, num_labels=5\), got 5.*num_labels="),
        (torch.tensor([0, -1, 1]), "got -1"),
        (torch.tensor([0, 1]), r"\(3,\) class numbers, got \(2,\)"),
        (torch.tensor([[0], [1], [1]]), r"got \(3, 1\)"),
        (torch.tensor([0.0, 1.0, 2.0]), "class numbers.*float32"),
    ],
)
def test_bad_class_labels_are_refused(labels, message):
    model, _ = build("classification")
    with pytest.raises(ValueError, match=message):
        model(pixels(), labels=labels)


def test_other_problem_types():
    config = vision_config(num_labels=5, problem_type="multi_label_classification")
    model = randomised(VitEmbedForImageClassification(config))
    targets = torch.tensor([[1, 0, 0, 1, 0]] * 3)
    output = model(pixels(), labels=targets)
    expected = nn.functional.binary_cross_entropy_with_logits(output.logits, targets.float())
    torch.testing.assert_close(output.loss, expected)
    with pytest.raises(ValueError, match=r"must be \(3, 5\), got \(3,\)"):
        model(pixels(), labels=torch.tensor([1, 0, 1]))
    regression = randomised(VitEmbedForImageClassification(vision_config(num_labels=1, problem_type="regression")))
    output = regression(pixels(), labels=torch.tensor([0.5, 1.5, 2.5]))
    torch.testing.assert_close(output.loss, (output.logits[:, 0] - torch.tensor([0.5, 1.5, 2.5])).square().mean())


@pytest.mark.parametrize("labels", [torch.ones(3, 1, 32, 32), torch.ones(2, 32, 32), torch.ones(32, 32)])
def test_bad_depth_labels_are_refused(labels):
    model, _ = build("depth-deconv")
    with pytest.raises(ValueError, match=r"labels must be \(batch=3, height, width\)"):
        model(pixels(), labels=labels)


def test_dpt_needs_four_layers():
    with pytest.raises(ValueError, match="depth_head_type='dpt'.*num_hidden_layers=3.*deconv"):
        VitEmbedForDepthEstimation(vision_config(num_hidden_layers=3, depth_head_type="dpt"))


@torch.no_grad()
@pytest.mark.parametrize("head", ["deconv", "dpt"])
@pytest.mark.parametrize("max_depth", [None, 10.0])
def test_depth_is_positive_and_in_range(head, max_depth):
    model = randomised(VitEmbedForDepthEstimation(vision_config(depth_head_type=head, max_depth=max_depth)))
    depth = model(pixels(2, 40, 64)).predicted_depth
    assert depth.shape == (2, 40, 64) and (depth > 0).all()
    if max_depth is not None:
        assert (depth <= max_depth).all()
    at_labels = model(pixels(2, 40, 64), labels=torch.rand(2, 50, 70) + 0.1)
    assert at_labels.loss.isfinite() and torch.equal(at_labels.predicted_depth, depth)
