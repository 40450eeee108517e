"""Checkpoints that are not here: from OpenAI, with the hash that it published, or from the Hub."""

import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from vit_embed.conversion import openai_files
from vit_embed.conversion.progress import blocks

HUB_PATTERNS = ("*.json", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.txt", "*.model", "README.md")


def cache_folder() -> Path:
    """Where OpenAI's files stay: VIT_EMBED_CACHE, or ~/.cache/vit_embed."""
    return Path(os.environ.get("VIT_EMBED_CACHE", Path.home() / ".cache" / "vit_embed"))


def download_openai(name: str) -> Path:
    """OpenAI's own file of a key of OPENAI_MODELS, fetched once.

    Raises:
        OSError: it cannot be fetched, or has another hash than was published. Nothing of it stays.
    """
    file_name, expected = openai_files.OPENAI_MODELS[name]
    target = cache_folder() / file_name
    if target.is_file() and sha256(target) == expected:
        return target
    url = f"{openai_files.OPENAI_ADDRESS}/{expected}/{file_name}"
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{file_name}.{os.getpid()}.partial")
    try:
        with urllib.request.urlopen(url, timeout=60) as response, open(partial, "wb") as file:
            length = int(response.headers.get("Content-Length") or 0)
            for block in blocks(response, f"fetching {file_name}", length):
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


def sha256(path: Path) -> str:
    """The hash of a file, with a bar for a large one."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in blocks(file, f"hashing {path.name}", path.stat().st_size):
            digest.update(block)
    return digest.hexdigest()


def download_from_hub(name: str) -> Path:
    """The folder of a repository of the Hub.

    Raises:
        FileNotFoundError: there is none of that name.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_PATTERNS)))
    except (HfHubHTTPError, HFValidationError) as error:
        raise FileNotFoundError(f"no such checkpoint: {name} is neither here nor on the Hub: {error}") from error
