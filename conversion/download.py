"""Checkpoints that are not here: from OpenAI, with the hash that it published, or from the Hub."""

import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from vit_embed.conversion import openai_files
from vit_embed.conversion.progress import blocks
from vit_embed.conversion.reading.index import INDEX_ENDING, read_index
from vit_embed.conversion.weight_files import choose_weights

# Configs, tokenizers and the card; of its weights one form is chosen.
HUB_PATTERNS = ("*.json", "*.txt", "*.model", "README.md")


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
    """The folder of a repository of the Hub, with one form of its weights; without network, what is here of it.

    Raises:
        FileNotFoundError: there is none of that name.
        ValueError: it has no weights, or several and no usual name among them.
        OSError: it cannot be fetched.
    """
    try:
        info = HfApi().model_info(name)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(f"no such checkpoint: {name} is neither here nor on the Hub: {error}") from error
    except Exception as error:  # no network: of requests or httpx, by the release of huggingface_hub
        return _downloaded_before(name, error)
    weights = choose_weights([each.rfilename for each in info.siblings], name)
    patterns = [*HUB_PATTERNS, weights]
    try:
        if weights.endswith(INDEX_ENDING):
            index = read_index(Path(hf_hub_download(name, weights, revision=info.sha)))
            patterns += [Path(weights).with_name(shard).as_posix() for shard in index.values()]
        return Path(snapshot_download(name, allow_patterns=patterns, revision=info.sha))
    except HfHubHTTPError as error:
        raise OSError(f"{name} cannot be fetched from the Hub: {error}") from error


def _downloaded_before(name: str, error: Exception) -> Path:
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        raise FileNotFoundError(f"no such checkpoint: {name} is neither here nor on the Hub: {error}") from error
