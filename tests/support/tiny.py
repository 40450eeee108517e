"""Small models and inputs that the tests share: big enough that every shape differs from every other."""

import torch
from transformers import CLIPConfig, CLIPModel

from vit_embed import VitEmbedConfig

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 rounding of sums in another order
EOS = 99  # the end-of-text token of the tiny vocabulary, its last id as in CLIP

TEXT = {
    "vocab_size": 100,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
    "bos_token_id": 98,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}
# SigLIP's tower (arXiv:2303.15343) in the same sizes: no token is hidden, and the last place of a row is its text.
SIGLIP_TEXT = {
    **TEXT,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "pooling_type": "last",
    "use_causal_mask": False,
    "projection_bias": True,
}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
# SigLIP, the whole: its image embedding is the pooled vector itself.
SIGLIP = {
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "patch_bias": True,
    "use_cls_token": False,
    "use_pre_layernorm": False,
    "pooling_type": "map",
    "projection_dim": VISION["hidden_size"],
    "use_visual_projection": False,
    "contrastive_loss": "sigmoid",
    "text_config": SIGLIP_TEXT,
}
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 20,
}


def vision_config(**overrides) -> VitEmbedConfig:
    """A vision-only config: 32 x 32 pixels, 4 x 4 patches, 4 layers of 32."""
    return VitEmbedConfig(**{**VISION, **DECODER, "projection_dim": 20, **overrides})


def dual_config(**overrides) -> VitEmbedConfig:
    """A dual encoder's config: the same trunk and a text tower of 3 layers of 24, 100 tokens."""
    return vision_config(**{"text_config": dict(TEXT), **overrides})


def clip_model() -> CLIPModel:
    """A stock CLIPModel of the sizes of `dual_config`, every weight random and of a size that shows in the output."""
    config = CLIPConfig(vision_config=dict(VISION), text_config=dict(TEXT), projection_dim=20)
    return randomised(CLIPModel(config))


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The model in eval mode with no weight left at zero or one, so that no wrong path hides behind an idle weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith(("logit_scale", "logit_bias")):
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(0.15 * noise)
    return model.eval()


def use_attention(model: torch.nn.Module, implementation: str) -> None:
    """Sets the attention of every tower, and sees to it that it is set; a backbone in a stem may have other choices."""
    model.set_attn_implementation(implementation)
    layers = [module for module in model.modules() if hasattr(module, "self_attn")]
    assert {layer.self_attn.config._attn_implementation for layer in layers} == {implementation}


def pixels(batch: int = 3, height: int = 32, width: int = 32, seed: int = 1) -> torch.Tensor:
    """(batch, 3, height, width) of standard normal values."""
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def hidden_patches(batch: int = 3) -> torch.Tensor:
    """(batch, 16) bool for 4 x 4 patches: three quarters of them hidden, others in every row."""
    return torch.arange(16)[None] % 4 != torch.arange(batch)[:, None] % 4


def tokens(batch: int = 3, length: int = 16, seed: int = 2) -> torch.Tensor:
    """(batch, length) ids: a start token, words, an end token at another place in every row, end tokens as padding."""
    ids = torch.randint(1, 90, (batch, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = TEXT["bos_token_id"]
    for row in range(batch):
        ids[row, 4 + 3 * row % (length - 4) :] = EOS
    return ids


def score(output) -> torch.Tensor:
    """A number that depends on everything an output says."""
    if output.get("loss") is not None:
        return output.loss
    tensors = [value for value in output.values() if isinstance(value, torch.Tensor)] + list(
        output.get("feature_maps") or ()
    )
    return sum(tensor.float().square().mean() for tensor in tensors)


def gradients_of(model: torch.nn.Module, compute) -> dict[str, torch.Tensor]:
    """Of a scalar that `compute` gives, by parameter."""
    model.zero_grad()
    compute().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def gradients(model: torch.nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    return gradients_of(model, lambda: score(model(**inputs)))


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To 1e-5 of each gradient's largest entry: float32 sums taken in another order.

    A gradient 100 times smaller than the model's largest is held to the rounding of that one: that of k_proj.bias is
    nothing else, as softmax does not see what is added to every score.
    """
    assert found.keys() == expected.keys()
    floor = 0.01 * max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        largest = max(float(gradient.abs().max()), floor)
        torch.testing.assert_close(
            found[name], gradient, rtol=0, atol=1e-5 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )
