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
# Where sentence-transformers up to 5 keeps the CLIP of its folders.
INNER_FOLDER = "0_CLIPModel"


def choose_weights(names: list[str], place: Any) -> str:
    """The file of weights among the names of a folder's files; of folders inside it INNER_FOLDER alone is looked into,
    where the folder itself has none.

    Raises:
        ValueError: there is none, or several and none of WEIGHT_FILES; `place` is what the message calls the folder.
    """
    for name in WEIGHT_FILES:
        if name in names:
            return name
    others = sorted(name for name in names if name.endswith(WEIGHT_ENDINGS) and "/" not in name)
    if len(others) == 1:
        return others[0]
    inner = [name.removeprefix(f"{INNER_FOLDER}/") for name in names if name.startswith(f"{INNER_FOLDER}/")]
    if inner and not others:
        return f"{INNER_FOLDER}/{choose_weights(inner, f'{place}/{INNER_FOLDER}')}"
    found = f"there are several: {listing(others)}; name one" if others else "there is none"
    raise ValueError(f"{place} must hold weights, one of {', '.join(WEIGHT_FILES)} or a single other file; {found}")
