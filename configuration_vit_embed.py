"""What a vit_embed model is: every choice that shapes the weights or the arithmetic, and nothing that needs torch.

One flat config describes the image tower and the heads; a nested `VitEmbedTextConfig` describes the text tower
of a dual encoder and is None for a vision-only model. Every default is OpenAI CLIP ViT-B/16
(arXiv:2103.00020, table 20), so `VitEmbedConfig()` is its image tower. `options_vit_embed.py` has the fields, row by
row.
"""

import copy
import difflib
import inspect
import logging
from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from .combinations_vit_embed import COMBINATIONS, TEXT_COMBINATIONS, check_combinations
from .options_vit_embed import (
    CLIP_EOS_TOKEN_ID,
    CLIP_VOCAB_SIZE,
    FOREIGN_OPTIONS,
    NUM_HYBRID_MAPS,
    OPTIONS,
    TEXT_OPTIONS,
    Option,
    check_applies,
    check_values,
    documentation,
)

logger = logging.getLogger(__name__)

# Configs written before transformers 4.31 say `eos_token_id = 2`, which is no end token of OpenAI's vocabulary: CLIP
# then pools at the row's largest id.
LEGACY_EOS_TOKEN_ID = 2

FIELDS = tuple(option.name for option in OPTIONS)
TEXT_FIELDS = tuple(option.name for option in TEXT_OPTIONS)

# Every Auto class that a saved folder answers to, whichever class was saved; a folder of a text tower alone.
AUTO_MAP = {
    "AutoConfig": "configuration_vit_embed.VitEmbedConfig",
    "AutoModel": "modeling_vit_embed.VitEmbedAutoModel",
    "AutoModelForImageClassification": "modeling_vit_embed.VitEmbedForImageClassification",
    "AutoModelForZeroShotImageClassification": "modeling_vit_embed.VitEmbedForContrastive",
    "AutoModelForDepthEstimation": "modeling_vit_embed.VitEmbedForDepthEstimation",
    "AutoModelForMaskedImageModeling": "modeling_vit_embed.VitEmbedForMaskedImageModeling",
    "AutoBackbone": "modeling_vit_embed.VitEmbedBackbone",
}
TEXT_AUTO_MAP = {
    "AutoConfig": "configuration_vit_embed.VitEmbedTextConfig",
    "AutoModel": "modeling_vit_embed.VitEmbedTextAutoModel",
}

# Of a model of the sigmoid loss, the pipeline that gives SigLIP's scores: its class and the Auto class of the model.
SIGMOID_PIPELINE = ("zero_shot_vit_embed.VitEmbedZeroShotPipeline", "AutoModelForZeroShotImageClassification")

# Fields that a CLIPVisionConfig and a VitEmbedConfig share by name; `to_clip_vision_config` writes them.
CLIP_VISION_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "image_size",
    "patch_size",
    "num_channels",
    "layer_norm_eps",
    "attention_dropout",
    "initializer_range",
    "initializer_factor",
    "projection_dim",
)

# What stock CLIPModel takes for granted: a model that differs in any of these has no CLIPConfig.
CLIP_ARCHITECTURE = {
    "stem_type": "conv",
    "patch_bias": False,
    "use_cls_token": True,
    "num_register_tokens": 0,
    "position_embedding_type": "learned",
    "norm_type": "layer_norm",
    "norm_position": "pre",
    "use_pre_layernorm": True,
    "final_norm_type": "layer_norm",
    "qkv_bias": True,
    "layer_scale_init_value": None,
    "pooling_type": "cls",
    "contrastive_loss": "softmax",
    "use_visual_projection": True,
}
CLIP_TEXT_ARCHITECTURE = {"pooling_type": "eos", "use_causal_mask": True, "projection_bias": False}

# Stock classes beside CLIPModel whose folders we read as they are, by the class of ours that has their parts.
CLIP_VISION_CLASSES = {"CLIPVisionModelWithProjection": "VitEmbedModelWithProjection"}


# Model types whose config.json each config reads, as it is or translated; and what to do with those of the other.
READ_BY_TEXT_CONFIG = ("vit_embed_text", "vit_embed", "clip", "clip_text_model")
READ_BY_CONFIG = ("vit_embed", "clip", "clip_vision_model")
LOADED_BY = {
    "vit_embed_text": "is a text tower alone; load it with AutoModel or VitEmbedTextModel",
    "clip_text_model": "is a text tower alone; load it with VitEmbedTextModel",
    "clip_vision_model": "is an image tower alone; load it with VitEmbedModel",
}


def _check_model_type(config_dict: dict[str, Any], readable: tuple[str, ...], source: Any) -> None:
    """Raises ValueError for the config of a model whose weights have no place in ours."""
    model_type = config_dict.get("model_type")
    if model_type is not None and model_type not in readable:
        advice = LOADED_BY.get(
            model_type,
            f"holds a model of type {model_type!r}, expected one of {', '.join(readable)}; load it with its own class, "
            "or convert it with convert_checkpoint.py",
        )
        raise ValueError(f"{source} {advice}")


def _as_pair(value: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """A size given as one number or as (height, width), as (height, width)."""
    return (value, value) if isinstance(value, int) else tuple(value)


# What timm, open_clip and other models of transformers call a field.
OTHER_NAMES = {
    "attn_drop_rate": "attention_dropout",
    "class_token": "use_cls_token",
    "cls_token": "use_cls_token",
    "depth": "num_hidden_layers",
    "dropout": "hidden_dropout_prob",
    "embed_dim": "hidden_size",
    "in_chans": "num_channels",
    "init_values": "layer_scale_init_value",
    "mlp_ratio": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_layers": "num_hidden_layers",
    "reg_tokens": "num_register_tokens",
    "width": "hidden_size",
}


def as_size(value: Any) -> Any:
    """One number for a square, else (height, width): JSON has no tuples, and stock CLIPModel knows squares only."""
    value = tuple(value) if isinstance(value, list) else value
    return value[0] if isinstance(value, tuple) and len(value) == 2 and value[0] == value[1] else value


def as_config(value: PretrainedConfig | dict[str, Any] | None) -> PretrainedConfig | None:
    """The config of another model of transformers, from itself or from the dict that its `to_dict` gives.

    Raises:
        TypeError: neither of them, or a dict without its `model_type`.
    """
    if isinstance(value, dict) and "model_type" in value:
        try:
            return AutoConfig.for_model(**value)
        except ValueError as error:
            raise ValueError(
                f"backbone_config must be of a model of transformers, got model_type={value['model_type']!r}"
            ) from error
    if value is None or isinstance(value, PretrainedConfig):
        return copy.deepcopy(value)  # transformers writes into the config of a model
    raise TypeError(f"backbone_config must be a config of transformers, or its dict with a model_type; got {value!r}")


def _near_miss(name: str, fields: tuple[str, ...]) -> str | None:
    """What is wrong with a keyword that is nearly the name of a field; None for any other keyword."""
    if name in fields:
        return None
    if OTHER_NAMES.get(name) in fields:
        return f"no field {name!r}; here it is {OTHER_NAMES[name]!r}"
    close = difflib.get_close_matches(name, fields, n=1, cutoff=0.85)
    if close and name not in {*PretrainedConfig().to_dict(), "num_labels", "auto_map"}:
        return f"no field {name!r}; did you mean {close[0]!r}?"
    return None


def reject_misspelled(kwargs: dict[str, Any], fields: tuple[str, ...], class_name: str) -> None:
    """Raises TypeError for a keyword that is nearly the name of a field. Unknown keywords as such pass: configs written
    by another transformers release carry keys of that release."""
    for name in kwargs:
        if message := _near_miss(name, fields):
            raise TypeError(f"{class_name} has {message}")


def _from_file(
    read: Callable[..., Any], config_dict: dict[str, Any], fields: tuple[str, ...], class_name: str, **kwargs
) -> Any:
    """`read(config_dict, **kwargs)` of a dict that was saved, whose near misses become attributes as they were:
    whatever was saved can be read, with a warning."""
    foreign = {name: config_dict[name] for name in config_dict if _near_miss(name, fields)}
    result = read({name: value for name, value in config_dict.items() if name not in foreign}, **kwargs)
    config = result[0] if isinstance(result, tuple) else result
    for name, value in foreign.items():
        logger.warning(
            "the config that is read: %s has %s; it is kept, and no model reads it",
            class_name,
            _near_miss(name, fields),
        )
        setattr(config, name, value)
    return result


def with_options(options: tuple[Option, ...]) -> Callable[[Any], Any]:
    """Of a config class: its fields in its docstring and its signature, which `**fields` alone would hide."""

    def complete(config_class: Any) -> Any:
        config_class.__doc__ = config_class.__doc__.replace("{options}", documentation(options))
        keyword = inspect.Parameter.KEYWORD_ONLY
        fields = [inspect.Parameter(option.name, keyword, default=option.default) for option in options]
        others = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
        config_class.__signature__ = inspect.Signature([*fields, others])
        return config_class

    return complete


@with_options(TEXT_OPTIONS)
class VitEmbedTextConfig(PretrainedConfig):
    """The text tower of a dual encoder; by default CLIP's causal transformer, pooled at the end-of-text token.

    {options}

    Raises:
        ValueError: a value out of range, or a combination without a meaning; names the field.
        TypeError: a keyword that is a misspelled field.

    Source: transformers CLIPTextConfig (field names), arXiv:2103.00020 section 2.4 (sizes).
    """

    model_type = "vit_embed_text"
    field_names = TEXT_FIELDS
    base_config_key = "text_config"

    # The layers of the text tower have no options: they are CLIP's. The layer that both towers share asks for these.
    norm_type = "layer_norm"
    norm_position = "pre"
    qkv_bias = True
    layer_scale_init_value = None
    hidden_dropout_prob = 0.0
    drop_path_rate = 0.0
    num_prefix_tokens = 0

    def __init__(self, **fields: Any):
        reject_misspelled(fields, TEXT_FIELDS, type(self).__name__)
        own = {option.name: fields.pop(option.name, option.default) for option in TEXT_OPTIONS}
        if own["eos_token_id"] == LEGACY_EOS_TOKEN_ID and own["vocab_size"] == CLIP_VOCAB_SIZE:
            own["eos_token_id"] = CLIP_EOS_TOKEN_ID
        super().__init__(**{name: own[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}, **fields)
        for name, value in own.items():
            setattr(self, name, value)
        self.validate_architecture()

    def validate_architecture(self) -> None:
        """Raises ValueError, naming the field, unless every field is in range and the combination has a meaning."""
        check_values(self, TEXT_OPTIONS)
        check_combinations(self, TEXT_COMBINATIONS)

    @property
    def reads_padding(self) -> bool:
        """Whether what comes after a text changes its vector, so that the tower itself pads every row to
        `max_position_embeddings`."""
        return self.pooling_type != "eos" or not self.use_causal_mask

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, plus the complete auto_map."""
        return {**super().to_dict(), "auto_map": dict(TEXT_AUTO_MAP)}

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers; a CLIPConfig found there is translated. One without a text tower, or of a model of
        another kind, is a ValueError."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        _check_model_type(config_dict, READ_BY_TEXT_CONFIG, pretrained_model_name_or_path)
        config_dict = from_clip_config(config_dict)
        if "text_config" in config_dict and config_dict["text_config"] is None:
            raise ValueError(
                f"{pretrained_model_name_or_path} has no text tower: its text_config is None; load the text tower from "
                "a checkpoint that VitEmbedForContrastive saved"
            )
        if "text_config" in config_dict:  # older checkpoints say the width of the joint space in one place alone
            projection_dim = config_dict.get("projection_dim", VitEmbedConfig().projection_dim)
            config_dict["text_config"] = {**config_dict["text_config"], "projection_dim": projection_dim}
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "VitEmbedTextConfig":
        """As in transformers."""
        return _from_file(super().from_dict, config_dict, TEXT_FIELDS, cls.__name__, **kwargs)


def as_text_config(value: Any) -> VitEmbedTextConfig | None:
    """A text tower's config, from itself or its dict.

    Raises:
        TypeError: anything else.
    """
    value = VitEmbedTextConfig(**value) if isinstance(value, dict) else value
    # As remote code its class may come from another copy of the file.
    if value is not None and getattr(value, "model_type", "") != VitEmbedTextConfig.model_type:
        raise TypeError(f"text_config must be a VitEmbedTextConfig, a dict of one, or None; got {value!r}")
    return value


# What a config makes of the values of these fields.
READ_AS = {
    "image_size": as_size,
    "patch_size": as_size,
    "patch_kernel_size": as_size,
    "backbone_config": as_config,
    "text_config": as_text_config,
    "converted_from": copy.deepcopy,
}


@with_options(OPTIONS)
class VitEmbedConfig(PretrainedConfig):
    """The image tower, the projection and the heads; with `text_config`, a dual encoder.

    Sizes are pixels or counts; a size that is a tuple is (height, width).

    {options}

    Raises:
        ValueError: a value out of range, or a combination without a meaning; names the fields.
        TypeError: a keyword that is a misspelled field, or a converted_from that JSON cannot hold.

    Source: transformers CLIPVisionConfig and CLIPConfig (field names). A CLIPConfig dict is read as it is by
    `from_dict` and `from_pretrained`.
    """

    model_type = "vit_embed"
    field_names = FIELDS
    # Trainer gathers what evaluation returns over all batches: batch x batch logits do not concatenate.
    keys_to_ignore_at_inference = [
        "logits_per_image",
        "logits_per_text",
        "hidden_states",
        "attentions",
        "text_hidden_states",
        "text_attentions",
        "pooler_output",
    ]
    # Names of the stages that a backbone returns; None: the last one.
    _out_features = None

    def __init__(self, **fields: Any):
        reject_misspelled(fields, FIELDS, type(self).__name__)
        fields.pop("vision_config", None)  # written for stock CLIPModel, says nothing that the fields do not
        own = {option.name: fields.pop(option.name, option.default) for option in OPTIONS}
        out_features, out_indices = own.pop("out_features"), own.pop("out_indices")
        for name, value in own.items():
            setattr(self, name, READ_AS[name](value) if name in READ_AS else value)
        super().__init__(**fields)
        self.validate_architecture()
        self._set_stages(out_features, out_indices)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, as_text_config(value) if name == "text_config" else value)
        if name in ("text_config", "projection_dim") and self.__dict__.get("text_config") is not None:
            # Stock CLIPTextModelWithProjection reads it there.
            self.text_config.projection_dim = self.__dict__.get("projection_dim", self.text_config.projection_dim)

    def validate_architecture(self) -> None:
        """Raises ValueError, naming the fields, unless every field is in range and the combination has a meaning;
        TypeError for a `converted_from` that JSON cannot hold."""
        check_values(self, tuple(option for option in OPTIONS if option.name not in ("out_features", "out_indices")))
        check_values(self, FOREIGN_OPTIONS)
        check_applies(self, OPTIONS)
        check_combinations(self, COMBINATIONS)
        self._set_stages(self._out_features, None)

    @property
    def sub_configs(self) -> dict[str, type[PretrainedConfig]]:
        """The text tower's class, where there is one: transformers 4.57 walks into every entry, None included."""
        return {} if self.text_config is None else {"text_config": VitEmbedTextConfig}

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) in pixels that the position table is made for."""
        return _as_pair(self.image_size)

    @property
    def patch_shape(self) -> tuple[int, int]:
        """(height, width) of a patch in pixels."""
        return _as_pair(self.patch_size)

    @property
    def image_multiple(self) -> tuple[int, int]:
        """(height, width) in pixels that the sides of an image must be multiples of, or are padded to."""
        return tuple(2 * side for side in self.patch_shape) if self.stem_type == "adaptive" else self.patch_shape

    @property
    def patch_kernel_shape(self) -> tuple[int, int]:
        """(height, width) in pixels of the "overlap" stem's kernel."""
        if self.patch_kernel_size is None:
            return tuple(2 * side for side in self.patch_shape)
        return _as_pair(self.patch_kernel_size)

    @property
    def patch_padding(self) -> tuple[int, int]:
        """(rows, columns) of zeros that the "overlap" stem puts on each side: floor((kernel - stride) / 2)."""
        return tuple((kernel - step) // 2 for kernel, step in zip(self.patch_kernel_shape, self.patch_shape))

    @property
    def grid_size(self) -> tuple[int, int]:
        """(gh, gw): rows and columns of patches at the native `image_size`."""
        return self.grid_of(self.image_shape)

    def grid_of(self, image_shape: tuple[int, int]) -> tuple[int, int]:
        """(gh, gw) of an image of (height, width) pixels, a remainder padded to whole patches."""
        height, width = self.padded_shape(image_shape)
        if self.stem_type != "overlap":
            return height // self.patch_shape[0], width // self.patch_shape[1]
        sizes = zip((height, width), self.patch_padding, self.patch_kernel_shape, self.patch_shape)
        return tuple((size + 2 * padding - kernel) // step + 1 for size, padding, kernel, step in sizes)

    def padded_shape(self, image_shape: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in pixels, each rounded up to its `image_multiple` with `pad_to_patch`."""
        if not self.pad_to_patch:
            return image_shape
        return tuple((size + unit - 1) // unit * unit for size, unit in zip(image_shape, self.image_multiple))

    @property
    def pyramid_widths(self) -> tuple[int, ...]:
        """Channels of the stem's maps, from fine to coarse; none for a stem that gives its tokens alone.

        "hierarchical" has maps from stride 2 to stride patch_size: the last with hidden_size, each finer one half of
        the next, so 96, 192, 384, 768 for ViT-B/16. "hybrid" has, with use_feature_pyramid, the last
        NUM_HYBRID_MAPS of its backbone.
        """
        if self.stem_type == "hybrid" and self.use_feature_pyramid:
            return tuple(self.backbone_config.hidden_sizes[-NUM_HYBRID_MAPS:])
        if self.stem_type != "hierarchical":
            return ()
        num_stages = self.patch_shape[0].bit_length() - 1
        return tuple(max(1, self.hidden_size >> (num_stages - i)) for i in range(1, num_stages + 1))

    @property
    def num_prefix_tokens(self) -> int:
        """P: tokens before the first patch (class token and registers)."""
        return int(self.use_cls_token) + self.num_register_tokens

    @property
    def resolved_final_norm_type(self) -> str:
        """`final_norm_type` with its default, the norm of the layers, filled in."""
        return self.final_norm_type or self.norm_type

    @property
    def stage_names(self) -> list[str]:
        """Names that `out_features` picks from: the stem's maps ("pyramid1" is the finest, of stride 2 with a
        hierarchical stem), the embeddings, then the output of each layer."""
        pyramid = [f"pyramid{i}" for i in range(1, len(self.pyramid_widths) + 1)]
        return pyramid + ["stem"] + [f"stage{i}" for i in range(1, self.num_hidden_layers + 1)]

    @property
    def out_features(self) -> list[str]:
        """Names of the stages that the backbone returns, by default the last one."""
        return [self.stage_names[-1]] if self._out_features is None else list(self._out_features)

    @out_features.setter
    def out_features(self, names: list[str] | None) -> None:
        self._set_stages(names, None)

    @property
    def out_indices(self) -> list[int]:
        """Their places among `stage_names`, counted from 0."""
        return [self.stage_names.index(name) for name in self.out_features]

    @out_indices.setter
    def out_indices(self, indices: list[int] | None) -> None:
        self._set_stages(None, indices)

    def _set_stages(self, names: list[str] | None, indices: list[int] | None) -> None:
        """Sets the stages that the backbone returns, by name or by number; None for both: the last one.

        Raises:
            ValueError: a stage that there is not, or names and numbers of different stages. TypeError: no list.
        """
        stages = self.stage_names
        for field, value in (("out_features", names), ("out_indices", indices)):
            if value is not None and not isinstance(value, (list, tuple)):
                raise TypeError(f"{field} must be a list, got {value!r}")
        if wrong := [name for name in names or () if name not in stages]:
            raise ValueError(f"out_features must be among {stages}, got {wrong}")
        if wrong := [i for i in indices or () if not -len(stages) <= i < len(stages)]:
            raise ValueError(f"out_indices must be in [{-len(stages)}, {len(stages) - 1}], got {wrong}")
        by_number = None if indices is None else [stages[i] for i in indices]
        if names is not None and by_number is not None and list(names) != by_number:
            raise ValueError(f"out_features={names} and out_indices={indices} name different stages; give one of them")
        # By name: a number would mean another stage once the stem is told to give its maps.
        self._out_features = by_number if names is None else list(names)

    @property
    def vision_config(self) -> "VitEmbedConfig":
        """Of a dual encoder, the config of its image tower: what code that knows CLIPConfig asks for."""
        if self.text_config is None:
            raise AttributeError("a vision-only VitEmbedConfig is the config of its image tower itself")
        return self.vision_only()

    def decoder_config(self) -> "VitEmbedConfig":
        """The transformer that masked image modelling decodes with: a plain pre-norm one of the `decoder_` sizes."""
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        shared = ("hidden_act", "layer_norm_eps", "initializer_range", "initializer_factor", "image_size", "patch_size")
        return VitEmbedConfig(
            **{name: getattr(self, f"decoder_{name}") for name in names},
            **{name: getattr(self, name) for name in (*shared, "num_channels", "pad_to_patch")},
        )

    def vision_only(self) -> "VitEmbedConfig":
        """A copy without the text tower: what a vision-only class saves, so that no Auto class expects a tower."""
        config = copy.deepcopy(self)
        config.text_config = None
        return config

    def to_clip_vision_config(self) -> dict[str, Any] | None:
        """The `vision_config` dict of an equal transformers CLIPModel, or None where CLIPModel cannot express this."""
        own = {**self.__dict__, "final_norm_type": self.resolved_final_norm_type}
        square = isinstance(self.image_size, int) and isinstance(self.patch_size, int)
        if not square or any(own[name] != value for name, value in CLIP_ARCHITECTURE.items()):
            return None
        text = self.text_config
        if text is not None and any(getattr(text, name) != value for name, value in CLIP_TEXT_ARCHITECTURE.items()):
            return None
        return {name: getattr(self, name) for name in CLIP_VISION_FIELDS}

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, plus the complete auto_map and what `CLIPModel.from_pretrained` reads; stages by name."""
        output = super().to_dict()
        output["auto_map"] = dict(AUTO_MAP)
        if self.text_config is not None:
            output["text_config"].pop("auto_map", None)
        output.pop("out_indices", None)
        output.pop("custom_pipelines", None)
        if self.text_config is not None and self.contrastive_loss == "sigmoid":
            pipeline = {"impl": SIGMOID_PIPELINE[0], "pt": [SIGMOID_PIPELINE[1]], "type": "multimodal"}
            output["custom_pipelines"] = {"zero-shot-image-classification": pipeline}
        if (names := output.pop("_out_features", None)) is not None:
            output["out_features"] = names
        vision_config = self.to_clip_vision_config() if self.text_config is not None else None
        if vision_config is not None:
            output["vision_config"] = vision_config
        return output

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers; a CLIPConfig found there is translated. A model of another kind is a ValueError."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        _check_model_type(config_dict, READ_BY_CONFIG, pretrained_model_name_or_path)
        return from_clip_config(config_dict), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "VitEmbedConfig":
        """As in transformers; a CLIPConfig dict is translated, and overrides are validated like any other value."""
        config_dict = from_clip_config(config_dict)
        # As CLIPConfig takes it: fields of the image tower.
        kwargs = {**(kwargs.pop("vision_config", None) or {}), **kwargs}
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in FIELDS}
        if isinstance(overrides.get("text_config"), dict):
            overrides["text_config"] = {**(config_dict.get("text_config") or {}), **overrides["text_config"]}
        if overrides.keys() & {"out_features", "out_indices"}:  # either takes the place of what was saved
            config_dict.pop("out_features", None)
            config_dict.pop("out_indices", None)
        config_dict.update(overrides)
        if isinstance(config_dict.get("text_config"), dict):
            config_dict["text_config"] = VitEmbedTextConfig.from_dict(config_dict["text_config"])
        return _from_file(super().from_dict, config_dict, FIELDS, cls.__name__, **kwargs)


def from_clip_config(config_dict: dict[str, Any]) -> dict[str, Any]:
    """The VitEmbedConfig dict of a transformers CLIPConfig or CLIPVisionConfig dict; any other dict, copied.

    Old checkpoints hold each tower twice, as `vision_config` and `vision_config_dict`; the latter wins, as in CLIP.
    """
    vision_defaults = {"patch_size": 32}  # the one default of CLIPVisionConfig that is not ViT-B/16
    if config_dict.get("model_type") == "clip_vision_model":
        result = {name: config_dict[name] for name in CLIP_VISION_FIELDS if name in config_dict}
        stock_classes = config_dict.get("architectures") or ()
        if ours := [CLIP_VISION_CLASSES[name] for name in stock_classes if name in CLIP_VISION_CLASSES]:
            result["architectures"] = ours
        return {**vision_defaults, **result}
    if config_dict.get("model_type") != "clip":
        return {name: value for name, value in config_dict.items() if name != "vision_config"}
    towers = {
        tower: {**(config_dict.get(tower) or {}), **(config_dict.get(f"{tower}_dict") or {})}
        for tower in ("vision_config", "text_config")
    }
    result = {name: value for name, value in towers["vision_config"].items() if name in CLIP_VISION_FIELDS}
    result = {**vision_defaults, **result}
    result["text_config"] = {name: value for name, value in towers["text_config"].items() if name in TEXT_FIELDS}
    shared = ("logit_scale_init_value", "initializer_factor", "id2label", "label2id", "dtype", "torch_dtype")
    result.update({name: config_dict[name] for name in shared if config_dict.get(name) is not None})
    result["projection_dim"] = config_dict.get("projection_dim", 512)
    return result


VitEmbedTextConfig.register_for_auto_class()
VitEmbedConfig.register_for_auto_class()
