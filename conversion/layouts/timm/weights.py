"""The names of timm's vision transformers (timm.models.vision_transformer and deit, read at 1.0.31), there and back."""

import re

import torch

from vit_embed import VitEmbedConfig
from vit_embed.conversion.layouts.layout import ConversionOptions, Converted, Restored, SourceConfig, StateDict
from vit_embed.conversion.layouts.questions import check_sizes, require
from vit_embed.conversion.layouts.rules import (
    Rule,
    convert_weights,
    fused,
    layer_rules,
    left_out,
    reverse_rules,
    rule,
)
from vit_embed.conversion.layouts.timm.config import READ_ARGUMENTS, SHOWN_ARGUMENTS, build_config
from vit_embed.conversion.layouts.timm.config_file import (
    CLASSIFIER,
    GENERIC_NAMES,
    NORM_LAYERS,
    POOLINGS,
    PROJECTION,
    TRAINING_ARGUMENTS,
    TimmConfig,
    config_file,
    model_arguments,
    original_form,
    read_config,
)
from vit_embed.conversion.layouts.timm.names import FOREIGN_NAMES
from vit_embed.conversion.messages import listing

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
# The final norm has one of two names, by whether it comes before or after pooling.
FINAL_NORMS = {False: "norm", True: "fc_norm"}
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
    name = read_config(source_config).name
    return "it has timm's keys" if name is None else f"it has timm's keys, and its config names timm's {name}"


# There


def convert(state_dict: StateDict, source_config: SourceConfig, options: ConversionOptions) -> Converted:
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
        options: `num_attention_heads`, `hidden_act` and `layer_norm_eps` are needed without a config that has or names
            them, `pooling_type` where the keys do not show it either; `image_size` for a grid that is no square, or for
            a table that may leave out the prefix tokens.

    Raises:
        ValueError: a model that ours cannot express, another layout, or weights that contradict each other or their
            config; names them.

    Source: timm 1.0.31, models/vision_transformer.py (VisionTransformer) and models/deit.py.
    """
    source = read_config(source_config)
    _refuse_foreign(state_dict, source, options)
    _check_sizes(state_dict)
    config = build_config(state_dict, source, options)
    (model_class,) = config.architectures
    heads = HEAD_RULES[model_class]
    if options.trunk_only:
        heads = (*left_out(HEAD_RULES[CLASSIFIER]), *DISTILLED_HEAD_RULES)
    final_norms = (rule(f"{name}.{{p}}", "vision_model.post_layernorm.{p}") for name in FINAL_NORMS.values())
    folded = _fold_positions(state_dict, config.converted_from["model_args"]["no_embed_class"])
    return convert_weights(config, folded, (*TRUNK_RULES, *final_norms, *heads), options.dtype)


def _check_sizes(state_dict: StateDict) -> None:
    """Raises ValueError unless the tensors that sizes are read from fit each other."""
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


def _refuse_foreign(state_dict: StateDict, source: TimmConfig, options: ConversionOptions) -> None:
    """Raises ValueError, naming what it is, for a model that is no plain vision transformer."""
    for pattern, what in FOREIGN_KEYS.items():
        if found := [key for key in state_dict if re.fullmatch(pattern, key)]:
            raise ValueError(f"this model has {what}, which cannot be converted: {listing(found)}")
    for part in (source.name or "").split("_"):
        if part in FOREIGN_NAMES:
            raise ValueError(f"timm's {source.name} has {FOREIGN_NAMES[part]}, which cannot be converted")
    known_arguments = {*READ_ARGUMENTS, *SHOWN_ARGUMENTS, *TRAINING_ARGUMENTS}
    if unknown := [f"{name}={value!r}" for name, value in source.model_args.items() if name not in known_arguments]:
        raise ValueError(
            f"model_args of config.json have {listing(unknown)}, whose part in the model is not known here, so it "
            "cannot be converted; remove from the file what has none"
        )
    if source.pooling not in (None, "", *POOLINGS) and options.pooling_type is None:
        raise ValueError(
            f"global_pool={source.pooling!r} cannot be converted, only {', '.join(POOLINGS)}; take another pooling of "
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
    form = original_form(config)
    no_embed_class = form["no_embed_class"]
    table = weights.get("vision_model.embeddings.position_embedding.weight")
    if config.use_cls_token and table is not None and table[0].any():
        no_embed_class = False  # trained since
    arguments = model_arguments(config, no_embed_class)
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
