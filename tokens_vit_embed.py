"""Which part of the image each token stands for, and the ways to have fewer tokens: dropping, sharing, merging.

Every token has a size: how many patches it stands for, 0 for padding. Attention adds log(size) to the scores of a key,
so a token of size s counts like s equal tokens and padding like none (proportional attention, arXiv:2210.09461 section
3); means are weighted by size; and a map from patches to tokens gives dense heads their grid back.

Symbols: B batch, N = gh * gw patches, P prefix tokens, n tokens behind them, L = P + n, D hidden size.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from .inputs_vit_embed import is_traced


class TokenLayout(NamedTuple):
    """What the n tokens behind the prefix stand for.

    grid_size: (gh, gw), or None for tokens that belong to no place.
    sizes: (B, n) float, patches of each token, 0 for padding; None where each stands for one.
    token_of_patch: (B, N) which of the n tokens stands for a patch, -1 for none; None where patch i is token i.
    """

    grid_size: tuple[int, int] | None
    sizes: torch.Tensor | None = None
    token_of_patch: torch.Tensor | None = None


class Tokens(NamedTuple):
    """Tokens on their way from the stem to a head.

    states: (B, n, D), or (B, P + n, D) once the prefix is before them.
    layout: what the n tokens stand for.
    feature_pyramid: maps (B, C_i, H_i, W_i) from fine to coarse, of a stem that has them.
    loss: scalar of the stem that training adds to the head's, or None.
    """

    states: torch.Tensor
    layout: TokenLayout
    feature_pyramid: tuple[torch.Tensor, ...] | None = None
    loss: torch.Tensor | None = None


class Packing(NamedTuple):
    """How the tokens of a padded batch (B, L, D) lie behind one another without the padding, as (1, T, D): those of
    equally long images side by side, so that each length is a batch of its own for attention.

    shape: (B, L). groups: (images, tokens of each), from short to long.
    places: (T,) where each token lies among the B * L. first: (B,) the number of each image's first token.
    bias: (T,) what to add to the scores of each key, None for sizes of 1.
    """

    shape: tuple[int, int]
    groups: list[tuple[int, int]]
    places: torch.Tensor
    first: torch.Tensor
    bias: torch.Tensor | None

    def pack(self, rows: torch.Tensor) -> torch.Tensor:
        """(B, L, D) -> (1, T, D)."""
        return rows.flatten(0, 1).index_select(0, self.places.to(rows.device))[None]

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """(1, T, D) -> (B, L, D), zeros in the padding; or of the first tokens alone, (1, B, D) -> (B, 1, D)."""
        (batch, length), width = self.shape, packed.shape[2]
        if packed.shape[1] == batch:
            return packed.new_zeros(batch, width).index_copy(0, self.images_of(packed), packed[0])[:, None]
        rows = packed.new_zeros(batch * length, width)
        return rows.index_copy(0, self.places.to(packed.device), packed[0]).view(batch, length, width)

    def images_of(self, packed: torch.Tensor) -> torch.Tensor:
        """The image of each token of (1, T, D), or of the first tokens alone, (1, B, D)."""
        places = self.places if packed.shape[1] == len(self.places) else self.places[self.first]
        return (places // self.shape[1]).to(packed.device)

    def split(self, states: torch.Tensor) -> list[torch.Tensor]:
        """(1, h, T, D / h), or of the first tokens alone (1, h, B, D / h) -> (images, h, tokens, D / h) a length."""
        is_first = states.shape[2] == self.shape[0]
        counts = [(images, 1 if is_first else tokens) for images, tokens in self.groups]
        parts = states[0].split([images * tokens for images, tokens in counts], dim=1)
        return [part.unflatten(1, count).transpose(0, 1) for part, count in zip(parts, counts)]


def packing_of(layout: TokenLayout, num_prefix_tokens: int, dtype: torch.dtype) -> Packing:
    """How the tokens behind this layout lie without padding. Reads how many each image has."""
    sizes = F.pad(layout.sizes, (num_prefix_tokens, 0), value=1.0)  # (B, L)
    lengths = (sizes > 0).sum(dim=1)
    lengths, order = lengths.sort(stable=True)
    image, token = (sizes[order] > 0).nonzero(as_tuple=True)
    places = order[image] * sizes.shape[1] + token
    of_token = sizes.flatten()[places]
    length, images = (each.tolist() for each in lengths.unique_consecutive(return_counts=True))
    bias = None if (of_token == 1).all() else of_token.log().to(dtype)
    return Packing(tuple(sizes.shape), list(zip(images, length)), places, lengths.cumsum(0) - lengths, bias)


class KeptPatches(NamedTuple):
    """Patches that go on when others are left out.

    mask: (B, N) bool. count: how many in each row, where all have as many; None where that is in the data.
    """

    mask: torch.Tensor
    count: int | None = None  # type: ignore[assignment]


def select_rows(hidden_states: torch.Tensor, rows: torch.Tensor | slice | None) -> torch.Tensor:
    """(B, L, D) and row numbers (B, R), or a slice of the rows -> (B, R, D); without them, all rows."""
    if rows is None:
        return hidden_states
    if isinstance(rows, slice):
        return hidden_states[:, rows]
    return hidden_states.gather(1, rows[:, :, None].expand(-1, -1, hidden_states.shape[-1]))


def key_bias(layout: TokenLayout, num_prefix_tokens: int, dtype: torch.dtype) -> torch.Tensor | None:
    """What to add to every score of a key, (B, 1, 1, L): log(size), the lowest number for padding; None for sizes of
    1."""
    if layout.sizes is None:
        return None
    bias = layout.sizes.float().log().clamp(min=torch.finfo(dtype).min).to(dtype)
    return F.pad(bias, (num_prefix_tokens, 0))[:, None, None]


def mean_of_patches(tokens: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """(B, n, D) -> (B, D), the mean over the patches that the tokens stand for."""
    if layout.sizes is None:
        return tokens.mean(dim=1)
    weights = layout.sizes / layout.sizes.sum(dim=1, keepdim=True)  # (B, n)
    return (weights.to(tokens.dtype)[:, None] @ tokens)[:, 0]


def token_of_each_patch(tokens: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """The token that stands for each patch: (B, n, D) -> (B, N, D), zeros for a patch that has none."""
    if layout.token_of_patch is None:
        return tokens
    patches = select_rows(tokens, layout.token_of_patch.clamp(min=0))
    return patches.masked_fill(layout.token_of_patch[:, :, None] < 0, 0)


def patch_grid(tokens: Tokens, num_prefix_tokens: int) -> torch.Tensor:
    """One token a patch of (B, P + n, D), as (B, gh, gw, D); zeros for a patch that has none."""
    patches = token_of_each_patch(tokens.states[:, num_prefix_tokens:], tokens.layout)  # (B, N, D)
    return patches.reshape(patches.shape[0], *tokens.layout.grid_size, patches.shape[2])


def feature_map(tokens: Tokens, num_prefix_tokens: int) -> torch.Tensor:
    """`patch_grid` with the channels first: (B, D, gh, gw)."""
    return patch_grid(tokens, num_prefix_tokens).permute(0, 3, 1, 2)


def token_sequence(tokens: Tokens, num_prefix_tokens: int) -> torch.Tensor:
    """Prefix tokens and one token for each patch, row by row: (B, P + gh * gw, D)."""
    patches = patch_grid(tokens, num_prefix_tokens).flatten(1, 2)
    return torch.cat([tokens.states[:, :num_prefix_tokens], patches], dim=1)


def keep_tokens(
    tokens: torch.Tensor,
    layout: TokenLayout,
    kept: KeptPatches,
    sizes: torch.Tensor | None = None,
    standing_for: torch.Tensor | None = None,
) -> tuple[torch.Tensor, TokenLayout]:
    """Keeps some patches' tokens, in order, and pads rows that keep fewer than others.

    Args:
        tokens: (B, N, D), one a patch.
        layout: of `tokens`; each stands for its patch.
        kept: which go on.
        sizes: (B, N), patches that each kept token stands for; None is 1.
        standing_for: (B, N) the patch whose token stands for each patch; None is the patch itself.

    Returns:
        (B, n, D) and what they stand for; n = `kept.count`, else the most that a row keeps, or N where a graph is
        recorded.
    """
    mask, count = kept
    number = torch.arange(mask.shape[1], device=mask.device)
    if count is None and is_traced():
        # No length may depend on the data: every token stays, and those left out have no size.
        sizes = mask.float() if sizes is None else sizes * mask
        of_patch = torch.where(mask, number, -1)
        return tokens, layout._replace(sizes=sizes, token_of_patch=of_patch if standing_for is None else standing_for)
    num_kept = mask.sum(dim=1, keepdim=True)  # (B, 1)
    length = int(num_kept.max()) if count is None else count
    slot = slots_of_kept(mask)
    order = numbers_in_order(mask, slot, length)  # (B, n)
    token_of_patch = torch.where(mask, slot, -1)
    if standing_for is not None:
        token_of_patch = token_of_patch.gather(1, standing_for)
    if sizes is None and count is None:
        sizes = torch.ones_like(mask, dtype=torch.float32)
    if sizes is not None:
        is_padding = torch.arange(length, device=tokens.device) >= num_kept
        sizes = sizes.gather(1, order).masked_fill(is_padding, 0)
    return select_rows(tokens, order), layout._replace(sizes=sizes, token_of_patch=token_of_patch)


def slots_of_kept(mask: torch.Tensor) -> torch.Tensor:
    """(B, N) bool -> (B, N), how many of a row are kept before each: the place of a kept one among the kept."""
    return mask.long().cumsum(dim=1) - 1


def numbers_in_order(mask: torch.Tensor, slot: torch.Tensor, length: int) -> torch.Tensor:
    """(B, N) bool and the slots of what is kept -> (B, length) numbers of what is kept, in order, then zeros. A
    scatter: no exporter takes the stable sort that would do the same."""
    number = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    order = torch.zeros(mask.shape[0], length + 1, dtype=torch.long, device=mask.device)
    # What is left out goes into one slot more, which is cut off.
    return order.scatter(1, torch.where(mask, slot, length), number)[:, :length]


def random_kept(batch: int, num_patches: int, rate: float, device: torch.device) -> KeptPatches:
    """Draws the patches that are kept when a share `rate` is dropped, as many in every row."""
    count = max(1, num_patches - int(num_patches * rate))
    chosen = torch.rand(batch, num_patches, device=device).argsort(dim=1)[:, :count]
    mask = torch.zeros(batch, num_patches, dtype=torch.bool, device=device)
    return KeptPatches(mask.scatter(1, chosen, torch.ones_like(chosen, dtype=torch.bool)), count)


class Merge(NamedTuple):
    """Which of n tokens merge into which.

    source: (B, r) tokens that go; target: (B, r) tokens they go into; kept: (B, n - r) tokens that stay, in order.
    place: (B, n) where each token is afterwards, among the n - r.
    """

    source: torch.Tensor
    target: torch.Tensor
    kept: torch.Tensor
    place: torch.Tensor


def match_tokens(metric: torch.Tensor, merge_size: int) -> Merge:
    """Bipartite soft matching: the `merge_size` tokens of even place that are most like one of odd place go into it.

    Args:
        metric: (B, n, d), compared by cosine; a layer's keys, averaged over its heads.
        merge_size: pairs to merge, at most n // 2.

    Source: arXiv:2210.09461 section 3 and appendix D. There the tokens are left out of order; here they stay in it.
    """
    metric = F.normalize(metric.float(), dim=-1)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)  # (B, even, odd)
    likeness, partner = scores.max(dim=-1)
    even = likeness.topk(merge_size, dim=1).indices  # (B, r)
    source, target = 2 * even, 2 * partner.gather(1, even) + 1
    is_source = torch.zeros_like(source, dtype=torch.bool)  # the tracer knows no scatter of a bool
    is_kept = torch.ones(metric.shape[:2], dtype=torch.bool, device=metric.device).scatter(1, source, is_source)
    slot = slots_of_kept(is_kept)
    kept = numbers_in_order(is_kept, slot, metric.shape[1] - merge_size)
    return Merge(source, target, kept, slot.scatter(1, source, slot.gather(1, target)))


def merge_tokens(tokens: torch.Tensor, layout: TokenLayout, merge: Merge) -> tuple[torch.Tensor, TokenLayout]:
    """Replaces each group of tokens that merge by its mean, weighted by size: (B, n, D) -> (B, n - r, D)."""
    sizes = layout.sizes
    if sizes is None:
        sizes = torch.ones(tokens.shape[:2], device=tokens.device)
    into = merge.place.gather(1, merge.source)  # (B, r)
    merged_sizes = sizes.gather(1, merge.kept).scatter_add(1, into, sizes.gather(1, merge.source))
    weighted = tokens * sizes[..., None].to(tokens.dtype)
    sums = select_rows(weighted, merge.kept).scatter_add(
        1, into[..., None].expand(-1, -1, tokens.shape[-1]), select_rows(weighted, merge.source)
    )
    of_patch = layout.token_of_patch
    of_patch = merge.place if of_patch is None else merge.place.gather(1, of_patch)
    merged = sums / merged_sizes[..., None].to(tokens.dtype)
    return merged, TokenLayout(layout.grid_size, merged_sizes, of_patch if layout.grid_size else None)
