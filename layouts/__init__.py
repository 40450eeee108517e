"""Every layout that can be converted, by the name that `--layout` takes."""

from vit_embed.layouts import deepseek_ocr, dinov2, hf_clip, hf_vit, open_clip, openai, timm, torch_encoder
from vit_embed.layouts.rules import Layout, SourceConfig, StateDict

LAYOUTS: dict[str, Layout] = {
    "openai": openai.LAYOUT,
    "open_clip": open_clip.LAYOUT,
    "timm": timm.LAYOUT,
    "hf_clip": hf_clip.LAYOUT,
    "deepseek_ocr": deepseek_ocr.LAYOUT,
    "torch_encoder": torch_encoder.LAYOUT,
    "hf_vit": hf_vit.LAYOUT,
    "dinov2": dinov2.LAYOUT,
}


# What the `reference` of a layout runs, for the card.
REFERENCES = {
    "openai": "OpenAI's own code (clip-anytorch)",
    "open_clip": "open_clip's own code",
    "hf_clip": "transformers' own class",
    "timm": "timm's own class",
    "hf_vit": "transformers' own class",
    "dinov2": "transformers' own class, for Meta's files timm's",
    "deepseek_ocr": "",
    "torch_encoder": "torch's own layers, put together as this layout takes them to be",
}


def detect_layout(state_dict: StateDict, source_config: SourceConfig) -> tuple[str, str]:
    """The one layout that a source is of, and why.

    Raises:
        ValueError: none fits, or several; lists them.
    """
    reasons = {name: layout.detect(state_dict, source_config) for name, layout in LAYOUTS.items()}
    reasons = {name: reason for name, reason in reasons.items() if reason is not None}
    if not reasons:
        keys = ", ".join(list(state_dict)[:3])
        raise ValueError(
            f"this source is of no known layout ({', '.join(LAYOUTS)}); it has {len(state_dict)} tensors: {keys}, ...; "
            "if it is of one of these, say which with --layout"
        )
    if len(reasons) > 1:
        candidates = "; ".join(f"--layout {name}, as {reason}" for name, reason in reasons.items())
        raise ValueError(f"this source may be of several layouts, say which it is: {candidates}")
    return next(iter(reasons.items()))
