"""kv_append and kv_commit: the only two ways a token enters a cache of plain tensors."""

from typing import Any

import torch
from torch import Tensor

from ramify import reference
from ramify.ops._checks import FLOATS, INDICES, INT32, Shapes, check_cache
from ramify.ops._library import define_in_place


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

    k, v [B, T, Hkv, D] float; k_cache, v_cache [B, S, Hkv, D], or [pages, page, Hkv, D] with page_table int32 [B, P]; length,
    n_rows int32 [B]. The caches change in place, rounded to their dtype; `length` does not change. Raises ValueError for shapes
    and for slots beyond the cache, TypeError for dtypes.
    """
    check = Shapes("kv_append")
    check("k", k, "B T Hkv D", FLOATS)
    check("v", v, "B T Hkv D", FLOATS)
    check_cache(check, "k_cache", k_cache, "v_cache", v_cache, page_table)
    check("length", length, "B", INT32)
    if n_rows is not None:
        check("n_rows", n_rows, "B", INT32)
    _kv_append(k, v, k_cache, v_cache, length, n_rows, page_table)


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

    tail_k, tail_v [B, T, Hkv, D] float; caches as for kv_append; path int32 or int64 [B, A] and count int32 [B] as verify_greedy
    returns them; length int32 [B]. Entries of path from count[b] on are not read. With one more axis L in front of tails and caches,
    all layers of a model at once, on a GPU in one launch. The caches change in place; rejected rows leave no trace. Raises ValueError
    for shapes, for rows outside the tail and slots beyond the cache; TypeError for dtypes.
    """
    check = Shapes("kv_commit")
    layers = "L " if isinstance(tail_k, Tensor) and tail_k.ndim == 5 else ""
    check("tail_k", tail_k, f"{layers}B T Hkv D", FLOATS)
    check("tail_v", tail_v, f"{layers}B T Hkv D", FLOATS)
    check_cache(check, "k_cache", k_cache, "v_cache", v_cache, page_table, layers)
    check("path", path, "B A", INDICES)
    check("count", count, "B", INT32)
    check("length", length, "B", INT32)
    _kv_commit(tail_k, tail_v, k_cache, v_cache, path, count, length, page_table)


def _check_slots(op: str, name: str, counts: Tensor, most: int, length: Tensor, k_cache: Tensor, page_table: Tensor | None) -> None:
    """Everything fits. On the CPU only: elsewhere the answer would cost a synchronisation."""
    if length.device.type != "cpu":
        return
    page = k_cache.shape[-3]
    slots = page * (1 if page_table is None else page_table.shape[1])
    for b, (n, first) in enumerate(zip(counts.tolist(), length.tolist())):
        if not 0 <= n <= most:
            raise ValueError(f"{op}: {name}[{b}] is {n}; takes 0 to {most}.")
        if not 0 <= first <= slots - n:
            raise ValueError(f"{op}: length[{b}] is {first} and {n} rows follow; takes {slots} slots in all. Give the cache more slots.")
        if page_table is not None and n:
            pages = page_table[b, first // page : (first + n - 1) // page + 1]
            if int(pages.min()) < 0 or int(pages.max()) >= k_cache.shape[-4]:
                raise ValueError(f"{op}: page_table[{b}] names a page outside the cache; takes 0 to {k_cache.shape[-4] - 1}.")


def _append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor, n_rows: Tensor | None, page_table: Tensor | None
) -> None:
    T = k.shape[1]
    _check_slots("kv_append", "n_rows", torch.full_like(length, T) if n_rows is None else n_rows, T, length, k_cache, page_table)
    reference.kv_append(k, v, k_cache, v_cache, length, n_rows=n_rows, page_table=page_table)


def _commit(
    tail_k: Tensor, tail_v: Tensor, k_cache: Tensor, v_cache: Tensor, path: Tensor, count: Tensor, length: Tensor, page_table: Tensor | None
) -> None:
    T, A = tail_k.shape[-3], path.shape[1]
    _check_slots("kv_commit", "count", count, A, length, k_cache, page_table)
    if path.device.type == "cpu":
        used = torch.arange(A) < count[:, None]
        wrong = used & ((path < 0) | (path >= T))
        if wrong.any():
            b, i = wrong.nonzero()[0].tolist()
            raise ValueError(f"kv_commit: path[{b}, {i}] is {path[b, i]}; takes 0 to {T - 1}, the rows of tail_k.")
    reference.kv_commit(tail_k, tail_v, k_cache, v_cache, path, count, length, page_table=page_table)


def _sizes(k: Tensor, v: Tensor, k_cache: Tensor, *_: Any) -> dict[str, Any]:
    return {"dtype": k.dtype, "cache": k_cache.dtype}


_kv_append = define_in_place(
    "kv_append",
    "Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor length, Tensor? n_rows, Tensor? page_table",
    _append,
    _sizes,
    triton="kv_append",
)
_kv_commit = define_in_place(
    "kv_commit",
    "Tensor tail_k, Tensor tail_v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor path, Tensor count, Tensor length, Tensor? page_table",
    _commit,
    _sizes,
    triton="kv_commit",
)
