"""The README.md of a converted checkpoint: what it is, what it was made from, and how near it is to that."""

from collections.abc import Mapping

import torch

from vit_embed import VitEmbedConfig
from vit_embed.conversion.layouts.layout import Layout
from vit_embed.conversion.source import Source
from vit_embed.modeling_vit_embed import VitEmbedPreTrainedModel

# How a converted class is loaded, and what the Hub calls its task.
AUTO_CLASSES = {
    "VitEmbedModel": ("AutoModel", "image-feature-extraction"),
    "VitEmbedModelWithProjection": ("AutoModel", "image-feature-extraction"),
    "VitEmbedForContrastive": ("AutoModel", "zero-shot-image-classification"),
    "VitEmbedForImageClassification": ("AutoModelForImageClassification", "image-classification"),
    "VitEmbedForDepthEstimation": ("AutoModelForDepthEstimation", "depth-estimation"),
}


def model_card(
    source: Source,
    layout: Layout,
    hashes: Mapping[str, str],
    model: VitEmbedPreTrainedModel,
    dtype: torch.dtype,
    differences: Mapping[str, float] | None,
    has_tokenizer: bool,
) -> str:
    """The card's text.

    Args:
        model: what was written, its weights are not looked at.
        hashes: SHA-256 of every file of the source's weights by its name.
        dtype: of the stored weights.
        differences: the largest absolute difference of each output from the source's, or None where it was not run.
    """
    auto_class, task = AUTO_CLASSES[type(model).__name__]
    licence_field = f"license: {source.licence}\n" if source.licence else ""
    licence = f"The source states the licence {source.licence}." if source.licence else "The source states no licence."
    measured = "The source could not be run where this was converted."
    if differences is not None:
        rows = "".join(f"| {name} | {difference:.2e} |\n" for name, difference in differences.items())
        measured = (
            f"Largest absolute difference from {layout.reference_name} on the same random inputs, in float32:\n\n"
            f"| output | difference |\n|---|---|\n{rows}"
        ).rstrip()
    files = "\n".join(f"| `{name}` | `{digest}` |" for name, digest in hashes.items())
    origin = (
        f'Converted from `{source.name}` by `vit_embed.convert_checkpoint`, layout "{layout.name}", stored in '
        f"{str(dtype).removeprefix('torch.')}."
    )
    processor = "AutoProcessor" if has_tokenizer else "AutoImageProcessor"
    config = model.config
    return f"""---
library_name: transformers
pipeline_tag: {task}
{licence_field}tags:
- clip
- vit_embed
- feature-extraction
---

# {_title(source)} as vit_embed

{origin} {licence}

| file of the source | SHA-256 |
|---|---|
{files}

{_sizes(config)}

{type(model).__name__}, {model.num_parameters():,} parameters.

{measured}

```python
from transformers import {auto_class}, {processor}

model = {auto_class}.from_pretrained("path/to/this/folder", trust_remote_code=True)
processor = {processor}.from_pretrained("path/to/this/folder", trust_remote_code=True)
```
"""


def _title(source: Source) -> str:
    return source.weights.stem if source.name.endswith(source.weights.name) else source.name.rstrip("/")


def _sizes(config: VitEmbedConfig) -> str:
    """A table of what the towers are."""
    height, width = config.image_shape
    towers = {"image tower": config, "text tower": config.text_config}
    towers = {name: tower for name, tower in towers.items() if tower is not None}
    inputs = {"image tower": f"{height} x {width} pixels, patches of {config.patch_size}"}
    if config.text_config is not None:
        text = config.text_config
        inputs["text tower"] = f"{text.max_position_embeddings} of {text.vocab_size} tokens"
    rows = {
        "width": [tower.hidden_size for tower in towers.values()],
        "layers": [tower.num_hidden_layers for tower in towers.values()],
        "heads": [tower.num_attention_heads for tower in towers.values()],
        "activation": [tower.hidden_act for tower in towers.values()],
        "input": [inputs[name] for name in towers],
    }
    head = f"| | {' | '.join(towers)} |\n|{'---|' * (len(towers) + 1)}\n"
    return head + "\n".join(f"| {name} | {' | '.join(map(str, cells))} |" for name, cells in rows.items())
