"""The text tower's start: a small random sentence encoder as the teacher."""

import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, BertTokenizerFast, TrainingArguments

from vit_embed import VitEmbedConfig, VitEmbedForContrastive

REPO = Path(__file__).parent.parent
sys.path.insert(0, str(REPO / "examples"))

import distill_text  # noqa: E402

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
    text = json.loads((REPO / "config.json").read_text())["text_config"]
    tokens = {key: text[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    VitEmbedConfig(**tiny.VISION, projection_dim=16, text_config={**tiny.TEXT, **tokens}).save_pretrained(
        folder / "config"
    )
    return folder


def command(folder: Path, output_dir: Path, *arguments: object) -> list[str]:
    given = ["--dataset", folder / "data", "--tag_column", "tags", "--config_name", folder / "config"]
    given += ["--tokenizer_name", REPO, "--output_dir", output_dir, "--use_cpu", "--report_to", "none", *arguments]
    return ["distill", *map(str, given)]


def test_several_gpus_are_refused_at_once(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    monkeypatch.setattr("sys.argv", command(folder, tmp_path / "run", "--do_train", "--teacher", folder / "none"))
    with pytest.raises(ValueError, match="expected one process and at most one GPU, got 1 and 2"):
        distill_text.main()


def test_the_students_texts_come_near_the_teachers(folder, monkeypatch, tmp_path):
    """And the image tower stays as it started; the words of the vocabulary are learned beside the captions."""
    monkeypatch.setattr(distill_text, "WORD", distill_text.re.compile(f"({'|'.join(WORDS)})</w>"))
    asked = ["--teacher", folder / "teacher", "--do_train", "--do_eval", "--num_train_epochs", 60]
    asked += [
        "--learning_rate",
        5e-3,
        "--logging_steps",
        10,
        "--save_strategy",
        "no",
        "--per_device_train_batch_size",
        16,
    ]
    monkeypatch.setattr(sys, "argv", command(folder, tmp_path / "run", *asked))
    torch.manual_seed(0)
    distill_text.main()
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[0] > 0.5 and losses[-1] < 0.2, "one minus the cosine, from random to near"
    weights = load_file(tmp_path / "run" / "model.safetensors")
    model = VitEmbedForContrastive.from_pretrained(tmp_path / "run")
    assert (weights["vision_model.post_layernorm.weight"] == 1).all(), "no picture was seen"
    assert (weights["text_model.final_layer_norm.weight"] != 1).any() and model.config.projection_dim == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one of --teacher and --teacher_package"),
        (["--teacher_package", "no_such_package"], "expected the package no_such_package to be installed"),
    ],
)
def test_refusals(arguments, message, folder, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", command(folder, tmp_path / "run", *arguments))
    with pytest.raises(ValueError, match=message):
        distill_text.main()


def test_a_joint_space_wider_than_the_teachers_is_refused(folder):
    with pytest.raises(ValueError, match="expected projection_dim of at most the teacher's 24, got 32"):
        distill_text.embed_texts(str(folder / "teacher"), ["red cat", "dog"], 32)


def test_targets_are_centred_and_keep_the_strongest_directions(folder):
    """With all directions, cosines are those of the centred embeddings, whatever the order of texts and batches."""
    texts = ["red cat", "dog", "blue house tree sun", "moon", "green car"]
    targets = distill_text.embed_texts(str(folder / "teacher"), texts, 24, batch_size=2)
    again = distill_text.embed_texts(str(folder / "teacher"), texts[::-1], 24, batch_size=5).flip(0)
    torch.testing.assert_close(targets @ targets.T, again @ again.T, rtol=0, atol=2e-2)  # bfloat16 of the teacher
    assert targets.mean(dim=0).norm() < 0.5
