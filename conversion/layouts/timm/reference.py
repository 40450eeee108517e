"""Running timm's own model on the source's weights."""

from functools import partial

import torch

from vit_embed import VitEmbedConfig
from vit_embed.conversion.layouts.layout import SampleInputs, SourceConfig, StateDict
from vit_embed.conversion.layouts.running import as_float32
from vit_embed.conversion.layouts.timm.config_file import (
    CLASSIFIER,
    NORM_LAYERS,
    PROJECTION,
    model_arguments,
    original_form,
    read_config,
)


@torch.no_grad()
def reference(
    state_dict: StateDict, source_config: SourceConfig, config: VitEmbedConfig, inputs: SampleInputs
) -> dict[str, torch.Tensor]:
    """States and answers of timm's own model: of the architecture that the config names, or a VisionTransformer.

    Raises:
        ImportError: timm is not installed, or needs a package that is not.
        ValueError: the architecture named does not take these weights.
    """
    import timm
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    distilled = "dist_token" in state_dict
    arguments = {
        **model_arguments(config, original_form(config)["no_embed_class"]),
        "num_classes": state_dict["head.weight"].shape[0] if "head.weight" in state_dict else 0,
        "norm_layer": partial(getattr(timm.layers, NORM_LAYERS[config.norm_type]), eps=config.layer_norm_eps),
        "weight_init": "skip",
    }
    if distilled:
        arguments["reg_tokens"] = 0
    name = read_config(source_config).name
    make = VisionTransformerDistilled if distilled else VisionTransformer
    if name is not None and timm.is_model(name):
        make = partial(timm.create_model, name)
    try:
        with torch.device("meta"):
            model = make(**arguments).eval()
        model.load_state_dict(as_float32(state_dict), assign=True)
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"timm's {name or make.__name__} does not take these weights: {error}") from error
    states = {}
    model.blocks.register_forward_hook(lambda module, arguments, output: states.update(last=output))
    features = model.forward_features(inputs.pixel_values)
    outputs = {"last_hidden_state": states["last"]}
    # The pooled vector of a distilled model is the mean of two tokens; ours is the first of them.
    outputs["pooler_output"] = features[:, 0] if distilled else model.forward_head(features, pre_logits=True)
    answer = {CLASSIFIER: "logits", PROJECTION: "image_features"}.get(config.architectures[0])
    if answer is not None:
        outputs[answer] = model.forward_head(features)
    return outputs
