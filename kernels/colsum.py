"""attention_colsum on Triton. Meaning: reference/attention.py. Status: interpreted and compiled, not yet run on hardware.

A program owns a tile of slots of one sequence and KV head: their keys are read once, and the T * Hq/Hkv packed rows pass by it in
order. No atomics: a slot's sum belongs to one program. Traffic: D * itemsize bytes a slot, once.
"""

import triton
import triton.language as tl

from ramify.kernels._softmax import counted, load_tile, positions_seen
from ramify.kernels.attention import LOG2E, work_type


@triton.jit(do_not_specialize=["T", "words", "slots", "window", "sink"])
def _colsum(
    q, k, lse, prefix_len, tail_rows, ancestors, page_table, out,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_s, k_stride_h, lse_stride_b, lse_stride_t, word_stride_b, word_stride_t,
    table_stride, out_stride_b, out_stride_h, T, words, slots, pages, group, window, sink, scale,
    D: tl.constexpr,  # head size
    WORK: tl.constexpr,  # dtype of the product's operands
    USED: tl.constexpr,  # tail_rows is given, else all T rows are in use
    WINDOW: tl.constexpr,  # a window is on
    TREE: tl.constexpr,  # ancestors say where the rows stand, else row t stands t behind the prefix
    PAGE: tl.constexpr,  # slots of a page; 0: no pages
    ROWS: tl.constexpr,  # packed rows at a time
    SLOTS: tl.constexpr,  # slots of one program
    BLOCK: tl.constexpr,  # D, rounded up to a power of two
):  # fmt: skip
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    n = counted(prefix_len + b, slots)
    used = T
    if USED:
        used = counted(tail_rows + b, T)
    slot, d, i = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS), tl.arange(0, BLOCK), tl.arange(0, ROWS)
    live = slot < n
    if WINDOW:
        live = live & ((slot > n - window) | (slot < sink))  # no row stands before n
    place, at = b + tl.zeros([SLOTS], tl.int64), slot.to(tl.int64)
    if PAGE > 0:
        place = tl.load(page_table + b * table_stride + slot // PAGE, mask=live, other=0).to(tl.int64)
        at, live = at % PAGE, live & (place >= 0) & (place < pages)
    sums = tl.zeros([SLOTS], tl.float32)
    if tl.max(live.to(tl.int32), 0) > 0:
        keys = load_tile(k + place * k_stride_b + at * k_stride_s + h * k_stride_h, d, live, D, BLOCK, True).to(WORK)
        for first in range(0, used * group, ROWS):
            r = first + i
            t, mine = r // group, r < used * group
            rows = load_tile(
                q + b * q_stride_b + t.to(tl.int64) * q_stride_t + (h * group + r % group) * q_stride_h, d, mine, D, BLOCK, True
            )
            total = tl.load(lse + b * lse_stride_b + t.to(tl.int64) * lse_stride_t + h * group + r % group, mask=mine, other=float("-inf"))
            seen = live[None, :] & (total != float("-inf"))[:, None]
            if WINDOW:
                depth = t
                if TREE:
                    depth = positions_seen(ancestors + b * word_stride_b + t.to(tl.int64) * word_stride_t, mine, words) - 1
                seen = seen & ((slot[None, :] > (n + depth - window)[:, None]) | (slot < sink)[None, :])
            x = tl.dot(rows.to(WORK), tl.trans(keys), input_precision="ieee") * scale - (total * 1.4426950408889634)[:, None]
            sums += tl.sum(tl.where(seen, tl.exp2(x) + (x - x), 0.0), 0)  # what is not finite makes the sum NaN
    tl.store(out + b * out_stride_b + h * out_stride_h + slot, sums, mask=slot < slots)


def config(rows, D, itemsize):
    """(ROWS, SLOTS, warps, stages) of packed rows a KV head, head size and bytes of an operand.

    Stages ahead make the compiler hold the f32 keys of a loop in registers, 256 a thread at head size 256: one stage leaves them shared.
    """
    if itemsize == 4:
        return 16, 16, 8, 1 if D > 128 else 3
    return 16 if rows <= 16 or D > 128 else 32, 64, 8 if D > 128 else 4, 3


def attention_colsum(q, k, lse, prefix_len, ancestors, page_table, scale, window, sink, tail_rows, out):
    """out f32 [B, Hkv, slots], any strides but the last."""
    (B, T, Hq, D), Hkv, slots = q.shape, k.shape[2], out.shape[2]
    paged, tree = page_table is not None, ancestors is not None
    kind, itemsize = work_type(q, k)
    rows, tile, warps, stages = config(T * (Hq // Hkv), D, itemsize)
    _colsum[(triton.cdiv(slots, tile), Hkv, B)](
        q, k, lse, prefix_len, prefix_len if tail_rows is None else tail_rows, ancestors if tree else prefix_len,
        page_table if paged else prefix_len, out, *q.stride()[:3], *k.stride()[:3], *lse.stride()[:2],
        *(ancestors.stride()[:2] if tree else (0, 0)), page_table.stride(0) if paged else 0, *out.stride()[:2],
        T, ancestors.shape[2] if tree else 1, slots, k.shape[0], Hq // Hkv, window, sink, scale * LOG2E,
        D=D, WORK=kind, USED=tail_rows is not None, WINDOW=window > 0, TREE=tree, PAGE=k.shape[1] if paged else 0,
        ROWS=rows, SLOTS=tile, BLOCK=triton.next_power_of_2(D), num_warps=warps, num_stages=stages,
    )  # fmt: skip
