"""A CLIP tokenizer for the vocabulary of the small models, and one of words and letters as SigLIP's."""

import json
import string
from pathlib import Path

import tiny
from tokenizers import Tokenizer, models, pre_tokenizers, processors

TOKENIZER_FILES = {"vocab.json", "merges.txt", "tokenizer_config.json"}

# Words that the tokenizer reads as fewer tokens than letters, as a real vocabulary does, and the pairs they join.
MERGES = (
    *("t h", "th i", "thi s</w>", "i s</w>", "o f</w>", "p h", "ph o", "pho t", "phot o</w>"),  # this is of photo
    *("c a", "ca t</w>", "f l", "fl o", "flo w", "flow e", "flowe r</w>"),  # cat, flower
    *("r o", "ro c", "roc k", "rock e", "rocke t</w>"),  # rocket
)


def write_tokenizer(folder: Path) -> dict[str, int]:
    """Puts TOKENIZER_FILES for tiny.TEXT's vocabulary in `folder`, which need not exist; returns the vocabulary."""
    symbols = [*string.ascii_lowercase, *string.digits, "."]
    entries = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *(merge.replace(" ", "") for merge in MERGES)]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    vocabulary.update({"<|startoftext|>": tiny.TEXT["bos_token_id"], "<|endoftext|>": tiny.EOS})
    # The ids between are words that no text of the tests has; a gap would make the tokenizers library warn.
    vocabulary.update({f"unused{i}</w>": i for i in range(len(entries), tiny.TEXT["bos_token_id"])})
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": tiny.TEXT["max_position_embeddings"],
        "bos_token": "<|startoftext|>",
        **dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return vocabulary


WORDS = ["<pad>", "</s>", "<unk>", *["▁", "▁a", "▁photo", "▁of", "▁cat", "s"], *"abcdefghijklmnopqrstuvwxyz"]


def write_sentencepiece_tokenizer(folder: Path, pad_token: str) -> None:
    """A unigram tokenizer.json as T5's and Gemma's, which SigLIP's text towers read."""
    tokenizer = Tokenizer(models.Unigram([(word, -float(n)) for n, word in enumerate(WORDS)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": pad_token}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1000, **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
