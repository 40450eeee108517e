"""Layout "hf_clip": folders of transformers' CLIPModel and SiglipModel, and of their image towers alone.

What is SigLIP's is in hf_siglip.py, what both have in hf_towers.py.
"""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig

from vit_embed import VitEmbedConfig
from vit_embed.configuration_vit_embed import CLIP_ARCHITECTURE, CLIP_TEXT_ARCHITECTURE
from vit_embed.conversion.layouts import hf_siglip
from vit_embed.conversion.layouts.hf_towers import (
    TEXT_FIELDS,
    TEXT_RULES,
    VISION_FIELDS,
    source_class,
    trunk_rules,
    vision_part,
)
from vit_embed.conversion.layouts.layout import (
    ConversionOptions,
    Converted,
    Layout,
    Restored,
    SampleInputs,
    SourceConfig,
    StateDict,
)
from vit_embed.conversion.layouts.questions import (
    check_sizes,
    layer_norm_at_end,
    read_transformers_config,
    require,
    resolve,
)
from vit_embed.conversion.layouts.rules import Rule, convert_weights, left_out, reverse_rules, rule
from vit_embed.conversion.layouts.running import as_float32, with_remainder
from vit_embed.conversion.processor_files import IMAGE_PROCESSOR_FILE

PACKAGE = "transformers' CLIPModel"
# The folders that can be converted: the class that reads their config, by its `model_type`.
CONFIG_CLASSES = {
    "clip": "CLIPConfig",
    "clip_vision_model": "CLIPVisionConfig",
    "siglip": "SiglipConfig",
    "siglip_vision_model": "SiglipVisionConfig",
}
NAFLEX = "its image tower takes flattened patches of any aspect ratio with a mask (NaFlex); the checkpoints of fixed "
NAFLEX += "size have model_type 'siglip'"
# Model types with similar keys that cannot be converted, and why.
REFUSED = {
    "clip_text_model": "it is a text tower alone; convert the CLIPModel that it belongs to",
    "siglip_text_model": "it is a text tower alone; convert the SiglipModel that it belongs to",
    "siglip2": NAFLEX,
    "siglip2_vision_model": NAFLEX,
    "metaclip_2": "its texts end with token 2, which here is CLIP's legacy value for the largest id of a row",
    "chinese_clip": "its text tower is a BERT",
    "altclip": "its text tower is an XLM-RoBERTa",
    "clipseg": "it has a decoder of its own; only CLIPModel and its image tower can be converted",
    "owlvit": "it has detection heads; only CLIPModel and its image tower can be converted",
}
# Our class for each of CLIP's that has a way back.
CLASSES = {
    "VitEmbedModel": "CLIPVisionModel",
    "VitEmbedModelWithProjection": "CLIPVisionModelWithProjection",
    "VitEmbedForContrastive": "CLIPModel",
}

# Everything beside the image tower.
HEAD_RULES = (
    rule("visual_projection.weight", "visual_projection.weight"),
    *TEXT_RULES,
    rule("text_projection.weight", "text_projection.weight"),
    rule("logit_scale", "logit_scale"),
)
CLASSIFIER_RULES = (rule("classifier.{p}", "classifier.{p}"),)
# Tables of numbers from 0 on, which transformers < 4.31 wrote beside the weights.
POSITION_ID_RULES = (Rule("text_model.embeddings.position_ids"), Rule("vision_model.embeddings.position_ids"))
INITIALISATION_FIELDS = ("initializer_range", "initializer_factor")


def detect(state_dict: StateDict, source_config: SourceConfig) -> str | None:
    """The keys of CLIPModel, SiglipModel or one of their towers, in separate q, k and v; or a config that is theirs."""
    model_type = source_config.get("model_type")
    if model_type in (*CONFIG_CLASSES, *REFUSED):
        return f"its config.json says model_type {model_type!r}"
    prefix = _prefix(state_dict)
    has_keys = f"{prefix}encoder.layers.0.self_attn.q_proj.weight" in state_dict
    if model_type is not None or not has_keys or f"{prefix}embeddings.patch_embedding.weight" not in state_dict:
        return None
    return "it has the keys of transformers' CLIPModel"


def convert(state_dict: StateDict, source_config: SourceConfig, options: ConversionOptions) -> Converted:
    """A CLIPModel or SiglipModel (a VitEmbedForContrastive), an image tower of one (a VitEmbedModel, with CLIP's
    projection a VitEmbedModelWithProjection), or a classifier on one (a VitEmbedForImageClassification).

    Args:
        state_dict: in the form of any transformers release, with or without its tables of position ids.
        source_config: config.json, needed: weights show neither heads nor activation nor eps.
        options: `hidden_act`, for a config that says the wrong one.

    Raises:
        ValueError: no config, a model that is none of these, or weights of other sizes than the config says.
    """
    model_type = _model_type(source_config)
    prefix = _prefix(state_dict)
    sizes = {
        f"{prefix}embeddings.patch_embedding.weight": ("width", "channels", "patch height", "patch width"),
        f"{prefix}embeddings.position_embedding.weight": ("positions", "width"),
    }
    check_sizes(state_dict, sizes, f"a checkpoint of transformers with model_type {model_type!r}")
    source = read_transformers_config(source_config, CONFIG_CLASSES[model_type])
    is_classifier = "classifier.weight" in state_dict and not options.trunk_only
    siglip = model_type.startswith("siglip")
    config = (hf_siglip.read_config if siglip else _read_config)(source, options, is_classifier)
    config.architectures = [_our_class(state_dict, source_config, model_type, options)]
    heads = (*(hf_siglip.HEAD_RULES if siglip else HEAD_RULES), *CLASSIFIER_RULES)
    rules = (*trunk_rules(prefix), *hf_siglip.pooler_rules(prefix), *POSITION_ID_RULES)
    if config.architectures != ["VitEmbedForContrastive"]:
        config.text_config = None
    if is_classifier:
        _take_labels(config, source, state_dict["classifier.weight"])
        rules = (*_unread_by_classifier(prefix, siglip), *rules)
    if options.trunk_only:
        heads = left_out(heads)
    return convert_weights(config, state_dict, (*rules, *heads), options.dtype)


def _prefix(state_dict: StateDict) -> str:
    return "" if "embeddings.patch_embedding.weight" in state_dict else "vision_model."


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


def _our_class(state_dict: StateDict, source_config: SourceConfig, model_type: str, options: ConversionOptions) -> str:
    if options.trunk_only:
        return "VitEmbedModel"
    if model_type.endswith("vision_model"):
        named = "CLIPVisionModelWithProjection" in (source_config.get("architectures") or ())
        has_projection = named or "visual_projection.weight" in state_dict
        return "VitEmbedModelWithProjection" if has_projection else "VitEmbedModel"
    return "VitEmbedForImageClassification" if "classifier.weight" in state_dict else "VitEmbedForContrastive"


def _read_config(source: PretrainedConfig, options: ConversionOptions, is_classifier: bool) -> VitEmbedConfig:
    """Ours for a CLIPConfig or a CLIPVisionConfig. A classifier reads the mean of the patches' last states."""
    config = VitEmbedConfig.from_dict(source.to_dict())
    config.converted_from = {"layout": "hf_clip"}
    for tower in (config, config.text_config):
        if tower is not None:
            tower.hidden_act = resolve(options, "hidden_act", tower.hidden_act)
    if is_classifier:
        config.pooling_type, config.final_norm_type = "mean", "none"
    return config


def _unread_by_classifier(prefix: str, siglip: bool) -> tuple[Rule, ...]:
    """What a classifier's image tower has and its logits do not read: they are of the mean of its last states, in
    SigLIP after the last norm, in CLIP before it."""
    return left_out(hf_siglip.pooler_rules(prefix)) if siglip else (Rule(f"{prefix}post_layernorm.{{p}}"),)


def _take_labels(config: VitEmbedConfig, source: PretrainedConfig, classifier: torch.Tensor) -> None:
    config.num_labels = len(classifier)
    if len(source.id2label or ()) == len(classifier):
        config.id2label, config.label2id = source.id2label, source.label2id
    config.problem_type = source.problem_type


def image_processor(source_config: SourceConfig, config: VitEmbedConfig) -> dict[str, Any] | None:
    """SigLIP's own, where a folder has none. None for CLIP's."""
    return hf_siglip.image_processor(config) if source_config["model_type"].startswith("siglip") else None


# The way back


def restore(config: VitEmbedConfig, weights: StateDict) -> Restored:
    """A folder of CLIPModel, CLIPVisionModel or CLIPVisionModelWithProjection; with attention pooling, of SiglipModel
    or SiglipVisionModel. Names are those of every transformers release.

    Raises:
        ValueError: a model that none of them can compute; names every field.
    """
    siglip = config.pooling_type == "map"
    name, fields = (hf_siglip.write_config if siglip else _write_config)(config)
    heads = hf_siglip.HEAD_RULES if siglip else HEAD_RULES
    rules = (*trunk_rules("vision_model."), *hf_siglip.pooler_rules("vision_model."), *heads)
    return Restored(
        reverse_rules(weights, rules),
        usage=f'transformers.{name}.from_pretrained("FILE")',
        weights_file="model.safetensors",
        files={"config.json": {"architectures": [name], **fields}},
    )


def _write_config(config: VitEmbedConfig) -> tuple[str, dict[str, Any]]:
    """CLIP's class for a model of ours, and its config.json."""
    name = source_class(config, CLASSES, PACKAGE)
    needed = {**CLIP_ARCHITECTURE, "final_norm_type": layer_norm_at_end(config)}
    if name == "CLIPModel":
        needed.update({f"text_config.{field}": value for field, value in CLIP_TEXT_ARCHITECTURE.items()})
    else:
        del needed["contrastive_loss"]
        if name == "CLIPVisionModel":
            del needed["use_visual_projection"]
    require(config, needed, PACKAGE)
    vision = {field: getattr(config, field) for field in VISION_FIELDS}
    if name != "CLIPModel":
        return name, {"model_type": "clip_vision_model", **vision}
    text = {field: getattr(config.text_config, field) for field in (*TEXT_FIELDS, *INITIALISATION_FIELDS)}
    return name, {
        "model_type": "clip",
        "projection_dim": config.projection_dim,
        "logit_scale_init_value": config.logit_scale_init_value,
        "vision_config": {"model_type": "clip_vision_model", **vision},
        "text_config": {"model_type": "clip_text_model", **text, "projection_dim": config.projection_dim},
    }


def restored_processor(files: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """The files of a folder of transformers with our image processor, which is one of its own."""
    return {**files, IMAGE_PROCESSOR_FILE: dict(preprocessor)}


# Running the source


def _stock_class(source: PretrainedConfig, state_dict: StateDict) -> str:
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
    source = read_transformers_config(source_config, CONFIG_CLASSES[source_config["model_type"]])
    # The user may have given another activation than the config says.
    vision_part(source).hidden_act = config.hidden_act
    if config.text_config is not None:
        source.text_config.hidden_act = config.text_config.hidden_act
    model_class = _stock_class(source, state_dict)
    if model_class.endswith("ForImageClassification"):
        source.num_labels = len(state_dict["classifier.weight"])
    with torch.device("meta"):
        model = getattr(transformers, model_class)(source).eval()
    _load(model, state_dict)
    pixel_values = with_remainder(inputs.pixel_values, (vision_part(source).image_size,) * 2)
    if config.architectures == ["VitEmbedForImageClassification"]:
        return {"logits": model(pixel_values).logits}
    if config.architectures == ["VitEmbedModelWithProjection"]:
        return {"image_features": model(pixel_values).image_embeds}
    tower = getattr(model, "vision_model", model)
    last_hidden_states = []  # SigLIP's own are after the last norm, ours before it, as CLIP's
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


def _load(model: torch.nn.Module, state_dict: StateDict) -> None:
    """Fills a model of "meta", whose names may lack the prefix that the file has, or the other way around."""
    expected = set(model.state_dict())
    own = {name: tensor for name, tensor in state_dict.items() if not name.endswith("embeddings.position_ids")}
    weights = {}
    for name, tensor in as_float32(own).items():
        bare = name.removeprefix("vision_model.")
        weights[next((each for each in (name, bare, f"vision_model.{name}") if each in expected), name)] = tensor
    model.load_state_dict(weights, assign=True)
    for module in model.modules():
        if getattr(module, "position_ids", None) is not None:
            module.position_ids = torch.arange(module.position_ids.shape[-1])[None]


LAYOUT = Layout(
    "hf_clip",
    detect,
    convert,
    reference,
    "transformers' own class",
    options=("hidden_act",),
    image_processor=image_processor,
    sees_as_clip=True,
    restore=restore,
    restored_processor=restored_processor,
)
