"""The depth recipe: what it leaves, and its parts against formulas that a reader can check."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import train_depth
from datasets import Dataset
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
)
from recipes.depth_checks import check_pairs
from recipes.reading.depth_files import Scale, read_depth
from recipes.reading.depths import MILLIMETRES
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


def scale_of(number: float) -> Scale:
    return Scale(number, number, "--depth_scale")


def test_what_is_no_depth_is_zero():
    depth = np.array([[np.nan, np.inf, -np.inf], [-1.0, 0.0, 2.5]])
    assert read_depth(depth, MILLIMETRES, None).tolist() == [[0, 0, 0], [0, 0, 2.5]]
    assert not read_depth(depth, MILLIMETRES, 2.0).any(), "beyond the largest depth"
    with pytest.raises(ValueError, match="a depth of 2 channels, which is a picture of depth"):
        read_depth(np.dstack([np.zeros((5, 5)), np.ones((5, 5))]), MILLIMETRES, None)


def test_rows_of_one_name_are_told_apart(caplog):
    """A column `name` of somebody else's, as of a scene."""
    black, white = (Image.new("L", (24, 16), value) for value in (0, 200))
    rows = Dataset.from_list([{"image": white, "depth": depth, "name": "hall"} for depth in (black, black, white)])
    kept = check_pairs(rows, "x", scale_of(50), None).rows
    assert "2 rows with a depth without a valid pixel: [0, 1]" in caplog.text and len(kept) == 1


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
