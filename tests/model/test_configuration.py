"""The config: its defaults, what it refuses and by which message, what it reads of CLIP's, what it writes."""

import inspect
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import stem_family
from stem_family import APPLIES, fields_for, other_value
from tiny import TEXT, VISION, dual_config, vision_config
from transformers import CLIPConfig, PretrainedConfig, PreTrainedModel

from vit_embed import VitEmbedConfig, VitEmbedForContrastive, VitEmbedModel, VitEmbedTextConfig
from vit_embed import options_vit_embed as options
from vit_embed.configuration_vit_embed import AUTO_MAP, FIELDS, TEXT_FIELDS, reject_misspelled
from vit_embed.options_vit_embed import OPTIONS

REPO = Path(__file__).parents[2]


def test_defaults_are_openai_clip_vit_b_16():
    config, text = VitEmbedConfig(), VitEmbedTextConfig()
    sizes = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
    assert sizes == (768, 12, 12, 3072) and config.grid_size == (14, 14) and config.text_config is None
    assert (text.vocab_size, text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (49408, 512, 12, 8)
    assert (text.max_position_embeddings, text.eos_token_id) == (77, 49407)


# Of each check: values in range, and values out of it.
CHECKS = {
    options.COUNT: ((1, 7), (0, -1, 2.0, True)),
    options.integer(0): ((0, 3), (-1, 0.0, False)),
    options.one_of(options.HIDDEN_ACTS): (("gelu",), ("swish", None)),
    options.optional(options.COUNT): ((None, 1), (0, "1")),
    options.FLAG: ((True, False), ("yes", None)),
    options.RATE: ((0, 0.5), (1.0, -0.1, "0.1", math.nan)),
    options.POSITIVE: ((1e-9, 3), (0, -1.0, math.inf, math.nan)),
    options.NOT_NEGATIVE: ((0, 0.5), (-0.5, "0.5", math.inf, math.nan)),
    options.PIXELS: ((8, (4, 8), [8, 4]), (0, True, (32, 32, 32), 8.0, (8, -8), (8, True))),
    options.EVEN: ((2, 6), (3, 4.0, 0)),
    options.LOG_SCALE: ((-2.0, 4.6052), ("x", 9.0)),
    options.JSON_DICT: (
        (None, {"layout": "timm", "names": ["a", None]}),
        ("timm", ["timm"], {"layout": object()}, {"sizes": (1, 2)}, {1: "one"}, {"scale": math.nan}),
    ),
    options.STEM_SHARE: ((0.25, 1), (0.2, 1.1, "half", math.nan)),
}
# Fields of which the config makes something, and those that are only written.
UNCHECKED = {"backbone_config", "out_features", "out_indices", "text_config"}
UNCHECKED_OF_TEXTS = {"initializer_range", "initializer_factor", "bos_token_id", "pad_token_id"}


@pytest.mark.parametrize(("check", "values"), CHECKS.items(), ids=[check.must_be for check in CHECKS])
def test_what_a_check_accepts(check, values):
    accepted, refused = values
    assert all(map(check.accepts, accepted)) and not any(map(check.accepts, refused))


@pytest.mark.parametrize("option", (*OPTIONS, *options.TEXT_OPTIONS), ids=lambda option: option.name)
def test_a_value_out_of_range_is_refused_by_the_name_of_its_field(option):
    of_text = option in options.TEXT_OPTIONS
    if option.check is options.ANYTHING:
        assert option.name in (UNCHECKED_OF_TEXTS if of_text else UNCHECKED)
        return
    wrong = [object()] if option.check is options.LOG_SCALE else [object(), -2.0]
    wrong += [1.0] if option.name.endswith(("_prob", "_rate", "_ratio", "_dropout")) else []
    is_count = type(option.default) is int and option.default > 0 and not option.name.endswith("_token_id")
    for value in wrong + ([0] if is_count else []):
        with pytest.raises(option.check.error, match=re.escape(f"{option.name} must be {option.check.must_be} got")):
            VitEmbedTextConfig(**{**TEXT, option.name: value}) if of_text else vision_config(**{option.name: value})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 33}, "hidden_size.*num_attention_heads.*hidden_size=33.*num_attention_heads=4"),
        (
            {"depth_gradient_weight": 0.5, "depth_activation": "identity", "depth_loss": "l1"},
            "depth_gradient_weight=0.5 compares logarithms .* depth_activation='identity'; set depth_gradient_weight=0",
        ),
        (
            {"depth_activation": "identity", "max_depth": 10.0},
            "max_depth=10.0 bounds a positive depth, but depth_activation='identity'",
        ),
        ({"problem_type": "foo"}, "problem_type"),
        ({"use_visual_projection": False}, "use_visual_projection=False.*projection_dim=20 and hidden_size=32"),
        ({"image_size": 30}, "image_size must be a multiple of patch_size, got image_size=30 and patch_size=8"),
        ({"image_size": (32, 30)}, r"image_size=\(32, 30\)"),
        ({"out_indices": [9]}, r"out_indices must be in \[-5, 4\], got \[9\]"),
        ({"out_features": ["stage9"]}, r"out_features must be among .*got \['stage9'\]"),
        ({"out_features": ["stage1"], "out_indices": [2]}, "name different stages"),
    ],
)
def test_values_without_a_meaning_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        vision_config(**overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"eos_token_id": 100}, "eos_token_id must be below vocab_size, got eos_token_id=100 and vocab_size=100"),
        ({"hidden_size": 25}, "num_attention_heads=3"),
        ({"pooling_type": "first"}, "pooling_type='first'.*use_causal_mask=True"),
        (
            {"pooling_type": "last", "pad_token_id": None},
            r"pooling_type='last' reads the padding.*pad_token_id must be in \[0, vocab_size=100\).*pad_token_id=None",
        ),
        ({"pooling_type": "last", "pad_token_id": 100}, "pooling_type='last'.*got pad_token_id=100"),
        (
            {"use_causal_mask": False, "pad_token_id": None},
            "use_causal_mask=False reads the padding.*pad_token_id=None",
        ),
    ],
)
def test_text_values_without_a_meaning_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        VitEmbedTextConfig(**{**TEXT, **overrides})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("patchsize", "no field 'patchsize'; did you mean 'patch_size'"),
        ("hidden_dropout_probs", "no field 'hidden_dropout_probs'; did you mean 'hidden_dropout_prob'"),
        # Another library's name.
        ("num_layers", "no field 'num_layers'; here it is 'num_hidden_layers'"),
        ("embed_dim", "no field 'embed_dim'; here it is 'hidden_size'"),
    ],
)
def test_a_misspelled_field_is_refused(name, message):
    with pytest.raises(TypeError, match=message):
        VitEmbedConfig(**{name: 3})


@pytest.mark.parametrize(
    "overrides",
    [
        {"out_indices": 1},
        {"out_features": "stage1"},
        {"text_config": "x"},
    ],
)
def test_values_of_the_wrong_type_are_refused(overrides):
    with pytest.raises(TypeError, match=next(iter(overrides))):
        vision_config(**overrides)


def test_keys_of_another_release_pass():
    config = VitEmbedConfig(some_future_option=True, transformers_version="9.0", torch_dtype="float32")
    assert config.some_future_option is True


def test_a_field_set_later_is_checked_when_the_model_is_made():
    config = vision_config()
    config.stem_type = "typo"
    with pytest.raises(ValueError, match="stem_type must be one of"):
        VitEmbedModel(config)


def test_overrides_at_load_are_checked(tmp_path):
    vision_config().save_pretrained(tmp_path)
    assert VitEmbedConfig.from_pretrained(tmp_path, image_size=[64, 32]).grid_size == (8, 4)
    with pytest.raises(ValueError, match="image_size=33"):
        VitEmbedConfig.from_pretrained(tmp_path, image_size=33)


def test_fields_of_a_tower_are_given_as_clips_config_takes_them(tmp_path):
    dual_config().save_pretrained(tmp_path)
    changed = VitEmbedConfig.from_pretrained(tmp_path, vision_config={"attention_dropout": 0.1})
    assert changed.attention_dropout == 0.1 and changed.hidden_size == dual_config().hidden_size


def test_the_text_tower_can_be_added_later():
    config = vision_config()
    config.text_config = dict(TEXT)
    assert isinstance(config.text_config, VitEmbedTextConfig)
    config.update({"text_config": {**TEXT, "num_hidden_layers": 1}})
    assert config.text_config.num_hidden_layers == 1
    model = VitEmbedForContrastive._from_config(config, attn_implementation="eager")
    assert model.text_model.config._attn_implementation == "eager"


def test_a_misspelled_option_of_from_pretrained_is_named(tmp_path):
    VitEmbedModel(vision_config()).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="VitEmbedModel has no field 'poolling_type'; did you mean 'pooling_type'"):
        VitEmbedModel.from_pretrained(tmp_path, poolling_type="mean")


def test_no_option_of_transformers_is_taken_for_misspelled():
    parameters = inspect.signature(PreTrainedModel.from_pretrained).parameters
    options = {*parameters, *re.findall(r"^ {12}(\w+) \(", PreTrainedModel.from_pretrained.__doc__, re.MULTILINE)}
    assert {"cache_dir", "device_map", "attn_implementation"} <= options
    for config_class in (VitEmbedConfig, VitEmbedTextConfig):
        reject_misspelled(dict.fromkeys(options), config_class.field_names, "VitEmbedModel")


def test_a_config_can_be_made_of_its_dict():
    """CLIP's vision_config, which is written for stock CLIPModel, holds nothing that the fields do not."""
    written = dual_config().to_dict()
    assert "vision_config" in written
    assert VitEmbedConfig(**written).to_dict() == written


# A source in all that JSON can say, and under names that transformers has a use for.
ORIGIN = {
    "layout": "timm",
    "names": {"blocks.0.norm1.weight": ["encoder.layers.0.layer_norm1.weight", None]},
    "dtype": "bfloat16",
    "transformers_version": "4.0.0",
    "architectures": ["vit_base"],
    "scale": 0.5,
    "count": 3,
    "sure": True,
}

# Values other than the defaults, for every field there is: those that go together, and those that need another.
CHANGED = {
    "general": {
        **{option.name: other_value(option) for option in OPTIONS if option.applies_when is None},
        **{"stem_type": "linear", "position_embedding_type": "learned", "position_interpolation": "bilinear"},
        **{"hidden_size": 24, "projection_dim": 24, "num_attention_heads": 4, "token_merge_size": 2},
        **{"image_size": (32, 64), "patch_size": (8, 16), "pooling_type": "map", "depth_activation": None},
        **{"out_features": ["stem", "stage3"], "out_indices": [0, 3], "converted_from": ORIGIN},
        "text_config": {option.name: other_value(option) for option in options.TEXT_OPTIONS}
        | {**TEXT, "pooling_type": "last", "pad_token_id": 7},
    },
    "raw depth": {"depth_activation": "identity"},
    **{field: {**fields_for(*option.applies_when), field: other_value(option)} for field, option in APPLIES.items()},
}


@pytest.mark.parametrize("changed", [{}, *CHANGED.values()], ids=["none", *CHANGED])
def test_every_field_survives_saving(changed, tmp_path):
    assert set().union(*CHANGED.values()) == set(FIELDS), "a new field belongs into this table"
    config = VitEmbedConfig(**changed)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["auto_map"] == AUTO_MAP and "sub_configs" not in written
    assert (tmp_path / "configuration_vit_embed.py").exists()
    loaded = VitEmbedConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    for name, value in changed.items():
        found = getattr(loaded, name)
        if isinstance(found, PretrainedConfig):
            value = value if isinstance(value, dict) else value.to_dict()
            found = {key: entry for key, entry in found.to_dict().items() if key in value}
        assert found == value, name
    assert set(TEXT) < set(TEXT_FIELDS)


def test_saved_stages_stay_what_they_are_when_the_stem_gives_more_maps(tmp_path):
    """Three maps of the stem go in front of the stages, so that their numbers change, and their names do not."""
    saved = vision_config(stem_type="hybrid", backbone_config=stem_family.RESNET, out_indices=[1, -1])
    saved.save_pretrained(tmp_path)
    maps = {"backbone_config": stem_family.CONVNEXT_MAPS, **stem_family.PYRAMID}
    loaded = VitEmbedConfig.from_pretrained(tmp_path, **maps)
    assert saved.out_features == loaded.out_features == ["stage1", saved.stage_names[-1]]
    assert (saved.out_indices[0], loaded.out_indices[0]) == (1, 4)
    assert VitEmbedConfig.from_pretrained(tmp_path, out_indices=[1], **maps).out_features == ["pyramid2"]
    assert VitEmbedConfig.from_pretrained(tmp_path, out_features=["stem"], **maps).out_indices == [3]
    saved_by_number = {**saved.to_dict(), "out_features": None, "out_indices": [1, 2]}
    assert VitEmbedConfig.from_dict(saved_by_number).out_features == ["stage1", "stage2"], "as before they had names"


def test_a_clip_config_is_read_as_it_is(tmp_path):
    clip = CLIPConfig(vision_config={**VISION, "hidden_act": "gelu"}, text_config=TEXT, projection_dim=20)
    clip.save_pretrained(tmp_path)
    vision = {**VISION, "hidden_act": "gelu", "projection_dim": 20}
    for config in (VitEmbedConfig.from_dict(clip.to_dict()), VitEmbedConfig.from_pretrained(tmp_path)):
        assert {name: getattr(config, name) for name in vision} == vision
        assert {name: getattr(config.text_config, name) for name in TEXT} == TEXT
    assert VitEmbedConfig.from_dict({"model_type": "clip"}).patch_size == 32, "CLIPVisionConfig's own default"


def test_square_sizes_are_one_number():
    config = dual_config(image_size=[32, 32], patch_size=(8, 8))
    assert (config.image_size, config.patch_size) == (32, 8)
    assert config.to_dict()["vision_config"]["image_size"] == 32


@pytest.mark.parametrize(
    "fields",
    [
        {"image_size": (32, 64)},
        {"num_register_tokens": 2},
        {"final_norm_type": "none"},
        {"use_visual_projection": False, "projection_dim": VISION["hidden_size"]},
        {"pooling_type": "mean", "norm_before_pooling": True},
        {"text_config": {**TEXT, "pooling_type": "last"}},
        {"text_config": {**TEXT, "use_causal_mask": False}},
        {"text_config": {**TEXT, "projection_bias": True}},
    ],
)
def test_a_config_outside_clip_is_none_of_clips(fields):
    config = dual_config(**fields)
    assert config.to_clip_vision_config() is None and "vision_config" not in config.to_dict()
    assert (config.vision_only().to_clip_vision_config() is None) == ("text_config" not in fields)
    assert dual_config().to_clip_vision_config()["hidden_size"] == VISION["hidden_size"]


def test_the_origin_of_a_checkpoint_is_copied_and_kept():
    origin = {"layout": "timm", "names": ["a"]}
    config = dual_config(converted_from=origin)
    origin["names"].append("b")
    assert config.converted_from == {"layout": "timm", "names": ["a"]}
    assert config.vision_only().converted_from == config.converted_from
    assert vision_config().converted_from is None
    config.converted_from = {"names": {1}}
    with pytest.raises(TypeError, match="converted_from must be None, or a dict that JSON gives back unchanged"):
        VitEmbedForContrastive(config)


@pytest.mark.parametrize(
    ("stock", "ours"),
    [("CLIPVisionModelWithProjection", ["VitEmbedModelWithProjection"]), ("CLIPVisionModel", None), (None, None)],
)
def test_the_architecture_of_a_clip_vision_config_decides_whether_it_projects(stock, ours):
    named = {} if stock is None else {"architectures": [stock]}
    config = VitEmbedConfig.from_dict({"model_type": "clip_vision_model", "projection_dim": 20, **named})
    assert config.architectures == ours and config.projection_dim == 20 and config.patch_size == 32


def test_contrastive_without_a_text_tower_is_refused():
    with pytest.raises(ValueError, match="text_config is None"):
        VitEmbedForContrastive(vision_config())


def test_config_needs_no_torch(tmp_path):
    """`AutoConfig` works where transformers is installed and torch is not."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from transformers import AutoConfig\n"
        f"config = AutoConfig.from_pretrained({str(REPO)!r}, trust_remote_code=True)\n"
        f"config.save_pretrained({str(tmp_path)!r})\n"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "config.json").exists()
