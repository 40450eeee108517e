"""`set_image_size` of a model whose config object others hold: models made of it, and what the model is a part of."""

import gc
import weakref

import pytest
import tiny
from catalogue import CLASSES, IMAGE_CLASSES
from transformers import UperNetConfig, UperNetForSemanticSegmentation

from vit_embed import VitEmbedForContrastive, VitEmbedModel


def assert_size(model, image_size: int) -> None:
    """Of the model, and of every part of it: one config, and a table of its size."""
    trunk = model.trunk
    assert model.config.image_size == image_size
    assert all(part.config is model.config for part in (trunk, trunk.embeddings, trunk.encoder))
    assert trunk.embeddings.position_embedding.weight.shape[0] in ((image_size // 8) ** 2, (image_size // 8) ** 2 + 1)


@pytest.mark.parametrize("name", IMAGE_CLASSES)
def test_another_model_of_the_same_config_stays_as_it_is(name, tmp_path):
    """It keeps its size, is saved with it, and takes another by itself."""
    case = CLASSES[name]
    config = case.config()
    one, other = (tiny.randomised(case.model_class(config)) for _ in range(2))
    one.set_image_size(64)
    assert_size(one, 64)
    assert_size(other, 32)
    other.save_pretrained(tmp_path)
    assert_size(case.model_class.from_pretrained(tmp_path), 32)
    other.set_image_size(48)
    assert_size(one, 64)
    assert_size(other, 48)
    assert getattr(config, "text_config", None) is getattr(other.config, "text_config", None)


def test_a_tower_changes_the_whole_model():
    config = tiny.dual_config()
    one, other = VitEmbedForContrastive(config), VitEmbedForContrastive(config)
    one.vision_model.set_image_size(64)
    assert_size(one, 64)
    assert_size(other, 32)


def test_a_backbone_changes_the_dense_model():
    config = tiny.vision_config(out_indices=[1, 2, 3, 4])
    apart = VitEmbedModel(config)
    sizes = {"hidden_size": 32, "num_labels": 4, "auxiliary_in_channels": 32}
    model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=config, **sizes))
    model.backbone.set_image_size(64)
    assert model.config.backbone_config.image_size == 64
    assert_size(apart, 32)


def test_a_model_made_of_a_changed_config_has_its_size():
    """The config of the model that was changed is the object it was made of, so a model made of it now is as large."""
    config = tiny.vision_config()
    model = VitEmbedModel(config)
    model.set_image_size(64)
    assert model.config is config
    assert_size(VitEmbedModel(config), 64)


def test_no_model_is_kept_alive():
    gone = weakref.ref(VitEmbedModel(tiny.vision_config()))
    gc.collect()
    assert gone() is None
