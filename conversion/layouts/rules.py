"""Renaming the weights of a model by a table that reads both ways.

A layout's table of rules sends each key of its files to one or more of ours; `convert_weights` follows it,
`reverse_rules` goes back. Every key is accounted for: one that is left over and one that is not filled are errors.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from vit_embed import VitEmbedConfig
from vit_embed.conversion.layouts.layout import Converted, StateDict, empty_model, trunk_prefix
from vit_embed.conversion.memory import one_by_one
from vit_embed.conversion.messages import listing

logger = logging.getLogger(__name__)


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
    """A Rule, with its targets one after the other."""
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


def below(prefix: str, rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The same rules for a source whose keys all start with `prefix`."""
    return tuple(each._replace(source=prefix + each.source) for each in rules)


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


# There


def convert_weights(
    config: VitEmbedConfig, state_dict: StateDict, rules: Iterable[Rule], dtype: torch.dtype
) -> Converted:
    """The model that `config` describes, every weight of it from the source.

    In `rules` the trunk is "vision_model", whichever class it is. Raises as `apply_rules` does.
    """
    model = empty_model(config)
    prefix = trunk_prefix(model)
    shapes = {prefix + name: tensor.shape for name, tensor in model.state_dict().items()}
    weights = apply_rules(state_dict, rules, shapes, dtype)
    return Converted(model, {name.removeprefix(prefix): tensor for name, tensor in weights.items()})


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
    for key, tensor in one_by_one(state_dict, "converting"):
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
    # Almost always none, which the extremes show in one pass and without a mask as long as the tensor.
    if not tensor.numel() or torch.stack(tensor.aminmax()).isfinite().all():
        return 0
    return tensor.numel() - int(tensor.isfinite().sum())


# Back


def reverse_rules(weights: StateDict, rules: Iterable[Rule]) -> dict[str, torch.Tensor]:
    """Our weights under the source's names, as `apply_rules` would read them. The first rule for a weight is taken.

    Args:
        weights: by the names that the rules have as targets; left as they are.

    Raises:
        ValueError: a weight without a place in the layout, or without the others that it is stored with.
    """
    patterns = [(_pattern(each.targets[0]), each) for each in rules if each.targets]
    result, used = {}, set()
    for name, _ in one_by_one(weights):
        found, values = _matching(name, patterns)
        names = [] if found is None else [target.format(**values) for target in found.targets]
        if found is None or not all(each in weights for each in names):
            continue
        used.update(names)
        whole = torch.cat([weights[each] for each in names]) if len(names) > 1 else weights[name]
        whole = (whole.t() if found.transposed else whole).contiguous()
        result[found.source.format(**values)] = whole.reshape([1] * found.leading + list(whole.shape))
    if left_over := [name for name in weights if name not in used]:
        raise ValueError(f"weights of the model without a place in this layout: {listing(left_over)}")
    return result
