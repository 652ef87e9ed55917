"""row_stats, topk_logits, verify_greedy and the draws of verification on Triton. Meaning: reference/verify.py.

Status: interpreted and compiled, not yet run on hardware.

A row of logits is cut into chunks of fixed width so that few rows still fill the chip; a second, tiny launch joins them in order.
Nothing depends on the number of rows, so a row's bits are its own. Traffic: V * itemsize bytes a row in, once; a draw reads one
chunk again. Of equal values the lowest column wins everywhere. Random numbers: Philox4x32-10 on (seed, position, purpose), the
bits of sampling/rng.py. Sources: online softmax, arXiv 1805.02867; speculative sampling, Leviathan et al. 2023.
"""

import triton
import triton.language as tl

CHUNK = 4096  # columns of one program of row_stats and of the draws
TOPK_CHUNK = 2048  # columns of one program of topk_logits: 16 a thread, so that k passes over them stay in registers

_NONE = tl.constexpr(-(1 << 63))  # below the key of every number


@triton.jit
def _best(t, col):
    """The largest of t, NaN above every number; the lowest col that holds it; what to subtract before an exponential."""
    none = t != t
    top = tl.max(tl.where(none, float("-inf"), t), 0)
    broken = tl.max(none.to(tl.int32), 0) > 0
    at = tl.min(tl.where(tl.where(broken, none, t == top), col, 0x7FFFFFFF), 0)
    base = tl.where(top == float("-inf"), 0.0, top)  # what is masked adds 0, not exp(inf - inf)
    return tl.where(broken, float("nan"), top), at, base


@triton.jit
def _row_stats(
    x, tops, sums, args, row_stride, V,
    BLOCK: tl.constexpr,  # columns of one program
):  # fmt: skip
    r, c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    col = c * BLOCK + tl.arange(0, BLOCK)
    t = tl.load(x + r * row_stride + col, mask=col < V, other=float("-inf")).to(tl.float32)
    top, at, base = _best(t, col)
    slot = r * tl.num_programs(1) + c
    tl.store(tops + slot, top)
    tl.store(sums + slot, tl.sum(tl.where(t == base, 1.0, tl.exp(t - base)), 0))
    tl.store(args + slot, tl.where(top == float("-inf"), 0, at))


@triton.jit
def _join_stats(
    tops, sums, args, argmax, lse, most, chunks,
    BLOCK: tl.constexpr,  # chunks of a row, rounded up to a power of two
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    t = tl.load(tops + r * chunks + c, mask=c < chunks, other=float("-inf"))
    s = tl.load(sums + r * chunks + c, mask=c < chunks, other=0.0)
    a = tl.load(args + r * chunks + c, mask=c < chunks, other=0x7FFFFFFF)
    top, at, base = _best(t, a)
    tl.store(most + r, top)
    tl.store(lse + r, base + tl.log(tl.sum(s * tl.where(t == base, 1.0, tl.exp(t - base)), 0)))
    tl.store(argmax + r, at)


@triton.jit
def _largest(keys, out, K: tl.constexpr):
    """Store the K largest of unique keys at out, descending."""
    for i in range(K):
        best = tl.max(keys, 0)
        tl.store(out + i, best)
        keys = tl.where(keys == best, _NONE, keys)


@triton.jit
def _topk_chunk(
    x, part, row_stride, V,
    K: tl.constexpr,  # how many to keep
    BLOCK: tl.constexpr,  # columns of one program
):  # fmt: skip
    r, c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    col = c * BLOCK + tl.arange(0, BLOCK)
    t = tl.load(x + r * row_stride + col, mask=col < V, other=float("-inf")).to(tl.float32)
    bits = tl.where(t == 0.0, 0.0, t).to(tl.int32, bitcast=True)  # -0 equals 0
    bits = tl.where(t == t, bits, 0x7FC00000)  # every NaN is one, above infinity
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the numbers
    keys = (order.to(tl.int64) << 32) | (0x7FFFFFFF - col).to(tl.int64)  # of equal values the lower column is the larger key
    keys = tl.where(t == float("-inf"), _NONE, keys)
    _largest(keys, part + (r * tl.num_programs(1) + c) * K, K)


@triton.jit
def _topk_join(
    part, values, ids, values_stride, ids_stride, count,
    K: tl.constexpr,
    BLOCK: tl.constexpr,  # kept keys of all chunks, rounded up to a power of two
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    keys = tl.load(part + r * count + i, mask=i < count, other=_NONE)
    for k in range(K):
        best = tl.max(keys, 0)
        keys = tl.where(keys == best, _NONE, keys)
        order = (best >> 32).to(tl.int32)
        value = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        known = best != _NONE
        tl.store(values + r * values_stride + k, tl.where(known, value, float("-inf")).to(values.dtype.element_ty))
        tl.store(ids + r * ids_stride + k, tl.where(known, 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32), -1))


@triton.jit
def _walk(
    tokens, parents, chosen, n_rows, path, count, bonus, token_stride, parent_stride, chosen_stride, path_stride, T,
    BLOCK: tl.constexpr,  # rows of a tree, rounded up to a power of two
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    live = i < tl.minimum(tl.load(n_rows + b), T)
    token = tl.load(tokens + b * token_stride + i, mask=live, other=-1).to(tl.int64)
    parent = tl.load(parents + b * parent_stride + i, mask=live, other=-1).to(tl.int32)
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


def row_stats(logits, argmax, lse, top, scratch):
    """argmax int32, lse f32 and top f32 [R] of logits [R, V]; scratch(shape, dtype) makes a buffer."""
    R, V = logits.shape
    chunks = triton.cdiv(V, CHUNK)
    tops, sums, args = scratch((R, chunks), "f32"), scratch((R, chunks), "f32"), scratch((R, chunks), "i32")
    _row_stats[(R, chunks)](logits, tops, sums, args, logits.stride(0), V, BLOCK=CHUNK, num_warps=8)
    _join_stats[(R,)](tops, sums, args, argmax, lse, top, chunks, BLOCK=triton.next_power_of_2(chunks), num_warps=1)


def topk_logits(logits, values, ids, scratch):
    """The k largest of each row of logits [R, V]: values and int32 ids [R, k], k at most 32."""
    (R, V), k = logits.shape, values.shape[1]
    chunks = triton.cdiv(V, TOPK_CHUNK)
    part = scratch((R, chunks, k), "i64")
    _topk_chunk[(R, chunks)](logits, part, logits.stride(0), V, K=k, BLOCK=TOPK_CHUNK, num_warps=4)
    block = triton.next_power_of_2(chunks * k)
    _topk_join[(R,)](
        part, values, ids, values.stride(0), ids.stride(0), chunks * k, K=k, BLOCK=block, num_warps=min(max(block // 512, 1), 8)
    )  # fmt: skip


def verify_greedy(tokens, parents, chosen, n_rows, path, count, bonus):
    """Walk each tree [B, T] to the child that holds what its row chose: path int32 [B, T], count and bonus int32 [B]."""
    B, T = tokens.shape
    _walk[(B,)](
        tokens, parents, chosen, n_rows, path, count, bonus,
        tokens.stride(0), parents.stride(0), chosen.stride(0), path.stride(0), T, BLOCK=triton.next_power_of_2(T), num_warps=1,
    )  # fmt: skip
