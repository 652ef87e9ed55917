"""From tensors to the Triton kernels of ramify.kernels.

The kernels take rows with a dense last axis; a layout that is no view of rows is copied here. Checked tensors only. Importing
this module imports triton, so nothing but the first launch does.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ramify.kernels import attention, colsum, draft, glue, interval, kv, sample, verify
from ramify.kernels import linear_low_bit as low_bit
from ramify.ops._memory import apart, crosses
from ramify.quant.formats import Format

Outputs = tuple[Tensor, ...]


def rms_norm(outs: Outputs, x: Tensor, weight: Tensor, eps: float) -> None:
    """Normed rows into outs[0]."""
    out = _target(outs[0])
    glue.rms_norm(_rows(x), weight, None, out, None, eps)
    _store(out, outs[0])


def rms_norm_residual(outs: Outputs, x: Tensor, weight: Tensor, residual: Tensor, eps: float) -> None:
    """Normed rows of x + residual into outs[0], the sum into outs[1]."""
    out, summed = map(_target, outs)
    glue.rms_norm(_rows(x), weight, _rows(residual), out, summed, eps)
    _store(out, outs[0])
    _store(summed, outs[1])


def rope(outs: Outputs, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    """x [..., H, D] rotated into outs[0]."""
    heads, D = x.shape[-2:]
    out = _viewed(outs[0], (-1, heads, D))
    sin = sin if sin.stride() == cos.stride() else sin.contiguous()
    cos = cos if sin.stride() == cos.stride() else cos.contiguous()
    glue.rope(x.reshape(-1, heads, D), cos, sin, positions.reshape(-1), out)
    _store(out, outs[0])


def rope_append(
    q: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor, k: Tensor, v: Tensor,
    q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
) -> None:  # fmt: skip
    """Rotated queries into q, keys and values into slots of k and v."""
    if crosses(qkv, k) or crosses(qkv, v):
        qkv = qkv.clone()  # a slot that a row of qkv lies in may be written before the row is read
    cos, sin, positions, slots = cos.contiguous(), sin.contiguous(), positions.contiguous(), slots.contiguous()
    glue.rope_append(qkv, cos, sin, positions, slots, q, k, v, q_norm, k_norm, eps)


def silu_mul(outs: Outputs, x: Tensor) -> None:
    """silu(gate) * up of rows that hold both."""
    out = _target(outs[0])
    glue.silu_mul(_rows(x), out)
    _store(out, outs[0])


def embed(outs: Outputs, ids: Tensor, table: Tensor, dtype: torch.dtype) -> None:
    """Rows of the table."""
    out = _target(outs[0])
    glue.embed(ids.reshape(-1), table, out)
    _store(out, outs[0])


def linear_low_bit(
    outs: Outputs,
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    perm: Tensor | None,
    panels: Tensor | None,
    form: str,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    activations: str,
) -> None:
    """activation(x W^T + bias) + residual over a low-bit weight in its canonical form; x is not rounded."""
    f, out, rows = Format.parse(form), _target(outs[0]), _rows(x)
    if perm is not None:
        rows = torch.empty_like(rows, memory_format=torch.contiguous_format)
        low_bit.reorder(_rows(x), perm.contiguous(), rows)
    planes = low_bit.planes_of(f.kind, rows.shape[1], x.dtype.itemsize)
    if planes > 1:
        rows = _words(rows, planes * x.dtype.itemsize)
    codes, added = _words(codes.view(torch.uint8), planes * f.bits // 8), None if residual is None else _rows(residual)
    silu, scratch = activation == "silu", _scratch_of(x)
    low_bit.linear_low_bit(rows, codes, scale, zero, f.kind, f.group, planes, bias, silu, added, out, x.dtype, scratch)
    _store(out, outs[0])


def row_stats(outs: Outputs, logits: Tensor) -> None:
    """Arg-max, log-sum-exp and maximum of each row."""
    argmax, lse, top = map(_vector, outs)
    verify.row_stats(logits, argmax, lse, top, _scratch_of(logits))
    for got, out in zip((argmax, lse, top), outs):
        _store(got, out)


def topk_logits(outs: Outputs, logits: Tensor, k: int) -> None:
    """The k largest of each row: values, ids."""
    verify.topk_logits(logits, *outs, _scratch_of(logits))


def decide_rows(
    logits: Tensor, argmax: Tensor, lse: Tensor, top: Tensor, values: Tensor | None, ids: Tensor | None, temperature: Tensor | None,
    seed: Tensor | None, position: Tensor | None, drawn: Tensor | None,
) -> None:  # fmt: skip
    """row_stats, topk_logits and a token drawn from each row in one read of the logits; dense outputs, None for what nobody wants."""
    sample.decide_rows(logits, argmax, lse, top, values, ids, temperature, seed, position, drawn, _scratch_of(logits))


def verify_greedy(outs: Outputs, tokens: Tensor, parents: Tensor, argmax: Tensor, n_rows: Tensor) -> None:
    """Path, count and bonus of each tree."""
    count, bonus = map(_vector, outs[1:])
    verify.verify_greedy(tokens, parents, argmax, n_rows.contiguous(), outs[0], count, bonus)
    _store(count, outs[1])
    _store(bonus, outs[2])


def tree_attention(
    outs: Outputs,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tail_k: Tensor,
    tail_v: Tensor,
    ancestors: Tensor,
    prefix_len: Tensor,
    page_table: Tensor | None,
    scale: float,
    window: int,
    sink: int,
    tail_rows: Tensor | None,
) -> None:
    """o and lse, straight into the outputs."""
    used = None if tail_rows is None else tail_rows.contiguous()
    attention.tree_attention(
        q, k, v, tail_k, tail_v, ancestors, prefix_len.contiguous(), page_table, scale, window, sink, used, *outs, _scratch_of(q)
    )


def interval_attention(outs: Outputs, q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor, scale: float) -> None:
    """o and lse, straight into the outputs."""
    interval.interval_attention(q, k, v, start, end, scale, *outs)


def attention_colsum(
    outs: Outputs, q: Tensor, k: Tensor, lse: Tensor, prefix_len: Tensor, ancestors: Tensor | None, page_table: Tensor | None, scale: float,
    window: int, sink: int, tail_rows: Tensor | None,
) -> None:  # fmt: skip
    """Attention that each slot received, straight into the output."""
    used = None if tail_rows is None else tail_rows.contiguous()
    colsum.attention_colsum(q, k, lse, prefix_len.contiguous(), ancestors, page_table, scale, window, sink, used, outs[0])


def merge_states(outs: Outputs, o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> None:
    """o and lse of two sides."""
    out, lse = _target(outs[0]), _vector(outs[1])
    interval.merge_states(_rows(o1), lse1.reshape(-1), _rows(o2), lse2.reshape(-1), out, lse.view(-1))
    _store(out, outs[0])
    _store(lse, outs[1])


def verify_sample(
    outs: Outputs,
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    n_rows: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    q: Tensor | None,
    mode: str,
) -> None:
    """Path, count and bonus of each tree."""
    n_rows, temperature, seed, position = (x.contiguous() for x in (n_rows, temperature, seed, position))
    count, bonus = map(_vector, outs[1:])
    scratch = _scratch_of(logits)
    drawn, top, total = sample.draw_rows(logits, parents, n_rows, temperature, seed, position, scratch)
    if q is None:
        verify.verify_greedy(tokens, parents, drawn, n_rows, outs[0], count, bonus)
    else:
        drawn_rows = drawn, top, total, tokens, parents, n_rows, temperature, seed, position
        sample.judge(logits, q, *drawn_rows, mode == "wor", outs[0], count, bonus, scratch)
    _store(count, outs[1])
    _store(bonus, outs[2])


def residual_sample(outs: Outputs, p: Tensor, q: Tensor, u: Tensor) -> None:
    """One id a row."""
    ids = _vector(outs[0])
    sample.residual_sample(p, q, u.contiguous(), ids, _scratch_of(p))
    _store(ids, outs[0])


def kv_append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor, n_rows: Tensor | None, page_table: Tensor | None
) -> None:
    """Rows of k and v behind what the caches hold."""
    if k.numel():
        count = None if n_rows is None else n_rows.contiguous()
        kv.place(k[None], v[None], k_cache[None], v_cache[None], None, count, length.contiguous(), page_table)


def kv_commit(
    tail_k: Tensor, tail_v: Tensor, k_cache: Tensor, v_cache: Tensor, path: Tensor, count: Tensor, length: Tensor, page_table: Tensor | None
) -> None:
    """The accepted rows of a tree behind what the caches hold, all layers in one launch."""
    if tail_k.numel() and path.numel():
        layers = (x if x.ndim == 5 else x[None] for x in (tail_k, tail_v, k_cache, v_cache))
        kv.place(*layers, path, count.contiguous(), length.contiguous(), page_table)


def table_draft(outs: Outputs, table: Tensor, roots: Tensor, parents: Tensor, ranks: Tensor) -> None:
    """Tokens of each sequence's tree, straight into the output."""
    draft.table_draft(table, roots.contiguous(), parents.contiguous(), ranks.contiguous(), outs[0])


def table_learn(table: Tensor, tokens: Tensor, likely: Tensor) -> None:
    """Rows of the table whose tokens are here."""
    if tokens.numel():
        draft.table_learn(table, apart(tokens.contiguous(), table), apart(likely, table))


_SCRATCH = {"f32": torch.float32, "f64": torch.float64, "i32": torch.int32, "i64": torch.int64}


def _scratch_of(x: Tensor) -> Callable[[tuple[int, ...], str], Tensor]:
    """Makes buffers on x's device. The caching allocator keeps them, so a captured graph replays into the same ones."""
    return lambda shape, dtype: torch.empty(shape, dtype=_SCRATCH[dtype], device=x.device)


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _words(x: Tensor, size: int) -> Tensor:
    """Rows of x as words of so many bytes; a view where its rows start at whole words."""
    whole = x.data_ptr() % size == 0 and x.stride(0) * x.itemsize % size == 0
    return (x if whole else x.clone(memory_format=torch.contiguous_format)).view(_WORDS[size])


def _vector(out: Tensor) -> Tensor:
    """A dense vector for a kernel to write: `out` itself where it is one."""
    return out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)


def _rows(x: Tensor) -> Tensor:
    """x [..., K] as rows [M, K]; a view where strides allow."""
    return x.reshape(-1, x.shape[-1])


def _target(out: Tensor) -> Tensor:
    """Rows [M, N] for a kernel to write: a view of `out` where there is one, else a buffer."""
    return _viewed(out, (-1, out.shape[-1]))


def _viewed(out: Tensor, shape: tuple[int, ...]) -> Tensor:
    try:
        return out.view(shape)
    except RuntimeError:  # its strides allow no such view
        return torch.empty_like(out, memory_format=torch.contiguous_format).view(shape)


def _store(rows: Tensor, out: Tensor) -> None:
    """What a kernel wrote into the buffer of `_target(out)` is in `out` afterwards."""
    if rows.data_ptr() != out.data_ptr():
        out.copy_(rows.view(out.shape))
