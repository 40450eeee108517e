"""Layout "hf_vit": ViT and DeiT of transformers (`ViTModel`, `DeiTModel` and what stands on them)."""

import math
from typing import Any

import torch
from transformers import PretrainedConfig

from vit_embed import VitEmbedConfig
from vit_embed.conversion.layouts.hf_trunk import (
    ATTENTION_NAMES,
    BARE_OPTIONS,
    NEW_ATTENTION_NAMES,
    Family,
    as_pair,
    embedding_rules,
    find_layers,
    find_prefix,
    has_query_bias,
    imagenet_image_processor,
    load,
    read_config,
    running_config,
    trunk_fields,
    trunk_outputs,
    without_heads,
)
from vit_embed.conversion.layouts.layout import (
    ConversionOptions,
    Converted,
    Layout,
    SampleInputs,
    SourceConfig,
    StateDict,
)
from vit_embed.conversion.layouts.questions import check_sizes
from vit_embed.conversion.layouts.rules import Rule, convert_weights, layer_rules, left_out, rule
from vit_embed.conversion.layouts.running import with_remainder
from vit_embed.conversion.messages import listing
from vit_embed.conversion.processor_files import BILINEAR, clip_image_processor, sides

FAMILIES = {
    "vit": Family("ViTConfig", "ViTModel", {"add_pooling_layer": False}, "ViTForImageClassification"),
    "deit": Family("DeiTConfig", "DeiTModel", {"add_pooling_layer": False}, "DeiTForImageClassification"),
    "vit_mae": Family("ViTMAEConfig", "ViTMAEModel", {}),
}
# What the classes put before the names of their trunk; a trunk saved alone has none of it.
PREFIXES = ("", "vit.", "deit.")

NORM_NAMES = {"layernorm_before.{p}": "layer_norm1.{p}", "layernorm_after.{p}": "layer_norm2.{p}"}
LAYER_NAMES = {
    **NORM_NAMES,
    **ATTENTION_NAMES,
    "intermediate.dense.{p}": "mlp.fc1.{p}",
    "output.dense.{p}": "mlp.fc2.{p}",
}
NEW_LAYER_NAMES = {**NORM_NAMES, **NEW_ATTENTION_NAMES, "mlp.fc1.{p}": "mlp.fc1.{p}", "mlp.fc2.{p}": "mlp.fc2.{p}"}
# Where the layers are, in files and in the memory of transformers 5, and the first matrix of their MLP.
STACKS = {"encoder.layer": "intermediate.dense.weight", "layers": "mlp.fc1.weight"}

CLASSIFIER_RULES = (rule("classifier.{p}", "classifier.{p}"),)
# Key prefixes of modules that we have no counterpart for.
WITH_TEACHER = "DeiTForImageClassificationWithTeacher, the mean of two classifiers on two tokens"
HEADS = {
    "pooler.": "the dense layer with tanh after the class token (ViTModel has none with add_pooling_layer=False)",
    "cls_classifier.": WITH_TEACHER,
    "distillation_classifier.": WITH_TEACHER,
    "decoder.": "the decoder of masked image modelling, which predicts hidden pixels",
}


def detect(state_dict: StateDict, source_config: SourceConfig) -> str | None:
    """The keys of ViT's embeddings, layers with `layernorm_before`, and no config of another model beside them."""
    prefix = find_prefix(state_dict, PREFIXES)
    layers = None if prefix is None else find_layers(state_dict, prefix, STACKS)
    if layers is None or f"{layers}.0.layernorm_before.weight" not in state_dict:
        return None
    if source_config and source_config.get("model_type") not in tuple(FAMILIES):
        return None
    return "it has the keys of transformers' ViT" + ("" if source_config else ", no config")


def convert(state_dict: StateDict, source_config: SourceConfig, options: ConversionOptions) -> Converted:
    """ViT or DeiT of transformers, a VitEmbedModel or a VitEmbedForImageClassification. `last_hidden_state` of ours is
    before the final norm, that of transformers after it.

    DeiT's distillation token becomes a register: ours have no position, so the sum of the token and its position, which
    is what DeiT computes, is stored.

    Args:
        state_dict: of ViTModel or DeiTModel without its pooler, or of the image classifier with one of them; with
            `trunk_only` of any class, its heads left out.
        source_config: the config.json of transformers. Without it `num_attention_heads`, `hidden_act` and
            `layer_norm_eps` have to be given.

    Raises:
        ValueError: a head or a pooler that has no place here, sizes that contradict each other or the config.
    """
    prefix = find_prefix(state_dict, PREFIXES)
    layers = None if prefix is None else find_layers(state_dict, prefix, STACKS)
    if layers is None:
        raise ValueError(f"not a ViT of transformers; its own keys are {listing(state_dict)}")
    source = read_config(source_config, FAMILIES)
    if not options.trunk_only and source is not None and source.model_type == "vit_mae":
        raise ValueError("a ViTMAEModel hides patches at random; convert the trunk, which sees all, with --trunk_only")
    state_dict = without_heads(state_dict, (prefix, ""), HEADS, options.trunk_only)
    is_classifier = "classifier.weight" in state_dict and not options.trunk_only
    config = _config(state_dict, prefix, layers, source, options, is_classifier)
    head_rules = left_out(CLASSIFIER_RULES) if options.trunk_only else CLASSIFIER_RULES
    folded = _without_token_positions(state_dict, prefix)
    return convert_weights(config, folded, (*_trunk_rules(prefix), *head_rules), options.dtype)


def _trunk_rules(prefix: str) -> tuple[Rule, ...]:
    return (
        *embedding_rules(prefix),
        rule(f"{prefix}embeddings.distillation_token", "vision_model.embeddings.register_tokens", leading=1),
        *layer_rules(f"{prefix}encoder.layer.{{n}}", "vision_model.encoder.layers.{n}", LAYER_NAMES),
        *layer_rules(f"{prefix}layers.{{n}}", "vision_model.encoder.layers.{n}", NEW_LAYER_NAMES),
    )


def _without_token_positions(state_dict: StateDict, prefix: str) -> StateDict:
    """DeiT's positions without the distillation token's, which is added to the token; other files as they are."""
    token, positions = f"{prefix}embeddings.distillation_token", f"{prefix}embeddings.position_embeddings"
    if token not in state_dict:
        return state_dict
    table = state_dict[positions]
    if state_dict[token].shape != (1, 1, table.shape[2]):
        raise ValueError(f"{token} must be (1, 1, {table.shape[2]}), got {tuple(state_dict[token].shape)}")
    return {
        **state_dict,
        token: state_dict[token].float() + table[:, 1:2].float(),
        positions: torch.cat([table[:, :1], table[:, 2:]], dim=1),
    }


def _config(
    state_dict: StateDict,
    prefix: str,
    layers: str,
    source: PretrainedConfig | None,
    options: ConversionOptions,
    is_classifier: bool,
) -> VitEmbedConfig:
    distilled = f"{prefix}embeddings.distillation_token" in state_dict
    if source is not None and (source.model_type == "deit") != distilled:
        has = "a" if distilled else "no"
        raise ValueError(f"config.json says model_type={source.model_type!r}, but there is {has} distillation token")
    mlp = f"{layers}.0.{STACKS[layers.removeprefix(prefix)]}"
    return VitEmbedConfig(
        **trunk_fields(state_dict, prefix, layers, mlp, 1 + distilled, source, options),
        **(_classifier_fields(state_dict, source) if is_classifier else {}),
        architectures=["VitEmbedForImageClassification" if is_classifier else "VitEmbedModel"],
        converted_from={"layout": "hf_vit"},
        num_register_tokens=int(distilled),
        qkv_bias=has_query_bias(state_dict, layers),
    )


def _classifier_fields(state_dict: StateDict, source: PretrainedConfig | None) -> dict[str, Any]:
    """The names of the classes that `classifier.weight` distinguishes.

    Raises:
        ValueError: the config names another number of classes.
    """
    check_sizes(state_dict, {"classifier.weight": ("classes", "width")}, "an image classifier of transformers")
    num_labels = state_dict["classifier.weight"].shape[0]
    if source is None:
        return {"num_labels": num_labels}
    if len(source.id2label) != num_labels:
        raise ValueError(
            f"config.json names {len(source.id2label)} classes in id2label, classifier.weight has {num_labels}"
        )
    return {"id2label": source.id2label, "label2id": source.label2id, "problem_type": source.problem_type}


def image_processor(source_config: SourceConfig, config: VitEmbedConfig) -> dict[str, Any]:
    """As the published ViTs were trained: the whole image made square, to [-1, 1]; DeiT as on ImageNet, cropped."""
    if config.num_register_tokens:
        return imagenet_image_processor(config)
    return clip_image_processor(
        config,
        resample=BILINEAR,
        size=sides(config.image_shape),
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


# Running the source


@torch.no_grad()
def reference(
    state_dict: StateDict, source_config: SourceConfig, config: VitEmbedConfig, inputs: SampleInputs
) -> dict[str, torch.Tensor]:
    """What transformers computes; raises ImportError for names that the installed release does not know."""
    model_type = "deit" if config.num_register_tokens else "vit"
    bare = {"model_type": model_type, "intermediate_size": config.intermediate_size}
    source = running_config(source_config, FAMILIES, config, bare)
    family = FAMILIES[source.model_type]
    prefix = find_prefix(state_dict, PREFIXES)
    trunk_alone = config.architectures == ["VitEmbedModel"]
    heads = {**HEADS, "embeddings.mask_token": "", **({"classifier.": ""} if trunk_alone else {})}
    state_dict = without_heads(state_dict, (prefix, ""), heads, trunk_only=True)
    pixel_values = with_remainder(inputs.pixel_values, as_pair(source.image_size))
    if not trunk_alone:
        source.num_labels = config.num_labels
        output = load(family.classifier, source, state_dict)(pixel_values, output_hidden_states=True)
        return {"last_hidden_state": output.hidden_states[-1], "logits": output.logits}
    arguments = {}
    if source.model_type == "vit_mae":  # it shuffles patches by noise, even where it hides none
        source.mask_ratio = 0.0
        num_patches = math.prod(config.grid_size)
        arguments["noise"] = torch.arange(num_patches).float().expand(len(inputs.pixel_values), -1)
    model = load(family.model, source, state_dict, **family.options)
    return trunk_outputs(model(pixel_values, output_hidden_states=True, **arguments))


LAYOUT = Layout(
    "hf_vit",
    detect,
    convert,
    reference,
    "transformers' own class",
    options=BARE_OPTIONS,
    image_processor=image_processor,
)
