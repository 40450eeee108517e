"""The CLIP half of DeepSeek-OCR as its public description has it, to compare with: transformers' CLIP layers, by the
names and with the positions of deepencoder/clip_sdpa.py (github.com/deepseek-ai/DeepSeek-OCR)."""

import math

import torch
from tiny import randomised
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

WIDTH, LAYERS, HEADS, MLP, PATCH, IMAGE = 32, 3, 4, 48, 8, 32


class DeepSeekClip(nn.Module):
    """CLIP's image tower without the norm behind it."""

    def __init__(self, width=WIDTH, layers=LAYERS, heads=HEADS, hidden=MLP, patch=PATCH, image=IMAGE):
        super().__init__()
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": hidden}
        config = CLIPVisionConfig(**sizes, num_attention_heads=heads, patch_size=patch, image_size=image)
        model = CLIPVisionModel(config)
        self.tower = getattr(model, "vision_model", model)  # the trunk itself since transformers 5

    @property
    def layers(self) -> nn.ModuleList:
        return self.tower.encoder.layers

    def weights(self) -> dict[str, torch.Tensor]:
        """By DeepSeek-OCR's names: query, key and value are one matrix."""
        stock = {key: each for key, each in self.tower.state_dict().items() if not key.startswith("post_layernorm")}
        result = {key.replace("encoder.", "transformer."): tensor for key, tensor in stock.items()}
        for key in [key for key in result if ".q_proj." in key]:
            parts = [result.pop(key.replace("q_proj", f"{part}_proj")) for part in "qkv"]
            result[key.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        return {**result, "embeddings.position_ids": self.tower.embeddings.position_ids}

    def positions(self, length: int) -> torch.Tensor:
        table = self.tower.embeddings.position_embedding.weight
        native, wanted = math.isqrt(len(table) - 1), math.isqrt(length)  # root of all tokens, rounded down
        if native == wanted:
            return table
        grid = table[1:].T.reshape(1, -1, native, native)
        grid = F.interpolate(grid, size=(wanted, wanted), mode="bicubic", antialias=True, align_corners=False)
        return torch.cat([table[:1], grid.flatten(2)[0].T])

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor, patch_embeds: torch.Tensor | None = None) -> list[torch.Tensor]:
        """The input of the first layer and the output of each; the last one is the source's output."""
        embeddings = self.tower.embeddings
        patches = embeddings.patch_embedding(pixel_values) if patch_embeds is None else patch_embeds
        patches = patches.flatten(2).mT
        tokens = torch.cat([embeddings.class_embedding.expand(len(patches), 1, -1), patches], dim=1)
        states = [self.tower.pre_layrnorm(tokens + self.positions(tokens.shape[1]))]
        for layer in self.layers:
            output = layer(states[-1], attention_mask=None, causal_attention_mask=None)
            states.append(output[0] if isinstance(output, tuple) else output)
        return states


def deepseek_clip(**sizes) -> DeepSeekClip:
    return randomised(DeepSeekClip(**sizes))


def whole_model(clip: DeepSeekClip) -> dict[str, torch.Tensor]:
    """The state dict of the published model, a tensor of each kind: the CLIP half has no `position_ids` there."""
    half = {f"model.vision_model.{key}": each for key, each in clip.weights().items() if "_ids" not in key}
    others = (
        *("sam_model.pos_embed", "sam_model.patch_embed.proj.weight", "sam_model.blocks.0.attn.rel_pos_h"),
        *("sam_model.blocks.11.mlp.lin1.bias", "sam_model.neck.1.weight", "sam_model.net_3.weight"),
        *("projector.layers.weight", "image_newline", "view_seperator", "embed_tokens.weight"),
        *("layers.0.self_attn.q_proj.weight", "layers.1.mlp.experts.63.down_proj.weight"),
        *("layers.1.mlp.shared_experts.up_proj.weight", "layers.11.post_attention_layernorm.weight", "norm.weight"),
    )
    return half | {f"model.{name}": torch.ones(2) for name in others} | {"lm_head.weight": torch.ones(2)}


def whole_config(**changes) -> dict:
    """What the published model's config says of the CLIP half, in these sizes."""
    clip = {"heads": HEADS, "image_size": IMAGE, "layers": LAYERS, "patch_size": PATCH, "width": WIDTH, **changes}
    return {
        "model_type": "deepseek_vl_v2",
        "vision_config": {"image_size": 1024, "width": {"clip-l-14-224": clip, "sam_vit_b": {"heads": 12}}},
    }
