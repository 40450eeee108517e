"""Every option of a model: one row a field, from which its default, its check and its documentation come. Needs neither
torch nor transformers.
"""

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

STEM_TYPES = (
    "conv",
    "linear",
    "overlap",
    "hierarchical",
    "hybrid",
    "adaptive",
    "token_learner",
    "dct",
    "wavelet",
    "deformable",
)
# Stems whose tokens are not the patches of a grid, and stems that choose how many tokens there are by themselves.
GRIDLESS_STEMS = ("token_learner",)
TOKEN_CHOOSING_STEMS = ("adaptive", "token_learner")
STEM_NORM_TYPES = ("layer_norm", "batch_norm")
POSITION_EMBEDDING_TYPES = ("learned", "sinusoidal", "polynomial", "none")
POSITION_INTERPOLATIONS = ("bicubic", "bicubic_antialias", "bilinear")
NORM_TYPES = ("layer_norm", "rms_norm")
FINAL_NORM_TYPES = (None, *NORM_TYPES, "none")
NORM_POSITIONS = ("pre", "post")
POOLING_TYPES = ("cls", "mean", "map")
TEXT_POOLING_TYPES = ("eos", "first", "last")
HIDDEN_ACTS = ("quick_gelu", "gelu", "gelu_pytorch_tanh", "relu", "silu")
CONTRASTIVE_LOSSES = ("softmax", "sigmoid")
DEPTH_HEAD_TYPES = ("deconv", "dpt")
DEPTH_ACTIVATIONS = (None, "identity")
DEPTH_LOSSES = ("silog", "l1", "l2")
PROBLEM_TYPES = (None, "single_label_classification", "multi_label_classification", "regression")

# OpenAI bounds the inverse temperature (arXiv:2103.00020, section 2.5).
MAX_INVERSE_TEMPERATURE = 100
# The DPT head reads four depths of the trunk (arXiv:2103.13413, section 3.2).
NUM_DPT_TAPS = 4
# Maps of a "hybrid" stem's backbone that a feature pyramid consists of: strides patch_size / 4, / 2 and 1.
NUM_HYBRID_MAPS = 3
# OpenAI's vocabulary has 49,408 tokens, the last of which ends a text.
CLIP_VOCAB_SIZE = 49408
CLIP_EOS_TOKEN_ID = 49407


class Check(NamedTuple):
    """What a value must be, in words, and whether one is that; `error` is raised where it is not."""

    must_be: str
    accepts: Callable[[Any], bool]
    error: type[Exception] = ValueError


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def integer(minimum: int) -> Check:
    """An integer of at least `minimum`."""
    return Check(
        f"an integer >= {minimum},",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= minimum,
    )


def one_of(choices: tuple) -> Check:
    """One of some values."""
    return Check(f"one of {', '.join(map(str, choices))};", lambda value: value in choices)


def optional(check: Check) -> Check:
    """None, or what another check accepts."""
    return check._replace(accepts=lambda value: value is None or check.accepts(value))


def is_pixels(value: Any) -> bool:
    pair = (value, value) if isinstance(value, int) else value
    return isinstance(pair, (tuple, list)) and len(pair) == 2 and all(map(COUNT.accepts, pair))


def survives_json(value: Any) -> bool:
    try:
        return isinstance(value, dict) and json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError):
        return False


COUNT = integer(1)
FLAG = Check("one of True, False;", lambda value: value in (True, False))
RATE = Check("a number in [0, 1),", lambda value: is_number(value) and 0 <= value < 1)
POSITIVE = Check("a positive number,", lambda value: is_number(value) and 0 < value < math.inf)
NOT_NEGATIVE = Check("a number >= 0,", lambda value: is_number(value) and 0 <= value < math.inf)
PIXELS = Check("pixels > 0, one integer or (height, width);", is_pixels)
EVEN = Check("an even integer >= 2,", lambda value: COUNT.accepts(value) and value % 2 == 0)
ANYTHING = Check("anything", lambda value: True)  # the config makes of it what it is
JSON_DICT = optional(
    Check("None, or a dict that JSON gives back unchanged: string keys, lists, no tuples;", survives_json, TypeError)
)
LOG_SCALE = Check(
    f"a natural log of at most ln {MAX_INVERSE_TEMPERATURE},",
    lambda value: is_number(value) and value <= math.log(MAX_INVERSE_TEMPERATURE) + 1e-4,
)
STEM_SHARE = Check("a share in [0.25, 1] of the patches,", lambda value: is_number(value) and 0.25 <= value <= 1)


class Option(NamedTuple):
    """A field of a config.

    name, default, check. doc: what it is, with unit or range and origin. applies_when: the field that it depends on,
    and the values of that one with which it has a meaning; with any other it must keep its default.
    """

    name: str
    default: Any
    check: Check
    doc: str
    applies_when: tuple[str, tuple] | None = None


def stem(*names: str) -> tuple[str, tuple]:
    return "stem_type", names


# --- the image tower, the projection and the heads --------------------------------------------------------------------

OPTIONS = (
    Option("hidden_size", 768, COUNT, "width D of a token. CLIP B 768, L 1024."),
    Option("num_hidden_layers", 12, COUNT, "transformer layers. B 12, L 24."),
    Option("num_attention_heads", 12, COUNT, "heads h; must divide hidden_size. B 12, L 16."),
    Option("intermediate_size", 3072, COUNT, "width of the MLP's hidden layer. B 3072, L 4096."),
    Option(
        "hidden_act",
        "quick_gelu",
        one_of(HIDDEN_ACTS),
        'activation of the MLP. OpenAI\'s weights need "quick_gelu", most others "gelu".',
    ),
    Option(
        "image_size",
        224,
        PIXELS,
        "height and width in pixels that the position table is made for; other sizes resample it.",
    ),
    Option("patch_size", 16, PIXELS, "height and width of a patch in pixels; must divide image_size."),
    Option("num_channels", 3, COUNT, "image channels C."),
    Option(
        "stem_type",
        "conv",
        one_of(STEM_TYPES),
        "pixels -> tokens; `stems_vit_embed.py` has the equation of each.",
    ),
    Option("patch_bias", False, FLAG, "whether the patch projection has a bias. CLIP's has none."),
    Option(
        "pad_to_patch",
        False,
        FLAG,
        "pads images with zeros on the right and at the bottom to whole patches, instead of refusing them.",
    ),
    Option(
        "patch_kernel_size",
        None,
        optional(PIXELS),
        'pixels of the "overlap" stem\'s kernel, at least the patch; None is twice the patch.',
        stem("overlap"),
    ),
    Option(
        "patch_pointwise",
        False,
        FLAG,
        'whether a 1x1 convolution follows the "overlap" stem\'s.',
        stem("overlap"),
    ),
    Option(
        "stem_norm_type",
        "layer_norm",
        one_of(STEM_NORM_TYPES),
        'norm of the "hierarchical" stem.',
        stem("hierarchical"),
    ),
    Option(
        "use_feature_pyramid",
        False,
        FLAG,
        'the "dpt" depth head reads its two finest levels from the maps of a "hierarchical" or "hybrid" stem, which '
        "have strides patch_size / 4 and patch_size / 2.",
        stem("hierarchical", "hybrid"),
    ),
    Option(
        "backbone_config",
        None,
        ANYTHING,
        'config, or its dict, of the transformers backbone of the "hybrid" stem; the stride of its last feature map is '
        "patch_size. It gives that one alone (`out_features`), or the last three with use_feature_pyramid.",
        stem("hybrid"),
    ),
    Option(
        "adaptive_budget",
        0.5,
        STEM_SHARE,
        'tokens that the "adaptive" stem is trained to keep, as a share in [0.25, 1] of the patches.',
        stem("adaptive"),
    ),
    Option(
        "adaptive_budget_weight",
        1.0,
        NOT_NEGATIVE,
        "factor of the squared difference to that share, in the training loss of every head.",
        stem("adaptive"),
    ),
    Option(
        "num_learned_tokens",
        8,
        COUNT,
        'tokens K of the "token_learner" stem, whatever the image size.',
        stem("token_learner"),
    ),
    Option(
        "num_coefficients",
        None,
        optional(COUNT),
        'lowest-frequency coefficients that "dct" and "wavelet" keep of a patch and channel; None is all.',
        stem("dct", "wavelet"),
    ),
    Option("use_cls_token", True, FLAG, "whether a class token is put before the patches."),
    Option(
        "num_register_tokens",
        0,
        integer(0),
        "learned tokens without position between class token and patches (arXiv:2309.16588).",
    ),
    Option("position_embedding_type", "learned", one_of(POSITION_EMBEDDING_TYPES), "positions of the patches."),
    Option(
        "position_interpolation",
        "bicubic",
        one_of(POSITION_INTERPOLATIONS),
        "how a learned table is resampled to another grid, in float32.",
        ("position_embedding_type", ("learned",)),
    ),
    Option(
        "position_degree",
        4,
        COUNT,
        'highest power of each coordinate in "polynomial" positions.',
        ("position_embedding_type", ("polynomial",)),
    ),
    Option("norm_type", "layer_norm", one_of(NORM_TYPES), "norm of the layers."),
    Option(
        "norm_position",
        "pre",
        one_of(NORM_POSITIONS),
        '"pre" normalises each branch\'s input, "post" the sum after it (arXiv:2002.04745).',
    ),
    Option(
        "use_pre_layernorm",
        True,
        FLAG,
        "whether the tokens are normalised before the first layer (CLIP's `pre_layrnorm`).",
    ),
    Option(
        "final_norm_type",
        None,
        one_of(FINAL_NORM_TYPES),
        'norm before pooling heads and dense heads; None means norm_type, "none" means no norm.',
    ),
    Option("layer_norm_eps", 1e-5, POSITIVE, "added to the variance in every norm."),
    Option("qkv_bias", True, FLAG, "whether the query, key and value projections have a bias."),
    Option(
        "layer_scale_init_value",
        None,
        optional(POSITIVE),
        "start value of a learned scale on each branch (arXiv:2103.17239); None for no scale.",
    ),
    Option("hidden_dropout_prob", 0.0, RATE, "rate in [0, 1) on embeddings and branch outputs, in training."),
    Option("attention_dropout", 0.0, RATE, "rate in [0, 1) on attention weights, in training."),
    Option(
        "drop_path_rate",
        0.0,
        RATE,
        "rate in [0, 1) of dropping a branch for a sample in the last layer, rising linearly from 0 in the first "
        "(arXiv:1603.09382), in training.",
    ),
    Option(
        "pooling_type",
        "cls",
        one_of(POOLING_TYPES),
        '"cls" takes the class token, "mean" the mean of the patches, each then normalised; "map" is attention pooling '
        "over the normalised tokens (arXiv:2106.04560, figure 1).",
    ),
    Option(
        "norm_before_pooling",
        False,
        FLAG,
        'the mean of the normalised patches in place of the normalised mean (timm\'s models with global_pool="avg" '
        "and fc_norm=False).",
        ("pooling_type", ("mean",)),
    ),
    Option(
        "patch_drop_rate",
        0.0,
        RATE,
        "share in [0, 1) of the patches left out at random, in training (arXiv:2212.00794).",
    ),
    Option(
        "token_merge_size",
        0,
        integer(0),
        "pairs of most similar patch tokens that each layer merges, in evaluation (arXiv:2210.09461); at most half of "
        "the tokens that a layer has.",
    ),
    Option("projection_dim", 512, COUNT, "width of the joint image-text space."),
    Option(
        "use_visual_projection",
        True,
        FLAG,
        "whether the pooled image vector is projected into that space; False takes it as it is (SigLIP), and "
        "projection_dim must then be hidden_size.",
    ),
    Option(
        "logit_scale_init_value",
        2.6592,
        LOG_SCALE,
        "natural log of the inverse temperature at initialisation; ln(1 / 0.07) = 2.6592.",
    ),
    Option(
        "contrastive_loss",
        "softmax",
        one_of(CONTRASTIVE_LOSSES),
        '"softmax" is CLIP\'s, "sigmoid" SigLIP\'s (arXiv:2303.15343) with a learned logit_bias.',
    ),
    Option(
        "hard_negative_beta",
        0.0,
        NOT_NEGATIVE,
        'each negative of the "softmax" loss counts exp(hard_negative_beta * logit), over the mean of that '
        "(arXiv:2010.04592). 0 counts all alike.",
        ("contrastive_loss", ("softmax",)),
    ),
    Option(
        "contrastive_chunk_size",
        None,
        optional(COUNT),
        "images, and texts, that a dual encoder in training holds activations of at a time; the backward pass encodes "
        "each chunk again (cached gradients, arXiv:2101.06983). None is the whole batch.",
    ),
    Option("depth_head_type", "deconv", one_of(DEPTH_HEAD_TYPES), "patch grid -> depth."),
    Option(
        "deconv_kernel_size",
        2,
        EVEN,
        'pixels of the kernels of the "deconv" depth head, even; their stride is 2 for any.',
        ("depth_head_type", ("deconv",)),
    ),
    Option(
        "depth_activation",
        None,
        one_of(DEPTH_ACTIVATIONS),
        "how depth is made of the head's numbers. None is softplus, or `max_depth` * sigmoid: always positive; "
        '"identity" is the numbers themselves, which only "l1" and "l2" can train.',
    ),
    Option("depth_loss", "silog", one_of(DEPTH_LOSSES), "of each image; the batch's is the mean over images."),
    Option(
        "depth_gradient_weight",
        0.0,
        NOT_NEGATIVE,
        "factor of the multi-scale gradient matching loss that is added to it (arXiv:1907.01341, there 0.5). 0 adds "
        "nothing.",
    ),
    Option(
        "max_depth",
        None,
        optional(POSITIVE),
        "metres at the far end of the depth head's range; None predicts unitless positive depth.",
    ),
    Option(
        "mask_ratio", 0.75, RATE, "share in [0, 1) of the patches that masked image modelling hides (arXiv:2111.06377)."
    ),
    Option(
        "norm_pix_loss", True, FLAG, "whether it predicts each patch less its mean and over its standard deviation."
    ),
    Option("decoder_hidden_size", 512, COUNT, "width of its decoder; a multiple of the heads and of 4."),
    Option("decoder_num_hidden_layers", 4, COUNT, "layers of its decoder."),
    Option("decoder_num_attention_heads", 16, COUNT, "heads of its decoder."),
    Option("decoder_intermediate_size", 2048, COUNT, "width of its decoder's MLPs."),
    Option(
        "out_features",
        None,
        ANYTHING,
        'names of the stages ("stem", "stage1", ...) that the backbone returns; None: the last one.',
    ),
    Option("out_indices", None, ANYTHING, "their numbers, in place of the names."),
    Option(
        "reshape_hidden_states",
        True,
        FLAG,
        "whether the backbone gives maps (B, D, gh, gw); False: tokens (B, P + gh * gw, D), as transformers' DPT and "
        "Depth Anything read them.",
    ),
    Option("initializer_range", 0.02, POSITIVE, "standard deviation of the embeddings at initialisation."),
    Option("initializer_factor", 1.0, POSITIVE, "multiplies every standard deviation at initialisation."),
    Option("text_config", None, ANYTHING, "a VitEmbedTextConfig or its dict; None for a vision-only model."),
    Option(
        "converted_from",
        None,
        JSON_DICT,
        "where a converted checkpoint came from (layout, names, licence), a dict that JSON can hold: "
        "`convert_checkpoint.py` writes it and reads it back. No model reads it; every class saves it.",
    ),
)

# Fields of transformers' own that our classes read.
FOREIGN_OPTIONS = (
    Option("num_labels", 2, COUNT, "classes, labels or numbers of a classifier."),
    Option("problem_type", None, one_of(PROBLEM_TYPES), "loss of a classifier."),
)


# --- the text tower ---------------------------------------------------------------------------------------------------

TEXT_OPTIONS = (
    Option("vocab_size", CLIP_VOCAB_SIZE, COUNT, "tokens in the vocabulary; 49,408 is OpenAI's byte-pair vocabulary."),
    Option("hidden_size", 512, COUNT, "width D of a token."),
    Option("num_hidden_layers", 12, COUNT, "transformer layers."),
    Option("num_attention_heads", 8, COUNT, "heads; must divide hidden_size."),
    Option("intermediate_size", 2048, COUNT, "width of the MLP's hidden layer."),
    Option("max_position_embeddings", 77, COUNT, "longest text in tokens, start and end token included."),
    Option("hidden_act", "quick_gelu", one_of(HIDDEN_ACTS), "activation of the MLP."),
    Option("layer_norm_eps", 1e-5, POSITIVE, "added to the variance in every norm."),
    Option("attention_dropout", 0.0, RATE, "rate in [0, 1) on the attention weights, in training."),
    Option(
        "projection_dim",
        512,
        COUNT,
        "width of the joint space; in a dual encoder kept equal to VitEmbedConfig.projection_dim.",
    ),
    Option("initializer_range", 0.02, ANYTHING, "standard deviation of the embeddings at initialisation."),
    Option("initializer_factor", 1.0, ANYTHING, "multiplies every standard deviation at initialisation."),
    Option("bos_token_id", 49406, ANYTHING, "first token of every text."),
    Option(
        "eos_token_id",
        CLIP_EOS_TOKEN_ID,
        integer(0),
        "last token of every text. 2 is CLIP's legacy value: read as 49,407 with OpenAI's vocabulary, as \"the largest "
        'id of the row" with any other.',
    ),
    Option(
        "pad_token_id",
        1,
        ANYTHING,
        "fills rows after their end token; never seen by it, unless the tower reads padding.",
    ),
    Option(
        "pooling_type",
        "eos",
        one_of(TEXT_POOLING_TYPES),
        '"eos" reads the state of the first end-of-text token, "first" that of the first token, "last" that of the '
        "last place of the row.",
    ),
    Option(
        "use_causal_mask",
        True,
        FLAG,
        "whether a token sees only itself and those before it; False is a bidirectional tower, as SigLIP's "
        "(arXiv:2303.15343).",
    ),
    Option(
        "projection_bias",
        False,
        FLAG,
        "whether the projection of the pooled text into the joint space has a bias. CLIP's has none.",
    ),
)


# --- checks -----------------------------------------------------------------------------------------------------------


def check_values(config: Any, options: tuple[Option, ...]) -> None:
    """Raises the error of a field's check, ValueError for most, naming the field, unless its value is in range."""
    for name, _, check, *_ in options:
        value = getattr(config, name)
        if not check.accepts(value):
            raise check.error(f"{name} must be {check.must_be} got {value!r}")


def check_applies(config: Any, options: tuple[Option, ...]) -> None:
    """Raises ValueError for a field that another one leaves without a meaning; names both."""
    for name, default, _, _, applies_when in options:
        if applies_when is None:
            continue
        other, values = applies_when
        if getattr(config, name) != default and getattr(config, other) not in values:
            raise ValueError(
                f"{name}={getattr(config, name)!r} has a meaning with {other}={' or '.join(map(repr, values))} only, "
                f"got {other}={getattr(config, other)!r}; leave {name} at {default!r}"
            )


def documentation(options: tuple[Option, ...]) -> str:
    """The `Args:` of a config's docstring."""
    lines = []
    for option in options:
        lines.append(f"        {option.name} (default {option.default!r}): {option.doc}")
    return "Args:\n" + "\n".join(lines)
