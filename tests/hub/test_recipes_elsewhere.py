"""What the training recipes leave, written here, is read by the other release of transformers that CI tests."""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
import torch
import transformers
from fresh_process import auto_load, outputs, run_fresh
from PIL import Image
from training_runs import run_here

import vit_embed

REPO = Path(vit_embed.__file__).resolve().parent
OTHER_PYTHON = os.environ.get("VIT_EMBED_OTHER_PYTHON") or str(REPO / ".venv-4.57" / "bin" / "python")
# The recipes are written for the newest releases.
pytestmark = [
    pytest.mark.skipif(not os.path.exists(OTHER_PYTHON), reason=f"there is no {OTHER_PYTHON}; make test-4.57 makes it"),
    pytest.mark.skipif(transformers.__version__ < "5", reason="the recipes need transformers 5"),
]


class Recipe(NamedTuple):
    """A recipe, and how its result is read.

    data: which of `write_data`. reader: a pipeline's task, or an Auto class where there is none. model_class: of the
    result. fields: of the tiny config; None for a recipe that makes its own. options: more of the command line.
    """

    data: str
    reader: str
    model_class: str
    fields: dict[str, Any] | None
    options: dict[str, Any] = {}


# The shipped tokenizer's vocabulary.
TOKENS = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
TEXT = {**tiny.TEXT, **{key: json.loads((REPO / "config.json").read_text())["text_config"][key] for key in TOKENS}}
RECIPES = {
    "train_classification": Recipe("labelled", "image-classification", "VitEmbedForImageClassification", {}),
    "train_depth": Recipe("pairs", "depth-estimation", "VitEmbedForDepthEstimation", {"max_depth": 10.0}),
    "train_adaptive": Recipe("labelled", "depth-estimation", "VitEmbedForDepthEstimation", None),
    "pretrain_masked": Recipe(
        "labelled", "AutoModelForMaskedImageModeling", "VitEmbedForMaskedImageModeling", tiny.DECODER
    ),
    "train_contrastive": Recipe(
        "captioned",
        "zero-shot-image-classification",
        "VitEmbedForContrastive",
        {"text_config": TEXT},
        {"tokenizer_name": REPO, "caption_column": "text"},
    ),
}


def write_data(folder: Path) -> None:
    """Eight pictures three times: with a label each, with their depth, and with a caption."""
    random = np.random.default_rng(0)
    captions = []
    for number in range(8):
        picture = Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8))
        for place in (f"labelled/train/{number % 3}", "pairs/train/images", "captioned/train"):
            (folder / place).mkdir(parents=True, exist_ok=True)
            picture.save(folder / place / f"{number}.png")
        (folder / "pairs/train/depths").mkdir(exist_ok=True)
        np.save(folder / f"pairs/train/depths/{number}.npy", random.uniform(1.2, 4, (40, 40)).astype(np.float32))
        captions.append(json.dumps({"file_name": f"{number}.png", "text": f"picture {number}"}))
    (folder / "captioned/train/metadata.jsonl").write_text("\n".join(captions))


def read(results: dict, picture: str) -> dict:
    """{recipe: [class, numbers]} of what each folder's own code says of a picture."""
    found = {"version": transformers.__version__, "package_imported": "vit_embed" in sys.modules}
    for recipe, (folder, reader) in results.items():
        if reader.startswith("Auto"):
            model = auto_load(reader, folder)
            generator = torch.Generator().manual_seed(0)
            inputs = {
                "pixel_values": torch.randn(1, 3, 32, 32, generator=generator),
                "bool_masked_pos": torch.arange(16)[None] % 4 > 0,
            }
            numbers = torch.cat([tensor.float().flatten() for tensor in outputs(model, inputs)])
        else:
            ask = transformers.pipeline(reader, model=folder, trust_remote_code=True)
            model, options = ask.model, {}
            if reader.startswith("zero-shot"):
                options["candidate_labels"] = ["rocket", "carrot", "a red apple"]
            answer = ask(picture, **options)
            if reader == "depth-estimation":
                numbers = answer["predicted_depth"].flatten()
            else:
                numbers = torch.tensor([each["score"] for each in sorted(answer, key=lambda each: each["label"])])
        found[recipe] = [type(model).__name__, numbers.tolist()]
    return found


@pytest.fixture(scope="module")
def here_and_there(tmp_path_factory) -> tuple[dict, dict]:
    """What this process and one of the other release read in the folder that each recipe leaves after two steps."""
    folder = tmp_path_factory.mktemp("recipes")
    write_data(folder)
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPO / "examples"))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        for name, recipe in RECIPES.items():
            options = {"dataset": folder / recipe.data, "output_dir": folder / name, **recipe.options}
            if recipe.fields is not None:
                tiny.vision_config(**recipe.fields).save_pretrained(folder / f"{name}-config")
                options["config_name"] = folder / f"{name}-config"
            run = {"do_train": True, "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
            run_here(importlib.import_module(name), **options, **run)
            results[name] = [str(folder / name), recipe.reader]
    picture = str(folder / "picture.png")
    Image.open(REPO / "examples" / "pictures" / "rocket.png").convert("RGB").resize((80, 60)).save(picture)
    there = run_fresh(read, folder / "home", python=OTHER_PYTHON, results=results, picture=picture)
    return read(results, picture), there


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_other_release_reads_the_same(recipe, here_and_there):
    here, there = here_and_there
    assert there["version"] != here["version"] and not there["package_imported"]
    assert there[recipe][0] == here[recipe][0] == RECIPES[recipe].model_class
    found, expected = torch.tensor(there[recipe][1]), torch.tensor(here[recipe][1])
    assert expected.std() > 1e-4, "an answer that says something"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
