"""Texts of a picture: what is wrong with its captions, and which text is drawn of them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from transformers import CLIPTokenizer

if TYPE_CHECKING:
    from recipes.contrastive import DataArguments

SENTENCES = ("a picture of {}", "a photo of {}", "an icon of {}", "This is a photo of {}.")
MOST_WORDS = 5  # of a name that fits into a sentence; a longer text is one itself
NAME_SHARE = 0.6
EMPTY, TOO_LONG = "an empty caption", "a caption too long, cut"


def caption_problem(captions: list[str], tokenizer: CLIPTokenizer) -> str | None:
    """EMPTY, TOO_LONG or None."""
    if not captions:
        return EMPTY
    if max(map(len, tokenizer(captions, verbose=False).input_ids)) > tokenizer.model_max_length:
        return TOO_LONG
    return None


def has_names(arguments: DataArguments) -> bool:
    """Whether the first of a picture's captions is its name, more than the others; else they are equals, as COCO's."""
    return arguments.name_share is not None or arguments.tag_column is not None


def draw_caption(captions: list[str], tags: list[str], arguments: DataArguments) -> str:
    """Draw one text, at times in a sentence if it is short: any caption; where there are names the name, the name with
    tags, another caption, or tags alone."""
    text = draw_by_name(captions, tags, arguments) if has_names(arguments) else random.choice(captions)
    name = text.partition(", ")[0] if tags else text
    is_short = len(name.split()) <= MOST_WORDS and not name.endswith((".", "!", "?"))
    return random.choice(SENTENCES).format(text) if is_short and random.random() < arguments.sentence_share else text


def draw_by_name(captions: list[str], tags: list[str], arguments: DataArguments) -> str:
    text, others, choice = captions[0], captions[1:], random.random()
    share = NAME_SHARE if arguments.name_share is None else arguments.name_share
    if choice <= share or not (others or tags):
        return text
    some_tags = random.sample(tags, min(len(tags), random.randint(1, 3)))
    if others and random.random() < 1 / 2:
        return random.choice(others)
    if len(some_tags) > 1 and random.random() < 1 / 3:
        return ", ".join(some_tags)
    return ", ".join([text, *some_tags])


def draw_fitting(captions: list[str], tags: list[str], arguments: DataArguments, tokenizer: CLIPTokenizer) -> str:
    """`draw_caption`; where that is longer than the tokenizer's limit the name, or any caption, to be cut."""
    text = draw_caption(captions, tags, arguments)
    if len(tokenizer(text, verbose=False).input_ids) <= tokenizer.model_max_length:
        return text
    return captions[0] if has_names(arguments) else random.choice(captions)
