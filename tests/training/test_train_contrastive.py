"""The contrastive recipe: every kind of data it takes, what it draws, what it refuses; killed, resumed and shared."""

import json
import logging
import math
import random
import shutil
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import train_contrastive
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PictureImage
from training_runs import FSDP, assert_equal_runs, flags, losses, results, run_here, weights
from transformers import AutoProcessor

from recipes import contrastive
from recipes.contrastive import Collator, DataArguments, Groups, ModelArguments, check_pairs, draw_caption
from recipes.data import ROW, hold_out, with_row_names
from recipes.retrieval import caption_id, recalls
from vit_embed import VitEmbedConfig, VitEmbedForContrastive

REPO = Path(__file__).resolve().parents[2]
PICTURES = sorted((REPO / "examples" / "pictures").glob("*.png"))[::40]
SUPPORT = Path("tests") / "support"


def name_of(path: Path) -> str:
    return path.stem.replace("-", " ")


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(REPO, trust_remote_code=True)


def rows() -> Dataset:
    """Named pictures, two drawings of the first."""
    paths = [*PICTURES, PICTURES[0]]
    columns = {"image": list(map(str, paths)), "captions": [[name_of(path), "drawing"] for path in paths]}
    columns |= {"tags": [["emoji", "flat", "colour"]] * len(paths), "group": list(map(name_of, paths))}
    texts = List(Value("string"))
    return Dataset.from_dict(
        columns, features=Features(image=Image(), captions=texts, tags=texts, group=Value("string"))
    )


# --- every kind of data, beside test_data.py ---


def write_saved(folder: Path) -> dict:
    DatasetDict(train=rows(), validation=rows().select(range(len(PICTURES)))).save_to_disk(str(folder))
    return {"tag_column": "tags", "group_column": "group", "num_train_epochs": 1}


def write_pictures(folder: Path) -> dict:
    """A folder of pictures with their captions, and no splits."""
    folder.mkdir(parents=True)
    for path in PICTURES:
        shutil.copy(path, folder)
    lines = [json.dumps({"file_name": path.name, "text": name_of(path)}) for path in PICTURES]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return {"caption_column": "text", "validation_share": 0.5, "max_steps": 2}


def write_folder(folder: Path) -> dict:
    write_pictures(folder / "train")
    return write_pictures(folder / "validation")


def write_shards(folder: Path) -> dict:
    folder.mkdir()
    for split in ("train", "validation"):
        with tarfile.open(folder / f"{split}-0.tar", "w") as shard:
            for path in PICTURES:
                caption = folder / f"{path.stem}.txt"
                caption.write_text(name_of(path))
                shard.add(path, path.name)
                shard.add(caption, caption.name)
                caption.unlink()
    return {"image_column": "png", "caption_column": "txt", "max_steps": 2}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict:
    """Options of a run on a saved dataset with a small model that reads the shipped tokenizer; no dropout."""
    folder = tmp_path_factory.mktemp("small")
    write_saved(folder / "data")
    text = json.loads((REPO / "config.json").read_text())["text_config"]
    tokens = {key: text[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    config = VitEmbedConfig(**tiny.VISION, projection_dim=16, text_config={**tiny.TEXT, **tokens})
    config.save_pretrained(folder / "config")
    model = {"config_name": folder / "config", "tokenizer_name": REPO}
    return {"dataset": folder / "data", **model, "do_train": True, "learning_rate": 1e-3, "logging_steps": 1}


@pytest.mark.parametrize(
    ("write", "streaming"), [(write_saved, 0), (write_pictures, 0), (write_folder, 1), (write_shards, 1)]
)
def test_every_kind_of_data_trains(write, streaming, small, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    options = write(tmp_path / "data") | {"dataset": tmp_path / "data", "output_dir": tmp_path / "run"}
    batch = {"per_device_train_batch_size": 4, "streaming": bool(streaming)}
    run_here(train_contrastive, **{**small, **options, **batch, "do_eval": True})
    found = results(tmp_path / "run", "eval")
    assert results(tmp_path / "run", "train")["loss"] > 0 and found["loss"] > 0
    assert found["text_to_image_recall@10"] == 1
    assert 0 <= found["text_to_image_recall@1"] <= found["text_to_image_recall@5"] <= 1
    (sheet,) = (tmp_path / "run" / "pictures").glob("eval-*.png")
    assert len(PictureImage.open(sheet).convert("RGB").getcolors(2**24)) > 300, "pictures, not blank axes"


def test_the_shipped_checkpoint_trains_on_a_folder(command, tmp_path):
    """As a user types it, in another folder; an empty caption is named; the folder that is left loads and is kept."""
    write_folder(tmp_path / "data")
    captions = tmp_path / "data" / "train" / "metadata.jsonl"
    captions.write_text(captions.read_text().replace(name_of(PICTURES[0]), " ", 1))
    options = {"dataset": "data", "caption_column": "text", "model_name_or_path": REPO, "output_dir": "run"}
    options |= {"do_train": True, "do_eval": True, "max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 4}
    asked = flags(**options, use_cpu=True, report_to="none", per_device_eval_batch_size=4)
    ran = command("examples/train_contrastive.py", *asked, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert f"1 rows with an empty caption: ['train/{PICTURES[0].name}']" in ran.stderr
    found = results(tmp_path / "run", "eval")
    assert found["chance_recall@1"] == pytest.approx(1 / len(PICTURES))
    assert found["text_to_image_recall@5"] > 0.5 and found["loss"] > 0
    kept = ("model.safetensors", "modeling_vit_embed.py", "tokenizer_config.json", "checkpoint-2/optimizer.pt")
    for name in (*kept, "LICENSE", "NOTICE"):
        assert (tmp_path / "run" / name).exists()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "license: apache-2.0" in card and "fine-tuned from the checkpoint of vit_embed on `data`" in card
    assert f"| text_to_image_recall@5 | {found['text_to_image_recall@5']:.4g} |" in card and "softmax" in card
    again = command("examples/train_contrastive.py", *asked, cwd=tmp_path)
    assert again.returncode == 1 and "--resume_from_checkpoint" in again.stderr


def test_a_group_is_drawn_once_an_epoch_in_any_of_its_drawings():
    groups = Groups(rows(), "group")
    assert len(groups) == len(PICTURES) and len(Groups(rows(), None)) == len(PICTURES) + 1
    random.seed(0)
    assert {groups[0]["image"].tobytes() for _ in range(4)} == {rows()[0]["image"].tobytes()}
    assert groups.rows[0] == [0, len(PICTURES)]


def test_a_validation_split_is_held_out_by_whole_groups():
    arguments = DataArguments(dataset="x", group_column="group", validation_share=0.3)
    choose = partial(contrastive.random_groups, column="group")
    splits = hold_out(DatasetDict(train=rows()), arguments, 0, choose)
    groups = {split: set(part["group"]) for split, part in splits.items()}
    assert len(groups["validation"]) == math.ceil(0.3 * len(PICTURES)) and not groups["validation"] & groups["train"]
    assert sum(map(len, splits.values())) == len(rows())


def test_one_split_may_be_validation_and_test_and_trained_on(small, tmp_path):
    for split, streaming in (("train", False), ("train", True)):
        folder = tmp_path / f"{split}-{streaming}"
        one = {"validation_split": split, "test_split": split, "do_eval": True, "do_predict": True}
        run_here(train_contrastive, **small, **one, output_dir=folder, max_steps=1, streaming=streaming)
        drawn = sorted(path.name.split("-")[0] for path in (folder / "pictures").iterdir())
        assert drawn == ["eval", "test"]
        recall = [results(folder, part)["text_to_image_recall@1"] for part in drawn]
        assert recall[0] == recall[1]


# --- what is wrong with the data ---


def rows_with_problems(folder: Path) -> Dataset:
    """A good row, one that is no picture, one without a word, one with too many, one without a picture."""
    broken = folder / "broken.png"
    broken.write_text("no picture")
    columns = {
        "image": [str(PICTURES[0]), str(broken), str(PICTURES[1]), str(PICTURES[2]), None],
        "captions": ["fine", "fine too", " ", "long " * 40, "nothing to see"],
    }
    return Dataset.from_dict(columns, features=Features(image=Image(), captions=Value("string")))


def test_problems_are_named_before_training(processor, tmp_path, caplog):
    dataset, arguments = rows_with_problems(tmp_path), DataArguments(dataset="x")
    with caplog.at_level(logging.WARNING):
        kept = check_pairs(dataset, "train", arguments, processor.tokenizer)
    assert kept["captions"][:] == ["fine", "long " * 40]
    assert "2 rows with an unreadable picture: [1, 4]" in caplog.text
    assert "1 rows with an empty caption: [2]" in caplog.text
    assert "1 rows with a caption too long, cut: [3]" in caplog.text
    with pytest.raises(ValueError, match="expected usable rows in split 'train', none of 1 are: 1 with an empty cap"):
        check_pairs(dataset.select([2]), "train", arguments, processor.tokenizer)


def test_held_out_rows_keep_the_numbers_of_their_file(processor, tmp_path, caplog):
    splits = with_row_names(DatasetDict(train=rows_with_problems(tmp_path)), Path("x"))
    arguments = DataArguments(dataset="x")
    splits = hold_out(splits, arguments, 0, lambda rows, share, seed: np.array([4, 2]))
    assert check_pairs(splits["train"], "train", arguments, processor.tokenizer)[ROW][:] == [0, 3]
    with pytest.raises(ValueError, match="none of 2 are"):
        check_pairs(splits["validation"], "validation", arguments, processor.tokenizer)
    assert "split validation: 1 rows with an empty caption: [2]" in caplog.text
    assert "split validation: 1 rows with an unreadable picture: [4]" in caplog.text


def test_bad_rows_of_a_stream_are_passed_over_and_named(processor, tmp_path, caplog):
    arguments = DataArguments(dataset="x", sentence_share=0.0)
    stream = rows_with_problems(tmp_path).to_iterable_dataset()
    with caplog.at_level(logging.WARNING):
        found = list(contrastive.training_stream(stream, arguments, processor.tokenizer, 32, seed=0))
    assert sorted(item["caption"] for item in found) == ["fine", "long " * 40]
    assert {np.shape(item["rgba"]) for item in found} == {(4, 32, 32)}
    for row, problem in ((1, "an unreadable"), (2, "an empty"), (3, "a caption too long"), (4, "an unreadable")):
        assert f"stream: row {row} with {problem}" in caplog.text


def test_captions_that_most_rows_share_are_named_and_one_for_all_is_refused(small, tmp_path, caplog):
    for captions, expected in ((["a", "b", "A "], None), (["a", "b", "c", "d"], None), (["a"] * 3, "refused")):
        dataset = Dataset.from_dict({"captions": captions})
        caplog.clear()
        if expected == "refused":
            with pytest.raises(ValueError, match="at least two different captions in split 'train', all 3 rows have"):
                contrastive.check_captions_differ(dataset, "train", DataArguments(dataset="x"))
        else:
            contrastive.check_captions_differ(dataset, "train", DataArguments(dataset="x"))
            warned = "2 of 3 rows share their first caption with others, 2 captions differ" in caplog.text
            assert warned == (len(captions) == 3) and bool(caplog.text) == warned
    same = rows().remove_columns("captions").add_column("captions", ["one"] * (len(PICTURES) + 1))
    DatasetDict(train=same).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match="set --caption_column"):
        run_here(train_contrastive, **{**small, "dataset": tmp_path / "data", "output_dir": tmp_path / "run"})
    assert not (tmp_path / "run" / "trainer_state.json").exists(), "before the first step"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config_name": None}, "expected one of --model_name_or_path and --config_name, got neither"),
        ({"tokenizer_name": None}, "expected --tokenizer_name beside --config_name"),
        ({"do_predict": True}, r"expected splits \['test'\] in .*, found \['train', 'validation'\]"),
        ({"tag_column": "words"}, r"expected columns \['words'\] in split 'train', found \['image', 'captions',"),
        ({"image_column": "group"}, "expected pictures in column 'group'"),
        ({"streaming": True, "group_column": "group"}, "--group_column picks from rows that are all known"),
        ({"caption_column": "image"}, "expected texts or lists of texts in column 'image' of .*; set --caption_column"),
    ],
)
def test_refusals(options, message, small, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_here(train_contrastive, **{**small, "output_dir": tmp_path / "run", "max_steps": 1, **options})


def test_a_checkpoint_without_a_tokenizer_is_refused(small, tmp_path):
    """transformers makes an empty one of it, to which every word is the end of the text."""
    config = VitEmbedConfig.from_pretrained(small["config_name"])
    VitEmbedForContrastive(config).save_pretrained(tmp_path / "clip")
    given = {**small, "config_name": None, "tokenizer_name": None, "model_name_or_path": tmp_path / "clip"}
    with pytest.raises(ValueError, match=r"clip has 2 and \d; where the folder has no tokenizer name one"):
        run_here(train_contrastive, **given, output_dir=tmp_path / "run", max_steps=1)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("eval_strategy", "epoch", "got --eval_strategy epoch; set it to steps"),
        ("save_strategy", "epoch", "got --save_strategy epoch; set it to steps"),
        ("logging_strategy", "epoch", "got --logging_strategy epoch; set it to steps"),
        ("gradient_accumulation_steps", 2, "got --gradient_accumulation_steps 2; set it to 1"),
    ],
)
def test_processes_cannot_meet_at_the_end_of_a_stream(flag, value, message):
    """Each comes to the end of its part at a step of its own."""
    strategies = {"eval_strategy": "no", "save_strategy": "steps", "logging_strategy": "steps"}
    training = {"world_size": 2, **strategies, "gradient_accumulation_steps": 1, flag: value}
    with pytest.raises(ValueError, match=message):
        contrastive.check_streaming(DataArguments(dataset="x"), SimpleNamespace(**training))


# --- the model ---


def test_options_of_the_loss_reach_the_config(small):
    options = {"contrastive_loss": "softmax", "hard_negative_beta": 0.25, "contrastive_chunk_size": 8}
    new = {name: str(small[name]) for name in ("config_name", "tokenizer_name")}
    for source in ({"model_name_or_path": str(REPO)}, new):
        model, _ = contrastive.load_two_towers(ModelArguments(**source, **options))
        assert {name: getattr(model.config, name) for name in options} == options
    with pytest.raises(ValueError, match="hard_negative_beta=0.25.*contrastive_loss='sigmoid'"):
        contrastive.load_two_towers(ModelArguments(**new, **{**options, "contrastive_loss": "sigmoid"}))


def test_another_image_size_resamples_positions_and_is_saved_with_the_processor(small, tmp_path):
    run_here(train_contrastive, **small, output_dir=tmp_path / "first", max_steps=1)
    larger = {"config_name": None, "tokenizer_name": None, "model_name_or_path": tmp_path / "first", "image_size": 48}
    options = {**small, **larger, "learning_rate": 0, "max_steps": 1, "output_dir": tmp_path / "larger"}
    run_here(train_contrastive, **options)
    model = VitEmbedForContrastive.from_pretrained(tmp_path / "larger")
    expected = VitEmbedForContrastive.from_pretrained(tmp_path / "first", image_size=48)
    assert model.config.image_shape == (48, 48)
    table = "vision_model.embeddings.position_embedding.weight"
    torch.testing.assert_close(model.state_dict()[table], expected.state_dict()[table])
    processor = AutoProcessor.from_pretrained(tmp_path / "larger", trust_remote_code=True)
    assert processor(images=PictureImage.new("RGB", (90, 70)), return_tensors="pt").pixel_values.shape == (1, 3, 48, 48)


# --- what is drawn ---


def test_shares_of_the_texts_drawn():
    random.seed(0)
    arguments = DataArguments(dataset="x", name_share=0.5, sentence_share=0.25)
    texts = [draw_caption(["cat", "kitty"], ["pet", "animal"], arguments) for _ in range(4000)]
    shares = {text: texts.count(text) / len(texts) for text in ("cat", "kitty")}
    assert shares == {"cat": pytest.approx(0.5 * 0.75, abs=0.03), "kitty": pytest.approx(0.25 * 0.75, abs=0.03)}
    assert {"cat, pet", "pet, animal", "a photo of cat"} <= set(texts)
    only = {draw_caption(["cat"], [], DataArguments(dataset="x", sentence_share=0)) for _ in range(50)}
    assert only == {"cat"}


def test_what_is_made_of_a_caption_fits_the_model(tmp_path):
    """Or is left at the name: nothing is cut. The limit is the model's, also of a tokenizer that names none."""
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(REPO / name, tmp_path)
    names = ModelArguments(model_name_or_path=str(REPO), tokenizer_name=str(tmp_path))
    tokenizer = contrastive.load_two_towers(names)[1].tokenizer
    assert tokenizer.model_max_length == 32
    name, other, tags = (" ".join([word] * count) for word, count in (("red", 25), ("green", 31), ("blue", 5)))
    arguments = DataArguments(dataset="x", tag_column="tags", name_share=0.3, sentence_share=0.5)
    row = {"image": PictureImage.new("RGB", (8, 8)), "captions": [name, other], "tags": [tags, None]}
    random.seed(0)
    texts = [contrastive.training_item(row, arguments, tokenizer, 8)["caption"] for _ in range(60)]
    short = [sentence for sentence in contrastive.SENTENCES if len(sentence.split()) == 4]
    assert {*texts} == {name, *(sentence.format(name) for sentence in short)}, "32 tokens hold three words more"
    assert max(map(len, tokenizer(texts).input_ids)) <= 32


def test_equal_names_share_an_id_and_the_loss_leaves_them_out(processor):
    arguments = DataArguments(dataset="x", tag_column="tags")
    batch = [contrastive.training_item(row, arguments, processor.tokenizer, 64) for row in rows()]
    masked = Collator(processor, DataArguments(dataset="x"), (64, 64))(batch)
    assert masked["group_ids"][0] == masked["group_ids"][-1] == caption_id(name_of(PICTURES[0]))
    assert len(set(masked["group_ids"].tolist())) == len(PICTURES)
    plain = Collator(processor, DataArguments(dataset="x", duplicates_are_negatives=True), (64, 64))(batch)
    assert "group_ids" not in plain
    assert masked["pixel_values"].shape == (len(batch), 3, 64, 64)
    torch.testing.assert_close(masked["pixel_values"], plain["pixel_values"], msg="randomness belongs to the rows")


def test_an_id_is_the_same_in_every_process_and_release():
    assert caption_id("cat") == 4312121625846082129 < 2**63
    assert caption_id(" Cat") == caption_id("cat") != caption_id("cats")


def test_drawings_of_one_grey_get_any_colour_and_stay_apart_from_their_ground(processor):
    """And coloured ones keep theirs, but for the jitter."""
    grey = PictureImage.new("LA", (64, 64))
    grey.paste((0, 255), (16, 16, 48, 48))
    red = grey.convert("RGBA")
    red.paste((255, 0, 0, 255), (16, 16, 48, 48))
    arguments = DataArguments(dataset="x", jitter=0.0, hue=0.0, rotation=0.0)
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    random.seed(1)
    batch = [
        contrastive.training_item({"image": picture, "captions": "square"}, arguments, processor.tokenizer, 64)
        for picture in [grey] * 40 + [red] * 40
    ]
    pixels = Collator(processor, arguments, (64, 64))(batch)["pixel_values"] * std + mean  # (80, 3, 64, 64) in [0, 1]
    inks, grounds = pixels[:, :, 30:34, 30:34].mean(dim=(2, 3)), pixels[:, :, 0, 0]
    assert (inks[:40].std(dim=0) > 0.1).all(), "any colour"
    assert ((inks[:40] - grounds[:40]).abs().amax(dim=1) > 0.15).float().mean() > 0.9, "apart from the ground"
    is_red = (inks[40:, 0] > 0.9) & (inks[40:, 1:] < 0.1).all(dim=1)
    assert is_red.float().mean() > 0.85, "all but the greyed and blurred"


# --- recall ---


@pytest.mark.parametrize("names", [["cat"], ["cat", "cat"], ["cat", "dog"]])
def test_recall_of_few_captions(names):
    """Of one caption everything is found; of two, what is nearer."""
    ids = np.array(list(map(caption_id, names)))
    similarity = np.eye(len(ids))[::-1]  # each is nearest to another
    expected = 1.0 if len(set(names)) == 1 else 0.0
    assert recalls(similarity, ids, ids) == [expected, 1.0, 1.0]


def test_recalls_count_equal_names_once():
    similarity = np.array([[0.9, 0.8, 0.1, 0.0], [0.9, 0.8, 0.7, 0.0], [0.0, 0.1, 0.2, 0.3]])
    found = np.array([7, 7, 8, 9])
    assert recalls(similarity, np.array([7, 8, 9]), found) == [pytest.approx(2 / 3), 1.0, 1.0]


# --- killed and resumed ---

RESUMED = {
    "rows, workers and random layers": {"per_device_train_batch_size": 4, "dataloader_num_workers": 2},
    "one pass of a stream": {"per_device_train_batch_size": 1, "streaming": True},
}


@pytest.mark.parametrize("kind", RESUMED)
def test_a_killed_run_resumed_equals_an_unbroken_one(kind, small, command, tmp_path):
    """Bit for bit, with pictures, captions, hidden patches, dropout and dropped layers drawn at random; the unbroken
    run has no workers. A checkpoint whose writing was cut off is left out."""
    config = VitEmbedConfig.from_pretrained(small["config_name"], hidden_dropout_prob=0.1, drop_path_rate=0.2)
    config.save_pretrained(tmp_path / "config")
    options = {**small, "config_name": tmp_path / "config", "tag_column": "tags", "max_steps": 8, **RESUMED[kind]}
    options |= {"patch_drop_rate": 0.25, "save_strategy": "steps", "save_steps": 3}
    run_here(train_contrastive, **{**options, "dataloader_num_workers": 0}, output_dir=tmp_path / "unbroken")
    killed = {**options, "output_dir": tmp_path / "killed", "use_cpu": True, "report_to": "none"}
    kill = "import training_runs; training_runs.kill_in_step(6)"
    assert command("examples/train_contrastive.py", *flags(**killed), cwd=tmp_path, before=kill).returncode == -9
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    (tmp_path / "killed" / "checkpoint-6").mkdir()
    run_here(train_contrastive, **killed, resume_from_checkpoint=True)
    assert_equal_runs(tmp_path / "killed", tmp_path / "unbroken")


# --- several processes ---


def launched(command: list, cwd: Path) -> subprocess.CompletedProcess:
    """A launcher, as a user starts it."""
    return subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.heavy
def test_two_processes_share_a_stream(small, tmp_path):
    """Started by torchrun. Texts of the two batches of a step differ in length; each process reads the shards that the
    other does not."""
    DatasetDict(train=rows().select(range(4))).save_to_disk(tmp_path / "data", num_shards={"train": 2})
    options = {**small, "dataset": tmp_path / "data", "output_dir": tmp_path / "run", "max_steps": 4, "streaming": True}
    options |= {"per_device_train_batch_size": 2, "save_strategy": "no", "use_cpu": True, "report_to": "none"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    script = REPO / "examples" / "train_contrastive.py"
    ran = launched([*torchrun, script, *flags(**options)], tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert len(losses(tmp_path / "run")) == 4


def assert_same_training(folder: Path, one: Path) -> None:
    """Loss curve, weights and metrics of two processes against one: float32 sums in another order."""
    np.testing.assert_allclose(losses(folder), losses(one), rtol=0, atol=1e-4)
    ours, theirs = weights(folder), weights(one)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        # The bias of keys shifts all scores of a row alike, so its gradient is rounding, which Adam magnifies.
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-3, msg=name)
    found, expected = results(folder, "eval"), results(one, "eval")
    # The loss of an evaluation is of each process's own batches, which are half as large.
    for metric in ("text_to_image_recall@1", "image_to_text_recall@5"):
        assert found[metric] == pytest.approx(expected[metric], abs=1e-3)


def test_two_processes_and_fsdp_give_the_curve_of_one(small, command, tmp_path):
    """At the same global batch, with learning rates by layer and an uneven validation split (5 rows). FSDP is started
    by `accelerate launch` and shards every parameter but the scalar; its folder loads like any other."""
    data = DatasetDict(train=rows(), validation=rows().select(range(5)))
    data.save_to_disk(str(tmp_path / "data"))
    options = {**small, "dataset": tmp_path / "data", "group_column": "group", "max_steps": 6, "do_eval": True}
    options |= {"layer_decay": 0.8, "save_strategy": "no", "use_cpu": True, "report_to": "none"}

    def asked(name: str, batch_size: int) -> list[str]:
        sizes = {f"per_device_{part}_batch_size": batch_size for part in ("train", "eval")}
        return flags(**options, **sizes, output_dir=tmp_path / name)

    before = "import training_runs as runs; runs.leave_pictures_alone(); runs.record_wrapper()"
    for name, processes in (("one", 1), ("ddp", 2)):
        given = asked(name, 8 // processes)
        ran = command("examples/train_contrastive.py", *given, cwd=tmp_path, before=before, processes=processes)
        assert ran.returncode == 0, ran.stderr[-3000:]
    (tmp_path / "fsdp.yaml").write_text(FSDP)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", tmp_path / "fsdp.yaml"]
    launch += ["--main_process_port", "0", REPO / SUPPORT / "sharded_training.py", *asked("fsdp", 4)]
    ran = launched(launch, tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]

    wrapper = {name: json.loads((tmp_path / name / "wrapper.json").read_text()) for name in ("one", "ddp", "fsdp")}
    assert [wrapper[name]["class"] for name in ("one", "ddp")] == ["VitEmbedForContrastive", "DistributedDataParallel"]
    assert wrapper["fsdp"]["is_fsdp"] and wrapper["fsdp"]["whole"] == ["logit_scale"]
    for name in ("ddp", "fsdp"):
        assert_same_training(tmp_path / name, tmp_path / "one")
    names = {path.name for path in (tmp_path / "fsdp").iterdir()}
    assert "modeling_vit_embed.py" in names and not [name for name in names if name.startswith("_fsdp")]
    loaded, saved = VitEmbedForContrastive.from_pretrained(tmp_path / "fsdp").state_dict(), weights(tmp_path / "fsdp")
    assert loaded.keys() == saved.keys() and all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
