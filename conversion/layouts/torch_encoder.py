"""Layout "torch_encoder": vision transformers that their authors built on torch.nn.TransformerEncoderLayer.

Inside a layer the names are torch's. Around it every author has others for the same few parts, so the table lists those
in use, and a conversion records which it met: the way back then writes the author's own keys.

Weights show little of such a model. What is taken for granted, as no key distinguishes it from its opposite:

- tokens are batch first, the class token stands before the patches, positions are added to all of them;
- patches do not overlap: the stride of their convolution is its kernel;
- a classifier, and `pooler_output`, read the class token where there is one; an average is of the patches alone;
- a final norm with a weight and no bias is an RMSNorm;
- a depth head doubles the grid twice, ReLU after each transposed convolution, and is scaled to the image bilinearly.

Dropout and loss, which only training reads, are not known either: they are the config's defaults, and depth_loss="l1",
as a depth head's numbers may be negative. Nor are mean and deviation of the images: they are CLIP's, unless a
preprocessor_config.json lies beside the weights.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from vit_embed import VitEmbedConfig
from vit_embed.conversion.layouts.layout import (
    ConversionOptions,
    Converted,
    Layout,
    Restored,
    SampleInputs,
    SourceConfig,
    StateDict,
)
from vit_embed.conversion.layouts.questions import check_sizes, count_layers, require, resolve, table_image_size
from vit_embed.conversion.layouts.rules import (
    Rule,
    convert_weights,
    fused,
    layer_rules,
    left_out,
    reverse_rules,
    rule,
)
from vit_embed.conversion.layouts.running import as_float32
from vit_embed.conversion.messages import listing

NAME = "torch_encoder"
# Of torch.nn.TransformerEncoderLayer and of torch.nn.LayerNorm, unless their author says another.
TORCH_EPS = 1e-5

LAYER_NAMES = {
    **fused("self_attn.in_proj", separator="_"),
    "self_attn.out_proj.{p}": "self_attn.out_proj.{p}",
    "linear1.{p}": "mlp.fc1.{p}",
    "linear2.{p}": "mlp.fc2.{p}",
    "norm1.{p}": "layer_norm1.{p}",
    "norm2.{p}": "layer_norm2.{p}",
}
LAYERS = "encoder.layers"  # what `restore` calls them unless a conversion met another name


class Part(NamedTuple):
    """Something of the model beside its layers.

    names: what authors call it, that of `restore` first: a module, or the whole key of a tensor of its own.
    target: ours.
    axes: of its tensor, or of its weight; for a tensor of its own the least that it can have.
    """

    names: tuple[str, ...]
    target: str
    axes: int


def _part(names: str, target: str, axes: int) -> Part:
    return Part(tuple(names.split()), target, axes)


MODULES = {
    "patches": _part(
        """
        patch_embed patch_embed.proj patch_embed.projection patch_embed.conv
        patch_embedding patch_embedding.proj patch_embedding.projection patch_embedding.conv patch_embedding.0
        patch_embeddings patch_embeddings.projection patch_emb patch_emb.proj patch_projection patch_proj
        patchify patcher to_patches to_patch_embedding to_patch_embedding.0 to_patch_emb.0 conv_proj proj
        """,
        "vision_model.embeddings.patch_embedding.{p}",
        axes=4,
    ),
    "norm": _part(
        """
        norm ln layer_norm layernorm final_norm ln_f norm_head
        head.0 head.norm mlp_head.0 classifier.0 to_logits.0 fc.0
        """,
        "vision_model.post_layernorm.{p}",
        axes=1,
    ),
    "classifier": _part(  # mlp_head.0 of a Sequential without a norm
        "head head.1 head.fc mlp_head mlp_head.0 mlp_head.1 classifier classifier.1 to_logits to_logits.1 fc fc.1",
        "classifier.{p}",
        axes=2,
    ),
    "deconv1": _part(
        "decoder.0 decoder.deconv1 decoder.up1 deconv1 up1 depth_head.0 depth_head.deconv1 head.0",
        "depth_head.deconv1.{p}",
        axes=4,
    ),
    "deconv2": _part(
        "decoder.2 decoder.deconv2 decoder.up2 deconv2 up2 depth_head.2 depth_head.deconv2 head.2",
        "depth_head.deconv2.{p}",
        axes=4,
    ),
    "depth": _part(
        """
        decoder.4 decoder.out decoder.conv out out_conv conv_out final_conv depth_head.4 depth_head.out head.4
        """,
        "depth_head.projection.{p}",
        axes=4,
    ),
}
TENSORS = {
    "class_token": _part(
        "cls_token cls class_token cls_embedding class_embedding",
        "vision_model.embeddings.class_embedding",
        axes=1,
    ),
    "positions": _part(
        """
        pos_embed pos_embedding pos pos_emb position_embedding position_embeddings positional_embedding
        pos_embed.weight pos_embedding.weight pos_emb.weight
        position_embedding.weight position_embeddings.weight positional_embedding.weight
        """,
        "vision_model.embeddings.position_embedding.weight",
        axes=2,
    ),
}
HEADS = {
    "VitEmbedForImageClassification": ("classifier",),
    "VitEmbedForDepthEstimation": ("deconv1", "deconv2", "depth"),
}
# What `restore` writes without a record of other names: (1, 1, D) and (1, L, D) for the two tensors.
CANONICAL_NAMES = {"layers": LAYERS, **{role: part.names[0] for role, part in (MODULES | TENSORS).items()}}
CANONICAL_LEADING = {"class_token": 2, "positions": 1}


# Which parts a source has, and by which names


def find_names(state_dict: StateDict) -> dict[str, str]:
    """What a source calls each part that it has: {"layers": name, key of MODULES or TENSORS: name}.

    A name may stand below any of the modules that the layers stand below. Of several for one part the first is taken;
    the others are keys without a place, which `apply_rules` refuses.
    """
    names = {}
    stacks = _stacks(state_dict)
    if len(stacks) == 1:
        names["layers"] = stacks[0]
    parents = list(_parents(stacks[0])) if stacks else [""]
    for role, part in (MODULES | TENSORS).items():
        ending = ".weight" if role in MODULES else ""
        for name in (parent + name for parent in parents for name in part.names):
            tensor = state_dict.get(name + ending)
            fits = tensor is not None and (tensor.dim() == part.axes or (not ending and tensor.dim() > part.axes))
            if fits and name not in names.values():
                names[role] = name
                break
    return names


def _stacks(state_dict: StateDict) -> list[str]:
    """What stands before the numbers of layers with torch's names."""
    matches = (re.fullmatch(r"([\w.]+)\.\d+\.self_attn\.in_proj_weight", key) for key in state_dict)
    stacks = dict.fromkeys(match[1] for match in matches if match)
    return [stack for stack in stacks if any(key.startswith(f"{stack}.") and ".linear1." in key for key in state_dict)]


def _parents(name: str) -> Iterator[str]:
    """What may stand before the names of a module's neighbours: nothing, "a." and "a.b." of "a.b.c"."""
    parts = name.split(".")
    for count in range(len(parts)):
        yield "".join(f"{part}." for part in parts[:count])


def rules_for(names: Mapping[str, str], leading: Mapping[str, int]) -> tuple[Rule, ...]:
    """The table for a source with these names, whose class token and positions have so many axes of 1 in front."""
    result = layer_rules(f"{names['layers']}.{{n}}", "vision_model.encoder.layers.{n}", LAYER_NAMES)
    result += tuple(rule(f"{names[role]}.{{p}}", MODULES[role].target) for role in MODULES if role in names)
    return result + tuple(
        rule(names[role], TENSORS[role].target, leading=leading[role]) for role in TENSORS if role in names
    )


def detect(state_dict: StateDict, source_config: SourceConfig) -> str | None:
    """One stack of layers with torch's names, and patches cut by a convolution, or by a linear map of that name."""
    names = find_names(state_dict)
    patches = names.get("patches") or _linear_patches(state_dict)
    if "layers" not in names or patches is None:
        return None
    return f"the layers {names['layers']}.N have the names of torch.nn.TransformerEncoderLayer, beside {patches}"


def _linear_patches(state_dict: StateDict) -> str | None:
    """The name of a linear map of flattened patches."""
    candidates = (
        parent + name
        for stack in _stacks(state_dict)
        for parent in _parents(stack)
        for name in MODULES["patches"].names
        if "patch" in name
    )
    found = (name for name in candidates if f"{name}.weight" in state_dict)
    return next((name for name in found if state_dict[f"{name}.weight"].dim() == 2), None)


# To our form


def convert(state_dict: StateDict, source_config: SourceConfig, options: ConversionOptions) -> Converted:
    """A vision transformer on torch.nn.TransformerEncoderLayer: a VitEmbedModel, with a linear classifier a
    VitEmbedForImageClassification, with a depth head a VitEmbedForDepthEstimation.

    Args:
        state_dict: layers with torch's names, and around them names of MODULES and TENSORS.
        source_config: not read, there is none that many share.
        options: `hidden_act`, `num_attention_heads` and `norm_position` are needed, `layer_norm_eps` too beside an
            RMSNorm, whose eps has no one default; it is that of all norms, so a source that mixes two cannot be
            expressed. `pooling_type` is needed without a class token, `image_size` for a grid that is no square.

    Raises:
        ValueError: another kind of model, parts that are missing or of two heads, or something that is not given.
    """
    names = find_names(state_dict)
    _check_parts(state_dict, names)
    architecture = _architecture(names, options)
    config = _config(state_dict, names, architecture, options)
    leading = {role: state_dict[names[role]].dim() - TENSORS[role].axes for role in TENSORS if role in names}
    config.converted_from = {"layout": NAME, "names": names, "leading_axes": leading}
    rules = rules_for(names, leading)
    if options.trunk_only:
        heads = [each for each in rules if not each.targets[0].startswith("vision_model.")]
        rules = (*(each for each in rules if each not in heads), *left_out(heads))
    return convert_weights(config, state_dict, rules, options.dtype)


def _check_parts(state_dict: StateDict, names: Mapping[str, str]) -> None:
    """Raises ValueError unless a source has the parts of a vision transformer, each once."""
    if "layers" not in names:
        stacks = _stacks(state_dict)
        raise ValueError(
            "a vision transformer on torch.nn.TransformerEncoderLayer has one stack of layers, with keys such as "
            f"{LAYERS}.0.self_attn.in_proj_weight and {LAYERS}.0.linear1.weight; got {len(stacks)}"
            + (f": {listing(stacks)}; encoders with a decoder, as DETR, cannot be converted" if stacks else "")
        )
    if "patches" not in names:
        if (linear := _linear_patches(state_dict)) is not None:
            raise ValueError(
                f"{linear} is a linear map of flattened patches. The weights do not say whether it takes a patch's "
                "values channel by channel or pixel by pixel; reshape it to a convolution's (width, channels, height, "
                f"width of a patch), as {linear}.weight, and convert that"
            )
        raise ValueError(
            f"no patch convolution, a weight of 4 axes under one of {', '.join(MODULES['patches'].names)}: a text, "
            "detection or sequence model cannot be converted; rename its key if it has one"
        )
    if "positions" not in names:
        raise ValueError(
            f"no learned positions, (1, tokens, width) under one of {', '.join(TENSORS['positions'].names)}; computed "
            "ones are not known from weights"
        )
    sizes = {
        f"{names['layers']}.0.linear1.weight": ("MLP width", "width"),
        f"{names['layers']}.0.self_attn.in_proj_weight": ("3 * width", "width"),
    }
    check_sizes(state_dict, sizes, "a vision transformer on torch.nn.TransformerEncoderLayer")


def _architecture(names: Mapping[str, str], options: ConversionOptions) -> str:
    """The class of ours that has the heads of a source."""
    found = {name: [names[role] for role in roles if role in names] for name, roles in HEADS.items()}
    found = {name: parts for name, parts in found.items() if parts and not options.trunk_only}
    if len(found) > 1:
        parts = " and ".join(listing(each) for each in found.values())
        raise ValueError(
            f"the source has a classifier and a depth head, {parts}, and a model of ours has one of them; leave out "
            "the keys of the other, or both with --trunk_only"
        )
    for name, parts in found.items():
        if missing := [role for role in HEADS[name] if role not in names]:
            options_of = "; ".join(f"{role}: {', '.join(MODULES[role].names)}" for role in missing)
            raise ValueError(
                "a depth head is two transposed convolutions, then a convolution to one channel; got "
                f"{listing(parts)} alone. Names for the others are {options_of}"
            )
    return next(iter(found), "VitEmbedModel")


def _config(
    state_dict: StateDict, names: Mapping[str, str], architecture: str, options: ConversionOptions
) -> VitEmbedConfig:
    width, channels, *patch = state_dict[f"{names['patches']}.weight"].shape
    has_class_token = "class_token" in names
    num_patches = state_dict[names["positions"]].shape[-2] - has_class_token
    final_norm_type = "none"
    if "norm" in names:
        final_norm_type = "layer_norm" if f"{names['norm']}.bias" in state_dict else "rms_norm"
    head = {}
    if architecture == "VitEmbedForImageClassification":
        head = {"num_labels": state_dict[f"{names['classifier']}.weight"].shape[0]}
    elif architecture == "VitEmbedForDepthEstimation":
        # The loss only trains, and the default one cannot train numbers of any sign.
        kernel = state_dict[f"{names['deconv1']}.weight"].shape[-1]
        head = {"deconv_kernel_size": kernel, "depth_activation": "identity", "depth_loss": "l1"}
    return VitEmbedConfig(
        architectures=[architecture],
        hidden_size=width,
        num_hidden_layers=count_layers(state_dict, names["layers"]),
        num_attention_heads=resolve(options, "num_attention_heads"),
        intermediate_size=state_dict[f"{names['layers']}.0.linear1.weight"].shape[0],
        hidden_act=resolve(options, "hidden_act", hint="relu (torch's default) or gelu"),
        image_size=table_image_size(num_patches, tuple(patch), options.image_size),
        patch_size=tuple(patch),
        num_channels=channels,
        patch_bias=f"{names['patches']}.bias" in state_dict,
        use_cls_token=has_class_token,
        norm_position=resolve(options, "norm_position", hint="post (torch's default) or pre (norm_first=True)"),
        use_pre_layernorm=False,
        final_norm_type=final_norm_type,
        layer_norm_eps=_eps(final_norm_type, options),
        **_pooling(names, architecture, options),
        **head,
    )


def _pooling(names: Mapping[str, str], architecture: str, options: ConversionOptions) -> dict[str, Any]:
    """How tokens become one vector, and whether they are normalised before or after that, where it makes a difference.

    Raises:
        ValueError: no class token and nothing given, or a final norm on either side of an average.
    """
    has_class_token, is_pooled = "class_token" in names, architecture != "VitEmbedForDepthEstimation"
    shown = "cls" if has_class_token else None if is_pooled else "mean"
    hint = "" if has_class_token else "mean, as there is no class token"
    pooling_type = resolve(options, "pooling_type", shown, hint=hint)
    if pooling_type != "mean" or "norm" not in names or not is_pooled:
        return {"pooling_type": pooling_type}
    parent = names["norm"].rpartition(".")[0]
    # torch.nn.TransformerEncoder(norm=...) has all tokens; torch.nn.Sequential(norm, classifier) has what is pooled.
    before = bool(parent) and names["layers"] == f"{parent}.layers"
    after = bool(parent) and names.get("classifier", "").rpartition(".")[0] == parent
    if before == after:
        raise ValueError(
            f"the weights do not say whether {names['norm']} is before the average of the patches or after it; rename "
            "its keys to those of torch.nn.TransformerEncoder's norm, encoder.norm beside encoder.layers, if before, "
            "or to head.0 with a classifier head.1, if after"
        )
    return {"pooling_type": pooling_type, "norm_before_pooling": before}


def _eps(final_norm_type: str, options: ConversionOptions) -> float:
    if final_norm_type == "rms_norm" and options.layer_norm_eps is None:
        raise ValueError(
            "the final norm has a weight and no bias: an RMSNorm, whose eps has no one default; give --layer_norm_eps, "
            f"which is that of the layers too (torch's default there is {TORCH_EPS}); a source with two different ones "
            "cannot be expressed"
        )
    return resolve(options, "layer_norm_eps", default=TORCH_EPS, origin="torch's default")


# The way back


def restore(config: VitEmbedConfig, weights: StateDict) -> Restored:
    """The state dict of a module on torch.nn.TransformerEncoderLayer, by the names that a conversion recorded.

    What was not converted from one, as a head that was trained here, gets the names that come first in the table.

    Raises:
        ValueError: a model that torch's layer cannot compute; names every field.
    """
    package = "a module on torch.nn.TransformerEncoderLayer"
    architecture = config.architectures[0]
    if architecture not in ("VitEmbedModel", *HEADS):
        raise ValueError(f"{package} cannot express {architecture}; it has VitEmbedModel, {', '.join(HEADS)}")
    needed = {
        "stem_type": "conv",
        "num_register_tokens": 0,
        "position_embedding_type": "learned",
        "norm_type": "layer_norm",
        "use_pre_layernorm": False,
        "qkv_bias": True,
        "layer_scale_init_value": None,
        "token_merge_size": 0,
    }
    if architecture == "VitEmbedForDepthEstimation":
        needed.update(depth_head_type="deconv", depth_activation="identity")
    elif config.pooling_type == "map":
        needed.update(pooling_type="cls")
    require(config, needed, package)
    names, leading = _recorded(config)
    norm_first = config.norm_position == "pre"
    layer = (
        f"torch.nn.TransformerEncoderLayer({config.hidden_size}, {config.num_attention_heads}, "
        f"{config.intermediate_size}, activation=<{config.hidden_act}>, layer_norm_eps={config.layer_norm_eps}, "
        f"batch_first=True, norm_first={norm_first})"
    )
    return Restored(
        reverse_rules(weights, rules_for(names, leading)),
        usage=f"load_state_dict of a module whose {config.num_hidden_layers} layers {names['layers']} are {layer}",
    )


def _recorded(config: VitEmbedConfig) -> tuple[dict[str, str], dict[str, int]]:
    """Names and leading axes to write: those of the source that `config` was converted from, and else the canonical."""
    record = config.converted_from or {}
    if record.get("layout") != NAME:
        return CANONICAL_NAMES, CANONICAL_LEADING
    names, leading = record.get("names"), record.get("leading_axes")
    if not (
        isinstance(names, dict)
        and all(role in CANONICAL_NAMES and re.fullmatch(r"\w+(\.\w+)*", str(name)) for role, name in names.items())
        and isinstance(leading, dict)
        and all(role in CANONICAL_LEADING and count in (0, 1, 2, 3) for role, count in leading.items())
    ):
        raise ValueError(
            "converted_from of this config must have the names and leading_axes that a conversion records, got "
            f"names={names!r} and leading_axes={leading!r}; remove converted_from to write {LAYERS}.N and the like"
        )
    return {**CANONICAL_NAMES, **names}, {**CANONICAL_LEADING, **leading}


# Running the source


@torch.no_grad()
def reference(
    state_dict: StateDict, source_config: SourceConfig, config: VitEmbedConfig, inputs: SampleInputs
) -> dict[str, torch.Tensor]:
    """What torch's own layers compute with the source's weights, and around them what its other parts must be."""
    names = config.converted_from["names"]
    weights = as_float32(state_dict)

    def weight_and_bias(role: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        return weights[f"{names[role]}.weight"], weights.get(f"{names[role]}.bias")

    patches = F.conv2d(inputs.pixel_values, *weight_and_bias("patches"), stride=config.patch_shape)  # (B, D, gh, gw)
    grid_size = patches.shape[2:]
    tokens = patches.flatten(2).transpose(1, 2)  # (B, N, D)
    if config.use_cls_token:
        class_token = weights[names["class_token"]].expand(len(tokens), 1, -1)
        tokens = torch.cat([class_token, tokens], dim=1)  # (B, L, D)
    tokens = tokens + weights[names["positions"]]
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            activation=ACT2FN[config.hidden_act],
            layer_norm_eps=config.layer_norm_eps,
            batch_first=True,
            norm_first=config.norm_position == "pre",
        ).eval()
    for number in range(config.num_hidden_layers):
        prefix = f"{names['layers']}.{number}."
        own = {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
        layer.load_state_dict(own, assign=True)
        tokens = layer(tokens)

    def norm(states: torch.Tensor) -> torch.Tensor:
        if "norm" not in names:
            return states
        (weight, bias), shape, eps = weight_and_bias("norm"), (config.hidden_size,), config.layer_norm_eps
        return (
            F.rms_norm(states, shape, weight, eps) if bias is None else F.layer_norm(states, shape, weight, bias, eps)
        )

    patches = tokens[:, config.num_prefix_tokens :]
    if config.pooling_type == "cls":
        pooled = norm(tokens[:, 0])
    else:
        pooled = norm(patches).mean(dim=1) if config.norm_before_pooling else norm(patches.mean(dim=1))
    outputs = {"last_hidden_state": tokens, "pooler_output": pooled}
    architecture = config.architectures[0]
    if architecture == "VitEmbedForImageClassification":
        outputs["logits"] = F.linear(pooled, *weight_and_bias("classifier"))
    elif architecture == "VitEmbedForDepthEstimation":
        maps = norm(patches).transpose(1, 2).unflatten(2, grid_size)  # (B, D, gh, gw)
        for role in ("deconv1", "deconv2"):
            padding = (config.deconv_kernel_size - 2) // 2
            maps = F.relu(F.conv_transpose2d(maps, *weight_and_bias(role), stride=2, padding=padding))
        depth = F.conv2d(maps, *weight_and_bias("depth"))  # (B, 1, 4 gh, 4 gw)
        size = inputs.pixel_values.shape[2:]
        outputs["predicted_depth"] = F.interpolate(depth, size=size, mode="bilinear", align_corners=False)[:, 0]
    return outputs


LAYOUT = Layout(
    NAME,
    detect,
    convert,
    reference,
    "torch's own layers, put together as this layout takes them to be",
    options=("hidden_act", "num_attention_heads", "layer_norm_eps", "norm_position", "pooling_type", "image_size"),
    restore=restore,
)
