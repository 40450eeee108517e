"""Which file of a folder, or of a repository of the Hub, holds the weights."""

from typing import Any

from vit_embed.conversion.messages import listing

# Weights of a folder, the first that is there; safetensors before pickles.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
WEIGHT_ENDINGS = (".safetensors", ".pt", ".pth", ".bin")


def choose_weights(names: list[str], place: Any) -> str:
    """The file of weights among the names of a folder's files; those of folders inside it are left out.

    Raises:
        ValueError: there is none, or several and none of WEIGHT_FILES; `place` is what the message calls the folder.
    """
    for name in WEIGHT_FILES:
        if name in names:
            return name
    others = sorted(name for name in names if name.endswith(WEIGHT_ENDINGS) and "/" not in name)
    if len(others) == 1:
        return others[0]
    found = f"there are several: {listing(others)}; name one" if others else "there is none"
    raise ValueError(f"{place} must hold weights, one of {', '.join(WEIGHT_FILES)} or a single other file; {found}")
