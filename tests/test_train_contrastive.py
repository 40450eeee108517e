"""The contrastive recipe: every kind of data it takes, what it draws, what it refuses."""

import json
import logging
import math
import random
import shutil
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import training_runs
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PictureImage
from safetensors.torch import load_file
from transformers import AutoProcessor

from vit_embed import VitEmbedConfig, VitEmbedForContrastive

REPO = Path(__file__).parent.parent
sys.path.insert(0, str(REPO / "examples"))

import train_contrastive  # noqa: E402
from train_contrastive import Collator, DataArguments, Groups, caption_id, check_rows, draw_caption  # noqa: E402

PICTURES = sorted((REPO / "examples" / "pictures").glob("*.png"))[::40]


def name_of(path: Path) -> str:
    return path.stem.replace("-", " ")


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(REPO, trust_remote_code=True)


def rows() -> Dataset:
    """Seven named pictures, two drawings of the first, one of them in grey and alpha."""
    columns = {
        "image": [*map(str, PICTURES), str(PICTURES[0])],
        "captions": [[name_of(path), "drawing"] for path in [*PICTURES, PICTURES[0]]],
        "tags": [["emoji", "flat", "colour"]] * (len(PICTURES) + 1),
        "group": [*map(name_of, PICTURES), name_of(PICTURES[0])],
    }
    features = Features(
        image=Image(), captions=List(Value("string")), tags=List(Value("string")), group=Value("string")
    )
    return Dataset.from_dict(columns, features=features)


def write_saved(folder: Path) -> list[str]:
    DatasetDict(train=rows(), validation=rows().select(range(len(PICTURES)))).save_to_disk(str(folder))
    return ["--tag_column", "tags", "--group_column", "group", "--num_train_epochs", "1"]


def write_parquet(folder: Path) -> list[str]:
    folder.mkdir()
    for split in ("train", "validation"):
        rows().to_parquet(str(folder / f"{split}.parquet"))
    return ["--max_steps", "2"]


def write_pictures(folder: Path) -> list[str]:
    """A folder of pictures with their captions, and no splits."""
    folder.mkdir(parents=True)
    told = []
    for path in PICTURES:
        (folder / path.name).write_bytes(path.read_bytes())
        told.append(json.dumps({"file_name": path.name, "text": name_of(path)}))
    (folder / "metadata.jsonl").write_text("\n".join(told))
    return ["--caption_column", "text", "--validation_share", "0.5", "--max_steps", "2"]


def write_folder(folder: Path) -> list[str]:
    write_pictures(folder / "train")
    return write_pictures(folder / "validation")


def write_shards(folder: Path) -> list[str]:
    folder.mkdir()
    for split in ("train", "validation"):
        with tarfile.open(folder / f"{split}-0.tar", "w") as shard:
            for path in PICTURES:
                caption = folder / f"{path.stem}.txt"
                caption.write_text(name_of(path))
                shard.add(path, path.name)
                shard.add(caption, caption.name)
                caption.unlink()
    return ["--image_column", "png", "--caption_column", "txt", "--max_steps", "2"]


@pytest.mark.parametrize(
    ("write", "streaming"),
    [
        (write_saved, False),
        (write_parquet, False),
        (write_pictures, False),
        (write_folder, True),
        (write_shards, False),
        (write_shards, True),
    ],
)
def test_every_kind_of_data_trains(write, streaming, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    asked = write(tmp_path / "data") + ["--streaming", "True"] * streaming
    command = [
        "train",
        "--dataset",
        str(tmp_path / "data"),
        "--model_name_or_path",
        str(REPO),
        "--do_train",
        "--do_eval",
    ]
    command += ["--output_dir", str(tmp_path / "run"), "--per_device_train_batch_size", "4", "--use_cpu"]
    command += ["--report_to", "none", "--save_strategy", "no", "--logging_steps", "1", *asked]
    monkeypatch.setattr(sys, "argv", command)
    train_contrastive.main()
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["train_loss"] > 0 and results["eval_loss"] > 0 and results["eval_text_to_image_recall@10"] == 1
    assert 0 <= results["eval_text_to_image_recall@1"] <= results["eval_text_to_image_recall@5"] <= 1
    (sheet,) = (tmp_path / "run" / "pictures").glob("eval-*.png")
    assert len(PictureImage.open(sheet).convert("RGB").getcolors(2**24)) > 300, "pictures, not blank axes"


def test_a_group_is_drawn_once_an_epoch_in_any_of_its_drawings():
    groups = Groups(rows(), "group")
    assert len(groups) == len(PICTURES) and len(Groups(rows(), None)) == len(PICTURES) + 1
    random.seed(0)
    assert {groups[0]["image"].tobytes() for _ in range(4)} == {rows()[0]["image"].tobytes()}
    assert groups.rows[0] == [0, len(PICTURES)]


def test_what_is_not_named_is_held_out_by_whole_groups():
    arguments = DataArguments(dataset="x", group_column="group", validation_share=0.3)
    splits = train_contrastive.with_validation(DatasetDict(train=rows()), arguments, seed=0)
    groups = {split: set(part["group"]) for split, part in splits.items()}
    assert len(groups["validation"]) == math.ceil(0.3 * len(PICTURES)) and not groups["validation"] & groups["train"]
    assert sum(map(len, splits.values())) == len(rows())
    again = train_contrastive.with_validation(DatasetDict(train=rows()), arguments, seed=0)
    assert again["validation"]["group"][:] == splits["validation"]["group"][:]
    whole = DatasetDict(train=rows(), validation=rows())
    assert train_contrastive.with_validation(whole, arguments, seed=0) is whole


@pytest.mark.parametrize("names", [["cat"], ["cat", "cat"], ["cat", "dog"]])
def test_recall_of_few_captions(names):
    """Of one caption everything is found; of two, what is nearer."""
    ids = np.array(list(map(caption_id, names)))
    similarity = np.eye(len(ids))[::-1]  # each is nearest to another
    expected = 1.0 if len(set(names)) == 1 else 0.0
    assert train_contrastive.recalls(similarity, ids, ids) == [expected, 1.0, 1.0]


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
    dataset = rows_with_problems(tmp_path)
    arguments = DataArguments(dataset="x")
    with caplog.at_level(logging.WARNING):
        kept = check_rows(dataset, "train", arguments, processor.tokenizer)
    assert kept["captions"][:] == ["fine", "long " * 40]
    assert "2 rows with unreadable picture: [1, 4]" in caplog.text
    assert "1 rows with empty caption: [2]" in caplog.text
    assert "1 rows with caption too long, cut: [3]" in caplog.text
    with pytest.raises(ValueError, match="expected usable rows in split 'train', none of 1 are: 1 with empty caption"):
        check_rows(dataset.select([2]), "train", arguments, processor.tokenizer)
    with pytest.raises(ValueError, match=r"expected columns \['txt'\] in split 'train', found \['image', 'captions'\]"):
        check_rows(dataset, "train", DataArguments(dataset="x", caption_column="txt"), processor.tokenizer)


def test_bad_rows_of_a_stream_are_passed_over_and_named(processor, tmp_path, caplog):
    dataset = rows_with_problems(tmp_path)
    arguments = DataArguments(dataset="x", sentence_share=0.0)
    stream = dataset.to_iterable_dataset()
    items = train_contrastive.training_stream(stream, arguments, processor.tokenizer, 32, seed=0)
    with caplog.at_level(logging.WARNING):
        found = list(items)
    assert sorted(item["caption"] for item in found) == ["fine", "long " * 40]
    assert {np.shape(item["rgba"]) for item in found} == {(4, 32, 32)}
    for row, problem in ((1, "unreadable"), (2, "empty caption"), (3, "caption too long"), (4, "unreadable")):
        assert f"stream: row {row} with {problem}" in caplog.text


def test_options_of_the_loss_reach_the_config():
    options = {"contrastive_loss": "softmax", "hard_negative_beta": 0.25, "contrastive_chunk_size": 8}
    config = str(REPO / "configs" / "icon-search.json")
    for source in ({"model_name_or_path": str(REPO)}, {"config_name": config, "tokenizer_name": str(REPO)}):
        model, _ = train_contrastive.load_model(train_contrastive.ModelArguments(**source, **options))
        assert {name: getattr(model.config, name) for name in options} == options
    with pytest.raises(ValueError, match="hard_negative_beta=0.25.*contrastive_loss='sigmoid'"):
        options["contrastive_loss"] = "sigmoid"
        train_contrastive.load_model(train_contrastive.ModelArguments(model_name_or_path=str(REPO), **options))


def test_shares_of_the_texts_drawn():
    random.seed(0)
    arguments = DataArguments(dataset="x", name_share=0.5, sentence_share=0.25)
    texts = [draw_caption(["cat", "kitty"], ["pet", "animal"], arguments) for _ in range(4000)]
    shares = {text: texts.count(text) / len(texts) for text in ("cat", "kitty")}
    assert shares["cat"] == pytest.approx(0.5 * 0.75, abs=0.03) and shares["kitty"] == pytest.approx(
        0.25 * 0.75, abs=0.03
    )
    assert {"cat, pet", "pet, animal", "a photo of cat"} <= set(texts)
    only = {draw_caption(["cat"], [], DataArguments(dataset="x", sentence_share=0)) for _ in range(50)}
    assert only == {"cat"}


def test_what_is_made_of_a_caption_fits_the_model(tmp_path):
    """Or is left at the name: nothing is cut. The limit is the model's, also of a tokenizer that names none."""
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(REPO / name, tmp_path)
    names = {"model_name_or_path": str(REPO), "tokenizer_name": str(tmp_path)}
    _, processor = train_contrastive.load_model(train_contrastive.ModelArguments(**names))
    assert processor.tokenizer.model_max_length == 32
    name, other, tags = (" ".join([word] * count) for word, count in (("red", 25), ("green", 31), ("blue", 5)))
    arguments = DataArguments(dataset="x", tag_column="tags", name_share=0.3, sentence_share=0.5)
    row = {"image": PictureImage.new("RGB", (8, 8)), "captions": [name, other], "tags": [tags, None]}
    random.seed(0)
    texts = [train_contrastive.training_item(row, arguments, processor.tokenizer, 8)["caption"] for _ in range(60)]
    short = [sentence for sentence in train_contrastive.SENTENCES if len(sentence.split()) == 4]
    assert {*texts} == {name, *(sentence.format(name) for sentence in short)}, "32 tokens hold three words more"
    assert max(map(len, processor.tokenizer(texts).input_ids)) <= 32


def items(dataset: Dataset, processor) -> list[dict]:
    arguments = DataArguments(dataset="x", tag_column="tags")
    return [train_contrastive.training_item(row, arguments, processor.tokenizer, 64) for row in dataset]


def test_equal_names_share_an_id_and_the_loss_leaves_them_out(processor):
    batch = items(rows(), processor)
    masked = Collator(processor, DataArguments(dataset="x"), (64, 64))(batch)
    assert masked["group_ids"][0] == masked["group_ids"][-1] == caption_id(name_of(PICTURES[0]))
    assert len(set(masked["group_ids"].tolist())) == len(PICTURES)
    assert caption_id(" Cat") == caption_id("cat") != caption_id("cats")
    plain = Collator(processor, DataArguments(dataset="x", duplicates_are_negatives=True), (64, 64))(batch)
    assert "group_ids" not in plain
    assert masked["pixel_values"].shape == (len(batch), 3, 64, 64)
    torch.testing.assert_close(masked["pixel_values"], plain["pixel_values"], msg="randomness belongs to the rows")


def test_drawings_of_one_colour_get_any_colour_and_stay_apart_from_their_ground(processor):
    """And coloured ones keep theirs, but for the jitter."""
    grey = PictureImage.new("LA", (64, 64))
    grey.paste((0, 255), (16, 16, 48, 48))
    red = grey.convert("RGBA")
    red.paste((255, 0, 0, 255), (16, 16, 48, 48))
    arguments = DataArguments(dataset="x", jitter=0.0, hue=0.0, rotation=0.0)
    collator = Collator(processor, arguments, (64, 64))
    mean, std = (
        torch.tensor(v).view(3, 1, 1)
        for v in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    random.seed(1)
    batch = [
        train_contrastive.training_item({"image": picture, "captions": "square"}, arguments, processor.tokenizer, 64)
        for picture in [grey] * 40 + [red] * 40
    ]
    pixels = collator(batch)["pixel_values"] * std + mean  # (80, 3, 64, 64) in [0, 1]
    inks, grounds = pixels[:, :, 30:34, 30:34].mean(dim=(2, 3)), pixels[:, :, 0, 0]
    assert (inks[:40].std(dim=0) > 0.1).all(), "any colour"
    assert ((inks[:40] - grounds[:40]).abs().amax(dim=1) > 0.15).float().mean() > 0.9, "apart from the ground"
    is_red = (inks[40:, 0] > 0.9) & (inks[40:, 1:] < 0.1).all(dim=1)
    assert is_red.float().mean() > 0.85, "all but the greyed and blurred"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one of --model_name_or_path and --config_name"),
        (["--config_name", str(REPO)], "expected --tokenizer_name beside --config_name"),
        (
            ["--model_name_or_path", str(REPO), "--do_predict"],
            r"expected splits \['test'\] in .*, found \['train', 'val",
        ),
        (["--model_name_or_path", str(REPO), "--do_train", "--tag_column", "words"], r"expected columns \['words'\]"),
        (
            ["--model_name_or_path", str(REPO), "--do_train", "--image_column", "group"],
            "expected pictures in .*'group'",
        ),
        (
            ["--model_name_or_path", str(REPO), "--do_train", "--streaming", "--group_column", "group"],
            "--group_column picks from rows that are all known",
        ),
        (
            ["--model_name_or_path", str(REPO), "--do_train", "--caption_column", "image"],
            "expected texts or lists of texts in column 'image' of split 'train', it is Image.*; set --caption_column",
        ),
    ],
)
def test_refusals(arguments, message, tmp_path, monkeypatch):
    write_saved(tmp_path / "data")
    command = [
        "train",
        "--dataset",
        str(tmp_path / "data"),
        "--output_dir",
        str(tmp_path / "run"),
        "--report_to",
        "none",
    ]
    monkeypatch.setattr(sys, "argv", [*command, *arguments])
    with pytest.raises(ValueError, match=message):
        train_contrastive.main()


def test_an_id_is_the_same_in_every_process_and_release():
    assert caption_id("cat") == 4312121625846082129 < 2**63


# --- killed and resumed, and several processes ---


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, Path]:
    """A saved dataset, and the config of a small model that reads the shipped tokenizer; no batch norm, no dropout."""
    folder = tmp_path_factory.mktemp("small")
    write_saved(folder / "data")
    text = json.loads((REPO / "config.json").read_text())["text_config"]
    config = VitEmbedConfig(
        **{**tiny.VISION, "image_size": 32, "projection_dim": 16},
        text_config={
            **tiny.TEXT,
            **{key: text[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")},
        },
    )
    config.save_pretrained(folder / "config")
    return folder / "data", folder / "config"


def small_command(small: tuple[Path, Path], output_dir: Path, *arguments: object) -> list:
    data, config = small
    command = ["--dataset", data, "--config_name", config, "--tokenizer_name", REPO, "--tag_column", "tags"]
    command += ["--output_dir", output_dir, "--do_train", "--use_cpu", "--report_to", "none", "--logging_steps", 1]
    return [*command, "--learning_rate", 1e-3, *arguments]


def train_small(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *map(str, small_command(*arguments))])
    train_contrastive.main()


def per_device(batch_size: int) -> list:
    return ["--per_device_train_batch_size", batch_size, "--per_device_eval_batch_size", batch_size]


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(output_dir / "model.safetensors")


@pytest.mark.parametrize(
    "more",
    [
        ["--per_device_train_batch_size", 4, "--patch_drop_rate", 0.25],
        ["--per_device_train_batch_size", 1, "--streaming"],
    ],
    ids=["four passes", "within one pass of a stream"],
)
def test_a_killed_run_resumed_equals_an_unbroken_one(more, small, monkeypatch, tmp_path):
    """In weights bit for bit, with pictures and captions drawn at random, and hidden patches."""
    asked = ["--max_steps", 8, "--save_steps", 3, *more]
    train_small(monkeypatch, small, tmp_path / "unbroken", *asked)
    training_runs.killed_runs("train_contrastive", [small_command(small, tmp_path / "killed", *asked)], killed_in=6)
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    train_small(monkeypatch, small, tmp_path / "killed", *asked, "--resume_from_checkpoint", True)
    assert training_runs.losses(tmp_path / "killed") == training_runs.losses(tmp_path / "unbroken")
    ours, theirs = weights(tmp_path / "killed"), weights(tmp_path / "unbroken")
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_one_split_may_be_both_validation_and_test(small, monkeypatch, tmp_path):
    one = ["--validation_split", "validation", "--test_split", "validation", "--do_eval", "--do_predict"]
    train_small(monkeypatch, small, tmp_path / "run", "--max_steps", 1, *one)
    drawn = sorted(path.name.split("-")[0] for path in (tmp_path / "run" / "pictures").iterdir())
    assert drawn == ["eval", "test"]
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["eval_text_to_image_recall@1"] == results["test_text_to_image_recall@1"]


def test_a_split_that_is_trained_on_may_be_judged(small, monkeypatch, tmp_path):
    one = ["--validation_split", "train", "--test_split", "train", "--do_eval", "--do_predict"]
    for name, more in (("rows", []), ("stream", ["--streaming"])):
        train_small(monkeypatch, small, tmp_path / name, "--max_steps", 1, *one, *more)
        results = json.loads((tmp_path / name / "all_results.json").read_text())
        assert results["eval_text_to_image_recall@1"] == results["test_text_to_image_recall@1"]


def test_two_processes_share_a_stream(small, monkeypatch, tmp_path):
    """Texts of the two batches of a step differ in length; each process reads the shards that the other does not."""
    data, config = small
    DatasetDict(train=rows().select(range(4))).save_to_disk(tmp_path / "data", num_shards={"train": 2})
    asked = ["--max_steps", 4, "--streaming", "--caption_column", "captions", "--save_strategy", "no", *per_device(2)]
    command = small_command((tmp_path / "data", config), tmp_path / "run", *asked)
    training_runs.finish(training_runs.start_two_processes("train_contrastive", "ddp", command, tmp_path))
    assert len(training_runs.losses(tmp_path / "run")) == 4


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
        train_contrastive.check_streaming(DataArguments(dataset="x"), SimpleNamespace(**training))


def test_another_image_size_resamples_positions_and_is_saved_with_the_processor(monkeypatch, small, tmp_path):
    train_small(monkeypatch, small, tmp_path / "first", "--max_steps", 1)
    data, _ = small
    command = [
        "train",
        "--dataset",
        data,
        "--model_name_or_path",
        tmp_path / "first",
        "--output_dir",
        tmp_path / "larger",
    ]
    command += [
        "--image_size",
        48,
        "--do_train",
        "--max_steps",
        1,
        "--learning_rate",
        0,
        "--use_cpu",
        "--report_to",
        "none",
    ]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    train_contrastive.main()
    model = VitEmbedForContrastive.from_pretrained(tmp_path / "larger")
    expected = VitEmbedForContrastive.from_pretrained(tmp_path / "first", image_size=48)
    assert model.config.image_shape == (48, 48)
    torch.testing.assert_close(
        model.vision_model.embeddings.position_embedding.weight,
        expected.vision_model.embeddings.position_embedding.weight,
    )
    processor = AutoProcessor.from_pretrained(tmp_path / "larger", trust_remote_code=True)
    assert processor(images=PictureImage.new("RGB", (90, 70)), return_tensors="pt").pixel_values.shape == (1, 3, 48, 48)


def test_two_processes_and_fsdp_give_the_curve_of_one(small, monkeypatch, tmp_path):
    """Eight groups, eight to a step. The collator varies the pictures of a process together, so here it does not."""
    asked = ["--max_steps", 6, "--save_strategy", "no", "--do_eval", "--group_column", "group"]
    monkeypatch.setattr(train_contrastive, "Collator", StillCollator)
    train_small(monkeypatch, small, tmp_path / "one", *asked, *per_device(8))
    launcher = tmp_path / "still.py"
    launcher.write_text(STILL.format(tests=str(Path(__file__).parent)))
    running = {}
    for kind in ("ddp", "fsdp"):
        command = small_command(small, tmp_path / kind, *asked, *per_device(4))
        running[kind] = training_runs.start_two_processes(str(launcher.with_suffix("")), kind, command, tmp_path)
    for kind, process in running.items():
        training_runs.finish(process)
        np.testing.assert_allclose(
            training_runs.losses(tmp_path / kind), training_runs.losses(tmp_path / "one"), rtol=0, atol=1e-4
        )
        ours, theirs = weights(tmp_path / kind), weights(tmp_path / "one")
        for name, tensor in theirs.items():
            # The bias of keys shifts all scores of a row alike, so its gradient is rounding, which Adam magnifies.
            if not name.endswith("k_proj.bias"):
                torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-3, msg=f"{kind}, {name}")
        results = [json.loads((tmp_path / run / "eval_results.json").read_text()) for run in (kind, "one")]
        # The loss of an evaluation is of each process's own batches, which are half as large.
        for metric in ("eval_text_to_image_recall@1", "eval_image_to_text_recall@5"):
            assert results[0][metric] == pytest.approx(results[1][metric], abs=1e-3), kind


class StillCollator(Collator):
    """Leaves pictures as they are."""

    def vary(self, rgba: torch.Tensor, is_mono: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(rgba[:, :3].float() / 255, self.image_size, mode="area") - 0.5


STILL = """
import sys
sys.path.insert(0, {tests!r})
import test_train_contrastive, train_contrastive
train_contrastive.Collator = test_train_contrastive.StillCollator
train_contrastive.main()
"""
