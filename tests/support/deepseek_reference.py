"""The CLIP half of DeepSeek-OCR as its public description has it, to compare with: names and order of computation of
deepencoder/clip_sdpa.py (github.com/deepseek-ai/DeepSeek-OCR), any sizes, written anew."""

import math

import torch
from tiny import randomised
from torch import nn
from torch.nn import functional as F

WIDTH, LAYERS, HEADS, MLP, PATCH, IMAGE = 32, 3, 4, 48, 8, 32


class Embeddings(nn.Module):
    def __init__(self, width: int, patch: int, image: int):
        super().__init__()
        count = (image // patch) ** 2 + 1
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(count, width)
        self.register_buffer("position_ids", torch.arange(count)[None])

    def forward(self, pixel_values: torch.Tensor, patch_embeds: torch.Tensor | None) -> torch.Tensor:
        patches = self.patch_embedding(pixel_values) if patch_embeds is None else patch_embeds
        patches = patches.flatten(2).mT
        tokens = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], dim=1)
        return tokens + self.positions(tokens.shape[1])

    def positions(self, length: int) -> torch.Tensor:
        table = self.position_embedding(self.position_ids)[0]
        native, wanted = math.isqrt(len(table) - 1), math.isqrt(length)  # root of all tokens, rounded down
        if native == wanted:
            return table
        grid = table[1:].float().T.reshape(1, -1, native, native)
        grid = F.interpolate(grid, size=(wanted, wanted), mode="bicubic", antialias=True, align_corners=False)
        return torch.cat([table[:1], grid.to(table.dtype).flatten(2)[0].T])


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        stacked = self.qkv_proj(tokens).unflatten(-1, (3, self.heads, -1))  # (B, L, 3, h, D / h)
        query, key, value = stacked.permute(2, 0, 3, 1, 4)
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        return self.out_proj((scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.fc1(tokens)
        return self.fc2(hidden * torch.sigmoid(1.702 * hidden))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width, eps=1e-5)
        self.self_attn = Attention(width, heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = FeedForward(width, hidden)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens + self.self_attn(self.layer_norm1(tokens))
        return tokens + self.mlp(self.layer_norm2(tokens))


class Transformer(nn.Module):
    def __init__(self, layers: list[Layer]):
        super().__init__()
        self.layers = nn.ModuleList(layers)


class DeepSeekClip(nn.Module):
    def __init__(self, width=WIDTH, layers=LAYERS, heads=HEADS, hidden=MLP, patch=PATCH, image=IMAGE):
        super().__init__()
        self.embeddings = Embeddings(width, patch, image)
        self.pre_layrnorm = nn.LayerNorm(width, eps=1e-5)
        self.transformer = Transformer([Layer(width, heads, hidden) for _ in range(layers)])

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor, patch_embeds: torch.Tensor | None = None) -> list[torch.Tensor]:
        """The input of the first layer and the output of each; the last one is the source's output."""
        states = [self.pre_layrnorm(self.embeddings(pixel_values, patch_embeds))]
        for layer in self.transformer.layers:
            states.append(layer(states[-1]))
        return states


def deepseek_clip(**sizes) -> DeepSeekClip:
    return randomised(DeepSeekClip(**sizes))


def whole_model(clip: DeepSeekClip) -> dict[str, torch.Tensor]:
    """The state dict of the published model, a tensor of each kind: the CLIP half has no `position_ids` there."""
    half = {f"model.vision_model.{key}": tensor for key, tensor in clip.state_dict().items() if "_ids" not in key}
    others = (
        "sam_model.pos_embed",
        "sam_model.patch_embed.proj.weight",
        "sam_model.blocks.0.attn.rel_pos_h",
        "sam_model.blocks.11.mlp.lin1.bias",
        "sam_model.neck.1.weight",
        "sam_model.net_3.weight",
        "projector.layers.weight",
        "image_newline",
        "view_seperator",
        "embed_tokens.weight",
        "layers.0.self_attn.q_proj.weight",
        "layers.1.mlp.experts.63.down_proj.weight",
        "layers.1.mlp.shared_experts.up_proj.weight",
        "layers.11.post_attention_layernorm.weight",
        "norm.weight",
    )
    return half | {f"model.{name}": torch.ones(2) for name in others} | {"lm_head.weight": torch.ones(2)}


def whole_config(**changes) -> dict:
    """What the published model's config says of the CLIP half, in these sizes."""
    clip = {"heads": HEADS, "image_size": IMAGE, "layers": LAYERS, "patch_size": PATCH, "width": WIDTH, **changes}
    return {
        "model_type": "deepseek_vl_v2",
        "vision_config": {"image_size": 1024, "width": {"clip-l-14-224": clip, "sam_vit_b": {"heads": 12}}},
    }
