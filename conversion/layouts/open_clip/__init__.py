"""Layout "open_clip": CLIP, CustomTextCLIP and SigLIP of open_clip_torch (read at 3.3.0), with vision transformers.

What its weights do not show (heads, activation, epsilon, pooling, masks) comes from open_clip_config.json beside them,
with open_clip's own defaults for what that leaves out.
"""

from vit_embed.conversion.layouts.layout import Layout
from vit_embed.conversion.layouts.open_clip.image_processor import image_processor, restored_processor
from vit_embed.conversion.layouts.open_clip.reference import reference
from vit_embed.conversion.layouts.open_clip.weights import convert, detect, restore

LAYOUT = Layout(
    "open_clip",
    detect,
    convert,
    reference,
    "open_clip's own code",
    options=(
        *("hidden_act", "num_attention_heads", "text_num_attention_heads", "layer_norm_eps", "pooling_type"),
        "image_size",
    ),
    image_processor=image_processor,
    sees_as_clip=True,
    restore=restore,
    restored_processor=restored_processor,
)
