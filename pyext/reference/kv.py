"""kv_append and kv_commit on plain tensors: the only two ways a token enters a cache."""

import torch
from torch import Tensor


def kv_append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    length: Tensor,
    *,
    n_rows: Tensor | None = None,
    page_table: Tensor | None = None,
) -> None:
    """Write row t of sequence b to slot length[b] + t of the caches, for t < n_rows[b] (all T rows by default).

    k, v [B, T, Hkv, D]; k_cache, v_cache [B, S, Hkv, D], or [pages, page, Hkv, D] with page_table [B, P]; length, n_rows [B].
    Values are rounded to the cache's dtype. The caches change in place; `length` does not.
    """
    B, T = k.shape[:2]
    rows = torch.arange(T, device=k.device).expand(B, T)
    kv_commit(k, v, k_cache, v_cache, rows, torch.full_like(length, T) if n_rows is None else n_rows, length, page_table=page_table)


def kv_commit(
    tail_k: Tensor,
    tail_v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    path: Tensor,
    count: Tensor,
    length: Tensor,
    *,
    page_table: Tensor | None = None,
) -> None:
    """Append the accepted rows of a tree: tail row path[b, i] goes to slot length[b] + i, for i < count[b].

    tail_k, tail_v [B, T, Hkv, D]; caches as for kv_append; path [B, A], count, length [B], as verify_greedy returns the first
    two. Entries of path from count[b] on may be anything. The caches change in place; `length` does not.
    With one more axis L in front of tails and caches, all layers of a model at once.
    """
    if tail_k.ndim == 5:
        for layer in zip(tail_k, tail_v, k_cache, v_cache):
            kv_commit(*layer, path, count, length, page_table=page_table)
        return
    step = torch.arange(path.shape[1], device=path.device)
    b, i = (step < count[:, None]).nonzero(as_tuple=True)
    row, slot = path[b, i].long(), length[b].long() + i
    if page_table is None:
        where = (b, slot)
    else:
        page = k_cache.shape[1]
        where = (page_table[b, slot // page].long(), slot % page)
    new_k, new_v = tail_k[b, row], tail_v[b, row]  # copies: the tail may lie in the caches
    k_cache[where], v_cache[where] = new_k.to(k_cache.dtype), new_v.to(v_cache.dtype)
