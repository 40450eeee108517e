"""Vision transformers on torch.nn.TransformerEncoderLayer, of two published descriptions: written anew, any sizes; and
their way to ours and back."""

import torch
from conversions import built, converter
from tiny import randomised
from torch import nn
from torch.nn import functional as F

from vit_embed.conversion.layouts import LAYOUTS
from vit_embed.conversion.layouts.layout import ConversionOptions

SIZES = {"image": 32, "patch": 8, "width": 32, "layers": 3, "heads": 4, "hidden": 48}


def layer(width: int, heads: int, hidden: int, **options) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(width, heads, hidden, dropout=0.1, batch_first=True, **options)


@torch.no_grad()
def states(patches: torch.Tensor, class_token: torch.Tensor, positions: torch.Tensor, layers) -> list[torch.Tensor]:
    """The input of the first layer and the output of each, of a map of patches (B, D, gh, gw)."""
    tokens = torch.cat([class_token.expand(len(patches), 1, -1), patches.flatten(2).mT], dim=1) + positions
    states = [tokens]
    for each in layers:
        states.append(each(states[-1]))
    return states


class ViTTiny(nn.Module):
    """muOmni's encoder: pre-norm, exact GELU, a final RMSNorm.

    Its own names and eps, from omni/vision_encoder.py and omni/utils.py of github.com/prskid1000/micro-Omni.
    """

    def __init__(self, image: int, patch: int, width: int, layers: int, heads: int, hidden: int, eps: float = 1e-5):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.pos = nn.Parameter(torch.zeros(1, (image // patch) ** 2 + 1, width))
        options = {"activation": "gelu", "norm_first": True, "layer_norm_eps": eps}
        self.blocks = nn.ModuleList([layer(width, heads, hidden, **options) for _ in range(layers)])
        self.norm = nn.RMSNorm(width, eps=eps)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Class token (B, 1, D) and grid (B, N, D)."""
        tokens = self.norm(states(self.proj(pixel_values), self.cls, self.pos, self.blocks)[-1])
        return tokens[:, :1], tokens[:, 1:]


class MiniViT(nn.Module):
    """Post-norm, ReLU; a LayerNorm and a linear map on the class token, with a number of classes."""

    def __init__(self, image: int, patch: int, width: int, layers: int, heads: int, hidden: int, classes: int = 5):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image // patch) ** 2 + 1, width))
        # A nested tensor has a use with padding only, of which there is none.
        self.encoder = nn.TransformerEncoder(layer(width, heads, hidden), layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    @torch.no_grad()
    def tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 1 + N, D) behind the last layer."""
        return states(self.patch_embed(pixel_values), self.cls_token, self.pos_embed, self.encoder.layers)[-1]

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, classes)."""
        return self.head(self.norm(self.tokens(pixel_values)[:, 0]))


class MiniViTDepth(MiniViT):
    """The same trunk without that head: the patches' tokens as a map, scaled up twice, one number a pixel."""

    def __init__(self, kernel: int = 2, **sizes):
        super().__init__(**sizes)
        del self.norm, self.head
        width, doubling = sizes["width"], {"kernel_size": kernel, "stride": 2, "padding": (kernel - 2) // 2}
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(width, width // 2, **doubling),
            nn.ReLU(),
            nn.ConvTranspose2d(width // 2, width // 4, **doubling),
            nn.ReLU(),
            nn.Conv2d(width // 4, 1, kernel_size=1),
        )

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, H, W), any number."""
        rows = pixel_values.shape[2] // self.patch_embed.stride[0]
        tokens = self.tokens(pixel_values)[:, 1:]
        maps = tokens.mT.unflatten(2, (rows, -1))
        return F.interpolate(self.decoder(maps), size=pixel_values.shape[2:], mode="bilinear")[:, 0]


def small(model_class: type[nn.Module], **options) -> nn.Module:
    return randomised(model_class(**{**SIZES, **options}))


PRE = ConversionOptions(num_attention_heads=4, norm_position="pre", hidden_act="gelu", layer_norm_eps=1e-5)
POST = ConversionOptions(num_attention_heads=4, norm_position="post", hidden_act="relu")
# Of the largest value: two orders of float32 sums over three layers, measured 9e-7.
CLOSE = {"rtol": 0, "atol": 1e-5}
OPTIONS = {ViTTiny: PRE, MiniViT: POST, MiniViTDepth: POST}


def from_torch(state_dict: dict, options: ConversionOptions):
    return converter("torch_encoder")(state_dict, {}, options)


def converted(state_dict: dict, options: ConversionOptions) -> nn.Module:
    return built(*from_torch(state_dict, options))


def restored(model) -> dict[str, torch.Tensor]:
    model.config.architectures = [type(model).__name__]
    prefix = "vision_model." if type(model).__name__ == "VitEmbedModel" else ""
    weights = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    return LAYOUTS["torch_encoder"].restore(model.config, weights).state_dict


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got / expected.abs().max(), expected / expected.abs().max(), **CLOSE)


def assert_bit_equal(got: dict, expected: dict) -> None:
    assert set(got) == set(expected)
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def renamed(state_dict: dict, names: dict[str, str]) -> dict:
    """A state dict with other names for some of its modules."""
    result = {}
    for key, tensor in state_dict.items():
        old = next((name for name in names if key == name or key.startswith(f"{name}.")), "")
        result[names.get(old, "") + key.removeprefix(old)] = tensor
    return result


def without_class_token(source: nn.Module) -> dict:
    state_dict = {key: tensor for key, tensor in source.state_dict().items() if key != "cls_token"}
    return state_dict | {"pos_embed": state_dict["pos_embed"][:, 1:].contiguous()}
