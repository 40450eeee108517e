"""Renaming the weights of a model by a table that reads both ways, and what every layout asks of its source.

A layout's table of rules sends each key of its files to one or more of ours; `apply_rules` follows it, `reverse_rules`
goes back. What a file does not say is never guessed: it comes from the source's config, or from the user.
"""

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PretrainedConfig

from vit_embed import (
    VitEmbedConfig,
    VitEmbedForContrastive,
    VitEmbedForDepthEstimation,
    VitEmbedForImageClassification,
    VitEmbedModel,
    VitEmbedModelWithProjection,
)
from vit_embed.checkpoint_reader import listing, release
from vit_embed.checkpoint_source import progress
from vit_embed.modeling_vit_embed import VitEmbedPreTrainedModel

logger = logging.getLogger(__name__)

StateDict = Mapping[str, torch.Tensor]
SourceConfig = Mapping[str, Any]  # the JSON that lies beside the weights, empty where there is none

# What a conversion can give. A layout names the class in `config.architectures`.
MODEL_CLASSES = {
    model_class.__name__: model_class
    for model_class in (
        VitEmbedModel,
        VitEmbedModelWithProjection,
        VitEmbedForContrastive,
        VitEmbedForImageClassification,
        VitEmbedForDepthEstimation,
    )
}


@dataclass(frozen=True)
class ConversionOptions:
    """What a source may not say of itself, and what to make of it. None takes what the source says.

    dtype: of every weight written.
    hidden_act: activation of both towers, one of HIDDEN_ACTS.
    num_attention_heads, text_num_attention_heads: of the image and of the text tower.
    layer_norm_eps: of both towers.
    norm_position: "pre" or "post".
    pooling_type: of the image tower, one of POOLING_TYPES.
    image_size: (height, width) in pixels of a position table whose grid is no square.
    max_position_embeddings: tokens that the text tower is to take; its position table is resampled.
    trunk_only: leaves out heads, projections and the text tower.
    """

    dtype: torch.dtype = torch.float32
    hidden_act: str | None = None
    num_attention_heads: int | None = None
    text_num_attention_heads: int | None = None
    layer_norm_eps: float | None = None
    norm_position: str | None = None
    pooling_type: str | None = None
    image_size: tuple[int, int] | None = None
    max_position_embeddings: int | None = None
    trunk_only: bool = False


class SampleInputs(NamedTuple):
    """What source and result are both run on: images (2, C, H, W) and, for a text tower, texts (2, T) of token ids."""

    pixel_values: torch.Tensor
    input_ids: torch.Tensor | None


@dataclass(frozen=True)
class Restored:
    """A model of ours in another package's form.

    state_dict: its weights by the package's names.
    weights_file: the name of the weights in a folder of the package; None where it knows files only.
    files: the JSON files of such a folder by name.
    usage: Python that loads the file, for the log.
    """

    state_dict: dict[str, torch.Tensor]
    usage: str
    weights_file: str | None = None
    files: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """How the checkpoints of one origin are read, written and run. Every function is pure.

    detect: (state dict, source config) -> why they are of this layout, or None.
    convert: (state dict, source config, options) -> the config, with `architectures`, and the weights of that class.
    options: fields of ConversionOptions that `convert` reads, besides those that mean something for every layout.
    reference: (state dict, source config, config, sample inputs) -> outputs of the source's own code in float32, by the
        names of OUTPUTS in convert_checkpoint; raises ImportError where that is not installed.
    image_processor: (source config, config) -> the preprocessor_config.json that the source's config describes, or None
        for CLIP's.
    restore: (config, weights by our names, the trunk below "vision_model.") -> the same in this layout; raises
        ValueError for a model that it cannot express. None where there is no way back.
    restored_processor: (files of a Restored, our preprocessor_config.json) -> the files, which say that as well.
    """

    detect: Callable[[StateDict, SourceConfig], str | None]
    convert: Callable[[StateDict, SourceConfig, ConversionOptions], tuple[VitEmbedConfig, dict[str, torch.Tensor]]]
    reference: Callable[[StateDict, SourceConfig, VitEmbedConfig, SampleInputs], dict[str, torch.Tensor]]
    options: tuple[str, ...] = ()
    image_processor: Callable[[SourceConfig, VitEmbedConfig], dict[str, Any] | None] = lambda source_config, config: (
        None
    )
    restore: Callable[[VitEmbedConfig, StateDict], Restored] | None = None
    restored_processor: Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]] = lambda files, _: files


# The table


class Rule(NamedTuple):
    """Where a weight of a layout goes, and how it comes back.

    source, targets: whole keys, in which {n} stands for a layer's number and {p} for "weight" or "bias"; {x} stands for
        anything, in a source without a target. Several targets split the tensor along its first axis into equal parts;
        no target leaves it out, as it has no part in what the model computes.
    transposed: whether the source stores the matrix the other way around.
    leading: axes of length 1 that the source has in front.
    """

    source: str
    targets: tuple[str, ...] = ()
    transposed: bool = False
    leading: int = 0


PLACEHOLDERS = {"n": r"\d+", "p": "weight|bias", "x": ".+"}


def rule(source: str, *targets: str, transposed: bool = False, leading: int = 0) -> Rule:
    """A Rule, with its targets one behind the other."""
    return Rule(source, targets, transposed, leading)


def layer_rules(source: str, target: str, names: Mapping[str, str | tuple[str, ...]]) -> tuple[Rule, ...]:
    """The rules of a stack of layers: {name in the source's layer: name or names in ours}, below two prefixes."""
    return tuple(
        rule(f"{source}.{name}", *(f"{target}.{each}" for each in ([new] if isinstance(new, str) else new)))
        for name, new in names.items()
    )


def fused(name: str, separator: str = ".") -> dict[str, tuple[str, ...]]:
    """The entry of `layer_rules` for one matrix that stacks query, key and value, in this order."""
    return {f"{name}{separator}{{p}}": tuple(f"self_attn.{each}_proj.{{p}}" for each in "qkv")}


def left_out(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The same keys, without a place to go to."""
    return tuple(each._replace(targets=()) for each in rules)


def _pattern(template: str) -> re.Pattern:
    parts = re.split(r"\{(\w)\}", template)  # text, placeholder, text, ...
    groups = [f"(?P<{part}>{PLACEHOLDERS[part]})" if i % 2 else re.escape(part) for i, part in enumerate(parts)]
    return re.compile("".join(groups))


def _matching(key: str, patterns: list[tuple[re.Pattern, Rule]]) -> tuple[Rule | None, dict[str, str]]:
    """The first rule whose pattern is the whole key, and what its placeholders stand for."""
    for pattern, each in patterns:
        if match := pattern.fullmatch(key):
            return each, match.groupdict()
    return None, {}


# Following it


def convert_weights(
    config: VitEmbedConfig, state_dict: StateDict, rules: Iterable[Rule], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The state dict of the model that `config` describes, every weight of it from the source.

    In `rules` the trunk is "vision_model", whichever class it is. Raises as `apply_rules` does.
    """
    model = empty_model(config)
    prefix = trunk_prefix(model)
    shapes = {prefix + name: tensor.shape for name, tensor in model.state_dict().items()}
    weights = apply_rules(state_dict, rules, shapes, dtype)
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}


def empty_model(config: VitEmbedConfig) -> VitEmbedPreTrainedModel:
    """The model of `config.architectures` without memory for its weights: their names and shapes."""
    with torch.device("meta"):
        return MODEL_CLASSES[config.architectures[0]](config).eval()


def trunk_prefix(model: VitEmbedPreTrainedModel) -> str:
    """What stands before the names of the trunk alone to give those that it has in every other class."""
    return f"{model.base_model_prefix}." if isinstance(model, VitEmbedModel) else ""


def apply_rules(
    state_dict: StateDict, rules: Iterable[Rule], target_shapes: Mapping[str, torch.Size], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Renames, splits and transposes every tensor of a state dict, and fills every target.

    Args:
        state_dict: any float dtypes; left as it is.
        target_shapes: the shape of every weight of the new model by name.
        dtype: of the result.

    Returns:
        New tensors in `dtype` by their new names; nothing is shared with the source.

    Raises:
        ValueError: a source key left over, a target left unfilled or filled twice, a shape that does not fit, weights
            that are no floats, or a number that is finite in the source and overflows `dtype`.
    """
    patterns = [(_pattern(each.source), each) for each in rules]
    result, sources, dropped, left_over, misfits, twice = {}, {}, [], [], [], []
    with progress("converting", sum(tensor.nbytes for tensor in state_dict.values())) as bar:
        for key, tensor in state_dict.items():
            bar.update(tensor.nbytes)
            found, values = _matching(key, patterns)
            targets = [] if found is None else [target.format(**values) for target in found.targets]
            if found is None or not all(target in target_shapes for target in targets):
                left_over.append(key)
                continue
            if not targets:
                dropped.append(key)
                continue
            twice += [f"{sources[target]} and {key}" for target in targets if target in sources][:1]
            sources.update(dict.fromkeys(targets, key))
            expected = _source_shape(found, target_shapes[targets[0]])
            if tensor.shape != expected:
                misfits.append(f"{key} must be {tuple(expected)}, got {tuple(tensor.shape)}")
                continue
            if not tensor.is_floating_point():
                raise ValueError(f"{key} must be a float tensor, got {tensor.dtype}")
            for target, part in zip(targets, _parts(found, tensor)):
                result[target] = _stored(part, dtype, key)
            release(tensor)
    problems = {
        "keys of the source without a place in the model": left_over,
        "weights of the model that are not in the source": [name for name in target_shapes if name not in sources],
        "keys of the source for one and the same weight": twice,
        "tensors of another shape than the sizes of the others ask for": misfits,
    }
    if dropped:
        logger.info("left out, as the model here has no use for them: %s", listing(dropped))
    if found := [f"{what}: {listing(names)}" for what, names in problems.items() if names]:
        raise ValueError("; ".join(found))
    return result


def _source_shape(rule: Rule, target_shape: torch.Size) -> torch.Size:
    """The shape of the tensor that `rule` makes targets of this shape from."""
    shape = tuple(target_shape)
    if len(rule.targets) > 1:
        shape = (len(rule.targets) * shape[0], *shape[1:])
    return torch.Size([1] * rule.leading + list(shape[::-1] if rule.transposed else shape))


def _parts(rule: Rule, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views of a source's tensor, one for each target."""
    tensor = tensor.reshape(tensor.shape[rule.leading :])
    tensor = tensor.t() if rule.transposed else tensor
    return tensor.chunk(len(rule.targets)) if len(rule.targets) > 1 else (tensor,)


def _stored(tensor: torch.Tensor, dtype: torch.dtype, key: str) -> torch.Tensor:
    """A copy in `dtype`, whole and in order."""
    stored = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if (count := count_non_finite(stored)) and (overflows := count - count_non_finite(tensor)) > 0:
        raise ValueError(f"{overflows} numbers of {key} overflow {dtype}; use --dtype float32 or bfloat16")
    return stored


def count_non_finite(tensor: torch.Tensor) -> int:
    """How many numbers are NaN or infinite."""
    if tensor.element_size() == 1:  # torch finds no extremes of float8
        tensor = tensor.float()
    # Almost always none, which the extremes tell in one pass and without a mask as long as the tensor.
    if not tensor.numel() or torch.stack(tensor.aminmax()).isfinite().all():
        return 0
    return tensor.numel() - int(tensor.isfinite().sum())


def as_float32(state_dict: StateDict) -> dict[str, torch.Tensor]:
    """The same numbers in float32, for running the source's own code; what is no float stays as it is."""
    result = {}
    for name, tensor in state_dict.items():
        result[name] = tensor.float() if tensor.is_floating_point() else tensor
        if result[name] is not tensor:
            release(tensor)
    return result


def reverse_rules(weights: StateDict, rules: Iterable[Rule]) -> dict[str, torch.Tensor]:
    """Our weights under the source's names, as `apply_rules` would read them. The first rule for a weight is taken.

    Args:
        weights: by the names that the rules have as targets; left as they are.

    Raises:
        ValueError: a weight without a place in the layout, or without the others that it is stored with.
    """
    patterns = [(_pattern(each.targets[0]), each) for each in rules if each.targets]
    result, placed = {}, set()
    for name in weights:
        found, values = _matching(name, patterns)
        names = [] if found is None else [target.format(**values) for target in found.targets]
        if found is None or not all(each in weights for each in names):
            continue
        placed.update(names)
        whole = torch.cat([weights[each] for each in names]) if len(names) > 1 else weights[name]
        whole = (whole.t() if found.transposed else whole).contiguous()
        result[found.source.format(**values)] = whole.reshape([1] * found.leading + list(whole.shape))
        if len(names) > 1:
            for each in names:
                release(weights[each])
    if left_over := [name for name in weights if name not in placed]:
        raise ValueError(f"weights of the model without a place in this layout: {listing(left_over)}")
    return result


# What every layout asks


def as_class(source_config: SourceConfig, class_name: str) -> PretrainedConfig:
    """config.json as a config class of transformers reads it, with that class's defaults for what it leaves out.

    Raises:
        ValueError: values that the class refuses.
    """
    try:
        return getattr(transformers, class_name).from_dict(dict(source_config))
    # Whatever a foreign value raises in it: transformers 5 checks types with errors of its own, no ValueErrors.
    except Exception as error:
        raise ValueError(f"config.json cannot be read as a {class_name}: {error}") from error


def check_sizes(state_dict: StateDict, sizes: Mapping[str, tuple[str, ...]], what: str) -> None:
    """Raises ValueError unless the tensors that sizes are read from are there, with the axes that they must have."""
    if missing := [key for key in sizes if key not in state_dict]:
        raise ValueError(
            f"not {what}, as keys that its sizes are read from are missing: {listing(missing)}; its own keys are "
            f"{listing(list(state_dict))}"
        )
    for key, axes in sizes.items():
        if state_dict[key].dim() != len(axes) or 0 in state_dict[key].shape:
            raise ValueError(f"{key} must be ({', '.join(axes)}), got {tuple(state_dict[key].shape)}")


def count_layers(state_dict: StateDict, prefix: str) -> int:
    """Layers `prefix`.0, `prefix`.1, ... Numbers with gaps give a count that leaves keys over, which is refused."""
    matches = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", key) for key in state_dict)
    return len({match[1] for match in matches if match})


def image_size_of(num_patches: int, patch_size: tuple[int, int], options: ConversionOptions) -> tuple[int, int]:
    """(height, width) in pixels of a table of so many positions: a square grid, or the one that was told.

    Raises:
        ValueError: no square and nothing told, or a size told that has another number of patches.
    """
    if options.image_size is not None:
        rows, columns = (size // side for size, side in zip(options.image_size, patch_size))
        if rows * columns != num_patches or (rows * patch_size[0], columns * patch_size[1]) != options.image_size:
            raise ValueError(
                f"--image_size must have {num_patches} patches of {patch_size} pixels, as the position table has; got "
                f"{options.image_size}"
            )
        return options.image_size
    side = math.isqrt(num_patches)
    if side * side != num_patches or not side:
        raise ValueError(
            f"the position table has {num_patches} patches, which is no square grid; say its pixels with --image_size "
            "HEIGHT WIDTH"
        )
    return side * patch_size[0], side * patch_size[1]


def known(told: Any, stated: Any, what: str, flag: str) -> Any:
    """What the user tells, with a warning where the source states something else; without it, what the source states.

    Raises:
        ValueError: neither; says which flag to give.
    """
    if told is None and stated is None:
        raise ValueError(f"{what} is not stored in weights, and nothing beside these says it; say it with {flag}")
    if None not in (told, stated) and told != stated:
        logger.warning("the source says %s for %s; converting with %s as told", stated, what, told)
    return stated if told is None else told


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
