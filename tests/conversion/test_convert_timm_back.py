"""Models of ours as timm's: a folder that `timm.create_model` reads, a bare file, and what timm cannot compute."""

import functools

import pytest
import tiny
import torch
from timm_reference import CLASSIFIER, CLS, assert_equal, convert, of_timm, ours, reloaded, restore, timm

from vit_embed import VitEmbedForContrastive, VitEmbedModel, VitEmbedModelWithProjection
from vit_embed.conversion.layouts.layout import MODEL_CLASSES
from vit_embed.convert_checkpoint import convert_checkpoint, restore_checkpoint


@pytest.mark.parametrize(
    "model_class, fields",
    [
        ("VitEmbedModelWithProjection", {}),
        ("VitEmbedModel", {"norm_type": "rms_norm", "layer_norm_eps": 1e-6}),
        (CLASSIFIER, {"use_pre_layernorm": False, "num_register_tokens": 2, "pooling_type": "mean", "num_labels": 3}),
        (CLASSIFIER, {"patch_bias": True, "use_pre_layernorm": False, "pad_to_patch": True, "hidden_act": "relu"}),
        ("VitEmbedModel", {"use_cls_token": False, "pooling_type": "map", "layer_norm_eps": 1e-6}),
        ("VitEmbedModel", {"pooling_type": "map", "num_register_tokens": 1, "intermediate_size": 43}),
    ],
)
def test_a_model_of_ours_as_timms_folder(model_class, fields, tmp_path):
    model = tiny.randomised(MODEL_CLASSES[model_class](tiny.vision_config(**fields)))
    model.save_pretrained(tmp_path / "ours")
    restore_checkpoint(tmp_path / "ours", "timm", output_dir=tmp_path / "timm")
    assert_equal(reloaded(tmp_path / "timm"), model)
    assert convert_checkpoint(tmp_path / "timm", tmp_path / "again")  # compared with timm's own
    again = MODEL_CLASSES[model_class].from_pretrained(tmp_path / "again")
    mine = model.state_dict()
    assert set(again.state_dict()) - set(mine) <= {"vision_model.embeddings.patch_embedding.bias"} | {
        "embeddings.patch_embedding.bias"
    }
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in mine.items())
    assert again.config.pad_to_patch == model.config.pad_to_patch


def test_another_epsilon_has_a_file_and_no_folder(tmp_path):
    model = tiny.randomised(VitEmbedModel(tiny.vision_config(layer_norm_eps=1e-12)))
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="--output_file"):
        restore_checkpoint(tmp_path / "ours", "timm", output_dir=tmp_path / "timm")
    restored = restore_checkpoint(tmp_path / "ours", "timm", output_file=tmp_path / "vit.pth")
    call = restored.usage.partition(".load_state_dict")[0]
    back = eval(call, {"timm": timm, "functools": functools})
    back.load_state_dict(torch.load(tmp_path / "vit.pth"))
    assert_equal(back.eval(), model)


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"norm_position": "post"}, ["norm_position='post'"]),
        ({"stem_type": "linear", "token_merge_size": 1}, ["stem_type='linear'", "token_merge_size=1"]),
        ({"patch_bias": True}, ["patch_bias=True"]),
        ({"position_embedding_type": "sinusoidal"}, ["position_embedding_type='sinusoidal'"]),
        ({"final_norm_type": "rms_norm"}, ["final_norm_type='rms_norm'"]),
        ({"norm_type": "rms_norm", "pooling_type": "map"}, ["norm_type='rms_norm'"]),
    ],
)
def test_a_model_that_timm_cannot_compute_is_refused(fields, named):
    config = tiny.vision_config(architectures=["VitEmbedModel"], **fields)
    with pytest.raises(ValueError, match="VisionTransformer cannot express") as caught:
        restore(config, VitEmbedModel(config).state_dict())
    assert all(name in str(caught.value) for name in named)


def test_a_text_tower_has_no_place_in_timm(tmp_path):
    VitEmbedForContrastive(tiny.dual_config()).save_pretrained(tmp_path / "dual")
    with pytest.raises(ValueError, match="no place for a text tower.*VitEmbedModelWithProjection"):
        restore_checkpoint(tmp_path / "dual", "timm", output_dir=tmp_path / "timm")
    VitEmbedModelWithProjection.from_pretrained(tmp_path / "dual").save_pretrained(tmp_path / "tower")
    restore_checkpoint(tmp_path / "tower", "timm", output_dir=tmp_path / "timm")
    assert_equal(reloaded(tmp_path / "timm"), VitEmbedModelWithProjection.from_pretrained(tmp_path / "dual").eval())


def test_a_position_that_was_trained_since_takes_the_form_that_has_one():
    model = of_timm(no_embed_class=True, reg_tokens=1)
    config, weights = convert(model, **CLS, image_size=(32, 32))
    weights["vision_model.embeddings.position_embedding.weight"][0] += 1
    restored = restore(config, weights)
    back = timm.models.vision_transformer.VisionTransformer(**restored.files["config.json"]["model_args"])
    assert not back.no_embed_class
    back.load_state_dict(restored.state_dict)
    assert_equal(back.eval(), ours(config, weights))
