"""What a user names as a source -> its weights, the config beside them, and the files that travel with them.

A source is a file, a folder, the name of a model that OpenAI published, or a repository of the Hub.
"""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vit_embed.conversion.download import download_from_hub, download_openai, sha256
from vit_embed.conversion.openai_files import OPENAI_MODELS, OPENAI_RESNETS
from vit_embed.conversion.processor_files import IMAGE_PROCESSOR_FILE, PROCESSOR_FILE, TOKENIZER_FILES
from vit_embed.conversion.reading import read_checkpoint
from vit_embed.conversion.reading.files import read_json
from vit_embed.conversion.reading.index import INDEX_ENDING, read_index
from vit_embed.conversion.reading.torch_files import WeightsChoice
from vit_embed.conversion.weight_files import INNER_FOLDER, WEIGHT_FILES, choose_weights

TRANSFORMERS_WEIGHT_FILES = tuple(name for name in WEIGHT_FILES if not name.startswith("open_clip_"))
# What says more of the weights, the first that is there.
CONFIG_FILES = ("open_clip_config.json", "config.json")
CARD_FILE = "README.md"
# Letters of a card that are looked at; front matter with all results of a large benchmark has some 100,000.
MAX_CARD_LENGTH = 2**20


class Source(NamedTuple):
    """A checkpoint as it was found.

    name: what the user called it; of a path the last part, as it goes into cards that others read.
    files: of the weights; more than one where they are sharded.
    weights: the file that `read_checkpoint` takes.
    config: the JSON beside the weights, empty without one.
    preprocessor: preprocessor_config.json beside them, or the image processor in a processor_config.json, or None.
    tokenizer_files: those beside them.
    licence: what the source states, or None.
    weights_key: which state dict of a training checkpoint; None leaves it to `read_checkpoint`.
    """

    name: str
    files: tuple[Path, ...]
    weights: Path
    config: dict[str, Any]
    preprocessor: dict[str, Any] | None
    tokenizer_files: tuple[Path, ...]
    licence: str | None
    weights_key: str | None = None

    def state_dict(self, is_logged: bool = True) -> dict[str, torch.Tensor]:
        """The weights, mapped from their files; raises as `read_checkpoint` does.

        Args:
            is_logged: whether a choice between averaged and other weights is; once is enough.
        """
        return read_checkpoint(self.weights, WeightsChoice(self.weights_key, is_logged))

    def sha256(self) -> dict[str, str]:
        """The hash of every file of the weights, by its name."""
        return {path.name: sha256(path) for path in self.files}


def find_source(name: str | os.PathLike, weights_key: str | None = None) -> Source:
    """Finds, and where it is not here fetches, what a user names.

    Args:
        name: a file of weights; a folder with weights and what belongs to them; a key of OPENAI_MODELS, or a repository
            "owner/name" of the Hub, where nothing of that name is here.
        weights_key: as in Source.

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
    if path.is_dir():
        inside = (*path.glob("*"), *path.glob(f"{INNER_FOLDER}/*"))
        weights = path / choose_weights([each.relative_to(path).as_posix() for each in inside if each.is_file()], path)
        beside = {each.name: each for each in (*path.glob(CARD_FILE), *weights.parent.iterdir()) if each.is_file()}
    else:  # beside a lone file may lie anything
        weights = path
        beside = {each: path.with_name(each) for each in CONFIG_FILES if path.with_name(each).is_file()}
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
        licence=_licence(config, beside.get(CARD_FILE)),
        weights_key=weights_key,
    )


def _fetched(name: str) -> Path:
    """What is not here, from OpenAI or from the Hub."""
    if name in OPENAI_MODELS:
        return download_openai(name)
    if name in OPENAI_RESNETS:
        raise ValueError(
            f"{name} is a CLIP with a ResNet, which cannot be converted; OpenAI's vision transformers are "
            f"{', '.join(OPENAI_MODELS)}"
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return download_from_hub(name)
    raise FileNotFoundError(
        f"no such checkpoint: {name}; give a file, a folder, a repository of the Hub as owner/name, or one of "
        f"{', '.join(OPENAI_MODELS)}"
    )


def _image_processor(beside: dict[str, Path]) -> dict[str, Any] | None:
    if IMAGE_PROCESSOR_FILE in beside:
        return read_json(beside[IMAGE_PROCESSOR_FILE])
    inner = read_json(beside[PROCESSOR_FILE]).get("image_processor") if PROCESSOR_FILE in beside else None
    return inner if isinstance(inner, dict) else None


def _licence(config: dict[str, Any], card: Path | None) -> str | None:
    """What the model card's front matter says, or else the config that timm writes."""
    licence = None if card is None else _licence_of_card(card)
    pretrained = config.get("pretrained_cfg")
    licence = licence or (pretrained.get("license") if isinstance(pretrained, dict) else None)
    # Of an untrusted text no more than one line of a name goes into a card of ours.
    return licence if isinstance(licence, str) and re.fullmatch(r"[\w .()+-]{1,60}", licence) else None


def _licence_of_card(card: Path) -> str | None:
    """The line "license: ..." of a card's front matter. No more of YAML is read than that line: an untrusted YAML can
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
