"""Push and pull over HTTP, against a Hub on loopback: every class, revisions, a private repo, refusals, Trainer."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import loopback_hub
import pytest
import tiny
import torch
import transformers
from fresh_process import auto_load, digests, run_fresh
from loopback_hub import TOKEN
from test_loading import CLASSIFICATION, DEPTH, MASKED, MODEL_CODE, OTHER_PYTHON, part_of
from tiny_tokenizer import TOKENIZER_FILES, write_tokenizer

import vit_embed
from vit_embed.configuration_vit_embed import AUTO_MAP, TEXT_AUTO_MAP

# repo -> (class, Auto class that pulls it, its config)
REPOS = {
    "model": (vit_embed.VitEmbedModel, "AutoModel", tiny.vision_config(num_register_tokens=2)),
    "projection": (vit_embed.VitEmbedModelWithProjection, "AutoModel", tiny.vision_config()),
    "classification": (vit_embed.VitEmbedForImageClassification, CLASSIFICATION, tiny.vision_config(num_labels=5)),
    "depth": (vit_embed.VitEmbedForDepthEstimation, DEPTH, tiny.vision_config(depth_head_type="dpt")),
    "masked": (vit_embed.VitEmbedForMaskedImageModeling, MASKED, tiny.vision_config()),
    "dual": (vit_embed.VitEmbedForContrastive, "AutoModel", tiny.dual_config()),
    "backbone": (vit_embed.VitEmbedBackbone, "AutoBackbone", tiny.vision_config(out_indices=[2, 4])),
    "text": (vit_embed.VitEmbedTextModel, "AutoModel", tiny.dual_config().text_config),
    "text-projection": (vit_embed.VitEmbedTextModelWithProjection, "AutoModel", tiny.dual_config().text_config),
}
WITH_TEXTS = {"dual", "text", "text-projection"}
WITH_IMAGES = REPOS.keys() - {"text", "text-projection"}
# Repos whose card tells `pipeline(model=name)` what to do.
PIPELINES = ("model", "projection", "classification", "depth", "dual", "text")


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[dict[str, str]]:
    with loopback_hub.started(tmp_path_factory.mktemp("hub")) as environment:
        yield environment


def push(repos: dict, token: str) -> dict:
    """Pushes a folder of each class; other weights on top of "model", whose first state gets a tag; a private repo."""
    from huggingface_hub import HfApi
    from peft import LoraConfig, get_peft_model

    import vit_embed

    api, result = HfApi(token=token), {}
    for repo, (class_name, folder) in repos.items():
        model = getattr(vit_embed, class_name).from_pretrained(folder)
        commit = model.push_to_hub(f"alice/{repo}", token=token)
        result[repo] = {"commit": commit.oid, "files": api.list_repo_files(f"alice/{repo}")}

    api.create_tag("alice/model", tag="v1.0")
    model = vit_embed.VitEmbedModel.from_pretrained(repos["model"][1])
    with torch.no_grad():
        model.post_layernorm.weight.mul_(2)
    result["model"]["commit_2"] = model.push_to_hub("alice/model", token=token).oid
    result["model"]["digests_2"] = digests(model)
    model.push_to_hub("alice/secret", token=token, private=True)

    dual = vit_embed.VitEmbedForContrastive.from_pretrained(repos["dual"][1])
    dual.save_pretrained("saved-and-pushed", push_to_hub=True, repo_id="alice/at-once", token=token)
    result["dual"]["files_of_save"] = api.list_repo_files("alice/at-once")
    adapter = LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    adapted = get_peft_model(dual, adapter).eval()
    adapted.push_to_hub("alice/adapter", token=token)
    with torch.no_grad():
        result["dual"]["adapted"] = adapted.get_image_features(torch.ones(1, 3, 32, 32)).tolist()
    return result


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory) -> dict[str, dict]:
    """What was pushed: per repo the folder it came from, the digests of its weights, its files and commits."""
    root, repos, result = tmp_path_factory.mktemp("pushed"), {}, {}
    for repo, (model_class, _, config) in REPOS.items():
        model = tiny.randomised(model_class(config))
        model.save_pretrained(root / repo)
        repos[repo] = [model_class.__name__, str(root / repo)]
        result[repo] = {"folder": root / repo, "digests": digests(model)}
    for repo in WITH_TEXTS:
        write_tokenizer(root / repo)
    (root / "dual" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n\nA card of another repository.\n")
    (root / "dual" / "NOTICE").write_text("Drawings by somebody.\n")
    found = run_fresh(push, root / "home", environment=hub, repos=repos, token=TOKEN)
    return {repo: {**result[repo], **found[repo]} for repo in REPOS}


@pytest.mark.parametrize("repo", REPOS)
def test_pushed_repo_is_complete(pushed, repo):
    files = set(pushed[repo]["files"])
    assert files >= {"README.md", "config.json", "model.safetensors"} | MODEL_CODE
    assert ("preprocessor_config.json" in files) == (repo in WITH_IMAGES)
    assert (files >= TOKENIZER_FILES) == (repo in WITH_TEXTS)
    assert ("NOTICE" in files) == (repo == "dual"), "the licence goes with the weights"


def test_saving_with_push_to_hub_pushes_as_much(pushed):
    """transformers' own path uploads only what changed after the processor's files were written."""
    assert set(pushed["dual"]["files_of_save"]) >= set(pushed["dual"]["files"])


def push_over(model: str, token: str) -> dict:
    """Pushes a model in two ways into a repository that has a processor, a licence and a card of its own."""
    from huggingface_hub import HfApi

    from vit_embed import VitEmbedForImageClassification

    api, names = HfApi(token=token), ("LICENSE", "modules.json", "README.md", "preprocessor_config.json")
    api.create_repo("alice/mine")
    processor = transformers.ViTImageProcessor(image_mean=[0.5] * 3, size={"height": 32, "width": 32})
    processor.push_to_hub("alice/mine", token=token)
    for name in names[:3]:
        api.upload_file(path_or_fileobj=b"[]", path_in_repo=name, repo_id="alice/mine")
    Path("here").mkdir()
    Path("here/README.md").write_text("The card of the folder.")
    model, result = VitEmbedForImageClassification.from_pretrained(model), {}
    model.push_to_hub("alice/mine", token=token)
    result["push"] = {name: Path(api.hf_hub_download("alice/mine", name)).read_text() for name in names}
    model.save_pretrained("here", push_to_hub=True, repo_id="alice/mine", token=token)
    result["save"] = {name: Path(api.hf_hub_download("alice/mine", name)).read_text() for name in names}
    return {**result, "files": api.list_repo_files("alice/mine")}


def test_what_a_repository_has_stays(hub, pushed, tmp_path):
    folder = str(pushed["classification"]["folder"])
    found = run_fresh(push_over, tmp_path, environment=hub, model=folder, token=TOKEN)
    assert "model.safetensors" in found["files"] and "sentence_bert_config.json" not in found["files"]
    for how in ("push", "save"):
        processor = json.loads(found[how].pop("preprocessor_config.json"))
        assert processor["image_processor_type"].startswith("ViTImageProcessor")
        assert processor["image_mean"] == [0.5] * 3
        assert set(found[how].values()) == {"[]"}, how


def pull(repos: dict, pipelines: list, revisions: dict, target: str) -> dict:
    """Loads every repo by its name, saves it, and reads cards, processors and revisions."""
    from huggingface_hub import ModelCard, snapshot_download
    from PIL import Image
    from transformers import AutoImageProcessor, AutoProcessor, pipeline

    models, cards, answers = {}, {}, {}
    for repo, auto_class in repos.items():
        name = f"alice/{repo}"
        model, info = auto_load(auto_class, name, output_loading_info=True)
        model.save_pretrained(os.path.join(target, repo))
        models[repo] = {"class": type(model).__name__, "digests": digests(model), "clean": not any(info.values())}
        cards[repo] = ModelCard.load(name).content
        if hasattr(model.config, "image_size"):
            models[repo]["image_processor"] = type(AutoImageProcessor.from_pretrained(name)).__name__
    Image.new("RGB", (40, 30), "red").save("picture.png")
    for repo in pipelines:
        given, options = "a cat" if repo == "text" else "picture.png", {}
        if repo == "dual":
            options = {"candidate_labels": ["cat", "rocket"]}
        found = pipeline(model=f"alice/{repo}", trust_remote_code=True)(given, **options)
        answers[repo] = list(found["predicted_depth"].shape) if repo == "depth" else found
    result = {"models": models, "cards": cards, "pipelines": answers}
    result["revisions"] = {
        name: digests(auto_load("AutoModel", "alice/model", revision=revision)) for name, revision in revisions.items()
    }
    result["processor"] = type(AutoProcessor.from_pretrained("alice/dual")).__name__
    result["zero_shot"] = digests(auto_load("AutoModelForZeroShotImageClassification", "alice/dual"))
    result["resized"] = digests(auto_load("AutoModel", "alice/dual", image_size=48))
    result["imported"] = "vit_embed" in sys.modules
    snapshot_download("alice/adapter")

    from vit_embed import VitEmbedTextModel

    result["text"] = {name: digests(VitEmbedTextModel.from_pretrained(f"alice/{name}")) for name in ("text", "dual")}
    return result


@pytest.fixture(scope="module")
def pulled(hub, pushed, tmp_path_factory) -> dict:
    """What a process with an empty cache got, and where it saved it."""
    root = tmp_path_factory.mktemp("pulled")
    sent = {
        "repos": {repo: auto_class for repo, (_, auto_class, _) in REPOS.items()},
        "pipelines": PIPELINES,
        "revisions": {"tag": "v1.0", "first": pushed["model"]["commit"], "second": pushed["model"]["commit_2"]},
        "target": str(root / "saved"),
    }
    result = run_fresh(pull, root / "home", environment=hub, **sent)
    return {**result, "saved": root / "saved", "home": root / "home"}


def test_the_card_is_of_this_model(pulled):
    """Task, licence of the source and sizes; what nobody has stated is not made up."""
    card = pulled["cards"]["dual"]
    assert "pipeline_tag: zero-shot-image-classification" in card and "license: cc-by-4.0" in card
    assert "| width | 32 | 24 |" in card and 'AutoModel.from_pretrained("alice/dual"' in card
    assert "Training data and results are not stated here." in card and "unknown dataset" not in card
    assert "license" not in pulled["cards"]["depth"].partition("\n---")[0]
    for repo, text in pulled["cards"].items():
        assert f"`{REPOS[repo][0].__name__}` of vit_embed" in text and "More Information Needed" not in text
        assert "library_name: transformers" in text


def test_a_pipeline_takes_its_task_from_the_card(pulled):
    answers = pulled["pipelines"]
    assert sorted(entry["label"] for entry in answers["dual"]) == ["cat", "rocket"]
    assert len(answers["classification"]) == 5 and answers["depth"] == [30, 40]
    assert [len(answers["model"][0]), len(answers["projection"][0]), len(answers["text"][0])] == [1 + 2 + 16, 20, 4]


def test_every_class_is_pulled_by_name(pushed, pulled):
    assert not pulled["imported"]
    for repo, loaded in pulled["models"].items():
        assert loaded["class"] == REPOS[repo][0].__name__ and loaded["clean"]
        if repo in WITH_IMAGES:
            processor = "DPTImageProcessor" if repo == "depth" else "CLIPImageProcessor"
            # Without torchvision transformers 5 loads the same file as its PIL variant.
            assert loaded["image_processor"].startswith(processor)
        assert loaded["digests"] == pushed[repo].get("digests_2", pushed[repo]["digests"]), "the newest"
    dual = pushed["dual"]["digests"]
    assert pulled["processor"] == "CLIPProcessor" and pulled["zero_shot"] == dual
    assert pulled["text"] == {"text": pushed["text"]["digests"], "dual": part_of(dual, "text_model.")}
    resized = vit_embed.VitEmbedForContrastive.from_pretrained(pushed["dual"]["folder"], image_size=48)
    assert pulled["resized"] == digests(resized)


def test_revisions(pushed, pulled):
    first, second = pushed["model"]["digests"], pushed["model"]["digests_2"]
    assert first != second and pulled["revisions"] == {"tag": first, "first": first, "second": second}


def test_pulled_and_saved_folder_keeps_everything(pushed, pulled):
    """Code, the whole auto_map without the repo's name, and processor and tokenizer out of the repo."""
    for repo, loaded in pulled["models"].items():
        folder, original = pulled["saved"] / repo, pushed[repo]["folder"]
        files = {path.name for path in folder.iterdir()}
        assert files >= MODEL_CODE | {"config.json", "model.safetensors"}
        assert ("preprocessor_config.json" in files) == (repo in WITH_IMAGES)
        assert (files >= TOKENIZER_FILES) == (repo in WITH_TEXTS)
        for file in files & (MODEL_CODE | TOKENIZER_FILES | {"preprocessor_config.json"}):
            assert (folder / file).read_bytes() == (original / file).read_bytes(), f"{repo}/{file}"
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        assert auto_map == (AUTO_MAP if repo in WITH_IMAGES else TEXT_AUTO_MAP)
        assert digests(REPOS[repo][0].from_pretrained(folder)) == loaded["digests"]


def answer_offline() -> dict:
    """What a cache that was filled by another release gives without a network."""
    from peft import PeftModel
    from PIL import Image
    from transformers import pipeline
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    picture, ones = Image.new("RGB", (40, 30), "red"), torch.ones(1, 3, 32, 32)
    classify = pipeline("zero-shot-image-classification", model="alice/dual", trust_remote_code=True)
    result = {"labels": [entry["label"] for entry in classify(picture, candidate_labels=["cat", "rocket"])]}
    # AutoBackbone of transformers 5.23 asks the Hub whether there is such a repository, of stock backbones too.
    backbone = get_class_from_dynamic_module("modeling_vit_embed.VitEmbedBackbone", "alice/backbone")
    result["maps"] = len(backbone.from_pretrained("alice/backbone")(ones).feature_maps)
    adapted = PeftModel.from_pretrained(auto_load("AutoModel", "alice/dual"), "alice/adapter").eval()
    with torch.no_grad():
        result["adapted"] = adapted.get_image_features(ones).tolist()
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        result["sentence"] = None
    else:
        encoder = SentenceTransformer("alice/dual", trust_remote_code=True, device="cpu")
        result["sentence"] = [list(encoder.encode([given]).shape) for given in (picture, "cat")]
    result["imported"] = "vit_embed" in sys.modules
    return result


def test_another_release_answers_from_the_cache_without_a_network(pushed, pulled):
    """Where there is one (`make test-4.57`), else the same release. As in transformers, names are pulled first."""
    found = run_fresh(answer_offline, pulled["home"], python=OTHER_PYTHON or sys.executable)
    assert not found["imported"]
    assert sorted(found["labels"]) == ["cat", "rocket"] and found["maps"] == 2
    torch.testing.assert_close(torch.tensor(found["adapted"]), torch.tensor(pushed["dual"]["adapted"]))
    assert found["sentence"] in (None, [[1, 20], [1, 20]])


def refused(token: str) -> dict:
    """Asks for what must not be given: remote code without trust, a private repo without a token."""
    result, home = {}, os.environ["HF_HOME"]
    for name, options in {"silent": {}, "false": {"trust_remote_code": False}}.items():
        try:
            transformers.AutoModel.from_pretrained("alice/model", **options)
        except ValueError as error:
            result[name] = str(error)
    result["code"] = [path.name for path in Path(home).rglob("*_vit_embed.py")]
    result["code"] += [name for name in sys.modules if name.endswith("_vit_embed")]
    for name, wrong in {"anonymous": None, "wrong_token": "hf_mallory"}.items():
        try:
            auto_load("AutoModel", "alice/secret", token=wrong)
        except OSError as error:
            result[name] = str(error)
    model = auto_load("AutoModel", "alice/secret", token=token)
    result["secret"] = digests(model)
    result["fetched"] = os.listdir(model._processor_folder)  # with the token, too
    model.save_pretrained(os.path.join(home, "saved"))
    result["saved"] = os.listdir(os.path.join(home, "saved"))
    return result


def test_refusals_and_the_private_repo(hub, pushed, tmp_path):
    result = run_fresh(refused, tmp_path, environment=hub, token=TOKEN)
    assert all("trust_remote_code=True" in result[name] for name in ("silent", "false"))
    assert not result["code"], "neither in the cache nor in memory"
    assert all("alice/secret" in result[name] for name in ("anonymous", "wrong_token"))
    assert result["secret"] == pushed["model"]["digests_2"]
    assert "preprocessor_config.json" in result["fetched"]
    assert set(result["saved"]) >= MODEL_CODE | {"preprocessor_config.json"}


def train(output_dir: str, token: str) -> dict:
    """Fine-tunes a head of a pulled checkpoint with the stock Trainer, which pushes it."""
    from transformers import AutoImageProcessor, Trainer, TrainingArguments

    model = auto_load("AutoModelForImageClassification", "alice/dual", num_labels=2)
    examples = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 2} for i in range(4)]
    arguments = TrainingArguments(
        output_dir,
        **{"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True},
        **{"push_to_hub": True, "hub_model_id": "alice/trained", "hub_token": token},
    )
    processor = AutoImageProcessor.from_pretrained("alice/dual")
    trainer = Trainer(model, arguments, train_dataset=examples, processing_class=processor)
    trainer.train()
    trainer.push_to_hub()
    return digests(model)


def pull_trained() -> dict:
    from huggingface_hub import HfApi

    return {
        "digests": digests(auto_load("AutoModelForImageClassification", "alice/trained")),
        "trunk": type(auto_load("AutoModel", "alice/trained")).__name__,
        "processor": type(transformers.AutoImageProcessor.from_pretrained("alice/trained")).__name__,
        "files": HfApi().list_repo_files("alice/trained"),
    }


def test_trainer_pushes_a_repo_that_loads(hub, pushed, tmp_path):
    weights = run_fresh(train, tmp_path / "home1", environment=hub, output_dir=str(tmp_path / "trained"), token=TOKEN)
    result = run_fresh(pull_trained, tmp_path / "home2", environment=hub)
    assert result["digests"] == weights
    assert result["trunk"] == "VitEmbedModel" and result["processor"].startswith("CLIPImageProcessor")
    assert set(result["files"]) >= MODEL_CODE | {"README.md", "config.json", "model.safetensors", "training_args.bin"}


def convert_from_hub(folder: str, token: str) -> dict:
    from huggingface_hub import HfApi

    from vit_embed.conversion.source import find_source
    from vit_embed.convert_checkpoint import main

    api = HfApi(token=token)
    api.create_repo("alice/clip")
    api.upload_folder(repo_id="alice/clip", folder_path=folder)
    api.upload_file(path_or_fileobj=b"the same weights", path_in_repo="pytorch_model.bin", repo_id="alice/clip")
    statuses = [main([f"alice/{name}", "--output_dir", name]) for name in ("clip", "nothing")]
    fetched = sorted(path.name for path in Path(find_source("alice/clip").weights.parent).iterdir())
    origin = json.loads(Path("clip/config.json").read_text())["converted_from"]
    return {"statuses": statuses, "nothing": Path("nothing").exists(), "origin": origin, "fetched": fetched}


def test_a_repository_is_converted_by_its_name(hub, tmp_path):
    clip, home = tiny.clip_model(), tmp_path / "home"
    clip.save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "README.md").write_text("---\nlicense: mit\n---\n")
    got = run_fresh(convert_from_hub, home, environment=hub, folder=str(tmp_path / "clip"), token=TOKEN)
    assert got["statuses"] == [0, 1] and not got["nothing"]
    origin = got["origin"]
    assert (origin["layout"], origin["source"], origin["license"]) == ("hf_clip", "alice/clip", "mit")
    assert "pytorch_model.bin" not in got["fetched"]  # one form of the weights is enough
    assert list(origin["sha256"]) == ["model.safetensors"]
    converted = vit_embed.VitEmbedForContrastive.from_pretrained(home / "clip").state_dict()
    assert all(torch.equal(converted[name], tensor) for name, tensor in clip.state_dict().items())
