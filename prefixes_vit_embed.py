"""What texts of one batch begin with in common, computed once.

Under a causal mask the state of a token depends on itself and the tokens before it alone. So a batch of texts is a
tree: a node is a token after one certain beginning, and every text ends at a node. The nodes are computed as one long
row, (1, N, D), in which a token sees its ancestors: exact, as only the order of sums changes.

Nodes are numbered depth first. Those below a node are then the numbers that follow it, and all that a block of
consecutive nodes can see lies in the block or above its first node: attention runs a block at a time, without padding.

Symbols: B texts, U different ones, T tokens of the longest, N nodes, M nodes that ask, G blocks, Q queries and K keys
of a block, D hidden size, h heads.
"""

from typing import NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_vit_embed import VitEmbedTextConfig
from .inputs_vit_embed import is_on_host, is_traced

# Q: fewer make products too small for the processor, more have too many scores that are masked.
QUERIES_OF_A_BLOCK = 32
# Where the tree is the faster way by itself: it costs what about 20 tokens do, and a few percent of each node.
LEAST_SAVED, MOST_NODES = 32, 0.92  # tokens of the trimmed batch, and the share of them that are nodes


class PrefixBlocks(NamedTuple):
    """Which nodes ask which.

    num_queries: M. keys: (G, K) numbers of nodes. bias: (G, 1, Q, K) float32 to add to the scores, 0 for ancestors and
    the node itself, -inf elsewhere.
    """

    num_queries: int
    keys: torch.Tensor
    bias: torch.Tensor

    def gathered(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(1, h, M or N, D / h) each -> (G, h, Q or K, D / h) each, and the mask for them, of the queries' dtype."""
        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # (M or N, h, D / h)
        num_blocks, _, num_rows, _ = self.bias.shape
        query = F.pad(query, (0, 0, 0, 0, 0, num_blocks * num_rows - self.num_queries))
        query = query.unflatten(0, (num_blocks, num_rows))
        key, value = (each.index_select(0, self.keys.flatten()).unflatten(0, self.keys.shape) for each in (key, value))
        return *(states.transpose(1, 2) for states in (query, key, value)), self.bias.to(query.dtype)

    def joined(self, mixed: torch.Tensor) -> torch.Tensor:
        """(G, Q, h, D / h) -> (1, M, h, D / h)."""
        return mixed.flatten(0, 1)[None, : self.num_queries]

    def to(self, device: torch.device) -> "PrefixBlocks":
        return PrefixBlocks(self.num_queries, self.keys.to(device), self.bias.to(device))


class PrefixTree(NamedTuple):
    """A batch of texts.

    input_ids, position_ids: (1, N). ends: (1, U), the node that each different text is read at. text_of_row: (B,),
    which of these texts a row is. blocks, blocks_of_ends: what all nodes and what the ends see.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    ends: torch.Tensor
    text_of_row: torch.Tensor
    blocks: PrefixBlocks
    blocks_of_ends: PrefixBlocks

    def to(self, device: torch.device) -> "PrefixTree":
        return PrefixTree(*(each.to(device) for each in self))


class SortedTexts(NamedTuple):
    """The different texts of a batch in the order of their ids, so that what begins alike stands together.

    input_ids: (U, T), -1 after the end. num_shared: (U,), how many tokens each has in common with the one before.
    lengths: (U,). text_of_row: (B,), which of them each row of the batch is.
    """

    input_ids: torch.Tensor
    num_shared: torch.Tensor
    lengths: torch.Tensor
    text_of_row: torch.Tensor

    @classmethod
    def of(cls, input_ids: torch.Tensor, pooled: torch.Tensor) -> "SortedTexts":
        """(B, T) ids, and the index of the token that each row is read at (B,), after which nothing counts."""
        input_ids = input_ids[:, : int(pooled.max()) + 1]
        behind = torch.arange(input_ids.shape[1]) > pooled[:, None]
        rows, text_of_row = input_ids.masked_fill(behind, -1).unique(dim=0, return_inverse=True)
        num_shared = F.pad((rows[1:] == rows[:-1]).long().cumprod(1).sum(1), (1, 0))
        return cls(rows, num_shared, (rows >= 0).sum(1), text_of_row)

    @property
    def num_nodes(self) -> int:
        """N."""
        return int((self.lengths - self.num_shared).sum())

    def tree(self) -> PrefixTree:
        """The tree of all of them."""
        num_texts, longest = self.input_ids.shape
        text, place = torch.arange(num_texts), torch.arange(longest)
        num_own = self.lengths - self.num_shared  # (U,) nodes of a text that no earlier one has
        after = num_own.cumsum(0)
        first = after - num_own
        is_own = (place >= self.num_shared[:, None]) & (place < self.lengths[:, None])  # (U, T)
        # The text whose own node a token is: the last one so far that had not as much in common with its predecessor.
        owner = torch.where(place >= self.num_shared[:, None], text[:, None], -1).cummax(0).values
        node = first[owner] + place - self.num_shared[owner]  # (U, T)
        # The first node that is not below a token: that of the next text which has less in common with this one.
        is_left = place >= self.num_shared[1:, None]
        leaves = torch.where(is_left, text[1:, None], num_texts).flip(0).cummin(0).values.flip(0)
        leaves = F.pad(leaves, (0, 0, 0, 1), value=num_texts)  # (U, T)
        below = F.pad(first, (0, 1), value=int(after[-1]))[leaves]
        places = place.expand(num_texts, -1)[is_own]  # (N,), as is_own is in the order of the numbers
        text_of_node = text.repeat_interleave(num_own)
        ends = after - 1

        def blocks(queries: torch.Tensor) -> PrefixBlocks:
            return blocks_of(queries, node[text_of_node[queries]], places[queries], below[is_own])

        return PrefixTree(
            self.input_ids[is_own][None],
            places[None],
            ends[None],
            self.text_of_row,
            blocks(torch.arange(len(places))),
            blocks(ends),
        )


def blocks_of(queries: torch.Tensor, above: torch.Tensor, places: torch.Tensor, below: torch.Tensor) -> PrefixBlocks:
    """Cuts nodes that ask into blocks.

    Args:
        queries: (M,) numbers of nodes, ascending. above: (M, T), the path to each from the root; what follows the node
            itself is any number. places: (M,), the length of that path before the node. below: (N,), the first number
            after the nodes below each.
    """
    num_blocks = -(-len(queries) // QUERIES_OF_A_BLOCK)
    starts = torch.arange(num_blocks) * QUERIES_OF_A_BLOCK
    asking = F.pad(queries, (0, num_blocks * QUERIES_OF_A_BLOCK - len(queries)), value=int(queries[-1]))
    asking = asking.view(num_blocks, -1)  # (G, Q)
    first, last = asking[:, :1], asking[:, -1:]
    path = above[starts, : int(places[starts].max())]
    span = first + torch.arange(int((last - first).max()) + 1)
    keys = torch.cat([path, span], dim=1).clamp(max=len(below) - 1)  # (G, K)
    is_key = torch.cat([torch.arange(path.shape[1]) < places[starts, None], span <= last], dim=1)
    seen = (keys[:, None] <= asking[:, :, None]) & (asking[:, :, None] < below[keys][:, None]) & is_key[:, None]
    bias = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    return PrefixBlocks(len(queries), keys, bias[:, None])


def has_hooks(tower: nn.Module) -> bool:
    """Whether anybody looks at what the modules in a tower are given or give."""
    return any(each._forward_hooks or each._forward_pre_hooks for each in tower.modules() if each is not tower)


def prefix_tree(
    tower: nn.Module,
    input_ids: torch.Tensor,
    pooled: torch.Tensor,
    implementations: tuple[str, ...],
    share: bool | None,
) -> PrefixTree | None:
    """The tree of a batch, or None where the tower takes the rows as they are: see `share_prefixes` of
    VitEmbedTextModel.

    Args:
        input_ids: (B, T). pooled: (B,). implementations: of attention, which take any mask.
    """
    config = cast(VitEmbedTextConfig, tower.config)
    is_exact = config.use_causal_mask and config._attn_implementation in implementations and not tower.training
    if share is False or not is_exact or is_traced() or type(input_ids) is not torch.Tensor or input_ids.is_meta:
        return None
    if share is None and (not is_on_host(input_ids) or has_hooks(tower)):
        return None
    texts = SortedTexts.of(input_ids.cpu(), pooled.cpu())
    num_tokens = input_ids.shape[0] * texts.input_ids.shape[1]
    if share is None and texts.num_nodes > min(num_tokens - LEAST_SAVED, MOST_NODES * num_tokens):
        return None
    return texts.tree().to(input_ids.device)
