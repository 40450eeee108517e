"""What a vit_embed model is: every choice that shapes the weights or the arithmetic, and nothing that needs torch.

One flat config describes the image tower and the heads; a nested `VitEmbedTextConfig` describes the text tower
of a dual encoder and is None for a vision-only model. Every default is OpenAI CLIP ViT-B/16
(arXiv:2103.00020, table 20), so `VitEmbedConfig()` is its image tower.
"""

import copy
import difflib
import inspect
import json
import logging
import math
from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, PretrainedConfig

logger = logging.getLogger(__name__)

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

# Every Auto class that a saved folder answers to, whichever class was saved.
AUTO_MAP = {
    "AutoConfig": "configuration_vit_embed.VitEmbedConfig",
    "AutoModel": "modeling_vit_embed.VitEmbedAutoModel",
    "AutoModelForImageClassification": "modeling_vit_embed.VitEmbedForImageClassification",
    "AutoModelForZeroShotImageClassification": "modeling_vit_embed.VitEmbedForContrastive",
    "AutoModelForDepthEstimation": "modeling_vit_embed.VitEmbedForDepthEstimation",
    "AutoModelForMaskedImageModeling": "modeling_vit_embed.VitEmbedForMaskedImageModeling",
    "AutoBackbone": "modeling_vit_embed.VitEmbedBackbone",
}

# field: the other field that gives it a meaning, and the values with which it has one. Elsewhere it stays at its
# default.
MEANT_FOR = {
    "patch_kernel_size": ("stem_type", ("overlap",)),
    "patch_pointwise": ("stem_type", ("overlap",)),
    "stem_norm_type": ("stem_type", ("hierarchical",)),
    "use_feature_pyramid": ("stem_type", ("hierarchical", "hybrid")),
    "backbone_config": ("stem_type", ("hybrid",)),
    "adaptive_budget": ("stem_type", ("adaptive",)),
    "adaptive_budget_weight": ("stem_type", ("adaptive",)),
    "num_learned_tokens": ("stem_type", ("token_learner",)),
    "num_coefficients": ("stem_type", ("dct", "wavelet")),
    "position_interpolation": ("position_embedding_type", ("learned",)),
    "position_degree": ("position_embedding_type", ("polynomial",)),
    "norm_before_pooling": ("pooling_type", ("mean",)),
    "hard_negative_beta": ("contrastive_loss", ("softmax",)),
    "deconv_kernel_size": ("depth_head_type", ("deconv",)),
}

# OpenAI's vocabulary has 49,408 tokens, the last of which ends a text. Configs written before transformers 4.31 say
# `eos_token_id = 2`, which is no end token of it: CLIP then pools at the row's largest id.
CLIP_VOCAB_SIZE = 49408
CLIP_EOS_TOKEN_ID = 49407
LEGACY_EOS_TOKEN_ID = 2

# Fields that a CLIPVisionConfig and a VitEmbedConfig share by name; `to_clip_vision_config` writes them.
CLIP_VISION_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "image_size",
    "patch_size",
    "num_channels",
    "layer_norm_eps",
    "attention_dropout",
    "initializer_range",
    "initializer_factor",
    "projection_dim",
)

# What stock CLIPModel takes for granted: a model that differs in any of these has no CLIPConfig.
CLIP_ARCHITECTURE = {
    "stem_type": "conv",
    "patch_bias": False,
    "use_cls_token": True,
    "num_register_tokens": 0,
    "position_embedding_type": "learned",
    "norm_type": "layer_norm",
    "norm_position": "pre",
    "use_pre_layernorm": True,
    "final_norm_type": "layer_norm",
    "qkv_bias": True,
    "layer_scale_init_value": None,
    "pooling_type": "cls",
    "contrastive_loss": "softmax",
    "use_visual_projection": True,
}
CLIP_TEXT_ARCHITECTURE = {"pooling_type": "eos", "use_causal_mask": True, "projection_bias": False}

# Stock classes beside CLIPModel whose folders we read as they are, by the class of ours that has their parts.
CLIP_VISION_CLASSES = {"CLIPVisionModelWithProjection": "VitEmbedModelWithProjection"}


def _as_pair(value: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """A size given as one number or as (height, width), as (height, width)."""
    return (value, value) if isinstance(value, int) else tuple(value)


# What timm, open_clip and other models of transformers call a field.
OTHER_NAMES = {
    "attn_drop_rate": "attention_dropout",
    "class_token": "use_cls_token",
    "cls_token": "use_cls_token",
    "depth": "num_hidden_layers",
    "dropout": "hidden_dropout_prob",
    "embed_dim": "hidden_size",
    "in_chans": "num_channels",
    "init_values": "layer_scale_init_value",
    "mlp_ratio": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_layers": "num_hidden_layers",
    "reg_tokens": "num_register_tokens",
    "width": "hidden_size",
}


def as_size(value: Any) -> Any:
    """One number for a square, else (height, width): JSON has no tuples, and stock CLIPModel knows squares only."""
    value = tuple(value) if isinstance(value, list) else value
    return value[0] if isinstance(value, tuple) and len(value) == 2 and value[0] == value[1] else value


def as_config(value: PretrainedConfig | dict[str, Any] | None) -> PretrainedConfig | None:
    """The config of another model of transformers, from itself or from the dict that its `to_dict` gives.

    Raises:
        TypeError: neither of them, or a dict without its `model_type`.
    """
    if isinstance(value, dict) and "model_type" in value:
        try:
            return AutoConfig.for_model(**value)
        except ValueError as error:
            raise ValueError(
                f"backbone_config must be of a model of transformers, got model_type={value['model_type']!r}"
            ) from error
    if value is None or isinstance(value, PretrainedConfig):
        return copy.deepcopy(value)  # transformers writes into the config of a model
    raise TypeError(f"backbone_config must be a config of transformers, or its dict with a model_type; got {value!r}")


def _near_miss(name: str, fields: tuple[str, ...]) -> str | None:
    """What to say of a keyword that is nearly, but not quite, the name of a field; None for any other."""
    if OTHER_NAMES.get(name) in fields:
        return f"no field {name!r}; here it is {OTHER_NAMES[name]!r}"
    close = difflib.get_close_matches(name, fields, n=1, cutoff=0.85)
    if close and name not in {*PretrainedConfig().to_dict(), "num_labels", "auto_map"}:
        return f"no field {name!r}; did you mean {close[0]!r}?"
    return None


def _reject_misspelled(kwargs: dict[str, Any], fields: tuple[str, ...], class_name: str) -> None:
    """Raises TypeError for a keyword that is nearly the name of a field. Unknown keywords as such pass: configs written
    by another transformers release carry keys of that release."""
    for name in kwargs:
        if message := _near_miss(name, fields):
            raise TypeError(f"{class_name} has {message}")


def _from_file(
    read: Callable[..., Any], config_dict: dict[str, Any], fields: tuple[str, ...], class_name: str, **kwargs
) -> Any:
    """`read(config_dict, **kwargs)` of a dict that was saved, whose near misses become attributes as they were:
    whatever was saved can be read, with a warning."""
    foreign = {name: config_dict[name] for name in config_dict if name not in fields and _near_miss(name, fields)}
    result = read({name: value for name, value in config_dict.items() if name not in foreign}, **kwargs)
    config = result[0] if isinstance(result, tuple) else result
    for name, value in foreign.items():
        logger.warning(
            "the config that is read: %s has %s; it is kept, and no model reads it",
            class_name,
            _near_miss(name, fields),
        )
        setattr(config, name, value)
    return result


def _check_integers(config: PretrainedConfig, minimum_of: dict[str, int]) -> None:
    for name, minimum in minimum_of.items():
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ValueError(f"{name} must be an integer >= {minimum}, got {value!r}")


def _check_choices(config: PretrainedConfig, choices_of: dict[str, tuple[str, ...]]) -> None:
    for name, choices in choices_of.items():
        value = getattr(config, name)
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}")


def _check_rates(config: PretrainedConfig, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise ValueError(f"{name} must be a number in [0, 1), got {value!r}")


def _check_positive(config: PretrainedConfig, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, (int, float)) or not (0 < value < math.inf):
            raise ValueError(f"{name} must be a positive number, got {value!r}")


def _check_not_negative(config: PretrainedConfig, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, (int, float)) or not (0 <= value < math.inf):
            raise ValueError(f"{name} must be a number >= 0, got {value!r}")


def _check_size(config: PretrainedConfig, name: str) -> None:
    value = getattr(config, name)
    pair = _as_pair(value) if isinstance(value, (int, tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(v, int) and v > 0 for v in pair):
        raise ValueError(f"{name} must be pixels > 0, one integer or (height, width); got {value!r}")


def _check_even(config: PretrainedConfig, name: str) -> None:
    value = getattr(config, name)
    if not isinstance(value, int) or value < 2 or value % 2:
        raise ValueError(f"{name} must be an even integer >= 2, got {value!r}")


def _check_json_dict(config: PretrainedConfig, name: str) -> None:
    """Raises TypeError unless a field is None or a dict that comes back from JSON as it was."""
    value = getattr(config, name)
    if value is None:
        return
    message = f"{name} must be None, or a dict that JSON gives back unchanged: string keys, lists, no tuples"
    try:
        survives = isinstance(value, dict) and json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError) as error:
        raise TypeError(f"{message}; got {value!r}") from error
    if not survives:
        raise TypeError(f"{message}; got {value!r}")


def _check_heads(config: PretrainedConfig) -> None:
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size must be a multiple of num_attention_heads, got hidden_size={config.hidden_size} and "
            f"num_attention_heads={config.num_attention_heads}"
        )


class VitEmbedTextConfig(PretrainedConfig):
    """The text tower of a dual encoder; by default CLIP's causal transformer, pooled at the end-of-text token.

    Args:
        vocab_size: tokens in the vocabulary; 49,408 is OpenAI's byte-pair vocabulary.
        hidden_size: width D of a token.
        num_hidden_layers: transformer layers.
        num_attention_heads: heads; must divide hidden_size.
        intermediate_size: width of the MLP's hidden layer.
        max_position_embeddings: longest text in tokens, start and end token included.
        hidden_act: one of HIDDEN_ACTS.
        layer_norm_eps: added to the variance in every norm.
        attention_dropout: rate in [0, 1) on the attention weights, in training.
        projection_dim: width of the joint space; VitEmbedConfig.projection_dim is what a dual encoder uses.
        initializer_range: standard deviation of the embeddings at initialisation.
        initializer_factor: multiplies every standard deviation at initialisation.
        bos_token_id, eos_token_id: first and last token of every text. `eos_token_id=2` is CLIP's legacy value: read as
            49,407 with OpenAI's vocabulary, as "the largest id of the row" with any other.
        pad_token_id: fills rows behind their end token; never seen by it, unless `reads_padding`.
        pooling_type: "eos" reads the state of the first end-of-text token, "first" that of the first token, "last" that
            of the last place of the row.
        use_causal_mask: whether a token sees only itself and those before it; False is a bidirectional tower, as
            SigLIP's (arXiv:2303.15343).
        projection_bias: whether the projection of the pooled text into the joint space has a bias. CLIP's has none.

    Raises:
        ValueError: a value out of range, or a combination without a meaning; names the field.
        TypeError: a keyword that is a misspelled field.

    Source: transformers CLIPTextConfig (field names), arXiv:2103.00020 section 2.4 (sizes).
    """

    model_type = "vit_embed_text"
    base_config_key = "text_config"

    def __init__(
        self,
        vocab_size: int = CLIP_VOCAB_SIZE,
        hidden_size: int = 512,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 8,
        intermediate_size: int = 2048,
        max_position_embeddings: int = 77,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
        attention_dropout: float = 0.0,
        projection_dim: int = 512,
        initializer_range: float = 0.02,
        initializer_factor: float = 1.0,
        bos_token_id: int | None = 49406,
        eos_token_id: int = CLIP_EOS_TOKEN_ID,
        pad_token_id: int | None = 1,
        pooling_type: str = "eos",
        use_causal_mask: bool = True,
        projection_bias: bool = False,
        **kwargs,
    ):
        _reject_misspelled(kwargs, TEXT_FIELDS, type(self).__name__)
        super().__init__(bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id, **kwargs)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.attention_dropout = attention_dropout
        self.projection_dim = projection_dim
        self.initializer_range = initializer_range
        self.initializer_factor = initializer_factor
        self.bos_token_id = bos_token_id
        self.pad_token_id = pad_token_id
        self.pooling_type = pooling_type
        self.use_causal_mask = use_causal_mask
        self.projection_bias = projection_bias
        if eos_token_id == LEGACY_EOS_TOKEN_ID and vocab_size == CLIP_VOCAB_SIZE:
            eos_token_id = CLIP_EOS_TOKEN_ID
        self.eos_token_id = eos_token_id
        self.validate_architecture()

    def validate_architecture(self) -> None:
        """Raises ValueError, naming the field, unless every field is in range and the combination has a meaning."""
        counts = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        _check_integers(self, dict.fromkeys((*counts, "max_position_embeddings", "projection_dim"), 1))
        _check_integers(self, {"eos_token_id": 0})
        flags = dict.fromkeys(("use_causal_mask", "projection_bias"), (True, False))
        _check_choices(self, {"hidden_act": HIDDEN_ACTS, "pooling_type": TEXT_POOLING_TYPES, **flags})
        _check_rates(self, ("attention_dropout",))
        _check_positive(self, ("layer_norm_eps",))
        _check_heads(self)
        if self.eos_token_id >= self.vocab_size:
            raise ValueError(
                f"eos_token_id must be below vocab_size, got eos_token_id={self.eos_token_id} and "
                f"vocab_size={self.vocab_size}"
            )
        if self.pooling_type == "first" and self.use_causal_mask:
            raise ValueError(
                "pooling_type='first' reads a token that use_causal_mask=True lets see nothing but itself; set "
                "use_causal_mask=False, or another pooling_type"
            )
        self._check_padding()

    @property
    def reads_padding(self) -> bool:
        """Whether what stands behind a text changes its vector, so that the tower itself pads every row to
        `max_position_embeddings`."""
        return self.pooling_type != "eos" or not self.use_causal_mask

    def _check_padding(self) -> None:
        """Raises ValueError where rows are to be padded and there is nothing to pad them with."""
        pad = self.pad_token_id
        if not self.reads_padding or (isinstance(pad, int) and 0 <= pad < self.vocab_size):
            return
        field = "pooling_type" if self.pooling_type != "eos" else "use_causal_mask"
        raise ValueError(
            f"{field}={getattr(self, field)!r} reads the padding behind a text, so pad_token_id must be in "
            f"[0, vocab_size={self.vocab_size}), got pad_token_id={pad!r}"
        )

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers; a CLIPConfig found there is translated, and one without a text tower is a ValueError."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        config_dict = from_clip_config(config_dict)
        if "text_config" in config_dict and config_dict["text_config"] is None:
            raise ValueError(
                f"{pretrained_model_name_or_path} has no text tower: its text_config is None; load the text tower from "
                "a checkpoint that VitEmbedForContrastive saved"
            )
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "VitEmbedTextConfig":
        """As in transformers."""
        return _from_file(super().from_dict, config_dict, TEXT_FIELDS, cls.__name__, **kwargs)

    # The layers of the text tower have no options: they are CLIP's. The layer that both towers share asks for these.
    norm_type = "layer_norm"
    norm_position = "pre"
    qkv_bias = True
    layer_scale_init_value = None
    hidden_dropout_prob = 0.0
    drop_path_rate = 0.0
    num_prefix_tokens = 0


class VitEmbedConfig(PretrainedConfig):
    """The image tower, the projection and the heads; with `text_config`, a dual encoder.

    Sizes are pixels or counts; a size that is a tuple is (height, width).

    Args:
        hidden_size: width D of a token. CLIP B 768, L 1024.
        num_hidden_layers: transformer layers. B 12, L 24.
        num_attention_heads: heads h; must divide hidden_size. B 12, L 16.
        intermediate_size: width of the MLP's hidden layer. B 3072, L 4096.
        hidden_act: one of HIDDEN_ACTS. OpenAI's weights need "quick_gelu", most others "gelu".
        image_size: height and width in pixels that the position table is made for; other sizes resample it.
        patch_size: height and width of a patch in pixels; must divide image_size.
        num_channels: image channels C.
        stem_type: pixels -> tokens, one of STEM_TYPES; `stems_vit_embed.py` has the equation of each.
        patch_bias: whether the patch projection has a bias. CLIP's has none.
        pad_to_patch: pads images with zeros on the right and at the bottom to whole patches, instead of refusing them.
        patch_kernel_size: pixels of the "overlap" stem's kernel, at least the patch; None is twice the patch.
        patch_pointwise: whether a 1x1 convolution follows the "overlap" stem's.
        stem_norm_type: norm of the "hierarchical" stem, one of STEM_NORM_TYPES.
        use_feature_pyramid: the "dpt" depth head reads its two finest levels from the maps of a "hierarchical" or
            "hybrid" stem, which have strides patch_size / 4 and patch_size / 2.
        backbone_config: config, or its dict, of the transformers backbone of the "hybrid" stem; the stride of its last
            feature map is patch_size. It gives that one alone (`out_features`), or the last three with
            use_feature_pyramid.
        adaptive_budget: tokens that the "adaptive" stem is trained to keep, as a share in [0.25, 1] of the patches.
        adaptive_budget_weight: factor of the squared difference to that share, in the training loss of every head.
        num_learned_tokens: tokens K of the "token_learner" stem, whatever the image size.
        num_coefficients: lowest-frequency coefficients that "dct" and "wavelet" keep of a patch and channel; None is
            all.
        use_cls_token: whether a class token is put before the patches.
        num_register_tokens: learned tokens without position between class token and patches (arXiv:2309.16588).
        position_embedding_type: one of POSITION_EMBEDDING_TYPES.
        position_interpolation: how a learned table is resampled to another grid, one of POSITION_INTERPOLATIONS.
        position_degree: highest power of each coordinate in "polynomial" positions.
        norm_type: norm of the layers, one of NORM_TYPES.
        norm_position: "pre" normalises each branch's input, "post" the sum behind it (arXiv:2002.04745).
        use_pre_layernorm: whether the tokens are normalised before the first layer (CLIP's `pre_layrnorm`).
        final_norm_type: norm before pooling heads and dense heads; None means norm_type, "none" means no norm.
        layer_norm_eps: added to the variance in every norm.
        qkv_bias: whether the query, key and value projections have a bias.
        layer_scale_init_value: start value of a learned scale on each branch (arXiv:2103.17239); None for no scale.
        hidden_dropout_prob: rate in [0, 1) on embeddings and branch outputs, in training.
        attention_dropout: rate in [0, 1) on attention weights, in training.
        drop_path_rate: rate in [0, 1) of dropping a branch for a sample in the last layer, rising linearly from 0 in
            the first (arXiv:1603.09382), in training.
        pooling_type: "cls" takes the class token, "mean" the mean of the patches, each then normalised; "map" is
            attention pooling over the normalised tokens (arXiv:2106.04560, figure 1).
        norm_before_pooling: with pooling_type="mean", the mean of the normalised patches in place of the normalised
            mean (timm's models with global_pool="avg" and fc_norm=False).
        patch_drop_rate: share in [0, 1) of the patches left out at random, in training (arXiv:2212.00794).
        token_merge_size: pairs of most similar patch tokens that each layer merges, in evaluation (arXiv:2210.09461);
            at most half of the tokens that a layer has.
        projection_dim: width of the joint image-text space.
        use_visual_projection: whether the pooled image vector is projected into that space; False takes it as it is
            (SigLIP), and projection_dim must then be hidden_size.
        logit_scale_init_value: natural log of the inverse temperature at initialisation; ln(1 / 0.07) = 2.6592.
        contrastive_loss: "softmax" is CLIP's, "sigmoid" SigLIP's (arXiv:2303.15343) with a learned logit_bias.
        hard_negative_beta: a number >= 0; each negative of the "softmax" loss counts exp(hard_negative_beta * logit),
            over the mean of that (arXiv:2010.04592). 0 counts all alike.
        contrastive_chunk_size: images, and texts, that a dual encoder in training holds activations of at a time; the
            backward pass encodes each chunk again (cached gradients, arXiv:2101.06983). None is the whole batch.
        depth_head_type: one of DEPTH_HEAD_TYPES.
        deconv_kernel_size: pixels of the kernels of the "deconv" depth head, even; their stride is 2 for any.
        depth_activation: how depth is made of the head's numbers. None is softplus, or `max_depth` * sigmoid: always
            positive; "identity" is the numbers themselves, which only "l1" and "l2" can train.
        depth_loss: one of DEPTH_LOSSES.
        depth_gradient_weight: a number >= 0, factor of the multi-scale gradient matching loss that is added to it
            (arXiv:1907.01341, there 0.5). 0 adds nothing.
        max_depth: metres at the far end of the depth head's range; None predicts unitless positive depth.
        mask_ratio: share in [0, 1) of the patches that masked image modelling hides (arXiv:2111.06377).
        norm_pix_loss: whether it predicts each patch less its mean and over its standard deviation.
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads, decoder_intermediate_size: sizes of
            its decoder; the width must be a multiple of the heads and of 4.
        out_features, out_indices: the stages ("stem", "stage1", ...) it returns, saved by name; None: the last one.
        initializer_range: standard deviation of the embeddings at initialisation.
        initializer_factor: multiplies every standard deviation at initialisation.
        text_config: a VitEmbedTextConfig or its dict; None for a vision-only model.
        converted_from: where a converted checkpoint came from (layout, names, licence), a dict that JSON can hold:
            `convert_checkpoint.py` writes it and reads it back. No model reads it; every class saves it.

    Raises:
        ValueError: a value out of range, or a combination without a meaning; names the fields.
        TypeError: a keyword that is a misspelled field, or a converted_from that JSON cannot hold.

    Source: transformers CLIPVisionConfig and CLIPConfig (field names). A CLIPConfig dict is read as it is by
    `from_dict` and `from_pretrained`.
    """

    model_type = "vit_embed"
    # Trainer gathers what evaluation returns over all batches: batch x batch logits do not concatenate.
    keys_to_ignore_at_inference = [
        "logits_per_image",
        "logits_per_text",
        "hidden_states",
        "attentions",
        "text_hidden_states",
        "text_attentions",
    ]

    def __init__(
        self,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        hidden_act: str = "quick_gelu",
        image_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        num_channels: int = 3,
        stem_type: str = "conv",
        patch_bias: bool = False,
        pad_to_patch: bool = False,
        patch_kernel_size: int | tuple[int, int] | None = None,
        patch_pointwise: bool = False,
        stem_norm_type: str = "layer_norm",
        use_feature_pyramid: bool = False,
        backbone_config: PretrainedConfig | dict[str, Any] | None = None,
        adaptive_budget: float = 0.5,
        adaptive_budget_weight: float = 1.0,
        num_learned_tokens: int = 8,
        num_coefficients: int | None = None,
        use_cls_token: bool = True,
        num_register_tokens: int = 0,
        position_embedding_type: str = "learned",
        position_interpolation: str = "bicubic",
        position_degree: int = 4,
        norm_type: str = "layer_norm",
        norm_position: str = "pre",
        use_pre_layernorm: bool = True,
        final_norm_type: str | None = None,
        layer_norm_eps: float = 1e-5,
        qkv_bias: bool = True,
        layer_scale_init_value: float | None = None,
        hidden_dropout_prob: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path_rate: float = 0.0,
        pooling_type: str = "cls",
        norm_before_pooling: bool = False,
        patch_drop_rate: float = 0.0,
        token_merge_size: int = 0,
        projection_dim: int = 512,
        use_visual_projection: bool = True,
        logit_scale_init_value: float = 2.6592,
        contrastive_loss: str = "softmax",
        hard_negative_beta: float = 0.0,
        contrastive_chunk_size: int | None = None,
        depth_head_type: str = "deconv",
        deconv_kernel_size: int = 2,
        depth_activation: str | None = None,
        depth_loss: str = "silog",
        depth_gradient_weight: float = 0.0,
        max_depth: float | None = None,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
        decoder_hidden_size: int = 512,
        decoder_num_hidden_layers: int = 4,
        decoder_num_attention_heads: int = 16,
        decoder_intermediate_size: int = 2048,
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        initializer_range: float = 0.02,
        initializer_factor: float = 1.0,
        text_config: VitEmbedTextConfig | dict[str, Any] | None = None,
        converted_from: dict[str, Any] | None = None,
        **kwargs,
    ):
        _reject_misspelled(kwargs, FIELDS, type(self).__name__)
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.image_size = as_size(image_size)
        self.patch_size = as_size(patch_size)
        self.num_channels = num_channels
        self.stem_type = stem_type
        self.patch_bias = patch_bias
        self.pad_to_patch = pad_to_patch
        self.patch_kernel_size = as_size(patch_kernel_size)
        self.patch_pointwise = patch_pointwise
        self.stem_norm_type = stem_norm_type
        self.use_feature_pyramid = use_feature_pyramid
        self.backbone_config = as_config(backbone_config)
        self.adaptive_budget = adaptive_budget
        self.adaptive_budget_weight = adaptive_budget_weight
        self.num_learned_tokens = num_learned_tokens
        self.num_coefficients = num_coefficients
        self.use_cls_token = use_cls_token
        self.num_register_tokens = num_register_tokens
        self.position_embedding_type = position_embedding_type
        self.position_interpolation = position_interpolation
        self.position_degree = position_degree
        self.norm_type = norm_type
        self.norm_position = norm_position
        self.use_pre_layernorm = use_pre_layernorm
        self.final_norm_type = final_norm_type
        self.layer_norm_eps = layer_norm_eps
        self.qkv_bias = qkv_bias
        self.layer_scale_init_value = layer_scale_init_value
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_dropout = attention_dropout
        self.drop_path_rate = drop_path_rate
        self.pooling_type = pooling_type
        self.norm_before_pooling = norm_before_pooling
        self.patch_drop_rate = patch_drop_rate
        self.token_merge_size = token_merge_size
        self.projection_dim = projection_dim
        self.use_visual_projection = use_visual_projection
        self.logit_scale_init_value = logit_scale_init_value
        self.contrastive_loss = contrastive_loss
        self.hard_negative_beta = hard_negative_beta
        self.contrastive_chunk_size = contrastive_chunk_size
        self.depth_head_type = depth_head_type
        self.deconv_kernel_size = deconv_kernel_size
        self.depth_activation = depth_activation
        self.depth_loss = depth_loss
        self.depth_gradient_weight = depth_gradient_weight
        self.max_depth = max_depth
        self.mask_ratio = mask_ratio
        self.norm_pix_loss = norm_pix_loss
        self.decoder_hidden_size = decoder_hidden_size
        self.decoder_num_hidden_layers = decoder_num_hidden_layers
        self.decoder_num_attention_heads = decoder_num_attention_heads
        self.decoder_intermediate_size = decoder_intermediate_size
        self.out_indices = out_indices
        self.initializer_range = initializer_range
        self.initializer_factor = initializer_factor
        self.text_config = VitEmbedTextConfig(**text_config) if isinstance(text_config, dict) else text_config
        if (
            self.text_config is not None
            and getattr(self.text_config, "model_type", "") != VitEmbedTextConfig.model_type
        ):
            raise TypeError(
                f"text_config must be a VitEmbedTextConfig, a dict of one, or None; got {self.text_config!r}"
            )
        self.converted_from = copy.deepcopy(converted_from)
        super().__init__(**kwargs)
        self.validate_architecture()
        self.out_indices = self._stage_indices(out_features, out_indices)

    def validate_architecture(self) -> None:
        """Raises ValueError, naming the fields, unless every field is in range and the combination has a meaning;
        TypeError for a `converted_from` that JSON cannot hold."""
        counts = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels")
        decoder_counts = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        counts = (*counts, *(f"decoder_{name}" for name in decoder_counts), "num_learned_tokens", "position_degree")
        _check_integers(self, dict.fromkeys((*counts, "projection_dim"), 1))
        _check_integers(self, {"num_register_tokens": 0, "token_merge_size": 0})
        flags = ("patch_bias", "pad_to_patch", "patch_pointwise", "use_feature_pyramid", "norm_pix_loss")
        flags = (*flags, "use_cls_token", "use_pre_layernorm", "qkv_bias")
        flags = (*flags, "norm_before_pooling", "use_visual_projection")
        _check_choices(
            self,
            {
                "hidden_act": HIDDEN_ACTS,
                "stem_type": STEM_TYPES,
                "stem_norm_type": STEM_NORM_TYPES,
                "position_embedding_type": POSITION_EMBEDDING_TYPES,
                "position_interpolation": POSITION_INTERPOLATIONS,
                "norm_type": NORM_TYPES,
                "norm_position": NORM_POSITIONS,
                "final_norm_type": (None, *NORM_TYPES, "none"),
                "pooling_type": POOLING_TYPES,
                "contrastive_loss": CONTRASTIVE_LOSSES,
                "depth_head_type": DEPTH_HEAD_TYPES,
                "depth_activation": DEPTH_ACTIVATIONS,
                "depth_loss": DEPTH_LOSSES,
                **dict.fromkeys(flags, (True, False)),
            },
        )
        _check_rates(
            self, ("hidden_dropout_prob", "attention_dropout", "drop_path_rate", "patch_drop_rate", "mask_ratio")
        )
        _check_positive(self, ("layer_norm_eps", "initializer_range", "initializer_factor"))
        _check_not_negative(self, ("adaptive_budget_weight", "hard_negative_beta", "depth_gradient_weight"))
        _check_integers(self, {"num_labels": 1})
        if self.contrastive_chunk_size is not None:
            _check_integers(self, {"contrastive_chunk_size": 1})
        _check_even(self, "deconv_kernel_size")
        _check_json_dict(self, "converted_from")
        _check_choices(self, {"problem_type": PROBLEM_TYPES})
        scale = self.logit_scale_init_value
        if not isinstance(scale, (int, float)) or not scale <= math.log(MAX_INVERSE_TEMPERATURE) + 1e-4:
            raise ValueError(
                f"logit_scale_init_value must be a natural log of at most ln {MAX_INVERSE_TEMPERATURE}, got {scale!r}"
            )
        _check_positive(self, tuple(n for n in ("max_depth", "layer_scale_init_value") if getattr(self, n) is not None))
        _check_heads(self)
        for name in ("image_size", "patch_size"):
            _check_size(self, name)
        self._check_combinations()
        self._check_stem()
        self._check_decoder()
        self._stage_indices(None, self.__dict__.get("out_indices"))

    def _check_combinations(self) -> None:
        """Raises ValueError for a field that another one leaves without a meaning; names both."""
        for name, (other, values) in MEANT_FOR.items():
            value, default = getattr(self, name), DEFAULTS[name]
            if value != default and getattr(self, other) not in values:
                raise ValueError(
                    f"{name}={value!r} has a meaning with {other}={' or '.join(map(repr, values))} only, got "
                    f"{other}={getattr(self, other)!r}; leave {name} at {default!r}"
                )
        if self.pooling_type == "cls" and not self.use_cls_token:
            raise ValueError("pooling_type='cls' needs use_cls_token=True; use pooling_type='mean' or 'map' without it")
        if self.position_embedding_type == "sinusoidal" and self.hidden_size % 4:
            raise ValueError(
                "position_embedding_type='sinusoidal' needs hidden_size to be a multiple of 4 (sine and cosine of two "
                f"coordinates), got hidden_size={self.hidden_size}"
            )
        if self.patch_drop_rate and self.stem_type in TOKEN_CHOOSING_STEMS:
            raise ValueError(
                f"patch_drop_rate={self.patch_drop_rate} drops patches, but stem_type={self.stem_type!r} chooses its "
                "tokens itself; set patch_drop_rate=0"
            )
        if self.token_merge_size and self.stem_type == "adaptive":
            raise ValueError(
                f"token_merge_size={self.token_merge_size} merges equally many tokens of every image, but "
                "stem_type='adaptive' chooses how many each keeps; set token_merge_size=0"
            )
        if self.use_feature_pyramid and self.depth_head_type != "dpt":
            raise ValueError(
                "use_feature_pyramid=True feeds the depth head of depth_head_type='dpt', got "
                f"depth_head_type={self.depth_head_type!r}"
            )
        if self.depth_activation is not None and self.max_depth is not None:
            raise ValueError(
                f"max_depth={self.max_depth} bounds a positive depth, but depth_activation={self.depth_activation!r} "
                "gives any number; leave one of them at None"
            )
        if self.depth_gradient_weight and self.depth_activation == "identity":
            raise ValueError(
                f"depth_gradient_weight={self.depth_gradient_weight} compares logarithms of depths, which may be "
                "negative with depth_activation='identity'; set depth_gradient_weight=0"
            )
        if not self.use_visual_projection and self.projection_dim != self.hidden_size:
            raise ValueError(
                "use_visual_projection=False makes the pooled image vector the embedding, so projection_dim must be "
                f"hidden_size; got projection_dim={self.projection_dim} and hidden_size={self.hidden_size}"
            )

    def _check_stem(self) -> None:
        """Raises ValueError, naming the fields, unless the stem can cut this image with this patch."""
        stem, patch = self.stem_type, self.patch_shape
        if not self.pad_to_patch and any(size % unit for size, unit in zip(self.image_shape, self.image_multiple)):
            twice = "twice patch_size, for stem_type='adaptive'" if stem == "adaptive" else "patch_size"
            raise ValueError(
                f"image_size must be a multiple of {twice}, got image_size={self.image_size!r} and "
                f"patch_size={self.patch_size!r}; change one of them or set pad_to_patch=True"
            )
        if self.patch_kernel_size is not None:
            _check_size(self, "patch_kernel_size")
        if stem == "overlap" and any(kernel < step for kernel, step in zip(self.patch_kernel_shape, patch)):
            raise ValueError(
                f"patch_kernel_size must be at least patch_size, or pixels are left out; got "
                f"{self.patch_kernel_size!r} and patch_size={self.patch_size!r}"
            )
        if stem == "hierarchical" and (patch[0] != patch[1] or patch[0] < 2 or patch[0] & (patch[0] - 1)):
            raise ValueError(
                f"stem_type='hierarchical' halves the image until a pixel is a patch: patch_size must be 2, 4, 8, "
                f"..., got {self.patch_size!r}"
            )
        if stem == "hierarchical" and self.stem_norm_type == "layer_norm" and self.pyramid_widths[0] < 4:
            raise ValueError(
                f"stem_norm_type='layer_norm' over {self.pyramid_widths[0]} channels says next to nothing: "
                f"hidden_size must be at least 2 * patch_size for stem_type='hierarchical', got "
                f"hidden_size={self.hidden_size} and patch_size={self.patch_size!r}"
            )
        if self.use_feature_pyramid and stem == "hierarchical" and patch[0] < 8:
            raise ValueError(
                f"use_feature_pyramid=True reads maps of stride patch_size / 4 >= 2, got patch_size={self.patch_size!r}"
            )
        if self.use_feature_pyramid and any(side % 4 for side in patch):
            raise ValueError(
                f"use_feature_pyramid=True reads maps of strides patch_size / 4 and / 2: patch_size must be a multiple "
                f"of 4 each way, got {self.patch_size!r}"
            )
        if stem == "wavelet" and any(side & (side - 1) for side in patch):
            raise ValueError(f"stem_type='wavelet' needs a patch_size of powers of two, got {self.patch_size!r}")
        if self.num_coefficients is not None:
            _check_integers(self, {"num_coefficients": 1})
            if self.num_coefficients > math.prod(patch):
                raise ValueError(
                    f"num_coefficients must be at most the {math.prod(patch)} pixels of a patch, got "
                    f"{self.num_coefficients} with patch_size={self.patch_size!r}"
                )
        if min(self.grid_size) < 1:
            raise ValueError(
                f"patch_kernel_size must fit into the padded image, got patch_kernel_size={self.patch_kernel_shape} "
                f"with image_size={self.image_size!r} and patch_size={self.patch_size!r}"
            )
        if stem == "hybrid" and self.backbone_config is None:
            raise ValueError(
                "stem_type='hybrid' needs backbone_config, the config of a transformers backbone whose last feature "
                "map has a stride of patch_size; got None"
            )
        if stem == "hybrid" and self.use_feature_pyramid:
            widths = getattr(self.backbone_config, "hidden_sizes", None) or ()
            if len(widths) < NUM_HYBRID_MAPS:
                raise ValueError(
                    f"use_feature_pyramid=True with stem_type='hybrid' reads the last {NUM_HYBRID_MAPS} stages of a "
                    f"backbone_config with hidden_sizes, one a stage, as ResNetConfig or ConvNextConfig; got "
                    f"{type(self.backbone_config).__name__} with {list(widths)}"
                )
        _check_positive(self, ("adaptive_budget",))
        if not 0.25 <= self.adaptive_budget <= 1:
            raise ValueError(
                f"adaptive_budget must be a share in [0.25, 1] of the patches, got {self.adaptive_budget!r}"
            )
        num_tokens = self.num_learned_tokens if stem == "token_learner" else math.prod(self.grid_size)
        if self.token_merge_size > num_tokens // 2:
            raise ValueError(
                f"token_merge_size must be at most half of the {num_tokens} patch tokens, got "
                f"{self.token_merge_size}; a layer merges pairs"
            )

    def _check_decoder(self) -> None:
        width, heads = self.decoder_hidden_size, self.decoder_num_attention_heads
        if width % heads or width % 4:
            raise ValueError(
                "decoder_hidden_size must be a multiple of decoder_num_attention_heads and of 4 (sine and cosine of "
                f"two coordinates), got decoder_hidden_size={width} and decoder_num_attention_heads={heads}"
            )

    @property
    def sub_configs(self) -> dict[str, type[PretrainedConfig]]:
        """The text tower's class, where there is one: transformers 4.57 walks into every entry, None included."""
        return {} if self.text_config is None else {"text_config": VitEmbedTextConfig}

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) in pixels that the position table is made for."""
        return _as_pair(self.image_size)

    @property
    def patch_shape(self) -> tuple[int, int]:
        """(height, width) of a patch in pixels."""
        return _as_pair(self.patch_size)

    @property
    def image_multiple(self) -> tuple[int, int]:
        """(height, width) in pixels that the sides of an image must be multiples of, or are padded to."""
        return tuple(2 * side for side in self.patch_shape) if self.stem_type == "adaptive" else self.patch_shape

    @property
    def patch_kernel_shape(self) -> tuple[int, int]:
        """(height, width) in pixels of the "overlap" stem's kernel."""
        if self.patch_kernel_size is None:
            return tuple(2 * side for side in self.patch_shape)
        return _as_pair(self.patch_kernel_size)

    @property
    def patch_padding(self) -> tuple[int, int]:
        """(rows, columns) of zeros that the "overlap" stem puts on each side: floor((kernel - stride) / 2)."""
        return tuple((kernel - step) // 2 for kernel, step in zip(self.patch_kernel_shape, self.patch_shape))

    @property
    def grid_size(self) -> tuple[int, int]:
        """(gh, gw): rows and columns of patches at the native `image_size`."""
        return self.grid_of(self.image_shape)

    def grid_of(self, image_shape: tuple[int, int]) -> tuple[int, int]:
        """(gh, gw) of an image of (height, width) pixels, a remainder padded to whole patches."""
        height, width = self.padded_shape(image_shape)
        if self.stem_type != "overlap":
            return height // self.patch_shape[0], width // self.patch_shape[1]
        sizes = zip((height, width), self.patch_padding, self.patch_kernel_shape, self.patch_shape)
        return tuple((size + 2 * padding - kernel) // step + 1 for size, padding, kernel, step in sizes)

    def padded_shape(self, image_shape: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in pixels, each rounded up to its `image_multiple` with `pad_to_patch`."""
        if not self.pad_to_patch:
            return image_shape
        return tuple((size + unit - 1) // unit * unit for size, unit in zip(image_shape, self.image_multiple))

    @property
    def pyramid_widths(self) -> tuple[int, ...]:
        """Channels of the stem's maps, from fine to coarse; none for a stem that gives its tokens alone.

        "hierarchical" has maps from stride 2 to stride patch_size: the last with hidden_size, each finer one half of
        the next, so 96, 192, 384, 768 for ViT-B/16. "hybrid" has, with use_feature_pyramid, the last
        NUM_HYBRID_MAPS of its backbone.
        """
        if self.stem_type == "hybrid" and self.use_feature_pyramid:
            return tuple(self.backbone_config.hidden_sizes[-NUM_HYBRID_MAPS:])
        if self.stem_type != "hierarchical":
            return ()
        num_stages = self.patch_shape[0].bit_length() - 1
        return tuple(max(1, self.hidden_size >> (num_stages - i)) for i in range(1, num_stages + 1))

    @property
    def num_prefix_tokens(self) -> int:
        """P: tokens before the first patch (class token and registers)."""
        return int(self.use_cls_token) + self.num_register_tokens

    @property
    def resolved_final_norm_type(self) -> str:
        """`final_norm_type` with its default, the norm of the layers, filled in."""
        return self.final_norm_type or self.norm_type

    @property
    def stage_names(self) -> list[str]:
        """Names that `out_features` picks from: the stem's maps ("pyramid1" is the finest, of stride 2 with a
        hierarchical stem), the embeddings, then the output of each layer."""
        pyramid = [f"pyramid{i}" for i in range(1, len(self.pyramid_widths) + 1)]
        return pyramid + ["stem"] + [f"stage{i}" for i in range(1, self.num_hidden_layers + 1)]

    @property
    def out_features(self) -> list[str]:
        """Names of the stages that the backbone returns: those of `out_indices`, or the last one."""
        return [self.stage_names[-1]] if self.out_indices is None else [self.stage_names[i] for i in self.out_indices]

    @out_features.setter
    def out_features(self, names: list[str]) -> None:
        self.out_indices = self._stage_indices(names, None)

    def _stage_indices(self, names: list[str] | None, indices: list[int] | None) -> list[int] | None:
        """`out_indices` counted from 0, from either way to name stages; None for neither."""
        stages = self.stage_names
        for field, value in (("out_features", names), ("out_indices", indices)):
            if value is not None and not isinstance(value, (list, tuple)):
                raise TypeError(f"{field} must be a list, got {value!r}")
        if wrong := [name for name in names or () if name not in stages]:
            raise ValueError(f"out_features must be among {stages}, got {wrong}")
        if wrong := [i for i in indices or () if not -len(stages) <= i < len(stages)]:
            raise ValueError(f"out_indices must be in [{-len(stages)}, {len(stages) - 1}], got {wrong}")
        if indices is not None:
            indices = [i % len(stages) for i in indices]
        named = None if names is None else [stages.index(name) for name in names]
        if named is not None and indices is not None and named != indices:
            raise ValueError(f"out_features={names} and out_indices={indices} name different stages; give one of them")
        return named if indices is None else indices

    def decoder_config(self) -> "VitEmbedConfig":
        """The transformer that masked image modelling decodes with: a plain pre-norm one of the `decoder_` sizes."""
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        shared = ("hidden_act", "layer_norm_eps", "initializer_range", "initializer_factor", "image_size", "patch_size")
        return VitEmbedConfig(
            **{name: getattr(self, f"decoder_{name}") for name in names},
            **{name: getattr(self, name) for name in (*shared, "num_channels", "pad_to_patch")},
        )

    def vision_only(self) -> "VitEmbedConfig":
        """A copy without the text tower: what a vision-only class saves, so that no Auto class expects a tower."""
        config = copy.deepcopy(self)
        config.text_config = None
        return config

    def to_clip_vision_config(self) -> dict[str, Any] | None:
        """The `vision_config` dict of an equal transformers CLIPModel, or None where CLIPModel cannot express this."""
        own = {**self.__dict__, "final_norm_type": self.resolved_final_norm_type}
        square = isinstance(self.image_size, int) and isinstance(self.patch_size, int)
        if not square or any(own[name] != value for name, value in CLIP_ARCHITECTURE.items()):
            return None
        text = self.text_config
        if text is not None and any(getattr(text, name) != value for name, value in CLIP_TEXT_ARCHITECTURE.items()):
            return None
        return {name: getattr(self, name) for name in CLIP_VISION_FIELDS}

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, plus the complete auto_map and what `CLIPModel.from_pretrained` reads; stages by name."""
        output = super().to_dict()
        output["auto_map"] = dict(AUTO_MAP)
        if output.pop("out_indices", None) is not None:
            output["out_features"] = self.out_features  # a name says the same whatever maps the stem is told to give
        vision_config = self.to_clip_vision_config() if self.text_config is not None else None
        if vision_config is not None:
            output["vision_config"] = vision_config
        return output

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers; a CLIPConfig found there is translated."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return from_clip_config(config_dict), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "VitEmbedConfig":
        """As in transformers; a CLIPConfig dict is translated, and overrides are validated like any other value."""
        config_dict = from_clip_config(config_dict)
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in FIELDS}
        if isinstance(overrides.get("text_config"), dict):
            overrides["text_config"] = {**(config_dict.get("text_config") or {}), **overrides["text_config"]}
        if overrides.keys() & {"out_features", "out_indices"}:  # either takes the place of what was saved
            config_dict.pop("out_features", None)
            config_dict.pop("out_indices", None)
        config_dict.update(overrides)
        if isinstance(config_dict.get("text_config"), dict):
            config_dict["text_config"] = VitEmbedTextConfig.from_dict(config_dict["text_config"])
        return _from_file(super().from_dict, config_dict, FIELDS, cls.__name__, **kwargs)


def from_clip_config(config_dict: dict[str, Any]) -> dict[str, Any]:
    """The VitEmbedConfig dict of a transformers CLIPConfig or CLIPVisionConfig dict; any other dict, copied.

    Old checkpoints hold each tower twice, as `vision_config` and `vision_config_dict`; the latter wins, as in CLIP.
    """
    vision_defaults = {"patch_size": 32}  # the one default of CLIPVisionConfig that is not ViT-B/16
    if config_dict.get("model_type") == "clip_vision_model":
        result = {name: config_dict[name] for name in CLIP_VISION_FIELDS if name in config_dict}
        stock_classes = config_dict.get("architectures") or ()
        if ours := [CLIP_VISION_CLASSES[name] for name in stock_classes if name in CLIP_VISION_CLASSES]:
            result["architectures"] = ours
        return {**vision_defaults, **result}
    if config_dict.get("model_type") != "clip":
        return {name: value for name, value in config_dict.items() if name != "vision_config"}
    towers = {
        tower: {**(config_dict.get(tower) or {}), **(config_dict.get(f"{tower}_dict") or {})}
        for tower in ("vision_config", "text_config")
    }
    result = {name: value for name, value in towers["vision_config"].items() if name in CLIP_VISION_FIELDS}
    result = {**vision_defaults, **result}
    result["text_config"] = {name: value for name, value in towers["text_config"].items() if name in TEXT_FIELDS}
    shared = ("logit_scale_init_value", "initializer_factor", "id2label", "label2id", "dtype", "torch_dtype")
    result.update({name: config_dict[name] for name in shared if config_dict.get(name) is not None})
    result["projection_dim"] = config_dict.get("projection_dim", 512)
    return result


def _defaults(config_class: type) -> dict[str, Any]:
    """Every field with its default, as the constructor declares them."""
    parameters = inspect.signature(config_class.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


TEXT_FIELDS = tuple(_defaults(VitEmbedTextConfig))
DEFAULTS = _defaults(VitEmbedConfig)
FIELDS = tuple(DEFAULTS)

VitEmbedTextConfig.register_for_auto_class()
VitEmbedConfig.register_for_auto_class()
