"""The config.json of a folder of timm, read and written (read at timm 1.0.31).

What timm's weights do not show is in its model_args, or is what the architecture's name stands for.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from vit_embed import VitEmbedConfig
from vit_embed.conversion.layouts.layout import SourceConfig
from vit_embed.conversion.layouts.timm.names import CLIP_EPS, DEFAULT_EPS, find_architecture
from vit_embed.conversion.processor_files import (
    CLIP_IMAGE_MEAN,
    CLIP_IMAGE_STD,
    IMAGENET_IMAGE_MEAN,
    IMAGENET_IMAGE_STD,
    clip_image_processor,
    sides,
)

logger = logging.getLogger(__name__)

# The classes that timm's `head` makes.
CLASSIFIER, PROJECTION = "VitEmbedForImageClassification", "VitEmbedModelWithProjection"

# timm's names for values of model_args, and ours. Of two for one of ours the first is written.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
NORMS = {"layernorm": "layer_norm", "layernormfp32": "layer_norm", "rmsnorm": "rms_norm", "rmsnormfp32": "rms_norm"}
NORM_LAYERS = {"layer_norm": "LayerNorm", "rms_norm": "RmsNorm"}  # classes of timm.layers
POOLINGS = {"token": "cls", "avg": "mean", "map": "map"}

# Keys of model_args that no inference reads.
TRAINING_ARGUMENTS = (
    "drop_rate",
    "pos_drop_rate",
    "patch_drop_rate",
    "proj_drop_rate",
    "attn_drop_rate",
    "drop_path_rate",
    "drop_block_rate",
    "weight_init",
    "fix_init",
    "device",
    "dtype",
    "scriptable",
    "exportable",
    "no_jit",
)

LABEL_FIELDS = ("label_names", "label_descriptions")
# Of a pretrained_cfg what a model of ours keeps, for the way back.
KEPT_PRETRAINED = ("tag", "mean", "std", "interpolation", "crop_pct", "crop_mode", "license")
# timm's own preprocessing, where a pretrained_cfg leaves one out: ImageNet's statistics (its PretrainedCfg).
PREPROCESSING = {
    "mean": IMAGENET_IMAGE_MEAN,
    "std": IMAGENET_IMAGE_STD,
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
}
# PIL.Image.Resampling, by timm's names
RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}

# Names that a folder is written for where it came from none: one with each epsilon that a name can stand for.
GENERIC_NAMES = {
    ("layer_norm", DEFAULT_EPS): "vit_base_patch16_224",
    ("layer_norm", CLIP_EPS): "vit_base_patch16_clip_224",
    ("rms_norm", DEFAULT_EPS): "test_vit4",
}
# LayerScale starts from it where a model_args does not say; nothing else reads it.
LAYER_SCALE_INIT = 1e-5


class TimmConfig(NamedTuple):
    """A config.json of timm.

    name: of the architecture, without the tag of its weights; None where there is no config of timm.
    model_args: keywords that the model was made with.
    pretrained: what timm calls pretrained_cfg: preprocessing, labels, licence.
    pooling: timm's name of it; "" for none, None where it is not there.
    num_classes: rows of the head, 0 without one; None where it is not there.
    """

    name: str | None
    model_args: Mapping[str, Any]
    pretrained: Mapping[str, Any]
    pooling: str | None
    num_classes: int | None

    @property
    def has_labels(self) -> bool:
        """Whether it names classes, so that `head` is a classifier."""
        return any(self.pretrained.get(field) for field in LABEL_FIELDS)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) in pixels."""
        if "img_size" in self.model_args:
            size = self.model_args["img_size"]
            return _numbers("img_size", [size, size] if isinstance(size, int) else size, 2)
        if "input_size" in self.pretrained:
            return _numbers("input_size", self.pretrained["input_size"], 3)[1:]
        return None


def read_config(source_config: SourceConfig) -> TimmConfig:
    """Reads a config.json.

    Raises:
        ValueError: one that names an architecture and whose entries are not of timm's types.
    """
    name = source_config.get("architecture")
    if not isinstance(name, str):
        return TimmConfig(None, {}, {}, None, None)
    model_args = _entries("model_args", source_config.get("model_args") or {})
    # In older ones the file is that dict itself.
    pretrained = _entries("pretrained_cfg", source_config.get("pretrained_cfg", source_config))
    pretrained.update({key: source_config[key] for key in LABEL_FIELDS if source_config.get(key)})
    pooling, num_classes = (model_args.get(key, source_config.get(key)) for key in ("global_pool", "num_classes"))
    if pooling is not None and not isinstance(pooling, str):
        raise ValueError(f"global_pool of config.json must be a string, got {pooling!r}")
    return TimmConfig(name.partition(".")[0], model_args, pretrained, pooling, num_classes)


def _entries(name: str, value: Any) -> dict[str, Any]:
    """A copy of an object of JSON, without what is null: timm takes its default for that."""
    if not isinstance(value, dict):
        raise ValueError(f"{name} of config.json must be an object, got {value!r}")
    return {key: entry for key, entry in value.items() if entry is not None}


def _numbers(name: str, value: Any, count: int) -> tuple[int | float, ...]:
    """So many numbers > 0, or zeros."""
    is_list = isinstance(value, (list, tuple)) and len(value) == count
    if not is_list or not all(isinstance(each, (int, float)) and 0 <= each < math.inf for each in value):
        raise ValueError(f"{name} of config.json must be {count} numbers, got {value!r}")
    return tuple(value)


def image_processor(source_config: SourceConfig, config: VitEmbedConfig) -> dict[str, Any] | None:
    """timm's transform for evaluation: the shorter side to floor(size / crop_pct), then the centre; with crop_mode
    "squash" both sides, whatever the shape.

    The size is that of whole patches; timm crops to a remainder of pixels more, which its patches then leave out. A
    rectangular model resizes both sides too: the stock processor cannot resize an image to cover a rectangle. So does
    crop_mode "border", which pads in timm; the log says so. It says too where timm's own statistics, ImageNet's, stand
    in for those that a config leaves out.

    Returns:
        None without a config of timm.
    """
    source = read_config(source_config)
    if source.name is None:
        return None
    if missing := [name for name in ("mean", "std") if name not in source.pretrained]:
        logger.warning(
            "config.json does not say %s of the images; timm takes ImageNet's then, and so does the image processor",
            " and ".join(missing),
        )
    said = {name: source.pretrained.get(name, default) for name, default in PREPROCESSING.items()}
    (crop_pct,) = _numbers("crop_pct", [said["crop_pct"]], 1)
    if str(said["interpolation"]) not in RESAMPLING:
        raise ValueError(f"interpolation must be one of {', '.join(RESAMPLING)}, got {said['interpolation']!r}")
    if said["crop_mode"] == "border":
        logger.warning("timm pads images to a square (crop_mode='border'); the image processor here squeezes them")
    height, width = (math.floor(side / (crop_pct or PREPROCESSING["crop_pct"])) for side in config.image_shape)
    covers = said["crop_mode"] == "center" and height == width
    return clip_image_processor(
        config,
        size={"shortest_edge": height} if covers else sides((height, width)),
        do_center_crop=True,
        crop_size=sides(config.image_shape),
        resample=RESAMPLING[said["interpolation"]],
        image_mean=_statistics("mean", said["mean"], config.num_channels),
        image_std=_statistics("std", said["std"], config.num_channels),
    )


def _statistics(name: str, values: Any, num_channels: int) -> list[float]:
    """One number a channel; where there are more or fewer, their mean for each, as in timm."""
    values = _numbers(name, values, len(values) if isinstance(values, (list, tuple)) and values else num_channels)
    return list(values) if len(values) == num_channels else [sum(values) / len(values)] * num_channels


def labels(source: TimmConfig, num_labels: int) -> dict[int, str] | None:
    """What timm calls each class: the description of its name or, without one, the name. None where it says nothing."""
    names, descriptions = (source.pretrained.get(field) or {} for field in LABEL_FIELDS)
    if not names:
        return None
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not all(str(number).isdecimal() for number in names):
        raise ValueError(f"label_names of config.json must be a list, or an object of names by number; got {names!r}")
    names = {int(number): str(name) for number, name in names.items()}
    descriptions = _entries("label_descriptions", descriptions)
    result = {number: str(descriptions.get(name, name)) for number, name in names.items()}
    count = Counter(result.values())
    # ImageNet has two classes "crane".
    result = {number: text if count[text] == 1 else f"{text} ({names[number]})" for number, text in result.items()}
    return {number: result.get(number, f"LABEL_{number}") for number in range(num_labels)}


# What we write


def original_form(config: VitEmbedConfig) -> dict[str, Any]:
    """What our config does not hold of the form that timm has a model in: as it came, or timm's defaults."""
    came = config.converted_from or {}
    came = came if came.get("layout") == "timm" else {}
    name, named = came.get("architecture"), find_architecture(came.get("architecture"))
    # A distilled DeiT is another class; another norm than the name's cannot be said in a folder.
    if (
        named is None
        or "_distilled_" in name
        or (named.norm_type, named.eps) != (config.norm_type, config.layer_norm_eps)
    ):
        name = None
    return {
        "architecture": name,
        "no_embed_class": False,
        "fc_norm": False,
        "dynamic_img_size": False,
        **came.get("model_args", {}),
        "pretrained_cfg": came.get("pretrained_cfg", {}),
    }


def model_arguments(config: VitEmbedConfig, no_embed_class: bool) -> dict[str, Any]:
    """The keywords of timm's VisionTransformer for a model, but for its norm, as JSON holds them."""
    form, (model_class,) = original_form(config), config.architectures
    num_classes = {CLASSIFIER: config.num_labels, PROJECTION: config.projection_dim}.get(model_class, 0)
    averages, has_norm = config.pooling_type == "mean", config.resolved_final_norm_type != "none"
    return {
        "img_size": list(config.image_shape),
        "patch_size": list(config.patch_shape),
        "in_chans": config.num_channels,
        "num_classes": num_classes if config.use_visual_projection or model_class != PROJECTION else 0,
        "global_pool": next(name for name, ours in POOLINGS.items() if ours == config.pooling_type),
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": mlp_ratio(config.intermediate_size, config.hidden_size),
        "qkv_bias": config.qkv_bias,
        "init_values": config.layer_scale_init_value or 0.0,
        "class_token": config.use_cls_token,
        "pos_embed": "none" if config.position_embedding_type == "none" else "learn",
        "no_embed_class": no_embed_class,
        "reg_tokens": config.num_register_tokens,
        "pre_norm": config.use_pre_layernorm,
        "final_norm": has_norm,
        "fc_norm": has_norm and (not config.norm_before_pooling if averages else form["fc_norm"]),
        "pool_include_prefix": config.pooling_type == "map" and config.num_prefix_tokens > 0,
        "dynamic_img_size": form["dynamic_img_size"] or config.pad_to_patch,
        "dynamic_img_pad": config.pad_to_patch,
        "act_layer": next(name for name, ours in ACTIVATIONS.items() if ours == config.hidden_act),
    }


def mlp_ratio(width: int, base: int) -> float:
    """The mlp_ratio with which `int(base * mlp_ratio)`, as timm and open_clip have it, is `width`."""
    ratio = width / base
    return ratio if int(base * ratio) == width else math.nextafter(ratio, math.inf)


def config_file(config: VitEmbedConfig, architecture: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a folder of timm."""
    if (config.norm_type, architecture) == ("rms_norm", GENERIC_NAMES[("rms_norm", DEFAULT_EPS)]):
        arguments = {**arguments, "norm_layer": "rmsnorm"}
    num_classes = arguments["num_classes"]
    clip = {"mean": CLIP_IMAGE_MEAN, "std": CLIP_IMAGE_STD, "interpolation": "bicubic", "crop_pct": 1.0}
    content = {
        "architecture": architecture,
        "num_classes": num_classes,
        "num_features": config.hidden_size,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": {
            **(original_form(config)["pretrained_cfg"] or clip),
            "num_classes": num_classes,
            "input_size": [config.num_channels, *config.image_shape],
            "fixed_input_size": not arguments["dynamic_img_size"],
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    labels = [config.id2label.get(number) for number in range(num_classes)]
    if config.architectures == [CLASSIFIER] and labels != [f"LABEL_{number}" for number in range(num_classes)]:
        content["label_names"] = labels
    return content
