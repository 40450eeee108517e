"""A small OpenAI CLIP, for the tests of more than one file."""

import types
from pathlib import Path

import openai_reference
import pytest
import torch
import torch._utils

from vit_embed.convert_checkpoint import convert_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> types.SimpleNamespace:
    """A small OpenAI CLIP: its TorchScript archive, its state dict in a file, and itself in float32."""
    folder = tmp_path_factory.mktemp("source")
    model = openai_reference.openai_clip()
    openai_reference.save_torchscript(model, folder / "archive.pt")
    state_dict = openai_reference.openai_state_dict(model)
    torch.save(state_dict, folder / "state_dict.pt")
    return types.SimpleNamespace(
        archive=folder / "archive.pt", file=folder / "state_dict.pt", state_dict=state_dict, model=model.float()
    )


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "clip"
    convert_checkpoint(source.archive, folder)
    return folder
