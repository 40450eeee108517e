"""What holds for every class, stem and option, over the cases of the catalogue; and what single options do."""

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from catalogue import ARITHMETIC, CLASSES, IMAGE_CLASSES, OPTIONS, STEMS, flat
from tiny import (
    CLOSE,
    assert_same_gradients,
    dual_config,
    gradients,
    pixels,
    randomised,
    score,
    use_attention,
    vision_config,
)
from torch import nn

from vit_embed import (
    VitEmbedBackbone,
    VitEmbedForContrastive,
    VitEmbedModel,
)

CASES = {**CLASSES, **STEMS, **OPTIONS, **ARITHMETIC}
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def assert_same(found, expected, **tolerance) -> None:
    """Of two tensors, or two tuples of them."""
    pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
    for one, other in pairs:
        torch.testing.assert_close(one, other, **tolerance)


# The gate of the adaptive stem learns in training alone: test_stems.
@pytest.mark.parametrize("name", [name for name in CASES if name != "stem adaptive"])
def test_gradients_reach_every_parameter_with_eager_and_sdpa_alike(name):
    case = CASES[name]
    model, found = case.model(), {}
    for implementation in ("eager", "sdpa"):
        use_attention(model, implementation)
        found[implementation] = gradients(model, case.training_inputs())
    assert_same_gradients(found["sdpa"], found["eager"])
    idle = {name for name, _ in model.named_parameters() if not found["sdpa"].get(name, torch.zeros(1)).any()}
    # A key's bias shifts all scores of a query alike, which softmax ignores: its gradient is zero up to rounding.
    assert not {name for name in idle if not name.endswith("k_proj.bias")}


@EVERY
@torch.no_grad()
def test_tuple_equals_dict(case):
    model, inputs = case.model(), case.training_inputs()
    as_dict, as_tuple = model(**inputs), model(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple)
    for found, expected in zip(as_tuple, as_dict.values(), strict=True):
        assert_same(found, expected, rtol=0, atol=0)


@EVERY
@torch.no_grad()
def test_rows_equal_the_batch(case):
    model, inputs = case.model(), case.inputs()
    whole = model(**inputs)
    for row in range(3):
        alone = model(**{key: value[row : row + 1] for key, value in inputs.items()})
        for key in set(whole) - {"loss", "logits_per_image", "logits_per_text"}:
            of_batch = whole[key] if isinstance(whole[key], tuple) else (whole[key],)
            of_row = alone[key] if isinstance(alone[key], tuple) else (alone[key],)
            assert_same(of_row, tuple(values[row : row + 1] for values in of_batch), **CLOSE)


@pytest.mark.parametrize("name", [*(name for name in IMAGE_CLASSES if name != "masked"), "merging"])
@torch.no_grad()
def test_features_of_another_encoder_take_the_place_of_pixels(name):
    case = CASES[name]
    model, inputs = case.model(), case.inputs()
    expected = flat(model(**inputs), case.outputs)
    embeds = model.trunk.embeddings.patch_embedding(inputs.pop("pixel_values"))
    assert_same(tuple(flat(model(patch_embeds=embeds, **inputs), case.outputs)), tuple(expected), **CLOSE)
    assert torch.equal(model.trunk.get_token_map(patch_embeds=embeds), model.trunk.get_token_map(pixels()))


@EVERY
@torch.no_grad()
def test_hidden_states_and_attentions_on_request(case):
    model, inputs = case.model(), case.training_inputs()
    plain = model(**inputs)
    assert plain.get("hidden_states") is None and plain.get("attentions") is None
    use_attention(model, "sdpa")
    full = model(**inputs, output_hidden_states=True, output_attentions=True)
    layers = model.config.num_hidden_layers
    assert len(full.hidden_states) == layers + 1 and len(full.attentions) == layers
    for weights in full.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    for key in plain:  # asking for more changes nothing else
        assert_same(full[key], plain[key], **CLOSE)


@EVERY
@torch.no_grad()
def test_bfloat16_runs_and_stays_near_float32(case):
    """bfloat16 keeps 8 bits: a few layers of it stay within some percent of the size of the result."""
    model, inputs = case.model(), case.training_inputs()
    exact = score(model(**inputs))
    found = score(model.to(torch.bfloat16)(**inputs))
    assert found.isfinite() and abs(found.float() - exact) <= 0.1 * abs(exact) + 0.05


@pytest.mark.parametrize("case", CLASSES.values(), ids=CLASSES)
def test_names_that_wrappers_look_for(case):
    model = case.model()
    plugin = FullyShardedDataParallelPlugin(auto_wrap_policy="transformer_based_wrap")
    plugin.set_auto_wrap_policy(model)
    wrapped = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    assert wrapped <= {type(module) for module in model.modules()}, "FSDP looks for each of these"
    assert {wrapped_class.__name__ for wrapped_class in wrapped} == set(model._no_split_modules)
    assert "VitEmbedLayer" in model._no_split_modules
    assert isinstance(model.get_input_embeddings(), nn.Module)
    assert isinstance(model.config.hidden_size, int)
    assert not list(model.buffers()), "transformers 5 fills non-persistent buffers with junk on load"


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
def test_pooling_equals_its_definition():
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
