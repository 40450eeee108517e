"""What the names of timm's vision transformers stand for: what their weights do not show (read at timm 1.0.31).

Held by a test against each of timm's own models.
"""

import re
from typing import NamedTuple

DEFAULT_EPS, CLIP_EPS = 1e-6, 1e-5  # of timm's norms, and of its CLIP towers


class Architecture(NamedTuple):
    """What a name says of a model and its weights do not; for models of its width."""

    width: int
    num_heads: int
    hidden_act: str
    norm_type: str
    eps: float


# size in a name: width, heads
MODEL_SIZES = {
    "tiny": (192, 3),
    "xsmall": (256, 4),
    "wee": (256, 4),
    "little": (320, 5),
    "small": (384, 6),
    "medium": (512, 8),
    "mediumd": (512, 8),
    "betwixt": (640, 10),
    "base": (768, 12),
    "so150m2": (832, 13),
    "so150m": (896, 14),
    "large": (1024, 16),
    "intern300m": (1024, 16),
    "so400m": (1152, 16),
    "huge": (1280, 16),
    "giant": (1408, 16),
    "giantopt": (1536, 16),
    "gigantic": (1664, 16),
}
# Full names whose size differs from what their size word says.
OTHER_MODEL_SIZES = {
    r"vit_base_patch16_gap_224": (768, 16),
    r"vit_base_patch\d+_plus_.*": (896, 14),
    r"vit_giant_.*_(dinov2|tipsv2|radio_v3)": (1536, 24),
    r"test_vit2?": (64, 2),
    r"test_vit[34]": (96, 3),
}
NAME = re.compile(
    r"(?:(?:vit|deit|deit3|flexivit)_(?P<size>[a-z0-9]+)|eva_(?P<eva_size>large)|test_vit[234]?)"
    r"(?:_(?:patch\d+|\d+|36x1|clip|dinov2|distilled|gap|map|miil|plus|quickgelu|radio_v[34]|reg\d|siglip|tipsv2))*"
)
# SigLIP's towers that timm runs with the approximation by tanh; the others of them have the exact GELU.
TANH_NAMES = re.compile(
    r"vit_(base_patch32|giantopt_patch16|so400m_patch16)_siglip(_gap)?_\d+|vit_large_patch16_siglip(_gap)?_512"
)
RMS_NORM_NAMES = ("test_vit4",)
# Their attention pooling reads the prefix tokens too.
PREFIX_POOLED_NAMES = ("test_vit3",)
# Their position tables have no rows for the prefix tokens; of the others that have such tokens they have.
NO_EMBED_CLASS_NAMES = re.compile(r"(deit3|flexivit)_.*|vit_(?!so150m).*_(reg\d|radio_v\d)(_.*)?")
# Architectures with the keys of a plain vision transformer that compute something else, by a part of their names.
FOREIGN_NAMES = {
    "rpn": "norms after each branch",
    "rope": "rotary positions",
    "dinov3": "rotary positions",
    "pe": "rotary positions",
    "lingbot": "rotary positions",
    "sapiens2": "rotary positions",
}


def find_architecture(name: str | None) -> Architecture | None:
    """What the name of one of timm's plain vision transformers stands for; None for any other name."""
    found = NAME.fullmatch(name or "")
    if found is None:
        return None
    size = MODEL_SIZES.get(found["size"] or found["eva_size"])
    for pattern, other in OTHER_MODEL_SIZES.items():
        if re.fullmatch(pattern, name):
            size = other
    if size is None:
        return None
    hidden_act = "gelu_pytorch_tanh" if TANH_NAMES.fullmatch(name) else "gelu"
    return Architecture(
        *size,
        hidden_act="quick_gelu" if "_quickgelu_" in name else hidden_act,
        norm_type="rms_norm" if name in RMS_NORM_NAMES else "layer_norm",
        eps=CLIP_EPS if is_clip(name) else DEFAULT_EPS,
    )


def no_embed_class(name: str | None) -> bool | None:
    """Whether a name is of a model whose position table leaves out the prefix tokens; None for a name unknown."""
    return None if find_architecture(name) is None else NO_EMBED_CLASS_NAMES.fullmatch(name) is not None


def is_clip(name: str | None) -> bool:
    """Whether a name is of a CLIP's image tower, whose `head` is the image projection where its bias is zero."""
    return name is not None and "_clip_" in name
