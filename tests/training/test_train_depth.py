"""The depth recipe: what it leaves, and its parts against formulas that a reader can check."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import train_depth
from datasets import Dataset, DatasetDict
from PIL import Image
from training_runs import results, run_here
from transformers import DPTImageProcessor, EvalPrediction

from data.scenes import SPLITS, render_to_folder
from recipes.arguments import SHIPPED_CHECKPOINT
from recipes.depth import (
    DataArguments,
    DepthEvaluation,
    EvaluationPair,
    ModelArguments,
    TrainingPair,
    load_depth_model,
    load_pairs,
)
from recipes.depth_checks import Checked, check_pairs
from recipes.reading.depth_files import Scale, read_depth
from recipes.reading.depths import MILLIMETRES
from recipes.reading.tables import ROW
from vit_embed import VitEmbedConfig
from vit_embed.saving_vit_embed import CLIP_IMAGE_MEAN, CLIP_IMAGE_STD, image_processor_dict

SIZE = 32
TRAINING = {"do_train": True, "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """16 scenes for training, 2 for validation and 3 for testing, 32 pixels wide, as the script renders them."""
    folder, textures = tmp_path_factory.mktemp("scenes"), tmp_path_factory.mktemp("textures")
    for split in SPLITS:
        for kind in ("images", "depths"):
            (folder / split / kind).mkdir(parents=True)
    render_to_folder(folder, textures, 0, list(range(21)), SIZE)
    return folder


# --- end to end ---


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory) -> Path:
    """A folder after four steps with every option that costs no time."""
    folder = tmp_path_factory.mktemp("trained")
    tiny.vision_config(max_depth=10.0).save_pretrained(folder / "config")
    options = {**TRAINING, "do_eval": True, "do_predict": True, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"save_strategy": "steps", "save_steps": 2, "bf16": True, "gradient_checkpointing": True}
    options |= {"depth_gradient_weight": 0.5, "layer_decay": 0.8, "freeze": "vision_model.embeddings", "hue": 0.5}
    options |= {"deconv_kernel_size": 4, "channels_last": True}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "abs_rel", "per_device_eval_batch_size": 4}
    options |= {"dataset": scenes, "config_name": folder / "config", "output_dir": folder / "run"}
    run_here(train_depth, sheets=True, **options)
    return folder / "run"


def test_training_evaluates_with_metrics_and_pictures(trained):
    assert json.loads((trained / "config.json").read_text())["deconv_kernel_size"] == 4
    for split in ("eval", "test"):
        metrics = results(trained, split)
        for name in ("abs_rel", "rmse", "log10", "delta1", "delta2", "delta3"):
            assert np.isfinite(metrics[name]) and f"median_scaled_{name}" in metrics
        assert metrics["delta1"] <= metrics["delta2"] <= metrics["delta3"] <= 1
    state = json.loads((trained / "trainer_state.json").read_text())
    assert state["best_metric"] == min(entry["eval_abs_rel"] for entry in state["log_history"] if "eval_loss" in entry)
    pictures = sorted(path.name for path in (trained / "pictures").iterdir())
    assert pictures == ["eval-000002.png", "eval-000004.png", "test-000004.png"]
    sheet = Image.open(trained / "pictures" / "test-000004.png").convert("RGB")
    assert sheet.width > 600 and len(sheet.getcolors(2**24)) > 500


def test_a_trained_folder_is_evaluated_elsewhere_as_in_training(trained, scenes, tmp_path):
    options = {"model_name_or_path": trained, "dataset": scenes, "output_dir": tmp_path, "do_predict": True}
    run_here(train_depth, **options, bf16=True)
    again, expected = results(tmp_path, "test"), results(trained, "test")
    for name in ("abs_rel", "median_scaled_delta1", "loss"):
        assert again[name] == pytest.approx(expected[name], rel=1e-6)


def test_a_head_of_another_kernel_is_refused_by_its_flag(trained):
    checkpoint = {"model_name_or_path": str(trained)}
    with pytest.raises(ValueError, match="expected --deconv_kernel_size 4.*got 2; leave the flag out"):
        load_depth_model(ModelArguments(**checkpoint, deconv_kernel_size=2))
    for fine in ({"deconv_kernel_size": 4}, {"depth_head_type": "dpt", "deconv_kernel_size": 2}):
        load_depth_model(ModelArguments(**checkpoint, **fine))


def test_the_shipped_trunk_takes_another_size_and_head():
    options = {"image_size": 64, "depth_head_type": "dpt", "depth_loss": "l1", "max_depth": 8.0}
    model, processor = load_depth_model(ModelArguments(**options))
    assert {name: getattr(model.config, name) for name in options} == options
    assert processor.size == {"height": 64, "width": 64}
    assert model.config.name_or_path == SHIPPED_CHECKPOINT
    assert model.eval()(tiny.pixels(1, 64, 64)).predicted_depth.max() <= 8


# --- data ---


def arguments_for(path: Path | str, **fields) -> DataArguments:
    return DataArguments(dataset=str(path), **fields)


def checked(path: Path, max_depth: float | None = None, **fields) -> Checked:
    """`check_pairs` of the training split of a folder."""
    splits, scale = load_pairs(arguments_for(path, **fields))
    return check_pairs(splits["train"], "train", scale, max_depth)


def scale_of(number: float) -> Scale:
    return Scale(number, number, "--depth_scale")


METRES = np.array([[0.5, 1.0, 2.0, 4.0], [0.0, 3.0, 12.0, 8.0]], dtype=np.float32)


@pytest.mark.parametrize(
    ("suffix", "scale", "stored"),
    [
        (".png", 1000, (METRES * 1000).astype(np.uint16)),
        (".tif", 256, (METRES * 256).astype(np.uint16)),
        (".npy", 1000, METRES.astype(np.float64)[None]),
        (".npy", 1000, (METRES * 1000).astype(np.int32)),
        (".npy", 256, METRES.astype(np.float16)[..., None]),
    ],
)
def test_depths_of_every_format_are_the_same_metres(suffix, scale, stored, tmp_path):
    path = tmp_path / f"depth{suffix}"
    np.save(path, stored) if suffix == ".npy" else Image.fromarray(stored).save(path)
    cell = Image.open(path) if suffix != ".npy" else stored.tolist() if stored.dtype.kind == "f" else stored
    for given in (str(path), cell):
        np.testing.assert_allclose(read_depth(given, scale_of(scale), None), METRES, rtol=1e-3)
    np.testing.assert_allclose(
        read_depth(str(path), scale_of(scale), 10.0), np.where(METRES > 10, 0, METRES), rtol=1e-3
    )


def test_what_is_no_depth_is_zero():
    depth = np.array([[np.nan, np.inf, -np.inf], [-1.0, 0.0, 2.5]])
    assert read_depth(depth, MILLIMETRES, None).tolist() == [[0, 0, 0], [0, 0, 2.5]]
    with pytest.raises(ValueError, match="a depth of 2 channels, which is a picture of depth"):
        read_depth(np.dstack([np.zeros((5, 5)), np.ones((5, 5))]), MILLIMETRES, None)


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
    "noise": (GOOD, b"this is no picture", "an unreadable picture", True),
    "torn": (b"this is no array", "good", "an unreadable depth", True),
    "grey": (np.zeros((16, 24, 3), np.uint8), "good", "a depth of equal channels, one number saved as a colour", True),
    "empty": (np.zeros((16, 24), np.float32), "good", "a depth without a valid pixel", True),
    "infinite": (np.full((16, 24), np.inf), "good", "a depth without a valid pixel", True),
    "turned": (np.ascontiguousarray(GOOD.T), "good", "a depth turned by 90 degrees against its picture", True),
    "cut": (GOOD[:9], "good", "a depth of another shape than its picture", True),
    "far": (GOOD + 80, "good", "no valid pixel within --max_depth 50", True),
    "half": (GOOD[::2, ::2], "good", "a depth of another size than its picture, which is scaled to it", False),
    "millimetres": (GOOD * 1e3, "good", "a median depth outside 0.2 to 200 m", True),
    "whole": (np.round(GOOD), "good", "a depth of nothing but whole numbers of metres", False),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_each_problem_is_named_with_its_file(name, tmp_path, caplog):
    depth, picture, reason, is_dropped = PROBLEMS[name]
    write_pair(tmp_path, "fine", GOOD)
    write_pair(tmp_path, name, depth, picture)
    rows, shape, _ = checked(tmp_path, max_depth=50.0 if name == "far" else None)
    file = f"depths/{name}.npy" if picture is None else f"images/{name}.png"
    assert re.search(f"split train: 1 rows with {reason}.*: \\['{file}'\\]", caplog.text)
    assert sorted(rows[ROW]) == ["images/fine.png"] + [file] * (not is_dropped)
    assert shape == (None if name == "half" else (16, 24))


def test_data_that_is_all_wrong_is_refused_with_what_to_set(tmp_path):
    write_pair(tmp_path / "a", "one", (GOOD * 1000).astype(np.uint16))
    write_pair(tmp_path / "b", "one", None)
    (tmp_path / "c" / "images").mkdir(parents=True)
    shutil.copy(next((tmp_path / "a" / "images").iterdir()), tmp_path / "c" / "images")
    shutil.copytree(tmp_path / "a", tmp_path / "d")
    shutil.copy(tmp_path / "d" / "images" / "one.png", tmp_path / "d" / "images" / "one.jpg")
    for folder, message in (
        (
            "a",
            r"none of 1 are: 1 with a median.*medians of 3e[+]03 to 3e[+]03 m; .*by 1 \(--depth_scale\).*: set --dep",
        ),
        ("b", "lacks a folder depths or depth beside it"),
        ("c", "nearest: folders of pictures and depths .* lacks a folder depths or depth beside it"),
        ("d", "one picture and one depth of the name 'one', found images/one.jpg and images/one.png; remove"),
    ):
        with pytest.raises(ValueError, match=message):
            checked(tmp_path / folder, depth_scale=1)
    with pytest.raises(ValueError, match=r"expected columns \['depth'\] in split 'x'.*--depth_column"):
        check_pairs(Dataset.from_dict({"image": ["a"]}), "x", MILLIMETRES, None)


def test_a_saved_dataset_reads_as_its_files_do(scenes, tmp_path):
    """Columns of pictures as `datasets` keeps them, 16-bit depths among them."""
    pairs = load_pairs(arguments_for(scenes))[0]["test"]
    rows = [{name: Image.open(row[name]) for name in ("image", "depth")} for row in pairs]
    DatasetDict(test=Dataset.from_list(rows)).save_to_disk(tmp_path / "saved")
    saved, scale = load_pairs(arguments_for(tmp_path / "saved"))
    kept, shape, _ = check_pairs(saved["test"], "test", scale, 10.0)
    assert shape == (SIZE, SIZE) and len(kept) == 3
    for pair, row in zip(pairs, kept):
        expected, found = (read_depth(each["depth"], scale, 10.0) for each in (pair, row))
        np.testing.assert_array_equal(found, expected)
        assert expected.max() > 1


def test_rows_of_one_name_are_told_apart(caplog):
    """A column `name` of somebody else's, as of a scene."""
    black, white = (Image.new("L", (24, 16), value) for value in (0, 200))
    rows = Dataset.from_list([{"image": white, "depth": depth, "name": "hall"} for depth in (black, black, white)])
    kept = check_pairs(rows, "x", scale_of(50), None).rows
    assert "2 rows with a depth without a valid pixel: [0, 1]" in caplog.text and len(kept) == 1


def test_depths_that_are_pictures_of_depth_are_named(tmp_path, caplog):
    """A palette PNG holds the numbers of colours; 8 bits reach 0.255 m in millimetres, and 2.5 m with --depth_scale."""
    ramp = np.tile(np.linspace(1, 250, 24, dtype=np.uint8), (16, 1))
    pictures = {"palette": Image.fromarray(ramp).convert("P"), "8bit": Image.fromarray(ramp)}
    for name, picture in pictures.items():
        write_pair(tmp_path, name, None)
        picture.save(tmp_path / "depths" / f"{name}.png")
    with pytest.raises(ValueError, match="none of 2 are: 1 with a depth of 8 bits, at most 0.255 m with --depth_scale"):
        checked(tmp_path)
    assert "a palette PNG for a depth, whose numbers stand for colours: ['images/palette.png']" in caplog.text
    kept = checked(tmp_path, depth_scale=100).rows
    assert kept[ROW][:] == ["images/8bit.png"]
    assert "1 rows with a depth of 8 bits, at most 255 distances: ['images/8bit.png']" in caplog.text


# --- augmentation ---


def pair_that_shows_its_depth(height: int, width: int) -> dict[str, object]:
    """A picture whose red is its depth (1 to 5 m) and whose green is the place in the row."""
    rows, columns = np.mgrid[:height, :width]
    depth = (1 + 4 * (0.7 * columns / width + 0.3 * rows / height)).astype(np.float32)
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 0], picture[..., 1] = np.round(depth * 50), np.round(255 * columns / width)
    return {"image": Image.fromarray(picture), "depth": depth}


def pair_maker(config: VitEmbedConfig, kind: type = TrainingPair, *shape: tuple, **fields) -> TrainingPair:
    processor = DPTImageProcessor(**image_processor_dict(config, "DPTImageProcessor"))
    first = [arguments_for("x", **fields)] if kind is TrainingPair else []
    return kind(*first, MILLIMETRES, config, processor, *shape)


@pytest.mark.parametrize(("shape", "crop"), [((32, 32), 1.0), ((32, 48), 0.5)])
def test_augmentation_keeps_picture_and_depth_aligned(shape, crop):
    """Red over 50 is the depth wherever the pair is cropped and mirrored, but for the zoom, one factor a picture."""
    make = pair_maker(tiny.vision_config(image_size=shape), smallest_crop=crop, mirror=0.5, jitter=0.0)
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
    config, row, made = tiny.vision_config(), pair_that_shows_its_depth(32, 32), []
    for jitter, hue in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5)):
        torch.manual_seed(1)
        made.append(pair_maker(config, smallest_crop=1.0, mirror=0.0, jitter=jitter, hue=hue)(row))
        assert torch.equal(made[0]["labels"], made[-1]["labels"])
    np.testing.assert_array_equal(made[0]["labels"], row["depth"])
    for changed in made[1:]:
        assert (made[0]["pixel_values"] - changed["pixel_values"]).abs().mean() > 0.05
    # Without changes it is what the stock processor makes of the picture.
    evaluated = pair_maker(config, EvaluationPair, (32, 32))(row)
    torch.testing.assert_close(made[0]["pixel_values"], evaluated["pixel_values"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made[0]["labels"], evaluated["labels"])


# --- metrics ---


def test_metrics_equal_their_formulas_batch_by_batch():
    """Mean over pictures of each metric over its measured pixels; a picture without any is left out."""
    generator = np.random.default_rng(0)
    depth = generator.uniform(0.5, 9, (5, 8, 8)).astype(np.float32)
    depth[generator.random(depth.shape) < 0.3] = 0
    depth[3] = 0
    predicted = (generator.uniform(0.6, 1.6, depth.shape) * np.where(depth > 0, depth, 1)).astype(np.float32)
    evaluation = DepthEvaluation(range(5), None)
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
    evaluation = DepthEvaluation(range(1), None)
    batch = EvalPrediction(torch.full((1, 4, 4), 2.0), torch.full((1, 10, 14), 1.0))
    found = evaluation(batch, compute_result=True)
    assert found["abs_rel"] == pytest.approx(1) and found["median_scaled_abs_rel"] == pytest.approx(0, abs=1e-6)
