"""The text tower's start: a small random sentence encoder as the teacher."""

import re
from pathlib import Path

import distill_text
import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict
from training_runs import REPO, assert_equal_runs, losses, results, run_here, text_fields, weights
from transformers import BertConfig, BertModel, BertTokenizerFast, TrainingArguments

from recipes import distillation
from vit_embed import VitEmbedForContrastive

WORDS = ("red", "blue", "green", "cat", "dog", "house", "tree", "sun", "moon", "car")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A teacher, a data set of captions and tags, and the config of a student."""
    folder = tmp_path_factory.mktemp("distill")
    (folder / "teacher").mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "teacher")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=5 + len(WORDS), initializer_range=1.0, **sizes)).save_pretrained(folder / "teacher")
    captions = [[f"{colour} {thing}"] for colour in WORDS[:3] for thing in WORDS[3:]]
    rows = Dataset.from_dict({"captions": captions, "tags": [["sun", "moon"]] * len(captions)})
    DatasetDict(train=rows).save_to_disk(str(folder / "data"))
    config = tiny.dual_config(projection_dim=16, text_config=text_fields())
    config.save_pretrained(folder / "config")
    return folder


def distill(folder: Path, output_dir: Path, **options: object) -> None:
    given = {"dataset": folder / "data", "tag_column": "tags", "config_name": folder / "config", "tokenizer_name": REPO}
    run_here(distill_text, **given, output_dir=output_dir, do_train=True, **options)


def test_the_students_texts_come_near_the_teachers(folder, monkeypatch, tmp_path):
    """And the image tower stays as it started; the words of the vocabulary are learned beside the captions."""
    monkeypatch.setattr(distillation, "WORD", re.compile(f"({'|'.join(WORDS)})</w>"))
    options = {"teacher": folder / "teacher", "do_eval": True, "num_train_epochs": 60, "learning_rate": 5e-3}
    distill(folder, tmp_path / "run", **options, logging_steps=10, per_device_train_batch_size=16)
    curve = losses(tmp_path / "run")
    assert curve[0] > 0.5 and curve[-1] < 0.2, "one minus the cosine, from random to near"
    saved = weights(tmp_path / "run")
    model = VitEmbedForContrastive.from_pretrained(tmp_path / "run")
    assert (saved["vision_model.post_layernorm.weight"] == 1).all(), "no picture was seen"
    assert (saved["text_model.final_layer_norm.weight"] != 1).any() and model.config.projection_dim == 16
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"| cosine | {results(tmp_path / 'run', 'eval')['cosine']:.4g} |" in card


def test_a_run_goes_on_from_its_checkpoint(folder, tmp_path):
    options = {"teacher": folder / "teacher", "max_steps": 4, "logging_steps": 1, "save_strategy": "steps"}
    distill(folder, tmp_path / "unbroken", **options, save_steps=2)
    (tmp_path / "resumed").mkdir()
    (tmp_path / "unbroken" / "checkpoint-2").rename(tmp_path / "resumed" / "checkpoint-2")
    distill(folder, tmp_path / "resumed", **options, save_steps=2, resume_from_checkpoint=True)
    assert_equal_runs(tmp_path / "resumed", tmp_path / "unbroken")


def test_refusals(folder, monkeypatch, tmp_path):
    for options, message in (
        ({}, "expected one of --teacher and --teacher_package"),
        ({"teacher_package": "no_such_package"}, "expected the package no_such_package to be installed"),
    ):
        with pytest.raises(ValueError, match=message):
            distill(folder, tmp_path / "run", **options)
    with pytest.raises(ValueError, match="expected projection_dim of at most the teacher's 24, got 32"):
        distillation.teacher_embeddings(str(folder / "teacher"), ["red cat", "dog"], 32)
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="expected one process and at most one GPU, got 1 and 2"):
        distill(folder, tmp_path / "run", teacher=folder / "none")


def test_targets_are_centred_and_keep_the_strongest_directions(folder):
    """With all directions, cosines are those of the centred embeddings, whatever the order of texts and batches."""
    texts = ["red cat", "dog", "blue house tree sun", "moon", "green car"]
    targets = distillation.teacher_embeddings(str(folder / "teacher"), texts, 24, batch_size=2)
    again = distillation.teacher_embeddings(str(folder / "teacher"), texts[::-1], 24, batch_size=5).flip(0)
    torch.testing.assert_close(targets @ targets.T, again @ again.T, rtol=0, atol=2e-2)  # bfloat16 of the teacher
    assert targets.mean(dim=0).norm() < 0.5
