"""Every layout that can be converted, by the name that `--layout` takes."""

from collections import Counter

from vit_embed.conversion.layouts import deepseek_ocr, dinov2, hf_clip, hf_vit, open_clip, openai, timm, torch_encoder
from vit_embed.conversion.layouts.layout import Layout, SourceConfig, StateDict
from vit_embed.conversion.messages import listing

_MODULES = (openai, open_clip, timm, hf_clip, deepseek_ocr, torch_encoder, hf_vit, dinov2)
LAYOUTS: dict[str, Layout] = {module.LAYOUT.name: module.LAYOUT for module in _MODULES}

MAX_PREFIXES = 8  # the most common ones, that are looked below


def detect_layout(state_dict: StateDict, source_config: SourceConfig) -> tuple[str, str]:
    """The one layout that a source is of, and why.

    Raises:
        ValueError: none fits, or several; lists them.
    """
    reasons = detections(state_dict, source_config)
    if not reasons:
        _check_prefix(state_dict, source_config)
        raise ValueError(
            f"this source is of no known layout ({', '.join(LAYOUTS)}); its tensors are {listing(state_dict)}; if it "
            "is of one of these, give it with --layout"
        )
    if len(reasons) > 1:
        candidates = "; ".join(f"--layout {name}, as {reason}" for name, reason in reasons.items())
        raise ValueError(f"this source may be of several layouts, give the one that it is: {candidates}")
    return next(iter(reasons.items()))


def _check_prefix(state_dict: StateDict, source_config: SourceConfig) -> None:
    """Raises ValueError where the keys below a common prefix are those of a layout: a model inside another module."""
    parts = [key.split(".") for key in state_dict]
    prefixes = Counter(".".join(each[:depth]) + "." for each in parts for depth in (1, 2, 3) if len(each) > depth)
    for prefix, _ in prefixes.most_common(MAX_PREFIXES):
        inner = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
        if reasons := detections(inner, {}):
            raise ValueError(
                f'the keys below the prefix "{prefix}" are of layout {", ".join(reasons)}: save these weights '
                f'alone without it, as {{key.removeprefix("{prefix}"): value for key, value in state_dict.items() if '
                f'key.startswith("{prefix}")}}'
            )


def detections(state_dict: StateDict, source_config: SourceConfig) -> dict[str, str]:
    """{name of a layout that a source may be of: why}."""
    reasons = {name: layout.detect(state_dict, source_config) for name, layout in LAYOUTS.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}
