"""What a GPU is timed on: ops in shapes, every way to compute each, and what is right.

`cells(device, tiny)` says op, shape, bytes and operations once; `ways(op)` says who takes part: our kernels by backend, torch, and
peers that may not be there. A way marked slow compiles for longer than all the others run: it has its turn when they are done.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gpu_linear
from benchmarks import tree_attention as tree
from benchmarks.peers import gpu_attention as peers
from benchmarks.registry import Case, Provider
from ramify import backends, ops, reference
from ramify.draft.token_recycling import WIDTH, template
from ramify.quant import Format
from ramify.testing.tensors import random_tree

BF16, F32 = torch.bfloat16, torch.float32
OURS = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}
"""Device -> backends of ours."""


@dataclass
class Cell:
    """One op in one shape; `make` builds its arguments and what they must give."""

    op: str
    dtype: str
    shape: dict[str, int]
    make: Callable[[], Case]


def cells(device: str, tiny: bool = False, seed: int = 0) -> Iterator[Cell]:
    """Every cell, the most important first."""
    for context in (64,) if tiny else (2048, 8192, 32768):
        for T in (1, 8) if tiny else (1, 8, 32, 64):
            yield Cell("tree_attention", "bf16", {"context": context, "T": T}, lambda c=context, t=T: _tree(device, tiny, c, t, seed))
    for form, N, K, M in gpu_linear.TINY if tiny else gpu_linear.CELLS:
        shape = {"N": N, "K": K, "M": M, "bits": Format.parse(form).bits, "group": Format.parse(form).group}
        yield Cell("linear", form, shape, lambda f=form, n=N, k=K, m=M: gpu_linear.layer(device, f, n, k, m, seed))
    V, H, S = (300, 64, 40) if tiny else (128256, 4096, 2048)
    for R in (2,) if tiny else (1, 8, 64):
        yield Cell("row_stats", "bf16", {"R": R, "V": V}, lambda r=R: _logits(device, r, V, seed, reference.row_stats))
        yield Cell("topk_logits", "bf16", {"R": R, "V": V, "k": 10}, lambda r=R: _logits(device, r, V, seed, lambda x: x.topk(10)[:1]))
    B, T, L = (2, 5, 2) if tiny else (8, 64, 32)
    yield Cell("verify_greedy", "int32", {"B": B, "T": T}, lambda: _greedy(device, B, T, seed))
    yield Cell("verify_sample", "f32", {"B": 1, "T": T, "V": V}, lambda: _sample(device, T, V, seed))
    yield Cell("residual_sample", "f32", {"R": B, "V": V}, lambda: _residual(device, B, V, seed))
    yield Cell("table_draft", "int32", {"B": B, "T": 81, "V": V}, lambda: _draft(device, B, V, seed))
    yield Cell("table_learn", "int32", {"M": 81 * B, "V": V}, lambda: _learn(device, 81 * B, V, seed))
    yield Cell("kv_commit", "bf16", {"L": L, "T": T, "A": T // 4 + 1, "S": S}, lambda: _commit(device, L, T, T // 4 + 1, S, seed))
    yield Cell("kv_append", "bf16", {"T": T, "S": S}, lambda: _append(device, T, S, seed))
    yield Cell("rope_append", "bf16", {"rows": T, "S": S}, lambda: _rope_append(device, T, S, seed))
    yield Cell("attention_colsum", "bf16", {"T": T, "S": 4 * S}, lambda: _colsum(device, tiny, T, 4 * S, seed))
    yield Cell("rms_norm", "bf16", {"rows": T, "H": H}, lambda: _norm(device, T, H, seed))
    yield Cell("silu_mul", "bf16", {"rows": T, "F": 3 * H}, lambda: _silu(device, T, 3 * H, seed))
    yield Cell("rope", "bf16", {"rows": T, "H": H // 64, "D": 64}, lambda: _rope(device, T, H // 64, seed))
    yield Cell("embed", "bf16", {"rows": T, "H": H}, lambda: _embed(device, T, H, 8 * H, seed))
    yield Cell("interval_attention", "bf16", {"T": S, "S": S}, lambda: _causal(device, tiny, S, seed))
    yield Cell("merge_states", "bf16", {"T": T, "H": 32, "D": 64}, lambda: _merge(device, T, seed))


def _rng(device: str, seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *shape, dtype=BF16: torch.randn(shape, generator=generator, device=device).to(dtype)


def _tree(device: str, tiny: bool, context: int, T: int, seed: int) -> Case:
    size = "tiny" if tiny else "large"
    x, (Hq, Hkv, D) = tree.Inputs(size, context, T, "bf16", seed, device), tree.SIZES[size]
    flops, moved = 4 * Hq * T * (context + T) * D, 4 * (context + T) * Hkv * D + 4 * T * Hq * D
    return Case((x,), moved, flops, "bf16", lambda: (tree.exact(x),), tree.LIMITS["bf16"])


def _logits(device: str, R: int, V: int, seed: int, want: Callable[[Tensor], Any]) -> Case:
    x = 4 * _rng(device, seed)(R, V)
    return Case((x,), 2 * R * V, 3 * R * V, "fp32", lambda: tuple(want(x.double())), 1e-4)


def _greedy(device: str, B: int, T: int, seed: int) -> Case:
    g = torch.Generator().manual_seed(seed)
    parents = torch.tensor([random_tree(T, "bushy", g) for _ in range(B)]).int()
    argmax = torch.randint(0, 50, (B, T), generator=g).int()
    tokens = 50 + torch.arange(T).int().repeat(B, 1)  # that nobody asks for, but for the first child of every row
    for b in range(B):
        for row in reversed(range(1, T)):
            first = parents[b].tolist().index(int(parents[b, row]))
            tokens[b, first] = argmax[b, parents[b, row]]
    args = tokens, parents, argmax, torch.full((B,), T, dtype=torch.int32)
    return Case(tuple(x.to(device) for x in args), 12 * B * T, 0, "fp32", lambda: reference.verify_greedy(*args), 0.0)


def _sample(device: str, T: int, V: int, seed: int) -> Case:
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(1, T, V, generator=g)
    parents = torch.tensor([random_tree(T, "bushy", g)]).int()
    tokens = torch.randint(0, V, (1, T), generator=g).int()
    one = torch.ones(1, dtype=torch.int32)
    args = logits, tokens, parents, one * T, torch.ones(1), torch.tensor([7]), one.long()
    want = reference.verify_sample
    return Case(tuple(x.to(device) for x in args), 4 * T * V, 3 * T * V, "fp32", lambda: want(*args, None, mode="det"), 0.0)


def _residual(device: str, R: int, V: int, seed: int) -> Case:
    g = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(R, V, generator=g).softmax(-1) for _ in "pq")
    u = torch.rand(R, generator=g, dtype=torch.float64)
    want = reference.residual_sample
    return Case((p.to(device), q.to(device), u.to(device)), 8 * R * V, 2 * R * V, "fp32", lambda: (want(p.double(), q.double(), u),), 0.0)


def _draft(device: str, B: int, V: int, seed: int) -> Case:
    """Token Recycling's tree, of 6 levels, from a table that knows every token."""
    g = torch.Generator().manual_seed(seed)
    levels, parents = template(81)
    ranks = torch.zeros(81, dtype=torch.int32)
    for rows, _, rank in levels:
        ranks[torch.from_numpy(rows)] = torch.from_numpy(rank).int()
    table, roots = torch.randint(0, V, (V, WIDTH), generator=g).int(), torch.randint(0, V, (B,), generator=g).int()
    args = table, roots, torch.tensor(parents, dtype=torch.int32), ranks
    return Case(tuple(x.to(device) for x in args), 8 * 81 * (B + 1), 0, "fp32", lambda: (reference.table_draft(*args),), 0.0)


def _learn(device: str, M: int, V: int, seed: int) -> Case:
    """The rows of a step, a third of whose tokens come again; the table is written in place, the same at every call."""
    g = torch.Generator().manual_seed(seed)
    table, likely = (torch.randint(0, V, (n, WIDTH), generator=g).int() for n in (V, M))
    tokens = torch.randint(0, V, (M,), generator=g).int()
    tokens[::3] = tokens[1::3][: len(tokens[::3])]

    def want() -> tuple[Tensor, ...]:
        after = table.clone()
        reference.table_learn(after, tokens, likely)
        return (after,)

    return Case(tuple(x.to(device) for x in (table.clone(), tokens, likely)), M * (4 + 8 * WIDTH), 0, "fp32", want, 0.0)


def _commit(device: str, L: int, T: int, A: int, S: int, seed: int) -> Case:
    """The accepted rows of one sequence, all layers; the caches are written in place, the same at every call."""
    random, (Hkv, D) = _rng(device, seed), (8, 128) if L > 2 else (2, 8)
    tails, caches = [random(L, 1, T, Hkv, D) for _ in "kv"], [random(L, 1, S, Hkv, D) for _ in "kv"]
    path = torch.arange(0, 2 * A, 2, device=device).clamp(max=T - 1).int()[None]
    count, length = (torch.tensor([n], dtype=torch.int32, device=device) for n in (A, S - A - 1))
    before = [cache.clone() for cache in caches]

    def want() -> tuple[Tensor, ...]:
        for layer in range(L):
            reference.kv_commit(*(x[layer] for x in (*tails, *before)), path, count, length)
        return tuple(before)

    return Case((*tails, *caches, path, count, length), 8 * L * A * Hkv * D, 0, "fp32", want, 0.0)


def _append(device: str, T: int, S: int, seed: int) -> Case:
    """New rows of one sequence; the caches are written in place, the same at every call."""
    random, (Hkv, D) = _rng(device, seed), (8, 128) if S > 64 else (2, 8)
    rows, caches = [random(1, T, Hkv, D) for _ in "kv"], [random(1, S, Hkv, D) for _ in "kv"]
    length = torch.tensor([S - T - 1], dtype=torch.int32, device=device)
    before = [cache.clone() for cache in caches]

    def want() -> tuple[Tensor, ...]:
        reference.kv_append(*rows, *before, length)
        return tuple(before)

    return Case((*rows, *caches, length), 8 * T * Hkv * D, 0, "fp32", want, 0.0)


def _rope_append(device: str, rows: int, S: int, seed: int) -> Case:
    """Rows of a fused product, as the layers of a model have them; the caches are written in place, the same at every call."""
    random, (Hq, Hkv, D) = _rng(device, seed), (32, 8, 128) if S > 64 else (4, 2, 64)
    qkv, caches = random(rows, (Hq + 2 * Hkv) * D), [random(S, Hkv, D) for _ in "kv"]
    angle = torch.arange(S, device=device)[:, None] / 10000 ** (torch.arange(D // 2, device=device) * 2 / D)
    slots = torch.arange(S - rows, S, dtype=torch.int32, device=device)
    tables = angle.cos(), angle.sin(), slots
    wide = [cache.double() for cache in caches]

    def want() -> tuple[Tensor, ...]:
        return reference.rope_append(qkv.double(), *tables, slots, *wide), *wide

    return Case((qkv, *tables, slots, *caches), 4 * qkv.numel(), 3 * qkv.numel(), "fp32", want, 0.01)


def _colsum(device: str, tiny: bool, T: int, S: int, seed: int) -> Case:
    (Hq, Hkv, D), random = tree.SIZES["tiny" if tiny else "large"], _rng(device, seed)
    q, k, length = random(1, T, Hq, D), random(1, S, Hkv, D), torch.tensor([S], dtype=torch.int32, device=device)
    scores = q.float().unflatten(2, (Hkv, -1)).permute(0, 2, 3, 1, 4) @ k.float().permute(0, 2, 3, 1)[:, :, None] / D**0.5
    lse = scores.logsumexp(-1).permute(0, 3, 1, 2).flatten(2).contiguous()
    want = lambda: (reference.attention_colsum(q.double(), k.double(), lse, length),)  # noqa: E731
    return Case((q, k, lse, length), 2 * S * Hkv * D + 4 * Hkv * S, 2 * Hq * T * S * D, "bf16", want, 0.01)


def _norm(device: str, rows: int, H: int, seed: int) -> Case:
    random = _rng(device, seed)
    x, weight, residual = random(rows, H), random(H), random(rows, H)
    want = lambda: (reference.rms_norm((x + residual).double(), weight.double()), x + residual)  # noqa: E731
    return Case((x, weight, residual), 8 * rows * H, 4 * rows * H, "fp32", want, 0.01)


def _silu(device: str, rows: int, columns: int, seed: int) -> Case:
    x = _rng(device, seed)(rows, 2 * columns)
    return Case((x,), 6 * rows * columns, 3 * rows * columns, "fp32", lambda: (reference.silu_mul(x.double()),), 0.01)


def _rope(device: str, rows: int, H: int, seed: int) -> Case:
    x = _rng(device, seed)(rows, H, 64)
    angle = torch.arange(rows, device=device)[:, None] / 10000 ** (torch.arange(32, device=device) / 32)
    cos, sin, at = angle.cos(), angle.sin(), torch.arange(rows, device=device)
    return Case((x, cos, sin, at), 4 * x.numel(), 3 * x.numel(), "fp32", lambda: (reference.rope(x.double(), cos, sin, at),), 0.01)


def _embed(device: str, rows: int, H: int, V: int, seed: int) -> Case:
    table = _rng(device, seed)(V, H)
    ids = torch.randint(0, V, (rows,), generator=torch.Generator().manual_seed(seed)).to(device)
    return Case((ids, table), 4 * rows * H, 0, "fp32", lambda: (table[ids],), 0.0)


def _causal(device: str, tiny: bool, S: int, seed: int) -> Case:
    (Hq, Hkv, D), random = tree.SIZES["tiny" if tiny else "large"], _rng(device, seed)
    q, k, v = random(1, S, Hq, D), random(1, S, Hkv, D), random(1, S, Hkv, D)
    end = torch.arange(1, S + 1, device=device).int()[None]

    def want() -> tuple[Tensor]:
        wide = (x.double().transpose(1, 2) for x in (q, k, v))
        return (F.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True).transpose(1, 2),)

    return Case((q, k, v, torch.zeros_like(end), end), 4 * S * (Hq + Hkv) * D, 2 * Hq * S * (S + 1) * D, "bf16", want, 0.02)


def _merge(device: str, T: int, seed: int) -> Case:
    random = _rng(device, seed)
    args = random(1, T, 32, 64), random(1, T, 32, dtype=F32), random(1, T, 32, 64), random(1, T, 32, dtype=F32)
    wide = lambda: reference.merge_states(*(x.double() for x in args))  # noqa: E731
    return Case(args, 6 * args[0].numel() + 12 * args[1].numel(), 3 * args[0].numel(), "fp32", wide, 0.01)


def _tensors(x: tree.Inputs) -> tuple:
    return x.q, x.k, x.v, x.tail_k, x.tail_v, x.ancestors, x.prefix_len


def _in_place(op: Callable[..., None]) -> Callable[..., tuple[Tensor, Tensor]]:
    """An op that writes its third and fourth argument, as one that returns them."""

    def call(*args: Tensor) -> tuple[Tensor, Tensor]:
        op(*args)
        return args[2], args[3]

    return call


CALLS: dict[str, tuple[Callable[..., Any], Callable[..., tuple] | None]] = {
    "tree_attention": (ops.tree_attention, _tensors),
    "linear": (gpu_linear.ours, None),
    "row_stats": (ops.row_stats, None),
    "topk_logits": (lambda x: ops.topk_logits(x, 10), None),
    "verify_greedy": (ops.verify_greedy, None),
    "verify_sample": (ops.verify_sample, None),
    "residual_sample": (ops.residual_sample, None),
    "table_draft": (ops.table_draft, None),
    "table_learn": (lambda table, *rest: (ops.table_learn(table, *rest), table)[1:], None),
    "kv_commit": (_in_place(ops.kv_commit), None),
    "kv_append": (_in_place(ops.kv_append), None),
    "rope_append": (lambda *args: (ops.rope_append(*args), *args[5:]), None),
    "attention_colsum": (ops.attention_colsum, None),
    "rms_norm": (ops.rms_norm, None),
    "silu_mul": (ops.silu_mul, None),
    "rope": (ops.rope, None),
    "embed": (ops.embed, None),
    "interval_attention": (ops.interval_attention, None),
    "merge_states": (ops.merge_states, None),
}
"""Op -> how it is called, and what turns a case's arguments into its own."""


def _torch_commit(tail_k: Tensor, tail_v: Tensor, k: Tensor, v: Tensor, path: Tensor, count: int, length: int) -> tuple[Tensor, Tensor]:
    for cache, tail in ((k, tail_k), (v, tail_v)):
        cache[:, 0, length : length + count] = tail[:, 0, path]
    return k, v


def _torch_rope(x: Tensor, cos: Tensor, sin: Tensor, at: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    c, s = cos[at][:, None], sin[at][:, None]
    return torch.cat([a * c - b * s, b * c + a * s], dim=-1).to(x.dtype)


def _torch_norm(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    x = x + residual
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-6), x


def _torch_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def _heads_first(*args: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2).contiguous() for x in args[:3])


def _numbers(*args: Tensor) -> tuple:
    return *args[:4], args[4][0].long(), int(args[5]), int(args[6])


TORCH: dict[str, tuple[Callable[..., Any], Callable[..., tuple] | None]] = {
    "row_stats": (lambda x: (x.argmax(-1), x.float().logsumexp(-1), x.amax(-1)), None),
    "topk_logits": (lambda x: x.topk(10), None),
    "kv_commit": (_torch_commit, _numbers),
    "rms_norm": (_torch_norm, None),
    "silu_mul": (lambda x: F.silu(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :], None),
    "rope": (_torch_rope, None),
    "embed": (lambda ids, table: F.embedding(ids, table), None),
    "interval_attention": (_torch_causal, _heads_first),
    "merge_states": (reference.merge_states, None),
    "verify_greedy": (reference.verify_greedy, None),
    "table_draft": (reference.table_draft, None),
}
"""Op -> what torch offers for it."""

COMPILED = ("row_stats", "rms_norm", "silu_mul", "rope")
"""Ops for which torch.compile makes a kernel of its own."""


def ways(op: str, device: str) -> list[Provider]:
    """Who computes an op."""
    call, prepare = CALLS[op]
    kernels = {row.backend for row in backends.TABLE if row.op == op} | {"cpu"}  # without one, plain torch would run under its name
    found = [Provider(f"ramify {name}", call, backend=name, prepare=prepare) for name in OURS[device] if name in kernels]
    if op.endswith("_attention") and device == "cuda" and torch.cuda.get_device_capability() == (9, 0):
        found.insert(1, Provider("ramify cuda, mma.sync", peers.by_mma(call), backend="cuda", prepare=prepare))  # else it is by wgmma
    if op == "tree_attention" and device == "cuda":
        found.append(Provider("ramify cuda, row-invariant", _row_invariant, backend="cuda", prepare=prepare))
    if op in TORCH:
        plain, prepared = TORCH[op]
        found.append(Provider("torch", plain, baseline=True, prepare=prepared))
        if op in COMPILED and device == "cuda":
            found.append(Provider("torch.compile", torch.compile(plain), baseline=True, prepare=prepared, facts={"slow": True}))
    own = {"tree_attention": _attention_ways, "linear": gpu_linear.ways}
    return found + (own[op](device) if op in own else [])


def _row_invariant(*args: Tensor) -> Tensor:
    with backends.row_invariant(True):
        return ops.tree_attention(*args)


def _attention_ways(device: str) -> list[Provider]:
    """torch's ways to attend under a mask, and the packages that know trees."""
    slow, single, few = {"slow": True}, lambda cell: cell["T"] == 1, lambda cell: cell["T"] in (8, 64) and cell["context"] == 8192
    found = [
        Provider("sdpa, boolean mask", tree.sdpa, baseline=True, prepare=tree.whole),
        Provider("sdpa, heads packed by hand", tree.sdpa_packed, baseline=True, prepare=tree.packed),
        Provider("sdpa, no mask", tree.sdpa, baseline=True, only=single, prepare=lambda x: (*tree.whole(x)[:3], None)),
    ]
    if device == "cpu":
        return found
    needs = {name: lambda m=module, p=package: peers.missing(m, p) for name, module, package in _PACKAGES}
    return [
        *found,
        Provider("FlexAttention, compiled", tree.flex, baseline=True, only=few, prepare=tree.flex_inputs, facts=slow),
        Provider(
            "FlashInfer, custom mask", peers.run_flashinfer_mask, baseline=True, needs=needs["infer"], only=few,
            prepare=peers.flashinfer_mask, facts=slow,
        ),
        Provider("FlashInfer XQA", peers.run_xqa, baseline=True, needs=needs["infer"], only=few, prepare=peers.xqa, facts=slow),
        Provider("FlashAttention 2", peers.flash2, baseline=True, needs=needs["two"], only=single, prepare=peers.flash_inputs),
        Provider("FlashAttention 3", peers.flash3, baseline=True, needs=needs["three"], only=single, prepare=peers.flash_inputs),
    ]  # fmt: skip


_PACKAGES = (
    ("infer", "flashinfer", "flashinfer-python"),
    ("two", "flash_attn", "flash-attn"),
    ("three", "flash_attn_interface", "flash-attn-3, from its sources"),
)
