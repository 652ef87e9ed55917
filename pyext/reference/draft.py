"""The draft table in plain torch: guesses read from a table of likely successors, and what a step teaches it.

Source: Token Recycling, Luo et al. 2024 (Turning Trash into Treasure). Nothing here reads a value back to the host.
"""

import torch
from torch import Tensor


def table_draft(table: Tensor, roots: Tensor, parents: Tensor, ranks: Tensor) -> Tensor:
    """Fill the static tree that all sequences share: row t holds the successor of rank ranks[t] of its parent's token.

    table [V, W], likeliest successor first, negative where nothing was seen; roots [B], the token of row 0; parents, ranks [T]: a parent
    stands before its child. Returns int32 [B, T], -1 for what is not known: an id outside 0 to V - 1, the row of a token that is not
    known, and a row that is not in use: parent -1, or a parent or rank that no row can have.
    """
    (V, W), T = table.shape, len(parents)
    used = (parents >= 0) & (parents < torch.arange(T, device=parents.device)) & (ranks >= 0) & (ranks < W)
    parents, ranks = (torch.where(used, x, 0).long() for x in (parents, ranks))
    tokens = torch.full((len(roots), T), -1, dtype=torch.int64, device=table.device)
    tokens[:, 0] = _known(roots.long(), V)
    for t in range(1, T):
        parent = tokens.index_select(1, parents[t : t + 1])[:, 0]
        token = table[parent.clamp_min(0), ranks[t : t + 1]].long()  # a slice: the rank alone would be read by the host
        tokens[:, t] = torch.where(used[t] & (parent >= 0), _known(token, V), -1)
    return tokens.int()


def table_learn(table: Tensor, tokens: Tensor, likely: Tensor) -> None:
    """What is likely after the token of row m becomes that token's row of the table; of rows with one token the last one counts.

    table [V, W] changes in place; tokens [M], those outside 0 to V - 1 teach nothing; likely [M, K], K at least W, the likeliest first.
    """
    (V, W), M = table.shape, len(tokens)
    if M == 0:
        return
    places = torch.where((tokens >= 0) & (tokens < V), tokens, V).long()  # V: a row of nobody
    last = torch.full((V + 1,), -1, dtype=torch.int64, device=table.device)
    last.scatter_reduce_(0, places, torch.arange(M, device=table.device), "amax")
    source = last[:V, None]
    table.copy_(torch.where(source >= 0, likely[source[:, 0].clamp_min(0), :W], table))


def _known(tokens: Tensor, V: int) -> Tensor:
    return torch.where((tokens >= 0) & (tokens < V), tokens, -1)
