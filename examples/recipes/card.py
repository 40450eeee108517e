"""The model card (README.md) of a trained folder, and the licence of the checkpoint that training started from."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
import transformers
import yaml
from huggingface_hub import ModelCardData, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.repocard import metadata_load
from transformers import PreTrainedModel, TrainingArguments

from recipes.arguments import SHIPPED_CHECKPOINT
from vit_embed.card_vit_embed import CARD_FILE, LICENCE_FILES, LOADED_AS, NOTICE_FILES
from vit_embed.retrieval.pictures import SCALED

logger = logging.getLogger(__name__)

LICENCE_FIELDS = ("license", "license_name", "license_link")  # of the front matter
# What is not a result: how long it took, and where it stands in training.
NOT_A_METRIC = ("_runtime", "_per_second", "_preparation_time", "epoch")
# How a class's output is read.
USES = {
    "VitEmbedForContrastive": (
        'inputs = processor(text=["a cat", "a dog"], images=image, padding=True, return_tensors="pt")\n'
        "probabilities = model(**inputs).logits_per_image.{probability}  # of each text"
    ),
    "VitEmbedForImageClassification": (
        'logits = model(**processor(image, return_tensors="pt")).logits\n'
        "print(model.config.id2label[logits.argmax().item()])"
    ),
    "VitEmbedForDepthEstimation": (
        'depth = model(**processor(image, return_tensors="pt")).predicted_depth  # (1, height, width)'
    ),
    "VitEmbedForMaskedImageModeling": (
        'features = model(**processor(image, return_tensors="pt")).pooler_output  # of the pretrained trunk'
    ),
}
# How those of a classifier are, by the config's problem_type where it is not one label a picture.
CLASSIFIER_USES = {
    "multi_label_classification": (
        'probabilities = model(**processor(image, return_tensors="pt")).logits.sigmoid()[0].tolist()\n'
        "print([model.config.id2label[number] for number, each in enumerate(probabilities) if each >= 0.5])"
    ),
    "regression": (
        'values = model(**processor(image, return_tensors="pt")).logits[0].tolist()  # in the units of the data\n'
        "print(dict(zip(model.config.id2label.values(), values)))"
    ),
}


@dataclass
class Base:
    """The checkpoint that training started from.

    Args:
        name: as its user named it; "" for a new model.
        folder: its files, or those of them that its licence needs; None where there are none.
        licence: the licence fields of its own card.
    """

    name: str
    folder: Path | None = None
    licence: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel) -> Base:
        """That of a model, read before training, so that saving asks no Hub."""
        name = model.name_or_path
        if not name:
            return cls("")
        folder = Path(name)
        if not folder.is_dir():
            try:
                folder = Path(snapshot_download(name, allow_patterns=[CARD_FILE, *LICENCE_FILES, *NOTICE_FILES]))
            except (OSError, HfHubHTTPError, ValueError) as error:
                logger.warning("the licence of %s is missing from the model card: %s", name, error)
                return cls(name)
        try:
            stated = (metadata_load(folder / CARD_FILE) or {}) if (folder / CARD_FILE).is_file() else {}
        except (ValueError, yaml.YAMLError) as error:
            logger.warning("the licence in %s is missing from the model card: %s", folder / CARD_FILE, error)
            stated = {}
        return cls(name, folder, {name: stated[name] for name in LICENCE_FIELDS if name in stated})

    @property
    def shown_name(self) -> str:
        """Without the path, which means something on one machine alone."""
        return "the checkpoint of vit_embed" if self.name == SHIPPED_CHECKPOINT else f"`{public_name(self.name)}`"

    def copy_licence(self, output_dir: Path) -> list[str]:
        """Copies the files of the licence; returns their names."""
        names = []
        for pattern in (*LICENCE_FILES, *NOTICE_FILES) if self.folder is not None else ():
            for path in sorted(self.folder.glob(pattern)):
                if path.is_file() and not (output_dir / path.name).exists():
                    shutil.copyfile(path, output_dir / path.name)
                names.append(path.name)
        return names


def is_on_the_hub(name: str) -> bool:
    return bool(name) and not os.path.exists(name) and not name.startswith((".", "/", "~"))


def public_name(name: str) -> str:
    return name if is_on_the_hub(name) else Path(name).resolve().name


def write_model_card(
    model: PreTrainedModel,
    model_class: type[PreTrainedModel],
    base: Base,
    data: str,
    training: TrainingArguments,
    steps: int,
    results: dict[str, dict[str, float]],
    data_notes: dict[str, list[str]] | None = None,
) -> None:
    """Writes the card into the output folder, and beside it the licence files of the base.

    Args:
        data: folder or Hub id of the data set.
        steps: how many were trained.
        results: {"eval" or "test": metrics, with that before their names}.
        data_notes: {split: what was left out of it or changed in it}.
    """
    output_dir = Path(training.output_dir)
    licence_files = base.copy_licence(output_dir)
    auto_class, processor_class, task = LOADED_AS[model_class.__name__]
    # A model of the sigmoid loss scores each pair by itself.
    use = CLASSIFIER_USES.get(model.config.problem_type, USES[model_class.__name__])
    use = use.format(probability="sigmoid()" if model.config.contrastive_loss == "sigmoid" else "softmax(dim=-1)")
    name = training.hub_model_id or output_dir.resolve().name
    matter = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=["vit_embed", "generated_from_trainer"],
        base_model=base.name if is_on_the_hub(base.name) else None,
        datasets=[data] if is_on_the_hub(data) else None,
        **base.licence,
    )
    with torch.device("meta"):
        parameters = model_class(model.config).num_parameters()
    height, width = model.config.image_shape
    start = f"fine-tuned from {base.shown_name}" if base.name else "trained from scratch"
    sections = {
        f"# {name.split('/')[-1]}": f"`{model_class.__name__}` of vit_embed for {task.replace('-', ' ')}: "
        f"{parameters:,} parameters, pictures of {height} x {width} pixels, {start} on `{public_name(data)}`.",
        "## Metrics": metrics_table(results) or "Not evaluated.",
        "## Data": data_text(data_notes or {}),
        "## Use": f"""```python
from PIL import Image, ImageOps
from transformers import {auto_class}, {processor_class}

name = "{training.hub_model_id or "path/to/this/folder"}"
model = {auto_class}.from_pretrained(name, trust_remote_code=True)
processor = {processor_class}.from_pretrained(name, trust_remote_code=True)
image = ImageOps.exif_transpose(Image.open("picture.jpg")).convert("RGBA")  # upright and on white, as in training
image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
{use}
```""",
        "## Training": training_table(training, steps),
        "## Licence": licence_text(base, licence_files),
    }
    text = "\n\n".join(f"{heading}\n\n{content}" for heading, content in sections.items() if content)
    (output_dir / CARD_FILE).write_text(f"---\n{matter.to_yaml()}\n---\n\n{text}\n", encoding="utf-8")


def metrics_table(results: dict[str, dict[str, float]]) -> str:
    """A column for each split that was evaluated."""
    columns = {
        split: {
            name.removeprefix(f"{split}_"): value for name, value in metrics.items() if not name.endswith(NOT_A_METRIC)
        }
        for split, metrics in results.items()
    }
    names = dict.fromkeys(name for metrics in columns.values() for name in metrics)
    rows = [["metric", *columns], ["---"] * (len(columns) + 1)]
    for name in names:
        values = [metrics.get(name) for metrics in columns.values()]
        rows.append([name, *("" if value is None else f"{value:.4g}" for value in values)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) if names else ""


def data_text(notes: dict[str, list[str]]) -> str:
    """A line for each split, and how to read pictures where transformers would read them in another way."""
    text = "\n".join(f"- {split}: {'; '.join(lines)}" for split, lines in notes.items() if lines)
    if not any(changed in text for changed in (SCALED, "transparency")):
        return text
    return (
        f"{text}\n\nPipelines and `load_image` of transformers show what lies under the alpha channel, and cut 16 bits "
        "of grey at 255: read pictures as below, or with `vit_embed.load_picture`, which also puts white drawings on "
        "black and scales greys."
    )


def training_table(training: TrainingArguments, steps: int) -> str:
    batch = training.train_batch_size * training.world_size * training.gradient_accumulation_steps
    rows = {
        "steps": steps,
        "batch size": batch,
        "learning rate": f"{training.learning_rate:g}, {getattr(training.lr_scheduler_type, 'value', 'constant')}",
        "weight decay": f"{training.weight_decay:g}",
        "seed": training.seed,
        "precision": "bfloat16" if training.bf16 else "float16" if training.fp16 else "float32",
        "versions": f"transformers {transformers.__version__}, torch {torch.__version__}, "
        f"datasets {datasets.__version__}",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def licence_text(base: Base, files: list[str]) -> str:
    if not base.name:
        return "A new model: it has the licence that its owner gives it, within the terms of the data."
    stated = base.licence.get("license_name") or base.licence.get("license")
    text = f"The base states the licence {stated}" if stated else "No card of the base states its licence"
    return f"{text}; its {', '.join(files)} {'lies' if len(files) == 1 else 'lie'} here." if files else f"{text}."
