"""kv_append and kv_commit: the only two ways a token enters a cache of plain tensors."""

from typing import Any

import torch
from torch import Tensor

from ramify import reference
from ramify.ops import _cuda, _native
from ramify.ops._checks import FLOATS, INDICES, INT32, Shapes, check_cache
from ramify.ops._library import InPlaceOp


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

    k, v [B, T, Hkv, D] of one float dtype; k_cache, v_cache [B, S, Hkv, D], or [pages, page, Hkv, D] with page_table int32 [B, P]; length,
    n_rows int32 [B]. The caches change in place, rounded to their dtype; `length` does not change. Raises ValueError for shapes
    and for slots beyond the cache, TypeError for dtypes.
    """
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

    tail_k, tail_v [B, T, Hkv, D] of one float dtype; caches as for kv_append; path int32 or int64 [B, A], count int32 [B] as verify_greedy
    returns them; length int32 [B]. Entries of path from count[b] on are not read. With one more axis L in front of tails and caches,
    all layers of a model at once, on a GPU in one launch. The caches change in place; rejected rows leave no trace. Raises ValueError
    for shapes, for rows outside the tail and slots beyond the cache; TypeError for dtypes.
    """
    _kv_commit(tail_k, tail_v, k_cache, v_cache, path, count, length, page_table)


def _check_append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor, n_rows: Tensor | None, page_table: Tensor | None
) -> None:
    check = Shapes("kv_append")
    check("k", k, "B T Hkv D", FLOATS)
    check("v", v, "B T Hkv D", (k.dtype,))
    check_cache(check, "k_cache", k_cache, "v_cache", v_cache, page_table)
    check("length", length, "B", INT32)
    if n_rows is not None:
        check("n_rows", n_rows, "B", INT32)


def _check_commit(
    tail_k: Tensor, tail_v: Tensor, k_cache: Tensor, v_cache: Tensor, path: Tensor, count: Tensor, length: Tensor, page_table: Tensor | None
) -> None:
    check, layers = Shapes("kv_commit"), "L " if tail_k.ndim == 5 else ""
    check("tail_k", tail_k, f"{layers}B T Hkv D", FLOATS)
    check("tail_v", tail_v, f"{layers}B T Hkv D", (tail_k.dtype,))
    check_cache(check, "k_cache", k_cache, "v_cache", v_cache, page_table, layers)
    check("path", path, "B A", INDICES)
    check("count", count, "B", INT32)
    check("length", length, "B", INT32)


def _check_slots(op: str, name: str, counts: Tensor, most: int, length: Tensor, k_cache: Tensor, page_table: Tensor | None) -> None:
    """Everything fits, and no page is written twice."""
    size, pages = k_cache.shape[-3], k_cache.shape[-4]
    slots = size * (1 if page_table is None else page_table.shape[1])
    written: set[int] = set()
    for b, (n, first) in enumerate(zip(counts.tolist(), length.tolist())):
        if not 0 <= n <= most:
            raise ValueError(f"{op}: {name}[{b}] is {n}; takes 0 to {most}.")
        if not 0 <= first <= slots - n:
            raise ValueError(f"{op}: length[{b}] is {first} and {n} rows follow; takes {slots} slots in all. Give the cache more slots.")
        if page_table is not None and n:
            for page in page_table[b, first // size : (first + n - 1) // size + 1].tolist():
                if not 0 <= page < pages:
                    raise ValueError(f"{op}: page_table[{b}] names page {page}, outside the cache; takes 0 to {pages - 1}.")
                if page in written:
                    raise ValueError(f"{op}: page_table[{b}] writes page {page}, as another entry does; takes pages of its own. Copy it.")
                written.add(page)


def _check_path(path: Tensor, count: Tensor, T: int) -> None:
    """Accepted rows are rows of the tail."""
    used = torch.arange(path.shape[1], device="cpu") < count[:, None]
    wrong = used & ((path < 0) | (path >= T))
    if wrong.any():
        b, i = wrong.nonzero()[0].tolist()
        raise ValueError(f"kv_commit: path[{b}, {i}] is {path[b, i]}; takes 0 to {T - 1}, the rows of tail_k.")


def _check_append_values(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor, n_rows: Tensor | None, page_table: Tensor | None
) -> None:
    T = k.shape[1]
    _check_slots("kv_append", "n_rows", torch.full_like(length, T) if n_rows is None else n_rows, T, length, k_cache, page_table)


def _check_commit_values(
    tail_k: Tensor, tail_v: Tensor, k_cache: Tensor, v_cache: Tensor, path: Tensor, count: Tensor, length: Tensor, page_table: Tensor | None
) -> None:
    _check_slots("kv_commit", "count", count, path.shape[1], length, k_cache, page_table)
    _check_path(path, count, tail_k.shape[-3])


def _append(*inputs: Any) -> None:
    reference.kv_append(*inputs[:5], n_rows=inputs[5], page_table=inputs[6])


def _append_cpu(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor, n_rows: Tensor | None, page_table: Tensor | None
) -> None:
    count = torch.full_like(length, k.shape[1]) if n_rows is None else n_rows
    for x, cache in ((k, k_cache), (v, v_cache)):
        _native.place(x[None], cache[None], None, count, length, page_table)


def _commit(*inputs: Any) -> None:
    reference.kv_commit(*inputs[:7], page_table=inputs[7])


def _commit_cpu(tail_k: Tensor, tail_v: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> None:
    for x, cache in ((tail_k, k_cache), (tail_v, v_cache)):
        _native.place(*((x, cache) if x.ndim == 5 else (x[None], cache[None])), *rest)


def _sizes(k: Tensor, v: Tensor, k_cache: Tensor, *_: Any) -> dict[str, Any]:
    return {"dtype": k.dtype, "cache": k_cache.dtype}


_kv_append = InPlaceOp(
    "kv_append",
    "Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor length, Tensor? n_rows, Tensor? page_table",
    _check_append,
    _sizes,
    _append,
    cpu=_append_cpu,
    cuda=_cuda.kv_append,
    triton="kv_append",
    values=_check_append_values,
)
_kv_commit = InPlaceOp(
    "kv_commit",
    "Tensor tail_k, Tensor tail_v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor path, Tensor count, Tensor length, Tensor? page_table",
    _check_commit,
    _sizes,
    _commit,
    cpu=_commit_cpu,
    cuda=_cuda.kv_commit,
    triton="kv_commit",
    values=_check_commit_values,
)
