"""The scripts that pretrain by masking and that show tokens, run as a user runs them, on little."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pictures
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from tiny import vision_config

from vit_embed import (
    VitEmbedForDepthEstimation,
    VitEmbedForImageClassification,
    VitEmbedForMaskedImageModeling,
    VitEmbedModel,
)

pytest.importorskip("kornia", reason="the training scripts vary pictures by kornia")

REPO = Path(__file__).parent.parent
DECODER = {
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 3,
    "decoder_intermediate_size": 24,
}


def run(script: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPO / "examples" / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def colours(path: Path) -> int:
    return len(Image.open(path).convert("RGB").getcolors(2**24))


@pytest.fixture
def photos(tmp_path) -> list[Path]:
    """Crops of two photos as files in a folder `photos`: one with transparency, one grey, one of another shape."""
    folder = tmp_path / "photos"
    folder.mkdir()
    crops = [crop for name in ("astronaut", "flower") for crop in pictures.crops(name, 5, size=60)]
    crops[1].putalpha(100)
    crops[2] = crops[2].convert("L")
    crops[3] = crops[3].crop((0, 0, 60, 40))
    for i, crop in enumerate(crops):
        crop.save(folder / f"{i}.png")
    return sorted(folder.iterdir())


def test_pretraining_end_to_end(photos, tmp_path, monkeypatch):
    """A folder of pictures -> two steps -> a folder whose trunk loads, the loss, pictures of it, and a step more."""
    (photos[0].parent / "broken.png").write_text("this is no picture")
    vision_config(**DECODER).save_pretrained(tmp_path / "new")
    arguments = ["--dataset", photos[0].parent, "--config_name", "new", "--output_dir", "run", "--mask_ratio", 0.5]
    arguments += ["--validation_share", 0.3, "--do_train", "--do_eval", "--eval_strategy", "steps", "--eval_steps", 1]
    arguments += ["--save_steps", 1, "--per_device_train_batch_size", 4, "--use_cpu", "--report_to", "none"]
    ran = run("pretrain_masked.py", *arguments, "--max_steps", 2, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "rows with unreadable picture: [" in ran.stderr and "held out" in ran.stderr
    first = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert 0 < first["eval_loss"] < 10
    assert VitEmbedForMaskedImageModeling.from_pretrained(tmp_path / "run").config.mask_ratio == 0.5
    VitEmbedForImageClassification.from_pretrained(tmp_path / "run", num_labels=3)
    sheets = sorted(path.name for path in (tmp_path / "run" / "reconstructions").iterdir())
    assert sheets == ["step-000001.png", "step-000002.png"]
    assert colours(tmp_path / "run" / "reconstructions" / sheets[0]) > 100, "it shows pictures, not blank axes"

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(REPO / "examples")
    import pretrain_masked

    arguments = ["pretrain_masked.py", *map(str, arguments), "--max_steps", "3"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(ValueError, match="--resume_from_checkpoint"):
        pretrain_masked.main()
    (tmp_path / "run" / "checkpoint-9").mkdir()  # a kill while it was saved
    monkeypatch.setattr(sys, "argv", [*arguments, "--resume_from_checkpoint", "True"])
    pretrain_masked.main()
    state = json.loads((tmp_path / "run" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3 and [entry["step"] for entry in state["log_history"]][0] == 1
    assert (tmp_path / "run" / "reconstructions" / "step-000003.png").exists()


def test_pretraining_takes_what_a_folder_of_pictures_may_hold(tmp_path, monkeypatch):
    """16 bits of grey keep their range, damaged pictures are left out, weights are trained in float32."""
    monkeypatch.syspath_prepend(REPO / "examples")
    import pretrain_masked

    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    content = bytearray((tmp_path / "cut.png").read_bytes())
    second = content.index(b"IDAT", content.index(b"IDAT") + 1)
    content[second : second + 4] = bytes(4)
    (tmp_path / "cut.png").write_bytes(content)
    rows = Dataset.from_dict(
        {"image": [str(tmp_path / "cut.png"), str(tmp_path / "ramp.png")]}, features=Features(image=ImageFeature())
    )
    kept = pretrain_masked.readable_rows(rows, "train", pretrain_masked.DataArguments(dataset="x"))
    assert len(kept) == 1
    pixels = pretrain_masked.TrainingPictures(kept, "image", (64, 64))[0]["rgb"].float()
    assert abs(pixels.mean() - 127.5) < 1 and pixels.max() > 250

    VitEmbedForMaskedImageModeling(vision_config(**DECODER)).half().save_pretrained(tmp_path / "half")
    processor = {"image_processor_type": "CLIPImageProcessor", "size": 32, "crop_size": 32}
    (tmp_path / "half" / "preprocessor_config.json").write_text(json.dumps(processor))
    arguments = pretrain_masked.ModelArguments(model_name_or_path=str(tmp_path / "half"))
    model, _ = pretrain_masked.load_model(arguments)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_training_an_adaptive_stem_end_to_end(photos, tmp_path):
    """A folder of pictures -> steps of a dense task -> a folder whose tokens can be shown."""
    arguments = ["--dataset", photos[0].parent, "--output_dir", "run", "--do_train", "--max_steps", 3, "--use_cpu"]
    arguments += ["--per_device_train_batch_size", 4, "--logging_steps", 1, "--report_to", "none"]
    ran = run("train_adaptive.py", *arguments, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    for given, message in (
        (arguments, "expected --output_dir run to be empty"),
        (["--dataset", photos[0].parent, "--output_dir", "other", "--do_eval"], "expected --do_train and neither"),
    ):
        refused = run("train_adaptive.py", *given, cwd=tmp_path)
        assert refused.returncode != 0 and message in refused.stderr
    (tmp_path / "run" / "checkpoint-9").mkdir()  # a kill while it was saved
    ran = run("train_adaptive.py", *arguments, "--max_steps", 4, "--resume_from_checkpoint", True, cwd=tmp_path)
    assert ran.returncode == 0 and (tmp_path / "run" / "checkpoint-4").exists(), ran.stderr[-3000:]
    model = VitEmbedForDepthEstimation.from_pretrained(tmp_path / "run")
    assert model.config.stem_type == "adaptive" and model.config.adaptive_budget_weight == 0.5
    history = json.loads((tmp_path / "run" / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    assert all(0 < entry["grad_norm"] < 1e4 for entry in history if "grad_norm" in entry)
    ran = run("show_tokens.py", "--pictures", photos[0], "--adaptive", "run", "--output", "sheet.png", cwd=tmp_path)
    assert ran.returncode == 0 and colours(tmp_path / "sheet.png") > 20, ran.stderr[-3000:]


@pytest.fixture
def checkpoints(tmp_path) -> dict[str, Path]:
    """A small model of each kind that the sheet shows."""
    made = {
        "adaptive": VitEmbedModel(vision_config(stem_type="adaptive")),
        "merged": VitEmbedModel(vision_config(image_size=(32, 24))),
        "masked": VitEmbedForMaskedImageModeling(vision_config(**DECODER)),
        "attended": VitEmbedModel(vision_config()),
    }
    for kind, model in made.items():
        model.save_pretrained(tmp_path / kind)
    return {kind: tmp_path / kind for kind in made}


def test_the_sheet_of_tokens(photos, checkpoints, tmp_path):
    arguments = [part for kind, folder in checkpoints.items() for part in (f"--{kind}", folder)]
    arguments += [
        "--adaptive_size",
        48,
        64,
        "--merged_size",
        64,
        "--token_merge_size",
        3,
        "--mask_ratio",
        0.6,
        "--output",
        "new/sheet.png",
    ]
    ran = run("show_tokens.py", "--pictures", *photos[:4], *arguments, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "4 pictures shown" in ran.stderr
    sheet = Image.open(tmp_path / "new" / "sheet.png")
    assert sheet.width > 1400 and sheet.height > 700 and colours(tmp_path / "new" / "sheet.png") > 100, (
        "it shows pictures, not blank axes"
    )
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sheet.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a checkpoint with --adaptive, --merged, --masked or --attended"),
        (["--adaptive", "merged"], "--adaptive must have stem_type='adaptive', merged has 'conv'"),
        (["--merged", "merged", "--token_merge_size", "7"], "at most half of the 12 patch tokens, got 7"),
        (["--merged", "merged", "--merged_size", "8", "8", "8"], "one number or height and width"),
    ],
)
def test_what_cannot_be_shown_is_refused(arguments, message, photos, checkpoints, monkeypatch, capsys):
    monkeypatch.chdir(checkpoints["merged"].parent)
    monkeypatch.syspath_prepend(REPO / "examples")
    import show_tokens

    with pytest.raises((ValueError, SystemExit)) as refusal:
        show_tokens.main(["--pictures", str(photos[0]), *arguments])
    assert message in capsys.readouterr().err + str(refusal.value)


def test_principal_colours_tell_like_from_unlike(monkeypatch):
    monkeypatch.syspath_prepend(REPO / "examples")
    from show_tokens import principal_colours

    patches = 0.01 * torch.randn(2, 4, 6, 32, generator=torch.Generator().manual_seed(0))
    patches[0, :2] += 5  # half of one picture is another thing
    coloured = principal_colours(patches)
    assert coloured.shape == (2, 4, 6, 3) and coloured.min() >= 0 and coloured.max() <= 1
    thing, rest = coloured[0, :2, :, 0].flatten(), torch.cat([coloured[0, 2:, :, 0], coloured[1, :, :, 0]]).flatten()
    assert (thing.mean() - rest.mean()).abs() > 0.9 and thing.std() < 0.1 and rest.std() < 0.1
