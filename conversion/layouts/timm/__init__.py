"""Layout "timm": the vision transformers of timm (timm.models.vision_transformer and deit, read at 1.0.31).

What its weights do not show (heads, activation, epsilon, pooling) comes from the config.json that timm saves beside
them: from its model_args, or else from what the architecture's name stands for in timm.
"""

from vit_embed.conversion.layouts.layout import Layout
from vit_embed.conversion.layouts.timm.config_file import image_processor
from vit_embed.conversion.layouts.timm.reference import reference
from vit_embed.conversion.layouts.timm.weights import convert, detect, restore

LAYOUT = Layout(
    "timm",
    detect,
    convert,
    reference,
    "timm's own class",
    options=("num_attention_heads", "hidden_act", "layer_norm_eps", "pooling_type", "image_size"),
    image_processor=image_processor,
    restore=restore,
    can_pad=True,
)
