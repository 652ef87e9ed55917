"""row_stats, topk_logits and verify_greedy on Triton, and the read of the logits that the draws of sample.py share. Meaning:
reference/verify.py. Status: interpreted and compiled, not yet run on hardware.

A row of logits is cut into chunks of fixed width so that few rows still fill the chip. `read` goes over them once, for all that is
wanted of the row: statistics, the k largest, weights to draw by; `join`, a second, tiny launch, puts the chunks together in order.
Nothing depends on the number of rows or on what else is wanted, so a row's bits are its own. Traffic: V * itemsize bytes a row in,
once. Of equal values the lowest column wins everywhere. Source: online softmax, arXiv 1805.02867.
"""

import triton
import triton.language as tl

CHUNK = 4096  # columns of one program: 16 a thread, so that k passes over them stay in registers

_NONE = tl.constexpr(-(1 << 63))  # below the key of every number


@triton.jit
def best(t, col):
    """The largest of t, NaN above every number; the lowest col that holds it; what to subtract before an exponential."""
    none = t != t
    top = tl.max(tl.where(none, float("-inf"), t), 0)
    broken = tl.max(none.to(tl.int32), 0) > 0
    at = tl.min(tl.where(tl.where(broken, none, t == top), col, 0x7FFFFFFF), 0)
    base = tl.where(top == float("-inf"), 0.0, top)  # what is masked adds 0, not exp(inf - inf)
    return tl.where(broken, float("nan"), top), at, base


@triton.jit
def _read(
    x, n_rows, temperature, tops, args, sums, weights, kept, stride_b, stride_t, T, V,
    K: tl.constexpr,  # the largest to keep
    BLOCK: tl.constexpr,  # columns of one program
):  # fmt: skip
    r, c = tl.program_id(0), tl.program_id(1)
    b, t = (r // T).to(tl.int64), (r % T).to(tl.int64)
    used = T
    if n_rows is not None:
        used = tl.load(n_rows + b)
    if t >= used:
        return
    col = c * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + b * stride_b + t * stride_t + col, mask=col < V, other=float("-inf")).to(tl.float32)
    slot = r.to(tl.int64) * tl.num_programs(1) + c
    if tops is not None:
        top, at, base = best(v, col)
        tl.store(tops + slot, top)
        tl.store(args + slot, tl.where(top == float("-inf"), 0, at))
        if sums is not None:
            tl.store(sums + slot, tl.sum(tl.where(v == base, 1.0, tl.exp(v - base)), 0))
        if weights is not None:
            heat = tl.load(temperature + b)
            heat = tl.where(heat > 0, heat, 1.0)
            tl.store(weights + slot, tl.sum(tl.exp(tl.div_rn(v, heat) - tl.div_rn(base, heat)).to(tl.float64), 0))
    if K > 0:
        bits = tl.where(v == 0.0, 0.0, v).to(tl.int32, bitcast=True)  # -0 equals 0
        bits = tl.where(v == v, bits, 0x7FC00000)  # every NaN is one, above infinity
        order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the numbers
        keys = (order.to(tl.int64) << 32) | (0x7FFFFFFF - col).to(tl.int64)  # of equal values the lower column is the larger key
        keys = tl.where(v == float("-inf"), _NONE, keys)
        for i in range(K):
            largest = tl.max(keys, 0)
            tl.store(kept + slot * K + i, largest)
            keys = tl.where(keys == largest, _NONE, keys)


@triton.jit
def _join(
    tops, args, sums, kept, argmax, lse, most, values, ids, values_stride, ids_stride, chunks,
    K: tl.constexpr,  # the largest that were kept of each chunk, and are wanted of the row
    CHUNKS: tl.constexpr,  # chunks of a row, rounded up to a power of two
    KEYS: tl.constexpr,  # kept keys of all chunks, rounded up to a power of two
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    if argmax is not None:
        c = tl.arange(0, CHUNKS)
        t = tl.load(tops + r * chunks + c, mask=c < chunks, other=float("-inf"))
        a = tl.load(args + r * chunks + c, mask=c < chunks, other=0x7FFFFFFF)
        s = tl.load(sums + r * chunks + c, mask=c < chunks, other=0.0)
        top, at, base = best(t, a)
        tl.store(most + r, top)
        tl.store(lse + r, base + tl.log(tl.sum(s * tl.where(t == base, 1.0, tl.exp(t - base)), 0)))
        tl.store(argmax + r, at)
    if K > 0:
        i = tl.arange(0, KEYS)
        keys = tl.load(kept + r * chunks * K + i, mask=i < chunks * K, other=_NONE)
        for k in range(K):
            largest = tl.max(keys, 0)
            keys = tl.where(keys == largest, _NONE, keys)
            order = (largest >> 32).to(tl.int32)
            value = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
            known = largest != _NONE
            tl.store(values + r * values_stride + k, tl.where(known, value, float("-inf")).to(values.dtype.element_ty))
            tl.store(ids + r * ids_stride + k, tl.where(known, 0x7FFFFFFF - (largest & 0x7FFFFFFF).to(tl.int32), -1))


@triton.jit
def narrow(ids):
    """Ids in 32 bits. One that does not fit becomes the lowest number: it names nothing, and what its low bits name least of all."""
    low = ids.to(tl.int32)
    return tl.where(low.to(tl.int64) == ids, low, -0x80000000)


@triton.jit
def _walk(
    tokens, parents, chosen, n_rows, path, count, bonus, token_stride, parent_stride, chosen_stride, path_stride, T,
    BLOCK: tl.constexpr,  # rows of a tree, rounded up to a power of two
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    live = i < tl.minimum(tl.load(n_rows + b), T)
    token = tl.load(tokens + b * token_stride + i, mask=live, other=-1).to(tl.int64)
    parent = narrow(tl.load(parents + b * parent_stride + i, mask=live, other=-1))
    choice = tl.load(chosen + b * chosen_stride + i, mask=live, other=-1).to(tl.int64)
    row, steps = 0, 0
    emitted = tl.sum(tl.where(i == 0, choice, 0), 0)
    accepted = tl.full([BLOCK], -1, tl.int32)
    while row < BLOCK:
        accepted = tl.where(i == steps, row, accepted)
        steps += 1
        emitted = tl.sum(tl.where(i == row, choice, 0), 0)
        child = live & (parent == row) & (token == emitted) & (i > row)  # a parent stands before its child, so this ends
        row = tl.min(tl.where(child, i, BLOCK), 0)
    tl.store(path + b * path_stride + i, accepted, mask=i < T)
    tl.store(count + b, steps)
    tl.store(bonus + b, emitted.to(tl.int32))


def read(logits, scratch, stats=False, k=0, n_rows=None, temperature=None):
    """Go over logits [B, T, V] once; what is wanted of each chunk of each row, None for what is not.

    Returns tops f32 and args int32, sums f32 (with `stats`), weights f64 (with a temperature f32 [B]), each [B * T, chunks], and the
    keys of the k largest int64 [B * T, chunks, k]. n_rows int32 [B]: rows in use; others are not read. scratch(shape, dtype): a buffer.
    """
    B, T, V = logits.shape
    chunks, draws = triton.cdiv(V, CHUNK), temperature is not None
    wanted = (stats or draws, "f32"), (stats or draws, "i32"), (stats, "f32"), (draws, "f64")
    parts = [scratch((B * T, chunks), dtype) if want else None for want, dtype in wanted]
    parts.append(scratch((B * T, chunks, k), "i64") if k else None)
    _read[(B * T, chunks)](logits, n_rows, temperature, *parts, *logits.stride()[:2], T, V, K=k, BLOCK=CHUNK, num_warps=8)
    return parts


def join(parts, argmax, lse, top, values, ids):
    """Chunks that `read` made to rows: argmax int32, lse f32 and top f32 [R], the k largest as values and ids [R, k]; None: not wanted."""
    tops, args, sums, _, kept = parts
    (R, chunks), k = (kept if tops is None else tops).shape[:2], 0 if ids is None else ids.shape[1]
    strides = (0, 0) if ids is None else (values.stride(0), ids.stride(0))
    _join[(R,)](  # always as many warps: a sum's bits do not depend on what else is wanted
        tops, args, sums, kept, argmax, lse, top, values, ids, *strides, chunks,
        K=k, CHUNKS=triton.next_power_of_2(chunks), KEYS=triton.next_power_of_2(chunks * max(k, 1)), num_warps=8,
    )  # fmt: skip


def row_stats(logits, argmax, lse, top, scratch):
    """argmax int32, lse f32 and top f32 [R] of logits [R, V]."""
    join(read(logits[:, None], scratch, stats=True), argmax, lse, top, None, None)


def topk_logits(logits, values, ids, scratch):
    """The k largest of each row of logits [R, V]: values and int32 ids [R, k], k at most 32."""
    join(read(logits[:, None], scratch, k=ids.shape[1]), None, None, None, values, ids)


def verify_greedy(tokens, parents, chosen, n_rows, path, count, bonus):
    """Walk each tree [B, T] to the child that holds what its row chose: path int32 [B, T], count and bonus int32 [B]."""
    B, T = tokens.shape
    _walk[(B,)](
        tokens, parents, chosen, n_rows, path, count, bonus,
        tokens.stride(0), parents.stride(0), chosen.stride(0), path.stride(0), T, BLOCK=triton.next_power_of_2(T), num_warps=1,
    )  # fmt: skip
