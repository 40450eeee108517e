"""What is saved comes back bit for bit: every class, directly, through its Auto class, here and in other processes."""

import ast
import copy
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
import torch
import transformers
from fresh_process import digests, junk_in_new_memory, outputs, run_fresh
from safetensors.torch import load_file, save_file
from tiny_tokenizer import TOKENIZER_FILES, write_tokenizer
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel, ResNetConfig

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
    saving_vit_embed,
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
    config: dict
    dual: bool = False

    def build(self) -> torch.nn.Module:
        config = tiny.dual_config(**self.config) if self.dual else tiny.vision_config(**self.config)
        return tiny.randomised(self.model_class(config))


# Every class, and every option that adds, drops or reshapes a parameter.
CASES = {
    "model": Case(VitEmbedModel, "AutoModel", {}),
    "projection": Case(VitEmbedModelWithProjection, "AutoModel", {}),
    "registers": Case(VitEmbedModel, "AutoModel", {"num_register_tokens": 3}),
    "layer_scale": Case(VitEmbedModel, "AutoModel", {"layer_scale_init_value": 0.1}),
    "linear_stem": Case(VitEmbedModel, "AutoModel", {"stem_type": "linear", "patch_bias": True}),
    "rms_norm": Case(VitEmbedModel, "AutoModel", {"norm_type": "rms_norm", "qkv_bias": False}),
    "mixed_norm": Case(VitEmbedModel, "AutoModel", {"final_norm_type": "rms_norm", "use_pre_layernorm": False}),
    "post_norm": Case(VitEmbedModel, "AutoModel", {"norm_position": "post", "final_norm_type": "none"}),
    "map_pooling": Case(VitEmbedModel, "AutoModel", {"pooling_type": "map", "use_cls_token": False}),
    "norm_before_mean": Case(VitEmbedModel, "AutoModel", {"pooling_type": "mean", "norm_before_pooling": True}),
    "sinusoidal": Case(VitEmbedModel, "AutoModel", {"position_embedding_type": "sinusoidal", "pooling_type": "mean"}),
    "no_positions": Case(VitEmbedModel, "AutoModel", {"position_embedding_type": "none"}),
    "polynomial": Case(VitEmbedModel, "AutoModel", {"position_embedding_type": "polynomial", "position_degree": 2}),
    "hierarchical": Case(VitEmbedModel, "AutoModel", {"stem_type": "hierarchical", "stem_norm_type": "batch_norm"}),
    "hybrid": Case(
        VitEmbedModel,
        "AutoModel",
        {
            "stem_type": "hybrid",
            "backbone_config": ResNetConfig(
                embedding_size=6, hidden_sizes=[6, 10], depths=[1, 1], out_features=["stage2"]
            ),
        },
    ),
    "adaptive": Case(VitEmbedModel, "AutoModel", {"stem_type": "adaptive"}),
    "token_learner": Case(VitEmbedModel, "AutoModel", {"stem_type": "token_learner", "num_learned_tokens": 5}),
    "dct": Case(VitEmbedModel, "AutoModel", {"stem_type": "dct", "num_coefficients": 20, "token_merge_size": 2}),
    "deformable": Case(VitEmbedModel, "AutoModel", {"stem_type": "deformable", "patch_drop_rate": 0.25}),
    "rectangle": Case(VitEmbedModel, "AutoModel", {"image_size": (24, 40), "patch_size": (8, 4)}),
    "classification": Case(
        VitEmbedForImageClassification, "AutoModelForImageClassification", {"num_labels": 5, "num_register_tokens": 2}
    ),
    "depth_deconv": Case(VitEmbedForDepthEstimation, "AutoModelForDepthEstimation", {"max_depth": 10.0}),
    "depth_raw": Case(
        VitEmbedForDepthEstimation,
        "AutoModelForDepthEstimation",
        {"deconv_kernel_size": 4, "depth_activation": "identity"},
    ),
    "depth_dpt": Case(
        VitEmbedForDepthEstimation, "AutoModelForDepthEstimation", {"depth_head_type": "dpt", "patch_size": 8}
    ),
    "masked": Case(VitEmbedForMaskedImageModeling, "AutoModelForMaskedImageModeling", {"stem_type": "overlap"}),
    "backbone": Case(VitEmbedBackbone, "AutoBackbone", {"out_features": ["stage2", "stage4"]}),
    "softmax": Case(VitEmbedForContrastive, "AutoModelForZeroShotImageClassification", {}, dual=True),
    "sigmoid": Case(
        VitEmbedForContrastive, "AutoModel", {"contrastive_loss": "sigmoid", "layer_scale_init_value": 0.1}, dual=True
    ),
    "siglip": Case(VitEmbedForContrastive, "AutoModelForZeroShotImageClassification", tiny.SIGLIP, dual=True),
    "siglip_image": Case(VitEmbedModelWithProjection, "AutoModel", {**tiny.SIGLIP, "text_config": None}),
    "text": Case(VitEmbedTextModel, None, {}),
}
# The only buffers: running statistics, which batch norm keeps in the state dict.
BATCH_NORM_CASES = ("hierarchical", "hybrid")
AUTO_CASES = [name for name, case in CASES.items() if case.auto_class]


def build(name: str) -> torch.nn.Module:
    if name == "text":
        return tiny.randomised(VitEmbedTextModel(tiny.dual_config().text_config))
    return CASES[name].build()


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    height, width = (24, 40) if name == "rectangle" else (32, 32)
    return {
        "pixel_values": tiny.pixels(height=height, width=width),
        "input_ids": tiny.tokens(),
        "bool_masked_pos": tiny.hidden_patches(),
    }


class Saved(NamedTuple):
    folder: Path
    digests: dict[str, str]
    """Of the weights before saving."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Saved]:
    """A folder of every case, with the inputs and outputs of its model beside the weights."""
    root = tmp_path_factory.mktemp("saved")
    result = {}
    for name in CASES:
        model = build(name)
        model.save_pretrained(root / name)
        inputs = inputs_of(name)
        torch.save({"inputs": inputs, "outputs": outputs(model, inputs)}, root / f"{name}.pt")
        result[name] = Saved(root / name, digests(model))
    return result


@pytest.fixture(scope="module")
def auto_folders(saved) -> dict[str, list[str]]:
    """name -> [Auto class, folder, file of inputs and outputs]: what the functions of other processes are given."""
    return {name: [CASES[name].auto_class, str(saved[name].folder), f"{saved[name].folder}.pt"] for name in AUTO_CASES}


def copied(saved_case: Saved, target: Path, **config_changes) -> Path:
    """A copy of a saved folder, with fields of its config.json replaced."""
    shutil.copytree(saved_case.folder, target)
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config_changes}))
    return target


def reported(info: dict, kind: str) -> set[str]:
    """The keys of one kind in a loading info: names, but in transformers 5 with the shapes where those mismatch."""
    return {key[0] if isinstance(key, tuple) else key for key in info[kind]}


def assert_clean(info: dict) -> None:
    assert not any(info.values()), info


def assert_equal_but(model: torch.nn.Module, expected: dict[str, str], changed: set[str]) -> None:
    """All weights but `changed` have the bits of `expected`, and `changed` are finite: initialised, not raw memory."""
    actual = digests(model)
    assert {name for name in expected if actual.get(name) != expected[name]} <= changed
    for name in changed & actual.keys():
        assert model.state_dict()[name].isfinite().all(), f"{name} was not initialised"


# In this process, with the classes of the package


@pytest.mark.parametrize("name", CASES)
def test_save_and_load_is_bit_equal(saved, name):
    model_class, expected = CASES[name].model_class, torch.load(f"{saved[name].folder}.pt")
    with junk_in_new_memory():
        model, info = model_class.from_pretrained(saved[name].folder, output_loading_info=True)
        again = model_class.from_pretrained(saved[name].folder)
    assert_clean(info)
    assert digests(model) == digests(again) == saved[name].digests
    assert not model.training
    for actual, wanted in zip(outputs(model, expected["inputs"]), expected["outputs"], strict=True):
        # The same arithmetic on the same bits, but memory alignment may pick another kernel.
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


def test_sharded_checkpoint_is_bit_equal(saved, tmp_path):
    model = VitEmbedForContrastive.from_pretrained(saved["softmax"].folder)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert digests(VitEmbedForContrastive.from_pretrained(tmp_path)) == saved["softmax"].digests


def test_state_dict_without_a_checkpoint(saved):
    state_dict = load_file(saved["softmax"].folder / "model.safetensors")
    model = VitEmbedForContrastive.from_pretrained(None, config=tiny.dual_config(), state_dict=state_dict)
    assert digests(model) == saved["softmax"].digests


@pytest.mark.parametrize("name", CASES)
def test_no_state_outside_the_state_dict(name):
    """transformers 5 fills non-persistent buffers with uninitialised memory, and moves no bare tensor attribute."""
    model = build(name)
    buffers = dict(model.named_buffers())
    assert not buffers or name in BATCH_NORM_CASES
    assert model.state_dict().keys() == {*dict(model.named_parameters()), *buffers}
    for module_name, module in model.named_modules():
        bare = [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
        assert not bare, f"{module_name} holds tensors {bare}"


# Base into head, head into base, keys missing, left over and of another shape


def trunk_of(expected: dict[str, str]) -> dict[str, str]:
    prefix = "vision_model."
    return {name.removeprefix(prefix): value for name, value in expected.items() if name.startswith(prefix)}


BESIDE_THE_TRUNK = [
    "classification",
    "depth_deconv",
    "depth_dpt",
    "backbone",
    "projection",
    "softmax",
    "sigmoid",
    "siglip",
]


@pytest.mark.parametrize("name", BESIDE_THE_TRUNK)
def test_head_into_base(saved, name):
    with junk_in_new_memory():
        model, info = VitEmbedModel.from_pretrained(saved[name].folder, output_loading_info=True)
    assert digests(model) == trunk_of(saved[name].digests)
    assert not reported(info, "missing_keys") and not reported(info, "mismatched_keys")
    # What the head had and the trunk has not is reported; the rest of a dual encoder is left on purpose.
    head = {key for key in saved[name].digests if not key.startswith("vision_model.")}
    assert reported(info, "unexpected_keys") == (set() if CASES[name].dual or name == "projection" else head)


@pytest.mark.parametrize("name", BESIDE_THE_TRUNK)
def test_base_into_head(saved, tmp_path, name):
    trunk = VitEmbedModel.from_pretrained(saved[name].folder)
    trunk.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["text_config"] is None and written["auto_map"] == AUTO_MAP
    case = CASES[name]
    options = dict(case.config)
    if case.dual:
        options.setdefault("text_config", dict(tiny.TEXT))
    with junk_in_new_memory():
        model, info = case.model_class.from_pretrained(tmp_path, output_loading_info=True, **options)
    head = {key for key in saved[name].digests if not key.startswith("vision_model.")}
    assert reported(info, "missing_keys") == head
    assert not reported(info, "unexpected_keys")
    assert_equal_but(model, saved[name].digests, head)


def test_text_tower_out_of_a_dual_encoder(saved):
    with junk_in_new_memory():
        model, info = VitEmbedTextModel.from_pretrained(saved["softmax"].folder, output_loading_info=True)
    assert_clean(info)
    prefix = "text_model."
    expected = {k.removeprefix(prefix): v for k, v in saved["softmax"].digests.items() if k.startswith(prefix)}
    assert digests(model) == expected


def test_text_tower_out_of_a_vision_only_checkpoint_is_an_error(saved):
    with pytest.raises(ValueError, match="has no text tower"):
        VitEmbedTextModel.from_pretrained(saved["model"].folder)


LAYER_SCALES = {f"encoder.layers.{i}.layer_scale{k}" for i in range(4) for k in (1, 2)}
QKV_BIASES = {f"encoder.layers.{i}.self_attn.{part}_proj.bias" for i in range(4) for part in "qkv"}
POOLER = {
    name
    for name, _ in VitEmbedModel(tiny.vision_config(pooling_type="map")).named_parameters()
    if name.startswith("pooler.")
}
# What the checkpoint lacks: (its own options, the options asked for, the keys missing, the value they start at).
ADDED = {
    "registers": ({}, {"num_register_tokens": 2}, {"embeddings.register_tokens"}, None),
    "layer_scale": ({}, {"layer_scale_init_value": 0.25}, LAYER_SCALES, 0.25),
    "patch_bias": ({}, {"patch_bias": True}, {"embeddings.patch_embedding.bias"}, 0.0),
    "qkv_bias": ({"qkv_bias": False}, {"qkv_bias": True}, QKV_BIASES, 0.0),
    "map_pooling": ({}, {"pooling_type": "map"}, POOLER, None),
    "class_token": (
        {"use_cls_token": False, "position_embedding_type": "none", "pooling_type": "mean"},
        {"use_cls_token": True},
        {"embeddings.class_embedding"},
        None,
    ),
    "positions": (
        {"position_embedding_type": "none"},
        {"position_embedding_type": "learned"},
        {"embeddings.position_embedding.weight"},
        None,
    ),
    "final_norm": (
        {"final_norm_type": "rms_norm"},
        {"final_norm_type": "layer_norm"},
        {"post_layernorm.bias"},
        0.0,
    ),
}


@pytest.mark.parametrize("name", ADDED)
def test_an_added_option_leaves_its_neighbours(tmp_path, name):
    stored, asked, missing, start = ADDED[name]
    source = tiny.randomised(VitEmbedModel(tiny.vision_config(**stored)))
    source.save_pretrained(tmp_path)
    with junk_in_new_memory():
        model, info = VitEmbedModel.from_pretrained(tmp_path, output_loading_info=True, **asked)
    assert reported(info, "missing_keys") == missing
    assert not reported(info, "unexpected_keys") and not reported(info, "mismatched_keys")
    assert_equal_but(model, digests(source), missing)
    for key in missing:
        values = model.state_dict()[key]
        if start is not None:
            assert (values == start).all(), key
        elif not key.endswith("bias") and "norm" not in key:
            assert values.std() > 0, f"{key} starts constant"


def test_sigmoid_from_softmax_adds_only_the_bias(saved):
    with junk_in_new_memory():
        model, info = VitEmbedForContrastive.from_pretrained(
            saved["softmax"].folder, contrastive_loss="sigmoid", output_loading_info=True
        )
    assert reported(info, "missing_keys") == {"logit_bias"}
    assert model.logit_bias.item() == -10.0  # arXiv:2303.15343 section 3.2
    assert_equal_but(model, saved["softmax"].digests, set())


def test_any_one_missing_key_leaves_all_others(saved, tmp_path):
    """`_init_weights` sees the whole module of a missing key: none of its other parameters may start over."""
    folder = copied(saved["sigmoid"], tmp_path / "copy")
    state_dict = load_file(folder / "model.safetensors")
    first_of_its_kind = [key for key in state_dict if ".layers." not in key or ".layers.0." in key]
    assert len(first_of_its_kind) > 40
    with junk_in_new_memory():
        for key in first_of_its_kind:
            rest = {name: tensor for name, tensor in state_dict.items() if name != key}
            save_file(rest, folder / "model.safetensors", metadata={"format": "pt"})
            model, info = VitEmbedForContrastive.from_pretrained(folder, output_loading_info=True)
            assert reported(info, "missing_keys") == {key}
            assert_equal_but(model, saved["sigmoid"].digests, {key})


@pytest.fixture
def transformers_log(caplog):
    """What transformers tells the user, at the level it has by default."""
    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING, logger="transformers"):
        yield caplog
    transformers.utils.logging.disable_propagation()


def test_missing_and_left_over_keys_are_told(saved, tmp_path, transformers_log):
    VitEmbedForImageClassification.from_pretrained(saved["model"].folder)
    assert "classifier.weight" in transformers_log.text and "newly initialized" in transformers_log.text
    transformers_log.clear()
    folder = copied(saved["model"], tmp_path / "copy")
    weights = {**load_file(folder / "model.safetensors"), "stranger.weight": torch.ones(3)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    VitEmbedModel.from_pretrained(folder)
    assert "stranger.weight" in transformers_log.text


def test_mismatched_head_is_an_error_unless_allowed_and_then_reported(saved):
    folder = saved["classification"].folder
    with pytest.raises(RuntimeError, match="mismatch"):
        VitEmbedForImageClassification.from_pretrained(folder, num_labels=7)
    with junk_in_new_memory():
        model, info = VitEmbedForImageClassification.from_pretrained(
            folder, num_labels=7, ignore_mismatched_sizes=True, output_loading_info=True
        )
    head = {"classifier.weight", "classifier.bias"}
    assert reported(info, "mismatched_keys") == head
    assert model.classifier.weight.shape == (7, 32) and model.config.num_labels == 7
    assert_equal_but(model, saved["classification"].digests, head)


def test_mismatched_stem_leaves_the_class_token(saved):
    """The stem and the table change shape with the patch; the class token and the registers beside them do not."""
    with junk_in_new_memory():
        model, info = VitEmbedModel.from_pretrained(
            saved["registers"].folder, patch_size=16, ignore_mismatched_sizes=True, output_loading_info=True
        )
    reshaped = {"embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"}
    assert reported(info, "mismatched_keys") == reshaped
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


def resized_table(model: torch.nn.Module, to_grid: tuple[int, int]) -> torch.Tensor:
    table = model.trunk.embeddings.position_embedding.weight.detach()
    patches = interpolate_positions(table[1:], model.config.grid_size, to_grid, model.config.position_interpolation)
    return torch.cat([table[:1], patches])


@pytest.mark.parametrize("how", ["argument", "config"])
@pytest.mark.parametrize("image_size, to_grid", [(48, (6, 6)), ((24, 64), (3, 8)), ([64, 16], (8, 2))])
@pytest.mark.parametrize("name", ["model", "classification", "depth_deconv", "softmax"])
def test_another_image_size_resamples_the_positions(saved, name, image_size, to_grid, how):
    model_class, folder = CASES[name].model_class, saved[name].folder
    original = model_class.from_pretrained(folder)
    with junk_in_new_memory():
        if how == "argument":
            model, info = model_class.from_pretrained(folder, image_size=image_size, output_loading_info=True)
        else:
            config = VitEmbedConfig.from_pretrained(folder, image_size=image_size)
            before = copy.deepcopy(config)
            model, info = model_class.from_pretrained(folder, config=config, output_loading_info=True)
            assert config.to_dict() == before.to_dict()
    assert_clean(info)
    assert model.config.grid_size == to_grid
    table = model.trunk.embeddings.position_embedding.weight
    assert torch.equal(table, resized_table(original, to_grid)) and table.requires_grad
    changed = {key for key in saved[name].digests if key.endswith("embeddings.position_embedding.weight")}
    changed = {key for key in changed if "text_model" not in key}
    assert len(changed) == 1
    assert_equal_but(model, saved[name].digests, changed)


def test_resized_model_saves_its_new_size(saved, tmp_path):
    model = VitEmbedForContrastive.from_pretrained(saved["softmax"].folder, image_size=(24, 64))
    model.save_pretrained(tmp_path)
    again, info = VitEmbedForContrastive.from_pretrained(tmp_path, output_loading_info=True)
    assert_clean(info)
    assert digests(again) == digests(model) and again.config.image_shape == (24, 64)


def test_native_image_size_changes_nothing(saved):
    model = VitEmbedModel.from_pretrained(saved["model"].folder, image_size=(32, 32))
    assert digests(model) == saved["model"].digests


def test_bad_image_size_is_an_error(saved):
    with pytest.raises(ValueError, match="image_size must be a multiple of patch_size"):
        VitEmbedModel.from_pretrained(saved["model"].folder, image_size=30)


# Stock CLIP in, stock CLIP out


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    tiny.clip_model().save_pretrained(folder)
    return folder


def test_stock_clip_folder_loads(clip_folder):
    stock = digests(tiny.clip_model())
    with junk_in_new_memory():
        model, info = VitEmbedForContrastive.from_pretrained(clip_folder, output_loading_info=True)
        trunk, trunk_info = VitEmbedModel.from_pretrained(clip_folder, output_loading_info=True)
        text, text_info = VitEmbedTextModel.from_pretrained(clip_folder, output_loading_info=True)
        head, head_info = VitEmbedForImageClassification.from_pretrained(
            clip_folder, num_labels=7, output_loading_info=True
        )
    assert_clean(info)
    assert digests(model) == stock
    assert_clean(trunk_info)
    assert digests(trunk) == trunk_of(stock)
    assert_clean(text_info)
    assert digests(text) == {k.removeprefix("text_model."): v for k, v in stock.items() if k.startswith("text_model.")}
    assert reported(head_info, "missing_keys") == {"classifier.weight", "classifier.bias"}
    assert not reported(head_info, "unexpected_keys")
    assert digests(head.vision_model) == trunk_of(stock) and head.config.num_labels == 7


def test_stock_clip_vision_folder_loads(tmp_path):
    stock = tiny.randomised(CLIPVisionModel(CLIPVisionConfig(**tiny.VISION)))
    stock.save_pretrained(tmp_path)
    # transformers 4.57 keeps the trunk under "vision_model.", 5.x at the top.
    expected = {name.removeprefix("vision_model."): value for name, value in digests(stock).items()}
    with junk_in_new_memory():
        trunk, info = VitEmbedModel.from_pretrained(tmp_path, output_loading_info=True)
        depth, depth_info = VitEmbedForDepthEstimation.from_pretrained(tmp_path, output_loading_info=True)
    assert_clean(info)
    assert digests(trunk) == digests(depth.vision_model) == expected
    assert reported(depth_info, "missing_keys") == {k for k in digests(depth) if k.startswith("depth_head.")}
    assert not reported(depth_info, "unexpected_keys")
    with torch.no_grad():
        wanted = stock(tiny.pixels()).pooler_output
        actual = trunk(tiny.pixels()).pooler_output
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)  # float32 in another order of operations


def test_what_we_save_loads_in_stock_clip(saved, tmp_path):
    with junk_in_new_memory():
        stock, info = CLIPModel.from_pretrained(saved["softmax"].folder, output_loading_info=True)
    assert_clean(info)
    assert digests(stock) == saved["softmax"].digests
    stock.save_pretrained(tmp_path)
    assert digests(VitEmbedForContrastive.from_pretrained(tmp_path)) == saved["softmax"].digests
    expected = torch.load(f"{saved['softmax'].folder}.pt")
    ours = VitEmbedForContrastive.from_pretrained(saved["softmax"].folder)
    with torch.no_grad():
        inputs = {key: expected["inputs"][key] for key in ("pixel_values", "input_ids")}
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
    weights = load_file(tmp_path / "model.safetensors")
    weights["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    weights["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})

    model, info = VitEmbedForContrastive.from_pretrained(tmp_path, output_loading_info=True)
    assert_clean(info)
    assert digests(model) == digests(stock)
    for model_class in (VitEmbedModel, VitEmbedTextModel, VitEmbedForImageClassification):
        _, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not reported(info, "unexpected_keys")


@pytest.mark.parametrize("vocab_size", [100, 49408])
def test_legacy_end_token(tmp_path, vocab_size):
    """`eos_token_id=2` of configs before transformers 4.31: CLIP pools at the row's largest id."""
    text = {**tiny.TEXT, "vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    stock = tiny.randomised(CLIPModel(CLIPConfig(vision_config=tiny.VISION, text_config=text, projection_dim=20)))
    stock.save_pretrained(tmp_path)
    input_ids = tiny.tokens()
    input_ids[input_ids == tiny.EOS] = vocab_size - 1
    with torch.no_grad():
        wanted = stock(input_ids=input_ids, pixel_values=tiny.pixels()).text_embeds
        actual = VitEmbedForContrastive.from_pretrained(tmp_path).get_text_features(input_ids, normalize=True)
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)  # float32 in another order of operations


# The saved folder is complete


@pytest.mark.parametrize("name", AUTO_CASES)
def test_saved_folder_is_complete(saved, name):
    files = {path.name for path in saved[name].folder.iterdir()}
    companions = {"preprocessor_config.json", "modules.json", "sentence_bert_config.json"}
    assert files == {"config.json", "model.safetensors"} | companions | MODEL_CODE
    for code in MODEL_CODE:
        assert (saved[name].folder / code).read_bytes() == (REPO / code).read_bytes()
    auto_map = json.loads((saved[name].folder / "config.json").read_text())["auto_map"]
    assert auto_map == AUTO_MAP


def test_model_code_needs_only_torch_and_transformers():
    """Beside what those need themselves and what stands in `try`; each sibling import is one that transformers' text
    search finds."""
    assert "modeling_vit_embed.py" in MODEL_CODE
    siblings_of = {}
    for name in MODEL_CODE:
        tree = ast.parse((REPO / name).read_text())
        optional = {node for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
        siblings_of[name] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                assert node.attr != "register_buffer", name
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module and "." not in node.module and node in tree.body, name
                siblings_of[name].add(node.module + ".py")
                continue
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module]
            else:
                continue
            roots = {module.split(".")[0] for module in modules} if node not in optional else set()
            assert roots <= {"torch", "transformers", *DEPENDENCIES} | sys.stdlib_module_names, (
                f"{name} imports {roots}"
            )
    # transformers 4.57 copies only the direct imports of the entry file from a local folder.
    assert siblings_of["modeling_vit_embed.py"] == MODEL_CODE - {"modeling_vit_embed.py"}


# In other processes, with the code of the folder


def load_and_save_again(folders: dict, target: str | None) -> dict:
    """Loads every folder through its Auto class, twice, and saves it."""
    import os
    import sys

    import torch
    import transformers
    from fresh_process import auto_load, digests, junk_in_new_memory, outputs

    result = {}
    for name, (auto_class, folder, expected) in folders.items():
        with junk_in_new_memory():
            model, info = auto_load(auto_class, folder, output_loading_info=True)
            again = auto_load(auto_class, folder)
        expected = torch.load(expected)
        differences = [
            (actual.float() - wanted.float()).abs().max().item() / (1 + wanted.float().abs().max().item())
            for actual, wanted in zip(outputs(model, expected["inputs"]), expected["outputs"], strict=True)
        ]
        result[name] = {
            "class": type(model).__name__,
            "module": type(model).__module__.split(".")[0],
            "clean": not any(info.values()),
            "digests": digests(model),
            "two_loads_agree": digests(model) == digests(again),
            "difference": max(differences),
        }
        if target:
            model.save_pretrained(os.path.join(target, name))
    return {
        "models": result,
        "package_imported": "vit_embed" in sys.modules,
        "version": transformers.__version__,
    }


def assert_all_loaded(result: dict, saved: dict[str, Saved], names: list[str]) -> None:
    assert not result["package_imported"]
    assert list(result["models"]) == names
    for name, loaded in result["models"].items():
        assert loaded["class"] == CASES[name].model_class.__name__, name
        assert loaded["module"] == "transformers_modules", name
        assert loaded["clean"] and loaded["two_loads_agree"], name
        assert loaded["digests"] == saved[name].digests, name
        assert loaded["difference"] < 1e-5, name  # the same arithmetic, but alignment may pick another kernel


def assert_same_files(folder: Path, original: Path) -> None:
    assert {p.name for p in folder.iterdir()} == {p.name for p in original.iterdir()}
    for code in MODEL_CODE | {"preprocessor_config.json"}:
        assert (folder / code).read_bytes() == (original / code).read_bytes(), code
    auto_maps = [json.loads((path / "config.json").read_text())["auto_map"] for path in (folder, original)]
    assert auto_maps[0] == auto_maps[1]


def load_from_working_folders(folders: dict) -> dict:
    """Loads every folder as ".", having started in the first."""
    import os
    import sys

    from fresh_process import auto_load, digests

    result = {}
    for name, (auto_class, folder, _) in folders.items():
        os.chdir(folder)
        model = auto_load(auto_class, ".")
        result[name] = {"class": type(model).__name__, "digests": digests(model)}
    return {"models": result, "package_imported": "vit_embed" in sys.modules}


# One for each Auto class: transformers 5 keeps, for a whole process, the class that an Auto class first took from ".".
FROM_WORKING_FOLDER = ["sigmoid", "softmax", "classification", "depth_dpt", "backbone"]


def test_fresh_processes_offline_over_three_generations(saved, auto_folders, tmp_path):
    """Each process saves what it loaded by the folder's own code; the next loads that, the rest gone."""
    folders, originals = auto_folders, {name: saved[name].folder for name in AUTO_CASES}
    for generation in (2, 3):
        target = tmp_path / f"generation{generation}"
        result = run_fresh(
            load_and_save_again, tmp_path / f"home{generation}", folders=folders, target=str(target), cwd="/"
        )
        assert_all_loaded(result, saved, AUTO_CASES)
        for name in AUTO_CASES:
            assert_same_files(target / name, originals[name])
        shutil.rmtree(tmp_path / f"generation{generation - 1}", ignore_errors=True)
        shutil.rmtree(tmp_path / f"home{generation}")
        folders = {name: [auto, str(target / name), pt] for name, (auto, _, pt) in folders.items()}

    folders = {name: folders[name] for name in FROM_WORKING_FOLDER}
    first = folders[FROM_WORKING_FOLDER[0]][1]
    result = run_fresh(load_from_working_folders, tmp_path / "home4", folders=folders, cwd=first)
    assert not result["package_imported"]
    for name, loaded in result["models"].items():
        assert loaded["class"] == CASES[name].model_class.__name__
        assert loaded["digests"] == saved[name].digests


@pytest.mark.skipif(not OTHER_PYTHON, reason="VIT_EMBED_OTHER_PYTHON names no python with another transformers version")
def test_both_transformers_versions_load_each_others_folders(saved, auto_folders, tmp_path):
    result = run_fresh(
        load_and_save_again,
        tmp_path / "home1",
        python=OTHER_PYTHON,
        folders=auto_folders,
        target=str(tmp_path / "theirs"),
    )
    assert result["version"] != transformers.__version__
    assert_all_loaded(result, saved, AUTO_CASES)
    folders = {name: [auto, str(tmp_path / "theirs" / name), pt] for name, (auto, _, pt) in auto_folders.items()}
    result = run_fresh(load_and_save_again, tmp_path / "home2", folders=folders, target=None)
    assert_all_loaded(result, saved, AUTO_CASES)
    for name in AUTO_CASES:
        model = CASES[name].model_class.from_pretrained(tmp_path / "theirs" / name)
        assert digests(model) == saved[name].digests


def load_two(folders: list) -> list:
    from transformers import AutoModel

    return [type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ for folder in folders]


def test_one_and_two_towers_in_folders_of_the_same_name(saved, tmp_path):
    """transformers 5 takes folders of one name and one code for one model: the first class AutoModel finds wins."""
    one = copied(saved["model"], tmp_path / "one" / "checkpoint")
    two = copied(saved["softmax"], tmp_path / "two" / "checkpoint")
    classes = run_fresh(load_two, tmp_path / "home", folders=[str(one), str(two)])
    assert classes == ["VitEmbedModel", "VitEmbedForContrastive"]


def use_checkpoint(dual: str, heads: str) -> dict:
    """Goes from one dual encoder's folder to its heads' folders and back, as a user of the Auto classes does."""
    import os

    import numpy as np
    import torch
    from fresh_process import digests
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForDepthEstimation,
        AutoModelForImageClassification,
        AutoModelForZeroShotImageClassification,
        AutoProcessor,
    )

    trust = {"trust_remote_code": True}
    result = {"classes": {}, "processors": {}}
    for name, auto_class in {
        "contrastive": AutoModelForZeroShotImageClassification,
        "classification": AutoModelForImageClassification,
        "depth": AutoModelForDepthEstimation,
    }.items():
        folder = os.path.join(heads, name)
        auto_class.from_pretrained(dual, **trust).save_pretrained(folder)
        result["classes"][name] = type(AutoModel.from_pretrained(folder, **trust)).__name__
        result["processors"][name] = type(AutoImageProcessor.from_pretrained(folder)).__name__

    folder = os.path.join(heads, "contrastive")
    processor = AutoProcessor.from_pretrained(folder)
    result["processor"] = type(processor).__name__
    pictures = [np.full((40, 50, 3), value, dtype=np.uint8) for value in (0, 200)]
    batch = processor(text=["a cat", "dog"], images=pictures, return_tensors="pt", padding=True)
    result["input_ids"] = batch["input_ids"].tolist()
    model = AutoModel.from_pretrained(folder, **trust)
    result["logits"] = list(model(**batch).logits_per_image.shape)

    # Sizes and types through the Auto classes, as keywords and in a config object of the remote class.
    by_keyword = AutoModel.from_pretrained(folder, image_size=48, **trust)
    config = AutoConfig.from_pretrained(folder, **trust)
    config.image_size = [24, 64]
    by_config = AutoModel.from_pretrained(folder, config=config, **trust)
    classifier, info = AutoModelForImageClassification.from_pretrained(
        folder, image_size=48, num_labels=3, output_loading_info=True, **trust
    )
    result["missing"] = sorted(info["missing_keys"])
    result["resized"] = {"by_keyword": digests(by_keyword), "by_config": digests(by_config)}
    result["classifier_trunk"] = digests(classifier.vision_model)
    result["bfloat16"] = str(AutoModel.from_pretrained(folder, dtype=torch.bfloat16, **trust).dtype)
    return result


def test_a_dual_encoder_and_its_heads_keep_processor_and_tokenizer(saved, tmp_path):
    dual = copied(saved["softmax"], tmp_path / "dual")
    vocabulary = write_tokenizer(dual)
    mean = [0.1, 0.2, 0.3]
    processor = json.loads((dual / "preprocessor_config.json").read_text())
    (dual / "preprocessor_config.json").write_text(json.dumps({**processor, "image_mean": mean}))

    result = run_fresh(use_checkpoint, tmp_path / "home", dual=str(dual), heads=str(tmp_path / "heads"))

    model_class = {"classification": "VitEmbedModel", "depth": "VitEmbedModel", "contrastive": "VitEmbedForContrastive"}
    assert result["classes"] == model_class
    # Without torchvision transformers 5 loads the same file as its PIL variant.
    processors = {name: value.removesuffix("Pil").removesuffix("Fast") for name, value in result["processors"].items()}
    clip, dpt = "CLIPImageProcessor", "DPTImageProcessor"
    assert processors == {"contrastive": clip, "classification": clip, "depth": dpt}
    for name in model_class:
        head = tmp_path / "heads" / name
        files = {path.name for path in head.iterdir()}
        assert files & TOKENIZER_FILES == (TOKENIZER_FILES if name == "contrastive" else set())
        assert files >= MODEL_CODE
        kept = json.loads((head / "preprocessor_config.json").read_text())
        assert kept["image_mean"] == mean
        assert ("processor_class" in kept) == (name == "contrastive")
        has_tower = json.loads((head / "config.json").read_text())["text_config"] is not None
        assert has_tower == (name == "contrastive")
    for file in TOKENIZER_FILES:
        assert (tmp_path / "heads" / "contrastive" / file).read_bytes() == (dual / file).read_bytes()

    assert result["processor"] == "CLIPProcessor"
    texts = (["a</w>", "cat</w>", "<|endoftext|>", "<|endoftext|>"], ["d", "o", "g</w>", "<|endoftext|>"])
    ids = [[vocabulary[token] for token in ("<|startoftext|>", *text)] for text in texts]
    assert result["input_ids"] == ids
    assert result["logits"] == [2, 2]

    for how, image_size in {"by_keyword": 48, "by_config": (24, 64)}.items():
        assert result["resized"][how] == digests(VitEmbedForContrastive.from_pretrained(dual, image_size=image_size))
    assert result["missing"] == ["classifier.bias", "classifier.weight"]
    assert result["classifier_trunk"] == digests(VitEmbedModel.from_pretrained(dual, image_size=48))
    assert result["bfloat16"] == "torch.bfloat16"


def read_processor(folder: str) -> dict:
    """What AutoProcessor makes of a folder, in a process that knows it by its files alone."""
    import numpy as np
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    batch = processor(text=["a cat"], images=[np.full((40, 50, 3), 200, dtype=np.uint8)], return_tensors="pt")
    return {
        "class": type(processor).__name__,
        "input_ids": batch["input_ids"].tolist(),
        "pixels": list(batch["pixel_values"].shape) + batch["pixel_values"].mean(dim=(0, 2, 3)).tolist(),
    }


def test_what_openais_repos_leave_to_the_model_type_is_said(tmp_path):
    """Their processor files name no class and have sizes as one number; the type of ours says nothing of CLIP."""
    source = tmp_path / "clip"
    tiny.clip_model().save_pretrained(source)
    write_tokenizer(source)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    del settings["tokenizer_class"]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    old = {
        **{"crop_size": 32, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 32},
        **{"feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.4] * 3, "image_std": [0.3] * 3},
    }
    (source / "preprocessor_config.json").write_text(json.dumps(old))
    VitEmbedForContrastive.from_pretrained(source).save_pretrained(tmp_path / "ours")
    theirs, ours = (
        run_fresh(read_processor, tmp_path / "home", folder=str(each)) for each in (source, tmp_path / "ours")
    )
    assert theirs["class"] == "CLIPProcessor" and theirs["pixels"][:4] == [1, 3, 32, 32]
    assert ours == theirs

    for file in TOKENIZER_FILES:
        (source / file).unlink()
    VitEmbedForContrastive.from_pretrained(source).save_pretrained(tmp_path / "weights alone")
    assert not {path.name for path in (tmp_path / "weights alone").iterdir()} & TOKENIZER_FILES, "none came, none named"


def test_a_hub_that_gives_no_processor_is_named(tmp_path, monkeypatch, caplog):
    """Weights may be in the cache where the processor is not, and the network away."""

    def unreachable(*arguments, **options):
        raise OSError("no connection")

    monkeypatch.setattr(saving_vit_embed, "snapshot_download", unreachable)
    model = VitEmbedModel(tiny.vision_config())
    with caplog.at_level(logging.WARNING):
        model._processor_folder = saving_vit_embed.processor_folder("alice/photos", {})
    assert "the processor of alice/photos could not be fetched (no connection)" in caplog.text
    model.save_processor(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["image_mean"][0] == 0.48145466


def test_tokenizer_of_a_subfolder_is_carried(saved, tmp_path):
    write_tokenizer(copied(saved["softmax"], tmp_path / "checkpoints" / "dual"))
    model = VitEmbedForContrastive.from_pretrained(tmp_path / "checkpoints", subfolder="dual")
    model.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} >= TOKENIZER_FILES


def test_saving_leaves_files_that_are_there(saved, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"mine": true}')
    VitEmbedModel.from_pretrained(saved["model"].folder).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["mine"] is True
