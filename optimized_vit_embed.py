"""`model.optimized()`: a frozen copy of a model, prepared for inference.

What it changes lies inside attention and MLP; layers, norms, stems, poolings and heads are the model's own code:

- queries, keys and values are one product of the three weights joined (in the last layer two, as there the queries may
  be of the pooled rows alone);
- QuickGELU's 1.702 is in the weights, x * sigmoid(1.702 x) = silu(1.702 x) / 1.702, and silu is computed in place;
- layer scale is in the weights before it;
- on a CPU some weights lie the other way round in memory (`STORED_BY_INPUT`), with the same shape;
- on a CPU the MLP, and from `LARGE_PROJECTION` on attention, take about `ROWS_AT_ONCE` tokens at a time, so that what
  lies between their layers is small.

Not done, as it was measured and does not pay: layer norm's weights in the layer behind it (layer norm alone without
weights is slower in float32), the scale of attention in the queries (every kernel has it for nothing), positions and
patches in one product (0.2 % of a pass).

Symbols: B batch, L tokens, Q rows asked for, D hidden size, I intermediate size.
"""

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .activations_vit_embed import QUICK_GELU_SLOPE, QuickGELU
from .encoder_vit_embed import VitEmbedAttention, VitEmbedEncoder, VitEmbedLayer, VitEmbedMLP, is_watched
from .inputs_vit_embed import is_on_host, is_traced

# Tokens of an MLP at a time on a CPU. 512 cost more (a product packs its weight anew each time); all at once too, from
# two thousand on, where what lies between leaves the cache, and from 32 MiB on is new memory each time.
ROWS_AT_ONCE = 1024
# Bytes of queries, keys and values from which attention takes a few images or texts at a time on a CPU: a quarter less
# memory, 8 to 13 % less time for 8 to 16 k tokens of text, and 3 % to nothing for 64 images. Below, it cost up to 5 %.
LARGE_PROJECTION = 2**24
# Linear layers whose weight lies as (D_in, D_out) in the memory of a CPU, by dtype. With the 50 rows of one image at
# patch 32 that makes those products 1.2 to 1.35 times as fast, with 197 rows and more 1.0 to 1.1 times; the others lose
# by it (Xeon with AMX, torch 2.13).
STORED_BY_INPUT = {
    torch.float32: ("q_proj", "qkv_proj", "out_proj", "down_proj"),
    torch.bfloat16: ("q_proj", "qkv_proj", "out_proj"),
}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_hf_hook")


def joined_linear(
    layers: list[nn.Linear],
    factor: float = 1.0,
    bias_factor: float = 1.0,
    layer_scale: torch.Tensor | None = None,
) -> nn.Linear:
    """One linear layer in the place of several of one input, its outputs side by side.

    Args:
        layers: of (D_in, D_i); one without a bias has one of zeros where another has one.
        factor, bias_factor: what weights and biases are multiplied by, in float32 at least.
        layer_scale: what each output (sum of D_i,) is multiplied by, or None.
    """
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    dtype, exact = weights[0].dtype, torch.promote_types(weights[0].dtype, torch.float32)
    weight, bias = torch.cat(weights).to(exact) * factor, None
    if any(each is not None for each in biases):
        bias = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases)])
        bias = bias.to(exact) * bias_factor
    if layer_scale is not None:
        weight = weight * layer_scale.to(weight)[:, None]
        bias = None if bias is None else bias * layer_scale.to(bias)
    result = nn.Linear(*reversed(weight.shape), bias=bias is not None, device="meta")
    result.weight = nn.Parameter(weight.to(dtype))
    if bias is not None:
        result.bias = nn.Parameter(bias.to(dtype))
    return result


class OptimizedAttention(VitEmbedAttention):
    """VitEmbedAttention with its projections joined and layer scale in the last of them."""

    def __init__(self, attention: VitEmbedAttention, layer_scale: torch.Tensor | None, is_last: bool):
        nn.Module.__init__(self)
        self.config, self.is_causal = attention.config, attention.is_causal
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        in_projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.q_proj = joined_linear(in_projections[:1]) if is_last else None  # type: ignore[assignment]
        self.qkv_proj = joined_linear(in_projections[1:] if is_last else in_projections)
        self.out_proj = joined_linear([attention.out_proj], layer_scale=layer_scale)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        is_causal: bool = False,
        queries: torch.Tensor | None = None,
        output_attentions: bool = False,
        output_keys: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """As in VitEmbedAttention."""
        is_plain = attention_mask is None and queries is None and not (output_attentions or output_keys)
        count = self._num_parts(hidden_states) if is_plain and not is_traced() else 1
        if count == 1:
            return super().forward(hidden_states, attention_mask, is_causal, queries, output_attentions, output_keys)
        whole = super().forward
        parts = [whole(part, None, is_causal)[0] for part in hidden_states.tensor_split(count)]
        return torch.cat(parts), None, None

    def _num_parts(self, hidden_states: torch.Tensor) -> int:
        """How many parts the images or texts of states (B, L, D) are taken in."""
        batch, length, _ = hidden_states.shape
        nbytes = batch * length * self.qkv_proj.out_features * hidden_states.element_size()
        if nbytes < LARGE_PROJECTION or not is_on_host(hidden_states) or is_watched(self):
            return 1
        return max(1, min(batch, batch * length // ROWS_AT_ONCE))

    def projected(
        self, hidden_states: torch.Tensor, queries: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        joined = self.qkv_proj(hidden_states)
        if self.q_proj is not None:
            return self.q_proj(hidden_states if queries is None else queries), *joined.chunk(2, dim=-1)
        query, key, value = joined.chunk(3, dim=-1)
        return query if queries is None else self.qkv_proj(queries).chunk(3, dim=-1)[0], key, value


class OptimizedMLP(nn.Module):
    """VitEmbedMLP with QuickGELU's factor and layer scale in its weights."""

    def __init__(self, mlp: VitEmbedMLP, layer_scale: torch.Tensor | None):
        super().__init__()
        self.is_silu = isinstance(mlp.activation_fn, QuickGELU)
        self.activation_fn = None if self.is_silu else mlp.activation_fn
        slope = QUICK_GELU_SLOPE if self.is_silu else 1.0
        self.up_proj = joined_linear([mlp.fc1], slope, slope)
        self.down_proj = joined_linear([mlp.fc2], 1 / slope, layer_scale=layer_scale)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, L, D) -> the same."""
        if is_traced() or not is_on_host(hidden_states) or self.up_proj._forward_hooks:
            return self._of_rows(hidden_states)
        rows = hidden_states.flatten(0, -2)
        count = rows.shape[0] // ROWS_AT_ONCE
        if count < 2:
            return self._of_rows(hidden_states)
        return torch.cat([self._of_rows(part) for part in rows.tensor_split(count)]).view_as(hidden_states)

    def _of_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """(..., D) -> the same."""
        hidden = self.up_proj(rows)  # (..., I)
        if not self.is_silu:
            hidden = self.activation_fn(hidden)
        else:  # a hook may have kept what it saw
            hidden = F.silu(hidden, inplace=not self.up_proj._forward_hooks)
        return self.down_proj(hidden)


def optimize_layer(layer: VitEmbedLayer, is_last: bool, name: str) -> None:
    """Puts the modules above in the place of a layer's attention and MLP, and takes its layer scale out."""
    expected = {
        "self_attn": (VitEmbedAttention, ("q_proj", "k_proj", "v_proj", "out_proj")),
        "mlp": (VitEmbedMLP, ("activation_fn", "fc1", "fc2")),
    }
    for child, (kind, parts) in expected.items():
        check_replaceable(getattr(layer, child), kind, parts, f"{name}.{child}")
    layer.self_attn = OptimizedAttention(layer.self_attn, layer.layer_scale1, is_last)
    layer.mlp = OptimizedMLP(layer.mlp, layer.layer_scale2)  # type: ignore[assignment]
    layer.layer_scale1 = layer.layer_scale2 = None


def check_replaceable(module: nn.Module, kind: type, parts: tuple[str, ...], name: str) -> None:
    """Raises ValueError for a module that is not as the model makes it, so that leaving it out would lose something."""
    where = f"optimized() joins the weights of {name}"
    found = dict(module.named_children())
    if type(module) is not kind or set(found) != set(parts):
        raise ValueError(f"{where}, a {kind.__name__} of {list(parts)}; got a {type(module).__name__} of {list(found)}")
    for path, each in module.named_modules(prefix=name):
        if any(getattr(each, hooks, None) for hooks in HOOKS) or "forward" in vars(each):
            raise ValueError(
                f"{where}, but {path} has hooks, which would be lost; remove them, or register them on the copy"
            )
    for part, layer in found.items():
        if part == "activation_fn":
            continue
        if type(layer) is not nn.Linear:
            raise ValueError(
                f"{where}, but {name}.{part} is a {type(layer).__module__}.{type(layer).__name__}, not an nn.Linear; "
                "merge adapters into the weights (merge_and_unload), optimize before you quantise"
            )
        weight = layer.weight
        if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.is_meta:
            raise ValueError(
                f"{where}, but {name}.{part}.weight is a {type(weight).__name__} of {weight.dtype} on {weight.device}; "
                "expected an ordinary parameter with values: load the model without offload, sharding or quantisation"
            )


def lay_out(module: nn.Module) -> None:
    """Puts the weights of an OptimizedAttention or OptimizedMLP on a CPU into the order of `STORED_BY_INPUT`."""
    for name, layer in module.named_children():
        if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter:
            continue  # an activation, or a layer of a copy that was quantised
        weight = layer.weight
        if is_on_host(weight) and name in STORED_BY_INPUT.get(weight.dtype, ()):
            layer.weight = nn.Parameter(weight.detach().t().contiguous().t())


class OptimizedMixin:
    """Of a model: its copy for inference."""

    name_or_path: str
    config: Any
    modules: Callable[[], Iterator[nn.Module]]
    named_modules: Callable[..., Iterator[tuple[str, nn.Module]]]
    # Whether `optimized` has made this model.
    is_optimized = False

    def optimized(self, dtype: torch.dtype | None = None):
        """A frozen copy for inference: the same class, calls and outputs, in less time and memory; the model stays as
        it is and shares nothing with the copy.

        Outputs differ by the rounding of sums and weights in another order; hidden states and attentions are there on
        request as in the model. The copy has other weights than the model: `save_pretrained` refuses it, its
        `state_dict` loads into copies alone. It is in eval mode for good, and no weight of it wants a gradient.
        Gradients to its inputs flow.

        Args:
            dtype: of the copy's weights; None for the model's. The factors are joined into the weights before they are
                rounded to it, so `float32_model.optimized(torch.bfloat16)` is closer to the float32 model than
                `float32_model.bfloat16().optimized()`.

        Raises:
            ValueError: attention or MLP of a layer are not as the model makes them (adapters that are not merged,
                quantised, offloaded or sharded weights, hooks), or dtype is no float dtype.
        """
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype must be a torch.dtype of floats, as torch.bfloat16, or None, got {dtype!r}")
        copied: Any = copy.deepcopy(self)
        copied.disable_input_require_grads()
        for name, encoder in copied.named_modules():
            if copied.is_optimized or not isinstance(encoder, VitEmbedEncoder):
                continue
            with torch.no_grad():
                for number, layer in enumerate(encoder.layers):
                    is_last = number == len(encoder.layers) - 1
                    optimize_layer(layer, is_last, f"{name}.layers.{number}")
        copied.to(dtype)
        for module in copied.modules():
            if isinstance(module, OptimizedMixin):
                module.is_optimized = True
            if isinstance(module, (OptimizedAttention, OptimizedMLP)):
                lay_out(module)
        return copied.eval().requires_grad_(False)

    def train(self, mode: bool = True):
        """As in torch.

        Raises:
            ValueError: training mode of a copy that `optimized` has made.
        """
        if mode and self.is_optimized:
            raise ValueError(
                f"this {type(self).__name__} is a copy for inference that optimized() made; train the model that it "
                "was made of and make a new copy"
            )
        return super().train(mode)  # type: ignore[misc]

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        self._check_is_original("save_pretrained")
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def push_to_hub(self, *args, **kwargs):
        self._check_is_original("push_to_hub")
        return super().push_to_hub(*args, **kwargs)  # type: ignore[misc]

    def _check_is_original(self, what: str) -> None:
        if self.is_optimized:
            source = f", of {self.name_or_path!r}," if self.name_or_path else ""
            raise ValueError(
                f"{what} needs the model itself, but this {type(self).__name__} is a copy that optimized() made"
                f"{source} whose weights are laid out for inference alone; save the model that it was made of, and "
                f"call {type(self).__name__}.from_pretrained(folder).optimized() where the copy is wanted"
            )
