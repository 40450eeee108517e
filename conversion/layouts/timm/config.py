"""Our config for a vision transformer of timm: from the shapes of its weights, its config.json, and its name."""

import logging
import math
from typing import Any

from vit_embed import VitEmbedConfig
from vit_embed.conversion.layouts.layout import ConversionOptions, StateDict
from vit_embed.conversion.layouts.questions import count_layers, resolve, table_image_size
from vit_embed.conversion.layouts.timm.config_file import (
    ACTIVATIONS,
    CLASSIFIER,
    KEPT_PRETRAINED,
    LAYER_SCALE_INIT,
    NORMS,
    POOLINGS,
    PROJECTION,
    TimmConfig,
    labels,
    model_arguments,
)
from vit_embed.conversion.layouts.timm.names import (
    CLIP_EPS,
    DEFAULT_EPS,
    PREFIX_POOLED_NAMES,
    find_architecture,
    is_clip,
)
from vit_embed.conversion.layouts.timm.names import no_embed_class as named_no_embed_class

logger = logging.getLogger(__name__)

# Known keys of model_args. READ: not visible in the weights, so used. SHOWN: visible in the weights, so cross-checked.
READ_ARGUMENTS = (
    "act_layer",
    "dynamic_img_pad",
    "dynamic_img_size",
    "global_pool",
    "no_embed_class",
    "norm_layer",
    "num_heads",
    "pool_include_prefix",
)
SHOWN_ARGUMENTS = (
    "attn_layer",
    "class_token",
    "depth",
    "embed_dim",
    "fc_norm",
    "final_norm",
    "img_size",
    "in_chans",
    "init_values",
    "mlp_ratio",
    "num_classes",
    "patch_size",
    "pos_embed",
    "pre_norm",
    "proj_bias",
    "qk_norm",
    "qkv_bias",
    "reg_tokens",
    "scale_attn_norm",
    "scale_mlp_norm",
)


def build_config(state_dict: StateDict, source: TimmConfig, options: ConversionOptions) -> VitEmbedConfig:
    """Our config, after a check that the config.json is of these weights.

    Raises:
        ValueError: something that nothing says, or that cannot be expressed; weights and config.json that contradict
            each other, named.
    """
    width, channels, *patch_size = state_dict["patch_embed.proj.weight"].shape
    num_registers = state_dict["reg_token"].shape[1] if "reg_token" in state_dict else int("dist_token" in state_dict)
    num_prefix = int("cls_token" in state_dict) + num_registers
    image_size, no_embed_class = _positions(state_dict, num_prefix, tuple(patch_size), source, options)
    pooling_type = _pooling_type(state_dict, source, options)
    if pooling_type != "cls" and num_prefix:
        _check_prefix_pooling(pooling_type, num_prefix, source)
    fc_norm = "fc_norm.weight" in state_dict
    if fc_norm and pooling_type == "map":
        raise ValueError("fc_norm after attention pooling (attn_pool) cannot be converted; ours is before it")
    norm_type, eps = _norm(state_dict, source)
    config = VitEmbedConfig(
        **_head_fields(state_dict, source, options),
        converted_from={
            "layout": "timm",
            "architecture": source.name,
            "model_args": {
                "no_embed_class": no_embed_class,
                "fc_norm": fc_norm,
                "dynamic_img_size": bool(source.model_args.get("dynamic_img_size", False)),
            },
            "pretrained_cfg": {name: source.pretrained[name] for name in KEPT_PRETRAINED if name in source.pretrained},
        },
        hidden_size=width,
        num_hidden_layers=count_layers(state_dict, "blocks"),
        num_attention_heads=_heads(width, source, options),
        intermediate_size=state_dict["blocks.0.mlp.fc1.weight"].shape[0],
        hidden_act=_activation(source, options),
        image_size=image_size,
        patch_size=tuple(patch_size),
        num_channels=channels,
        patch_bias="patch_embed.proj.bias" in state_dict,
        pad_to_patch=bool(source.model_args.get("dynamic_img_pad", False)),
        use_cls_token="cls_token" in state_dict,
        num_register_tokens=num_registers,
        position_embedding_type="learned" if "pos_embed" in state_dict else "none",
        position_interpolation="bicubic_antialias" if "pos_embed" in state_dict else "bicubic",
        norm_type=norm_type,
        use_pre_layernorm="norm_pre.weight" in state_dict,
        final_norm_type=None if fc_norm or "norm.weight" in state_dict else "none",
        layer_norm_eps=resolve(
            options, "layer_norm_eps", eps, hint=f"{DEFAULT_EPS:g} (timm's own) or {CLIP_EPS:g} (its CLIP towers)"
        ),
        qkv_bias="blocks.0.attn.qkv.bias" in state_dict,
        layer_scale_init_value=(
            source.model_args.get("init_values") or LAYER_SCALE_INIT if "blocks.0.ls1.gamma" in state_dict else None
        ),
        pooling_type=pooling_type,
        norm_before_pooling=pooling_type == "mean" and "norm.weight" in state_dict,
    )
    _check_against_config(state_dict, config, source, options)
    return config


def _heads(width: int, source: TimmConfig, options: ConversionOptions) -> int:
    named = find_architecture(source.name)
    # The heads of a name are those of its width.
    of_name = named.num_heads if named and source.model_args.get("embed_dim", named.width) == width else None
    hint = "" if source.name is None else f"(nothing is known of {source.name} with a width of {width})"
    return resolve(options, "num_attention_heads", source.model_args.get("num_heads", of_name), hint=hint)


def _activation(source: TimmConfig, options: ConversionOptions) -> str:
    named = find_architecture(source.name)
    found = named and named.hidden_act
    if "act_layer" in source.model_args:
        act_layer = source.model_args["act_layer"]
        found = ACTIVATIONS.get(str(act_layer).lower())
        if found is None and options.hidden_act is None:
            raise ValueError(f"{act_layer=} cannot be converted, only {', '.join(ACTIVATIONS)}")
    return resolve(options, "hidden_act", found, hint="gelu (most of timm's), quick_gelu (OpenAI's weights) or another")


def _check_prefix_pooling(pooling_type: str, num_prefix: int, source: TimmConfig) -> None:
    """Raises ValueError unless pooling takes the prefix tokens as ours does. Where nothing says it of an average, it is
    timm's default, and the log says so."""
    prefix_pooled = source.model_args.get("pool_include_prefix")
    if prefix_pooled is None and find_architecture(source.name) is not None:
        prefix_pooled = source.name in PREFIX_POOLED_NAMES
    if prefix_pooled is None and pooling_type == "map":
        raise ValueError(
            f"nothing says whether attention pooling reads the {num_prefix} prefix tokens: timm's default leaves them "
            "out, and here it reads them; only a config.json whose model_args have pool_include_prefix=true can be "
            "converted"
        )
    if prefix_pooled is None:
        logger.warning(
            "nothing says whether the average takes in the %d prefix tokens (pool_include_prefix); converting without "
            "them, which is timm's default",
            num_prefix,
        )
    elif prefix_pooled != (pooling_type == "map"):
        raise ValueError(
            f"pool_include_prefix={prefix_pooled} with {num_prefix} prefix tokens cannot be converted: here 'mean' "
            "leaves them out, and 'map' reads them"
        )


def _positions(
    state_dict: StateDict, num_prefix: int, patch_size: tuple[int, int], source: TimmConfig, options: ConversionOptions
) -> tuple[tuple[int, int], bool]:
    """(height, width) in pixels of the position table, and whether it leaves out the prefix tokens: timm's
    `no_embed_class`. The size tells it, as one of the two leaves as many rows as there are patches; without one that
    fits, the model_args or the architecture's name. Where none of them does, a table is taken to have the prefix rows
    if only that makes a square grid; to leave them out is never taken for granted.

    Raises:
        ValueError: no table and no size, or a table whose grid is not clear; asks for --image_size.
    """
    size = source.image_size
    if size is not None:  # timm leaves a remainder of pixels out
        size = tuple(pixels // side * side for pixels, side in zip(size, patch_size))
    if "pos_embed" not in state_dict:
        return resolve(options, "image_size", size, hint="HEIGHT WIDTH"), False
    num_rows, flag = state_dict["pos_embed"].shape[1], source.model_args.get("no_embed_class")
    patches_of = {False: num_rows - num_prefix, True: num_rows}
    if not num_prefix or "dist_token" in state_dict:  # the table of a distilled DeiT has both
        flag = False
    if flag is not None:
        patches_of = {bool(flag): patches_of[bool(flag)]}
    given = options.image_size
    size = size if given is None else given
    for no_embed_class, num_patches in patches_of.items():
        if size is not None and math.prod(pixels // side for pixels, side in zip(size, patch_size)) == num_patches:
            return (table_image_size(num_patches, patch_size, given) if given else size), no_embed_class
    if given is not None:
        numbers = " or ".join(str(number) for number in patches_of.values())
        raise ValueError(
            f"--image_size must have {numbers} patches of {patch_size} pixels, as pos_embed has {num_rows} positions; "
            f"got {given}"
        )
    if size is not None:
        logger.warning("pos_embed has %d positions, which are not those of %d x %d pixels", num_rows, *size)
    if flag is None and (flag := named_no_embed_class(source.name)) is not None:
        patches_of = {flag: patches_of[flag]}
    squares = [each for each, number in patches_of.items() if number > 0 and math.isqrt(number) ** 2 == number]
    if flag is None and squares != [False]:
        num_patches = patches_of[False]
        raise ValueError(
            f"pos_embed has {num_rows} positions, which may be {num_rows} patches, or {num_prefix} prefix tokens and "
            f"{num_patches} patches{'' if False in squares else ', which is no square grid'}; give the pixels with "
            "--image_size HEIGHT WIDTH"
        )
    no_embed_class = bool(flag)
    found = table_image_size(max(patches_of[no_embed_class], 0), patch_size, None)
    logger.info("pos_embed is read as a square grid, %s prefix tokens", "without" if no_embed_class else "with the")
    return found, no_embed_class


def _pooling_type(state_dict: StateDict, source: TimmConfig, options: ConversionOptions) -> str:
    """What the source says, or its keys show: attention pooling has weights; a norm after the pooling, or no class
    token, is an average of the patches in all of timm's models; the others with a name that is known take the class
    token."""
    found = POOLINGS.get(source.pooling)
    if found is None and source.pooling is None:
        if "attn_pool.latent" in state_dict:
            found = "map"
        elif "fc_norm.weight" in state_dict or "cls_token" not in state_dict:
            found = "mean"
        elif find_architecture(source.name) is not None or "dist_token" in state_dict:
            found = "cls"
    return resolve(options, "pooling_type", found, hint="cls (most of timm's with a class token)")


def _norm(state_dict: StateDict, source: TimmConfig) -> tuple[str, float | None]:
    """The type of the norms and, where it is said, their epsilon."""
    has_bias, named = "blocks.0.norm1.bias" in state_dict, find_architecture(source.name)
    name = source.model_args.get("norm_layer")
    if name is not None:
        norm_type, eps = NORMS.get(str(name).replace("_", "").lower()), DEFAULT_EPS
        if norm_type is None:
            raise ValueError(f"norm_layer={name!r} cannot be converted, only {', '.join(NORMS)}")
    else:
        norm_type, eps = (named.norm_type, named.eps) if named else ("layer_norm", None)
    if not has_bias and norm_type == "layer_norm":
        raise ValueError(
            "the norms have no bias, which may be RMSNorm or another; only a config.json whose model_args have "
            'norm_layer="rmsnorm" can be converted'
        )
    return norm_type, eps


def _head_fields(state_dict: StateDict, source: TimmConfig, options: ConversionOptions) -> dict[str, Any]:
    """The class that the weights make, and what its head needs to know."""
    if options.trunk_only or "head.weight" not in state_dict:
        return {"architectures": ["VitEmbedModel"]}
    num_rows, bias = state_dict["head.weight"].shape[0], state_dict.get("head.bias")
    if is_clip(source.name) and not source.has_labels and bias is not None and not bias.any():
        return {"architectures": [PROJECTION], "projection_dim": num_rows}
    if (id2label := labels(source, num_rows)) is None:
        return {"architectures": [CLASSIFIER], "num_labels": num_rows}
    label2id = {label: number for number, label in id2label.items()}
    return {"architectures": [CLASSIFIER], "id2label": id2label, "label2id": label2id}


def _check_against_config(
    state_dict: StateDict, config: VitEmbedConfig, source: TimmConfig, options: ConversionOptions
) -> None:
    """Raises ValueError, naming every one, for what the config.json says and the weights show otherwise."""
    registers = state_dict.get("reg_token")
    found = {
        **model_arguments(config, config.converted_from["model_args"]["no_embed_class"]),
        "reg_tokens": 0 if registers is None else registers.shape[1],
        "fc_norm": "fc_norm.weight" in state_dict,
        # Weights that show otherwise have been refused, or will be.
        **{
            "attn_layer": "attn",
            "proj_bias": True,
            "qk_norm": False,
            "scale_attn_norm": False,
            "scale_mlp_norm": False,
        },
    }
    said = {name: source.model_args[name] for name in SHOWN_ARGUMENTS if name in source.model_args}
    said["num_classes"] = None if options.trunk_only else source.num_classes
    if isinstance(said.get("patch_size"), int):
        said["patch_size"] = [said["patch_size"]] * 2
    if "pos_embed" in said:
        said["pos_embed"] = said["pos_embed"] or "none"
    if not found["final_norm"]:
        said.pop("fc_norm", None)
    # These agree although they differ: pixels beyond whole patches, the first value of a layer scale, rounding.
    agree = {}
    if "img_size" in said:
        whole = [pixels // side * side for pixels, side in zip(source.image_size, config.patch_shape)]
        agree["img_size"] = options.image_size is not None or whole == found["img_size"]
    if "init_values" in said:
        agree["init_values"] = bool(said["init_values"]) == bool(found["init_values"])
    if isinstance(said.get("mlp_ratio"), (int, float)) and math.isfinite(said["mlp_ratio"]):
        agree["mlp_ratio"] = int(config.hidden_size * said["mlp_ratio"]) == config.intermediate_size
    wrong = [
        f"{name}={value!r} (the weights have {found[name]!r})"
        for name, value in said.items()
        if value is not None and not agree.get(name, value == found[name])
    ]
    if wrong:
        hint = "; --image_size HEIGHT WIDTH gives the pixels instead" if agree.get("img_size") is False else ""
        raise ValueError(f"the config of {source.name} is not of these weights: {', '.join(wrong)}{hint}")
