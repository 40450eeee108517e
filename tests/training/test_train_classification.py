"""The classification recipe: every mode, what it says of the data, what it refuses, and what it pushes to a Hub."""

import json
import logging
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import loopback_hub
import numpy as np
import pytest
import tiny
import torch
import train_classification
import training_runs
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from fresh_process import run_fresh
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from training_runs import flags, results
from transformers import AutoImageProcessor, AutoModelForImageClassification

from data import build_digits_dataset
from recipes import classification
from recipes.data import ROW, hold_out
from vit_embed import VitEmbedForImageClassification, VitEmbedModel

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
COUNTS = {"train": 48, "validation": 20, "test": 12}


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """An image folder of handwritten digits, 8 x 8 pixels."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    pictures, labels = load_digits(return_X_y=True)
    starts = dict(zip(COUNTS, np.cumsum([0, *COUNTS.values()])))
    for split, count in COUNTS.items():
        for row in range(starts[split], starts[split] + count):
            path = folder / split / f"digit {labels[row]}" / f"{row:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pictures[row].reshape(8, 8) * 15).astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def trunks(tmp_path_factory) -> dict[str, Path]:
    """A trunk without randomness in training, and one that drops values, layers and patches at random."""
    root = tmp_path_factory.mktemp("trunks")
    random = {"hidden_dropout_prob": 0.1, "drop_path_rate": 0.2, "patch_drop_rate": 0.25}
    for name, options in {"still": {}, "random": random}.items():
        tiny.randomised(VitEmbedModel(tiny.vision_config(**options))).save_pretrained(root / name)
    return {name: root / name for name in ("still", "random")}


def options_of(dataset: Path, trunk: Path, output_dir: Path, **options: object) -> dict[str, object]:
    given = {"dataset": dataset, "model_name_or_path": trunk, "output_dir": output_dir, "learning_rate": 1e-2}
    return {**given, "per_device_eval_batch_size": 16, **options}


def train(dataset: Path, trunk: Path, output_dir: Path, **options: object) -> None:
    training_runs.run_here(train_classification, **options_of(dataset, trunk, output_dir, **options))


# --- the three modes ---

MODES = {
    "linear": {},
    "full": {"bf16": True, "gradient_checkpointing": True, "layer_decay": 0.8},
    "lora": {"gradient_checkpointing": True, "mirror": 0.5},
}


@pytest.fixture(scope="module")
def trained(digits, trunks, tmp_path_factory) -> dict[str, Path]:
    """A run of three epochs of each mode; its checkpoint is of the model before lora is merged."""
    root = tmp_path_factory.mktemp("trained")
    asked = {"do_train": True, "do_eval": True, "do_predict": True, "num_train_epochs": 3, "logging_steps": 1}
    asked |= {"per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 18}
    for mode, options in MODES.items():
        train(digits, trunks["random"], root / mode, **asked, mode=mode, **options, sheets=mode == "linear")
    return {mode: root / mode for mode in MODES}


@pytest.mark.parametrize("mode", MODES)
def test_what_a_run_leaves_behind(mode, trained, digits):
    """A folder that gives by its Auto class, without peft, what the script measured."""
    folder = trained[mode]
    assert not list(folder.glob("adapter*")), "with them transformers would ask for peft"
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    assert model.config.id2label == {number: f"digit {number}" for number in range(10)}
    processor, pictures = AutoImageProcessor.from_pretrained(folder), sorted((digits / "test").rglob("*.png"))
    with torch.no_grad():
        shown = processor([Image.open(path).convert("RGB") for path in pictures], return_tensors="pt")
        guessed = model(**shown).logits.argmax(1).tolist()
    right = [f"digit {guess}" == path.parent.name for guess, path in zip(guessed, pictures)]
    assert np.mean(right) == pytest.approx(results(folder, "test")["accuracy"])
    assert 0 <= results(folder, "eval")["macro_f1"] <= 1
    assert sorted(path.name for path in (folder / "pictures").iterdir()) == ["eval-000018.png", "test-000018.png"]
    curve = training_runs.losses(folder)
    assert len(curve) == 18 and np.mean(curve[-6:]) < np.mean(curve[:6])


def test_a_sheet_shows_the_mistakes(trained):
    sheet = Image.open(trained["linear"] / "pictures" / "test-000018.png").convert("L")
    assert sheet.width > 800 and sheet.height > 500 and len(sheet.getcolors()) > 100


def test_linear_leaves_the_trunk_bit_equal(trained, trunks):
    before, after = (load_file(folder / "model.safetensors") for folder in (trunks["random"], trained["linear"]))
    trunk = {name: tensor for name, tensor in after.items() if name.startswith("vision_model.")}
    assert len(trunk) == len(before) and set(after) - set(trunk) == {"classifier.weight", "classifier.bias"}
    for name, tensor in trunk.items():
        assert torch.equal(tensor, before[name.removeprefix("vision_model.")]), name
    moved = load_file(trained["full"] / "model.safetensors")
    assert not any(torch.equal(moved[name], tensor) for name, tensor in trunk.items() if name.endswith("proj.weight"))


def test_lora_merged_equals_unmerged(trained, trunks):
    """float32 sums in another order; the changes themselves are far larger."""
    from peft import PeftModel

    merged = VitEmbedForImageClassification.from_pretrained(trained["lora"]).eval()
    base = VitEmbedForImageClassification.from_pretrained(trunks["random"], num_labels=10)
    still = VitEmbedForImageClassification.from_pretrained(trunks["random"], num_labels=10).eval()
    unmerged = PeftModel.from_pretrained(base, trained["lora"] / "checkpoint-18").eval()
    with torch.no_grad():
        still.classifier.load_state_dict(merged.classifier.state_dict())
        logits = [model(tiny.pixels()).logits for model in (merged, unmerged, still)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)
    assert (logits[0] - logits[2]).abs().max() > 1e-2


def test_a_classifier_is_judged_by_itself_as_after_training(digits, trunks, tmp_path):
    """Whatever the seed: no split is augmented, and the same labels keep their outputs."""
    asked = {"eval": {"validation_split": "train", "do_eval": True}, "test": {"do_predict": True}}
    options = {**asked["eval"], **asked["test"], "do_train": True, "max_steps": 1}
    train(digits, trunks["still"], tmp_path / "run", **options)
    for split in asked:
        train(digits, tmp_path / "run", tmp_path / split, **asked[split], seed=1)
        ours, theirs = results(tmp_path / "run", split), results(tmp_path / split, split)
        for name in ("loss", "accuracy", "macro_f1"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


# --- what is wrong with the data ---


ONE_STEP = {"do_train": True, "do_eval": True, "max_steps": 1}


def test_problems_of_the_data_are_named_before_the_first_step(digits, trunks, tmp_path, caplog):
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    broken = data / "train" / "digit 3" / "broken.png"
    broken.write_text("no picture")
    shutil.rmtree(data / "train" / "digit 7")
    (data / "train" / "digit 11").mkdir()
    with caplog.at_level(logging.INFO):
        train(data, trunks["still"], tmp_path / "run", **ONE_STEP)
    assert "split train: 1 rows with an unreadable picture: ['train/digit 3/broken.png']" in caplog.text
    assert "split train: no picture of labels ['digit 7']" in caplog.text
    assert "split validation: labels that training lacks, always counted as mistakes: ['digit 7']" in caplog.text
    assert "1 empty folders" in caplog.text and "digit 11" in caplog.text
    before_training = caplog.text.index("empty folders")
    assert "rows kept" in caplog.text[:before_training], "all of it before the first step"


def saved(folder: Path, feature: object, **columns: list) -> Path:
    """A dataset with these labels in each split."""
    splits = {}
    features = Features({"picture": ImageFeature(), "kind": feature})
    for split, labels in columns.items():
        pictures = [Image.new("L", (9, 7), 40 * row) for row in range(len(labels))]
        splits[split] = Dataset.from_dict({"picture": pictures, "kind": labels}, features=features)
    DatasetDict(splits).save_to_disk(folder)
    return folder


NAMED = {"image_column": "picture", "label_column": "kind"}


def test_a_validation_share_is_stratified_and_seeded(tmp_path):
    labels = [0] * 20 + [1] * 10 + [2]
    data = saved(tmp_path / "data", ClassLabel(names=["a", "b", "c"]), train=labels)
    arguments = classification.DataArguments(str(data), validation_share=0.2, **NAMED)
    labelled = classification.load_labelled(arguments)
    problem = classification.find_problem(labelled, arguments, tiny.vision_config())
    choose = partial(classification.held_out, problem)
    taken = [hold_out(labelled.splits, arguments, seed, choose) for seed in (0, 0, 1)]
    rows = [parts["validation"][ROW][:] for parts in taken]
    assert rows[0] == rows[1] != rows[2]
    assert sorted(taken[0]["validation"]["kind"]) == [0] * 4 + [1] * 2
    assert 2 in taken[0]["train"]["kind"], "a label with one picture stays in training"
    assert len(taken[0]["train"]) + len(taken[0]["validation"]) == 31


@pytest.mark.parametrize(
    ("feature", "labels", "options", "message"),
    [
        (Value("string"), ["a", "b"], {"image_column": "img"}, "set --image_column"),
        (Value("string"), ["a", "b"], {**NAMED, "image_column": "kind"}, "expected paths of files in column 'kind'"),
        (Value("float32"), [1.0, 0.0], NAMED, "column 'kind' can be read in two ways, found 1.0, 0.0; --problem_type"),
        (Value("string"), ["a", "a"], NAMED, "expected at least two labels"),
        (Value("string"), ["a", "b"], {**NAMED, "do_predict": True}, r"expected splits \['test'\]"),
        (Value("string"), ["a", "b"], {**NAMED, "mode": "half"}, "expected --mode linear, full, lora, got 'half'"),
        (
            *(Value("string"), ["a", "b"], {**NAMED, "train_split": "x", "do_train": False, "do_eval": True}),
            "expected a classifier in the checkpoint or split 'x' to train one",
        ),
    ],
)
def test_refusals(feature, labels, options, message, trunks, tmp_path):
    data = saved(tmp_path / "data", feature, train=labels, validation=labels)
    with pytest.raises(ValueError, match=message):
        train(data, trunks["still"], tmp_path / "run", **{"do_train": True, **options})


def test_digits_data_set_script(monkeypatch, tmp_path, capsys):
    """Each picture stands in one of the splits, in the folder of its label, and with --captions has one."""

    def build(folder: str, *more: str) -> Path:
        asked = ["x", "--source", "digits", "--output_dir", str(tmp_path / folder), *more]
        monkeypatch.setattr(sys, "argv", asked)
        build_digits_dataset.main()
        return tmp_path / folder

    out, captioned = build("out"), build("captioned", "--captions")
    pictures, labels = load_digits(return_X_y=True)
    files = {split: sorted((out / split).rglob("*.png")) for split in ("train", "test")}
    assert {split: len(paths) for split, paths in files.items()} == {"train": 1437, "test": 360}
    assert len({path.name for paths in files.values() for path in paths}) == 1797
    path = files["test"][100]
    assert path.parent.name == str(labels[int(path.stem)])
    drawn = pictures[int(path.stem)].reshape(8, 8)
    np.testing.assert_allclose(np.asarray(Image.open(path)) / 255, drawn / 16, atol=0.5 / 255)
    by_digit = [sum(path.parent.name == str(digit) for path in files["test"]) for digit in range(10)]
    assert max(by_digit) - min(by_digit) <= 2
    assert not list(out.rglob("metadata.jsonl"))
    for split, paths in files.items():
        lines = [json.loads(line) for line in (captioned / split / "metadata.jsonl").read_text().splitlines()]
        assert len(lines) == len(paths) and all((captioned / split / line["file_name"]).exists() for line in lines)
        named = [build_digits_dataset.NAMES[labels[int(Path(line["file_name"]).stem)]] for line in lines]
        assert [line["text"] for line in lines] == [f"the digit {name}" for name in named]
    with pytest.raises(SystemExit):
        build("out")
    assert "not to exist" in capsys.readouterr().err


def test_lora_refuses_fsdp():
    arguments = classification.ModelArguments(mode="lora")
    with pytest.raises(ValueError, match="merges its changes into whole weights"):
        classification.choose_trained(None, arguments, None, SimpleNamespace(fsdp=True))


# --- the Hub ---


def train_and_push(examples: str, base: str, token: str, arguments: list) -> dict:
    import sys

    sys.path.insert(0, examples)
    import train_classification
    from huggingface_hub import HfApi, ModelCard
    from transformers import AutoModelForImageClassification

    hub = HfApi(token=token)
    hub.create_repo("alice/licensed-base")
    hub.upload_folder(repo_id="alice/licensed-base", folder_path=base)
    given, sys.argv = sys.argv, ["x", *arguments]
    train_classification.main()
    sys.argv = given
    pulled = AutoModelForImageClassification.from_pretrained("alice/digits", trust_remote_code=True)
    card = ModelCard.load("alice/digits")
    return {
        "files": hub.list_repo_files("alice/digits"),
        "labels": pulled.config.num_labels,
        "card": [card.data.license, card.data.pipeline_tag, card.data.base_model],
        "text": card.text,
    }


def test_what_is_pushed_to_the_hub(digits, trunks, tmp_path):
    """With lora, whose checkpoints hold files that must not be pushed; a card, and the licence of the base."""
    base = tmp_path / "licensed-base"
    shutil.copytree(trunks["still"], base)
    (base / "README.md").write_text("---\nlicense: mit\n---\n# The base\n")
    (base / "LICENSE").write_text("MIT License")
    (base / "NOTICE").write_text("made by A. Hand")
    asked = {"do_train": True, "do_eval": True, "mode": "lora", "max_steps": 1, "save_steps": 1, "push_to_hub": True}
    asked |= {"hub_model_id": "alice/digits", "hub_token": loopback_hub.TOKEN, "use_cpu": True, "report_to": "none"}
    given = flags(**options_of(digits, "alice/licensed-base", tmp_path / "run", **asked))
    with loopback_hub.started(tmp_path / "hub") as hub:
        sent = {"examples": str(EXAMPLES), "base": str(base), "token": loopback_hub.TOKEN, "arguments": given}
        found = run_fresh(train_and_push, tmp_path / "home", environment=hub, **sent)
    wanted = {"README.md", "config.json", "model.safetensors", "modeling_vit_embed.py", "preprocessor_config.json"}
    assert set(found["files"]) >= {*wanted, "LICENSE", "NOTICE"}
    assert not [name for name in found["files"] if "adapter" in name]
    assert found["labels"] == 10 and (tmp_path / "run" / "NOTICE").read_text() == "made by A. Hand"
    assert found["card"] == ["mit", "image-classification", "alice/licensed-base"]
    for line in (
        "fine-tuned from `alice/licensed-base` on `digits`",
        f"| accuracy | {results(tmp_path / 'run', 'eval')['accuracy']:.4g} |",
        'name = "alice/digits"',
        "The base states the licence mit; its LICENSE, NOTICE lie here.",
    ):
        assert line in found["text"]
    assert str(tmp_path) not in found["text"]
