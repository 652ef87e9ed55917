"""verify_sample and residual_sample on Triton. Meaning: reference/verify.py. Status: interpreted and compiled, not yet run on hardware.

Draws    every row of a tree has its own position, hence its own random number, so all rows draw at once: one read of the logits
         for the weights of each chunk (verify.read), one chunk again to find the token. No probability is written. A recorded step has
         the statistics and the k largest of its rows from that same read (decide_rows).
Tests    drawn children (modes "iid" and "wor") are tested one after the other by one program a sequence. A rejected child costs a
         read of the row and of q and a pass over the residual, kept in scratch: 20 bytes a vocabulary entry.
Numbers  Philox4x32-10 on (seed, position, purpose, lane), the bits of sampling/rng.py. Weights are f32, their sums f64: a decision
         equals the CPU's unless a random number lies within rounding (about 1e-7) of its border.
Sources  Leviathan et al. 2023; Miao et al. 2023; Chen et al. 2024.
"""

import triton
import triton.language as tl

from ramify.kernels.verify import CHUNK, best, join, narrow, read

SAMPLE, ACCEPT, RESIDUAL = tl.constexpr(0), tl.constexpr(2), tl.constexpr(3)  # purposes, as in sampling/rng.py
_BIG = tl.constexpr(0x7FFFFFFF)


@triton.jit
def uniform(seed, index, purpose, lane):
    """The number in [0, 1), f64, that belongs to these four integers."""
    low, high = (index & 0xFFFFFFFF).to(tl.uint32), ((index >> 32) & 0xFFFFFFFF).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(seed, low, high, lane.to(tl.uint32), (low * 0 + purpose).to(tl.uint32))
    bits = ((r1.to(tl.uint64) << 32) | r0.to(tl.uint64)) >> 11
    return bits.to(tl.int64).to(tl.float64) * 1.1102230246251565e-16  # 2^-53


@triton.jit
def _holder(w, at, target, base):
    """(first entry of `at` at which base + the running sum of w passes target, or _BIG; last entry of weight above 0, or -1)."""
    passed = base + tl.cumsum(w.to(tl.float64), 0) > target
    return tl.min(tl.where(passed & (w > 0), at, _BIG), 0), tl.max(tl.where(w > 0, at, -1), 0)


@triton.jit
def _weights(x, col, V, temperature, top):
    """exp(x / temperature - top) of the columns col; 0 beyond V."""
    t = tl.load(x + col, mask=col < V, other=float("-inf")).to(tl.float32)
    return tl.exp(tl.div_rn(t, temperature) - top)


@triton.jit
def _draw(
    x, n_rows, parents, temperature, seed, position, tops, args, weights, drawn, row_top, row_sum,
    stride_b, stride_t, parent_stride, T, V, chunks,
    CHUNKS: tl.constexpr,  # chunks of a row, rounded up to a power of two
    BLOCK: tl.constexpr,  # columns of a chunk
):  # fmt: skip
    r = tl.program_id(0)
    b, t = (r // T).to(tl.int64), (r % T).to(tl.int64)
    used = T
    if n_rows is not None:
        used = tl.load(n_rows + b)
    if t >= used:
        return
    c = tl.arange(0, CHUNKS)
    slot = r.to(tl.int64) * chunks + c
    each = tl.load(tops + slot, mask=c < chunks, other=float("-inf"))
    first = tl.load(args + slot, mask=c < chunks, other=_BIG)
    top, likeliest, _ = best(each, first)
    heat = tl.load(temperature + b)
    if heat > 0:
        top = tl.div_rn(top, heat)
        share = tl.load(weights + slot, mask=c < chunks, other=0.0) * tl.exp(tl.div_rn(each, heat) - top).to(tl.float64)
        total = tl.sum(share, 0)
        if row_top is not None:
            tl.store(row_top + r, top)
            tl.store(row_sum + r, total)
        index = tl.load(position + b).to(tl.int64)
        if parents is not None:
            row, parent = t, tl.load(parents + b * parent_stride + t).to(tl.int64)
            while (parent >= 0) & (parent < row):  # a parent stands before its child, so this ends and stays in the tree
                index += 1
                row = parent
                parent = tl.load(parents + b * parent_stride + row).to(tl.int64)
        target = uniform(tl.load(seed + b), index, SAMPLE, index * 0) * total
        chunk, last = _holder(share, c, target, 0.0)
        chunk = tl.maximum(tl.where(chunk == _BIG, last, chunk), 0)  # of no weight at all (NaN, say) nothing is drawn: -1
        before = tl.sum(tl.where(c < chunk, share, 0.0), 0)
        col = chunk * BLOCK + tl.arange(0, BLOCK)
        token, last = _holder(_weights(x + b * stride_b + t * stride_t, col, V, heat, top), col, target, before)
        tl.store(drawn + r, tl.where(token == _BIG, last, token))
    else:
        tl.store(drawn + r, likeliest)


@triton.jit
def _judge(
    x, q, drawn, row_top, row_sum, tokens, parents, n_rows, temperature, seed, position, rest, guess, path, count, bonus,
    stride_b, stride_t, q_stride_b, q_stride_t, token_stride, parent_stride, path_stride, T, V,
    WITHOUT: tl.constexpr,  # children were drawn without replacement: a rejected one leaves q
    ROWS: tl.constexpr,  # rows of a tree, rounded up to a power of two
    BLOCK: tl.constexpr,  # columns of a tile
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    live = i < tl.minimum(tl.load(n_rows + b), T)
    token = narrow(tl.load(tokens + b * token_stride + i, mask=live, other=-1))
    parent = narrow(tl.load(parents + b * parent_stride + i, mask=live, other=-1))
    heat, key, index = tl.load(temperature + b), tl.load(seed + b), tl.load(position + b).to(tl.int64)
    accepted = tl.full([ROWS], -1, tl.int32)
    row, steps, emitted = 0, 0, -1
    rest += b * 2 * V
    guess += b * V
    while row < ROWS:
        accepted = tl.where(i == steps, row, accepted)
        children = live & (parent == row) & (i > row)
        child = tl.min(tl.where(children, i, ROWS), 0)
        emitted = tl.load(drawn + b * T + row)
        following = tl.min(tl.where(children & (token == emitted), i, ROWS), 0)
        if (heat > 0) & (child < ROWS):
            top, mass = tl.load(row_top + b * T + row), tl.load(row_sum + b * T + row)
            far = b * 0 + row  # in 64 bits, as b is
            logits, draft = x + b * stride_b + far * stride_t, q + b * q_stride_b + far * q_stride_t
            now = tl.sum(tl.where(i == child, token, 0), 0)
            spread, p_now, q_now = mass * 0, mass * 0, mass * 0  # of q: its mass; of the child under test: p and q, not normalised
            for lo in range(0, V, BLOCK):
                w = _weights(logits, lo + j, V, heat, top)
                g = tl.load(draft + lo + j, mask=lo + j < V, other=0.0).to(tl.float32)
                tl.store(rest + lo + j, w, mask=lo + j < V)
                tl.store(guess + lo + j, g, mask=lo + j < V)
                spread += tl.sum(g.to(tl.float64), 0)
                p_now += tl.sum(tl.where(lo + j == now, w, 0.0), 0).to(tl.float64)  # of one entry: exact, and f64 would spill
                q_now += tl.sum(tl.where(lo + j == now, g, 0.0), 0).to(tl.float64)
            side, lane, following = 0, 0, ROWS
            emitted = -1
            while child < ROWS:
                u = uniform(key, index + steps, ACCEPT, index * 0 + lane)
                if u * (q_now / spread) < p_now / mass:
                    emitted, following, child = now, child, ROWS
                else:
                    tl.debug_barrier()  # the pass before stored what this one loads
                    children = children & (i > child)
                    child = tl.min(tl.where(children, i, ROWS), 0)
                    after = tl.sum(tl.where(i == child, token, 0), 0)
                    over_mass, over_spread = 1.0 / mass, 1.0 / spread
                    left, p_kept, p_now, q_next, spread_next = mass * 0, mass * 0, mass * 0, mass * 0, mass * 0
                    for lo in range(0, V, BLOCK):
                        w = tl.load(rest + side * V + lo + j, mask=lo + j < V, other=0.0)
                        g = tl.load(guess + lo + j, mask=lo + j < V, other=0.0)
                        r = tl.maximum(w.to(tl.float64) * over_mass - g.to(tl.float64) * over_spread, 0.0).to(tl.float32)
                        tl.store(rest + (1 - side) * V + lo + j, r, mask=lo + j < V)
                        if WITHOUT:
                            g = tl.where(lo + j == now, 0.0, g)
                            tl.store(guess + lo + j, g, mask=lo + j < V)
                        left += tl.sum(r.to(tl.float64), 0)
                        spread_next += tl.sum(g.to(tl.float64), 0)
                        p_kept += tl.sum(tl.where(lo + j == after, w, 0.0), 0).to(tl.float64)
                        p_now += tl.sum(tl.where(lo + j == after, r, 0.0), 0).to(tl.float64)
                        q_next += tl.sum(tl.where(lo + j == after, g, 0.0), 0).to(tl.float64)
                    if left > 0:
                        side, mass = 1 - side, left
                    else:  # p and q are equal up to rounding: nothing is left, and p stays
                        p_now = p_kept
                    q_now, spread, now = q_next, spread_next, after
                    lane += 1
                    if spread <= 0:  # no further child can have been drawn from q
                        child = ROWS
            if emitted < 0:
                tl.debug_barrier()
                target = uniform(key, index + steps, RESIDUAL, index * 0) * mass
                found, last, before = _BIG, -1, mass * 0
                for lo in range(0, V, BLOCK):
                    w = tl.load(rest + side * V + lo + j, mask=lo + j < V, other=0.0)
                    here, end = _holder(w, lo + j, target, before)
                    found, last = tl.minimum(found, here), tl.maximum(last, end)
                    before += tl.sum(w.to(tl.float64), 0)
                emitted = tl.where(found == _BIG, last, found)
            tl.debug_barrier()  # the next row overwrites the scratch
        row = following
        steps += 1
    tl.store(path + b * path_stride + i, accepted, mask=i < T)
    tl.store(count + b, steps)
    tl.store(bonus + b, emitted)


@triton.jit
def _residual_sums(
    p, q, sums, p_stride, q_stride, V,
    BLOCK: tl.constexpr,  # columns of one program
):  # fmt: skip
    r, c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    col = c * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(p + r * p_stride + col, mask=col < V, other=0.0).to(tl.float64)
    rest = tl.maximum(w - tl.load(q + r * q_stride + col, mask=col < V, other=0.0).to(tl.float64), 0.0)
    slot = 2 * (r * tl.num_programs(1) + c)
    tl.store(sums + slot, tl.sum(rest, 0))
    tl.store(sums + slot + 1, tl.sum(w, 0))


@triton.jit
def _residual_draw(
    p, q, u, sums, ids, p_stride, q_stride, V, chunks,
    CHUNKS: tl.constexpr,  # chunks of a row, rounded up to a power of two
    BLOCK: tl.constexpr,  # columns of a chunk
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CHUNKS)
    share = tl.load(sums + 2 * (r * chunks + c), mask=c < chunks, other=0.0)
    whole = tl.load(sums + 2 * (r * chunks + c) + 1, mask=c < chunks, other=0.0)
    nothing = tl.sum(share, 0) <= 0  # then p itself is drawn from
    share = tl.where(nothing, whole, share)
    target = tl.load(u + r).to(tl.float64) * tl.sum(share, 0)
    chunk, last = _holder(share, c, target, 0.0)
    chunk = tl.maximum(tl.where(chunk == _BIG, last, chunk), 0)  # of no weight at all (NaN, say) nothing is drawn: -1
    before = tl.sum(tl.where(c < chunk, share, 0.0), 0)
    col = chunk * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(p + r * p_stride + col, mask=col < V, other=0.0).to(tl.float64)
    rest = tl.maximum(w - tl.load(q + r * q_stride + col, mask=col < V, other=0.0).to(tl.float64), 0.0)
    token, last = _holder(tl.where(nothing, w, rest), col, target, before)
    tl.store(ids + r, tl.where(token == _BIG, last, token))


def draw(parts, logits, parents, n_rows, temperature, seed, position, drawn, top, total):
    """What plain decoding would emit after each row of logits [B, T, V], from what `read` made of them: drawn int32 [B, T].

    parents [B, T], or None where trees are of one row; n_rows int32 [B] or None. top f32 and total f64 [B, T], or None: what makes the
    logits of a row that is drawn probabilities.
    """
    (tops, args, _, weights, _), (B, T, V) = parts, logits.shape
    _draw[(B * T,)](
        logits, n_rows, parents, temperature, seed, position, tops, args, weights, drawn, top, total,
        *logits.stride()[:2], 0 if parents is None else parents.stride(0), T, V, tops.shape[1],
        CHUNKS=triton.next_power_of_2(tops.shape[1]), BLOCK=CHUNK, num_warps=8,
    )  # fmt: skip


def draw_rows(logits, parents, n_rows, temperature, seed, position, scratch):
    """drawn, top and total of `draw` for trees."""
    shape = logits.shape[:2]
    drawn, top, total = scratch(shape, "i32"), scratch(shape, "f32"), scratch(shape, "f64")
    parts = read(logits, scratch, n_rows=n_rows, temperature=temperature)
    draw(parts, logits, parents, n_rows, temperature, seed, position, drawn, top, total)
    return drawn, top, total


def decide_rows(logits, argmax, lse, top, values, ids, temperature, seed, position, drawn, scratch):
    """Statistics of rows of logits [R, V], values and ids [R, k] of their largest, and a token drawn int32 [R]; one read for all.

    temperature f32, seed and position int64 [R]. values and ids are None where nobody wants them, temperature to drawn likewise.
    """
    rows = logits[:, None]
    parts = read(rows, scratch, stats=True, k=0 if ids is None else ids.shape[1], temperature=temperature)
    join(parts, argmax, lse, top, values, ids)
    if drawn is not None:
        draw(parts, rows, None, None, temperature, seed, position, drawn, None, None)


def judge(logits, q, drawn, top, total, tokens, parents, n_rows, temperature, seed, position, without, path, count, bonus, scratch):
    """Test the drawn children of each visited row: path int32 [B, T], count and bonus int32 [B]."""
    B, T, V = logits.shape
    _judge[(B,)](
        logits, q, drawn, top, total, tokens, parents, n_rows, temperature, seed, position,
        scratch((B, 2, V), "f32"), scratch((B, V), "f32"), path, count, bonus,
        *logits.stride()[:2], *q.stride()[:2], tokens.stride(0), parents.stride(0), path.stride(0), T, V,
        WITHOUT=without, ROWS=triton.next_power_of_2(T), BLOCK=CHUNK, num_warps=16,
    )  # fmt: skip


def residual_sample(p, q, u, ids, scratch):
    """ids int32 [R], drawn from norm([p - q]_+) of p, q [R, V] by the numbers u [R]."""
    R, V = p.shape
    chunks = triton.cdiv(V, CHUNK)
    sums = scratch((R, chunks, 2), "f64")
    _residual_sums[(R, chunks)](p, q, sums, p.stride(0), q.stride(0), V, BLOCK=CHUNK, num_warps=8)
    _residual_draw[(R,)](
        p, q, u, sums, ids, p.stride(0), q.stride(0), V, chunks, CHUNKS=triton.next_power_of_2(chunks), BLOCK=CHUNK, num_warps=8
    )  # fmt: skip
