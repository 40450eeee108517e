"""What every layout asks of a source: sizes from its tensors, values from its config or its user.

A value that weights do not show comes from the user (an option), else from the source's config, else from the family's
own documented default, which is logged with the option that changes it. Where there is no right default, it is asked
for.
"""

import logging
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import transformers
from transformers import PretrainedConfig

from vit_embed import VitEmbedConfig
from vit_embed.conversion.layouts.layout import ConversionOptions, SourceConfig, StateDict
from vit_embed.conversion.messages import listing

logger = logging.getLogger(__name__)

CLIP_HEAD_WIDTH = 64  # of every model in arXiv:2103.00020 table 20; the default of open_clip's towers
CLIP_HEADS_ORIGIN = f"each {CLIP_HEAD_WIDTH} wide as in every CLIP"

# What an option stands for, in messages.
MEANING = {
    "hidden_act": "activation",
    "num_attention_heads": "number of attention heads",
    "text_num_attention_heads": "number of attention heads of the text tower",
    "layer_norm_eps": "epsilon of the norms",
    "norm_position": "position of the norms",
    "pooling_type": "pooling",
    "image_size": "image size",
}


def resolve(
    options: ConversionOptions,
    name: str,
    from_source: Any = None,
    default: Any = None,
    origin: str = "",
    hint: str = "",
) -> Any:
    """The value of an option: what the user gives, else what the source says, else its family's default.

    Args:
        name: a key of MEANING.
        from_source: what the source says, or None.
        default: what to take where neither says it, with a warning; None where no default is right.
        origin: whose default it is, for the warning.
        hint: follows the option in an error, with values that it may have.

    Raises:
        ValueError: none of the three; names the option.
    """
    given = getattr(options, name)
    if given is not None:
        if from_source is not None and given != from_source:
            logger.warning("--%s %s overrides the source's %s, %s", name, given, MEANING[name], from_source)
        return given
    if from_source is not None:
        return from_source
    if default is None:
        raise ValueError(
            f"the {MEANING[name]} is not stored in the weights, and no config beside them states it; give --{name}"
            + (f" {hint}" if hint else "")
        )
    logger.warning("no %s is stated; using %s, %s; --%s changes it", MEANING[name], default, origin, name)
    return default


def clip_heads(width: int) -> int | None:
    """Attention heads of a tower of CLIP, each 64 wide; None for another width."""
    return None if width % CLIP_HEAD_WIDTH else width // CLIP_HEAD_WIDTH


# Values of JSON


class Kind(NamedTuple):
    """What a value of a config must be."""

    words: str
    fits: Callable[[Any], bool]


def is_number(value: Any, types: tuple[type, ...] = (int, float)) -> bool:
    """Whether a value of JSON is a finite number; true and false are none."""
    return isinstance(value, types) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: Any) -> bool:
    """Whether a value of JSON is a whole number from 1."""
    return is_number(value, (int,)) and 0 < value < 2**31


def _is_size(value: Any) -> bool:
    return is_count(value) or (isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_count, value)))


COUNT = Kind("a whole number from 1", is_count)
WHOLE_NUMBER = Kind("a whole number", lambda value: is_number(value, (int,)))
SIZE = Kind("a whole number from 1 or two of them", _is_size)
NUMBER = Kind("a number", is_number)
TRUTH = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a string", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))

# Fields of the configs of transformers that layouts read.
TRANSFORMERS_FIELDS = {
    **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"), COUNT),
    **dict.fromkeys(("num_channels", "vocab_size", "max_position_embeddings", "projection_dim"), COUNT),
    **dict.fromkeys(("image_size", "patch_size"), SIZE),
    **dict.fromkeys(("layer_norm_eps", "mlp_ratio", "layerscale_value", "drop_path_rate"), NUMBER),
    **dict.fromkeys(("hidden_dropout_prob", "attention_dropout", "attention_probs_dropout_prob"), NUMBER),
    "hidden_act": TEXT,
}


def wrong_kinds(values: Mapping[str, Any], kinds: Mapping[str, Kind], prefix: str = "") -> list[str]:
    """What to say of every value that is there and of another kind than it must be."""
    return [
        f"{prefix}{name} must be {kind.words}, got {values[name]!r:.80}"
        for name, kind in kinds.items()
        if name in values and not kind.fits(values[name])
    ]


def read_transformers_config(source_config: SourceConfig, class_name: str) -> PretrainedConfig:
    """config.json as a config class of transformers reads it, with that class's defaults for what it leaves out.

    Raises:
        ValueError: values that the class refuses, or that are of another kind than such configs have; names them.
    """
    try:
        config = getattr(transformers, class_name).from_dict(dict(source_config))
        towers = {
            f"{name}.": getattr(config, name) for name in ("vision_config", "text_config") if hasattr(config, name)
        }
    # Whatever an unfit value raises in it: transformers 5 checks types with errors of its own, no ValueErrors.
    except Exception as error:
        raise ValueError(f"config.json cannot be read as a {class_name}: {error}") from error
    found = [wrong_kinds(vars(part), TRANSFORMERS_FIELDS, prefix) for prefix, part in {"": config, **towers}.items()]
    if wrong := sum(found, []):
        raise ValueError(f"config.json cannot be read as a {class_name}: {', '.join(wrong)}")
    return config


# Sizes of tensors


def check_sizes(state_dict: StateDict, sizes: Mapping[str, tuple[str, ...]], what: str) -> None:
    """Raises ValueError unless the tensors that sizes are read from are there, with the axes that they must have."""
    if missing := [key for key in sizes if key not in state_dict]:
        raise ValueError(
            f"not {what}, as keys that its sizes are read from are missing: {listing(missing)}; its own keys are "
            f"{listing(state_dict)}"
        )
    for key, axes in sizes.items():
        if state_dict[key].dim() != len(axes) or 0 in state_dict[key].shape:
            raise ValueError(f"{key} must be ({', '.join(axes)}), got {tuple(state_dict[key].shape)}")


def count_layers(state_dict: StateDict, prefix: str) -> int:
    """Layers `prefix`.0, `prefix`.1, ... Numbers with gaps give a count that leaves keys over, which is refused."""
    matches = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", key) for key in state_dict)
    return len({match[1] for match in matches if match})


def table_image_size(
    num_patches: int, patch_size: tuple[int, int], image_size: tuple[int, int] | None
) -> tuple[int, int]:
    """(height, width) in pixels of a table of so many positions: a square grid, or the size that is given.

    Raises:
        ValueError: no square and no size, or a size that has another number of patches.
    """
    if image_size is not None:
        rows, columns = (size // side for size, side in zip(image_size, patch_size))
        if rows * columns != num_patches or (rows * patch_size[0], columns * patch_size[1]) != tuple(image_size):
            raise ValueError(
                f"--image_size must have {num_patches} patches of {patch_size} pixels, as the position table has; got "
                f"{image_size}"
            )
        return tuple(image_size)
    side = math.isqrt(num_patches)
    if side * side != num_patches or not side:
        raise ValueError(
            f"the position table has {num_patches} patches, which is no square grid; give its pixels with --image_size "
            "HEIGHT WIDTH"
        )
    return side * patch_size[0], side * patch_size[1]


def square_clip_size(state_dict: StateDict, patches: str, positions: str, package: str) -> tuple[int, int]:
    """Pixels of an image's side and of a patch's, of CLIP: square patches on a square grid, and a class token.

    Raises:
        ValueError: the tensors of these names are of another model.
    """
    patch_height, patch_width = state_dict[patches].shape[2:]
    num_positions = len(state_dict[positions])
    side = math.isqrt(num_positions - 1)
    if patch_height != patch_width or side * side != num_positions - 1 or not side:
        raise ValueError(
            f"{package} has square patches on a square grid, one position each and one for the class token; got "
            f"patches of ({patch_height}, {patch_width}) and {num_positions} positions"
        )
    return side * patch_height, patch_height


# The way back


def require(config: VitEmbedConfig, needed: Mapping[str, Any], package: str) -> None:
    """Raises ValueError, naming every field, unless the config has the values that a package's code takes for granted.

    `needed` names fields of the config, and of its text tower as "text_config.NAME".
    """
    wrong = []
    for name, value in needed.items():
        owner, _, field_name = name.rpartition(".")
        found = getattr(config.text_config if owner else config, field_name)
        if found != value:
            wrong.append(f"{name}={found!r} (it has {value!r})")
    if wrong:
        raise ValueError(f"{package} cannot express this model: {', '.join(wrong)}")


def layer_norm_at_end(config: VitEmbedConfig) -> str | None:
    """What `final_norm_type` may be where a package ends in a LayerNorm: its own value if that is one."""
    return config.final_norm_type if config.resolved_final_norm_type == "layer_norm" else "layer_norm"
