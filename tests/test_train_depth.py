"""examples/train_depth.py, run as a user runs it, on little; and its parts, against formulas a reader can check."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import training_runs
from datasets import Dataset, DatasetDict
from PIL import Image
from safetensors.torch import load_file
from transformers import DPTImageProcessor, EvalPrediction, pipeline

from vit_embed.saving_vit_embed import CLIP_IMAGE_MEAN, CLIP_IMAGE_STD, image_processor_dict

REPO = Path(__file__).parent.parent
sys.path.insert(0, str(REPO / "examples"))
import render_depth_scenes  # noqa: E402
import train_depth  # noqa: E402

SCRIPT = str(REPO / "examples" / "train_depth.py")
SIZE = 32
BASICS = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "True", "--per_device_eval_batch_size", "4"]
TRAINING = ["--do_train", "--max_steps", "4", "--per_device_train_batch_size", "4", "--learning_rate", "1e-3"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """16 scenes for training, 2 for validation and 3 for testing, 32 pixels wide, as the script renders them."""
    folder, textures = tmp_path_factory.mktemp("scenes"), tmp_path_factory.mktemp("textures")
    for split in render_depth_scenes.SPLITS:
        for kind in ("images", "depths"):
            (folder / split / kind).mkdir(parents=True)
    render_depth_scenes.render_to_folder(folder, textures, 0, list(range(21)), SIZE)
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """config.json of a model for 32 x 32 pixels."""
    folder = tmp_path_factory.mktemp("config")
    tiny.vision_config(max_depth=10.0).save_pretrained(folder)
    return folder / "config.json"


def command(*arguments: object) -> list[str]:
    return [sys.executable, SCRIPT, *map(str, (*arguments, *BASICS))]


def train(*arguments: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=900, **options)


def metrics_of(folder: Path, split: str) -> dict[str, float]:
    return json.loads((folder / f"{split}_results.json").read_text())


# --- end to end ---


@pytest.fixture(scope="module")
def trained(scenes, config, tmp_path_factory) -> tuple[Path, str]:
    """A folder after four steps with everything that costs nothing to switch on, and what the run logged."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    ran = train(
        *("--dataset", scenes, "--config_name", config, "--output_dir", folder, *TRAINING, "--do_eval", "--do_predict"),
        *("--eval_strategy", "steps", "--eval_steps", 2, "--save_steps", 2, "--bf16", "--gradient_checkpointing"),
        *("--depth_gradient_weight", 0.5, "--layer_decay", 0.8, "--freeze", "vision_model.embeddings"),
        *("--deconv_kernel_size", 4, "--hue", 0.5, "--channels_last", "True"),
        *("--load_best_model_at_end", "True", "--metric_for_best_model", "abs_rel"),
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return folder, ran.stderr


def test_training_evaluates_with_metrics_and_pictures(trained):
    folder, log = trained
    assert json.loads((folder / "config.json").read_text())["deconv_kernel_size"] == 4
    for split in ("eval", "test"):
        metrics = metrics_of(folder, split)
        for name in ("abs_rel", "rmse", "log10", "delta1", "delta2", "delta3"):
            assert np.isfinite(metrics[f"{split}_{name}"]) and f"{split}_median_scaled_{name}" in metrics
        assert metrics[f"{split}_delta1"] <= metrics[f"{split}_delta2"] <= metrics[f"{split}_delta3"] <= 1
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["best_metric"] == min(entry["eval_abs_rel"] for entry in state["log_history"] if "eval_loss" in entry)
    pictures = sorted(path.name for path in (folder / "pictures").iterdir())
    assert pictures == ["eval-000002.png", "eval-000004.png", "test-000004.png"]
    sheet = Image.open(folder / "pictures" / "test-000004.png").convert("RGB")
    assert sheet.width > 600 and len(sheet.getcolors(2**24)) > 500
    assert "split train: 16 rows kept, 0 dropped" in log and "split test: 3 rows kept, 0 dropped" in log


def test_the_saved_folder_is_a_depth_pipeline(trained, scenes):
    folder, _ = trained
    saved = json.loads((folder / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"].startswith("DPTImageProcessor")
    assert saved["image_mean"] == CLIP_IMAGE_MEAN and saved["image_std"] == CLIP_IMAGE_STD
    assert saved["size"] == {"height": SIZE, "width": SIZE}
    picture = Image.open(scenes / "test" / "images" / "000010.png")
    depth = pipeline("depth-estimation", model=str(folder), trust_remote_code=True)(picture)["predicted_depth"]
    assert tuple(depth.shape[-2:]) == (SIZE, SIZE) and depth.min() > 0 and depth.max() < 10


def test_a_trained_folder_is_evaluated_on_another_folder_as_in_training(trained, scenes, tmp_path):
    folder, _ = trained
    arguments = ["--model_name_or_path", folder, "--dataset", scenes, "--output_dir", tmp_path, "--do_predict"]
    assert train(*arguments, "--bf16").returncode == 0
    again = metrics_of(tmp_path, "test")
    expected = metrics_of(folder, "test")
    for name in ("test_abs_rel", "test_median_scaled_delta1", "test_loss"):
        assert again[name] == pytest.approx(expected[name], rel=1e-6)


def test_a_head_of_another_kernel_is_refused_by_its_flag(trained):
    arguments = train_depth.ModelArguments(model_name_or_path=str(trained[0]), deconv_kernel_size=2)
    with pytest.raises(ValueError, match="expected --deconv_kernel_size 4.*got 2; leave the flag out"):
        train_depth.load_model(arguments)
    for fine in ({"deconv_kernel_size": 4}, {"depth_head_type": "dpt", "deconv_kernel_size": 2}):
        train_depth.load_model(train_depth.ModelArguments(model_name_or_path=str(trained[0]), **fine))


def test_four_steps_of_the_shipped_trunk_with_the_other_head(scenes, tmp_path):
    ran = train(
        *("--dataset", scenes, "--output_dir", tmp_path / "run", *TRAINING, "--do_eval", "--image_size", 64),
        *("--depth_head_type", "dpt", "--depth_loss", "l1", "--max_depth", 8, "--max_steps", 1),
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["depth_head_type"], saved["depth_loss"], saved["max_depth"]) == ("dpt", "l1", 8)
    assert saved["architectures"] == ["VitEmbedForDepthEstimation"] and saved["image_size"] == 64


# Twelve steps that runs are compared by: every random number in them belongs to a row and an epoch.
TWELVE = ["--do_train", "--do_eval", "--max_steps", "12", "--learning_rate", "1e-3", "--lr_scheduler_type", "constant"]


@pytest.fixture(scope="module")
def unbroken(scenes, config, tmp_path_factory) -> Path:
    """A folder after twelve steps of one process in one go."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    arguments = ["--dataset", scenes, "--config_name", config, *TWELVE, "--save_strategy", "no"]
    ran = train(*arguments, "--output_dir", folder, "--per_device_train_batch_size", 4)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return folder


def test_killed_and_resumed_equals_unbroken(scenes, config, unbroken, tmp_path):
    folder = tmp_path / "run"
    arguments = ["--dataset", scenes, "--config_name", config, *TWELVE, "--save_steps", 1, "--output_dir", folder]
    arguments += ["--per_device_train_batch_size", 4]
    process = subprocess.Popen(command(*arguments), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (folder / "checkpoint-5" / "trainer_state.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "model.safetensors").exists()
    resumed = train(*arguments, "--resume_from_checkpoint", "True")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert "resume from" in resumed.stderr and "no checkpoint" not in resumed.stderr
    expected, found = (load_file(each / "model.safetensors") for each in (unbroken, folder))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_two_processes_and_fsdp_give_the_curve_of_one(scenes, config, tmp_path):
    """The loss is a mean over the measured pixels of each process, so here every pixel is measured."""
    shutil.copytree(scenes, tmp_path / "full")
    for path in (tmp_path / "full").glob("*/depths/*.png"):
        depth = np.array(Image.open(path))
        Image.fromarray(np.where(depth == 0, 9000, depth).astype(np.uint16)).save(path)
    asked = ["--dataset", tmp_path / "full", "--config_name", config, *TWELVE, "--depth_loss", "l1"]
    asked += ["--logging_steps", 1, "--save_strategy", "no", *BASICS, "--per_device_train_batch_size"]
    running = {
        kind: training_runs.start_two_processes(
            "train_depth", kind, [*asked, 2, "--output_dir", tmp_path / kind], tmp_path
        )
        for kind in ("ddp", "fsdp")
    }
    ran = train(*asked, 4, "--output_dir", tmp_path / "one")
    assert ran.returncode == 0, ran.stderr[-2000:]
    expected = training_runs.losses(tmp_path / "one")
    assert len(expected) == 12
    for kind, process in running.items():
        training_runs.finish(process)
        assert training_runs.losses(tmp_path / kind) == pytest.approx(expected, rel=1e-4), kind
        epochs = [json.loads((tmp_path / each / "trainer_state.json").read_text())["epoch"] for each in ("one", kind)]
        assert epochs == [3, 3], "the processes share the rows"
        for name, value in metrics_of(tmp_path / "one", "eval").items():
            if not name.endswith(("runtime", "per_second")):
                assert metrics_of(tmp_path / kind, "eval")[name] == pytest.approx(value, rel=1e-3), (kind, name)


# --- data ---


def arguments_for(path: Path | str, **fields) -> train_depth.DataArguments:
    return train_depth.DataArguments(dataset=str(path), **fields)


METRES = np.array([[0.5, 1.0, 2.0, 4.0], [0.0, 3.0, 12.0, 8.0]], dtype=np.float32)


@pytest.mark.parametrize(
    ("suffix", "scale", "stored"),
    [
        (".png", 1000, (METRES * 1000).astype(np.uint16)),
        (".png", 256, (METRES * 256).astype(np.uint16)),
        (".tif", 1000, (METRES * 1000).astype(np.uint16)),
        (".npy", 1000, METRES),
        (".npy", 1000, METRES.astype(np.float64)[None]),
        (".npy", 1000, (METRES * 1000).astype(np.int32)),
        (".npy", 256, METRES.astype(np.float16)[..., None]),
    ],
)
def test_depths_of_every_format_are_the_same_metres(suffix, scale, stored, tmp_path):
    path = tmp_path / f"depth{suffix}"
    np.save(path, stored) if suffix == ".npy" else Image.fromarray(stored).save(path)
    np.testing.assert_allclose(train_depth.read_depth(str(path), scale, None), METRES, rtol=1e-3)
    bounded = train_depth.read_depth(str(path), scale, 10.0)
    np.testing.assert_allclose(bounded, np.where(METRES > 10, 0, METRES), rtol=1e-3)
    cell = Image.open(path) if suffix != ".npy" else stored.tolist() if stored.dtype.kind == "f" else stored
    np.testing.assert_allclose(train_depth.read_depth(cell, scale, None), METRES, rtol=1e-3)


def test_what_is_no_depth_is_zero():
    depth = np.array([[np.nan, np.inf, -np.inf], [-1.0, 0.0, 2.5]])
    assert train_depth.read_depth(depth, 1000, None).tolist() == [[0, 0, 0], [0, 0, 2.5]]
    with pytest.raises(ValueError, match=r"one number a pixel, got shape \(4, 4, 3\) of uint8"):
        train_depth.read_depth(np.zeros((4, 4, 3), np.uint8), 1000, None)


def write_pair(folder: Path, name: str, depth: np.ndarray | bytes | None, picture: bytes | str | None = "good") -> None:
    for kind in ("images", "depths"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    if picture == "good":
        Image.fromarray(np.full((16, 24, 3), 90, np.uint8)).save(folder / "images" / f"{name}.png")
    elif picture is not None:
        (folder / "images" / f"{name}.png").write_bytes(picture)
    if isinstance(depth, bytes):
        (folder / "depths" / f"{name}.npy").write_bytes(depth)
    elif depth is not None:
        np.save(folder / "depths" / f"{name}.npy", depth)


GOOD = np.linspace(1, 5, 16 * 24, dtype=np.float32).reshape(16, 24)
# What is wrong with a pair: its depth, its picture, what the log says, and whether it is left out.
PROBLEMS = {
    "alone": (None, "good", "a picture without a depth", True),
    "blind": (GOOD, None, "a depth without a picture", True),
    "noise": (GOOD, b"this is no picture", "unreadable picture", True),
    "torn": (b"this is no array", "good", "unreadable depth", True),
    "colour": (np.zeros((16, 24, 3), np.uint8), "good", "unreadable depth", True),
    "empty": (np.zeros((16, 24), np.float32), "good", "a depth without a valid pixel", True),
    "infinite": (np.full((16, 24), np.inf), "good", "a depth without a valid pixel", True),
    "turned": (np.ascontiguousarray(GOOD.T), "good", "a depth of another shape than its picture", True),
    "far": (GOOD + 80, "good", "no valid pixel within --max_depth 50", True),
    "half": (GOOD[::2, ::2], "good", "a depth of another size than its picture, which is scaled to it", False),
    "millimetres": (GOOD * 1e4, "good", "a depth that looks wrongly scaled", False),
    "whole": (np.round(GOOD), "good", "a depth that looks wrongly scaled", False),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_each_problem_is_named_with_its_file(name, tmp_path, caplog):
    depth, picture, reason, is_dropped = PROBLEMS[name]
    write_pair(tmp_path, "fine", GOOD)
    write_pair(tmp_path, name, depth, picture)
    arguments = arguments_for(tmp_path)
    bound = {"far": 50.0}.get(name)
    with caplog.at_level("INFO"):
        rows, shape = train_depth.check_rows(train_depth.load_pairs(arguments)["train"], "train", arguments, bound)
    assert f"split train: 1 rows with {reason}: ['{name}']" in caplog.text
    assert sorted(rows["name"]) == sorted(["fine"] if is_dropped else ["fine", name])
    assert shape == (None if name == "half" else (16, 24))


def test_data_that_is_all_wrong_is_refused_with_what_to_set(tmp_path, caplog):
    write_pair(tmp_path / "a", "one", (GOOD * 1000).astype(np.uint16))
    arguments = arguments_for(tmp_path / "a", depth_scale=1)
    with pytest.raises(ValueError, match="medians of 3e[+]03 to 3e[+]03 with --depth_scale 1; set it"):
        train_depth.check_rows(train_depth.load_pairs(arguments)["train"], "train", arguments, None)
    write_pair(tmp_path / "b", "one", None)
    with pytest.raises(ValueError, match="none of 1 are: 1 with a picture without a depth"):
        arguments = arguments_for(tmp_path / "b")
        train_depth.check_rows(train_depth.load_pairs(arguments)["train"], "train", arguments, None)
    (tmp_path / "c" / "images").mkdir(parents=True)
    with pytest.raises(ValueError, match="a folder depths/ beside images/"):
        train_depth.load_pairs(arguments_for(tmp_path / "c"))
    with pytest.raises(ValueError, match="one file of the name 'one'"):
        shutil.copy(tmp_path / "a" / "images" / "one.png", tmp_path / "a" / "images" / "one.jpg")
        train_depth.load_pairs(arguments_for(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"expected columns \['depth'\] in split 'x'.*--depth_column"):
        train_depth.check_rows(Dataset.from_dict({"image": ["a"]}), "x", arguments_for("x"), None)


def test_a_saved_dataset_reads_as_its_files_do(scenes, tmp_path):
    """Columns of pictures as `datasets` keeps them, 16-bit depths among them."""
    pairs = train_depth.load_pairs(arguments_for(scenes))["test"]
    rows = [{name: Image.open(row[name]) for name in ("image", "depth")} for row in pairs]
    DatasetDict(test=Dataset.from_list(rows)).save_to_disk(tmp_path / "saved")
    saved = train_depth.load_pairs(arguments_for(tmp_path / "saved"))["test"]
    kept, shape = train_depth.check_rows(saved, "test", arguments_for("x"), 10.0)
    assert shape == (SIZE, SIZE) and len(kept) == 3
    for pair, row in zip(pairs, kept):
        expected, found = (train_depth.read_depth(each["depth"], 1000, 10.0) for each in (pair, row))
        np.testing.assert_array_equal(found, expected)
        assert expected.max() > 1


def test_rows_of_one_name_are_told_apart(caplog):
    """A column `name` of somebody else's, as of a scene."""
    black, white = (Image.new("L", (24, 16), value) for value in (0, 200))
    rows = Dataset.from_list([{"image": white, "depth": depth, "name": "hall"} for depth in (black, black, white)])
    with caplog.at_level("INFO"):
        kept, _ = train_depth.check_rows(rows, "x", arguments_for("x", depth_scale=50), None)
    assert "2 rows with a depth without a valid pixel: [0, 1]" in caplog.text
    assert len(kept) == 1 and "split x: 1 rows kept, 2 dropped" in caplog.text
    with pytest.raises(ValueError, match="none of 2 are: 2 with a depth without a valid pixel"):
        train_depth.check_rows(rows.select(range(2)), "x", arguments_for("x"), None)


def test_a_picture_too_large_to_be_meant_is_named(tmp_path, monkeypatch):
    """Pillow's guard against decompression bombs is no OSError."""
    Image.new("1", (900, 900)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300_000)
    row = {"image": str(tmp_path / "huge.png"), "depth": np.ones((900, 900), np.float32)}
    assert train_depth.check_row(row, arguments_for("x")) == (None, "unreadable picture", False)


# --- augmentation ---


def pair_that_shows_its_depth(height: int, width: int) -> dict[str, object]:
    """A picture whose red is its depth (1 to 5 m) and whose green is the place in the row."""
    rows, columns = np.mgrid[:height, :width]
    depth = (1 + 4 * (0.7 * columns / width + 0.3 * rows / height)).astype(np.float32)
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 0], picture[..., 1] = np.round(depth * 50), np.round(255 * columns / width)
    return {"image": Image.fromarray(picture), "depth": depth}


@pytest.mark.parametrize("shape", [(32, 32), (32, 48)])
@pytest.mark.parametrize("crop", [1.0, 0.5])
def test_augmentation_keeps_picture_and_depth_aligned(shape, crop):
    """Red over 50 is the depth wherever the pair is cropped and mirrored, but for the zoom, one factor a picture."""
    config = tiny.vision_config(image_size=shape)
    processor = DPTImageProcessor(**image_processor_dict(config, "DPTImageProcessor"))
    arguments = arguments_for("x", smallest_crop=crop, mirror=0.5, jitter=0.0)
    make = train_depth.TrainingPair(arguments, config, processor)
    mean, std = CLIP_IMAGE_MEAN[0], CLIP_IMAGE_STD[0]
    mirrored, zooms = [], []
    for seed in range(12):
        torch.manual_seed(seed)
        pair = make(pair_that_shows_its_depth(40, 40 * shape[1] // shape[0]))
        assert pair["pixel_values"].shape == (3, *shape) and pair["labels"].shape == shape
        shown = (pair["pixel_values"][0] * std + mean) * 255 / 50
        ratio = (shown / pair["labels"])[2:-2, 2:-2]
        assert ratio.std() < 0.02 * ratio.mean(), "a flip or a crop of one alone would show here"
        zooms.append(float(ratio.mean()))
        mirrored.append(bool(shown[5, 3] > shown[5, -4]))
        if crop < 1:  # the greatest and the least green that is seen say how much of the width is
            green = (pair["pixel_values"][1] * CLIP_IMAGE_STD[1] + CLIP_IMAGE_MEAN[1])[16]
            assert 1 / float(green.max() - green.min()) == pytest.approx(zooms[-1], rel=0.08)
    assert len(set(mirrored)) == 2
    assert (max(zooms) > 1.2) if crop < 1 else (np.abs(np.array(zooms) - 1) < 0.02).all()


def test_colours_change_in_the_picture_alone():
    config = tiny.vision_config()
    processor = DPTImageProcessor(**image_processor_dict(config, "DPTImageProcessor"))
    row = pair_that_shows_its_depth(32, 32)
    made = []
    for jitter, hue in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5)):
        arguments = arguments_for("x", smallest_crop=1.0, mirror=0.0, jitter=jitter, hue=hue)
        torch.manual_seed(1)
        made.append(train_depth.TrainingPair(arguments, config, processor)(row))
        assert torch.equal(made[0]["labels"], made[-1]["labels"])
    np.testing.assert_array_equal(made[0]["labels"], row["depth"])
    for changed in made[1:]:
        assert (made[0]["pixel_values"] - changed["pixel_values"]).abs().mean() > 0.05
    # Without changes it is what the stock processor makes of the picture.
    evaluated = train_depth.EvaluationPair(arguments_for("x"), config, processor, (32, 32))(row)
    torch.testing.assert_close(made[0]["pixel_values"], evaluated["pixel_values"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made[0]["labels"], evaluated["labels"])


# --- metrics ---


def test_metrics_equal_their_formulas_batch_by_batch():
    """Mean over pictures of each metric over its measured pixels; batches of any size; a picture without any is left
    out."""
    generator = np.random.default_rng(0)
    depth = generator.uniform(0.5, 9, (5, 8, 8)).astype(np.float32)
    depth[generator.random(depth.shape) < 0.3] = 0
    depth[3] = 0
    predicted = (generator.uniform(0.6, 1.6, depth.shape) * np.where(depth > 0, depth, 1)).astype(np.float32)
    evaluation = train_depth.DepthEvaluation(range(5), None)
    for start, stop in ((0, 2), (2, 5)):
        batch = EvalPrediction(torch.tensor(predicted[start:stop]), torch.tensor(depth[start:stop]))
        found = evaluation(batch, compute_result=stop == 5)
    expected: dict[str, list] = {}
    for p, d in [(p[d > 0], d[d > 0]) for p, d in zip(predicted, depth) if (d > 0).any()]:
        for prefix, q in (("", p), ("median_scaled_", p * np.median(d) / np.median(p))):
            ratio = np.maximum(q / d, d / q)
            values = {"abs_rel": (abs(q - d) / d).mean(), "rmse": ((q - d) ** 2).mean() ** 0.5}
            values["log10"] = abs(np.log10(q) - np.log10(d)).mean()
            values |= {f"delta{k}": (ratio < 1.25**k).mean() for k in (1, 2, 3)}
            for name, value in values.items():
                expected.setdefault(prefix + name, []).append(value)
    assert found == {name: pytest.approx(np.mean(values), rel=1e-5) for name, values in expected.items()}
    assert len(expected["abs_rel"]) == 4
    # The next evaluation starts anew, and keeps maps to draw from one batch to the next.
    again = evaluation(EvalPrediction(torch.tensor(depth), torch.tensor(depth)), compute_result=True)
    assert again["abs_rel"] == 0 and again["delta1"] == 1 and sorted(evaluation.shown) == [0, 1, 2, 3, 4]


def test_predictions_are_compared_at_the_size_of_the_labels():
    evaluation = train_depth.DepthEvaluation(range(1), None)
    batch = EvalPrediction(torch.full((1, 4, 4), 2.0), torch.full((1, 10, 14), 1.0))
    found = evaluation(batch, compute_result=True)
    assert found["abs_rel"] == pytest.approx(1) and found["median_scaled_abs_rel"] == pytest.approx(0, abs=1e-6)
