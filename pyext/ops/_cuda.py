"""From tensors to the argument structs of the CUDA kernels (csrc/common/args_cuda.h).

The kernels take every float dtype that the table names, rows at any stride, so little is brought into form here. Checked tensors
only: below this line a wrong number is a wrong address. Nothing reads a value back: no call waits for the device.
"""

import ctypes

import torch
from torch import Tensor

from ramify import native_cuda as n
from ramify.backends import invariant
from ramify.ops._memory import crosses, ids32

Outputs = tuple[Tensor, ...]

CHUNK, MOST_CHUNKS = 512, 64
FEW = 128  # blocks of rows, about the processors of a chip: fewer are split over keys
AUTOMATIC, MMA, COLUMNS, ROWS, INVARIANT = range(5)
VARIANT = AUTOMATIC  # tests and benchmarks pick an attention kernel with it
ROW_BLOCK = 64  # kRowBlock
SAMPLE_TILE = 2048  # kSampleTile


def rms_norm(outs: Outputs, x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> None:
    """Normed rows into outs[0]; with a residual, x + residual into outs[1]."""
    out = outs[0]
    rows, result = _rows(x), _target(out)
    args = n.RmsNormArgs(rows=rows.shape[0], hidden=rows.shape[1], type=n.TYPES[x.dtype], eps=eps)
    args.x, args.x_stride = rows.data_ptr(), rows.stride(0)
    added = total = None
    if residual is not None:
        added, total = _rows(residual), _target(outs[1])
        args.residual, args.residual_stride = added.data_ptr(), added.stride(0)
        args.sum, args.sum_stride = total.data_ptr(), total.stride(0)
    args.weight, args.weight_type = weight.data_ptr(), n.TYPES[weight.dtype]
    args.out, args.out_stride = result.data_ptr(), result.stride(0)
    n.run(args, rows, added, total, weight, result)
    _store(result, out)
    if total is not None:
        _store(total, outs[1])


def rope(outs: Outputs, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    """x [..., H, D] rotated into outs[0]."""
    H, D = x.shape[-2:]
    rows, cos, sin, at = x.reshape(-1, H, D), cos.contiguous(), sin.contiguous(), ids32(positions.reshape(-1))
    result = outs[0] if outs[0].is_contiguous() else torch.empty_like(outs[0], memory_format=torch.contiguous_format)
    args = n.RopeArgs(rows=rows.shape[0], H=H, D=D, half=cos.shape[1], positions=cos.shape[0], type=n.TYPES[x.dtype])
    (args.x_stride_t, args.x_stride_h), (args.out_stride_t, args.out_stride_h) = rows.stride()[:2], (H * D, D)
    _run(args, x=rows, cos=cos, sin=sin, position=at, out=result)
    _store(result, outs[0])


def silu_mul(outs: Outputs, x: Tensor) -> None:
    """silu(gate) * up of rows that hold both."""
    rows, result = _rows(x), _target(outs[0])
    args = n.SiluMulArgs(rows=rows.shape[0], K=rows.shape[1] // 2, type=n.TYPES[x.dtype])
    args.x_stride, args.out_stride = rows.stride(0), result.stride(0)
    _run(args, x=rows, out=result)
    _store(result, outs[0])


def embed(outs: Outputs, ids: Tensor, table: Tensor) -> None:
    """Rows of the table; an id outside it gives NaN."""
    wanted, result = ids32(ids.reshape(-1)), _target(outs[0])
    args = n.EmbedArgs(rows=wanted.shape[0], V=table.shape[0], hidden=table.shape[1], type=n.TYPES[result.dtype])
    args.table_type, args.table_stride, args.out_stride = n.TYPES[table.dtype], table.stride(0), result.stride(0)
    _run(args, ids=wanted, table=table, out=result)
    _store(result, outs[0])


def rope_append(
    q: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor, k: Tensor, v: Tensor,
    q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
) -> None:  # fmt: skip
    """Rotated queries into q [M, Hq, D], keys and values into slots of k and v [S, Hkv, D]."""
    (M, Hq, D), (S, Hkv) = q.shape, k.shape[:2]
    norm = q_norm if q_norm is not None else k_norm
    cos, sin, positions, slots = cos.contiguous(), sin.contiguous(), ids32(positions), slots.contiguous()
    if crosses(qkv, k) or crosses(qkv, v):
        qkv = qkv.clone()  # a slot that a row of qkv lies in may be written before the row is read
    args = n.RopeAppendArgs(rows=M, Hq=Hq, Hkv=Hkv, D=D, half=cos.shape[1], positions=cos.shape[0], type=n.TYPES[qkv.dtype], eps=eps)
    args.qkv, args.qkv_stride = qkv.data_ptr(), qkv.stride(0)
    args.q_norm, args.k_norm, args.norm_type = n.pointer(q_norm), n.pointer(k_norm), 0 if norm is None else n.TYPES[norm.dtype]
    args.cos, args.sin, args.position, args.slot = cos.data_ptr(), sin.data_ptr(), positions.data_ptr(), slots.data_ptr()
    args.q, args.q_stride_t, args.q_stride_h = q.data_ptr(), q.stride(0), q.stride(1)
    args.cache_type, args.slots, args.k, args.v = n.TYPES[k.dtype], S, k.data_ptr(), v.data_ptr()
    args.k_stride_s, args.k_stride_h, args.v_stride_s, args.v_stride_h = *k.stride()[:2], *v.stride()[:2]
    n.run(args, qkv, cos, sin, positions, slots, q, k, v, q_norm, k_norm)


def kv_append(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor, rows: Tensor | None, table: Tensor | None) -> None:
    """Rows of every sequence into its slots from length[b] on."""
    commit_layers(k[None], v[None], k_cache[None], v_cache[None], None, rows, length, table)


def kv_commit(
    tail_k: Tensor, tail_v: Tensor, k_cache: Tensor, v_cache: Tensor, path: Tensor, count: Tensor, length: Tensor, table: Tensor | None
) -> None:
    """Accepted rows of every sequence into its slots from length[b] on."""
    if tail_k.ndim == 5:
        commit_layers(tail_k, tail_v, k_cache, v_cache, path, count, length, table)
    else:
        commit_layers(tail_k[None], tail_v[None], k_cache[None], v_cache[None], path, count, length, table)


def commit_layers(
    tail_k: Tensor, tail_v: Tensor, k: Tensor, v: Tensor, path: Tensor | None, count: Tensor | None, length: Tensor, table: Tensor | None
) -> None:
    """kv_commit for all layers in one launch: tails [L, B, T, Hkv, D] and caches [L, B or pages, slots, Hkv, D] of one float dtype each."""
    L, B, T, Hkv, D = tail_k.shape
    path = None if path is None else ids32(path)
    args = n.CommitArgs(B=B, A=T if path is None else path.shape[1], T=T, L=L, Hkv=Hkv, D=D)
    args.tail_type, args.cache_type = n.TYPES[tail_k.dtype], n.TYPES[k.dtype]
    for name, x in (("tail_k", tail_k), ("tail_v", tail_v), ("k", k), ("v", v)):
        setattr(args, name, x.data_ptr())
        for axis, stride in zip("lbth" if name.startswith("tail") else "lbsh", x.stride()):
            setattr(args, f"{name}_stride_{axis}", stride)
    if path is not None:
        args.path, args.path_stride = path.data_ptr(), path.stride(0)
    args.count, args.length, args.page, args.pages = n.pointer(count), length.data_ptr(), k.shape[2], k.shape[1]
    if table is not None:
        args.page_table, args.table_stride, args.table_width = table.data_ptr(), table.stride(0), table.shape[1]
    n.run(args, tail_k, tail_v, k, v, path, count, length, table)


def row_stats(outs: Outputs, logits: Tensor) -> None:
    """Arg-max, log-sum-exp and maximum of each row."""
    argmax, lse, top = outs
    _stats(logits[:, None], argmax=argmax, lse=lse, top=top)


def topk_logits(outs: Outputs, logits: Tensor, k: int) -> None:
    """The k largest of each row: values, ids."""
    values, ids = (_target(out) for out in outs)
    _stats(logits[:, None], k, values=values, ids=ids)
    _store(values, outs[0])
    _store(ids, outs[1])


def decide_rows(
    logits: Tensor, argmax: Tensor, lse: Tensor, top: Tensor, values: Tensor | None, ids: Tensor | None, temperature: Tensor | None,
    seed: Tensor | None, position: Tensor | None, drawn: Tensor | None,
) -> None:  # fmt: skip
    """row_stats, topk_logits and a token drawn from each row in one read of the logits; dense outputs, None for what nobody wants."""
    rows, k = logits[:, None], 0 if ids is None else ids.shape[1]
    weights = _stats(rows, k, temperature, argmax=argmax, lse=lse, top=top, values=values, ids=ids)
    if drawn is not None:
        how = {"temperature": temperature, "seed": seed, "position": position}
        _over(n.VerifySampleArgs(), rows, argmax=argmax, top=top, weights=weights, drawn=drawn, **how)


def verify_greedy(outs: Outputs, tokens: Tensor, parents: Tensor, argmax: Tensor, n_rows: Tensor) -> None:
    """Path, count and bonus of each sequence."""
    (B, T), results = tokens.shape, _path_of(outs)
    trees = {"tokens": ids32(tokens), "parents": ids32(parents), "argmax": ids32(argmax), "n_rows": n_rows.contiguous()}
    _run(n.VerifyGreedyArgs(B=B, T=T), **trees, **results)
    for made, out in zip(results.values(), outs):
        _store(made, out)


def verify_sample(
    outs: Outputs, logits: Tensor, tokens: Tensor, parents: Tensor, n_rows: Tensor, temperature: Tensor, seed: Tensor, position: Tensor,
    q: Tensor | None, mode: str,
) -> None:  # fmt: skip
    """Path, count and bonus of each sequence."""
    (B, T, _), args = logits.shape, n.VerifySampleArgs(mode=n.MODES[mode])
    n_rows, temperature, seed, position = (t.contiguous() for t in (n_rows, temperature, seed, position.long()))
    if q is not None:
        args.q_stride_b, args.q_stride_t = q.stride()[:2]
    argmax, drawn, top = (logits.new_empty(B, T, dtype=dtype) for dtype in (torch.int32, torch.int32, torch.float32))
    weights = _stats(logits, argmax=argmax, top=top, temperature=temperature, n_rows=n_rows)
    results = _path_of(outs)
    _over(
        args, logits, temperature=temperature, seed=seed, position=position, argmax=argmax, top=top, weights=weights, drawn=drawn, q=q,
        tokens=ids32(tokens), parents=ids32(parents), n_rows=n_rows, scale=top.new_empty(B, T, 2, dtype=torch.float64), **results,
    )  # fmt: skip
    for made, out in zip(results.values(), outs):
        _store(made, out)


def residual_sample(outs: Outputs, p: Tensor, q: Tensor, u: Tensor) -> None:
    """One id a row."""
    ids, args = _vector(outs[0]), n.ResidualSampleArgs(rows=p.shape[0], V=p.shape[1], type=n.TYPES[p.dtype])
    args.p_stride, args.q_stride = p.stride(0), q.stride(0)
    _run(args, p=p, q=q, u=u.contiguous(), ids=ids)
    _store(ids, outs[0])


def tree_attention(
    outs: Outputs, q: Tensor, k: Tensor, v: Tensor, tail_k: Tensor, tail_v: Tensor, ancestors: Tensor, prefix_len: Tensor,
    page_table: Tensor | None, scale: float, window: int, sink: int, tail_rows: Tensor | None,
) -> None:  # fmt: skip
    """o and lse; rows that are not in use give 0 and -inf."""
    args = n.AttentionArgs(Hkv=tail_k.shape[2], scale=scale, window=window, sink=sink, variant=INVARIANT if invariant() else VARIANT)
    ancestors = ancestors.contiguous()
    args.ancestors, args.words = ancestors.data_ptr(), ancestors.shape[2]
    args.prefix_len, args.tail_rows = prefix_len.data_ptr(), n.pointer(tail_rows)
    if page_table is not None:
        args.page_table, args.table_stride, args.table_width = page_table.data_ptr(), page_table.stride(0), page_table.shape[1]
    args.chunk = chunk_of(k.shape[1] * (1 if page_table is None else page_table.shape[1]))
    _place(args, "tail_k", tail_k, "bth")
    _place(args, "tail_v", tail_v, "bth")
    _attend(args, outs, q, k, v, tail_k, tail_v, ancestors, prefix_len, tail_rows, page_table)


def interval_attention(outs: Outputs, q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor, scale: float) -> None:
    """o and lse; rows that see nothing give 0 and -inf."""
    start, end = start.contiguous(), end.contiguous()
    (B, T, Hq, _), (S, Hkv) = q.shape, k.shape[1:3]
    args = n.AttentionArgs(Hkv=Hkv, scale=scale, start=start.data_ptr(), end=end.data_ptr(), variant=MMA if invariant() else VARIANT)
    few = B * Hkv * -(-T * (Hq // Hkv) // ROW_BLOCK) < FEW  # where rows are many, their parts would outweigh the keys
    args.chunk = chunk_of(S) if few or invariant() else max(64, -(-S // 64) * 64)
    _attend(args, outs, q, k, v, start, end)


def attention_colsum(
    outs: Outputs, q: Tensor, k: Tensor, lse: Tensor, prefix_len: Tensor, ancestors: Tensor | None, page_table: Tensor | None, scale: float,
    window: int, sink: int, tail_rows: Tensor | None,
) -> None:  # fmt: skip
    """Attention that each slot received."""
    out, ancestors = outs[0], None if ancestors is None else ancestors.contiguous()
    prefix_len, tail_rows = prefix_len.contiguous(), None if tail_rows is None else tail_rows.contiguous()
    args = n.ColsumArgs(Hkv=k.shape[2], type=n.TYPES[q.dtype], page=k.shape[1], pages=k.shape[0], scale=scale, window=window, sink=sink)
    args.B, args.T, args.Hq, args.D = q.shape
    for name, x, axes in (("q", q, "bth"), ("k", k, "bsh"), ("lse", lse, "bt"), ("out", out, "bh")):
        _place(args, name, x, axes)
    if page_table is not None:
        args.page_table, args.table_stride, args.table_width = page_table.data_ptr(), page_table.stride(0), page_table.shape[1]
    args.prefix_len, args.tail_rows = prefix_len.data_ptr(), n.pointer(tail_rows)
    if ancestors is not None:
        args.ancestors, args.words = ancestors.data_ptr(), ancestors.shape[2]
    n.run(args, q, k, lse, prefix_len, tail_rows, ancestors, page_table, out)


def merge_states(outs: Outputs, o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> None:
    """o and lse of two sides."""
    o1, o2, lse1, lse2 = _rows(o1), _rows(o2), lse1.reshape(-1), lse2.reshape(-1)
    out, lse = _target(outs[0]), _vector(outs[1])
    args = n.MergeStatesArgs(rows=o1.shape[0], D=o1.shape[1], type=n.TYPES[o1.dtype])
    args.o1_stride, args.o2_stride, args.out_stride = o1.stride(0), o2.stride(0), out.stride(0)
    _run(args, o1=o1, o2=o2, lse1=lse1, lse2=lse2, out=out, lse=lse)
    _store(out, outs[0])
    _store(lse, outs[1])


def _attend(args: ctypes.Structure, outs: Outputs, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None) -> None:
    """Launch attention; `rest`: what the pointers in args name besides q, k and v."""
    out, lse = outs
    result = torch.empty_like(out) if out.data_ptr() == q.data_ptr() else out  # blocks read q while others write
    args.B, args.T, args.Hq, args.D = q.shape
    args.type, args.page, args.pages = n.TYPES[q.dtype], k.shape[1], k.shape[0]
    for name, x, axes in (("q", q, "bth"), ("out", result, "bth"), ("lse", lse, "bt"), ("k", k, "bsh"), ("v", v, "bsh")):
        _place(args, name, x, axes)
    scratch = torch.empty(max(1, n.library().attention_scratch(ctypes.addressof(args)) // 4), dtype=torch.float32, device=q.device)
    args.scratch = scratch.data_ptr()
    n.run(args, q, result, lse, k, v, *rest, scratch)
    if result is not out:
        out.copy_(result)


def _place(args: ctypes.Structure, name: str, x: Tensor, axes: str) -> None:
    """Address and strides of a tensor."""
    setattr(args, name, x.data_ptr())
    for axis, stride in zip(axes, x.stride()):
        setattr(args, f"{name}_stride_{axis}", stride)


def chunk_of(slots: int) -> int:
    """Slots whose attention is summed before it joins the rest: by the size of the cache alone, never by what is in it."""
    chunk = CHUNK
    while chunk * MOST_CHUNKS < slots:
        chunk *= 2
    return chunk


def _stats(logits: Tensor, k: int = 0, temperature: Tensor | None = None, **named: Tensor | None) -> Tensor | None:
    """What RowStatsArgs names, of the rows of logits [B, T, V]; with a temperature also the weights of their tiles, which are returned."""
    (B, T, V), weights = logits.shape, None
    if temperature is not None:
        weights = logits.new_empty(B, T, -(-V // SAMPLE_TILE), 2, dtype=torch.float64)
    scratch = logits.new_empty(n.library().stats_scratch(B * T, V, k) // 8, dtype=torch.int64)
    named |= {"temperature": temperature, "weights": weights, "scratch": scratch, "tickets": n.tickets(logits.device, B * T)}
    _over(n.RowStatsArgs(topk=k), logits, **named)
    return weights


def _over(args: ctypes.Structure, logits: Tensor, **named: Tensor | None) -> None:
    """Launch a kernel over logits [B, T, V]."""
    (args.B, args.T, args.V), (args.stride_b, args.stride_t, _), args.type = logits.shape, logits.stride(), n.TYPES[logits.dtype]
    _run(args, logits=logits, **named)


def _run(args: ctypes.Structure, **named: Tensor | None) -> None:
    """Launch a kernel; the pointers of its struct are those of the tensors of the same names."""
    for name, tensor in named.items():
        setattr(args, name, n.pointer(tensor))
    n.run(args, *named.values())


def _path_of(outs: Outputs) -> dict[str, Tensor]:
    return {"path": _target(outs[0]), "count": _vector(outs[1]), "bonus": _vector(outs[2])}


def _rows(x: Tensor) -> Tensor:
    """x [..., K] as [M, K]; a view where strides allow."""
    return x.reshape(-1, x.shape[-1])


def _target(out: Tensor) -> Tensor:
    """Rows [M, N] for a kernel to write: `out` itself where its strides allow, else a buffer."""
    if out.is_contiguous():
        return out.view(-1, out.shape[-1])
    return torch.empty(out.numel() // out.shape[-1], out.shape[-1], dtype=out.dtype, device=out.device)


def _vector(out: Tensor) -> Tensor:
    """A dense tensor for a kernel to write: `out` itself where it is one, else a buffer."""
    return out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)


def _store(rows: Tensor, out: Tensor) -> None:
    """What a kernel wrote into its buffer is in `out` afterwards."""
    if rows.data_ptr() != out.data_ptr():
        out.copy_(rows.view(out.shape))
