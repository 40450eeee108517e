"""Classifying by texts: the vectors of classes, of many sentences each, and a pipeline with sigmoid scores."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ZeroShotImageClassificationPipeline

from .configuration_vit_embed import VitEmbedTextConfig
from .inputs_vit_embed import HOST_DEVICES, check_sentence_lengths, check_sentences

# Tokens of a pass over many texts: enough to keep a processor, or an accelerator, at work, and little memory.
TOKENS_OF_A_PASS, TOKENS_OFF_HOST = 4096, 65536


class TextBatch(NamedTuple):
    """Texts that begin alike: input_ids, attention_mask (b, T); rows: (r,) numbers of the sentences that they are,
    text_of_row: (r,) which of them each of those is."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    rows: torch.Tensor
    text_of_row: torch.Tensor


def text_batches(
    config: VitEmbedTextConfig, tokenizer: PreTrainedTokenizerBase, sentences: list[str], num_tokens: int
) -> Iterator[TextBatch]:
    """Different sentences in the order of their tokens, as many at a time as make the tower compute `num_tokens`."""
    encoded = tokenizer(sentences, padding=True, return_attention_mask=True, return_tensors="pt")
    check_sentence_lengths(sentences, encoded.attention_mask, config.max_position_embeddings)
    width = encoded.input_ids.shape[1]
    columns = torch.cat([encoded.input_ids, encoded.attention_mask], dim=1)
    columns, text_of_row = columns.unique(dim=0, return_inverse=True)
    ids, mask = columns.split(width, dim=1)
    costs = torch.full((len(ids),), config.max_position_embeddings)  # a bidirectional tower computes every place
    if config.use_causal_mask:
        shared = (ids[1:] == ids[:-1]).long().cumprod(1).sum(1)
        costs = (costs if config.reads_padding else mask.sum(1)) - F.pad(shared, (1, 0))
    sizes = (costs.clamp(min=1).cumsum(0) // num_tokens).unique_consecutive(return_counts=True)[1].tolist()
    rows_by_text = text_of_row.argsort()
    rows = rows_by_text.split([int(part.sum()) for part in text_of_row.bincount().split(sizes)])
    for some_ids, some_mask, members in zip(ids.split(sizes), mask.split(sizes), rows):
        longest = int(some_mask.sum(1).max())
        texts = text_of_row[members]
        yield TextBatch(some_ids[:, :longest], some_mask[:, :longest], members, texts - texts.min())


def class_features(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    templates: Sequence[str | Callable[[str], str]],
) -> torch.Tensor:
    """As `get_class_features` of a model says."""
    check_sentences(names, templates)
    sentences = [
        template(name) if callable(template) else template.replace("{}", name)
        for name in names
        for template in templates
    ]
    device = model.text_model.device
    if device.type == "meta":  # accelerate keeps the weights elsewhere, and brings inputs to where they will be
        device = torch.device("cpu")
    num_tokens = TOKENS_OF_A_PASS if device.type in HOST_DEVICES else TOKENS_OFF_HOST
    sums = None
    for batch in text_batches(model.text_model.config, tokenizer, sentences, num_tokens):
        ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        features = model.get_text_features(ids, normalize=True, attention_mask=mask, share_prefixes=True).float()
        sums = features.new_zeros(len(names), features.shape[1]) if sums is None else sums
        classes = (batch.rows // len(templates)).to(features.device)
        sums.index_add_(0, classes, features[batch.text_of_row.to(features.device)])
    return F.normalize(sums, dim=-1)


class VitEmbedZeroShotPipeline(ZeroShotImageClassificationPipeline):
    """Scores each label on its own, in [0, 1]: the sigmoid of its logit. They do not add up to 1. `pipeline` finds it
    through the config of a model trained with the sigmoid loss.

    transformers gives sigmoid scores to models whose type is called "siglip" alone, and a softmax over the labels to
    every other; a single label then always scores 1.

    Texts longer than the text tower takes are cut, as in transformers' SigLIP.
    """

    def preprocess(  # type: ignore[override]
        self, image, candidate_labels=None, tokenizer_kwargs=None, **options
    ) -> dict[str, Any]:
        max_length = self.model.config.text_config.max_position_embeddings
        tokenizer_kwargs = {
            "padding": "max_length",
            "max_length": max_length,
            "truncation": True,
            **(tokenizer_kwargs or {}),
        }
        return super().preprocess(image, candidate_labels, tokenizer_kwargs=tokenizer_kwargs, **options)

    def postprocess(self, model_outputs: dict[str, Any]) -> list[dict[str, Any]]:  # type: ignore[override]
        scores = model_outputs["logits"][0].float().sigmoid().tolist()
        pairs = sorted(zip(scores, model_outputs["candidate_labels"]), key=lambda pair: -pair[0])
        return [{"score": score, "label": label} for score, label in pairs]
