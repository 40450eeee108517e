"""Layout "timm": the vision transformers of timm (timm.models.vision_transformer and deit, read at 1.0.31).

What its weights do not show (heads, activation, epsilon, pooling) comes from the config.json that timm saves beside
them: from its model_args, or else from what the architecture's name stands for in timm.
"""

import logging
import math
import re
from functools import partial
from typing import Any

import torch

from vit_embed import VitEmbedConfig
from vit_embed.checkpoint_reader import listing
from vit_embed.layouts.rules import (
    ConversionOptions,
    Layout,
    Restored,
    Rule,
    SampleInputs,
    SourceConfig,
    StateDict,
    as_float32,
    check_sizes,
    convert_weights,
    count_layers,
    fused,
    image_size_of,
    known,
    layer_rules,
    left_out,
    require,
    reverse_rules,
    rule,
)
from vit_embed.layouts.timm_config import (
    ACTIVATIONS,
    CLASSIFIER,
    GENERIC_NAMES,
    KEPT_PRETRAINED,
    LAYER_SCALE_INIT,
    NORMS,
    POOLINGS,
    PROJECTION,
    TRAINING_ARGUMENTS,
    Stated,
    arguments_of,
    config_file,
    form_of,
    image_processor_of,
    labels_of,
    stated_by,
)
from vit_embed.layouts.timm_names import (
    CLIP_EPS,
    DEFAULT_EPS,
    FOREIGN_NAMES,
    PREFIX_POOLED_NAMES,
    architecture_of,
    is_clip,
    no_embed_class_of,
)

logger = logging.getLogger(__name__)

LAYER_NAMES = {
    "norm1.{p}": "layer_norm1.{p}",
    **fused("attn.qkv"),
    "attn.proj.{p}": "self_attn.out_proj.{p}",
    "ls1.gamma": "layer_scale1",
    "norm2.{p}": "layer_norm2.{p}",
    "mlp.fc1.{p}": "mlp.fc1.{p}",
    "mlp.fc2.{p}": "mlp.fc2.{p}",
    "ls2.gamma": "layer_scale2",
}
POOL_NAMES = {
    "latent": "probe",
    "q.{p}": "q_proj.{p}",
    "kv.{p}": ("k_proj.{p}", "v_proj.{p}"),
    "proj.{p}": "out_proj.{p}",
    "norm.{p}": "layernorm.{p}",
    "mlp.fc1.{p}": "fc1.{p}",
    "mlp.fc2.{p}": "fc2.{p}",
}
# The final norm has one of two names, by whether it comes before or behind pooling.
FINAL_NORMS = {False: "norm", True: "fc_norm"}
NORM_LAYERS = {"layer_norm": "LayerNorm", "rms_norm": "RmsNorm"}  # classes of timm.layers
TRUNK_RULES = (
    rule("cls_token", "vision_model.embeddings.class_embedding", leading=2),
    rule("reg_token", "vision_model.embeddings.register_tokens", leading=1),
    rule("pos_embed", "vision_model.embeddings.position_embedding.weight", leading=1),
    rule("patch_embed.proj.{p}", "vision_model.embeddings.patch_embedding.{p}"),
    rule("norm_pre.{p}", "vision_model.pre_layrnorm.{p}"),
    *layer_rules("blocks.{n}", "vision_model.encoder.layers.{n}", LAYER_NAMES),
    *layer_rules("attn_pool", "vision_model.pooler", POOL_NAMES),
)
# What `head` is, by the class that has it. An image projection has no bias; timm stores one of zeros.
HEAD_RULES = {
    "VitEmbedModel": (),
    CLASSIFIER: (rule("head.{p}", "classifier.{p}"),),
    PROJECTION: (rule("head.weight", "visual_projection.weight"), Rule("head.bias")),
}
DISTILLED_HEAD_RULES = (Rule("head_dist.{p}"),)

# The tensors that sizes are read from, and what their axes are; those of OPTIONAL_SIZES where they are there.
SIZES = {
    "patch_embed.proj.weight": ("width", "channels", "patch height", "patch width"),
    "blocks.0.attn.qkv.weight": ("3 * width", "width"),
    "blocks.0.mlp.fc1.weight": ("MLP width", "width"),
    "blocks.0.mlp.fc2.weight": ("width", "MLP width"),
}
OPTIONAL_SIZES = {
    "cls_token": ("1", "1", "width"),
    "dist_token": ("1", "1", "width"),
    "reg_token": ("1", "registers", "width"),
    "pos_embed": ("1", "positions", "width"),
    "head.weight": ("labels", "width"),
}
TABLES = ("pos_embed", "reg_token", "dist_token")  # what `_fold_positions` computes with, before any rule checks them

# What a model_args may say: what is read, as weights do not show it, and what weights show, which is held against them.
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

# Keys of blocks that are no plain transformer layers, and what they are.
FOREIGN_KEYS = {
    r"blocks\.\d+\.attn\.[qk]_norm\..*": "a norm of queries and keys (qk_norm)",
    r"blocks\.\d+\.attn\.norm\..*": "a norm inside attention (scale_attn_norm)",
    r"blocks\.\d+\.attn\.(lambda|sub_norm).*": "differential attention",
    r"blocks\.\d+\.attn\.(rel_pos|relative_position).*": "relative positions",
    r"blocks\.\d+\.mlp\.norm\..*": "a norm inside the MLP (scale_mlp_norm)",
    r"blocks\.\d+\.mlp\.(fc1_[gx]|w12|w[123])\..*": "a gated MLP (SwiGLU)",
    r"patch_embed\.norm\..*": "a norm of the patches (embed_norm_layer)",
    r"patch_embed\.backbone\..*": "a convolutional backbone before the patches (hybrid)",
}


def detect(state_dict: StateDict, source_config: SourceConfig) -> str | None:
    """The keys of timm's vision transformers. Meta's own DINOv2 files share them and have a mask token besides."""
    if not {"blocks.0.attn.qkv.weight", "patch_embed.proj.weight"} <= set(state_dict):
        return None
    if not {"mask_token", "register_tokens"}.isdisjoint(state_dict):
        return None
    name = stated_by(source_config).name
    return "it has timm's keys" if name is None else f"it has timm's keys, and its config names timm's {name}"


# There


def convert(
    state_dict: StateDict, source_config: SourceConfig, options: ConversionOptions
) -> tuple[VitEmbedConfig, dict[str, torch.Tensor]]:
    """A vision transformer of timm: ViT, DeiT, the image towers of CLIP and SigLIP, DINOv2 as timm saves it.

    Its `head` makes a VitEmbedForImageClassification. In an architecture named "_clip_" a head whose bias is exactly
    zero is the image projection, unless the config has labels, and makes a VitEmbedModelWithProjection. No head makes a
    VitEmbedModel.

    Ours keeps one position for the class token, zero where timm has none, and none for registers: theirs are added to
    the registers, in float32, so every hidden state stays what it was. With `trunk_only` a distilled DeiT's second
    token is a register.

    Args:
        state_dict: the keys of timm's VisionTransformer, or VisionTransformerDistilled.
        source_config: the config.json of a folder that timm saved, or empty.
        options: `num_attention_heads`, `hidden_act` and `layer_norm_eps` are needed without a config that says or names
            them, `pooling_type` where the keys do not show it either; `image_size` for a grid that is no square, or for
            a table that may leave out the prefix tokens.

    Raises:
        ValueError: a model that ours cannot express, another layout, or weights that contradict each other or their
            config; names them.

    Source: timm 1.0.31, models/vision_transformer.py (VisionTransformer) and models/deit.py.
    """
    stated = stated_by(source_config)
    _refuse_foreign(state_dict, stated, options)
    check_sizes(state_dict, SIZES, "a vision transformer in timm's layout")
    check_sizes(state_dict, {key: axes for key, axes in OPTIONAL_SIZES.items() if key in state_dict}, "")
    width = len(state_dict["patch_embed.proj.weight"])
    for key in OPTIONAL_SIZES:
        if key in state_dict and (state_dict[key].shape[-1] != width or key in TABLES and len(state_dict[key]) != 1):
            raise ValueError(
                f"{key} must be ({', '.join(OPTIONAL_SIZES[key])}) and {width} wide, got {tuple(state_dict[key].shape)}"
            )
    fc1, fc2 = (state_dict[f"blocks.0.mlp.{name}.weight"] for name in ("fc1", "fc2"))
    if fc1.shape[0] == 2 * fc2.shape[1]:
        raise ValueError(
            f"blocks.0.mlp.fc1 gives {fc1.shape[0]} numbers and fc2 takes {fc2.shape[1]}: a gated MLP (SwiGLU), which "
            "this project does not have; it cannot be converted"
        )
    config = _config(state_dict, stated, options)
    _check_stated(state_dict, config, stated, options)
    (model_class,) = config.architectures
    heads = HEAD_RULES[model_class]
    if options.trunk_only:
        heads = (*left_out(HEAD_RULES[CLASSIFIER]), *DISTILLED_HEAD_RULES)
    final_norms = (rule(f"{name}.{{p}}", "vision_model.post_layernorm.{p}") for name in FINAL_NORMS.values())
    folded = _fold_positions(state_dict, config.converted_from["model_args"]["no_embed_class"])
    return config, convert_weights(config, folded, (*TRUNK_RULES, *final_norms, *heads), options.dtype)


def _refuse_foreign(state_dict: StateDict, stated: Stated, options: ConversionOptions) -> None:
    """Raises ValueError, naming what it is, for a model that is no plain vision transformer."""
    for pattern, what in FOREIGN_KEYS.items():
        if found := [key for key in state_dict if re.fullmatch(pattern, key)]:
            raise ValueError(f"this model has {what}, which cannot be converted: {listing(found)}")
    for part in (stated.name or "").split("_"):
        if part in FOREIGN_NAMES:
            raise ValueError(f"timm's {stated.name} has {FOREIGN_NAMES[part]}, which cannot be converted")
    known_arguments = {*READ_ARGUMENTS, *SHOWN_ARGUMENTS, *TRAINING_ARGUMENTS}
    if unknown := [f"{name}={value!r}" for name, value in stated.model_args.items() if name not in known_arguments]:
        raise ValueError(
            f"model_args of config.json have {listing(unknown)}, whose part in the model is not known here, so it "
            "cannot be converted; remove from the file what has none"
        )
    if stated.pooling not in (None, "", *POOLINGS) and options.pooling_type is None:
        raise ValueError(
            f"global_pool={stated.pooling!r} cannot be converted, only {', '.join(POOLINGS)}; take another pooling of "
            "the same tokens with --pooling_type"
        )
    if ("dist_token" in state_dict or "head_dist.weight" in state_dict) and not options.trunk_only:
        raise ValueError(
            "this is a distilled DeiT (dist_token, head_dist): its answer is the mean of two classifiers, "
            "which cannot be expressed here; convert its trunk with --trunk_only, where the distillation token becomes "
            "a register"
        )
    if {"dist_token", "reg_token"} <= set(state_dict):
        raise ValueError("dist_token and reg_token are in one file; timm has no model with both")
    if ("norm_pre.weight" in state_dict) == ("patch_embed.proj.bias" in state_dict):
        raise ValueError(
            "timm's patches have a bias (patch_embed.proj.bias) exactly where no norm follows them (norm_pre); this "
            "file has both or neither, so it is not timm's"
        )


def _config(state_dict: StateDict, stated: Stated, options: ConversionOptions) -> VitEmbedConfig:
    width, channels, *patch_size = state_dict["patch_embed.proj.weight"].shape
    named, model_args = architecture_of(stated.name), stated.model_args
    num_registers = state_dict["reg_token"].shape[1] if "reg_token" in state_dict else int("dist_token" in state_dict)
    num_prefix = int("cls_token" in state_dict) + num_registers
    image_size, no_embed_class = _positions(state_dict, num_prefix, tuple(patch_size), stated, options)
    pooling_type = _pooling_type(state_dict, stated, options)
    if pooling_type != "cls" and num_prefix:
        _check_prefix_pooling(pooling_type, num_prefix, stated)
    fc_norm = "fc_norm.weight" in state_dict
    if fc_norm and pooling_type == "map":
        raise ValueError("fc_norm behind attention pooling (attn_pool) cannot be converted; ours is before it")
    norm_type, eps = _norm(state_dict, stated)
    hidden_act = named and named.hidden_act
    if "act_layer" in model_args:
        hidden_act = ACTIVATIONS.get(str(model_args["act_layer"]).lower())
        if hidden_act is None and options.hidden_act is None:
            raise ValueError(
                f"act_layer={model_args['act_layer']!r} cannot be converted, only {', '.join(ACTIVATIONS)}"
            )
    # The heads of a name are those of its width.
    heads_of_name = named.num_heads if named and model_args.get("embed_dim", named.width) == width else None
    return VitEmbedConfig(
        **_head_fields(state_dict, stated, options),
        converted_from={
            "layout": "timm",
            "architecture": stated.name,
            "model_args": {
                "no_embed_class": no_embed_class,
                "fc_norm": fc_norm,
                "dynamic_img_size": bool(model_args.get("dynamic_img_size", False)),
            },
            "pretrained_cfg": {name: stated.pretrained[name] for name in KEPT_PRETRAINED if name in stated.pretrained},
        },
        hidden_size=width,
        num_hidden_layers=count_layers(state_dict, "blocks"),
        num_attention_heads=known(
            options.num_attention_heads,
            model_args.get("num_heads", heads_of_name),
            f"the number of attention heads{_of(stated.name, width)}",
            "--num_attention_heads",
        ),
        intermediate_size=state_dict["blocks.0.mlp.fc1.weight"].shape[0],
        hidden_act=known(
            options.hidden_act,
            hidden_act,
            "the activation",
            "--hidden_act gelu (most of timm's), quick_gelu (OpenAI's weights) or another",
        ),
        image_size=image_size,
        patch_size=tuple(patch_size),
        num_channels=channels,
        patch_bias="patch_embed.proj.bias" in state_dict,
        pad_to_patch=bool(model_args.get("dynamic_img_pad", False)),
        use_cls_token="cls_token" in state_dict,
        num_register_tokens=num_registers,
        position_embedding_type="learned" if "pos_embed" in state_dict else "none",
        position_interpolation="bicubic_antialias" if "pos_embed" in state_dict else "bicubic",
        norm_type=norm_type,
        use_pre_layernorm="norm_pre.weight" in state_dict,
        final_norm_type=None if fc_norm or "norm.weight" in state_dict else "none",
        layer_norm_eps=known(
            options.layer_norm_eps,
            eps,
            "what norms add to the variance",
            f"--layer_norm_eps {DEFAULT_EPS:g} (timm's own) or {CLIP_EPS:g} (its CLIP towers)",
        ),
        qkv_bias="blocks.0.attn.qkv.bias" in state_dict,
        layer_scale_init_value=(
            model_args.get("init_values") or LAYER_SCALE_INIT if "blocks.0.ls1.gamma" in state_dict else None
        ),
        pooling_type=pooling_type,
        norm_before_pooling=pooling_type == "mean" and "norm.weight" in state_dict,
    )


def _check_prefix_pooling(pooling_type: str, num_prefix: int, stated: Stated) -> None:
    """Raises ValueError unless pooling takes the prefix tokens as ours does. Where nothing says it of an average, it is
    timm's default, and the log says so."""
    prefix_pooled = stated.model_args.get("pool_include_prefix")
    if prefix_pooled is None and architecture_of(stated.name) is not None:
        prefix_pooled = stated.name in PREFIX_POOLED_NAMES
    if prefix_pooled is None and pooling_type == "map":
        raise ValueError(
            f"nothing says whether attention pooling reads the {num_prefix} prefix tokens: timm's default leaves them "
            "out, and here it reads them; only a config.json whose model_args say pool_include_prefix=true can be "
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


def _of(name: str | None, width: int) -> str:
    return "" if name is None else f" of an architecture {name} that is {width} wide"


def _positions(
    state_dict: StateDict, num_prefix: int, patch_size: tuple[int, int], stated: Stated, options: ConversionOptions
) -> tuple[tuple[int, int], bool]:
    """(height, width) in pixels of the position table, and whether it leaves out the prefix tokens: timm's
    `no_embed_class`. The size tells it, as one of the two leaves as many rows as there are patches; without one that
    fits, the model_args or the architecture's name. Where none of them does, a table is taken to have the prefix rows
    if only that makes a square grid; to leave them out is never taken for granted.

    Raises:
        ValueError: no table and no size, or a table whose grid is not clear; asks for --image_size.
    """
    told, stated_size = options.image_size, stated.image_size
    if stated_size is not None:  # timm leaves a remainder of pixels out
        stated_size = tuple(pixels // side * side for pixels, side in zip(stated_size, patch_size))
    if "pos_embed" not in state_dict:
        return known(told, stated_size, "the image size", "--image_size HEIGHT WIDTH"), False
    num_rows, flag = state_dict["pos_embed"].shape[1], stated.model_args.get("no_embed_class")
    patches_of = {False: num_rows - num_prefix, True: num_rows}
    if not num_prefix or "dist_token" in state_dict:  # the table of a distilled DeiT has both
        flag = False
    if flag is not None:
        patches_of = {bool(flag): patches_of[bool(flag)]}
    size = stated_size if told is None else told
    for no_embed_class, num_patches in patches_of.items():
        if size is not None and math.prod(pixels // side for pixels, side in zip(size, patch_size)) == num_patches:
            return (image_size_of(num_patches, patch_size, options) if told else size), no_embed_class
    if told is not None:
        numbers = " or ".join(str(number) for number in patches_of.values())
        raise ValueError(
            f"--image_size must have {numbers} patches of {patch_size} pixels, as pos_embed has {num_rows} positions; "
            f"got {told}"
        )
    if size is not None:
        logger.warning("pos_embed has %d positions, which are not those of %d x %d pixels", num_rows, *size)
    if flag is None and (flag := no_embed_class_of(stated.name)) is not None:
        patches_of = {flag: patches_of[flag]}
    squares = [each for each, number in patches_of.items() if number > 0 and math.isqrt(number) ** 2 == number]
    if flag is None and squares != [False]:
        num_patches = patches_of[False]
        raise ValueError(
            f"pos_embed has {num_rows} positions, which may be {num_rows} patches, or {num_prefix} prefix tokens and "
            f"{num_patches} patches{'' if False in squares else ', which is no square grid'}; say the pixels with "
            "--image_size HEIGHT WIDTH"
        )
    no_embed_class = bool(flag)
    found = image_size_of(max(patches_of[no_embed_class], 0), patch_size, options)
    logger.info("pos_embed is read as a square grid, %s prefix tokens", "without" if no_embed_class else "with the")
    return found, no_embed_class


def _pooling_type(state_dict: StateDict, stated: Stated, options: ConversionOptions) -> str:
    """What the source says, or its keys show: attention pooling has weights; a norm behind the pooling, or no class
    token, is an average of the patches in all of timm's models; the others with a name that we know take the class
    token."""
    found = POOLINGS.get(stated.pooling)
    if found is None and stated.pooling is None:
        if "attn_pool.latent" in state_dict:
            found = "map"
        elif "fc_norm.weight" in state_dict or "cls_token" not in state_dict:
            found = "mean"
        elif architecture_of(stated.name) is not None or "dist_token" in state_dict:
            found = "cls"
    return known(
        options.pooling_type, found, "how tokens are pooled", "--pooling_type cls (most of timm's with a class token)"
    )


def _norm(state_dict: StateDict, stated: Stated) -> tuple[str, float | None]:
    """The type of the norms and, where it is said, their epsilon."""
    has_bias, named = "blocks.0.norm1.bias" in state_dict, architecture_of(stated.name)
    name = stated.model_args.get("norm_layer")
    if name is not None:
        norm_type, eps = NORMS.get(str(name).replace("_", "").lower()), DEFAULT_EPS
        if norm_type is None:
            raise ValueError(f"norm_layer={name!r} cannot be converted, only {', '.join(NORMS)}")
    else:
        norm_type, eps = (named.norm_type, named.eps) if named else ("layer_norm", None)
    if not has_bias and norm_type == "layer_norm":
        raise ValueError(
            "the norms have no bias, which may be RMSNorm or another; only a config.json whose model_args say "
            'norm_layer="rmsnorm" can be converted'
        )
    return norm_type, eps


def _head_fields(state_dict: StateDict, stated: Stated, options: ConversionOptions) -> dict[str, Any]:
    """The class that the weights make, and what its head needs to know."""
    if options.trunk_only or "head.weight" not in state_dict:
        return {"architectures": ["VitEmbedModel"]}
    num_rows, bias = state_dict["head.weight"].shape[0], state_dict.get("head.bias")
    if is_clip(stated.name) and not stated.has_labels and bias is not None and not bias.any():
        return {"architectures": [PROJECTION], "projection_dim": num_rows}
    if (labels := labels_of(stated, num_rows)) is None:
        return {"architectures": [CLASSIFIER], "num_labels": num_rows}
    label2id = {label: number for number, label in labels.items()}
    return {"architectures": [CLASSIFIER], "id2label": labels, "label2id": label2id}


def _check_stated(state_dict: StateDict, config: VitEmbedConfig, stated: Stated, options: ConversionOptions) -> None:
    """Raises ValueError, naming every one, for what the config.json says and the weights show otherwise."""
    registers = state_dict.get("reg_token")
    found = {
        **arguments_of(config, config.converted_from["model_args"]["no_embed_class"]),
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
    said = {name: stated.model_args[name] for name in SHOWN_ARGUMENTS if name in stated.model_args}
    said["num_classes"] = None if options.trunk_only else stated.num_classes
    if isinstance(said.get("patch_size"), int):
        said["patch_size"] = [said["patch_size"]] * 2
    if "pos_embed" in said:
        said["pos_embed"] = said["pos_embed"] or "none"
    if not found["final_norm"]:
        said.pop("fc_norm", None)
    # These agree although they differ: pixels beyond whole patches, the first value of a layer scale, rounding.
    agree = {}
    if "img_size" in said:
        whole = [pixels // side * side for pixels, side in zip(stated.image_size, config.patch_shape)]
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
        hint = "; --image_size HEIGHT WIDTH says the pixels instead" if agree.get("img_size") is False else ""
        raise ValueError(f"the config of {stated.name} is not of these weights: {', '.join(wrong)}{hint}")


def _fold_positions(state_dict: StateDict, no_embed_class: bool) -> dict[str, torch.Tensor]:
    """The same with one table of class and patch positions, registers that hold their own, and a distillation token
    as a register."""
    result = dict(state_dict)
    if "dist_token" in result:
        result["reg_token"] = result.pop("dist_token")
    positions, registers = result.get("pos_embed"), result.get("reg_token")
    num_class = int("cls_token" in result)
    if positions is None:
        return result
    if no_embed_class:
        missing = positions.new_zeros(1, num_class, positions.shape[2])
        result["pos_embed"] = torch.cat([missing, positions], dim=1)
    elif registers is not None:
        end = num_class + registers.shape[1]
        result["reg_token"] = registers.float() + positions[:, num_class:end].float()
        result["pos_embed"] = torch.cat([positions[:, :num_class], positions[:, end:]], dim=1)
    return result


# The way back


def restore(config: VitEmbedConfig, weights: StateDict) -> Restored:
    """A model as timm's VisionTransformer: a file of its weights, or a folder that `timm.create_model` reads.

    What came from timm takes the form that it came in, with one exception: registers keep the positions that were added
    to them, and theirs are zero. A model that never was timm's gets an architecture's name that has its epsilon, with
    every size in model_args; with another epsilon than timm's names have, there is a file but no folder.

    Raises:
        ValueError: a model that timm's VisionTransformer cannot compute; names every field.
    """
    _require(config)
    form = form_of(config)
    no_embed_class = form["no_embed_class"]
    table = weights.get("vision_model.embeddings.position_embedding.weight")
    if config.use_cls_token and table is not None and table[0].any():
        no_embed_class = False  # trained since
    arguments = arguments_of(config, no_embed_class)
    (model_class,) = config.architectures
    final_norm = rule(f"{FINAL_NORMS[arguments['fc_norm']]}.{{p}}", "vision_model.post_layernorm.{p}")
    state_dict = reverse_rules(weights, (*TRUNK_RULES, final_norm, *HEAD_RULES[model_class]))
    state_dict.update(_spread_positions(state_dict, no_embed_class))
    if "patch_embed.proj.bias" not in state_dict and not config.use_pre_layernorm:
        state_dict["patch_embed.proj.bias"] = torch.zeros_like(state_dict["patch_embed.proj.weight"][:, 0, 0, 0])
    if model_class == PROJECTION and "head.weight" in state_dict:
        state_dict["head.bias"] = torch.zeros_like(state_dict["head.weight"][:, 0])
    architecture = form["architecture"] or GENERIC_NAMES.get((config.norm_type, config.layer_norm_eps))
    call = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    if architecture is None:
        layer = NORM_LAYERS[config.norm_type]
        return Restored(
            state_dict,
            usage="timm.models.vision_transformer.VisionTransformer("
            f"{call}, norm_layer=functools.partial(timm.layers.{layer}, eps={config.layer_norm_eps}))"
            '.load_state_dict(timm.models.load_state_dict("FILE"))',
        )
    return Restored(
        state_dict,
        usage=f'timm.create_model("local-dir:FILE", pretrained=True) for a folder; for a file '
        f'timm.create_model("{architecture}", checkpoint_path="FILE", {call})',
        weights_file="model.safetensors",
        files={"config.json": config_file(config, architecture, arguments)},
    )


def _require(config: VitEmbedConfig) -> None:
    """Raises ValueError, naming every field, for a model that timm's VisionTransformer cannot compute."""
    (model_class,) = config.architectures
    if config.text_config is not None or model_class not in HEAD_RULES:
        raise ValueError(
            f"timm's VisionTransformer has no place for a text tower or a depth head, and this is a {model_class}; "
            f"save its image tower first, as {' or '.join(HEAD_RULES)}.from_pretrained(...).save_pretrained(...)"
        )
    require(
        config,
        {
            "stem_type": "conv",
            "position_embedding_type": "none" if config.position_embedding_type == "none" else "learned",
            # Its patches have a bias unless a norm follows.
            "patch_bias": False if config.use_pre_layernorm else config.patch_bias,
            "norm_position": "pre",
            "final_norm_type": None
            if config.final_norm_type not in (config.norm_type, "none")
            else config.final_norm_type,
            "norm_type": "layer_norm" if config.pooling_type == "map" else config.norm_type,
            "token_merge_size": 0,
        },
        "timm's VisionTransformer",
    )


def _spread_positions(state_dict: StateDict, no_embed_class: bool) -> dict[str, torch.Tensor]:
    """`pos_embed` of timm: without the class token's row, or with a row of zeros for each register."""
    positions, registers = state_dict.get("pos_embed"), state_dict.get("reg_token")
    num_class = int("cls_token" in state_dict)
    if positions is None:
        return {}
    if no_embed_class:
        return {"pos_embed": positions[:, num_class:].contiguous()}
    if registers is None:
        return {}
    rows = torch.zeros_like(registers)
    return {"pos_embed": torch.cat([positions[:, :num_class], rows, positions[:, num_class:]], dim=1)}


# Running the source


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
        **arguments_of(config, form_of(config)["no_embed_class"]),
        "num_classes": state_dict["head.weight"].shape[0] if "head.weight" in state_dict else 0,
        "norm_layer": partial(getattr(timm.layers, NORM_LAYERS[config.norm_type]), eps=config.layer_norm_eps),
        "weight_init": "skip",
    }
    if distilled:
        arguments["reg_tokens"] = 0
    name = stated_by(source_config).name
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


LAYOUT = Layout(
    detect,
    convert,
    reference,
    ("num_attention_heads", "hidden_act", "layer_norm_eps", "pooling_type", "image_size"),
    image_processor_of,
    restore,
)
