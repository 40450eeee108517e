"""What is saved comes back bit for bit: every class, directly, through its Auto class, here and in other processes."""

import ast
import copy
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
import transformers
from fresh_process import auto_load, digests, junk_in_new_memory, outputs, run_fresh
from safetensors.torch import load_file, save_file
from stem_family import FAMILY
from transformers import CLIPModel, CLIPVisionConfig, CLIPVisionModel

import vit_embed
from vit_embed import (
    VitEmbedBackbone,
    VitEmbedConfig,
    VitEmbedForContrastive,
    VitEmbedForDepthEstimation,
    VitEmbedForImageClassification,
    VitEmbedForMaskedImageModeling,
    VitEmbedModel,
    VitEmbedModelWithProjection,
    VitEmbedTextModel,
)
from vit_embed.configuration_vit_embed import AUTO_MAP
from vit_embed.embeddings_vit_embed import interpolate_positions

REPO = Path(vit_embed.__file__).parent
MODEL_CODE = {path.name for path in REPO.glob("*_vit_embed.py")}
DEPENDENCIES = {"huggingface_hub", "typing_extensions", "yaml"}
# The other transformers version that CI tests: a python of a second environment.
OTHER_PYTHON = os.environ.get("VIT_EMBED_OTHER_PYTHON")


class Case(NamedTuple):
    model_class: type
    auto_class: str | None
    config: dict[str, Any]
    dual: bool = False


# Every stem, and every option of the trunk that adds, drops or reshapes a parameter.
TRUNKS = {
    "model": {},
    **{f"stem {name}": fields for name, fields in FAMILY.items()},
    "registers": {"num_register_tokens": 3},
    "layer_scale": {"layer_scale_init_value": 0.1},
    "patch_bias": {"stem_type": "linear", "patch_bias": True},
    "rms_norm": {"norm_type": "rms_norm", "qkv_bias": False},
    "mixed_norm": {"final_norm_type": "rms_norm", "use_pre_layernorm": False},
    "post_norm": {"norm_position": "post", "final_norm_type": "none"},
    "map_pooling": {"pooling_type": "map", "use_cls_token": False},
    "norm_before_mean": {"pooling_type": "mean", "norm_before_pooling": True},
    "sinusoidal": {"position_embedding_type": "sinusoidal", "pooling_type": "mean"},
    "no_positions": {"position_embedding_type": "none"},
    "polynomial": {"position_embedding_type": "polynomial", "position_degree": 2},
    "rectangle": {"image_size": (24, 40), "patch_size": (8, 4)},
}
CLASSIFICATION, DEPTH = "AutoModelForImageClassification", "AutoModelForDepthEstimation"
ZERO_SHOT, MASKED = "AutoModelForZeroShotImageClassification", "AutoModelForMaskedImageModeling"
SIGMOID = {"contrastive_loss": "sigmoid", "layer_scale_init_value": 0.1}
CASES = {
    **{name: Case(VitEmbedModel, "AutoModel", config) for name, config in TRUNKS.items()},
    "projection": Case(VitEmbedModelWithProjection, "AutoModel", {}),
    "classification": Case(VitEmbedForImageClassification, CLASSIFICATION, {"num_labels": 5, "num_register_tokens": 2}),
    "depth_deconv": Case(VitEmbedForDepthEstimation, DEPTH, {"max_depth": 10.0}),
    "depth_raw": Case(VitEmbedForDepthEstimation, DEPTH, {"deconv_kernel_size": 4, "depth_activation": "identity"}),
    "depth_dpt": Case(VitEmbedForDepthEstimation, DEPTH, {"depth_head_type": "dpt"}),
    "masked": Case(VitEmbedForMaskedImageModeling, MASKED, {"stem_type": "overlap"}),
    "backbone": Case(VitEmbedBackbone, "AutoBackbone", {"out_features": ["stage2", "stage4"]}),
    "softmax": Case(VitEmbedForContrastive, ZERO_SHOT, {}, dual=True),
    "sigmoid": Case(VitEmbedForContrastive, "AutoModel", SIGMOID, dual=True),
    "siglip": Case(VitEmbedForContrastive, ZERO_SHOT, tiny.SIGLIP, dual=True),
    "text": Case(VitEmbedTextModel, None, {}, dual=True),
}
# For other processes: each class and Auto class, and the only buffers, running statistics of batch norms.
AUTO_CASES = ["model", "stem hierarchical, batch norm", "projection", "classification", "depth_deconv", "depth_dpt"]
AUTO_CASES += ["masked", "backbone", "softmax", "sigmoid"]


def build(name: str) -> torch.nn.Module:
    model_class, _, fields, dual = CASES[name]
    config = tiny.dual_config(**fields) if dual else tiny.vision_config(**fields)
    return tiny.randomised(model_class(config.text_config if name == "text" else config))


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    height, width = (24, 40) if name == "rectangle" else (32, 32)
    images = tiny.pixels(height=height, width=width)
    return {"pixel_values": images, "input_ids": tiny.tokens(), "bool_masked_pos": tiny.hidden_patches()}


class Saved(NamedTuple):
    """A folder, and the digests of the weights before saving; inputs and outputs are in a file beside it."""

    folder: Path
    digests: dict[str, str]

    @property
    def file(self) -> str:
        return f"{self.folder}.pt"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Saved]:
    root, result = tmp_path_factory.mktemp("saved"), {}
    for name in CASES:
        model, inputs = build(name), inputs_of(name)
        model.save_pretrained(root / name)
        result[name] = Saved(root / name, digests(model))
        torch.save({"inputs": inputs, "outputs": outputs(model, inputs)}, result[name].file)
    return result


@pytest.fixture(scope="module")
def auto_folders(saved) -> dict[str, list[str]]:
    """name -> [Auto class, folder, file of inputs and outputs]: what the functions of other processes are given."""
    return {name: [CASES[name].auto_class, str(saved[name].folder), saved[name].file] for name in AUTO_CASES}


def copied(saved_case: Saved, target: Path) -> Path:
    return Path(shutil.copytree(saved_case.folder, target))


def load(model_class: type, folder: Path | None, **options) -> tuple[torch.nn.Module, dict[str, set[str]]]:
    """A model, with NaN wherever nothing was filled in, and the keys of its loading info by their kinds."""
    with junk_in_new_memory():
        model, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
    # transformers 5 has the shapes beside the keys that mismatch.
    return model, {kind: {key[0] if isinstance(key, tuple) else key for key in keys} for kind, keys in info.items()}


def load_all(model_class: type, folder: Path | None, **options) -> torch.nn.Module:
    """A model whose loading has nothing to report."""
    model, info = load(model_class, folder, **options)
    assert not any(info.values()), info
    return model


def part_of(expected: dict[str, str], prefix: str) -> dict[str, str]:
    return {name.removeprefix(prefix): value for name, value in expected.items() if name.startswith(prefix)}


def assert_equal_but(model: torch.nn.Module, expected: dict[str, str], changed: set[str]) -> None:
    """All weights but `changed` have the bits of `expected`, and `changed` are finite: initialised, not raw memory."""
    actual = digests(model)
    assert {name for name in expected if actual.get(name) != expected[name]} <= changed
    for name in changed & actual.keys():
        assert model.state_dict()[name].isfinite().all(), f"{name} was not initialised"


def write_weights(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# In this process, with the classes of the package


@pytest.mark.parametrize("name", CASES)
def test_save_and_load_is_bit_equal(saved, name):
    model_class, expected = CASES[name].model_class, torch.load(saved[name].file)
    model, again = (load_all(model_class, saved[name].folder) for _ in range(2))
    assert digests(model) == digests(again) == saved[name].digests
    assert not model.training
    for actual, wanted in zip(outputs(model, expected["inputs"]), expected["outputs"], strict=True):
        # The same arithmetic on the same bits, but memory alignment may pick another kernel.
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


def test_shards_and_a_state_dict_without_a_checkpoint_are_bit_equal(saved, tmp_path):
    model = VitEmbedForContrastive.from_pretrained(saved["softmax"].folder)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert digests(load_all(VitEmbedForContrastive, tmp_path)) == saved["softmax"].digests
    given = {"config": tiny.dual_config(), "state_dict": model.state_dict()}
    assert digests(VitEmbedForContrastive.from_pretrained(None, **given)) == saved["softmax"].digests


@pytest.mark.parametrize("name", CASES)
def test_no_state_outside_the_state_dict(name):
    """transformers 5 fills non-persistent buffers with uninitialised memory, and moves no bare tensor attribute."""
    model = build(name)
    buffers = dict(model.named_buffers())
    assert not buffers or name.startswith(("stem hybrid", "stem hierarchical, batch norm"))
    assert model.state_dict().keys() == {*dict(model.named_parameters()), *buffers}
    for module_name, module in model.named_modules():
        bare = [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
        assert not bare, f"{module_name} holds tensors {bare}"


# Base into head, head into base, keys missing, left over and of another shape

BESIDE_THE_TRUNK = ["classification", "depth_deconv", "depth_dpt", "backbone", "projection", "sigmoid", "siglip"]
BESIDE_THE_TRUNK += ["masked"]


@pytest.mark.parametrize("name", BESIDE_THE_TRUNK)
def test_head_into_base(saved, name):
    model, info = load(VitEmbedModel, saved[name].folder)
    assert digests(model) == part_of(saved[name].digests, "vision_model.")
    assert not info["missing_keys"] and not info["mismatched_keys"]
    # What the head had and the trunk has not is reported; the rest of a dual encoder and a decoder are left on purpose.
    head = {key for key in saved[name].digests if not key.startswith("vision_model.")}
    assert info["unexpected_keys"] == (set() if CASES[name].dual or name in ("projection", "masked") else head)


@pytest.mark.parametrize("name", BESIDE_THE_TRUNK)
def test_base_into_head(saved, tmp_path, name):
    VitEmbedModel.from_pretrained(saved[name].folder).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["text_config"] is None and written["auto_map"] == AUTO_MAP
    case = CASES[name]
    options = {**({"text_config": dict(tiny.TEXT)} if case.dual else {}), **case.config}
    model, info = load(case.model_class, tmp_path, **options)
    head = {key for key in saved[name].digests if not key.startswith("vision_model.")}
    assert info["missing_keys"] == head and not info["unexpected_keys"]
    assert_equal_but(model, saved[name].digests, head)


def test_a_text_tower_comes_out_of_a_dual_encoder_alone(saved):
    model = load_all(VitEmbedTextModel, saved["softmax"].folder)
    assert digests(model) == part_of(saved["softmax"].digests, "text_model.")
    with pytest.raises(ValueError, match="has no text tower"):
        VitEmbedTextModel.from_pretrained(saved["model"].folder)


NO_POSITIONS = {"position_embedding_type": "none"}
NO_CLASS = {"use_cls_token": False, **NO_POSITIONS, "pooling_type": "mean"}
# (options of the checkpoint, options asked for, parts of the names of the weights that it lacks, where they start).
ADDED = [
    ({}, {"num_register_tokens": 2}, "register_tokens", None),
    ({}, {"layer_scale_init_value": 0.25}, "layer_scale", 0.25),
    ({}, {"patch_bias": True}, "patch_embedding.bias", 0.0),
    ({"qkv_bias": False}, {"qkv_bias": True}, "_proj.bias", 0.0),
    ({}, {"pooling_type": "map"}, "pooler.", None),
    (NO_CLASS, {"use_cls_token": True}, "class_embedding", None),
    (NO_POSITIONS, {"position_embedding_type": "learned"}, "position_embedding.weight", None),
    ({"final_norm_type": "rms_norm"}, {"final_norm_type": "layer_norm"}, "post_layernorm.bias", 0.0),
]


@pytest.mark.parametrize("stored, asked, part, start", ADDED)
def test_an_added_option_leaves_its_neighbours(tmp_path, stored, asked, part, start):
    source = tiny.randomised(VitEmbedModel(tiny.vision_config(**stored)))
    source.save_pretrained(tmp_path)
    model, info = load(VitEmbedModel, tmp_path, **asked)
    missing = model.state_dict().keys() - source.state_dict().keys()
    assert info["missing_keys"] == missing and all(part in key for key in missing) and missing
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_equal_but(model, digests(source), missing)
    for key in missing:
        values = model.state_dict()[key]
        if start is not None:
            assert (values == start).all(), key
        elif not key.endswith("bias") and "norm" not in key:
            assert values.std() > 0, f"{key} starts constant"


def test_sigmoid_from_softmax_adds_only_the_bias(saved):
    model, info = load(VitEmbedForContrastive, saved["softmax"].folder, contrastive_loss="sigmoid")
    assert info["missing_keys"] == {"logit_bias"}
    assert model.logit_bias.item() == -10.0  # arXiv:2303.15343 section 3.2
    assert_equal_but(model, saved["softmax"].digests, set())


def test_any_one_missing_key_leaves_all_others(saved, tmp_path):
    """`_init_weights` sees the whole module of a missing key: none of its other parameters may start over."""
    first_of_its_kind = [key for key in saved["sigmoid"].digests if ".layers." not in key or ".layers.0." in key]
    assert len(first_of_its_kind) > 40
    folder = copied(saved["sigmoid"], tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    for key in first_of_its_kind:
        write_weights(folder, {name: weight for name, weight in weights.items() if name != key})
        model, info = load(VitEmbedForContrastive, folder)
        assert info["missing_keys"] == {key}
        assert_equal_but(model, saved["sigmoid"].digests, {key})


def test_missing_and_unexpected_keys_are_logged(saved, tmp_path, caplog):
    """By transformers, at the level that it has by default."""
    transformers.utils.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING, logger="transformers"):
            VitEmbedForImageClassification.from_pretrained(saved["model"].folder)
            assert "classifier.weight" in caplog.text and "newly initialized" in caplog.text
            folder = copied(saved["model"], tmp_path / "copy")
            write_weights(folder, {**load_file(folder / "model.safetensors"), "unknown.weight": torch.ones(3)})
            VitEmbedModel.from_pretrained(folder)
            assert "unknown.weight" in caplog.text
    finally:
        transformers.utils.logging.disable_propagation()


def test_mismatched_head_is_an_error_unless_allowed_and_then_reported(saved):
    asked = {"folder": saved["classification"].folder, "num_labels": 7}
    with pytest.raises(RuntimeError, match="mismatch"):
        load(VitEmbedForImageClassification, **asked)
    model, info = load(VitEmbedForImageClassification, **asked, ignore_mismatched_sizes=True)
    head = {"classifier.weight", "classifier.bias"}
    assert info["mismatched_keys"] == head
    assert model.classifier.weight.shape == (7, 32) and model.config.num_labels == 7
    assert_equal_but(model, saved["classification"].digests, head)


def test_mismatched_stem_leaves_the_class_token(saved):
    """The stem and the table change shape with the patch; the class token and the registers beside them do not."""
    model, info = load(VitEmbedModel, saved["registers"].folder, patch_size=16, ignore_mismatched_sizes=True)
    reshaped = {"embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"}
    assert info["mismatched_keys"] == reshaped
    assert_equal_but(model, saved["registers"].digests, reshaped)


# Another dtype, another image size


@pytest.mark.parametrize("name", ["classification", "sigmoid"])
def test_dtype_is_the_one_asked_for(saved, tmp_path, name):
    model_class = CASES[name].model_class
    half = model_class.from_pretrained(saved[name].folder).to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    for dtype in ("auto", torch.bfloat16, "bfloat16"):
        model = model_class.from_pretrained(tmp_path, dtype=dtype)
        assert model.dtype == torch.bfloat16 and digests(model) == digests(half)
    model = model_class.from_pretrained(tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert digests(model) == digests(half.float())


@pytest.mark.parametrize("how", ["argument", "config", "file"])
@pytest.mark.parametrize(
    "name, image_size, to_grid",
    [
        ("softmax", (32, 32), (4, 4)),  # its own
        ("softmax", 48, (6, 6)),
        ("model", (24, 64), (3, 8)),
        ("classification", [64, 16], (8, 2)),
        ("depth_deconv", 48, (6, 6)),
    ],
)
def test_another_image_size_resamples_the_positions(saved, tmp_path, name, image_size, to_grid, how):
    model_class, folder = CASES[name].model_class, saved[name].folder
    if how == "argument":
        model = load_all(model_class, folder, image_size=image_size)
    else:
        config = VitEmbedConfig.from_pretrained(folder, image_size=image_size)
        before = copy.deepcopy(config)
        config.save_pretrained(tmp_path / "config")
        model = load_all(model_class, folder, config=tmp_path / "config" if how == "file" else config)
        assert config.to_dict() == before.to_dict()
    assert model.config.grid_size == to_grid
    original = model_class.from_pretrained(folder)
    weights = original.trunk.embeddings.position_embedding.weight.detach()
    patches = interpolate_positions(weights[1:], (4, 4), to_grid, model.config.position_interpolation)
    table = model.trunk.embeddings.position_embedding.weight
    assert torch.equal(table, torch.cat([weights[:1], patches])) and table.requires_grad
    tables = {key for key in saved[name].digests if key.endswith("embeddings.position_embedding.weight")}
    assert_equal_but(model, saved[name].digests, {key for key in tables if "text_model" not in key})
    assert to_grid != (4, 4) or digests(model) == saved[name].digests

    model.save_pretrained(tmp_path)
    again = load_all(model_class, tmp_path)
    assert digests(again) == digests(model) and again.config.grid_size == to_grid


# Stock CLIP in, stock CLIP out


def test_stock_clip_folder_loads(tmp_path):
    tiny.clip_model().save_pretrained(tmp_path)
    stock = digests(tiny.clip_model())
    trunk = part_of(stock, "vision_model.")
    assert digests(load_all(VitEmbedForContrastive, tmp_path)) == stock
    assert digests(load_all(VitEmbedModel, tmp_path)) == trunk
    assert digests(load_all(VitEmbedTextModel, tmp_path)) == part_of(stock, "text_model.")
    kept = ("vision_model.", "visual_projection.")
    projected = {name: value for name, value in stock.items() if name.startswith(kept)}
    assert digests(load_all(VitEmbedModelWithProjection, tmp_path)) == projected
    head, info = load(VitEmbedForImageClassification, tmp_path, num_labels=7)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"} and not info["unexpected_keys"]
    assert digests(head.vision_model) == trunk and head.config.num_labels == 7


def test_stock_clip_vision_folder_loads(tmp_path):
    stock = tiny.randomised(CLIPVisionModel(CLIPVisionConfig(**tiny.VISION)))
    stock.save_pretrained(tmp_path)
    # transformers 4.57 keeps the trunk under "vision_model.", 5.x at the top.
    expected = {name.removeprefix("vision_model."): value for name, value in digests(stock).items()}
    trunk = load_all(VitEmbedModel, tmp_path)
    depth, info = load(VitEmbedForDepthEstimation, tmp_path)
    assert digests(trunk) == digests(depth.vision_model) == expected
    assert info["missing_keys"] == {k for k in digests(depth) if k.startswith("depth_head.")}
    assert not info["unexpected_keys"]
    with torch.no_grad():
        wanted, actual = stock(tiny.pixels()).pooler_output, trunk(tiny.pixels()).pooler_output
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)  # float32 in another order of operations


def test_what_we_save_loads_in_stock_clip(saved, tmp_path):
    stock = load_all(CLIPModel, saved["softmax"].folder)
    assert digests(stock) == saved["softmax"].digests
    stock.save_pretrained(tmp_path)
    ours = VitEmbedForContrastive.from_pretrained(tmp_path)
    assert digests(ours) == saved["softmax"].digests
    inputs = {"pixel_values": tiny.pixels(), "input_ids": tiny.tokens()}
    with torch.no_grad():
        wanted, actual = stock(**inputs).logits_per_image, ours(**inputs).logits_per_image
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-4)  # cosines in float32 times a scale of about 14


def test_old_clip_checkpoint(tmp_path):
    """Before transformers 4.31: each tower's config twice, of which `*_dict` wins, and position numbers as weights."""
    stock = tiny.clip_model()
    stock.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config_dict"], config["text_config_dict"] = config["vision_config"], config["text_config"]
    config["vision_config"] = {**config["vision_config"], "hidden_size": 64, "patch_size": 16}
    config["text_config"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    numbers = {"vision_model": torch.arange(17)[None], "text_model": torch.arange(16)[None]}
    numbers = {f"{tower}.embeddings.position_ids": value for tower, value in numbers.items()}
    write_weights(tmp_path, {**load_file(tmp_path / "model.safetensors"), **numbers})

    assert digests(load_all(VitEmbedForContrastive, tmp_path)) == digests(stock)
    for model_class in (VitEmbedModel, VitEmbedTextModel, VitEmbedForImageClassification):
        _, info = load(model_class, tmp_path)
        assert not info["unexpected_keys"]


# The saved folder is complete


@pytest.mark.parametrize("name", AUTO_CASES)
def test_saved_folder_is_complete(saved, name):
    folder = saved[name].folder
    companions = {"preprocessor_config.json", "modules.json", "sentence_bert_config.json"}
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"} | companions | MODEL_CODE
    for code in MODEL_CODE:
        assert (folder / code).read_bytes() == (REPO / code).read_bytes()
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_model_code_needs_only_torch_and_transformers():
    """Beside what those need themselves and what stands in `try`; each sibling import is one that transformers' text
    search finds."""
    siblings_of = {}
    for name in MODEL_CODE:
        tree = ast.parse((REPO / name).read_text())
        optional = {node for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
        siblings_of[name] = set()
        for node in ast.walk(tree):
            modules = []
            if isinstance(node, ast.Attribute):
                assert node.attr != "register_buffer", name
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module and "." not in node.module and node in tree.body, name
                siblings_of[name].add(node.module + ".py")
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module]
            roots = {module.split(".")[0] for module in modules} if node not in optional else set()
            assert roots <= {"torch", "transformers", *DEPENDENCIES} | sys.stdlib_module_names, (name, roots)
    # transformers 4.57 copies only the direct imports of the entry file from a local folder.
    assert siblings_of["modeling_vit_embed.py"] == MODEL_CODE - {"modeling_vit_embed.py"}


# In other processes, with the code of the folder


def load_and_save_again(folders: dict, target: str | None) -> dict:
    """Loads every folder through its Auto class, and saves it."""
    models = {}
    for name, (auto_class, folder, expected) in folders.items():
        with junk_in_new_memory():
            model, info = auto_load(auto_class, folder, output_loading_info=True)
        expected = torch.load(expected)
        differences = [
            (actual.float() - wanted.float()).abs().max().item() / (1 + wanted.float().abs().max().item())
            for actual, wanted in zip(outputs(model, expected["inputs"]), expected["outputs"], strict=True)
        ]
        models[name] = {
            "class": [type(model).__module__.split(".")[0], type(model).__name__],
            "clean": not any(info.values()),
            "digests": digests(model),
            "difference": max(differences),
        }
        if target:
            model.save_pretrained(os.path.join(target, name))
    return {"models": models, "imported": "vit_embed" in sys.modules, "version": transformers.__version__}


def assert_all_loaded(result: dict, saved: dict[str, Saved]) -> None:
    assert not result["imported"]
    assert list(result["models"]) == AUTO_CASES
    for name, loaded in result["models"].items():
        assert loaded["class"] == ["transformers_modules", CASES[name].model_class.__name__]
        assert loaded["clean"] and loaded["digests"] == saved[name].digests, name
        assert loaded["difference"] < 1e-5, name  # the same arithmetic, but alignment may pick another kernel


def load_from_working_folders(folders: list) -> dict:
    """Loads every folder as ".", having started in the first."""
    found = []
    for auto_class, folder, _ in folders:
        os.chdir(folder)
        found.append(digests(auto_load(auto_class, ".")))
    return {"digests": found, "imported": "vit_embed" in sys.modules}


# One for each Auto class: transformers 5 keeps, for a whole process, the class that an Auto class first took from ".".
FROM_WORKING_FOLDER = ["sigmoid", "softmax", "classification", "depth_dpt", "backbone"]


def test_fresh_processes_offline_over_three_generations(saved, auto_folders, tmp_path):
    """Each process saves what it loaded by the folder's own code; the next loads that, the rest gone."""
    assert {CASES[name].model_class for name in AUTO_CASES} == {c.model_class for c in CASES.values() if c.auto_class}
    folders = auto_folders
    for generation in (2, 3):
        target, home = tmp_path / f"generation{generation}", tmp_path / f"home{generation}"
        assert_all_loaded(run_fresh(load_and_save_again, home, folders=folders, target=str(target), cwd="/"), saved)
        for name in AUTO_CASES:
            folder, original = target / name, saved[name].folder
            assert {path.name for path in folder.iterdir()} == {path.name for path in original.iterdir()}
            for code in MODEL_CODE | {"preprocessor_config.json"}:
                assert (folder / code).read_bytes() == (original / code).read_bytes(), code
            assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
        shutil.rmtree(tmp_path / f"generation{generation - 1}", ignore_errors=True)
        shutil.rmtree(home)
        folders = {name: [auto, str(target / name), pt] for name, (auto, _, pt) in folders.items()}

    chosen = [folders[name] for name in FROM_WORKING_FOLDER]
    result = run_fresh(load_from_working_folders, tmp_path / "home4", folders=chosen, cwd=chosen[0][1])
    assert not result["imported"]
    assert result["digests"] == [saved[name].digests for name in FROM_WORKING_FOLDER]


@pytest.mark.skipif(not OTHER_PYTHON, reason="VIT_EMBED_OTHER_PYTHON names no python with another transformers version")
def test_both_transformers_versions_load_each_others_folders(saved, auto_folders, tmp_path):
    theirs = tmp_path / "theirs"
    sent = {"folders": auto_folders, "target": str(theirs)}
    result = run_fresh(load_and_save_again, tmp_path / "home1", python=OTHER_PYTHON, **sent)
    assert result["version"] != transformers.__version__
    assert_all_loaded(result, saved)
    folders = {name: [auto, str(theirs / name), pt] for name, (auto, _, pt) in auto_folders.items()}
    assert_all_loaded(run_fresh(load_and_save_again, tmp_path / "home2", folders=folders, target=None), saved)
    for name in AUTO_CASES:
        assert digests(CASES[name].model_class.from_pretrained(theirs / name)) == saved[name].digests


def classes_of(folders: list) -> list:
    return [type(auto_load("AutoModel", folder)).__name__ for folder in folders]


def test_one_and_two_towers_in_folders_of_the_same_name(saved, tmp_path):
    """transformers 5 takes folders of one name and one code for one model: the first class AutoModel finds wins."""
    folders = [str(copied(saved[name], tmp_path / name / "checkpoint")) for name in ("model", "softmax")]
    found = run_fresh(classes_of, tmp_path / "home", folders=folders)
    assert found == ["VitEmbedModel", "VitEmbedForContrastive"]
