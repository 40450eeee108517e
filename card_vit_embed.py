"""The model card (README.md) of weights that are pushed to the Hub, and the texts of their licence."""

import logging
import os
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load
from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
# What the licences of weights ask to be passed on with them.
LICENCE_FILES = ("LICENSE*", "LICENCE*", "COPYING*")
NOTICE_FILES = ("NOTICE*",)

# How each class is loaded, what it reads, and what the Hub calls its task.
LOADED_AS = {
    "VitEmbedModel": ("AutoModel", "AutoImageProcessor", "image-feature-extraction"),
    "VitEmbedModelWithProjection": ("AutoModel", "AutoImageProcessor", "image-feature-extraction"),
    "VitEmbedTextModel": ("AutoModel", "AutoTokenizer", "feature-extraction"),
    "VitEmbedTextModelWithProjection": ("AutoModel", "AutoTokenizer", "feature-extraction"),
    "VitEmbedForContrastive": ("AutoModel", "AutoProcessor", "zero-shot-image-classification"),
    "VitEmbedForImageClassification": (
        "AutoModelForImageClassification",
        "AutoImageProcessor",
        "image-classification",
    ),
    "VitEmbedForDepthEstimation": ("AutoModelForDepthEstimation", "AutoImageProcessor", "depth-estimation"),
    # What its decoder gives is for training; its trunk is what is used.
    "VitEmbedForMaskedImageModeling": ("AutoModel", "AutoImageProcessor", "image-feature-extraction"),
    "VitEmbedBackbone": ("AutoBackbone", "AutoImageProcessor", "image-feature-extraction"),
}

CARD = """---
{metadata}
---

# {title}

{description} {num_parameters:,} parameters.

{sizes}

{origin}

```python
from transformers import {auto_class}, {processor}

model = {auto_class}.from_pretrained("{repo_id}", trust_remote_code=True)
processor = {processor}.from_pretrained("{repo_id}", trust_remote_code=True)
```
"""


def model_card(model: Any, repo_id: str, source: dict[str, Any], tags: list[str] | None = None) -> str:
    """The card of a model: what it is, how large, what it was made from, how it is loaded. What its training data and
    results are, nobody but its owner knows: the card says that they are not stated.

    Args:
        model: any of our classes; its weights are not looked at.
        repo_id: the repository's name on the Hub.
        source: the front matter of the card of the checkpoint that the model was loaded from, {} for none: its licence
            is passed on, and its base model where it has no name on the Hub itself.
        tags: besides those of the class.
    """
    name = type(model).__name__
    auto_class, processor, task = LOADED_AS[name]
    base = getattr(model.config, "_name_or_path", "") or None
    if base is None or os.path.exists(base) or base.count("/") > 1:  # a folder's name says nobody anything
        base = source.get("base_model")
    licence = source.get("license")
    origin = ", ".join(base) if isinstance(base, list) else base
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        license=licence,
        base_model=base,
        tags=["vit_embed", "clip", "custom_code", *(tags or ())],
    )
    stated = [f"Made from `{origin}`." if origin else "What the weights were made from is not stated here."]
    stated.append(f"The licence of the source is {licence}." if licence else "No licence is stated here.")
    stated.append("Training data and results are not stated here.")
    return CARD.format(
        metadata=metadata.to_yaml(),
        title=repo_id.rpartition("/")[2],
        description=f"`{name}` of vit_embed: {summary_of(type(model))}",
        num_parameters=model.num_parameters(),
        sizes=table_of_sizes(model.config),
        origin=" ".join(stated),
        auto_class=auto_class,
        processor=processor,
        repo_id=repo_id,
    )


def summary_of(model_class: type) -> str:
    """The first paragraph of its docstring, on one line."""
    text = " ".join((model_class.__doc__ or "").partition("\n\n")[0].split())
    return text[:1].lower() + text[1:]


def table_of_sizes(config: PretrainedConfig) -> str:
    """What the towers are: width, layers, heads, activation and input, in Markdown."""
    is_text = not hasattr(config, "stem_type")
    text = config if is_text else config.text_config
    towers, inputs = {}, []
    if not is_text:
        height, width = config.image_shape
        towers["image tower"] = config
        inputs.append(f"{height} x {width} pixels, patches of {config.patch_size}")
    if text is not None:
        towers["text tower"] = text
        inputs.append(f"{text.max_position_embeddings} of {text.vocab_size} tokens")
    rows = {
        "width": [tower.hidden_size for tower in towers.values()],
        "layers": [tower.num_hidden_layers for tower in towers.values()],
        "heads": [tower.num_attention_heads for tower in towers.values()],
        "activation": [tower.hidden_act for tower in towers.values()],
        "input": inputs,
    }
    head = f"| | {' | '.join(towers)} |\n|{'---|' * (len(towers) + 1)}\n"
    return head + "\n".join(f"| {name} | {' | '.join(map(str, cells))} |" for name, cells in rows.items())


def card_metadata(folder: str | None) -> dict[str, Any]:
    """The front matter of the card in a folder; {} where there is none."""
    path = os.path.join(folder or "", CARD_FILE)
    if folder is None or not os.path.isfile(path):
        return {}
    try:
        return metadata_load(path) or {}
    except (ValueError, yaml.YAMLError) as error:
        logger.warning("the licence in %s is missing from the model card: %s", path, error)
        return {}
