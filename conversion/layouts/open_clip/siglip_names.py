"""The image towers of SigLIP that open_clip takes from timm by name."""

import re

from vit_embed import VitEmbedConfig
from vit_embed.conversion.layouts.timm.names import find_architecture

# timm's SigLIP towers that open_clip's configs name. timm's own name of one says its heads, activation and eps.
SIGLIP_NAME = re.compile(r"vit_(?P<family>base|large|so400m|giantopt)_patch(?P<patch>\d+)_siglip_(?P<size>\d+)")
SIGLIP_NAMES = (
    "vit_base_patch32_siglip_256",
    *(f"vit_base_patch16_siglip_{size}" for size in (224, 256, 384, 512)),
    *(f"vit_large_patch16_siglip_{size}" for size in (256, 384, 512)),
    *(f"vit_so400m_patch14_siglip_{size}" for size in (224, 378, 384)),
    *(f"vit_so400m_patch16_siglip_{size}" for size in (256, 384, 512)),
    *(f"vit_giantopt_patch16_siglip_{size}" for size in (256, 384)),
)
# Layers and MLP width of each family.
SIGLIP_DEPTHS = {"base": (12, 3072), "large": (24, 4096), "so400m": (27, 4304), "giantopt": (40, 6144)}

# Fields of an image tower that its name alone says, and those that weights show.
UNSEEN_FIELDS = ("num_attention_heads", "hidden_act", "layer_norm_eps", "patch_size", "image_size")
SIZE_FIELDS = ("hidden_size", "num_hidden_layers", "intermediate_size")


def named_sizes(name: str) -> tuple[int, int, int, int]:
    """Layers, width and patch of one of SIGLIP_NAMES."""
    parts = SIGLIP_NAME.fullmatch(name)
    return SIGLIP_DEPTHS[parts["family"]][0], find_architecture(name).width, *[int(parts["patch"])] * 2


def fitting_name(config: VitEmbedConfig) -> str:
    """timm's name of an image tower of SigLIP: the one that it came from, else the one of its sizes."""
    origin = (config.converted_from or {}).get("timm_model_name")
    fitting = []
    for name in SIGLIP_NAMES:
        named, parts = find_architecture(name), SIGLIP_NAME.fullmatch(name)
        patch, family = int(parts["patch"]), parts["family"]
        side = int(parts["size"]) // patch * patch
        unseen = (named.num_heads, named.hidden_act, named.eps, patch, side)
        sizes = (named.width, *SIGLIP_DEPTHS[family])
        if unseen != tuple(getattr(config, field) for field in UNSEEN_FIELDS):
            continue
        if name == origin:
            return name
        if sizes == tuple(getattr(config, field) for field in SIZE_FIELDS):
            fitting.append(name)
    if not fitting:
        found = ", ".join(f"{field}={getattr(config, field)!r}" for field in (*UNSEEN_FIELDS, *SIZE_FIELDS))
        raise ValueError(
            f"open_clip has SigLIP's image towers in sizes that timm has names for, and none for this model's: {found}"
        )
    return fitting[0]
