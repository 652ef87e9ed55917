"""interval_attention and merge_states on Triton. Meaning: reference/attention.py.

Status: interpreted and compiled, not yet run on hardware.

interval_attention: a program = (sequence, KV head, block of the T * Hq/Hkv rows that share that head); it walks the slots that any of
its rows sees. Tiles that all of them see run without mask code, three stages ahead; the few at both ends run with it and without
stages, which would cost the registers of a second pipeline. No split over keys: made for many rows, as in prefill.
"""

import triton
import triton.language as tl

from ramify.kernels._softmax import NOTHING, again, load_tile, step
from ramify.kernels.attention import LOG2E, REGISTERS, again_of, config, work_type


@triton.jit(do_not_specialize=["T", "S"])
def _interval_attention(
    q, k, v, start, end, out, lse,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h, start_stride, end_stride,
    out_stride_b, out_stride_t, out_stride_h, lse_stride_b, lse_stride_t, T, S, group, scale,
    D: tl.constexpr,  # head size
    WORK: tl.constexpr,  # dtype of both products' operands
    ROWS: tl.constexpr,  # packed rows of one program
    KEYS: tl.constexpr,  # keys of a tile
    AGAIN: tl.constexpr,  # rows are read again for every tile
    BLOCK: tl.constexpr,  # D, rounded up to a power of two
):  # fmt: skip
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d, j = tl.arange(0, BLOCK), tl.arange(0, KEYS)
    t = r // group
    live = t < T
    low = tl.minimum(tl.maximum(tl.load(start + b * start_stride + t, mask=live, other=0), 0), S)
    high = tl.minimum(tl.load(end + b * end_stride + t, mask=live, other=0), S)
    any_key = low < high
    first = tl.min(tl.where(any_key, low, 0x7FFFFFFF), 0)  # slots that some row sees: [first, last)
    last = tl.max(tl.where(any_key, high, 0), 0)
    from_all = tl.max(tl.where(live, low, 0), 0)  # slots that every row sees: [from_all, to_all)
    to_all = tl.min(tl.where(live, tl.where(any_key, high, 0), 0x7FFFFFFF), 0)
    begin = tl.minimum(first, last)
    whole = tl.minimum(begin + tl.cdiv(tl.maximum(from_all - begin, 0), KEYS) * KEYS, last)
    rest = whole + tl.maximum(to_all - whole, 0) // KEYS * KEYS

    head = h * group + r % group
    row_at = q + b * q_stride_b + t.to(tl.int64) * q_stride_t + head * q_stride_h
    rows = load_tile(row_at, d, live, D, BLOCK, True).to(WORK)
    m = tl.full([ROWS], NOTHING, tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    from_k, from_v = k + b * k_stride_b + h * k_stride_h, v + b * v_stride_b + h * v_stride_h
    for lo in range(whole, rest, KEYS):
        at = (lo + j).to(tl.int64)
        keys = load_tile(from_k + at * k_stride_s, d, live, D, BLOCK, False).to(WORK)
        values = load_tile(from_v + at * v_stride_s, d, live, D, BLOCK, False).to(WORK)
        rows = again(rows, row_at, d, live, D, BLOCK, AGAIN)
        m, mass, acc = step(rows, keys, values, live[:, None], m, mass, acc, scale, False)
    for part in range(2):  # what lies before and behind the tiles that all rows see
        from_slot, to_slot = tl.where(part == 0, begin, rest), tl.where(part == 0, whole, last)
        for lo in tl.range(from_slot, to_slot, KEYS, num_stages=1):
            slot = lo + j
            seen = (slot[None, :] >= low[:, None]) & (slot[None, :] < high[:, None]) & (slot[None, :] < to_slot)
            used = tl.max(seen.to(tl.int32), 0) > 0  # 0 * NaN is NaN: what nobody sees must not reach the products
            at = slot.to(tl.int64)
            keys = load_tile(from_k + at * k_stride_s, d, used, D, BLOCK, True).to(WORK)
            values = load_tile(from_v + at * v_stride_s, d, used, D, BLOCK, True).to(WORK)
            rows = again(rows, row_at, d, live, D, BLOCK, AGAIN)
            m, mass, acc = step(rows, keys, values, seen, m, mass, acc, scale, True)
    saw = mass != 0
    mass = tl.where(saw, mass, 1.0)
    to = out + b * out_stride_b + t.to(tl.int64) * out_stride_t + head * out_stride_h
    tl.store(to[:, None] + d[None, :], (acc / mass[:, None]).to(out.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])
    total = tl.where(saw, (m + tl.log2(mass)) * 0.6931471805599453, float("-inf"))
    tl.store(lse + b * lse_stride_b + t.to(tl.int64) * lse_stride_t + head, total, mask=live)


@triton.jit
def _merge_states(
    o1, lse1, o2, lse2, out, lse, stride1, stride2, out_stride, D,
    BLOCK: tl.constexpr,  # D, rounded up to a power of two
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    a, b = tl.load(lse1 + r), tl.load(lse2 + r)
    nothing = (a == float("-inf")) & (b == float("-inf"))
    base = tl.where(nothing, 0.0, tl.maximum(a, b))
    p, q = tl.exp(a - base), tl.exp(b - base)
    total = tl.where(nothing, 1.0, p + q)
    x = tl.load(o1 + r * stride1 + d, mask=(d < D) & (p > 0), other=0.0).to(tl.float32)  # a side that saw nothing may hold NaN
    y = tl.load(o2 + r * stride2 + d, mask=(d < D) & (q > 0), other=0.0).to(tl.float32)
    tl.store(out + r * out_stride + d, ((p * x + q * y) / total).to(out.dtype.element_ty), mask=d < D)
    tl.store(lse + r, tl.where(nothing, float("-inf"), base + tl.log(total)))


def interval_attention(q, k, v, start, end, scale, out, lse):
    """out [B, T, Hq, D] in q's dtype and lse f32 [B, T, Hq]."""
    (B, T, Hq, D), (S, Hkv) = q.shape, k.shape[1:3]
    group = Hq // Hkv
    kind, itemsize = work_type(q, k)
    rows, keys, warps, stages = config(T * group, D, itemsize, masked=True)
    _interval_attention[(triton.cdiv(T * group, rows), Hkv, B)](
        q, k, v, start, end, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], start.stride(0), end.stride(0),
        *out.stride()[:3], *lse.stride()[:2], T, S, group, scale * LOG2E,
        D=D, WORK=kind, ROWS=rows, KEYS=keys, AGAIN=again_of(D, itemsize), BLOCK=triton.next_power_of_2(D),
        num_warps=warps, num_stages=stages, maxnreg=REGISTERS,
    )  # fmt: skip


def merge_states(o1, lse1, o2, lse2, out, lse):
    """out [R, D] and lse [R] of two sides."""
    R, D = o1.shape
    block = triton.next_power_of_2(D)
    _merge_states[(R,)](o1, lse1, o2, lse2, out, lse, o1.stride(0), o2.stride(0), out.stride(0), D, BLOCK=block, num_warps=1)
