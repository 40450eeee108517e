"""Dense models of transformers on our backbone, by `backbone_config` alone: trained one step, saved and loaded."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file

import vit_embed

IS_TRANSFORMERS_5 = int(transformers.__version__.partition(".")[0]) >= 5
STAGES = ["stage1", "stage2", "stage3", "stage4"]


class DenseModel(NamedTuple):
    """fields: of the config of a model of transformers, besides its backbone. backbone: fields of ours. labels: for a
    loss, where it has one for us. by_state_dict: how it is loaded."""

    model_class: str
    fields: dict[str, Any]
    backbone: dict[str, Any]
    labels: Callable[[], dict[str, Any]] = dict
    by_state_dict: bool = False


SEQUENCES = {"out_features": STAGES, "reshape_hidden_states": False}
NECK = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16}
DETECTION = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "num_queries": 5,
    "num_labels": 3,
    "encoder_layers": 1,
    "decoder_layers": 2,
    # DETR
    "d_model": 16,
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 16),
    # Mask2Former
    **dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32),
    **dict.fromkeys(("encoder_feedforward_dim", "dim_feedforward"), 16),
    "num_attention_heads": 2,
    "train_num_points": 8,
}
ZOE_DEPTH = {
    **NECK,
    **dict.fromkeys(("num_relative_features", "bin_embedding_dim"), 8),
    **dict.fromkeys(("patch_transformer_hidden_size", "patch_transformer_intermediate_size"), 8),
    "patch_transformer_num_attention_heads": 2,
    "bottleneck_features": 16,
    "backbone_hidden_size": 32,
    "num_attractors": [2, 2, 1, 1],
}
MODELS = {
    "UperNet": DenseModel(
        "UperNetForSemanticSegmentation",
        {"hidden_size": 16, "auxiliary_in_channels": 32, "pool_scales": [1, 2], "num_labels": 4},
        {"out_features": STAGES},
        lambda: {"labels": torch.arange(2 * 32 * 32).reshape(2, 32, 32) % 4},
    ),
    "DPT": DenseModel("DPTForDepthEstimation", {**NECK, "is_hybrid": False, "hidden_size": 32}, SEQUENCES),
    "DepthAnything": DenseModel(
        "DepthAnythingForDepthEstimation",
        {**NECK, "patch_size": 8, "reassemble_hidden_size": 32, "head_hidden_size": 8},
        SEQUENCES,
    ),
    # Its loading renames every out_proj of a checkpoint, the backbone's included, since transformers 5.
    "Detr": DenseModel(
        "DetrForObjectDetection",
        DETECTION,
        {"out_features": STAGES[-1:]},
        lambda: {"labels": [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}] * 2},
        by_state_dict=IS_TRANSFORMERS_5,
    ),
    "Mask2Former": DenseModel(
        "Mask2FormerForUniversalSegmentation",
        DETECTION,
        {"out_features": STAGES},
        lambda: {
            "mask_labels": [(tiny.pixels(2, 32, 32)[:, 0] > 0).float()] * 2,
            "class_labels": [torch.tensor([0, 1])] * 2,
        },
    ),
    "VitMatte": DenseModel(
        "VitMatteForImageMatting",
        {"hidden_size": 32, "fusion_hidden_sizes": [8] * 4, "convstream_hidden_sizes": [4] * 3},
        {"out_features": STAGES[-1:], "num_channels": 4, "patch_size": 16},
    ),
    "ZoeDepth": DenseModel("ZoeDepthForDepthEstimation", ZOE_DEPTH, SEQUENCES),
}


def result(output) -> torch.Tensor:
    """The first tensor of an output that is no loss."""
    return next(value for name, value in output.items() if torch.is_tensor(value) and name != "loss")


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_and_comes_back(name, tmp_path):
    case = MODELS[name]
    try:
        model_class, config_class = getattr(transformers, case.model_class), getattr(transformers, f"{name}Config")
    except ImportError as error:  # some need torchvision or all of timm on transformers 4
        pytest.skip(str(error))
    torch.manual_seed(0)
    backbone = tiny.vision_config(**case.backbone)
    model = model_class(config_class(backbone_config=backbone, **case.fields))
    inputs = {"pixel_values": tiny.pixels(2, 32, 32)}
    if backbone.num_channels == 4:  # an image and its trimap
        inputs["pixel_values"] = torch.cat([inputs["pixel_values"], inputs["pixel_values"][:, :1]], dim=1)
    labels = case.labels()
    output = model(**inputs, **labels)
    (output.loss if labels else result(output).mean()).backward()
    ours = [module for module in model.modules() if isinstance(module, vit_embed.VitEmbedBackbone)]
    assert len(ours) == 1
    without = [name for name, weight in ours[0].named_parameters() if weight.grad is None]
    assert not without, "every weight of the backbone learns"

    model.eval().save_pretrained(tmp_path, **({"save_original_format": False} if case.by_state_dict else {}))
    if case.by_state_dict:
        loaded = model_class(config_class.from_pretrained(tmp_path))
        loaded.load_state_dict(load_file(tmp_path / "model.safetensors"))
    else:
        loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(result(loaded.eval()(**inputs)), result(model(**inputs)), rtol=0, atol=0)


def test_tokens_are_the_maps_row_by_row():
    """With the class token and registers in front, as transformers' DINOv2 gives them."""
    fields = {"out_features": ["stem", "stage2"], "num_register_tokens": 2}
    maps = tiny.randomised(vit_embed.VitEmbedBackbone(tiny.vision_config(**fields)))
    tokens = vit_embed.VitEmbedBackbone(tiny.vision_config(**fields, reshape_hidden_states=False)).eval()
    tokens.load_state_dict(maps.state_dict())
    with torch.no_grad():
        pairs = list(zip(maps(tiny.pixels()).feature_maps, tokens(tiny.pixels()).feature_maps))
        states = maps(tiny.pixels(), output_hidden_states=True).hidden_states
    assert len(pairs) == 2
    for stage, (map_, sequence) in zip((0, 2), pairs):
        assert sequence.shape == (3, 3 + 16, 32)
        torch.testing.assert_close(sequence[:, 3:], map_.flatten(2).transpose(1, 2), rtol=0, atol=0)
        torch.testing.assert_close(sequence, maps.trunk.post_layernorm(states[stage]), rtol=0, atol=1e-6)


def test_stages_are_set_on_backbone_and_config():
    """As transformers' own backbones: names and places follow each other, and None is the last stage."""
    model = vit_embed.VitEmbedBackbone(tiny.vision_config()).eval()
    model.out_features = ["stem", "stage3"]
    assert model.config.out_indices == [0, 3] and len(model(tiny.pixels()).feature_maps) == 2
    model.out_indices = [-1]
    assert model.out_features == ["stage4"] and model.num_features == [32] * 5
    model.config.out_features = None
    assert model.out_indices == [4] and model.channels == [32]
    assert type(model.backbone_type).__name__ == "BackboneType" and model.backbone_type.value == "transformers"
