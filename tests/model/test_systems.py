"""`configs/*.json`: the systems that the project was made from, by their published figures."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vit_embed import (
    VitEmbedConfig,
    VitEmbedForContrastive,
    VitEmbedForDepthEstimation,
    VitEmbedModel,
)

CONFIGS = Path(__file__).parents[2] / "configs"


def config_of(name: str, **overrides) -> VitEmbedConfig:
    config = VitEmbedConfig.from_json_file(CONFIGS / f"{name}.json")
    for field, value in overrides.items():
        setattr(config, field, value)
    return config


def build(model_class, config: VitEmbedConfig):
    """The model with no memory behind its weights: only shapes and counts."""
    with torch.device("meta"):
        return model_class(config)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", ["depth-scenes", "depth-scenes-dpt"])
def test_depth_of_scenes(name):
    """The stem's maps have the strides that the head expects, and a fresh head gives neither 0 nor all of max_depth."""
    depth = VitEmbedForDepthEstimation(config_of(name)).eval()(torch.randn(1, 3, 128, 128)).predicted_depth
    assert depth.shape == (1, 128, 128) and 1 < depth.min() < depth.max() < 9


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_every_system_loads_and_saves_unchanged(path, tmp_path):
    config = VitEmbedConfig.from_json_file(path)
    config.save_pretrained(tmp_path)
    assert VitEmbedConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    build(VitEmbedForContrastive if config.text_config is not None else VitEmbedModel, config)


def test_deepseek_ocr_clip_l():
    config = config_of("deepseek-ocr-clip-l")
    model = build(VitEmbedModel, config)
    embeddings = model.embeddings
    assert embeddings.class_embedding.numel() == 1_024
    assert embeddings.patch_embedding.weight.numel() == 602_112
    assert embeddings.position_embedding.weight.numel() == 263_168
    assert count(embeddings) == 866_304
    assert count(model.post_layernorm) == 0, "the system has no norm behind its last layer"
    # Another encoder's features (SAM's are 1024 wide) at 224 and 448 pixels, and a rectangle of as many patches.
    for grid in ((16, 16), (32, 32), (8, 32)):
        tokens, layout = embeddings(None, torch.empty(2, 1024, *grid, device="meta"))[:2]
        assert tokens.shape == (2, 1 + grid[0] * grid[1], 1024) and layout.grid_size == grid
    with FlopCounterMode(display=False) as counter:
        assert embeddings(torch.empty(1, 3, 224, 224, device="meta")).states.shape == (1, 257, 1024)
    assert counter.get_total_flops() == 2 * 16 * 16 * 14 * 14 * 3 * 1024, "308 MFLOP"


def test_vit_tiny_muomni():
    model = build(VitEmbedModel, config_of("vit-tiny-muomni"))
    assert count(model.encoder.layers[0]) == 198_272
    assert count(model.embeddings.patch_embedding) == 98_432
    assert model.embeddings.position_embedding.weight.numel() == 197 * 128
    assert count(model) == 4 * 198_272 + 98_432 + 197 * 128 + 128 + 128  # and class token, final RMSNorm: 0.92 M
    assert isinstance(model.post_layernorm, torch.nn.RMSNorm)
    assert isinstance(model.encoder.layers[0].layer_norm1, torch.nn.LayerNorm)
    tokens = model(torch.empty(2, 3, 224, 224, device="meta")).last_hidden_state
    assert tokens[:, :1].shape == (2, 1, 128) and tokens[:, 1:].shape == (2, 196, 128)


@pytest.mark.parametrize(("name", "text_layers"), [("clip-vit-b-16", 12), ("clip-vit-b-16-text8", 8)])
def test_clip_vit_b_16(name, text_layers):
    model = build(VitEmbedForContrastive, config_of(name))
    assert count(model.vision_model.embeddings.patch_embedding) == 589_824
    assert count(model.vision_model.encoder) == 85_054_464
    assert count(model.visual_projection) == 393_216
    assert 86.0e6 < count(model.vision_model) + count(model.visual_projection) < 86.3e6
    assert len(model.text_model.encoder.layers) == text_layers
    assert model.text_model.embeddings.token_embedding.weight.shape == (49_408, 512)
    if text_layers == 12:
        assert count(model) == 149_620_737  # OpenAI's ViT-B/16, every tensor of its state dict
