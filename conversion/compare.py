"""Source and result on the same inputs: the one by its own code, the other from its folder."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from vit_embed import VitEmbedConfig
from vit_embed.contrastive_vit_embed import MAX_LOGIT_SCALE
from vit_embed.conversion.layouts.layout import Layout, SampleInputs, StateDict
from vit_embed.conversion.memory import one_by_one, return_freed_memory
from vit_embed.conversion.source import Source
from vit_embed.modeling_vit_embed import VitEmbedPreTrainedModel

logger = logging.getLogger(__name__)

# Both forms compute in float32 in another order of operations; small models with random weights differ by 1e-6 of the
# largest feature, 24 layers of 1024 by 1e-5. A wrong conversion is off by the whole size of a feature.
MAX_RELATIVE_DIFFERENCE = 1e-3
# The same in half precision, whose roundings move features of random weights by some hundredths of the largest.
MAX_ROUNDED_DIFFERENCE = 0.2

# What is compared: the name that a layout's `reference` gives it, and how ours computes it.
OUTPUTS: dict[str, Callable[[VitEmbedPreTrainedModel, SampleInputs], torch.Tensor]] = {
    "last_hidden_state": lambda model, inputs: model.trunk(inputs.pixel_values).last_hidden_state,
    "pooler_output": lambda model, inputs: model.trunk(inputs.pixel_values).pooler_output,
    "image_features": lambda model, inputs: model.get_image_features(inputs.pixel_values),
    "text_features": lambda model, inputs: model.get_text_features(inputs.input_ids),
    "logits_per_image": lambda model, inputs: (
        model(inputs.pixel_values, inputs.input_ids, return_loss=False).logits_per_image
    ),
    "logits": lambda model, inputs: model(inputs.pixel_values).logits,
    "predicted_depth": lambda model, inputs: model(inputs.pixel_values).predicted_depth,
}


def sample_inputs(config: VitEmbedConfig) -> SampleInputs:
    """Two images and, for a text tower, two texts of different lengths, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(2, config.num_channels, *config.image_shape, generator=generator)
    text_config = config.text_config
    if text_config is None:
        return SampleInputs(pixel_values, None)
    length = text_config.max_position_embeddings
    # Ids below both special tokens, where those are the last two of the vocabulary.
    input_ids = torch.randint(0, max(1, text_config.vocab_size - 2), (2, length), generator=generator)
    if text_config.pooling_type == "eos":
        end = text_config.eos_token_id
        input_ids = torch.where(input_ids == end, 0 if end else 1, input_ids)
        if text_config.bos_token_id is not None:
            input_ids[:, 0] = text_config.bos_token_id
        input_ids[0, -1:] = end
        input_ids[1, length // 2 :] = end
    else:
        input_ids[1, length // 2 :] = text_config.pad_token_id
    return SampleInputs(pixel_values, input_ids)


def exceeds_bound(config: VitEmbedConfig, weights: StateDict) -> bool:
    """Whether ours bounds a logit scale that the source does not."""
    scale = weights.get("logit_scale")
    # bfloat16 rounds ln 100 up by 0.005
    return scale is not None and config.contrastive_loss == "softmax" and float(scale) > MAX_LOGIT_SCALE + 0.01


@torch.no_grad()
def compare(
    layout: Layout, source: Source, folder: Path, model_class: type[VitEmbedPreTrainedModel], dtype: torch.dtype
) -> dict[str, float] | None:
    """Runs the source by its own code, and the folder, on the same inputs in float32.

    The one is gone before the other is loaded, so that both never are in memory.

    Args:
        dtype: of the folder's weights, which says how near the two must be.

    Returns:
        The largest absolute difference of each output; None, with the reason in the log, where the source cannot run.

    Raises:
        ValueError: the folder computes something else, or the source's code cannot take its weights.
    """
    config = model_class.config_class.from_pretrained(folder)
    inputs = sample_inputs(config)
    try:
        expected = layout.reference(source.state_dict(is_logged=False), source.config, config, inputs)
        return_freed_memory()
    except RuntimeError as error:
        raise ValueError(f"the source's own code does not run these weights with their config: {error}") from error
    except ImportError as error:
        logger.info("the source could not be run: %s; the folder holds what was converted, bit for bit", error)
        return None
    model = model_class.from_pretrained(folder, dtype=dtype).eval()
    parameters = dict(model.named_parameters())
    # `model.float()`, or loading as float32, would keep both forms of all of them in memory.
    for name, stored in one_by_one({name: each.data for name, each in parameters.items()}):
        parameters[name].data = stored.float()
    if exceeds_bound(config, dict(model.named_parameters())):
        expected.pop("logits_per_image", None)
    allowed = MAX_RELATIVE_DIFFERENCE if dtype == torch.float32 else MAX_ROUNDED_DIFFERENCE
    differences = {}
    for name, value in expected.items():
        difference, size = float((OUTPUTS[name](model, inputs) - value).abs().max()), float(value.abs().max())
        logger.info("largest difference of %s between source and result: %.2e of %.2e", name, difference, size)
        if not difference <= allowed * size:
            raise ValueError(
                f"{name} of the result differs from the source's by {difference:.2e} where its largest is {size:.2e}; "
                "this source is not what it seems to be, or the converter is wrong"
            )
        differences[name] = difference
    return differences
