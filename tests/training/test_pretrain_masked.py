"""Masked pretraining and the adaptive stem: from a folder of pictures to a folder that loads and can be looked at."""

import json

import pretrain_masked
import pytest
import show_tokens
import tiny
import torch
import train_adaptive
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from training_runs import results, run_here

from recipes.masked import evaluation_rows
from recipes.models import image_processor_of
from vit_embed import VitEmbedForDepthEstimation, VitEmbedForImageClassification, VitEmbedForMaskedImageModeling


def test_pretraining_leaves_a_trunk_and_pictures_of_what_it_fills_in(photos, tmp_path, caplog):
    tiny.vision_config(**tiny.DECODER).save_pretrained(tmp_path / "new")
    (photos / "broken.png").write_text("this is no picture")
    options = {"dataset": photos, "config_name": tmp_path / "new", "output_dir": tmp_path / "run", "mask_ratio": 0.5}
    options |= {"validation_share": 0.3, "do_train": True, "do_eval": True}
    with caplog.at_level("INFO"):
        run_here(pretrain_masked, sheets=True, **options, max_steps=1, per_device_train_batch_size=4)
    assert "1 rows with an unreadable picture: ['broken.png']" in caplog.text and "are held out" in caplog.text
    assert 0 < results(tmp_path / "run", "eval")["loss"] < 10
    assert VitEmbedForMaskedImageModeling.from_pretrained(tmp_path / "run").config.mask_ratio == 0.5
    VitEmbedForImageClassification.from_pretrained(tmp_path / "run", num_labels=3)
    (sheet,) = (tmp_path / "run" / "pictures").iterdir()
    assert sheet.name == "eval-000001.png"
    assert len(Image.open(sheet).convert("RGB").getcolors(2**24)) > 100, "it shows pictures, not blank axes"


def test_every_evaluation_hides_the_same_patches(photos):
    rows = Dataset.from_dict({"image": list(map(str, sorted(photos.iterdir())))}).cast_column("image", ImageFeature())
    model = VitEmbedForMaskedImageModeling(tiny.vision_config(mask_ratio=0.5))
    judged = evaluation_rows(rows, image_processor_of(model), model.config, seed=0)
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
