"""Small models in the form that a user has them, for the tests of more than one file."""

import gc
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import openai_reference
import pytest
import torch

from vit_embed.convert_checkpoint import convert_checkpoint


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """A conversion collects garbage; without the objects of imported modules this takes 1 ms in place of 300."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> types.SimpleNamespace:
    """A small OpenAI CLIP: its TorchScript archive, its state dict in a file, and itself in float32."""
    folder = tmp_path_factory.mktemp("source")
    model = openai_reference.openai_clip()
    openai_reference.save_torchscript(model, folder / "archive.pt")
    state_dict = openai_reference.openai_state_dict(model)
    torch.save(state_dict, folder / "clip.pt")
    return types.SimpleNamespace(
        archive=folder / "archive.pt", file=folder / "clip.pt", state_dict=state_dict, model=model.float()
    )


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "clip"
    convert_checkpoint(source.archive, folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Iterator[Callable]:
    """The source of a case by the case's name, made once a file; tests change copies of it."""
    import open_clip_reference  # not installed everywhere that test_convert.py runs
    import sources

    folder, existing = tmp_path_factory.mktemp("sources"), {}

    def make(name: str) -> sources.Source:
        if name not in existing:
            existing[name] = sources.NAMED_CASES[name].make(folder / str(len(existing)))
        return existing[name]

    with pytest.MonkeyPatch.context() as patch:
        open_clip_reference.small_siglip(patch)
        yield make
