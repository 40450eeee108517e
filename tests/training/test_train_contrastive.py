"""The contrastive recipe: the kinds of data it takes, what it draws, and what it refuses."""

import math
import random
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import train_contrastive
from captioned_sets import caption, content, write_tar
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PictureImage
from training_runs import REPO, results, run_apart, run_here, text_fields
from transformers import AutoProcessor

from recipes import contrastive, streams
from recipes.contrastive import Collator, DataArguments, Groups, ModelArguments, check_pairs
from recipes.data import hold_out
from recipes.negatives import check_captions_differ, leave_out_single, share_that_teaches
from recipes.reading.tables import PROBLEM, ROW
from recipes.retrieval import caption_id, recalls
from recipes.texts import SENTENCES, draw_caption
from vit_embed import VitEmbedConfig, VitEmbedForContrastive

PICTURES = sorted((REPO / "examples" / "pictures").glob("*.png"))[::40]
ARGUMENTS = DataArguments(dataset="x")
ONE_SPLIT = {"validation_split": "train", "test_split": "train", "do_eval": True, "do_predict": True}


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
    return Dataset.from_dict(columns).cast_column("image", Image())


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict:
    """Options of a run on a saved dataset with a small model that reads the shipped tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    DatasetDict(train=rows(), validation=rows()).save_to_disk(str(folder / "data"))
    tiny.dual_config(text_config=text_fields()).save_pretrained(folder / "config")
    model = {"config_name": folder / "config", "tokenizer_name": REPO}
    return {"dataset": folder / "data", **model, "do_train": True, "max_steps": 2}


# --- what a run leaves ---


def assert_recalls(run: Path) -> None:
    """Of a run that evaluated and tested on the same pictures."""
    found, tested = (results(run, split) for split in ("eval", "test"))
    assert results(run, "train")["loss"] > 0 and found["loss"] > 0
    assert 0 <= found["text_to_image_recall@1"] <= found["text_to_image_recall@5"] <= 1
    assert found["chance_recall@1"] == pytest.approx(1 / len(PICTURES))
    assert tested["text_to_image_recall@1"] == found["text_to_image_recall@1"]
    assert sorted(path.name for path in (run / "pictures").iterdir()) == ["eval-000002.png", "test-000002.png"]


@pytest.mark.parametrize(("processes", "workers"), [(1, 2), (2, 1)])
def test_a_spoiled_stream_trains_to_the_end_and_says_what_it_lost(processes, workers, small, tmp_path):
    """Each row once, in whatever process or worker, over two passes: a corrupt picture, no JSON, and a torn tar."""
    good = {str(n): {"png": content(n, "png"), "txt": caption(n).encode()} for n in range(16)}
    spoiled = {**good, "3": {**good["3"], "png": b"no picture"}, "9": {**good["9"], "json": b"{"}}
    (tmp_path / "data").mkdir()
    for name, files in (("0.tar", spoiled), ("1.tar", good), ("2.tar", good), ("3.tar", good)):
        write_tar(tmp_path / "data" / name, files)
    torn = tmp_path / "data" / "1.tar"
    torn.write_bytes(torn.read_bytes()[:20_000])
    options = {**small, "dataset": tmp_path / "data", "streaming": True, "dataloader_num_workers": workers}
    options |= {"per_device_train_batch_size": 4, "max_steps": 24 // processes, "output_dir": tmp_path / "run"}
    run_apart("train_contrastive", options, processes=processes)
    log = (tmp_path / "run.log").read_text()
    for lost in (
        *("row 0.tar/3 with an unreadable picture", "row 0.tar/9 with a .json that is none"),
        "row 1.tar with the rest of a tar that cannot be read (unexpected end of data)",
    ):
        assert log.count(f"stream: {lost}") == 1, log
    assert "0 rows were left out before the first step, 3 could not be read later" in log


def test_the_shipped_checkpoint_trains_on_groups(small, tmp_path):
    """The folder that is left has all that loading needs, pictures of what captions find, the licence, and a card."""
    options = {**small, **ONE_SPLIT, "config_name": None, "tokenizer_name": None, "model_name_or_path": REPO}
    options |= {"tag_column": "tags", "group_column": "group", "output_dir": tmp_path / "run"}
    run_here(train_contrastive, sheets=True, **options, per_device_train_batch_size=4)
    assert_recalls(tmp_path / "run")
    found = results(tmp_path / "run", "eval")
    assert found["text_to_image_recall@5"] > 0.5
    sheet = PictureImage.open(tmp_path / "run" / "pictures" / "eval-000002.png")
    assert len(sheet.convert("RGB").getcolors(2**24)) > 300, "pictures, not blank axes"
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"model.safetensors", "modeling_vit_embed.py", "tokenizer_config.json", "LICENSE", "NOTICE"} <= names
    card = (tmp_path / "run" / "README.md").read_text()
    assert "license: apache-2.0" in card and "fine-tuned from the checkpoint of vit_embed on `data`" in card
    assert "its LICENSE, NOTICE lie here" in card
    assert f"| text_to_image_recall@5 | {found['text_to_image_recall@5']:.4g} |" in card and "softmax" in card


def test_a_group_is_drawn_once_an_epoch_and_held_out_whole():
    groups = Groups(rows(), "group")
    assert len(groups) == len(PICTURES) and len(Groups(rows(), None)) == len(PICTURES) + 1
    assert groups.rows[0] == [0, len(PICTURES)], "in any of its drawings"
    arguments = DataArguments(dataset="x", group_column="group", validation_share=0.3)
    choose = partial(contrastive.random_groups, column="group")
    for seed in range(4):
        splits = hold_out(DatasetDict(train=rows()), arguments, seed, choose)
        held, kept = (set(splits[split]["group"]) for split in ("validation", "train"))
        assert len(held) == math.ceil(0.3 * len(PICTURES)) and not held & kept
        assert sum(map(len, splits.values())) == len(rows())


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
    dataset = rows_with_problems(tmp_path)
    kept = check_pairs(dataset, "train", ARGUMENTS, processor.tokenizer)
    assert kept["captions"][:] == ["fine", "long " * 40]
    assert "2 rows with an unreadable picture: [1, 4]" in caplog.text
    assert "1 rows with an empty caption: [2]" in caplog.text
    assert "1 rows with a caption too long, cut: [3]" in caplog.text
    with pytest.raises(ValueError, match="expected usable rows in split 'train', none of 1 are: 1 with an empty cap"):
        check_pairs(dataset.select([2]), "train", ARGUMENTS, processor.tokenizer)


def test_bad_rows_of_a_stream_are_passed_over_and_named(processor, tmp_path, caplog):
    arguments = DataArguments(dataset="x", sentence_share=0.0)
    rows = rows_with_problems(tmp_path)
    rows = rows.add_column(ROW, [f"captions.csv:{number}" for number in range(5)])
    stream = streams.training_stream(rows.to_iterable_dataset(), arguments, processor.tokenizer, 32, seed=0)
    found = list(stream)
    assert sorted(item["caption"] for item in found) == ["fine", "long " * 40]
    assert {np.shape(item["rgba"]) for item in found} == {(4, 32, 32)}
    for row, problem in ((1, "an unreadable"), (2, "an empty"), (3, "a caption too long"), (4, "an unreadable")):
        assert f"stream: row captions.csv:{row} with {problem}" in caplog.text
    assert stream.lost.sum() == 3 and stream.lost.is_shared()


def batches_of(pairs: int, processes: int = 1) -> SimpleNamespace:
    """What the checks of batches read of TrainingArguments."""
    return SimpleNamespace(
        train_batch_size=pairs, per_device_train_batch_size=pairs, world_size=processes, dataloader_drop_last=False
    )


def test_captions_that_most_rows_share_are_named(caplog):
    for captions in (["a", "b", "c", "d"], ["a", "b", "A "]):
        assert not caplog.text
        ids = list(map(caption_id, captions))
        check_captions_differ(ids, "split 'train'", batches_of(8), None, negatives=False)
    assert "2 of 3 rows share their first caption with others, 2 captions differ" in caplog.text


def test_batches_of_one_caption_are_refused_or_named(caplog):
    """By the share of batches of the joined size, drawn without replacement, that hold no other."""
    ids = [0] * 999 + [1]
    for pairs, processes in ((8, 1), (4, 2)):
        message = "999 of the 1000 rows of split 'train' .* batches of 8 pairs 99% hold no other.*--contrastive_chunk"
        with pytest.raises(ValueError, match=message):
            check_captions_differ(ids, "split 'train'", batches_of(pairs, processes), None, negatives=False)
    check_captions_differ(ids, "split 'train'", batches_of(600), None, negatives=False)
    assert "batches of 600 pairs 40% hold no other" in caplog.text
    assert share_that_teaches([0, 0, 1], 2) == pytest.approx(2 / 3)
    assert share_that_teaches([0, 0, 1], 8) == pytest.approx(1)


def test_the_first_rows_of_a_stream_are_checked_before_training(tmp_path, caplog):
    """Those that are shuffled together. Rows of one picture cannot become one row, which is said."""
    picture = str(PICTURES[0])

    def check(captions: list[str], pictures: list[str]) -> None:
        columns = {"image": pictures, "captions": captions, PROBLEM: [None] * len(captions)}
        stream = Dataset.from_dict(columns).cast_column("image", Image()).to_iterable_dataset()
        streams.check_first_rows(stream, "train", ARGUMENTS, batches_of(4))

    with pytest.raises(ValueError, match="the first 3 rows of split 'train', which .* all 3 rows have the same"):
        check(["a", "A", "a", ""], [picture] * 4)
    with pytest.raises(ValueError, match="captioned pictures in split 'train', none of its first 1000 rows is one"):
        check(["", ""], [picture] * 2)
    assert not caplog.text
    check(["a", "b", "c"], [picture, picture, str(PICTURES[1])])
    assert f"1 pictures are in several rows, as {picture}, which a stream cannot make one row" in caplog.text


def test_a_batch_of_one_pair_is_refused_and_a_last_one_left_out(small, tmp_path):
    single = {**small, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    message = (
        "at least 2 pairs in the joined batch .*--gradient_accumulation_steps adds none; .*--contrastive_chunk_size"
    )
    with pytest.raises(ValueError, match=message):
        run_here(train_contrastive, **single, output_dir=tmp_path / "run")
    for pairs, processes, count, left_out in ((4, 1, 9, True), (4, 1, 10, False), (4, 2, 9, False), (4, 1, 1, False)):
        training = batches_of(pairs, processes)
        leave_out_single(count, training)
        assert training.dataloader_drop_last == left_out


def test_rows_are_looked_at_without_naming_a_model(small, tmp_path):
    options = {**small, "config_name": None, "tokenizer_name": None, "output_dir": tmp_path, "check_only": True}
    run_here(train_contrastive, **{name: value for name, value in options.items() if not name.startswith("do_")})
    assert (tmp_path / "check" / "rows.png").exists()


def test_one_caption_for_all_is_refused_before_the_first_step(small, tmp_path):
    same = rows().remove_columns("captions").add_column("captions", ["one"] * (len(PICTURES) + 1))
    DatasetDict(train=same).save_to_disk(tmp_path / "data")
    message = f"two different captions in split 'train', all {len(same)} rows have the same .*; set --caption_column"
    with pytest.raises(ValueError, match=message):
        run_here(train_contrastive, **{**small, "dataset": tmp_path / "data", "output_dir": tmp_path / "run"})
    assert not (tmp_path / "run" / "trainer_state.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer_name": None}, "expected --tokenizer_name beside --config_name"),
        ({"do_predict": True}, r"expected splits \['test'\] in .*, found \['train', 'validation'\]"),
        ({"tag_column": "words"}, r"expected columns \['words'\] in split 'train', found \['image', 'captions',"),
        ({"image_column": "group"}, "expected paths of files in column 'group'"),
        ({"streaming": True, "group_column": "group"}, "--group_column picks from rows that are all known"),
        ({"caption_column": "image"}, "expected a column 'image', found columns .*; set --caption_column"),
    ],
)
def test_refusals(options, message, small, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_here(train_contrastive, **{**small, "output_dir": tmp_path / "run", **options})


def test_a_checkpoint_without_a_tokenizer_is_refused(small, tmp_path):
    """transformers makes an empty one of it, to which every word is the end of the text."""
    VitEmbedForContrastive(VitEmbedConfig.from_pretrained(small["config_name"])).save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"clip has 2 and \d; where the folder has no tokenizer name one"):
        contrastive.load_two_towers(ModelArguments(model_name_or_path=str(tmp_path / "clip")))


def test_processes_cannot_meet_at_the_end_of_a_stream():
    """Each comes to the end of its part at a step of its own."""
    steps = {"eval_strategy": "no", "save_strategy": "steps", "logging_strategy": "steps"}
    fine = {"world_size": 2, **steps, "gradient_accumulation_steps": 1, "max_steps": 9}
    with pytest.raises(ValueError, match="expected --max_steps beside --streaming"):
        streams.check_streaming(ARGUMENTS, SimpleNamespace(**{**fine, "max_steps": -1}))
    wrong = [(name, "epoch", "steps") for name in steps] + [("gradient_accumulation_steps", 2, "1")]
    for flag, value, instead in wrong:
        with pytest.raises(ValueError, match=f"got --{flag} {value}; set it to {instead}"):
            streams.check_streaming(ARGUMENTS, SimpleNamespace(**{**fine, flag: value}))


# --- the model ---


def test_options_of_the_model_reach_it_and_its_processor(small):
    options = {"contrastive_loss": "softmax", "hard_negative_beta": 0.25, "contrastive_chunk_size": 8, "image_size": 96}
    new = {name: str(small[name]) for name in ("config_name", "tokenizer_name")}
    for source in ({"model_name_or_path": str(REPO)}, new):
        model, processor = contrastive.load_two_towers(ModelArguments(**source, **options))
        assert {name: getattr(model.config, name) for name in options} == options
        shown = processor(images=PictureImage.new("RGB", (90, 70)), return_tensors="pt").pixel_values
        assert shown.shape == (1, 3, 96, 96) and model.get_image_features(shown).isfinite().all()
    with pytest.raises(ValueError, match="hard_negative_beta=0.25.*contrastive_loss='sigmoid'"):
        contrastive.load_two_towers(ModelArguments(**new, **{**options, "contrastive_loss": "sigmoid"}))


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


def test_captions_without_tags_are_equals_and_only_short_texts_are_put_in_sentences():
    random.seed(0)
    sentences = ["a cat on a sofa looks out of the window", "A cat.", "a dog, a cat, and a very small bird in a tree"]
    arguments = DataArguments(dataset="x", sentence_share=1.0)
    texts = [draw_caption([*sentences, "cat"], [], arguments) for _ in range(4000)]
    for text in sentences:
        assert texts.count(text) / len(texts) == pytest.approx(0.25, abs=0.03)
    assert {*texts} == {*sentences, *(sentence.format("cat") for sentence in SENTENCES)}
    named = [draw_caption(["cat", "kitty"], ["pet"], DataArguments(dataset="x", tag_column="t")) for _ in range(2000)]
    assert named.count("cat") / len(named) == pytest.approx(0.6 * 0.8, abs=0.04)
    assert {sentence.format("cat, pet") for sentence in SENTENCES} <= set(named)


def test_what_is_made_of_a_caption_fits_the_model(tmp_path):
    """Or is left at the name: nothing is cut. The limit is the model's, also of a tokenizer that names none."""
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(REPO / name, tmp_path)
    names = ModelArguments(model_name_or_path=str(REPO), tokenizer_name=str(tmp_path))
    tokenizer = contrastive.load_two_towers(names)[1].tokenizer
    assert tokenizer.model_max_length == 32
    name, other, tags = "xqzjkvwx xqzjkvwx xqzjkvwx zzqzzq", " ".join(["green"] * 31), " ".join(["blue"] * 5)
    assert len(tokenizer(name).input_ids) == 27
    arguments = DataArguments(dataset="x", tag_column="tags", name_share=0.3, sentence_share=0.5)
    row = {"image": PictureImage.new("RGB", (8, 8)), "captions": [name, other], "tags": [tags, None]}
    random.seed(0)
    texts = [contrastive.training_item(row, arguments, tokenizer, 8)["caption"] for _ in range(60)]
    short = [sentence for sentence in SENTENCES if len(sentence.split()) == 4]
    assert {*texts} == {name, *(sentence.format(name) for sentence in short)}, "32 tokens hold three words more"
    assert max(map(len, tokenizer(texts).input_ids)) <= 32


def test_equal_names_share_an_id_and_the_loss_leaves_them_out(processor):
    arguments = DataArguments(dataset="x", tag_column="tags")
    batch = [contrastive.training_item(row, arguments, processor.tokenizer, 64) for row in rows()]
    masked = Collator(processor, ARGUMENTS, (64, 64))(batch)
    assert masked["group_ids"][0] == masked["group_ids"][-1] == caption_id(name_of(PICTURES[0]))
    assert len(set(masked["group_ids"].tolist())) == len(PICTURES)
    plain = Collator(processor, DataArguments(dataset="x", duplicates_are_negatives=True), (64, 64))(batch)
    assert "group_ids" not in plain
    assert masked["pixel_values"].shape == (len(batch), 3, 64, 64)
    torch.testing.assert_close(masked["pixel_values"], plain["pixel_values"], msg="randomness belongs to the rows")
    # The same in every process and release.
    assert caption_id("cat") == 4312121625846082129 < 2**63
    assert caption_id(" Cat") == caption_id("cat") != caption_id("cats")


def test_drawings_of_one_grey_get_any_colour_and_stay_apart_from_their_ground(processor):
    """And coloured ones keep theirs, but for the jitter."""
    grey = PictureImage.new("LA", (64, 64))
    grey.paste((0, 255), (16, 16, 48, 48))
    red = grey.convert("RGBA")
    red.paste((255, 0, 0, 255), (16, 16, 48, 48))
    arguments = DataArguments(dataset="x", jitter=0.0, hue=0.0, rotation=0.0)
    of_pixels = (processor.image_processor.image_mean, processor.image_processor.image_std)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in of_pixels)
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


@pytest.mark.parametrize(("names", "first"), [(["cat"], 1.0), (["cat", "cat"], 1.0), (["cat", "dog"], 0.0)])
def test_recall_of_few_captions(names, first):
    """Of one caption everything is found; of two, what is nearer, here the other."""
    ids = np.array(list(map(caption_id, names)))
    assert recalls(np.eye(len(ids))[::-1], ids, ids) == [first, 1.0, 1.0]


def test_recalls_count_equal_names_once():
    similarity = np.array([[0.9, 0.8, 0.1, 0.0], [0.9, 0.8, 0.7, 0.0], [0.0, 0.1, 0.2, 0.3]])
    found = np.array([7, 7, 8, 9])
    assert recalls(similarity, np.array([7, 8, 9]), found) == [pytest.approx(2 / 3), 1.0, 1.0]
