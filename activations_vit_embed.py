"""Activations of the MLPs, by `hidden_act`."""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .inputs_vit_embed import is_traced

QUICK_GELU_SLOPE = 1.702


def quick_gelu(values: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(1.702 x) where no gradient is wanted, in the memory of the result."""
    return (QUICK_GELU_SLOPE * values).sigmoid_().mul_(values)


class _QuickGELU(torch.autograd.Function):
    """`quick_gelu` with gradients, for which the input alone is kept; plain operations keep the sigmoid as well.

    With z = 1.702 x the function is silu(z) / 1.702, so its slope is that of silu at z, which torch has as one
    operation: two passes over the gradient in place of six.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(values: torch.Tensor) -> torch.Tensor:
        return quick_gelu(values)

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        (values,) = ctx.saved_tensors
        scaled = QUICK_GELU_SLOPE * values
        if torch.is_grad_enabled():  # torch's operation has no derivative of its own
            sigmoid = torch.sigmoid(scaled)
            return gradient * sigmoid * (1 + scaled * (1 - sigmoid))
        return torch.ops.aten.silu_backward(gradient, scaled)

    jvp = backward


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), any shape: OpenAI CLIP's (arXiv:1606.08415 section 2).

    Differs from transformers' in memory and time alone, with the same bits in the result. Without gradients two tensors
    of the input's size are alive, not three; with gradients one less is kept. At 16 images of ViT-B/16 each is 19 to 39
    MB, which malloc takes from the system anew, page by page. In graphs it is the plain formula, which compilers join.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not hidden_states.requires_grad:
            return quick_gelu(hidden_states)
        if is_traced():
            return hidden_states * torch.sigmoid(QUICK_GELU_SLOPE * hidden_states)
        return _QuickGELU.apply(hidden_states)


def activation(name: str) -> nn.Module:
    """The activation that transformers knows by this name."""
    return QuickGELU() if name == "quick_gelu" else ACT2FN[name]
