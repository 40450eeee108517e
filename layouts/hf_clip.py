"""Layout "hf_clip": folders of transformers' CLIPModel and SiglipModel, and of their image towers alone."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch.nn import functional as F
from transformers import PretrainedConfig

from vit_embed import VitEmbedConfig, VitEmbedTextConfig
from vit_embed.configuration_vit_embed import CLIP_ARCHITECTURE, CLIP_TEXT_ARCHITECTURE, CLIP_VISION_FIELDS
from vit_embed.layouts.rules import (
    ConversionOptions,
    Layout,
    Restored,
    Rule,
    SampleInputs,
    SourceConfig,
    StateDict,
    as_class,
    as_float32,
    check_sizes,
    convert_weights,
    known,
    layer_rules,
    left_out,
    require,
    reverse_rules,
    rule,
)
from vit_embed.saving_vit_embed import IMAGE_PROCESSOR_FILE, image_processor_dict

# The folders that can be converted: the class that reads their config, by its `model_type`.
CONFIG_CLASSES = {
    "clip": "CLIPConfig",
    "clip_vision_model": "CLIPVisionConfig",
    "siglip": "SiglipConfig",
    "siglip_vision_model": "SiglipVisionConfig",
}
# Those whose weights look alike and cannot be, and why.
REFUSED = {
    "clip_text_model": "it is a text tower alone; convert the CLIPModel that it belongs to",
    "siglip_text_model": "it is a text tower alone; convert the SiglipModel that it belongs to",
    "siglip2": "its image tower takes flattened patches of any aspect ratio with a mask (NaFlex); the checkpoints of "
    "fixed size have model_type 'siglip'",
    "siglip2_vision_model": "its image tower takes flattened patches of any aspect ratio with a mask (NaFlex); the "
    "checkpoints of fixed size have model_type 'siglip'",
    "metaclip_2": "its texts end with token 2, which here is CLIP's legacy value for the largest id of a row",
    "chinese_clip": "its text tower is a BERT",
    "altclip": "its text tower is an XLM-RoBERTa",
    "clipseg": "it has a decoder of its own; only CLIPModel and its image tower can be converted",
    "owlvit": "it has detection heads; only CLIPModel and its image tower can be converted",
}

LAYER_NAMES = {
    name: name
    for name in (
        "layer_norm1.{p}",
        *(f"self_attn.{each}_proj.{{p}}" for each in ("q", "k", "v", "out")),
        "layer_norm2.{p}",
        "mlp.fc1.{p}",
        "mlp.fc2.{p}",
    )
}
# Of the image tower, below "vision_model." or, as transformers 5 saves image towers alone, below nothing.
TRUNK_NAMES = (
    "embeddings.class_embedding",
    "embeddings.patch_embedding.{p}",
    "embeddings.position_embedding.weight",
    "pre_layrnorm.{p}",
    "post_layernorm.{p}",
)
POOLER_NAMES = {
    "probe": ("probe",),
    "attention.in_proj_{p}": ("q_proj.{p}", "k_proj.{p}", "v_proj.{p}"),
    "attention.out_proj.{p}": ("out_proj.{p}",),
    "layernorm.{p}": ("layernorm.{p}",),
    "mlp.fc1.{p}": ("fc1.{p}",),
    "mlp.fc2.{p}": ("fc2.{p}",),
}
TEXT_NAMES = (
    "text_model.embeddings.token_embedding.weight",
    "text_model.embeddings.position_embedding.weight",
    "text_model.final_layer_norm.{p}",
)
TEXT_RULES = (
    *(rule(name, name) for name in TEXT_NAMES),
    *layer_rules("text_model.encoder.layers.{n}", "text_model.encoder.layers.{n}", LAYER_NAMES),
)
PROJECTION_RULE = rule("visual_projection.weight", "visual_projection.weight")
# Everything beside the image tower.
CLIP_HEAD_RULES = (
    PROJECTION_RULE,
    *TEXT_RULES,
    rule("text_projection.weight", "text_projection.weight"),
    rule("logit_scale", "logit_scale"),
)
SIGLIP_HEAD_RULES = (
    *TEXT_RULES,
    rule("text_model.head.{p}", "text_projection.{p}"),
    rule("logit_scale", "logit_scale", leading=1),
    rule("logit_bias", "logit_bias", leading=1),
)
CLASSIFIER_RULES = (rule("classifier.{p}", "classifier.{p}"),)
# Tables of numbers from 0 on, which transformers < 4.31 wrote beside the weights.
POSITION_ID_RULES = (Rule("text_model.embeddings.position_ids"), Rule("vision_model.embeddings.position_ids"))

# What SiglipModel takes for granted: fields of the config, those of the text tower as "text_config.NAME".
SIGLIP_ARCHITECTURE = {
    "stem_type": "conv",
    "patch_bias": True,
    "use_cls_token": False,
    "num_register_tokens": 0,
    "position_embedding_type": "learned",
    "norm_type": "layer_norm",
    "norm_position": "pre",
    "use_pre_layernorm": False,
    "qkv_bias": True,
    "layer_scale_init_value": None,
    "pooling_type": "map",
}
SIGLIP_DUAL_ARCHITECTURE = {"use_visual_projection": False, "contrastive_loss": "sigmoid"}
SIGLIP_TEXT_ARCHITECTURE = {"pooling_type": "last", "use_causal_mask": False, "projection_bias": True}

# Fields that a text tower's config shares by name with ours.
TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
SIGLIP_VISION_FIELDS = tuple(name for name in CLIP_VISION_FIELDS if name not in ("initializer_range", "projection_dim"))


def trunk_rules(prefix: str) -> tuple[Rule, ...]:
    """The rules of an image tower whose names start with `prefix`."""
    return (
        *(rule(prefix + name, f"vision_model.{name}") for name in TRUNK_NAMES),
        *layer_rules(f"{prefix}encoder.layers.{{n}}", "vision_model.encoder.layers.{n}", LAYER_NAMES),
        Rule(f"{prefix}embeddings.position_ids"),
    )


def pooler_rules(prefix: str) -> tuple[Rule, ...]:
    """The rules of SigLIP's attention pooling in it."""
    return tuple(
        rule(f"{prefix}head.{name}", *(f"vision_model.pooler.{each}" for each in targets))
        for name, targets in POOLER_NAMES.items()
    )


def detect(state_dict: StateDict, source_config: SourceConfig) -> str | None:
    """The keys of CLIPModel, SiglipModel or one of their towers, in separate q, k and v; or a config that is theirs."""
    model_type = source_config.get("model_type")
    if model_type in (*CONFIG_CLASSES, *REFUSED):  # a stranger's may be no text
        return f"its config.json says model_type {model_type!r}"
    prefix = _prefix(state_dict)
    has_keys = f"{prefix}encoder.layers.0.self_attn.q_proj.weight" in state_dict
    if model_type is not None or not has_keys or f"{prefix}embeddings.patch_embedding.weight" not in state_dict:
        return None
    return "it has the keys of transformers' CLIPModel"


def convert(
    state_dict: StateDict, source_config: SourceConfig, options: ConversionOptions
) -> tuple[VitEmbedConfig, dict[str, torch.Tensor]]:
    """A CLIPModel, a SiglipModel, an image tower of one, or a classifier on one.

    Args:
        state_dict: in the form of any transformers release, with or without its tables of position ids.
        source_config: config.json, needed: weights say neither heads nor activation nor eps.
        options: `hidden_act`, for a config that says the wrong one.

    Returns:
        The config, and the weights of VitEmbedForContrastive; VitEmbedModel of a CLIPVisionModel or SiglipVisionModel,
        VitEmbedModelWithProjection of a CLIPVisionModelWithProjection, VitEmbedForImageClassification of a
        CLIPForImageClassification or SiglipForImageClassification.

    Raises:
        ValueError: no config, a model that is none of these, or weights of other sizes than the config says.
    """
    model_type = _model_type(source_config)
    prefix = _prefix(state_dict)
    check_sizes(
        state_dict,
        {
            f"{prefix}embeddings.patch_embedding.weight": ("width", "channels", "patch height", "patch width"),
            f"{prefix}embeddings.position_embedding.weight": ("positions", "width"),
        },
        f"a checkpoint of transformers with model_type {model_type!r}",
    )
    source = as_class(source_config, CONFIG_CLASSES[source_config["model_type"]])
    is_classifier = "classifier.weight" in state_dict and not options.trunk_only
    siglip = model_type.startswith("siglip")
    config = (_siglip_config if siglip else _clip_config)(source, options, is_classifier)
    heads = SIGLIP_HEAD_RULES if siglip else CLIP_HEAD_RULES
    if options.trunk_only or model_type.endswith("vision_model"):
        config.architectures, config.text_config = ["VitEmbedModel"], None
        named = "CLIPVisionModelWithProjection" in (source_config.get("architectures") or ())
        if (named or "visual_projection.weight" in state_dict) and not options.trunk_only:
            config.architectures = ["VitEmbedModelWithProjection"]
    elif is_classifier:
        config.architectures, config.text_config = ["VitEmbedForImageClassification"], None
        _take_labels(config, source, state_dict["classifier.weight"])
    else:
        config.architectures = ["VitEmbedForContrastive"]
    dropped = {
        "VitEmbedForContrastive": (),
        "VitEmbedModelWithProjection": (),
        "VitEmbedForImageClassification": (),
        "VitEmbedModel": (*heads, *CLASSIFIER_RULES) if options.trunk_only else (),
    }[config.architectures[0]]
    rules = (*trunk_rules(prefix), *pooler_rules(prefix), *POSITION_ID_RULES)
    if is_classifier:
        rules = (*_unread_by_classifier(prefix, siglip), *rules)
    return config, convert_weights(
        config, state_dict, (*left_out(dropped), *rules, *heads, *CLASSIFIER_RULES), options.dtype
    )


def _prefix(state_dict: StateDict) -> str:
    return "" if "embeddings.patch_embedding.weight" in state_dict else "vision_model."


def _unread_by_classifier(prefix: str, siglip: bool) -> tuple[Rule, ...]:
    """What a classifier's image tower has and its logits do not read: they are of the mean of its last states, in
    SigLIP behind the last norm, in CLIP before it."""
    return left_out(pooler_rules(prefix)) if siglip else (Rule(f"{prefix}post_layernorm.{{p}}"),)


def _model_type(source_config: SourceConfig) -> str:
    model_type = source_config.get("model_type")
    if model_type in CONFIG_CLASSES:
        return model_type
    if model_type in REFUSED:
        raise ValueError(f"model_type {model_type!r} cannot be converted: {REFUSED[model_type]}")
    found = f"its config.json says model_type {model_type!r}" if source_config else "there is no config.json beside it"
    raise ValueError(
        f"a checkpoint of transformers needs its config.json with model_type {', '.join(CONFIG_CLASSES)}, which says "
        f"heads, activation and eps of the weights; {found}. Give the folder that it was saved to"
    )


def _vision(source: PretrainedConfig) -> PretrainedConfig:
    return getattr(source, "vision_config", source)


def _clip_config(source: PretrainedConfig, options: ConversionOptions, is_classifier: bool) -> VitEmbedConfig:
    config = VitEmbedConfig.from_dict(source.to_dict())
    config.converted_from = {"layout": "hf_clip"}
    for tower in (config, config.text_config):
        if tower is not None:
            tower.hidden_act = _activation(tower.hidden_act, options)
    if is_classifier:
        config.pooling_type, config.final_norm_type = "mean", "none"
    return config


def _activation(stated: str, options: ConversionOptions) -> str:
    return known(options.hidden_act, stated, "the activation", "--hidden_act")


def _siglip_config(source: PretrainedConfig, options: ConversionOptions, is_classifier: bool) -> VitEmbedConfig:
    vision = _vision(source)
    # transformers 4 knows this field only where a config.json has it.
    if not getattr(vision, "vision_use_head", True) and not is_classifier:
        raise ValueError(
            "this SigLIP image tower has no attention pooling (vision_use_head=false in its config.json), so nothing "
            "says what its pooled vector is; convert the checkpoint that it was taken from"
        )
    fields = {name: getattr(vision, name) for name in SIGLIP_VISION_FIELDS if hasattr(vision, name)}
    fields["hidden_act"] = _activation(vision.hidden_act, options)
    if isinstance(vision.image_size, int) and isinstance(vision.patch_size, int):
        fields["image_size"] = whole_patches(vision.image_size, vision.patch_size)
    pooling = {"pooling_type": "mean", "norm_before_pooling": True} if is_classifier else {"pooling_type": "map"}
    return VitEmbedConfig(
        **fields,
        **{**SIGLIP_ARCHITECTURE, **SIGLIP_DUAL_ARCHITECTURE, **pooling},
        projection_dim=vision.hidden_size,
        text_config=_siglip_text_config(source, options) if hasattr(source, "text_config") else None,
        converted_from={"layout": "hf_clip"},
    )


def _siglip_text_config(source: PretrainedConfig, options: ConversionOptions) -> VitEmbedTextConfig:
    text = source.text_config
    fields = {name: getattr(text, name) for name in TEXT_FIELDS}
    fields["hidden_act"] = _activation(text.hidden_act, options)
    # Google's configs leave these at CLIP's ids, beyond their vocabularies. Nothing reads them: the last place of a row
    # is its text.
    for name, instead in (("bos_token_id", None), ("eos_token_id", text.pad_token_id)):
        if not isinstance(fields[name], int) or fields[name] >= text.vocab_size:
            fields[name] = instead
    return VitEmbedTextConfig(**fields, **SIGLIP_TEXT_ARCHITECTURE, projection_dim=source.vision_config.hidden_size)


def whole_patches(image_size: int, patch_size: int) -> int:
    """The pixels of a side that patches cover: a convolution reads no remainder (384 with patches of 14 is 378)."""
    return image_size // patch_size * patch_size


def _take_labels(config: VitEmbedConfig, source: PretrainedConfig, classifier: torch.Tensor) -> None:
    config.num_labels = len(classifier)
    if len(source.id2label or ()) == len(classifier):
        config.id2label, config.label2id = source.id2label, source.label2id
    config.problem_type = source.problem_type


# Preprocessing


def image_processor(source_config: SourceConfig, config: VitEmbedConfig) -> dict[str, Any] | None:
    """SigLIP's own, where a folder has none: both sides resized, without a crop, to values in [-1, 1] (the
    preprocessor_config.json of google/siglip-base-patch16-224). None for CLIP's."""
    if not source_config["model_type"].startswith("siglip"):
        return None
    height, width = config.image_shape
    return {
        **image_processor_dict(config, "CLIPImageProcessor"),
        "size": {"height": height, "width": width},
        "do_center_crop": False,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }


# The way back


def restore(config: VitEmbedConfig, weights: StateDict) -> Restored:
    """A folder of CLIPModel, CLIPVisionModel or CLIPVisionModelWithProjection; with attention pooling, of SiglipModel
    or SiglipVisionModel. Names are those of every transformers release.

    Raises:
        ValueError: a model that none of them can compute; names every field.
    """
    siglip = config.pooling_type == "map"
    source_class, fields = (_siglip_form if siglip else _clip_form)(config)
    heads = SIGLIP_HEAD_RULES if siglip else CLIP_HEAD_RULES
    rules = (*trunk_rules("vision_model."), *pooler_rules("vision_model."), *heads)
    return Restored(
        reverse_rules(weights, rules),
        usage=f'transformers.{source_class}.from_pretrained("FILE")',
        weights_file="model.safetensors",
        files={"config.json": {"architectures": [source_class], **fields}},
    )


def _require_square(config: VitEmbedConfig, package: str) -> None:
    require(config, {"image_size": config.image_shape[0], "patch_size": config.patch_shape[0]}, package)


def _of_architecture(config: VitEmbedConfig, classes: dict[str, str], package: str) -> str:
    name = config.architectures[0]
    if name not in classes:
        raise ValueError(f"{package} has no class for a {name}; it has them for {', '.join(classes)}")
    return classes[name]


def _clip_form(config: VitEmbedConfig) -> tuple[str, dict[str, Any]]:
    """The class and its config.json."""
    package = "transformers' CLIPModel"
    classes = {
        "VitEmbedModel": "CLIPVisionModel",
        "VitEmbedModelWithProjection": "CLIPVisionModelWithProjection",
        "VitEmbedForContrastive": "CLIPModel",
    }
    source_class = _of_architecture(config, classes, package)
    needed = {**CLIP_ARCHITECTURE, "final_norm_type": _final_norm(config)}
    is_dual = source_class == "CLIPModel"
    if is_dual:
        needed.update({f"text_config.{name}": value for name, value in CLIP_TEXT_ARCHITECTURE.items()})
    else:
        del needed["contrastive_loss"]
        if source_class == "CLIPVisionModel":
            del needed["use_visual_projection"]
    require(config, needed, package)
    _require_square(config, package)
    vision = {name: getattr(config, name) for name in CLIP_VISION_FIELDS}
    if not is_dual:
        return source_class, {"model_type": "clip_vision_model", **vision}
    text = {name: getattr(config.text_config, name) for name in (*TEXT_FIELDS, *_INITIALISATION)}
    return source_class, {
        "model_type": "clip",
        "projection_dim": config.projection_dim,
        "logit_scale_init_value": config.logit_scale_init_value,
        "vision_config": {"model_type": "clip_vision_model", **vision},
        "text_config": {"model_type": "clip_text_model", **text, "projection_dim": config.projection_dim},
    }


_INITIALISATION = ("initializer_range", "initializer_factor")


def _final_norm(config: VitEmbedConfig) -> str | None:
    """What `final_norm_type` may say and be a LayerNorm."""
    return config.final_norm_type if config.resolved_final_norm_type == "layer_norm" else "layer_norm"


def _siglip_form(config: VitEmbedConfig) -> tuple[str, dict[str, Any]]:
    """The class and its config.json."""
    package = "transformers' SiglipModel"
    classes = {"VitEmbedModel": "SiglipVisionModel", "VitEmbedForContrastive": "SiglipModel"}
    source_class = _of_architecture(config, classes, package)
    needed = {**SIGLIP_ARCHITECTURE, "final_norm_type": _final_norm(config)}
    is_dual = source_class == "SiglipModel"
    if is_dual:
        needed.update(SIGLIP_DUAL_ARCHITECTURE)
        needed.update({f"text_config.{name}": value for name, value in SIGLIP_TEXT_ARCHITECTURE.items()})
    require(config, needed, package)
    _require_square(config, package)
    vision = {name: getattr(config, name) for name in SIGLIP_VISION_FIELDS if name != "initializer_factor"}
    if not is_dual:
        return source_class, {"model_type": "siglip_vision_model", **vision}
    text = {name: getattr(config.text_config, name) for name in TEXT_FIELDS}
    return source_class, {
        "model_type": "siglip",
        "vision_config": {"model_type": "siglip_vision_model", **vision},
        "text_config": {"model_type": "siglip_text_model", **text, "projection_size": config.projection_dim},
    }


# Running the source


def _source_class(source: PretrainedConfig, state_dict: StateDict) -> str:
    """The class of transformers that has these weights."""
    family = "Siglip" if source.model_type.startswith("siglip") else "CLIP"
    if "classifier.weight" in state_dict:
        return f"{family}ForImageClassification"
    if not source.model_type.endswith("vision_model"):
        return f"{family}Model"
    return f"{family}VisionModel" + ("WithProjection" if "visual_projection.weight" in state_dict else "")


@torch.no_grad()
def reference(
    state_dict: StateDict, source_config: SourceConfig, config: VitEmbedConfig, inputs: SampleInputs
) -> dict[str, torch.Tensor]:
    """What transformers' own class computes."""
    source = as_class(source_config, CONFIG_CLASSES[source_config["model_type"]])
    # The activation that was told may be another than the config says.
    _vision(source).hidden_act = config.hidden_act
    if config.text_config is not None:
        source.text_config.hidden_act = config.text_config.hidden_act
    model_class = _source_class(source, state_dict)
    if model_class.endswith("ForImageClassification"):
        source.num_labels = len(state_dict["classifier.weight"])
    with torch.device("meta"):
        model = getattr(transformers, model_class)(source).eval()
    _load(model, state_dict)
    pixel_values = with_remainder(inputs.pixel_values, (_vision(source).image_size,) * 2)
    if config.architectures == ["VitEmbedForImageClassification"]:
        return {"logits": model(pixel_values).logits}
    if config.architectures == ["VitEmbedModelWithProjection"]:
        return {"image_features": model(pixel_values).image_embeds}
    tower = getattr(model, "vision_model", model)
    last_hidden_states = []  # SigLIP's own are behind the last norm, ours before it, as CLIP's
    last_norm = getattr(tower, "vision_model", tower).post_layernorm
    if model_class.startswith("Siglip"):
        last_norm.register_forward_pre_hook(lambda module, states: last_hidden_states.append(states[0]))
    output = tower(pixel_values)
    if config.architectures == ["VitEmbedForContrastive"]:
        features = [output.pooler_output, model.text_model(inputs.input_ids).pooler_output]
        if model_class == "CLIPModel":
            features = [model.visual_projection(features[0]), model.text_projection(features[1])]
        logits = model(pixel_values=pixel_values, input_ids=inputs.input_ids).logits_per_image
        return {"image_features": features[0], "text_features": features[1], "logits_per_image": logits}
    last_hidden_states.append(output.last_hidden_state)
    return {"last_hidden_state": last_hidden_states[0], "pooler_output": output.pooler_output}


def with_remainder(pixel_values: torch.Tensor, image_shape: tuple[int, int]) -> torch.Tensor:
    """(B, C, H, W) -> (B, C, *image_shape): zeros where a convolution drops the pixels that fill no patch."""
    height, width = pixel_values.shape[-2:]
    return F.pad(pixel_values, (0, image_shape[1] - width, 0, image_shape[0] - height))


def _load(model: torch.nn.Module, state_dict: StateDict) -> None:
    """Fills a model of "meta", whose names may lack the prefix that the file has, or the other way around."""
    expected = set(model.state_dict())
    weights = {}
    for name, tensor in as_float32(_without_position_ids(state_dict)).items():
        bare = name.removeprefix("vision_model.")
        weights[next((each for each in (name, bare, f"vision_model.{name}") if each in expected), name)] = tensor
    model.load_state_dict(weights, assign=True)
    for module in model.modules():
        if getattr(module, "position_ids", None) is not None:
            module.position_ids = torch.arange(module.position_ids.shape[-1])[None]


def _without_position_ids(state_dict: StateDict) -> StateDict:
    return {name: tensor for name, tensor in state_dict.items() if not name.endswith("embeddings.position_ids")}


def restored_processor(files: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """The files of a folder of transformers with our image processor, which is one of its own."""
    return {**files, IMAGE_PROCESSOR_FILE: dict(preprocessor)}


LAYOUT = Layout(detect, convert, reference, ("hidden_act",), image_processor, restore, restored_processor)
