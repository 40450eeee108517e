"""Models for the recipes: loaded or new, frozen in parts, and how far each parameter is from the head."""

from __future__ import annotations

import difflib
import tempfile

import torch
from transformers import CLIPImageProcessor, DPTImageProcessor, PreTrainedModel

from recipes.arguments import ModelArguments, RecipeArguments
from vit_embed import VitEmbedConfig, VitEmbedModel, VitEmbedTextModel

# What wrappers put in front of the names of a model's own parameters (peft, FSDP, torch.compile, DDP).
WRAPPER_NAMES = ("base_model.model.", "_fsdp_wrapped_module.", "_orig_mod.", "module.")


# --- loading ---


def load_model(
    model_class: type[PreTrainedModel],
    arguments: ModelArguments,
    *,
    default: str | None = None,
    any_head: bool = False,
    **fields,
) -> PreTrainedModel:
    """A model in float32 from a checkpoint, or a new one from a config.

    Args:
        default: checkpoint to start from where the command line names neither.
        any_head: whether the checkpoint's head may be of another size, and is then new.
        fields: of the config, beside those that the command line sets.

    Raises:
        ValueError: both a checkpoint and a config are named, or neither and there is no default.
    """
    source, config_name = arguments.model_name_or_path, arguments.config_name
    if source is not None and config_name is not None:
        raise ValueError("expected one of --model_name_or_path and --config_name, got both")
    if source is None and config_name is None and default is None:
        raise ValueError("expected one of --model_name_or_path and --config_name, got neither")
    fields = {**fields, **arguments.config_fields(), "attn_implementation": arguments.attn_implementation}
    if config_name is not None:
        config = VitEmbedConfig.from_pretrained(config_name, **fields)
        config.name_or_path = ""  # no weights come from there
        return model_class(config)
    # The weights are trained in float32, whatever is stored; --bf16 is for the arithmetic.
    return model_class.from_pretrained(
        source or default, dtype=torch.float32, ignore_mismatched_sizes=any_head, **fields
    )


def image_processor_of(model: PreTrainedModel) -> CLIPImageProcessor | DPTImageProcessor:
    """The image processor that the model is saved with, at the size of its config: that of the checkpoint it was loaded
    from; a new model gets CLIP's mean and standard deviation."""
    processor_class = DPTImageProcessor if model.image_processor_type == "DPTImageProcessor" else CLIPImageProcessor
    with tempfile.TemporaryDirectory() as folder:
        model.save_processor(folder)
        return processor_class.from_pretrained(folder)


# --- parts ---


def base_model_of(model: torch.nn.Module) -> torch.nn.Module:
    """The model itself, without peft's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def own_name(name: str) -> str:
    """The name that a parameter has in the model itself, without what peft, FSDP or DDP put before it."""
    for wrapper in WRAPPER_NAMES:
        name = name.replace(wrapper, "")
    return name


def towers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The image tower and, if there is one, the text tower."""
    return [module for module in model.modules() if isinstance(module, (VitEmbedModel, VitEmbedTextModel))]


def steps_to_head(model: torch.nn.Module) -> dict[torch.nn.Parameter, int]:
    """How many layers up the head is from each parameter of a tower: 0 after the last layer, most in the stem.

    Differs from BEiT (arXiv:2106.08254) in nothing but the count of each tower by its own depth.
    """
    steps = {}
    for tower in towers_of(model):
        layers = tower.encoder.layers
        entrance = [tower.embeddings, getattr(tower, "pre_layrnorm", None)]
        parts = [(module, len(layers) + 1) for module in entrance if module is not None]
        parts += [(layer, len(layers) - index) for index, layer in enumerate(layers)]
        steps.update({parameter: count for module, count in parts for parameter in module.parameters()})
    return steps


def frozen_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The largest modules of which no parameter is trained.

    Embeddings count in parts: patches are dropped before a trained encoder, whether or not the stem is trained.
    """
    found = []
    for name, child in model.named_children():
        parameters = list(child.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters) and name != "embeddings":
            found.append(child)
        else:
            found += frozen_modules(child)
    return found


# --- what the recipe's options change ---


def prepare(model: torch.nn.Module, recipe: RecipeArguments) -> None:
    """Freeze what `recipe.freeze` names, set the share of patches dropped, and lay out the weights.

    Raises:
        ValueError: no parameter has such a name, none is left to train, or the model cannot drop patches.
    """
    names = {own_name(name): parameter for name, parameter in model.named_parameters()}
    for prefix in recipe.freeze:
        chosen = [parameter for name, parameter in names.items() if f"{name}.".startswith(prefix.rstrip(".") + ".")]
        if not chosen:
            known = {".".join(name.split(".")[:end]) for name in names for end in range(1, name.count(".") + 2)}
            near = difflib.get_close_matches(prefix, sorted(known), n=5, cutoff=0.3) or sorted(known)[:5]
            raise ValueError(f"--freeze {prefix}: no parameter has a name that begins so; near are {', '.join(near)}")
        for parameter in chosen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in names.values()):
        raise ValueError(f"expected parameters to train, --freeze {' '.join(recipe.freeze)} leaves none")
    if recipe.patch_drop_rate is not None:
        _set_patch_drop_rate(model, recipe.patch_drop_rate)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)  # the output of a convolution has the layout of its weight


def _set_patch_drop_rate(model: torch.nn.Module, rate: float) -> None:
    tower = next(tower for tower in towers_of(model) if isinstance(tower, VitEmbedModel))
    if rate and not any(parameter.requires_grad for parameter in tower.parameters()):
        raise ValueError(f"--patch_drop_rate {rate} drops patches of a trunk in training, but this one is frozen")
    own = base_model_of(model)
    with torch.device("meta"):  # the config and the class refuse a rate that they cannot work with
        type(own)(type(own.config).from_dict({**own.config.to_dict(), "patch_drop_rate": rate}))
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "patch_drop_rate"):
            config.patch_drop_rate = rate
