"""In which of its forms open_clip stores a model."""

from typing import NamedTuple

from vit_embed.conversion.layouts.layout import StateDict


class Form(NamedTuple):
    """In which of its forms open_clip stores a model.

    text: what stands before the names of the text tower, "" in CLIP and "text." in CustomTextCLIP.
    siglip: whether the image tower is timm's, below "visual.trunk.".
    linear_projection: whether the text projection is a linear layer with a bias, or CLIP's matrix.
    scale_axes: axes of logit_scale, 0 or 1.
    """

    text: str
    siglip: bool
    linear_projection: bool
    scale_axes: int


def find_form(state_dict: StateDict) -> Form:
    text = "text." if "text.token_embedding.weight" in state_dict else ""
    scale = state_dict.get("logit_scale")
    return Form(
        text,
        siglip="visual.trunk.patch_embed.proj.weight" in state_dict,
        linear_projection=f"{text}text_projection.weight" in state_dict,
        scale_axes=0 if scale is None else min(scale.dim(), 1),
    )
