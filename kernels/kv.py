"""kv_append and kv_commit on Triton: rows of a step into cache slots. Meaning: reference/kv.py.

Status: interpreted and compiled, not yet run on hardware.

One program copies one row of one layer, K and V, all heads: 4 * Hkv * D * itemsize bytes. All layers of a commit are one launch.
Lengths, paths and page tables are read on the device. A slot or a page outside the cache is not written.
"""

import triton
import triton.language as tl


@triton.jit
def _place(
    k, v, k_cache, v_cache, rows, count, length, page_table,
    k_stride_l, k_stride_b, k_stride_t, k_stride_h, v_stride_l, v_stride_b, v_stride_t, v_stride_h,
    kc_stride_l, kc_stride_b, kc_stride_s, kc_stride_h, vc_stride_l, vc_stride_b, vc_stride_s, vc_stride_h,
    rows_stride, table_stride, T, slots, pages, heads, D,
    PATH: tl.constexpr,  # rows are named by a path, else row i goes to slot i
    COUNT: tl.constexpr,  # count is given, else all rows are in use
    PAGE: tl.constexpr,  # slots of a page; 0: no pages
    HEADS: tl.constexpr,  # heads, rounded up to a power of two
    BLOCK: tl.constexpr,  # D, rounded up
):  # fmt: skip
    i, b, layer = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = i.to(tl.int64)
    if PATH:
        row = tl.load(rows + b * rows_stride + i).to(tl.int64)
    used = T
    if COUNT:
        used = tl.load(count + b)
    slot = tl.load(length + b) + i
    if (i < used) & (row >= 0) & (row < T) & (slot >= 0) & (slot < slots):
        where, inside = b, slot.to(tl.int64)
        if PAGE > 0:
            where, inside = tl.load(page_table + b * table_stride + slot // PAGE).to(tl.int64), (slot % PAGE).to(tl.int64)
        h, d = tl.arange(0, HEADS)[:, None].to(tl.int64), tl.arange(0, BLOCK)[None, :]
        live = (h < heads) & (d < D) & (where >= 0) & (where < pages)
        key = tl.load(k + layer * k_stride_l + b * k_stride_b + row * k_stride_t + h * k_stride_h + d, mask=live)
        value = tl.load(v + layer * v_stride_l + b * v_stride_b + row * v_stride_t + h * v_stride_h + d, mask=live)
        to_k = k_cache + layer * kc_stride_l + where * kc_stride_b + inside * kc_stride_s + h * kc_stride_h + d
        to_v = v_cache + layer * vc_stride_l + where * vc_stride_b + inside * vc_stride_s + h * vc_stride_h + d
        tl.store(to_k, key.to(k_cache.dtype.element_ty), mask=live)
        tl.store(to_v, value.to(v_cache.dtype.element_ty), mask=live)


def place(k, v, k_cache, v_cache, path, count, length, page_table):
    """k, v [L, B, T, Hkv, D] into caches [L, B, S, Hkv, D] or [L, pages, page, Hkv, D]; path [B, A] or None, count [B] or None."""
    L, B, T, heads, D = k.shape
    paged = page_table is not None
    pages, page = k_cache.shape[1:3]
    _place[(T if path is None else path.shape[1], B, L)](
        k, v, k_cache, v_cache, length if path is None else path, length if count is None else count, length,
        page_table if paged else length,
        *k.stride()[:4], *v.stride()[:4], *k_cache.stride()[:4], *v_cache.stride()[:4],
        0 if path is None else path.stride(0), page_table.stride(0) if paged else 0,
        T, page * page_table.shape[1] if paged else page, pages, heads, D,
        PATH=path is not None, COUNT=count is not None, PAGE=page if paged else 0,
        HEADS=triton.next_power_of_2(heads), BLOCK=triton.next_power_of_2(D), num_warps=4,
    )  # fmt: skip
