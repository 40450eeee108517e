"""mteb and DeepSpeed with our classes, each in processes of its own that see the folder `make test-all` installs."""

import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from fresh_process import run_fresh

import vit_embed

REPO = Path(vit_embed.__file__).resolve().parent
ECOSYSTEM = Path(sys.prefix) / "ecosystem"
pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(not ECOSYSTEM.is_dir(), reason=f"there is no {ECOSYSTEM}; `make test-all` installs it"),
]


def accuracies(repo: str) -> dict[str, float]:
    """Of the pictures' names among each other, by a task of mteb and by the model's own features."""
    import mteb
    from datasets import Dataset, DatasetDict, Image
    from mteb.abstasks import AbsTaskZeroShotClassification
    from mteb.abstasks.task_metadata import TaskMetadata
    from PIL import Image as Picture
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoProcessor

    paths = sorted(Path(repo, "examples", "pictures").glob("*.png"))[:60]
    labels = [path.stem.replace("-", " ") for path in paths]

    class Icons(AbsTaskZeroShotClassification):
        metadata = TaskMetadata(
            name="Icons",
            description="Pictures and their names.",
            dataset={"path": "icons", "revision": "1"},
            type="ZeroShotClassification",
            category="i2t",
            modalities=["image", "text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="accuracy",
            **dict.fromkeys(
                ["reference", "date", "domains", "task_subtypes", "license", "annotations_creators", "dialect"]
            ),
            **dict.fromkeys(["sample_creation", "bibtex_citation"]),
        )
        input_column_name, label_column_name = "image", "label"

        def load_data(self, *args, **kwargs):
            rows = Dataset.from_dict({"image": list(map(str, paths)), "label": list(range(len(paths)))})
            self.dataset = DatasetDict(test=rows.cast_column("image", Image(mode="RGB")))
            self.data_loaded = True

        def get_candidate_labels(self):
            return labels

    encoder = mteb.models.SentenceTransformerEncoderWrapper(SentenceTransformer(repo, trust_remote_code=True))
    stated = {"name": "owner/icons", "revision": "1", "modalities": ["image", "text"]}
    encoder.mteb_model_meta = encoder.mteb_model_meta.model_copy(update=stated)
    results = mteb.evaluate(encoder, Icons(), cache=None, encode_kwargs={"batch_size": 16})

    model = AutoModel.from_pretrained(repo, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    pictures = [Picture.open(path).convert("RGB") for path in paths]
    with torch.no_grad():
        logits = model(**processor(text=labels, images=pictures, padding=True, return_tensors="pt")).logits_per_image
    own = (logits.argmax(dim=-1) == torch.arange(len(paths))).float().mean()
    return {"mteb": results.task_results[0].scores["test"][0]["accuracy"], "own": float(own)}


def test_mteb_finds_the_accuracy_of_the_features(tmp_path):
    found = run_fresh(accuracies, tmp_path, repo=str(REPO), environment={"PYTHONPATH": str(ECOSYSTEM)})
    assert found["mteb"] == pytest.approx(found["own"], abs=1e-6)
    assert found["own"] > 0.7  # of 60 names, so chance is 0.02


def train_sharded(rank: int, rates: dict[str, float]) -> dict:
    """{model: what one of two processes sees under ZeRO 3, or its error}; rates: of SGD, by model."""
    import copy

    import deepspeed
    import tiny
    from catalogue import CLASSES

    # Its way through shared memory, which it would compile first: a compiler and two minutes. gloo does.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    config = {
        "train_micro_batch_size_per_gpu": 2,
        # Small parameters are partitioned, too.
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # 1.0 if not given
    }

    def step_alone(model, optimizer, batches):
        """The losses of both batches, and a step on their mean."""
        losses = [model(**batch).loss for batch in batches]
        optimizer.zero_grad()
        (sum(losses) / len(losses)).backward()
        optimizer.step()
        return [loss.item() for loss in losses]

    found = {}
    for name, rate in rates.items():
        if name == "stock CLIP":
            model, inputs = tiny.clip_model(), {"pixel_values": tiny.pixels(), "input_ids": tiny.tokens()}
            inputs["return_loss"] = True
        else:
            model, inputs = CLASSES[name].model(), CLASSES[name].training_inputs()
        batches = [  # rows of each process
            {key: value[rows] if torch.is_tensor(value) else value for key, value in inputs.items()}
            for rows in (slice(0, 2), slice(1, 3))
        ]
        plain = copy.deepcopy(model).train()
        optimizer = torch.optim.SGD(plain.parameters(), lr=rate)
        expected = [step_alone(plain, optimizer, batches)[rank] for _ in range(3)]
        try:
            sgd = {"type": "SGD", "params": {"lr": rate}}
            engine, *_ = deepspeed.initialize(model=model.train(), config={**config, "optimizer": sgd})
            losses = []
            for _ in range(3):
                loss = engine(**batches[rank]).loss
                engine.backward(loss)
                engine.step()
                losses.append(loss.item())
        except RuntimeError as error:
            found[name] = {"error": str(error)}
            continue
        whole = [each for each, parameter in engine.module.named_parameters() if parameter.numel()]
        shares = [(parameter.ds_tensor.numel(), parameter.ds_numel) for parameter in engine.module.parameters()]
        found[name] = {"losses": losses, "expected": expected, "whole": whole, "shares": shares}
    return found


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> list[dict]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("sharded")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    rates = {"classification": 0.01, "depth": 10.0, "contrastive": 0.01, "stock CLIP": 0.01}

    def work(rank: int) -> dict:
        variables = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ECOSYSTEM)}
        return run_fresh(train_sharded, folder / str(rank), environment=variables, rank=rank, rates=rates)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(work, range(2)))


@pytest.mark.parametrize("name", ["classification", "depth"])
def test_two_processes_of_zero_3_train_as_one(name, sharded):
    """The losses before and after each of two steps, of other rows in each process; every parameter is split."""
    for found in (each[name] for each in sharded):
        assert found["losses"] == pytest.approx(found["expected"], rel=1e-4)
        assert abs(found["losses"][2] / found["losses"][0] - 1) > 0.01, "steps that show"
        assert not found["whole"]
        assert found["shares"] and all(share == (size + 1) // 2 for share, size in found["shares"])


def test_zero_3_stops_at_the_logit_scale_of_clip_and_at_ours(sharded):
    """It sends a parameter as bytes, which torch refuses of one without a dimension: so far two towers do not train."""
    for found in sharded:
        error = found["stock CLIP"].get("error", "")
        assert error == found["contrastive"].get("error", ""), "ours does what stock CLIP's does"
        assert "self.dim() cannot be 0 to view Float as Byte" in error, (
            "DeepSpeed takes such parameters: say so in docs"
        )
