"""OpenAI's own CLIP at a small size, and its weights in the forms that they come in: what conversion is held to.

Needs clip-anytorch of requirements-references.txt.
"""

import functools
import runpy
import warnings
from types import ModuleType

import tiny
import torch

from vit_embed.conversion.layouts.openai import load_openai_code
from vit_embed.conversion.openai_files import find_openai_file

# Heads are 64 wide in OpenAI's code: two in the image tower, one in the text tower.
SIZES = {
    "embed_dim": 24,
    "image_resolution": 32,
    "vision_layers": 3,
    "vision_width": 128,
    "vision_patch_size": 8,
    "context_length": 16,
    "vocab_size": tiny.TEXT["vocab_size"],
    "transformer_width": 64,
    "transformer_heads": 1,
    "transformer_layers": 2,
}


@functools.cache
def openai_code() -> ModuleType:
    return load_openai_code()


@functools.cache
def openai_tokenizer():
    """OpenAI's SimpleTokenizer (needs ftfy and regex)."""
    return runpy.run_path(find_openai_file("clip/simple_tokenizer.py"))["SimpleTokenizer"]()


def openai_clip(**sizes) -> torch.nn.Module:
    """A small CLIP with random weights, stored as OpenAI stores them: float16 but for norms and embeddings."""
    model = tiny.randomised(openai_code().CLIP(**{**SIZES, **sizes}))
    openai_code().convert_weights(model)
    return model.eval()


def openai_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of OpenAI's archive of a model: its weights and three sizes."""
    sizes = {
        "input_resolution": model.visual.input_resolution,
        "context_length": model.context_length,
        "vocab_size": model.vocab_size,
    }
    return {**model.state_dict(), **{name: torch.tensor(size) for name, size in sizes.items()}}


def save_torchscript(model: torch.nn.Module, path) -> None:
    """The TorchScript archive of a float16 model, traced with the methods that OpenAI's has and holding its sizes."""
    traceable = openai_code().CLIP(**{**SIZES, **_sizes_of(model)})
    openai_code().convert_weights(traceable)
    traceable.load_state_dict(model.state_dict())
    for name, tensor in openai_state_dict(model).items():
        if name in vars(traceable):
            delattr(traceable, name)
        if name not in model.state_dict():
            traceable.register_buffer(name, tensor)
    pixel_values = torch.randn(2, 3, model.visual.input_resolution, model.visual.input_resolution)
    input_ids = torch.randint(1, 90, (2, model.context_length))
    inputs = {"forward": (pixel_values, input_ids), "encode_image": (pixel_values,), "encode_text": (input_ids,)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of shape checks in torch's own attention
        torch.jit.trace_module(traceable.eval(), inputs, check_trace=False).save(str(path))


def _sizes_of(model: torch.nn.Module) -> dict[str, int]:
    return {"vocab_size": model.vocab_size, "context_length": model.context_length}
