"""Layout "openai": the reference code of CLIP (github.com/openai/CLIP, clip/model.py), and what is trained with it."""

import importlib.util
from types import ModuleType
from typing import Any

import torch

from vit_embed import VitEmbedConfig, VitEmbedTextConfig
from vit_embed.configuration_vit_embed import CLIP_ARCHITECTURE
from vit_embed.conversion.layouts.layout import (
    ConversionOptions,
    Converted,
    Layout,
    Restored,
    SampleInputs,
    SourceConfig,
    StateDict,
)
from vit_embed.conversion.layouts.questions import (
    CLIP_HEAD_WIDTH,
    check_sizes,
    clip_heads,
    count_layers,
    layer_norm_at_end,
    require,
    resolve,
    square_clip_size,
)
from vit_embed.conversion.layouts.rules import Rule, convert_weights, fused, layer_rules, left_out, reverse_rules, rule
from vit_embed.conversion.layouts.running import as_float32
from vit_embed.conversion.openai_files import find_openai_file

# Keys that only OpenAI's own archives carry beside the weights: proof of where a checkpoint comes from.
METADATA = ("input_resolution", "context_length", "vocab_size")
MLP_RATIO = 4  # of both towers, in OpenAI's `build_model`

LAYER_NAMES = {
    "ln_1.{p}": "layer_norm1.{p}",
    **fused("attn.in_proj", separator="_"),
    "attn.out_proj.{p}": "self_attn.out_proj.{p}",
    "ln_2.{p}": "layer_norm2.{p}",
    "mlp.c_fc.{p}": "mlp.fc1.{p}",
    "mlp.c_proj.{p}": "mlp.fc2.{p}",
}
TRUNK_RULES = (
    rule("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    rule("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    rule("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    rule("visual.ln_pre.{p}", "vision_model.pre_layrnorm.{p}"),
    *layer_rules("visual.transformer.resblocks.{n}", "vision_model.encoder.layers.{n}", LAYER_NAMES),
    rule("visual.ln_post.{p}", "vision_model.post_layernorm.{p}"),
)
HEAD_RULES = (
    rule("visual.proj", "visual_projection.weight", transposed=True),
    rule("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    rule("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    *layer_rules("transformer.resblocks.{n}", "text_model.encoder.layers.{n}", LAYER_NAMES),
    rule("ln_final.{p}", "text_model.final_layer_norm.{p}"),
    rule("text_projection", "text_projection.weight", transposed=True),
    rule("logit_scale", "logit_scale"),
)
METADATA_RULES = tuple(Rule(key) for key in METADATA)

# The tensors that sizes are read from, and what their axes are.
SIZES = {
    "visual.conv1.weight": ("width", "channels", "patch height", "patch width"),
    "visual.positional_embedding": ("1 + patches", "width"),
    "visual.proj": ("width", "joint width"),
    "visual.transformer.resblocks.0.mlp.c_fc.weight": ("MLP width", "width"),
    "token_embedding.weight": ("vocabulary", "text width"),
    "positional_embedding": ("context length", "text width"),
    "transformer.resblocks.0.mlp.c_fc.weight": ("text MLP width", "text width"),
}


def detect(state_dict: StateDict, source_config: SourceConfig) -> str | None:
    """The keys of OpenAI's CLIP. Without its metadata they are those of open_clip as well."""
    if "visual.conv1.weight" not in state_dict and "visual.layer1.0.conv1.weight" not in state_dict:
        return None
    if "token_embedding.weight" not in state_dict:
        return None
    if _is_openais_own(state_dict):
        return "it has OpenAI's keys and the sizes that OpenAI's archives carry"
    return None if source_config else "it has OpenAI's keys"


def convert(state_dict: StateDict, source_config: SourceConfig, options: ConversionOptions) -> Converted:
    """OpenAI's CLIP with a vision transformer, a VitEmbedForContrastive.

    Args:
        state_dict: the keys of OpenAI's `clip.model.CLIP`; with those of METADATA it is known to be OpenAI's.
        source_config: not read, OpenAI has none.
        options: `hidden_act` is needed for weights that are not known to be OpenAI's.

    Raises:
        ValueError: a ResNet CLIP, another layout, or weights that contradict each other; names them.

    Source: `build_model` in OpenAI's clip/model.py, for the sizes and for heads = width // 64.
    """
    if any(key.startswith(("visual.attnpool.", "visual.layer1.")) for key in state_dict):
        raise ValueError(
            "this is a ResNet CLIP (visual.layer1, visual.attnpool); only vision transformers can be converted: "
            "ViT-B/32, ViT-B/16, ViT-L/14 or ViT-L/14@336px"
        )
    check_sizes(state_dict, SIZES, "a CLIP in OpenAI's layout")
    config = _config(state_dict, options)
    heads = left_out(HEAD_RULES) if options.trunk_only else HEAD_RULES
    return convert_weights(config, state_dict, (*TRUNK_RULES, *heads, *METADATA_RULES), options.dtype)


def _config(state_dict: StateDict, options: ConversionOptions) -> VitEmbedConfig:
    """Every size of it read from a tensor."""
    image_size, patch_size = square_clip_size(
        state_dict, "visual.conv1.weight", "visual.positional_embedding", "OpenAI's CLIP"
    )
    width, channels = state_dict["visual.conv1.weight"].shape[:2]
    vocab_size, text_width = state_dict["token_embedding.weight"].shape
    context_length = len(state_dict["positional_embedding"])
    _check_metadata(state_dict, (image_size, context_length, vocab_size))
    hidden_act = resolve(
        options,
        "hidden_act",
        "quick_gelu" if _is_openais_own(state_dict) else None,
        default="quick_gelu",
        origin="OpenAI's own",
    )
    projection_dim = state_dict["visual.proj"].shape[1]
    text_config = VitEmbedTextConfig(
        vocab_size=vocab_size,
        hidden_size=text_width,
        num_hidden_layers=count_layers(state_dict, "transformer.resblocks"),
        num_attention_heads=_heads(text_width, options, "text_num_attention_heads"),
        intermediate_size=len(state_dict["transformer.resblocks.0.mlp.c_fc.weight"]),
        max_position_embeddings=context_length,
        hidden_act=hidden_act,
        projection_dim=projection_dim,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )
    return VitEmbedConfig(
        architectures=["VitEmbedModel" if options.trunk_only else "VitEmbedForContrastive"],
        converted_from={"layout": "openai"},
        hidden_size=width,
        num_hidden_layers=count_layers(state_dict, "visual.transformer.resblocks"),
        num_attention_heads=_heads(width, options, "num_attention_heads"),
        intermediate_size=len(state_dict["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
        hidden_act=hidden_act,
        image_size=image_size,
        patch_size=patch_size,
        num_channels=channels,
        projection_dim=projection_dim,
        text_config=None if options.trunk_only else text_config,
    )


def _is_openais_own(state_dict: StateDict) -> bool:
    return all(key in state_dict for key in METADATA)


def _check_metadata(state_dict: StateDict, sizes: tuple[int, int, int]) -> None:
    """Raises ValueError where a file states other sizes than its weights have."""
    for key, size in zip(METADATA, sizes):
        if key in state_dict and (state_dict[key].numel() != 1 or state_dict[key].item() != size):
            raise ValueError(f"{key} must be {size} as the weights say, got {state_dict[key].tolist()}")


def _heads(width: int, options: ConversionOptions, name: str) -> int:
    if getattr(options, name) is None and clip_heads(width) is None:
        raise ValueError(
            f"OpenAI's towers have one head for every {CLIP_HEAD_WIDTH} of their width, but this width is {width}; "
            f"give the number of heads with --{name}"
        )
    given = getattr(options, name)
    return clip_heads(width) if given is None else given


# The way back


def restore(config: VitEmbedConfig, weights: StateDict) -> Restored:
    """A dual encoder as OpenAI's `clip.load` reads it.

    Raises:
        ValueError: a model that OpenAI's code cannot compute; names every field.
    """
    _require(config)
    state_dict = reverse_rules(weights, (*TRUNK_RULES, *HEAD_RULES))
    sizes = (config.image_size, config.text_config.max_position_embeddings, config.text_config.vocab_size)
    state_dict.update({key: torch.tensor(size) for key, size in zip(METADATA, sizes)})
    return Restored(state_dict, usage='clip.load("FILE", device="cpu"), where it ends in .pt')


def _require(config: VitEmbedConfig) -> None:
    """Raises ValueError, naming every field, for a model that OpenAI's code cannot compute."""
    text = config.text_config
    if text is None:
        raise ValueError("OpenAI's CLIP has a text tower, this model has none; use --layout timm for the image tower")
    needed: dict[str, Any] = {
        **CLIP_ARCHITECTURE,
        "final_norm_type": layer_norm_at_end(config),
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "num_attention_heads": config.hidden_size / CLIP_HEAD_WIDTH,
        "intermediate_size": MLP_RATIO * config.hidden_size,
        "num_channels": 3,
        "image_size": config.image_shape[0],
        "patch_size": config.patch_shape[0],
        "text_config.hidden_act": "quick_gelu",
        "text_config.layer_norm_eps": 1e-5,
        "text_config.num_attention_heads": text.hidden_size / CLIP_HEAD_WIDTH,
        "text_config.intermediate_size": MLP_RATIO * text.hidden_size,
        "text_config.eos_token_id": text.vocab_size - 1,  # it pools at the largest id
        "text_config.pooling_type": "eos",
        "text_config.use_causal_mask": True,
        "text_config.projection_bias": False,
    }
    require(config, needed, "OpenAI's CLIP")


# Running the source


def load_openai_code() -> ModuleType:
    """OpenAI's `clip/model.py` of the installed clip-anytorch. Its package is not imported: that needs torchvision.

    Raises:
        ImportError: it is not installed.
    """
    path = find_openai_file("clip/model.py")
    if path is None:
        raise ImportError("OpenAI's CLIP code is not installed (pip install --no-deps clip-anytorch)")
    spec = importlib.util.spec_from_file_location("openai_clip_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def reference(
    state_dict: StateDict, source_config: SourceConfig, config: VitEmbedConfig, inputs: SampleInputs
) -> dict[str, torch.Tensor]:
    """Features and logits of OpenAI's own code; raises ImportError where it is not installed or cannot express this."""
    text_config = config.text_config
    try:
        _require(config)
    except ValueError as error:
        raise ImportError(str(error)) from error
    with torch.device("meta"):
        # Not its `build_model`, which rounds the weights of a float32 source to float16.
        model = (
            load_openai_code()
            .CLIP(
                config.projection_dim,
                config.image_size,
                config.num_hidden_layers,
                config.hidden_size,
                config.patch_size,
                text_config.max_position_embeddings,
                text_config.vocab_size,
                text_config.hidden_size,
                text_config.num_attention_heads,
                text_config.num_hidden_layers,
            )
            .eval()
        )
    model.load_state_dict(as_float32({k: t for k, t in state_dict.items() if k not in METADATA}), assign=True)
    for block in model.transformer.resblocks:  # a plain attribute, which "meta" has left without numbers
        block.attn_mask = model.build_attention_mask()
    return {
        "image_features": model.encode_image(inputs.pixel_values),
        "text_features": model.encode_text(inputs.input_ids),
        "logits_per_image": model(*inputs)[0],
    }


LAYOUT = Layout(
    "openai",
    detect,
    convert,
    reference,
    "OpenAI's own code (clip-anytorch)",
    options=("hidden_act", "num_attention_heads", "text_num_attention_heads"),
    sees_as_clip=True,
    restore=restore,
)
