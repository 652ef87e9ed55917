"""rms_norm, rope, rope_append, silu_mul and embed on Triton. Meaning: reference/glue.py.

Status: interpreted and compiled, not yet run on hardware.

All are bound by memory: every element is read once and written once, arithmetic in f32. One program owns whole rows (or heads),
so a row's bits never depend on its neighbours.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["eps"])
def _rms_norm(
    x, weight, residual, out, summed, x_stride, residual_stride, out_stride, summed_stride, H, eps,
    ADD: tl.constexpr,  # norm x + residual, and store the sum
    BLOCK: tl.constexpr,  # columns of the one tile that holds a row; a power of two
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    live = col < H
    h = tl.load(x + r * x_stride + col, mask=live, other=0.0).to(tl.float32)
    if ADD:
        h += tl.load(residual + r * residual_stride + col, mask=live, other=0.0).to(tl.float32)
        h = h.to(summed.dtype.element_ty)  # rounded before it is normed, as a model that stores it does
        tl.store(summed + r * summed_stride + col, h, mask=live)
        h = h.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(h * h, 0) / H + eps)
    w = tl.load(weight + col, mask=live, other=0.0).to(tl.float32)
    tl.store(out + r * out_stride + col, (h * scale * w).to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["P"])
def _rope(
    x, cos, sin, positions, out, x_stride_t, x_stride_h, out_stride_t, out_stride_h, table_stride, P, heads, half, D,
    HEADS: tl.constexpr,  # heads of one program
    HALF: tl.constexpr,  # half the turned features, rounded up to a power of two
    REST: tl.constexpr,  # features that pass unchanged, rounded up; 0: none
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS)[:, None]
    col = tl.arange(0, HALF)[None, :]
    live = (h < heads) & (col < half)
    position = tl.load(positions + t).to(tl.int64)
    known = (position >= 0) & (position < P)  # a position outside the tables reads nothing and gives NaN
    c = tl.load(cos + position * table_stride + col, mask=known & (col < half), other=float("nan"))
    s = tl.load(sin + position * table_stride + col, mask=known & (col < half), other=float("nan"))
    from_x, to_out = x + t * x_stride_t + h * x_stride_h, out + t * out_stride_t + h * out_stride_h
    first = tl.load(from_x + col, mask=live, other=0.0).to(tl.float32)
    second = tl.load(from_x + half + col, mask=live, other=0.0).to(tl.float32)
    tl.store(to_out + col, (first * c - second * s).to(out.dtype.element_ty), mask=live)
    tl.store(to_out + half + col, (second * c + first * s).to(out.dtype.element_ty), mask=live)
    if REST > 0:
        rest = 2 * half + tl.arange(0, REST)[None, :]
        kept = (h < heads) & (rest < D)
        tl.store(to_out + rest, tl.load(from_x + rest, mask=kept), mask=kept)


@triton.jit
def _turned(x, norm, c, s, half, D, eps, NORM: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr):
    """A head of D features, normed where NORM says so and turned: the first half of the pairs, the second, what passes unturned."""
    col, rest = tl.arange(0, HALF), 2 * half + tl.arange(0, max(REST, 1))
    first = tl.load(x + col, mask=col < half, other=0.0).to(tl.float32)
    second = tl.load(x + half + col, mask=col < half, other=0.0).to(tl.float32)
    kept = tl.load(x + rest, mask=rest < D, other=0.0).to(tl.float32)
    if NORM:
        scale = 1.0 / tl.sqrt_rn((tl.sum(first * first, 0) + tl.sum(second * second, 0) + tl.sum(kept * kept, 0)) / D + eps)
        first *= scale * tl.load(norm + col, mask=col < half, other=0.0).to(tl.float32)
        second *= scale * tl.load(norm + half + col, mask=col < half, other=0.0).to(tl.float32)
        kept *= scale * tl.load(norm + rest, mask=rest < D, other=0.0).to(tl.float32)
    return first * c - second * s, second * c + first * s, kept


@triton.jit
def _store_head(to, first, second, kept, half, D, HALF: tl.constexpr, REST: tl.constexpr):
    col, rest = tl.arange(0, HALF), 2 * half + tl.arange(0, max(REST, 1))
    tl.store(to + col, first.to(to.dtype.element_ty), mask=col < half)
    tl.store(to + half + col, second.to(to.dtype.element_ty), mask=col < half)
    tl.store(to + rest, kept.to(to.dtype.element_ty), mask=rest < D)


@triton.jit(do_not_specialize=["S", "P", "eps"])
def _rope_append(
    qkv, cos, sin, positions, slots, q, k, v, q_norm, k_norm, qkv_stride, table_stride,
    q_stride_t, q_stride_h, k_stride_s, k_stride_h, v_stride_s, v_stride_h, Hq, Hkv, S, P, half, D, eps,
    NORM_Q: tl.constexpr,  # queries are normed
    NORM_K: tl.constexpr,  # keys are normed
    HALF: tl.constexpr,  # half the turned features, rounded up to a power of two
    REST: tl.constexpr,  # features that pass unturned, rounded up; 0: none
    BLOCK: tl.constexpr,  # D, rounded up
):  # fmt: skip
    t, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    x, slot = qkv + t * qkv_stride + h * D, tl.load(slots + t).to(tl.int64)
    stored = (slot >= 0) & (slot < S)
    if h < Hq + Hkv:
        col, position = tl.arange(0, HALF), tl.load(positions + t).to(tl.int64)
        known = (position >= 0) & (position < P)  # a position outside the tables reads nothing and gives NaN
        c = tl.load(cos + position * table_stride + col, mask=known & (col < half), other=float("nan"))
        s = tl.load(sin + position * table_stride + col, mask=known & (col < half), other=float("nan"))
        if h < Hq:
            first, second, kept = _turned(x, q_norm, c, s, half, D, eps, NORM_Q, HALF, REST)
            _store_head(q + t * q_stride_t + h * q_stride_h, first, second, kept, half, D, HALF, REST)
        elif stored:
            first, second, kept = _turned(x, k_norm, c, s, half, D, eps, NORM_K, HALF, REST)
            _store_head(k + slot * k_stride_s + (h - Hq) * k_stride_h, first, second, kept, half, D, HALF, REST)
    elif stored:
        d = tl.arange(0, BLOCK)
        value = tl.load(x + d, mask=d < D, other=0.0)
        tl.store(v + slot * v_stride_s + (h - Hq - Hkv) * v_stride_h + d, value.to(v.dtype.element_ty), mask=d < D)


@triton.jit
def _silu_mul(
    x, out, x_stride, out_stride, F,
    BLOCK: tl.constexpr,  # columns of one program
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = col < F
    gate = tl.load(x + r * x_stride + col, mask=live, other=0.0).to(tl.float32)
    up = tl.load(x + r * x_stride + F + col, mask=live, other=0.0).to(tl.float32)
    silu = gate / (1.0 + tl.exp(-gate))  # a large negative gate divides by infinity: 0, as it should be
    tl.store(out + r * out_stride + col, (silu * up).to(out.dtype.element_ty), mask=live)


@triton.jit
def _embed(
    ids, table, out, table_stride, out_stride, V, H,
    BLOCK: tl.constexpr,  # columns of one program
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + r).to(tl.int64)
    known = (row >= 0) & (row < V)  # an id outside the table reads nothing and gives NaN
    x = tl.load(table + row * table_stride + col, mask=known & (col < H), other=float("nan"))
    tl.store(out + r * out_stride + col, x.to(out.dtype.element_ty), mask=col < H)


def rms_norm(x, weight, residual, out, summed, eps):
    """out = normed rows of x [M, H]; with a residual, of x + residual, which goes to summed."""
    M, H = x.shape
    block = triton.next_power_of_2(H)
    add = residual is not None
    other, total = (residual, summed) if add else (x, out)
    _rms_norm[(M,)](
        x, weight, other, out, total, x.stride(0), other.stride(0), out.stride(0), total.stride(0), H, eps,
        ADD=add, BLOCK=block, num_warps=min(max(block // 512, 1), 16),
    )  # fmt: skip


def rope(x, cos, sin, positions, out):
    """out [M, H, D] = heads of x turned by their row's position [M]."""
    (M, heads, D), (P, half) = x.shape, cos.shape
    tile = min(triton.next_power_of_2(heads), 8)
    rest = D - 2 * half
    _rope[(M, triton.cdiv(heads, tile))](
        x, cos, sin, positions, out, x.stride(0), x.stride(1), out.stride(0), out.stride(1), cos.stride(0), P, heads, half, D,
        HEADS=tile, HALF=triton.next_power_of_2(max(half, 1)), REST=triton.next_power_of_2(rest) if rest else 0, num_warps=4,
    )  # fmt: skip


def rope_append(qkv, cos, sin, positions, slots, q, k, v, q_norm, k_norm, eps):
    """q [M, Hq, D] = the queries of rows qkv, turned; their keys, turned, and values go to slots [M] of k and v [S, Hkv, D]."""
    (M, Hq, D), (S, Hkv), (P, half) = q.shape, k.shape[:2], cos.shape
    rest = D - 2 * half
    _rope_append[(M, Hq + 2 * Hkv)](
        qkv, cos, sin, positions, slots, q, k, v, qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm,
        qkv.stride(0), cos.stride(0), *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], Hq, Hkv, S, P, half, D, eps,
        NORM_Q=q_norm is not None, NORM_K=k_norm is not None, HALF=triton.next_power_of_2(max(half, 1)),
        REST=triton.next_power_of_2(rest) if rest else 0, BLOCK=triton.next_power_of_2(D), num_warps=1,
    )  # fmt: skip


def silu_mul(x, out):
    """out [M, F] = silu(gate) * up of x [M, 2F]."""
    M, F = out.shape
    _silu_mul[(M, triton.cdiv(F, 1024))](x, out, x.stride(0), out.stride(0), F, BLOCK=1024, num_warps=4)


def embed(ids, table, out):
    """out [M, H] = the rows of table [V, H] that ids [M] name."""
    (V, H), M = table.shape, ids.shape[0]
    _embed[(M, triton.cdiv(H, 1024))](ids, table, out, table.stride(0), out.stride(0), V, H, BLOCK=1024, num_warps=4)
