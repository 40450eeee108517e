"""What a user names as a source -> its weights, the config beside them, and the files that travel with them.

A source is a file, a folder, the name of a model that OpenAI published, or a repository of the Hub.
"""

import hashlib
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from tqdm import tqdm

from vit_embed.checkpoint_reader import INDEX_ENDING, listing, read_checkpoint, read_index, read_json
from vit_embed.saving_vit_embed import IMAGE_PROCESSOR_FILE, PROCESSOR_FILE, TOKENIZER_FILES

logger = logging.getLogger(__name__)

# Files of this size and more show a bar.
PROGRESS_BYTES = 100 * 2**20

# OpenAI's vision transformers: file and SHA-256, which is a folder of their address (`_MODELS` in its clip/clip.py).
OPENAI_ADDRESS = "https://openaipublic.azureedge.net/clip/models"
OPENAI_MODELS = {
    "ViT-B/32": ("ViT-B-32.pt", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "ViT-B/16": ("ViT-B-16.pt", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "ViT-L/14": ("ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    "ViT-L/14@336px": ("ViT-L-14-336px.pt", "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"),
}

# Weights of a folder, the first that is there; safetensors before pickles.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TRANSFORMERS_WEIGHT_FILES = tuple(name for name in WEIGHT_FILES if not name.startswith("open_clip_"))
WEIGHT_ENDINGS = (".safetensors", ".pt", ".pth", ".bin")
# Letters of a card that are looked at; front matter with all results of a large benchmark has some 100,000.
MAX_CARD_LENGTH = 2**20
# What says more of the weights, the first that is there.
CONFIG_FILES = ("open_clip_config.json", "config.json")
HUB_PATTERNS = ("*.json", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.txt", "*.model", "README.md")


class Source(NamedTuple):
    """A checkpoint as it was found.

    name: what the user called it; of a path the last part, as it goes into cards that others read.
    files: of the weights; more than one where they are sharded.
    weights: the file that `read_checkpoint` takes.
    config: the JSON beside the weights, empty without one.
    preprocessor: preprocessor_config.json beside them, or what a processor_config.json says of images, or None.
    tokenizer_files: those beside them.
    licence: what the source states, or None.
    """

    name: str
    files: tuple[Path, ...]
    weights: Path
    config: dict[str, Any]
    preprocessor: dict[str, Any] | None
    tokenizer_files: tuple[Path, ...]
    licence: str | None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights, mapped from their files; raises as `read_checkpoint` does."""
        return read_checkpoint(self.weights)

    def sha256(self) -> dict[str, str]:
        """The hash of every file of the weights, by its name."""
        return {path.name: sha256(path) for path in self.files}


def find_source(name: str | os.PathLike) -> Source:
    """Finds, and where it is not here fetches, what a user names.

    Args:
        name: a file of weights; a folder with weights and what belongs to them; a key of OPENAI_MODELS, or a repository
            "owner/name" of the Hub, where nothing of that name is here.

    Raises:
        FileNotFoundError: nothing of that name is here or there.
        ValueError: a folder without weights or with several, or a config that is no JSON.
        OSError: a download failed, or has another hash than was published.
    """
    path, called = Path(name), str(name)
    if path.exists():
        called = path.resolve().name
    else:
        path = _fetched(called)
    weights = _weights_of(path) if path.is_dir() else path
    # Beside a lone file may lie anything; a folder was given as a whole.
    beside = {each.name: each for each in weights.parent.iterdir() if each.is_file()} if path.is_dir() else {}
    for each in () if path.is_dir() else CONFIG_FILES:
        if (weights.parent / each).is_file():
            beside[each] = weights.parent / each
    # A repository may hold the same model in both forms, each with its config.
    config_files = CONFIG_FILES[::-1] if weights.name in TRANSFORMERS_WEIGHT_FILES else CONFIG_FILES
    config = next((read_json(beside[each]) for each in config_files if each in beside), {})
    if not isinstance(config.get("model_type", ""), str):  # layouts look it up
        raise ValueError(f"the model_type beside {weights} must be text, got {type(config['model_type']).__name__}")
    files = (weights,)
    if weights.name.endswith(INDEX_ENDING):
        files += tuple(weights.parent / shard for shard in sorted(set(read_index(weights).values())))
    return Source(
        name=called,
        files=files,
        weights=weights,
        config=config,
        preprocessor=_image_processor(beside),
        tokenizer_files=tuple(beside[each] for each in TOKENIZER_FILES if each in beside),
        licence=_licence(config, beside.get("README.md")),
    )


def _fetched(name: str) -> Path:
    """What is not here, from OpenAI or from the Hub."""
    if name in OPENAI_MODELS:
        return download_openai(name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return _download_from_hub(name)
    raise FileNotFoundError(
        f"no such checkpoint: {name}; give a file, a folder, a repository of the Hub as owner/name, or one of "
        f"{', '.join(OPENAI_MODELS)}"
    )


def _weights_of(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    others = sorted(path for path in folder.iterdir() if path.name.endswith(WEIGHT_ENDINGS) and path.is_file())
    if len(others) == 1:
        return others[0]
    found = f"there are several: {listing([path.name for path in others])}; name one" if others else "there is none"
    raise ValueError(f"{folder} must hold weights, one of {', '.join(WEIGHT_FILES)} or a single other file; {found}")


def _image_processor(beside: dict[str, Path]) -> dict[str, Any] | None:
    if IMAGE_PROCESSOR_FILE in beside:
        return read_json(beside[IMAGE_PROCESSOR_FILE])
    stated = read_json(beside[PROCESSOR_FILE]).get("image_processor") if PROCESSOR_FILE in beside else None
    return stated if isinstance(stated, dict) else None


def _licence(config: dict[str, Any], card: Path | None) -> str | None:
    """What the model card's front matter says, or else the config that timm writes."""
    stated = None if card is None else _stated_licence(card)
    pretrained = config.get("pretrained_cfg")
    stated = stated or (pretrained.get("license") if isinstance(pretrained, dict) else None)
    # Of a stranger's text no more than one line of a name goes into a card of ours.
    return stated if isinstance(stated, str) and re.fullmatch(r"[\w .()+-]{1,60}", stated) else None


def _stated_licence(card: Path) -> str | None:
    """The line "license: ..." of a card's front matter. It is no more of YAML than that line: a stranger's YAML can
    nest or repeat itself beyond what a parser takes."""
    with open(card, encoding="utf-8-sig", errors="replace") as file:
        lines = file.read(MAX_CARD_LENGTH).split("\n")
    if lines[0].rstrip() != "---":
        return None
    for line in lines[1:]:
        if line.rstrip() == "---":
            break
        name, _, value = line.partition(":")
        if name == "license":
            value = value.strip()
            return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value
    return None


# Fetching


def cache_folder() -> Path:
    """Where fetched files stay: VIT_EMBED_CACHE, or ~/.cache/vit_embed."""
    return Path(os.environ.get("VIT_EMBED_CACHE", Path.home() / ".cache" / "vit_embed"))


def download_openai(name: str) -> Path:
    """OpenAI's own file of a key of OPENAI_MODELS, fetched once, with the hash that was published.

    Raises:
        OSError: it cannot be fetched, or is another file. Nothing of it stays.
    """
    file_name, expected = OPENAI_MODELS[name]
    target = cache_folder() / file_name
    if target.is_file() and sha256(target) == expected:
        return target
    url = f"{OPENAI_ADDRESS}/{expected}/{file_name}"
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{file_name}.{os.getpid()}.partial")
    try:
        with urllib.request.urlopen(url, timeout=60) as response, open(partial, "wb") as file:
            length = int(response.headers.get("Content-Length") or 0)
            for block in _blocks(response, f"fetching {file_name}", length):
                file.write(block)
        found = sha256(partial)
        if found != expected:
            raise OSError(f"{url} gave a file with the SHA-256 {found}, published is {expected}; fetch it again")
        os.replace(partial, target)
    except urllib.error.URLError as error:
        raise OSError(f"{url} cannot be fetched: {error.reason}; fetch it elsewhere and give its path") from error
    finally:
        partial.unlink(missing_ok=True)
    return target


def _download_from_hub(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_PATTERNS)))
    except (HfHubHTTPError, HFValidationError) as error:
        raise FileNotFoundError(f"no such checkpoint: {name} is neither here nor on the Hub: {error}") from error


def sha256(path: Path) -> str:
    """The hash of a file, with a bar for a large one."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in _blocks(file, f"hashing {path.name}", path.stat().st_size):
            digest.update(block)
    return digest.hexdigest()


def _blocks(file: BinaryIO, what: str, length: int) -> Iterator[bytes]:
    """The content of an open file, block by block, with a bar where it is long."""
    with progress(what, length) as bar:
        while block := file.read(2**20):
            yield block
            bar.update(len(block))


def progress(what: str, num_bytes: int) -> tqdm:
    """A bar that counts bytes, silent for what takes no time."""
    return tqdm(total=num_bytes or None, desc=what, unit="B", unit_scale=True, disable=num_bytes < PROGRESS_BYTES)
