"""Fields that have no meaning together, one row a combination: of every config, of the text tower's, and of a class's.
Needs neither torch nor transformers.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from .options_vit_embed import GRIDLESS_STEMS, NUM_DPT_TAPS, NUM_HYBRID_MAPS, TOKEN_CHOOSING_STEMS


class Combination(NamedTuple):
    """Fields that have no meaning together: whether a config has them, and what to say of it, a function of the config
    or a text that names its fields as {c.hidden_size}."""

    is_wrong: Callable[[Any], bool]
    message: str | Callable[[Any], str]

    def text(self, config: Any) -> str:
        return self.message.format(c=config) if isinstance(self.message, str) else self.message(config)


def not_in_patches(c: Any) -> bool:
    return not c.pad_to_patch and any(size % unit for size, unit in zip(c.image_shape, c.image_multiple))


def is_no_power_of_two(size: int) -> bool:
    return size & (size - 1) != 0


def backbone_widths(c: Any) -> list[int]:
    return list(getattr(c.backbone_config, "hidden_sizes", None) or ())


def num_patch_tokens(c: Any) -> int:
    return c.num_learned_tokens if c.stem_type == "token_learner" else math.prod(c.grid_size)


HEADS_DIVIDE_WIDTH = Combination(
    lambda c: c.hidden_size % c.num_attention_heads,
    "hidden_size must be a multiple of num_attention_heads, got hidden_size={c.hidden_size} and "
    "num_attention_heads={c.num_attention_heads}",
)

# In this order: a row may take for granted what those before it have ruled out.
COMBINATIONS = (
    HEADS_DIVIDE_WIDTH,
    Combination(
        lambda c: c.pooling_type == "cls" and not c.use_cls_token,
        "pooling_type='cls' needs use_cls_token=True; use pooling_type='mean' or 'map' without it",
    ),
    Combination(
        lambda c: c.position_embedding_type == "sinusoidal" and c.hidden_size % 4,
        "position_embedding_type='sinusoidal' needs hidden_size to be a multiple of 4 (sine and cosine of two "
        "coordinates), got hidden_size={c.hidden_size}",
    ),
    Combination(
        lambda c: c.patch_drop_rate and c.stem_type in TOKEN_CHOOSING_STEMS,
        "patch_drop_rate={c.patch_drop_rate} drops patches, but stem_type={c.stem_type!r} chooses its tokens itself; "
        "set patch_drop_rate=0",
    ),
    Combination(
        lambda c: c.token_merge_size and c.stem_type == "adaptive",
        "token_merge_size={c.token_merge_size} merges equally many tokens of every image, but stem_type='adaptive' "
        "chooses how many each keeps; set token_merge_size=0",
    ),
    Combination(
        lambda c: c.use_feature_pyramid and c.depth_head_type != "dpt",
        "use_feature_pyramid=True feeds the depth head of depth_head_type='dpt', got "
        "depth_head_type={c.depth_head_type!r}",
    ),
    Combination(
        lambda c: c.depth_activation is not None and c.max_depth is not None,
        "max_depth={c.max_depth} bounds a positive depth, but depth_activation={c.depth_activation!r} gives any "
        "number; leave one of them at None",
    ),
    Combination(
        lambda c: c.depth_gradient_weight and c.depth_activation == "identity",
        "depth_gradient_weight={c.depth_gradient_weight} compares logarithms of depths, which may be negative with "
        "depth_activation='identity'; set depth_gradient_weight=0",
    ),
    Combination(
        lambda c: not c.use_visual_projection and c.projection_dim != c.hidden_size,
        "use_visual_projection=False makes the pooled image vector the embedding, so projection_dim must be "
        "hidden_size; got projection_dim={c.projection_dim} and hidden_size={c.hidden_size}",
    ),
    Combination(
        lambda c: c.stem_type == "adaptive" and not_in_patches(c),
        "image_size must be a multiple of twice patch_size, for stem_type='adaptive', got image_size={c.image_size!r} "
        "and patch_size={c.patch_size!r}; change one of them or set pad_to_patch=True",
    ),
    Combination(
        not_in_patches,
        "image_size must be a multiple of patch_size, got image_size={c.image_size!r} and patch_size={c.patch_size!r}; "
        "change one of them or set pad_to_patch=True",
    ),
    Combination(
        lambda c: (
            c.stem_type == "overlap" and any(kernel < step for kernel, step in zip(c.patch_kernel_shape, c.patch_shape))
        ),
        "patch_kernel_size must be at least patch_size, or pixels are left out; got {c.patch_kernel_size!r} and "
        "patch_size={c.patch_size!r}",
    ),
    Combination(
        lambda c: (
            c.stem_type == "hierarchical"
            and (c.patch_shape[0] != c.patch_shape[1] or c.patch_shape[0] < 2 or is_no_power_of_two(c.patch_shape[0]))
        ),
        "stem_type='hierarchical' halves the image until a pixel is a patch: patch_size must be 2, 4, 8, ..., got "
        "{c.patch_size!r}",
    ),
    Combination(
        lambda c: c.stem_type == "hierarchical" and c.stem_norm_type == "layer_norm" and c.pyramid_widths[0] < 4,
        "stem_norm_type='layer_norm' over {c.pyramid_widths[0]} channels says next to nothing: hidden_size must be at "
        "least 2 * patch_size for stem_type='hierarchical', got hidden_size={c.hidden_size} and "
        "patch_size={c.patch_size!r}",
    ),
    Combination(
        lambda c: c.use_feature_pyramid and c.stem_type == "hierarchical" and c.patch_shape[0] < 8,
        "use_feature_pyramid=True reads maps of stride patch_size / 4 >= 2, got patch_size={c.patch_size!r}",
    ),
    Combination(
        lambda c: c.use_feature_pyramid and any(side % 4 for side in c.patch_shape),
        "use_feature_pyramid=True reads maps of strides patch_size / 4 and / 2: patch_size must be a multiple of 4 "
        "each way, got {c.patch_size!r}",
    ),
    Combination(
        lambda c: c.stem_type == "wavelet" and any(map(is_no_power_of_two, c.patch_shape)),
        "stem_type='wavelet' needs a patch_size of powers of two, got {c.patch_size!r}",
    ),
    Combination(
        lambda c: c.num_coefficients is not None and c.num_coefficients > math.prod(c.patch_shape),
        lambda c: (
            f"num_coefficients must be at most the {math.prod(c.patch_shape)} pixels of a patch, got "
            f"{c.num_coefficients} with patch_size={c.patch_size!r}"
        ),
    ),
    Combination(
        lambda c: min(c.grid_size) < 1,
        "patch_kernel_size must fit into the padded image, got patch_kernel_size={c.patch_kernel_shape} with "
        "image_size={c.image_size!r} and patch_size={c.patch_size!r}",
    ),
    Combination(
        lambda c: c.stem_type == "hybrid" and c.backbone_config is None,
        "stem_type='hybrid' needs backbone_config, the config of a transformers backbone whose last feature map has a "
        "stride of patch_size; got None",
    ),
    Combination(
        lambda c: c.stem_type == "hybrid" and c.use_feature_pyramid and len(backbone_widths(c)) < NUM_HYBRID_MAPS,
        lambda c: (
            f"use_feature_pyramid=True with stem_type='hybrid' reads the last {NUM_HYBRID_MAPS} stages of a "
            "backbone_config with hidden_sizes, one a stage, as ResNetConfig or ConvNextConfig; got "
            f"{type(c.backbone_config).__name__} with {backbone_widths(c)}"
        ),
    ),
    Combination(
        lambda c: c.token_merge_size > num_patch_tokens(c) // 2,
        lambda c: (
            f"token_merge_size must be at most half of the {num_patch_tokens(c)} patch tokens, got "
            f"{c.token_merge_size}; a layer merges pairs"
        ),
    ),
    Combination(
        lambda c: c.decoder_hidden_size % c.decoder_num_attention_heads or c.decoder_hidden_size % 4,
        "decoder_hidden_size must be a multiple of decoder_num_attention_heads and of 4 (sine and cosine of two "
        "coordinates), got decoder_hidden_size={c.decoder_hidden_size} and "
        "decoder_num_attention_heads={c.decoder_num_attention_heads}",
    ),
)


def has_no_padding(c: Any) -> bool:
    """Whether a tower that reads padding has nothing to pad with."""
    return c.reads_padding and not (isinstance(c.pad_token_id, int) and 0 <= c.pad_token_id < c.vocab_size)


def padding_reader(c: Any) -> str:
    field = "pooling_type" if c.pooling_type != "eos" else "use_causal_mask"
    return (
        f"{field}={getattr(c, field)!r} reads the padding after a text, so pad_token_id must be in "
        f"[0, vocab_size={c.vocab_size}), got pad_token_id={c.pad_token_id!r}"
    )


TEXT_COMBINATIONS = (
    HEADS_DIVIDE_WIDTH,
    Combination(
        lambda c: c.eos_token_id >= c.vocab_size,
        "eos_token_id must be below vocab_size, got eos_token_id={c.eos_token_id} and vocab_size={c.vocab_size}",
    ),
    Combination(
        lambda c: c.pooling_type == "first" and c.use_causal_mask,
        "pooling_type='first' reads a token that use_causal_mask=True lets see nothing but itself; set "
        "use_causal_mask=False, or another pooling_type",
    ),
    Combination(has_no_padding, padding_reader),
)

# --- what a class asks of its config ----------------------------------------------------------------------------------


def needs_grid(purpose: str) -> Combination:
    """A stem whose tokens belong to no place in the image cannot serve this purpose."""
    return Combination(
        lambda c: c.stem_type in GRIDLESS_STEMS,
        purpose + " is not available with stem_type={c.stem_type!r}: its tokens belong to no place in the image; use "
        "another stem_type",
    )


def in_whole_patches(c: Any) -> tuple[int, int]:
    """(gh, gw) where each patch of the image has one token."""
    return tuple(size // side for size, side in zip(c.padded_shape(c.image_shape), c.patch_shape))


DEPTH_COMBINATIONS = (
    needs_grid("depth"),
    Combination(
        lambda c: c.patch_drop_rate,
        "depth needs every patch, but patch_drop_rate={c.patch_drop_rate} drops some in training; set "
        "patch_drop_rate=0",
    ),
    Combination(
        lambda c: c.depth_head_type == "dpt" and c.num_hidden_layers < NUM_DPT_TAPS,
        f"depth_head_type='dpt' reads {NUM_DPT_TAPS} layers, but num_hidden_layers={{c.num_hidden_layers}}; use "
        "depth_head_type='deconv' or a deeper trunk",
    ),
)
BACKBONE_COMBINATIONS = (needs_grid("a feature map"),)
CONTRASTIVE_COMBINATIONS = (
    Combination(
        lambda c: c.text_config is None,
        "VitEmbedForContrastive needs a text tower, but text_config is None; give the config a VitEmbedTextConfig, or "
        "load a vision-only checkpoint with VitEmbedModel",
    ),
)
MASKED_COMBINATIONS = (
    Combination(
        lambda c: c.stem_type in TOKEN_CHOOSING_STEMS,
        "masked image modelling hides patches, but stem_type={c.stem_type!r} chooses its tokens itself; use another "
        "stem_type",
    ),
    Combination(
        lambda c: c.grid_size != in_whole_patches(c),
        lambda c: (
            f"masked image modelling needs one token a patch, {in_whole_patches(c)} for this image_size, but "
            f"patch_kernel_size={c.patch_kernel_size!r} with patch_size={c.patch_size!r} gives {c.grid_size}; use a "
            "kernel of patch_size plus an even number of at least patch_size pixels"
        ),
    ),
    *(
        Combination(
            lambda c, name=name: getattr(c, name),
            f"masked image modelling hides patches by mask_ratio and needs a token for each other one; set {name}=0, "
            f"got {{c.{name}}}",
        )
        for name in ("patch_drop_rate", "token_merge_size")
    ),
)


def check_combinations(config: Any, combinations: tuple[Combination, ...]) -> None:
    """Raises ValueError for the first combination that a config has."""
    for combination in combinations:
        if combination.is_wrong(config):
            raise ValueError(combination.text(config))
