"""What OpenAI published of CLIP: names of models and files, and where an installed package has them."""

import contextlib
import importlib.metadata
import os
from pathlib import Path

# Its vision transformers: file and SHA-256, which is a folder of their address (`_MODELS` in its clip/clip.py).
OPENAI_ADDRESS = "https://openaipublic.azureedge.net/clip/models"
OPENAI_MODELS = {
    "ViT-B/32": ("ViT-B-32.pt", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "ViT-B/16": ("ViT-B-16.pt", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "ViT-L/14": ("ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    "ViT-L/14@336px": ("ViT-L-14-336px.pt", "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"),
}
# Its other models, with ResNets as image towers.
OPENAI_RESNETS = ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64")

# Its BPE vocabulary, 48,894 merges, for all of them.
BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
BPE_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
BPE_MERGES = 48894

# Distributions that carry its files: the vocabulary, and (the first) the code of the model.
DISTRIBUTIONS = ("clip-anytorch", "clip", "open_clip_torch")


def find_openai_file(ending: str) -> Path | None:
    """A file of OpenAI's CLIP in an installed package, by the last parts of its path; None without one.

    The package is not imported.
    """
    for name in DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            for file in importlib.metadata.files(name) or []:
                if file.match(ending) and os.path.isfile(file.locate()):
                    return Path(file.locate())
    return None
