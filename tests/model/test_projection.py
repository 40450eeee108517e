"""The image tower with its projection: against transformers.CLIPVisionModelWithProjection, and out of every folder that
has its weights."""

import pytest
import torch
from fresh_process import digests, junk_in_new_memory
from tiny import CLOSE, VISION, dual_config, pixels, randomised, use_attention, vision_config
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from vit_embed import (
    VitEmbedConfig,
    VitEmbedForContrastive,
    VitEmbedModel,
    VitEmbedModelWithProjection,
)
from vit_embed.modeling_vit_embed import VitEmbedAutoModel


@pytest.fixture(scope="module")
def stock() -> CLIPVisionModelWithProjection:
    return randomised(CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=20)))


@pytest.fixture(scope="module")
def stock_folder(stock, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    stock.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dual(tmp_path_factory):
    """A dual encoder and the folder it is saved in."""
    folder = tmp_path_factory.mktemp("dual")
    model = randomised(VitEmbedForContrastive(dual_config()))
    model.save_pretrained(folder)
    return folder, model


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_it_equals_clips(stock, implementation):
    model = VitEmbedModelWithProjection(vision_config()).eval()
    model.load_state_dict(stock.state_dict(), strict=True)
    use_attention(model, implementation)
    stock.set_attn_implementation("eager")
    theirs, ours = stock(pixels()), model(pixels(), output_hidden_states=True, output_attentions=True)
    for name in ("image_embeds", "last_hidden_state"):
        torch.testing.assert_close(ours[name], theirs[name], **CLOSE)
    assert list(ours) == ["image_embeds", "last_hidden_state", "hidden_states", "attentions", "pooler_output"]
    assert ours.pooler_output is ours.image_embeds, "for pipelines"
    assert not torch.allclose(ours.image_embeds.norm(dim=-1), torch.ones(3), atol=0.1), "embeddings keep their length"


@torch.no_grad()
def test_features_are_those_of_the_dual_encoder(dual):
    folder, reference = dual
    model = VitEmbedModelWithProjection.from_pretrained(folder)
    for normalize in (False, True):
        found = model.get_image_features(pixels(), normalize=normalize)
        assert torch.equal(found, reference.get_image_features(pixels(), normalize=normalize))
    torch.testing.assert_close(model(pixels()).image_embeds, model.get_image_features(pixels()), **CLOSE)
    assert torch.equal(model.get_patch_features(pixels()), reference.get_patch_features(pixels()))
    for name in ("get_image_features", "get_patch_features"):
        assert getattr(VitEmbedModelWithProjection, name) is getattr(VitEmbedForContrastive, name)
    with pytest.raises(TypeError, match="normalize must be True or False, got Tensor"):
        model.get_image_features(pixels(), torch.ones(3))


def test_an_adaptive_stem_gives_its_loss_to_add():
    model = VitEmbedModelWithProjection(vision_config(stem_type="adaptive"))
    assert model.train()(pixels()).stem_loss.requires_grad
    assert model.eval()(pixels()).stem_loss is None


def test_out_of_a_stock_folder(stock, stock_folder):
    with junk_in_new_memory():
        direct, info = VitEmbedModelWithProjection.from_pretrained(stock_folder, output_loading_info=True)
        config = VitEmbedConfig.from_pretrained(stock_folder)
        chosen, auto_info = VitEmbedAutoModel.from_pretrained(stock_folder, config=config, output_loading_info=True)
    for model, report in ((direct, info), (chosen, auto_info)):
        assert type(model) is VitEmbedModelWithProjection and not any(report.values()), report
        assert digests(model) == digests(stock)
    trunk, info = VitEmbedModel.from_pretrained(stock_folder, output_loading_info=True)
    assert not any(info.values()), info


@torch.no_grad()
def test_what_we_save_loads_in_stock_clip(stock, stock_folder, tmp_path):
    VitEmbedModelWithProjection.from_pretrained(stock_folder).save_pretrained(tmp_path)
    again, info = CLIPVisionModelWithProjection.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert digests(again) == digests(stock)
    torch.testing.assert_close(again(pixels()).image_embeds, stock(pixels()).image_embeds, **CLOSE)


@pytest.mark.parametrize(
    ("architectures", "expected"),
    [
        (["VitEmbedModelWithProjection"], VitEmbedModelWithProjection),
        (["VitEmbedModel"], VitEmbedModel),
        (["VitEmbedForImageClassification"], VitEmbedModel),
        (None, VitEmbedModel),
    ],
)
def test_the_class_that_auto_model_takes(architectures, expected):
    assert VitEmbedAutoModel.class_for(vision_config(architectures=architectures)) is expected
    assert VitEmbedAutoModel.class_for(dual_config(architectures=architectures)) is VitEmbedForContrastive
    assert type(VitEmbedAutoModel._from_config(vision_config(architectures=architectures))) is expected


@torch.no_grad()
@pytest.mark.parametrize("model_class", [VitEmbedModelWithProjection, VitEmbedForContrastive])
def test_without_a_projection_the_pooled_vector_is_the_embedding(model_class):
    config = vision_config if model_class is VitEmbedModelWithProjection else dual_config
    model = randomised(model_class(config(use_visual_projection=False, projection_dim=32)))
    assert not [name for name in model.state_dict() if name.startswith("visual_projection")]
    pooled = model.vision_model(pixels()).pooler_output
    torch.testing.assert_close(model.get_image_features(pixels()), pooled, **CLOSE)
    embeds = model(pixels()).image_embeds
    expected = pooled if model_class is VitEmbedModelWithProjection else torch.nn.functional.normalize(pooled, dim=-1)
    torch.testing.assert_close(embeds, expected, **CLOSE)
