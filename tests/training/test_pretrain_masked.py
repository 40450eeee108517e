"""Masked pretraining and the adaptive stem: from a folder of pictures to a folder that loads and can be looked at.

Killed, resumed and shared among processes they are in test_every_recipe.py.
"""

import json
from pathlib import Path

import numpy as np
import pretrain_masked
import pytest
import show_tokens
import tiny
import torch
import train_adaptive
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from training_runs import results, run_here

from recipes.masked import EvaluationPictures, ModelArguments, TrainingPicture, check_pictures
from recipes.models import image_processor_of, load_model
from vit_embed import VitEmbedForDepthEstimation, VitEmbedForImageClassification, VitEmbedForMaskedImageModeling


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of pictures: with transparency, grey, of another shape, and one that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (10, 60, 60, 3), dtype=np.uint8)
    crops = [Image.fromarray(picture) for picture in pixels]
    crops[1].putalpha(100)
    crops[2] = crops[2].convert("L")
    crops[3] = crops[3].crop((0, 0, 60, 40))
    for i, crop in enumerate(crops):
        crop.save(folder / f"{i}.png")
    (folder / "broken.png").write_text("this is no picture")
    return folder


def test_pretraining_leaves_a_trunk_and_pictures_of_what_it_fills_in(photos, tmp_path, caplog):
    tiny.vision_config(**tiny.DECODER).save_pretrained(tmp_path / "new")
    options = {"dataset": photos, "config_name": tmp_path / "new", "output_dir": tmp_path / "run", "mask_ratio": 0.5}
    options |= {"validation_share": 0.3, "do_train": True, "do_eval": True, "eval_strategy": "steps", "eval_steps": 1}
    with caplog.at_level("INFO"):
        run_here(pretrain_masked, **options, max_steps=2, per_device_train_batch_size=4)
    assert "1 rows with an unreadable picture: ['broken.png']" in caplog.text and "are held out" in caplog.text
    assert 0 < results(tmp_path / "run", "eval")["loss"] < 10
    assert VitEmbedForMaskedImageModeling.from_pretrained(tmp_path / "run").config.mask_ratio == 0.5
    VitEmbedForImageClassification.from_pretrained(tmp_path / "run", num_labels=3)
    sheets = sorted((tmp_path / "run" / "pictures").iterdir())
    assert [path.name for path in sheets] == ["eval-000001.png", "eval-000002.png"]
    assert len(Image.open(sheets[0]).convert("RGB").getcolors(2**24)) > 100, "it shows pictures, not blank axes"


def test_16_bits_keep_their_range_and_weights_are_trained_in_float32(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    rows = Dataset.from_dict({"image": [str(tmp_path / "ramp.png")]}, features=Features(image=ImageFeature()))
    pixels = TrainingPicture("image", (64, 64))(check_pictures(rows, "train", "image")[0])["rgb"].float()
    assert abs(pixels.mean() - 127.5) < 1 and pixels.max() > 250
    VitEmbedForMaskedImageModeling(tiny.vision_config(**tiny.DECODER)).half().save_pretrained(tmp_path / "half")
    processor = {"image_processor_type": "CLIPImageProcessor", "size": 32, "crop_size": 32}
    (tmp_path / "half" / "preprocessor_config.json").write_text(json.dumps(processor))
    model = load_model(VitEmbedForMaskedImageModeling, ModelArguments(model_name_or_path=str(tmp_path / "half")))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_every_evaluation_hides_the_same_patches(photos):
    (photos / "broken.png").unlink()
    rows = Dataset.from_dict({"image": list(map(str, sorted(photos.iterdir())))}).cast_column("image", ImageFeature())
    model = VitEmbedForMaskedImageModeling(tiny.vision_config(mask_ratio=0.5))
    judged = EvaluationPictures(rows, "image", image_processor_of(model), model.config)
    first, again = ([judged[row]["bool_masked_pos"] for row in range(10)] for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again))
    assert {int(mask.sum()) for mask in first} == {8} and len({tuple(mask.tolist()) for mask in first}) > 5


def test_an_adaptive_stem_trains_and_its_tokens_are_shown(photos, tmp_path):
    options = {"dataset": photos, "output_dir": tmp_path / "run", "do_train": True, "max_steps": 3}
    run_here(train_adaptive, **options, per_device_train_batch_size=4, logging_steps=1)
    with pytest.raises(ValueError, match="expected --output_dir .*run to be empty"):
        run_here(train_adaptive, **options)
    with pytest.raises(ValueError, match="expected --do_train and neither --do_eval nor --do_predict"):
        run_here(train_adaptive, dataset=photos, output_dir=tmp_path / "other", do_eval=True)
    model = VitEmbedForDepthEstimation.from_pretrained(tmp_path / "run")
    assert model.config.stem_type == "adaptive" and model.config.adaptive_budget_weight == 0.5
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert all(0 < entry["grad_norm"] < 1e4 for entry in history if "grad_norm" in entry)
    asked = ["--pictures", photos / "0.png", "--adaptive", tmp_path / "run", "--output", tmp_path / "sheet.png"]
    show_tokens.main(list(map(str, asked)))
    assert len(Image.open(tmp_path / "sheet.png").convert("RGB").getcolors(2**24)) > 20
