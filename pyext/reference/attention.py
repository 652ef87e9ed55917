"""tree_attention, interval_attention, attention_colsum and merge_states in plain torch: what every attention kernel has to compute.

Source: tree attention of SpecInfer (arXiv 2305.09781) and Medusa (arXiv 2401.10774); merging of partial softmaxes as in
online softmax (arXiv 1805.02867).
"""

import math

import torch
from torch import Tensor

from ramify.reference._math import wide


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tail_k: Tensor,
    tail_v: Tensor,
    ancestors: Tensor,
    prefix_len: Tensor,
    *,
    page_table: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    sink: int | None = None,
    tail_rows: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of T tree rows over a committed prefix and over their own ancestors.

    Row i of sequence b sees the slots below prefix_len[b] and those tail rows j whose bit is set in ancestors[b, i]. Its
    position is prefix_len[b] + (number of its ancestors, itself included) - 1; under a window, a key at position p is seen
    when p > position - window or p < sink. Rows from tail_rows[b] on give 0 and a lse of -inf.

    q [B, T, Hq, D]; k, v [B, S, Hkv, D], or [pages, page, Hkv, D] with page_table [B, P]; tail_k, tail_v [B, T, Hkv, D];
    ancestors int64 [B, T, W]; prefix_len, tail_rows [B]. Returns o [B, T, Hq, D] in q's dtype (, lse [B, T, Hq], natural
    logarithm, float32 or wider). Values outside the visible slots may be anything, NaN included. A row with a score, scale * q k, that
    is NaN or infinite is NaN, in o and lse.
    """
    B, T, Hq, D = q.shape
    Hkv, dtype = tail_k.shape[2], wide(q)
    scale = 1 / math.sqrt(D) if scale is None else scale
    out = torch.zeros(B, T, Hq, D, dtype=dtype, device=q.device)
    lse = torch.full((B, T, Hq), -torch.inf, dtype=dtype, device=q.device)
    bits = ancestor_bits(ancestors, T)
    for b in range(B):
        n, rows = int(prefix_len[b]), T if tail_rows is None else int(tail_rows[b])
        if rows == 0:
            continue
        keys = torch.cat([_slots(k, page_table, b, n), tail_k[b, :rows]]).to(dtype)
        values = torch.cat([_slots(v, page_table, b, n), tail_v[b, :rows]]).to(dtype)
        tail = bits[b, :rows, :rows]
        seen = torch.cat([tail.new_ones(rows, n), tail], dim=1)  # [rows, n + rows]
        if window is not None:
            row_at = n + tail.sum(1) - 1
            key_at = torch.cat([torch.arange(n, device=q.device), row_at])
            seen &= (key_at > row_at[:, None] - window) | (key_at < (sink or 0))
        used = seen.any(0)[:, None, None]  # 0 * NaN is NaN: what nobody sees must not reach the products
        keys, values = keys.masked_fill(~used, 0), values.masked_fill(~used, 0)
        grouped = q[b, :rows].to(dtype).reshape(rows, Hkv, Hq // Hkv, D)
        scores = torch.einsum("rhgd,shd->hgrs", grouped, keys) * scale
        scores = scores.masked_fill(~seen, -torch.inf)
        total = scores.logsumexp(-1)  # [Hkv, g, rows]; a row sees itself, so it is no -inf
        total = total.masked_fill((~scores.isfinite() & seen).any(-1), torch.nan)
        weights = (scores - total[..., None]).exp()
        out[b, :rows] = torch.einsum("hgrs,shd->rhgd", weights, values).reshape(rows, Hq, D)
        lse[b, :rows] = total.permute(2, 0, 1).reshape(rows, Hq)
    out = out.to(q.dtype)
    return (out, lse) if return_lse else out


def interval_attention(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor, *, scale: float | None = None, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which row t of sequence b sees the slots from start[b, t] up to and without end[b, t].

    q [B, T, Hq, D]; k, v [B, S, Hkv, D]; start, end [B, T]. A row that sees nothing gives 0 and a lse of -inf. Returns o [B, T, Hq, D] in
    q's dtype (, lse [B, T, Hq]). Values of slots that no row sees may be anything, NaN included. A row with a score, scale * q k, that is
    NaN or infinite is NaN, in o and lse.
    """
    (B, T, Hq, D), (S, Hkv), dtype = q.shape, k.shape[1:3], wide(q)
    scale = 1 / math.sqrt(D) if scale is None else scale
    slot = torch.arange(S, device=q.device)
    seen = (slot >= start[..., None]) & (slot < end[..., None])  # [B, T, S]
    unused = ~seen.any(1)[..., None, None]
    keys, values = k.to(dtype).masked_fill(unused, 0), v.to(dtype).masked_fill(unused, 0)
    scores = torch.einsum("bthgd,bshd->bthgs", q.to(dtype).reshape(B, T, Hkv, Hq // Hkv, D), keys) * scale
    seen = seen[:, :, None, None]
    wrong = (~scores.isfinite() & seen).any(-1)
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1) if S else torch.full_like(scores.sum(-1), -torch.inf)
    lse = lse.masked_fill(wrong, torch.nan)
    weights = (scores - lse[..., None].clamp(min=torch.finfo(dtype).min)).exp()
    out = torch.einsum("bthgs,bshd->bthgd", weights, values).reshape(B, T, Hq, D).to(q.dtype)
    return (out, lse.reshape(B, T, Hq)) if return_lse else out


def attention_colsum(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    prefix_len: Tensor,
    *,
    ancestors: Tensor | None = None,
    page_table: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    sink: int | None = None,
    tail_rows: Tensor | None = None,
) -> Tensor:
    """How much attention each committed slot received: the sum of exp(scale * q k - lse) over rows and the query heads of a group.

    q [B, T, Hq, D], k, prefix_len, page_table, window, sink, tail_rows as for `tree_attention`, whose lse [B, T, Hq] this takes: a slot
    that a row does not see gets nothing from it, and neither does any from a row whose lse is -inf. ancestors [B, T, W] say where rows
    lie under a window; without them row t is t behind the prefix. A score or lse that is NaN or beyond its dtype makes the slots that
    its row sees NaN. Returns [B, Hkv, slots] in float32 or wider; slots that nobody sees give 0 and may hold anything.
    """
    (B, T, Hq, D), Hkv, dtype = q.shape, k.shape[2], wide(q)
    scale = 1 / math.sqrt(D) if scale is None else scale
    slots = k.shape[1] * (1 if page_table is None else page_table.shape[1])
    out = torch.zeros(B, Hkv, slots, dtype=dtype, device=q.device)
    for b in range(B):
        n, rows = int(prefix_len[b]), T if tail_rows is None else int(tail_rows[b])
        depth = torch.arange(T, device=q.device) if ancestors is None else ancestor_bits(ancestors[b : b + 1], T)[0].sum(1) - 1
        at, row_at = torch.arange(n, device=q.device), n + depth[:rows, None]
        seen = torch.ones(rows, n, dtype=torch.bool, device=q.device)
        if window is not None:
            seen = (at > row_at - window) | (at < (sink or 0))
        keys = _slots(k, page_table, b, n).to(dtype).masked_fill(~seen.any(0)[:, None, None], 0)
        scores = torch.einsum("rhgd,shd->hgrs", q[b, :rows].to(dtype).reshape(rows, Hkv, Hq // Hkv, D), keys) * scale
        total = lse[b, :rows].to(dtype).reshape(rows, Hkv, Hq // Hkv).permute(1, 2, 0)[..., None]
        over = scores - total
        weights = torch.where(over.isfinite(), over.exp(), torch.nan)
        out[b, :, :n] = weights.masked_fill(~seen | (total == -torch.inf), 0).sum((1, 2))
    return out


def merge_states(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """One attention over two disjoint sets of keys, from the attention over each.

    o1, o2 [..., D] and lse1, lse2 [...], natural logarithm. A side that saw nothing has a lse of -inf, and its o may be
    anything; two such sides give 0 and -inf. Returns o [..., D] in o1's dtype and lse [...].
    """
    dtype = wide(o1)
    lse = torch.logaddexp(lse1.to(dtype), lse2.to(dtype))
    out = torch.zeros_like(o1, dtype=dtype)
    for o, part in ((o1, lse1), (o2, lse2)):
        weight = torch.where(part == -torch.inf, 0.0, (part.to(dtype) - lse).exp())[..., None]
        out += torch.where(weight == 0, 0.0, weight * o.to(dtype))
    return out.to(o1.dtype), lse


def ancestor_bits(ancestors: Tensor, T: int) -> Tensor:
    """Ancestor words int64 [B, T, W] as bool [B, T, T]: [b, i, j] is True when row i sees row j."""
    shifts = torch.arange(64, device=ancestors.device)
    return ((ancestors[..., None] >> shifts) & 1).bool().flatten(-2)[..., :T]


def _slots(cache: Tensor, page_table: Tensor | None, b: int, n: int) -> Tensor:
    """The first n slots of sequence b, [n, Hkv, D]."""
    if page_table is None:
        return cache[b, :n]
    page = cache.shape[1]
    return cache[page_table[b, : -(-n // page)].long()].flatten(0, 1)[:n]
