"""What tests of more than one layout do: save a stock model, build ours from a conversion, compare every state."""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from vit_embed import VitEmbedConfig
from vit_embed.conversion.layouts import LAYOUTS
from vit_embed.conversion.layouts.layout import MODEL_CLASSES

# Two orders of float32 operations over three layers; measured at most 1.2e-5, where the largest value is 14.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

# What transformers 5 calls the modules of ViT and DINOv2 in memory, for the names that files have.
NEW_ATTENTION_NAMES = {
    r"attention\.attention\.(q)uery|attention\.attention\.(k)ey|attention\.attention\.(v)alue": (
        r"attention.\1\2\3_proj"
    ),
    r"attention\.output\.dense": "attention.o_proj",
}
# Meta's names of DINOv2 for those of transformers; query, key and value are one matrix besides.
META_NAMES = {
    r"embeddings\.(cls_token|mask_token|register_tokens)": r"\1",
    r"embeddings\.position_embeddings": "pos_embed",
    r"embeddings\.patch_embeddings\.projection": "patch_embed.proj",
    r"encoder\.layer\.": "blocks.",
    r"attention\.output\.dense": "attn.proj",
    r"layer_scale(\d)\.lambda1": r"ls\1.gamma",
    r"layernorm\.": "norm.",
}


def renamed(state_dict: dict[str, torch.Tensor], names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The same weights, every pattern in every name replaced, one after the other."""
    result = {}
    for key, tensor in state_dict.items():
        for old, new in names.items():
            key = re.sub(old, new, key)
        result[key] = tensor
    return result


def by_meta(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of transformers' DINOv2 as Meta's own files have them."""
    result = renamed(state_dict, META_NAMES)
    for key in [key for key in result if ".query." in key]:
        parts = [result.pop(key.replace("query", each)) for each in ("query", "key", "value")]
        result[key.replace("attention.attention.query", "attn.qkv")] = torch.cat(parts)
    return result


def saved(model: torch.nn.Module, folder: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict]:
    """What `save_pretrained` of a stock model writes: its weights by the names in the file, and its config.json."""
    model.save_pretrained(folder)
    return load_file(Path(folder) / "model.safetensors"), json.loads((Path(folder) / "config.json").read_text())


def converter(layout: str) -> Callable:
    """The `convert` of a layout, for (config, weights)."""

    def convert(state_dict, source_config, options):
        converted = LAYOUTS[layout].convert(state_dict, source_config, options)
        return converted.config, converted.weights

    return convert


def built(config: VitEmbedConfig, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The model of ours that a conversion describes, with its weights and none beside."""
    model = MODEL_CLASSES[config.architectures[0]](config).eval()
    model.load_state_dict(weights)
    return model


@torch.no_grad()
def assert_same_states(ours: torch.nn.Module, theirs: torch.nn.Module, pixel_values: torch.Tensor, **options) -> None:
    """Every hidden state of the two, the class token after the final norm, and the logits where there are some.

    `options` are for the forward of transformers' model, whose `last_hidden_state` is after the final norm.
    """
    got = ours(pixel_values, output_hidden_states=True)
    expected = theirs(pixel_values, output_hidden_states=True, **options)
    assert len(got.hidden_states) == len(expected.hidden_states)
    for our, their in zip(got.hidden_states, expected.hidden_states):
        torch.testing.assert_close(our, their, **CLOSE)
    if "logits" in expected:
        torch.testing.assert_close(got.logits, expected.logits, **CLOSE)
    else:
        torch.testing.assert_close(ours.post_layernorm(got.last_hidden_state), expected.last_hidden_state, **CLOSE)
        torch.testing.assert_close(got.pooler_output, expected.last_hidden_state[:, 0], **CLOSE)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
