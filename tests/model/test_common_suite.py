"""transformers' own common suite over every class, imported as a package and as remote code."""

import functools
import unittest
from typing import Any, NamedTuple

import common_suite
import pytest
import tiny
import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import vit_embed
from vit_embed.inputs_vit_embed import ChecksValues

modeling = common_suite.load("test_modeling_common")
backbone = common_suite.load("test_backbone_common")

LAYERS = 2  # the most that the suite takes for small
VISION = {**tiny.VISION, **tiny.DECODER, "num_hidden_layers": LAYERS, "projection_dim": 20, "num_labels": 5}
# OpenAI's vocabulary, as the suite leaves token ids at their defaults; 16 wide, as it bounds the parameters.
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
NUM_PATCHES, NUM_TEXT_TOKENS = 16, 16
NUM_HIDDEN_PATCHES = 12


def texts() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 90, (3, NUM_TEXT_TOKENS))
    ids[:, -1] = 49407
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def images() -> dict[str, torch.Tensor]:
    return {"pixel_values": tiny.pixels()}


class Case(NamedTuple):
    """A class in the suite.

    config, fields: what it is made from. inputs: what it is called with. labels: besides, to train; None for a class
    without a loss. sizes: what the suite compares shapes with, where it is not of the image tower. skips: tests that
    do not fit it, with the reason.
    """

    config: str = "VitEmbedConfig"
    fields: dict[str, Any] = VISION
    inputs: Any = images
    labels: Any = None
    sizes: dict[str, int] = {}
    skips: dict[str, str] = {}


NO_LOSS = dict.fromkeys(
    [
        "test_training",
        "test_training_gradient_checkpointing",
        "test_training_gradient_checkpointing_use_reentrant_false",
        "test_training_gradient_checkpointing_use_reentrant_true",
    ],
    "this class has no loss",
)
PLAIN_TENSOR = "get_image_features and get_text_features give a plain tensor on every version (PITFALLS 3)"
FEATURES = [
    *(f"test_get_{kind}_features_output_{number}" for kind in ("image", "text") for number in (0, 1, 2)),
    *(f"test_get_{kind}_features_{states}" for kind in ("image", "text") for states in ("hidden_states", "attentions")),
]
TOWERS = "the suite knows one tower; test_models looks at the states and attentions of both"
TEXT_SIZES = {"seq_length": NUM_TEXT_TOKENS, "hidden_size": 16, "num_attention_heads": 2}
CASES = {
    "VitEmbedModel": Case(skips=NO_LOSS),
    "VitEmbedModelWithProjection": Case(
        skips={**NO_LOSS, **dict.fromkeys([name for name in FEATURES if "_image_" in name], PLAIN_TENSOR)},
    ),
    "VitEmbedTextModel": Case("VitEmbedTextConfig", TEXT, texts, sizes=TEXT_SIZES, skips=NO_LOSS),
    "VitEmbedTextModelWithProjection": Case(
        "VitEmbedTextConfig",
        TEXT,
        texts,
        sizes=TEXT_SIZES,
        skips={**NO_LOSS, **dict.fromkeys([name for name in FEATURES if "_text_" in name], PLAIN_TENSOR)},
    ),
    "VitEmbedForImageClassification": Case(labels=lambda: {"labels": torch.tensor([0, 1, 2])}),
    "VitEmbedForDepthEstimation": Case(labels=lambda: {"labels": tiny.pixels()[:, 0].abs() + 0.5}),
    "VitEmbedForMaskedImageModeling": Case(
        inputs=lambda: {**images(), "bool_masked_pos": tiny.hidden_patches()},
        labels=dict,
        sizes={
            "seq_length": 1 + NUM_PATCHES - NUM_HIDDEN_PATCHES,  # what the trunk sees
            "num_masks": NUM_HIDDEN_PATCHES,
            "mask_length": NUM_PATCHES,
        },
        skips={
            "test_model_outputs_equivalence": "the suite subtracts outputs, one of which is a mask of bools; "
            "test_models compares tuple and dict"
        },
    ),
    "VitEmbedBackbone": Case(
        skips={
            **NO_LOSS,
            "test_retain_grad_hidden_states_attentions": "the suite takes the first output for a tensor; a backbone's "
            "is a tuple of maps",
        },
    ),
    "VitEmbedForContrastive": Case(
        fields={**VISION, "text_config": TEXT},
        inputs=lambda: {**images(), **texts()},
        labels=dict,
        skips={
            **dict.fromkeys(FEATURES, PLAIN_TENSOR),
            "test_attention_outputs": TOWERS,
            "test_correct_missing_keys": "the suite loads every class from the folder of its trunk; a trunk has no "
            "text tower, which the error names",
        },
    ),
}
# What takes most of the time and is the base class's: `make test` runs it on the class with both towers alone.
SLOW = ("test_eager_matches_sdpa_inference", "test_bc_torch_dtype")


class Sizes:
    """What the suite asks for sizes, a config and inputs."""

    batch_size = 3
    is_training = True
    num_hidden_layers = LAYERS
    hidden_size = VISION["hidden_size"]
    num_attention_heads = VISION["num_attention_heads"]
    image_size, patch_size = VISION["image_size"], VISION["patch_size"]
    seq_length = 1 + NUM_PATCHES

    def __init__(self, case: Case, config_class: type):
        self.case, self.config_class = case, config_class
        vars(self).update(case.sizes)

    def get_config(self):
        return self.config_class(**self.case.fields)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), self.case.inputs()


class Suite(modeling.ModelTesterMixin):
    """The suite for one class."""

    case: Case
    config_class: type
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = Sizes(self.case, self.config_class)
        # The suite pads texts on the left and adds some without an end.
        for base in self.all_model_classes[0].__mro__:
            if base.__name__ == ChecksValues.__name__:
                self.checks, base.input_checks = base, "never"

    def tearDown(self):
        self.checks.input_checks = "auto"

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        labels = self.case.labels() if return_labels and self.case.labels else {}
        return {**super()._prepare_for_class(inputs_dict, model_class), **labels}

    def test_model_get_set_embeddings(self):
        """As the suites of transformers' own image models: the input embedding is the stem's layer."""
        model = self.all_model_classes[0](self.model_tester.get_config())
        self.assertIsInstance(model.get_input_embeddings(), torch.nn.Module)
        other = torch.nn.Identity()
        model.set_input_embeddings(other)
        self.assertIs(model.get_input_embeddings(), other)


def skipped(reason: str):
    def skip(self):
        self.skipTest(reason)

    return skip


def heavy(test):
    """A copy with the mark: the test itself belongs to all suites."""

    @pytest.mark.heavy
    @functools.wraps(test)
    def run(self):
        test(self)

    return run


def suite_of(name: str, model_class: type, config_class: type, prefix: str) -> type:
    case, members = CASES[name], {}
    if name != "VitEmbedForContrastive":
        slow = {test: getattr(Suite, test) for test in dir(Suite) if test.startswith(SLOW)}
        # `parameterized` leaves None under the name of what it has made into several.
        members.update({each: heavy(test) for each, test in slow.items() if test is not None})
    members.update({test: skipped(reason) for test, reason in case.skips.items()})
    members.update(case=case, config_class=config_class, all_model_classes=(model_class,), __module__=__name__)
    return type(f"{prefix}{name}", (Suite, unittest.TestCase), members)


def remote_class(file: str, name: str) -> type:
    """A class of the repository as `trust_remote_code=True` gives it."""
    return get_class_from_dynamic_module(f"{file}.{name}", str(common_suite.REPO))


class BackboneSuite(backbone.BackboneTesterMixin):
    """The suite of backbones."""

    def setUp(self):
        self.model_tester = Sizes(CASES["VitEmbedBackbone"], self.config_class)


def suites() -> dict[str, type]:
    """By name: of every class, as it is imported and as remote code."""
    made = {}
    for name, case in CASES.items():
        own = getattr(vit_embed, name), getattr(vit_embed, case.config)
        remote = remote_class("modeling_vit_embed", name), remote_class("configuration_vit_embed", case.config)
        assert own[0] is not remote[0]
        for prefix, classes in (("TestOwn", own), ("TestRemote", remote)):
            suite = suite_of(name, *classes, prefix)
            # The code is the same; how it is imported matters to one class as to another.
            if prefix == "TestRemote" and name != "VitEmbedForContrastive":
                suite = pytest.mark.heavy(suite)
            made[suite.__name__] = suite
            if name == "VitEmbedBackbone":
                members = {"all_model_classes": classes[:1], "config_class": classes[1], "__module__": __name__}
                as_backbone = type(f"{prefix}AsBackbone", (BackboneSuite, unittest.TestCase), members)
                made[as_backbone.__name__] = as_backbone
    return made


globals().update(suites())


def test_every_class_is_in_the_suite():
    classes = {name for name in vit_embed.__all__ if name.startswith("VitEmbed") and not name.endswith("Config")}
    assert classes == set(CASES)


def test_every_skip_names_a_test_of_the_suite():
    for name, case in CASES.items():
        assert all(hasattr(modeling.ModelTesterMixin, test) for test in case.skips), name
